//! Control connections that go from one core to the next, in one process: two cores share the sockets as two
//! processes would, by duplicates.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::*;
use crate::control::doors::UserDoors;
use crate::control::{Control, Listeners};

const PATIENCE: Duration = Duration::from_secs(20);
const SECRET: &str = "a secret for this test";

/// A core that runs, with the door that it shares with its successors.
struct House {
    core: Core,
    door: TcpListener,
    config: Config,
    workers: Vec<WorkerEnd>,
}

pub fn control(config: &Config, door: &TcpListener) -> (Control, Vec<WorkerEnd>) {
    let (ends, snapshots, workers) = links(config, 1);
    let listeners =
        Listeners { control: Some(door.try_clone().unwrap()), admin: None, socket: None };
    let control = Control {
        config: Arc::new(config.clone()),
        derived: Vec::new(),
        via: None,
        listeners,
        ends,
        snapshots,
        doors: UserDoors::default(),
        urgent: Arc::default(),
    };
    (control, workers)
}

impl House {
    fn start(config: Config) -> House {
        let door = TcpListener::bind("127.0.0.1:0").unwrap();
        let (control, workers) = control(&config, &door);
        let (hub, rest) = control.parts(Now::read());
        hub.borrow_mut().start(Now::read());
        let core = Core::new(&hub, &rest).unwrap();
        core.begin(Vec::new(), rest.listeners).unwrap();
        House { core, door, config, workers }
    }

    /// Another core takes everything up, after a stall.
    fn hand_over(self, stall: Duration) -> House {
        let House { core, door, config, .. } = self;
        let frozen = core.freeze(Now::read());
        let (legacy, sockets) = frozen.describe();
        let sockets = duplicates(&core, &sockets);
        std::thread::sleep(stall);
        let (control, workers) = control(&config, &door);
        let heir = control.inherit(&travelled(&legacy), sockets, Now::read()).unwrap();
        let _remains = frozen.leave(Now::read());
        assert!(core.hub.borrow().members.is_empty());
        House { core: heir.begin().unwrap(), door, config, workers }
    }

    /// The same, but it is called off.
    fn change_its_mind(self, stall: Duration) -> House {
        let frozen = self.core.freeze(Now::read());
        drop(frozen.describe());
        std::thread::sleep(stall);
        frozen.thaw(Now::read());
        self
    }

    async fn connect(&self) -> Backend {
        let stream = TcpStream::connect(self.door.local_addr().unwrap()).await.unwrap();
        Backend(BufReader::new(stream))
    }

    fn legacy(&self) -> Legacy {
        self.core.freeze(Now::read()).describe().0
    }

    /// Waits until the core has come so far.
    async fn until(&self, what: &str, is_so: impl Fn(&Legacy) -> bool) {
        let waiting = async {
            while !is_so(&self.legacy()) {
                tokio::task::yield_now().await;
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        };
        let over = tokio::time::timeout(PATIENCE, waiting).await;
        over.unwrap_or_else(|_| panic!("waiting for {what}: {:?}", self.legacy().connections));
    }

    fn ports(&self) -> Vec<u16> {
        let snapshot = &self.core.hub.borrow().snapshot;
        snapshot.backends().map(|it| it.address.port()).filter(|port| *port > 2).collect()
    }
}

/// The sockets that were described, as they would arrive elsewhere.
fn duplicates(core: &Core, described: &[RawFd]) -> Vec<OwnedFd> {
    let mut sockets = Vec::new();
    core.door.lines().each(|_, line| {
        assert_eq!(described[sockets.len()], line.stream.as_raw_fd());
        sockets.push(line.stream.duplicate().unwrap());
    });
    sockets
}

/// The backend's end of a connection.
struct Backend(BufReader<TcpStream>);

impl Backend {
    async fn say(&mut self, words: &str) {
        self.0.get_mut().write_all(words.as_bytes()).await.unwrap();
    }

    /// The next message that is no hello; those are answered.
    async fn hear(&mut self) -> serde_json::Value {
        loop {
            let heard = self.next().await;
            if heard["cmd"] != "hello" {
                return heard;
            }
            self.say("{\"ack\":\"hello\"}").await;
        }
    }

    async fn next(&mut self) -> serde_json::Value {
        let mut line = String::new();
        let read = tokio::time::timeout(PATIENCE, self.0.read_line(&mut line)).await;
        let read = read.expect("an answer in time").unwrap();
        assert!(read > 0 && line.ends_with('\n'), "a whole line, and no end: {line:?}");
        serde_json::from_str(&line).unwrap()
    }
}

/// Hands over or, every other time, changes its mind.
async fn disturbed(house: House, round: usize, stall: Duration) -> House {
    match round % 2 {
        0 => house.hand_over(stall),
        _ => house.change_its_mind(stall),
    }
}

fn register(port: u16) -> String {
    format!("{{\"cmd\":\"register\",\"protocol\":\"udp\",\"port\":{port},\"name\":\"n{port}\"}}\n")
}

#[test]
fn a_registration_that_is_interrupted_at_any_byte_goes_on() {
    tokio_uring::start(async {
        let mut house = House::start(config());
        let mut backends = Vec::new();
        let length = register(1_000).len();
        for cut in 0..=length {
            let port = 1_000 + cut as u16;
            let words = register(port);
            let mut backend = house.connect().await;
            backend.say(&words[..cut]).await;
            let said = |it: &format::Connection| {
                let framer = serde_json::to_value(&it.framer).unwrap();
                let half = framer["message"]
                    .as_str()
                    .map_or(0, |it| it.trim_end_matches('=').len() * 3 / 4);
                it.unheard.0.len() + if framer["state"] == "Inside" { half } else { 0 }
            };
            let is_read = |legacy: &Legacy| {
                let last = legacy.connections.last();
                let is_there = legacy.connections.len() == backends.len() + 1;
                is_there && (cut + 1 >= length || last.is_some_and(|it| said(it) == cut))
            };
            house.until("what was said so far", is_read).await;
            house = disturbed(house, cut, Duration::ZERO).await;
            backend.say(&words[cut..]).await;
            let answer = backend.hear().await;
            assert_eq!((&answer["ack"], &answer["port"]), (&"successful".into(), &port.into()));
            backends.push(backend);
        }
        assert_eq!(house.ports().len(), length + 1);
        for mut backend in backends {
            backend.say("{\"cmd\":\"services\"}").await;
            assert_eq!(backend.hear().await["ack"], "successful", "nobody has lost anything");
        }
        house.until("all to leave", |legacy| legacy.connections.is_empty()).await;
        house.core.hub.borrow_mut().publish();
        assert_eq!(house.ports(), [0; 0]);
    });
}

#[test]
fn a_proof_is_outstanding_half_said_or_given_and_holds_all_the_same() {
    let path = std::env::temp_dir().join(format!("lb-legacy-secret-{}", std::process::id()));
    std::fs::write(&path, SECRET).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut guarded = config();
    guarded.control.secret_file = Some(path.clone());
    tokio_uring::start(async {
        for round in 0..2 {
            let mut house = House::start(guarded.clone());
            let mut backend = house.connect().await;
            let nonce = backend.next().await["nonce"].as_str().unwrap().to_owned();
            house = disturbed(house, round, Duration::ZERO).await;
            let mac = crate::control::auth::mac(SECRET.as_bytes(), &nonce, "web-1");
            let proof = format!("{{\"cmd\":\"auth\",\"id\":\"web-1\",\"mac\":\"{mac}\"}}");
            backend.say(&proof[..50]).await;
            let began = |legacy: &Legacy| legacy.connections[0].framer != Default::default();
            house.until("half of the proof", began).await;
            house = disturbed(house, round, Duration::ZERO).await;
            backend.say(&proof[50..]).await;
            assert_eq!(backend.hear().await["ack"], "successful");
            house = disturbed(house, round, Duration::ZERO).await;
            backend.say(&register(1_000)).await;
            assert_eq!(backend.hear().await["ack"], "successful");
            let backend = &house.legacy().backends[2];
            assert_eq!(backend.name.as_deref(), Some("n1000"));
            let identity = house.legacy().connections[0].identity.clone().unwrap();
            assert_eq!((identity.name.as_str(), identity.keyrings), ("web-1", vec![None]));
        }
    });
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn no_hello_is_missed_for_a_stall_and_a_silent_peer_is_lost_as_before() {
    let mut config = config();
    config.health.interval = Duration::from_millis(30);
    config.health.timeout = Some(Duration::from_millis(300));
    config.health.misses = 1;
    tokio_uring::start(async {
        let mut house = House::start(config);
        let mut backend = house.connect().await;
        backend.say(&register(1_000)).await;
        assert_eq!(backend.hear().await["ack"], "successful");
        for round in 0..4 {
            while backend.next().await["cmd"] != "hello" {}
            let frozen = house.core.freeze(Now::read());
            drop(frozen.describe());
            // The answer comes while nobody listens, and is late by any clock.
            backend.0.get_ref().try_write(b"{\"ack\":\"hello\"}").unwrap();
            std::thread::sleep(Duration::from_millis(400));
            frozen.thaw(Now::read());
            while backend.next().await["cmd"] != "hello" {}
            backend.0.get_ref().try_write(b"{\"ack\":\"hello\"}").unwrap();
            house = disturbed(house, round, Duration::from_millis(400)).await;
        }
        assert_eq!(house.core.hub.borrow().counters.hellos_missed.get(), 0);
        house.until("the silent one to leave", |it| it.connections.is_empty()).await;
        assert_eq!(house.core.hub.borrow().counters.hellos_missed.get(), 1);
    });
}

#[test]
fn a_registration_whose_port_is_being_tried_is_tried_again() {
    tokio_uring::start(async {
        let mut house = House::start(config());
        // Whoever connects beyond the first waits until that is accepted.
        let port =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        port.bind(&address(0).into()).unwrap();
        port.listen(0).unwrap();
        let at = port.local_addr().unwrap().as_socket().unwrap();
        let _first = std::net::TcpStream::connect(at).unwrap();
        let mut backend = house.connect().await;
        let number = at.port();
        backend
            .say(&format!("{{\"cmd\":\"register\",\"protocol\":\"tcp\",\"port\":{number}}}"))
            .await;
        backend.say("{\"cmd\":\"list\",\"protocol\":\"udp\"}").await;
        let waits = |it: &Legacy| it.connections.first().is_some_and(|it| it.pending.len() == 2);
        house.until("the trial", waits).await;
        house = house.change_its_mind(Duration::ZERO).hand_over(Duration::ZERO);
        assert!(waits(&house.legacy()), "both are asked again, in order");
        let _accepted = port.accept().unwrap();
        for cmd in ["register", "list"] {
            let answer = backend.hear().await;
            assert_eq!((&answer["ack"], &answer["cmd"]), (&"successful".into(), &cmd.into()));
        }
    });
}

#[test]
fn what_is_queued_for_a_peer_and_half_of_a_list_reach_it_once() {
    tokio_uring::start(async {
        for round in 0..2 {
            let mut house = House::start(config());
            let mut backend = house.connect().await;
            house.until("the connection", |it| it.connections.len() == 1).await;
            let source = Source::Connection(house.legacy().connections[0].number);
            for port in 1_000..2_000 {
                let udp = ServiceId::built_in(Protocol::Udp);
                let change = Change::Register(join(source, udp, port));
                house.core.hub.borrow_mut().apply(change, Now::read()).unwrap();
            }
            house.core.hub.borrow_mut().publish();
            backend.say("{\"cmd\":\"list\",\"service\":\"udp\"}").await;
            // It goes on at every turn.
            let is_part = |it: &Legacy| it.connections[0].listing.is_some();
            while !is_part(&house.legacy()) {
                tokio::task::yield_now().await;
            }
            house = disturbed(house, round, Duration::ZERO).await;
            let mut listed = Vec::new();
            loop {
                let page = backend.hear().await;
                let backends = page["backends"].as_array().unwrap_or_else(|| panic!("{page}"));
                assert!(backends.iter().all(|it| it["own"] == true), "{page}");
                let addresses = backends.iter().map(|it| it["address"].as_str().unwrap());
                listed.extend(addresses.map(|it| it.parse::<SocketAddr>().unwrap().port()));
                if page["more"] != true {
                    break;
                }
            }
            assert_eq!(listed, (1_000..2_000).collect::<Vec<_>>());
            // Queued, and not a byte of it written yet.
            let id = house.core.hub.borrow().registry.of_source(source).next().unwrap().backend.id;
            let change = Change::Weigh { backend: id, weight: 7 };
            house.core.hub.borrow_mut().apply(change, Now::read()).unwrap();
            assert!(!house.legacy().connections[0].unsent.0.is_empty());
            house = disturbed(house, round, Duration::ZERO).await;
            let told = backend.hear().await;
            assert_eq!((&told["event"], &told["weight"]), (&"weight".into(), &7.into()));
            backend.say("{\"cmd\":\"services\"}").await;
            assert_eq!(backend.hear().await["cmd"], "services", "and nothing twice");
            drop(house);
        }
    });
}

#[test]
fn who_comes_while_it_stands_still_is_served_by_the_heir_and_who_goes_is_missed() {
    tokio_uring::start(async {
        let house = House::start(config());
        let mut staying = house.connect().await;
        let mut going = house.connect().await;
        staying.say(&register(1_000)).await;
        going.say(&register(1_001)).await;
        assert_eq!(staying.hear().await["ack"], "successful");
        assert_eq!(going.hear().await["ack"], "successful");
        let frozen = house.core.freeze(Now::read());
        let (legacy, sockets) = frozen.describe();
        let sockets = duplicates(&house.core, &sockets);
        let newcomer = std::net::TcpStream::connect(house.door.local_addr().unwrap()).unwrap();
        drop(going);
        let (control, workers) = control(&house.config, &house.door);
        let heir = control.inherit(&travelled(&legacy), sockets, Now::read()).unwrap();
        frozen.leave(Now::read());
        let House { door, config, .. } = house;
        let house = House { core: heir.begin().unwrap(), door, config, workers };
        newcomer.set_nonblocking(true).unwrap();
        let mut newcomer = Backend(BufReader::new(TcpStream::from_std(newcomer).unwrap()));
        newcomer.say(&register(1_002)).await;
        assert_eq!(newcomer.hear().await["ack"], "successful");
        house.until("the one that has gone", |it| it.connections.len() == 2).await;
        house.core.hub.borrow_mut().publish();
        assert_eq!(house.ports(), [1_000, 1_002]);
        let accepted = house.core.hub.borrow().counters.connections_accepted.get();
        assert_eq!(accepted, 3, "two by the one, and one by the other");
        assert_eq!(house.core.hub.borrow().counters.connections_active.get(), 2);
        drop(house.workers);
    });
}

#[test]
fn what_has_been_left_tells_no_backend_anything_and_says_what_it_counts() {
    tokio_uring::start(async {
        let house = House::start(config());
        let mut backend = house.connect().await;
        backend.say(&register(1_000)).await;
        assert_eq!(backend.hear().await["ack"], "successful");
        let frozen = house.core.freeze(Now::read());
        let (legacy, sockets) = frozen.describe();
        let sockets = duplicates(&house.core, &sockets);
        let (control, _workers) = control(&house.config, &house.door);
        let heir = control.inherit(&legacy, sockets, Now::read()).unwrap();
        let new = heir.begin().unwrap();
        let mut remains = frozen.leave(Now::read());
        remains.tell(|it| {
            assert_eq!(it.counts.workers[0], counts::Worker::default(), "nothing yet");
            true
        });
        let slot = legacy.backends.iter().find(|it| it.connection.is_some()).unwrap().slot;
        let metrics = &house.workers[0].metrics;
        metrics.backends[usize::from(slot)].active.set(1);
        metrics.counters.sessions_active.set(1);
        metrics.counters.bytes_up.add(40);
        for _ in 0..3 {
            let outcome = house.core.hub.borrow_mut().tick(Now::read());
            assert!(!outcome.done && outcome.revive.is_empty());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        remains.tell(|_| false);
        let mut news = News::default();
        remains.tell(|it| {
            news = serde_json::from_slice(&serde_json::to_vec(it).unwrap()).unwrap();
            new.hear(&news).is_ok()
        });
        assert_eq!(news.counts.services, [], "nothing was counted there");
        let id = BackendId(news.sessions[0].0);
        assert_eq!((news.sessions.len(), new.hub.borrow().sessions_on(id)), (1, 1));
        assert_eq!(new.hub.borrow().workers.sum(|it| it.bytes_up.get()), 40);
        metrics.backends[usize::from(slot)].active.set(0);
        metrics.counters.sessions_active.set(0);
        metrics.counters.turns.add(2);
        remains.tell(|it| new.hear(it).is_ok());
        assert_eq!(new.hub.borrow().sessions_on(id), 0);
        assert_eq!(
            new.hub.borrow().workers.sum(|it| it.bytes_up.get()),
            40,
            "counted once, although it was not heard the first time"
        );
        let mut is_done = false;
        for _ in 0..3 {
            metrics.counters.turns.add(2);
            is_done |= house.core.hub.borrow_mut().tick(Now::read()).done;
        }
        assert!(is_done, "it goes when nobody is left");
        backend.say("{\"cmd\":\"services\"}").await;
        assert_eq!(backend.hear().await["cmd"], "services");
    });
}

#[test]
fn sockets_that_are_none_of_connections_are_refused() {
    tokio_uring::start(async {
        let house = House::start(config());
        let mut backend = house.connect().await;
        backend.say("{\"cmd\":\"list\"}").await;
        backend.hear().await;
        let legacy = house.legacy();
        let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let datagrams = || OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        for sockets in
            [vec![], vec![listener()], vec![datagrams()], vec![file()], vec![file(), file()]]
        {
            let (control, _workers) = control(&house.config, &house.door);
            let refused = control.inherit(&legacy, sockets, Now::read());
            let said = refused.err().expect("that is no connection");
            assert!(said.contains("socket"), "{said}");
        }
        backend.say("{\"cmd\":\"list\"}").await;
        assert_eq!(backend.hear().await["cmd"], "list", "nobody has noticed anything");
    });
}
