//! The sockets towards backends: opened when the pair table wants one, closed when it needs none.
//! Owns the descriptors and the receive that is in flight on each; which session uses one is up to
//! `proxy::udp`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::burst::Burst;
use super::{RECEIVE_UPSTREAM, REPLY, UdpDriver};
use crate::proxy::udp::{Family, SocketId};
use crate::ring::{Ring, Tag, sys};

/// A socket towards backends.
pub(super) struct UpstreamSocket {
    pub(super) socket: OwnedFd,
    pub(super) generation: u32,
    /// How many sockets of the pair table it stands for: one for each local address in use.
    pub(super) numbers: u16,
    pub(super) burst: Burst,
}

impl UdpDriver {
    /// The socket that a transmit with this tag leaves by.
    pub(super) fn sender(&self, tag: Tag) -> Option<BorrowedFd<'_>> {
        if tag.kind == REPLY {
            let door = self.doors.get(tag.slot as usize)?.as_ref();
            return door.map(|door| door.socket.as_fd());
        }
        self.upstream(tag.slot).map(|upstream| upstream.socket.as_fd())
    }

    pub(super) fn upstream(&self, slot: u32) -> Option<&UpstreamSocket> {
        let (family, place) = place_of(slot);
        self.upstream[family as usize].get(usize::from(place))?.as_ref()
    }

    /// The socket a completion belongs to, unless that is being closed.
    pub(super) fn at(&self, tag: Tag) -> Option<&UpstreamSocket> {
        self.upstream(tag.slot).filter(|socket| socket.generation == tag.generation)
    }

    /// Opens the socket that the pair table wants, on a descriptor that is open already if another
    /// of its local addresses is in use. False if there is no seat or no descriptor left.
    pub(super) fn open_upstream(&mut self, socket: SocketId, ring: &mut Ring) -> bool {
        let (place, _) = self.config.local_addresses.split(socket);
        let there = self.upstream[socket.family as usize].get_mut(usize::from(place));
        if let Some(upstream) = there.and_then(Option::as_mut) {
            upstream.numbers += 1;
            return true;
        }
        if !self.config.seats.take() {
            return false;
        }
        let tell = self.config.local_addresses.is_set(socket.family);
        let v4 = socket.family == Family::V4;
        let Ok(descriptor) = sys::datagram_upstream(v4, self.config.offload, tell) else {
            self.config.seats.give_back();
            return false;
        };
        self.keep(socket.family, place, descriptor, ring);
        true
    }

    /// Takes a new socket into use and starts to receive on it.
    fn keep(&mut self, family: Family, place: u16, socket: OwnedFd, ring: &mut Ring) {
        let upstream = UpstreamSocket {
            socket,
            generation: self.next_generation(),
            numbers: 1,
            burst: Burst::default(),
        };
        let tag = receive_tag(family, place, &upstream);
        ring.receive_datagrams(tag, upstream.socket.as_fd());
        let (all, place) = (&mut self.upstream[family as usize], usize::from(place));
        if all.len() <= place {
            all.resize_with(place + 1, || None);
        }
        all[place] = Some(upstream);
        self.open += 1;
        self.make_room_for_rearms();
    }

    /// Tells one use of a place from the next.
    pub(super) fn next_generation(&mut self) -> u32 {
        self.generation = self.generation.wrapping_add(1) & crate::ring::GENERATION;
        self.generation
    }

    /// All receives may end in the same turn. Reserving here avoids an allocation while relaying.
    pub(super) fn make_room_for_rearms(&mut self) {
        let sockets = self.doors.len() + self.upstream.iter().map(Vec::len).sum::<usize>();
        self.rearms.reserve(sockets.saturating_sub(self.rearms.len()));
    }

    /// The pair table no longer needs this socket; the descriptor is closed with the last of its
    /// sockets.
    pub(super) fn close(&mut self, socket: SocketId, ring: &mut Ring) {
        let (place, _) = self.config.local_addresses.split(socket);
        let there = self.upstream[socket.family as usize].get_mut(usize::from(place));
        let Some(there) = there else { return };
        if let Some(upstream) = there.as_mut().filter(|upstream| upstream.numbers > 1) {
            upstream.numbers -= 1;
            return;
        }
        let Some(upstream) = there.take() else { return };
        self.open -= 1;
        self.config.seats.give_back();
        self.close_socket(receive_tag(socket.family, place, &upstream), upstream.socket, ring);
    }

    /// Closes a socket whose receive has this tag, once that has ended.
    pub(super) fn close_socket(&mut self, tag: Tag, socket: OwnedFd, ring: &mut Ring) {
        match self.rearms.iter().position(|rearm| rearm.tag == tag) {
            // No receive is in flight on it.
            Some(place) => {
                self.rearms.swap_remove(place);
                ring.close(socket);
            }
            None => {
                ring.cancel(tag);
                self.closing.push((tag, socket));
            }
        }
    }
}

pub(super) fn receive_tag(family: Family, place: u16, upstream: &UpstreamSocket) -> Tag {
    let slot = slot_of(family, place);
    Tag { kind: RECEIVE_UPSTREAM, generation: upstream.generation, slot }
}

pub(super) fn slot_of(family: Family, place: u16) -> u32 {
    u32::from(place) << 1 | family as u32
}

pub(super) fn place_of(slot: u32) -> (Family, u16) {
    let family = if slot & 1 == Family::V4 as u32 { Family::V4 } else { Family::V6 };
    (family, (slot >> 1) as u16)
}
