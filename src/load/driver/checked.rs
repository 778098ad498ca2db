//! Whether bytes that a connection has received are those it waits for. Owns which of its state machines is
//! asked; draws no consequences.

use super::super::Load;
use super::super::connection::Talk;
use super::super::message::Content;
use super::super::tally::RequestFailure;
use super::super::web::Response;

/// What received bytes have come to.
pub(super) enum Checked {
    Incomplete,
    /// A whole reply, from this backend.
    Answered(u32),
    Responded(Response),
    /// So many bytes of a stream's content, from this backend.
    Streamed {
        backend: u32,
        count: usize,
    },
    /// So many bytes of HTTP/2, which are read when the connection is driven.
    Fed(usize),
}

/// Checks bytes of a stream that were received.
pub(super) fn check(
    talk: &mut Talk,
    load: &Load,
    content: &Content,
    bytes: &[u8],
) -> Result<Checked, RequestFailure> {
    match (talk, &load.request) {
        (Talk::Exchange(exchange), _) => {
            let backend = exchange.received(content, bytes)?;
            Ok(backend.map_or(Checked::Incomplete, Checked::Answered))
        }
        (Talk::Web(web), Some(request)) => {
            let response = web.received(request, content, bytes)?;
            Ok(response.map_or(Checked::Incomplete, Checked::Responded))
        }
        (Talk::Http2(http2), _) => {
            http2.feed(bytes);
            Ok(Checked::Fed(bytes.len()))
        }
        (Talk::Stream(stream), _) => {
            let count = stream.received(content, bytes)?;
            Ok(Checked::Streamed { backend: stream.backend(), count })
        }
        (Talk::Web(_) | Talk::Flow(_), _) => Ok(Checked::Incomplete),
    }
}
