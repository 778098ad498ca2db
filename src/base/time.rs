//! Time as a value. Owns the one place that reads the monotonic clock; pure modules are handed a
//! [`Now`] and never call [`Now::read`]. Wall-clock time is derived from it, and follows when the
//! wall clock is set.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// How often a reading of the clock also checks the wall clock, in nanoseconds: a fraction of the
/// second that `Date` shows, and negligible next to the turns of a busy worker.
const LOOK_EVERY: u64 = 250_000_000;
/// The smallest difference from the derived time that counts as the wall clock having been set, in
/// milliseconds. Both clocks run at the same rate, so a smaller difference is only the error of two
/// readings, and following it would show one moment as two.
const STEP_MIN_MS: u64 = 100;
/// The wall clock is read between two readings of the monotonic one. If those are further apart than
/// this, the thread was not running in between, and the result is too imprecise to use.
const GAP_MAX: Duration = Duration::from_millis(10);

/// A moment on the monotonic clock (`CLOCK_MONOTONIC`, clock_gettime(2)), in nanoseconds since the
/// process first read it, or since the origin that it has inherited.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Now(u64);

impl Now {
    /// Later than anything that is planned: a deadline that has not been set.
    pub const NEVER: Now = Now(u64::MAX);

    /// A moment from its nanoseconds: for tests and simulations, and for values read back from a
    /// table.
    pub const fn from_nanos(nanos: u64) -> Now {
        Now(nanos)
    }

    /// Nanoseconds since the origin.
    pub const fn nanos(self) -> u64 {
        self.0
    }

    /// Counts from this origin, so that the moments of the process it comes from mean the same here; see
    /// [`Now::origin`].
    ///
    /// # Errors
    /// The clock has been read already: moments from before would mean something else.
    pub fn inherit(origin: u64) -> Result<(), TooLate> {
        CLOCK.set(Clock::from(origin)).map_err(|_| TooLate)
    }

    /// What the monotonic clock of this host showed at the moment zero, in nanoseconds.
    pub fn origin() -> u64 {
        clock().origin
    }

    /// Reads the clock. Only shells call this; decisions take the value as an argument.
    pub fn read() -> Now {
        clock().read()
    }

    /// This moment plus `by`; saturates instead of wrapping.
    pub const fn plus(self, by: Duration) -> Now {
        let nanos = by.as_nanos();
        if nanos > u64::MAX as u128 {
            Now(u64::MAX)
        } else {
            Now(self.0.saturating_add(nanos as u64))
        }
    }

    /// This moment minus `by`; saturates at zero.
    pub fn minus(self, by: Duration) -> Now {
        Now(self.0.saturating_sub(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The time since `earlier`; zero if that is in the future.
    pub const fn since(self, earlier: Now) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This moment as wall-clock time, in milliseconds since 1970, according to the wall clock as it
    /// is set now. For a moment before it was last set, this is what it should have shown then.
    pub fn unix_ms(self) -> u64 {
        let ahead = clock().ahead_ms.load(Ordering::Relaxed);
        (self.0 / 1_000_000).saturating_add_signed(ahead)
    }

    /// The same in whole seconds, as certificates count time.
    pub fn unix_seconds(self) -> i64 {
        (self.unix_ms() / 1000) as i64
    }
}

/// The clock has been read already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooLate;

/// Both clocks of the process.
#[derive(Debug)]
struct Clock {
    /// What the monotonic clock showed at the moment zero, in nanoseconds.
    origin: u64,
    /// What the wall clock, as it is set now, would have shown at the origin, in milliseconds since
    /// 1970.
    ahead_ms: AtomicI64,
    /// When to check the wall clock again.
    look_at: AtomicU64,
}

static CLOCK: OnceLock<Clock> = OnceLock::new();

impl Clock {
    fn from(origin: u64) -> Clock {
        let clock =
            Clock { origin, ahead_ms: AtomicI64::new(0), look_at: AtomicU64::new(LOOK_EVERY) };
        let elapsed = clock.elapsed();
        let ahead = unix_ms().saturating_sub((elapsed.0 / 1_000_000) as i64);
        clock.ahead_ms.store(ahead, Ordering::Relaxed);
        clock.look_at.store(elapsed.0.saturating_add(LOOK_EVERY), Ordering::Relaxed);
        clock
    }

    fn read(&self) -> Now {
        let now = self.elapsed();
        if now.0 >= self.look_at.load(Ordering::Relaxed) {
            self.look(now);
        }
        now
    }

    fn elapsed(&self) -> Now {
        Now(monotonic_nanos().saturating_sub(self.origin))
    }

    #[cold]
    fn look(&self, before: Now) {
        self.look_at.store(before.0.saturating_add(LOOK_EVERY), Ordering::Relaxed);
        let unix_ms = unix_ms();
        let known = self.ahead_ms.load(Ordering::Relaxed);
        if let Some(ahead) = stepped(known, before, unix_ms, self.elapsed()) {
            self.ahead_ms.store(ahead, Ordering::Relaxed);
        }
    }
}

/// The new offset of the wall clock if it has been set: if the reading between `before` and `after`
/// is precise enough and differs from `known`.
fn stepped(known: i64, before: Now, unix_ms: i64, after: Now) -> Option<i64> {
    let ahead = unix_ms.saturating_sub((before.0 / 1_000_000) as i64);
    let certain = after.since(before) <= GAP_MAX;
    (certain && ahead.abs_diff(known) > STEP_MIN_MS).then_some(ahead)
}

fn clock() -> &'static Clock {
    CLOCK.get_or_init(|| Clock::from(monotonic_nanos()))
}

fn monotonic_nanos() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    (time.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec() as u64)
}

/// The wall clock; 1970 if it is set to an earlier time.
fn unix_ms() -> i64 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(unix.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_moment_never_wraps() {
        let last = Now::from_nanos(u64::MAX);
        assert_eq!(last.plus(Duration::from_secs(1)), last);
        assert_eq!(Now::from_nanos(5).since(Now::from_nanos(9)), Duration::ZERO);
        assert_eq!(Now::from_nanos(5).plus(Duration::MAX), last);
        assert_eq!(Now::from_nanos(5).minus(Duration::from_nanos(2)), Now::from_nanos(3));
        assert_eq!(Now::from_nanos(5).minus(Duration::MAX), Now::default());
    }

    #[test]
    fn a_wall_clock_that_was_set_is_followed_and_one_that_was_not_is_left_alone() {
        let second = |count: u64| Now::from_nanos(count * 1_000_000_000);
        let soon = second(5).plus(Duration::from_millis(1));
        let late = second(5).plus(Duration::from_millis(11));
        for (unix_ms, after, wanted) in [
            (1_005_000, soon, None),
            (1_005_100, soon, None),
            (1_004_900, soon, None),
            (1_005_101, soon, Some(1_000_101)),
            (1_004_899, soon, Some(999_899)),
            (173_805_000, soon, Some(173_800_000)),
            (0, soon, Some(-5_000)),
            (173_805_000, late, None),
        ] {
            assert_eq!(stepped(1_000_000, second(5), unix_ms, after), wanted, "{unix_ms}");
        }
    }

    #[test]
    fn reading_the_clock_notices_that_the_wall_clock_was_set() {
        let clock = Clock {
            ahead_ms: AtomicI64::new(unix_ms() - 48 * 3_600_000),
            look_at: AtomicU64::new(0),
            ..Clock::from(monotonic_nanos())
        };
        let end = Instant::now() + Duration::from_secs(10);
        let off = || clock.ahead_ms.load(Ordering::Relaxed).abs_diff(unix_ms());
        while off() > 20_000 {
            assert!(Instant::now() < end, "it is off by {} ms", off());
            assert!(clock.look_at.load(Ordering::Relaxed) <= clock.read().0 + LOOK_EVERY);
        }
    }

    #[test]
    fn an_inherited_origin_gives_every_moment_the_meaning_that_it_had() {
        // The host may have been started a minute ago.
        let ago = Duration::from_nanos(monotonic_nanos() / 2);
        let first = Clock::from(monotonic_nanos().saturating_sub(ago.as_nanos() as u64));
        let before = first.read();
        let heir = Clock::from(first.origin);
        let after = heir.read();
        assert!(before >= Now::default().plus(ago) && after >= before);
        assert!(after.since(before) < ago, "it does not begin anew");
        let wall = |clock: &Clock| clock.ahead_ms.load(Ordering::Relaxed);
        assert!(wall(&first).abs_diff(wall(&heir)) < STEP_MIN_MS);
        assert!(heir.look_at.load(Ordering::Relaxed) > before.0, "a wall clock just read is known");
        Now::read();
        assert_eq!(Now::inherit(first.origin), Err(TooLate));
        assert!(Now::read().nanos() <= monotonic_nanos() - Now::origin());
    }

    #[test]
    fn the_clock_moves_forward() {
        let before = Now::read();
        assert!(Now::read() >= before);
    }
}
