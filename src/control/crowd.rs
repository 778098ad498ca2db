//! Control connections that have yet to earn their place, by a proof where a secret is configured and by
//! registering a backend where none is. Owns the choice of who makes room when there are too many, so
//! that nobody keeps others out by staying silent. Pure: the caller passes in the time and closes the
//! connection that has to go.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use crate::base::quota::network;
use crate::base::time::Now;

/// How long every connection has for its proof, even while others from its source are waiting.
pub const GRACE: Duration = Duration::from_secs(1);

/// Whether one more connection may enter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admit {
    Yes,
    /// In exchange for this one, which has to go.
    InsteadOf(u64),
    No,
}

/// The bounds for one decision.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Most connections from one source.
    pub each: usize,
    /// Whether there is no room left.
    pub full: bool,
    /// Whether a connection that has had its [`GRACE`] makes room for another one from its source.
    pub renews: bool,
}

struct Guest<T> {
    /// An IPv4 address or an IPv6 /64, see [`network`].
    source: u64,
    since: Now,
    what: T,
}

/// The connections yet to earn their place, in order of arrival.
pub struct Crowd<T> {
    guests: BTreeMap<u64, Guest<T>>,
    by_source: BTreeMap<u64, BTreeSet<u64>>,
    /// Every source with how many it has and the oldest of them: first the one with the most, and among
    /// equals the one that has waited longest.
    ranks: BTreeSet<(Reverse<usize>, u64, u64)>,
    next: u64,
}

impl<T> Default for Crowd<T> {
    fn default() -> Crowd<T> {
        let (guests, by_source) = (BTreeMap::new(), BTreeMap::new());
        Crowd { guests, by_source, ranks: BTreeSet::new(), next: 0 }
    }
}

impl<T> Crowd<T> {
    pub fn len(&self) -> usize {
        self.guests.len()
    }

    pub fn is_empty(&self) -> bool {
        self.guests.is_empty()
    }

    /// Whether a connection from `address` may enter. When full, the oldest connection of the source
    /// with the most makes room, so a newcomer from any other source finds a place.
    pub fn admit(&self, address: IpAddr, rule: Rule, now: Now) -> Admit {
        let source = network(address);
        let others = self.by_source.get(&source);
        let own = others.map_or(0, BTreeSet::len);
        if own < rule.each && !rule.full {
            return Admit::Yes;
        }
        if let Some((Reverse(most), oldest, _)) = self.ranks.first()
            && own < rule.each
            && *most > own
        {
            return Admit::InsteadOf(*oldest);
        }
        let oldest = others.and_then(BTreeSet::first);
        match oldest.and_then(|number| self.guests.get_key_value(number)) {
            Some((number, guest)) if rule.renews && now.since(guest.since) >= GRACE => {
                Admit::InsteadOf(*number)
            }
            _ => Admit::No,
        }
    }

    fn enter(&mut self, address: IpAddr, what: T, now: Now) -> u64 {
        let (number, source) = (self.next, network(address));
        self.next += 1;
        self.change(source, |numbers| numbers.insert(number));
        self.guests.insert(number, Guest { source, since: now, what });
        number
    }

    fn since(&self, number: u64) -> Option<Now> {
        self.guests.get(&number).map(|guest| guest.since)
    }

    /// A connection has closed, or has earned its place.
    pub fn leave(&mut self, number: u64) -> Option<T> {
        let guest = self.guests.remove(&number)?;
        self.change(guest.source, |numbers| numbers.remove(&number));
        Some(guest.what)
    }

    /// Changes which connections are of a source, and its rank with that.
    fn change(&mut self, source: u64, change: impl FnOnce(&mut BTreeSet<u64>) -> bool) {
        let rank = |numbers: &BTreeSet<u64>| {
            numbers.first().map(|oldest| (Reverse(numbers.len()), *oldest, source))
        };
        let numbers = self.by_source.entry(source).or_default();
        if let Some(before) = rank(numbers) {
            self.ranks.remove(&before);
        }
        change(numbers);
        match rank(numbers) {
            Some(after) => drop(self.ranks.insert(after)),
            None => drop(self.by_source.remove(&source)),
        }
    }
}

/// The right to one place in the crowd, given up on drop.
pub struct Ticket<T> {
    crowd: Rc<RefCell<Crowd<T>>>,
    number: u64,
}

impl<T> Ticket<T> {
    pub fn take(crowd: &Rc<RefCell<Crowd<T>>>, address: IpAddr, what: T, now: Now) -> Ticket<T> {
        let number = crowd.borrow_mut().enter(address, what, now);
        Ticket { crowd: Rc::clone(crowd), number }
    }

    /// When the place was taken; `None` once it had to be left.
    pub fn since(&self) -> Option<Now> {
        self.crowd.borrow().since(self.number)
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        self.crowd.borrow_mut().leave(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule = Rule { each: 3, full: false, renews: true };
    const FULL: Rule = Rule { full: true, ..RULE };

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    fn host(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn crowd(hosts: &[u8]) -> Crowd<u8> {
        let mut crowd = Crowd::default();
        for (ms, last) in (0..).zip(hosts) {
            crowd.enter(host(*last), *last, at(ms));
        }
        crowd
    }

    #[test]
    fn a_source_has_a_limit_and_renews_its_oldest_after_the_grace() {
        let crowd = crowd(&[1, 1, 2, 1]);
        assert_eq!(crowd.admit(host(2), RULE, at(4)), Admit::Yes);
        assert_eq!(crowd.admit(host(1), RULE, at(999)), Admit::No);
        assert_eq!(crowd.admit(host(1), RULE, at(1000)), Admit::InsteadOf(0));
        assert_eq!(crowd.admit(host(1), Rule { renews: false, ..RULE }, at(1000)), Admit::No);
    }

    #[test]
    fn when_full_the_oldest_of_the_greediest_goes_at_once() {
        let crowd = crowd(&[3, 1, 2, 2, 1]);
        assert_eq!(crowd.admit(host(9), FULL, at(5)), Admit::InsteadOf(1));
        assert_eq!(crowd.admit(host(3), FULL, at(5)), Admit::InsteadOf(1));
        assert_eq!(crowd.admit(host(1), FULL, at(5)), Admit::No, "it is one of the greediest");
        assert_eq!(crowd.admit(host(1), FULL, at(1001)), Admit::InsteadOf(1));
    }

    #[test]
    fn among_many_with_one_place_each_the_oldest_of_all_goes() {
        let mut crowd = crowd(&[1, 2, 3, 4]);
        assert_eq!(crowd.admit(host(9), FULL, at(5)), Admit::InsteadOf(0));
        assert_eq!(crowd.leave(0), Some(1));
        assert_eq!(crowd.admit(host(9), FULL, at(5)), Admit::InsteadOf(1));
        assert_eq!(Crowd::<()>::default().admit(host(9), FULL, at(5)), Admit::No);
    }

    #[test]
    fn an_ipv6_network_is_one_source_and_a_mapped_address_the_plain_one() {
        let mut crowd = Crowd::default();
        for address in ["2001:db8::1", "2001:db8::2", "2001:db8::f:3"] {
            crowd.enter(address.parse().unwrap(), (), at(0));
        }
        assert_eq!(crowd.admit("2001:db8::4".parse().unwrap(), RULE, at(1)), Admit::No);
        assert_eq!(crowd.admit("2001:db8:0:1::4".parse().unwrap(), RULE, at(1)), Admit::Yes);
        for _ in 0..3 {
            crowd.enter(host(1), (), at(0));
        }
        assert_eq!(crowd.admit("::ffff:192.0.2.1".parse().unwrap(), RULE, at(1)), Admit::No);
    }

    #[test]
    fn a_dropped_ticket_frees_its_place() {
        let crowd = Rc::new(RefCell::new(Crowd::default()));
        let ticket = Ticket::take(&crowd, host(1), (), at(0));
        assert_eq!(crowd.borrow().len(), 1);
        drop(ticket);
        let crowd = crowd.borrow();
        assert!(crowd.is_empty() && crowd.by_source.is_empty() && crowd.ranks.is_empty());
    }
}
