//! The life of a UDP session as a table of behaviour.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::sweeps::SWEEPS_MAX;
use super::*;
use crate::cluster::seats::Seats;
use crate::cluster::{Backend, Standing, Terms};
use crate::metrics::WorkerMetrics;
use crate::session::SessionId;
use crate::session::shards::{SessionView, Shard};
use crate::worker::books::Parts;
use crate::worker::link::{Report, Shortage};

const LOCAL: &str = "192.0.2.1:53";
const REST: Duration = Duration::from_secs(120);

/// One worker's core with its books, at a moment.
struct World {
    core: Sessions,
    books: Books,
    reports: rtrb::Consumer<Report>,
    metrics: Arc<WorkerMetrics>,
    shard: Arc<Shard>,
    seats: Arc<Seats>,
    now: Now,
}

fn settings() -> Settings {
    Settings {
        udp: Udp::default(),
        idle: Duration::from_secs(60),
        waits: Waits::default(),
        sessions: 100,
        share: 200,
        upstream: Limits { sockets: 200, rest: REST, resting: 10_000 },
        sources: SourceLimits::default(),
        hasher: FlowHasher::new((1, 2)),
        seed: 3,
        affinity: None,
    }
}

fn world(change: impl FnOnce(&mut Settings)) -> World {
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
    let services = Snapshot::built_in(Terms::default(), |_| Arc::clone(&seats));
    books.adopt(Arc::new(idle_after(settings.idle, services)));
    World { core: Sessions::new(settings, now), books, reports, metrics, shard, seats, now }
}

/// UDP sessions are over after so long a silence; what the other services say does not count here.
fn idle_after(idle: Duration, mut snapshot: Snapshot) -> Snapshot {
    for service in &mut snapshot.services {
        let own = service.id == SERVICE;
        service.terms.timeouts.udp_idle = if own { idle } else { Duration::from_millis(1) };
    }
    snapshot
}

/// A world with so many backends, 10.0.0.1 and on, named from 1.
fn with_backends(count: u32, change: impl FnOnce(&mut Settings)) -> World {
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
    /// The backends that are registered from now on: name, host, standing.
    fn register(&mut self, all: &[(u32, u8, Standing)]) {
        let backends: Vec<Backend> = (all.iter())
            .map(|(id, host, standing)| Backend {
                id: BackendId(*id),
                slot: *id as u16,
                service: SERVICE,
                address: backend_at(*host),
                weight: 1,
                name: None,
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

    /// The settings are read again, with another time after which what is silent is over.
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

    fn up_load(&mut self, number: u16, load: Load) -> Up {
        loop {
            let local = LOCAL.parse().unwrap();
            match self.core.up(self.now, client(number), local, load, &mut self.books) {
                Up::Open(socket) => self.core.opened(self.now, socket, true),
                other => return other,
            }
        }
    }

    /// Sends a byte; says from which socket and to which host it went.
    fn up(&mut self, number: u16) -> Result<(Socket, u8), Why> {
        went(self.up_load(number, Load::one(1)))
    }

    /// The same for a byte that another worker handed over.
    fn passed(&mut self, number: u16) -> Result<(Socket, u8), Why> {
        loop {
            let (local, load) = (LOCAL.parse().unwrap(), Load::one(1));
            match self.core.passed(self.now, client(number), local, load, &mut self.books) {
                Up::Open(socket) => self.core.opened(self.now, socket, true),
                other => return went(other),
            }
        }
    }

    fn down(&mut self, socket: Socket, host: u8) -> Result<(SocketAddr, SocketAddr), Why> {
        let from = backend_at(host);
        match self.core.down(self.now, socket, from, Load::one(2), &mut self.books) {
            Down::Send { from, to } => Ok((from, to)),
            Down::Drop(why) => Err(why),
        }
    }

    fn refuse(&mut self, socket: Socket, host: u8) {
        let errno = Errno::ECONNREFUSED;
        let sockets = [socket].into_iter();
        self.core.refused(self.now, sockets, backend_at(host), errno, &mut self.books);
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

fn went(up: Up) -> Result<(Socket, u8), Why> {
    match up {
        Up::Send { from, to: SocketAddr::V4(to) } => Ok((from, to.ip().octets()[3])),
        Up::Drop(why) => Err(why),
        other => panic!("{other:?}"),
    }
}

/// A flow as the affinity map knows it.
fn hash(number: u16) -> u64 {
    FlowHasher::new((1, 2)).flow(&FlowKey::new(client(number), LOCAL.parse().unwrap()))
}

#[test]
fn a_session_keeps_its_backend_whoever_joins() {
    let mut world = with_backends(2, |_| {});
    let first = world.up(1).unwrap();
    let second = world.up(2).unwrap();
    assert_eq!([first.1, second.1], [1, 2], "in turn");
    world.register(&[1, 2, 3, 4].map(|id| (id, id as u8, Standing::Serving)));
    for _ in 0..5 {
        assert_eq!(world.up(1), Ok(first));
        assert_eq!(world.up(2), Ok(second));
    }
    world.register(&[(1, 1, Standing::Draining), (2, 2, Standing::Serving)]);
    assert_eq!(world.up(1), Ok(first), "a draining backend keeps what it has");
}

#[test]
fn a_reply_reaches_its_user_from_the_address_that_was_spoken_to() {
    let mut world = with_backends(2, |_| {});
    let (one, other) = (world.up(1).unwrap(), world.up(2).unwrap());
    let local = LOCAL.parse().unwrap();
    assert_eq!(world.down(one.0, one.1), Ok((local, client(1))));
    assert_eq!(world.down(other.0, other.1), Ok((local, client(2))));
    let elsewhere = "192.0.2.99:53".parse().unwrap();
    let up = world.core.up(world.now, client(1), elsewhere, Load::one(1), &mut world.books);
    let from = match up {
        Up::Open(socket) => {
            world.core.opened(world.now, socket, true);
            match world.core.up(world.now, client(1), elsewhere, Load::one(1), &mut world.books) {
                Up::Send { from, .. } => from,
                other => panic!("{other:?}"),
            }
        }
        Up::Send { from, .. } => from,
        other => panic!("{other:?}"),
    };
    assert_eq!(world.down(from, 1), Ok((elsewhere, client(1))));
}

#[test]
fn what_is_no_reply_of_the_sessions_backend_is_dropped_with_its_reason() {
    let mut world = with_backends(2, |_| {});
    let (socket, host) = world.up(1).unwrap();
    assert_eq!(world.down(socket, 99), Err(Why::SpoofedReply));
    assert_eq!(world.down(socket, 3 - host), Err(Why::UnknownReply));
    let other_port = SocketAddr::new(backend_at(host).ip(), 1);
    let said = world.core.down(world.now, socket, other_port, Load::one(2), &mut world.books);
    assert_eq!(said, Down::Drop(Why::SpoofedReply));
    world.pass(Duration::from_secs(61));
    assert_eq!(world.down(socket, host), Err(Why::LateReply));
    let counters = &world.metrics.counters;
    assert_eq!(counters.udp_dropped_spoofed_reply.get(), 2);
    assert_eq!(counters.udp_dropped_unknown_reply.get(), 1);
    assert_eq!(counters.udp_dropped_late_reply.get(), 1);
    assert_eq!(counters.udp_datagrams_down.get(), 0);
}

#[test]
fn datagrams_of_either_side_keep_a_session() {
    let mut world = with_backends(1, |_| {});
    let (socket, host) = world.up(1).unwrap();
    world.up(2).unwrap();
    world.pass(Duration::from_secs(40));
    world.down(socket, host).unwrap();
    world.pass(Duration::from_secs(40));
    assert_eq!(world.core.live(), 1);
    world.up(1).unwrap();
    world.pass(Duration::from_secs(59));
    assert_eq!(world.core.live(), 1);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.core.live(), 0);
    assert_eq!(world.ends(), [EndReason::Idle, EndReason::Idle]);
}

#[test]
fn with_responses_a_session_ends_when_every_question_is_answered() {
    let mut world = with_backends(1, |settings| settings.udp.responses = NonZeroU32::new(1));
    let (socket, host) = world.up(1).unwrap();
    world.up(1).unwrap();
    world.down(socket, host).unwrap();
    assert_eq!(world.core.live(), 1, "one question is open");
    world.down(socket, host).unwrap();
    assert_eq!(world.core.live(), 0);
    assert_eq!(world.ends(), [EndReason::Finished]);
    assert_eq!(world.down(socket, host), Err(Why::LateReply));
    let again = world.up(1).unwrap();
    assert_ne!(again.0, socket, "the pair rests");
}

#[test]
fn every_datagram_of_a_burst_is_a_reply() {
    let burst = |datagrams: usize| Load { bytes: 100 * datagrams, segment: 100 };
    for (asked, responses, answered, over) in
        [(1, 3, 2, false), (1, 3, 3, true), (4, 1, 3, false), (4, 1, 4, true), (2, 2, 5, true)]
    {
        let mut world =
            with_backends(1, |settings| settings.udp.responses = NonZeroU32::new(responses));
        let Up::Send { from, .. } = world.up_load(1, burst(asked)) else { panic!("it is sent") };
        let backend = backend_at(1);
        let down = world.core.down(world.now, from, backend, burst(answered), &mut world.books);
        assert!(matches!(down, Down::Send { .. }));
        let case = format!("{answered} replies to {asked} that have {responses} each");
        assert_eq!(world.core.live() == 0, over, "{case}");
        let counted = world.metrics.counters.udp_datagrams_down.get();
        assert_eq!(counted, answered as u64, "{case}");
    }
}

#[test]
fn a_lost_backend_is_left_as_configured() {
    use Standing::{Aside, Serving};
    let gone: &[(u32, u8, Standing)] = &[(2, 2, Serving)];
    let aside: &[(u32, u8, Standing)] = &[(1, 1, Aside), (2, 2, Serving)];
    for (policy, after, host, live, moved) in [
        (OnUdpLoss::Move, gone, 2, 1, 1),
        (OnUdpLoss::Drop, gone, 2, 1, 0),
        (OnUdpLoss::Keep, gone, 1, 1, 0),
        (OnUdpLoss::Move, aside, 2, 1, 1),
        (OnUdpLoss::Drop, aside, 2, 1, 0),
        (OnUdpLoss::Keep, aside, 1, 1, 0),
    ] {
        let mut world = with_backends(2, |settings| settings.udp.on_backend_loss = policy);
        let before = world.up(1).unwrap();
        assert_eq!(before.1, 1);
        world.reports();
        world.register(after);
        assert_eq!(world.up(1).unwrap().1, host, "{policy:?}");
        assert_eq!(world.core.live(), live);
        assert_eq!(world.metrics.counters.udp_sessions_moved.get(), moved);
        let late = world.down(before.0, 1);
        assert_eq!(late.is_ok(), policy == OnUdpLoss::Keep, "{policy:?} {late:?}");
        let ended = if policy == OnUdpLoss::Drop { vec![EndReason::BackendLeft] } else { vec![] };
        assert_eq!(world.ends(), ended);
        assert_eq!(world.sessions()[0].backend, Some(BackendId(u32::from(host))));
    }
}

#[test]
fn dropped_sessions_end_without_waiting_for_a_datagram() {
    let mut world = with_backends(2, |settings| settings.udp.on_backend_loss = OnUdpLoss::Drop);
    (0..20).for_each(|number| assert!(world.up(number).is_ok()));
    world.register(&[(2, 2, Standing::Serving)]);
    world.pass(Duration::from_millis(10));
    assert_eq!(world.core.live(), 10);
    assert!(world.sessions().iter().all(|session| session.backend == Some(BackendId(2))));
}

#[test]
fn icmp_moves_the_next_datagram_and_keeps_new_users_away() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.up(2).unwrap();
    let three = world.up(3).unwrap();
    assert_eq!([one.1, three.1], [1, 1]);
    world.reports();
    world.refuse(one.0, 1);
    world.refuse(three.0, 1);
    assert_eq!([world.up(1).unwrap().1, world.up(3).unwrap().1], [2, 2]);
    for number in 10..14 {
        assert_eq!(world.up(number).unwrap().1, 2);
    }
    let failed: Vec<Report> =
        world.reports().into_iter().filter(|r| matches!(r, Report::ConnectFailed { .. })).collect();
    let errno = Errno::ECONNREFUSED as i32;
    assert_eq!(failed, [Report::ConnectFailed { backend: BackendId(1), errno }], "said once");
    world.pass(Duration::from_secs(2));
    assert_eq!(world.up(1).unwrap().1, 2, "a moved session does not move back");
    assert_eq!(world.metrics.counters.udp_refused.get(), 2);
}

#[test]
fn icmp_is_believed_only_about_a_datagram_that_waits_for_its_answer() {
    let mut world = with_backends(2, |_| {});
    let (one, two) = (world.up(1).unwrap(), world.up(2).unwrap());
    // Nothing was sent there from that socket, or by nobody.
    world.refuse(one.0, 2);
    world.refuse(Socket { number: 99, ..one.0 }, 1);
    // What was sent has been answered.
    world.down(one.0, 1).unwrap();
    world.refuse(one.0, 1);
    // It was sent too long ago.
    world.pass(Duration::from_secs(6));
    world.refuse(two.0, 2);
    let counters = Arc::clone(&world.metrics);
    let counted = || {
        let counters = &counters.counters;
        (counters.udp_refused.get(), counters.udp_refused_unasked.get())
    };
    assert_eq!(counted(), (0, 4));
    assert_eq!((world.up(1), world.up(2)), (Ok(one), Ok(two)));
    // A datagram is refused once.
    world.refuse(one.0, 1);
    world.refuse(one.0, 1);
    assert_eq!(counted(), (1, 5));
    let hosts: Vec<u8> = (3..=6).map(|number| world.up(number).unwrap().1).collect();
    assert_eq!(hosts, [1, 2, 1, 2], "the backend is not avoided");
    assert!(!world.reports().iter().any(|r| matches!(r, Report::ConnectFailed { .. })));
}

#[test]
fn one_message_moves_one_session_and_two_set_the_backend_aside_unless_it_is_heard() {
    let mut world = with_backends(2, |_| {});
    let (one, three) = (world.up(1).unwrap(), (world.up(2), world.up(3)).1.unwrap());
    let five = (world.up(4), world.up(5)).1.unwrap();
    assert_eq!([one.1, three.1, five.1], [1; 3]);
    world.refuse(one.0, 1);
    // The backend speaks to somebody, so it is there.
    world.down(three.0, 1).unwrap();
    world.refuse(five.0, 1);
    assert_eq!(world.up(3), Ok(three));
    assert_eq!([world.up(1).unwrap().1, world.up(5).unwrap().1], [2, 2]);
    let before = world.reports();
    assert!(!before.iter().any(|r| matches!(r, Report::ConnectFailed { .. })), "{before:?}");
    // Silence in between: nobody is there.
    world.refuse(three.0, 1);
    assert!(world.reports().iter().any(|r| matches!(r, Report::ConnectFailed { .. })));
    assert!((6..=9).all(|number| world.up(number).unwrap().1 == 2));
}

#[test]
fn two_messages_about_two_datagrams_of_one_session_are_enough() {
    let mut world = with_backends(1, |_| {});
    let one = world.up(1).unwrap();
    world.refuse(one.0, 1);
    assert_eq!(world.up(1), Ok(one), "there is nobody else");
    world.refuse(one.0, 1);
    assert!(world.reports().iter().any(|r| matches!(r, Report::ConnectFailed { .. })));
}

#[test]
fn a_session_that_hears_from_its_backend_stays_there_whatever_icmp_said() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.refuse(one.0, 1);
    world.down(one.0, 1).unwrap();
    assert_eq!(world.up(1), Ok(one));
}

#[test]
fn icmp_about_an_address_that_is_no_backend_changes_nothing() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.refuse(one.0, 99);
    assert_eq!(world.up(1), Ok(one));
}

#[test]
fn the_only_backend_is_sent_to_even_if_it_is_avoided() {
    for policy in [OnUdpLoss::Move, OnUdpLoss::Drop, OnUdpLoss::Keep] {
        let mut world = with_backends(1, |settings| settings.udp.on_backend_loss = policy);
        let one = world.up(1).unwrap();
        world.refuse(one.0, 1);
        assert_eq!(world.up(1), Ok(one), "{policy:?}");
        assert_eq!(world.up(2).unwrap().1, 1);
        world.register(&[(1, 1, Standing::Aside)]);
        assert_eq!(world.up(1), Ok(one), "{policy:?}");
        assert_eq!(world.core.live(), 2);
    }
}

#[test]
fn a_backend_that_is_back_gets_users_again() {
    let mut world = with_backends(2, |_| {});
    world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Serving)]);
    (1..=4).for_each(|number| assert_eq!(world.up(number).unwrap().1, 2));
    world.register(&[(1, 1, Standing::Serving), (2, 2, Standing::Serving)]);
    let hosts: Vec<u8> = (5..=8).map(|number| world.up(number).unwrap().1).collect();
    assert_eq!(hosts.iter().filter(|host| **host == 1).count(), 2, "{hosts:?}");
    let five = world.up(5).unwrap();
    assert_eq!(world.up(5), Ok(five), "and keeps them");
}

#[test]
fn two_avoided_backends_do_not_pass_a_session_to_and_fro() {
    for policy in [OnUdpLoss::Move, OnUdpLoss::Drop] {
        let mut world = with_backends(2, |settings| settings.udp.on_backend_loss = policy);
        let one = world.up(1).unwrap();
        world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Aside)]);
        for _ in 0..4 {
            assert_eq!(world.up(1), Ok(one), "{policy:?}");
        }
    }
}

#[test]
fn a_backend_that_registers_anew_keeps_its_sessions() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.register(&[(2, 2, Standing::Serving)]);
    world.register(&[(2, 2, Standing::Serving), (7, 1, Standing::Serving)]);
    assert_eq!(world.up(1), Ok(one));
    assert_eq!(world.down(one.0, 1).map(|(_, to)| to), Ok(client(1)));
    assert_eq!(world.sessions()[0].backend, Some(BackendId(7)));
    assert_eq!(world.metrics.backends[1].active.get(), 0);
    assert_eq!(world.metrics.backends[7].active.get(), 1);
    assert_eq!(world.metrics.counters.udp_sessions_moved.get(), 0);
}

#[test]
fn without_a_backend_a_session_waits_for_one() {
    let mut world = with_backends(1, |_| {});
    world.up(1).unwrap();
    world.register(&[]);
    assert_eq!(world.up(1), Err(Why::NoBackend));
    assert_eq!(world.up(2), Err(Why::NoBackend));
    assert_eq!(world.core.live(), 1);
    world.register(&[(5, 5, Standing::Serving)]);
    assert_eq!(world.up(1).unwrap().1, 5);
    assert_eq!(world.metrics.counters.udp_dropped_no_backend.get(), 2);
}

#[test]
fn every_limit_drops_with_its_own_reason() {
    let mut world = with_backends(1, |settings| settings.sessions = 3);
    (1..=3).for_each(|number| assert!(world.up(number).is_ok()));
    assert_eq!(world.up(4), Err(Why::TableFull));
    assert!(world.up(3).is_ok(), "a running session goes on");

    let mut world = with_backends(1, |settings| settings.sessions = 1000);
    (1..=50).for_each(|source| assert!(world.up(source << 8).is_ok()));
    assert_eq!(world.up(51 << 8), Err(Why::TableFull), "all workers' seats are taken");
    world.pass(Duration::from_secs(61));
    assert!(world.up(51 << 8).is_ok());

    let limits = |sessions, rate| SourceLimits {
        sessions: NonZeroU32::new(sessions),
        new_per_second: NonZeroU32::new(rate),
    };
    let mut world = with_backends(1, |settings| settings.sources = limits(2, 0));
    assert!(world.up(1).is_ok() && world.up(2).is_ok());
    assert_eq!(world.up(3), Err(Why::SourceLimit));
    assert!(world.up(256).is_ok(), "another source");
    world.pass(Duration::from_secs(61));
    assert!(world.up(3).is_ok());

    let mut world = with_backends(1, |settings| settings.sources = limits(0, 2));
    assert!(world.up(1).is_ok() && world.up(2).is_ok());
    assert_eq!(world.up(3), Err(Why::SourceRate));
    world.pass(Duration::from_secs(1));
    assert!(world.up(3).is_ok());

    let mut world = with_backends(1, |settings| settings.upstream.sockets = 2);
    assert!(world.up(1).is_ok() && world.up(2).is_ok());
    assert_eq!(world.up(3), Err(Why::UpstreamExhausted));
    assert_eq!(world.sessions().len(), 2, "and leaves nothing behind");
    assert_eq!(world.metrics.counters.sessions_active.get(), 2);
}

#[test]
fn a_move_without_a_free_pair_leaves_the_session_where_it_is() {
    let mut world = with_backends(2, |settings| settings.upstream.sockets = 1);
    let one = world.up(1).unwrap();
    let two = world.up(2).unwrap();
    assert_eq!((one.1, two.1), (1, 2));
    world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Serving)]);
    assert_eq!(world.up(1), Ok(one));
    world.register(&[(2, 2, Standing::Serving)]);
    assert_eq!(world.up(1), Err(Why::UpstreamExhausted));
    assert_eq!(world.down(one.0, 1).map(|(_, to)| to), Ok(client(1)), "its pair is still its own");
    assert_eq!(world.up(2), Ok(two));
}

#[test]
fn datagrams_of_any_length_pass_that_fit_the_way_on() {
    let mut world = with_backends(1, |_| {});
    for (load, passes) in [
        (Load::one(0), true),
        (Load::one(65_507), true),
        (Load::one(65_508), false),
        (Load { bytes: 65_535, segment: 1200 }, true),
        (Load { bytes: 65_535, segment: 65_520 }, false),
    ] {
        for number in [1, 2] {
            let up = world.up_load(number, load);
            assert_eq!(matches!(up, Up::Send { .. }), passes, "{load:?}");
            world.pass(Duration::from_secs(if number == 1 { 0 } else { 61 }));
        }
    }
    let counters = &world.metrics.counters;
    assert_eq!(counters.udp_dropped_too_big.get(), 1 + 1 + 2 + 2);
    assert_eq!(counters.udp_datagrams_up.get(), 2 + 2 + 2 * 55);
    assert_eq!(counters.sessions_started.get(), 3 * 2, "what cannot pass begins no session");
}

#[test]
fn orders_end_what_they_name() {
    let mut world = with_backends(2, |_| {});
    (1..=6).for_each(|number| assert!(world.up(number).is_ok()));
    world.reports();
    let id: SessionId = world.sessions()[0].id;
    world.order(Order::EndSession { id, reason: EndReason::Operator });
    assert_eq!(world.ends(), [EndReason::Operator]);
    world.order(Order::EndSession { id, reason: EndReason::Operator });
    assert_eq!(world.ends(), []);
    world.order(Order::EndBackend { backend: BackendId(2), reason: EndReason::BackendLeft });
    assert_eq!(world.ends(), [EndReason::BackendLeft; 3]);
    world.order(Order::Drain);
    assert_eq!(world.up(60), Err(Why::Draining));
    assert!(world.sessions().iter().all(|session| session.backend == Some(BackendId(1))));
    assert_eq!(world.core.live(), 2);
    world.order(Order::Stop);
    assert_eq!(world.ends(), [EndReason::Stopping; 2]);
    assert_eq!(world.core.live(), 0);
    let mut world = with_backends(1, |_| {});
    world.order(Order::Stop);
    assert_eq!(world.up(1), Err(Why::Draining));
}

#[test]
fn what_is_silent_while_draining_ends_soon_and_what_speaks_goes_on() {
    for (idle_ms, ends_ms) in [(60_000, 2_000), (500, 500)] {
        let idle = Duration::from_millis(idle_ms);
        let mut world = with_backends(2, |settings| settings.idle = idle);
        let (socket, host) = world.up(1).unwrap();
        (2..=5).for_each(|number| assert!(world.up(number).is_ok()));
        world.reports();
        world.order(Order::Drain);
        let tenth = Duration::from_millis(ends_ms / 10);
        for _ in 0..7 {
            world.pass(tenth);
            world.up(2).unwrap();
            world.down(socket, host).unwrap();
        }
        assert_eq!(world.ends(), [], "not before {ends_ms} ms");
        world.pass(5 * tenth);
        assert_eq!(world.ends(), [EndReason::Idle; 3]);
        assert!(world.up(1).is_ok() && world.up(2).is_ok());
        assert_eq!(world.up(3), Err(Why::Draining), "it is over");
        world.pass(12 * tenth);
        assert_eq!(world.core.live(), 0);
    }
}

#[test]
fn settings_that_are_read_again_while_draining_hold_nobody_up() {
    let mut world = with_backends(1, |_| {});
    world.up(1).unwrap();
    world.order(Order::Drain);
    world.reload(Duration::from_secs(3600));
    world.up(1).unwrap();
    world.pass(Duration::from_millis(2_100));
    assert_eq!(world.core.live(), 0);
}

#[test]
fn sessions_that_begin_after_a_reload_are_over_after_the_new_time() {
    let mut world = with_backends(1, |_| {});
    world.reload(Duration::from_secs(10));
    world.up(1).unwrap();
    world.pass(Duration::from_secs(9));
    assert_eq!(world.core.live(), 1);
    world.pass(Duration::from_secs(2));
    assert_eq!((world.core.live(), world.ends()), (0, vec![EndReason::Idle]));
}

#[test]
fn many_orders_at_once_are_all_carried_out() {
    let mut world = with_backends(2, |settings| settings.sessions = 1000);
    (1..=40).for_each(|number| assert!(world.up(number).is_ok()));
    for backend in (0..2 * SWEEPS_MAX as u32).map(BackendId) {
        let order = Order::EndBackend { backend, reason: EndReason::BackendLeft };
        world.core.order(world.now, order, &mut world.books);
    }
    world.pass(Duration::from_millis(500));
    assert_eq!(world.core.live(), 0);
    assert!(world.core.sweeps.is_empty());
}

#[test]
fn a_flow_that_changes_workers_keeps_its_session() {
    let map = Arc::new(Affinity::new(1000));
    let with = |worker| {
        let map = Arc::clone(&map);
        move |settings: &mut Settings| settings.affinity = Some(Holder { map, worker })
    };
    let mut one = with_backends(3, with(0));
    let mut other = with_backends(3, with(1));
    let homes: Vec<_> = (1..=9).map(|number| one.up(number).unwrap()).collect();
    other.up(100).unwrap();
    for number in 1..=9 {
        assert_eq!(other.up_load(number, Load::one(1)), Up::Pass(0));
        assert_eq!(one.passed(number), Ok(homes[usize::from(number) - 1]));
    }
    assert_eq!((one.core.live(), other.core.live()), (9, 1));
    one.pass(Duration::from_secs(61));
    assert_eq!(map.len(), 1);
    assert!(other.up(1).is_ok(), "who is there first has the flow from now on");
    assert_eq!(one.up_load(1, Load::one(1)), Up::Pass(1));
}

#[test]
fn a_flow_that_is_held_elsewhere_is_handed_over_also_while_draining() {
    let map = Arc::new(Affinity::new(1000));
    let holder = Holder { map: Arc::clone(&map), worker: 1 };
    let mut world = with_backends(2, |settings| settings.affinity = Some(holder));
    map.note(hash(1), BackendId(1), 0);
    world.order(Order::Drain);
    assert_eq!(world.up_load(1, Load::one(1)), Up::Pass(0));
    assert_eq!(world.up(2), Err(Why::Draining));
}

#[test]
fn what_is_handed_to_a_worker_stays_there_and_keeps_its_backend() {
    let map = Arc::new(Affinity::new(1000));
    let holder = Holder { map: Arc::clone(&map), worker: 1 };
    let mut world = with_backends(3, |settings| settings.affinity = Some(holder));
    for number in 1..=9 {
        // Its session here has ended; a third worker took the flow meanwhile.
        map.note(hash(number), BackendId(2), 2);
        assert_eq!(world.passed(number).unwrap().1, 2);
        assert_eq!(world.passed(number), world.up(number));
    }
    assert_eq!(world.metrics.counters.udp_sessions_found.get(), 9);
}

#[test]
fn a_backend_known_elsewhere_that_has_left_or_is_avoided_is_not_followed() {
    let map = Arc::new(Affinity::new(1000));
    let holder = Holder { map: Arc::clone(&map), worker: 1 };
    let mut world = with_backends(2, |settings| settings.affinity = Some(holder));
    map.note(hash(1), BackendId(99), 0);
    assert!(world.passed(1).is_ok());
    world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Serving)]);
    map.note(hash(2), BackendId(1), 0);
    assert_eq!(world.passed(2).unwrap().1, 2);
    assert_eq!(world.metrics.counters.udp_sessions_found.get(), 0);
}

#[test]
fn a_moved_session_is_found_where_it_went() {
    let map = Arc::new(Affinity::new(1000));
    let holder = Holder { map: Arc::clone(&map), worker: 0 };
    let mut world = with_backends(2, |settings| settings.affinity = Some(holder));
    world.up(1).unwrap();
    world.register(&[(2, 2, Standing::Serving)]);
    world.up(1).unwrap();
    assert_eq!(map.find(hash(1)), Some(BackendId(2)));
}

#[test]
fn the_books_agree_with_what_happened() {
    let mut world = with_backends(1, |_| {});
    let (socket, host) = world.up(1).unwrap();
    world.up_load(1, Load { bytes: 2500, segment: 1000 });
    world.down(socket, host).unwrap();
    let seen = &world.sessions()[0];
    assert_eq!((seen.service, seen.client), (SERVICE, client(1)));
    assert_eq!((seen.bytes_up, seen.bytes_down), (2501, 2));
    let backend = &world.metrics.backends[1];
    assert_eq!((backend.active.get(), backend.total.get()), (1, 1));
    assert_eq!((backend.up.get(), backend.down.get()), (2501, 2));
    let counters = &world.metrics.counters;
    assert_eq!((counters.udp_datagrams_up.get(), counters.udp_datagrams_down.get()), (4, 1));
    world.pass(Duration::from_secs(61));
    assert_eq!(world.metrics.backends[1].active.get(), 0);
    assert_eq!(world.metrics.counters.sessions_active.get(), 0);
    assert!(world.sessions().is_empty());
    assert_eq!(world.core.sockets(), 1);
    assert_eq!(world.metrics.counters.udp_pairs_resting.get(), 1);
}

#[test]
fn a_socket_that_cannot_be_opened_costs_the_datagram_and_nothing_else() {
    let mut world = with_backends(1, |_| {});
    let local: SocketAddr = LOCAL.parse().unwrap();
    let ask = |world: &mut World| {
        world.core.up(world.now, client(1), local, Load::one(1), &mut world.books)
    };
    let Up::Open(socket) = ask(&mut world) else { panic!("no socket is open yet") };
    world.core.opened(world.now, socket, false);
    assert_eq!(ask(&mut world), Up::Drop(Why::UpstreamExhausted));
    assert_eq!((world.core.live(), world.sessions().len()), (0, 0));
    world.pass(Duration::from_millis(101));
    assert_eq!(ask(&mut world), Up::Open(socket));
}

/// Users by source and port.
fn of_source(source: u8, port: u8) -> u16 {
    u16::from(source) << 8 | u16::from(port)
}

/// A world with one backend and so many pairs.
fn with_pairs(sockets: usize) -> World {
    with_backends(1, |settings| {
        settings.upstream.sockets = sockets;
        settings.share = sockets;
    })
}

/// A user whose datagram is answered at once.
fn answered(world: &mut World, number: u16) -> Socket {
    let (socket, host) = world.up(number).unwrap();
    assert_eq!(world.down(socket, host).map(|(_, to)| to), Ok(client(number)));
    socket
}

fn let_in(world: &mut World, number: u16) {
    answered(world, number);
}

#[test]
fn the_session_that_is_idle_for_longest_gives_way_and_none_in_use() {
    let mut world = with_pairs(3);
    let first = answered(&mut world, of_source(1, 1));
    world.pass(Duration::from_secs(1));
    let second = answered(&mut world, of_source(2, 1));
    answered(&mut world, of_source(3, 1));
    world.pass(Duration::from_millis(900));
    assert_eq!(world.up(of_source(4, 1)), Err(Why::UpstreamExhausted), "something passed lately");
    answered(&mut world, of_source(1, 1));
    world.pass(Duration::from_millis(1_200));
    world.reports();
    assert_eq!(world.up(of_source(4, 1)).map(|(socket, _)| socket), Ok(second));
    assert_eq!(world.ends(), [EndReason::Displaced]);
    assert_eq!(world.up(of_source(1, 1)).map(|(socket, _)| socket), Ok(first), "it goes on");
    let counters = &world.metrics.counters;
    assert_eq!(counters.udp_sessions_displaced.get(), 1);
    assert_eq!(counters.udp_dropped_upstream_exhausted.get(), 1);
}

#[test]
fn a_session_that_waits_for_an_answer_is_in_use_until_none_can_come() {
    let mut world = with_pairs(1);
    let (socket, _) = world.up(of_source(1, 1)).unwrap();
    world.pass(Duration::from_millis(4_900));
    assert_eq!(world.up(of_source(2, 1)), Err(Why::UpstreamExhausted));
    assert_eq!(world.down(socket, 1).map(|(_, to)| to), Ok(client(of_source(1, 1))));
    world.pass(Duration::from_millis(1_900));
    assert_eq!(world.up(of_source(2, 1)), Err(Why::UpstreamExhausted), "it was answered just now");
    world.pass(Duration::from_millis(150));
    assert_eq!(world.up(of_source(2, 1)).map(|(socket, _)| socket), Ok(socket));
    world.pass(Duration::from_millis(5_100));
    assert!(world.up(of_source(3, 1)).is_ok(), "no answer comes any more");
}

#[test]
fn one_that_waited_longer_goes_before_one_that_was_answered_later() {
    let mut world = with_pairs(2);
    let (waiting, _) = world.up(of_source(1, 1)).unwrap();
    world.pass(Duration::from_secs(2));
    answered(&mut world, of_source(2, 1));
    world.pass(Duration::from_secs(4));
    assert_eq!(world.up(of_source(3, 1)).map(|(socket, _)| socket), Ok(waiting));
}

#[test]
fn a_rest_gives_way_when_no_reply_can_come_and_the_oldest_first() {
    let mut world = with_backends(1, |settings| {
        settings.upstream.sockets = 2;
        settings.udp.responses = NonZeroU32::new(1);
    });
    let first = answered(&mut world, of_source(1, 1));
    world.pass(Duration::from_millis(100));
    let second = answered(&mut world, of_source(2, 1));
    assert_eq!(world.core.live(), 0);
    world.pass(Duration::from_millis(350));
    assert_eq!(world.up(of_source(3, 1)), Err(Why::UpstreamExhausted), "a copy may come");
    assert_eq!(world.down(first, 1), Err(Why::LateReply));
    world.pass(Duration::from_millis(60));
    assert_eq!(answered(&mut world, of_source(3, 1)), first);
    assert_eq!(world.up(of_source(4, 1)), Err(Why::UpstreamExhausted));
    world.pass(Duration::from_millis(100));
    assert_eq!(answered(&mut world, of_source(4, 1)), second);
    assert_eq!(world.metrics.counters.udp_rests_cut_short.get(), 2);
}

#[test]
fn sessions_that_nobody_answers_give_way_before_a_rest_is_cut_close() {
    let mut world = with_backends(1, |settings| {
        settings.upstream.sockets = 2;
        settings.udp.responses = NonZeroU32::new(1);
    });
    let (silent, _) = world.up(of_source(1, 1)).unwrap();
    world.pass(Duration::from_millis(5_100));
    let resting = answered(&mut world, of_source(2, 1));
    world.pass(Duration::from_secs(1));
    assert_eq!(answered(&mut world, of_source(3, 1)), silent);
    world.pass(Duration::from_secs(1));
    assert_eq!(answered(&mut world, of_source(4, 1)), resting);
}

#[test]
fn dns_users_from_fresh_ports_are_served_for_as_long_as_they_come() {
    // On 100 pairs, of which each session takes one for 2 s, or with `responses` for half a second.
    // All of them are of few sources, of which each gets what there is.
    for (responses, every_ms) in [(0, 30), (1, 8)] {
        let mut world = with_backends(1, |settings| {
            settings.upstream.sockets = 100;
            settings.udp.responses = NonZeroU32::new(responses);
            settings.sessions = 1_000;
        });
        world.grow_seats(1_000);
        for number in 0..20_000 {
            answered(&mut world, number);
            world.reports();
            world.pass(Duration::from_millis(every_ms));
        }
        assert_eq!(world.metrics.counters.udp_dropped_upstream_exhausted.get(), 0);
        assert_eq!(world.metrics.counters.udp_datagrams_down.get(), 20_000);
    }
}

#[test]
fn a_full_table_makes_room_too() {
    let mut world = with_backends(1, |settings| settings.sessions = 3);
    (1..=3).for_each(|source| let_in(&mut world, of_source(source, 1)));
    assert_eq!(world.up(of_source(4, 1)), Err(Why::TableFull));
    world.pass(Duration::from_millis(2_100));
    world.reports();
    assert!(world.up(of_source(4, 1)).is_ok());
    assert_eq!(world.ends(), [EndReason::Displaced]);
    assert_eq!(world.core.live(), 3);
    assert_eq!(world.metrics.counters.users_refused_full.get(), 1);
}

#[test]
fn one_source_takes_neither_the_last_of_the_room_nor_the_sessions_of_others() {
    for answers in [true, false] {
        let mut world = with_pairs(40);
        (1..=5).for_each(|source| let_in(&mut world, of_source(source, 1)));
        world.pass(Duration::from_secs(3));
        let mut taken = 0;
        for port in 0..200 {
            match world.up(of_source(9, port)) {
                Ok((socket, host)) if answers => assert!(world.down(socket, host).is_ok()),
                Ok(_) => {}
                Err(why) => assert_eq!(why, Why::SourceShare),
            }
            taken = world.core.live() - 5;
        }
        assert_eq!((taken, world.core.live()), (31, 36), "a quarter is left to the others");
        for source in 1..=5 {
            assert!(world.up(of_source(source, 1)).is_ok());
        }
        assert_eq!(world.metrics.counters.udp_sessions_displaced.get(), 0, "{answers}");
        // Its own sessions make room for its next ones, and for everybody else's.
        world.pass(Duration::from_secs(6));
        (1..=5).for_each(|source| let_in(&mut world, of_source(source, 1)));
        for port in 200..240 {
            let _ = world.up(of_source(9, port));
        }
        for source in 10..19 {
            assert!(world.up(of_source(source, 1)).is_ok(), "{source}");
        }
        for source in 1..=5 {
            assert_eq!(
                world.shard.iter().filter(|it| it.client == client(of_source(source, 1))).count(),
                1
            );
        }
    }
}

#[test]
fn a_large_source_is_not_limited_while_there_is_room() {
    let mut world = with_pairs(40);
    (0..31).for_each(|port| let_in(&mut world, of_source(1, port)));
    world.pass(Duration::from_millis(2_100));
    (31..62).for_each(|port| let_in(&mut world, of_source(1, port)));
    assert_eq!(world.up(of_source(1, 99)), Err(Why::SourceShare), "a quarter is left to others");
    assert!((2..=9).all(|source| world.up(of_source(source, 1)).is_ok()));
}

#[test]
fn a_session_goes_to_another_backend_when_the_first_has_no_room() {
    let mut world = with_backends(2, |settings| settings.upstream.sockets = 2);
    world.register(&[(1, 1, Standing::Serving)]);
    assert!(world.up(of_source(1, 1)).is_ok() && world.up(of_source(2, 1)).is_ok());
    world.register(&[(1, 1, Standing::Serving), (2, 2, Standing::Serving)]);
    for source in 3..5 {
        assert_eq!(world.up(of_source(source, 1)).map(|(_, host)| host), Ok(2));
    }
    assert_eq!(world.up(of_source(5, 1)), Err(Why::UpstreamExhausted));
    assert_eq!(world.metrics.counters.users_refused_exhausted.get(), 1);
    let told: u64 = (1..=2).map(|slot| world.metrics.backends[slot].turned_away.get()).sum();
    assert_eq!(told, 1, "marked at the backend that was meant");
}

#[test]
fn a_lack_of_room_is_told_now_and_then_with_all_that_were_dropped() {
    let mut world = with_pairs(1);
    let told = |world: &mut World| -> Vec<(Shortage, Option<BackendId>, u64)> {
        let reports = world.reports().into_iter();
        reports
            .filter_map(|report| match report {
                Report::OutOfRoom { shortage, backend, datagrams } => {
                    Some((shortage, backend, datagrams))
                }
                _ => None,
            })
            .collect()
    };
    world.up(of_source(1, 1)).unwrap();
    for source in 2..8 {
        assert!(world.up(of_source(source, 1)).is_err());
    }
    assert_eq!(told(&mut world), [(Shortage::Pair, Some(BackendId(1)), 1)], "at once");
    for _ in 0..4 {
        world.pass(Duration::from_millis(2_600));
        world.up(of_source(1, 1)).unwrap();
    }
    assert!(world.up(of_source(9, 1)).is_err());
    assert_eq!(told(&mut world), [(Shortage::Pair, Some(BackendId(1)), 6)]);
}
