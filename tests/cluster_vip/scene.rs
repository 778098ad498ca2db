//! The hosts of a test and what runs there: a switch whose host has etcd and the backends, balancers on hosts of their
//! own. All of it ends with the scene.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::{fs, io};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::flows;
use crate::networks::Network;
use crate::process::{Folder, Process};
use crate::wait::wait_for;

/// For UDP; there is one for TCP besides.
pub const BACKENDS: u16 = 5;
const FIRST_PORT: u16 = 9001;
const STORE: &str = "http://10.1.0.1:2379";
const PEER: &str = "http://10.1.0.1:2380";

pub struct Balancer {
    pub network: Network,
    pub process: Option<Process>,
    /// Who has taken over from that; it is no child of this test.
    successor: Option<Successor>,
    pub address: String,
    file: String,
}

impl Balancer {
    /// Waits until it can be asked.
    pub fn start(&mut self) {
        // Whoever was there is gone before.
        self.kill();
        let arguments = ["serve", "--config", &self.file];
        let process = self.network.within(|| Process::start(env!("CARGO_BIN_EXE_lb"), &arguments));
        self.process = Some(process);
        wait_for("the balancer to be there", || self.status());
    }

    pub fn kill(&mut self) {
        (self.process, self.successor) = (None, None);
    }

    /// Has a successor take over, and returns how many sessions went on with it.
    pub fn upgrade(&mut self) -> u64 {
        self.signal(Signal::SIGUSR2);
        let taken = wait_for("a successor", || {
            let status = self.status().filter(|it| it["handover"]["generation"] == 1)?;
            self.successor = Some(Successor(i32::try_from(status["pid"].as_i64()?).ok()?));
            status["handover"]["taken"]["sessions"].as_u64()
        });
        let first = &mut self.process.as_mut().expect("it was started").0;
        wait_for("the first one to end", || first.try_wait().unwrap());
        taken
    }

    pub fn status(&self) -> Option<serde_json::Value> {
        let text = self.network.within(|| get("/status").ok())?;
        let (_, body) = text.split_once("\r\n\r\n")?;
        serde_json::from_str(&body[body.find('{')?..=body.rfind('}')?]).ok()
    }

    /// Waits until it knows all backends and is in touch with the store.
    pub fn knows_all(&self) {
        wait_for("all backends", || {
            let status = self.status()?;
            let all = status["backends"].as_array()?.iter();
            let serving = all.filter(|it| it["state"] == "serving").count();
            let mut there = status["cluster"]["nodes"].as_array()?.iter();
            let alike = there.all(|it| it["state"] != "serving" || it["chooses_alike"] == true);
            let is_live = status["cluster"]["store"] == "live";
            (is_live && alike && serving == usize::from(BACKENDS) + 1).then_some(())
        });
    }

    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        kill(Pid::from_raw(process.0.id() as i32), signal).unwrap();
    }
}

/// The process that goes on in place of another.
struct Successor(i32);

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
        // Whoever inherits it may be slow to ask how it ended.
        let status = || fs::read_to_string(format!("/proc/{}/status", self.0)).unwrap_or_default();
        let is_over = || !status().contains("State:") || status().contains("State:\tZ");
        wait_for("its end", || is_over().then_some(()));
    }
}

fn get(path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect("127.0.0.1:8084")?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:8084\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// In the order in which they end.
pub struct Scene {
    pub balancers: Vec<Balancer>,
    stay: Vec<Process>,
    pub etcd: Option<Process>,
    /// Where etcd and the backends are, with the switch.
    pub switch: Network,
    pub folder: Folder,
}

impl Scene {
    /// With so many balancers, at 10.1.0.11 and on, as ready as they can be.
    pub fn new(balancers: usize, more: &str) -> Scene {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
        let switch = Network::new();
        switch.switch("10.1.0.1/24");
        let (folder, stay) = (Folder::new("vip"), Vec::new());
        let mut scene = Scene { balancers: Vec::new(), stay, etcd: None, switch, folder };
        scene.start_etcd();
        for number in 1..=balancers {
            let balancer = scene.balancer(number, more);
            scene.balancers.push(balancer);
            scene.balancers.last_mut().expect("it was added").start();
        }
        scene.stay("10.1.0.11", &["--protocol", "tcp", "--port", "0", "--echo"]);
        for port in FIRST_PORT..FIRST_PORT + BACKENDS {
            flows::serve(&scene.switch, port);
            let port = port.to_string();
            scene.stay("10.1.0.11", &["--protocol", "udp", "--port", &port, "--no-probe"]);
        }
        scene.balancers.iter().for_each(Balancer::knows_all);
        scene
    }

    /// Keeps a backend registered at a balancer, and at the others if that dies.
    fn stay(&mut self, at: &str, what: &[&str]) {
        let door = format!("{at}:8080");
        let arguments = [&["backend", "--lb", &door], what].concat();
        let stays = || Process::start(env!("CARGO_BIN_EXE_lb"), &arguments);
        self.stay.push(self.switch.within(stays));
    }

    pub fn start_etcd(&mut self) {
        let data = self.folder.path().join("etcd");
        let data = data.to_str().expect("it is text");
        let arguments = ["--name", "m", "--data-dir", data, "--logger", "zap"];
        let client = ["--listen-client-urls", STORE, "--advertise-client-urls", STORE];
        let peer = ["--listen-peer-urls", PEER, "--initial-advertise-peer-urls", PEER];
        let all = format!("m={PEER}");
        let all = ["--initial-cluster", &all];
        let arguments = [&arguments[..], &client, &peer, &all].concat();
        self.etcd = Some(self.switch.within(|| Process::start("etcd", &arguments)));
    }

    fn balancer(&self, number: usize, more: &str) -> Balancer {
        let (network, address) = (Network::new(), format!("10.1.0.{}", 10 + number));
        self.switch.plug(&port_of(number - 1), &network, &format!("{address}/24"));
        let secret = self.folder.write("secret", "a secret of the cluster in the tests");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        let text = format!(
            "workers = 1\n[listen]\ncontrol = \":8080\"\n{more}\
             [control]\nallow = [\"10.1.0.0/24\"]\n\
             [balance]\npolicy = \"source_hash\"\nhash = \"address_port\"\n[log]\nlevel = \"warn\"\n\
             [cluster]\nname = \"users\"\nnode = \"lb{number}\"\nendpoints = [\"{STORE}\"]\n\
             secret_file = \"{secret}\"\n"
        );
        let file = self.folder.write(&format!("lb{number}.toml"), text);
        Balancer { network, process: None, successor: None, address, file }
    }

    /// The program at a place where everybody may run it, for those who ask in another's name.
    pub fn program(&self) -> String {
        let here = self.folder.path().join("lb");
        if !here.exists() {
            let built = Path::new(env!("CARGO_BIN_EXE_lb"));
            fs::hard_link(built, &here).or_else(|_| fs::copy(built, &here).map(drop)).unwrap();
        }
        here.into_os_string().into_string().expect("it is text")
    }
}

/// What the switch calls its cable to a balancer.
pub fn port_of(place: usize) -> String {
    format!("port{place}")
}

/// A file that is shipped with the balancer.
pub fn shipped(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/cluster").join(name)
}
