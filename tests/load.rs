//! The load generator against backends of this process: honest ones, whose every reply counts, and
//! ones that lie, each of which must be named for what it did.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use lb::cluster::Protocol;
use lb::load::message::Kind;
use lb::load::tally::RequestFailure;
use lb::load::web::{Payload, Request};
use lb::load::{Load, Outcome, Progress, Shape, echo, run};
use nix::sys::socket::{setsockopt, sockopt};

fn anywhere() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn load(protocol: Protocol, to: SocketAddr) -> Load {
    Load {
        protocol,
        to,
        shape: Shape::PingPong,
        connections: 4,
        size: 64,
        window: 1,
        gso: false,
        rate: None,
        warmup: Duration::ZERO,
        duration: Duration::from_millis(200),
        threads: 1,
        patience: Duration::from_secs(5),
        request: None,
        streams: None,
        tls: None,
        watch: Some(std::process::id()),
    }
}

fn outcome(load: &Load) -> Outcome {
    load.check().unwrap();
    run(load, &Arc::new(Progress::default())).unwrap()
}

/// Runs against one echo backend of ours.
fn honest(protocol: Protocol, shape: impl FnOnce(&mut Load)) -> Outcome {
    let backends = echo::start(protocol, &[anywhere()], true).unwrap();
    let mut load = load(protocol, backends.addresses()[0]);
    shape(&mut load);
    outcome(&load)
}

#[track_caller]
fn all_right(outcome: &Outcome) {
    let tally = &outcome.tally;
    let found: Vec<_> =
        RequestFailure::ALL.into_iter().filter(|fault| tally.faults[*fault as usize] > 0).collect();
    assert_eq!(found, [], "faults without a fault");
    assert_eq!(tally.backends.len(), 1, "the backend said who it was");
    assert_eq!(tally.sticky_percent(), Some(100.0));
}

#[test]
fn every_reply_of_an_echo_is_right() {
    for size in [24, 64, 4_096, 4_097, 100_000] {
        for threads in [1, 2] {
            let outcome = honest(Protocol::Tcp, |load| {
                (load.size, load.threads) = (size, threads);
            });
            all_right(&outcome);
            let tally = outcome.tally;
            assert!(tally.requests > 0, "size {size}");
            assert_eq!(tally.bytes_received, tally.requests * size as u64);
            assert_eq!(tally.latency.len(), tally.requests);
            assert_eq!(tally.sessions_known, 4);
            assert!(outcome.own_cpu.is_some() && outcome.watched_cpu.is_some());
        }
    }
}

#[test]
fn a_connection_for_every_request_is_a_session_for_every_request() {
    let outcome = honest(Protocol::Tcp, |load| load.shape = Shape::Churn);
    all_right(&outcome);
    assert!(outcome.tally.requests > 4);
    assert!(outcome.tally.sessions_known >= outcome.tally.requests);
}

#[test]
fn a_connection_for_every_request_of_the_api_too() {
    for fields in [&[][..], &["connection: close".to_owned()]] {
        let outcome = honest(Protocol::Api, |load| {
            let request = Request::new("GET", "/bytes/100", "localhost", fields, Payload::None);
            (load.shape, load.request) = (Shape::Churn, Some(Arc::new(request.unwrap())));
        });
        let tally = &outcome.tally;
        assert_eq!((tally.errors(), tally.requests > 4), (0, true), "{}", tally.kinds());
    }
}

#[test]
fn streams_are_whole_in_every_direction() {
    for (kind, up, down) in
        [(Kind::Source, false, true), (Kind::Sink, true, false), (Kind::Echo, true, true)]
    {
        let outcome = honest(Protocol::Tcp, |load| load.shape = Shape::Bulk(kind));
        let tally = &outcome.tally;
        assert_eq!(tally.errors(), 0, "{kind:?}: {:?}", tally.faults);
        assert_eq!((tally.bytes_sent > 0, tally.bytes_received > 0), (up, down), "{kind:?}");
        assert!(outcome.invalid.is_none());
    }
}

#[test]
fn datagrams_that_are_sent_together_come_back_in_order_and_once() {
    // 33 is more than one send takes, so one datagram comes alone.
    for (size, window) in [(64, 33), (1_200, 32), (1_200, 7), (4_096, 40)] {
        let outcome = honest(Protocol::Udp, |load| {
            (load.size, load.connections, load.window, load.gso) = (size, 4, window, true);
        });
        all_right(&outcome);
        assert!(outcome.tally.requests > 0, "size {size}");
    }
}

#[test]
fn an_echo_of_datagrams_that_came_as_one_keeps_them_apart() {
    let backends = echo::start(Protocol::Udp, &[anywhere()], true).unwrap();
    let user = UdpSocket::bind(anywhere()).unwrap();
    user.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    user.connect(backends.addresses()[0]).unwrap();
    setsockopt(&user, sockopt::UdpGsoSegment, &100).unwrap();
    // Single ones between those that come together, so that each way meets what the other left.
    for lengths in [vec![100, 100, 70], vec![40], vec![100, 100]] {
        user.send(&vec![7; lengths.iter().sum()]).unwrap();
        for length in lengths {
            assert_eq!(user.recv(&mut [0; 1000]).unwrap(), length);
        }
    }
}

#[test]
fn datagrams_come_back_in_order_and_once() {
    for (size, connections, window) in [(24, 4, 1), (1_200, 4, 8), (60_000, 2, 1), (24, 16, 32)] {
        let outcome = honest(Protocol::Udp, |load| {
            (load.size, load.connections, load.window) = (size, connections, window);
        });
        all_right(&outcome);
        assert!(outcome.tally.requests > 0, "size {size}");
    }
}

fn request(method: &str, path: &str, payload: Payload) -> Option<Arc<Request>> {
    Some(Arc::new(Request::new(method, path, "localhost", &[], payload).unwrap()))
}

#[test]
fn every_response_of_an_echo_is_right() {
    for (method, path, payload) in [
        ("GET", "/", Payload::None),
        ("HEAD", "/bytes/70000", Payload::None),
        ("GET", "/bytes/0", Payload::None),
        ("GET", "/bytes/70000", Payload::None),
        ("POST", "/count", Payload::Content(70_000)),
        ("POST", "/echo", Payload::Content(70_000)),
        ("PUT", "/echo", Payload::Bytes(b"a body".to_vec())),
    ] {
        let request = request(method, path, payload);
        let outcome = honest(Protocol::Api, |load| load.request = request);
        let tally = outcome.tally;
        assert_eq!(tally.errors(), 0, "{method} {path}: {:?}", tally.faults);
        assert!(tally.requests > 0, "{method} {path}");
        let answered: u64 = tally.backends.values().map(|share| share.requests).sum();
        assert!(answered >= tally.requests, "every response said who answered");
        if path.ends_with("/70000") && method == "GET" {
            assert!(tally.bytes_received > tally.requests * 70_000);
        }
    }
}

/// Answers every request on a connection with the same bytes.
fn web_liar(response: &'static str, last: bool) -> SocketAddr {
    liar(move |mut user| {
        let mut bytes = [0; 4_096];
        while let Ok(1..) = user.read(&mut bytes) {
            if user.write_all(response.as_bytes()).is_err() || last {
                return;
            }
        }
    })
}

#[test]
fn responses_that_cannot_be_ours_are_found_out() {
    const OTHER: &str = "HTTP/1.1 200 OK\r\nx-lb-bench: 00000063-0000000000000001\r\n\
                         content-length: 0\r\n\r\n";
    for (response, fault) in [
        (OTHER, RequestFailure::WrongClient),
        ("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", RequestFailure::Status),
        ("what?\r\n\r\n", RequestFailure::Malformed),
        ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nxx", RequestFailure::Corrupt),
    ] {
        let mut load = load(Protocol::Api, web_liar(response, false));
        load.request = request("GET", "/", Payload::None);
        assert_eq!(faults(load), [fault], "{response}");
    }
    let mut load =
        load(Protocol::Api, web_liar("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx", true));
    load.request = request("GET", "/", Payload::None);
    assert_eq!(faults(load), [RequestFailure::Closed]);
}

#[test]
fn a_server_that_ends_its_connections_properly_is_asked_again() {
    for response in [
        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx",
        "HTTP/1.1 200 OK\r\n\r\nuntil the end",
    ] {
        let mut load = load(Protocol::Api, web_liar(response, true));
        load.request = request("GET", "/", Payload::None);
        let tally = outcome(&load).tally;
        assert_eq!(tally.errors(), 0, "{:?}", tally.faults);
        assert!(tally.requests > 4, "more than one on each connection: {}", tally.requests);
    }
}

#[test]
fn a_schedule_is_kept_and_its_lag_known() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let outcome = honest(protocol, |load| load.rate = Some(500));
        all_right(&outcome);
        let tally = &outcome.tally;
        assert!(tally.requests > 0 && tally.requests <= 101, "{}", tally.requests);
        assert!(!tally.lag.is_empty());
    }
}

#[test]
fn a_schedule_that_the_service_cannot_keep_is_said_so() {
    // Never answers, so that one connection is busy for ever and the rest of the plan is not sent.
    let deaf = TcpListener::bind(anywhere()).unwrap();
    let mut load = load(Protocol::Tcp, deaf.local_addr().unwrap());
    (load.connections, load.rate, load.patience) = (1, Some(1_000), Duration::from_secs(1));
    let outcome = outcome(&load);
    assert!(outcome.tally.unsent > 100, "{}", outcome.tally.unsent);
    assert!(outcome.invalid.is_some());
    assert_eq!(outcome.tally.faults[RequestFailure::TimedOut as usize], 1);
}

/// Serves each connection in a thread until the test is over.
fn liar(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind(anywhere()).unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for user in listener.incoming().flatten() {
            let serve = Arc::clone(&serve);
            std::thread::spawn(move || serve(user));
        }
    });
    address
}

fn faults(mut load: Load) -> Vec<RequestFailure> {
    load.patience = Duration::from_millis(300);
    let tally = outcome(&load).tally;
    RequestFailure::ALL.into_iter().filter(|fault| tally.faults[*fault as usize] > 0).collect()
}

#[test]
fn a_service_that_mixes_up_its_users_is_found_out() {
    let others: Arc<std::sync::Mutex<Vec<TcpStream>>> = Arc::default();
    let address = liar(move |mut user| {
        others.lock().unwrap().push(user.try_clone().unwrap());
        let mut message = [0; 64];
        while user.read_exact(&mut message).is_ok() {
            // The first connection gets everyone's replies.
            let _ = others.lock().unwrap()[0].write_all(&message);
        }
    });
    assert!(faults(load(Protocol::Tcp, address)).contains(&RequestFailure::WrongClient));
}

#[test]
fn a_service_that_changes_a_byte_is_found_out() {
    let address = liar(|mut user| {
        let mut message = [0; 64];
        while user.read_exact(&mut message).is_ok() {
            message[63] ^= 1;
            let _ = user.write_all(&message);
        }
    });
    assert_eq!(faults(load(Protocol::Tcp, address)), [RequestFailure::Corrupt]);
}

#[test]
fn a_service_that_answers_twice_is_found_out() {
    let address = liar(|mut user| {
        let mut message = [0; 64];
        while user.read_exact(&mut message).is_ok() {
            let _ = user.write_all(&[message, message].concat());
        }
    });
    assert_eq!(faults(load(Protocol::Tcp, address)), [RequestFailure::Duplicated]);
}

#[test]
fn a_service_that_turns_everyone_away_is_found_out() {
    let found = faults(load(Protocol::Tcp, liar(drop)));
    assert!(
        found.iter().all(|fault| matches!(fault, RequestFailure::Closed | RequestFailure::Reset)),
        "{found:?}"
    );
    assert!(!found.is_empty());
}

#[test]
fn a_stream_that_loses_a_byte_is_found_out() {
    let address = liar(|mut user| {
        let mut bytes = vec![0; 65_536];
        let mut dropped = false;
        while let Ok(count @ 1..) = user.read(&mut bytes) {
            let skip = usize::from(!dropped && count > 1_000);
            dropped |= skip == 1;
            if user.write_all(&bytes[..count - skip]).is_err() {
                return;
            }
        }
    });
    let mut load = load(Protocol::Tcp, address);
    load.shape = Shape::Bulk(Kind::Echo);
    let found = faults(load);
    assert!(
        found.contains(&RequestFailure::Corrupt) || found.contains(&RequestFailure::Lost),
        "{found:?}"
    );
}

/// Answers datagrams with the result of `answer`.
fn datagram_liar(
    mut answer: impl FnMut(&UdpSocket, &[u8], SocketAddr) + Send + 'static,
) -> SocketAddr {
    let socket = UdpSocket::bind(anywhere()).unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut datagram = [0; 2_048];
        while let Ok((count, from)) = socket.recv_from(&mut datagram) {
            answer(&socket, &datagram[..count], from);
        }
    });
    address
}

#[test]
fn datagrams_that_are_lost_doubled_or_moved_are_found_out() {
    let lost = datagram_liar(|_, _, _| {});
    assert_eq!(faults(load(Protocol::Udp, lost)), [RequestFailure::Lost]);

    let doubled = datagram_liar(|socket, datagram, from| {
        let _ = socket.send_to(datagram, from);
        let _ = socket.send_to(datagram, from);
    });
    assert_eq!(faults(load(Protocol::Udp, doubled)), [RequestFailure::Duplicated]);

    let mut count = 0u32;
    let moved = datagram_liar(move |socket, datagram, from| {
        count += 1;
        let mut reply = datagram.to_vec();
        reply[12..16].copy_from_slice(&(count % 3 + 1).to_le_bytes());
        let _ = socket.send_to(&reply, from);
    });
    assert_eq!(faults(load(Protocol::Udp, moved)), [RequestFailure::Moved]);
}

#[test]
fn datagrams_that_overtake_each_other_are_found_out() {
    let mut kept: Option<Vec<u8>> = None;
    let address = datagram_liar(move |socket, datagram, from| match kept.take() {
        None => kept = Some(datagram.to_vec()),
        Some(earlier) => {
            let _ = socket.send_to(datagram, from);
            let _ = socket.send_to(&earlier, from);
        }
    });
    let mut load = load(Protocol::Udp, address);
    (load.connections, load.window) = (1, 4);
    assert!(faults(load).contains(&RequestFailure::Reordered));
}

#[test]
fn nobody_there_is_an_error_and_no_run() {
    let address = TcpListener::bind(anywhere()).unwrap().local_addr().unwrap();
    let load = load(Protocol::Tcp, address);
    let error = run(&load, &Arc::new(Progress::default())).err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn what_cannot_be_run_is_refused_in_words() {
    let fine = load(Protocol::Tcp, anywhere());
    assert_eq!(fine.check(), Ok(()));
    type Spoil = fn(&mut Load);
    let cases: [(Spoil, &str); 10] = [
        (|load| load.protocol = Protocol::Api, "needs a request"),
        (|load| load.connections = 0, "at least 1"),
        (|load| load.threads = 5, "fewer threads"),
        (|load| load.size = 23, "24 bytes"),
        (|load| load.size = 1 << 30, "under way"),
        (|load| load.rate = Some(0), "asks nothing"),
        (|load| load.duration = Duration::ZERO, "--duration"),
        (|load| load.patience = Duration::ZERO, "--timeout"),
        (|load| (load.shape, load.rate) = (Shape::Bulk(Kind::Echo), Some(1)), "no schedule"),
        (|load| (load.shape, load.protocol) = (Shape::Churn, Protocol::Udp), "for TCP"),
    ];
    for (spoil, word) in cases {
        let mut load = fine.clone();
        spoil(&mut load);
        let error = load.check().unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}
