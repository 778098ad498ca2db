//! Picks the backend with the fewest running sessions for its weight; a tie goes to whichever is next
//! in turn.

use crate::cluster::Backend;

pub(super) fn pick<'s>(
    in_turn: impl Iterator<Item = &'s Backend>,
    load: &dyn Fn(&Backend) -> u64,
) -> Option<&'s Backend> {
    let mut best: Option<(&Backend, u64)> = None;
    for backend in in_turn {
        let running = load(backend);
        // Compared by cross-multiplication (a/b < c/d as a*d < c*b), so that nothing is lost to
        // rounding.
        let less = best.is_none_or(|(other, most)| {
            u128::from(running) * u128::from(other.weight)
                < u128::from(most) * u128::from(backend.weight)
        });
        if less {
            best = Some((backend, running));
        }
    }
    best.map(|(backend, _)| backend)
}
