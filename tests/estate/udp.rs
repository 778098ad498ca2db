//! UDP users whose worker is another one from some datagram on.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lb::cluster::DoorId;
use lb::ring::sys;
use lb::worker::brake::Request;
use lb::worker::link::ControlEnd;

use crate::hand_over;
use crate::planes::{Plane, config, delivered};
use crate::wait::{PATIENCE, wait_for};

const USERS: usize = 8;
const HANDOVERS: u16 = 6;

/// Sends each datagram back, and with it the port that it came from.
fn backend() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 100];
        while let Ok((len, from)) = socket.recv_from(&mut bytes) {
            let port = from.port().to_le_bytes();
            let _ = socket.send_to(&[&bytes[..len], &port].concat(), from);
        }
    });
    address
}

fn user(door: SocketAddr) -> UdpSocket {
    let user = UdpSocket::bind("127.0.0.1:0").unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user.connect(door).unwrap();
    user
}

/// Numbers and the port by which they reached the backend.
fn hear(user: &UdpSocket) -> (u64, u16) {
    let mut bytes = [0; 100];
    let len = user.recv(&mut bytes).expect("no datagram is lost");
    assert_eq!(len, 10);
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (number, u16::from_le_bytes(bytes[8..10].try_into().unwrap()))
}

/// Sends numbers, a few ahead of what has come back, until it is told to stop: all come back in order, by one port.
fn busy(user: UdpSocket, stop: &Arc<AtomicBool>, heard: &Arc<AtomicU64>) -> JoinHandle<()> {
    let (stop, heard) = (Arc::clone(stop), Arc::clone(heard));
    thread::spawn(move || {
        let (mut sent, mut back, mut port) = (0u64, 0, None);
        while !stop.load(Ordering::Relaxed) || back < sent {
            if sent < back + 8 && !stop.load(Ordering::Relaxed) {
                user.send(&sent.to_le_bytes()).unwrap();
                sent += 1;
                thread::sleep(Duration::from_micros(300));
                continue;
            }
            let (number, by) = hear(&user);
            assert_eq!((number, by), (back, *port.get_or_insert(by)));
            back += 1;
            heard.fetch_add(1, Ordering::Relaxed);
        }
    })
}

/// A plane that stands still, with a UDP door of this number.
fn start(backend: SocketAddr, door: &OwnedFd, id: u16) -> Plane {
    let mut plane = Plane::start(&config(), &[], &[backend]);
    plane.request(Request::Freeze);
    plane.open_udp_door(DoorId(id), door);
    plane
}

fn open() -> (OwnedFd, SocketAddr) {
    let door = sys::datagram_door("127.0.0.1:0".parse().unwrap(), false, true).unwrap();
    let address = sys::local(door.as_fd()).unwrap();
    (door, address)
}

#[test]
fn udp_users_keep_their_way_and_no_datagram_is_lost_or_overtaken() {
    let (backend, (door, address)) = (backend(), open());
    let mut plane = start(backend, &door, 5);
    plane.request(Request::Thaw);
    let (stop, heard) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let all: Vec<_> = (0..USERS).map(|_| busy(user(address), &stop, &heard)).collect();
    wait_for("all of them to be served", || (plane.sessions() == USERS as u64).then_some(()));
    plane.reports();
    let quiet = user(address);
    quiet.send(&7u64.to_le_bytes()).unwrap();
    let (_, port) = hear(&quiet);
    plane.reports();
    for round in 0..HANDOVERS {
        let before = heard.load(Ordering::Relaxed);
        wait_for("datagrams", || (heard.load(Ordering::Relaxed) > before + 50).then_some(()));
        // The door has another number there, and somebody speaks while nobody listens.
        let next = || start(backend, &door, 6 + round);
        let speaks = || assert_eq!(quiet.send(&8u64.to_le_bytes()).unwrap(), 8);
        plane = hand_over(plane, next, speaks);
        assert_eq!(hear(&quiet), (8, port));
        assert_eq!(plane.reports(), [], "nobody is new");
    }
    stop.store(true, Ordering::Relaxed);
    all.into_iter().for_each(|one| one.join().unwrap());
    let counters = &plane.plane.ends[0].metrics.counters;
    assert!(counters.udp_sockets.get() >= USERS as u64);
    plane.stop();
}

#[test]
fn sessions_whose_door_is_gone_are_refused_with_the_cure_and_go_on_where_they_are() {
    let (backend, (door, address)) = (backend(), open());
    let plane = start(backend, &door, 5);
    plane.request(Request::Thaw);
    let user = user(address);
    user.send(&1u64.to_le_bytes()).unwrap();
    let (_, port) = hear(&user);
    let new = Plane::start(&config(), &[], &[backend]);
    new.request(Request::Freeze);
    let said = new.inherit(delivered(plane.describe())).unwrap();
    assert!(said.contains(&address.to_string()) && said.contains("restart"), "{said}");
    assert_eq!(new.sessions(), 0);
    new.request(Request::Thaw);
    new.stop();
    plane.request(Request::Thaw);
    user.send(&2u64.to_le_bytes()).unwrap();
    assert_eq!(hear(&user), (2, port));
    plane.stop();
}

#[test]
fn one_worker_takes_up_the_sessions_of_two() {
    let backend = backend();
    let first = sys::datagram_door("127.0.0.1:0".parse().unwrap(), true, true).unwrap();
    let address = sys::local(first.as_fd()).unwrap();
    let doors = [first, sys::datagram_door(address, true, true).unwrap()];
    let old = {
        let mut config = config();
        config.workers = Some(2);
        let mut old = Plane::start(&config, &[], &[backend]);
        for (worker, door) in doors.iter().enumerate() {
            old.open_udp_door_at(worker, DoorId(5), door);
        }
        old
    };
    let says = |user: &UdpSocket, number: u64| {
        user.send(&number.to_le_bytes()).unwrap();
        let (back, port) = hear(user);
        assert_eq!(back, number);
        port
    };
    let users: Vec<_> = (0..40).map(|_| user(address)).collect();
    let ports: Vec<_> = users.iter().map(|user| says(user, 1)).collect();
    let of = |end: &ControlEnd| end.metrics.counters.sessions_active.get();
    let counts: Vec<u64> = old.plane.ends.iter().map(of).collect();
    assert!(counts.iter().all(|count| *count > 0), "both workers have users: {counts:?}");
    let mut new = Plane::start(&config(), &[], &[backend]);
    new.request(Request::Freeze);
    for (number, door) in (6..).zip(&doors) {
        new.open_udp_door(DoorId(number), door);
    }
    for estate in old.describe_all() {
        assert_eq!(new.inherit(delivered(estate)), None);
    }
    assert_eq!(new.sessions(), 40);
    new.request(Request::Thaw);
    old.request(Request::Leave);
    old.stop();
    for (user, port) in users.iter().zip(ports) {
        assert_eq!(says(user, 2), port);
    }
    assert_eq!(new.sessions(), 40);
    new.stop();
}
