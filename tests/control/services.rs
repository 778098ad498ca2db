//! A message about one built-in service leaves the others alone, all the way from the control door to
//! the worker and back.

use std::net::SocketAddr;

use lb::base::time::Now;
use lb::cluster::{Protocol, ServiceId, Standing};
use serde_json::{Value, json};

use crate::harness::{Backend, Core, data_port};
use crate::wait::wait_for;

/// Registers one port for every service.
fn register_for_all(core: &Core, port: u16) -> Backend {
    let mut backend = core.connect();
    for protocol in Protocol::ALL {
        assert_eq!(backend.register(protocol, port)["ack"], "successful");
        core.worker.wait_for_rotation(protocol, &[port]);
    }
    backend
}

/// The services with this port in their rotation.
fn serving(core: &Core) -> Vec<Protocol> {
    let serves = |protocol: &Protocol| !core.worker.rotation(*protocol).is_empty();
    Protocol::ALL.into_iter().filter(serves).collect()
}

fn standing(core: &Core, protocol: Protocol) -> Option<Standing> {
    let service = ServiceId::built_in(protocol);
    let all = core.worker.backends();
    all.iter().find(|backend| backend.service == service).map(|backend| backend.standing)
}

#[test]
fn one_port_is_a_backend_of_each_service_and_leaves_them_one_by_one() {
    for cmd in ["drain", "unregister"] {
        for protocol in Protocol::ALL {
            let core = Core::start(|_| {});
            let (_listener, port) = data_port();
            let mut backend = register_for_all(&core, port);
            for slot in core.worker.metrics.backends.iter() {
                slot.active.set(1);
            }
            let answer = backend.ask(&json!({"cmd": cmd, "protocol": protocol, "port": port}));
            assert_eq!(answer["ack"], "successful", "{answer}");
            assert_eq!((&answer["cmd"], &answer["protocol"]), (&json!(cmd), &json!(protocol)));
            core.worker.wait_for_rotation(protocol, &[]);
            let others = Protocol::ALL.into_iter().filter(|other| *other != protocol);
            assert_eq!(serving(&core), others.collect::<Vec<_>>());
            let stands = (cmd == "drain").then_some(Standing::Draining);
            assert_eq!(standing(&core, protocol), stands);
        }
    }
}

#[test]
fn a_session_is_listed_with_the_protocol_of_its_service() {
    let core = Core::start(|_| {});
    let client: SocketAddr = "192.0.2.1:7".parse().unwrap();
    core.worker.with_shard(|shard| {
        for protocol in Protocol::ALL {
            shard.open(ServiceId::built_in(protocol), client, Now::read()).unwrap();
        }
    });
    for protocol in Protocol::ALL {
        let (code, text) = core.get(&format!("/sessions?protocol={protocol}"));
        assert_eq!(code, 200);
        let page: Value = serde_json::from_str(&text).unwrap();
        let sessions = page["sessions"].as_array().unwrap();
        assert_eq!(sessions.len(), 1, "{text}");
        assert_eq!(sessions[0]["protocol"], json!(protocol));
    }
}

#[test]
fn a_backend_is_shown_with_the_protocol_and_the_share_that_it_has_in_its_service() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut backend = register_for_all(&core, port);
    backend.register(Protocol::Udp, 9);
    wait_for("another UDP backend", || (core.worker.backends().len() == 4).then_some(()));
    let (_, text) = core.get("/status");
    let status: Value = serde_json::from_str(&text).unwrap();
    let all = status["backends"].as_array().unwrap();
    let shown: Vec<_> =
        all.iter().map(|it| (&it["protocol"], &it["turns"], &it["round"])).collect();
    let (one, two) = (json!(1), json!(2));
    let (tcp, udp, api) = (json!("tcp"), json!("udp"), json!("api"));
    assert_eq!(
        shown,
        [(&tcp, &one, &one), (&udp, &one, &two), (&api, &one, &one), (&udp, &one, &two)]
    );
}
