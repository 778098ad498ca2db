//! The books of a worker that serves several services, as a table of behaviour.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::*;
use crate::base::publish::{Publisher, Subscriber};
use crate::base::random::xorshift;
use crate::cluster::groups::regrouped;
use crate::cluster::seats::Seats;
use crate::cluster::{Barrier, Policy, Protocol, Standing, Terms};
use crate::tls::backends::BackendTls;
use crate::worker::brake::Brake;
use crate::worker::late::Late;
use crate::worker::link::{ControlEnd, DoorChange, Order, link};

const NOW: Now = Now::from_nanos(1_000_000_000);
const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);
const UDP: ServiceId = ServiceId::built_in(Protocol::Udp);
const API: ServiceId = ServiceId::built_in(Protocol::Api);
/// Another TCP service than the built-in one.
const REDIS: ServiceId = ServiceId(7);

/// Services that have nothing in common: each has as many seats, and connects for as many seconds, as
/// its number says and one more, and two backends of its own.
fn snapshot() -> Snapshot {
    let built_in = Snapshot::default();
    let mut services = built_in.services.to_vec();
    services.push(Service { id: REDIS, name: "redis".into(), ..services[0].clone() });
    for service in &mut services {
        let number = u64::from(service.id.0) + 1;
        let timeouts = Timeouts { connect: Duration::from_secs(number), ..service.terms.timeouts };
        service.terms = Terms { timeouts, ..service.terms.clone() };
        service.seats = Arc::new(Seats::new(number as usize));
        service.turn = Arc::default();
        service.gate = Arc::default();
    }
    let backends: Vec<Backend> = services
        .iter()
        .flat_map(|service| [0, 1].map(|which| backend(service.id, which)))
        .collect();
    Snapshot { services: services.into(), ..built_in }.with(&backends)
}

/// One of the two backends of a service.
fn backend(service: ServiceId, which: u16) -> Backend {
    let slot = 2 * service.0 + which;
    Backend {
        proxy: false,
        http2: false,
        tls: None,
        id: BackendId(u32::from(slot)),
        slot,
        service,
        address: ([10, 0, 0, service.0 as u8], 80 + which).into(),
        weight: 1,
        name: None,
        group: None,
        standing: Standing::Serving,
    }
}

/// A lone worker's books, and the ends of what they are joined to.
pub struct Joined {
    pub books: Books,
    pub control: ControlEnd,
    pub publisher: Publisher<Snapshot>,
    pub snapshots: Subscriber<Snapshot>,
    pub orders: rtrb::Consumer<Order>,
    pub doors: rtrb::Consumer<(Protocol, DoorChange)>,
    pub brake: Arc<Brake>,
    pub late: Arc<Late>,
    pub wake: Arc<EventFd>,
}

/// The books of a worker that serves these services, with `places` in its shard.
pub fn joined(snapshot: Snapshot, places: usize) -> Joined {
    let publisher = Publisher::new(snapshot);
    let (control, end) = link(0, places, publisher.subscribe(), Arc::default()).unwrap();
    let mut books = Books::new(Parts {
        shard: end.shard,
        metrics: Arc::clone(&end.metrics),
        all_metrics: Arc::from([end.metrics]),
        reports: end.reports,
        urgent: end.urgent,
    });
    books.adopt(publisher.current());
    let (snapshots, orders, doors) = (end.snapshots, end.orders, end.doors);
    let (brake, late, wake) = (end.brake, end.late, end.wake);
    Joined { books, control, publisher, snapshots, orders, doors, brake, late, wake }
}

fn books() -> (Books, ControlEnd) {
    let Joined { books, control, .. } = joined(snapshot(), 100);
    (books, control)
}

fn client() -> SocketAddr {
    ([192, 0, 2, 1], 1000).into()
}

/// Seats taken, service by service.
fn taken(books: &Books) -> Vec<usize> {
    books.snapshot().services.iter().map(|service| service.seats.taken()).collect()
}

/// Sessions that count towards the limits of each service.
fn inside(books: &Books) -> Vec<usize> {
    books.snapshot().services.iter().map(|service| service.gate.sessions()).collect()
}

/// The books after a change to every service.
fn change(books: &mut Books, change: impl FnMut(&mut Service)) {
    let mut snapshot = books.snapshot().clone();
    snapshot.services.iter_mut().for_each(change);
    books.adopt(Arc::new(snapshot));
}

#[test]
fn a_session_takes_a_seat_of_its_own_service_and_gives_it_back_there() {
    let (mut books, _control) = books();
    let tcp = books.admit(TCP, client(), NOW).unwrap();
    assert_eq!(books.admit(TCP, client(), NOW).unwrap_err(), Refusal::Full);
    let udp = [(); 2].map(|()| books.admit(UDP, client(), NOW).unwrap());
    let redis = books.admit(REDIS, client(), NOW).unwrap();
    assert_eq!(taken(&books), [1, 2, 0, 1]);
    books.close(tcp, EndReason::Finished, NOW);
    assert_eq!(taken(&books), [0, 2, 0, 1]);
    udp.into_iter().for_each(|entry| books.withdraw(entry));
    books.withdraw(redis);
    assert_eq!(taken(&books), [0; 4]);
    assert!(books.admit(TCP, client(), NOW).is_ok());
}

#[test]
fn a_user_is_given_a_backend_of_its_own_service_in_that_services_turn() {
    let (mut books, _control) = books();
    for service in [TCP, UDP, API, REDIS] {
        for which in [0, 1, 0] {
            let choice = books.choose(service, client(), None, &|_| false).unwrap();
            assert_eq!(choice.address, backend(service, which).address);
        }
        let own = backend(service, 0).id;
        assert!(books.find(service, own).is_some());
        assert_eq!(books.find(ServiceId(service.0 + 1), own), None, "it is another's");
    }
    let mut entry = books.admit(REDIS, client(), NOW).unwrap();
    let choice = books.assign(&mut entry, &[]).unwrap();
    assert_eq!(choice.backend, backend(REDIS, 1).id);
}

#[test]
fn each_service_is_served_by_its_own_terms_and_by_other_ones_from_the_next_snapshot_on() {
    let (mut books, _control) = books();
    let connects = |books: &Books| {
        [TCP, UDP, API, REDIS].map(|service| books.timeouts(service).connect.as_secs())
    };
    assert_eq!(connects(&books), [1, 2, 3, 8]);
    change(&mut books, |service| {
        service.terms.timeouts.connect *= 10;
        if service.id == REDIS {
            service.terms.policy = Policy::SourceHash;
        }
    });
    assert_eq!(connects(&books), [10, 20, 30, 80]);
    let different = |service| {
        let choose = || books.choose(service, client(), None, &|_| false).unwrap();
        choose() != choose()
    };
    assert!(different(TCP) && !different(REDIS), "a user stays where its address leads");
}

#[test]
fn the_control_core_hears_of_which_service_a_session_is_unless_it_wants_no_word() {
    let (mut books, mut control) = books();
    for quiet in [false, true] {
        let mut entry = books.admit(REDIS, client(), NOW).unwrap();
        books.assign(&mut entry, &[]).unwrap();
        books.started(&entry);
        assert_eq!(control.shard.iter().map(|it| it.service).collect::<Vec<_>>(), [REDIS]);
        books.close(entry, EndReason::Finished, NOW);
        books.refused(API, client(), Refusal::NoBackend);
        let told: Vec<_> = std::iter::from_fn(|| control.reports.pop().ok()).collect();
        let services = told.iter().map(|report| match report {
            Report::Started { service, .. } | Report::Refused { service, .. } => *service,
            Report::Ended(ended) => ended.service,
            other => panic!("{other:?}"),
        });
        let expected = if quiet { vec![] } else { vec![REDIS, REDIS, API] };
        assert_eq!(services.collect::<Vec<_>>(), expected);
        books.adopt(Arc::new(Snapshot { report_sessions: false, ..books.snapshot().clone() }));
    }
}

#[test]
fn a_service_that_is_not_in_the_snapshot_has_room_for_nobody() {
    let (mut books, _control) = books();
    let unknown = ServiceId(99);
    assert_eq!(books.admit(unknown, client(), NOW).unwrap_err(), Refusal::NoBackend);
    assert_eq!(books.choose(unknown, client(), None, &|_| false), None);
    assert_eq!(taken(&books), [0; 4]);
}

#[test]
fn a_service_counts_whom_it_turned_away_once_and_how_long_the_others_waited() {
    let (mut books, _control) = books();
    let of = |books: &Books, service| {
        let gate = Arc::clone(&books.snapshot().service(service).unwrap().gate);
        (gate.answers.sum(), gate.turned_away(Barrier::Sessions))
    };
    for why in [Refusal::NoBackend, Refusal::Unreachable, Refusal::Barred(Barrier::Sessions)] {
        books.refused(REDIS, client(), why);
    }
    let (answered, barred) = of(&books, REDIS);
    assert_eq!((answered.refused, barred), (2, 1));
    let entry = books.admit(REDIS, client(), NOW).unwrap();
    books.first_byte(&entry, NOW.plus(Duration::from_micros(70)));
    assert_eq!(of(&books, REDIS).0.first_byte[1], 1);
    assert_eq!(books.metrics().first_byte_time.counts()[1], 1);
    assert_eq!(of(&books, TCP).0, Default::default(), "another service");
    books.close(entry, EndReason::Finished, NOW);
}

#[test]
fn a_full_shard_takes_nobody_and_no_seat() {
    let mut books = joined(snapshot(), 2).books;
    let first = books.admit(TCP, client(), NOW).unwrap();
    let second = books.admit(UDP, client(), NOW).unwrap();
    // The others have seats left, and the shard no place.
    for service in [UDP, API, REDIS].repeat(5) {
        assert_eq!(books.admit(service, client(), NOW).unwrap_err(), Refusal::Full);
    }
    assert_eq!(taken(&books), [1, 1, 0, 0]);
    assert_eq!(inside(&books), [1, 1, 0, 0]);
    books.close(first, EndReason::Finished, NOW);
    books.withdraw(second);
    let again = [API, REDIS].map(|service| books.admit(service, client(), NOW).unwrap());
    assert_eq!(books.metrics().counters.sessions_active.get(), 2);
    again.into_iter().for_each(|entry| books.close(entry, EndReason::Finished, NOW));
    assert_eq!(books.metrics().counters.sessions_ended.get(), 3, "one was withdrawn");
}

#[test]
fn a_backend_that_failed_is_picked_only_when_there_is_no_other_until_the_next_snapshot() {
    let (mut books, _control) = books();
    let mut entry = books.admit(TCP, client(), NOW).unwrap();
    let bad = books.assign(&mut entry, &[]).unwrap().backend;
    assert!(entry.is_on(bad));
    books.backend_failed(&entry, Errno::ECONNREFUSED);
    for _ in 0..4 {
        assert_ne!(books.assign(&mut entry, &[]).unwrap().backend, bad);
        assert!(!entry.is_on(bad));
    }
    let good = entry.choice().unwrap().backend;
    assert_eq!(books.assign(&mut entry, &[good]).unwrap().backend, bad);
    let active = |books: &Books| [0, 1].map(|slot| books.metrics().backends[slot].active.get());
    assert_eq!(active(&books).iter().sum::<u64>(), 1, "it is counted once, where it is");
    change(&mut books, |_| ());
    let picked = [(); 4].map(|()| books.assign(&mut entry, &[]).unwrap().backend);
    assert!(picked.contains(&bad) && picked.contains(&good), "{picked:?}");
    books.close(entry, EndReason::Finished, NOW);
    assert_eq!(active(&books), [0, 0]);
}

#[test]
fn a_worker_is_told_how_the_backend_that_it_picks_is_reached() {
    let reached = |proxy, http2, tls: Option<BackendTls>| {
        let choice = Choice::from(&Backend { proxy, http2, tls, ..backend(TCP, 0) });
        (choice.proxy, choice.http2, choice.tls)
    };
    assert_eq!(reached(false, false, None), (false, false, false));
    assert_eq!(reached(true, false, None), (true, false, false));
    assert_eq!(reached(false, true, None), (false, true, false));
    assert_eq!(reached(false, false, Some(BackendTls::default())), (false, false, true));
}

#[test]
fn bytes_that_come_late_count_for_the_backend_that_sent_them_until_there_is_another() {
    let (mut books, _control) = books();
    change(&mut books, |service| service.terms.limits.backend_sessions = Some(1));
    let mut entry = books.admit(REDIS, client(), NOW).unwrap();
    let row = |which| usize::from(backend(REDIS, which).slot);
    let down = |books: &Books| [0, 1].map(|which| books.metrics().backends[row(which)].down.get());
    books.carried(&mut entry, 0, 1, NOW);
    assert_eq!(down(&books), [0, 0], "it has been on none");
    assert_eq!(books.assign(&mut entry, &[]).unwrap().slot, backend(REDIS, 0).slot);
    books.unassign(&mut entry);
    books.carried(&mut entry, 0, 2, NOW);
    assert_eq!(down(&books), [2, 0]);
    let other = books.find(REDIS, backend(REDIS, 1).id).unwrap();
    books.metrics().backends[row(1)].active.one();
    assert!(!books.book_if_room(REDIS, &mut entry, other), "another worker has filled it");
    books.carried(&mut entry, 0, 4, NOW);
    assert_eq!(down(&books), [6, 0]);
    books.metrics().backends[row(1)].active.less_one();
    assert!(books.book_if_room(REDIS, &mut entry, other));
    books.carried(&mut entry, 0, 8, NOW);
    assert_eq!(down(&books), [6, 8]);
}

#[test]
fn rule_13_of_two_workers_only_one_takes_the_last_place_on_a_backend() {
    let (mut books, _control) = books();
    change(&mut books, |service| service.terms.limits.backend_sessions = Some(1));
    let mut entry = books.admit(REDIS, client(), NOW).unwrap();
    let active = |books: &Books, choice: Choice| {
        books.metrics().backends[usize::from(choice.slot)].active.get()
    };
    let choice = books.choose(REDIS, client(), None, &|_| false).unwrap();
    // Another worker books a session there in between.
    books.metrics().backends[usize::from(choice.slot)].active.one();
    assert!(!books.book_if_room(REDIS, &mut entry, choice));
    assert_eq!((active(&books, choice), entry.choice()), (1, None), "it is off the books again");
    let other = books.assign(&mut entry, &[]).unwrap();
    assert_ne!(other.backend, choice.backend);
    assert!(books.is_full(REDIS, other) && books.is_full(REDIS, choice));
    let mut late = books.admit(UDP, client(), NOW).unwrap();
    assert_eq!(books.assign_from(REDIS, &mut late, &[]), None);
    assert_eq!(books.nobody(REDIS), Refusal::Barred(Barrier::BackendSessions));
    let nobody = books.nobody(ServiceId(99));
    assert_eq!(nobody, Refusal::NoBackend);
    // The same where the users are shared out among groups.
    let mut snapshot = books.snapshot().clone();
    snapshot.services[3].groups = regrouped(&[], &[("blue", 1)]);
    let blue = |which| Backend { group: Some("blue".into()), ..backend(REDIS, which) };
    snapshot = snapshot.with(&[blue(0), blue(1)]);
    books.adopt(Arc::new(snapshot));
    assert_eq!(books.assign_from(REDIS, &mut late, &[]), None);
    assert_eq!(books.nobody(REDIS), Refusal::Barred(Barrier::BackendSessions));
}

#[test]
fn rule_13_a_full_service_takes_no_seat_and_its_refusals_are_told_apart() {
    let (mut books, _control) = books();
    change(&mut books, |service| {
        service.terms.limits.sessions = Some(1);
        if service.id == REDIS {
            service.users = ["10.0.0.0/8".parse().unwrap()].into();
        }
    });
    let first = books.admit(UDP, client(), NOW).unwrap();
    let barred = |books: &mut Books, service| books.admit(service, client(), NOW).unwrap_err();
    assert_eq!(barred(&mut books, UDP), Refusal::Barred(Barrier::Sessions));
    assert_eq!(barred(&mut books, REDIS), Refusal::Barred(Barrier::Users));
    assert!(books.is_stranger(REDIS, client()) && !books.is_stranger(UDP, client()));
    assert_eq!((taken(&books), inside(&books)), (vec![0, 1, 0, 0], vec![0, 1, 0, 0]));
    books.refused(UDP, client(), Refusal::Barred(Barrier::Sessions));
    let gate =
        |books: &Books, service| Arc::clone(&books.snapshot().service(service).unwrap().gate);
    assert_eq!(Barrier::ALL.map(|it| gate(&books, UDP).turned_away(it)), [0, 1, 0]);
    let mapped = ([0, 0, 0, 0, 0, 0xffff, 0x0a01, 1], 7).into();
    let second = books.admit(REDIS, mapped, NOW).expect("a mapped address is the plain one");
    books.withdraw(first);
    books.close(second, EndReason::Finished, NOW);
    assert_eq!(inside(&books), [0; 4]);
}

#[test]
fn rule_13_a_request_counts_at_its_own_service_until_it_is_over() {
    let (mut books, _control) = books();
    change(&mut books, |service| service.terms.limits.sessions = Some(1));
    let mut user = books.admit(API, client(), NOW).unwrap();
    assert_eq!(inside(&books), [0; 4], "a connection alone is none");
    let mut other = books.admit(API, client(), NOW).unwrap();
    books.let_in(&mut user, REDIS, false).unwrap();
    assert_eq!(books.let_in(&mut other, REDIS, false), Err(Barrier::Sessions));
    assert_eq!(books.let_in(&mut other, REDIS, true), Ok(()), "who was in before stays in");
    assert_eq!(inside(&books), [0, 0, 0, 2]);
    books.let_out(&mut other);
    books.let_out(&mut other);
    books.let_in(&mut user, TCP, false).unwrap();
    assert_eq!(inside(&books), [1, 0, 0, 0], "one user has one request at a time");
    books.close(user, EndReason::Finished, NOW);
    assert_eq!(inside(&books), [0; 4]);
}

#[test]
fn the_fewest_sessions_are_those_of_all_workers_however_long_this_one_has_not_looked() {
    let publisher = Publisher::new(snapshot());
    let (_control, end) = link(0, 100, publisher.subscribe(), Arc::default()).unwrap();
    let (own, other) = (end.metrics, Arc::new(WorkerMetrics::default()));
    let mut books = Books::new(Parts {
        shard: end.shard,
        metrics: Arc::clone(&own),
        all_metrics: Arc::from([Arc::clone(&own), Arc::clone(&other)]),
        reports: end.reports,
        urgent: end.urgent,
    });
    books.adopt(publisher.current());
    change(&mut books, |service| service.terms.policy = Policy::LeastSessions);
    let slots = [TCP, UDP, API, REDIS].map(|id| [0, 1].map(|which| backend(id, which).slot));
    let mut random = xorshift(21);
    for round in 0..300 {
        // Now and then far more happens than the others keep.
        let news = if round % 50 == 7 { 9_000 } else { random(9) };
        for _ in 0..news {
            let metrics = if random(3) == 0 { &own } else { &other };
            let slot = slots[random(4) as usize][random(2) as usize];
            let active = metrics.backends[usize::from(slot)].active.get();
            match active > 0 && (active > 20 || random(2) == 0) {
                true => metrics.session_over(slot),
                false => metrics.session_begun(slot),
            }
        }
        if random(20) == 0 {
            change(&mut books, |_| ());
        }
        for (id, pair) in [TCP, UDP, API, REDIS].into_iter().zip(slots) {
            let choice = books.choose(id, client(), None, &|_| false).unwrap();
            let least = pair.into_iter().map(|slot| books.load(slot)).min().unwrap();
            assert_eq!(books.load(choice.slot), least, "round {round}, {id:?}");
        }
    }
}
