//! ICMP errors about datagrams to backends, and which of them are believed. Anybody who guesses a
//! port can forge one; only the backend itself can answer from its address.

use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;

use super::{Sessions, plain};
use crate::base::time::Now;
use crate::proxy::udp::{PairOwner, PeerId, SocketId};
use crate::worker::books::Books;

/// How long after a datagram an ICMP error about it is believed: a closed port is reported within a
/// round trip, an unreachable host after three attempts, a second apart, to resolve its address.
const ICMP_LATE: Duration = Duration::from_secs(5);

impl Sessions {
    /// ICMP reports that a datagram from one of `sockets` could not be delivered to `to`. That is
    /// believed if a session sent one there a moment ago that has no answer yet; that session then
    /// moves. The backend is avoided after two such reports with nothing from it in between.
    pub fn unreachable(
        &mut self,
        now: Now,
        mut sockets: impl Iterator<Item = SocketId>,
        to: SocketAddr,
        errno: Errno,
        books: &mut Books,
    ) {
        let peer = self.pairs.find(plain(to));
        let about = peer.and_then(|peer| sockets.find_map(|at| self.unanswered(now, peer, at)));
        let Some((peer, place)) = peer.zip(about) else {
            return books.metrics().counters.udp_refused_unasked.one();
        };
        books.metrics().counters.udp_refused.one();
        let flow = self.flows.get_mut(place).expect("a held pair names a running session");
        (flow.state.unanswered, flow.state.refused) = (false, true);
        if self.backends.suspect(peer, flow.state.entry.service, now) {
            books.backend_failed(&flow.state.entry, errno);
        }
    }

    /// The session that sent something to `peer` by `socket` a moment ago and has no answer yet.
    fn unanswered(&self, now: Now, peer: PeerId, socket: SocketId) -> Option<u32> {
        let PairOwner::Session(place) = self.pairs.owner(peer, socket) else { return None };
        let flow = self.flows.get(place)?;
        // No answer has come, so something last passed when it sent.
        (flow.state.unanswered && now <= flow.last_seen.plus(ICMP_LATE)).then_some(place)
    }
}
