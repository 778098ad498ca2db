//! Whom a service lets in, and how many: the users of one service at its limit are turned away, and those of
//! another notice nothing.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::num::NonZeroU32;
use std::thread;
use std::time::Duration;

use lb::cluster::{Barrier, Protocol, Service};
use lb::config::services::ServiceConfig;

use crate::harness::{Balancer, ask, connect, lettered, lettered_datagrams, serve};
use crate::wait::{PATIENCE, wait_for};

/// As many as leave none of three workers without a user.
const USERS: usize = 24;

/// Services red and green of one kind; `change` is for red.
fn start(protocol: Protocol, change: impl Fn(&mut ServiceConfig)) -> Balancer {
    Balancer::start_with(|config| {
        let service = |name| {
            let listen = vec!["127.0.0.1:0".parse().unwrap()];
            ServiceConfig { listen, ..ServiceConfig::new(name, protocol) }
        };
        config.set_services(["red", "green"].map(service).into());
        change(&mut config.services[0]);
    })
}

fn red(balancer: &Balancer) -> Service {
    let snapshot = balancer.plane.snapshots.current();
    snapshot.services.iter().find(|service| &*service.name == "red").unwrap().clone()
}

/// How many were turned away from red at a barrier.
fn turned_away(balancer: &Balancer, barrier: Barrier) -> u64 {
    red(balancer).gate.turned_away(barrier)
}

#[track_caller]
fn wait_until_inside(balancer: &Balancer, count: usize) {
    wait_for(&format!("{count} sessions of red"), || {
        (red(balancer).gate.sessions() == count).then_some(())
    });
}

/// Connects from this loopback address.
fn connect_from(last: u8, to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(IpAddr::from([127, 0, 0, last]), 0).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    let user: TcpStream = socket.into();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

/// Whether a TCP user is served by the backend with this letter.
fn is_served(mut user: TcpStream, letter: u8) -> Option<TcpStream> {
    let mut answer = [0];
    let served = user.write_all(b"?").is_ok() && matches!(user.read(&mut answer), Ok(1));
    served.then(|| assert_eq!(answer[0], letter));
    served.then_some(user)
}

/// A UDP user at this loopback address, and whether a datagram of it is answered by this letter.
fn datagram_user(last: u8) -> UdpSocket {
    let user = UdpSocket::bind((IpAddr::from([127, 0, 0, last]), 0)).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

fn is_answered(user: &UdpSocket, at: SocketAddr, letter: u8) {
    user.send_to(b"?", at).unwrap();
    let mut answer = [0; 9];
    user.recv_from(&mut answer).unwrap();
    assert_eq!(answer[0], letter);
}

/// An API backend that answers every request, `/hold` only when its user has gone.
fn web(letter: char) -> SocketAddr {
    serve(move |connection| {
        let mut reader = BufReader::new(&connection);
        while let Some((line, _)) = head(&mut reader) {
            if line.contains("/hold") {
                let _ = reader.read(&mut [0]);
                return;
            }
            let answer =
                format!("HTTP/1.1 200 OK\r\nLetter: {letter}\r\nContent-Length: 0\r\n\r\n");
            if (&connection).write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// The first line of a head, and the rest.
fn head(reader: &mut impl BufRead) -> Option<(String, String)> {
    let mut first = None;
    let mut rest = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match (line.trim_end(), &first) {
            ("", _) => return Some((first.unwrap_or_default(), rest)),
            (text, None) => first = Some(text.to_owned()),
            _ => rest += &line,
        }
    }
}

/// The whole answer to a request: status, fields and body.
fn get(user: &TcpStream) -> (String, String) {
    (&mut &*user).write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
    let mut reader = BufReader::new(user);
    let (line, fields) = head(&mut reader).unwrap();
    let length = fields.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().unwrap())
    });
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    (line[9..12].to_owned(), fields + &String::from_utf8(body).unwrap())
}

/// A user with a request that is not answered, and that ends with the user.
fn hold(at: SocketAddr) -> TcpStream {
    let mut user = connect(at);
    user.write_all(b"GET /hold HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
    socket2::SockRef::from(&user).set_linger(Some(Duration::ZERO)).unwrap();
    user
}

#[test]
fn rule_13_a_tcp_service_at_its_limit_turns_users_away_and_another_serves() {
    let mut balancer = start(Protocol::Tcp, |red| red.sessions = NonZeroU32::new(5));
    balancer.register("red", lettered(b'r'));
    balancer.register("green", lettered(b'g'));
    let (red, green) = (balancer.at("red"), balancer.at("green"));
    let mut inside: Vec<TcpStream> =
        (0..USERS).filter_map(|_| is_served(connect(red), b'r')).collect();
    assert_eq!(inside.len(), 5);
    let mut others: Vec<_> = (0..USERS).map(|_| connect(green)).collect();
    assert!(others.iter_mut().all(|user| ask(user) == b'g'), "green has no limit");
    assert_eq!(turned_away(&balancer, Barrier::Sessions), USERS as u64 - 5);
    assert!(inside.iter_mut().all(|user| ask(user) == b'r'), "those inside go on");
    drop(inside.pop());
    wait_until_inside(&balancer, 4);
    assert!(is_served(connect(red), b'r').is_some());
    balancer.stop();
}

#[test]
fn rule_13_a_udp_service_at_its_limit_drops_datagrams_and_another_serves() {
    let mut balancer = start(Protocol::Udp, |red| red.sessions = NonZeroU32::new(5));
    balancer.register("red", lettered_datagrams(b'r'));
    balancer.register("green", lettered_datagrams(b'g'));
    let (red, green) = (balancer.at("red"), balancer.at("green"));
    let users: Vec<_> = (0..USERS).map(|_| datagram_user(1)).collect();
    for (number, user) in users.iter().enumerate() {
        is_answered(user, green, b'g');
        if number < 5 {
            is_answered(user, red, b'r');
        } else {
            user.send_to(b"?", red).unwrap();
        }
    }
    wait_for("the others to be dropped", || {
        (turned_away(&balancer, Barrier::Sessions) == USERS as u64 - 5).then_some(())
    });
    for user in &users {
        is_answered(user, green, b'g');
    }
    users[..5].iter().for_each(|user| is_answered(user, red, b'r'));
    assert_eq!(balancer.live("red"), 5);
    balancer.stop();
}

#[test]
fn rule_13_an_api_service_at_its_limit_answers_503_and_another_serves() {
    let mut balancer = start(Protocol::Api, |red| red.sessions = NonZeroU32::new(2));
    balancer.register("red", web('r'));
    balancer.register("green", web('g'));
    let (red, green) = (balancer.at("red"), balancer.at("green"));
    let idle: Vec<_> = (0..USERS).map(|_| connect(red)).collect();
    for user in &idle {
        assert_eq!(get(user).0, "200", "a connection without a request is no session of red");
    }
    wait_until_inside(&balancer, 0);
    let mut held: Vec<_> = (0..2).map(|_| hold(red)).collect();
    wait_until_inside(&balancer, 2);
    for user in &idle {
        let (status, rest) = get(user);
        assert_eq!(status, "503");
        assert!(rest.to_lowercase().contains("retry-after: 5"), "{rest}");
        assert!(rest.contains("the service has as many sessions as it may"), "{rest}");
    }
    for _ in 0..USERS {
        assert_eq!(get(&connect(green)).0, "200");
    }
    assert_eq!(turned_away(&balancer, Barrier::Sessions), USERS as u64);
    held.clear();
    wait_until_inside(&balancer, 0);
    assert!(idle.iter().all(|user| get(user).0 == "200"), "the same connections are served again");
    balancer.stop();
}

#[test]
fn rule_13_a_backend_at_its_limit_is_passed_over_by_all_workers() {
    let mut balancer = start(Protocol::Tcp, |red| red.backend_sessions = NonZeroU32::new(3));
    balancer.register("red", lettered(b'r'));
    balancer.register("red", lettered(b'r'));
    let red = balancer.at("red");
    // All at once, so that workers race for the last places.
    let users: Vec<_> =
        (0..USERS).map(|_| thread::spawn(move || is_served(connect(red), b'r'))).collect();
    let mut inside: Vec<TcpStream> =
        users.into_iter().filter_map(|user| user.join().unwrap()).collect();
    assert!(inside.len() <= 6, "{} are on two backends of three", inside.len());
    while inside.len() < 6 {
        // Who raced may have been turned away with a place left.
        inside.push(wait_for("a place", || is_served(connect(red), b'r')));
    }
    assert!(is_served(connect(red), b'r').is_none());
    let on = |slot: usize| -> u64 {
        let ends = balancer.plane.ends.iter();
        ends.map(|end| end.metrics.backends[slot].active.get()).sum()
    };
    assert_eq!([on(0), on(1)], [3, 3]);
    assert!(turned_away(&balancer, Barrier::BackendSessions) > 0);
    drop(inside);
    wait_until_inside(&balancer, 0);
    balancer.stop();
}

#[test]
fn rule_13_the_backends_of_udp_and_api_services_have_limits_too() {
    let mut balancer = start(Protocol::Udp, |red| red.backend_sessions = NonZeroU32::new(2));
    balancer.register("red", lettered_datagrams(b'r'));
    let at = balancer.at("red");
    let users: Vec<_> = (0..USERS).map(|_| datagram_user(1)).collect();
    users[..2].iter().for_each(|user| is_answered(user, at, b'r'));
    for user in &users[2..] {
        user.send_to(b"?", at).unwrap();
    }
    wait_for("the others to be dropped", || {
        let dropped = turned_away(&balancer, Barrier::BackendSessions);
        (dropped == USERS as u64 - 2).then_some(())
    });
    balancer.stop();

    let mut balancer = start(Protocol::Api, |red| red.backend_sessions = NonZeroU32::new(1));
    balancer.register("red", web('r'));
    let at = balancer.at("red");
    let held = hold(at);
    wait_until_inside(&balancer, 1);
    let user = connect(at);
    let (status, rest) = get(&user);
    assert_eq!(status, "503");
    assert!(rest.contains("every backend has as many sessions as it may"), "{rest}");
    drop(held);
    wait_until_inside(&balancer, 0);
    assert_eq!(get(&user).0, "200");
    balancer.stop();
}

fn only_127_0_0_7(service: &mut ServiceConfig) {
    service.users = vec!["127.0.0.7".parse::<IpAddr>().unwrap().into()];
}

#[test]
fn rule_13_tcp_users_from_elsewhere_get_a_reset() {
    let mut balancer = start(Protocol::Tcp, only_127_0_0_7);
    balancer.register("red", lettered(b'r'));
    balancer.register("green", lettered(b'g'));
    let at = balancer.at("red");
    for _ in 0..USERS {
        let mut stranger = connect_from(8, at);
        let error = stranger.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(is_served(connect_from(7, at), b'r').is_some());
        assert!(is_served(connect_from(8, balancer.at("green")), b'g').is_some());
    }
    assert_eq!(turned_away(&balancer, Barrier::Users), USERS as u64);
    balancer.stop();
}

#[test]
fn rule_13_datagrams_from_elsewhere_are_dropped() {
    let mut balancer = start(Protocol::Udp, only_127_0_0_7);
    balancer.register("red", lettered_datagrams(b'r'));
    let at = balancer.at("red");
    let (stranger, friend) = (datagram_user(8), datagram_user(7));
    for count in 1..=3 {
        stranger.send_to(b"?", at).unwrap();
        is_answered(&friend, at, b'r');
        wait_for("it to be dropped", || {
            (turned_away(&balancer, Barrier::Users) == count).then_some(())
        });
    }
    stranger.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    assert!(stranger.recv(&mut [0; 9]).is_err());
    balancer.stop();
}

#[test]
fn rule_13_requests_from_elsewhere_are_answered_with_403() {
    let mut balancer = start(Protocol::Api, only_127_0_0_7);
    balancer.register("red", web('r'));
    let at = balancer.at("red");
    let stranger = connect_from(8, at);
    for _ in 0..2 {
        let (status, rest) = get(&stranger);
        assert_eq!(status, "403");
        assert!(rest.contains("403 Forbidden: the service is not open to this address"), "{rest}");
        assert!(!rest.to_lowercase().contains("retry-after"), "{rest}");
    }
    assert_eq!(get(&connect_from(7, at)).0, "200");
    assert_eq!(turned_away(&balancer, Barrier::Users), 2);
    balancer.stop();
}

#[test]
fn rule_13_a_limit_set_while_sessions_run_counts_them_and_ends_none() {
    let mut balancer = start(Protocol::Tcp, |_| {});
    balancer.register("red", lettered(b'r'));
    let at = balancer.at("red");
    let mut users: Vec<_> = (0..6).map(|_| connect(at)).collect();
    assert!(users.iter_mut().all(|user| ask(user) == b'r'));
    let mut snapshot = (*balancer.plane.snapshots.current()).clone();
    for service in snapshot.services.iter_mut().filter(|service| &*service.name == "red") {
        service.terms.limits.sessions = Some(4);
    }
    snapshot.version += 1;
    balancer.plane.snapshots.publish(snapshot);
    balancer.let_workers_turn();
    assert!(users.iter_mut().all(|user| ask(user) == b'r'));
    assert!(is_served(connect(at), b'r').is_none());
    users.truncate(4);
    wait_until_inside(&balancer, 4);
    assert!(is_served(connect(at), b'r').is_none());
    users.truncate(3);
    wait_until_inside(&balancer, 3);
    assert!(is_served(connect(at), b'r').is_some());
    balancer.stop();
}
