//! The stream sockets of one driver: accepted and connected, received from and sent to, shut down, looked
//! at and closed. Owns the door, the sockets by session, and how a completion finds back to its socket;
//! what to do with them is decided elsewhere.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::door::{Arrival, Door};
use super::driver::Turn;
use super::slots::{GENERATION_MASK, Key};
use crate::proxy::outlook::Outlook;
use crate::proxy::{self, Event, Intake, Received, Side};
use crate::ring::outlook::outlook;
use crate::ring::{self, Done, Ring, Tag, Until, sys};

const _: () = assert!(GENERATION_MASK == ring::GENERATION, "a key comes back as it went");

// What an operation does, in the lower four bits of its kind.
const ACCEPT: u8 = 1;
const CONNECT: u8 = 2;
const RECEIVE: u8 = 3;
const SEND: u8 = 4;
const ROOM: u8 = 5;
/// The first of those that a driver names itself.
pub const OWN: u8 = 6;
const OPERATION: u8 = 0x0f;

/// Which socket: its session's or connection's place, and the side that it is on.
pub type End = (Key, Side);

/// The streams of the driver whose completions are of this family.
pub struct Streams<const FAMILY: u8> {
    pub door: Door,
    /// What a user hears who is turned away for want of descriptors, before the connection is closed.
    farewell: Option<&'static [u8]>,
    /// By place and side.
    sockets: Vec<[Option<OwnedFd>; 2]>,
}

/// A user who has just connected.
pub struct Newcomer {
    pub socket: OwnedFd,
    pub client: SocketAddr,
}

/// What a completion says.
pub enum Completion {
    Happened(Key, Event),
    Connected(Key, Result<(), Errno>),
    Arrived(Newcomer),
    /// Nothing that concerns a session.
    Nothing,
    /// An operation that the driver has named itself.
    Own(Done),
}

impl<const FAMILY: u8> Streams<FAMILY> {
    /// `listener`: the door's, if there is one.
    pub fn new(listener: Option<OwnedFd>, farewell: Option<&'static [u8]>) -> Streams<FAMILY> {
        let tag = Tag { kind: FAMILY | ACCEPT, generation: 0, slot: 0 };
        Streams { door: Door::new(listener, tag), farewell, sockets: Vec::new() }
    }

    /// The name of an operation on a socket; `what` is at least [`OWN`].
    pub fn tag(what: u8, end: End) -> Tag {
        let (key, side) = end;
        Tag { kind: FAMILY | what, generation: key.generation, slot: key.place << 1 | side as u32 }
    }

    #[inline]
    pub fn complete(&mut self, done: Done, turn: &mut Turn<'_>) -> Completion {
        let (key, side) = end_of(done.tag);
        match done.tag.kind & OPERATION {
            RECEIVE => Completion::Happened(key, received(side, done)),
            SEND => Completion::Happened(key, Event::Sent { side, result: done.result }),
            ROOM => {
                turn.books.metrics().counters.flows_held_back.less_one();
                Completion::Happened(key, Event::Room { side })
            }
            CONNECT => Completion::Connected(key, done.result.map(|_| ())),
            ACCEPT => self.arrived(done, turn).map_or(Completion::Nothing, Completion::Arrived),
            _ => Completion::Own(done),
        }
    }

    fn arrived(&mut self, done: Done, turn: &mut Turn<'_>) -> Option<Newcomer> {
        let counters = &turn.books.metrics().counters;
        match self.door.complete(turn.now, done, turn.ring) {
            Arrival::User(socket) => return Newcomer::new(socket),
            Arrival::Shed(socket) => {
                match self.farewell {
                    Some(words) => sys::say_and_close(socket, words),
                    None => drop(socket),
                }
                self.door.refill();
                counters.users_refused_exhausted.one();
            }
            Arrival::Failed => counters.accept_failed.one(),
            Arrival::Nobody => {}
        }
        None
    }

    /// Accepts no more. Those who have been accepted by the kernel already are handed out.
    pub fn close_door(&mut self, ring: &mut Ring) -> impl Iterator<Item = Newcomer> + use<FAMILY> {
        self.door.close(ring).filter_map(Newcomer::new)
    }

    /// Keeps a socket in its place; one that was there before is closed.
    pub fn keep(&mut self, (key, side): End, socket: OwnedFd) {
        let place = key.place as usize;
        if self.sockets.len() <= place {
            self.sockets.resize_with(place + 1, Default::default);
        }
        self.sockets[place][side as usize] = Some(socket);
    }

    pub fn socket(&self, (key, side): End) -> Option<BorrowedFd<'_>> {
        self.sockets.get(key.place as usize)?[side as usize].as_ref().map(OwnedFd::as_fd)
    }

    /// Opens a socket for the backend's side and connects it. An older one there has failed; nothing is
    /// in flight on it.
    ///
    /// # Errors
    ///
    /// What the kernel said when it had no socket for us, mostly for want of descriptors.
    pub fn connect(&mut self, key: Key, to: SocketAddr, ring: &mut Ring) -> Result<(), Errno> {
        let socket = sys::stream(to)
            .map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?;
        let end = (key, Side::Backend);
        ring.connect(Self::tag(CONNECT, end), socket.as_fd(), to);
        self.keep(end, socket);
        Ok(())
    }

    pub fn cancel_connect(&self, key: Key, ring: &mut Ring) {
        ring.cancel(Self::tag(CONNECT, (key, Side::Backend)));
    }

    /// Does on a socket what is asked for; splicing is its driver's own.
    #[inline]
    pub fn operate(&self, key: Key, what: proxy::Cmd, turn: &mut Turn<'_>) {
        let socket = |side| self.socket((key, side)).expect("commands are about open connections");
        let tag = |operation, side| Self::tag(operation, (key, side));
        let ring = &mut *turn.ring;
        match what {
            proxy::Cmd::Receive { side, how } => {
                receive(tag(RECEIVE, side), socket(side), how, ring);
            }
            proxy::Cmd::Send { side, what } => ring.send(tag(SEND, side), socket(side), what),
            proxy::Cmd::FinishWriting { side } => sys::finish_writing(socket(side)),
            proxy::Cmd::CancelReceive { side } => ring.cancel(tag(RECEIVE, side)),
            proxy::Cmd::CancelSend { side } => ring.cancel(tag(SEND, side)),
            proxy::Cmd::AwaitRoom { side, first } => {
                if first {
                    sys::bound_unsent(socket(side));
                }
                turn.books.metrics().counters.flows_held_back.one();
                ring.wait(tag(ROOM, side), socket(side), Until::Writable);
            }
            proxy::Cmd::CancelRoom { side } => ring.cancel(tag(ROOM, side)),
            proxy::Cmd::Splice { .. }
            | proxy::Cmd::CancelSplice { .. }
            | proxy::Cmd::EndSplice { .. } => {
                debug_assert!(false, "sessions without pipes are not offered splicing");
            }
        }
    }

    /// How the send queue of a socket stands; a socket that could not be opened has an empty one.
    pub fn look(&self, end: End) -> Outlook {
        self.socket(end).map_or_else(Outlook::default, outlook)
    }

    /// Closes a socket on which nothing is in flight, if there is one; `reset` sends RST instead of FIN.
    pub fn close(&mut self, (key, side): End, reset: bool, ring: &mut Ring) {
        let sides = self.sockets.get_mut(key.place as usize);
        let Some(socket) = sides.and_then(|sides| sides[side as usize].take()) else { return };
        if reset {
            sys::reset_on_close(socket.as_fd());
        }
        ring.close(socket);
        self.door.refill();
    }
}

impl Newcomer {
    /// `None` for a user who is gone already: the socket has no peer's address any more.
    fn new(socket: OwnedFd) -> Option<Newcomer> {
        let client = sys::peer(socket.as_fd()).ok()?;
        Some(Newcomer { socket, client })
    }
}

/// The socket that a driver's own operation was about.
pub fn end_of(tag: Tag) -> End {
    let side = if tag.slot & 1 == 0 { Side::Client } else { Side::Backend };
    (Key { place: tag.slot >> 1, generation: tag.generation }, side)
}

fn receive(tag: Tag, socket: BorrowedFd<'_>, how: Intake, ring: &mut Ring) {
    match how {
        Intake::Many { bytes_max } => ring.receive_many(tag, socket, bytes_max),
        Intake::Once { class, wait_first } => ring.receive(tag, socket, class, wait_first),
        Intake::Last { wait_first } => ring.receive_last(tag, socket, wait_first),
    }
}

/// What a receive gave.
fn received(side: Side, done: Done) -> Event {
    let what = match (done.result, done.buf) {
        (Ok(_), Some(buf)) => Received::Data(buf),
        (Ok(_), None) => Received::End,
        (Err(Errno::ENOBUFS), _) => Received::NoBuffers,
        (Err(Errno::ECANCELED | Errno::EINTR | Errno::EAGAIN), _) => Received::Stopped,
        (Err(errno), _) => Received::Failed(errno),
    };
    Event::Received { side, what, more: done.more, nonempty: done.nonempty }
}
