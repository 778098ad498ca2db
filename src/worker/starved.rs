//! Flows that wait for blocks, the longest waiting first. Owns their order, how many are fed in a
//! turn, and when they try again even if no block has come back; the attempt itself is up to their
//! owner.

use std::collections::VecDeque;
use std::time::Duration;

use crate::base::time::Now;
use crate::ring::pool::Pool;

/// The most waiting flows that one turn feeds.
pub const FED_MAX: usize = 64;
/// How long a flow waits before it tries again of its own accord: all blocks that came back may have
/// been posted before anything was known to wait for them.
pub const WAIT_MAX: Duration = Duration::from_millis(100);

/// What one turn feeds.
pub struct Relief {
    /// How many were fed, not counting those that had ended.
    pub fed: usize,
    /// How many may try even though no block is known to be free.
    overdue: usize,
}

/// Flows that wait for blocks.
pub struct Starved<T> {
    queue: VecDeque<T>,
    /// When the first of them began to wait, or when they last tried again of their own accord.
    since: Now,
}

impl<T> Starved<T> {
    pub const fn new(now: Now) -> Starved<T> {
        Starved { queue: VecDeque::new(), since: now }
    }

    /// Reserves memory for `count` to wait at once. Called when connections come, so that
    /// [`Starved::push`], in the middle of relaying, allocates nothing.
    pub fn make_room(&mut self, count: usize) {
        self.queue.reserve(count.saturating_sub(self.queue.len()));
    }

    /// `who` waits from now on. When there is no room left, those that ended while waiting are
    /// removed: those for which `is_alive` is false.
    pub fn push(&mut self, now: Now, who: T, is_alive: impl FnMut(&T) -> bool) {
        if self.queue.is_empty() {
            self.since = now;
        }
        if self.queue.len() == self.queue.capacity() {
            self.queue.retain(is_alive);
        }
        debug_assert!(self.queue.len() < self.queue.capacity(), "room was made for all who live");
        self.queue.push_back(who);
    }

    /// Begins a turn's feeding.
    pub fn relief(&mut self, now: Now) -> Relief {
        Relief { fed: 0, overdue: self.overdue(now) }
    }

    /// The flow to feed next, the one waiting longest; `None` once the turn has fed enough, or no block is
    /// free and nothing is overdue.
    pub fn next(&mut self, relief: &Relief, now: Now, pool: &Pool) -> Option<T> {
        let may = relief.fed < FED_MAX && (relief.fed < relief.overdue || pool.has_reserve());
        let next = if may { self.queue.pop_front() } else { None };
        if next.is_none() && pool.has_reserve() {
            self.hurry(now);
        }
        next
    }

    /// Nobody waits any more: all of them are fed by other means.
    pub fn clear(&mut self) {
        self.queue.clear();
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// When to try again even if no block has come back.
    pub fn next_try(&self) -> Option<Now> {
        (!self.is_empty()).then(|| self.since.plus(WAIT_MAX))
    }

    /// Blocks are left, and more flows wait than one turn feeds: the next turn must feed at once.
    fn hurry(&mut self, now: Now) {
        self.since = Now::from_nanos(now.nanos().saturating_sub(WAIT_MAX.as_nanos() as u64));
    }

    /// How many must try now even though no block has come back; the wait then begins anew.
    fn overdue(&mut self, now: Now) -> usize {
        if self.next_try().is_none_or(|due| now < due) {
            return 0;
        }
        self.since = now;
        self.queue.len().min(FED_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_nanos(1_000_000_000);

    #[test]
    fn who_has_to_wait_takes_no_memory() {
        let mut starved = Starved::new(START);
        starved.make_room(8);
        let room = starved.queue.capacity();
        (0..room).for_each(|who| starved.push(START, who, |_| true));
        assert_eq!(starved.queue.capacity(), room);
    }

    #[test]
    fn those_who_ended_make_room_for_those_who_live() {
        let mut starved = Starved::new(START);
        starved.make_room(8);
        let room = starved.queue.capacity();
        (0..room).for_each(|who| starved.push(START, who, |_| true));
        starved.push(START, room, |who| who % 2 == 0);
        assert_eq!(starved.queue.capacity(), room);
        assert_eq!(starved.queue.pop_front(), Some(0));
        assert_eq!(starved.queue.pop_front(), Some(2));
    }

    #[test]
    fn a_turn_feeds_a_bounded_number_and_the_next_goes_on_at_once() {
        let pool = Pool::new(16, 4);
        let mut starved = Starved::new(START);
        starved.make_room(2 * FED_MAX);
        (0..FED_MAX + 5).for_each(|who| starved.push(START, who, |_| true));
        let now = START.plus(Duration::from_millis(1));
        let mut fed = Vec::new();
        let mut relief = starved.relief(now);
        while let Some(who) = starved.next(&relief, now, &pool) {
            // The first had ended while it waited.
            relief.fed += usize::from(who > 0);
            fed.push(who);
        }
        assert_eq!(fed, (0..=FED_MAX).collect::<Vec<_>>());
        assert_eq!(starved.next_try(), Some(now));
    }

    #[test]
    fn without_blocks_only_those_are_fed_whose_time_has_come() {
        let pool = Pool::new(0, 4);
        let mut starved = Starved::new(START);
        starved.make_room(2);
        starved.push(START, 'a', |_| true);
        let relief = starved.relief(START);
        assert_eq!(starved.next(&relief, START, &pool), None);
        let due = START.plus(WAIT_MAX);
        assert_eq!(starved.next_try(), Some(due));
        let relief = starved.relief(due);
        assert_eq!(starved.next(&relief, due, &pool), Some('a'));
    }

    #[test]
    fn more_than_one_turn_feeds_are_fed_without_a_pause() {
        let mut starved = Starved::new(START);
        starved.make_room(2);
        starved.push(START, 'a', |_| true);
        starved.hurry(START);
        assert_eq!(starved.next_try(), Some(START));
        assert_eq!(starved.overdue(START), 1);
        assert_eq!(starved.next_try(), Some(START.plus(WAIT_MAX)));
    }

    #[test]
    fn they_try_again_when_the_first_has_waited_long_and_then_once_in_that_time() {
        let mut starved = Starved::new(START);
        starved.make_room(2);
        assert_eq!(starved.next_try(), None);
        let half = WAIT_MAX / 2;
        starved.push(START, 'a', |_| true);
        starved.push(START.plus(half), 'b', |_| true);
        assert_eq!(starved.next_try(), Some(START.plus(WAIT_MAX)));
        assert_eq!(starved.overdue(START.plus(half)), 0);
        assert_eq!(starved.overdue(START.plus(WAIT_MAX)), 2);
        assert_eq!(starved.overdue(START.plus(WAIT_MAX)), 0);
        assert_eq!(starved.next_try(), Some(START.plus(WAIT_MAX).plus(WAIT_MAX)));
    }
}
