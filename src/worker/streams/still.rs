//! The streams of a worker that stands still, or is about to: what completes meanwhile is kept until it goes on, or
//! until another process has taken it over.

use std::os::fd::{AsFd, OwnedFd};

use zerocopy::little_endian::U32;

use super::{
    ACCEPT, CONNECT, Completion, End, OPERATION, OWN, RECEIVE, ROOM, SEND, Streams, end_of,
};
use crate::estate::Unclaimed;
use crate::ring::sys::{self, Kind};
use crate::ring::{Done, Tag};
use crate::worker::driver::Turn;
use crate::worker::greetings::Newcomer;

impl<const FAMILY: u8> Streams<FAMILY> {
    /// As [`Streams::complete`], while the worker is to stand still. What concerns sessions that are
    /// [apart](Streams::is_apart), or nobody's yet, waits until it goes on.
    pub fn note(&mut self, done: Done, turn: &mut Turn<'_>) -> Completion {
        match done.tag.kind & OPERATION {
            ACCEPT => {
                let arrival = self.doors.note(done);
                return self.arrived(arrival, turn);
            }
            CONNECT | RECEIVE | SEND | ROOM if !self.is_apart(end_of(done.tag).0) => {}
            OWN.. => {}
            _ => {
                self.held.push(done);
                return Completion::Nothing;
            }
        }
        self.complete(done, turn)
    }

    /// Keeps what completes until the worker goes on; whoever is accepted waits as well.
    pub fn hold(&mut self, done: Done, turn: &mut Turn<'_>) {
        if done.tag.kind & OPERATION != ACCEPT {
            return self.held.push(done);
        }
        let arrival = self.doors.note(done);
        let user = self.let_in(arrival, turn);
        self.late.extend(user);
    }

    /// Whether an operation is on a connection of a session.
    pub fn is_of_stream(tag: Tag) -> bool {
        matches!(tag.kind & OPERATION, RECEIVE | SEND | ROOM)
    }

    /// Whether it is a receive.
    pub fn is_receive(tag: Tag) -> bool {
        tag.kind & OPERATION == RECEIVE
    }

    /// Whether it waits for room.
    pub fn is_room(tag: Tag) -> bool {
        tag.kind & OPERATION == ROOM
    }

    /// What waits until the worker goes on.
    pub fn held(&self) -> impl Iterator<Item = &Done> {
        self.held.iter().filter(|done| Self::is_of_stream(done.tag))
    }

    /// Takes some of that out.
    pub fn take_held(&mut self, which: impl Fn(&Done) -> bool) -> Vec<Done> {
        let is_one = |done: &mut Done| Self::is_of_stream(done.tag) && which(done);
        self.held.extract_if(.., is_one).collect()
    }

    /// Takes out a socket on which nothing is in flight, and which goes on elsewhere.
    pub fn take(&mut self, (key, side): End) -> Option<OwnedFd> {
        self.sockets.get_mut(key.place as usize)?[side as usize].take()
    }

    /// Goes on, and returns what has waited for that.
    pub fn thaw(&mut self) -> (Vec<Done>, Vec<Newcomer>) {
        self.doors.thaw();
        (std::mem::take(&mut self.held), std::mem::take(&mut self.late))
    }
}

/// A connection that came from another process.
///
/// # Errors
/// It has not come, or is none.
pub fn claim(from: &mut Unclaimed<OwnedFd>, place: U32) -> Result<OwnedFd, String> {
    let socket = from.claim(place)?;
    match sys::kind(socket.as_fd()) {
        Kind::Stream => Ok(socket),
        _ => Err("a session's descriptor is no TCP socket".into()),
    }
}
