//! Floods, greedy sources and forged replies: they cost nobody else anything.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::NonZeroU32;
use std::thread;

use lb::cluster::Protocol;
use lb::metrics::WorkerCounters;

use crate::harness::{Backend, Balancer, ask, try_ask, user, user_at};
use crate::wait::{PATIENCE, wait_for};

#[test]
fn what_others_send_to_an_upstream_socket_reaches_nobody() {
    let backend = Backend::echo();
    let other = Backend::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[backend.at, other.at]);
    let user = user();
    ask(&user, balancer.at(), b"?");
    let spoken = if backend.seen() > 0 { &backend } else { &other };
    let upstream = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), spoken.last_sender().port());
    let foreign = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..10 {
        foreign.send_to(b"believe me", upstream).unwrap();
    }
    wait_for("the strangers to be counted", || {
        let dropped = balancer.sum(|counters| counters.udp_dropped_spoofed_reply.get());
        (dropped == 10).then_some(())
    });
    assert_eq!(ask(&user, balancer.at(), b"only this"), b"only this");
    balancer.stop();
}

#[test]
fn a_flood_of_new_users_takes_nothing_from_those_who_are_there_or_from_tcp() {
    let backend = Backend::echo();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_backend = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut byte = [0];
            while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
        }
    });
    let mut balancer = Balancer::start(|config| {
        config.limits.udp_sessions = 50;
        config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.udp = Some("0.0.0.0:0".parse().unwrap());
    });
    balancer.register(&[(Protocol::Udp, backend.at), (Protocol::Tcp, tcp_backend)]);
    let at = |ip: u32| SocketAddr::new(IpAddr::V4((0x7f00_0001 + ip).into()), balancer.at().port());
    // Each has a source address of its own: a single source gets at most three quarters of the
    // room.
    let settled: Vec<UdpSocket> = (1..=50)
        .map(|host| {
            let user = UdpSocket::bind((Ipv4Addr::new(127, 0, 1, host), 0)).unwrap();
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            user
        })
        .collect();
    for user in &settled {
        ask(user, at(0), b"?");
    }
    let flooding = user();
    for round in 0..40u8 {
        // Each local address makes another session.
        for ip in 1..50 {
            let _ = flooding.send_to(b"let me in", at(ip));
            let _ = flooding.send_to(&[round; 65_000], at(ip));
        }
        let mut stream = TcpStream::connect(balancer.plane.door(Protocol::Tcp).unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&[round]).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [round]);
    }
    for user in &settled {
        assert_eq!(ask(user, at(0), b"still"), b"still");
    }
    assert_eq!(backend.seen(), 100, "nobody else got through");
    let for_want_of_room = |counters: &WorkerCounters| {
        counters.udp_dropped_table_full.get()
            + counters.udp_dropped_upstream_exhausted.get()
            + counters.udp_dropped_source_share.get()
    };
    assert!(balancer.sum(for_want_of_room) > 100);
    balancer.stop();
}

#[test]
fn one_source_has_no_more_sessions_than_it_may() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|config| {
        config.workers = Some(1);
        config.udp.source_sessions = NonZeroU32::new(5);
    });
    balancer.register_udp(&[backend.at]);
    let users: Vec<UdpSocket> = (0..8).map(|_| user()).collect();
    let served = users.iter().filter_map(|user| try_ask(user, balancer.at(), b"?")).count();
    assert_eq!(served, 5);
    assert_eq!(ask(&user_at("127.0.0.2:0"), balancer.at(), b"other"), b"other");
    assert_eq!(balancer.sum(|counters| counters.udp_dropped_source_limit.get()), 3);
    balancer.stop();
}

#[test]
fn a_flood_of_empty_datagrams_is_not_taken_one_in_a_turn() {
    const EMPTY: u64 = 200;
    let backend = Backend::start("127.0.0.1:0", |_| vec![]);
    let mut balancer = Balancer::start(|config| config.workers = Some(1));
    balancer.register_udp(&[backend.at]);
    let counters = &balancer.plane.ends[0].metrics.counters;
    let user = user();
    // Only a burst that arrives faster than the worker turns shows anything, so try until one does.
    wait_for("a burst to be received in few turns", || {
        let before = (counters.udp_datagrams_up.get(), counters.turns.get());
        for _ in 0..EMPTY {
            user.send_to(&[], balancer.at()).unwrap();
        }
        wait_for("the burst to be received", || {
            (counters.udp_datagrams_up.get() == before.0 + EMPTY).then_some(())
        });
        let turns = counters.turns.get() - before.1;
        (turns < EMPTY / 2).then_some(())
    });
    balancer.stop();
}
