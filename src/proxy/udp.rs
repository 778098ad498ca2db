//! The upstream side of UDP: which socket a session sends from, and whose a reply is. Owns the sockets'
//! numbers and the pairs of (backend address, socket); opens nothing itself and knows no clock.
//!
//! A socket is not connected and is shared by sessions on different backends: the pair of a backend's
//! address and the socket names the session. So the sockets, and with them descriptors and local
//! ports, follow the backend with the most sessions and not the sum. What is a socket here may be one
//! of several addresses that the driver sends from by the same descriptor.
//!
//! Connecting the sockets that serve one session would save looking for the route, 5 % of a worker's time
//! in a profile of 64 flows; measured in turns over 9 rounds it cost 0.99 times as much, and strangers'
//! replies would be dropped where nobody counts them.
//!
//! ```text
//!   free --take--> held by a session --give_back--> resting --rest is over--> free
//! ```
//!
//! A pair that was given back rests, because a late reply to its last session would otherwise reach the
//! next one. Pairs belong to addresses, not to registrations, so the rest outlives a backend that
//! leaves and registers again. Where a backend has no free pair left the rest that began first may be
//! cut short ([`Upstream::cut_short`]), but never before the moment from which on no reply can be
//! expected any more: until then the pair is not clean, and nobody gets it.
//!
//! Sockets are numbered from zero. New sessions use those below the ceiling, which are all open. The
//! ceiling rises when some backend has no free pair, and sinks when none needs half of what is open;
//! a socket above it is closed as soon as its last pair has rested.

mod peer;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::time::Duration;

use hashbrown::HashTable;

use peer::{FREE, Peer, RESTING, Rest};

use crate::base::time::Now;
use crate::session::flows::FlowHasher;

/// Backend addresses that may be known at once: those that are registered, and those that have left
/// while pairs of theirs are held or rest.
pub const PEERS_MAX: usize = 4096;
/// So few are looked through one by one in less time than an address takes to hash.
const FEW_PEERS: usize = 4;
/// Sockets of one family and one worker at most, each address of a socket counted.
pub const SOCKETS_MAX: usize = 65_535;
/// Sockets that are kept open even when nobody needs them.
const SOCKETS_KEPT: usize = 32;
/// How long to do without a new socket after one could not be opened.
const OPEN_PAUSE: Duration = Duration::from_millis(100);
/// How often to look whether sockets are left over.
const SHRINK_EVERY: Duration = Duration::from_secs(10);
/// Pairs whose rest may end in one call of [`Upstream::settle`], so that a call stays short.
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

/// An upstream socket by its number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Socket {
    pub family: Family,
    pub number: u16,
}

/// A backend's address in the table; good while it is registered or pairs of it are held.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerId(u16);

impl PeerId {
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Whom a reply is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The session at this place.
    Session(u32),
    /// A session that is over.
    Resting,
    Nobody,
}

/// What the table is told once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sockets of both families together.
    pub sockets: usize,
    /// How long a pair rests.
    pub rest: Duration,
    /// Pairs that rest at once, except for those that are not clean: for each one more, another that
    /// is clean gives up its rest.
    pub resting: usize,
}

/// What is known about a pair when it is given back.
#[derive(Clone, Copy, Debug)]
pub struct Past {
    /// When something last passed.
    pub last: Now,
    /// From when on no reply can be expected.
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
    /// Pairs of any peer that are held or rest.
    busy: u32,
    /// The peer that a datagram came from last: most likely the next one's too.
    last: Option<PeerId>,
}

/// How the pairs with one peer are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Use {
    /// Pairs that are not free.
    pub busy: usize,
    /// Of these, pairs that rest and are clean.
    pub clean: usize,
}

/// The upstream sockets of one worker and the pairs on them.
pub struct Upstream {
    limits: Limits,
    hasher: FlowHasher,
    random: u64,
    by_address: HashTable<PeerId>,
    peers: Vec<Option<Peer>>,
    free_peers: Vec<u16>,
    /// By [`Family`].
    sockets: [Sockets; 2],
    open: usize,
    /// Pairs that rest, of all peers.
    resting: usize,
    /// When to look at a peer's rests: one entry for each peer that has any.
    ends: BinaryHeap<Reverse<(Now, PeerId)>>,
    /// By [`PeerId::index`]: whether it has an entry there.
    has_end: Vec<bool>,
    surplus: Vec<Socket>,
    /// By [`Family`]: no socket is wanted before.
    open_again: [Now; 2],
    shrink_at: Now,
}

impl Upstream {
    /// A table without sockets or peers. `seed` makes the choice of sockets unpredictable.
    pub fn new(limits: Limits, seed: u64, hasher: FlowHasher, now: Now) -> Upstream {
        Upstream {
            limits,
            hasher,
            random: seed,
            by_address: HashTable::new(),
            peers: Vec::new(),
            free_peers: Vec::new(),
            sockets: Default::default(),
            open: 0,
            resting: 0,
            ends: BinaryHeap::new(),
            has_end: Vec::new(),
            surplus: Vec::new(),
            open_again: [now; 2],
            shrink_at: now.plus(SHRINK_EVERY),
        }
    }

    /// Sockets that are open.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Pairs that rest.
    pub fn resting(&self) -> usize {
        self.resting
    }

    /// Enters the address of a registered backend; `None` when too many addresses are known.
    pub fn register(&mut self, address: SocketAddr) -> Option<PeerId> {
        if let Some(id) = self.find(address) {
            self.peer_mut(id).registered = true;
            return Some(id);
        }
        let index = match self.free_peers.pop() {
            Some(index) => index,
            None if self.peers.len() < PEERS_MAX => {
                self.peers.push(None);
                self.has_end.push(false);
                self.peers.len() as u16 - 1
            }
            None => return None,
        };
        self.peers[usize::from(index)] = Some(Peer::new(address));
        let Upstream { by_address, peers, hasher, .. } = self;
        by_address.insert_unique(hasher.address(address), PeerId(index), |id| {
            let peer = peers[id.index()].as_ref();
            hasher.address(peer.expect("the index names peers that are known").address)
        });
        Some(PeerId(index))
    }

    /// The backend at this address has left. The address is known until its last pair has rested.
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

    /// The peer with this address, from which a datagram came to `socket`.
    pub fn speaker(&mut self, socket: Socket, address: SocketAddr) -> Option<PeerId> {
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

    /// Whom a datagram from `id` to `socket` is for.
    pub fn owner(&self, id: PeerId, socket: Socket) -> Owner {
        let peer = self.peer(id);
        if Family::of(peer.address) != socket.family {
            return Owner::Nobody;
        }
        match peer.owners.get(usize::from(socket.number)) {
            None | Some(&FREE) => Owner::Nobody,
            Some(&RESTING) => Owner::Resting,
            Some(&place) => Owner::Session(place),
        }
    }

    /// A socket to be opened before a new session can be sure of a pair, whichever backend it is
    /// given. To be answered with [`Upstream::opened`] or [`Upstream::failed`].
    pub fn wanted(&mut self, now: Now) -> Option<Socket> {
        for family in Family::BOTH {
            while now >= self.open_again[family as usize] && self.is_short(family) {
                let sockets = &mut self.sockets[family as usize];
                let next = usize::from(sockets.ceiling);
                if sockets.all.get(next).is_some_and(|socket| socket.open) {
                    sockets.ceiling += 1;
                } else if self.open < self.limits.sockets && next < SOCKETS_MAX {
                    return Some(Socket { family, number: sockets.ceiling });
                } else {
                    break;
                }
            }
        }
        None
    }

    /// The socket that was wanted is open.
    pub fn opened(&mut self, socket: Socket) {
        let sockets = &mut self.sockets[socket.family as usize];
        assert_eq!(socket.number, sockets.ceiling, "the wanted socket is the next one");
        if sockets.all.len() == usize::from(socket.number) {
            sockets.all.push(SocketState::default());
        }
        sockets.all[usize::from(socket.number)].open = true;
        sockets.ceiling += 1;
        self.open += 1;
    }

    /// The socket that was wanted could not be opened: none of its family is wanted for a moment.
    pub fn failed(&mut self, socket: Socket, now: Now) {
        self.open_again[socket.family as usize] = now.plus(OPEN_PAUSE);
    }

    /// A free pair with this peer, chosen at random, for the session at `place`; `None` when all are
    /// held or rest and no further socket is open.
    pub fn take(&mut self, id: PeerId, place: u32) -> Option<Socket> {
        assert!(place < RESTING, "a place is not one of the two marks");
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
        Some(Socket { family, number })
    }

    /// Whether a session can be given a pair with this peer without anybody making room.
    pub fn has_free(&mut self, id: PeerId) -> bool {
        let peer = self.peers[id.index()].as_mut().expect("a peer in use is known");
        peer.offer(self.sockets[Family::of(peer.address) as usize].ceiling);
        !peer.free.is_empty()
    }

    /// The session of this pair is over, or has moved: the pair rests.
    pub fn give_back(&mut self, id: PeerId, socket: Socket, past: Past, now: Now) {
        let until = now.plus(self.limits.rest);
        let past = Past { clean: past.clean.min(until), ..past };
        let peer = self.peer_mut(id);
        let owner = &mut peer.owners[usize::from(socket.number)];
        assert!(*owner < RESTING, "a pair is given back once");
        *owner = RESTING;
        peer.resting.push_back(Rest { until, past, number: socket.number });
        self.resting += 1;
        self.look_at(id, until);
        if self.resting > self.limits.resting {
            self.cut_short(id, now, now);
        }
    }

    /// The session of this pair gave way to another, and the pair is clean: it does not rest.
    pub fn hand_on(&mut self, id: PeerId, socket: Socket) {
        let owner = self.peer(id).owners[usize::from(socket.number)];
        assert!(owner < RESTING, "a pair is handed on by its session");
        self.set_free(id, socket.number);
    }

    /// Ends the rest with this peer that began first, if nothing has passed since `before` and the
    /// pair is clean. False when there is none such.
    pub fn cut_short(&mut self, id: PeerId, before: Now, now: Now) -> bool {
        let front = self.peer(id).resting.front();
        let may = front.is_some_and(|rest| rest.past.clean <= now && rest.past.last <= before);
        if may {
            self.end_rest(id);
        }
        may
    }

    /// How the pairs with this peer are used now.
    pub fn usage(&mut self, id: PeerId, now: Now) -> Use {
        let peer = self.peer_mut(id);
        while peer.resting.get(peer.clean).is_some_and(|rest| rest.past.clean <= now) {
            peer.clean += 1;
        }
        Use { busy: peer.busy as usize, clean: peer.clean }
    }

    /// Ends the rests that are over and looks for sockets that are left over. True when more is to be
    /// done at once.
    pub fn settle(&mut self, now: Now) -> bool {
        let mut left = SETTLED_MAX;
        while let Some(Reverse((at, id))) = self.ends.peek().copied().filter(|_| left > 0) {
            if at > now {
                break;
            }
            self.ends.pop();
            self.has_end[id.index()] = false;
            left -= 1;
            self.end_rests(id, now, &mut left);
        }
        if now >= self.shrink_at {
            self.shrink_at = now.plus(SHRINK_EVERY);
            Family::BOTH.into_iter().for_each(|family| self.shrink(family));
        }
        left == 0
    }

    /// When [`Upstream::settle`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        let shrink = (self.open > SOCKETS_KEPT).then_some(self.shrink_at);
        let end = self.ends.peek().map(|Reverse((at, _))| *at);
        end.into_iter().chain(shrink).min()
    }

    /// A socket to close, which nobody uses; it counts as closed from here on.
    pub fn next_surplus(&mut self) -> Option<Socket> {
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

    /// Whether the peer with this address is known by `id` now.
    fn is_at(&self, id: PeerId, address: SocketAddr) -> bool {
        self.peers[id.index()].as_ref().is_some_and(|peer| peer.address == address)
    }

    fn peer(&self, id: PeerId) -> &Peer {
        self.peers[id.index()].as_ref().expect("a peer in use is known")
    }

    fn peer_mut(&mut self, id: PeerId) -> &mut Peer {
        self.peers[id.index()].as_mut().expect("a peer in use is known")
    }

    /// Whether a registered backend of this family has no free pair.
    fn is_short(&mut self, family: Family) -> bool {
        let ceiling = self.sockets[family as usize].ceiling;
        self.peers.iter_mut().flatten().any(|peer| {
            peer.registered && Family::of(peer.address) == family && {
                peer.offer(ceiling);
                peer.free.is_empty()
            }
        })
    }

    /// Looks at a peer's rests at `at`, or earlier if that is planned.
    fn look_at(&mut self, id: PeerId, at: Now) {
        if !std::mem::replace(&mut self.has_end[id.index()], true) {
            self.ends.push(Reverse((at, id)));
        }
    }

    /// Ends the rests of a peer that are over, as many as may be.
    fn end_rests(&mut self, id: PeerId, now: Now, left: &mut usize) {
        let until = |upstream: &Upstream| -> Option<Now> {
            Some(upstream.peers[id.index()].as_ref()?.resting.front()?.until)
        };
        while let Some(at) = until(self) {
            if at > now || *left == 0 {
                return self.look_at(id, at);
            }
            *left -= 1;
            self.end_rest(id);
        }
    }

    /// Ends the rest that began first, of which there is one.
    fn end_rest(&mut self, id: PeerId) {
        let peer = self.peer_mut(id);
        peer.clean = peer.clean.saturating_sub(1);
        let Some(Rest { number, .. }) = peer.resting.pop_front() else { return };
        self.resting -= 1;
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
            self.surplus.push(Socket { family, number });
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

    /// Lowers the ceiling when the busiest peer needs less than half of it.
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
        for peer in self.peers.iter_mut().flatten().filter(of_family) {
            peer.withdraw(target as u16);
        }
        for (number, state) in sockets.all.iter().enumerate().skip(target) {
            if state.open && state.busy == 0 {
                self.surplus.push(Socket { family, number: number as u16 });
            }
        }
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
