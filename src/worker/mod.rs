//! A worker: one thread, one ring, its share of the users. `shell` is its loop; each protocol has a
//! room (`tcp`, `udp`, `http`), in which a `driver` stands between the ring and `sessions`, the pure
//! decisions. `driver` is what the loop asks of a driver, and `cx` the context of a decision. The
//! protocols share the `books`, and the two that carry streams share `streams`, `greetings`, `lobby`
//! (handshakes), `secured` (TLS beyond them) and `stream_driver`; `link` is the link to the control core,
//! which has a worker stand still and go on by its `brake`; `standstill` carries that out.

mod approach;
pub mod books;
pub mod brake;
pub mod cx;
pub mod door;
pub mod driver;
pub mod ends;
mod followers;
mod grace;
mod greetings;
pub mod http;
pub mod late;
pub mod link;
mod lobby;
mod opening;
mod secured;
pub mod shell;
pub mod slots;
mod standstill;
mod starved;
mod stream_driver;
mod streams;
pub mod tcp;
pub mod udp;

/// Which driver a completion is for: the upper four bits of `Tag::kind`. The lower four are the
/// driver's own and not zero.
pub mod family {
    use crate::cluster::Protocol;

    pub const SHELL: u8 = 0x00;
    pub const TCP: u8 = 0x10;
    pub const UDP: u8 = 0x20;
    pub const API: u8 = 0x30;

    /// The family of the driver that serves these users.
    pub const fn of(protocol: Protocol) -> u8 {
        match protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
            Protocol::Api => API,
        }
    }

    /// Counted from zero, the shell's; below 16.
    pub fn number(kind: u8) -> usize {
        usize::from(kind >> 4)
    }
}
