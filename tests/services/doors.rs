//! Doors that open, change their service and close while the workers run.

use std::net::{SocketAddr, TcpStream, UdpSocket};

use lb::boot::doors::open_users;
use lb::cluster::{DoorId, Protocol};
use lb::config::plans::{DoorPlan, Name};
use lb::control::doors::NewDoor;
use lb::worker::link::{DoorChange, Listener};

use crate::api;
use crate::harness::{Balancer, ask, connect, lettered, lettered_datagrams};
use crate::wait::PATIENCE;

/// A place behind those of the doors that there are from the start.
const NEW: DoorId = DoorId(9);

/// Users at each door, as many as leave none of three workers without one.
const USERS: u8 = 24;

impl Balancer {
    /// Opens a door of this service, and says where.
    fn open(&mut self, protocol: Protocol, service: &str) -> SocketAddr {
        let (name, id) = (Name::service(service), self.service(service));
        let address = "127.0.0.1:0".parse().unwrap();
        let plan = DoorPlan { name, service: id, protocol, address, is_tls: false };
        let door = NewDoor { id: NEW, plan, beside_own: false };
        let opened = open_users(&[door], self.plane.ends.len(), false).unwrap().remove(0);
        let mut sockets = opened.sockets.into_iter();
        self.change(protocol, || {
            let socket = sockets.next().unwrap();
            DoorChange::Open(Listener { id: NEW, socket, service: id, is_tls: false })
        });
        opened.address
    }

    fn change(&mut self, protocol: Protocol, mut change: impl FnMut() -> DoorChange) {
        for end in &mut self.plane.ends {
            end.doors.push((protocol, change())).unwrap();
        }
        self.let_workers_turn();
    }

    fn assign(&mut self, protocol: Protocol, service: &str) {
        let service = self.service(service);
        self.change(protocol, || DoorChange::Assign { id: NEW, service, is_tls: false });
    }

    fn close(&mut self, protocol: Protocol) {
        self.change(protocol, || DoorChange::Close { id: NEW });
    }
}

#[test]
fn a_tcp_door_opens_changes_its_service_and_closes_while_its_sessions_go_on() {
    let mut balancer = Balancer::start(Protocol::Tcp, &["red", "green"]);
    balancer.register("red", lettered(b'r'));
    balancer.register("green", lettered(b'g'));
    let at = balancer.open(Protocol::Tcp, "red");
    let served = |letter: u8| -> Vec<TcpStream> {
        let mut users: Vec<_> = (0..USERS).map(|_| connect(at)).collect();
        assert!(users.iter_mut().all(|user| ask(user) == letter));
        users
    };
    let mut red = served(b'r');
    balancer.assign(Protocol::Tcp, "green");
    let mut green = served(b'g');
    balancer.close(Protocol::Tcp);
    assert!(TcpStream::connect(at).is_err(), "nobody listens any more");
    assert!(red.iter_mut().all(|user| ask(user) == b'r'));
    assert!(green.iter_mut().all(|user| ask(user) == b'g'));
    let again = balancer.open(Protocol::Tcp, "red");
    assert_eq!(ask(&mut connect(again)), b'r', "the place is free for another door");
    balancer.stop();
}

/// The letter of the backend that answers; `None` where nobody listens.
fn asked(user: &UdpSocket, at: SocketAddr) -> Option<u8> {
    user.connect(at).unwrap();
    user.send(b"?").unwrap();
    let mut answer = [0; 9];
    user.recv(&mut answer).ok().map(|_| answer[0])
}

#[test]
fn a_udp_door_opens_changes_its_service_for_new_users_and_closes() {
    let mut balancer = Balancer::start(Protocol::Udp, &["red", "green"]);
    balancer.register("red", lettered_datagrams(b'r'));
    balancer.register("green", lettered_datagrams(b'g'));
    let users = || -> Vec<UdpSocket> {
        let user = |_| {
            let user = UdpSocket::bind("127.0.0.1:0").unwrap();
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            user
        };
        (0..USERS).map(user).collect()
    };
    let (red, green) = (users(), users());
    let at = balancer.open(Protocol::Udp, "red");
    assert!(red.iter().all(|user| asked(user, at) == Some(b'r')));
    balancer.assign(Protocol::Udp, "green");
    assert!(green.iter().all(|user| asked(user, at) == Some(b'g')));
    assert!(red.iter().all(|user| asked(user, at) == Some(b'r')), "their sessions go on");
    balancer.close(Protocol::Udp);
    assert!(red.iter().chain(&green).all(|user| asked(user, at).is_none()));
    let again = balancer.open(Protocol::Udp, "red");
    assert!(green.iter().all(|user| asked(user, again) == Some(b'r')), "the place is free");
    balancer.stop();
}

#[test]
fn an_api_door_opens_changes_its_service_and_closes() {
    let mut balancer = Balancer::start(Protocol::Api, &["red", "green"]);
    balancer.register("red", api::lettered('r'));
    balancer.register("green", api::lettered('g'));
    let at = balancer.open(Protocol::Api, "red");
    let served = |letter: &str| {
        for _ in 0..USERS {
            assert_eq!(api::get(&connect(at)), ("200".to_owned(), Some(letter.to_owned())));
        }
    };
    served("r");
    balancer.assign(Protocol::Api, "green");
    served("g");
    balancer.close(Protocol::Api);
    assert!(TcpStream::connect(at).is_err(), "nobody listens any more");
    balancer.stop();
}
