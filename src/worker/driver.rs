//! What the loop asks of a protocol. Owns the seam between `shell` and the rooms: a room implements
//! [`Driver`], and the loop knows it by nothing else.

use super::books::Books;
use super::link::Order;
use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::ring::{Done, Ring};

/// What a driver works with while it is called: the time, the ring, the books of its worker.
pub struct Turn<'a> {
    pub now: Now,
    pub ring: &'a mut Ring,
    pub books: &'a mut Books,
}

/// One protocol between the ring and its sessions.
pub trait Driver {
    /// Opens the door and posts the first receives.
    fn start(&mut self, ring: &mut Ring);

    /// Sessions in any phase, and connections that the kernel still works for.
    fn live(&self) -> usize;

    /// An operation of this driver's has completed.
    fn complete(&mut self, done: Done, turn: &mut Turn<'_>);

    /// Does what is due whatever completed: deadlines, flows that waited for blocks.
    fn housekeep(&mut self, turn: &mut Turn<'_>);

    /// When [`Driver::housekeep`] has something to do next, if nothing completes before.
    fn next_deadline(&self) -> Option<Now>;

    /// Whether [`Driver::housekeep`] is to be called in this turn, because of what another driver may
    /// have let go of.
    fn is_waiting(&self, ring: &Ring) -> bool;

    fn order(&mut self, order: Order, turn: &mut Turn<'_>);

    /// Takes note of who is registered now.
    fn adopt(&mut self, _snapshot: &Snapshot) {}

    /// Whether the next turn must not wait for a completion.
    fn is_eager(&self) -> bool {
        false
    }

    /// Takes one step of one long stream, at the end of a turn.
    fn step(&mut self, _turn: &mut Turn<'_>) {}

    /// A message passed through the worker by another driver: long streams are to leave room for the next.
    fn note_message(&mut self, _now: Now) {}
}
