//! API services with doors of their own.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use lb::cluster::Protocol::Api;
use lb::worker::link::Order;

use crate::harness::{Balancer, connect, serve};
use crate::wait::wait_for;

/// As many as leave none of three workers without a user.
const USERS: usize = 24;

/// A backend that answers every request with its letter in the field `Letter`.
pub fn lettered(letter: char) -> std::net::SocketAddr {
    serve(move |connection| {
        let mut reader = BufReader::new(&connection);
        while head(&mut reader).is_some() {
            let answer =
                format!("HTTP/1.1 200 OK\r\nLetter: {letter}\r\nContent-Length: 0\r\n\r\n");
            if (&connection).write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// The lines of a head; `None` at the end of the connection.
fn head(reader: &mut impl BufRead) -> Option<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => return Some(lines),
            line => lines.push(line.to_owned()),
        }
    }
}

/// The status, and the letter of the backend that served the request.
pub fn get(user: &TcpStream) -> (String, Option<String>) {
    let request = "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n";
    (&mut &*user).write_all(request.as_bytes()).unwrap();
    let lines = head(&mut BufReader::new(user)).unwrap();
    let letter = lines.iter().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("letter").then(|| value.to_owned())
    });
    (lines[0][9..12].to_owned(), letter)
}

#[test]
fn requests_are_served_by_the_service_whose_door_their_user_came_by() {
    let mut balancer = Balancer::start(Api, &["red", "green"]);
    balancer.register("red", lettered('r'));
    balancer.register("green", lettered('g'));
    let doors = ["red", "green"].map(|name| balancer.at(name));
    let users: Vec<_> = (0..USERS).map(|number| connect(doors[number % 2])).collect();
    // Later requests find connections to backends that others have left.
    for round in 0..4 {
        for (number, user) in users.iter().enumerate() {
            let letter = ["r", "g"][number % 2].to_owned();
            assert_eq!(get(user), ("200".into(), Some(letter)), "user {number}, round {round}");
        }
    }
    assert_eq!(["red", "green"].map(|name| balancer.live(name)), [USERS / 2; 2]);
    let idle = || -> u64 {
        let ends = balancer.plane.ends.iter();
        ends.map(|end| end.metrics.counters.api_upstream_idle.get()).sum()
    };
    wait_for("connections to backends to be kept", || (idle() > 0).then_some(()));
    balancer.stop();
}

#[test]
fn a_request_at_the_door_of_a_service_without_backends_is_answered_with_503() {
    let mut balancer = Balancer::start(Api, &["red", "green"]);
    balancer.register("red", lettered('r'));
    let (red, green) = (connect(balancer.at("red")), connect(balancer.at("green")));
    assert_eq!(get(&red).0, "200");
    assert_eq!(get(&green), ("503".into(), None));
    balancer.stop();
}

#[test]
fn every_api_door_closes_when_the_balancer_drains() {
    let mut balancer = Balancer::start(Api, &["red", "green"]);
    balancer.register("red", lettered('r'));
    let doors = ["red", "green"].map(|name| balancer.at(name));
    balancer.order(Order::Drain);
    wait_for("both doors to close", || {
        doors.iter().all(|door| TcpStream::connect(door).is_err()).then_some(())
    });
    balancer.stop();
}
