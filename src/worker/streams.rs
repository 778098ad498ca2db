//! The stream sockets of one driver: accepted and connected, received from and sent to, shut down,
//! looked at and closed. Owns the doors, the sockets by session, the way from a completion back to its
//! socket, and what lies between the two where a socket speaks TLS; what to do with them is decided
//! elsewhere. How they stand still while another process takes them over is in `still`.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::approach::{Approaches, Step};
use super::door::{Arrival, Doors};
use super::driver::Turn;
use super::greetings::{Greetings, Newcomer};
use super::link::DoorChange;
use super::lobby::Lobby;
use super::opening::{Opening, Unconnected};
pub use super::secured::End;
use super::secured::Secured;
use super::slots::{GENERATION_MASK, Key};
use crate::base::time::Now;
use crate::proxy::greeting::{self, Caller, Ends, WRITTEN_MAX};
use crate::proxy::outlook::Outlook;
use crate::proxy::tls::{Below, Session, Wire};
use crate::proxy::{self, Event, Intake, Received, Side};
use crate::ring::outlook::outlook;
use crate::ring::{self, Done, Ring, Tag, Until, sys};

mod still;

pub use still::claim;

const _: () = assert!(GENERATION_MASK == ring::GENERATION, "a key comes back as it went");

// What an operation does, in the lower four bits of its kind.
const ACCEPT: u8 = 1;
const CONNECT: u8 = 2;
const RECEIVE: u8 = 3;
const SEND: u8 = 4;
const ROOM: u8 = 5;
const GREETING: u8 = 6;
const LOBBY: u8 = 7;
/// What TLS has sealed can go on.
const SEALED_ROOM: u8 = 8;
/// A handshake with a backend can go on.
const APPROACH: u8 = 9;
/// The first of the operations that a driver defines itself.
pub const OWN: u8 = 10;
const OPERATION: u8 = 0x0f;

/// The streams of the driver whose completions are of this family.
pub struct Streams<const FAMILY: u8> {
    pub doors: Doors,
    greetings: Greetings,
    lobby: Lobby,
    /// The last words to a user turned away for want of descriptors, before the connection is closed.
    farewell: Option<&'static [u8]>,
    sockets: Sockets,
    secured: Secured,
    approaches: Approaches,
    /// What has happened to sessions whose connections speak TLS, and has not been told them.
    happened: VecDeque<(Key, News)>,
    /// What has completed while the worker stood still, and waits until it goes on.
    held: Vec<Done>,
    /// Those who have been accepted meanwhile, and wait for the same.
    late: Vec<Newcomer>,
}

/// By place and side.
type Sockets = Vec<[Option<OwnedFd>; 2]>;

/// What TLS has brought about.
pub enum News {
    Happened(Event),
    /// The handshake with a backend is over, or has failed.
    Connected(Result<(), Unconnected>),
}

/// What a completion means to the driver.
pub enum Completion {
    Happened(Key, Event),
    /// The kernel has connected to a backend, or could not; whether TLS follows is the driver's matter.
    Connected(Key, Result<(), Errno>),
    /// Somebody who can be served.
    Arrived(Newcomer),
    /// Nothing that concerns a session.
    Nothing,
    /// An operation that the driver has defined itself.
    Own(Done),
}

impl<const FAMILY: u8> Streams<FAMILY> {
    /// `farewell`: the last words to a user turned away for want of descriptors, where users speak first.
    pub fn new(farewell: Option<&'static [u8]>, now: Now) -> Streams<FAMILY> {
        let doors = Doors::new(FAMILY | ACCEPT);
        let greetings = Greetings::new(FAMILY | GREETING, farewell.is_some(), now);
        // Users who speak first speak HTTP.
        let lobby = Lobby::new(FAMILY | LOBBY, farewell.is_some(), now);
        Streams {
            doors,
            greetings,
            lobby,
            farewell,
            sockets: Vec::new(),
            secured: Secured::default(),
            approaches: Approaches::default(),
            happened: VecDeque::new(),
            held: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Connections of which it is not known yet for whom they come.
    pub fn live(&self) -> usize {
        self.greetings.live() + self.lobby.live()
    }

    /// Whether the next turn must not wait for a completion.
    pub fn is_eager(&self) -> bool {
        self.lobby.is_busy() || self.approaches.is_busy() || self.secured.has_unsealed()
    }

    /// When [`Streams::housekeep`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        let (greetings, lobby) = (self.greetings.next_deadline(), self.lobby.next_deadline());
        [self.doors.next_deadline(), greetings, lobby].into_iter().flatten().min()
    }

    /// Accepts again where that has failed, and waits no longer for what should have come.
    pub fn housekeep(&mut self, turn: &mut Turn<'_>) {
        self.doors.housekeep(turn.now, turn.ring);
        self.greetings.expire(turn);
        if self.lobby.live() > 0 {
            self.lobby.housekeep(turn);
            self.doors.refill();
        }
        for _ in 0..self.approaches.due() {
            self.step(turn);
        }
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
            RECEIVE if self.secured.has((key, side)) => self.opened((key, side), done, turn),
            RECEIVE => Completion::Happened(key, received(side, done)),
            SEND => Completion::Happened(key, Event::Sent { side, result: done.result }),
            ROOM => {
                turn.books.metrics().counters.flows_held_back.less_one();
                Completion::Happened(key, Event::Room { side })
            }
            CONNECT => Completion::Connected(key, done.result.map(|_| ())),
            ACCEPT => {
                let arrival = self.doors.complete(turn.now, done, turn.ring);
                self.arrived(arrival, turn)
            }
            GREETING => {
                let user = self.greetings.complete(&done, turn);
                let user = user.and_then(|user| self.secure(user, turn));
                self.arrived_late(user)
            }
            LOBBY => {
                let user = self.lobby.complete(&done, turn);
                self.arrived_late(user)
            }
            APPROACH => {
                self.approaches.wake(key);
                Completion::Nothing
            }
            SEALED_ROOM => {
                self.call((key, side), turn, Session::room);
                Completion::Nothing
            }
            _ => Completion::Own(done),
        }
    }

    fn arrived_late(&mut self, user: Option<Newcomer>) -> Completion {
        if user.is_none() {
            // Its descriptor may be free now.
            self.doors.refill();
        }
        user.map_or(Completion::Nothing, Completion::Arrived)
    }

    fn arrived(&mut self, arrival: Arrival, turn: &mut Turn<'_>) -> Completion {
        let user = self.let_in(arrival, turn);
        let user = user.and_then(|user| self.meet(user, turn));
        user.map_or(Completion::Nothing, Completion::Arrived)
    }

    fn let_in(&mut self, arrival: Arrival, turn: &Turn<'_>) -> Option<Newcomer> {
        let counters = &turn.books.metrics().counters;
        match arrival {
            Arrival::User(socket, doorway) => return Newcomer::new(socket, doorway),
            Arrival::Shed(socket) => {
                match self.farewell {
                    Some(words) => sys::say_and_close(socket, words),
                    None => drop(socket),
                }
                self.doors.refill();
                counters.users_refused_exhausted.one();
            }
            Arrival::Failed => counters.accept_failed.one(),
            Arrival::Nobody => {}
        }
        None
    }

    /// Whether a session has a connection that speaks TLS, or is about to: what it has is not all in the kernel and
    /// in blocks, so it cannot go on elsewhere.
    pub fn is_apart(&self, key: Key) -> bool {
        self.approaches.has(key) || Side::BOTH.into_iter().any(|side| self.secured.has((key, side)))
    }

    /// Whether a connection speaks TLS.
    pub fn is_secured(&self, end: End) -> bool {
        self.secured.has(end)
    }

    /// Changes a door. Users whom the kernel has accepted already at one that closes are handed out,
    /// each to be met.
    pub fn change_door(
        &mut self,
        change: DoorChange,
        ring: &mut Ring,
    ) -> impl Iterator<Item = Newcomer> + use<FAMILY> {
        let mut waiting = None;
        match change {
            DoorChange::Open(listener) => self.doors.open(listener, ring),
            DoorChange::Assign { id, service, is_tls } => {
                self.doors.assign(id, service, is_tls);
                self.greetings.assign(id, service);
                self.lobby.assign(id, service);
            }
            DoorChange::Close { id } => waiting = Some(self.doors.close(id, ring)),
        }
        let waiting = waiting.into_iter().flatten();
        waiting.filter_map(|(socket, doorway)| Newcomer::new(socket, doorway))
    }

    /// Stops accepting. Users whom the kernel has accepted already are handed out, each to be met.
    pub fn close_doors(&mut self, ring: &mut Ring) -> impl Iterator<Item = Newcomer> + use<FAMILY> {
        self.doors.close_all(ring).filter_map(|(socket, doorway)| Newcomer::new(socket, doorway))
    }

    /// Hands a user back who can be served at once.
    pub fn meet(&mut self, user: Newcomer, turn: &mut Turn<'_>) -> Option<Newcomer> {
        let user = self.greetings.meet(user, turn)?;
        self.secure(user, turn)
    }

    /// The same for one of whom it is known for whom it comes.
    fn secure(&mut self, user: Newcomer, turn: &mut Turn<'_>) -> Option<Newcomer> {
        // The requests of API users are routed one by one.
        let is_split = self.farewell.is_none() && turn.books.is_split(user.doorway);
        if !is_split && !turn.books.speaks_tls(user.doorway) {
            return Some(user);
        }
        self.lobby.meet(user, turn);
        None
    }

    /// Waits for nobody any more.
    pub fn stop(&mut self, ring: &mut Ring) {
        self.greetings.stop(ring);
        self.lobby.stop(ring);
    }

    /// Keeps a socket in its place; one that was there before is closed.
    pub fn keep(&mut self, (key, side): End, socket: OwnedFd) {
        let place = key.place as usize;
        if self.sockets.len() <= place {
            self.sockets.resize_with(place + 1, Default::default);
        }
        self.sockets[place][side as usize] = Some(socket);
    }

    /// Keeps a user's socket in its place, under TLS if it speaks that.
    pub fn seat(&mut self, key: Key, user: Newcomer, turn: &Turn<'_>) {
        let end = (key, Side::Client);
        self.keep(end, user.socket);
        if let Some(engine) = user.engine {
            let is_ragged = turn.books.tls().takes_ragged_ends;
            let takes_ragged_ends = is_ragged || self.farewell.is_some();
            self.secured.put(end, Session::new(end.1, *engine, takes_ragged_ends));
        }
    }

    /// Seals and writes what sessions send under TLS, one after another: each between the work of others
    /// would find neither the cipher nor the kernel's way to the network in the processor's caches. False if
    /// there was nothing.
    pub fn seal(&mut self, turn: &mut Turn<'_>) -> bool {
        let mut waiting = self.secured.take_unsealed();
        let is_any = !waiting.is_empty();
        for (key, what) in waiting.drain(..) {
            self.call((key, what.side()), turn, |it, wire| it.command(what, wire));
        }
        self.secured.keep_list(waiting);
        is_any
    }

    /// The next thing that has happened to a session whose connection speaks TLS.
    pub fn next_news(&mut self) -> Option<(Key, News)> {
        self.happened.pop_front()
    }

    /// A receive below TLS is over.
    fn opened(&mut self, end: End, done: Done, turn: &mut Turn<'_>) -> Completion {
        if let Event::Received { what, nonempty, .. } = received(end.1, done) {
            self.call(end, turn, |session, wire| session.received(what, nonempty, wire));
        }
        Completion::Nothing
    }

    /// Calls what lies between a session and its connection, and does what it asks for on either side.
    fn call(
        &mut self,
        end: End,
        turn: &mut Turn<'_>,
        act: impl FnOnce(&mut Session, &mut Wire<'_>),
    ) {
        let Some(socket) = socket_of(&self.sockets, end) else { return };
        let Some((session, below, above)) = self.secured.get(end) else { return };
        let (now, pool, outlet) = (turn.now, turn.ring.pool_mut(), &mut sys::Outlet(socket));
        act(session, &mut Wire { now, pool, outlet, below, above });
        self.happened.extend(above.drain(..).map(|event| (end.0, News::Happened(event))));
        let tag = |operation| Self::tag(operation, end);
        for what in below.drain(..) {
            match what {
                Below::Receive(how) => receive(tag(RECEIVE), socket, how, turn.ring),
                Below::CancelReceive => turn.ring.cancel(tag(RECEIVE)),
                Below::AwaitRoom => turn.ring.wait(tag(SEALED_ROOM), socket, Until::Writable),
                Below::CancelRoom => turn.ring.cancel(tag(SEALED_ROOM)),
                Below::FinishWriting => sys::finish_writing(socket),
                Below::CountBroken => turn.books.metrics().counters.tls_broken.one(),
            }
        }
    }

    pub fn socket(&self, end: End) -> Option<BorrowedFd<'_>> {
        socket_of(&self.sockets, end)
    }

    /// Opens a socket for the backend's side and connects it. An older one there has failed; nothing is
    /// in flight on it.
    ///
    /// # Errors
    ///
    /// The kernel's error if it had no socket for us, mostly for want of descriptors.
    pub fn connect(&mut self, key: Key, to: SocketAddr, ring: &mut Ring) -> Result<(), Errno> {
        let socket = sys::stream(to)
            .map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?;
        let end = (key, Side::Backend);
        ring.connect(Self::tag(CONNECT, end), socket.as_fd(), to);
        self.keep(end, socket);
        Ok(())
    }

    /// Gives up a connection that is being made, in whatever stage it is.
    pub fn cancel_connect(&mut self, key: Key, ring: &mut Ring) {
        let end = (key, Side::Backend);
        ring.cancel(Self::tag(CONNECT, end));
        if self.approaches.cancel(key) {
            ring.cancel(Self::tag(APPROACH, end));
        }
    }

    /// Begins TLS on a connection to a backend that has just been established. How it ends is told among the
    /// [news](Streams::next_news).
    pub fn approach(&mut self, key: Key, opening: Opening) {
        self.approaches.begin(key, opening);
    }

    /// Takes a step of a handshake with a backend.
    fn step(&mut self, turn: &mut Turn<'_>) {
        let Streams { approaches, sockets, .. } = self;
        let of = |key| socket_of(sockets, (key, Side::Backend));
        let Some((key, step)) = approaches.step(&turn.books.metrics().counters, turn.now, of)
        else {
            return;
        };
        let end = (key, Side::Backend);
        let result = match step {
            Step::Wait(until) => {
                if let Some(socket) = of(key) {
                    turn.ring.wait(Self::tag(APPROACH, end), socket, until);
                }
                return;
            }
            Step::Over(engine) => {
                // Only HTTP has an end that is the end of a message.
                let takes_ragged_ends =
                    turn.books.tls().takes_ragged_ends && self.farewell.is_none();
                self.secured.put(end, Session::new(end.1, *engine, takes_ragged_ends));
                Ok(())
            }
            Step::Failed(why) => Err(why),
        };
        self.happened.push_back((key, News::Connected(result)));
    }

    /// Sends a backend the PROXY header of a new connection to it, which is for the user on this socket.
    ///
    /// # Errors
    /// The connection has failed already, or there is no memory for it.
    pub fn introduce(
        &self,
        (user, caller): (Key, Caller),
        to: Key,
        turn: &mut Turn<'_>,
    ) -> Result<(), Errno> {
        let ends = [(user, Side::Client), (to, Side::Backend)].map(|end| self.socket(end));
        let [Some(user), Some(backend)] = ends else { return Err(Errno::ENOTCONN) };
        let own = || sys::local(user).map_err(|_| Errno::ENOTCONN);
        let destination = caller.destination.map_or_else(own, Ok)?;
        let ends = Ends { source: caller.address, destination };
        turn.books.metrics().counters.proxy_headers_sent.one();
        sys::send_first(backend, greeting::write(Some(ends), &mut [0; WRITTEN_MAX]))
    }

    /// Carries out a command on a socket; splicing is left to its driver.
    #[inline]
    pub fn operate(&mut self, key: Key, what: proxy::StreamCmd, turn: &mut Turn<'_>) {
        let is_of_room = matches!(
            what,
            proxy::StreamCmd::AwaitRoom { .. } | proxy::StreamCmd::CancelRoom { .. }
        );
        if self.secured.has((key, what.side())) && !is_of_room {
            return self.operate_secured(key, what, turn);
        }
        let socket = |side| self.socket((key, side)).expect("commands are about open connections");
        let tag = |operation, side| Self::tag(operation, (key, side));
        let ring = &mut *turn.ring;
        match what {
            proxy::StreamCmd::Receive { side, how } => {
                receive(tag(RECEIVE, side), socket(side), how, ring);
            }
            proxy::StreamCmd::Send { side, what } => ring.send(tag(SEND, side), socket(side), what),
            proxy::StreamCmd::FinishWriting { side } => sys::finish_writing(socket(side)),
            proxy::StreamCmd::CancelReceive { side } => ring.cancel(tag(RECEIVE, side)),
            proxy::StreamCmd::CancelSend { side } => ring.cancel(tag(SEND, side)),
            proxy::StreamCmd::AwaitRoom { side, first } => {
                if first {
                    sys::bound_unsent(socket(side));
                }
                turn.books.metrics().counters.flows_held_back.one();
                ring.wait(tag(ROOM, side), socket(side), Until::Writable);
            }
            proxy::StreamCmd::CancelRoom { side } => ring.cancel(tag(ROOM, side)),
            proxy::StreamCmd::Splice { .. }
            | proxy::StreamCmd::CancelSplice { .. }
            | proxy::StreamCmd::EndSplice { .. } => {
                debug_assert!(false, "sessions without pipes are not offered splicing");
            }
        }
    }

    fn operate_secured(&mut self, key: Key, what: proxy::StreamCmd, turn: &mut Turn<'_>) {
        match what {
            proxy::StreamCmd::Send { .. } => return self.secured.put_off(key, what),
            // It may be about one that waits.
            proxy::StreamCmd::CancelSend { .. } => drop(self.seal(turn)),
            _ => {}
        }
        self.call((key, what.side()), turn, |it, wire| it.command(what, wire));
    }

    /// The state of a socket's send queue; a socket that could not be opened has an empty one.
    pub fn look(&self, end: End) -> Outlook {
        self.socket(end).map_or_else(Outlook::default, outlook)
    }

    /// Closes a socket on which nothing is in flight, if there is one; `reset` sends RST instead of FIN.
    pub fn close(&mut self, (key, side): End, reset: bool, ring: &mut Ring) {
        self.unseat((key, side), reset, ring);
        let sides = self.sockets.get_mut(key.place as usize);
        let Some(socket) = sides.and_then(|sides| sides[side as usize].take()) else { return };
        if reset {
            sys::reset_on_close(socket.as_fd());
        }
        ring.close(socket);
        self.doors.refill();
    }

    /// Takes TLS off a socket that is about to be closed.
    fn unseat(&mut self, end: End, reset: bool, ring: &mut Ring) {
        let Some(socket) = socket_of(&self.sockets, end) else { return };
        let outlet = &mut sys::Outlet(socket);
        if self.secured.close(end, reset, outlet, ring.pool_mut()) {
            ring.cancel(Self::tag(SEALED_ROOM, end));
        }
    }
}

fn socket_of(sockets: &Sockets, (key, side): End) -> Option<BorrowedFd<'_>> {
    sockets.get(key.place as usize)?[side as usize].as_ref().map(OwnedFd::as_fd)
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

/// The outcome of a receive.
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

#[cfg(test)]
mod tests;
