//! The pair table as a table of behaviour, and against a plain model.

use std::collections::HashSet;

use super::*;
use crate::base::random::xorshift;

const QUARANTINE: Duration = Duration::from_secs(120);

fn at(seconds: u64) -> Now {
    Now::from_nanos(seconds * 1_000_000_000)
}

fn table(sockets: usize) -> PairTable {
    let limits = PairLimits { sockets, quarantine: QUARANTINE, quarantined_max: 1000 };
    PairTable::new(limits, 1, FlowHasher::new((1, 2)), at(0))
}

fn peer(pairs: &mut PairTable, address: &str) -> PeerId {
    pairs.register(address.parse().unwrap()).unwrap()
}

/// Opens what is wanted, then takes a pair.
fn take(pairs: &mut PairTable, id: PeerId, place: u32) -> Option<SocketId> {
    while let Some(socket) = pairs.wanted(at(0)) {
        pairs.opened(socket);
    }
    pairs.take(id, place)
}

/// Gives back a pair on which a datagram has just passed, and which is clean 5 s later.
fn give_back(pairs: &mut PairTable, id: PeerId, socket: SocketId, now: Now) {
    let last_use = LastUse { at: now, clean: now.plus(Duration::from_secs(5)) };
    pairs.give_back(id, socket, last_use, now);
}

fn settle(pairs: &mut PairTable, now: Now) -> Vec<SocketId> {
    while pairs.settle(now) {}
    std::iter::from_fn(|| pairs.next_surplus()).collect()
}

#[test]
fn a_pair_names_its_session_and_no_other_pair_does() {
    let mut pairs = table(10);
    let (one, other) = (peer(&mut pairs, "10.0.0.1:53"), peer(&mut pairs, "10.0.0.1:54"));
    let socket = take(&mut pairs, one, 7).unwrap();
    assert_eq!(pairs.owner(one, socket), PairOwner::Session(7));
    assert_eq!(pairs.owner(other, socket), PairOwner::Nobody);
    let of_v6 = SocketId { family: Family::V6, number: socket.number };
    assert_eq!(pairs.owner(one, of_v6), PairOwner::Nobody);
    assert_eq!(pairs.find("10.0.0.1:53".parse().unwrap()), Some(one));
    assert_eq!(pairs.find("10.0.0.2:53".parse().unwrap()), None);
    assert_eq!(pairs.find("[::ffff:10.0.0.1]:53".parse().unwrap()), None);
}

#[test]
fn sockets_follow_the_busiest_backend_and_not_the_sum() {
    let mut pairs = table(1000);
    let peers: Vec<PeerId> = (1..=4).map(|n| peer(&mut pairs, &format!("10.0.0.{n}:53"))).collect();
    let mut seen = HashSet::new();
    for place in 0..400 {
        let id = peers[place as usize % 4];
        assert!(seen.insert((id, take(&mut pairs, id, place).unwrap())));
    }
    assert!((100..=101).contains(&pairs.open()), "{}", pairs.open());
    let six = peer(&mut pairs, "[2001:db8::1]:53");
    assert_eq!(take(&mut pairs, six, 400).unwrap().family, Family::V6);
    assert!(pairs.open() <= 103);
}

#[test]
fn a_pair_is_quarantined_before_it_is_used_again() {
    let mut pairs = table(1);
    let id = peer(&mut pairs, "10.0.0.1:53");
    let socket = take(&mut pairs, id, 7).unwrap();
    give_back(&mut pairs, id, socket, at(10));
    assert_eq!(pairs.owner(id, socket), PairOwner::Quarantined);
    settle(&mut pairs, at(129));
    assert_eq!(take(&mut pairs, id, 8), None);
    assert_eq!(pairs.next_deadline(), Some(at(130)));
    settle(&mut pairs, at(130));
    assert_eq!(pairs.owner(id, socket), PairOwner::Nobody);
    assert_eq!(take(&mut pairs, id, 8), Some(socket));
}

#[test]
fn a_sender_is_known_by_its_address_and_not_by_who_sent_before() {
    let mut pairs = table(1);
    let [one, two] = ["10.0.0.1:53", "10.0.0.2:53"].map(|address| peer(&mut pairs, address));
    let socket = take(&mut pairs, one, 7).unwrap();
    let sender =
        |pairs: &mut PairTable, address: &str| pairs.sender(socket, address.parse().unwrap());
    for (address, who) in [
        ("10.0.0.1:53", Some(one)),
        ("10.0.0.1:53", Some(one)),
        ("10.0.0.2:53", Some(two)),
        ("10.0.0.2:54", None),
        ("10.0.0.1:53", Some(one)),
    ] {
        assert_eq!(sender(&mut pairs, address), who, "{address}");
    }
    // A socket that is not open yet has no last sender, but the peers are known all the same.
    let unopened = SocketId { number: 9, ..socket };
    assert_eq!(pairs.sender(unopened, "10.0.0.1:53".parse().unwrap()), Some(one));
    // The index of a peer that has left is given to another.
    pairs.unregister(two);
    assert_eq!(sender(&mut pairs, "10.0.0.2:53"), None);
    assert_eq!(peer(&mut pairs, "10.0.0.3:53"), two);
    assert_eq!(sender(&mut pairs, "10.0.0.2:53"), None);
    assert_eq!(sender(&mut pairs, "10.0.0.3:53"), Some(two));
}

#[test]
fn the_quarantine_outlives_the_registration() {
    let mut pairs = table(1);
    let id = peer(&mut pairs, "10.0.0.1:53");
    let socket = take(&mut pairs, id, 7).unwrap();
    pairs.unregister(id);
    assert_eq!(pairs.owner(id, socket), PairOwner::Session(7));
    give_back(&mut pairs, id, socket, at(0));
    assert_eq!(peer(&mut pairs, "10.0.0.1:53"), id);
    assert_eq!(take(&mut pairs, id, 8), None, "still quarantined");
    pairs.unregister(id);
    settle(&mut pairs, at(120));
    assert_eq!(pairs.find("10.0.0.1:53".parse().unwrap()), None);
}

#[test]
fn addresses_are_bounded_and_places_used_again() {
    let mut pairs = table(1);
    let address = |n: usize| SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 53));
    let ids: Vec<PeerId> = (0..PEERS_MAX).map(|n| pairs.register(address(n)).unwrap()).collect();
    assert_eq!(pairs.register(address(PEERS_MAX)), None);
    pairs.unregister(ids[5]);
    assert_eq!(pairs.register(address(PEERS_MAX)), Some(ids[5]));
}

#[test]
fn a_socket_that_cannot_be_opened_is_not_asked_for_at_once_again() {
    let mut pairs = table(10);
    let id = peer(&mut pairs, "10.0.0.1:53");
    let wanted = pairs.wanted(at(5)).unwrap();
    assert_eq!(pairs.wanted(at(5)), Some(wanted), "until it is opened or has failed");
    pairs.failed(wanted, at(5));
    assert_eq!(pairs.wanted(at(5)), None);
    assert_eq!(pairs.take(id, 1), None);
    peer(&mut pairs, "[::1]:53");
    assert_eq!(pairs.wanted(at(5)).map(|socket| socket.family), Some(Family::V6));
    assert_eq!(pairs.wanted(at(6)), Some(wanted));
}

#[test]
fn beyond_the_limit_the_oldest_quarantine_of_a_clean_pair_ends() {
    let limits = PairLimits { sockets: 100, quarantine: QUARANTINE, quarantined_max: 2 };
    let mut pairs = PairTable::new(limits, 1, FlowHasher::new((1, 2)), at(0));
    let id = peer(&mut pairs, "10.0.0.1:53");
    let held: Vec<SocketId> = (0..5).map(|place| take(&mut pairs, id, place).unwrap()).collect();
    for (number, seconds, quarantined) in [(0, 0, 1), (1, 0, 2), (2, 4, 3), (3, 5, 3), (4, 5, 3)] {
        give_back(&mut pairs, id, held[number], at(seconds));
        assert_eq!(pairs.quarantined(), quarantined, "the {number}th");
    }
    assert_eq!(pairs.owner(id, held[1]), PairOwner::Nobody);
    assert_eq!(pairs.owner(id, held[2]), PairOwner::Quarantined, "not clean before 9 s");
}

#[test]
fn quarantines_end_early_oldest_first_and_not_before_the_pair_is_clean() {
    let mut pairs = table(3);
    let id = peer(&mut pairs, "10.0.0.1:53");
    let held: Vec<SocketId> = (0..3).map(|place| take(&mut pairs, id, place).unwrap()).collect();
    assert!(!pairs.has_free(id));
    give_back(&mut pairs, id, held[1], at(10));
    give_back(&mut pairs, id, held[0], at(12));
    assert_eq!(pairs.usage(id, at(14)), PairUse { busy: 3, clean: 0 });
    assert!(!pairs.end_early(id, at(14), at(14)), "a reply may come");
    assert_eq!(pairs.usage(id, at(16)), PairUse { busy: 3, clean: 1 });
    assert!(!pairs.end_early(id, at(9), at(16)), "not quiet for so long");
    assert!(pairs.end_early(id, at(10), at(16)));
    assert_eq!(pairs.usage(id, at(16)), PairUse { busy: 2, clean: 0 });
    assert_eq!(pairs.take(id, 9), Some(held[1]));
    assert!(!pairs.end_early(id, at(16), at(16)));
    pairs.free_clean(id, held[2]);
    assert_eq!(pairs.take(id, 10), Some(held[2]));
    assert_eq!(pairs.owner(id, held[0]), PairOwner::Quarantined);
    settle(&mut pairs, at(132));
    assert_eq!((pairs.quarantined(), pairs.owner(id, held[0])), (0, PairOwner::Nobody));
}

#[test]
fn sockets_that_nobody_needs_are_closed_and_opened_again() {
    let mut pairs = table(1000);
    let id = peer(&mut pairs, "10.0.0.1:53");
    let other = peer(&mut pairs, "10.0.0.2:53");
    let held: Vec<SocketId> = (0..200).map(|place| take(&mut pairs, id, place).unwrap()).collect();
    let on_other: Vec<SocketId> =
        (0..40).map(|place| take(&mut pairs, other, 200 + place).unwrap()).collect();
    let open = pairs.open();
    held.iter().skip(10).for_each(|socket| give_back(&mut pairs, id, *socket, at(0)));
    assert_eq!(settle(&mut pairs, at(11)), [], "nothing is closed while pairs are quarantined");
    let closed = settle(&mut pairs, at(120));
    assert!(closed.len() >= open - 60 - 10, "{} of {open}", closed.len());
    assert_eq!(pairs.open(), open - closed.len());
    for socket in held.iter().take(10) {
        assert!(!closed.contains(socket), "a socket with a session stays open");
    }
    assert!(on_other.iter().all(|socket| !closed.contains(socket)));
    let mut again = HashSet::new();
    for place in 300..500 {
        let socket = take(&mut pairs, id, place).unwrap();
        assert!(again.insert(socket) && !held[..10].contains(&socket));
    }
    assert!(pairs.open() <= 212);
}

#[test]
fn a_socket_that_came_into_use_again_before_it_was_closed_stays_open() {
    let mut pairs = table(1000);
    let id = peer(&mut pairs, "10.0.0.1:53");
    let rise = |pairs: &mut PairTable| -> Vec<SocketId> {
        (0..100).map(|place| take(pairs, id, place).unwrap()).collect()
    };
    rise(&mut pairs).into_iter().for_each(|socket| give_back(&mut pairs, id, socket, at(0)));
    assert!(!pairs.settle(at(120)), "left over, and not yet closed");
    let held = rise(&mut pairs);
    let (high, low): (Vec<SocketId>, Vec<SocketId>) =
        held.into_iter().partition(|socket| socket.number >= 90);
    low.into_iter().for_each(|socket| give_back(&mut pairs, id, socket, at(120)));
    let closed = settle(&mut pairs, at(240));
    assert!(!closed.is_empty() && closed.iter().all(|socket| !high.contains(socket)));
}

#[test]
fn the_choice_depends_on_the_seed() {
    let chosen = |seed| {
        let limits = PairLimits { sockets: 100, quarantine: QUARANTINE, quarantined_max: 1000 };
        let mut pairs = PairTable::new(limits, seed, FlowHasher::new((1, 2)), at(0));
        let (busy, id) = (peer(&mut pairs, "10.0.0.1:53"), peer(&mut pairs, "10.0.0.2:53"));
        (0..50).for_each(|place| assert!(take(&mut pairs, busy, place).is_some()));
        (50..80).filter_map(|place| take(&mut pairs, id, place)).collect::<Vec<_>>()
    };
    assert_eq!(chosen(1), chosen(1));
    assert_ne!(chosen(1), chosen(2));
}

/// What must hold, kept in the plainest way.
#[derive(Default)]
struct Model {
    open: HashSet<SocketId>,
    held: Vec<(PeerId, SocketId)>,
    quarantined: Vec<(PeerId, SocketId, Now)>,
}

impl Model {
    fn open_wanted(&mut self, pairs: &mut PairTable, now: Now) {
        while let Some(socket) = pairs.wanted(now) {
            assert!(self.open.insert(socket), "{socket:?} is opened twice");
            pairs.opened(socket);
        }
    }

    fn take(&mut self, pairs: &mut PairTable, id: PeerId, place: u32) {
        let Some(socket) = pairs.take(id, place) else { return };
        assert!(self.open.contains(&socket), "{socket:?} is not open");
        assert!(!self.held.contains(&(id, socket)), "{socket:?} is given out twice");
        let in_quarantine = self.quarantined.iter().any(|pair| (pair.0, pair.1) == (id, socket));
        assert!(!in_quarantine, "{socket:?} is quarantined");
        self.held.push((id, socket));
    }

    fn give_back(&mut self, pairs: &mut PairTable, which: usize, now: Now) {
        let (id, socket) = self.held.swap_remove(which);
        give_back(pairs, id, socket, now);
        self.quarantined.push((id, socket, now.plus(QUARANTINE)));
    }

    /// Closes at most `closed_max` sockets, so that surplus ones have to wait.
    fn settle(&mut self, pairs: &mut PairTable, now: Now, closed_max: usize) {
        self.quarantined.retain(|pair| pair.2 > now);
        while pairs.settle(now) {}
        for _ in 0..closed_max {
            let Some(socket) = pairs.next_surplus() else { break };
            assert!(self.open.remove(&socket), "{socket:?} is closed twice");
            let used = self.held.iter().map(|(_, socket)| socket);
            let mut used = used.chain(self.quarantined.iter().map(|(_, socket, _)| socket));
            assert!(used.all(|used| *used != socket), "{socket:?} is closed while in use");
        }
        assert_eq!(pairs.quarantined(), self.quarantined.len());
        assert_eq!(pairs.open(), self.open.len());
    }
}

#[test]
fn pairs_and_sockets_agree_with_a_plain_model_over_many_random_steps() {
    let mut chance = xorshift(0x2545_f491_4f6c_dd1d);
    let mut random = |below: usize| chance(below as u64) as usize;
    let mut pairs = table(300);
    let ids = ["10.0.0.1:53", "10.0.0.2:53", "[::1]:53"].map(|a| peer(&mut pairs, a));
    let mut model = Model::default();
    let mut now = at(0);
    for step in 0..60_000 {
        // Sessions come and go in tides.
        let coming = if step / 2_000 % 2 == 0 { 8 } else { 2 };
        now = now.plus(Duration::from_millis(random(if coming == 8 { 50 } else { 500 }) as u64));
        if random(10) < coming {
            model.open_wanted(&mut pairs, now);
            model.take(&mut pairs, ids[random(3)], step);
        } else if !model.held.is_empty() {
            model.give_back(&mut pairs, random(model.held.len()), now);
        }
        let closed_max = usize::from(random(20) == 0);
        model.settle(&mut pairs, now, closed_max);
    }
    while !model.held.is_empty() {
        model.give_back(&mut pairs, 0, now);
    }
    for seconds in [119, 121, 132, 143] {
        model.settle(&mut pairs, now.plus(Duration::from_secs(seconds)), usize::MAX);
    }
    assert!(pairs.open() <= 2 * SOCKETS_KEPT, "{} stay open", pairs.open());
}

#[test]
fn of_many_peers_only_those_that_may_be_short_are_looked_at() {
    let mut pairs = table(3);
    let address = |n: u16| SocketAddr::from(([10, 1, (n >> 8) as u8, n as u8], 53));
    let ids: Vec<PeerId> = (0..10_000).map(|n| pairs.register(address(n)).unwrap()).collect();
    let socket = take(&mut pairs, ids[77], 1).unwrap();
    assert!(pairs.wanted(at(0)).is_some(), "one of them has no free pair");
    assert_eq!(pairs.doubtful[Family::V4 as usize], [ids[77]], "and nobody else may have none");
    assert!(take(&mut pairs, ids[77], 2).is_some() && take(&mut pairs, ids[77], 3).is_some());
    assert_eq!(pairs.wanted(at(0)), None, "no more sockets are allowed");
    assert_eq!(take(&mut pairs, ids[77], 4), None);
    give_back(&mut pairs, ids[77], socket, at(0));
    settle(&mut pairs, at(120));
    assert_eq!((pairs.wanted(at(120)), pairs.doubtful[Family::V4 as usize].len()), (None, 0));
    assert!(take(&mut pairs, ids[9], 4).is_some());
}
