//! Reading heads: bytes to names and values that point into them, nothing copied, nothing allocated.
//! `httparse` finds the parts; this file adds what it lets pass (bare line feeds, several empty
//! lines, any target, any number of `Host`) and the limits. Decides nothing about bodies.

use std::mem::MaybeUninit;

use super::field::{self, Name};
use super::{Fault, Limits, Version};

/// Field lines in a head, at most.
pub const FIELDS_MAX: usize = 100;
/// A method longer than this is not one that anybody implements (RFC 9112 3: 501).
const METHOD_BYTES_MAX: usize = 32;

/// Fields that `Connection` may name, at most. Each line of a head is compared with each of them, and a
/// head has room for thousands; nobody names more than two or three.
const NAMED_MAX: usize = 32;

/// A field line: a token and a value without the space around it.
pub type Field<'a> = httparse::Header<'a>;

/// Where a head's field lines are put while it is looked at. Lives on the caller's stack, beside the
/// bytes that it points into; costs nothing to make.
pub struct Space<'a> {
    lines: [MaybeUninit<Field<'a>>; FIELDS_MAX],
    names: [Name; FIELDS_MAX],
}

impl Space<'_> {
    #[expect(clippy::new_without_default, reason = "there is nothing that a default would mean")]
    pub const fn new() -> Self {
        Space {
            lines: [const { MaybeUninit::uninit() }; FIELDS_MAX],
            names: [Name::Other; FIELDS_MAX],
        }
    }
}

/// The field lines of a head, in the order in which they came, each with what its name means.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'s, 'a> {
    lines: &'s [Field<'a>],
    names: &'s [Name],
    /// A bit for each [`Name`] that occurs.
    present: u32,
}

impl<'s, 'a> Fields<'s, 'a> {
    pub fn iter(&self) -> impl Iterator<Item = (Name, &'s Field<'a>)> + use<'s, 'a> {
        self.names.iter().copied().zip(self.lines)
    }

    /// The values of every line of that name, in order.
    pub fn values(&self, wanted: Name) -> impl Iterator<Item = &'a [u8]> + use<'s, 'a> {
        self.iter().filter(move |(name, _)| *name == wanted).map(|(_, line)| line.value)
    }

    pub const fn has(&self, name: Name) -> bool {
        self.present & (1 << name as u32) != 0
    }

    /// Whether an element of a comma list in that field is `token`, in any case.
    pub fn list_has(&self, name: Name, token: &[u8]) -> bool {
        self.has(name)
            && self
                .values(name)
                .flat_map(field::list)
                .any(|element| element.eq_ignore_ascii_case(token))
    }

    /// The value of the only line of that name; the error is for a second one.
    fn only(&self, name: Name, twice: Fault) -> Result<Option<&'a [u8]>, Fault> {
        if !self.has(name) {
            return Ok(None);
        }
        let mut values = self.values(name);
        let first = values.next();
        if values.next().is_some() { Err(twice) } else { Ok(first) }
    }
}

/// What the `Connection` field says (RFC 9110 7.6.1).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Connection {
    pub close: bool,
    pub keep_alive: bool,
    pub upgrade: bool,
    /// Names fields beyond those that a gateway drops anyway, so they have to be looked for.
    pub names_fields: bool,
}

impl Connection {
    fn of(fields: &Fields<'_, '_>) -> Result<Connection, Fault> {
        let mut said = Connection::default();
        let mut named = 0;
        for option in fields.values(Name::Connection).flat_map(field::list) {
            match option {
                b"" => {}
                _ if option.eq_ignore_ascii_case(b"close") => said.close = true,
                _ if option.eq_ignore_ascii_case(b"keep-alive") => said.keep_alive = true,
                _ if option.eq_ignore_ascii_case(b"upgrade") => said.upgrade = true,
                _ => named += 1,
            }
        }
        if named > NAMED_MAX {
            return Err(Fault::new(400, "too many names in Connection"));
        }
        said.names_fields = named > 0;
        Ok(said)
    }
}

/// What a request is about (RFC 9112 3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target<'a> {
    /// `/path?query`, as it came.
    Origin(&'a str),
    /// `http://authority/path?query`, or `https`; the path may be empty.
    Absolute { authority: &'a str, path: &'a str },
    /// `*`, of `OPTIONS` only.
    Asterisk,
}

#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'s, 'a> {
    pub method: &'a str,
    pub target: Target<'a>,
    pub version: Version,
    /// The authority that the request is for: of the target in absolute form, else `Host`. Only an
    /// HTTP/1.0 request can be without.
    pub host: Option<&'a str>,
    pub fields: Fields<'s, 'a>,
    pub connection: Connection,
    /// The user waits for 100 before it sends the body (RFC 9110 10.1.1).
    pub expects_continue: bool,
    /// Bytes of the head; the body, or the next request, starts there.
    pub length: usize,
}

#[derive(Clone, Copy, Debug)]
pub struct ResponseHead<'s, 'a> {
    pub status: u16,
    /// Empty when there was none, or one with bytes beyond ASCII.
    pub reason: &'a str,
    pub version: Version,
    pub fields: Fields<'s, 'a>,
    pub connection: Connection,
    /// Bytes of the head; the body, or the next response, starts there.
    pub length: usize,
}

/// Reads the head of a request. `None` asks for more bytes; `seen` is how many of `bytes` were there
/// when it last did, so that a head which comes byte by byte is not read again for each.
pub fn request<'s, 'a>(
    bytes: &'a [u8],
    seen: usize,
    limits: &Limits,
    space: &'s mut Space<'a>,
) -> Result<Option<RequestHead<'s, 'a>>, Fault> {
    let Some(start) = after_empty_line(bytes)? else { return Ok(None) };
    let message = &bytes[start..];
    if nothing_new(bytes, seen) {
        return still_within(message, limits, line_too_long).map(|()| None);
    }
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(message, &mut space.lines) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => {
            return still_within(message, limits, line_too_long).map(|()| None);
        }
        Err(error) => return Err(refused_request(error, message, limits)),
    };
    let (Some(method), Some(path), Some(minor)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(Fault::new(400, "malformed request line"));
    };
    let first = line_ends(message, parsed.headers, length, limits)?;
    if first > limits.line_bytes {
        return Err(line_too_long(message));
    }
    let fields = survey(parsed.headers, &mut space.names);
    let version = version(minor);
    let target = target(method, path)?;
    let host = host(&fields, version, target)?;
    let connection = Connection::of(&fields)?;
    let expects_continue = expectation(&fields, version)?;
    Ok(Some(RequestHead {
        method,
        target,
        version,
        host,
        fields,
        connection,
        expects_continue,
        length: start + length,
    }))
}

/// Reads the head of a response, final or interim. `None` and `seen` as in [`request`]; every fault
/// is the backend's.
pub fn response<'s, 'a>(
    bytes: &'a [u8],
    seen: usize,
    limits: &Limits,
    space: &'s mut Space<'a>,
) -> Result<Option<ResponseHead<'s, 'a>>, Fault> {
    const LINE_TOO_LONG: Fault = Fault::new(502, "status line too long");
    if matches!(bytes.first(), Some(b'\r' | b'\n')) {
        return Err(Fault::new(502, "empty line where a status line should be"));
    }
    let within = |bytes| still_within(bytes, limits, |_| LINE_TOO_LONG).map_err(Fault::of_backend);
    if nothing_new(bytes, seen) {
        return within(bytes).map(|()| None);
    }
    let mut parsed = httparse::Response::new(&mut []);
    let read = httparse::ParserConfig::default()
        .allow_spaces_after_header_name_in_responses(true)
        .parse_response_with_uninit_headers(&mut parsed, bytes, &mut space.lines);
    let length = match read {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return within(bytes).map(|()| None),
        Err(error) => return Err(Fault::new(502, explained(error))),
    };
    let (Some(status), Some(minor)) = (parsed.code, parsed.version) else {
        return Err(Fault::new(502, "malformed status line"));
    };
    if status < 100 {
        return Err(Fault::new(502, "status out of range"));
    }
    let reason = parsed.reason.unwrap_or_default();
    let first = line_ends(bytes, parsed.headers, length, limits).map_err(Fault::of_backend)?;
    if first > limits.line_bytes {
        return Err(LINE_TOO_LONG);
    }
    let fields = survey(parsed.headers, &mut space.names);
    let connection = Connection::of(&fields).map_err(Fault::of_backend)?;
    Ok(Some(ResponseHead { status, reason, version: version(minor), fields, connection, length }))
}

/// Cleans the head of a response that was refused, as far as it is here, of control bytes in field values:
/// true when it is worth reading again.
pub fn clean(bytes: &mut [u8]) -> bool {
    let fields = bytes.iter().position(|byte| *byte == b'\n').map(|end| end + 1);
    fields.is_some_and(|start| field::clean(&mut bytes[start..]))
}

/// Where the message starts: one empty line before a request is ignored (RFC 9112 2.2), for clients
/// that end a body with one too many.
fn after_empty_line(bytes: &[u8]) -> Result<Option<usize>, Fault> {
    const STRAY: Fault = Fault::new(400, "stray line end before the request line");
    match bytes {
        [] | [b'\r'] | [b'\r', b'\n'] => Ok(None),
        [b'\r', b'\n', b'\r' | b'\n', ..] => Err(STRAY),
        [b'\r', b'\n', ..] => Ok(Some(2)),
        [b'\r' | b'\n', ..] => Err(STRAY),
        _ => Ok(Some(0)),
    }
}

/// A head cannot have become complete, nor a line of it wrong, without another line end. What came
/// first is looked at in any case, so that another protocol is told apart at once.
fn nothing_new(bytes: &[u8], seen: usize) -> bool {
    seen > 2 && !bytes.get(seen..).is_some_and(|fresh| fresh.contains(&b'\n'))
}

/// Whether an unfinished head may still grow.
fn still_within(
    message: &[u8],
    limits: &Limits,
    line_too_long: fn(&[u8]) -> Fault,
) -> Result<(), Fault> {
    if message.len() >= limits.head_bytes {
        return Err(if message.contains(&b'\n') {
            Fault::new(431, "header section too large")
        } else {
            line_too_long(message)
        });
    }
    // A carriage return may be the last byte of a line that is not too long.
    if message.len() <= limits.line_bytes.min(limits.field_bytes) + 1 {
        return Ok(());
    }
    match message.iter().rposition(|byte| *byte == b'\n') {
        None if message.len() > limits.line_bytes + 1 => Err(line_too_long(message)),
        Some(end) if message.len() - end - 1 > limits.field_bytes + 1 => {
            Err(Fault::new(431, "field line too long"))
        }
        _ => Ok(()),
    }
}

/// Too long because of its method, or because of its target (RFC 9112 3).
fn line_too_long(message: &[u8]) -> Fault {
    match message.iter().position(|byte| *byte == b' ') {
        Some(length) if length <= METHOD_BYTES_MAX => Fault::new(414, "request target too long"),
        _ => Fault::new(501, "method too long"),
    }
}

fn refused_request(error: httparse::Error, message: &[u8], limits: &Limits) -> Fault {
    if matches!(error, httparse::Error::TooManyHeaders) {
        return Fault::new(431, "too many fields");
    }
    if matches!(error, httparse::Error::Version) && names_a_version(message, limits) {
        return Fault::new(505, "HTTP version not supported");
    }
    Fault::new(400, explained(error))
}

/// Whether the request line ends with a version, though not with one of ours.
fn names_a_version(message: &[u8], limits: &Limits) -> bool {
    let line = &message[..message.len().min(limits.line_bytes)];
    let end = line.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(line.len());
    let mut parts = line[..end].split(|byte| *byte == b' ').skip(2);
    let version = parts.next();
    matches!(version, Some([b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9']))
        && parts.next().is_none()
}

const fn explained(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::HeaderName => "malformed field name",
        httparse::Error::HeaderValue => "forbidden byte in a field value",
        httparse::Error::NewLine => "malformed line end",
        httparse::Error::Status => "malformed status line",
        httparse::Error::Token => "malformed request line",
        httparse::Error::TooManyHeaders => "too many fields",
        httparse::Error::Version => "malformed HTTP version",
    }
}

const fn version(minor: u8) -> Version {
    if minor == 0 { Version::Http10 } else { Version::Http11 }
}

/// Checks that every line ends with CR LF, which the parser does not ask for, and that none is too
/// long. The parser has seen to it that a line feed stands before each name and at the end, so only
/// the byte before that one is in question. Returns the length of the first line.
fn line_ends(
    message: &[u8],
    lines: &[Field<'_>],
    length: usize,
    limits: &Limits,
) -> Result<usize, Fault> {
    const BARE: Fault = Fault::new(400, "bare line feed");
    if length > limits.head_bytes {
        return Err(Fault::new(431, "header section too large"));
    }
    if lines.len() > limits.fields {
        return Err(Fault::new(431, "too many fields"));
    }
    if !message[..length].ends_with(b"\r\n\r\n") {
        return Err(BARE);
    }
    let start_of = |line: &Field<'_>| line.name.as_ptr().addr() - message.as_ptr().addr();
    let first_end = lines.first().map_or(length - 2, start_of);
    let mut start = first_end;
    for line in lines {
        let begins = start_of(line);
        if message[begins - 2] != b'\r' {
            return Err(BARE);
        }
        // The length of the line before, with its line end; the first is measured by the caller.
        if begins - start > limits.field_bytes + 2 {
            return Err(Fault::new(431, "field line too long"));
        }
        start = begins;
    }
    if !lines.is_empty() && length - 2 - start > limits.field_bytes + 2 {
        return Err(Fault::new(431, "field line too long"));
    }
    Ok(first_end - 2)
}

fn survey<'s, 'a>(lines: &'s [Field<'a>], names: &'s mut [Name; FIELDS_MAX]) -> Fields<'s, 'a> {
    let names = &mut names[..lines.len()];
    let mut present = 0;
    for (name, line) in names.iter_mut().zip(lines) {
        *name = Name::of(line.name);
        present |= 1 << *name as u32;
    }
    Fields { lines, names, present }
}

fn target<'a>(method: &str, path: &'a str) -> Result<Target<'a>, Fault> {
    if method.len() > METHOD_BYTES_MAX {
        return Err(Fault::new(501, "method too long"));
    }
    if matches!(method, "CONNECT" | "TRACE") {
        return Err(Fault::new(501, "method not offered"));
    }
    // A fragment is never sent (RFC 9112 3.2.1), and one reader in two cuts it off.
    if !path.is_ascii() || path.as_bytes().contains(&b'#') {
        return Err(Fault::new(400, "forbidden byte in the request target"));
    }
    match path.as_bytes() {
        [b'/', ..] => Ok(Target::Origin(path)),
        b"*" if method == "OPTIONS" => Ok(Target::Asterisk),
        _ => absolute(path).ok_or(Fault::new(400, "malformed request target")),
    }
}

/// Either scheme: what ends TLS in front of us passes such a target on as it came (RFC 9112 3.2.2). It says
/// nothing about how the user reached us, which only a trusted proxy may tell.
fn absolute(target: &str) -> Option<Target<'_>> {
    let (scheme, rest) = target.split_once("://")?;
    if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
        return None;
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    valid_authority(authority).then_some(Target::Absolute { authority, path })
}

/// One valid `Host`, which HTTP/1.0 may lack; a target in absolute form takes its place
/// (RFC 9112 3.2, 3.2.2).
fn host<'a>(
    fields: &Fields<'_, 'a>,
    version: Version,
    target: Target<'a>,
) -> Result<Option<&'a str>, Fault> {
    let value = fields.only(Name::Host, Fault::new(400, "more than one Host"))?;
    let host = match value.map(std::str::from_utf8) {
        Some(Ok(host)) if valid_authority(host) => Some(host),
        Some(_) => return Err(Fault::new(400, "malformed Host")),
        None if version == Version::Http11 => return Err(Fault::new(400, "no Host")),
        None => None,
    };
    match target {
        Target::Absolute { authority, .. } => Ok(Some(authority)),
        _ => Ok(host),
    }
}

/// `host [":" port]` without a user part. Stricter than RFC 3986 3.2.2, which also lets a name hold
/// percent signs and punctuation that readers have disagreed about.
fn valid_authority(authority: &str) -> bool {
    let (name, port) = match authority.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, port),
        _ => (authority, ""),
    };
    let valid_name = match name.strip_prefix('[').map(|inner| inner.strip_suffix(']')) {
        Some(Some(address)) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        Some(None) => false,
        None => {
            !name.is_empty()
                && name.bytes().all(|byte| {
                    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
                })
        }
    };
    valid_name && port.bytes().all(|digit| digit.is_ascii_digit()) && port.len() <= 5
}

/// The only expectation there is; HTTP/1.0 has none (RFC 9110 10.1.1).
fn expectation(fields: &Fields<'_, '_>, version: Version) -> Result<bool, Fault> {
    if version == Version::Http10 || !fields.has(Name::Expect) {
        return Ok(false);
    }
    let known = |value: &[u8]| value.eq_ignore_ascii_case(b"100-continue");
    if fields.values(Name::Expect).all(known) {
        Ok(true)
    } else {
        Err(Fault::new(417, "unknown expectation"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a request and tells its essentials, or the status that it is refused with.
    fn read(text: &[u8]) -> Result<Option<(String, usize, usize)>, u16> {
        let mut space = Space::new();
        match request(text, 0, &Limits::default(), &mut space) {
            Ok(None) => Ok(None),
            Ok(Some(head)) => Ok(Some((
                format!("{} {:?}", head.method, head.target),
                head.fields.iter().count(),
                head.length,
            ))),
            Err(fault) => Err(fault.status),
        }
    }

    fn status(text: &[u8]) -> u16 {
        match read(text) {
            Ok(Some(_)) => 200,
            Ok(None) => 0,
            Err(status) => status,
        }
    }

    #[test]
    fn a_plain_request_is_read_up_to_its_body() {
        let text = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\nAccept: */*  \r\n\r\nrest";
        let mut space = Space::new();
        let head = request(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
        assert_eq!((head.method, head.target), ("GET", Target::Origin("/a?b=c")));
        assert_eq!((head.version, head.host), (Version::Http11, Some("x")));
        assert_eq!(&text[head.length..], b"rest");
        assert_eq!(head.fields.values(Name::Accept).collect::<Vec<_>>(), [b"*/*"]);
    }

    #[test]
    fn every_prefix_of_a_good_head_asks_for_more() {
        let text = b"\r\nPOST /x HTTP/1.1\r\nHost: a.example:80\r\nContent-Length: 3\r\nX:\r\n\r\n";
        for end in 0..text.len() {
            assert_eq!(read(&text[..end]), Ok(None), "{end}");
        }
        assert_eq!(status(text), 200);
    }

    #[test]
    fn the_start_line_has_one_shape() {
        for (line, wanted) in [
            ("GET / HTTP/1.1", 200),
            ("get / HTTP/1.1", 200),
            ("PROPFIND / HTTP/1.1", 200),
            ("GET  / HTTP/1.1", 400),
            ("GET /  HTTP/1.1", 400),
            ("GET / HTTP/1.1 ", 400),
            (" GET / HTTP/1.1", 400),
            ("GET\t/ HTTP/1.1", 400),
            ("GET /a b HTTP/1.1", 400),
            ("GET /", 400),
            ("GET / http/1.1", 400),
            ("GET / HTTP/1.10", 400),
            ("GET / HTTP/01.1", 400),
            ("GET / HTTP/2.0", 505),
            ("GET / HTTP/1.2", 505),
            ("GET / HTTP/0.9", 505),
            ("GET / HTTP/2.0 ", 400),
            ("GET / XTTP/1.1", 400),
            ("G{T / HTTP/1.1", 400),
            ("CONNECT a:1 HTTP/1.1", 501),
            ("TRACE / HTTP/1.1", 501),
            ("ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFG / HTTP/1.1", 501),
        ] {
            let text = format!("{line}\r\nHost: x\r\n\r\n");
            assert_eq!(status(text.as_bytes()), wanted, "{line}");
        }
    }

    #[test]
    fn the_target_has_four_forms_and_no_others() {
        for (line, wanted) in [
            ("OPTIONS *", Ok("OPTIONS Asterisk")),
            ("GET *", Err(400)),
            ("GET http://h", Ok("GET Absolute { authority: \"h\", path: \"\" }")),
            ("GET HTTP://h:81/p?q", Ok("GET Absolute { authority: \"h:81\", path: \"/p?q\" }")),
            ("GET http://h?q", Ok("GET Absolute { authority: \"h\", path: \"?q\" }")),
            ("GET http:///p", Err(400)),
            ("GET http://u@h/", Err(400)),
            ("GET https://h/", Ok("GET Absolute { authority: \"h\", path: \"/\" }")),
            ("GET HttpS://h:443?q", Ok("GET Absolute { authority: \"h:443\", path: \"?q\" }")),
            (
                "GET https://[::1]:8/p://q",
                Ok("GET Absolute { authority: \"[::1]:8\", path: \"/p://q\" }"),
            ),
            ("GET https://", Err(400)),
            ("GET https:///p", Err(400)),
            ("GET https://u@h/", Err(400)),
            ("GET https:/h/", Err(400)),
            ("GET https:h", Err(400)),
            ("GET httpss://h/", Err(400)),
            ("GET ftp://h/", Err(400)),
            ("GET ws://h/", Err(400)),
            ("GET ://h/", Err(400)),
            ("GET h:80", Err(400)),
            ("GET p", Err(400)),
            ("GET /a#b", Err(400)),
            ("GET /\u{e4}", Err(400)),
            ("GET /a%00b", Ok("GET Origin(\"/a%00b\")")),
        ] {
            let text = format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n");
            let got = read(text.as_bytes()).map(|head| head.unwrap().0);
            assert_eq!(got.as_deref().map_err(|status| *status), wanted, "{line}");
        }
    }

    #[test]
    fn a_field_line_has_one_shape() {
        for (lines, wanted) in [
            ("A: b\r\n", 200),
            ("A:b\r\n", 200),
            ("A:\r\n", 200),
            ("A: \t b \t \r\n", 200),
            ("A: \u{e4}\r\n", 200),
            ("A : b\r\n", 400),
            ("A\t: b\r\n", 400),
            (" A: b\r\n", 400),
            ("A: b\r\n c\r\n", 400),
            ("A: b\r\n\tc\r\n", 400),
            ("A: b\n", 400),
            ("A: b\r\r\n", 400),
            ("A: b\rC: d\r\n", 400),
            ("A: b\0\r\n", 400),
            ("A: b\x7f\r\n", 400),
            ("A: b\x0b\r\n", 400),
            ("A\r\n", 400),
            (": b\r\n", 400),
            ("A(: b\r\n", 400),
            ("\u{e4}: b\r\n", 400),
        ] {
            for (before, after) in [("", "Host: x\r\n"), ("Host: x\r\n", "")] {
                let text = format!("GET / HTTP/1.1\r\n{before}{lines}{after}\r\n");
                assert_eq!(status(text.as_bytes()), wanted, "{text:?}");
            }
        }
    }

    #[test]
    fn every_line_ends_with_both_characters() {
        let good = "GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n";
        for (place, _) in good.match_indices('\r') {
            let mut bare = good.to_string();
            bare.remove(place);
            assert_eq!(status(bare.as_bytes()), 400, "{bare:?}");
        }
        assert_eq!(status(b"GET / HTTP/1.0\n\n"), 400);
        assert_eq!(status(b"GET / HTTP/1.0\r\n\n"), 400);
        assert_eq!(status(b"GET / HTTP/1.0\r\n\r\n"), 200);
    }

    #[test]
    fn one_empty_line_before_a_request_is_ignored() {
        let good = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        for (before, wanted) in
            [("\r\n", 200), ("\r\n\r\n", 400), ("\n", 400), ("\r", 400), ("\r\n\n", 400)]
        {
            assert_eq!(status(format!("{before}{good}").as_bytes()), wanted, "{before:?}");
        }
    }

    #[test]
    fn there_is_one_valid_host() {
        for (version, lines, wanted) in [
            ("1.1", "", 400),
            ("1.0", "", 200),
            ("1.1", "Host: a\r\nHost: a\r\n", 400),
            ("1.0", "Host: a\r\nhost: b\r\n", 400),
            ("1.1", "Host:\r\n", 400),
            ("1.1", "Host: a.b-c_d:8083\r\n", 200),
            ("1.1", "Host: [::1]:80\r\n", 200),
            ("1.1", "Host: [::1]\r\n", 200),
            ("1.1", "Host: [::1\r\n", 400),
            ("1.1", "Host: ::1\r\n", 400),
            ("1.1", "Host: a, b\r\n", 400),
            ("1.1", "Host: a b\r\n", 400),
            ("1.1", "Host: a/b\r\n", 400),
            ("1.1", "Host: u@a\r\n", 400),
            ("1.1", "Host: a:b\r\n", 400),
            ("1.1", "Host: a:123456\r\n", 400),
            ("1.1", "Host: \u{e4}\r\n", 400),
        ] {
            let text = format!("GET / HTTP/{version}\r\n{lines}\r\n");
            assert_eq!(status(text.as_bytes()), wanted, "{text:?}");
        }
    }

    #[test]
    fn the_target_decides_the_host_when_it_names_one() {
        let text = b"GET http://right/ HTTP/1.1\r\nHost: wrong\r\n\r\n";
        let mut space = Space::new();
        let head = request(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
        assert_eq!(head.host, Some("right"));
    }

    #[test]
    fn the_connection_field_names_no_more_fields_than_are_worth_looking_for() {
        let of = |names: usize| {
            let names = "a, ".repeat(names / 2) + "close" + &", b".repeat(names - names / 2);
            format!("HTTP/1.1\r\nHost: x\r\nConnection: {names}\r\n\r\n")
        };
        let request_of = |names| status(format!("GET / {}", of(names)).as_bytes());
        assert_eq!((request_of(NAMED_MAX), request_of(NAMED_MAX + 1)), (200, 400));
        let response_of = |names| {
            let text = of(names).replacen("\r\n", " 200 OK\r\n", 1);
            let mut space = Space::new();
            let read = response(text.as_bytes(), 0, &Limits::default(), &mut space);
            read.map_or_else(|fault| fault.status, |head| head.unwrap().status)
        };
        assert_eq!((response_of(NAMED_MAX), response_of(NAMED_MAX + 1)), (200, 502));
    }

    #[test]
    fn the_connection_field_is_a_list_in_any_case() {
        let text =
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Close, X-A\r\nConnection: upgrade\r\n\r\n";
        let mut space = Space::new();
        let head = request(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
        let wanted =
            Connection { close: true, keep_alive: false, upgrade: true, names_fields: true };
        assert_eq!(head.connection, wanted);
    }

    #[test]
    fn only_one_expectation_is_known() {
        for (version, value, wanted) in [
            ("1.1", "100-continue", Ok(true)),
            ("1.1", "100-Continue", Ok(true)),
            ("1.0", "100-continue", Ok(false)),
            ("1.0", "else", Ok(false)),
            ("1.1", "100-continue, else", Err(417)),
            ("1.1", "100-continue\r\nExpect: else", Err(417)),
            ("1.1", "", Err(417)),
        ] {
            let text = format!("GET / HTTP/{version}\r\nHost: x\r\nExpect: {value}\r\n\r\n");
            let mut space = Space::new();
            let got = request(text.as_bytes(), 0, &Limits::default(), &mut space)
                .map(|head| head.unwrap().expects_continue)
                .map_err(|fault| fault.status);
            assert_eq!(got, wanted, "{version} {value}");
        }
    }

    /// A head whose only adjustable parts are its lengths.
    fn sized(target: usize, field: usize, fields: usize) -> Vec<u8> {
        let target = "t".repeat(target - "GET / HTTP/1.1".len());
        let mut text = format!("GET /{target} HTTP/1.1\r\nHost: x\r\n");
        for _ in 1..fields {
            text += &format!("A:{}\r\n", "v".repeat(field - 2));
        }
        (text + "\r\n").into_bytes()
    }

    #[test]
    fn each_limit_holds_exactly_where_it_is_set() {
        let limits = Limits { line_bytes: 64, field_bytes: 32, head_bytes: 200, fields: 5 };
        let whole = |text: &[u8]| {
            let mut space = Space::new();
            request(text, 0, &limits, &mut space).map(|_| 200).unwrap_or_else(|fault| fault.status)
        };
        for (text, wanted) in [
            (sized(64, 10, 2), 200),
            (sized(65, 10, 2), 414),
            (sized(20, 32, 2), 200),
            (sized(20, 33, 2), 431),
            (sized(20, 20, 5), 200),
            (sized(20, 10, 6), 431),
            (sized(62, 30, 5), 431),
        ] {
            assert_eq!(whole(&text), wanted, "{} bytes", text.len());
            // An unfinished head is never refused before, nor kept for more than a limit's worth.
            let early = (0..text.len()).find(|end| whole(&text[..*end]) != 200);
            if wanted == 200 {
                assert_eq!(early, None);
            } else if let Some(end) = early {
                assert_eq!(whole(&text[..end]), wanted);
            }
        }
        let first_field = |bytes: usize| {
            format!("GET / HTTP/1.1\r\nA:{}\r\nHost: x\r\n\r\n", "v".repeat(bytes - 2))
        };
        assert_eq!(whole(first_field(32).as_bytes()), 200);
        assert_eq!(whole(first_field(33).as_bytes()), 431);
        assert_eq!(whole(&[b'A'; 66]), 501);
        assert_eq!(whole(&[b"GET /".as_slice(), &[b'a'; 61]].concat()), 414);
        let endless = [b"GET / HTTP/1.1\r\nHost: x\r\nA:".as_slice(), &[b'v'; 40]].concat();
        let longest = endless.len() - 40 + 30;
        assert_eq!(whole(&[&endless[..longest], b"\r"].concat()), 200);
        assert_eq!(whole(&endless[..longest + 2]), 431);
    }

    #[test]
    fn more_fields_than_there_is_room_for_are_refused() {
        assert_eq!(status(&sized(20, 10, FIELDS_MAX)), 200);
        assert_eq!(status(&sized(20, 10, FIELDS_MAX + 1)), 431);
    }

    #[test]
    fn another_protocol_is_told_apart_by_its_first_bytes() {
        assert_eq!(status(b"\x16\x03\x01\x02\x00\x01"), 400);
        assert_eq!(status(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 505);
        assert_eq!(status(b"{\"cmd\": \"hello\"}"), 400);
    }

    #[test]
    fn a_head_read_in_pieces_is_the_same_head() {
        let text = b"GET /a HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\n\r\n";
        let whole = read(text);
        for step in 1..text.len() {
            let mut seen = 0;
            let last = (0..=text.len()).step_by(step).chain([text.len()]).find_map(|end| {
                let mut space = Space::new();
                let got = request(&text[..end], seen, &Limits::default(), &mut space).unwrap();
                seen = end;
                got.map(|head| (format!("{} {:?}", head.method, head.target), 2, head.length))
            });
            assert_eq!(Ok(last), whole, "{step}");
        }
    }

    fn read_response(text: &[u8]) -> Result<Option<(u16, String, usize)>, u16> {
        let mut space = Space::new();
        match response(text, 0, &Limits::default(), &mut space) {
            Ok(None) => Ok(None),
            Ok(Some(head)) => Ok(Some((head.status, head.reason.into(), head.length))),
            Err(fault) => Err(fault.status),
        }
    }

    #[test]
    fn a_status_line_has_one_shape() {
        for (line, wanted) in [
            ("HTTP/1.1 200 OK", Ok((200, "OK"))),
            ("HTTP/1.0 404 Not Found", Ok((404, "Not Found"))),
            ("HTTP/1.1 200 ", Ok((200, ""))),
            ("HTTP/1.1 200", Ok((200, ""))),
            ("HTTP/1.1 999 x", Ok((999, "x"))),
            ("HTTP/1.1 099 x", Err(502)),
            ("HTTP/1.1 20 x", Err(502)),
            ("HTTP/1.1 2000 x", Err(502)),
            ("HTTP/1.1  200 OK", Err(502)),
            ("HTTP/2.0 200 OK", Err(502)),
            ("ICY 200 OK", Err(502)),
            ("\r\nHTTP/1.1 200 OK", Err(502)),
            ("HTTP/1.1 200 O\0K", Err(502)),
            ("HTTP/1.1 200 O\rK", Err(502)),
        ] {
            let text = format!("{line}\r\nA: b\r\n\r\n");
            let got = read_response(text.as_bytes()).map(|head| head.unwrap());
            let got = got.as_ref().map(|head| (head.0, head.1.as_str())).map_err(|status| *status);
            assert_eq!(got, wanted, "{line}");
        }
    }

    #[test]
    fn a_backend_may_leave_space_before_a_colon_but_not_fold_a_line() {
        let mut space = Space::new();
        let text = b"HTTP/1.1 200 OK\r\nDate : now\r\n\r\n";
        let head = response(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
        assert_eq!(head.fields.values(Name::Date).collect::<Vec<_>>(), [b"now"]);
        assert_eq!(read_response(b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n"), Err(502));
        assert_eq!(read_response(b"HTTP/1.1 200 OK\nA: b\r\n\r\n"), Err(502));
        assert_eq!(read_response(b"HTTP/1.1 200 OK\r\nA: b\n\r\n"), Err(502));
    }

    #[test]
    fn a_response_head_that_never_ends_is_refused() {
        let mut text = b"HTTP/1.1 200 OK\r\n".to_vec();
        while text.len() < 40_000 {
            text.extend_from_slice(format!("A: {}\r\n", "v".repeat(500)).as_bytes());
        }
        assert_eq!(read_response(&text[..20_000]), Ok(None));
        assert_eq!(read_response(&text), Err(502));
        assert_eq!(read_response(&[b'H'; 10_000]), Err(502));
    }
}
