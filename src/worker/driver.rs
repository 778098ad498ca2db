//! What the loop asks of a protocol. Owns the seam between `shell` and the rooms: a room implements
//! [`Driver`], and the loop knows nothing else of it.

use std::os::fd::{OwnedFd, RawFd};

use super::books::Books;
use super::cx::Cx;
use super::ends::Ends;
use super::link::{DoorChange, Order};
use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::estate::ahead::Ahead;
use crate::estate::{Estate, Parcel};
use crate::ring::{Done, Ring};

/// What a driver works with while it is called: the time, the ring, the books of its worker.
pub struct Turn<'a> {
    pub now: Now,
    pub ring: &'a mut Ring,
    pub books: &'a mut Books,
}

impl Turn<'_> {
    /// The context of a decision in this turn; its commands go to `out`.
    pub fn cx<'a, C>(&'a mut self, out: &'a mut Vec<C>) -> Cx<'a, C> {
        Cx { now: self.now, pool: self.ring.pool_mut(), books: self.books, out }
    }
}

/// One protocol between the ring and its sessions.
pub trait Driver {
    /// Opens or closes a door, or gives it to another service.
    fn change_door(&mut self, change: DoorChange, turn: &mut Turn<'_>);

    /// Sessions in any phase, and connections on which the kernel is still working.
    fn live(&self) -> usize;

    /// An operation of this driver's has completed.
    fn complete(&mut self, done: Done, turn: &mut Turn<'_>);

    /// Does what is due regardless of completions: deadlines, flows that waited for blocks.
    fn housekeep(&mut self, turn: &mut Turn<'_>);

    /// When [`Driver::housekeep`] has something to do next, if nothing completes before.
    fn next_deadline(&self) -> Option<Now>;

    /// Whether [`Driver::housekeep`] must be called in this turn even though nothing is due: another
    /// driver may have let go of what this one is waiting for.
    fn is_waiting(&self, ring: &Ring) -> bool;

    /// Carries out an order of the control core, as far as it concerns this driver.
    fn order(&mut self, order: Order, turn: &mut Turn<'_>);

    /// Ends the sessions on all of these backends.
    fn end_backends(&mut self, ends: &Ends, turn: &mut Turn<'_>) {
        ends.orders().for_each(|order| self.order(order, turn));
    }

    /// Takes note of the backends now registered.
    fn adopt(&mut self, _snapshot: &Snapshot) {}

    /// Takes one step of one long stream, at the end of a turn in which [`Driver::housekeep`] was called.
    /// `heard_at`: when an operation of another driver last completed, which makes another one likely;
    /// it then has to wait for this step.
    fn step(&mut self, _heard_at: Now, _turn: &mut Turn<'_>) {}

    /// Whether the next turn must not wait for a completion. Asked after [`Driver::step`].
    fn is_eager(&self) -> bool {
        false
    }

    /// From now on begins nothing that would move a byte or let somebody in. Until [`Driver::thaw`] nothing but
    /// the following is called, and no receive finds a block ([`Ring::withdraw`]).
    fn freeze(&mut self, turn: &mut Turn<'_>);

    /// As [`Driver::complete`], while the worker is to stand still.
    fn note(&mut self, done: Done, turn: &mut Turn<'_>);

    /// Takes back what is still under way. Called again and again until everything [is still](Driver::is_still):
    /// an operation that the kernel is about to go on with cannot be taken back at that moment.
    fn take_back(&mut self, _turn: &mut Turn<'_>) {}

    /// Whether nothing is under way any more that could move a byte or let somebody in.
    fn is_still(&mut self) -> bool;

    /// Duplicates of the sockets of some sessions, [so many](crate::estate::ahead) at most, while everything moves:
    /// of the next ones that could go on elsewhere, or of the first. None if there are no more.
    fn announce(&mut self, _is_first: bool) -> Vec<[OwnedFd; 2]> {
        Vec::new()
    }

    /// Takes in sockets whose sessions another worker will describe; takes them out of there. Everything is still.
    ///
    /// # Errors
    /// What is wrong with them.
    fn expect(&mut self, _ahead: &mut Ahead<OwnedFd>, _turn: &mut Turn<'_>) -> Result<(), String> {
        Ok(())
    }

    /// Describes what could go on elsewhere, and remembers what that is until [`Driver::leave`] or
    /// [`Driver::thaw`]. Everything is still.
    fn describe(&mut self, _estate: &mut Estate<RawFd>, _turn: &mut Turn<'_>) {}

    /// Adds its sockets at the users' doors, of which nothing is changed.
    fn describe_doors(&self, _doors: &mut Parcel<RawFd>) {}

    /// Takes over what another worker has described; takes it out of the estate. Everything is still.
    ///
    /// # Errors
    /// Why it cannot go on here. Nothing of it is kept then.
    fn inherit(
        &mut self,
        _estate: &mut Estate<OwnedFd>,
        _turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        Ok(())
    }

    /// Begins to forget what has been described, and all doors, where others go on now. What the kernel still
    /// has of it is taken back; once everything is still again, [`Driver::thaw`] follows.
    fn leave(&mut self, _turn: &mut Turn<'_>) {}

    /// Goes on. Receives find blocks again.
    fn thaw(&mut self, turn: &mut Turn<'_>);

    /// Whether those who are still here once others have left may follow them one by one. Said before
    /// [`Order::Drain`]; from a later `false` on, whoever has not gone stays to its end.
    fn may_depart(&mut self, _may: bool, _turn: &mut Turn<'_>) {}

    /// Describes those who can follow at this moment, and forgets them at once. The worker goes on.
    fn depart(&mut self, _estate: &mut Estate<OwnedFd>, _turn: &mut Turn<'_>) {}

    /// Takes up those who come one by one, each by itself. The worker goes on.
    fn join(&mut self, _estate: &mut Estate<OwnedFd>, _turn: &mut Turn<'_>) {}
}
