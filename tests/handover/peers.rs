//! Programs of others that go through handovers and must not notice: pipelines of redis-benchmark, and a COPY of
//! PostgreSQL each way. They need Debian's redis-server, redis-tools and postgresql, and are run by `.ci/run`.

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use crate::harness::{Backend, Balancer};
use crate::process::{Folder, Process, free_port};
use crate::wait::wait_for;

/// Hands over again and again for as long as a program runs; returns how often.
fn hand_over_while(balancer: &Balancer, running: &mut Child) -> usize {
    let mut count = 0;
    while running.try_wait().unwrap().is_none() {
        balancer.upgrade();
        count += 1;
    }
    count
}

#[test]
#[ignore = "needs redis-server and redis-tools"]
fn redis_clients_notice_nothing() {
    let port = free_port();
    let number = port.to_string();
    let _redis = Process::start("redis-server", &["--port", &number, "--save", ""]);
    wait_for("redis", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    let balancer = Balancer::start("workers = 1\n");
    let backend = Backend::register(&balancer, "tcp", port);
    let door = balancer.door("tcp").port().to_string();
    let mut benchmark = Command::new("redis-benchmark")
        .args(["-p", &door, "-c", "20", "-P", "16", "-n", "400000", "-t", "get,set", "-q"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(hand_over_while(&balancer, &mut benchmark) >= 2);
    let output = benchmark.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(backend.is_connected());
}

/// A server of its own, which refuses to run as root; its port.
fn postgres(folder: &Folder) -> (Process, u16) {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("postgresql is installed");
    let programs = versions.map(|it| it.unwrap().path()).max().unwrap().join("bin");
    let program = |name: &str| programs.join(name).to_str().unwrap().to_owned();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    let data = data.to_str().unwrap();
    assert!(Command::new("chown").args(["postgres", data]).status().unwrap().success());
    let user = ["--reuid=postgres", "--regid=postgres", "--init-groups"];
    let made = ["-D", data, "-A", "trust", "--no-sync", "--no-instructions"];
    let initdb = program("initdb");
    let mut init = Command::new("setpriv");
    init.args(user).arg(initdb).args(made).stdout(Stdio::null());
    assert!(init.status().unwrap().success());
    let (port, server) = (free_port(), program("postgres"));
    let number = port.to_string();
    let flags = ["-D", data, "-p", &number, "-k", "", "-h", "127.0.0.1", "-F"];
    let server = Process::start("setpriv", &[&user[..], &[&server], &flags].concat());
    wait_for("PostgreSQL", || {
        psql(port, "select 1").output().unwrap().status.success().then_some(())
    });
    (server, port)
}

fn psql(port: u16, query: &str) -> Command {
    let mut psql = Command::new("psql");
    psql.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "postgres", "-qAtc", query]);
    psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    psql
}

#[test]
#[ignore = "needs postgresql"]
fn a_copy_of_postgresql_arrives_whole_each_way() {
    const ROWS: usize = 400_000;
    let folder = Folder::new("handover-pg");
    let (_server, port) = postgres(&folder);
    let balancer = Balancer::start("workers = 1\n");
    let _backend = Backend::register(&balancer, "tcp", port);
    let door = balancer.door("tcp").port();
    assert!(psql(door, "create table t(a int, b text)").status().unwrap().success());
    let mut copy = psql(door, "copy t from stdin").spawn().unwrap();
    let mut rows = copy.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        for number in 1..=ROWS {
            writeln!(rows, "{number}\tsome text for row {number}").unwrap();
        }
    });
    balancer.upgrade();
    hand_over_while(&balancer, &mut copy);
    writer.join().unwrap();
    assert!(copy.wait().unwrap().success());
    let back = psql(door, "copy t to stdout").stdin(Stdio::null()).spawn().unwrap();
    let reader = std::thread::spawn(move || back.wait_with_output().unwrap());
    balancer.upgrade();
    let output = reader.join().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), ROWS);
    let is_right =
        |(at, line): (usize, &str)| line == format!("{}\tsome text for row {}", at + 1, at + 1);
    assert!(text.lines().enumerate().all(is_right));
}
