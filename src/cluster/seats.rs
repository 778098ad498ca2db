//! A session limit, across all workers. Owns one number: a worker takes a seat before it allocates
//! anything for a user, and returns it when the session is over.

use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug)]
pub struct Seats {
    taken: AtomicUsize,
    max: AtomicUsize,
}

impl Seats {
    pub fn new(max: usize) -> Seats {
        Seats { taken: AtomicUsize::new(0), max: AtomicUsize::new(max) }
    }

    /// Takes a seat unless all are taken.
    pub fn take(&self) -> bool {
        // Taken first, and returned if there was none left: two workers can never both get the last.
        let got = self.taken.fetch_add(1, Ordering::Relaxed) < self.max();
        if !got {
            self.give_back();
        }
        got
    }

    /// Takes a seat even if all are taken, for somebody who is there already.
    pub fn take_beyond(&self) {
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    pub fn give_back(&self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    pub fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// Changes the limit. If it is lowered, sessions beyond it run to their end.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_seat_is_taken_once() {
        let seats = Seats::new(2);
        assert_eq!([seats.take(), seats.take(), seats.take()], [true, true, false]);
        assert_eq!(seats.taken(), 2);
        seats.give_back();
        assert!(seats.take());
        seats.take_beyond();
        seats.give_back();
        assert!(!seats.take(), "two are there");
    }
}
