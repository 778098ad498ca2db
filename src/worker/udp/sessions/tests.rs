//! The life of a UDP session as a table of behaviour.

mod doors;
mod estate;
mod eviction;
mod handoff;
mod icmp;
mod lifecycle;
mod limits;
mod orders;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::sweeps::SWEEPS_MAX;
use super::*;
use crate::cluster::seats::Seats;
use crate::cluster::{Backend, Protocol, Snapshot, Standing, Terms};
use crate::metrics::WorkerMetrics;
use crate::session::SessionId;
use crate::session::shards::{SessionView, Shard};
use crate::worker::books::Parts;
use crate::worker::link::{Report, Shortage};

const SERVICE: ServiceId = ServiceId::built_in(Protocol::Udp);
const IDLE: Duration = Duration::from_secs(60);
const LOCAL: &str = "192.0.2.1:53";
const QUARANTINE: Duration = Duration::from_secs(120);

/// One worker's sessions with its books, at a point in time.
struct World {
    core: Sessions,
    books: Books,
    reports: rtrb::Consumer<Report>,
    metrics: Arc<WorkerMetrics>,
    shard: Arc<Shard>,
    seats: Arc<Seats>,
    now: Now,
}

fn settings() -> UdpSettings {
    UdpSettings {
        udp: Udp::default(),
        waits: Waits::default(),
        sessions: 100,
        share: 200,
        pairs: PairLimits { sockets: 200, quarantine: QUARANTINE, quarantined_max: 10_000 },
        sources: SourceLimits::default(),
        hasher: FlowHasher::new((1, 2)),
        seed: 3,
        affinity: None,
    }
}

fn world(change: impl FnOnce(&mut UdpSettings)) -> World {
    let mut settings = settings();
    change(&mut settings);
    let (writer, shard) = Shard::new(0, 1000);
    let (producer, reports) = rtrb::RingBuffer::new(1000);
    let metrics = Arc::new(WorkerMetrics::default());
    let seats = Arc::new(Seats::new(50));
    let mut books = Books::new(Parts {
        shard: writer,
        metrics: Arc::clone(&metrics),
        all_metrics: Arc::from([Arc::clone(&metrics)]),
        reports: producer,
        urgent: Arc::default(),
    });
    let now = Now::from_nanos(1_000_000_000);
    let terms = Terms { responses: settings.udp.responses, ..Terms::default() };
    let services = Snapshot::built_in(terms, |_| Arc::clone(&seats));
    books.adopt(Arc::new(idle_after(IDLE, services)));
    World { core: Sessions::new(settings, now), books, reports, metrics, shard, seats, now }
}

/// UDP sessions are over after a silence of `idle`; the other services' terms must not count here.
fn idle_after(idle: Duration, mut snapshot: Snapshot) -> Snapshot {
    for service in &mut snapshot.services {
        let own = service.id == SERVICE;
        service.terms.timeouts.udp_idle = if own { idle } else { Duration::from_millis(1) };
    }
    snapshot
}

/// A world with `count` backends: number 1 at 10.0.0.1, and so on.
fn with_backends(count: u32, change: impl FnOnce(&mut UdpSettings)) -> World {
    let mut world = world(change);
    let all: Vec<(u32, u8, Standing)> =
        (1..=count).map(|id| (id, id as u8, Standing::Serving)).collect();
    world.register(&all);
    world
}

fn backend_at(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 5300))
}

fn client(number: u16) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, (number >> 8) as u8], number))
}

impl World {
    /// Replaces the registered backends: identity, last byte of the address, standing.
    fn register(&mut self, all: &[(u32, u8, Standing)]) {
        let backends: Vec<Backend> = (all.iter())
            .map(|(id, host, standing)| Backend {
                proxy: false,
                http2: false,
                tls: None,
                id: BackendId(*id),
                slot: *id as u16,
                service: SERVICE,
                address: backend_at(*host),
                weight: 1,
                name: None,
                group: None,
                standing: *standing,
            })
            .collect();
        self.adopt(self.books.snapshot().with(&backends));
    }

    fn adopt(&mut self, snapshot: Snapshot) {
        let snapshot = Arc::new(snapshot);
        self.books.adopt(Arc::clone(&snapshot));
        self.core.adopt(&snapshot);
    }

    /// The settings are read again, with another idle time.
    fn reload(&mut self, idle: Duration) {
        self.adopt(idle_after(idle, self.books.snapshot().clone()));
    }

    fn grow_seats(&self, max: usize) {
        self.seats.set_max(max);
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now.plus(time);
        while self.now < until {
            let next = self.core.next_deadline().unwrap_or(until);
            self.now = next.max(self.now.plus(Duration::from_millis(1))).min(until);
            self.core.expire(self.now, &mut self.books);
            while self.core.next_surplus().is_some() {}
        }
    }

    fn up_load(&mut self, number: u16, segments: Segments) -> Up {
        loop {
            match self.core.up(self.now, origin(number), segments, &mut self.books) {
                Up::Open(socket) => self.core.opened(self.now, socket, true),
                other => return other,
            }
        }
    }

    /// Sends a byte; returns the socket it leaves by and the last byte of the backend it goes to.
    fn up(&mut self, number: u16) -> Result<(SocketId, u8), DropReason> {
        went(self.up_load(number, Segments::one(1)))
    }

    /// The same for a byte that another worker has handed off.
    fn handed_off(&mut self, number: u16) -> Result<(SocketId, u8), DropReason> {
        loop {
            let (origin, segments) = (origin(number), Segments::one(1));
            match self.core.handed_off(self.now, origin, segments, &mut self.books) {
                Up::Open(socket) => self.core.opened(self.now, socket, true),
                other => return went(other),
            }
        }
    }

    fn down(&mut self, socket: SocketId, host: u8) -> Result<(SocketAddr, SocketAddr), DropReason> {
        let from = backend_at(host);
        match self.core.down(self.now, socket, from, Segments::one(2), &mut self.books) {
            Down::Send { from, to, .. } => Ok((from, to)),
            Down::Drop(why) => Err(why),
        }
    }

    fn report_unreachable(&mut self, socket: SocketId, host: u8) {
        let errno = Errno::ECONNREFUSED;
        let sockets = [socket].into_iter();
        self.core.unreachable(self.now, sockets, backend_at(host), errno, &mut self.books);
    }

    fn order(&mut self, order: Order) {
        self.core.order(self.now, order, &mut self.books);
        self.pass(Duration::from_millis(100));
    }

    fn reports(&mut self) -> Vec<Report> {
        std::iter::from_fn(|| self.reports.pop().ok()).collect()
    }

    fn ends(&mut self) -> Vec<EndReason> {
        let reports = self.reports().into_iter();
        reports
            .filter_map(|r| if let Report::Ended(e) = r { Some(e.reason) } else { None })
            .collect()
    }

    fn sessions(&self) -> Vec<SessionView> {
        self.shard.iter().collect()
    }
}

fn went(up: Up) -> Result<(SocketId, u8), DropReason> {
    match up {
        Up::Send { from, to: SocketAddr::V4(to) } => Ok((from, to.ip().octets()[3])),
        Up::Drop(why) => Err(why),
        other => panic!("{other:?}"),
    }
}

/// A datagram of this user, at the door of the service that all tests but a few are about.
fn origin(number: u16) -> Origin {
    let door = DoorRef { place: 0, service: SERVICE };
    Origin { client: client(number), local: LOCAL.parse().unwrap(), door }
}

/// A flow as the affinity map knows it.
fn hash(number: u16) -> u64 {
    FlowHasher::new((1, 2)).flow(&FlowKey::new(client(number), LOCAL.parse().unwrap()))
}
