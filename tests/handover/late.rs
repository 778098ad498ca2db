//! API users with a request under way at a handover: it is answered by the old process as any other, and everything
//! after it by the new one, on the same connection.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Backend, Balancer};
use crate::random::Random;
use crate::requests::{Client, web};
use crate::wait::wait_for;

/// Requests for `/slow` wait until it is opened.
#[derive(Default)]
struct Gate {
    waiting: AtomicU64,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let is_open = self.is_open.lock().unwrap();
        drop(self.opened.wait_while(is_open, |is_open| !*is_open).unwrap());
    }

    fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn wait_for(&self, waiting: u64) {
        wait_for("slow requests", || {
            (self.waiting.load(Ordering::Relaxed) == waiting).then_some(())
        });
    }
}

/// Answers every request with nothing, `/slow` when the gate is open and `/some` after a few milliseconds.
fn gated(gate: &Arc<Gate>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, gate) = (listener.local_addr().unwrap().port(), Arc::clone(gate));
    thread::spawn(move || {
        for (seed, connection) in listener.incoming().flatten().enumerate() {
            let gate = Arc::clone(&gate);
            thread::spawn(move || answer(connection, &gate, Random::new(seed as u64)));
        }
    });
    port
}

fn answer(mut to: TcpStream, gate: &Gate, mut random: Random) -> Option<()> {
    to.set_nodelay(true).unwrap();
    let mut from = BufReader::new(to.try_clone().unwrap());
    loop {
        let (mut first, mut line) = (String::new(), String::new());
        from.read_line(&mut first).ok().filter(|count| *count > 0)?;
        while from.read_line(&mut line).ok()? > 2 {
            line.clear();
        }
        if first.starts_with("GET /slow ") {
            gate.pass();
        } else if first.starts_with("GET /some ") {
            thread::sleep(Duration::from_millis(random.any_size(20)));
        }
        to.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n0 0").ok()?;
    }
}

struct Scene {
    balancer: Balancer,
    backend: Backend,
    gate: Arc<Gate>,
}

impl Scene {
    fn new(settings: &str) -> Scene {
        let (balancer, gate) = (Balancer::start(settings), Arc::<Gate>::default());
        let backend = Backend::register(&balancer, "api", gated(&gate));
        wait_for("a backend", || {
            let status = balancer.status();
            (status["backends"].as_array().unwrap().len() == 1).then_some(())
        });
        Scene { balancer, backend, gate }
    }

    /// A user whose request is with the backend, the `number`-th.
    fn slow_user(&self, number: u64, ahead: &str) -> Client {
        let mut user = Client::new(&self.balancer);
        write!(user.to, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n{ahead}").unwrap();
        self.gate.wait_for(number);
        user
    }
}

#[track_caller]
fn goes_on(user: &mut Client) {
    assert_eq!(user.answer(), ("0 0".into(), true), "nobody is asked to come again");
}

#[test]
fn a_slow_request_is_answered_and_its_connection_goes_on() {
    let scene = Scene::new("workers = 1\n");
    let mut users: Vec<_> = (1..=5).map(|number| scene.slow_user(number, "")).collect();
    let old = scene.balancer.pid();
    scene.balancer.upgrade();
    assert!(std::fs::metadata(format!("/proc/{old}")).is_ok(), "it has requests");
    scene.gate.open();
    users.iter_mut().for_each(goes_on);
    let answered = Instant::now();
    scene.balancer.wait_for_end(old);
    let took = answered.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    for _ in 0..3 {
        assert!(users.iter_mut().all(Client::get));
    }
    let status = scene.balancer.status();
    assert_eq!(status["sessions"]["active"], 5);
    assert_eq!(status["sessions"]["started"], 5, "nobody had to come again");
    assert_eq!(status["backends"][0]["sessions_total"], 4 * 5, "each request is counted once");
    assert!(scene.backend.is_connected());
}

#[test]
fn requests_that_were_sent_ahead_go_along() {
    let scene = Scene::new("workers = 1\n");
    let request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    let (start, end) = request.split_at(20);
    let mut whole = scene.slow_user(1, &request.repeat(3));
    let mut half = scene.slow_user(2, &format!("{request}{start}"));
    let mut later = Client::new(&scene.balancer);
    later.to.write_all(start.as_bytes()).unwrap();
    wait_for("all of them", || (scene.balancer.status()["sessions"]["active"] == 3).then_some(()));
    let old = scene.balancer.pid();
    scene.balancer.upgrade();
    later.to.write_all(end.as_bytes()).unwrap();
    goes_on(&mut later);
    scene.gate.open();
    (0..4).for_each(|_| goes_on(&mut whole));
    (0..2).for_each(|_| goes_on(&mut half));
    scene.balancer.wait_for_end(old);
    half.to.write_all(end.as_bytes()).unwrap();
    goes_on(&mut half);
    assert!([&mut whole, &mut half, &mut later].into_iter().all(Client::get));
    assert_eq!(scene.balancer.status()["sessions"]["started"], 3);
}

#[test]
fn after_an_upload_the_connection_goes_on() {
    let balancer = Balancer::start("workers = 1\n");
    let _backend = Backend::register(&balancer, "api", web());
    let mut user = Client::new(&balancer);
    let mut body = vec![1u8; 4 << 20];
    write!(user.to, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len())
        .unwrap();
    user.to.write_all(&body[..1 << 20]).unwrap();
    let old = balancer.pid();
    balancer.upgrade();
    user.to.write_all(&body.split_off(1 << 20)).unwrap();
    let (answer, goes_on) = user.answer();
    assert!(goes_on && answer.starts_with("4194304 "), "{answer}");
    balancer.wait_for_end(old);
    assert!(user.get());
    assert_eq!(balancer.status()["sessions"]["started"], 1);
}

#[test]
fn users_with_requests_under_way_at_every_upgrade_never_come_again() {
    for workers in [1, 2] {
        let scene = Scene::new(&format!("workers = {workers}\n"));
        let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut users: Vec<_> = (0..40).map(|_| Client::new(&scene.balancer)).collect();
        thread::scope(|scope| {
            for user in &mut users {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        user.to.write_all(b"GET /some HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
                        goes_on(user);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..3 {
                let before = count.load(Ordering::Relaxed);
                let old = scene.balancer.pid();
                scene.balancer.upgrade();
                let more = || (count.load(Ordering::Relaxed) > before + 400).then_some(());
                wait_for("requests", more);
                scene.balancer.wait_for_end(old);
            }
            stop.store(true, Ordering::Relaxed);
        });
        let status = scene.balancer.status();
        assert_eq!(status["sessions"]["started"], 40);
        assert_eq!(status["backends"][0]["sessions_total"], count.load(Ordering::Relaxed));
        assert!(scene.backend.is_connected());
    }
}

#[test]
fn whoever_is_busy_through_two_upgrades_goes_on_in_the_last_process() {
    let scene = Scene::new("workers = 1\n");
    let mut user = scene.slow_user(1, "");
    let first = scene.balancer.pid();
    scene.balancer.upgrade();
    let second = scene.balancer.pid();
    scene.balancer.upgrade();
    scene.gate.open();
    goes_on(&mut user);
    scene.balancer.wait_for_end(first);
    scene.balancer.wait_for_end(second);
    assert!(user.get());
    let status = scene.balancer.status();
    assert_eq!(
        (&status["sessions"]["active"], &status["sessions"]["started"]),
        (&1.into(), &1.into())
    );
}
