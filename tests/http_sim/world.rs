//! One run: the API sessions of a worker between users, backends and a kernel, all of them
//! simulated. Owns time and the order of events, and checks at every step what must hold.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use lb::base::publish::Publisher;
use lb::base::time::Now;
use lb::cluster::seats::Seats;
use lb::cluster::{BackendId, Snapshot, Standing};
use lb::proxy::http::{GatewaySettings, Journal, Record};
use lb::proxy::line::Features;
use lb::proxy::outlook::Outlook;
use lb::proxy::{self, Intake, Side};
use lb::ring::pool::{Class, Pool};
use lb::session::EndReason;
use lb::worker::books::{Books, Parts};
use lb::worker::http::sessions::{Cmd, Conn, Cx, Sessions};
use lb::worker::link::{Order, link};
use nix::errno::Errno;

use crate::backend::{Peer, Seen};
use crate::client::Client;
use crate::dice::Dice;
use crate::services::{DOORWAY, backends, services};
use crate::weather::Weather;
use crate::wire::Wire;

const LARGE: usize = 64;
/// How many blocks the sessions keep back for the heads of a few connections, and which part of a
/// small pool.
const STOCK: usize = 32;
const STOCK_SHARE: usize = 8;
const STEPS_MAX: usize = 400_000;
/// In calm weather nothing takes longer to happen than the second look at a still connection, or a
/// user's own close.
const STILL_MAX: Duration = Duration::from_secs(7);

/// How soon an idle connection whose end went unnoticed is given up; every one is after four seconds.
const SPARE_STILL_MAX: Duration = Duration::from_millis(3_500);

/// What becomes of a connection attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Stands,
    Refused,
    Silent,
    /// There is no local port towards that backend.
    Portless,
}

#[derive(Clone, Default)]
struct Log {
    records: Rc<RefCell<Vec<(u64, u16)>>>,
    calm: bool,
}

impl Journal for Log {
    fn record(&mut self, record: &Record<'_>) {
        assert!(record.times.began <= record.times.read && record.times.read <= record.times.ended);
        let blamed = record.fault.is_some_and(|fault| fault.contains("backend"));
        assert!(!(self.calm && blamed), "a backend is blamed that did well: {record:?}");
        self.records.borrow_mut().push((u64::from(record.number), record.status));
    }
}

pub struct World {
    dice: Dice,
    weather: Weather,
    now: Now,
    /// When something last happened without waiting for it.
    moved: Now,
    pool: Pool,
    sessions: Sessions,
    out: Vec<Cmd>,
    wires: HashMap<Conn, Wire>,
    pub order: Vec<Conn>,
    connecting: HashMap<Conn, (Fate, bool)>,
    pub clients: HashMap<Conn, Client>,
    peers: HashMap<Conn, Peer>,
    seen: Seen,
    log: Log,
    books: Books,
    publisher: Publisher<Snapshot>,
    /// When the operator acts, in steps from the beginning.
    upheaval_in: Option<usize>,
    drained: bool,
    /// How often a connection was asked whether it takes more.
    pub asked: usize,
    _rest: Box<dyn std::any::Any>,
}

impl World {
    pub fn new(seed: u64, weather: Weather) -> World {
        let services = services(&weather, &Arc::new(Seats::new(weather.seats)));
        let publisher = Publisher::new(services.with(&backends(&weather)));
        let (control, end) =
            link(0, 1000, publisher.subscribe(), Arc::default()).expect("an eventfd can be had");
        let mut books = Books::new(Parts {
            shard: end.shard,
            metrics: Arc::clone(&end.metrics),
            all_metrics: Arc::new([Arc::clone(&end.metrics)]),
            reports: end.reports,
            urgent: end.urgent,
        });
        books.adopt(publisher.current());
        let settings = GatewaySettings {
            via: "sim".to_string(),
            held_bytes_max: weather.held_max,
            ..GatewaySettings::default()
        };
        let log = Log { calm: weather.calm, ..Log::default() };
        let features = Features { receive_cap: weather.receive_cap, splice: true };
        let now = Now::from_nanos(1_000_000_000);
        let journal = Box::new(log.clone());
        let mut sessions = Sessions::new(settings, features, journal, now);
        let mut pool = Pool::new(weather.small_blocks, LARGE);
        sessions.start(&mut pool);
        let mut dice = Dice::new(seed);
        let upheaval_in = weather.upheaval.then(|| 20 + dice.some(20_000));
        World {
            dice,
            books,
            publisher,
            upheaval_in,
            drained: false,
            asked: 0,
            weather,
            now,
            moved: now,
            pool,
            sessions,
            out: Vec::new(),
            wires: HashMap::new(),
            order: Vec::new(),
            connecting: HashMap::new(),
            clients: HashMap::new(),
            peers: HashMap::new(),
            seen: Seen::default(),
            log,
            _rest: Box::new((control, end.orders)),
        }
    }

    fn act<T>(&mut self, what: impl FnOnce(&mut Sessions, &mut Cx<'_>) -> T) -> T {
        let World { sessions, now, pool, books, out, .. } = self;
        what(sessions, &mut Cx { now: *now, pool, books, out })
    }

    pub fn run(&mut self) {
        let mut next_id = 1;
        for _ in 0..self.weather.clients {
            self.arrive(&mut next_id);
        }
        let mut quiet = 0;
        for _ in 0..STEPS_MAX {
            if self.clients.values().all(|client| client.ended.is_some()) {
                return self.finish();
            }
            if self.step() {
                (quiet, self.moved) = (0, self.now);
            } else {
                quiet += 1;
            }
            // Picks are random. After this many, each that can move has been picked; if most are
            // still, it takes many picks in vain to know that all are.
            let picks = if self.weather.stalled { 100 } else { 16 };
            if quiet > 60 + self.order.len() * picks {
                self.wait();
                quiet = 0;
            }
        }
        panic!("stuck, still for {:?}: {:?}", self.now.since(self.moved), self.stuck());
    }

    fn stuck(&self) -> Vec<String> {
        let about = |(conn, client): (&Conn, &Client)| {
            let Client { manner, answered, requests, .. } = client;
            format!("{conn:?} {manner:?} {answered}/{} {:?}", requests.len(), client.waits_for())
        };
        self.clients.iter().filter(|(_, one)| one.ended.is_none()).map(about).collect()
    }

    pub fn arrive(&mut self, next_id: &mut u64) {
        let place = self.clients.len();
        let client = Client::arriving(&self.weather, next_id, place, &mut self.dice);
        let from = SocketAddr::from(([192, 0, 2, 1], 40_000 + self.order.len() as u16));
        let key = self.act(|sessions, cx| sessions.accepted(DOORWAY, from, cx));
        let conn = Conn::User(key);
        self.wires.insert(conn, Wire::new(Side::Client));
        self.order.push(conn);
        self.clients.insert(conn, client);
        self.execute();
    }

    /// The operator does something.
    fn upheave(&mut self) {
        let backend = BackendId(self.dice.below(self.weather.backends) as u32);
        let kind = if self.weather.calm { 0 } else { self.dice.below(4) };
        let order = match kind {
            0 => Order::Drain,
            1 => Order::EndBackend { backend, reason: EndReason::BackendLeft },
            2 => Order::Stop,
            _ => return self.publish_leaving(backend),
        };
        self.drained |= order == Order::Drain;
        self.act(|sessions, cx| sessions.order(order, cx));
        self.execute();
    }

    /// A backend takes no new requests.
    fn publish_leaving(&mut self, leaving: BackendId) {
        let mut backends = backends(&self.weather);
        backends[leaving.0 as usize].standing = Standing::Draining;
        self.publisher.publish(self.publisher.current().with(&backends));
        self.books.adopt(self.publisher.current());
    }

    /// Something happens somewhere; returns whether anything did.
    pub fn step(&mut self) -> bool {
        match &mut self.upheaval_in {
            Some(0) => {
                self.upheaval_in = None;
                self.upheave();
            }
            Some(left) => *left -= 1,
            None => {}
        }
        if self.order.is_empty() {
            return false;
        }
        if self.sessions.is_starved() && self.dice.one_in(4) {
            self.act(|sessions, cx| sessions.relieve(cx));
            self.execute();
        }
        if self.dice.one_in(50) {
            self.now = self.now.plus(Duration::from_micros(self.dice.below(20_000) as u64));
            self.expire();
            if self.order.is_empty() {
                return true;
            }
        }
        let conn = self.order[self.dice.below(self.order.len())];
        if self.connecting.contains_key(&conn) {
            return self.step_connect(conn);
        }
        match self.dice.below(4) {
            0 => self.step_peer(conn),
            1 => self.step_receive(conn),
            2 => self.step_room(conn),
            _ => self.step_send(conn),
        }
    }

    fn step_peer(&mut self, conn: Conn) -> bool {
        let Some(wire) = self.wires.get_mut(&conn) else { return false };
        let dice = &mut self.dice;
        match (self.clients.get_mut(&conn), self.peers.get_mut(&conn)) {
            (Some(client), _) => client.turn(wire, dice),
            (_, Some(peer)) => peer.step(wire, &mut self.seen, self.weather.calm, dice),
            _ => false,
        }
    }

    fn step_receive(&mut self, conn: Conn) -> bool {
        let Some(wire) = self.wires.get_mut(&conn) else { return false };
        let Some(event) = wire.receive(&mut self.pool, &mut self.dice) else { return false };
        if let Some(peer) = self.peers.get(&conn) {
            peer.was_heard(wire, &mut self.seen);
        }
        self.act(|sessions, cx| sessions.happened(conn, event, cx));
        assert!(self.sessions.held() <= self.weather.held_max, "heads take up too much");
        self.execute();
        true
    }

    fn step_room(&mut self, conn: Conn) -> bool {
        let Some(wire) = self.wires.get_mut(&conn) else { return false };
        let Some(event) = wire.answer_room() else { return false };
        self.act(|sessions, cx| sessions.happened(conn, event, cx));
        self.execute();
        true
    }

    fn step_send(&mut self, conn: Conn) -> bool {
        let Some(wire) = self.wires.get_mut(&conn) else { return false };
        let Some(event) = wire.complete_send(&self.pool, &mut self.dice) else { return false };
        self.act(|sessions, cx| sessions.happened(conn, event, cx));
        self.execute();
        true
    }

    fn step_connect(&mut self, conn: Conn) -> bool {
        let (fate, cancelled) = self.connecting[&conn];
        let result = match (fate, cancelled) {
            (Fate::Stands, false) => Ok(()),
            (Fate::Stands, true) if self.dice.one_in(2) => Ok(()),
            (Fate::Refused, _) => Err(Errno::ECONNREFUSED),
            (Fate::Portless, _) => Err(Errno::EADDRNOTAVAIL),
            (_, true) => Err(Errno::ECANCELED),
            (Fate::Silent, false) => return false,
        };
        self.connecting.remove(&conn);
        let Conn::Link(link) = conn else { panic!("only links are connected") };
        self.act(|sessions, cx| sessions.connected(link, result, cx));
        self.execute();
        true
    }

    /// Nothing moves any more: lets time pass until something is due.
    pub fn wait(&mut self) {
        let mut here = self.clients.values().filter(|client| client.ended.is_none()).peekable();
        let deaf = here.peek().is_some() && here.all(Client::is_deaf);
        let due = self.sessions.next_deadline();
        // A tunnel may be still for an hour, in which its send queue is looked at repeatedly.
        let more = Duration::from_millis(if deaf { 60_000 } else { 20 });
        let later = due.unwrap_or(self.now).max(self.now).plus(more);
        self.now = later;
        let waiting = self.clients.values().any(|client| client.ended.is_none()) && !deaf;
        if self.weather.calm && waiting {
            assert!(later.since(self.moved) < STILL_MAX, "all is still: {:?}", self.stuck());
        }
        self.expire();
    }

    fn expire(&mut self) {
        self.act(|sessions, cx| sessions.expire(cx));
        self.execute();
    }

    fn execute(&mut self) {
        let mut next = 0;
        while let Some(command) = self.out.get(next).copied() {
            next += 1;
            match command {
                Cmd::Connect { link, to } => self.connect(Conn::Link(link), to),
                Cmd::CancelConnect { link } => {
                    if let Some((_, cancelled)) = self.connecting.get_mut(&Conn::Link(link)) {
                        *cancelled = true;
                    }
                }
                Cmd::Look { conn } => {
                    // A socket that could not be opened cannot be looked at.
                    let wire = self.wires.get(&conn);
                    let outlook = wire.map_or_else(Outlook::default, Wire::outlook);
                    self.act(|sessions, cx| sessions.told(conn, outlook, cx));
                }
                Cmd::Wire { conn, what } => self.operate(conn, what),
                Cmd::Close { conn, reset } => self.close(conn, reset),
            }
        }
        self.out.clear();
        let held = self.weather.small_blocks - self.pool.free(Class::Small);
        let lines = self.order.len().max(self.sessions.live());
        let bound = STOCK + lines * 2 * (16 + 20);
        assert!(held <= bound, "{held} blocks held for {lines} connections");
    }

    fn connect(&mut self, conn: Conn, to: SocketAddr) {
        let fate = match self.dice.below(24) {
            0 if !self.weather.calm => Fate::Refused,
            1 if !self.weather.calm => Fate::Silent,
            // Another backend has one, so that no user notices.
            2..12 if to.port() == 9000 && self.weather.backends > self.weather.services => {
                Fate::Portless
            }
            _ => Fate::Stands,
        };
        self.wires.insert(conn, Wire::new(Side::Backend));
        self.peers.insert(conn, Peer::at(&self.weather, to));
        self.connecting.insert(conn, (fate, false));
        self.order.push(conn);
    }

    /// While blocks are scarce, none may be asked for before its bytes have somewhere to go.
    fn hold_to_sparing(&self, conn: Conn, how: Intake) {
        let dear = match how {
            Intake::Once { class, .. } => class == Class::Small && self.pool.is_scarce(),
            // Was asked for when there were more.
            Intake::Many { .. } => false,
            Intake::Last { .. } => true,
        };
        let user = self.peers.get(&conn).and_then(Peer::answers).filter(|_| dear);
        let whose = |(conn, one): &(&Conn, &Client)| {
            one.requests.first().is_some_and(|first| Some(first.user) == user)
                && self.wires.contains_key(conn)
        };
        if let Some((to, _)) = self.clients.iter().find(whose) {
            assert!(self.wires[to].is_roomy(), "{conn:?} is read for {to:?}, who takes nothing");
        }
    }

    fn operate(&mut self, conn: Conn, what: proxy::StreamCmd) {
        if let proxy::StreamCmd::Receive { how, .. } = what {
            self.hold_to_sparing(conn, how);
        }
        let wire = self.wires.get_mut(&conn).expect("an operation on an open socket");
        assert!(!self.connecting.contains_key(&conn), "{what:?} before the connection stands");
        match what {
            proxy::StreamCmd::Receive { side, how } => {
                assert_eq!(side, wire.side);
                wire.arm(how);
            }
            proxy::StreamCmd::CancelReceive { .. } => wire.cancel_receive(),
            proxy::StreamCmd::Send { side, what } => {
                assert_eq!(side, wire.side);
                wire.send(what);
            }
            proxy::StreamCmd::CancelSend { .. } => wire.cancel_send(),
            proxy::StreamCmd::AwaitRoom { .. } => {
                self.asked += 1;
                wire.await_room();
            }
            proxy::StreamCmd::CancelRoom { .. } => wire.cancel_room(),
            proxy::StreamCmd::FinishWriting { .. } => wire.finish_writing(),
            proxy::StreamCmd::Splice { .. }
            | proxy::StreamCmd::CancelSplice { .. }
            | proxy::StreamCmd::EndSplice { .. } => panic!("a gateway splices nothing"),
        }
    }

    fn close(&mut self, conn: Conn, reset: bool) {
        let mut wire = self.wires.remove(&conn).expect("an open socket is closed");
        let reads = self.clients.get(&conn).is_none_or(Client::reads);
        let queued = wire.outlook();
        let lost = reset && reads && !self.weather.upheaval && !queued.dead && queued.queued > 0;
        let manner = self.clients.get(&conn).map(|one| one.manner);
        assert!(!lost, "a reset overtakes {} bytes on {conn:?}, {manner:?}", queued.queued);
        wire.close(reset);
        assert!(!self.connecting.contains_key(&conn), "closed while being connected");
        if let Conn::User(_) = conn {
            let client = self.clients.get_mut(&conn).expect("a user's socket has a user");
            // It still reads what is there, unless it reads nothing.
            for _ in 0..1000 {
                client.step(&mut wire, &mut self.dice);
            }
            client.ended.get_or_insert(wire.outward_end);
            self.settle_account(conn);
        }
        self.forget(conn);
    }

    fn forget(&mut self, conn: Conn) {
        self.order.retain(|other| *other != conn);
        self.wires.remove(&conn);
        self.peers.remove(&conn);
    }

    /// Compares what a departed user received with what it was owed.
    fn settle_account(&mut self, conn: Conn) {
        let client = self.clients.remove(&conn).expect("a user's socket has a user");
        for request in client.requests.iter().filter(|_| !self.weather.noisy) {
            let heads = self.seen.heads.get(&request.id).copied().unwrap_or(0);
            let most = if request.idempotent() { 3 } else { 1 };
            assert!(heads <= most, "{request:?} was sent {heads} times");
        }
        client.hold_to_account(&self.weather, self.drained);
        // Kept for the count at the end; another generation may use its place again.
        self.clients.insert(conn, client);
    }

    /// Everyone has gone: nothing may be left.
    pub fn finish(&mut self) {
        let all_gone = self.now;
        for _ in 0..STEPS_MAX {
            if self.sessions.live() == 0 {
                break;
            }
            let moved = !self.order.is_empty() && (0..20).any(|_| self.step());
            if !moved {
                self.wait();
            }
            // What is left waits for a request that will never come.
            let spares = self.sessions.spares() == self.sessions.live();
            let still = spares && self.now.since(all_gone) > SPARE_STILL_MAX;
            let noticed = !still || !self.wires.values().any(Wire::is_asleep);
            assert!(noticed, "a connection is kept that has ended");
        }
        assert_eq!((self.sessions.live(), self.sessions.spares()), (0, 0));
        assert_eq!((self.sessions.held(), self.sessions.private()), (0, 0));
        assert!(self.wires.values().all(Wire::idle));
        let inside = self.books.snapshot().services.iter().map(|service| service.gate.sessions());
        assert!(inside.clone().all(|count| count == 0), "{:?}", inside.collect::<Vec<_>>());
        let free = (self.pool.free(Class::Small), self.pool.free(Class::Large));
        let kept = STOCK.min(self.weather.small_blocks / STOCK_SHARE);
        assert_eq!(free, (self.weather.small_blocks - kept, LARGE), "blocks were lost");
        let served: usize = self.clients.values().map(|client| client.answered).sum();
        let logged = self.log.records.borrow().len();
        assert!(logged >= served, "{logged} records for {served} answers");
    }
}
