//! One check of a backend, on the network: a connection, a request and the status of its answer, or gRPC's health call.
//! Owns the sentence that says why a check failed, and whether that was the backend's doing. When a backend is checked,
//! and what a failure means, is `checks`'.
//! Uses the runtime's own sockets, as `probe` does and for the same reason.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::timeout;

use super::contact::{AGENT, Broken, Contact, Missed, Port};
use super::health_call::{self, Health, HealthCall};
use super::probe;
use crate::config::services::{CheckConfig, CheckKind, Expected};

/// Bytes that an answer's head may have, with all interim answers before it; the rest of an answer is not
/// read.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Field lines of one head, at most.
const FIELDS_MAX: usize = 100;
/// Interim answers (1xx) that are passed over, at most.
const INTERIM_MAX: usize = 8;

/// What a check connects to, and what it wants to see there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    pub port: Port,
    pub timeout: Duration,
    /// `None`: that a connection is accepted is enough.
    pub question: Option<Question>,
    /// Whether a door of the balancer itself is there, which says nothing of the backend.
    pub is_own_door: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Question {
    Http(HttpQuestion),
    Grpc(HealthCall),
}

/// A request, and the statuses of a good answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HttpQuestion {
    pub method: &'static str,
    pub path: String,
    pub host: String,
    pub expect: Expected,
}

impl Target {
    /// How the backend at this port is checked. A check on another port asks another server, which expects
    /// no PROXY header and speaks no TLS.
    pub fn of(check: &CheckConfig, backend: Port) -> Target {
        let own = backend.address;
        let address = SocketAddr::new(own.ip(), check.port.unwrap_or(own.port()));
        let proxy = backend.proxy && address == own;
        let port = Port { address, proxy, tls: backend.tls.filter(|_| address == own) };
        let host = || check.host.clone().unwrap_or_else(|| address.to_string());
        let question = match check.kind {
            CheckKind::Off | CheckKind::Tcp => None,
            CheckKind::Http => Some(Question::Http(HttpQuestion {
                method: "GET",
                path: check.path.clone(),
                host: host(),
                expect: check.expect,
            })),
            CheckKind::Grpc => {
                let service = check.grpc_service.clone();
                Some(Question::Grpc(HealthCall { service, host: host(), takes_any: false }))
            }
        };
        Target { port, timeout: check.timeout(), question, is_own_door: false }
    }

    /// Whether the backend at this port answers requests at all, whatever it says to one that asks for nothing
    /// in particular (RFC 9110 9.3.7); one that speaks HTTP/2 is called, as it may know nothing else.
    pub fn any_answer(port: Port, http2: bool, timeout: Duration) -> Target {
        let host = port.address.to_string();
        let question = match http2 {
            true => Question::Grpc(HealthCall { service: String::new(), host, takes_any: true }),
            false => Question::Http(HttpQuestion {
                method: "OPTIONS",
                path: "*".to_owned(),
                host,
                expect: Expected { first: 100, last: 599 },
            }),
        };
        Target { port, timeout, question: Some(question), is_own_door: false }
    }
}

/// Why a check has not passed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// For the log.
    pub sentence: String,
    /// Whether something was lacking on this side, so that nothing is known about the backend.
    pub is_ours: bool,
}

impl Failure {
    pub fn by_backend(sentence: String) -> Failure {
        Failure { sentence, is_ours: false }
    }

    /// The same where TLS may have been what failed.
    fn by_missed(what: &str, address: SocketAddr, missed: &Missed) -> Failure {
        match missed {
            Missed::Wire(error) => Failure::by_error(what, address, error),
            Missed::Tls(_) => Failure::by_backend(format!("{what} {address}: {missed}")),
        }
    }

    /// Of the connection to `address`, while `what` was done.
    fn by_error(what: &str, address: SocketAddr, error: &io::Error) -> Failure {
        match probe::is_own_lack(error) {
            true => Failure {
                sentence: format!(
                    "the balancer could not check {address} for want of its own resources: {error}"
                ),
                is_ours: true,
            },
            false => Failure::by_backend(format!("{what} {address}: {error}")),
        }
    }
}

/// Carries out a check.
///
/// # Errors
/// Why it has not passed.
pub async fn check(target: &Target) -> Result<(), Failure> {
    let address = target.port.address;
    if target.is_own_door {
        return Err(Failure::by_backend(format!(
            "{address} is a door of the balancer itself: give the check another port"
        )));
    }
    match timeout(target.timeout, attempt(target)).await {
        Ok(outcome) => outcome,
        Err(_) => {
            let ms = target.timeout.as_millis();
            Err(Failure::by_backend(format!("no answer from {address} within {ms} ms")))
        }
    }
}

async fn attempt(target: &Target) -> Result<(), Failure> {
    let address = target.port.address;
    let connected = Contact::make(&target.port).await;
    let contact =
        connected.map_err(|missed| Failure::by_missed("cannot connect to", address, &missed))?;
    let Some(question) = &target.question else { return Ok(()) };
    let outcome = match question {
        Question::Http(question) => ask(contact, question).await.map(|it| judged(question, it)),
        Question::Grpc(call) => {
            health_call::ask(contact, call, target.timeout).await.map(|health| match health {
                Health::SERVING => Ok(()),
                _ if call.takes_any => Ok(()),
                other => Err(format!("{other} instead of {}", Health::SERVING)),
            })
        }
    };
    match outcome {
        Ok(judged) => {
            judged.map_err(|why| Failure::by_backend(format!("{address} answered {why}")))
        }
        Err(Broken::Wire(missed)) => Err(Failure::by_missed("no answer from", address, &missed)),
        Err(Broken::Words(why)) => {
            Err(Failure::by_backend(format!("no answer from {address}: {why}")))
        }
    }
}

/// Whether this status is a good answer, else what it is.
fn judged(question: &HttpQuestion, status: u16) -> Result<(), String> {
    let Expected { first, last } = question.expect;
    let instead = match status {
        good if (first..=last).contains(&good) => return Ok(()),
        _ if first == last => format!("{first}"),
        _ => format!("{first} to {last}"),
    };
    Err(format!("{status} instead of {instead}"))
}

/// Sends the request over this connection and reads the status of the answer. Takes as long as the other end
/// likes.
async fn ask(mut contact: Contact, question: &HttpQuestion) -> Result<u16, Broken> {
    let HttpQuestion { method, path, host, .. } = question;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: {AGENT}\r\naccept: */*\r\n\
         connection: close\r\n\r\n"
    );
    contact.send(request.as_bytes()).await.map_err(Missed::Wire)?;
    let (mut heard, mut interim) = (Vec::with_capacity(1024), 0);
    loop {
        let known = heard.len();
        if contact.receive(&mut heard, HEAD_BYTES_MAX - known).await? == 0 {
            return Err("it closed the connection before it had answered".to_owned().into());
        }
        // Every head ends with a line, so a byte at a time is not parsed a byte at a time.
        if !heard[known..].contains(&b'\n') && heard.len() < HEAD_BYTES_MAX {
            continue;
        }
        while let Some((status, length)) = head(&heard)? {
            if !matches!(status, 100 | 102..=199) {
                return Ok(status);
            }
            heard.drain(..length);
            interim += 1;
            if interim > INTERIM_MAX {
                return Err(format!("it sent more than {INTERIM_MAX} interim answers").into());
            }
        }
        if heard.len() == HEAD_BYTES_MAX {
            let why = format!("the head of its answer is longer than {HEAD_BYTES_MAX} bytes");
            return Err(why.into());
        }
    }
}

/// The status of an answer and the length of its head; `None` as long as that is incomplete. Not strict about
/// the rest: it goes nowhere.
fn head(heard: &[u8]) -> Result<Option<(u16, usize)>, String> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut answer = httparse::Response::new(&mut fields);
    let read = httparse::ParserConfig::default()
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .ignore_invalid_headers_in_responses(true)
        .parse_response(&mut answer, heard);
    match read {
        Ok(httparse::Status::Complete(length)) => Ok(answer.code.map(|status| (status, length))),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            Err(format!("the head of its answer has more than {FIELDS_MAX} fields"))
        }
        Err(error) => Err(format!("what it sent is no HTTP answer: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use nix::errno::Errno;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn at(address: SocketAddr) -> Port {
        Port { address, proxy: false, tls: None }
    }

    fn http() -> CheckConfig {
        CheckConfig {
            kind: CheckKind::Http,
            path: "/primary".to_owned(),
            timeout: Some(PATIENCE),
            expect: Expected { first: 200, last: 200 },
            ..CheckConfig::default()
        }
    }

    /// Carries out a check, and says why it has not passed.
    async fn checked(target: &Target) -> Result<(), String> {
        super::check(target).await.map_err(|failure| {
            assert!(!failure.is_ours, "{failure:?}");
            failure.sentence
        })
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
        let (outcome, asked) = tokio::join!(checked(&target), backend);
        (outcome, asked, address)
    }

    #[tokio::test]
    async fn an_http_check_asks_for_its_path_and_looks_at_the_status_alone() {
        let (outcome, asked, address) =
            answers(http(), "HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\nand so", false).await;
        assert_eq!(outcome, Ok(()), "the rest of the answer is of no interest");
        assert!(asked.starts_with("GET /primary HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains(&format!("host: {address}\r\n")), "{asked}");
        assert!(asked.contains("\r\nconnection: close\r\n"), "{asked}");
        let named = CheckConfig { host: Some("db.example".to_owned()), ..http() };
        let (_, asked, _) = answers(named, "HTTP/1.0 200 OK\r\n\r\n", true).await;
        assert!(asked.contains("host: db.example\r\n"), "{asked}");
    }

    #[tokio::test]
    async fn a_check_on_the_backends_own_port_begins_with_the_header_that_it_expects() {
        let backend = Port { address: "192.0.2.1:80".parse().unwrap(), proxy: true, tls: None };
        for (port, proxy) in [(None, true), (Some(80), true), (Some(8008), false)] {
            let target = Target::of(&CheckConfig { port, ..http() }, backend.clone());
            let address = (backend.address.ip(), port.unwrap_or(80)).into();
            assert_eq!(target.port, Port { address, proxy, tls: None });
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = Port { address: listener.local_addr().unwrap(), proxy: true, tls: None };
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
        let (outcome, asked) = tokio::join!(checked(&target), backend);
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
            (http(), "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", ""),
            (http(), unavailable, "answered 503 instead of 200"),
            (range.clone(), unavailable, "answered 503 instead of 200 to 399"),
            (http(), found, "answered 302 instead of 200"),
            (range, found, ""),
            (http(), "SSH-2.0-OpenSSH\r\n\r\n", "what it sent is no HTTP answer"),
            (http(), "", "it closed the connection"),
            (http(), "HTTP/1.1 200 OK\r\nserver: x\r\n", "it closed the connection"),
            (http(), long, "longer than 16384 bytes"),
            (http(), "HTTP/1.0 200\nserver: a shell\n\n", ""),
            (http(), "HTTP/1.1 101 Switching Protocols\r\n\r\n", "answered 101 instead of 200"),
        ] {
            let (outcome, _, _) = answers(check, answer, true).await;
            match outcome {
                Ok(()) => assert_eq!(words, "", "{answer}"),
                Err(why) => assert!(!words.is_empty() && why.contains(words), "{why}"),
            }
        }
    }

    #[tokio::test]
    async fn a_check_that_would_ask_the_balancer_itself_fails_unasked() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Target { is_own_door: true, ..Target::of(&http(), at(address)) };
        let why = checked(&target).await.unwrap_err();
        let door = "is a door of the balancer itself: give the check another port";
        assert_eq!(why, format!("{address} {door}"));
        let nobody = timeout(Duration::ZERO, listener.accept()).await;
        assert!(nobody.is_err(), "nobody has connected");
    }

    /// Checks a server that begins with `opening` and then sends `more` for ever, at this pace.
    async fn endless(opening: &str, more: &str, pace: Duration, timeout: Duration) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (opening, more) = (opening.to_owned(), more.to_owned());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut sent = stream.write_all(opening.as_bytes()).await;
            while sent.is_ok() {
                tokio::time::sleep(pace).await;
                sent = stream.write_all(more.as_bytes()).await;
            }
        });
        let outcome =
            checked(&Target::of(&CheckConfig { timeout: Some(timeout), ..http() }, at(address)))
                .await;
        // It ends because the check has hung up.
        server.await.unwrap();
        outcome.unwrap_err().replace(&address.to_string(), "it")
    }

    #[tokio::test]
    async fn an_answer_without_end_is_left_after_so_many_bytes_fields_and_interim_answers() {
        let ok = "HTTP/1.1 200 OK\r\n";
        let interim = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
        for (opening, more, said) in [
            (
                ok,
                "field: value\r\n",
                "no answer from it: the head of its answer has more than 100 fields",
            ),
            (
                ok,
                "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
                "no answer from it: the head of its answer is longer than 16384 bytes",
            ),
            ("", interim, "no answer from it: it sent more than 8 interim answers"),
        ] {
            assert_eq!(endless(opening, more, Duration::ZERO, PATIENCE).await, said);
        }
    }

    #[tokio::test]
    async fn an_answer_that_drips_ends_with_the_time_that_a_check_has_in_all() {
        let begun = tokio::time::Instant::now();
        let (pace, timeout) = (Duration::from_millis(5), Duration::from_millis(100));
        let said = endless("HTTP/1.1 200 OK\r\nx: ", "a", pace, timeout).await;
        assert_eq!(said, "no answer from it within 100 ms");
        assert!(begun.elapsed() < PATIENCE);
    }

    #[tokio::test]
    async fn interim_answers_are_passed_over_and_the_one_that_follows_decides() {
        let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(7);
        let all = format!("HTTP/1.1 100 Continue\r\n\r\n{hints}HTTP/1.1 200 OK\r\n\r\n");
        let (outcome, ..) = answers(http(), Box::leak(all.into_boxed_str()), false).await;
        assert_eq!(outcome, Ok(()));
        let down = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\n\r\n";
        let any = CheckConfig { expect: Expected { first: 100, last: 399 }, ..http() };
        let (outcome, ..) = answers(any.clone(), down, false).await;
        assert!(outcome.unwrap_err().ends_with("answered 503 instead of 100 to 399"));
        let (outcome, ..) = answers(any, "HTTP/1.1 100 Continue\r\n\r\n", true).await;
        assert!(outcome.unwrap_err().ends_with("it closed the connection before it had answered"));
    }

    #[tokio::test]
    async fn a_backend_that_accepts_and_says_nothing_fails_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Target::of(
            &CheckConfig { timeout: Some(Duration::from_millis(50)), ..http() },
            at(address),
        );
        let why = checked(&target).await.unwrap_err();
        assert_eq!(why, format!("no answer from {address} within 50 ms"));
        let tcp =
            CheckConfig { kind: CheckKind::Tcp, timeout: Some(PATIENCE), ..CheckConfig::default() };
        assert_eq!(checked(&Target::of(&tcp, at(address))).await, Ok(()), "it accepts");
        let port = Some(address.port());
        let elsewhere =
            Target::of(&CheckConfig { port, ..tcp.clone() }, at((address.ip(), 9).into()));
        assert_eq!(checked(&elsewhere).await, Ok(()), "the check has a port of its own");
        drop(listener);
        let why = checked(&Target::of(&tcp, at(address))).await.unwrap_err();
        assert!(why.contains("cannot connect"), "{why}");
    }

    #[test]
    fn what_this_host_lacks_says_nothing_about_the_backend() {
        let address = at((Ipv4Addr::LOCALHOST, 80).into()).address;
        for (errno, is_ours) in [
            (Errno::EMFILE, true),
            (Errno::ENFILE, true),
            (Errno::ENOBUFS, true),
            (Errno::ENOMEM, true),
            (Errno::EADDRNOTAVAIL, true),
            (Errno::ECONNREFUSED, false),
            (Errno::ENETUNREACH, false),
            (Errno::ECONNRESET, false),
        ] {
            let error = io::Error::from_raw_os_error(errno as i32);
            let failure = Failure::by_error("cannot connect to", address, &error);
            assert_eq!(failure.is_ours, is_ours, "{failure:?}");
            assert_eq!(failure.sentence.contains("its own resources"), is_ours, "{failure:?}");
        }
    }
}
