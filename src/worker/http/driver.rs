//! API users between the ring and their sessions: completions become events, commands become
//! operations. Owns the API door and the sockets on both sides; decides nothing about them (that is
//! `sessions`').

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::sessions::{Cmd, Conn, Sessions};
use crate::base::time::Now;
use crate::http::answer;
use crate::proxy::outlook::Outlook;
use crate::proxy::{self, Event, Intake, Side};
use crate::ring::outlook::outlook;
use crate::ring::{self, Done, Ring, Tag, Until, sys};
use crate::worker::books::Books;
use crate::worker::door::{Arrival, Door};
use crate::worker::driver::{Driver, Turn};
use crate::worker::family;
use crate::worker::link::Order;
use crate::worker::slots::{GENERATION_MASK, Key};
use crate::worker::tcp::driver::received;

const _: () = assert!(GENERATION_MASK == ring::GENERATION, "a key comes back as it went");

const ACCEPT: u8 = family::API | 1;
const CONNECT: u8 = family::API | 2;
const USER_RECEIVE: u8 = family::API | 3;
const USER_SEND: u8 = family::API | 4;
const LINK_RECEIVE: u8 = family::API | 5;
const LINK_SEND: u8 = family::API | 6;
const USER_ROOM: u8 = family::API | 7;
const LINK_ROOM: u8 = family::API | 8;

/// Commands that may wait while one event is handled, before the list has to grow.
const COMMANDS: usize = 64;

pub struct HttpDriver {
    sessions: Sessions,
    door: Door,
    /// By the place of a user, and of a connection to a backend.
    users: Vec<Option<OwnedFd>>,
    links: Vec<Option<OwnedFd>>,
    commands: Vec<Cmd>,
}

impl HttpDriver {
    /// `listener`: the API door, if there is one.
    pub fn new(sessions: Sessions, listener: Option<OwnedFd>) -> HttpDriver {
        HttpDriver {
            sessions,
            door: Door::new(listener, Tag { kind: ACCEPT, generation: 0, slot: 0 }),
            users: Vec::new(),
            links: Vec::new(),
            commands: Vec::with_capacity(COMMANDS),
        }
    }
}

impl Driver for HttpDriver {
    fn start(&mut self, ring: &mut Ring) {
        // Without a door there are no heads to write, and no blocks have to be kept back for them.
        if self.door.is_open() {
            self.sessions.start(ring.pool_mut());
        }
        self.door.open(ring);
    }

    fn live(&self) -> usize {
        self.sessions.live()
    }

    fn next_deadline(&self) -> Option<Now> {
        [self.sessions.next_deadline(), self.door.next_deadline()].into_iter().flatten().min()
    }

    fn is_waiting(&self, _ring: &Ring) -> bool {
        self.sessions.wants_blocks()
    }

    fn complete(&mut self, done: Done, turn: &mut Turn<'_>) {
        let key = Key { place: done.tag.slot, generation: done.tag.generation };
        let (conn, event) = match done.tag.kind {
            USER_RECEIVE => (Conn::User(key), received(Side::Client, done)),
            USER_SEND => (Conn::User(key), Event::Sent { side: Side::Client, result: done.result }),
            LINK_RECEIVE => (Conn::Link(key), received(Side::Backend, done)),
            LINK_SEND => {
                (Conn::Link(key), Event::Sent { side: Side::Backend, result: done.result })
            }
            USER_ROOM => (Conn::User(key), room(Side::Client, turn.books)),
            LINK_ROOM => (Conn::Link(key), room(Side::Backend, turn.books)),
            CONNECT => {
                let result = done.result.map(|_| ());
                self.sessions.connected(key, result, &mut turn.cx(&mut self.commands));
                return self.execute(turn);
            }
            _ => {
                self.arrived(done, turn);
                return self.execute(turn);
            }
        };
        self.sessions.happened(conn, event, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn housekeep(&mut self, turn: &mut Turn<'_>) {
        self.door.housekeep(turn.now, turn.ring);
        self.sessions.expire(&mut turn.cx(&mut self.commands));
        if self.sessions.is_starved() {
            self.sessions.relieve(&mut turn.cx(&mut self.commands));
        }
        self.execute(turn);
        let counters = &turn.books.metrics().counters;
        counters.api_upstream_idle.set(self.sessions.spares() as u64);
        counters.api_upstream_private.set(self.sessions.private() as u64);
    }

    fn order(&mut self, order: Order, turn: &mut Turn<'_>) {
        if matches!(order, Order::Drain | Order::Stop) {
            for socket in self.door.close(turn.ring) {
                self.welcome(socket, turn);
                self.execute(turn);
            }
        }
        self.sessions.order(order, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }
}

impl HttpDriver {
    fn arrived(&mut self, done: Done, turn: &mut Turn<'_>) {
        match self.door.complete(turn.now, done, turn.ring) {
            Arrival::User(socket) => self.welcome(socket, turn),
            Arrival::Shed(socket) => {
                sys::say_and_close(socket, answer::NO_DESCRIPTOR);
                self.door.refill();
                turn.books.metrics().counters.users_refused_exhausted.one();
            }
            Arrival::Failed => turn.books.metrics().counters.accept_failed.one(),
            Arrival::Nobody => {}
        }
    }

    fn welcome(&mut self, socket: OwnedFd, turn: &mut Turn<'_>) {
        // A user who is gone already has no address any more.
        let Ok(client) = sys::peer(socket.as_fd()) else { return };
        let key = self.sessions.accepted(client, &mut turn.cx(&mut self.commands));
        *place(&mut self.users, key) = Some(socket);
    }

    /// Turns commands into operations, in their order. A command may cause further ones at once.
    fn execute(&mut self, turn: &mut Turn<'_>) {
        let mut next = 0;
        while let Some(command) = self.commands.get(next).copied() {
            next += 1;
            match command {
                Cmd::Wire { conn, what } => self.operate(conn, what, turn),
                Cmd::Connect { link, to } => {
                    if let Err(errno) = self.connect(link, to, turn.ring) {
                        self.sessions.connected(link, Err(errno), &mut turn.cx(&mut self.commands));
                    }
                }
                Cmd::Look { conn } => self.look(conn, turn),
                Cmd::CancelConnect { link } => turn.ring.cancel(tag_of(CONNECT, link)),
                Cmd::Close { conn, reset } => self.close(conn, reset, turn.ring),
            }
        }
        self.commands.clear();
    }

    fn operate(&mut self, conn: Conn, what: proxy::Cmd, turn: &mut Turn<'_>) {
        let (sockets, key, receive, send, room) = match conn {
            Conn::User(key) => (&self.users, key, USER_RECEIVE, USER_SEND, USER_ROOM),
            Conn::Link(key) => (&self.links, key, LINK_RECEIVE, LINK_SEND, LINK_ROOM),
        };
        let socket = sockets[key.place as usize].as_ref();
        let socket = socket.expect("a gateway uses connections that are open").as_fd();
        let [receive, send, room] = [receive, send, room].map(|kind| tag_of(kind, key));
        match what {
            proxy::Cmd::Receive { how: Intake::Many { bytes_max }, .. } => {
                turn.ring.receive_many(receive, socket, bytes_max);
            }
            proxy::Cmd::Receive { how: Intake::Once { class, wait_first }, .. } => {
                turn.ring.receive(receive, socket, class, wait_first);
            }
            proxy::Cmd::Receive { how: Intake::Last { wait_first }, .. } => {
                turn.ring.receive_last(receive, socket, wait_first);
            }
            proxy::Cmd::AwaitRoom { first, .. } => {
                if first {
                    sys::bound_unsent(socket);
                }
                turn.books.metrics().counters.flows_held_back.one();
                turn.ring.wait(room, socket, Until::Writable);
            }
            proxy::Cmd::CancelRoom { .. } => turn.ring.cancel(room),
            proxy::Cmd::Send { what, .. } => turn.ring.send(send, socket, what),
            proxy::Cmd::FinishWriting { .. } => sys::finish_writing(socket),
            proxy::Cmd::CancelReceive { .. } => turn.ring.cancel(receive),
            proxy::Cmd::CancelSend { .. } => turn.ring.cancel(send),
            proxy::Cmd::Splice { .. }
            | proxy::Cmd::CancelSplice { .. }
            | proxy::Cmd::EndSplice { .. } => {
                debug_assert!(false, "sessions are not offered splicing");
            }
        }
    }

    fn connect(&mut self, link: Key, to: SocketAddr, ring: &mut Ring) -> Result<(), Errno> {
        let socket = sys::stream(to)
            .map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?;
        ring.connect(tag_of(CONNECT, link), socket.as_fd(), to);
        *place(&mut self.links, link) = Some(socket);
        Ok(())
    }

    fn look(&mut self, conn: Conn, turn: &mut Turn<'_>) {
        let socket = match conn {
            Conn::User(key) => place(&mut self.users, key),
            Conn::Link(key) => place(&mut self.links, key),
        };
        let seen = socket.as_ref().map_or_else(Outlook::default, |it| outlook(it.as_fd()));
        self.sessions.told(conn, seen, &mut turn.cx(&mut self.commands));
    }

    /// A connection whose socket could not be opened has none to close.
    fn close(&mut self, conn: Conn, reset: bool, ring: &mut Ring) {
        let socket = match conn {
            Conn::User(key) => place(&mut self.users, key).take(),
            Conn::Link(key) => place(&mut self.links, key).take(),
        };
        if let Some(socket) = socket {
            if reset {
                sys::reset_on_close(socket.as_fd());
            }
            ring.close(socket);
            self.door.refill();
        }
    }
}

/// The answer to the question whether a connection takes more.
fn room(side: Side, books: &Books) -> Event {
    books.metrics().counters.flows_held_back.less_one();
    Event::Room { side }
}

/// A key's socket; the list grows to hold it.
fn place(sockets: &mut Vec<Option<OwnedFd>>, key: Key) -> &mut Option<OwnedFd> {
    let place = key.place as usize;
    if sockets.len() <= place {
        sockets.resize_with(place + 1, || None);
    }
    &mut sockets[place]
}

fn tag_of(kind: u8, key: Key) -> Tag {
    Tag { kind, generation: key.generation, slot: key.place }
}
