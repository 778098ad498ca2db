//! API users as records: those between two requests, and those whose connection has become a tunnel. Owns the
//! form, and which bits there are.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Span;
use super::entry::{Address, EntryRecord};
use super::tcp::{NO_SOCKET, RelayRecord};

/// A user.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct UserRecord {
    /// Without a backend, unless this is a tunnel.
    pub entry: EntryRecord,
    /// The places of the user's socket, and of a tunnel's other.
    pub sockets: [U32; 2],
    /// Of a user between two requests only the client's line counts.
    pub relay: RelayRecord,
    /// When something last moved, and when data last came.
    pub active: U64,
    pub heard: U64,
    /// Where the user has connected to, if a proxy has told.
    pub destination: Address,
    /// The request that became a tunnel.
    pub request: RequestRecord,
    /// How many requests there have been.
    pub number: U32,
    /// The door that it came by.
    pub door: U16,
    /// Bits of this struct's constants.
    pub flags: u8,
    pub unused: u8,
}

impl UserRecord {
    pub const TUNNEL: u8 = 1;
    /// It has had a backend.
    pub const STARTED: u8 = 2;
    pub const FLAGS: u8 = 3;
    /// Its sockets are not in the parcel yet.
    pub const APART: [U32; 2] = [NO_SOCKET; 2];
}

/// What the log will say of a request that became a tunnel.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct RequestRecord {
    /// The name of the service that serves it; and of the one that left it to that one, or nothing.
    pub service: Span,
    pub asked: Span,
    /// Host, ID, and then method and target.
    pub line: Span,
    pub trace: [u8; 16],
    /// When its head began, was read, had a connection, and was answered; zero: never.
    pub times: [U64; 4],
    pub status: U16,
    /// Bytes of the host and of the ID in `line`.
    pub host: u8,
    pub id: u8,
    pub retries: u8,
    /// One if the connection had served other requests.
    pub reused: u8,
    pub unused: [u8; 2],
}

impl RequestRecord {
    /// There is none.
    pub const NONE: RequestRecord = RequestRecord {
        service: NOTHING,
        asked: NOTHING,
        line: NOTHING,
        trace: [0; 16],
        times: [U64::ZERO; 4],
        status: U16::ZERO,
        host: 0,
        id: 0,
        retries: 0,
        reused: 0,
        unused: [0; 2],
    };
}

const NOTHING: Span = Span { offset: U32::ZERO, len: U32::ZERO };
