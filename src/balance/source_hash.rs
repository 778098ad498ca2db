//! Maps a user to the same backend every time, by the table of the rotation. While the user's backend does not serve,
//! the hash is taken again: so its users are dealt out by weight, each again to the same backend, and nobody
//! else moves. The hash covers the backend's address and not its registration, so users return to it
//! after it registers again; the key stays, so they return after the balancer restarts.

use std::net::SocketAddr;

use super::rendezvous::score;
use crate::base::mix::mix;
use crate::cluster::Backend;
use crate::cluster::groups::{GROUPS_MAX, Part};
use crate::cluster::hash_key::{HashKey, Purpose};
use crate::cluster::table::Table;

/// How often a user is looked up in the table. While half of the backends serve, one user in 65,536 needs more.
const PROBES: u8 = 16;

/// A user, as it is known by.
#[derive(Clone, Copy)]
pub(super) struct User {
    key: HashKey,
    purpose: Purpose,
    address: SocketAddr,
}

impl User {
    pub(super) fn new(key: HashKey, purpose: Purpose, address: SocketAddr) -> User {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        User { key, purpose, address }
    }

    fn hash(self, again: u8) -> u64 {
        self.key.address(self.purpose, again, self.address)
    }
}

/// The backend that the table gives to a user. `None`: none of those looked up is fit.
pub(super) fn pick<'s>(
    table: &Table,
    fit: impl Fn(u16) -> Option<&'s Backend>,
    user: User,
) -> Option<&'s Backend> {
    (0..PROBES).find_map(|again| table.home(user.hash(again)).and_then(&fit))
}

/// The backend among these, which are compared one by one: where there is no table, and where a table knows nobody
/// who is fit. Of two with the same score, it is the one with the lower address.
#[cold]
pub(super) fn compare<'s>(
    rotation: impl Iterator<Item = &'s Backend>,
    user: User,
) -> Option<&'s Backend> {
    let hash = user.hash(0);
    let rank = |backend: &&Backend| {
        let own = user.key.address(Purpose::Backend, 0, backend.address);
        (score(mix(hash ^ own), backend.weight), std::cmp::Reverse(backend.address))
    };
    rotation.max_by_key(rank)
}

/// The groups in the order in which the user falls to them: when shares change, no more users move than must,
/// and always from a group that has lost to one that has gained. The backends in a group have no say
/// in it.
pub(super) fn groups(parts: &[Part], user: User) -> impl Iterator<Item = &Part> {
    let hash = user.hash(0);
    let score = move |part: &Part| {
        let name = user.key.name(&part.group.name);
        score(mix(hash ^ name), part.group.share.into())
    };
    let mut left = u16::MAX;
    std::iter::from_fn(move || {
        let among = (0..parts.len().min(GROUPS_MAX)).filter(|place| left & 1 << place != 0);
        let next = among.max_by_key(|place| score(&parts[*place]))?;
        left &= !(1 << next);
        Some(&parts[next])
    })
}
