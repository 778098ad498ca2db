//! UDP users between the ring and the core: datagrams become questions, answers become transmits. Owns
//! this worker's socket at the UDP door and the sockets towards backends; decides nothing about
//! sessions (that is `sessions`'s) and copies no payload.
//!
//! Datagrams that go the same way in one turn leave as one transmit (see `outbox`), at the end of the turn.

mod haste;
mod returned;

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use haste::Haste;

use super::origins::Origins;
use super::outbox::{Outbox, Way};
use super::passage::{Label, Passages};
use super::sessions::{Down, Load, Sessions, Up, Why};
use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::proxy::udp::{Family, Socket};
use crate::ring::datagram::{PktInfo, RecvMeta, Transmit};
use crate::ring::pool::{Buf, Class};
use crate::ring::{Done, Ring, Tag, sys};
use crate::session::seats::Seats;
use crate::worker::books::{Books, SharedBooks};
use crate::worker::family;
use crate::worker::link::Order;

const RECEIVE_AT_DOOR: u8 = family::UDP | 1;
const RECEIVE_UPSTREAM: u8 = family::UDP | 2;
const SEND: u8 = family::UDP | 3;
const REPLY: u8 = family::UDP | 4;
const TAKE_AT_DOOR: u8 = family::UDP | 5;
const TAKE_UPSTREAM: u8 = family::UDP | 6;

const DOOR: Tag = Tag { kind: RECEIVE_AT_DOOR, generation: 0, slot: 0 };
/// How long not to receive at a socket where receiving failed for no known reason.
const PAUSE: Duration = Duration::from_millis(10);
/// Words of ICMP that are read in a row; a socket with more is looked at again.
const WORDS_MAX: usize = 64;
/// Sockets that are closed in one turn at most, so that a turn stays short.
const CLOSED_MAX: usize = 64;

/// This worker's share of the UDP door.
pub struct UdpDoor {
    socket: OwnedFd,
    /// Where it is bound.
    at: SocketAddr,
    /// Replies have to say which address they come from.
    everywhere: bool,
    /// Bound to an IPv6 address, which users of IPv4 reach as well.
    v6: bool,
    haste: Haste,
}

impl UdpDoor {
    /// A door over a socket that is bound.
    pub fn new(socket: OwnedFd) -> std::io::Result<UdpDoor> {
        let at = sys::local(socket.as_fd())?;
        let v6 = sys::is_v6(socket.as_fd())?;
        let everywhere = at.ip().is_unspecified();
        Ok(UdpDoor { socket, at, everywhere, v6, haste: Haste::default() })
    }

    /// Where a datagram came to, which is where its reply is to come from.
    fn spoken_to(&self, meta: &RecvMeta) -> SocketAddr {
        let port = self.at.port();
        match meta.to.unwrap_or(self.at.ip().into()) {
            PktInfo { ip: IpAddr::V6(v6), interface } => {
                SocketAddr::V6(SocketAddrV6::new(v6, port, 0, interface))
            }
            PktInfo { ip, .. } => SocketAddr::new(ip, port),
        }
    }

    /// The same again for a reply, where that has to be said.
    fn source(&self, local: SocketAddr) -> Option<PktInfo> {
        let source = match self.spelled(local) {
            SocketAddr::V6(v6) => PktInfo { ip: IpAddr::V6(*v6.ip()), interface: v6.scope_id() },
            other => other.ip().into(),
        };
        self.everywhere.then_some(source)
    }

    /// An address as this socket takes it.
    fn spelled(&self, address: SocketAddr) -> SocketAddr {
        match address {
            SocketAddr::V4(v4) if self.v6 => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            other => other,
        }
    }
}

/// A socket towards backends.
struct Upstream {
    socket: OwnedFd,
    generation: u32,
    /// The core's numbers that are open on it.
    numbers: u16,
    haste: Haste,
}

/// A receive that has ended and is to begin again.
struct Deaf {
    tag: Tag,
    at: Now,
}

pub struct UdpDriver {
    sessions: Sessions,
    books: SharedBooks,
    door: Option<UdpDoor>,
    /// By [`Family`] and place.
    upstream: [Vec<Option<Upstream>>; 2],
    /// Of these, such as are open.
    open: usize,
    generation: u32,
    /// Not used any more, until their receive has ended.
    closing: Vec<(Tag, OwnedFd)>,
    /// The last turn closed as many as it may, and there may be more.
    more_to_close: bool,
    deaf: Vec<Deaf>,
    outbox: Outbox,
    habits: Habits,
    neighbours: Neighbours,
}

/// How a driver uses sockets.
#[derive(Clone)]
pub struct Habits {
    /// Several datagrams may come and leave as one (GRO and GSO).
    pub together: bool,
    /// For the sockets towards backends, of all workers together.
    pub seats: Arc<Seats>,
    /// Which addresses they send from.
    pub origins: Arc<Origins>,
}

/// How a worker gives datagrams to others and gets them.
#[derive(Clone)]
pub struct Neighbours {
    pub passages: Arc<Passages>,
    /// This worker's own number.
    pub worker: u8,
}

impl UdpDriver {
    /// `door`: this worker's socket at the UDP door, if there is one.
    pub fn new(
        sessions: Sessions,
        books: SharedBooks,
        door: Option<UdpDoor>,
        habits: Habits,
        neighbours: Neighbours,
    ) -> UdpDriver {
        UdpDriver {
            sessions,
            books,
            door,
            upstream: Default::default(),
            open: 0,
            generation: 0,
            closing: Vec::new(),
            more_to_close: false,
            deaf: Vec::new(),
            outbox: Outbox::new(habits.together),
            habits,
            neighbours,
        }
    }

    pub fn start(&mut self, ring: &mut Ring) {
        if let Some(door) = &self.door {
            ring.receive_datagrams(DOOR, door.socket.as_fd());
        }
    }

    /// Running sessions.
    pub fn live(&self) -> usize {
        self.sessions.live()
    }

    pub fn next_deadline(&self) -> Option<Now> {
        let passed = self.neighbours.passages.waiting(self.neighbours.worker) > 0;
        if passed || self.more_to_close {
            return Some(Now::default());
        }
        let deaf = self.deaf.iter().map(|deaf| deaf.at).min();
        [self.sessions.next_deadline(), deaf].into_iter().flatten().min()
    }

    /// Takes note of who is registered now.
    pub fn adopt(&mut self, snapshot: &Snapshot) {
        self.sessions.adopt(snapshot);
    }

    pub fn order(&mut self, now: Now, order: Order) {
        self.sessions.order(now, order, &mut self.books.borrow_mut());
    }

    pub fn complete(&mut self, now: Now, done: Done, ring: &mut Ring) {
        let Done { tag, result, buf, more, .. } = done;
        if let Some(mut buf) = buf {
            match (ring.take_recv_meta(&mut buf), tag.kind) {
                (Some(meta), RECEIVE_AT_DOOR | TAKE_AT_DOOR) => {
                    self.came(now, meta, buf, ring);
                }
                (Some(meta), _) => self.came_back(now, tag, meta, buf, ring),
                (None, _) => ring.pool_mut().give_back(buf),
            }
        }
        if !more {
            self.receive_again(now, tag, result.err());
        }
    }

    /// What is due whatever completed, and before the worker waits.
    pub fn housekeep(&mut self, now: Now, ring: &mut Ring) {
        self.take_passed(now, ring);
        while let Some(transmit) = self.outbox.next() {
            self.send(now, transmit, ring);
        }
        self.send_returned(now, ring);
        self.outbox.forget(now);
        self.sessions.expire(now, &mut self.books.borrow_mut());
        let mut closed = 0;
        while closed < CLOSED_MAX
            && let Some(socket) = self.sessions.next_surplus()
        {
            self.close(socket, ring);
            closed += 1;
        }
        self.more_to_close = closed == CLOSED_MAX;
        self.books.borrow().metrics().counters.udp_sockets.set(self.open as u64);
        self.listen_again(now, ring);
    }

    /// A datagram came from a user.
    fn came(&mut self, now: Now, meta: RecvMeta, buf: Buf, ring: &mut Ring) {
        let Some(door) = &self.door else { return ring.pool_mut().give_back(buf) };
        let load = load_of(&meta, &buf);
        if !meta.whole {
            return self.drop_one(Why::Truncated, load, buf, ring);
        }
        let local = door.spoken_to(&meta);
        let label = Label { client: meta.from, local, segment_size: load.segment_size };
        self.send_up(now, label, buf, Sessions::up, ring);
    }

    /// Does with a user's datagram what the core says; `ask` is how the core is asked.
    fn send_up(
        &mut self,
        now: Now,
        label: Label,
        buf: Buf,
        ask: impl Fn(&mut Sessions, Now, SocketAddr, SocketAddr, Load, &mut Books) -> Up,
        ring: &mut Ring,
    ) {
        let load = Load { bytes: buf.len(), segment_size: label.segment_size };
        // A socket that has to be opened first is asked for at most once for each family and failure.
        loop {
            let Label { client, local, .. } = label;
            let up =
                ask(&mut self.sessions, now, client, local, load, &mut self.books.borrow_mut());
            match up {
                Up::Send { from: socket, to } => {
                    let (place, from) = self.habits.origins.split(socket);
                    let slot = slot_of(socket.family, place);
                    let tag = Tag { kind: SEND, generation: 0, slot };
                    let from = from.map(PktInfo::from);
                    return self.write(now, Way { tag, to, from }, load, buf, ring);
                }
                Up::Open(socket) => {
                    let opened = self.open_upstream(socket, ring);
                    self.sessions.opened(now, socket, opened);
                }
                Up::Pass(worker) => return self.pass(worker, label, buf, ring),
                Up::Drop(_) => return ring.pool_mut().give_back(buf),
            }
        }
    }

    /// Hands a datagram to the worker that runs its session.
    fn pass(&self, worker: u8, label: Label, buf: Buf, ring: &mut Ring) {
        let load = Load { bytes: buf.len(), segment_size: label.segment_size };
        if !self.neighbours.passages.send(worker, label, ring.pool().bytes(&buf)) {
            return self.drop_one(Why::QueueFull, load, buf, ring);
        }
        let books = self.books.borrow();
        books.metrics().counters.udp_datagrams_passed.add(load.datagrams());
        ring.pool_mut().give_back(buf);
    }

    /// Takes what other workers handed to this one: what waits now, so that a turn stays short.
    fn take_passed(&mut self, now: Now, ring: &mut Ring) {
        for _ in 0..self.neighbours.passages.waiting(self.neighbours.worker) {
            // Without a free block they wait; sends that are under way free some.
            let Some(mut buf) = ring.pool_mut().take(Class::Datagram) else { return };
            let Neighbours { passages, worker } = &self.neighbours;
            match passages.take(*worker, &mut buf, ring.pool_mut()) {
                Some(label) => self.send_up(now, label, buf, Sessions::passed, ring),
                None => return ring.pool_mut().give_back(buf),
            }
        }
    }

    /// A datagram came to a socket towards backends.
    fn came_back(&mut self, now: Now, tag: Tag, meta: RecvMeta, buf: Buf, ring: &mut Ring) {
        let load = load_of(&meta, &buf);
        let (family, place) = place_of(tag.slot);
        let socket = self.habits.origins.join(family, place, meta.to.map(|to| to.ip));
        let (Some(door), Some(_), Some(socket)) = (&self.door, self.at(tag), socket) else {
            // To a socket that is being closed: its pairs have rested, so nobody waits for it. Or to
            // an address that nothing was sent from.
            return self.drop_one(Why::UnknownReply, load, buf, ring);
        };
        if !meta.whole {
            return self.drop_one(Why::Truncated, load, buf, ring);
        }
        let down = self.sessions.down(now, socket, meta.from, load, &mut self.books.borrow_mut());
        match down {
            Down::Send { from, to } => {
                let (from, to) = (door.source(from), door.spelled(to));
                let tag = Tag { kind: REPLY, generation: 0, slot: 0 };
                self.write(now, Way { tag, to, from }, load, buf, ring);
            }
            Down::Drop(_) => ring.pool_mut().give_back(buf),
        }
    }

    fn drop_one(&self, why: Why, load: Load, buf: Buf, ring: &mut Ring) {
        self.sessions.dropped(why, load, &self.books.borrow());
        ring.pool_mut().give_back(buf);
    }

    fn write(&mut self, now: Now, way: Way, load: Load, buf: Buf, ring: &mut Ring) {
        if let Some(full) = self.outbox.add(way, load, buf, ring.pool_mut()) {
            self.send(now, full, ring);
        }
    }

    /// Sends a transmit, after those that have come back.
    fn send(&mut self, now: Now, (tag, transmit): (Tag, Transmit), ring: &mut Ring) {
        self.send_returned(now, ring);
        let Some(socket) = self.sender(tag) else {
            return ring.pool_mut().give_back_chain(transmit.payload);
        };
        let (way, segment_size) = (Way::of(tag, &transmit), transmit.segment_size.unwrap_or(0));
        if !self.outbox.is_doubtful(way, &transmit) {
            return ring.send_datagrams(tag, socket, transmit);
        }
        if self.outbox.is_refused(way, &transmit) {
            ring.flush();
            return self.send_one_by_one(now, tag, transmit, Errno::EINTR, ring);
        }
        match ring.send_datagrams_at_once(tag, socket, transmit) {
            None => self.outbox.was_taken(way, segment_size),
            Some(returned) => self.send_again(now, returned, ring),
        }
    }

    fn send_returned(&mut self, now: Now, ring: &mut Ring) {
        while let Some(returned) = ring.next_returned() {
            self.send_again(now, returned, ring);
        }
    }

    fn sender(&self, tag: Tag) -> Option<BorrowedFd<'_>> {
        if tag.kind == REPLY {
            return self.door.as_ref().map(|door| door.socket.as_fd());
        }
        self.upstream(tag.slot).map(|upstream| upstream.socket.as_fd())
    }

    fn upstream(&self, slot: u32) -> Option<&Upstream> {
        let (family, place) = place_of(slot);
        self.upstream[family as usize].get(usize::from(place))?.as_ref()
    }

    /// The socket that a completion belongs to, unless it is being closed.
    fn at(&self, tag: Tag) -> Option<&Upstream> {
        self.upstream(tag.slot).filter(|socket| socket.generation == tag.generation)
    }

    /// Opens what the core wants, on a socket that is open for another number if there is one. False
    /// when there is none to be had.
    fn open_upstream(&mut self, socket: Socket, ring: &mut Ring) -> bool {
        let (place, _) = self.habits.origins.split(socket);
        let there = self.upstream[socket.family as usize].get_mut(usize::from(place));
        if let Some(upstream) = there.and_then(Option::as_mut) {
            upstream.numbers += 1;
            return true;
        }
        if !self.habits.seats.take() {
            return false;
        }
        let tell = self.habits.origins.are_named(socket.family);
        let v4 = socket.family == Family::V4;
        let Ok(descriptor) = sys::datagram_upstream(v4, self.habits.together, tell) else {
            self.habits.seats.give_back();
            return false;
        };
        self.keep(socket.family, place, descriptor, ring);
        true
    }

    /// Receives from now on at a new socket towards backends.
    fn keep(&mut self, family: Family, place: u16, socket: OwnedFd, ring: &mut Ring) {
        self.generation = self.generation.wrapping_add(1) & crate::ring::GENERATION;
        let upstream =
            Upstream { socket, generation: self.generation, numbers: 1, haste: Haste::default() };
        let tag = receive_tag(family, place, &upstream);
        ring.receive_datagrams(tag, upstream.socket.as_fd());
        let (all, place) = (&mut self.upstream[family as usize], usize::from(place));
        if all.len() <= place {
            all.resize_with(place + 1, || None);
        }
        all[place] = Some(upstream);
        self.open += 1;
        // Every receive may end in the same turn: taken here, and not in the middle of relaying.
        let sockets = 1 + self.upstream.iter().map(Vec::len).sum::<usize>();
        self.deaf.reserve(sockets.saturating_sub(self.deaf.len()));
    }

    /// The core needs this number no more; its socket is closed with the last.
    fn close(&mut self, socket: Socket, ring: &mut Ring) {
        let (place, _) = self.habits.origins.split(socket);
        let there = self.upstream[socket.family as usize].get_mut(usize::from(place));
        let Some(there) = there else { return };
        if let Some(upstream) = there.as_mut().filter(|upstream| upstream.numbers > 1) {
            upstream.numbers -= 1;
            return;
        }
        let Some(upstream) = there.take() else { return };
        self.open -= 1;
        self.habits.seats.give_back();
        let tag = receive_tag(socket.family, place, &upstream);
        match self.deaf.iter().position(|deaf| deaf.tag == tag) {
            // Nothing is in flight on it.
            Some(place) => {
                self.deaf.swap_remove(place);
                ring.close(upstream.socket);
            }
            None => {
                ring.cancel(tag);
                self.closing.push((tag, upstream.socket));
            }
        }
    }

    /// A receive has ended that takes only what waits.
    fn took(&mut self, now: Now, tag: Tag, errno: Option<Errno>) {
        match errno {
            // By an empty datagram.
            None => return,
            Some(Errno::EAGAIN) => {}
            Some(_) if tag.kind == TAKE_UPSTREAM => drop(self.read_icmp(now, tag.slot)),
            Some(_) => {}
        }
        if let Some(haste) = self.haste(tag) {
            haste.took_all();
        }
    }

    fn haste(&mut self, tag: Tag) -> Option<&mut Haste> {
        if let RECEIVE_AT_DOOR | TAKE_AT_DOOR = tag.kind {
            return self.door.as_mut().map(|door| &mut door.haste);
        }
        let (family, place) = place_of(tag.slot);
        let upstream = self.upstream[family as usize].get_mut(usize::from(place))?.as_mut();
        upstream.filter(|at| at.generation == tag.generation).map(|at| &mut at.haste)
    }

    /// A receive has ended.
    fn receive_again(&mut self, now: Now, tag: Tag, errno: Option<Errno>) {
        if let TAKE_AT_DOOR | TAKE_UPSTREAM = tag.kind {
            return self.took(now, tag, errno);
        }
        if let Some(place) = self.closing.iter().position(|(closing, _)| *closing == tag) {
            drop(self.closing.swap_remove(place));
            return;
        }
        if errno.is_none()
            && let Some(haste) = self.haste(tag)
        {
            haste.ended_by_an_empty_one();
        }
        let at = match errno {
            // After an empty datagram; when blocks ran out, some are posted before the next turn.
            None | Some(Errno::ENOBUFS | Errno::EINTR | Errno::EAGAIN) => now,
            Some(_) if tag.kind == RECEIVE_UPSTREAM && self.read_icmp(now, tag.slot) => now,
            Some(_) => now.plus(PAUSE),
        };
        self.deaf.push(Deaf { tag, at });
    }

    fn listen_again(&mut self, now: Now, ring: &mut Ring) {
        let mut next = 0;
        while let Some(deaf) = self.deaf.get(next) {
            if deaf.at > now {
                next += 1;
                continue;
            }
            let tag = self.deaf.swap_remove(next).tag;
            let (socket, haste, kind) = match (tag.kind, &self.door, self.at(tag)) {
                (RECEIVE_AT_DOOR, Some(door), _) => (&door.socket, door.haste, TAKE_AT_DOOR),
                (RECEIVE_UPSTREAM, _, Some(at)) => (&at.socket, at.haste, TAKE_UPSTREAM),
                _ => continue,
            };
            for _ in 0..haste.receives() {
                ring.receive_pending_datagrams(Tag { kind, ..tag }, socket.as_fd());
            }
            ring.receive_datagrams(tag, socket.as_fd());
        }
    }

    /// Tells the core what ICMP said about a socket's datagrams. True when it said something.
    fn read_icmp(&mut self, now: Now, slot: u32) -> bool {
        let mut said = false;
        for _ in 0..WORDS_MAX {
            let upstream = self.upstream(slot);
            let word = upstream.and_then(|upstream| sys::next_unreachable(upstream.socket.as_fd()));
            let Some(word) = word else { break };
            said = true;
            if matches!(word.errno, Errno::ECONNREFUSED | Errno::EHOSTUNREACH) {
                let books = &mut self.books.borrow_mut();
                let (family, place) = place_of(slot);
                let sockets = self.habits.origins.on(family, place);
                self.sessions.refused(now, sockets, word.to, word.errno, books);
            }
        }
        said
    }
}

fn load_of(meta: &RecvMeta, buf: &Buf) -> Load {
    Load { bytes: buf.len(), segment_size: meta.segment_size.unwrap_or(buf.len()) }
}

fn receive_tag(family: Family, place: u16, upstream: &Upstream) -> Tag {
    let slot = slot_of(family, place);
    Tag { kind: RECEIVE_UPSTREAM, generation: upstream.generation, slot }
}

fn slot_of(family: Family, place: u16) -> u32 {
    u32::from(place) << 1 | family as u32
}

fn place_of(slot: u32) -> (Family, u16) {
    let family = if slot & 1 == Family::V4 as u32 { Family::V4 } else { Family::V6 };
    (family, (slot >> 1) as u16)
}
