//! Balancers that have heard the same, each in its own order, and give a user to the same backend.

use std::collections::VecDeque;

use super::claims::{claim, unclaim};
use super::*;
use crate::base::random::xorshift;
use crate::cluster::hash_key::Purpose;
use crate::cluster::service::Pool;
use crate::cluster::{Snapshot, Terms};

const BACKENDS: u64 = 100;
const CHANGES: usize = 1_000;
const USERS: u32 = 100_000;

/// Backends that join, are weighed anew and leave: what is said of each, in the order in which it is said.
fn said() -> Vec<VecDeque<Change>> {
    let mut random = xorshift(21);
    let mut said: Vec<VecDeque<Change>> = (0..BACKENDS).map(|_| VecDeque::new()).collect();
    let mut is_there = [false; BACKENDS as usize];
    for _ in 0..CHANGES {
        let number = random(BACKENDS) as usize;
        let port = 1_000 + number as u16;
        let leaves = is_there[number] && random(3) == 0;
        let weight = 1 + random(9) as u16;
        said[number].push_back(if leaves { unclaim(port) } else { claim(port, weight) });
        is_there[number] = !leaves;
    }
    said
}

/// What a balancer has that hears all of it, now of one and then of another, and shows its workers some of it on the way.
fn heard(mut said: Vec<VecDeque<Change>>, seed: u64) -> Arc<Pool> {
    let mut random = xorshift(seed);
    // Workers have said of nobody that it can be forgotten.
    let mut registry = registry(CHANGES);
    registry.agree(|service| Terms { policy: Policy::SourceHash, ..service.terms.clone() });
    while !said.is_empty() {
        let place = random(said.len() as u64) as usize;
        match said[place].pop_front() {
            Some(change) => drop(registry.apply(change, NOW).unwrap()),
            None => drop(said.swap_remove(place)),
        }
        if random(10) == 0 {
            registry.freeze(false);
        }
    }
    pool(&registry.freeze(true))
}

fn pool(snapshot: &Snapshot) -> Arc<Pool> {
    Arc::clone(&snapshot.service(TCP).unwrap().pool)
}

fn home(pool: &Pool, user: SocketAddr) -> SocketAddr {
    let table = pool.table.as_ref().expect("the policy goes by it");
    let place = table.home(pool.key.address(Purpose::User, 0, user)).expect("all of them serve");
    pool.backends[usize::from(place)].address
}

#[test]
fn balancers_choose_alike_in_whatever_order_they_have_heard_of_the_backends() {
    let [first, others @ ..] = [1, 2, 3].map(|seed| heard(said(), seed));
    let slots = |pool: &Pool| pool.table.as_ref().unwrap().slots();
    let order = |pool: &Pool| Vec::from_iter(pool.backends.iter().map(|backend| backend.address));
    for other in &others {
        assert_ne!(order(&first), order(other), "they have not come in the same order");
        assert!(slots(&first) == slots(other), "the tables are equal, slot by slot");
    }
    for user in 0..USERS {
        let user = SocketAddr::from((user.wrapping_mul(0x9e37_79b9).to_be_bytes(), 1));
        let home = |pool: &Arc<Pool>| self::home(pool, user);
        assert!(others.iter().all(|other| home(other) == home(&first)), "{user}");
    }
}

/// Of so many users, how many another backend is given after a change, but for those of `of` before or after it.
fn moved(before: &Pool, after: &Pool, of: Option<SocketAddr>) -> f64 {
    const USERS: u32 = 20_000;
    let users = (0..USERS).map(|user| SocketAddr::from((user.to_be_bytes(), 1)));
    let homes = users.map(|user| (home(before, user), home(after, user)));
    let others = homes.filter(|(old, new)| Some(*old) != of && Some(*new) != of);
    others.filter(|(old, new)| old != new).count() as f64 / f64::from(USERS)
}

#[test]
fn few_users_move_when_one_joins_ten_or_leaves() {
    const DRAWS: u16 = 16;
    let [mut joined, mut left] = [0.0; 2];
    for draw in 0..DRAWS {
        let mut registry = registry(11);
        registry.agree(|service| Terms { policy: Policy::SourceHash, ..service.terms.clone() });
        let ports = Vec::from_iter((0..11).map(|number| 1_000 + 100 * draw + number));
        ports[1..].iter().for_each(|port| drop(registry.apply(claim(*port, 1), NOW).unwrap()));
        let ten = pool(&registry.freeze(true));
        let eleven = pool(&shown(&mut registry, claim(ports[0], 1)));
        joined += moved(&ten, &eleven, None) / f64::from(DRAWS);
        let leaves = ports[usize::from(draw % 11)];
        let others = pool(&shown(&mut registry, unclaim(leaves)));
        left += moved(&eleven, &others, Some(address(leaves))) / f64::from(DRAWS);
    }
    assert!(joined <= 0.096, "{joined} moved to one that joined ten; 0.091 is fair");
    assert!(left <= 0.005, "{left} of the others' users moved");
}
