//! Repeatable randomness for unit tests that compare a structure with a plain model. Owns the
//! generator.

/// A generator of numbers below the bound given to each call: xorshift64 (G. Marsaglia, "Xorshift
/// RNGs", Journal of Statistical Software, 2003). `seed` must not be zero.
pub fn xorshift(mut seed: u64) -> impl FnMut(u64) -> u64 {
    move |below| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    }
}
