//! The table by which users return to the same backend: Maglev hashing (D. Eisenbud et al., "Maglev: a fast and
//! reliable software network load balancer", NSDI 2016), with weights. Owns how it is filled; who looks something
//! up in it is up to `balance`.
//!
//! Each backend walks through the table in an order of its own, which its address decides, and in its turn takes
//! the next slot there that is free. A backend's n-th turn (n = 1, 2, ...) comes at the time (n - 1/2) / weight, and
//! the first at 0, so that even the lightest gets a slot. None of this depends on who else is there, so the order
//! in which two backends take their turns never changes either: when one joins or leaves, few slots change hands
//! among the others.
//!
//! Only whole numbers are compared, and only the set of addresses and weights is looked at. Two balancers with the
//! same set and the same key have the same table, byte for byte, in whatever order the backends came to each.
//!
//! Members are all that are registered and do not drain. Who is set aside or fails its check keeps its slots, and its
//! users are dealt out among the others for as long as that lasts: nobody else moves, and what one balancer has
//! found out by itself does not tell its users apart from those of others. So the table is filled anew only when
//! somebody joins, leaves, drains or is given another weight.
//!
//! A table takes 64 KiB with up to 256 members and 128 KiB with more; there is one for each rotation of two backends
//! or more whose service goes by it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::SocketAddr;
use std::sync::Arc;

use super::backend::{Backend, Standing};
use super::hash_key::{HashKey, Purpose};

/// Slots of a table: prime, so that every walk meets every slot. With 1,024 backends each gets 64 or 65.
pub const SLOTS: usize = 65_537;

/// A frozen table.
#[derive(Clone, Debug)]
pub struct Table {
    /// In the order of their addresses; slots name them by their place here.
    members: Box<[Member]>,
    slots: Arc<Slots>,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    /// Among all backends of the service.
    place: u16,
    serves: bool,
}

/// The member of each slot.
#[derive(PartialEq, Eq, Debug)]
enum Slots {
    /// Of up to 256.
    Few(Box<[u8]>),
    Many(Box<[u16]>),
}

impl Table {
    /// The place of the backend that a user with this hash belongs to, if that serves.
    #[inline]
    pub fn home(&self, hash: u64) -> Option<u16> {
        // The hash as a fraction of all hashes.
        let slot = ((u128::from(hash) * SLOTS as u128) >> 64) as usize;
        let member = match &*self.slots {
            Slots::Few(slots) => usize::from(slots[slot]),
            Slots::Many(slots) => usize::from(slots[slot]),
        };
        self.members.get(member).filter(|member| member.serves).map(|member| member.place)
    }

    /// The slots' members, by the places of these in the order of addresses.
    pub fn slots(&self) -> Vec<u16> {
        match &*self.slots {
            Slots::Few(slots) => slots.iter().map(|member| u16::from(*member)).collect(),
            Slots::Many(slots) => slots.to_vec(),
        }
    }

    /// Whether the two have the very same slots in memory.
    pub fn shares_slots(&self, other: &Table) -> bool {
        Arc::ptr_eq(&self.slots, &other.slots)
    }
}

/// What the tables of one pool are made from.
pub struct Mould<'a> {
    pub key: HashKey,
    pub backends: &'a [Backend],
    /// Of those who serve.
    pub standing: Standing,
    /// The tables that the pool had before, and its backends.
    pub before: (Vec<&'a Table>, &'a [Backend]),
}

impl Mould<'_> {
    /// The table of the backends that belong together. `None`: fewer than two need none.
    pub fn cast(&self, belongs: impl Fn(&Backend) -> bool) -> Option<Table> {
        let mut places: Vec<u16> = (0u16..)
            .zip(self.backends)
            .filter(|(_, backend)| backend.standing != Standing::Draining && belongs(backend))
            .map(|(place, _)| place)
            .collect();
        if places.len() < 2 {
            return None;
        }
        places.sort_unstable_by_key(|place| self.backends[usize::from(*place)].address);
        let member = |place: &u16| {
            let serves = self.backends[usize::from(*place)].standing == self.standing;
            Member { place: *place, serves }
        };
        let members: Box<[Member]> = places.iter().map(member).collect();
        let set = || members.iter().map(|member| weighed(self.backends, *member));
        let (tables, backends) = &self.before;
        let same = tables
            .iter()
            .find(|table| table.members.iter().map(|it| weighed(backends, *it)).eq(set()));
        let slots = match same {
            Some(same) => Arc::clone(&same.slots),
            None => Arc::new(filled(self.key, &set().collect::<Vec<_>>())),
        };
        Some(Table { members, slots })
    }
}

fn weighed(backends: &[Backend], member: Member) -> (SocketAddr, u16) {
    let backend = &backends[usize::from(member.place)];
    (backend.address, backend.weight)
}

/// The slots of these members, which are in the order of their addresses.
fn filled(key: HashKey, set: &[(SocketAddr, u16)]) -> Slots {
    let slots = fill(key, set);
    let narrow = |slots: &[u16]| slots.iter().map(|member| u8::try_from(*member).ok()).collect();
    let few: Option<Box<[u8]>> = narrow(&slots);
    few.map_or(Slots::Many(slots), Slots::Few)
}

/// Backends of one weight, which take their turns together.
struct Class {
    weight: u64,
    turns: u64,
    members: Vec<u16>,
}

impl Class {
    /// Twice the time of the next turn, times the weight.
    fn due(&self) -> u64 {
        if self.turns == 0 { 0 } else { 2 * self.turns + 1 }
    }
}

/// The class whose turn comes first is the largest; of two at the same time, the heavier.
impl Ord for Class {
    fn cmp(&self, other: &Class) -> Ordering {
        let (own, others) = (self.due() * other.weight, other.due() * self.weight);
        others.cmp(&own).then(self.weight.cmp(&other.weight))
    }
}

impl PartialOrd for Class {
    fn partial_cmp(&self, other: &Class) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Class {
    fn eq(&self, other: &Class) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Class {}

/// A backend's way through the slots.
struct Walk {
    next: u32,
    step: u32,
}

impl Walk {
    fn of(key: HashKey, address: SocketAddr) -> Walk {
        let part = |purpose, of: usize| {
            let hash = key.address(purpose, 0, address);
            ((u128::from(hash) * of as u128) >> 64) as u32
        };
        Walk { next: part(Purpose::Start, SLOTS), step: 1 + part(Purpose::Step, SLOTS - 1) }
    }

    /// The next slot on the way that satisfies the predicate; there must be one.
    fn find(&mut self, is_free: impl Fn(usize) -> bool) -> usize {
        loop {
            let slot = self.next as usize;
            self.next += self.step;
            if self.next >= SLOTS as u32 {
                self.next -= SLOTS as u32;
            }
            if is_free(slot) {
                return slot;
            }
        }
    }
}

fn fill(key: HashKey, set: &[(SocketAddr, u16)]) -> Box<[u16]> {
    let mut walks: Vec<Walk> = set.iter().map(|(address, _)| Walk::of(key, *address)).collect();
    let mut by_weight: BTreeMap<u16, Vec<u16>> = BTreeMap::new();
    for (member, (_, weight)) in (0u16..).zip(set) {
        by_weight.entry(*weight).or_default().push(member);
    }
    let class = |(weight, members)| Class { weight: u64::from(weight), turns: 0, members };
    let mut classes: BinaryHeap<Class> = by_weight.into_iter().map(class).collect();
    let mut slots = vec![0; SLOTS].into_boxed_slice();
    // One bit for each slot: the end of the walk is long, and this much stays in the nearest cache.
    let mut taken = [0u64; SLOTS.div_ceil(64)];
    let mut left = SLOTS;
    while let Some(mut class) = classes.peek_mut() {
        for member in &class.members {
            if left == 0 {
                return slots;
            }
            let is_free = |slot: usize| taken[slot / 64] & 1 << (slot % 64) == 0;
            let slot = walks[usize::from(*member)].find(is_free);
            taken[slot / 64] |= 1 << (slot % 64);
            slots[slot] = *member;
            left -= 1;
        }
        class.turns += 1;
    }
    slots
}

#[cfg(test)]
mod tests;
