//! An etcd that asks who comes: users of its own, and certificates.

use std::time::Instant;

use crate::backend::{Control, serve};
use crate::members::With;
use crate::scene::{Load, Scene, in_a_network};
use crate::wait::wait_for;
use crate::{NEWCOMERS, NODES};

/// One more backend at each of the balancers: each has something to write, and something to hear.
fn newcomers(controls: &mut [Control], ports: &mut Vec<u16>) {
    for control in controls {
        let is_new = |port: &u16| !ports.contains(port);
        let port = NEWCOMERS.clone().find(is_new).expect("there are more than enough");
        serve(port);
        control.register(port);
        ports.push(port);
        ports.sort_unstable();
    }
}

fn lost(scene: &Scene) -> Vec<u64> {
    let lost = |status: serde_json::Value| status["cluster"]["lost"].as_u64().expect("a number");
    scene.balancers.iter().map(|balancer| lost(balancer.status())).collect()
}

#[test]
#[ignore = "needs root and etcd"]
fn tokens_and_rights_may_be_lost_and_members_restart() {
    in_a_network(|| {
        let (mut scene, mut controls, mut ports) = Scene::with_ten(With::Users);
        let load = Load::begin();
        let before = lost(&scene);
        scene.etcd.ends_tokens();
        let ended = Instant::now();
        newcomers(&mut controls, &mut ports);
        scene.is_mended("tokens lost", &ports, ended);
        let after = lost(&scene);
        let have_noticed = before.iter().zip(&after).all(|(before, after)| after > before);
        assert!(have_noticed, "their tokens had ended: {before:?} {after:?}");
        load.end("tokens lost");

        let load = Load::begin();
        for number in 0..NODES {
            scene.etcd.kill(number);
            scene.etcd.begin(number);
            scene.etcd.is_well();
        }
        let well = Instant::now();
        newcomers(&mut controls, &mut ports);
        scene.is_mended("members restarted", &ports, well);
        load.end("members restarted");

        let load = Load::begin();
        let role = ["lb", "/lb/test/", "--prefix=true"];
        scene.etcd.ask(&[&["role", "revoke-permission"], &role[..]].concat()).expect("it is done");
        for balancer in &scene.balancers {
            wait_for("it to be told why", || {
                balancer.told().contains("permission denied").then_some(())
            });
        }
        newcomers(&mut controls, &mut ports);
        let grant = ["role", "grant-permission", "--prefix=true", "lb", "readwrite", "/lb/test/"];
        scene.etcd.ask(&grant).expect("it is done");
        scene.is_mended("rights lost", &ports, Instant::now());
        load.end("rights lost");
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn certificates_open_the_store_and_one_that_does_not_is_told_of() {
    in_a_network(|| {
        let (mut scene, mut controls, mut ports) = Scene::with_ten(With::Certificates);
        newcomers(&mut controls, &mut ports);
        scene.agree(&ports);
        let good = scene.balancers[0].check();
        assert_eq!(good.matches(": version 3.").count(), NODES, "{good}");
        let named = |text: &str| text.replace("lb.pem", "named.pem").replace("lb.key", "named.key");
        let said = scene.balancers[0].check_with(named);
        assert_eq!(said.matches("CommonName of client").count(), NODES, "{said}");
        let without = |text: &str| {
            let lines = text.lines();
            lines
                .filter(|it| !it.starts_with("cert_") && !it.starts_with("key_"))
                .collect::<Vec<_>>()
                .join("\n")
        };
        let said = scene.balancers[0].check_with(without);
        assert!(!said.contains(": version 3."), "{said}");
        assert!(said.contains("received fatal alert"), "why is told, too: {said}");

        // A member whose certificate is for servers alone cannot come to itself.
        let load = Load::begin();
        scene.etcd.certificate = "serves";
        scene.etcd.kill(0);
        scene.etcd.begin(0);
        scene.etcd.is_well();
        let well = Instant::now();
        newcomers(&mut controls, &mut ports);
        scene.is_mended("a member of no use", &ports, well);
        let said = scene.balancers[0].check();
        assert_eq!(said.matches(": version 3.").count(), NODES - 1, "{said}");
        load.end("a member of no use");
    });
}
