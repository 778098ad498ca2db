//! A worker without a ring: the real books over the real link, and sessions that are no more than their
//! entries. Owns the order of a turn, which is the shell's: the snapshot, the doors, the users, the orders.
//! A turn is played in two halves, between which anything may happen elsewhere.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use lb::base::publish::Subscriber;
use lb::base::time::Now;
use lb::cluster::doors::Requests;
use lb::cluster::{BackendId, DoorId, Doorway, Protocol, Service, ServiceId, Snapshot};
use lb::metrics::WorkerMetrics;
use lb::session::EndReason;
use lb::worker::books::{Books, Entry, Held, Parts};
use lb::worker::link::{DoorChange, Order, Refusal, Report, RequestLine, WorkerEnd};
use nix::errno::Errno;

use crate::plan::NAMES;
use crate::random::Random;

/// Of users who were admitted later than they came.
const NO_DOOR: DoorId = DoorId(u16::MAX);

/// A door as this worker has it.
pub struct Door {
    pub protocol: Protocol,
    pub service: ServiceId,
    /// Users whom the kernel has connected and whom the worker has yet to accept.
    pub waiting: Vec<SocketAddr>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// An API user between two requests.
    Idle,
    Connecting,
    Running,
}

pub struct Session {
    pub entry: Entry,
    pub protocol: Protocol,
    pub door: DoorId,
    phase: Phase,
    /// Whose backends serve it.
    pub target: ServiceId,
    tried: Vec<BackendId>,
    /// How many turns, about.
    pub lasts: u64,
    /// Its door has closed, and it goes after the request under way.
    leaves: bool,
}

/// A session was given a backend.
pub struct Pick {
    pub worker: usize,
    pub service: Service,
    pub version: u64,
    pub backend: Option<BackendId>,
    pub user: SocketAddr,
    /// Whether it was the user's first attempt, and the worker avoids nobody by itself.
    pub is_plain: bool,
}

/// What a worker was told of its doors.
pub enum DoorNews {
    Opened(DoorId),
    Closed(DoorId),
}

pub struct Played {
    pub number: usize,
    pub books: Books,
    snapshots: Subscriber<Snapshot>,
    orders: rtrb::Consumer<Order>,
    changes: rtrb::Consumer<(Protocol, DoorChange)>,
    _requests: rtrb::Producer<RequestLine>,
    pub metrics: Arc<WorkerMetrics>,
    pub doors: BTreeMap<DoorId, Door>,
    pub sessions: Vec<Session>,
    /// Users of whom a proxy has yet to say who they are, until when that is waited for, and where they
    /// have a seat.
    pub greetings: Vec<(Now, ServiceId, SocketAddr, Held)>,
    pub stalled_until: Now,
    pub turned: Now,
    mid_turn: bool,
    /// It avoids backends by itself until the next snapshot.
    avoids: bool,
    /// For the laws, which take it out.
    pub picks: Vec<Pick>,
    pub news: Vec<DoorNews>,
    /// Users who came by a door of a service that the worker did not know.
    pub lost: Vec<(DoorId, ServiceId)>,
}

/// The chance of everything that a worker meets while it turns.
pub struct Weather<'a> {
    pub now: Now,
    pub random: &'a mut Random,
    /// Backends whose data port refuses.
    pub refusing: &'a dyn Fn(SocketAddr) -> bool,
}

impl Played {
    pub fn new(end: WorkerEnd, all_metrics: Arc<[Arc<WorkerMetrics>]>) -> Played {
        let WorkerEnd { worker, snapshots, orders, doors, reports, requests, metrics, .. } = end;
        let parts = Parts {
            shard: end.shard,
            metrics: Arc::clone(&metrics),
            all_metrics,
            reports,
            urgent: end.urgent,
        };
        Played {
            number: usize::from(worker),
            books: Books::new(parts),
            snapshots,
            orders,
            changes: doors,
            _requests: requests,
            metrics,
            doors: BTreeMap::new(),
            sessions: Vec::new(),
            greetings: Vec::new(),
            stalled_until: Now::default(),
            turned: Now::default(),
            mid_turn: false,
            avoids: false,
            picks: Vec::new(),
            news: Vec::new(),
            lost: Vec::new(),
        }
    }

    /// Plays half a turn.
    pub fn turn(&mut self, weather: &mut Weather<'_>) {
        self.turned = weather.now;
        if !self.mid_turn {
            self.look();
        } else {
            self.serve(weather);
            self.take_orders(weather.now);
            // Who had to wait for room is looked after at the end.
            self.let_in(weather, 1);
            self.metrics.counters.turns.one();
        }
        self.mid_turn = !self.mid_turn;
    }

    fn look(&mut self) {
        if let Some(snapshot) = self.snapshots.changed() {
            self.books.adopt(snapshot);
            self.avoids = false;
        }
        while let Ok((protocol, change)) = self.changes.pop() {
            self.change_door(protocol, change);
        }
    }

    fn change_door(&mut self, protocol: Protocol, change: DoorChange) {
        match change {
            DoorChange::Open(listener) => {
                let service = listener.service;
                let door = Door { protocol, service, waiting: Vec::new() };
                let before = self.doors.insert(listener.id, door);
                assert!(before.is_none(), "door {:?} is open already", listener.id);
                self.news.push(DoorNews::Opened(listener.id));
                self.expect_known(listener.id, service);
            }
            DoorChange::Assign { id, service, .. } => {
                let door = self.doors.get_mut(&id).expect("an open door is given away");
                door.service = service;
                if service != ServiceId::NOBODY {
                    self.expect_known(id, service);
                }
                if protocol == Protocol::Api {
                    for user in self.sessions.iter_mut().filter(|it| it.door == id) {
                        self.books.move_home(&mut user.entry, service);
                        if user.phase == Phase::Idle {
                            user.target = service;
                        }
                    }
                }
            }
            DoorChange::Close { id } => self.close_door(id),
        }
    }

    /// Those who wait are let in first.
    fn close_door(&mut self, id: DoorId) {
        let door = self.doors.get_mut(&id).expect("an open door is closed");
        let (protocol, waiting) = (door.protocol, std::mem::take(&mut door.waiting));
        if protocol != Protocol::Udp {
            for user in waiting {
                self.admit(id, user, self.turned);
            }
        }
        self.doors.remove(&id);
        self.news.push(DoorNews::Closed(id));
        for place in (0..self.sessions.len()).rev().filter(|_| protocol != Protocol::Tcp) {
            let session = &mut self.sessions[place];
            if session.door != id {
                continue;
            }
            match session.phase {
                Phase::Connecting | Phase::Running if protocol == Protocol::Api => {
                    session.leaves = true;
                }
                _ => self.end(place, EndReason::Finished, self.turned),
            }
        }
    }

    fn expect_known(&mut self, door: DoorId, service: ServiceId) {
        if self.books.snapshot().service(service).is_none() {
            self.lost.push((door, service));
        }
    }

    /// Lets in the users of about one door in `one_in`.
    fn let_in(&mut self, weather: &mut Weather<'_>, one_in: u64) {
        let ids: Vec<DoorId> = self.doors.keys().copied().collect();
        for id in ids.into_iter().filter(|_| weather.random.one_in(one_in)) {
            let waiting = std::mem::take(&mut self.doors.get_mut(&id).unwrap().waiting);
            waiting.into_iter().for_each(|user| self.admit(id, user, weather.now));
        }
    }

    fn serve(&mut self, weather: &mut Weather<'_>) {
        self.let_in(weather, 2);
        self.greet(weather);
        for place in (0..self.sessions.len()).rev() {
            self.go_on(place, weather);
        }
    }

    /// Some proxies say for whom they connect, and some never do.
    fn greet(&mut self, weather: &mut Weather<'_>) {
        for place in (0..self.greetings.len()).rev() {
            let greets = weather.random.one_in(10);
            if greets || weather.now >= self.greetings[place].0 {
                let (_, service, user, held) = self.greetings.swap_remove(place);
                drop(held);
                if greets {
                    self.seat(NO_DOOR, service, Protocol::Tcp, user, weather.now);
                }
            }
        }
    }

    fn admit(&mut self, door: DoorId, user: SocketAddr, now: Now) {
        let Door { service, protocol, .. } = self.doors[&door];
        if service == ServiceId::NOBODY {
            return self.books.refused(service, user, Refusal::NoBackend);
        }
        self.expect_known(door, service);
        if let Some(proxies) = self.books.proxies(service) {
            return match self.books.hold(service) {
                Ok(held) => {
                    self.greetings.push((now.plus(proxies.patience), service, user, held));
                }
                Err(why) => self.books.refused(service, user, why),
            };
        }
        self.seat(door, service, protocol, user, now);
    }

    fn seat(
        &mut self,
        door: DoorId,
        service: ServiceId,
        protocol: Protocol,
        user: SocketAddr,
        now: Now,
    ) {
        let entry = match self.books.admit(service, user, now) {
            Ok(entry) => entry,
            Err(why) => return self.books.refused(service, user, why),
        };
        let phase = if protocol == Protocol::Api { Phase::Idle } else { Phase::Connecting };
        let (tried, leaves) = (Vec::new(), false);
        let lasts = if user.port().is_multiple_of(4) { 2000 } else { 25 };
        let session =
            Session { entry, protocol, door, phase, target: service, tried, lasts, leaves };
        self.sessions.push(session);
        if phase == Phase::Connecting {
            self.assign(self.sessions.len() - 1, now);
        }
    }

    /// Picks a backend for a session, which ends if there is none.
    fn assign(&mut self, place: usize, now: Now) {
        let Session { entry, tried, target, .. } = &mut self.sessions[place];
        let (target, user) = (*target, entry.client);
        let choice = self.books.assign_from(target, entry, tried);
        let snapshot = self.books.snapshot();
        if let Some(service) = snapshot.service(target) {
            self.picks.push(Pick {
                worker: self.number,
                service: service.clone(),
                version: snapshot.version,
                backend: choice.map(|choice| choice.backend),
                user,
                is_plain: tried.is_empty() && !self.avoids,
            });
        }
        if choice.is_none() {
            let why = match self.sessions[place].tried.is_empty() {
                true => self.books.nobody(target),
                false => Refusal::Unreachable,
            };
            self.books.refused(target, user, why);
            if self.sessions[place].protocol == Protocol::Api {
                return self.answered(place, now);
            }
            let session = self.sessions.swap_remove(place);
            self.books.withdraw(session.entry);
        }
    }

    fn go_on(&mut self, place: usize, weather: &mut Weather<'_>) {
        let Some(session) = self.sessions.get_mut(place) else { return };
        match session.phase {
            Phase::Idle if weather.random.one_in(6) => self.ask(place, weather),
            Phase::Idle if weather.random.one_in(20) => {
                self.end(place, EndReason::Finished, weather.now);
            }
            Phase::Connecting if weather.random.one_in(3) => self.connected(place, weather),
            Phase::Running if weather.random.one_in(session.lasts) => self.over(place, weather),
            Phase::Running => {
                let (up, down) = (weather.random.below(9), weather.random.below(9));
                self.books.carried(&mut session.entry, up, down, weather.now);
            }
            _ => {}
        }
    }

    /// An API user asks for something, at whatever host.
    fn ask(&mut self, place: usize, weather: &mut Weather<'_>) {
        let session = &mut self.sessions[place];
        let doorway = Doorway { door: session.door, service: session.entry.service, is_tls: false };
        let (name, _) = weather.random.pick(&NAMES);
        let target = match self.books.snapshot().doors.at(doorway) {
            Requests::All(service) => Some(service),
            Requests::Split(routes) => routes.find(format!("{name}.test").as_bytes(), b"/"),
        };
        let Some(target) = target else { return };
        if self.books.snapshot().service(target).is_none() {
            self.lost.push((session.door, target));
            return;
        }
        match self.books.let_in(&mut session.entry, target, false) {
            Ok(()) => {
                (session.target, session.phase) = (target, Phase::Connecting);
                session.tried.clear();
                self.assign(place, weather.now);
            }
            Err(barrier) => self.books.barred(target, barrier, 1),
        }
    }

    fn connected(&mut self, place: usize, weather: &mut Weather<'_>) {
        let session = &mut self.sessions[place];
        let choice = session.entry.choice().expect("it is being connected to somebody");
        if !(weather.refusing)(choice.address) {
            session.phase = Phase::Running;
            return self.books.started(&session.entry);
        }
        self.books.backend_failed(&session.entry, Errno::ECONNREFUSED);
        self.avoids = true;
        session.tried.push(choice.backend);
        if session.tried.len() < 3 {
            return self.assign(place, weather.now);
        }
        match session.protocol {
            Protocol::Api => self.answered(place, weather.now),
            _ => self.end(place, EndReason::Unreachable, weather.now),
        }
    }

    fn over(&mut self, place: usize, weather: &mut Weather<'_>) {
        match self.sessions[place].protocol {
            Protocol::Api => self.answered(place, weather.now),
            _ => self.end(place, EndReason::Finished, weather.now),
        }
    }

    /// The request of an API user has had its answer.
    fn answered(&mut self, place: usize, now: Now) {
        let session = &mut self.sessions[place];
        self.books.unassign(&mut session.entry);
        self.books.let_out(&mut session.entry);
        (session.phase, session.target) = (Phase::Idle, session.entry.service);
        if session.leaves {
            self.end(place, EndReason::Finished, now);
        }
    }

    fn end(&mut self, place: usize, why: EndReason, now: Now) {
        let session = self.sessions.swap_remove(place);
        self.books.close(session.entry, why, now);
    }

    fn take_orders(&mut self, now: Now) {
        while let Ok(order) = self.orders.pop() {
            for place in (0..self.sessions.len()).rev() {
                let entry = &self.sessions[place].entry;
                let why = match order {
                    Order::EndBackend { backend, reason } if entry.is_on(backend) => Some(reason),
                    Order::EndSession { id, reason } if self.books.id(entry) == id => Some(reason),
                    _ => None,
                };
                if let Some(why) = why {
                    self.end(place, why, now);
                }
            }
        }
    }

    /// Sessions that are the service's, or are on a backend of its.
    pub fn sessions_of(&self, service: ServiceId) -> impl Iterator<Item = &Session> {
        self.sessions.iter().filter(move |it| it.entry.service == service || it.target == service)
    }

    /// The service that counts a session as one of its own.
    pub fn inside(session: &Session) -> Option<ServiceId> {
        match session.protocol {
            Protocol::Api if session.phase == Phase::Idle => None,
            Protocol::Api => Some(session.target),
            _ => Some(session.entry.service),
        }
    }

    pub fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Says something that has long stopped being true.
    pub fn say_late(&mut self, report: Report) {
        self.books.report(report);
    }
}
