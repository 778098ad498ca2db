//! A balancer with a UDP door, backends that answer as told, and the users who ask them.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lb::boot::DataPlane;
use lb::cluster::{Backend as Registered, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::metrics::WorkerCounters;
use lb::proxy::line::Features;
use lb::worker::link::Order;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};

use crate::wait::{PATIENCE, wait_for};

/// How long to wait for a reply that must not come.
pub const SILENCE: Duration = Duration::from_millis(400);

pub struct Balancer {
    pub plane: DataPlane,
}

impl Balancer {
    pub fn start(change: impl FnOnce(&mut Config)) -> Balancer {
        let mut config = Config { workers: Some(2), ..Config::default() };
        config.listen.tcp = None;
        config.listen.udp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.api = None;
        change(&mut config);
        let features = Features { receive_cap: true, splice: true };
        Balancer { plane: DataPlane::start(&config, 1000, features).unwrap() }
    }

    /// Publishes these backends, numbered from 1, and waits until every worker has seen them.
    pub fn register(&mut self, backends: &[(Protocol, SocketAddr)]) {
        let all = backends.iter().enumerate().map(|(place, (protocol, address))| Registered {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            service: ServiceId::built_in(*protocol),
            address: *address,
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        });
        let all: Vec<_> = all.collect();
        let snapshots = &self.plane.snapshots;
        snapshots.publish(snapshots.current().with(&all));
        self.let_workers_turn();
    }

    pub fn register_udp(&mut self, addresses: &[SocketAddr]) {
        let all: Vec<_> = addresses.iter().map(|address| (Protocol::Udp, *address)).collect();
        self.register(&all);
    }

    /// Waits until every worker has begun and ended a turn, and so has seen all that was published
    /// or ordered before.
    pub fn let_workers_turn(&self) {
        for end in &self.plane.ends {
            let before = end.metrics.counters.turns.get();
            wait_for("the worker to turn", || {
                end.wake.write(1).unwrap();
                (end.metrics.counters.turns.get() >= before + 2).then_some(())
            });
        }
    }

    pub fn at(&self) -> SocketAddr {
        self.plane.door(Protocol::Udp).unwrap()
    }

    pub fn sum(&self, value: impl Fn(&WorkerCounters) -> u64) -> u64 {
        self.plane.ends.iter().map(|end| value(&end.metrics.counters)).sum()
    }

    pub fn order(&mut self, order: Order) {
        self.plane.ends.iter_mut().for_each(|end| end.orders.push(order).unwrap());
        self.let_workers_turn();
    }

    pub fn stop(mut self) {
        for end in &mut self.plane.ends {
            end.orders.push(Order::Stop).unwrap();
            end.wake.write(1).unwrap();
        }
        self.plane.threads.join();
    }
}

/// A backend that answers every datagram, from one socket, until it is dropped.
pub struct Backend {
    pub at: SocketAddr,
    pub seen: Arc<AtomicU64>,
    /// The sender of the last datagram: a socket of the balancer.
    last: Arc<Mutex<Option<SocketAddr>>>,
    socket: UdpSocket,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// `answer` says what to send back for a datagram.
    pub fn start(bind: &str, answer: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Backend {
        Backend::start_seeing(bind, move |datagram, _| answer(datagram))
    }

    /// The same; `answer` is also told who sent the datagram.
    pub fn start_seeing(
        bind: &str,
        answer: impl Fn(&[u8], SocketAddr) -> Vec<Vec<u8>> + Send + 'static,
    ) -> Backend {
        let socket = UdpSocket::bind(bind).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let at = socket.local_addr().unwrap();
        let (seen, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let last = Arc::<std::sync::Mutex<Option<SocketAddr>>>::default();
        hold_more(&socket);
        let copy = socket.try_clone().unwrap();
        let shared = (Arc::clone(&seen), Arc::clone(&stop), Arc::clone(&last));
        let thread = thread::spawn(move || {
            let (seen, stop, last) = shared;
            let mut buf = vec![0; 70_000];
            while !stop.load(Ordering::Relaxed) {
                let Ok((len, from)) = socket.recv_from(&mut buf) else { continue };
                seen.fetch_add(1, Ordering::Relaxed);
                *last.lock().unwrap() = Some(from);
                for reply in answer(&buf[..len], from) {
                    socket.send_to(&reply, from).unwrap();
                }
            }
        });
        Backend { at, seen, last, socket: copy, stop, thread: Some(thread) }
    }

    pub fn echo() -> Backend {
        Backend::start("127.0.0.1:0", |datagram| vec![datagram.to_vec()])
    }

    /// Answers with its name.
    pub fn named(name: &'static str) -> Backend {
        Backend::start("127.0.0.1:0", move |_| vec![name.as_bytes().to_vec()])
    }

    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// Sends something without being asked, or late.
    pub fn answer(&self, what: &[u8], to: SocketAddr) {
        self.socket.send_to(what, to).unwrap();
    }

    pub fn last_sender(&self) -> SocketAddr {
        self.last.lock().unwrap().unwrap()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes the receive queue large enough for whole bursts, where that is permitted.
pub fn hold_more(socket: &UdpSocket) {
    let _ = setsockopt(socket, sockopt::RcvBufForce, &(8 << 20));
}

pub fn user() -> UdpSocket {
    user_at("127.0.0.1:0")
}

pub fn user_at(bind: &str) -> UdpSocket {
    let user = UdpSocket::bind(bind).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

pub fn receive(user: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    let mut buf = vec![0; 70_000];
    let (len, from) = user.recv_from(&mut buf)?;
    buf.truncate(len);
    Ok((buf, from))
}

pub fn ask(user: &UdpSocket, at: SocketAddr, what: &[u8]) -> Vec<u8> {
    user.send_to(what, at).unwrap();
    let (answer, from) = receive(user).unwrap();
    assert_eq!(from, at, "the answer comes from where the question went");
    answer
}

/// The answer; `None` if none comes.
pub fn try_ask(user: &UdpSocket, at: SocketAddr, what: &[u8]) -> Option<Vec<u8>> {
    user.set_read_timeout(Some(SILENCE)).unwrap();
    user.send_to(what, at).unwrap();
    match receive(user) {
        Ok((answer, _)) => Some(answer),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            None
        }
    }
}

/// Fifty-one datagrams, fifty of 1000 bytes and one of ten, sent in one call for the kernel to cut
/// up (GSO); each is filled with its number.
pub fn send_segments(user: &UdpSocket, at: SocketAddr) {
    let payload: Vec<u8> = (0..50 * 1000 + 10).map(|number: u32| (number / 1000) as u8).collect();
    let to = SockaddrStorage::from(at);
    let segment = [ControlMessage::UdpGsoSegments(&1000)];
    let pieces = [io::IoSlice::new(&payload)];
    sendmsg(user.as_raw_fd(), &pieces, &segment, MsgFlags::empty(), Some(&to)).unwrap();
}

/// Receives what [`send_segments`] sent.
pub fn expect_segments(user: &UdpSocket) {
    for number in 0..50 {
        assert_eq!(receive(user).unwrap().0, [number; 1000]);
    }
    assert_eq!(receive(user).unwrap().0, [50; 10]);
}
