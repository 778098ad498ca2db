//! Maps a user address to the same backend every time, by highest random weight (D. Thaler, C.
//! Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 1998). When a backend
//! leaves, only its own users move; when one joins, it takes its share from all the others alike. The
//! hash covers the backend's address and not its registration, so users return to it after it
//! registers again; the keys are fixed, so they return after the balancer restarts.

use std::net::IpAddr;

use crate::cluster::Backend;

pub(super) fn pick<'s>(
    rotation: impl Iterator<Item = &'s Backend>,
    user: IpAddr,
) -> Option<&'s Backend> {
    let user = fold(user);
    rotation.max_by(|a, b| score(a, user).total_cmp(&score(b, user)))
}

/// Weighted by -weight / ln(u): a backend of weight 2 wins twice as often.
fn score(backend: &Backend, user: u64) -> f64 {
    let address = fold(backend.address.ip()) ^ u64::from(backend.address.port()) << 48;
    let hash = mix(mix(user).wrapping_add(address));
    let unit = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -f64::from(backend.weight) / unit.ln()
}

fn fold(address: IpAddr) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => mix((v6.to_bits() >> 64) as u64) ^ v6.to_bits() as u64,
    }
}

/// The finisher of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::tests::backends;

    #[test]
    fn users_spread_by_weight() {
        let three = backends(&[1, 1, 2]);
        let mut counts = [0u32; 3];
        for user in 0..40_000u32 {
            let backend = pick(three.iter(), IpAddr::V4((user << 8).into())).unwrap();
            counts[usize::from(backend.slot)] += 1;
        }
        for (count, share) in counts.into_iter().zip([10_000, 10_000, 20_000]) {
            assert!(count.abs_diff(share) < 400, "{counts:?}");
        }
    }
}
