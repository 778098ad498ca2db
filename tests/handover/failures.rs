//! Handovers that come to nothing, and processes that die in the middle of one: users notice nothing as long as
//! one of the two serves.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Output;
use std::thread::{self, JoinHandle};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Backend, Balancer, echo_streams};
use crate::wait::{PATIENCE, wait_for};

struct Scene {
    balancer: Balancer,
    backend: Backend,
    users: Vec<TcpStream>,
}

impl Scene {
    /// A balancer with users, whose processes wait at a step of each handover.
    fn new(pause_at: &str) -> Scene {
        Scene::with("workers = 1\n", pause_at)
    }

    fn with(settings: &str, pause_at: &str) -> Scene {
        let balancer = Balancer::start_as(settings, |lb| {
            lb.env("LB_PAUSE_AT", pause_at);
        });
        let backend = Backend::register(&balancer, "tcp", echo_streams());
        let door = balancer.door("tcp");
        let users = (0..10)
            .map(|_| {
                let user = TcpStream::connect(door).unwrap();
                user.set_read_timeout(Some(PATIENCE)).unwrap();
                user
            })
            .collect();
        let mut scene = Scene { balancer, backend, users };
        scene.all_go_on("at first");
        scene
    }

    /// Everybody is served, and so is a newcomer.
    #[track_caller]
    fn all_go_on(&mut self, when: &str) {
        let mut newcomer = TcpStream::connect(self.balancer.door("tcp")).unwrap();
        newcomer.set_read_timeout(Some(PATIENCE)).unwrap();
        for user in self.users.iter_mut().chain([&mut newcomer]) {
            user.write_all(when.as_bytes()).unwrap();
            let mut answer = vec![0; when.len()];
            user.read_exact(&mut answer).unwrap();
            assert_eq!(answer, when.as_bytes());
        }
        assert!(self.backend.is_connected(), "{when}");
    }

    /// Has somebody type `lb upgrade`.
    fn begin(&self) -> JoinHandle<Output> {
        let mut command = self.balancer.command("upgrade");
        thread::spawn(move || command.output().unwrap())
    }

    /// The process that `old` has started.
    fn successor_of(&self, old: u32) -> u32 {
        let found = wait_for("a successor", || {
            std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
                let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()?;
                let program = std::fs::read_link(entry.path().join("exe")).ok()?;
                let is_lb = program == self.balancer.program;
                (parent == old && is_lb).then_some(pid)
            })
        });
        self.balancer.knows(found);
        found
    }
}

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until a process has come to the step at which it pauses.
fn reach(scene: &Scene, step: &str) {
    scene.balancer.wait_for_log(&format!("pausing at=\"{step}\""));
}

#[test]
fn a_successor_that_is_killed_at_any_step_changes_nothing() {
    for step in ["born", "offering", "inherited", "checked"] {
        let mut scene = Scene::new(step);
        let old = scene.balancer.pid();
        let upgrade = scene.begin();
        reach(&scene, step);
        send(scene.successor_of(old), Signal::SIGKILL);
        let output = upgrade.join().unwrap();
        assert_eq!(output.status.code(), Some(2), "{step}: {}", said(&output));
        assert!(said(&output).contains("goes on"), "{step}: {}", said(&output));
        assert_eq!(scene.balancer.pid(), old, "{step}");
        scene.all_go_on(step);
        let status = scene.balancer.status();
        assert_eq!(status["handover"]["state"], "none");
        assert!(status["handover"]["failed"]["why"].is_string());
    }
}

#[test]
fn a_successor_that_is_killed_while_the_old_process_stands_still_is_followed_by_another() {
    let mut scene = Scene::new("frozen");
    let old = scene.balancer.pid();
    let upgrade = scene.begin();
    reach(&scene, "frozen");
    send(scene.successor_of(old), Signal::SIGKILL);
    let output = upgrade.join().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_ne!(scene.balancer.pid(), old);
    scene.all_go_on("after two attempts");
}

#[test]
fn a_successor_that_stops_at_any_step_is_given_up() {
    for step in ["inherited", "checked"] {
        let mut scene = Scene::new(step);
        let old = scene.balancer.pid();
        let upgrade = scene.begin();
        reach(&scene, step);
        let new = scene.successor_of(old);
        send(new, Signal::SIGSTOP);
        let output = upgrade.join().unwrap();
        assert_eq!(output.status.code(), Some(2), "{step}: {}", said(&output));
        assert_eq!(scene.balancer.pid(), old, "{step}");
        scene.balancer.wait_for_end(new);
        scene.all_go_on(step);
    }
}

#[test]
fn an_old_process_that_is_killed_once_the_new_one_serves_takes_nobody_with_it() {
    let mut scene = Scene::new("serving");
    let old = scene.balancer.pid();
    let upgrade = scene.begin();
    reach(&scene, "serving");
    send(old, Signal::SIGKILL);
    scene.balancer.wait_for_end(old);
    let _ = upgrade.join().unwrap();
    assert_ne!(scene.balancer.pid(), old);
    scene.all_go_on("afterwards");
}

#[test]
fn a_successor_that_dies_with_everything_before_it_serves_is_no_orderly_end() {
    let mut scene = Scene::new("taken");
    let old = scene.balancer.pid();
    let upgrade = scene.begin();
    reach(&scene, "taken");
    send(scene.successor_of(old), Signal::SIGKILL);
    assert_eq!(scene.balancer.exit_code_of_first(), Some(1), "a service manager starts another");
    assert!(!upgrade.join().unwrap().status.success());
    assert!(scene.balancer.log().contains("nobody serves any more"));
}

#[test]
fn a_successor_whose_old_process_is_killed_before_the_end_leaves() {
    for step in ["frozen", "checked"] {
        let scene = Scene::new(step);
        let old = scene.balancer.pid();
        let upgrade = scene.begin();
        reach(&scene, step);
        let new = scene.successor_of(old);
        send(old, Signal::SIGKILL);
        if step == "frozen" {
            scene.balancer.wait_for_end(new);
        }
        let _ = upgrade.join().unwrap();
    }
}

#[test]
fn a_handover_that_failed_can_be_tried_again() {
    let mut scene = Scene::new("nowhere");
    let old = scene.balancer.pid();
    let file = scene.balancer.folder.path().join("lb.toml");
    for (settings, why) in [
        ("workers = 1\nnonsense = 3\n", "nonsense"),
        ("workers = 1\n[tls]\nticket_file = \"/nowhere\"\n", "/nowhere"),
        ("workers = 1\nlimits.buffer_bytes = \"900G\"\n", "buffer_bytes"),
    ] {
        std::fs::write(&file, settings).unwrap();
        let output = scene.balancer.try_upgrade();
        assert_eq!(output.status.code(), Some(2));
        assert!(said(&output).contains(why), "{}", said(&output));
        scene.all_go_on(why);
    }
    std::fs::write(&file, "workers = 1\n").unwrap();
    // The program has gone.
    let hidden = scene.balancer.folder.path().join("hidden");
    std::fs::rename(&scene.balancer.program, &hidden).unwrap();
    let mut command = std::process::Command::new(&hidden);
    command.args(["upgrade", "--admin", &scene.balancer.door("admin").to_string()]);
    let output = command.output().unwrap();
    assert!(said(&output).contains("cannot start"), "{}", said(&output));
    std::fs::rename(&hidden, &scene.balancer.program).unwrap();
    scene.all_go_on("without a program");
    scene.balancer.upgrade();
    assert_ne!(scene.balancer.pid(), old);
    scene.all_go_on("at last");
}

#[test]
fn a_demo_says_that_it_has_no_successor() {
    let balancer = Balancer::start_as("workers = 1\n", |lb| {
        lb.args(["--demo", "1"]);
    });
    let output = balancer.try_upgrade();
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("without --demo"), "{}", said(&output));
}

#[test]
fn a_second_upgrade_waits_for_the_first() {
    let mut scene = Scene::new("born");
    let first = scene.begin();
    reach(&scene, "born");
    let output = scene.balancer.try_upgrade();
    assert!(said(&output).contains("under way"), "{}", said(&output));
    assert!(first.join().unwrap().status.success());
    scene.all_go_on("afterwards");
}
