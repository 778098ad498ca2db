//! HTTP/2 (RFC 9113), as a way in which requests and responses of the gateway are carried: one connection, many
//! streams, each a user's line of its own to a gateway that speaks HTTP/1.1 and knows of no other. What lies in between
//! is a transformer, as TLS is: it takes the gateways' commands and the connection's bytes, and answers both in their
//! own words. So each stream is routed, balanced, limited, repeated and logged as any request is.
//!
//! ```text
//!   gateways of streams      Receive --> Received (text)       Send (text) --> Sent
//!                               ^  written                        |  read
//!                               |                                 v
//!   front                    fields, content, trailers         fields, content, trailers
//!                               ^                                 |
//!                               |  h2: frames, windows, HPACK     v
//!   gateway of the user      bytes received                    bytes to send
//! ```
//!
//! Towards backends that speak HTTP/2 it is the other way round: requests of many users go over one connection, each on
//! a stream that its gateway takes for a connection of its own ([`Back`]).
//!
//! Frames, windows and header compression are the `h2` crate's, driven over memory: it has no socket, no task and no
//! timer here. It allocates for each stream, which nothing else in a worker does; what it may hold is bounded by the
//! constants below and by the [`guard`].

mod back;
mod front;
mod guard;
pub mod pipe;
mod reading;
mod stream;
mod streams;
mod writing;

pub use back::Back;
pub use front::{Circumstances, Front, Patience};
pub use guard::{Excess, PREFACE};
pub use streams::News;

/// The window of a stream, which is opened again as its bytes go on to the backend.
const STREAM_WINDOW: u32 = 256 * 1024;
/// The window of a connection, whose streams share it.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// The longest frame that is accepted: the shortest limit that may be set (RFC 9113 section 4.2), so that no stream
/// holds up the others for long.
const FRAME_BYTES_MAX: u32 = 16 * 1024;
/// The longest list of fields, counted as RFC 9113 section 6.5.2 does; the gateway's own limits are narrower.
const LIST_BYTES_MAX: u32 = 64 * 1024;
/// Content in the crate's hands that has not been written yet, over all streams of a connection.
const OWED_MAX: usize = 64 * 1024;
/// Content that counts as progress where less than the whole was taken: a user that opens its window byte by byte
/// holds a response no longer than one that never does.
const PROGRESS_BYTES: usize = 16 * 1024;
/// Streams of a connection to a backend, if the backend lets us have as many.
const SHARED_MAX: usize = 100;
/// The same until it has said how many.
const SHARED_FIRST: usize = 32;
/// Streams that were reset by us whose late frames are still borne.
const RESET_STREAMS_MAX: usize = 128;
