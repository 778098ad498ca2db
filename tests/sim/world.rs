//! One run: the core between peers, network and ring, all of them simulated. Owns time and the
//! order of events, and plays the shell: completions become events, commands become operations, as
//! in `worker::shell`.

mod commands;
mod freezes;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use lb::base::publish::Publisher;
use lb::base::time::Now;
use lb::cluster::seats::Seats;
use lb::cluster::{Protocol, ServiceId, Snapshot, Terms};
use lb::proxy::line::Features;
use lb::proxy::{self, Event, Side, Spliced};
use lb::ring::pool::{Class, Pool};
use lb::session::EndReason;
use lb::worker::books::{Books, Parts};
use lb::worker::link::{Order, WorkerEnd, link};
use lb::worker::slots::Key;
use lb::worker::tcp::sessions::{Cmd, Cx, Sessions};

use super::control::Control;
use super::kernel::{Around, Done, Kernel, Kind, Outcome};
use super::law::{self, check};
use super::laws::{Fate, Laws};
use super::net::{Conn, Read};
use super::peer::{End, Habits, Peer, Script};
use super::pipes::Pipes;
use super::plan::{Plan, Weather};
use super::random::Random;
use freezes::Frost;

/// Every run must be over by then: it is all timeouts in a row, several times.
const LAST_MOMENT: Now = Now::from_nanos(3_600_000_000_000);
/// Limit on turns without rest; what is in flight is bounded, so a run that needs more spins.
const BUSY_TURNS_MAX: u32 = 50_000;

/// A user, and what the session is about.
struct User {
    arrives_at: Now,
    script: Script,
    habits: Habits,
}

/// The result of a run.
#[derive(Debug)]
pub struct Story {
    pub fates: Vec<Fate>,
    pub turns: u32,
    /// Derived from all completions and their times: two runs of one seed have the same.
    pub mark: u64,
    pub starved: u64,
    /// Bytes that went through pipes.
    pub spliced: u64,
    /// How often the worker stood still.
    pub stills: u64,
}

pub struct World {
    plan: Plan,
    random: Random,
    now: Now,
    core: Sessions,
    books: Books,
    control: Control,
    worker: WorkerRest,
    seats: Arc<Seats>,
    pool: Pool,
    kernel: Kernel,
    pipes: Pipes,
    conns: Vec<Conn>,
    /// Connections that are not over.
    moving: Vec<usize>,
    peers: Vec<Peer>,
    /// Peers that have not gone.
    present: Vec<usize>,
    users: Vec<User>,
    /// By the session's place and side, as the shell keeps its sockets.
    sockets: Vec<[Option<usize>; 2]>,
    laws: Laws,
    commands: Vec<Cmd>,
    arrived: usize,
    turns: u32,
    mark: u64,
    starved: u64,
    spliced: u64,
    frost: Option<Frost>,
    /// When the next freeze may begin.
    freezes_at: Now,
    stills: u64,
    traced: bool,
}

/// What the shell keeps of the worker's end of the link.
struct WorkerRest {
    snapshots: lb::base::publish::Subscriber<Snapshot>,
    orders: rtrb::Consumer<Order>,
}

/// Runs one seed to its end, or to the first broken law.
pub fn run(weather: Weather, seed: u64, traced: bool) -> Story {
    let mut random = Random::new(seed ^ (weather as u64) << 56);
    let plan = Plan::draw(weather, &mut random);
    run_plan(plan, random, traced)
}

/// The same for a day that was planned by hand.
pub fn run_plan(plan: Plan, random: Random, traced: bool) -> Story {
    let mut world = World::new(plan, random, traced);
    world.live();
    world.end()
}

/// The TCP service on these terms. Mistaking another for it would show: those have no seats and no
/// patience.
fn services(terms: Terms, seats: &Arc<Seats>) -> Snapshot {
    let mut snapshot = Snapshot::built_in(terms, |protocol| match protocol {
        Protocol::Tcp => Arc::clone(seats),
        _ => Arc::new(Seats::new(0)),
    });
    for service in snapshot.services.iter_mut().filter(|it| it.kind != Protocol::Tcp) {
        let hasty = Duration::from_nanos(1);
        let timeouts = &mut service.terms.timeouts;
        (timeouts.connect, timeouts.tcp_idle, timeouts.half_close) = (hasty, hasty, hasty);
    }
    snapshot
}

impl World {
    fn new(plan: Plan, mut random: Random, traced: bool) -> World {
        let seats = Arc::new(Seats::new(plan.seats));
        let terms = Terms { policy: plan.policy, timeouts: plan.timeouts, ..Terms::default() };
        let publisher = Publisher::new(services(terms, &seats));
        let urgent = Arc::new(tokio::sync::Notify::new());
        let (control, worker) = link(0, plan.seats, publisher.subscribe(), Arc::clone(&urgent))
            .expect("a process has descriptors to spare");
        let pool = Pool::new(plan.small_blocks, plan.large_blocks);
        let temper = plan.temper;
        let kernel_random = Random::new(random.next());
        let kernel = Kernel::new(temper, kernel_random, &pool, plan.posted_first);
        let WorkerEnd { snapshots, orders, reports, metrics, shard, .. } = worker;
        let books = Books::new(Parts {
            shard,
            metrics: Arc::clone(&metrics),
            all_metrics: Arc::from([metrics]),
            reports,
            urgent,
        });
        let features = Features { receive_cap: plan.receive_cap, splice: plan.splice };
        let now = Now::from_nanos(1_000_000_000);
        let users = (0..plan.users).map(|_| User::draw(&plan, now, &mut random)).collect();
        let world = World {
            core: Sessions::new(features, now),
            books,
            control: Control::new(&plan, control, publisher, now, &mut random),
            worker: WorkerRest { snapshots, orders },
            seats,
            pool,
            kernel,
            pipes: Pipes::new(plan.pipes),
            conns: Vec::new(),
            moving: Vec::new(),
            peers: Vec::new(),
            present: Vec::new(),
            users,
            sockets: Vec::new(),
            laws: Laws::new(plan.timeouts, plan.users),
            commands: Vec::new(),
            arrived: 0,
            turns: 0,
            mark: 0,
            starved: 0,
            spliced: 0,
            frost: None,
            freezes_at: now,
            stills: 0,
            traced,
            plan,
            random,
            now,
        };
        world.trace(|world| format!("{:?}", world.plan));
        world
    }

    fn live(&mut self) {
        let mut busy_turns = 0;
        loop {
            if self.turn() {
                busy_turns += 1;
                check(busy_turns < BUSY_TURNS_MAX, law::SPIN, || format!("at {:?}", self.now));
                self.now = self.now.plus(self.random.any_time(Duration::from_millis(1)));
                continue;
            }
            busy_turns = 0;
            self.laws.at_rest(self.now, &self.pool, &self.kernel, &self.pipes, &self.conns);
            let Some(next) = self.next_moment() else { break };
            check(next < LAST_MOMENT, law::PROGRESS, || {
                format!("{} sessions are still there", self.core.live())
            });
            let late = self.random.any_time(Duration::from_millis(3));
            self.now = self.now.max(next).plus(late);
        }
        check(self.core.live() == 0, law::WAKE, || {
            format!("{} sessions wait for nothing", self.core.live())
        });
    }

    /// One turn of everything; false if all is still until some time passes.
    fn turn(&mut self) -> bool {
        self.turns += 1;
        let mut moved = self.control.act(self.now, &mut self.random);
        moved |= self.arrive();
        moved |= self.move_people();
        moved |= !self.kernel.is_idle();
        moved |= self.run_kernel();
        let most = 1 + self.random.below(1 + self.kernel.completions() as u64) as usize;
        let done: Vec<Done> = self.kernel.reap(most).collect();
        moved |= !done.is_empty();
        for done in done {
            self.complete(done);
        }
        moved |= self.freeze();
        moved |= self.housekeep();
        self.laws.turn_ends(self.now, &self.pool, &self.kernel, &self.pipes);
        self.check_books();
        moved || !self.kernel.is_idle()
    }

    fn move_people(&mut self) -> bool {
        let mut moved = false;
        for conn in &self.moving {
            moved |= self.conns[*conn].travel(self.now, &mut self.random);
        }
        for peer in &self.present {
            let peer = &mut self.peers[*peer];
            moved |= peer.act(self.now, &mut self.conns[peer.conn], &mut self.random);
        }
        if self.turns.is_multiple_of(16) {
            self.moving.retain(|conn| !self.conns[*conn].is_over());
            self.present.retain(|peer| !self.peers[*peer].gone);
        }
        moved
    }

    fn run_kernel(&mut self) -> bool {
        let mut around = Around { now: self.now, pool: &mut self.pool, conns: &mut self.conns };
        self.kernel.enter(&mut around);
        let able = self.kernel.run(&mut around);
        for conn in std::mem::take(&mut self.kernel.established) {
            self.answer_backend(conn);
        }
        able
    }

    fn next_moment(&mut self) -> Option<Now> {
        let conns = &self.conns;
        let present = self.present.iter().map(|peer| &self.peers[*peer]);
        let peers = present.filter_map(|peer| peer.next_at(&conns[peer.conn])).min();
        let moving = self.moving.iter().map(|conn| &conns[*conn]);
        let given_up = moving.filter_map(|conn| conn.gives_up_at());
        let arrival = self.users.get(self.arrived).map(|user| user.arrives_at);
        let act = self.control.next_at();
        let core = self.core.next_deadline();
        let answer = self.kernel.next_answer();
        let step = self.pipes.next_at();
        let thaw = self.frost.as_ref().map(|frost| frost.next_at());
        let (core, step) = if thaw.is_some() { (None, None) } else { (core, step) };
        let all = [peers, given_up.min(), arrival, act, core, answer, step, thaw];
        all.into_iter().flatten().min()
    }

    /// Users whose time has come.
    fn arrive(&mut self) -> bool {
        let mut moved = false;
        while !self.control.stopping
            && self.users.get(self.arrived).is_some_and(|user| self.now >= user.arrives_at)
        {
            let number = self.arrived;
            self.arrived += 1;
            moved = true;
            self.welcome(number);
        }
        if self.control.stopping {
            self.arrived = self.users.len();
        }
        moved
    }

    fn welcome(&mut self, number: usize) {
        self.laws.fates[number].arrived = true;
        let conn = self.connection(number, Side::Client);
        let user = &self.users[number];
        let peer = Peer::new(conn, Side::Client, user.script, user.habits, self.now);
        self.enters(peer);
        let full = self.seats.taken() >= self.seats.max();
        let (service, is_frozen) = (ServiceId::built_in(Protocol::Tcp), self.frost.is_some());
        let client = address_of(number);
        let accepted = self.act(|core, cx| match is_frozen {
            true => core.seat(service, client.into(), cx),
            false => core.accepted(service, client, cx),
        });
        self.trace(|_| format!("user {number} arrives: {accepted:?}"));
        let Some(key) = accepted else {
            self.laws.turned_away(number, full);
            self.take_reports();
            return self.conns[conn].close(false);
        };
        self.laws.accepted(self.now, key, number, conn);
        if self.frost.is_some() {
            let view = self.control.end.shard.read(key.place);
            self.laws.holds(key, view.and_then(|view| view.backend));
        }
        let place = key.place as usize;
        if self.sockets.len() <= place {
            self.sockets.resize(place + 1, [None; 2]);
        }
        self.sockets[place][Side::Client as usize] = Some(conn);
        self.take_reports();
        self.execute();
    }

    fn connection(&mut self, user: usize, side: Side) -> usize {
        // Nobody needs thousands of turns per session.
        let script = self.users[user].script;
        let [window_in, window_out] = [side, side.other()]
            .map(|from| self.plan.window(&mut self.random).max(script.total(from) / 24));
        self.conns.push(Conn::new(user, side, window_in, window_out));
        self.moving.push(self.conns.len() - 1);
        self.conns.len() - 1
    }

    fn enters(&mut self, peer: Peer) {
        self.present.push(self.peers.len());
        self.peers.push(peer);
    }

    /// A backend has accepted: it may speak at once.
    fn answer_backend(&mut self, conn: usize) {
        let user = &self.users[self.conns[conn].user];
        let most = user.script.total(Side::Client).max(user.script.total(Side::Backend));
        let mut habits = self.plan.habits(&mut self.random, most);
        if user.habits.end == End::Last {
            // If both waited for the other to finish, they would wait for ever.
            habits.end = if habits.end == End::Never { End::Never } else { End::First };
        }
        let diligent = habits.are_diligent() && user.habits.are_diligent();
        let number = self.conns[conn].user;
        if let Some(session) = self.laws.sessions.values_mut().find(|live| live.user == number) {
            session.diligent = diligent;
        }
        let peer = Peer::new(conn, Side::Backend, user.script, habits, self.now);
        self.enters(peer);
    }

    fn act<T>(&mut self, what: impl FnOnce(&mut Sessions, &mut Cx<'_>) -> T) -> T {
        let World { core, books, pool, now, commands, .. } = self;
        what(core, &mut Cx { now: *now, pool, books, out: commands })
    }

    fn complete(&mut self, done: Done) {
        let Done { tag, outcome } = done;
        let key = tag.key;
        self.mark = Random::new(self.mark ^ self.now.nanos() ^ u64::from(key.place)).next();
        self.trace(|_| format!("done {tag:?} {outcome:?}"));
        let now = self.now;
        match (tag.kind, outcome) {
            (Kind::Receive(side), Outcome::Received { what, more, nonempty }) => {
                self.starved += u64::from(matches!(what, proxy::Received::NoBuffers));
                self.laws.received(now, key, side, &what, more);
                self.happened(key, Event::Received { side, what, more, nonempty });
            }
            (Kind::Send(side), Outcome::Sent(result)) => {
                self.laws.sent(now, key, side, result);
                self.happened(key, Event::Sent { side, result });
            }
            (Kind::Connect, Outcome::Connected(result)) => {
                self.laws.connected(now, key, result, false);
                let is_frozen = self.frost.is_some();
                self.act(|core, cx| match is_frozen {
                    true => core.recalled(key, result, cx),
                    false => core.connected(key, result, cx),
                });
            }
            (Kind::Room(side), Outcome::Ready(result)) => {
                self.laws.answered(key, side, result.is_ok());
                self.happened(key, Event::Room { side });
            }
            (Kind::Splice(side), Outcome::Ready(Ok(()))) if self.frost.is_some() => {
                self.pipes.in_next_turn((key, side), now);
            }
            (Kind::Splice(side), Outcome::Ready(Ok(()))) => self.splice((key, side)),
            (Kind::Splice(side), Outcome::Ready(Err(_))) => {
                self.spliced((key, side), (0, 0, Spliced::Stopped));
            }
            other => unreachable!("{other:?}"),
        }
        self.take_reports();
        self.execute();
    }

    /// Tells a session, in the way of a worker that moves or stands still.
    fn happened(&mut self, key: Key, event: Event) {
        let is_frozen = self.frost.is_some();
        self.act(|core, cx| match is_frozen {
            true => core.note(key, event, cx),
            false => core.relayed(key, event, cx),
        });
    }

    fn adopt(&mut self) {
        if let Some(snapshot) = self.worker.snapshots.changed() {
            self.laws.adopt(Arc::clone(&snapshot));
            self.books.adopt(snapshot);
        }
    }

    /// False when no splice step was due.
    fn housekeep(&mut self) -> bool {
        if self.frost.is_some() {
            return false;
        }
        self.adopt();
        while let Ok(order) = self.worker.orders.pop() {
            self.trace(|_| format!("{order:?}"));
            self.laws.orders(self.now, order, self.user_of(order));
            self.act(|core, cx| core.order(order, cx));
            self.take_reports();
            self.execute();
        }
        self.act(Sessions::expire);
        if self.core.is_starved() {
            self.act(Sessions::relieve);
        }
        self.take_reports();
        self.execute();
        let mut stepped = false;
        while let Some(step) = self.pipes.pop_due(self.now) {
            stepped = true;
            self.splice(step);
            self.execute();
        }
        stepped
    }

    fn user_of(&self, order: Order) -> Option<usize> {
        let Order::EndSession { id, .. } = order else { return None };
        let view = self.control.end.shard.read(id.place).filter(|view| view.id == id)?;
        Some(user_at(view.client))
    }

    fn take_reports(&mut self) {
        while let Ok(report) = self.control.end.reports.pop() {
            self.laws.reports(report, user_at);
        }
    }

    fn check_books(&self) {
        let live = self.core.live();
        let counters = &self.control.end.metrics.counters;
        let active = counters.sessions_active.get() as usize;
        let tcp = self.books.snapshot().service(ServiceId::built_in(Protocol::Tcp));
        let inside = tcp.map_or(live, |service| service.gate.sessions());
        let books = [self.laws.sessions.len(), active, self.seats.taken(), inside];
        check(books == [live; 4], law::BOOKS, || format!("{live} sessions, {books:?}"));
        if !self.turns.is_multiple_of(16) {
            return;
        }
        let on_backends: u64 = self
            .control
            .end
            .metrics
            .backends
            .iter()
            .take(64)
            .map(|backend| backend.active.get())
            .sum();
        check(on_backends as usize <= live, law::BOOKS, || format!("{on_backends} on backends"));
        if self.turns.is_multiple_of(64) {
            let listed = self.control.end.shard.iter().count();
            check(listed == live, law::BOOKS, || format!("{listed} of {live} are in the table"));
        }
    }

    /// Everyone has gone: the books are closed.
    fn end(mut self) -> Story {
        self.check_books();
        self.kernel.withdraw(&mut self.pool);
        for class in Class::ALL {
            let (free, all) = (self.pool.free(class), self.pool.blocks(class));
            check(free == all, law::BLOCKS, || format!("{free} of {all} {class:?} at the end"));
        }
        let metrics = &self.control.end.metrics;
        let active = metrics.backends.iter().map(|backend| backend.active.get()).max();
        check(active == Some(0), law::BOOKS, || "a backend still has sessions".into());
        let fates = &self.laws.fates;
        let ended: u32 = fates.iter().map(|fate| fate.ended).sum();
        let started: u32 = fates.iter().map(|fate| fate.started).sum();
        let counted = [&metrics.counters.sessions_ended, &metrics.counters.sessions_started];
        let counted = counted.map(|counter| counter.get() as u32);
        check(counted == [ended, started], law::BOOKS, || format!("{counted:?} for {ended}"));
        for (user, fate) in fates.iter().enumerate() {
            let once = fate.ended <= 1 && fate.started <= fate.ended;
            let told = !fate.arrived || fate.ended + fate.refused > 0;
            check(once && told, law::BOOKS, || format!("user {user}: {fate:?}"));
        }
        self.check_deliveries();
        let kept = self.pipes.lent().next();
        check(kept.is_none(), law::PIPES, || format!("{kept:?} at the end"));
        Story {
            fates: self.laws.fates,
            turns: self.turns,
            mark: self.mark,
            starved: self.starved,
            spliced: self.spliced,
            stills: self.stills,
        }
    }

    /// A diligent peer, served to the end, has heard everything and the end of it.
    fn check_deliveries(&self) {
        for peer in &self.peers {
            let conn = &self.conns[peer.conn];
            let fate = &self.laws.fates[conn.user];
            if !fate.diligent || fate.reason != Some(EndReason::Finished) {
                continue;
            }
            let said = self.users[conn.user].script.total(conn.side.other());
            let right = conn.outward.read == said && peer.heard_end == Some(Read::End);
            check(right, law::BYTES, || {
                let heard = conn.outward.read;
                format!("{heard} of {said} bytes came to {peer:?} over {conn:?}")
            });
        }
    }

    fn trace(&self, line: impl FnOnce(&World) -> String) {
        if self.traced {
            eprintln!("{:>12.6} {}", self.now.nanos() as f64 / 1e9, line(self));
        }
    }
}

impl User {
    fn draw(plan: &Plan, start: Now, random: &mut Random) -> User {
        let arrives_at = start.plus(random.any_time(plan.arrive_within));
        let script = plan.script(random);
        let most = script.total(Side::Client).max(script.total(Side::Backend));
        User { arrives_at, script, habits: plan.habits(random, most) }
    }
}

fn address_of(user: usize) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(192, 0, 2, user as u8 % 7).into(), 10_000 + user as u16)
}

fn user_at(address: SocketAddr) -> usize {
    debug_assert!(matches!(address.ip(), IpAddr::V4(_)));
    usize::from(address.port() - 10_000)
}
