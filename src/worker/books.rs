//! What all protocols of one worker share: the choice of the next backend, and the books about
//! sessions. Owns the worker's view of the services, its shard of the session table, its counters and
//! its reports; holds no socket and no session state.

mod census;
pub mod estate;
mod lent;
mod limits;
mod reached;
mod tls;

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::link::{Ended, Refusal, Report};
use super::opening::Unconnected;
use crate::balance::{self, Contest, Question};
use crate::base::mix::mix;
use crate::base::time::Now;
use crate::cluster::gate::Gate;
use crate::cluster::seats::Seats;
use crate::cluster::{
    Backend, BackendId, Protocol, Proxies, Service, ServiceId, Snapshot, Timeouts,
};
use crate::metrics::WorkerMetrics;
use crate::session::shards::{Place, ShardWriter};
use crate::session::{EndReason, SessionId};
use census::Census;

/// Backends that a worker avoids by itself between two snapshots.
const ASIDE_MAX: usize = 16;

/// A backend that was picked for a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    pub backend: BackendId,
    /// Its row of the counters.
    pub slot: u16,
    pub address: SocketAddr,
    /// Whether a connection to it begins with a PROXY header.
    pub proxy: bool,
    /// Whether it speaks HTTP/2, rather than HTTP/1.1.
    pub http2: bool,
    /// Whether it is reached by TLS.
    pub tls: bool,
}

impl From<&Backend> for Choice {
    fn from(backend: &Backend) -> Choice {
        let Backend { id, slot, address, proxy, http2, ref tls, .. } = *backend;
        Choice { backend: id, slot, address, proxy, http2, tls: tls.is_some() }
    }
}

/// A session in the books: its place in the table and where it is counted.
#[derive(Debug)]
pub struct Entry {
    pub service: ServiceId,
    pub client: SocketAddr,
    pub started: Now,
    is_tls: bool,
    place: Place,
    /// It is one of several requests of a session, which has the place.
    is_lent: bool,
    /// The service that counts it as one of its sessions.
    inside: Option<ServiceId>,
    choice: Option<Choice>,
    /// The backend's row of the counters. It stays until the session has another: what the previous backend
    /// sent may still be on its way to the user.
    row: Option<u16>,
    bytes_up: u64,
    bytes_down: u64,
}

impl Entry {
    /// The backend that the session is on, or is being connected to.
    pub fn choice(&self) -> Option<Choice> {
        self.choice
    }

    /// Whether it is only a part of a session.
    pub fn is_lent(&self) -> bool {
        self.is_lent
    }

    /// Whether its user speaks TLS with us.
    pub fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// Whether nothing has come back yet.
    pub fn is_unanswered(&self) -> bool {
        self.bytes_down == 0
    }

    /// Whether the session is on this backend.
    pub fn is_on(&self, backend: BackendId) -> bool {
        self.choice.is_some_and(|choice| choice.backend == backend)
    }
}

/// The seat of a connection that has yet to say for whom it comes. It keeps its service from being forgotten,
/// and is given back when this is dropped.
#[derive(Debug)]
pub struct Held {
    seats: Arc<Seats>,
    gate: Arc<Gate>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.seats.give_back();
        self.gate.wait_over();
    }
}

/// The parts that [`Books::new`] is made from.
pub struct Parts {
    pub shard: ShardWriter,
    pub metrics: Arc<WorkerMetrics>,
    /// Of every worker, this one included; a backend's load is the sum over them.
    pub all_metrics: Arc<[Arc<WorkerMetrics>]>,
    pub reports: rtrb::Producer<Report>,
    pub urgent: Arc<tokio::sync::Notify>,
}

pub struct Books {
    parts: Parts,
    snapshot: Arc<Snapshot>,
    /// Backends whose data port failed since the snapshot was made.
    aside: Vec<BackendId>,
    /// How many lots have been drawn, from another start at each worker.
    draws: Cell<u64>,
    /// Since a choice first needed it.
    census: RefCell<Option<Census>>,
}

impl Books {
    pub fn new(parts: Parts) -> Books {
        let draws = Cell::new(u64::from(parts.shard.worker()) << 56);
        let aside = Vec::with_capacity(ASIDE_MAX);
        Books { parts, snapshot: Arc::default(), aside, draws, census: RefCell::default() }
    }

    /// A number that looks drawn by chance. It need not be a secret: which two backends are compared says nothing of
    /// which has fewer sessions.
    fn draw(&self) -> u64 {
        self.draws.set(self.draws.get().wrapping_add(1));
        mix(self.draws.get())
    }

    pub fn metrics(&self) -> &WorkerMetrics {
        &self.parts.metrics
    }

    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// How long things may take in a session of this service.
    pub fn timeouts(&self, service: ServiceId) -> &Timeouts {
        // A service stays in the snapshots while it has sessions.
        let found = self.snapshot.service(service);
        debug_assert!(found.is_some(), "service {service:?} has been forgotten too early");
        let found = found.or_else(|| self.snapshot.service(ServiceId::built_in(Protocol::Tcp)));
        &found.expect("the built-in services are in every snapshot").terms.timeouts
    }

    /// Switches to a newer snapshot, which already leaves out backends that failed.
    pub fn adopt(&mut self, snapshot: Arc<Snapshot>) {
        self.snapshot = snapshot;
        self.aside.clear();
        self.census.get_mut().iter_mut().for_each(Census::forget_rotations);
    }

    /// Who must say for whom it connects to this service.
    pub fn proxies(&self, service: ServiceId) -> Option<Arc<Proxies>> {
        self.snapshot.service(service)?.terms.proxies.clone()
    }

    /// Takes a seat for a connection that has yet to say for whom it comes.
    ///
    /// # Errors
    /// That there is none.
    pub fn hold(&mut self, service: ServiceId) -> Result<Held, Refusal> {
        let Service { seats, gate, .. } =
            self.snapshot.service(service).ok_or(Refusal::NoBackend)?;
        if !seats.take() {
            return Err(Refusal::Full);
        }
        gate.wait();
        Ok(Held { seats: Arc::clone(seats), gate: Arc::clone(gate) })
    }

    /// Takes a user into the books, or says why not. The requests of an API user are let in one by one, see
    /// [`Books::let_in`].
    pub fn admit(
        &mut self,
        service: ServiceId,
        client: SocketAddr,
        now: Now,
    ) -> Result<Entry, Refusal> {
        let found = self.snapshot.service(service).ok_or(Refusal::NoBackend)?;
        let inside = (found.kind != Protocol::Api).then_some(service);
        if inside.is_some() {
            found.enter(client.ip()).map_err(Refusal::Barred)?;
        }
        let leave = || inside.is_some().then(|| found.gate.leave());
        if !found.seats.take() {
            leave();
            return Err(Refusal::Full);
        }
        let Some(place) = self.parts.shard.open(service, client, now) else {
            found.seats.give_back();
            leave();
            return Err(Refusal::Full);
        };
        self.parts.metrics.counters.sessions_active.one();
        Ok(Entry {
            service,
            client,
            started: now,
            is_tls: false,
            place,
            is_lent: false,
            inside,
            choice: None,
            row: None,
            bytes_up: 0,
            bytes_down: 0,
        })
    }

    /// The session's user speaks TLS with us.
    pub fn secured(&mut self, entry: &mut Entry) {
        entry.is_tls = true;
        self.parts.shard.set_tls(&entry.place);
    }

    /// Picks a backend for a session and moves the session there in the books. A backend that has just
    /// failed is picked only when there is no other.
    pub fn assign(&mut self, entry: &mut Entry, tried: &[BackendId]) -> Option<Choice> {
        self.assign_from(entry.service, entry, tried)
    }

    /// As [`Books::assign`], from the backends of a service that need not be the session's own: an
    /// API user's requests may be for several.
    pub fn assign_from(
        &mut self,
        service: ServiceId,
        entry: &mut Entry,
        tried: &[BackendId],
    ) -> Option<Choice> {
        self.unassign(entry);
        let found = self.snapshot.service(service)?;
        let is_limited = found.terms.limits.backend_sessions.is_some();
        let (user, after) = (entry.client, tried.first().copied());
        let choice = self.choose_in(found, user, after, &|id| tried.contains(&id))?;
        if is_limited {
            return self.book_where_there_is_room(service, entry, choice, tried);
        }
        self.book(entry, choice);
        Some(choice)
    }

    /// Picks a backend and books nothing. One that has just failed is picked only when there is no
    /// other. `after` is the backend that the user was given before, whose group comes first.
    pub fn choose(
        &self,
        service: ServiceId,
        user: SocketAddr,
        after: Option<BackendId>,
        excluded: &dyn Fn(BackendId) -> bool,
    ) -> Option<Choice> {
        self.choose_in(self.snapshot.service(service)?, user, after, excluded)
    }

    fn choose_in(
        &self,
        service: &Service,
        user: SocketAddr,
        after: Option<BackendId>,
        excluded: &dyn Fn(BackendId) -> bool,
    ) -> Option<Choice> {
        let fresh = self.pick(service, user, after, &|id| excluded(id) || self.aside.contains(&id));
        fresh.or_else(|| self.pick(service, user, after, excluded))
    }

    /// Moves a session to a backend in the books.
    pub fn book(&mut self, entry: &mut Entry, choice: Choice) {
        self.unassign(entry);
        self.parts.shard.set_backend(&entry.place, choice.backend);
        self.parts.metrics.session_begun(choice.slot);
        (entry.choice, entry.row) = (Some(choice), Some(choice.slot));
    }

    /// A backend of a service by its id.
    pub fn find(&self, service: ServiceId, id: BackendId) -> Option<Choice> {
        self.snapshot.get(service, id).map(Choice::from)
    }

    /// The backend of a session has registered anew: books the session under its new id.
    pub fn relabel(&mut self, entry: &mut Entry, id: BackendId) {
        if let Some(choice) = self.find(entry.service, id) {
            self.book(entry, choice);
        }
    }

    /// A running session goes on with another backend.
    pub fn moved_to(&mut self, entry: &mut Entry, choice: Choice) {
        self.book(entry, choice);
        self.parts.metrics.backends[usize::from(choice.slot)].total.one();
        self.parts.metrics.counters.udp_sessions_moved.one();
    }

    fn pick(
        &self,
        service: &Service,
        user: SocketAddr,
        after: Option<BackendId>,
        excluded: &dyn Fn(BackendId) -> bool,
    ) -> Option<Choice> {
        let load = |backend: &Backend| self.load(backend.slot);
        let least = |contest: &Contest<'_>| self.least(contest);
        let random = self.draw();
        let question = Question { user, random, load: &load, least: &least, excluded, after };
        let backend = match service.terms.limits.backend_sessions {
            None => balance::pick(service, &question),
            Some(limit) => self.pick_with_room(service, &question, limit),
        }?;
        Some(Choice::from(backend))
    }

    /// The place of the least busy backend, by the sessions of all workers.
    fn least(&self, contest: &Contest<'_>) -> Option<u16> {
        let all = &self.parts.all_metrics;
        let mut census = self.census.borrow_mut();
        census.get_or_insert_with(|| Census::new(all.len())).least(contest, all)
    }

    /// The session is on no backend until the next [`Books::assign`].
    pub fn unassign(&mut self, entry: &mut Entry) {
        if let Some(before) = entry.choice.take() {
            self.parts.metrics.session_over(before.slot);
        }
    }

    /// The session of an API user is another service's from now on, which must share the first one's seats.
    /// Who counts the request under way does not change.
    pub fn move_home(&mut self, entry: &mut Entry, service: ServiceId) {
        entry.service = service;
        self.parts.shard.set_service(&entry.place, service);
    }

    /// The session's backend answered: the user has been served.
    pub fn started(&mut self, entry: &Entry) {
        let Some(choice) = entry.choice else { return };
        self.parts.metrics.counters.sessions_started.one();
        self.parts.metrics.backends[usize::from(choice.slot)].total.one();
        if self.snapshot.report_sessions {
            self.report(Report::Started {
                id: self.id(entry),
                service: entry.service,
                client: entry.client,
                is_tls: entry.is_tls,
                backend: choice.backend,
            });
        }
    }

    /// The session was given a backend again, for another request.
    pub fn served_again(&mut self, entry: &Entry) {
        if let Some(choice) = entry.choice {
            self.parts.metrics.backends[usize::from(choice.slot)].total.one();
        }
    }

    /// The session's backend refused, or did not answer in time: avoided until the control core knows.
    pub fn backend_failed(&mut self, entry: &Entry, why: impl Into<Unconnected>) {
        let Some(choice) = entry.choice else { return };
        self.parts.metrics.counters.connects_failed.one();
        self.parts.metrics.backends[usize::from(choice.slot)].connect_failed.one();
        if self.aside.len() < ASIDE_MAX && !self.aside.contains(&choice.backend) {
            self.aside.push(choice.backend);
        }
        let backend = choice.backend;
        self.report(match why.into() {
            Unconnected::Errno(errno) => Report::ConnectFailed { backend, errno: errno as i32 },
            Unconnected::Tls(why) => Report::UpstreamTlsFailed { backend, why },
        });
        self.parts.urgent.notify_one();
    }

    /// The session's backend has begun to answer an API request.
    pub fn backend_answered(&self, entry: &Entry, now: Now) {
        if let Some(choice) = entry.choice {
            self.parts.metrics.answered[usize::from(choice.slot)].set(now.nanos());
        }
    }

    /// The session's backend has had a request since then, and let the time for its answer pass.
    pub fn backend_silent(&mut self, entry: &Entry, since: Now, now: Now) {
        let Some(choice) = entry.choice else { return };
        self.parts.metrics.counters.api_unanswered.one();
        self.parts.metrics.backends[usize::from(choice.slot)].unanswered.one();
        self.report(Report::Unanswered { backend: choice.backend, since, now });
        self.parts.urgent.notify_one();
    }

    /// No local port towards the session's backend was free, which says nothing about the backend: it stays
    /// in the rotation, and a port is free again when a connection to it ends.
    pub fn backend_out_of_ports(&self, entry: &Entry) {
        self.parts.metrics.counters.connects_without_port.one();
        if let Some(choice) = entry.choice {
            self.parts.metrics.backends[usize::from(choice.slot)].connect_without_port.one();
        }
    }

    /// Counts datagrams of users who could not be given a socket towards this backend.
    pub fn turned_away(&self, choice: Choice, datagrams: u64) {
        self.parts.metrics.backends[usize::from(choice.slot)].turned_away.add(datagrams);
    }

    /// The first byte of a session's backend has arrived.
    pub fn first_byte(&self, entry: &Entry, now: Now) {
        let waited = now.since(entry.started);
        self.parts.metrics.first_byte_time.record(waited);
        self.first_reply(entry, waited);
    }

    /// The same for a UDP session, which only its service counts: a stream's first byte and a datagram's answer
    /// are no times to be added up.
    pub fn first_reply(&self, entry: &Entry, waited: Duration) {
        if let Some(service) = self.snapshot.service(entry.service) {
            service.gate.answers.first_byte(self.parts.shard.worker(), waited);
        }
    }

    /// Counts users whom something else than a barrier of their service has turned away, or their datagrams.
    pub fn refuse(&self, service: ServiceId, count: u64) {
        if let Some(service) = self.snapshot.service(service) {
            service.gate.answers.refuse(self.parts.shard.worker(), count);
        }
    }

    /// The worker's number.
    pub fn worker(&self) -> u8 {
        self.parts.shard.worker()
    }

    /// The name that a session goes by outside its worker.
    pub fn id(&self, entry: &Entry) -> SessionId {
        self.parts.shard.id(&entry.place)
    }

    /// A name for the log that no session has, for users who are turned away.
    pub fn no_session(&self) -> SessionId {
        self.parts.shard.no_session()
    }

    /// Books bytes that have moved; totals, not differences.
    pub fn moved(&mut self, entry: &mut Entry, bytes_up: u64, bytes_down: u64, now: Now) {
        let (up, down) = (bytes_up - entry.bytes_up, bytes_down - entry.bytes_down);
        self.carried(entry, up, down, now);
    }

    /// Books bytes that have moved since the last time.
    pub fn carried(&mut self, entry: &mut Entry, up: u64, down: u64, now: Now) {
        entry.bytes_up += up;
        entry.bytes_down += down;
        let metrics = &self.parts.metrics;
        let backend = entry.row.map(|row| &metrics.backends[usize::from(row)]);
        if entry.is_lent {
            // What its user has sent and received is the session's.
            return backend.into_iter().for_each(|backend| {
                backend.up.add(up);
                backend.down.add(down);
            });
        }
        self.parts.shard.moved(&entry.place, entry.bytes_up, entry.bytes_down, now);
        // Usually one of the two is zero.
        if up > 0 {
            metrics.counters.bytes_up.add(up);
            backend.inspect(|backend| backend.up.add(up));
        }
        if down > 0 {
            metrics.counters.bytes_down.add(down);
            backend.inspect(|backend| backend.down.add(down));
        }
    }

    /// Takes back bytes booked as moved that stayed in the kernel's send queue and will not arrive.
    pub fn undelivered(&mut self, entry: &mut Entry, up: u64, down: u64) {
        entry.bytes_up = entry.bytes_up.saturating_sub(up);
        entry.bytes_down = entry.bytes_down.saturating_sub(down);
        self.parts.metrics.counters.bytes_undelivered.add(up + down);
    }

    /// Takes a session that never began out of the books, and reports nothing.
    pub fn withdraw(&mut self, mut entry: Entry) {
        self.parts.metrics.counters.sessions_active.less_one();
        self.unassign(&mut entry);
        self.leave(entry);
    }

    /// Takes a session out of the books.
    pub fn close(&mut self, mut entry: Entry, reason: EndReason, now: Now) {
        let counters = &self.parts.metrics.counters;
        counters.sessions_active.less_one();
        counters.sessions_ended.one();
        match reason {
            EndReason::ClientReset | EndReason::BackendReset => counters.resets.one(),
            EndReason::Idle | EndReason::HalfCloseIdle => counters.idle_ended.one(),
            EndReason::Displaced => counters.udp_sessions_displaced.one(),
            _ => {}
        }
        if reason != EndReason::Unreachable {
            self.parts.metrics.session_length.record(now.since(entry.started));
        }
        if self.snapshot.report_sessions {
            self.report(Report::Ended(Ended {
                id: self.id(&entry),
                service: entry.service,
                client: entry.client,
                is_tls: entry.is_tls,
                backend: entry.choice.map(|choice| choice.backend),
                started: entry.started,
                ended: now,
                bytes_up: entry.bytes_up,
                bytes_down: entry.bytes_down,
                reason,
            }));
        }
        self.unassign(&mut entry);
        self.leave(entry);
    }

    /// Gives back a session's place and its seat. The seats are its service's for as long as that is in the
    /// snapshots, and a service without any takes its seats with it.
    fn leave(&mut self, mut entry: Entry) {
        if let Some(service) = self.snapshot.service(entry.service) {
            service.seats.give_back();
            // An API user may be inside another service, which is looked up by itself.
            if entry.inside.take_if(|inside| *inside == entry.service).is_some() {
                service.gate.leave();
            }
        }
        self.let_out(&mut entry);
        self.parts.shard.close(entry.place);
    }

    /// Counts a user who was turned away.
    pub fn refused(&mut self, service: ServiceId, client: SocketAddr, why: Refusal) {
        let counters = &self.parts.metrics.counters;
        match why {
            Refusal::NoBackend => counters.users_refused_no_backend.one(),
            Refusal::Full => counters.users_refused_full.one(),
            Refusal::Barred(barrier) => {
                counters.users_refused_barred.one();
                self.barred(service, barrier, 1);
            }
            Refusal::Unreachable => counters.users_refused_unreachable.one(),
            Refusal::Exhausted => counters.users_refused_exhausted.one(),
            Refusal::NoProxyHeader => counters.users_refused_no_proxy_header.one(),
            Refusal::ProxyHeader => counters.users_refused_proxy_header.one(),
        }
        if !matches!(why, Refusal::Barred(_)) {
            self.refuse(service, 1);
        }
        if self.snapshot.report_sessions {
            self.report(Report::Refused { service, client, why });
        }
    }

    /// Sends a report to the control core, or counts it as dropped when the queue is full.
    pub fn report(&mut self, report: Report) {
        if self.parts.reports.push(report).is_err() {
            self.parts.metrics.counters.reports_dropped.one();
        }
    }
}

#[cfg(test)]
pub(in crate::worker) mod tests;
