//! A real etcd of three members on loopback. Owns their processes; they end with it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{DistinguishedName, DnType, ExtendedKeyUsagePurpose, SanType};

use crate::NODES;
use crate::authority::Authority;
use crate::process::{Folder, Process};
use crate::scene::way_of;
use crate::wait::wait_for;

/// The passwords of etcd's users: who administers it, and who the balancers are.
const ADMINISTRATOR: &str = "root:the-administrators";
const PASSWORD: &str = "the-balancers";

/// Over which a key is written often.
const CONNECTIONS: usize = 8;

/// What the store is like.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum With {
    Nothing,
    /// It has users of its own, one of which the balancers are.
    Users,
    /// That, over TLS with certificates at both ends.
    Certificates,
    /// Its members may take this many bytes each.
    Quota(u64),
}

/// A member of etcd.
pub struct Member {
    pub number: usize,
    pub process: Option<Process>,
}

/// The store.
pub struct Etcd {
    pub folder: Folder,
    pub members: Vec<Member>,
    /// That members begin with from now on.
    pub certificate: &'static str,
    with: With,
    has_users: bool,
}

fn client_port(number: usize) -> usize {
    2379 + 10 * number
}

fn peer_of(number: usize) -> String {
    format!("http://127.0.0.1:{}", 2380 + 10 * number)
}

impl Etcd {
    pub fn start(with: With) -> Etcd {
        let members = (0..NODES).map(|number| Member { number, process: None }).collect();
        let (folder, certificate) = (Folder::new("etcd"), "member");
        let mut etcd = Etcd { folder, members, certificate, with, has_users: false };
        etcd.certify();
        (0..NODES).for_each(|number| etcd.begin(number));
        etcd.is_well();
        if matches!(with, With::Users | With::Certificates) {
            etcd.has_users_of_its_own();
        }
        etcd
    }

    pub fn is_well(&self) {
        wait_for("etcd to be well", || self.ask(&["endpoint", "health"]));
    }

    /// Where a member is asked.
    fn url(&self, host: &str, number: usize) -> String {
        let scheme = if self.with == With::Certificates { "https" } else { "http" };
        format!("{scheme}://{host}:{}", client_port(number))
    }

    fn client_of(&self, number: usize) -> String {
        self.url("127.0.0.1", number)
    }

    pub fn begin(&mut self, number: usize) {
        let all: Vec<String> = (0..NODES).map(|at| format!("m{at}={}", peer_of(at))).collect();
        let (client, peer) = (self.client_of(number), peer_of(number));
        let ways = (0..NODES).map(|balancer| self.url(&way_of(balancer), number));
        let listens: Vec<String> = ways.chain([client.clone()]).collect();
        let mut options = vec![
            ("name", format!("m{number}")),
            ("data-dir", self.file(&format!("m{number}"))),
            ("listen-client-urls", listens.join(",")),
            ("advertise-client-urls", client),
            ("listen-peer-urls", peer.clone()),
            ("initial-advertise-peer-urls", peer),
            ("initial-cluster", all.join(",")),
            ("logger", "zap".to_owned()),
        ];
        match self.with {
            With::Certificates => options.extend([
                ("cert-file", self.file(&format!("{}.pem", self.certificate))),
                ("key-file", self.file(&format!("{}.key", self.certificate))),
                ("client-cert-auth", "true".to_owned()),
                ("trusted-ca-file", self.file("ca.pem")),
            ]),
            With::Quota(bytes) => options.push(("quota-backend-bytes", bytes.to_string())),
            With::Nothing | With::Users => {}
        }
        let options: Vec<String> = options.iter().map(|(it, is)| format!("--{it}={is}")).collect();
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        self.members[number].process = Some(Process::start("etcd", &options));
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

    /// The store's part of a balancer's settings.
    pub fn settings(&self, balancer: usize) -> String {
        let member = |at| format!("\"{}\"", self.url(&way_of(balancer), (balancer + at) % NODES));
        let endpoints: Vec<String> = (0..NODES).map(member).collect();
        let mut text = format!("endpoints = [{}]\n", endpoints.join(", "));
        if matches!(self.with, With::Users | With::Certificates) {
            let password = self.folder.write("password", PASSWORD);
            text += &format!("user = \"lb\"\npassword_file = \"{password}\"\n");
        }
        if self.with == With::Certificates {
            for (key, name) in [("ca", "ca.pem"), ("cert", "lb.pem"), ("key", "lb.key")] {
                text += &format!("{key}_file = \"{}\"\n", self.file(name));
            }
        }
        text
    }

    pub fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// What etcdctl says, if it succeeds.
    pub fn ask(&self, arguments: &[&str]) -> Option<String> {
        self.ask_with(arguments, "")
    }

    /// The same, with something to read.
    pub fn ask_with(&self, arguments: &[&str], input: &str) -> Option<String> {
        let running = self.members.iter().filter(|member| member.process.is_some());
        let endpoints: Vec<String> = running.map(|member| self.client_of(member.number)).collect();
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &endpoints.join(",")]);
        if self.has_users {
            command.args(["--user", ADMINISTRATOR]);
        }
        if self.with == With::Certificates {
            for (option, name) in
                [("--cacert", "ca.pem"), ("--cert", "lb.pem"), ("--key", "lb.key")]
            {
                command.args([option, &self.file(name)]);
            }
        }
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut asked = command.spawn().expect("etcd-client is installed");
        asked.stdin.take().expect("it is piped").write_all(input.as_bytes()).unwrap();
        let done = asked.wait_with_output().unwrap();
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// What a member says over plain HTTP, over this connection.
    fn says(stream: &TcpStream, request: &str) -> String {
        let (mut reader, mut length) = (BufReader::new(stream), 0);
        (&mut &*stream).write_all(request.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            match line.trim().to_ascii_lowercase().strip_prefix("content-length: ") {
                Some(text) => length = text.parse().unwrap(),
                None if line.trim().is_empty() => break,
                None => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    }

    /// Writes a key again and again, over several connections at once.
    pub fn put_often(key: &str, value: &str, times: usize) {
        let [key, value] = [key, value].map(|it| STANDARD.encode(it));
        let body = format!("{{\"key\":\"{key}\",\"value\":\"{value}\"}}");
        let size = body.len();
        let request = format!(
            "POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nContent-Length: {size}\r\n\r\n{body}"
        );
        thread::scope(|scope| {
            for number in 0..CONNECTIONS {
                let request = &request;
                scope.spawn(move || {
                    let port = client_port(number % NODES) as u16;
                    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                    for _ in 0..times / CONNECTIONS {
                        let said = Etcd::says(&stream, request);
                        assert!(said.contains("revision"), "{said}");
                    }
                });
            }
        });
    }

    /// How many watches are behind, so that the store has stopped to send them what happens as it does.
    pub fn slow_watches() -> usize {
        let of = |number| {
            let port = client_port(number) as u16;
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            let name = "etcd_debugging_mvcc_slow_watcher_total ";
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.expect("it is told").parse::<usize>().unwrap()
        };
        (0..NODES).map(of).sum()
    }

    pub fn leader(&self) -> usize {
        let told = wait_for("a leader", || self.ask(&["endpoint", "status"]));
        let leads = |line: &&str| line.split(", ").nth(4) == Some("true");
        let line = told.lines().find(leads).expect("one of them leads").to_owned();
        let leads = |number: &usize| line.starts_with(&self.client_of(*number));
        (0..NODES).find(leads).expect("it is one of them")
    }

    /// The newest revision.
    pub fn revision(&self) -> String {
        let told = wait_for("a revision", || self.ask(&["get", "x", "--write-out=fields"]));
        let line = told.lines().find_map(|line| line.strip_prefix("\"Revision\" : "));
        line.expect(&told).to_owned()
    }

    /// As the documentation says.
    fn has_users_of_its_own(&mut self) {
        let lb = format!("lb:{PASSWORD}");
        for words in [
            &["user", "add", ADMINISTRATOR][..],
            &["user", "grant-role", "root", "root"],
            &["role", "add", "lb"],
            &["role", "grant-permission", "lb", "--prefix=true", "readwrite", "/lb/test/"],
            &["user", "add", &lb],
            &["user", "grant-role", "lb", "lb"],
            &["auth", "enable"],
        ] {
            self.ask(words).unwrap_or_else(|| panic!("{words:?} is done"));
        }
        self.has_users = true;
    }

    /// All tokens of the balancers' user end at once, at every member.
    pub fn ends_tokens(&self) {
        let again = format!("{PASSWORD}\n");
        self.ask_with(&["user", "passwd", "lb", "--interactive=false"], &again).expect("it is set");
    }

    /// Writes the certificates of members and of balancers. Those have no name (CN), as etcd's gateway refuses one
    /// that has; and the gateway comes to its own member with that member's certificate, as a client.
    fn certify(&self) {
        let authority = Authority::new("the authority of the store");
        self.folder.write("ca.pem", authority.pem());
        let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let hosts = (0..NODES).map(way_of).chain(["127.0.0.1".to_owned()]);
        let hosts: Vec<SanType> = hosts.map(|it| SanType::IpAddress(it.parse().unwrap())).collect();
        for (serial, name, uses, cn) in [
            (1, "member", &both[..], None),
            (2, "lb", &both[1..], None),
            (3, "named", &both[1..], Some("lb")),
            (4, "serves", &both[..1], None),
        ] {
            let issued = authority.client_with(serial, |params| {
                params.distinguished_name = DistinguishedName::new();
                cn.into_iter()
                    .for_each(|cn| params.distinguished_name.push(DnType::CommonName, cn));
                params.extended_key_usages = uses.to_vec();
                params.subject_alt_names.clone_from(&hosts);
            });
            self.folder.write(&format!("{name}.pem"), issued.pem());
            self.folder.write(&format!("{name}.key"), issued.key.serialize_pem());
        }
    }
}
