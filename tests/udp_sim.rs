//! UDP users under a seeded simulation: two workers' cores with their books, users and backends that
//! come and go, a network that delays, loses, invents and floods, and a shadow model that says what may
//! not happen. Half of the runs are under pressure: many more users than there are sockets, so that
//! sessions and rests give way all the time. A run is a function of its seed; a violation names the seed and the step. Every kind of
//! violation is shown to be found by planting a fault that causes it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::seats::Seats;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Snapshot, Standing, Terms};
use lb::config::{OnUdpLoss, Udp};
use lb::metrics::WorkerMetrics;
use lb::proxy::udp::{Limits, Socket};
use lb::session::EndReason;
use lb::session::affinity::Affinity;
use lb::session::flows::{FlowHasher, Waits};
use lb::session::shards::Shard;
use lb::session::sources::SourceLimits;
use lb::worker::books::{Books, Parts};
use lb::worker::link::{Order, Report};
use lb::worker::udp::sessions::{Down, Holder, Load, Sessions, Settings, Up, Why};
use nix::errno::Errno;

const WORKERS: usize = 2;
const IDLE: Duration = Duration::from_secs(2);
const REST: Duration = Duration::from_secs(6);
/// Under pressure sessions end because others need their room, and not because of this.
const IDLE_UNDER_PRESSURE: Duration = Duration::from_secs(60);
/// A copy of a datagram comes at most this long after it.
const COPIES: u64 = 400;
/// How far a timer may lag: a tick of the wheel.
const TICK: Duration = Duration::from_millis(20);
/// A session may be noticed to be idle this much late: a stall and a tick of the wheel.
const LATE: Duration = Duration::from_millis(1100);
/// How long after a datagram ICMP is believed about it.
const ICMP_LATE: Duration = Duration::from_secs(5);
/// How long a worker avoids a backend after ICMP.
const AVOIDED: Duration = Duration::from_secs(1);
const SESSIONS: usize = 60;
const SEATS: usize = 100;
const SOCKETS: usize = 40;
const SOCKETS_UNDER_PRESSURE: usize = 6;
const PER_SOURCE: u32 = 6;
const USERS: u64 = 50;
/// The first byte of the addresses from which floods come.
const FLOOD: u8 = 203;
const STEPS: u64 = 6_000;

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    NoRest,
    DeafToSnapshots,
    TrustsAnySender,
    NoAffinity,
    NeverExpires,
    NoSourceLimit,
    ForgetsTheLocalAddress,
    MixesUpSockets,
    /// These need pressure to show.
    EvictsWhoWaits,
    EvictsWhoSpeaks,
    HandsOnTooEarly,
    MakesNoRoom,
}

/// How short room is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pressure {
    None,
    /// Sockets are short, and sessions end when they are idle.
    Sockets,
    /// The same, with one reply for each datagram.
    Answers,
    /// Places in the table are short.
    Places,
}

impl Pressure {
    const ALL: [Pressure; 4] =
        [Pressure::None, Pressure::Sockets, Pressure::Answers, Pressure::Places];

    fn idle(self) -> Duration {
        if self == Pressure::None { IDLE } else { IDLE_UNDER_PRESSURE }
    }

    fn sockets(self) -> usize {
        match self {
            Pressure::None | Pressure::Places => SOCKETS,
            Pressure::Sockets | Pressure::Answers => SOCKETS_UNDER_PRESSURE,
        }
    }

    fn sessions(self) -> usize {
        if self == Pressure::Places { 12 } else { SESSIONS }
    }

    fn per_source(self) -> Option<u32> {
        (self == Pressure::None).then_some(PER_SOURCE)
    }
}

#[derive(Debug)]
struct Violation(String);

type Outcome = Result<(), Violation>;

fn violated<T>(what: String) -> Result<T, Violation> {
    Err(Violation(what))
}

/// xorshift64* (S. Vigna, ACM TOMS 2016).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

/// Who speaks to which of our addresses.
type Flow = (SocketAddr, SocketAddr);

/// A socket as the kernel knows it: its worker, and which opening it is.
type Descriptor = (usize, u64);

struct Worker {
    core: Sessions,
    books: Books,
    reports: rtrb::Consumer<Report>,
    metrics: Arc<WorkerMetrics>,
    shard: Arc<Shard>,
    open: HashMap<Socket, u64>,
    /// Datagrams from users that it was handed, and what came of them.
    offered: u64,
    refused: HashMap<SocketAddr, Now>,
    /// Addresses that ICMP has named, and from where nothing has come since.
    accused: HashSet<SocketAddr>,
}

struct Registered {
    address: SocketAddr,
    standing: Standing,
    /// Whether somebody listens there.
    alive: bool,
}

/// What is under way to a worker.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Arrival {
    /// To what this flow said.
    Reply {
        descriptor: Descriptor,
        from: SocketAddr,
        flow: Flow,
    },
    Icmp {
        descriptor: Descriptor,
        to: SocketAddr,
    },
}

/// A session as the model saw it last.
#[derive(Clone, Copy)]
struct Held {
    backend: u32,
    address: SocketAddr,
    descriptor: Descriptor,
    last: Now,
    /// Replies that are still to come.
    owed: u64,
    /// An order may have ended it.
    doubtful: bool,
    /// When something was sent that has no answer yet.
    asked: Option<Now>,
    /// ICMP said what can be believed: it may leave its backend.
    refused: bool,
    /// One may have before, so that more replies may be owed.
    unsure: bool,
}

#[derive(Default)]
struct Model {
    held: HashMap<(usize, Flow), Held>,
    /// Who last used a backend's address with a descriptor, and until when a reply may come.
    pairs: HashMap<(Descriptor, SocketAddr), (Flow, Now)>,
    /// Where the affinity map should find a flow: the holder and the backend.
    noted: HashMap<Flow, (usize, u32)>,
    delivered: u64,
    moved: u64,
    found: u64,
}

struct World {
    random: Random,
    fault: Fault,
    pressure: Pressure,
    now: Now,
    workers: Vec<Worker>,
    map: Arc<Affinity>,
    backends: BTreeMap<u32, Registered>,
    next_backend: u32,
    next_descriptor: u64,
    snapshot: Arc<Snapshot>,
    network: BinaryHeap<Reverse<(Now, u64, Arrival)>>,
    arrivals: u64,
    /// Which worker the kernel hands a flow to.
    grouping: u64,
    sockets_fail_until: Now,
    model: Model,
    /// Of each worker, what [`World::idle_at`] found when it was last asked.
    idle: [(Now, Vec<SocketAddr>); WORKERS],
}

fn host(number: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, number as u8], 53))
}

fn user(number: u64) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, (number / 5) as u8], 1000 + number as u16))
}

fn local(number: u64) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1 + number as u8], 8082))
}

fn is_of_flood(flow: Flow) -> bool {
    matches!(flow.0.ip(), IpAddr::V4(v4) if v4.octets()[0] == FLOOD)
}

fn waits(fault: Fault) -> Waits {
    let mut waits = Waits::default();
    match fault {
        Fault::EvictsWhoWaits => waits.answer = Duration::from_secs(1),
        Fault::EvictsWhoSpeaks => waits.quiet = Duration::from_millis(50),
        Fault::HandsOnTooEarly => waits.copies = Duration::ZERO,
        Fault::MakesNoRoom => {
            (waits.quiet, waits.answer) = (Duration::from_secs(900), Duration::from_secs(900));
        }
        _ => {}
    }
    waits
}

/// How long a session is in use after something passed.
fn in_use_for(owed: u64) -> Duration {
    Duration::from_secs(if owed > 0 { 5 } else { 2 })
}

fn settings(
    fault: Fault,
    pressure: Pressure,
    worker: usize,
    seed: u64,
    map: &Arc<Affinity>,
) -> Settings {
    let holder = Holder { map: Arc::clone(map), worker: worker as u8 };
    let responses = NonZeroU32::new(u32::from(pressure == Pressure::Answers));
    let sessions = if fault == Fault::NoSourceLimit { None } else { pressure.per_source() };
    Settings {
        udp: Udp { on_backend_loss: OnUdpLoss::Move, responses, ..Udp::default() },
        idle: pressure.idle(),
        waits: waits(fault),
        sessions: pressure.sessions(),
        share: pressure.sockets(),
        upstream: Limits {
            sockets: pressure.sockets(),
            rest: if fault == Fault::NoRest { Duration::ZERO } else { REST },
            resting: 10_000,
        },
        sources: SourceLimits {
            sessions: sessions.and_then(NonZeroU32::new),
            new_per_second: None,
        },
        hasher: FlowHasher::new((seed, 7)),
        seed,
        affinity: (fault != Fault::NoAffinity).then_some(holder),
    }
}

/// The UDP service, in which sessions may be idle for so long. The others have no seats and no patience.
fn services(idle: Duration, seats: &Arc<Seats>) -> Snapshot {
    let mut snapshot = Snapshot::built_in(Terms::default(), |protocol| match protocol {
        Protocol::Udp => Arc::clone(seats),
        _ => Arc::new(Seats::new(0)),
    });
    for service in &mut snapshot.services {
        let own = service.kind == Protocol::Udp;
        service.terms.timeouts.udp_idle = if own { idle } else { Duration::from_millis(1) };
    }
    snapshot
}

impl World {
    fn new(seed: u64, fault: Fault, pressure: Pressure) -> World {
        let now = Now::from_nanos(5_000_000_000);
        let map = Arc::new(Affinity::new(WORKERS * SESSIONS));
        let seats = Arc::new(Seats::new(SEATS));
        let snapshot = Arc::new(services(pressure.idle(), &seats));
        let metrics: Vec<Arc<WorkerMetrics>> = (0..WORKERS).map(|_| Arc::default()).collect();
        let all_metrics: Arc<[_]> = metrics.clone().into();
        let workers = (metrics.into_iter().enumerate())
            .map(|(number, metrics)| {
                let (writer, shard) = Shard::new(number as u8, SESSIONS);
                let (producer, reports) = rtrb::RingBuffer::new(64);
                let mut books = Books::new(Parts {
                    shard: writer,
                    metrics: Arc::clone(&metrics),
                    all_metrics: Arc::clone(&all_metrics),
                    reports: producer,
                    urgent: Arc::default(),
                });
                books.adopt(Arc::clone(&snapshot));
                let core = Sessions::new(settings(fault, pressure, number, seed, &map), now);
                Worker {
                    core,
                    books,
                    reports,
                    metrics,
                    shard,
                    open: HashMap::new(),
                    offered: 0,
                    refused: HashMap::new(),
                    accused: HashSet::new(),
                }
            })
            .collect();
        World {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            fault,
            pressure,
            now,
            workers,
            map,
            backends: BTreeMap::new(),
            next_backend: 1,
            next_descriptor: 0,
            snapshot,
            network: BinaryHeap::new(),
            arrivals: 0,
            grouping: 0,
            sockets_fail_until: now,
            model: Model::default(),
            idle: Default::default(),
        }
    }

    fn step(&mut self) -> Outcome {
        let ms =
            if self.random.one_in(40) { self.random.below(900) } else { self.random.below(12) };
        self.now = self.now.plus(Duration::from_millis(ms));
        match self.random.below(1000) {
            0..=5 => self.join(),
            6..=8 => self.leave(),
            9..=13 => self.change_standing(),
            14..=17 => self.kill_or_revive(),
            18..=22 => self.grouping = self.random.below(u64::MAX),
            23..=26 => self.flood()?,
            27..=29 => self.end_something(),
            30 => self.sockets_fail_until = self.now.plus(Duration::from_millis(300)),
            31..=80 => self.spoof()?,
            _ => self.talk()?,
        }
        while self.network.peek().is_some_and(|Reverse((at, ..))| *at <= self.now) {
            if let Some(Reverse((_, _, arrival))) = self.network.pop() {
                self.arrive(arrival)?;
            }
        }
        self.expire();
        self.check()
    }

    fn publish(&mut self) {
        let backends: Vec<Backend> = (self.backends.iter())
            .map(|(id, backend)| Backend {
                id: BackendId(*id),
                slot: (*id % 512) as u16,
                service: ServiceId::built_in(Protocol::Udp),
                address: backend.address,
                weight: 1,
                name: None,
                standing: backend.standing,
            })
            .collect();
        self.snapshot = Arc::new(self.snapshot.with(&backends));
        for worker in &mut self.workers {
            worker.books.adopt(Arc::clone(&self.snapshot));
            if self.fault != Fault::DeafToSnapshots || !self.random.one_in(2) {
                worker.core.adopt(&self.snapshot);
            }
        }
    }

    fn any_backend(&mut self) -> Option<u32> {
        let which = self.random.below(self.backends.len().max(1) as u64) as usize;
        self.backends.keys().nth(which).copied()
    }

    /// A backend registers, often at an address that was known before.
    fn join(&mut self) {
        let address = host(1 + self.random.below(6));
        if self.backends.values().any(|backend| backend.address == address) {
            return;
        }
        let registered = Registered { address, standing: Standing::Serving, alive: true };
        self.backends.insert(self.next_backend, registered);
        self.next_backend += 1;
        self.publish();
    }

    fn leave(&mut self) {
        if let Some(id) = self.any_backend() {
            self.backends.remove(&id);
            self.publish();
        }
    }

    fn change_standing(&mut self) {
        let standing =
            [Standing::Serving, Standing::Aside, Standing::Draining][self.random.below(3) as usize];
        if let Some(id) = self.any_backend() {
            self.backends.entry(id).and_modify(|backend| backend.standing = standing);
            self.publish();
        }
    }

    fn kill_or_revive(&mut self) {
        if let Some(id) = self.any_backend() {
            self.backends.entry(id).and_modify(|backend| backend.alive = !backend.alive);
        }
    }

    /// Users of many sources that were never seen and never come again.
    fn flood(&mut self) -> Outcome {
        let one_source = self.pressure != Pressure::None && self.random.one_in(2);
        for _ in 0..20 + self.random.below(100) {
            let [a, b] = [self.random.below(250) as u8, self.random.below(250) as u8];
            let [a, b] = if one_source { [1, 1] } else { [a, b] };
            let from = SocketAddr::from(([FLOOD, a, b, 1], 1 + self.random.below(60_000) as u16));
            self.up((from, local(0)), Load::one(10))?;
        }
        Ok(())
    }

    fn end_something(&mut self) {
        let which = self.random.below(WORKERS as u64) as usize;
        let reason = EndReason::Operator;
        let order = if self.random.one_in(3) {
            let Some(id) = self.any_backend() else { return };
            self.doubt(which, |_, held| held.backend == id);
            Order::EndBackend { backend: BackendId(id), reason }
        } else {
            let sessions: Vec<_> = self.workers[which].shard.iter().collect();
            let chosen = self.random.below(sessions.len().max(1) as u64) as usize;
            let Some(view) = sessions.get(chosen) else { return };
            self.doubt(which, |flow, _| flow.0 == view.client);
            Order::EndSession { id: view.id, reason }
        };
        self.model.noted.retain(|_, (worker, _)| *worker != which);
        let Worker { core, books, .. } = &mut self.workers[which];
        core.order(self.now, order, books);
    }

    fn doubt(&mut self, which: usize, meant: impl Fn(&Flow, &Held) -> bool) {
        for ((worker, flow), held) in &mut self.model.held {
            held.doubtful |= *worker == which && meant(flow, held);
        }
    }

    fn talk(&mut self) -> Outcome {
        let users = if self.pressure == Pressure::None { USERS } else { 4 * USERS };
        let flow = (user(self.random.below(users)), local(self.random.below(2)));
        let load = match self.random.below(20) {
            0 => Load::one(0),
            1 => Load::one(65_507),
            2 => Load { bytes: 5_000, segment: 1_200 },
            _ => Load::one(1 + self.random.below(1_400) as usize),
        };
        self.up(flow, load)
    }

    /// Someone pretends to answer, or to be a router.
    fn spoof(&mut self) -> Outcome {
        let which = self.random.below(WORKERS as u64) as usize;
        let nth = self.random.below(SOCKETS as u64) as usize;
        let Some((socket, opening)) = self.workers[which]
            .open
            .iter()
            .min_by_key(|(socket, _)| usize::from(socket.number).abs_diff(nth))
        else {
            return Ok(());
        };
        let (socket, descriptor) = (*socket, (which, *opening));
        let mut from = host(1 + self.random.below(8));
        if self.random.one_in(2) {
            self.icmp(descriptor, socket, from);
            return Ok(());
        }
        if self.random.one_in(2) {
            from.set_port(54 + self.random.below(3) as u16);
        }
        self.down(descriptor, socket, from)
    }

    fn worker_of(&self, flow: Flow) -> usize {
        let number = u64::from(flow.0.port()).wrapping_mul(0x9e37_79b9) ^ self.grouping;
        (number.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as usize % WORKERS
    }

    fn up(&mut self, flow: Flow, load: Load) -> Outcome {
        let mut which = self.worker_of(flow);
        let told = match self.fault {
            Fault::ForgetsTheLocalAddress => local(0),
            _ => flow.1,
        };
        let mut ask: fn(&mut Sessions, Now, SocketAddr, SocketAddr, Load, &mut Books) -> Up =
            Sessions::up;
        loop {
            let Worker { core, books, open, offered, .. } = &mut self.workers[which];
            match ask(core, self.now, flow.0, told, load, books) {
                Up::Open(socket) => {
                    let opens = self.now >= self.sockets_fail_until;
                    core.opened(self.now, socket, opens);
                    if opens && open.insert(socket, self.next_descriptor).is_some() {
                        return violated(format!("{socket:?} was opened twice"));
                    }
                    self.next_descriptor += 1;
                }
                Up::Pass(worker) => {
                    if usize::from(worker) == which {
                        return violated(format!("{flow:?} was handed round and round"));
                    }
                    which = usize::from(worker);
                    if self.running(which, flow).is_some() {
                        self.model.found += 1;
                    }
                    ask = Sessions::passed;
                }
                Up::Send { from, to } => {
                    *offered += load.datagrams();
                    let Some(opening) = open.get(&from).copied() else {
                        return violated(format!("{from:?} is not open"));
                    };
                    return self.sent(which, flow, (which, opening), to, load.datagrams());
                }
                Up::Drop(why) => {
                    *offered += load.datagrams();
                    return self.shed(which, flow, why);
                }
            }
        }
    }

    /// What the model has to say about a datagram that goes out.
    fn sent(
        &mut self,
        which: usize,
        flow: Flow,
        by: Descriptor,
        to: SocketAddr,
        datagrams: u64,
    ) -> Outcome {
        let Some((id, backend)) = self.backends.iter().find(|(_, b)| b.address == to) else {
            return violated(format!("{flow:?} was sent to {to}, where nobody is registered"));
        };
        let (id, alive) = (*id, backend.alive);
        let before = self.running(which, flow);
        let maybe_running = self.may_run(which, flow);
        match before {
            Some(held)
                if self.is_fit(which, held) && (held.address, held.descriptor) != (to, by) =>
            {
                return violated(format!("{flow:?} left {} for {to} without need", held.address));
            }
            Some(held) if held.address != to => self.model.moved += 1,
            Some(_) => {}
            None if maybe_running => {}
            None => self.expect_alone(which, flow, to)?,
        }
        if let Some((other, clean)) = self.model.pairs.get(&(by, to))
            && *other != flow
            && self.now < *clean
        {
            return violated(format!("{flow:?} was given the pair of {other:?} too early"));
        }
        let last = self.now;
        let same = before.filter(|held| (held.address, held.descriptor) == (to, by));
        let owed = same.map_or(0, |held| held.owed) + datagrams;
        self.model.pairs.insert((by, to), (flow, last.plus(in_use_for(owed))));
        // Also of a session that may have ended: it may as well run on.
        let known = self.model.held.get(&(which, flow));
        let held = Held {
            backend: id,
            address: to,
            descriptor: by,
            last,
            owed,
            doubtful: false,
            asked: Some(last),
            refused: known.is_some_and(|held| held.refused && held.address == to),
            unsure: known.is_some_and(|held| held.doubtful || held.unsure),
        };
        self.model.held.insert((which, flow), held);
        if maybe_running && before.is_none() {
            // Whether the worker told the others depends on whether the session was over.
            self.model.noted.remove(&flow);
        } else if before.is_none_or(|held| held.backend != id) {
            self.model.noted.insert(flow, (which, id));
        }
        self.answer(flow, by, to, alive);
        Ok(())
    }

    /// A flow that is new here does not run at another worker that told of it.
    fn expect_alone(&mut self, which: usize, flow: Flow, to: SocketAddr) -> Outcome {
        let Some((holder, id)) = self.model.noted.get(&flow).copied() else { return Ok(()) };
        let Some(held) = self.running(holder, flow) else { return Ok(()) };
        if holder == which || held.backend != id {
            return Ok(());
        }
        violated(format!("{flow:?} has {} elsewhere and got {to}", held.address))
    }

    /// The session of a flow, if it cannot have ended.
    fn running(&self, which: usize, flow: Flow) -> Option<Held> {
        let held = self.model.held.get(&(which, flow)).copied()?;
        let until = held.last.plus(in_use_for(held.owed).min(self.pressure.idle()));
        (self.now < until && !held.doubtful).then_some(held)
    }

    /// Whether a flow may have a session here.
    fn may_run(&self, which: usize, flow: Flow) -> bool {
        let held = self.model.held.get(&(which, flow));
        held.is_some_and(|held| self.now < held.last.plus(self.pressure.idle() + LATE))
    }

    /// Whether a worker has no reason to leave a backend.
    fn is_fit(&self, which: usize, held: Held) -> bool {
        let refused = self.workers[which].refused.get(&held.address).copied().unwrap_or_default();
        let backend = self.backends.get(&held.backend);
        let fit = backend
            .is_some_and(|backend| backend.standing != Standing::Aside && self.now >= refused);
        fit && !held.refused
    }

    fn answer(&mut self, flow: Flow, by: Descriptor, to: SocketAddr, alive: bool) {
        if self.random.one_in(10) {
            return;
        }
        // Mostly at once, sometimes as late as anybody waits for it.
        let late = if self.random.one_in(10) { 4_999 } else { 30 };
        let first = self.random.below(late);
        let arrival = match alive {
            true => Arrival::Reply { descriptor: by, from: to, flow },
            false => Arrival::Icmp { descriptor: by, to },
        };
        for copy in 0..1 + u64::from(self.random.one_in(20)) {
            let ms = first + copy * self.random.below(COPIES);
            let at = self.now.plus(Duration::from_millis(ms));
            self.arrivals += 1;
            let arrival = match &arrival {
                Arrival::Reply { descriptor, from, flow } => {
                    Arrival::Reply { descriptor: *descriptor, from: *from, flow: *flow }
                }
                Arrival::Icmp { descriptor, to } => {
                    Arrival::Icmp { descriptor: *descriptor, to: *to }
                }
            };
            self.network.push(Reverse((at, self.arrivals, arrival)));
        }
    }

    fn shed(&mut self, which: usize, flow: Flow, why: Why) -> Outcome {
        let running = self.running(which, flow).filter(|held| self.is_fit(which, *held));
        if running.is_some() {
            return violated(format!("{flow:?} has a session and was dropped: {why:?}"));
        }
        self.check_room(which, flow, why)?;
        let serving = self.backends.values().any(|b| b.standing == Standing::Serving);
        if why == Why::NoBackend && serving {
            return violated(format!("{flow:?} was told that there is no backend"));
        }
        Ok(())
    }

    /// Nobody is turned away for want of room while a session is there that is not in use any more, on
    /// every backend that could serve; and the share of a source is for those that have sessions.
    fn check_room(&mut self, which: usize, flow: Flow, why: Why) -> Outcome {
        let has_some =
            |ip| self.model.held.keys().any(|(by, held)| *by == which && held.0.ip() == ip);
        if why == Why::SourceShare && is_of_flood(flow) && !has_some(flow.0.ip()) {
            return violated(format!("{flow:?} was told that it has too much, and has nothing"));
        }
        if self.idle[which].0 != self.now {
            self.idle[which] = (self.now, self.idle_at(which));
        }
        // Without a step of time nothing becomes idle, but some that were may have given way.
        let room = self.is_room_among(&self.idle[which].1, why)
            && self.is_room_among(&self.idle_at(which), why);
        // A session that runs and is to be moved asks no more than one backend.
        if room && !self.may_run(which, flow) {
            return violated(format!("{flow:?} found no room ({why:?}) beside idle sessions"));
        }
        Ok(())
    }

    fn is_room_among(&self, idle: &[SocketAddr], why: Why) -> bool {
        let mut serving = self.backends.values().filter(|b| b.standing == Standing::Serving);
        match why {
            Why::TableFull => !idle.is_empty(),
            Why::UpstreamExhausted if (1..=4).contains(&serving.clone().count()) => {
                serving.all(|backend| idle.contains(&backend.address))
            }
            _ => false,
        }
    }

    /// Where a worker has sessions that are not in use any more, one address for each of them. The books
    /// do not say to which of our addresses a user speaks, so one who spoke to both at once is left out.
    fn idle_at(&self, which: usize) -> Vec<SocketAddr> {
        let sessions = self.workers[which].shard.iter();
        let held = sessions.filter_map(|listed| {
            let of = |number| self.model.held.get(&(which, (listed.client, local(number))));
            let mut held = [of(0), of(1)].into_iter().flatten();
            let is_it = |held: &&Held| held.last == listed.active;
            held.find(is_it).filter(|_| !held.any(|other| is_it(&other)))
        });
        let is_over = |held: &&Held| {
            let until = held.last.plus(in_use_for(held.owed).min(self.pressure.idle()) + TICK);
            !held.doubtful && !held.unsure && self.now >= until
        };
        held.filter(is_over).map(|held| held.address).collect()
    }

    fn arrive(&mut self, arrival: Arrival) -> Outcome {
        let (Arrival::Reply { descriptor, .. } | Arrival::Icmp { descriptor, .. }) = arrival;
        let worker = &mut self.workers[descriptor.0];
        let found = worker.open.iter().find(|(_, opening)| **opening == descriptor.1);
        // A socket that was closed meanwhile gets nothing any more.
        let Some((socket, _)) = found else { return Ok(()) };
        let socket = *socket;
        match arrival {
            // That nobody else gets the pair while it may come is looked at when somebody does.
            Arrival::Reply { from, flow, .. } => match self.model.pairs.get(&(descriptor, from)) {
                Some((holder, _)) if *holder != flow => Ok(()),
                _ => self.down(descriptor, socket, from),
            },
            Arrival::Icmp { to, .. } => {
                self.icmp(descriptor, socket, to);
                Ok(())
            }
        }
    }

    /// ICMP says that nobody is at `to`, truly or not.
    fn icmp(&mut self, descriptor: Descriptor, socket: Socket, to: SocketAddr) {
        let worker = &mut self.workers[descriptor.0];
        let sockets = [socket].into_iter();
        worker.core.refused(self.now, sockets, to, Errno::ECONNREFUSED, &mut worker.books);
        let holder = self.model.pairs.get(&(descriptor, to)).map(|(flow, _)| *flow);
        let held = holder.and_then(|flow| self.model.held.get_mut(&(descriptor.0, flow)));
        let Some(held) = held else { return };
        let asked = held.asked.filter(|asked| self.now <= asked.plus(ICMP_LATE));
        if asked.is_none() || (held.descriptor, held.address) != (descriptor, to) {
            return;
        }
        (held.asked, held.refused) = (None, true);
        if !worker.accused.insert(to) {
            let until = worker.refused.entry(to).or_default();
            *until = (*until).max(self.now.plus(AVOIDED));
        }
    }

    fn down(&mut self, descriptor: Descriptor, socket: Socket, from: SocketAddr) -> Outcome {
        let holder = self.model.pairs.get(&(descriptor, from)).copied();
        let (told_socket, told_from) = match self.fault {
            Fault::TrustsAnySender => {
                let of_pair = self.model.pairs.keys().find(|(by, _)| *by == descriptor);
                (socket, of_pair.map_or(from, |(_, address)| *address))
            }
            Fault::MixesUpSockets if self.random.one_in(20) => {
                (Socket { number: socket.number ^ 1, ..socket }, from)
            }
            _ => (socket, from),
        };
        let Worker { core, books, .. } = &mut self.workers[descriptor.0];
        match core.down(self.now, told_socket, told_from, Load::one(100), books) {
            Down::Send { from: local, to } => {
                let Some((flow, _)) = holder else {
                    return violated(format!("{from} answered {to} without being asked"));
                };
                if flow != (to, local) {
                    return violated(format!("a reply to {flow:?} went to {:?}", (to, local)));
                }
                self.model.delivered += 1;
                self.hear(descriptor, from, flow);
                self.workers[descriptor.0].accused.remove(&from);
                Ok(())
            }
            Down::Drop(why) => {
                let due = holder.and_then(|(flow, _)| self.running(descriptor.0, flow));
                let due = due.filter(|held| (held.descriptor, held.address) == (descriptor, from));
                match due {
                    Some(_) => violated(format!("a reply from {from} was dropped: {why:?}")),
                    None => Ok(()),
                }
            }
        }
    }

    /// What the model makes of a reply that went to its user.
    fn hear(&mut self, descriptor: Descriptor, from: SocketAddr, flow: Flow) {
        let mut wait = in_use_for(0);
        if let Some(held) = self.model.held.get_mut(&(descriptor.0, flow)) {
            let waits = self.now < held.last.plus(in_use_for(held.owed));
            held.owed = if waits { held.owed.saturating_sub(1) } else { 0 };
            (held.last, held.asked, held.refused) = (self.now, None, false);
            wait = in_use_for(held.owed);
            if held.owed == 0 && self.pressure == Pressure::Answers {
                wait = Duration::from_millis(500);
                self.model.held.remove(&(descriptor.0, flow));
                self.model.noted.remove(&flow);
            }
        }
        self.model.pairs.insert((descriptor, from), (flow, self.now.plus(wait)));
    }

    fn expire(&mut self) {
        for worker in &mut self.workers {
            while worker.reports.pop().is_ok() {}
            if self.fault == Fault::NeverExpires {
                continue;
            }
            while worker.core.next_deadline().is_some_and(|at| at <= self.now) {
                worker.core.expire(self.now, &mut worker.books);
            }
            while let Some(socket) = worker.core.next_surplus() {
                worker.open.remove(&socket);
            }
        }
    }

    fn check(&self) -> Outcome {
        for worker in &self.workers {
            if worker.core.sockets() != worker.open.len()
                || worker.open.len() > self.pressure.sockets()
            {
                return violated(format!("{} sockets are open", worker.open.len()));
            }
            let counters = &worker.metrics.counters;
            let dropped: u64 = [
                Why::NoBackend,
                Why::TableFull,
                Why::SourceLimit,
                Why::SourceRate,
                Why::SourceShare,
                Why::UpstreamExhausted,
                Why::Draining,
                Why::TooBig,
            ]
            .map(|why| why.counter(counters).get())
            .iter()
            .sum();
            if counters.udp_datagrams_up.get() + dropped != worker.offered {
                return violated("a datagram was neither passed on nor counted".to_owned());
            }
        }
        if self.arrivals.is_multiple_of(16) { self.check_sessions() } else { Ok(()) }
    }

    fn check_sessions(&self) -> Outcome {
        for worker in &self.workers {
            let mut of_source: HashMap<_, u32> = HashMap::new();
            let mut count = 0;
            for session in worker.shard.iter() {
                count += 1;
                let held = of_source.entry(session.client.ip()).or_default();
                *held += 1;
                if self.pressure.per_source().is_some_and(|most| *held > most) {
                    return violated(format!("{} holds too many sessions", session.client.ip()));
                }
                if self.now > session.active.plus(self.pressure.idle() + LATE) {
                    return violated(format!("{} is idle and does not end", session.client));
                }
            }
            if count != worker.core.live() || count > self.pressure.sessions() {
                return violated(format!("{count} sessions in the books, {}", worker.core.live()));
            }
        }
        if self.workers.iter().map(|worker| worker.core.live()).sum::<usize>() > SEATS {
            return violated("more sessions than seats".to_owned());
        }
        Ok(())
    }

    /// Everyone is silent for long enough: nothing may be left.
    fn wind_down(&mut self) -> Outcome {
        self.network.clear();
        for _ in 0..800 {
            self.now = self.now.plus(Duration::from_millis(100));
            self.expire();
        }
        for worker in &self.workers {
            let active: u64 = worker.metrics.backends.iter().map(|b| b.active.get()).sum();
            let counters = &worker.metrics.counters;
            let left = [
                worker.core.live() as u64,
                worker.shard.iter().count() as u64,
                active,
                counters.sessions_active.get(),
                counters.udp_pairs_resting.get(),
            ];
            if left != [0; 5] || worker.open.len() > 32 {
                return violated(format!("{left:?} and {} sockets are left", worker.open.len()));
            }
        }
        if !self.map.is_empty() {
            return violated("the affinity map is not empty".to_owned());
        }
        Ok(())
    }
}

/// One run. What came of it: replies delivered, sessions moved, flows that were found elsewhere, and
/// sessions and rests that gave way.
fn run(seed: u64, fault: Fault, pressure: Pressure) -> Result<[u64; 4], Violation> {
    let mut world = World::new(seed, fault, pressure);
    for step in 0..STEPS {
        let stepped = world.step();
        stepped.map_err(|Violation(what)| {
            Violation(format!("seed {seed}, {pressure:?}, step {step}: {what}"))
        })?;
    }
    let ended = world.wind_down();
    ended.map_err(|Violation(what)| Violation(format!("seed {seed}, at the end: {what}")))?;
    let gave_way = |worker: &Worker| {
        let counters = &worker.metrics.counters;
        counters.udp_sessions_displaced.get() + counters.udp_rests_cut_short.get()
    };
    let gave_way = world.workers.iter().map(gave_way).sum();
    Ok([world.model.delivered, world.model.moved, world.model.found, gave_way])
}

#[test]
fn no_seed_finds_a_violation() {
    // So few that it takes seconds; UDP_SIM_SEEDS=400 looks longer.
    let seeds = std::env::var("UDP_SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    for pressure in Pressure::ALL {
        let seeds: u64 = if pressure == Pressure::None { seeds } else { seeds.div_ceil(4) };
        let mut sums = [0; 4];
        for seed in 0..seeds {
            match run(seed, Fault::None, pressure) {
                Ok(counts) => (0..4).for_each(|place| sums[place] += counts[place]),
                Err(Violation(what)) => panic!("{what}"),
            }
        }
        eprintln!("{pressure:?}: {sums:?}");
        // A simulation in which nothing happens finds nothing.
        let [delivered, moved, found, gave_way] = sums;
        assert!(delivered > 500 * seeds && moved > 2 * seeds, "{pressure:?} {sums:?}");
        match pressure {
            Pressure::None => assert!(found > seeds, "{sums:?}"),
            _ => assert!(gave_way > 100 * seeds, "{pressure:?} {sums:?}"),
        }
    }
}

#[test]
fn every_planted_fault_is_found() {
    for (fault, said) in [
        (Fault::NoRest, "too early"),
        (Fault::DeafToSnapshots, "where nobody is registered"),
        (Fault::TrustsAnySender, "without being asked"),
        (Fault::NoAffinity, "has"),
        (Fault::NeverExpires, "does not end"),
        (Fault::NoSourceLimit, "too many sessions"),
        (Fault::ForgetsTheLocalAddress, ""),
        (Fault::MixesUpSockets, ""),
        (Fault::EvictsWhoWaits, ""),
        (Fault::EvictsWhoSpeaks, ""),
        (Fault::HandsOnTooEarly, "too early"),
        (Fault::MakesNoRoom, "found no room"),
    ] {
        let seeds = || (0..10).flat_map(|seed| Pressure::ALL.map(|pressure| (seed, pressure)));
        let found = seeds().filter_map(|(seed, pressure)| run(seed, fault, pressure).err());
        let mut of_its_kind = found.filter(|Violation(what)| what.contains(said));
        let Some(Violation(what)) = of_its_kind.next() else { panic!("{fault:?} was not found") };
        eprintln!("{fault:?}: {what}");
    }
}
