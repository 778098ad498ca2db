//! UDP users: many, each with a port of its own, and one who asks all the time.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::networks::Network;

/// As many as ask at once: what their answers take fits into the buffers on the way.
const AT_ONCE: usize = 100;
/// How often one asks again that has no answer.
const TRIES: usize = 50;

/// A backend that says what it was sent, on which port, and from where.
pub fn serve(network: &Network, port: u16) {
    let socket = network.within(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
    thread::spawn(move || {
        let mut block = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut block) {
            let words = String::from_utf8_lossy(&block[..length]);
            let _ = socket.send_to(format!("{words} {port} {from}").as_bytes(), from);
        }
    });
}

/// Who answered a user: the port of the backend, and where the balancer's session is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Home {
    pub backend: u16,
    pub session: SocketAddr,
}

/// How many users have moved from one session to another.
pub fn moved(before: &[Home], now: &[Home]) -> usize {
    before.iter().zip(now).filter(|(before, now)| before != now).count()
}

/// How many have another backend.
pub fn rehashed(before: &[Home], now: &[Home]) -> usize {
    before.iter().zip(now).filter(|(before, now)| before.backend != now.backend).count()
}

pub struct Flows {
    sockets: Vec<UdpSocket>,
    asked: AtomicU64,
}

fn user(network: &Network, from: u16, to: &str, patience: Duration) -> UdpSocket {
    network.within(|| {
        let socket = UdpSocket::bind(("0.0.0.0", from)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        socket
    })
}

impl Flows {
    pub fn new(network: &Network, count: u16, to: &str) -> Flows {
        let patience = Duration::from_millis(100);
        let user = |number| user(network, 20_000 + number, to, patience);
        Flows { sockets: (0..count).map(user).collect(), asked: AtomicU64::new(0) }
    }

    /// Asks with each; all have to be answered.
    pub fn ask(&self) -> Vec<Home> {
        let question = self.asked.fetch_add(1, Ordering::Relaxed).to_string();
        let mut homes = Vec::new();
        for batch in self.sockets.chunks(AT_ONCE) {
            let mut heard: Vec<Option<Home>> = vec![None; batch.len()];
            for _ in 0..TRIES {
                for (place, socket) in batch.iter().enumerate() {
                    if heard[place].is_none() {
                        let _ = socket.send(question.as_bytes());
                    }
                }
                for (place, socket) in batch.iter().enumerate() {
                    if heard[place].is_none() {
                        heard[place] = answer(socket, &question);
                    }
                }
                if heard.iter().all(Option::is_some) {
                    break;
                }
            }
            homes.extend(heard.into_iter().map(|home| home.expect("each is answered")));
        }
        homes
    }
}

/// The next answer to this question; what answers an older one is passed over.
fn answer(socket: &UdpSocket, question: &str) -> Option<Home> {
    let mut block = [0; 128];
    loop {
        let length = socket.recv(&mut block).ok()?;
        let words = String::from_utf8_lossy(&block[..length]).into_owned();
        let mut words = words.split(' ');
        if words.next() != Some(question) {
            continue;
        }
        let (backend, session) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        return Some(Home { backend, session });
    }
}

/// A user who asks every 10 ms, and knows the longest time without an answer. Time in which this user was not run
/// either, on a machine that is too busy, is not counted.
pub struct Probe {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

/// A question, an answer and a rest take less, unless the machine does something else.
const ROUND_MAX: Duration = Duration::from_millis(100);

impl Probe {
    /// Begins with the first answer.
    pub fn begin(network: &Network, to: &str) -> Probe {
        let socket = user(network, 0, to, Duration::from_millis(10));
        let is_over = Arc::new(AtomicBool::new(false));
        let ask = move |number: u64| {
            let question = format!("p{number}");
            socket.send(question.as_bytes()).ok()?;
            answer(&socket, &question)
        };
        crate::wait::wait_for("the first answer", || ask(0));
        let over = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            let (mut longest, mut gap) = (Duration::ZERO, Duration::ZERO);
            for number in 1.. {
                let begun = Instant::now();
                let is_answered = ask(number).is_some();
                thread::sleep(Duration::from_millis(10));
                gap += begun.elapsed().min(ROUND_MAX);
                longest = longest.max(gap);
                if is_answered {
                    gap = Duration::ZERO;
                }
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
            longest
        });
        Probe { is_over, thread }
    }

    pub fn end(self) -> Duration {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
