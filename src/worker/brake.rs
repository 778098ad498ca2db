//! How the control core has a worker stand still, describe what it has or take over what another had, and go on.
//! Owns the requests that pass between the two and what the worker leaves or is left with them; `standstill`
//! carries them out.
//!
//! ```text
//!              freeze             describe: an estate to take       inherit: an estate is given
//!   moving ----------> still  -------------------------> still  ------------------------> still
//!      ^                 |                                  |                               |
//!      +-----------------+--- thaw: as if nothing had been -+- leave: without what has been described
//! ```
//!
//! Before all that, and while the one moves, its sockets can be [announced](Request::Announce), and the other, which
//! stands still, can [expect](Request::Expect) them.
//!
//! One request at a time: the next is made when the last is [done](Brake::is_done), or takes its place. A worker
//! answers within a few turns: what is under way is taken back after 20 ms. Orders, snapshots and changes of doors
//! wait for as long as it stands still.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::estate::Estate;
use crate::estate::ahead::Ahead;

/// What a worker is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Go on. A worker that stands still does so as if nothing had been.
    Thaw,
    /// Move no more bytes and let nobody in, until nothing is under way any more.
    Freeze,
    /// Stand still, and describe what could go on elsewhere. All workers must stand still by then, so that none
    /// hands anything over to another.
    Describe,
    /// Stand still, and take over what another worker has described.
    Inherit,
    /// Say what the next sessions live on, and move on.
    Announce,
    /// Stand still, and take in sockets of sessions that another worker will describe.
    Expect,
    /// Go on without the sessions that have been described last: their sockets are closed here, of which the
    /// others have duplicates. Nobody is let in any more, as after [`Drain`](super::link::Order::Drain).
    Leave,
}

/// The number of a request, in the bits above those of what it is.
const NUMBER_SHIFT: u32 = 3;

impl Request {
    pub const ALL: [Request; 7] = [
        Request::Thaw,
        Request::Freeze,
        Request::Describe,
        Request::Inherit,
        Request::Announce,
        Request::Expect,
        Request::Leave,
    ];

    fn of(word: u32) -> Request {
        let place = word & ((1 << NUMBER_SHIFT) - 1);
        Request::ALL[(place as usize).min(Request::ALL.len() - 1)]
    }
}

/// A request as it was made: the same one made again is another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked(u32);

impl Asked {
    pub fn what(self) -> Request {
        Request::of(self.0)
    }
}

/// Between the control core and one worker. Nobody waits for the other: the locks are held for moments, and only
/// by a worker that stands still.
#[derive(Debug, Default)]
pub struct Brake {
    asked: AtomicU32,
    done: AtomicU32,
    /// [`Request::Announce`] begins with the first session.
    from_first: AtomicBool,
    announced: Mutex<Vec<[OwnedFd; 2]>>,
    expected: Mutex<Option<Ahead<OwnedFd>>>,
    left: Mutex<Option<Estate<RawFd>>>,
    given: Mutex<Option<Estate<OwnedFd>>>,
    refused: Mutex<Option<String>>,
}

impl Brake {
    /// Makes a request; the worker has to be woken. One that was made before the worker starts is carried out
    /// before anything else.
    pub fn ask(&self, what: Request) {
        let number = (self.asked.load(Ordering::Relaxed) >> NUMBER_SHIFT).wrapping_add(1);
        self.asked.store(number << NUMBER_SHIFT | what as u32, Ordering::Release);
    }

    /// The same, with what [`Request::Inherit`] takes over.
    pub fn give(&self, estate: Estate<OwnedFd>) {
        *self.given.lock().expect(UNBROKEN) = Some(estate);
        self.ask(Request::Inherit);
    }

    /// Asks for the sockets of the next sessions, or of the first.
    pub fn ask_for_sockets(&self, of_first: bool) {
        self.from_first.store(of_first, Ordering::Relaxed);
        self.ask(Request::Announce);
    }

    /// Gives the worker sockets to take in.
    pub fn expect(&self, ahead: Ahead<OwnedFd>) {
        *self.expected.lock().expect(UNBROKEN) = Some(ahead);
        self.ask(Request::Expect);
    }

    /// Whether the last request has been carried out.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.asked.load(Ordering::Relaxed)
    }

    /// What was described, once that is done; once. The descriptors are good until the worker thaws or leaves.
    pub fn take_estate(&self) -> Option<Estate<RawFd>> {
        if self.is_done() { self.left.lock().expect(UNBROKEN).take() } else { None }
    }

    /// What was asked for by [`Brake::ask_for_sockets`], once that is done; once.
    pub fn take_sockets(&self) -> Vec<[OwnedFd; 2]> {
        match self.is_done() {
            true => std::mem::take(&mut *self.announced.lock().expect(UNBROKEN)),
            false => Vec::new(),
        }
    }

    /// Why what was given could not be taken over, if that is done and so; once.
    pub fn take_refusal(&self) -> Option<String> {
        if self.is_done() { self.refused.lock().expect(UNBROKEN).take() } else { None }
    }

    /// The worker's side: the last request, unless it has been carried out.
    pub fn wish(&self) -> Option<Asked> {
        let asked = self.asked.load(Ordering::Acquire);
        (asked != self.done.load(Ordering::Relaxed)).then_some(Asked(asked))
    }

    /// The worker has carried it out.
    pub fn carried_out(&self, asked: Asked) {
        self.done.store(asked.0, Ordering::Release);
    }

    /// Whether it is the first sessions whose sockets are asked for.
    pub fn is_from_first(&self) -> bool {
        self.from_first.load(Ordering::Relaxed)
    }

    /// What it is asked for.
    pub fn announce(&self, sockets: Vec<[OwnedFd; 2]>) {
        *self.announced.lock().expect(UNBROKEN) = sockets;
    }

    /// What the worker is to take in.
    pub fn take_expected(&self) -> Option<Ahead<OwnedFd>> {
        self.expected.lock().expect(UNBROKEN).take()
    }

    /// What the worker has described.
    pub fn leave(&self, estate: Estate<RawFd>) {
        *self.left.lock().expect(UNBROKEN) = Some(estate);
    }

    /// What the worker is to take over.
    pub fn take_given(&self) -> Option<Estate<OwnedFd>> {
        self.given.lock().expect(UNBROKEN).take()
    }

    /// The worker cannot take it over.
    pub fn refuse(&self, why: String) {
        *self.refused.lock().expect(UNBROKEN) = Some(why);
    }
}

const UNBROKEN: &str = "nothing panics while it holds this lock";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_made_again_is_another_and_done_only_when_carried_out() {
        let brake = Brake::default();
        assert!(brake.is_done() && brake.wish().is_none(), "it moves");
        let mut before = None;
        for what in [Request::Freeze, Request::Freeze, Request::Thaw, Request::Leave] {
            brake.ask(what);
            assert!(!brake.is_done());
            let wish = brake.wish().unwrap();
            assert!(wish.what() == what && before != Some(wish));
            brake.carried_out(before.unwrap_or(wish));
            assert_eq!(brake.is_done(), before.is_none(), "that was the one before");
            brake.carried_out(wish);
            assert!(brake.is_done() && brake.wish().is_none());
            before = Some(wish);
        }
    }

    #[test]
    fn an_estate_is_taken_once_and_not_before_it_is_complete() {
        let brake = Brake::default();
        brake.ask(Request::Describe);
        let wish = brake.wish().unwrap();
        brake.leave(Estate::new(3));
        assert!(brake.take_estate().is_none(), "it is not said to be done");
        brake.carried_out(wish);
        assert_eq!(brake.take_estate().map(|estate| estate.worker), Some(3));
        assert!(brake.take_estate().is_none());
        brake.give(Estate::new(4));
        let wish = brake.wish().unwrap();
        assert_eq!((wish.what(), brake.take_given().unwrap().worker), (Request::Inherit, 4));
        brake.refuse("no".into());
        brake.carried_out(wish);
        assert_eq!(brake.take_refusal().as_deref(), Some("no"));
    }
}
