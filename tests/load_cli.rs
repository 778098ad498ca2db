//! `lb bench` as a person runs it: what it writes, what it says, and how it exits.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

#[path = "common/certified.rs"]
mod certified;

use certified::certified;

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
fn under_tls_the_report_tells_of_the_handshakes() {
    let json = place("tls.json");
    for (more, resumed, bulk) in [
        (&["--protocol", "api", "--expect", "handshakes=4"][..], false, false),
        (&["--protocol", "api", "--churn", "--tls-resume", "--expect", "resumed>0%"], true, false),
        (&["--churn", "--expect", "resumed=0", "--insecure"], false, false),
        (&["--bulk", "down", "--tls-group", "X25519"], false, true),
        (&["--bulk", "up"], false, true),
        (&["--bulk", "both"], false, true),
    ] {
        let files = ["--tls", "--json", json.to_str().unwrap(), "--expect", "errors=0"];
        let arguments = with_short(&[&files, more].concat());
        let done = bench(&arguments);
        let said = text(&done.stdout);
        assert!(done.status.success(), "{arguments:?}: {said}{}", text(&done.stderr));
        for word in
            ["handshakes", "their p99", "Agreed with the server: TLS 1.3, AES_128_GCM, X25519"]
        {
            assert!(said.contains(word), "{arguments:?}: {word}: {said}");
        }
        let report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
        assert_eq!((&report["label"], &report["errors_total"]), (&"balanced".into(), &0.into()));
        let tls = &report["tls"];
        let number = |name: &str| tls[name].as_u64().unwrap();
        assert_eq!(number("handshakes"), number("full") + number("resumed"));
        assert_eq!((number("resumed") > 0, number("failed")), (resumed, 0));
        assert!(tls["latency_us"]["p50"].as_f64().unwrap() > 0.0);
        assert_eq!(said.contains("The balancer and TLS add"), !bulk, "{said}");
    }
}

#[test]
fn a_certificate_that_is_not_trusted_is_one_sentence_and_exit_code_2() {
    let (pem, config) = certified("a.example");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut user in listener.incoming().flatten() {
            let mut connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            std::thread::spawn(move || {
                while connection.complete_io(&mut user).is_ok_and(|(read, _)| read > 0) {}
            });
        }
    });
    let ca = place("a.pem");
    std::fs::write(&ca, pem).unwrap();
    let other = place("other.pem");
    let (of_other, _) = certified("other.example");
    std::fs::write(&other, of_other).unwrap();
    let (ca, other) = (ca.to_str().unwrap(), other.to_str().unwrap());
    for (more, word) in [
        (&["--tls-ca", other][..], "comes from no trusted authority; name one with --tls-ca"),
        (
            &["--tls-ca", other, "--churn"],
            "comes from no trusted authority; name one with --tls-ca",
        ),
        (&["--tls-ca", ca], "is not for 127.0.0.1; ask for another host with --tls-name"),
        (&["--tls-ca", "no-such.pem"], "cannot read no-such.pem"),
        (&["--tls-ca", ca, "--tls-name", "a b"], "`a b` is no name"),
    ] {
        let arguments = with_short(&[&["--tls", "--to", &to], more].concat());
        refused(&arguments, &bench(&arguments), word);
    }
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
        (vec!["--to", nobody.as_str(), "--churn", "--protocol", "udp"], "for TCP and API"),
        (vec!["--expect", "p99<fast"], "number"),
        (vec!["--duration", "0"], "a longer --duration"),
        (vec!["--timeout", "0ms"], "a longer one"),
        (vec!["--protocol", "api", "--expect", "sticky=100%"], "one by one"),
        (vec!["--expect", "lag<1ms"], "give --rate"),
        (vec!["--expect", "resumed>0"], "give --tls"),
        (vec!["--tls", "--protocol", "udp"], "TLS is for TCP and API"),
        (vec!["--insecure"], "--tls"),
        (vec!["--protocol", "api", "--http2"], "--to"),
        (vec!["--to", nobody.as_str(), "--http2"], "HTTP/2 is for API"),
        (vec!["--to", nobody.as_str(), "--streams", "2"], "--http2"),
        (
            vec!["--to", nobody.as_str(), "--protocol", "api", "--http2", "--streams", "0"],
            "1 to 1000",
        ),
        (vec!["--protocol", "api", "--path", "no slash", "--to", nobody.as_str()], "valid request"),
        (vec!["plot", "no-such-file.json", "-o", "x.svg"], "no-such-file.json"),
    ] {
        let done = bench(&arguments);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(word), "{arguments:?}: {said}");
    }
}
