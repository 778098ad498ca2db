//! A worker: one thread, one ring, its share of the users. `shell` is its loop; each protocol has a
//! driver beside it (`tcp`, `udp`, `api`) that stands between the ring and a pure core (`core`, for
//! API users `gateways`); `dispatcher` is what the protocols share, `link` what crosses to the control
//! core.

pub mod api;
pub mod core;
pub mod dispatcher;
mod door;
pub mod gateways;
pub mod link;
pub mod origins;
mod outbox;
pub mod passage;
pub mod requests;
pub mod shell;
mod splices;
pub mod tcp;
pub mod udp;
