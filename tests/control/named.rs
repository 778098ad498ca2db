//! Services by their names, from the control door to what operators are shown: whose backend a message
//! means, what is answered, and what is refused.

use std::net::TcpListener;
use std::num::NonZeroU32;
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::{BackendId, Barrier, OnBackendLoss, Policy, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::config::services::{GroupShare, ServiceConfig};
use serde_json::{Value, json};

use crate::harness::{Backend, Core, assert_failed, data_port};
use crate::wait::wait_for;

/// The ids of the services of [`core`].
const CACHE: ServiceId = ServiceId(3);
const REDIS: ServiceId = ServiceId(4);
const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);

/// A core with more services than the built-in ones.
fn core() -> Core {
    core_with(|_| {})
}

fn core_with(change: impl FnOnce(&mut Config)) -> Core {
    Core::start(|config| {
        let named = [("cache", Protocol::Tcp), ("redis", Protocol::Tcp), ("dns", Protocol::Udp)];
        config
            .set_services(named.map(|(name, protocol)| ServiceConfig::new(name, protocol)).into());
        change(config);
    })
}

/// The ports of a service's backends, with their standing.
fn members(core: &Core, service: ServiceId) -> Vec<(u16, Standing)> {
    let all = core.worker.backends().into_iter().filter(|it| it.service == service);
    all.map(|it| (it.address.port(), it.standing)).collect()
}

#[track_caller]
fn wait_for_members(core: &Core, service: ServiceId, wanted: &[(u16, Standing)]) {
    wait_for(&format!("{wanted:?} in {service:?}"), || {
        (members(core, service) == wanted).then_some(())
    });
}

/// Registers one port for both named TCP services and the built-in one.
fn register_for_three(core: &Core) -> (Backend, TcpListener, u16) {
    let (listener, port) = data_port();
    let mut backend = core.connect();
    for message in [
        json!({"cmd": "register", "protocol": "tcp", "port": port}),
        json!({"cmd": "register", "service": "cache", "port": port}),
        json!({"cmd": "register", "service": "redis", "protocol": "tcp", "port": port}),
    ] {
        let answer = backend.ask(&message);
        assert_eq!(answer["ack"], "successful", "{answer}");
    }
    for service in [TCP, CACHE, REDIS] {
        wait_for_members(core, service, &[(port, Standing::Serving)]);
    }
    (backend, listener, port)
}

#[test]
fn rule_1_without_a_service_the_built_in_one_of_the_protocol_is_meant_and_answers_name_it() {
    let core = core();
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    let answer = backend.register(Protocol::Tcp, port);
    assert_eq!((&answer["service"], &answer["protocol"]), (&json!("tcp"), &json!("tcp")));
    wait_for_members(&core, TCP, &[(port, Standing::Serving)]);
    assert_eq!(core.worker.backends().len(), 1);

    let answer = backend.ask(&json!({"cmd": "list"}));
    assert_eq!(answer["backends"][0]["service"], "tcp", "{answer}");
    for cmd in ["register", "drain", "unregister"] {
        let answer = backend.ask(&json!({"cmd": cmd, "service": "tcp", "port": port}));
        assert_eq!((&answer["ack"], &answer["service"]), (&json!("successful"), &json!("tcp")));
        assert_eq!(answer["protocol"], "tcp");
    }
    let answer = backend.ask(&json!({"cmd": "unregister", "protocol": "tcp", "port": port}));
    assert_failed(&answer, "is not registered");
    assert_eq!((&answer["service"], &answer["port"]), (&json!("tcp"), &json!(port)));
}

#[test]
fn one_port_serves_several_services_and_leaves_them_one_by_one() {
    for cmd in ["drain", "unregister"] {
        let core = core();
        let (mut backend, _listener, port) = register_for_three(&core);
        for slot in core.worker.metrics.backends.iter() {
            slot.active.set(1);
        }
        let answer = backend.ask(&json!({"cmd": cmd, "service": "redis", "port": port}));
        assert_eq!(answer["ack"], "successful", "{answer}");
        assert_eq!((&answer["service"], &answer["left"]), (&json!("redis"), &json!(1)));
        let rest = [(port, Standing::Draining)];
        wait_for_members(&core, REDIS, if cmd == "drain" { &rest } else { &[] });
        for service in [TCP, CACHE] {
            assert_eq!(members(&core, service), [(port, Standing::Serving)]);
        }
    }
}

#[test]
fn a_drain_reports_for_the_service_that_drains() {
    let core = core();
    let (mut backend, _listener, port) = register_for_three(&core);
    let answer = backend.ask(&json!({"cmd": "drain", "service": "redis", "port": port}));
    assert_eq!(answer["service"], "redis");
    let over = std::iter::from_fn(|| backend.hear()).find(|heard| heard["event"] == "drained");
    let over = over.unwrap();
    assert_eq!((&over["service"], &over["port"]), (&json!("redis"), &json!(port)));
}

#[test]
fn a_list_is_of_one_service_or_of_all() {
    let core = core();
    let (mut backend, _listener, _) = register_for_three(&core);
    let mut listed = |message: Value| -> Vec<String> {
        let answer = backend.ask(&message);
        let all = answer["backends"].as_array().expect("a list").iter();
        all.map(|it| it["service"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(listed(json!({"cmd": "list"})), ["tcp", "cache", "redis"]);
    assert_eq!(listed(json!({"cmd": "list", "service": "redis"})), ["redis"]);
    assert_eq!(listed(json!({"cmd": "list", "service": "dns"})), [""; 0]);
    assert_failed(
        &backend.ask(&json!({"cmd": "list", "service": "dms"})),
        "name among the 6 is dns",
    );
}

#[test]
fn a_list_of_one_service_continues_with_that_service() {
    let core = core();
    let mut backend = core.connect();
    for port in 1..=30 {
        for service in ["dns", "udp"] {
            backend.say(&json!({"cmd": "register", "service": service, "port": port}).to_string());
            assert_eq!(backend.hear().unwrap()["ack"], "successful");
        }
    }
    backend.say(&json!({"cmd": "list", "service": "dns"}).to_string());
    let mut ports = Vec::new();
    loop {
        let page = backend.hear().unwrap();
        if page["cmd"] == "hello" {
            continue;
        }
        for listed in page["backends"].as_array().unwrap() {
            assert_eq!(listed["service"], "dns");
            ports.push(listed["address"].as_str().unwrap().to_owned());
        }
        if page["more"] == false {
            break;
        }
    }
    assert_eq!(ports, (1..=30).map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>());
}

#[test]
fn a_backend_may_want_proxy_headers_and_one_of_datagrams_may_not() {
    use std::io::Read;
    let core = core();
    let (listener, port) = data_port();
    let mut backend = core.connect();
    let wants =
        |proxy: Value| json!({"cmd": "register", "service": "redis", "port": port, "proxy": proxy});
    for proxy in [json!(2), json!(false), json!(2)] {
        let wanted = proxy == 2;
        let answer = backend.ask(&wants(proxy));
        assert_eq!(answer["ack"], "successful", "{answer}");
        assert_eq!(answer.get("proxy"), None, "the answer is what it always was");
        wait_for("the workers to know", || {
            let snapshot = core.worker.snapshot();
            snapshot.pool(REDIS)?.backends.iter().any(|it| it.proxy == wanted).then_some(())
        });
        // The port was tried as it wants to be.
        let mut tried = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut tried).unwrap();
        let header = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
        assert_eq!(tried, if wanted { &header[..] } else { b"" });
        let status: Value = serde_json::from_str(&core.get("/status").1).unwrap();
        let shown = &status["backends"][0]["proxy"];
        assert_eq!(*shown, if wanted { json!(2) } else { Value::Null });
    }
    let answer = backend.ask(&json!({"cmd": "register", "service": "dns", "port": 1, "proxy": 2}));
    assert_failed(&answer, "datagrams carry no PROXY header: leave proxy out");
    let answer = backend.ask(&wants(json!(1)));
    assert_failed(
        &answer,
        "proxy must be 2, the version of the PROXY header, or false, or left out",
    );
}

/// Whether somebody has connected to the port.
fn was_tried(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    listener.accept().is_ok()
}

#[test]
fn a_backend_joins_without_a_trial_if_it_or_its_service_says_so() {
    let core = core_with(|config| config.services[1].probe = false);
    let mut backend = core.connect();
    for (service, probe, tried) in [
        ("cache", json!(null), true),
        ("cache", json!(true), true),
        ("cache", json!(false), false),
        ("redis", json!(null), false),
        // What the file says stands.
        ("redis", json!(true), false),
    ] {
        let (listener, port) = data_port();
        let message = json!({"cmd": "register", "service": service, "port": port, "probe": probe});
        let answer = backend.ask(&message);
        assert_eq!(answer["ack"], "successful", "{answer}");
        assert_eq!(was_tried(&listener), tried, "{message}");
        drop(listener);
        let again = backend.ask(&message);
        assert_eq!(again["ack"] == "successful", !tried, "nobody listens there: {again}");
    }
    let answer =
        backend.ask(&json!({"cmd": "register", "service": "cache", "port": 1, "probe": 0}));
    assert_failed(&answer, "probe must be true or false");
}

#[test]
fn a_service_that_does_not_exist_is_refused_with_the_nearest_name() {
    let core = core();
    let mut backend = core.connect();
    for cmd in ["register", "drain", "unregister"] {
        let answer = backend.ask(&json!({"cmd": cmd, "service": "redsi", "port": 9}));
        assert_failed(&answer, "there is no service redsi; the nearest name among the 6 is redis");
        assert_eq!((&answer["service"], &answer["cmd"]), (&json!("redsi"), &json!(cmd)));
    }
    let answer = backend.ask(&json!({"cmd": "register", "service": "postgres", "port": 9}));
    let said =
        "there is no service postgres among the 6 of this balancer, and none with a name like it";
    assert_failed(&answer, said);
    assert!(core.worker.backends().is_empty());
}

#[test]
fn a_protocol_that_is_not_the_services_is_refused_and_both_are_named() {
    let core = core();
    let mut backend = core.connect();
    for cmd in ["register", "drain", "unregister", "list"] {
        let message = json!({"cmd": cmd, "service": "dns", "protocol": "tcp", "port": 9});
        let answer = backend.ask(&message);
        assert_failed(&answer, "the protocol of service dns is udp, not tcp");
        assert_eq!(answer["service"], "dns");
    }
    assert!(core.worker.backends().is_empty());
}

#[test]
fn a_port_of_one_service_may_be_registered_for_another_by_somebody_else() {
    let core = core();
    let (_listener, port) = data_port();
    let (mut one, mut other) = (core.connect(), core.connect());
    let register = |service: &str| json!({"cmd": "register", "service": service, "port": port});
    assert_eq!(one.ask(&register("redis"))["ack"], "successful");
    assert_eq!(other.ask(&register("cache"))["ack"], "successful");
    let answer = other.ask(&register("redis"));
    assert_failed(&answer, &format!("redis 127.0.0.1:{port} is registered"));
}

#[test]
fn the_services_are_listed_with_those_that_serve() {
    let core = core_with(|config| {
        config.listen.udp = Some("127.0.0.1:82".parse().unwrap());
        config.services[1].listen =
            ["127.0.0.1:6379", "[::1]:6379"].map(|door| door.parse().unwrap()).into();
        config.services[2].register = false;
    });
    let (mut backend, _listener, port) = register_for_three(&core);
    backend.ask(&json!({"cmd": "drain", "service": "cache", "port": port, "deadline_ms": 60_000}));
    let answer = backend.ask(&json!({"cmd": "services"}));
    let shown: Vec<_> = (answer["services"].as_array().unwrap().iter())
        .map(|it| (it["name"].as_str().unwrap(), it["protocol"].as_str().unwrap(), &it["serving"]))
        .collect();
    let (none, one) = (json!(0), json!(1));
    assert_eq!(
        shown,
        [
            ("tcp", "tcp", &one),
            ("udp", "udp", &none),
            ("api", "api", &none),
            ("cache", "tcp", &none),
            ("redis", "tcp", &one),
            ("dns", "udp", &none),
        ]
    );
    assert_eq!(answer["more"], false);
    let of = |place: usize, what: &str| answer["services"][place][what].clone();
    assert_eq!(of(1, "doors"), json!(["127.0.0.1:82"]));
    assert_eq!(of(4, "doors"), json!(["127.0.0.1:6379", "[::1]:6379"]));
    assert_eq!(of(5, "doors"), json!([]), "only API services share a door");
    assert_eq!([of(1, "register"), of(5, "register")], [json!(true), json!(false)]);
}

#[test]
fn a_list_of_many_services_comes_in_several_answers() {
    let names: Vec<String> = (0..200).map(|number| format!("service-{number}")).collect();
    let core = Core::start(|config| {
        let service = |name: &String| ServiceConfig::new(name, Protocol::Tcp);
        config.set_services(names.iter().map(service).collect());
    });
    let mut backend = core.connect();
    backend.say(r#"{"cmd":"services"}"#);
    let mut shown = Vec::new();
    let mut pages = 0;
    loop {
        let page = backend.hear().unwrap();
        pages += 1;
        let listed = page["services"].as_array().unwrap().iter();
        shown.extend(listed.map(|it| it["name"].as_str().unwrap().to_owned()));
        if page["more"] == false {
            break;
        }
    }
    assert!(pages > 1);
    assert_eq!(shown[..3], ["tcp", "udp", "api"]);
    assert_eq!(shown[3..], names);
}

#[test]
fn a_service_that_takes_no_registrations_says_so() {
    let core = core_with(|config| config.services[1].register = false);
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    let register = |service: &str| json!({"cmd": "register", "service": service, "port": port});
    let answer = backend.ask(&register("redis"));
    assert_failed(&answer, "service redis takes no registrations");
    assert_eq!(answer["service"], "redis");
    assert_eq!(backend.ask(&register("cache"))["ack"], "successful");
    wait_for_members(&core, CACHE, &[(port, Standing::Serving)]);
    assert_eq!(core.worker.backends().len(), 1);
}

#[test]
fn a_backend_cannot_point_users_back_at_the_door_of_any_service() {
    let core = core_with(|config| {
        config.listen.tcp = Some("127.0.0.1:81".parse().unwrap());
        config.services[0].listen = vec!["127.0.0.1:6379".parse().unwrap()];
        config.services[2].listen = vec!["127.0.0.1:53".parse().unwrap()];
    });
    let mut backend = core.connect();
    for (service, port) in [("redis", 6379), ("redis", 81), ("tcp", 6379), ("udp", 53)] {
        let message = json!({"cmd": "register", "service": service, "port": port});
        assert_failed(&backend.ask(&message), "a door of the balancer itself");
    }
    let message = json!({"cmd": "register", "service": "dns", "port": 6379});
    assert_eq!(backend.ask(&message)["ack"], "successful", "a TCP door is none for datagrams");
}

#[test]
fn the_status_shows_each_service_with_what_it_has_of_its_own() {
    let core = core_with(|config| {
        config.listen.tcp = None;
        config.services[1].listen = vec!["127.0.0.1:6379".parse().unwrap()];
        config.services[1].policy = Some(Policy::LeastSessions);
        config.services[1].connect = Some(Duration::from_millis(90));
        config.services[1].on_backend_loss = Some(OnBackendLoss::Close);
        config.services[2].register = false;
    });
    let (mut backend, _listener, port) = register_for_three(&core);
    for (place, count) in [3, 5, 7].into_iter().enumerate() {
        core.worker.metrics.backends[place].active.set(count);
    }
    backend.ask(&json!({"cmd": "drain", "service": "cache", "port": port, "deadline_ms": 60_000}));
    backend.ask(&json!({"cmd": "unregister", "protocol": "tcp", "port": port}));
    let (_, text) = core.get("/status");
    let status: Value = serde_json::from_str(&text).unwrap();
    // Tests of their own have the others.
    let of = |place: usize| {
        let mut service = status["services"][place].clone();
        let all = service.as_object_mut().unwrap();
        let elsewhere = ["limits", "turned_away", "leaving", "sessions_total"];
        all.retain(|key, _| !elsewhere.contains(&&**key));
        service
    };
    let none = json!({"serving": 0, "aside": 0, "failing": 0, "draining": 0});
    assert_eq!(
        of(0),
        json!({
            "name": "tcp", "protocol": "tcp", "doors": [], "register": true, "backends": none,
            "sessions_active": 3, "terms": [], "groups": []
        }),
        "its backend has left with sessions"
    );
    assert_eq!(of(3)["backends"], json!({"serving": 0, "aside": 0, "failing": 0, "draining": 1}));
    assert_eq!(of(3)["sessions_active"], 5);
    assert_eq!(
        of(4),
        json!({
            "name": "redis", "protocol": "tcp", "doors": ["127.0.0.1:6379"], "register": true,
            "backends": {"serving": 1, "aside": 0, "failing": 0, "draining": 0}, "sessions_active": 7,
            "terms": [
                "policy = \"least_sessions\"",
                "on_backend_loss = \"close\"",
                "connect_ms = \"90ms\"",
            ],
            "groups": []
        })
    );
    assert_eq!(of(5)["register"], false);
    let named: Vec<_> =
        status["backends"].as_array().unwrap().iter().map(|it| &it["service"]).collect();
    assert_eq!(named, ["cache", "redis", "tcp"]);
}

#[test]
fn the_metrics_tell_the_services_apart() {
    let core = core();
    let (mut backend, _listener, port) = register_for_three(&core);
    for (place, count) in [3, 5, 7].into_iter().enumerate() {
        core.worker.metrics.backends[place].active.set(count);
    }
    backend.ask(&json!({"cmd": "drain", "service": "cache", "port": port, "deadline_ms": 60_000}));
    let (_, metrics) = core.get("/metrics");
    let labels = |id: u8, service: &str| {
        format!(
            r#"{{backend="b{id}",service="{service}",protocol="tcp",address="127.0.0.1:{port}",name=""}}"#
        )
    };
    let lines = [
        format!("lb_backend_sessions_active{} 3", labels(1, "tcp")),
        format!("lb_backend_sessions_active{} 5", labels(2, "cache")),
        format!("lb_backend_sessions_active{} 7", labels(3, "redis")),
        r#"lb_service_backends{service="redis",protocol="tcp",state="serving"} 1"#.to_owned(),
        r#"lb_service_backends{service="cache",protocol="tcp",state="serving"} 0"#.to_owned(),
        r#"lb_service_backends{service="cache",protocol="tcp",state="draining"} 1"#.to_owned(),
        r#"lb_service_backends{service="dns",protocol="udp",state="aside"} 0"#.to_owned(),
        r#"lb_service_sessions_active{service="redis",protocol="tcp"} 7"#.to_owned(),
        r#"lb_service_sessions_active{service="dns",protocol="udp"} 0"#.to_owned(),
        r#"lb_backends{protocol="tcp"} 3"#.to_owned(),
    ];
    for line in lines {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }
}

#[test]
fn sessions_are_those_of_one_service_if_it_is_asked_for() {
    let core = core();
    core.worker.with_shard(|shard| {
        for (service, host) in [(TCP, 1), (REDIS, 2), (CACHE, 3), (REDIS, 4)] {
            shard.open(service, ([192, 0, 2, host], 7).into(), Now::read()).unwrap();
        }
    });
    let (_, text) = core.get("/sessions?service=redis");
    let page: Value = serde_json::from_str(&text).unwrap();
    let shown: Vec<_> = (page["sessions"].as_array().unwrap().iter())
        .map(|it| (it["client"].as_str().unwrap(), it["service"].as_str().unwrap()))
        .collect();
    assert_eq!(shown, [("192.0.2.2:7", "redis"), ("192.0.2.4:7", "redis")]);
    let (code, text) = core.get("/sessions?service=redsi");
    assert_eq!(code, 400);
    assert!(text.contains("the nearest name among the 6 is redis"), "{text}");
}

#[test]
fn an_api_session_is_of_the_service_whose_backend_serves_it_now() {
    let core = Core::start(|config| {
        config.set_services(vec![ServiceConfig::new("shop", Protocol::Api)]);
    });
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    backend.ask(&json!({"cmd": "register", "service": "shop", "port": port}));
    wait_for("the backend", || (core.worker.backends().len() == 1).then_some(()));
    core.worker.with_shard(|shard| {
        let api = ServiceId::built_in(Protocol::Api);
        let place = shard.open(api, ([192, 0, 2, 1], 7).into(), Now::read()).unwrap();
        shard.set_backend(&place, BackendId(1));
        shard.open(api, ([192, 0, 2, 2], 7).into(), Now::read()).unwrap();
    });
    for (service, client) in [("shop", "192.0.2.1:7"), ("api", "192.0.2.2:7")] {
        let (_, text) = core.get(&format!("/sessions?service={service}"));
        let page: Value = serde_json::from_str(&text).unwrap();
        let sessions = page["sessions"].as_array().unwrap();
        assert_eq!(sessions.len(), 1, "{text}");
        assert_eq!(
            (&sessions[0]["service"], &sessions[0]["client"]),
            (&json!(service), &json!(client))
        );
    }
}

#[test]
fn rule_13_registrations_beyond_the_most_backends_are_refused_with_the_reason() {
    let core = core_with(|config| config.services[2].backends_max = NonZeroU32::new(2));
    let mut backend = core.connect();
    let mut register = |service: &str, port: u16| {
        backend.ask(&json!({"cmd": "register", "service": service, "port": port}))
    };
    for port in [1, 2, 1] {
        assert_eq!(register("dns", port)["ack"], "successful", "again is no other one");
    }
    assert_failed(&register("dns", 3), "service dns takes 2 backends at most, and has them");
    assert_eq!(register("udp", 3)["ack"], "successful");
    backend.ask(&json!({"cmd": "unregister", "service": "dns", "port": 1}));
    assert_eq!(
        backend.ask(&json!({"cmd": "register", "service": "dns", "port": 3}))["ack"],
        "successful"
    );
}

#[test]
fn rule_13_the_limits_of_a_service_are_shown_with_their_use() {
    let core = core_with(|config| {
        config.services[1].sessions = NonZeroU32::new(5);
        config.services[1].backend_sessions = NonZeroU32::new(3);
        config.services[1].backends_max = NonZeroU32::new(9);
        config.services[1].users = vec!["10.0.0.0/8".parse().unwrap()];
    });
    let mut backend = core.connect();
    assert_eq!(backend.register(Protocol::Udp, 9)["ack"], "successful");
    let snapshot = wait_for("a snapshot", || {
        Some(core.worker.snapshot()).filter(|it| it.service(REDIS).is_some())
    });
    let redis = snapshot.service(REDIS).unwrap();
    assert!(redis.gate.enter(None) && redis.gate.enter(None));
    redis.gate.turn_away(Barrier::Users, 7);
    let (_, text) = core.get("/status");
    let status: Value = serde_json::from_str(&text).unwrap();
    let shown = &status["services"][4];
    assert_eq!(
        shown["limits"],
        json!({
            "sessions": 5, "sessions_used": 2, "backend_sessions": 3, "backends_max": 9,
            "users": ["10.0.0.0/8"]
        })
    );
    assert_eq!(shown["turned_away"], json!({"users": 7, "sessions": 0, "backend_sessions": 0}));
    assert_eq!(
        shown["terms"],
        json!([
            "backends_max = 9",
            "sessions = 5",
            "backend_sessions = 3",
            "users = [\"10.0.0.0/8\"]"
        ])
    );
    assert_eq!(status["services"][3]["limits"]["sessions"], Value::Null);
    let (_, metrics) = core.get("/metrics");
    for line in [
        r#"lb_service_sessions_limit{service="redis",protocol="tcp"} 5"#,
        r#"lb_service_turned_away_total{service="redis",protocol="tcp",reason="users"} 7"#,
        r#"lb_service_turned_away_total{service="redis",protocol="tcp",reason="sessions"} 0"#,
    ] {
        assert!(metrics.lines().any(|it| it == line), "{line} in {metrics}");
    }
    assert!(
        !metrics.contains(r#"lb_service_turned_away_total{service="cache""#),
        "it has no limit"
    );
}

#[test]
fn a_backend_registers_in_a_group_of_its_service_and_is_shown_there() {
    let core = core_with(|config| {
        let share = |(name, share): (&str, u8)| GroupShare { name: name.into(), share };
        config.services[1].groups = [("blue", 100), ("green", 0)].map(share).into();
    });
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    let register =
        |group: Value| json!({"cmd": "register", "service": "redis", "port": port, "group": group});
    for (group, part) in [
        (json!("red"), "service redis has no group red; its groups are blue, green"),
        (json!(null), "service redis has groups, so name one of them: blue, green"),
        (json!(5), "group must be a string"),
    ] {
        let answer = backend.ask(&register(group));
        assert!(answer["msg"].as_str().unwrap().contains(part), "{answer}");
    }
    let elsewhere = json!({"cmd": "register", "service": "cache", "port": port, "group": "blue"});
    let answer = backend.ask(&elsewhere);
    assert_eq!(answer["msg"], "service cache has no groups, so leave out group blue");
    assert_eq!(backend.ask(&register(json!("green")))["ack"], "successful");
    wait_for_members(&core, REDIS, &[(port, Standing::Serving)]);
    assert_eq!(backend.ask(&json!({"cmd": "list"}))["backends"][0]["group"], "green");
    let (_, text) = core.get("/status");
    let status: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status["backends"][0]["group"], "green");
    let (_, metrics) = core.get("/metrics");
    assert!(metrics.contains("lb_service_group_share{service=\"redis\",group=\"blue\"} 100"));
    let unregister = json!({"cmd": "unregister", "service": "redis", "port": port});
    assert_eq!(backend.ask(&unregister)["ack"], "successful", "the port alone tells which");
}
