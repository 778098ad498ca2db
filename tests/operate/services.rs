//! A named service from its table in the file to its users: a backend that joins it by name, its door, and
//! a reload that finds nothing changed.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::harness::{Balancer, echoes};
use crate::wait::{PATIENCE, wait_for};

const SETTINGS: &str = "[service.redis]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n\
                        policy = \"least_sessions\"\n";

/// A backend that ends with its test.
struct Joined(Child);

impl Joined {
    fn start(control: SocketAddr) -> Joined {
        let control = control.to_string();
        let child = Command::new(env!("CARGO_BIN_EXE_lb"))
            .args(["backend", "--service", "redis", "--protocol", "tcp", "--port", "0", "--echo"])
            .args(["--lb", &control])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Joined(child.unwrap())
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the users of the service connect.
fn door_of(balancer: &Balancer) -> SocketAddr {
    redis(&balancer.status())["doors"][0].as_str().unwrap().parse().unwrap()
}

fn redis(status: &Value) -> &Value {
    let services = status["services"].as_array().unwrap();
    services.iter().find(|it| it["name"] == "redis").expect("the service of the file")
}

#[test]
fn a_backend_joins_a_service_by_its_name_and_gets_the_users_of_its_door() {
    let balancer = Balancer::ready(SETTINGS);
    let _backend = Joined::start(balancer.door("control"));
    let line = wait_for("the backend to join", || {
        let log = balancer.log.lock().unwrap();
        log.lines()
            .find(|it| {
                it.contains("backend registered") && it.contains("protocol=tcp service=redis")
            })
            .map(str::to_owned)
    });
    assert!(line.contains("name=-"), "{line}");

    let status = balancer.status();
    let shown = redis(&status);
    let door: SocketAddr = shown["doors"][0].as_str().unwrap().parse().unwrap();
    assert_ne!(door.port(), 0, "the kernel chose one");
    assert_eq!(shown["terms"][0], "policy = \"least_sessions\"");
    assert_eq!(shown["backends"]["serving"], 1);
    let mut user = TcpStream::connect(door).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(echoes(&mut user));
    wait_for("the session to be counted", || {
        (redis(&balancer.status())["sessions_active"] == 1).then_some(())
    });
    let output = balancer.command("status").output().unwrap();
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(page.contains("services") && page.contains(&door.to_string()), "{page}");

    let done = balancer.change(SETTINGS);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    balancer.wait_for_log("reloaded now=0 after_restart=0");
    assert!(echoes(&mut user), "the session goes on");
}

#[test]
fn rule_11_a_backend_stays_while_its_service_is_removed_and_joins_when_it_is_back() {
    let balancer = Balancer::ready(SETTINGS);
    let backend = Joined::start(balancer.door("control"));
    let joined = || {
        let log = balancer.log.lock().unwrap();
        let lines = log.lines().filter(|it| it.contains("backend registered"));
        lines.filter(|it| it.contains("service=redis")).count()
    };
    wait_for("the backend to join", || (joined() == 1).then_some(()));
    assert!(balancer.change("timeouts.drain_ms = 50").status.success());
    let line = balancer.wait_for_log("backend refused");
    assert!(line.contains("there is no service redis"), "{line}");
    balancer.wait_for_log("service gone");
    assert!(balancer.change(SETTINGS).status.success());
    wait_for("it to join again", || (joined() == 2).then_some(()));
    let log = balancer.log.lock().unwrap();
    let connections = log.lines().filter(|it| it.contains("backend connected")).count();
    assert_eq!(connections, 2, "the demo's backend and this one, once each");
    drop((log, backend));
}

#[test]
fn one_service_is_shown_by_its_name_and_an_unknown_one_is_an_error_with_similar_names() {
    let balancer = Balancer::ready(SETTINGS);
    let _backend = Joined::start(balancer.door("control"));
    balancer.wait_for_log("protocol=tcp service=redis");
    let asked = |arguments: &[&str]| {
        let output = balancer.command("status").args(arguments).output().unwrap();
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
        (output.status.code(), said.concat())
    };
    let (code, page) = asked(&["--service", "redis"]);
    assert_eq!(code, Some(0), "{page}");
    assert!(page.starts_with("service redis (tcp)") && page.contains("1 of 1"), "{page}");
    assert!(page.contains("b2") && !page.contains("b1"), "{page}");
    let (code, text) = asked(&["--service", "redis", "--json"]);
    let narrow: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, narrow["backends"].as_array().unwrap().len()), (Some(0), 1), "{text}");
    for arguments in [["--service", "rediss"].as_slice(), &["--service", "rediss", "--sessions"]] {
        let (code, said) = asked(arguments);
        let told = "lb: there is no service rediss; similar names among the 4 are: redis\n";
        assert_eq!((code, said.as_str()), (Some(2), told));
    }
    let mut user = TcpStream::connect(door_of(&balancer)).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(echoes(&mut user));
    let (_, listed) = asked(&["--service", "redis", "--sessions"]);
    assert!(listed.contains("1 session\n"), "{listed}");
    let (_, listed) = asked(&["--service", "api", "--sessions"]);
    assert!(listed.contains("0 sessions"), "{listed}");
    assert_eq!(redis(&balancer.status())["sessions_total"], 1);
}

#[test]
fn a_backend_of_a_service_that_does_not_exist_is_told_why_on_both_sides_and_goes_on_trying() {
    let balancer = Balancer::ready(SETTINGS);
    let control = balancer.door("control").to_string();
    let mut backend = Command::new(env!("CARGO_BIN_EXE_lb"))
        .args(["backend", "--service", "redsi", "--port", "9", "--lb", &control])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let why = "there is no service redsi; the nearest name among the 4 is redis";
    let lines = BufReader::new(backend.stdout.take().unwrap()).lines();
    let tries: Vec<String> = lines.take(3).map(|line| line.unwrap()).collect();
    let is_told = |line: &String| line.contains(&format!("not registered: {why}; trying again in"));
    assert!(tries.iter().all(is_told), "{tries:?}");
    let line = balancer.wait_for_log("backend refused");
    assert!(line.contains("cmd=register") && line.contains(why), "{line}");
    assert_eq!(backend.try_wait().unwrap(), None, "a reload may yet add the service");
    let ask = nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(backend.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    );
    ask.unwrap();
    assert_eq!(wait_for("it to end", || backend.try_wait().unwrap()).code(), Some(0));
}

#[test]
fn rule_13_a_reload_changes_the_limits_of_a_service_at_once_and_ends_no_session() {
    let balancer = Balancer::ready(SETTINGS);
    let _backend = Joined::start(balancer.door("control"));
    balancer.wait_for_log("protocol=tcp service=redis");
    let door = door_of(&balancer);
    let served = || {
        let mut user = TcpStream::connect(door).unwrap();
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        echoes(&mut user).then_some(user)
    };
    let mut users: Vec<TcpStream> =
        (0..3).map(|_| wait_for("a user to be served", served)).collect();
    let reload = |more: &str| {
        let done = balancer.change(&format!("{SETTINGS}{more}"));
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    let turned_away = |barrier: &str, said: &str| {
        wait_for("the worker to know", || served().is_none().then_some(()));
        assert!(redis(&balancer.status())["turned_away"][barrier].as_u64() > Some(0));
        balancer.wait_for_log(said);
    };
    reload("sessions = 2");
    turned_away("sessions", "the service has as many sessions as it may");
    assert_eq!(redis(&balancer.status())["limits"]["sessions_used"], 3);
    reload("backend_sessions = 2");
    turned_away("backend_sessions", "every backend has as many sessions as it may");
    reload("users = [\"10.0.0.0/8\"]");
    turned_away("users", "the service is not open to this address");
    assert!(users.iter_mut().all(echoes), "whoever is in stays in");
    reload("users = [\"127.0.0.0/8\"]\nsessions = 4");
    wait_for("a fourth user to be served", served);
}
