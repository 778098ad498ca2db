//! Sessions of users through handovers: no byte and no datagram is lost, doubled, reordered or another's.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::harness::{Backend, Balancer, echo_datagrams, echo_streams};
use crate::random::{Random, pattern};
use crate::wait::{PATIENCE, wait_for};

fn user(balancer: &Balancer) -> TcpStream {
    let user = TcpStream::connect(balancer.door("tcp")).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user.set_write_timeout(Some(PATIENCE)).unwrap();
    user.set_nodelay(true).unwrap();
    user
}

fn asks(user: &mut TcpStream, text: &[u8]) {
    user.write_all(text).unwrap();
    let mut answer = vec![0; text.len()];
    user.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text);
}

/// Users who say something and wait for it to come back, over and over.
fn talkers(
    balancer: &Balancer,
    count: usize,
    stop: &Arc<AtomicBool>,
    rounds: &Arc<AtomicU64>,
) -> JoinHandle<()> {
    let mut users: Vec<_> = (0..count).map(|_| user(balancer)).collect();
    let (stop, rounds) = (Arc::clone(stop), Arc::clone(rounds));
    thread::spawn(move || {
        let mut round = 0u64;
        while !stop.load(Ordering::Relaxed) {
            for (number, user) in users.iter_mut().enumerate() {
                let text = [round.to_le_bytes(), (number as u64).to_le_bytes()].concat();
                asks(user, &text);
            }
            round += 1;
            rounds.fetch_add(1, Ordering::Relaxed);
        }
    })
}

/// Says something without end and checks what comes back.
fn stream(user: TcpStream, seed: u64, most: u64, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let text = Arc::new(pattern(seed, 256 * 1024));
    let reader = {
        let (mut from, text) = (user.try_clone().unwrap(), Arc::clone(&text));
        thread::spawn(move || {
            let (mut bytes, mut place) = (vec![0; 64 * 1024], 0);
            loop {
                let count = from.read(&mut bytes).expect("nobody is reset");
                if count == 0 {
                    return place as u64;
                }
                for byte in &bytes[..count] {
                    assert_eq!(*byte, text[place % text.len()], "after {place}");
                    place += 1;
                }
            }
        })
    };
    let stop = Arc::clone(stop);
    thread::spawn(move || {
        let (mut to, mut place, mut random) = (user, 0, Random::new(seed));
        while !stop.load(Ordering::Relaxed) {
            let len = random.any_size(most) as usize;
            let at = place % text.len();
            let piece = &text[at..text.len().min(at + len)];
            to.write_all(piece).expect("nobody is reset");
            place += piece.len();
        }
        to.shutdown(Shutdown::Write).unwrap();
        assert_eq!(reader.join().unwrap(), place as u64);
        place as u64
    })
}

/// A user of datagrams, each of which comes back once and in order.
fn datagrams(
    balancer: &Balancer,
    count: usize,
    stop: &Arc<AtomicBool>,
    rounds: &Arc<AtomicU64>,
) -> JoinHandle<()> {
    let users: Vec<_> = (0..count)
        .map(|_| {
            let user = UdpSocket::bind("127.0.0.1:0").unwrap();
            user.connect(balancer.door("udp")).unwrap();
            user.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            user
        })
        .collect();
    let (stop, rounds) = (Arc::clone(stop), Arc::clone(rounds));
    thread::spawn(move || {
        let mut round = 0u64;
        while !stop.load(Ordering::Relaxed) {
            // Several are under way at any time.
            for burst in 0..3u64 {
                for user in &users {
                    user.send(&(3 * round + burst).to_le_bytes()).unwrap();
                }
            }
            for (number, user) in users.iter().enumerate() {
                for burst in 0..3u64 {
                    let mut answer = [0; 64];
                    let len = user
                        .recv(&mut answer)
                        .unwrap_or_else(|error| panic!("user {number} in round {round}: {error}"));
                    assert_eq!(answer[..len], (3 * round + burst).to_le_bytes());
                }
            }
            round += 1;
            rounds.fetch_add(1, Ordering::Relaxed);
        }
    })
}

/// Users who come, ask once and leave.
fn churn(balancer: &Balancer, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let (door, stop) = (balancer.door("tcp"), Arc::clone(stop));
    thread::spawn(move || {
        let mut served = 0;
        while !stop.load(Ordering::Relaxed) {
            let mut user = TcpStream::connect(door).expect("nobody is refused");
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            asks(&mut user, b"once");
            user.shutdown(Shutdown::Write).unwrap();
            assert_eq!(user.read(&mut [0; 8]).unwrap(), 0);
            served += 1;
        }
        served
    })
}

/// How many upgrades in a row; more are tried by hand.
fn upgrades() -> usize {
    std::env::var("LB_TEST_UPGRADES").ok().and_then(|it| it.parse().ok()).unwrap_or(6)
}

/// Hands over again and again, each time once `rounds` says that everybody has gone on, and then tells them to stop.
fn hand_over_often(balancer: &Balancer, stop: &AtomicBool, rounds: impl Fn() -> u64) {
    for _ in 0..upgrades() {
        let (before, old) = (rounds(), balancer.pid());
        let stall = balancer.upgrade();
        println!("nobody was served for {stall:.1} ms");
        wait_for("everybody to go on", || (rounds() > before + 2).then_some(()));
        balancer.wait_for_end(old);
    }
    stop.store(true, Ordering::Relaxed);
    let status = balancer.status();
    assert_eq!(status["handover"]["generation"], upgrades() as u64);
}

#[test]
fn upgrades_in_a_row_lose_no_byte() {
    let balancer = Balancer::start("workers = 1\n");
    let backend = Backend::register(&balancer, "tcp", echo_streams());
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::<AtomicU64>::default());
    let talkers = talkers(&balancer, 100, &stop, &rounds);
    let streams: Vec<_> = [2000, 5000, 128 * 1024, 128 * 1024]
        .into_iter()
        .enumerate()
        .map(|(seed, most)| stream(user(&balancer), seed as u64, most, &stop))
        .collect();
    let churn = churn(&balancer, &stop);
    hand_over_often(&balancer, &stop, || rounds.load(Ordering::Relaxed));
    talkers.join().unwrap();
    for stream in streams {
        assert!(stream.join().unwrap() > 0);
    }
    assert!(churn.join().unwrap() > 0);
    assert!(backend.is_connected(), "no backend had to come again");
    let status = balancer.status();
    let total = &status["backends"][0]["sessions_total"];
    assert!(total.as_u64().unwrap() > 100, "counters go on: {total}");
}

#[test]
fn upgrades_in_a_row_lose_no_datagram() {
    let balancer = Balancer::start("workers = 1\n");
    let backend = Backend::register(&balancer, "udp", echo_datagrams());
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::<AtomicU64>::default());
    let datagrams = datagrams(&balancer, 60, &stop, &rounds);
    hand_over_often(&balancer, &stop, || rounds.load(Ordering::Relaxed));
    datagrams.join().unwrap();
    assert!(backend.is_connected(), "no backend had to come again");
}
