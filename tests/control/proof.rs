//! Proof of the shared secret: a backend without it is shown nothing, and crowds out nobody.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;

use lb::cluster::Protocol;
use lb::control::auth::mac;
use serde_json::json;

use crate::harness::{Backend, Core, assert_failed, data_port};
use crate::wait::wait_for;

const SECRET: &str = "a secret for this test";

/// A core that asks for the secret, and the file with it, which is removed with it.
fn guarded(name: &str) -> (Core, SecretFile) {
    let path = std::env::temp_dir().join(format!("lb-{name}-{}", std::process::id()));
    std::fs::write(&path, format!("an older secret, still valid\n{SECRET}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let core = Core::start(|config| config.control.secret_file = Some(path.clone()));
    (core, SecretFile(path))
}

struct SecretFile(std::path::PathBuf);

impl Drop for SecretFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn nonce(backend: &mut Backend) -> String {
    let challenge = backend.hear().unwrap();
    assert_eq!((&challenge["cmd"], &challenge["v"]), (&json!("auth"), &json!(1)));
    let nonce = challenge["nonce"].as_str().unwrap().to_owned();
    assert_eq!(nonce.len(), 64);
    nonce
}

fn prove(backend: &mut Backend, id: &str) {
    let nonce = nonce(backend);
    let mac = mac(SECRET.as_bytes(), &nonce, id);
    let answer = backend.ask(&json!({"cmd": "auth", "id": id, "mac": mac}));
    assert_eq!(answer, json!({"ack": "successful", "cmd": "auth"}));
}

#[test]
fn who_knows_the_secret_registers() {
    let (core, _file) = guarded("right");
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    prove(&mut backend, "web-1");
    assert_eq!(backend.register(Protocol::Tcp, port)["ack"], "successful");
    core.worker.wait_for_rotation(Protocol::Tcp, &[port]);
    assert_eq!(core.worker.backends()[0].name.as_deref(), Some("web-1"));
}

#[test]
fn a_wrong_or_repeated_answer_and_anything_else_end_the_connection() {
    let (core, _file) = guarded("wrong");
    let mut right = core.connect();
    let nonce_of_right = nonce(&mut right);
    let right_mac = mac(SECRET.as_bytes(), &nonce_of_right, "web-1");
    let replayed = json!({"cmd": "auth", "id": "web-1", "mac": right_mac}).to_string();
    right.say(&replayed);
    assert_eq!(right.hear().unwrap()["ack"], "successful");
    let cases = [
        (replayed.as_str(), "mac is wrong"),
        (r#"{"cmd":"auth","id":"web-1","mac":"00"}"#, "mac is wrong"),
        (r#"{"cmd":"auth","id":"web-1"}"#, "mac is missing"),
        (r#"{"cmd":"list"}"#, "prove the secret first"),
        ("hello\n", "JSON object"),
    ];
    for (words, expected) in cases {
        let mut backend = core.connect();
        nonce(&mut backend);
        backend.say(words);
        assert_failed(&backend.hear().expect(words), expected);
        assert_eq!(backend.hear(), None, "{words}");
    }
    right.say(&replayed);
    assert_failed(&right.hear().unwrap(), "no proof is asked for");
}

#[test]
fn a_backend_sees_only_what_its_own_identity_registered() {
    let (core, _file) = guarded("list");
    let mut all: Vec<Backend> = (0..3).map(|_| core.connect()).collect();
    for (backend, id) in all.iter_mut().zip(["web", "web", "db"]) {
        prove(backend, id);
    }
    for (port, backend) in all.iter_mut().enumerate() {
        backend.register(Protocol::Udp, 9000 + port as u16);
    }
    for (backend, seen) in all.iter_mut().zip([2, 2, 1]) {
        let list = backend.ask(&json!({"cmd": "list"}));
        assert_eq!(list["backends"].as_array().unwrap().len(), seen, "{list}");
    }
}

#[test]
fn only_so_many_of_one_source_may_be_unproven_at_once() {
    let (core, _file) = guarded("many");
    let mut unproven: Vec<Backend> = (0..32).map(|_| core.connect()).collect();
    unproven.iter_mut().for_each(|backend| drop(nonce(backend)));
    let mut beyond = core.connect();
    let told = beyond.hear().unwrap();
    if told["cmd"] == "auth" {
        // On a slow machine the first one's time is up, and it has made room.
        assert_eq!(unproven[0].hear(), None);
    } else {
        assert_failed(&told, "too many control connections");
    }
    prove(&mut core.connect_from("127.0.0.9".parse().unwrap()), "web-1");
    drop(unproven);
    wait_for("a place", || (core.connect().hear()?["cmd"] == "auth").then_some(()));
}

#[test]
fn strangers_who_say_nothing_keep_nobody_out() {
    let (core, _file) = guarded("silent");
    let source = |number: u8| IpAddr::from([127, 0, 1, number]);
    let mut silent: Vec<Backend> =
        (0..64).map(|place| core.connect_from(source(1 + place / 16))).collect();
    silent.iter_mut().for_each(|backend| drop(nonce(backend)));
    let mut proved: Vec<Backend> = Vec::new();
    for number in 0..8 {
        proved.push(core.connect_from(source(100 + number)));
        prove(proved.last_mut().unwrap(), "web-1");
    }
    assert_eq!(silent[0].hear(), None, "the oldest made room");
    let (_, metrics) = core.get("/metrics");
    assert!(metrics.contains("lb_control_connections_displaced_total 1\n"), "one for all");
    for backend in &mut proved {
        assert_eq!(backend.ask(&json!({"cmd": "list"}))["ack"], "successful");
    }
}
