//! An etcd that has no room left.

use std::time::Instant;

use crate::NEWCOMERS;
use crate::backend::serve;
use crate::members::With;
use crate::scene::{Load, Scene, in_a_network};
use crate::wait::wait_for;

/// Bytes of the database of each member, at most.
const QUOTA: u64 = 4 << 20;
/// What it is filled with at a time.
const PART: usize = 100_000;

#[test]
#[ignore = "needs root and etcd"]
fn a_full_store_takes_nothing_and_nobody_but_the_operator_notices() {
    in_a_network(|| {
        let (scene, mut controls, ports) = Scene::with_ten(With::Quota(QUOTA));
        let load = Load::begin();
        let part = "x".repeat(PART);
        let fits =
            |number: u64| scene.etcd.ask(&["put", &format!("/fill/{number}"), &part]).is_some();
        let parts = (0..2 * QUOTA / PART as u64).take_while(|number| fits(*number)).count();
        let alarms = scene.etcd.ask(&["alarm", "list"]).expect("they are told");
        assert!(alarms.contains("NOSPACE"), "{parts} parts fit: {alarms:?}");

        serve(NEWCOMERS.start);
        controls[0].register(NEWCOMERS.start);
        let here = &scene.balancers[0];
        let answer = here.try_answer_at(8082, 30_000).expect("it is served where it registered");
        assert_eq!(answer, NEWCOMERS.start);
        let told = wait_for("what is not written", || {
            Some(here.told()).filter(|it| it.contains("NOSPACE"))
        });
        assert!(
            told.contains("1 backends of this balancer that the others have yet to hear"),
            "{told}"
        );
        assert!(scene.balancers[1..].iter().all(|other| other.backends().keys().eq(&ports)));
        let said = here.check();
        assert!(said.contains("complains of NOSPACE"), "{said}");

        scene.etcd.ask(&["del", "--prefix", "/fill/"]).expect("deleting is possible");
        scene.etcd.ask(&["compact", &scene.etcd.revision()]).expect("so is this");
        scene.etcd.ask(&["defrag"]).expect("and this");
        scene.etcd.ask(&["alarm", "disarm"]).expect("there was one");
        let well = Instant::now();
        let all: Vec<u16> = [NEWCOMERS.start].into_iter().chain(ports).collect();
        scene.is_mended("etcd was full", &all, well);
        wait_for("nothing to be told", || (!here.told().contains("NOSPACE")).then_some(()));
        load.end("etcd was full");
    });
}
