//! The order in which the backends of one service are served. Owns the answer to "whose turn is number
//! `n`?", exact over a round: each backend comes as often as its weight says. Pure and frozen; the
//! service counts the turns.
//!
//! A rotation takes one of two forms. A short round is a table, made by smooth weighted round robin.
//! With weights of up to [`super::WEIGHT_MAX`], a thousand backends make a round of a quarter million
//! turns; laying that out would keep the control core busy for too long, and the table would not fit
//! into a worker's cache. Such a round is worked out turn by turn instead. Backends of equal weight
//! form a class, the classes are the leaves of a binary tree, and every inner node deals its turns out
//! to its halves as evenly as whole numbers allow:
//!
//! ```text
//!            1,500 turns                 turn t goes left when t * left / all, rounded,
//!           /           \                grows with it
//!     500 x 1           500 x 2          a class serves its members one after the other
//! ```
//!
//! The turns of a node are exactly those of its halves, so over a round no backend is served once too
//! often or too rarely, and the depth of the tree bounds the cost of a turn.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

/// The longest round that is laid out as a table, which takes 4 KiB and is made in well under a
/// millisecond.
const TABLE_MAX: u64 = 2048;
/// How many turns of a long round [`Rotation::from_turn`] looks ahead before it goes through all
/// backends.
const LOOKS: u64 = 64;

/// A backend's place in the snapshot, and how often it is served in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    pub place: u16,
    pub turns: u16,
}

/// Backends of equal weight.
#[derive(Clone, Debug)]
struct Class {
    members: Vec<u16>,
    /// The turns in a round of all classes before it.
    turns_before: u64,
}

/// Who is served when.
#[derive(Clone, Debug, Default)]
pub struct Rotation {
    shares: Vec<Share>,
    round: u64,
    /// The round, turn by turn; empty when it is too long for a table.
    table: Vec<u16>,
    /// Takes the place of the table then.
    classes: Vec<Class>,
}

impl Rotation {
    /// A rotation of places, in ascending order, with weights from 1 to [`super::WEIGHT_MAX`], reduced to
    /// the smallest whole numbers in the same ratio.
    pub fn weighted(weights: &[(u16, u16)]) -> Rotation {
        let divisor = weights.iter().fold(0, |so_far, weight| gcd(so_far, weight.1)).max(1);
        let shares: Vec<Share> = weights
            .iter()
            .map(|(place, it)| Share { place: *place, turns: it / divisor })
            .collect();
        let round = shares.iter().map(|share| u64::from(share.turns)).sum();
        let (table, classes) = match round <= TABLE_MAX {
            true => (smooth(&shares), Vec::new()),
            false => (Vec::new(), classes(&shares)),
        };
        Rotation { shares, round, table, classes }
    }

    pub fn is_empty(&self) -> bool {
        self.round == 0
    }

    /// Turns in a round.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// Every place in the rotation with its share, once.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// The places of all backends in the rotation, each once.
    pub fn places(&self) -> impl Iterator<Item = u16> + '_ {
        self.shares.iter().map(|share| share.place)
    }

    /// Whether this place is in the rotation.
    pub fn has(&self, place: u16) -> bool {
        self.shares.binary_search_by_key(&place, |share| share.place).is_ok()
    }

    /// One round, turn by turn.
    pub fn turns(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.round).map(|turn| self.at(turn))
    }

    /// The place whose turn it is.
    #[inline]
    pub fn whose(&self, turn: u64) -> Option<u16> {
        (self.round > 0).then(|| self.at(turn % self.round))
    }

    /// The place whose turn it is, and then the alternatives, nearest turn first; each comes at least
    /// once and, in a long round, not much more often.
    pub fn from_turn(&self, turn: u64) -> impl Iterator<Item = u16> + '_ {
        let everyone = self.shares.len() as u64;
        let first = if self.round == 0 { 0 } else { turn % self.round };
        let is_short = self.round <= LOOKS.max(everyone);
        let looks = if is_short { self.round } else { LOOKS };
        let start = if is_short { everyone } else { first % everyone };
        let (passed, rest) = self.shares.split_at(start as usize);
        let passed = if is_short { &[] } else { passed };
        let ahead = (first..first + looks)
            .map(|turn| self.at(if turn < self.round { turn } else { turn - self.round }));
        ahead.chain(rest.iter().chain(passed).map(|share| share.place))
    }

    /// The place that a turn of the round belongs to.
    fn at(&self, turn: u64) -> u16 {
        match self.table.get(turn as usize) {
            Some(place) => *place,
            None => self.descend(turn),
        }
    }

    fn descend(&self, mut turn: u64) -> u16 {
        let before =
            |class: usize| self.classes.get(class).map_or(self.round, |it| it.turns_before);
        let (mut low, mut high) = (0, self.classes.len());
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            let all = before(high) - before(low);
            let left = before(middle) - before(low);
            // The left half's turns so far, rounded; their number grows with this turn if adding
            // `left` to the remainder reaches `all`.
            let share = turn * left + all / 2;
            let dealt = quotient(share, all);
            if share - dealt * all + left >= all {
                (high, turn) = (middle, dealt);
            } else {
                (low, turn) = (middle, turn - dealt);
            }
        }
        let members = &self.classes[low].members;
        members[(turn % members.len() as u64) as usize]
    }
}

/// A round that serves the places in this order, one turn for each occurrence.
impl FromIterator<u16> for Rotation {
    fn from_iter<I: IntoIterator<Item = u16>>(places: I) -> Rotation {
        let table: Vec<u16> = places.into_iter().collect();
        let mut turns: BTreeMap<u16, u16> = BTreeMap::new();
        table.iter().for_each(|place| *turns.entry(*place).or_default() += 1);
        let shares = turns.into_iter().map(|(place, turns)| Share { place, turns }).collect();
        Rotation { shares, round: table.len() as u64, table, classes: Vec::new() }
    }
}

/// The quotient of whole numbers by way of floats, whose division is faster. A round has 16,384 times 256
/// turns at most, so divisors are up to 2^22, numbers below 2^45 and quotients up to 2^22. All are exact as
/// floats, and a quotient that is not whole is at least 2^-22 below the next whole number, while rounding
/// moves it by less than 2^-30.
fn quotient(number: u64, divisor: u64) -> u64 {
    (number as f64 / divisor as f64) as u64
}

fn classes(shares: &[Share]) -> Vec<Class> {
    let mut by_turns: BTreeMap<u16, Vec<u16>> = BTreeMap::new();
    for share in shares {
        by_turns.entry(share.turns).or_default().push(share.place);
    }
    let mut turns_so_far = 0;
    let class = |(turns, members): (u16, Vec<u16>)| {
        let turns_before = turns_so_far;
        turns_so_far += u64::from(turns) * members.len() as u64;
        Class { members, turns_before }
    };
    by_turns.into_iter().map(class).collect()
}

/// Smooth weighted round robin: at every turn each backend's claim grows by its weight, and the one
/// with the largest claim is served and pays the sum of all weights. Over one round each is served
/// exactly as often as its weight says, and a heavy one several times in a row only when that cannot
/// be helped.
///
/// Backends of equal weight differ only in how often they have been served, so they share a queue, and
/// a turn compares the heads of the queues: with [`TABLE_MAX`] turns in all, at most 63 of them.
fn smooth(shares: &[Share]) -> Vec<u16> {
    let mut by_weight: BTreeMap<i64, VecDeque<(u16, i64)>> = BTreeMap::new();
    for share in shares {
        by_weight.entry(i64::from(share.turns)).or_default().push_back((share.place, 0));
    }
    let mut queues: Vec<_> = by_weight.into_iter().collect();
    let total: i64 = queues.iter().map(|(weight, queue)| weight * queue.len() as i64).sum();
    (1..=total)
        .map(|turn| {
            let claim = |weight: i64, served: i64| weight * turn - total * served;
            let (_, queue) = queues
                .iter_mut()
                .max_by_key(|(weight, queue)| (claim(*weight, queue[0].1), Reverse(queue[0].0)))
                .expect("there are turns only if there are shares");
            let (place, served) = queue.pop_front().expect("a queue is made with its first entry");
            queue.push_back((place, served + 1));
            place
        })
        .collect()
}

fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::WEIGHT_MAX;
    use super::*;

    fn rotation(weights: &[u16]) -> Rotation {
        let places: Vec<_> = (0u16..).zip(weights.iter().copied()).collect();
        Rotation::weighted(&places)
    }

    fn round(weights: &[u16]) -> Vec<u16> {
        rotation(weights).turns().collect()
    }

    #[test]
    fn weights_are_served_smoothly() {
        assert!(round(&[]).is_empty());
        assert_eq!(round(&[256]), [0]);
        assert_eq!(round(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(round(&[4, 2]), [0, 1, 0], "in the smallest numbers of the same ratio");
        assert_eq!(round(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn the_queues_serve_as_the_plain_rule_does() {
        let mut random = Random(11);
        for _ in 0..200 {
            let weights: Vec<u16> =
                (0..random.below(12)).map(|_| 1 + random.below(9) as u16).collect();
            assert_eq!(round(&weights), smooth_plainly(&weights), "{weights:?}");
        }
    }

    /// Pools of all kinds whose rounds are too long for a table.
    fn large_pools() -> Vec<Vec<u16>> {
        let mut random = Random(5);
        let any = (0..20).map(|_| {
            let (count, most) = (2 + random.below(1023), 1 + random.below(256));
            (0..count).map(|_| 1 + random.below(most) as u16).collect()
        });
        let all_weights = (0..1024).map(|it| 1 + it % WEIGHT_MAX).collect();
        let one_heavy = (0..1024).map(|it| if it == 700 { WEIGHT_MAX } else { 1 }).collect();
        let halves = (0..1000).map(|it| if it < 500 { 255 } else { 256 }).collect();
        let few = vec![256, 255, 254, 253, 251, 241, 239, 233, 229, 227];
        let everyone = (0..16_384).map(|it| 1 + it % WEIGHT_MAX).collect();
        let pools = any.chain([all_weights, one_heavy, halves, few, everyone]);
        pools.filter(|it| rotation(it).table.is_empty()).collect()
    }

    #[test]
    fn over_a_round_everyone_is_served_exactly_as_often_as_the_weight_says() {
        let pools = large_pools();
        assert!(pools.len() > 10);
        for weights in pools {
            let rotation = rotation(&weights);
            let divisor = weights.iter().fold(0, |so_far, weight| gcd(so_far, *weight));
            let mut served = vec![0; weights.len()];
            rotation.turns().for_each(|place| served[usize::from(place)] += 1);
            let due: Vec<u16> = weights.iter().map(|weight| weight / divisor).collect();
            assert_eq!(served, due, "{weights:?}");
        }
    }

    #[test]
    fn in_a_long_round_nobody_is_ever_far_from_the_share_that_is_due() {
        for weights in large_pools() {
            let rotation = rotation(&weights);
            let mut served = vec![0u64; weights.len()];
            let (all, mut worst) = (rotation.round(), 0.0f64);
            let share = |place: u16| f64::from(rotation.shares()[usize::from(place)].turns);
            for (turn, place) in (1u64..).zip(rotation.turns()) {
                served[usize::from(place)] += 1;
                let due = turn as f64 * share(place) / all as f64;
                worst = worst.max((served[usize::from(place)] as f64 - due).abs());
            }
            assert!(worst < 2.0, "{worst} turns off in {weights:?}");
        }
    }

    #[test]
    fn a_heavy_class_alternates_with_the_light_ones() {
        let mut weights = vec![1; 512];
        weights.extend([2; 1023]);
        let round: Vec<u16> = rotation(&weights).turns().collect();
        let is_light = |place: &u16| *place < 512;
        assert!(!round.windows(2).any(|pair| pair.iter().all(is_light)));
        assert!(round.windows(6).all(|six| six.iter().any(is_light)));
    }

    #[test]
    fn whoever_looks_on_meets_everyone_and_the_nearest_turns_first() {
        let mut pools = large_pools();
        pools.extend([vec![1], vec![5, 1, 1], vec![1; 1000], vec![3; 65], vec![7, 100, 250]]);
        for weights in pools {
            let rotation = rotation(&weights);
            for turn in [0, 1, 77, rotation.round() - 1, rotation.round(), u64::MAX] {
                let met: Vec<u16> = rotation.from_turn(turn).collect();
                let near = (0..rotation.round().min(LOOKS))
                    .map(|ahead| rotation.at((turn % rotation.round() + ahead) % rotation.round()));
                assert!(near.eq(met.iter().copied().take(LOOKS as usize)), "{weights:?} at {turn}");
                assert!(met.len() <= LOOKS as usize + weights.len(), "{} looks", met.len());
                let mut once = met;
                once.sort_unstable();
                once.dedup();
                assert!(once.into_iter().eq(0..weights.len() as u16), "{weights:?} at {turn}");
            }
        }
        assert_eq!(Rotation::default().from_turn(3).count(), 0);
    }

    #[test]
    fn what_is_kept_grows_with_the_pool_and_not_with_the_weights() {
        for weights in large_pools() {
            let rotation = rotation(&weights);
            let members: usize = rotation.classes.iter().map(|class| class.members.len()).sum();
            assert_eq!((members, rotation.shares.len()), (weights.len(), weights.len()));
        }
        assert!(round(&vec![1; 2048]).into_iter().eq(0..2048), "and equal ones need a table only");
    }

    #[test]
    fn a_quotient_of_floats_is_exact() {
        let mut random = Random(3);
        for _ in 0..200_000 {
            let divisor = 1 + random.below(1 << 22);
            let whole = random.below(1 << 22) * divisor;
            for number in
                [whole, whole + divisor - 1, whole.saturating_sub(1), random.below(1 << 45)]
            {
                assert_eq!(quotient(number, divisor), number / divisor, "{number} / {divisor}");
            }
        }
    }

    /// The rule taken literally: every claim is compared at every turn.
    fn smooth_plainly(weights: &[u16]) -> Vec<u16> {
        let divisor = weights.iter().fold(0, |so_far, weight| gcd(so_far, *weight)).max(1);
        let weights: Vec<i64> = weights.iter().map(|weight| i64::from(weight / divisor)).collect();
        let total: i64 = weights.iter().sum();
        let mut claims = vec![0; weights.len()];
        let mut served = Vec::new();
        for _ in 0..total {
            claims.iter_mut().zip(&weights).for_each(|(claim, weight)| *claim += weight);
            let largest = *claims.iter().max().unwrap();
            let first = claims.iter().position(|claim| *claim == largest).unwrap();
            claims[first] -= total;
            served.push(first as u16);
        }
        served
    }

    /// A seeded sequence (S. Vigna's splitmix64).
    pub struct Random(pub u64);

    impl Random {
        pub fn below(&mut self, limit: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) % limit
        }
    }
}
