//! One writer, many readers, immutable values. Owns handing snapshots over to the workers. A reader
//! pays one atomic load per turn while nothing has changed, and takes a lock only to pick up a new
//! value. The value itself is frozen, so no reader ever sees a mix of two versions.

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

/// The reading end. Each reader has its own, which remembers what it has seen.
pub struct Subscriber<T> {
    board: Arc<Board<T>>,
    seen: u64,
}

impl<T> Publisher<T> {
    /// A board that shows `first`, which every subscriber gets once.
    pub fn new(first: T) -> Publisher<T> {
        Publisher {
            board: Arc::new(Board {
                version: AtomicU64::new(1),
                value: Mutex::new(Arc::new(first)),
            }),
        }
    }

    /// Replaces the value. Readers see it on their next turn; wake them if they may be asleep.
    pub fn publish(&self, value: T) {
        let mut slot = self.board.value.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Arc::new(value);
        self.board.version.fetch_add(1, Ordering::Release);
    }

    /// The current value.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.board.value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A reader that has seen nothing yet.
    pub fn subscribe(&self) -> Subscriber<T> {
        Subscriber { board: Arc::clone(&self.board), seen: 0 }
    }
}

impl<T> Subscriber<T> {
    /// The newest value, unless this reader already has it; then this costs one atomic load.
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
