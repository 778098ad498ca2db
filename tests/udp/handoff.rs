//! Flows that the kernel delivers to a worker other than the one that runs their session.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::harness::{Backend, Balancer, ask, expect_segments, receive, send_segments, user};
use crate::wait::{PATIENCE, wait_for};

/// Sockets that join the workers' group at the door, so that the kernel distributes the flows anew.
fn strangers_at(door: SocketAddr, count: usize) -> Vec<UdpSocket> {
    let stranger = || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&door.into()).unwrap();
        socket.into()
    };
    (0..count).map(|_| stranger()).collect()
}

/// The answer to the datagram just sent; `None` if the kernel delivered that to a stranger.
fn answer_unless_astray(
    user: &UdpSocket,
    strangers: &[UdpSocket],
) -> Option<(Vec<u8>, SocketAddr)> {
    user.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let answer = wait_for("a reply, or a stranger to receive the datagram", || {
        let astray = strangers.iter().any(|stranger| stranger.recv(&mut [0; 8]).is_ok());
        if astray { Some(None) } else { receive(user).ok().map(Some) }
    });
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    answer
}

#[test]
fn flows_keep_their_session_when_the_kernel_hands_them_to_other_workers() {
    const USERS: usize = 300;
    // Answers with the question and the port it came from, by which a backend tells users apart.
    let backend = || {
        Backend::start_seeing("127.0.0.1:0", |datagram, from| {
            vec![[datagram, format!(" from {}", from.port()).as_bytes()].concat()]
        })
    };
    let backends: Vec<Backend> = (0..4).map(|_| backend()).collect();
    // Three workers, because that is no power of two.
    let mut balancer = Balancer::start(|config| config.workers = Some(3));
    balancer.register_udp(&backends.iter().map(|backend| backend.at).collect::<Vec<_>>());
    let users: Vec<UdpSocket> = (0..USERS).map(|_| user()).collect();
    let ask_as = |number: usize| ask(&users[number], balancer.at(), &number.to_le_bytes());
    let known: Vec<Vec<u8>> = (0..USERS).map(ask_as).collect();
    let passed = || balancer.sum(|counters| counters.udp_datagrams_passed.get());
    let busy =
        balancer.plane.ends.iter().filter(|end| end.metrics.counters.sessions_active.get() > 0);
    assert_eq!(busy.count(), 3, "every worker has users");
    for _ in 0..3 {
        assert!((0..USERS).all(|number| ask_as(number) == known[number]));
    }
    assert_eq!(passed(), 0, "while the group stays the same, nothing is handed off");
    for count in [1, 2, 4] {
        let (before, mut astray) = (passed(), 0);
        let strangers = strangers_at(balancer.at(), count);
        for (number, user) in users.iter().enumerate() {
            user.send_to(&number.to_le_bytes(), balancer.at()).unwrap();
            match answer_unless_astray(user, &strangers) {
                Some(answer) => assert_eq!(answer, (known[number].clone(), balancer.at())),
                None => astray += 1,
            }
        }
        assert!(astray > 0 && astray < USERS, "{astray} flows went to {count} strangers");
        assert!(passed() > before, "with {count} strangers no flow changed workers");
        drop(strangers);
        assert!((0..USERS).all(|number| ask_as(number) == known[number]));
    }
    let started = balancer.sum(|counters| counters.sessions_started.get());
    let active = balancer.sum(|counters| counters.sessions_active.get());
    assert_eq!((started, active), (USERS as u64, USERS as u64), "nobody began a second session");
    balancer.stop();
}

#[test]
fn datagrams_of_every_size_pass_unchanged_from_one_worker_to_another() {
    let backend = Backend::echo();
    let mut balancer = Balancer::start(|config| config.workers = Some(3));
    balancer.register_udp(&[backend.at]);
    let users: Vec<UdpSocket> = (0..100).map(|_| user()).collect();
    for user in &users {
        ask(user, balancer.at(), b"?");
    }
    let strangers = strangers_at(balancer.at(), 1);
    let passed = || balancer.sum(|counters| counters.udp_datagrams_passed.get());
    // A flow that has changed workers.
    let moved = users.iter().find(|user| {
        let before = passed();
        user.send_to(b"?", balancer.at()).unwrap();
        answer_unless_astray(user, &strangers).is_some() && passed() > before
    });
    let moved = moved.expect("among a hundred flows some have changed workers");
    for len in [0, 1, 1472, 1473, 4096, 9000, 32_768, 65_507, 0, 7] {
        let sent: Vec<u8> = (0..len).map(|number| (number % 253) as u8).collect();
        assert!(ask(moved, balancer.at(), &sent) == sent, "{len} bytes");
    }
    send_segments(moved, balancer.at());
    expect_segments(moved);
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 100);
    balancer.stop();
}
