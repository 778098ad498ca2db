//! The admin door as operators and their tools use it. Owns the laws of what is shown, and the law that
//! showing a lot of it delays nobody.

use std::collections::{BTreeSet, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use lb::base::time::Now;
use lb::cluster::{BackendId, Protocol, ServiceId};
use lb::control::status::{BackendState, RunState, SessionsPage, Status};
use lb::metrics::{BackendCounters, ControlCounters, WorkerCounters};
use lb::worker::link::Report;
use serde_json::json;

use crate::harness::{Core, data_port};
use crate::wait::{PATIENCE, wait_for};

fn status(core: &Core) -> Status {
    let (code, body) = core.get("/status");
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).expect(&body)
}

fn page(core: &Core, query: &str) -> SessionsPage {
    let (code, body) = core.get(&format!("/sessions{query}"));
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).expect("a page of sessions")
}

#[test]
fn the_status_shows_backends_with_their_share_and_counts() {
    let core = Core::start(|config| config.limits.sessions = 5000);
    let (_first, first) = data_port();
    let (_second, second) = data_port();
    let mut backend = core.connect();
    backend.ask(&json!({"cmd":"register","protocol":"tcp","port":first,"weight":3,"name":"big"}));
    backend.register(Protocol::Tcp, second);
    core.worker.wait_for_rotation(Protocol::Tcp, &[first, first, second, first]);
    let slot = usize::from(core.worker.backends()[0].slot);
    core.worker.metrics.backends[slot].active.set(2);
    core.worker.metrics.backends[slot].total.set(9);
    core.worker.metrics.backends[slot].down.set(700);
    core.worker.metrics.counters.sessions_active.set(2);

    let shown = status(&core);
    assert_eq!(shown.state, RunState::Serving);
    assert_eq!(shown.doors.control, Some(core.control));
    assert_eq!(shown.doors.admin, Some(core.admin));
    assert_eq!((shown.sessions.active, shown.sessions.limit), (2, 5000));
    let [big, small] = shown.backends.as_slice() else { panic!("{shown:?}") };
    assert_eq!((big.turns, big.round, small.turns), (3, 4, 1));
    assert_eq!(big.name.as_deref(), Some("big"));
    assert_eq!((big.sessions_active, big.sessions_total, big.bytes_down), (2, 9, 700));
    assert_eq!((big.state, small.sessions_total), (BackendState::Serving, 0));
    assert_eq!(shown.control["backends_registered"], 2);
    assert!(shown.workers[0].counters["turns"] > 0);

    backend.ask(&json!({"cmd": "unregister", "protocol": "tcp", "port": first}));
    let left = status(&core).backends.pop().expect("it still has sessions");
    assert_eq!((left.state, left.sessions_active), (BackendState::Left, 2));
    assert_eq!(left.address.port(), first);
    core.worker.metrics.backends[slot].active.set(0);
    wait_for("it to be forgotten", || (status(&core).backends.len() == 1).then_some(()));
}

#[test]
fn a_reused_slot_starts_at_zero() {
    let core = Core::start(|_| {});
    let mut backend = core.connect();
    backend.register(Protocol::Udp, 9);
    core.worker.wait_for_rotation(Protocol::Udp, &[9]);
    for slot in core.worker.metrics.backends.iter() {
        slot.total.set(5);
    }
    assert_eq!(status(&core).backends[0].sessions_total, 5);
    backend.register(Protocol::Udp, 10);
    assert_eq!(status(&core).backends[1].sessions_total, 0);
}

#[test]
fn a_hundred_thousand_sessions_are_shown_page_by_page_and_delay_nobody() {
    const SESSIONS: u32 = 100_000;
    let core = Core::start(|_| {});
    core.worker.with_shard(|shard| {
        for number in 0..SESSIONS {
            let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number);
            let client = SocketAddr::from((ip, 7));
            let place =
                shard.open(ServiceId::built_in(Protocol::Tcp), client, Now::read()).unwrap();
            shard.set_backend(&place, BackendId(1 + number % 4));
        }
    });
    let mut backend = core.connect();
    let whole = std::thread::scope(|scope| {
        let whole = scope.spawn(|| page(&core, "?limit=100000"));
        let mut asked = 0;
        while !whole.is_finished() || asked == 0 {
            assert_eq!(backend.ask(&json!({"cmd": "list"}))["ack"], "successful");
            asked += 1;
        }
        assert!(asked > 5, "only {asked} answers while the table was read");
        whole.join().unwrap()
    });
    assert_eq!(whole.sessions.len(), SESSIONS as usize);
    let ids: HashSet<_> = whole.sessions.iter().map(|session| session.id.as_str()).collect();
    assert_eq!(ids.len(), SESSIONS as usize, "each once");

    let mut seen = BTreeSet::new();
    let mut query = "?limit=30000&backend=b2".to_owned();
    loop {
        let page = page(&core, &query);
        assert!(page.sessions.len() <= 30_000);
        seen.extend(page.sessions.into_iter().map(|session| session.id));
        let Some(next) = page.next else { break };
        query = format!("?limit=10000&backend=b2&after={next}");
    }
    assert_eq!(seen.len(), SESSIONS as usize / 4);
    let few = page(&core, "?client=10.0.1.0/30").sessions;
    let clients: Vec<_> = few.iter().map(|session| session.client.to_string()).collect();
    assert_eq!(clients, ["10.0.1.0:7", "10.0.1.1:7", "10.0.1.2:7", "10.0.1.3:7"]);
    assert_eq!(few[0].backend.as_deref(), Some("b1"));
}

#[test]
fn every_row_of_the_tables_is_in_the_metrics_with_its_help() {
    let core = Core::start(|_| {});
    let mut backend = core.connect();
    let register = json!({"cmd": "register", "protocol": "udp", "port": 9, "name": "dns-1"});
    backend.ask(&register);
    let (code, text) = core.get("/metrics");
    assert_eq!(code, 200);
    let rows =
        WorkerCounters::ROWS.len() + BackendCounters::ROWS.len() + ControlCounters::ROWS.len();
    let helped = text.lines().filter(|line| line.starts_with("# HELP lb_")).count();
    assert!(helped > rows, "{helped} of {rows}:\n{text}");
    for table in [WorkerCounters::ROWS, BackendCounters::ROWS, ControlCounters::ROWS] {
        for row in table {
            assert!(text.contains(row.help), "{} is missing", row.name);
        }
    }
    let labels =
        r#"{backend="b1",service="udp",protocol="udp",address="127.0.0.1:9",name="dns-1"}"#;
    assert!(text.contains(&format!("lb_backend_sessions_total{labels} 0\n")), "{text}");
    assert!(text.contains("lb_sessions_active{worker=\"0\"} 0\n"), "{text}");
    assert!(text.contains("lb_control_backends_registered_total 1\n"), "{text}");
    let mut types = HashSet::new();
    for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        assert!(types.insert(line.split(' ').nth(2).unwrap()), "{line} twice");
    }
}

#[test]
fn the_admin_door_explains_what_it_refuses() {
    let core = Core::start(|_| {});
    for (head, code, words) in [
        ("GET /nothing HTTP/1.0\r\n\r\n", 404, "the paths are"),
        ("GET /sessions?limit=0 HTTP/1.0\r\n\r\n", 400, "limit must be"),
        ("PUT /status HTTP/1.0\r\n\r\n", 405, "GET to read"),
        ("GET /status HTTP/1.1\r\nHost: a.example\r\n\r\n", 421, "not to other names"),
    ] {
        let (got, body) = core.request(head);
        assert_eq!(got, code, "{head}");
        assert!(body.contains(words), "{body}");
    }
}

#[test]
fn neither_silent_strangers_nor_stalled_readers_keep_operators_out() {
    // Less than the time a connection may stay silent, and much more than an answer takes.
    const AT_ONCE: Duration = Duration::from_secs(8);
    let core = Core::start(|_| {});
    core.worker.with_shard(|shard| {
        for number in 0..50_000 {
            let client = SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + number), 7));
            shard.open(ServiceId::built_in(Protocol::Tcp), client, Now::read()).unwrap();
        }
    });
    let knock = |words: &str| {
        let mut stranger = TcpStream::connect(core.admin).unwrap();
        stranger.write_all(words.as_bytes()).unwrap();
        stranger
    };
    let list = "GET /sessions?limit=100000 HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for words in ["", "GET /status HTTP/1.1\r\nHost: loc", list] {
        let mut strangers: Vec<_> = (0..80).map(|_| knock(words)).collect();
        let since = Instant::now();
        assert_eq!(core.get("/healthz").0, 200);
        // On a busy machine a list takes a while, and a stalled reader is given two minutes.
        let patience = if words == list { PATIENCE } else { AT_ONCE };
        assert!(since.elapsed() < patience, "{:?} behind {words:?}", since.elapsed());
        // The first stranger has made room.
        strangers[0].set_read_timeout(Some(PATIENCE)).unwrap();
        let gone = strangers[0].read_to_end(&mut Vec::new());
        assert!(!gone.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{words:?}");
    }
    assert!(status(&core).control["admin_connections_shed"] >= 3 * (80 - 64));
}

#[test]
fn it_is_ready_with_a_backend_but_not_while_stopping() {
    let mut core = Core::start(|_| {});
    assert_eq!(core.get("/healthz").0, 200);
    let (code, why) = core.get("/readyz");
    assert_eq!((code, why.as_str()), (503, "no backend is registered\n"));
    let mut backend = core.connect();
    backend.register(Protocol::Udp, 9);
    assert_eq!(core.get("/readyz").0, 200);
    core.worker.metrics.counters.sessions_active.set(1);
    core.ask_to_stop();
    wait_for("the drain", || (core.get("/readyz").0 == 503).then_some(()));
    let shown = status(&core);
    assert_eq!(shown.state, RunState::Draining);
    assert!(shown.stops_in_ms.is_some_and(|ms| ms <= 30_000));
    core.ask_to_stop();
    core.wait_until_stopped();
}

#[test]
fn it_is_not_ready_with_a_sole_backend_that_is_aside() {
    let core = Core::start(|_| {});
    let mut backend = core.connect();
    let (listener, port) = data_port();
    backend.register(Protocol::Tcp, port);
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    assert_eq!(core.get("/readyz").0, 200);
    let id = core.worker.backends()[0].id;
    drop(listener);
    core.worker.report(Report::ConnectFailed { backend: id, errno: nix::libc::ECONNREFUSED });
    core.worker.urgent.notify_one();
    let why = wait_for("a sole backend to be aside", || {
        let (code, why) = core.get("/readyz");
        (code == 503).then_some(why)
    });
    assert_eq!(why, "every backend is set aside: its port refused a connection\n");
    let other = data_port();
    backend.register(Protocol::Api, other.1);
    wait_for("another service to serve", || (core.get("/readyz").0 == 200).then_some(()));
}

#[test]
fn a_hanging_worker_is_noticed() {
    let core = Core::start(|_| {});
    assert_eq!(core.get("/healthz").0, 200);
    core.worker.hang();
    wait_for("the alarm", || (core.get("/healthz").0 == 503).then_some(()));
}

#[test]
fn the_page_is_sent_with_a_policy_that_keeps_a_browser_to_it() {
    let core = Core::start(|_| {});
    let (code, body) = core.get("/");
    assert_eq!(code, 200);
    assert!(body.starts_with("<!doctype html>") && body.trim_end().ends_with("</html>"));
    let head = core.head("GET / HTTP/1.0\r\n\r\n").to_lowercase();
    for line in [
        "content-type: text/html; charset=utf-8",
        "content-security-policy: default-src 'none'; script-src 'sha256-",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
    ] {
        assert!(head.contains(line), "{line} is not in\n{head}");
    }
}
