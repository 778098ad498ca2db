//! Who may have a backend drained, and take that back.

use super::*;

#[test]
fn an_operator_drains_a_backend_of_any_source_by_its_id() {
    let mut registry = registry(4);
    let id = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    registry.apply(join(2, TCP, 81, 1), NOW).unwrap();
    let drain = |backend| Change::DrainBackend { backend, lasts: Lasts::AsSet };
    assert_eq!(ports(&shown(&mut registry, drain(id)), TCP), [81]);
    let again = registry.apply(drain(id), NOW).unwrap();
    assert_eq!((again.backend, again.changed), (Some(id), false));
    let backend = BackendId(99);
    assert_eq!(registry.apply(drain(backend), NOW).unwrap_err(), Fault::Unknown { backend });
    assert!(registry.apply(unregister(1, TCP, 80), NOW).is_ok(), "it still belongs to its source");
}

#[test]
fn a_drain_is_taken_back_by_whoever_asked_for_it() {
    use Standing::{Draining, Serving};
    let mut registry = registry(4);
    let backend = registry.apply(join(1, TCP, 80, 1), NOW).unwrap().backend.unwrap();
    let by_operator = Change::DrainBackend { backend, lasts: Lasts::AsSet };
    let back = Change::UndrainBackend { backend };
    for (change, refused, standing) in [
        (back.clone(), None, Serving),
        (undrain(1, TCP, 80), None, Serving),
        (by_operator.clone(), None, Draining),
        (undrain(1, TCP, 80), Some(DrainedBy::Operator), Draining),
        (back.clone(), None, Serving),
        (drain(1, TCP, 80), None, Draining),
        (by_operator.clone(), None, Draining),
        (back.clone(), Some(DrainedBy::Owner), Draining),
        (undrain(1, TCP, 80), None, Serving),
        (by_operator.clone(), None, Draining),
        (drain(1, TCP, 80), None, Draining),
        (back.clone(), Some(DrainedBy::Owner), Draining),
        (undrain(1, TCP, 80), None, Draining),
        (undrain(1, TCP, 80), Some(DrainedBy::Operator), Draining),
        (drain(1, TCP, 80), None, Draining),
        (join(1, TCP, 80, 1), None, Draining),
        (back.clone(), None, Serving),
        (by_operator, None, Draining),
        (join(1, TCP, 80, 7), None, Draining),
    ] {
        let outcome = registry.apply(change.clone(), NOW).map(|_| ());
        let fault = refused.map(|by| Fault::Drains { backend, by });
        assert_eq!(outcome.err(), fault, "{change:?}");
        assert_eq!(registry.get(backend).unwrap().backend.standing, standing, "{change:?}");
    }
    let fault = registry.apply(undrain(2, TCP, 80), NOW).unwrap_err();
    assert!(matches!(fault, Fault::NotRegistered { .. }), "of somebody else: {fault}");
    registry.retire(TCP);
    let fault = registry.apply(back, NOW).unwrap_err();
    assert_eq!(fault, Fault::Removed, "there is nobody to come back for");
}
