//! UDP users against the real kernel: workers and sockets of this process, the control core played by
//! the test.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lb::boot::DataPlane;
use lb::cluster::{Backend, BackendId, Protocol, Snapshot, Standing};
use lb::config::{Config, OnUdpLoss};
use lb::metrics::WorkerCounters;
use lb::proxy::tcp::Features;
use lb::worker::link::Order;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use socket2::{Domain, Socket, Type};
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;

const PATIENCE: Duration = Duration::from_secs(30);
/// How long a reply that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(100);

struct Balancer {
    plane: DataPlane,
    version: u64,
}

impl Balancer {
    fn start(change: impl FnOnce(&mut Config)) -> Balancer {
        let mut config = Config { workers: Some(2), ..Config::default() };
        config.listen.tcp = None;
        config.listen.udp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.api = None;
        change(&mut config);
        let features = Features { receive_cap: true, splice: true };
        Balancer { plane: DataPlane::start(&config, 1000, features).unwrap(), version: 0 }
    }

    /// Shows the workers these backends, numbered from 1, and waits until all of them have looked.
    fn register(&mut self, backends: &[(Protocol, SocketAddr)]) {
        self.version += 1;
        let all = backends.iter().enumerate().map(|(place, (protocol, address))| Backend {
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            protocol: *protocol,
            address: *address,
            weight: 1,
            name: None,
            standing: Standing::Serving,
        });
        let of = |protocol| {
            (0..backends.len() as u16)
                .filter(move |place: &u16| backends[usize::from(*place)].0 == protocol)
        };
        let rotations = Protocol::ALL.map(|protocol| of(protocol).collect());
        let version = self.version;
        self.plane.snapshots.publish(Snapshot { version, backends: all.collect(), rotations });
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
            eventually(|| {
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

fn eventually<T>(mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < end, "it never became so");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Answers every datagram, from one socket, until it is dropped.
struct Service {
    at: SocketAddr,
    seen: Arc<AtomicU64>,
    /// Who sent the last datagram: a socket of the balancer.
    last: Arc<std::sync::Mutex<Option<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// `answer` says what to send back for a datagram.
    fn start(bind: &str, answer: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Service {
        Service::start_seeing(bind, move |datagram, _| answer(datagram))
    }

    /// The same, and `answer` is told who asks.
    fn start_seeing(
        bind: &str,
        answer: impl Fn(&[u8], SocketAddr) -> Vec<Vec<u8>> + Send + 'static,
    ) -> Service {
        let socket = UdpSocket::bind(bind).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let at = socket.local_addr().unwrap();
        let (seen, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let last = Arc::<std::sync::Mutex<Option<SocketAddr>>>::default();
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
        Service { at, seen, last, stop, thread: Some(thread) }
    }

    fn echo() -> Service {
        Service::start("127.0.0.1:0", |datagram| vec![datagram.to_vec()])
    }

    /// Says its name.
    fn named(name: &'static str) -> Service {
        Service::start("127.0.0.1:0", move |_| vec![name.as_bytes().to_vec()])
    }

    fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    fn last_sender(&self) -> SocketAddr {
        self.last.lock().unwrap().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
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
    let services = [Service::named("one"), Service::named("two"), Service::named("three")];
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&services.each_ref().map(|service| service.at));
    let users: Vec<UdpSocket> = (0..30).map(|_| user()).collect();
    let mut count = HashMap::new();
    let first: Vec<Vec<u8>> = users.iter().map(|user| ask(user, balancer.at(), b"?")).collect();
    first.iter().for_each(|name| *count.entry(name.clone()).or_insert(0) += 1);
    assert_eq!(count.values().copied().collect::<Vec<_>>(), [10, 10, 10], "{count:?}");
    let newcomer = Service::named("four");
    let mut addresses = services.each_ref().map(|service| service.at).to_vec();
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
        let service = Service::echo();
        let mut balancer = Balancer::start(|config| {
            config.udp.gro = gro;
            config.listen.udp = Some(bind.parse().unwrap());
        });
        balancer.register_udp(&[service.at]);
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
    let services = [Service::echo(), Service::start("[::1]:0", |what| vec![what.to_vec()])];
    let mut balancer =
        Balancer::start(|config| config.listen.udp = Some("[::]:0".parse().unwrap()));
    balancer.register_udp(&services.each_ref().map(|service| service.at));
    let port = balancer.at().port();
    for round in 0..4u8 {
        for (bind, to) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1")] {
            let at = SocketAddr::new(to.parse().unwrap(), port);
            assert_eq!(ask(&user_at(bind), at, &[round]), [round], "{to}");
        }
    }
    assert_eq!(services.each_ref().map(Service::seen), [4, 4]);
    balancer.stop();
}

#[test]
fn replies_come_from_the_address_that_the_user_spoke_to() {
    for bind in ["0.0.0.0:0", "[::]:0"] {
        let service = Service::echo();
        let mut balancer =
            Balancer::start(|config| config.listen.udp = Some(bind.parse().unwrap()));
        balancer.register_udp(&[service.at]);
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
    let mut services = vec![Service::named("one"), Service::named("two"), Service::named("three")];
    let mut balancer = Balancer::start(|_| {});
    let addresses: Vec<SocketAddr> = services.iter().map(|service| service.at).collect();
    balancer.register_udp(&addresses);
    let users: Vec<UdpSocket> = (0..60).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    // Only the kernel says that it is gone: the registration stands.
    drop(services.remove(1));
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
    let services = [Service::named("one"), Service::named("two")];
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&services.each_ref().map(|service| service.at));
    let users: Vec<UdpSocket> = (0..20).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    balancer.register_udp(&[services[0].at]);
    for user in &users {
        assert_eq!(ask(user, balancer.at(), b"?"), b"one");
    }
    balancer.stop();
}

#[test]
fn a_session_ends_or_stays_with_its_backend_when_that_is_wanted() {
    for (rule, moved, ended) in [(OnUdpLoss::Drop, 0, 1), (OnUdpLoss::Keep, 0, 0)] {
        let services = [Service::named("one"), Service::named("two")];
        let mut balancer = Balancer::start(|config| config.udp.on_backend_loss = rule);
        balancer.register_udp(&[services[0].at]);
        let user = user();
        assert_eq!(ask(&user, balancer.at(), b"?"), b"one");
        balancer.register_udp(&[services[1].at]);
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
    let service = Service::echo();
    let other = Service::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[service.at, other.at]);
    let user = user();
    ask(&user, balancer.at(), b"?");
    let spoken = if service.seen() > 0 { &service } else { &other };
    let upstream = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), spoken.last_sender().port());
    let foreign = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..10 {
        foreign.send_to(b"believe me", upstream).unwrap();
    }
    eventually(|| {
        let dropped = balancer.sum(|counters| counters.udp_dropped_spoofed_reply.get());
        (dropped == 10).then_some(())
    });
    assert_eq!(ask(&user, balancer.at(), b"only this"), b"only this");
    balancer.stop();
}

#[test]
fn a_flood_of_new_users_takes_nothing_from_those_who_are_there_or_from_tcp() {
    let service = Service::echo();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_service = listener.local_addr().unwrap();
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
    balancer.register(&[(Protocol::Udp, service.at), (Protocol::Tcp, tcp_service)]);
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
    assert_eq!(service.seen(), 100, "nobody else came through");
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
    let service = Service::echo();
    let mut balancer = Balancer::start(|config| {
        config.workers = Some(1);
        config.udp.source_sessions = NonZeroU32::new(5);
    });
    balancer.register_udp(&[service.at]);
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
    let services: Vec<Service> = (0..4).map(|_| Service::echo()).collect();
    let mut balancer =
        Balancer::start(|config| config.listen.udp = Some("0.0.0.0:0".parse().unwrap()));
    balancer.register_udp(&services.iter().map(|service| service.at).collect::<Vec<_>>());
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
    assert!(services.iter().all(|service| service.seen() == 3 * sessions / 4));
    balancer.stop();
}

#[test]
fn a_socket_serves_a_session_on_a_backend_for_each_address_that_it_sends_from() {
    const ADDRESSES: u32 = 3;
    const USERS: u16 = 300;
    let service = Service::start_seeing("127.0.0.1:0", |datagram, from| {
        vec![[datagram, from.to_string().as_bytes()].concat()]
    });
    let mut balancer = Balancer::start(|config| {
        let ip = |number: u32| IpAddr::V4((0x7f00_0011 + number).into());
        config.udp_local_addresses = (0..ADDRESSES).map(ip).collect();
    });
    balancer.register_udp(&[service.at]);
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
    eventually(|| {
        let dropped = balancer.sum(|counters| counters.udp_dropped_unknown_reply.get());
        (dropped == 1).then_some(())
    });
    balancer.stop();
}

#[test]
fn a_backend_that_dies_is_noticed_at_once_by_sockets_with_several_addresses() {
    let mut services = vec![Service::named("one"), Service::named("two")];
    let mut balancer = Balancer::start(|config| {
        config.udp_local_addresses =
            ["127.0.0.17", "127.0.0.18"].map(|it| it.parse().unwrap()).into();
    });
    balancer.register_udp(&[services[0].at, services[1].at]);
    let users: Vec<UdpSocket> = (0..20).map(|_| user()).collect();
    users.iter().for_each(|user| drop(ask(user, balancer.at(), b"?")));
    drop(services.remove(1));
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
        let service = Service::echo();
        let mut balancer = Balancer::start(|config| config.udp.gro = gro);
        balancer.register_udp(&[service.at]);
        let users: Vec<UdpSocket> = (0..4).map(|_| user()).collect();
        let mixed = [1, 1, 1, 2, 2, 1, 0, 0, 3, 3, 3, 2, 9, 9, 9, 9, 9, 9, 1, 8];
        // The last are longer than the packets of most networks.
        for lengths in [&[700; 20][..], &[0; 20], &mixed, &[1600; 8]] {
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
        let service = Service::echo();
        let mut balancer = Balancer::start(|config| config.udp.gro = gro);
        balancer.register_udp(&[service.at]);
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
    let service = Service::start("127.0.0.1:0", |_| vec![b"a".to_vec(), b"b".to_vec()]);
    for responses in [None, NonZeroU32::new(2)] {
        let mut balancer = Balancer::start(|config| {
            config.udp.responses = responses;
            let idle = if responses.is_some() { 3_600_000 } else { 300 };
            config.timeouts.udp_idle = Duration::from_millis(idle);
        });
        balancer.register_udp(&[service.at]);
        let user = user();
        assert_eq!(ask(&user, balancer.at(), b"?"), b"a");
        assert_eq!(receive(&user).unwrap().0, b"b");
        eventually(|| {
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
    let service = Service::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[service.at]);
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
    let service = Service::echo();
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&[service.at]);
    let (speaking, silent): (UdpSocket, Vec<UdpSocket>) =
        (user(), (0..50).map(|_| user()).collect());
    for user in silent.iter().chain([&speaking]) {
        ask(user, balancer.at(), b"?");
    }
    let drained = Instant::now();
    balancer.order(Order::Drain);
    let active = || balancer.sum(|counters| counters.sessions_active.get());
    eventually(|| {
        assert_eq!(ask(&speaking, balancer.at(), b"still"), b"still");
        (active() == 1).then_some(())
    });
    assert!(drained.elapsed() < Duration::from_secs(10), "much less than udp_idle_ms");
    eventually(|| (active() == 0).then_some(()));
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
    let answer = eventually(|| {
        let astray = strangers.iter().any(|stranger| stranger.recv(&mut [0; 8]).is_ok());
        if astray { Some(None) } else { receive(user).ok().map(Some) }
    });
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    answer
}

#[test]
fn flows_keep_their_session_when_the_kernel_hands_them_to_other_workers() {
    const USERS: usize = 300;
    // Says who was asked, and by which socket of the balancer: what a service knows a user by.
    let service = || {
        Service::start_seeing("127.0.0.1:0", |datagram, from| {
            vec![[datagram, format!(" from {}", from.port()).as_bytes()].concat()]
        })
    };
    let services: Vec<Service> = (0..4).map(|_| service()).collect();
    // Three is no power of two.
    let mut balancer = Balancer::start(|config| config.workers = Some(3));
    balancer.register_udp(&services.iter().map(|service| service.at).collect::<Vec<_>>());
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
    let service = Service::echo();
    let mut balancer = Balancer::start(|config| config.workers = Some(3));
    balancer.register_udp(&[service.at]);
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
