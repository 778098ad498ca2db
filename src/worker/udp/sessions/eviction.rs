//! Eviction: making room for a new session when places, seats or pairs with a backend have run out.
//! Owns which sessions are quiet, that is, no longer in use, and which of them is evicted for whom.
//!
//! A session is in use while something passed recently or a reply is outstanding
//! (`session::flows`). It is never evicted. A quiet session may be, the one idle longest first, and
//! a quarantine may end early. Neither costs a user a reply: a session becomes quiet, and a
//! quarantined pair clean, only when no reply can be expected any more. So the next session on the
//! pair receives nothing meant for the last.
//!
//! A source that holds more than its share loses its own sessions first. While almost everything is
//! in use, such a source gets no room at all: what little is left is for the others.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::net::IpAddr;

use super::{DropReason, Session, Sessions};
use crate::base::time::Now;
use crate::proxy::udp::PeerId;
use crate::session::EndReason;
use crate::session::flows::Flow;
use crate::session::queues::Queues;
use crate::session::sources::{SourceId, Sources};
use crate::worker::books::Books;

/// The share of one source when room is short: one eighth of all that is held,
const SHARE: u64 = 8;
/// but never fewer than this many.
const SHARE_LEAST: u64 = 8;
/// The reserve: while less than a quarter is free or evictable, a source beyond its share gets
/// nothing.
const RESERVE: usize = 4;
/// How many of its own sessions to look at for one that such a source can lose.
const OWN_LOOKS: usize = 16;
/// Attempts to free a pair for one session. One is enough, unless the pair's socket is above the
/// ceiling.
const TRIES: usize = 4;

/// The sessions that may be evicted, and the pairs of ended sessions that are not clean yet.
#[derive(Default)]
pub(super) struct Eviction {
    /// Quiet sessions, the first to become quiet first: queue 0 has those that were answered, queue
    /// 1 those that were not.
    all: Queues,
    /// The same two queues for each peer.
    by_peer: Queues,
    /// Quiet sessions of each source.
    by_source: Queues,
    /// Pairs of ended sessions: when each is clean, and the source it counts for until then.
    cooling: VecDeque<(Now, SourceId)>,
    cooling_max: usize,
}

impl Eviction {
    /// Remembers up to `sessions` pairs that are not clean yet.
    pub(super) fn new(sessions: usize) -> Eviction {
        Eviction { cooling_max: sessions, ..Eviction::default() }
    }

    /// A session has become quiet.
    pub(super) fn add(&mut self, place: u32, flow: &Flow<Session>) {
        let waiting = usize::from(flow.awaiting);
        self.all.push(waiting, place);
        self.by_peer.push(2 * flow.state.peer.index() + waiting, place);
        self.by_source.push(flow.state.source.index(), place);
    }

    /// A session is in use again, or has ended.
    pub(super) fn remove(&mut self, place: u32) {
        self.all.remove(place);
        self.by_peer.remove(place);
        self.by_source.remove(place);
    }

    /// A session has ended; its pair counts for its source until it is clean.
    pub(super) fn cool(&mut self, clean: Now, source: SourceId, sources: &mut Sources) {
        if self.cooling.len() >= self.cooling_max
            && let Some((_, first)) = self.cooling.pop_front()
        {
            sources.let_go(first);
        }
        self.cooling.push_back((clean, source));
    }

    /// Lets go of the pairs that have become clean.
    pub(super) fn settle(&mut self, now: Now, sources: &mut Sources) {
        while let Some((_, source)) = self.cooling.front().copied().filter(|it| it.0 <= now) {
            self.cooling.pop_front();
            sources.let_go(source);
        }
    }

    /// Those pairs, the first to be clean first.
    pub(super) fn cooling(&self) -> impl Iterator<Item = (Now, SourceId)> {
        self.cooling.iter().copied()
    }

    fn quiet(&self) -> usize {
        self.all.len(0) + self.all.len(1)
    }

    fn quiet_at(&self, peer: PeerId) -> usize {
        self.by_peer.len(2 * peer.index()) + self.by_peer.len(2 * peer.index() + 1)
    }
}

impl Sessions {
    /// Makes sure that a pair with `peer` is free for a session of `user`, by eviction if need be.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn make_pair_free(
        &mut self,
        now: Now,
        peer: PeerId,
        user: IpAddr,
        books: &mut Books,
    ) -> Result<(), DropReason> {
        let free = self.pairs.has_free(peer);
        if free && !self.is_scarce_at(now, peer, free) {
            return Ok(());
        }
        // Which sessions are quiet is known as of the last turn; bring it up to date.
        self.end_idle(now, books);
        let over_share = self.over_share(user);
        if over_share.is_some() && self.is_scarce_at(now, peer, free) {
            return Err(DropReason::SourceShare);
        }
        if self.pairs.has_free(peer) {
            return Ok(());
        }
        for _ in 0..TRIES {
            if !self.evict_at(now, peer, over_share, books) {
                break;
            }
            if self.pairs.has_free(peer) {
                return Ok(());
            }
        }
        Err(if over_share.is_some() {
            DropReason::SourceShare
        } else {
            DropReason::UpstreamExhausted
        })
    }

    /// Ends a session because no more may be held, so that `user` can have its place and seat.
    ///
    /// # Errors
    /// Why none could be ended.
    pub(super) fn make_place_free(
        &mut self,
        now: Now,
        user: IpAddr,
        books: &mut Books,
    ) -> Result<(), DropReason> {
        let before = self.flows.len();
        self.end_idle(now, books);
        if self.flows.len() < before {
            return Ok(());
        }
        let over_share = self.over_share(user);
        if over_share.is_some() && is_scarce(self.eviction.quiet(), self.flows.len()) {
            return Err(DropReason::SourceShare);
        }
        let oldest = self.idle_longest([0, 1].map(|queue| self.eviction.all.first(queue)));
        match self.victim(over_share, oldest, |_| true) {
            Some(place) => {
                self.end(now, place, EndReason::Displaced, books);
                Ok(())
            }
            None if over_share.is_some() => Err(DropReason::SourceShare),
            None => Err(DropReason::TableFull),
        }
    }

    /// Whether less than the reserve of this worker's pairs with a peer is free or could become so.
    fn is_scarce_at(&mut self, now: Now, peer: PeerId, free: bool) -> bool {
        let usage = self.pairs.usage(peer, now);
        let in_use = usage.busy.saturating_sub(usage.clean + self.eviction.quiet_at(peer));
        let all = if free { self.settings.share } else { usage.busy };
        is_scarce(all.saturating_sub(in_use), all)
    }

    /// Frees one pair with this peer: ends a quarantine if nothing has passed on its pair for so
    /// long that no reply is plausible, otherwise evicts the session idle longest, otherwise ends
    /// any clean quarantine. False if nothing could be freed.
    fn evict_at(
        &mut self,
        now: Now,
        peer: PeerId,
        over_share: Option<SourceId>,
        books: &mut Books,
    ) -> bool {
        let long_ago = now.minus(self.settings.waits.answer);
        let first = 2 * peer.index();
        let oldest =
            self.idle_longest([first, first + 1].map(|queue| self.eviction.by_peer.first(queue)));
        let ended = self.pairs.end_early(peer, long_ago, now);
        if !ended && let Some(place) = self.victim(over_share, oldest, |at| at == peer) {
            self.evict(now, place, books);
            return true;
        }
        let ended = ended || self.pairs.end_early(peer, now, now);
        books.metrics().counters.udp_rests_cut_short.add(u64::from(ended));
        ended
    }

    /// The session to evict: the one idle longest, or if the source that needs room is beyond its
    /// share, one of its own if it has any.
    fn victim(
        &self,
        over_share: Option<SourceId>,
        oldest: Option<u32>,
        fits: impl Fn(PeerId) -> bool,
    ) -> Option<u32> {
        let Some(source) = over_share else { return oldest };
        let is_fit = |place: &u32| self.flows.get(*place).is_some_and(|flow| fits(flow.state.peer));
        let own = self.eviction.by_source.iter(source.index()).take(OWN_LOOKS).find(is_fit);
        own.or(oldest)
    }

    /// Of the first sessions of two queues, the one idle longer.
    fn idle_longest(&self, places: [Option<u32>; 2]) -> Option<u32> {
        let seen = |place: &u32| self.flows.get(*place).map(|flow| flow.last_seen);
        places.into_iter().flatten().max_by_key(|place| Reverse(seen(place)))
    }

    /// Ends a quiet session so that another can have its pair at once.
    fn evict(&mut self, now: Now, place: u32, books: &mut Books) {
        let Some(flow) = self.take_out(place) else { return };
        debug_assert!(self.flows.in_use_until(&flow) <= now, "a session in use is not evicted");
        self.pairs.free_clean(flow.state.peer, flow.state.socket);
        self.sources.release(flow.state.source);
        books.close(flow.state.entry, EndReason::Displaced, now);
    }

    /// The source of this user, if it holds more than its share.
    fn over_share(&self, user: IpAddr) -> Option<SourceId> {
        let held = u64::from(self.sources.held(user));
        let all = (self.flows.len() + self.eviction.cooling.len()) as u64;
        if held >= SHARE_LEAST && held * SHARE > all { self.sources.of(user) } else { None }
    }
}

/// Whether `spare` is less than the reserve of `all`.
fn is_scarce(spare: usize, all: usize) -> bool {
    spare * RESERVE < all
}
