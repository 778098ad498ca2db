//! TCP users with real peers and at full size: `lb serve` as a process of its own. Needs Debian's
//! `redis-server` and `redis-tools`, several GiB through loopback and many descriptors, so these
//! tests run only on request: `cargo test --release --test peers -- --ignored`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[path = "common/process.rs"]
mod process;
#[path = "common/wait.rs"]
mod wait;

use process::{Process, free_port};
use wait::{PATIENCE, wait_for};

const MIB: usize = 1 << 20;

/// A running `lb serve` with its TCP and control doors, and the backends' control connection.
struct Balancer {
    process: Process,
    door: SocketAddr,
    control: BufReader<TcpStream>,
}

impl Balancer {
    fn start(backend_ports: &[u16]) -> Balancer {
        let (door, control) = (free_port(), free_port());
        let (door, control) = (format!("127.0.0.1:{door}"), format!("127.0.0.1:{control}"));
        let flags = ["serve", "--tcp", &door, "--control", &control];
        let off = ["--udp", "off", "--api", "off", "--admin", "off", "--workers", "1"];
        let process = Process::start(env!("CARGO_BIN_EXE_lb"), &[&flags[..], &off[..]].concat());
        let connection = wait_for("the control door opens", || TcpStream::connect(&control).ok());
        let mut control = BufReader::new(connection);
        for port in backend_ports {
            register(&mut control, *port);
        }
        Balancer { process, door: door.parse().unwrap(), control }
    }

    fn user(&self) -> TcpStream {
        let user = TcpStream::connect(self.door).unwrap();
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        user.set_write_timeout(Some(PATIENCE)).unwrap();
        user.set_nodelay(true).unwrap();
        user
    }
}

fn register(control: &mut BufReader<TcpStream>, port: u16) {
    let message = format!("{{\"cmd\":\"register\",\"protocol\":\"tcp\",\"port\":{port}}}\n");
    control.get_mut().write_all(message.as_bytes()).unwrap();
    let mut answer = String::new();
    control.read_line(&mut answer).unwrap();
    assert!(answer.contains("\"successful\""), "{answer}");
}

fn redis() -> (Process, u16) {
    let port = free_port();
    let text = port.to_string();
    let server =
        Process::start("redis-server", &["--port", &text, "--save", "", "--appendonly", "no"]);
    wait_for("redis answers", || TcpStream::connect(("127.0.0.1", port)).ok());
    (server, port)
}

/// One command in RESP, the protocol of Redis.
fn redis_command(parts: &[&[u8]]) -> Vec<u8> {
    let mut command = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        command.extend(format!("${}\r\n", part.len()).bytes());
        command.extend(*part);
        command.extend(b"\r\n");
    }
    command
}

fn redis_value(connection: &mut BufReader<TcpStream>) -> Vec<u8> {
    let mut line = String::new();
    connection.read_line(&mut line).unwrap();
    let len: usize = line.trim().strip_prefix('$').unwrap_or("0").parse().unwrap();
    let mut value = vec![0; len + 2];
    connection.read_exact(&mut value).unwrap();
    value.truncate(len);
    value
}

fn value_of(number: usize) -> Vec<u8> {
    let len = (number * 7919) % (128 * 1024);
    (0..len).map(|place| (place * 31 + number * 17 + place / 251) as u8).collect()
}

#[test]
#[ignore = "needs redis-server and redis-tools"]
fn redis_through_the_door_keeps_every_value() {
    let (_server, port) = redis();
    let balancer = Balancer::start(&[port]);
    let user = balancer.user();
    let mut writer = user.try_clone().unwrap();
    let mut reader = BufReader::new(user);
    for number in 0..2000 {
        let command = redis_command(&[b"SET", format!("k{number}").as_bytes(), &value_of(number)]);
        writer.write_all(&command).unwrap();
        let mut answer = String::new();
        reader.read_line(&mut answer).unwrap();
        assert_eq!(answer, "+OK\r\n");
    }
    let direct = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut direct_writer = direct.try_clone().unwrap();
    let mut direct = BufReader::new(direct);
    for number in 0..2000 {
        let command = redis_command(&[b"GET", format!("k{number}").as_bytes()]);
        writer.write_all(&command).unwrap();
        direct_writer.write_all(&command).unwrap();
        assert!(redis_value(&mut reader) == value_of(number), "value {number} through the door");
        assert!(redis_value(&mut direct) == value_of(number), "value {number} at the server");
    }
    let door = balancer.door.port().to_string();
    let load = ["-c", "50", "-n", "50000", "-P", "4", "-d", "512", "-r", "10000", "-t", "set,get"];
    let ran =
        Command::new("redis-benchmark").args(["-p", &door, "-q"]).args(load).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(balancer.process.terminate(), Some(0));
}

/// The byte at a place of a stream; `turn` makes the two directions differ.
fn block(number: usize, turn: u8) -> Vec<u8> {
    let mut state = (number as u64) << 8 | u64::from(turn) | 1 << 63;
    let mut bytes = Vec::with_capacity(MIB / 4);
    while bytes.len() < MIB / 4 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

const BLOCKS: usize = 4096;

fn send_stream(to: &mut TcpStream, turn: u8) {
    for number in 0..BLOCKS {
        to.write_all(&block(number, turn)).unwrap();
    }
    to.shutdown(Shutdown::Write).unwrap();
}

fn check_stream(from: &mut TcpStream, turn: u8) {
    let mut got = vec![0; MIB / 4];
    for number in 0..BLOCKS {
        from.read_exact(&mut got).unwrap();
        assert!(got == block(number, turn), "block {number} of stream {turn} differs");
    }
    assert_eq!(from.read(&mut got).unwrap(), 0, "the end comes with the last byte");
}

#[test]
#[ignore = "moves two gibibytes"]
fn a_gibibyte_each_way_at_once_arrives_whole() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let balancer = Balancer::start(&[listener.local_addr().unwrap().port()]);
    let backend = thread::spawn(move || {
        // The first connection was the balancer's own check of the port.
        let (mut probe, _) = listener.accept().unwrap();
        assert_eq!(probe.read(&mut [0]).unwrap_or(0), 0);
        let (mut connection, _) = listener.accept().unwrap();
        let mut writer = connection.try_clone().unwrap();
        let down = thread::spawn(move || send_stream(&mut writer, 2));
        check_stream(&mut connection, 1);
        down.join().unwrap();
    });
    let mut user = balancer.user();
    let mut writer = user.try_clone().unwrap();
    let up = thread::spawn(move || send_stream(&mut writer, 1));
    check_stream(&mut user, 2);
    up.join().unwrap();
    backend.join().unwrap();
    assert_eq!(balancer.process.terminate(), Some(0));
}

/// How many sessions are open at once, if the host has the descriptors.
const IDLE: usize = 10_000;
/// How many descriptors the balancer needs besides the two of each session.
const BESIDE_SESSIONS: u64 = 1_500;

#[test]
#[ignore = "runs with the other peers; with less than 21,500 descriptors it opens fewer sessions"]
fn ten_thousand_idle_sessions_take_little_memory() {
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).unwrap();
    let idle = IDLE.min((descriptors.saturating_sub(BESIDE_SESSIONS) / 2) as usize);
    assert!(idle >= 1_000, "{descriptors} descriptors are too few to learn anything from");
    // A separate process, so that no process has more than one end of each connection.
    let balancer = Balancer::start(&[]);
    let port = free_port().to_string();
    let control = balancer.control.get_ref().peer_addr().unwrap().to_string();
    let echo = ["backend", "--protocol", "tcp", "--port", &port, "--lb", &control, "--echo"];
    let _backend = Process::start(env!("CARGO_BIN_EXE_lb"), &echo);
    // Every session is answered once, so that it is known to be established from end to end.
    let answers = |user: &mut TcpStream, mark: u8| {
        let mut answer = [0];
        user.write_all(&[mark])?;
        user.read_exact(&mut answer)?;
        assert_eq!(answer, [mark]);
        std::io::Result::Ok(())
    };
    let mut users = Vec::with_capacity(idle);
    users.push(wait_for("the backend joins", || {
        let mut user = balancer.user();
        answers(&mut user, 0).ok().map(|()| user)
    }));
    let before = balancer.process.memory();
    while users.len() <= idle {
        let mut user = balancer.user();
        answers(&mut user, users.len() as u8).unwrap();
        users.push(user);
    }
    let grown = balancer.process.memory().saturating_sub(before);
    println!("{idle} idle sessions took {} KiB", grown / 1024);
    assert!(grown * IDLE <= 40 * MIB * idle, "{idle} idle sessions took {grown} bytes");
    for (mark, user) in users.iter_mut().enumerate() {
        answers(user, !(mark as u8)).expect("a session that was still works");
    }
    drop(users);
    assert_eq!(balancer.process.terminate(), Some(0));
}

#[test]
#[ignore = "runs with the other peers"]
fn a_killed_backend_gets_no_user_after_its_control_connection_is_gone() {
    let (_first, first) = redis();
    let (second, second_port) = redis();
    let mut balancer = Balancer::start(&[first]);
    let mut other = BufReader::new(
        balancer.control.get_ref().peer_addr().map(TcpStream::connect).unwrap().unwrap(),
    );
    register(&mut other, second_port);
    drop((other, second));
    // From here on no user may be turned away or kept waiting.
    for _ in 0..200 {
        let mut user = balancer.user();
        user.write_all(b"PING\r\n").unwrap();
        let mut answer = [0; 7];
        user.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+PONG\r\n");
    }
    register(&mut balancer.control, first);
    assert_eq!(balancer.process.terminate(), Some(0));
}
