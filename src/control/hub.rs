//! The control core's state: connections, registrations, and what the workers have been told. Owns
//! every decision that involves more than one of them; every change to the set of backends goes
//! through [`Hub::apply`]. Lives on one thread, is borrowed only between awaits, and opens no socket:
//! work that has to be awaited is returned to `mod`.

pub mod aside;
mod changes;
pub mod checking;
mod counting;
mod drains;
mod legacy;
mod listed;
mod reloading;
mod sampling;
pub mod shares;
pub mod sharing;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tracing::{error, info};

use super::api::{About, Event, Reply};
use super::console::{self, Console, Lost, Name, Of, named};
use super::doors::UserDoors;
use super::drain::{Stop, StopStep};
use super::history::History;
use super::mailbox::Mailbox;
use super::publication::Publication;
use super::rights::Identity;
use super::status::{HandoverStatus, ReloadStatus};
use super::steadiness::Steadiness;
use super::workers::{Given, Mark, Pulse, Workers};
use crate::base::publish::Publisher;
use crate::base::time::Now;
use crate::cluster::registry::{Change, Registered, Registry};
use crate::cluster::source::Source;
use crate::cluster::{Backend, BackendId, Protocol, Service, ServiceId, Snapshot};
use crate::config::Config;
use crate::logs;
use crate::metrics::{BACKENDS_MAX, ControlCounters};
use crate::session::EndReason;
use crate::tls::backends::reason;
use crate::worker::link::{Order, Report};
use aside::Asides;
use checking::{Checking, is_failing};
use drains::Draining;
use listed::LeftOut;
use reloading::Leaving;

/// How often an order to end a backend's sessions is repeated while any are left.
const REPEAT_EVERY: Duration = Duration::from_secs(1);
/// The most reports, and the most request log lines, handled in one go.
const REPORTS_AT_ONCE: usize = 4096;
const LINES_AT_ONCE: usize = 256;

/// One control connection.
pub struct Member {
    pub peer: SocketAddr,
    /// As proved; `None` without a proof.
    pub identity: Option<Identity>,
    pub mailbox: Rc<Mailbox>,
    /// The last answered hello: when, and how long it took.
    pub answered: Option<(Now, Option<Duration>)>,
    pub misses: u32,
}

/// A backend that has left; some of its sessions may still be running.
pub struct Departed {
    pub backend: Backend,
    pub registered: Now,
    /// When the workers were told; `None` until they have been.
    mark: Option<Mark>,
    /// When to order the end of its sessions (again); `None` if they may go on.
    repeat: Option<Now>,
}

/// What a tick leaves for its caller, which can await.
#[derive(Default)]
pub struct Outcome {
    /// Backends that were set aside and that nobody is trying to reach yet.
    pub revive: Vec<BackendId>,
    /// The workers have said more than could be heard in one go.
    pub more: bool,
    /// The control core may return.
    pub done: bool,
}

/// The control core's state.
pub struct Hub {
    pub config: Arc<Config>,
    pub registry: Registry,
    pub workers: Workers,
    pub counters: ControlCounters,
    pub stop: Stop,
    pub stop_until: Option<Now>,
    pub members: BTreeMap<Source, Member>,
    pub draining: BTreeMap<BackendId, Draining>,
    /// The part in a cluster, if there is one.
    pub sharing: Option<Box<sharing::Sharing>>,
    pub departed: BTreeMap<BackendId, Departed>,
    /// Sessions that operators have ended and the backends have yet to hear of.
    ended_by_operators: BTreeMap<BackendId, u64>,
    /// What backends were given that have gone with the last of their sessions, by service.
    pub given_before: BTreeMap<ServiceId, Given>,
    pub history: History,
    pub steadiness: Steadiness,
    pub started: Now,
    pub snapshot: Arc<Snapshot>,
    /// The users' doors. A hub on its own has none.
    pub doors: UserDoors,
    /// The outcome of the last reload, for the status.
    pub reload: ReloadStatus,
    pub handover: HandoverStatus,
    /// Notified when an operator wants a successor to take over.
    pub upgrade_wanted: Rc<Notify>,
    /// What the settings leave to the host and has been worked out, as `key = value`.
    pub derived: Vec<String>,
    /// Services that are no longer in the settings.
    leaving: BTreeMap<ServiceId, Leaving>,
    publication: Publication,
    /// Who has registered since the last publication; the log has yet to say so.
    unannounced: BTreeSet<BackendId>,
    pub console: Console,
    checking: Checking,
    left_out: LeftOut,
    asides: Asides,
    published: Mark,
    pulse: Pulse,
    next_connection: u64,
    /// Log lines held back and dropped, as last counted.
    lines_lost: (u64, u64),
    /// Everything is another process's by now, which has taken it up.
    is_handed_over: bool,
    /// The same, and it has ended before it served.
    is_orphaned: bool,
    /// It has been asked to stop since it was handed over, and again.
    is_told_to_stop: bool,
    is_hurried: bool,
}

impl Hub {
    /// A control core that starts from the first snapshot, in which nobody is registered yet.
    pub fn new(
        config: Arc<Config>,
        workers: Workers,
        snapshots: Publisher<Snapshot>,
        now: Now,
    ) -> Hub {
        let published = workers.mark();
        let pulse = Pulse::new(&workers, now);
        let snapshot = snapshots.current();
        let mut registry = Registry::new(BACKENDS_MAX, &snapshot.services);
        registry.agree(|service| config.terms_for(service.id));
        registry.let_in(|service| config.users_for(service.id));
        registry.set_doors(Arc::clone(&snapshot.doors));
        registry.set_tls(Arc::clone(&snapshot.tls));
        registry.set_key(snapshot.key);
        let mut hub = Hub {
            config: Arc::clone(&config),
            registry,
            workers,
            counters: ControlCounters::default(),
            stop: Stop::Serving,
            stop_until: None,
            members: BTreeMap::new(),
            draining: BTreeMap::new(),
            sharing: None,
            departed: BTreeMap::new(),
            ended_by_operators: BTreeMap::new(),
            given_before: BTreeMap::new(),
            history: History::new(now),
            steadiness: Steadiness::new(now),
            started: now,
            snapshot,
            reload: ReloadStatus::default(),
            handover: HandoverStatus::default(),
            upgrade_wanted: Rc::default(),
            derived: Vec::new(),
            doors: UserDoors::default(),
            leaving: BTreeMap::new(),
            publication: Publication::new(snapshots),
            unannounced: BTreeSet::new(),
            console: Console::default(),
            checking: Checking::new(now),
            left_out: LeftOut::default(),
            asides: Asides::default(),
            published,
            pulse,
            next_connection: 1,
            lines_lost: (0, 0),
            is_handed_over: false,
            is_orphaned: false,
            is_told_to_stop: false,
            is_hurried: false,
        };
        hub.follow_shares(&config);
        hub
    }

    /// Whether another process has taken everything up.
    pub fn is_handed_over(&self) -> bool {
        self.is_handed_over
    }

    /// Whether that one has ended before it served, so that nobody serves.
    pub fn is_orphaned(&self) -> bool {
        self.is_orphaned
    }

    /// A control connection goes on that another process has accepted.
    pub fn go_on_with(&mut self, source: Source, member: Member) {
        self.members.insert(source, member);
        self.counters.connections_active.set(self.members.len() as u64);
    }

    /// A control connection was accepted.
    pub fn welcome(&mut self, peer: SocketAddr, mailbox: Rc<Mailbox>, now: Now) -> Source {
        let source = Source::Connection(self.next_connection);
        self.next_connection += 1;
        let member = Member { peer, identity: None, mailbox, answered: None, misses: 0 };
        self.go_on_with(source, member);
        self.counters.connections_accepted.one();
        self.console.backend_connected(now, peer, self.members.len());
        source
    }

    /// A control connection has ended; its backends leave at once.
    pub fn farewell(&mut self, source: Source, why: &'static str, now: Now) {
        let Some(member) = self.members.remove(&source) else { return };
        self.counters.connections_active.set(self.members.len() as u64);
        self.make(Change::SourceLost { source, why }, now);
        self.console.backend_disconnected(now, member.peer, why, self.members.len());
    }

    /// A host that may not register has connected.
    pub fn stranger(&mut self, peer: SocketAddr, now: Now) {
        self.counters.connections_refused_stranger.one();
        self.console.stranger(now, peer);
    }

    /// A peer's message was refused; `service` is the name of the one that it was about.
    pub fn refused(
        &mut self,
        peer: SocketAddr,
        cmd: Option<&str>,
        service: Option<&str>,
        why: &str,
    ) {
        self.counters.messages_failed.one();
        let is_named = |name: &&str| Protocol::ALL.iter().all(|protocol| protocol.name() != *name);
        let service = service.filter(is_named);
        self.console.backend_refused(Now::read(), peer, cmd, service, why);
    }

    /// A backend has proved its identity.
    pub fn proved(&mut self, source: Source, identity: Identity) {
        if let Some(member) = self.members.get_mut(&source) {
            self.console.backend_proved(Now::read(), member.peer, &identity.name);
            member.identity = Some(identity);
        }
    }

    pub fn identity(&self, source: Source) -> Option<&Identity> {
        self.members.get(&source)?.identity.as_ref()
    }

    /// A hello was answered.
    pub fn answered(&mut self, source: Source, took: Option<Duration>, now: Now) {
        let backends = self.registry.of_source(source).count();
        let Some(member) = self.members.get_mut(&source) else { return };
        member.answered = Some((now, took));
        member.misses = 0;
        self.console.hello(now, member.peer, (backends, self.registry.len()), took);
    }

    /// A hello went unanswered, the `misses`-th in a row.
    pub fn missed(&mut self, source: Source, misses: u32) {
        self.counters.hellos_missed.one();
        let Some(member) = self.members.get_mut(&source) else { return };
        member.misses = misses;
        let of = self.config.health.misses;
        self.console.hello_missed(Now::read(), member.peer, misses, of);
    }

    /// The backends after `after` that a source may see: only those of its own identity; without a proof,
    /// those of all who have proved nothing.
    pub fn visible(&self, to: Source, after: BackendId) -> impl Iterator<Item = &Registered> {
        let own = self.identity(to);
        self.registry.entries_after(after).filter(move |entry| self.identity(entry.source) == own)
    }

    /// Handles what has fallen due and what the workers have reported. Called on every tick, and at
    /// once when a report is urgent.
    pub fn tick(&mut self, now: Now) -> Outcome {
        self.workers.flush();
        let mut more = self.hear_reports(now) | self.hear_requests();
        if !self.is_handed_over {
            self.look_after(!more, now);
        }
        self.sum_up_lines(now);
        let done = self.advance_stop(now);
        if done {
            // The last sessions may have ended after the reports were read.
            while self.hear_reports(now) | self.hear_requests() {}
            more = false;
        }
        let revive = if self.is_handed_over { Vec::new() } else { self.unattended() };
        Outcome { revive, more, done }
    }

    /// What only the process does that serves. `all_heard`: the workers have no more reports.
    fn look_after(&mut self, all_heard: bool, now: Now) {
        self.sample(now);
        self.tell_of_ended();
        self.advance_drains(now);
        self.release_departed(now);
        self.advance_endings();
        self.advance_leaving(all_heard, now);
        self.retry_left_out(now);
        self.pulse.feel(&self.workers, now);
    }

    /// A request to stop the balancer. A second one means at once.
    pub fn ask_to_stop(&mut self, now: Now) {
        if self.is_handed_over && !std::mem::replace(&mut self.is_told_to_stop, true) {
            // A service manager tells every process of the unit. This one drains already.
            return info!("asked to stop: what could not be handed over still has its time");
        }
        self.is_hurried |= self.is_handed_over;
        let lasts = self.config.balance.drain;
        let step = self.stop.ask(now, lasts);
        if step == StopStep::Drain {
            self.published = self.workers.mark();
            self.stop_until = Some(now.plus(lasts));
        }
        self.do_stop(step);
    }

    /// Sessions of a service, in any phase.
    pub fn sessions_of(&self, service: ServiceId) -> u64 {
        self.snapshot.service(service).map_or(0, |it| it.gate.sessions() as u64)
    }

    /// The protocol of a service.
    pub fn protocol_of(&self, service: ServiceId) -> Protocol {
        self.registry.service(service).kind
    }

    /// The address of a backend, which may have left already, for a session or a log line.
    pub fn address_of(&self, id: BackendId) -> Option<SocketAddr> {
        self.backend(id).map(|backend| backend.address)
    }

    /// Who serves a session at the moment. A connection of an API user comes in at one service's door, and
    /// its requests may be for others: the backend tells.
    pub fn serving(&self, service: ServiceId, backend: Option<BackendId>) -> ServiceId {
        let backend = backend.and_then(|id| self.backend(id));
        backend.map_or(service, |backend| backend.service)
    }

    /// The same service, if it has not been forgotten since.
    pub fn find_serving(&self, service: ServiceId, backend: Option<BackendId>) -> Option<&Service> {
        self.registry.find_service(self.serving(service, backend))
    }

    /// The name of a backend's service, unless it is a built-in one.
    fn named_service_of(&self, id: BackendId) -> Name<'_> {
        named(self.registry.service(self.backend(id)?.service))
    }

    /// A backend that is registered, or has left and may still have sessions.
    fn backend(&self, id: BackendId) -> Option<&Backend> {
        let registered = self.registry.get(id).map(|entry| &entry.backend);
        registered.or_else(|| self.departed.get(&id).map(|it| &it.backend))
    }

    /// Notified when there are changes to publish.
    pub fn publication_wanted(&self) -> Rc<Notify> {
        self.publication.wanted()
    }

    /// Publishes the changes made since the last snapshot, if there are any.
    pub fn publish(&mut self) {
        if !self.publication.is_due() {
            return;
        }
        let snapshot = self.registry.freeze(self.config.reports_sessions());
        self.snapshot = self.publication.publish(snapshot);
        self.workers.wake();
        self.end_condemned();
        self.announce(Now::read());
        self.counters.snapshots_published.one();
        let mark = self.workers.mark();
        let draining = self.draining.values_mut().map(|it| &mut it.mark);
        let departed = self.departed.values_mut().map(|it| &mut it.mark);
        for unmarked in draining.chain(departed).filter(|it| it.is_none()) {
            *unmarked = Some(mark.clone());
        }
    }

    /// Wakes no worker; the caller does that once for all such orders.
    fn end_sessions_of(&mut self, backend: BackendId, reason: EndReason) {
        let order = Order::EndBackend { backend, reason };
        let lost = self.workers.order_quietly(order);
        self.counters.orders_lost.add(lost);
    }

    /// Returns whether there are more.
    fn hear_reports(&mut self, now: Now) -> bool {
        let mut heard = Vec::new();
        let more = self.workers.reports(REPORTS_AT_ONCE, |report| heard.push(report));
        let sessions = self.workers.sessions();
        for report in heard {
            match report {
                Report::Started { service, client, is_tls, backend, .. } => {
                    let service = self.serving(service, Some(backend));
                    let Some(service) = self.registry.find_service(service) else { continue };
                    let of = Of::new(service).secured(is_tls);
                    let backend = (backend, self.address_of(backend));
                    self.console.user_connected(now, of, client, backend, sessions);
                }
                Report::Ended(ended) => {
                    let service = self.serving(ended.service, ended.backend);
                    let Some(service) = self.registry.find_service(service) else { continue };
                    let of = Of::new(service).secured(ended.is_tls);
                    self.console.user_left(now, of, &ended, sessions);
                }
                Report::Refused { service, client, why } => {
                    let all_fail = is_failing(self.snapshot.pool(service));
                    let Some(service) = self.registry.find_service(service) else { continue };
                    self.console.user_refused(now, Of::new(service), client, why, all_fail);
                }
                Report::HandshakeFailed { service, client, host, why, is_ours } => {
                    let Some(service) = self.registry.find_service(service) else { continue };
                    let of = Of::new(service);
                    self.console.handshake_failed(now, of, client, host, (why, is_ours));
                }
                Report::OutOfRoom { service, shortage, backend, datagrams } => {
                    let service = self.serving(service, backend);
                    let service = self.registry.find_service(service).and_then(named);
                    let backend = backend.map(|id| (id, self.address_of(id)));
                    self.console.out_of_room(now, shortage, service, backend, datagrams);
                }
                Report::ConnectFailed { backend, errno } => {
                    let why = std::io::Error::from_raw_os_error(errno).to_string();
                    self.port_failed(backend, &why, now);
                }
                Report::UpstreamTlsFailed { backend, why } => {
                    self.port_failed(backend, &format!("TLS: {}", reason(why)), now);
                }
                Report::Unanswered { backend, since, now: until } => {
                    self.unanswered(backend, since, until, now);
                }
            }
        }
        more
    }

    /// Counts the log lines that were held back or lost, and logs a summary.
    fn sum_up_lines(&mut self, now: Now) {
        let lost = Lost {
            requests: self.workers.sum(|it| it.api_requests_unlogged.get()),
            reports: self.workers.sum(|it| it.reports_dropped.get()),
            dropped: logs::dropped(),
        };
        let seen = (self.console.held_back(), lost.dropped);
        let before = std::mem::replace(&mut self.lines_lost, seen);
        // Those that a predecessor has counted are counted already.
        self.counters.lines_held_back.add(seen.0.saturating_sub(before.0));
        self.counters.lines_dropped.add(seen.1.saturating_sub(before.1));
        self.console.sum_up(now, lost);
        self.console.sum_up_hellos(now, self.config.health.interval, self.registry.len());
    }

    /// Returns whether there are more.
    fn hear_requests(&mut self) -> bool {
        let mut heard = Vec::new();
        let more = self.workers.requests(LINES_AT_ONCE, |line| heard.push(*line));
        for line in heard {
            let address = line.backend.and_then(|id| self.address_of(id));
            let name = |id: ServiceId| self.snapshot.service(id);
            let service = line.service.and_then(name).and_then(named);
            let asked = line.asked.and_then(name).and_then(named);
            console::request(&line, service, asked, address);
        }
        more
    }

    /// Tells a backend's source what happens to it, if the source is a connection.
    fn tell(&self, entry: &Registered, event: Event) {
        if let Some(member) = self.members.get(&entry.source) {
            let service = self.registry.service(entry.backend.service);
            let about = About::of(service, entry.backend.address.port());
            member.mailbox.send(&Reply::Happened(about, event));
        }
    }

    /// The same for a backend that may have left.
    fn tell_backend(&self, id: BackendId, event: Event) {
        if let Some(entry) = self.registry.get(id) {
            self.tell(entry, event);
        }
    }

    /// Frees the places of departed backends whose sessions have all ended.
    fn release_departed(&mut self, now: Now) {
        let ids: Vec<_> = self.departed.keys().copied().collect();
        let mut wake = false;
        for id in ids {
            let departed = &self.departed[&id];
            let settled = departed.mark.as_ref().is_some_and(|it| self.workers.have_passed(it));
            let Backend { slot, service, .. } = departed.backend;
            let left = self.workers.active(slot);
            if left == 0 && settled {
                let values = self.workers.backend(slot);
                self.given_before.entry(service).or_default().add(&values);
                self.departed.remove(&id);
                self.registry.sessions_ended(id);
            } else if left > 0 && departed.repeat.is_some_and(|at| now >= at) {
                self.end_sessions_of(id, EndReason::BackendLeft);
                let again = Some(now.plus(REPEAT_EVERY));
                self.departed.entry(id).and_modify(|departed| departed.repeat = again);
                wake = true;
            } else if !settled {
                wake = true;
            }
        }
        if wake {
            self.workers.wake();
        }
    }

    /// Whether a worker's loop has stopped turning.
    pub fn is_stalled(&self) -> bool {
        self.pulse.is_lost()
    }

    fn advance_stop(&mut self, now: Now) -> bool {
        let left = self.workers.sessions();
        let stopping = matches!(self.stop, Stop::Stopping { .. });
        let settled =
            if stopping { self.workers.flush() } else { self.workers.have_passed(&self.published) };
        let step = self.stop.step(now, left, settled);
        self.do_stop(step);
        if matches!(self.stop, Stop::Draining { .. }) && !settled {
            self.workers.wake();
        }
        step == StopStep::Done
    }

    fn do_stop(&mut self, step: StopStep) {
        let sessions = self.workers.sessions();
        match step {
            StopStep::Nothing | StopStep::Done => {}
            StopStep::Tell { .. } if sessions == 0 => {}
            StopStep::Drain => {
                info!(sessions, "stopping: no more users are accepted, running sessions may end");
                self.order_all(Order::Drain);
            }
            StopStep::Tell { remaining } => {
                info!(
                    sessions,
                    seconds = remaining.as_secs_f64().ceil(),
                    "stopping: sessions left"
                );
            }
            StopStep::Stop => {
                match (self.is_handed_over, sessions) {
                    (true, 0) => {}
                    (true, _) => info!(sessions, "ending what could not be handed over"),
                    (false, _) => info!(sessions, "stopping: ending what is left"),
                }
                self.order_all(Order::Stop);
            }
        }
    }

    fn order_all(&mut self, order: Order) {
        let lost = self.workers.order(order);
        self.counters.orders_lost.add(lost);
        if lost > 0 {
            error!(?order, workers = lost, "workers do not take orders any more");
        }
    }
}

#[cfg(test)]
mod tests;
