//! A balancer that was away while etcd forgot what it has missed.

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::NEWCOMERS;
use crate::backend::serve;
use crate::members::{Etcd, With};
use crate::scene::{Load, Scene, in_a_network, ip, way_of};
use crate::wait::wait_for;

/// Longer than its lease lasts, and shorter than anybody waits for its backends.
const CUT_OFF: Duration = Duration::from_secs(12);
/// What is written while a balancer stands still: a watch is behind when more than 1,024 answers wait for it, beyond
/// what is on its way.
const PARTS: usize = 2400;
const PART: usize = 4000;

fn compact(scene: &Scene) {
    scene.etcd.ask(&["compact", &scene.etcd.revision()]).expect("it is compacted");
}

#[test]
#[ignore = "needs root and etcd"]
fn who_was_cut_off_learns_what_the_store_has_forgotten() {
    in_a_network(|| {
        let (scene, mut controls, ports) = Scene::with_ten(With::Nothing);
        let [leaves, comes] = [NEWCOMERS.start, NEWCOMERS.start + 1];
        [leaves, comes].into_iter().for_each(serve);
        controls[0].register(leaves);
        let with = |port| -> Vec<u16> { [port].into_iter().chain(ports.iter().copied()).collect() };
        scene.agree(&with(leaves));
        let load = Load::begin();
        let (cut, away) = (Instant::now(), &scene.balancers[2]);
        ip(&format!("addr del {}/32 dev lo", way_of(2)));
        controls[0].say("unregister", leaves, "");
        controls[0].hear("\"unregister\"");
        controls[1].register(comes);
        for balancer in &scene.balancers[..2] {
            wait_for("it to be known", || {
                balancer.backends().keys().eq(&with(comes)).then_some(())
            });
        }
        compact(&scene);
        thread::sleep(CUT_OFF.saturating_sub(cut.elapsed()));
        assert!(away.backends().keys().eq(&with(leaves)), "it goes on with what it knows");
        assert_ne!(away.status()["cluster"]["store"], "live");
        ip(&format!("addr add {}/32 dev lo", way_of(2)));
        scene.is_mended("cut off", &with(comes), Instant::now());
        load.end("cut off");
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn who_stood_still_learns_what_the_store_has_forgotten() {
    in_a_network(|| {
        let (scene, mut controls, ports) = Scene::with_ten(With::Nothing);
        let load = Load::begin();
        let (stood, still) = (Instant::now(), &scene.balancers[2]);
        still.signal(Signal::SIGSTOP);
        // Nobody of the cluster can have written this.
        Etcd::put_often("/lb/test/1/none", &"x".repeat(PART), PARTS);
        scene.etcd.ask(&["del", "/lb/test/1/none"]).expect("it is deleted");
        wait_for("its watch to be behind", || (Etcd::slow_watches() > 0).then_some(()));
        serve(NEWCOMERS.start);
        controls[0].register(NEWCOMERS.start);
        wait_for("it to be known", || scene.balancers[1].backends().get(&NEWCOMERS.start).cloned());
        compact(&scene);
        still.signal(Signal::SIGCONT);
        let all: Vec<u16> = [NEWCOMERS.start].into_iter().chain(ports).collect();
        let (took, back) = (stood.elapsed(), Instant::now());
        scene.is_mended(&format!("stood still for {took:?}"), &all, back);
        load.end("stood still");
    });
}
