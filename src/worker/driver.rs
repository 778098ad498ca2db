//! What the loop asks of a protocol. Owns the seam between `shell` and the rooms: a room implements
//! [`Driver`], and the loop knows nothing else of it.

use super::books::Books;
use super::cx::Cx;
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

impl Turn<'_> {
    /// What a decision made in this turn is handed; its commands go to `out`.
    pub fn cx<'a, C>(&'a mut self, out: &'a mut Vec<C>) -> Cx<'a, C> {
        Cx { now: self.now, pool: self.ring.pool_mut(), books: self.books, out }
    }
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

    /// Whether [`Driver::housekeep`] is to be called in this turn although nothing is due: another
    /// driver may have let go of what this one waits for.
    fn is_waiting(&self, ring: &Ring) -> bool;

    /// Carries out an order of the control core, as far as it concerns this driver.
    fn order(&mut self, order: Order, turn: &mut Turn<'_>);

    /// Takes note of the backends that are registered now.
    fn adopt(&mut self, _snapshot: &Snapshot) {}

    /// Takes one step of one long stream, at the end of a turn in which [`Driver::housekeep`] was called.
    /// `heard_at`: when an operation of another driver last completed, which makes another one likely;
    /// it then has to wait for this step.
    fn step(&mut self, _heard_at: Now, _turn: &mut Turn<'_>) {}

    /// Whether the next turn must not wait for a completion. Asked after [`Driver::step`].
    fn is_eager(&self) -> bool {
        false
    }
}
