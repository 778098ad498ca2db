//! The stream sockets of one driver: accepted and connected, received from and sent to, shut down,
//! looked at and closed. Owns the doors, the sockets by session, the way from a completion back to its
//! socket, and what lies between the two where a socket speaks TLS; what to do with them is decided
//! elsewhere.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::door::{Arrival, Doors};
use super::driver::Turn;
use super::greetings::{Greetings, Newcomer};
use super::link::DoorChange;
use super::lobby::Lobby;
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
/// The first of the operations that a driver defines itself.
pub const OWN: u8 = 9;
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
    /// What has happened to sessions whose connections speak TLS, and has not been told them.
    happened: VecDeque<(Key, Event)>,
}

/// By place and side.
type Sockets = Vec<[Option<OwnedFd>; 2]>;

/// What a completion means to the driver.
pub enum Completion {
    Happened(Key, Event),
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
        let (secured, happened) = (Secured::default(), VecDeque::new());
        Streams { doors, greetings, lobby, farewell, sockets: Vec::new(), secured, happened }
    }

    /// Connections of which it is not known yet for whom they come.
    pub fn live(&self) -> usize {
        self.greetings.live() + self.lobby.live()
    }

    /// Whether the next turn must not wait for a completion.
    pub fn is_eager(&self) -> bool {
        self.lobby.is_busy() || self.secured.has_unsealed()
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
            ACCEPT => self.arrived(done, turn).map_or(Completion::Nothing, Completion::Arrived),
            GREETING => {
                let user = self.greetings.complete(&done, turn);
                let user = user.and_then(|user| self.secure(user, turn));
                self.arrived_late(user)
            }
            LOBBY => {
                let user = self.lobby.complete(&done, turn);
                self.arrived_late(user)
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

    fn arrived(&mut self, done: Done, turn: &mut Turn<'_>) -> Option<Newcomer> {
        let counters = &turn.books.metrics().counters;
        match self.doors.complete(turn.now, done, turn.ring) {
            Arrival::User(socket, doorway) => {
                return self.meet(Newcomer::new(socket, doorway)?, turn);
            }
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
        let waited = self.secured.has_unsealed();
        for place in 0.. {
            let Some((key, what)) = self.secured.unsealed(place) else { break };
            self.call((key, what.side()), turn, |it, wire| it.command(what, wire));
        }
        self.secured.forget_unsealed();
        waited
    }

    /// The next thing that has happened to a session whose connection speaks TLS.
    pub fn next_event(&mut self) -> Option<(Key, Event)> {
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
        let (pool, outlet) = (turn.ring.pool_mut(), &mut sys::Outlet(socket));
        act(session, &mut Wire { pool, outlet, below, above });
        self.happened.extend(above.drain(..).map(|event| (end.0, event)));
        let tag = |operation| Self::tag(operation, end);
        for what in below.drain(..) {
            match what {
                Below::Receive(how) => receive(tag(RECEIVE), socket, how, turn.ring),
                Below::CancelReceive => turn.ring.cancel(tag(RECEIVE)),
                Below::AwaitRoom => turn.ring.wait(tag(SEALED_ROOM), socket, Until::Writable),
                Below::CancelRoom => turn.ring.cancel(tag(SEALED_ROOM)),
                Below::FinishWriting => sys::finish_writing(socket),
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

    pub fn cancel_connect(&self, key: Key, ring: &mut Ring) {
        ring.cancel(Self::tag(CONNECT, (key, Side::Backend)));
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
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::cluster::{DoorId, ServiceId, Snapshot};
    use crate::ring::RingSettings;
    use crate::worker::books::tests::{Joined, joined};
    use crate::worker::link::Listener;

    const FAMILY: u8 = 0x40;
    const KEY: Key = Key { place: 70_000, generation: GENERATION_MASK };

    struct Stage {
        streams: Streams<FAMILY>,
        ring: Ring,
        joined: Joined,
    }

    impl Stage {
        fn new(farewell: Option<&'static [u8]>) -> Stage {
            let mut ring = Ring::new(RingSettings::with_bytes(1 << 20, false)).unwrap();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let (id, service) = (DoorId(0), ServiceId(3));
            let door = Listener { id, socket: listener.into(), service, is_tls: false };
            let mut streams = Streams::new(farewell, Now::default());
            streams.doors.open(door, &mut ring);
            Stage { streams, ring, joined: joined(Snapshot::default(), 1) }
        }

        fn complete(
            &mut self,
            tag: Tag,
            result: Result<u32, Errno>,
            came: Option<OwnedFd>,
        ) -> Completion {
            let (buf, more, nonempty) = (None, true, false);
            let done = Done { tag, result, buf, accepted: came, more, nonempty };
            let Stage { streams, ring, joined } = self;
            let books = &mut joined.books;
            streams.complete(done, &mut Turn { now: Now::default(), ring, books })
        }

        fn accept(&mut self, result: Result<u32, Errno>, came: Option<OwnedFd>) -> Completion {
            let tag = Tag { kind: FAMILY | ACCEPT, generation: 1, slot: 0 };
            self.complete(tag, result, came)
        }

        fn counted(&self, what: impl Fn(&crate::metrics::WorkerMetrics) -> u64) -> u64 {
            what(self.joined.books.metrics())
        }
    }

    #[test]
    fn a_completion_finds_back_to_its_socket() {
        let mut stage = Stage::new(None);
        for side in Side::BOTH {
            let tag = |what| Streams::<FAMILY>::tag(what, (KEY, side));
            assert_eq!(end_of(tag(SEND)), (KEY, side));
            let sent = stage.complete(tag(SEND), Ok(7), None);
            assert!(
                matches!(sent, Completion::Happened(KEY, Event::Sent { side: to, result: Ok(7) }) if to == side)
            );
            let ended = stage.complete(tag(RECEIVE), Ok(0), None);
            let Completion::Happened(KEY, event) = ended else {
                panic!("a receive is about a session")
            };
            assert_eq!(event.side(), side);
            assert!(matches!(event, Event::Received { what: Received::End, more: true, .. }));
            let own = stage.complete(tag(OWN), Ok(0), None);
            assert!(matches!(own, Completion::Own(done) if done.tag == tag(OWN)));
        }
        let refused = Streams::<FAMILY>::tag(CONNECT, (KEY, Side::Backend));
        let refused = stage.complete(refused, Err(Errno::ECONNREFUSED), None);
        assert!(matches!(refused, Completion::Connected(KEY, Err(Errno::ECONNREFUSED))));
    }

    #[test]
    fn why_a_receive_ended_is_told_apart() {
        let mut stage = Stage::new(None);
        let mut ended = |errno| {
            let tag = Streams::<FAMILY>::tag(RECEIVE, (KEY, Side::Client));
            match stage.complete(tag, Err(errno), None) {
                Completion::Happened(_, Event::Received { what, .. }) => what,
                _ => panic!("a receive is about a session"),
            }
        };
        assert!(matches!(ended(Errno::ENOBUFS), Received::NoBuffers));
        for errno in [Errno::ECANCELED, Errno::EINTR, Errno::EAGAIN] {
            assert!(matches!(ended(errno), Received::Stopped), "{errno}");
        }
        assert!(matches!(ended(Errno::ECONNRESET), Received::Failed(Errno::ECONNRESET)));
    }

    #[test]
    fn who_is_shed_hears_why_until_a_closed_socket_gives_a_descriptor_back() {
        let mut stage = Stage::new(Some(b"no room"));
        let pair = || UnixStream::pair().unwrap();
        assert!(matches!(stage.accept(Err(Errno::EMFILE), None), Completion::Nothing));
        let refused = |stage: &Stage| stage.counted(|it| it.counters.users_refused_exhausted.get());
        let (mut user, ours) = pair();
        assert!(matches!(stage.accept(Ok(0), Some(ours.into())), Completion::Nothing));
        let mut said = String::new();
        user.read_to_string(&mut said).unwrap();
        assert_eq!((said.as_str(), refused(&stage)), ("no room", 1));
        assert_eq!(stage.counted(|it| it.counters.accept_failed.get()), 1);

        assert!(matches!(stage.accept(Err(Errno::EMFILE), None), Completion::Nothing));
        stage.streams.keep((KEY, Side::Backend), File::open("/dev/null").unwrap().into());
        stage.streams.close((KEY, Side::Backend), false, &mut stage.ring);
        assert!(stage.streams.socket((KEY, Side::Backend)).is_none());
        // Nobody is shed any more: this one is a user, though without an address.
        let (mut user, ours) = pair();
        assert!(matches!(stage.accept(Ok(0), Some(ours.into())), Completion::Nothing));
        assert_eq!((user.read_to_string(&mut said).unwrap(), refused(&stage)), (0, 1));
    }

    #[test]
    fn held_back_flows_are_counted_until_they_are_answered() {
        let mut stage = Stage::new(None);
        let (ours, _peer) = UnixStream::pair().unwrap();
        stage.streams.keep((KEY, Side::Client), ours.into());
        let Stage { streams, ring, joined } = &mut stage;
        let books = &mut joined.books;
        let what = proxy::StreamCmd::AwaitRoom { side: Side::Client, first: false };
        streams.operate(KEY, what, &mut Turn { now: Now::default(), ring, books });
        assert_eq!(stage.counted(|it| it.counters.flows_held_back.get()), 1);
        let room = Streams::<FAMILY>::tag(ROOM, (KEY, Side::Client));
        let room = stage.complete(room, Ok(0), None);
        assert!(matches!(room, Completion::Happened(KEY, Event::Room { side: Side::Client })));
        assert_eq!(stage.counted(|it| it.counters.flows_held_back.get()), 0);
    }

    #[test]
    fn what_a_peer_has_not_taken_is_seen() {
        let mut stage = Stage::new(None);
        let door = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = std::net::TcpStream::connect(door.local_addr().unwrap()).unwrap();
        let (_peer, _) = door.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        while ours.write(&[0; 65_536]).is_ok() {}
        let end = (KEY, Side::Client);
        assert_eq!(stage.streams.look(end), Outlook::default(), "there is no socket yet");
        stage.streams.keep(end, ours.into());
        assert!(stage.streams.look(end).queued > 0);
    }
}
