//! The control core as backends use it: over sockets, with a stand-in for the worker behind it. Owns the
//! laws of joining and leaving, of proofs and hellos, and of refusals.

mod admin;
mod alerts;
mod asking;
mod burst;
mod calls;
mod checks;
mod harness;
mod named;
mod page;
#[path = "../common/process.rs"]
mod process;
mod proof;
mod reached;
mod rights;
mod services;
mod shown;
mod verbs;
#[path = "../common/wait.rs"]
mod wait;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use harness::{Backend, Core, assert_failed, data_port};
use lb::cluster::{OnBackendLoss, Protocol, Standing};
use lb::metrics::BACKENDS_MAX;
use lb::session::EndReason;
use lb::worker::link::{Order, Report};
use serde_json::json;
use wait::{PATIENCE, wait_for};

#[test]
fn a_backend_joins_only_once_its_port_listens() {
    let core = Core::start(|_| {});
    let mut backend = core.connect();
    let (listener, port) = data_port();
    drop(listener);
    assert_failed(&backend.register(Protocol::Tcp, port), "cannot connect");
    assert!(core.worker.backends().is_empty());

    let _listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let answer = backend.register(Protocol::Tcp, port);
    assert_eq!(answer["ack"], "successful", "{answer}");
    assert_eq!(answer["cmd"], "register");
    assert_eq!(answer["address"], format!("127.0.0.1:{port}"));
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    let again = backend.register(Protocol::Tcp, port);
    assert_eq!(again, answer, "registering again changes nothing");
}

#[test]
fn one_connection_registers_several_and_any_segmentation_will_do() {
    let core = Core::start(|_| {});
    let (_first, first) = data_port();
    let (_second, second) = data_port();
    let mut backend = core.connect();
    let words = format!(
        "{{\"cmd\":\"register\",\"protocol\":\"tcp\",\"port\":{first},\"weight\":2}}\
         {{\"cmd\":\"register\",\n \"protocol\":\"api\",\"port\":{second},\"name\":\"web-1\"}}\n\
         {{\"cmd\":\"register\",\"protocol\":\"udp\",\"port\":9}}{{\"cmd\":\"list\"}}"
    );
    for byte in words.as_bytes() {
        backend.stream.write_all(&[*byte]).unwrap();
    }
    for cmd in ["register", "register", "register", "list"] {
        let answer = backend.hear().unwrap();
        assert_eq!((&answer["ack"], &answer["cmd"]), (&json!("successful"), &json!(cmd)));
        if cmd == "list" {
            let names: Vec<_> = answer["backends"].as_array().unwrap().iter().collect();
            assert_eq!(names.len(), 3);
            assert_eq!(names[1]["name"], "web-1");
            assert_eq!((&names[1]["own"], &names[1]["state"]), (&json!(true), &json!("serving")));
        }
    }
    core.worker.wait_for_rotation(Protocol::Udp, &[9]);
}

#[test]
fn a_second_owner_is_refused_until_the_first_has_gone() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut first = core.connect();
    let mut second = core.connect();
    first.register(Protocol::Tcp, port);
    assert_failed(&second.register(Protocol::Tcp, port), "over another connection");
    for cmd in ["unregister", "drain"] {
        let answer = second.ask(&json!({"cmd": cmd, "protocol": "tcp", "port": port}));
        assert_failed(&answer, "not registered over this connection");
    }
    drop(first);
    core.worker.wait_for_rotation(Protocol::Tcp, &[]);
    assert_eq!(second.register(Protocol::Tcp, port)["ack"], "successful");
}

#[test]
fn a_backend_that_unregisters_gets_no_new_sessions_and_keeps_the_old() {
    let core = Core::start(|config| config.balance.on_backend_loss = OnBackendLoss::Close);
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    backend.register(Protocol::Tcp, port);
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    let slot = core.worker.backends()[0].slot;
    core.worker.metrics.backends[usize::from(slot)].active.set(2);
    let answer = backend.ask(&json!({"cmd": "unregister", "protocol": "tcp", "port": port}));
    assert_eq!((&answer["ack"], &answer["left"]), (&json!("successful"), &json!(2)));
    core.worker.wait_for_rotation(Protocol::Tcp, &[]);
    assert_eq!(core.worker.orders(), [], "its sessions are left alone");
}

#[test]
fn a_drain_tells_what_is_left_and_when_it_is_over() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    backend.register(Protocol::Tcp, port);
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    let active = usize::from(core.worker.backends()[0].slot);
    core.worker.metrics.backends[active].active.set(2);

    let drain = json!({"cmd": "drain", "protocol": "tcp", "port": port, "deadline_ms": 60_000});
    let answer = backend.ask(&drain);
    assert_eq!((&answer["ack"], &answer["left"]), (&json!("successful"), &json!(2)), "{answer}");
    core.worker.wait_for_rotation(Protocol::Tcp, &[]);
    assert_eq!(core.worker.backends()[0].standing, Standing::Draining);
    let event = backend.hear().unwrap();
    assert_eq!((&event["event"], &event["left"]), (&json!("draining"), &json!(2)));
    core.worker.metrics.backends[active].active.set(0);
    wait_for("drained", || (backend.hear()?["event"] == "drained").then_some(()));
    wait_for("it to leave", || core.worker.backends().is_empty().then_some(()));
}

#[test]
fn a_drain_ends_at_its_deadline_what_is_left() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    backend.register(Protocol::Tcp, port);
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    let registered = core.worker.backends()[0].clone();
    let active = &core.worker.metrics.backends[usize::from(registered.slot)].active;
    active.set(1);
    backend.ask(&json!({"cmd": "drain", "protocol": "tcp", "port": port, "deadline_ms": 100}));
    let reason = EndReason::BackendLeft;
    core.worker.wait_for_order(Order::EndBackend { backend: registered.id, reason });
    active.set(0);
    assert_eq!(backend.hear().unwrap()["event"], "drained");
}

#[test]
fn a_drain_keeps_its_deadline_when_the_backend_hangs_up() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    backend.register(Protocol::Tcp, port);
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    let id = core.worker.backends()[0].id;
    core.worker.metrics.backends[0].active.set(1);
    backend.ask(&json!({"cmd": "drain", "protocol": "tcp", "port": port, "deadline_ms": 300}));
    drop(backend);
    core.worker.wait_for_order(Order::EndBackend { backend: id, reason: EndReason::BackendLeft });
}

#[test]
fn registering_again_ends_a_drain() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    backend.register(Protocol::Tcp, port);
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    core.worker.metrics.backends[0].active.set(1);
    backend.ask(&json!({"cmd": "drain", "protocol": "tcp", "port": port}));
    core.worker.wait_for_rotation(Protocol::Tcp, &[]);
    assert_eq!(backend.register(Protocol::Tcp, port)["ack"], "successful");
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
}

#[test]
fn a_lost_connection_takes_its_backends_at_once_and_their_sessions_if_so_configured() {
    for on_loss in [OnBackendLoss::Keep, OnBackendLoss::Close] {
        let core = Core::start(|config| config.balance.on_backend_loss = on_loss);
        let (_listener, port) = data_port();
        let mut backend = core.connect();
        backend.register(Protocol::Tcp, port);
        core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
        backend.register(Protocol::Udp, 9);
        core.worker.wait_for_rotation(Protocol::Udp, &[9]);
        let id = core.worker.backends()[0].id;
        core.worker.metrics.backends[0].active.set(1);
        core.worker.metrics.backends[1].active.set(1);
        drop(backend);
        core.worker.wait_for_rotation(Protocol::Tcp, &[]);
        if on_loss == OnBackendLoss::Close {
            let reason = EndReason::BackendLeft;
            core.worker.wait_for_order(Order::EndBackend { backend: id, reason });
            let all = core.worker.orders();
            assert!(
                all.iter().all(|order| *order == all[0]),
                "UDP sessions are not for us: {all:?}"
            );
        } else {
            assert_eq!(core.worker.orders(), []);
        }
    }
}

#[test]
fn a_backend_that_answers_hello_stays_and_one_that_does_not_leaves() {
    let core = Core::start(|config| {
        config.health.interval = Duration::from_millis(40);
        config.health.timeout = Some(Duration::from_millis(400));
        config.health.misses = 2;
    });
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    backend.say(&json!({"cmd": "register", "protocol": "tcp", "port": port}).to_string());
    for turn in 0..12 {
        let heard = backend.hear().expect("it stays as long as it answers");
        if heard["cmd"] == "hello" {
            backend.say(["{\"ack\":\"hello\"}", "{\"cmd\":\"hello\"}\n"][turn % 2]);
        }
    }
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    let silent_since = Instant::now();
    let last = std::iter::from_fn(|| backend.hear()).last().unwrap();
    assert_failed(&last, "hello was not answered");
    assert!(silent_since.elapsed() > Duration::from_millis(400), "one miss is not enough");
    core.worker.wait_for_rotation(Protocol::Tcp, &[]);
}

#[test]
fn every_fault_gets_a_sentence_and_the_connection_goes_on() {
    let core = Core::start(|_| {});
    let mut backend = core.connect();
    let deep = format!("{}1{}\n", "{\"a\":[".repeat(40), "]}".repeat(40));
    let cases = [
        (r#"{"cmd":"register","protocol":"tcp","port":0}"#, "from 1 to 65535"),
        (r#"{"cmd":"register","protocol":"tcp","port":70000}"#, "from 1 to 65535"),
        (r#"{"cmd":"register","protocol":"icmp","port":7}"#, "unknown protocol"),
        (r#"{"cmd":"dance"}"#, "unknown cmd"),
        (r#"{"cmd":"list","cmd":"list"}"#, "twice"),
        ("[1, 2]\n", "JSON object"),
        ("{\u{0}\u{1}\u{2}\n", "control byte"),
        (deep.as_str(), "deeper"),
        (r#"{"cmd":"auth","id":"x","mac":"00"}"#, "no proof is asked for"),
    ];
    for (words, expected) in cases {
        backend.say(words);
        assert_failed(&backend.hear().expect(words), expected);
    }
    assert_eq!(backend.ask(&json!({"cmd": "list"}))["ack"], "successful");
}

#[test]
fn nothing_in_the_body_of_another_protocols_request_is_carried_out() {
    let core = Core::start(|_| {});
    let body = r#"{"cmd":"register","protocol":"udp","port":9}"#;
    for opening in [
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n\r\n",
        "\r\n\r\nPUT / HTTP/1.1\r\n\r\n\r\n",
        "EHLO x\r\n",
        "\u{16}\u{3}\u{1}\n",
        "\u{0}\n",
    ] {
        let mut stranger = core.connect();
        let _ = stranger.stream.write_all(format!("{opening}{body}\n").as_bytes());
        let told: Vec<_> = std::iter::from_fn(|| stranger.hear()).collect();
        assert_eq!(told.len(), 1, "{opening:?}: {told:?}");
        assert_failed(&told[0], "JSON object");
    }
    let mut backend = core.connect();
    backend.say("\u{feff}");
    assert_eq!(backend.ask(&json!({"cmd": "list"}))["backends"], json!([]), "and a mark is none");
    let answer = backend.ask(&json!({"cmd": "register", "protocol": "udp", "port": 9.0}));
    assert_eq!(answer["ack"], "successful", "{answer}");
}

#[test]
fn a_backend_cannot_point_users_back_at_the_balancer() {
    let core = Core::start(|config| {
        config.listen.control = Some("0.0.0.0:0".parse().unwrap());
        config.control.allow = vec!["0.0.0.0/0".parse().unwrap()];
        config.listen.tcp = Some("0.0.0.0:81".parse().unwrap());
        config.listen.udp = Some("[::]:82".parse().unwrap());
        config.listen.api = Some("127.0.0.1:83".parse().unwrap());
    });
    let doors = [core.control.port(), core.admin.port(), 81, 83].map(|it| (Protocol::Tcp, it));
    let hosts = addresses();
    assert!(hosts.len() > 1);
    for host in hosts {
        let mut backend = core.connect_from(host);
        let everywhere = doors.into_iter().filter(|(_, port)| {
            // The doors of operators and of API users are on loopback only.
            host.is_loopback() || ![core.admin.port(), 83].contains(port)
        });
        for (protocol, port) in everywhere.chain([(Protocol::Api, 81), (Protocol::Udp, 82)]) {
            let answer = backend.register(protocol, port);
            assert_failed(&answer, "a door of the balancer itself");
        }
        let answer = backend.register(Protocol::Udp, 81);
        assert_eq!(answer["ack"], "successful", "a TCP door is none for datagrams: {answer}");
    }
}

/// The IPv4 addresses of this host, of which loopback has more than it shows.
fn addresses() -> Vec<std::net::IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().unwrap();
    let shown = interfaces.filter_map(|it| it.address?.as_sockaddr_in().map(|it| it.ip().into()));
    shown.chain(["127.0.0.2".parse().unwrap()]).collect()
}

#[test]
fn megabytes_without_a_newline_end_that_connection_only() {
    let core = Core::start(|_| {});
    let mut other = core.connect();
    for byte in [b'x', b'{', b' ', b'"'] {
        let mut flood = core.connect();
        let mut written = Ok(());
        for _ in 0..160 {
            written = written.and_then(|()| flood.stream.write_all(&[byte; 64 * 1024]));
        }
        if byte != b' ' {
            let told = flood.hear();
            let last = std::iter::from_fn(|| flood.hear()).last().or(told);
            if let Some(last) = last {
                assert_eq!(last["ack"], "failed");
            }
        }
        assert_eq!(other.ask(&json!({"cmd": "list"}))["ack"], "successful");
    }
}

#[test]
fn a_peer_that_never_reads_does_not_grow_and_disturbs_nobody() {
    let core = Core::start(|config| {
        config.health.interval = Duration::from_millis(300);
        config.health.timeout = Some(Duration::from_millis(300));
        config.health.misses = 2;
    });
    let mut deaf = core.connect();
    deaf.stream.set_nonblocking(true).unwrap();
    let words = b"{\"cmd\":\"list\"}".repeat(1000);
    let mut sent = 0;
    while let Ok(count) = deaf.stream.write(&words) {
        sent += count;
        assert!(sent < 64 << 20, "the balancer goes on reading what it cannot answer");
        let mut other = core.connect();
        other.say("{\"cmd\":\"list\"}");
        assert_eq!(other.hear().unwrap()["ack"], "successful");
    }
    wait_for("the deaf one to be given up", || (open_sockets(&core) == 0).then_some(()));
}

#[test]
fn a_peer_that_stays_after_its_connection_was_given_up_holds_nothing() {
    let core = Core::start(|_| {});
    let mut staying = core.connect();
    staying.say(&"[".repeat(10_000));
    assert_failed(&staying.hear().unwrap(), "at most 4096 bytes");
    assert_eq!(staying.hear(), None);
    wait_for("its socket to be closed", || (open_sockets(&core) == 0).then_some(()));
}

#[test]
fn connections_beyond_the_limit_are_told_so_and_places_come_free_again() {
    let core = Core::start(|config| config.limits.control_connections = 50);
    let mut idle: Vec<Backend> = (0..50).map(|_| core.connect()).collect();
    assert_eq!(idle[49].ask(&json!({"cmd": "list"}))["ack"], "successful");
    for _ in 0..100 {
        let mut beyond = core.connect();
        assert_failed(&beyond.hear().unwrap(), "too many control connections");
        assert_eq!(beyond.hear(), None);
    }
    idle.truncate(49);
    wait_for("the place to come free", || {
        let mut next = core.connect();
        let _ = next.stream.write_all(b"{\"cmd\":\"list\"}");
        (next.hear()?["ack"] == "successful").then_some(())
    });
}

#[test]
fn idle_connections_of_one_host_make_room_for_another() {
    let core = Core::start(|config| config.limits.control_connections = 20);
    let mut idle: Vec<Backend> = (0..20).map(|_| core.connect()).collect();
    for (port, backend) in idle.iter_mut().take(10).enumerate() {
        backend.register(Protocol::Udp, 9000 + port as u16);
    }
    assert_eq!(idle[19].ask(&json!({"cmd": "list"}))["ack"], "successful");
    assert_failed(&core.connect().hear().unwrap(), "too many control connections");
    let mut other = core.connect_from("127.0.0.9".parse().unwrap());
    assert_eq!(other.register(Protocol::Udp, 9000)["ack"], "successful");
    assert_eq!(idle[10].hear(), None, "the oldest that had registered nothing");
    wait_for("all of them", || (core.worker.backends().len() == 11).then_some(()));
}

#[test]
fn a_stranger_is_turned_away_without_a_word() {
    let core = Core::start(|config| config.control.allow = vec!["127.0.0.2/32".parse().unwrap()]);
    let mut stranger = core.connect();
    let _ = stranger.stream.write_all(b"{\"cmd\":\"list\"}");
    assert_eq!(stranger.hear(), None);
    let mut known = core.connect_from("127.0.0.2".parse().unwrap());
    assert_eq!(known.ask(&json!({"cmd": "list"}))["ack"], "successful");
}

#[test]
fn a_backend_is_reached_at_the_address_that_it_comes_from() {
    let core = Core::start(|_| {});
    let listener = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut backend = core.connect_from("127.0.0.3".parse().unwrap());
    let answer = backend.register(Protocol::Tcp, port);
    assert_eq!(answer["address"], format!("127.0.0.3:{port}"), "{answer}");
}

#[test]
fn over_a_door_for_both_families_a_backend_still_has_its_plain_address() {
    let core = Core::start(|config| {
        config.listen.control = Some("[::]:0".parse().unwrap());
        config.control.allow = vec!["127.0.0.0/8".parse().unwrap()];
    });
    let answer = core.connect().register(Protocol::Udp, 9);
    assert_eq!(answer["address"], "127.0.0.1:9", "{answer}");
}

#[test]
fn a_backend_that_joins_and_leaves_in_a_loop_is_slowed_down_and_keeps_its_place() {
    const PAIR: &str = r#"{"cmd":"register","protocol":"udp","port":9}{"cmd":"unregister","protocol":"udp","port":9}"#;
    let core = Core::start(|_| {});
    let mut backend = core.connect();
    let mut change = |pairs: usize| {
        let since = Instant::now();
        backend.say(&PAIR.repeat(pairs));
        let (mut answers, mut hellos) = (0, 0);
        while answers < 2 * pairs {
            let heard = backend.hear().expect("it is slowed down, not thrown out");
            let is_hello = heard["cmd"] == "hello";
            (answers, hellos) = (answers + usize::from(!is_hello), hellos + usize::from(is_hello));
        }
        (0..hellos).for_each(|_| backend.say("{\"ack\":\"hello\"}"));
        since.elapsed()
    };
    (0..BACKENDS_MAX / 200).for_each(|_| assert!(change(100) < PATIENCE));
    // From then on it earns a change every 10 ms, and may have earned some by now.
    wait_for("fifty pairs to take a second, or nearly", || {
        (change(50) > Duration::from_millis(800)).then_some(())
    });
}

#[test]
fn a_backend_whose_port_fails_is_set_aside_at_once_and_comes_back() {
    let core = Core::start(|_| {});
    let (broken, port) = data_port();
    let (_other, other_port) = data_port();
    let mut backend = core.connect();
    backend.register(Protocol::Tcp, port);
    backend.register(Protocol::Tcp, other_port);
    core.worker.wait_for_rotation(Protocol::Tcp, &[port, other_port]);
    let id = core.worker.backends()[0].id;
    drop(broken);
    core.worker.report(Report::ConnectFailed { backend: id, errno: nix::libc::ECONNREFUSED });
    core.worker.urgent.notify_one();
    core.worker.wait_for_rotation(Protocol::Tcp, &[other_port]);
    let _mended = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    core.worker.wait_for_rotation(Protocol::Tcp, &[port, other_port]);
}

#[test]
fn asked_to_stop_it_waits_for_the_sessions() {
    let mut core = Core::start(|_| {});
    core.worker.metrics.counters.sessions_active.set(1);
    core.ask_to_stop();
    core.worker.wait_for_order(Order::Drain);
    assert_eq!(core.worker.orders(), [Order::Drain]);
    core.worker.metrics.counters.sessions_active.set(0);
    core.worker.wait_for_order(Order::Stop);
    core.wait_until_stopped();
}

#[test]
fn asked_to_stop_it_waits_no_longer_than_the_deadline_and_twice_not_at_all() {
    for (drain, asks) in [(Duration::from_millis(150), 1), (Duration::from_secs(3600), 2)] {
        let mut core = Core::start(|config| config.balance.drain = drain);
        core.worker.metrics.counters.sessions_active.set(1);
        (0..asks).for_each(|_| core.ask_to_stop());
        core.worker.wait_for_order(Order::Stop);
        core.wait_until_stopped();
    }
}

#[test]
fn a_control_core_that_cannot_start_says_why_and_stops_the_workers() {
    let missing = std::env::temp_dir().join("lb-no-such-secret");
    let mut core = Core::start(|config| config.control.secret_file = Some(missing));
    let error = core.wait_for_outcome().unwrap_err();
    assert!(error.to_string().contains("lb-no-such-secret"), "{error}");
    core.worker.wait_for_order(Order::Stop);
}

#[test]
fn a_connection_that_ends_in_the_middle_leaves_nothing_behind() {
    let core = Core::start(|_| {});
    for round in 0..200 {
        let mut backend = core.connect();
        let words = r#"{"cmd":"register","protocol":"udp","port":9}"#;
        backend.say(&words[..round % (words.len() + 1)]);
        if round % 2 == 0 {
            backend.stream.set_nonblocking(true).unwrap();
            let _ = backend.stream.read(&mut [0; 16]);
        }
    }
    let mut backend = core.connect();
    wait_for("every other socket to be closed", || (open_sockets(&core) == 1).then_some(()));
    wait_for("the port to be free", || {
        (backend.register(Protocol::Udp, 9)["ack"] == "successful").then_some(())
    });
}

/// Sockets on the balancer's side of its control port that it still holds, the listener aside. One
/// that the kernel alone brings to its end belongs to no file any more.
fn open_sockets(core: &Core) -> usize {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let port = format!(":{:04X}", core.control.port());
    let is_held = |row: &[&str]| row[3] != "0A" && row[9] != "0";
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|row| row[1].ends_with(&port) && is_held(row))
        .count()
}
