//! A real worker that is frozen and thawed under load, in the control core's stead: nobody loses a byte, and
//! nothing moves while it stands still.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use lb::boot::DataPlane;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::proxy::line::Features;
use lb::session::EndReason;
use lb::worker::brake::Request;
use lb::worker::link::{Order, Report};

#[path = "common/random.rs"]
mod random;
#[path = "common/streams.rs"]
mod streams;
#[path = "common/wait.rs"]
mod wait;

use random::pattern;
use streams::{ask, busy, check};
use wait::{PATIENCE, wait_for};

const FREEZES: usize = 20;
/// Users whose bytes come back to them all the time; every third in large pieces, for which pipes are used.
const BUSY: usize = 12;
/// What a user who does not read says: more than the kernel's buffers on the way hold.
const UNREAD_BYTES: usize = 24 << 20;

struct Balancer {
    plane: DataPlane,
}

impl Balancer {
    fn start(backend: SocketAddr) -> Balancer {
        let mut config = Config { workers: Some(1), ..Config::default() };
        config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
        config.listen.api = None;
        config.listen.udp = None;
        let features = Features { receive_cap: true, splice: true };
        let plane = DataPlane::start(&config, 1000, features).unwrap();
        let backend = Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(1),
            slot: 0,
            service: ServiceId::built_in(Protocol::Tcp),
            address: backend,
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        };
        let with = plane.snapshots.current().with(&[backend]);
        plane.snapshots.publish(with);
        Balancer { plane }
    }

    fn order(&mut self, order: Order) {
        let end = &mut self.plane.ends[0];
        end.orders.push(order).unwrap();
        end.wake.write(1).unwrap();
    }

    fn user(&self) -> TcpStream {
        let user = TcpStream::connect(self.plane.door(Protocol::Tcp).unwrap()).unwrap();
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        user.set_write_timeout(Some(PATIENCE)).unwrap();
        user
    }

    /// Has the worker do something, and waits until it has.
    fn request(&self, what: Request) {
        let end = &self.plane.ends[0];
        end.ask(what);
        wait_for(&format!("{what:?}"), || end.brake.is_done().then_some(()));
    }

    /// Bytes that running sessions have passed on.
    fn passed(&self) -> u64 {
        self.plane.ends[0].shard.iter().map(|view| view.bytes_up + view.bytes_down).sum()
    }

    /// Sessions that there are.
    fn inside(&self) -> u64 {
        self.plane.ends[0].metrics.counters.sessions_active.get()
    }

    fn everybody_has_gone(&self) {
        wait_for("everybody to have gone", || (self.inside() == 0).then_some(()));
    }

    /// Whoever has ended since the last look did so of their own accord.
    fn nobody_was_lost(&mut self) {
        while let Ok(report) = self.plane.ends[0].reports.pop() {
            match report {
                Report::Ended(ended) => assert_eq!(ended.reason, EndReason::Finished, "{ended:?}"),
                Report::Started { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Gives back whatever it is sent.
fn echo_backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = vec![0; 64 * 1024];
                while let Ok(count @ 1..) = connection.read(&mut bytes) {
                    if connection.write_all(&bytes[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Bytes of a user's that the balancer has not taken out of its socket.
fn not_taken(user: &TcpStream) -> u64 {
    let ends = [user.peer_addr().unwrap(), user.local_addr().unwrap()];
    let ends = ends.map(|end| format!("0100007F:{:04X}", end.port()));
    let table = fs::read_to_string("/proc/self/net/tcp").unwrap();
    let lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut queues = lines.filter(|fields| fields[1..3] == ends).map(|fields| fields[4]);
    let queue = queues.next_back().and_then(|queues| queues.split_once(':'));
    u64::from_str_radix(queue.expect("the connection is listed").1, 16).unwrap()
}

#[test]
fn twenty_freezes_under_load_lose_no_byte() {
    let mut balancer = Balancer::start(echo_backend());
    wait_for("a user to be served", || {
        let mut user = balancer.user();
        user.write_all(b"?").ok()?;
        (user.read(&mut [0]).ok()? == 1).then_some(())
    });
    let (stop, moved) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut all: Vec<_> =
        (0..BUSY).map(|number| busy(balancer.user(), number, &stop, &moved)).collect();
    let mut idle: Vec<_> = (0..20).map(|_| balancer.user()).collect();
    idle.iter_mut().for_each(ask);
    // One does not read, so that there are always bytes in a send to it.
    let unread = balancer.user();
    let unread_text = Arc::new(pattern(77, UNREAD_BYTES));
    all.push({
        let (mut to, text) = (unread.try_clone().unwrap(), Arc::clone(&unread_text));
        thread::spawn(move || {
            to.write_all(&text).expect("nobody is reset");
            to.shutdown(Shutdown::Write).unwrap();
        })
    });
    for round in 0..FREEZES {
        let before = moved.load(Ordering::Relaxed);
        wait_for("bytes to move", || (moved.load(Ordering::Relaxed) > before).then_some(()));
        balancer.request(Request::Freeze);
        let (there, inside) = (balancer.passed(), balancer.inside());
        // Whoever connects now is in the kernel's queue, and is served later.
        let mut newcomer = balancer.user();
        newcomer.write_all(b"?").unwrap();
        idle[round].write_all(b"?").unwrap();
        thread::sleep(Duration::from_millis(5));
        assert_eq!(balancer.passed(), there, "round {round}: nothing moves");
        assert_eq!(balancer.inside(), inside, "round {round}: nobody is let in");
        assert_eq!(not_taken(&idle[round]), 1, "round {round}: nothing is taken");
        balancer.request(Request::Thaw);
        for user in [&mut newcomer, &mut idle[round]] {
            user.read_exact(&mut [0]).unwrap();
        }
        idle.iter_mut().for_each(ask);
        balancer.nobody_was_lost();
        newcomer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(newcomer.read(&mut [0]).unwrap(), 0);
    }
    stop.store(true, Ordering::Relaxed);
    let count = Arc::new(AtomicU64::new(0));
    assert_eq!(check(unread, &unread_text, &count), UNREAD_BYTES as u64);
    all.into_iter().for_each(|one| one.join().unwrap());
    drop(idle);
    balancer.everybody_has_gone();
    balancer.nobody_was_lost();
    balancer.order(Order::Stop);
    balancer.plane.threads.join();
}

#[test]
fn a_freeze_that_is_called_off_leaves_no_trace_and_orders_wait_for_its_end() {
    let mut balancer = Balancer::start(echo_backend());
    let mut user = wait_for("a user to be served", || {
        let mut user = balancer.user();
        user.write_all(b"?").ok()?;
        (user.read(&mut [0]).ok()? == 1).then_some(user)
    });
    for _ in 0..50 {
        for what in [Request::Freeze, Request::Freeze, Request::Thaw] {
            balancer.plane.ends[0].ask(what);
        }
        ask(&mut user);
    }
    balancer.request(Request::Freeze);
    balancer.order(Order::Stop);
    user.write_all(b"?").unwrap();
    user.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let waits = user.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(waits, Err(ErrorKind::WouldBlock), "it is neither served nor ended");
    balancer.plane.ends[0].ask(Request::Thaw);
    balancer.plane.threads.join();
    balancer.plane.ends[0].brake.is_done().then_some(()).expect("it went on first");
    assert_eq!(balancer.plane.ends[0].metrics.counters.sessions_active.get(), 0);
}
