//! Time as a value. Owns the one place that reads the monotonic clock; pure modules get a [`Now`]
//! handed in and never call [`Now::read`].

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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

    /// This moment, earlier by `by`; stops at the beginning of time.
    pub fn minus(self, by: Duration) -> Now {
        Now(self.0.saturating_sub(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub const fn since(self, earlier: Now) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The wall-clock time of this moment, in milliseconds since 1970, by the clock as it stood when
    /// the process first looked.
    pub fn unix_ms(self) -> u64 {
        origin().1 + self.0 / 1_000_000
    }
}

fn origin() -> &'static (Instant, u64) {
    static ORIGIN: OnceLock<(Instant, u64)> = OnceLock::new();
    ORIGIN.get_or_init(|| {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (Instant::now(), u64::try_from(unix.as_millis()).unwrap_or(u64::MAX))
    })
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
    fn the_clock_moves_forward() {
        let before = Now::read();
        assert!(Now::read() >= before);
    }
}
