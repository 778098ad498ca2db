//! From where datagrams go to backends. Owns what a number of the core's means: a socket, and the address
//! of ours on it that a datagram leaves from and its reply comes to. With several addresses one socket,
//! and its port, serve a session on each backend for each of them.

use std::net::IpAddr;

use crate::proxy::udp::{Family, Socket};

/// The addresses to send from, by family. Without one the kernel chooses, and a socket has one number.
pub struct Origins([Box<[IpAddr]>; 2]);

impl Origins {
    pub fn new(addresses: &[IpAddr]) -> Origins {
        Origins(Family::BOTH.map(|family| {
            let of_family = |ip: &&IpAddr| Family::of((**ip, 0).into()) == family;
            addresses.iter().filter(of_family).copied().collect()
        }))
    }

    /// How many numbers a socket of this family has.
    pub fn each(&self, family: Family) -> usize {
        self.0[family as usize].len().max(1)
    }

    /// Whether a socket of this family has to tell which address a reply came to.
    pub fn are_named(&self, family: Family) -> bool {
        !self.0[family as usize].is_empty()
    }

    /// The place of the socket that a number means, and the address if there are any.
    pub fn split(&self, socket: Socket) -> (u16, Option<IpAddr>) {
        let addresses = &self.0[socket.family as usize];
        // At most as many as the settings take.
        match addresses.len() as u16 {
            0 => (socket.number, None),
            each => {
                let address = addresses[usize::from(socket.number % each)];
                (socket.number / each, Some(address))
            }
        }
    }

    /// The number for the socket at `place` and an address; `None` if that is not one to send from.
    pub fn join(&self, family: Family, place: u16, at: Option<IpAddr>) -> Option<Socket> {
        let addresses = &self.0[family as usize];
        if addresses.is_empty() {
            return Some(Socket { family, number: place });
        }
        let address = addresses.iter().position(|address| at == Some(*address))?;
        let number = usize::from(place) * addresses.len() + address;
        u16::try_from(number).ok().map(|number| Socket { family, number })
    }

    /// All numbers of the socket at `place`.
    pub fn on(&self, family: Family, place: u16) -> impl Iterator<Item = Socket> {
        let each = self.each(family);
        let first = usize::from(place) * each;
        (first..first + each)
            .filter_map(move |number| Some(Socket { family, number: u16::try_from(number).ok()? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(addresses: &[&str]) -> Origins {
        let parsed: Vec<IpAddr> = addresses.iter().map(|it| it.parse().unwrap()).collect();
        Origins::new(&parsed)
    }

    #[test]
    fn without_addresses_a_number_is_a_socket() {
        let origins = origins(&[]);
        for family in Family::BOTH {
            let socket = Socket { family, number: 65_534 };
            assert_eq!(origins.split(socket), (65_534, None));
            assert_eq!(origins.join(family, 65_534, None), Some(socket));
            assert_eq!(origins.on(family, 65_534).collect::<Vec<_>>(), [socket]);
            assert_eq!((origins.each(family), origins.are_named(family)), (1, false));
        }
    }

    #[test]
    fn every_number_is_one_address_of_one_socket() {
        let origins = origins(&["192.0.2.1", "2001:db8::1", "192.0.2.2", "192.0.2.3"]);
        assert_eq!(Family::BOTH.map(|family| origins.each(family)), [3, 1]);
        for family in Family::BOTH {
            for number in 0..1000 {
                let socket = Socket { family, number };
                let (place, address) = origins.split(socket);
                assert_eq!(origins.join(family, place, address), Some(socket));
                assert!(origins.on(family, place).any(|on| on == socket));
            }
        }
        let number = |number| Socket { family: Family::V4, number };
        assert_eq!([4, 5, 6].map(|at| origins.split(number(at)).0), [1, 1, 2]);
        assert_eq!(origins.on(Family::V4, 1).collect::<Vec<_>>(), [3, 4, 5].map(number));
    }

    #[test]
    fn a_reply_to_another_address_is_nobodys() {
        let origins = origins(&["192.0.2.1", "192.0.2.2"]);
        assert_eq!(origins.join(Family::V4, 0, "192.0.2.3".parse().ok()), None);
        assert_eq!(origins.join(Family::V4, 0, None), None);
        assert_eq!(origins.join(Family::V4, 65_000, "192.0.2.1".parse().ok()), None);
    }
}
