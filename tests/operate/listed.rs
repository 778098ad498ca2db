//! Backends that the configuration lists, through a reload.

use crate::harness::Balancer;
use crate::wait::wait_for;

/// Address, weight and state of each backend that the file lists.
fn listed(balancer: &Balancer) -> Vec<(String, u64, String)> {
    let status = balancer.status();
    let rows = status["backends"].as_array().unwrap().iter();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    rows.map(|it| (text(&it["address"]), it["weight"].as_u64().unwrap(), text(&it["state"])))
        .filter(|row| row.0.starts_with("127.7."))
        .collect()
}

fn wait_for_list(balancer: &Balancer, rows: &[(&str, u64, &str)]) {
    wait_for(&format!("{rows:?} in the status"), || {
        let listed = listed(balancer);
        let shown = listed.iter().map(|row| (row.0.as_str(), row.1, row.2.as_str()));
        shown.eq(rows.iter().copied()).then_some(())
    });
}

fn settings(backends: &str, more: &str) -> String {
    format!(
        "[service.pg]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\nbackends = [{backends}]\n{more}"
    )
}

#[test]
fn a_reload_adds_removes_and_weighs_listed_backends() {
    let list = settings(r#""127.7.0.1:9", { address = "127.7.0.2:9", weight = 3 }"#, "");
    let balancer = Balancer::ready(&list);
    wait_for_list(&balancer, &[("127.7.0.1:9", 1, "serving"), ("127.7.0.2:9", 3, "serving")]);
    let list = settings(r#"{ address = "127.7.0.2:9", weight = 5 }, "127.7.0.3:9""#, "");
    let done = balancer.change(&list);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    wait_for_list(&balancer, &[("127.7.0.2:9", 5, "serving"), ("127.7.0.3:9", 1, "serving")]);
    let left = balancer.wait_for_log("backend left");
    assert!(left.contains("127.7.0.1:9") && left.contains("no longer in the configuration"));
}

#[test]
fn a_reload_begins_and_ends_checks() {
    let listener = std::net::TcpListener::bind("127.7.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let list = |more: &str| settings(&format!("\"{address}\", \"127.7.0.2:9\""), more);
    let balancer = Balancer::ready(&list(""));
    let both = [(address.as_str(), 1, "serving"), ("127.7.0.2:9", 1, "serving")];
    wait_for_list(&balancer, &both);
    let checked = list("check = { kind = \"tcp\", interval_ms = 50, timeout_ms = 50 }\n");
    let done = balancer.change(&checked);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    wait_for_list(&balancer, &[(&address, 1, "serving"), ("127.7.0.2:9", 1, "failing")]);
    let line = balancer.wait_for_log("check failed");
    assert!(
        line.contains("service=pg") && line.contains("cannot connect to 127.7.0.2:9"),
        "{line}"
    );
    assert!(balancer.change(&list("")).status.success());
    wait_for_list(&balancer, &both);
}
