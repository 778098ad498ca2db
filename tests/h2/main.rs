//! HTTP/2 against `lb serve` as a process of its own, frame by frame: what would be two things to two readers, and
//! users who only make work.

mod abuse;
mod frames;
mod harness;
#[path = "../common/process.rs"]
mod process;
#[path = "../api/reading.rs"]
mod reading;
mod recorder;
#[path = "../common/servers.rs"]
mod servers;
mod smuggling;
#[path = "../common/wait.rs"]
mod wait;
