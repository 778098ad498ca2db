//! Whose turn is it? Owns the counter that all workers draw the number of a turn from.

use std::sync::atomic::{AtomicU64, Ordering};

/// The turn counter of a service or of one of its groups, shared by all workers and by all snapshots that the service is in.
///
/// The only value that workers write together, besides the seats. Exact round robin across workers
/// needs a single order, and it costs one atomic addition per session. Turns go on from snapshot to
/// snapshot, so a backend at the front of the rotation gains nothing when others come and go.
///
/// Alone on its pair of cache lines, so that the users of one service do not slow down those of another.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Turn(AtomicU64);

impl Turn {
    /// The number of the next turn.
    pub fn take(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    /// The number of the turn that is next.
    pub fn next(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Goes on from there; for a service that nobody uses yet.
    pub fn go_on(&self, from: u64) {
        self.0.store(from, Ordering::Relaxed);
    }
}
