//! The buckets that durations are counted in, wherever that is.

/// Upper bounds of the histogram buckets, in microseconds: 50 us to one hour, roughly 1-2-5.
pub const BOUNDS_US: [u64; 24] = [
    50,
    100,
    200,
    500,
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    60_000_000,
    120_000_000,
    300_000_000,
    600_000_000,
    1_800_000_000,
    3_600_000_000,
];

/// The buckets of a histogram: one for each bound, and one for anything longer.
pub const BUCKETS: usize = BOUNDS_US.len() + 1;

/// The bucket of a duration in microseconds.
pub fn bucket_of(us: u64) -> usize {
    BOUNDS_US.partition_point(|bound| *bound < us)
}
