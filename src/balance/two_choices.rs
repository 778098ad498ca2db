//! Picks two backends by chance and takes the one with fewer running sessions for its weight (M. Mitzenmacher, "The
//! power of two choices in randomized load balancing", IEEE TPDS 2001). It looks at two backends only, however many
//! there are, and several balancers that see different loads do not all run to the same idle backend.

use super::is_less_loaded;
use crate::cluster::Backend;
use crate::cluster::rotation::Rotation;

/// Each is drawn by its weight, with half of `random`; where that one is not fit, it is the next one in turn that is.
pub(super) fn pick<'s>(
    rotation: &Rotation,
    fit: impl Fn(u16) -> Option<&'s Backend>,
    load: &dyn Fn(&Backend) -> u64,
    random: u64,
) -> Option<&'s Backend> {
    let mut first_draw = rotation.from_turn(random >> 32).filter_map(&fit);
    let first = first_draw.next()?;
    let mut second_draw = rotation.from_turn(random & u64::from(u32::MAX)).filter_map(&fit);
    let Some(second) = second_draw.find(|other| other.id != first.id) else { return Some(first) };
    let loads = [first, second].map(|backend| (load(backend), backend.weight));
    Some(if is_less_loaded(loads[1], loads[0]) { second } else { first })
}
