//! One backend address in the pair table: which of its pairs are free, held or quarantined. Knows
//! neither other peers nor whether a socket is open.

use std::collections::VecDeque;
use std::net::SocketAddr;

use super::LastUse;
use crate::base::time::Now;

/// Free pairs to keep on offer, from which a new session gets a random one.
const CHOICES: usize = 16;

/// Values in [`Peer::owners`] that name no session.
pub(super) const FREE: u32 = u32::MAX;
pub(super) const QUARANTINED: u32 = u32::MAX - 1;

pub(super) struct Peer {
    pub(super) address: SocketAddr,
    pub(super) registered: bool,
    /// Pairs that are held or quarantined.
    pub(super) busy: u32,
    /// Sockets below this number have been offered to this peer: their free pairs are in `free`.
    pub(super) offered: u16,
    pub(super) free: Vec<u16>,
    /// By socket: the place of the session, or `FREE`, or `QUARANTINED`.
    pub(super) owners: Vec<u32>,
    /// Oldest first.
    pub(super) quarantined: VecDeque<Quarantined>,
    /// How many of those, from the oldest on, are known to be clean.
    pub(super) clean: usize,
}

/// A pair given back by its session.
pub(super) struct Quarantined {
    pub(super) until: Now,
    pub(super) last_use: LastUse,
    pub(super) number: u16,
}

impl Peer {
    pub(super) fn new(address: SocketAddr) -> Peer {
        Peer {
            address,
            registered: true,
            busy: 0,
            offered: 0,
            free: Vec::new(),
            owners: Vec::new(),
            quarantined: VecDeque::new(),
            clean: 0,
        }
    }

    /// Adds free pairs on sockets below `ceiling` until there are enough to choose from. Adding no
    /// more than that keeps a peer's memory in proportion to its own sessions, not to those of the
    /// busiest.
    pub(super) fn offer(&mut self, ceiling: u16) {
        while self.free.len() < CHOICES && self.offered < ceiling {
            let number = self.offered;
            self.offered += 1;
            if self.owners.len() <= usize::from(number) {
                self.owners.resize(usize::from(number) + 1, FREE);
            }
            if self.owners[usize::from(number)] == FREE {
                self.free.push(number);
            }
        }
    }

    pub(super) fn release(&mut self, number: u16) {
        self.owners[usize::from(number)] = FREE;
        self.busy -= 1;
        if number < self.offered {
            self.free.push(number);
        }
    }

    /// Withdraws the sockets from `ceiling` on from the offer, and forgets those that are free.
    pub(super) fn withdraw(&mut self, ceiling: u16) {
        if self.offered <= ceiling {
            return;
        }
        self.offered = ceiling;
        self.free.retain(|number| *number < ceiling);
        while self.owners.len() > usize::from(ceiling) && self.owners.last() == Some(&FREE) {
            self.owners.pop();
        }
        self.free.shrink_to_fit();
        self.owners.shrink_to_fit();
    }
}
