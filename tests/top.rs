//! `lb top` in a pseudo-terminal that an emulator reads: as a person has it who resizes the window, presses keys,
//! and sees the balancer go and come back.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

#[path = "common/process.rs"]
mod process;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process, free_port};
use wait::wait_for;

const LB: &str = env!("CARGO_BIN_EXE_lb");
const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// A window with `lb top` in it.
struct Window {
    keyboard: File,
    emulator: Arc<Mutex<vt100::Parser>>,
    top: Child,
}

impl Window {
    fn open(width: u16, height: u16, arguments: &[&str]) -> Window {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        resize(&master, width, height);
        let end = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
        // A session of its own, whose terminal it is: only then it is told of a new size.
        let top = Command::new("setsid")
            .args(["--ctty", LB, "top"])
            .args(arguments)
            .env("TERM", "xterm-256color")
            .stdin(Stdio::from(end()))
            .stdout(Stdio::from(end()))
            .stderr(Stdio::from(end()))
            .spawn()
            .unwrap();
        let keyboard = File::from(master);
        let size = |count| NonZero::new(count).unwrap();
        let emulator = Arc::new(Mutex::new(vt100::Parser::new(size(height), size(width), 0)));
        let (mut screen, shown) = (keyboard.try_clone().unwrap(), Arc::clone(&emulator));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                shown.lock().unwrap().process(&bytes[..count]);
            }
        });
        Window { keyboard, emulator, top }
    }

    fn resize(&self, width: u16, height: u16) {
        let size = |count| NonZero::new(count).unwrap();
        self.emulator.lock().unwrap().screen_mut().set_size(size(height), size(width));
        resize(&OwnedFd::from(self.keyboard.try_clone().unwrap()), width, height);
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn lines(&self) -> Vec<String> {
        let emulator = self.emulator.lock().unwrap();
        let (_, width) = emulator.screen().size();
        emulator.screen().rows(0, width.get()).map(|row| row.trim_end().to_owned()).collect()
    }

    #[track_caller]
    fn wait_for(&self, what: &str, is_so: impl Fn(&[String]) -> bool) -> Vec<String> {
        wait_for(what, || Some(self.lines()).filter(|lines| is_so(lines)))
    }

    #[track_caller]
    fn wait_for_text(&self, text: &str) -> Vec<String> {
        self.wait_for(text, |lines| lines.join(" ").contains(text))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the window showed\n{}", self.lines().join("\n"));
        }
        let _ = self.top.kill();
        let _ = self.top.wait();
    }
}

fn resize(terminal: &OwnedFd, width: u16, height: u16) {
    let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

/// A balancer with one backend of each protocol, and whoever has the token may change it.
fn serve(folder: &Folder, admin: &str) -> Process {
    let tokens = folder.write("tokens", TOKEN);
    fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).unwrap();
    let settings = format!("[admin]\ntoken_file = \"{tokens}\"\n");
    let settings = folder.write("lb.toml", settings);
    let any = "127.0.0.1:0";
    let arguments = ["serve", "--demo", "1", "--config", &settings];
    let doors = ["--tcp", any, "--udp", any, "--api", any, "--control", any, "--admin", admin];
    Process::start(LB, &[&arguments[..], &doors[..]].concat())
}

fn keys_are_at(line: usize) -> impl Fn(&[String]) -> bool {
    move |lines| {
        let rows = lines.iter().filter(|line| line.starts_with('b')).count();
        rows == 3 && lines.len() == line + 1 && lines[line].starts_with("q quit")
    }
}

#[test]
fn top_follows_its_window_and_outlives_its_balancer() {
    let folder = Folder::new("top");
    let admin = format!("127.0.0.1:{}", free_port());
    let balancer = serve(&folder, &admin);
    let mut window = Window::open(60, 15, &["--admin", &admin]);
    for (width, height) in [(60, 15), (80, 24), (120, 40), (60, 15)] {
        window.resize(width, height);
        window.wait_for("three backends and the keys", keys_are_at(usize::from(height) - 1));
    }
    window.press("dn");
    window.wait_for_text("deadline: n_");
    balancer.terminate();
    window.wait_for_text("NOT ANSWERING");
    window.press("\x1b");
    window.wait_for_text("was not drained");
    let _again = serve(&folder, &admin);
    window.wait_for_text("the balancer has been restarted");
    window.press("q");
    assert!(window.top.wait().unwrap().success());
}

#[test]
fn a_drain_is_refused_without_a_token_and_taken_back_with_one() {
    let folder = Folder::new("top-drain");
    let admin = format!("127.0.0.1:{}", free_port());
    let _balancer = serve(&folder, &admin);
    let mut window = Window::open(60, 15, &["--admin", &admin]);
    window.wait_for("three backends", keys_are_at(14));
    window.press("d\r");
    let lines = window.wait_for_text("--token-file");
    assert!(lines[14].starts_with("q quit"), "{lines:?}");
    drop(window);
    let tokens = folder.path().join("tokens");
    let with = ["--admin", &admin, "--token-file", tokens.to_str().unwrap()];
    let mut window = Window::open(80, 24, &with);
    window.wait_for("three backends", keys_are_at(23));
    window.press("d5m\r");
    window.wait_for_text("b1 drains");
    window.wait_for("its row", |lines| {
        lines.iter().any(|it| it.starts_with("b1 ") && it.contains(" drain") && it.contains("demo"))
    });
    window.press("u");
    window.wait_for_text("b1 no longer drains");
    window.wait_for("its row", |lines| {
        lines.iter().any(|it| it.starts_with("b1 ") && it.contains(" serving "))
    });
}

/// A balancer of a version that had neither services nor history, nor took a drain back.
fn old_balancer() -> String {
    let backend = r#"{"id":"b1","protocol":"tcp","address":"127.0.0.1:9","name":"old","weight":1,
        "state":"draining","turns":1,"round":1,"registered_unix_ms":1,"drains_in_ms":9000,"hello":
        {"answered_unix_ms":null,"took_us":null,"misses":0},"sessions_active":2,"sessions_total":2,
        "connects_failed":0,"bytes_up":0,"bytes_down":0}"#;
    let times = r#"{"count":0,"sum_us":0,"p50_us":null,"p90_us":null,"p99_us":null}"#;
    let status = format!(
        r#"{{"schema":1,"version":"0.0.9","pid":1,"state":"serving","started_unix_ms":1,"uptime_ms":5,
        "stops_in_ms":null,"doors":{{"tcp":null,"udp":null,"api":null,"control":null,"admin":null}},
        "policy":"round_robin","snapshot":1,"sessions":{{"active":2,"limit":9,"started":2,"ended":0,
        "refused":0,"bytes_up":0,"bytes_down":0}},"backends":[{backend}],"workers":[],"timings":
        {{"connect":{times},"first_byte":{times},"session_length":{times}}},"control":{{}}}}"#
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let admin = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut head = Vec::new();
            while let Some(Ok(line)) =
                (&mut stream).lines().next().filter(|it| !matches!(it, Ok(it) if it.is_empty()))
            {
                head.push(line);
            }
            let (code, body) = match head.first().is_some_and(|it| it.starts_with("GET /status ")) {
                true => ("200 OK", status.as_str()),
                false => ("404 Not Found", r#"{"error":"POST to /backends/ID/drain"}"#),
            };
            let length = body.len();
            let _ = write!(
                stream.get_mut(),
                "HTTP/1.1 {code}\r\nContent-Length: {length}\r\n\r\n{body}"
            );
        }
    });
    admin
}

#[test]
fn an_older_balancer_is_shown_and_what_it_cannot_do_is_told() {
    let mut window = Window::open(60, 15, &["--admin", &old_balancer()]);
    let lines = window.wait_for_text("draining 9s");
    assert!(lines[0].starts_with("lb 0.0.9 serving"), "{lines:?}");
    window.press("u");
    window.wait_for_text("this balancer is older than this program");
    window.press("h");
    window.wait_for_text("There is no history, which older balancers do not keep");
}
