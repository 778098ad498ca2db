//! A real etcd of three members on loopback. Owns their processes; they end with it.

use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::NODES;
use crate::process::{Folder, Process};
use crate::wait::wait_for;

/// A member of etcd.
pub struct Member {
    pub number: usize,
    pub process: Option<Process>,
}

/// The store.
pub struct Etcd {
    pub folder: Folder,
    pub members: Vec<Member>,
}

pub fn client_of(number: usize) -> String {
    format!("http://127.0.0.1:{}", 2379 + 10 * number)
}

pub fn peer_of(number: usize) -> String {
    format!("http://127.0.0.1:{}", 2380 + 10 * number)
}

impl Etcd {
    pub fn start() -> Etcd {
        let members = (0..NODES).map(|number| Member { number, process: None }).collect();
        let mut etcd = Etcd { folder: Folder::new("etcd"), members };
        (0..NODES).for_each(|number| etcd.begin(number));
        wait_for("etcd to be there", || etcd.ask(&["endpoint", "health"]));
        etcd
    }

    pub fn begin(&mut self, number: usize) {
        let all: Vec<String> = (0..NODES).map(|at| format!("m{at}={}", peer_of(at))).collect();
        let folder = self.folder.path().join(format!("m{number}"));
        let (client, peer) = (client_of(number), peer_of(number));
        let arguments = [
            "--name",
            &format!("m{number}"),
            "--data-dir",
            folder.to_str().unwrap(),
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &all.join(","),
            "--logger",
            "zap",
        ];
        self.members[number].process = Some(Process::start("etcd", &arguments));
    }

    pub fn kill(&mut self, number: usize) {
        self.members[number].process = None;
    }

    pub fn signal(&self, signal: Signal) {
        for member in &self.members {
            let process = member.process.as_ref().expect("it runs");
            kill(Pid::from_raw(process.0.id() as i32), signal).unwrap();
        }
    }

    /// What etcdctl says, if it succeeds.
    pub fn ask(&self, arguments: &[&str]) -> Option<String> {
        let running = self.members.iter().filter(|member| member.process.is_some());
        let endpoints: Vec<String> = running.map(|member| client_of(member.number)).collect();
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &endpoints.join(",")]);
        let done = command.args(arguments).output().expect("etcd-client is installed");
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
    }

    pub fn leader(&self) -> usize {
        let told = wait_for("a leader", || self.ask(&["endpoint", "status"]));
        let leads = |line: &&str| line.split(", ").nth(4) == Some("true");
        let line = told.lines().find(leads).expect("one of them leads").to_owned();
        (0..NODES).find(|number| line.starts_with(&client_of(*number))).expect("it is one of them")
    }
}
