//! API users against the real kernel: workers and sockets of this process, backends that record
//! every byte, and the test in the role of the control core.

mod fallback;
mod forwarding;
mod harness;
mod ids;
mod limits;
mod logins;
#[path = "../common/random.rs"]
mod random;
mod reading;
mod refusals;
mod services;
mod silence;
mod smuggling;
mod techniques;
mod troubles;
mod upgrade;
#[path = "../common/wait.rs"]
mod wait;
