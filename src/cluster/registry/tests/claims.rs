//! A backend that several balancers have registered.

use super::*;

fn claimed(port: u16, weight: u16) -> Registration {
    match join(0, TCP, port, weight) {
        Change::Register(wanted) => Registration { source: Source::Cluster, ..wanted },
        other => panic!("{other:?}"),
    }
}

pub(super) fn claim(port: u16, weight: u16) -> Change {
    Change::Claim { wanted: claimed(port, weight), drains: None }
}

pub(super) fn unclaim(port: u16) -> Change {
    Change::Unclaim { service: TCP, address: address(port), is_lost: false, why: "it left there" }
}

fn standing(registry: &Registry, port: u16) -> Option<Standing> {
    registry.find(TCP, address(port)).map(|entry| entry.backend.standing)
}

#[test]
fn what_is_claimed_serves_like_any_other_and_leaves_with_the_claim() {
    let mut registry = registry(4);
    let joined = registry.apply(claim(80, 2), NOW).unwrap();
    assert!(joined.joined && joined.changed);
    let again = registry.apply(claim(80, 2), NOW).unwrap();
    assert_eq!((again.backend, again.joined, again.changed), (joined.backend, false, false));
    registry.apply(claim(81, 1), NOW).unwrap();
    assert_eq!(ports(&registry.freeze(true), TCP), [80, 81, 80]);
    assert_eq!(ports(&shown(&mut registry, claim(80, 1)), TCP), [80, 81], "another weight");
    registry.apply(unclaim(81), NOW).unwrap();
    let left = registry.apply(unclaim(80), NOW).unwrap();
    assert_eq!((left.left.len(), left.changed, registry.len()), (1, true, 0));
    assert!(!registry.apply(unclaim(80), NOW).unwrap().changed, "once");
    assert_eq!(registry.of_source(Source::Cluster).count(), 0);
}

#[test]
fn a_backend_keeps_its_id_for_as_long_as_anybody_has_registered_it() {
    let mut registry = registry(4);
    let id = registry.apply(claim(80, 1), NOW).unwrap().backend;
    let here = registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
    assert_eq!((here.backend, here.joined), (id, false));
    let entry = registry.find(TCP, address(80)).unwrap();
    assert_eq!((entry.source, entry.is_claimed), (Source::Connection(1), true));
    let other = registry.apply(join(2, TCP, 80, 1), NOW);
    assert!(matches!(other, Err(Fault::OwnedByAnother { by: Source::Connection(1), .. })));
    for ends in [source_lost(1), unregister(1, TCP, 80)] {
        let ended = registry.apply(ends, NOW).unwrap();
        assert!(ended.left.is_empty() && ended.kept.iter().eq(&id), "{ended:?}");
        assert_eq!(registry.find(TCP, address(80)).unwrap().source, Source::Cluster);
        assert_eq!(registry.of_source(Source::Connection(1)).count(), 0);
        registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
    }
    assert!(registry.apply(unclaim(80), NOW).unwrap().left.is_empty());
    assert_eq!(registry.apply(source_lost(1), NOW).unwrap().left.len(), 1);
}

#[test]
fn a_backend_is_what_the_newest_word_makes_it() {
    let mut registry = registry(4);
    registry.apply(join(1, TCP, 80, 3), NOW).unwrap();
    assert!(registry.apply(claim(80, 5), NOW).unwrap().changed);
    assert_eq!(registry.find(TCP, address(80)).unwrap().backend.weight, 5);
    assert!(registry.apply(join(1, TCP, 80, 2), NOW).unwrap().changed);
    assert_eq!(registry.find(TCP, address(80)).unwrap().backend.weight, 2);
}

#[test]
fn a_drain_elsewhere_is_one_here_until_it_is_taken_back_there() {
    let mut registry = registry(4);
    registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
    for port in [80, 81] {
        for by in [DrainedBy::Owner, DrainedBy::Operator] {
            let drains = Change::Claim { wanted: claimed(port, 1), drains: Some(by) };
            let backend = registry.apply(drains, NOW).unwrap().backend.unwrap();
            assert_eq!(standing(&registry, port), Some(Standing::Draining));
            assert_eq!(registry.get(backend).unwrap().drained_by(), Some(by));
            let taken_back = registry.apply(Change::UndrainBackend { backend }, NOW);
            assert!(taken_back.is_err() || by == DrainedBy::Operator);
            assert_eq!(standing(&registry, port), Some(Standing::Draining), "not here");
        }
        registry.apply(claim(port, 1), NOW).unwrap();
        assert_eq!(standing(&registry, port), Some(Standing::Serving));
    }
    registry.apply(drain(1, TCP, 80), NOW).unwrap();
    assert!(registry.apply(source_lost(1), NOW).unwrap().left.is_empty());
    assert_eq!(standing(&registry, 80), Some(Standing::Serving), "its drain went with it");
}

#[test]
fn a_claimed_backend_that_is_reached_otherwise_is_another_one() {
    let tls = Some(crate::tls::backends::BackendTls::default());
    for (wanted, fault) in [
        (Registration { tls, ..claimed(80, 1) }, Fault::TlsChanges { address: address(80) }),
        (
            Registration { http2: true, ..claimed(80, 1) },
            Fault::HttpChanges { address: address(80) },
        ),
    ] {
        let mut registry = registry(4);
        let first = registry.apply(claim(80, 1), NOW).unwrap().backend;
        let second = registry.apply(Change::Claim { wanted, drains: None }, NOW).unwrap();
        assert!(second.joined && second.backend != first);
        assert_eq!(second.left.first().map(|entry| entry.backend.id), first);
        assert_eq!(registry.apply(join(1, TCP, 80, 1), NOW).unwrap_err(), fault);
    }
}

#[test]
fn a_backend_that_is_registered_here_is_reached_as_it_said_here() {
    let mut registry = registry(4);
    let here = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend;
    let wanted = Registration { http2: true, ..claimed(80, 1) };
    let claimed = registry.apply(Change::Claim { wanted, drains: None }, NOW).unwrap();
    assert_eq!((claimed.backend, claimed.left.len()), (here, 0));
    assert!(!registry.find(TCP, address(80)).unwrap().backend.http2);
}

#[test]
fn an_operators_drain_elsewhere_holds_for_who_registers_here_and_an_owners_does_not() {
    for (by, left) in [
        (DrainedBy::Operator, Standing::Draining),
        // It may have come here since it asked to leave there.
        (DrainedBy::Owner, Standing::Serving),
    ] {
        let mut registry = registry(4);
        let drains = Change::Claim { wanted: claimed(80, 1), drains: Some(by) };
        registry.apply(drains, NOW).unwrap();
        registry.apply(join(1, TCP, 80, 1), NOW).unwrap();
        assert_eq!(standing(&registry, 80), Some(left), "{by:?}");
    }
}

#[test]
fn a_claim_for_which_there_is_no_room_changes_nothing() {
    let mut registry = registry(1);
    let first = registry.apply(claim(80, 1), NOW).unwrap().backend;
    let tls = Some(crate::tls::backends::BackendTls::default());
    let sealed = Registration { tls, ..claimed(80, 1) };
    let refused = registry.apply(Change::Claim { wanted: sealed, drains: None }, NOW);
    assert_eq!(refused.unwrap_err(), Fault::Full { places: 1 });
    let entry = registry.find(TCP, address(80)).map(|entry| entry.backend.id);
    assert_eq!((entry, registry.len()), (first, 1));
}
