//! What comes over HTTP/2, in the words of HTTP/1.1 in which the gateway reads it: a user's request, a backend's
//! response. Owns the checks that RFC 9113 section 8 asks for beyond those of `h2`, and the framing of bodies; what a
//! message may be, its limits included, is decided by the gateway alone, as for any other.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode, Version};

use crate::http::chunked::{SIZE_LINE_MAX, size_line};
use crate::http::write::{self, put};

/// How the gateway is told where the body ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Framing {
    /// Nothing follows the head.
    None,
    /// As many bytes as the head has announced, which `h2` makes sure of.
    Counted,
    Chunked,
}

/// A stream that nobody could understand: it is reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed;

/// Writes the head of a request; `is_whole`: there is neither content nor a trailer section.
///
/// # Errors
/// It is malformed (RFC 9113 section 8.1.1).
pub fn request(out: &mut Vec<u8>, parts: &Parts, is_whole: bool) -> Result<Framing, Malformed> {
    debug_assert_eq!(parts.version, Version::HTTP_2, "h2 reads nothing else");
    let fields = &parts.headers;
    let authority = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    check(parts, authority)?;
    put(out, &[parts.method.as_str().as_bytes(), b" ", target(parts, authority)?]);
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let host = authority.or_else(|| fields.get(header::HOST).map(HeaderValue::as_bytes));
    if let Some(host) = host {
        put(out, &[b"host: ", host, b"\r\n"]);
    }
    for (name, value) in fields.iter().filter(|(name, _)| !is_joined(name)) {
        put(out, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    put_cookie(out, fields);
    let framing = match (fields.contains_key(header::CONTENT_LENGTH), is_whole) {
        (true, false) => Framing::Counted,
        (true, true) => Framing::None,
        (false, false) => {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            Framing::Chunked
        }
        (false, true) => {
            // A backend may ask for a length where one could be meant (RFC 9110 section 8.6).
            if [Method::POST, Method::PUT, Method::PATCH].contains(&parts.method) {
                out.extend_from_slice(b"content-length: 0\r\n");
            }
            Framing::None
        }
    };
    out.extend_from_slice(b"\r\n");
    Ok(framing)
}

/// Writes the head of a response; `is_whole`: no content and no trailer section follow. `is_empty`: none could, whatever
/// the head says, as for a request with `HEAD`.
pub fn response(
    out: &mut Vec<u8>,
    status: StatusCode,
    fields: &HeaderMap,
    is_whole: bool,
    is_empty: bool,
) -> Framing {
    let code = status.as_u16();
    write::put_status(out, code, status.canonical_reason().unwrap_or_default());
    for (name, value) in fields {
        put(out, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    let is_empty = is_empty || status.is_informational() || matches!(code, 204 | 304);
    let framing = match (fields.contains_key(header::CONTENT_LENGTH), is_whole) {
        _ if is_empty => Framing::None,
        (true, false) => Framing::Counted,
        (true, true) => Framing::None,
        (false, true) => {
            out.extend_from_slice(b"content-length: 0\r\n");
            Framing::None
        }
        (false, false) => {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            Framing::Chunked
        }
    };
    out.extend_from_slice(b"\r\n");
    framing
}

/// What `h2` lets pass.
fn check(parts: &Parts, authority: Option<&[u8]>) -> Result<(), Malformed> {
    let has_outer_space = |value: &HeaderValue| {
        let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
        is_space(value.as_bytes().first()) || is_space(value.as_bytes().last())
    };
    if parts.headers.values().any(has_outer_space) {
        return Err(Malformed);
    }
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next().map(HeaderValue::as_bytes);
    let differs = |authority: &[u8], host: &[u8]| !authority.eq_ignore_ascii_case(host);
    let is_ambiguous = host.is_some_and(|host| authority.is_some_and(|it| differs(it, host)));
    if hosts.next().is_some() || is_ambiguous {
        return Err(Malformed);
    }
    match parts.uri.scheme_str() {
        None | Some("http" | "https") => Ok(()),
        Some(_) => Err(Malformed),
    }
}

fn target<'a>(parts: &'a Parts, authority: Option<&'a [u8]>) -> Result<&'a [u8], Malformed> {
    if parts.method == Method::CONNECT {
        // It has no path, and is offered to nobody.
        return authority.ok_or(Malformed);
    }
    let path = parts.uri.path_and_query().map_or("", |path| path.as_str()).as_bytes();
    match path {
        [b'/', ..] => Ok(path),
        b"*" if parts.method == Method::OPTIONS => Ok(path),
        // Among them the absolute form, in which an HTTP/1.1 reader would look for another host.
        _ => Err(Malformed),
    }
}

/// Whether a field is written by itself, not where it stands.
fn is_joined(name: &HeaderName) -> bool {
    *name == header::COOKIE || *name == header::HOST
}

/// The crumbs of a cookie as one (RFC 9113 section 8.2.3).
fn put_cookie(out: &mut Vec<u8>, fields: &HeaderMap) {
    for (place, crumb) in fields.get_all(header::COOKIE).iter().enumerate() {
        let before: &[u8] = if place == 0 { b"cookie: " } else { b"; " };
        put(out, &[before, crumb.as_bytes()]);
    }
    if fields.contains_key(header::COOKIE) {
        out.extend_from_slice(b"\r\n");
    }
}

/// Writes what stands before content of a chunked body.
pub fn chunk(out: &mut Vec<u8>, content: &Bytes) {
    debug_assert!(!content.is_empty(), "that would be the last one");
    let mut line = [0; SIZE_LINE_MAX];
    let start = size_line(&mut line, content.len());
    out.extend_from_slice(&line[start..]);
}

/// Writes what ends a chunked body.
pub fn last_chunk(out: &mut Vec<u8>, trailers: Option<&HeaderMap>) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.into_iter().flatten() {
        put(out, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn written(
        method: &str,
        uri: &str,
        lines: &[(&str, &str)],
        is_whole: bool,
    ) -> Result<(String, Framing), Malformed> {
        let mut asked = Request::builder().method(method).uri(uri).version(Version::HTTP_2);
        for (name, value) in lines {
            asked = asked.header(*name, *value);
        }
        let (parts, ()) = asked.body(()).unwrap().into_parts();
        let mut out = Vec::new();
        let framing = request(&mut out, &parts, is_whole)?;
        Ok((String::from_utf8(out).unwrap(), framing))
    }

    #[test]
    fn a_request_is_written_so_that_nothing_is_said_twice() {
        let lines = [
            ("user-agent", "c"),
            ("cookie", "a=1"),
            ("x-a", "1"),
            ("host", "X.example:80"),
            ("cookie", "b=2"),
            ("x-a", "2"),
            ("te", "trailers"),
        ];
        let (text, framing) = written("GET", "http://x.example:80/a?b", &lines, true).unwrap();
        assert_eq!(framing, Framing::None);
        assert_eq!(
            text,
            "GET /a?b HTTP/1.1\r\nhost: x.example:80\r\nuser-agent: c\r\nx-a: 1\r\nx-a: 2\r\n\
             te: trailers\r\ncookie: a=1; b=2\r\n\r\n"
        );
    }

    #[test]
    fn the_body_is_framed_by_what_is_known_of_it() {
        for (method, lines, is_whole, wanted, ending) in [
            ("POST", &[][..], false, Framing::Chunked, "transfer-encoding: chunked\r\n\r\n"),
            ("POST", &[][..], true, Framing::None, "content-length: 0\r\n\r\n"),
            ("DELETE", &[][..], true, Framing::None, "host: x\r\n\r\n"),
            (
                "POST",
                &[("content-length", "5")],
                false,
                Framing::Counted,
                "content-length: 5\r\n\r\n",
            ),
            ("POST", &[("content-length", "0")], true, Framing::None, "content-length: 0\r\n\r\n"),
        ] {
            let (text, framing) = written(method, "http://x/", lines, is_whole).unwrap();
            assert_eq!(framing, wanted, "{text}");
            assert!(text.ends_with(ending), "{text}");
        }
    }

    #[test]
    fn what_two_readers_could_take_in_two_ways_is_malformed() {
        for (method, uri, lines) in [
            ("GET", "http://x/", [("host", "y")]),
            ("GET", "http://x/", [("a", " b")]),
            ("GET", "http://x/", [("a", "b\t")]),
            ("GET", "ftp://x/", [("a", "b")]),
            ("GET", "*", [("host", "x")]),
            ("CONNECT", "*", [("host", "x")]),
        ] {
            assert_eq!(written(method, uri, &lines, true), Err(Malformed), "{uri} {lines:?}");
        }
        assert!(written("OPTIONS", "*", &[("host", "x")], true).is_ok());
        let twice = [("host", "x"), ("host", "x")];
        assert_eq!(written("GET", "/", &twice, true), Err(Malformed));
    }

    #[test]
    fn a_response_is_framed_by_what_is_known_of_it() {
        let length =
            HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from_static("5"))]);
        let none = HeaderMap::new();
        for (status, fields, is_whole, is_empty, wanted, ending) in [
            (
                200,
                &none,
                false,
                false,
                Framing::Chunked,
                "OK\r\ntransfer-encoding: chunked\r\n\r\n",
            ),
            (200, &none, true, false, Framing::None, "OK\r\ncontent-length: 0\r\n\r\n"),
            (200, &length, false, false, Framing::Counted, "content-length: 5\r\n\r\n"),
            (200, &length, true, true, Framing::None, "content-length: 5\r\n\r\n"),
            (304, &length, true, false, Framing::None, "content-length: 5\r\n\r\n"),
            (204, &none, true, false, Framing::None, "HTTP/1.1 204 No Content\r\n\r\n"),
            (103, &none, false, false, Framing::None, "HTTP/1.1 103 Early Hints\r\n\r\n"),
            (299, &none, true, true, Framing::None, "HTTP/1.1 299 \r\n\r\n"),
        ] {
            let mut out = Vec::new();
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(response(&mut out, status, fields, is_whole, is_empty), wanted, "{status}");
            let text = String::from_utf8(out).unwrap();
            assert!(text.ends_with(ending), "{text}");
        }
    }

    #[test]
    fn chunks_and_trailers_read_back_as_they_were() {
        let mut out = Vec::new();
        let content = Bytes::from(vec![b'x'; 0x1a2]);
        chunk(&mut out, &content);
        out.extend_from_slice(&content);
        out.extend_from_slice(b"\r\n");
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        last_chunk(&mut out, Some(&trailers));
        assert!(out.starts_with(b"1a2\r\nxxx"));
        assert!(out.ends_with(b"x\r\n0\r\ngrpc-status: 0\r\n\r\n"));
    }
}
