//! Many changes in one burst: all of them are answered, and nobody else is delayed. Measured by counting
//! what was done in between, not by the clock.

use std::io::Write;
use std::time::Duration;

use lb::cluster::{Protocol, ServiceId};
use lb::metrics::BACKENDS_MAX;
use serde_json::{Value, json};

use crate::harness::{Backend, Core, data_port};
use crate::wait::wait_for;

/// Requests to register these ports, one per line, with weights of every size.
fn registrations(protocol: Protocol, ports: impl Iterator<Item = u16>) -> String {
    ports
        .map(|port| {
            let weight = 1 + port % 256;
            let request =
                json!({"cmd": "register", "protocol": protocol, "port": port, "weight": weight});
            format!("{request}\n")
        })
        .collect()
}

/// Reads the answers to `count` requests. Hellos that arrive meanwhile are answered behind the requests,
/// as in any single stream: once all of those are `written`.
fn answers(backend: &mut Backend, count: usize, written: impl Fn() -> bool) -> Vec<Value> {
    let (mut answers, mut hellos) = (Vec::new(), 0);
    while answers.len() < count {
        let heard = backend.hear().expect("it is not disconnected");
        match heard.get("ack") {
            Some(_) => answers.push(heard),
            None => hellos += 1,
        }
        if written() {
            (0..std::mem::take(&mut hellos)).for_each(|_| backend.say("{\"ack\":\"hello\"}\n"));
        }
    }
    answers
}

fn number(core: &Core, metric: &str) -> u64 {
    let (_, text) = core.get("/metrics");
    let line = text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    line.expect(metric).parse().unwrap()
}

#[test]
fn as_many_registrations_at_once_as_there_is_room_for_pass_and_the_rest_are_refused_one_by_one() {
    let core = Core::start(|_| {});
    let mut agent = core.connect();
    let mut writer = agent.stream.try_clone().unwrap();
    let (first, room) = (10_000, BACKENDS_MAX as u16);
    let words = registrations(Protocol::Udp, first..first + room + 1_000);
    let all = std::thread::spawn(move || writer.write_all(words.as_bytes()));
    let answers = answers(&mut agent, BACKENDS_MAX + 1_000, || all.is_finished());
    all.join().unwrap().unwrap();
    for (answer, port) in answers.iter().zip(first..) {
        assert_eq!((&answer["cmd"], &answer["port"]), (&json!("register"), &json!(port)));
        let expected = if port < first + room { "successful" } else { "failed" };
        assert_eq!(answer["ack"], expected, "{answer}");
    }
    wait_for("the worker to look", || {
        let snapshot = core.worker.snapshot();
        let pool = snapshot.pool(ServiceId::built_in(Protocol::Udp)).unwrap();
        (pool.rotation.shares().len() == BACKENDS_MAX).then_some(())
    });
    let published = number(&core, "lb_control_snapshots_published_total");
    assert!(published <= BACKENDS_MAX as u64 / 2, "{published} publications for {BACKENDS_MAX}");
}

#[test]
fn the_health_page_is_served_between_the_registrations_of_a_burst() {
    for (agents, each) in [(1, 1_000), (50, 20)] {
        // On a busy machine we may ask too late to be served in between, but not every time.
        assert!((0..5).any(|_| a_health_page_came_between(agents, each)), "{agents} agents");
    }
}

fn a_health_page_came_between(agents: usize, each: u16) -> bool {
    let core = Core::start(|_| {});
    let mut agents: Vec<Backend> = (0..agents).map(|_| core.connect()).collect();
    for (agent, first) in agents.iter_mut().zip((10_000..).step_by(usize::from(each))) {
        agent.say(&registrations(Protocol::Udp, first..first + each));
    }
    let mut between = false;
    wait_for("everyone to be registered", || {
        core.get("/healthz");
        let registered = core.worker.backends().len();
        between |= (1..1000).contains(&registered);
        (registered == 1000).then_some(())
    });
    between
}

#[test]
fn trying_many_ports_in_turn_does_not_cost_a_backend_its_hellos() {
    let core = Core::start(|config| {
        config.health.interval = Duration::from_millis(50);
        config.health.timeout = Some(Duration::from_millis(50));
        config.health.misses = 2;
    });
    let services: Vec<_> = (0..300).map(|_| data_port()).collect();
    let mut agent = core.connect();
    agent.say(&registrations(Protocol::Tcp, services.iter().map(|(_, port)| *port)));
    // It answers no hello until it has an answer about every port.
    let heard = answers(&mut agent, 300, || false);
    assert!(heard.iter().all(|answer| answer["ack"] == "successful"));
    assert_eq!(agent.ask(&json!({"cmd": "list"}))["ack"], "successful");
}

#[test]
fn a_connection_that_ends_amid_its_requests_takes_its_backends_with_it() {
    let core = Core::start(|config| config.timeouts.connect = Duration::from_secs(600));
    // A port whose accept queue is full: a connection to it is left without an answer.
    let stuffed = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    stuffed.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    stuffed.listen(0).unwrap();
    let address = stuffed.local_addr().unwrap();
    let _queued: Vec<_> = std::iter::repeat_with(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&address);
        socket
    })
    .take(4)
    .collect();
    let mut agent = core.connect();
    agent.register(Protocol::Udp, 9);
    core.worker.wait_for_rotation(Protocol::Udp, &[9]);
    let port = address.as_socket().unwrap().port();
    agent.say(&registrations(Protocol::Tcp, std::iter::repeat_n(port, 20)));
    drop(agent);
    core.worker.wait_for_rotation(Protocol::Udp, &[]);
}
