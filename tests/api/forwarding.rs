//! What passes through: every shape of message, in order, complete, and nothing beyond what should.

use std::io::Write;
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use crate::harness::{Backend, Balancer, Message, User, ok};
use crate::random::pattern;
use crate::wait::PATIENCE;

/// Answers with the request's own body, framed as the path says.
fn echo() -> Backend {
    Backend::run(|own, mut wire| {
        while let Some(request) = own.request(&mut wire) {
            let framing = request.path().trim_start_matches('/').to_string();
            let answer = framed(&framing, &request.body);
            if wire.stream.write_all(&answer).is_err() || framing == "close" {
                return;
            }
        }
    })
}

fn framed(framing: &str, body: &[u8]) -> Vec<u8> {
    match framing {
        "chunked" => {
            let mut answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            answer.extend(chunked(body, 1000, "X-Sum: 1\r\n"));
            answer
        }
        "close" => [b"HTTP/1.1 200 OK\r\n\r\n", body].concat(),
        _ => ok(body),
    }
}

fn chunked(body: &[u8], each: usize, trailers: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for chunk in body.chunks(each) {
        out.extend(format!("{:x};name=\"value\"\r\n", chunk.len()).bytes());
        out.extend_from_slice(chunk);
        out.extend_from_slice(b"\r\n");
    }
    out.extend(format!("0\r\n{trailers}\r\n").bytes());
    out
}

#[test]
fn every_request_on_a_kept_alive_connection_is_balanced_over_pooled_connections() {
    let backends = [Backend::named("one"), Backend::named("two")];
    let balancer = Balancer::over(&backends.each_ref().map(|one| one.address), |_| {});
    let mut user = balancer.user();
    let names: Vec<String> =
        (0..40).map(|round| user.get(&format!("/{round}")).text().to_string()).collect();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    assert_eq!(backends.each_ref().map(Backend::connections), [1, 1]);
    balancer.expect("requests", 40, |it| it.api_requests.get());
    balancer.expect("requests on a used connection", 38, |it| it.api_upstream_reused.get());
    drop(user);
    balancer.expect("sessions that ended", 1, |it| it.sessions_ended.get());
    let all = [balancer.count(|it| it.bytes_up.get()), balancer.count(|it| it.bytes_down.get())];
    assert_eq!(balancer.carried_by(0..2), all, "every byte is one of a backend's");
    balancer.stop();
}

#[test]
fn users_share_the_connections_to_backends() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    for _ in 0..20 {
        assert_eq!(balancer.user().get("/").text(), "one");
    }
    assert_eq!(backend.connections(), 1);
    balancer.stop();
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let backends = [(); 3].map(|()| {
        Backend::answering(|request| ok([request.path().as_bytes(), &request.body].concat()))
    });
    let balancer = Balancer::over(&backends.each_ref().map(|one| one.address), |_| {});
    let mut user = balancer.user();
    let mut all = Vec::new();
    for round in 0..30 {
        let body = vec![b'a' + round as u8 % 26; round * 300];
        let head = match round % 3 {
            0 => format!("GET /{round} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes(),
            1 => {
                let length = body.len();
                let head = "HTTP/1.1\r\nHost: x\r\nContent-Length";
                [format!("PUT /{round} {head}: {length}\r\n\r\n").as_bytes(), &body].concat()
            }
            _ => {
                let head = "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
                [format!("POST /{round} {head}").into_bytes(), chunked(&body, 100, "")].concat()
            }
        };
        all.extend(head);
    }
    user.send(all);
    for round in 0..30 {
        let body = if round % 3 == 0 { 0 } else { round * 300 };
        let wanted = format!(
            "/{round}{}",
            "abcdefghijklmnopqrstuvwxyz".chars().nth(round % 26).unwrap().to_string().repeat(body)
        );
        assert_eq!(user.answer().text(), wanted);
    }
    balancer.stop();
}

#[test]
fn bodies_arrive_whole_in_every_framing_both_ways() {
    let backend = echo();
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    for size in [0, 1, 4096, 70_000, 900_000] {
        let body = pattern(size as u64 + 1, size);
        for up in ["length", "chunked"] {
            for down in ["length", "chunked", "close"] {
                user.send(format!("POST /{down} HTTP/1.1\r\nHost: x\r\n"));
                if up == "length" {
                    user.send(format!("Content-Length: {size}\r\n\r\n"));
                    user.send(&body);
                } else {
                    user.send("Transfer-Encoding: chunked\r\n\r\n");
                    user.send(chunked(&body, 7_000, "X-T: 1\r\nContent-Length: 3\r\n"));
                }
                let answer = user.answer();
                assert!(answer.body == body, "{size} bytes, {up} up, {down} down");
                let framing = answer.one("transfer-encoding");
                assert_eq!(framing, (down != "length").then_some("chunked"));
            }
        }
    }
    let trailers = backend.requests().into_iter().flat_map(|request| request.trailers);
    let names: Vec<String> = trailers.map(|(name, _)| name).collect();
    assert!(names.iter().all(|name| name == "x-t"), "a trailer frames: {names:?}");
    assert_eq!(names.len(), 15);
    balancer.stop();
}

#[test]
fn a_body_much_larger_than_all_buffers_passes_both_ways_at_once() {
    const BYTES: usize = 256 << 20;
    let block = pattern(5, 1 << 20);
    let expected = block.clone();
    let backend = Backend::run(move |_, mut wire| {
        wire.head().unwrap();
        wire.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n"));
        let mut down = wire.stream.try_clone().unwrap();
        let block = expected.clone();
        let writer = thread::spawn(move || {
            for _ in 0..BYTES / block.len() {
                down.write_all(&block).unwrap();
            }
        });
        for _ in 0..BYTES / expected.len() {
            assert!(wire.exactly(expected.len()).unwrap() == expected);
        }
        writer.join().unwrap();
    });
    let balancer = Balancer::over(&[backend.address], |config| {
        config.limits.buffer_bytes = 1 << 20;
    });
    let mut user = balancer.user();
    user.send(format!("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: {BYTES}\r\n\r\n"));
    let mut up = user.wire.stream.try_clone().unwrap();
    let sent = block.clone();
    let writer = thread::spawn(move || {
        for _ in 0..BYTES / sent.len() {
            up.write_all(&sent).unwrap();
        }
    });
    assert_eq!(user.wire.head().unwrap().status(), 200);
    for _ in 0..BYTES / block.len() {
        assert!(user.wire.exactly(block.len()).unwrap() == block);
    }
    writer.join().unwrap();
    balancer.stop();
}

#[test]
fn an_upload_that_nobody_reads_is_held_back() {
    const BYTES: usize = 256 << 20;
    let (go, gone) = std::sync::mpsc::channel();
    let gone = std::sync::Mutex::new(gone);
    let backend = Backend::run(move |_, mut wire| {
        wire.head().unwrap();
        gone.lock().unwrap().recv().unwrap();
        let mut read = 0;
        while read < BYTES {
            read += wire.exactly(1 << 20).unwrap().len();
        }
        wire.write(ok("all of it"));
    });
    let balancer = Balancer::over(&[backend.address], |config| {
        config.limits.buffer_bytes = 1 << 20;
    });
    let mut user = balancer.user();
    user.send(format!("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: {BYTES}\r\n\r\n"));
    user.wire.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let (block, mut sent) = (vec![7; 1 << 16], 0);
    while let Ok(count) = user.wire.stream.write(&block) {
        sent += count;
    }
    // What two pairs of sockets hold in the kernel, and the blocks of one megabyte.
    assert!(sent < 64 << 20, "{sent} bytes went somewhere");
    go.send(()).unwrap();
    user.wire.stream.set_write_timeout(Some(PATIENCE)).unwrap();
    while sent < BYTES {
        sent += user.wire.stream.write(&block[..block.len().min(BYTES - sent)]).unwrap();
    }
    assert_eq!(user.answer().text(), "all of it");
    balancer.stop();
}

#[test]
fn answers_without_a_body_leave_the_connection_in_step() {
    let backend = Backend::answering(|request| {
        let answer: &[u8] = match request.path() {
            "/204" => b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
            "/304" => b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n",
            "/205" => b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n",
            _ if request.start.starts_with("HEAD") => {
                b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"
            }
            _ => b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        };
        answer.to_vec()
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    for (method, path, status, length) in [
        ("HEAD", "/", 200, Some("1234")),
        ("GET", "/204", 204, None),
        ("GET", "/304", 304, Some("77")),
        ("GET", "/205", 205, Some("0")),
    ] {
        user.send(format!("{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let answer = user.bare_answer();
        assert_eq!((answer.status(), answer.one("content-length")), (status, length), "{path}");
        assert_eq!(user.get("/after").text(), "ok", "after {method} {path}");
    }
    assert_eq!(backend.connections(), 1);
    balancer.stop();
}

#[test]
fn interim_answers_reach_those_who_know_them() {
    let backend = Backend::answering(|_| {
        let mut answer = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n".repeat(2);
        answer.extend(b"HTTP/1.1 102 Processing\r\n\r\n");
        answer.extend(ok("done"));
        answer
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let heads: Vec<Message> = (0..4).map(|_| user.wire.head().unwrap()).collect();
    let statuses: Vec<u16> = heads.iter().map(Message::status).collect();
    assert_eq!(statuses, [103, 103, 102, 200]);
    assert_eq!(heads[0].one("link"), Some("</a>"));
    let mut old = balancer.user();
    old.send("GET / HTTP/1.0\r\n\r\n");
    let answer = old.wire.head().unwrap();
    assert_eq!((answer.status(), answer.one("connection")), (200, Some("close")));
    assert_eq!(old.wire.rest(), b"done");
    balancer.stop();
}

#[test]
fn leave_to_send_a_body_comes_from_the_backend_or_from_us() {
    for backend_speaks in [true, false] {
        let backend = Backend::run(move |_, mut wire| {
            let head = wire.head().unwrap();
            assert_eq!(head.one("expect"), Some("100-continue"));
            if backend_speaks {
                wire.write("HTTP/1.1 100 Continue\r\n\r\n");
            }
            assert_eq!(wire.exactly(5).unwrap(), b"hello");
            wire.write(ok("thanks"));
        });
        let balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        user.send("PUT / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
        assert_eq!(user.wire.head().unwrap().status(), 100);
        user.send("hello");
        assert_eq!(user.wire.head().unwrap().status(), 200);
        balancer.stop();
    }
}

#[test]
fn an_answer_before_the_body_is_passed_on_and_ends_the_connection() {
    for expects in ["", "Expect: 100-continue\r\n"] {
        let backend = Backend::run(|_, mut wire| {
            wire.head().unwrap();
            wire.write("HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno");
            wire.rest();
        });
        let balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        user.send(format!("PUT / HTTP/1.1\r\nHost: x\r\n{expects}Content-Length: 9999999\r\n\r\n"));
        if expects.is_empty() {
            user.send([7; 10_000]);
        }
        let answer = user.answer();
        assert_eq!((answer.status(), answer.text()), (401, "no"));
        assert_eq!(answer.one("connection"), Some("close"));
        user.ends();
        balancer.stop();
    }
}

#[test]
fn a_backend_learns_who_asks_and_sees_nothing_that_was_for_us() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send(
        "GET /a?b=%2F..&c HTTP/1.1\r\nHost: example.org:81\r\nX-Forwarded-For: 6.6.6.6\r\n\
         X-Forwarded-Proto: https\r\nForwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\n\
         X_Forwarded_For: 6.6.6.6\r\nVia: 1.0 far\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\n\
         Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nTE: gzip\r\nCookie: a=b\r\n\
         X-Same: 1\r\nX-Other: 2\r\nX-Same: 3\r\nAuthorization: Basic eA==\r\n\r\n",
    );
    let answer = user.answer();
    assert!(answer.one("date").is_some_and(|date| date.ends_with(" GMT")));
    let seen = &backend.requests()[0];
    assert_eq!(seen.start, "GET /a?b=%2F..&c HTTP/1.1");
    assert_eq!(seen.all("host"), ["example.org:81"]);
    assert_eq!(seen.all("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(seen.all("x-forwarded-proto"), ["http"]);
    assert_eq!(seen.all("x-forwarded-host"), ["example.org:81"]);
    assert_eq!(seen.all("x-same"), ["1", "3"]);
    assert_eq!(seen.all("cookie"), ["a=b"]);
    assert_eq!(seen.all("authorization"), ["Basic eA=="]);
    assert!(seen.all("via").join(", ").ends_with("1.1 test"), "{seen:?}");
    assert!(seen.all("forwarded").join("").contains("for=127.0.0.1"), "{seen:?}");
    let gone = ["x-hop", "keep-alive", "proxy-connection", "te", "x-real-ip", "x_forwarded_for"];
    for name in gone {
        assert!(seen.all(name).is_empty(), "{name} in {seen:?}");
    }
    assert!(!String::from_utf8_lossy(&backend.bytes()).contains("6.6.6.6"));
    balancer.stop();
}

#[test]
fn the_word_of_a_trusted_proxy_is_added_to() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |config| {
        config.api.trusted = vec!["127.0.0.0/8".parse().unwrap()];
    });
    let mut user = balancer.user();
    user.send(
        "GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.9\r\nX-Forwarded-Proto: https\r\n\r\n",
    );
    user.answer();
    let seen = &backend.requests()[0];
    assert_eq!(seen.all("x-forwarded-for").join(", "), "192.0.2.9, 127.0.0.1");
    assert_eq!(seen.all("x-forwarded-proto"), ["https"]);
    balancer.stop();
}

#[test]
fn a_target_in_absolute_form_decides_the_host() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    for scheme in ["http", "https", "HTTPS"] {
        user.send(format!(
            "GET {scheme}://real.example/p?q HTTP/1.1\r\nHost: other.example\r\n\r\n"
        ));
        user.answer();
    }
    assert_eq!(backend.requests().len(), 3);
    for seen in backend.requests() {
        assert_eq!((seen.path(), seen.all("host")), ("/p?q", vec!["real.example"]));
        assert_eq!(seen.one("x-forwarded-proto"), Some("http"), "a target is no word on the hop");
    }
    balancer.stop();
}

#[test]
fn a_user_who_has_finished_sending_is_still_answered() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send("GET /1 HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n");
    user.wire.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!([user.answer().text(), user.answer().text()], ["one", "one"]);
    user.ends();
    balancer.stop();
}

#[test]
fn a_slow_reader_holds_back_its_backend_and_loses_nothing() {
    const BYTES: usize = 24 << 20;
    let backend = Backend::answering(|_| ok(pattern(3, BYTES)));
    let balancer = Balancer::over(&[backend.address], |config| {
        config.limits.buffer_bytes = 1 << 20;
    });
    let mut slow = balancer.user();
    slow.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    // Another user is served while nobody reads what the first asked for.
    balancer.expect("bytes to have stopped", 1, |it| u64::from(it.bytes_down.get() > 1 << 16));
    let mut quick = balancer.user();
    quick.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(quick.answer().body == pattern(3, BYTES));
    let mut first = [0; 1];
    slow.wire.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(slow.wire.stream.peek(&mut first).unwrap(), 1);
    assert!(slow.answer().body == pattern(3, BYTES));
    balancer.stop();
}

#[test]
fn many_users_at_once_each_get_their_own_answers() {
    let backends = [(); 3].map(|()| Backend::answering(|request| ok(request.path())));
    let balancer = Balancer::over(&backends.each_ref().map(|one| one.address), |config| {
        config.workers = Some(2);
    });
    let door = balancer.door();
    let users = (0..16).map(|number| {
        thread::spawn(move || {
            let mut user = User::connect(door);
            for round in 0..100 {
                let path = format!("/{number}/{round}/{}", "x".repeat(round * 20));
                assert_eq!(user.get(&path).text(), path);
            }
        })
    });
    users.collect::<Vec<_>>().into_iter().for_each(|user| user.join().unwrap());
    balancer.expect("requests", 1600, |it| it.api_requests.get());
    balancer.stop();
}
