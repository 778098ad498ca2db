//! Reading heads: bytes become names and values that point into them; nothing is copied or
//! allocated. `httparse` finds the parts; this file adds the limits, and refuses what `httparse`
//! lets pass (bare line feeds, several empty lines, any target, any number of `Host`). Decides
//! nothing about bodies.

use std::mem::MaybeUninit;

use super::field::{self, Name};
use super::{Limits, Malformed, Version};

/// Limit on the field lines of a head.
pub const FIELDS_MAX: usize = 100;
/// A longer method is not one that anybody implements (RFC 9112 3: 501).
const METHOD_BYTES_MAX: usize = 32;

/// Limit on the fields that `Connection` may name. Every line of a head is compared with each of
/// them, and a head has room for thousands; nobody names more than two or three.
const NAMED_MAX: usize = 32;

/// A field line: a token and a value without the space around it.
pub type Field<'a> = httparse::Header<'a>;

/// Storage for a head's field lines while it is being read. It lives on the caller's stack, beside
/// the bytes it points into, and costs nothing to make.
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

/// The field lines of a head in their original order, each with the meaning of its name.
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

    /// The value of the only line of that name; `twice` is the error if there is a second.
    fn only(&self, name: Name, twice: Malformed) -> Result<Option<&'a [u8]>, Malformed> {
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
    fn of(fields: &Fields<'_, '_>) -> Result<Connection, Malformed> {
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
            return Err(Malformed::new(400, "too many names in Connection"));
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
    /// The authority that the request is addressed to: that of a target in absolute form, else
    /// `Host`. Only an HTTP/1.0 request may have none.
    pub host: Option<&'a str>,
    pub fields: Fields<'s, 'a>,
    pub connection: Connection,
    /// The user waits for 100 (Continue) before it sends the body (RFC 9110 10.1.1).
    pub expects_continue: bool,
    /// Length of the head in bytes; the body, or the next request, starts there.
    pub length: usize,
}

#[derive(Clone, Copy, Debug)]
pub struct ResponseHead<'s, 'a> {
    pub status: u16,
    /// Empty if there was none, or if it held bytes beyond ASCII.
    pub reason: &'a str,
    pub version: Version,
    pub fields: Fields<'s, 'a>,
    pub connection: Connection,
    /// Length of the head in bytes; the body, or the next response, starts there.
    pub length: usize,
}

/// Reads the head of a request. `None` means that more bytes are needed; `seen` is how many of
/// `bytes` were there when it was last returned, so that a head which arrives byte by byte is not
/// parsed again for each.
pub fn request<'s, 'a>(
    bytes: &'a [u8],
    seen: usize,
    limits: &Limits,
    space: &'s mut Space<'a>,
) -> Result<Option<RequestHead<'s, 'a>>, Malformed> {
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
        return Err(Malformed::new(400, "malformed request line"));
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
) -> Result<Option<ResponseHead<'s, 'a>>, Malformed> {
    const LINE_TOO_LONG: Malformed = Malformed::new(502, "status line too long");
    if matches!(bytes.first(), Some(b'\r' | b'\n')) {
        return Err(Malformed::new(502, "empty line where a status line should be"));
    }
    let within =
        |bytes| still_within(bytes, limits, |_| LINE_TOO_LONG).map_err(Malformed::of_backend);
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
        Err(error) => return Err(Malformed::new(502, explained(error))),
    };
    let (Some(status), Some(minor)) = (parsed.code, parsed.version) else {
        return Err(Malformed::new(502, "malformed status line"));
    };
    if status < 100 {
        return Err(Malformed::new(502, "status out of range"));
    }
    let reason = parsed.reason.unwrap_or_default();
    let first = line_ends(bytes, parsed.headers, length, limits).map_err(Malformed::of_backend)?;
    if first > limits.line_bytes {
        return Err(LINE_TOO_LONG);
    }
    let fields = survey(parsed.headers, &mut space.names);
    let connection = Connection::of(&fields).map_err(Malformed::of_backend)?;
    Ok(Some(ResponseHead { status, reason, version: version(minor), fields, connection, length }))
}

/// Replaces the control bytes in the field values of a refused response head with spaces, as far as
/// the head has arrived. Returns true when it is worth reading again.
pub fn clean(bytes: &mut [u8]) -> bool {
    let fields = bytes.iter().position(|byte| *byte == b'\n').map(|end| end + 1);
    fields.is_some_and(|start| field::clean(&mut bytes[start..]))
}

/// Where the message starts: one empty line before a request is ignored (RFC 9112 2.2), for clients
/// that end a body with one too many.
fn after_empty_line(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    const STRAY: Malformed = Malformed::new(400, "stray line end before the request line");
    match bytes {
        [] | [b'\r'] | [b'\r', b'\n'] => Ok(None),
        [b'\r', b'\n', b'\r' | b'\n', ..] => Err(STRAY),
        [b'\r', b'\n', ..] => Ok(Some(2)),
        [b'\r' | b'\n', ..] => Err(STRAY),
        _ => Ok(Some(0)),
    }
}

/// Without another line end, a head cannot have become complete, nor any line of it malformed. The
/// first bytes are always checked, so that another protocol is recognised at once.
fn nothing_new(bytes: &[u8], seen: usize) -> bool {
    seen > 2 && !bytes.get(seen..).is_some_and(|fresh| fresh.contains(&b'\n'))
}

/// Whether an unfinished head may still grow.
fn still_within(
    message: &[u8],
    limits: &Limits,
    line_too_long: fn(&[u8]) -> Malformed,
) -> Result<(), Malformed> {
    if message.len() >= limits.head_bytes {
        return Err(if message.contains(&b'\n') {
            Malformed::new(431, "header section too large")
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
            Err(Malformed::new(431, "field line too long"))
        }
        _ => Ok(()),
    }
}

/// Blames the method or the target for a request line that is too long (RFC 9112 3).
fn line_too_long(message: &[u8]) -> Malformed {
    match message.iter().position(|byte| *byte == b' ') {
        Some(length) if length <= METHOD_BYTES_MAX => {
            Malformed::new(414, "request target too long")
        }
        _ => Malformed::new(501, "method too long"),
    }
}

fn refused_request(error: httparse::Error, message: &[u8], limits: &Limits) -> Malformed {
    if matches!(error, httparse::Error::TooManyHeaders) {
        return Malformed::new(431, "too many fields");
    }
    if matches!(error, httparse::Error::Version) && names_a_version(message, limits) {
        return Malformed::new(505, "HTTP version not supported");
    }
    Malformed::new(400, explained(error))
}

/// Whether the request line ends with a version, but not one of ours.
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

/// Checks that every line ends with CR LF, which the parser does not require, and that none is too
/// long. The parser has made sure of a line feed before each name and at the end, so only the byte
/// before it is in question. Returns the length of the first line.
fn line_ends(
    message: &[u8],
    lines: &[Field<'_>],
    length: usize,
    limits: &Limits,
) -> Result<usize, Malformed> {
    const BARE: Malformed = Malformed::new(400, "bare line feed");
    if length > limits.head_bytes {
        return Err(Malformed::new(431, "header section too large"));
    }
    if lines.len() > limits.fields {
        return Err(Malformed::new(431, "too many fields"));
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
        // The length of the previous line, with its line end; the caller measures the first one.
        if begins - start > limits.field_bytes + 2 {
            return Err(Malformed::new(431, "field line too long"));
        }
        start = begins;
    }
    if !lines.is_empty() && length - 2 - start > limits.field_bytes + 2 {
        return Err(Malformed::new(431, "field line too long"));
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

fn target<'a>(method: &str, path: &'a str) -> Result<Target<'a>, Malformed> {
    if method.len() > METHOD_BYTES_MAX {
        return Err(Malformed::new(501, "method too long"));
    }
    if matches!(method, "CONNECT" | "TRACE") {
        return Err(Malformed::new(501, "method not offered"));
    }
    // A fragment is never sent (RFC 9112 3.2.1), and one reader in two cuts it off.
    if !path.is_ascii() || path.as_bytes().contains(&b'#') {
        return Err(Malformed::new(400, "forbidden byte in the request target"));
    }
    match path.as_bytes() {
        [b'/', ..] => Ok(Target::Origin(path)),
        b"*" if method == "OPTIONS" => Ok(Target::Asterisk),
        _ => absolute(path).ok_or(Malformed::new(400, "malformed request target")),
    }
}

/// Either scheme: a proxy that terminates TLS in front of us passes such a target on unchanged (RFC
/// 9112 3.2.2). The scheme says nothing about how the user reached us, which only a trusted proxy
/// may tell.
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
) -> Result<Option<&'a str>, Malformed> {
    let value = fields.only(Name::Host, Malformed::new(400, "more than one Host"))?;
    let host = match value.map(std::str::from_utf8) {
        Some(Ok(host)) if valid_authority(host) => Some(host),
        Some(_) => return Err(Malformed::new(400, "malformed Host")),
        None if version == Version::Http11 => return Err(Malformed::new(400, "no Host")),
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

/// The only expectation that is defined; HTTP/1.0 has none (RFC 9110 10.1.1).
fn expectation(fields: &Fields<'_, '_>, version: Version) -> Result<bool, Malformed> {
    if version == Version::Http10 || !fields.has(Name::Expect) {
        return Ok(false);
    }
    let known = |value: &[u8]| value.eq_ignore_ascii_case(b"100-continue");
    if fields.values(Name::Expect).all(known) {
        Ok(true)
    } else {
        Err(Malformed::new(417, "unknown expectation"))
    }
}

#[cfg(test)]
mod tests;
