//! TCP services.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};

use lb::cluster::Protocol::Tcp;
use lb::config::services::ServiceConfig;
use lb::worker::link::{Order, Refusal, Report};

use crate::harness::{Balancer, ask, connect, lettered};
use crate::wait::wait_for;

/// As many as leave none of three workers without a user.
const USERS: usize = 24;

#[test]
fn users_reach_the_backends_of_the_service_whose_door_they_came_by() {
    let mut balancer = Balancer::start(Tcp, &["red", "green"]);
    balancer.register("red", lettered(b'r'));
    balancer.register("green", lettered(b'g'));
    let doors = [balancer.at("red"), balancer.at("green")];
    let mut users: Vec<_> = (0..USERS).map(|number| connect(doors[number % 2])).collect();
    for round in 0..2 {
        for (number, user) in users.iter_mut().enumerate() {
            assert_eq!(ask(user), b"rg"[number % 2], "user {number} in round {round}");
        }
    }
    assert_eq!(["red", "green"].map(|name| balancer.live(name)), [USERS / 2; 2]);
    balancer.stop();
}

#[test]
fn a_service_without_backends_turns_its_users_away_under_its_own_name() {
    let mut balancer = Balancer::start(Tcp, &["red", "green"]);
    balancer.register("red", lettered(b'r'));
    let green = balancer.plane.doors.open()[1].service;
    let mut user = connect(balancer.at("green"));
    assert!(matches!(user.read(&mut [0]), Ok(0) | Err(_)), "the other's backend is not asked");
    let why = wait_for("the refusal to be told", || {
        let mut ends = balancer.plane.ends.iter_mut();
        ends.find_map(|end| match end.reports.pop() {
            Ok(Report::Refused { service, why, .. }) if service == green => Some(why),
            _ => None,
        })
    });
    assert_eq!(why, Refusal::NoBackend);
    assert_eq!(ask(&mut connect(balancer.at("red"))), b'r');
    balancer.stop();
}

#[test]
fn a_service_may_have_several_doors_beside_a_built_in_one() {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let mut balancer = Balancer::start_with(|config| {
        config.listen.tcp = Some(any);
        let listen = vec![any, any];
        config.set_services(vec![ServiceConfig { listen, ..ServiceConfig::new("red", Tcp) }]);
    });
    balancer.register("tcp", lettered(b't'));
    balancer.register("red", lettered(b'r'));
    let built_in = balancer.plane.door(Tcp).unwrap();
    assert_eq!(balancer.doors("tcp"), [built_in]);
    assert_eq!(ask(&mut connect(built_in)), b't');
    let doors = balancer.doors("red");
    assert_eq!(doors.len(), 2);
    for door in doors {
        assert_eq!(ask(&mut connect(door)), b'r');
    }
    balancer.stop();
}

#[test]
fn every_door_closes_when_the_balancer_drains() {
    let mut balancer = Balancer::start(Tcp, &["red", "green"]);
    balancer.register("red", lettered(b'r'));
    balancer.register("green", lettered(b'g'));
    let doors = ["red", "green"].map(|name| balancer.at(name));
    let mut users: Vec<_> = (0..USERS).map(|number| connect(doors[number % 2])).collect();
    balancer.order(Order::Drain);
    wait_for("both doors to close", || {
        doors.iter().all(|door| TcpStream::connect(door).is_err()).then_some(())
    });
    for (number, user) in users.iter_mut().enumerate() {
        assert_eq!(ask(user), b"rg"[number % 2], "user {number} had been accepted");
    }
    balancer.stop();
}

#[test]
fn a_taken_door_is_told_with_its_service_and_the_cure() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap();
    let started = Balancer::try_start(|config| {
        let service = |name: &str, at: &str| ServiceConfig {
            listen: vec![at.parse().unwrap()],
            ..ServiceConfig::new(name, Tcp)
        };
        config.set_services(vec![service("red", "127.0.0.1:0"), service("green", &at.to_string())]);
    });
    let said = started.err().expect("the port is taken").to_string();
    let wanted = format!(
        "the green port {at} is taken by another program; stop it or choose another in [service.green]"
    );
    assert_eq!(said, wanted);
}
