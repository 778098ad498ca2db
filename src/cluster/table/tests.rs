//! The laws of the table, over sets drawn from seeds.

use std::collections::BTreeSet;

use super::*;
use crate::base::random::xorshift;
use crate::cluster::backend::{BackendId, Protocol, ServiceId};

type Set = Vec<(SocketAddr, u16)>;

fn address(number: u64) -> SocketAddr {
    ([10, 0, (number >> 8) as u8, number as u8], 9000).into()
}

/// Backends at different addresses, in the order of these.
fn set(count: usize, mut weight: impl FnMut() -> u16, random: &mut impl FnMut(u64) -> u64) -> Set {
    let mut addresses = BTreeSet::new();
    while addresses.len() < count {
        addresses.insert(address(random(1 << 16)));
    }
    addresses.into_iter().map(|address| (address, weight())).collect()
}

fn counts(set: &Set) -> Vec<u32> {
    let mut counts = vec![0; set.len()];
    fill(HashKey::default(), set).iter().for_each(|member| counts[usize::from(*member)] += 1);
    counts
}

/// The owner of each slot.
fn owners(set: &Set) -> Vec<SocketAddr> {
    let slots = fill(HashKey::default(), set);
    slots.iter().map(|member| set[usize::from(*member)].0).collect()
}

/// The part of the slots that have another owner, leaving out those that this backend had or has.
fn moved(before: &[SocketAddr], after: &[SocketAddr], but: Option<SocketAddr>) -> f64 {
    let pairs = before.iter().zip(after);
    let others = pairs.filter(|(old, new)| Some(**old) != but && Some(**new) != but);
    others.filter(|(old, new)| old != new).count() as f64 / SLOTS as f64
}

#[test]
fn equal_backends_have_equal_shares() {
    let mut random = xorshift(7);
    for count in [2, 3, 10, 100, 256, 257, 1024] {
        let counts = counts(&set(count, || 1, &mut random));
        let due = SLOTS as f64 / count as f64;
        for of_one in counts {
            assert!((f64::from(of_one) / due - 1.0).abs() < 0.02, "{of_one} of {due}, {count}");
        }
    }
}

#[test]
fn shares_are_those_of_the_weights_and_the_lightest_has_some() {
    let mut random = xorshift(8);
    for round in 0..24 {
        let count = 2 + random(if round < 20 { 60 } else { 1023 }) as usize;
        let most = 1 + random(256);
        let mut draw = xorshift(100 + round);
        let set = set(count, || 1 + draw(most) as u16, &mut random);
        let all: f64 = set.iter().map(|it| f64::from(it.1)).sum();
        for (of_one, (_, weight)) in counts(&set).into_iter().zip(&set) {
            let due = SLOTS as f64 * f64::from(*weight) / all;
            assert!(of_one > 0 && (f64::from(of_one) - due).abs() < 2.0, "{of_one} of {due}");
        }
    }
    let heavy: Set = (0..16_384).map(|it| (address(it), if it < 8000 { 256 } else { 1 })).collect();
    assert!(counts(&heavy).into_iter().all(|of_one| of_one > 0));
}

#[test]
fn weights_count_by_their_ratio_only() {
    let mut random = xorshift(9);
    let set = set(12, || 1, &mut random);
    let scaled = |by: u16| -> Set {
        let weights = [1, 2, 5].into_iter().cycle();
        set.iter().zip(weights).map(|(it, weight)| (it.0, weight * by)).collect()
    };
    assert_eq!(owners(&scaled(1)), owners(&scaled(50)));
}

#[test]
fn whoever_joins_takes_little_more_than_its_share_and_whoever_leaves_moves_few_of_the_others() {
    const DRAWS: usize = 16;
    let mut random = xorshift(10);
    let (mut all, mut others) = (0.0, 0.0);
    for _ in 0..DRAWS {
        let eleven = set(11, || 1, &mut random);
        let after = owners(&eleven);
        let mut ten = eleven.clone();
        let (joins, _) = ten.remove(random(11) as usize);
        let before = owners(&ten);
        let (of_all, of_others) =
            (moved(&before, &after, None), moved(&before, &after, Some(joins)));
        // Of 300 sets, one came this far.
        assert!(of_all <= 0.1 && of_others <= 0.01, "{of_all} moved, {of_others} of the others");
        (all, others) = (all + of_all, others + of_others);
    }
    let [all, others] = [all, others].map(|it| it / DRAWS as f64);
    assert!(all <= 0.096, "{all} moved for one that joined ten; 0.091 is fair");
    assert!(others <= 0.005, "{others} of the others moved");
}

#[test]
fn what_weighs_more_takes_from_all_and_gives_to_none() {
    let mut random = xorshift(11);
    let mut draw = xorshift(12);
    let before = set(30, || 1 + draw(100) as u16, &mut random);
    let mut after = before.clone();
    after[4].1 += 50;
    let others = moved(&owners(&before), &owners(&after), Some(before[4].0));
    assert!(others <= 0.01, "{others} of the others moved");
}

#[test]
fn another_key_deals_anew() {
    let set = set(2, || 1, &mut xorshift(13));
    assert_ne!(fill(HashKey::default(), &set), fill(HashKey::new([9; 16]), &set));
}

fn backend(place: u16, standing: Standing) -> Backend {
    Backend {
        proxy: false,
        http2: false,
        tls: None,
        id: BackendId(u32::from(place)),
        slot: place,
        service: ServiceId::built_in(Protocol::Tcp),
        // In another order than that of registration.
        address: address(u64::from(500 - place)),
        weight: 1 + place % 3,
        name: None,
        group: None,
        standing,
    }
}

fn cast(backends: &[Backend], before: (Vec<&Table>, &[Backend])) -> Option<Table> {
    let (key, standing) = (HashKey::default(), Standing::Serving);
    Mould { key, backends, standing, before }.cast(|_| true)
}

#[test]
fn only_who_joins_leaves_or_drains_has_a_table_filled_anew() {
    let all: Vec<Backend> = (0..300).map(|place| backend(place, Standing::Serving)).collect();
    let first = cast(&all, (Vec::new(), &[])).unwrap();
    let with = |place: usize, standing| {
        let mut changed = all.clone();
        changed[place].standing = standing;
        (cast(&changed, (vec![&first], &all)).unwrap(), changed)
    };
    let hash = (0..).map(|it| it << 40).find(|hash| first.home(*hash) == Some(7)).unwrap();
    for standing in [Standing::Aside, Standing::Failing] {
        let (table, changed) = with(7, standing);
        assert!(table.shares_slots(&first), "{standing:?}");
        assert_eq!(table.home(hash), None, "{standing:?}");
        let back = cast(&all, (vec![&table], &changed)).unwrap();
        assert!(back.shares_slots(&first) && back.home(hash) == Some(7));
    }
    let (table, _) = with(7, Standing::Draining);
    assert!(!table.shares_slots(&first));
    assert!(table.home(hash).is_some_and(|place| place != 7), "its users have others at once");
    let mut heavier = all.clone();
    heavier[0].weight += 1;
    assert!(!cast(&heavier, (vec![&first], &all)).unwrap().shares_slots(&first));
    assert!(cast(&all[..1], (Vec::new(), &[])).is_none(), "one alone needs none");
}

#[test]
fn a_table_of_few_is_that_of_many_with_narrower_numbers() {
    for count in [256, 257] {
        let all: Vec<Backend> = (0..count).map(|place| backend(place, Standing::Serving)).collect();
        let table = cast(&all, (Vec::new(), &[])).unwrap();
        assert_eq!(matches!(*table.slots, Slots::Few(_)), count == 256);
        let mut sorted = all.clone();
        sorted.sort_by_key(|backend| backend.address);
        let set: Set = sorted.iter().map(|backend| (backend.address, backend.weight)).collect();
        assert_eq!(table.slots(), *fill(HashKey::default(), &set));
        for slot in [0, 1, 40_000, SLOTS - 1] {
            let hash = ((((slot as u128) << 64) + (1 << 63)) / SLOTS as u128) as u64;
            let place = usize::from(table.home(hash).unwrap());
            assert_eq!(all[place].address, set[usize::from(table.slots()[slot])].0, "slot {slot}");
        }
    }
}
