//! What the worker's loop asks of the UDP driver. Owns nothing: the driver's own methods do it.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::UdpDriver;
use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::estate::{Estate, Parcel};
use crate::ring::{Done, Ring};
use crate::worker::door::describe;
use crate::worker::driver::{Driver, Turn};
use crate::worker::link::{DoorChange, Order};

impl Driver for UdpDriver {
    fn change_door(&mut self, change: DoorChange, turn: &mut Turn<'_>) {
        self.change_door(change, turn);
    }

    fn live(&self) -> usize {
        self.live()
    }

    fn complete(&mut self, done: Done, turn: &mut Turn<'_>) {
        self.complete(done, turn);
    }

    fn housekeep(&mut self, turn: &mut Turn<'_>) {
        self.housekeep(turn);
    }

    fn next_deadline(&self) -> Option<Now> {
        self.next_deadline()
    }

    fn is_waiting(&self, ring: &Ring) -> bool {
        ring.has_returned()
    }

    fn order(&mut self, order: Order, turn: &mut Turn<'_>) {
        self.order(order, turn);
    }

    fn adopt(&mut self, snapshot: &Snapshot) {
        self.adopt(snapshot);
    }

    fn freeze(&mut self, _turn: &mut Turn<'_>) {}

    fn note(&mut self, done: Done, turn: &mut Turn<'_>) {
        self.note(done, turn);
    }

    fn is_still(&mut self) -> bool {
        UdpDriver::is_still(self)
    }

    fn describe(&mut self, estate: &mut Estate<RawFd>, turn: &mut Turn<'_>) {
        self.describe_all(estate, turn);
    }

    fn inherit(&mut self, estate: &mut Estate<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), String> {
        self.inherit_all(estate, turn)
    }

    fn describe_doors(&self, doors: &mut Parcel<RawFd>) {
        for (number, door) in self.doors.iter().enumerate() {
            door.iter().for_each(|it| describe(number as u16, it.socket.as_raw_fd(), doors));
        }
    }

    fn leave(&mut self, turn: &mut Turn<'_>) {
        self.leave(turn);
    }

    fn thaw(&mut self, _turn: &mut Turn<'_>) {
        self.described = false;
    }
}
