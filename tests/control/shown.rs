//! What other people's tools rely on: the documented schema, the format of the metrics and the dashboard.
//! Owns the comparison of the documents with what a running balancer says.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::num::NonZeroU32;
use std::path::Path;
use std::process::{Command, Stdio};

use lb::base::time::Now;
use lb::cluster::{BackendId, Policy, Protocol, ServiceId};
use lb::config::services::{GroupShare, ServiceConfig};
use lb::tls::demo::Made;
use serde_json::{Value, json};

use crate::harness::Core;
use crate::wait::wait_for;

/// A balancer with one of everything that has a field or a label.
fn core() -> (Core, crate::harness::Backend) {
    let made = Made::new().unwrap();
    let core = Core::start(|config| {
        config.tls.certificates = vec![made.files.clone()];
        let mut dns = ServiceConfig::new("dns", Protocol::Udp);
        dns.listen = vec!["127.0.0.1:53".parse().unwrap()];
        dns.policy = Some(Policy::SourceHash);
        dns.sessions = NonZeroU32::new(9);
        dns.groups = vec![GroupShare { name: "blue".into(), share: 1 }];
        config.set_services(vec![dns]);
    });
    let mut backend = core.connect();
    let wanted = json!({"cmd": "register", "protocol": "udp", "port": 9, "name": "dns-1"});
    assert_eq!(backend.ask(&wanted)["ack"], "successful");
    core.worker.with_shard(|shard| {
        let client = "192.0.2.1:7".parse().unwrap();
        let place = shard.open(ServiceId::built_in(Protocol::Tcp), client, Now::read()).unwrap();
        shard.set_backend(&place, BackendId(1));
    });
    (core, backend)
}

/// Every field of a value by its path, with its type; `*` stands for the names of counters.
fn fields(value: &Value, path: String, found: &mut BTreeMap<String, &'static str>) {
    match value {
        Value::Object(object) => {
            for (name, inner) in object {
                let named = matches!(
                    path.as_str(),
                    "control" | "timings" | "last_minute" | "workers[].counters"
                );
                let name = if named { "*" } else { name.as_str() };
                let dot = if path.is_empty() { "" } else { "." };
                fields(inner, format!("{path}{dot}{name}"), found);
            }
        }
        // One service has groups, and tells what is in them.
        Value::Array(items) if items.is_empty() && path.ends_with(".groups") => {}
        // No reload has ended a shift here.
        Value::Array(items) if items.is_empty() && path.ends_with(".shifts_ended") => {
            for name in ["service", "shares"] {
                found.insert(format!("{path}[].{name}"), "text");
            }
        }
        // Every other list that can be empty here holds text.
        Value::Array(items) if items.is_empty() => drop(found.insert(path + "[]", "text")),
        Value::Array(items) => {
            for inner in items {
                fields(inner, format!("{path}[]"), found);
            }
        }
        Value::String(_) => drop(found.insert(path, "text")),
        Value::Number(_) => drop(found.insert(path, "number")),
        Value::Null => drop(found.insert(path, "null")),
        Value::Bool(_) => drop(found.insert(path, "boolean")),
    }
}

/// The rows of the table under a heading of the schema: path and type.
fn documented(heading: &str) -> BTreeMap<String, String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/control/schema.md");
    let text = std::fs::read_to_string(file).unwrap();
    let (_, part) = text.split_once(&format!("## `{heading}`")).expect("the heading");
    let part = part.split("\n## ").next().unwrap();
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        Some((cells.next()?.trim_end_matches('`').to_owned(), cells.next()?.to_owned()))
    };
    part.lines().filter_map(row).collect()
}

#[test]
fn exactly_the_existing_fields_are_documented_with_their_types() {
    let (core, _backend) = core();
    for (path, heading) in [("/status", "GET /status"), ("/sessions", "GET /sessions")] {
        let (code, body) = core.get(path);
        assert_eq!(code, 200);
        let mut found = BTreeMap::new();
        fields(&serde_json::from_str(&body).unwrap(), String::new(), &mut found);
        let documented = documented(heading);
        let names = |all: Vec<&String>| all.into_iter().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(found.keys().collect()), names(documented.keys().collect()), "{path}");
        for (field, kind) in found {
            let said = &documented[&field];
            assert!(said.split(" or ").any(|one| one == kind), "{field} is {kind}, not {said}");
        }
    }
}

#[test]
fn the_history_has_a_value_for_each_step_and_its_fields_are_documented() {
    let (core, _backend) = core();
    core.worker.metrics.backends[0].total.add(4);
    core.worker.metrics.counters.sessions_started.add(4);
    let history = |path: &str| -> Value {
        let (code, body) = core.get(path);
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    };
    let whole = wait_for("the first step", || {
        let shown = history("/history");
        (shown["took_ms"] != json!([])).then_some(shown)
    });
    assert_eq!(whole["whole"]["new"][0], 4);
    assert_eq!(whole["protocols"]["udp"]["new"][0], 4);
    assert_eq!(whole["protocols"]["tcp"]["new"][0], 0);
    assert_eq!(whole["whole"]["p99_us"][0], Value::Null, "nothing was measured");
    assert!(whole["protocols"]["udp"]["requests"].is_null(), "it does not apply");
    let one = history("/history?service=dns&last=1");
    assert_eq!((&one["service"], &one["whole"]["new"]), (&json!("dns"), &json!([0])));
    assert_eq!(one["protocols"], json!({}));
    let many = history("/history/services");
    let of_udp = json!([{"name": "udp", "protocol": "udp", "new": [4]}]);
    assert_eq!(many["services"], of_udp, "the others have nothing to show");
    let named = history("/history/services?service=dns&service=api&fields=sessions,errors");
    let dns = json!({"name": "dns", "protocol": "udp", "sessions": [0]});
    let api = json!({"name": "api", "protocol": "api", "sessions": [0], "errors": [0]});
    assert_eq!(named["services"], json!([dns, api]));

    for (answer, path) in [(whole, "/history"), (many, "/history/services")] {
        let mut found = BTreeMap::new();
        fields(&answer, String::new(), &mut found);
        let any_series = |path: String| match path.split('.').collect::<Vec<_>>()[..] {
            ["protocols", _, _] => "protocols.*.*[]".to_owned(),
            ["services[]", field] if field.ends_with("[]") => "services[].*[]".to_owned(),
            _ => path,
        };
        let found: BTreeSet<String> = found.into_keys().map(any_series).collect();
        let documented: BTreeSet<String> = documented(&format!("GET {path}")).into_keys().collect();
        assert_eq!(found, documented, "{path}");
    }
    for (query, said) in [
        ("?last=181", "last is a number of steps, 1 to 180"),
        ("/services?fields=new,old", "fields are names, separated by commas: sessions, new, "),
        ("?service=nds", "there is no service nds; the nearest name among the 4 is dns"),
        ("?service=tcp&service=udp", "several services are shown by /history/services"),
        ("?since=4", "the keys are service, last and fields"),
    ] {
        let (code, body) = core.get(&format!("/history{query}"));
        assert!(code == 400 && body.contains(said), "{query}: {code} {body}");
    }
}

#[test]
fn every_sample_about_a_service_or_backend_names_the_service_and_a_group_if_it_is_in_one() {
    let (core, _backend) = core();
    let mut dns = core.connect();
    let wanted = json!({"cmd": "register", "service": "dns", "group": "blue", "port": 10});
    assert_eq!(dns.ask(&wanted)["ack"], "successful");
    core.worker.metrics.backends[1].total.add(7);
    let (_, metrics) = core.get("/metrics");
    let samples = metrics.lines().filter(|line| !line.starts_with('#'));
    for line in samples.clone().filter(|line| line.starts_with("lb_backend_")) {
        let (service, group) = match line.contains("backend=\"b2\"") {
            true => ("dns", true),
            false => ("udp", false),
        };
        assert!(line.contains(&format!("service=\"{service}\",protocol=\"udp\"")), "{line}");
        assert_eq!(line.contains("group=\"blue\""), group, "{line}");
    }
    for line in samples.clone().filter(|line| line.starts_with("lb_service_")) {
        let (_, labels) = line.split_once('{').expect(line);
        assert!(labels.starts_with("service=\""), "{line}");
    }
    let given = "lb_service_sessions_total{service=\"dns\",protocol=\"udp\"} 7";
    assert!(samples.clone().any(|line| line == given), "{metrics}");
}

/// A file that is installed with the program.
pub fn deployed(name: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name);
    std::fs::read_to_string(file).unwrap()
}

fn dashboard() -> String {
    deployed("grafana-lb.json")
}

/// Every query of the dashboard's panels, those within rows included.
fn queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&dashboard()).unwrap();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let panels = list(&dashboard["panels"]);
    let within = panels.iter().flat_map(|row| list(&row["panels"]));
    let all: Vec<Value> = panels.iter().cloned().chain(within).collect();
    let targets = all.iter().flat_map(|panel| list(&panel["targets"]));
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_query_about_services_or_backends_follows_the_chosen_service() {
    let queries = queries();
    let per_service =
        |query: &&String| query.contains("lb_service_") || query.contains("lb_backend_");
    assert!(queries.iter().filter(per_service).count() > 10, "{queries:?}");
    for query in queries.iter().filter(per_service) {
        let metrics = query.matches("lb_").count();
        assert_eq!(query.matches("service=~\"$service\"").count(), metrics, "{query}");
    }
    assert!(dashboard().contains("\"repeat\": \"service\""), "each has a row of its own");
}

#[test]
#[ignore = "needs promtool, from the Debian package prometheus"]
fn promtool_reads_every_query_of_the_dashboard() {
    let rules: Vec<Value> = queries()
        .into_iter()
        .map(|query| query.replace("$__rate_interval", "5m"))
        .enumerate()
        .map(|(number, expr)| json!({"record": format!("query_{number}"), "expr": expr}))
        .collect();
    let file = std::env::temp_dir().join(format!("lb-queries-{}.yml", std::process::id()));
    // JSON is YAML.
    let groups = json!({"groups": [{"name": "dashboard", "rules": rules}]});
    std::fs::write(&file, groups.to_string()).unwrap();
    let outcome = Command::new("promtool").args(["check", "rules"]).arg(&file).output();
    let _ = std::fs::remove_file(&file);
    let outcome = outcome.expect("promtool, from the package prometheus");
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
}

/// Checks that a balancer has every metric that a text names.
#[track_caller]
pub fn all_exist(text: &str) {
    let (core, _backend) = core();
    let (_, metrics) = core.get("/metrics");
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let named: BTreeSet<&str> =
        text.split(|c| !is_name(c)).filter(|word| word.starts_with("lb_")).collect();
    assert!(named.len() > 20, "{named:?}");
    for name in named {
        let sample =
            |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        assert!(metrics.lines().any(sample), "{name} is not in /metrics");
    }
}

#[test]
fn every_metric_of_the_dashboard_exists() {
    let text = dashboard();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 10);
    all_exist(&text);
}

#[test]
fn the_dashboard_has_api_and_udp_and_each_limit_beside_what_counts_towards_it() {
    let queries = queries();
    for metric in [
        "lb_api_requests_total",
        "lb_api_failed_total",
        "lb_udp_datagrams_up_total",
        "lb_udp_sockets",
    ] {
        assert!(queries.iter().any(|query| query.contains(metric)), "{metric} is in no panel");
    }
    let (core, _backend) = core();
    let (_, metrics) = core.get("/metrics");
    let helped = metrics.lines().filter_map(|line| line.strip_prefix("# HELP lb_udp_dropped_"));
    let dropped: Vec<&str> = helped.filter_map(|line| line.split(' ').next()).collect();
    assert!(dropped.len() >= 10, "{metrics}");
    for reason in dropped {
        let name = format!("lb_udp_dropped_{reason}");
        assert!(queries.iter().any(|query| query.contains(&name)), "{name} is in no panel");
    }
    for query in queries.iter().filter(|query| query.contains(" / sum(lb_sessions_limit")) {
        assert!(query.contains("- sum(lb_udp_sessions_active"), "UDP has its own limit: {query}");
    }
    assert!(queries.iter().any(|query| query.contains(" / sum(lb_udp_sessions_limit")));
    let limit = lb::config::Config::default().limits.udp_sessions;
    assert!(metrics.lines().any(|line| line == format!("lb_udp_sessions_limit {limit}")));
}

#[test]
#[ignore = "needs promtool, from the Debian package prometheus"]
fn promtool_finds_nothing_wrong_with_the_metrics() {
    let (core, _backend) = core();
    let (_, metrics) = core.get("/metrics");
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, from the package prometheus");
    promtool.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let outcome = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&outcome.stderr);
    assert!(outcome.status.success() && said.is_empty(), "{said}");
}
