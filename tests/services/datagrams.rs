//! UDP services.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use lb::cluster::Protocol::Udp;
use lb::config::services::ServiceConfig;

use crate::harness::{Balancer, lettered_datagrams};
use crate::wait::{PATIENCE, wait_for};

/// As many as leave none of three workers without a user.
const USERS: u8 = 24;

fn user() -> UdpSocket {
    let user = UdpSocket::bind("127.0.0.1:0").unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

/// The letter of the backend that answers. The answer comes from where the question went.
fn ask(user: &UdpSocket, at: SocketAddr, number: u8) -> u8 {
    user.send_to(&[number], at).unwrap();
    let mut answer = [0; 9];
    let (len, from) = user.recv_from(&mut answer).unwrap();
    assert_eq!((from, len, answer[1]), (at, 2, number));
    answer[0]
}

#[test]
fn datagrams_reach_their_own_service_and_replies_leave_by_the_door_they_came_by() {
    let mut balancer = Balancer::start(Udp, &["red", "green"]);
    balancer.register("red", lettered_datagrams(b'r'));
    balancer.register("green", lettered_datagrams(b'g'));
    let doors = ["red", "green"].map(|name| balancer.at(name));
    // Each of them comes to both doors from one port.
    let users: Vec<_> = (0..USERS).map(|_| user()).collect();
    for round in 0..2 {
        for (number, user) in (0..).zip(&users) {
            let letters = doors.map(|door| ask(user, door, number));
            assert_eq!(letters, *b"rg", "user {number} in round {round}");
        }
    }
    assert_eq!(["red", "green"].map(|name| balancer.live(name)), [usize::from(USERS); 2]);
    balancer.stop();
}

#[test]
fn replies_of_doors_for_all_addresses_leave_from_the_address_that_was_asked() {
    let mut balancer = Balancer::start_with(|config| {
        let service = |name: &str, at: &str| ServiceConfig {
            listen: vec![at.parse().unwrap()],
            ..ServiceConfig::new(name, Udp)
        };
        config.set_services(vec![service("red", "127.0.0.1:0"), service("green", "0.0.0.0:0")]);
    });
    balancer.register("red", lettered_datagrams(b'r'));
    balancer.register("green", lettered_datagrams(b'g'));
    let (red, green) = (balancer.at("red"), balancer.at("green").port());
    let user = user();
    for last in 1..=3 {
        assert_eq!(ask(&user, ([127, 0, 0, last], green).into(), last), b'g');
        assert_eq!(ask(&user, red, last), b'r');
    }
    balancer.stop();
}

#[test]
fn one_address_may_serve_two_services() {
    let mut balancer = Balancer::start(Udp, &["red", "green"]);
    let shared = lettered_datagrams(b's');
    balancer.register("red", shared);
    balancer.register("green", shared);
    let doors = ["red", "green"].map(|name| balancer.at(name));
    let users: Vec<_> = (0..USERS).map(|_| user()).collect();
    for (number, user) in (0..).zip(&users) {
        assert_eq!(doors.map(|door| ask(user, door, number)), *b"ss");
    }
    let sessions = || balancer.plane.ends.iter().flat_map(|end| end.shard.iter());
    for (door, backend) in balancer.plane.doors.open().iter().zip(1..) {
        let own = sessions().filter(|session| session.service == door.service);
        let backends: Vec<_> = own.filter_map(|session| session.backend).map(|id| id.0).collect();
        assert_eq!(backends, [backend; USERS as usize], "each is on its own service's backend");
    }
    balancer.stop();
}

#[test]
fn each_service_has_its_own_idle_time() {
    let mut balancer = Balancer::start_with(|config| {
        let service = |name: &str, ms| ServiceConfig {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            udp_idle: Some(Duration::from_millis(ms)),
            ..ServiceConfig::new(name, Udp)
        };
        config.set_services(vec![service("brief", 20), service("lasting", 3_600_000)]);
    });
    balancer.register("brief", lettered_datagrams(b'b'));
    balancer.register("lasting", lettered_datagrams(b'l'));
    let user = user();
    assert_eq!(ask(&user, balancer.at("lasting"), 1), b'l');
    assert_eq!(ask(&user, balancer.at("brief"), 2), b'b');
    wait_for("the brief session to end", || (balancer.live("brief") == 0).then_some(()));
    assert_eq!(balancer.live("lasting"), 1);
    balancer.stop();
}
