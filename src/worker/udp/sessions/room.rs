//! Room for new sessions where something has run out: places, seats, or pairs with a backend. Owns which
//! sessions are quiet, that is not in use any more, and who gives way to whom.
//!
//! A session is in use while something passed lately or an answer is still to come (`session::flows`).
//! What is in use never gives way. A quiet session does, the one that has been idle for longest first;
//! so does the rest of a pair. Neither costs a user anything that a reply could still reach: a session
//! becomes quiet no earlier than a reply to it stops being plausible, and a rest is cut short no earlier
//! than that either, so the next session on the pair hears nothing of the last one.
//!
//! A source that holds more than its share gives up its own sessions first. While almost everything is
//! in use it finds no room, and the last of it is left to the others.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::net::IpAddr;

use super::{Session, Sessions, Why};
use crate::base::time::Now;
use crate::proxy::udp::PeerId;
use crate::session::EndReason;
use crate::session::flows::Flow;
use crate::session::queues::Queues;
use crate::session::sources::{SourceId, Sources};
use crate::worker::books::Books;

/// What one source may hold when room is short: this part of all that is held,
const SHARE: u64 = 8;
/// and so many in any case.
const SHARE_LEAST: u64 = 8;
/// While less than this part could give way, a source beyond its share gets nothing.
const RESERVE: usize = 4;
/// Sessions of its own that are looked at for such a source.
const OWN_LOOKS: usize = 16;
/// Attempts to make room for one session. One is enough but for a socket that is being given up.
const TRIES: usize = 4;

/// Which sessions may give way, and what is not to be had yet of those that are over.
#[derive(Default)]
pub(super) struct Room {
    /// Quiet sessions that were answered, and those that were not, each from the first that became
    /// quiet on.
    all: Queues,
    /// The same for each peer.
    by_peer: Queues,
    /// Quiet sessions of each source.
    by_source: Queues,
    /// Of pairs that are not clean yet: until when, and whose session it was.
    cooling: VecDeque<(Now, SourceId)>,
    cooling_max: usize,
}

impl Room {
    /// `sessions`: as many pairs that are not clean are remembered.
    pub(super) fn new(sessions: usize) -> Room {
        Room { cooling_max: sessions, ..Room::default() }
    }

    /// A session has become quiet.
    pub(super) fn enter(&mut self, place: u32, flow: &Flow<Session>) {
        let waiting = usize::from(flow.awaiting);
        self.all.push(waiting, place);
        self.by_peer.push(2 * flow.state.peer.index() + waiting, place);
        self.by_source.push(flow.state.source.index(), place);
    }

    /// A session is in use again, or over.
    pub(super) fn leave(&mut self, place: u32) {
        self.all.remove(place);
        self.by_peer.remove(place);
        self.by_source.remove(place);
    }

    /// The pair of a session that is over counts for its source until it is clean.
    pub(super) fn cool(&mut self, clean: Now, source: SourceId, sources: &mut Sources) {
        if self.cooling.len() >= self.cooling_max
            && let Some((_, first)) = self.cooling.pop_front()
        {
            sources.let_go(first);
        }
        self.cooling.push_back((clean, source));
    }

    pub(super) fn settle(&mut self, now: Now, sources: &mut Sources) {
        while let Some((_, source)) = self.cooling.front().copied().filter(|it| it.0 <= now) {
            self.cooling.pop_front();
            sources.let_go(source);
        }
    }

    fn quiet(&self) -> usize {
        self.all.len(0) + self.all.len(1)
    }

    fn quiet_at(&self, peer: PeerId) -> usize {
        self.by_peer.len(2 * peer.index()) + self.by_peer.len(2 * peer.index() + 1)
    }
}

impl Sessions {
    /// Sees to it that a session of `user` can be given a pair with `peer`.
    pub(super) fn room_at(
        &mut self,
        now: Now,
        peer: PeerId,
        user: IpAddr,
        books: &mut Books,
    ) -> Result<(), Why> {
        let free = self.upstream.has_free(peer);
        if free && !self.is_scarce_at(now, peer, free) {
            return Ok(());
        }
        // As of now, however long ago the last turn was.
        self.end_idle(now, books);
        let greedy = self.greedy(user);
        if greedy.is_some() && self.is_scarce_at(now, peer, free) {
            return Err(Why::SourceShare);
        }
        if self.upstream.has_free(peer) {
            return Ok(());
        }
        for _ in 0..TRIES {
            if !self.give_way_at(now, peer, greedy, books) {
                break;
            }
            if self.upstream.has_free(peer) {
                return Ok(());
            }
        }
        Err(if greedy.is_some() { Why::SourceShare } else { Why::UpstreamExhausted })
    }

    /// Sees to it that this worker holds one session less, when no more may be held.
    pub(super) fn place_for(
        &mut self,
        now: Now,
        user: IpAddr,
        books: &mut Books,
    ) -> Result<(), Why> {
        let before = self.flows.len();
        self.end_idle(now, books);
        if self.flows.len() < before {
            return Ok(());
        }
        let greedy = self.greedy(user);
        if greedy.is_some() && is_scarce(self.room.quiet(), self.flows.len()) {
            return Err(Why::SourceShare);
        }
        let oldest = self.idle_longest([0, 1].map(|queue| self.room.all.first(queue)));
        match self.victim(greedy, oldest, |_| true) {
            Some(place) => {
                self.end(now, place, EndReason::Displaced, books);
                Ok(())
            }
            None if greedy.is_some() => Err(Why::SourceShare),
            None => Err(Why::TableFull),
        }
    }

    /// Whether less than the reserve could be had of this worker's pairs with a peer.
    fn is_scarce_at(&mut self, now: Now, peer: PeerId, free: bool) -> bool {
        let usage = self.upstream.usage(peer, now);
        let in_use = usage.busy.saturating_sub(usage.clean + self.room.quiet_at(peer));
        let all = if free { self.settings.share } else { usage.busy };
        is_scarce(all.saturating_sub(in_use), all)
    }

    /// Has one pair with this peer become free: what was quiet for longest goes first, but a rest that
    /// nobody can need goes before any session. False when nothing may give way.
    fn give_way_at(
        &mut self,
        now: Now,
        peer: PeerId,
        greedy: Option<SourceId>,
        books: &mut Books,
    ) -> bool {
        let settled = now.minus(self.settings.waits.answer);
        let first = 2 * peer.index();
        let oldest =
            self.idle_longest([first, first + 1].map(|queue| self.room.by_peer.first(queue)));
        let cut = self.upstream.cut_short(peer, settled, now);
        if !cut && let Some(place) = self.victim(greedy, oldest, |at| at == peer) {
            self.displace(now, place, books);
            return true;
        }
        let cut = cut || self.upstream.cut_short(peer, now, now);
        books.metrics().counters.udp_rests_cut_short.add(u64::from(cut));
        cut
    }

    /// The session that gives way: the one that has been idle for longest, but for a source beyond its
    /// share one of its own if there is one.
    fn victim(
        &self,
        greedy: Option<SourceId>,
        oldest: Option<u32>,
        fits: impl Fn(PeerId) -> bool,
    ) -> Option<u32> {
        let Some(source) = greedy else { return oldest };
        let is_fit = |place: &u32| self.flows.get(*place).is_some_and(|flow| fits(flow.state.peer));
        let own = self.room.by_source.iter(source.index()).take(OWN_LOOKS).find(is_fit);
        own.or(oldest)
    }

    fn idle_longest(&self, places: [Option<u32>; 2]) -> Option<u32> {
        let seen = |place: &u32| self.flows.get(*place).map(|flow| flow.last_seen);
        places.into_iter().flatten().max_by_key(|place| Reverse(seen(place)))
    }

    /// Ends a quiet session for another that is given its pair at once.
    fn displace(&mut self, now: Now, place: u32, books: &mut Books) {
        let Some(flow) = self.take_out(place) else { return };
        debug_assert!(self.flows.in_use_until(&flow) <= now, "a session in use does not give way");
        self.upstream.hand_on(flow.state.peer, flow.state.socket);
        self.sources.release(flow.state.source);
        books.close(flow.state.entry, EndReason::Displaced, now);
    }

    /// The source of this user, if it holds more than its share.
    fn greedy(&self, user: IpAddr) -> Option<SourceId> {
        let held = u64::from(self.sources.held(user));
        let all = (self.flows.len() + self.room.cooling.len()) as u64;
        if held >= SHARE_LEAST && held * SHARE > all { self.sources.of(user) } else { None }
    }
}

/// Whether less than the reserve could give way.
fn is_scarce(spare: usize, all: usize) -> bool {
    spare * RESERVE < all
}
