//! `lb backend` with several services and several balancers, and without the secret that it needs.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Balancer, private};
use crate::wait::wait_for;

/// `lb backend`, and what it has said.
struct Joining {
    child: Child,
    said: Arc<Mutex<String>>,
}

impl Joining {
    fn start(arguments: &[&str]) -> Joining {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lb"))
            .arg("backend")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let said = Arc::<Mutex<String>>::default();
        let (lines, written) = (child.stdout.take().unwrap(), Arc::clone(&said));
        std::thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                written.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        Joining { child, said }
    }

    fn wait_until_said(&self, words: &str) {
        wait_for(words, || self.said.lock().unwrap().contains(words).then_some(()));
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A balancer with the services `red` and `blue`, and what else is in its file.
fn balancer(more: &str) -> Balancer {
    let service =
        |name: &str| format!("[service.{name}]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n");
    let settings = format!("{more}\n{}{}", service("red"), service("blue"));
    Balancer::start_on_loopback(&settings, |_| {})
}

/// The services that somebody registered for at this port.
fn services_of(balancer: &Balancer, port: u16) -> Vec<String> {
    let address = SocketAddr::from(([127, 0, 0, 1], port)).to_string();
    let status = balancer.status();
    let all = status["backends"].as_array().unwrap().iter();
    let mut names: Vec<String> = all
        .filter(|it| it["address"] == *address && it["state"] == "serving")
        .map(|it| it["service"].as_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn one_program_registers_several_services_with_several_balancers() {
    let (one, other) = (balancer(""), balancer(""));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let [first, second] = [&one, &other].map(|it| it.door("control").to_string());
    let service = format!("red,blue={port}");
    let port_text = port.to_string();
    let joining = Joining::start(&[
        "--service",
        &service,
        "--port",
        &port_text,
        "--lb",
        &first,
        "--lb",
        &second,
        "--check",
        "tcp",
    ]);
    for (balancer, control) in [(&one, &first), (&other, &second)] {
        wait_for("both services", || {
            (services_of(balancer, port) == ["blue", "red"]).then_some(())
        });
        joining
            .wait_until_said(&format!("{control}: registered: red port {port}, blue port {port}"));
    }
    // One balancer gone is no reason to leave the other.
    drop(other);
    joining
        .wait_until_said(&format!("{second}: not registered: red port {port}, blue port {port}"));
    assert_eq!(services_of(&one, port), ["blue", "red"]);
    kill(Pid::from_raw(joining.child.id() as i32), Signal::SIGTERM).unwrap();
    wait_for("it to have left", || services_of(&one, port).is_empty().then_some(()));
}

#[test]
fn without_the_right_secret_it_ends_with_code_2_and_the_cure() {
    let folder = std::env::temp_dir().join(format!("lb-joining-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let [right, wrong] = ["right", "wrong"].map(|name| folder.join(name));
    private(&right, "the secret of the balancer\n");
    private(&wrong, "the secret of another one\n");
    let service = "[service.own]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n";
    let own = format!("[control]\nsecret_file = {right:?}\n{service}");
    let balancer = Balancer::start_on_loopback(&own, |_| {});
    let control = balancer.door("control").to_string();
    let with = |more: &[&str]| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let output = Command::new(env!("CARGO_BIN_EXE_lb"))
            .args(["backend", "--service", "own", "--port", &port, "--lb", &control])
            .args(more)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = with(&[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("the balancer wants a secret") && said.contains("--secret-file"),
        "{said}"
    );
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    let (code, said) = with(&["--secret-file", wrong.to_str().unwrap()]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("the secret in --secret-file is not the balancer's"), "{said}");
    // As long as one balancer takes it, another one's refusal ends nothing.
    let open = self::balancer("");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let both = [control.clone(), open.door("control").to_string()].join(",");
    let port_text = port.to_string();
    let mut joining = Joining::start(&["--protocol", "tcp", "--port", &port_text, "--lb", &both]);
    wait_for("a registration", || (services_of(&open, port) == ["tcp"]).then_some(()));
    joining.wait_until_said(&format!("{control}: not registered: tcp port {port}"));
    assert_eq!(joining.child.try_wait().unwrap(), None);
    drop(joining);
    let joining = Joining::start(&[
        "--service",
        "own",
        "--port",
        &port_text,
        "--lb",
        &control,
        "--secret-file",
        right.to_str().unwrap(),
    ]);
    wait_for("a registration", || (services_of(&balancer, port) == ["own"]).then_some(()));
    drop(joining);
    let _ = std::fs::remove_dir_all(&folder);
}
