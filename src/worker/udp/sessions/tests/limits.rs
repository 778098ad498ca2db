//! What is dropped at which limit, and what passes whole.

use super::*;

#[test]
fn every_limit_drops_with_its_own_reason() {
    let mut world = with_backends(1, |settings| settings.sessions = 3);
    (1..=3).for_each(|number| assert!(world.up(number).is_ok()));
    assert_eq!(world.up(4), Err(DropReason::TableFull));
    assert!(world.up(3).is_ok(), "a running session goes on");

    let mut world = with_backends(1, |settings| settings.sessions = 1000);
    (1..=50).for_each(|source| assert!(world.up(source << 8).is_ok()));
    assert_eq!(world.up(51 << 8), Err(DropReason::TableFull), "all workers' seats are taken");
    world.pass(Duration::from_secs(61));
    assert!(world.up(51 << 8).is_ok());

    let limits = |sessions, rate| SourceLimits {
        sessions: NonZeroU32::new(sessions),
        new_per_second: NonZeroU32::new(rate),
    };
    let mut world = with_backends(1, |settings| settings.sources = limits(2, 0));
    assert!(world.up(1).is_ok() && world.up(2).is_ok());
    assert_eq!(world.up(3), Err(DropReason::SourceLimit));
    assert!(world.up(256).is_ok(), "another source");
    world.pass(Duration::from_secs(61));
    assert!(world.up(3).is_ok());

    let mut world = with_backends(1, |settings| settings.sources = limits(0, 2));
    assert!(world.up(1).is_ok() && world.up(2).is_ok());
    assert_eq!(world.up(3), Err(DropReason::SourceRate));
    world.pass(Duration::from_secs(1));
    assert!(world.up(3).is_ok());

    let mut world = with_backends(1, |settings| settings.pairs.sockets = 2);
    assert!(world.up(1).is_ok() && world.up(2).is_ok());
    assert_eq!(world.up(3), Err(DropReason::UpstreamExhausted));
    assert_eq!(world.sessions().len(), 2, "and leaves nothing behind");
    assert_eq!(world.metrics.counters.sessions_active.get(), 2);
}

#[test]
fn a_move_without_a_free_pair_leaves_the_session_where_it_is() {
    let mut world = with_backends(2, |settings| settings.pairs.sockets = 1);
    let one = world.up(1).unwrap();
    let two = world.up(2).unwrap();
    assert_eq!((one.1, two.1), (1, 2));
    world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Serving)]);
    assert_eq!(world.up(1), Ok(one));
    world.register(&[(2, 2, Standing::Serving)]);
    assert_eq!(world.up(1), Err(DropReason::UpstreamExhausted));
    assert_eq!(world.down(one.0, 1).map(|(_, to)| to), Ok(client(1)), "its pair is still its own");
    assert_eq!(world.up(2), Ok(two));
}

#[test]
fn datagrams_of_any_length_pass_that_fit_the_backends_family() {
    let mut world = with_backends(1, |_| {});
    for (segments, passes) in [
        (Segments::one(0), true),
        (Segments::one(65_507), true),
        (Segments::one(65_508), false),
        (Segments { bytes: 65_535, segment_size: 1200 }, true),
        (Segments { bytes: 65_535, segment_size: 65_520 }, false),
    ] {
        for number in [1, 2] {
            let up = world.up_load(number, segments);
            assert_eq!(matches!(up, Up::Send { .. }), passes, "{segments:?}");
            world.pass(Duration::from_secs(if number == 1 { 0 } else { 61 }));
        }
    }
    let counters = &world.metrics.counters;
    assert_eq!(counters.udp_dropped_too_big.get(), 1 + 1 + 2 + 2);
    assert_eq!(counters.udp_datagrams_up.get(), 2 + 2 + 2 * 55);
    assert_eq!(counters.sessions_started.get(), 3 * 2, "what cannot pass begins no session");
}

#[test]
fn a_socket_that_cannot_be_opened_costs_the_datagram_and_nothing_else() {
    let mut world = with_backends(1, |_| {});
    let local: SocketAddr = LOCAL.parse().unwrap();
    let ask = |world: &mut World| {
        world.core.up(world.now, Origin { local, ..origin(1) }, Segments::one(1), &mut world.books)
    };
    let Up::Open(socket) = ask(&mut world) else { panic!("no socket is open yet") };
    world.core.opened(world.now, socket, false);
    assert_eq!(ask(&mut world), Up::Drop(DropReason::UpstreamExhausted));
    assert_eq!((world.core.live(), world.sessions().len()), (0, 0));
    world.pass(Duration::from_millis(101));
    assert_eq!(ask(&mut world), Up::Open(socket));
}
