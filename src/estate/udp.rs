//! UDP sessions as records, with the sockets that they share, the pairs that rest after their end, and what is
//! remembered of those who open them. Owns the form, and which bits there are.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::entry::{Address, EntryRecord};

/// A socket towards backends.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct UpstreamRecord {
    /// Its place among the descriptors.
    pub socket: U32,
    /// Its place among those of its family.
    pub place: U16,
    pub is_v6: u8,
    pub unused: u8,
}

/// A socket and a local address on it; with a backend's address, that is a pair.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct SenderRecord {
    /// The place of the [`UpstreamRecord`].
    pub upstream: U32,
    /// None where the kernel chooses it. The port means nothing.
    pub local: Address,
}

/// A session.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct FlowRecord {
    pub entry: EntryRecord,
    /// Which of our addresses its user sends to.
    pub local: Address,
    /// Where the door is bound that its replies leave by.
    pub door: Address,
    pub sender: SenderRecord,
    pub last_seen: U64,
    /// It ends once each datagram has been answered this many times; zero: it does not end by that.
    pub responses: U32,
    pub owed: U32,
    /// Bits of this struct's constants.
    pub flags: u8,
    pub unused: [u8; 3],
}

impl FlowRecord {
    /// An answer is outstanding.
    pub const AWAITING: u8 = 1;
    /// It no longer counts as in use.
    pub const QUIET: u8 = 2;
    /// The last datagram has no answer yet.
    pub const UNANSWERED: u8 = 4;
    /// ICMP has reported its backend unreachable.
    pub const REFUSED: u8 = 8;
    pub const FLAGS: u8 = 15;
}

/// A pair that rests. Those of one backend come oldest first.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct RestRecord {
    pub backend: Address,
    pub sender: SenderRecord,
    pub until: U64,
    /// When a datagram last passed.
    pub at: U64,
    /// When no reply can be expected any more.
    pub clean: U64,
}

/// Something that counts for a source.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct SourceRecord {
    /// Its address or network.
    pub prefix: U64,
    /// When its rate is as that of one never seen before; zero if this is about a pair.
    pub clear_at: U64,
    /// Until when the pair of an ended session counts.
    pub until: U64,
}
