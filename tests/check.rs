//! `lb check` against `lb serve`: whatever keeps the one from starting, the other says before, in the same
//! sentence and with the same exit code; and what both make of values that are left to the host.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

#[path = "common/authority.rs"]
mod authority;
#[path = "common/process.rs"]
mod process;
#[path = "common/wait.rs"]
mod wait;

use authority::Authority;
use process::{Folder, Process};
use wait::wait_for;

const LB: &str = env!("CARGO_BIN_EXE_lb");

/// Doors that are free.
const DOORS: &str = "listen = { tcp = \"127.0.0.1:0\", udp = \"127.0.0.1:0\", api = \"127.0.0.1:0\", \
                     control = \"127.0.0.1:0\", admin = \"127.0.0.1:0\" }\n";

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs a command in a shell, after `before`, until it ends.
fn run(before: &str, command: &str, file: &str) -> Output {
    let line = format!("{before} exec timeout 60 {LB} {command} --config {file}");
    Command::new("sh").args(["-c", &line]).stdin(Stdio::null()).output().unwrap()
}

/// Expects both to refuse the settings, in the same sentence.
#[track_caller]
fn both_refuse(before: &str, file: &str, wanted: &str) {
    let served = run(before, "serve", file);
    let sentence = text(&served.stderr);
    let sentence = sentence.trim_end().strip_prefix("lb: ").unwrap_or(&sentence);
    assert_eq!(served.status.code(), Some(2), "{wanted}: {sentence}{}", text(&served.stdout));
    assert!(sentence.contains(wanted) && !sentence.contains('\n'), "{wanted}: {sentence}");
    assert_eq!(text(&served.stdout), "", "{wanted}: it was told before a door was open");
    let checked = run(before, "check", file);
    let lines = text(&checked.stdout);
    assert_eq!(checked.status.code(), Some(2), "{wanted}: {lines}");
    // How much memory there is differs from one moment to the next.
    let same = |text: &str| text.replace(|letter: char| letter.is_ascii_digit(), "");
    let mut bad = lines.lines().filter(|line| line.starts_with("bad "));
    assert!(bad.any(|line| same(line).ends_with(&same(sentence))), "{sentence}\n{lines}");
}

/// Everything that a faulty setting may point at.
struct Places {
    folder: Folder,
    _live: UnixListener,
    _tcp: TcpListener,
    _udp: UdpSocket,
    /// A port of each kind that another program has.
    taken: [u16; 2],
}

impl Places {
    fn new() -> Places {
        let folder = Folder::new("check");
        let at = |name: &str| folder.path().join(name);
        let with_mode = |name: &str, text: &str, mode: u32| {
            folder.write(name, text);
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        with_mode("good", "a token that is long enough\n", 0o600);
        with_mode("open", "a token that is long enough\n", 0o644);
        with_mode("short", "short\n", 0o600);
        with_mode("empty", "\n", 0o600);
        with_mode("long", &"a token that is long enough\n".repeat(4000), 0o600);
        fs::create_dir(at("folder")).unwrap();
        let live = UnixListener::bind(at("live.sock")).unwrap();
        drop(UnixListener::bind(at("stale.sock")).unwrap());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = [tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port()];
        Places { folder, _live: live, _tcp: tcp, _udp: udp, taken }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

#[test]
fn settings_that_keep_serve_from_starting_are_told_by_check_in_the_same_words() {
    let places = Places::new();
    let file = |key: &str, name: &str| format!("{DOORS}{key} = {:?}", places.at(name));
    let service = |rest: &str| {
        format!("{DOORS}[service.a]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n{rest}")
    };
    let long = "x".repeat(120);
    for (settings, said) in [
        ("[limits]\nsessions = \"3s\"".to_owned(), "line 2: limits.sessions takes a number"),
        ("[health]\ninterval_ms = \"5x\"".to_owned(), "line 2: health.interval_ms takes a time"),
        (
            format!("{DOORS}health = {{ interval_ms = \"1s\", timeout_ms = \"1s\" }}"),
            "must be less",
        ),
        (file("admin.token_file", "none"), "admin.token_file: cannot read the secret file"),
        (file("admin.token_file", "folder"), "is a folder: name a file of secrets in it"),
        (file("admin.token_file", "open"), "others may read or change the secret file"),
        (file("admin.token_file", "short"), "is shorter than 16 bytes"),
        (file("admin.token_file", "empty"), "holds no secret"),
        (file("admin.token_file", "long"), "is longer than 65536 bytes"),
        (file("control.secret_file", "none"), "cannot read the secret file"),
        (file("control.secret_file", "open"), "others may read or change the secret file"),
        (
            service(&format!("secret_file = {:?}", places.at("none"))),
            "service.a.secret_file: cannot",
        ),
        (file("backend_tls.ca", "none"), "cannot read "),
        (file("backend_tls.ca", "empty"), "holds no certificate in PEM"),
        (
            service(&format!(
                "backends = [{{ address = \"192.0.2.1:443\", tls = {{ ca = {:?} }} }}]",
                places.at("none")
            )),
            "cannot read ",
        ),
        (file("admin.socket", "folder"), "admin.socket names the folder"),
        (file("admin.socket", "good"), "which is there and is no socket"),
        (file("admin.socket", "live.sock"), "another balancer answers on"),
        (file("admin.socket", "none/admin.sock"), "cannot open the unix socket"),
        (file("admin.socket", &long), "bytes, and that of a unix socket has 107 at most"),
        (format!("{DOORS}limits.buffer_bytes = \"64GiB\""), "limits.buffer_bytes is 64GiB, and "),
        (format!("{DOORS}limits.sessions = 16000000"), "descriptors are enough for"),
        (
            format!("{DOORS}udp.local_addresses = [\"192.0.2.9\"]"),
            "udp.local_addresses names 192.0.2.9",
        ),
        (
            service("backends = [\"127.0.0.1:7001\"]\n[service.b]\nprotocol = \"tcp\"\n")
                + "listen = \"127.0.0.1:7001\"",
            "which is a door of the balancer itself",
        ),
    ] {
        both_refuse("", &places.folder.write("lb.toml", settings), said);
    }
    both_refuse("", "no/such.toml", "check the path that follows --config");
    let sound = places.folder.write("lb.toml", DOORS);
    both_refuse("ulimit -n 32 &&", &sound, "descriptors are enough for 0 sessions");
}

#[test]
fn files_about_certificates_of_users_are_read_by_both_and_an_old_list_is_told() {
    let (folder, authority) = (Folder::new("check-clients"), Authority::new("users"));
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    let own = folder.write("own.pem", params.self_signed(&key).unwrap().pem());
    let key = folder.write("own.key", key.serialize_pem());
    let ca = folder.write("ca.pem", authority.pem());
    let crl = folder.write("ca.crl", authority.revokes(&[1, 2], 2021));
    let tickets = folder.write("tickets", "AAAA\n");
    let settings = |more: &str| {
        let doors = DOORS.replace("{ tcp", "{ api_tls = \"127.0.0.1:0\", tcp");
        let own = format!("[[tls.certificate]]\ncertificate = \"{own}\"\nkey = \"{key}\"\n");
        let asked = format!("[tls]\nclients = \"optional\"\nclient_ca = \"{ca}\"\n");
        let lists = format!("client_crl = [\"{crl}\"]\n");
        folder.write("lb.toml", doors + &asked + &lists + more + "\n" + &own)
    };
    let checked = run("", "check", &settings(""));
    let lines = text(&checked.stdout);
    assert_eq!(checked.status.code(), Some(0), "{lines}");
    let wanted =
        format!("{crl} revokes 2, and is out of date: what was revoked since is not known");
    assert!(lines.contains(&format!("{ca} holds one authority, which ends in ")), "{lines}");
    assert!(lines.contains(&wanted), "{lines}");
    let wrong = format!("ticket_file = \"{tickets}\"");
    fs::set_permissions(&tickets, fs::Permissions::from_mode(0o600)).unwrap();
    both_refuse("", &settings(&wrong), "holds 1 keys for tickets, not 2 to 16");
    folder.write("ca.crl", "torn");
    both_refuse("", &settings(""), "ca.crl holds no certificate list that can be read");
}

#[test]
fn doors_that_keep_serve_from_starting_are_told_by_check_in_the_same_words() {
    let places = Places::new();
    let door = |door: &str, at: &str| DOORS.replace(&format!("{door} = \"127.0.0.1:0\""), at);
    let [tcp, udp] = places.taken;
    for (settings, said) in [
        (door("control", "control = \"[::]:0\""), "where any host could register itself"),
        (door("tcp", &format!("tcp = \"127.0.0.1:{tcp}\"")), "is taken by another program"),
        (door("api", "api = \"192.0.2.9:0\""), "which is not an address of this host"),
        (door("control", &format!("control = \"127.0.0.1:{tcp}\"")), "the control port"),
        (door("admin", &format!("admin = \"127.0.0.1:{tcp}\"")), "the admin port"),
        (door("udp", &format!("udp = \"127.0.0.1:{udp}\"")), "the udp port"),
        (
            DOORS.to_owned()
                + &format!("[service.a]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:{tcp}\""),
            "choose another in [service.a]",
        ),
    ] {
        both_refuse("", &places.folder.write("lb.toml", settings), said);
    }
}

#[test]
fn memory_that_may_not_be_locked_is_told_by_both_in_the_same_words() {
    // Root may lock as much as it likes, so the program runs as somebody else, from where that one can read.
    let places = Places::new();
    let program = places.at("lb");
    fs::copy(LB, &program).unwrap();
    fs::set_permissions(places.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let file = places.folder.write("lb.toml", DOORS);
    let user = match nix::unistd::geteuid().is_root() {
        true => "setpriv --reuid=65534 --regid=65534 --clear-groups",
        false => "",
    };
    for kib in [16, 200, 1024] {
        let ran = |command: &str| {
            let program = program.display();
            let line = format!(
                "ulimit -l {kib} && exec {user} timeout 5 {program} {command} --config {file}"
            );
            Command::new("sh").args(["-c", &line]).stdin(Stdio::null()).output().unwrap()
        };
        let (served, checked) = (ran("serve"), ran("check"));
        let (sentence, lines) = (text(&served.stderr), text(&checked.stdout));
        let refused = served.status.code() == Some(2);
        assert_eq!(checked.status.code() == Some(2), refused, "{kib} KiB: {sentence}{lines}");
        assert!(refused || kib > 16, "{kib} KiB are too few for a ring");
        let sentence = sentence.trim_end().trim_start_matches("lb: ");
        let mut bad = lines.lines().filter(|line| line.starts_with("bad "));
        assert!(!refused || bad.any(|line| line.ends_with(sentence)), "{sentence}\n{lines}");
        assert!(!refused || sentence.contains("that this user may lock"), "{sentence}");
    }
}

#[test]
fn a_check_leaves_no_trace_and_finds_nothing_wrong_with_a_stale_socket() {
    let places = Places::new();
    let names = || {
        let entries = fs::read_dir(places.folder.path()).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    for name in ["stale.sock", "new.sock"] {
        let settings = format!("{DOORS}admin.socket = {:?}", places.at(name));
        let file = places.folder.write("lb.toml", settings);
        let before = names();
        let checked = run("", "check", &file);
        assert_eq!(checked.status.code(), Some(0), "{}", text(&checked.stdout));
        assert_eq!(names(), before);
    }
}

/// What a balancer says on its first lines, once it is ready for users.
fn started(before: &str, arguments: &str, log: &str) -> (Process, String) {
    let line = format!("{before} exec {LB} serve {arguments} > {log}");
    let running = Process::start("sh", &["-c", &line]);
    let said = wait_for("the page", || {
        let said = fs::read_to_string(log).unwrap_or_default();
        said.contains("page for browsers").then_some(said)
    });
    (running, said)
}

/// Where its admin door is, by what it has said.
fn admin(said: &str) -> &str {
    said.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect(said)
}

#[test]
fn few_descriptors_are_enough_and_what_they_allow_is_told_everywhere() {
    let folder = Folder::new("few");
    for (descriptors, wanted) in
        [(256, "limits.control_connections = 32"), (1024, "limits.control_connections = 128")]
    {
        let settings = format!("{DOORS}workers = 1\nhealth.interval_ms = 1000");
        let file = folder.write("lb.toml", settings);
        let before = format!("ulimit -n {descriptors} &&");
        let checked = run(&before, "check", &file);
        let said = text(&checked.stdout);
        assert_eq!(checked.status.code(), Some(0), "{said}");
        assert!(said.contains(wanted) && said.contains("health.timeout_ms = \"500ms\""), "{said}");
        let log = folder.write("log", "");
        let (running, said) = started(&before, &format!("--config {file}"), &log);
        assert!(said.contains("auto stands for") && said.contains(wanted), "{said}");
        let status = Command::new(LB).args(["status", "--admin", admin(&said)]).output().unwrap();
        let shown = text(&status.stdout);
        let auto = shown.lines().find(|line| line.starts_with("auto: ")).expect(&shown);
        assert!(auto.contains(wanted) && auto.contains("limits.sessions = "), "{auto}");
        assert_eq!(running.terminate(), Some(0));
    }
}

#[test]
fn backends_that_nobody_verifies_are_warned_of_by_both() {
    let folder = Folder::new("unverified");
    for (verify, warned) in [("full", false), ("off", true)] {
        let file = folder.write("lb.toml", format!("{DOORS}backend_tls.verify = \"{verify}\""));
        let checked = run("", "check", &file);
        let said = text(&checked.stdout);
        assert_eq!(checked.status.code(), Some(0), "{said}");
        assert_eq!(said.lines().any(|line| line.starts_with("warn backend TLS")), warned, "{said}");
        let log = folder.write("log", "");
        let (running, said) = started("", &format!("--config {file}"), &log);
        assert_eq!(
            said.contains("WARN settings warning=\"backend_tls.verify is"),
            warned,
            "{said}"
        );
        assert_eq!(running.terminate(), Some(0));
    }
}

#[test]
fn a_door_for_operators_that_is_open_to_the_network_is_warned_of_and_works() {
    let folder = Folder::new("open");
    let open = DOORS.replace("admin = \"127.0.0.1:0\"", "admin = \"[::]:0\"");
    for (settings, warned) in [(DOORS, false), (&*open, true)] {
        let file = folder.write("lb.toml", settings);
        let checked = run("", "check", &file);
        let said = text(&checked.stdout);
        assert_eq!(checked.status.code(), Some(0), "{said}");
        assert_eq!(said.lines().any(|line| line.starts_with("warn admin door")), warned, "{said}");
        let log = folder.write("log", "");
        let (running, said) = started("", &format!("--config {file}"), &log);
        assert_eq!(said.contains("WARN settings warning=\"listen.admin is"), warned, "{said}");
        let page = said.lines().find(|line| line.contains("page for browsers")).unwrap();
        let host = if warned { "http://localhost:" } else { "http://127.0.0.1:" };
        let rest = page.split(" address=").nth(1).expect(page);
        assert!(rest.starts_with(host) && !rest.contains(":0/"), "{page}");
        drop(running);
    }
}

/// The cores of the worker and of the control core, as the log has them.
fn cores(log: &str) -> (String, String) {
    let line = log.lines().find(|line| line.contains("pinned to cores")).expect(log);
    let value = |name: &str| {
        let rest = line.split(&format!(" {name}=")).nth(1).expect(line);
        rest.split(' ').next().unwrap().to_owned()
    };
    (value("workers"), value("control"))
}

#[test]
fn two_balancers_on_one_host_pin_their_workers_to_different_cores() {
    // In a network of their own, no other balancer of this host can be in their way.
    let alone = ["-n", "-rn"].into_iter().find(|flags| {
        Command::new("unshare").args([flags, "true"]).output().is_ok_and(|it| it.status.success())
    });
    let count = std::thread::available_parallelism().unwrap().get();
    let Some(flags) = alone.filter(|_| count > 1) else { return };
    let folder = Folder::new("cores");
    let names = ["first", "second", "again"];
    let logs = names.map(|name| folder.write(name, ""));
    let serve = |log: &str| {
        format!(
            "{LB} serve --workers 1 --tcp :0 --udp off --api off --control off --admin off > {log} & \
             wanted=$!; until grep -q 'pinned to cores' {log}; do kill -0 $wanted || exit 1; done"
        )
    };
    let [first, second, again] = logs.each_ref().map(|log| serve(log));
    let line = format!(
        "{first}; one=$wanted; {second}; two=$wanted; kill $one; wait $one; {again}; kill $two $wanted; \
         wait $two $wanted"
    );
    let done = Command::new("unshare").args([flags, "sh", "-c", &line]).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let [first, second, again] = logs.map(|log| fs::read_to_string(log).unwrap());
    let [(first, _), (second, _), (after, _)] = [&first, &second, &again].map(|log| cores(log));
    assert_ne!(first, second);
    assert_eq!(first, after, "a restart has the place of before");
    assert!(!again.contains("cores are shared"), "{again}");
}
