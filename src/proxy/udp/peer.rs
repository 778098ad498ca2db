//! One backend address in the table of pairs: which of its pairs are free, held or rest. Owns that
//! knowledge; knows neither other peers nor whether a socket is open.

use std::collections::VecDeque;
use std::net::SocketAddr;

use super::Past;
use crate::base::time::Now;

/// Sockets that a new session may be given at random, if so many are open and free.
const CHOICES: usize = 16;

/// Owners that are no session.
pub(super) const FREE: u32 = u32::MAX;
pub(super) const RESTING: u32 = u32::MAX - 1;

pub(super) struct Peer {
    pub(super) address: SocketAddr,
    pub(super) registered: bool,
    /// Pairs that are held or rest.
    pub(super) busy: u32,
    /// Sockets below this have been offered to this peer: their free pairs are in `free`.
    pub(super) seen: u16,
    pub(super) free: Vec<u16>,
    /// By socket: the session, or `FREE` or `RESTING`.
    pub(super) owners: Vec<u32>,
    /// In the order in which they began.
    pub(super) resting: VecDeque<Rest>,
    /// Of these, so many from the first on are known to be clean.
    pub(super) clean: usize,
}

/// A pair that was given back.
pub(super) struct Rest {
    pub(super) until: Now,
    pub(super) past: Past,
    pub(super) number: u16,
}

impl Peer {
    pub(super) fn new(address: SocketAddr) -> Peer {
        Peer {
            address,
            registered: true,
            busy: 0,
            seen: 0,
            free: Vec::new(),
            owners: Vec::new(),
            resting: VecDeque::new(),
            clean: 0,
        }
    }

    /// Adds free pairs of the sockets below `ceiling` that this peer has not seen until it has some
    /// choice: what one peer holds then grows with its own sessions and not with another's.
    pub(super) fn offer(&mut self, ceiling: u16) {
        while self.free.len() < CHOICES && self.seen < ceiling {
            let number = self.seen;
            self.seen += 1;
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
        if number < self.seen {
            self.free.push(number);
        }
    }

    /// Takes the sockets from `ceiling` on out of the offer, and forgets them where they are free.
    pub(super) fn withdraw(&mut self, ceiling: u16) {
        if self.seen <= ceiling {
            return;
        }
        self.seen = ceiling;
        self.free.retain(|number| *number < ceiling);
        while self.owners.len() > usize::from(ceiling) && self.owners.last() == Some(&FREE) {
            self.owners.pop();
        }
        self.free.shrink_to_fit();
        self.owners.shrink_to_fit();
    }
}
