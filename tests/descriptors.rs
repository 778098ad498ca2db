//! What happens to a user when the process has no descriptor left for a connection to a backend. Runs
//! in a process of its own, because the limit applies to the whole process.

mod common {
    pub mod wait;
}

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use common::wait::{PATIENCE, wait_for};
use lb::boot::DataPlane;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::proxy::line::Features;
use lb::worker::link::Order;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/// More descriptors than can be set aside without being open yet.
const UNSEEN: u64 = 16;

/// While it lives, the process has few descriptors left.
struct Scarcity {
    _held: Vec<File>,
    limits: (u64, u64),
}

impl Scarcity {
    /// Leaves `count` of them. A thread that waits in accept(2) has a number set aside that /proc does not
    /// show, so the limit lies well above the highest number seen: everything below it is taken, and
    /// then `count` are given back.
    fn leaving(count: usize) -> Scarcity {
        let limits = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let numbers = open.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
        let most = numbers.max().unwrap() + UNSEEN + count as u64;
        setrlimit(Resource::RLIMIT_NOFILE, most, limits.1).unwrap();
        let mut held: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        held.truncate(held.len() - count);
        Scarcity { _held: held, limits }
    }
}

impl Drop for Scarcity {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.limits.0, self.limits.1).unwrap();
    }
}

/// A backend that answers the first bytes of every connection with `ANSWER`.
fn backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let _ = connection.read(&mut [0; 4096]).and_then(|_| connection.write_all(ANSWER));
        }
    });
    address
}

/// Sends a request, and reads the answer until the connection ends.
fn ask(door: SocketAddr) -> io::Result<Vec<u8>> {
    let mut user = TcpStream::connect(door)?;
    user.set_read_timeout(Some(PATIENCE))?;
    let _ = user.write_all(REQUEST);
    let mut said = Vec::new();
    match user.read_to_end(&mut said) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(said),
    }
}

fn plane() -> DataPlane {
    let mut config = Config { workers: Some(1), ..Config::default() };
    config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
    config.listen.api = Some("127.0.0.1:0".parse().unwrap());
    config.listen.udp = None;
    let features = Features { receive_cap: true, splice: true };
    let plane = DataPlane::start(&config, 100, features).unwrap();
    let backend = |number: u32, protocol| Backend {
        proxy: false,
        http2: false,
        tls: None,
        id: BackendId(number),
        slot: number as u16,
        service: ServiceId::built_in(protocol),
        address: backend(),
        weight: 1,
        name: None,
        group: None,
        standing: Standing::Serving,
    };
    let backends = [backend(0, Protocol::Tcp), backend(1, Protocol::Api)];
    plane.snapshots.publish(plane.snapshots.current().with(&backends));
    plane.ends[0].wake.write(1).unwrap();
    plane
}

#[test]
fn a_user_for_whom_no_socket_can_be_opened_is_turned_away_and_no_backend_is_blamed() {
    let mut plane = plane();
    let metrics = std::sync::Arc::clone(&plane.ends[0].metrics);
    let counters = &metrics.counters;
    for (number, door) in
        [plane.door(Protocol::Tcp), plane.door(Protocol::Api)].into_iter().flatten().enumerate()
    {
        let served = || ask(door).ok().filter(|said| said.ends_with(b"ok"));
        wait_for("an answer", served);
        // A spare connection could serve the next request; it goes when its backend closes it.
        wait_for("the end of the sessions", || (counters.sessions_active.get() == 0).then_some(()));
        wait_for("the end of spares", || (counters.api_upstream_idle.get() == 0).then_some(()));
        // One for the user's end, and one for ours.
        let scarcity = Scarcity::leaving(2);
        let said = ask(door).expect("the connection is closed");
        drop(scarcity);
        let refused = number as u64 + 1;
        let all_counted = || (counters.users_refused_exhausted.get() == refused).then_some(());
        wait_for("the refusal in the counters", all_counted);
        match Some(door) == plane.door(Protocol::Api) {
            true => assert!(said.starts_with(b"HTTP/1.1 503 "), "{said:?}"),
            false => assert_eq!(said, b""),
        }
        wait_for("an answer to the next user", served);
    }
    assert_eq!(counters.connects_failed.get(), 0);
    plane.ends[0].orders.push(Order::Stop).unwrap();
    plane.ends[0].wake.write(1).unwrap();
    plane.threads.join();
}
