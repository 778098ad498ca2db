//! One address for users in front of several balancers, by the recipes that are shipped: keepalived, and ECMP with
//! resilient next hops. Hosts are network namespaces. Needs root, and Debian's keepalived, etcd-server and curl.
//!
//! What is shown: who answers a UDP user stays the same whichever balancer the user comes to, and for how long nobody
//! answers.

mod ecmp;
mod flows;
mod networks;
#[path = "../common/process.rs"]
mod process;
mod scene;
#[path = "../common/wait.rs"]
mod wait;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use flows::{Flows, Home, Probe, moved, rehashed};
use networks::Network;
use nix::sys::signal::Signal;
use process::Process;
use scene::{BACKENDS, Balancer, Scene, port_of, shipped};
use wait::wait_for;

/// The address of the service in the recipe for keepalived.
const ADDRESS: &str = "10.1.0.10";
const GAP_MAX: Duration = Duration::from_secs(4);

/// keepalived at a balancer, with the recipe but for the addresses and the place of the program.
struct Keepalived {
    process: Option<Process>,
    log: String,
}

impl Keepalived {
    fn start(scene: &Scene, place: usize) -> Keepalived {
        let recipe = fs::read_to_string(shipped("keepalived.conf")).unwrap();
        let mut recipe = recipe.replace("/usr/bin/lb", &scene.program());
        if place == 1 {
            recipe = recipe.replace("10.1.0.12", "other").replace("10.1.0.11", "10.1.0.12");
            recipe = recipe.replace("other", "10.1.0.11");
        }
        let file = scene.folder.write(&format!("keepalived{place}.conf"), recipe);
        let [log, parent, child] = ["log", "pid", "vrrp.pid"]
            .map(|what| format!("{}/keepalived{place}.{what}", scene.folder.path().display()));
        let mut command = Command::new("keepalived");
        command.args([
            "--dont-fork",
            "--vrrp",
            "--log-console",
            "--no-syslog",
            "--use-file",
            &file,
        ]);
        command.args(["--pid", &parent, "--vrrp_pid", &child]).stdin(Stdio::null());
        let (out, err) = (File::create(&log).unwrap(), File::options().append(true).open(&log));
        command.stdout(out).stderr(err.unwrap());
        let child = scene.balancers[place].network.within(|| command.spawn());
        Keepalived { process: Some(Process(child.expect("keepalived is installed"))), log }
    }

    /// How often it has been ready to take the address.
    fn times_ready(&self) -> usize {
        fs::read_to_string(&self.log).unwrap().matches("Entering BACKUP STATE").count()
    }
}

impl Drop for Keepalived {
    fn drop(&mut self) {
        // Its child goes with it in an orderly end.
        self.process.take().map(Process::terminate);
        if thread::panicking() {
            eprintln!("{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// Two balancers of which one has the address, and users of it.
struct Pair {
    keepalived: Vec<Keepalived>,
    flows: Flows,
    homes: Vec<Home>,
    scene: Scene,
}

impl Pair {
    fn new() -> Pair {
        let scene = Scene::new(2, "");
        let keepalived: Vec<Keepalived> =
            [0, 1].map(|place| Keepalived::start(&scene, place)).into();
        wait_for("one of them to have the address", || owner(&scene));
        let flows = Flows::new(&scene.switch, 10_000, &door());
        let homes = flows.ask();
        let backends: BTreeSet<u16> = homes.iter().map(|home| home.backend).collect();
        assert_eq!(backends.len(), usize::from(BACKENDS), "all backends have users");
        Pair { keepalived, flows, homes, scene }
    }

    fn owner(&self) -> usize {
        wait_for("one of them to have the address", || owner(&self.scene))
    }

    /// Users of the address while this happens, which makes it move.
    fn moves(&mut self, what: &str, happen: impl FnOnce(&mut Scene, usize)) {
        let from = self.owner();
        let mut user = Caller::call(&self.scene.switch).expect("it is answered");
        let probe = Probe::begin(&self.scene.switch, &door());
        let begun = Instant::now();
        happen(&mut self.scene, from);
        wait_for("the address to move", || (owner(&self.scene) == Some(1 - from)).then_some(()));
        let after = begun.elapsed();
        let homes = self.flows.ask();
        let gap = probe.end();
        user.asks().expect_err("its session was the other balancer's");
        Caller::call(&self.scene.switch).expect("who connects again is answered");
        let changed = rehashed(&self.homes, &homes);
        eprintln!(
            "{what}: the address moved after {after:?}, nobody answered for {gap:?}; of {} flows, \
             {changed} changed their backend",
            homes.len()
        );
        let came_from = &self.scene.balancers[1 - from].address;
        assert!(homes.iter().all(|home| home.session.ip().to_string() == *came_from));
        assert_eq!(changed, 0, "{what}");
        assert!(gap <= GAP_MAX, "{what}: {gap:?}");
    }

    /// The balancer with the address goes on in another process, and nobody sees it.
    fn is_upgraded(&mut self) {
        let at = self.owner();
        let mut user = Caller::call(&self.scene.switch).expect("it is answered");
        let probe = Probe::begin(&self.scene.switch, &door());
        let sessions = self.scene.balancers[at].upgrade();
        let changed = moved(&self.homes, &self.flows.ask());
        let gap = probe.end();
        eprintln!("upgraded: {sessions} sessions went on, nobody answered for {gap:?}");
        user.asks().expect("its session goes on");
        assert!(changed == 0 && sessions > self.homes.len() as u64, "{changed} {sessions}");
        assert_eq!(self.owner(), at, "the address stays");
        assert!(gap < Duration::from_secs(1), "{gap:?}");
        self.scene.balancers.iter().for_each(Balancer::knows_all);
    }

    /// Starts the balancer that has not the address again, and waits until it could take it.
    fn mend(&mut self) {
        let idle = 1 - self.owner();
        let before = self.keepalived[idle].times_ready();
        self.scene.balancers[idle].start();
        self.scene.balancers.iter().for_each(Balancer::knows_all);
        wait_for("keepalived to see that", || {
            (self.keepalived[idle].times_ready() > before).then_some(())
        });
        assert_eq!(self.owner(), 1 - idle, "who has the address keeps it");
    }
}

/// A TCP user, who is answered by an echo.
struct Caller(TcpStream);

impl Caller {
    fn call(network: &Network) -> io::Result<Caller> {
        let mut caller = Caller(network.within(|| TcpStream::connect((ADDRESS, 8081)))?);
        caller.0.set_read_timeout(Some(Duration::from_secs(5)))?;
        caller.asks().map(|()| caller)
    }

    fn asks(&mut self) -> io::Result<()> {
        self.0.write_all(b"hello\n")?;
        let mut block = [0; 6];
        self.0.read_exact(&mut block)
    }
}

fn door() -> String {
    format!("{ADDRESS}:8082")
}

/// The balancer that has the address, if it is one alone.
fn owner(scene: &Scene) -> Option<usize> {
    let has = |it: &Balancer| it.network.ip("-4 -o addr show dev eth0").contains("10.1.0.10/");
    let owners: Vec<bool> = scene.balancers.iter().map(has).collect();
    match owners[..] {
        [true, false] => Some(0),
        [false, true] => Some(1),
        _ => None,
    }
}

#[test]
#[ignore = "needs root, keepalived and etcd"]
fn an_address_under_keepalived_moves_and_ten_thousand_udp_flows_keep_their_backends() {
    let mut pair = Pair::new();

    let (first, probe) = (pair.owner(), Probe::begin(&pair.scene.switch, &door()));
    pair.scene.etcd = None;
    // Longer than it takes to find a balancer unwell.
    thread::sleep(Duration::from_secs(5));
    assert_eq!(pair.owner(), first, "etcd moves no address");
    assert_eq!(moved(&pair.homes, &pair.flows.ask()), 0, "nor any session");
    let gap = probe.end();
    eprintln!("etcd killed for 5 s: nobody answered for {gap:?}");
    assert!(gap < Duration::from_secs(1), "{gap:?}");
    pair.scene.start_etcd();
    pair.scene.balancers.iter().for_each(Balancer::knows_all);

    pair.is_upgraded();

    pair.moves("balancer killed", |scene, from| scene.balancers[from].kill());
    pair.mend();

    pair.moves("balancer told to stop", |scene, from| {
        scene.balancers[from].signal(Signal::SIGTERM);
    });
    let drains = 1 - pair.owner();
    let process = pair.scene.balancers[drains].process.as_mut().expect("it was not killed");
    assert_eq!(process.0.try_wait().unwrap(), None, "it still has its sessions");
    pair.mend();

    pair.moves("host cut off", |scene, from| {
        scene.switch.ip(&format!("link set {} down", port_of(from)));
    });
}
