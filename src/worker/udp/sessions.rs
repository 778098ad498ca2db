//! The life of a UDP session: first datagram, pick, forward, reply, move, end. Owns the sessions of one
//! worker and which upstream socket each one uses; decides from addresses and lengths and a time that
//! it is handed, and never sees a payload.
//!
//! ```text
//!   first datagram --limits, pick, pair--> running --idle, answered, ordered, backend lost--> over
//!                                          |     ^
//!                                          +move-+  (its backend has left, or ICMP says so)
//! ```
//!
//! The one thing here that other workers touch is the affinity map, when a session starts, moves and
//! ends. A datagram whose session another worker runs is not ours to send: it goes there.

mod begin;
mod refusal;
mod room;
mod shortage;
mod sweeps;
mod tenants;
mod verdict;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use room::Room;
use shortage::Shortages;
use sweeps::{Sweep, Task};
use tenants::Tenants;
pub use verdict::{Down, Load, Up, Why};

use crate::base::time::Now;
use crate::cluster::{BackendId, Protocol, ServiceId, Snapshot};
use crate::config::{OnUdpLoss, Udp};
use crate::proxy::udp::{Family, Limits, Owner, Past, PeerId, Socket, Upstream};
use crate::session::EndReason;
use crate::session::affinity::Affinity;
use crate::session::flows::{Due, Flow, FlowHasher, FlowKey, Flows, Waits};
use crate::session::sources::{SourceId, SourceLimits, Sources};
use crate::worker::books::{Books, Choice, Entry};
use crate::worker::link::Order;

/// The service of the users who come to the UDP door.
const SERVICE: ServiceId = ServiceId::built_in(Protocol::Udp);
/// Sessions that one turn looks at, for idleness and for orders that concern many.
const LOOKS_MAX: u32 = 512;
/// How long nothing has passed in a session that is over when the balancer drains. Nobody says when a
/// UDP session ends: what still speaks is left alone, and what is silent holds nobody up.
const DRAIN_IDLE: Duration = Duration::from_secs(2);
/// The longest payload that fits behind the headers of IPv4 (65,535 - 20 - 8) and IPv6 (65,535 - 8),
/// without jumbograms.
const fn payload_max(family: Family) -> usize {
    match family {
        Family::V4 => 65_507,
        Family::V6 => 65_527,
    }
}

/// What the core is told once.
#[derive(Clone)]
pub struct Settings {
    pub udp: Udp,
    pub idle: Duration,
    pub waits: Waits,
    /// Sessions of this worker.
    pub sessions: usize,
    pub upstream: Limits,
    /// This worker's even share of the pairs with one backend.
    pub share: usize,
    /// The limits for one source at this worker.
    pub sources: SourceLimits,
    pub hasher: FlowHasher,
    pub seed: u64,
    pub affinity: Option<Holder>,
}

/// This worker's hold on the map that all workers share.
#[derive(Clone)]
pub struct Holder {
    pub map: Arc<Affinity>,
    pub worker: u8,
}

struct Session {
    entry: Entry,
    peer: PeerId,
    socket: Socket,
    source: SourceId,
    /// Replies that are still to come: for each datagram `responses`, or one.
    owed: u32,
    /// What was sent last has no answer, neither by its backend nor by ICMP.
    open: bool,
    /// ICMP says that its backend is not there: it goes on with another if it can.
    refused: bool,
}

/// The UDP sessions of one worker.
pub struct Sessions {
    settings: Settings,
    flows: Flows<Session>,
    sources: Sources,
    upstream: Upstream,
    tenants: Tenants,
    room: Room,
    shortages: Shortages,
    registered: Vec<PeerId>,
    sweeps: VecDeque<Sweep>,
    draining: bool,
}

impl Sessions {
    pub fn new(settings: Settings, now: Now) -> Sessions {
        let Settings { sessions, idle, hasher, seed, upstream, sources, .. } = settings;
        Sessions {
            flows: Flows::new(sessions, idle, hasher, now).waiting(settings.waits),
            sources: Sources::new(sources, 2 * sessions, hasher),
            upstream: Upstream::new(upstream, seed, hasher, now),
            tenants: Tenants::default(),
            room: Room::new(sessions),
            shortages: Shortages::default(),
            registered: Vec::new(),
            sweeps: VecDeque::new(),
            draining: false,
            settings,
        }
    }

    /// Running sessions.
    pub fn live(&self) -> usize {
        self.flows.len()
    }

    /// Upstream sockets that are open.
    pub fn sockets(&self) -> usize {
        self.upstream.open()
    }

    /// Takes note of who is registered now, and on which terms; the books have the same snapshot.
    pub fn adopt(&mut self, snapshot: &Snapshot) {
        self.adopt_terms(snapshot);
        let before = std::mem::take(&mut self.registered);
        self.tenants.renew();
        for backend in snapshot.of(Protocol::Udp) {
            // With too many addresses that have left and still rest, this one waits for the next
            // snapshot.
            let Some(peer) = self.upstream.register(plain(backend.address)) else { continue };
            self.registered.push(peer);
            self.tenants.settle_in(peer, backend, snapshot.version);
        }
        for peer in before {
            let Some(tenant) = self.tenants.leave(peer, snapshot.version) else { continue };
            self.upstream.unregister(peer);
            if self.settings.udp.on_backend_loss == OnUdpLoss::Drop {
                self.sweep(tenant.backend, EndReason::BackendLeft);
            }
        }
    }

    fn adopt_terms(&mut self, snapshot: &Snapshot) {
        let Some(service) = snapshot.service(SERVICE) else { return };
        let idle = service.terms.timeouts.udp_idle;
        if idle != self.settings.idle {
            self.settings.idle = idle;
            self.flows.set_idle(self.idle());
        }
    }

    /// A datagram came from a user to one of our addresses.
    pub fn up(
        &mut self,
        now: Now,
        client: SocketAddr,
        local: SocketAddr,
        load: Load,
        books: &mut Books,
    ) -> Up {
        let key = FlowKey::new(client, local);
        let hash = self.settings.hasher.flow(&key);
        let place = self.flows.find(hash, &key);
        match place.is_none().then(|| self.holder_elsewhere(hash)).flatten() {
            Some(worker) => Up::Pass(worker),
            None => self.carry(now, (hash, key, place), load, books),
        }
    }

    /// The same for a datagram that another worker handed to this one. It goes no further, also if its
    /// session has ended meanwhile: one begins here.
    pub fn passed(
        &mut self,
        now: Now,
        client: SocketAddr,
        local: SocketAddr,
        load: Load,
        books: &mut Books,
    ) -> Up {
        let key = FlowKey::new(client, local);
        let hash = self.settings.hasher.flow(&key);
        let place = self.flows.find(hash, &key);
        self.carry(now, (hash, key, place), load, books)
    }

    /// Sends a datagram on in the session at `place`, or in one that begins with it.
    fn carry(
        &mut self,
        now: Now,
        (hash, key, place): (u64, FlowKey, Option<u32>),
        load: Load,
        books: &mut Books,
    ) -> Up {
        let housed = match place {
            Some(place) => self.house(now, place, hash, load, books),
            None => self.begin(now, hash, key, load, books),
        };
        let up = match housed.and_then(|place| self.forward(now, place, load, books)) {
            Ok(up) | Err(up) => up,
        };
        if let Up::Drop(why) = up {
            self.dropped(why, load, books);
            self.shortages.note(now, why, load.datagrams(), books);
        }
        up
    }

    /// The answer to [`Up::Open`].
    pub fn opened(&mut self, now: Now, socket: Socket, open: bool) {
        if open {
            self.upstream.opened(socket);
        } else {
            self.upstream.failed(socket, now);
        }
    }

    /// A datagram came to an upstream socket.
    pub fn down(
        &mut self,
        now: Now,
        socket: Socket,
        from: SocketAddr,
        load: Load,
        books: &mut Books,
    ) -> Down {
        let place = match self.owner(socket, from) {
            Ok(place) => place,
            Err(why) => {
                self.dropped(why, load, books);
                return Down::Drop(why);
            }
        };
        let flow = self.seen(now, place).expect("a held pair names a running session");
        let down = Down::Send { from: flow.key.local(), to: flow.key.client() };
        let session = &mut flow.state;
        (session.open, session.refused) = (false, false);
        let peer = session.peer;
        books.carried(&mut session.entry, 0, load.bytes as u64, now);
        books.metrics().counters.udp_datagrams_down.add(load.datagrams());
        session.owed = session.owed.saturating_sub(load.datagrams() as u32);
        let is_answered = session.owed == 0;
        self.tenants.heard(peer);
        if is_answered {
            self.flows.answered(place);
        }
        if is_answered && self.settings.udp.responses.is_some() {
            self.end(now, place, EndReason::Finished, books);
        }
        down
    }

    /// Counts a datagram that went no further for a reason that only the caller sees.
    pub fn dropped(&self, why: Why, load: Load, books: &Books) {
        why.counter(&books.metrics().counters).add(load.datagrams());
    }

    /// Carries out an order that concerns sessions.
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
                self.flows.set_idle(self.idle());
                self.sweeps.push_back(Sweep { task: Task::LookAnew, next: 0 });
            }
            Order::Stop => {
                self.draining = true;
                self.sweep(None, EndReason::Stopping);
            }
        }
    }

    /// Ends what has been idle for too long, what was ordered to end, and rests that are over.
    pub fn expire(&mut self, now: Now, books: &mut Books) {
        self.end_idle(now, books);
        self.go_on_sweeping(now, books);
        self.upstream.settle(now);
        self.room.settle(now, &mut self.sources);
        let counters = &books.metrics().counters;
        counters.udp_pairs_resting.set(self.upstream.resting() as u64);
    }

    /// Looks at the sessions in which nothing passed: some are quiet, some over.
    fn end_idle(&mut self, now: Now, books: &mut Books) {
        let mut looks = LOOKS_MAX;
        while let Some((place, due)) = self.flows.next_due(now, &mut looks) {
            match (due, self.flows.get(place)) {
                (Due::Quiet, Some(flow)) => self.room.enter(place, flow),
                _ => self.end(now, place, EndReason::Idle, books),
            }
        }
    }

    /// When [`Sessions::expire`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        if !self.sweeps.is_empty() {
            return Some(Now::default());
        }
        [self.flows.next_deadline(), self.upstream.next_deadline()].into_iter().flatten().min()
    }

    /// A socket to close that nobody uses any more.
    pub fn next_surplus(&mut self) -> Option<Socket> {
        self.upstream.next_surplus()
    }

    fn owner(&mut self, socket: Socket, from: SocketAddr) -> Result<u32, Why> {
        let peer = self.upstream.speaker(socket, plain(from)).ok_or(Why::SpoofedReply)?;
        match self.upstream.owner(peer, socket) {
            Owner::Session(place) => Ok(place),
            Owner::Resting => Err(Why::LateReply),
            Owner::Nobody => Err(Why::UnknownReply),
        }
    }

    /// Sends a session's datagram to its backend.
    fn forward(&mut self, now: Now, place: u32, load: Load, books: &mut Books) -> Result<Up, Up> {
        let flow = self.flows.get(place).expect("the session was found");
        if load.longest() > payload_max(flow.state.socket.family) {
            return Err(Up::Drop(Why::TooBig));
        }
        let more = owed(self.settings.udp.responses, load);
        let flow = self.seen(now, place).expect("the session was found");
        flow.awaiting = true;
        let session = &mut flow.state;
        session.open = true;
        session.owed = session.owed.saturating_add(more);
        books.carried(&mut session.entry, load.bytes as u64, 0, now);
        books.metrics().counters.udp_datagrams_up.add(load.datagrams());
        let (from, peer) = (session.socket, session.peer);
        Ok(Up::Send { from, to: self.upstream.address(peer) })
    }

    /// Sees to it that a running session has a backend that can be sent to.
    fn house(
        &mut self,
        now: Now,
        place: u32,
        hash: u64,
        load: Load,
        books: &mut Books,
    ) -> Result<u32, Up> {
        let flow = self.flows.get_mut(place).expect("the session was found");
        let key = flow.key;
        let entry = &mut flow.state.entry;
        let (tenant, refused) = (self.tenants.at(flow.state.peer), flow.state.refused);
        let on = entry.choice().map(|choice| choice.backend);
        if let Some(backend) = tenant.backend.filter(|backend| on != Some(*backend)) {
            // Registered anew at the same address: the session goes on, under the new name.
            books.relabel(entry, backend);
            self.note(hash, backend);
        }
        if tenant.is_fit(now) && !refused {
            return Ok(place);
        }
        let left = tenant.backend.filter(|_| refused);
        match self.settings.udp.on_backend_loss {
            OnUdpLoss::Keep => Ok(place),
            OnUdpLoss::Move => self.relocate(now, place, hash, load, books),
            OnUdpLoss::Drop if tenant.backend.is_some() && !self.is_any_fit(now, left, books) => {
                Ok(place)
            }
            OnUdpLoss::Drop => {
                self.end(now, place, EndReason::BackendLeft, books);
                self.begin(now, hash, key, load, books)
            }
        }
    }

    /// Moves a session to another backend, if there is one that is fit.
    fn relocate(
        &mut self,
        now: Now,
        place: u32,
        hash: u64,
        load: Load,
        books: &mut Books,
    ) -> Result<u32, Up> {
        if let Some(socket) = self.upstream.wanted(now) {
            return Err(Up::Open(socket));
        }
        let flow = self.flows.get(place).expect("the session was found");
        let session = &flow.state;
        let registered = self.tenants.at(session.peer).backend.is_some();
        // One that is registered and avoided still gets what nobody else can take.
        let stay = |why| if registered { Ok(place) } else { Err(Up::Drop(why)) };
        let user = flow.key.client().ip();
        let left = session.refused.then_some(self.tenants.at(session.peer).backend).flatten();
        let unfit = |id| left == Some(id) || self.tenants.is_unfit(id, now);
        let choice = books.choose(SERVICE, user, &unfit).or_else(|| {
            let anyone = || books.choose(SERVICE, user, &|_| false);
            if registered { None } else { anyone() }
        });
        let Some(choice) = choice else { return stay(Why::NoBackend) };
        let past = Past { last: flow.last_seen, clean: self.flows.in_use_until(flow) };
        let Some((peer, socket)) = self.pair_at(now, place, choice, books) else {
            if !registered {
                self.shortages.at(choice, load.datagrams(), books);
            }
            return stay(Why::UpstreamExhausted);
        };
        let flow = self.flows.get_mut(place).expect("the session was found");
        let session = &mut flow.state;
        self.upstream.give_back(session.peer, session.socket, past, now);
        (session.peer, session.socket, session.owed) = (peer, socket, 0);
        (session.open, session.refused) = (false, false);
        books.moved_to(&mut session.entry, choice);
        self.note(hash, choice.backend);
        Ok(place)
    }

    /// A pair with another backend for a running session, which does not end to make room for itself.
    fn pair_at(
        &mut self,
        now: Now,
        place: u32,
        choice: Choice,
        books: &mut Books,
    ) -> Option<(PeerId, Socket)> {
        let peer = self.upstream.find(plain(choice.address))?;
        let flow = self.flows.get_mut(place)?;
        let (last, user) = (std::mem::replace(&mut flow.last_seen, now), flow.key.client().ip());
        self.room.leave(place);
        let room = self.room_at(now, peer, user, books);
        let socket = room.ok().and_then(|()| self.upstream.take(peer, place));
        let flow = self.flows.get_mut(place)?;
        flow.last_seen = last;
        match socket {
            Some(_) => self.flows.stir(place),
            None if flow.is_quiet() => self.room.enter(place, flow),
            None => self.flows.look_anew(place),
        }
        socket.map(|socket| (peer, socket))
    }

    /// The worker that has this flow, if it is another one.
    fn holder_elsewhere(&self, hash: u64) -> Option<u8> {
        let Holder { map, worker } = self.settings.affinity.as_ref()?;
        map.holder(hash).filter(|holder| holder != worker)
    }

    /// Something passed in the session at `place`.
    fn seen(&mut self, now: Now, place: u32) -> Option<&mut Flow<Session>> {
        let lapsed = self.flows.get(place).is_some_and(|flow| self.flows.in_use_until(flow) <= now);
        let flow = self.flows.get_mut(place)?;
        flow.last_seen = now;
        if lapsed {
            // Nobody waits any more for what was not answered before.
            flow.state.owed = 0;
        }
        if flow.is_quiet() {
            self.room.leave(place);
            self.flows.stir(place);
        }
        self.flows.get_mut(place)
    }

    fn end(&mut self, now: Now, place: u32, reason: EndReason, books: &mut Books) {
        let Some(flow) = self.take_out(place) else { return };
        let last = flow.last_seen;
        let clean = match reason {
            EndReason::Finished => last.plus(self.settings.waits.copies),
            _ => self.flows.in_use_until(&flow),
        };
        let session = flow.state;
        self.upstream.give_back(session.peer, session.socket, Past { last, clean }, now);
        self.sources.ended(session.source);
        self.room.cool(clean, session.source, &mut self.sources);
        books.close(session.entry, reason, now);
    }

    /// Takes a session out of the tables that find it.
    fn take_out(&mut self, place: u32) -> Option<Flow<Session>> {
        let flow = self.flows.close(place)?;
        self.room.leave(place);
        if let Some(holder) = &self.settings.affinity {
            holder.map.forget(self.settings.hasher.flow(&flow.key), holder.worker);
        }
        Some(flow)
    }

    fn note(&self, hash: u64, backend: BackendId) {
        if let Some(holder) = &self.settings.affinity {
            // Without room the session is merely not found by others.
            let _ = holder.map.note(hash, backend, holder.worker);
        }
    }

    /// Whether a backend is in the rotation that sessions need not avoid, besides the one that is left.
    fn is_any_fit(&self, now: Now, left: Option<BackendId>, books: &Books) -> bool {
        let fit = |id| left != Some(id) && !self.tenants.is_unfit(id, now);
        let pool = books.snapshot().pool(SERVICE);
        pool.is_some_and(|pool| pool.in_rotation().any(|backend| fit(backend.id)))
    }

    /// How long nothing passes in a session before it is over.
    fn idle(&self) -> Duration {
        if self.draining { self.settings.idle.min(DRAIN_IDLE) } else { self.settings.idle }
    }
}

/// An address as the table of peers knows it.
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

fn owed(responses: Option<NonZeroU32>, load: Load) -> u32 {
    let each = responses.map_or(1, NonZeroU32::get);
    u32::try_from(u64::from(each) * load.datagrams()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
