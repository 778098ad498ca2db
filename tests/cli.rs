//! The commands as a person types them: what they print, how they end, and their exit codes.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

#[path = "common/process.rs"]
mod process;
#[path = "common/wait.rs"]
mod wait;

use process::Folder;
use wait::{PATIENCE, wait_for};

fn lb(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn ran(arguments: &[&str]) -> Output {
    lb(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A program that ends with its test.
struct Running(Child);

impl Running {
    fn start(arguments: &[&str]) -> Running {
        let child = lb(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Running(child)
    }

    fn signal(&self, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The balancer's end of a control connection.
struct Control(BufReader<TcpStream>);

impl Control {
    fn accept(listener: &TcpListener) -> Control {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Control(BufReader::new(stream))
    }

    fn hears(&mut self) -> serde_json::Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn says(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

#[test]
fn help_and_version_are_not_errors() {
    let help = ran(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for command in ["serve", "check", "backend", "user", "status"] {
        assert!(text(&help.stdout).contains(command), "{}", text(&help.stdout));
        assert_eq!(ran(&[command, "--help"]).status.code(), Some(0));
    }
    assert!(text(&ran(&["--version"]).stdout).starts_with("lb "));
}

#[test]
fn operator_errors_are_one_sentence_and_exit_code_2() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    let taken = TcpListener::bind("[::]:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port().to_string();
    drop(listener);
    for (arguments, said) in [
        (vec!["status", "--admin", &nobody], "start `lb serve` or name its door with --admin"),
        (vec!["user", "--protocol", "tcp", "--to", &nobody], "is the balancer running there?"),
        (vec!["backend", "--protocol", "tcp", "--port", "0"], "--port 0 works with --echo only"),
        (
            vec!["backend", "--protocol", "tcp", "--port", &taken_port, "--echo"],
            "cannot be opened for the echo backend",
        ),
        (
            vec!["backend", "--protocol", "tcp", "--port", "1", "--secret-file", "no/such"],
            "check that it is there and that this user may read it",
        ),
    ] {
        let output = ran(&arguments);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?} {told}");
        assert!(told.starts_with("lb: ") && told.contains(said), "{arguments:?} {told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
    for arguments in [
        vec!["backend", "--protocol", "tcp", "--port", "1", "--name", "a b"],
        vec!["backend", "--protocol", "tcp", "--port", "1", "--weight", "257"],
        vec!["backend", "--protocol", "tcp", "--port", "1", "--lb", "nowhere"],
        vec![],
        vec!["fly"],
        vec!["backend", "--protocol", "sctp", "--port", "1"],
        vec!["backend", "--port", "1"],
        vec!["backend", "--service", "redis", "--port", "1", "--echo"],
        vec!["backend", "--service", "a b", "--port", "1"],
    ] {
        assert_eq!(ran(&arguments).status.code(), Some(2), "{arguments:?}");
    }
}

const FREE: [&str; 10] = [
    "--tcp",
    "127.0.0.1:0",
    "--udp",
    "127.0.0.1:0",
    "--api",
    "127.0.0.1:0",
    "--control",
    "127.0.0.1:0",
    "--admin",
    "127.0.0.1:0",
];

/// What every balancer here is set to; the flags in [`FREE`] overrule its door.
const SETTINGS: &str = "workers = 1\nlisten.tcp = \"off\"\nlog.format = \"json\"\n";

/// A balancer on free ports that logs JSON lines, with the addresses of its doors.
struct Serving {
    running: Running,
    log: BufReader<std::process::ChildStdout>,
    doors: serde_json::Value,
}

impl Serving {
    fn start(name: &str, arguments: &[&str]) -> Serving {
        let folder = Folder::new(name);
        Serving::with_settings(&folder.write("lb.toml", SETTINGS), arguments)
    }

    fn with_settings(file: &str, arguments: &[&str]) -> Serving {
        let flags = [&["serve", "--config", file], &FREE[..], arguments].concat();
        let mut running = Running::start(&flags);
        let log = BufReader::new(running.0.stdout.take().unwrap());
        let mut serving = Serving { running, log, doors: serde_json::Value::Null };
        serving.doors = serving.says("doors open");
        serving
    }

    /// Waits for the next line with this message; fails at the end of the log.
    fn says(&mut self, message: &str) -> serde_json::Value {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "the log ended before {message:?}");
            let said: serde_json::Value = serde_json::from_str(&line).unwrap();
            if said["message"] == message {
                return said;
            }
        }
    }

    fn door(&self, name: &str) -> &str {
        self.doors[name].as_str().unwrap()
    }
}

#[test]
fn serve_relays_a_session_to_its_demo_backends() {
    let mut serving = Serving::start("demo", &["--demo", "2"]);
    for _ in 0..6 {
        serving.says("backend registered");
    }
    let tcp = serving.door("tcp").to_owned();
    let mut user = TcpStream::connect(&tcp).unwrap();
    user.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    user.write_all(b"over the hills").unwrap();
    let mut back = [0; 14];
    user.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"over the hills");
    assert_eq!(serving.says("user connected")["protocol"], "tcp");

    let admin = serving.door("admin").to_owned();
    let page = text(&ran(&["status", "--admin", &admin]).stdout);
    assert!(page.contains("serving") && page.contains("demo-tcp-1"), "{page}");
    assert!(page.contains(&tcp), "the port that the kernel chose: {page}");
    let output = ran(&["status", "--json", "--admin", &admin]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["sessions"]["active"], 1);
    let page = text(&ran(&["status", "--sessions", "--admin", &admin]).stdout);
    let client = user.local_addr().unwrap().to_string();
    assert!(page.contains(&client) && page.contains("1 session\n"), "{page}");
    let output = ran(&["status", "--sessions", "--json", "--admin", &admin]);
    let session: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(session["client"], client);

    drop(user);
    assert_eq!(serving.says("user left")["bytes_up"], 14);
    serving.running.terminate();
    assert_eq!(serving.running.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_reload_reaches_the_workers_and_the_log() {
    let folder = Folder::new("reload");
    let file = folder.write("lb.toml", SETTINGS);
    let mut serving = Serving::with_settings(&file, &["--demo", "1"]);
    for _ in 0..3 {
        serving.says("backend registered");
    }
    let admin = serving.door("admin").to_owned();
    let reload = |serving: &Serving, settings: &str, times: u64| {
        folder.write("lb.toml", format!("{SETTINGS}timeouts.tcp_idle_ms = 100\n{settings}"));
        serving.running.signal(Signal::SIGHUP);
        wait_for("the reload", || {
            let output = ran(&["status", "--json", "--admin", &admin]);
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            (status["control"]["reloads"] == times).then_some(())
        });
    };
    reload(&serving, "", 1);
    assert_eq!(serving.says(IN_USE)["setting"], "timeouts.tcp_idle_ms = \"100ms\"");
    let mut user = TcpStream::connect(serving.door("tcp")).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    let end = user.read(&mut [0]);
    assert!(!end.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "it is still idle");
    assert_eq!(serving.says("user left")["reason"], "idle", "the workers have the new time");
    reload(&serving, "log.level = \"warn\"\n", 2);
    reload(&serving, "log.level = \"info\"\n", 3);
    let next = serving.says(IN_USE);
    assert_eq!(next["setting"], "log.level = \"info\"", "the reload before it was not logged");
}

/// Logged at level info for every setting that a reload changes at once.
const IN_USE: &str = "reload: in use from now on";

#[test]
fn a_udp_user_is_served_and_shown() {
    let mut serving = Serving::start("demo-udp", &["--demo", "2"]);
    for _ in 0..6 {
        serving.says("backend registered");
    }
    let user = UdpSocket::bind("127.0.0.1:0").unwrap();
    user.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    user.connect(serving.door("udp")).unwrap();
    // The line is logged a moment before the workers know of the backend.
    let mut back = [0; 64];
    let len = wait_for("an answer", || {
        user.send(b"over the hills").unwrap();
        user.recv(&mut back).ok()
    });
    assert_eq!(&back[..len], b"over the hills");
    assert_eq!(serving.says("user connected")["protocol"], "udp");

    let admin = serving.door("admin").to_owned();
    let page = text(&ran(&["status", "--admin", &admin]).stdout);
    assert!(page.contains("demo-udp-1") && page.contains(serving.door("udp")), "{page}");
    let output = ran(&["status", "--sessions", "--json", "--admin", &admin]);
    let session: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(session["client"], user.local_addr().unwrap().to_string());
    assert_eq!((&session["protocol"], &session["bytes_up"]), (&"udp".into(), &14.into()));

    // The session would last a while longer; the second SIGTERM ends it.
    serving.running.terminate();
    serving.says("stopping: sessions left");
    serving.running.terminate();
    let left = serving.says("user left");
    assert_eq!((&left["protocol"], &left["reason"]), (&"udp".into(), &"stopping".into()));
    assert_eq!(serving.running.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_second_serve_on_the_same_ports_is_one_sentence() {
    let serving = Serving::start("twice", &[]);
    for name in ["tcp", "control", "admin"] {
        let flag = format!("--{name}");
        let mut flags = FREE.to_vec();
        let place = flags.iter().position(|found| *found == flag).unwrap();
        flags[place + 1] = serving.door(name);
        let output = ran(&[&["serve", "--workers", "1"], &flags[..]].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("is taken") && said.contains(&flag), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn serve_refuses_bad_settings_before_it_opens_anything() {
    for (arguments, said) in [
        (vec!["--demo", "1", "--control", "off"], "give it an address with --control"),
        (vec!["--control", "8080"], "set control.allow or control.secret_file"),
        (vec!["--tcp", "off", "--udp", "off", "--api", "off"], "give one of them an address"),
        (vec!["--workers", "0"], "--workers takes a number from 1 to 128"),
        (vec!["--config", "no/such.toml"], "check the path that follows --config"),
    ] {
        let output = ran(&[&["serve"], &arguments[..]].concat());
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(said), "{told}");
    }
}

#[test]
fn check_says_ok_line_by_line_and_how_many_sessions_fit() {
    let output = ran(&[&["check"], &FREE[..]].concat());
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}{}", text(&output.stderr));
    for what in ["settings", "io_uring", "rings", "memory", "descriptors", "tcp door", "admin door"]
    {
        assert!(said.lines().any(|line| line.starts_with(&format!("ok   {what} "))), "{said}");
    }
    assert!(said.contains("This host can hold ") && !said.contains('\u{1b}'), "{said}");
    assert!(said.contains(" UDP sessions on one backend, bounded by "), "{said}");
    let flags = [&["check", "--udp", "off"], &FREE[..2], &FREE[4..]].concat();
    assert!(!text(&ran(&flags).stdout).contains("UDP sessions"), "there are none without a door");
}

#[test]
fn check_says_what_is_wrong_and_how_to_fix_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = ran(&[&["check"], &FREE[..8], &["--admin", &address]].concat());
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let bad: Vec<&str> = said.lines().filter(|line| line.starts_with("bad")).collect();
    assert_eq!(bad.len(), 1, "{said}");
    assert!(bad[0].contains(&address) && bad[0].contains("--admin"), "{said}");
    assert!(text(&output.stderr).contains("serve would not start here"));

    let file = std::env::temp_dir().join(format!("lb-check-{}.toml", std::process::id()));
    std::fs::write(&file, "[balance]\npolicie = \"round_robin\"\n").unwrap();
    let output = ran(&["check", "--config", file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stdout);
    assert!(said.contains("line 2: unknown key `policie` in [balance]; did you mean `policy`?"));

    let files = "control.secret_file = \"no/such\"\nadmin.token_file = \"no/such\"\n";
    std::fs::write(&file, files).unwrap();
    let output = ran(&[&["check", "--config", file.to_str().unwrap()], &FREE[..]].concat());
    std::fs::remove_file(&file).unwrap();
    let said = text(&output.stdout);
    for what in ["secret", "tokens"] {
        let bad = said.lines().find(|line| line.starts_with(&format!("bad  {what} ")));
        assert!(bad.is_some_and(|bad| bad.contains("check that it is there")), "{said}");
    }
}

/// Runs `lb check` as an unprivileged user, without the capabilities that lift limits.
fn unprivileged(limits: &str) -> Option<Output> {
    let root = nix::unistd::geteuid().is_root();
    // A copy in a place an unprivileged user can reach.
    let program = std::env::temp_dir().join(format!("lb-{}-{}", std::process::id(), limits.len()));
    std::fs::copy(env!("CARGO_BIN_EXE_lb"), &program).unwrap();
    let line = format!("ulimit {limits} && exec {} check {}", program.display(), FREE.join(" "));
    let mut command = match root {
        true => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", &line]);
            command
        }
        false => {
            let mut command = Command::new("sh");
            command.args(["-c", &line]);
            command
        }
    };
    let output = command.current_dir("/").output();
    std::fs::remove_file(&program).unwrap();
    output.ok()
}

#[test]
fn check_explains_limits_that_are_too_low() {
    let Some(output) = unprivileged("-n 32") else { return };
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{said}{}", text(&output.stderr));
    assert!(said.lines().any(|line| line.starts_with("bad  descriptors")), "{said}");
    assert!(said.contains("raise LimitNOFILE"), "{said}");

    let Some(output) = unprivileged("-l 16") else { return };
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{said}{}", text(&output.stderr));
    assert!(said.contains("the rings do not fit into the 16384 bytes"), "{said}");
}

#[test]
fn a_backend_registers_echoes_answers_hello_and_unregisters_on_sigterm() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut backend = Running::start(&[
        "backend",
        "--protocol",
        "tcp",
        "--port",
        "0",
        "--echo",
        "--lb",
        &address,
        "--weight",
        "3",
        "--name",
        "web",
    ]);
    let mut control = Control::accept(&listener);
    let register = control.hears();
    assert_eq!(register["cmd"], "register");
    assert_eq!((&register["weight"], &register["name"]), (&3.into(), &"web".into()));
    let port = u16::try_from(register["port"].as_u64().unwrap()).unwrap();
    let mut user = TcpStream::connect(("127.0.0.1", port)).unwrap();
    user.write_all(b"hello").unwrap();
    user.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = String::new();
    user.read_to_string(&mut back).unwrap();
    assert_eq!(back, "hello");

    control.says(r#"{"ack":"successful","cmd":"register"}"#);
    control.says(r#"{"cmd":"hello"}"#);
    assert_eq!(control.hears()["ack"], "hello");
    backend.terminate();
    assert_eq!(control.hears()["cmd"], "unregister");
    control.says(r#"{"ack":"successful","cmd":"unregister"}"#);
    assert_eq!(backend.0.wait().unwrap().code(), Some(0));
    let mut log = String::new();
    backend.0.stdout.take().unwrap().read_to_string(&mut log).unwrap();
    for word in ["registered", "hello", "unregistered"] {
        let line = format!("tcp port {port} at {address}: {word}");
        assert!(log.lines().any(|found| found.ends_with(&line)), "{word}\n{log}");
    }
    assert!(!log.contains('\u{1b}') && !log.contains("q: quit"), "not a terminal: {log}");
}

#[test]
fn a_backend_reconnects_when_the_balancer_returns() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let _backend =
        Running::start(&["backend", "--protocol", "udp", "--port", "9", "--lb", &address]);
    for _ in 0..3 {
        let mut control = Control::accept(&listener);
        assert_eq!(control.hears()["port"], 9);
        control.says(r#"{"ack":"successful","cmd":"register"}"#);
    }
}

#[test]
fn a_backend_of_a_named_service_registers_under_its_name_alone() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut backend =
        Running::start(&["backend", "--service", "redis", "--port", "9", "--lb", &address]);
    let mut control = Control::accept(&listener);
    let register = control.hears();
    assert_eq!((&register["service"], &register["port"]), (&"redis".into(), &9.into()));
    assert!(register.get("protocol").is_none(), "{register}");
    control.says(r#"{"ack":"successful","cmd":"register","protocol":"tcp","service":"redis"}"#);
    control.says(r#"{"cmd":"hello"}"#);
    assert_eq!(control.hears()["ack"], "hello");
    backend.terminate();
    let unregister = control.hears();
    assert_eq!(
        (&unregister["cmd"], &unregister["service"]),
        (&"unregister".into(), &"redis".into())
    );
    control.says(r#"{"ack":"successful","cmd":"unregister","service":"redis"}"#);
    assert_eq!(backend.0.wait().unwrap().code(), Some(0));
}

#[test]
fn rule_14_a_backend_of_a_named_service_leaves_an_older_balancer_with_exit_code_2() {
    let granted = r#"{"ack":"successful","cmd":"register","protocol":"tcp","port":9,"id":"b1"}"#;
    let refused = r#"{"ack":"failed","msg":"protocol is missing","cmd":"register"}"#;
    for (protocol, answer) in [(&["--protocol", "tcp"][..], granted), (&[], refused)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let named = ["backend", "--service", "redis", "--port", "9", "--lb", &address];
        let mut command = lb(&[&named[..], protocol].concat());
        let mut backend = Running(command.stderr(Stdio::piped()).spawn().unwrap());
        let mut control = Control::accept(&listener);
        assert_eq!(control.hears()["cmd"], "register");
        control.says(answer);
        if answer == granted {
            let left = control.hears();
            assert_eq!((&left["cmd"], &left["protocol"]), (&"unregister".into(), &"tcp".into()));
            control.says(r#"{"ack":"successful","left":0,"cmd":"unregister"}"#);
        }
        assert_eq!(backend.0.wait().unwrap().code(), Some(2), "{answer}");
        let mut said = String::new();
        backend.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains("the balancer does not know services by name"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn rule_14_a_shift_leaves_an_older_balancer_with_exit_code_2() {
    let status = r#"{"schema":1,"services":[{"name":"shop","protocol":"api"}]}"#;
    let unknown = r#"{"error":"a verb takes one parameter at most"}"#;
    for (code, answer) in [
        ("400 Bad Request", unknown),
        ("404 Not Found", r#"{"error":"POST to /backends/ID/drain or /sessions/ID/end"}"#),
        ("200 OK", r#"{"schema":1,"sessions":4}"#),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shift = lb(&["shift", "shop", "blue=0", "green=100", "--admin", &address])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        for (start, code, body) in
            [("POST /services/shop/shift", code, answer), ("GET /status", "200 OK", status)]
        {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                asked.push(byte[0]);
            }
            assert!(asked.starts_with(start.as_bytes()), "{}", text(&asked));
            let head = format!("HTTP/1.1 {code}\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all((head + body).as_bytes()).unwrap();
        }
        let output = shift.unwrap().wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), String::new()));
        let said = text(&output.stderr);
        assert!(said.contains("is older than groups and has shifted nothing: update it"), "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
}
