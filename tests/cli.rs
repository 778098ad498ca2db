//! The commands as a person types them: what they print, how they end, what they exit with.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

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

/// A program that is ended with its test.
struct Running(Child);

impl Running {
    fn start(arguments: &[&str]) -> Running {
        let child = lb(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Running(child)
    }

    fn terminate(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
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
fn help_and_version_are_no_faults() {
    let help = ran(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for command in ["serve", "check", "backend", "user", "status"] {
        assert!(text(&help.stdout).contains(command), "{}", text(&help.stdout));
        assert_eq!(ran(&[command, "--help"]).status.code(), Some(0));
    }
    assert!(text(&ran(&["--version"]).stdout).starts_with("lb "));
}

#[test]
fn the_operators_faults_are_one_sentence_and_exit_code_2() {
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
            "cannot be opened for the echo service",
        ),
        (
            vec!["backend", "--protocol", "tcp", "--port", "1", "--secret-file", "no/such"],
            "check [control] secret_file",
        ),
    ] {
        let output = ran(&arguments);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?} {told}");
        assert!(told.starts_with("lb: ") && told.contains(said), "{arguments:?} {told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
    for arguments in [vec![], vec!["fly"], vec!["backend", "--protocol", "sctp", "--port", "1"]] {
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
}

#[test]
fn check_says_what_is_bad_and_how_to_mend_it() {
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
}

/// Runs as nobody in particular, without the capabilities that make limits look wide.
fn unprivileged(limits: &str) -> Option<Output> {
    let root = nix::unistd::geteuid().is_root();
    // Somewhere that an unprivileged user can reach.
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
    let Some(output) = unprivileged("-n 64") else { return };
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
fn a_backend_comes_back_when_the_balancer_does() {
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
fn a_user_sends_the_lines_typed_and_prints_the_replies() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut user = Running::start(&["user", "--protocol", "tcp", "--to", &address]);
    user.0.stdin.take().unwrap().write_all(b"one\ntwo\n").unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut heard = String::new();
    stream.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "one\ntwo\n");
    stream.write_all(b"both\n").unwrap();
    drop(stream);
    let mut said = String::new();
    user.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "both\n");
    assert_eq!(user.0.wait().unwrap().code(), Some(0));

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let mut user = Running::start(&["user", "--protocol", "udp", "--to", &address]);
    user.0.stdin.take().unwrap().write_all(b"ping\n").unwrap();
    let mut datagram = [0; 16];
    let (length, peer) = socket.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"ping");
    socket.send_to(b"pong", peer).unwrap();
    let mut said = String::new();
    user.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "pong\n");
}
