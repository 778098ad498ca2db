//! The first message of a TLS connection, as far as a balancer must know it before anybody answers: the
//! host that it names (RFC 8446 section 4.1.2, RFC 6066 section 3). Owns how a ClientHello is found in bytes
//! that may be cut at any place, and its limits; changes and keeps nothing.

/// The most bytes up to the end of a ClientHello, record headers included. With post-quantum key shares
/// and tickets they take about two thousand.
pub const BYTES_MAX: usize = 16 * 1024;
/// The most records that it may be spread over.
pub const RECORDS_MAX: usize = 32;

const RECORD_HEAD_BYTES: usize = 5;
const MESSAGE_HEAD_BYTES: usize = 4;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const VERSION_MAJOR: u8 = 3;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;
/// RFC 1035 section 2.3.4, as text and without the last dot.
const NAME_BYTES_MAX: usize = 253;

/// What a ClientHello says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hello {
    /// How many bytes of the connection it takes, record headers included.
    pub bytes: usize,
    /// The host that it asks for (SNI) in lower case, without a dot at its end.
    pub host: Option<String>,
}

/// Not the start of a connection that we can serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// The first bytes are no TLS record with a handshake message.
    NotTls,
    /// They are the start of an HTTP request in the clear.
    PlainHttp,
    /// Longer than [`BYTES_MAX`], or in more than [`RECORDS_MAX`] records.
    TooLong,
    /// It contradicts its own lengths, or names a host that cannot be one.
    Broken,
}

/// Reads the ClientHello at the start of a connection. `None`: more bytes are needed.
///
/// # Errors
/// Why these bytes do not begin with one, whatever follows.
pub fn read(bytes: &[u8]) -> Result<Option<Hello>, Malformed> {
    if is_plain_http(bytes) {
        return Err(Malformed::PlainHttp);
    }
    let Some(Gathered { message, taken }) = gather(bytes)? else { return Ok(None) };
    let host = host_of(&message[MESSAGE_HEAD_BYTES..]).ok_or(Malformed::Broken)?;
    Ok(Some(Hello { bytes: taken, host }))
}

/// A user's browser was sent here without `https`.
fn is_plain_http(bytes: &[u8]) -> bool {
    const METHODS: [&[u8]; 7] =
        [b"GET ", b"POST ", b"HEAD ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH "];
    METHODS.iter().any(|method| bytes.starts_with(method))
}

struct Gathered {
    /// The message with its own head.
    message: Vec<u8>,
    taken: usize,
}

/// Joins the message from its records.
fn gather(bytes: &[u8]) -> Result<Option<Gathered>, Malformed> {
    let (mut rest, mut joined) = (bytes, Vec::new());
    for _ in 0..RECORDS_MAX {
        let Some((head, after)) = rest.split_first_chunk::<RECORD_HEAD_BYTES>() else {
            return more_of_record(rest, bytes.len());
        };
        let length = record(*head)?;
        let (part, after) = after.split_at(after.len().min(length));
        joined.extend_from_slice(part);
        if let Some(end) = message_end(&joined)?
            && joined.len() >= end
        {
            let taken = bytes.len() - after.len();
            // Whatever shares its last record is for whoever answers it.
            joined.truncate(end);
            return Ok(Some(Gathered { message: joined, taken }));
        }
        if part.len() < length {
            return more(bytes.len());
        }
        rest = after;
    }
    Err(Malformed::TooLong)
}

fn more(seen: usize) -> Result<Option<Gathered>, Malformed> {
    if seen < BYTES_MAX { Ok(None) } else { Err(Malformed::TooLong) }
}

/// The head of a record is not whole yet; its first byte may show already that it is none.
fn more_of_record(part: &[u8], seen: usize) -> Result<Option<Gathered>, Malformed> {
    match part {
        [] | [HANDSHAKE] | [HANDSHAKE, VERSION_MAJOR, ..] => more(seen),
        _ => Err(Malformed::NotTls),
    }
}

/// The length of a record of handshake messages.
fn record([kind, major, _, high, low]: [u8; RECORD_HEAD_BYTES]) -> Result<usize, Malformed> {
    let length = usize::from(u16::from_be_bytes([high, low]));
    match (kind, major) {
        (HANDSHAKE, VERSION_MAJOR) if length > 0 && length <= BYTES_MAX => Ok(length),
        (HANDSHAKE, VERSION_MAJOR) => Err(Malformed::Broken),
        _ => Err(Malformed::NotTls),
    }
}

/// Where the message ends that these bytes begin.
fn message_end(joined: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(&[kind, a, b, c]) = joined.first_chunk::<MESSAGE_HEAD_BYTES>() else {
        return match joined.first() {
            Some(&kind) if kind != CLIENT_HELLO => Err(Malformed::NotTls),
            _ => Ok(None),
        };
    };
    if kind != CLIENT_HELLO {
        return Err(Malformed::NotTls);
    }
    let end = MESSAGE_HEAD_BYTES + u32::from_be_bytes([0, a, b, c]) as usize;
    if end <= BYTES_MAX { Ok(Some(end)) } else { Err(Malformed::TooLong) }
}

/// The host that a message asks for, if it asks for one. The outer `None`: it contradicts its own lengths, or
/// asks for none that can be one.
fn host_of(message: &[u8]) -> Option<Option<String>> {
    // Version and random.
    let (_, rest) = message.split_at_checked(2 + 32)?;
    let (_session, rest) = short(rest)?;
    let (_ciphers, rest) = long(rest)?;
    let (_compressions, rest) = short(rest)?;
    if rest.is_empty() {
        // The oldest hellos have no extensions.
        return Some(None);
    }
    let (mut extensions, rest) = long(rest)?;
    if !rest.is_empty() {
        return None;
    }
    let mut found = None;
    while !extensions.is_empty() {
        let (kind, after) = extensions.split_first_chunk::<2>()?;
        let (value, after) = long(after)?;
        if u16::from_be_bytes(*kind) == SERVER_NAME {
            found = Some(host(value)?);
        }
        extensions = after;
    }
    Some(found)
}

/// A vector with one byte of length, and what follows it.
fn short(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(length))
}

/// A vector with two bytes of length, and what follows it.
fn long(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

/// The first host of a list of names.
fn host(value: &[u8]) -> Option<String> {
    let (mut names, _) = long(value)?;
    while let Some((&kind, after)) = names.split_first() {
        let (name, after) = long(after)?;
        if kind == HOST_NAME {
            return plain(name);
        }
        names = after;
    }
    None
}

fn plain(name: &[u8]) -> Option<String> {
    let name = name.strip_suffix(b".").unwrap_or(name);
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
    let is_name = !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.iter().all(fits);
    is_name.then(|| String::from_utf8_lossy(name).to_ascii_lowercase())
}

#[cfg(test)]
mod tests;
