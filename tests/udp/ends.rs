//! When sessions end: idle, answered, or while the balancer drains.

use std::net::UdpSocket;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use lb::worker::link::Order;

use crate::harness::{Backend, Balancer, ask, receive, try_ask, user};
use crate::wait::wait_for;

#[test]
fn idle_sessions_end_and_answered_ones_when_that_is_wanted() {
    let backend = Backend::start("127.0.0.1:0", |_| vec![b"a".to_vec(), b"b".to_vec()]);
    for responses in [None, NonZeroU32::new(2)] {
        let mut balancer = Balancer::start(|config| {
            config.udp.responses = responses;
            let idle = if responses.is_some() { 3_600_000 } else { 300 };
            config.timeouts.udp_idle = Duration::from_millis(idle);
        });
        balancer.register_udp(&[backend.at]);
        let user = user();
        assert_eq!(ask(&user, balancer.at(), b"?"), b"a");
        assert_eq!(receive(&user).unwrap().0, b"b");
        wait_for("the session to end and its pair to be quarantined", || {
            let over = balancer.sum(|counters| counters.sessions_ended.get()) == 1;
            let quarantined = balancer.sum(|counters| counters.udp_pairs_resting.get()) == 1;
            (over && quarantined).then_some(())
        });
        assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 0);
        balancer.stop();
    }
}

#[test]
fn a_balancer_that_drains_serves_those_who_are_there() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[backend.at]);
    let (before, after) = (user(), user());
    ask(&before, balancer.at(), b"?");
    balancer.order(Order::Drain);
    assert_eq!(try_ask(&after, balancer.at(), b"may I?"), None);
    assert_eq!(ask(&before, balancer.at(), b"still"), b"still");
    assert_eq!(balancer.sum(|counters| counters.udp_dropped_draining.get()), 1);
    balancer.stop();
}

#[test]
fn a_balancer_that_drains_waits_for_those_who_speak_and_not_for_those_who_are_silent() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[backend.at]);
    let (speaking, silent): (UdpSocket, Vec<UdpSocket>) =
        (user(), (0..50).map(|_| user()).collect());
    for user in silent.iter().chain([&speaking]) {
        ask(user, balancer.at(), b"?");
    }
    let drained = Instant::now();
    balancer.order(Order::Drain);
    let active = || balancer.sum(|counters| counters.sessions_active.get());
    wait_for("one session to be left", || {
        assert_eq!(ask(&speaking, balancer.at(), b"still"), b"still");
        (active() == 1).then_some(())
    });
    assert!(drained.elapsed() < Duration::from_secs(10), "much less than udp_idle_ms");
    wait_for("no session to run", || (active() == 0).then_some(()));
    balancer.stop();
}
