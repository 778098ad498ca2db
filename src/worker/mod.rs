//! A worker: one thread, one ring, its share of the users. `shell` is its loop; each protocol has a
//! driver beside it (`tcp`, `udp`, `api`) that stands between the ring and a pure core (`core`, for
//! API users `gateways`); `books` is what the protocols share, `link` what crosses to the control
//! core.

pub mod api;
pub mod books;
pub mod core;
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

/// Which driver a completion is for: the upper four bits of `Tag::kind`. The lower four are the
/// driver's own and not zero.
pub mod family {
    pub const SHELL: u8 = 0x00;
    pub const TCP: u8 = 0x10;
    pub const UDP: u8 = 0x20;
    pub const API: u8 = 0x30;
}
