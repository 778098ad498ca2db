//! What the sessions are told about received datagrams, and their verdict: send, hand off or drop.
//! Owns the reasons for dropping, each with its counter.

use std::net::SocketAddr;

use crate::cluster::{Barrier, ServiceId};
use crate::metrics::{Counter, WorkerCounters};
use crate::proxy::udp::SocketId;
use crate::worker::link::Shortage;

/// A door, and the service whose users come to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DoorRef {
    /// Among the doors of each worker.
    pub place: u16,
    pub service: ServiceId,
}

/// Who sent a datagram, and what it was sent to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin {
    pub client: SocketAddr,
    /// The local address.
    pub local: SocketAddr,
    pub door: DoorRef,
}

/// The size of what was received: one datagram, or several that the kernel coalesced, each
/// `segment_size` bytes long but the last, which may be shorter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segments {
    pub bytes: usize,
    /// At least `bytes` if it is one datagram.
    pub segment_size: usize,
}

impl Segments {
    /// One datagram.
    pub const fn one(bytes: usize) -> Segments {
        Segments { bytes, segment_size: bytes }
    }

    /// How many datagrams it is.
    pub fn datagrams(self) -> u64 {
        if self.bytes <= self.segment_size {
            1
        } else {
            self.bytes.div_ceil(self.segment_size.max(1)) as u64
        }
    }

    /// The length of the longest datagram, in bytes.
    pub fn longest(self) -> usize {
        self.bytes.min(self.segment_size)
    }
}

/// The verdict on a datagram from a user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Up {
    Send {
        from: SocketId,
        to: SocketAddr,
    },
    /// Open this socket, report the outcome with `Sessions::opened`, and ask again.
    Open(SocketId),
    /// Hand it off to this worker, which runs its session and asks with `Sessions::handed_off`.
    HandOff(u8),
    Drop(DropReason),
}

/// The verdict on a datagram from a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Down {
    /// Send it to the user by the door it came by, from the local address it has sent to.
    Send {
        /// The door's place.
        door: u16,
        from: SocketAddr,
        to: SocketAddr,
    },
    Drop(DropReason),
}

/// Why a datagram is dropped. Each reason has its counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DropReason {
    NoBackend,
    /// The service lets the user in no further.
    Barred(Barrier),
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

impl DropReason {
    /// What was short, if the reason is a lack of room.
    pub fn shortage(self) -> Option<Shortage> {
        match self {
            DropReason::TableFull => Some(Shortage::Place),
            DropReason::Barred(Barrier::Sessions | Barrier::BackendSessions) => {
                Some(Shortage::Service)
            }
            DropReason::UpstreamExhausted => Some(Shortage::Pair),
            DropReason::SourceShare => Some(Shortage::Share),
            _ => None,
        }
    }

    pub fn counter(self, counters: &WorkerCounters) -> &Counter {
        match self {
            DropReason::NoBackend => &counters.udp_dropped_no_backend,
            DropReason::Barred(_) => &counters.udp_dropped_barred,
            DropReason::TableFull => &counters.udp_dropped_table_full,
            DropReason::SourceLimit => &counters.udp_dropped_source_limit,
            DropReason::SourceRate => &counters.udp_dropped_source_rate,
            DropReason::SourceShare => &counters.udp_dropped_source_share,
            DropReason::UpstreamExhausted => &counters.udp_dropped_upstream_exhausted,
            DropReason::Draining => &counters.udp_dropped_draining,
            DropReason::TooBig => &counters.udp_dropped_too_big,
            DropReason::Truncated => &counters.udp_dropped_truncated,
            DropReason::QueueFull => &counters.udp_dropped_queue_full,
            DropReason::SendFailed => &counters.udp_dropped_send_failed,
            DropReason::SpoofedReply => &counters.udp_dropped_spoofed_reply,
            DropReason::UnknownReply => &counters.udp_dropped_unknown_reply,
            DropReason::LateReply => &counters.udp_dropped_late_reply,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_know_how_many_datagrams_they_are() {
        for (bytes, segment_size, datagrams, longest) in [
            (0, 0, 1, 0),
            (1, 1, 1, 1),
            (100, 65_535, 1, 100),
            (2400, 1200, 2, 1200),
            (2401, 1200, 3, 1200),
            (5, 0, 5, 0),
        ] {
            let segments = Segments { bytes, segment_size };
            assert_eq!(
                (segments.datagrams(), segments.longest()),
                (datagrams, longest),
                "{segments:?}"
            );
        }
    }
}
