//! Rude users and backends against the real kernel: streams of any length in blocks and pipes, readers
//! who wait, and resets in the middle of it. A reader that sees the clean end of a stream must have
//! had all of it, from a peer that ended it cleanly.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lb::boot::DataPlane;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::proxy::line::Features;
use lb::worker::link::Order;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

#[path = "common/random.rs"]
mod random;
#[path = "common/wait.rs"]
mod wait;

use random::Random;
use wait::PATIENCE;

const USERS: usize = 400;
/// Users at once.
const CROWD: usize = 16;

/// What one end of a session does.
#[derive(Clone, Copy, Debug)]
struct Habits {
    bytes: u64,
    /// Resets the connection once this much was written.
    reset_after: Option<u64>,
    /// Reads nothing before everything is written.
    writes_first: bool,
    /// Finishes only when the other end has.
    ends_last: bool,
    chunk: usize,
    /// Of the socket, both ways.
    buffer: usize,
}

/// What the two ends of a session do, and have done: the user first.
struct Session {
    number: usize,
    habits: [Habits; 2],
    finished: [AtomicBool; 2],
}

impl Session {
    fn draw(number: usize) -> Session {
        let mut random = Random::new(number as u64);
        let mut habits = [0; 2].map(|_| Habits::draw(&mut random));
        // Two who wait for each other would wait for ever.
        habits[1].writes_first = false;
        habits[1].ends_last &= !habits[0].ends_last;
        Session { number, habits, finished: Default::default() }
    }

    fn is_rude(&self) -> bool {
        self.habits.iter().any(|habits| habits.reset_after.is_some())
    }
}

impl Habits {
    fn draw(random: &mut Random) -> Habits {
        let most = if random.in_thousand(300) { 2 << 20 } else { 64 << 10 };
        let bytes = random.any_size(most);
        Habits {
            bytes,
            reset_after: random.in_thousand(300).then(|| random.below(bytes + 1)),
            writes_first: random.in_thousand(300),
            ends_last: random.half(),
            chunk: random.between(1 << 10, 64 << 10) as usize,
            buffer: random.pick(&[16 << 10, 64 << 10, 1 << 20]),
        }
    }
}

/// The byte at a place of what one end says.
fn byte(session: usize, end: usize, place: u64) -> u8 {
    let number = (session as u64 * 2 + end as u64 + 1) * 0x9e37_79b9;
    (place.wrapping_mul(0x2545_f491).wrapping_add(number) >> 16) as u8
}

/// One end of a session, on its socket.
struct Peer<'a> {
    session: &'a Session,
    end: usize,
    stream: TcpStream,
    written: u64,
    read: u64,
    heard_end: bool,
}

impl Peer<'_> {
    /// Plays it to its end. False when the connection was reset, by either end.
    fn play(mut self) -> bool {
        let habits = self.session.habits[self.end];
        self.stream.set_nonblocking(true).unwrap();
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "{} {:?} hangs", self.session.number, self.told());
            if habits.reset_after.is_some_and(|after| self.written >= after) {
                socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).unwrap();
                return false;
            }
            let finished = self.finishes(habits);
            if finished && self.heard_end {
                return true;
            }
            if !self.moves(habits) {
                return false;
            }
        }
    }

    fn told(&self) -> impl std::fmt::Debug {
        (self.end, self.written, self.read, self.heard_end, self.session.habits)
    }

    fn finishes(&mut self, habits: Habits) -> bool {
        let finished = &self.session.finished[self.end];
        let may = self.written == habits.bytes && (self.heard_end || !habits.ends_last);
        if may && !finished.swap(true, Ordering::SeqCst) {
            // Refused when the other end has reset the connection, which reading tells.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        finished.load(Ordering::SeqCst)
    }

    /// Waits until something can move, and moves it. False after a reset.
    fn moves(&mut self, habits: Habits) -> bool {
        let writes = self.written < habits.bytes;
        let waits = self.heard_end || writes && habits.writes_first;
        let reads = !waits;
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLOUT, writes);
        events.set(PollFlags::POLLIN, reads);
        let mut polled = [PollFd::new(self.stream.as_fd(), events)];
        poll(&mut polled, PollTimeout::from(1000_u16)).unwrap();
        (!writes || self.write(habits)) && (!reads || self.read(habits))
    }

    fn write(&mut self, habits: Habits) -> bool {
        let most = habits.reset_after.unwrap_or(habits.bytes).min(habits.bytes);
        let len = (most - self.written).min(habits.chunk as u64);
        let text: Vec<u8> = (self.written..self.written + len)
            .map(|place| byte(self.session.number, self.end, place))
            .collect();
        match self.stream.write(&text) {
            Ok(count) => self.written += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        true
    }

    fn read(&mut self, habits: Habits) -> bool {
        let mut bytes = vec![0; habits.chunk];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.judge_end(),
            Ok(count) => self.judge(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        true
    }

    fn judge(&mut self, bytes: &[u8]) {
        let other = 1 - self.end;
        let right = bytes
            .iter()
            .zip(self.read..)
            .all(|(found, place)| *found == byte(self.session.number, other, place));
        assert!(right, "{}: wrong bytes after {}", self.session.number, self.read);
        self.read += bytes.len() as u64;
    }

    fn judge_end(&mut self) {
        let other = 1 - self.end;
        let finished = self.session.finished[other].load(Ordering::SeqCst);
        let whole = self.read == self.session.habits[other].bytes;
        assert!(finished && whole, "{} ended for {:?}", self.session.number, self.told());
        self.heard_end = true;
    }
}

fn sized(stream: TcpStream, habits: Habits) -> TcpStream {
    let socket = socket2::SockRef::from(&stream);
    socket.set_recv_buffer_size(habits.buffer).unwrap();
    socket.set_send_buffer_size(habits.buffer).unwrap();
    stream
}

/// Plays the other end of every session; the first byte pair says which one it is.
fn backend(sessions: Arc<Vec<Session>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let sessions = Arc::clone(&sessions);
            thread::spawn(move || {
                let mut number = [0; 2];
                if stream.read_exact(&mut number).is_ok() {
                    let session = &sessions[usize::from(u16::from_be_bytes(number))];
                    play(session, 1, stream);
                }
            });
        }
    });
    address
}

fn play(session: &Session, end: usize, stream: TcpStream) -> bool {
    let stream = sized(stream, session.habits[end]);
    Peer { session, end, stream, written: 0, read: 0, heard_end: false }.play()
}

fn user(session: &Session, door: SocketAddr) {
    let mut stream = TcpStream::connect(door).unwrap();
    stream.write_all(&(session.number as u16).to_be_bytes()).unwrap();
    let served = play(session, 0, stream);
    assert!(served || session.is_rude(), "{} was reset", session.number);
}

#[test]
fn rude_peers_get_whole_streams_or_resets() {
    let sessions: Arc<Vec<Session>> = Arc::new((0..USERS).map(Session::draw).collect());
    let mut config = Config { workers: Some(2), ..Config::default() };
    config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
    config.listen.udp = None;
    let features = Features { receive_cap: true, splice: true };
    let mut plane = DataPlane::start(&config, USERS, features).unwrap();
    let backend = Backend {
        proxy: false,
        http2: false,
        tls: None,
        id: BackendId(1),
        slot: 0,
        service: ServiceId::built_in(Protocol::Tcp),
        address: backend(Arc::clone(&sessions)),
        weight: 1,
        name: None,
        group: None,
        standing: Standing::Serving,
    };
    plane.snapshots.publish(plane.snapshots.current().with(&[backend]));
    for end in &plane.ends {
        end.wake.write(1).unwrap();
    }
    let door = plane.door(Protocol::Tcp).unwrap();
    thread::scope(|scope| {
        for first in 0..CROWD {
            let sessions = &sessions;
            scope.spawn(move || {
                for session in sessions.iter().skip(first).step_by(CROWD) {
                    user(session, door);
                }
            });
        }
    });
    let until = Instant::now() + PATIENCE;
    let active =
        || -> u64 { plane.ends.iter().map(|end| end.metrics.counters.sessions_active.get()).sum() };
    while active() > 0 {
        assert!(Instant::now() < until, "{} sessions are left", active());
        thread::yield_now();
    }
    for end in &mut plane.ends {
        end.orders.push(Order::Stop).unwrap();
        end.wake.write(1).unwrap();
    }
    plane.threads.join();
}
