//! ICMP errors about backends, and which of them are believed.

use super::*;

#[test]
fn icmp_moves_the_next_datagram_and_keeps_new_users_away() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.up(2).unwrap();
    let three = world.up(3).unwrap();
    assert_eq!([one.1, three.1], [1, 1]);
    world.reports();
    world.report_unreachable(one.0, 1);
    world.report_unreachable(three.0, 1);
    assert_eq!([world.up(1).unwrap().1, world.up(3).unwrap().1], [2, 2]);
    for number in 10..14 {
        assert_eq!(world.up(number).unwrap().1, 2);
    }
    let failed: Vec<Report> =
        world.reports().into_iter().filter(|r| matches!(r, Report::ConnectFailed { .. })).collect();
    let errno = Errno::ECONNREFUSED as i32;
    assert_eq!(failed, [Report::ConnectFailed { backend: BackendId(1), errno }], "said once");
    world.pass(Duration::from_secs(2));
    assert_eq!(world.up(1).unwrap().1, 2, "a moved session does not move back");
    assert_eq!(world.metrics.counters.udp_refused.get(), 2);
}

#[test]
fn icmp_is_believed_only_about_a_datagram_without_an_answer() {
    let mut world = with_backends(2, |_| {});
    let (one, two) = (world.up(1).unwrap(), world.up(2).unwrap());
    // Nothing was sent there, or not from that socket.
    world.report_unreachable(one.0, 2);
    world.report_unreachable(SocketId { number: 99, ..one.0 }, 1);
    // The datagram has been answered.
    world.down(one.0, 1).unwrap();
    world.report_unreachable(one.0, 1);
    // The datagram was sent too long ago.
    world.pass(Duration::from_secs(6));
    world.report_unreachable(two.0, 2);
    let counters = Arc::clone(&world.metrics);
    let counted = || {
        let counters = &counters.counters;
        (counters.udp_refused.get(), counters.udp_refused_unasked.get())
    };
    assert_eq!(counted(), (0, 4));
    assert_eq!((world.up(1), world.up(2)), (Ok(one), Ok(two)));
    // One error per datagram is believed.
    world.report_unreachable(one.0, 1);
    world.report_unreachable(one.0, 1);
    assert_eq!(counted(), (1, 5));
    let hosts: Vec<u8> = (3..=6).map(|number| world.up(number).unwrap().1).collect();
    assert_eq!(hosts, [1, 2, 1, 2], "the backend is not avoided");
    assert!(!world.reports().iter().any(|r| matches!(r, Report::ConnectFailed { .. })));
}

#[test]
fn one_error_moves_one_session_and_two_make_the_backend_avoided_unless_it_answers() {
    let mut world = with_backends(2, |_| {});
    let (one, three) = (world.up(1).unwrap(), (world.up(2), world.up(3)).1.unwrap());
    let five = (world.up(4), world.up(5)).1.unwrap();
    assert_eq!([one.1, three.1, five.1], [1; 3]);
    world.report_unreachable(one.0, 1);
    // The backend answers somebody, so it is alive.
    world.down(three.0, 1).unwrap();
    world.report_unreachable(five.0, 1);
    assert_eq!(world.up(3), Ok(three));
    assert_eq!([world.up(1).unwrap().1, world.up(5).unwrap().1], [2, 2]);
    let before = world.reports();
    assert!(!before.iter().any(|r| matches!(r, Report::ConnectFailed { .. })), "{before:?}");
    // Silence in between: the backend is gone.
    world.report_unreachable(three.0, 1);
    assert!(world.reports().iter().any(|r| matches!(r, Report::ConnectFailed { .. })));
    assert!((6..=9).all(|number| world.up(number).unwrap().1 == 2));
}

#[test]
fn two_errors_about_two_datagrams_of_one_session_are_enough() {
    let mut world = with_backends(1, |_| {});
    let one = world.up(1).unwrap();
    world.report_unreachable(one.0, 1);
    assert_eq!(world.up(1), Ok(one), "there is no other backend");
    world.report_unreachable(one.0, 1);
    assert!(world.reports().iter().any(|r| matches!(r, Report::ConnectFailed { .. })));
}

#[test]
fn a_session_that_hears_from_its_backend_stays_there_whatever_icmp_said() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.report_unreachable(one.0, 1);
    world.down(one.0, 1).unwrap();
    assert_eq!(world.up(1), Ok(one));
}

#[test]
fn icmp_about_an_address_that_is_no_backend_changes_nothing() {
    let mut world = with_backends(2, |_| {});
    let one = world.up(1).unwrap();
    world.report_unreachable(one.0, 99);
    assert_eq!(world.up(1), Ok(one));
}

#[test]
fn the_only_backend_is_sent_to_even_if_it_is_avoided() {
    for policy in [OnUdpLoss::Move, OnUdpLoss::Drop, OnUdpLoss::Keep] {
        let mut world = with_backends(1, |settings| settings.udp.on_backend_loss = policy);
        let one = world.up(1).unwrap();
        world.report_unreachable(one.0, 1);
        assert_eq!(world.up(1), Ok(one), "{policy:?}");
        assert_eq!(world.up(2).unwrap().1, 1);
        world.register(&[(1, 1, Standing::Aside)]);
        assert_eq!(world.up(1), Ok(one), "{policy:?}");
        assert_eq!(world.core.live(), 2);
    }
}

#[test]
fn a_backend_that_is_back_gets_users_again() {
    let mut world = with_backends(2, |_| {});
    world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Serving)]);
    (1..=4).for_each(|number| assert_eq!(world.up(number).unwrap().1, 2));
    world.register(&[(1, 1, Standing::Serving), (2, 2, Standing::Serving)]);
    let hosts: Vec<u8> = (5..=8).map(|number| world.up(number).unwrap().1).collect();
    assert_eq!(hosts.iter().filter(|host| **host == 1).count(), 2, "{hosts:?}");
    let five = world.up(5).unwrap();
    assert_eq!(world.up(5), Ok(five), "and keeps them");
}

#[test]
fn two_avoided_backends_do_not_pass_a_session_to_and_fro() {
    for policy in [OnUdpLoss::Move, OnUdpLoss::Drop] {
        let mut world = with_backends(2, |settings| settings.udp.on_backend_loss = policy);
        let one = world.up(1).unwrap();
        world.register(&[(1, 1, Standing::Aside), (2, 2, Standing::Aside)]);
        for _ in 0..4 {
            assert_eq!(world.up(1), Ok(one), "{policy:?}");
        }
    }
}
