//! HTTP/1.1 messages as bytes: reading heads, finding where a body ends, writing heads anew. Pure:
//! no sockets, no clock, no connection state; that is `proxy::http`'s. RFC 9110 and RFC 9112, read
//! strictly: a message that two readers could understand differently is refused, and none is passed
//! on as it arrived; each is written anew from its parts.

pub mod answer;
pub mod body;
pub mod chunked;
pub mod date;
pub mod field;
pub mod head;
pub mod login;
pub mod trace;
pub mod user;
pub mod write;

use std::fmt;

/// The longest body that may be announced. Some readers use a signed 64-bit counter, in which
/// anything longer wraps to a negative length, and so to another opinion about where the body ends.
pub const LENGTH_MAX: u64 = i64::MAX as u64;

/// What a message may take up before it is refused. A head is held in memory until it is complete, so
/// these bound what a connection can hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes of a request line or a status line, without its line end.
    pub line_bytes: usize,
    /// Bytes of one field line, without its line end.
    pub field_bytes: usize,
    /// Bytes of a whole head, with the empty line that ends it.
    pub head_bytes: usize,
    /// Field lines in a head; at most [`head::FIELDS_MAX`].
    pub fields: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            line_bytes: 8 << 10,
            field_bytes: 8 << 10,
            head_bytes: 32 << 10,
            fields: head::FIELDS_MAX,
        }
    }
}

/// The two versions we speak. What we write is always HTTP/1.1 (RFC 9112 2.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Version {
    Http10,
    Http11,
}

/// Why a message is refused. The peer is at fault, so this is a value to answer with and to count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed {
    /// The status to answer the user with; 502 for every fault of a backend.
    pub status: u16,
    /// What was wrong, for the answer's body and the log; contains no bytes of the message.
    pub reason: &'static str,
}

impl Malformed {
    pub const fn new(status: u16, reason: &'static str) -> Malformed {
        Malformed { status, reason }
    }

    /// The same fault, found in what a backend sent.
    pub const fn of_backend(self) -> Malformed {
        Malformed { status: 502, reason: self.reason }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.status, self.reason)
    }
}
