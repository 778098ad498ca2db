//! The upstream side of UDP: which socket a session sends from, and which session a reply belongs
//! to. Owns the numbering of the sockets and the pairs of (backend address, socket). Opens no
//! socket and knows no clock.
//!
//! Upstream sockets are not connected, and sessions on different backends share them: the backend's
//! address and the socket together identify the session. The number of sockets, and so of
//! descriptors and local ports, is that of the sessions on the busiest backend, not of all
//! sessions. One descriptor may count as several sockets here, one for each local address that the
//! driver sends from.
//!
//! Connecting sockets that serve a single session would save the route look-up, 5 % of a worker's
//! time in a profile of 64 flows. Measured alternately over 9 rounds, the cost was 0.99 times as
//! high, and the kernel would drop what strangers send without anybody counting it.
//!
//! ```text
//!   free --take--> held by a session --give_back--> quarantined --quarantine ends--> free
//! ```
//!
//! A pair is quarantined after its session, because a late reply to that session would otherwise
//! reach the next one. Pairs belong to addresses and not to registrations, so the quarantine
//! outlives a backend that leaves and registers again. If a backend has no free pair left, its
//! oldest quarantine may end early ([`PairTable::end_early`]), but not before the pair is *clean*,
//! that is, before the time after which no reply can be expected any more.
//!
//! Sockets are numbered from zero. New sessions use those below the ceiling, all of which are open.
//! The ceiling rises when some backend has no free pair, and falls when none needs half of the open
//! sockets. A socket above the ceiling is closed once its last pair is free.

pub mod estate;
mod peer;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::time::Duration;

use hashbrown::HashTable;

use peer::{FREE, Peer, QUARANTINED, Quarantined};

use crate::base::time::Now;
use crate::session::flows::FlowHasher;

/// Backend addresses known at once, at most: as many as can be registered, and some that have left but
/// still have pairs held or quarantined.
pub const PEERS_MAX: usize = 20_480;
/// Up to this many addresses, comparing them all is faster than hashing one.
const FEW_PEERS: usize = 4;
/// Sockets of one family at one worker, at most; each local address of a descriptor counts.
pub const SOCKETS_MAX: usize = 65_535;
/// Sockets kept open even if no session needs them.
const SOCKETS_KEPT: usize = 32;
/// How long to wait after a socket could not be opened before trying again.
const OPEN_PAUSE: Duration = Duration::from_millis(100);
/// How often to look for surplus sockets.
const SHRINK_EVERY: Duration = Duration::from_secs(10);
/// Quarantines that one call of [`PairTable::settle`] may end, so that a call stays short.
const SETTLED_MAX: usize = 1024;

/// The address family of a backend, and of the sockets that reach it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub fn of(address: SocketAddr) -> Family {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

/// An upstream socket, by its number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SocketId {
    pub family: Family,
    pub number: u16,
}

/// A backend address in the table; valid while it is registered or has pairs held or quarantined.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerId(u16);

impl PeerId {
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// To whom a pair belongs, and so a reply that arrives on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PairOwner {
    /// The session at this place.
    Session(u32),
    /// A session that has ended.
    Quarantined,
    Nobody,
}

/// The bounds of a table, fixed when it is made.
#[derive(Clone, Copy, Debug)]
pub struct PairLimits {
    /// Sockets of both families together.
    pub sockets: usize,
    /// How long a pair is quarantined after its session.
    pub quarantine: Duration,
    /// Quarantined pairs, at most: beyond that, each further one ends the oldest quarantine of its
    /// peer, provided that pair is clean.
    pub quarantined_max: usize,
}

/// How a session used its pair, as known when it gives the pair back.
#[derive(Clone, Copy, Debug)]
pub struct LastUse {
    /// When a datagram last passed.
    pub at: Now,
    /// The time after which no reply can be expected.
    pub clean: Now,
}

#[derive(Default)]
struct Sockets {
    all: Vec<SocketState>,
    ceiling: u16,
}

#[derive(Clone, Copy, Default)]
struct SocketState {
    open: bool,
    /// Pairs that are held or quarantined, of all peers.
    busy: u32,
    /// The sender of the last datagram, which is most likely that of the next one too.
    last: Option<PeerId>,
}

/// How the pairs with one peer are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PairUse {
    /// Pairs that are not free.
    pub busy: usize,
    /// How many of those are quarantined and clean.
    pub clean: usize,
}

/// The upstream sockets of one worker and the pairs on them.
pub struct PairTable {
    limits: PairLimits,
    hasher: FlowHasher,
    random: u64,
    by_address: HashTable<PeerId>,
    peers: Vec<Option<Peer>>,
    free_peers: Vec<u16>,
    /// By [`Family`].
    sockets: [Sockets; 2],
    open: usize,
    /// Quarantined pairs, of all peers.
    quarantined: usize,
    /// When to look at a peer's quarantines: one entry for each peer that has any.
    due: BinaryHeap<Reverse<(Now, PeerId)>>,
    /// By [`PeerId::index`]: whether the peer has an entry in `due`.
    is_scheduled: Vec<bool>,
    /// By [`Family`]: the peers that may have no free pair. Every registered one without is among them.
    doubtful: [Vec<PeerId>; 2],
    /// By [`PeerId::index`] and [`Family`]: whether it is in there.
    is_doubtful: Vec<[bool; 2]>,
    surplus: Vec<SocketId>,
    /// By [`Family`]: no socket is wanted before this time.
    open_again: [Now; 2],
    shrink_at: Now,
}

impl PairTable {
    /// A table without sockets or peers. `seed` makes the choice of sockets unpredictable.
    pub fn new(limits: PairLimits, seed: u64, hasher: FlowHasher, now: Now) -> PairTable {
        PairTable {
            limits,
            hasher,
            random: seed,
            by_address: HashTable::new(),
            peers: Vec::new(),
            free_peers: Vec::new(),
            sockets: Default::default(),
            open: 0,
            quarantined: 0,
            due: BinaryHeap::new(),
            is_scheduled: Vec::new(),
            doubtful: Default::default(),
            is_doubtful: Vec::new(),
            surplus: Vec::new(),
            open_again: [now; 2],
            shrink_at: now.plus(SHRINK_EVERY),
        }
    }

    /// How many sockets are open.
    pub fn open(&self) -> usize {
        self.open
    }

    /// How many pairs are quarantined.
    pub fn quarantined(&self) -> usize {
        self.quarantined
    }

    /// Adds the address of a registered backend. `None` if there are [`PEERS_MAX`] addresses
    /// already.
    pub fn register(&mut self, address: SocketAddr) -> Option<PeerId> {
        if let Some(id) = self.find(address) {
            self.peer_mut(id).registered = true;
            self.doubt(id);
            return Some(id);
        }
        let index = match self.free_peers.pop() {
            Some(index) => index,
            None if self.peers.len() < PEERS_MAX => {
                self.peers.push(None);
                self.is_scheduled.push(false);
                self.is_doubtful.push([false; 2]);
                self.peers.len() as u16 - 1
            }
            None => return None,
        };
        self.peers[usize::from(index)] = Some(Peer::new(address));
        let PairTable { by_address, peers, hasher, .. } = self;
        by_address.insert_unique(hasher.address(address), PeerId(index), |id| {
            let peer = peers[id.index()].as_ref();
            hasher.address(peer.expect("the index names known peers").address)
        });
        self.doubt(PeerId(index));
        Some(PeerId(index))
    }

    /// The backend at this address has left. The address stays known until its last pair is free.
    pub fn unregister(&mut self, id: PeerId) {
        self.peer_mut(id).registered = false;
        self.forget_if_unused(id);
    }

    /// The peer with exactly this address.
    pub fn find(&self, address: SocketAddr) -> Option<PeerId> {
        if self.peers.len() <= FEW_PEERS {
            let at = |peer: &Option<Peer>| peer.as_ref().is_some_and(|it| it.address == address);
            return self.peers.iter().position(at).map(|index| PeerId(index as u16));
        }
        let same = |id: &PeerId| self.is_at(*id, address);
        self.by_address.find(self.hasher.address(address), same).copied()
    }

    /// The peer with this address, which sent a datagram to `socket`.
    pub fn sender(&mut self, socket: SocketId, address: SocketAddr) -> Option<PeerId> {
        let number = usize::from(socket.number);
        let last = self.sockets[socket.family as usize].all.get(number).and_then(|at| at.last);
        if last.is_some_and(|id| self.is_at(id, address)) {
            return last;
        }
        let found = self.find(address)?;
        if let Some(at) = self.sockets[socket.family as usize].all.get_mut(number) {
            at.last = Some(found);
        }
        Some(found)
    }

    pub fn address(&self, id: PeerId) -> SocketAddr {
        self.peer(id).address
    }

    /// To whom a datagram from `id` to `socket` belongs.
    pub fn owner(&self, id: PeerId, socket: SocketId) -> PairOwner {
        let peer = self.peer(id);
        if Family::of(peer.address) != socket.family {
            return PairOwner::Nobody;
        }
        match peer.owners.get(usize::from(socket.number)) {
            None | Some(&FREE) => PairOwner::Nobody,
            Some(&QUARANTINED) => PairOwner::Quarantined,
            Some(&place) => PairOwner::Session(place),
        }
    }

    /// A socket to open so that the next session finds a free pair, whichever backend is chosen.
    /// The caller answers with [`PairTable::opened`] or [`PairTable::failed`].
    pub fn wanted(&mut self, now: Now) -> Option<SocketId> {
        for family in Family::BOTH {
            while now >= self.open_again[family as usize] && self.is_short(family) {
                let sockets = &mut self.sockets[family as usize];
                let next = usize::from(sockets.ceiling);
                if sockets.all.get(next).is_some_and(|socket| socket.open) {
                    sockets.ceiling += 1;
                } else if self.open < self.limits.sockets && next < SOCKETS_MAX {
                    return Some(SocketId { family, number: sockets.ceiling });
                } else {
                    break;
                }
            }
        }
        None
    }

    /// The wanted socket is open.
    pub fn opened(&mut self, socket: SocketId) {
        let sockets = &mut self.sockets[socket.family as usize];
        assert_eq!(socket.number, sockets.ceiling, "the wanted socket is the next one");
        if sockets.all.len() == usize::from(socket.number) {
            sockets.all.push(SocketState::default());
        }
        sockets.all[usize::from(socket.number)].open = true;
        sockets.ceiling += 1;
        self.open += 1;
    }

    /// The wanted socket could not be opened; no other of its family is wanted for a moment.
    pub fn failed(&mut self, socket: SocketId, now: Now) {
        self.open_again[socket.family as usize] = now.plus(OPEN_PAUSE);
    }

    /// Gives the session at `place` a free pair with this peer, chosen at random. `None` if there
    /// is none.
    pub fn take(&mut self, id: PeerId, place: u32) -> Option<SocketId> {
        assert!(place < QUARANTINED, "FREE and QUARANTINED are no places");
        let random = self.next_random();
        let peer = self.peers[id.index()].as_mut().expect("a peer in use is known");
        let family = Family::of(peer.address);
        let sockets = &mut self.sockets[family as usize];
        peer.offer(sockets.ceiling);
        if peer.free.is_empty() {
            return None;
        }
        let choice = ((u128::from(random) * peer.free.len() as u128) >> 64) as usize;
        let number = peer.free.swap_remove(choice);
        peer.owners[usize::from(number)] = place;
        peer.busy += 1;
        sockets.all[usize::from(number)].busy += 1;
        if peer.free.is_empty() {
            self.doubt(id);
        }
        Some(SocketId { family, number })
    }

    /// Whether a pair with this peer is free.
    pub fn has_free(&mut self, id: PeerId) -> bool {
        let peer = self.peers[id.index()].as_mut().expect("a peer in use is known");
        peer.offer(self.sockets[Family::of(peer.address) as usize].ceiling);
        !peer.free.is_empty()
    }

    /// From now on, pairs are quarantined for this long. One that already is stays so for as long as was said,
    /// and those behind it until then.
    pub fn set_quarantine(&mut self, lasts: Duration) {
        self.limits.quarantine = lasts;
    }

    /// The session of this pair has ended or moved: the pair is quarantined.
    pub fn give_back(&mut self, id: PeerId, socket: SocketId, last_use: LastUse, now: Now) {
        let until = now.plus(self.limits.quarantine);
        let last_use = LastUse { clean: last_use.clean.min(until), ..last_use };
        let peer = self.peer_mut(id);
        let owner = &mut peer.owners[usize::from(socket.number)];
        assert!(*owner < QUARANTINED, "a pair is given back once");
        *owner = QUARANTINED;
        peer.quarantined.push_back(Quarantined { until, last_use, number: socket.number });
        self.quarantined += 1;
        self.schedule(id, until);
        if self.quarantined > self.limits.quarantined_max {
            self.end_early(id, now, now);
        }
    }

    /// The session of this pair was evicted and the pair is clean: it is free at once.
    pub fn free_clean(&mut self, id: PeerId, socket: SocketId) {
        let owner = self.peer(id).owners[usize::from(socket.number)];
        assert!(owner < QUARANTINED, "a session frees the pair it holds");
        self.set_free(id, socket.number);
    }

    /// Ends the oldest quarantine with this peer, if its pair is clean and nothing has passed since
    /// `before`. False if it was not ended, or there is none.
    pub fn end_early(&mut self, id: PeerId, before: Now, now: Now) -> bool {
        let front = self.peer(id).quarantined.front();
        let may = front
            .is_some_and(|oldest| oldest.last_use.clean <= now && oldest.last_use.at <= before);
        if may {
            self.end_quarantine(id);
        }
        may
    }

    /// How the pairs with this peer are used now.
    pub fn usage(&mut self, id: PeerId, now: Now) -> PairUse {
        let peer = self.peer_mut(id);
        while peer.quarantined.get(peer.clean).is_some_and(|oldest| oldest.last_use.clean <= now) {
            peer.clean += 1;
        }
        PairUse { busy: peer.busy as usize, clean: peer.clean }
    }

    /// Ends the quarantines that are due and looks for surplus sockets. True if there is more to do
    /// at once.
    pub fn settle(&mut self, now: Now) -> bool {
        let mut left = SETTLED_MAX;
        while let Some(Reverse((at, id))) = self.due.peek().copied().filter(|_| left > 0) {
            if at > now {
                break;
            }
            self.due.pop();
            self.is_scheduled[id.index()] = false;
            left -= 1;
            self.end_quarantines(id, now, &mut left);
        }
        if now >= self.shrink_at {
            self.shrink_at = now.plus(SHRINK_EVERY);
            Family::BOTH.into_iter().for_each(|family| self.shrink(family));
        }
        left == 0
    }

    /// When [`PairTable::settle`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        let shrink = (self.open > SOCKETS_KEPT).then_some(self.shrink_at);
        let end = self.due.peek().map(|Reverse((at, _))| *at);
        end.into_iter().chain(shrink).min()
    }

    /// A socket to close because no session needs it. It counts as closed from now on.
    pub fn next_surplus(&mut self) -> Option<SocketId> {
        while let Some(socket) = self.surplus.pop() {
            let sockets = &mut self.sockets[socket.family as usize];
            let state = &mut sockets.all[usize::from(socket.number)];
            if state.open && state.busy == 0 && socket.number >= sockets.ceiling {
                state.open = false;
                self.open -= 1;
                return Some(socket);
            }
        }
        None
    }

    /// Whether `id` currently names the peer with this address.
    fn is_at(&self, id: PeerId, address: SocketAddr) -> bool {
        self.peers[id.index()].as_ref().is_some_and(|peer| peer.address == address)
    }

    fn peer(&self, id: PeerId) -> &Peer {
        self.peers[id.index()].as_ref().expect("a peer in use is known")
    }

    fn peer_mut(&mut self, id: PeerId) -> &mut Peer {
        self.peers[id.index()].as_mut().expect("a peer in use is known")
    }

    /// Whether a registered backend of this family has no free pair. Looks at each doubtful one once, so
    /// that ten thousand backends cost a new session no more than ten.
    fn is_short(&mut self, family: Family) -> bool {
        let ceiling = self.sockets[family as usize].ceiling;
        while let Some(id) = self.doubtful[family as usize].last() {
            let peer = self.peers[id.index()].as_mut();
            if let Some(peer) = peer.filter(|it| it.registered && Family::of(it.address) == family)
            {
                peer.offer(ceiling);
                if peer.free.is_empty() {
                    return true;
                }
            }
            self.is_doubtful[id.index()][family as usize] = false;
            self.doubtful[family as usize].pop();
        }
        false
    }

    /// This peer may have no free pair.
    fn doubt(&mut self, id: PeerId) {
        let family = Family::of(self.peer(id).address) as usize;
        if !std::mem::replace(&mut self.is_doubtful[id.index()][family], true) {
            self.doubtful[family].push(id);
        }
    }

    /// Plans a look at a peer's quarantines at `at`, unless one is planned already, which is then
    /// earlier.
    fn schedule(&mut self, id: PeerId, at: Now) {
        if !std::mem::replace(&mut self.is_scheduled[id.index()], true) {
            self.due.push(Reverse((at, id)));
        }
    }

    /// Ends the quarantines of a peer that are due, up to `left` of them.
    fn end_quarantines(&mut self, id: PeerId, now: Now, left: &mut usize) {
        let until = |upstream: &PairTable| -> Option<Now> {
            Some(upstream.peers[id.index()].as_ref()?.quarantined.front()?.until)
        };
        while let Some(at) = until(self) {
            if at > now || *left == 0 {
                return self.schedule(id, at);
            }
            *left -= 1;
            self.end_quarantine(id);
        }
    }

    /// Ends the oldest quarantine of a peer, which has one.
    fn end_quarantine(&mut self, id: PeerId) {
        let peer = self.peer_mut(id);
        peer.clean = peer.clean.saturating_sub(1);
        let Some(Quarantined { number, .. }) = peer.quarantined.pop_front() else { return };
        self.quarantined -= 1;
        self.set_free(id, number);
    }

    fn set_free(&mut self, id: PeerId, number: u16) {
        let peer = self.peer_mut(id);
        peer.release(number);
        let family = Family::of(peer.address);
        let sockets = &mut self.sockets[family as usize];
        let state = &mut sockets.all[usize::from(number)];
        state.busy -= 1;
        if state.busy == 0 && number >= sockets.ceiling {
            self.surplus.push(SocketId { family, number });
        }
        self.forget_if_unused(id);
    }

    fn forget_if_unused(&mut self, id: PeerId) {
        let peer = self.peer(id);
        if peer.registered || peer.busy > 0 {
            return;
        }
        let hash = self.hasher.address(peer.address);
        let entry = self.by_address.find_entry(hash, |found| *found == id);
        entry.expect("a known peer is in the index").remove();
        self.peers[id.index()] = None;
        self.free_peers.push(id.0);
    }

    /// Lowers the ceiling if the busiest peer needs less than half of it.
    fn shrink(&mut self, family: Family) {
        let of_family = |peer: &&mut Peer| Family::of(peer.address) == family;
        let needed = (self.peers.iter_mut().flatten().filter(of_family))
            .map(|peer| peer.busy as usize)
            .max()
            .unwrap_or(0);
        let sockets = &mut self.sockets[family as usize];
        let target = (needed + needed / 2).max(SOCKETS_KEPT);
        if target >= usize::from(sockets.ceiling) || needed * 2 >= usize::from(sockets.ceiling) {
            return;
        }
        // Below the ceiling, which is a u16.
        sockets.ceiling = target as u16;
        let mut drained = Vec::new();
        for (index, peer) in (0u16..).zip(&mut self.peers) {
            let Some(peer) = peer.as_mut().filter(|peer| of_family(peer)) else { continue };
            peer.withdraw(target as u16);
            if peer.free.is_empty() {
                drained.push(PeerId(index));
            }
        }
        for (number, state) in sockets.all.iter().enumerate().skip(target) {
            if state.open && state.busy == 0 {
                self.surplus.push(SocketId { family, number: number as u16 });
            }
        }
        drained.into_iter().for_each(|id| self.doubt(id));
    }

    /// SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014).
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }
}

#[cfg(test)]
mod tests;
