//! A named service from its table in the file to its users: a backend that joins it by name, its door, and
//! a reload that finds nothing changed.

use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::harness::{Balancer, echoes};
use crate::wait::{PATIENCE, wait_for};

const SETTINGS: &str = "[service.redis]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n\
                        policy = \"least_sessions\"\n";

/// A backend that ends with its test.
struct Joined(Child);

impl Joined {
    fn start(control: SocketAddr) -> Joined {
        let control = control.to_string();
        let child = Command::new(env!("CARGO_BIN_EXE_lb"))
            .args(["backend", "--service", "redis", "--protocol", "tcp", "--port", "0", "--echo"])
            .args(["--lb", &control])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Joined(child.unwrap())
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn redis(status: &Value) -> &Value {
    let services = status["services"].as_array().unwrap();
    services.iter().find(|it| it["name"] == "redis").expect("the service of the file")
}

#[test]
fn a_backend_joins_a_service_by_its_name_and_gets_the_users_of_its_door() {
    let balancer = Balancer::ready(SETTINGS);
    let _backend = Joined::start(balancer.door("control"));
    let line = wait_for("the backend to join", || {
        let log = balancer.log.lock().unwrap();
        log.lines()
            .find(|it| {
                it.contains("backend registered") && it.contains("protocol=tcp service=redis")
            })
            .map(str::to_owned)
    });
    assert!(line.contains("name=-"), "{line}");

    let status = balancer.status();
    let shown = redis(&status);
    let door: SocketAddr = shown["doors"][0].as_str().unwrap().parse().unwrap();
    assert_ne!(door.port(), 0, "the kernel chose one");
    assert_eq!(shown["terms"][0], "policy = \"least_sessions\"");
    assert_eq!(shown["backends"]["serving"], 1);
    let mut user = TcpStream::connect(door).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(echoes(&mut user));
    wait_for("the session to be counted", || {
        (redis(&balancer.status())["sessions_active"] == 1).then_some(())
    });
    let output = balancer.command("status").output().unwrap();
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(page.contains("services") && page.contains(&door.to_string()), "{page}");

    let done = balancer.change(SETTINGS);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    balancer.wait_for_log("reloaded now=0 after_restart=0");
    assert!(echoes(&mut user), "the session goes on");
}
