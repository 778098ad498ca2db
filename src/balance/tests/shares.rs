//! How users are shared out among the groups of a service, as a table of behaviour.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use super::super::*;
use super::{backends, idle, least_by};
use crate::cluster::groups::regrouped;
use crate::cluster::{Protocol, ServiceId, Snapshot, Standing, Terms, WhenAllFail};

/// A service with these shares, and with backends of these groups and weights.
fn service(policy: Policy, shares: &[(&str, u8)], members: &[(&str, u16)]) -> Service {
    let weights: Vec<u16> = members.iter().map(|member| member.1).collect();
    let mut backends = backends(&weights);
    for (backend, (group, _)) in backends.iter_mut().zip(members) {
        backend.group = (!group.is_empty()).then(|| (*group).into());
    }
    let first = Snapshot::default().service(ServiceId::built_in(Protocol::Tcp)).unwrap().clone();
    let terms = Terms { policy, ..Terms::default() };
    let before = Service { terms, ..first };
    shifted(&with(&before, backends), shares)
}

/// The same service with other backends.
fn with(service: &Service, backends: Vec<Backend>) -> Service {
    let pool = Arc::new(Pool::frozen(backends, service, service.pool.key));
    Service { pool, ..service.clone() }
}

/// The same service with other shares.
fn shifted(service: &Service, shares: &[(&str, u8)]) -> Service {
    let groups = regrouped(&service.groups, shares);
    with(&Service { groups, ..service.clone() }, service.pool.backends.to_vec())
}

/// The same service with these backends, by their number, in another standing.
fn standing(service: &Service, which: &[u32], standing: Standing) -> Service {
    let mut backends = service.pool.backends.to_vec();
    backends.iter_mut().filter(|it| which.contains(&it.id.0)).for_each(|it| it.standing = standing);
    with(service, backends)
}

fn user(number: u32) -> SocketAddr {
    (Ipv4Addr::from(0x0a00_0000 | number), 1000).into()
}

fn asked(number: u32) -> Question<'static> {
    Question {
        user: user(number),
        random: 0,
        load: &|_| 0,
        least: &idle,
        excluded: &|_| false,
        after: None,
    }
}

fn group_of(backend: &Backend) -> &str {
    backend.group.as_deref().unwrap_or_default()
}

/// How many of these users each group is given.
fn dealt(service: &Service, users: std::ops::Range<u32>) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for number in users {
        if let Some(backend) = pick(service, &asked(number)) {
            *counts.entry(group_of(backend).to_owned()).or_default() += 1;
        }
    }
    counts
}

fn counts(rows: &[(&str, u32)]) -> BTreeMap<String, u32> {
    rows.iter().map(|(group, count)| ((*group).to_owned(), *count)).collect()
}

const SHOP: [(&str, u16); 5] = [("blue", 3), ("blue", 1), ("green", 2), ("green", 1), ("blue", 2)];

#[test]
fn rule_6_of_10_000_users_a_canary_is_given_its_5_percent() {
    let shop = service(Policy::RoundRobin, &[("blue", 95), ("green", 5)], &SHOP);
    assert_eq!(dealt(&shop, 0..10_000), counts(&[("blue", 9_500), ("green", 500)]));
    let third = service(Policy::RoundRobin, &[("blue", 2), ("green", 1)], &SHOP);
    assert_eq!(dealt(&third, 0..300), counts(&[("blue", 200), ("green", 100)]), "relative shares");
}

/// Workers that take turns in an order drawn from a seed, while members come and go. The turns of the
/// service and those of a group have one order each, whoever takes them.
#[test]
fn rule_6_both_levels_are_exact_whichever_worker_takes_the_turns() {
    let mut random = crate::cluster::rotation::tests::Random(6);
    for _ in 0..50 {
        let groups = 2 + random.below(4) as usize;
        let names: Vec<String> = (0..groups).map(|number| format!("g{number}")).collect();
        let shares: Vec<(&str, u8)> =
            names.iter().map(|name| (name.as_str(), 1 + random.below(100) as u8)).collect();
        // Somebody in each, and a few more anywhere.
        let members: Vec<(&str, u16)> = (0..groups + random.below(12) as usize)
            .map(|place| (names[place % groups].as_str(), 1 + random.below(9) as u16))
            .collect();
        let first = service(Policy::RoundRobin, &shares, &members);
        let workers = [first.clone(), first.clone(), with(&first, first.pool.backends.to_vec())];
        let all: u64 = shares.iter().map(|row| u64::from(row.1)).sum();
        let mut of_backend = vec![0u64; members.len()];
        let users = all * (1 + random.below(20));
        for number in 0..users {
            let worker = &workers[random.below(3) as usize];
            of_backend[usize::from(pick(worker, &asked(number as u32)).unwrap().slot)] += 1;
        }
        for (name, share) in &shares {
            let is_own = |place: &usize| members[*place].0 == *name;
            let own: Vec<usize> = (0..members.len()).filter(is_own).collect();
            let given: u64 = own.iter().map(|place| of_backend[*place]).sum();
            assert_eq!(given, users * u64::from(*share) / all, "{name} of {shares:?}");
            let weights: u64 = own.iter().map(|place| u64::from(members[*place].1)).sum();
            for place in own {
                let due = given as f64 * f64::from(members[place].1) / weights as f64;
                let off = (of_backend[place] as f64 - due).abs();
                assert!(off < 2.0, "{off} turns off in {members:?} with {shares:?}");
            }
        }
    }
}

#[test]
fn rule_6_a_group_with_nobody_to_serve_leaves_its_users_to_the_others() {
    let shop = service(Policy::RoundRobin, &[("blue", 95), ("green", 5)], &SHOP);
    for gone in [Standing::Aside, Standing::Failing, Standing::Draining] {
        let left = standing(&shop, &[1, 2, 5], gone);
        assert_eq!(dealt(&left, 0..100), counts(&[("green", 100)]), "{gone:?}");
    }
    let idle = service(Policy::RoundRobin, &[("blue", 95), ("green", 5)], &[("green", 1)]);
    assert_eq!(dealt(&idle, 0..100), counts(&[("green", 100)]));
}

#[test]
fn rule_6_a_share_of_0_is_nobody_even_when_nobody_else_is_left() {
    let shop = service(Policy::RoundRobin, &[("blue", 0), ("green", 100)], &SHOP);
    assert_eq!(dealt(&shop, 0..100), counts(&[("green", 100)]));
    let left = standing(&shop, &[3, 4], Standing::Draining);
    assert_eq!(dealt(&left, 0..100), counts(&[]));
    assert!(left.pool.serves_nobody());
}

#[test]
fn rule_6_those_set_aside_are_tried_when_nobody_in_any_group_serves() {
    let shop = service(Policy::RoundRobin, &[("blue", 50), ("green", 50)], &SHOP);
    let aside = standing(&standing(&shop, &[1, 2, 5], Standing::Aside), &[3, 4], Standing::Failing);
    assert_eq!(dealt(&aside, 0..100), counts(&[("blue", 100)]));
    let failing = standing(&shop, &[1, 2, 3, 4, 5], Standing::Failing);
    assert_eq!(dealt(&failing, 0..100), counts(&[]));
    let terms = Terms { checks: Some(WhenAllFail::Serve), ..failing.terms.clone() };
    let tried = with(&Service { terms, ..failing.clone() }, failing.pool.backends.to_vec());
    assert_eq!(dealt(&tried, 0..100), counts(&[("blue", 50), ("green", 50)]));
}

#[test]
fn rule_6_backends_without_a_group_serve_until_a_group_takes_part() {
    let shares = [("blue", 100), ("green", 0)];
    let before = service(Policy::RoundRobin, &shares, &[("", 1), ("red", 1), ("green", 1)]);
    assert_eq!(dealt(&before, 0..100), counts(&[("", 50), ("red", 50)]));
    let after = service(Policy::RoundRobin, &shares, &[("", 1), ("red", 1), ("blue", 1)]);
    assert_eq!(dealt(&after, 0..100), counts(&[("blue", 100)]));
}

#[test]
fn rule_6_turns_go_on_over_shifts() {
    let shop = service(Policy::RoundRobin, &[("blue", 1), ("green", 1)], &SHOP);
    let [mut blue, mut green] = [0, 0];
    for round in 0..100 {
        // A service with turns of its own would begin each time with the same group.
        let service = shifted(&shop, &[("blue", 1), ("green", 1 + round % 2)]);
        let service = shifted(&service, &[("blue", 1), ("green", 1)]);
        match group_of(pick(&service, &asked(0)).unwrap()) {
            "blue" => blue += 1,
            _ => green += 1,
        }
    }
    assert_eq!([blue, green], [50, 50]);
}

#[test]
fn rule_6_least_sessions_looks_within_the_group_whose_turn_it_is() {
    let shop = service(Policy::LeastSessions, &[("blue", 1), ("green", 1)], &SHOP);
    let load = |backend: &Backend| [90, 10, 7, 9, 80][usize::from(backend.slot)];
    let question = Question { least: &least_by(&load), ..asked(0) };
    let picked: Vec<u32> = (0..4).map(|_| pick(&shop, &question).unwrap().id.0).collect();
    // 10 for weight 1 in blue, 7 for weight 2 in green.
    assert_eq!(picked, [2, 3, 2, 3]);
}

#[test]
fn rule_6_another_attempt_stays_in_the_group_and_takes_no_turn_of_the_groups() {
    for policy in Policy::ALL {
        let shop = service(policy, &[("blue", 95), ("green", 5)], &SHOP);
        let after = Some(BackendId(3));
        let again = |failed: &[u32]| {
            let question = Question { excluded: &|id| failed.contains(&id.0), after, ..asked(1) };
            pick(&shop, &question).map(|backend| backend.id.0)
        };
        for _ in 0..40 {
            assert_eq!(again(&[3]), Some(4), "{policy:?}: the other one of green");
        }
        assert!(matches!(again(&[3, 4]), Some(1 | 2 | 5)), "{policy:?}: then others");
        assert_eq!(again(&[1, 2, 3, 4, 5]), None);
    }
    let shop = service(Policy::RoundRobin, &[("blue", 95), ("green", 5)], &SHOP);
    let mut green = 0;
    for number in 0..10_000 {
        let first = pick(&shop, &asked(number)).unwrap();
        green += u32::from(group_of(first) == "green");
        let failed = first.id;
        let excluded = |id| id == failed;
        let question = Question { excluded: &excluded, after: Some(failed), ..asked(number) };
        assert_eq!(group_of(pick(&shop, &question).unwrap()), group_of(first));
    }
    assert_eq!(green, 500);
}

#[test]
fn rule_7_a_canarys_users_stay_its_users_whoever_comes_and_goes() {
    let shares = [("blue", 80), ("green", 20)];
    let shop = service(Policy::SourceHash, &shares, &SHOP);
    let grown =
        service(Policy::SourceHash, &shares, &[&SHOP[..], &[("green", 9), ("blue", 1)]].concat());
    let shrunk = standing(&shop, &[2, 4], Standing::Draining);
    let mut green = 0;
    for number in 0..10_000 {
        let [before, later, last] =
            [&shop, &grown, &shrunk].map(|it| group_of(pick(it, &asked(number)).unwrap()));
        assert_eq!([before, later], [last, last]);
        green += u32::from(before == "green");
    }
    assert!(green.abs_diff(2_000) < 150, "{green}");
}

#[test]
fn rule_7_a_shift_moves_the_users_between_the_shares_and_nobody_else() {
    let before = service(Policy::SourceHash, &[("blue", 95), ("green", 5)], &SHOP);
    let after = shifted(&before, &[("blue", 90), ("green", 10)]);
    let mut moved = 0;
    for number in 0..20_000 {
        let [old, new] = [&before, &after].map(|it| pick(it, &asked(number)).unwrap());
        match (group_of(old), group_of(new)) {
            ("blue", "green") => moved += 1,
            // Nor do they change their backend within the group.
            _ => assert_eq!(old.id, new.id),
        }
    }
    assert!(u32::abs_diff(moved, 1_000) < 150, "{moved}");
}

#[test]
fn rule_7_users_of_a_group_spread_over_its_backends_by_weight() {
    let shop = service(Policy::SourceHash, &[("blue", 50), ("green", 50)], &SHOP);
    let mut of_backend = [0u32; 5];
    for number in 0..24_000 {
        of_backend[usize::from(pick(&shop, &asked(number)).unwrap().slot)] += 1;
    }
    for (count, due) in of_backend.into_iter().zip([6_000, 2_000, 8_000, 4_000, 4_000]) {
        assert!(count.abs_diff(due) < 350, "{of_backend:?}");
    }
}
