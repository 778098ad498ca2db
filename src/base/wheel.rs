//! A timer wheel. Owns which timers are due at a given moment; knows no clock.
//!
//! A timer belongs to a place: the dense index of an entry in the caller's table, one timer each.
//! Memory is 16 bytes for every place ever used, whatever comes and goes, and there is no timer
//! handle that could become stale. The layout is the hierarchical wheel of Varghese and Lauck
//! ("Hashed and hierarchical timing wheels", SOSP 1987): setting, cancelling and firing are O(1), and
//! a timer moves down at most once per level.
//!
//! A table whose entries are touched by every message does not reset the timer each time. It records
//! the time of last use, and when the timer fires, it compares and schedules the remainder.

use std::time::Duration;

use super::time::Now;

/// A tick is 2^24 ns, 16.8 ms: a shift instead of a division, and fine enough for every timeout that
/// can be configured.
const TICK_BITS: u32 = 24;
/// The length of a tick: a timer fires less than this after its moment, and never before it.
pub const TICK: Duration = Duration::from_nanos(1 << TICK_BITS);

/// 64 slots per level, so that one word tells which are occupied.
const LEVEL_BITS: u32 = 6;
const SLOTS: usize = 1 << LEVEL_BITS;
const LEVELS: usize = 4;
/// 64^4 ticks are 78 hours. A timer beyond that waits in the last slot and is scheduled again from
/// there.
const HORIZON_TICKS: u64 = 1 << (LEVEL_BITS * LEVELS as u32);

/// The end of a list, and the predecessor of a timer that is not set.
const NONE: u32 = u32::MAX;
/// Marks a predecessor that is the head of a slot and not a timer.
const HEAD: u32 = 1 << 31;

/// Places run from 0 to this minus one.
pub const PLACES_MAX: u32 = HEAD;

/// A timer: an element of the doubly linked list of its slot.
#[derive(Clone, Copy)]
struct Timer {
    due_tick: u64,
    next: u32,
    before: u32,
}

const UNSET: Timer = Timer { due_tick: 0, next: NONE, before: NONE };

/// Timers of up to [`PLACES_MAX`] places.
pub struct Wheel {
    /// Everything due before this tick has been handed out.
    tick: u64,
    /// The current time as last passed to `pop`; `tick` lags behind it while due timers are handed
    /// out.
    now_tick: u64,
    set: usize,
    occupied: [u64; LEVELS],
    heads: [u32; LEVELS * SLOTS],
    timers: Vec<Timer>,
}

impl Wheel {
    /// An empty wheel that starts at `now`.
    pub fn new(now: Now) -> Wheel {
        Wheel {
            tick: now.nanos() >> TICK_BITS,
            now_tick: now.nanos() >> TICK_BITS,
            set: 0,
            occupied: [0; LEVELS],
            heads: [NONE; LEVELS * SLOTS],
            timers: Vec::new(),
        }
    }

    /// How many timers are set.
    pub fn len(&self) -> usize {
        self.set
    }

    pub fn is_empty(&self) -> bool {
        self.set == 0
    }

    /// Sets the timer of `place` to `at`, replacing its previous time. A time in the past counts as
    /// the next tick, so that a loop around [`Wheel::pop`] always terminates.
    pub fn schedule(&mut self, place: u32, at: Now) {
        assert!(place < PLACES_MAX, "a place is below {PLACES_MAX}");
        if place as usize >= self.timers.len() {
            self.timers.resize(place as usize + 1, UNSET);
        }
        let due_tick = at.nanos().div_ceil(1 << TICK_BITS).max(self.now_tick + 1);
        let timer = self.timers[place as usize];
        match timer.before {
            NONE => self.set += 1,
            _ if timer.due_tick == due_tick => return,
            _ => self.unlink(place),
        }
        self.insert(place, due_tick);
    }

    /// Cancels the timer of `place`, if one is set.
    pub fn cancel(&mut self, place: u32) {
        let Some(timer) = self.timers.get(place as usize) else { return };
        if timer.before != NONE {
            self.unlink(place);
            self.set -= 1;
        }
    }

    /// A place whose timer is due at `now`. The timer is no longer set and may be set again at once.
    /// Timers come in tick order, and in no particular order within a tick.
    pub fn pop(&mut self, now: Now) -> Option<u32> {
        self.now_tick = self.now_tick.max(now.nanos() >> TICK_BITS);
        loop {
            let place = self.heads[slot_of(0, self.tick)];
            if place != NONE {
                self.unlink(place);
                self.set -= 1;
                return Some(place);
            }
            if self.tick == self.now_tick {
                return None;
            }
            self.tick = self.next_tick().map_or(self.now_tick, |tick| tick.min(self.now_tick));
            self.cascade();
        }
    }

    /// When to call [`Wheel::pop`] next: never after the first timer is due, but possibly before it,
    /// at most once per level, when distant timers have to be moved down.
    pub fn next_deadline(&self) -> Option<Now> {
        let tick = match self.heads[slot_of(0, self.tick)] {
            NONE => self.next_tick()?,
            _ => self.tick,
        };
        Some(Now::from_nanos(tick.saturating_mul(1 << TICK_BITS)))
    }

    /// The first later tick at which an occupied slot of any level comes up.
    fn next_tick(&self) -> Option<u64> {
        (0..LEVELS).filter_map(|level| self.next_tick_of(level)).min()
    }

    fn next_tick_of(&self, level: usize) -> Option<u64> {
        let occupied = self.occupied[level];
        if occupied == 0 {
            return None;
        }
        let shift = LEVEL_BITS * level as u32;
        let turn = (self.tick >> shift) + 1;
        let ahead = occupied.rotate_right(turn as u32 % SLOTS as u32).trailing_zeros();
        Some((turn + u64::from(ahead)) << shift)
    }

    /// Redistributes the slots that begin at the current tick to the levels below.
    fn cascade(&mut self) {
        for level in (1..LEVELS).rev() {
            let below = (1u64 << (LEVEL_BITS * level as u32)) - 1;
            if self.tick & below != 0 {
                continue;
            }
            let slot = slot_of(level, self.tick);
            let mut place = std::mem::replace(&mut self.heads[slot], NONE);
            self.occupied[level] &= !bit_of(slot);
            while place != NONE {
                let Timer { due_tick, next, .. } = self.timers[place as usize];
                self.insert(place, due_tick);
                place = next;
            }
        }
    }

    fn insert(&mut self, place: u32, due_tick: u64) {
        let ticks_left = due_tick.saturating_sub(self.tick).min(HORIZON_TICKS - 1);
        let level = ((ticks_left | 1).ilog2() / LEVEL_BITS) as usize;
        let slot = slot_of(level, self.tick + ticks_left);
        let next = std::mem::replace(&mut self.heads[slot], place);
        if next != NONE {
            self.timers[next as usize].before = place;
        }
        self.timers[place as usize] = Timer { due_tick, next, before: HEAD | slot as u32 };
        self.occupied[level] |= bit_of(slot);
    }

    fn unlink(&mut self, place: u32) {
        let Timer { next, before, .. } = self.timers[place as usize];
        if before & HEAD == 0 {
            self.timers[before as usize].next = next;
        } else {
            let slot = (before & !HEAD) as usize;
            self.heads[slot] = next;
            if next == NONE {
                self.occupied[slot / SLOTS] &= !bit_of(slot);
            }
        }
        if next != NONE {
            self.timers[next as usize].before = before;
        }
        self.timers[place as usize] = UNSET;
    }
}

/// The slot in which a tick falls on a level, counted across all levels.
fn slot_of(level: usize, tick: u64) -> usize {
    level * SLOTS + (tick >> (LEVEL_BITS * level as u32)) as usize % SLOTS
}

fn bit_of(slot: usize) -> u64 {
    1 << (slot % SLOTS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::base::random::xorshift;

    const START: Now = Now::from_nanos(123_456_789_012_345);

    fn after(seconds: u64) -> Now {
        START.plus(Duration::from_secs(seconds))
    }

    fn popped(wheel: &mut Wheel, now: Now) -> Vec<u32> {
        let mut places: Vec<u32> = std::iter::from_fn(|| wheel.pop(now)).collect();
        places.sort_unstable();
        places
    }

    #[test]
    fn a_timer_fires_once_never_early_and_less_than_a_tick_late() {
        for seconds in [0, 1, 2, 60, 70, 3_600, 90_000, 300_000, 2_000_000] {
            let mut wheel = Wheel::new(START);
            let at = after(seconds);
            wheel.schedule(7, at);
            let just_before = Now::from_nanos(at.nanos() - 1);
            assert_eq!(wheel.pop(just_before), None, "{seconds} s, early");
            let latest = at.plus(TICK);
            assert_eq!(wheel.pop(latest), Some(7), "{seconds} s");
            assert_eq!(wheel.next_deadline(), None, "nothing is left to wake up for");
            assert_eq!(wheel.pop(latest.plus(Duration::from_secs(900_000))), None);
            assert!(wheel.is_empty());
        }
    }

    #[test]
    fn setting_again_and_cancelling_take_the_earlier_setting_back() {
        let mut wheel = Wheel::new(START);
        for place in 0..4 {
            wheel.schedule(place, after(10));
        }
        wheel.cancel(0);
        wheel.schedule(1, after(5));
        wheel.schedule(2, after(20));
        wheel.cancel(99);
        assert_eq!(wheel.len(), 3);
        assert_eq!(popped(&mut wheel, after(6)), [1]);
        assert_eq!(popped(&mut wheel, after(11)), [3]);
        assert_eq!(popped(&mut wheel, after(21)), [2]);
    }

    #[test]
    fn a_timer_that_is_set_to_the_time_it_has_already_fires_once() {
        for seconds in [1, 70, 90_000] {
            let mut wheel = Wheel::new(START);
            (0..3).for_each(|_| wheel.schedule(7, after(seconds)));
            assert_eq!(wheel.len(), 1);
            assert_eq!(popped(&mut wheel, after(seconds - 1)), [0u32; 0]);
            wheel.schedule(7, after(seconds));
            assert_eq!(popped(&mut wheel, after(seconds + 1)), [7]);
            assert!(wheel.is_empty());
        }
    }

    #[test]
    fn a_timer_that_is_set_again_while_popping_waits_for_the_next_tick() {
        let mut wheel = Wheel::new(START);
        wheel.schedule(1, START);
        let now = after(1);
        assert_eq!(wheel.pop(now), Some(1));
        wheel.schedule(1, START);
        assert_eq!(wheel.pop(now), None);
        assert_eq!(wheel.pop(now.plus(TICK)), Some(1));
    }

    #[test]
    fn the_next_deadline_is_reached_in_few_steps_and_never_missed() {
        let mut wheel = Wheel::new(START);
        assert_eq!(wheel.next_deadline(), None);
        wheel.schedule(3, after(200_000));
        let mut wake_ups = 0;
        loop {
            let deadline = wheel.next_deadline().unwrap();
            assert!(deadline < after(200_000).plus(TICK));
            wake_ups += 1;
            if wheel.pop(deadline).is_some() {
                break;
            }
        }
        assert!(wake_ups <= LEVELS, "{wake_ups} wake-ups for one timer");
    }

    #[test]
    fn timers_in_one_slot_can_be_cancelled_from_the_front_the_middle_and_the_end() {
        for gone in 0..5 {
            let mut wheel = Wheel::new(START);
            (0..5).for_each(|place| wheel.schedule(place, after(1)));
            wheel.cancel(gone);
            let left: Vec<u32> = (0..5).filter(|place| *place != gone).collect();
            assert_eq!(popped(&mut wheel, after(2)), left);
        }
    }

    #[test]
    fn the_wheel_agrees_with_a_sorted_map_over_many_random_steps() {
        let mut random = xorshift(0x9e37_79b9_7f4a_7c15);
        let mut wheel = Wheel::new(START);
        let mut model: BTreeMap<u32, u64> = BTreeMap::new();
        let mut now = START;
        for _ in 0..100_000 {
            let place = random(200) as u32;
            match random(8) {
                0..=2 => {
                    let bits = random(34);
                    let far = Duration::from_millis(random(1 << bits));
                    wheel.schedule(place, now.plus(far));
                    let due_tick = now.plus(far).nanos().div_ceil(1 << TICK_BITS);
                    model.insert(place, due_tick.max((now.nanos() >> TICK_BITS) + 1));
                }
                3 => {
                    wheel.cancel(place);
                    model.remove(&place);
                }
                4 => {
                    // To the deadline exactly, as a worker sleeps.
                    let Some(deadline) = wheel.next_deadline() else { continue };
                    let first_due = model.values().min().expect("the wheel has a timer");
                    assert!(deadline.nanos() >> TICK_BITS <= *first_due);
                    now = now.max(deadline);
                }
                _ => {
                    let bits = random(22);
                    now = now.plus(Duration::from_millis(random(1 << bits)));
                }
            }
            let now_tick = now.nanos() >> TICK_BITS;
            let due: Vec<u32> = model
                .iter()
                .filter(|(_, due)| **due <= now_tick)
                .map(|(place, _)| *place)
                .collect();
            model.retain(|_, due| *due > now_tick);
            assert_eq!(popped(&mut wheel, now), due);
            assert_eq!(wheel.len(), model.len());
            assert_eq!(wheel.next_deadline().is_none(), model.is_empty());
        }
    }
}
