//! How users return to their backends under `source_hash`, as a table of behaviour.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use super::super::*;
use super::{backends, idle};
use crate::base::random::xorshift;
use crate::base::time::Now;
use crate::cluster::registry::{Change, Registration, Registry};
use crate::cluster::source::Source;
use crate::cluster::{HashBy, Protocol, ServiceId, Snapshot, Standing, Terms};

const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);

fn service(snapshot: &Snapshot, backends: &[Backend]) -> Service {
    let mut before = snapshot.clone();
    before.services.iter_mut().for_each(|service| service.terms.policy = Policy::SourceHash);
    before.with(backends).service(TCP).unwrap().clone()
}

fn user(number: u32) -> SocketAddr {
    (Ipv4Addr::from(0x0a00_0000 + number), 1000).into()
}

fn asked(user: SocketAddr) -> Question<'static> {
    Question { user, random: 0, load: &|_| 0, least: &idle, excluded: &|_| false, after: None }
}

/// The address of each user's backend.
fn homes(service: &Service, users: u32) -> Vec<SocketAddr> {
    (0..users).map(|number| pick(service, &asked(user(number))).unwrap().address).collect()
}

#[test]
fn users_spread_by_weight() {
    let three = service(&Snapshot::default(), &backends(&[1, 1, 2]));
    let mut counts = BTreeMap::<SocketAddr, u32>::new();
    homes(&three, 40_000).into_iter().for_each(|home| *counts.entry(home).or_default() += 1);
    for (count, share) in counts.values().zip([10_000u32, 10_000, 20_000]) {
        assert!(count.abs_diff(share) < 400, "{counts:?}");
    }
}

/// A balancer that learns of the backends in an order of its own: some come with another weight first, some drain
/// for a while, and strangers come and go in between.
fn learned(set: &[(SocketAddr, u16)], changes: usize, seed: u64) -> Snapshot {
    let mut random = xorshift(seed);
    let mut snapshot = Snapshot::default();
    snapshot.services.iter_mut().for_each(|it| it.terms.policy = Policy::SourceHash);
    let mut registry = Registry::new(1000, &snapshot.services);
    let (source, service) = (Source::Connection(1), TCP);
    let register = |address, weight| {
        Change::Register(Registration {
            source,
            service,
            address,
            weight,
            name: None,
            group: None,
            proxy: false,
            http2: false,
            tls: None,
            probe: true,
            check: None,
        })
    };
    for _ in set.len()..changes {
        let stranger = ([172, 16, 0, random(9) as u8], 1).into();
        let (address, weight) = set[random(set.len() as u64) as usize];
        let change = match random(6) {
            0 | 1 => register(stranger, 1 + random(9) as u16),
            2 => Change::Unregister { source, service, address: stranger },
            3 => register(address, weight + random(2) as u16),
            4 => Change::Unregister { source, service, address },
            _ => Change::Undrain { source, service, address },
        };
        drop(registry.apply(change, Now::default()));
        if random(100) == 0 {
            registry.freeze(false);
        }
    }
    for stranger in 0..9 {
        let address = ([172, 16, 0, stranger], 1).into();
        drop(registry.apply(Change::Unregister { source, service, address }, Now::default()));
    }
    let mut rest = set.to_vec();
    while !rest.is_empty() {
        let (address, weight) = rest.swap_remove(random(rest.len() as u64) as usize);
        registry.apply(register(address, weight), Now::default()).unwrap();
    }
    registry.freeze(false)
}

#[test]
fn three_balancers_give_each_user_to_the_same_backend_whatever_they_went_through() {
    let mut draw = xorshift(5);
    let set: Vec<(SocketAddr, u16)> =
        (0..20).map(|number| (([10, 9, 8, number], 80).into(), 1 + draw(5) as u16)).collect();
    let [first, second, third] = [1, 2, 3].map(|seed| {
        let service = learned(&set, 1000, seed).service(TCP).unwrap().clone();
        assert_eq!(service.pool.backends.len(), set.len());
        service
    });
    let slots = |service: &Service| service.pool.table.as_ref().unwrap().slots();
    assert!(slots(&first) == slots(&second) && slots(&first) == slots(&third));
    let places = |it: &Service| it.pool.backends.iter().map(|it| it.address).collect::<Vec<_>>();
    assert_ne!(places(&first), places(&second), "they came in another order");
    let homes = [&first, &second, &third].map(|service| homes(service, 100_000));
    assert!(homes[0] == homes[1] && homes[0] == homes[2]);
}

#[test]
fn who_does_not_serve_loses_its_own_users_only_and_they_are_dealt_out_by_weight() {
    let all = backends(&[1, 2, 1, 4, 3]);
    let full = service(&Snapshot::default(), &all);
    let before = homes(&full, 20_000);
    for standing in [Standing::Aside, Standing::Failing] {
        let mut fewer = all.clone();
        fewer[3].standing = standing;
        let gone = all[3].address;
        let after = homes(&service(&Snapshot::default(), &fewer), 20_000);
        let mut counts = BTreeMap::<SocketAddr, f64>::new();
        for (old, new) in before.iter().zip(&after) {
            assert_ne!(*new, gone);
            assert!(old == new || *old == gone, "{standing:?}");
            *counts.entry(*new).or_default() += f64::from(u8::from(*old == gone));
        }
        let lost: f64 = counts.values().sum();
        for (count, weight) in counts.values().zip([1.0, 2.0, 1.0, 3.0]) {
            let due = lost * weight / 7.0;
            assert!((count - due).abs() < 5.0 * due.sqrt(), "{counts:?}");
        }
    }
}

#[test]
fn where_almost_nobody_serves_everyone_still_finds_who_does_and_returns() {
    let mut all = backends(&[1; 100]);
    all[2..].iter_mut().for_each(|backend| backend.standing = Standing::Failing);
    let two = service(&Snapshot::default(), &all);
    let first = homes(&two, 2000);
    assert_eq!(homes(&two, 2000), first);
    let of_one = first.iter().filter(|home| **home == all[0].address).count();
    assert!((850..1150).contains(&of_one), "{of_one} of 2000");
    assert!(first.iter().all(|home| [all[0].address, all[1].address].contains(home)));
    all[0].standing = Standing::Failing;
    let one = homes(&service(&Snapshot::default(), &all), 500);
    assert!(one.iter().all(|home| *home == all[1].address));
}

#[test]
fn who_has_been_tried_is_not_given_again_until_nobody_is_left() {
    let four = service(&Snapshot::default(), &backends(&[1; 4]));
    for number in 0..50 {
        let mut tried = Vec::new();
        for _ in 0..4 {
            let excluded = |id: BackendId| tried.contains(&id);
            let question = Question { excluded: &excluded, ..asked(user(number)) };
            let next = pick(&four, &question).unwrap().id;
            tried.push(next);
        }
        tried.sort_unstable();
        assert_eq!(tried, [1, 2, 3, 4].map(BackendId));
        let everyone = Question { excluded: &|_| true, ..asked(user(number)) };
        assert!(pick(&four, &everyone).is_none());
    }
}

#[test]
fn connections_from_one_address_stay_together_unless_the_port_counts() {
    let by_address = service(&Snapshot::default(), &backends(&[1; 8]));
    let terms = Terms { hash: HashBy::AddressPort, ..by_address.terms.clone() };
    let by_port = Service { terms, ..by_address.clone() };
    let homes = |service: &Service| -> Vec<BackendId> {
        let users = (1..200).map(|port| SocketAddr::new(user(1).ip(), port));
        let mut homes: Vec<_> = users.map(|user| pick(service, &asked(user)).unwrap().id).collect();
        homes.sort_unstable();
        homes.dedup();
        homes
    };
    assert_eq!(homes(&by_address).len(), 1);
    assert_eq!(homes(&by_port).len(), 8);
    let mapped = SocketAddr::new(user(1).ip().to_canonical(), 1);
    let v6 = SocketAddr::new(Ipv4Addr::from(0x0a00_0001).to_ipv6_mapped().into(), 1);
    for service in [&by_address, &by_port] {
        let [one, other] = [mapped, v6].map(|user| pick(service, &asked(user)).unwrap().id);
        assert_eq!(one, other, "a mapped address is the plain one");
    }
}
