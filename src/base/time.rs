//! Time as a value. Owns the one place that reads the monotonic clock; pure modules get a [`Now`]
//! handed in and never call [`Now::read`]. What the wall clock says is derived from that, and follows the
//! wall clock when it is set.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often reading the clock also looks at the wall clock, in nanoseconds: a fraction of the second that
/// `Date` shows, and nothing beside the turns of a busy worker.
const LOOK_EVERY: u64 = 250_000_000;
/// The wall clock was set when it differs from what is derived by more than this, in milliseconds. Both clocks
/// run at one rate, so what is less is how two readings missed each other: what began at one moment must not
/// be shown at two.
const STEP_MIN_MS: u64 = 100;
/// Two readings of one clock around that of the other, between which more time passed than this, say too
/// little: the thread was not running.
const GAP_MAX: Duration = Duration::from_millis(10);

/// A moment on the monotonic clock, in nanoseconds since the process first looked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Now(u64);

impl Now {
    /// A moment by its nanoseconds: for tests and simulations, and for values read back from a table.
    pub const fn from_nanos(nanos: u64) -> Now {
        Now(nanos)
    }

    /// Nanoseconds since the process first looked at the clock.
    pub const fn nanos(self) -> u64 {
        self.0
    }

    /// Reads the clock. Only shells call this; decisions take the value as an argument.
    pub fn read() -> Now {
        clock().read()
    }

    /// This moment, later by `by`; stops at the end of time instead of wrapping.
    pub const fn plus(self, by: Duration) -> Now {
        let nanos = by.as_nanos();
        if nanos > u64::MAX as u128 {
            Now(u64::MAX)
        } else {
            Now(self.0.saturating_add(nanos as u64))
        }
    }

    /// This moment, earlier by `by`; stops at the beginning of time.
    pub fn minus(self, by: Duration) -> Now {
        Now(self.0.saturating_sub(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub const fn since(self, earlier: Now) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The wall-clock time of this moment, in milliseconds since 1970, by the wall clock as it stands: of a
    /// moment before it was set, this is what it should have shown then.
    pub fn unix_ms(self) -> u64 {
        let ahead = clock().ahead_ms.load(Ordering::Relaxed);
        (self.0 / 1_000_000).saturating_add_signed(ahead)
    }
}

/// Both clocks of the process.
struct Clock {
    origin: Instant,
    /// What the wall clock showed at the origin, as it stands now, in milliseconds since 1970.
    ahead_ms: AtomicI64,
    /// When to look at the wall clock again.
    look_at: AtomicU64,
}

impl Clock {
    fn read(&self) -> Now {
        let now = self.elapsed();
        if now.0 >= self.look_at.load(Ordering::Relaxed) {
            self.look(now);
        }
        now
    }

    fn elapsed(&self) -> Now {
        Now(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
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

/// How far the wall clock is ahead when it was set: read between two moments, and not where `known` has it.
fn stepped(known: i64, before: Now, unix_ms: i64, after: Now) -> Option<i64> {
    let ahead = unix_ms.saturating_sub((before.0 / 1_000_000) as i64);
    let certain = after.since(before) <= GAP_MAX;
    (certain && ahead.abs_diff(known) > STEP_MIN_MS).then_some(ahead)
}

fn clock() -> &'static Clock {
    static CLOCK: OnceLock<Clock> = OnceLock::new();
    CLOCK.get_or_init(|| Clock {
        ahead_ms: AtomicI64::new(unix_ms()),
        origin: Instant::now(),
        look_at: AtomicU64::new(LOOK_EVERY),
    })
}

/// The wall clock; 1970 when it is set before that.
fn unix_ms() -> i64 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(unix.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
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
            origin: Instant::now(),
            ahead_ms: AtomicI64::new(unix_ms() - 48 * 3_600_000),
            look_at: AtomicU64::new(0),
        };
        let end = Instant::now() + Duration::from_secs(10);
        let off = || clock.ahead_ms.load(Ordering::Relaxed).abs_diff(unix_ms());
        while off() > 20_000 {
            assert!(Instant::now() < end, "it is off by {} ms", off());
            assert!(clock.look_at.load(Ordering::Relaxed) <= clock.read().0 + LOOK_EVERY);
        }
    }

    #[test]
    fn the_clock_moves_forward() {
        let before = Now::read();
        assert!(Now::read() >= before);
    }
}
