//! How fast one connection may change the set of backends. Owns a token bucket; pure. Every change goes
//! to all workers, and a backend that joins and leaves in a loop must not keep them busy.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::time::Now;

/// Changes in one burst: as many as backends can be registered at all.
const BURST: u32 = crate::metrics::BACKENDS_MAX as u32;
/// The time between changes after that.
const EVERY: Duration = Duration::from_millis(10);

/// The changes a connection may still make.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pace {
    tokens: u32,
    counted: Now,
}

impl Pace {
    pub fn new(now: Now) -> Pace {
        Pace { tokens: BURST, counted: now }
    }

    /// The same within its bounds, whoever has written it.
    pub fn bounded(self, now: Now) -> Pace {
        Pace { tokens: self.tokens.min(BURST), counted: self.counted.min(now) }
    }

    /// Allows a change now, or says how long to wait before asking again.
    pub fn ask(&mut self, now: Now) -> Result<(), Duration> {
        let earned = now.since(self.counted).as_millis() / EVERY.as_millis();
        let earned = u32::try_from(earned).unwrap_or(BURST).min(BURST);
        self.tokens = (self.tokens + earned).min(BURST);
        self.counted = if self.tokens == BURST {
            now
        } else {
            self.counted.plus(EVERY.saturating_mul(earned))
        };
        if self.tokens == 0 {
            return Err(EVERY.saturating_sub(now.since(self.counted)));
        }
        self.tokens -= 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn a_burst_passes_and_then_one_change_at_a_time() {
        let mut pace = Pace::new(at(0));
        assert!((0..BURST).all(|_| pace.ask(at(0)).is_ok()));
        assert_eq!(pace.ask(at(0)), Err(EVERY));
        assert_eq!(pace.ask(at(4)), Err(Duration::from_millis(6)));
        assert_eq!(pace.ask(at(10)), Ok(()));
        assert_eq!(pace.ask(at(15)), Err(Duration::from_millis(5)));
        assert_eq!((pace.ask(at(35)), pace.ask(at(35))), (Ok(()), Ok(())));
        assert!(pace.ask(at(35)).is_err());
    }

    #[test]
    fn after_a_rest_one_more_burst_passes_and_no_more() {
        let mut pace = Pace::new(at(0));
        while pace.ask(at(0)).is_ok() {}
        let later = at(3_600_000);
        assert_eq!((0..2 * BURST).filter(|_| pace.ask(later).is_ok()).count(), BURST as usize);
    }
}
