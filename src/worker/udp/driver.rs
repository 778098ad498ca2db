//! Moves datagrams between the ring and `sessions`: asks about each one received, and does what the
//! verdict says. Owns this worker's sockets at the UDP doors and the sockets towards backends.
//! Decides nothing about sessions and copies no payload.
//!
//! Datagrams with the same four-tuple that arrive in one turn leave together at its end (see
//! `batching`).

mod burst;
mod door;
mod estate;
mod retry;
mod seam;
mod still;
mod upstream;

use door::UdpDoor;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use burst::Burst;
use upstream::{UpstreamSocket, place_of, slot_of};

use super::batching::{Batches, FourTuple};
use super::handoff::{Handoff, HandoffQueues};
use super::local_addresses::LocalAddresses;
use super::sessions::{DoorRef, Down, DropReason, Origin, Segments, Sessions, Up};
use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::cluster::seats::Seats;
use crate::ring::datagram::{PktInfo, RecvMeta, Transmit};
use crate::ring::pool::{Buf, Class};
use crate::ring::{Done, Tag, sys};
use crate::worker::books::Books;
use crate::worker::driver::Turn;
use crate::worker::family;
use crate::worker::link::Order;

const RECEIVE_AT_DOOR: u8 = family::UDP | 1;
const RECEIVE_UPSTREAM: u8 = family::UDP | 2;
const SEND: u8 = family::UDP | 3;
const REPLY: u8 = family::UDP | 4;
const RECEIVE_PENDING_AT_DOOR: u8 = family::UDP | 5;
const RECEIVE_PENDING_UPSTREAM: u8 = family::UDP | 6;

/// How long to wait before receiving again on a socket where that failed for an unknown reason.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// ICMP errors read from a socket in a row; one with more is read again later.
const ICMP_ERRORS_MAX: usize = 64;
/// Sockets closed in one turn, at most, so that a turn stays short.
const CLOSES_MAX: usize = 64;

/// A receive that has ended and must be posted again at `at`.
struct Rearm {
    tag: Tag,
    at: Now,
}

pub struct UdpDriver {
    sessions: Sessions,
    /// By the number of their ids, the same at every worker.
    doors: Vec<Option<UdpDoor>>,
    /// By `Family` and place.
    upstream: [Vec<Option<UpstreamSocket>>; 2],
    /// How many of those are open.
    open: usize,
    generation: u32,
    /// Closed as soon as their receive has ended.
    closing: Vec<(Tag, OwnedFd)>,
    /// The last turn closed [`CLOSES_MAX`] sockets, so there may be more to close.
    more_to_close: bool,
    rearms: Vec<Rearm>,
    batches: Batches,
    config: SocketConfig,
    handoff: HandoffLink,
    /// Everything has been described while the worker stands still.
    described: bool,
}

/// How the sockets towards backends are opened and used.
#[derive(Clone)]
pub struct SocketConfig {
    /// Whether the kernel coalesces and segments datagrams (GRO and GSO).
    pub offload: bool,
    /// The limit on sockets, shared by all workers.
    pub seats: Arc<Seats>,
    /// The addresses they send from.
    pub local_addresses: Arc<LocalAddresses>,
}

/// A worker's access to the queues between workers.
#[derive(Clone)]
pub struct HandoffLink {
    pub queues: Arc<HandoffQueues>,
    /// This worker's number.
    pub worker: u8,
}

impl UdpDriver {
    pub fn new(sessions: Sessions, config: SocketConfig, handoff: HandoffLink) -> UdpDriver {
        UdpDriver {
            sessions,
            doors: Vec::new(),
            upstream: Default::default(),
            open: 0,
            generation: 0,
            closing: Vec::new(),
            more_to_close: false,
            rearms: Vec::new(),
            batches: Batches::new(config.offload),
            config,
            handoff,
            described: false,
        }
    }

    /// How many sessions are running.
    pub fn live(&self) -> usize {
        self.sessions.live()
    }

    pub fn next_deadline(&self) -> Option<Now> {
        let handed_off = self.handoff.queues.pending(self.handoff.worker) > 0;
        if handed_off || self.more_to_close {
            return Some(Now::default());
        }
        let rearm = self.rearms.iter().map(|rearm| rearm.at).min();
        [self.sessions.next_deadline(), rearm].into_iter().flatten().min()
    }

    /// Takes a new snapshot of the registered backends into use.
    pub fn adopt(&mut self, snapshot: &Snapshot) {
        self.sessions.adopt(snapshot);
        self.follow_quarantine(snapshot);
    }

    pub fn order(&mut self, order: Order, turn: &mut Turn<'_>) {
        self.sessions.order(turn.now, order, turn.books);
    }

    pub fn complete(&mut self, done: Done, turn: &mut Turn<'_>) {
        let Done { tag, result, buf, more, .. } = done;
        if let Some(mut buf) = buf {
            match (turn.ring.take_recv_meta(&mut buf), tag.kind) {
                (Some(meta), RECEIVE_AT_DOOR | RECEIVE_PENDING_AT_DOOR) => {
                    self.received_from_user(tag, meta, buf, turn);
                }
                (Some(meta), _) => self.received_from_backend(tag, meta, buf, turn),
                (None, _) => turn.ring.pool_mut().give_back(buf),
            }
        }
        if !more {
            self.receive_ended(tag, result.err(), turn);
        }
    }

    /// The work at the end of each turn, whatever completed: sends what the turn has gathered, then
    /// looks after sessions and sockets.
    pub fn housekeep(&mut self, turn: &mut Turn<'_>) {
        self.take_handoffs(turn);
        self.send_gathered(turn);
        self.batches.forget_refusals(turn.now);
        self.sessions.expire(turn.now, turn.books);
        let mut closed = 0;
        while closed < CLOSES_MAX
            && let Some(socket) = self.sessions.next_surplus()
        {
            self.close(socket, turn.ring);
            closed += 1;
        }
        self.more_to_close = closed == CLOSES_MAX;
        turn.books.metrics().counters.udp_sockets.set(self.open as u64);
        self.rearm_receives(turn);
    }

    fn send_gathered(&mut self, turn: &mut Turn<'_>) {
        while let Some(transmit) = self.batches.pop() {
            self.send(transmit, turn);
        }
        self.retry_returned(turn);
    }

    /// Relays a datagram that a user has sent.
    fn received_from_user(&mut self, tag: Tag, meta: RecvMeta, buf: Buf, turn: &mut Turn<'_>) {
        let Some(door) = self.door_at(tag) else {
            return turn.ring.pool_mut().give_back(buf);
        };
        let segments = segments_of(&meta, &buf);
        if !meta.whole {
            return self.drop_datagrams(DropReason::Truncated, segments, buf, turn);
        }
        let (client, local) = (meta.from, door.local_of(&meta));
        let door = DoorRef { place: tag.slot as u16, service: door.service };
        let origin = Origin { client, local, door };
        let handoff = Handoff { origin, segment_size: segments.segment_size };
        self.forward_to_backend(handoff, buf, Sessions::up, turn);
    }

    /// Asks the sessions about a user's datagram, by `ask`, and does what they say.
    fn forward_to_backend(
        &mut self,
        handoff: Handoff,
        buf: Buf,
        ask: impl Fn(&mut Sessions, Now, Origin, Segments, &mut Books) -> Up,
        turn: &mut Turn<'_>,
    ) {
        let segments = Segments { bytes: buf.len(), segment_size: handoff.segment_size };
        // Bounded: a socket that opens gives the session its pair, and one that does not stops the
        // sessions from asking for another of its family.
        loop {
            match ask(&mut self.sessions, turn.now, handoff.origin, segments, turn.books) {
                Up::Send { from: socket, to } => {
                    let (place, from) = self.config.local_addresses.split(socket);
                    let slot = slot_of(socket.family, place);
                    let tag = Tag { kind: SEND, generation: 0, slot };
                    let from = from.map(PktInfo::from);
                    return self.write(FourTuple { tag, to, from }, segments, buf, turn);
                }
                Up::Open(socket) => {
                    let opened = self.open_upstream(socket, turn.ring);
                    self.sessions.opened(turn.now, socket, opened);
                }
                Up::HandOff(worker) => return self.hand_off(worker, handoff, buf, turn),
                Up::Drop(_) => return turn.ring.pool_mut().give_back(buf),
            }
        }
    }

    /// Hands a datagram off to the worker that runs its session.
    fn hand_off(&self, worker: u8, handoff: Handoff, buf: Buf, turn: &mut Turn<'_>) {
        let segments = Segments { bytes: buf.len(), segment_size: handoff.segment_size };
        if !self.handoff.queues.push(worker, handoff, turn.ring.pool().bytes(&buf)) {
            return self.drop_datagrams(DropReason::QueueFull, segments, buf, turn);
        }
        turn.books.metrics().counters.udp_datagrams_passed.add(segments.datagrams());
        turn.ring.pool_mut().give_back(buf);
    }

    /// Relays what other workers have handed off to this one. Takes only what is pending now, so
    /// that a turn stays short.
    fn take_handoffs(&mut self, turn: &mut Turn<'_>) {
        for _ in 0..self.handoff.queues.pending(self.handoff.worker) {
            // Without a free block, the rest stays queued until sends in flight have freed some.
            let Some(mut buf) = turn.ring.pool_mut().take(Class::Datagram) else { return };
            let HandoffLink { queues, worker } = &self.handoff;
            match queues.pop(*worker, &mut buf, turn.ring.pool_mut()) {
                Some(handoff) => self.forward_to_backend(handoff, buf, Sessions::handed_off, turn),
                None => return turn.ring.pool_mut().give_back(buf),
            }
        }
    }

    /// Relays a datagram that has arrived on an upstream socket.
    fn received_from_backend(&mut self, tag: Tag, meta: RecvMeta, buf: Buf, turn: &mut Turn<'_>) {
        let segments = segments_of(&meta, &buf);
        let (family, place) = place_of(tag.slot);
        let socket = self.config.local_addresses.join(family, place, meta.to.map(|to| to.ip));
        let (Some(_), Some(socket)) = (self.at(tag), socket) else {
            // The socket is being closed, so all its pairs are free and nobody expects a reply; or
            // the datagram was sent to an address from which we send nothing.
            return self.drop_datagrams(DropReason::UnknownReply, segments, buf, turn);
        };
        if !meta.whole {
            return self.drop_datagrams(DropReason::Truncated, segments, buf, turn);
        }
        let down = self.sessions.down(turn.now, socket, meta.from, segments, turn.books);
        match down {
            Down::Send { door: place, from, to } => {
                let Some(Some(door)) = self.doors.get(usize::from(place)) else {
                    return self.drop_datagrams(DropReason::UnknownReply, segments, buf, turn);
                };
                let (from, to) = (door.reply_source(from), door.in_family(to));
                let tag = Tag { kind: REPLY, generation: 0, slot: u32::from(place) };
                self.write(FourTuple { tag, to, from }, segments, buf, turn);
            }
            Down::Drop(_) => turn.ring.pool_mut().give_back(buf),
        }
    }

    /// Drops what was received and counts it.
    fn drop_datagrams(&self, why: DropReason, segments: Segments, buf: Buf, turn: &mut Turn<'_>) {
        self.sessions.dropped(why, segments, turn.books);
        turn.ring.pool_mut().give_back(buf);
    }

    /// Adds datagrams to the batch of their four-tuple; sends the batch first if they do not fit
    /// into it.
    fn write(&mut self, tuple: FourTuple, segments: Segments, buf: Buf, turn: &mut Turn<'_>) {
        if let Some(full) = self.batches.push(tuple, segments, buf, turn.ring.pool_mut()) {
            self.send(full, turn);
        }
    }

    /// Sends a transmit, after retrying those that have failed, so that the order is kept.
    fn send(&mut self, (tag, transmit): (Tag, Transmit), turn: &mut Turn<'_>) {
        self.retry_returned(turn);
        let Some(socket) = self.sender(tag) else {
            return turn.ring.pool_mut().give_back_chain(transmit.payload);
        };
        let (tuple, segment_size) =
            (FourTuple::of(tag, &transmit), transmit.segment_size.unwrap_or(0));
        if !self.batches.may_be_refused(tuple, &transmit) {
            return turn.ring.send_datagrams(tag, socket, transmit);
        }
        if self.batches.is_refused(tuple, &transmit) {
            turn.ring.flush();
            return self.send_singly(tag, transmit, Errno::EINTR, turn);
        }
        match turn.ring.send_datagrams_at_once(tag, socket, transmit) {
            None => self.batches.note_accepted(tuple, segment_size),
            Some(returned) => self.retry(returned, turn),
        }
    }

    fn retry_returned(&mut self, turn: &mut Turn<'_>) {
        while let Some(returned) = turn.ring.next_returned() {
            self.retry(returned, turn);
        }
    }

    /// A receive of pending datagrams has ended.
    fn pending_received(&mut self, tag: Tag, errno: Option<Errno>, turn: &mut Turn<'_>) {
        match errno {
            // An empty datagram ended it, so more may be queued.
            None => return,
            Some(Errno::EAGAIN) => {}
            Some(_) if tag.kind == RECEIVE_PENDING_UPSTREAM => {
                self.read_icmp_errors(tag.slot, turn.now, turn.books);
            }
            Some(_) => {}
        }
        if let Some(burst) = self.burst(tag) {
            burst.reset();
        }
    }

    fn burst(&mut self, tag: Tag) -> Option<&mut Burst> {
        if let RECEIVE_AT_DOOR | RECEIVE_PENDING_AT_DOOR = tag.kind {
            let door = self.doors.get_mut(tag.slot as usize)?.as_mut();
            let door = door.filter(|door| door.tag.generation == tag.generation);
            return door.map(|door| &mut door.burst);
        }
        let (family, place) = place_of(tag.slot);
        let upstream = self.upstream[family as usize].get_mut(usize::from(place))?.as_mut();
        upstream.filter(|at| at.generation == tag.generation).map(|at| &mut at.burst)
    }

    /// A receive has ended.
    fn receive_ended(&mut self, tag: Tag, errno: Option<Errno>, turn: &mut Turn<'_>) {
        if let RECEIVE_PENDING_AT_DOOR | RECEIVE_PENDING_UPSTREAM = tag.kind {
            return self.pending_received(tag, errno, turn);
        }
        if let Some(place) = self.closing.iter().position(|(closing, _)| *closing == tag) {
            drop(self.closing.swap_remove(place));
            return;
        }
        if errno.is_none()
            && let Some(burst) = self.burst(tag)
        {
            burst.grow();
        }
        let at = match errno {
            // An empty datagram ended it, or blocks ran out, which are posted before the next turn.
            None | Some(Errno::ENOBUFS | Errno::EINTR | Errno::EAGAIN) => turn.now,
            Some(_)
                if tag.kind == RECEIVE_UPSTREAM
                    && self.read_icmp_errors(tag.slot, turn.now, turn.books) =>
            {
                turn.now
            }
            Some(_) => turn.now.plus(RETRY_PAUSE),
        };
        self.rearms.push(Rearm { tag, at });
    }

    /// Posts again the receives that are due.
    fn rearm_receives(&mut self, turn: &mut Turn<'_>) {
        let mut next = 0;
        while let Some(rearm) = self.rearms.get(next) {
            if rearm.at > turn.now {
                next += 1;
                continue;
            }
            let tag = self.rearms.swap_remove(next).tag;
            let pending = match tag.kind {
                RECEIVE_AT_DOOR => self
                    .door_at(tag)
                    .map(|door| (&door.socket, door.burst, RECEIVE_PENDING_AT_DOOR)),
                _ => self.at(tag).map(|at| (&at.socket, at.burst, RECEIVE_PENDING_UPSTREAM)),
            };
            let Some((socket, burst, kind)) = pending else { continue };
            for _ in 0..burst.extra() {
                turn.ring.receive_pending_datagrams(Tag { kind, ..tag }, socket.as_fd());
            }
            turn.ring.receive_datagrams(tag, socket.as_fd());
        }
    }

    /// Passes the ICMP errors queued at a socket on to the sessions. False if there were none.
    fn read_icmp_errors(&mut self, slot: u32, now: Now, books: &mut Books) -> bool {
        let mut any = false;
        for _ in 0..ICMP_ERRORS_MAX {
            let upstream = self.upstream(slot);
            let error =
                upstream.and_then(|upstream| sys::next_unreachable(upstream.socket.as_fd()));
            let Some(error) = error else { break };
            any = true;
            if matches!(error.errno, Errno::ECONNREFUSED | Errno::EHOSTUNREACH) {
                let (family, place) = place_of(slot);
                let sockets = self.config.local_addresses.numbers_on(family, place);
                self.sessions.unreachable(now, sockets, error.to, error.errno, books);
            }
        }
        any
    }
}

fn segments_of(meta: &RecvMeta, buf: &Buf) -> Segments {
    Segments { bytes: buf.len(), segment_size: meta.segment_size.unwrap_or(buf.len()) }
}
