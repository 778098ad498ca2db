//! UDP users at full size, and real UDP protocols through the door: `lb serve` as a process of its
//! own. Needs Debian's `knot`, `dnsperf`, `ngtcp2-client`, `ngtcp2-server`, `openssl` and
//! `sip-tester`, and many descriptors, so these tests run only on request: `cargo test --release
//! --test peers_udp -- --ignored`.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process, free_port};
use servers::{free_udp_port, knot};
use wait::{PATIENCE, wait_for};

fn register(control: &mut BufReader<TcpStream>, port: u16) {
    let message = format!("{{\"cmd\":\"register\",\"protocol\":\"udp\",\"port\":{port}}}\n");
    control.get_mut().write_all(message.as_bytes()).unwrap();
    let mut answer = String::new();
    control.read_line(&mut answer).unwrap();
    assert!(answer.contains("\"successful\""), "{answer}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A balancer for UDP users on all addresses, with these backends.
struct UdpBalancer {
    process: Process,
    port: u16,
    _control: BufReader<TcpStream>,
    _folder: Folder,
}

impl UdpBalancer {
    fn start(name: &str, settings: &str, backends: &[u16]) -> UdpBalancer {
        let folder = Folder::new(name);
        // Nobody here answers hello.
        let file = folder.write("lb.toml", format!("health.interval_ms = 600000\n{settings}"));
        let (port, control) = (free_udp_port(), format!("127.0.0.1:{}", free_port()));
        let door = format!("0.0.0.0:{port}");
        let flags = ["serve", "--config", &file, "--udp", &door, "--control", &control];
        let off = ["--tcp", "off", "--api", "off", "--admin", "off"];
        let process = Process::start(env!("CARGO_BIN_EXE_lb"), &[&flags[..], &off[..]].concat());
        let connection = wait_for("the control door opens", || TcpStream::connect(&control).ok());
        let mut control = BufReader::new(connection);
        for port in backends {
            register(&mut control, *port);
        }
        UdpBalancer { process, port, _control: control, _folder: folder }
    }

    fn descriptors(&self) -> usize {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.process.0.id())).unwrap();
        open.count()
    }
}

/// Answers every datagram with itself, for as long as the process lives.
fn udp_echo() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buf = [0; 2048];
        loop {
            let (len, from) = socket.recv_from(&mut buf).unwrap();
            socket.send_to(&buf[..len], from).unwrap();
        }
    });
    port
}

/// How many sessions are open at once.
const UDP_SESSIONS: usize = 100_000;
/// How many backends they are spread over.
const UDP_BACKENDS: usize = 4;
/// How many addresses the balancer may send from, if its descriptors are too few for a socket for
/// each session of one backend.
const UDP_ORIGINS_MAX: usize = 16;
/// How many addresses of the balancer each user speaks to; each makes a session.
const UDP_ADDRESSES: usize = 1000;
/// How many descriptors the balancer needs besides its sockets to backends, and for what one worker
/// may need more than another.
const BESIDE_SOCKETS: u64 = 2_500;
/// How many datagrams must at least be answered, over all sessions.
const ANSWERS: usize = 1_000_000;

/// Speaks through every session of one user, and checks that each answer is that session's own.
fn speak(user: &UdpSocket, number: usize, round: usize, port: u16) {
    const WINDOW: usize = 50;
    let identity = |address: usize| format!("user {number}, address {address}, round {round}");
    let at = |address: usize| (Ipv4Addr::from(0x7f01_0000 + address as u32), port);
    for first in (0..UDP_ADDRESSES).step_by(WINDOW) {
        for address in first..first + WINDOW {
            user.send_to(identity(address).as_bytes(), at(address)).unwrap();
        }
        let mut answered = [false; WINDOW];
        for _ in 0..WINDOW {
            let mut buf = [0; 2048];
            let (len, from) = user.recv_from(&mut buf).expect("every datagram is answered");
            let answer = std::str::from_utf8(&buf[..len]).unwrap();
            let address =
                (first..first + WINDOW).find(|address| from == SocketAddr::from(at(*address)));
            let address = address.unwrap_or_else(|| panic!("{answer:?} came from {from}"));
            assert_eq!(answer, identity(address), "an answer reached somebody else");
            assert!(
                !std::mem::replace(&mut answered[address - first], true),
                "{answer} came twice"
            );
        }
    }
}

#[test]
#[ignore = "a million datagrams; with less than 27,500 descriptors it sends from several addresses"]
fn a_hundred_thousand_udp_sessions_over_four_backends_keep_their_answers_apart() {
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).unwrap();
    let sockets = descriptors.saturating_sub(BESIDE_SOCKETS) as usize;
    let origins = (UDP_SESSIONS / UDP_BACKENDS).div_ceil(sockets.max(1));
    assert!(origins <= UDP_ORIGINS_MAX, "{descriptors} descriptors are too few");
    let sessions = UDP_SESSIONS;
    let users = sessions / UDP_ADDRESSES;
    let backends: Vec<u16> = (0..UDP_BACKENDS).map(|_| udp_echo()).collect();
    let settings = "workers = 1\n[limits]\nudp_sockets = 27000\nudp_sessions = 100000\n\
                    sessions = 100\ncontrol_connections = 16\n[timeouts]\nudp_idle_ms = 3600000\n";
    let mut settings = settings.replace("27000", &sockets.min(27_000).to_string());
    if origins > 1 {
        let from: Vec<String> = (0..origins).map(|it| format!("\"127.0.0.{}\"", it + 1)).collect();
        settings += &format!("[udp]\nlocal_addresses = [{}]\n", from.join(", "));
    }
    let balancer = UdpBalancer::start("sessions", &settings, &backends);
    let port = balancer.port;
    let before = balancer.process.memory();
    let sockets: Vec<UdpSocket> = (0..users)
        .map(|_| {
            let user = UdpSocket::bind("127.0.0.1:0").unwrap();
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            user
        })
        .collect();
    for round in 0..ANSWERS.div_ceil(sessions) {
        thread::scope(|scope| {
            for (part, users) in sockets.chunks(users.div_ceil(4)).enumerate() {
                let first = part * sockets.len().div_ceil(4);
                scope.spawn(move || {
                    for (place, user) in users.iter().enumerate() {
                        speak(user, first + place, round, port);
                    }
                });
            }
        });
    }
    let grown = balancer.process.memory().saturating_sub(before);
    let descriptors = balancer.descriptors();
    let shown = format!("{sessions} sessions from {origins} addresses: {descriptors} descriptors");
    println!("{shown}, {} KiB", grown / 1024);
    assert!(descriptors <= sessions / UDP_BACKENDS / origins + 200, "{shown}");
    assert_eq!(balancer.process.terminate(), Some(0));
}

/// dnsperf's counts against a server at this port: queries sent, lost, and answered correctly.
fn dnsperf(folder: &Folder, port: u16) -> (u64, u64, u64) {
    let queries: String = (0..500).map(|number| format!("host{number}.example A\n")).collect();
    let file = folder.write("queries", &queries);
    let output = Command::new("dnsperf")
        .args(["-s", "127.0.0.1", "-p", &port.to_string(), "-d", &file])
        .args(["-c", "50", "-T", "1", "-q", "100", "-l", "5", "-t", "2"])
        .output()
        .expect("dnsperf runs");
    let said = String::from_utf8(output.stdout).unwrap();
    let count = |label: &str| {
        let line = said.lines().find_map(|line| line.split_once(label)).map(|(_, rest)| rest);
        let number = line.and_then(|rest| rest.split_whitespace().next());
        number.and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    (count("Queries sent:"), count("Queries lost:"), count("NOERROR"))
}

#[test]
#[ignore = "needs knot and dnsperf"]
fn no_answer_of_dns_is_lost_on_the_way_through_the_door() {
    let folder = Folder::new("dns");
    let host = |number| format!("host{number} A 198.51.100.{}\n", number % 250 + 1);
    let hosts: String = (0..500).map(host).collect();
    let answers = |port| (0..3).any(|_| dnsperf(&folder, port).2 > 0);
    let (_server, server) = knot(&folder, &hosts, answers);
    let direct = dnsperf(&folder, server);
    let balancer = UdpBalancer::start("dns-door", "", &[server]);
    let through = dnsperf(&folder, balancer.port);
    println!("direct {direct:?}, through the door {through:?} (sent, lost, answered)");
    let (sent, lost, answered) = through;
    assert!(sent > 1_000 && lost <= direct.1, "{direct:?} {through:?}");
    // Sent and answered differ only by what was in flight at the end.
    assert!(answered + lost + 100 >= sent, "{through:?}");
    assert_eq!(balancer.process.terminate(), Some(0));
}

/// Waits until a program has taken this UDP port.
fn taken(port: u16) {
    let free = || UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    wait_for("the port is taken", || (!free()).then_some(()));
}

/// How many QUIC users there are at once.
const QUIC_USERS: usize = 12;
/// Length in bytes of the file that each of them fetches.
const QUIC_FILE: usize = 3 << 20;

/// A QUIC server with a file that all of them have, and one that says which server it is.
fn quic_server(folder: &Folder, number: usize, file: &[u8]) -> (Process, u16) {
    let port = free_udp_port();
    let documents = folder.path().join(format!("documents{number}"));
    std::fs::create_dir_all(&documents).unwrap();
    std::fs::write(documents.join("file"), file).unwrap();
    std::fs::write(documents.join("name"), number.to_string()).unwrap();
    let (key, certificate) = (folder.path().join("key"), folder.path().join("certificate"));
    let arguments = ["--quiet", "--htdocs", text(&documents), "127.0.0.1", &port.to_string()];
    let identity = [text(&key), text(&certificate)];
    // Debian installs it where only administrators look.
    let server = Process::start("/usr/sbin/gtlsserver", &[&arguments[..], &identity].concat());
    taken(port);
    (server, port)
}

/// Fetches the file and the server's name in one connection.
fn quic_user(folder: &Folder, number: usize, port: u16) -> (Vec<u8>, String) {
    let got = folder.path().join(format!("got{number}"));
    std::fs::create_dir_all(&got).unwrap();
    let download = format!("--download={}", text(&got));
    let output = Command::new("gtlsclient")
        .args(["--quiet", "--exit-on-all-streams-close", &download, "127.0.0.1"])
        .arg(port.to_string())
        .args(["https://localhost/file", "https://localhost/name"])
        .output()
        .expect("gtlsclient runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let name = std::fs::read_to_string(got.join("name")).expect("the server's name was fetched");
    (std::fs::read(got.join("file")).expect("the file was fetched"), name)
}

#[test]
#[ignore = "needs ngtcp2-client, ngtcp2-server and openssl"]
fn users_of_quic_fetch_files_whole_each_from_one_of_four_servers() {
    let folder = Folder::new("quic");
    let (key, certificate) = (folder.path().join("key"), folder.path().join("certificate"));
    let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let made = Command::new("openssl")
        .args(["req", "-x509", "-subj", "/CN=localhost", "-keyout", text(&key)])
        .args(["-out", text(&certificate)])
        .args(curve)
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let file: Vec<u8> =
        (0..QUIC_FILE as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let servers: Vec<_> = (0..4).map(|number| quic_server(&folder, number, &file)).collect();
    let ports: Vec<u16> = servers.iter().map(|(_, port)| *port).collect();
    let balancer = UdpBalancer::start("quic-door", "workers = 2\n", &ports);
    let mut served = [0; 4];
    thread::scope(|scope| {
        let fetch = |number| quic_user(&folder, number, balancer.port);
        let users: Vec<_> =
            (0..QUIC_USERS).map(|number| scope.spawn(move || fetch(number))).collect();
        for user in users {
            let (got, name) = user.join().unwrap();
            assert!(got == file, "{} of {QUIC_FILE} bytes, or others", got.len());
            served[name.parse::<usize>().unwrap()] += 1;
        }
    });
    assert_eq!(served, [QUIC_USERS / 4; 4], "users were dealt out in turn");
    assert_eq!(balancer.process.terminate(), Some(0));
}

/// The outcome of the calls that `sipp` made to this port: answered and ended normally, and failed.
/// It sends nothing twice, so a lost datagram is a failed call.
fn sip_calls(folder: &Folder, port: u16) -> (u64, u64) {
    let output = Command::new("sipp")
        .current_dir(folder.path())
        .args(["-sn", "uac", "-i", "127.0.0.1", &format!("127.0.0.1:{port}")])
        // Each call uses a socket of its own; 200 of them run at once.
        .args(["-t", "un", "-max_socket", "1000", "-m", "1200", "-r", "400", "-d", "500"])
        .args(["-nr", "-recv_timeout", "5000", "-timeout", "60", "-nostdin"])
        .output()
        .expect("sipp runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |label: &str| -> Option<u64> {
        let line = said.lines().rev().find(|line| line.trim_start().starts_with(label))?;
        line.rsplit('|').next()?.trim().parse().ok()
    };
    let counted = count("Successful call").zip(count("Failed call"));
    counted.unwrap_or_else(|| panic!("{said} {}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
#[ignore = "needs sip-tester"]
fn no_sip_call_is_lost_on_the_way_through_the_door() {
    let folder = Folder::new("sip");
    let servers: Vec<_> = (0..4)
        .map(|_| {
            let port = free_udp_port();
            let at = ["-i", "127.0.0.1", "-p", &port.to_string()];
            let flags = ["-sn", "uas", "-max_socket", "1000", "-nostdin"];
            let server = Process::start("sipp", &[&flags[..], &at].concat());
            taken(port);
            (server, port)
        })
        .collect();
    let direct = sip_calls(&folder, servers[0].1);
    let ports: Vec<u16> = servers.iter().map(|(_, port)| *port).collect();
    let balancer = UdpBalancer::start("sip-door", "workers = 2\n", &ports);
    let through = sip_calls(&folder, balancer.port);
    println!("direct {direct:?}, through the door {through:?} (answered, failed)");
    assert_eq!(through.0 + through.1, 1200);
    assert!(through.1 <= direct.1, "{direct:?} {through:?}");
    assert_eq!(balancer.process.terminate(), Some(0));
}
