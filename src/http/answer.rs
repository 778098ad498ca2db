//! The balancer's own answers: errors that no backend gave. Owns their reason phrases and bodies.

use super::body::Framing;
use super::date::Date;
use super::field::{self, Name};
use super::head::Fields;
use super::write;

/// What kind of body a user wants to read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Taste {
    #[default]
    Text,
    Json,
    /// None: a call's error is in its fields.
    Grpc,
}

impl Taste {
    /// Fields for a call of gRPC, JSON for whoever names it in `Accept` (RFC 9110 12.5.1), text for everyone else.
    pub fn of(fields: &Fields<'_, '_>) -> Taste {
        if fields.has(Name::ContentType) && fields.values(Name::ContentType).any(is_grpc) {
            return Taste::Grpc;
        }
        let named = |element: &[u8]| {
            let mut parts = element.split(|byte| *byte == b';').map(field::trim);
            let range = parts.next().unwrap_or_default();
            let json = [&b"application/json"[..], b"application/problem+json", b"application/*"];
            json.iter().any(|wanted| range.eq_ignore_ascii_case(wanted)) && !parts.any(refuses)
        };
        if fields.has(Name::Accept) && fields.values(Name::Accept).flat_map(field::list).any(named)
        {
            Taste::Json
        } else {
            Taste::Text
        }
    }
}

/// Whether content is messages of gRPC, in whatever they are encoded; those of gRPC-Web are read by browsers.
pub fn is_grpc(content_type: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    content_type.get(..GRPC.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(GRPC))
        && matches!(content_type.get(GRPC.len()), None | Some(b'+' | b';' | b' '))
}

/// A weight of zero: "not this".
fn refuses(parameter: &[u8]) -> bool {
    match parameter {
        [b'q' | b'Q', b'=', b'0', rest @ ..] => rest.iter().all(|byte| matches!(byte, b'.' | b'0')),
        _ => false,
    }
}

/// An answer to one request.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    pub status: u16,
    /// What happened, for a person; plain ASCII without quotes.
    pub detail: &'a str,
    /// Finds the request in the log.
    pub id: &'a str,
    pub taste: Taste,
    /// It is refused because as much is served as may be.
    pub is_full: bool,
    /// The connection ends after it.
    pub close: bool,
    /// The request was `HEAD`: the answer states the length of a body that it does not carry.
    pub to_head_request: bool,
    /// Its `X-Request-Id`, if it has one.
    pub request_id: Option<&'a [u8]>,
    /// The value of `Retry-After`, in seconds.
    pub retry_after: Option<u32>,
    /// Where the user finds it instead.
    pub location: Option<&'a [u8]>,
    pub date: &'a Date,
}

/// Writes a whole answer, head and body.
pub fn put(out: &mut Vec<u8>, answer: &Answer<'_>) {
    let digits = [100, 10, 1].map(|unit| b'0' + (answer.status / unit % 10) as u8);
    let (status, phrase) = (&digits[..], phrase(answer.status).as_bytes());
    let (detail, id) = (answer.detail.as_bytes(), answer.id.as_bytes());
    let (kind, body): (&[u8], _) = match answer.taste {
        Taste::Grpc => return put_grpc(out, answer),
        Taste::Text => (
            b"text/plain; charset=utf-8",
            [&b""[..], status, b" ", phrase, b": ", detail, b" (request ", id, b")\n"],
        ),
        Taste::Json => (
            b"application/json",
            [
                &b"{\"status\":"[..],
                status,
                b",\"error\":\"",
                phrase,
                b"\",\"detail\":\"",
                detail,
                b"\",\"request\":\"",
                id,
                b"\"}\n",
            ],
        ),
    };
    put_head(out, answer, kind, body.iter().map(|part| part.len() as u64).sum());
    if !answer.to_head_request {
        body.iter().for_each(|part| out.extend_from_slice(part));
    }
}

/// Writes the answer to a call that has failed, which has nothing but a head (`Trailers-Only`, gRPC over HTTP2). A
/// client reads these two fields, and takes the status for the transport's.
fn put_grpc(out: &mut Vec<u8>, answer: &Answer<'_>) {
    write::put_status(out, 200, phrase(200));
    for part in [&b"Date: "[..], answer.date.text(), b"\r\nContent-Type: application/grpc\r\n"] {
        out.extend_from_slice(part);
    }
    out.extend_from_slice(b"Grpc-Status: ");
    write::put_number(out, u64::from(grpc_status(answer)));
    let (detail, id) = (answer.detail.as_bytes(), answer.id.as_bytes());
    for part in [&b"\r\nGrpc-Message: "[..], detail, b" (request ", id, b")\r\n"] {
        out.extend_from_slice(part);
    }
    write::put_framing(out, Framing::Length(0));
    write::put_id(out, answer.request_id);
    if answer.close {
        out.extend_from_slice(b"Connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// The code for what a client of HTTP is told by a status (gRPC's "HTTP to gRPC Status Code Mapping"), and for
/// fullness, which that does not know.
const fn grpc_status(answer: &Answer<'_>) -> u8 {
    const PERMISSION_DENIED: u8 = 7;
    const RESOURCE_EXHAUSTED: u8 = 8;
    const UNIMPLEMENTED: u8 = 12;
    const INTERNAL: u8 = 13;
    const UNAVAILABLE: u8 = 14;
    match answer.status {
        _ if answer.is_full => RESOURCE_EXHAUSTED,
        413 | 414 | 431 => RESOURCE_EXHAUSTED,
        403 => PERMISSION_DENIED,
        404 | 501 => UNIMPLEMENTED,
        400..=499 => INTERNAL,
        _ => UNAVAILABLE,
    }
}

fn put_head(out: &mut Vec<u8>, answer: &Answer<'_>, kind: &[u8], length: u64) {
    write::put_status(out, answer.status, phrase(answer.status));
    for part in [&b"Date: "[..], answer.date.text(), b"\r\nContent-Type: ", kind, b"\r\n"] {
        out.extend_from_slice(part);
    }
    write::put_framing(out, Framing::Length(length));
    if let Some(seconds) = answer.retry_after {
        out.extend_from_slice(b"Retry-After: ");
        write::put_number(out, u64::from(seconds));
        out.extend_from_slice(b"\r\n");
    }
    if let Some(location) = answer.location {
        [&b"Location: "[..], location, b"\r\n"].iter().for_each(|it| out.extend_from_slice(it));
    }
    write::put_id(out, answer.request_id);
    if answer.close {
        out.extend_from_slice(b"Connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// A ready-made answer for a user whom we cannot even listen to, because the process is out of
/// descriptors.
pub const NO_DESCRIPTOR: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
Content-Type: text/plain; charset=utf-8\r\nContent-Length: 56\r\nRetry-After: 5\r\nConnection: close\r\n\r\n\
503 Service Unavailable: there is no room for a request\n";

/// Another, for a user of plain HTTP at a door that speaks HTTPS.
pub const PLAIN_HTTP: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 56\r\n\
Connection: close\r\n\r\nThis door speaks HTTPS: begin the address with https://\n";

/// The reason phrase of each status that the balancer itself answers with (RFC 9110 15, RFC 6585,
/// RFC 5842).
pub const fn phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        200 => "OK",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        408 => "Request Timeout",
        413 => "Content Too Large",
        414 => "URI Too Long",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        508 => "Loop Detected",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::{self, Space};
    use crate::http::{Limits, body};

    fn taste(accept: &str) -> Taste {
        let text = format!("GET / HTTP/1.1\r\nHost: x\r\n{accept}\r\n");
        let mut space = Space::new();
        let head = head::request(text.as_bytes(), 0, &Limits::default(), &mut space);
        Taste::of(&head.unwrap().unwrap().fields)
    }

    #[test]
    fn answers_that_are_ready_are_whole() {
        for (answer, status) in [(NO_DESCRIPTOR, 503), (PLAIN_HTTP, 400)] {
            let mut space = Space::new();
            let head = head::response(answer, 0, &Limits::default(), &mut space);
            let head = head.unwrap().unwrap();
            assert_eq!((head.status, head.connection.close), (status, true));
            let rest = answer.len() - head.length;
            assert_eq!(body::content_length(&head.fields).unwrap(), Some(rest as u64));
        }
    }

    #[test]
    fn json_is_for_whoever_names_it() {
        for (accept, wanted) in [
            ("", Taste::Text),
            ("Accept: */*\r\n", Taste::Text),
            ("Accept: text/html, */*;q=0.8\r\n", Taste::Text),
            ("Accept: application/json\r\n", Taste::Json),
            ("Accept: text/plain\r\nAccept: APPLICATION/JSON ; q=0.5\r\n", Taste::Json),
            ("Accept: application/*\r\n", Taste::Json),
            ("Accept: application/json;q=0\r\n", Taste::Text),
            ("Accept: application/json; Q=0.000\r\n", Taste::Text),
            ("Accept: application/json; q=0.001\r\n", Taste::Json),
            ("Accept: application/jsonp\r\n", Taste::Text),
        ] {
            assert_eq!(taste(accept), wanted, "{accept}");
        }
    }

    #[test]
    fn a_call_is_told_in_its_own_words() {
        for (kind, wanted) in [
            ("application/grpc", Taste::Grpc),
            ("application/grpc+proto", Taste::Grpc),
            ("Application/GRPC; a=b", Taste::Grpc),
            ("application/grpc-web", Taste::Text),
            ("application/grp", Taste::Text),
        ] {
            assert_eq!(taste(&format!("Content-Type: {kind}\r\n")), wanted, "{kind}");
        }
        for (status, is_full, code) in
            [(503, false, 14), (503, true, 8), (404, false, 12), (403, false, 7), (413, false, 8)]
        {
            let text = written(|answer| {
                (answer.status, answer.is_full, answer.taste) = (status, is_full, Taste::Grpc);
            });
            assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
            assert!(text.contains(&format!("\r\nGrpc-Status: {code}\r\nGrpc-Message: ")), "{text}");
            assert!(text.ends_with("\r\n\r\n") && text.contains("Content-Length: 0\r\n"), "{text}");
        }
    }

    fn written(change: impl FnOnce(&mut Answer<'_>)) -> String {
        let date = Date::at(0);
        let mut answer = Answer {
            status: 503,
            is_full: false,
            detail: "no backend is registered",
            id: "0-1-2-3",
            taste: Taste::Text,
            close: false,
            to_head_request: false,
            request_id: None,
            retry_after: None,
            location: None,
            date: &date,
        };
        change(&mut answer);
        let mut out = Vec::new();
        put(&mut out, &answer);
        String::from_utf8(out).unwrap()
    }

    const HEAD: &str =
        "HTTP/1.1 503 Service Unavailable\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n";

    #[test]
    fn an_answer_is_a_whole_message() {
        let body = "503 Service Unavailable: no backend is registered (request 0-1-2-3)\n";
        let kind = "Content-Type: text/plain; charset=utf-8\r\nContent-Length: 68\r\n";
        assert_eq!(written(|_| ()), format!("{HEAD}{kind}\r\n{body}"));
        assert_eq!(
            written(|answer| {
                answer.close = true;
                answer.retry_after = Some(5);
                answer.request_id = Some(b"x-1");
                answer.to_head_request = true;
            }),
            format!("{HEAD}{kind}Retry-After: 5\r\nX-Request-Id: x-1\r\nConnection: close\r\n\r\n")
        );
    }

    #[test]
    fn a_json_answer_is_json() {
        let text = written(|answer| answer.taste = Taste::Json);
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
        let value: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "status": 503,
                "error": "Service Unavailable",
                "detail": "no backend is registered",
                "request": "0-1-2-3",
            })
        );
    }

    #[test]
    fn every_status_that_is_given_has_a_phrase() {
        let mut space = Space::new();
        for status in [400, 408, 413, 414, 417, 431, 501, 502, 503, 504, 505, 508] {
            let text = written(|answer| answer.status = status);
            let head = head::response(text.as_bytes(), 0, &Limits::default(), &mut space);
            let head = head.unwrap().unwrap();
            assert_eq!((head.status, head.reason.is_empty()), (status, false));
            let length = (text.len() - head.length) as u64;
            assert_eq!(body::of_response(&head, false), Ok(Framing::Length(length)));
            space = Space::new();
        }
    }
}
