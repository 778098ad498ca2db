//! Backends that are reached by TLS, against the real kernel. They speak it with rustls' own server side.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lb::cluster::Protocol::{Api, Tcp};
use lb::cluster::{Backend, Protocol};
use lb::config::Config;
use lb::config::services::ServiceConfig;
use lb::tls::backends::BackendTls;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};
use rustls::{
    HandshakeKind, ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion,
};

use crate::harness::{Balancer, connect, serve};
use crate::tls_user::{Certificates, User, get, shake, user};
use crate::wait::wait_for;

type Sealed = StreamOwned<ServerConnection, TcpStream>;

/// A backend with one of these certificates; `answer` gets each connection whose handshake is over.
fn sealed(
    certificates: &Certificates,
    number: usize,
    answer: impl Fn(&mut Sealed) + Send + Sync + Clone + 'static,
) -> SocketAddr {
    let config = server(certificates, number);
    serve(move |connection| {
        if let Some(mut sealed) = shaken(&config, connection) {
            answer(&mut sealed);
        }
    })
}

fn server(certificates: &Certificates, number: usize) -> Arc<ServerConfig> {
    server_of(certificates, number, &[&TLS13, &TLS12])
}

fn server_of(
    certificates: &Certificates,
    number: usize,
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ServerConfig> {
    let files = &certificates.files[number];
    let chain = vec![CertificateDer::from_pem_file(&files.certificate).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.send_half_rtt_data = true;
    Arc::new(config)
}

/// The connection once its handshake is over; `None` if it fails.
fn shaken(config: &Arc<ServerConfig>, connection: TcpStream) -> Option<Sealed> {
    let server = ServerConnection::new(Arc::clone(config)).unwrap();
    let mut sealed = StreamOwned::new(server, connection);
    while sealed.conn.is_handshaking() {
        sealed.conn.complete_io(&mut sealed.sock).ok()?;
    }
    Some(sealed)
}

/// Reads the head of a request. `None`: there is none.
fn head(sealed: &mut Sealed) -> Option<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        sealed.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}

/// Answers requests with what was agreed with TLS.
fn telling(sealed: &mut Sealed) {
    while head(sealed).is_some() {
        let protocol = String::from_utf8_lossy(sealed.conn.alpn_protocol().unwrap_or(b"none"));
        let kind = match sealed.conn.handshake_kind() {
            Some(HandshakeKind::Resumed) => "resumed",
            _ => "full",
        };
        let body = format!("{protocol} {:?} {kind}", sealed.conn.server_name());
        let length = body.len();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
        if sealed.write_all(answer.as_bytes()).is_err() || sealed.flush().is_err() {
            return;
        }
    }
}

/// Sends back what it gets, and ends when its user does.
fn echo(sealed: &mut Sealed) {
    let mut bytes = vec![0; 65_536];
    while let Ok(count @ 1..) = sealed.read(&mut bytes) {
        if sealed.write_all(&bytes[..count]).is_err() || sealed.flush().is_err() {
            return;
        }
    }
    sealed.conn.send_close_notify();
    let _ = sealed.flush();
    let _ = sealed.sock.shutdown(Shutdown::Write);
}

/// A balancer with one service that trusts these certificates.
fn balancer(protocol: Protocol, trusted: &Certificates) -> Balancer {
    balancer_with(protocol, trusted, |_| {})
}

fn balancer_with(
    protocol: Protocol,
    trusted: &Certificates,
    change: impl FnOnce(&mut Config),
) -> Balancer {
    Balancer::start_with(|config| {
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let service = ServiceConfig { listen, ..ServiceConfig::new("shop", protocol) };
        config.set_services(vec![service]);
        config.backend_tls.ca = Some(trusted.authorities());
        change(config);
    })
}

/// It is reached by TLS, and has this name.
fn named(name: &str) -> impl FnOnce(&mut Backend) {
    let name = (!name.is_empty()).then(|| name.into());
    move |backend: &mut Backend| backend.tls = Some(BackendTls { name, ca: None })
}

fn counted(balancer: &Balancer, what: &str) -> u64 {
    let place = lb::metrics::WorkerCounters::ROWS.iter().position(|row| row.name == what).unwrap();
    balancer.plane.ends.iter().map(|end| end.metrics.counters.values()[place]).sum()
}

/// The answer to a request over a connection of its own, or over this one.
fn ask(at: SocketAddr) -> String {
    let mut user = connect(at);
    user.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    user.read_to_string(&mut answer).unwrap();
    answer
}

fn ask_again(user: &mut TcpStream) -> String {
    user.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        user.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    user.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

#[test]
fn requests_go_to_a_backend_that_is_verified_by_name_or_address_over_a_connection_that_is_kept() {
    let certificates = Certificates::new("to-named", &[&["b.example"], &["127.0.0.1"]]);
    for (number, name, sni) in [(0, "b.example", "Some(\"b.example\")"), (1, "", "None")] {
        let mut balancer = balancer(Api, &certificates);
        balancer.register_as("shop", sealed(&certificates, number, telling), named(name));
        let mut user = connect(balancer.at("shop"));
        for _ in 0..5 {
            let answer = ask_again(&mut user);
            assert!(answer.ends_with(&format!("http/1.1 {sni} full")), "{answer}");
        }
        let counted = |what| counted(&balancer, what);
        wait_for("all to be counted", || (counted("api_upstream_reused") == 4).then_some(()));
        assert_eq!(counted("tls_upstream_handshakes"), 1);
        assert_eq!((counted("tls_upstream_failed"), counted("connects_failed")), (0, 0));
        balancer.stop();
    }
}

#[test]
fn who_is_not_the_backend_gets_no_request_unless_nobody_looks() {
    let certificates = Certificates::new("to-wrong", &[&["b.example"]]);
    let others = Certificates::new("to-unknown", &[&["b.example"]]);
    let requests = Arc::new(AtomicUsize::new(0));
    let asked = Arc::clone(&requests);
    let counting = move |sealed: &mut Sealed| {
        if head(sealed).is_some() {
            asked.fetch_add(1, Ordering::SeqCst);
            let _ = sealed.write_all(b"HTTP/1.1 204 No Content\r\n\r\n");
            let _ = sealed.flush();
        }
    };
    let plain = serve(|mut connection| {
        let _ = connection.read(&mut [0; 4096]);
        let _ = connection.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
    });
    let ending = serve(drop);
    let wrong = [
        (sealed(&certificates, 0, counting.clone()), "other.example"),
        (sealed(&certificates, 0, counting.clone()), ""),
        (sealed(&others, 0, counting.clone()), "b.example"),
        (plain, "b.example"),
        (ending, "b.example"),
    ];
    for (address, name) in wrong {
        let mut balancer = balancer(Api, &certificates);
        balancer.register_as("shop", address, named(name));
        let answer = ask(balancer.at("shop"));
        assert!(answer.starts_with("HTTP/1.1 502 "), "{name}: {answer}");
        let counted = |what| counted(&balancer, what);
        assert_eq!((counted("connects_failed"), counted("tls_upstream_handshakes")), (1, 0));
        // One that ends may have reset the connection instead.
        assert!(counted("tls_upstream_failed") == 1 || address == ending, "{name}");
        balancer.stop();
    }
    assert_eq!(requests.load(Ordering::SeqCst), 0);
    for (who, name) in [(&certificates, "other.example"), (&others, "")] {
        let mut balancer = balancer_with(Api, &certificates, |config| {
            config.backend_tls.verifies = false;
        });
        balancer.register_as("shop", sealed(who, 0, counting.clone()), named(name));
        let answer = ask(balancer.at("shop"));
        assert!(answer.starts_with("HTTP/1.1 204 "), "{name}: {answer}");
        balancer.stop();
    }
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

#[test]
fn a_failed_handshake_is_a_failed_connection_and_the_next_backend_is_tried() {
    let certificates = Certificates::new("to-next", &[&["b.example"]]);
    let others = Certificates::new("to-next-unknown", &[&["b.example"]]);
    // It accepts, and never says anything.
    let silent = serve(|mut connection| {
        let _ = std::io::copy(&mut connection, &mut std::io::sink());
    });
    for protocol in [Tcp, Api] {
        for (bad, is_late) in [(sealed(&others, 0, |_| {}), false), (silent, true)] {
            let mut balancer = balancer_with(protocol, &certificates, |config| {
                config.timeouts.connect = Duration::from_millis(if is_late { 300 } else { 60_000 });
            });
            balancer.register_as("shop", bad, named("b.example"));
            let good = match protocol {
                Api => sealed(&certificates, 0, telling),
                _ => sealed(&certificates, 0, echo),
            };
            balancer.register_as("shop", good, named("b.example"));
            for _ in 0..4 {
                match protocol {
                    Api => assert!(ask(balancer.at("shop")).contains(" 200 OK")),
                    _ => {
                        let mut user = connect(balancer.at("shop"));
                        user.write_all(b"hello").unwrap();
                        let mut back = [0; 5];
                        user.read_exact(&mut back).unwrap();
                        assert_eq!(&back, b"hello");
                    }
                }
            }
            let counted = |what| counted(&balancer, what);
            let (failed, retries) = (counted("connects_failed"), counted("retries"));
            assert!(failed > 0 && failed == retries, "{protocol} {failed} {retries}");
            let by_tls = if is_late { 0 } else { failed };
            assert_eq!(counted("tls_upstream_failed"), by_tls, "{protocol}");
            balancer.stop();
        }
    }
}

#[test]
fn bytes_of_a_stream_come_back_whole_from_a_backend_under_tls_whatever_its_user_speaks() {
    let certificates = Certificates::new("to-stream", &[&["b.example"]]);
    // The backend of the one speaks TLS 1.3, that of the other 1.2.
    for (user_speaks_tls, version) in [(false, &TLS13), (true, &TLS12)] {
        let mut balancer = balancer_with(Tcp, &certificates, |config| {
            let mut service = config.services[0].clone();
            service.tls = user_speaks_tls;
            config.set_services(vec![service]);
            if user_speaks_tls {
                certificates.put(config);
            }
        });
        let config = server_of(&certificates, 0, &[version]);
        let backend = serve(move |connection| {
            if let Some(mut sealed) = shaken(&config, connection) {
                echo(&mut sealed);
            }
        });
        balancer.register_as("shop", backend, named("b.example"));
        let at = balancer.at("shop");
        for length in [0, 1, 16_384, 100_000, 3_000_000] {
            let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let back = match user_speaks_tls {
                true => {
                    let mut user = user(&certificates.client(), "b.example", at);
                    exchange_sealed(&mut user, &sent)
                }
                false => exchange(connect(at), &sent),
            };
            assert!(back == sent, "{} of {length}", back.len());
        }
        assert_eq!(counted(&balancer, "tls_upstream_failed"), 0);
        assert_eq!(counted(&balancer, "resets"), 0);
        balancer.stop();
    }
}

/// Sends all of it, ends, and takes what comes back.
fn exchange(mut user: TcpStream, sent: &[u8]) -> Vec<u8> {
    let (mut writer, sent) = (user.try_clone().unwrap(), sent.to_owned());
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    user.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    back
}

fn exchange_sealed(user: &mut User, sent: &[u8]) -> Vec<u8> {
    shake(user).unwrap();
    let mut back = Vec::new();
    for piece in sent.chunks(50_000) {
        user.write_all(piece).unwrap();
        let mut echoed = vec![0; piece.len()];
        user.read_exact(&mut echoed).unwrap();
        back.extend(echoed);
    }
    user.conn.send_close_notify();
    user.flush().unwrap();
    user.read_to_end(&mut back).unwrap();
    back
}

#[test]
fn a_response_that_ends_with_its_connection_is_whole_only_if_tls_says_so() {
    let certificates = Certificates::new("to-cut", &[&["b.example"]]);
    for announced in [true, false] {
        let until_close = move |sealed: &mut Sealed| {
            if head(sealed).is_some() {
                let _ = sealed.write_all(b"HTTP/1.1 200 OK\r\n\r\nthe whole of it");
                if announced {
                    sealed.conn.send_close_notify();
                }
                let _ = sealed.flush();
            }
        };
        let mut balancer = balancer(Api, &certificates);
        balancer.register_as("shop", sealed(&certificates, 0, until_close), named("b.example"));
        // Users of HTTP/1.1 are told the end by a last chunk, those of HTTP/1.0 by the connection's.
        for (version, last) in [("1.1", "\r\n0\r\n\r\n"), ("1.0", "the whole of it")] {
            let mut user = connect(balancer.at("shop"));
            write!(user, "GET / HTTP/{version}\r\nHost: a.example\r\n\r\n").unwrap();
            let mut answer = Vec::new();
            let ended = read_until_end(&mut user, last, &mut answer);
            let answer = String::from_utf8(answer).unwrap();
            let is_whole = ended && answer.ends_with(last);
            assert_eq!(is_whole, announced, "{version} {ended} {answer}");
        }
        let cut = if announced { 0 } else { 2 };
        assert_eq!(counted(&balancer, "api_cut_short"), cut);
        balancer.stop();
    }
}

/// Whether the answer ends with `last`, or the connection in good order.
fn read_until_end(user: &mut TcpStream, last: &str, answer: &mut Vec<u8>) -> bool {
    let mut bytes = [0; 4096];
    loop {
        match user.read(&mut bytes) {
            Ok(0) => return true,
            Ok(count) => answer.extend_from_slice(&bytes[..count]),
            Err(_) => return false,
        }
        if last.starts_with("\r\n0") && answer.ends_with(last.as_bytes()) {
            return true;
        }
    }
}

#[test]
fn an_end_of_a_stream_that_was_cut_off_is_passed_on_as_a_reset_unless_it_may_be_ragged() {
    let certificates = Certificates::new("to-ragged", &[&["b.example"]]);
    for ragged in [false, true] {
        let mut balancer = balancer_with(Tcp, &certificates, |config| {
            config.tls.takes_ragged_ends = ragged;
        });
        let cut_off = |sealed: &mut Sealed| {
            let _ = sealed.write_all(b"all");
            let _ = sealed.flush();
            // With bytes unread, its close would be a reset.
            let _ = sealed.sock.shutdown(Shutdown::Write);
            let _ = std::io::copy(&mut sealed.sock, &mut std::io::sink());
        };
        balancer.register_as("shop", sealed(&certificates, 0, cut_off), named("b.example"));
        let mut user = connect(balancer.at("shop"));
        let mut back = Vec::new();
        let end = user.read_to_end(&mut back);
        match ragged {
            true => assert_eq!((end.unwrap(), &*back), (3, &b"all"[..])),
            false => assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset),
        }
        drop(user);
        wait_for("the session to end", || (balancer.live("shop") == 0).then_some(()));
        balancer.stop();
    }
}

#[test]
fn what_a_backend_says_before_its_handshake_is_over_is_not_lost() {
    let certificates = Certificates::new("to-first", &[&["b.example"]]);
    let config = server(&certificates, 0);
    let greeting = serve(move |connection| {
        let mut server = ServerConnection::new(Arc::clone(&config)).unwrap();
        server.writer().write_all(b"220 ready").unwrap();
        let mut sealed = StreamOwned::new(server, connection);
        while sealed.conn.is_handshaking() {
            sealed.conn.complete_io(&mut sealed.sock).unwrap();
        }
        echo(&mut sealed);
    });
    let mut balancer = balancer(Tcp, &certificates);
    balancer.register_as("shop", greeting, named("b.example"));
    let mut user = connect(balancer.at("shop"));
    let mut said = [0; 9];
    user.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"220 ready");
    assert_eq!(exchange(user, b"hello"), b"hello");
    balancer.stop();
}

#[test]
fn a_proxy_header_comes_before_tls() {
    let certificates = Certificates::new("to-proxy", &[&["b.example"]]);
    for protocol in [Tcp, Api] {
        let config = server(&certificates, 0);
        let introduced = serve(move |mut connection| {
            let mut header = [0; 28];
            if connection.read_exact(&mut header).is_err() {
                return;
            }
            assert_eq!(&header[..13], b"\r\n\r\n\0\r\nQUIT\n\x21");
            if let Some(mut sealed) = shaken(&config, connection) {
                match protocol {
                    Api => telling(&mut sealed),
                    _ => echo(&mut sealed),
                }
            }
        });
        let mut balancer = balancer(protocol, &certificates);
        balancer.register_as("shop", introduced, |backend| {
            named("b.example")(backend);
            backend.proxy = true;
        });
        let at = balancer.at("shop");
        match protocol {
            Api => assert!(ask(at).contains(" 200 OK")),
            _ => assert_eq!(exchange(connect(at), b"hello"), b"hello"),
        }
        assert_eq!(counted(&balancer, "proxy_headers_sent"), 1);
        balancer.stop();
    }
}

#[test]
fn a_connection_takes_up_an_earlier_session_with_the_same_backend_alone() {
    let certificates = Certificates::new("to-resume", &[&["b.example"]]);
    let mut balancer = Balancer::start_with(|config| {
        config.workers = Some(1);
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        config.set_services(vec![ServiceConfig { listen, ..ServiceConfig::new("shop", Api) }]);
        config.backend_tls.ca = Some(certificates.authorities());
        config.api.upstream_idle_max = 0;
    });
    // Both would open each other's tickets.
    let config = server(&certificates, 0);
    for _ in 0..2 {
        let config = Arc::clone(&config);
        let address = serve(move |connection| {
            if let Some(mut sealed) = shaken(&config, connection) {
                telling(&mut sealed);
            }
        });
        balancer.register_as("shop", address, named("b.example"));
    }
    let kinds: Vec<bool> = (0..6).map(|_| ask(balancer.at("shop")).ends_with("resumed")).collect();
    assert_eq!(kinds, [false, false, true, true, true, true]);
    assert_eq!(counted(&balancer, "tls_upstream_resumed"), 4);
    balancer.stop();
}

#[test]
fn a_kept_connection_that_its_backend_ends_is_noticed_and_costs_nobody_a_request() {
    let certificates = Certificates::new("to-idle", &[&["b.example"]]);
    let ended = Arc::new(AtomicUsize::new(0));
    for announced in [true, false] {
        let count = Arc::clone(&ended);
        count.store(0, Ordering::SeqCst);
        let once = move |sealed: &mut Sealed| {
            if head(sealed).is_some() {
                let _ = sealed.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
                if announced {
                    sealed.conn.send_close_notify();
                }
                let _ = sealed.flush();
                let _ = sealed.sock.shutdown(Shutdown::Write);
                count.fetch_add(1, Ordering::SeqCst);
                let _ = std::io::copy(&mut sealed.sock, &mut std::io::sink());
            }
        };
        let mut balancer = balancer(Api, &certificates);
        balancer.register_as("shop", sealed(&certificates, 0, once), named("b.example"));
        let mut user = connect(balancer.at("shop"));
        for number in 1..4 {
            let answer = ask_again(&mut user);
            assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
            wait_for("the backend's end", || {
                (ended.load(Ordering::SeqCst) == number).then_some(())
            });
            wait_for("its being noticed", || {
                balancer.let_workers_turn();
                (counted(&balancer, "api_upstream_idle") == 0).then_some(())
            });
        }
        assert_eq!(counted(&balancer, "tls_upstream_handshakes"), 3);
        assert_eq!((counted(&balancer, "retries"), counted(&balancer, "api_failed")), (0, 0));
        balancer.stop();
    }
}

#[test]
fn a_user_who_leaves_during_the_handshake_leaves_nothing_behind() {
    let certificates = Certificates::new("to-leave", &[&["b.example"]]);
    let silent = serve(|mut connection| {
        let _ = std::io::copy(&mut connection, &mut std::io::sink());
    });
    for protocol in [Tcp, Api] {
        let mut balancer = balancer_with(protocol, &certificates, |config| {
            config.timeouts.connect = Duration::from_millis(500);
        });
        balancer.register_as("shop", silent, named("b.example"));
        let users: Vec<TcpStream> = (0..20)
            .map(|_| {
                let mut user = connect(balancer.at("shop"));
                user.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
                user
            })
            .collect();
        wait_for("the users", || (balancer.live("shop") == 20).then_some(()));
        drop(users);
        wait_for("their sessions to end", || (balancer.live("shop") == 0).then_some(()));
        balancer.stop();
    }
}

#[test]
fn requests_of_users_by_https_go_to_backends_by_tls() {
    let certificates = Certificates::new("to-both", &[&["b.example"]]);
    let mut balancer = Balancer::start_with(|config: &mut Config| {
        config.listen.api_tls = Some("127.0.0.1:0".parse().unwrap());
        config.backend_tls.ca = Some(certificates.authorities());
        certificates.put(config);
    });
    balancer.register_as("api", sealed(&certificates, 0, telling), named("b.example"));
    let at = balancer.plane.doors.api_tls().unwrap();
    let mut user = user(&certificates.client(), "b.example", at);
    for _ in 0..3 {
        let answer = get(&mut user, "b.example", "/").unwrap();
        assert!(answer.ends_with("full"), "{answer}");
    }
    balancer.stop();
}
