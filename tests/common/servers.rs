//! Programs of others that tests put behind a balancer, once they answer.
#![allow(dead_code, reason = "each test needs a part of it")]

use std::net::{Ipv4Addr, TcpStream, UdpSocket};

use crate::process::{Folder, Process, free_port};
use crate::wait::wait_for;

/// Waits until somebody accepts connections at this port.
pub fn listening(port: u16) {
    wait_for("somebody to listen", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok());
}

pub fn free_udp_port() -> u16 {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port()
}

/// An authoritative server for `example` with these records, over UDP and TCP, and its port, at which it
/// `answers`.
pub fn knot(folder: &Folder, records: &str, answers: impl Fn(u16) -> bool) -> (Process, u16) {
    let zone = "$ORIGIN example.\n$TTL 60\n@ SOA ns admin 1 60 60 60 60\n@ NS ns\nns A 192.0.2.1\n";
    folder.write("example.zone", zone.to_owned() + records);
    let at = folder.path().to_str().unwrap();
    // It wants its port for TCP and UDP, and another program may take either first.
    for _ in 0..5 {
        let port = free_port();
        let settings = format!(
            "server:\n    rundir: {at}\n    listen: 127.0.0.1@{port}\n\
             database:\n    storage: {at}\n\
             zone:\n  - domain: example\n    storage: {at}\n    file: example.zone\n"
        );
        let server = Process::start("knotd", &["-c", &folder.write("knot.conf", &settings)]);
        if answers(port) {
            return (server, port);
        }
    }
    panic!("knotd answers on none of five ports");
}
