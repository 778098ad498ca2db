//! Backends that the configuration lists: through a reload, and with users whose backend fails its check.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use crate::harness::Balancer;
use crate::wait::{PATIENCE, wait_for};

/// Address, weight and state of each backend that the file lists.
fn listed(balancer: &Balancer) -> Vec<(String, u64, String)> {
    let status = balancer.status();
    let rows = status["backends"].as_array().unwrap().iter();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    rows.map(|it| (text(&it["address"]), it["weight"].as_u64().unwrap(), text(&it["state"])))
        .filter(|row| row.0.starts_with("127.7."))
        .collect()
}

fn wait_for_list(balancer: &Balancer, rows: &[(&str, u64, &str)]) {
    wait_for(&format!("{rows:?} in the status"), || {
        let listed = listed(balancer);
        let shown = listed.iter().map(|row| (row.0.as_str(), row.1, row.2.as_str()));
        shown.eq(rows.iter().copied()).then_some(())
    });
}

fn settings(backends: &str, more: &str) -> String {
    format!(
        "[service.pg]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\nbackends = [{backends}]\n{more}"
    )
}

#[test]
fn a_reload_adds_removes_and_weighs_listed_backends() {
    let list = settings(r#""127.7.0.1:9", { address = "127.7.0.2:9", weight = 3 }"#, "");
    let balancer = Balancer::ready(&list);
    wait_for_list(&balancer, &[("127.7.0.1:9", 1, "serving"), ("127.7.0.2:9", 3, "serving")]);
    let list = settings(r#"{ address = "127.7.0.2:9", weight = 5 }, "127.7.0.3:9""#, "");
    let done = balancer.change(&list);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    wait_for_list(&balancer, &[("127.7.0.2:9", 5, "serving"), ("127.7.0.3:9", 1, "serving")]);
    let left = balancer.wait_for_log("backend left");
    assert!(left.contains("127.7.0.1:9") && left.contains("no longer in the configuration"));
}

#[test]
fn a_reload_begins_and_ends_checks() {
    let listener = std::net::TcpListener::bind("127.7.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let list = |more: &str| settings(&format!("\"{address}\", \"127.7.0.2:9\""), more);
    let balancer = Balancer::ready(&list(""));
    let both = [(address.as_str(), 1, "serving"), ("127.7.0.2:9", 1, "serving")];
    wait_for_list(&balancer, &both);
    let checked = list("check = { kind = \"tcp\", interval_ms = 50, timeout_ms = 50 }\n");
    let done = balancer.change(&checked);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    wait_for_list(&balancer, &[(&address, 1, "serving"), ("127.7.0.2:9", 1, "failing")]);
    let line = balancer.wait_for_log("check failed");
    assert!(
        line.contains("service=pg") && line.contains("cannot connect to 127.7.0.2:9"),
        "{line}"
    );
    assert!(balancer.change(&list("")).status.success());
    wait_for_list(&balancer, &both);
}

/// The wanted file is all right by itself: only the balancer knows which port the kernel has chosen.
#[test]
fn a_reload_lists_no_door_that_is_open() {
    let old = "[service.pg]\nprotocol = \"tcp\"\nlisten = \"127.7.0.9:0\"\n";
    let balancer = Balancer::ready(old);
    let status = balancer.status();
    let services = status["services"].as_array().unwrap();
    let service = services.iter().find(|service| service["name"] == "pg").unwrap();
    let door = service["doors"][0].as_str().unwrap();
    let new = format!("{old}backends = [\"{door}\"]\n");
    let done = balancer.change(&new);
    assert!(!done.status.success());
    let told = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(told.contains("which is a door of the balancer itself"), "{told}");
    assert_eq!(listed(&balancer), []);
}

/// A server that greets every user with its letter and then waits for the user to go.
fn lettered(host: &str, letter: u8) -> SocketAddr {
    let listener = TcpListener::bind((host, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut user in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let _ = user.write_all(&[letter]);
                let _ = user.read(&mut [0]);
            });
        }
    });
    address
}

/// Listeners on one port of both hosts, where the backends there are checked.
fn checked_ports(hosts: [&str; 2]) -> ([TcpListener; 2], u16) {
    wait_for("a port that is free on both hosts", || {
        let first = TcpListener::bind((hosts[0], 0)).ok()?;
        let port = first.local_addr().ok()?.port();
        let second = TcpListener::bind((hosts[1], port)).ok()?;
        Some(([first, second], port))
    })
}

fn user_of(door: SocketAddr) -> (TcpStream, u8) {
    let mut user = TcpStream::connect(door).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut letter = [0];
    user.read_exact(&mut letter).expect("a backend");
    (user, letter[0])
}

#[test]
fn users_of_a_backend_that_fails_its_check_are_ended_and_come_to_the_other() {
    let hosts = ["127.7.0.1", "127.7.0.2"];
    let ([failing, _passing], port) = checked_ports(hosts);
    let (a, b) = (lettered(hosts[0], b'a'), lettered(hosts[1], b'b'));
    let check = format!(
        "check = {{ kind = \"tcp\", port = {port}, interval_ms = 50, timeout_ms = 50, fall = 2, \
         on_fail = \"close\" }}\n"
    );
    let balancer = Balancer::ready(&settings(&format!("\"{a}\", \"{b}\""), &check));
    let (first, second) = (a.to_string(), b.to_string());
    wait_for_list(&balancer, &[(&first, 1, "serving"), (&second, 1, "serving")]);
    let line = balancer.wait_for_log("door of a service open");
    let door = line.split_whitespace().find_map(|word| word.strip_prefix("address=")).unwrap();
    let door: SocketAddr = door.parse().unwrap();
    let mut users = [user_of(door), user_of(door)];
    users.sort_by_key(|user| user.1);
    assert_eq!(users.each_ref().map(|user| user.1), *b"ab");
    drop(failing);
    let ended = users[0].0.read(&mut [0]);
    assert!(matches!(ended, Ok(0) | Err(_)), "the user of the failing one is let go");
    let line = balancer.wait_for_log("user left");
    assert!(line.contains("backend=b1 ") && line.contains("reason=\"check_failed\""), "{line}");
    assert_eq!([user_of(door).1, user_of(door).1], *b"bb");
    users[1].0.set_nonblocking(true).unwrap();
    let kind = users[1].0.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(kind, Err(std::io::ErrorKind::WouldBlock), "the user of the other is still there");
}
