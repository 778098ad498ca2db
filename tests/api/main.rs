//! API users against the real kernel: workers and sockets of this process, backends that remember every
//! byte that reached them, the control core played by the test.

mod forwarding;
mod harness;
mod refusals;
mod troubles;
mod upgrade;
