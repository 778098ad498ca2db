//! The reader of PROXY headers held against the crate `ppp`, over headers made up and spoilt at random:
//! the same every time. And, on request, against the Python package `proxy-protocol`, which `.ci/run`
//! installs into `target/python`.

use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use lb::proxy::greeting::{self, Ends, Hello, Malformed, WRITTEN_MAX};
use ppp::{HeaderResult, PartialResult, v1, v2};

#[path = "common/random.rs"]
mod random;

use random::Random;

const ROUNDS: usize = 200_000;

fn ends(
    source: (impl Into<std::net::IpAddr>, u16),
    destination: (impl Into<std::net::IpAddr>, u16),
) -> Option<Ends> {
    let at = |ip: std::net::IpAddr, port| SocketAddr::new(ip, port);
    Some(Ends {
        source: at(source.0.into(), source.1),
        destination: at(destination.0.into(), destination.1),
    })
}

/// What `ppp` says, in our words: the outer `None` for a header that it does not accept.
fn theirs(bytes: &[u8]) -> Option<Option<Hello>> {
    let hello = match HeaderResult::parse(bytes) {
        HeaderResult::V1(Ok(header)) => {
            let ends = match header.addresses {
                v1::Addresses::Unknown => None,
                v1::Addresses::Tcp4(it) => ends(
                    (it.source_address, it.source_port),
                    (it.destination_address, it.destination_port),
                ),
                v1::Addresses::Tcp6(it) => ends(
                    (it.source_address, it.source_port),
                    (it.destination_address, it.destination_port),
                ),
            };
            Hello { bytes: header.header.len(), ends }
        }
        HeaderResult::V2(Ok(header)) => {
            let told =
                header.command == v2::Command::Proxy && header.protocol == v2::Protocol::Stream;
            let ends = match header.addresses {
                v2::Addresses::IPv4(it) if told => ends(
                    (it.source_address, it.source_port),
                    (it.destination_address, it.destination_port),
                ),
                v2::Addresses::IPv6(it) if told => ends(
                    (it.source_address, it.source_port),
                    (it.destination_address, it.destination_port),
                ),
                _ => None,
            };
            Hello { bytes: header.len(), ends }
        }
        other if other.is_incomplete() => return Some(None),
        _ => return None,
    };
    Some(Some(hello))
}

/// A header as a proxy might write it.
fn header(random: &mut Random) -> Vec<u8> {
    if random.one_in(3) { line(random) } else { binary(random) }
}

fn line(random: &mut Random) -> Vec<u8> {
    let mut port = || random.below(65_536);
    let ports = (port(), port());
    let mut address = |six: bool| match six {
        true => std::net::Ipv6Addr::from_bits(
            u128::from(random.next()) << 64 | u128::from(random.next()),
        )
        .to_string(),
        false => std::net::Ipv4Addr::from_bits(random.next() as u32).to_string(),
    };
    let (four, six) = ((address(false), address(false)), (address(true), address(true)));
    let text = match random.below(4) {
        0 => "PROXY UNKNOWN\r\n".to_owned(),
        1 => format!("PROXY UNKNOWN {} {} {} {}\r\n", six.0, six.1, ports.0, ports.1),
        2 => format!("PROXY TCP4 {} {} {} {}\r\n", four.0, four.1, ports.0, ports.1),
        _ => format!("PROXY TCP6 {} {} {} {}\r\n", six.0, six.1, ports.0, ports.1),
    };
    text.into_bytes()
}

fn binary(random: &mut Random) -> Vec<u8> {
    let family = random.pick(&[0x00, 0x10, 0x11, 0x11, 0x12, 0x21, 0x21, 0x22, 0x31, 0x32]);
    let length = match family >> 4 {
        0 => 0,
        1 => 12,
        2 => 36,
        _ => 216,
    };
    let mut rest: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
    if family >> 4 > 0 {
        for _ in 0..random.below(3) {
            let value = random.any_size(64) as u16 - 1;
            rest.push(random.pick(&[0x01, 0x02, 0x04, 0x20, 0xee]));
            rest.extend(value.to_be_bytes());
            rest.extend((0..value).map(|_| random.next() as u8));
        }
    }
    let command = random.pick(&[0x20, 0x21, 0x21, 0x21]);
    let length = (rest.len() as u16).to_be_bytes();
    [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, &rest].concat()
}

fn spoil(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..random.below(4) {
        let at = random.place(bytes.len());
        match random.below(5) {
            0 => bytes.truncate(at.max(1)),
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.pick(b"0129 \r\n.:PQ\0\x01\x03\xff"),
            3 => bytes.insert(at, random.pick(b"0 \r\n+.:")),
            _ => drop(bytes.remove(at)),
        }
        if bytes.is_empty() {
            bytes.push(b'P');
        }
    }
}

fn holds(bytes: &[u8], two: &[u8; 2]) -> bool {
    bytes.windows(2).any(|window| window == two)
}

/// Where we are of another opinion, and why.
fn is_known_difference(bytes: &[u8], ours: &Result<Option<Hello>, Malformed>) -> bool {
    let is_text = bytes.starts_with(b"PROXY ");
    match ours {
        // It lets TLVs and checksums be, and never finds a header too long.
        Err(Malformed::Tlvs | Malformed::Checksum) => true,
        Err(Malformed::TooLong) => !is_text,
        // It takes a port with a plus sign, and a blank for a carriage return.
        Err(Malformed::Addresses) => is_text && (bytes.contains(&b'+') || holds(bytes, b" \n")),
        Ok(None) if is_text && holds(bytes, b" \n") => true,
        Err(_) => false,
        // A proxy's own connection needs no addresses, whatever family it says.
        Ok(_) if !is_text => bytes.get(12) == Some(&0x20),
        // Whatever follows UNKNOWN is ignored; it wants four words there, and no carriage return.
        Ok(hello) => {
            bytes.starts_with(b"PROXY UNKNOWN") && hello.is_none_or(|it| it.ends.is_none())
        }
    }
}

#[test]
fn another_reader_finds_the_same_addresses_in_every_header() {
    let mut random = Random::new(20_260_101);
    for round in 0..ROUNDS {
        let mut bytes = header(&mut random);
        let length = bytes.len();
        bytes.extend(random.pick(&[&b""[..], b"GET / HTTP/1.1\r\n", b"\0\0\0\0"]));
        let ours = greeting::read(&bytes);
        assert_eq!(theirs(&bytes), ours.ok(), "round {round}: {bytes:x?}");
        assert_eq!(ours.unwrap().unwrap().bytes, length);
    }
}

#[test]
fn another_reader_accepts_the_same_of_what_is_spoilt() {
    let mut random = Random::new(20_260_102);
    let mut verdicts = [0; 3];
    for round in 0..ROUNDS {
        let mut bytes = header(&mut random);
        spoil(&mut random, &mut bytes);
        let (ours, theirs) = (greeting::read(&bytes), theirs(&bytes));
        verdicts[match ours {
            Ok(Some(_)) => 0,
            Ok(None) => 1,
            Err(_) => 2,
        }] += 1;
        // Whether it is wrong already or might become right is seen sooner by one or the other.
        let waits = |said: &Option<Option<Hello>>| said.is_none_or(|hello| hello.is_none());
        let same = theirs == ours.ok() || waits(&theirs) && waits(&ours.ok());
        assert!(
            same || is_known_difference(&bytes, &ours),
            "round {round}: {ours:?}, they {theirs:?}: {:?} {bytes:x?}",
            String::from_utf8_lossy(&bytes),
        );
    }
    assert!(verdicts.iter().all(|count| *count > ROUNDS / 20), "{verdicts:?}");
}

#[test]
fn another_reader_finds_what_we_write() {
    let mut random = Random::new(20_260_103);
    for _ in 0..ROUNDS / 10 {
        let mut address = |six: bool| {
            let port = random.below(65_536) as u16;
            let bits = u128::from(random.next()) << 64 | u128::from(random.next()) | 1 << 127;
            match six {
                true => SocketAddr::new(std::net::Ipv6Addr::from_bits(bits).into(), port),
                false => SocketAddr::new(std::net::Ipv4Addr::from_bits(bits as u32).into(), port),
            }
        };
        for six in [false, true] {
            let ends = Ends { source: address(six), destination: address(six) };
            let mut room = [0; WRITTEN_MAX];
            let written = greeting::write(Some(ends), &mut room);
            let hello = Hello { bytes: written.len(), ends: Some(ends) };
            assert_eq!(theirs(written), Some(Some(hello)));
        }
    }
}

/// Reads headers as lines of hex digits, and says of each what the package makes of it: source and
/// destination and the header that it would write itself, `none` for other connections, `wrong` for others.
const SCRIPT: &str = r#"
import sys
from socket import SOCK_STREAM
from proxyprotocol.detect import ProxyProtocolDetect
from proxyprotocol.result import is_ipv4, is_ipv6
from proxyprotocol.v2 import ProxyProtocolV2
reader, writer = ProxyProtocolDetect(), ProxyProtocolV2()
def shown(it):
    return ('[%s]:%d' if it[0].version == 6 else '%s:%d') % (it[0], it[1])
for line in sys.stdin:
    data = bytes.fromhex(line.strip())
    try:
        it = reader.unpack(data)
        is_text = data.startswith(b'PROXY ')
        if (is_ipv4(it) or is_ipv6(it)) and (is_text or it.protocol == SOCK_STREAM):
            again = data if is_text else writer.pack(it)
            print(shown(it.source), shown(it.dest), again.hex())
        else:
            print('none')
    except Exception:
        print('wrong')
"#;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digits).collect()
}

/// What the package says of these headers.
fn in_python(headers: &[Vec<u8>]) -> Vec<String> {
    let packages = concat!(env!("CARGO_MANIFEST_DIR"), "/target/python");
    let mut python = Command::new("python3")
        .args(["-c", SCRIPT])
        .env("PYTHONPATH", packages)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let text: String = headers.iter().map(|header| hex(header) + "\n").collect();
    let mut stdin = python.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()).unwrap());
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "is proxy-protocol in {packages}?");
    writer.join().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
#[ignore = "needs python3 and its package proxy-protocol in target/python"]
fn a_reader_in_python_finds_the_same_addresses() {
    let mut random = Random::new(20_260_104);
    let mut headers: Vec<_> = (0..4_000).map(|_| header(&mut random)).collect();
    let whole = headers.len();
    for _ in 0..8_000 {
        let mut bytes = header(&mut random);
        spoil(&mut random, &mut bytes);
        headers.push(bytes);
    }
    let mut agreed = [0; 2];
    for (number, (header, said)) in headers.iter().zip(in_python(&headers)).enumerate() {
        let ours = greeting::read(header);
        // It takes no bytes beyond the header, nothing but ASCII in a Unix socket's name, and what stands
        // in a proxy's own header for TLVs.
        let complete = ours.ok().flatten().filter(|hello| hello.bytes == header.len());
        let is_binary = header.starts_with(b"\r\n");
        let may_differ =
            is_binary && (header.get(12) == Some(&0x20) || header.get(13) >= Some(&0x30));
        let (Some(hello), false) = (complete, said == "wrong") else {
            assert!(number >= whole || may_differ, "{ours:?}, it {said}: {header:x?}");
            continue;
        };
        match hello.ends {
            None => assert_eq!(said, "none", "{header:x?}"),
            Some(ends) => {
                let wanted = format!("{} {} ", ends.source, ends.destination);
                let written = said.strip_prefix(&wanted);
                let written =
                    written.unwrap_or_else(|| panic!("{said}, not {wanted}: {header:x?}"));
                let again = greeting::read(&from_hex(written)).unwrap().unwrap();
                assert_eq!(again.ends, Some(ends), "what it writes reads as what it read");
            }
        }
        agreed[usize::from(number >= whole)] += 1;
    }
    assert!(agreed[0] > 3_000 && agreed[1] > 1_000, "{agreed:?}");
}
