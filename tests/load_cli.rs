//! `lb bench` as a person runs it: what it writes, what it says, and how it exits.

use std::path::PathBuf;
use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
    command.arg("bench").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn place(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

const SHORT: [&str; 6] = ["--duration", "300ms", "--warmup", "50ms", "--connections", "4"];

fn with_short<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    SHORT.iter().chain(arguments).copied().collect()
}

#[test]
fn without_an_address_a_balancer_is_started_measured_and_ended() {
    let (json, hgrm, svg) = (place("own.json"), place("own.hgrm"), place("own.svg"));
    let done = bench(&with_short(&[
        "--json",
        json.to_str().unwrap(),
        "--hgrm",
        hgrm.to_str().unwrap(),
        "--plot",
        svg.to_str().unwrap(),
        "--expect",
        "errors=0",
        "--expect",
        "sticky=100%",
        "--expect",
        "spread<=1",
        "--expect",
        "requests>0",
    ]));
    let said = text(&done.stdout);
    assert!(done.status.success(), "{said}{}", text(&done.stderr));
    for word in ["direct", "balanced", "p99.9", "us/request", "The balancer adds", "met: errors=0"]
    {
        assert!(said.contains(word), "{word}:\n{said}");
    }
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(report["label"], "balanced");
    assert_eq!(report["backends"].as_object().unwrap().len(), 2);
    assert!(report["balancer_cpu_ns"].as_u64().unwrap() > 0);
    assert!(std::fs::read_to_string(&hgrm).unwrap().contains("1/(1-Percentile)"));
    assert!(std::fs::read_to_string(&svg).unwrap().contains("balanced"));

    let both = place("both.svg");
    let json = json.to_str().unwrap();
    let done = bench(&["plot", json, json, "-o", both.to_str().unwrap()]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(std::fs::read_to_string(&both).unwrap().contains("own (balanced)"));
}

#[test]
fn what_was_expected_decides_the_exit_code() {
    let done = bench(&with_short(&["--quiet", "--expect", "p50<1ns", "--expect", "errors=0"]));
    assert_eq!(done.status.code(), Some(1), "{}", text(&done.stderr));
    let said = text(&done.stdout);
    assert!(said.contains("NOT MET: p50<"), "{said}");
    assert!(!said.contains("met: errors"), "quiet says only what went wrong: {said}");
}

#[test]
fn what_cannot_be_run_is_one_sentence_and_exit_code_2() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = nobody.to_string();
    for (arguments, word) in [
        (vec!["--to", nobody.as_str()], "does something listen there"),
        (vec!["--to", "nowhere"], "not an address with a port"),
        (vec!["--to", nobody.as_str(), "--size", "3"], "24 bytes"),
        (vec!["--to", nobody.as_str(), "--churn", "--protocol", "udp"], "for TCP"),
        (vec!["--expect", "p99<fast"], "number"),
        (vec!["--protocol", "api", "--path", "no slash", "--to", nobody.as_str()], "valid request"),
        (vec!["plot", "no-such-file.json", "-o", "x.svg"], "no-such-file.json"),
    ] {
        let done = bench(&arguments);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(word), "{arguments:?}: {said}");
    }
}
