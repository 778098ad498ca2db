//! What becomes of backends that the configuration lists and of those that are checked, with a worker whose
//! end is played and checks whose outcomes are said.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::*;
use crate::base::publish::Publisher;
use crate::cluster::registry::{Lasts, Registration};
use crate::cluster::{Service, Snapshot, Standing, WhenAllFail};
use crate::config::services::{
    CheckConfig, CheckKind, GroupShare, OnFail, ServiceConfig, StaticBackend,
};
use crate::control::checker::Failure;
use crate::control::checks::Due;
use crate::control::contact::Port;
use crate::control::doors::Step;
use crate::control::status::CheckVerdict;
use crate::control::view;
use crate::worker::link::{Order, WorkerEnd, link};

pub(super) const PG: ServiceId = ServiceId(3);

pub(super) fn at(ms: u64) -> Now {
    Now::from_nanos(1_000_000_000 + ms * 1_000_000)
}

pub(super) fn address(port: u16) -> SocketAddr {
    ([192, 0, 2, 1], port).into()
}

/// The service `pg` with these backends, by port and weight.
pub(super) fn config(backends: &[(u16, u16)], check: CheckConfig) -> Config {
    let listed = |&(port, weight): &(u16, u16)| StaticBackend {
        address: address(port),
        weight,
        group: None,
        proxy: false,
        http2: false,
        tls: None,
    };
    let backends = backends.iter().map(listed).collect();
    let pg = ServiceConfig { backends, check, ..ServiceConfig::new("pg", Protocol::Tcp) };
    Config { services: vec![pg], ..Config::default() }
}

/// A check on a port of its own, which turns a verdict at once.
pub(super) fn check() -> CheckConfig {
    CheckConfig {
        kind: CheckKind::Tcp,
        port: Some(8008),
        rise: 1,
        fall: 1,
        ..CheckConfig::default()
    }
}

/// A hub that has read its configuration, and the one worker's end.
pub(super) fn hub(config: Config) -> (Hub, WorkerEnd) {
    let first = Snapshot::default();
    let (name, terms) = ("pg".into(), config.terms_for(PG));
    let pg = Service { id: PG, name, terms, ..first.services[0].clone() };
    let services = first.services.iter().cloned().chain([pg]).collect();
    let snapshots = Publisher::new(Snapshot { services, ..first });
    let (control, worker) = link(0, 4, snapshots.subscribe(), Arc::new(Notify::new())).unwrap();
    let workers = Workers::new(vec![control]);
    let mut hub = Hub::new(Arc::new(config), workers, snapshots, at(0));
    hub.follow_file(at(0));
    hub.publish();
    (hub, worker)
}

/// These settings are in use from now on, at the same doors.
pub fn reload(hub: &mut Hub, config: Config, now: Now) {
    hub.reloaded(config, Arc::default(), (Step::default(), Vec::new()), now);
}

/// Port, weight and standing of each backend of `pg`.
pub(super) fn shown(hub: &mut Hub) -> Vec<(u16, u16, Standing)> {
    hub.publish();
    let pool = hub.snapshot.pool(PG).unwrap();
    let all = pool.backends.iter();
    all.map(|it| (it.address.port(), it.weight, it.standing)).collect()
}

fn rotation(hub: &mut Hub) -> Vec<u16> {
    hub.publish();
    hub.snapshot.pool(PG).unwrap().in_rotation().map(|it| it.address.port()).collect()
}

pub(super) fn id_of(hub: &Hub, port: u16) -> BackendId {
    hub.registry.find(PG, address(port)).unwrap().backend.id
}

/// Begins every check that is due.
fn begin(hub: &mut Hub, now: Now) -> Vec<Due> {
    std::iter::from_fn(|| hub.next_check(now).map(|(due, _)| due)).collect()
}

/// Lets the next check of each backend pass, or fail.
fn checked(hub: &mut Hub, passes: &[(u16, bool)], now: Now) {
    for due in begin(hub, now) {
        let port = hub.registry.get(due.id).unwrap().backend.address.port();
        let passes = passes.iter().find(|it| it.0 == port).unwrap().1;
        let outcome = if passes { Ok(()) } else { Err(Failure::by_backend("it is broken".into())) };
        hub.checked(due, outcome, Duration::from_millis(3), now);
    }
}

fn ended(worker: &mut WorkerEnd) -> Vec<(BackendId, EndReason)> {
    let orders = std::iter::from_fn(|| worker.orders.pop().ok());
    let of = |order| match order {
        Order::EndBackend { backend, reason } => Some((backend, reason)),
        _ => None,
    };
    orders.filter_map(of).collect()
}

#[test]
fn listed_backends_come_go_and_weigh_as_the_file_says() {
    use Standing::Serving;
    let (mut hub, _worker) = hub(config(&[(1, 1), (2, 3)], CheckConfig::default()));
    assert_eq!(shown(&mut hub), [(1, 1, Serving), (2, 3, Serving)]);
    let kept = id_of(&hub, 2);
    reload(&mut hub, config(&[(2, 5), (3, 1)], CheckConfig::default()), at(1));
    assert_eq!(shown(&mut hub), [(2, 5, Serving), (3, 1, Serving)]);
    assert_eq!(id_of(&hub, 2), kept, "its sessions are still its own");
    assert_eq!(hub.counters.backends_left.get(), 1);
    let version = hub.snapshot.version;
    reload(&mut hub, config(&[(2, 5), (3, 1)], CheckConfig::default()), at(2));
    assert_eq!(hub.snapshot.version, version, "nothing is told that is not new");
}

#[test]
fn what_an_operator_changes_about_a_listed_backend_lasts_until_the_next_reload() {
    use Standing::{Draining, Serving};
    let list = || config(&[(1, 1), (2, 1)], CheckConfig::default());
    let (mut hub, worker) = hub(list());
    let (first, second) = (id_of(&hub, 1), id_of(&hub, 2));
    hub.apply(Change::Weigh { backend: second, weight: 9 }, at(1)).unwrap();
    hub.apply(Change::DrainBackend { backend: first, lasts: Lasts::AsSet }, at(1)).unwrap();
    assert_eq!(shown(&mut hub), [(1, 1, Draining), (2, 9, Serving)]);
    reload(&mut hub, list(), at(2));
    assert_eq!(shown(&mut hub), [(1, 1, Serving), (2, 1, Serving)]);
    hub.apply(Change::DrainBackend { backend: first, lasts: Lasts::AsSet }, at(3)).unwrap();
    hub.publish();
    worker.metrics.counters.turns.add(2);
    hub.tick(at(4));
    assert!(hub.draining[&first].drain.is_empty, "its drain is over");
    hub.tick(at(60_000));
    assert_eq!(shown(&mut hub), [(1, 1, Draining), (2, 1, Serving)], "and it stays out");
    reload(&mut hub, list(), at(60_001));
    assert_eq!(shown(&mut hub), [(1, 1, Serving), (2, 1, Serving)]);
    assert_eq!(id_of(&hub, 1), first);
}

#[test]
fn a_listed_backend_set_aside_stays_aside_through_a_reload() {
    let (mut hub, _worker) = hub(config(&[(1, 1), (2, 1)], CheckConfig::default()));
    let backend = id_of(&hub, 1);
    hub.apply(Change::SetAside { backend }, at(1)).unwrap();
    reload(&mut hub, config(&[(1, 2), (2, 1)], CheckConfig::default()), at(2));
    assert_eq!(shown(&mut hub)[0], (1, 2, Standing::Aside));
    assert!(hub.tick(at(3)).revive.contains(&backend), "it is tried like any other");
}

#[test]
fn a_listed_backend_whose_address_has_registered_itself_joins_when_that_has_left() {
    let (mut hub, _worker) = hub(config(&[], CheckConfig::default()));
    let source = Source::Connection(1);
    let (address, weight, name) = (address(1), 7, None);
    let own = Registration {
        source,
        service: PG,
        address,
        weight,
        name,
        group: None,
        proxy: false,
        http2: false,
        tls: None,
        probe: true,
        check: None,
    };
    hub.apply(Change::Register(own), at(0)).unwrap();
    reload(&mut hub, config(&[(1, 1)], CheckConfig::default()), at(1));
    hub.tick(at(5_000));
    assert_eq!(shown(&mut hub), [(1, 7, Standing::Serving)]);
    hub.apply(Change::SourceLost { source, why: "it is gone" }, at(5_001)).unwrap();
    hub.tick(at(10_000));
    assert_eq!(shown(&mut hub), [(1, 1, Standing::Serving)]);
}

#[test]
fn a_checked_backend_serves_as_long_as_its_checks_say() {
    use Standing::{Failing, Serving};
    let (mut hub, mut worker) = hub(config(&[(1, 1), (2, 1)], check()));
    assert_eq!(rotation(&mut hub), [0; 0], "nobody has passed yet");
    assert!(is_failing(hub.snapshot.pool(PG)), "which users are told who are turned away");
    checked(&mut hub, &[(1, true), (2, false)], at(20));
    hub.publish();
    assert!(!is_failing(hub.snapshot.pool(PG)) && !is_failing(hub.snapshot.pool(ServiceId(0))));
    assert_eq!(shown(&mut hub), [(1, 1, Serving), (2, 1, Failing)]);
    checked(&mut hub, &[(1, true), (2, true)], at(10_000));
    assert_eq!(rotation(&mut hub), [1, 2]);
    checked(&mut hub, &[(1, false), (2, true)], at(20_000));
    assert_eq!(rotation(&mut hub), [2]);
    assert_eq!(ended(&mut worker), [], "running sessions go on");
    let counters = &hub.counters;
    let counted = [
        &counters.checks,
        &counters.checks_failed,
        &counters.backends_check_failed,
        &counters.backends_check_passed,
    ];
    assert_eq!(counted.map(|counter| counter.get()), [6, 2, 1, 2]);
    let doors = super::super::status::Doors::default();
    let status = view::status(&hub, doors, at(20_001));
    let told = &status.backends[0].check;
    let failing = Some(CheckVerdict::Failing);
    assert_eq!((told.verdict, told.failure.as_deref()), (failing, Some("it is broken")));
    assert_eq!((told.took_us, told.last_unix_ms), (Some(3000), told.since_unix_ms));
    assert_eq!(status.backends[1].check.verdict, Some(CheckVerdict::Passing));
}

#[test]
fn a_failed_check_ends_the_sessions_if_the_service_says_so_and_once_more_when_all_know() {
    let close = CheckConfig { on_fail: OnFail::Close, ..check() };
    let (mut hub, mut worker) = hub(config(&[(1, 1), (2, 1)], close));
    checked(&mut hub, &[(1, true), (2, true)], at(20));
    let failing = id_of(&hub, 1);
    let slot = usize::from(hub.registry.get(failing).unwrap().backend.slot);
    worker.metrics.backends[slot].active.set(2);
    let before = hub.snapshot.version;
    checked(&mut hub, &[(1, false), (2, true)], at(10_000));
    assert_eq!(
        (hub.snapshot.version, ended(&mut worker)),
        (before, vec![]),
        "first it is published"
    );
    hub.publish();
    let one = [(failing, EndReason::CheckFailed)];
    assert_eq!((hub.snapshot.version, ended(&mut worker)), (before + 1, one.to_vec()));
    hub.tick(at(10_010));
    assert_eq!(ended(&mut worker), [], "the worker may still begin a session there");
    worker.metrics.counters.turns.add(2);
    hub.tick(at(10_020));
    assert_eq!(ended(&mut worker), one);
    worker.metrics.backends[slot].active.set(0);
    worker.metrics.counters.turns.add(2);
    hub.tick(at(10_030));
    assert_eq!(ended(&mut worker), []);
    checked(&mut hub, &[(1, false), (2, true)], at(20_000));
    assert_eq!(ended(&mut worker), [], "it failed already");
}

#[test]
fn of_backends_that_fail_together_the_workers_are_told_once() {
    let close = CheckConfig { on_fail: OnFail::Close, ..check() };
    let ports: Vec<u16> = (1..=50).collect();
    let listed: Vec<(u16, u16)> = ports.iter().map(|port| (*port, 1)).collect();
    let (mut hub, mut worker) = hub(config(&listed, close));
    let all = |passes: bool| ports.iter().map(move |port| (*port, passes)).collect::<Vec<_>>();
    checked(&mut hub, &all(true), at(20));
    hub.publish();
    let before = hub.snapshot.version;
    checked(&mut hub, &all(false), at(10_000));
    hub.publish();
    assert_eq!((hub.snapshot.version, ended(&mut worker).len()), (before + 1, 50));
}

#[test]
fn sessions_begun_because_all_fail_are_not_ended_for_it() {
    let (on_fail, when_all_fail) = (OnFail::Close, WhenAllFail::Serve);
    let (mut hub, mut worker) =
        hub(config(&[(1, 1)], CheckConfig { on_fail, when_all_fail, ..check() }));
    checked(&mut hub, &[(1, true)], at(20));
    checked(&mut hub, &[(1, false)], at(10_000));
    hub.publish();
    assert_eq!(ended(&mut worker).len(), 1);
    assert_eq!(rotation(&mut hub), [1], "somebody is better than nobody");
    worker.metrics.backends[0].active.set(1);
    worker.metrics.counters.turns.add(2);
    hub.tick(at(10_020));
    assert_eq!(ended(&mut worker), []);
}

#[test]
fn a_reload_begins_changes_and_ends_checks() {
    use Standing::{Failing, Serving};
    let list = &[(1, 1)];
    let (mut hub, _worker) = hub(config(list, CheckConfig::default()));
    assert_eq!(begin(&mut hub, at(1_000)), []);
    reload(&mut hub, config(list, CheckConfig { fall: 2, ..check() }), at(1_000));
    assert_eq!(shown(&mut hub), [(1, 1, Serving)], "it served already");
    checked(&mut hub, &[(1, false)], at(1_020));
    assert_eq!(shown(&mut hub), [(1, 1, Serving)], "once is not twice");
    checked(&mut hub, &[(1, false)], at(5_000));
    assert_eq!(shown(&mut hub), [(1, 1, Failing)]);
    reload(&mut hub, config(list, CheckConfig { port: Some(9009), ..check() }), at(5_010));
    let (due, target) = hub.next_check(at(10_000)).unwrap();
    assert_eq!(target.port, Port { address: address(9009), proxy: false, tls: None });
    reload(&mut hub, config(list, CheckConfig::default()), at(10_010));
    assert_eq!(shown(&mut hub), [(1, 1, Serving)]);
    hub.checked(due, Err(Failure::by_backend("it is broken".into())), Duration::ZERO, at(10_020));
    assert_eq!(shown(&mut hub), [(1, 1, Serving)], "nobody asks any more");
    assert_eq!(begin(&mut hub, at(60_000)), []);
    assert!(hub.check_result(id_of(&hub, 1)).is_none());
}

#[test]
fn what_a_reload_says_of_a_check_holds_for_the_failures_that_follow() {
    use Standing::{Failing, Serving};
    let list = &[(1, 1), (2, 1)];
    let keep = CheckConfig { fall: 3, ..check() };
    let (mut hub, mut worker) = hub(config(list, keep.clone()));
    checked(&mut hub, &[(1, true), (2, true)], at(20));
    // One failure, which counts on under the new rule.
    checked(&mut hub, &[(1, false), (2, true)], at(10_000));
    let close = CheckConfig { fall: 2, rise: 2, on_fail: OnFail::Close, ..keep.clone() };
    reload(&mut hub, config(list, close.clone()), at(10_010));
    assert_eq!(shown(&mut hub), [(1, 1, Serving), (2, 1, Serving)]);
    checked(&mut hub, &[(1, false), (2, true)], at(20_000));
    assert_eq!(shown(&mut hub), [(1, 1, Failing), (2, 1, Serving)]);
    assert_eq!(ended(&mut worker), [(id_of(&hub, 1), EndReason::CheckFailed)]);
    checked(&mut hub, &[(1, true), (2, true)], at(30_000));
    assert_eq!(shown(&mut hub)[0], (1, 1, Failing), "once is not twice");
    checked(&mut hub, &[(1, true), (2, true)], at(40_000));
    assert_eq!(shown(&mut hub)[0], (1, 1, Serving));
    reload(&mut hub, config(list, CheckConfig { fall: 1, ..keep }), at(40_010));
    checked(&mut hub, &[(1, true), (2, false)], at(50_000));
    assert_eq!(shown(&mut hub)[1], (2, 1, Failing));
    assert_eq!(ended(&mut worker), [], "sessions go on again");
    let seldom = CheckConfig { interval: Duration::from_secs(60), ..close };
    reload(&mut hub, config(list, seldom.clone()), at(50_010));
    for due in begin(&mut hub, at(55_000)) {
        hub.checked(due, Ok(()), Duration::ZERO, at(55_000));
    }
    assert_eq!(begin(&mut hub, at(100_000)), [], "the new interval");
    assert_eq!(begin(&mut hub, at(120_000)).len(), 2);
}

#[test]
fn a_backend_that_fails_serves_again_once_a_reload_takes_its_check_away() {
    use Standing::{Failing, Serving};
    let list = &[(1, 1), (2, 1)];
    let close = CheckConfig { on_fail: OnFail::Close, ..check() };
    let (mut hub, mut worker) = hub(config(list, close.clone()));
    checked(&mut hub, &[(1, false), (2, true)], at(20));
    assert_eq!(shown(&mut hub), [(1, 1, Failing), (2, 1, Serving)]);
    let failed = id_of(&hub, 1);
    let slot = usize::from(hub.registry.get(failed).unwrap().backend.slot);
    worker.metrics.backends[slot].active.set(1);
    ended(&mut worker);
    reload(&mut hub, config(list, CheckConfig::default()), at(30));
    assert_eq!(rotation(&mut hub), [1, 2]);
    worker.metrics.counters.turns.add(2);
    hub.tick(at(40));
    assert_eq!(ended(&mut worker), [], "what was ordered for the failure is over");
    reload(&mut hub, config(list, close), at(50));
    assert_eq!(rotation(&mut hub), [1, 2], "they serve until they fail");
    checked(&mut hub, &[(1, false), (2, true)], at(100));
    assert_eq!((rotation(&mut hub), ended(&mut worker).len()), (vec![2], 1));
}

#[test]
fn a_backend_that_registers_itself_with_a_checked_service_is_checked_too() {
    let (mut hub, _worker) = hub(config(&[], check()));
    let (source, weight, name) = (Source::Connection(1), 1, None);
    let own = Registration {
        source,
        service: PG,
        address: address(1),
        weight,
        name,
        group: None,
        proxy: false,
        http2: false,
        tls: None,
        probe: true,
        check: None,
    };
    let backend = hub.apply(Change::Register(own.clone()), at(0)).unwrap().backend.unwrap();
    assert_eq!(rotation(&mut hub), [0; 0]);
    checked(&mut hub, &[(1, true)], at(20));
    assert_eq!(rotation(&mut hub), [1]);
    hub.apply(Change::Register(own), at(30)).unwrap();
    assert_eq!(rotation(&mut hub), [1], "it need not pass again");
    let due = begin(&mut hub, at(10_000)).pop().unwrap();
    hub.apply(Change::SourceLost { source, why: "it is gone" }, at(10_010)).unwrap();
    hub.checked(due, Ok(()), Duration::ZERO, at(10_020));
    assert!(hub.check_result(backend).is_none(), "it has left");
}

#[test]
fn a_check_whose_port_is_a_door_of_the_balancer_is_known_for_one() {
    let here: std::net::IpAddr = [127, 0, 0, 1].into();
    // 8084 is the operators' door, and 6000 that of `pg`.
    for (port, is_door) in
        [(Some(8084), true), (Some(6000), true), (Some(8008), false), (None, false)]
    {
        let mut config = config(&[], CheckConfig { port, ..check() });
        config.services[0].listen = vec![(here, 6000).into()];
        let (mut hub, _worker) = hub(config);
        for (ip, is_door, now) in [(here, is_door, at(20)), (address(1).ip(), false, at(60))] {
            let own = Registration {
                source: Source::Connection(1),
                service: PG,
                address: (ip, 1).into(),
                weight: 1,
                name: None,
                group: None,
                proxy: false,
                http2: false,
                tls: None,
                probe: true,
                check: None,
            };
            hub.apply(Change::Register(own), now).unwrap();
            let (due, target) = hub.next_check(now.plus(Duration::from_millis(20))).unwrap();
            assert_eq!(target.is_own_door, is_door, "{:?}", target.port);
            hub.checked(due, Ok(()), Duration::ZERO, now);
        }
    }
}

#[test]
fn the_status_shows_of_a_check_what_the_table_says_and_nothing_else() {
    let terms = |check: CheckConfig, probe: bool| {
        let mut config = config(&[(1, 1)], check);
        config.services[0].probe = probe;
        let (hub, _worker) = hub(config);
        let shown = view::status(&hub, super::super::status::Doors::default(), at(1));
        shown.services[3].terms.clone()
    };
    assert_eq!(terms(CheckConfig::default(), true), [""; 0]);
    let tcp = CheckConfig { kind: CheckKind::Tcp, ..CheckConfig::default() };
    assert_eq!(terms(tcp.clone(), false), ["probe = false", "check.kind = \"tcp\""]);
    let when_all_fail = WhenAllFail::Serve;
    assert_eq!(
        terms(CheckConfig { fall: 1, when_all_fail, ..tcp }, true),
        ["check.kind = \"tcp\"", "check.fall = 1", "check.when_all_fail = \"serve\""]
    );
}

/// Backends of `pg` by port and group, with these shares.
fn grouped(backends: &[(u16, &str)], shares: &[(&str, u8)]) -> Config {
    let mut config = config(&[], CheckConfig::default());
    let listed = |(port, group): &(u16, &str)| StaticBackend {
        address: address(*port),
        weight: 1,
        group: Some((*group).to_owned()),
        proxy: false,
        http2: false,
        tls: None,
    };
    let share = |(name, share): &(&str, u8)| GroupShare { name: (*name).into(), share: *share };
    config.services[0].backends = backends.iter().map(listed).collect();
    config.services[0].groups = shares.iter().map(share).collect();
    config
}

#[test]
fn rule_9_a_shift_is_one_publication_and_lasts_until_the_next_reload() {
    let both = [(1, "blue"), (2, "green")];
    let file = grouped(&both, &[("blue", 95), ("green", 5)]);
    let (mut hub, _worker) = hub(file.clone());
    let shares = |hub: &Hub| -> Vec<(u8, u8)> {
        let groups = view::groups(hub, hub.registry.service(PG));
        groups.iter().map(|it| (it.share, it.file_share)).collect()
    };
    let before = hub.snapshot.version;
    let wanted = [("blue".to_owned(), 0), ("green".to_owned(), 100)];
    hub.shift("pg", &wanted).unwrap();
    assert_eq!(rotation(&mut hub), [2]);
    hub.shift("pg", &wanted).unwrap();
    hub.publish();
    assert_eq!(hub.snapshot.version, before + 1, "what changes nothing is not published");
    assert_eq!(shares(&hub), [(0, 95), (100, 5)]);
    for (wanted, part) in [
        (("red".to_owned(), 5), "has no group red"),
        (("green".to_owned(), 0), "give one of its groups a share above 0"),
        (("green".to_owned(), 101), "from 0 to 100, not green=101"),
    ] {
        let said = hub.shift("pg", &[wanted]).unwrap_err();
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(shares(&hub), [(0, 95), (100, 5)], "what is refused leaves no trace");
    reload(&mut hub, file, at(1));
    assert_eq!(hub.snapshot.version, before + 2);
    assert_eq!((rotation(&mut hub), shares(&hub)), (vec![1, 2], vec![(95, 95), (5, 5)]));
}

#[test]
fn a_reload_gives_listed_backends_the_groups_that_the_file_gives_them() {
    let shares = [("blue", 100), ("green", 0)];
    let (mut hub, _worker) = hub(config(&[(1, 1), (2, 1)], CheckConfig::default()));
    let first = id_of(&hub, 1);
    reload(&mut hub, grouped(&[(1, "blue"), (2, "green")], &shares), at(1));
    assert_eq!(rotation(&mut hub), [1]);
    assert_eq!(id_of(&hub, 1), first, "it keeps its sessions");
    reload(&mut hub, grouped(&[(1, "green"), (2, "blue")], &shares), at(2));
    assert_eq!(rotation(&mut hub), [2]);
    reload(&mut hub, config(&[(1, 1), (2, 1)], CheckConfig::default()), at(3));
    assert_eq!(rotation(&mut hub), [1, 2], "without groups, everybody serves");
}

#[test]
fn a_reload_changes_whether_a_listed_backend_gets_proxy_headers() {
    let of = |proxy: bool, weight: u16| {
        let mut config = config(&[(1, weight), (2, 1)], CheckConfig::default());
        config.services[0].backends[0].proxy = proxy;
        config
    };
    let (mut hub, _worker) = hub(of(false, 1));
    let listed = |hub: &mut Hub| {
        hub.publish();
        let backends = hub.snapshot.pool(PG).unwrap().backends.iter();
        backends.map(|it| (it.id, it.proxy, it.weight)).collect::<Vec<_>>()
    };
    let before = listed(&mut hub);
    assert_eq!(before.iter().map(|it| it.1).collect::<Vec<_>>(), [false, false]);
    for (number, (proxy, weight)) in (1..).zip([(true, 1), (true, 2), (false, 2), (true, 3)]) {
        reload(&mut hub, of(proxy, weight), at(number * 10));
        assert_eq!(listed(&mut hub), [(before[0].0, proxy, weight), before[1]], "{proxy} {weight}");
    }
}

/// Two rounds of the tick, each after a whole turn of the worker.
fn pass(hub: &mut Hub, worker: &WorkerEnd, from: u64, to: u64) {
    for ms in (from..=to).step_by(100) {
        worker.metrics.counters.turns.add(2);
        hub.tick(at(ms));
        hub.publish();
    }
}

#[test]
fn rule_11_what_a_worker_said_of_the_last_session_is_heard_before_its_service_is_forgotten() {
    let (mut hub, mut worker) = hub(config(&[(1, 1)], CheckConfig::default()));
    let place = worker.shard.open(PG, address(9), at(0)).unwrap();
    reload(&mut hub, Config::default(), at(10));
    pass(&mut hub, &worker, 400, 3_000);
    assert!(hub.is_leaving(PG), "a session is left");
    // It ends after the reports have been heard, and before the table is searched.
    let id = worker.shard.id(&place);
    worker.shard.close(place);
    hub.advance_leaving(true, at(5_000));
    let (client, started, ended) = (address(9), at(0), at(5_000));
    let (backend, bytes_up, bytes_down, reason) = (None, 0, 0, EndReason::Finished);
    let said = crate::worker::link::Ended {
        id,
        service: PG,
        client,
        is_tls: false,
        backend,
        started,
        ended,
        bytes_up,
        bytes_down,
        reason,
    };
    worker.reports.push(Report::Ended(said)).unwrap();
    assert!(hub.registry.has_service(PG), "it may have been spoken of");
    hub.tick(at(5_100));
    assert!(!hub.registry.has_service(PG));
    worker.reports.push(Report::Ended(said)).unwrap();
    hub.tick(at(5_200));
}

#[test]
fn rule_11_a_service_stays_while_somebody_has_yet_to_say_for_whom_it_connects() {
    let (mut hub, worker) = hub(config(&[], CheckConfig::default()));
    let gate = Arc::clone(&hub.registry.service(PG).gate);
    gate.wait();
    reload(&mut hub, Config::default(), at(10));
    pass(&mut hub, &worker, 400, 60_000);
    assert!(hub.is_leaving(PG), "whatever patience the settings have with such users meanwhile");
    gate.wait_over();
    pass(&mut hub, &worker, 62_000, 62_200);
    assert!(!hub.is_leaving(PG) && !hub.registry.has_service(PG));
}
