//! What must hold for any bytes at all, as functions over bytes: the fuzz targets call them with what
//! the fuzzer finds, `tests/http_fuzz.rs` with what a seed gives. The readers here are slow, plain and
//! written from the RFCs alone, so that they share no mistake with the ones that they check.

use lb::http::body::{self, Body, Framing};
use lb::http::field::{self, Name};
use lb::http::head::{self, RequestHead, Space};
use lb::http::user::User;
use lb::http::write::{self, ResponseForm, Route};
use lb::http::{Limits, Malformed};

/// A head by the plain reader: its start line, its fields, and how long it is.
#[derive(Debug)]
struct Plain<'a> {
    start: &'a str,
    fields: Vec<(&'a str, &'a [u8])>,
    length: usize,
}

/// Splits a head at CR LF; `None` when it is not complete or not well-formed. One empty line before it
/// is skipped if `leading` says so.
fn plain_head(bytes: &[u8], leading: bool) -> Option<Plain<'_>> {
    let skipped = if leading && bytes.starts_with(b"\r\n") { 2 } else { 0 };
    let bytes = &bytes[skipped..];
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let mut lines = split_at_crlf(&bytes[..end]).into_iter();
    let start = std::str::from_utf8(lines.next()?).ok()?;
    let mut fields = Vec::new();
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = std::str::from_utf8(&line[..colon]).ok()?;
        fields.push((name, field::trim(&line[colon + 1..])));
    }
    Some(Plain { start, fields, length: skipped + end + 4 })
}

/// Lines, split at both characters together; one of them alone stays in its line, and is seen there.
fn split_at_crlf(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut lines = Vec::new();
    while let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") {
        lines.push(&bytes[..end]);
        bytes = &bytes[end + 2..];
    }
    lines.push(bytes);
    lines
}

fn is_token(text: &str) -> bool {
    let special = "!#$%&'*+-.^_`|~";
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || special.contains(c))
}

fn is_value(value: &[u8]) -> bool {
    value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..))
}

/// Reads a request in one piece, then byte by byte.
pub fn request_head(bytes: &[u8]) {
    let limits = Limits::default();
    let mut space = Space::new();
    let whole = head::request(bytes, 0, &limits, &mut space);
    let mut seen = 0;
    let mut in_pieces = Ok(None);
    for end in 0..=bytes.len() {
        let mut space = Space::new();
        match head::request(&bytes[..end], seen, &limits, &mut space) {
            Ok(None) => seen = end,
            Ok(Some(head)) => {
                in_pieces = Ok(Some((head.length, head.fields.iter().count())));
                break;
            }
            Err(fault) => {
                in_pieces = Err(fault);
                break;
            }
        }
    }
    match (&whole, in_pieces) {
        (Ok(Some(head)), pieces) => {
            assert_eq!(pieces, Ok(Some((head.length, head.fields.iter().count()))));
        }
        (Ok(None), pieces) => assert_eq!(pieces, Ok(None)),
        (Err(fault), pieces) => {
            assert!((400..=505).contains(&fault.status), "{fault}");
            assert!(!matches!(pieces, Ok(Some(_))), "cutting made {fault} acceptable");
        }
    }
    if let Ok(Some(head)) = whole {
        accepted_request(bytes, &head);
    }
}

/// What must be true of every request that is not refused, and of what a backend gets of it.
fn accepted_request(bytes: &[u8], head: &RequestHead<'_, '_>) {
    let plain = plain_head(bytes, true).expect("what was read can be read plainly");
    assert_eq!(plain.length, head.length);
    let parts: Vec<&str> = plain.start.split(' ').collect();
    assert_eq!(parts.len(), 3, "{}", plain.start);
    assert_eq!(parts[0], head.method);
    assert!(is_token(parts[0]) && !parts[1].is_empty() && parts[1].is_ascii());
    assert!(matches!(parts[2], "HTTP/1.0" | "HTTP/1.1"));
    assert_eq!(plain.fields.len(), head.fields.iter().count());
    for ((name, value), (_, line)) in plain.fields.iter().zip(head.fields.iter()) {
        assert!(is_token(name) && is_value(value), "{name}");
        assert_eq!((*name, *value), (line.name, line.value));
    }
    let hosts = named(&plain, "host").count();
    assert!(hosts == 1 || hosts == 0 && parts[2] == "HTTP/1.0");
    if let Ok(framing) = body::of_request(head) {
        framed_request(&plain, framing);
        forwarded_request(head, framing);
    }
}

fn named<'p, 'a>(plain: &'p Plain<'a>, wanted: &'p str) -> impl Iterator<Item = &'a [u8]> + 'p {
    let of_that_name = move |(name, _): &&(&str, &[u8])| name.eq_ignore_ascii_case(wanted);
    plain.fields.iter().filter(of_that_name).map(|(_, value)| *value)
}

fn framed_request(plain: &Plain<'_>, framing: Framing) {
    let lengths: Vec<_> = named(plain, "content-length").collect();
    let codings: Vec<_> = named(plain, "transfer-encoding").collect();
    match framing {
        Framing::None => assert!(lengths.is_empty() && codings.is_empty()),
        Framing::Length(length) => {
            assert!(codings.is_empty() && lengths.len() == 1);
            let text = std::str::from_utf8(lengths[0]).unwrap();
            assert!(text.chars().all(|digit| digit.is_ascii_digit()));
            assert_eq!(text.parse(), Ok(length));
        }
        Framing::Chunked => {
            assert!(lengths.is_empty() && codings.len() == 1);
            assert!(codings[0].eq_ignore_ascii_case(b"chunked"));
        }
        Framing::UntilClose => panic!("a request cannot end with its connection"),
    }
}

/// Nothing that a backend could understand in another way than we did may be in what it gets.
fn forwarded_request(head: &RequestHead<'_, '_>, framing: Framing) {
    let user = User::new([192, 0, 2, 1].into(), false, false);
    let (host, certificate) = ("fallback", &b""[..]);
    let route = Route { user: &user, via: "lb-test", host, id: None, certificate };
    let upgrade = head.connection.upgrade && write::offers(head).next().is_some();
    let mut out = Vec::new();
    write::request(&mut out, head, framing, upgrade, &route);
    let plain = plain_head(&out, false).expect("what is written is well-formed");
    assert_eq!(plain.length, out.len());
    let parts: Vec<&str> = plain.start.split(' ').collect();
    assert!(parts.len() == 3 && parts[0] == head.method && parts[2] == "HTTP/1.1");
    assert!(parts[1].starts_with('/') || parts[1] == "*");
    assert_eq!(named(&plain, "host").count(), 1);
    for (name, said) in [("x-forwarded-for", &b"192.0.2.1"[..]), ("x-forwarded-proto", b"http")] {
        assert_eq!(named(&plain, name).collect::<Vec<_>>(), [said], "{name}");
    }
    for name in ["x-forwarded-host", "forwarded"] {
        assert_eq!(named(&plain, name).count(), 1, "{name}");
    }
    for name in ["keep-alive", "proxy-connection", "http2-settings", "x-real-ip"] {
        assert_eq!(named(&plain, name).count(), 0, "{name}");
    }
    assert_eq!(named(&plain, "upgrade").count(), usize::from(upgrade));
    for (name, value) in &plain.fields {
        assert!(is_token(name) && is_value(value));
        assert_ne!(Name::of(name), Name::Disguised, "{name}");
    }
    framed_request(&plain, framing);
}

/// Reads a response and checks what a user gets of it.
pub fn response_head(bytes: &[u8]) {
    let mut space = Space::new();
    match head::response(bytes, 0, &Limits::default(), &mut space) {
        Ok(None) => {}
        Err(fault) => assert_eq!(fault.status, 502, "{fault}"),
        Ok(Some(head)) => {
            assert!((100..=999).contains(&head.status));
            let Ok(framing) = body::of_response(&head, false) else { return };
            let reply = ResponseForm { framing, close: true, upgrade: false, date: None, id: None };
            let mut out = Vec::new();
            write::response(&mut out, &head, &reply);
            let plain = plain_head(&out, false).expect("what is written is well-formed");
            assert_eq!(plain.length, out.len());
            let status = format!("HTTP/1.1 {} ", head.status);
            assert!(plain.start.starts_with(&status), "{}", plain.start);
            assert!(plain.fields.iter().all(|(name, value)| is_token(name) && is_value(value)));
            assert_eq!(named(&plain, "connection").collect::<Vec<_>>(), [b"close"]);
            match framing {
                Framing::Length(_) | Framing::Chunked => framed_request(&plain, framing),
                Framing::None | Framing::UntilClose => framed_request(&plain, Framing::None),
            }
        }
    }
}

/// A chunked body by the plain reader: content, trailers that may pass, and length.
type Dechunked = (Vec<u8>, Vec<u8>, usize);

/// `Ok(None)` when the body is well-formed so far, and not complete.
fn plain_chunked(bytes: &[u8]) -> Result<Option<Dechunked>, ()> {
    let mut content = Vec::new();
    let mut at = 0;
    loop {
        let Some(length) = bytes[at..].windows(2).position(|two| two == b"\r\n") else {
            return Ok(None);
        };
        let line = &bytes[at..at + length];
        let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
        let well_formed = !digits.is_empty()
            && digits.len() <= 16
            && digits.iter().all(u8::is_ascii_hexdigit)
            && line.len() - digits.len() <= 256
            && is_value(line);
        if !well_formed {
            return Err(());
        }
        let text = std::str::from_utf8(digits).map_err(|_| ())?;
        let size = u64::from_str_radix(text, 16).map_err(|_| ())?;
        at += length + 2;
        if size == 0 {
            break;
        }
        let Some(end) = usize::try_from(size).ok().and_then(|size| at.checked_add(size)) else {
            return Ok(None);
        };
        if end + 2 > bytes.len() {
            return Ok(None);
        }
        content.extend_from_slice(&bytes[at..end]);
        if &bytes[end..end + 2] != b"\r\n" {
            return Err(());
        }
        at = end + 2;
    }
    let mut trailers = Vec::new();
    loop {
        let Some(length) = bytes[at..].windows(2).position(|two| two == b"\r\n") else {
            return Ok(None);
        };
        let line = &bytes[at..at + length];
        at += length + 2;
        if line.is_empty() {
            return Ok(Some((content, trailers, at)));
        }
        let colon = line.iter().position(|byte| *byte == b':').ok_or(())?;
        let name = std::str::from_utf8(&line[..colon]).map_err(|_| ())?;
        let value = field::trim(&line[colon + 1..]);
        if !is_token(name) || !is_value(&line[colon + 1..]) {
            return Err(());
        }
        if field::may_be_trailer(name) {
            trailers.extend_from_slice(name.as_bytes());
            trailers.extend_from_slice(b": ");
            trailers.extend_from_slice(value);
            trailers.extend_from_slice(b"\r\n");
        }
    }
}

/// Passes a body through in blocks of the lengths given, over and over.
fn passed(bytes: &[u8], lengths: &[u8], keep: bool) -> Result<(Vec<u8>, usize, bool), Malformed> {
    let mut body = Body::new(Framing::Chunked, keep, u64::MAX);
    let mut out = Vec::new();
    let mut at = 0;
    let mut lengths = lengths.iter().cycle();
    while at < bytes.len() {
        let length = lengths.next().map_or(bytes.len(), |length| usize::from(*length) + 1);
        let mut block = bytes[at..bytes.len().min(at + length)].to_vec();
        let step = body.pass(&mut block)?;
        assert!(step.output.end <= step.consumed && step.consumed <= block.len());
        assert!(step.finished || step.consumed == block.len(), "an open body takes everything");
        out.extend_from_slice(&block[step.output]);
        at += step.consumed;
        if step.finished {
            if let Body::Chunked(chunked) = &body {
                out.extend_from_slice(chunked.trailer_section());
            }
            return Ok((out, at, true));
        }
    }
    Ok((out, at, false))
}

/// Checks a chunked body. The first bytes say how it is cut.
pub fn chunked_body(bytes: &[u8]) {
    let Some((cuts, bytes)) = bytes.split_at_checked(4) else { return };
    let framed = passed(bytes, cuts, true);
    let content = passed(bytes, cuts, false);
    match plain_chunked(bytes) {
        // Neither is taken for a whole body. Which of them is refused at once, and which when more
        // has come, differs: a limit is seen early, a bad trailer with the end of its section.
        Err(()) | Ok(None) => {
            let whole = |end: &Result<_, _>| matches!(end, Ok((_, _, true)));
            assert!(!whole(&framed) && !whole(&content), "taken: {}", bytes.escape_ascii());
        }
        Ok(Some((wanted, trailers, length))) => {
            if let Err(fault) = &framed {
                assert!(trailer_limits_hold(bytes), "refused: {fault}: {}", bytes.escape_ascii());
                return;
            }
            let (framed, framed_length, finished) = framed.unwrap();
            assert!(finished && framed_length == length);
            assert_eq!(content, Ok((wanted.clone(), length, true)));
            // Read again, what was passed on is the same body, and plain.
            let again = plain_chunked(&framed).expect("what is passed on is well-formed");
            assert_eq!(again, Some((wanted, trailers, framed.len())));
            assert!(framed.len() <= length + 2 * head::FIELDS_MAX);
        }
    }
}

/// Whether a well-formed body may have been refused for its trailers: too many, or too long.
fn trailer_limits_hold(bytes: &[u8]) -> bool {
    bytes.len() > lb::http::chunked::TRAILER_BYTES_MAX
        || bytes.windows(2).filter(|two| *two == b"\r\n").count() > head::FIELDS_MAX
}
