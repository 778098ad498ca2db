//! Readers who take nothing, far more of them than there are relay buffers: everyone else is served
//! all the same. Against the real kernel; the decisions are tested in the simulations.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use lb::boot::DataPlane;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::metrics::WorkerCounters;
use lb::proxy::line::Features;
use lb::session::EndReason;
use lb::worker::link::Order;
use socket2::{Domain, Socket, Type};

#[path = "common/wait.rs"]
mod wait;

use wait::{PATIENCE, wait_for};

/// An eighth of it is for heads under way, and half of the rest is in small blocks.
const BUFFER_BYTES: usize = 2 << 20;
const BLOCKS: u64 = 224;
/// Blocks that the gateway keeps back for heads.
const STOCK: u64 = 32;
/// More than there are blocks.
const STALLED: usize = 300;

struct Balancer {
    plane: DataPlane,
}

impl Balancer {
    fn start(tcp: SocketAddr, api: SocketAddr, features: Features) -> Balancer {
        let mut config = Config { workers: Some(1), ..Config::default() };
        config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.api = Some("127.0.0.1:0".parse().unwrap());
        config.listen.udp = None;
        config.limits.buffer_bytes = BUFFER_BYTES;
        config.api.via = Some("test".to_string());
        let plane = DataPlane::start(&config, 2000, features).unwrap();
        let backend = |place: usize, protocol, address| Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            service: ServiceId::built_in(protocol),
            address,
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        };
        let backends = [backend(0, Protocol::Tcp, tcp), backend(1, Protocol::Api, api)];
        plane.snapshots.publish(plane.snapshots.current().with(&backends));
        plane.ends[0].wake.write(1).unwrap();
        Balancer { plane }
    }

    fn count(&self, value: impl Fn(&WorkerCounters) -> u64) -> u64 {
        value(&self.plane.ends[0].metrics.counters)
    }

    /// A TCP user, who says first what the backend is to do.
    fn user(&self, what: &[u8]) -> TcpStream {
        said(TcpStream::connect(self.plane.door(Protocol::Tcp).unwrap()).unwrap(), what)
    }

    fn api_user(&self, request: &str) -> TcpStream {
        said(
            TcpStream::connect(self.plane.door(Protocol::Api).unwrap()).unwrap(),
            request.as_bytes(),
        )
    }

    /// Ends every session and request.
    fn end_all(&mut self) {
        for backend in [BackendId(1), BackendId(2)] {
            self.order(Order::EndBackend { backend, reason: EndReason::BackendLeft });
        }
    }

    fn order(&mut self, order: Order) {
        self.plane.ends[0].orders.push(order).unwrap();
        self.plane.ends[0].wake.write(1).unwrap();
    }

    fn stop(mut self) {
        self.order(Order::Stop);
        self.plane.threads.join();
    }
}

const GET: &str = "GET /small HTTP/1.1\r\nHost: test\r\n\r\n";
const GET_ALL: &str = "GET /endless HTTP/1.1\r\nHost: test\r\n\r\n";
const UPGRADE: &str =
    "GET /endless HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: flood\r\n\r\n";
const POST: &str = "POST /deaf HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000000000\r\n\r\n";

fn said(mut user: TcpStream, what: &[u8]) -> TcpStream {
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user.set_write_timeout(Some(PATIENCE)).unwrap();
    user.write_all(what).unwrap();
    user
}

/// One who never reads, and whose connection the kernel spends little memory on: with segments as short
/// as these the balancer's send buffer is some 100 KiB, where loopback has 2.5 MiB.
fn stalled(door: SocketAddr, what: &[u8]) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.set_tcp_mss(1000).unwrap();
    socket.connect(&door.into()).unwrap();
    said(socket.into(), what)
}

fn echoes(user: &mut TcpStream) {
    let text = [7; 6000];
    user.write_all(&text).unwrap();
    let mut got = [0; 6000];
    user.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
}

/// The status of an answer with a body of two bytes.
fn answer(user: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n\r\n") {
        user.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    user.read_exact(&mut [0; 2]).unwrap();
    let line = text.split(|byte| *byte == b'\r').next().unwrap();
    String::from_utf8_lossy(&line[b"HTTP/1.1 ".len()..]).into_owned()
}

/// A backend that serves each of its connections in a thread. Like its users it is given little memory.
fn backend(
    serve: impl Fn(TcpStream) -> std::io::Result<()> + Send + Clone + 'static,
) -> SocketAddr {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    socket.set_send_buffer_size(16 * 1024).unwrap();
    socket.set_tcp_mss(1000).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(1024).unwrap();
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming() {
            let serve = serve.clone();
            let spawned = thread::Builder::new().stack_size(64 * 1024);
            spawned.spawn(move || serve(connection.unwrap())).unwrap();
        }
    });
    address
}

fn endless(mut to: TcpStream) -> std::io::Result<()> {
    loop {
        to.write_all(&[7; 16 * 1024])?;
    }
}

/// Reads nothing until the other side has gone.
fn deaf(connection: TcpStream) -> std::io::Result<()> {
    while connection.take_error()?.is_none() {
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Does as it is told by the first byte.
fn tcp_backend(mut connection: TcpStream) -> std::io::Result<()> {
    let mut bytes = [0; 16 * 1024];
    connection.read_exact(&mut bytes[..1])?;
    match bytes[0] {
        b'd' => endless(connection),
        b'u' => deaf(connection),
        _ => loop {
            match connection.read(&mut bytes)? {
                0 => return Ok(()),
                count => connection.write_all(&bytes[..count])?,
            }
        },
    }
}

fn api_backend(mut connection: TcpStream) -> std::io::Result<()> {
    loop {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            connection.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).to_lowercase();
        if head.starts_with("post /deaf") {
            return deaf(connection);
        }
        if head.contains("upgrade: flood") {
            let agreed = "HTTP/1.1 101 Yes\r\nConnection: upgrade\r\nUpgrade: flood\r\n\r\n";
            connection.write_all(agreed.as_bytes())?;
            return endless(connection);
        }
        if head.starts_with("get /endless") {
            let long = "HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n";
            connection.write_all(long.as_bytes())?;
            return endless(connection);
        }
        connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
    }
}

/// Writes for as long as anything is taken.
fn flood(user: &mut TcpStream) {
    loop {
        match user.write(&[7; 16 * 1024]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            taken => assert!(taken.unwrap() > 0),
        }
    }
}

const PIPES: Features = Features { receive_cap: true, splice: true };
const BLOCKS_ONLY: Features = Features { receive_cap: true, splice: false };
const ONE_BY_ONE: Features = Features { receive_cap: false, splice: false };

/// While this many users stall in this way, everyone else is served, and all blocks come back.
fn stall(features: Features, uploads: bool, begin: impl Fn(&Balancer) -> TcpStream) {
    let mut balancer = Balancer::start(backend(tcp_backend), backend(api_backend), features);
    let (mut old, mut old_api) = (balancer.user(b"e"), balancer.api_user(GET));
    echoes(&mut old);
    assert_eq!(answer(&mut old_api), "200 OK");
    let mut all: Vec<TcpStream> = (0..STALLED).map(|_| begin(&balancer)).collect();
    all.iter().for_each(|user| user.set_nonblocking(true).unwrap());
    wait_for("flows to be held back", || {
        if uploads {
            all.iter_mut().for_each(flood);
        }
        (balancer.count(|it| it.flows_held_back.get()) >= STALLED as u64 / 4).then_some(())
    });
    for _ in 0..20 {
        echoes(&mut old);
        echoes(&mut balancer.user(b"e"));
        old_api.write_all(GET.as_bytes()).unwrap();
        assert_eq!(answer(&mut old_api), "200 OK");
        assert_eq!(answer(&mut balancer.api_user(GET)), "200 OK");
    }
    balancer.end_all();
    wait_for("every block to come back", || {
        let held_back = balancer.count(|it| it.flows_held_back.get());
        // The gateway keeps some for as long as it has connections.
        let free = balancer.count(|it| it.buffers_free.get());
        (held_back == 0 && free >= BLOCKS - STOCK).then_some(())
    });
    drop(all);
    balancer.stop();
}

#[test]
fn downloads_that_nobody_reads_keep_nothing_from_others() {
    for features in [PIPES, BLOCKS_ONLY, ONE_BY_ONE] {
        stall(features, false, |balancer| {
            stalled(balancer.plane.door(Protocol::Tcp).unwrap(), b"d")
        });
    }
}

#[test]
fn uploads_that_no_backend_reads_keep_nothing_from_others() {
    for features in [PIPES, BLOCKS_ONLY] {
        stall(features, true, |balancer| {
            stalled(balancer.plane.door(Protocol::Tcp).unwrap(), b"u")
        });
    }
}

#[test]
fn answers_that_nobody_reads_keep_nothing_from_others() {
    let get = |balancer: &Balancer| {
        stalled(balancer.plane.door(Protocol::Api).unwrap(), GET_ALL.as_bytes())
    };
    stall(PIPES, false, get);
}

#[test]
fn requests_that_no_backend_reads_keep_nothing_from_others() {
    let post =
        |balancer: &Balancer| stalled(balancer.plane.door(Protocol::Api).unwrap(), POST.as_bytes());
    stall(PIPES, true, post);
}

#[test]
fn tunnels_that_nobody_reads_keep_nothing_from_others() {
    let upgrade = |balancer: &Balancer| {
        stalled(balancer.plane.door(Protocol::Api).unwrap(), UPGRADE.as_bytes())
    };
    stall(PIPES, false, upgrade);
}
