//! Backends of the tests: what they serve users with, and the connections over which they register.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::balancer::Balancer;
use crate::{HOST, NEWCOMERS};

/// Backends that say on which port they serve, for as long as the user stays.
pub fn serve(port: u16) {
    let listener = TcpListener::bind(SocketAddr::from((HOST, port))).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut reader = BufReader::new(&stream);
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|count| count > 0) {
                    let _ = writeln!(&stream, "{port}");
                    line.clear();
                }
            });
        }
    });
}

/// A control connection, whose hellos are answered.
pub struct Control {
    stream: TcpStream,
    lines: std::sync::mpsc::Receiver<String>,
    _reader: JoinHandle<()>,
}

impl Control {
    pub fn open(balancer: &Balancer) -> Control {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::from(SocketAddr::from((HOST, 0)))).unwrap();
        socket.connect(&SockAddr::from(balancer.at(8080))).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).unwrap();
        let (tell, lines) = std::sync::mpsc::channel();
        let mut answers = stream.try_clone().unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let reader = thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                if line.contains("\"cmd\":\"hello\"") {
                    let _ = answers.write_all(b"{\"ack\":\"hello\"}\n");
                } else if tell.send(line).is_err() {
                    return;
                }
            }
        });
        Control { stream, lines, _reader: reader }
    }

    pub fn say(&mut self, cmd: &str, port: u16, more: &str) {
        let service = if NEWCOMERS.contains(&port) { "newcomers" } else { "tcp" };
        writeln!(
            self.stream,
            "{{\"cmd\":\"{cmd}\",\"service\":\"{service}\",\"port\":{port}{more}}}"
        )
        .unwrap();
    }

    pub fn hear(&self, what: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(60)).expect(what);
            if line.contains(what) {
                return line;
            }
        }
    }

    pub fn register(&mut self, port: u16) {
        self.say("register", port, "");
        let line = self.hear("\"register\"");
        assert!(line.contains("successful"), "{line}");
    }
}
