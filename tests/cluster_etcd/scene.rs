//! Three balancers over etcd in a network of their own, and users of all of them. Owns what counts as noticed.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::NODES;
use crate::backend::{Control, serve};
use crate::balancer::Balancer;
use crate::members::{Etcd, With};
use crate::process::Folder;
use crate::wait::wait_for;

/// So soon all is mended once the store is well again.
pub const MENDED_WITHIN: Duration = Duration::from_secs(5);
/// Users who come after what has happened, before it counts as unnoticed.
const USERS_AFTER: u64 = 600;

/// Runs in a new network namespace, which the threads and programs started there inherit.
pub fn in_a_network(run: impl FnOnce() + Send) {
    let run = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("only root may");
        ip("link set lo up");
        (1..=9).for_each(|host| ip(&format!("addr add 10.77.0.{host}/32 dev lo")));
        (0..NODES).for_each(|number| ip(&format!("addr add {}/32 dev lo", way_of(number))));
        run();
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap());
}

pub fn ip(what: &str) {
    let done = Command::new("ip").args(what.split(' ')).status().expect("iproute2 is installed");
    assert!(done.success(), "ip {what}");
}

/// The address at which a balancer finds etcd, and nobody else does.
pub fn way_of(balancer: usize) -> String {
    format!("10.77.1.{}", balancer + 1)
}

pub struct Scene {
    pub etcd: Etcd,
    pub balancers: Vec<Balancer>,
    _folder: Folder,
}

impl Scene {
    pub fn new() -> Scene {
        Scene::with(With::Nothing)
    }

    pub fn with(with: With) -> Scene {
        let (etcd, folder) = (Etcd::start(with), Folder::new("cluster"));
        let balancers = (0..NODES).map(|number| Balancer::new(&folder, number, &etcd)).collect();
        let scene = Scene { etcd, balancers, _folder: folder };
        wait_for("three balancers in etcd", || (scene.count("node") == NODES).then_some(()));
        scene
    }

    /// With ten backends, which are registered at all balancers in turn, over these connections.
    pub fn with_ten(with: With) -> (Scene, Vec<Control>, Vec<u16>) {
        let (scene, ports) = (Scene::with(with), Vec::from_iter(9001..9011));
        let mut controls: Vec<Control> = scene.balancers.iter().map(Control::open).collect();
        for (place, port) in ports.iter().enumerate() {
            serve(*port);
            controls[place % NODES].register(*port);
        }
        scene.agree(&ports);
        (scene, controls, ports)
    }

    /// The keys of this kind.
    pub fn keys(&self, kind: &str) -> Vec<String> {
        let prefix = format!("/lb/test/1/{kind}/");
        let keys = self.etcd.ask(&["get", "--prefix", "--keys-only", &prefix]).unwrap_or_default();
        keys.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    pub fn count(&self, kind: &str) -> usize {
        self.keys(kind).len()
    }

    /// Waits until all balancers know exactly these; returns how long that took.
    pub fn agree(&self, ports: &[u16]) -> Duration {
        let begun = Instant::now();
        for balancer in &self.balancers {
            wait_for("all to know the same", || {
                let known = balancer.backends();
                let serves = known.values().all(|state| state == "serving");
                (serves && known.keys().eq(ports)).then_some(())
            });
        }
        begun.elapsed()
    }

    /// The same, soon after the store was well again.
    pub fn is_mended(&self, what: &str, ports: &[u16], since: Instant) {
        self.agree(ports);
        let took = since.elapsed();
        eprintln!("{what}: all know the same after {took:?}");
        assert!(took <= MENDED_WITHIN, "{what}: {took:?}");
    }
}

/// Users of all balancers who come again and again, each with a port of its own.
pub struct Load {
    is_over: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    moved: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// Where users that come from so many ports belong. Workers may hear of a backend a little later than the status says,
/// and then balancers do not choose alike.
fn homes(first: u16) -> Vec<(u16, u16)> {
    let of = |balancer: &Balancer, from: u16| balancer.answer(from).expect("it is served");
    let all: Vec<Balancer> = (0..NODES).map(Balancer::known).collect();
    let alike = |from| {
        let homes: Vec<u16> = all.iter().map(|balancer| of(balancer, from)).collect();
        homes.iter().all(|home| *home == homes[0]).then_some((from, homes[0]))
    };
    let ports = first..first + 20;
    wait_for("all to choose alike", || ports.clone().map(alike).collect::<Option<Vec<_>>>())
}

impl Load {
    pub fn begin() -> Load {
        let [asked, refused, moved] = [(); 3].map(|()| Arc::new(AtomicU64::new(0)));
        let is_over = Arc::new(AtomicBool::new(false));
        let mut load = Load { is_over, asked, refused, moved, threads: Vec::new() };
        for number in 0..NODES {
            let balancer = Balancer::known(number);
            let (is_over, asked) = (Arc::clone(&load.is_over), Arc::clone(&load.asked));
            let (refused, moved) = (Arc::clone(&load.refused), Arc::clone(&load.moved));
            let homes = homes(20_000 + 1000 * number as u16);
            load.threads.push(thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    for (from, home) in &homes {
                        asked.fetch_add(1, Ordering::Relaxed);
                        match balancer.try_answer(*from) {
                            Err(error) => {
                                eprintln!("refused: {error}");
                                refused.fetch_add(1, Ordering::Relaxed);
                            }
                            Ok(other) if other == *home => {}
                            Ok(other) => {
                                eprintln!("moved from {home} to {other} at balancer {number}");
                                moved.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        thread::sleep(Duration::from_millis(5));
                    }
                }
            }));
        }
        load
    }

    pub fn end(self, what: &str) {
        let until = self.asked.load(Ordering::Relaxed) + USERS_AFTER;
        wait_for("more users", || (self.asked.load(Ordering::Relaxed) >= until).then_some(()));
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        let [asked, refused, moved] =
            [self.asked, self.refused, self.moved].map(|count| count.load(Ordering::Relaxed));
        eprintln!("{what}: {asked} users, {refused} refused, {moved} moved");
        assert!(refused == 0 && moved == 0, "{what}");
    }
}
