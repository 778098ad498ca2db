//! One check of a backend, on the network: a connection, or a request and the status of its answer. Owns the
//! sentence that says why a check failed. When a backend is checked, and what a failure means, is `checks`'.
//! Uses the runtime's own sockets, as `probe` does and for the same reason.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::probe::{self, Port};
use crate::config::services::{CheckConfig, CheckKind, Expected};

/// Bytes that an answer's head may have; the rest of an answer is not read.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Who asks, for the backend's log.
const AGENT: &str = concat!("lb/", env!("CARGO_PKG_VERSION"), " (check)");

/// What a check connects to, and what it wants to see there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    pub port: Port,
    pub timeout: Duration,
    /// `None`: that a connection is accepted is enough.
    pub question: Option<Question>,
}

/// A request, and the statuses of a good answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    pub path: String,
    pub host: String,
    pub expect: Expected,
}

impl Target {
    /// How the backend at this port is checked. A check on another port asks another server, which expects
    /// no PROXY header.
    pub fn of(check: &CheckConfig, backend: Port) -> Target {
        let own = backend.address;
        let address = SocketAddr::new(own.ip(), check.port.unwrap_or(own.port()));
        let port = Port { address, proxy: backend.proxy && address == own };
        let question = (check.kind == CheckKind::Http).then(|| Question {
            path: check.path.clone(),
            host: check.host.clone().unwrap_or_else(|| address.to_string()),
            expect: check.expect,
        });
        Target { port, timeout: check.timeout, question }
    }
}

/// Carries out a check.
///
/// # Errors
/// Why it failed, for the log.
pub async fn check(target: &Target) -> Result<(), String> {
    let address = target.port.address;
    match timeout(target.timeout, attempt(target)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("no answer from {address} within {} ms", target.timeout.as_millis())),
    }
}

async fn attempt(target: &Target) -> Result<(), String> {
    let address = target.port.address;
    let connected = probe::meet(target.port).await;
    let stream = connected.map_err(|error| format!("cannot connect to {address}: {error}"))?;
    let Some(question) = &target.question else { return Ok(()) };
    let answer = ask(stream, question).await;
    let status = answer.map_err(|why| format!("no answer from {address}: {why}"))?.status();
    let Expected { first, last } = question.expect;
    match status.as_u16() {
        good if (first..=last).contains(&good) => Ok(()),
        bad if first == last => Err(format!("{address} answered {bad} instead of {first}")),
        bad => Err(format!("{address} answered {bad} instead of {first} to {last}")),
    }
}

/// Sends the request over this connection and reads the head of the answer.
async fn ask(stream: TcpStream, question: &Question) -> Result<Response<()>, String> {
    let request = Request::get(&question.path)
        .header(HOST, &question.host)
        .header(USER_AGENT, AGENT)
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let mut http = http1::Builder::new();
    http.max_buf_size(HEAD_BYTES_MAX);
    let opened = http.handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = opened.map_err(|error| error.to_string())?;
    let mut answer = std::pin::pin!(sender.send_request(request));
    // Whichever ends first: a connection that is over has handed on what there was of an answer.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        _ = connection => answer.await,
    };
    answer.map(|answer| answer.map(drop)).map_err(|error| in_full(&error))
}

/// An error with what it came from, which is where hyper says what went wrong.
fn in_full(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn at(address: SocketAddr) -> Port {
        Port { address, proxy: false }
    }

    fn http() -> CheckConfig {
        CheckConfig {
            kind: CheckKind::Http,
            path: "/primary".to_owned(),
            timeout: PATIENCE,
            expect: Expected { first: 200, last: 200 },
            ..CheckConfig::default()
        }
    }

    /// Answers one connection with these bytes, and says what it was asked.
    async fn answers(
        check: CheckConfig,
        answer: &'static str,
        hangs_up: bool,
    ) -> (Result<(), String>, String, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backend = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") && stream.read_buf(&mut asked).await.unwrap() > 0 {}
            stream.write_all(answer.as_bytes()).await.unwrap();
            if !hangs_up {
                // Until the other side has had enough.
                let _ = stream.read(&mut [0]).await;
            }
            String::from_utf8(asked).unwrap()
        };
        let target = Target::of(&check, at(address));
        let (outcome, asked) = tokio::join!(super::check(&target), backend);
        (outcome, asked, address)
    }

    #[tokio::test]
    async fn an_http_check_asks_for_its_path_and_looks_at_the_status_alone() {
        let (outcome, asked, address) =
            answers(http(), "HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\nand so", false).await;
        assert_eq!(outcome, Ok(()), "the rest of the answer is of no interest");
        assert!(asked.starts_with("GET /primary HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains(&format!("host: {address}\r\n")), "{asked}");
        let named = CheckConfig { host: Some("db.example".to_owned()), ..http() };
        let (_, asked, _) = answers(named, "HTTP/1.0 200 OK\r\n\r\n", true).await;
        assert!(asked.contains("host: db.example\r\n"), "{asked}");
    }

    #[tokio::test]
    async fn a_check_on_the_backends_own_port_begins_with_the_header_that_it_expects() {
        let backend = Port { address: "192.0.2.1:80".parse().unwrap(), proxy: true };
        for (port, proxy) in [(None, true), (Some(80), true), (Some(8008), false)] {
            let target = Target::of(&CheckConfig { port, ..http() }, backend);
            let address = (backend.address.ip(), port.unwrap_or(80)).into();
            assert_eq!(target.port, Port { address, proxy });
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = Port { address: listener.local_addr().unwrap(), proxy: true };
        let backend = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") || asked.len() < 17 {
                assert_ne!(stream.read_buf(&mut asked).await.unwrap(), 0);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            asked
        };
        let target = Target::of(&http(), port);
        let (outcome, asked) = tokio::join!(super::check(&target), backend);
        assert_eq!(outcome, Ok(()));
        assert_eq!(&asked[..16], b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
        assert!(asked[16..].starts_with(b"GET /primary HTTP/1.1\r\n"));
    }

    #[tokio::test]
    async fn any_other_status_fails_and_so_does_what_is_no_answer() {
        let range = CheckConfig { expect: Expected { first: 200, last: 399 }, ..http() };
        let unavailable = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
        let found = "HTTP/1.1 302 Found\r\nlocation: /\r\n\r\n";
        let long = Box::leak(
            format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "a".repeat(40_000)).into_boxed_str(),
        );
        for (check, answer, words) in [
            (http(), unavailable, "answered 503 instead of 200"),
            (range.clone(), unavailable, "answered 503 instead of 200 to 399"),
            (http(), found, "answered 302 instead of 200"),
            (range, found, ""),
            (http(), "SSH-2.0-OpenSSH\r\n\r\n", "no answer from"),
            (http(), "", "no answer from"),
            (http(), long, "no answer from"),
        ] {
            let (outcome, _, _) = answers(check, answer, true).await;
            match outcome {
                Ok(()) => assert_eq!(words, "", "{answer}"),
                Err(why) => assert!(!words.is_empty() && why.contains(words), "{why}"),
            }
        }
    }

    #[tokio::test]
    async fn a_backend_that_accepts_and_says_nothing_fails_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target =
            Target::of(&CheckConfig { timeout: Duration::from_millis(50), ..http() }, at(address));
        let why = check(&target).await.unwrap_err();
        assert_eq!(why, format!("no answer from {address} within 50 ms"));
        let tcp = CheckConfig { kind: CheckKind::Tcp, timeout: PATIENCE, ..CheckConfig::default() };
        assert_eq!(check(&Target::of(&tcp, at(address))).await, Ok(()), "it accepts");
        let port = Some(address.port());
        let elsewhere =
            Target::of(&CheckConfig { port, ..tcp.clone() }, at((address.ip(), 9).into()));
        assert_eq!(check(&elsewhere).await, Ok(()), "the check has a port of its own");
        drop(listener);
        let why = check(&Target::of(&tcp, at(address))).await.unwrap_err();
        assert!(why.contains("cannot connect"), "{why}");
    }
}
