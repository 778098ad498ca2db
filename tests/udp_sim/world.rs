//! Two workers' cores with their books, the backends that register, and the network between them.
//! Owns the clock and the order in which things happen.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::seats::Seats;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Snapshot, Standing, Terms};
use lb::metrics::WorkerMetrics;
use lb::proxy::udp::SocketId;
use lb::session::affinity::Affinity;
use lb::session::shards::Shard;
use lb::worker::books::{Books, Parts};
use lb::worker::link::Report;
use lb::worker::udp::sessions::Sessions;

use crate::model::{Descriptor, Flow, Model};
use crate::plan::{FLOOD, Fault, Pressure, SEATS, SESSIONS, WORKERS, settings};

#[derive(Debug)]
pub struct Violation(pub String);

pub type Outcome = Result<(), Violation>;

pub fn violated<T>(what: String) -> Result<T, Violation> {
    Err(Violation(what))
}

/// xorshift64* (S. Vigna, ACM TOMS 2016).
pub struct Random(u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    pub fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

pub struct Worker {
    pub core: Sessions,
    pub books: Books,
    pub reports: rtrb::Consumer<Report>,
    pub metrics: Arc<WorkerMetrics>,
    pub shard: Arc<Shard>,
    pub open: HashMap<SocketId, u64>,
    /// How many datagrams from users it has received.
    pub offered: u64,
    pub avoided_until: HashMap<SocketAddr, Now>,
    /// Addresses that ICMP has reported once, and from which nothing has arrived since.
    pub suspected: HashSet<SocketAddr>,
}

pub struct Registered {
    pub address: SocketAddr,
    pub standing: Standing,
    /// Whether anything answers at the address.
    pub alive: bool,
}

/// What is in flight to a worker.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub enum Arrival {
    /// A reply to this flow.
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

pub struct World {
    pub random: Random,
    pub fault: Fault,
    pub pressure: Pressure,
    pub now: Now,
    pub workers: Vec<Worker>,
    pub map: Arc<Affinity>,
    pub backends: BTreeMap<u32, Registered>,
    pub next_backend: u32,
    pub next_descriptor: u64,
    pub snapshot: Arc<Snapshot>,
    pub network: BinaryHeap<Reverse<(Now, u64, Arrival)>>,
    pub arrivals: u64,
    /// Decides which worker the kernel delivers a flow to.
    pub grouping: u64,
    pub sockets_fail_until: Now,
    pub model: Model,
    /// By worker: when `idle_at` was last asked, and what it found.
    pub idle: [(Now, Vec<SocketAddr>); WORKERS],
}

pub fn host(number: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, number as u8], 53))
}

pub fn user(number: u64) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, (number / 5) as u8], 1000 + number as u16))
}

pub fn local(number: u64) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1 + number as u8], 8082))
}

pub fn is_of_flood(flow: Flow) -> bool {
    matches!(flow.0.ip(), IpAddr::V4(v4) if v4.octets()[0] == FLOOD)
}

/// The UDP service, whose sessions end under this pressure as they would. The others have no seats and no patience.
fn services(pressure: Pressure, seats: &Arc<Seats>) -> Snapshot {
    let mut snapshot = Snapshot::built_in(Terms::default(), |protocol| match protocol {
        Protocol::Udp => Arc::clone(seats),
        _ => Arc::new(Seats::new(0)),
    });
    for service in &mut snapshot.services {
        let own = service.kind == Protocol::Udp;
        service.terms.responses = NonZeroU32::new(u32::from(pressure == Pressure::Answers));
        service.terms.timeouts.udp_idle =
            if own { pressure.idle() } else { Duration::from_millis(1) };
    }
    snapshot
}

impl World {
    pub fn new(seed: u64, fault: Fault, pressure: Pressure) -> World {
        let now = Now::from_nanos(5_000_000_000);
        let map = Arc::new(Affinity::new(WORKERS * SESSIONS));
        let seats = Arc::new(Seats::new(SEATS));
        let snapshot = Arc::new(services(pressure, &seats));
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
                    avoided_until: HashMap::new(),
                    suspected: HashSet::new(),
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

    pub fn step(&mut self) -> Outcome {
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
                proxy: false,
                http2: false,
                tls: None,
                id: BackendId(*id),
                slot: (*id % 512) as u16,
                service: ServiceId::built_in(Protocol::Udp),
                address: backend.address,
                weight: 1,
                name: None,
                group: None,
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

    pub fn any_backend(&mut self) -> Option<u32> {
        let which = self.random.below(self.backends.len().max(1) as u64) as usize;
        self.backends.keys().nth(which).copied()
    }

    /// A backend registers, often at an address known before.
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

    pub fn worker_of(&self, flow: Flow) -> usize {
        let number = u64::from(flow.0.port()).wrapping_mul(0x9e37_79b9) ^ self.grouping;
        (number.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as usize % WORKERS
    }

    pub fn expire(&mut self) {
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
}
