//! A balancer with named services and three workers, and the test in the role of the control core.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use lb::boot::{DataPlane, Trouble};
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::config::services::ServiceConfig;
use lb::proxy::line::Features;
use lb::worker::link::Order;

use crate::wait::{PATIENCE, wait_for};

pub struct Balancer {
    pub plane: DataPlane,
    registered: Vec<Backend>,
}

impl Balancer {
    /// Services with these names, whose ids are 3, 4 and so on, and a door each. The built-in ones are
    /// off.
    pub fn start(protocol: Protocol, names: &[&str]) -> Balancer {
        Balancer::start_with(|config| {
            let service = |name: &&str| {
                let listen = vec!["127.0.0.1:0".parse().unwrap()];
                ServiceConfig { listen, ..ServiceConfig::new(name, protocol) }
            };
            config.set_services(names.iter().map(service).collect());
        })
    }

    pub fn start_with(change: impl FnOnce(&mut Config)) -> Balancer {
        Balancer::try_start(change).unwrap()
    }

    pub fn try_start(change: impl FnOnce(&mut Config)) -> Result<Balancer, Trouble> {
        let mut config = Config { workers: Some(3), ..Config::default() };
        (config.listen.tcp, config.listen.udp, config.listen.api) = (None, None, None);
        change(&mut config);
        let features = Features { receive_cap: true, splice: true };
        let plane = DataPlane::start(&config, 1000, features)?;
        Ok(Balancer { plane, registered: Vec::new() })
    }

    /// Where users of this service come in.
    pub fn at(&self, name: &str) -> SocketAddr {
        self.doors(name)[0]
    }

    pub fn doors(&self, name: &str) -> Vec<SocketAddr> {
        let of = self.plane.doors.open().iter().filter(|door| &*door.name == name);
        of.map(|door| door.address).collect()
    }

    pub fn service(&self, name: &str) -> ServiceId {
        let snapshot = self.plane.snapshots.current();
        snapshot.services.iter().find(|service| &*service.name == name).expect("it is known").id
    }

    /// Registers a backend, and waits until every worker knows it.
    pub fn register(&mut self, service: &str, address: SocketAddr) {
        self.register_as(service, address, |_| {});
    }

    /// The same in a group of the service.
    pub fn register_in(&mut self, service: &str, group: Option<&str>, address: SocketAddr) {
        self.register_as(service, address, |backend| backend.group = group.map(Into::into));
    }

    /// The same for one to which each connection begins with a PROXY header.
    pub fn register_introduced(&mut self, service: &str, address: SocketAddr) {
        self.register_as(service, address, |backend| backend.proxy = true);
    }

    /// The same for one that is changed before.
    pub fn register_as(
        &mut self,
        service: &str,
        address: SocketAddr,
        change: impl FnOnce(&mut Backend),
    ) {
        let number = self.registered.len();
        let service = self.service(service);
        let mut backend = Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(number as u32 + 1),
            slot: number as u16,
            service,
            address,
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        };
        change(&mut backend);
        self.registered.push(backend);
        let snapshots = &self.plane.snapshots;
        snapshots.publish(snapshots.current().with(&self.registered));
        self.let_workers_turn();
    }

    /// All backends have registered again, with or without a PROXY header.
    pub fn change_proxy(&mut self, proxy: bool) {
        self.registered.iter_mut().for_each(|backend| backend.proxy = proxy);
        let snapshots = &self.plane.snapshots;
        snapshots.publish(snapshots.current().with(&self.registered));
        self.let_workers_turn();
    }

    pub fn let_workers_turn(&self) {
        for end in &self.plane.ends {
            let before = end.metrics.counters.turns.get();
            wait_for("the worker to turn", || {
                end.wake.write(1).unwrap();
                (end.metrics.counters.turns.get() >= before + 2).then_some(())
            });
        }
    }

    /// How many sessions of this service are running.
    pub fn live(&self, name: &str) -> usize {
        let service = self.service(name);
        let all = self.plane.ends.iter().flat_map(|end| end.shard.iter());
        all.filter(|session| session.service == service).count()
    }

    pub fn order(&mut self, order: Order) {
        for end in &mut self.plane.ends {
            end.orders.push(order).unwrap();
            end.wake.write(1).unwrap();
        }
    }

    pub fn stop(mut self) {
        self.order(Order::Stop);
        self.plane.threads.join();
    }
}

/// A TCP backend that answers every byte with its letter.
pub fn lettered(letter: u8) -> SocketAddr {
    serve(move |mut connection| {
        let mut byte = [0];
        while let Ok(1) = connection.read(&mut byte) {
            if connection.write_all(&[letter]).is_err() {
                return;
            }
        }
    })
}

/// Serves every connection with `serve`, each in a thread of its own.
pub fn serve(serve: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(connection));
        }
    });
    address
}

/// A UDP backend that answers every datagram with its letter, and the datagram.
pub fn lettered_datagrams(letter: u8) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut bytes[1..]) {
            bytes[0] = letter;
            if socket.send_to(&bytes[..len + 1], from).is_err() {
                return;
            }
        }
    });
    address
}

pub fn connect(to: SocketAddr) -> TcpStream {
    let user = TcpStream::connect(to).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user.set_write_timeout(Some(PATIENCE)).unwrap();
    user
}

/// The letter of the backend that serves this user.
pub fn ask(user: &mut TcpStream) -> u8 {
    user.write_all(b"?").unwrap();
    let mut answer = [0];
    user.read_exact(&mut answer).unwrap();
    answer[0]
}
