//! What a backend asks for and what it is told: checks of itself, what a second registration leaves as it was,
//! and members of a message that mean nothing.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lb::cluster::{Protocol, ServiceId, Standing};
use lb::config::services::{CheckConfig, CheckKind, ServiceConfig};
use serde_json::{Value, json};

use crate::harness::{Core, assert_failed, data_port};
use crate::wait::wait_for;

const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);

/// A core with a service `shop` that is checked quickly where somebody asks for it.
fn core(change: impl FnOnce(&mut ServiceConfig)) -> Core {
    Core::start(|config| {
        let mut shop = ServiceConfig::new("shop", Protocol::Tcp);
        shop.check.interval = Duration::from_millis(20);
        shop.check.timeout = Some(Duration::from_millis(20));
        change(&mut shop);
        config.set_services(vec![shop]);
    })
}

/// A server that is well, or not, at `/up`.
fn server() -> (u16, Arc<AtomicBool>) {
    let (listener, port) = data_port();
    let well = Arc::new(AtomicBool::new(false));
    let shown = Arc::clone(&well);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut head = [0; 1024];
            let count = stream.read(&mut head).unwrap_or(0);
            let asked = head[..count].starts_with(b"GET /up HTTP/1.1\r\n");
            let status = if asked && shown.load(Ordering::Relaxed) { 200 } else { 503 };
            let _ = write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n");
        }
    });
    (port, well)
}

#[test]
fn a_backend_is_checked_as_it_asks_until_it_asks_otherwise() {
    let core = core(|_| {});
    let (port, well) = server();
    let mut backend = core.connect();
    let mut join = json!({"cmd":"register","service":"shop","port":port,"check":"http:/up"});
    let answer = backend.ask(&join);
    assert_eq!((&answer["ack"], &answer["check"]), (&json!("successful"), &json!("http:/up")));
    assert_eq!(core.shown(port)["state"], "failing", "it has yet to pass");
    wait_for("a failed check", || {
        let check = core.shown(port)["check"].clone();
        (check["failure"].as_str()?.contains("answered 503")).then(|| {
            assert_eq!(check["kind"], "http:/up");
        })
    });
    well.store(true, Ordering::Relaxed);
    core.wait_for_standing(port, Standing::Serving);
    well.store(false, Ordering::Relaxed);
    core.wait_for_standing(port, Standing::Failing);
    // What is not named stays, and so does the verdict.
    join.as_object_mut().unwrap().remove("check");
    assert_eq!(backend.ask(&join)["check"], "http:/up");
    assert_eq!(core.shown(port)["state"], "failing");
    join["check"] = json!("off");
    assert_eq!(backend.ask(&join).get("check"), None);
    core.wait_for_standing(port, Standing::Serving);
    assert_eq!(core.shown(port)["check"]["kind"], Value::Null);
    // One that serves has to fail as often as any other before it is out.
    join["check"] = json!("http:/up");
    backend.ask(&join);
    core.wait_for_standing(port, Standing::Failing);
}

#[test]
fn a_check_is_refused_where_it_cannot_be_and_a_warning_says_whose_goes_first() {
    let core = core(|shop| {
        shop.check = CheckConfig { kind: CheckKind::Tcp, ..shop.check.clone() };
    });
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    let with = |protocol: &str, check: &str| json!({"cmd":"register","protocol":protocol,"port":port,"check":check});
    let answer =
        backend.ask(&json!({"cmd":"register","service":"shop","port":port,"check":"http:/"}));
    assert_eq!((&answer["ack"], answer.get("check")), (&json!("successful"), None));
    let warning = "service shop is checked as the balancer's file says, not as asked";
    assert_eq!(answer["warning"], warning);
    core.wait_for_standing(port, Standing::Serving);
    assert_eq!(core.shown(port)["check"]["kind"], "tcp");
    assert_failed(&backend.ask(&with("udp", "tcp")), "cannot be checked");
    assert_failed(&backend.ask(&with("tcp", "icmp")), "write tcp, http:");
    let mut both = with("tcp", "tcp");
    both["probe"] = json!(false);
    assert_failed(&backend.ask(&both), "which probe false forbids");
    drop(core);
    let core = self::core(|shop| shop.probe = false);
    let answer =
        core.connect().ask(&json!({"cmd":"register","service":"shop","port":port,"check":"tcp"}));
    assert_failed(&answer, "service shop has its ports tried by nobody (probe = false)");
}

#[test]
fn a_second_registration_leaves_what_it_does_not_name_as_it_was() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    let first = json!({
        "cmd":"register", "protocol":"tcp", "port":port, "weight":3, "name":"one", "proxy":2,
        "probe":false,
    });
    let id = backend.ask(&first)["id"].clone();
    let of = |more: Value| {
        let mut message = json!({"cmd":"register","protocol":"tcp","port":port});
        message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        message
    };
    for (more, weight, name, proxy) in [
        (json!({"weight":7}), 7, "one", json!(2)),
        (json!({}), 7, "one", json!(2)),
        (json!({"name":"two"}), 7, "two", json!(2)),
        (json!({"proxy":false,"weight":null}), 7, "two", Value::Null),
    ] {
        let answer = backend.ask(&of(more.clone()));
        assert_eq!((&answer["id"], &answer["weight"]), (&id, &json!(weight)), "{more}");
        let now = core.shown(port);
        assert_eq!((&now["name"], &now["weight"]), (&json!(name), &json!(weight)), "{more}");
        assert_eq!(now["proxy"], proxy, "{more}");
    }
    wait_for("the worker to know", || {
        let snapshot = core.worker.snapshot();
        let one = snapshot.pool(TCP)?.backends.first()?.clone();
        (one.weight == 7 && one.name.as_deref() == Some("two") && !one.proxy).then_some(())
    });
    // On another connection it is another backend, which begins anew.
    drop(backend);
    core.worker.wait_for_rotation(Protocol::Tcp, &[]);
    let mut other = core.connect();
    let answer = other.ask(&of(json!({})));
    assert_eq!((&answer["weight"], answer["id"] == id), (&json!(1), false));
    assert_eq!(core.shown(port)["name"], Value::Null);
}

#[test]
fn an_answer_names_the_members_that_mean_nothing() {
    let core = Core::start(|_| {});
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    let typo = json!({"cmd":"register","protocol":"tcp","port":port,"wieght":5});
    let answer = backend.ask(&typo);
    assert_eq!((&answer["ack"], &answer["weight"]), (&json!("successful"), &json!(1)));
    assert_eq!(answer["warning"], "unknown member wieght: perhaps weight");
    let answer = backend.ask(&json!({"cmd":"register","protocl":"tcp","port":port}));
    assert_failed(&answer, "protocol is missing");
    assert_eq!(answer["warning"], "unknown member protocl: perhaps protocol");
    let answer = backend.ask(&json!({"cmd":"list","x":1}));
    assert_eq!(answer["warning"], "unknown member x");
    assert_eq!(backend.ask(&json!({"cmd":"list"})).get("warning"), None);
}
