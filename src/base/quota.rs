//! A rate limit: a burst and a rate, both in total and per source. Owns the arithmetic; what is
//! limited is the caller's business. No clock and no growing memory: time comes in as an argument,
//! and the shares of all sources live in a fixed number of places, which sources with colliding
//! hashes share.

use std::net::IpAddr;

use super::time::Now;

/// Places for the sources' shares.
const PLACES: usize = 1024;

/// A burst after a pause, and a steady rate from then on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Nanoseconds each one costs.
    each: u64,
    /// Nanoseconds that may be owed: the burst.
    room: u64,
}

impl Rate {
    /// `burst` at once and `per_second` in the long run; nothing at all if either is 0.
    pub const fn new(burst: u32, per_second: u32) -> Rate {
        if burst == 0 || per_second == 0 {
            return Rate { each: 1, room: 0 };
        }
        let each = 1_000_000_000 / per_second as u64;
        Rate { each, room: each * burst as u64 }
    }
}

/// When everything taken so far is paid for (the theoretical arrival time of the generic cell rate
/// algorithm, ITU-T I.371).
#[derive(Clone, Copy, Default, Debug)]
pub struct Meter(u64);

impl Meter {
    fn owed(self, now: Now) -> u64 {
        self.0.saturating_sub(now.nanos())
    }

    /// Whether one more is within the rate.
    pub fn has_room(self, rate: Rate, now: Now) -> bool {
        self.owed(now) + rate.each <= rate.room
    }

    /// Takes one more.
    pub fn take(&mut self, rate: Rate, now: Now) {
        self.0 = now.nanos() + self.owed(now) + rate.each;
    }
}

/// The quota of one kind of thing.
pub struct Quota {
    all: Rate,
    each: Rate,
    /// Whether a source may exceed its share while half of the total burst is free.
    lends: bool,
    seed: u64,
    taken: Meter,
    shares: Box<[Meter; PLACES]>,
}

impl Quota {
    /// `all` bounds the total, `each` one source: an IPv4 address or an IPv6 /64. A secret `seed`
    /// keeps anyone from choosing whose place to share.
    pub fn new(all: Rate, each: Rate, seed: u64) -> Quota {
        let shares = Box::new([Meter::default(); PLACES]);
        Quota { all, each, lends: false, seed, taken: Meter::default(), shares }
    }

    /// The same, but a source may also use what others leave free, up to half of the total burst.
    pub fn lending(all: Rate, each: Rate, seed: u64) -> Quota {
        Quota { lends: true, ..Quota::new(all, each, seed) }
    }

    /// Whether `source` may have one more now. If so, it is taken.
    pub fn allows(&mut self, source: IpAddr, now: Now) -> bool {
        if !self.taken.has_room(self.all, now) {
            return false;
        }
        let free = self.lends && self.taken.owed(now) < self.all.room / 2;
        let share = &mut self.shares[place(source, self.seed)];
        let within = share.has_room(self.each, now);
        if within {
            share.take(self.each, now);
        }
        if within || free {
            self.taken.take(self.all, now);
        }
        within || free
    }
}

/// The number of a source: its IPv4 address, or its IPv6 /64 (the smallest network that one customer
/// is given, RFC 6177).
pub fn network(source: IpAddr) -> u64 {
    match source.to_canonical() {
        IpAddr::V4(address) => u64::from(address.to_bits()),
        IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
    }
}

/// The place of a source's share.
fn place(source: IpAddr, seed: u64) -> usize {
    // Odd and without a pattern: the golden ratio in 64 bits.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let product =
        u128::from(network(source) ^ seed) * u128::from(SPREAD ^ seed.rotate_left(32) | 1);
    let mixed = (product >> 64) as u64 ^ product as u64;
    (mixed.wrapping_mul(SPREAD) >> 32) as usize % PLACES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// How many of `tries` a source gets at that moment.
    fn gets(quota: &mut Quota, source: &str, ms: u64, tries: usize) -> usize {
        (0..tries).filter(|_| quota.allows(ip(source), at(ms))).count()
    }

    #[test]
    fn a_source_has_its_burst_and_then_its_rate() {
        let mut quota = Quota::new(Rate::new(100, 100), Rate::new(5, 2), 7);
        assert_eq!(gets(&mut quota, "192.0.2.1", 1000, 50), 5);
        assert_eq!(gets(&mut quota, "192.0.2.1", 1499, 50), 0);
        assert_eq!(gets(&mut quota, "192.0.2.1", 1500, 50), 1);
        assert_eq!(gets(&mut quota, "192.0.2.1", 2500, 50), 2);
        assert_eq!(gets(&mut quota, "192.0.2.1", 60_000, 50), 5, "no more is saved up");
        let a_minute: usize =
            (0..60_000).map(|ms| gets(&mut quota, "192.0.2.9", 100_000 + ms, 3)).sum();
        assert_eq!(a_minute, 5 + 119);
    }

    #[test]
    fn one_source_leaves_the_rest_to_the_others_and_all_together_have_a_bound() {
        let mut quota = Quota::new(Rate::new(20, 10), Rate::new(5, 1), 7);
        assert_eq!(gets(&mut quota, "192.0.2.1", 0, 1000), 5);
        assert_eq!(gets(&mut quota, "192.0.2.2", 0, 1000), 5);
        let many: usize =
            (0..200).map(|host| gets(&mut quota, &format!("10.0.{host}.1"), 0, 9)).sum();
        assert_eq!(many, 10);
        assert_eq!(gets(&mut quota, "192.0.2.3", 0, 1), 0);
        assert_eq!(gets(&mut quota, "192.0.2.3", 100, 1), 1);
    }

    #[test]
    fn a_quota_that_lends_gives_one_source_all_of_it_and_keeps_half_of_the_burst_for_others() {
        let mut quota = Quota::lending(Rate::new(20, 10), Rate::new(2, 1), 7);
        assert_eq!(gets(&mut quota, "192.0.2.1", 0, 1000), 10);
        assert_eq!(gets(&mut quota, "192.0.2.2", 0, 1000), 2);
        let alone: usize =
            (0..100).map(|tenth| gets(&mut quota, "192.0.2.1", 10_000 + tenth * 100, 9)).sum();
        assert_eq!(alone, 10 + 99, "the rate of all, and half of the burst");
        assert_eq!(gets(&mut quota, "192.0.2.2", 19_900, 1000), 2);
    }

    #[test]
    fn a_quota_of_nothing_allows_nothing() {
        for rate in [Rate::new(0, 5), Rate::new(5, 0)] {
            let mut quota = Quota::lending(rate, rate, 7);
            assert_eq!(gets(&mut quota, "192.0.2.1", 5000, 3), 0);
        }
    }

    #[test]
    fn the_addresses_of_one_customer_are_one_source() {
        let place = |text: &str| place(ip(text), 0x1234_5678_9abc_def0);
        assert_eq!(place("2001:db8::1"), place("2001:db8::ffff:ffff:ffff:ffff"));
        assert_eq!(place("192.0.2.1"), place("::ffff:192.0.2.1"));
        let places: std::collections::HashSet<_> =
            (0..=255).map(|host| place(&format!("192.0.2.{host}"))).collect();
        assert!(places.len() > 200, "neighbours share {} places", places.len());
        let networks: std::collections::HashSet<_> =
            (0..=255).map(|network| place(&format!("2001:db8:0:{network:x}::1"))).collect();
        assert!(networks.len() > 200, "networks share {} places", networks.len());
    }
}
