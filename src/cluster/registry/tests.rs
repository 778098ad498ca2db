//! How the registry responds to changes, as a table of behaviour.

mod alike;
mod claims;
mod drains;
mod reached;

use super::*;
use crate::cluster::rotation::tests::Random;
use crate::cluster::{Policy, Protocol, WhenAllFail};

const NOW: Now = Now::from_nanos(7);
const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);
const UDP: ServiceId = ServiceId::built_in(Protocol::Udp);
const API: ServiceId = ServiceId::built_in(Protocol::Api);
const NOBODY: [u16; 0] = [];

/// A registry of the built-in services, with room for `places` backends.
fn registry(places: usize) -> Registry {
    Registry::new(places, &Snapshot::default().services)
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], port))
}

fn join(source: u64, service: ServiceId, port: u16, weight: u16) -> Change {
    Change::Register(Registration {
        proxy: false,
        http2: false,
        tls: None,
        probe: true,
        check: None,
        source: Source::Connection(source),
        service,
        address: address(port),
        weight,
        name: None,
        group: None,
    })
}

fn unregister(source: u64, service: ServiceId, port: u16) -> Change {
    Change::Unregister { source: Source::Connection(source), service, address: address(port) }
}

fn undrain(source: u64, service: ServiceId, port: u16) -> Change {
    let (source, address) = (Source::Connection(source), address(port));
    Change::Undrain { source, service, address }
}

fn drain(source: u64, service: ServiceId, port: u16) -> Change {
    let (source, address) = (Source::Connection(source), address(port));
    Change::Drain { source, service, address, lasts: Lasts::AsSet }
}

fn source_lost(source: u64) -> Change {
    Change::SourceLost { source: Source::Connection(source), why: "it is gone" }
}

fn ports(snapshot: &Snapshot, service: ServiceId) -> Vec<u16> {
    let pool = snapshot.pool(service).unwrap();
    let turns = pool.rotation.turns();
    turns.map(|place| pool.backends[usize::from(place)].address.port()).collect()
}

/// Applies a change that makes a difference, and returns what workers see of it.
fn shown(registry: &mut Registry, change: Change) -> Snapshot {
    assert!(registry.apply(change, NOW).unwrap().changed);
    registry.freeze(true)
}

#[test]
fn a_repeated_registration_says_anew_whether_connections_begin_with_a_header() {
    let mut registry = registry(4);
    let joins = |proxy| match join(1, TCP, 80, 1) {
        Change::Register(wanted) => Change::Register(Registration { proxy, ..wanted }),
        other => other,
    };
    for proxy in [true, false, true] {
        let snapshot = shown(&mut registry, joins(proxy));
        let backends = &snapshot.pool(TCP).unwrap().backends;
        assert_eq!(backends.iter().map(|it| it.proxy).collect::<Vec<_>>(), [proxy]);
        assert!(!registry.apply(joins(proxy), NOW).unwrap().changed, "the same again");
    }
}

#[test]
fn a_second_registration_on_the_same_connection_changes_nothing() {
    let mut registry = registry(4);
    let first = registry.apply(join(1, TCP, 80, 2), NOW).unwrap();
    assert!(first.changed);
    assert_eq!(registry.freeze(true).version, 1);
    let again = registry.apply(join(1, TCP, 80, 2), NOW).unwrap();
    assert_eq!(again.backend, first.backend);
    assert!(!again.changed);
    let heavier = registry.apply(join(1, TCP, 80, 3), NOW).unwrap();
    assert_eq!(heavier.backend, first.backend);
    assert!(heavier.changed);
    let snapshot = registry.freeze(true);
    assert_eq!((snapshot.version, snapshot.backends().next().unwrap().weight), (2, 3));
}

#[test]
fn a_second_owner_is_refused_as_long_as_the_first_is_there() {
    let mut registry = registry(4);
    registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
    let refused = registry.apply(join(2, TCP, 80, 1), NOW).unwrap_err();
    let by = Source::Connection(1);
    let fault = Fault::OwnedByAnother { service: "tcp".into(), address: address(80), by };
    assert_eq!(refused, fault);
    let told = "tcp 192.0.2.1:80 is registered over another connection";
    assert_eq!(refused.to_string(), told);
    assert!(registry.apply(join(2, UDP, 80, 1), NOW).is_ok(), "another service");
    let refused = registry.apply(unregister(2, TCP, 80), NOW).unwrap_err();
    let told = "tcp 192.0.2.1:80 is not registered over this connection";
    assert_eq!(refused.to_string(), told);
    registry.apply(source_lost(1), NOW).unwrap();
    assert!(registry.apply(join(2, TCP, 80, 1), NOW).is_ok());
}

#[test]
fn the_loss_of_a_connection_takes_all_of_its_backends_and_no_others() {
    let mut registry = registry(4);
    for (source, port) in [(1, 80), (2, 81), (1, 82)] {
        registry.apply(join(source, TCP, port, 1), NOW).unwrap();
    }
    let lost = registry.apply(source_lost(1), NOW).unwrap();
    assert_eq!(lost.left.iter().map(|it| it.backend.address.port()).collect::<Vec<_>>(), [80, 82]);
    assert_eq!(ports(&registry.freeze(true), TCP), [81]);
    let nothing = registry.apply(source_lost(1), NOW).unwrap();
    assert!(lost.changed && !nothing.changed);
}

#[test]
fn a_place_is_given_out_again_only_after_its_sessions_ended() {
    let mut registry = registry(2);
    let first = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    registry.apply(join(1, TCP, 81, 1), NOW).unwrap();
    registry.apply(unregister(1, TCP, 80), NOW).unwrap();
    let full = registry.apply(join(1, TCP, 82, 1), NOW).unwrap_err();
    assert_eq!(full, Fault::Full { places: 2 });
    registry.sessions_ended(first);
    registry.sessions_ended(first);
    let joined = registry.apply(join(1, TCP, 82, 1), NOW).unwrap();
    let id = joined.backend.unwrap();
    assert_ne!(id, first, "the place is the same, the backend is not");
    assert_eq!(registry.freeze(true).get(TCP, id).unwrap().slot, 0);
    assert!(registry.apply(join(1, TCP, 83, 1), NOW).is_err());
}

#[test]
fn a_backend_set_aside_is_served_only_when_nobody_else_is_left() {
    let mut registry = registry(4);
    let first = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    let second = registry.apply(join(1, TCP, 81, 1), NOW).unwrap().backend.unwrap();
    let one = shown(&mut registry, Change::SetAside { backend: first });
    assert_eq!(ports(&one, TCP), [81]);
    let again = registry.apply(Change::SetAside { backend: first }, NOW).unwrap();
    assert!(!again.changed, "it is aside already");
    let both = shown(&mut registry, Change::SetAside { backend: second });
    assert_eq!(ports(&both, TCP), [80, 81]);
    let back = shown(&mut registry, Change::Restore { backend: first });
    assert_eq!(ports(&back, TCP), [80]);
}

/// A registry in which backends are checked, and these two have joined TCP.
fn checked(when_all_fail: WhenAllFail) -> (Registry, [BackendId; 2]) {
    let mut registry = registry(4);
    registry.agree(|_| Terms { checks: Some(when_all_fail), ..Terms::default() });
    let ids =
        [80, 81].map(|port| registry.apply(join(1, TCP, port, 1), NOW).unwrap().backend.unwrap());
    (registry, ids)
}

fn judge(backend: BackendId, passes: bool) -> Change {
    Change::Judge { backend, passes }
}

#[test]
fn a_checked_backend_serves_from_its_first_passed_check_on_until_the_check_fails() {
    let (mut registry, [first, second]) = checked(WhenAllFail::Refuse);
    assert_eq!(ports(&registry.freeze(true), TCP), NOBODY, "nobody has passed yet");
    let one = shown(&mut registry, judge(first, true));
    assert_eq!(ports(&one, TCP), [80]);
    assert_eq!(one.get(TCP, second).unwrap().standing, Standing::Failing);
    assert_eq!(ports(&shown(&mut registry, judge(second, true)), TCP), [80, 81]);
    assert!(!registry.apply(judge(second, true), NOW).unwrap().changed, "nothing new");
    assert_eq!(ports(&shown(&mut registry, judge(first, false)), TCP), [81]);
    let again = registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
    assert!(!again.changed, "to register again is no proof");
    assert_eq!(ports(&shown(&mut registry, judge(first, true)), TCP), [80, 81]);
    assert!(!registry.apply(judge(BackendId(99), false), NOW).unwrap().changed, "it has left");
}

#[test]
fn those_aside_are_tried_before_those_that_fail_and_these_only_if_the_terms_say_so() {
    for (when_all_fail, last) in [(WhenAllFail::Refuse, &[][..]), (WhenAllFail::Serve, &[80, 81])] {
        let (mut registry, [first, second]) = checked(when_all_fail);
        registry.apply(judge(first, true), NOW).unwrap();
        let aside = shown(&mut registry, Change::SetAside { backend: first });
        assert_eq!(ports(&aside, TCP), [80], "{when_all_fail:?}");
        let failing = shown(&mut registry, judge(first, false));
        assert_eq!(ports(&failing, TCP), last, "{when_all_fail:?}");
        registry.apply(judge(second, true), NOW).unwrap();
        assert_eq!(ports(&registry.freeze(true), TCP), [81], "{when_all_fail:?}");
    }
}

#[test]
fn a_backend_serves_only_if_neither_its_check_nor_its_port_says_no_and_it_does_not_drain() {
    use Standing::{Aside, Draining, Failing, Serving};
    let (mut registry, [backend, _]) = checked(WhenAllFail::Refuse);
    for (change, standing) in [
        (Change::SetAside { backend }, Failing),
        (judge(backend, true), Serving),
        (Change::SetAside { backend }, Aside),
        (judge(backend, true), Aside),
        (judge(backend, false), Failing),
        (judge(backend, true), Aside),
        (judge(backend, false), Failing),
        (Change::Restore { backend }, Failing),
        (judge(backend, true), Serving),
        (Change::SetAside { backend }, Aside),
        (Change::Restore { backend }, Serving),
        (drain(1, TCP, 80), Draining),
        (Change::SetAside { backend }, Draining),
        (judge(backend, false), Draining),
        (join(1, TCP, 80, 1), Failing),
        (judge(backend, true), Serving),
        (judge(backend, false), Failing),
        (Change::DrainBackend { backend, lasts: Lasts::AsSet }, Draining),
        (judge(backend, true), Draining),
        (join(1, TCP, 80, 1), Draining),
        (Change::UndrainBackend { backend }, Serving),
    ] {
        let before = registry.get(backend).unwrap().backend.standing;
        let changed = registry.apply(change.clone(), NOW).unwrap().changed;
        let after = registry.get(backend).unwrap().backend.standing;
        assert_eq!((after, changed), (standing, after != before), "{change:?}");
    }
}

#[test]
fn a_check_that_comes_later_puts_nobody_out_and_one_that_goes_lets_everybody_back_in() {
    let mut registry = registry(4);
    let backend = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    let checked = Terms { checks: Some(WhenAllFail::Refuse), ..Terms::default() };
    assert!(registry.agree(|_| checked.clone()));
    assert_eq!(ports(&registry.freeze(true), TCP), [80], "it served already");
    assert_eq!(ports(&shown(&mut registry, judge(backend, false)), TCP), NOBODY);
    registry.agree(|_| Terms { checks: Some(WhenAllFail::Serve), ..checked.clone() });
    assert_eq!(ports(&registry.freeze(true), TCP), [80], "to be tried all the same");
    registry.agree(|_| checked.clone());
    assert_eq!(ports(&registry.freeze(true), TCP), NOBODY);
    registry.agree(|_| Terms::default());
    assert_eq!(ports(&registry.freeze(true), TCP), [80]);
}

#[test]
fn a_backend_of_the_configuration_is_nobody_elses() {
    let mut registry = registry(4);
    let listed = Registration {
        proxy: false,
        http2: false,
        tls: None,
        probe: true,
        check: None,
        source: Source::File,
        service: TCP,
        address: address(80),
        weight: 1,
        name: None,
        group: None,
    };
    registry.apply(Change::Register(listed), NOW).unwrap();
    let refused = registry.apply(join(1, TCP, 80, 1), NOW).unwrap_err();
    assert_eq!(refused.to_string(), "tcp 192.0.2.1:80 is registered in the configuration");
    assert!(registry.apply(unregister(1, TCP, 80), NOW).is_err());
    registry.apply(source_lost(1), NOW).unwrap();
    let (service, address) = (TCP, address(80));
    let gone = Change::Unregister { source: Source::File, service, address };
    assert_eq!(registry.apply(gone, NOW).unwrap().left.len(), 1);
}

#[test]
fn a_draining_backend_is_never_served_and_comes_back_by_registering() {
    let mut registry = registry(4);
    let id = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    let drain = drain(1, TCP, 80);
    let draining = shown(&mut registry, drain);
    assert!(ports(&draining, TCP).is_empty());
    assert_eq!(draining.get(TCP, id).unwrap().standing, Standing::Draining);
    let aside = registry.apply(Change::SetAside { backend: id }, NOW).unwrap();
    assert!(!aside.changed, "a drain is not undone by a failed connection");
    assert!(!registry.apply(Change::Restore { backend: id }, NOW).unwrap().changed);
    let back = shown(&mut registry, join(1, TCP, 80, 1));
    assert_eq!(ports(&back, TCP), [80]);
}

#[test]
fn an_operator_changes_a_weight_within_its_bounds_and_nothing_else() {
    let mut registry = registry(4);
    let first = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    registry.apply(join(1, TCP, 81, 1), NOW).unwrap();
    let heavier = shown(&mut registry, Change::Weigh { backend: first, weight: 2 });
    assert_eq!(ports(&heavier, TCP), [80, 81, 80]);
    let mut weigh = |backend, weight| registry.apply(Change::Weigh { backend, weight }, NOW);
    assert!(!weigh(first, 2).unwrap().changed, "it has that weight already");
    let backend = BackendId(99);
    assert_eq!(weigh(backend, 2).unwrap_err(), Fault::Unknown { backend });
    for weight in [0, WEIGHT_MAX + 1] {
        assert_eq!(weigh(first, weight).unwrap_err(), Fault::WeightOutOfRange);
    }
}

/// The services whose pool in the second snapshot is not that of the first.
fn refrozen(before: &Snapshot, after: &Snapshot) -> Vec<ServiceId> {
    let pairs = before.services.iter().zip(&after.services);
    let changed = pairs.filter(|(one, other)| !Arc::ptr_eq(&one.pool, &other.pool));
    changed.map(|(_, other)| other.id).collect()
}

#[test]
fn only_the_pool_about_which_something_has_changed_is_frozen_anew() {
    let mut registry = registry(4);
    let backend = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    registry.apply(join(2, UDP, 80, 1), NOW).unwrap();
    let mut before = registry.freeze(true);
    for (change, services) in [
        (join(1, API, 80, 1), vec![API]),
        (join(1, TCP, 80, 2), vec![TCP]),
        (Change::Weigh { backend, weight: 3 }, vec![TCP]),
        (Change::SetAside { backend }, vec![TCP]),
        (Change::Restore { backend }, vec![TCP]),
        (drain(2, UDP, 80), vec![UDP]),
        (Change::DrainBackend { backend, lasts: Lasts::AsSet }, vec![TCP]),
        (unregister(2, UDP, 80), vec![UDP]),
        (source_lost(1), vec![TCP, API]),
    ] {
        let after = shown(&mut registry, change.clone());
        assert_eq!(refrozen(&before, &after), services, "{change:?}");
        assert_consistent(&registry, &after);
        before = after;
    }
    assert_eq!(refrozen(&before, &registry.freeze(true)), [], "nothing has happened");
}

#[test]
fn other_terms_change_neither_the_pools_nor_the_turns_nor_the_seats() {
    let mut registry = registry(4);
    registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
    let before = registry.freeze(true);
    let terms = Terms { policy: Policy::LeastSessions, ..Terms::default() };
    assert!(
        registry.agree(|_| terms.clone()) && !registry.agree(|_| terms.clone()),
        "only the first time is it new"
    );
    let after = registry.freeze(true);
    assert_eq!((after.version, refrozen(&before, &after)), (before.version + 1, vec![]));
    for (one, other) in before.services.iter().zip(&after.services) {
        assert_eq!((&one.terms, &other.terms), (&Terms::default(), &terms));
        assert!(Arc::ptr_eq(&one.turn, &other.turn) && Arc::ptr_eq(&one.seats, &other.seats));
    }
}

#[test]
fn a_pool_has_a_table_while_its_policy_goes_by_one() {
    let mut registry = registry(4);
    registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
    registry.apply(join(1, TCP, 81, 1), NOW).unwrap();
    for policy in [Policy::RoundRobin, Policy::SourceHash, Policy::LeastSessions] {
        registry.agree(|_| Terms { policy, ..Terms::default() });
        let snapshot = registry.freeze(true);
        let has_table = |id| snapshot.pool(id).unwrap().table.is_some();
        assert_eq!(has_table(TCP), policy == Policy::SourceHash, "{policy:?}");
        assert!(!has_table(UDP), "nobody is there");
    }
}

#[test]
fn the_doors_stay_from_snapshot_to_snapshot() {
    let mut registry = registry(4);
    let doors = Arc::<Doors>::default();
    registry.set_doors(Arc::clone(&doors));
    for port in [80, 81] {
        let snapshot = shown(&mut registry, join(1, API, port, 1));
        assert!(Arc::ptr_eq(&snapshot.doors, &doors));
    }
}

#[test]
fn turns_and_seats_stay_the_services_own_whoever_comes_and_goes() {
    let mut registry = registry(4);
    let before = registry.freeze(true);
    let after = shown(&mut registry, join(1, TCP, 80, 1));
    for (one, other) in before.services.iter().zip(&after.services) {
        assert_eq!((one.id, &one.name, one.kind), (other.id, &other.name, other.kind));
        assert!(Arc::ptr_eq(&one.turn, &other.turn) && Arc::ptr_eq(&one.seats, &other.seats));
    }
}

#[test]
fn whatever_happens_the_snapshot_is_consistent() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let mut registry = registry(6);
        let mut last = 0;
        for _ in 0..300 {
            let change = random_change(&mut random);
            let applied = registry.apply(change.clone(), NOW);
            let Ok(applied) = applied else { continue };
            if applied.changed && random.below(3) > 0 {
                let snapshot = registry.freeze(true);
                assert_eq!(snapshot.version, last + 1, "seed {seed}: {change:?}");
                last = snapshot.version;
                assert_consistent(&registry, &snapshot);
            }
            for left in &applied.left {
                if random.below(2) == 0 {
                    registry.sessions_ended(left.backend.id);
                }
            }
            if random.below(40) == 0 {
                let ids: Vec<_> = registry.departed.keys().copied().collect();
                ids.into_iter().for_each(|id| registry.sessions_ended(id));
            }
        }
    }
}

fn random_change(random: &mut Random) -> Change {
    let number = random.below(3);
    let service = [TCP, UDP, API][random.below(3) as usize];
    let port = 80 + random.below(4) as u16;
    let backend = BackendId(random.below(60) as u32);
    match random.below(12) {
        0..=3 => join(number, service, port, random.below(5) as u16),
        4 => unregister(number, service, port),
        5 => drain(number, service, port),
        6 if random.below(4) == 0 => source_lost(number),
        6 => Change::Leave { backend },
        7 => Change::SetAside { backend },
        8 => match random.below(3) {
            0 => Change::UndrainBackend { backend },
            1 => undrain(number, service, port),
            _ => Change::DrainBackend { backend, lasts: Lasts::AsSet },
        },
        9 | 10 => judge(backend, random.below(3) > 0),
        _ => Change::Restore { backend },
    }
}

fn assert_consistent(registry: &Registry, snapshot: &Snapshot) {
    let mut slots: Vec<u16> = snapshot.backends().map(|it| it.slot).collect();
    slots.extend(registry.departed.values());
    slots.extend(&registry.free);
    slots.sort_unstable();
    assert_eq!(slots, (0..registry.places as u16).collect::<Vec<_>>(), "each place once");
    let mut keys: Vec<_> = snapshot.backends().map(|it| (it.service, it.address)).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), registry.len(), "one source for each address");
    snapshot.services.iter().for_each(assert_pool_is_consistent);
    for entry in registry.entries() {
        let Backend { id, service, address, .. } = entry.backend;
        assert_eq!(registry.find(service, address).map(|it| it.backend.id), Some(id));
        assert!(registry.of_source(entry.source).any(|it| it.backend.id == id));
        assert_eq!(snapshot.get(service, id), Some(&entry.backend), "the snapshot is up to date");
    }
    let owned: usize = registry.by_source.values().map(BTreeSet::len).sum();
    assert_eq!((registry.by_address.len(), owned), (registry.len(), registry.len()));
}

/// Every backend in it belongs to this service, and is served as often as its weight says.
fn assert_pool_is_consistent(service: &Service) {
    let Pool { backends, rotation, .. } = &*service.pool;
    assert!(backends.is_sorted_by(|a, b| a.id < b.id));
    let is_serving = |it: &&Backend| it.standing == Standing::Serving;
    let wanted = match backends.iter().filter(is_serving).count() {
        0 => Standing::Aside,
        _ => Standing::Serving,
    };
    let weights = backends.iter().filter(|it| it.standing == wanted);
    let all: u64 = weights.map(|it| u64::from(it.weight)).sum();
    for (place, backend) in (0u16..).zip(backends) {
        assert_eq!(backend.service, service.id);
        let turns = rotation.turns().filter(|it| *it == place).count() as u64;
        let due = backend.standing == wanted;
        let expected = if due { u64::from(backend.weight) * rotation.round() } else { 0 };
        assert_eq!(turns * all, expected, "{backend:?} in {rotation:?}");
    }
}

/// A registration in a group.
fn join_in(source: u64, port: u16, group: Option<&str>) -> Change {
    let Change::Register(wanted) = join(source, TCP, port, 1) else { unreachable!() };
    Change::Register(Registration { group: group.map(Into::into), ..wanted })
}

#[test]
fn a_backend_joins_one_of_the_groups_of_its_service_if_there_are_any() {
    let mut registry = registry(4);
    let said = |registry: &mut Registry, group| {
        registry.apply(join_in(1, 80, group), NOW).map(drop).map_err(|fault| fault.to_string())
    };
    assert_eq!(
        said(&mut registry, Some("blue")).unwrap_err(),
        "service tcp has no groups, so leave out group blue"
    );
    assert!(registry.group(TCP, &[("blue", 95), ("green", 5)]));
    assert!(!registry.group(TCP, &[("blue", 95), ("green", 5)]), "nothing new");
    assert_eq!(
        said(&mut registry, Some("red")).unwrap_err(),
        "service tcp has no group red; its groups are blue, green"
    );
    assert_eq!(
        said(&mut registry, None).unwrap_err(),
        "service tcp has groups, so name one of them: blue, green"
    );
    assert_eq!(said(&mut registry, Some("green")), Ok(()));
    let again = registry.apply(join_in(1, 80, Some("blue")), NOW).unwrap();
    assert!(again.changed && !again.joined, "a backend may change its group");
    let snapshot = registry.freeze(true);
    let [backend] = &snapshot.pool(TCP).unwrap().backends[..] else { panic!() };
    assert_eq!(backend.group.as_deref(), Some("blue"));
}

#[test]
fn rule_9_a_shift_rebuilds_one_pool_and_keeps_the_turns() {
    let mut registry = registry(4);
    registry.group(TCP, &[("blue", 95), ("green", 5)]);
    for (port, group) in [(80, "blue"), (81, "green")] {
        registry.apply(join_in(1, port, Some(group)), NOW).unwrap();
    }
    let before = registry.freeze(true);
    let turns = |snapshot: &Snapshot| {
        let groups = &snapshot.service(TCP).unwrap().groups;
        groups.iter().map(|group| Arc::as_ptr(&group.turn)).collect::<Vec<_>>()
    };
    assert!(registry.group(TCP, &[("blue", 0), ("green", 100)]));
    let after = registry.freeze(true);
    assert_eq!(turns(&before), turns(&after));
    assert!(Arc::ptr_eq(&before.service(UDP).unwrap().pool, &after.service(UDP).unwrap().pool));
    let serving = |snapshot: &Snapshot| -> Vec<u16> {
        snapshot.pool(TCP).unwrap().in_rotation().map(|it| it.address.port()).collect()
    };
    assert_eq!((serving(&before), serving(&after)), (vec![80, 81], vec![81]));
}

#[test]
fn who_is_set_aside_and_who_is_of_a_service_is_known_without_looking_at_everyone() {
    let mut random = Random(23);
    let mut registry = registry(40);
    for _ in 0..4_000 {
        let port = random.below(30) as u16;
        let place = random.below(1 + registry.len() as u64) as usize;
        let backend = registry.entries().nth(place).map_or(BackendId(0), |it| it.backend.id);
        let (source, service) = (u64::from(port % 3), [TCP, UDP, API][usize::from(port % 2)]);
        let change = match random.below(8) {
            0 => join(source, service, port, 1),
            1 => unregister(source, service, port),
            2 => drain(source, service, port),
            3 | 4 => Change::SetAside { backend },
            5 => Change::Restore { backend },
            6 => Change::Judge { backend, passes: random.below(2) == 0 },
            _ if random.below(20) == 0 => source_lost(source),
            _ => Change::Judge { backend, passes: true },
        };
        for gone in registry.apply(change, NOW).map_or_else(|_| Vec::new(), |it| it.left) {
            registry.sessions_ended(gone.backend.id);
        }
        let of = |fits: &dyn Fn(&Backend) -> bool| -> Vec<BackendId> {
            let all = registry.entries().map(|entry| &entry.backend);
            all.filter(|backend| fits(backend)).map(|backend| backend.id).collect()
        };
        assert!(registry.aside().eq(of(&|it| it.standing == Standing::Aside)));
        for service in [TCP, UDP, API] {
            let own = registry.of_service(service).map(|entry| entry.backend.id);
            assert!(own.eq(of(&|it| it.service == service)));
        }
        let snapshot = registry.freeze(true);
        for pool in snapshot.services.iter().map(|service| &service.pool) {
            let served: Vec<BackendId> = pool.in_rotation().map(|it| it.id).collect();
            assert!(pool.backends.iter().all(|it| pool.serves(it.id) == served.contains(&it.id)));
        }
    }
}
