//! Requests that are not answered in time, and whose fault that is: what is counted of a backend that leaves
//! users waiting, and of users who do not wait or dawdle themselves.

use std::io::Write;
use std::time::Duration;

use lb::worker::link::Report;

use crate::harness::{Backend, Balancer, ok};
use crate::wait::wait_for;

const SHORT: Duration = Duration::from_millis(150);

/// Reads whatever comes and answers nothing.
fn mute() -> Backend {
    Backend::run(|_, mut wire| {
        wire.rest();
    })
}

/// What was counted of the first backend: requests left unanswered, and the reports about them.
fn silence(balancer: &mut Balancer) -> (u64, usize) {
    let counted = balancer.plane.ends.iter().map(|end| end.metrics.backends[0].unanswered.get());
    let counted = counted.sum();
    let mut reports = 0;
    for end in &mut balancer.plane.ends {
        while let Ok(report) = end.reports.pop() {
            reports += usize::from(matches!(report, Report::Unanswered { .. }));
        }
    }
    (counted, reports)
}

#[test]
fn each_request_that_a_backend_leaves_unanswered_counts_as_its_failure() {
    let backend = mute();
    let mut balancer =
        Balancer::over(&[backend.address], |config| config.api.answer_timeout = SHORT);
    for _ in 0..2 {
        assert_eq!(balancer.user().get("/").status(), 504);
    }
    assert_eq!(silence(&mut balancer), (2, 2));
    balancer.expect("unanswered", 2, |it| it.api_unanswered.get());
    balancer.stop();
}

#[test]
fn so_does_one_that_it_does_not_read() {
    let backend = Backend::run(|_, _wire| {
        loop {
            std::thread::park();
        }
    });
    let mut balancer = Balancer::over(&[backend.address], |config| {
        config.api.body_timeout = SHORT;
        config.api.body_bytes = None;
    });
    let mut user = balancer.user();
    let length = 64 << 20;
    user.send(format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"));
    user.wire.stream.set_nonblocking(true).unwrap();
    let part = vec![b'x'; 1 << 20];
    wait_for("the request to be given up", || {
        while user.wire.stream.write(&part).is_ok_and(|sent| sent > 0) {}
        (silence(&mut balancer).0 == 1).then_some(())
    });
    balancer.stop();
}

#[test]
fn a_user_who_leaves_or_dawdles_is_no_failure_of_the_backend() {
    let backend = mute();
    let mut balancer = Balancer::over(&[backend.address], |config| {
        config.api.answer_timeout = 4 * SHORT;
        config.api.body_timeout = SHORT;
    });
    let mut user = balancer.user();
    user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    wait_for("the request", || (backend.bytes().len() > 10).then_some(()));
    socket2::SockRef::from(&user.wire.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(user);
    balancer.expect("users who have left", 1, |it| it.sessions_ended.get());
    let mut slow = balancer.user();
    slow.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf");
    assert_eq!(slow.answer().status(), 408);
    assert_eq!(silence(&mut balancer), (0, 0));
    balancer.stop();
}

#[test]
fn one_who_hangs_up_and_leaves_the_backend_all_its_time_proves_it_no_better() {
    let backend = mute();
    let mut balancer =
        Balancer::over(&[backend.address], |config| config.api.answer_timeout = SHORT);
    let mut user = balancer.user();
    user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    drop(user);
    balancer.expect("unanswered", 1, |it| it.api_unanswered.get());
    assert_eq!(silence(&mut balancer), (1, 1));
    balancer.stop();
}

#[test]
fn when_a_backend_began_its_last_answer_is_known() {
    let backend = Backend::answering(|_| ok("fine"));
    let balancer = Balancer::over(&[backend.address], |_| {});
    let answered =
        || balancer.plane.ends.iter().map(|end| end.metrics.answered[0].get()).max().unwrap();
    assert_eq!(answered(), 0);
    let mut user = balancer.user();
    assert_eq!(user.get("/").text(), "fine");
    let first = answered();
    assert!(first > 0);
    assert_eq!(user.get("/").text(), "fine");
    assert!(answered() > first);
    balancer.stop();
}
