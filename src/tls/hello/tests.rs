//! Tests of `tls::hello`.

use super::*;
use crate::base::random::xorshift;

fn vector<const N: usize>(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u32).to_be_bytes();
    [&length[4 - N..], bytes].concat()
}

/// A ClientHello without its record.
fn message(host: Option<&str>, protocols: &[&str]) -> Vec<u8> {
    let mut extensions = Vec::new();
    let mut add = |kind: u16, value: Vec<u8>| {
        extensions.extend(kind.to_be_bytes());
        extensions.extend(vector::<2>(&value));
    };
    add(10, vec![0, 2, 0, 29]);
    add(13, vec![0, 4, 4, 3, 8, 4]);
    if let Some(host) = host {
        add(SERVER_NAME, vector::<2>(&[vec![HOST_NAME], vector::<2>(host.as_bytes())].concat()));
    }
    if !protocols.is_empty() {
        let names: Vec<u8> = protocols.iter().flat_map(|it| vector::<1>(it.as_bytes())).collect();
        // ALPN, RFC 7301.
        add(16, vector::<2>(&names));
    }
    let session = vector::<1>(&[7; 32]);
    let body = [vec![3, 3], vec![9; 32], session, vector::<2>(&[0x13, 1]), vector::<1>(&[0])];
    let body = [body.concat(), vector::<2>(&extensions)].concat();
    [vec![CLIENT_HELLO], vector::<3>(&body)].concat()
}

/// The message in records of at most `size` bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    let record = |part: &[u8]| [vec![HANDSHAKE, 3, 1], vector::<2>(part)].concat();
    message.chunks(size).flat_map(record).collect()
}

#[test]
fn a_hello_cut_at_any_byte_and_in_any_records_says_the_same() {
    let message = message(Some("Shop.Example."), &["h2", "http/1.1"]);
    for size in [message.len().div_ceil(RECORDS_MAX), 50, 101, 1000] {
        let bytes = records(&message, size);
        let whole = Hello { bytes: bytes.len(), host: Some("shop.example".to_owned()) };
        for cut in 0..bytes.len() {
            assert_eq!(read(&bytes[..cut]), Ok(None), "{cut} bytes of records of {size}");
        }
        assert_eq!(read(&bytes), Ok(Some(whole.clone())));
        let followed = [bytes.clone(), b"more".to_vec()].concat();
        assert_eq!(read(&followed), Ok(Some(whole)), "what follows is not its own");
    }
}

#[test]
fn a_hello_without_a_host_is_whole_whatever_else_it_offers() {
    for protocols in [&[][..], &["http/1.1"][..], &["h2"][..], &["h2", "http/1.1"][..]] {
        let bytes = records(&message(None, protocols), 1000);
        assert_eq!(
            read(&bytes),
            Ok(Some(Hello { bytes: bytes.len(), host: None })),
            "{protocols:?}"
        );
    }
}

#[test]
fn what_is_not_tls_is_told_by_its_first_bytes() {
    for (bytes, what) in [
        (&b"GET / HTTP/1.1\r\n"[..], Malformed::PlainHttp),
        (b"OPTIONS * HTTP/1.1\r\n", Malformed::PlainHttp),
        (b"SSH-2.0-x\r\n", Malformed::NotTls),
        (b"\x16\x02", Malformed::NotTls),
        (b"\x17\x03\x03\x00\x05hello", Malformed::NotTls),
        (b"\x80\x2e\x01\x00\x02", Malformed::NotTls),
        (b"\x16\x03\x01\x00\x01\x02", Malformed::NotTls),
        (b"\x16\x03\x01\x00\x00", Malformed::Broken),
        (b"\x16\x03\x01\xff\xff", Malformed::Broken),
        (b"\x16\x03\x01\x00\x04\x01\x00\x40\x01", Malformed::TooLong),
    ] {
        assert_eq!(read(bytes), Err(what), "{bytes:02x?}");
    }
    assert_eq!(read(b"GE"), Err(Malformed::NotTls));
}

#[test]
fn a_hello_in_too_many_records_or_bytes_is_not_waited_for() {
    let message = message(Some("shop.example"), &[]);
    let bytes = records(&message, message.len().div_ceil(RECORDS_MAX) - 1);
    assert_eq!(read(&bytes), Err(Malformed::TooLong));
    let long = [vec![CLIENT_HELLO, 0, 0x3f, 0xf0], vec![0; BYTES_MAX]].concat();
    let bytes = records(&long, 1024);
    assert_eq!(read(&bytes[..BYTES_MAX - 1]), Ok(None));
    assert_eq!(read(&bytes[..BYTES_MAX]), Err(Malformed::TooLong));
}

#[test]
fn lengths_that_lie_and_names_that_are_none_break_it() {
    let good = message(Some("shop.example"), &["http/1.1"]);
    // Each of its bytes set to something else: never a panic, never a byte past its end.
    for place in 0..good.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bad = good.clone();
            bad[place] = value;
            if let Ok(Some(hello)) = read(&records(&bad, 1000)) {
                assert!(hello.bytes <= good.len() + RECORD_HEAD_BYTES);
            }
        }
    }
    let long = "a".repeat(254);
    for host in ["", ".", "sh op.example", "shop/example", "sh\u{f6}p.example", &long] {
        let bytes = records(&message(Some(host), &[]), 1000);
        assert_eq!(read(&bytes), Err(Malformed::Broken), "{host:?}");
    }
}

/// What rustls makes of these bytes: nothing yet, its end, or the host of a hello.
fn by_rustls(mut bytes: &[u8]) -> Result<Option<Option<String>>, rustls::Error> {
    let mut acceptor = rustls::server::Acceptor::default();
    while !bytes.is_empty() {
        acceptor.read_tls(&mut bytes).unwrap();
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let host = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
                return Ok(Some(host));
            }
            Err((error, _)) => return Err(error),
        }
    }
    Ok(None)
}

/// Bytes changed, left out and doubled, and cut into other records; the same for the same seed.
fn damaged(mut message: Vec<u8>, dice: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
    for _ in 0..dice(3) {
        let at = dice(message.len());
        match dice(4) {
            0 => message[at] = dice(256) as u8,
            1 => message[at] ^= 1 << dice(8),
            2 => drop(message.remove(at)),
            _ => message.insert(at, message[at]),
        }
    }
    let size = message.len().div_ceil(1 + dice(RECORDS_MAX));
    let mut bytes = records(&message, size);
    if dice(4) == 0 {
        let at = dice(bytes.len());
        bytes[at] ^= 1 << dice(8);
    }
    bytes
}

#[test]
fn no_hello_that_rustls_takes_asks_for_another_host_here() {
    let mut roll = xorshift(0x9e37_79b9_7f4a_7c15);
    let mut dice = |below: usize| roll(below as u64) as usize;
    let hosts = [None, Some("a.example"), Some("Shop.Example."), Some("192.0.2.1"), Some("x")];
    let mut taken = 0;
    for round in 0..20_000 {
        let message = message(hosts[dice(hosts.len())], &["h2", "http/1.1"][..dice(3)]);
        let bytes = damaged(message, &mut dice);
        let (ours, theirs) = (read(&bytes), by_rustls(&bytes));
        let Ok(Some(theirs)) = theirs else { continue };
        // It is more patient with records, and strict where only it has to be.
        let Ok(Some(ours)) = ours else { continue };
        taken += 1;
        let named = ours.host.filter(|host| host.parse::<std::net::IpAddr>().is_err());
        let theirs = theirs.map(|host| host.trim_end_matches('.').to_owned());
        assert_eq!(named, theirs, "round {round}: {bytes:02x?}");
    }
    assert!(taken > 2_000, "{taken} hellos were taken by both");
}
