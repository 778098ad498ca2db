//! The running program as an operator and a service manager meet it: readiness, health, reload and
//! drain of a real `lb serve` with a user's session through it. Every wait is for a condition.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, SigSet, Signal, kill};
use nix::unistd::Pid;

#[path = "common/wait.rs"]
mod wait;

use wait::{PATIENCE, wait_for};

/// A balancer with one demo backend on ports of its own, its settings file and its manager's socket.
struct Balancer {
    process: Child,
    folder: PathBuf,
    manager: UnixDatagram,
    log: Arc<Mutex<String>>,
}

impl Balancer {
    fn start(settings: &str) -> Balancer {
        Balancer::start_at(settings, ["127.0.0.1:0".parse().unwrap(); 3])
    }

    /// With the doors of users, backends and operators at these places.
    fn start_at(settings: &str, doors: [SocketAddr; 3]) -> Balancer {
        let doors = doors.map(|door| door.to_string());
        Balancer::start_as(settings, |lb| {
            lb.args(["--udp", "off", "--api", "off", "--tcp", &doors[0]]);
            lb.args(["--control", &doors[1], "--admin", &doors[2]]);
        })
    }

    /// With every door of its own on loopback, and started as `how` says.
    fn start_on_loopback(settings: &str, how: impl FnOnce(&mut Command)) -> Balancer {
        Balancer::start_as(settings, |lb| {
            for door in ["--tcp", "--udp", "--api", "--control", "--admin"] {
                lb.args([door, "127.0.0.1:0"]);
            }
            how(lb);
        })
    }

    fn start_as(settings: &str, how: impl FnOnce(&mut Command)) -> Balancer {
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

    fn ready(settings: &str) -> Balancer {
        let balancer = Balancer::start(settings);
        balancer.wait_until_told("READY=1");
        balancer
    }

    /// Reads what the manager is told up to a message that holds a line that begins like this.
    fn wait_until_told(&self, start: &str) -> String {
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

    fn wait_for_log(&self, words: &str) -> String {
        wait_for(&format!("{words:?} in the log"), || {
            let log = self.log.lock().unwrap();
            log.lines().find(|line| line.contains(words)).map(str::to_owned)
        })
    }

    /// Where a door was opened, by its name in the log.
    fn door(&self, name: &str) -> SocketAddr {
        let line = self.wait_for_log("doors open");
        let start = format!("{name}=");
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(&start));
        word.expect(&line).trim_matches('"').parse().expect(&line)
    }

    /// The same where the log is JSON.
    fn json_door(&self, name: &str) -> SocketAddr {
        let line = self.wait_for_log("doors open");
        let line: serde_json::Value = serde_json::from_str(&line).expect(&line);
        line[name].as_str().unwrap().parse().unwrap()
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        command.args([name, "--admin", &self.door("admin").to_string()]);
        command
    }

    fn status(&self) -> serde_json::Value {
        let output = self.command("status").arg("--json").output().unwrap();
        serde_json::from_slice(&output.stdout).expect("the balancer answers")
    }

    fn change(&self, settings: &str) -> Output {
        fs::write(self.folder.join("lb.toml"), settings).unwrap();
        self.command("reload").output().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// A user with a session that has carried a line both ways.
    fn user(&self) -> TcpStream {
        let door = self.door("tcp");
        wait_for("a user to be served", || {
            let mut user = TcpStream::connect(door).unwrap();
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            echoes(&mut user).then_some(user)
        })
    }

    fn wait_for_exit(&mut self) -> Option<i32> {
        let process = &mut self.process;
        wait_for("the balancer to exit", || process.try_wait().unwrap()).code()
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn echoes(user: &mut TcpStream) -> bool {
    let mut answer = [0; 6];
    user.write_all(b"hello\n").is_ok() && user.read_exact(&mut answer).is_ok()
}

#[test]
fn the_manager_is_told_of_readiness_health_reload_and_the_end() {
    let mut balancer = Balancer::ready("");
    TcpStream::connect(balancer.door("tcp")).expect("ready means that the users' door is open");
    TcpStream::connect(balancer.door("control")).expect("and that of the backends");
    TcpStream::connect(balancer.door("admin")).expect("and that of the operators");
    balancer.wait_until_told("WATCHDOG=1");
    balancer.wait_until_told("WATCHDOG=1");
    let user = balancer.user();
    balancer.wait_until_told("STATUS=1 session on 1 backend");
    balancer.signal(Signal::SIGHUP);
    let message = balancer.wait_until_told("RELOADING=1");
    assert!(message.contains("MONOTONIC_USEC="), "{message}");
    balancer.wait_until_told("READY=1");
    balancer.signal(Signal::SIGTERM);
    balancer.wait_until_told("STOPPING=1");
    balancer.wait_until_told("STATUS=draining: 1 session left");
    drop(user);
    assert_eq!(balancer.wait_for_exit(), Some(0));
}

#[test]
fn the_control_core_keeps_off_the_cores_of_workers() {
    let balancer = Balancer::ready("workers = 1");
    let cores = |thread: &Path| {
        let about = fs::read_to_string(thread.join("status")).unwrap();
        let name = about.lines().next().unwrap().trim_start_matches("Name:\t").to_owned();
        let list = about.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"));
        (name, list.unwrap().to_owned())
    };
    let all = cores(Path::new("/proc/self")).1;
    let folder = format!("/proc/{}/task", balancer.process.id());
    wait_for("each to be on its cores", || {
        let threads = fs::read_dir(&folder).unwrap().map(|entry| cores(&entry.unwrap().path()));
        let threads: Vec<_> = threads.collect();
        let of = |name: &str| Some(&threads.iter().find(|thread| thread.0 == name)?.1);
        let (worker, control) = (of("lb-worker-0")?, of("lb")?);
        // A machine of one core has nothing to choose from.
        (worker == &all || (control != &all && control != worker)).then_some(())
    });
}

#[test]
fn a_balancer_that_was_killed_starts_again_at_once_on_the_same_ports() {
    for _ in 0..3 {
        let killed = Balancer::ready("");
        let users: Vec<TcpStream> = (0..200).map(|_| killed.user()).collect();
        let doors = ["tcp", "control", "admin"].map(|name| killed.door(name));
        killed.signal(Signal::SIGKILL);
        let again = Balancer::start_at("", doors);
        again.wait_until_told("READY=1");
        drop(users);
    }
}

#[test]
fn a_reload_changes_settings_and_leaves_a_running_session_alone() {
    let balancer = Balancer::ready("limits.sessions = 5");
    let mut user = balancer.user();
    let done = balancer.change(
        "balance.policy = \"source_hash\"\nlimits.sessions = 1\nlog.level = \"debug\"\n\
         limits.buffer_bytes = 1048576",
    );
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(said.contains("in use from now on: balance.policy = \"source_hash\"\n"), "{said}");
    assert!(said.contains("needs a restart: limits.buffer_bytes = 1048576\n"), "{said}");
    let status = balancer.status();
    assert_eq!(status["policy"], "source_hash");
    assert_eq!(status["sessions"]["limit"], 1);
    balancer.wait_for_log("in use from now on setting=balance.policy = \"source_hash\"");
    balancer.wait_for_log("needs a restart setting=limits.buffer_bytes = 1048576");
    balancer.wait_for_log("reloaded now=3 after_restart=1");
    assert!(echoes(&mut user), "the session that ran goes on");
    let mut other = TcpStream::connect(balancer.door("tcp")).unwrap();
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(!echoes(&mut other), "the lower limit holds for the next user");
    let more = balancer.change("limits.sessions = 50");
    assert!(more.status.success(), "{}", String::from_utf8_lossy(&more.stderr));
    let mut users: Vec<TcpStream> = (0..20).map(|_| balancer.user()).collect();
    assert!(users.iter_mut().all(echoes), "the limit may be raised beyond the first one");
}

#[test]
fn a_reload_changes_the_rule_of_health_for_backends_that_are_there() {
    let patient = "health.interval_ms = 200\nhealth.timeout_ms = 100\nhealth.misses = ";
    let balancer = Balancer::ready(&format!("{patient} 100"));
    let mut silent = TcpStream::connect(balancer.door("control")).unwrap();
    write!(silent, r#"{{"cmd":"register","protocol":"udp","port":9}}"#).unwrap();
    balancer.wait_for_log("misses=1 of=100");
    let done = balancer.change(&format!("{patient} 20"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    balancer.wait_for_log("it did not answer hello");
    balancer.wait_for_log("misses=20 of=20");
    assert!(
        !balancer.log.lock().unwrap().contains("misses=21 "),
        "the new limit is the one that held"
    );
}

/// A balancer whose main thread began with the signals in a state that its parent chose.
fn start_with_signals(choose: fn()) -> Balancer {
    let balancer = Balancer::start_on_loopback("", |lb| {
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            lb.pre_exec(move || {
                choose();
                Ok(())
            })
        };
    });
    balancer.wait_until_told("READY=1");
    balancer
}

#[test]
fn signals_that_the_parent_blocked_are_heard() {
    fn block() {
        SigSet::all().thread_block().unwrap();
    }
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut balancer = start_with_signals(block);
        balancer.signal(Signal::SIGHUP);
        balancer.wait_for_log("reloaded now=0");
        balancer.signal(end);
        assert_eq!(balancer.wait_for_exit(), Some(0), "{end}");
    }
}

#[test]
fn signals_that_the_parent_ignored_are_heard() {
    fn ignore() {
        for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
            // SAFETY: no handler is installed, so none can be wrong.
            unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) }.unwrap();
        }
    }
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut balancer = start_with_signals(ignore);
        balancer.signal(Signal::SIGHUP);
        balancer.wait_for_log("reloaded now=0");
        balancer.signal(end);
        assert_eq!(balancer.wait_for_exit(), Some(0), "{end}");
    }
}

#[test]
fn a_manager_in_the_abstract_namespace_is_told() {
    let name = format!("lb-operate-abstract-{}", std::process::id());
    let address = UnixAddress::from_abstract_name(&name).unwrap();
    let manager = UnixDatagram::bind_addr(&address).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut balancer = Balancer::start_on_loopback("", |lb| {
        lb.env("NOTIFY_SOCKET", format!("@{name}"));
    });
    balancer.manager = manager;
    balancer.wait_until_told("READY=1");
    balancer.signal(Signal::SIGTERM);
    balancer.wait_until_told("STOPPING=1");
    assert_eq!(balancer.wait_for_exit(), Some(0));
}

/// Has socket(2) refuse IPv6 as a kernel does that was started with `ipv6.disable=1`.
fn refuse_ipv6() {
    let step = |code: u32, jt, jf, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let refused = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
    // Offsets into seccomp_data (seccomp(2)): the call's number, and the low half of its first argument.
    let first_argument = 16 + if cfg!(target_endian = "big") { 4 } else { 0 };
    let mut steps = [
        step(load, 0, 0, 0),
        step(equal, 0, 3, libc::SYS_socket as u32),
        step(load, 0, 0, first_argument),
        step(equal, 0, 1, libc::AF_INET6 as u32),
        step(answer, 0, 0, refused),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the program outlives the call, which copies it.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(done, 0);
}

#[test]
fn a_kernel_without_ipv6_serves_users_of_ipv4_at_the_doors_for_all() {
    let balancer = Balancer::start_as("", |lb| {
        lb.args(["--control", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        for door in ["--tcp", "--udp", "--api"] {
            lb.args([door, "[::]:0"]);
        }
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            lb.pre_exec(|| {
                refuse_ipv6();
                Ok(())
            })
        };
    });
    balancer.wait_until_told("READY=1");
    for door in ["tcp", "udp", "api"] {
        let at = balancer.door(door);
        assert!(at.ip().is_unspecified() && at.is_ipv4(), "{at}");
        balancer.wait_for_log(&format!("users of IPv4 are served door=\"{door}\""));
    }
    drop(balancer.user());
}

/// What comes back for one request to the API door, which then closes.
fn asked(door: SocketAddr, request: &[u8]) -> String {
    let mut user = TcpStream::connect(door).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user.write_all(request).unwrap();
    let mut answer = Vec::new();
    // A reset behind an answer takes nothing from it.
    let _ = user.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// The line about the request of that status.
fn request_line(balancer: &Balancer, status: u16) -> serde_json::Value {
    let line = balancer.wait_for_log(&format!(r#""status":{status}"#));
    serde_json::from_str(&line).expect(&line)
}

#[test]
fn what_is_a_number_is_one_in_the_lines_for_machines() {
    let balancer = Balancer::start_on_loopback("log.format = \"json\"", |_| {});
    balancer.wait_until_told("READY=1");
    let door = balancer.json_door("api");
    wait_for("a request to be served", || {
        let answer = asked(door, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        answer.starts_with("HTTP/1.1 200").then_some(())
    });
    let line = request_line(&balancer, 200);
    for time in ["wait_ms", "connect_ms", "first_byte_ms", "total_ms"] {
        assert!(line[time].is_f64(), "{time} in {line}");
    }
    for count in ["bytes_up", "bytes_down", "retries"] {
        assert!(line[count].is_u64(), "{count} in {line}");
    }
    asked(door, b"GET / HTTP/9.9\r\nHost: x\r\n\r\n");
    let refused = request_line(&balancer, 505);
    assert!(refused["connect_ms"].is_null() && refused["total_ms"].is_f64(), "{refused}");
    // Nothing that the whole log calls a number, or a length of time, is written as text.
    let log = balancer.log.lock().unwrap();
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        for (name, value) in line.as_object().unwrap() {
            let number = value.as_str().is_some_and(|text| text.parse::<f64>().is_ok());
            assert!(!number && (!name.ends_with("_ms") || value.is_number()), "{name} in {line}");
        }
    }
}

#[test]
fn the_line_about_a_refused_request_names_it() {
    let balancer = Balancer::start_on_loopback("log.format = \"json\"\napi.head_ms = 100", |_| {});
    balancer.wait_until_told("READY=1");
    let door = balancer.json_door("api");
    let long = format!("Host: x\r\nA: {}\r\n\r\n", "v".repeat(9000));
    for (rest, status) in [("Host: a/b\r\n\r\n", 400), (long.as_str(), 431), ("Host: x\r\n", 408)] {
        let request = format!("PUT /which/one HTTP/1.1\r\n{rest}");
        let answer = asked(door, request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        let line = request_line(&balancer, status);
        assert_eq!((&line["method"], &line["path"]), (&"PUT".into(), &"/which/one".into()));
    }
}

/// A library that steps the wall clock of the process it is loaded into by two days, once a file is
/// there. The linker that this test was built with builds it.
fn stepping_clock(folder: &Path) -> PathBuf {
    let source = r#"
        #define _GNU_SOURCE
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <time.h>
        #include <unistd.h>
        int clock_gettime(clockid_t which, struct timespec *now) {
            const char *stepped = getenv("STEPPED");
            int result = syscall(SYS_clock_gettime, which, now);
            if (result == 0 && which == CLOCK_REALTIME && stepped && access(stepped, F_OK) == 0)
                now->tv_sec += 172800;
            return result;
        }
    "#;
    let (text, library) = (folder.join("clock.c"), folder.join("clock.so"));
    fs::write(&text, source).unwrap();
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&text).status();
    assert!(built.unwrap().success());
    library
}

#[test]
fn the_times_that_are_shown_follow_a_step_of_the_clock() {
    const TWO_DAYS: u64 = 172_800_000;
    let folder = std::env::temp_dir().join(format!("lb-clock-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let stepped = folder.join("stepped");
    let library = stepping_clock(&folder);
    let balancer = Balancer::start_on_loopback("health.interval_ms = 3000000", |lb| {
        lb.env("LD_PRELOAD", library).env("STEPPED", &stepped);
    });
    balancer.wait_until_told("READY=1");
    let _user = balancer.user();
    let admin = balancer.door("admin");
    let ask = |path: &str| {
        let request = format!("GET {path} HTTP/1.0\r\nHost: {admin}\r\n\r\n");
        let answer = asked(admin, request.as_bytes());
        answer.split_once("\r\n\r\n").expect(&answer).1.to_owned()
    };
    let times = || {
        let status: serde_json::Value = serde_json::from_str(&ask("/status")).unwrap();
        let sessions: serde_json::Value = serde_json::from_str(&ask("/sessions")).unwrap();
        let metrics = ask("/metrics");
        let seconds = metrics.lines().find_map(|line| line.strip_prefix("lb_start_time_seconds "));
        let shown = [
            status["started_unix_ms"].as_u64(),
            status["backends"][0]["registered_unix_ms"].as_u64(),
            sessions["sessions"][0]["started_unix_ms"].as_u64(),
            seconds.map(|seconds| (seconds.parse::<f64>().unwrap() * 1e3).round() as u64),
        ];
        (shown.map(Option::unwrap), status["uptime_ms"].as_u64().unwrap())
    };
    let (before, up) = times();
    assert_eq!(times().0, before, "without a step nothing moves");
    fs::write(&stepped, "").unwrap();
    let (after, still_up) = wait_for("the step to be shown", || {
        Some(times())
            .filter(|(after, _)| after.iter().zip(before).all(|(after, before)| *after != before))
    });
    for (before, after) in before.into_iter().zip(after) {
        assert!((after - before).abs_diff(TWO_DAYS) < 1000, "{before} became {after}");
    }
    assert!(still_up - up < PATIENCE.as_millis() as u64, "a length of time knows no wall clock");
    balancer.signal(Signal::SIGHUP);
    let (first, last) = (balancer.wait_for_log("ready kernel"), balancer.wait_for_log("reloaded"));
    assert_ne!(first[..10], last[..10], "{first}\n{last}");
    fs::remove_dir_all(folder).unwrap();
}

impl Balancer {
    /// How many lines of the log hold these words; none is longer than a kilobyte.
    fn lines(&self, words: &str) -> usize {
        let log = self.log.lock().unwrap();
        let lines = log.lines().filter(|line| line.contains(words));
        lines.inspect(|line| assert!(line.len() < 1024, "{} bytes", line.len())).count()
    }
}

/// Does something for as long as a second and a half, over and over.
fn flood(mut act: impl FnMut()) -> usize {
    let since = Instant::now();
    let mut times = 0;
    while since.elapsed() < Duration::from_millis(1500) {
        act();
        times += 1;
    }
    times
}

#[test]
fn strangers_are_told_of_by_a_bounded_number_of_bounded_lines_and_a_summary() {
    let folder = std::env::temp_dir().join(format!("lb-flood-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let secrets = folder.join("secrets");
    private(&secrets, "the-secret-of-the-control-door");
    let balancer = Balancer::ready(&format!("control.secret_file = {secrets:?}"));
    drop(balancer.user());
    let began = Instant::now();
    let (control, admin) = (balancer.door("control"), balancer.door("admin"));
    let wrong = br#"{"cmd":"auth","id":"web-1-web-1-web-1-web-1-web-1-web-1","mac":"00"}"#;
    let proofs = flood(|| {
        asked(control, wrong);
    });
    let path = "A".repeat(30_000);
    let post = format!("POST /{path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    let changes = flood(|| {
        asked(admin, post.as_bytes());
    });
    assert!(proofs > 50 && changes > 50, "{proofs} proofs, {changes} changes: no flood");
    let summary = balancer.wait_for_log("lines were held back");
    assert!(summary.contains("WARN") && summary.contains("proofs="), "{summary}");
    // Behind the floods this line comes last.
    balancer.signal(Signal::SIGHUP);
    balancer.wait_for_log("reloaded");
    let seconds = began.elapsed().as_secs() as usize + 1;
    for (words, burst, per_second) in [
        ("a host does not know the secret", 5, 1),
        ("a change was refused", 5, 1),
        ("backend refused", 10, 2),
        ("backend connected", 10, 2),
        ("backend disconnected", 10, 2),
    ] {
        let lines = balancer.lines(words);
        assert!((1..=burst + per_second * seconds).contains(&lines), "{lines} of {words:?}");
    }
    let counted = balancer.status()["control"]["lines_held_back"].as_u64().unwrap();
    assert!(counted as usize >= (proofs + changes) / 2, "{counted}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn strangers_who_come_and_go_hide_no_backend_that_joins_or_leaves() {
    const CHANGES: usize = 20;
    let balancer = Balancer::ready("");
    drop(balancer.user());
    let (control, users) = (balancer.door("control"), balancer.door("tcp"));
    let mut backend = TcpStream::connect(control).unwrap();
    let mut answers = BufReader::new(backend.try_clone().unwrap());
    let mut ask = |cmd: &str, port: usize| {
        writeln!(backend, r#"{{"cmd":"{cmd}","protocol":"udp","port":{port}}}"#).unwrap();
        let mut line = String::new();
        while !line.contains(&format!(r#""cmd":"{cmd}""#)) {
            line.clear();
            assert!(answers.read_line(&mut line).unwrap() > 0);
        }
        assert!(line.contains("successful"), "{line}");
    };
    for port in 1..=CHANGES {
        for _ in 0..100 {
            drop(TcpStream::connect(control).unwrap());
            drop(TcpStream::connect(users).unwrap());
        }
        ask("register", port);
        ask("unregister", port);
    }
    for port in 1..=CHANGES {
        balancer.wait_for_log(&format!("backend registered backend=b{} protocol=udp", port + 1));
        balancer.wait_for_log(&format!("backend left backend=b{} protocol=udp", port + 1));
    }
    assert!(balancer.lines("backend connected") < 100);
}

/// A file that only its owner may read.
fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn a_reload_reads_the_tokens_and_secrets_again() {
    let folder = std::env::temp_dir().join(format!("lb-tokens-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let (tokens, others) = (folder.join("tokens"), folder.join("others"));
    let (old, new) = ("an-old-token-of-the-admin-door", "a-new-token-of-the-admin-door");
    private(&tokens, old);
    private(&others, "a-third-token-of-the-admin-door");
    let settings = |file: &Path| format!("admin.token_file = {file:?}");
    let balancer = Balancer::ready(&settings(&tokens));
    let admin = balancer.door("admin");
    let may = |token: &str| {
        let answer = asked(
            admin,
            format!(
                "POST /backends/b999/drain HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\
                 Authorization: Bearer {token}\r\n\r\n"
            )
            .as_bytes(),
        );
        match answer.split(' ').nth(1) {
            Some("404") => true,
            Some("401") => false,
            _ => panic!("{answer}"),
        }
    };
    assert!(may(old) && !may(new));
    private(&tokens, new);
    assert!(balancer.change(&settings(&tokens)).status.success());
    assert!(!may(old), "a token that was taken out");
    assert!(may(new), "a token that was put in");
    private(&tokens, "short");
    let refused = balancer.change(&settings(&tokens));
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("nothing was changed: ") && said.contains("is shorter than"), "{said}");
    assert!(may(new), "a file with a fault changes nothing");
    assert!(balancer.change(&settings(&others)).status.success());
    assert!(!may(new) && may("a-third-token-of-the-admin-door"), "another file");
    assert!(balancer.change("").status.success());
    let answer = asked(
        admin,
        format!("POST /backends/b9/drain HTTP/1.0\r\nHost: {admin}\r\n\r\n").as_bytes(),
    );
    assert!(answer.contains("changes over TCP are off"), "{answer}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_reload_with_a_fault_changes_nothing_and_says_why() {
    let balancer = Balancer::ready("balance.policy = \"least_sessions\"");
    for (settings, reason) in [
        ("balance.policy = \"random\"", "balance.policy takes one of"),
        ("health.interval_ms = 1000", "health.timeout_ms (2000) must be less"),
        ("control.secret_file = \"no/such/file\"", "cannot read the secret file"),
        ("limits.sessions = 16777216", "raise LimitNOFILE"),
    ] {
        let refused = balancer.change(settings);
        assert_eq!(refused.status.code(), Some(2), "{settings}");
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(said.contains("nothing was changed: ") && said.contains(reason), "{said}");
        let line = balancer.wait_for_log(reason);
        assert!(line.contains("reload refused, nothing was changed"), "{line}");
        assert_eq!(balancer.status()["policy"], "least_sessions");
    }
}

#[test]
fn a_refused_registration_is_in_the_log_with_its_reason() {
    let balancer = Balancer::ready("");
    let mut backend = TcpStream::connect(balancer.door("control")).unwrap();
    // The door that users connect to: a backend there would send them round in a circle.
    let port = balancer.door("tcp").port();
    write!(backend, r#"{{"cmd":"register","protocol":"tcp","port":{port}}}"#).unwrap();
    let line = balancer.wait_for_log("backend refused");
    assert!(line.contains("WARN") && line.contains("cmd=register"), "{line}");
    assert!(line.contains("is a door of the balancer itself"), "{line}");
}

#[test]
fn a_file_of_secrets_that_is_no_good_is_told_before_anything_is_open() {
    for setting in ["control.secret_file", "admin.token_file"] {
        let mut balancer = Balancer::start(&format!("{setting} = \"no/such/file\""));
        assert_eq!(balancer.wait_for_exit(), Some(2), "{setting}");
        assert_eq!(*balancer.log.lock().unwrap(), "", "{setting}");
    }
}

#[test]
fn lb_drain_turns_new_users_away_and_lets_the_running_session_end() {
    let mut balancer = Balancer::ready("");
    let mut user = balancer.user();
    let mut drain = balancer.command("drain").stdout(Stdio::piped()).spawn().unwrap();
    balancer.wait_for_log("stopping: no more users are accepted");
    let door = balancer.door("tcp");
    wait_for("the door to be shut", || TcpStream::connect(door).err());
    assert!(echoes(&mut user), "the session that ran goes on");
    let mut said = BufReader::new(drain.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("1 sessions left, ") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it never counted down");
    }
    drop(user);
    assert_eq!(balancer.wait_for_exit(), Some(0));
    let code = wait_for("lb drain to return", || drain.try_wait().unwrap());
    assert!(code.success());
    assert_eq!(said.lines().last().unwrap().unwrap(), "stopped");
}

#[test]
fn manual_pages_and_completions_name_every_command_that_is_shown() {
    let folder = std::env::temp_dir().join(format!("lb-papers-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let lb = || Command::new(env!("CARGO_BIN_EXE_lb"));
    assert!(lb().arg("man").arg(&folder).status().unwrap().success());
    let overview = fs::read_to_string(folder.join("lb.1")).unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = lb().args(["completions", shell]).output().unwrap();
        let script = String::from_utf8(script.stdout).unwrap();
        for command in ["serve", "check", "backend", "user", "status", "reload", "drain"] {
            let page = fs::read_to_string(folder.join(format!("lb-{command}.1"))).unwrap();
            assert!(page.contains(".TH lb-"), "{page}");
            assert!(overview.contains(&format!("lb\\-{command}(1)")), "{overview}");
            assert!(script.contains(command), "{shell} knows no {command}");
        }
    }
    fs::remove_dir_all(&folder).unwrap();
}
