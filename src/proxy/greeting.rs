//! The header by which a proxy tells for whom it has connected: the PROXY protocol, versions 1 and 2,
//! after <https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>. Owns how a header is read,
//! written and recognised; who may send one is decided elsewhere.
//!
//! TLVs tell more about the user than addresses. They must be well-formed, and a checksum among them must
//! be right; otherwise nothing is made of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest header that is read, TLVs included. The largest address block, a pair of Unix paths, takes 216
/// bytes; proxies that pass a TLS client's certificate add one or two thousand.
pub const BYTES_MAX: usize = 4096;
/// Bytes that [`write`] needs at most: two IPv6 addresses and their ports.
pub const WRITTEN_MAX: usize = HEAD_BYTES + 36;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length of the rest.
const HEAD_BYTES: usize = 16;
const V1_PREFIX: &[u8] = b"PROXY ";
/// Longest line of version 1, with its end: "UNKNOWN", two full IPv6 addresses and two ports.
const V1_BYTES_MAX: usize = 107;
/// Version 2 in the upper half of a byte; the lower one holds the command.
const V2: u8 = 0x20;
const LOCAL: u8 = 0;
const PROXY: u8 = 1;
/// The type of the TLV with a checksum of the whole header.
const TLV_CRC32C: u8 = 0x03;
const TLV_HEAD_BYTES: usize = 3;

/// What a proxy has said of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Length of the header; the user's own bytes follow.
    pub bytes: usize,
    /// `None` when the proxy connected for itself (LOCAL), or does not know for whom or cannot say it in
    /// IP addresses (UNKNOWN, UNSPEC, Unix sockets, UDP): the connection's own addresses are meant.
    pub ends: Option<Ends>,
}

/// The addresses of the user's connection to the first proxy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ends {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// Whoever has connected, as far as is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// The user's: the connection's own, or what a proxy has told.
    pub address: SocketAddr,
    /// Where the user has connected to, if a proxy has told.
    pub destination: Option<SocketAddr>,
    /// It may send no header, and its first bytes have not been looked at.
    pub is_stranger: bool,
}

impl From<SocketAddr> for Caller {
    /// Somebody who speaks for itself.
    fn from(address: SocketAddr) -> Caller {
        Caller { address, destination: None, is_stranger: false }
    }
}

impl Caller {
    /// The same after a proxy's header.
    pub fn told(self, hello: Hello) -> Caller {
        let canonical = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
        match hello.ends {
            Some(ends) => Caller {
                address: canonical(ends.source),
                destination: Some(canonical(ends.destination)),
                ..self
            },
            None => self,
        }
    }
}

/// Not the header of a proxy, or none that may be believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// The first bytes are those of neither version.
    NoHeader,
    /// It is longer than [`BYTES_MAX`], or than a line of version 1 may be.
    TooLong,
    /// A version, command, family or transport that is not assigned.
    Unassigned,
    /// Addresses, ports or the blanks between them are wrong or too few.
    Addresses,
    /// TLVs that end before or after the header does.
    Tlvs,
    /// The checksum that came with the header is not the header's.
    Checksum,
}

/// Reads the header at the start of a connection. `None`: more bytes are needed.
///
/// # Errors
/// Why these bytes do not begin with a header, whatever follows.
pub fn read(bytes: &[u8]) -> Result<Option<Hello>, Malformed> {
    match resemblance(bytes) {
        Resemblance::None => Err(Malformed::NoHeader),
        Resemblance::Partial => Ok(None),
        Resemblance::V1 => read_line(bytes),
        Resemblance::V2 => read_binary(bytes),
    }
}

/// How the first bytes of a connection compare with the beginning of a header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Resemblance {
    None,
    /// So far equal, but too few to tell.
    Partial,
    V1,
    V2,
}

fn resemblance(bytes: &[u8]) -> Resemblance {
    for (prefix, version) in [(V1_PREFIX, Resemblance::V1), (&SIGNATURE, Resemblance::V2)] {
        if bytes.starts_with(prefix) {
            return version;
        }
        if prefix.starts_with(bytes) {
            return Resemblance::Partial;
        }
    }
    Resemblance::None
}

/// Looks for a header at the start of a connection that must not have one, however it is cut in pieces.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Screen {
    seen: [u8; SIGNATURE.len()],
    count: usize,
}

/// What a [`Screen`] has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Screened {
    /// A header has begun: the bytes just seen must not be passed on.
    Header,
    /// There is none.
    Clean,
    /// It may still become one.
    Undecided,
}

impl Screen {
    /// The bytes that are known, for whoever takes the connection up.
    pub fn seen(&self) -> &[u8] {
        &self.seen[..self.count]
    }

    /// Takes note of the next bytes of the connection.
    pub fn see(&mut self, bytes: &[u8]) -> Screened {
        let new = bytes.len().min(self.seen.len() - self.count);
        self.seen[self.count..self.count + new].copy_from_slice(&bytes[..new]);
        self.count += new;
        match resemblance(&self.seen[..self.count]) {
            Resemblance::V1 | Resemblance::V2 => Screened::Header,
            Resemblance::None => Screened::Clean,
            Resemblance::Partial => Screened::Undecided,
        }
    }
}

/// `PROXY TCP4 192.0.2.1 192.0.2.2 123 5678\r\n`.
fn read_line(bytes: &[u8]) -> Result<Option<Hello>, Malformed> {
    let within = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    let Some(end) = within.windows(2).position(|two| two == b"\r\n") else {
        let more = within.len() < V1_BYTES_MAX;
        return if more { Ok(None) } else { Err(Malformed::TooLong) };
    };
    let line = str::from_utf8(&within[V1_PREFIX.len()..end]).map_err(|_| Malformed::Addresses)?;
    let (family, rest) = line.split_once(' ').unwrap_or((line, ""));
    let ends = match family {
        "TCP4" => Some(line_ends(rest, |text| text.parse().map(IpAddr::V4).ok())?),
        "TCP6" => Some(line_ends(rest, |text| text.parse().map(IpAddr::V6).ok())?),
        // Whatever follows is to be ignored.
        "UNKNOWN" => None,
        _ => return Err(Malformed::Unassigned),
    };
    Ok(Some(Hello { bytes: end + 2, ends }))
}

fn line_ends(text: &str, address: impl Fn(&str) -> Option<IpAddr>) -> Result<Ends, Malformed> {
    let mut words = text.split(' ');
    let mut word = || words.next().ok_or(Malformed::Addresses);
    let [source, destination, source_port, destination_port] = [word()?, word()?, word()?, word()?];
    if words.next().is_some() {
        return Err(Malformed::Addresses);
    }
    let end = |ip, at| Some(SocketAddr::new(address(ip)?, port(at)?));
    let ends = || {
        let source = end(source, source_port)?;
        Some(Ends { source, destination: end(destination, destination_port)? })
    };
    ends().ok_or(Malformed::Addresses)
}

/// A decimal number as it is written, without a sign or zeros before it.
fn port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let padded = text.len() > 1 && text.starts_with('0');
    if plain && !padded { text.parse().ok() } else { None }
}

fn read_binary(bytes: &[u8]) -> Result<Option<Hello>, Malformed> {
    let Some(&[version, family, high, low]) = bytes.get(SIGNATURE.len()..HEAD_BYTES) else {
        return Ok(None);
    };
    if version & 0xf0 != V2 || version & 0x0f > PROXY || family >> 4 > 3 || family & 0x0f > 2 {
        return Err(Malformed::Unassigned);
    }
    let length = HEAD_BYTES + usize::from(u16::from_be_bytes([high, low]));
    if length > BYTES_MAX {
        return Err(Malformed::TooLong);
    }
    let Some(header) = bytes.get(..length) else { return Ok(None) };
    let ends = match version & 0x0f {
        LOCAL => None,
        _ => binary_ends(family, header)?,
    };
    Ok(Some(Hello { bytes: length, ends }))
}

fn binary_ends(family: u8, header: &[u8]) -> Result<Option<Ends>, Malformed> {
    let rest = &header[HEAD_BYTES..];
    let room = match family >> 4 {
        // It is not said how the addresses are laid out, hence not where TLVs would begin.
        0 => return Ok(None),
        1 => 12,
        2 => 36,
        _ => 216,
    };
    let (block, tlvs) = rest.split_at_checked(room).ok_or(Malformed::Addresses)?;
    check_tlvs(header, tlvs)?;
    Ok(match family {
        0x11 => Some(ends_of::<4>(block)),
        0x21 => Some(ends_of::<16>(block)),
        _ => None,
    })
}

/// The addresses and ports of a block of `2 * N + 4` bytes.
fn ends_of<const N: usize>(block: &[u8]) -> Ends
where
    IpAddr: From<[u8; N]>,
{
    let address = |at: usize| {
        let octets: [u8; N] = block[at..at + N].try_into().expect("the range has N bytes");
        IpAddr::from(octets)
    };
    let port = |at: usize| u16::from_be_bytes([block[at], block[at + 1]]);
    Ends {
        source: SocketAddr::new(address(0), port(2 * N)),
        destination: SocketAddr::new(address(N), port(2 * N + 2)),
    }
}

fn check_tlvs(header: &[u8], tlvs: &[u8]) -> Result<(), Malformed> {
    let mut rest = tlvs;
    while !rest.is_empty() {
        let (&[kind, high, low], after) =
            rest.split_first_chunk::<TLV_HEAD_BYTES>().ok_or(Malformed::Tlvs)?;
        let length = usize::from(u16::from_be_bytes([high, low]));
        let (value, after) = after.split_at_checked(length).ok_or(Malformed::Tlvs)?;
        if kind == TLV_CRC32C {
            let told = value.try_into().map_err(|_| Malformed::Tlvs)?;
            let at = header.len() - after.len() - value.len();
            if u32::from_be_bytes(told) != checksum(header, at) {
                return Err(Malformed::Checksum);
            }
        }
        rest = after;
    }
    Ok(())
}

/// CRC-32C (RFC 3720 B.4) of a header whose checksum at `at` counts as zero. Bit by bit: few proxies send
/// one, and once a connection.
fn checksum(header: &[u8], at: usize) -> u32 {
    let mut crc = u32::MAX;
    for (place, byte) in header.iter().enumerate() {
        let its_own = (at..at + 4).contains(&place);
        crc ^= if its_own { 0 } else { u32::from(*byte) };
        for _ in 0..u8::BITS {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// Writes a header of version 2 for a user's connection, or LOCAL for one of our own, and returns the part
/// of `room` that it takes. Where one address is IPv4 and the other IPv6, both are written as IPv6.
pub fn write(ends: Option<Ends>, room: &mut [u8; WRITTEN_MAX]) -> &[u8] {
    let addresses = ends.map(|Ends { source, destination }| {
        (source.ip().to_canonical(), destination.ip().to_canonical())
    });
    let (command, family, length) = match addresses {
        None => (LOCAL, 0x00, 0),
        Some((IpAddr::V4(_), IpAddr::V4(_))) => (PROXY, 0x11, 12),
        Some(_) => (PROXY, 0x21, 36),
    };
    room[..SIGNATURE.len()].copy_from_slice(&SIGNATURE);
    room[SIGNATURE.len()..HEAD_BYTES].copy_from_slice(&[V2 | command, family, 0, length]);
    let end = HEAD_BYTES + usize::from(length);
    let block = &mut room[HEAD_BYTES..end];
    match addresses {
        Some((IpAddr::V4(source), IpAddr::V4(destination))) => {
            block[..4].copy_from_slice(&source.octets());
            block[4..8].copy_from_slice(&destination.octets());
        }
        Some((source, destination)) => {
            block[..16].copy_from_slice(&wide(source).octets());
            block[16..32].copy_from_slice(&wide(destination).octets());
        }
        None => {}
    }
    if let Some(Ends { source, destination }) = ends {
        let ports = block.len() - 4;
        block[ports..ports + 2].copy_from_slice(&source.port().to_be_bytes());
        block[ports + 2..].copy_from_slice(&destination.port().to_be_bytes());
    }
    &room[..end]
}

fn wide(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::to_ipv6_mapped(&address),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests;
