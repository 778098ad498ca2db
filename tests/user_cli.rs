//! `lb user` as a person runs it: what it sends and prints, and what its exit code tells.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A user that ends with its test.
struct User(Child);

impl User {
    fn start(arguments: &[&str]) -> User {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        command.arg("user").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        User(command.spawn().unwrap())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_user_sends_the_lines_typed_and_prints_the_replies() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut user = User::start(&["--protocol", "tcp", "--to", &address]);
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
    let mut user = User::start(&["--protocol", "udp", "--to", &address]);
    user.0.stdin.take().unwrap().write_all(b"ping\n").unwrap();
    let mut datagram = [0; 16];
    let (length, peer) = socket.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"ping");
    socket.send_to(b"pong", peer).unwrap();
    let mut said = String::new();
    user.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "pong\n");
}

/// What a user of `to` prints who says `lines` and waits a moment for the answers, and the exit code.
fn user(protocol: &str, to: &str, lines: &str) -> (Option<i32>, String) {
    let arguments = ["--protocol", protocol, "--to", to, "--timeout", "300ms"];
    let mut user = User::start(&arguments);
    user.0.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let mut said = String::new();
    user.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    (user.0.wait().unwrap().code(), said)
}

#[test]
fn the_exit_code_of_a_user_tells_whether_an_answer_came() {
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = UdpSocket::bind("127.0.0.1:0").unwrap();
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (deaf_at, mute_at) = (deaf.local_addr().unwrap(), mute.local_addr().unwrap());
    for (protocol, to, word) in [
        ("tcp", deaf_at.to_string(), "nothing more was heard within 300ms"),
        ("udp", mute_at.to_string(), "no reply within 300ms"),
        ("udp", nobody.clone(), "no reply: "),
        ("api", deaf_at.to_string(), "no answer within 300ms"),
    ] {
        let lines = if protocol == "api" { "/a\n" } else { "hello\n" };
        let (code, said) = user(protocol, &to, lines);
        assert_eq!(code, Some(1), "{protocol} {to}: {said}");
        assert!(said.contains(word), "{protocol} {to}: {said}");
    }
    assert_eq!(user("tcp", &deaf_at.to_string(), "").0, Some(0), "who asks nothing misses nothing");
    assert_eq!(user("api", &nobody, "/a\n").0, Some(2), "nobody listens there");
    for (status, code) in [("200 OK", 0), ("404 Not Found", 0), ("503 Service Unavailable", 1)] {
        let web = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = web.local_addr().unwrap().to_string();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = web.accept().unwrap();
            let _ = stream.read(&mut [0; 1_024]);
            write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nok").unwrap();
            let _ = stream.read(&mut [0; 1_024]);
        });
        let (found, said) = user("api", &to, "/a\n");
        assert_eq!(found, Some(code), "{said}");
        assert!(said.contains(status), "{said}");
        serving.join().unwrap();
    }
}
