//! Three balancers that share one registry in a real etcd of three members, in a network namespace of their own. Shows
//! what `tests/share_sim` cannot: that etcd is as the model says, and how long things take. Needs root and Debian's
//! etcd-server and etcd-client.
//!
//! Times are printed. They are held against generous bounds, since a busy machine is no fault of the balancer.
//!
//! `LB_ETCD_PAUSE` says for how many seconds all members of etcd are paused, 20 if it is not set; the long form takes a
//! minute of it:
//!
//! ```text
//! LB_ETCD_PAUSE=60 cargo test --test cluster_etcd -- --ignored --test-threads 1 --nocapture users_notice
//! ```

#[path = "cluster_etcd/access.rs"]
mod access;
#[path = "common/authority.rs"]
mod authority;
#[path = "cluster_etcd/away.rs"]
mod away;
#[path = "cluster_etcd/backend.rs"]
mod backend;
#[path = "cluster_etcd/balancer.rs"]
mod balancer;
#[path = "cluster_etcd/full.rs"]
mod full;
#[path = "cluster_etcd/members.rs"]
mod members;
#[path = "common/process.rs"]
mod process;
#[path = "cluster_etcd/scene.rs"]
mod scene;
#[path = "cluster_etcd/upgrade.rs"]
mod upgrade;
#[path = "common/wait.rs"]
mod wait;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use backend::{Control, serve};
use balancer::PROGRAM;
use members::With;
use nix::sys::signal::Signal;
use process::Process;
use scene::{Load, Scene, in_a_network};
use wait::wait_for;

const NODES: usize = 3;
/// Ports of backends that register while users of others come. They have a service of their own, so that nobody is
/// given another backend because of them.
const NEWCOMERS: Range<u16> = 8500..9000;
/// Where backends are.
const HOST: [u8; 4] = [10, 77, 0, 9];
const SECRET: &str = "a secret of the cluster in the tests";

#[test]
#[ignore = "needs root and etcd"]
fn who_registers_at_one_balancer_is_served_by_all() {
    in_a_network(|| {
        let scene = Scene::new();
        let mut times = Vec::new();
        let mut control = Control::open(&scene.balancers[0]);
        for round in 0..50u16 {
            let port = 9001 + round;
            serve(port);
            let begun = Instant::now();
            control.register(port);
            for (number, balancer) in scene.balancers.iter().enumerate() {
                let from = 30_000 + 10 * round + number as u16;
                wait_for("the first user", || balancer.answer(from).filter(|it| *it == port));
            }
            times.push(begun.elapsed());
            control.say("unregister", port, "");
            control.hear("\"unregister\"");
            scene.agree(&[]);
        }
        times.sort();
        let (middle, late) = (times[times.len() / 2], times[times.len() - 1]);
        let slow = &times[times.len() - 5..];
        eprintln!("registered at one, first users through all: p50 {middle:?}, slowest {slow:?}");
        assert!(late < Duration::from_secs(3), "{late:?}");
        // Many at once, over connections of which each may make so many changes in a second.
        let mut controls: Vec<Control> =
            (0..50).map(|_| Control::open(&scene.balancers[0])).collect();
        let ports: Vec<u16> = (10_000..11_000).collect();
        let begun = Instant::now();
        for (place, port) in ports.iter().enumerate() {
            controls[place % 50].say("register", *port, ",\"probe\":false");
        }
        wait_for("all to have registered", || {
            (scene.balancers[0].backends().len() == ports.len()).then_some(())
        });
        let here = begun.elapsed();
        scene.agree(&ports);
        eprintln!(
            "1,000 at once: known there after {here:?}, everywhere after {:?}",
            begun.elapsed()
        );
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn users_notice_nothing_of_whatever_befalls_etcd() {
    in_a_network(|| {
        let (mut scene, mut controls, ports) = Scene::with_ten(With::Nothing);
        let homes = |scene: &Scene, number: usize| -> Vec<Option<u16>> {
            (0..200).map(|user| scene.balancers[number].answer(40_000 + user)).collect()
        };
        wait_for("all to choose alike", || {
            let first = homes(&scene, 0);
            (1..NODES).all(|number| homes(&scene, number) == first).then_some(())
        });

        let pause: u64 = std::env::var("LB_ETCD_PAUSE").map_or(20, |text| text.parse().unwrap());
        let load = Load::begin();
        scene.etcd.signal(Signal::SIGSTOP);
        thread::sleep(Duration::from_secs(pause));
        scene.etcd.signal(Signal::SIGCONT);
        let back = Instant::now();
        wait_for("their words in etcd", || (scene.count("back") == ports.len()).then_some(()));
        eprintln!("paused for {pause} s, all written again after {:?}", back.elapsed());
        scene.agree(&ports);
        load.end("etcd paused");

        let load = Load::begin();
        (0..NODES).for_each(|number| scene.etcd.kill(number));
        thread::sleep(Duration::from_secs(3));
        (0..NODES).for_each(|number| scene.etcd.begin(number));
        scene.etcd.is_well();
        scene.agree(&ports);
        load.end("etcd killed and started");

        let load = Load::begin();
        scene.etcd.ask(&["del", "--prefix", "/lb/"]).expect("it is deleted");
        let gone = Instant::now();
        wait_for("their words in etcd", || (scene.count("back") == ports.len()).then_some(()));
        eprintln!("prefix deleted, all written again after {:?}", gone.elapsed());
        scene.agree(&ports);
        load.end("prefix deleted");

        let load = Load::begin();
        let leader = scene.etcd.leader();
        scene.etcd.kill(leader);
        let begun = Instant::now();
        serve(NEWCOMERS.start);
        controls[leader].say("register", NEWCOMERS.start, "");
        let more: Vec<u16> = [NEWCOMERS.start].into_iter().chain(ports).collect();
        scene.agree(&more);
        eprintln!("leader killed, a registration known everywhere after {:?}", begun.elapsed());
        load.end("leader killed");
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn a_drain_is_one_everywhere_and_its_sessions_are_counted_exactly() {
    in_a_network(|| {
        let scene = Scene::new();
        serve(9001);
        let mut control = Control::open(&scene.balancers[0]);
        control.register(9001);
        scene.agree(&[9001]);
        let mut users: Vec<TcpStream> = Vec::new();
        for (number, balancer) in scene.balancers.iter().enumerate() {
            for _ in 0..=number {
                let mut user = TcpStream::connect(balancer.at(8081)).unwrap();
                user.write_all(b"who\n").unwrap();
                let mut line = String::new();
                BufReader::new(&user).read_line(&mut line).unwrap();
                assert_eq!(line.trim(), "9001");
                users.push(user);
            }
        }
        control.say("drain", 9001, ",\"deadline_ms\":60000");
        let sum = format!("\"left\":{}", users.len());
        control.hear(&sum);
        for balancer in &scene.balancers {
            wait_for("it to drain everywhere", || {
                (balancer.backends().get(&9001)? == "draining").then_some(())
            });
        }
        while let Some(user) = users.pop() {
            drop(user);
            if !users.is_empty() {
                control.hear(&format!("\"left\":{},", users.len()));
            }
        }
        let line = control.hear("\"drained\"");
        assert!(!line.contains("\"cut\""), "none was ended: {line}");
        scene.agree(&[]);
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn an_operator_may_ask_any_balancer() {
    in_a_network(|| {
        let scene = Scene::new();
        serve(9001);
        let mut control = Control::open(&scene.balancers[0]);
        control.register(9001);
        scene.agree(&[9001]);
        let operate = |at: usize, verb: &str, more: &[&str]| {
            let arguments: Vec<&str> =
                [verb, "b1"].into_iter().chain(more.iter().copied()).collect();
            let done = scene.balancers[at].command(&arguments);
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        operate(1, "drain", &["--within", "never"]);
        for balancer in &scene.balancers {
            wait_for("it to drain everywhere", || {
                (balancer.backends().get(&9001)? == "draining").then_some(())
            });
        }
        assert!(control.hear("\"draining\"").contains("\"by\":\"operator\""));
        operate(2, "undrain", &[]);
        scene.agree(&[9001]);
        operate(2, "weight", &["7"]);
        control.hear("\"weight\":7");
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn a_backend_registers_at_the_next_balancer_when_its_own_has_died() {
    in_a_network(|| {
        let mut scene = Scene::new();
        let lb = scene.balancers[0].at(8080).to_string();
        let stays = ["backend", "--protocol", "tcp", "--port", "0", "--echo", "--lb", &lb];
        let _backend = Process::start(PROGRAM, &stays);
        for balancer in &scene.balancers {
            wait_for("it to be served", || (balancer.registered().len() == 1).then_some(()));
        }
        let begun = Instant::now();
        scene.balancers[0].process = None;
        // The balancer that it registers at sees it at another address, as all of them are on one host here.
        let [_, second, third] = &scene.balancers[..] else { panic!("three balancers") };
        wait_for("it to have registered elsewhere", || {
            (second.registered().len() == 2).then_some(())
        });
        eprintln!("its balancer has died: registered at another after {:?}", begun.elapsed());
        for balancer in [second, third] {
            wait_for("the other one to be gone", || {
                (balancer.registered().len() == 1).then_some(())
            });
        }
        eprintln!("and known nowhere else after {:?}", begun.elapsed());
        let keys = || (scene.count("node") == NODES - 1 && scene.count("back") == 1).then_some(());
        wait_for("its words to be gone", keys);
        let said = scene.balancers[0].check();
        assert!(said.contains("test, as n1; what is written is sealed"), "{said}");
        assert_eq!(said.matches(": version 3.").count(), NODES, "{said}");
        // What another balancer says of its tables is as old as its last report.
        wait_for("both to choose alike", || {
            let told = scene.balancers[1].told();
            assert!(told.contains("store live") && told.contains("n3~"), "{told}");
            (!told.contains("differs")).then_some(())
        });
        let health = |at: usize| {
            let admin = scene.balancers[at].at(8084).to_string();
            Command::new(PROGRAM)
                .args(["health", "--admin", &admin])
                .output()
                .unwrap()
                .status
                .code()
        };
        assert_eq!([health(1), health(0)], [Some(0), Some(2)]);
    });
}
