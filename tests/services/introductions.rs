//! Backends to which each connection begins with a PROXY header, against the real kernel. The backends
//! here read it with a reader of their own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use lb::cluster::Protocol::{Api, Tcp};
use lb::config::services::ServiceConfig;
use lb::proxy::greeting::{self, Ends, WRITTEN_MAX};

use crate::harness::{Balancer, connect, serve};
use crate::wait::wait_for;

/// What a header of version 2 says: its command, and source and destination as text.
fn introduction(connection: &mut impl Read) -> Option<String> {
    let mut head = [0; 16];
    connection.read_exact(&mut head).ok()?;
    assert_eq!(&head[..12], b"\r\n\r\n\0\r\nQUIT\n");
    let mut rest = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
    connection.read_exact(&mut rest).ok()?;
    let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
    let four = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&rest[at..at + 4]).unwrap());
    let six = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&rest[at..at + 16]).unwrap());
    let (source, destination) = match (head[12], head[13], rest.len()) {
        (0x20, _, _) => return Some("local".to_owned()),
        (0x21, 0x11, 12) => ((four(0), port(8)), (four(4), port(10))),
        (0x21, 0x21, 36) => ((six(0), port(32)), (six(16), port(34))),
        other => panic!("{other:x?}"),
    };
    Some(format!("{} > {}", SocketAddr::from(source), SocketAddr::from(destination)))
}

/// A TCP backend that says what it was told, and then sends back whatever it gets.
fn introduced() -> SocketAddr {
    serve(|mut connection| {
        let Some(said) = introduction(&mut connection) else { return };
        connection.write_all(format!("{said}\n").as_bytes()).unwrap();
        let mut reader = connection.try_clone().unwrap();
        let _ = std::io::copy(&mut reader, &mut connection);
    })
}

fn line(user: &TcpStream) -> String {
    let mut said = String::new();
    BufReader::new(user).read_line(&mut said).unwrap();
    said.trim_end().to_owned()
}

fn echoes(user: &mut TcpStream, what: &[u8]) {
    user.write_all(what).unwrap();
    let mut answer = vec![0; what.len()];
    user.read_exact(&mut answer).unwrap();
    assert_eq!(answer, what);
}

fn counted(balancer: &Balancer, name: &str) -> u64 {
    let rows = lb::metrics::WorkerCounters::ROWS;
    let place = rows.iter().position(|row| row.name == name).unwrap();
    balancer.plane.ends.iter().map(|end| end.metrics.counters.values()[place]).sum()
}

#[test]
fn a_tcp_backend_is_told_each_users_address_and_the_one_it_connected_to() {
    let mut balancer = Balancer::start(Tcp, &["red"]);
    balancer.register_introduced("red", introduced());
    for _ in 0..3 {
        let mut user = connect(balancer.at("red"));
        let own = user.local_addr().unwrap();
        assert_eq!(line(&user), format!("{own} > {}", balancer.at("red")));
        echoes(&mut user, b"and then come the user's own bytes");
    }
    assert_eq!(counted(&balancer, "proxy_headers_sent"), 3);
    // The header is not the user's.
    wait_for("the bytes", || (counted(&balancer, "bytes_up") == 3 * 34).then_some(()));
    balancer.stop();
}

#[test]
fn a_backend_is_told_ipv6_addresses_as_such_and_mapped_ones_as_ipv4() {
    let every: SocketAddr = (Ipv6Addr::UNSPECIFIED, 0).into();
    let mut balancer = Balancer::start_with(|config| {
        config.services =
            vec![ServiceConfig { listen: vec![every], ..ServiceConfig::new("red", Tcp) }];
    });
    balancer.register_introduced("red", introduced());
    let port = balancer.at("red").port();
    for host in ["127.0.0.1", "127.0.0.9", "::1"] {
        let at = SocketAddr::new(host.parse().unwrap(), port);
        let user = connect(at);
        assert_eq!(line(&user), format!("{} > {at}", user.local_addr().unwrap()));
    }
    balancer.stop();
}

#[test]
fn what_a_proxy_in_front_has_told_is_told_on() {
    let mut balancer = Balancer::start_with(|config| {
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let proxy_from = vec!["127.0.0.0/8".parse().unwrap()];
        config.services =
            vec![ServiceConfig { listen, proxy_from, ..ServiceConfig::new("red", Tcp) }];
    });
    balancer.register_introduced("red", introduced());
    let told = |ends: Option<Ends>| {
        let mut user = connect(balancer.at("red"));
        user.write_all(greeting::write(ends, &mut [0; WRITTEN_MAX])).unwrap();
        (user.local_addr().unwrap(), line(&user))
    };
    let ends = |source: &str, destination: &str| {
        Some(Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() })
    };
    let (_, said) = told(ends("192.0.2.1:123", "192.0.2.2:5678"));
    assert_eq!(said, "192.0.2.1:123 > 192.0.2.2:5678");
    let (_, said) = told(ends("[2001:db8::1]:1", "[2001:db8::2]:2"));
    assert_eq!(said, "[2001:db8::1]:1 > [2001:db8::2]:2");
    let (own, said) = told(None);
    assert_eq!(said, format!("{own} > {}", balancer.at("red")), "LOCAL means the connection's own");
    balancer.stop();
}

#[test]
fn the_next_backend_gets_its_own_header_when_one_refuses() {
    let mut balancer = Balancer::start(Tcp, &["red"]);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    balancer.register_introduced("red", nobody);
    balancer.register_introduced("red", introduced());
    for _ in 0..4 {
        let user = connect(balancer.at("red"));
        let own = user.local_addr().unwrap();
        assert_eq!(line(&user), format!("{own} > {}", balancer.at("red")));
    }
    balancer.stop();
}

/// An API backend that answers each request with what its connection was told, and the connection's
/// number.
fn introduced_api() -> SocketAddr {
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    serve(move |mut connection| {
        let Some(said) = introduction(&mut connection) else { return };
        let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut reader = BufReader::new(&connection);
        let mut request = String::new();
        while reader.read_line(&mut request).is_ok_and(|count| count > 0) {
            if request.ends_with("\r\n\r\n") {
                assert!(request.starts_with("GET ") || request.starts_with("POST "), "{request}");
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nTold: {said}\r\nNumber: {number}\r\nContent-Length: 0\r\n\r\n"
                );
                (&connection).write_all(answer.as_bytes()).unwrap();
                request.clear();
            }
        }
    })
}

/// The status, what the backend was told, and the number of its connection.
fn asked(user: &TcpStream, method: &str) -> (String, String, usize) {
    let request = format!("{method} / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0\r\n\r\n");
    (&mut &*user).write_all(request.as_bytes()).unwrap();
    let mut reader = BufReader::new(user);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut head).unwrap(), 0, "{head}");
    }
    let field = |name: &str| {
        let value = head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        });
        value.unwrap_or_else(|| panic!("{name} in {head}"))
    };
    (head[9..12].to_owned(), field("told"), field("number").parse().unwrap())
}

#[test]
fn an_api_users_requests_share_a_connection_that_no_other_users_request_gets() {
    let mut balancer = Balancer::start_with(|config| {
        config.workers = Some(1);
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        config.services = vec![ServiceConfig { listen, ..ServiceConfig::new("red", Api) }];
    });
    balancer.register_introduced("red", introduced_api());
    let door = balancer.at("red");
    let users: Vec<_> = (0..5).map(|_| connect(door)).collect();
    let mut numbers = vec![None; users.len()];
    for round in 0..4 {
        for (place, user) in users.iter().enumerate() {
            let (status, told, number) = asked(user, "GET");
            assert_eq!(status, "200");
            let own = user.local_addr().unwrap();
            assert_eq!(told, format!("{own} > {door}"), "user {place}, round {round}");
            assert_eq!(*numbers[place].get_or_insert(number), number, "round {round}");
        }
    }
    // Of those who have left, nobody inherits the connection.
    drop(users);
    wait_for("the users to leave", || (balancer.live("red") == 0).then_some(()));
    for method in ["GET", "POST"] {
        let user = connect(door);
        let (_, told, number) = asked(&user, method);
        assert_eq!(told, format!("{} > {door}", user.local_addr().unwrap()));
        assert!(!numbers.contains(&Some(number)), "a new one");
    }
    wait_for("connections to be closed", || {
        let idle =
            counted(&balancer, "api_upstream_private") + counted(&balancer, "api_upstream_idle");
        (idle == 0).then_some(())
    });
    balancer.stop();
}

#[test]
fn a_connection_without_a_header_is_not_used_once_the_backend_wants_one() {
    let mut balancer = Balancer::start_with(|config| {
        config.workers = Some(1);
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        config.services = vec![ServiceConfig { listen, ..ServiceConfig::new("red", Api) }];
    });
    // It reads a header where there is one.
    let address = serve(|connection| {
        let mut first = [0; 1];
        let began = connection.peek(&mut first).unwrap_or(0) > 0 && first[0] == b'\r';
        let said =
            if began { introduction(&mut &connection).unwrap() } else { "nothing".to_owned() };
        let mut reader = BufReader::new(&connection);
        let mut request = String::new();
        while reader.read_line(&mut request).is_ok_and(|count| count > 0) {
            if request.ends_with("\r\n\r\n") {
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nTold: {said}\r\nNumber: 0\r\nContent-Length: 0\r\n\r\n"
                );
                (&connection).write_all(answer.as_bytes()).unwrap();
                request.clear();
            }
        }
    });
    balancer.register("red", address);
    let user = connect(balancer.at("red"));
    assert_eq!(asked(&user, "GET").1, "nothing");
    wait_for("it to be kept", || (counted(&balancer, "api_upstream_idle") == 1).then_some(()));
    balancer.change_proxy(true);
    let own = user.local_addr().unwrap();
    assert_eq!(asked(&user, "GET").1, format!("{own} > {}", balancer.at("red")));
    balancer.stop();
}
