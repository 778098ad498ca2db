//! What a newcomer sees in a terminal: the block at the end of a start, whose every line works as it
//! stands there. Owns a terminal for each balancer, by way of script(1).

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[path = "common/process.rs"]
mod process;

use process::Folder;

const PATIENCE: Duration = Duration::from_secs(60);

const DOORS: &str = "listen = { tcp = \"127.0.0.1:0\", udp = \"127.0.0.1:0\", api = \"127.0.0.1:0\", \
                     control = \"127.0.0.1:0\", admin = \"127.0.0.1:0\" }\n";

/// A balancer with what it prints, line by line, in a terminal or not.
struct Balancer {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    _folder: Folder,
}

impl Balancer {
    fn start(settings: &str, more: &str, in_terminal: bool) -> Balancer {
        let folder = Folder::new("first");
        let file = folder.write("lb.toml", settings);
        let command =
            format!("exec {} serve --with-parent --config {file} {more}", env!("CARGO_BIN_EXE_lb"));
        let mut shell = match in_terminal {
            true => Command::new("script"),
            false => Command::new("sh"),
        };
        match in_terminal {
            true => shell.args(["--quiet", "--flush", "--command", &command, "/dev/null"]),
            false => shell.args(["-c", &command]),
        };
        let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (say, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = say.send(line.trim_end_matches('\r').to_owned());
            }
        });
        Balancer { child, lines, seen: Vec::new(), _folder: folder }
    }

    /// Reads until a line contains these words.
    #[track_caller]
    fn read_until(&mut self, words: &str) {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("no `{words}` in {:#?}", self.seen));
            self.seen.push(line);
            if self.seen.last().unwrap().contains(words) {
                return;
            }
        }
    }

    /// The commands of the block, each with its label.
    fn block(&mut self) -> Vec<(String, String)> {
        self.read_until("What to type next");
        let from = self.seen.len();
        self.read_until("Ctrl-C");
        let mut label = String::new();
        let rows = self.seen[from..].iter().map(|line| {
            let (shown, command) = line.split_at(13);
            if !shown.trim().is_empty() {
                label = shown.trim().to_owned();
            }
            (label.clone(), command.to_owned())
        });
        rows.collect()
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        // `script` ends its command with itself; the shell has become the balancer.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// What a command prints, run as a person would.
#[track_caller]
fn typed(command: &str) -> String {
    let done = Command::new("sh").args(["-c", command]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{command}: {said}{}", String::from_utf8_lossy(&done.stderr));
    said
}

/// The commands under a label.
fn under<'a>(block: &'a [(String, String)], label: &str) -> Vec<&'a str> {
    block.iter().filter(|row| row.0 == label).map(|row| row.1.as_str()).collect()
}

#[test]
fn every_line_of_the_block_works_as_it_stands() {
    let mut balancer = Balancer::start(DOORS, "--demo 1", true);
    let block = balancer.block();
    let ready = balancer.seen.iter().position(|line| line.contains(" ready ")).unwrap();
    let joined = balancer.seen.iter().filter(|line| line.contains("demo-")).count();
    let heading = balancer.seen.iter().position(|line| line.contains("to type next")).unwrap();
    assert!(ready < heading && joined >= 3, "it comes last: {:#?}", balancer.seen);
    let users = under(&block, "a user");
    assert_eq!(users.len(), 4, "{block:#?}");
    for command in users {
        // Not every machine has curl.
        if !command.starts_with("curl") || Command::new("curl").arg("--version").output().is_ok() {
            let said = typed(command);
            let is_served =
                ["hello", "HTTP/1.1 200", "HTTP/2 200"].iter().any(|it| said.contains(it));
            assert!(is_served, "{command}: {said}");
        }
    }
    assert!(typed(under(&block, "watch")[1]).contains("demo-tcp-1"));
    let page = under(&block, "page")[0].trim_start_matches("http://").trim_end_matches('/');
    assert!(std::net::TcpStream::connect(page).is_ok(), "{page}");
    let [backend] = under(&block, "a backend")[..] else { panic!("{block:#?}") };
    let backend = backend.replace("--port 9991", "--port 0 --echo --name newcomer");
    let shell =
        Command::new("sh").args(["-c", &format!("exec {backend}")]).stdin(Stdio::null()).spawn();
    let _backend = process::Process(shell.unwrap());
    balancer.read_until("newcomer");
}

#[test]
fn the_user_of_a_named_service_reaches_it_by_the_line_about_it() {
    let services = "[service.shop]\nprotocol = \"api\"\nhosts = [\"shop.example\"]\n\
                    [service.redis]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\n";
    let mut balancer = Balancer::start(&format!("{DOORS}{services}"), "", true);
    let block = balancer.block();
    let backend = under(&block, "a backend")[0];
    assert!(backend.contains("backend --service shop --port 9991 --lb 127.0.0.1:"), "{backend}");
    let backend = backend.replace("--service shop", "--service redis --protocol tcp");
    let backend = backend.replace("--port 9991", "--port 0 --echo --name newcomer");
    let shell =
        Command::new("sh").args(["-c", &format!("exec {backend}")]).stdin(Stdio::null()).spawn();
    let _backend = process::Process(shell.unwrap());
    balancer.read_until("newcomer");
    let users = under(&block, "a user");
    assert!(users[0].contains("-H 'Host: shop.example'"), "{users:#?}");
    assert!(typed(users[1]).contains("hello"), "{users:#?}");
}

#[test]
fn nobody_but_a_person_at_a_terminal_gets_the_block() {
    for (settings, in_terminal) in
        [(DOORS.to_owned(), false), (format!("{DOORS}[log]\nformat = \"json\"\n"), true)]
    {
        let mut balancer = Balancer::start(&settings, "--demo 1", in_terminal);
        balancer.read_until("demo-api-1");
        match in_terminal {
            true => balancer.child.stdin.as_mut().unwrap().write_all(b"\x03").unwrap(),
            false => kill(Pid::from_raw(balancer.child.id() as i32), Signal::SIGTERM).unwrap(),
        }
        balancer.read_until("stopped");
        assert!(!balancer.seen.iter().any(|line| line.contains("next")), "{:#?}", balancer.seen);
    }
}
