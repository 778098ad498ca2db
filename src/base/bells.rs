//! Wakers for futures that are polled by hand, without a runtime: what is woken is noted, and whoever polls looks. Own
//! that note, for one future and for many numbered ones; nothing is woken here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

/// That a future is to be polled again.
#[derive(Debug, Default)]
pub struct Flag(AtomicBool);

impl Flag {
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether it was set since the last call.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.set();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.set();
    }
}

/// The numbers of those that are to be polled again, each at most once.
#[derive(Debug, Default)]
pub struct Rung(Mutex<Vec<u32>>);

impl Rung {
    fn numbers(&self) -> MutexGuard<'_, Vec<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_empty(&self) -> bool {
        self.numbers().is_empty()
    }

    /// Moves them behind those in `to`.
    pub fn take(&self, to: &mut Vec<u32>) {
        to.append(&mut self.numbers());
    }
}

/// Puts one on that list.
#[derive(Debug)]
pub struct Bell {
    number: u32,
    is_rung: AtomicBool,
    /// As a waker, not by hand.
    is_woken: AtomicBool,
    rung: Arc<Rung>,
}

impl Bell {
    /// One that counts as woken, since nothing has been looked at yet.
    pub fn new(number: u32, rung: &Arc<Rung>) -> Arc<Bell> {
        let (is_rung, is_woken) = (AtomicBool::new(false), AtomicBool::new(true));
        Arc::new(Bell { number, is_rung, is_woken, rung: Arc::clone(rung) })
    }

    pub fn ring(&self) {
        if !self.is_rung.swap(true, Ordering::Relaxed) {
            self.rung.numbers().push(self.number);
        }
    }

    /// It is about to be polled, and may ring again.
    pub fn answer(&self) {
        self.is_rung.store(false, Ordering::Relaxed);
    }

    /// Whether it was woken since the last call.
    pub fn take_woken(&self) -> bool {
        self.is_woken.swap(false, Ordering::Relaxed)
    }

    /// Has the next [`Bell::take_woken`] say so.
    pub fn stay_woken(&self) {
        self.is_woken.store(true, Ordering::Relaxed);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.stay_woken();
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn a_bell_that_rings_twice_is_answered_once() {
        let rung = Arc::new(Rung::default());
        let bells = [Bell::new(0, &rung), Bell::new(1, &rung)];
        for place in [1, 0, 1, 1] {
            bells[place].ring();
        }
        let mut places = Vec::new();
        rung.take(&mut places);
        assert_eq!((&places[..], rung.is_empty()), (&[1, 0][..], true));
        bells[1].ring();
        assert!(rung.is_empty(), "not before it was answered");
        bells[1].answer();
        bells[1].ring();
        assert!(!rung.is_empty());
    }

    #[test]
    fn who_is_woken_is_told_from_who_is_rung_for() {
        let bell = Bell::new(7, &Arc::default());
        assert!(bell.take_woken() && !bell.take_woken());
        bell.ring();
        assert!(!bell.take_woken());
        Waker::from(Arc::clone(&bell)).wake();
        assert!(bell.take_woken());
    }

    #[test]
    fn a_flag_is_set_until_it_is_taken() {
        let flag = Arc::new(Flag::default());
        Waker::from(Arc::clone(&flag)).wake_by_ref();
        assert!(flag.is_set() && flag.take() && !flag.take());
    }
}
