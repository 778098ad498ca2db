//! One balancer under test: a real `lb serve` with its settings file, its log and its service manager.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::{PATIENCE, wait_for};

/// A balancer with one demo backend, its own ports, its settings file and its manager's socket.
pub struct Balancer {
    pub process: Child,
    folder: PathBuf,
    pub manager: UnixDatagram,
    pub log: Arc<Mutex<String>>,
}

impl Balancer {
    pub fn start(settings: &str) -> Balancer {
        Balancer::start_at(settings, ["127.0.0.1:0".parse().unwrap(); 3])
    }

    /// With the doors of users, backends and operators at these places.
    pub fn start_at(settings: &str, doors: [SocketAddr; 3]) -> Balancer {
        let doors = doors.map(|door| door.to_string());
        Balancer::start_as(settings, |lb| {
            lb.args(["--udp", "off", "--api", "off", "--tcp", &doors[0]]);
            lb.args(["--control", &doors[1], "--admin", &doors[2]]);
        })
    }

    /// With all its doors on loopback, and started as `how` says.
    pub fn start_on_loopback(settings: &str, how: impl FnOnce(&mut Command)) -> Balancer {
        Balancer::start_as(settings, |lb| {
            for door in ["--tcp", "--udp", "--api", "--control", "--admin"] {
                lb.args([door, "127.0.0.1:0"]);
            }
            how(lb);
        })
    }

    pub fn start_as(settings: &str, how: impl FnOnce(&mut Command)) -> Balancer {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("lb-operate-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("lb.toml"), settings).unwrap();
        let manager = UnixDatagram::bind(folder.join("notify")).unwrap();
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        command
            .args(["serve", "--demo", "1", "--workers", "1", "--config"])
            .arg(folder.join("lb.toml"))
            .env("NOTIFY_SOCKET", folder.join("notify"))
            .env("WATCHDOG_USEC", "4000000")
            .stdout(Stdio::piped());
        how(&mut command);
        let mut process = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let written = Arc::clone(&log);
        std::thread::spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                written.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        Balancer { process, folder, manager, log }
    }

    pub fn ready(settings: &str) -> Balancer {
        let balancer = Balancer::start(settings);
        balancer.wait_until_told("READY=1");
        balancer
    }

    /// Reads messages to the manager until one has a line with this start.
    pub fn wait_until_told(&self, start: &str) -> String {
        let since = Instant::now();
        let mut bytes = [0; 4096];
        while since.elapsed() < PATIENCE {
            let count = self.manager.recv(&mut bytes).expect(start);
            let message = String::from_utf8_lossy(&bytes[..count]).into_owned();
            if message.lines().any(|line| line.starts_with(start)) {
                return message;
            }
        }
        panic!("the manager was never told {start}");
    }

    pub fn wait_for_log(&self, words: &str) -> String {
        wait_for(&format!("{words:?} in the log"), || {
            let log = self.log.lock().unwrap();
            log.lines().find(|line| line.contains(words)).map(str::to_owned)
        })
    }

    /// The address of a door, by its name in the log.
    pub fn door(&self, name: &str) -> SocketAddr {
        let line = self.wait_for_log("doors open");
        let start = format!("{name}=");
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(&start));
        word.expect(&line).trim_matches('"').parse().expect(&line)
    }

    /// The same where the log is JSON.
    pub fn json_door(&self, name: &str) -> SocketAddr {
        let line = self.wait_for_log("doors open");
        let line: serde_json::Value = serde_json::from_str(&line).expect(&line);
        line[name].as_str().unwrap().parse().unwrap()
    }

    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        command.args([name, "--admin", &self.door("admin").to_string()]);
        command
    }

    pub fn status(&self) -> serde_json::Value {
        let output = self.command("status").arg("--json").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    pub fn change(&self, settings: &str) -> Output {
        fs::write(self.folder.join("lb.toml"), settings).unwrap();
        self.command("reload").output().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// A user with a session that has carried a line both ways.
    pub fn user(&self) -> TcpStream {
        let door = self.door("tcp");
        wait_for("a user to be served", || {
            let mut user = TcpStream::connect(door).unwrap();
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            echoes(&mut user).then_some(user)
        })
    }

    pub fn wait_for_exit(&mut self) -> Option<i32> {
        let process = &mut self.process;
        wait_for("the balancer to exit", || process.try_wait().unwrap()).code()
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            eprintln!("the balancer's log:\n{log}");
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

pub fn echoes(user: &mut TcpStream) -> bool {
    let mut answer = [0; 6];
    user.write_all(b"hello\n").is_ok() && user.read_exact(&mut answer).is_ok()
}

/// The reply to one request to a door that closes afterwards.
pub fn asked(door: SocketAddr, request: &[u8]) -> String {
    let mut user = TcpStream::connect(door).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user.write_all(request).unwrap();
    let mut answer = Vec::new();
    // A reset after an answer takes nothing from it.
    let _ = user.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// A file that only its owner may read.
pub fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}
