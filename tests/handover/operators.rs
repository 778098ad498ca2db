//! What operators and their tools see of a handover: the service manager, counters, changed settings.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Backend, Balancer, echo_streams};
use crate::process::Folder;
use crate::requests::web;
use crate::wait::{PATIENCE, wait_for};

fn asks(user: &mut TcpStream, text: &[u8]) {
    user.write_all(text).unwrap();
    let mut answer = vec![0; text.len()];
    user.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text);
}

fn user(balancer: &Balancer) -> TcpStream {
    let user = TcpStream::connect(balancer.door("tcp")).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

/// Every counter, by its name and labels.
fn counters(balancer: &Balancer) -> BTreeMap<String, f64> {
    let mut stream = TcpStream::connect(balancer.door("admin")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let is_counter = |name: &str| {
        ["_total", "_count", "_sum", "_bucket"]
            .iter()
            .any(|it| name.split('{').next().unwrap().ends_with(it))
    };
    let samples = text.lines().filter_map(|line| line.rsplit_once(' '));
    let samples = samples.filter(|(name, _)| !name.starts_with('#') && is_counter(name));
    samples.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

#[test]
fn no_counter_goes_back_and_none_is_lost() {
    let balancer = Balancer::start("workers = 1\n");
    let _backend = Backend::register(&balancer, "tcp", echo_streams());
    let mut users: Vec<_> = (0..5).map(|_| user(&balancer)).collect();
    users.iter_mut().for_each(|user| asks(user, &[b'x'; 5000]));
    users.truncate(3);
    wait_for("two users to have left", || {
        (balancer.status()["sessions"]["active"] == 3).then_some(())
    });
    for _ in 0..3 {
        let before = counters(&balancer);
        balancer.upgrade();
        let after = counters(&balancer);
        for (name, value) in &before {
            let now = after.get(name).copied();
            assert!(now.is_some_and(|now| now >= *value), "{name} was {value} and is {now:?}");
        }
        users.iter_mut().for_each(|user| asks(user, b"again"));
    }
    let status = balancer.status();
    assert_eq!(status["sessions"]["started"], 5);
    assert_eq!(status["sessions"]["active"], 3);
    assert_eq!(status["backends"][0]["id"], "b1");
    drop(users);
    wait_for("everybody to have left", || {
        (balancer.status()["sessions"]["ended"] == 5).then_some(())
    });
}

#[test]
fn the_service_manager_is_told_of_the_new_main_process() {
    let folder = Folder::new("manager");
    let path = folder.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let balancer = Balancer::start_as("workers = 1\n", |lb| {
        lb.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "2000000");
    });
    let told = |start: &str| {
        wait_for(start, || {
            let mut bytes = [0; 4096];
            let count = manager.recv(&mut bytes).unwrap();
            let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
            text.lines().find(|line| line.starts_with(start)).map(str::to_owned)
        })
    };
    told("READY=1");
    let old = balancer.pid();
    // A signal says the same as the command.
    kill(Pid::from_raw(old as i32), Signal::SIGUSR2).unwrap();
    let main = told("MAINPID=");
    wait_for("the successor to answer", || (balancer.pid() != old).then_some(()));
    assert_eq!(main, format!("MAINPID={}", balancer.pid()));
    // Only then does the new process say anything.
    told("READY=1");
    told("WATCHDOG=1");
    balancer.wait_for_end(old);
}

#[test]
fn workers_and_doors_may_change() {
    let balancer = Balancer::start("workers = 1\n");
    let backend = Backend::register(&balancer, "tcp", echo_streams());
    let mut users: Vec<_> = (0..20).map(|_| user(&balancer)).collect();
    users.iter_mut().for_each(|user| asks(user, b"at first"));
    let file = balancer.folder.path().join("lb.toml");
    for workers in [3, 4, 1, 2] {
        let settings = format!(
            "workers = {workers}\n[service.more]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n"
        );
        std::fs::write(&file, settings).unwrap();
        balancer.upgrade();
        assert_eq!(balancer.status()["workers"].as_array().unwrap().len(), workers);
        let mut newcomers: Vec<_> = (0..8).map(|_| user(&balancer)).collect();
        for user in users.iter_mut().chain(&mut newcomers) {
            asks(user, b"with other workers");
        }
        users.extend(newcomers);
        assert_eq!(balancer.status()["sessions"]["active"], users.len());
    }
    assert!(backend.is_connected());
}

#[test]
fn descriptors_do_not_grow() {
    let balancer = Balancer::start("workers = 1\n");
    let _backend = Backend::register(&balancer, "tcp", echo_streams());
    let mut users: Vec<_> = (0..10).map(|_| user(&balancer)).collect();
    let count = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let mut counts = Vec::new();
    for _ in 0..8 {
        users.iter_mut().for_each(|user| asks(user, b"still here"));
        let old = balancer.pid();
        balancer.upgrade();
        balancer.wait_for_end(old);
        counts.push(count(balancer.pid()));
        // Whatever the new process starts does not inherit its way to the old one.
        let stdin = std::fs::read_link(format!("/proc/{}/fd/0", balancer.pid())).unwrap();
        assert_eq!(stdin, std::path::Path::new("/dev/null"));
    }
    assert!(counts[7] <= counts[1] + 2, "{counts:?}");
}

/// The answer to a request on this connection to the admin door.
fn health(to: &mut TcpStream) -> String {
    to.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    while !answer.ends_with("ok\n") {
        let mut byte = [0];
        to.read_exact(&mut byte).unwrap();
        answer.push(char::from(byte[0]));
    }
    answer.to_ascii_lowercase()
}

#[test]
fn what_still_lingers_leaves_everything_else_to_the_process_that_serves() {
    let balancer = Balancer::start("workers = 1\n");
    let _backend = Backend::register(&balancer, "api", web());
    // An upload that is half done keeps the old process.
    let mut upload = TcpStream::connect(balancer.door("api")).unwrap();
    upload.set_read_timeout(Some(PATIENCE)).unwrap();
    upload.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n\x01").unwrap();
    let mut operator = TcpStream::connect(balancer.door("admin")).unwrap();
    operator.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(!health(&mut operator).contains("connection: close"));
    wait_for("the upload", || (balancer.status()["sessions"]["active"] == 1).then_some(()));
    let old = balancer.pid();
    balancer.upgrade();
    assert!(health(&mut operator).contains("connection: close"));
    assert_eq!(operator.read(&mut [0; 8]).unwrap(), 0);
    let tell = |signal| kill(Pid::from_raw(old as i32), signal).unwrap();
    tell(Signal::SIGHUP);
    balancer.wait_for_log("settings are not read again");
    // A service manager that stops a unit tells all of its processes.
    tell(Signal::SIGTERM);
    balancer.wait_for_log("asked to stop: what could not be handed over still has its time");
    upload.write_all(b"\x02").unwrap();
    let mut answer = [0; 12];
    upload.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    drop(upload);
    balancer.wait_for_end(old);
    assert!(!balancer.log().contains("reloaded"));
}
