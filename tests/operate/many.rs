//! Many services at once: 200 of all kinds with ten backends each. Each service reaches its own backends
//! and no others, all of them are shown, and who leaves is missed by its own service alone.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::harness::{Balancer, asked};
use crate::wait::{PATIENCE, wait_for};

const SERVICES: usize = 200;
const EACH: usize = 10;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Tcp,
    Udp,
    Api,
}

/// A service with the host that its backends are on.
#[derive(Clone, Copy)]
struct Service {
    number: usize,
    kind: Kind,
}

impl Service {
    fn all() -> Vec<Service> {
        let kinds = [Kind::Tcp, Kind::Api, Kind::Tcp, Kind::Api, Kind::Udp];
        (0..SERVICES).map(|number| Service { number, kind: kinds[number % kinds.len()] }).collect()
    }

    fn name(self) -> String {
        format!("s{}", self.number)
    }

    fn host(self) -> IpAddr {
        Ipv4Addr::new(127, 9, 0, self.number as u8 + 1).into()
    }

    fn settings(self) -> String {
        let (name, listen) = (self.name(), "listen = \"127.0.0.1:0\"");
        let (protocol, place) = match self.kind {
            Kind::Tcp => ("tcp", listen.to_owned()),
            Kind::Udp => ("udp", listen.to_owned()),
            Kind::Api => ("api", format!("hosts = [\"{name}.example\"]")),
        };
        format!("[service.{name}]\nprotocol = \"{protocol}\"\n{place}\n")
    }
}

/// What serves at a service's host: each port answers every user with the address that was reached.
struct Servers {
    tcp: Vec<u16>,
    api: Vec<u16>,
}

impl Servers {
    fn start() -> Servers {
        let ports = |serve: fn(TcpStream)| (0..EACH).map(|_| listen(serve)).collect();
        Servers { tcp: ports(tell), api: ports(answer) }
    }

    fn ports(&self, service: Service) -> Vec<u16> {
        match service.kind {
            Kind::Tcp => self.tcp.clone(),
            Kind::Api => self.api.clone(),
            Kind::Udp => datagrams(service.host()),
        }
    }
}

/// One port of all hosts.
fn listen(serve: fn(TcpStream)) -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    port
}

fn tell(mut stream: TcpStream) {
    let own = stream.local_addr().unwrap();
    // Whoever only tries the port has gone.
    let _ = stream.write_all(own.to_string().as_bytes());
}

fn answer(stream: TcpStream) {
    let own = stream.local_addr().unwrap().to_string();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{own}", own.len());
    let mut writer = stream.try_clone().unwrap();
    for line in BufReader::new(stream).lines() {
        match line {
            Ok(line) if line.is_empty() => drop(writer.write_all(head.as_bytes())),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

/// A port of this host that is nobody's on any other, and so no door of the balancer.
fn datagram_socket(host: IpAddr) -> UdpSocket {
    wait_for("a port of its own", || {
        let everywhere = UdpSocket::bind("0.0.0.0:0").ok()?;
        let port = everywhere.local_addr().ok()?.port();
        drop(everywhere);
        UdpSocket::bind((host, port)).ok()
    })
}

/// Ten ports of one host.
fn datagrams(host: IpAddr) -> Vec<u16> {
    let sockets: Vec<_> = (0..EACH).map(|_| datagram_socket(host)).collect();
    let ports = sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect();
    std::thread::spawn(move || {
        loop {
            let mut ready: Vec<_> =
                sockets.iter().map(|it| PollFd::new(it.as_fd(), PollFlags::POLLIN)).collect();
            poll(&mut ready, PollTimeout::NONE).unwrap();
            let ready: Vec<bool> = ready.iter().map(|it| it.any().unwrap_or(false)).collect();
            for (socket, _) in sockets.iter().zip(ready).filter(|(_, is_ready)| *is_ready) {
                let (_, user) = socket.recv_from(&mut [0; 8]).unwrap();
                let own = socket.local_addr().unwrap().to_string();
                socket.send_to(own.as_bytes(), user).unwrap();
            }
        }
    });
    ports
}

/// The control connection of one service's backends.
struct Registrar {
    service: Service,
    ports: Vec<u16>,
    lines: BufReader<TcpStream>,
}

impl Registrar {
    fn new(control: SocketAddr, service: Service, ports: Vec<u16>) -> Registrar {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(service.host(), 0).into()).unwrap();
        socket.connect(&control.into()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut registrar = Registrar { service, ports, lines: BufReader::new(socket.into()) };
        for place in 0..EACH {
            registrar.say("register", place);
        }
        for _ in 0..EACH {
            registrar.hear();
        }
        registrar
    }

    fn say(&mut self, cmd: &str, place: usize) {
        let (service, port) = (self.service.name(), self.ports[place]);
        let said = json!({ "cmd": cmd, "service": service, "port": port });
        self.lines.get_mut().write_all(format!("{said}\n").as_bytes()).unwrap();
    }

    fn hear(&mut self) {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        let heard: Value = serde_json::from_str(&line).expect(&line);
        assert_eq!(heard["ack"], "successful", "{line}");
        assert_eq!(heard["service"], self.service.name(), "{line}");
    }

    /// Where its backends are.
    fn addresses(&self) -> BTreeSet<String> {
        let address = |port: &u16| SocketAddr::new(self.service.host(), *port).to_string();
        self.ports.iter().map(address).collect()
    }
}

/// The backends that this many users of a service reach.
fn reached(service: Service, door: SocketAddr, users: usize) -> Vec<String> {
    match service.kind {
        Kind::Tcp => (0..users).map(|_| asked(door, b"")).collect(),
        Kind::Udp => asked_by_datagrams(door, users),
        Kind::Api => asked_by_request(door, &service.name(), users),
    }
}

/// By users of different ports: a port that was used before would go on with its session.
fn asked_by_datagrams(door: SocketAddr, users: usize) -> Vec<String> {
    let users: Vec<_> = (0..users).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let ask = |user: &UdpSocket| {
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        user.send_to(b"hello", door).unwrap();
        let mut bytes = [0; 64];
        let count = user.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    };
    users.iter().map(ask).collect()
}

/// Several requests on one connection.
fn asked_by_request(door: SocketAddr, name: &str, requests: usize) -> Vec<String> {
    let mut user = BufReader::new(TcpStream::connect(door).unwrap());
    user.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("GET / HTTP/1.1\r\nHost: {name}.example\r\n\r\n");
    let ask = |_| {
        user.get_mut().write_all(request.as_bytes()).unwrap();
        let mut length = 0;
        loop {
            let mut line = String::new();
            user.read_line(&mut line).unwrap();
            match line.trim_end().to_ascii_lowercase().split_once(": ") {
                Some(("content-length", bytes)) => length = bytes.parse().unwrap(),
                None if line == "\r\n" => break,
                _ => {}
            }
        }
        let mut body = vec![0; length];
        user.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    };
    (0..requests).map(ask).collect()
}

/// How many backends of each service serve, in the order of the services.
fn serving(status: &Value) -> Vec<usize> {
    let mut serving = vec![0; SERVICES];
    for backend in status["backends"].as_array().unwrap() {
        let number = backend["service"].as_str().unwrap().strip_prefix('s');
        if let Some(number) = number.filter(|_| backend["state"] == "serving") {
            serving[number.parse::<usize>().unwrap()] += 1;
        }
    }
    serving
}

#[test]
fn two_hundred_services_each_reach_their_own_ten_backends() {
    let services = Service::all();
    let tables: String = services.iter().map(|service| service.settings()).collect();
    // No hello comes between the answers.
    let settings = format!("health.interval_ms = 3600000\n{tables}");
    let balancer = Balancer::start_on_loopback(&settings, |_| {});
    let (control, servers) = (balancer.door("control"), Servers::start());
    let mut registrars: Vec<Registrar> = (services.iter())
        .map(|service| Registrar::new(control, *service, servers.ports(*service)))
        .collect();

    let status = balancer.status();
    assert_eq!(serving(&status), vec![EACH; SERVICES]);
    let rows = status["services"].as_array().unwrap();
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
    let doors: Vec<SocketAddr> = (services.iter())
        .map(|service| row(&service.name())["doors"][0].as_str().unwrap().parse().unwrap())
        .collect();
    for (registrar, door) in registrars.iter().zip(&doors) {
        // In turn: as many users as backends reach each of them once.
        let users = reached(registrar.service, *door, EACH);
        let met: BTreeSet<String> = users.into_iter().collect();
        assert_eq!(met, registrar.addresses(), "{}", registrar.service.name());
    }

    // One backend leaves, and with another service's connection all of its backends.
    registrars[1].say("unregister", 3);
    registrars[1].hear();
    let gone = registrars[1].ports.remove(3);
    let lost = registrars.remove(2).service;
    let mut left = vec![EACH; SERVICES];
    (left[1], left[lost.number]) = (EACH - 1, 0);
    wait_for("the status without those who left", || {
        (serving(&balancer.status()) == left).then_some(())
    });
    assert_eq!(asked(doors[lost.number], b""), "", "nobody is there for its users");
    let streams = registrars.iter().filter(|registrar| registrar.service.kind != Kind::Udp);
    for registrar in streams.take(10) {
        let users =
            reached(registrar.service, doors[registrar.service.number], registrar.ports.len());
        let met: BTreeSet<String> = users.into_iter().collect();
        assert_eq!(met, registrar.addresses(), "{} without {gone}", registrar.service.name());
    }
    let metrics = asked(balancer.door("admin"), b"GET /metrics HTTP/1.0\r\n\r\n");
    let counted = |start: &str| metrics.lines().filter(|line| line.starts_with(start)).count();
    let registered: usize = left.iter().sum();
    assert_eq!(counted("lb_backend_weight{backend=\"b") - counted_demos(&metrics), registered);
}

/// Backends that the demo has registered for the built-in services.
fn counted_demos(metrics: &str) -> usize {
    let of_demo = |line: &&str| {
        line.starts_with("lb_backend_weight{")
            && ["tcp", "udp", "api"]
                .iter()
                .any(|name| line.contains(&format!("service=\"{name}\"")))
    };
    metrics.lines().filter(of_demo).count()
}
