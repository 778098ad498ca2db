//! A balancer with an API door, backends that record what reached them, and users who read
//! strictly.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use lb::boot::DataPlane;
use lb::cluster::{Backend as Registered, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::metrics::WorkerCounters;
use lb::proxy::line::Features;
use lb::worker::link::{Order, RequestLine};

use crate::wait::{PATIENCE, wait_for};

/// Limit on the bytes that a backend remembers.
const RECORD_MAX: usize = 1 << 20;

pub struct Balancer {
    pub plane: DataPlane,
}

impl Balancer {
    /// With one worker, so that a test sees one pool of connections.
    pub fn start(change: impl FnOnce(&mut Config)) -> Balancer {
        let mut config = Config { workers: Some(1), ..Config::default() };
        config.listen.tcp = None;
        config.listen.udp = None;
        config.listen.api = Some("127.0.0.1:0".parse().unwrap());
        config.api.via = Some("test".to_string());
        change(&mut config);
        let features = Features { receive_cap: true, splice: true };
        Balancer { plane: DataPlane::start(&config, 1000, features).unwrap() }
    }

    /// A balancer in front of these backends, with its worker informed about them.
    pub fn over(addresses: &[SocketAddr], change: impl FnOnce(&mut Config)) -> Balancer {
        let mut balancer = Balancer::start(change);
        balancer.register(addresses);
        balancer
    }

    /// Publishes these backends to the workers, numbered from 1, and waits until they have taken
    /// note.
    pub fn register(&mut self, addresses: &[SocketAddr]) {
        let service = ServiceId::built_in(Protocol::Api);
        let all: Vec<_> = addresses.iter().map(|address| (service, *address)).collect();
        self.register_for(&all);
    }

    /// The same for backends of several services.
    pub fn register_for(&mut self, backends: &[(ServiceId, SocketAddr)]) {
        let serving = |(service, address): &(_, _)| (*service, *address, Standing::Serving);
        self.register_as(&backends.iter().map(serving).collect::<Vec<_>>());
    }

    /// The same for backends with a standing each.
    pub fn register_as(&mut self, backends: &[(ServiceId, SocketAddr, Standing)]) {
        let backends = backends.iter().enumerate();
        let backends = backends.map(|(place, (service, address, standing))| Registered {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            service: *service,
            address: *address,
            weight: 1,
            name: None,
            group: None,
            standing: *standing,
        });
        let backends: Vec<_> = backends.collect();
        let snapshots = &self.plane.snapshots;
        snapshots.publish(snapshots.current().with(&backends));
        self.turn();
    }

    /// Waits until the worker has processed everything there is.
    pub fn turn(&self) {
        let turns = || self.count(|it| it.turns.get());
        let before = turns();
        wait_for("the worker to turn twice", || {
            self.wake();
            (turns() >= before + 2).then_some(())
        });
    }

    pub fn order(&mut self, order: Order) {
        for end in &mut self.plane.ends {
            end.orders.push(order).unwrap();
        }
        self.wake();
    }

    fn wake(&self) {
        for end in &self.plane.ends {
            end.wake.write(1).unwrap();
        }
    }

    pub fn count(&self, value: impl Fn(&WorkerCounters) -> u64) -> u64 {
        self.plane.ends.iter().map(|end| value(&end.metrics.counters)).sum()
    }

    /// Bytes up and down of the backends at these places, over all workers.
    pub fn carried_by(&self, places: std::ops::Range<usize>) -> [u64; 2] {
        let metrics =
            || self.plane.ends.iter().flat_map(|end| &end.metrics.backends[places.clone()]);
        [metrics().map(|one| one.up.get()).sum(), metrics().map(|one| one.down.get()).sum()]
    }

    /// Waits until a counter has the wanted value.
    pub fn expect(&self, what: &str, wanted: u64, value: impl Fn(&WorkerCounters) -> u64) {
        let what = format!("{what} to be {wanted}");
        wait_for(&what, || (self.count(&value) == wanted).then_some(()));
    }

    /// The next line of the request log.
    pub fn line(&mut self) -> RequestLine {
        wait_for("a line of the request log", || {
            self.plane.ends.iter_mut().find_map(|end| end.requests.pop().ok())
        })
    }

    pub fn door(&self) -> SocketAddr {
        self.plane.door(Protocol::Api).unwrap()
    }

    pub fn user(&self) -> User {
        User::connect(self.door())
    }

    pub fn stop(mut self) {
        self.order(Order::Stop);
        self.plane.threads.join();
    }
}

/// One message as it was read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Message {
    /// The request line or the status line.
    pub start: String,
    /// Names in lower case, in order.
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

impl Message {
    pub fn status(&self) -> u16 {
        self.start[9..12].parse().expect("a status line has a status")
    }

    pub fn path(&self) -> &str {
        self.start.split(' ').nth(1).expect("a request line has a target")
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("this body is text")
    }

    pub fn all(&self, name: &str) -> Vec<&str> {
        self.fields.iter().filter(|(known, _)| known == name).map(|(_, it)| it.as_str()).collect()
    }

    /// The value of a field that occurs once.
    pub fn one(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() <= 1, "{name} stands {} times in {self:?}", all.len());
        all.first().copied()
    }
}

/// A connection on which HTTP/1.1 is read strictly.
pub struct Wire {
    pub stream: TcpStream,
    ahead: Vec<u8>,
    /// Also keeps what was read, as far as there is room.
    record: Option<Arc<Mutex<Vec<u8>>>>,
}

impl Wire {
    pub fn new(stream: TcpStream) -> Wire {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Wire { stream, ahead: Vec::new(), record: None }
    }

    /// Reads more bytes; false at the end.
    fn more(&mut self) -> bool {
        let mut bytes = [0; 16 * 1024];
        let count = match self.stream.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("nothing to read: {error}"),
        };
        self.ahead.extend_from_slice(&bytes[..count]);
        if let Some(record) = &self.record {
            let mut record = record.lock().unwrap();
            let room = RECORD_MAX.saturating_sub(record.len());
            record.extend_from_slice(&bytes[..count.min(room)]);
        }
        count > 0
    }

    fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.ahead.windows(2).position(|two| two == b"\r\n") {
                let rest = self.ahead.split_off(end + 2);
                let line = std::mem::replace(&mut self.ahead, rest);
                let line = String::from_utf8(line[..end].to_vec()).expect("a head is text");
                assert!(!line.contains(['\r', '\n']), "a bare line end in {line:?}");
                return Some(line);
            }
            if !self.more() {
                return None;
            }
        }
    }

    fn fields(&mut self) -> Option<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Some(fields);
            }
            let (name, value) = line.split_once(": ").expect("a field has a name and a value");
            fields.push((name.to_ascii_lowercase(), value.to_string()));
        }
    }

    /// A head; `None` when the connection ended before it was complete.
    pub fn head(&mut self) -> Option<Message> {
        let start = self.line()?;
        Some(Message { start, fields: self.fields()?, ..Message::default() })
    }

    pub fn exactly(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.ahead.len() < count {
            if !self.more() {
                return None;
            }
        }
        let rest = self.ahead.split_off(count);
        Some(std::mem::replace(&mut self.ahead, rest))
    }

    /// The body of that head; `None` when the connection ended within it.
    pub fn body(&mut self, message: &mut Message, until_close: bool) -> Option<()> {
        let chunked = message.one("transfer-encoding");
        let length = message.one("content-length");
        assert!(chunked.is_none() || length.is_none(), "two framings in {message:?}");
        if let Some(coding) = chunked {
            assert_eq!(coding, "chunked");
            return self.chunks(message);
        }
        if let Some(length) = length {
            message.body = self.exactly(length.parse().expect("a length is a number"))?;
        } else if until_close {
            while self.more() {}
            message.body = std::mem::take(&mut self.ahead);
        }
        Some(())
    }

    fn chunks(&mut self, message: &mut Message) -> Option<()> {
        loop {
            let line = self.line()?;
            let size = usize::from_str_radix(&line, 16).expect("only plain sizes are written");
            if size == 0 {
                message.trailers = self.fields()?;
                return Some(());
            }
            message.body.extend(self.exactly(size)?);
            assert_eq!(self.exactly(2)?, b"\r\n");
        }
    }

    /// How many bytes were read and not handed out yet.
    pub fn ahead_len(&self) -> usize {
        self.ahead.len()
    }

    /// Everything until the end of the connection.
    pub fn rest(&mut self) -> Vec<u8> {
        while self.more() {}
        std::mem::take(&mut self.ahead)
    }

    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("the peer takes what it is sent");
    }
}

/// Someone at the API door.
pub struct User {
    pub wire: Wire,
}

impl User {
    pub fn connect(door: SocketAddr) -> User {
        User { wire: Wire::new(TcpStream::connect(door).unwrap()) }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.wire.write(bytes);
    }

    /// Sends a request without a body and reads its answer.
    pub fn get(&mut self, path: &str) -> Message {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        self.answer()
    }

    /// The next final response, whole.
    pub fn answer(&mut self) -> Message {
        self.try_answer(false).expect("an answer comes whole")
    }

    /// The next final response to a request whose responses have no body.
    pub fn bare_answer(&mut self) -> Message {
        self.try_answer(true).expect("an answer comes whole")
    }

    /// `None` when the connection ended before the response was complete.
    pub fn try_answer(&mut self, bare: bool) -> Option<Message> {
        let mut message = loop {
            let message = self.wire.head()?;
            if message.status() >= 200 {
                break message;
            }
        };
        if !bare && !matches!(message.status(), 204 | 304) {
            self.wire.body(&mut message, true)?;
        }
        Some(message)
    }

    /// Expects nothing more but the end.
    pub fn ends(&mut self) {
        let rest = self.wire.rest();
        assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    }
}

/// A backend, and what it has received.
#[derive(Clone)]
pub struct Backend {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<Mutex<Vec<Message>>>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Backend {
    /// Gives every connection to `serve`, each in a thread of its own.
    pub fn run(serve: impl Fn(&Backend, Wire) + Send + Sync + 'static) -> Backend {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let backend = Backend {
            address: listener.local_addr().unwrap(),
            connections: Arc::default(),
            requests: Arc::default(),
            bytes: Arc::default(),
        };
        let (own, serve) = (backend.clone(), Arc::new(serve));
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                own.connections.fetch_add(1, Ordering::Relaxed);
                let (own, serve) = (own.clone(), Arc::clone(&serve));
                thread::spawn(move || {
                    let mut wire = Wire::new(connection);
                    wire.record = Some(Arc::clone(&own.bytes));
                    serve(&own, wire);
                });
            }
        });
        backend
    }

    /// Answers every request with the result of `answer`, and keeps the connection.
    pub fn answering(answer: impl Fn(&Message) -> Vec<u8> + Send + Sync + 'static) -> Backend {
        Backend::run(move |own, mut wire| {
            while let Some(request) = own.request(&mut wire) {
                if wire.stream.write_all(&answer(&request)).is_err() {
                    return;
                }
            }
        })
    }

    /// Answers with its name.
    pub fn named(name: &'static str) -> Backend {
        Backend::answering(move |_| ok(name))
    }

    /// Reads a whole request and records it.
    pub fn request(&self, wire: &mut Wire) -> Option<Message> {
        let mut request = wire.head()?;
        wire.body(&mut request, false)?;
        self.requests.lock().unwrap().push(request.clone());
        Some(request)
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub fn requests(&self) -> Vec<Message> {
        self.requests.lock().unwrap().clone()
    }

    /// What reached it, from the first byte on.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

/// A response with this text.
pub fn ok(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    let mut answer =
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", text.len()).into_bytes();
    answer.extend_from_slice(text);
    answer
}
