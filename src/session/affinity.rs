//! Which worker has a UDP flow, and on which backend. When its socket group changes, the kernel
//! may deliver a flow's datagrams to another worker; that worker looks here before it begins a
//! session, so the flow keeps the one it has. Owns the map and its locks.
//!
//! Workers come here when a session starts, moves or ends, never for a datagram of a session they
//! already have. The map is divided into shards with a lock each, held for a single look-up, so two
//! workers rarely meet.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;

use crate::cluster::BackendId;

/// Shards, and so locks: sixteen times the workers of a large machine, so that two seldom want the
/// same one.
const SHARDS: usize = 1024;

/// A flow, by its hash under the process's secret key (`FlowHasher`). Two flows with the same hash
/// share a backend when they change workers, which harms neither; with a million flows, that happens
/// in one table in 37 million.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Assignment {
    flow: u64,
    backend: BackendId,
    /// The only worker that may remove this: the one that last took the flow.
    worker: u8,
}

/// Alone on its cache line, so that a lock does not slow down its neighbour.
#[derive(Default)]
#[repr(align(64))]
struct Shard(Mutex<HashTable<Assignment>>);

/// The map, shared by all workers.
pub struct Affinity {
    shards: Box<[Shard]>,
    shard_max: usize,
}

impl Affinity {
    /// A map for about `flows_max` flows. A shard takes twice its even share plus eight; flows beyond
    /// that are not remembered.
    pub fn new(flows_max: usize) -> Affinity {
        Affinity {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            shard_max: flows_max.div_ceil(SHARDS) * 2 + 8,
        }
    }

    /// Records that `worker` has a session of this flow on `backend`. False if there was no room, so
    /// that other workers will not find the flow.
    pub fn note(&self, flow: u64, backend: BackendId, worker: u8) -> bool {
        let mut shard = self.shard(flow);
        if let Some(entry) = shard.find_mut(flow, |entry| entry.flow == flow) {
            *entry = Assignment { flow, backend, worker };
            return true;
        }
        if shard.len() >= self.shard_max {
            return false;
        }
        shard.insert_unique(flow, Assignment { flow, backend, worker }, |entry| entry.flow);
        true
    }

    /// The backend this flow has at any worker.
    pub fn find(&self, flow: u64) -> Option<BackendId> {
        self.shard(flow).find(flow, |entry| entry.flow == flow).map(|entry| entry.backend)
    }

    /// The worker that last took this flow.
    pub fn holder(&self, flow: u64) -> Option<u8> {
        self.shard(flow).find(flow, |entry| entry.flow == flow).map(|entry| entry.worker)
    }

    /// Forgets the session of `worker`, unless another worker has taken the flow meanwhile.
    pub fn forget(&self, flow: u64, worker: u8) {
        let mut shard = self.shard(flow);
        let entry = shard.find_entry(flow, |entry| entry.flow == flow && entry.worker == worker);
        if let Ok(entry) = entry {
            entry.remove();
        }
    }

    /// How many flows are remembered. Takes every lock in turn; for tests and the status.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The table takes its buckets from the low bits of a hash and its tags from the highest seven;
    /// the shard is chosen by bits between them.
    fn shard(&self, flow: u64) -> MutexGuard<'_, HashTable<Assignment>> {
        lock(&self.shards[(flow >> 40) as usize % SHARDS])
    }
}

fn lock(shard: &Shard) -> MutexGuard<'_, HashTable<Assignment>> {
    shard.0.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::flows::FlowHasher;

    fn flow(number: u64) -> u64 {
        FlowHasher::new((5, 6)).words([number])
    }

    #[test]
    fn a_flow_is_found_by_any_worker_until_its_last_holder_lets_go() {
        let map = Affinity::new(100);
        assert_eq!(map.find(flow(1)), None);
        assert!(map.note(flow(1), BackendId(7), 0));
        assert_eq!(map.find(flow(1)), Some(BackendId(7)));
        assert_eq!(map.holder(flow(1)), Some(0));
        assert!(map.note(flow(1), BackendId(7), 3), "worker 3 was handed the flow");
        assert_eq!((map.holder(flow(1)), map.holder(flow(2))), (Some(3), None));
        map.forget(flow(1), 0);
        assert_eq!(map.find(flow(1)), Some(BackendId(7)));
        map.forget(flow(1), 3);
        assert_eq!((map.find(flow(1)), map.len()), (None, 0));
    }

    #[test]
    fn a_flow_that_moved_is_found_where_it_is() {
        let map = Affinity::new(100);
        map.note(flow(1), BackendId(7), 0);
        map.note(flow(1), BackendId(8), 0);
        assert_eq!((map.find(flow(1)), map.len()), (Some(BackendId(8)), 1));
    }

    #[test]
    fn what_was_asked_for_fits_and_much_more_does_not() {
        let map = Affinity::new(50_000);
        let noted = |range: std::ops::Range<u64>| {
            range.filter(|number| map.note(flow(*number), BackendId(1), 0)).count()
        };
        assert_eq!(noted(0..50_000), 50_000);
        noted(50_000..1_000_000);
        assert!(map.len() <= 120_000, "{}", map.len());
        assert!(map.note(flow(3), BackendId(2), 0), "a full map still follows what it knows");
        assert_eq!(map.find(flow(3)), Some(BackendId(2)));
    }

    #[test]
    fn workers_that_meet_lose_nothing() {
        let map = Affinity::new(40_000);
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let map = &map;
                scope.spawn(move || {
                    for number in (0..40_000).filter(|number| number % 4 == worker) {
                        assert!(map.note(flow(number), BackendId(number as u32), worker as u8));
                        if number % 8 == worker {
                            map.forget(flow(number), worker as u8);
                        }
                    }
                });
            }
        });
        assert_eq!(map.len(), 20_000);
        for number in 0..40_000 {
            let kept = (number % 8 >= 4).then_some(BackendId(number as u32));
            assert_eq!(map.find(flow(number)), kept);
        }
    }
}
