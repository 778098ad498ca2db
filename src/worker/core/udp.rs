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

mod refusal;
mod tenants;
mod verdict;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tenants::Tenants;
pub use verdict::{Down, Load, Up, Why};

use crate::base::time::Now;
use crate::cluster::{BackendId, Protocol, Snapshot};
use crate::config::{OnUdpLoss, Udp};
use crate::proxy::udp::{Family, Limits, Owner, PeerId, Socket, Upstream};
use crate::session::EndReason;
use crate::session::affinity::Affinity;
use crate::session::flows::{FlowHasher, FlowKey, Flows};
use crate::session::sources::{Exceeded, SourceId, SourceLimits, Sources};
use crate::worker::books::{Books, Choice, Entry};
use crate::worker::link::Order;

/// Sessions that one turn looks at, for idleness and for orders that concern many.
const LOOKS_MAX: u32 = 512;
/// How long nothing has passed in a session that is over when the balancer drains. Nobody says when a
/// UDP session ends: what still speaks is left alone, and what is silent holds nobody up.
const DRAIN_IDLE: Duration = Duration::from_secs(2);
/// Orders about many sessions that are carried out bit by bit; with more, the first is hurried.
const SWEEPS_MAX: usize = 64;

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
    /// Sessions of this worker.
    pub sessions: usize,
    pub upstream: Limits,
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
    /// Replies that are still to come, if they end the session.
    owed: u32,
    /// What was sent last has no answer, neither by its backend nor by ICMP.
    open: bool,
    /// ICMP says that its backend is not there: it goes on with another if it can.
    refused: bool,
}

/// An order about many sessions, carried out a few places each turn.
struct Sweep {
    task: Task,
    next: u32,
}

/// What is done to each of them.
#[derive(Clone, Copy)]
enum Task {
    /// Ends those on this backend, or all.
    End { backend: Option<BackendId>, reason: EndReason },
    /// Looks at them by an idle time that has become shorter.
    LookAnew,
}

/// The UDP sessions of one worker.
pub struct Core {
    settings: Settings,
    flows: Flows<Session>,
    sources: Sources,
    upstream: Upstream,
    tenants: Tenants,
    registered: Vec<PeerId>,
    sweeps: VecDeque<Sweep>,
    draining: bool,
}

impl Core {
    pub fn new(settings: Settings, now: Now) -> Core {
        let Settings { sessions, idle, hasher, seed, upstream, sources, .. } = settings;
        Core {
            flows: Flows::new(sessions, idle, hasher, now),
            sources: Sources::new(sources, sessions, hasher),
            upstream: Upstream::new(upstream, seed, hasher, now),
            tenants: Tenants::default(),
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

    /// Takes note of who is registered now; the books have the same snapshot.
    pub fn adopt(&mut self, snapshot: &Snapshot) {
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
        let flow = self.flows.get_mut(place).expect("a held pair names a running session");
        flow.last_seen = now;
        let down = Down::Send { from: flow.key.local(), to: flow.key.client() };
        let session = &mut flow.state;
        (session.open, session.refused) = (false, false);
        self.tenants.heard(session.peer);
        books.carried(&mut session.entry, 0, load.bytes as u64, now);
        books.metrics().counters.udp_datagrams_down.add(load.datagrams());
        if self.settings.udp.responses.is_some() {
            session.owed = session.owed.saturating_sub(load.datagrams() as u32);
            if session.owed == 0 {
                self.end(now, place, EndReason::Finished, books);
            }
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
            Order::Adopt(terms) => {
                self.settings.idle = terms.timeouts.udp_idle;
                self.flows.set_idle(self.idle());
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
        let mut looks = LOOKS_MAX;
        while let Some(place) = self.flows.next_idle(now, &mut looks) {
            self.end(now, place, EndReason::Idle, books);
        }
        self.go_on_sweeping(now, books);
        self.upstream.settle(now);
        let counters = &books.metrics().counters;
        counters.udp_pairs_resting.set(self.upstream.resting() as u64);
    }

    /// When [`Core::expire`] has something to do next.
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
        let flow = self.flows.get_mut(place).expect("the session was found");
        let session = &mut flow.state;
        if load.longest() > payload_max(session.socket.family) {
            return Err(Up::Drop(Why::TooBig));
        }
        flow.last_seen = now;
        session.open = true;
        if let Some(responses) = self.settings.udp.responses {
            session.owed = session.owed.saturating_add(owed(responses, load));
        }
        books.carried(&mut session.entry, load.bytes as u64, 0, now);
        books.metrics().counters.udp_datagrams_up.add(load.datagrams());
        Ok(Up::Send { from: session.socket, to: self.upstream.address(session.peer) })
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
            OnUdpLoss::Move => self.relocate(now, place, hash, books),
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
    fn relocate(&mut self, now: Now, place: u32, hash: u64, books: &mut Books) -> Result<u32, Up> {
        if let Some(socket) = self.upstream.wanted(now) {
            return Err(Up::Open(socket));
        }
        let flow = self.flows.get_mut(place).expect("the session was found");
        let session = &mut flow.state;
        let registered = self.tenants.at(session.peer).backend.is_some();
        // One that is registered and avoided still gets what nobody else can take.
        let stay = |why| if registered { Ok(place) } else { Err(Up::Drop(why)) };
        let user = flow.key.client().ip();
        let left = session.refused.then_some(self.tenants.at(session.peer).backend).flatten();
        let unfit = |id| left == Some(id) || self.tenants.is_unfit(id, now);
        let choice = books.choose(Protocol::Udp, user, &unfit).or_else(|| {
            let anyone = || books.choose(Protocol::Udp, user, &|_| false);
            if registered { None } else { anyone() }
        });
        let Some(choice) = choice else { return stay(Why::NoBackend) };
        let peer = self.upstream.find(plain(choice.address));
        let pair = peer.and_then(|peer| Some((peer, self.upstream.take(peer, place)?)));
        let Some((peer, socket)) = pair else { return stay(Why::UpstreamExhausted) };
        self.upstream.give_back(session.peer, session.socket, now);
        (session.peer, session.socket, session.owed) = (peer, socket, 0);
        (session.open, session.refused) = (false, false);
        books.moved_to(&mut session.entry, choice);
        self.note(hash, choice.backend);
        Ok(place)
    }

    /// Begins a session, within the limits.
    fn begin(
        &mut self,
        now: Now,
        hash: u64,
        key: FlowKey,
        load: Load,
        books: &mut Books,
    ) -> Result<u32, Up> {
        let client = key.client();
        let place = self.admissible(now, client, books).map_err(Up::Drop)?;
        if let Some(socket) = self.upstream.wanted(now) {
            return Err(Up::Open(socket));
        }
        let choice = self.choose(now, hash, client, books).ok_or(Up::Drop(Why::NoBackend))?;
        if load.longest() > payload_max(Family::of(plain(choice.address))) {
            return Err(Up::Drop(Why::TooBig));
        }
        let peer = self.upstream.find(plain(choice.address));
        let mut entry =
            books.admit(Protocol::Udp, client, now).map_err(|_| Up::Drop(Why::TableFull))?;
        let pair = peer.and_then(|peer| Some((peer, self.upstream.take(peer, place)?)));
        let Some((peer, socket)) = pair else {
            books.withdraw(entry);
            return Err(Up::Drop(Why::UpstreamExhausted));
        };
        books.book(&mut entry, choice);
        books.started(&entry);
        let source = self.sources.charge(client.ip(), now);
        let source = source.expect("as many sources fit as sessions");
        let session = Session { entry, peer, socket, source, owed: 0, open: false, refused: false };
        let opened = self.flows.open(hash, key, session, now);
        assert!(opened.is_ok_and(|at| at == place), "the place was vacant");
        self.note(hash, choice.backend);
        Ok(place)
    }

    /// The place of a session that `client` may begin now.
    fn admissible(&self, now: Now, client: SocketAddr, books: &Books) -> Result<u32, Why> {
        if self.draining {
            return Err(Why::Draining);
        }
        if books.snapshot().rotations[Protocol::Udp.index()].is_empty() {
            return Err(Why::NoBackend);
        }
        let place = self.flows.vacant().ok_or(Why::TableFull)?;
        match self.sources.check(client.ip(), now) {
            Ok(()) => Ok(place),
            Err(Exceeded::Sessions) => Err(Why::SourceLimit),
            Err(Exceeded::Rate) => Err(Why::SourceRate),
        }
    }

    /// The worker that has this flow, if it is another one.
    fn holder_elsewhere(&self, hash: u64) -> Option<u8> {
        let Holder { map, worker } = self.settings.affinity.as_ref()?;
        map.holder(hash).filter(|holder| holder != worker)
    }

    /// The backend that another worker has for this flow, or else the one whose turn it is.
    fn choose(&self, now: Now, hash: u64, client: SocketAddr, books: &Books) -> Option<Choice> {
        let unfit = |id| self.tenants.is_unfit(id, now);
        let elsewhere = self.settings.affinity.as_ref().and_then(|holder| holder.map.find(hash));
        let found = elsewhere.filter(|id| !unfit(*id)).and_then(|id| books.find(Protocol::Udp, id));
        if found.is_some() {
            books.metrics().counters.udp_sessions_found.one();
            return found;
        }
        books
            .choose(Protocol::Udp, client.ip(), &unfit)
            .or_else(|| books.choose(Protocol::Udp, client.ip(), &|_| false))
    }

    fn end(&mut self, now: Now, place: u32, reason: EndReason, books: &mut Books) {
        let Some(flow) = self.flows.close(place) else { return };
        let session = flow.state;
        self.upstream.give_back(session.peer, session.socket, now);
        self.sources.release(session.source);
        if let Some(holder) = &self.settings.affinity {
            holder.map.forget(self.settings.hasher.flow(&flow.key), holder.worker);
        }
        books.close(session.entry, reason, now);
    }

    fn note(&self, hash: u64, backend: BackendId) {
        if let Some(holder) = &self.settings.affinity {
            // Without room the session is merely not found by others.
            let _ = holder.map.note(hash, backend, holder.worker);
        }
    }

    /// Whether a backend is in the rotation that sessions need not avoid, besides the one that is left.
    fn is_any_fit(&self, now: Now, left: Option<BackendId>, books: &Books) -> bool {
        let snapshot = books.snapshot();
        snapshot.rotations[Protocol::Udp.index()].places().any(|place| {
            let backend = snapshot.backends.get(usize::from(place));
            backend.is_some_and(|backend| {
                left != Some(backend.id) && !self.tenants.is_unfit(backend.id, now)
            })
        })
    }

    /// How long nothing passes in a session before it is over.
    fn idle(&self) -> Duration {
        if self.draining { self.settings.idle.min(DRAIN_IDLE) } else { self.settings.idle }
    }

    fn sweep(&mut self, backend: Option<BackendId>, reason: EndReason) {
        self.sweeps.push_back(Sweep { task: Task::End { backend, reason }, next: 0 });
    }

    /// Carries the orders about many sessions on; the first at once to its end if too many wait.
    fn go_on_sweeping(&mut self, now: Now, books: &mut Books) {
        let mut looks = if self.sweeps.len() > SWEEPS_MAX { u32::MAX } else { LOOKS_MAX };
        while let Some(sweep) = self.sweeps.front_mut() {
            let Sweep { task, next } = *sweep;
            if next >= self.flows.places() {
                self.sweeps.pop_front();
                continue;
            }
            if looks == 0 {
                return;
            }
            looks -= 1;
            sweep.next += 1;
            match task {
                Task::LookAnew => self.flows.look_anew(next),
                Task::End { backend, reason } if self.is_on(next, backend) => {
                    self.end(now, next, reason, books);
                }
                Task::End { .. } => {}
            }
        }
    }

    /// Whether a session runs at `place`, on this backend if one is named.
    fn is_on(&self, place: u32, backend: Option<BackendId>) -> bool {
        self.flows.get(place).is_some_and(|flow| {
            let on = flow.state.entry.choice().map(|choice| choice.backend);
            backend.is_none() || backend == on
        })
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

fn owed(responses: NonZeroU32, load: Load) -> u32 {
    u32::try_from(u64::from(responses.get()) * load.datagrams()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
