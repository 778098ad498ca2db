//! Which backend a datagram goes to, and that it and its reply arrive unchanged.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use crate::harness::{Backend, Balancer, ask, user, user_at};

#[test]
fn sessions_are_dealt_out_in_turn_and_stay_where_they_are() {
    let backends = [Backend::named("one"), Backend::named("two"), Backend::named("three")];
    let mut balancer = Balancer::start(|_| {});
    balancer.register_udp(&backends.each_ref().map(|backend| backend.at));
    let users: Vec<UdpSocket> = (0..30).map(|_| user()).collect();
    let mut count = HashMap::new();
    let first: Vec<Vec<u8>> = users.iter().map(|user| ask(user, balancer.at(), b"?")).collect();
    first.iter().for_each(|name| *count.entry(name.clone()).or_insert(0) += 1);
    assert_eq!(count.values().copied().collect::<Vec<_>>(), [10, 10, 10], "{count:?}");
    let newcomer = Backend::named("four");
    let mut addresses = backends.each_ref().map(|backend| backend.at).to_vec();
    addresses.push(newcomer.at);
    balancer.register_udp(&addresses);
    for (user, name) in users.iter().zip(&first) {
        assert_eq!(ask(user, balancer.at(), b"again"), *name);
    }
    assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 30);
    assert_eq!(balancer.sum(|counters| counters.udp_datagrams_up.get()), 60);
    assert_eq!(balancer.sum(|counters| counters.udp_datagrams_down.get()), 60);
    balancer.stop();
}

#[test]
fn datagrams_of_every_size_pass_unchanged() {
    for (gro, bind) in [(true, "127.0.0.1:0"), (false, "[::]:0")] {
        let backend = Backend::echo();
        let mut balancer = Balancer::start(|config| {
            config.udp.gro = gro;
            config.listen.udp = Some(bind.parse().unwrap());
        });
        balancer.register_udp(&[backend.at]);
        let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), balancer.at().port());
        let user = user();
        for len in [0, 1, 2, 64, 511, 1200, 1472, 1473, 4096, 9000, 32_768, 65_506, 65_507, 0, 0, 7]
        {
            let sent: Vec<u8> = (0..len).map(|number| (number % 253) as u8).collect();
            assert!(ask(&user, at, &sent) == sent, "{len} bytes, {bind}");
        }
        assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 1);
        balancer.stop();
    }
}

#[test]
fn users_and_backends_of_both_families_meet() {
    let backends = [Backend::echo(), Backend::start("[::1]:0", |what| vec![what.to_vec()])];
    let mut balancer =
        Balancer::start(|config| config.listen.udp = Some("[::]:0".parse().unwrap()));
    balancer.register_udp(&backends.each_ref().map(|backend| backend.at));
    let port = balancer.at().port();
    for round in 0..4u8 {
        for (bind, to) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1")] {
            let at = SocketAddr::new(to.parse().unwrap(), port);
            assert_eq!(ask(&user_at(bind), at, &[round]), [round], "{to}");
        }
    }
    assert_eq!(backends.each_ref().map(Backend::seen), [4, 4]);
    balancer.stop();
}

#[test]
fn replies_come_from_the_address_that_the_user_spoke_to() {
    for bind in ["0.0.0.0:0", "[::]:0"] {
        let backend = Backend::echo();
        let mut balancer =
            Balancer::start(|config| config.listen.udp = Some(bind.parse().unwrap()));
        balancer.register_udp(&[backend.at]);
        let user = user();
        for _ in 0..3 {
            for ip in ["127.0.0.1", "127.0.0.2", "127.8.9.10"] {
                let at = SocketAddr::new(ip.parse().unwrap(), balancer.at().port());
                assert_eq!(ask(&user, at, ip.as_bytes()), ip.as_bytes());
            }
        }
        assert_eq!(balancer.sum(|counters| counters.sessions_active.get()), 3, "one for each");
        balancer.stop();
    }
}
