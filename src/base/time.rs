//! Time as a value. Owns the one place that reads the monotonic clock; pure modules get a [`Now`]
//! handed in and never call [`Now::read`].

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A wall clock that differs by less than this from where it was is taken for the same: two clocks cannot
/// be read at one moment, and what is shown as a start must not tremble.
const STEP_MS_MIN: u64 = 20;
/// Two looks at the monotonic clock further apart than this were interrupted.
const INTERRUPTED: Duration = Duration::from_millis(1);

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
        Now(u64::try_from(origin().0.elapsed().as_nanos()).unwrap_or(u64::MAX))
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

    /// How long after `earlier` this is; zero when it is not after it.
    pub const fn since(self, earlier: Now) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The wall-clock time of this moment, in milliseconds since 1970, by the clock as it stands now: it
    /// may have been set right since the moment was noted. For what is shown, never for durations.
    pub fn unix_ms(self) -> u64 {
        unix_origin().saturating_add(self.0 / 1_000_000)
    }
}

/// Where both clocks were when the process first looked, the wall clock by how it stands since then.
fn origin() -> &'static (Instant, AtomicU64) {
    static ORIGIN: OnceLock<(Instant, AtomicU64)> = OnceLock::new();
    ORIGIN.get_or_init(|| (Instant::now(), AtomicU64::new(wall_ms())))
}

fn wall_ms() -> u64 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)
}

/// When the process first looked, in milliseconds since 1970 by the wall clock of this moment.
fn unix_origin() -> u64 {
    let held = &origin().1;
    let (before, wall, after) = (Now::read(), wall_ms(), Now::read());
    let known = held.load(Ordering::Relaxed);
    let origin = followed(known, before, wall, after);
    if origin != known {
        held.store(origin, Ordering::Relaxed);
    }
    origin
}

/// The origin that follows from the one known and a wall clock read between two looks at the monotonic.
fn followed(known: u64, before: Now, wall_ms: u64, after: Now) -> u64 {
    let origin = wall_ms.saturating_sub(after.0 / 1_000_000);
    let same = known.abs_diff(origin) < STEP_MS_MIN;
    if same || after.since(before) >= INTERRUPTED { known } else { origin }
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
    }

    #[test]
    fn the_wall_clock_is_followed_when_it_is_stepped_and_not_when_it_trembles() {
        let at = |ms: u64| Now::from_nanos(ms * 1_000_000);
        let quick = |wall| followed(1_000_000, at(5000), wall, at(5000));
        assert_eq!(quick(1_005_000), 1_000_000, "it has not been touched");
        assert_eq!([quick(1_005_019), quick(1_004_981)], [1_000_000; 2]);
        assert_eq!(quick(1_005_020), 1_000_020, "forward");
        assert_eq!(quick(905_000), 900_000, "back");
        assert_eq!(quick(0), 0, "to before the first look");
        let interrupted = followed(1_000_000, at(5000), 1_005_000, at(6000));
        assert_eq!(interrupted, 1_000_000, "a second passed between the two clocks");
    }

    #[test]
    fn a_moment_has_the_time_of_the_wall_clock() {
        let shown = Now::read().unix_ms();
        assert!(shown.abs_diff(wall_ms()) < 5000, "{shown}");
        assert_eq!(Now::from_nanos(7_000_000).unix_ms() - Now::default().unix_ms(), 7);
    }

    #[test]
    fn the_clock_moves_forward() {
        let before = Now::read();
        assert!(Now::read() >= before);
    }
}
