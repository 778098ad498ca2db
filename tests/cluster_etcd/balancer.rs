//! A balancer of the cluster, and what users and operators see of it. Owns its processes, those of an upgrade among
//! them; they end with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::SECRET;
use crate::members::Etcd;
use crate::process::{Folder, Process};
use crate::wait::wait_for;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lb");

/// A balancer.
pub struct Balancer {
    number: usize,
    pub process: Option<Process>,
    pub file: String,
    /// For operators.
    pub socket: String,
    /// Who serves in the first process's place.
    successors: BTreeSet<u32>,
}

impl Balancer {
    pub fn new(folder: &Folder, number: usize, etcd: &Etcd) -> Balancer {
        let secret = folder.write("secret", SECRET);
        Command::new("chmod").args(["600", &secret]).status().unwrap();
        let (at, store) = (number + 1, etcd.settings(number));
        let socket = folder.path().join(format!("admin{at}.sock")).display().to_string();
        let text = format!(
            "workers = 1\n[listen]\ntcp = \"10.77.0.{at}:8081\"\nudp = \"off\"\napi = \"off\"\n\
             control = \"10.77.0.{at}:8080\"\nadmin = \"10.77.0.{at}:8084\"\n\
             [admin]\nsocket = \"{socket}\"\n[control]\nallow = [\"10.77.0.0/16\"]\n\
             [service.newcomers]\nprotocol = \"tcp\"\nlisten = \"10.77.0.{at}:8082\"\n\
             [balance]\npolicy = \"source_hash\"\nhash = \"address_port\"\n\
             [limits]\nsessions = 2000\n[log]\nlevel = \"warn\"\n\
             [cluster]\nname = \"test\"\nnode = \"n{at}\"\nsecret_file = \"{secret}\"\n{store}"
        );
        let file = folder.write(&format!("lb{at}.toml"), text);
        let mut balancer = Balancer::known(number);
        (balancer.file, balancer.socket) = (file, socket);
        balancer.start();
        balancer
    }

    /// One that somebody else has started, and ends.
    pub fn known(number: usize) -> Balancer {
        let (file, socket) = (String::new(), String::new());
        Balancer { number, process: None, file, socket, successors: BTreeSet::new() }
    }

    pub fn start(&mut self) {
        self.process = Some(Process::start(PROGRAM, &["serve", "--config", &self.file]));
        wait_for("the balancer to be there", || self.get("/healthz"));
    }

    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        kill(Pid::from_raw(process.0.id() as i32), signal).unwrap();
    }

    /// Goes on as another process, which is late at times on a machine that has much else to do.
    pub fn upgrade(&mut self) {
        wait_for("a successor that is not late", || {
            let done = self.command(&["upgrade"]);
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success() || said.contains("in time"), "{said}");
            done.status.success().then(|| eprint!("{}", String::from_utf8_lossy(&done.stdout)))
        });
        self.successors.insert(self.status()["pid"].as_u64().expect("a number") as u32);
    }

    /// What an operator's command says.
    pub fn command(&self, arguments: &[&str]) -> Output {
        let admin = ["--admin", &self.socket];
        Command::new(PROGRAM).args(arguments).args(admin).output().unwrap()
    }

    /// What `lb cluster status` says.
    pub fn told(&self) -> String {
        String::from_utf8(self.command(&["cluster", "status"]).stdout).unwrap()
    }

    /// What `lb check` says of these settings, with other doors, as these may be in use.
    pub fn check(&self) -> String {
        self.check_with(str::to_owned)
    }

    /// The same, with other settings.
    pub fn check_with(&self, change: impl FnOnce(&str) -> String) -> String {
        let text = std::fs::read_to_string(&self.file).unwrap();
        let doors = text.replace(&format!("10.77.0.{}:", self.number + 1), "10.77.0.7:");
        let file = format!("{}.check", self.file);
        std::fs::write(&file, change(&doors.replace(&self.socket, ""))).unwrap();
        let done = Command::new(PROGRAM).args(["check", "--config", &file]).output().unwrap();
        String::from_utf8(done.stdout).unwrap() + &String::from_utf8(done.stderr).unwrap()
    }

    pub fn at(&self, port: u16) -> SocketAddr {
        ([10, 77, 0, self.number as u8 + 1], port).into()
    }

    pub fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.at(8084)).ok()?;
        let host = self.at(8084);
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (_, body) = text.split_once("\r\n\r\n")?;
        Some(body.to_owned())
    }

    pub fn status(&self) -> Value {
        wait_for("the status", || {
            let body = self.get("/status")?;
            let (start, end) = (body.find('{')?, body.rfind('}')?);
            serde_json::from_str(&body[start..=end]).ok()
        })
    }

    /// Ports of the backends that it gives users to, and their state.
    pub fn backends(&self) -> BTreeMap<u16, String> {
        self.registered().into_iter().map(|(address, state)| (address.port(), state)).collect()
    }

    /// The backends that it gives users to, and their state.
    pub fn registered(&self) -> Vec<(SocketAddr, String)> {
        let status = self.status();
        let all = status["backends"].as_array().expect("a list").iter();
        let one = |it: &Value| {
            let address: SocketAddr = it["address"].as_str()?.parse().ok()?;
            Some((address, it["state"].as_str()?.to_owned()))
        };
        all.filter_map(one).filter(|(_, state)| state != "gone").collect()
    }

    /// Who answers a user that comes from this port.
    pub fn answer(&self, from: u16) -> Option<u16> {
        self.try_answer(from).ok()
    }

    pub fn try_answer(&self, from: u16) -> std::io::Result<u16> {
        self.try_answer_at(8081, from)
    }

    /// The same at this door.
    pub fn try_answer_at(&self, door: u16, from: u16) -> std::io::Result<u16> {
        loop {
            match self.ask(door, from) {
                // The connection before it from the same port is not quite gone.
                Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable => {
                    thread::sleep(Duration::from_millis(1));
                }
                outcome => return outcome,
            }
        }
    }

    pub fn ask(&self, door: u16, from: u16) -> std::io::Result<u16> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        let from = SocketAddr::from(([10, 77, 0, 8], from));
        socket.bind(&SockAddr::from(from))?;
        socket.connect_timeout(&SockAddr::from(self.at(door)), Duration::from_secs(5))?;
        // So that the same port can be used again at once.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"who\n")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        line.trim().parse().map_err(std::io::Error::other)
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        for pid in &self.successors {
            let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
            // A number may be another process's by now.
            if command.is_ok_and(|it| it.contains(&self.file)) {
                let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
            }
        }
    }
}
