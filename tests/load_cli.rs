//! `lb bench` as a person runs it: what it writes, what it says, and how it exits.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

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
    for word in [
        "direct",
        "balanced",
        "p99.9",
        "/request",
        "The balancer adds",
        "met: errors=0",
        "saturation",
        "--rate ",
    ] {
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

/// One sentence on standard error, exit code 2, and no figure anywhere.
#[track_caller]
fn refused(arguments: &[&str], done: &Output, word: &str) {
    let (out, said) = (text(&done.stdout), text(&done.stderr));
    assert_eq!(done.status.code(), Some(2), "{arguments:?}: {out}{said}");
    assert!(said.starts_with("lb: ") && said.contains(word), "{arguments:?}: {said}");
    assert_eq!((said.lines().count(), out.as_str()), (1, ""), "{arguments:?}: {said}");
}

#[test]
fn nobody_who_answers_is_one_sentence_and_exit_code_2() {
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let (deaf, mute) = (TcpListener::bind(anywhere).unwrap(), UdpSocket::bind(anywhere).unwrap());
    let deaf = deaf.local_addr().map(|at| (deaf, at.to_string())).unwrap();
    let mute = mute.local_addr().map(|at| (mute, at.to_string())).unwrap();
    let nobody = UdpSocket::bind(anywhere).unwrap().local_addr().unwrap().to_string();
    let (json, svg) = (place("silent.json"), place("silent.svg"));
    for (to, more) in [
        (&deaf.1, &["--protocol", "tcp"][..]),
        (&deaf.1, &["--protocol", "tcp", "--rate", "100"]),
        (&deaf.1, &["--protocol", "tcp", "--churn"]),
        (&deaf.1, &["--protocol", "tcp", "--bulk", "down"]),
        (&deaf.1, &["--protocol", "tcp", "--bulk", "up"]),
        (&deaf.1, &["--protocol", "tcp", "--bulk", "both"]),
        (&deaf.1, &["--protocol", "api"]),
        (&mute.1, &["--protocol", "udp"]),
        (&nobody, &["--protocol", "udp"]),
        (&nobody, &["--protocol", "tcp", "--churn"]),
    ] {
        let _ = std::fs::remove_file(&svg);
        let files = ["--json", json.to_str().unwrap(), "--plot", svg.to_str().unwrap()];
        let arguments = with_short(&[&["--timeout", "100ms", "--to", to], more, &files].concat());
        refused(&arguments, &bench(&arguments), "not one right reply came from 127.0.0.1:");
        let report = std::fs::read_to_string(&json).unwrap();
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(
            (&report["valid"], &report["requests_per_second"]),
            (&false.into(), &0.0.into())
        );
        assert!(!svg.exists(), "there is nothing to draw");
    }
}

#[test]
fn too_few_descriptors_are_one_sentence_and_exit_code_2() {
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = deaf.local_addr().unwrap().to_string();
    for (limit, arguments, word) in [
        (60, &["--to", to.as_str(), "--connections", "100"][..], "the run needs 126 descriptors"),
        (60, &["--to", to.as_str(), "--connections", "100", "--churn"], "needs 226 descriptors"),
        (100, &["--connections", "100"], "the run needs 238 descriptors"),
        (260, &["--connections", "100"], "connections through a balancer, not for 100"),
    ] {
        let done = Command::new("bash")
            .args(["-c", "ulimit -n \"$1\"; shift; exec \"$@\"", "bash", &limit.to_string()])
            .args([env!("CARGO_BIN_EXE_lb"), "bench"])
            .args(arguments)
            .output()
            .unwrap();
        refused(arguments, &done, word);
        assert!(text(&done.stderr).contains("ulimit -Hn"), "{}", text(&done.stderr));
    }
}

#[test]
fn a_run_that_was_measured_but_means_nothing_exits_with_1_whatever_was_expected() {
    // Answers, but never as fast as the schedule wants.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut user in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut message = [0; 64];
                while user.read_exact(&mut message).is_ok() {
                    std::thread::sleep(Duration::from_millis(20));
                    let _ = user.write_all(&message);
                }
            });
        }
    });
    for more in [&[][..], &["--expect", "requests>0"], &["--quiet"]] {
        let arguments = with_short(&[&["--to", &to, "--rate", "4000"], more].concat());
        let done = bench(&arguments);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains(&format!("INVALID: {to}: ")), "{said}");
        assert!(said.contains("found no free connection"), "{said}");
    }
}

#[test]
fn unknown_stickiness_is_told_with_its_cure() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for user in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut &user, &mut &user));
        }
    });
    let arguments = with_short(&["--to", &to, "--expect", "sticky=100%"]);
    let done = bench(&arguments);
    let said = text(&done.stdout);
    assert_eq!(done.status.code(), Some(1), "{said}{}", text(&done.stderr));
    assert!(said.contains("NOT MET: sticky=100 %, unknown: no reply named its backend"), "{said}");
    assert!(said.contains("`lb bench serve`"), "{said}");
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
        (vec!["--duration", "0"], "a longer --duration"),
        (vec!["--timeout", "0ms"], "a longer one"),
        (vec!["--protocol", "api", "--expect", "sticky=100%"], "one by one"),
        (vec!["--expect", "lag<1ms"], "give --rate"),
        (vec!["--protocol", "api", "--path", "no slash", "--to", nobody.as_str()], "valid request"),
        (vec!["plot", "no-such-file.json", "-o", "x.svg"], "no-such-file.json"),
    ] {
        let done = bench(&arguments);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(word), "{arguments:?}: {said}");
    }
}
