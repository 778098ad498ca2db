//! How many upstream sockets serve how many sessions.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::harness::{Backend, Balancer, ask, user};
use crate::wait::wait_for;

#[test]
fn many_sessions_share_the_sockets_of_the_largest_backend() {
    const ADDRESSES: u32 = 100;
    const USERS: u32 = 40;
    let backends: Vec<Backend> = (0..4).map(|_| Backend::echo()).collect();
    let mut balancer =
        Balancer::start(|config| config.listen.udp = Some("0.0.0.0:0".parse().unwrap()));
    balancer.register_udp(&backends.iter().map(|backend| backend.at).collect::<Vec<_>>());
    let port = balancer.at().port();
    let users: Vec<UdpSocket> = (0..USERS).map(|_| user()).collect();
    for _ in 0..3 {
        for (number, user) in users.iter().enumerate() {
            for ip in 0..ADDRESSES {
                let at = SocketAddr::new(IpAddr::V4((0x7f01_0000 + ip).into()), port);
                let identity = format!("user {number} at {ip}");
                assert_eq!(ask(user, at, identity.as_bytes()), identity.as_bytes());
            }
        }
    }
    let sessions = u64::from(USERS * ADDRESSES);
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), sessions);
    let sockets = balancer.sum(|counters| counters.udp_sockets.get());
    assert!(sockets <= sessions / 4 + 64, "{sockets} sockets for {sessions} sessions");
    assert!(backends.iter().all(|backend| backend.seen() == 3 * sessions / 4));
    balancer.stop();
}

#[test]
fn a_socket_serves_a_session_on_a_backend_for_each_address_that_it_sends_from() {
    const ADDRESSES: u32 = 3;
    const USERS: u16 = 300;
    let backend = Backend::start_seeing("127.0.0.1:0", |datagram, from| {
        vec![[datagram, from.to_string().as_bytes()].concat()]
    });
    let mut balancer = Balancer::start(|config| {
        let ip = |number: u32| IpAddr::V4((0x7f00_0011 + number).into());
        config.udp_local_addresses = (0..ADDRESSES).map(ip).collect();
    });
    balancer.register_udp(&[backend.at]);
    let users: Vec<UdpSocket> = (0..USERS).map(|_| user()).collect();
    let mut senders = HashMap::new();
    for round in 0..3 {
        for (number, user) in (0..USERS).zip(&users) {
            let answer = ask(user, balancer.at(), &number.to_le_bytes());
            assert_eq!(answer[..2], number.to_le_bytes());
            let sender: SocketAddr = String::from_utf8_lossy(&answer[2..]).parse().unwrap();
            match round {
                0 => assert_eq!(senders.insert(sender, number), None, "{sender} serves two"),
                _ => assert_eq!(senders[&sender], number),
            }
        }
    }
    let mut of_address = HashMap::new();
    senders.keys().for_each(|sender| *of_address.entry(sender.ip()).or_insert(0) += 1);
    assert_eq!(of_address.len(), ADDRESSES as usize, "{of_address:?}");
    let sockets = balancer.sum(|counters| counters.udp_sockets.get());
    assert!((100..=100 + 2 * 8).contains(&sockets), "{sockets} sockets for {USERS} sessions");
    // A datagram to the right port at another local address belongs to nobody.
    let port = senders.keys().next().unwrap().port();
    user().send_to(b"believe me", ("127.0.0.1", port)).unwrap();
    wait_for("the reply to be counted", || {
        let dropped = balancer.sum(|counters| counters.udp_dropped_unknown_reply.get());
        (dropped == 1).then_some(())
    });
    balancer.stop();
}

#[test]
fn surplus_sockets_are_closed_and_their_descriptors_with_the_last_address() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|config| {
        config.workers = Some(1);
        config.udp_local_addresses =
            ["127.0.0.17", "127.0.0.18", "127.0.0.19"].map(|it| it.parse().unwrap()).into();
        config.udp.quarantine = Some(Duration::from_millis(50));
        config.timeouts.udp_idle = Duration::from_millis(300);
    });
    balancer.register_udp(&[backend.at]);
    let users: Vec<UdpSocket> = (0..150).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    // The balancer keeps 32 pairs: ten descriptors with three addresses each, and one with two.
    wait_for("surplus sockets to be closed", || {
        (balancer.sum(|counters| counters.udp_sockets.get()) == 11).then_some(())
    });
    for user in &users[..32] {
        assert_eq!(ask(user, balancer.at(), b"again"), b"again");
    }
    balancer.stop();
}
