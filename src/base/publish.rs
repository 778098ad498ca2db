//! One writer, many readers, immutable values. Owns the hand-over of a snapshot to the workers: a
//! reader pays one atomic load a turn when nothing changed, and takes a lock only to pick up a new
//! value. The value itself is frozen, so two readers can never see halves of two versions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

struct Board<T> {
    version: AtomicU64,
    value: Mutex<Arc<T>>,
}

/// The writing end. There is one.
pub struct Publisher<T> {
    board: Arc<Board<T>>,
}

/// A reading end; each reader has its own, which remembers what it has seen.
pub struct Subscriber<T> {
    board: Arc<Board<T>>,
    seen: u64,
}

impl<T> Publisher<T> {
    /// A board that shows `first`; every subscriber is told of it once.
    pub fn new(first: T) -> Publisher<T> {
        Publisher {
            board: Arc::new(Board {
                version: AtomicU64::new(1),
                value: Mutex::new(Arc::new(first)),
            }),
        }
    }

    /// Replaces the value. Readers see it at their next turn; wake them if they may be asleep.
    pub fn publish(&self, value: T) {
        let mut slot = self.board.value.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Arc::new(value);
        self.board.version.fetch_add(1, Ordering::Release);
    }

    /// The value as it stands.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.board.value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A reader that has seen nothing yet.
    pub fn subscribe(&self) -> Subscriber<T> {
        Subscriber { board: Arc::clone(&self.board), seen: 0 }
    }
}

impl<T> Subscriber<T> {
    /// The newest value if there is one that this reader has not been given; else one atomic load.
    pub fn changed(&mut self) -> Option<Arc<T>> {
        if self.board.version.load(Ordering::Acquire) == self.seen {
            return None;
        }
        let slot = self.board.value.lock().unwrap_or_else(PoisonError::into_inner);
        self.seen = self.board.version.load(Ordering::Acquire);
        Some(Arc::clone(&slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_is_told_once_of_each_value() {
        let publisher = Publisher::new(1);
        let mut reader = publisher.subscribe();
        assert_eq!(reader.changed().as_deref(), Some(&1));
        assert_eq!(reader.changed(), None);
        publisher.publish(2);
        publisher.publish(3);
        assert_eq!(reader.changed().as_deref(), Some(&3));
        assert_eq!(reader.changed(), None);
        assert_eq!(*publisher.current(), 3);
    }
}
