//! HTTP/2 with programs that share nothing with the `h2` crate: curl, nghttp, Node and Python's h2 as users of `lb
//! serve`, servers of HTTP/1.1 behind it, load, and a suite of conformance. Needs Debian's `curl`, `nghttp2-client`,
//! `nginx`, `python3` and `nodejs`, and PyPI's h2 and crates.io's httpwg-cli, which `.ci/run` installs into `target`;
//! so these tests run only on request: `cargo test --test peers_h2 -- --ignored`.

use std::process::Command;
use std::thread;

#[path = "peers_h2/conformance.rs"]
mod conformance;
#[path = "h2/frames.rs"]
mod frames;
#[path = "h2/harness.rs"]
mod harness;
#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "common/wait.rs"]
mod wait;

use frames::{Ended, GOAWAY, HEADERS, User, WHOLE, block, frame, pseudo};
use harness::Balancer;
use process::{Folder, Process, free_port};
use servers::listening;

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers_h2");
const PACKAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/python");
/// The length and the SHA-256 of three million zeros.
const ZEROS: &str = "3000000 35bce4eae54ec8e6cc2868baa8d157914d6ae2858811b4cc0c078c94460fa26f";

/// Node servers that report what they were asked.
struct Servers {
    _processes: Vec<Process>,
    ports: Vec<u16>,
}

impl Servers {
    fn start(count: usize) -> Servers {
        let ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
        let script = format!("{SCRIPTS}/server.js");
        let start = |port: &u16| Process::start("node", &[&script, &port.to_string()]);
        let servers = Servers { _processes: ports.iter().map(start).collect(), ports };
        servers.ports.iter().copied().for_each(listening);
        servers
    }
}

/// What a program says that ends well.
fn output(program: &str, arguments: &[&str]) -> String {
    let arguments = [&["60", program][..], arguments].concat();
    let command = Command::new("timeout").args(arguments).env("PYTHONPATH", PACKAGES).output();
    let output = command.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}\n{text}{errors}", output.status);
    text
}

/// Node's client plays one of its cases.
fn node_plays(case: &str, servers: usize) {
    let servers = Servers::start(servers);
    let balancer = Balancer::over(&servers.ports);
    let script = format!("{SCRIPTS}/client.js");
    output("node", &[&script, &balancer.port.to_string(), case]);
}

#[test]
#[ignore = "needs nodejs"]
fn node_sends_and_gets_bodies_and_trailers_as_they_are() {
    node_plays("bodies", 1);
    node_plays("trailers", 1);
}

#[test]
#[ignore = "needs nodejs"]
fn node_hears_interim_responses_and_an_answer_that_comes_before_its_body_is_sent() {
    node_plays("interim", 1);
    node_plays("early", 1);
}

#[test]
#[ignore = "needs nodejs"]
fn a_users_reset_reaches_the_backend() {
    node_plays("reset", 1);
}

#[test]
#[ignore = "needs nodejs"]
fn a_backend_that_dies_ends_its_streams_and_no_others() {
    node_plays("death", 1);
}

#[test]
#[ignore = "needs nodejs"]
fn a_thousand_requests_of_one_connection_are_shared_evenly() {
    node_plays("shares", 4);
}

#[test]
#[ignore = "needs python3 and its package h2 in target/python, and nodejs"]
fn pythons_h2_sends_and_gets_everything_as_it_is() {
    let servers = Servers::start(1);
    let balancer = Balancer::over(&servers.ports);
    output("python3", &[&format!("{SCRIPTS}/client.py"), &balancer.port.to_string()]);
}

#[test]
#[ignore = "needs curl and nodejs"]
fn curl_sends_and_gets_everything_as_it_is() {
    let servers = Servers::start(1);
    let balancer = Balancer::over(&servers.ports);
    let folder = Folder::new("h2-curl");
    let file = folder.write("file", vec![0; 3_000_000]);
    let (upload, url) = (format!("@{file}"), balancer.url("/curl"));
    let curl = |more: &[&str]| {
        let usual = ["-sSi", "--http2-prior-knowledge", "--max-time", "30"];
        output("curl", &[&usual[..], more].concat())
    };
    let answer = curl(&[&url]);
    assert!(answer.starts_with("HTTP/2 200 "), "{answer}");
    assert!(answer.contains("x-report: GET /curl 0 "), "{answer}");
    assert!(curl(&["-I", &url]).contains("x-report: HEAD /curl 0 "));
    for (shape, length) in [
        (&["--data-binary", &upload][..], "3000000"),
        (&["--data-binary", &upload, "-H", "Content-Length:"], "-"),
        (&["--data-binary", &upload, "-H", "Expect: 100-continue"], "3000000"),
        (&["-X", "POST", "-T", &file], "3000000"),
    ] {
        let answer = curl(&[&[url.as_str()], shape].concat());
        assert!(answer.contains(&format!("x-report: POST /curl {ZEROS} -")), "{answer}");
        assert!(answer.contains(&format!("x-length: {length}\r\n")), "{shape:?}: {answer}");
    }
    let hints = curl(&[&balancer.url("/hints")]);
    assert!(hints.starts_with("HTTP/2 103 ") && hints.contains("HTTP/2 200 "), "{hints}");
    let trailers = curl(&[&balancer.url("/trailers")]);
    assert!(trailers.contains("with trailers") && trailers.contains("x-sum: abc"), "{trailers}");
}

#[test]
#[ignore = "needs nghttp2-client and nodejs"]
fn nghttp_sends_and_gets_everything_as_it_is() {
    let servers = Servers::start(1);
    let balancer = Balancer::over(&servers.ports);
    let folder = Folder::new("h2-nghttp");
    let file = folder.write("file", vec![0; 3_000_000]);
    let url = balancer.url("/ng");
    let nghttp = |more: &[&str]| output("nghttp", &[&["-nv"], more].concat());
    assert!(nghttp(&[&url]).contains("x-report: GET /ng 0 "));
    assert!(nghttp(&["-H:method: HEAD", &url]).contains("x-report: HEAD /ng 0 "));
    // Trailers are behind chunks or nowhere in HTTP/1.1, and a length excludes those.
    let open = ["--no-content-length", "--trailer", "x-sum: up"];
    for (shape, trailer) in [(&[][..], "-"), (&open[..1], "-"), (&open, "up")] {
        // The padding is no content.
        let answer = nghttp(&[&["-d", &file, "--padding=100", &url], shape].concat());
        let report = format!("x-report: POST /ng {ZEROS} {trailer}");
        assert!(answer.contains(&report), "{shape:?}: {answer}");
    }
    let early = nghttp(&["-d", &file, &balancer.url("/early")]);
    assert!(early.contains(":status: 413"), "{early}");
    let trailers = nghttp(&[&balancer.url("/trailers")]);
    assert!(trailers.contains(") x-sum: abc"), "{trailers}");
    let many: Vec<_> = (0..20).map(|number| balancer.url(&format!("/many/{number}"))).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    assert_eq!(nghttp(&many).matches(") :status: 200").count(), 20);
}

#[test]
#[ignore = "needs nghttp2-client and nginx"]
fn under_load_no_stream_fails() {
    let folder = Folder::new("h2-load");
    let (port, root) = (free_port(), folder.path().display().to_string());
    let file = folder.write(
        "nginx.conf",
        format!(
            "daemon off; master_process off; pid {root}/pid; error_log stderr;
             events {{ worker_connections 8192; }}
             http {{ access_log off; keepalive_requests 1000000; client_body_temp_path {root};
               proxy_temp_path {root}; fastcgi_temp_path {root}; uwsgi_temp_path {root};
               scgi_temp_path {root};
               server {{ listen 127.0.0.1:{port};
                 location /small {{ return 200 \"small\\n\"; }} }} }}"
        ),
    );
    let _nginx = Process::start("nginx", &["-p", &root, "-c", &file]);
    listening(port);
    let balancer = Balancer::over(&[port]);
    let load = output("h2load", &["-n100000", "-c64", "-m32", &balancer.url("/small")]);
    assert!(load.contains("100000 succeeded, 0 failed, 0 errored, 0 timeout"), "{load}");
    assert!(load.contains("status codes: 100000 2xx"), "{load}");
    eprintln!("{load}");
}

#[test]
#[ignore = "needs nodejs"]
fn a_balancer_that_stops_says_goaway_and_finishes_what_is_under_way() {
    let servers = Servers::start(1);
    // It does not stop by its patience: that is longer than the test's.
    let balancer = Balancer::with("[timeouts]\ndrain_ms = 600000\n", &servers.ports);
    let mut user = User::connect(balancer.port);
    assert!(user.send(&frame(HEADERS, WHOLE, 1, &block(&pseudo("GET", "/slow")))));
    while user.next().expect("the answer begins").kind != HEADERS {}
    let admin = format!("127.0.0.1:{}", balancer.admin);
    let stopping = thread::spawn(move || {
        output(env!("CARGO_BIN_EXE_lb"), &["stop", "--admin", &admin]);
    });
    while user.next().expect("GOAWAY comes first").kind != GOAWAY {}
    assert_eq!(user.goaway, Some(0));
    // One that was on its way, before the last number is told, is served too.
    let asked_late = user.send(&frame(HEADERS, WHOLE, 3, &block(&pseudo("GET", "/late"))));
    assert!(asked_late, "the connection is open");
    let (mut whole, mut served) = (Vec::new(), Vec::new());
    while let Some(frame) = user.next() {
        if frame.stream == 1 && frame.kind == frames::DATA {
            whole.extend_from_slice(&frame.payload);
        }
        if frame.ends_stream() {
            served.push(frame.stream);
        }
    }
    assert!(served.contains(&1) && served.contains(&3), "{served:?}");
    assert!(String::from_utf8_lossy(&whole).ends_with("but whole"), "{whole:?}");
    assert_eq!(user.end_of(1), Ended::Gone(Some(0)), "all is said");
    drop(user);
    stopping.join().unwrap();
}
