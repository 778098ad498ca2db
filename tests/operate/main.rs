//! The running program as an operator and a service manager meet it: readiness, health, reload and
//! drain of a real `lb serve` with a user's session through it. Every wait is for a condition.

#[path = "../common/certified.rs"]
mod certified;
mod coming;
mod groups;
mod harness;
mod joining;
mod lines;
mod listed;
mod many;
mod reload;
mod sealed;
mod services;
mod signals;
mod silent;
mod verbs;
#[path = "../common/wait.rs"]
mod wait;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use harness::{Balancer, asked, echoes};
use nix::sys::signal::Signal;
use wait::{PATIENCE, wait_for};

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
fn a_manager_that_does_not_read_holds_nobody_up() {
    let balancer = Balancer::ready("");
    // Its queue is full soon: the watchdog is fed every second.
    let unread = UnixDatagram::unbound().unwrap();
    unread.set_nonblocking(true).unwrap();
    let at = balancer.manager.local_addr().unwrap();
    while unread.send_to_addr(b"x", &at).is_ok() {}
    let uptime = || balancer.status()["uptime_ms"].as_u64().unwrap();
    let before = uptime();
    wait_for("meals and lines to have been due", || (uptime() > before + 2500).then_some(()));
    assert!(balancer.change("log.level = \"warn\"").status.success(), "nor a reload");
}

#[test]
fn a_check_beside_the_running_balancer_knows_its_doors() {
    let balancer = Balancer::start_on_loopback(
        "[service.a]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n",
        |_| (),
    );
    balancer.wait_until_told("READY=1");
    let named = balancer.status()["services"][3]["doors"][0].as_str().unwrap().to_owned();
    let check = |tcp: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        command.args(["check", "--tcp", tcp, "--service", &format!("a=tcp@{named}")]);
        for name in ["udp", "api", "control", "admin"] {
            command.args([format!("--{name}"), balancer.door(name).to_string()]);
        }
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, said) = check(&balancer.door("tcp").to_string());
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(said.matches(" is open in the running balancer (process ").count(), 6, "{said}");
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (code, said) = check(&other.local_addr().unwrap().to_string());
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("is taken by another program"), "{said}");
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
        // A machine with one core has no choice.
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

/// Makes socket(2) refuse IPv6, as a kernel does that was started with `ipv6.disable=1`.
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

/// A library that steps the wall clock of the process it is loaded into by two days, as soon as a
/// file exists. It is built by the linker that built this test.
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

#[test]
fn a_file_of_secrets_that_is_no_good_is_told_before_anything_is_open() {
    for setting in ["control.secret_file", "admin.token_file"] {
        let mut balancer = Balancer::start(&format!("{setting} = \"no/such/file\""));
        assert_eq!(balancer.wait_for_exit(), Some(2), "{setting}");
        assert_eq!(*balancer.log.lock().unwrap(), "", "{setting}");
    }
}

#[test]
fn lb_stop_turns_new_users_away_and_lets_the_running_session_end() {
    let mut balancer = Balancer::ready("");
    let mut user = balancer.user();
    let mut stop = balancer.command("stop").stdout(Stdio::piped()).spawn().unwrap();
    balancer.wait_for_log("stopping: no more users are accepted");
    let door = balancer.door("tcp");
    wait_for("the door to be shut", || TcpStream::connect(door).err());
    assert!(echoes(&mut user), "the session that ran goes on");
    let mut said = BufReader::new(stop.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("1 session left, ") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it never counted down");
    }
    drop(user);
    assert_eq!(balancer.wait_for_exit(), Some(0));
    let code = wait_for("lb stop to return", || stop.try_wait().unwrap());
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
        for command in ["serve", "check", "backend", "user", "status", "reload", "stop"] {
            let page = fs::read_to_string(folder.join(format!("lb-{command}.1"))).unwrap();
            assert!(page.contains(".TH lb-"), "{page}");
            assert!(overview.contains(&format!("lb\\-{command}(1)")), "{overview}");
            assert!(script.contains(command), "{shell} knows no {command}");
        }
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_backend_is_not_blamed_for_the_descriptors_that_the_balancer_lacks() {
    let balancer = Balancer::ready("");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut backend = TcpStream::connect(balancer.door("control")).unwrap();
    let mut answers = BufReader::new(backend.try_clone().unwrap()).lines();
    let mut ask = |message: String| {
        writeln!(backend, "{message}").unwrap();
        let mut answers = answers.by_ref().map(Result::unwrap);
        answers.find(|line| line.contains("\"ack\"")).expect("an answer")
    };
    assert!(ask(r#"{"cmd":"list"}"#.to_owned()).contains("list"), "the connection is served");
    let pid = balancer.process.id().to_string();
    let limited = Command::new("prlimit").args(["--pid", &pid, "--nofile=3:"]).status().unwrap();
    assert!(limited.success());
    let port = listener.local_addr().unwrap().port();
    let said = ask(format!(r#"{{"cmd":"register","protocol":"tcp","port":{port}}}"#));
    assert!(said.contains("the balancer could not try"), "{said}");
    assert!(said.contains("the backend may be fine"), "{said}");
    let counted = ask(r#"{"cmd":"list"}"#.to_owned());
    assert!(!counted.contains(&port.to_string()), "{counted}");
}

#[test]
fn sessions_of_udp_users_are_not_counted_against_the_limit_of_the_others() {
    let balancer = Balancer::start_on_loopback("limits.sessions = 10", |_| {});
    balancer.wait_until_told("READY=1");
    let door = balancer.door("udp");
    let users: Vec<_> = (0..20).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    wait_for("20 udp sessions", || {
        assert!(users.iter().all(|user| user.send_to(b"x", door).is_ok()));
        (balancer.status()["sessions"]["udp_active"] == 20).then_some(())
    });
    let _user = balancer.user();
    wait_for("the session of a tcp user", || {
        let sessions = &balancer.status()["sessions"];
        let shown = ["active", "limit", "udp_active", "udp_limit"].map(|it| sessions[it].as_u64());
        (shown == [21, 10, 20, 100_000].map(Some)).then_some(())
    });
    let said = balancer.command("status").output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("\nsessions 1 of 10, udp 20 of 100000, started 21,"), "{said}");
    let wanted = "STATUS=21 sessions on 3 backends (sessions 1 of 10, udp 20 of 100000)";
    balancer.wait_until_told(wanted);
}
