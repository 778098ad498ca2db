//! How many sessions each backend has at all workers together, followed from choice to choice: each worker says which
//! backends it has begun or ended a session on, and only those are counted again. Owns what this worker knows of
//! the others; who is the least busy is up to `balance`.
//!
//! A choice costs one look at every worker, and one more for each session that has begun or ended anywhere since the
//! last choice, however many backends there are. A worker that has long made none counts everything once.

use std::sync::Arc;

use crate::balance::{Contest, Tally};
use crate::metrics::{BACKENDS_MAX, WorkerMetrics};

pub(super) struct Census {
    tally: Tally,
    /// Of each worker: its sessions by slot, as they were last counted, and how much of its list has been read. Memory
    /// comes from the system as places are first used.
    workers: Box<[Known]>,
}

struct Known {
    sessions: Box<[u32]>,
    seen: u64,
}

impl Census {
    pub fn new(workers: usize) -> Census {
        let known = |_| Known { sessions: vec![0; BACKENDS_MAX].into(), seen: 0 };
        Census { tally: Tally::new(BACKENDS_MAX), workers: (0..workers).map(known).collect() }
    }

    /// Another snapshot has come.
    pub fn forget_rotations(&mut self) {
        self.tally.forget_rotations();
    }

    /// The place of the least busy backend.
    pub fn least(&mut self, contest: &Contest<'_>, all: &[Arc<WorkerMetrics>]) -> Option<u16> {
        for (known, metrics) in self.workers.iter_mut().zip(all) {
            count(&mut self.tally, known, metrics);
        }
        self.tally.least(contest)
    }
}

/// Counts again what has changed at a worker.
fn count(tally: &mut Tally, Known { sessions, seen }: &mut Known, metrics: &WorkerMetrics) {
    let mut look = |slot: u16| {
        let now = metrics.backends[usize::from(slot)].active.get() as u32;
        let before = std::mem::replace(&mut sessions[usize::from(slot)], now);
        if now != before {
            tally.set(slot, tally.get(slot) + now - before);
        }
    };
    if !metrics.changed.read(seen, &mut look) {
        (0..BACKENDS_MAX as u16).for_each(look);
    }
}
