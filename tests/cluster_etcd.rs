//! Three balancers that share one registry in a real etcd of three members, in a network namespace of their own. Shows
//! what `tests/share_sim` cannot: that etcd is as the model says, and how long things take. Needs root and Debian's
//! etcd-server and etcd-client.
//!
//! Times are printed. They are held against generous bounds, since a busy machine is no fault of the balancer.

#[path = "cluster_etcd/members.rs"]
mod members;
#[path = "common/process.rs"]
mod process;
#[path = "common/wait.rs"]
mod wait;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use members::{Etcd, client_of};
use nix::sys::signal::Signal;
use process::{Folder, Process};
use socket2::{Domain, SockAddr, Socket, Type};
use wait::wait_for;

const NODES: usize = 3;
/// Where backends are.
const HOST: [u8; 4] = [10, 77, 0, 9];
const SECRET: &str = "a secret of the cluster in the tests";

/// Runs in a new network namespace, which the threads and programs started there inherit.
fn in_a_network(run: impl FnOnce() + Send) {
    let run = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("only root may");
        ip("link set lo up");
        (1..=9).for_each(|host| ip(&format!("addr add 10.77.0.{host}/32 dev lo")));
        run();
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap());
}

fn ip(what: &str) {
    let done = Command::new("ip").args(what.split(' ')).status().expect("iproute2 is installed");
    assert!(done.success(), "ip {what}");
}

/// A balancer.
struct Balancer {
    number: usize,
    process: Option<Process>,
    file: String,
    /// For operators.
    socket: String,
}

impl Balancer {
    fn new(folder: &Folder, number: usize) -> Balancer {
        let endpoints: Vec<String> =
            (0..NODES).map(|at| format!("\"{}\"", client_of((number + at) % NODES))).collect();
        let secret = folder.write("secret", SECRET);
        Command::new("chmod").args(["600", &secret]).status().unwrap();
        let (at, endpoints) = (number + 1, endpoints.join(", "));
        let socket = folder.path().join(format!("admin{at}.sock")).display().to_string();
        let text = format!(
            "workers = 1\n[listen]\ntcp = \"10.77.0.{at}:8081\"\nudp = \"off\"\napi = \"off\"\n\
             control = \"10.77.0.{at}:8080\"\nadmin = \"10.77.0.{at}:8084\"\n\
             [admin]\nsocket = \"{socket}\"\n[control]\nallow = [\"10.77.0.0/16\"]\n[balance]\npolicy = \"source_hash\"\nhash = \"address_port\"\n\
             [limits]\nsessions = 2000\n[log]\nlevel = \"warn\"\n\
             [cluster]\nname = \"test\"\nnode = \"n{at}\"\nendpoints = [{endpoints}]\nsecret_file = \"{secret}\"\n"
        );
        let file = folder.write(&format!("lb{at}.toml"), text);
        let mut balancer = Balancer { number, process: None, file, socket };
        balancer.start();
        balancer
    }

    fn start(&mut self) {
        let program = env!("CARGO_BIN_EXE_lb");
        self.process = Some(Process::start(program, &["serve", "--config", &self.file]));
        wait_for("the balancer to be there", || self.get("/healthz"));
    }

    fn at(&self, port: u16) -> SocketAddr {
        ([10, 77, 0, self.number as u8 + 1], port).into()
    }

    fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.at(8084)).ok()?;
        let host = self.at(8084);
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (_, body) = text.split_once("\r\n\r\n")?;
        Some(body.to_owned())
    }

    /// Ports of the backends that it gives users to, and their state.
    fn backends(&self) -> BTreeMap<u16, String> {
        self.registered().into_iter().map(|(address, state)| (address.port(), state)).collect()
    }

    /// The backends that it gives users to, and their state.
    fn registered(&self) -> Vec<(SocketAddr, String)> {
        let body = wait_for("the status", || self.get("/status"));
        let start = body.find('{').expect("it is JSON");
        let end = body.rfind('}').expect("it is JSON");
        let status: serde_json::Value =
            serde_json::from_str(&body[start..=end]).expect("it is JSON");
        let all = status["backends"].as_array().expect("a list").iter();
        let one = |it: &serde_json::Value| {
            let address: SocketAddr = it["address"].as_str()?.parse().ok()?;
            Some((address, it["state"].as_str()?.to_owned()))
        };
        all.filter_map(one).filter(|(_, state)| state != "gone").collect()
    }

    /// Who answers a user that comes from this port.
    fn answer(&self, from: u16) -> Option<u16> {
        self.try_answer(from).ok()
    }

    fn try_answer(&self, from: u16) -> std::io::Result<u16> {
        loop {
            match self.ask(from) {
                // The connection before it from the same port is not quite gone.
                Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable => {
                    thread::sleep(Duration::from_millis(1));
                }
                outcome => return outcome,
            }
        }
    }

    fn ask(&self, from: u16) -> std::io::Result<u16> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        let from = SocketAddr::from(([10, 77, 0, 8], from));
        socket.bind(&SockAddr::from(from))?;
        socket.connect_timeout(&SockAddr::from(self.at(8081)), Duration::from_secs(5))?;
        // So that the same port can be used again at once.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"who\n")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        line.trim().parse().map_err(std::io::Error::other)
    }
}

/// Backends that say on which port they serve, for as long as the user stays.
fn serve(port: u16) -> SocketAddr {
    let listener = TcpListener::bind(SocketAddr::from((HOST, port))).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut reader = BufReader::new(&stream);
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|count| count > 0) {
                    let _ = writeln!(&stream, "{}", address.port());
                    line.clear();
                }
            });
        }
    });
    address
}

/// A control connection, whose hellos are answered.
struct Control {
    stream: TcpStream,
    lines: std::sync::mpsc::Receiver<String>,
    _reader: JoinHandle<()>,
}

impl Control {
    fn open(balancer: &Balancer) -> Control {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::from(SocketAddr::from((HOST, 0)))).unwrap();
        socket.connect(&SockAddr::from(balancer.at(8080))).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).unwrap();
        let (tell, lines) = std::sync::mpsc::channel();
        let mut answers = stream.try_clone().unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let reader = thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                if line.contains("\"cmd\":\"hello\"") {
                    let _ = answers.write_all(b"{\"ack\":\"hello\"}\n");
                } else if tell.send(line).is_err() {
                    return;
                }
            }
        });
        Control { stream, lines, _reader: reader }
    }

    fn say(&mut self, cmd: &str, port: u16, more: &str) {
        writeln!(self.stream, "{{\"cmd\":\"{cmd}\",\"protocol\":\"tcp\",\"port\":{port}{more}}}")
            .unwrap();
    }

    fn hear(&self, what: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(60)).expect(what);
            if line.contains(what) {
                return line;
            }
        }
    }

    fn register(&mut self, port: u16) {
        self.say("register", port, "");
        let line = self.hear("\"register\"");
        assert!(line.contains("successful"), "{line}");
    }
}

struct Scene {
    etcd: Etcd,
    balancers: Vec<Balancer>,
    _folder: Folder,
}

impl Scene {
    fn new() -> Scene {
        let (etcd, folder) = (Etcd::start(), Folder::new("cluster"));
        let balancers = (0..NODES).map(|number| Balancer::new(&folder, number)).collect();
        let scene = Scene { etcd, balancers, _folder: folder };
        wait_for("three balancers in etcd", || (scene.count("node") == NODES).then_some(()));
        scene
    }

    fn count(&self, kind: &str) -> usize {
        let prefix = format!("/lb/test/1/{kind}/");
        let keys = self.etcd.ask(&["get", "--prefix", "--keys-only", &prefix]);
        keys.map_or(0, |keys| keys.lines().filter(|line| !line.is_empty()).count())
    }

    /// Waits until all balancers know exactly these; returns how long that took.
    fn agree(&self, ports: &[u16]) -> Duration {
        let begun = Instant::now();
        for balancer in &self.balancers {
            wait_for("all to know the same", || {
                let known = balancer.backends();
                let serves = known.values().all(|state| state == "serving");
                (serves && known.keys().eq(ports)).then_some(())
            });
        }
        begun.elapsed()
    }
}

/// Users of all balancers who come again and again, each with a port of its own.
struct Load {
    is_over: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    moved: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn begin(scene: &Scene) -> Load {
        let [asked, refused, moved] = [(); 3].map(|()| Arc::new(AtomicU64::new(0)));
        let is_over = Arc::new(AtomicBool::new(false));
        let mut load = Load { is_over, asked, refused, moved, threads: Vec::new() };
        for number in 0..NODES {
            let balancer =
                Balancer { number, process: None, file: String::new(), socket: String::new() };
            let (is_over, asked) = (Arc::clone(&load.is_over), Arc::clone(&load.asked));
            let (refused, moved) = (Arc::clone(&load.refused), Arc::clone(&load.moved));
            let homes: Vec<(u16, u16)> = (0..20)
                .map(|user| 20_000 + 1000 * number as u16 + user)
                .map(|from| (from, scene.balancers[number].answer(from).expect("it is served")))
                .collect();
            load.threads.push(thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    for (from, home) in &homes {
                        asked.fetch_add(1, Ordering::Relaxed);
                        match balancer.try_answer(*from) {
                            Err(error) => {
                                eprintln!("refused: {error}");
                                refused.fetch_add(1, Ordering::Relaxed)
                            }
                            Ok(other) => {
                                moved.fetch_add(u64::from(other != *home), Ordering::Relaxed)
                            }
                        };
                        thread::sleep(Duration::from_millis(5));
                    }
                }
            }));
        }
        load
    }

    fn end(self, what: &str) {
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        let [asked, refused, moved] =
            [self.asked, self.refused, self.moved].map(|count| count.load(Ordering::Relaxed));
        eprintln!("{what}: {asked} users, {refused} refused, {moved} moved");
        assert!(asked > 0 && refused == 0 && moved == 0, "{what}");
    }
}

#[test]
#[ignore = "needs root and etcd"]
fn who_registers_at_one_balancer_is_served_by_all() {
    in_a_network(|| {
        let scene = Scene::new();
        let mut times = Vec::new();
        let mut control = Control::open(&scene.balancers[0]);
        for round in 0..50u16 {
            let port = 9001 + round;
            serve(port);
            let begun = Instant::now();
            control.register(port);
            for (number, balancer) in scene.balancers.iter().enumerate() {
                let from = 30_000 + 10 * round + number as u16;
                wait_for("the first user", || balancer.answer(from).filter(|it| *it == port));
            }
            times.push(begun.elapsed());
            control.say("unregister", port, "");
            control.hear("\"unregister\"");
            scene.agree(&[]);
        }
        times.sort();
        let (middle, late) = (times[times.len() / 2], times[times.len() - 1]);
        let slow = &times[times.len() - 5..];
        eprintln!("registered at one, first users through all: p50 {middle:?}, slowest {slow:?}");
        assert!(late < Duration::from_secs(3), "{late:?}");
        // Many at once, over connections of which each may make so many changes in a second.
        let mut controls: Vec<Control> =
            (0..50).map(|_| Control::open(&scene.balancers[0])).collect();
        let ports: Vec<u16> = (10_000..11_000).collect();
        let begun = Instant::now();
        for (place, port) in ports.iter().enumerate() {
            controls[place % 50].say("register", *port, ",\"probe\":false");
        }
        wait_for("all to have registered", || {
            (scene.balancers[0].backends().len() == ports.len()).then_some(())
        });
        let here = begun.elapsed();
        scene.agree(&ports);
        eprintln!(
            "1,000 at once: known there after {here:?}, everywhere after {:?}",
            begun.elapsed()
        );
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn users_notice_nothing_of_whatever_befalls_etcd() {
    in_a_network(|| {
        let mut scene = Scene::new();
        let ports: Vec<u16> = (9001..9011).collect();
        let mut controls: Vec<Control> = scene.balancers.iter().map(Control::open).collect();
        for (place, port) in ports.iter().enumerate() {
            serve(*port);
            controls[place % NODES].register(*port);
        }
        scene.agree(&ports);
        let homes = |scene: &Scene, number: usize| -> Vec<Option<u16>> {
            (0..200).map(|user| scene.balancers[number].answer(40_000 + user)).collect()
        };
        let first = homes(&scene, 0);
        assert!((1..NODES).all(|number| homes(&scene, number) == first), "all choose alike");

        let pause: u64 = std::env::var("LB_ETCD_PAUSE").map_or(20, |text| text.parse().unwrap());
        let load = Load::begin(&scene);
        scene.etcd.signal(Signal::SIGSTOP);
        thread::sleep(Duration::from_secs(pause));
        scene.etcd.signal(Signal::SIGCONT);
        let back = Instant::now();
        wait_for("their words in etcd", || (scene.count("back") == ports.len()).then_some(()));
        eprintln!("paused for {pause} s, all written again after {:?}", back.elapsed());
        scene.agree(&ports);
        load.end("etcd paused");

        let load = Load::begin(&scene);
        (0..NODES).for_each(|number| scene.etcd.kill(number));
        thread::sleep(Duration::from_secs(3));
        (0..NODES).for_each(|number| scene.etcd.begin(number));
        wait_for("etcd to be back", || scene.etcd.ask(&["endpoint", "health"]));
        scene.agree(&ports);
        load.end("etcd killed and started");

        let load = Load::begin(&scene);
        scene.etcd.ask(&["del", "--prefix", "/lb/"]).expect("it is deleted");
        let gone = Instant::now();
        wait_for("their words in etcd", || (scene.count("back") == ports.len()).then_some(()));
        eprintln!("prefix deleted, all written again after {:?}", gone.elapsed());
        scene.agree(&ports);
        load.end("prefix deleted");

        let load = Load::begin(&scene);
        let leader = scene.etcd.leader();
        scene.etcd.kill(leader);
        let begun = Instant::now();
        serve(9050);
        controls[leader].say("register", 9050, "");
        let more: Vec<u16> = ports.iter().copied().chain([9050]).collect();
        scene.agree(&more);
        eprintln!("leader killed, a registration known everywhere after {:?}", begun.elapsed());
        load.end("leader killed");
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn a_drain_is_one_everywhere_and_its_sessions_are_counted_exactly() {
    in_a_network(|| {
        let scene = Scene::new();
        let address = serve(9001);
        let mut control = Control::open(&scene.balancers[0]);
        control.register(9001);
        scene.agree(&[9001]);
        let mut users: Vec<TcpStream> = Vec::new();
        for (number, balancer) in scene.balancers.iter().enumerate() {
            for _ in 0..=number {
                let mut user = TcpStream::connect(balancer.at(8081)).unwrap();
                user.write_all(b"who\n").unwrap();
                let mut line = String::new();
                BufReader::new(&user).read_line(&mut line).unwrap();
                assert_eq!(line.trim(), address.port().to_string());
                users.push(user);
            }
        }
        control.say("drain", 9001, ",\"deadline_ms\":60000");
        let sum = format!("\"left\":{}", users.len());
        control.hear(&sum);
        for balancer in &scene.balancers {
            wait_for("it to drain everywhere", || {
                (balancer.backends().get(&9001)? == "draining").then_some(())
            });
        }
        while let Some(user) = users.pop() {
            drop(user);
            if !users.is_empty() {
                control.hear(&format!("\"left\":{},", users.len()));
            }
        }
        let line = control.hear("\"drained\"");
        assert!(!line.contains("\"cut\""), "none was ended: {line}");
        scene.agree(&[]);
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn an_operator_may_ask_any_balancer() {
    in_a_network(|| {
        let scene = Scene::new();
        serve(9001);
        let mut control = Control::open(&scene.balancers[0]);
        control.register(9001);
        scene.agree(&[9001]);
        let operate = |at: usize, verb: &str, more: &[&str]| {
            let socket = &scene.balancers[at].socket;
            let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
            command.args([verb, "b1"]).args(more).args(["--admin", socket]);
            let done = command.output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        operate(1, "drain", &["--within", "never"]);
        for balancer in &scene.balancers {
            wait_for("it to drain everywhere", || {
                (balancer.backends().get(&9001)? == "draining").then_some(())
            });
        }
        assert!(control.hear("\"draining\"").contains("\"by\":\"operator\""));
        operate(2, "undrain", &[]);
        scene.agree(&[9001]);
        operate(2, "weight", &["7"]);
        control.hear("\"weight\":7");
    });
}

#[test]
#[ignore = "needs root and etcd"]
fn a_backend_registers_at_the_next_balancer_when_its_own_has_died() {
    in_a_network(|| {
        let mut scene = Scene::new();
        let program = env!("CARGO_BIN_EXE_lb");
        let lb = scene.balancers[0].at(8080).to_string();
        let stays = ["backend", "--protocol", "tcp", "--port", "0", "--echo", "--lb", &lb];
        let _backend = Process::start(program, &stays);
        for balancer in &scene.balancers {
            wait_for("it to be served", || (balancer.registered().len() == 1).then_some(()));
        }
        let begun = Instant::now();
        scene.balancers[0].process = None;
        // The balancer that it registers at sees it at another address, as all of them are on one host here.
        let [_, second, third] = &scene.balancers[..] else { panic!("three balancers") };
        wait_for("it to have registered elsewhere", || {
            (second.registered().len() == 2).then_some(())
        });
        eprintln!("its balancer has died: registered at another after {:?}", begun.elapsed());
        for balancer in [second, third] {
            wait_for("the other one to be gone", || {
                (balancer.registered().len() == 1).then_some(())
            });
        }
        eprintln!("and known nowhere else after {:?}", begun.elapsed());
        let keys = || (scene.count("node") == NODES - 1 && scene.count("back") == 1).then_some(());
        wait_for("its words to be gone", keys);
        let checked =
            Command::new(program).args(["check", "--config", &scene.balancers[0].file]).output();
        let said = String::from_utf8(checked.unwrap().stdout).unwrap();
        assert!(said.contains("test, as n1; what is written is sealed"), "{said}");
        assert_eq!(said.matches(": version 3.").count(), NODES, "{said}");
        let admin = scene.balancers[1].at(8084).to_string();
        let told = Command::new(program).args(["cluster", "status", "--admin", &admin]).output();
        let told = String::from_utf8(told.unwrap().stdout).unwrap();
        assert!(
            told.contains("store live") && told.contains("n3~") && !told.contains("differs"),
            "{told}"
        );
        let health = |at: usize| {
            let admin = scene.balancers[at].at(8084).to_string();
            Command::new(program)
                .args(["health", "--admin", &admin])
                .output()
                .unwrap()
                .status
                .code()
        };
        assert_eq!([health(1), health(0)], [Some(0), Some(2)]);
    });
}
