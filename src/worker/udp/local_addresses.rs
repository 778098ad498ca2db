//! The local addresses that datagrams to backends are sent from (`udp.local_addresses`). Owns what
//! a socket number of the pair table means: a descriptor, and one of the addresses. With several
//! addresses, one descriptor and its port serve that many sessions on each backend.

use std::net::IpAddr;

use crate::proxy::udp::{Family, SocketId};

/// The addresses, by family. Without any, the kernel chooses one, and a descriptor has one number.
pub struct LocalAddresses([Box<[IpAddr]>; 2]);

impl LocalAddresses {
    pub fn new(addresses: &[IpAddr]) -> LocalAddresses {
        LocalAddresses(Family::BOTH.map(|family| {
            let of_family = |ip: &&IpAddr| Family::of((**ip, 0).into()) == family;
            addresses.iter().filter(of_family).copied().collect()
        }))
    }

    /// How many socket numbers a descriptor of this family has.
    pub fn per_socket(&self, family: Family) -> usize {
        self.0[family as usize].len().max(1)
    }

    /// Whether there are any of this family, so that sockets must report where a reply arrived.
    pub fn is_set(&self, family: Family) -> bool {
        !self.0[family as usize].is_empty()
    }

    /// The place of the descriptor that a socket number stands for, and the address, if there are
    /// any.
    pub fn split(&self, socket: SocketId) -> (u16, Option<IpAddr>) {
        let addresses = &self.0[socket.family as usize];
        // Fits: the settings take fewer.
        match addresses.len() as u16 {
            0 => (socket.number, None),
            each => {
                let address = addresses[usize::from(socket.number % each)];
                (socket.number / each, Some(address))
            }
        }
    }

    /// The socket number of the descriptor at `place` and an address; `None` if nothing is sent
    /// from that address.
    pub fn join(&self, family: Family, place: u16, at: Option<IpAddr>) -> Option<SocketId> {
        let addresses = &self.0[family as usize];
        if addresses.is_empty() {
            return Some(SocketId { family, number: place });
        }
        let address = addresses.iter().position(|address| at == Some(*address))?;
        let number = usize::from(place) * addresses.len() + address;
        u16::try_from(number).ok().map(|number| SocketId { family, number })
    }

    /// All socket numbers of the descriptor at `place`.
    pub fn numbers_on(&self, family: Family, place: u16) -> impl Iterator<Item = SocketId> {
        let each = self.per_socket(family);
        let first = usize::from(place) * each;
        (first..first + each).filter_map(move |number| {
            Some(SocketId { family, number: u16::try_from(number).ok()? })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local_addresses(addresses: &[&str]) -> LocalAddresses {
        let parsed: Vec<IpAddr> = addresses.iter().map(|it| it.parse().unwrap()).collect();
        LocalAddresses::new(&parsed)
    }

    #[test]
    fn without_addresses_a_number_is_a_descriptor() {
        let local_addresses = local_addresses(&[]);
        for family in Family::BOTH {
            let socket = SocketId { family, number: 65_534 };
            assert_eq!(local_addresses.split(socket), (65_534, None));
            assert_eq!(local_addresses.join(family, 65_534, None), Some(socket));
            assert_eq!(local_addresses.numbers_on(family, 65_534).collect::<Vec<_>>(), [socket]);
            assert_eq!(
                (local_addresses.per_socket(family), local_addresses.is_set(family)),
                (1, false)
            );
        }
    }

    #[test]
    fn every_number_is_one_address_of_one_descriptor() {
        let local_addresses =
            local_addresses(&["192.0.2.1", "2001:db8::1", "192.0.2.2", "192.0.2.3"]);
        assert_eq!(Family::BOTH.map(|family| local_addresses.per_socket(family)), [3, 1]);
        for family in Family::BOTH {
            for number in 0..1000 {
                let socket = SocketId { family, number };
                let (place, address) = local_addresses.split(socket);
                assert_eq!(local_addresses.join(family, place, address), Some(socket));
                assert!(local_addresses.numbers_on(family, place).any(|on| on == socket));
            }
        }
        let number = |number| SocketId { family: Family::V4, number };
        assert_eq!([4, 5, 6].map(|at| local_addresses.split(number(at)).0), [1, 1, 2]);
        assert_eq!(
            local_addresses.numbers_on(Family::V4, 1).collect::<Vec<_>>(),
            [3, 4, 5].map(number)
        );
    }

    #[test]
    fn a_reply_to_another_address_belongs_to_nobody() {
        let local_addresses = local_addresses(&["192.0.2.1", "192.0.2.2"]);
        assert_eq!(local_addresses.join(Family::V4, 0, "192.0.2.3".parse().ok()), None);
        assert_eq!(local_addresses.join(Family::V4, 0, None), None);
        assert_eq!(local_addresses.join(Family::V4, 65_000, "192.0.2.1".parse().ok()), None);
    }
}
