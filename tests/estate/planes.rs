//! Data planes that take up each other's sessions, in one process: the test stands in for both control cores.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use lb::boot::DataPlane;
use lb::cluster::{Backend, BackendId, DoorId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::estate::Estate;
use lb::estate::ahead::Ahead;
use lb::estate::format::State;
use lb::proxy::line::Features;
use lb::ring::sys;
use lb::session::shards::SessionView;
use lb::worker::brake::Request;
use lb::worker::link::{ControlEnd, DoorChange, Listener, Order, Report};

use crate::wait::{PATIENCE, wait_for};

pub struct Plane {
    pub plane: DataPlane,
    /// Those that the test has opened.
    pub udp_doors: Vec<(DoorId, SocketAddr)>,
}

pub fn config() -> Config {
    let mut config = Config { workers: Some(1), ..Config::default() };
    config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
    config.listen.udp = Some("127.0.0.1:0".parse().unwrap());
    config.listen.api = None;
    config
}

impl Plane {
    /// With these backends, numbered from one, of both kinds.
    pub fn start(config: &Config, tcp: &[SocketAddr], udp: &[SocketAddr]) -> Plane {
        let features = Features { receive_cap: true, splice: true };
        let plane = DataPlane::start(config, 1000, features).unwrap();
        let of = |protocol, all: &[SocketAddr]| -> Vec<(Protocol, SocketAddr)> {
            all.iter().map(|address| (protocol, *address)).collect()
        };
        let all = [of(Protocol::Tcp, tcp), of(Protocol::Udp, udp)].concat();
        let backends: Vec<Backend> = (1u16..)
            .zip(all)
            .map(|(number, (protocol, address))| Backend {
                proxy: false,
                http2: false,
                tls: None,
                id: BackendId(number.into()),
                slot: number,
                service: ServiceId::built_in(protocol),
                address,
                weight: 1,
                name: None,
                group: None,
                standing: Standing::Serving,
            })
            .collect();
        let with = plane.snapshots.current().with(&backends);
        plane.snapshots.publish(with);
        Plane { plane, udp_doors: Vec::new() }
    }

    /// Opens a UDP door over a copy of this socket.
    pub fn open_udp_door(&mut self, id: DoorId, socket: &OwnedFd) {
        self.open_udp_door_at(0, id, socket);
    }

    /// The same at one of several workers.
    pub fn open_udp_door_at(&mut self, worker: usize, id: DoorId, socket: &OwnedFd) {
        let (socket, service) = (socket.try_clone().unwrap(), ServiceId::built_in(Protocol::Udp));
        self.udp_doors.push((id, sys::local(socket.as_fd()).unwrap()));
        let end = &mut self.plane.ends[worker];
        let listener = Listener { id, socket, service, is_tls: false };
        end.doors.push((Protocol::Udp, DoorChange::Open(listener))).unwrap();
        end.wake.write(1).unwrap();
    }

    pub fn user(&self) -> TcpStream {
        let user = TcpStream::connect(self.plane.door(Protocol::Tcp).unwrap()).unwrap();
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        user.set_write_timeout(Some(PATIENCE)).unwrap();
        user
    }

    /// Has all workers do something, and waits until they have.
    pub fn request(&self, what: Request) {
        let ends = &self.plane.ends;
        ends.iter().for_each(|end| end.ask(what));
        let is_done = || ends.iter().all(|end| end.brake.is_done());
        wait_for(&format!("{what:?}"), || is_done().then_some(()));
    }

    /// Stands still, and describes what could go on elsewhere.
    pub fn describe(&self) -> Estate<RawFd> {
        self.describe_all().remove(0)
    }

    /// The same of each worker.
    pub fn describe_all(&self) -> Vec<Estate<RawFd>> {
        self.request(Request::Freeze);
        self.request(Request::Describe);
        self.plane.ends.iter().map(|end| end.brake.take_estate().unwrap()).collect()
    }

    /// Sends another the sockets of the sessions that could go on there, while they go on here. Returns of how many.
    pub fn send_ahead(&self, to: &Plane) -> u32 {
        let (from, to) = (&self.plane.ends[0], &to.plane.ends[0]);
        let mut first = 0;
        loop {
            from.ask_for_sockets(first == 0);
            wait_for("what they live on", || from.brake.is_done().then_some(()));
            let sockets = from.brake.take_sockets();
            let count = sockets.len() as u32;
            if count == 0 {
                return first;
            }
            to.expect(Ahead { worker: from.worker, first, sockets });
            wait_for("the other to take it in", || to.brake.is_done().then_some(()));
            assert_eq!(to.brake.take_refusal(), None);
            first += count;
        }
    }

    /// Takes that up; why it cannot.
    pub fn inherit(&self, mut estate: Estate<OwnedFd>) -> Option<String> {
        let end = &self.plane.ends[0];
        estate.doors_here = self.udp_doors.clone();
        end.give(estate);
        wait_for("the heirs", || end.brake.is_done().then_some(()));
        end.brake.take_refusal()
    }

    /// All sessions, in order.
    pub fn views(&self) -> Vec<SessionView> {
        self.plane.ends[0].shard.iter().collect()
    }

    pub fn sessions(&self) -> u64 {
        let of = |end: &ControlEnd| end.metrics.counters.sessions_active.get();
        self.plane.ends.iter().map(of).sum()
    }

    pub fn reports(&mut self) -> Vec<Report> {
        std::iter::from_fn(|| self.plane.ends[0].reports.pop().ok()).collect()
    }

    pub fn stop(mut self) {
        for end in &mut self.plane.ends {
            end.orders.push(Order::Stop).unwrap();
            end.wake.write(1).unwrap();
        }
        self.plane.threads.join();
    }
}

/// An estate as it arrives in another process.
pub fn delivered(estate: Estate<RawFd>) -> Estate<OwnedFd> {
    let (text, sockets) = State { legacy: (vec![], vec![]), estates: vec![estate] }.write();
    let sockets = sockets.into_iter().map(copy).collect();
    State::read(&text, sockets).unwrap().estates.pop().unwrap()
}

/// What a descriptor would be there, had it come over a socket.
fn copy(socket: RawFd) -> OwnedFd {
    // SAFETY: it stays open until its worker leaves or goes on, which comes after this.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    socket.try_clone_to_owned().unwrap()
}
