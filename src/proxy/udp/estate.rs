//! Sockets and pairs of a table that is gone, in this one: whoever holds a pair goes on holding it, and one that
//! rests goes on resting. Comes before the first session.

use std::net::SocketAddr;

use super::peer::{FREE, QUARANTINED, Quarantined};
use super::{Family, LastUse, PairTable, PeerId, SOCKETS_MAX, SocketId, SocketState};
use crate::base::time::Now;

/// A pair that rests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rest {
    pub backend: SocketAddr,
    pub socket: SocketId,
    pub until: Now,
    /// When a datagram last passed, and the time after which no reply can be expected.
    pub at: Now,
    pub clean: Now,
}

impl PairTable {
    /// The pairs that rest, those of each backend oldest first.
    pub fn resting(&self) -> impl Iterator<Item = Rest> {
        self.peers.iter().flatten().flat_map(|peer| {
            let (backend, family) = (peer.address, Family::of(peer.address));
            peer.quarantined.iter().map(move |it| Rest {
                backend,
                socket: SocketId { family, number: it.number },
                until: it.until,
                at: it.last_use.at,
                clean: it.last_use.clean,
            })
        })
    }

    /// A socket is open that was opened elsewhere.
    pub fn take_up(&mut self, socket: SocketId) {
        let (all, number) =
            (&mut self.sockets[socket.family as usize].all, usize::from(socket.number));
        if number >= SOCKETS_MAX {
            return;
        }
        if all.len() <= number {
            all.resize(number + 1, SocketState::default());
        }
        let was_open = std::mem::replace(&mut all[number].open, true);
        self.open += usize::from(!was_open);
    }

    /// The peer at an address, known from now on until its pairs are free; `None` if there are too many.
    pub fn recall(&mut self, address: SocketAddr) -> Option<PeerId> {
        if let Some(id) = self.find(address) {
            return Some(id);
        }
        let id = self.register(address)?;
        self.peer_mut(id).registered = false;
        Some(id)
    }

    /// The session at `place` holds this pair. False if it is no pair, or somebody else's.
    pub fn seize(&mut self, id: PeerId, socket: SocketId, place: u32) -> bool {
        self.occupy(id, socket, place)
    }

    /// The pair rests. False if it is no pair, or in use.
    pub fn rest(&mut self, id: PeerId, socket: SocketId, rest: &Rest) -> bool {
        if !self.occupy(id, socket, QUARANTINED) {
            return false;
        }
        let Rest { until, at, clean, .. } = *rest;
        let last_use = LastUse { at, clean: clean.min(until) };
        let quarantined = Quarantined { until, last_use, number: socket.number };
        self.peer_mut(id).quarantined.push_back(quarantined);
        self.quarantined += 1;
        self.schedule(id, until);
        true
    }

    /// Everything has been taken up: new sessions use the sockets from the first one on that is open, as far as
    /// they all are.
    pub fn taken_up(&mut self) {
        for family in Family::BOTH {
            let sockets = &mut self.sockets[family as usize];
            let gap = sockets.all.iter().position(|socket| !socket.open);
            let ceiling = gap.unwrap_or(sockets.all.len());
            sockets.ceiling = ceiling as u16;
            let beyond = sockets.all.iter().enumerate().skip(ceiling);
            let surplus = beyond.filter(|(_, state)| state.open && state.busy == 0);
            let of =
                |(number, _): (usize, &SocketState)| SocketId { family, number: number as u16 };
            self.surplus.extend(surplus.map(of));
        }
        // One that nobody holds a pair with is as if it had never been.
        let known = (0u16..).zip(&self.peers).filter(|(_, peer)| peer.is_some());
        let known: Vec<PeerId> = known.map(|(index, _)| PeerId(index)).collect();
        known.into_iter().for_each(|id| self.forget_if_unused(id));
    }

    fn occupy(&mut self, id: PeerId, socket: SocketId, owner: u32) -> bool {
        let number = usize::from(socket.number);
        let states = &mut self.sockets[socket.family as usize].all;
        let Some(state) = states.get_mut(number).filter(|state| state.open) else { return false };
        let Some(peer) = self.peers[id.index()].as_mut() else { return false };
        if Family::of(peer.address) != socket.family {
            return false;
        }
        if peer.owners.len() <= number {
            peer.owners.resize(number + 1, FREE);
        }
        if peer.owners[number] != FREE {
            return false;
        }
        peer.owners[number] = owner;
        peer.free.retain(|free| *free != socket.number);
        peer.busy += 1;
        state.busy += 1;
        true
    }
}
