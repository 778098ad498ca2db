//! API users through handovers: every request is answered, uploads and tunnels end whole.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::harness::{Backend, Balancer};
use crate::random::pattern;
use crate::wait::{PATIENCE, wait_for};

/// Answers each request with the length and the sum of its body, and an upgrade with an echo.
pub fn web() -> u16 {
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
    to.set_nodelay(true).unwrap();
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

pub struct Client {
    pub to: TcpStream,
    from: BufReader<TcpStream>,
}

impl Client {
    pub fn new(balancer: &Balancer) -> Client {
        let to = TcpStream::connect(balancer.door("api")).expect("nobody is refused");
        to.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { from: BufReader::new(to.try_clone().unwrap()), to }
    }

    /// The body of an answer, and whether the connection goes on.
    pub fn answer(&mut self) -> (String, bool) {
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

    pub fn get(&mut self) -> bool {
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
                    assert!(client.get(), "nobody is asked to come again");
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

/// Asks for a tunnel.
fn tunnel(balancer: &Balancer) -> Client {
    let mut client = Client::new(balancer);
    let head = b"GET /echo HTTP/1.1\r\nHost: x\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n";
    client.to.write_all(head).unwrap();
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        assert!(client.from.read_line(&mut line).unwrap() > 0, "an answer comes");
    }
    client
}

#[test]
fn a_tunnel_goes_on_and_the_old_process_does_not_wait_for_it() {
    let (balancer, _backend) = balancer();
    let (mut client, mut other) = (tunnel(&balancer), tunnel(&balancer));
    for round in 0..5u32 {
        let text = [round.to_le_bytes(); 200].concat();
        client.to.write_all(&text).unwrap();
        let mut answer = vec![0; text.len()];
        client.from.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text, "round {round}");
        if round < 4 {
            let old = balancer.pid();
            balancer.upgrade();
            // Its patience with tunnels would be longer than this test's.
            balancer.wait_for_end(old);
        }
    }
    other.to.shutdown(Shutdown::Write).unwrap();
    assert_eq!(other.from.read(&mut [0; 8]).unwrap(), 0, "its end is passed on, and the echo's");
}

#[test]
fn a_stream_through_a_tunnel_loses_no_byte() {
    let (balancer, _backend) = balancer();
    let Client { mut to, mut from } = tunnel(&balancer);
    let (stop, passed) = (AtomicBool::new(false), AtomicU64::new(0));
    let sent = pattern(9, 1 << 20);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                to.write_all(&sent).unwrap();
            }
            to.shutdown(Shutdown::Write).unwrap();
        });
        scope.spawn(|| {
            let mut bytes = vec![0; sent.len()];
            let mut at = 0;
            loop {
                let count = from.read(&mut bytes).unwrap();
                if count == 0 {
                    break;
                }
                for byte in &bytes[..count] {
                    assert_eq!(*byte, sent[at], "byte {at} after {passed:?}");
                    at = (at + 1) % sent.len();
                }
                passed.fetch_add(count as u64, Ordering::Relaxed);
            }
            assert_eq!(at, 0, "all of it came");
        });
        for _ in 0..4 {
            let (before, old) = (passed.load(Ordering::Relaxed), balancer.pid());
            balancer.upgrade();
            let more = || (passed.load(Ordering::Relaxed) > before + (8 << 20)).then_some(());
            wait_for("more bytes", more);
            balancer.wait_for_end(old);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn who_is_between_two_requests_never_has_to_come_again() {
    let (balancer, backend) = balancer();
    let mut clients: Vec<Client> = (0..20).map(|_| Client::new(&balancer)).collect();
    // One has asked for nothing yet.
    let mut late = Client::new(&balancer);
    assert!(clients.iter_mut().all(Client::get));
    let counted = || balancer.status()["backends"][0]["sessions_total"].as_u64().unwrap();
    let before = counted();
    for _ in 0..4 {
        let old = balancer.pid();
        balancer.upgrade();
        balancer.wait_for_end(old);
        assert!(clients.iter_mut().all(Client::get), "nobody is asked to come again");
    }
    assert!(late.get());
    assert_eq!(counted(), before + 4 * 20 + 1, "each request is counted once");
    assert!(backend.is_connected());
}
