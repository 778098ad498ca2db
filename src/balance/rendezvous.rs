//! Highest random weight (D. Thaler, C. Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM
//! ToN 1998), in whole numbers, so that every machine comes to the same result. Owns the score by which a few are
//! compared for one user: when one of them leaves, only its own users move, and when weights change, no more
//! users move than must.

/// Bits behind the point.
const POINT: u32 = 32;
/// Steps in which the logarithm is laid out; between them it is taken for a straight line. The error is at
/// most one part in 1,000 of the score.
const STEPS: usize = 256;
/// The binary logarithms of 1 to 2.
const LOGARITHMS: [u64; STEPS + 1] = logarithms();

/// -weight / log2(hash as a fraction of all hashes): a weight of 2 has the highest score twice as often as one of 1.
pub(super) fn score(hash: u64, weight: u16) -> u64 {
    let hash = hash | 1;
    let zeros = hash.leading_zeros();
    // What follows the leading one, as a fraction.
    let fraction = hash << zeros << 1;
    let step = (fraction >> 56) as usize;
    let rest = fraction >> 24 & u64::from(u32::MAX);
    let (low, high) = (LOGARITHMS[step], LOGARITHMS[step + 1]);
    let logarithm = low + (((high - low) * rest) >> POINT);
    let negative = (u64::from(zeros + 1) << POINT) - logarithm;
    (u64::from(weight) << 48) / negative.max(1)
}

const fn logarithms() -> [u64; STEPS + 1] {
    let mut all = [0; STEPS + 1];
    let mut step = 0;
    while step < STEPS {
        all[step] = logarithm(((STEPS + step) as u64) << (POINT - STEPS.ilog2()));
        step += 1;
    }
    all[STEPS] = 1 << POINT;
    all
}

/// The binary logarithm of a number from 1 to 2, bit by bit: squaring doubles it.
const fn logarithm(number: u64) -> u64 {
    let (mut number, mut result, mut bit) = (number as u128, 0, POINT);
    while bit > 0 {
        bit -= 1;
        number = (number * number) >> POINT;
        if number >> POINT >= 2 {
            number >>= 1;
            result |= 1 << bit;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::mix::mix;

    #[test]
    fn the_score_is_that_of_the_formula() {
        let hashes = (0..100_000).map(mix).chain([0, 1, u64::MAX >> 1, u64::MAX, u64::MAX << 40]);
        for hash in hashes {
            let unit = (hash | 1) as f64 / 2f64.powi(64);
            let negative = (-unit.log2()).max(2f64.powi(-32));
            let exact = 5.0 * 2f64.powi(16) / negative;
            let off = (score(hash, 5) as f64 / exact - 1.0).abs();
            // Close to 1, the logarithm has few bits left behind the point.
            assert!(off < 0.001 + 2f64.powi(-31) / negative + 1.0 / exact, "{off} at {hash:x}");
        }
    }

    #[test]
    fn the_highest_score_comes_as_often_as_the_weight_says() {
        let weights = [1, 2, 5, 100, 256];
        let mut counts = [0u32; 5];
        for user in 0..400_000 {
            let score = |place: &usize| score(mix(mix(user) ^ *place as u64), weights[*place]);
            counts[(0..5).max_by_key(score).unwrap()] += 1;
        }
        for (count, weight) in counts.into_iter().zip(weights) {
            let due = 400_000.0 * f64::from(weight) / 364.0;
            // Four standard deviations.
            assert!((f64::from(count) - due).abs() < 4.0 * due.sqrt(), "{counts:?}");
        }
    }
}
