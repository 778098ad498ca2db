//! Sessions whose backend dies or leaves.

use std::net::{SocketAddr, UdpSocket};

use lb::config::OnUdpLoss;

use crate::harness::{Backend, Balancer, ask, try_ask, user};

#[test]
fn a_session_whose_backend_dies_moves_and_loses_at_most_one_datagram() {
    let mut backends = vec![Backend::named("one"), Backend::named("two"), Backend::named("three")];
    let mut balancer = Balancer::start(|_| {});
    let addresses: Vec<SocketAddr> = backends.iter().map(|backend| backend.at).collect();
    balancer.register_udp(&addresses);
    let users: Vec<UdpSocket> = (0..60).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    // Only ICMP says that the backend is gone; it is still registered.
    drop(backends.remove(1));
    let mut lost = 0;
    for user in &users {
        let answers: Vec<Option<Vec<u8>>> =
            (0..3).map(|_| try_ask(user, balancer.at(), b"still there?")).collect();
        let silent = answers.iter().filter(|answer| answer.is_none()).count();
        assert!(silent <= 1, "{answers:?}");
        assert!(!answers.contains(&Some(b"two".to_vec())));
        lost += silent;
    }
    assert!((1..=20).contains(&lost), "{lost} datagrams were lost of twenty sessions that moved");
    assert_eq!(balancer.sum(|counters| counters.udp_sessions_moved.get()), 20);
    assert!(balancer.sum(|counters| counters.udp_refused.get()) >= 1);
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 60);
    balancer.stop();
}

#[test]
fn a_session_whose_backend_leaves_moves_without_loss() {
    let backends = [Backend::named("one"), Backend::named("two")];
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&backends.each_ref().map(|backend| backend.at));
    let users: Vec<UdpSocket> = (0..20).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    balancer.register_udp(&[backends[0].at]);
    for user in &users {
        assert_eq!(ask(user, balancer.at(), b"?"), b"one");
    }
    balancer.stop();
}

#[test]
fn a_session_ends_or_stays_with_its_backend_when_that_is_wanted() {
    for (rule, moved, ended) in [(OnUdpLoss::Drop, 0, 1), (OnUdpLoss::Keep, 0, 0)] {
        let backends = [Backend::named("one"), Backend::named("two")];
        let mut balancer = Balancer::start(|config| config.udp.on_backend_loss = rule);
        balancer.register_udp(&[backends[0].at]);
        let user = user();
        assert_eq!(ask(&user, balancer.at(), b"?"), b"one");
        balancer.register_udp(&[backends[1].at]);
        let now_at = if rule == OnUdpLoss::Keep { b"one" } else { b"two" };
        assert_eq!(ask(&user, balancer.at(), b"?"), now_at, "{rule:?}");
        let counted = (
            balancer.sum(|counters| counters.udp_sessions_moved.get()),
            balancer.sum(|counters| counters.sessions_ended.get()),
        );
        assert_eq!(counted, (moved, ended), "{rule:?}");
        balancer.stop();
    }
}

#[test]
fn a_backend_that_dies_is_noticed_at_once_by_sockets_with_several_addresses() {
    let mut backends = vec![Backend::named("one"), Backend::named("two")];
    let mut balancer = Balancer::start(|config| {
        config.udp_local_addresses =
            ["127.0.0.17", "127.0.0.18"].map(|it| it.parse().unwrap()).into();
    });
    balancer.register_udp(&[backends[0].at, backends[1].at]);
    let users: Vec<UdpSocket> = (0..20).map(|_| user()).collect();
    users.iter().for_each(|user| drop(ask(user, balancer.at(), b"?")));
    drop(backends.remove(1));
    for user in &users {
        let answers: Vec<_> = (0..3).map(|_| try_ask(user, balancer.at(), b"there?")).collect();
        assert!(answers.iter().filter(|answer| answer.is_none()).count() <= 1, "{answers:?}");
        assert_eq!(answers[2], Some(b"one".to_vec()));
    }
    balancer.stop();
}
