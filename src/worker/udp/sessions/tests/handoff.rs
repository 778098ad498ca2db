//! Flows that change workers.

use super::*;

#[test]
fn a_flow_that_changes_workers_keeps_its_session() {
    let map = Arc::new(Affinity::new(1000));
    let with = |worker| {
        let map = Arc::clone(&map);
        move |settings: &mut UdpSettings| settings.affinity = Some(AffinityHandle { map, worker })
    };
    let mut one = with_backends(3, with(0));
    let mut other = with_backends(3, with(1));
    let homes: Vec<_> = (1..=9).map(|number| one.up(number).unwrap()).collect();
    other.up(100).unwrap();
    for number in 1..=9 {
        assert_eq!(other.up_load(number, Segments::one(1)), Up::HandOff(0));
        assert_eq!(one.handed_off(number), Ok(homes[usize::from(number) - 1]));
    }
    assert_eq!((one.core.live(), other.core.live()), (9, 1));
    one.pass(Duration::from_secs(61));
    assert_eq!(map.len(), 1);
    assert!(other.up(1).is_ok(), "the first worker to see the flow has it from now on");
    assert_eq!(one.up_load(1, Segments::one(1)), Up::HandOff(1));
}

#[test]
fn a_flow_held_elsewhere_is_handed_off_even_while_draining() {
    let map = Arc::new(Affinity::new(1000));
    let holder = AffinityHandle { map: Arc::clone(&map), worker: 1 };
    let mut world = with_backends(2, |settings| settings.affinity = Some(holder));
    map.note(hash(1), BackendId(1), 0);
    world.order(Order::Drain);
    assert_eq!(world.up_load(1, Segments::one(1)), Up::HandOff(0));
    assert_eq!(world.up(2), Err(DropReason::Draining));
}

#[test]
fn what_is_handed_off_to_a_worker_stays_there_and_keeps_its_backend() {
    let map = Arc::new(Affinity::new(1000));
    let holder = AffinityHandle { map: Arc::clone(&map), worker: 1 };
    let mut world = with_backends(3, |settings| settings.affinity = Some(holder));
    for number in 1..=9 {
        // Its session here has ended; a third worker took the flow meanwhile.
        map.note(hash(number), BackendId(2), 2);
        assert_eq!(world.handed_off(number).unwrap().1, 2);
        assert_eq!(world.handed_off(number), world.up(number));
    }
    assert_eq!(world.metrics.counters.udp_sessions_found.get(), 9);
}

#[test]
fn a_backend_known_elsewhere_that_has_left_or_is_avoided_is_not_followed() {
    let map = Arc::new(Affinity::new(1000));
    let holder = AffinityHandle { map: Arc::clone(&map), worker: 1 };
    let mut world = with_backends(2, |settings| settings.affinity = Some(holder));
    map.note(hash(1), BackendId(99), 0);
    assert!(world.handed_off(1).is_ok());
    world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Serving)]);
    map.note(hash(2), BackendId(1), 0);
    assert_eq!(world.handed_off(2).unwrap().1, 2);
    assert_eq!(world.metrics.counters.udp_sessions_found.get(), 0);
}

#[test]
fn a_moved_session_is_found_where_it_went() {
    let map = Arc::new(Affinity::new(1000));
    let holder = AffinityHandle { map: Arc::clone(&map), worker: 0 };
    let mut world = with_backends(2, |settings| settings.affinity = Some(holder));
    world.up(1).unwrap();
    world.register(&[(2, 2, Standing::Serving)]);
    world.up(1).unwrap();
    assert_eq!(map.find(hash(1)), Some(BackendId(2)));
}
