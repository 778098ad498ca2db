//! A control core on doors of its own, a worker that only counts turns, and backends that speak the wire
//! protocol over plain sockets. Owns the waiting: every wait is for a condition, and its failure names
//! that condition.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use lb::base::publish::Publisher;
use lb::cluster::{Backend as Registered, Protocol, Service, ServiceId, Snapshot, Standing};
use lb::config::Config;
use lb::config::services::ServiceConfig;
use lb::control::doors::UserDoors;
use lb::control::{Control, Listeners, socket};
use lb::metrics::WorkerMetrics;
use lb::session::shards::ShardWriter;
use lb::worker::link::{Order, Report, WorkerEnd, link};
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

use crate::wait::{PATIENCE, wait_for};

/// A stand-in for a worker on its side of the link: it turns, and remembers what it is told.
pub struct Worker {
    pub metrics: Arc<WorkerMetrics>,
    pub urgent: Arc<Notify>,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Seen {
    snapshot: Arc<Snapshot>,
    orders: Vec<Order>,
    reports: Vec<Report>,
    shard: ShardWriter,
}

impl Worker {
    fn play(mut end: WorkerEnd) -> Worker {
        let seen = Arc::new(Mutex::new(Seen {
            snapshot: Arc::default(),
            orders: Vec::new(),
            reports: Vec::new(),
            shard: end.shard,
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let (metrics, urgent) = (Arc::clone(&end.metrics), Arc::clone(&end.urgent));
        let thread = std::thread::spawn({
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut seen = seen.lock().unwrap();
                    if let Some(snapshot) = end.snapshots.changed() {
                        seen.snapshot = snapshot;
                    }
                    while let Ok(order) = end.orders.pop() {
                        seen.orders.push(order);
                    }
                    for report in seen.reports.drain(..) {
                        end.reports.push(report).unwrap();
                    }
                    drop(seen);
                    end.metrics.counters.turns.one();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Worker { metrics, urgent, seen, stop, thread: Some(thread) }
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.seen.lock().unwrap().snapshot)
    }

    /// The backends that the worker knows of, in the order of registration within each service.
    pub fn backends(&self) -> Vec<Registered> {
        self.snapshot().backends().cloned().collect()
    }

    pub fn orders(&self) -> Vec<Order> {
        self.seen.lock().unwrap().orders.clone()
    }

    pub fn report(&self, report: Report) {
        self.seen.lock().unwrap().reports.push(report);
    }

    /// Changes the worker's part of the session table.
    pub fn with_shard<T>(&self, change: impl FnOnce(&mut ShardWriter) -> T) -> T {
        change(&mut self.seen.lock().unwrap().shard)
    }

    /// From now on the worker hangs.
    pub fn hang(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The ports in a protocol's rotation.
    pub fn rotation(&self, protocol: Protocol) -> Vec<u16> {
        let snapshot = self.snapshot();
        let pool = snapshot.pool(ServiceId::built_in(protocol)).unwrap();
        let port = |place: u16| pool.backends[usize::from(place)].address.port();
        pool.rotation.turns().map(port).collect()
    }

    pub fn wait_for_rotation(&self, protocol: Protocol, ports: &[u16]) {
        wait_for(&format!("a {protocol} rotation of {ports:?}"), || {
            (self.rotation(protocol) == ports).then_some(())
        });
    }

    pub fn wait_for_order(&self, order: Order) {
        wait_for(&format!("{order:?}"), || self.orders().contains(&order).then_some(()));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The first snapshot of a balancer with these settings.
fn snapshot(config: &Config) -> Snapshot {
    let first = Snapshot::default();
    let like = first.services[0].clone();
    let service = |named: &ServiceConfig| Service {
        id: named.id,
        name: named.name.as_str().into(),
        kind: named.protocol,
        terms: config.terms_of(named),
        gate: Arc::default(),
        ..like.clone()
    };
    let named = config.services.iter().map(service);
    Snapshot { services: first.services.iter().cloned().chain(named).collect(), ..first }
}

/// A running control core.
pub struct Core {
    pub control: SocketAddr,
    pub admin: SocketAddr,
    pub worker: Worker,
    ask: mpsc::Sender<()>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Core {
    /// The backend on this port of loopback, as the status shows it.
    pub fn shown(&self, port: u16) -> Value {
        let (code, body) = self.get("/status");
        assert_eq!(code, 200);
        let status: Value = serde_json::from_str(&body).unwrap();
        let address = format!("127.0.0.1:{port}");
        let mut backends = status["backends"].as_array().unwrap().iter();
        backends.find(|it| it["address"] == *address).expect("the backend").clone()
    }

    pub fn wait_for_standing(&self, port: u16, standing: Standing) {
        wait_for(&format!("port {port} to be {standing:?}"), || {
            let all = self.worker.backends();
            all.iter().any(|it| it.address.port() == port && it.standing == standing).then_some(())
        });
    }

    /// Starts a core on loopback, configured by `change`.
    pub fn start(change: impl FnOnce(&mut Config)) -> Core {
        let mut config = Config::default();
        change(&mut config);
        let ip = config.listen.control.expect("a control door").ip();
        let control = TcpListener::bind((ip, 0)).unwrap();
        let address = control.local_addr().unwrap();
        config.listen.control = Some(address);
        let admin = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin_address = admin.local_addr().unwrap();
        let tls = lb::boot::tls::load(&config, 1, None).unwrap();
        let snapshots = Publisher::new(Snapshot { tls, ..snapshot(&config) });
        let urgent = Arc::new(Notify::new());
        let (end, worker) =
            link(0, 200_000, snapshots.subscribe(), Arc::clone(&urgent)).expect("an eventfd");
        let (ask, asked) = mpsc::channel(4);
        let socket = config.admin.socket.as_deref().map(|path| socket::open(path).unwrap());
        let listeners = Listeners { control: Some(control), admin: Some(admin), socket };
        let thread = std::thread::spawn(move || {
            let config = Arc::new(config);
            let doors = UserDoors::default();
            let (ends, derived) = (vec![end], Vec::new());
            Control { config, derived, via: None, listeners, ends, snapshots, doors, urgent }
                .run_until(asked)
        });
        Core {
            control: address,
            admin: admin_address,
            worker: Worker::play(worker),
            ask,
            thread: Some(thread),
        }
    }

    pub fn connect(&self) -> Backend {
        let here = (std::net::Ipv4Addr::LOCALHOST, self.control.port());
        Backend::new(TcpStream::connect(here).unwrap())
    }

    /// Connects from another loopback address.
    pub fn connect_from(&self, source: IpAddr) -> Backend {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
        socket.connect(&self.control.into()).unwrap();
        Backend::new(socket.into())
    }

    /// Asks the admin door; returns the status code and the body.
    pub fn get(&self, path: &str) -> (u16, String) {
        self.request(&format!("GET {path} HTTP/1.0\r\n\r\n"))
    }

    pub fn request(&self, head: &str) -> (u16, String) {
        let answer = self.answer(head);
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let code = head.split(' ').nth(1).expect("a status line").parse().unwrap();
        (code, body.to_owned())
    }

    /// The head of the answer to a request.
    pub fn head(&self, head: &str) -> String {
        self.answer(head).split("\r\n\r\n").next().unwrap_or_default().to_owned()
    }

    fn answer(&self, head: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub fn ask_to_stop(&self) {
        self.ask.blocking_send(()).unwrap();
    }

    pub fn wait_until_stopped(&mut self) {
        self.wait_for_outcome().unwrap();
    }

    pub fn wait_for_outcome(&mut self) -> std::io::Result<()> {
        wait_for("the control core to return", || {
            self.thread.as_ref().unwrap().is_finished().then_some(())
        });
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.ask.blocking_send(());
            let _ = self.ask.blocking_send(());
            let _ = thread.join();
        }
    }
}

/// The backend's end of a control connection.
pub struct Backend {
    pub stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Backend {
    fn new(stream: TcpStream) -> Backend {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        Backend { stream, lines }
    }

    pub fn say(&mut self, words: &str) {
        self.stream.write_all(words.as_bytes()).unwrap();
    }

    /// The next message; `None` when the connection ends, orderly or not.
    pub fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).expect(&line)),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Says something and hears the answer; answers a hello that comes first.
    pub fn ask(&mut self, message: &Value) -> Value {
        self.say(&message.to_string());
        loop {
            let heard = self.hear().expect("an answer");
            if heard["cmd"] != "hello" || heard.get("ack").is_some() {
                return heard;
            }
            self.say("{\"ack\":\"hello\"}");
        }
    }

    pub fn register(&mut self, protocol: Protocol, port: u16) -> Value {
        self.ask(&json!({"cmd": "register", "protocol": protocol, "port": port}))
    }
}

/// A backend's data port, and the socket that listens on it.
pub fn data_port() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[track_caller]
pub fn assert_failed(answer: &Value, words: &str) {
    assert_eq!(answer["ack"], "failed", "{answer}");
    assert!(answer["msg"].as_str().unwrap().contains(words), "{answer} does not say {words:?}");
}
