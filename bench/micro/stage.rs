//! A worker's core on a kernel that grants everything at once. Owns the sessions that the
//! benchmarks and the fixed scripts play; what they measure is the work of the core itself and of
//! its books.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lb::base::publish::Publisher;
use lb::base::time::Now;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Snapshot, Standing};
use lb::proxy::line::Features;
use lb::proxy::outlook::Outlook;
use lb::proxy::udp::PairLimits;
use lb::proxy::{self, Event, Received, Side};
use lb::ring::pool::{Class, Pool};
use lb::session::flows::{FlowHasher, Waits};
use lb::session::sources::SourceLimits;
use lb::worker::books::{Books, Parts};
use lb::worker::link::{ControlEnd, link};
use lb::worker::slots::Key;
use lb::worker::tcp::sessions::{Cmd, Cx, Sessions};
use lb::worker::udp::sessions as udp;

const SESSIONS: usize = 1_000;
const NOW: Now = Now::from_nanos(1_000_000_000);

pub struct Stage {
    core: Sessions,
    books: Books,
    pool: Pool,
    out: Vec<Cmd>,
    /// Kept so that reports have somewhere to go.
    _control: ControlEnd,
}

/// The books of a worker with three backends of a protocol, and the end that reports go to, which
/// must be kept.
fn books(protocol: Protocol) -> (Books, Arc<Snapshot>, ControlEnd) {
    let urgent = Arc::new(tokio::sync::Notify::new());
    let publisher = Publisher::new(Snapshot::default());
    let (control, end) =
        link(0, SESSIONS, publisher.subscribe(), Arc::clone(&urgent)).expect("an eventfd");
    let mut books = Books::new(Parts {
        shard: end.shard,
        metrics: Arc::clone(&end.metrics),
        all_metrics: Arc::from([end.metrics]),
        reports: end.reports,
        urgent,
    });
    let snapshot = Arc::new(snapshot(protocol, 3));
    books.adopt(Arc::clone(&snapshot));
    (books, snapshot, control)
}

impl Stage {
    pub fn new() -> Stage {
        let (books, _, control) = books(Protocol::Tcp);
        let features = Features { receive_cap: true, splice: false };
        let core = Sessions::new(features, NOW);
        Stage {
            core,
            books,
            pool: Pool::new(256, 16),
            out: Vec::with_capacity(64),
            _control: control,
        }
    }

    /// A user who is connected to a backend.
    pub fn session(&mut self) -> Key {
        let user: SocketAddr = ([192, 0, 2, 1], 1_000).into();
        let key = self
            .act(|core, cx| core.accepted(ServiceId::built_in(Protocol::Tcp), user, cx))
            .expect("a backend for the user");
        self.obey();
        key
    }

    /// Bytes arrive from one side, and the other takes them.
    pub fn bytes(&mut self, key: Key, side: Side, class: Class, bytes: &[u8]) {
        let mut buf = self.pool.take(class).expect("a free block");
        self.pool.append(&mut buf, bytes);
        let more = class == Class::Small;
        self.received(key, side, Received::Data(buf), more);
    }

    /// Both sides finish, and the session is over.
    pub fn finish(&mut self, key: Key) {
        for side in Side::BOTH {
            self.received(key, side, Received::End, false);
        }
        assert_eq!(self.core.live(), 0, "the session has ended");
    }

    fn received(&mut self, key: Key, side: Side, what: Received, more: bool) {
        let event = Event::Received { side, what, more, nonempty: false };
        self.relayed(key, event);
        self.obey();
    }

    fn act<T>(&mut self, what: impl FnOnce(&mut Sessions, &mut Cx<'_>) -> T) -> T {
        let Stage { core, books, pool, out, .. } = self;
        what(core, &mut Cx { now: NOW, pool, books, out })
    }

    fn relayed(&mut self, key: Key, event: Event) {
        self.act(|core, cx| core.relayed(key, event, cx));
    }

    /// Carries out the commands, and what follows from them.
    fn obey(&mut self) {
        let mut next = 0;
        while let Some(command) = self.out.get(next).copied() {
            next += 1;
            match command {
                Cmd::Connect { key, .. } => {
                    self.act(|core, cx| core.connected(key, Ok(()), cx));
                }
                Cmd::Relay { key, what: proxy::StreamCmd::Send { side, what } } => {
                    let bytes: usize = self.pool.pieces(what).map(<[u8]>::len).sum();
                    self.relayed(key, Event::Sent { side, result: Ok(bytes as u32) });
                }
                // Its peers have acknowledged everything.
                Cmd::Look { key } => {
                    self.act(|core, cx| core.told(key, [Outlook::default(); 2], cx));
                }
                _ => {}
            }
        }
        self.out.clear();
    }
}

/// The same for datagrams.
pub struct Datagrams {
    core: udp::Sessions,
    books: Books,
    _control: ControlEnd,
}

impl Datagrams {
    pub fn new() -> Datagrams {
        let (books, snapshot, control) = books(Protocol::Udp);
        let settings = udp::UdpSettings {
            udp: lb::config::Udp::default(),
            waits: Waits::default(),
            sessions: SESSIONS,
            share: SESSIONS,
            pairs: PairLimits {
                sockets: SESSIONS,
                quarantine: Duration::from_secs(120),
                quarantined_max: SESSIONS,
            },
            sources: SourceLimits::default(),
            hasher: FlowHasher::new((1, 2)),
            seed: 3,
            affinity: None,
        };
        let mut core = udp::Sessions::new(settings, NOW);
        core.adopt(&snapshot);
        Datagrams { core, books, _control: control }
    }

    /// A datagram from a user and the answer to it.
    pub fn round_trip(&mut self, user: SocketAddr, bytes: usize) {
        let local: SocketAddr = ([192, 0, 2, 9], 53).into();
        let door = udp::DoorRef { place: 0, service: ServiceId::built_in(Protocol::Udp) };
        let origin = udp::Origin { client: user, local, door };
        let load = udp::Segments::one(bytes);
        loop {
            match self.core.up(NOW, origin, load, &mut self.books) {
                udp::Up::Open(socket) => self.core.opened(NOW, socket, true),
                udp::Up::Send { from, to } => {
                    let down = self.core.down(NOW, from, to, load, &mut self.books);
                    assert_eq!(down, udp::Down::Send { door: 0, from: local, to: user });
                    return;
                }
                other => panic!("a datagram within all limits is sent on, not {other:?}"),
            }
        }
    }
}

/// Backends of one weight, in rotation.
pub fn snapshot(protocol: Protocol, count: u16) -> Snapshot {
    let backend = |place| Backend {
        proxy: false,
        http2: false,
        tls: None,
        id: BackendId(u32::from(place) + 1),
        slot: place,
        service: ServiceId::built_in(protocol),
        address: ([10, 0, (place >> 8) as u8, place as u8], 80).into(),
        weight: 1,
        name: None,
        group: None,
        standing: Standing::Serving,
    };
    let backends: Vec<_> = (0..count).map(backend).collect();
    let quiet = Snapshot { report_sessions: false, ..Snapshot::default() };
    quiet.with(&backends)
}
