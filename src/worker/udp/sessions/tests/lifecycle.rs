//! How a session begins, keeps its backend, loses it and ends.

use super::*;

#[test]
fn a_session_keeps_its_backend_whoever_joins() {
    let mut world = with_backends(2, |_| {});
    let first = world.up(1).unwrap();
    let second = world.up(2).unwrap();
    assert_eq!([first.1, second.1], [1, 2], "in turn");
    world.register(&[1, 2, 3, 4].map(|id| (id, id as u8, Standing::Serving)));
    for _ in 0..5 {
        assert_eq!(world.up(1), Ok(first));
        assert_eq!(world.up(2), Ok(second));
    }
    world.register(&[(1, 1, Standing::Draining), (2, 2, Standing::Serving)]);
    assert_eq!(world.up(1), Ok(first), "a draining backend keeps what it has");
}

#[test]
fn a_reply_reaches_its_user_from_the_address_the_user_sent_to() {
    let mut world = with_backends(2, |_| {});
    let (one, other) = (world.up(1).unwrap(), world.up(2).unwrap());
    let local = LOCAL.parse().unwrap();
    assert_eq!(world.down(one.0, one.1), Ok((local, client(1))));
    assert_eq!(world.down(other.0, other.1), Ok((local, client(2))));
    let elsewhere = "192.0.2.99:53".parse().unwrap();
    let origin = Origin { local: elsewhere, ..origin(1) };
    let up = world.core.up(world.now, origin, Segments::one(1), &mut world.books);
    let from = match up {
        Up::Open(socket) => {
            world.core.opened(world.now, socket, true);
            match world.core.up(world.now, origin, Segments::one(1), &mut world.books) {
                Up::Send { from, .. } => from,
                other => panic!("{other:?}"),
            }
        }
        Up::Send { from, .. } => from,
        other => panic!("{other:?}"),
    };
    assert_eq!(world.down(from, 1), Ok((elsewhere, client(1))));
}

#[test]
fn what_is_no_reply_from_the_sessions_backend_is_dropped_with_its_reason() {
    let mut world = with_backends(2, |_| {});
    let (socket, host) = world.up(1).unwrap();
    assert_eq!(world.down(socket, 99), Err(DropReason::SpoofedReply));
    assert_eq!(world.down(socket, 3 - host), Err(DropReason::UnknownReply));
    let other_port = SocketAddr::new(backend_at(host).ip(), 1);
    let said = world.core.down(world.now, socket, other_port, Segments::one(2), &mut world.books);
    assert_eq!(said, Down::Drop(DropReason::SpoofedReply));
    world.pass(Duration::from_secs(61));
    assert_eq!(world.down(socket, host), Err(DropReason::LateReply));
    let counters = &world.metrics.counters;
    assert_eq!(counters.udp_dropped_spoofed_reply.get(), 2);
    assert_eq!(counters.udp_dropped_unknown_reply.get(), 1);
    assert_eq!(counters.udp_dropped_late_reply.get(), 1);
    assert_eq!(counters.udp_datagrams_down.get(), 0);
}

#[test]
fn datagrams_of_either_side_keep_a_session() {
    let mut world = with_backends(1, |_| {});
    let (socket, host) = world.up(1).unwrap();
    world.up(2).unwrap();
    world.pass(Duration::from_secs(40));
    world.down(socket, host).unwrap();
    world.pass(Duration::from_secs(40));
    assert_eq!(world.core.live(), 1);
    world.up(1).unwrap();
    world.pass(Duration::from_secs(59));
    assert_eq!(world.core.live(), 1);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.core.live(), 0);
    assert_eq!(world.ends(), [EndReason::Idle, EndReason::Idle]);
}

#[test]
fn with_responses_a_session_ends_when_every_question_is_answered() {
    let mut world = with_backends(1, |settings| settings.udp.responses = NonZeroU32::new(1));
    let (socket, host) = world.up(1).unwrap();
    world.up(1).unwrap();
    world.down(socket, host).unwrap();
    assert_eq!(world.core.live(), 1, "one question is open");
    world.down(socket, host).unwrap();
    assert_eq!(world.core.live(), 0);
    assert_eq!(world.ends(), [EndReason::Finished]);
    assert_eq!(world.down(socket, host), Err(DropReason::LateReply));
    let again = world.up(1).unwrap();
    assert_ne!(again.0, socket, "the pair is quarantined");
}

#[test]
fn a_question_whose_answer_can_no_longer_come_is_not_waited_for() {
    // Whether or not the timer has fired in between.
    let fires: fn(&mut World) = |world| world.pass(Duration::from_secs(6));
    let not_yet: fn(&mut World) = |world| world.now = world.now.plus(Duration::from_secs(6));
    for pass in [fires, not_yet] {
        let mut world = with_backends(1, |settings| settings.udp.responses = NonZeroU32::new(1));
        let (socket, host) = world.up(1).unwrap();
        pass(&mut world);
        assert_eq!(world.up(1), Ok((socket, host)));
        world.down(socket, host).unwrap();
        assert_eq!(world.ends(), [EndReason::Finished], "one is answered, and the other lapsed");
    }
}

#[test]
fn every_datagram_of_a_burst_is_a_reply() {
    let burst = |datagrams: usize| Segments { bytes: 100 * datagrams, segment_size: 100 };
    for (asked, responses, answered, over) in
        [(1, 3, 2, false), (1, 3, 3, true), (4, 1, 3, false), (4, 1, 4, true), (2, 2, 5, true)]
    {
        let mut world =
            with_backends(1, |settings| settings.udp.responses = NonZeroU32::new(responses));
        let Up::Send { from, .. } = world.up_load(1, burst(asked)) else { panic!("it is sent") };
        let backend = backend_at(1);
        let down = world.core.down(world.now, from, backend, burst(answered), &mut world.books);
        assert!(matches!(down, Down::Send { .. }));
        let case = format!("{answered} replies to {asked} that have {responses} each");
        assert_eq!(world.core.live() == 0, over, "{case}");
        let counted = world.metrics.counters.udp_datagrams_down.get();
        assert_eq!(counted, answered as u64, "{case}");
    }
}

#[test]
fn a_lost_backend_is_left_as_configured() {
    use Standing::{Aside, Serving};
    let gone: &[(u32, u8, Standing)] = &[(2, 2, Serving)];
    let aside: &[(u32, u8, Standing)] = &[(1, 1, Aside), (2, 2, Serving)];
    for (policy, after, host, live, moved) in [
        (OnUdpLoss::Move, gone, 2, 1, 1),
        (OnUdpLoss::Drop, gone, 2, 1, 0),
        (OnUdpLoss::Keep, gone, 1, 1, 0),
        (OnUdpLoss::Move, aside, 2, 1, 1),
        (OnUdpLoss::Drop, aside, 2, 1, 0),
        (OnUdpLoss::Keep, aside, 1, 1, 0),
    ] {
        let mut world = with_backends(2, |settings| settings.udp.on_backend_loss = policy);
        let before = world.up(1).unwrap();
        assert_eq!(before.1, 1);
        world.reports();
        world.register(after);
        assert_eq!(world.up(1).unwrap().1, host, "{policy:?}");
        assert_eq!(world.core.live(), live);
        assert_eq!(world.metrics.counters.udp_sessions_moved.get(), moved);
        let late = world.down(before.0, 1);
        assert_eq!(late.is_ok(), policy == OnUdpLoss::Keep, "{policy:?} {late:?}");
        let ended = if policy == OnUdpLoss::Drop { vec![EndReason::BackendLeft] } else { vec![] };
        assert_eq!(world.ends(), ended);
        assert_eq!(world.sessions()[0].backend, Some(BackendId(u32::from(host))));
    }
}

#[test]
fn dropped_sessions_end_without_waiting_for_a_datagram() {
    let mut world = with_backends(2, |settings| settings.udp.on_backend_loss = OnUdpLoss::Drop);
    (0..20).for_each(|number| assert!(world.up(number).is_ok()));
    world.register(&[(2, 2, Standing::Serving)]);
    world.pass(Duration::from_millis(10));
    assert_eq!(world.core.live(), 10);
    assert!(world.sessions().iter().all(|session| session.backend == Some(BackendId(2))));
}

#[test]
fn a_backend_that_registers_anew_keeps_its_sessions() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.register(&[(2, 2, Standing::Serving)]);
    world.register(&[(2, 2, Standing::Serving), (7, 1, Standing::Serving)]);
    assert_eq!(world.up(1), Ok(one));
    assert_eq!(world.down(one.0, 1).map(|(_, to)| to), Ok(client(1)));
    assert_eq!(world.sessions()[0].backend, Some(BackendId(7)));
    assert_eq!(world.metrics.backends[1].active.get(), 0);
    assert_eq!(world.metrics.backends[7].active.get(), 1);
    assert_eq!(world.metrics.counters.udp_sessions_moved.get(), 0);
}

#[test]
fn without_a_backend_a_session_waits_for_one() {
    let mut world = with_backends(1, |_| {});
    world.up(1).unwrap();
    world.register(&[]);
    assert_eq!(world.up(1), Err(DropReason::NoBackend));
    assert_eq!(world.up(2), Err(DropReason::NoBackend));
    assert_eq!(world.core.live(), 1);
    world.register(&[(5, 5, Standing::Serving)]);
    assert_eq!(world.up(1).unwrap().1, 5);
    assert_eq!(world.metrics.counters.udp_dropped_no_backend.get(), 2);
}

#[test]
fn the_first_reply_of_a_session_tells_how_long_its_user_waited_and_no_later_one_does() {
    let mut world = with_backends(1, |_| {});
    let (socket, host) = world.up(1).unwrap();
    world.pass(Duration::from_millis(3));
    for _ in 0..2 {
        world.down(socket, host).unwrap();
        world.pass(Duration::from_millis(40));
    }
    let waited = || world.books.snapshot().service(SERVICE).unwrap().gate.answers.sum();
    let bucket = crate::base::buckets::bucket_of(3_000);
    assert_eq!(waited().first_byte[bucket], 1);
    assert_eq!(waited().first_byte.iter().sum::<u64>(), 1);
    world.register(&[]);
    assert_eq!(world.up(2), Err(DropReason::NoBackend));
    let refused = world.books.snapshot().service(SERVICE).unwrap().gate.answers.sum().refused;
    assert_eq!(refused, world.metrics.counters.users_refused_no_backend.get());
    assert_eq!(refused, 1);
}

#[test]
fn the_books_agree_with_what_happened() {
    let mut world = with_backends(1, |_| {});
    let (socket, host) = world.up(1).unwrap();
    world.up_load(1, Segments { bytes: 2500, segment_size: 1000 });
    world.down(socket, host).unwrap();
    let seen = &world.sessions()[0];
    assert_eq!((seen.service, seen.client), (SERVICE, client(1)));
    assert_eq!((seen.bytes_up, seen.bytes_down), (2501, 2));
    let backend = &world.metrics.backends[1];
    assert_eq!((backend.active.get(), backend.total.get()), (1, 1));
    assert_eq!((backend.up.get(), backend.down.get()), (2501, 2));
    let counters = &world.metrics.counters;
    assert_eq!((counters.udp_datagrams_up.get(), counters.udp_datagrams_down.get()), (4, 1));
    world.pass(Duration::from_secs(61));
    assert_eq!(world.metrics.backends[1].active.get(), 0);
    assert_eq!(world.metrics.counters.sessions_active.get(), 0);
    assert!(world.sessions().is_empty());
    assert_eq!(world.core.sockets(), 1);
    assert_eq!(world.metrics.counters.udp_pairs_resting.get(), 1);
}
