//! Chance, repeatable: the one generator that tests draw from. The same seed tells the same story, and
//! nothing here looks at a clock or at the system.
#![allow(dead_code, reason = "each test draws what it needs")]

use std::time::Duration;

/// SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    /// From 0 to one less than `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A place in something of `len`, which is not zero.
    pub fn place(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// Both ends included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub fn in_thousand(&mut self, times: u64) -> bool {
        self.below(1000) < times
    }

    pub fn one_in(&mut self, odds: u64) -> bool {
        self.below(odds) == 0
    }

    pub fn half(&mut self) -> bool {
        self.next() & 1 == 0
    }

    /// From 1 to `max`, small values as likely as large ones.
    pub fn any_size(&mut self, max: u64) -> u64 {
        let bits = self.between(0, u64::from(max.ilog2()));
        self.between(1, (2 << bits) - 1).min(max)
    }

    /// From a microsecond to `max`, short as likely as long.
    pub fn any_time(&mut self, max: Duration) -> Duration {
        Duration::from_micros(self.any_size(max.as_micros() as u64))
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.place(from.len())]
    }
}

/// `len` bytes that a seed stands for: no stretch of them occurs twice, or under another seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
