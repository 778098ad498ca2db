//! Who opens sessions: how many each source holds, and how fast it opens them. Owns the limits per
//! source, which is an IPv4 address or an IPv6 /64 (the smallest network that one customer is given,
//! RFC 6177). Knows no clock.
//!
//! Sessions per source are counted exactly. The rate is exact for every source that holds a session,
//! and for the others as long as no more than `capacity` sources were active within a second; beyond
//! that, the source that has been without a session for longest is forgotten first. Memory is bounded
//! by `capacity`, however many addresses a flood claims to come from.

use std::net::IpAddr;
use std::num::NonZeroU32;

use hashbrown::HashTable;

use super::flows::FlowHasher;
use super::queues::Queues;
use crate::base::time::Now;

const SECOND: u64 = 1_000_000_000;
/// The only queue of [`Sources::vacant`].
const VACANT: usize = 0;

/// The limits for one source; `None` is unlimited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SourceLimits {
    /// Sessions at once.
    pub sessions: Option<NonZeroU32>,
    /// New sessions per second; after a second without any, this many may come at once.
    pub new_per_second: Option<NonZeroU32>,
}

/// Which limit a source has reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exceeded {
    Sessions,
    Rate,
}

/// A source that holds a session; valid until that session is let go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceId(u32);

impl SourceId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Clone, Copy)]
struct Source {
    prefix: u64,
    sessions: u32,
    /// Sessions, including ended ones that have not been let go.
    held: u32,
    /// When the rate allows as much as for a source never seen before, in nanoseconds (the
    /// theoretical arrival time of the generic cell rate algorithm, ITU-T I.371).
    clear_at: u64,
}

/// The sources of one worker's sessions.
pub struct Sources {
    limits: SourceLimits,
    hasher: FlowHasher,
    capacity: usize,
    index: HashTable<u32>,
    sources: Vec<Source>,
    free: Vec<u32>,
    /// The sources that hold nothing, in the order in which they lost their last session.
    vacant: Queues,
}

impl Sources {
    /// `capacity` is the maximum number of sessions, including ended ones that have not been let go.
    /// Each has one source, so it is enough for all of them.
    pub fn new(limits: SourceLimits, capacity: usize, hasher: FlowHasher) -> Sources {
        Sources {
            limits,
            hasher,
            capacity,
            index: HashTable::new(),
            sources: Vec::new(),
            free: Vec::new(),
            vacant: Queues::default(),
        }
    }

    /// How many sources are remembered.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Whether `client` may open a session now. Changes nothing.
    ///
    /// # Errors
    /// The limit it has reached.
    pub fn check(&self, client: IpAddr, now: Now) -> Result<(), Exceeded> {
        let Some(source) = self.find(prefix_of(client)) else { return Ok(()) };
        let source = &self.sources[source as usize];
        if self.limits.sessions.is_some_and(|most| source.sessions >= most.get()) {
            return Err(Exceeded::Sessions);
        }
        match self.interval() {
            Some(interval)
                if source.clear_at.max(now.nanos()) + interval > now.nanos() + SECOND =>
            {
                Err(Exceeded::Rate)
            }
            _ => Ok(()),
        }
    }

    /// Counts a session that `client` has opened. `None` if more sessions are open than `capacity`,
    /// which a caller that bounds its sessions by it never sees.
    pub fn charge(&mut self, client: IpAddr, now: Now) -> Option<SourceId> {
        self.forget_clear(now);
        let held = self.hold(prefix_of(client))?;
        let interval = self.interval().unwrap_or(0);
        let source = &mut self.sources[held.index()];
        source.clear_at = source.clear_at.max(now.nanos()) + interval;
        Some(held)
    }

    /// Counts a session of a source, which was opened elsewhere and before. `None` as above.
    pub fn hold(&mut self, prefix: u64) -> Option<SourceId> {
        let place = match self.find(prefix) {
            Some(place) => place,
            None => self.enter(prefix)?,
        };
        if self.sources[place as usize].held == 0 {
            self.vacant.remove(place);
        }
        let source = &mut self.sources[place as usize];
        source.sessions += 1;
        source.held += 1;
        Some(SourceId(place))
    }

    /// The sources whose rate still matters, and when it no longer does.
    pub fn rated(&self, now: Now) -> impl Iterator<Item = (u64, Now)> {
        let all = self.index.iter().map(|place| &self.sources[*place as usize]);
        let matters = all.filter(move |source| source.clear_at > now.nanos());
        matters.map(|source| (source.prefix, Now::from_nanos(source.clear_at)))
    }

    /// Remembers the rate of a source that was seen elsewhere, if there is room.
    pub fn remember(&mut self, prefix: u64, clear_at: Now, now: Now) {
        // It is never further ahead.
        let clear_at = clear_at.nanos().min(now.nanos() + 2 * SECOND);
        if let Some(place) = self.find(prefix).or_else(|| self.enter(prefix)) {
            let source = &mut self.sources[place as usize];
            source.clear_at = source.clear_at.max(clear_at);
        }
    }

    /// The address or network that a source is.
    pub fn prefix(&self, source: SourceId) -> u64 {
        self.sources[source.index()].prefix
    }

    /// What the source of `client` holds: its sessions, including ended ones that have not been let
    /// go.
    pub fn held(&self, client: IpAddr) -> u32 {
        self.find(prefix_of(client)).map_or(0, |place| self.sources[place as usize].held)
    }

    /// The source of this client, if it holds anything.
    pub fn of(&self, client: IpAddr) -> Option<SourceId> {
        let place = self.find(prefix_of(client))?;
        (self.sources[place as usize].held > 0).then_some(SourceId(place))
    }

    /// Counts the end of a session of this source; what the session held is not available yet.
    pub fn ended(&mut self, source: SourceId) {
        let source = &mut self.sources[source.index()];
        source.sessions = source.sessions.checked_sub(1).expect("a session ends once");
    }

    /// Makes available again what a session held, after [`Sources::ended`].
    pub fn let_go(&mut self, source: SourceId) {
        let SourceId(place) = source;
        let source = &mut self.sources[place as usize];
        source.held = source.held.checked_sub(1).expect("a session is let go once");
        if source.held == 0 {
            self.vacant.push(VACANT, place);
        }
    }

    /// Counts the end of a session of this source, and makes what it held available.
    pub fn release(&mut self, source: SourceId) {
        self.ended(source);
        self.let_go(source);
    }

    fn interval(&self) -> Option<u64> {
        self.limits.new_per_second.map(|rate| SECOND / u64::from(rate.get()))
    }

    fn find(&self, prefix: u64) -> Option<u32> {
        let same = |place: &u32| self.sources[*place as usize].prefix == prefix;
        self.index.find(self.hasher.words([prefix]), same).copied()
    }

    /// A new source, at the end of the list of those without a session.
    fn enter(&mut self, prefix: u64) -> Option<u32> {
        if self.index.len() >= self.capacity {
            self.forget(self.vacant.first(VACANT)?);
        }
        let source = Source { prefix, sessions: 0, held: 0, clear_at: 0 };
        let place = match self.free.pop() {
            Some(place) => {
                self.sources[place as usize] = source;
                place
            }
            None => {
                self.sources.push(source);
                self.sources.len() as u32 - 1
            }
        };
        let Sources { index, sources, hasher, .. } = self;
        let hash = hasher.words([prefix]);
        index.insert_unique(hash, place, |place| hasher.words([sources[*place as usize].prefix]));
        self.vacant.push(VACANT, place);
        Some(place)
    }

    /// Forgets sources without a session whose rate no longer matters. Two at a time keeps up with
    /// arrivals, which come one at a time.
    fn forget_clear(&mut self, now: Now) {
        for _ in 0..2 {
            match self.vacant.first(VACANT) {
                Some(place) if self.sources[place as usize].clear_at <= now.nanos() => {
                    self.forget(place);
                }
                _ => return,
            }
        }
    }

    fn forget(&mut self, place: u32) {
        let prefix = self.sources[place as usize].prefix;
        let entry = self.index.find_entry(self.hasher.words([prefix]), |found| *found == place);
        entry.expect("a remembered source is in the index").remove();
        self.vacant.remove(place);
        self.free.push(place);
    }
}

/// IPv4 addresses are numbered within ::/32, from which no IPv6 host but ::1 sends.
pub fn prefix_of(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => (v6.to_bits() >> 64) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::random::xorshift;

    fn sources(sessions: u32, new_per_second: u32, capacity: usize) -> Sources {
        let limits = SourceLimits {
            sessions: NonZeroU32::new(sessions),
            new_per_second: NonZeroU32::new(new_per_second),
        };
        Sources::new(limits, capacity, FlowHasher::new((3, 4)))
    }

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn v4(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn a_source_holds_as_many_sessions_as_it_may() {
        let mut sources = sources(2, 0, 10);
        let user = ip("198.51.100.7");
        let held = [sources.charge(user, at(0)).unwrap(), sources.charge(user, at(0)).unwrap()];
        assert_eq!(held[0], held[1]);
        assert_eq!(sources.check(user, at(0)), Err(Exceeded::Sessions));
        assert_eq!(sources.check(ip("198.51.100.8"), at(0)), Ok(()));
        sources.release(held[0]);
        assert_eq!(sources.check(user, at(0)), Ok(()));
    }

    #[test]
    fn what_a_session_held_counts_until_it_is_let_go() {
        let mut sources = sources(1, 0, 10);
        let user = ip("198.51.100.7");
        let session = sources.charge(user, at(0)).unwrap();
        sources.ended(session);
        assert_eq!((sources.check(user, at(0)), sources.held(user)), (Ok(()), 1));
        assert_eq!(sources.charge(user, at(0)), Some(session));
        assert_eq!((sources.check(user, at(0)), sources.held(user)), (Err(Exceeded::Sessions), 2));
        sources.let_go(session);
        sources.release(session);
        assert_eq!((sources.held(user), sources.of(user)), (0, None));
    }

    #[test]
    fn a_source_is_an_address_of_ipv4_and_a_network_of_ipv6() {
        for (one, other, same) in [
            ("198.51.100.7", "198.51.100.8", false),
            ("198.51.100.7", "::ffff:198.51.100.7", true),
            ("2001:db8::1", "2001:db8::ffff:0:0:1", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("::1", "198.51.100.7", false),
        ] {
            let mut sources = sources(1, 0, 10);
            sources.charge(ip(one), at(0)).unwrap();
            assert_eq!(sources.check(ip(other), at(0)).is_err(), same, "{one} {other}");
        }
    }

    #[test]
    fn the_rate_allows_a_second_at_once_and_then_its_pace() {
        let mut sources = sources(0, 10, 100);
        let user = v4(1);
        let mut opened = 0;
        for ms in 0..2_000 {
            while sources.check(user, at(ms)).is_ok() {
                let session = sources.charge(user, at(ms)).unwrap();
                sources.release(session);
                opened += 1;
            }
            let allowed = 10 + ms / 100;
            assert_eq!(opened, allowed, "after {ms} ms");
        }
    }

    #[test]
    fn sources_that_were_seen_elsewhere_count_as_there() {
        let mut old = sources(2, 10, 10);
        let [one, two] = [v4(1), v4(2)];
        let held = old.charge(one, at(0)).unwrap();
        (0..10).for_each(|_| {
            let session = old.charge(two, at(0)).unwrap();
            old.release(session);
        });
        let mut new = sources(2, 10, 10);
        assert_eq!(old.prefix(held), prefix_of(one));
        let again = new.hold(prefix_of(one)).unwrap();
        assert_eq!(new.check(one, at(0)), Ok(()), "that has cost no rate");
        new.hold(prefix_of(one)).unwrap();
        assert_eq!(new.check(one, at(0)), Err(Exceeded::Sessions));
        assert_eq!(new.check(two, at(0)), Ok(()));
        old.rated(at(0)).for_each(|(prefix, clear_at)| new.remember(prefix, clear_at, at(0)));
        assert_eq!(new.check(two, at(0)), Err(Exceeded::Rate));
        new.remember(prefix_of(v4(3)), Now::NEVER, at(0));
        assert_eq!(new.check(v4(3), at(2_000)), Ok(()));
        new.release(again);
        assert_eq!((new.held(one), new.held(two)), (1, 0));
    }

    #[test]
    fn a_source_without_sessions_is_remembered_while_its_rate_matters() {
        let mut sources = sources(0, 1, 100);
        let session = sources.charge(v4(1), at(0)).unwrap();
        sources.release(session);
        sources.charge(v4(2), at(999)).unwrap();
        assert_eq!(sources.check(v4(1), at(999)), Err(Exceeded::Rate));
        assert_eq!(sources.len(), 2);
        sources.charge(v4(3), at(1_000)).unwrap();
        assert_eq!(sources.len(), 2, "the first is forgotten");
    }

    #[test]
    fn memory_stays_within_the_capacity_and_live_sources_are_never_forgotten() {
        let mut sources = sources(1, 1, 3);
        let held = [1, 2].map(|user| sources.charge(v4(user), at(0)).unwrap());
        for user in 100..200 {
            let session = sources.charge(v4(user), at(0)).unwrap();
            sources.release(session);
        }
        assert_eq!(sources.len(), 3);
        for user in [1, 2] {
            assert_eq!(sources.check(v4(user), at(0)), Err(Exceeded::Sessions));
        }
        assert_eq!(sources.check(v4(199), at(0)), Err(Exceeded::Rate), "the newest is known");
        sources.charge(v4(300), at(0)).unwrap();
        assert_eq!(sources.charge(v4(301), at(0)), None, "three live sessions are the capacity");
        held.into_iter().for_each(|session| sources.release(session));
        assert!(sources.charge(v4(301), at(0)).is_some());
    }

    #[test]
    fn counts_agree_with_a_map_over_many_random_steps() {
        let mut random = xorshift(88_172_645_463_325_252);
        let mut sources = sources(3, 0, 40);
        let mut held: Vec<(u32, SourceId)> = Vec::new();
        for step in 0..50_000 {
            let user = random(60) as u32;
            if held.len() < 40 && random(2) == 0 {
                let has = held.iter().filter(|(owner, _)| *owner == user).count();
                assert_eq!(sources.check(v4(user), at(step)).is_err(), has >= 3);
                if has < 3 {
                    held.push((user, sources.charge(v4(user), at(step)).unwrap()));
                }
            } else if !held.is_empty() {
                let (_, session) = held.swap_remove(random(held.len() as u64) as usize);
                sources.release(session);
            }
            assert!(sources.len() <= 40);
        }
    }
}
