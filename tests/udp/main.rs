//! UDP users against the real kernel: workers and sockets of this process, the control core played
//! by the test. Tests that need interfaces of their own need root and run only when asked for:
//! `cargo test --test udp -- --ignored`.

mod backend_loss;
mod bursts;
mod ends;
mod forwarding;
mod handoff;
mod harness;
mod networks;
mod sockets;
mod strangers;
#[path = "../common/wait.rs"]
mod wait;
