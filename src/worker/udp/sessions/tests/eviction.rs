//! Who is evicted when places or pairs run out.

use super::*;

/// Users by source and port.
fn of_source(source: u8, port: u8) -> u16 {
    u16::from(source) << 8 | u16::from(port)
}

/// A world with one backend and `sockets` pairs with it.
fn with_pairs(sockets: usize) -> World {
    with_backends(1, |settings| {
        settings.pairs.sockets = sockets;
        settings.share = sockets;
    })
}

/// Has a user send a datagram that is answered at once.
fn answered(world: &mut World, number: u16) -> SocketId {
    let (socket, host) = world.up(number).unwrap();
    assert_eq!(world.down(socket, host).map(|(_, to)| to), Ok(client(number)));
    socket
}

fn let_in(world: &mut World, number: u16) {
    answered(world, number);
}

#[test]
fn the_session_idle_longest_is_evicted_and_none_in_use() {
    let mut world = with_pairs(3);
    let first = answered(&mut world, of_source(1, 1));
    world.pass(Duration::from_secs(1));
    let second = answered(&mut world, of_source(2, 1));
    answered(&mut world, of_source(3, 1));
    world.pass(Duration::from_millis(900));
    assert_eq!(
        world.up(of_source(4, 1)),
        Err(DropReason::UpstreamExhausted),
        "something passed recently"
    );
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
    assert_eq!(world.up(of_source(2, 1)), Err(DropReason::UpstreamExhausted));
    assert_eq!(world.down(socket, 1).map(|(_, to)| to), Ok(client(of_source(1, 1))));
    world.pass(Duration::from_millis(1_900));
    assert_eq!(
        world.up(of_source(2, 1)),
        Err(DropReason::UpstreamExhausted),
        "it was answered just now"
    );
    world.pass(Duration::from_millis(150));
    assert_eq!(world.up(of_source(2, 1)).map(|(socket, _)| socket), Ok(socket));
    world.pass(Duration::from_millis(5_100));
    assert!(world.up(of_source(3, 1)).is_ok(), "no answer comes any more");
}

#[test]
fn one_that_waited_longer_is_evicted_before_one_that_was_answered_later() {
    let mut world = with_pairs(2);
    let (waiting, _) = world.up(of_source(1, 1)).unwrap();
    world.pass(Duration::from_secs(2));
    answered(&mut world, of_source(2, 1));
    world.pass(Duration::from_secs(4));
    assert_eq!(world.up(of_source(3, 1)).map(|(socket, _)| socket), Ok(waiting));
}

#[test]
fn a_quarantine_ends_early_when_no_reply_can_come_and_the_oldest_first() {
    let mut world = with_backends(1, |settings| {
        settings.pairs.sockets = 2;
        settings.udp.responses = NonZeroU32::new(1);
    });
    let first = answered(&mut world, of_source(1, 1));
    world.pass(Duration::from_millis(100));
    let second = answered(&mut world, of_source(2, 1));
    assert_eq!(world.core.live(), 0);
    world.pass(Duration::from_millis(350));
    assert_eq!(world.up(of_source(3, 1)), Err(DropReason::UpstreamExhausted), "a copy may come");
    assert_eq!(world.down(first, 1), Err(DropReason::LateReply));
    world.pass(Duration::from_millis(60));
    assert_eq!(answered(&mut world, of_source(3, 1)), first);
    assert_eq!(world.up(of_source(4, 1)), Err(DropReason::UpstreamExhausted));
    world.pass(Duration::from_millis(100));
    assert_eq!(answered(&mut world, of_source(4, 1)), second);
    assert_eq!(world.metrics.counters.udp_rests_cut_short.get(), 2);
}

#[test]
fn sessions_that_nobody_answers_are_evicted_before_a_recent_quarantine_ends() {
    let mut world = with_backends(1, |settings| {
        settings.pairs.sockets = 2;
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
    // There are 100 pairs, and each session takes one for 2 s, or half a second with `responses`. All
    // users share a few sources, each of which may use whatever is free.
    for (responses, every_ms) in [(0, 30), (1, 8)] {
        let mut world = with_backends(1, |settings| {
            settings.pairs.sockets = 100;
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
    assert_eq!(world.up(of_source(4, 1)), Err(DropReason::TableFull));
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
                Err(why) => assert_eq!(why, DropReason::SourceShare),
            }
            taken = world.core.live() - 5;
        }
        assert_eq!((taken, world.core.live()), (31, 36), "a quarter is left to the others");
        for source in 1..=5 {
            assert!(world.up(of_source(source, 1)).is_ok());
        }
        assert_eq!(world.metrics.counters.udp_sessions_displaced.get(), 0, "{answers}");
        // Its own sessions are evicted for its next ones and for everybody else's.
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
    assert_eq!(
        world.up(of_source(1, 99)),
        Err(DropReason::SourceShare),
        "a quarter is left to others"
    );
    assert!((2..=9).all(|source| world.up(of_source(source, 1)).is_ok()));
}

#[test]
fn a_session_goes_to_another_backend_when_the_first_has_no_room() {
    let mut world = with_backends(2, |settings| settings.pairs.sockets = 2);
    world.register(&[(1, 1, Standing::Serving)]);
    assert!(world.up(of_source(1, 1)).is_ok() && world.up(of_source(2, 1)).is_ok());
    world.register(&[(1, 1, Standing::Serving), (2, 2, Standing::Serving)]);
    for source in 3..5 {
        assert_eq!(world.up(of_source(source, 1)).map(|(_, host)| host), Ok(2));
    }
    assert_eq!(world.up(of_source(5, 1)), Err(DropReason::UpstreamExhausted));
    assert_eq!(world.metrics.counters.users_refused_exhausted.get(), 1);
    let told: u64 = (1..=2).map(|slot| world.metrics.backends[slot].turned_away.get()).sum();
    assert_eq!(told, 1, "counted at the backend chosen first");
}

#[test]
fn a_lack_of_room_is_reported_now_and_then_with_all_that_were_dropped() {
    let mut world = with_pairs(1);
    let told = |world: &mut World| -> Vec<(Shortage, Option<BackendId>, u64)> {
        let reports = world.reports().into_iter();
        reports
            .filter_map(|report| match report {
                Report::OutOfRoom { shortage, backend, datagrams, .. } => {
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
