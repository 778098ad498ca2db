//! Groups with shares: how the users of one service are shared out by three workers.

use std::thread;

use lb::cluster::Protocol::{Api, Tcp};
use lb::cluster::groups::regrouped;
use lb::cluster::{Policy, Protocol, Service, Snapshot};
use lb::config::services::{GroupShare, ServiceConfig};

use crate::api;
use crate::harness::{Balancer, ask, connect, lettered};

/// The service `shop`, with 95 to 5 for blue and green.
fn shop(protocol: Protocol, policy: Policy) -> Balancer {
    Balancer::start_with(|config| {
        let share = |(name, share): (&str, u8)| GroupShare { name: name.into(), share };
        let groups = [("blue", 95), ("green", 5)].map(share).into();
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let policy = Some(policy);
        let shop = ServiceConfig { listen, groups, policy, ..ServiceConfig::new("shop", protocol) };
        config.set_services(vec![shop]);
    })
}

#[test]
fn rule_6_of_10_000_requests_to_three_workers_exactly_500_are_the_canarys() {
    const USERS: usize = 20;
    let mut balancer = shop(Api, Policy::RoundRobin);
    for (group, letter) in [("blue", 'b'), ("blue", 'B'), ("green", 'g'), ("green", 'G')] {
        balancer.register_in("shop", Some(group), api::lettered(letter));
    }
    let door = balancer.at("shop");
    let one_user = move || -> Vec<String> {
        let user = connect(door);
        (0..10_000 / USERS).map(|_| api::get(&user).1.expect("a backend")).collect()
    };
    let users: Vec<_> = (0..USERS).map(|_| thread::spawn(one_user)).collect();
    let letters: Vec<String> = users.into_iter().flat_map(|user| user.join().unwrap()).collect();
    let busy = balancer.plane.ends.iter();
    let busy = busy.filter(|end| end.metrics.counters.sessions_started.get() > 0).count();
    assert!(busy > 1, "several workers took part");
    let of = |letter: &str| letters.iter().filter(|it| *it == letter).count();
    assert_eq!(["b", "B", "g", "G"].map(of), [4750, 4750, 250, 250]);
    balancer.stop();
}

/// Publishes other shares, as the control core does.
fn shift(balancer: &Balancer, shares: &[(&str, u8)]) {
    let before = balancer.plane.snapshots.current();
    let backends: Vec<_> = before.backends().cloned().collect();
    let shifted = |service: &Service| match &*service.name {
        "shop" => Service { groups: regrouped(&service.groups, shares), ..service.clone() },
        _ => service.clone(),
    };
    let services = before.services.iter().map(shifted).collect();
    let next = Snapshot { services, ..Snapshot::clone(&before) };
    balancer.plane.snapshots.publish(next.with(&backends));
    balancer.let_workers_turn();
}

#[test]
fn rule_6_running_sessions_stay_where_they_are_through_a_shift() {
    let mut balancer = shop(Tcp, Policy::RoundRobin);
    balancer.register_in("shop", Some("blue"), lettered(b'b'));
    balancer.register_in("shop", Some("green"), lettered(b'g'));
    let door = balancer.at("shop");
    let mut users: Vec<_> = (0..40).map(|_| connect(door)).collect();
    let before: Vec<u8> = users.iter_mut().map(ask).collect();
    assert_eq!(before.iter().filter(|it| **it == b'g').count(), 2);
    shift(&balancer, &[("blue", 0), ("green", 100)]);
    assert!((0..20).all(|_| ask(&mut connect(door)) == b'g'), "new users follow the shares");
    let after: Vec<u8> = users.iter_mut().map(ask).collect();
    assert_eq!(before, after);
    balancer.stop();
}

#[test]
fn rule_6_users_of_a_canary_that_refuses_are_served_by_the_same_group_and_then_by_others() {
    let mut balancer = shop(Tcp, Policy::RoundRobin);
    // Nobody listens at an address of its own.
    let dead = "127.7.9.5:9".parse().unwrap();
    balancer.register_in("shop", Some("blue"), lettered(b'b'));
    balancer.register_in("shop", Some("green"), dead);
    let door = balancer.at("shop");
    assert!((0..60).all(|_| ask(&mut connect(door)) == b'b'), "nobody is refused");
    balancer.register_in("shop", Some("green"), lettered(b'g'));
    let letters: Vec<u8> = (0..200).map(|_| ask(&mut connect(door))).collect();
    assert_eq!(letters.iter().filter(|it| **it == b'g').count(), 10, "the other of the group");
    balancer.stop();
}
