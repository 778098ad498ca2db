//! The pair table as a table of behaviour, and against a plain model.

use std::collections::HashSet;

use super::*;
use crate::base::random::xorshift;

const REST: Duration = Duration::from_secs(120);

fn at(seconds: u64) -> Now {
    Now::from_nanos(seconds * 1_000_000_000)
}

fn table(sockets: usize) -> Upstream {
    let limits = Limits { sockets, rest: REST, resting: 1000 };
    Upstream::new(limits, 1, FlowHasher::new((1, 2)), at(0))
}

fn peer(upstream: &mut Upstream, address: &str) -> PeerId {
    upstream.register(address.parse().unwrap()).unwrap()
}

/// Opens what is wanted, then takes a pair.
fn take(upstream: &mut Upstream, id: PeerId, place: u32) -> Option<Socket> {
    while let Some(socket) = upstream.wanted(at(0)) {
        upstream.opened(socket);
    }
    upstream.take(id, place)
}

/// Gives a pair back through which something passed just now, and which no reply comes to
/// after 5 s.
fn give_back(upstream: &mut Upstream, id: PeerId, socket: Socket, now: Now) {
    let past = Past { last: now, clean: now.plus(Duration::from_secs(5)) };
    upstream.give_back(id, socket, past, now);
}

fn settle(upstream: &mut Upstream, now: Now) -> Vec<Socket> {
    while upstream.settle(now) {}
    std::iter::from_fn(|| upstream.next_surplus()).collect()
}

#[test]
fn a_pair_names_its_session_and_no_other_pair_does() {
    let mut upstream = table(10);
    let (one, other) = (peer(&mut upstream, "10.0.0.1:53"), peer(&mut upstream, "10.0.0.1:54"));
    let socket = take(&mut upstream, one, 7).unwrap();
    assert_eq!(upstream.owner(one, socket), Owner::Session(7));
    assert_eq!(upstream.owner(other, socket), Owner::Nobody);
    let of_v6 = Socket { family: Family::V6, number: socket.number };
    assert_eq!(upstream.owner(one, of_v6), Owner::Nobody);
    assert_eq!(upstream.find("10.0.0.1:53".parse().unwrap()), Some(one));
    assert_eq!(upstream.find("10.0.0.2:53".parse().unwrap()), None);
    assert_eq!(upstream.find("[::ffff:10.0.0.1]:53".parse().unwrap()), None);
}

#[test]
fn sockets_follow_the_busiest_backend_and_not_the_sum() {
    let mut upstream = table(1000);
    let peers: Vec<PeerId> =
        (1..=4).map(|n| peer(&mut upstream, &format!("10.0.0.{n}:53"))).collect();
    let mut seen = HashSet::new();
    for place in 0..400 {
        let id = peers[place as usize % 4];
        assert!(seen.insert((id, take(&mut upstream, id, place).unwrap())));
    }
    assert!((100..=101).contains(&upstream.open()), "{}", upstream.open());
    let six = peer(&mut upstream, "[2001:db8::1]:53");
    assert_eq!(take(&mut upstream, six, 400).unwrap().family, Family::V6);
    assert!(upstream.open() <= 103);
}

#[test]
fn a_pair_rests_before_it_is_used_again() {
    let mut upstream = table(1);
    let id = peer(&mut upstream, "10.0.0.1:53");
    let socket = take(&mut upstream, id, 7).unwrap();
    give_back(&mut upstream, id, socket, at(10));
    assert_eq!(upstream.owner(id, socket), Owner::Resting);
    settle(&mut upstream, at(129));
    assert_eq!(take(&mut upstream, id, 8), None);
    assert_eq!(upstream.next_deadline(), Some(at(130)));
    settle(&mut upstream, at(130));
    assert_eq!(upstream.owner(id, socket), Owner::Nobody);
    assert_eq!(take(&mut upstream, id, 8), Some(socket));
}

#[test]
fn whoever_speaks_is_known_by_the_address_and_not_by_who_spoke_before() {
    let mut upstream = table(1);
    let [one, two] = ["10.0.0.1:53", "10.0.0.2:53"].map(|address| peer(&mut upstream, address));
    let socket = take(&mut upstream, one, 7).unwrap();
    let speaker =
        |upstream: &mut Upstream, address: &str| upstream.speaker(socket, address.parse().unwrap());
    for (address, who) in [
        ("10.0.0.1:53", Some(one)),
        ("10.0.0.1:53", Some(one)),
        ("10.0.0.2:53", Some(two)),
        ("10.0.0.2:54", None),
        ("10.0.0.1:53", Some(one)),
    ] {
        assert_eq!(speaker(&mut upstream, address), who, "{address}");
    }
    // A number that has not been opened yet has heard nobody, and knows the peers all the same.
    let unopened = Socket { number: 9, ..socket };
    assert_eq!(upstream.speaker(unopened, "10.0.0.1:53".parse().unwrap()), Some(one));
    // The place of one who is gone is another's now.
    upstream.unregister(two);
    assert_eq!(speaker(&mut upstream, "10.0.0.2:53"), None);
    assert_eq!(peer(&mut upstream, "10.0.0.3:53"), two);
    assert_eq!(speaker(&mut upstream, "10.0.0.2:53"), None);
    assert_eq!(speaker(&mut upstream, "10.0.0.3:53"), Some(two));
}

#[test]
fn the_rest_outlives_the_registration() {
    let mut upstream = table(1);
    let id = peer(&mut upstream, "10.0.0.1:53");
    let socket = take(&mut upstream, id, 7).unwrap();
    upstream.unregister(id);
    assert_eq!(upstream.owner(id, socket), Owner::Session(7));
    give_back(&mut upstream, id, socket, at(0));
    assert_eq!(peer(&mut upstream, "10.0.0.1:53"), id);
    assert_eq!(take(&mut upstream, id, 8), None, "still resting");
    upstream.unregister(id);
    settle(&mut upstream, at(120));
    assert_eq!(upstream.find("10.0.0.1:53".parse().unwrap()), None);
}

#[test]
fn addresses_are_bounded_and_places_used_again() {
    let mut upstream = table(1);
    let address = |n: usize| SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 53));
    let ids: Vec<PeerId> = (0..PEERS_MAX).map(|n| upstream.register(address(n)).unwrap()).collect();
    assert_eq!(upstream.register(address(PEERS_MAX)), None);
    upstream.unregister(ids[5]);
    assert_eq!(upstream.register(address(PEERS_MAX)), Some(ids[5]));
}

#[test]
fn a_socket_that_cannot_be_opened_is_not_asked_for_at_once_again() {
    let mut upstream = table(10);
    let id = peer(&mut upstream, "10.0.0.1:53");
    let wanted = upstream.wanted(at(5)).unwrap();
    assert_eq!(upstream.wanted(at(5)), Some(wanted), "until it is answered");
    upstream.failed(wanted, at(5));
    assert_eq!(upstream.wanted(at(5)), None);
    assert_eq!(upstream.take(id, 1), None);
    peer(&mut upstream, "[::1]:53");
    assert_eq!(upstream.wanted(at(5)).map(|socket| socket.family), Some(Family::V6));
    assert_eq!(upstream.wanted(at(6)), Some(wanted));
}

#[test]
fn beyond_the_limit_the_oldest_rest_of_a_clean_pair_ends() {
    let limits = Limits { sockets: 100, rest: REST, resting: 2 };
    let mut upstream = Upstream::new(limits, 1, FlowHasher::new((1, 2)), at(0));
    let id = peer(&mut upstream, "10.0.0.1:53");
    let held: Vec<Socket> = (0..5).map(|place| take(&mut upstream, id, place).unwrap()).collect();
    for (number, seconds, resting) in [(0, 0, 1), (1, 0, 2), (2, 4, 3), (3, 5, 3), (4, 5, 3)] {
        give_back(&mut upstream, id, held[number], at(seconds));
        assert_eq!(upstream.resting(), resting, "the {number}th");
    }
    assert_eq!(upstream.owner(id, held[1]), Owner::Nobody);
    assert_eq!(upstream.owner(id, held[2]), Owner::Resting, "not clean before 9 s");
}

#[test]
fn a_rest_is_cut_short_in_the_order_of_beginning_and_not_before_the_pair_is_clean() {
    let mut upstream = table(3);
    let id = peer(&mut upstream, "10.0.0.1:53");
    let held: Vec<Socket> = (0..3).map(|place| take(&mut upstream, id, place).unwrap()).collect();
    assert!(!upstream.has_free(id));
    give_back(&mut upstream, id, held[1], at(10));
    give_back(&mut upstream, id, held[0], at(12));
    assert_eq!(upstream.usage(id, at(14)), Use { busy: 3, clean: 0 });
    assert!(!upstream.cut_short(id, at(14), at(14)), "a reply may come");
    assert_eq!(upstream.usage(id, at(16)), Use { busy: 3, clean: 1 });
    assert!(!upstream.cut_short(id, at(9), at(16)), "not quiet for so long");
    assert!(upstream.cut_short(id, at(10), at(16)));
    assert_eq!(upstream.usage(id, at(16)), Use { busy: 2, clean: 0 });
    assert_eq!(upstream.take(id, 9), Some(held[1]));
    assert!(!upstream.cut_short(id, at(16), at(16)));
    upstream.hand_on(id, held[2]);
    assert_eq!(upstream.take(id, 10), Some(held[2]));
    assert_eq!(upstream.owner(id, held[0]), Owner::Resting);
    settle(&mut upstream, at(132));
    assert_eq!((upstream.resting(), upstream.owner(id, held[0])), (0, Owner::Nobody));
}

#[test]
fn sockets_that_nobody_needs_are_closed_and_opened_again() {
    let mut upstream = table(1000);
    let id = peer(&mut upstream, "10.0.0.1:53");
    let other = peer(&mut upstream, "10.0.0.2:53");
    let held: Vec<Socket> = (0..200).map(|place| take(&mut upstream, id, place).unwrap()).collect();
    let on_other: Vec<Socket> =
        (0..40).map(|place| take(&mut upstream, other, 200 + place).unwrap()).collect();
    let open = upstream.open();
    held.iter().skip(10).for_each(|socket| give_back(&mut upstream, id, *socket, at(0)));
    assert_eq!(settle(&mut upstream, at(11)), [], "nothing is closed while pairs rest");
    let closed = settle(&mut upstream, at(120));
    assert!(closed.len() >= open - 60 - 10, "{} of {open}", closed.len());
    assert_eq!(upstream.open(), open - closed.len());
    for socket in held.iter().take(10) {
        assert!(!closed.contains(socket), "a socket with a session stays open");
    }
    assert!(on_other.iter().all(|socket| !closed.contains(socket)));
    let mut again = HashSet::new();
    for place in 300..500 {
        let socket = take(&mut upstream, id, place).unwrap();
        assert!(again.insert(socket) && !held[..10].contains(&socket));
    }
    assert!(upstream.open() <= 212);
}

#[test]
fn a_socket_that_came_into_use_again_before_it_was_closed_stays_open() {
    let mut upstream = table(1000);
    let id = peer(&mut upstream, "10.0.0.1:53");
    let rise = |upstream: &mut Upstream| -> Vec<Socket> {
        (0..100).map(|place| take(upstream, id, place).unwrap()).collect()
    };
    rise(&mut upstream).into_iter().for_each(|socket| give_back(&mut upstream, id, socket, at(0)));
    assert!(!upstream.settle(at(120)), "left over, and not yet closed");
    let held = rise(&mut upstream);
    let (high, low): (Vec<Socket>, Vec<Socket>) =
        held.into_iter().partition(|socket| socket.number >= 90);
    low.into_iter().for_each(|socket| give_back(&mut upstream, id, socket, at(120)));
    let closed = settle(&mut upstream, at(240));
    assert!(!closed.is_empty() && closed.iter().all(|socket| !high.contains(socket)));
}

#[test]
fn the_choice_depends_on_the_seed() {
    let chosen = |seed| {
        let limits = Limits { sockets: 100, rest: REST, resting: 1000 };
        let mut upstream = Upstream::new(limits, seed, FlowHasher::new((1, 2)), at(0));
        let (busy, id) = (peer(&mut upstream, "10.0.0.1:53"), peer(&mut upstream, "10.0.0.2:53"));
        (0..50).for_each(|place| assert!(take(&mut upstream, busy, place).is_some()));
        (50..80).filter_map(|place| take(&mut upstream, id, place)).collect::<Vec<_>>()
    };
    assert_eq!(chosen(1), chosen(1));
    assert_ne!(chosen(1), chosen(2));
}

/// What must be so, kept in the plainest way.
#[derive(Default)]
struct Model {
    open: HashSet<Socket>,
    held: Vec<(PeerId, Socket)>,
    resting: Vec<(PeerId, Socket, Now)>,
}

impl Model {
    fn open_wanted(&mut self, upstream: &mut Upstream, now: Now) {
        while let Some(socket) = upstream.wanted(now) {
            assert!(self.open.insert(socket), "{socket:?} is opened twice");
            upstream.opened(socket);
        }
    }

    fn take(&mut self, upstream: &mut Upstream, id: PeerId, place: u32) {
        let Some(socket) = upstream.take(id, place) else { return };
        assert!(self.open.contains(&socket), "{socket:?} is not open");
        assert!(!self.held.contains(&(id, socket)), "{socket:?} is given out twice");
        let rests = self.resting.iter().any(|rest| (rest.0, rest.1) == (id, socket));
        assert!(!rests, "{socket:?} still rests");
        self.held.push((id, socket));
    }

    fn give_back(&mut self, upstream: &mut Upstream, which: usize, now: Now) {
        let (id, socket) = self.held.swap_remove(which);
        give_back(upstream, id, socket, now);
        self.resting.push((id, socket, now.plus(REST)));
    }

    /// Sockets that are left over may have to wait until they are closed.
    fn settle(&mut self, upstream: &mut Upstream, now: Now, closed_max: usize) {
        self.resting.retain(|rest| rest.2 > now);
        while upstream.settle(now) {}
        for _ in 0..closed_max {
            let Some(socket) = upstream.next_surplus() else { break };
            assert!(self.open.remove(&socket), "{socket:?} is closed twice");
            let used = self.held.iter().map(|(_, socket)| socket);
            let mut used = used.chain(self.resting.iter().map(|(_, socket, _)| socket));
            assert!(used.all(|used| *used != socket), "{socket:?} is closed while in use");
        }
        assert_eq!(upstream.resting(), self.resting.len());
        assert_eq!(upstream.open(), self.open.len());
    }
}

#[test]
fn pairs_and_sockets_agree_with_a_plain_model_over_many_random_steps() {
    let mut chance = xorshift(0x2545_f491_4f6c_dd1d);
    let mut random = |below: usize| chance(below as u64) as usize;
    let mut upstream = table(300);
    let ids = ["10.0.0.1:53", "10.0.0.2:53", "[::1]:53"].map(|a| peer(&mut upstream, a));
    let mut model = Model::default();
    let mut now = at(0);
    for step in 0..60_000 {
        // Tides: sessions come in great numbers, then go.
        let coming = if step / 2_000 % 2 == 0 { 8 } else { 2 };
        now = now.plus(Duration::from_millis(random(if coming == 8 { 50 } else { 500 }) as u64));
        if random(10) < coming {
            model.open_wanted(&mut upstream, now);
            model.take(&mut upstream, ids[random(3)], step);
        } else if !model.held.is_empty() {
            model.give_back(&mut upstream, random(model.held.len()), now);
        }
        let closed_max = usize::from(random(20) == 0);
        model.settle(&mut upstream, now, closed_max);
    }
    while !model.held.is_empty() {
        model.give_back(&mut upstream, 0, now);
    }
    for seconds in [119, 121, 132, 143] {
        model.settle(&mut upstream, now.plus(Duration::from_secs(seconds)), usize::MAX);
    }
    assert!(upstream.open() <= 2 * SOCKETS_KEPT, "{} stay open", upstream.open());
}
