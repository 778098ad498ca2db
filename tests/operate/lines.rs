//! The log: what its lines contain, and how few of them strangers can cause.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{Balancer, asked, private};
use crate::wait::wait_for;

/// The line about the request with this status.
fn request_line(balancer: &Balancer, status: u16) -> serde_json::Value {
    let line = balancer.wait_for_log(&format!(r#""status":{status}"#));
    serde_json::from_str(&line).expect(&line)
}

#[test]
fn what_is_a_number_is_one_in_the_lines_for_machines() {
    let balancer = Balancer::start_on_loopback("log.format = \"json\"", |_| {});
    balancer.wait_until_told("READY=1");
    let door = balancer.json_door("api");
    wait_for("a request to be served", || {
        let answer = asked(door, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        answer.starts_with("HTTP/1.1 200").then_some(())
    });
    let line = request_line(&balancer, 200);
    for time in ["wait_ms", "connect_ms", "first_byte_ms", "total_ms"] {
        assert!(line[time].is_f64(), "{time} in {line}");
    }
    for count in ["bytes_up", "bytes_down", "retries"] {
        assert!(line[count].is_u64(), "{count} in {line}");
    }
    asked(door, b"GET / HTTP/9.9\r\nHost: x\r\n\r\n");
    let refused = request_line(&balancer, 505);
    assert!(refused["connect_ms"].is_null() && refused["total_ms"].is_f64(), "{refused}");
    // What the log calls a number, or a length of time, is never written as text.
    let log = balancer.log.lock().unwrap();
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        for (name, value) in line.as_object().unwrap() {
            let number = value.as_str().is_some_and(|text| text.parse::<f64>().is_ok());
            assert!(!number && (!name.ends_with("_ms") || value.is_number()), "{name} in {line}");
        }
    }
}

#[test]
fn the_line_about_a_refused_request_names_it() {
    let balancer = Balancer::start_on_loopback("log.format = \"json\"\napi.head_ms = 100", |_| {});
    balancer.wait_until_told("READY=1");
    let door = balancer.json_door("api");
    let long = format!("Host: x\r\nA: {}\r\n\r\n", "v".repeat(9000));
    for (rest, status) in [("Host: a/b\r\n\r\n", 400), (long.as_str(), 431), ("Host: x\r\n", 408)] {
        let request = format!("PUT /which/one HTTP/1.1\r\n{rest}");
        let answer = asked(door, request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        let line = request_line(&balancer, status);
        assert_eq!((&line["method"], &line["path"]), (&"PUT".into(), &"/which/one".into()));
    }
}

#[test]
fn the_last_line_says_that_it_has_stopped_and_changes_name_ids_as_shown() {
    let socket = std::env::temp_dir().join(format!("lb-operate-{}-lines.sock", std::process::id()));
    let settings = format!("admin.socket = {socket:?}");
    let mut balancer = Balancer::start_on_loopback(&settings, |_| {});
    balancer.wait_until_told("READY=1");
    let id = wait_for("a backend", || {
        balancer.status()["backends"][0]["id"].as_str().map(str::to_owned)
    });
    let mut door = UnixStream::connect(&socket).unwrap();
    let path = format!("/backends/{id}/drain?deadline_ms=1");
    write!(door, "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let line = balancer.wait_for_log("changed by an operator");
    let wanted = format!("change=\"drain\" backend={id} deadline_ms=1 sessions=0");
    assert!(line.contains(&wanted) && line.contains(" by=\"uid "), "{line}");
    let _ = fs::remove_file(&socket);
    balancer.signal(Signal::SIGTERM);
    assert_eq!(balancer.wait_for_exit(), Some(0));
    let last = wait_for("the last line", || {
        let log = balancer.log.lock().unwrap();
        log.lines().last().filter(|line| line.ends_with(" stopped")).map(str::to_owned)
    });
    assert!(last.contains(" INFO "), "{last}");
    let log = balancer.log.lock().unwrap();
    assert!(!log.contains(" hello "), "nobody watches: {log}");
}

#[test]
fn the_line_about_a_request_names_its_service_its_host_and_its_ids() {
    let balancer = Balancer::start_on_loopback(
        "log.format = \"json\"\napi.request_id = true\napi.trusted = [\"127.0.0.0/8\"]\n\
         [service.shop]\nprotocol = \"api\"\nhosts = [\"shop.example\"]\n\
         [service.closed]\nprotocol = \"api\"\nhosts = [\"closed.example\"]\nmaintenance = true\n\
         [service.old]\nprotocol = \"api\"\nhosts = [\"old.example\"]\nfallback = \"shop\"\n\
         [service.deep]\nprotocol = \"api\"\nhosts = [\"deep.example\"]\npaths = [\"/deep\"]",
        |_| {},
    );
    balancer.wait_until_told("READY=1");
    let door = balancer.json_door("api");
    for (id, host, status, service, asked_for) in [
        ("at-shop", "shop.example", 503, Some("shop"), None),
        ("at-closed", "closed.example", 503, Some("closed"), None),
        ("at-old", "old.example:80", 503, Some("shop"), Some("old")),
        ("at-deep", "deep.example", 404, None, None),
    ] {
        let request = format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nX-Request-Id: {id}\r\nConnection: close\r\n\
             Traceparent: 00-000000000000000000000000000000ab-00000000000000cd-00\r\n\r\n"
        );
        let answer = asked(door, request.as_bytes());
        assert!(answer.contains(&format!("X-Request-Id: {id}\r\n")), "{answer}");
        let line = balancer.wait_for_log(&format!(r#""request_id":"{id}""#));
        let line: serde_json::Value = serde_json::from_str(&line).expect(&line);
        assert_eq!((&line["host"], &line["status"]), (&host.into(), &status.into()));
        assert_eq!(line["service"].as_str(), service, "{line}");
        assert_eq!(line["asked"].as_str(), asked_for, "{line}");
        assert_eq!(line["trace_id"], "000000000000000000000000000000ab");
    }
}

impl Balancer {
    /// How many lines of the log contain these words; none may be longer than a kilobyte.
    fn lines(&self, words: &str) -> usize {
        let log = self.log.lock().unwrap();
        let lines = log.lines().filter(|line| line.contains(words));
        lines.inspect(|line| assert!(line.len() < 1024, "{} bytes", line.len())).count()
    }
}

/// Repeats something for at least a second and a half, and until it is a flood; returns how often.
fn flood(mut act: impl FnMut()) -> usize {
    let since = Instant::now();
    let mut times = 0;
    while since.elapsed() < Duration::from_millis(1500) || times <= 60 {
        act();
        times += 1;
    }
    times
}

#[test]
fn strangers_are_told_of_by_a_bounded_number_of_bounded_lines_and_a_summary() {
    let folder = std::env::temp_dir().join(format!("lb-flood-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let secrets = folder.join("secrets");
    private(&secrets, "the-secret-of-the-control-door");
    let balancer = Balancer::ready(&format!("control.secret_file = {secrets:?}"));
    drop(balancer.user());
    let began = Instant::now();
    let (control, admin) = (balancer.door("control"), balancer.door("admin"));
    let wrong = br#"{"cmd":"auth","id":"web-1-web-1-web-1-web-1-web-1-web-1","mac":"00"}"#;
    let proofs = flood(|| {
        asked(control, wrong);
    });
    let path = "A".repeat(30_000);
    let post = format!("POST /{path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    let changes = flood(|| {
        asked(admin, post.as_bytes());
    });
    let refused = balancer.wait_for_log("a change was refused");
    assert!(refused.contains(r#" method="POST" path="/AAA"#), "{refused}");
    let summary = balancer.wait_for_log("lines were held back");
    assert!(summary.contains("WARN") && summary.contains("proofs="), "{summary}");
    // This line comes after the floods.
    balancer.signal(Signal::SIGHUP);
    balancer.wait_for_log("reloaded");
    let seconds = began.elapsed().as_secs() as usize + 1;
    for (words, burst, per_second) in [
        ("a host does not know the secret", 5, 1),
        ("a change was refused", 5, 1),
        ("backend refused", 10, 2),
        ("backend connected", 10, 2),
        ("backend disconnected", 10, 2),
    ] {
        let lines = balancer.lines(words);
        assert!((1..=burst + per_second * seconds).contains(&lines), "{lines} of {words:?}");
    }
    let counted = balancer.status()["control"]["lines_held_back"].as_u64().unwrap();
    assert!(counted as usize >= (proofs + changes) / 2, "{counted}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn strangers_who_come_and_go_hide_no_backend_that_joins_or_leaves() {
    const CHANGES: usize = 20;
    let balancer = Balancer::ready("");
    drop(balancer.user());
    let (control, users) = (balancer.door("control"), balancer.door("tcp"));
    let mut backend = TcpStream::connect(control).unwrap();
    let mut answers = BufReader::new(backend.try_clone().unwrap());
    let mut ask = |cmd: &str, port: usize| {
        writeln!(backend, r#"{{"cmd":"{cmd}","protocol":"udp","port":{port}}}"#).unwrap();
        let mut line = String::new();
        while !line.contains(&format!(r#""cmd":"{cmd}""#)) {
            line.clear();
            assert!(answers.read_line(&mut line).unwrap() > 0);
        }
        assert!(line.contains("successful"), "{line}");
    };
    for port in 1..=CHANGES {
        for _ in 0..100 {
            drop(TcpStream::connect(control).unwrap());
            drop(TcpStream::connect(users).unwrap());
        }
        ask("register", port);
        ask("unregister", port);
    }
    for port in 1..=CHANGES {
        balancer.wait_for_log(&format!("backend registered backend=b{} protocol=udp", port + 1));
        balancer.wait_for_log(&format!("backend left backend=b{} protocol=udp", port + 1));
    }
    assert!(balancer.lines("backend connected") < 100);
}

#[test]
fn a_refused_registration_is_in_the_log_with_its_reason() {
    let balancer = Balancer::ready("");
    let mut backend = TcpStream::connect(balancer.door("control")).unwrap();
    // The door that users connect to: a backend there would send them round in a circle.
    let port = balancer.door("tcp").port();
    write!(backend, r#"{{"cmd":"register","protocol":"tcp","port":{port}}}"#).unwrap();
    let line = balancer.wait_for_log("backend refused");
    assert!(line.contains("WARN") && line.contains("cmd=register"), "{line}");
    assert!(line.contains("is a door of the balancer itself"), "{line}");
}
