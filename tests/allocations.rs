//! A worker takes memory when sessions start, never for a message or a datagram.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lb::boot::DataPlane;
use lb::cluster::route::Host;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::config::services::ServiceConfig;
use lb::proxy::line::Features;
use lb::worker::link::Order;

/// Counts what the watched thread allocates.
struct Counting;

static WATCHED: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// One worker is watched at a time.
static TURN: Mutex<()> = Mutex::new(());

fn note() {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched != 0 && nix::unistd::gettid().as_raw() == watched {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: passes everything on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn worker_thread() -> i32 {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let is_worker = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("lb-worker"))
    };
    let worker = tasks.flatten().find(is_worker).expect("the worker has its name");
    worker.file_name().to_str().unwrap().parse().unwrap()
}

/// What the worker allocates while this runs.
fn allocated(run: impl FnOnce()) -> u64 {
    WATCHED.store(worker_thread(), Ordering::Relaxed);
    run();
    WATCHED.store(0, Ordering::Relaxed);
    ALLOCATIONS.swap(0, Ordering::Relaxed)
}

/// Makes one backend known to the worker.
fn publish(plane: &mut DataPlane, service: ServiceId, address: SocketAddr) {
    let backend = Backend {
        proxy: false,
        http2: false,
        tls: None,
        id: BackendId(1),
        slot: 0,
        service,
        address,
        weight: 1,
        name: None,
        group: None,
        standing: Standing::Serving,
    };
    plane.snapshots.publish(plane.snapshots.current().with(&[backend]));
    plane.ends[0].wake.write(1).unwrap();
}

fn stop(mut plane: DataPlane) {
    plane.ends[0].orders.push(Order::Stop).unwrap();
    plane.ends[0].wake.write(1).unwrap();
    plane.threads.join();
}

fn echo_backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = vec![0; 256 * 1024];
                while let Ok(count @ 1..) = connection.read(&mut bytes) {
                    connection.write_all(&bytes[..count]).unwrap();
                }
            });
        }
    });
    address
}

/// Sends `bytes` over every connection and waits for the echo.
fn round(users: &mut [TcpStream], bytes: &[u8], answer: &mut [u8]) {
    for user in users.iter_mut() {
        user.write_all(bytes).unwrap();
    }
    for user in users.iter_mut() {
        user.read_exact(answer).unwrap();
    }
}

#[test]
fn relaying_a_message_allocates_nothing() {
    let _turn = TURN.lock().unwrap_or_else(|error| error.into_inner());
    for receive_cap in [true, false] {
        let mut config = Config { workers: Some(1), ..Config::default() };
        config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.udp = None;
        config.listen.api = None;
        let mut plane =
            DataPlane::start(&config, 100, Features { receive_cap, splice: receive_cap }).unwrap();
        publish(&mut plane, ServiceId::built_in(Protocol::Tcp), echo_backend());
        let door = plane.door(Protocol::Tcp).unwrap();
        let mut users: Vec<_> = (0..16).map(|_| served(door)).collect();
        let (small, large) = (vec![1; 64], vec![2; 100_000]);
        let mut answer = vec![0; large.len()];
        let mut exchange = |rounds: usize| {
            for _ in 0..rounds {
                round(&mut users, &small, &mut answer[..small.len()]);
            }
            for _ in 0..rounds / 20 {
                round(&mut users[..4], &large, &mut answer);
            }
        };
        exchange(100);
        assert_eq!(allocated(|| exchange(1000)), 0, "in more than 16,000 messages");
        stop(plane);
    }
}

fn served(door: SocketAddr) -> TcpStream {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let mut user = TcpStream::connect(door).unwrap();
        user.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        if user.write_all(b"?").is_ok() && matches!(user.read(&mut [0]), Ok(1)) {
            return user;
        }
        assert!(Instant::now() < end, "no backend served the user");
    }
}

#[test]
fn relaying_a_datagram_allocates_nothing() {
    let _turn = TURN.lock().unwrap_or_else(|error| error.into_inner());
    let mut config = Config { workers: Some(1), ..Config::default() };
    config.listen.tcp = None;
    config.listen.api = None;
    config.listen.udp = Some("0.0.0.0:0".parse().unwrap());
    let mut plane =
        DataPlane::start(&config, 100, Features { receive_cap: true, splice: true }).unwrap();
    let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = backend.local_addr().unwrap();
    thread::spawn(move || {
        let mut bytes = vec![0; 70_000];
        while let Ok((count, from)) = backend.recv_from(&mut bytes) {
            backend.send_to(&bytes[..count], from).unwrap();
        }
    });
    publish(&mut plane, ServiceId::built_in(Protocol::Udp), address);
    let door = plane.door(Protocol::Udp).unwrap();
    let users: Vec<UdpSocket> = (0..16).map(|_| answered(door)).collect();
    let mut answer = vec![0; 70_000];
    let mut exchange = |rounds: usize| {
        for round in 0..rounds {
            // Some alone, some long, some as a burst that leaves together.
            let (bytes, burst) = [(64, 1), (1200, 3), (4000, 1), (0, 2)][round % 4];
            for user in &users {
                (0..burst).for_each(|_| assert_eq!(user.send(&answer[..bytes]).unwrap(), bytes));
            }
            for user in &users {
                (0..burst).for_each(|_| assert_eq!(user.recv(&mut answer).unwrap(), bytes));
            }
        }
    };
    exchange(40);
    assert_eq!(allocated(|| exchange(400)), 0, "in more than 11,000 datagrams");
    stop(plane);
}

/// Answers every request head with the same few bytes.
fn answering_backend() -> SocketAddr {
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\nok";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = vec![0; 4096];
                let mut held = 0;
                while let Ok(count @ 1..) = connection.read(&mut bytes[held..]) {
                    held += count;
                    if bytes[..held].ends_with(b"\r\n\r\n") {
                        held = 0;
                        connection.write_all(ANSWER).unwrap();
                    }
                }
            });
        }
    });
    address
}

/// Asks once, and reads the answer to its last byte; false when no backend gave it.
fn request(user: &mut TcpStream, answer: &mut [u8]) -> bool {
    user.write_all(b"GET /some/path?x=1 HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n").unwrap();
    let mut held = 0;
    while !answer[..held].ends_with(b"\r\n\r\nok") {
        let count = user.read(&mut answer[held..]).unwrap();
        if count == 0 || answer.starts_with(b"HTTP/1.1 503") {
            return false;
        }
        held += count;
    }
    true
}

#[test]
fn an_api_request_allocates_nothing() {
    ask(ServiceId::built_in(Protocol::Api), |_| ());
}

#[test]
fn routing_an_api_request_allocates_nothing() {
    let shop = ServiceConfig {
        hosts: ["x", "*.example"].map(|host| Host::parse(host).unwrap()).into(),
        paths: ["/other", "/some"].map(String::from).into(),
        ..ServiceConfig::new("shop", Protocol::Api)
    };
    ask(ServiceId(3), |config| config.set_services(vec![shop]));
}

#[test]
fn naming_an_api_request_and_leaving_it_to_a_fallback_allocates_nothing() {
    let shop = ServiceConfig {
        hosts: vec![Host::parse("x").unwrap()],
        fallback: Some("page".to_string()),
        ..ServiceConfig::new("shop", Protocol::Api)
    };
    let page = ServiceConfig {
        hosts: vec![Host::parse("page").unwrap()],
        ..ServiceConfig::new("page", Protocol::Api)
    };
    ask(ServiceId(4), |config| {
        config.api.request_id = true;
        config.set_services(vec![shop, page]);
    });
}

/// Asks for a service, which has the only backend.
fn ask(service: ServiceId, change: impl FnOnce(&mut Config)) {
    let _turn = TURN.lock().unwrap_or_else(|error| error.into_inner());
    let mut config = Config { workers: Some(1), ..Config::default() };
    (config.listen.tcp, config.listen.udp) = (None, None);
    config.listen.api = Some("127.0.0.1:0".parse().unwrap());
    config.log.requests_per_second = 1_000_000;
    change(&mut config);
    let mut plane =
        DataPlane::start(&config, 100, Features { receive_cap: true, splice: true }).unwrap();
    publish(&mut plane, service, answering_backend());
    let mut answer = vec![0; 4096];
    let end = Instant::now() + Duration::from_secs(10);
    let mut users: Vec<TcpStream> = Vec::new();
    while users.len() < 16 {
        let mut user = TcpStream::connect(plane.door(Protocol::Api).unwrap()).unwrap();
        user.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        if request(&mut user, &mut answer) {
            users.push(user);
        }
        assert!(Instant::now() < end, "no backend served the user");
    }
    let mut rounds = |count: usize| {
        for _ in 0..count {
            for user in &mut users {
                assert!(request(user, &mut answer));
            }
        }
    };
    rounds(20);
    assert_eq!(allocated(|| rounds(400)), 0, "in 6,400 requests");
    stop(plane);
}

fn answered(door: SocketAddr) -> UdpSocket {
    let user = UdpSocket::bind("127.0.0.1:0").unwrap();
    user.connect(("127.0.0.1", door.port())).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        user.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        user.send(b"?").unwrap();
        if user.recv(&mut [0]).is_ok() {
            user.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            return user;
        }
        assert!(Instant::now() < end, "no backend served the user");
    }
}
