//! Finds the backend with the fewest running sessions for its weight; a tie goes to whichever is next in turn. Owns
//! the order that the backends of each rotation are kept in, by how busy they are: a tree of matches whose leaves are
//! the backends in the order of registration, and in which the less busy of two goes up.
//!
//! ```text
//!                     2/1                      another session on the third changes two matches,
//!              2/1           3/1               and the first at or behind the one whose turn it is that is
//!          4/1    2/1    3/1    6/2            as little busy as the winner is found in as many steps
//! ```
//!
//! A change and a choice take as many steps as the tree is high, 10 with a thousand backends. What has changed
//! must be told, see [`Tally::set`]; whether that is all sessions there are is up to the caller.

use crate::cluster::rotation::Rotation;
use crate::cluster::{Backend, BackendId};

/// How busy a backend is: its sessions for its weight.
#[derive(Clone, Copy, Debug)]
struct Busy {
    sessions: u32,
    weight: u16,
}

impl Busy {
    /// Busier than any backend, because there is none, or none that may be chosen.
    const OUT: Busy = Busy { sessions: 1, weight: 0 };

    fn is_out(self) -> bool {
        self.weight == 0
    }

    /// Compared by cross-multiplication (a/b < c/d as a*d < c*b), so that nothing is lost to rounding.
    fn crossed(self, other: Busy) -> [u64; 2] {
        let product = |one: Busy, two: Busy| u64::from(one.sessions) * u64::from(two.weight);
        [product(self, other), product(other, self)]
    }

    fn is_less_than(self, other: Busy) -> bool {
        let [own, others] = self.crossed(other);
        own < others
    }

    fn equals(self, other: Busy) -> bool {
        let [own, others] = self.crossed(other);
        own == others && self.is_out() == other.is_out()
    }
}

/// Where a backend stands in the tree of its rotation.
#[derive(Clone, Copy, Default)]
struct Seat {
    /// Void if this is not that of the tally.
    round: u32,
    tree: Tree,
    /// In the order of registration.
    position: u32,
}

/// A tree in the common store: its node 1 is the winner, those of node n are 2n and 2n + 1, and its leaves begin at
/// `width`, a power of two.
#[derive(Clone, Copy, Default)]
struct Tree {
    base: u32,
    width: u32,
}

/// A choice to be made among the backends of one rotation.
pub struct Contest<'a> {
    /// All backends of the service.
    pub backends: &'a [Backend],
    pub rotation: &'a Rotation,
    /// The place of the backend whose turn it is.
    pub first: u16,
    pub excluded: &'a dyn Fn(BackendId) -> bool,
}

/// The running sessions of each backend, as they were told, and the trees of those rotations that a choice has
/// been made in.
pub struct Tally {
    /// By the backends' slots, as are the seats.
    sessions: Box<[u32]>,
    seats: Box<[Seat]>,
    /// Grows when all seats become void.
    round: u32,
    nodes: Vec<Busy>,
    /// Leaves that are out for the present choice; kept for its memory.
    out: Vec<(u32, Busy)>,
}

impl Tally {
    /// Nobody has a session, and slots are below `slots`.
    pub fn new(slots: usize) -> Tally {
        Tally {
            sessions: vec![0; slots].into(),
            seats: vec![Seat::default(); slots].into(),
            round: 1,
            nodes: Vec::new(),
            out: Vec::new(),
        }
    }

    /// The sessions of the backend in this slot, as they were last told.
    pub fn get(&self, slot: u16) -> u32 {
        self.sessions[usize::from(slot)]
    }

    /// Tells how many sessions the backend in this slot has.
    pub fn set(&mut self, slot: u16, sessions: u32) {
        let before = std::mem::replace(&mut self.sessions[usize::from(slot)], sessions);
        let seat = self.seats[usize::from(slot)];
        if before != sessions && seat.round == self.round {
            let leaf = seat.tree.leaf(seat.position);
            let weight = self.nodes[(seat.tree.base + leaf) as usize].weight;
            self.place(seat.tree, leaf, Busy { sessions, weight });
        }
    }

    /// Rotations or weights have changed: every tree is laid out anew when it is next needed.
    pub fn forget_rotations(&mut self) {
        self.nodes.clear();
        self.round += 1;
    }

    /// The place of the least busy backend that is not excluded. `None`: all of them are.
    pub fn least(&mut self, contest: &Contest<'_>) -> Option<u16> {
        let Contest { backends, rotation, first, excluded } = contest;
        let seat = self.seat(contest, backends.get(usize::from(*first))?.slot)?;
        let found = loop {
            let Some(position) = self.winner_from(seat.tree, seat.position) else { break None };
            let place = rotation.shares()[position as usize].place;
            if !excluded(backends[usize::from(place)].id) {
                break Some(place);
            }
            let leaf = seat.tree.leaf(position);
            self.out.push((leaf, self.nodes[(seat.tree.base + leaf) as usize]));
            self.place(seat.tree, leaf, Busy::OUT);
        };
        while let Some((leaf, busy)) = self.out.pop() {
            self.place(seat.tree, leaf, busy);
        }
        found
    }

    /// The seat of a backend in the rotation, whose tree is laid out if that has not been done.
    fn seat(&mut self, contest: &Contest<'_>, slot: u16) -> Option<Seat> {
        let known = |tally: &Tally| {
            let seat = tally.seats.get(usize::from(slot)).copied();
            seat.filter(|seat| seat.round == tally.round)
        };
        if known(self).is_none() {
            self.lay_out(contest);
        }
        known(self)
    }

    fn lay_out(&mut self, contest: &Contest<'_>) {
        let places = contest.rotation.places();
        let width = contest.rotation.shares().len().next_power_of_two();
        let tree = Tree { base: self.nodes.len() as u32, width: width as u32 };
        self.nodes.resize(self.nodes.len() + 2 * width, Busy::OUT);
        for (position, place) in (0..).zip(places) {
            let Backend { slot, weight, .. } = contest.backends[usize::from(place)];
            let sessions = self.sessions[usize::from(slot)];
            self.nodes[(tree.base + tree.leaf(position)) as usize] = Busy { sessions, weight };
            self.seats[usize::from(slot)] = Seat { round: self.round, tree, position };
        }
        for node in (1..tree.width).rev() {
            self.nodes[(tree.base + node) as usize] = self.winner_below(tree, node);
        }
    }

    fn at(&self, tree: Tree, node: u32) -> Busy {
        self.nodes[(tree.base + node) as usize]
    }

    fn winner_below(&self, tree: Tree, node: u32) -> Busy {
        let [left, right] = [self.at(tree, 2 * node), self.at(tree, 2 * node + 1)];
        if right.is_less_than(left) { right } else { left }
    }

    /// Changes a leaf, and the matches above it.
    fn place(&mut self, tree: Tree, leaf: u32, busy: Busy) {
        self.nodes[(tree.base + leaf) as usize] = busy;
        let mut node = leaf / 2;
        while node > 0 {
            self.nodes[(tree.base + node) as usize] = self.winner_below(tree, node);
            node /= 2;
        }
    }

    /// The first position from this one on, and then from the start, that is as little busy as the winner. `None`:
    /// nobody is left.
    fn winner_from(&self, tree: Tree, position: u32) -> Option<u32> {
        let best = self.at(tree, 1);
        if best.is_out() {
            return None;
        }
        let wins = |node: u32| self.at(tree, node).equals(best);
        let mut node = tree.leaf(position);
        if wins(node) {
            return Some(position);
        }
        // Up, until there is a winner on the right.
        while node > 1 && (node % 2 == 1 || !wins(node + 1)) {
            node /= 2;
        }
        node = if node > 1 { node + 1 } else { 1 };
        // Down to the leftmost of them.
        while node < tree.width {
            node = if wins(2 * node) { 2 * node } else { 2 * node + 1 };
        }
        Some(node - tree.width)
    }
}

impl Tree {
    fn leaf(self, position: u32) -> u32 {
        self.width + position
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::tests::backends;
    use crate::base::random::xorshift;

    /// The rule taken literally.
    fn plainly(contest: &Contest<'_>, sessions: &[u32]) -> Option<u16> {
        let all: Vec<u16> = contest.rotation.places().collect();
        let start = all.iter().position(|place| *place == contest.first).unwrap();
        let in_turn = all[start..].iter().chain(&all[..start]);
        let busy = |place: u16| {
            let Backend { slot, weight, .. } = contest.backends[usize::from(place)];
            (u64::from(sessions[usize::from(slot)]), u64::from(weight))
        };
        let mut best: Option<u16> = None;
        for place in in_turn.copied() {
            if (contest.excluded)(contest.backends[usize::from(place)].id) {
                continue;
            }
            let (own, weight) = busy(place);
            if best.map(busy).is_none_or(|(least, its)| own * its < least * weight) {
                best = Some(place);
            }
        }
        best
    }

    #[test]
    fn it_chooses_as_the_plain_rule_does_whatever_has_come_and_gone() {
        let mut random = xorshift(17);
        for round in 0..60 {
            let count = 1 + random(if round % 10 == 0 { 600 } else { 20 }) as usize;
            let most = 1 + random(4);
            let weights: Vec<u16> = (0..count).map(|_| 1 + random(most) as u16).collect();
            let backends = backends(&weights);
            let mut tally = Tally::new(count);
            let mut sessions = vec![0u32; count];
            for _ in 0..6 {
                // Some of them serve, others do not.
                let mut serving: Vec<(u16, u16)> =
                    (0u16..).zip(weights.iter().copied()).filter(|_| random(5) > 0).collect();
                if serving.is_empty() {
                    serving.push((0, weights[0]));
                }
                let rotation = Rotation::weighted(&serving);
                tally.forget_rotations();
                for _ in 0..80 {
                    let slot = random(count as u64) as usize;
                    sessions[slot] = if random(3) > 0 { random(6) as u32 } else { 0 };
                    tally.set(slot as u16, sessions[slot]);
                    let out = [random(2 * count as u64), random(2 * count as u64)];
                    let all_out = random(20) == 0;
                    let excluded = |id: BackendId| all_out || out.contains(&u64::from(id.0));
                    let first = serving[random(serving.len() as u64) as usize].0;
                    let rotation = &rotation;
                    let contest =
                        Contest { backends: &backends, rotation, first, excluded: &excluded };
                    assert_eq!(tally.least(&contest), plainly(&contest, &sessions));
                }
            }
        }
    }

    #[test]
    fn several_rotations_stand_side_by_side() {
        let backends = backends(&[1; 6]);
        let rotations: [Rotation; 2] = [(0..3).collect(), (3..6).collect()];
        let mut tally = Tally::new(6);
        for (slot, sessions) in [(0, 9), (1, 5), (2, 7), (3, 1), (4, 1), (5, 2)] {
            tally.set(slot, sessions);
        }
        let least = |tally: &mut Tally, which: usize, first| {
            let (rotation, excluded) = (&rotations[which], &|_| false);
            tally.least(&Contest { backends: &backends, rotation, first, excluded })
        };
        assert_eq!(least(&mut tally, 0, 0), Some(1));
        assert_eq!(least(&mut tally, 1, 4), Some(4));
        tally.set(4, 3);
        tally.set(1, 8);
        assert_eq!((least(&mut tally, 0, 0), least(&mut tally, 1, 4)), (Some(2), Some(3)));
        assert_eq!(tally.get(4), 3);
    }
}
