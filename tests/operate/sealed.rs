//! Backends that are reached by TLS: how they join, are checked, set aside and brought back, and what operators
//! see of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;

use crate::certified::certified;
use crate::harness::Balancer;
use crate::wait::{PATIENCE, wait_for};

/// A backend that sends back what it gets, with a certificate that can be changed.
fn echo(config: &Arc<Mutex<Arc<ServerConfig>>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, config) = (listener.local_addr().unwrap(), Arc::clone(config));
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let config = Arc::clone(&config.lock().unwrap());
            std::thread::spawn(move || {
                let mut sealed =
                    StreamOwned::new(ServerConnection::new(config).unwrap(), connection);
                let mut bytes = [0; 4096];
                while let Ok(count @ 1..) = sealed.read(&mut bytes) {
                    if sealed.write_all(&bytes[..count]).is_err() || sealed.flush().is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A balancer that trusts what is in a file, its folder and that file.
fn balancer(trusted: &str, more: &str) -> (Balancer, PathBuf) {
    let folder = std::env::temp_dir().join(format!("lb-sealed-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let number = std::fs::read_dir(&folder).unwrap().count();
    let ca = folder.join(format!("{number}-{:?}.pem", std::thread::current().id()));
    std::fs::write(&ca, trusted).unwrap();
    let settings = format!(
        "health.interval_ms = 3000000\nbackend_tls.ca = {ca:?}\n\
         [service.red]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n{more}"
    );
    let balancer = Balancer::start_on_loopback(&settings, |_| {});
    balancer.wait_until_told("READY=1");
    (balancer, ca)
}

/// Where users of `red` come in.
fn door(balancer: &Balancer) -> SocketAddr {
    let services = balancer.status()["services"].clone();
    let red = services.as_array().unwrap().iter().find(|it| it["name"] == "red").unwrap().clone();
    red["doors"][0].as_str().unwrap().parse().unwrap()
}

fn of_red(balancer: &Balancer) -> Option<Value> {
    let status = balancer.status();
    status["backends"].as_array()?.iter().find(|it| it["service"] == "red").cloned()
}

/// Whether a user gets back what it says.
fn is_served(door: SocketAddr) -> bool {
    let mut user = TcpStream::connect(door).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut back = [0; 5];
    user.write_all(b"hello").is_ok() && user.read_exact(&mut back).is_ok() && &back == b"hello"
}

/// A control connection, and how to ask for something on it.
fn owner(balancer: &Balancer) -> impl FnMut(String) -> String {
    let mut backend = TcpStream::connect(balancer.door("control")).unwrap();
    let mut answers = BufReader::new(backend.try_clone().unwrap()).lines();
    move |message: String| {
        writeln!(backend, "{message}").unwrap();
        let mut answers = answers.by_ref().map(Result::unwrap);
        answers.find(|line| line.contains("\"ack\"")).expect("an answer")
    }
}

#[test]
fn a_backend_joins_by_tls_once_it_is_verified_and_operators_see_it() {
    let (pem, config) = certified("red.internal");
    let port = echo(&Arc::new(Mutex::new(Arc::new(config)))).port();
    let (balancer, _) = balancer(&pem, "");
    let mut ask = owner(&balancer);
    let mut register =
        |more: &str| ask(format!(r#"{{"cmd":"register","service":"red","port":{port}{more}}}"#));
    let said = register(r#","tls":true,"tls_name":"other.internal""#);
    let why = "as other.internal: its certificate is for another name";
    assert!(said.contains("\"failed\"") && said.contains(why), "{said}");
    let said = register(r#","tls":true"#);
    assert!(said.contains("as 127.0.0.1: its certificate is for another name"), "{said}");
    let said = register(r#","tls_name":"red.internal""#);
    assert!(said.contains("tls_name means nothing without tls"), "{said}");
    let said = ask(format!(r#"{{"cmd":"register","protocol":"udp","port":{port},"tls":true}}"#));
    assert!(said.contains("datagrams are not sealed: leave tls out"), "{said}");
    drop(ask);

    let control = balancer.door("control").to_string();
    let mut joining = Command::new(env!("CARGO_BIN_EXE_lb"))
        .args(["backend", "--service", "red", "--port", &port.to_string(), "--lb", &control])
        .args(["--tls", "--tls-name", "red.internal", "--check", "tcp"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let shown = wait_for("it to serve", || {
        of_red(&balancer).filter(|backend| backend["state"] == "serving")
    });
    assert_eq!(shown["tls"], "red.internal");
    let said = balancer.command("status").output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains(&format!("127.0.0.1:{port} (TLS)")), "{said}");
    assert!(is_served(door(&balancer)));
    let mut other = owner(&balancer);
    let said = other(format!(r#"{{"cmd":"register","service":"red","port":{port}}}"#));
    assert!(said.contains("\"failed\""), "{said}");
    joining.kill().unwrap();
    joining.wait().unwrap();
}

#[test]
fn what_is_registered_by_tls_cannot_be_registered_in_the_clear_before_it_has_left() {
    let (pem, config) = certified("red.internal");
    let port = echo(&Arc::new(Mutex::new(Arc::new(config)))).port();
    let (balancer, _) = balancer(&pem, "");
    let mut ask = owner(&balancer);
    let red =
        |cmd: &str, more: &str| format!(r#"{{"cmd":"{cmd}","service":"red","port":{port}{more}}}"#);
    let sealed = r#","tls":true,"tls_name":"red.internal""#;
    assert!(ask(red("register", sealed)).contains("\"successful\""));
    assert!(ask(red("register", r#","weight":3"#)).contains("\"weight\":3"), "as it was otherwise");
    let said = ask(red("register", r#","tls":false"#));
    assert!(said.contains("which cannot change: unregister it first"), "{said}");
    assert!(is_served(door(&balancer)));
    assert!(ask(red("unregister", "")).contains("\"successful\""));
    assert!(ask(red("register", "")).contains("\"successful\""), "it accepts connections");
}

#[test]
fn a_backend_whose_certificate_is_no_good_any_more_is_set_aside_until_its_authority_is_trusted() {
    let (pem, config) = certified("red.internal");
    let shown = Arc::new(Mutex::new(Arc::new(config)));
    let port = echo(&shown).port();
    let (balancer, ca) = balancer(
        &pem,
        &format!(
            "backends = [{{ address = \"127.0.0.1:{port}\", tls = {{ name = \"red.internal\" }} }}]"
        ),
    );
    let door = door(&balancer);
    assert!(is_served(door));
    let (pem, config) = certified("red.internal");
    *shown.lock().unwrap() = Arc::new(config);
    let because = wait_for("it to be set aside", || {
        let _ = is_served(door);
        of_red(&balancer)?["aside_because"].as_str().map(str::to_owned)
    });
    assert!(because.starts_with("TLS: its certificate "), "{because}");
    balancer.wait_for_log("backend set aside: its data port failed");
    std::fs::write(&ca, "no certificate").unwrap();
    let refused = balancer.command("reload").output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("holds no certificate in PEM"), "{said}");
    std::fs::write(&ca, pem).unwrap();
    assert!(balancer.command("reload").status().unwrap().success());
    wait_for("it to be back", || (of_red(&balancer)?["state"] == "serving").then_some(()));
    assert!(is_served(door));
}
