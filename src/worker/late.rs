//! Users who go on elsewhere one by one, while their worker goes on: those who were in the middle of something when
//! it was left. Owns the way between the worker and the control core, and its bounds; `followers` goes it.
//!
//! ```text
//!   worker that was left --leaving--> its control core ==channel==> the successor's --coming--> worker that serves
//!            ^                                |
//!            +------------coming--------------+ what could not be passed on: nobody else leaves then
//! ```
//!
//! Nobody waits for the other: the locks are held for moments.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::estate::Estate;

/// Estates that may wait on either way, each with the users of one turn.
const WAITING_MAX: usize = 64;

/// The way between the control core and one worker.
#[derive(Debug, Default)]
pub struct Late {
    /// Users may leave by it.
    is_open: AtomicBool,
    leaving: Mutex<Vec<Estate<OwnedFd>>>,
    coming: Mutex<Vec<Estate<OwnedFd>>>,
    has_come: AtomicBool,
    /// Notified when somebody leaves.
    urgent: Arc<Notify>,
}

impl Late {
    /// A way that nobody may leave by yet; `urgent` is notified of those who do.
    pub fn new(urgent: Arc<Notify>) -> Late {
        Late { urgent, ..Late::default() }
    }

    /// Whether users may leave by it from now on. The worker has to be woken.
    pub fn set_open(&self, is_open: bool) {
        self.is_open.store(is_open, Ordering::Release);
    }

    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Acquire)
    }

    /// Those who have left.
    pub fn take_leaving(&self) -> Vec<Estate<OwnedFd>> {
        std::mem::take(&mut self.leaving.lock().expect(UNBROKEN))
    }

    /// Gives the worker some to take up; it has to be woken.
    ///
    /// # Errors
    /// The estate: too many wait already.
    pub fn give(&self, estate: Estate<OwnedFd>) -> Result<(), Box<Estate<OwnedFd>>> {
        let mut coming = self.coming.lock().expect(UNBROKEN);
        if coming.len() >= WAITING_MAX {
            return Err(Box::new(estate));
        }
        coming.push(estate);
        self.has_come.store(true, Ordering::Release);
        Ok(())
    }

    /// The worker's side: whether there is room for one who leaves.
    pub fn has_room(&self) -> bool {
        self.leaving.lock().expect(UNBROKEN).len() < WAITING_MAX
    }

    /// Somebody leaves.
    pub fn leave(&self, estate: Estate<OwnedFd>) {
        self.leaving.lock().expect(UNBROKEN).push(estate);
        self.urgent.notify_one();
    }

    /// Those who have come.
    pub fn take_coming(&self) -> Vec<Estate<OwnedFd>> {
        if !self.has_come.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut coming = self.coming.lock().expect(UNBROKEN);
        self.has_come.store(false, Ordering::Release);
        std::mem::take(&mut coming)
    }
}

const UNBROKEN: &str = "nothing panics while it holds this lock";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_taken_once_and_no_more_than_can_wait() {
        let late = Late::default();
        assert!(late.take_coming().is_empty());
        for worker in 0..WAITING_MAX {
            late.give(Estate::new(worker as u8)).unwrap();
        }
        assert_eq!(late.give(Estate::new(99)).unwrap_err().worker, 99, "it is given back");
        let taken: Vec<usize> = late.take_coming().iter().map(|it| it.worker.into()).collect();
        assert!(taken.into_iter().eq(0..WAITING_MAX));
        assert!(late.take_coming().is_empty());
        assert!(late.give(Estate::new(1)).is_ok());
    }

    #[test]
    fn who_leaves_waits_for_the_control_core_while_there_is_room() {
        let late = Late::new(Arc::default());
        assert!(!late.is_open());
        late.set_open(true);
        assert!(late.is_open());
        for worker in 0..WAITING_MAX {
            assert!(late.has_room());
            late.leave(Estate::new(worker as u8));
        }
        assert!(!late.has_room());
        assert_eq!(late.take_leaving().len(), WAITING_MAX);
        assert!(late.has_room() && late.take_leaving().is_empty());
    }
}
