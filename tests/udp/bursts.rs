//! Datagrams that the kernel coalesces or segments (GRO and GSO).

use std::net::UdpSocket;

use crate::harness::{Backend, Balancer, expect_segments, receive, send_segments, user};

#[test]
fn bursts_keep_their_boundaries_and_their_order() {
    for gro in [true, false] {
        let backend = Backend::echo();
        let mut balancer = Balancer::start(|config| config.udp.gro = gro);
        balancer.register_udp(&[backend.at]);
        let users: Vec<UdpSocket> = (0..4).map(|_| user()).collect();
        let mixed = [1, 1, 1, 2, 2, 1, 0, 0, 3, 3, 3, 2, 9, 9, 9, 9, 9, 9, 1, 8];
        let every_third: Vec<usize> = (0..150).map(|place| place % 3 / 2 * place).collect();
        // Datagrams of 1600 bytes are longer than the MTU of most networks.
        for lengths in [&[700; 20][..], &[0; 150], &every_third, &mixed, &[1600; 8]] {
            let datagram = |user: usize, number: usize| {
                let mut datagram = vec![number as u8; lengths[number]];
                if let Some(first) = datagram.first_mut() {
                    *first = user as u8;
                }
                datagram
            };
            for (number, user) in users.iter().enumerate() {
                for place in 0..lengths.len() {
                    user.send_to(&datagram(number, place), balancer.at()).unwrap();
                }
            }
            for (number, user) in users.iter().enumerate() {
                for place in 0..lengths.len() {
                    assert_eq!(receive(user).unwrap().0, datagram(number, place), "{gro} {place}");
                }
            }
        }
        balancer.stop();
    }
}

#[test]
fn datagrams_that_come_as_one_are_told_apart_again() {
    for gro in [true, false] {
        let backend = Backend::echo();
        let mut balancer = Balancer::start(|config| config.udp.gro = gro);
        balancer.register_udp(&[backend.at]);
        let user = user();
        send_segments(&user, balancer.at());
        expect_segments(&user);
        assert_eq!(balancer.sum(|counters| counters.udp_datagrams_up.get()), 51, "{gro}");
        balancer.stop();
    }
}
