//! Letters that are still open: datagrams of one turn that go the same way leave together, for the
//! kernel to cut up again (GSO). Owns which datagrams may share a transmit; sends nothing itself.
//!
//! A way has one place, found by a hash of its ends, and a place holds one transmit. So the datagrams of
//! one way keep their order, and nothing has to be searched for. The transmits themselves lie side by side,
//! those of a turn in the memory that those of the turn before have left warm.
//!
//! The kernel cuts nothing up that is longer than the route's MTU, and says so only when it has taken what
//! follows. So transmits whose datagrams every route takes leave with the others, and what is longer is sent
//! at once, each transmit before the next: if it is refused, its datagrams still go in their order. What was
//! refused on a way is not put together there again for a while, and what was taken there may leave with
//! the others, if it is of a length that few routes would refuse later.

use std::net::SocketAddr;
use std::time::Duration;

use super::sessions::Load;
use crate::base::time::Now;
use crate::ring::Tag;
use crate::ring::datagram::{PktInfo, SEGMENTS_MAX, Transmit};
use crate::ring::pool::{Buf, Chain, GATHER_MAX, Pool};

/// Ways that datagrams of one turn may go without being parted.
const PLACES: usize = 256;
/// Bytes of one transmit at most: what one datagram of IPv4 may have, which bounds them together.
const LETTER_BYTES_MAX: usize = 65_507;
/// Payloads that every route takes whole: what any host takes of IPv4 (576) without the headers (20 + 8).
const SURE_BYTES: u16 = 548;
/// Payloads that nearly every route takes, so that one that has once may be trusted: what IPv6 asks of each
/// link (1,280) without the headers (40 + 8).
const LIKELY_BYTES: u16 = 1_232;
/// How long a length is not tried again where it was refused; the kernel believes as long that a route
/// is narrow (`net.ipv4.route.mtu_expires`).
const REFUSED_FOR: Duration = Duration::from_secs(600);

/// From one socket to one receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    pub tag: Tag,
    pub to: SocketAddr,
    /// Our address that the datagrams are to come from, where that has to be said.
    pub from: Option<PktInfo>,
}

impl Way {
    /// The way that a transmit takes.
    pub fn of(tag: Tag, transmit: &Transmit) -> Way {
        Way { tag, to: transmit.to, from: transmit.from }
    }

    /// The ports and the socket tell most ways apart; two that meet only part each other's transmits.
    fn place(&self) -> usize {
        let mixed = u32::from(self.to.port()) ^ self.tag.slot.wrapping_mul(0x9e37_79b9) >> 7;
        (mixed.wrapping_mul(0x9e37_79b9) >> 24) as usize % PLACES
    }
}

struct Open {
    way: Way,
    payload: Chain,
    /// The length of each of its datagrams but the last.
    segment_size: usize,
    datagrams: usize,
    /// The last datagram is shorter, or there is no length to be cut up by.
    closed: bool,
}

/// A place that holds no transmit.
const EMPTY: u16 = u16::MAX;

/// The open transmits of one turn.
pub struct Outbox {
    /// By way: which of `open` it is. Only these few bytes are looked up at random.
    places: [u16; PLACES],
    /// In the order in which they came.
    open: Vec<Option<Open>>,
    /// How many of these have been given out.
    given: usize,
    together: bool,
    /// By way: datagrams of this length or more could not be cut up.
    refused: [u16; PLACES],
    /// By way: datagrams of this length were cut up.
    proven: [u16; PLACES],
    /// When to forget what was refused, if anything was.
    forget_at: Option<Now>,
}

impl Outbox {
    /// With `together` false every transmit is one datagram, or what came as one.
    pub fn new(together: bool) -> Outbox {
        Outbox {
            places: [EMPTY; PLACES],
            open: Vec::with_capacity(PLACES),
            given: 0,
            together,
            refused: [u16::MAX; PLACES],
            proven: [SURE_BYTES; PLACES],
            forget_at: None,
        }
    }

    /// Whether a transmit may be refused that could go one datagram at a time, so that nothing may follow
    /// it before that is known.
    pub fn is_doubtful(&self, way: Way, transmit: &Transmit) -> bool {
        let Some(segment_size) =
            transmit.segment_size.filter(|segment_size| *segment_size > SURE_BYTES)
        else {
            return false;
        };
        segment_size > LIKELY_BYTES
            || segment_size > self.proven[way.place()]
            || self.is_refused(way, transmit)
    }

    /// Whether it was refused before, and is better not tried again.
    pub fn is_refused(&self, way: Way, transmit: &Transmit) -> bool {
        transmit.segment_size.is_some_and(|segment_size| segment_size >= self.refused[way.place()])
    }

    /// The kernel would not cut up datagrams of this length on this way.
    pub fn was_refused(&mut self, way: Way, segment_size: u16, now: Now) {
        let shortest = &mut self.refused[way.place()];
        *shortest = segment_size.min(*shortest);
        self.proven[way.place()] = SURE_BYTES;
        self.forget_at.get_or_insert(now.plus(REFUSED_FOR));
    }

    /// The kernel has cut up datagrams of this length on this way.
    pub fn was_taken(&mut self, way: Way, segment_size: u16) {
        let longest = &mut self.proven[way.place()];
        *longest = segment_size.max(*longest);
    }

    /// Routes change: what was refused long ago may be tried again.
    pub fn forget(&mut self, now: Now) {
        if self.forget_at.is_some_and(|at| at <= now) {
            self.refused.fill(u16::MAX);
            self.forget_at = None;
        }
    }

    /// Takes datagrams to be sent. What can go no further together is given out, to be sent now.
    pub fn add(
        &mut self,
        way: Way,
        load: Load,
        buf: Buf,
        pool: &mut Pool,
    ) -> Option<(Tag, Transmit)> {
        let number = way.place();
        let place = &mut self.places[number];
        let held = self.open.get_mut(usize::from(*place)).and_then(Option::as_mut);
        if let Some(open) = held
            && open.takes(&way, load)
        {
            open.datagrams += load.datagrams() as usize;
            open.closed = !load.bytes.is_multiple_of(open.segment_size);
            pool.push(&mut open.payload, buf);
            return None;
        }
        let mut payload = Chain::EMPTY;
        pool.push(&mut payload, buf);
        let (segment_size, datagrams) = (load.longest(), load.datagrams() as usize);
        let cut =
            self.together && segment_size > 0 && segment_size < usize::from(self.refused[number]);
        let closed = !cut || !load.bytes.is_multiple_of(segment_size);
        let new = Open { way, payload, segment_size, datagrams, closed };
        if let Some(held) = self.open.get_mut(usize::from(*place)) {
            return held.replace(new).map(Open::transmit);
        }
        *place = self.open.len() as u16;
        self.open.push(Some(new));
        None
    }

    /// Gives out the transmits that are left, one by one, until there is none.
    pub fn next(&mut self) -> Option<(Tag, Transmit)> {
        let Some(held) = self.open.get_mut(self.given) else {
            self.open.clear();
            self.given = 0;
            return None;
        };
        self.given += 1;
        let open = held.take()?;
        self.places[open.way.place()] = EMPTY;
        Some(open.transmit())
    }
}

impl Open {
    fn takes(&self, way: &Way, load: Load) -> bool {
        let same_length = load.longest() == self.segment_size;
        let last = load.bytes < self.segment_size && load.datagrams() == 1;
        !self.closed
            && self.way == *way
            && load.bytes > 0
            && (same_length || last)
            && self.datagrams + load.datagrams() as usize <= SEGMENTS_MAX
            && self.payload.bytes() + load.bytes <= LETTER_BYTES_MAX
            && self.payload.blocks() < GATHER_MAX
    }

    fn transmit(self) -> (Tag, Transmit) {
        let Way { tag, to, from } = self.way;
        // A datagram is at most 65,527 bytes long.
        let segment_size = (self.datagrams > 1).then_some(self.segment_size as u16);
        (tag, Transmit { to, from, segment_size, payload: self.payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::pool::Class;

    const NOW: Now = Now::from_nanos(1_000_000_000);

    struct Desk {
        outbox: Outbox,
        pool: Pool,
        sent: Vec<(u16, Option<u16>, usize)>,
    }

    fn desk(together: bool) -> Desk {
        Desk { outbox: Outbox::new(together), pool: Pool::with_datagrams(4, 4, 400), sent: vec![] }
    }

    fn way(port: u16) -> Way {
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        Way { tag: Tag { kind: 1, generation: 0, slot: 0 }, to, from: None }
    }

    impl Desk {
        fn add(&mut self, port: u16, load: Load) {
            let sent = self.put(way(port), load, 1);
            self.note(sent);
        }

        /// Takes datagrams of these bytes.
        fn put(&mut self, way: Way, load: Load, byte: u8) -> Option<(Tag, Transmit)> {
            let mut buf = self.pool.take(Class::Datagram).unwrap();
            assert_eq!(self.pool.append(&mut buf, &vec![byte; load.bytes]), load.bytes);
            self.outbox.add(way, load, buf, &mut self.pool)
        }

        fn note(&mut self, sent: Option<(Tag, Transmit)>) {
            let Some((_, transmit)) = sent else { return };
            self.sent.push((transmit.to.port(), transmit.segment_size, transmit.payload.bytes()));
            self.pool.give_back_chain(transmit.payload);
        }

        /// What was sent: receiver, length of each, bytes in all; in the order of receivers.
        fn all(mut self) -> Vec<(u16, Option<u16>, usize)> {
            while let Some(sent) = self.outbox.next() {
                self.note(Some(sent));
            }
            assert_eq!(self.pool.free(Class::Datagram), 400);
            self.sent.sort_by_key(|(port, ..)| *port);
            self.sent
        }
    }

    /// The transmits that datagrams of these lengths to one receiver leave in.
    fn transmits(lengths: &[usize]) -> Vec<(Option<u16>, usize)> {
        let mut desk = desk(true);
        lengths.iter().for_each(|len| desk.add(1, Load::one(*len)));
        desk.all().into_iter().map(|(_, segment_size, bytes)| (segment_size, bytes)).collect()
    }

    #[test]
    fn only_the_last_of_a_letter_is_shorter() {
        for (lengths, sent) in [
            (vec![100, 100, 100], vec![(Some(100), 300)]),
            (vec![100, 100, 60, 100], vec![(Some(100), 260), (None, 100)]),
            (vec![100, 101], vec![(None, 100), (None, 101)]),
            (vec![100, 60, 60], vec![(Some(100), 160), (None, 60)]),
            (vec![0, 0, 7, 0], vec![(None, 0), (None, 0), (None, 7), (None, 0)]),
        ] {
            assert_eq!(transmits(&lengths), sent, "{lengths:?}");
        }
    }

    #[test]
    fn a_letter_has_no_more_datagrams_and_bytes_than_the_kernel_takes() {
        assert_eq!(transmits(&[10; 130]), [(Some(10), 640), (Some(10), 640), (Some(10), 20)]);
        let long = transmits(&[30_000; 5]);
        assert_eq!(long, [(Some(30_000), 60_000), (Some(30_000), 60_000), (None, 30_000)]);
    }

    #[test]
    fn what_came_as_one_joins_what_has_its_length() {
        let several = |bytes, segment_size| Load { bytes, segment_size };
        for (loads, sent) in [
            (vec![several(300, 100), several(200, 100)], vec![(1, Some(100), 500)]),
            (vec![several(250, 100), several(100, 100)], vec![(1, Some(100), 250), (1, None, 100)]),
            // Two short ones are not one short one.
            (
                vec![several(300, 100), several(60, 30)],
                vec![(1, Some(100), 300), (1, Some(30), 60)],
            ),
            (vec![Load::one(100), several(150, 100)], vec![(1, Some(100), 250)]),
        ] {
            let mut desk = desk(true);
            loads.iter().for_each(|load| desk.add(1, *load));
            assert_eq!(desk.all(), sent, "{loads:?}");
        }
    }

    #[test]
    fn receivers_have_letters_of_their_own_in_whatever_order_they_come() {
        let mut desk = desk(true);
        for _ in 0..5 {
            (1..=40).for_each(|port| desk.add(port, Load::one(100)));
        }
        let sent = desk.all();
        let bytes = |wanted| -> usize {
            sent.iter().filter(|(port, ..)| *port == wanted).map(|(.., bytes)| bytes).sum()
        };
        assert!((1..=40).all(|port| bytes(port) == 500), "{sent:?}");
        assert!(sent.len() <= 120, "{} transmits for 40 receivers", sent.len());
    }

    #[test]
    fn a_letter_holds_datagrams_of_one_way_only() {
        let from = |last: u8| Some(PktInfo::from(std::net::IpAddr::from([127, 0, 0, last])));
        let there = PktInfo { ip: std::net::Ipv6Addr::LOCALHOST.into(), interface: 0 };
        let tag = |kind, slot| Tag { kind, generation: 0, slot };
        let base = Way { from: from(1), ..way(1) };
        for other in [
            Way { from: from(2), ..base },
            Way { from: None, ..base },
            Way { to: "127.0.0.2:1".parse().unwrap(), ..base },
            Way { to: "127.0.0.1:2".parse().unwrap(), ..base },
            Way { tag: tag(1, 5), ..base },
            Way { tag: tag(2, 0), ..base },
            Way { from: Some(there), ..base },
            Way { from: Some(PktInfo { interface: 3, ..there }), ..base },
        ] {
            let mut desk = desk(true);
            let mut sent = Vec::new();
            for byte in 0..12 {
                let way = if byte % 3 == 0 { other } else { base };
                sent.extend(desk.put(way, Load::one(100), byte));
            }
            sent.extend(std::iter::from_fn(|| desk.outbox.next()));
            let mut bytes = [vec![], vec![]];
            for (tag, transmit) in sent {
                let way = Way::of(tag, &transmit);
                assert!(way == base || way == other, "{way:?}");
                let pieces = desk.pool.pieces(transmit.payload.outgoing());
                bytes[usize::from(way == other)].extend(pieces.map(|piece| piece[0]));
                desk.pool.give_back_chain(transmit.payload);
            }
            let wanted = (0..12).partition(|byte| byte % 3 != 0);
            assert_eq!((bytes[0].clone(), bytes[1].clone()), wanted, "{other:?}");
        }
    }

    #[test]
    fn what_was_refused_goes_one_by_one_there_until_that_is_long_ago() {
        let mut desk = desk(true);
        desk.outbox.was_refused(way(1), 1_400, NOW);
        let later = NOW.plus(REFUSED_FOR);
        for (now, lengths, together) in [
            (NOW, [1_399; 3], true),
            (NOW, [1_400; 3], false),
            (NOW, [9_000; 3], false),
            (later, [9_000; 3], true),
        ] {
            desk.outbox.forget(now);
            lengths.iter().for_each(|len| desk.add(1, Load::one(*len)));
            while let Some(sent) = desk.outbox.next() {
                desk.note(Some(sent));
            }
            let transmits = desk.sent.len();
            assert_eq!(transmits, if together { 1 } else { 3 }, "{lengths:?}");
            desk.sent.clear();
        }
        desk.outbox.was_refused(way(1), 1_400, NOW);
        (0..3).for_each(|_| desk.add(2, Load::one(9_000)));
        assert_eq!(desk.all(), [(2, Some(9_000), 27_000)], "another way");
    }

    #[test]
    fn what_a_route_may_refuse_to_cut_up_is_doubtful() {
        let mut desk = desk(true);
        let is_doubtful = |desk: &mut Desk, load: Load| {
            desk.put(way(1), load, 1);
            let (_, transmit) = desk.outbox.next().unwrap();
            let doubtful = desk.outbox.is_doubtful(way(1), &transmit);
            let refused = desk.outbox.is_refused(way(1), &transmit);
            desk.pool.give_back_chain(transmit.payload);
            while desk.outbox.next().is_some() {}
            (doubtful, refused)
        };
        let several = |segment_size| Load { bytes: 3 * segment_size, segment_size };
        assert_eq!(is_doubtful(&mut desk, several(548)), (false, false));
        assert_eq!(is_doubtful(&mut desk, several(549)), (true, false));
        assert_eq!(is_doubtful(&mut desk, Load::one(60_000)), (false, false));
        desk.outbox.was_taken(way(1), 1_400);
        assert_eq!(is_doubtful(&mut desk, several(1_232)), (false, false));
        assert_eq!(is_doubtful(&mut desk, several(1_233)), (true, false), "that may have changed");
        desk.outbox.was_refused(way(1), 600, NOW);
        assert_eq!(is_doubtful(&mut desk, several(600)), (true, true));
        assert_eq!(is_doubtful(&mut desk, several(599)), (true, false));
        assert_eq!(is_doubtful(&mut desk, several(548)), (false, false));
    }

    #[test]
    fn nothing_is_put_together_when_that_is_not_wanted() {
        let mut desk = desk(false);
        (0..4).for_each(|_| desk.add(1, Load::one(100)));
        desk.add(1, Load { bytes: 300, segment_size: 100 });
        assert_eq!(desk.all(), [[(1, None, 100); 4].as_slice(), &[(1, Some(100), 300)]].concat());
    }
}
