//! The load generator in HTTP/2 against servers of this process: honest ones, in the clear and under TLS, whose
//! every response counts, and others, each of which must be named for what it did.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, SendResponse};
use h2::{Reason, RecvStream};
use lb::cluster::Protocol;
use lb::load::handshakes::Reason as TlsReason;
use lb::load::message::Content;
use lb::load::tally::RequestFailure;
use lb::load::web::{Payload, Request};
use lb::load::{Load, Outcome, Progress, Shape, run};
use lb::tls::client::{Alpn, Terms, Trust, Wishes};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

#[path = "common/certified.rs"]
mod certified;

use certified::certified;

/// Making it takes longer than a request.
static CONTENT: LazyLock<Content> = LazyLock::new(Content::new);

/// What a server does, and what it has seen.
#[derive(Clone)]
struct Ways {
    permits: u32,
    /// Requests after which a connection is left, as it should be.
    leaves_after: usize,
    /// Every so many requests are refused.
    refuses: usize,
    status: u16,
    is_slow: bool,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Ways {
    fn honest() -> Ways {
        Ways {
            permits: 1_000,
            leaves_after: usize::MAX,
            refuses: usize::MAX,
            status: 200,
            is_slow: false,
            seen: Arc::default(),
        }
    }
}

/// Serves in a thread of its own until the test is over; under TLS if there is an acceptor.
fn serve(ways: Ways, tls: Option<TlsAcceptor>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(tokio::task::LocalSet::new().run_until(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                tokio::task::spawn_local(greet(socket, ways.clone(), tls.clone()));
            }
        }));
    });
    at
}

/// How a connection ends is told by the other side's counts.
async fn greet(socket: TcpStream, ways: Ways, tls: Option<TlsAcceptor>) {
    socket.set_nodelay(true).unwrap();
    ways.seen.connections.fetch_add(1, Ordering::Relaxed);
    match tls {
        None => drop(speak(socket, ways).await),
        Some(tls) => {
            if let Ok(user) = tls.accept(socket).await {
                drop(speak(user, ways).await);
            }
        }
    }
}

async fn speak(user: impl AsyncRead + AsyncWrite + Unpin, ways: Ways) -> Result<(), h2::Error> {
    let mut builder = Builder::new();
    let mut user = builder.max_concurrent_streams(ways.permits).handshake::<_, Bytes>(user).await?;
    let mut count = 0;
    while let Some(asked) = user.accept().await {
        let (request, mut respond) = asked?;
        count += 1;
        if count % ways.refuses == 0 {
            respond.send_reset(Reason::REFUSED_STREAM);
            continue;
        }
        if count == ways.leaves_after {
            user.graceful_shutdown();
        }
        tokio::task::spawn_local(answer(request, respond, ways.clone()));
    }
    Ok(())
}

/// Answers as an echo backend of `lb bench serve` does.
async fn answer(
    mut request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    ways: Ways,
) -> Result<(), h2::Error> {
    let now = ways.seen.now.fetch_add(1, Ordering::Relaxed) + 1;
    ways.seen.most.fetch_max(now, Ordering::Relaxed);
    let mut body = Vec::new();
    while let Some(bytes) = request.body_mut().data().await {
        let bytes = bytes?;
        body.extend_from_slice(&bytes);
        request.body_mut().flow_control().release_capacity(bytes.len())?;
    }
    if ways.is_slow {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    ways.seen.now.fetch_sub(1, Ordering::Relaxed);
    let count = request.uri().path().strip_prefix("/bytes/").map(|count| count.parse().unwrap());
    if let Some(count) = count.filter(|_| request.method() != "HEAD") {
        body = CONTENT.from(0, count).to_vec();
    }
    let mut head = http::Response::builder().status(ways.status).header("x-lb-backend", "9301");
    head = head.header("x-lb-bench", &request.headers()["x-lb-bench"]);
    let mut send = respond.send_response(head.body(()).unwrap(), body.is_empty())?;
    if !body.is_empty() {
        send.send_data(body.into(), true)?;
    }
    Ok(())
}

fn load(to: SocketAddr, streams: usize, asks: (&str, &str, Payload)) -> Load {
    let request = Request::new(asks.0, asks.1, "a.example", &[], asks.2).unwrap();
    Load {
        protocol: Protocol::Api,
        to,
        shape: Shape::PingPong,
        connections: 4,
        size: 64,
        window: 1,
        gso: false,
        rate: None,
        warmup: Duration::ZERO,
        duration: Duration::from_millis(300),
        threads: 1,
        patience: Duration::from_secs(5),
        request: Some(Arc::new(request)),
        streams: Some(streams),
        tls: None,
        watch: None,
    }
}

fn get(to: SocketAddr, streams: usize) -> Load {
    load(to, streams, ("GET", "/bytes/100", Payload::None))
}

fn outcome(load: &Load) -> Outcome {
    load.check().unwrap();
    run(load, &Arc::new(Progress::default())).unwrap()
}

fn found(outcome: &Outcome) -> Vec<RequestFailure> {
    let faults = outcome.tally.faults;
    RequestFailure::ALL.into_iter().filter(|fault| faults[*fault as usize] > 0).collect()
}

#[test]
fn every_response_is_right_however_many_are_in_flight() {
    for (streams, threads, asks) in [
        (1, 1, ("GET", "/bytes/100", Payload::None)),
        (8, 2, ("GET", "/bytes/100", Payload::None)),
        (8, 1, ("HEAD", "/bytes/100", Payload::None)),
        (100, 1, ("GET", "/bytes/0", Payload::None)),
        (8, 1, ("GET", "/bytes/70000", Payload::None)),
        (4, 1, ("POST", "/echo", Payload::Content(200_000))),
        (4, 1, ("PUT", "/echo", Payload::Bytes(b"a body".to_vec()))),
    ] {
        let name = format!("{asks:?} on {streams} streams").chars().take(60).collect::<String>();
        let ways = Ways::honest();
        let mut load = load(serve(ways.clone(), None), streams, asks);
        load.threads = threads;
        let outcome = outcome(&load);
        let tally = &outcome.tally;
        assert_eq!(found(&outcome), [], "{name}");
        assert!(tally.requests > 0, "{name}");
        assert_eq!(tally.latency.len(), tally.requests, "{name}");
        assert!(tally.backends[&9_301].requests >= tally.requests, "{name}");
        assert!(tally.bytes_sent > 0 && tally.bytes_received > 0, "{name}");
        assert_eq!(ways.seen.connections.load(Ordering::Relaxed), 4, "{name}");
    }
}

#[test]
fn as_many_are_in_flight_as_wished_and_permitted() {
    for (streams, permits, most) in [(1, 100, 1), (8, 100, 8), (8, 3, 3)] {
        let ways = Ways { permits, is_slow: true, ..Ways::honest() };
        let mut load = get(serve(ways.clone(), None), streams);
        load.connections = 1;
        let outcome = outcome(&load);
        assert_eq!(found(&outcome), [], "{streams} of {permits}");
        assert_eq!(ways.seen.most.load(Ordering::Relaxed), most, "{streams} of {permits}");
        assert_eq!(outcome.tally.streams_permitted, Some(permits as usize));
    }
}

#[test]
fn a_schedule_is_kept_and_latency_counts_from_when_a_request_was_due() {
    let ways = Ways { is_slow: true, ..Ways::honest() };
    let mut load = get(serve(ways.clone(), None), 50);
    (load.rate, load.connections) = (Some(500), 1);
    let kept = outcome(&load);
    assert_eq!(found(&kept), []);
    assert!(!kept.tally.lag.is_empty() && kept.tally.unsent < 50, "{}", kept.tally.unsent);
    assert!((50..=151).contains(&kept.tally.requests), "{}", kept.tally.requests);
    assert!(ways.seen.most.load(Ordering::Relaxed) > 1, "they share the connection");
    // One at a time takes 5 ms and more, so that the rest of 500 a second waits, and that counts.
    load.streams = Some(1);
    let late = outcome(&load);
    assert!(late.tally.unsent > 30 && late.invalid.is_some(), "{}", late.tally.unsent);
    let median = |outcome: &Outcome| outcome.tally.latency.value_at_quantile(0.5);
    assert!(median(&late) > 50_000_000, "{}", median(&late));
    assert!(median(&kept) < median(&late), "{}", median(&kept));
}

#[test]
fn a_connection_for_every_request() {
    for rate in [None, Some(100)] {
        let ways = Ways::honest();
        let mut load = get(serve(ways.clone(), None), 1);
        (load.shape, load.rate) = (Shape::Churn, rate);
        let outcome = outcome(&load);
        assert_eq!(found(&outcome), []);
        let (requests, opened) = (outcome.tally.requests, &ways.seen.connections);
        assert!(requests > 4 && opened.load(Ordering::Relaxed) as u64 >= requests);
    }
}

#[test]
fn a_server_that_leaves_its_connections_properly_is_asked_again() {
    for rate in [None, Some(500)] {
        let ways = Ways { leaves_after: 10, ..Ways::honest() };
        let mut load = get(serve(ways.clone(), None), 4);
        load.rate = rate;
        let outcome = outcome(&load);
        // What was sent before the word came is left out, and counted; all else is right.
        assert!(
            found(&outcome).iter().all(|it| *it == RequestFailure::GoAway),
            "{}",
            outcome.tally.kinds()
        );
        assert!(outcome.tally.requests > 20, "{}", outcome.tally.requests);
        assert!(ways.seen.connections.load(Ordering::Relaxed) > 4);
    }
}

#[test]
fn what_a_server_refuses_and_what_it_says_of_it_is_counted() {
    let refusing = Ways { refuses: 3, ..Ways::honest() };
    let outcome_of = |ways| outcome(&get(serve(ways, None), 4));
    let refused = outcome_of(refusing);
    assert_eq!(found(&refused), [RequestFailure::StreamRefused]);
    let count = refused.tally.faults[RequestFailure::StreamRefused as usize];
    assert!(
        refused.tally.requests.abs_diff(2 * count) < 32,
        "{count} of {}",
        refused.tally.requests
    );
    let sorry = outcome_of(Ways { status: 503, ..Ways::honest() });
    assert_eq!(found(&sorry), [RequestFailure::Status]);
    assert!(sorry.tally.requests > 0);
}

/// Serves each connection in a thread until the test is over.
fn liar(serve: fn(std::net::TcpStream)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for user in listener.incoming().flatten() {
            std::thread::spawn(move || serve(user));
        }
    });
    at
}

#[test]
fn servers_that_speak_no_http_2_are_named_for_what_they_do() {
    let speaks_http_1 = liar(|mut user| {
        let _ = user.read(&mut [0; 4_096]);
        let _ = user.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n");
        let _ = user.read(&mut [0; 4_096]);
    });
    let turns_away = liar(|mut user| drop(user.read(&mut [0; 4_096])));
    // Settings, and never a response.
    let mute = liar(|mut user| {
        let _ = user.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        while let Ok(1..) = user.read(&mut [0; 4_096]) {}
    });
    for (at, fault) in [
        (speaks_http_1, RequestFailure::Malformed),
        (turns_away, RequestFailure::Closed),
        (mute, RequestFailure::TimedOut),
    ] {
        let mut load = get(at, 4);
        load.patience = Duration::from_millis(100);
        let outcome = outcome(&load);
        assert_eq!((found(&outcome), outcome.tally.requests), (vec![fault], 0));
        assert!(outcome.invalid.unwrap().contains(fault.name()));
    }
}

#[test]
fn under_tls_it_is_agreed_on_by_alpn() {
    for (offered, is_agreed) in [(&[&b"h2"[..], b"http/1.1"][..], true), (&[], false)] {
        let (pem, mut config) = certified("a.example");
        let ca = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("http2-{is_agreed}.pem"));
        std::fs::write(&ca, pem).unwrap();
        config.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
        let at = serve(Ways::honest(), Some(TlsAcceptor::from(Arc::new(config))));
        let trust = Trust::File(ca);
        let (name, alpn) = ("a.example".to_owned(), Some(Alpn::Http2));
        let wishes = Wishes { name, trust, resumes: false, group: None, alpn };
        let asks = ("POST", "/echo", Payload::Content(100_000));
        let mut load = load(at, 4, asks);
        load.tls = Some(Terms::new(&wishes).unwrap());
        if is_agreed {
            let outcome = outcome(&load);
            assert_eq!(found(&outcome), []);
            assert!(outcome.tally.requests > 0);
            assert_eq!(outcome.tally.handshakes.full, 4);
            load.streams = Some(1);
        }
        load.shape = Shape::Churn;
        load.streams = Some(1);
        let tally = outcome(&load).tally;
        let refused = tally.handshakes.failures[TlsReason::Protocol as usize];
        assert_eq!((tally.requests > 0, refused > 0), (is_agreed, !is_agreed), "{}", tally.kinds());
        let words = tally.handshakes.first_failure.unwrap_or_default();
        assert_eq!(words.contains("not HTTP/2 (ALPN `h2`)"), !is_agreed);
    }
}

#[test]
fn what_cannot_be_run_is_refused_in_words() {
    let fine = get(([127, 0, 0, 1], 1).into(), 4);
    assert_eq!(fine.check(), Ok(()));
    type Spoil = fn(&mut Load);
    let cases: [(Spoil, &str); 4] = [
        (|load| load.streams = Some(0), "1 to 1000"),
        (|load| load.streams = Some(1_001), "1 to 1000"),
        (|load| load.shape = Shape::Churn, "one request on a connection"),
        (|load| (load.protocol, load.request) = (Protocol::Tcp, None), "HTTP/2 is for API"),
    ];
    for (spoil, word) in cases {
        let mut load = fine.clone();
        spoil(&mut load);
        let error = load.check().unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}
