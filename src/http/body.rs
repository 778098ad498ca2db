//! Where a body ends. Owns the choice of framing for requests and responses (RFC 9112 6.3) and the
//! counting of body bytes as they pass; buffers nothing. Whatever leaves room for two opinions about
//! the length is refused, because a second opinion is how a request is smuggled (RFC 9112 11.2).

use super::chunked::{Chunked, Passed};
use super::field::{self, Name};
use super::head::{Fields, RequestHead, ResponseHead};
use super::{LENGTH_MAX, Malformed, Version};

/// How a message says where its body ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Framing {
    /// No body, and no field that announces one.
    None,
    /// The length in bytes, as stated by `Content-Length`.
    Length(u64),
    Chunked,
    /// Everything until the connection ends; responses only.
    UntilClose,
}

/// The framing of a request. A request without either field has no body.
pub fn of_request(head: &RequestHead<'_, '_>) -> Result<Framing, Malformed> {
    let fields = &head.fields;
    if fields.has(Name::TransferEncoding) {
        if fields.has(Name::ContentLength) {
            return Err(Malformed::new(400, "both Transfer-Encoding and Content-Length"));
        }
        if head.version == Version::Http10 {
            return Err(Malformed::new(400, "Transfer-Encoding in HTTP/1.0"));
        }
        return only_chunked(fields).map(|()| Framing::Chunked);
    }
    Ok(content_length(fields)?.map_or(Framing::None, Framing::Length))
}

/// The framing of a final or interim response. Its faults are the backend's. Some responses have no
/// body whatever their fields say, but fields that could not be right are refused all the same.
pub fn of_response(
    head: &ResponseHead<'_, '_>,
    to_head_request: bool,
) -> Result<Framing, Malformed> {
    let fields = &head.fields;
    let said = if fields.has(Name::TransferEncoding) {
        if fields.has(Name::ContentLength) {
            return Err(Malformed::new(502, "both Transfer-Encoding and Content-Length"));
        }
        if head.version == Version::Http10 {
            return Err(Malformed::new(502, "Transfer-Encoding in HTTP/1.0"));
        }
        only_chunked(fields).map_err(Malformed::of_backend)?;
        Framing::Chunked
    } else {
        match content_length(fields).map_err(Malformed::of_backend)? {
            Some(length) => Framing::Length(length),
            None => Framing::UntilClose,
        }
    };
    let empty = to_head_request || matches!(head.status, 100..=199 | 204 | 304);
    Ok(if empty { Framing::None } else { said })
}

/// The length that `Content-Length` names: digits alone, once (RFC 9110 8.6).
pub fn content_length(fields: &Fields<'_, '_>) -> Result<Option<u64>, Malformed> {
    if !fields.has(Name::ContentLength) {
        return Ok(None);
    }
    let mut values = fields.values(Name::ContentLength);
    match (values.next().and_then(number), values.next()) {
        (Some(length), None) => Ok(Some(length)),
        _ => Err(Malformed::new(400, "malformed Content-Length")),
    }
}

fn number(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    let number = value.iter().try_fold(0u64, |sum, byte| match byte {
        b'0'..=b'9' => sum.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })?;
    (number <= LENGTH_MAX).then_some(number)
}

/// `chunked` once and nothing else is the only coding that is understood (RFC 9112 6.1).
fn only_chunked(fields: &Fields<'_, '_>) -> Result<(), Malformed> {
    let mut codings = fields.values(Name::TransferEncoding).flat_map(field::list);
    let is_chunked = |coding: &[u8]| coding.eq_ignore_ascii_case(b"chunked");
    match (codings.next(), codings.next()) {
        (Some(only), None) if is_chunked(only) => Ok(()),
        (Some(first), _) if is_chunked(first) => {
            Err(Malformed::new(400, "chunked is not the last transfer coding"))
        }
        (Some(b"") | None, _) => Err(Malformed::new(400, "malformed Transfer-Encoding")),
        _ => Err(Malformed::new(501, "unknown transfer coding")),
    }
}

/// A body on its way through.
#[derive(Debug)]
pub enum Body {
    /// The number of bytes still to come.
    Length(u64),
    Chunked(Chunked),
    UntilClose,
}

impl Body {
    /// A body with that framing. With `keep_chunks`, chunked framing is passed on; without it, only
    /// the content. More than `bytes_max` bytes of content are refused.
    pub fn new(framing: Framing, keep_chunks: bool, bytes_max: u64) -> Body {
        match framing {
            Framing::None => Body::Length(0),
            Framing::Length(length) => Body::Length(length),
            Framing::Chunked => Body::Chunked(Chunked::new(keep_chunks, bytes_max)),
            Framing::UntilClose => Body::UntilClose,
        }
    }

    /// The same body, sent by a backend.
    pub fn of_backend(self) -> Body {
        match self {
            Body::Chunked(chunked) => Body::Chunked(chunked.of_backend()),
            other => other,
        }
    }

    /// Processes the next bytes to arrive, which may go beyond the body. Rewrites them in place.
    pub fn pass(&mut self, bytes: &mut [u8]) -> Result<Passed, Malformed> {
        match self {
            Body::Length(left) => {
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= count as u64;
                Ok(Passed { consumed: count, output: 0..count, finished: *left == 0 })
            }
            Body::Chunked(chunked) => chunked.pass(bytes),
            Body::UntilClose => {
                Ok(Passed { consumed: bytes.len(), output: 0..bytes.len(), finished: false })
            }
        }
    }

    /// Whether the body may end where the connection ends.
    pub fn may_end_with_connection(&self) -> bool {
        matches!(self, Body::UntilClose)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Limits;
    use crate::http::head::{self, Space};

    fn request(version: &str, lines: &str) -> Result<Framing, u16> {
        let text = format!("POST / HTTP/{version}\r\nHost: x\r\n{lines}\r\n");
        let mut space = Space::new();
        let head = head::request(text.as_bytes(), 0, &Limits::default(), &mut space);
        of_request(&head.unwrap().unwrap()).map_err(|fault| fault.status)
    }

    fn response(line: &str, lines: &str, to_head: bool) -> Result<Framing, u16> {
        let text = format!("HTTP/{line}\r\n{lines}\r\n");
        let mut space = Space::new();
        let head = head::response(text.as_bytes(), 0, &Limits::default(), &mut space);
        of_response(&head.unwrap().unwrap(), to_head).map_err(|fault| fault.status)
    }

    #[test]
    fn a_request_says_one_thing_about_its_length() {
        for (lines, wanted) in [
            ("", Ok(Framing::None)),
            ("Content-Length: 0\r\n", Ok(Framing::Length(0))),
            ("Content-Length: 42\r\n", Ok(Framing::Length(42))),
            ("Content-Length: 007\r\n", Ok(Framing::Length(7))),
            ("Content-Length: 9223372036854775807\r\n", Ok(Framing::Length(LENGTH_MAX))),
            ("Content-Length: 9223372036854775808\r\n", Err(400)),
            ("Content-Length: 18446744073709551615\r\n", Err(400)),
            ("Content-Length: 18446744073709551616\r\n", Err(400)),
            ("Content-Length: 99999999999999999999999999\r\n", Err(400)),
            ("Content-Length:\r\n", Err(400)),
            ("Content-Length: +1\r\n", Err(400)),
            ("Content-Length: -1\r\n", Err(400)),
            ("Content-Length: 1 1\r\n", Err(400)),
            ("Content-Length: 0x1\r\n", Err(400)),
            ("Content-Length: 1.0\r\n", Err(400)),
            ("Content-Length: 42, 42\r\n", Err(400)),
            ("Content-Length: 42\r\nContent-Length: 42\r\n", Err(400)),
            ("Content-Length: 1\r\nContent-Length: 2\r\n", Err(400)),
            ("Transfer-Encoding: chunked\r\n", Ok(Framing::Chunked)),
            ("Transfer-Encoding: CHUNKED\r\n", Ok(Framing::Chunked)),
            ("Transfer-Encoding: \t chunked \t\r\n", Ok(Framing::Chunked)),
            ("Transfer-Encoding: xchunked\r\n", Err(501)),
            ("Transfer-Encoding: chunkedx\r\n", Err(501)),
            ("Transfer-Encoding: gzip, chunked\r\n", Err(501)),
            ("Transfer-Encoding: identity\r\n", Err(501)),
            ("Transfer-Encoding: \"chunked\"\r\n", Err(501)),
            ("Transfer-Encoding: chunked;a=b\r\n", Err(501)),
            ("Transfer-Encoding: chunked, gzip\r\n", Err(400)),
            ("Transfer-Encoding: chunked, chunked\r\n", Err(400)),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", Err(400)),
            ("Transfer-Encoding: chunked,\r\n", Err(400)),
            ("Transfer-Encoding: , chunked\r\n", Err(400)),
            ("Transfer-Encoding:\r\n", Err(400)),
            ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", Err(400)),
            ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", Err(400)),
            ("Transfer_Encoding: chunked\r\n", Ok(Framing::None)),
        ] {
            assert_eq!(request("1.1", lines), wanted, "{lines:?}");
        }
    }

    #[test]
    fn http_1_0_knows_no_transfer_coding() {
        assert_eq!(request("1.0", "Transfer-Encoding: chunked\r\n"), Err(400));
        assert_eq!(request("1.0", "Content-Length: 3\r\n"), Ok(Framing::Length(3)));
        assert_eq!(response("1.0 200 OK", "Transfer-Encoding: chunked\r\n", false), Err(502));
    }

    #[test]
    fn a_response_ends_where_its_request_and_status_say() {
        let length = "Content-Length: 5\r\n";
        let chunked = "Transfer-Encoding: chunked\r\n";
        for (line, lines, to_head, wanted) in [
            ("1.1 200 OK", length, false, Ok(Framing::Length(5))),
            ("1.1 200 OK", chunked, false, Ok(Framing::Chunked)),
            ("1.1 200 OK", "", false, Ok(Framing::UntilClose)),
            ("1.0 200 OK", "", false, Ok(Framing::UntilClose)),
            ("1.1 200 OK", length, true, Ok(Framing::None)),
            ("1.1 200 OK", chunked, true, Ok(Framing::None)),
            ("1.1 100 Continue", "", false, Ok(Framing::None)),
            ("1.1 103 Early Hints", length, false, Ok(Framing::None)),
            ("1.1 204 No Content", length, false, Ok(Framing::None)),
            ("1.1 204 No Content", chunked, false, Ok(Framing::None)),
            ("1.1 304 Not Modified", length, false, Ok(Framing::None)),
            ("1.1 205 Reset Content", "Content-Length: 0\r\n", false, Ok(Framing::Length(0))),
            ("1.1 404 Not Found", length, false, Ok(Framing::Length(5))),
            ("1.1 200 OK", "Content-Length: 5\r\nContent-Length: 5\r\n", false, Err(502)),
            ("1.1 200 OK", "Content-Length: a\r\n", true, Err(502)),
            ("1.1 200 OK", "Transfer-Encoding: gzip, chunked\r\n", false, Err(502)),
            ("1.1 200 OK", "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", false, Err(502)),
        ] {
            assert_eq!(response(line, lines, to_head), wanted, "{line} {lines:?}");
        }
    }

    #[test]
    fn a_counted_body_takes_its_bytes_and_no_more() {
        let mut body = Body::new(Framing::Length(5), true, u64::MAX);
        let first = body.pass(&mut b"abc".to_vec()).unwrap();
        assert_eq!(first, Passed { consumed: 3, output: 0..3, finished: false });
        let last = body.pass(&mut b"defgh".to_vec()).unwrap();
        assert_eq!(last, Passed { consumed: 2, output: 0..2, finished: true });
        assert!(!body.may_end_with_connection());
    }

    #[test]
    fn a_body_until_close_takes_everything() {
        let mut body = Body::new(Framing::UntilClose, true, u64::MAX);
        let all = body.pass(&mut b"abc".to_vec()).unwrap();
        assert_eq!(all, Passed { consumed: 3, output: 0..3, finished: false });
        assert!(body.may_end_with_connection());
    }
}
