//! API users through handovers: every request is answered, uploads and tunnels end whole.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::harness::{Backend, Balancer};
use crate::random::pattern;
use crate::wait::{PATIENCE, wait_for};

/// Answers each request with the length and the sum of its body, and an upgrade with an echo.
fn web() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            thread::spawn(move || serve(connection));
        }
    });
    port
}

fn serve(mut to: TcpStream) -> Option<()> {
    let mut from = BufReader::new(to.try_clone().unwrap());
    loop {
        let (mut len, mut upgrade, mut line) = (0, false, String::new());
        while from.read_line(&mut line).ok()? > 2 {
            let low = line.to_ascii_lowercase();
            if let Some(value) = low.strip_prefix("content-length:") {
                len = value.trim().parse().unwrap();
            }
            upgrade |= low.starts_with("upgrade:");
            line.clear();
        }
        if upgrade {
            let head =
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n";
            to.write_all(head).ok()?;
            std::io::copy(&mut from, &mut to).ok()?;
            return None;
        }
        let (mut left, mut sum, mut bytes) = (len, 0u64, vec![0; 64 * 1024]);
        while left > 0 {
            let most = bytes.len().min(left);
            let count = from.read(&mut bytes[..most]).ok().filter(|count| *count > 0)?;
            sum = bytes[..count]
                .iter()
                .fold(sum, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte));
            left -= count;
        }
        let body = format!("{len} {sum}");
        write!(to, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok()?;
    }
}

struct Client {
    to: TcpStream,
    from: BufReader<TcpStream>,
}

impl Client {
    fn new(balancer: &Balancer) -> Client {
        let to = TcpStream::connect(balancer.door("api")).expect("nobody is refused");
        to.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { from: BufReader::new(to.try_clone().unwrap()), to }
    }

    /// The body of an answer, and whether the connection goes on.
    fn answer(&mut self) -> (String, bool) {
        let (mut len, mut goes_on, mut line) = (0, true, String::new());
        assert!(self.from.read_line(&mut line).unwrap() > 0, "an answer comes");
        assert!(line.starts_with("HTTP/1.1 200"), "{line}");
        loop {
            line.clear();
            self.from.read_line(&mut line).unwrap();
            let low = line.to_ascii_lowercase();
            if let Some(value) = low.strip_prefix("content-length:") {
                len = value.trim().parse().unwrap();
            }
            goes_on &= !low.starts_with("connection: close");
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; len];
        self.from.read_exact(&mut body).unwrap();
        (String::from_utf8(body).unwrap(), goes_on)
    }

    fn get(&mut self) -> bool {
        self.to.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let (body, goes_on) = self.answer();
        assert_eq!(body, "0 0");
        goes_on
    }
}

fn balancer() -> (Balancer, Backend) {
    let balancer = Balancer::start("workers = 1\n");
    let backend = Backend::register(&balancer, "api", web());
    wait_for("a backend", || {
        let status = balancer.status();
        (status["backends"].as_array().unwrap().len() == 1).then_some(())
    });
    (balancer, backend)
}

#[test]
fn every_request_is_answered() {
    let (balancer, backend) = balancer();
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::<AtomicU64>::default());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client = Client::new(&balancer);
                while !stop.load(Ordering::Relaxed) {
                    if !client.get() {
                        client = Client::new(&balancer);
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..4 {
            let before = count.load(Ordering::Relaxed);
            let old = balancer.pid();
            balancer.upgrade();
            wait_for("requests", || (count.load(Ordering::Relaxed) > before + 50).then_some(()));
            balancer.wait_for_end(old);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(backend.is_connected());
}

#[test]
fn an_upload_ends_whole() {
    let (balancer, _backend) = balancer();
    let body = pattern(3, 8 << 20);
    let mut client = Client::new(&balancer);
    write!(client.to, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len())
        .unwrap();
    let (first, second) = body.split_at(body.len() / 2);
    client.to.write_all(first).unwrap();
    balancer.upgrade();
    client.to.write_all(second).unwrap();
    let sum = body.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte));
    assert_eq!(client.answer().0, format!("{} {sum}", body.len()));
}

#[test]
fn a_tunnel_goes_on() {
    let (balancer, _backend) = balancer();
    let mut client = Client::new(&balancer);
    let head = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n";
    client.to.write_all(head).unwrap();
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        client.from.read_line(&mut line).unwrap();
    }
    for round in 0..4u32 {
        let text = [round.to_le_bytes(); 200].concat();
        client.to.write_all(&text).unwrap();
        let mut answer = vec![0; text.len()];
        client.from.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text, "round {round}");
        if round < 3 {
            balancer.upgrade();
        }
    }
}
