//! Many reloads under load: 64 services of every protocol are served while one more is added, used and
//! removed again and again. Nobody else may notice: no connection is reset, no request fails, no datagram
//! is lost, and neither descriptors nor memory grow.
//!
//! `LB_RELOADS=2000 cargo test --test reloads` goes on for as many reloads.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::{env, fs, thread};

#[path = "common/process.rs"]
mod process;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process};
use wait::{PATIENCE, wait_for};

const SERVICES: usize = 64;
/// All users of UDP come from one address, and go to one server. Lest they be too many for it, their sessions
/// are soon over, and their sockets are not kept from reuse.
const COMMON: &str = "timeouts.drain_ms = 100\ntimeouts.udp_idle_ms = 1000\nudp.quarantine_ms = 0\n\
                      log.level = \"error\"\n";
/// Half of them add a service, and the next one removes it.
const RELOADS: usize = 40;
/// Sockets towards UDP backends that stay open for later sessions, at most, and a margin.
const KEPT_FOR_DATAGRAMS: usize = 80;
/// How much larger the process may have become between an early reload and the last.
const GROWTH_MAX: usize = 4 << 20;

/// A server that answers each byte with itself, or each head of a request with 200.
fn streams() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = [0; 1024];
                while let Ok(read @ 1..) = connection.read(&mut bytes) {
                    let said = &bytes[..read];
                    let is_request = said.ends_with(b"\r\n\r\n");
                    let answer = if is_request { ANSWER } else { said };
                    if connection.write_all(answer).is_err() {
                        return;
                    }
                }
            });
        }
    });
    at
}

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

fn datagrams() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok((read, from)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&bytes[..read], from);
        }
    });
    at
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Tcp,
    Udp,
    Api,
}

const KINDS: [Kind; 3] = [Kind::Tcp, Kind::Udp, Kind::Api];

/// Where users of a service come in: places that nobody else has.
fn door(number: usize) -> SocketAddr {
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    ([127, 81, high, low], 7000 + number as u16).into()
}

/// The servers behind all services.
#[derive(Clone, Copy)]
struct Servers {
    streams: SocketAddr,
    datagrams: SocketAddr,
}

impl Servers {
    /// A service's table. Those of the API share the first one's door.
    fn table(self, number: usize, door: SocketAddr) -> String {
        let (protocol, backend, more) = match KINDS[number % 3] {
            Kind::Tcp => ("tcp", self.streams, String::new()),
            Kind::Udp => ("udp", self.datagrams, String::new()),
            Kind::Api => ("api", self.streams, format!("hosts = [\"s{number}.example\"]\n")),
        };
        format!(
            "[service.s{number}]\nprotocol = \"{protocol}\"\nlisten = \"{door}\"\n\
             backends = [\"{backend}\"]\n{more}"
        )
    }
}

fn door_of(number: usize) -> SocketAddr {
    match KINDS[number % 3] {
        Kind::Api => door(2),
        Kind::Tcp | Kind::Udp => door(number),
    }
}

struct Balancer {
    process: Process,
    folder: Folder,
    admin: String,
}

impl Balancer {
    fn start(settings: &str) -> Balancer {
        let folder = Folder::new("reloads");
        let admin = door(6000).to_string();
        let file = folder.path().join("lb.toml");
        fs::write(&file, settings).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_lb"))
            .args(["serve", "--workers", "2", "--tcp", "off", "--udp", "off", "--api", "off"])
            .args(["--control", "off", "--admin", &admin, "--config"])
            .arg(file)
            .stdout(Stdio::null())
            .spawn();
        let balancer = Balancer { process: Process(child.unwrap()), folder, admin };
        wait_for("the balancer to answer", || (balancer.services()? > 0).then_some(()));
        balancer
    }

    fn child(&self) -> &Child {
        &self.process.0
    }

    fn reload(&self, settings: &str) {
        fs::write(self.folder.path().join("lb.toml"), settings).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        let done = command.args(["reload", "--admin", &self.admin]).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child().id())).unwrap().count()
    }

    /// How many services it shows, those that leave included.
    fn services(&self) -> Option<usize> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        let shown = command.args(["status", "--json", "--admin", &self.admin]).output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&shown.stdout).ok()?;
        Some(status["services"].as_array()?.len())
    }
}

/// A user of one service, with a session that goes on.
enum User {
    Stream(TcpStream, Option<String>),
    Datagrams(UdpSocket),
}

impl User {
    fn of(number: usize, at: SocketAddr) -> User {
        let stream = || {
            let stream =
                TcpStream::connect(at).unwrap_or_else(|error| panic!("s{number}: {error}"));
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_nodelay(true).unwrap();
            stream
        };
        match KINDS[number % 3] {
            Kind::Tcp => User::Stream(stream(), None),
            Kind::Api => {
                let request = format!("GET / HTTP/1.1\r\nHost: s{number}.example\r\n\r\n");
                User::Stream(stream(), Some(request))
            }
            Kind::Udp => {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.connect(at).unwrap();
                User::Datagrams(socket)
            }
        }
    }

    /// Asks once; the answer must be the right one.
    fn ask(&mut self, mark: u8) -> std::io::Result<()> {
        let mut bytes = [0; 1024];
        match self {
            User::Stream(stream, None) => {
                stream.write_all(&[mark])?;
                stream.read_exact(&mut bytes[..1])?;
                assert_eq!(bytes[0], mark);
            }
            User::Stream(stream, Some(request)) => {
                stream.write_all(request.as_bytes())?;
                let mut answer = Vec::new();
                while !answer.ends_with(b"\r\n\r\n") {
                    stream.read_exact(&mut bytes[..1])?;
                    answer.push(bytes[0]);
                }
                let text = String::from_utf8(answer).unwrap();
                assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
                assert!(!text.contains("Connection: close"), "{text}");
            }
            User::Datagrams(socket) => {
                socket.send(&[mark])?;
                assert_eq!((socket.recv(&mut bytes)?, bytes[0]), (1, mark));
            }
        }
        Ok(())
    }
}

/// Asks every service in turn over a session that is there from the start, and over a new one.
fn use_all(kind: usize, over: &AtomicBool, asked: &AtomicU64) {
    let own: Vec<usize> = (0..SERVICES).filter(|number| number % 3 == kind).collect();
    let mut users: Vec<User> = own.iter().map(|it| User::of(*it, door_of(*it))).collect();
    for round in 0.. {
        for (number, user) in own.iter().zip(&mut users) {
            let new = &mut User::of(*number, door_of(*number));
            for user in [user, new] {
                user.ask(round as u8).unwrap_or_else(|error| panic!("s{number}: {error}"));
            }
            asked.fetch_add(2, Ordering::Relaxed);
            if over.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

#[test]
fn rule_10_nobody_notices_that_other_services_come_and_go() {
    let reloads = env::var("LB_RELOADS").map_or(RELOADS, |count| count.parse().unwrap());
    let servers = Servers { streams: streams(), datagrams: datagrams() };
    let tables = (0..SERVICES).map(|number| servers.table(number, door_of(number)));
    let kept = COMMON.to_owned();
    let kept = tables.fold(kept, |all, table| all + &table);
    let balancer = Balancer::start(&kept);
    let (over, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let before = balancer.descriptors();
    let mut early = 0;
    thread::scope(|scope| {
        // Ends the users also when this thread fails.
        let _end = End(&over);
        for kind in 0..KINDS.len() {
            let (over, asked) = (&over, &asked);
            scope.spawn(move || use_all(kind, over, asked));
        }
        for reload in 0..reloads / 2 {
            let number = SERVICES + reload % 3;
            // An API service comes to the door that all others share, and a door of its own.
            let own = match KINDS[number % 3] {
                Kind::Api if reload % 2 == 0 => door(2),
                _ => door(number),
            };
            balancer.reload(&(kept.clone() + &servers.table(number, own)));
            let mut user = User::of(number, own);
            user.ask(reload as u8).expect("it is served at once");
            balancer.reload(&kept);
            if reload == reloads / 8 {
                early = balancer.process.memory();
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    wait_for("the last one to be gone", || {
        (balancer.services() == Some(SERVICES + 3)).then_some(())
    });
    wait_for("descriptors to come back", || {
        (balancer.descriptors() <= before + KEPT_FOR_DATAGRAMS).then_some(())
    });
    let (late, asked) = (balancer.process.memory(), asked.into_inner());
    println!(
        "{reloads} reloads beside {asked} answers; {before} descriptors; memory {early}, {late}"
    );
    assert!(late <= early + GROWTH_MAX, "memory: {early} became {late}");
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
