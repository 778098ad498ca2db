//! What the gateway writes, in HTTP/1.1, on its way over HTTP/2: a response to a user, a request to a backend. Owns how
//! far it has been read, and what of its head is for a connection of HTTP/1.1 alone; what it says is the gateway's.

use bytes::{Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};

use crate::http::chunked::Chunked;
use crate::http::field::Name;
use crate::http::head::FIELDS_MAX;

/// Field lines of a head that the gateway has written: as many as it reads, and those that it adds.
const LINES_MAX: usize = FIELDS_MAX + 16;

/// The gateway never writes what cannot be read; a stream on which it did is reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Broken;

/// A head.
#[derive(Debug)]
pub enum Head {
    Interim(Response<()>),
    Final(Response<()>),
    Request(Request<()>),
}

/// What is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Response {
        to_head_request: bool,
    },
    /// To a backend that is reached by this scheme.
    Request {
        scheme: &'static str,
    },
}

/// What some of a body was.
#[derive(Debug)]
pub struct Content {
    pub bytes: Bytes,
    /// It is the last; the fields that follow it, if any.
    pub end: Option<HeaderMap>,
}

/// A message that is being read.
#[derive(Debug)]
pub struct Reader {
    kind: Kind,
    /// A head that is incomplete.
    head: Vec<u8>,
    body: Body,
}

#[derive(Debug)]
enum Body {
    /// Its head has not come.
    Awaited,
    /// Bytes that are still to come.
    Counted(u64),
    Chunked(Chunked),
    Over,
}

impl Reader {
    pub fn new(kind: Kind) -> Reader {
        Reader { kind, head: Vec::new(), body: Body::Awaited }
    }

    /// Whether a head comes next.
    pub fn awaits_head(&self) -> bool {
        matches!(self.body, Body::Awaited)
    }

    /// Whether all of it has been read.
    pub fn is_over(&self) -> bool {
        matches!(self.body, Body::Over)
    }

    /// Takes bytes of a head: how many, and the head if these were its last.
    pub fn take_head(&mut self, bytes: &[u8]) -> Result<(usize, Option<Head>), Broken> {
        let before = self.head.len();
        let from = before.saturating_sub(3);
        self.head.extend_from_slice(bytes);
        let end = self.head[from..].windows(4).position(|window| window == b"\r\n\r\n");
        let Some(end) = end.map(|end| from + end + 4) else { return Ok((bytes.len(), None)) };
        self.head.truncate(end);
        let text = Bytes::from(std::mem::take(&mut self.head));
        Ok((end - before, Some(self.read(&text)?)))
    }

    fn read(&mut self, text: &Bytes) -> Result<Head, Broken> {
        match self.kind {
            Kind::Response { to_head_request } => self.read_response(text, to_head_request),
            Kind::Request { scheme } => self.read_request(text, scheme),
        }
    }

    fn read_response(&mut self, text: &Bytes, to_head_request: bool) -> Result<Head, Broken> {
        let mut lines = [httparse::EMPTY_HEADER; LINES_MAX];
        let mut parsed = httparse::Response::new(&mut lines);
        let complete = parsed.parse(text).is_ok_and(|status| status.is_complete());
        let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
        let Some(status) = status.filter(|_| complete) else { return Err(Broken) };
        let Section { fields, framing, .. } = Section::of(parsed.headers, text)?;
        let mut response = Response::new(());
        (*response.status_mut(), *response.version_mut()) = (status, Version::HTTP_2);
        *response.headers_mut() = fields;
        if status.is_informational() {
            return Ok(Head::Interim(response));
        }
        let is_empty = to_head_request || matches!(status.as_u16(), 204 | 304);
        self.body = match framing {
            _ if is_empty => Body::Over,
            Some(body) => body,
            None => return Err(Broken),
        };
        Ok(Head::Final(response))
    }

    fn read_request(&mut self, text: &Bytes, scheme: &str) -> Result<Head, Broken> {
        let mut lines = [httparse::EMPTY_HEADER; LINES_MAX];
        let mut parsed = httparse::Request::new(&mut lines);
        let complete = parsed.parse(text).is_ok_and(|status| status.is_complete());
        let (Some(method), Some(path), true) = (parsed.method, parsed.path, complete) else {
            return Err(Broken);
        };
        let method = Method::from_bytes(method.as_bytes()).map_err(|_| Broken)?;
        let Section { fields, framing, host } = Section::of(parsed.headers, text)?;
        let host = host.ok_or(Broken)?;
        let path = PathAndQuery::from_maybe_shared(text.slice_ref(path.as_bytes()));
        let uri = Uri::builder()
            .scheme(scheme)
            .authority(&*host)
            .path_and_query(path.map_err(|_| Broken)?);
        let mut request = Request::new(());
        *request.uri_mut() = uri.build().map_err(|_| Broken)?;
        (*request.method_mut(), *request.version_mut()) = (method, Version::HTTP_2);
        *request.headers_mut() = fields;
        // Without either field there is no body.
        self.body = framing.unwrap_or(Body::Over);
        Ok(Head::Request(request))
    }

    /// Takes what comes before the next content, for a user who has no room for any: how many bytes, and the fields
    /// behind the body if that has ended.
    pub fn take_framing(&mut self, bytes: &[u8]) -> Result<(usize, Option<HeaderMap>), Broken> {
        for (count, byte) in bytes.iter().enumerate() {
            if !matches!(&self.body, Body::Chunked(chunked) if !chunked.is_in_content()) {
                return Ok((count, None));
            }
            let some = self.take_body(BytesMut::from(&[*byte][..]))?;
            if some.end.is_some() {
                return Ok((count + 1, some.end));
            }
        }
        Ok((bytes.len(), None))
    }

    /// Takes bytes of the body.
    pub fn take_body(&mut self, mut bytes: BytesMut) -> Result<Content, Broken> {
        match &mut self.body {
            Body::Counted(left) => {
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                bytes.truncate(count);
                *left -= count as u64;
                let end = (*left == 0).then(HeaderMap::new);
                self.body = if end.is_some() { Body::Over } else { Body::Counted(*left) };
                Ok(Content { bytes: bytes.freeze(), end })
            }
            Body::Chunked(chunked) => {
                let passed = chunked.pass(&mut bytes).map_err(|_| Broken)?;
                let end = passed.finished.then(|| fields(chunked.trailers())).transpose()?;
                if end.is_some() {
                    self.body = Body::Over;
                }
                Ok(Content { bytes: bytes.freeze().slice(passed.output), end })
            }
            Body::Awaited | Body::Over => Err(Broken),
        }
    }
}

/// The field lines of a head.
struct Section {
    fields: HeaderMap,
    /// How its body is framed, if the head says so.
    framing: Option<Body>,
    host: Option<Bytes>,
}

impl Section {
    fn of(lines: &[httparse::Header<'_>], text: &Bytes) -> Result<Section, Broken> {
        let mut fields = HeaderMap::with_capacity(lines.len());
        let (mut length, mut is_chunked, mut host) = (None, false, None);
        for line in lines {
            match Name::of(line.name) {
                Name::Host => {
                    host = Some(text.slice_ref(line.value));
                    continue;
                }
                Name::TransferEncoding => {
                    is_chunked = true;
                    continue;
                }
                // For a connection of HTTP/1.1 alone (RFC 9113 section 8.2.2).
                Name::Connection | Name::KeepAlive | Name::ProxyConnection | Name::Upgrade => {
                    continue;
                }
                Name::ContentLength => {
                    let value = std::str::from_utf8(line.value).ok();
                    length = value.and_then(|value| value.parse().ok());
                }
                _ => {}
            }
            append(&mut fields, line.name, text.slice_ref(line.value))?;
        }
        let framing = match (length, is_chunked) {
            (_, true) => Some(Body::Chunked(Chunked::new(false, u64::MAX))),
            (Some(0), _) => Some(Body::Over),
            (Some(length), _) => Some(Body::Counted(length)),
            (None, false) => None,
        };
        Ok(Section { fields, framing, host })
    }
}

/// The fields of a trailer section.
fn fields(section: &[u8]) -> Result<HeaderMap, Broken> {
    let mut fields = HeaderMap::new();
    if section.is_empty() {
        return Ok(fields);
    }
    let mut lines = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let Ok(httparse::Status::Complete((_, lines))) = httparse::parse_headers(section, &mut lines)
    else {
        return Err(Broken);
    };
    for line in lines {
        append(&mut fields, line.name, Bytes::copy_from_slice(line.value))?;
    }
    Ok(fields)
}

fn append(fields: &mut HeaderMap, name: &str, value: Bytes) -> Result<(), Broken> {
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| Broken)?;
    let value = HeaderValue::from_maybe_shared(value).map_err(|_| Broken)?;
    fields.try_append(name, value).map_err(|_| Broken)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a text reads as, when it comes in pieces of `step` bytes.
    fn read(text: &[u8], step: usize, to_head_request: bool) -> (Vec<u16>, Vec<u8>, HeaderMap) {
        let mut reader = Reader::new(Kind::Response { to_head_request });
        let (mut heads, mut content, mut trailers) = (Vec::new(), Vec::new(), None);
        for mut piece in text.chunks(step) {
            while !piece.is_empty() {
                if !reader.awaits_head() {
                    let some = reader.take_body(BytesMut::from(piece)).unwrap();
                    content.extend_from_slice(&some.bytes);
                    trailers = some.end.or(trailers);
                    break;
                }
                let (taken, head) = reader.take_head(piece).unwrap();
                piece = &piece[taken..];
                match head {
                    Some(Head::Request(_)) => panic!("it is a response"),
                    Some(Head::Interim(head) | Head::Final(head)) => {
                        assert!(head.headers().iter().all(|(name, _)| name != "connection"));
                        heads.push(head.status().as_u16());
                    }
                    None => assert!(piece.is_empty()),
                }
            }
        }
        assert!(reader.is_over());
        (heads, content, trailers.unwrap_or_default())
    }

    #[test]
    fn a_response_is_the_same_however_it_is_cut() {
        let text = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nServer: s\r\n\
            Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n\
            0\r\nGrpc-Status: 0\r\n\r\n";
        for step in 1..text.len() {
            let (heads, content, trailers) = read(text, step, false);
            assert_eq!((heads, content), (vec![103, 200], b"hello world".to_vec()), "{step}");
            assert_eq!(trailers["grpc-status"], "0", "{step}");
        }
        let text = b"HTTP/1.1 404 \r\ncontent-length: 5\r\n\r\nhello";
        for step in 1..text.len() {
            assert_eq!(read(text, step, false).1, b"hello");
        }
    }

    #[test]
    fn some_responses_have_no_body_whatever_they_say() {
        for (status, to_head_request) in [(200, true), (204, false), (304, false)] {
            let text = format!("HTTP/1.1 {status} X\r\nContent-Length: 7\r\n\r\n");
            let (heads, content, _) = read(text.as_bytes(), 100, to_head_request);
            assert_eq!((heads, content.len()), (vec![status], 0));
        }
    }

    #[test]
    fn a_request_becomes_what_it_says() {
        let text = b"POST /a?b HTTP/1.1\r\nHost: x.example:80\r\nTransfer-Encoding: chunked\r\n\
            Connection: te\r\nTE: trailers\r\nVia: 1.1 lb\r\n\r\n";
        let mut reader = Reader::new(Kind::Request { scheme: "http" });
        let (taken, head) = reader.take_head(text).unwrap();
        let Some(Head::Request(request)) = head else { panic!("it is a request") };
        assert_eq!(
            (taken, request.uri().to_string()),
            (text.len(), "http://x.example:80/a?b".into())
        );
        assert_eq!((request.method(), request.headers().len()), (&Method::POST, 2));
        assert_eq!(request.headers()["te"], "trailers");
        assert!(!reader.is_over());
        let content = reader.take_body(BytesMut::from(&b"2\r\nok\r\n0\r\n\r\n"[..])).unwrap();
        assert!(content.bytes == "ok" && content.end.is_some());
        let mut reader = Reader::new(Kind::Request { scheme: "https" });
        reader.take_head(b"GET * HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        assert!(reader.is_over(), "it has no body");
    }

    #[test]
    fn what_the_gateway_does_not_write_is_not_read() {
        let mut reader = Reader::new(Kind::Response { to_head_request: false });
        assert!(reader.take_head(b"HTTP/1.1 200 OK\r\n\r\n").is_err(), "it has no end");
        assert!(
            Reader::new(Kind::Response { to_head_request: false })
                .take_head(b"nonsense\r\n\r\n")
                .is_err()
        );
    }
}
