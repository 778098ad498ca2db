//! Maps a user address to the same backend every time, by highest random weight (D. Thaler, C.
//! Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 1998). When a backend
//! leaves, only its own users move; when one joins, it takes its share from all the others alike. The
//! hash covers the backend's address and not its registration, so users return to it after it
//! registers again; the keys are fixed, so they return after the balancer restarts.

use std::net::IpAddr;

use crate::cluster::Backend;
use crate::cluster::groups::{GROUPS_MAX, Part};

pub(super) fn pick<'s>(
    rotation: impl Iterator<Item = &'s Backend>,
    user: IpAddr,
) -> Option<&'s Backend> {
    let user = fold(user);
    rotation.max_by(|a, b| score(a, user).total_cmp(&score(b, user)))
}

/// The groups in the order in which the user falls to them, by the same rule: when shares change, no
/// more users move than must, and always from a group that has lost to one that has gained. The
/// backends in a group have no say in it.
pub(super) fn groups(parts: &[Part], user: IpAddr) -> impl Iterator<Item = &Part> {
    let user = fold(user);
    let score = move |part: &Part| {
        let name = part.group.name.bytes().fold(0, |so_far, byte| mix(so_far ^ u64::from(byte)));
        weighted(mix(mix(user) ^ name), part.group.share.into())
    };
    let mut left = u16::MAX;
    std::iter::from_fn(move || {
        let among = (0..parts.len().min(GROUPS_MAX)).filter(|place| left & 1 << place != 0);
        let next = among.max_by(|a, b| score(&parts[*a]).total_cmp(&score(&parts[*b])))?;
        left &= !(1 << next);
        Some(&parts[next])
    })
}

fn score(backend: &Backend, user: u64) -> f64 {
    let address = fold(backend.address.ip()) ^ u64::from(backend.address.port()) << 48;
    weighted(mix(mix(user).wrapping_add(address)), backend.weight)
}

/// -weight / ln(u): a weight of 2 wins twice as often.
fn weighted(hash: u64, weight: u16) -> f64 {
    let unit = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -f64::from(weight) / unit.ln()
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
