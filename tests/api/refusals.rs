//! What is refused: messages that two readers could understand differently, and those beyond a
//! limit. Nothing of them may reach a backend, and the connection must end.

use crate::harness::{Backend, Balancer, User};

/// A refusal of one request; the backend must not have heard a byte.
fn refused(balancer: &Balancer, backend: &Backend, request: &[u8], status: u16) {
    let told = String::from_utf8_lossy(&request[..request.len().min(300)]).into_owned();
    let mut user = balancer.user();
    user.send(request);
    let answer = user.answer();
    assert_eq!(answer.status(), status, "{told}");
    assert_eq!(answer.one("connection"), Some("close"), "{told}");
    user.ends();
    assert_eq!(backend.connections(), 0, "a backend was asked: {told}");
}

/// Both framings in one request.
const TWO_FRAMINGS: &[&str] = &[
    "Content-Length: 4\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 4",
    "Transfer-Encoding: chunked\r\ncontent-length: 4",
    "Transfer-Encoding: CHUNKED\r\nContent-Length: 0",
];

/// Malformed framings that a tolerant reader might accept.
const MALFORMED_FRAMINGS: &[&str] = &[
    "Transfer-Encoding : chunked",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding:\x0bchunked",
    "Transfer-Encoding: \x00chunked",
    "Transfer-Encoding:",
    "Transfer-Encoding: chunked\r\n X: folded",
    "Transfer-Encoding\r\n: chunked",
    "Transfer-Encoding: chunked\nContent-Length: 5",
    "X: y\rTransfer-Encoding: chunked",
    " Transfer-Encoding: chunked",
    "Transfer\x00Encoding: chunked",
    "Content-Length: 4\r\nContent-Length: 5",
    "Content-Length: 4\r\nContent-Length: 4",
    "Content-Length: 4, 4",
    "Content-Length: +4",
    "Content-Length: -4",
    "Content-Length: 0x4",
    "Content-Length: 4 4",
    "Content-Length: 4.0",
    "Content-Length: ",
    "Content-Length: 9223372036854775808",
    "Content-Length: 18446744073709551615",
    "Content-Length: 18446744073709551616",
    "Content-Length: 99999999999999999999999999",
    "Content-Length : 4",
];

const UNKNOWN_CODINGS: &[&str] = &[
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: \"chunked\"",
];

const MALFORMED_FIELDS: &[&str] =
    &["Host: y\r\n\r\n", "\x01: y\r\n\r\n", "X: a\x00b\r\n\r\n", "X y\r\n\r\n", ": y\r\n\r\n"];

/// Whole requests, and the status each is refused with.
const WHOLE_REQUESTS: &[(&str, u16)] = &[
    ("GET / HTTP/1.1\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: u@h\r\n\r\n", 400),
    ("GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET /  HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
    ("GET / HTTP/1.1\nHost: x\n\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\n\r\n", 400),
    ("GET / HTTP/1.1\rHost: x\r\r", 400),
    ("GET / http/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET /\r\n\r\n", 400),
    ("\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (" GET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET /#f HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    ("GET / HTTP/3.1\r\nHost: x\r\n\r\n", 505),
    ("PRI * HTTP/2.0\r\n\r\nSN\r\n\r\n", 505),
    ("CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    ("TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("PUT / HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\nContent-Length: 1\r\n\r\n", 417),
    ("GET / HTTP/1.1\r\nHost: x\r\nVia: 1.1 test\r\n\r\n", 508),
];

#[test]
fn a_request_with_two_meanings_reaches_no_backend() {
    let smuggled = "0\r\n\r\nGET /admin HTTP/1.1\r\nHost: x\r\n\r\n";
    let post = |fields: &str| format!("POST / HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n{smuggled}");
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    for fields in TWO_FRAMINGS.iter().chain(MALFORMED_FRAMINGS) {
        refused(&balancer, &backend, post(fields).as_bytes(), 400);
    }
    for fields in UNKNOWN_CODINGS {
        refused(&balancer, &backend, post(fields).as_bytes(), 501);
    }
    for rest in MALFORMED_FIELDS {
        let get = format!("GET / HTTP/1.1\r\nHost: x\r\n{rest}");
        refused(&balancer, &backend, get.as_bytes(), 400);
    }
    for (request, status) in WHOLE_REQUESTS {
        refused(&balancer, &backend, request.as_bytes(), *status);
    }
    balancer.stop();
}

#[test]
fn a_malformed_chunk_ends_the_request_and_is_not_passed_on() {
    for chunk in [
        "zz\r\n",
        "-1\r\n",
        "+5\r\nhello\r\n",
        " 5\r\nhello\r\n",
        "0x5\r\nhello\r\n",
        "5\nhello\r\n",
        "5\r\nhelloX\r\n",
        "5\r\nhello\n",
        "5;a\rb\r\nhello\r\n",
        "8000000000000000\r\n",
        "ffffffffffffffff\r\n",
        "fffffffffffffffff\r\n",
        "5 \r\nhello\r\n",
        "\r\nhello\r\n",
        "0\r\nX: a\r\n b\r\n\r\n",
        "0\r\nno colon\r\n\r\n",
    ] {
        let backend = Backend::named("one");
        let balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        user.send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n");
        user.send(chunk);
        let answer = user.answer();
        assert_eq!((answer.status(), answer.one("connection")), (400, Some("close")), "{chunk:?}");
        user.ends();
        let heard = String::from_utf8_lossy(&backend.bytes()).into_owned();
        let body = heard.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        assert!(["", "2\r\nok", "2\r\nok\r\n"].contains(&body), "{chunk:?} became {body:?}");
        assert!(backend.requests().is_empty(), "{chunk:?} made a whole request");
        balancer.stop();
    }
}

#[test]
fn what_is_too_large_is_refused_with_the_status_that_says_so() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |config| {
        config.api.body_bytes = std::num::NonZeroU64::new(1000);
    });
    let long = |length: usize| "a".repeat(length);
    let head = |rest: String| format!("GET / HTTP/1.1\r\nHost: x\r\n{rest}\r\n").into_bytes();
    let many: String = (0..120).map(|number| format!("X-{number}: 1\r\n")).collect();
    let wide: String = (0..9).map(|n| format!("X-{n}: {}\r\n", long(5000))).collect();
    for (request, status) in [
        (format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", long(9000)).into_bytes(), 414),
        (format!("{} / HTTP/1.1\r\nHost: x\r\n\r\n", long(9000)).into_bytes(), 501),
        (head(format!("X: {}\r\n", long(9000))), 431),
        (head(many), 431),
        (head(wide), 431),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n".to_vec(), 413),
    ] {
        refused(&balancer, &backend, &request, status);
    }
    let mut user = balancer.user();
    user.send("PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    user.send(format!("3e9\r\n{}\r\n0\r\n\r\n", long(1001)));
    assert_eq!(user.answer().status(), 413);
    assert!(backend.requests().is_empty());
    balancer.expect("refusals", 7, |it| it.api_refused.get() + u64::from(it.api_failed.get() > 0));
    balancer.stop();
}

#[test]
fn a_head_that_comes_byte_by_byte_is_read() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    for byte in b"\r\nGET /slow HTTP/1.1\r\nHost: x\r\nX-A: b\r\n\r\n" {
        user.send([*byte]);
    }
    assert_eq!(user.answer().text(), "one");
    balancer.stop();
}

#[test]
fn a_refusal_is_json_for_whoever_asks_for_json() {
    let balancer = Balancer::start(|_| {});
    let ask = |accept: &str| {
        let mut user: User = balancer.user();
        user.send(format!("GET / HTTP/1.1\r\nHost: x\r\n{accept}\r\n"));
        user.answer()
    };
    let json = ask("Accept: application/json\r\n");
    assert_eq!((json.status(), json.one("retry-after")), (503, Some("5")));
    let value: serde_json::Value = serde_json::from_slice(&json.body).unwrap();
    assert_eq!(value["status"], 503, "{value}");
    let text = ask("");
    assert_eq!(text.status(), 503);
    assert!(text.text().contains("(request "), "{}", text.text());
    balancer.stop();
}

#[test]
fn a_question_to_the_balancer_itself_is_answered_by_it() {
    let backend = Backend::named("one");
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send("OPTIONS * HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\n\r\n");
    assert_eq!(user.answer().status(), 200);
    assert_eq!(backend.connections(), 0);
    user.send("OPTIONS * HTTP/1.1\r\nHost: x\r\nMax-Forwards: 3\r\n\r\n");
    assert_eq!(user.answer().text(), "one");
    assert_eq!(backend.requests()[0].one("max-forwards"), Some("2"));
    balancer.stop();
}
