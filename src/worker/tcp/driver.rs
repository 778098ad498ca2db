//! TCP users between the ring and the core: completions become events, commands become operations.
//! Owns the TCP door and the sockets of the sessions; decides nothing about them (that is `sessions`'s).

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::sessions::{Cmd, Sessions, Settings};
use super::splices::{Splices, Step};
use crate::base::time::Now;
use crate::proxy::outlook::Outlook;
use crate::proxy::{self, Event, Intake, Received, Side, Spliced, When};
use crate::ring::outlook::outlook;
use crate::ring::{self, Done, Ring, Tag, Until, sys};
use crate::worker::door::{Arrival, Door};
use crate::worker::driver::{Driver, Turn};
use crate::worker::family;
use crate::worker::link::Order;
use crate::worker::slots::{GENERATION_MASK, Key};

const _: () = assert!(GENERATION_MASK == ring::GENERATION, "a key comes back as it went");

const ACCEPT: u8 = family::TCP | 1;
const CONNECT: u8 = family::TCP | 2;
const RECEIVE: u8 = family::TCP | 3;
const SEND: u8 = family::TCP | 4;
const SPLICE: u8 = family::TCP | 5;
const ROOM: u8 = family::TCP | 6;

/// Commands that may wait while one event is handled, before the list has to grow.
const COMMANDS: usize = 64;

pub struct TcpDriver {
    sessions: Sessions,
    door: Door,
    /// By a session's place.
    sockets: Vec<Sockets>,
    splices: Splices,
    commands: Vec<Cmd>,
}

/// The sockets of one session.
#[derive(Default)]
struct Sockets {
    sides: [Option<OwnedFd>; 2],
}

impl TcpDriver {
    /// `listener`: the TCP door, if there is one.
    pub fn new(settings: Settings, listener: Option<OwnedFd>, now: Now) -> TcpDriver {
        let door = Door::new(listener, Tag { kind: ACCEPT, generation: 0, slot: 0 });
        TcpDriver {
            sessions: Sessions::new(settings, now),
            door,
            sockets: Vec::new(),
            splices: Splices::new(),
            commands: Vec::with_capacity(COMMANDS),
        }
    }
}

impl Driver for TcpDriver {
    fn start(&mut self, ring: &mut Ring) {
        self.door.open(ring);
    }

    fn live(&self) -> usize {
        self.sessions.live()
    }

    fn next_deadline(&self) -> Option<Now> {
        let all = [
            self.sessions.next_deadline(),
            self.door.next_deadline(),
            self.splices.next_deadline(),
        ];
        all.into_iter().flatten().min()
    }

    fn is_waiting(&self, _ring: &Ring) -> bool {
        self.sessions.is_starved()
    }

    fn complete(&mut self, done: Done, turn: &mut Turn<'_>) {
        match done.tag.kind {
            RECEIVE | SEND => {
                self.splices.note_message(turn.now);
                let (key, event) = relay_event(done);
                self.sessions.relayed(key, event, &mut turn.cx(&mut self.commands));
            }
            CONNECT => {
                let (key, result) = (key_of(done.tag), done.result.map(|_| ()));
                self.sessions.connected(key, result, &mut turn.cx(&mut self.commands));
            }
            ROOM => {
                turn.books.metrics().counters.flows_held_back.less_one();
                let event = Event::Room { side: side_of(done.tag) };
                self.sessions.relayed(key_of(done.tag), event, &mut turn.cx(&mut self.commands));
            }
            SPLICE => {
                let step = (key_of(done.tag), side_of(done.tag));
                match done.result {
                    Err(Errno::ECANCELED) => self.spliced(step, (0, 0, Spliced::Stopped), turn),
                    _ => self.splices.in_next_turn(step),
                }
            }
            _ => self.arrived(done, turn),
        }
        self.execute(turn);
    }

    fn housekeep(&mut self, turn: &mut Turn<'_>) {
        self.door.housekeep(turn.now, turn.ring);
        self.sessions.expire(&mut turn.cx(&mut self.commands));
        if self.sessions.is_starved() {
            self.sessions.relieve(&mut turn.cx(&mut self.commands));
        }
        self.execute(turn);
    }

    /// A message that comes meanwhile waits for one stream's step, not for all; and one that came before
    /// has left.
    fn step(&mut self, heard_at: Now, turn: &mut Turn<'_>) {
        self.splices.note_message(heard_at);
        self.splices.turn(turn.now);
        let Some(step) = self.splices.pop_due() else { return };
        turn.ring.flush();
        self.splice(step, turn);
        self.execute(turn);
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

    fn is_eager(&self) -> bool {
        self.splices.is_eager()
    }
}

impl TcpDriver {
    fn arrived(&mut self, done: Done, turn: &mut Turn<'_>) {
        match self.door.complete(turn.now, done, turn.ring) {
            Arrival::User(socket) => self.welcome(socket, turn),
            Arrival::Shed(socket) => {
                drop(socket);
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
        let Some(key) = self.sessions.accepted(client, &mut turn.cx(&mut self.commands)) else {
            return;
        };
        let place = key.place as usize;
        if self.sockets.len() <= place {
            self.sockets.resize_with(place + 1, Sockets::default);
        }
        self.sockets[place].sides[Side::Client as usize] = Some(socket);
    }

    /// Turns commands into operations, in their order. A command may cause further ones at once.
    fn execute(&mut self, turn: &mut Turn<'_>) {
        let mut next = 0;
        while let Some(command) = self.commands.get(next).copied() {
            next += 1;
            match command {
                Cmd::Relay { key, what } => self.relay(key, what, turn),
                Cmd::Connect { key, to } => {
                    if let Err(errno) = self.connect(key, to, turn.ring) {
                        self.sessions.connected(key, Err(errno), &mut turn.cx(&mut self.commands));
                    }
                }
                Cmd::Look { key } => self.look(key, turn),
                Cmd::CancelConnect { key } => turn.ring.cancel(tag_of(CONNECT, key, Side::Backend)),
                Cmd::Close { key, reset } => self.close(key, reset, turn.ring),
            }
        }
        self.commands.clear();
    }

    fn relay(&mut self, key: Key, what: proxy::Cmd, turn: &mut Turn<'_>) {
        let socket = |side: Side| {
            let socket = self.sockets[key.place as usize].sides[side as usize].as_ref();
            socket.expect("a relay runs between two open sockets").as_fd()
        };
        match what {
            proxy::Cmd::Receive { side, how } => {
                let tag = tag_of(RECEIVE, key, side);
                match how {
                    Intake::Many { bytes_max } => {
                        turn.ring.receive_many(tag, socket(side), bytes_max)
                    }
                    Intake::Once { class, wait_first } => {
                        turn.ring.receive(tag, socket(side), class, wait_first);
                    }
                    Intake::Last { wait_first } => {
                        turn.ring.receive_last(tag, socket(side), wait_first);
                    }
                }
            }
            proxy::Cmd::Send { side, what } => {
                turn.ring.send(tag_of(SEND, key, side), socket(side), what);
            }
            proxy::Cmd::FinishWriting { side } => sys::finish_writing(socket(side)),
            proxy::Cmd::CancelReceive { side } => turn.ring.cancel(tag_of(RECEIVE, key, side)),
            proxy::Cmd::CancelSend { side } => turn.ring.cancel(tag_of(SEND, key, side)),
            proxy::Cmd::AwaitRoom { side, first } => {
                if first {
                    sys::bound_unsent(socket(side));
                }
                turn.books.metrics().counters.flows_held_back.one();
                turn.ring.wait(tag_of(ROOM, key, side), socket(side), Until::Writable);
            }
            proxy::Cmd::CancelRoom { side } => turn.ring.cancel(tag_of(ROOM, key, side)),
            proxy::Cmd::Splice { side, when } => self.plan_splice((key, side), when, turn),
            proxy::Cmd::CancelSplice { side } => match self.splices.forget((key, side)) {
                true => self.spliced((key, side), (0, 0, Spliced::Stopped), turn),
                false => turn.ring.cancel(tag_of(SPLICE, key, side)),
            },
            proxy::Cmd::EndSplice { side } => self.splices.end((key, side)),
        }
    }

    fn plan_splice(&mut self, step: Step, when: When, turn: &mut Turn<'_>) {
        let (key, side) = step;
        let [client, backend] = &self.sockets[key.place as usize].sides;
        let (Some(client), Some(backend)) = (client, backend) else { return };
        let fresh = || {
            sys::never_block(client.as_fd()).is_ok() && sys::never_block(backend.as_fd()).is_ok()
        };
        if !self.splices.lend(step, fresh) {
            return self.spliced(step, (0, 0, Spliced::Unavailable), turn);
        }
        let (source, sink) = match side {
            Side::Client => (client, backend),
            Side::Backend => (backend, client),
        };
        let tag = tag_of(SPLICE, key, side);
        match when {
            When::NextTurn => self.splices.in_next_turn(step),
            When::Soon => self.splices.soon(step, turn.now),
            When::Later => self.splices.later(step, turn.now),
            When::Readable => turn.ring.wait(tag, source.as_fd(), Until::Readable),
            When::Writable => turn.ring.wait(tag, sink.as_fd(), Until::Writable),
        }
    }

    fn splice(&mut self, step: Step, turn: &mut Turn<'_>) {
        let (key, side) = step;
        let sides = &self.sockets[key.place as usize].sides;
        let socket = |side: Side| sides[side as usize].as_ref().map(OwnedFd::as_fd);
        let (Some(source), Some(sink)) = (socket(side), socket(side.other())) else { return };
        let outcome = self.splices.step(turn.now, step, source, sink);
        self.spliced(step, outcome, turn);
    }

    fn spliced(
        &mut self,
        (key, side): Step,
        (moved, held, how): (u64, usize, Spliced),
        turn: &mut Turn<'_>,
    ) {
        let event = Event::Spliced { side, moved, held, how };
        self.sessions.relayed(key, event, &mut turn.cx(&mut self.commands));
    }

    fn connect(&mut self, key: Key, to: SocketAddr, ring: &mut Ring) -> Result<(), Errno> {
        let socket = sys::stream(to)
            .map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?;
        ring.connect(tag_of(CONNECT, key, Side::Backend), socket.as_fd(), to);
        // An older one has failed; nothing is in flight on it, and dropping it closes it.
        self.sockets[key.place as usize].sides[Side::Backend as usize] = Some(socket);
        Ok(())
    }

    fn look(&mut self, key: Key, turn: &mut Turn<'_>) {
        let outlooks = Side::BOTH.map(|side| {
            let socket = self.sockets[key.place as usize].sides[side as usize].as_ref();
            socket.map_or_else(Outlook::default, |socket| outlook(socket.as_fd()))
        });
        self.sessions.told(key, outlooks, &mut turn.cx(&mut self.commands));
    }

    fn close(&mut self, key: Key, reset: bool, ring: &mut Ring) {
        for side in Side::BOTH {
            self.splices.end((key, side));
            let Some(socket) = self.sockets[key.place as usize].sides[side as usize].take() else {
                continue;
            };
            if reset {
                sys::reset_on_close(socket.as_fd());
            }
            ring.close(socket);
        }
        self.door.refill();
    }
}

fn tag_of(kind: u8, key: Key, side: Side) -> Tag {
    Tag { kind, generation: key.generation, slot: key.place << 1 | side as u32 }
}

fn key_of(tag: Tag) -> Key {
    Key { place: tag.slot >> 1, generation: tag.generation }
}

fn side_of(tag: Tag) -> Side {
    if tag.slot & 1 == 0 { Side::Client } else { Side::Backend }
}

/// The completion of a receive or a send, in the relay's words.
fn relay_event(done: Done) -> (Key, Event) {
    let (key, side) = (key_of(done.tag), side_of(done.tag));
    if done.tag.kind == SEND {
        return (key, Event::Sent { side, result: done.result });
    }
    (key, received(side, done))
}

/// What a receive gave.
pub(in crate::worker) fn received(side: Side, done: Done) -> Event {
    let what = match (done.result, done.buf) {
        (Ok(_), Some(buf)) => Received::Data(buf),
        (Ok(_), None) => Received::End,
        (Err(Errno::ENOBUFS), _) => Received::NoBuffers,
        (Err(Errno::ECANCELED | Errno::EINTR | Errno::EAGAIN), _) => Received::Stopped,
        (Err(errno), _) => Received::Failed(errno),
    };
    Event::Received { side, what, more: done.more, nonempty: done.nonempty }
}
