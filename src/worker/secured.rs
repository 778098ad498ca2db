//! Which connections of a driver speak TLS, and what lies between them and their sessions. Owns these by
//! place, checks that the one found belongs to the key asked for, and keeps the sends that wait for the end of
//! a turn.

use std::io::Write;

use super::slots::Key;
use crate::proxy::tls::{Below, Session};
use crate::proxy::{Event, Side, StreamCmd};
use crate::ring::pool::Pool;

/// A socket: the place of its session or connection, and its side.
pub type End = (Key, Side);

/// By place and side; nothing as long as nobody speaks TLS.
#[derive(Default)]
pub struct Secured {
    all: Vec<[Option<Box<Seat>>; 2]>,
    below: Vec<Below>,
    above: Vec<Event>,
    unsealed: Vec<(Key, StreamCmd)>,
}

struct Seat {
    generation: u32,
    session: Session,
}

impl Secured {
    /// Whether this connection speaks TLS.
    #[inline]
    pub fn has(&self, (key, side): End) -> bool {
        !self.all.is_empty() && self.find(key, side as usize).is_some()
    }

    fn find(&self, key: Key, side: usize) -> Option<&Seat> {
        let seat = self.all.get(key.place as usize)?[side].as_deref()?;
        (seat.generation == key.generation).then_some(seat)
    }

    /// From now on this connection does.
    pub fn put(&mut self, (key, side): End, session: Session) {
        let place = key.place as usize;
        if self.all.len() <= place {
            self.all.resize_with(place + 1, Default::default);
        }
        let seat = Seat { generation: key.generation, session };
        let before = self.all[place][side as usize].replace(Box::new(seat));
        debug_assert!(before.is_none(), "a connection is closed before its place is used again");
    }

    /// The session, and the lists for what it asks of the driver and tells its own session.
    pub fn get(
        &mut self,
        (key, side): End,
    ) -> Option<(&mut Session, &mut Vec<Below>, &mut Vec<Event>)> {
        let Secured { all, below, above, .. } = self;
        let seat = all.get_mut(key.place as usize)?[side as usize].as_deref_mut()?;
        let is_its_own = seat.generation == key.generation;
        is_its_own.then_some((&mut seat.session, below, above))
    }

    /// Has a send wait for the end of the turn.
    pub fn put_off(&mut self, key: Key, what: StreamCmd) {
        self.unsealed.push((key, what));
    }

    pub fn has_unsealed(&self) -> bool {
        !self.unsealed.is_empty()
    }

    /// The sends that wait, in their order; once they have been carried out, the list comes back by
    /// [`Secured::keep_list`].
    pub fn take_unsealed(&mut self) -> Vec<(Key, StreamCmd)> {
        std::mem::take(&mut self.unsealed)
    }

    /// Keeps an empty list for its memory.
    pub fn keep_list(&mut self, list: Vec<(Key, StreamCmd)>) {
        debug_assert!(list.is_empty() && self.unsealed.is_empty(), "sealing puts nothing off");
        self.unsealed = list;
    }

    /// Takes a session off its connection, which is about to be closed. Returns whether the driver waits for
    /// room on its behalf, and is to stop.
    pub fn close(
        &mut self,
        (key, side): End,
        reset: bool,
        outlet: &mut dyn Write,
        pool: &mut Pool,
    ) -> bool {
        let Some(seats) = self.all.get_mut(key.place as usize) else { return false };
        let seat = seats[side as usize].take();
        seat.is_some_and(|seat| seat.session.close(reset, outlet, pool))
    }
}
