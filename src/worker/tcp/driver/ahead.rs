//! Sockets of TCP sessions that go ahead to a successor while the sessions still move here; and those that have come
//! from a predecessor, until it says what they are. Owns their numbers, and what becomes of those whose sessions
//! end meanwhile.
//!
//! A socket is closed when nobody has a duplicate of it any more, so the end of a session whose sockets have gone
//! ahead is told its peers before. The successor closes what nobody describes.
//! The successor's receives find no blocks until it goes on, so they take nothing of what arrives meanwhile: they
//! end, and are made anew then.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use super::{Streams, TcpDriver};
use crate::estate::ahead::{Ahead, SESSIONS_MAX};
use crate::estate::tcp::SessionRecord;
use crate::proxy::tcp::Relay;
use crate::proxy::{Event, Side, StreamCmd};
use crate::ring::Ring;
use crate::ring::sys::{self, Kind};
use crate::worker::driver::Turn;
use crate::worker::slots::Key;
use crate::worker::tcp::sessions::Seat;

/// Sessions whose sockets have gone ahead, with their numbers.
#[derive(Default)]
pub(super) struct Announced {
    numbers: HashMap<Key, u32>,
    /// Places from here on have not been looked at.
    next_place: u32,
}

impl Announced {
    /// What a record says of it.
    pub fn number(&self, key: Key) -> u32 {
        self.numbers.get(&key).map_or(0, |number| number + 1)
    }

    /// Forgets all of them: the sockets are nobody else's, or another's alone.
    pub fn clear(&mut self) {
        *self = Announced::default();
    }

    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// A session's connections are about to be closed.
    #[cold]
    pub fn close(&mut self, key: Key, reset: bool, streams: &Streams) {
        if self.numbers.remove(&key).is_some() {
            let sockets = Side::BOTH.into_iter().filter_map(|side| streams.socket((key, side)));
            sockets.for_each(|socket| sys::end(socket, reset));
        }
    }
}

/// Whose sockets have come ahead: the worker there, and the number that it has given the session.
type Origin = (u8, u32);

/// Sockets without sessions.
#[derive(Default)]
pub(super) struct Expected {
    places: HashMap<Origin, Key>,
    armed: HashMap<Key, [bool; 2]>,
    /// Nobody has described these, and their receives are being taken back.
    leaving: Vec<Key>,
}

impl Expected {
    /// The place of a session that has been described.
    pub fn take(&mut self, origin: Origin) -> Option<Seat> {
        let key = self.places.remove(&origin)?;
        let armed = self.armed.remove(&key)?;
        Some(Seat { key, armed })
    }

    /// The session that was described for a place cannot be taken up.
    pub fn give_back(&mut self, Seat { key, armed }: Seat) {
        self.armed.insert(key, armed);
        self.leaving.push(key);
    }

    /// Whether something happened to one of them: that a receive is over, which has taken nothing.
    pub fn note(&mut self, key: Key, event: &Event) -> bool {
        let Some(armed) = self.armed.get_mut(&key) else { return false };
        if let Event::Received { side, more: false, .. } = event {
            armed[*side as usize] = false;
        }
        true
    }

    /// Whether no receive is armed any more on what nobody has described.
    pub fn is_still(&self) -> bool {
        self.leaving.is_empty()
    }

    fn is_over(&self, key: Key) -> bool {
        self.armed.get(&key).is_none_or(|armed| *armed == [false; 2])
    }
}

impl TcpDriver {
    /// Duplicates of the sockets of the next sessions, or of the first.
    pub(super) fn announce_next(&mut self, is_first: bool) -> Vec<[OwnedFd; 2]> {
        if is_first {
            self.announced.clear();
        }
        let TcpDriver { sessions, streams, announced, .. } = self;
        let mut all = Vec::with_capacity(SESSIONS_MAX);
        for key in sessions.plain_from(announced.next_place) {
            if all.len() == SESSIONS_MAX {
                break;
            }
            announced.next_place = key.place + 1;
            if streams.is_apart(key) {
                continue;
            }
            let [client, backend] = Side::BOTH.map(|side| streams.socket((key, side)));
            let (Some(client), Some(backend)) = (client, backend) else { continue };
            let sockets = (client.try_clone_to_owned(), backend.try_clone_to_owned());
            let (Ok(client), Ok(backend)) = sockets else {
                // For want of descriptors: the others come with the rest.
                announced.next_place = u32::MAX;
                break;
            };
            announced.numbers.insert(key, announced.numbers.len() as u32);
            all.push([client, backend]);
        }
        all
    }

    /// Takes in sockets whose sessions are described later.
    pub(super) fn expect_all(
        &mut self,
        ahead: &mut Ahead<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        let how = Relay::expecting(self.sessions.features());
        for (number, sockets) in (ahead.first..).zip(ahead.sockets.drain(..)) {
            if sockets.iter().any(|socket| sys::kind(socket.as_fd()) != Kind::Stream) {
                return Err("a session's descriptor is no TCP socket".into());
            }
            let key = self.sessions.reserve();
            if self.expected.places.insert((ahead.worker, number), key).is_some() {
                return Err("two sessions that came ahead have one number".into());
            }
            self.expected.armed.insert(key, [true; 2]);
            for (side, socket) in Side::BOTH.into_iter().zip(sockets) {
                self.streams.keep((key, side), socket);
                self.streams.operate(key, StreamCmd::Receive { side, how }, turn);
            }
        }
        Ok(())
    }

    /// The place of a session that has been described; `None` if its sockets come with it.
    ///
    /// # Errors
    /// They have not come, or have come twice.
    pub(super) fn expected(
        &mut self,
        worker: u8,
        record: &SessionRecord,
    ) -> Result<Option<Seat>, String> {
        let Some(number) = record.ahead.get().checked_sub(1) else { return Ok(None) };
        if record.flags & SessionRecord::RELAYS == 0 {
            return Err("a session has come ahead that is not connected".into());
        }
        let seat = self.expected.take((worker, number));
        seat.map(Some).ok_or_else(|| "a session's sockets have not come ahead".into())
    }

    /// Everything of a worker has been described: what has come ahead besides is of sessions that have ended there.
    pub(super) fn expect_no_more(&mut self, of_worker: u8, turn: &mut Turn<'_>) {
        let gone = self.expected.places.extract_if(|origin, _| origin.0 == of_worker);
        self.expected.leaving.extend(gone.map(|(_, key)| key));
        for key in &self.expected.leaving {
            let armed = self.expected.armed.get(key).copied().unwrap_or_default();
            for side in Side::BOTH.into_iter().filter(|side| armed[*side as usize]) {
                self.streams.operate(*key, StreamCmd::CancelReceive { side }, turn);
            }
        }
        self.close_expected(turn.ring);
    }

    /// Closes those on which nothing is armed any more.
    pub(super) fn close_expected(&mut self, ring: &mut Ring) {
        let mut leaving = std::mem::take(&mut self.expected.leaving);
        leaving.retain(|key| {
            let is_over = self.expected.is_over(*key);
            if is_over {
                self.expected.armed.remove(key);
                Side::BOTH
                    .into_iter()
                    .for_each(|side| self.streams.close((*key, side), false, ring));
                self.sessions.release(*key);
            }
            !is_over
        });
        self.expected.leaving = leaving;
    }
}
