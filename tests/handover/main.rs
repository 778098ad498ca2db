//! Real balancers that hand over to their successors while everybody goes on.

mod failures;
mod harness;
mod late;
mod operators;
mod peers;
mod requests;
mod sessions;

#[path = "../common/process.rs"]
mod process;
#[path = "../common/random.rs"]
mod random;
#[path = "../common/wait.rs"]
mod wait;
