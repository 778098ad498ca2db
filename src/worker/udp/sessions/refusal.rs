//! What ICMP says about datagrams to backends, and how much of it is believed. Anybody can forge such a
//! message who guesses a port; nobody but the backend can answer from its address.

use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;

use super::{Sessions, plain};
use crate::base::time::Now;
use crate::proxy::udp::{Owner, PeerId, Socket};
use crate::worker::books::Books;

/// How long after a datagram ICMP may say that it could not be delivered: a port that is closed is told
/// within a round trip, a host that does not answer when three tries a second apart have failed.
const ICMP_LATE: Duration = Duration::from_secs(5);

impl Sessions {
    /// ICMP says that nobody is at `to`, and that something was sent there from one of `sockets`. It is
    /// believed about a datagram that a session sent a moment ago and that nobody has
    /// answered, and moves that session; the backend is avoided when it is believed about two datagrams,
    /// and the backend has said nothing in between.
    pub fn refused(
        &mut self,
        now: Now,
        mut sockets: impl Iterator<Item = Socket>,
        to: SocketAddr,
        errno: Errno,
        books: &mut Books,
    ) {
        let peer = self.upstream.find(plain(to));
        let about = peer.and_then(|peer| sockets.find_map(|at| self.unanswered(now, peer, at)));
        let Some((peer, place)) = peer.zip(about) else {
            return books.metrics().counters.udp_refused_unasked.one();
        };
        books.metrics().counters.udp_refused.one();
        let flow = self.flows.get_mut(place).expect("a held pair names a running session");
        (flow.state.open, flow.state.refused) = (false, true);
        if self.tenants.accuse(peer, now) {
            books.backend_failed(&flow.state.entry, errno);
        }
    }

    /// The session that sent something to `peer` by `socket` a moment ago and waits for an answer.
    fn unanswered(&self, now: Now, peer: PeerId, socket: Socket) -> Option<u32> {
        let Owner::Session(place) = self.upstream.owner(peer, socket) else { return None };
        let flow = self.flows.get(place)?;
        // Nothing has come since, so it was last seen when it sent.
        (flow.state.open && now <= flow.last_seen.plus(ICMP_LATE)).then_some(place)
    }
}
