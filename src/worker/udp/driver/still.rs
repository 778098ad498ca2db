//! UDP while the worker stands still. Owns what a driver of datagrams has to settle before that, and how it lets go
//! of everything.
//!
//! There is nothing to take back: a datagram leaves when its send is submitted, and a receive without blocks ends
//! and is posted again when the worker goes on. What was received before goes out at once.

use super::UdpDriver;
use super::upstream::receive_tag;
use crate::proxy::udp::Family;
use crate::ring::Done;
use crate::worker::driver::Turn;

impl UdpDriver {
    /// A completion that came although no block is posted any more.
    pub(super) fn note(&mut self, done: Done, turn: &mut Turn<'_>) {
        self.complete(done, turn);
        self.send_gathered(turn);
    }

    /// Whether the kernel has let go of all sockets that are being closed.
    pub(super) fn is_still(&self) -> bool {
        self.closing.is_empty()
    }

    /// Relays what other workers have handed off to this one before they stood still.
    pub(super) fn settle(&mut self, turn: &mut Turn<'_>) {
        self.take_handoffs(turn);
        self.send_gathered(turn);
    }

    /// Forgets its sessions if they have been described, and all doors in any case: others have duplicates of the
    /// sockets.
    pub(super) fn leave(&mut self, turn: &mut Turn<'_>) {
        for door in std::mem::take(&mut self.doors).into_iter().flatten() {
            self.close_socket(door.tag, door.socket, turn.ring);
        }
        if std::mem::take(&mut self.described) {
            self.forget_all(turn);
        }
    }

    /// Forgets all sessions and closes their sockets, of which others have duplicates.
    pub(super) fn forget_all(&mut self, turn: &mut Turn<'_>) {
        self.sessions.forget_all(turn.now, turn.books);
        for family in Family::BOTH {
            let all = std::mem::take(&mut self.upstream[family as usize]);
            for (place, upstream) in all.into_iter().enumerate() {
                let Some(upstream) = upstream else { continue };
                self.open -= 1;
                self.config.seats.give_back();
                let tag = receive_tag(family, place as u16, &upstream);
                self.close_socket(tag, upstream.socket, turn.ring);
            }
        }
    }
}
