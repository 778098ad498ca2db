//! Doors with `proxy_from`, against the real kernel: whom they believe, whom they refuse, and that the
//! user's bytes arrive whole.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lb::cluster::Policy;
use lb::cluster::Protocol::{self, Api, Tcp};
use lb::config::services::ServiceConfig;
use lb::proxy::greeting::{self, Ends, WRITTEN_MAX};
use lb::worker::link::{Order, Refusal, Report};

use crate::harness::{Balancer, ask, connect, lettered, serve};
use crate::wait::wait_for;

/// A balancer whose service "red" has the proxies in this network in front of it.
fn behind(protocol: Protocol, network: &str) -> Balancer {
    Balancer::start_with(|config| {
        config.api.head_timeout = Duration::from_millis(300);
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let proxy_from = vec![network.parse().unwrap()];
        let red = ServiceConfig { listen, proxy_from, ..ServiceConfig::new("red", protocol) };
        config.services = vec![red];
    })
}

const LISTED: &str = "127.0.0.0/8";
const OTHERS: &str = "10.0.0.0/8";

const LINE: &[u8] = b"PROXY TCP4 192.0.2.1 192.0.2.2 123 5678\r\n";

fn binary(source: &str, destination: &str) -> Vec<u8> {
    let ends = Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() };
    greeting::write(Some(ends), &mut [0; WRITTEN_MAX]).to_vec()
}

fn local() -> Vec<u8> {
    greeting::write(None, &mut [0; WRITTEN_MAX]).to_vec()
}

/// A header of version 2 with TLVs behind its addresses.
fn with_tlvs(count: usize) -> Vec<u8> {
    let mut header = binary("192.0.2.1:123", "192.0.2.2:5678");
    for _ in 0..count {
        header.extend(b"\xee\0\x05value");
    }
    let length = u16::try_from(header.len() - 16).unwrap();
    header[14..16].copy_from_slice(&length.to_be_bytes());
    header
}

/// A backend that sends back all it is sent.
fn echo() -> SocketAddr {
    serve(|mut connection| {
        let mut reader = connection.try_clone().unwrap();
        let _ = std::io::copy(&mut reader, &mut connection);
    })
}

fn echoes(user: &mut TcpStream, what: &[u8]) {
    user.write_all(what).unwrap();
    let mut answer = vec![0; what.len()];
    user.read_exact(&mut answer).unwrap();
    assert_eq!(answer, what);
}

/// The address under which the only session is known.
fn known_as(balancer: &Balancer) -> SocketAddr {
    wait_for("the session", || {
        balancer.plane.ends.iter().flat_map(|end| end.shard.iter()).next().map(|it| it.client)
    })
}

fn counted(balancer: &Balancer, name: &str) -> u64 {
    let rows = lb::metrics::WorkerCounters::ROWS;
    let place = rows.iter().position(|row| row.name == name).unwrap();
    balancer.plane.ends.iter().map(|end| end.metrics.counters.values()[place]).sum()
}

/// The connection has been closed without a word.
fn is_closed(user: &mut TcpStream) {
    assert!(matches!(user.read(&mut [0; 64]), Ok(0) | Err(_)), "it is closed");
}

fn refusal(balancer: &mut Balancer) -> (SocketAddr, Refusal) {
    wait_for("the refusal to be told", || {
        let mut ends = balancer.plane.ends.iter_mut();
        ends.find_map(|end| match end.reports.pop() {
            Ok(Report::Refused { client, why, .. }) => Some((client, why)),
            _ => None,
        })
    })
}

#[test]
fn a_listed_proxy_tells_whose_connection_it_is() {
    let four: Option<SocketAddr> = "192.0.2.1:123".parse().ok();
    for (header, told) in [
        (LINE.to_vec(), four),
        (b"PROXY TCP6 2001:db8::1 2001:db8::2 7 8\r\n".to_vec(), "[2001:db8::1]:7".parse().ok()),
        (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 123 8\r\n".to_vec(), four),
        (b"PROXY UNKNOWN\r\n".to_vec(), None),
        (b"PROXY UNKNOWN whatever it is\r\n".to_vec(), None),
        (binary("192.0.2.1:123", "192.0.2.2:5678"), four),
        (binary("[2001:db8::1]:7", "[2001:db8::2]:8"), "[2001:db8::1]:7".parse().ok()),
        (with_tlvs(100), four),
        (local(), None),
    ] {
        let mut balancer = behind(Tcp, LISTED);
        balancer.register("red", echo());
        let mut user = connect(balancer.at("red"));
        user.write_all(&header).unwrap();
        echoes(&mut user, b"hello");
        let own = user.local_addr().unwrap();
        assert_eq!(known_as(&balancer), told.unwrap_or(own), "{header:x?}");
        assert_eq!(counted(&balancer, "proxy_headers"), 1);
        drop(user);
        balancer.stop();
    }
}

#[test]
fn the_users_bytes_arrive_once_however_they_come_with_the_header() {
    let mut balancer = behind(Tcp, LISTED);
    balancer.register("red", echo());
    for header in [LINE.to_vec(), with_tlvs(3)] {
        // In one piece, and with the piece cut at each place.
        let payload = b"PROXY TCP4 is what the user says, too\r\n";
        let all = [&header[..], payload].concat();
        for cut in
            (0..all.len()).step_by(7).chain([header.len() - 1, header.len(), header.len() + 1])
        {
            let mut user = connect(balancer.at("red"));
            user.set_nodelay(true).unwrap();
            let before = counted(&balancer, "turns");
            user.write_all(&all[..cut]).unwrap();
            // So that the first piece is read alone.
            wait_for("a turn", || (cut == 0 || counted(&balancer, "turns") > before).then_some(()));
            user.write_all(&all[cut..]).unwrap();
            let mut answer = vec![0; payload.len()];
            user.read_exact(&mut answer).unwrap();
            assert_eq!(answer, payload, "cut at {cut}");
            echoes(&mut user, b"and more");
        }
    }
    let mut user = connect(balancer.at("red"));
    user.set_nodelay(true).unwrap();
    for byte in with_tlvs(1) {
        let before = counted(&balancer, "turns");
        user.write_all(&[byte]).unwrap();
        wait_for("a turn", || (counted(&balancer, "turns") > before).then_some(()));
    }
    echoes(&mut user, b"byte by byte");
    balancer.stop();
}

#[test]
fn a_listed_proxy_that_sends_no_header_is_refused() {
    let mut promised = with_tlvs(1);
    promised[14..16].copy_from_slice(&[0xff, 0xff]);
    let mut wrong = with_tlvs(0);
    wrong[12] = 0x31;
    for (number, bytes) in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"\0".to_vec(),
        b"PROXY TCP4\r\n".to_vec(),
        promised,
        wrong,
    ]
    .into_iter()
    .enumerate()
    {
        for protocol in [Tcp, Api] {
            let mut balancer = behind(protocol, LISTED);
            balancer.register("red", lettered(b'r'));
            let mut user = connect(balancer.at("red"));
            user.write_all(&bytes).unwrap();
            is_closed(&mut user);
            let own = user.local_addr().unwrap();
            assert_eq!(refusal(&mut balancer), (own, Refusal::NoProxyHeader), "case {number}");
            assert_eq!(counted(&balancer, "users_refused_no_proxy_header"), 1);
            assert_eq!(counted(&balancer, "sessions_ended"), 0);
            balancer.stop();
        }
    }
}

#[test]
fn a_header_must_be_whole_in_time() {
    for protocol in [Tcp, Api] {
        for sent in [&b""[..], b"P", &LINE[..LINE.len() - 1], &local()[..15]] {
            let mut balancer = behind(protocol, LISTED);
            balancer.register("red", lettered(b'r'));
            let mut user = connect(balancer.at("red"));
            user.write_all(sent).unwrap();
            is_closed(&mut user);
            assert_eq!(refusal(&mut balancer).1, Refusal::NoProxyHeader, "after {sent:x?}");
            balancer.stop();
        }
    }
}

#[test]
fn a_proxy_that_looks_whether_the_door_is_open_is_not_counted() {
    let mut balancer = behind(Tcp, LISTED);
    balancer.register("red", lettered(b'r'));
    drop(connect(balancer.at("red")));
    let mut user = connect(balancer.at("red"));
    user.write_all(LINE).unwrap();
    assert_eq!(ask(&mut user), b'r');
    assert_eq!(counted(&balancer, "users_refused_no_proxy_header"), 0);
    assert_eq!(counted(&balancer, "sessions_started"), 1);
    balancer.stop();
}

#[test]
fn a_stranger_without_a_header_is_served_and_never_waited_for() {
    let mut balancer = behind(Tcp, OTHERS);
    // A server that speaks first.
    balancer.register(
        "red",
        serve(|mut connection| {
            connection.write_all(b"220 hello\r\n").unwrap();
            let mut reader = connection.try_clone().unwrap();
            let _ = std::io::copy(&mut reader, &mut connection);
        }),
    );
    let mut user = connect(balancer.at("red"));
    let mut said = [0; 11];
    user.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"220 hello\r\n");
    for part in [&b"PRO"[..], b"XI", b"PROXY TCP4 is allowed now"] {
        echoes(&mut user, part);
    }
    assert_eq!(known_as(&balancer), user.local_addr().unwrap());
    balancer.stop();
}

#[test]
fn a_stranger_with_a_header_is_refused_and_the_backend_never_sees_a_whole_one() {
    for (pieces, reached) in [
        (vec![LINE], 0),
        (vec![&b"PRO"[..], b"XY TCP4 1.2.3.4 5.6.7.8 9 10\r\n"], 3),
        (vec![&b"\r\n\r\n\0\r\nQUIT"[..], b"\n\x20\0\0\0"], 11),
    ] {
        let mut balancer = behind(Tcp, OTHERS);
        balancer.register("red", echo());
        let mut user = connect(balancer.at("red"));
        user.set_nodelay(true).unwrap();
        let (last, first) = pieces.split_last().unwrap();
        for piece in first {
            echoes(&mut user, piece);
        }
        user.write_all(last).unwrap();
        is_closed(&mut user);
        let own = user.local_addr().unwrap();
        assert_eq!(refusal(&mut balancer), (own, Refusal::ProxyHeader));
        wait_for("the session to end", || (balancer.live("red") == 0).then_some(()));
        assert_eq!(counted(&balancer, "users_refused_proxy_header"), 1);
        assert_eq!(counted(&balancer, "bytes_up"), reached);
        balancer.stop();
    }
}

#[test]
fn users_told_by_proxies_are_balanced_by_their_own_addresses() {
    let mut balancer = Balancer::start_with(|config| {
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let proxy_from = vec![LISTED.parse().unwrap()];
        let policy = Some(Policy::SourceHash);
        let red = ServiceConfig { listen, proxy_from, policy, ..ServiceConfig::new("red", Tcp) };
        config.services = vec![red];
    });
    for letter in b'a'..b'f' {
        balancer.register("red", lettered(letter));
    }
    let served = |user: u8, port: u16| {
        let mut connection = connect(balancer.at("red"));
        connection.write_all(&binary(&format!("192.0.2.{user}:{port}"), "192.0.2.254:80")).unwrap();
        ask(&mut connection)
    };
    let mut letters: Vec<u8> = (0..40).map(|user| served(user, 1)).collect();
    for (user, letter) in (0..).zip(&letters) {
        assert_eq!(served(user, 2), *letter, "user {user} comes to the same backend again");
    }
    letters.sort_unstable();
    letters.dedup();
    assert!(letters.len() > 1, "and not all to one");
    balancer.stop();
}

/// A backend that answers each request with the head it was sent.
fn mirror() -> SocketAddr {
    serve(|connection| {
        let mut reader = BufReader::new(&connection);
        while let Some(head) = head(&mut reader) {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
            if (&connection).write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}

fn head(reader: &mut impl BufRead) -> Option<String> {
    let mut lines = String::new();
    loop {
        let before = lines.len();
        if reader.read_line(&mut lines).ok()? == 0 {
            return None;
        }
        if lines[before..].trim().is_empty() {
            return Some(lines);
        }
    }
}

const REQUEST: &[u8] = b"GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n";

/// The status, and what the backend was sent.
fn answered(reader: &mut BufReader<TcpStream>) -> (String, String) {
    let said = head(reader).expect("an answer");
    let length = said.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    (said[9..12].to_owned(), String::from_utf8(body).unwrap())
}

#[test]
fn an_api_user_told_by_a_proxy_is_the_one_in_the_fields() {
    for header in [LINE.to_vec(), binary("192.0.2.1:123", "192.0.2.2:5678")] {
        for cut in [0, 1, 10, header.len() - 1, header.len(), header.len() + 5] {
            let mut balancer = behind(Api, LISTED);
            balancer.register("red", mirror());
            let mut user = connect(balancer.at("red"));
            user.set_nodelay(true).unwrap();
            let all = [&header[..], REQUEST, REQUEST].concat();
            let before = counted(&balancer, "turns");
            user.write_all(&all[..cut]).unwrap();
            wait_for("a turn", || (cut == 0 || counted(&balancer, "turns") > before).then_some(()));
            user.write_all(&all[cut..]).unwrap();
            let mut reader = BufReader::new(user);
            for number in 0..2 {
                let (status, seen) = answered(&mut reader);
                assert_eq!(status, "200");
                let seen = seen.to_ascii_lowercase();
                assert!(seen.starts_with("get /a http/1.1\r\n"), "request {number}: {seen}");
                assert!(seen.contains("x-forwarded-for: 192.0.2.1\r\n"), "{seen}");
            }
            assert_eq!(known_as(&balancer), "192.0.2.1:123".parse().unwrap());
            drop(reader);
            balancer.stop();
        }
    }
}

#[test]
fn an_api_stranger_is_served_without_a_header_and_refused_with_one() {
    let mut balancer = behind(Api, OTHERS);
    balancer.register("red", mirror());
    let mut user = connect(balancer.at("red"));
    user.write_all(REQUEST).unwrap();
    assert_eq!(answered(&mut BufReader::new(user)).0, "200");
    for header in [LINE.to_vec(), local()] {
        let mut user = connect(balancer.at("red"));
        user.write_all(&[&header[..], REQUEST].concat()).unwrap();
        is_closed(&mut user);
        assert_eq!(refusal(&mut balancer), (user.local_addr().unwrap(), Refusal::ProxyHeader));
    }
    assert_eq!(counted(&balancer, "users_refused_proxy_header"), 2);
    wait_for("the first to leave", || (balancer.live("red") == 0).then_some(()));
    // One that cannot be told from a request yet is answered as the half of one.
    let mut user = connect(balancer.at("red"));
    user.set_nodelay(true).unwrap();
    user.write_all(b"PRO").unwrap();
    wait_for("it to be served", || (balancer.live("red") > 0).then_some(()));
    user.write_all(&LINE[3..]).unwrap();
    let mut said = String::new();
    BufReader::new(user).read_line(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 400 "), "{said}");
    balancer.stop();
}

/// One worker before a lettered backend, at whose door everybody must tell for whom it comes.
fn alone() -> Balancer {
    let mut balancer = Balancer::start_with(|config| {
        config.workers = Some(1);
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let proxy_from = vec![LISTED.parse().unwrap()];
        config.set_services(vec![ServiceConfig {
            listen,
            proxy_from,
            ..ServiceConfig::new("red", Tcp)
        }]);
    });
    balancer.register("red", lettered(b'r'));
    balancer
}

#[test]
fn connections_that_have_not_told_yet_take_seats_and_give_them_back() {
    let balancer = alone();
    let seats = balancer.plane.snapshots.current().services[3].seats.clone();
    let silent: Vec<_> = (0..3).map(|_| connect(balancer.at("red"))).collect();
    wait_for("all to have come", || (seats.taken() == 3).then_some(()));
    drop(silent);
    wait_for("their seats to come back", || (seats.taken() == 0).then_some(()));
    let mut user = connect(balancer.at("red"));
    user.write_all(LINE).unwrap();
    assert_eq!(ask(&mut user), b'r');
    assert_eq!(seats.taken(), 1);
    balancer.stop();
}

#[test]
fn a_balancer_that_drains_waits_for_headers_and_one_that_stops_does_not() {
    let mut balancer = alone();
    let at = balancer.at("red");
    let (mut told, mut silent) = (connect(at), connect(at));
    balancer.order(Order::Drain);
    wait_for("the door to close", || TcpStream::connect(at).is_err().then_some(()));
    told.write_all(LINE).unwrap();
    assert_eq!(ask(&mut told), b'r');
    balancer.stop();
    is_closed(&mut silent);
}

#[test]
fn an_api_user_told_while_the_balancer_drains_is_served_once() {
    let mut balancer = Balancer::start_with(|config| {
        config.workers = Some(1);
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let proxy_from = vec![LISTED.parse().unwrap()];
        config.services =
            vec![ServiceConfig { listen, proxy_from, ..ServiceConfig::new("red", Api) }];
    });
    balancer.register("red", mirror());
    let at = balancer.at("red");
    let mut user = connect(at);
    let seats = balancer.plane.snapshots.current().services[3].seats.clone();
    wait_for("it to be waited for", || (seats.taken() == 1).then_some(()));
    balancer.order(Order::Drain);
    wait_for("the door to close", || TcpStream::connect(at).is_err().then_some(()));
    user.write_all(&[LINE, REQUEST].concat()).unwrap();
    let mut all = String::new();
    user.read_to_string(&mut all).unwrap();
    assert!(all.starts_with("HTTP/1.1 200 ") && all.contains("Connection: close\r\n"), "{all}");
    balancer.stop();
}
