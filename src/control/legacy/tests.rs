//! Hubs that describe themselves and take each other up, without a socket.

mod hostile;
mod talks;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::*;
use crate::base::publish::Publisher;
use crate::cluster::registry::{Change, Lasts, Registration};
use crate::cluster::share::Membership;
use crate::cluster::share::key::NodeId;
use crate::cluster::share::seal::Seal;
use crate::cluster::source::Source;
use crate::cluster::{AskedCheck, Snapshot, Standing};
use crate::config::services::{CheckConfig, CheckKind, GroupShare, ServiceConfig, StaticBackend};
use crate::control::checker::Failure;
use crate::control::hub::sharing::Sharing;
use crate::control::services::tallies;
use crate::control::workers::{Workers, value};
use crate::worker::link::{ControlEnd, Order, Report, WorkerEnd, link};

const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);

fn at(ms: u64) -> Now {
    Now::from_nanos(ms * 1_000_000)
}

fn address(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Two named services: `pg` with checks, a listed backend and groups, and `dns`.
fn config() -> Config {
    let mut pg = ServiceConfig::new("pg", Protocol::Tcp);
    pg.check = CheckConfig { kind: CheckKind::Tcp, fall: 2, rise: 2, ..CheckConfig::default() };
    let listed = |(port, group): (u16, &str)| StaticBackend {
        address: address(port),
        weight: 3,
        group: Some(group.to_owned()),
        proxy: false,
        http2: false,
        tls: None,
    };
    pg.backends = [(1, "blue"), (2, "green")].map(listed).to_vec();
    let share = |(name, share): (&str, u8)| GroupShare { name: name.into(), share };
    pg.groups = [("blue", 90), ("green", 10)].map(share).to_vec();
    let mut config = Config::default();
    config.set_services(vec![pg, ServiceConfig::new("dns", Protocol::Udp)]);
    config
}

/// Links to some workers, which the test plays.
fn links(config: &Config, workers: u8) -> (Vec<ControlEnd>, Publisher<Snapshot>, Vec<WorkerEnd>) {
    let mut first = Snapshot::default();
    let kin = first.services[0].clone();
    let named = config.services.iter().map(|table| config.new_service(table, &kin));
    first.services = first.services.iter().cloned().chain(named).collect();
    let snapshots = Publisher::new(first);
    let linked = (0..workers)
        .map(|worker| link(worker, 64, snapshots.subscribe(), Arc::new(Notify::new())).unwrap());
    let (ends, workers) = linked.unzip();
    (ends, snapshots, workers)
}

fn hub(config: Config, workers: u8, now: Now) -> (Hub, Vec<WorkerEnd>) {
    let (ends, snapshots, workers) = links(&config, workers);
    (Hub::new(Arc::new(config), Workers::new(ends), snapshots, now), workers)
}

fn join(source: Source, service: ServiceId, port: u16) -> Registration {
    Registration {
        source,
        service,
        address: address(port),
        weight: 1,
        name: None,
        group: None,
        proxy: false,
        http2: false,
        tls: None,
        probe: true,
        check: None,
    }
}

fn apply(hub: &mut Hub, change: Change, ms: u64) -> Option<BackendId> {
    hub.apply(change, at(ms)).unwrap().backend
}

/// The workers have seen what was published.
fn turn(hub: &mut Hub, workers: &[WorkerEnd], ms: u64) {
    hub.publish();
    workers.iter().for_each(|it| it.metrics.counters.turns.add(2));
    hub.tick(at(ms));
}

/// A hub in which something of everything has happened within 20 seconds.
fn eventful(workers: u8) -> (Hub, Vec<WorkerEnd>) {
    let (mut hub, mut workers) = hub(config(), workers, at(0));
    hub.start(at(0));
    let one = Source::Connection(7);
    let wanted = Registration {
        weight: 9,
        name: Some("web-\"1\"".into()),
        http2: true,
        check: Some(AskedCheck::Http("/up".into())),
        ..join(one, TCP, 10)
    };
    let first = apply(&mut hub, Change::Register(wanted), 10).unwrap();
    let all: Vec<_> = (11..16)
        .map(|port| apply(&mut hub, Change::Register(join(one, TCP, port)), 20).unwrap())
        .collect();
    let dns = hub.registry.named("dns").unwrap().id;
    apply(&mut hub, Change::Register(join(Source::Connection(8), dns, 53)), 30);
    turn(&mut hub, &workers, 1_000);
    let slot = |hub: &Hub, id| usize::from(hub.registry.get(id).unwrap().backend.slot);
    for (number, id) in all.iter().enumerate() {
        let metrics = &workers[number % workers.len()].metrics;
        let counted = &metrics.backends[slot(&hub, *id)];
        counted.active.set(2);
        counted.total.add(5);
        counted.up.add(1_000);
        metrics.counters.sessions_started.add(5);
        metrics.counters.bytes_up.add(1_000);
        metrics.first_byte_time.record(Duration::from_millis(3));
        metrics.answered[slot(&hub, *id)].set(at(900).nanos());
    }
    let lasts = Lasts::For(Duration::from_secs(60));
    apply(&mut hub, Change::DrainBackend { backend: all[0], lasts }, 2_000);
    let (service, lasts) = (TCP, Lasts::Never);
    apply(&mut hub, Change::Drain { source: one, service, address: address(11), lasts }, 2_100);
    apply(&mut hub, Change::DrainBackend { backend: all[1], lasts }, 2_100);
    let errno = nix::libc::ECONNREFUSED;
    workers[0].reports.push(Report::ConnectFailed { backend: all[2], errno }).unwrap();
    let (backend, since, now) = (all[3], at(2_000), at(2_200));
    workers[0].reports.push(Report::Unanswered { backend, since, now }).unwrap();
    turn(&mut hub, &workers, 3_000);
    apply(&mut hub, Change::Unregister { source: one, service, address: address(15) }, 3_100);
    while let Some((due, _)) = hub.next_check(at(4_000)) {
        let failure = || Failure::by_backend("no answer".to_owned());
        let passes = due.id != first;
        hub.checked(due, passes.then_some(()).ok_or_else(failure), Duration::ZERO, at(4_000));
    }
    let wanted = [("blue".to_owned(), 20), ("green".to_owned(), 80)];
    let pg = hub.shift("pg", &wanted).unwrap();
    apply(&mut hub, Change::Weigh { backend: BackendId(1), weight: 5 }, 4_100);
    hub.ended_by_operator(all[3]);
    let service = hub.registry.service(pg);
    service.turn.go_on(5);
    service.groups[0].turn.go_on(7);
    service.gate.turn_away(crate::cluster::Barrier::Users, 4);
    service.gate.answers.request(0, true);
    service.gate.answers.first_byte(0, Duration::from_millis(1));
    turn(&mut hub, &workers, 10_000);
    turn(&mut hub, &workers, 20_000);
    (hub, workers)
}

fn travelled(legacy: &Legacy) -> Legacy {
    Legacy::from_json(&legacy.to_json().unwrap()).unwrap()
}

/// Another hub that goes on with this description.
fn heir(legacy: &Legacy, config: Config, workers: u8, ms: u64) -> (Hub, Vec<WorkerEnd>) {
    let (mut hub, workers) = hub(config, workers, at(ms));
    hub.inherit(&travelled(legacy), at(ms)).unwrap();
    (hub, workers)
}

#[test]
fn what_was_taken_up_describes_itself_as_it_was_described() {
    for (before, after) in [(1, 1), (2, 2), (4, 1), (1, 3)] {
        let (old, _workers) = eventful(before);
        let mut first = old.describe(at(20_010));
        assert!(first.backends.iter().any(|it| it.http2));
        assert!(first.backends.iter().any(|it| it.left.is_some()));
        assert!(first.backends.iter().any(|it| it.beneath.is_some()));
        assert!(first.backends.iter().any(|it| it.aside_because.is_some()));
        assert!(first.backends.iter().any(|it| it.silence.is_some()));
        assert!(first.backends.iter().any(|it| it.checked.is_some()));
        assert_eq!(travelled(&first), first);
        let (new, _workers) = heir(&first, config(), after, 20_010);
        let mut second = new.describe(at(20_010));
        // Shares are shifted by the real clock.
        first.marks.iter_mut().for_each(|mark| mark.at = mark.at.min(at(20_010)));
        // It has published once.
        first.numbers.snapshot += 1;
        // Checks may begin at once rather than in the past.
        for backend in first.backends.iter_mut().chain(&mut second.backends) {
            backend.checked.iter_mut().for_each(|it| it.next = it.next.max(at(20_010)));
        }
        if before == after {
            // That one snapshot is counted by a hub of its own.
            let published = second.counts.control.since(&first.counts.control);
            assert_eq!(published.values().iter().sum::<u64>(), 1);
            second.counts.control = first.counts.control.clone();
        } else {
            (first.counts.workers, second.counts.workers) = (Vec::new(), Vec::new());
            second.counts.control = first.counts.control.clone();
        }
        assert_eq!(differing(&first, &second), [""; 0], "{before} workers, then {after}");
    }
}

/// The members in which two descriptions differ.
fn differing(one: &Legacy, other: &Legacy) -> Vec<String> {
    let members = |it: &Legacy| match serde_json::to_value(it).unwrap() {
        serde_json::Value::Object(members) => members,
        _ => unreachable!("a description is an object"),
    };
    let other = members(other);
    let differ = members(one).into_iter().filter(|(name, value)| other[name] != *value);
    differ.map(|(name, value)| format!("{name}: {value} became {}", other[&name])).collect()
}

#[test]
fn describing_changes_nothing() {
    let (hub, mut workers) = eventful(2);
    let first = hub.describe(at(20_010));
    assert_eq!(differing(&first, &hub.describe(at(20_010))), [""; 0]);
    assert!(workers.iter_mut().all(|it| it.orders.pop().is_err()), "nobody is told anything");
}

#[test]
fn numbers_and_places_are_never_given_twice() {
    let (old, _workers) = eventful(1);
    let legacy = old.describe(at(20_010));
    let (mut new, _workers) = heir(&legacy, config(), 1, 20_010);
    let known: Vec<(u32, u16)> = legacy.backends.iter().map(|it| (it.id, it.slot)).collect();
    for port in 100..200 {
        let id = apply(&mut new, Change::Register(join(Source::Connection(7), TCP, port)), 20_020);
        let entry = new.registry.get(id.unwrap()).unwrap();
        let (id, slot) = (entry.backend.id.0, entry.backend.slot);
        assert!(known.iter().all(|it| it.0 != id && it.1 != slot), "{id} {slot}");
    }
    assert_eq!(new.snapshot.version, legacy.numbers.snapshot + 1);
}

/// The sums of counters by name, and everything else that only grows.
fn sums(hub: &Hub) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    let mut add = |name: String, value: u64| *sums.entry(name).or_insert(0) += value;
    let text = crate::control::exposition::text(hub);
    let is_counted = |name: &str| ["_total", "_count", "_sum"].iter().any(|it| name.ends_with(it));
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let name = name.split('{').next().unwrap();
        if is_counted(name) {
            add(name.to_owned(), (value.parse::<f64>().unwrap() * 1e6) as u64);
        }
    }
    for (service, tally) in tallies(hub) {
        add(format!("given {}", service.0), tally.given.sessions);
    }
    sums
}

fn assert_no_less(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) {
    assert!(before.len() > 50);
    for (name, value) in before {
        let now = after.get(name).copied().unwrap_or(0);
        assert!(now >= *value, "{name} goes back from {value} to {now}");
    }
}

#[test]
fn counters_never_go_back_however_many_workers_there_are() {
    let (mut hub, mut _workers) = eventful(4);
    for (round, workers) in (1u64..).zip([1, 3, 2, 4, 1]) {
        let before = sums(&hub);
        let legacy = hub.describe(at(20_000 + round));
        (hub, _workers) = heir(&legacy, config(), workers, 20_000 + round);
        assert_no_less(&before, &sums(&hub));
        let worker = &_workers[workers as usize - 1].metrics;
        worker.counters.sessions_started.add(10);
        worker.first_byte_time.record(Duration::from_millis(3));
        assert_eq!(hub.workers.sum(|it| it.sessions_started.get()), 25 + 10 * round);
    }
}

#[test]
fn what_is_counted_afterwards_is_added_once() {
    let (old, theirs) = eventful(2);
    let legacy = old.describe(at(20_010));
    let (mut new, _workers) = heir(&legacy, config(), 1, 20_010);
    let mut said = legacy.counts;
    let (id, slot) =
        (BackendId(4), usize::from(old.registry.get(BackendId(4)).unwrap().backend.slot));
    for round in 1..=3 {
        theirs[1].metrics.counters.sessions_ended.add(2);
        theirs[1].metrics.backends[slot].down.add(100);
        theirs[0].metrics.session_length.record(Duration::from_secs(1));
        old.registry.service(TCP).gate.answers.request(1, false);
        let counts = old.counts();
        new.add_counts(&counts.since(&said));
        said = counts;
        assert_eq!(new.workers.sum(|it| it.sessions_ended.get()), 2 * round);
        let backend = &new.registry.get(id).unwrap().backend;
        assert_eq!(value(&new.workers.backend(backend.slot), "down"), 100 * round);
        assert_eq!(new.registry.service(TCP).gate.answers.sum().requests, round);
        let (counts, _) = new.workers.histogram(crate::control::workers::Timing::SessionLength);
        assert_eq!(counts.iter().sum::<u64>(), round);
    }
    assert_no_less(&sums(&old), &sums(&new));
}

#[test]
fn a_drain_waits_for_the_sessions_here_and_there() {
    let (old, _workers) = eventful(1);
    let legacy = old.describe(at(20_010));
    let (mut new, workers) = heir(&legacy, config(), 1, 20_010);
    let drained = new.registry.find(TCP, address(11)).unwrap().backend.clone();
    assert_eq!(drained.standing, Standing::Draining);
    workers[0].metrics.backends[usize::from(drained.slot)].active.set(1);
    new.set_elsewhere(&[(drained.id, 2)]);
    assert_eq!(new.sessions_on(drained.id), 3);
    turn(&mut new, &workers, 21_000);
    workers[0].metrics.backends[usize::from(drained.slot)].active.set(0);
    new.set_elsewhere(&[(drained.id, 1)]);
    turn(&mut new, &workers, 22_000);
    assert!(new.registry.get(drained.id).is_some(), "one is left at the predecessor");
    new.set_elsewhere(&[]);
    turn(&mut new, &workers, 23_000);
    assert!(new.registry.get(drained.id).is_none(), "its owner had asked for that");
    // The operator's own drain goes on, with its own deadline.
    let left = new.draining.values().map(|it| it.drain.deadline).collect::<Vec<_>>();
    assert_eq!(left, [None], "that of the second");
}

#[test]
fn a_backend_that_has_left_keeps_its_place_while_the_predecessor_has_its_sessions() {
    let (old, _workers) = eventful(1);
    let legacy = old.describe(at(20_010));
    let gone = legacy.backends.iter().find(|it| it.left.is_some()).unwrap();
    let (mut new, workers) = heir(&legacy, config(), 1, 20_010);
    let id = BackendId(gone.id);
    new.set_elsewhere(&[(id, 1)]);
    turn(&mut new, &workers, 21_000);
    assert!(new.departed.contains_key(&id));
    new.set_elsewhere(&[]);
    turn(&mut new, &workers, 22_000);
    assert!(!new.departed.contains_key(&id));
    let given = tallies(&new)[&TCP].given.sessions;
    assert_eq!(given, 25, "what it was given is still counted");
}

#[test]
fn other_settings_hold_and_what_operators_have_changed_stays_where_they_are_the_same() {
    let (old, _workers) = eventful(1);
    let legacy = old.describe(at(20_010));
    let weights = |hub: &Hub| -> Vec<(u16, u16)> {
        let listed = hub.registry.of_source(Source::File);
        listed.map(|it| (it.backend.address.port(), it.backend.weight)).collect()
    };
    let shares = |hub: &Hub| -> Vec<u8> {
        hub.registry.named("pg").unwrap().groups.iter().map(|it| it.share).collect()
    };
    let (same, _workers) = heir(&legacy, config(), 1, 20_010);
    assert_eq!(weights(&same), [(1, 5), (2, 3)], "an operator has given one another weight");
    assert_eq!(shares(&same), [20, 80], "and shifted the shares");
    let mut other = config();
    other.services[0].backends[0].weight = 8;
    other.services[0].backends.remove(1);
    other.services[0].groups[0].share = 50;
    let (next, _workers) = heir(&legacy, other, 1, 20_010);
    assert_eq!(weights(&next), [(1, 8)]);
    assert_eq!(shares(&next), [50, 10]);
}

#[test]
fn a_service_that_the_settings_do_not_have_any_more_leaves_in_good_order() {
    let (old, _workers) = eventful(1);
    let legacy = old.describe(at(20_010));
    let mut other = config();
    other.services.remove(1);
    let (mut new, workers) = heir(&legacy, other, 1, 20_010);
    let dns = ServiceId(4);
    assert!(new.is_leaving(dns) && new.registry.named("dns").is_none());
    for ms in [20_500, 21_000, 21_500, 23_000, 25_000, 27_000, 29_000] {
        turn(&mut new, &workers, ms);
    }
    assert!(!new.registry.has_service(dns), "its backend has left, and it is gone");
}

#[test]
fn other_balancers_hear_of_the_backends_that_were_left() {
    let (old, _workers) = eventful(1);
    let legacy = old.describe(at(20_010));
    let (mut new, _workers) = heir(&legacy, config(), 1, 20_010);
    let membership = Membership {
        cluster: "c".to_owned(),
        me: NodeId::new("a", 2),
        seal: Seal::default(),
        host: "here".into(),
        endpoints: 1,
        lease: Duration::from_secs(10),
        orphan: Duration::from_secs(15),
    };
    new.sharing = Some(Box::new(Sharing::new(membership, Vec::new(), at(20_010))));
    new.tell_cluster_of_all(at(20_010));
    let connected = new.registry.entries().filter(|it| it.source.connection().is_some()).count();
    assert_eq!((new.sharing.unwrap().share.said(), connected), (6, 6));
}

#[test]
fn services_keep_their_numbers_and_new_ones_get_others() {
    let numbered = |id: u16, name: &str, is_leaving| Numbered {
        id,
        name: name.to_owned(),
        protocol: Some(Protocol::Tcp),
        is_leaving,
    };
    let services = vec![numbered(9, "a", false), numbered(4, "b", false), numbered(3, "c", true)];
    let prelude = Prelude { via: None, services };
    let named = |names: &[&str]| {
        let mut config = Config::default();
        let services = names.iter().map(|it| ServiceConfig::new(it, Protocol::Tcp));
        config.set_services(services.collect());
        config
    };
    let mut config = named(&["a", "c", "b", "d"]);
    prelude.number(&mut config).unwrap();
    let numbers: Vec<(u16, &str)> =
        config.services.iter().map(|it| (it.id.0, it.name.as_str())).collect();
    assert_eq!(numbers, [(4, "b"), (5, "c"), (6, "d"), (9, "a")]);
    let mut other = named(&["a"]);
    other.services[0].protocol = Protocol::Api;
    assert!(prelude.number(&mut other).unwrap_err().contains("service.a.protocol"));
    let all = 3..ServiceId::NOBODY.0;
    let full = Prelude {
        via: None,
        services: all.map(|id| Numbered { id, ..Numbered::default() }).collect(),
    };
    assert_eq!(full.number(&mut other).unwrap_err(), NO_NUMBER);
    let mut nonsense = prelude.clone();
    nonsense.services[0].id = 0;
    assert!(nonsense.number(&mut named(&["a"])).is_err());
}

#[test]
fn sessions_that_end_for_a_failed_check_are_ended_by_the_heir_too() {
    let mut close = config();
    close.services[0].check.on_fail = crate::config::services::OnFail::Close;
    let (mut old, workers) = hub(close.clone(), 1, at(0));
    old.start(at(0));
    for ms in [1_000, 10_000, 20_000] {
        while let Some((due, _)) = old.next_check(at(ms)) {
            let passes = ms == 1_000 || due.id != BackendId(1);
            let failure = Failure::by_backend("no".to_owned());
            old.checked(due, passes.then_some(()).ok_or(failure), Duration::ZERO, at(ms));
        }
    }
    old.publish();
    drop(workers);
    let (_new, mut workers) = heir(&old.describe(at(20_010)), close, 1, 20_010);
    let orders: Vec<Order> = std::iter::from_fn(|| workers[0].orders.pop().ok()).collect();
    let reason = crate::session::EndReason::CheckFailed;
    assert_eq!(orders, [Order::EndBackend { backend: BackendId(1), reason }]);
}
