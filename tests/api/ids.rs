//! What names a request beyond the balancer: its `X-Request-Id`, and the trace it belongs to.

use crate::harness::{Backend, Balancer, Message};

/// Of a peer whose addresses are these.
fn balancer(backend: &Backend, trusted: &str) -> Balancer {
    Balancer::over(&[backend.address], |config| {
        config.api.request_id = true;
        config.api.trusted = vec![trusted.parse().unwrap()];
    })
}

/// What the backend was told, which the user and the log must be told too.
fn id_of_next(balancer: &mut Balancer, backend: &Backend, answer: &Message) -> String {
    let requests = backend.requests();
    let id = requests.last().unwrap().one("x-request-id").unwrap().to_owned();
    assert_eq!(answer.one("x-request-id"), Some(&*id));
    assert_eq!(balancer.line().id(), id);
    id
}

fn is_made(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Names the response itself, as some backends do.
fn backend() -> Backend {
    Backend::answering(|_| {
        b"HTTP/1.1 200 OK\r\nX-Request-Id: backend\r\nContent-Length: 0\r\n\r\n".to_vec()
    })
}

#[test]
fn an_id_is_taken_from_a_trusted_proxy_only_if_it_is_well_formed() {
    let backend = backend();
    let mut balancer = balancer(&backend, "127.0.0.0/8");
    let mut user = balancer.user();
    let (fits, long) = ("x".repeat(64), "x".repeat(65));
    for (fields, kept) in [
        ("X-Request-Id: 4bf92f35-77b3".to_owned(), Some("4bf92f35-77b3")),
        (format!("x-request-id: {fits}"), Some(&*fits)),
        ("X-Request-Id: mine\r\nConnection: x-request-id".to_owned(), Some("mine")),
        (format!("X-Request-Id: {long}"), None),
        ("X-Request-Id: a b".to_owned(), None),
        ("X-Request-Id: \u{e9}".to_owned(), None),
        ("X-Request-Id:".to_owned(), None),
        ("X-Request-Id: a\r\nX-Request-Id: b".to_owned(), None),
        ("X_Request_Id: a".to_owned(), None),
        ("A: b".to_owned(), None),
    ] {
        user.send(format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n"));
        let answer = user.answer();
        let id = id_of_next(&mut balancer, &backend, &answer);
        match kept {
            Some(kept) => assert_eq!(id, kept),
            None => assert!(is_made(&id), "{fields}: {id}"),
        }
    }
    balancer.stop();
}

#[test]
fn an_id_of_a_stranger_is_replaced_by_one_that_nobody_else_has() {
    let backend = backend();
    let mut balancer = balancer(&backend, "192.0.2.0/24");
    let mut user = balancer.user();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..20 {
        user.send("GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: forged\r\n\r\n");
        let answer = user.answer();
        let id = id_of_next(&mut balancer, &backend, &answer);
        assert!(is_made(&id) && seen.insert(id));
    }
    balancer.stop();
}

#[test]
fn the_balancers_own_answers_carry_an_id_too() {
    let mut balancer = Balancer::start(|config| config.api.request_id = true);
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 503),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("\x16\x03\x01\r\n\r\n", 400),
    ] {
        let mut user = balancer.user();
        user.send(request);
        let answer = user.answer();
        let id = answer.one("x-request-id").unwrap();
        assert!(answer.status() == status && is_made(id), "{answer:?}");
        let line = balancer.line();
        assert_eq!((line.id(), line.status), (id, status));
    }
    balancer.stop();
}

#[test]
fn without_the_setting_ids_pass_both_ways_unchanged() {
    let backend = backend();
    let mut balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send("GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: a b\r\n\r\n");
    assert_eq!(user.answer().one("x-request-id"), Some("backend"));
    assert_eq!(backend.requests()[0].one("x-request-id"), Some("a b"));
    assert_eq!(balancer.line().id(), "");
    user.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    user.answer();
    assert_eq!(backend.requests()[1].one("x-request-id"), None);
    balancer.stop();
}

#[test]
fn a_traceparent_passes_unchanged_and_is_logged_if_it_is_well_formed() {
    let backend = Backend::named("one");
    let mut balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for (values, trace) in [
        (&[GOOD][..], 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736),
        (&["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"], 0),
        (&["nonsense"], 0),
        (&[GOOD, GOOD], 0),
        (&[], 0),
    ] {
        let fields: String = values.iter().map(|it| format!("Traceparent: {it}\r\n")).collect();
        user.send(format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n"));
        user.answer();
        assert_eq!(backend.requests().last().unwrap().all("traceparent"), values);
        assert_eq!(balancer.line().trace, trace, "{values:?}");
    }
    balancer.stop();
}
