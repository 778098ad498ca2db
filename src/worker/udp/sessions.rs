//! The life of a UDP session: first datagram, choice of a backend, relaying, moving, end. Owns the
//! sessions of one worker and which upstream socket each one uses. Decides from addresses, lengths
//! and the time it is given; never sees a payload.
//!
//! ```text
//!   first datagram --limits, choice, pair--> running --idle, answered, ordered, backend lost--> over
//!                                            |     ^
//!                                            +move-+  (its backend has left, or ICMP reports it gone)
//! ```
//!
//! Only the affinity map is shared with other workers; it is written when a session starts, moves
//! and ends. A datagram whose session another worker runs is handed off to that worker.

mod backends;
mod begin;
pub mod estate;
mod eviction;
mod icmp;
mod rolls;
mod shortage;
mod sweeps;
mod verdict;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use backends::Backends;
use eviction::Eviction;
use rolls::Roll;
use shortage::Shortages;
use sweeps::{Sweep, Task};
pub use verdict::{DoorRef, Down, DropReason, Origin, Segments, Up};

use crate::base::time::Now;
use crate::cluster::{BackendId, ServiceId};
use crate::config::{OnUdpLoss, Udp};
use crate::proxy::udp::{Family, LastUse, PairLimits, PairOwner, PairTable, PeerId, SocketId};
use crate::session::EndReason;
use crate::session::affinity::Affinity;
use crate::session::flows::{Before, Due, Flow, FlowHasher, FlowKey, Flows, Waits};
use crate::session::sources::{SourceId, SourceLimits, Sources};
use crate::worker::books::{Books, Choice, Entry};
use crate::worker::link::Order;

/// Sessions that one turn looks at, at most, for idleness and for sweeps.
const LOOKS_MAX: u32 = 512;
/// The idle time while the balancer drains. Nobody says when a UDP session ends, so sessions in
/// which something still passes are left alone, and silent ones do not hold up the drain.
const DRAIN_IDLE: Duration = Duration::from_secs(2);

/// The longest payload after the headers of IPv4 (65,535 - 20 - 8) and IPv6 (65,535 - 8), without
/// jumbograms; in bytes.
const fn payload_max(family: Family) -> usize {
    match family {
        Family::V4 => 65_507,
        Family::V6 => 65_527,
    }
}

/// The settings of one worker's sessions.
#[derive(Clone)]
pub struct UdpSettings {
    pub udp: Udp,
    pub waits: Waits,
    /// Sessions at this worker, at most.
    pub sessions: usize,
    pub pairs: PairLimits,
    /// This worker's even share of the pairs with one backend.
    pub share: usize,
    /// The limits for one source at this worker.
    pub sources: SourceLimits,
    pub hasher: FlowHasher,
    pub seed: u64,
    pub affinity: Option<AffinityHandle>,
}

/// The affinity map, which all workers share, and this worker's number in it.
#[derive(Clone)]
pub struct AffinityHandle {
    pub map: Arc<Affinity>,
    pub worker: u8,
}

struct Session {
    entry: Entry,
    /// The place of the door that its user came by, from which the replies leave.
    door: u16,
    peer: PeerId,
    socket: SocketId,
    source: SourceId,
    /// The session ends once each datagram has been answered this many times.
    responses: Option<NonZeroU32>,
    /// Outstanding replies: `responses` for each datagram, or one.
    owed: u32,
    /// The last datagram sent has no answer yet, neither from the backend nor from ICMP.
    unanswered: bool,
    /// ICMP has reported its backend unreachable: it moves with the next datagram, if it can.
    refused: bool,
}

/// A flow, the door it came by, and the place of its session if there is one.
struct Found {
    key: FlowKey,
    hash: u64,
    door: DoorRef,
    place: Option<u32>,
}

/// The UDP sessions of one worker.
pub struct Sessions {
    settings: UdpSettings,
    flows: Flows<Session>,
    sources: Sources,
    pairs: PairTable,
    backends: Backends,
    eviction: Eviction,
    shortages: Shortages,
    /// The backends of each UDP service.
    rolls: BTreeMap<ServiceId, Roll>,
    sweeps: VecDeque<Sweep>,
    draining: bool,
}

impl Sessions {
    pub fn new(settings: UdpSettings, now: Now) -> Sessions {
        let UdpSettings { sessions, hasher, seed, pairs, sources, .. } = settings;
        Sessions {
            flows: Flows::new(sessions, hasher, now).waiting(settings.waits),
            sources: Sources::new(sources, 2 * sessions, hasher),
            pairs: PairTable::new(pairs, seed, hasher, now),
            backends: Backends::default(),
            eviction: Eviction::new(sessions),
            shortages: Shortages::default(),
            rolls: BTreeMap::new(),
            sweeps: VecDeque::new(),
            draining: false,
            settings,
        }
    }

    /// How many sessions are running.
    pub fn live(&self) -> usize {
        self.flows.len()
    }

    /// How many upstream sockets are open.
    pub fn sockets(&self) -> usize {
        self.pairs.open()
    }

    /// A datagram from a user.
    pub fn up(&mut self, now: Now, origin: Origin, segments: Segments, books: &mut Books) -> Up {
        let found = self.find(origin);
        match found.place.is_none().then(|| self.held_elsewhere(found.hash)).flatten() {
            Some(worker) => Up::HandOff(worker),
            None => self.relay(now, found, segments, books),
        }
    }

    /// A datagram that another worker has handed off to this one. It is never handed off again: if
    /// its session has ended meanwhile, one begins here.
    pub fn handed_off(
        &mut self,
        now: Now,
        origin: Origin,
        segments: Segments,
        books: &mut Books,
    ) -> Up {
        let found = self.find(origin);
        self.relay(now, found, segments, books)
    }

    fn find(&self, Origin { client, local, door }: Origin) -> Found {
        // The kernel gives what is sent to one local address and port to one door only, so the key
        // tells doors apart.
        let key = FlowKey::new(client, local);
        let hash = self.settings.hasher.flow(&key);
        Found { key, hash, door, place: self.flows.find(hash, &key) }
    }

    /// Relays a datagram in the session at `place`, or in one that begins with it.
    fn relay(
        &mut self,
        now: Now,
        Found { key, hash, door, place }: Found,
        segments: Segments,
        books: &mut Books,
    ) -> Up {
        let ensured = match place {
            Some(place) => self.ensure_backend(now, place, hash, segments, books),
            None => self.begin(now, hash, key, door, segments, books),
        };
        let up = match ensured.and_then(|place| self.forward(now, place, segments, books)) {
            Ok(up) | Err(up) => up,
        };
        if let Up::Drop(why) = up {
            if let DropReason::Barred(barrier) = why {
                books.barred(door.service, barrier, segments.datagrams());
            }
            self.dropped(why, segments, books);
            self.shortages.note(now, door.service, why, segments.datagrams(), books);
        }
        up
    }

    /// The outcome of [`Up::Open`].
    pub fn opened(&mut self, now: Now, socket: SocketId, open: bool) {
        if open {
            self.pairs.opened(socket);
        } else {
            self.pairs.failed(socket, now);
        }
    }

    /// A datagram from `from`, received at an upstream socket.
    pub fn down(
        &mut self,
        now: Now,
        socket: SocketId,
        from: SocketAddr,
        segments: Segments,
        books: &mut Books,
    ) -> Down {
        let place = match self.owner(socket, from) {
            Ok(place) => place,
            Err(why) => {
                self.dropped(why, segments, books);
                return Down::Drop(why);
            }
        };
        let flow = self.touch(now, place).expect("a held pair names a running session");
        let (from, to) = (flow.key.local(), flow.key.client());
        let session = &mut flow.state;
        let down = Down::Send { door: session.door, from, to };
        (session.unanswered, session.refused) = (false, false);
        let (peer, service) = (session.peer, session.entry.service);
        let responses = session.responses;
        if session.entry.is_unanswered() {
            books.first_reply(&session.entry, now.since(session.entry.started));
        }
        books.carried(&mut session.entry, 0, segments.bytes as u64, now);
        books.metrics().counters.udp_datagrams_down.add(segments.datagrams());
        session.owed = session.owed.saturating_sub(segments.datagrams() as u32);
        let is_answered = session.owed == 0;
        self.backends.answered(peer, service);
        if is_answered {
            self.flows.answered(place);
        }
        if is_answered && responses.is_some() {
            self.end(now, place, EndReason::Finished, books);
        }
        down
    }

    /// Counts datagrams dropped for a reason that only the caller can see.
    pub fn dropped(&self, why: DropReason, segments: Segments, books: &Books) {
        why.counter(&books.metrics().counters).add(segments.datagrams());
    }

    /// Carries out an order from the control core.
    pub fn order(&mut self, now: Now, order: Order, books: &mut Books) {
        match order {
            Order::EndBackend { backend, reason } => self.sweep(Some(backend), reason),
            Order::EndSession { id, reason } => {
                let is_it = |place: &u32| {
                    self.flows.get(*place).is_some_and(|flow| books.id(&flow.state.entry) == id)
                };
                if let Some(place) = (0..self.flows.places()).find(is_it) {
                    self.end(now, place, reason, books);
                }
            }
            Order::Drain => {
                self.draining = true;
                self.flows.set_idle_max(DRAIN_IDLE);
                self.sweeps.push_back(Sweep { task: Task::LookAnew, next: 0 });
            }
            Order::Stop => {
                self.draining = true;
                self.sweep(None, EndReason::Stopping);
            }
        }
    }

    /// Forgets all sessions, which go on elsewhere.
    pub fn forget_all(&mut self, now: Now, books: &mut Books) {
        for place in 0..self.flows.places() {
            if let Some(flow) = self.take_out(place) {
                books.withdraw(flow.state.entry);
            }
        }
        *self = Sessions::new(self.settings.clone(), now);
    }

    /// Ends sessions that are idle or ordered to end, and quarantines that are over.
    pub fn expire(&mut self, now: Now, books: &mut Books) {
        self.end_idle(now, books);
        self.continue_sweeps(now, books);
        self.pairs.settle(now);
        self.eviction.settle(now, &mut self.sources);
        let counters = &books.metrics().counters;
        counters.udp_pairs_resting.set(self.pairs.quarantined() as u64);
    }

    /// Looks at the sessions whose timers have fired: some have become quiet, some are over.
    fn end_idle(&mut self, now: Now, books: &mut Books) {
        let mut looks = LOOKS_MAX;
        while let Some((place, due)) = self.flows.next_due(now, &mut looks) {
            match (due, self.flows.get(place)) {
                (Due::Quiet, Some(flow)) => self.eviction.add(place, flow),
                _ => self.end(now, place, EndReason::Idle, books),
            }
        }
    }

    /// When [`Sessions::expire`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        if !self.sweeps.is_empty() {
            return Some(Now::default());
        }
        [self.flows.next_deadline(), self.pairs.next_deadline()].into_iter().flatten().min()
    }

    /// A socket to close because no session needs it.
    pub fn next_surplus(&mut self) -> Option<SocketId> {
        self.pairs.next_surplus()
    }

    /// The session that a reply belongs to.
    fn owner(&mut self, socket: SocketId, from: SocketAddr) -> Result<u32, DropReason> {
        let peer = self.pairs.sender(socket, plain(from)).ok_or(DropReason::SpoofedReply)?;
        match self.pairs.owner(peer, socket) {
            PairOwner::Session(place) => Ok(place),
            PairOwner::Quarantined => Err(DropReason::LateReply),
            PairOwner::Nobody => Err(DropReason::UnknownReply),
        }
    }

    /// The verdict that sends a datagram to the backend of its session.
    fn forward(
        &mut self,
        now: Now,
        place: u32,
        segments: Segments,
        books: &mut Books,
    ) -> Result<Up, Up> {
        let flow = self.flows.get(place).expect("the session was found");
        if segments.longest() > payload_max(flow.state.socket.family) {
            return Err(Up::Drop(DropReason::TooBig));
        }
        let flow = self.touch(now, place).expect("the session was found");
        flow.awaiting = true;
        let session = &mut flow.state;
        session.unanswered = true;
        session.owed = session.owed.saturating_add(owed(session.responses, segments));
        books.carried(&mut session.entry, segments.bytes as u64, 0, now);
        books.metrics().counters.udp_datagrams_up.add(segments.datagrams());
        let (from, peer) = (session.socket, session.peer);
        Ok(Up::Send { from, to: self.pairs.address(peer) })
    }

    /// Makes sure that a running session has a usable backend, by moving or replacing it if need
    /// be. Returns the place of the session to use.
    fn ensure_backend(
        &mut self,
        now: Now,
        place: u32,
        hash: u64,
        segments: Segments,
        books: &mut Books,
    ) -> Result<u32, Up> {
        let flow = self.flows.get_mut(place).expect("the session was found");
        let entry = &mut flow.state.entry;
        let service = entry.service;
        let (state, refused) = (self.backends.at(flow.state.peer, service), flow.state.refused);
        let on = entry.choice().map(|choice| choice.backend);
        if let Some(backend) = state.backend.filter(|backend| on != Some(*backend)) {
            // A backend has registered anew at this address: the session goes on under the new
            // identity.
            books.relabel(entry, backend);
            self.note(hash, backend);
        }
        if state.is_usable(now) && !refused {
            return Ok(place);
        }
        let left = state.backend.filter(|_| refused);
        match self.settings.udp.on_backend_loss {
            OnUdpLoss::Keep => Ok(place),
            OnUdpLoss::Move => self.relocate(now, place, hash, segments, books),
            OnUdpLoss::Drop
                if state.backend.is_some() && !self.is_any_usable(now, service, left, books) =>
            {
                Ok(place)
            }
            OnUdpLoss::Drop => {
                let flow = self.flows.get(place).expect("the session was found");
                let (key, door) = (flow.key, DoorRef { place: flow.state.door, service });
                self.end(now, place, EndReason::BackendLeft, books);
                self.begin(now, hash, key, door, segments, books)
            }
        }
    }

    /// Moves a session to another backend, if there is a usable one.
    fn relocate(
        &mut self,
        now: Now,
        place: u32,
        hash: u64,
        segments: Segments,
        books: &mut Books,
    ) -> Result<u32, Up> {
        if let Some(socket) = self.pairs.wanted(now) {
            return Err(Up::Open(socket));
        }
        let flow = self.flows.get(place).expect("the session was found");
        let session = &flow.state;
        let service = session.entry.service;
        let registered = self.backends.at(session.peer, service).backend;
        // A backend that is registered but avoided keeps the session if no other can take it.
        let stay = |why| if registered.is_some() { Ok(place) } else { Err(Up::Drop(why)) };
        let user = flow.key.client();
        let left = registered.filter(|_| session.refused);
        let avoided = |id| left == Some(id) || self.backends.is_avoided(id, now);
        let choice = books.choose(service, user, registered, &avoided).or_else(|| {
            let anyone = || books.choose(service, user, None, &|_| false);
            if registered.is_some() { None } else { anyone() }
        });
        let Some(choice) = choice else { return stay(DropReason::NoBackend) };
        let last_use = LastUse { at: flow.last_seen, clean: self.flows.in_use_until(flow) };
        let Some((peer, socket)) = self.pair_at(now, place, choice, books) else {
            if registered.is_none() {
                self.shortages.at(choice, segments.datagrams(), books);
            }
            return stay(DropReason::UpstreamExhausted);
        };
        let flow = self.flows.get_mut(place).expect("the session was found");
        let session = &mut flow.state;
        self.pairs.give_back(session.peer, session.socket, last_use, now);
        (session.peer, session.socket, session.owed) = (peer, socket, 0);
        (session.unanswered, session.refused) = (false, false);
        books.moved_to(&mut session.entry, choice);
        self.note(hash, choice.backend);
        Ok(place)
    }

    /// A pair with another backend for a running session, which is itself exempt from eviction
    /// meanwhile.
    fn pair_at(
        &mut self,
        now: Now,
        place: u32,
        choice: Choice,
        books: &mut Books,
    ) -> Option<(PeerId, SocketId)> {
        let peer = self.pairs.find(plain(choice.address))?;
        let flow = self.flows.get_mut(place)?;
        let (last, user) = (std::mem::replace(&mut flow.last_seen, now), flow.key.client().ip());
        self.eviction.remove(place);
        let room = self.make_pair_free(now, peer, user, books);
        let socket = room.ok().and_then(|()| self.pairs.take(peer, place));
        let flow = self.flows.get_mut(place)?;
        flow.last_seen = last;
        match socket {
            Some(_) => self.flows.stir(place),
            None if flow.is_quiet() => self.eviction.add(place, flow),
            None => self.flows.look_anew(place),
        }
        socket.map(|socket| (peer, socket))
    }

    /// The worker that runs this flow's session, if it is another.
    fn held_elsewhere(&self, hash: u64) -> Option<u8> {
        let AffinityHandle { map, worker } = self.settings.affinity.as_ref()?;
        map.holder(hash).filter(|holder| holder != worker)
    }

    /// Notes that a datagram passes in the session at `place`.
    #[inline]
    fn touch(&mut self, now: Now, place: u32) -> Option<&mut Flow<Session>> {
        let (flow, before) = self.flows.pass(place, now)?;
        if before != Before::InUse {
            flow.state.owed = 0;
            if before == Before::Quiet {
                self.eviction.remove(place);
            }
        }
        Some(flow)
    }

    fn end(&mut self, now: Now, place: u32, reason: EndReason, books: &mut Books) {
        let Some(flow) = self.take_out(place) else { return };
        let last = flow.last_seen;
        let clean = match reason {
            EndReason::Finished => last.plus(self.settings.waits.copies),
            _ => self.flows.in_use_until(&flow),
        };
        let session = flow.state;
        self.pairs.give_back(session.peer, session.socket, LastUse { at: last, clean }, now);
        self.sources.ended(session.source);
        self.eviction.cool(clean, session.source, &mut self.sources);
        books.close(session.entry, reason, now);
    }

    /// Removes a session from the tables in which it is found.
    fn take_out(&mut self, place: u32) -> Option<Flow<Session>> {
        let flow = self.flows.close(place)?;
        self.eviction.remove(place);
        if let Some(holder) = &self.settings.affinity {
            holder.map.forget(self.settings.hasher.flow(&flow.key), holder.worker);
        }
        Some(flow)
    }

    fn note(&self, hash: u64, backend: BackendId) {
        if let Some(holder) = &self.settings.affinity {
            // Without room in the map, other workers merely do not find the session.
            let _ = holder.map.note(hash, backend, holder.worker);
        }
    }

    /// Whether the rotation of a service has a backend that is not avoided, other than the one being
    /// left.
    fn is_any_usable(
        &self,
        now: Now,
        service: ServiceId,
        left: Option<BackendId>,
        books: &Books,
    ) -> bool {
        let usable = |id| left != Some(id) && !self.backends.is_avoided(id, now);
        let pool = books.snapshot().pool(service);
        pool.is_some_and(|pool| pool.in_rotation().any(|backend| usable(backend.id)))
    }
}

/// An address as the pair table knows it: IPv4 if it is IPv4-mapped, and without flow information.
fn plain(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(_) => address,
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_none() => {
            let mut v6 = v6;
            v6.set_flowinfo(0);
            SocketAddr::V6(v6)
        }
        other => SocketAddr::new(other.ip().to_canonical(), other.port()),
    }
}

/// The replies expected to datagrams that are sent.
fn owed(responses: Option<NonZeroU32>, segments: Segments) -> u32 {
    let each = responses.map_or(1, NonZeroU32::get);
    u32::try_from(u64::from(each) * segments.datagrams()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
