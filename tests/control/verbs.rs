//! Changes over the admin door, as an operator makes them. Owns the laws of who may make them, and what
//! they do.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use lb::base::time::Now;
use lb::cluster::{Protocol, ServiceId};
use lb::control::status::Changed;
use lb::session::EndReason;
use lb::worker::link::Order;

use crate::harness::Core;
use crate::wait::{PATIENCE, wait_for};

const TOKEN: &str = "a-token-of-twenty-letters";

/// A path of its own for each test.
fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("lb-verbs-{}-{name}", std::process::id()))
}

fn core_with_token(name: &str) -> Core {
    let file = path(name);
    std::fs::write(&file, TOKEN).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let core = Core::start(|config| config.admin.token_file = Some(file.clone()));
    // The file has been read once the door answers.
    core.get("/healthz");
    std::fs::remove_file(file).unwrap();
    core
}

fn post(core: &Core, path: &str, headers: &str) -> (u16, String) {
    let host = core.admin;
    core.request(&format!("POST {path} HTTP/1.0\r\nHost: {host}\r\n{headers}\r\n"))
}

fn authorised() -> String {
    format!("Authorization: Bearer {TOKEN}\r\n")
}

#[test]
fn a_drain_takes_a_backend_out_and_tells_it() {
    let core = core_with_token("drain");
    let mut backend = core.connect();
    backend.register(Protocol::Udp, 9);
    core.worker.wait_for_rotation(Protocol::Udp, &[9]);
    let slot = usize::from(core.worker.backends()[0].slot);
    core.worker.metrics.backends[slot].active.set(4);
    let (code, body) = post(&core, "/backends/b1/drain?deadline_ms=60000", &authorised());
    assert_eq!(code, 202, "{body}");
    let changed: Changed = serde_json::from_str(&body).unwrap();
    assert_eq!(changed.sessions, 4);
    core.worker.wait_for_rotation(Protocol::Udp, &[]);
    core.worker.metrics.backends[slot].active.set(0);
    wait_for("word that it has drained", || {
        (backend.hear().expect("a message")["event"] == "drained").then_some(())
    });
    assert_eq!(post(&core, "/backends/b2/drain", &authorised()).0, 404);
    assert!(core.get("/metrics").1.contains("lb_control_admin_changes_total 1\n"));
    assert!(core.get("/metrics").1.contains("lb_control_admin_refused_total 1\n"));
}

#[test]
fn a_weight_changes_the_rotation() {
    let core = core_with_token("weight");
    let mut backend = core.connect();
    backend.register(Protocol::Udp, 9);
    backend.register(Protocol::Udp, 10);
    core.worker.wait_for_rotation(Protocol::Udp, &[9, 10]);
    assert_eq!(post(&core, "/backends/b2/weight?to=3", &authorised()).0, 202);
    core.worker.wait_for_rotation(Protocol::Udp, &[10, 9, 10, 10]);
}

#[test]
fn a_session_is_ended_by_its_own_worker_if_it_still_runs() {
    let core = core_with_token("session");
    let place = core.worker.with_shard(|shard| {
        shard
            .open(ServiceId::built_in(Protocol::Tcp), "192.0.2.1:7".parse().unwrap(), Now::read())
            .unwrap()
    });
    let id = core.worker.with_shard(|shard| shard.id(&place));
    let (code, body) = post(&core, &format!("/sessions/{id}/end"), &authorised());
    assert_eq!(code, 202, "{body}");
    core.worker.wait_for_order(Order::EndSession { id, reason: EndReason::Operator });
    for gone in ["0-0-99", "0-4000000000-1", "200-0-1"] {
        assert_eq!(post(&core, &format!("/sessions/{gone}/end"), &authorised()).0, 404, "{gone}");
    }
}

#[test]
fn nobody_changes_anything_without_permission() {
    let core = core_with_token("leave");
    let mut backend = core.connect();
    backend.register(Protocol::Udp, 9);
    let wrong = "Authorization: Bearer a-token-of-twenty-lettets\r\n".to_owned();
    let foreign = format!("{}Origin: http://evil.example\r\n", authorised());
    for (headers, code) in [("", 401), (wrong.as_str(), 401), (foreign.as_str(), 403)] {
        assert_eq!(post(&core, "/backends/b1/drain", headers).0, code, "{headers}");
    }
    let named =
        format!("POST /backends/b1/drain HTTP/1.0\r\nHost: a.example\r\n{}\r\n", authorised());
    assert_eq!(core.request(&named).0, 421);
    let (_, body) = core.get("/status");
    assert!(body.contains(r#""state":"serving","turns":1"#), "{body}");
    let shut = Core::start(|_| {});
    let (code, body) = post(&shut, "/backends/b1/drain", &authorised());
    assert_eq!(code, 403);
    assert!(body.contains("set [admin] token_file"), "{body}");
}

#[test]
fn the_unix_socket_needs_no_token_and_replaces_one_left_behind() {
    let socket = path("socket");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let core = Core::start(|config| config.admin.socket = Some(socket.clone()));
    let mut backend = core.connect();
    backend.register(Protocol::Udp, 9);
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"POST /backends/b1/drain HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 202"), "{answer}");
    let said = lb::control::socket::open(&socket).unwrap_err();
    assert!(said.contains("another balancer answers on"), "{said}");
    std::fs::remove_file(socket).unwrap();
}
