//! The doors: HTTPS beside HTTP, and a TCP service under TLS.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::thread;

use lb::cluster::Protocol;
use lb::cluster::route::Host;
use lb::config::Config;
use lb::config::services::ServiceConfig;
use rustls::{AlertDescription, Error, HandshakeKind};

use crate::harness::{Balancer, connect, serve};
use crate::tls_user::{Certificates, User, get, shake, user};
use crate::wait::wait_for;

/// A backend that answers each request with the head that it got.
pub fn telling() -> SocketAddr {
    serve(|mut connection| {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while let Ok(1) = connection.read(&mut byte) {
            head.push(byte[0]);
            if head.ends_with(b"\r\n\r\n") {
                let body = String::from_utf8(std::mem::take(&mut head)).unwrap();
                let length = body.len();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
                if connection.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        }
    })
}

/// A backend that sends back what it gets, and ends when its user does.
pub fn echoing() -> SocketAddr {
    serve(|mut connection| {
        let mut bytes = [0; 65_536];
        while let Ok(count @ 1..) = connection.read(&mut bytes) {
            if connection.write_all(&bytes[..count]).is_err() {
                return;
            }
        }
        let _ = connection.shutdown(Shutdown::Write);
    })
}

fn https(certificates: &Certificates) -> (Balancer, SocketAddr) {
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        config.listen.api_tls = Some("127.0.0.1:0".parse().unwrap());
        certificates.put(config);
    });
    balancer.register("api", telling());
    let at = balancer.plane.doors.api_tls().unwrap();
    (balancer, at)
}

/// The same with a TCP service whose users speak TLS.
fn stream(certificates: &Certificates) -> (Balancer, SocketAddr) {
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let new = ServiceConfig::new("mail", Protocol::Tcp);
        config.set_services(vec![ServiceConfig { listen, tls: true, ..new }]);
        certificates.put(config);
    });
    balancer.register("mail", echoing());
    let at = balancer.at("mail");
    (balancer, at)
}

/// A TCP service for the users of these hosts at a door.
fn of_hosts(door: SocketAddr, name: &str, hosts: &[&str]) -> ServiceConfig {
    let hosts = hosts.iter().map(|host| Host::parse(host).unwrap()).collect();
    ServiceConfig { listen: vec![door], hosts, ..ServiceConfig::new(name, Protocol::Tcp) }
}

pub fn counted(balancer: &Balancer, what: &str) -> u64 {
    let place = lb::metrics::WorkerCounters::ROWS.iter().position(|row| row.name == what).unwrap();
    balancer.plane.ends.iter().map(|end| end.metrics.counters.values()[place]).sum()
}

#[test]
fn requests_come_by_https_and_backends_are_told() {
    let certificates = Certificates::new("https", &[&["a.example"], &["*.b.example"]]);
    let (mut balancer, at) = https(&certificates);
    let client = certificates.client();
    for host in ["a.example", "www.b.example"] {
        let mut user = user(&client, host, at);
        for number in 0..3 {
            let answer = get(&mut user, host, &format!("/{number}")).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains(&format!("GET /{number} HTTP/1.1\r\n")), "{answer}");
            assert!(answer.contains("\r\nX-Forwarded-Proto: https\r\n"), "{answer}");
            assert!(answer.contains(&format!(";host={host};proto=https\r\n")), "{answer}");
        }
        let sessions = || balancer.plane.ends.iter().flat_map(|end| end.shard.iter());
        assert!(sessions().count() > 0 && sessions().all(|session| session.is_tls));
    }
    assert_eq!(counted(&balancer, "tls_handshakes"), 2);
    let line = balancer.plane.ends.iter_mut().find_map(|end| end.requests.pop().ok());
    assert!(line.expect("the log has a line for each").is_tls);
    // The user prefers 256 bits, and the balancer what is cheaper and as good.
    let mut user = user(&client, "a.example", at);
    shake(&mut user).unwrap();
    let chosen = user.conn.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(chosen, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    balancer.stop();
}

#[test]
fn bytes_of_a_stream_come_back_whole_and_its_end_is_passed_on() {
    let certificates = Certificates::new("stream", &[&["mail.example"]]);
    let (balancer, at) = stream(&certificates);
    let client = certificates.client();
    for length in [0, 1, 16_384, 100_000, 3_000_000] {
        let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        let mut user = user(&client, "mail.example", at);
        shake(&mut user).unwrap();
        let (mut to, mut back) = (0, Vec::new());
        user.sock.set_nonblocking(true).unwrap();
        let mut said = false;
        wait_for("everything to come back", || {
            while to < sent.len() {
                match user.write(&sent[to..]) {
                    Ok(count) => to += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
            if to == sent.len() && !said {
                said = true;
                user.conn.send_close_notify();
            }
            let _ = user.flush();
            let mut bytes = vec![0; 65_536];
            loop {
                match user.read(&mut bytes) {
                    Ok(0) => return Some(()),
                    Ok(count) => back.extend_from_slice(&bytes[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                    Err(error) => panic!("after {} of {length}: {error}", back.len()),
                }
            }
        });
        assert_eq!(back.len(), sent.len());
        assert!(back == sent, "{length} bytes");
    }
    balancer.stop();
}

#[test]
fn a_user_resumes_at_any_worker() {
    let certificates = Certificates::new("resume", &[&["a.example"]]);
    let (balancer, at) = https(&certificates);
    let client = certificates.client();
    let kinds: Vec<_> = (0..12)
        .map(|_| {
            let mut user = user(&client, "a.example", at);
            get(&mut user, "a.example", "/").unwrap();
            user.conn.handshake_kind().unwrap()
        })
        .collect();
    assert_ne!(kinds[0], HandshakeKind::Resumed);
    assert!(kinds[1..].iter().all(|kind| *kind == HandshakeKind::Resumed), "{kinds:?}");
    assert_eq!(counted(&balancer, "tls_resumed"), 11);
    let of_workers = balancer.plane.ends.iter();
    let of_workers = of_workers.filter(|end| end.metrics.counters.tls_handshakes.get() > 0);
    assert!(of_workers.count() > 1, "all of them came to one worker");
    balancer.stop();
}

#[test]
fn a_hello_in_single_bytes_is_answered_and_one_that_stops_is_not_waited_for() {
    let certificates = Certificates::new("pieces", &[&["a.example"]]);
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        config.listen.api_tls = Some("127.0.0.1:0".parse().unwrap());
        config.tls.handshake = std::time::Duration::from_millis(700);
        certificates.put(config);
    });
    balancer.register("api", telling());
    let at = balancer.plane.doors.api_tls().unwrap();
    let client = certificates.client();
    let mut user = user(&client, "a.example", at);
    let mut hello = Vec::new();
    user.conn.write_tls(&mut hello).unwrap();
    user.sock.set_nodelay(true).unwrap();
    for byte in hello.chunks(hello.len() / 40) {
        user.sock.write_all(byte).unwrap();
        thread::yield_now();
    }
    assert!(get(&mut user, "a.example", "/").unwrap().starts_with("HTTP/1.1 200"));
    let mut stopped = connect(at);
    stopped.write_all(&hello[..hello.len() - 1]).unwrap();
    assert_eq!(stopped.read(&mut [0; 16]).unwrap_or(0), 0, "closed");
    assert_eq!(counted(&balancer, "tls_refused_late"), 1);
    // One that ends is let go at once.
    let mut ended = connect(at);
    ended.write_all(&hello[..100]).unwrap();
    ended.shutdown(Shutdown::Write).unwrap();
    assert_eq!(ended.read(&mut [0; 16]).unwrap_or(0), 0);
    assert_eq!(counted(&balancer, "tls_refused_late"), 1);
    balancer.stop();
}

#[test]
fn who_does_not_speak_tls_is_told_and_counted() {
    let certificates = Certificates::new("plain", &[&["a.example"]]);
    let (balancer, at) = https(&certificates);
    let mut plain = connect(at);
    plain.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{answer}");
    let mut other = connect(at);
    other.write_all(b"SSH-2.0-x\r\n").unwrap();
    let mut alert = Vec::new();
    other.read_to_end(&mut alert).unwrap();
    assert_eq!(alert, [21, 3, 1, 0, 2, 2, 50]);
    let counted = |what| counted(&balancer, what);
    let refused = (counted("tls_refused_plain_http"), counted("tls_refused_hello"));
    assert_eq!((refused, counted("tls_handshakes")), ((1, 1), 0));
    balancer.stop();
}

#[test]
fn a_host_that_nobody_has_is_refused_only_where_that_is_asked_for() {
    let certificates = Certificates::new("strict", &[&["a.example"]]);
    let client = certificates.client();
    let (balancer, at) = https(&certificates);
    let error = shake(&mut user(&client, "other.example", at)).unwrap_err();
    assert!(error.to_string().contains("not valid for"), "it was given the first: {error}");
    wait_for("the user's alert", || (counted(&balancer, "tls_refused_by_user") == 1).then_some(()));
    balancer.stop();
    let balancer = Balancer::start_with(|config: &mut Config| {
        config.listen.api_tls = Some("127.0.0.1:0".parse().unwrap());
        certificates.put(config);
        config.tls.strict_sni = true;
    });
    let at = balancer.plane.doors.api_tls().unwrap();
    let error = shake(&mut user(&client, "other.example", at)).unwrap_err();
    let error = error.downcast::<Error>().unwrap();
    assert_eq!(error, Error::AlertReceived(AlertDescription::UnrecognisedName));
    assert_eq!(counted(&balancer, "tls_refused_host"), 1);
    balancer.stop();
}

#[test]
fn an_end_that_was_cut_off_is_passed_on_as_a_reset_and_a_backends_end_is_announced() {
    let certificates = Certificates::new("cut", &[&["mail.example"]]);
    let (balancer, at) = stream(&certificates);
    let client = certificates.client();
    let mut user = user(&client, "mail.example", at);
    user.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    user.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
    user.sock.shutdown(Shutdown::Write).unwrap();
    let error = user.read(&mut back).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof),
        "{error}"
    );
    wait_for("the session to end", || (balancer.live("mail") == 0).then_some(()));
    balancer.stop();
}

#[test]
fn a_service_for_https_only_sends_users_there_unless_a_proxy_has_spoken_tls() {
    let certificates = Certificates::new("only", &[&["a.example"]]);
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        let any = "127.0.0.1:0".parse().unwrap();
        (config.listen.api, config.listen.api_tls) = (Some(any), Some(any));
        certificates.put(config);
        config.api.trusted = vec!["127.0.0.1/32".parse().unwrap()];
        let new = ServiceConfig::new("shop", Protocol::Api);
        let hosts = vec![Host::parse("a.example").unwrap()];
        config.set_services(vec![ServiceConfig { hosts, https_only: true, ..new }]);
    });
    balancer.register("shop", telling());
    let (plain, https) = (balancer.at("api"), balancer.plane.doors.api_tls().unwrap());
    let ask = |request: &str| {
        let mut user = connect(plain);
        user.write_all(request.as_bytes()).unwrap();
        user.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        user.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = ask("POST /a?b=c HTTP/1.1\r\nHost: a.example:80\r\nContent-Length: 3\r\n\r\nabc");
    assert!(answer.starts_with("HTTP/1.1 308 Permanent Redirect\r\n"), "{answer}");
    let location = format!("\r\nLocation: https://a.example:{}/a?b=c\r\n", https.port());
    assert!(answer.contains(&location), "{answer}");
    let said = "GET / HTTP/1.1\r\nHost: a.example\r\nX-Forwarded-Proto: https\r\n\r\n";
    assert!(ask(said).starts_with("HTTP/1.1 200 OK\r\n"));
    let mut user = user(&certificates.client(), "a.example", https);
    assert!(get(&mut user, "a.example", "/").unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
    balancer.stop();
}

#[test]
fn services_have_https_at_doors_of_their_own_and_send_users_there() {
    let certificates = Certificates::new("own", &[&["shop.example", "blog.example"]]);
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        let any = || vec!["127.0.0.1:0".parse().unwrap()];
        certificates.put(config);
        config.listen.api_tls = Some("127.0.0.1:0".parse().unwrap());
        let service = |name: &str, listen_tls| {
            let new = ServiceConfig::new(name, Protocol::Api);
            ServiceConfig { listen: any(), listen_tls, https_only: true, ..new }
        };
        config.set_services(vec![service("shop", any()), service("blog", any())]);
    });
    balancer.register("shop", telling());
    let [plain, sealed] = balancer.doors("shop")[..] else { panic!("two doors") };
    let mut early = connect(plain);
    early.write_all(b"GET /a HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    early.read_to_string(&mut answer).unwrap();
    let location = format!("\r\nLocation: https://shop.example:{}/a\r\n", sealed.port());
    assert!(answer.starts_with("HTTP/1.1 308 ") && answer.contains(&location), "{answer}");
    let client = certificates.client();
    let mut user_of_shop = user(&client, "shop.example", sealed);
    let answer = get(&mut user_of_shop, "shop.example", "/a").unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("\r\nX-Forwarded-Proto: https\r\n"), "{answer}");
    assert!(answer.contains(";host=shop.example;proto=https\r\n"), "{answer}");
    // Each door is its service's, and nobody is there for the others.
    let others = [balancer.doors("blog")[1], balancer.plane.doors.api_tls().unwrap()];
    for at in others {
        assert_ne!(at, sealed);
        let answer = get(&mut user(&client, "shop.example", at), "shop.example", "/a").unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    balancer.stop();
}

/// A backend that says which one it is and what came first, and ends.
fn named(name: &'static str) -> SocketAddr {
    serve(move |mut connection| {
        let mut first = [0; 5];
        let said = match connection.read(&mut first) {
            Ok(count) => format!("{name} {:02x?}", &first[..count.min(3)]),
            Err(_) => return,
        };
        let _ = connection.write_all(said.as_bytes());
        // With bytes unread, its close would be a reset.
        let _ = connection.shutdown(Shutdown::Write);
        let _ = std::io::copy(&mut connection, &mut std::io::sink());
    })
}

/// Sends only the ClientHello, in pieces; the answer, which is no TLS.
fn hello_in(mut user: User, pieces: usize) -> String {
    let mut hello = Vec::new();
    user.conn.write_tls(&mut hello).unwrap();
    user.sock.set_nodelay(true).unwrap();
    for piece in hello.chunks(hello.len().div_ceil(pieces)) {
        user.sock.write_all(piece).unwrap();
        thread::yield_now();
    }
    let mut answer = String::new();
    user.sock.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn services_share_a_door_by_the_host_in_the_hello_and_nothing_of_it_is_lost() {
    let certificates = Certificates::new("split", &[&["here.example"]]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let service = |name, hosts| of_hosts(free, name, hosts);
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        certificates.put(config);
        config.tls.handshake = std::time::Duration::from_millis(300);
        config.set_services(vec![
            service("one", &["one.example", "*.one.example"]),
            service("rest", &[]),
            ServiceConfig { tls: true, ..service("here", &["here.example"]) },
        ]);
    });
    let other = Certificates::new("other", &[&["x.example"]]);
    for name in ["one", "rest"] {
        balancer.register(name, named(name));
    }
    balancer.register("here", echoing());
    let said = |host: &str, pieces: usize| hello_in(user(&other.client(), host, free), pieces);
    for (host, name) in
        [("one.example", "one"), ("www.One.example", "one"), ("two.example", "rest")]
    {
        for pieces in [1, 7] {
            assert_eq!(said(host, pieces), format!("{name} [16, 03, 01]"), "{host}");
        }
    }
    let mut here = user(&certificates.client(), "here.example", free);
    here.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    here.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
    // What is no TLS is the rest's, and so is a user who waits for the other side to speak.
    for words in [&b"SSH-2"[..], b"GET /"] {
        let mut plain = connect(free);
        plain.write_all(words).unwrap();
        let mut answer = String::new();
        plain.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("rest ["), "{answer}");
    }
    let mut ended = connect(free);
    ended.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    ended.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "rest []", "it need not say anything");
    let mut silent = connect(free);
    wait_for("the silent one to be passed on", || (balancer.live("rest") > 0).then_some(()));
    silent.write_all(b"at last").unwrap();
    let mut answer = String::new();
    silent.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "rest [61, 74, 20]");
    assert_eq!((counted(&balancer, "tls_passed"), counted(&balancer, "tls_handshakes")), (10, 1));
    balancer.stop();
}

/// Reads until the user's side has something of its own to say, and keeps that back.
fn half_shaken(mut user: User) -> (User, Vec<u8>) {
    let mut hello = Vec::new();
    user.conn.write_tls(&mut hello).unwrap();
    user.sock.write_all(&hello).unwrap();
    while user.conn.is_handshaking() {
        user.conn.read_tls(&mut user.sock).unwrap();
        user.conn.process_new_packets().unwrap();
    }
    let mut finished = Vec::new();
    while user.conn.wants_write() {
        user.conn.write_tls(&mut finished).unwrap();
    }
    (user, finished)
}

#[test]
fn whoever_has_asked_for_a_host_stays_with_it_when_the_door_becomes_anothers() {
    let certificates = Certificates::new("assign", &[&["here.example"]]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let service = |name, hosts| of_hosts(free, name, hosts);
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        certificates.put(config);
        config.set_services(vec![
            service("rest", &[]),
            ServiceConfig { tls: true, ..service("here", &["here.example"]) },
        ]);
    });
    balancer.register("rest", named("rest"));
    balancer.register("here", echoing());
    let (mut user, finished) = half_shaken(user(&certificates.client(), "here.example", free));
    let (id, service) = (lb::cluster::DoorId(0), balancer.service("rest"));
    for end in &mut balancer.plane.ends {
        for place in 0..8 {
            let id = lb::cluster::DoorId(id.0 + place);
            let change = lb::worker::link::DoorChange::Assign { id, service, is_tls: false };
            end.doors.push((Protocol::Tcp, change)).unwrap();
        }
    }
    balancer.let_workers_turn();
    user.sock.write_all(&finished).unwrap();
    user.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    user.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
    balancer.stop();
}

#[test]
fn users_whose_key_shares_do_not_serve_are_asked_again() {
    let certificates = Certificates::new("again", &[&["a.example"]]);
    let (balancer, at) = https(&certificates);
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // Offers only a share of the first, which the balancer does not know.
    provider.kx_groups = vec![
        rustls::crypto::aws_lc_rs::kx_group::MLKEM768,
        rustls::crypto::aws_lc_rs::kx_group::X25519,
    ];
    for pieces in [1, 9] {
        let client = certificates.client_with(provider.clone());
        let mut user = user(&client, "a.example", at);
        let kind = shake_in(&mut user, pieces).unwrap();
        assert_eq!(kind, HandshakeKind::FullWithHelloRetryRequest);
        assert!(get(&mut user, "a.example", "/").unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
    }
    assert_eq!(counted(&balancer, "tls_handshakes"), 2);
    balancer.stop();
}

/// The handshake, with all that the user says in pieces.
fn shake_in(user: &mut User, pieces: usize) -> std::io::Result<HandshakeKind> {
    user.sock.set_nodelay(true)?;
    while user.conn.is_handshaking() {
        let mut out = Vec::new();
        while user.conn.wants_write() {
            user.conn.write_tls(&mut out)?;
        }
        for piece in out.chunks(out.len().div_ceil(pieces).max(1)) {
            user.sock.write_all(piece)?;
            thread::sleep(std::time::Duration::from_millis(1));
        }
        if user.conn.is_handshaking() {
            user.conn.read_tls(&mut user.sock)?;
            user.conn.process_new_packets().unwrap();
        }
    }
    shake(user)
}

#[test]
fn a_user_that_has_said_its_last_is_told_the_end_of_the_answer() {
    let certificates = Certificates::new("end", &[&["a.example"]]);
    let (balancer, at) = https(&certificates);
    let mut user = user(&certificates.client(), "a.example", at);
    shake(&mut user).unwrap();
    user.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
    user.conn.send_close_notify();
    user.flush().unwrap();
    let mut answer = String::new();
    user.read_to_string(&mut answer).expect("a close_notify at the end");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    balancer.stop();
}
