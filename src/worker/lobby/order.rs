//! Whose handshake is next, and how many in one turn. Owns the queue of users whose ClientHello has come,
//! and the budget that keeps handshakes from holding up those who are served already: after each of them the
//! others have twice its time, unless there is nothing to do for them. Knows no user and no socket.

use std::collections::VecDeque;
use std::time::Duration;

use crate::base::time::Now;
use crate::worker::slots::Key;

/// The work on handshakes in one turn of the worker, in handshakes with an elliptic curve: about half a
/// millisecond, in which nobody else is served. One that costs more by itself is made all the same.
const UNITS_A_TURN: u32 = 4;
/// What is done for others before the next handshakes, for each with an elliptic curve that was made: so many
/// completions take about twice the time, 240 us. So users who are served keep two thirds of the worker,
/// however many come, and those who come have the rest and whatever the others leave.
const COMPLETIONS_A_UNIT: u32 = 60;
/// Once the first in the queue has waited for this long, the newest are served first: a queue that is
/// longer than its users' patience would otherwise serve only those who have left.
const TURNS_ROUND_AFTER: Duration = Duration::from_millis(500);

/// The queue.
#[derive(Default)]
pub struct Order {
    waiting: VecDeque<Ready>,
    /// Of the budget of this turn.
    spent: u32,
    /// Of that, for the last.
    last: u32,
    /// What is still to be done for others before the next, in completions.
    owed: u32,
}

/// A user whose ClientHello has come.
#[derive(Clone, Copy, Debug)]
struct Ready {
    key: Key,
    since: Now,
    /// Of the handshake, in those with an elliptic curve.
    cost: u32,
}

impl Order {
    pub fn put(&mut self, key: Key, since: Now, cost: u32) {
        self.waiting.push_back(Ready { key, since, cost });
    }

    /// Begins a turn. `others`: what there was to do for others since the last one, in completions.
    pub fn turn(&mut self, others: u32) {
        self.spent = 0;
        self.owed = if others == 0 { 0 } else { self.owed.saturating_sub(others) };
    }

    /// Who is next in this turn, if there is time for anyone.
    pub fn next(&mut self, now: Now) -> Option<Key> {
        let first = self.waiting.front()?;
        let is_late = now.since(first.since) >= TURNS_ROUND_AFTER;
        let next = *if is_late { self.waiting.back()? } else { first };
        let has_time = match self.spent {
            0 => self.owed == 0,
            spent => spent + next.cost <= UNITS_A_TURN,
        };
        if !has_time {
            return None;
        }
        self.spend(next.cost);
        self.last = next.cost;
        let next = if is_late { self.waiting.pop_back() } else { self.waiting.pop_front() };
        next.map(|ready| ready.key)
    }

    /// What the last one has really cost, which may be more than was known before.
    pub fn has_cost(&mut self, cost: u32) {
        self.spend(cost.saturating_sub(self.last));
    }

    fn spend(&mut self, cost: u32) {
        self.spent += cost;
        self.owed += cost * COMPLETIONS_A_UNIT;
    }

    /// Drops those at either end who have gone: they cost nothing, and how long they have waited is no measure.
    /// One in the middle comes to the front within the patience of those before it.
    pub fn forget(&mut self, is_gone: impl Fn(Key) -> bool) {
        while self.waiting.front().is_some_and(|ready| is_gone(ready.key)) {
            self.waiting.pop_front();
        }
        while self.waiting.back().is_some_and(|ready| is_gone(ready.key)) {
            self.waiting.pop_back();
        }
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(place: u32) -> Key {
        Key { place, generation: 0 }
    }

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    /// A turn in which there is nothing to do for others.
    fn turn(order: &mut Order, now: Now) -> Vec<u32> {
        order.turn(0);
        std::iter::from_fn(|| order.next(now)).map(|key| key.place).collect()
    }

    #[test]
    fn a_turn_makes_as_many_handshakes_as_its_budget_and_at_least_one() {
        let mut order = Order::default();
        for (place, cost) in [(0, 1), (1, 3), (2, 2), (3, 1), (4, 9), (5, 1), (6, 4)] {
            order.put(key(place), at(0), cost);
        }
        let turns: Vec<_> = (0..5).map(|ms| turn(&mut order, at(ms))).collect();
        assert_eq!(turns, [vec![0, 1], vec![2, 3], vec![4], vec![5], vec![6]]);
        assert!(order.is_empty() && turn(&mut order, at(9)).is_empty());
    }

    #[test]
    fn after_a_handshake_others_have_their_time_unless_there_is_nothing_to_do_for_them() {
        let mut order = Order::default();
        (0..9).for_each(|place| order.put(key(place), at(0), 4));
        let mut turn = |others: u32| {
            order.turn(others);
            std::iter::from_fn(|| order.next(at(0))).map(|key| key.place).collect::<Vec<_>>()
        };
        let whole = 4 * COMPLETIONS_A_UNIT;
        assert_eq!(turn(7), [0], "nobody is owed anything at first");
        assert_eq!((turn(1), turn(whole - 2), turn(1)), (vec![], vec![], vec![1]));
        assert_eq!((turn(1), turn(0)), (vec![], vec![2]), "they have nothing to do");
        assert_eq!((turn(0), turn(0), turn(1)), (vec![3], vec![4], vec![]));
        assert_eq!(turn(whole - 1), [5], "what was made meanwhile is owed to nobody");
    }

    #[test]
    fn what_a_handshake_really_cost_counts() {
        let mut order = Order::default();
        (0..3).for_each(|place| order.put(key(place), at(0), 1));
        order.turn(0);
        assert!(order.next(at(0)).is_some());
        order.has_cost(8);
        assert!(order.next(at(0)).is_none(), "the turn's time is spent");
        order.turn(0);
        assert!(order.next(at(0)).is_some());
        order.has_cost(1);
        assert!(order.next(at(0)).is_some());
    }

    #[test]
    fn those_who_have_gone_neither_pile_up_nor_turn_the_queue_round() {
        let mut order = Order::default();
        (0..4).for_each(|place| order.put(key(place), at(0), 8));
        order.put(key(4), at(700), 8);
        order.put(key(5), at(701), 8);
        order.put(key(6), at(701), 8);
        order.forget(|key| key.place < 4 || key.place == 6);
        assert_eq!(order.waiting.len(), 2);
        assert_eq!(turn(&mut order, at(702)), [4], "nobody has waited for long");
        order.forget(|_| true);
        assert!(order.is_empty());
    }

    #[test]
    fn the_newest_are_first_once_the_oldest_has_waited_too_long() {
        let mut order = Order::default();
        for place in 0..4 {
            order.put(key(place), at(u64::from(place)), 8);
        }
        assert_eq!(turn(&mut order, at(499)), [0]);
        assert_eq!(turn(&mut order, at(501)), [3]);
        order.put(key(4), at(502), 8);
        assert_eq!(turn(&mut order, at(503)), [4]);
        assert_eq!((turn(&mut order, at(504)), turn(&mut order, at(505))), (vec![2], vec![1]));
        order.put(key(5), at(506), 8);
        order.put(key(6), at(507), 8);
        assert_eq!(turn(&mut order, at(508)), [5], "in time again");
    }
}
