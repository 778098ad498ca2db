//! One strict reading of a stream of requests, which shares nothing with the one under test: what
//! may come out of the gateway for what a user sent, and whether what does come out has one
//! meaning. RFC 9110 and RFC 9112 by their grammar; wherever they let a reader choose, this one
//! refuses.

/// A request as understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Said {
    pub method: String,
    /// In origin form, or `*`.
    pub target: String,
    pub body: Vec<u8>,
}

/// What stops a reading.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// All of the bytes are whole requests, or the last request is the last that a user may make.
    End,
    /// The last request is incomplete, and correct so far.
    Partial,
    Refused(&'static str),
}

/// A head, and its length in bytes.
pub struct Head {
    pub method: String,
    target: String,
    older: bool,
    pub fields: Vec<(String, Vec<u8>)>,
    pub bytes: usize,
}

type Reading<T> = Result<Option<T>, &'static str>;

/// Every request in the order in which a user makes them, and what follows the last.
pub fn strictly(mut bytes: &[u8]) -> (Vec<Said>, Stop) {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        // One empty line too many is forgiven (RFC 9112 2.2).
        let start = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
        match request(&bytes[start..]) {
            Ok(Some((said, length, last))) => {
                bytes = &bytes[start + length..];
                all.push(said);
                if last {
                    return (all, Stop::End);
                }
            }
            Ok(None) => return (all, Stop::Partial),
            Err(why) => return (all, Stop::Refused(why)),
        }
    }
    (all, Stop::End)
}

/// The first request, its length, and whether it says that it is the last.
pub fn request(bytes: &[u8]) -> Reading<(Said, usize, bool)> {
    let Some(head) = head(bytes)? else { return Ok(None) };
    let rest = &bytes[head.bytes..];
    let body = match head.framing()? {
        Framing::None => Some((Vec::new(), 0)),
        Framing::Length(length) => {
            let body = usize::try_from(length).ok().and_then(|length| rest.get(..length));
            body.map(|body| (body.to_vec(), body.len()))
        }
        Framing::Chunked => chunks(rest)?,
    };
    let Some((body, length)) = body else { return Ok(None) };
    let last = head.older || head.list("connection").any(|option| option == "close");
    let said = Said { method: head.method, target: head.target, body };
    Ok(Some((said, head.bytes + length, last)))
}

fn head(bytes: &[u8]) -> Reading<Head> {
    let Some(end) = place(bytes, b"\r\n\r\n") else { return Ok(None) };
    let mut lines = Lines(&bytes[..end + 2]);
    let start = lines.next().ok_or("no request line")?;
    let (method, target, older) = request_line(start)?;
    let fields = fields(lines)?;
    let head = Head { method, target, older, fields, bytes: end + 4 };
    head.check()?;
    Ok(Some(head))
}

/// Lines that end with CR LF, each without it.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let end = place(self.0, b"\r\n")?;
        let line = &self.0[..end];
        self.0 = &self.0[end + 2..];
        Some(line)
    }
}

fn place(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn request_line(line: &[u8]) -> Result<(String, String, bool), &'static str> {
    let parts: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let &[method, target, version] = &parts[..] else { return Err("not three parts") };
    let older = match version {
        b"HTTP/1.1" => false,
        b"HTTP/1.0" => true,
        _ => return Err("another version"),
    };
    if !is_token(method) || target.is_empty() || !target.iter().all(u8::is_ascii_graphic) {
        return Err("a forbidden byte in the request line");
    }
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("checked to be ASCII");
    let (method, target) = (text(method), text(target));
    if matches!(method.as_str(), "CONNECT" | "TRACE") || method.len() > 32 || target.contains('#') {
        return Err("what is not offered");
    }
    Ok((method.clone(), origin_form(&method, &target)?, older))
}

/// RFC 9112 3.2.
fn origin_form(method: &str, target: &str) -> Result<String, &'static str> {
    if target.starts_with('/') || target == "*" && method == "OPTIONS" {
        return Ok(target.to_string());
    }
    let lower = target.to_ascii_lowercase();
    let length = ["http://", "https://"].iter().find(|scheme| lower.starts_with(**scheme));
    let rest = &target[length.ok_or("no form of a target")?.len()..];
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    if !is_authority(&rest.as_bytes()[..end]) {
        return Err("no authority");
    }
    Ok(match &rest[end..] {
        "" if method == "OPTIONS" => "*".to_string(),
        path if path.starts_with('/') => path.to_string(),
        query => format!("/{query}"),
    })
}

fn is_authority(bytes: &[u8]) -> bool {
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~:[]".contains(byte);
    !bytes.is_empty() && bytes[0] != b':' && bytes.iter().all(known)
}

fn is_token(bytes: &[u8]) -> bool {
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !bytes.is_empty() && bytes.iter().all(known)
}

/// Field lines (RFC 9110 5, RFC 9112 5): names in lower case, values without surrounding blanks.
fn fields(lines: Lines<'_>) -> Result<Vec<(String, Vec<u8>)>, &'static str> {
    let mut all = Vec::new();
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':').ok_or("a line without a colon")?;
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if !is_token(name) {
            return Err("a forbidden byte in a name");
        }
        if value.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
            return Err("a forbidden byte in a value");
        }
        all.push((String::from_utf8_lossy(name).to_ascii_lowercase(), trimmed(value).to_vec()));
    }
    Ok(all)
}

fn trimmed(value: &[u8]) -> &[u8] {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = value.iter().position(|byte| !blank(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    &value[start..end]
}

pub enum Framing {
    None,
    Length(u64),
    Chunked,
}

impl Head {
    pub fn all<'h>(&'h self, wanted: &'h str) -> impl Iterator<Item = &'h [u8]> {
        self.fields
            .iter()
            .filter(move |(name, _)| name == wanted)
            .map(|(_, value)| value.as_slice())
    }

    fn list<'h>(&'h self, wanted: &'h str) -> impl Iterator<Item = String> + 'h {
        self.all(wanted)
            .flat_map(|value| value.split(|byte| *byte == b','))
            .map(|element| String::from_utf8_lossy(trimmed(element)).to_ascii_lowercase())
    }

    fn check(&self) -> Result<(), &'static str> {
        let hosts: Vec<_> = self.all("host").collect();
        match hosts[..] {
            [host] if is_authority(host) => {}
            [] if self.older => {}
            _ => return Err("not one Host"),
        }
        let expects = |value: &[u8]| value.eq_ignore_ascii_case(b"100-continue");
        if !self.older && !self.all("expect").all(expects) {
            return Err("an unknown expectation");
        }
        Ok(())
    }

    /// RFC 9112 6.3.
    pub fn framing(&self) -> Result<Framing, &'static str> {
        let codings: Vec<String> = self.list("transfer-encoding").collect();
        let lengths: Vec<&[u8]> = self.all("content-length").collect();
        match (&codings[..], &lengths[..]) {
            ([], []) => Ok(Framing::None),
            ([], [one]) if !one.is_empty() && one.iter().all(u8::is_ascii_digit) => {
                let text = String::from_utf8_lossy(one);
                text.parse().map(Framing::Length).map_err(|_| "a length beyond 64 bits")
            }
            ([coding], []) if coding == "chunked" && !self.older => Ok(Framing::Chunked),
            _ => Err("no plain framing"),
        }
    }
}

/// A chunked body (RFC 9112 7.1): its content and its length on the wire.
fn chunks(bytes: &[u8]) -> Reading<(Vec<u8>, usize)> {
    let (mut content, mut at) = (Vec::new(), 0);
    loop {
        let Some(end) = place(&bytes[at..], b"\r\n") else { return Ok(None) };
        let size = chunk_size(&bytes[at..at + end])?;
        at += end + 2;
        if size == 0 {
            break;
        }
        let rest = &bytes[at..];
        let here = usize::try_from(size).ok().filter(|size| *size <= rest.len());
        let Some(size) = here else { return Ok(None) };
        content.extend_from_slice(&rest[..size]);
        match &rest[size..] {
            [b'\r', b'\n', ..] => at += size + 2,
            [] | [b'\r'] => return Ok(None),
            _ => return Err("a chunk without an end"),
        }
    }
    let rest = &bytes[at..];
    if rest.starts_with(b"\r\n") {
        return Ok(Some((content, at + 2)));
    }
    let Some(end) = place(rest, b"\r\n\r\n") else { return Ok(None) };
    fields(Lines(&rest[..end + 2]))?;
    Ok(Some((content, at + end + 4)))
}

fn chunk_size(line: &[u8]) -> Result<u64, &'static str> {
    let end = line.iter().position(|byte| *byte == b';').unwrap_or(line.len());
    let (size, extension) = line.split_at(end);
    if size.is_empty() || size.len() > 16 || !size.iter().all(u8::is_ascii_hexdigit) {
        return Err("no chunk size");
    }
    if extension.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err("a forbidden byte in an extension");
    }
    let size = i64::from_str_radix(&String::from_utf8_lossy(size), 16);
    size.map(i64::unsigned_abs).map_err(|_| "no chunk size")
}

/// What is wrong with a head that the gateway wrote. A name that a backend may take for framing (it
/// may take `_` for `-`) must occur once and in one spelling; nothing that is for one hop alone may
/// occur.
pub fn stray_field(bytes: &[u8]) -> Option<String> {
    let head = match head(bytes) {
        Ok(Some(head)) => head,
        other => return Some(format!("no head: {:?}", other.err())),
    };
    let folded = |name: &str| name.replace('_', "-");
    for (name, value) in &head.fields {
        let text = String::from_utf8_lossy(value);
        let good = match folded(name).as_str() {
            "content-length" => {
                name == "content-length"
                    && text.parse::<u64>().is_ok_and(|it| it.to_string() == text)
            }
            "transfer-encoding" => name == "transfer-encoding" && text == "chunked",
            "connection" => matches!(text.as_ref(), "te" | "upgrade" | "upgrade, te"),
            "te" => text == "trailers",
            "host" => name == "host",
            "keep-alive" | "proxy-connection" | "http2-settings" => false,
            _ => true,
        };
        if !good {
            return Some(format!("{name}: {text}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strict_reader_tells_whole_halves_and_faults_apart() {
        let first = "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
        let whole =
            format!("{first}3;x\r\nabc\r\n0\r\nT: 1\r\n\r\nGET http://x/b HTTP/1.0\r\n\r\nXX");
        let (said, stop) = strictly(whole.as_bytes());
        let told: Vec<_> = said.iter().map(|one| (one.target.as_str(), one.body.len())).collect();
        assert_eq!((told, stop), (vec![("/a", 3), ("/b", 0)], Stop::End));
        for (rest, refused) in
            [("3\r\nab", false), ("3\r\nabcd", true), ("3 \r\n", true), ("0\r\n", false)]
        {
            let (said, stop) = strictly(format!("{first}{rest}").as_bytes());
            assert!(said.is_empty(), "{rest:?}");
            assert_eq!(matches!(stop, Stop::Refused(_)), refused, "{rest:?}: {stop:?}");
        }
    }
}
