//! API users between the ring and their sessions: completions become events, commands become
//! operations. Owns their streams and those towards backends; decides nothing about them (that is
//! `sessions`'s).

mod late;
mod still;

use std::os::fd::{OwnedFd, RawFd};

use nix::errno::Errno;

use super::sessions::{Cmd, Conn, Sessions};
use crate::base::time::Now;
use crate::estate::{Estate, Parcel};
use crate::http::answer;
use crate::proxy::greeting::Caller;
use crate::proxy::{self, Event, Side};
use crate::ring::{Done, Ring, Tag};
use crate::worker::driver::{Driver, Turn};
use crate::worker::ends::Ends;
use crate::worker::family;
use crate::worker::greetings::Newcomer;
use crate::worker::link::{DoorChange, Order};
use crate::worker::opening::{Opening, Unconnected};
use crate::worker::slots::Key;
use crate::worker::stream_driver::{COMMANDS, StreamDriver};
use crate::worker::streams::{self, Completion, End, Streams};
use still::Movers;

pub struct HttpDriver {
    sessions: Sessions,
    /// A user's socket is on the client's side of the user's place, a backend's on the other of its
    /// link's: the two number their places each from zero.
    streams: Streams<{ family::API }>,
    commands: Vec<Cmd>,
    movers: Movers,
}

impl HttpDriver {
    pub fn new(sessions: Sessions, now: Now) -> HttpDriver {
        HttpDriver {
            sessions,
            streams: Streams::new(Some(answer::NO_DESCRIPTOR), now),
            commands: Vec::with_capacity(COMMANDS),
            movers: Movers::default(),
        }
    }
}

impl Driver for HttpDriver {
    fn change_door(&mut self, change: DoorChange, turn: &mut Turn<'_>) {
        // Without doors there are no heads to write, and no blocks have to be kept back for them.
        let is_first = !self.streams.doors.is_open() && self.live() == 0;
        if is_first && matches!(change, DoorChange::Open(_)) {
            self.sessions.start(turn.ring.pool_mut());
        }
        let closed = match &change {
            DoorChange::Close { id } => Some(*id),
            DoorChange::Assign { id, service, .. } => {
                self.sessions.assign(*id, *service, &mut turn.cx(&mut self.commands));
                None
            }
            DoorChange::Open(_) => None,
        };
        self.change_stream_door(change, turn);
        if let Some(id) = closed {
            self.sessions.close_door(id, &mut turn.cx(&mut self.commands));
            self.execute(turn);
        }
    }

    fn live(&self) -> usize {
        self.sessions.live() + self.streams.live()
    }

    fn next_deadline(&self) -> Option<Now> {
        [self.sessions.next_deadline(), self.streams.next_deadline()].into_iter().flatten().min()
    }

    fn is_waiting(&self, _ring: &Ring) -> bool {
        self.sessions.wants_blocks() || self.streams.is_eager()
    }

    fn complete(&mut self, done: Done, turn: &mut Turn<'_>) {
        match self.streams.complete(done, turn) {
            Completion::Happened(key, event) => self.happened(key, event, turn),
            Completion::Connected(key, result) => self.established(key, result, turn),
            Completion::Arrived(user) => self.welcome(user, turn),
            Completion::Own(_) => debug_assert!(false, "this driver names no operations"),
            Completion::Nothing => {}
        }
        self.execute(turn);
    }

    fn housekeep(&mut self, turn: &mut Turn<'_>) {
        self.streams.housekeep(turn);
        self.sessions.expire(&mut turn.cx(&mut self.commands));
        if self.sessions.is_starved() {
            self.sessions.relieve(&mut turn.cx(&mut self.commands));
        }
        self.settle(turn);
        let counters = &turn.books.metrics().counters;
        counters.api_upstream_idle.set(self.sessions.spares() as u64);
        counters.api_upstream_private.set(self.sessions.private() as u64);
    }

    fn is_eager(&self) -> bool {
        self.streams.is_eager()
    }

    fn freeze(&mut self, turn: &mut Turn<'_>) {
        self.streams.doors.freeze(turn.ring);
    }

    fn note(&mut self, done: Done, turn: &mut Turn<'_>) {
        self.note_or_hold(done, turn);
    }

    fn take_back(&mut self, turn: &mut Turn<'_>) {
        self.streams.doors.freeze(turn.ring);
        self.take_back_sends(turn);
    }

    fn is_still(&mut self) -> bool {
        self.streams.doors.is_still() && self.users_are_still()
    }

    fn describe(&mut self, estate: &mut Estate<RawFd>, turn: &mut Turn<'_>) {
        self.describe_all(&mut estate.api, turn);
    }

    fn inherit(&mut self, estate: &mut Estate<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), String> {
        self.inherit_all(std::mem::take(&mut estate.api), turn)
    }

    fn describe_doors(&self, doors: &mut Parcel<RawFd>) {
        self.streams.doors.describe(doors);
    }

    fn leave(&mut self, turn: &mut Turn<'_>) {
        self.streams.doors.leave();
        self.leave_all(turn);
    }

    fn thaw(&mut self, turn: &mut Turn<'_>) {
        self.stay();
        self.thaw_streams(turn);
        self.sessions.thaw(&mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn may_depart(&mut self, may: bool, turn: &mut Turn<'_>) {
        self.sessions.may_depart(may, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn depart(&mut self, estate: &mut Estate<OwnedFd>, turn: &mut Turn<'_>) {
        self.let_packed_go(&mut estate.api, turn);
    }

    fn join(&mut self, estate: &mut Estate<OwnedFd>, turn: &mut Turn<'_>) {
        self.join_each(std::mem::take(&mut estate.api), turn);
    }

    fn order(&mut self, order: Order, turn: &mut Turn<'_>) {
        self.order_doors(order, turn);
        self.sessions.order(order, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn end_backends(&mut self, ends: &Ends, turn: &mut Turn<'_>) {
        self.sessions.end_backends(ends, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }
}

impl StreamDriver<{ family::API }> for HttpDriver {
    type Cmd = Cmd;

    fn streams(&mut self) -> &mut Streams<{ family::API }> {
        &mut self.streams
    }

    fn commands(&mut self) -> &mut Vec<Cmd> {
        &mut self.commands
    }

    fn happened(&mut self, key: Key, event: Event, turn: &mut Turn<'_>) {
        let conn = match event.side() {
            Side::Client => Conn::User(key),
            Side::Backend => Conn::Link(key),
        };
        self.sessions.happened(conn, event, &mut turn.cx(&mut self.commands));
    }

    fn introduces(&mut self, key: Key) -> Option<(Key, Caller)> {
        self.sessions.introduces(key)
    }

    fn opening(&mut self, key: Key, turn: &mut Turn<'_>) -> Result<Option<Opening>, Errno> {
        self.sessions.opening(key, &turn.cx(&mut self.commands))
    }

    fn connected(&mut self, key: Key, result: Result<(), Unconnected>, turn: &mut Turn<'_>) {
        self.sessions.tried(key, result, &mut turn.cx(&mut self.commands));
    }

    fn welcome(&mut self, user: Newcomer, turn: &mut Turn<'_>) {
        let cx = &mut turn.cx(&mut self.commands);
        let door = user.doorway.door;
        let key = self.sessions.welcome(user.doorway, user.caller, cx);
        if let Some(shown) = user.engine.as_ref().and_then(|engine| engine.shown()) {
            self.sessions.identify(key, shown);
        }
        let speaks_http2 = user.engine.as_ref().is_some_and(|engine| engine.speaks_http2());
        self.streams.seat(key, user, turn);
        if speaks_http2 {
            self.sessions.speak_http2(key, &mut turn.cx(&mut self.commands));
        }
        if !self.streams.doors.has(door) {
            // It came before the door closed, and has only now said for whom.
            self.sessions.drain_user(key, &mut turn.cx(&mut self.commands));
        }
    }

    fn carry_out(&mut self, command: Cmd, turn: &mut Turn<'_>) {
        match command {
            Cmd::Wire { conn, what } => self.operate(conn, what, turn),
            Cmd::Connect { link, to } => {
                if let Err(errno) = self.streams.connect(link, to, turn.ring) {
                    self.sessions.connected(link, Err(errno), &mut turn.cx(&mut self.commands));
                }
            }
            Cmd::Look { conn } => self.look(conn, turn),
            Cmd::CancelConnect { link } => self.streams.cancel_connect(link, turn.ring),
            Cmd::Close { conn, reset } => self.streams.close(end_of(conn), reset, turn.ring),
        }
    }
}

impl HttpDriver {
    fn operate(&mut self, conn: Conn, what: proxy::StreamCmd, turn: &mut Turn<'_>) {
        let (key, side) = end_of(conn);
        debug_assert_eq!(side, what.side(), "users are clients, links lead to backends");
        self.streams.operate(key, what, turn);
    }

    fn look(&mut self, conn: Conn, turn: &mut Turn<'_>) {
        let seen = self.streams.look(end_of(conn));
        self.sessions.told(conn, seen, &mut turn.cx(&mut self.commands));
    }
}

fn end_of(conn: Conn) -> End {
    match conn {
        Conn::User(key) => (key, Side::Client),
        Conn::Link(key) => (key, Side::Backend),
    }
}

/// The connection that an operation is on.
fn conn_of(tag: Tag) -> Conn {
    match streams::end_of(tag) {
        (key, Side::Client) => Conn::User(key),
        (key, Side::Backend) => Conn::Link(key),
    }
}
