//! Headers as proxies write them, and as they must not.

use super::*;

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn ends(source: &str, destination: &str) -> Option<Ends> {
    Some(Ends { source: at(source), destination: at(destination) })
}

/// A header of version 2.
fn binary(version: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [&SIGNATURE[..], &[version, family], &length, rest].concat()
}

/// From 192.0.2.1:123 to 192.0.2.2:5678.
const FOUR: [u8; 12] = [192, 0, 2, 1, 192, 0, 2, 2, 0, 123, 0x16, 0x2e];

fn six() -> Vec<u8> {
    let address = |last| [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    [&address(1)[..], &address(2), &[0, 123, 0x16, 0x2e]].concat()
}

fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len()).unwrap().to_be_bytes();
    [&[kind], &length[..], value].concat()
}

fn four_and(tlvs: &[u8]) -> Vec<u8> {
    binary(0x21, 0x11, &[&FOUR, tlvs].concat())
}

#[test]
fn a_line_of_version_1_tells_addresses_or_that_there_are_none() {
    let four = ends("192.0.2.1:123", "192.0.2.2:5678");
    let six = ends("[2001:db8::1]:123", "[2001:db8::2]:5678");
    let long = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    let longest = format!("UNKNOWN {long} {long} 65535 65535");
    assert_eq!("PROXY \r\n".len() + longest.len(), V1_BYTES_MAX);
    for (line, expected) in [
        ("TCP4 192.0.2.1 192.0.2.2 123 5678", four),
        ("TCP6 2001:Db8::1 2001:Db8::2 123 5678", six),
        ("TCP4 255.255.255.255 0.0.0.0 65535 0", ends("255.255.255.255:65535", "0.0.0.0:0")),
        ("TCP6 ::ffff:192.0.2.1 :: 1 2", ends("[::ffff:192.0.2.1]:1", "[::]:2")),
        ("UNKNOWN", None),
        ("UNKNOWN 1 2 3 4 5 6", None),
        ("UNKNOWN \x7f\x01", None),
        (&longest, None),
    ] {
        let header = format!("PROXY {line}\r\n");
        let hello = Hello { bytes: header.len(), ends: expected };
        assert_eq!(read(header.as_bytes()), Ok(Some(hello)), "{line}");
    }
}

#[test]
fn a_line_that_differs_from_the_grammar_is_malformed() {
    use Malformed::*;
    let too_long = format!("UNKNOWN {}", " ".repeat(V1_BYTES_MAX));
    for (line, expected) in [
        ("TCP4 192.0.2.1 192.0.2.2 123", Addresses),
        ("TCP4 192.0.2.1 192.0.2.2 123 ", Addresses),
        ("TCP4 192.0.2.1 192.0.2.2 123 5678 ", Addresses),
        ("TCP4 192.0.2.1  192.0.2.2 123 5678", Addresses),
        ("TCP4 192.0.2.1\t192.0.2.2 123 5678", Addresses),
        ("TCP4 192.0.2.1 192.0.2.2 0123 5678", Addresses),
        ("TCP4 192.0.2.1 192.0.2.2 +123 5678", Addresses),
        ("TCP4 192.0.2.1 192.0.2.2 -1 5678", Addresses),
        ("TCP4 192.0.2.1 192.0.2.2 65536 5678", Addresses),
        ("TCP4 192.0.2.1 192.0.2.2 123 5678\n", Addresses),
        ("TCP4 192.0.2.01 192.0.2.2 123 5678", Addresses),
        ("TCP4 192.0.2.256 192.0.2.2 123 5678", Addresses),
        ("TCP4 192.0.2 192.0.2.2 123 5678", Addresses),
        ("TCP4 ::1 ::2 123 5678", Addresses),
        ("TCP6 192.0.2.1 192.0.2.2 123 5678", Addresses),
        ("TCP6 fe80::1%lo ::2 123 5678", Addresses),
        ("TCP4 \u{661}92.0.2.1 192.0.2.2 123 5678", Addresses),
        ("TCP4", Addresses),
        ("TCP5 192.0.2.1 192.0.2.2 123 5678", Unassigned),
        ("tcp4 192.0.2.1 192.0.2.2 123 5678", Unassigned),
        ("UDP4 192.0.2.1 192.0.2.2 123 5678", Unassigned),
        ("UNKNOWNS", Unassigned),
        (" TCP4 192.0.2.1 192.0.2.2 123 5678", Unassigned),
        ("", Unassigned),
        (&too_long, TooLong),
    ] {
        let header = format!("PROXY {line}\r\nGET / HTTP/1.1\r\n");
        assert_eq!(read(header.as_bytes()), Err(expected), "{line:?}");
    }
    let not_text = b"PROXY TCP4 \xff\xfe 192.0.2.2 1 2\r\n";
    assert_eq!(read(not_text), Err(Addresses));
    assert_eq!(read(b"PROXY TCP4 192.0.2.1 192.0.2.2 123 5678\n\n"), Ok(None), "no line end yet");
}

#[test]
fn a_header_of_version_2_tells_addresses_or_that_there_are_none() {
    let four = ends("192.0.2.1:123", "192.0.2.2:5678");
    let unix = [b'/'; 216];
    for (header, expected) in [
        (four_and(&[]), four),
        (binary(0x21, 0x21, &six()), ends("[2001:db8::1]:123", "[2001:db8::2]:5678")),
        // Nine zeros are three TLVs of a type nobody has assigned, without a value.
        (four_and(&[0; 9]), four),
        (four_and(&tlv(0x02, b"example.com")), four),
        (four_and(&[tlv(0x01, b"h2"), tlv(0x20, &[1; 40]), tlv(0xae, b"")].concat()), four),
        // A proxy's own connection, whatever else it says.
        (binary(0x20, 0x00, &[]), None),
        (binary(0x20, 0x11, &FOUR), None),
        (binary(0x20, 0x11, b"short"), None),
        // UDP and Unix sockets, or nothing that is known.
        (binary(0x21, 0x00, &[]), None),
        (binary(0x21, 0x00, b"anything"), None),
        (binary(0x21, 0x12, &FOUR), None),
        (binary(0x21, 0x22, &six()), None),
        (binary(0x21, 0x31, &unix), None),
        (binary(0x21, 0x32, &unix), None),
        (binary(0x21, 0x10, &FOUR), None),
    ] {
        let hello = Hello { bytes: header.len(), ends: expected };
        assert_eq!(read(&header), Ok(Some(hello)), "{header:x?}");
    }
}

#[test]
fn a_binary_header_that_contradicts_itself_is_malformed() {
    use Malformed::*;
    for (header, expected) in [
        (binary(0x11, 0x11, &FOUR), Unassigned),
        (binary(0x31, 0x11, &FOUR), Unassigned),
        (binary(0x22, 0x11, &FOUR), Unassigned),
        (binary(0x2f, 0x11, &FOUR), Unassigned),
        (binary(0x21, 0x41, &[1, 2, 3, 4]), Unassigned),
        (binary(0x21, 0x13, &FOUR), Unassigned),
        (binary(0x21, 0x11, &FOUR[..11]), Addresses),
        (binary(0x21, 0x21, &FOUR), Addresses),
        (binary(0x21, 0x31, &[0; 215]), Addresses),
        (four_and(&[0]), Tlvs),
        (four_and(&[2, 0]), Tlvs),
        (four_and(b"\x02\0\x0a12345"), Tlvs),
        (four_and(&[tlv(0x02, b"12345"), vec![0, 0]].concat()), Tlvs),
        (four_and(&tlv(TLV_CRC32C, b"4321")), Checksum),
        (four_and(&tlv(TLV_CRC32C, b"432")), Tlvs),
        (four_and(&[0; BYTES_MAX]), TooLong),
    ] {
        assert_eq!(read(&header), Err(expected), "{header:x?}");
    }
    // Before the rest has come, so that nobody waits for what is never believed.
    let promised = [&SIGNATURE[..], &[0x21, 0x11, 0xff, 0xff]].concat();
    assert_eq!(read(&promised), Err(TooLong));
}

#[test]
fn the_longest_header_is_read() {
    let room = BYTES_MAX - HEAD_BYTES - FOUR.len() - TLV_HEAD_BYTES;
    let longest = four_and(&tlv(0xee, &vec![7; room]));
    assert_eq!(longest.len(), BYTES_MAX);
    assert_eq!(read(&longest).unwrap().unwrap().bytes, BYTES_MAX);
    assert_eq!(read(&four_and(&tlv(0xee, &vec![7; room + 1]))), Err(Malformed::TooLong));
}

#[test]
fn a_checksum_is_over_the_whole_header() {
    // The check value of CRC-32C.
    assert_eq!(checksum(b"123456789", 9), 0xe306_9283);
    let mut header = four_and(&[tlv(TLV_CRC32C, &[0; 4]), tlv(0xae, b"after it")].concat());
    let at = HEAD_BYTES + FOUR.len() + TLV_HEAD_BYTES;
    let right = checksum(&header, at).to_be_bytes();
    header[at..at + 4].copy_from_slice(&right);
    assert_eq!(read(&header).unwrap().unwrap().bytes, header.len());
    for place in HEAD_BYTES..HEAD_BYTES + FOUR.len() {
        let mut wrong = header.clone();
        wrong[place] ^= 1;
        assert_eq!(read(&wrong), Err(Malformed::Checksum), "byte {place}");
    }
}

#[test]
fn a_header_is_read_only_once_it_is_whole_and_nothing_after_it_is_touched() {
    let line = b"PROXY TCP4 192.0.2.1 192.0.2.2 123 5678\r\n".to_vec();
    let with_tlv = four_and(&tlv(0x02, b"example.com"));
    for header in [line, b"PROXY UNKNOWN\r\n".to_vec(), with_tlv, binary(0x20, 0, &[])] {
        for cut in 0..header.len() {
            assert_eq!(read(&header[..cut]), Ok(None), "{cut} of {header:x?}");
        }
        let hello = read(&header).unwrap().unwrap();
        for after in [&b"\0\0\0"[..], b"PROXY UNKNOWN\r\n", &SIGNATURE] {
            assert_eq!(read(&[&header, after].concat()), Ok(Some(hello)));
        }
    }
}

#[test]
fn other_bytes_are_told_from_a_header_at_the_first_that_differs() {
    for text in [&b"GET / HTTP/1.1"[..], b"PROXI", b"proxy TCP4", b"\0", b"\r\n\r\n\r"] {
        assert_eq!(read(text), Err(Malformed::NoHeader));
        assert_eq!(Screen::default().see(text), Screened::Clean);
    }
    let mut spoilt = SIGNATURE;
    spoilt[11] = b'\r';
    assert_eq!(read(&spoilt), Err(Malformed::NoHeader));
}

#[test]
fn a_screen_finds_a_header_in_any_pieces() {
    for header in [&b"PROXY TCP4 1.2.3.4"[..], &four_and(&[])] {
        let decided = if header[0] == b'P' { V1_PREFIX.len() } else { SIGNATURE.len() };
        for piece in 1..=header.len() {
            let mut screen = Screen::default();
            let mut seen = 0;
            for part in header.chunks(piece) {
                seen += part.len();
                let found = screen.see(part);
                if seen >= decided {
                    assert_eq!(found, Screened::Header, "pieces of {piece}");
                    break;
                }
                assert_eq!(found, Screened::Undecided, "{seen} in pieces of {piece}");
            }
        }
    }
    let mut screen = Screen::default();
    assert_eq!(screen.see(b"PRO"), Screened::Undecided);
    assert_eq!(screen.see(b""), Screened::Undecided);
    assert_eq!(screen.see(b"MPT"), Screened::Clean);
}

#[test]
fn what_is_written_is_read_again() {
    for (told, read_as, length) in [
        (None, None, 16),
        (ends("192.0.2.1:123", "192.0.2.2:5678"), ends("192.0.2.1:123", "192.0.2.2:5678"), 28),
        (ends("[2001:db8::1]:1", "[::1]:65535"), ends("[2001:db8::1]:1", "[::1]:65535"), 52),
        // A door for both families names IPv4 users by mapped addresses.
        (
            ends("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2"),
            ends("192.0.2.1:1", "192.0.2.2:2"),
            28,
        ),
        (ends("192.0.2.1:1", "[::1]:2"), ends("[::ffff:192.0.2.1]:1", "[::1]:2"), 52),
    ] {
        let mut room = [0xff; WRITTEN_MAX];
        let written = write(told, &mut room);
        assert_eq!(written.len(), length);
        assert_eq!(read(written), Ok(Some(Hello { bytes: length, ends: read_as })));
    }
    let mut room = [0; WRITTEN_MAX];
    let four = ends("192.0.2.1:123", "192.0.2.2:5678");
    assert_eq!(write(four, &mut room), four_and(&[]));
    assert_eq!(write(None, &mut room), binary(0x20, 0x00, &[]));
}
