//! The words in which datagrams are told to the core, and what it says to do with them. Owns the reasons
//! why a datagram goes no further, each with its counter.

use std::net::SocketAddr;

use crate::metrics::{Counter, WorkerCounters};
use crate::proxy::udp::Socket;
use crate::worker::link::Shortage;

/// Payloads of one sender that came together: one datagram, or several of `segment` bytes of which
/// only the last may be shorter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Load {
    pub bytes: usize,
    /// Not less than `bytes` when it is one datagram.
    pub segment_size: usize,
}

impl Load {
    /// One datagram.
    pub const fn one(bytes: usize) -> Load {
        Load { bytes, segment_size: bytes }
    }

    pub fn datagrams(self) -> u64 {
        if self.bytes <= self.segment_size {
            1
        } else {
            self.bytes.div_ceil(self.segment_size.max(1)) as u64
        }
    }

    /// The longest of them.
    pub fn longest(self) -> usize {
        self.bytes.min(self.segment_size)
    }
}

/// What to do with a datagram from a user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Up {
    Send {
        from: Socket,
        to: SocketAddr,
    },
    /// Open this socket first, tell with `Sessions::opened` how it went, and ask again.
    Open(Socket),
    /// Hand it to this worker, which runs its session, and ask there with `Sessions::passed`.
    Pass(u8),
    Drop(Why),
}

/// What to do with a datagram from a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Down {
    /// Send it to the user, from the address that the user spoke to.
    Send {
        from: SocketAddr,
        to: SocketAddr,
    },
    Drop(Why),
}

/// Why a datagram goes no further. Each has its counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Why {
    NoBackend,
    TableFull,
    SourceLimit,
    SourceRate,
    SourceShare,
    UpstreamExhausted,
    Draining,
    TooBig,
    Truncated,
    QueueFull,
    SendFailed,
    SpoofedReply,
    UnknownReply,
    LateReply,
}

impl Why {
    /// What a session found short, if it was that.
    pub fn shortage(self) -> Option<Shortage> {
        match self {
            Why::TableFull => Some(Shortage::Place),
            Why::UpstreamExhausted => Some(Shortage::Pair),
            Why::SourceShare => Some(Shortage::Share),
            _ => None,
        }
    }

    pub fn counter(self, counters: &WorkerCounters) -> &Counter {
        match self {
            Why::NoBackend => &counters.udp_dropped_no_backend,
            Why::TableFull => &counters.udp_dropped_table_full,
            Why::SourceLimit => &counters.udp_dropped_source_limit,
            Why::SourceRate => &counters.udp_dropped_source_rate,
            Why::SourceShare => &counters.udp_dropped_source_share,
            Why::UpstreamExhausted => &counters.udp_dropped_upstream_exhausted,
            Why::Draining => &counters.udp_dropped_draining,
            Why::TooBig => &counters.udp_dropped_too_big,
            Why::Truncated => &counters.udp_dropped_truncated,
            Why::QueueFull => &counters.udp_dropped_queue_full,
            Why::SendFailed => &counters.udp_dropped_send_failed,
            Why::SpoofedReply => &counters.udp_dropped_spoofed_reply,
            Why::UnknownReply => &counters.udp_dropped_unknown_reply,
            Why::LateReply => &counters.udp_dropped_late_reply,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_knows_how_many_datagrams_it_is() {
        for (bytes, segment_size, datagrams, longest) in [
            (0, 0, 1, 0),
            (1, 1, 1, 1),
            (100, 65_535, 1, 100),
            (2400, 1200, 2, 1200),
            (2401, 1200, 3, 1200),
            (5, 0, 5, 0),
        ] {
            let load = Load { bytes, segment_size };
            assert_eq!((load.datagrams(), load.longest()), (datagrams, longest), "{load:?}");
        }
    }
}
