//! What an operator types to change backends and sessions, and what the backend's owner reads of it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::harness::{Balancer, echoes};
use super::wait::wait_for;

/// A balancer with a socket for operators, and its demo backend.
struct Stage {
    balancer: Balancer,
    socket: PathBuf,
}

/// An `lb backend --echo`, and what it has printed.
struct Owner {
    process: Child,
    said: Arc<Mutex<String>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Owner {
    fn wait_for(&self, words: &str) {
        wait_for(&format!("{words:?} from the backend"), || {
            self.said.lock().unwrap().contains(words).then_some(())
        });
    }
}

impl Stage {
    fn start(name: &str) -> Stage {
        let file = format!("lb-operate-{}-verbs-{name}.sock", std::process::id());
        let socket = std::env::temp_dir().join(file);
        let settings = format!("admin.socket = {socket:?}\n");
        let balancer = Balancer::start_on_loopback(&settings, |_| {});
        balancer.wait_until_told("READY=1");
        let stage = Stage { balancer, socket };
        wait_for("the demo backends", || (stage.backends().len() == 3).then_some(()));
        stage
    }

    fn backends(&self) -> Vec<Value> {
        self.balancer.status()["backends"].as_array().unwrap().clone()
    }

    fn backend(&self, id: &str) -> Value {
        self.backends().into_iter().find(|it| it["id"] == id).unwrap_or_default()
    }

    /// The id of the backend with this name.
    fn id(&self, name: &str) -> String {
        let found = || self.backends().into_iter().find(|it| it["name"] == name);
        wait_for("the backend to register", found)["id"].as_str().unwrap().to_owned()
    }

    fn own(&self, name: &str) -> Owner {
        let mut process = Command::new(env!("CARGO_BIN_EXE_lb"))
            .args(["backend", "--protocol", "tcp", "--port", "0", "--echo", "--name", name])
            .args(["--lb", &self.balancer.door("control").to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (lines, kept) = (BufReader::new(process.stdout.take().unwrap()), Arc::clone(&said));
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                kept.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        self.id(name);
        Owner { process, said }
    }

    /// Only this backend gets TCP users: the demo's leaves the rotation.
    fn only(&self, name: &str) -> Owner {
        let owner = self.own(name);
        let demo = self.backends().into_iter().find(|it| it["protocol"] == "tcp").unwrap();
        self.done(&["drain", demo["id"].as_str().unwrap()], 0);
        owner
    }

    fn typed(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lb"))
            .args(words)
            .arg("--admin")
            .arg(&self.socket)
            .output()
            .unwrap()
    }

    /// What a command prints that ends with this code, on whichever stream.
    fn done(&self, words: &[&str], code: i32) -> String {
        let output = self.typed(words);
        let said = String::from_utf8(output.stdout).unwrap();
        let said = said + &String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
        said
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[test]
fn a_drained_backend_keeps_its_sessions_is_empty_and_comes_back() {
    let stage = Stage::start("back");
    let owner = stage.only("web1");
    let mut user = stage.balancer.user();
    let id = stage.id("web1");
    let said = stage.done(&["drain", "web1", "--within", "never"], 0);
    assert!(said.contains("drains: 1 session left, which may end by themselves"), "{said}");
    assert!(said.contains("no other backend of service tcp is serving now"), "{said}");
    owner.wait_for(
        "an operator drains this backend: no new users, 1 session, which may end by itself",
    );
    let drain = &stage.backend(&id)["drain"];
    assert_eq!((&drain["by"], &drain["until_unix_ms"]), (&"operator".into(), &Value::Null));

    let said = stage.done(&["drain", "web1"], 0);
    assert!(said.contains("was draining already: 1 session left, which may end"), "{said}");
    let said = stage.done(&["drain", &id, "--within", "1h"], 0);
    assert!(said.contains("has a new deadline: 1 session left, which are ended in 1 h"), "{said}");
    assert!(stage.backend(&id)["drains_in_ms"].as_u64().unwrap() > 3_500_000);
    let page = String::from_utf8(stage.balancer.command("status").output().unwrap().stdout);
    let page = page.unwrap();
    assert!(
        page.lines().any(|line| line.contains("web1") && line.contains("draining, 59 min")),
        "{page}"
    );

    assert!(echoes(&mut user), "its session goes on");
    drop(user);
    wait_for("it to be empty", || stage.backend(&id)["drain"]["empty"].as_bool().filter(|it| *it));
    owner.wait_for("drained: no session is left");
    stage.balancer.wait_for_log("backend drained");
    let said = stage.done(&["undrain", "web1"], 0);
    assert!(said.contains("gets users again"), "{said}");
    owner.wait_for("an operator has undrained this backend");
    drop(stage.balancer.user());
    let said = stage.done(&["undrain", "web1"], 0);
    assert!(said.contains("was not draining: it is serving"), "{said}");
}

#[test]
fn a_script_waits_until_a_backend_is_empty_and_learns_whether_sessions_were_cut() {
    let stage = Stage::start("wait");
    let owner = stage.only("web1");
    let mut user = stage.balancer.user();
    let said = stage.done(&["drain", "web1", "--wait", "--within", "300ms"], 1);
    assert!(said.contains("is drained: 1 session had to be ended"), "{said}");
    assert!(!echoes(&mut user));
    owner.wait_for("drained: no session is left, 1 session had to be ended");
    stage.done(&["undrain", "web1"], 0);
    let user = stage.balancer.user();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| stage.done(&["drain", "web1", "--wait"], 0));
        owner.wait_for("1 session, to be ended in 30 s");
        drop(user);
        let said = waiting.join().unwrap();
        assert!(said.contains("is drained: no session is left\n"), "{said}");
    });
    stage.done(&["undrain", "web1"], 0);
    let user = stage.balancer.user();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| stage.done(&["drain", "web1", "--wait"], 2));
        let id = stage.id("web1");
        wait_for("the drain", || (stage.backend(&id)["state"] == "draining").then_some(()));
        stage.done(&["undrain", "web1"], 0);
        let said = waiting.join().unwrap();
        assert!(said.contains("was undrained meanwhile: it is serving"), "{said}");
    });
    drop(user);
}

#[test]
fn sessions_are_listed_by_every_filter_and_ended_by_id_or_address() {
    let stage = Stage::start("end");
    let owner = stage.only("web1");
    let mut users = [stage.balancer.user(), stage.balancer.user(), stage.balancer.user()];
    let id = stage.id("web1");
    let json = |filters: &[&str]| -> Vec<Value> {
        let said = stage.done(&[&["sessions", "--json"][..], filters].concat(), 0);
        said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for filters in [
        &["--backend", "web1"][..],
        &["--backend", &id, "--service", "tcp", "--protocol", "tcp"],
        &["--client", "127.0.0.0/8", "--worker", "0", "--age", "0ms"],
    ] {
        assert_eq!(json(filters).len(), 3, "{filters:?}");
    }
    for filters in [&["--client", "10.0.0.1"][..], &["--age", "1h"], &["--protocol", "udp"]] {
        assert_eq!(json(filters).len(), 0, "{filters:?}");
    }
    let page = stage.done(&["sessions", "--limit", "2"], 0);
    assert!(
        page.starts_with("session") && page.contains("2 sessions, and more: --after "),
        "{page}"
    );
    let said = stage.done(&["sessions", "--backend", "wbe1"], 2);
    assert!(said.contains("there is no backend wbe1; the nearest"), "{said}");

    let first = &json(&["--client", &users[0].local_addr().unwrap().ip().to_string()])[0];
    let session = first["id"].as_str().unwrap();
    let said = stage.done(&["end", session], 0);
    assert!(said.contains(session) && said.contains("is ended"), "{said}");
    wait_for("its end", || (json(&[]).len() == 2).then_some(()));
    let said = stage.done(&["end", session], 2);
    assert!(said.contains("has ended") || said.contains("is running"), "{said}");
    let said = stage.done(&["end", "127.0.0.1"], 2);
    assert!(said.contains("has 2 sessions: 0-") && said.contains("--all"), "{said}");
    let left = users.iter_mut().map(echoes).filter(|is_served| *is_served).count();
    assert_eq!(left, 2);
    stage.done(&["end", "127.0.0.1", "--all"], 0);
    wait_for("their end", || json(&[]).is_empty().then_some(()));
    // How many share a message depends on the time between them.
    owner.wait_for("an operator has ended ");
    stage.balancer.wait_for_log("change=\"end\"");
}

#[test]
fn a_weight_is_set_and_the_owner_reads_it() {
    let stage = Stage::start("weight");
    let owner = stage.own("web1");
    let said = stage.done(&["weight", "web1", "3"], 0);
    assert!(said.contains("now has weight 3 instead of 1, 75.0 % of the new users"), "{said}");
    owner.wait_for("an operator has given this backend weight 3");
    let json: Value =
        serde_json::from_str(&stage.done(&["weight", "web1", "3", "--json"], 0)).unwrap();
    assert_eq!(json["backend"]["weight"], 3);
    assert!(stage.done(&["weight", "web1", "0"], 2).contains("use `lb drain`"));
}

#[test]
fn what_is_typed_wrongly_changes_nothing_and_is_told_with_the_cure() {
    let mut stage = Stage::start("wrong");
    let (_first, second) = (stage.own("web1"), stage.own("web2"));
    for (words, cure) in [
        (&["drain"][..], "to stop the balancer, type `lb stop`"),
        (&["drain", "web3"], "there is no backend web3; the nearest of 5 are: b"),
        (&["drain", "127.0.0.1"], "127.0.0.1 may be any of 5 backends: b1"),
        (&["drain", "web1", "--service", "tpc"], "there is no service tpc; similar names"),
        (&["drain", "web1", "--within", "5x"], "`x` is none of the units"),
        (&["drain", "web1", "--within", "48h"], "at most 24h, or never"),
        (&["drain", "web1", "web3"], "there is no backend web3"),
        (&["undrain", "b99"], "there is no backend b99"),
        (&["end", "0-9-9"], "no session 0-9-9 is running"),
        (&["end", "web1"], "neither a session's id such as 0-17-4 nor a user's address"),
    ] {
        let said = stage.done(words, 2);
        assert!(said.contains(cure), "{words:?}: {said}");
    }
    assert!(stage.backends().iter().all(|it| it["state"] == "serving"));
    let door = stage.balancer.door("admin").to_string();
    let mut output = Command::new(env!("CARGO_BIN_EXE_lb"));
    output.args(["drain", "web1", "--admin", &door]);
    let output = output.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("[admin] socket"), "{said}");

    let said = stage.done(&["drain", "web1", "web2", "--json"], 0);
    let states: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(states.iter().all(|it| it["backend"]["state"] == "draining"), "{said}");
    drop(second);
    let said = stage.done(&["stop"], 0);
    assert!(said.ends_with("stopped\n"), "{said}");
    assert_eq!(stage.balancer.wait_for_exit(), Some(0));
}
