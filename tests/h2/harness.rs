//! `lb serve` as a process of its own, with backends that stay registered as long as it lives.
#![allow(dead_code, reason = "each test program needs a part of it")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;

use crate::process::{Folder, Process, free_port};
use crate::servers::listening;

pub struct Balancer {
    pub process: Process,
    pub port: u16,
    pub admin: u16,
    _control: TcpStream,
    folder: Folder,
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            let lines = log.lines().filter(|line| !line.contains(" INFO "));
            let said: Vec<_> = lines.collect();
            eprintln!("the balancer ({:?}): {}", self.process.0.try_wait(), said.join("\n"));
        }
    }
}

impl Balancer {
    /// With these lines in its file.
    pub fn with(settings: &str, backends: &[u16]) -> Balancer {
        let folder = Folder::new("h2");
        let file = folder.write("lb.toml", settings);
        let [port, control, admin] = [(); 3].map(|()| free_port());
        let at = |port| format!("127.0.0.1:{port}");
        let doors = ["--api", &at(port), "--control", &at(control), "--admin", &at(admin)];
        let others = ["--config", &file, "--tcp", "off", "--udp", "off", "--workers", "1"];
        let flags = [&["serve"][..], &doors, &others].concat();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        command.args(flags).stdin(Stdio::null()).stderr(log.try_clone().unwrap()).stdout(log);
        let process = Process(command.spawn().unwrap());
        listening(control);
        let control = TcpStream::connect(at(control)).unwrap();
        let answers = BufReader::new(control.try_clone().unwrap());
        let mut lines = answers.lines().map_while(Result::ok);
        for port in backends {
            let message =
                format!("{{\"cmd\":\"register\",\"protocol\":\"api\",\"port\":{port}}}\n");
            (&control).write_all(message.as_bytes()).unwrap();
            let answer = lines.next().unwrap();
            assert!(answer.contains("\"successful\""), "{answer}");
        }
        let to = control.try_clone().unwrap();
        thread::spawn(move || stay(lines, &to));
        Balancer { process, port, admin, _control: control, folder }
    }

    pub fn over(backends: &[u16]) -> Balancer {
        Balancer::with("", backends)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

/// Answers hello until the connection is over.
fn stay(lines: impl Iterator<Item = String>, mut to: &TcpStream) {
    for line in lines {
        if line.contains("hello") && to.write_all(b"{\"ack\":\"hello\"}\n").is_err() {
            return;
        }
    }
}
