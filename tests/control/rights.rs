//! Which services a backend may join: with which secret, and from which network.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use lb::cluster::{Protocol, ServiceId};
use lb::config::Config;
use lb::config::services::ServiceConfig;
use lb::control::auth::mac;
use serde_json::{Value, json};

use crate::harness::{Backend, Core, assert_failed};
use crate::wait::wait_for;

const OF_REDIS: &str = "the secret of redis alone";
const OF_CACHE: &str = "the secret of the caches";
const GLOBAL: &str = "the secret of all others";

/// A core with the services redis and cache, which have secrets of their own, and the service open,
/// which has none. The folder with the secrets is removed with it.
struct Guarded {
    core: Core,
    folder: PathBuf,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn guarded(
    name: &str,
    change: impl FnOnce(&mut Config, &dyn Fn(&str) -> Option<PathBuf>),
) -> Guarded {
    let folder = std::env::temp_dir().join(format!("lb-rights-{name}-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let file = |secret: &str| {
        let path = folder.join(secret.replace(' ', "-"));
        std::fs::write(&path, format!("{secret}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        Some(path)
    };
    let core = Core::start(|config| {
        let service = |name| ServiceConfig::new(name, Protocol::Udp);
        config.set_services(["redis", "cache", "open"].map(service).into());
        config.services[0].secret_file = file(OF_REDIS);
        config.services[1].secret_file = file(OF_CACHE);
        change(config, &file);
    });
    Guarded { core, folder }
}

/// Answers the challenge; the answer to that.
fn prove(backend: &mut Backend, secret: &str, id: &str) -> Value {
    let challenge = backend.hear().unwrap();
    let nonce = challenge["nonce"].as_str().expect("a challenge").to_owned();
    let mac = mac(secret.as_bytes(), &nonce, id);
    backend.ask(&json!({"cmd": "auth", "id": id, "mac": mac}))
}

fn proved(core: &Core, secret: &str, id: &str) -> Backend {
    let mut backend = core.connect();
    assert_eq!(prove(&mut backend, secret, id)["ack"], "successful");
    backend
}

fn register(backend: &mut Backend, service: &str, port: u16) -> Value {
    backend.ask(&json!({"cmd": "register", "service": service, "port": port}))
}

/// The services that have a backend.
fn joined(core: &Core) -> Vec<ServiceId> {
    core.worker.backends().iter().map(|backend| backend.service).collect()
}

#[test]
fn rule_12_the_secret_of_one_service_does_not_open_another() {
    let Guarded { core, .. } = &guarded("apart", |config, file| {
        config.control.secret_file = file(GLOBAL);
    });
    for (secret, own) in [(OF_REDIS, "redis"), (OF_CACHE, "cache"), (GLOBAL, "open")] {
        let mut backend = proved(core, secret, "web");
        for service in ["redis", "cache", "open", "udp"] {
            let answer = register(&mut backend, service, 9000);
            if service == own || (own, service) == ("open", "udp") {
                assert_eq!(answer["ack"], "successful", "{answer}");
            } else {
                let said = format!("the secret that was proved is not for service {service}");
                assert_failed(&answer, &said);
                assert_eq!(answer["service"], service);
            }
        }
    }
    let (_, metrics) = core.get("/metrics");
    assert!(metrics.contains("lb_control_registrations_refused_rights_total 8\n"), "{metrics}");
}

#[test]
fn rule_12_a_wrong_secret_never_joins_anything() {
    for global in [false, true] {
        let name = if global { "wrong-global" } else { "wrong" };
        let Guarded { core, .. } = &guarded(name, |config, file| {
            config.control.secret_file = file(GLOBAL).filter(|_| global);
        });
        for wrong in ["a secret that is in no file", ""] {
            let mut backend = core.connect();
            assert_failed(&prove(&mut backend, wrong, "web"), "the mac is wrong");
            backend.say(&json!({"cmd": "register", "service": "open", "port": 9000}).to_string());
            assert_eq!(backend.hear(), None, "it was sent away");
        }
        let mut backend = core.connect();
        backend.hear().expect("a challenge");
        backend.say(r#"{"cmd":"auth","id":"web"}"#);
        assert_failed(&backend.hear().unwrap(), "mac is missing");
        assert_eq!(backend.hear(), None);
        assert_eq!(joined(core), []);
    }
}

#[test]
fn rule_12_every_connection_is_challenged_and_one_without_a_proof_joins_what_needs_none() {
    let Guarded { core, .. } = &guarded("optional", |_, _| {});
    let mut backend = core.connect();
    assert_eq!(backend.hear().unwrap()["cmd"], "auth");
    assert_failed(
        &register(&mut backend, "redis", 9000),
        "only backends that have proved its secret",
    );
    assert_eq!(register(&mut backend, "open", 9000)["ack"], "successful");
    assert_eq!(register(&mut backend, "udp", 9001)["ack"], "successful");
    wait_for("both", || (joined(core) == [ServiceId(1), ServiceId(5)]).then_some(()));
    let mut silent = core.connect();
    silent.hear().expect("a challenge");
    assert_eq!(silent.hear().expect("it may stay")["cmd"], "hello", "after its time is up");
    assert_eq!(register(&mut silent, "open", 9002)["ack"], "successful");
}

#[test]
fn rule_12_a_proof_is_demanded_where_nothing_can_be_joined_without() {
    let Guarded { core, .. } = &guarded("demanded", |config, _| {
        (config.listen.tcp, config.listen.udp, config.listen.api) = (None, None, None);
        config.services[2].register = false;
    });
    let mut backend = core.connect();
    backend.hear().expect("a challenge");
    assert_failed(&register(&mut backend, "redis", 9000), "prove the secret first");
    assert_eq!(backend.hear(), None);
}

#[test]
fn rule_12_the_same_name_with_the_secret_of_another_service_is_another_owner() {
    let Guarded { core, .. } = &guarded("owners", |_, _| {});
    let mut one = proved(core, OF_REDIS, "web");
    let mut same = proved(core, OF_REDIS, "web");
    let mut other = proved(core, OF_CACHE, "web");
    assert_eq!(register(&mut one, "redis", 9000)["ack"], "successful");
    assert_eq!(register(&mut one, "open", 9000)["ack"], "successful");
    let seen = |backend: &mut Backend| {
        backend.ask(&json!({"cmd": "list"}))["backends"].as_array().unwrap().len()
    };
    assert_eq!([seen(&mut one), seen(&mut same), seen(&mut other)], [2, 2, 0]);
    for cmd in ["unregister", "drain"] {
        let message = json!({"cmd": cmd, "service": "open", "port": 9000});
        assert_failed(&other.ask(&message), "is not registered");
    }
    assert_failed(&register(&mut other, "open", 9000), "is registered over another connection");
    assert_eq!(register(&mut other, "cache", 9000)["ack"], "successful");
    assert_eq!([seen(&mut one), seen(&mut same), seen(&mut other)], [2, 2, 1]);
}

#[test]
fn rule_12_a_list_of_its_own_takes_the_place_of_the_global_one() {
    let network = |text: &str| vec![text.parse().unwrap()];
    let Guarded { core, .. } = &guarded("lists", |config, _| {
        config.control.allow = network("127.0.1.0/24");
        config.services[0].allow = Some(network("127.0.2.0/24"));
        config.services[2].allow = Some(network("127.0.3.0/24"));
    });
    let from = |last: [u8; 2]| core.connect_from(IpAddr::from([127, 0, last[0], last[1]]));
    let mut near = from([1, 1]);
    near.hear().expect("a challenge");
    assert_eq!(register(&mut near, "udp", 9000)["ack"], "successful");
    assert_failed(
        &register(&mut near, "open", 9000),
        "service open takes no registrations from 127.0.1.1",
    );
    let mut listed = from([3, 1]);
    listed.hear().expect("a challenge");
    assert_eq!(register(&mut listed, "open", 9000)["ack"], "successful");
    assert_failed(
        &register(&mut listed, "udp", 9000),
        "service udp takes no registrations from 127.0.3.1",
    );
    for (place, taken) in [([2, 1], "redis"), ([1, 2], "cache")] {
        let mut backend = from(place);
        let secret = if taken == "redis" { OF_REDIS } else { OF_CACHE };
        assert_eq!(prove(&mut backend, secret, "web")["ack"], "successful");
        assert_eq!(register(&mut backend, taken, 9000)["ack"], "successful");
    }
    let mut elsewhere = from([1, 3]);
    assert_eq!(prove(&mut elsewhere, OF_REDIS, "web")["ack"], "successful");
    assert_failed(
        &register(&mut elsewhere, "redis", 9001),
        "takes no registrations from 127.0.1.3",
    );
    assert_eq!(from([4, 1]).hear(), None, "no service takes it");
}
