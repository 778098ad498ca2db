//! Orders of the operator and the control core.

use super::*;

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
    assert_eq!(world.up(60), Err(DropReason::Draining));
    assert!(world.sessions().iter().all(|session| session.backend == Some(BackendId(1))));
    assert_eq!(world.core.live(), 2);
    world.order(Order::Stop);
    assert_eq!(world.ends(), [EndReason::Stopping; 2]);
    assert_eq!(world.core.live(), 0);
    let mut world = with_backends(1, |_| {});
    world.order(Order::Stop);
    assert_eq!(world.up(1), Err(DropReason::Draining));
}

#[test]
fn silent_sessions_end_soon_while_draining_and_busy_ones_go_on() {
    for (idle_ms, ends_ms) in [(60_000, 2_000), (500, 500)] {
        let idle = Duration::from_millis(idle_ms);
        let mut world = with_backends(2, |_| {});
        world.reload(idle);
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
        assert_eq!(world.up(3), Err(DropReason::Draining), "it is over");
        world.pass(12 * tenth);
        assert_eq!(world.core.live(), 0);
    }
}

#[test]
fn settings_reloaded_while_draining_do_not_hold_up_the_drain() {
    let mut world = with_backends(1, |_| {});
    world.up(1).unwrap();
    world.order(Order::Drain);
    world.reload(Duration::from_secs(3600));
    world.up(1).unwrap();
    world.pass(Duration::from_millis(2_100));
    assert_eq!(world.core.live(), 0);
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
fn many_orders_at_once_concern_nobody_else() {
    let mut world = with_backends(3, |settings| settings.sessions = 1000);
    (1..=30).for_each(|number| assert!(world.up(number).is_ok()));
    let others = (0..2 * SWEEPS_MAX as u32).filter(|number| *number != 2).map(BackendId);
    for backend in others {
        let order = Order::EndBackend { backend, reason: EndReason::CheckFailed };
        world.core.order(world.now, order, &mut world.books);
    }
    world.pass(Duration::from_millis(500));
    assert_eq!((world.core.live(), world.ends()), (10, vec![EndReason::CheckFailed; 20]));
    assert!(world.core.sweeps.is_empty());
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
