//! The alert rules for Prometheus: each goes off where it should, and none while all is well. Owns the
//! series of a healthy balancer, from which each scene differs in what is wrong there.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::{Value, json};

use crate::shown::{all_exist, deployed};

/// The series of a balancer that is well, each a sample every 30 s for two hours, by name and labels.
const WELL: &[(&str, &str, &str)] = &[
    ("lb_build_info", r#"version="0.1.0""#, "1x240"),
    ("lb_start_time_seconds", "", "1000x240"),
    ("lb_serving", "", "1x240"),
    ("lb_turns_total", r#"worker="0""#, "0+100x240"),
    ("lb_service_backends", r#"service="tcp",state="serving""#, "2x240"),
    ("lb_service_backends", r#"service="tcp",state="aside""#, "0x240"),
    ("lb_service_backends", r#"service="tcp",state="failing""#, "0x240"),
    // A built-in service that nobody uses.
    ("lb_service_backends", r#"service="udp",state="serving""#, "0x240"),
    ("lb_sessions_active", r#"worker="0""#, "100x240"),
    ("lb_sessions_active", r#"worker="1""#, "100x240"),
    ("lb_sessions_limit", "", "1000x240"),
    ("lb_udp_sessions_active", "", "50x240"),
    ("lb_udp_sessions_limit", "", "1000x240"),
    ("lb_service_sessions_active", r#"service="tcp",protocol="tcp""#, "10x240"),
    ("lb_service_sessions_limit", r#"service="tcp",protocol="tcp""#, "100x240"),
    ("lb_sessions_started_total", r#"worker="0""#, "0+10x240"),
    ("lb_api_requests_total", r#"worker="0""#, "0+100x240"),
    ("lb_udp_datagrams_up_total", r#"worker="0""#, "0+100x240"),
];

/// When the alerts are looked at: 200 samples from the start.
const AT: &str = "100m";

/// What differs in a scene, and which alerts go off.
type Scene = (&'static [(&'static str, &'static str, &'static str)], &'static [&'static str]);

const SCENES: &[Scene] = &[
    (&[], &[]),
    (&[("lb_build_info", r#"version="0.1.0""#, "1x120 _x120")], &["LbGone"]),
    (&[("lb_start_time_seconds", "", "1000x195 2000x45")], &["LbRestarted"]),
    (
        &[("lb_start_time_seconds", "", "1000x150 2000x20 3000x20 4000x60")],
        &["LbRestarted", "LbRestartsOften"],
    ),
    (&[("lb_serving", "", "1x180 0x60")], &["LbStopping"]),
    (&[("lb_serving", "", "1x198 0x60")], &[]),
    (&[("lb_turns_total", r#"worker="0""#, "0+100x190 19000x50")], &["LbWorkerHangs"]),
    (
        &[
            ("lb_service_backends", r#"service="tcp",state="serving""#, "2x190 0x50"),
            ("lb_service_backends", r#"service="tcp",state="aside""#, "0x190 2x50"),
        ],
        &["LbBackendsAside", "LbNobodyServing", "LbServiceWithoutBackends"],
    ),
    (
        &[("lb_service_backends", r#"service="redis",state="serving""#, "0x240")],
        &["LbServiceWithoutBackends"],
    ),
    (
        &[("lb_service_backends", r#"service="tcp",state="failing""#, "0x190 1x50")],
        &["LbBackendsAside"],
    ),
    (&[("lb_control_backends_lost_total", "", "0x180 0+1x60")], &["LbBackendsComeAndGo"]),
    (&[("lb_sessions_active", r#"worker="0""#, "950x240")], &["LbSessionsNearLimit"]),
    // Those of UDP users count towards their own limit only.
    (
        &[
            ("lb_sessions_active", r#"worker="0""#, "900x240"),
            ("lb_udp_sessions_active", "", "900x240"),
        ],
        &["LbUdpSessionsNearLimit"],
    ),
    (
        &[("lb_service_sessions_active", r#"service="tcp",protocol="tcp""#, "90x240")],
        &["LbServiceNearLimit"],
    ),
    (&[("lb_accept_failed_total", r#"worker="0""#, "0x190 0+1x50")], &["LbDescriptorsShort"]),
    (
        &[("lb_users_refused_exhausted_total", r#"worker="0""#, "0x190 0+1x50")],
        &["LbDescriptorsShort"],
    ),
    (
        &[("lb_udp_dropped_upstream_exhausted_total", r#"worker="0""#, "0x190 0+1x50")],
        &["LbUdpSocketsShort"],
    ),
    (&[("lb_buffers_exhausted_total", r#"worker="0""#, "0+1x240")], &["LbBuffersShort"]),
    (&[("lb_control_connections_refused_full_total", "", "0x190 0+1x50")], &["LbControlDoorFull"]),
    (
        &[("lb_users_refused_unreachable_total", r#"worker="0""#, "0x180 0+1x60")],
        &["LbUsersTurnedAway"],
    ),
    (&[("lb_connects_failed_total", r#"worker="0""#, "0+5x240")], &["LbConnectsFail"]),
    (&[("lb_api_failed_total", r#"worker="0""#, "0+10x240")], &["LbApiErrors"]),
    (&[("lb_udp_dropped_queue_full_total", r#"worker="0""#, "0+5x240")], &["LbDatagramsDropped"]),
    (&[("lb_control_reloads_refused_total", "", "0x195 1x45")], &["LbReloadRefused"]),
    (&[("lb_control_lines_dropped_total", "", "0x190 9x50")], &["LbLogLinesLost"]),
    (&[("lb_reports_dropped_total", r#"worker="0""#, "0x190 9x50")], &["LbLogLinesLost"]),
    (&[("lb_control_proofs_failed_total", "", "0x180 0+1x60")], &["LbStrangersAtTheDoor"]),
];

fn rules() -> String {
    deployed("alerts-lb.yml")
}

/// The names in a text that begin with `lb_`.
fn metrics(text: &str) -> BTreeSet<&str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !is_name(c)).filter(|word| word.starts_with("lb_")).collect()
}

/// The names of all alerts.
fn alerts(rules: &str) -> BTreeSet<&str> {
    rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect()
}

#[test]
fn every_metric_of_the_alerts_exists_and_every_alert_says_what_to_do() {
    let rules = rules();
    all_exist(&rules);
    let blocks: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(blocks.len() >= 20, "{}", blocks.len());
    for block in blocks {
        let severities = ["critical", "warning", "info"].map(|it| format!("severity: {it} }}"));
        assert!(severities.iter().any(|severity| block.contains(severity)), "{block}");
        assert!(block.contains("summary: \"") && block.contains("description: \""), "{block}");
    }
}

#[test]
fn every_alert_goes_off_in_a_scene() {
    let rules = rules();
    let seen: BTreeSet<&str> = SCENES.iter().flat_map(|scene| scene.1.iter().copied()).collect();
    assert_eq!(seen, alerts(&rules));
}

/// A test of a scene, in the words of promtool.
fn test(rules: &str, scene: &Scene) -> Value {
    let named = |name: &str, labels: &str| {
        let comma = if labels.is_empty() { "" } else { "," };
        format!("{name}{{job=\"lb\",instance=\"one:8084\"{comma}{labels}}}")
    };
    let mut series: BTreeMap<String, &str> = BTreeMap::new();
    for name in metrics(rules).into_iter().filter(|name| name.ends_with("_total")) {
        let labels = if name.starts_with("lb_control_") { "" } else { "worker=\"0\"" };
        series.insert(named(name, labels), "0x240");
    }
    for (name, labels, values) in WELL.iter().chain(scene.0) {
        series.insert(named(name, labels), values);
    }
    let input: Vec<Value> = series
        .into_iter()
        .map(|(series, values)| json!({"series": series, "values": values}))
        .collect();
    let expected: Vec<Value> = scene
        .1
        .iter()
        .map(|alert| json!({"labels": format!("{{alertname=\"{alert}\"}}"), "value": 1}))
        .collect();
    json!({
        "interval": "30s",
        "name": format!("{scene:?}"),
        "input_series": input,
        "promql_expr_test": [{
            "expr": "count by (alertname) (ALERTS{alertstate=\"firing\"})",
            "eval_time": AT,
            "exp_samples": expected,
        }],
    })
}

#[test]
#[ignore = "needs promtool, from the Debian package prometheus"]
fn promtool_finds_the_alerts_going_off_where_they_should() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/alerts-lb.yml");
    let rules = rules();
    let scenes: Vec<Value> = SCENES.iter().map(|scene| test(&rules, scene)).collect();
    let tests = json!({"rule_files": [file], "evaluation_interval": "30s", "tests": scenes});
    let path = std::env::temp_dir().join(format!("lb-alerts-{}.yml", std::process::id()));
    // JSON is YAML.
    std::fs::write(&path, tests.to_string()).unwrap();
    let checked = Command::new("promtool").args(["check", "rules", file]).output();
    let tested = Command::new("promtool").args(["test", "rules"]).arg(&path).output();
    let _ = std::fs::remove_file(&path);
    for outcome in [checked, tested] {
        let outcome = outcome.expect("promtool, from the package prometheus");
        let said = String::from_utf8_lossy(&outcome.stdout);
        let complained = String::from_utf8_lossy(&outcome.stderr);
        assert!(outcome.status.success(), "{said}{complained}");
    }
}
