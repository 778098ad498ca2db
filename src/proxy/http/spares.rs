//! Idle connections to backends. Owns which one is used next, how many are kept and for how long;
//! the connections themselves are the worker's, which names them by a key.
//!
//! Last in, first out: the connection used last is the least likely to be closed by its backend
//! just now, and what a burst left over ages at the bottom and is dropped.

use std::collections::HashMap;
use std::hash::Hash;

use crate::base::time::Now;

/// One idle connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Spare<K> {
    key: K,
    /// When it was last used.
    since: Now,
    /// When it becomes too old.
    until: Now,
}

/// The idle connections of one worker, by backend: what names one is the worker's, too.
#[derive(Debug)]
pub struct Spares<B, K> {
    of: HashMap<B, Vec<Spare<K>>>,
    /// Limit for each backend.
    max: usize,
    count: usize,
}

impl<B: Copy + Eq + Hash, K: Copy + Eq> Spares<B, K> {
    /// Keeps at most `max` connections to one backend.
    pub fn new(max: usize) -> Spares<B, K> {
        Spares { of: HashMap::new(), max, count: 0 }
    }

    /// The number of idle connections.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Keeps a connection. Returns one that must be closed in its place: the oldest, or `key`
    /// itself if none is kept.
    pub fn keep(&mut self, backend: B, key: K, now: Now, until: Now) -> Option<K> {
        if self.max == 0 {
            return Some(key);
        }
        let stack = self.of.entry(backend).or_default();
        let oldest = (stack.len() >= self.max).then(|| stack.remove(0).key);
        stack.push(Spare { key, since: now, until });
        self.count = self.count + 1 - usize::from(oldest.is_some());
        oldest
    }

    /// The connection to that backend used last, unless that was before `since`.
    pub fn take(&mut self, backend: B, now: Now, since: Now) -> Option<K> {
        let stack = self.of.get_mut(&backend)?;
        let good = |spare: &mut Spare<K>| spare.until > now && spare.since >= since;
        let spare = stack.pop_if(good)?;
        self.count -= 1;
        Some(spare.key)
    }

    /// Whether this connection is kept, and was last used at `since` or later.
    pub fn holds(&self, backend: B, key: K, now: Now, since: Now) -> bool {
        let mut all = self.of.get(&backend).into_iter().flatten();
        all.any(|spare| spare.key == key && spare.until > now && spare.since >= since)
    }

    /// Forgets a connection that has ended by itself.
    pub fn forget(&mut self, backend: B, key: K) -> bool {
        let Some(stack) = self.of.get_mut(&backend) else { return false };
        let Some(place) = stack.iter().rposition(|spare| spare.key == key) else { return false };
        stack.remove(place);
        self.count -= 1;
        true
    }

    /// Connections that have been idle since then or longer.
    pub fn waiting_since(&self, since: Now) -> impl Iterator<Item = K> {
        let still = move |spare: &&Spare<K>| spare.since <= since;
        self.of.values().flatten().filter(still).map(|spare| spare.key)
    }

    /// Takes out every connection that is too old, or whose backend has left (`stays` is false).
    pub fn sweep(&mut self, now: Now, stays: impl Fn(B) -> bool, mut drop: impl FnMut(K)) {
        self.of.retain(|backend, stack| {
            let stays = stays(*backend);
            stack.retain(|spare| {
                let good = stays && spare.until > now;
                if !good {
                    drop(spare.key);
                    self.count -= 1;
                }
                good
            });
            // A backend that stays keeps its stack's memory for later.
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::BackendId;

    const ONE: BackendId = BackendId(1);
    const TWO: BackendId = BackendId(2);

    fn at(second: u64) -> Now {
        Now::from_nanos(second * 1_000_000_000)
    }

    fn swept(
        spares: &mut Spares<BackendId, u32>,
        now: Now,
        stays: impl Fn(BackendId) -> bool,
    ) -> Vec<u32> {
        let mut dropped = Vec::new();
        spares.sweep(now, stays, |key| dropped.push(key));
        dropped
    }

    #[test]
    fn the_connection_used_last_is_used_next() {
        let mut spares = Spares::new(9);
        for key in [1, 2, 3] {
            assert_eq!(spares.keep(ONE, key, at(0), at(10)), None);
        }
        assert_eq!(spares.keep(TWO, 4, at(0), at(10)), None);
        assert_eq!((spares.take(ONE, at(1), at(0)), spares.len()), (Some(3), 3));
        assert!(spares.forget(ONE, 1));
        assert!(!spares.forget(ONE, 1));
        assert_eq!(spares.take(ONE, at(1), at(0)), Some(2));
        assert_eq!(spares.take(ONE, at(1), at(0)), None);
        assert_eq!((spares.take(TWO, at(1), at(0)), spares.len()), (Some(4), 0));
    }

    #[test]
    fn a_connection_that_is_too_old_is_not_used() {
        let mut spares = Spares::new(9);
        let _ = spares.keep(ONE, 1, at(0), at(4));
        assert_eq!(spares.take(ONE, at(4), at(0)), None);
        assert_eq!(spares.take(ONE, at(3), at(1)), None);
        assert!(swept(&mut spares, at(3), |_| true).is_empty());
        assert_eq!(swept(&mut spares, at(4), |_| true), [1]);
        assert!(spares.is_empty());
    }

    #[test]
    fn no_more_are_kept_than_allowed() {
        let mut spares = Spares::new(2);
        assert_eq!(spares.keep(ONE, 1, at(0), at(4)), None);
        assert_eq!(spares.keep(ONE, 2, at(0), at(4)), None);
        assert_eq!((spares.keep(ONE, 3, at(0), at(4)), spares.len()), (Some(1), 2));
        assert_eq!(Spares::new(0).keep(ONE, 1, at(0), at(4)), Some(1));
    }

    #[test]
    fn what_a_backend_leaves_behind_is_dropped() {
        let mut spares = Spares::new(2);
        let _ = spares.keep(ONE, 1, at(0), at(4));
        let _ = spares.keep(TWO, 2, at(0), at(4));
        assert_eq!(swept(&mut spares, at(1), |backend| backend == TWO), [1]);
        assert_eq!(
            (spares.take(ONE, at(1), at(0)), spares.take(TWO, at(1), at(0))),
            (None, Some(2))
        );
    }
}
