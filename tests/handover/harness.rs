//! A balancer that is handed over from process to process, and backends of the test's own.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::process::Folder;
use crate::wait::wait_for;

/// A real `lb serve`, and every process that has succeeded it.
pub struct Balancer {
    pub folder: Folder,
    first: Child,
    pub program: PathBuf,
    /// All that have served so far.
    pids: Mutex<BTreeSet<u32>>,
}

impl Balancer {
    pub fn start(settings: &str) -> Balancer {
        Balancer::start_as(settings, |_| {})
    }

    pub fn start_as(settings: &str, how: impl FnOnce(&mut Command)) -> Balancer {
        let folder = Folder::new("handover");
        let file = folder.write("lb.toml", settings);
        // A name of its own, so that it can be replaced like an installed program; which name does not matter.
        let program = folder.path().join("balancer");
        std::fs::hard_link(env!("CARGO_BIN_EXE_lb"), &program)
            .or_else(|_| std::fs::copy(env!("CARGO_BIN_EXE_lb"), &program).map(drop))
            .unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let mut command = Command::new(&program);
        command.args(["serve", "--config", &file]);
        for door in ["--tcp", "--udp", "--api", "--control", "--admin"] {
            command.args([door, "127.0.0.1:0"]);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        how(&mut command);
        let first = command.spawn().unwrap();
        let pids = Mutex::new(BTreeSet::from([first.id()]));
        let balancer = Balancer { folder, first, program, pids };
        balancer.wait_for_log("doors open");
        wait_for("an answer", || balancer.try_status());
        balancer
    }

    /// One more process that is to end with the test.
    pub fn knows(&self, pid: u32) {
        self.pids.lock().unwrap().insert(pid);
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    pub fn wait_for_log(&self, words: &str) -> String {
        wait_for(&format!("{words:?} in the log"), || {
            self.log().lines().find(|line| line.contains(words)).map(str::to_owned)
        })
    }

    /// The address of a door, by its name in the log.
    pub fn door(&self, name: &str) -> SocketAddr {
        let line = self.wait_for_log("doors open");
        let start = format!("{name}=");
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(&start));
        word.expect(&line).trim_matches('"').parse().expect(&line)
    }

    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args([name, "--admin", &self.door("admin").to_string()]);
        command
    }

    fn try_status(&self) -> Option<Value> {
        let output = self.command("status").arg("--json").output().ok()?;
        serde_json::from_slice(&output.stdout).ok()
    }

    pub fn status(&self) -> Value {
        let status = wait_for("a status", || self.try_status());
        self.pids.lock().unwrap().insert(status["pid"].as_u64().unwrap() as u32);
        status
    }

    pub fn pid(&self) -> u32 {
        self.status()["pid"].as_u64().unwrap() as u32
    }

    /// What `lb upgrade` says of an attempt.
    pub fn try_upgrade(&self) -> Output {
        let output = self.command("upgrade").output().unwrap();
        self.status();
        output
    }

    /// Hands over, and returns for how long nobody was served, in milliseconds. On a machine that has much else to
    /// do, a successor may be too late, and nothing has changed.
    #[track_caller]
    pub fn upgrade(&self) -> f64 {
        let before = self.pid();
        wait_for("a successor that is not late", || {
            let output = self.try_upgrade();
            let said = String::from_utf8_lossy(&output.stderr);
            let is_late = said.contains("in time");
            assert!(output.status.success() || is_late, "{said}");
            output.status.success().then_some(())
        });
        let status = self.status();
        assert_ne!(status["pid"].as_u64().unwrap() as u32, before);
        status["handover"]["taken"]["stall_us"].as_u64().unwrap() as f64 / 1000.0
    }

    /// The exit code of the process that served first, once it has ended.
    pub fn exit_code_of_first(&mut self) -> Option<i32> {
        self.first.wait().unwrap().code()
    }

    /// Waits until a process has ended.
    pub fn wait_for_end(&self, pid: u32) {
        wait_for("the old process to end", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
            let is_over = stat.is_none_or(|stat| stat.contains(") Z "));
            is_over.then_some(())
        });
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        if let Some(status) = self.try_status() {
            self.pids.lock().unwrap().insert(status["pid"].as_u64().unwrap_or_default() as u32);
        }
        for pid in self.pids.lock().unwrap().iter().filter(|pid| **pid != 0) {
            let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
            // A number may be another process's by now.
            if command.is_ok_and(|it| it.contains(self.folder.path().to_str().unwrap())) {
                let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
            }
        }
        let _ = self.first.wait();
    }
}

/// A backend that registers itself, answers hellos, and notices if its control connection ends.
pub struct Backend {
    pub ended: Arc<AtomicU64>,
    control: TcpStream,
}

impl Backend {
    /// Registers a port of this host for a service, and goes on answering.
    pub fn register(balancer: &Balancer, protocol: &str, port: u16) -> Backend {
        let mut control = TcpStream::connect(balancer.door("control")).unwrap();
        let request =
            format!("{{\"cmd\":\"register\",\"protocol\":\"{protocol}\",\"port\":{port}}}\n");
        control.write_all(request.as_bytes()).unwrap();
        let mut lines = BufReader::new(control.try_clone().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        assert!(first.contains("successful"), "{first}");
        let ended = Arc::<AtomicU64>::default();
        let backend = Backend { ended: Arc::clone(&ended), control };
        let mut answers = backend.control.try_clone().unwrap();
        thread::spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                if line.contains("hello") {
                    let _ = answers.write_all(b"{\"ack\":\"hello\"}\n");
                }
            }
            ended.fetch_add(1, Ordering::Relaxed);
        });
        backend
    }

    pub fn is_connected(&self) -> bool {
        self.ended.load(Ordering::Relaxed) == 0
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.control.shutdown(std::net::Shutdown::Both);
    }
}

/// Gives back whatever it is sent; returns its port.
pub fn echo_streams() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = vec![0; 64 * 1024];
                while let Ok(count @ 1..) = connection.read(&mut bytes) {
                    if connection.write_all(&bytes[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// The same for datagrams.
pub fn echo_datagrams() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&bytes[..count], from);
        }
    });
    port
}
