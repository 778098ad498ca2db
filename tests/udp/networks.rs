//! Interfaces, routes and addresses that need a network namespace of their own, and so root.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::process::Command;
use std::thread;

use crate::harness::{Backend, Balancer, SILENCE, ask, hold_more, receive, user_at};
use crate::wait::{PATIENCE, wait_for};

/// Runs in a new network namespace, which the threads started there inherit.
fn in_a_network<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    let run = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("only root may");
        ip("link set lo up");
        run()
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// Runs iproute2's `ip` in this thread's network namespace.
fn ip(what: &str) {
    let done = Command::new("ip").args(what.split(' ')).status().unwrap();
    assert!(done.success(), "ip {what}");
}

/// The addresses at the two ends of a cable: the balancer's and the users'.
const HERE: &str = "10.9.0.1/24";
const THERE: &str = "10.9.0.2/24";

/// Lays a cable to another network namespace, and returns sockets bound there.
fn users_at_a_cable(binds: &[&str]) -> Vec<UdpSocket> {
    ip("link add cable type veth peer name other");
    let (tell, asked) = std::sync::mpsc::channel();
    let (go, ready) = std::sync::mpsc::channel::<()>();
    let (give, sockets) = std::sync::mpsc::channel();
    let binds: Vec<String> = binds.iter().map(|bind| (*bind).to_owned()).collect();
    let there = thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        tell.send(nix::unistd::gettid()).unwrap();
        ready.recv().unwrap();
        bring_up("other", THERE, "2001:db8::2/64", "fe80::2/64");
        let bind = |bind: &String| {
            let socket = wait_for("the address to be there", || UdpSocket::bind(bind).ok());
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.set_broadcast(true).unwrap();
            socket
        };
        give.send(binds.iter().map(bind).collect()).unwrap();
    });
    ip(&format!("link set other netns {}", asked.recv().unwrap()));
    bring_up("cable", HERE, "2001:db8::1/64", "fe80::1/64");
    go.send(()).unwrap();
    let sockets = sockets.recv().unwrap();
    // The namespace lives as long as its sockets.
    there.join().unwrap();
    sockets
}

fn bring_up(device: &str, v4: &str, v6: &str, link_local: &str) {
    ip(&format!("link set {device} addrgenmode none"));
    ip(&format!("addr add {v4} brd + dev {device}"));
    for address in [v6, link_local] {
        ip(&format!("addr add {address} dev {device} nodad"));
    }
    ip(&format!("link set {device} up"));
}

/// The address that answers a datagram sent to `to`.
fn who_answers(user: &UdpSocket, to: SocketAddr) -> IpAddr {
    let (answer, from) = wait_for("an answer", || {
        user.send_to(b"who serves?", to).ok()?;
        user.set_read_timeout(Some(SILENCE)).unwrap();
        receive(user).ok()
    });
    assert_eq!((answer, from.port()), (b"who serves?".to_vec(), to.port()));
    from.ip()
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn who_asks_many_hosts_is_answered_from_an_address_that_can_answer() {
    for bind in ["0.0.0.0:0", "[::]:0"] {
        in_a_network(|| {
            // A scope is an interface index in the user's own namespace, 2 or 3 here.
            let users = users_at_a_cable(&["10.9.0.2:0", "[2001:db8::2]:0", "[::]:0"]);
            let backend = Backend::echo();
            let mut balancer =
                Balancer::start(|config| config.listen.udp = Some(bind.parse().unwrap()));
            balancer.register_udp(&[backend.at]);
            let port = balancer.at().port();
            for to in ["10.9.0.1", "10.9.0.255", "255.255.255.255", "224.0.0.1"] {
                let to: Ipv4Addr = to.parse().unwrap();
                let from = who_answers(&users[0], (to, port).into());
                assert_eq!(from, Ipv4Addr::new(10, 9, 0, 1), "{to} at {bind}");
            }
            if bind == "[::]:0" {
                let scope = nix::net::if_::if_nametoindex("cable").unwrap();
                let all = |scope| {
                    SocketAddr::V6(SocketAddrV6::new("ff02::1".parse().unwrap(), port, 0, scope))
                };
                let other = (1..=scope + 2)
                    .find(|scope| users[2].send_to(b"who serves?", all(*scope)).is_ok());
                let from = who_answers(&users[1], all(other.unwrap()));
                assert_eq!(from, "2001:db8::1".parse::<Ipv6Addr>().unwrap());
            }
            balancer.stop();
        });
    }
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn a_link_local_door_answers_users_of_every_scope() {
    in_a_network(|| {
        let users = users_at_a_cable(&["[2001:db8::2]:0", "[::]:0"]);
        let backend = Backend::echo();
        let mut balancer =
            Balancer::start(|config| config.listen.udp = Some("[::]:0".parse().unwrap()));
        balancer.register_udp(&[backend.at]);
        let port = balancer.at().port();
        let door =
            |scope| SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), port, 0, scope));
        let scope = (1..9).find(|scope| users[1].send_to(b"who serves?", door(*scope)).is_ok());
        for user in &users {
            let from = who_answers(user, door(scope.unwrap()));
            assert_eq!(from, door(0).ip());
        }
        let global: SocketAddr = format!("[2001:db8::1]:{port}").parse().unwrap();
        assert_eq!(who_answers(&users[0], global), global.ip());
        balancer.stop();
    });
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn addresses_that_are_only_routed_here_and_those_that_went_away_are_answered() {
    in_a_network(|| {
        ip("route add local 192.0.2.0/24 dev lo");
        ip("-6 route add local 2001:db8:1::/64 dev lo");
        ip("addr add 10.9.0.1/32 dev lo");
        ip("addr add 10.9.0.2/32 dev lo");
        let backend = Backend::echo();
        let mut balancer =
            Balancer::start(|config| config.listen.udp = Some("[::]:0".parse().unwrap()));
        balancer.register_udp(&[backend.at]);
        let port = balancer.at().port();
        for (bind, to) in [("127.0.0.1:0", "192.0.2.77"), ("[::1]:0", "2001:db8:1::77")] {
            let at = SocketAddr::new(to.parse().unwrap(), port);
            assert_eq!(ask(&user_at(bind), at, to.as_bytes()), to.as_bytes());
        }
        // A late reply, after its source address was removed.
        let (gone, user) = (Backend::start("127.0.0.1:0", |_| vec![]), user_at("10.9.0.2:0"));
        balancer.register_udp(&[gone.at]);
        user.send_to(b"?", ("10.9.0.1", port)).unwrap();
        wait_for("the datagram to arrive", || (gone.seen() == 1).then_some(()));
        let upstream = gone.last_sender();
        ip("addr del 10.9.0.1/32 dev lo");
        gone.answer(b"late", upstream);
        assert_eq!(receive(&user).unwrap().0, b"late");
        assert_eq!(balancer.sum(|counters| counters.udp_dropped_send_failed.get()), 0);
        balancer.stop();
    });
}

#[test]
#[ignore = "needs root, for a network of its own"]
fn bursts_keep_their_order_where_the_route_is_narrower_than_their_datagrams() {
    // The kernel refuses to segment datagrams that exceed the MTU of the route.
    let lengths = [13, 100, 1_200, 1_452, 1_472, 1_473, 3_000, 9_000];
    for (bind, mtu) in [("127.0.0.1:0", 1500), ("[::1]:0", 1500), ("127.0.0.1:0", 600)] {
        in_a_network(|| {
            ip(&format!("link set lo mtu {mtu}"));
            let backend = Backend::start(bind, |datagram| vec![datagram.to_vec()]);
            let mut balancer =
                Balancer::start(|config| config.listen.udp = Some(bind.parse().unwrap()));
            balancer.register_udp(&[backend.at]);
            let user = user_at(bind);
            hold_more(&user);
            let mut random = 1_u32;
            let mut next = |bound: usize| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 8) as usize % bound
            };
            for _ in 0..150 {
                let base = lengths[next(lengths.len())];
                let burst: Vec<Vec<u8>> = (0..[2, 5, 12][next(3)])
                    .map(|number| {
                        let length = if next(5) > 0 { base } else { 1 + next(9_000) };
                        vec![number; length]
                    })
                    .collect();
                for datagram in &burst {
                    user.send_to(datagram, balancer.at()).unwrap();
                }
                for (number, datagram) in burst.iter().enumerate() {
                    let came = receive(&user).unwrap().0;
                    let lengths: Vec<usize> = burst.iter().map(Vec::len).collect();
                    assert!(came == *datagram, "{number} of {lengths:?} over {mtu}");
                }
            }
            balancer.stop();
        });
    }
}
