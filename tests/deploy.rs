//! Checks the files installed with the program against it: the program has every key and port they
//! name, and systemd and ufw read their files as intended. Tests that need those tools are ignored
//! unless asked for: `cargo test --test deploy -- --ignored`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use lb::boot::capacity;
use lb::config::keys::KEYS;
use lb::config::{Config, file};

#[path = "common/process.rs"]
mod process;

use process::Folder;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(shipped(name)).unwrap()
}

#[track_caller]
fn succeeded(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{complained}");
    said
}

/// The value of a setting in the unit; the last one if it occurs more than once.
fn setting(unit: &str, name: &str) -> String {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
    unit.lines().rev().find_map(value).unwrap_or_else(|| panic!("the unit has no {name}"))
}

/// The shipped file with its comments about single values turned into settings.
fn uncommented(file: &str) -> String {
    let bare = |line: &str| {
        let setting = line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line);
        setting.to_owned() + "\n"
    };
    file.lines().map(bare).collect()
}

/// The shipped configuration as generated from the table of keys.
fn written_from_the_keys() -> String {
    let mut out = String::from(
        "# Settings of `lb serve`. Every key is here with its default; uncomment it to change it.\n\
         # `lb check --config /etc/lb/lb.toml` checks the file against this host, and\n\
         # `systemctl reload lb` applies it.\n\n",
    );
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            out.push_str(&format!("\n[{section}]\n"));
        }
        let help = key.help.replace('`', "");
        out.push_str(&format!("# {help}\n#{} = {}\n", key.name, key.show(&Config::default())));
    }
    out.push_str(
        "\n\
         # Named services, each a table of its own; settings.md lists their keys. Two examples:\n\
         #\n\
         # [service.redis]\n\
         # protocol = \"tcp\"\n\
         # listen = \":6379\"\n\
         #\n\
         # [service.shop]\n\
         # protocol = \"api\"\n\
         # hosts = [\"shop.example\"]\n",
    );
    out
}

#[test]
fn the_shipped_configuration_shows_every_key_with_its_help_and_default() {
    let expected = written_from_the_keys();
    if std::env::var_os("LB_WRITE_DEPLOY").is_some() {
        fs::write(shipped("lb.toml"), &expected).unwrap();
    }
    assert!(
        text("lb.toml") == expected,
        "deploy/lb.toml is behind the keys: LB_WRITE_DEPLOY=1 cargo test --test deploy"
    );
}

#[test]
fn the_shipped_configuration_reads_as_the_defaults_with_and_without_its_comments() {
    let shipped = text("lb.toml");
    assert_eq!(file::read("lb.toml", &shipped), Ok(Config::default()));
    let all = uncommented(&shipped);
    assert_eq!(file::read("lb.toml", &all), Ok(Config::default()), "{all}");
    let set = all.lines().filter(|line| !line.starts_with('#') && line.contains(" = ")).count();
    assert_eq!(set, KEYS.len());
}

/// Parses `8081,8083/tcp|8082/udp` into ports and protocols.
fn ports(profile: &str) -> BTreeSet<(u16, String)> {
    let mut found = BTreeSet::new();
    for part in profile.split('|') {
        let (numbers, protocol) = part.trim().split_once('/').expect("a protocol");
        for number in numbers.split(',') {
            found.insert((number.parse().expect("a port"), protocol.to_owned()));
        }
    }
    found
}

/// The ports the profiles must open by default: for users, and for backends.
fn default_ports() -> [(&'static str, BTreeSet<(u16, String)>); 2] {
    let listen = Config::default().listen;
    let port = |door: Option<std::net::SocketAddr>, protocol: &str| {
        (door.expect("on by default").port(), protocol.to_owned())
    };
    let users = [port(listen.tcp, "tcp"), port(listen.udp, "udp"), port(listen.api, "tcp")];
    [("lb", users.into()), ("lb-control", [port(listen.control, "tcp")].into())]
}

#[test]
fn the_firewall_profiles_open_the_default_ports_and_no_others() {
    let file = text("ufw/lb");
    for (name, expected) in default_ports() {
        let section = file.split('[').find(|part| part.starts_with(&format!("{name}]"))).unwrap();
        let line = section.lines().find_map(|line| line.strip_prefix("ports=")).unwrap();
        assert_eq!(ports(line), expected, "[{name}]");
    }
}

#[test]
#[ignore = "needs ufw, and root because ufw does"]
fn the_firewall_program_reads_both_profiles() {
    let folder = Folder::new("ufw");
    folder.write("etc/ufw/applications.d/lb", text("ufw/lb"));
    folder.write("lib/ufw/ufw.lock", "");
    // It refuses to run without the rest of its configuration, whatever that contains.
    folder.write("etc/default/ufw", fs::read_to_string("/etc/default/ufw").unwrap());
    for entry in fs::read_dir("/etc/ufw").unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let name = format!("etc/ufw/{}", path.file_name().unwrap().to_str().unwrap());
            folder.write(&name, fs::read_to_string(&path).unwrap());
        }
    }
    let data = format!("--datadir={}", folder.path().display());
    for (name, expected) in default_ports() {
        let info = Command::new("ufw").args([&data, "app", "info", name]).output();
        let said = succeeded(info.expect("ufw is installed"));
        let (_, listed) = said.split_once("Ports:").or(said.split_once("Port:")).expect(&said);
        let listed: Vec<&str> = listed.split_whitespace().collect();
        assert_eq!(ports(&listed.join("|")), expected, "{said}");
    }
}

#[test]
fn the_unit_leaves_room_for_the_default_sessions_and_their_drain() {
    let unit = text("lb.service");
    let descriptors: u64 = setting(&unit, "LimitNOFILE").parse().unwrap();
    let sessions = capacity::sessions_for(descriptors, &Config::default());
    assert!(sessions >= capacity::SESSIONS_DEFAULT, "LimitNOFILE is enough for {sessions}");
    let stop: u64 = setting(&unit, "TimeoutStopSec").parse().unwrap();
    let drain = Config::default().balance.drain.as_secs();
    assert!(stop >= drain + 10, "a drain of {drain} s is cut short after {stop} s");
    let locked = setting(&unit, "LimitMEMLOCK");
    let mebibytes: usize = locked.strip_suffix('M').unwrap().parse().unwrap();
    assert!(mebibytes << 20 >= 2 * Config::default().limits.buffer_bytes, "{locked}");
}

/// The unit for one of several balancers, as made from the unit for the only one.
fn written_from_the_unit() -> String {
    let mut unit = text("lb.service");
    for (one, several) in [
        (
            "# The balancer under systemd 247 or newer (Ubuntu 22.04, Debian 11). Change it with\n\
             # `systemctl edit lb`, which keeps what you change across upgrades.\n",
            "# One of several balancers on a host: lb@NAME.service reads /etc/lb/NAME.toml. Otherwise it is\n\
             # lb.service, whose comments hold here too. Change all of them with `systemctl edit lb@`, one with\n\
             # `systemctl edit lb@NAME`.\n",
        ),
        ("Description=Load balancer with", "Description=Load balancer %i with"),
        ("--config /etc/lb/lb.toml", "--config /etc/lb/%i.toml"),
        ("\"/run/lb/admin.sock\"", "\"/run/lb-%i/admin.sock\""),
        // Not below /run/lb, which goes when lb.service stops.
        ("RuntimeDirectory=lb\n", "RuntimeDirectory=lb-%i\n"),
        ("/run/credentials/lb.service/", "/run/credentials/lb@%i.service/"),
    ] {
        assert_eq!(unit.matches(one).count(), 1, "{one}");
        unit = unit.replace(one, several);
    }
    unit
}

#[test]
fn the_unit_of_several_balancers_is_that_of_one_but_for_its_file_and_folders() {
    let expected = written_from_the_unit();
    if std::env::var_os("LB_WRITE_DEPLOY").is_some() {
        fs::write(shipped("lb@.service"), &expected).unwrap();
    }
    assert!(
        text("lb@.service") == expected,
        "deploy/lb@.service is behind lb.service: LB_WRITE_DEPLOY=1 cargo test --test deploy"
    );
}

/// The calls that the profile for containers allows, in some form at least.
fn allowed_in_containers() -> BTreeSet<String> {
    let profile: serde_json::Value = serde_json::from_str(&text("seccomp-lb.json")).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO", "what is not listed is refused");
    let rules = profile["syscalls"].as_array().unwrap();
    let allowing = rules.iter().filter(|rule| rule["action"] == "SCMP_ACT_ALLOW");
    let names = allowing.flat_map(|rule| rule["names"].as_array().unwrap());
    let allowed: BTreeSet<_> = names.map(|name| name.as_str().unwrap().to_owned()).collect();
    // A C library that is told that there is no clone3 calls clone, whose flags can be looked at.
    let clone3 = rules.iter().find(|rule| rule["names"] == serde_json::json!(["clone3"])).unwrap();
    assert_eq!(clone3["errnoRet"], libc::ENOSYS);
    assert!(!allowed.contains("clone3"));
    allowed
}

#[test]
fn the_profile_for_containers_lets_the_rings_through_and_nothing_that_leads_out() {
    let allowed = allowed_in_containers();
    for call in [
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "mmap",
        "sched_setaffinity",
        "eventfd2",
        "prlimit64",
        "clone",
        "getsockopt",
        "setsockopt",
        "recvmsg",
        "sendmsg",
        "splice",
        "prctl",
        "execve",
        "setuid",
        "capset",
    ] {
        assert!(allowed.contains(call), "{call} is not allowed");
    }
    for call in [
        "mount",
        "ptrace",
        "init_module",
        "bpf",
        "chroot",
        "pivot_root",
        "setns",
        "unshare",
        "kexec_load",
        "keyctl",
    ] {
        assert!(!allowed.contains(call), "{call} is allowed");
    }
}

#[test]
#[ignore = "needs strace"]
fn the_profile_for_containers_lets_everything_through_that_a_balancer_calls() {
    let folder = Folder::new("strace");
    let log = folder.path().join("calls");
    let doors = ["--tcp", "--udp", "--api", "--control", "--admin"];
    let doors = doors.into_iter().flat_map(|door| [door, "127.0.0.1:0"]);
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&log).arg(env!("CARGO_BIN_EXE_lb"));
    command.args(["serve", "--with-parent", "--demo", "1"]).args(doors);
    let mut serving = command.stdout(Stdio::piped()).spawn().expect("strace is installed");
    let mut lines = BufReader::new(serving.stdout.take().unwrap()).lines().map_while(Result::ok);
    let opened = lines.find(|line| line.contains("doors open")).expect("it opens its doors");
    let door = |name: &str| {
        let (_, rest) = opened.split_once(&format!(" {name}=\"")).expect(&opened);
        rest.split('"').next().unwrap().to_owned()
    };
    assert!(lines.any(|line| line.contains("demo-api-1")), "the demo has joined");
    for protocol in ["tcp", "udp", "api"] {
        let words = if protocol == "api" { "/" } else { "hello" };
        let user =
            format!("echo {words} | \"$0\" user --protocol {protocol} --to {}", door(protocol));
        let user = Command::new("sh").args(["-c", &user, env!("CARGO_BIN_EXE_lb")]).output();
        succeeded(user.unwrap());
    }
    let mut status = Command::new(env!("CARGO_BIN_EXE_lb"));
    let said =
        succeeded(status.args(["status", "--json", "--admin", &door("admin")]).output().unwrap());
    let status: serde_json::Value = serde_json::from_str(&said).expect(&said);
    let pid = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    lines.for_each(drop);
    serving.wait().unwrap();
    let trace = fs::read_to_string(&log).unwrap();
    let call = |line: &str| {
        let (_, rest) = line.split_once(' ')?;
        let name = rest.trim_start().split('(').next()?;
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        (!name.is_empty() && name.chars().all(is_name)).then(|| name.to_owned())
    };
    let called: BTreeSet<String> = trace.lines().filter_map(call).collect();
    assert!(called.contains("io_uring_enter") && called.len() > 30, "{called:?}");
    let mut allowed = allowed_in_containers();
    allowed.insert("clone3".to_owned());
    let refused: Vec<_> = called.difference(&allowed).cloned().collect();
    assert!(refused.is_empty(), "{refused:?}");
}

fn project(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).expect(name)
}

#[test]
fn what_is_installed_or_measured_is_optimised_as_a_whole_and_what_is_tried_is_not() {
    let manifest: toml::Table = project("Cargo.toml").parse().unwrap();
    let profile = |name: &str| manifest["profile"][name].clone();
    for whole in ["dist", "bench"] {
        assert_eq!(profile(whole)["lto"].as_str(), Some("fat"), "{whole}");
        assert_eq!(profile(whole)["codegen-units"].as_integer(), Some(1), "{whole}");
    }
    assert!(profile("release").get("lto").is_none(), "it is for trying things out");
    assert_eq!(profile("release")["panic"].as_str(), Some("abort"));
    for script in
        ["deploy/package", "deploy/Containerfile", "bench/compare", "bench/harness/slices.py"]
    {
        let text = project(script).replace("\", \"", " ");
        assert!(text.contains("--profile dist") && !text.contains("--release"), "{script}");
    }
    let first = project("README.md");
    let first = first.lines().find(|line| line.starts_with("    cargo ")).unwrap();
    assert_eq!(first, "    cargo run -- serve --demo 3", "the first command is the quick one");
    // Each takes long to compile, and each came with something of which little was used.
    let locked = project("Cargo.lock");
    for name in ["regex-automata", "regex-syntax", "tracing-attributes"] {
        assert!(!locked.contains(&format!("name = \"{name}\"\n")), "{name} is compiled again");
    }
}

#[test]
fn the_image_is_built_as_the_package_is_and_ignores_what_is_built_here() {
    let recipe = text("Containerfile");
    assert!(recipe.contains("cargo build --profile dist --locked"));
    assert!(text("package").contains("cargo build --profile dist --locked"));
    for word in recipe.split_whitespace().filter(|word| word.starts_with("deploy/")) {
        assert!(
            shipped(word.trim_start_matches("deploy/").trim_end_matches([';', '.'])).exists(),
            "{word}"
        );
    }
    let ignored = project(".dockerignore");
    assert!(ignored.lines().any(|line| line == "/target"), "{ignored}");
}

#[test]
fn the_balancers_of_the_compose_file_are_told_where_its_store_and_backends_are() {
    let (services, settings) = (text("cluster/compose.yaml"), text("cluster/compose.toml"));
    let config = file::read("compose.toml", &settings).unwrap();
    assert_eq!(config.cluster.endpoints.len(), services.matches("<<: *etcd\n").count());
    for endpoint in &config.cluster.endpoints {
        assert!(services.contains(&format!("--advertise-client-urls {endpoint} ")), "{endpoint}");
    }
    let subnet = services.split("subnet: ").nth(1).unwrap().split('}').next().unwrap();
    assert!(settings.contains(&format!("allow = [\"{subnet}\"]")), "{subnet}");
    let port = config.listen.control.unwrap().port();
    let echo = services.split("--lb ").nth(1).unwrap().lines().next().unwrap();
    let (address, at) = echo.split_once(':').unwrap();
    assert!(services.contains(&format!("ipv4_address: {address}}}")) && at == port.to_string());
    for name in [".gitignore", ".dockerignore"] {
        assert!(project(name).contains("/deploy/cluster/cluster.secret\n"), "{name}");
    }
}

#[test]
fn every_line_of_the_kernel_settings_has_its_reason_above() {
    let file = text("sysctl.d/60-lb.conf");
    let blocks = file.split("\n\n").skip(1);
    for block in blocks {
        let first = block.lines().next().unwrap();
        assert!(first.starts_with("# "), "{block}");
        for line in block.lines().filter(|line| !line.starts_with('#')) {
            let (name, _) = line.split_once(" = ").expect(line);
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            assert!(Path::new(&path).exists(), "this kernel knows no {name}");
        }
    }
}

#[test]
#[ignore = "needs systemd-analyze"]
fn systemd_accepts_the_unit_and_finds_it_confined() {
    // Instances of a template are verified by their own names.
    for (file, name) in [("lb.service", "lb.service"), ("lb@.service", "lb@two.service")] {
        let folder = Folder::new("unit");
        let here = text(file).replace("/usr/bin/lb", env!("CARGO_BIN_EXE_lb"));
        let unit = folder.write(name, here);
        let analyze = |arguments: &[&str]| {
            let run = Command::new("systemd-analyze").args(arguments).arg(&unit).output();
            run.expect("systemd-analyze is installed")
        };
        let verified = analyze(&["verify", "--man=no"]);
        let complaints = String::from_utf8_lossy(&verified.stderr).into_owned();
        succeeded(verified);
        assert!(!complaints.contains(name), "{complaints}");
        // The threshold is ten times the exposure: 20 means 2.0.
        succeeded(analyze(&["security", "--offline=yes", "--threshold=20"]));
    }
}

#[test]
#[ignore = "needs systemd-analyze"]
fn the_unit_lets_the_rings_through_its_filter() {
    let unit = text("lb.service");
    let filters = unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let mut allowed = BTreeSet::new();
    for filter in filters {
        let calls: BTreeSet<String> =
            filter.trim_start_matches('~').split(' ').flat_map(system_calls).collect();
        if filter.starts_with('~') {
            allowed.retain(|call| !calls.contains(call));
        } else {
            allowed.extend(calls);
        }
    }
    for call in ["io_uring_setup", "io_uring_enter", "io_uring_register", "sched_setaffinity"] {
        assert!(allowed.contains(call), "{call} is not allowed");
    }
    for call in ["mount", "ptrace", "setuid", "init_module", "bpf", "chroot"] {
        assert!(!allowed.contains(call), "{call} is allowed");
    }
}

/// The system calls behind a name in a filter, with nested groups resolved.
fn system_calls(name: &str) -> Vec<String> {
    if !name.starts_with('@') {
        return vec![name.to_owned()];
    }
    let run = Command::new("systemd-analyze").args(["syscall-filter", name]).output();
    let said = succeeded(run.expect("systemd-analyze is installed"));
    let within = said.lines().skip(1).map(str::trim).filter(|line| !line.starts_with('#'));
    within.filter(|line| !line.is_empty()).flat_map(system_calls).collect()
}
