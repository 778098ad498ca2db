//! Backends that fail and users who dawdle: what the user is told, what is retried, and that a
//! response which was cut never looks complete.

use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use lb::base::time::Now;
use lb::ring::pool::SMALL_BYTES;
use lb::worker::link::Order;

use crate::harness::{Backend, Balancer, User, Wire, ok};
use crate::wait::{PATIENCE, wait_for};

const SHORT: Duration = Duration::from_millis(150);

#[test]
fn without_a_backend_a_user_is_told_so_and_may_ask_again() {
    let mut balancer = Balancer::start(|_| {});
    let mut user = balancer.user();
    let answer = user.get("/");
    assert_eq!((answer.status(), answer.one("retry-after")), (503, Some("5")));
    let backend = Backend::named("one");
    balancer.register(&[backend.address]);
    assert_eq!(user.get("/").text(), "one");
    balancer.stop();
}

/// Sends a request with a body of `len` bytes completely before reading anything.
fn upload(user: &mut User, len: usize) -> u16 {
    user.send(format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\n\r\n"));
    let part = vec![b'x'; 1 << 20];
    (0..len / part.len()).for_each(|_| user.send(&part));
    user.answer().status()
}

#[test]
fn a_user_who_sends_everything_before_it_looks_sees_the_answer_that_came_first() {
    /// Far more than all kernels involved can hold.
    const LEN: usize = 64 << 20;
    let refusing = Backend::run(|_, mut wire: Wire| {
        wire.head();
        wire.write("HTTP/1.1 403 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        wire.stream.shutdown(Shutdown::Write).unwrap();
        wire.rest();
    });
    for (backends, body_bytes, status) in
        [(vec![], 0, 503), (vec![refusing.address], 0, 403), (vec![refusing.address], 1000, 413)]
    {
        let balancer = Balancer::over(&backends, |config| {
            config.api.body_bytes = std::num::NonZeroU64::new(body_bytes);
        });
        assert_eq!(upload(&mut balancer.user(), LEN), status);
        balancer.stop();
    }
}

#[test]
fn an_answer_after_a_quiet_time_bears_the_date_of_its_own_second() {
    let balancer = Balancer::start(|_| {});
    let mut user = balancer.user();
    let second = || Now::read().unix_ms() / 1000;
    let first = user.get("/").one("date").unwrap().to_owned();
    let quiet = second();
    wait_for("the next second", || (second() > quiet).then_some(()));
    assert_ne!(user.get("/").one("date"), Some(&*first));
    balancer.stop();
}

#[test]
fn users_who_all_send_at_once_wait_for_blocks_and_none_is_turned_away() {
    const USERS: usize = 60;
    let backend = Backend::answering(|request| ok(request.body.len().to_string()));
    // Room for 512 small blocks, of which one user's body alone takes sixteen.
    let balancer = Balancer::over(&[backend.address], |config| {
        config.limits.buffer_bytes = 2 * 512 * SMALL_BYTES;
    });
    let body = vec![b'x'; 16 * SMALL_BYTES];
    let head = format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    let request = [head.as_bytes(), &body].concat();
    let users: Vec<User> = (0..USERS).map(|_| balancer.user()).collect();
    let ready = Barrier::new(USERS);
    thread::scope(|scope| {
        for mut user in users {
            let (ready, request, body) = (&ready, &request, &body);
            scope.spawn(move || {
                for _ in 0..3 {
                    ready.wait();
                    user.send(request);
                    assert_eq!(user.answer().text(), body.len().to_string());
                }
            });
        }
    });
    assert!(balancer.count(|it| it.buffers_exhausted.get()) > 0, "the blocks were enough for all");
    balancer.expect("users cut off", 0, |it| it.api_cut_short.get());
    balancer.stop();
}

#[test]
fn a_backend_that_refuses_is_passed_over_and_only_when_all_do_the_user_hears_of_it() {
    let closed = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let backend = Backend::named("one");
    let (gone, also_gone) = (closed(), closed());
    let mut balancer = Balancer::over(&[gone, backend.address, also_gone], |_| {});
    let mut user = balancer.user();
    for method in ["GET", "POST", "GET", "POST"] {
        user.send(format!("{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"));
        assert_eq!(user.answer().text(), "one");
    }
    balancer.register(&[gone, also_gone]);
    let answer = balancer.user().get("/");
    assert_eq!(answer.status(), 502);
    assert!(balancer.count(|it| it.connects_failed.get()) >= 3);
    balancer.stop();
}

/// Answers one request per connection, and closes it when the next one arrives.
fn stale() -> Backend {
    Backend::run(|own, mut wire| {
        if own.request(&mut wire).is_some() {
            wire.write(ok("fresh"));
            own.request(&mut wire);
        }
    })
}

#[test]
fn a_request_that_may_be_repeated_survives_a_connection_gone_stale() {
    let backend = stale();
    let mut balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    for _ in 0..5 {
        assert_eq!(user.get("/").text(), "fresh");
    }
    let retried: Vec<u8> = (0..5).map(|_| balancer.line().retries).collect();
    assert_eq!(retried, [0, 1, 1, 1, 1]);
    balancer.stop();
}

#[test]
fn a_request_that_must_not_be_repeated_is_not() {
    let backend = stale();
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    assert_eq!(user.get("/").text(), "fresh");
    user.send("POST /once HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi");
    assert_eq!(user.answer().status(), 502);
    let times = backend.requests().iter().filter(|request| request.path() == "/once").count();
    assert_eq!(times, 1);
    balancer.stop();
}

#[test]
fn a_connection_that_its_backend_closed_is_not_used_again() {
    let backend = Backend::run(|own, mut wire| {
        own.request(&mut wire);
        wire.write(ok("bye"));
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    for _ in 0..5 {
        assert_eq!(user.get("/").text(), "bye");
        balancer.expect("idle connections", 0, |it| it.api_upstream_idle.get());
    }
    assert_eq!(balancer.count(|it| it.retries.get()), 0);
    balancer.stop();
}

#[test]
fn a_connection_on_which_too_much_was_said_is_not_used_again() {
    let backend = Backend::answering(|_| [ok("yes"), ok("smuggled")].concat());
    let balancer = Balancer::over(&[backend.address], |_| {});
    for _ in 0..5 {
        assert_eq!(balancer.user().get("/").text(), "yes");
    }
    assert_eq!(backend.connections(), 5);
    balancer.stop();
}

#[test]
fn a_connection_is_kept_no_longer_than_it_should_be() {
    let backend = Backend::answering(|request| match request.path() {
        "/close" => b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec(),
        "/old" => b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n".to_vec(),
        _ => ok("kept"),
    });
    let balancer = Balancer::over(&[backend.address], |config| config.api.upstream_idle = SHORT);
    for (path, idle) in [("/close", 0), ("/old", 0), ("/", 1)] {
        balancer.user().get(path);
        balancer.expect(path, idle, |it| it.api_upstream_idle.get());
    }
    balancer.expect("idle connections, later", 0, |it| it.api_upstream_idle.get());
    balancer.stop();
}

#[test]
fn a_response_that_was_cut_never_looks_whole() {
    for (name, begun) in [
        ("length", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"),
        ("chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"),
        ("chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf"),
        ("size", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8000000000000000\r\nhalf"),
    ] {
        let backend = Backend::run(move |own, mut wire| {
            own.request(&mut wire);
            wire.write(begun);
        });
        let mut balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(user.try_answer(false).is_none(), "{name}");
        let line = balancer.line();
        assert_eq!((line.status, line.fault.is_some()), (200, true), "{name}");
        balancer.expect(name, 1, |it| it.api_cut_short.get());
        balancer.stop();
    }
}

#[test]
fn a_response_that_is_none_is_answered_for() {
    for begun in [
        "HTTP/1.1 OK\r\n\r\n",
        "220 mail.example\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        "",
        "HTTP/1.1 200",
    ] {
        let backend = Backend::run(move |own, mut wire| {
            own.request(&mut wire);
            wire.write(begun);
        });
        let balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        assert_eq!(user.get("/").status(), 502, "{begun:?}");
        // The user's own connection is not affected.
        assert_eq!(user.get("/").status(), 502, "{begun:?}");
        balancer.stop();
    }
}

#[test]
fn a_backend_that_does_not_answer_is_given_up() {
    let backend = Backend::run(|_, mut wire| {
        wire.rest();
    });
    let balancer = Balancer::over(&[backend.address], |config| config.api.answer_timeout = SHORT);
    let mut user = balancer.user();
    assert_eq!(user.get("/").status(), 504);
    balancer.expect("failures", 1, |it| it.api_failed.get());
    balancer.stop();
}

#[test]
fn a_response_that_stops_on_its_way_is_cut() {
    let backend = Backend::run(|own, mut wire| {
        own.request(&mut wire);
        wire.write("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
        wire.rest();
    });
    let balancer = Balancer::over(&[backend.address], |config| config.api.body_timeout = SHORT);
    let mut user = balancer.user();
    user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(user.try_answer(false).is_none());
    balancer.stop();
}

#[test]
fn a_user_who_dawdles_loses_the_connection() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |config| {
        config.api.head_timeout = SHORT;
        config.api.idle_timeout = SHORT;
        config.api.body_timeout = SHORT;
    });
    let mut silent = balancer.user();
    silent.ends();
    let mut dripping = balancer.user();
    dripping.send("GET / HTTP/1.1\r\nHo");
    let begun = Instant::now();
    assert_eq!(dripping.answer().status(), 408);
    assert!(begun.elapsed() < 20 * SHORT);
    dripping.ends();
    let mut stalling = balancer.user();
    stalling.send("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf");
    assert_eq!(stalling.answer().status(), 408);
    stalling.ends();
    let mut idle = balancer.user();
    assert_eq!(idle.get("/").text(), "one");
    idle.ends();
    assert!(backend.requests().iter().all(|request| request.start.starts_with("GET")));
    balancer.expect("sessions", 0, |it| it.sessions_active.get());
    balancer.stop();
}

#[test]
fn many_slow_heads_keep_nobody_from_being_served_and_take_no_more_than_their_part() {
    const SLOW: usize = 300;
    let backend = Backend::named("one");
    // One eighth of it is for heads, of which each of these takes at least 3,000 bytes.
    let balancer = Balancer::over(&[backend.address], |config| {
        config.limits.buffer_bytes = 1 << 20;
    });
    let mut slow: Vec<_> = (0..SLOW).map(|_| balancer.user()).collect();
    for user in &mut slow {
        user.send(format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}", "y".repeat(3000)));
        balancer.turn();
    }
    let mut user = balancer.user();
    for _ in 0..20 {
        assert_eq!(user.get("/").text(), "one");
    }
    let let_go = balancer.count(|it| it.api_heads_shed.get()) as usize;
    assert!(SLOW - let_go <= (1 << 20) / 8 / 3000, "{let_go} were let go");
    // Those who waited longest go, and they are told.
    for (place, user) in slow.iter_mut().enumerate() {
        if place >= let_go {
            user.send("\r\n\r\n");
        }
        let answer = user.answer();
        let wanted = if place < let_go { (503, Some("close")) } else { (200, None) };
        assert_eq!((answer.status(), answer.one("connection")), wanted, "{place}");
    }
    balancer.stop();
}

#[test]
fn requests_sent_ahead_take_no_more_than_their_part() {
    const AHEAD: usize = 200;
    let backend = Backend::run(|own, mut wire| {
        own.request(&mut wire);
        wait_for("more requests than are kept ahead", || {
            (own.requests().len() > AHEAD).then_some(())
        });
        let _ = wire.stream.write_all(&ok("done"));
        // It goes on listening, so that nobody has to be let go because of it.
        wire.rest();
    });
    let balancer = Balancer::over(&[backend.address], |config| {
        config.limits.buffer_bytes = 4 << 20;
        config.api.body_timeout = 5 * PATIENCE;
    });
    let mut users: Vec<_> = (0..AHEAD).map(|_| balancer.user()).collect();
    let ahead = format!("GET /ahead HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(3000));
    for user in &mut users {
        user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        user.send(&ahead);
        balancer.turn();
    }
    assert!(balancer.count(|it| it.api_heads_shed.get()) > 0);
    assert_eq!(balancer.user().get("/").text(), "done");
    let mut ended = 0;
    for user in &mut users {
        let answer = user.answer();
        assert_eq!(answer.text(), "done", "what was asked for is answered");
        if answer.one("connection") == Some("close") {
            user.ends();
            ended += 1;
        }
    }
    assert!(ended > 0, "of some what they sent ahead was thrown away");
    balancer.stop();
}

#[test]
fn beyond_the_session_limit_users_are_told_so_and_many_at_once_as_well() {
    const MORE: usize = 200;
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut users: Vec<_> = (0..1000).map(|_| balancer.user()).collect();
    balancer.expect("sessions", 1000, |it| it.sessions_active.get());
    // Users who say nothing do not keep others from being told.
    let silent: Vec<_> = (0..40).map(|_| balancer.user()).collect();
    for number in 0..MORE {
        let mut user = balancer.user();
        let body = "x".repeat(if number % 2 == 0 { 0 } else { 100_000 });
        let length = body.len();
        user.send(format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"));
        let answer = user.answer();
        let fields = (answer.one("retry-after"), answer.one("connection"));
        assert_eq!((answer.status(), fields), (503, (Some("5"), Some("close"))), "{number}");
        user.ends();
    }
    let all = (MORE + silent.len()) as u64;
    balancer.expect("turned away", all, |it| it.users_refused_full.get());
    balancer.expect("sessions", 1000, |it| it.sessions_active.get());
    assert_eq!(users[999].get("/").text(), "one");
    assert!(backend.requests().iter().all(|request| request.start.starts_with("GET")));
    drop(users.pop());
    balancer.expect("sessions", 999, |it| it.sessions_active.get());
    assert_eq!(balancer.user().get("/").text(), "one");
    balancer.stop();
}

#[test]
fn a_user_who_asks_again_while_the_balancer_drains_is_not_reset() {
    let backend = Backend::named("one");
    let mut balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    assert_eq!(user.get("/").text(), "one");
    balancer.order(Order::Drain);
    user.ends();
    for _ in 0..2 {
        user.send("GET /again HTTP/1.1\r\nHost: x\r\n\r\n");
        balancer.turn();
    }
    assert!(user.wire.stream.take_error().unwrap().is_none());
    assert_eq!(backend.requests().len(), 1, "no further request is taken");
    balancer.stop();
}

#[test]
fn a_balancer_that_drains_finishes_what_it_was_asked_and_takes_no_more() {
    let backend = Backend::run(|own, mut wire: Wire| {
        while let Some(request) = own.request(&mut wire) {
            if request.path() == "/slow" {
                wait_for("the backend to have had three requests", || {
                    (own.requests().len() >= 3).then_some(())
                });
            }
            let _ = wire.stream.write_all(&ok("done"));
        }
    });
    let mut balancer = Balancer::over(&[backend.address], |_| {});
    let (mut idle, mut busy) = (balancer.user(), balancer.user());
    idle.get("/");
    busy.send("GET /slow HTTP/1.1\r\nHost: x\r\n\r\n");
    wait_for("the backend to have had two requests", || {
        (backend.requests().len() == 2).then_some(())
    });
    let mut late = balancer.user();
    balancer.expect("sessions", 3, |it| it.sessions_active.get());
    balancer.order(Order::Drain);
    idle.ends();
    late.send("GET /late HTTP/1.1\r\nHost: x\r\n\r\n");
    for user in [&mut late, &mut busy] {
        let answer = user.answer();
        assert_eq!((answer.text(), answer.one("connection")), ("done", Some("close")));
    }
    balancer.expect("idle connections", 0, |it| it.api_upstream_idle.get());
    balancer.stop();
}

#[test]
fn a_request_leaves_a_line_in_the_log() {
    let backend = Backend::answering(|_| ok("12345"));
    let mut balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send("PUT /thing?x=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc");
    user.answer();
    let line = balancer.line();
    assert_eq!(line.request(), ("PUT", "/thing?x=1"));
    assert_eq!((line.status, line.bytes_up, line.bytes_down, line.retries), (200, 3, 5, 0));
    assert_eq!(line.client, user.wire.stream.local_addr().unwrap());
    assert_eq!((line.backend.map(|id| id.0), line.fault, line.number), (Some(1), None, 1));
    let times = line.times;
    let steps =
        [Some(times.began), Some(times.read), times.connected, times.answered, Some(times.ended)];
    assert!(steps.is_sorted() && steps.iter().all(Option::is_some), "{times:?}");
    user.send("nonsense\r\n\r\n");
    user.answer();
    let line = balancer.line();
    assert_eq!((line.status, line.backend, line.number), (400, None, 2));
    assert!(line.fault.is_some());
    balancer.stop();
}

#[test]
fn a_backend_that_says_wait_for_long_takes_no_buffers_from_others() {
    const TIMES: usize = 50_000;
    let backend = Backend::run(|own, mut wire| {
        own.request(&mut wire);
        wire.write(b"HTTP/1.1 102 Wait\r\n\r\n".repeat(TIMES));
        wire.write(ok("done"));
        wire.rest();
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    let unused = balancer.count(|it| it.buffers_free.get());
    user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    for number in 0..TIMES {
        assert_eq!(user.wire.head().unwrap().status(), 102, "{number}");
        let now = balancer.count(|it| it.buffers_free.get());
        assert!(unused - now < 100, "{} blocks are taken", unused - now);
    }
    assert_eq!(user.answer().text(), "done");
    balancer.stop();
}

#[test]
fn what_a_backend_pads_or_spoils_is_cleaned() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\nX-A: a\x01b\0c\rd\x7f\r\nX-B: b\r\n";
    for (name, answer) in [
        ("length", format!("{HEAD}Content-Length: 5\r\n\r\nhello")),
        (
            "chunked",
            format!(
                "{HEAD}Transfer-Encoding: chunked\r\n\r\n5   \r\nhello\r\n0 \r\nX-T: t\x01\r\n\r\n"
            ),
        ),
        (
            "interim",
            format!("HTTP/1.1 103 Early\r\nX-A: \x02\r\n\r\n{HEAD}Content-Length: 5\r\n\r\nhello"),
        ),
    ] {
        for step in [1, 7, usize::MAX] {
            let said = answer.clone();
            let backend = Backend::run(move |own, mut wire| {
                own.request(&mut wire);
                said.as_bytes().chunks(step).for_each(|part| wire.write(part));
                wire.rest();
            });
            let balancer = Balancer::over(&[backend.address], |_| {});
            let answer = balancer.user().get("/");
            assert_eq!((answer.status(), answer.text()), (200, "hello"), "{name}");
            assert_eq!((answer.one("x-a"), answer.one("x-b")), (Some("a b c d"), Some("b")));
            balancer.stop();
        }
    }
}

#[test]
fn what_frames_an_answer_is_not_guessed() {
    for begun in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\0\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: \x01\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nX\x01: a\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 200 O\x01K\r\nContent-Length: 5\r\n\r\nhello",
    ] {
        let backend = Backend::run(move |own, mut wire| {
            own.request(&mut wire);
            wire.write(begun);
            wire.rest();
        });
        let balancer = Balancer::over(&[backend.address], |_| {});
        assert_eq!(balancer.user().get("/").status(), 502, "{begun:?}");
        balancer.stop();
    }
}
