//! The load generator under TLS, against servers of this process: honest ones, whose every handshake counts,
//! and others, each of which must be named for what is wrong with it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use lb::cluster::Protocol;
use lb::load::handshakes::Reason;
use lb::load::tally::RequestFailure;
use lb::load::web::{Payload, Request};
use lb::load::{Load, Outcome, Progress, Shape, run};
use lb::tls::client::{Alpn, Group, Terms, Trust, Wishes};
use rustls::crypto::aws_lc_rs;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

#[path = "common/certified.rs"]
mod certified;

use certified::certified;

type User = StreamOwned<ServerConnection, TcpStream>;

/// A server for the host `a.example`, and the file with its certificate.
struct Server {
    at: SocketAddr,
    ca: PathBuf,
}

/// Serves each user in a thread of its own, by these settings.
fn serve(
    test: &str,
    change: impl FnOnce(&mut ServerConfig),
    act: fn(User) -> std::io::Result<()>,
) -> Server {
    let (pem, mut config) = certified("a.example");
    let ca = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("load-{test}.pem"));
    std::fs::write(&ca, pem).unwrap();
    config.ticketer = aws_lc_rs::Ticketer::new().unwrap();
    change(&mut config);
    let config = Arc::new(config);
    let at = listen(move |socket| {
        let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
        // How a connection ends is told by the other side's counts.
        let _ = act(StreamOwned::new(connection, socket));
    });
    Server { at, ca }
}

fn listen(act: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let act = act.clone();
            thread::spawn(move || act(socket));
        }
    });
    at
}

fn echo(mut user: User) -> std::io::Result<()> {
    let mut bytes = [0; 16_384];
    loop {
        let count = user.read(&mut bytes)?;
        if count == 0 {
            user.conn.send_close_notify();
            return user.flush();
        }
        user.write_all(&bytes[..count])?;
        user.flush()?;
    }
}

fn wishes(server: &Server) -> Wishes {
    Wishes {
        name: "a.example".to_owned(),
        trust: Trust::File(server.ca.clone()),
        resumes: false,
        group: None,
        alpn: None,
    }
}

fn load(server: &Server, wishes: &Wishes) -> Load {
    let is_api = wishes.alpn.is_some();
    let request = || Request::new("GET", "/", "a.example", &[], Payload::None).unwrap();
    Load {
        protocol: if is_api { Protocol::Api } else { Protocol::Tcp },
        to: server.at,
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
        request: is_api.then(|| Arc::new(request())),
        streams: None,
        tls: Some(Terms::new(wishes).unwrap()),
        watch: None,
    }
}

fn outcome(load: &Load) -> std::io::Result<Outcome> {
    load.check().unwrap();
    run(load, &Arc::new(Progress::default()))
}

#[test]
fn every_reply_under_tls_is_right_and_every_handshake_counts() {
    let server = serve("right", |_| {}, echo);
    for (size, threads) in [(24, 1), (64, 2), (16_385, 1), (100_000, 2)] {
        let mut load = load(&server, &wishes(&server));
        (load.size, load.threads) = (size, threads);
        let tally = outcome(&load).unwrap().tally;
        assert_eq!((tally.errors(), tally.requests > 0), (0, true), "{size}: {}", tally.kinds());
        assert_eq!(tally.bytes_received, tally.requests * size as u64);
        let handshakes = &tally.handshakes;
        assert_eq!((handshakes.full, handshakes.resumed, handshakes.measured), (4, 0, 0));
        assert_eq!(handshakes.latency.len(), 4);
        let agreed = handshakes.agreed.as_deref();
        assert_eq!(agreed, Some("TLS 1.3, AES_256_GCM, X25519MLKEM768"));
    }
}

#[test]
fn only_those_who_are_asked_to_take_up_earlier_sessions() {
    let server = serve("resumed", |_| {}, echo);
    for (resumes, rate) in [(false, None), (true, None), (true, Some(200))] {
        let mut load = load(&server, &Wishes { resumes, ..wishes(&server) });
        (load.shape, load.rate) = (Shape::Churn, rate);
        let tally = outcome(&load).unwrap().tally;
        assert_eq!(tally.errors(), 0, "{}", tally.kinds());
        let handshakes = &tally.handshakes;
        // Of the last, some may not have had their reply.
        assert!(tally.requests > 4 && handshakes.total() >= tally.requests);
        assert_eq!(handshakes.measured, handshakes.total(), "there was no warm-up");
        assert_eq!(handshakes.resumed > 0, resumes);
        if resumes {
            assert!(handshakes.full <= 4, "only the first have nothing to take up");
        }
    }
}

#[test]
fn a_short_connection_on_a_schedule_is_opened_when_its_request_is_due() {
    let server = serve("schedule", |_| {}, echo);
    let mut load = load(&server, &wishes(&server));
    // One is due in this time, though four connections could make it.
    (load.shape, load.rate, load.duration) = (Shape::Churn, Some(1), Duration::from_millis(900));
    let tally = outcome(&load).unwrap().tally;
    assert_eq!((tally.errors(), tally.requests), (0, 1), "{}", tally.kinds());
    assert_eq!(tally.handshakes.total(), 1, "others were opened ahead");
}

#[test]
fn what_is_agreed_on_is_what_was_wished() {
    let server = serve("group", |_| {}, echo);
    for group in Group::ALL {
        let load = load(&server, &Wishes { group: Some(group), ..wishes(&server) });
        let agreed = outcome(&load).unwrap().tally.handshakes.agreed.unwrap();
        assert!(agreed.ends_with(&format!(", {}", group.name())), "{agreed}");
    }
}

#[test]
fn a_certificate_that_is_not_trusted_ends_the_run_with_its_cure() {
    let server = serve("distrust", |_| {}, echo);
    let other = serve("other", |_| {}, echo);
    let unknown = Wishes { trust: Trust::File(other.ca.clone()), ..wishes(&server) };
    let misnamed = Wishes { name: "b.example".to_owned(), ..wishes(&server) };
    for (wishes, words) in [
        (&unknown, "from no trusted authority; name one with --tls-ca"),
        (&misnamed, "is not for b.example; ask for another host with --tls-name"),
    ] {
        let mut load = load(&server, wishes);
        let said = outcome(&load).err().unwrap().to_string();
        assert!(said.contains(words), "{said}");
        // Where every request has a connection of its own, they are counted instead.
        load.shape = Shape::Churn;
        let outcome = outcome(&load).unwrap();
        let tally = &outcome.tally;
        let refused = tally.handshakes.failures[Reason::Certificate as usize];
        assert!(refused > 0 && tally.requests == 0);
        assert_eq!(
            (tally.errors(), tally.faults[RequestFailure::Tls as usize]),
            (refused, refused)
        );
        assert!(outcome.invalid.unwrap().contains(words));
        load.tls = Some(Terms::new(&Wishes { trust: Trust::Anybody, ..wishes.clone() }).unwrap());
        assert_eq!(run(&load, &Arc::default()).unwrap().tally.errors(), 0);
    }
}

#[test]
fn why_a_handshake_fails_is_told_apart() {
    let mute = |server: &Server, act: fn(TcpStream)| {
        let (at, ca) = (listen(act), server.ca.clone());
        Server { at, ca }
    };
    let only_p384 = |config: &mut ServerConfig| {
        let mut provider = aws_lc_rs::default_provider();
        provider.kx_groups = vec![aws_lc_rs::kx_group::SECP384R1];
        *config = {
            let builder = ServerConfig::builder_with_provider(Arc::new(provider));
            let builder = builder.with_safe_default_protocol_versions().unwrap();
            builder.with_no_client_auth().with_cert_resolver(Arc::clone(&config.cert_resolver))
        };
    };
    let choosy = serve("choosy", only_p384, echo);
    let talks = mute(&choosy, |mut socket| {
        let _ = socket.write_all(b"220 welcome to the mail server\r\n");
        let _ = socket.read(&mut [0; 4096]);
    });
    let leaves = mute(&choosy, |mut socket| drop(socket.read(&mut [0; 4096])));
    let silent = mute(&choosy, |socket| {
        thread::sleep(Duration::from_secs(60));
        drop(socket);
    });
    for (server, reason) in [
        (&choosy, Reason::Alert),
        (&talks, Reason::Protocol),
        (&leaves, Reason::Closed),
        (&silent, Reason::TimedOut),
    ] {
        let group = Some(Group::X25519);
        let mut load = load(server, &Wishes { group, ..wishes(&choosy) });
        (load.shape, load.patience) = (Shape::Churn, Duration::from_millis(100));
        let tally = outcome(&load).unwrap().tally;
        let found = tally.handshakes.failures[reason as usize];
        assert!(found > 0, "{reason:?}: {:?}", tally.handshakes.failures);
        assert_eq!(tally.handshakes.failures.iter().sum::<u64>(), tally.errors());
        assert!(tally.handshakes.first_failure.is_some());
    }
}

#[test]
fn a_response_that_ends_with_its_connection_must_be_ended_by_tls() {
    fn answer(user: &mut User) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            user.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        user.write_all(b"HTTP/1.1 200 OK\r\n\r\nall of it")?;
        user.flush()
    }
    let whole = serve(
        "whole",
        |_| {},
        |mut user| {
            answer(&mut user)?;
            user.conn.send_close_notify();
            user.flush()
        },
    );
    let cut = serve(
        "cut",
        |_| {},
        |mut user| {
            answer(&mut user)?;
            user.sock.shutdown(Shutdown::Write)
        },
    );
    let garbled = serve(
        "garbled",
        |_| {},
        |mut user| {
            answer(&mut user)?;
            user.sock.write_all(&[23, 3, 3, 0, 32])?;
            user.sock.write_all(&[7; 32])
        },
    );
    for (server, failure) in [
        (&whole, None),
        (&cut, Some(RequestFailure::Closed)),
        (&garbled, Some(RequestFailure::Corrupt)),
    ] {
        let load = load(server, &Wishes { alpn: Some(Alpn::Http1), ..wishes(server) });
        let tally = outcome(&load).unwrap().tally;
        match failure {
            None => {
                assert_eq!((tally.errors(), tally.requests > 0), (0, true), "{}", tally.kinds())
            }
            Some(failure) => {
                assert_eq!(tally.requests, 0);
                assert_eq!(tally.faults[failure as usize], tally.errors(), "{}", tally.kinds());
            }
        }
    }
}
