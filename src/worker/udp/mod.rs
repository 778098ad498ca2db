//! UDP: `driver` moves datagrams between the ring and `sessions`, which decides what happens to
//! them.

mod batching;
pub mod driver;
pub mod handoff;
pub mod local_addresses;
pub mod sessions;
