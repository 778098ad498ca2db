//! How a backend is reached, from what it says when it registers to what workers and operators are told.

use lb::cluster::{Protocol, ServiceId};
use lb::config::services::ServiceConfig;
use serde_json::{Value, json};

use crate::harness::{Core, assert_failed, data_port};
use crate::wait::wait_for;

/// The first named service.
const SHOP: ServiceId = ServiceId(3);

#[test]
fn an_api_backend_may_speak_http_2_and_no_other_backend_may() {
    let core = Core::start(|config| {
        config.set_services(vec![ServiceConfig::new("shop", Protocol::Api)]);
    });
    let (_listener, port) = data_port();
    let mut backend = core.connect();
    let says =
        |http: Value| json!({"cmd": "register", "service": "shop", "port": port, "http": http});
    let silent = json!({"cmd": "register", "service": "shop", "port": port});
    for http in [2, 1] {
        let answer = backend.ask(&says(json!(http)));
        assert_eq!(answer["ack"], "successful", "{answer}");
        assert_eq!((answer.get("http"), answer.get("warning")), (None, None), "{answer}");
        wait_for("the workers to know", || {
            let snapshot = core.worker.snapshot();
            let mut backends = snapshot.pool(SHOP)?.backends.iter();
            backends.any(|it| it.http2 == (http == 2)).then_some(())
        });
        let status: Value = serde_json::from_str(&core.get("/status").1).unwrap();
        assert_eq!(status["backends"][0]["http"], http, "{status}");
        assert_eq!(backend.ask(&silent)["ack"], "successful", "it stays as it was");
        let otherwise = backend.ask(&says(json!(3 - http)));
        let said = "is registered with another http, which cannot change: unregister it first";
        assert!(otherwise["msg"].as_str().unwrap().ends_with(said), "{otherwise}");
        let leaves = json!({"cmd": "unregister", "service": "shop", "port": port});
        assert_eq!(backend.ask(&leaves)["ack"], "successful");
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let wanted =
            |http| json!({"cmd": "register", "protocol": protocol, "port": port, "http": http});
        assert_failed(&backend.ask(&wanted(2)), "only API backends speak HTTP: leave http out");
        assert_eq!(backend.ask(&wanted(1))["ack"], "successful", "it is as by default");
    }
    let status: Value = serde_json::from_str(&core.get("/status").1).unwrap();
    let others = status["backends"].as_array().unwrap().iter().filter(|it| it["service"] != "shop");
    assert!(others.map(|it| &it["http"]).eq([&Value::Null; 2]), "{status}");
    assert_failed(
        &backend.ask(&says(json!(3))),
        "http must be 1 or 2, the version of HTTP that the backend speaks, or left out",
    );
}
