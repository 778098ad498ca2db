//! One word made from another, spread over all of its bits. Owns the finisher; it is no secret, and what must not
//! be guessed is hashed with a key before it comes here.

/// The finisher of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators",
/// OOPSLA 2014).
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_published_sequence() {
        // The first numbers of SplitMix64 with the seed 1234567, by its authors.
        let step = 0x9e37_79b9_7f4a_7c15_u64;
        let seeds = (0..3).map(|turn| 1_234_567_u64.wrapping_add(step.wrapping_mul(turn)));
        let numbers =
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert!(seeds.map(mix).eq(numbers));
    }
}
