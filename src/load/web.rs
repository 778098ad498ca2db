//! HTTP/1.1 as the load speaks it: one request at a time on a persistent connection, and whether
//! what came back is its response. Pure. The request says whose it is in `x-lb-bench`, which echo
//! backends of ours send back; they also say who they are in `x-lb-backend`, and then the body is
//! checked too.

use super::message::Content;
use super::tally::RequestFailure;
use crate::http::Limits;
use crate::http::body::{self, Body, Framing};
use crate::http::head::{self, Space};

/// The field that says whose request or response it is.
pub const IDENTITY: &str = "x-lb-bench";
/// The field in which a backend of ours says who it is.
pub const BACKEND: &str = "x-lb-backend";
/// Length of an identity in bytes: connection and sequence in hexadecimal digits.
const IDENTITY_BYTES: usize = 8 + 1 + 16;
/// A path prefix: behind it comes the number of content bytes with which a backend of ours answers.
pub const BYTES_PATH: &str = "/bytes/";
/// The path under which it checks and counts the body.
pub const COUNT_PATH: &str = "/count";
/// The path under which it sends the body back.
pub const ECHO_PATH: &str = "/echo";
/// Limit on the bytes of a body.
pub const BODY_BYTES_MAX: usize = 4 << 20;

/// What a request carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    None,
    /// This many bytes of the content that both ends know.
    Content(usize),
    Bytes(Vec<u8>),
}

impl Payload {
    pub fn len(&self) -> usize {
        match self {
            Payload::None => 0,
            Payload::Content(count) => *count,
            Payload::Bytes(bytes) => bytes.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a backend of ours must answer.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Expected {
    Anything,
    Content(u64),
    Text(Vec<u8>),
}

/// The request that every connection makes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// The head up to its identity.
    before: Vec<u8>,
    pub payload: Payload,
    expected: Expected,
    to_head: bool,
}

impl Request {
    /// A request for `path` on `host`, with field lines as the user gave them. The error names what
    /// cannot be sent.
    pub fn new(
        method: &str,
        path: &str,
        host: &str,
        fields: &[String],
        payload: Payload,
    ) -> Result<Request, String> {
        if payload.len() > BODY_BYTES_MAX {
            return Err(format!("a body has at most {} MiB here", BODY_BYTES_MAX >> 20));
        }
        let names_host = fields.iter().any(|line| line.to_ascii_lowercase().starts_with("host:"));
        let mut text = format!("{method} {path} HTTP/1.1\r\n");
        if !names_host {
            text += &format!("host: {host}\r\n");
        }
        for line in fields {
            text += &format!("{line}\r\n");
        }
        if !payload.is_empty() || matches!(method, "POST" | "PUT" | "PATCH") {
            text += &format!("content-length: {}\r\n", payload.len());
        }
        text += &format!("{IDENTITY}: ");
        let request = Request {
            before: text.into_bytes(),
            expected: Expected::of(method, path, &payload),
            payload,
            to_head: method == "HEAD",
        };
        request.check().map(|()| request)
    }

    /// Checks that it is one request, and a valid one: a field or a path may bring no lines of its
    /// own.
    fn check(&self) -> Result<(), String> {
        let mut bytes = Vec::new();
        self.write_head(0, 0, &mut bytes);
        let mut space = Space::new();
        match head::request(&bytes, 0, &Limits::default(), &mut space) {
            Ok(Some(head)) if head.length == bytes.len() => Ok(()),
            Ok(_) => Err("method, path and headers do not make one request".to_owned()),
            Err(fault) => {
                Err(format!("method, path and headers do not make a valid request: {fault}"))
            }
        }
    }

    /// Appends the head of one request.
    pub fn write_head(&self, connection: u32, sequence: u64, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.before);
        write_identity(connection, sequence, into);
        into.extend_from_slice(b"\r\n\r\n");
    }

    /// Whether a backend of ours may answer with these `bytes` at `position` of the body.
    pub fn allows(&self, content: &Content, position: u64, bytes: &[u8]) -> bool {
        self.expected.allows(content, position, bytes)
    }

    /// Whether a body of `count` bytes is all that a backend of ours has to answer.
    pub fn is_whole(&self, count: u64) -> bool {
        self.expected.is_whole(count)
    }

    /// Length of the whole request in bytes.
    pub fn len(&self) -> usize {
        self.before.len() + IDENTITY_BYTES + 4 + self.payload.len()
    }

    /// Never, since a request has a head.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Appends what says whose request it is.
pub fn write_identity(connection: u32, sequence: u64, into: &mut Vec<u8>) {
    use std::io::Write;
    write!(into, "{connection:08x}-{sequence:016x}").expect("memory takes all bytes");
}

/// Whether a response with this identity belongs to that request.
pub fn check_identity(value: &[u8], connection: u32, sequence: u64) -> Result<(), RequestFailure> {
    let number =
        |digits: Option<&[u8]>| u64::from_str_radix(std::str::from_utf8(digits?).ok()?, 16).ok();
    match (number(value.get(..8)), number(value.get(9..))) {
        (Some(other), Some(number)) if other == u64::from(connection) => {
            match number.cmp(&sequence) {
                std::cmp::Ordering::Less => Err(RequestFailure::Duplicated),
                std::cmp::Ordering::Equal => Ok(()),
                std::cmp::Ordering::Greater => Err(RequestFailure::Corrupt),
            }
        }
        (Some(_), Some(_)) => Err(RequestFailure::WrongClient),
        _ => Err(RequestFailure::Corrupt),
    }
}

/// Who says so in [`BACKEND`]; zero if it is no number.
pub fn backend(value: &[u8]) -> u32 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

impl Expected {
    fn of(method: &str, path: &str, payload: &Payload) -> Expected {
        if method == "HEAD" {
            return Expected::Anything;
        }
        if let Some(count) = path.strip_prefix(BYTES_PATH).and_then(|count| count.parse().ok()) {
            return Expected::Content(count);
        }
        match (path, payload) {
            (COUNT_PATH, payload) => Expected::Text(format!("{}\n", payload.len()).into_bytes()),
            (ECHO_PATH, Payload::Content(count)) => Expected::Content(*count as u64),
            (ECHO_PATH, Payload::Bytes(bytes)) => Expected::Text(bytes.clone()),
            _ => Expected::Anything,
        }
    }

    /// Whether `bytes` may be at `position` of the body.
    fn allows(&self, content: &Content, position: u64, bytes: &[u8]) -> bool {
        match self {
            Expected::Anything => true,
            Expected::Content(count) => {
                position + bytes.len() as u64 <= *count && content.matches(position, bytes)
            }
            Expected::Text(text) => {
                usize::try_from(position).ok().and_then(|at| text.get(at..at + bytes.len()))
                    == Some(bytes)
            }
        }
    }

    fn is_whole(&self, count: u64) -> bool {
        match self {
            Expected::Anything => true,
            Expected::Content(whole) => count == *whole,
            Expected::Text(text) => count == text.len() as u64,
        }
    }
}

#[derive(Debug)]
enum State {
    /// No response is awaited.
    Idle,
    Head,
    Body(Body),
}

/// A complete response.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Response {
    /// Who answered; zero if nobody said.
    pub backend: u32,
    pub status: u16,
    /// Bytes of head and body as received.
    pub bytes: u64,
    /// The connection ends with it.
    pub last: bool,
}

/// One connection.
#[derive(Debug)]
pub struct Web {
    connection: u32,
    sequence: u64,
    state: State,
    /// The beginning of an incomplete head.
    part: Vec<u8>,
    response: Response,
    /// Content bytes of the body so far.
    position: u64,
}

impl Web {
    pub fn new(connection: u32) -> Web {
        let response = Response { backend: 0, status: 0, bytes: 0, last: false };
        Web { connection, sequence: 0, state: State::Idle, part: Vec::new(), response, position: 0 }
    }

    /// The same for a new connection; the count goes on.
    pub fn anew(self) -> Web {
        Web { sequence: self.sequence, ..Web::new(self.connection) }
    }

    /// Whether a response is awaited.
    pub fn waiting(&self) -> bool {
        !matches!(self.state, State::Idle)
    }

    /// Appends the head of the next request; its payload follows.
    pub fn request(&mut self, request: &Request, into: &mut Vec<u8>) {
        assert!(!self.waiting(), "one request at a time");
        self.sequence += 1;
        self.state = State::Head;
        self.response = Response { backend: 0, status: 0, bytes: 0, last: false };
        self.position = 0;
        request.write_head(self.connection, self.sequence, into);
    }

    /// Takes received bytes; returns the response once it is complete. After a fault the connection
    /// is of no further use.
    pub fn received(
        &mut self,
        request: &Request,
        content: &Content,
        bytes: &[u8],
    ) -> Result<Option<Response>, RequestFailure> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match &mut self.state {
                State::Idle => return Err(RequestFailure::Corrupt),
                State::Head => {
                    let Some(count) = self.head(request, rest)? else { return Ok(None) };
                    rest = &rest[count..];
                }
                State::Body(_) => rest = &rest[self.body(request, content, rest)?..],
            }
            if self.is_finished() {
                let response = self.finish(request)?;
                return if rest.is_empty() {
                    Ok(Some(response))
                } else {
                    Err(RequestFailure::Corrupt)
                };
            }
        }
        Ok(None)
    }

    /// The other side has closed the connection; returns the response if it was to end so.
    pub fn ended(&mut self, request: &Request) -> Result<Response, RequestFailure> {
        match &self.state {
            State::Body(body) if body.may_end_with_connection() => self.finish(request),
            _ => Err(RequestFailure::Closed),
        }
    }

    /// Reads a head; returns how many of the bytes belonged to it, or `None` while it is
    /// incomplete.
    fn head(&mut self, request: &Request, bytes: &[u8]) -> Result<Option<usize>, RequestFailure> {
        if self.part.is_empty() {
            // A small response usually comes in one piece, and is read where it is.
            let length = self.read_head(request, bytes)?;
            if length.is_none() {
                self.part.extend_from_slice(bytes);
            }
            return Ok(length);
        }
        let mut part = std::mem::take(&mut self.part);
        let before = part.len();
        part.extend_from_slice(bytes);
        let length = self.read_head(request, &part)?;
        if length.is_none() {
            self.part = part;
        }
        Ok(length.map(|length| length - before))
    }

    fn read_head(
        &mut self,
        request: &Request,
        bytes: &[u8],
    ) -> Result<Option<usize>, RequestFailure> {
        let mut space = Space::new();
        let read = head::response(bytes, 0, &Limits::default(), &mut space);
        let Some(head) = read.map_err(|_| RequestFailure::Malformed)? else { return Ok(None) };
        self.response.bytes += head.length as u64;
        if (100..200).contains(&head.status) {
            return Ok(Some(head.length));
        }
        let framing =
            body::of_response(&head, request.to_head).map_err(|_| RequestFailure::Malformed)?;
        self.response.status = head.status;
        self.response.last = head.connection.close
            || framing == Framing::UntilClose
            || head.version == crate::http::Version::Http10 && !head.connection.keep_alive;
        for (_, field) in head.fields.iter() {
            if field.name.eq_ignore_ascii_case(IDENTITY) {
                check_identity(field.value, self.connection, self.sequence)?;
            } else if field.name.eq_ignore_ascii_case(BACKEND) {
                self.response.backend = backend(field.value);
            }
        }
        self.state = State::Body(Body::new(framing, false, u64::MAX));
        Ok(Some(head.length))
    }

    /// Takes bytes of a body; returns how many belonged to it.
    fn body(
        &mut self,
        request: &Request,
        content: &Content,
        bytes: &[u8],
    ) -> Result<usize, RequestFailure> {
        let State::Body(body) = &mut self.state else { return Ok(0) };
        let check = self.response.backend != 0 && self.response.status < 300;
        let good = |position: u64, bytes: &[u8]| !check || request.allows(content, position, bytes);
        let (consumed, count, right) = match body {
            Body::Length(left) => {
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= count as u64;
                (count, count, good(self.position, &bytes[..count]))
            }
            Body::UntilClose => (bytes.len(), bytes.len(), good(self.position, bytes)),
            Body::Chunked(chunked) => {
                let mut copy = bytes.to_vec();
                let passed = chunked.pass(&mut copy).map_err(|_| RequestFailure::Malformed)?;
                let right = good(self.position, &copy[passed.output.clone()]);
                if passed.finished {
                    *body = Body::Length(0);
                }
                (passed.consumed, passed.output.len(), right)
            }
        };
        self.response.bytes += consumed as u64;
        self.position += count as u64;
        if right { Ok(consumed) } else { Err(RequestFailure::Corrupt) }
    }

    fn is_finished(&self) -> bool {
        matches!(self.state, State::Body(Body::Length(0)))
    }

    fn finish(&mut self, request: &Request) -> Result<Response, RequestFailure> {
        self.state = State::Idle;
        let known = self.response.backend != 0 && self.response.status < 300;
        if known && !request.is_whole(self.position) {
            return Err(RequestFailure::Corrupt);
        }
        Ok(self.response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str) -> Request {
        Request::new("GET", path, "host", &[], Payload::None).unwrap()
    }

    fn asked(request: &Request) -> Web {
        let mut web = Web::new(5);
        web.request(request, &mut Vec::new());
        web
    }

    #[test]
    fn a_request_says_whose_it_is() {
        let fields = ["accept: */*".to_owned()];
        let request =
            Request::new("POST", "/count", "host:80", &fields, Payload::Content(3)).unwrap();
        let mut bytes = Vec::new();
        let mut web = Web::new(0x2a);
        web.request(&request, &mut bytes);
        assert_eq!(
            String::from_utf8_lossy(&bytes),
            "POST /count HTTP/1.1\r\nhost: host:80\r\naccept: */*\r\ncontent-length: 3\r\n\
             x-lb-bench: 0000002a-0000000000000001\r\n\r\n"
        );
        assert_eq!(request.len(), bytes.len() + 3);
    }

    #[test]
    fn a_request_that_is_none_is_refused_in_words() {
        let long = Payload::Content(BODY_BYTES_MAX + 1);
        for (method, path, field, payload) in [
            ("GET", "/a b", "a: b", Payload::None),
            ("GET", "no-slash", "a: b", Payload::None),
            ("GET", "/", "a: b\r\n\r\nGET / HTTP/1.1", Payload::None),
            ("GET", "/", "no colon", Payload::None),
            ("G T", "/", "a: b", Payload::None),
            ("POST", "/", "a: b", long),
        ] {
            let fields = [field.to_owned()];
            assert!(
                Request::new(method, path, "host", &fields, payload).is_err(),
                "{method} {path} {field}"
            );
        }
    }

    /// The verdict on a response that arrives in pieces of every size.
    fn verdict(request: &Request, response: &[u8]) -> Result<Option<Response>, RequestFailure> {
        let content = Content::new();
        let mut first = None;
        for piece in [response.len(), 1, 7] {
            let mut web = asked(request);
            let mut verdict = Ok(None);
            for part in response.chunks(piece) {
                verdict = web.received(request, &content, part);
                if verdict != Ok(None) {
                    break;
                }
            }
            assert_eq!(*first.get_or_insert(verdict), verdict, "pieces of {piece}");
        }
        first.unwrap_or(Ok(None))
    }

    fn text(text: &str) -> Vec<u8> {
        text.replace('\n', "\r\n").into_bytes()
    }

    #[test]
    fn responses_of_every_framing_are_taken() {
        let request = get("/");
        let hundred = "HTTP/1.1 103 Early Hints\nlink: </a>\n\n";
        for (response, status, last) in [
            ("HTTP/1.1 200 OK\ncontent-length: 5\n\nhello", 200, false),
            ("HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n3\nabc\n2\nde\n0\n\n", 200, false),
            ("HTTP/1.1 204 No Content\n\n", 204, false),
            ("HTTP/1.1 404 Not Found\nconnection: close\ncontent-length: 0\n\n", 404, true),
            ("HTTP/1.0 200 OK\ncontent-length: 1\n\nx", 200, true),
        ] {
            for before in ["", hundred] {
                let bytes = text(&format!("{before}{response}"));
                let found = verdict(&request, &bytes).unwrap().unwrap();
                assert_eq!((found.status, found.last), (status, last), "{response}");
                assert_eq!(found.bytes, bytes.len() as u64);
            }
        }
    }

    #[test]
    fn a_response_may_end_with_the_connection_only_if_it_says_no_length() {
        let content = Content::new();
        let request = get("/");
        let mut web = asked(&request);
        let bytes = text("HTTP/1.1 200 OK\n\nhello");
        assert_eq!(web.received(&request, &content, &bytes), Ok(None));
        assert!(web.ended(&request).unwrap().last);
        let mut web = asked(&request);
        let bytes = text("HTTP/1.1 200 OK\ncontent-length: 9\n\nhello");
        assert_eq!(web.received(&request, &content, &bytes), Ok(None));
        assert_eq!(web.ended(&request), Err(RequestFailure::Closed));
    }

    #[test]
    fn a_response_to_head_has_no_body() {
        let request = Request::new("HEAD", "/bytes/5", "host", &[], Payload::None).unwrap();
        let bytes = text("HTTP/1.1 200 OK\ncontent-length: 5\nx-lb-backend: 9\n\n");
        assert_eq!(verdict(&request, &bytes).unwrap().unwrap().backend, 9);
    }

    fn ours(identity: &str, body: &[u8]) -> Vec<u8> {
        let mut bytes = text(&format!(
            "HTTP/1.1 200 OK\nx-lb-backend: 9301\nx-lb-bench: {identity}\ncontent-length: {}\n\n",
            body.len()
        ));
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn responses_that_are_not_ours_or_not_right_are_named() {
        const MINE: &str = "00000005-0000000000000001";
        let content = Content::new();
        let right = content.from(0, 100);
        let request = get("/bytes/100");
        let found = verdict(&request, &ours(MINE, right)).unwrap().unwrap();
        assert_eq!((found.backend, found.status), (9_301, 200));
        let twice = [ours(MINE, right), ours(MINE, right)].concat();
        let mut web = asked(&request);
        assert_eq!(web.received(&request, &content, &twice), Err(RequestFailure::Corrupt));
        for (bytes, fault) in [
            (ours("00000006-0000000000000001", right), RequestFailure::WrongClient),
            (ours("00000005-0000000000000000", right), RequestFailure::Duplicated),
            (ours("00000005-0000000000000002", right), RequestFailure::Corrupt),
            (ours("5-1", right), RequestFailure::Corrupt),
            (ours(MINE, content.from(1, 100)), RequestFailure::Corrupt),
            (ours(MINE, content.from(0, 99)), RequestFailure::Corrupt),
            (ours(MINE, content.from(0, 101)), RequestFailure::Corrupt),
            (text("SSH-2.0-OpenSSH\n"), RequestFailure::Malformed),
            (
                text("HTTP/1.1 200 OK\ncontent-length: 1\ncontent-length: 2\n\nx"),
                RequestFailure::Malformed,
            ),
        ] {
            assert_eq!(
                verdict(&request, &bytes),
                Err(fault),
                "{}",
                String::from_utf8_lossy(&bytes)
            );
        }
    }

    #[test]
    fn a_count_and_an_echo_are_checked_against_what_was_sent() {
        const MINE: &str = "00000005-0000000000000001";
        let body = Payload::Bytes(b"some body".to_vec());
        for (path, right, wrong) in
            [(COUNT_PATH, &b"9\n"[..], &b"8\n"[..]), (ECHO_PATH, b"some body", b"same body")]
        {
            let request = Request::new("POST", path, "host", &[], body.clone()).unwrap();
            assert!(verdict(&request, &ours(MINE, right)).is_ok());
            assert_eq!(verdict(&request, &ours(MINE, wrong)), Err(RequestFailure::Corrupt));
        }
    }
}
