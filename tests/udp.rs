//! UDP users against the real kernel: workers and sockets of this process, the control core played by
//! the test. Those that need interfaces of their own need root, and run only when asked for:
//! `cargo test --test udp -- --ignored`.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lb::boot::DataPlane;
use lb::cluster::{Backend as Registered, BackendId, Protocol, ServiceId, Standing};
use lb::config::{Config, OnUdpLoss};
use lb::metrics::WorkerCounters;
use lb::proxy::line::Features;
use lb::worker::link::Order;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use socket2::{Domain, Socket, Type};
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;

#[path = "common/wait.rs"]
mod wait;

use wait::{PATIENCE, wait_for};

/// How long a reply that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(400);

struct Balancer {
    plane: DataPlane,
}

impl Balancer {
    fn start(change: impl FnOnce(&mut Config)) -> Balancer {
        let mut config = Config { workers: Some(2), ..Config::default() };
        config.listen.tcp = None;
        config.listen.udp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.api = None;
        change(&mut config);
        let features = Features { receive_cap: true, splice: true };
        Balancer { plane: DataPlane::start(&config, 1000, features).unwrap() }
    }

    /// Shows the workers these backends, numbered from 1, and waits until all of them have looked.
    fn register(&mut self, backends: &[(Protocol, SocketAddr)]) {
        let all = backends.iter().enumerate().map(|(place, (protocol, address))| Registered {
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            service: ServiceId::built_in(*protocol),
            address: *address,
            weight: 1,
            name: None,
            standing: Standing::Serving,
        });
        let all: Vec<_> = all.collect();
        let snapshots = &self.plane.snapshots;
        snapshots.publish(snapshots.current().with(&all));
        self.let_them_look();
    }

    fn register_udp(&mut self, addresses: &[SocketAddr]) {
        let all: Vec<_> = addresses.iter().map(|address| (Protocol::Udp, *address)).collect();
        self.register(&all);
    }

    /// Every worker begins a turn after what was published or ordered, and ends it.
    fn let_them_look(&self) {
        for end in &self.plane.ends {
            let before = end.metrics.counters.turns.get();
            wait_for("the worker to turn", || {
                end.wake.write(1).unwrap();
                (end.metrics.counters.turns.get() >= before + 2).then_some(())
            });
        }
    }

    fn at(&self) -> SocketAddr {
        self.plane.udp.unwrap()
    }

    fn sum(&self, value: impl Fn(&WorkerCounters) -> u64) -> u64 {
        self.plane.ends.iter().map(|end| value(&end.metrics.counters)).sum()
    }

    fn order(&mut self, order: Order) {
        self.plane.ends.iter_mut().for_each(|end| end.orders.push(order).unwrap());
        self.let_them_look();
    }

    fn stop(mut self) {
        for end in &mut self.plane.ends {
            end.orders.push(Order::Stop).unwrap();
            end.wake.write(1).unwrap();
        }
        self.plane.threads.join();
    }
}

/// Answers every datagram, from one socket, until it is dropped.
struct Backend {
    at: SocketAddr,
    seen: Arc<AtomicU64>,
    /// Who sent the last datagram: a socket of the balancer.
    last: Arc<std::sync::Mutex<Option<SocketAddr>>>,
    socket: UdpSocket,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// `answer` says what to send back for a datagram.
    fn start(bind: &str, answer: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Backend {
        Backend::start_seeing(bind, move |datagram, _| answer(datagram))
    }

    /// The same, and `answer` is told who asks.
    fn start_seeing(
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

    fn echo() -> Backend {
        Backend::start("127.0.0.1:0", |datagram| vec![datagram.to_vec()])
    }

    /// Says its name.
    fn named(name: &'static str) -> Backend {
        Backend::start("127.0.0.1:0", move |_| vec![name.as_bytes().to_vec()])
    }

    fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// Says something unasked, or late.
    fn answer(&self, what: &[u8], to: SocketAddr) {
        self.socket.send_to(what, to).unwrap();
    }

    fn last_sender(&self) -> SocketAddr {
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

/// Makes room for whole bursts, where that is allowed.
fn hold_more(socket: &UdpSocket) {
    let _ = setsockopt(socket, sockopt::RcvBufForce, &(8 << 20));
}

fn user() -> UdpSocket {
    user_at("127.0.0.1:0")
}

fn user_at(bind: &str) -> UdpSocket {
    let user = UdpSocket::bind(bind).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

fn receive(user: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    let mut buf = vec![0; 70_000];
    let (len, from) = user.recv_from(&mut buf)?;
    buf.truncate(len);
    Ok((buf, from))
}

fn ask(user: &UdpSocket, at: SocketAddr, what: &[u8]) -> Vec<u8> {
    user.send_to(what, at).unwrap();
    let (answer, from) = receive(user).unwrap();
    assert_eq!(from, at, "the answer comes from where the question went");
    answer
}

/// The answer, or `None` when there is silence.
fn try_ask(user: &UdpSocket, at: SocketAddr, what: &[u8]) -> Option<Vec<u8>> {
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

#[test]
fn sessions_are_dealt_out_in_turn_and_stay_where_they_are() {
    let backends = [Backend::named("one"), Backend::named("two"), Backend::named("three")];
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&backends.each_ref().map(|backend| backend.at));
    let users: Vec<UdpSocket> = (0..30).map(|_| user()).collect();
    let mut count = HashMap::new();
    let first: Vec<Vec<u8>> = users.iter().map(|user| ask(user, balancer.at(), b"?")).collect();
    first.iter().for_each(|name| *count.entry(name.clone()).or_insert(0) += 1);
    assert_eq!(count.values().copied().collect::<Vec<_>>(), [10, 10, 10], "{count:?}");
    let newcomer = Backend::named("four");
    let mut addresses = backends.each_ref().map(|backend| backend.at).to_vec();
    addresses.push(newcomer.at);
    balancer.register_udp(&addresses);
    for (user, name) in users.iter().zip(&first) {
        assert_eq!(ask(user, balancer.at(), b"again"), *name);
    }
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 30);
    assert_eq!(balancer.sum(|counters| counters.udp_datagrams_up.get()), 60);
    assert_eq!(balancer.sum(|counters| counters.udp_datagrams_down.get()), 60);
    balancer.stop();
}

#[test]
fn datagrams_of_every_size_pass_unchanged() {
    for (gro, bind) in [(true, "127.0.0.1:0"), (false, "[::]:0")] {
        let backend = Backend::echo();
        let mut balancer = Balancer::start(|config| {
            config.udp.gro = gro;
            config.listen.udp = Some(bind.parse().unwrap());
        });
        balancer.register_udp(&[backend.at]);
        let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), balancer.at().port());
        let user = user();
        for len in [0, 1, 2, 64, 511, 1200, 1472, 1473, 4096, 9000, 32_768, 65_506, 65_507, 0, 0, 7]
        {
            let sent: Vec<u8> = (0..len).map(|number| (number % 253) as u8).collect();
            assert!(ask(&user, at, &sent) == sent, "{len} bytes, {bind}");
        }
        assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 1);
        balancer.stop();
    }
}

#[test]
fn users_and_backends_of_both_families_meet() {
    let backends = [Backend::echo(), Backend::start("[::1]:0", |what| vec![what.to_vec()])];
    let mut balancer =
        Balancer::start(|config| config.listen.udp = Some("[::]:0".parse().unwrap()));
    balancer.register_udp(&backends.each_ref().map(|backend| backend.at));
    let port = balancer.at().port();
    for round in 0..4u8 {
        for (bind, to) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1")] {
            let at = SocketAddr::new(to.parse().unwrap(), port);
            assert_eq!(ask(&user_at(bind), at, &[round]), [round], "{to}");
        }
    }
    assert_eq!(backends.each_ref().map(Backend::seen), [4, 4]);
    balancer.stop();
}

#[test]
fn replies_come_from_the_address_that_the_user_spoke_to() {
    for bind in ["0.0.0.0:0", "[::]:0"] {
        let backend = Backend::echo();
        let mut balancer =
            Balancer::start(|config| config.listen.udp = Some(bind.parse().unwrap()));
        balancer.register_udp(&[backend.at]);
        let user = user();
        for _ in 0..3 {
            for ip in ["127.0.0.1", "127.0.0.2", "127.8.9.10"] {
                let at = SocketAddr::new(ip.parse().unwrap(), balancer.at().port());
                assert_eq!(ask(&user, at, ip.as_bytes()), ip.as_bytes());
            }
        }
        assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 3, "one for each");
        balancer.stop();
    }
}

#[test]
fn a_session_whose_backend_dies_moves_and_loses_at_most_one_datagram() {
    let mut backends = vec![Backend::named("one"), Backend::named("two"), Backend::named("three")];
    let mut balancer = Balancer::start(|_| {});
    let addresses: Vec<SocketAddr> = backends.iter().map(|backend| backend.at).collect();
    balancer.register_udp(&addresses);
    let users: Vec<UdpSocket> = (0..60).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    // Only the kernel says that it is gone: the registration stands.
    drop(backends.remove(1));
    let mut lost = 0;
    for user in &users {
        let answers: Vec<Option<Vec<u8>>> =
            (0..3).map(|_| try_ask(user, balancer.at(), b"still there?")).collect();
        let silent = answers.iter().filter(|answer| answer.is_none()).count();
        assert!(silent <= 1, "{answers:?}");
        assert!(!answers.contains(&Some(b"two".to_vec())));
        lost += silent;
    }
    assert!((1..=20).contains(&lost), "{lost} datagrams were lost of twenty sessions that moved");
    assert_eq!(balancer.sum(|counters| counters.udp_sessions_moved.get()), 20);
    assert!(balancer.sum(|counters| counters.udp_refused.get()) >= 1);
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 60);
    balancer.stop();
}

#[test]
fn a_session_whose_backend_leaves_moves_without_loss() {
    let backends = [Backend::named("one"), Backend::named("two")];
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&backends.each_ref().map(|backend| backend.at));
    let users: Vec<UdpSocket> = (0..20).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    balancer.register_udp(&[backends[0].at]);
    for user in &users {
        assert_eq!(ask(user, balancer.at(), b"?"), b"one");
    }
    balancer.stop();
}

#[test]
fn a_session_ends_or_stays_with_its_backend_when_that_is_wanted() {
    for (rule, moved, ended) in [(OnUdpLoss::Drop, 0, 1), (OnUdpLoss::Keep, 0, 0)] {
        let backends = [Backend::named("one"), Backend::named("two")];
        let mut balancer = Balancer::start(|config| config.udp.on_backend_loss = rule);
        balancer.register_udp(&[backends[0].at]);
        let user = user();
        assert_eq!(ask(&user, balancer.at(), b"?"), b"one");
        balancer.register_udp(&[backends[1].at]);
        let now_at = if rule == OnUdpLoss::Keep { b"one" } else { b"two" };
        assert_eq!(ask(&user, balancer.at(), b"?"), now_at, "{rule:?}");
        let counted = (
            balancer.sum(|counters| counters.udp_sessions_moved.get()),
            balancer.sum(|counters| counters.sessions_ended.get()),
        );
        assert_eq!(counted, (moved, ended), "{rule:?}");
        balancer.stop();
    }
}

#[test]
fn what_others_send_to_an_upstream_socket_reaches_nobody() {
    let backend = Backend::echo();
    let other = Backend::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[backend.at, other.at]);
    let user = user();
    ask(&user, balancer.at(), b"?");
    let spoken = if backend.seen() > 0 { &backend } else { &other };
    let upstream = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), spoken.last_sender().port());
    let foreign = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..10 {
        foreign.send_to(b"believe me", upstream).unwrap();
    }
    wait_for("the strangers to be counted", || {
        let dropped = balancer.sum(|counters| counters.udp_dropped_spoofed_reply.get());
        (dropped == 10).then_some(())
    });
    assert_eq!(ask(&user, balancer.at(), b"only this"), b"only this");
    balancer.stop();
}

#[test]
fn a_flood_of_new_users_takes_nothing_from_those_who_are_there_or_from_tcp() {
    let backend = Backend::echo();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_backend = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut byte = [0];
            while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
        }
    });
    let mut balancer = Balancer::start(|config| {
        config.limits.udp_sessions = 50;
        config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.udp = Some("0.0.0.0:0".parse().unwrap());
    });
    balancer.register(&[(Protocol::Udp, backend.at), (Protocol::Tcp, tcp_backend)]);
    let at = |ip: u32| SocketAddr::new(IpAddr::V4((0x7f00_0001 + ip).into()), balancer.at().port());
    // A source each: one alone would get no more than three quarters of the room.
    let settled: Vec<UdpSocket> = (1..=50)
        .map(|host| {
            let user = UdpSocket::bind((Ipv4Addr::new(127, 0, 1, host), 0)).unwrap();
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            user
        })
        .collect();
    for user in &settled {
        ask(user, at(0), b"?");
    }
    let flooding = user();
    for round in 0..40u8 {
        // Each address of ours makes it another session.
        for ip in 1..50 {
            let _ = flooding.send_to(b"let me in", at(ip));
            let _ = flooding.send_to(&[round; 65_000], at(ip));
        }
        let mut stream = TcpStream::connect(balancer.plane.tcp.unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&[round]).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [round]);
    }
    for user in &settled {
        assert_eq!(ask(user, at(0), b"still"), b"still");
    }
    assert_eq!(backend.seen(), 100, "nobody else came through");
    let for_want_of_room = |counters: &WorkerCounters| {
        counters.udp_dropped_table_full.get()
            + counters.udp_dropped_upstream_exhausted.get()
            + counters.udp_dropped_source_share.get()
    };
    assert!(balancer.sum(for_want_of_room) > 100);
    balancer.stop();
}

#[test]
fn one_source_has_no_more_sessions_than_it_may() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|config| {
        config.workers = Some(1);
        config.udp.source_sessions = NonZeroU32::new(5);
    });
    balancer.register_udp(&[backend.at]);
    let users: Vec<UdpSocket> = (0..8).map(|_| user()).collect();
    let served = users.iter().filter_map(|user| try_ask(user, balancer.at(), b"?")).count();
    assert_eq!(served, 5);
    assert_eq!(ask(&user_at("127.0.0.2:0"), balancer.at(), b"other"), b"other");
    assert_eq!(balancer.sum(|counters| counters.udp_dropped_source_limit.get()), 3);
    balancer.stop();
}

#[test]
fn many_sessions_share_the_sockets_of_the_largest_backend() {
    const ADDRESSES: u32 = 100;
    const USERS: u32 = 40;
    let backends: Vec<Backend> = (0..4).map(|_| Backend::echo()).collect();
    let mut balancer =
        Balancer::start(|config| config.listen.udp = Some("0.0.0.0:0".parse().unwrap()));
    balancer.register_udp(&backends.iter().map(|backend| backend.at).collect::<Vec<_>>());
    let port = balancer.at().port();
    let users: Vec<UdpSocket> = (0..USERS).map(|_| user()).collect();
    for _ in 0..3 {
        for (number, user) in users.iter().enumerate() {
            for ip in 0..ADDRESSES {
                let at = SocketAddr::new(IpAddr::V4((0x7f01_0000 + ip).into()), port);
                let identity = format!("user {number} at {ip}");
                assert_eq!(ask(user, at, identity.as_bytes()), identity.as_bytes());
            }
        }
    }
    let sessions = u64::from(USERS * ADDRESSES);
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), sessions);
    let sockets = balancer.sum(|counters| counters.udp_sockets.get());
    assert!(sockets <= sessions / 4 + 64, "{sockets} sockets for {sessions} sessions");
    assert!(backends.iter().all(|backend| backend.seen() == 3 * sessions / 4));
    balancer.stop();
}

#[test]
fn a_socket_serves_a_session_on_a_backend_for_each_address_that_it_sends_from() {
    const ADDRESSES: u32 = 3;
    const USERS: u16 = 300;
    let backend = Backend::start_seeing("127.0.0.1:0", |datagram, from| {
        vec![[datagram, from.to_string().as_bytes()].concat()]
    });
    let mut balancer = Balancer::start(|config| {
        let ip = |number: u32| IpAddr::V4((0x7f00_0011 + number).into());
        config.udp_local_addresses = (0..ADDRESSES).map(ip).collect();
    });
    balancer.register_udp(&[backend.at]);
    let users: Vec<UdpSocket> = (0..USERS).map(|_| user()).collect();
    let mut senders = HashMap::new();
    for round in 0..3 {
        for (number, user) in (0..USERS).zip(&users) {
            let answer = ask(user, balancer.at(), &number.to_le_bytes());
            assert_eq!(answer[..2], number.to_le_bytes());
            let sender: SocketAddr = String::from_utf8_lossy(&answer[2..]).parse().unwrap();
            match round {
                0 => assert_eq!(senders.insert(sender, number), None, "{sender} is another's"),
                _ => assert_eq!(senders[&sender], number),
            }
        }
    }
    let mut of_address = HashMap::new();
    senders.keys().for_each(|sender| *of_address.entry(sender.ip()).or_insert(0) += 1);
    assert_eq!(of_address.len(), ADDRESSES as usize, "{of_address:?}");
    let sockets = balancer.sum(|counters| counters.udp_sockets.get());
    assert!((100..=100 + 2 * 8).contains(&sockets), "{sockets} sockets for {USERS} sessions");
    // What comes to another address of the host by the right port is nobody's.
    let port = senders.keys().next().unwrap().port();
    user().send_to(b"believe me", ("127.0.0.1", port)).unwrap();
    wait_for("the reply to be counted", || {
        let dropped = balancer.sum(|counters| counters.udp_dropped_unknown_reply.get());
        (dropped == 1).then_some(())
    });
    balancer.stop();
}

#[test]
fn a_backend_that_dies_is_noticed_at_once_by_sockets_with_several_addresses() {
    let mut backends = vec![Backend::named("one"), Backend::named("two")];
    let mut balancer = Balancer::start(|config| {
        config.udp_local_addresses =
            ["127.0.0.17", "127.0.0.18"].map(|it| it.parse().unwrap()).into();
    });
    balancer.register_udp(&[backends[0].at, backends[1].at]);
    let users: Vec<UdpSocket> = (0..20).map(|_| user()).collect();
    users.iter().for_each(|user| drop(ask(user, balancer.at(), b"?")));
    drop(backends.remove(1));
    for user in &users {
        let answers: Vec<_> = (0..3).map(|_| try_ask(user, balancer.at(), b"there?")).collect();
        assert!(answers.iter().filter(|answer| answer.is_none()).count() <= 1, "{answers:?}");
        assert_eq!(answers[2], Some(b"one".to_vec()));
    }
    balancer.stop();
}

#[test]
fn bursts_keep_their_boundaries_and_their_order() {
    for gro in [true, false] {
        let backend = Backend::echo();
        let mut balancer = Balancer::start(|config| config.udp.gro = gro);
        balancer.register_udp(&[backend.at]);
        let users: Vec<UdpSocket> = (0..4).map(|_| user()).collect();
        let mixed = [1, 1, 1, 2, 2, 1, 0, 0, 3, 3, 3, 2, 9, 9, 9, 9, 9, 9, 1, 8];
        let every_third: Vec<usize> = (0..150).map(|place| place % 3 / 2 * place).collect();
        // The last are longer than the packets of most networks.
        for lengths in [&[700; 20][..], &[0; 150], &every_third, &mixed, &[1600; 8]] {
            let datagram = |user: usize, number: usize| {
                let mut datagram = vec![number as u8; lengths[number]];
                if let Some(first) = datagram.first_mut() {
                    *first = user as u8;
                }
                datagram
            };
            for (number, user) in users.iter().enumerate() {
                for place in 0..lengths.len() {
                    user.send_to(&datagram(number, place), balancer.at()).unwrap();
                }
            }
            for (number, user) in users.iter().enumerate() {
                for place in 0..lengths.len() {
                    assert_eq!(receive(user).unwrap().0, datagram(number, place), "{gro} {place}");
                }
            }
        }
        balancer.stop();
    }
}

#[test]
fn datagrams_that_come_as_one_are_told_apart_again() {
    for gro in [true, false] {
        let backend = Backend::echo();
        let mut balancer = Balancer::start(|config| config.udp.gro = gro);
        balancer.register_udp(&[backend.at]);
        let user = user();
        let payload: Vec<u8> =
            (0..50 * 1000 + 10).map(|number: u32| (number / 1000) as u8).collect();
        let to = SockaddrStorage::from(balancer.at());
        let segment = [ControlMessage::UdpGsoSegments(&1000)];
        let pieces = [io::IoSlice::new(&payload)];
        sendmsg(user.as_raw_fd(), &pieces, &segment, MsgFlags::empty(), Some(&to)).unwrap();
        for place in 0..50 {
            assert_eq!(receive(&user).unwrap().0, [place; 1000], "{gro}");
        }
        assert_eq!(receive(&user).unwrap().0, [50; 10], "{gro}");
        assert_eq!(balancer.sum(|counters| counters.udp_datagrams_up.get()), 51, "{gro}");
        balancer.stop();
    }
}

#[test]
fn idle_sessions_end_and_answered_ones_when_that_is_wanted() {
    let backend = Backend::start("127.0.0.1:0", |_| vec![b"a".to_vec(), b"b".to_vec()]);
    for responses in [None, NonZeroU32::new(2)] {
        let mut balancer = Balancer::start(|config| {
            config.udp.responses = responses;
            let idle = if responses.is_some() { 3_600_000 } else { 300 };
            config.timeouts.udp_idle = Duration::from_millis(idle);
        });
        balancer.register_udp(&[backend.at]);
        let user = user();
        assert_eq!(ask(&user, balancer.at(), b"?"), b"a");
        assert_eq!(receive(&user).unwrap().0, b"b");
        wait_for("the session to end and its socket to rest", || {
            let over = balancer.sum(|counters| counters.sessions_ended.get()) == 1;
            let resting = balancer.sum(|counters| counters.udp_pairs_resting.get()) == 1;
            (over && resting).then_some(())
        });
        assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 0);
        balancer.stop();
    }
}

#[test]
fn a_balancer_that_drains_serves_those_who_are_there() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[backend.at]);
    let (before, after) = (user(), user());
    ask(&before, balancer.at(), b"?");
    balancer.order(Order::Drain);
    assert_eq!(try_ask(&after, balancer.at(), b"may I?"), None);
    assert_eq!(ask(&before, balancer.at(), b"still"), b"still");
    assert_eq!(balancer.sum(|counters| counters.udp_dropped_draining.get()), 1);
    balancer.stop();
}

#[test]
fn a_balancer_that_drains_waits_for_those_who_speak_and_not_for_those_who_are_silent() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[backend.at]);
    let (speaking, silent): (UdpSocket, Vec<UdpSocket>) =
        (user(), (0..50).map(|_| user()).collect());
    for user in silent.iter().chain([&speaking]) {
        ask(user, balancer.at(), b"?");
    }
    let drained = Instant::now();
    balancer.order(Order::Drain);
    let active = || balancer.sum(|counters| counters.sessions_active.get());
    wait_for("one session to be left", || {
        assert_eq!(ask(&speaking, balancer.at(), b"still"), b"still");
        (active() == 1).then_some(())
    });
    assert!(drained.elapsed() < Duration::from_secs(10), "much less than udp_idle_ms");
    wait_for("no session to run", || (active() == 0).then_some(()));
    balancer.stop();
}

/// Sockets that stand in a line with the workers' at the door, so that the kernel deals out anew which
/// flow goes to which of them.
fn strangers_at(door: SocketAddr, count: usize) -> Vec<UdpSocket> {
    let stranger = || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&door.into()).unwrap();
        socket.into()
    };
    (0..count).map(|_| stranger()).collect()
}

/// The answer to what was just sent, unless a stranger was handed the question.
fn answer_unless_astray(
    user: &UdpSocket,
    strangers: &[UdpSocket],
) -> Option<(Vec<u8>, SocketAddr)> {
    user.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let answer = wait_for("the reply, or nobody", || {
        let astray = strangers.iter().any(|stranger| stranger.recv(&mut [0; 8]).is_ok());
        if astray { Some(None) } else { receive(user).ok().map(Some) }
    });
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    answer
}

#[test]
fn flows_keep_their_session_when_the_kernel_hands_them_to_other_workers() {
    const USERS: usize = 300;
    // Says who was asked, and by which socket of the balancer: what a backend knows a user by.
    let backend = || {
        Backend::start_seeing("127.0.0.1:0", |datagram, from| {
            vec![[datagram, format!(" from {}", from.port()).as_bytes()].concat()]
        })
    };
    let backends: Vec<Backend> = (0..4).map(|_| backend()).collect();
    // Three is no power of two.
    let mut balancer = Balancer::start(|config| config.workers = Some(3));
    balancer.register_udp(&backends.iter().map(|backend| backend.at).collect::<Vec<_>>());
    let users: Vec<UdpSocket> = (0..USERS).map(|_| user()).collect();
    let ask_as = |number: usize| ask(&users[number], balancer.at(), &number.to_le_bytes());
    let known: Vec<Vec<u8>> = (0..USERS).map(ask_as).collect();
    let passed = || balancer.sum(|counters| counters.udp_datagrams_passed.get());
    let busy =
        balancer.plane.ends.iter().filter(|end| end.metrics.counters.sessions_active.get() > 0);
    assert_eq!(busy.count(), 3, "every worker has users");
    for _ in 0..3 {
        assert!((0..USERS).all(|number| ask_as(number) == known[number]));
    }
    assert_eq!(passed(), 0, "in a group that stays, each worker is handed its own");
    for count in [1, 2, 4] {
        let (before, mut astray) = (passed(), 0);
        let strangers = strangers_at(balancer.at(), count);
        for (number, user) in users.iter().enumerate() {
            user.send_to(&number.to_le_bytes(), balancer.at()).unwrap();
            match answer_unless_astray(user, &strangers) {
                Some(answer) => assert_eq!(answer, (known[number].clone(), balancer.at())),
                None => astray += 1,
            }
        }
        assert!(astray > 0 && astray < USERS, "{astray} flows went to {count} strangers");
        assert!(passed() > before, "with {count} strangers no flow changed workers");
        drop(strangers);
        assert!((0..USERS).all(|number| ask_as(number) == known[number]));
    }
    let started = balancer.sum(|counters| counters.sessions_started.get());
    let active = balancer.sum(|counters| counters.sessions_active.get());
    assert_eq!((started, active), (USERS as u64, USERS as u64), "nobody began a second session");
    balancer.stop();
}

#[test]
fn datagrams_of_every_size_pass_unchanged_from_one_worker_to_another() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|config| config.workers = Some(3));
    balancer.register_udp(&[backend.at]);
    let users: Vec<UdpSocket> = (0..100).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    let strangers = strangers_at(balancer.at(), 1);
    let passed = || balancer.sum(|counters| counters.udp_datagrams_passed.get());
    // One of the flows that have changed workers.
    let moved = users.iter().find(|user| {
        let before = passed();
        user.send_to(b"?", balancer.at()).unwrap();
        answer_unless_astray(user, &strangers).is_some() && passed() > before
    });
    let moved = moved.expect("among a hundred flows some have changed workers");
    for len in [0, 1, 1472, 1473, 4096, 9000, 32_768, 65_507, 0, 7] {
        let sent: Vec<u8> = (0..len).map(|number| (number % 253) as u8).collect();
        assert!(ask(moved, balancer.at(), &sent) == sent, "{len} bytes");
    }
    let several: Vec<u8> = (0..50 * 1000 + 10).map(|number: u32| (number / 1000) as u8).collect();
    let to = SockaddrStorage::from(balancer.at());
    let segment = [ControlMessage::UdpGsoSegments(&1000)];
    let pieces = [io::IoSlice::new(&several)];
    sendmsg(moved.as_raw_fd(), &pieces, &segment, MsgFlags::empty(), Some(&to)).unwrap();
    for place in 0..50 {
        assert_eq!(receive(moved).unwrap().0, [place; 1000]);
    }
    assert_eq!(receive(moved).unwrap().0, [50; 10]);
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 100);
    balancer.stop();
}

#[test]
fn a_flood_of_empty_datagrams_is_not_taken_one_in_a_turn() {
    const EMPTY: u64 = 200;
    let backend = Backend::start("127.0.0.1:0", |_| vec![]);
    let mut balancer = Balancer::start(|config| config.workers = Some(1));
    balancer.register_udp(&[backend.at]);
    let counters = &balancer.plane.ends[0].metrics.counters;
    let user = user();
    // They come faster than a worker turns; until they do, it keeps up with one a turn.
    wait_for("a burst to be taken in few turns", || {
        let before = (counters.udp_datagrams_up.get(), counters.turns.get());
        for _ in 0..EMPTY {
            user.send_to(&[], balancer.at()).unwrap();
        }
        wait_for("the burst to be taken", || {
            (counters.udp_datagrams_up.get() == before.0 + EMPTY).then_some(())
        });
        let turns = counters.turns.get() - before.1;
        (turns < EMPTY / 2).then_some(())
    });
    balancer.stop();
}

/// Runs in a network of its own, which this thread and those that it starts are in.
fn in_a_network<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    let run = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("only root may");
        ip("link set lo up");
        run()
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// Runs iproute2's `ip` in this thread's network.
fn ip(what: &str) {
    let done = Command::new("ip").args(what.split(' ')).status().unwrap();
    assert!(done.success(), "ip {what}");
}

/// The balancer's side of a cable, and a thread at the other end.
const HERE: &str = "10.9.0.1/24";
const THERE: &str = "10.9.0.2/24";

/// A cable from this network to another one, where users are: they get sockets from there.
fn users_at_a_cable(binds: &[&str]) -> Vec<UdpSocket> {
    ip("link add cable type veth peer name other");
    let (tell, asked) = std::sync::mpsc::channel();
    let (go, ready) = std::sync::mpsc::channel::<()>();
    let (give, sockets) = std::sync::mpsc::channel();
    let binds: Vec<String> = binds.iter().map(|bind| (*bind).to_owned()).collect();
    let there = thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        tell.send(nix::unistd::gettid()).unwrap();
        ready.recv().unwrap();
        bring_up("other", THERE, "2001:db8::2/64", "fe80::2/64");
        let bind = |bind: &String| {
            let socket = wait_for("the address to be there", || UdpSocket::bind(bind).ok());
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.set_broadcast(true).unwrap();
            socket
        };
        give.send(binds.iter().map(bind).collect()).unwrap();
    });
    ip(&format!("link set other netns {}", asked.recv().unwrap()));
    bring_up("cable", HERE, "2001:db8::1/64", "fe80::1/64");
    go.send(()).unwrap();
    let sockets = sockets.recv().unwrap();
    // The network lives as long as its sockets.
    there.join().unwrap();
    sockets
}

fn bring_up(device: &str, v4: &str, v6: &str, link_local: &str) {
    ip(&format!("link set {device} addrgenmode none"));
    ip(&format!("addr add {v4} brd + dev {device}"));
    for address in [v6, link_local] {
        ip(&format!("addr add {address} dev {device} nodad"));
    }
    ip(&format!("link set {device} up"));
}

/// Which address answers what is sent to one of them.
fn who_answers(user: &UdpSocket, to: SocketAddr) -> IpAddr {
    let (answer, from) = wait_for("an answer", || {
        user.send_to(b"who serves?", to).ok()?;
        user.set_read_timeout(Some(SILENCE)).unwrap();
        receive(user).ok()
    });
    assert_eq!((answer, from.port()), (b"who serves?".to_vec(), to.port()));
    from.ip()
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn who_asks_many_hosts_is_answered_from_an_address_that_can_answer() {
    for bind in ["0.0.0.0:0", "[::]:0"] {
        in_a_network(|| {
            // The interfaces have the number 2 or 3; a scope is one of the user's own network.
            let users = users_at_a_cable(&["10.9.0.2:0", "[2001:db8::2]:0", "[::]:0"]);
            let backend = Backend::echo();
            let mut balancer =
                Balancer::start(|config| config.listen.udp = Some(bind.parse().unwrap()));
            balancer.register_udp(&[backend.at]);
            let port = balancer.at().port();
            for to in ["10.9.0.1", "10.9.0.255", "255.255.255.255", "224.0.0.1"] {
                let to: Ipv4Addr = to.parse().unwrap();
                let from = who_answers(&users[0], (to, port).into());
                assert_eq!(from, Ipv4Addr::new(10, 9, 0, 1), "{to} at {bind}");
            }
            if bind == "[::]:0" {
                let scope = nix::net::if_::if_nametoindex("cable").unwrap();
                let all = |scope| {
                    SocketAddr::V6(SocketAddrV6::new("ff02::1".parse().unwrap(), port, 0, scope))
                };
                let other = (1..=scope + 2)
                    .find(|scope| users[2].send_to(b"who serves?", all(*scope)).is_ok());
                let from = who_answers(&users[1], all(other.unwrap()));
                assert_eq!(from, "2001:db8::1".parse::<Ipv6Addr>().unwrap());
            }
            balancer.stop();
        });
    }
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn a_link_local_door_answers_users_of_every_scope() {
    in_a_network(|| {
        let users = users_at_a_cable(&["[2001:db8::2]:0", "[::]:0"]);
        let backend = Backend::echo();
        let mut balancer =
            Balancer::start(|config| config.listen.udp = Some("[::]:0".parse().unwrap()));
        balancer.register_udp(&[backend.at]);
        let port = balancer.at().port();
        let door =
            |scope| SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), port, 0, scope));
        let scope = (1..9).find(|scope| users[1].send_to(b"who serves?", door(*scope)).is_ok());
        for user in &users {
            let from = who_answers(user, door(scope.unwrap()));
            assert_eq!(from, door(0).ip());
        }
        let global: SocketAddr = format!("[2001:db8::1]:{port}").parse().unwrap();
        assert_eq!(who_answers(&users[0], global), global.ip());
        balancer.stop();
    });
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn addresses_that_are_only_routed_here_and_those_that_went_away_are_answered() {
    in_a_network(|| {
        ip("route add local 192.0.2.0/24 dev lo");
        ip("-6 route add local 2001:db8:1::/64 dev lo");
        ip("addr add 10.9.0.1/32 dev lo");
        ip("addr add 10.9.0.2/32 dev lo");
        let backend = Backend::echo();
        let mut balancer =
            Balancer::start(|config| config.listen.udp = Some("[::]:0".parse().unwrap()));
        balancer.register_udp(&[backend.at]);
        let port = balancer.at().port();
        for (bind, to) in [("127.0.0.1:0", "192.0.2.77"), ("[::1]:0", "2001:db8:1::77")] {
            let at = SocketAddr::new(to.parse().unwrap(), port);
            assert_eq!(ask(&user_at(bind), at, to.as_bytes()), to.as_bytes());
        }
        // A reply that comes late, when the address has gone.
        let (gone, user) = (Backend::start("127.0.0.1:0", |_| vec![]), user_at("10.9.0.2:0"));
        balancer.register_udp(&[gone.at]);
        user.send_to(b"?", ("10.9.0.1", port)).unwrap();
        wait_for("the datagram to arrive", || (gone.seen() == 1).then_some(()));
        let upstream = gone.last_sender();
        ip("addr del 10.9.0.1/32 dev lo");
        gone.answer(b"late", upstream);
        assert_eq!(receive(&user).unwrap().0, b"late");
        assert_eq!(balancer.sum(|counters| counters.udp_dropped_send_failed.get()), 0);
        balancer.stop();
    });
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn bursts_keep_their_order_where_the_route_is_narrower_than_their_datagrams() {
    // What the kernel refuses to cut up: the route's own size and more.
    let lengths = [13, 100, 1_200, 1_452, 1_472, 1_473, 3_000, 9_000];
    for (bind, mtu) in [("127.0.0.1:0", 1500), ("[::1]:0", 1500), ("127.0.0.1:0", 600)] {
        in_a_network(|| {
            ip(&format!("link set lo mtu {mtu}"));
            let backend = Backend::start(bind, |datagram| vec![datagram.to_vec()]);
            let mut balancer =
                Balancer::start(|config| config.listen.udp = Some(bind.parse().unwrap()));
            balancer.register_udp(&[backend.at]);
            let user = user_at(bind);
            hold_more(&user);
            let mut random = 1_u32;
            let mut next = |bound: usize| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 8) as usize % bound
            };
            for _ in 0..150 {
                let base = lengths[next(lengths.len())];
                let burst: Vec<Vec<u8>> = (0..[2, 5, 12][next(3)])
                    .map(|number| {
                        let length = if next(5) > 0 { base } else { 1 + next(9_000) };
                        vec![number; length]
                    })
                    .collect();
                for datagram in &burst {
                    user.send_to(datagram, balancer.at()).unwrap();
                }
                for (number, datagram) in burst.iter().enumerate() {
                    let came = receive(&user).unwrap().0;
                    let lengths: Vec<usize> = burst.iter().map(Vec::len).collect();
                    assert!(came == *datagram, "{number} of {lengths:?} over {mtu}");
                }
            }
            balancer.stop();
        });
    }
}
