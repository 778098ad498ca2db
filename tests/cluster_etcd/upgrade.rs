//! A balancer of the cluster that goes on as another process.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::NODES;
use crate::backend::{Control, serve};
use crate::balancer::Balancer;
use crate::scene::{Load, Scene, in_a_network};
use crate::wait::{PATIENCE, wait_for};

/// Registered at the balancer that is upgraded: one that serves, and one that drains,
const SERVES: u16 = 9001;
const DRAINS: u16 = 9002;
/// and those of the two others.
const OTHERS: [u16; 2] = [9003, 9004];

/// A user who stays.
struct Session {
    reader: BufReader<TcpStream>,
    home: u16,
}

impl Session {
    fn begin(balancer: &Balancer) -> Session {
        let stream = TcpStream::connect(balancer.at(8081)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut session = Session { reader: BufReader::new(stream), home: 0 };
        session.home = session.asks();
        session
    }

    fn asks(&mut self) -> u16 {
        self.reader.get_ref().write_all(b"who\n").unwrap();
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim().parse().unwrap_or_else(|_| panic!("a session on {} has ended", self.home))
    }
}

/// Ten users through each balancer, of whom each backend has some.
fn sessions(scene: &Scene) -> Vec<Session> {
    wait_for("users on each backend through each balancer", || {
        let begin = |balancer| Vec::from_iter((0..10).map(|_| Session::begin(balancer)));
        let all: Vec<Vec<Session>> = scene.balancers.iter().map(begin).collect();
        let has = |of: &[Session], port| of.iter().any(|session| session.home == port);
        let is_mixed = all.iter().all(|of| has(of, SERVES) && has(of, DRAINS));
        is_mixed.then(|| all.into_iter().flatten().collect())
    })
}

/// The process that serves, as it is called in the store.
fn name(balancer: &Balancer) -> String {
    balancer.status()["cluster"]["node"].as_str().expect("a name").to_owned()
}

/// What each balancer must say of each backend for as long as nobody leaves.
fn all_are_there(number: usize) {
    let known = Balancer::known(number).backends();
    let states =
        [SERVES, DRAINS, OTHERS[0], OTHERS[1]].map(|it| known.get(&it).map(String::as_str));
    let serving = Some("serving");
    assert_eq!(states, [serving, Some("draining"), serving, serving], "balancer {number}");
}

/// Goes on as another process, until the store has forgotten the one before.
fn goes_on(scene: &mut Scene) {
    let before = name(&scene.balancers[0]);
    scene.balancers[0].upgrade();
    let after = name(&scene.balancers[0]);
    assert_ne!(before, after, "each process has keys of its own");
    for port in [SERVES, DRAINS] {
        let end = format!("/tcp/10.77.0.9:{port}");
        wait_for("the new process's word", || {
            let keys = scene.keys("back");
            keys.into_iter().find(|it| it.contains(&after) && it.ends_with(&end))
        });
    }
    for balancer in &scene.balancers {
        wait_for("the process before to be forgotten", || {
            (balancer.status()["cluster"]["nodes"].as_array()?.len() == NODES).then_some(())
        });
    }
    wait_for("its words to be gone", || {
        scene.keys("back").iter().all(|key| !key.contains(&before)).then_some(())
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn a_balancer_is_upgraded_and_its_backends_and_users_notice_nothing_anywhere() {
    in_a_network(|| {
        let mut scene = Scene::new();
        [SERVES, DRAINS, OTHERS[0], OTHERS[1]].into_iter().for_each(serve);
        let mut controls: Vec<Control> = scene.balancers.iter().map(Control::open).collect();
        for (at, port) in [(0, SERVES), (0, DRAINS), (1, OTHERS[0]), (2, OTHERS[1])] {
            controls[at].register(port);
        }
        scene.agree(&[SERVES, DRAINS, OTHERS[0], OTHERS[1]]);
        let mut sessions = sessions(&scene);
        let drained = sessions.iter().filter(|session| session.home == DRAINS).count();
        controls[0].say("drain", DRAINS, ",\"deadline_ms\":300000");
        controls[0].hear(&format!("\"left\":{drained},"));
        for number in 0..NODES {
            wait_for("it to drain everywhere", || {
                (scene.balancers[number].backends().get(&DRAINS)? == "draining").then_some(())
            });
        }
        let (load, is_over) = (Load::begin(), AtomicBool::new(false));
        thread::scope(|scope| {
            for number in 0..NODES {
                let is_over = &is_over;
                scope.spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        all_are_there(number);
                    }
                });
            }
            goes_on(&mut scene);
            is_over.store(true, Ordering::Relaxed);
        });
        load.end("upgraded");
        assert!(sessions.iter_mut().all(|session| session.asks() == session.home));
        let (mut parting, stay): (Vec<Session>, Vec<Session>) =
            sessions.into_iter().partition(|session| session.home == DRAINS);
        while let Some(session) = parting.pop() {
            drop(session);
            if !parting.is_empty() {
                controls[0].hear(&format!("\"left\":{},", parting.len()));
            }
        }
        let begun = Instant::now();
        let line = controls[0].hear("\"drained\"");
        eprintln!("drained after {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(10), "nobody waits for the process before");
        assert!(!line.contains("\"cut\""), "none was ended: {line}");
        scene.agree(&[SERVES, OTHERS[0], OTHERS[1]]);
        drop(stay);
    });
}
