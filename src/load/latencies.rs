//! Histograms of latencies as all of a run are kept. Owns their range. Pure.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Latencies range from a nanosecond to this; longer ones count as this long.
pub const MAX_NS: u64 = 3_600_000_000_000;

pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_NS, 3).expect("three digits up to an hour are valid")
}

pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
