//! Connections that change their protocol: a tunnel opens only after the backend agreed to what was
//! offered, and no byte is lost on the way into it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::Duration;

use lb::cluster::BackendId;
use lb::ring::outlook::outlook;
use lb::session::EndReason;
use lb::worker::link::Order;

use tungstenite::{Message, WebSocket};

use crate::harness::{Backend, Balancer, Wire, ok};
use crate::random::pattern;
use crate::wait::{PATIENCE, wait_for};

const ASK: &str = "GET /chat HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
const AGREE: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";

/// Agrees, says a word at once, and echoes what it receives.
fn echo() -> Backend {
    Backend::run(|_, mut wire: Wire| {
        let head = wire.head().unwrap();
        assert_eq!((head.one("upgrade"), head.one("connection")), (Some("echo"), Some("upgrade")));
        wire.write([AGREE, "hello"].concat());
        while let Some(byte) = wire.exactly(1) {
            wire.write(byte);
        }
    })
}

#[test]
fn bytes_sent_too_early_on_both_sides_go_first_into_the_tunnel() {
    let balancer = Balancer::over(&[echo().address], |_| {});
    let mut user = balancer.user();
    user.send([ASK, "early"].concat());
    assert_eq!(user.wire.head().unwrap().status(), 101);
    assert_eq!(user.wire.exactly(10).unwrap(), b"helloearly");
    user.send("late");
    assert_eq!(user.wire.exactly(4).unwrap(), b"late");
    user.wire.stream.shutdown(Shutdown::Write).unwrap();
    user.ends();
    balancer.expect("sessions", 0, |it| it.sessions_active.get());
    balancer.stop();
}

#[test]
fn a_tunnel_over_a_connection_that_was_used_before_holds_no_buffers() {
    let backend = Backend::run(|own, mut wire| {
        own.request(&mut wire);
        wire.write(ok("plain"));
        wire.head().unwrap();
        wire.write(AGREE);
        wire.rest();
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    let unused = balancer.count(|it| it.buffers_free.get());
    assert_eq!(user.get("/").text(), "plain");
    user.send(ASK);
    assert_eq!(user.wire.head().unwrap().status(), 101);
    balancer.expect("unused buffers", unused, |it| it.buffers_free.get());
    balancer.stop();
}

/// How reading a connection ended: `None` if the peer finished.
fn end_of(stream: &mut TcpStream) -> Option<ErrorKind> {
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) => return Some(error.kind()),
        }
    }
}

/// Closes with a reset.
fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Whose connection goes away in the middle of a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leaver {
    User,
    Backend,
    Balancer,
}

#[test]
fn a_tunnel_that_was_torn_is_torn_on_both_sides() {
    for leaver in [Leaver::User, Leaver::Backend, Leaver::Balancer] {
        let (tell, told) = mpsc::channel();
        let backend = Backend::run(move |_, mut wire: Wire| {
            wire.head().unwrap();
            wire.write(AGREE);
            assert_eq!(wire.exactly(5).unwrap(), b"hello");
            tell.send(None).unwrap();
            match leaver {
                Leaver::Backend => reset(&wire.stream),
                _ => tell.send(end_of(&mut wire.stream)).unwrap(),
            }
        });
        let mut balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        user.send([ASK, "hello"].concat());
        assert_eq!(user.wire.head().unwrap().status(), 101);
        told.recv_timeout(PATIENCE).unwrap();
        let backend = BackendId(1);
        let end = match leaver {
            Leaver::Backend => end_of(&mut user.wire.stream),
            Leaver::User => {
                reset(&user.wire.stream);
                drop(user);
                told.recv_timeout(PATIENCE).unwrap()
            }
            Leaver::Balancer => {
                balancer.order(Order::EndBackend { backend, reason: EndReason::BackendLeft });
                told.recv_timeout(PATIENCE).unwrap()
            }
        };
        assert_eq!(end, Some(ErrorKind::ConnectionReset), "{leaver:?}");
        balancer.expect("sessions", 0, |it| it.sessions_active.get());
        balancer.stop();
    }
}

#[test]
fn a_reset_does_not_overtake_what_a_tunnel_has_taken() {
    /// More than a kernel takes for a reader that has read nothing yet, and less than all of them
    /// do.
    const QUEUED: usize = 512 * 1024;
    for up in [false, true] {
        let (tell, told) = mpsc::channel();
        let (go, gone) = mpsc::channel::<()>();
        let gone = std::sync::Mutex::new(gone);
        let say_and_reset = |stream: &mut TcpStream| {
            stream.write_all(&vec![7; QUEUED]).unwrap();
            wait_for("the peer to have taken everything", || {
                (outlook(stream.as_fd()).queued == 0).then_some(())
            });
            reset(stream);
        };
        let read_until_reset = |stream: &mut TcpStream| {
            let mut got = Vec::new();
            let error = stream.read_to_end(&mut got).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            got.len()
        };
        let backend = Backend::run(move |_, mut wire: Wire| {
            wire.head().unwrap();
            wire.write(AGREE);
            if up {
                gone.lock().unwrap().recv().unwrap();
                tell.send(read_until_reset(&mut wire.stream)).unwrap();
            } else {
                say_and_reset(&mut wire.stream);
                drop(wire);
                tell.send(0).unwrap();
            }
        });
        let balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        user.send(ASK);
        let said = if up {
            user.wire.head().unwrap();
            say_and_reset(&mut user.wire.stream);
            drop(user);
            go.send(()).unwrap();
            told.recv_timeout(PATIENCE).unwrap()
        } else {
            told.recv_timeout(PATIENCE).unwrap();
            user.wire.head().unwrap();
            user.wire.ahead_len() + read_until_reset(&mut user.wire.stream)
        };
        assert_eq!(said, QUEUED, "up: {up}");
        balancer.stop();
    }
}

#[test]
fn a_tunnel_in_which_nothing_moves_ends() {
    let balancer = Balancer::over(&[echo().address], |config| {
        config.api.tunnel_idle = Duration::from_millis(150);
    });
    let mut user = balancer.user();
    user.send(ASK);
    assert_eq!(user.wire.head().unwrap().status(), 101);
    assert_eq!(user.wire.rest(), b"hello");
    balancer.stop();
}

#[test]
fn a_backend_that_does_not_agree_answers_as_ever() {
    let backend = Backend::named("plain");
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    for _ in 0..3 {
        user.send(ASK);
        assert_eq!(user.answer().text(), "plain");
        assert_eq!(user.get("/").text(), "plain");
    }
    assert_eq!(backend.connections(), 1);
    balancer.stop();
}

#[test]
fn only_what_can_be_a_tunnel_is_offered_to_a_backend() {
    let backend = Backend::answering(|_| ok("plain"));
    let balancer = Balancer::over(&[backend.address], |_| {});
    for request in [
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
         HTTP2-Settings: AAMAAABk\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: echo\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\
         Content-Length: 2\r\n\r\nhi",
    ] {
        let mut user = balancer.user();
        user.send(request);
        assert_eq!(user.answer().text(), "plain", "{request}");
    }
    for seen in backend.requests() {
        assert!(seen.all("upgrade").is_empty(), "{seen:?}");
        assert!(seen.all("http2-settings").is_empty(), "{seen:?}");
    }
    balancer.stop();
}

#[test]
fn any_method_with_or_without_a_body_may_become_a_tunnel() {
    let backend = Backend::run(|own, mut wire| {
        let request = own.request(&mut wire).unwrap();
        assert_eq!((request.one("upgrade"), request.text()), (Some("echo"), "{}"));
        wire.write(AGREE);
        while let Some(byte) = wire.exactly(1) {
            wire.write(byte);
        }
    });
    let empty = echo();
    let lines = "Host: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n";
    for (backend, request, said) in [
        (&empty, format!("POST /exec HTTP/1.1\r\n{lines}\r\n"), "hello"),
        (&empty, format!("POST /exec HTTP/1.1\r\n{lines}Content-Length: 0\r\n\r\n"), "hello"),
        (&backend, format!("POST /exec HTTP/1.1\r\n{lines}Content-Length: 2\r\n\r\n{{}}"), ""),
        (
            &backend,
            format!(
                "PUT /x HTTP/1.1\r\n{lines}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
            ),
            "",
        ),
    ] {
        let balancer = Balancer::over(&[backend.address], |_| {});
        let mut user = balancer.user();
        user.send(&request);
        assert_eq!(user.wire.head().unwrap().status(), 101, "{request}");
        user.send("ls");
        let wanted = [said, "ls"].concat();
        assert_eq!(user.wire.exactly(wanted.len()).unwrap(), wanted.as_bytes(), "{request}");
        balancer.stop();
    }
}

#[test]
fn a_backend_that_agrees_before_it_has_the_request_gets_no_tunnel() {
    let backend = Backend::run(|_, mut wire| {
        wire.head().unwrap();
        wire.write(AGREE);
        wire.rest();
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send(ASK.replace("GET", "POST").replace("\r\n\r\n", "\r\nContent-Length: 9\r\n\r\nhalf"));
    let answer = user.answer();
    assert_eq!((answer.status(), answer.one("connection")), (502, Some("close")));
    balancer.stop();
}

#[test]
fn a_protocol_that_was_not_offered_is_no_tunnel() {
    let backend = Backend::run(|own, mut wire| {
        own.request(&mut wire);
        wire.write(AGREE.replace("echo", "other"));
        wire.rest();
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    user.send(ASK);
    assert_eq!(user.answer().status(), 502);
    balancer.stop();
}

#[test]
fn websocket_messages_pass_both_ways() {
    let backend = Backend::run(|_, wire| {
        let mut socket: WebSocket<_> = tungstenite::accept(wire.stream).unwrap();
        while let Ok(message) = socket.read() {
            if message.is_close() || socket.send(message).is_err() {
                return;
            }
        }
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    let door = balancer.door();
    let stream = balancer.user().wire.stream;
    let (mut socket, answer) = tungstenite::client(format!("ws://{door}/chat"), stream).unwrap();
    assert_eq!(answer.status(), 101);
    for size in [0, 1, 125, 126, 65_536, 1_000_000] {
        let message = Message::binary(pattern(size as u64 + 1, size));
        socket.send(message.clone()).unwrap();
        assert!(socket.read().unwrap() == message, "{size} bytes");
    }
    socket.send(Message::text("word")).unwrap();
    assert_eq!(socket.read().unwrap(), Message::text("word"));
    balancer.expect("sessions", 1, |it| it.sessions_active.get());
    drop(socket);
    balancer.expect("sessions", 0, |it| it.sessions_active.get());
    balancer.stop();
}
