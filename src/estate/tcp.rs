//! TCP sessions as records: two connections, the bytes between them, and what is remembered of both. Owns the
//! form, and which bits there are.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Span;
use super::entry::{Address, EntryRecord};

/// Backends that a session can have been offered.
pub const OFFERS_MAX: usize = 8;
/// The first bytes of a stranger that are kept until it is known whether they begin a PROXY header.
pub const SCREEN_BYTES: usize = 12;
/// There is no such descriptor.
pub const NO_SOCKET: U32 = U32::MAX_VALUE;

/// A session. Sides are the client's, then the backend's.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct SessionRecord {
    pub entry: EntryRecord,
    /// The places of the two sockets; a session that is not connected yet has one.
    pub sockets: [U32; 2],
    pub relay: RelayRecord,
    /// When the last connection was begun, or when the last byte moved.
    pub active: U64,
    pub look_at: U64,
    /// Where the user has connected to, if a proxy has told.
    pub destination: Address,
    pub watches: [WatchRecord; 2],
    /// The backends that the user was offered, the first `tried` of them.
    pub offered: [U32; OFFERS_MAX],
    pub tried: u8,
    /// How many of them could not be asked for want of a local port.
    pub portless: u8,
    /// Bits of this struct's constants.
    pub flags: u8,
    /// How many of the bytes of a stranger are known.
    pub screened: u8,
    pub screen: [u8; SCREEN_BYTES],
    /// One more than its number among those whose sockets have come [ahead](super::ahead); zero if they come with
    /// this.
    pub ahead: U32,
}

impl SessionRecord {
    /// Both connections are established.
    pub const RELAYS: u8 = 1;
    pub const HALF_CLOSED: u8 = 2;
    /// The first bytes of the client, or of the backend, are still to be looked at.
    pub const CLIENT_UNSEEN: u8 = 4;
    pub const BACKEND_UNSEEN: u8 = 8;
    pub const FLAGS: u8 = 15;
}

/// What lies between two connections.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct RelayRecord {
    /// By the side that the bytes come from.
    pub flows: [FlowRecord; 2],
    /// By side: bits of [`LineBits`].
    pub lines: [u8; 2],
    /// One if bytes were received and thrown away.
    pub lost: u8,
    pub unused: u8,
}

/// One direction of a session.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct FlowRecord {
    /// Received and not sent on.
    pub waiting: Span,
    pub delivered: U64,
    /// Bytes in a pipe to the other side, and the places of its ends if there are any.
    pub piped: U32,
    pub pipe: [U32; 2],
}

impl FlowRecord {
    /// A direction in which nothing has moved.
    pub const NEW: FlowRecord = FlowRecord {
        waiting: Span { offset: U32::ZERO, len: U32::ZERO },
        delivered: U64::ZERO,
        piped: U32::ZERO,
        pipe: [NO_SOCKET; 2],
    };
}

/// What is known about one connection.
pub struct LineBits;

impl LineBits {
    /// The peer has finished sending.
    pub const ENDED: u8 = 1;
    /// The connection was reset.
    pub const FAILED: u8 = 2;
    /// The peer was told that no more will come.
    pub const FINISHED: u8 = 4;
    /// Nothing can be sent to the peer any more.
    pub const GONE: u8 = 8;
    /// The last send stopped short, and the rest has not gone out.
    pub const SHORT: u8 = 16;
    pub const ALL: u8 = 31;
}

/// What is remembered of one host from look to look.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct WatchRecord {
    /// One more than the bytes that it had acknowledged at the last look; zero if nothing was queued.
    pub acknowledged: U64,
    /// Since when it has owed an answer; zero if it owes none.
    pub owing_since: U64,
}
