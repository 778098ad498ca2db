//! Backends that the configuration lists, and checks of them over real sockets: who is in the rotation of the
//! worker, and whose sessions it is told to end.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use lb::cluster::{Protocol, ServiceId, Standing, WhenAllFail};
use lb::config::services::{
    CheckConfig, CheckKind, Expected, OnFail, ServiceConfig, StaticBackend,
};
use lb::session::EndReason;
use lb::worker::link::Order;
use serde_json::{Value, json};

use crate::harness::{Core, assert_failed, data_port};
use crate::wait::wait_for;

/// The only named service.
const PG: ServiceId = ServiceId(3);

/// A core whose service `pg` lists these ports.
fn core(protocol: Protocol, ports: &[u16], check: CheckConfig) -> Core {
    let listed = |port: &u16| {
        let (address, group) = (loopback(*port), None);
        StaticBackend { address, weight: 1, group, proxy: false, http2: false, tls: None }
    };
    let backends = ports.iter().map(listed).collect();
    Core::start(|config| {
        let pg = ServiceConfig { backends, check, ..ServiceConfig::new("pg", protocol) };
        config.set_services(vec![pg]);
    })
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Quick, and sure after two outcomes in a row.
fn tcp() -> CheckConfig {
    CheckConfig {
        kind: CheckKind::Tcp,
        interval: Duration::from_millis(20),
        timeout: Some(Duration::from_secs(5)),
        rise: 2,
        fall: 2,
        ..CheckConfig::default()
    }
}

fn wait_for_rotation(core: &Core, ports: &[u16]) {
    wait_for(&format!("a rotation of {ports:?}"), || {
        let snapshot = core.worker.snapshot();
        let pool = snapshot.pool(PG)?;
        let rotation: Vec<u16> = pool.in_rotation().map(|it| it.address.port()).collect();
        (rotation == ports).then_some(())
    });
}

/// A server that answers each connection with one status.
struct Health {
    port: u16,
    status: Arc<AtomicU16>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Health {
    fn answers(status: u16) -> Health {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (status, stop) = (Arc::new(AtomicU16::new(status)), Arc::new(AtomicBool::new(false)));
        let (said, stopped) = (Arc::clone(&status), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (mut asked, mut byte) = (Vec::new(), [0]);
                while !asked.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) > 0 {
                    asked.push(byte[0]);
                }
                let is_it = asked.starts_with(b"GET /primary HTTP/1.1\r\n");
                let status = if is_it { said.load(Ordering::Relaxed) } else { 404 };
                let answer = format!("HTTP/1.1 {status} So\r\ncontent-length: 0\r\n\r\n");
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Health { port, status, stop, thread: Some(thread) }
    }

    fn turn(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    fn check(&self) -> CheckConfig {
        CheckConfig {
            kind: CheckKind::Http,
            port: Some(self.port),
            path: "/primary".to_owned(),
            expect: Expected { first: 200, last: 200 },
            ..tcp()
        }
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(loopback(self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn listed_backends_are_there_from_the_start_without_a_control_connection() {
    let (_one, first) = data_port();
    let (_other, second) = data_port();
    let core = core(Protocol::Tcp, &[first, second], CheckConfig::default());
    wait_for_rotation(&core, &[first, second]);
    let backend = core.shown(first);
    assert_eq!((&backend["state"], &backend["hello"]["misses"]), (&json!("serving"), &json!(0)));
    assert_eq!(backend["check"]["verdict"], Value::Null);
    assert_eq!(core.get("/readyz").0, 200);
    let id = backend["id"].as_str().unwrap();
    let mut stranger = core.connect();
    let answer = stranger.ask(&json!({"cmd": "unregister", "protocol": "tcp", "port": first}));
    assert_failed(&answer, "is not registered over this connection");
    wait_for_rotation(&core, &[first, second]);
    assert!(id.starts_with('b'));
}

#[test]
fn a_checked_backend_that_dies_gets_no_users_until_it_is_back() {
    let (_one, first) = data_port();
    let (other, second) = data_port();
    let core = core(Protocol::Tcp, &[first, second], tcp());
    wait_for_rotation(&core, &[first, second]);
    drop(other);
    wait_for_rotation(&core, &[first]);
    let failing = core.shown(second);
    assert_eq!((&failing["state"], &failing["turns"]), (&json!("failing"), &json!(0)));
    assert_eq!(failing["check"]["verdict"], "failing");
    let why = failing["check"]["failure"].as_str().unwrap();
    assert!(why.contains("cannot connect to"), "{why}");
    let (_, metrics) = core.get("/metrics");
    let is_told = |line: &str| {
        line.starts_with("lb_backend_state{")
            && line.contains(&loopback(second).to_string())
            && line.contains("state=\"failing\"")
    };
    assert!(metrics.lines().any(is_told), "{metrics}");
    let _back = TcpListener::bind(loopback(second)).unwrap();
    wait_for_rotation(&core, &[first, second]);
    assert_eq!(core.shown(second)["check"]["failure"], Value::Null);
}

#[test]
fn an_http_check_on_a_port_of_its_own_decides_whatever_the_service_speaks() {
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Api] {
        let (_listener, port) = data_port();
        let health = Health::answers(503);
        let core = core(protocol, &[port], health.check());
        wait_for("the first outcome", || {
            (core.shown(port)["check"]["verdict"] == "failing").then_some(())
        });
        wait_for_rotation(&core, &[]);
        let why = core.shown(port)["check"]["failure"].as_str().unwrap().to_owned();
        assert!(why.ends_with("answered 503 instead of 200"), "{why}");
        let (code, why) = core.get("/readyz");
        assert_eq!((code, why.as_str()), (503, "every backend fails its check\n"));
        health.turn(200);
        wait_for_rotation(&core, &[port]);
        health.turn(204);
        wait_for_rotation(&core, &[]);
    }
}

#[test]
fn when_all_fail_users_are_refused_or_served_as_the_service_says() {
    for (when_all_fail, serves) in [(WhenAllFail::Refuse, false), (WhenAllFail::Serve, true)] {
        let (_one, first) = data_port();
        let (_other, second) = data_port();
        let health = Health::answers(200);
        let check = CheckConfig { when_all_fail, ..health.check() };
        let core = core(Protocol::Tcp, &[first, second], check);
        core.wait_for_standing(first, Standing::Serving);
        core.wait_for_standing(second, Standing::Serving);
        health.turn(500);
        core.wait_for_standing(first, Standing::Failing);
        core.wait_for_standing(second, Standing::Failing);
        let tried = [first, second];
        wait_for_rotation(&core, if serves { &tried } else { &[] });
        assert_eq!(core.get("/readyz").0, if serves { 200 } else { 503 });
    }
}

#[test]
fn on_fail_close_ends_the_sessions_of_the_one_that_fails_and_keep_does_not() {
    for on_fail in [OnFail::Close, OnFail::Keep] {
        let (_one, first) = data_port();
        let (other, second) = data_port();
        let core = core(Protocol::Tcp, &[first, second], CheckConfig { on_fail, ..tcp() });
        wait_for_rotation(&core, &[first, second]);
        let all = core.worker.backends();
        let failing = all.iter().find(|it| it.address.port() == second).unwrap().id;
        drop(other);
        wait_for_rotation(&core, &[first]);
        let end = Order::EndBackend { backend: failing, reason: EndReason::CheckFailed };
        if on_fail == OnFail::Close {
            core.worker.wait_for_order(end);
        }
        let told = core.worker.orders();
        let is_other = |order: &&Order| matches!(order, Order::EndBackend { backend, .. } if *backend != failing);
        assert_eq!(told.iter().find(is_other), None);
        assert_eq!(told.contains(&end), on_fail == OnFail::Close);
    }
}
