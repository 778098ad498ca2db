//! When each request of an open-loop run is due: request `n` of a rate at its own moment, whatever
//! happened to those before it. Owns the schedule and how late it was kept; reads no clock.

use std::time::Duration;

use crate::base::time::Now;

/// A generator that sends one request in a hundred later than this measures itself.
pub const LAG_MAX: Duration = Duration::from_millis(1);

const NANOS: u128 = 1_000_000_000;

/// A fixed rate from a moment on, divided among several threads: thread `place` of `threads` takes
/// every `threads`-th request, so that all of them together keep the rate.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    start: Now,
    /// Requests per second, over all threads.
    rate: u64,
    threads: u64,
    /// The next request of this thread, numbered across all threads.
    next: u64,
}

impl Plan {
    /// A plan of at least one request a second.
    pub fn new(start: Now, rate: u64, place: usize, threads: usize) -> Plan {
        assert!(rate > 0 && place < threads, "a plan has a rate and a thread of its own");
        Plan { start, rate, threads: threads as u64, next: place as u64 }
    }

    /// When this thread's next request is due.
    pub fn due(&self) -> Now {
        // Computed from the number, not by adding intervals, so that rounding errors never add up.
        let nanos = u128::from(self.next) * NANOS / u128::from(self.rate);
        self.start.plus(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// Takes the next request if it is due; returns the moment for which it was planned.
    pub fn take(&mut self, now: Now) -> Option<Now> {
        let due = self.due();
        if due > now {
            return None;
        }
        self.next += self.threads;
        Some(due)
    }

    /// Requests of this thread that were due by `now` and have not been taken.
    pub fn overdue(&self, now: Now) -> u64 {
        let elapsed = now.since(self.start).as_nanos();
        // Request n is due when n * NANOS / rate, rounded down, has passed.
        let due_all = ((elapsed + 1) * u128::from(self.rate)).div_ceil(NANOS);
        let due_all = u64::try_from(due_all).unwrap_or(u64::MAX);
        due_all.saturating_sub(self.next).div_ceil(self.threads)
    }
}

/// How much of a request's delay was the generator's own: counted from when it was due and a
/// connection was free for it.
pub fn lag(due: Now, free_since: Now, now: Now) -> Duration {
    now.since(due.max(free_since))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(nanos: u64) -> Now {
        Now::from_nanos(nanos)
    }

    #[test]
    fn requests_are_due_at_their_own_moments() {
        let mut plan = Plan::new(at(1_000), 3, 0, 1);
        let dues: Vec<u64> =
            (0..4).map(|_| plan.take(at(u64::MAX)).map_or(0, Now::nanos)).collect();
        assert_eq!(dues, [1_000, 333_334_333, 666_667_666, 1_000_001_000]);
    }

    #[test]
    fn nothing_is_taken_before_it_is_due() {
        let mut plan = Plan::new(at(0), 1_000, 0, 1);
        assert_eq!(plan.take(at(0)), Some(at(0)));
        assert_eq!(plan.take(at(999_999)), None);
        assert_eq!(plan.take(at(1_000_000)), Some(at(1_000_000)));
    }

    #[test]
    fn a_stall_moves_no_due_moment() {
        let mut plan = Plan::new(at(0), 1_000, 0, 1);
        let late = at(5_000_000);
        let taken: Vec<_> = std::iter::from_fn(|| plan.take(late)).collect();
        assert_eq!(taken.len(), 6);
        assert_eq!(taken[1], at(1_000_000));
    }

    #[test]
    fn threads_share_the_rate() {
        let mut all: Vec<_> = (0..3)
            .flat_map(|place| {
                let mut plan = Plan::new(at(0), 1_000, place, 3);
                std::iter::from_fn(move || plan.take(at(9_500_000))).collect::<Vec<_>>()
            })
            .collect();
        all.sort();
        let one: Vec<_> = (0..10).map(|number| at(number * 1_000_000)).collect();
        assert_eq!(all, one);
    }

    #[test]
    fn overdue_counts_what_take_would_give() {
        for rate in [1, 7, 1_000, 333_333] {
            for place in 0..3 {
                for nanos in [0, 1, 999_999, 1_000_000, 2_345_678_901] {
                    let mut plan = Plan::new(at(0), rate, place, 3);
                    let overdue = plan.overdue(at(nanos));
                    let taken = std::iter::from_fn(|| plan.take(at(nanos))).count() as u64;
                    assert_eq!(overdue, taken, "rate {rate}, place {place}, {nanos} ns");
                }
            }
        }
    }

    #[test]
    fn waiting_for_a_free_connection_is_not_the_generators_lag() {
        assert_eq!(lag(at(100), at(50), at(130)), Duration::from_nanos(30));
        assert_eq!(lag(at(100), at(125), at(130)), Duration::from_nanos(5));
    }
}
