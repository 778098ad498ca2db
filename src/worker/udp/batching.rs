//! Batching of sends: datagrams of one turn with the same four-tuple leave in one transmit, which
//! the kernel cuts apart again (GSO). Owns which datagrams may share a batch; sends nothing itself.
//!
//! Each four-tuple has one slot, found by a hash, and each slot holds one batch. So the datagrams
//! of a four-tuple keep their order, and nothing is searched for. The batches themselves lie side
//! by side, in the memory that the turn before has left warm.
//!
//! The kernel refuses to segment datagrams longer than the route's MTU, but says so only after it
//! has taken the sends that follow. So batches of datagrams that fit every route leave with the
//! others; a batch of longer ones is sent at once, before anything else, so that its datagrams can
//! still go one by one and in order if it is refused. After a refusal, datagrams of that length are
//! not batched for that four-tuple for a while. After a success, batches of that length may leave
//! with the others, provided that few routes would refuse them later.

use std::net::SocketAddr;
use std::time::Duration;

use super::sessions::Segments;
use crate::base::time::Now;
use crate::ring::Tag;
use crate::ring::datagram::{PktInfo, SEGMENTS_MAX, Transmit};
use crate::ring::pool::{Buf, Chain, GATHER_MAX, Pool};

/// Four-tuples whose datagrams are batched in one turn, at most.
const SLOTS: usize = 256;
/// Bytes in one batch, at most: the kernel bounds a segmented send by the longest IPv4 datagram.
const BATCH_BYTES_MAX: usize = 65_507;
/// The longest payload that fits every route: the 576 bytes that every IPv4 host accepts (RFC
/// 1122), less the headers (20 + 8).
const MIN_MTU_V4_PAYLOAD: u16 = 548;
/// The longest payload that fits nearly every route, so that a route that took it once is trusted
/// to take it again: the minimum MTU of IPv6, 1280 bytes (RFC 8200), less the headers (40 + 8).
const MIN_MTU_V6_PAYLOAD: u16 = 1_232;
/// How long a refused length is not tried again: as long as the kernel remembers a path MTU
/// (`net.ipv4.route.mtu_expires`).
const REFUSED_FOR: Duration = Duration::from_secs(600);

/// What batched datagrams have in common: the socket, and so the local port, the receiver, and the
/// source address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FourTuple {
    pub tag: Tag,
    pub to: SocketAddr,
    /// The source address, where the socket does not supply it.
    pub from: Option<PktInfo>,
}

impl FourTuple {
    /// The four-tuple of a transmit.
    pub fn of(tag: Tag, transmit: &Transmit) -> FourTuple {
        FourTuple { tag, to: transmit.to, from: transmit.from }
    }

    /// The receiver's port and the socket tell most four-tuples apart. Two in the same slot only
    /// split each other's batches.
    fn slot(&self) -> usize {
        let mixed = u32::from(self.to.port()) ^ self.tag.slot.wrapping_mul(0x9e37_79b9) >> 7;
        (mixed.wrapping_mul(0x9e37_79b9) >> 24) as usize % SLOTS
    }
}

struct Batch {
    tuple: FourTuple,
    payload: Chain,
    /// The length of each datagram but the last, in bytes.
    segment_size: usize,
    datagrams: usize,
    /// Nothing may follow: the last datagram is shorter, or the batch must not be segmented.
    closed: bool,
}

/// A slot without a batch.
const EMPTY: u16 = u16::MAX;

/// The batches of one turn.
pub struct Batches {
    /// By slot: the index in `open`. Only these few bytes are accessed at random.
    slots: [u16; SLOTS],
    /// Oldest first.
    open: Vec<Option<Batch>>,
    /// How many of those have been popped.
    popped: usize,
    gso: bool,
    /// By slot: the shortest segment size that was refused.
    refused: [u16; SLOTS],
    /// By slot: the longest segment size that was accepted.
    accepted: [u16; SLOTS],
    /// When to forget the refusals, if there are any.
    forget_at: Option<Now>,
}

impl Batches {
    /// Without `gso` nothing is batched; what the kernel has coalesced still leaves together.
    pub fn new(gso: bool) -> Batches {
        Batches {
            slots: [EMPTY; SLOTS],
            open: Vec::with_capacity(SLOTS),
            popped: 0,
            gso,
            refused: [u16::MAX; SLOTS],
            accepted: [MIN_MTU_V4_PAYLOAD; SLOTS],
            forget_at: None,
        }
    }

    /// Whether the kernel may refuse to segment this transmit, so that nothing may follow it before
    /// that is known.
    pub fn may_be_refused(&self, tuple: FourTuple, transmit: &Transmit) -> bool {
        let Some(segment_size) =
            transmit.segment_size.filter(|segment_size| *segment_size > MIN_MTU_V4_PAYLOAD)
        else {
            return false;
        };
        segment_size > MIN_MTU_V6_PAYLOAD
            || segment_size > self.accepted[tuple.slot()]
            || self.is_refused(tuple, transmit)
    }

    /// Whether segments of this size were refused before, so that there is no use in trying.
    pub fn is_refused(&self, tuple: FourTuple, transmit: &Transmit) -> bool {
        transmit.segment_size.is_some_and(|segment_size| segment_size >= self.refused[tuple.slot()])
    }

    /// The kernel has refused segments of this size.
    pub fn note_refused(&mut self, tuple: FourTuple, segment_size: u16, now: Now) {
        let shortest = &mut self.refused[tuple.slot()];
        *shortest = segment_size.min(*shortest);
        self.accepted[tuple.slot()] = MIN_MTU_V4_PAYLOAD;
        self.forget_at.get_or_insert(now.plus(REFUSED_FOR));
    }

    /// The kernel has accepted segments of this size.
    pub fn note_accepted(&mut self, tuple: FourTuple, segment_size: u16) {
        let longest = &mut self.accepted[tuple.slot()];
        *longest = segment_size.max(*longest);
    }

    /// Forgets refusals after a while, because routes change.
    pub fn forget_refusals(&mut self, now: Now) {
        if self.forget_at.is_some_and(|at| at <= now) {
            self.refused.fill(u16::MAX);
            self.forget_at = None;
        }
    }

    /// Adds datagrams to the batch of their four-tuple. If they cannot join the batch in its slot,
    /// that batch is returned, to be sent before them.
    pub fn push(
        &mut self,
        tuple: FourTuple,
        segments: Segments,
        buf: Buf,
        pool: &mut Pool,
    ) -> Option<(Tag, Transmit)> {
        let number = tuple.slot();
        let slot = &mut self.slots[number];
        let held = self.open.get_mut(usize::from(*slot)).and_then(Option::as_mut);
        if let Some(batch) = held
            && batch.takes(&tuple, segments)
        {
            batch.datagrams += segments.datagrams() as usize;
            batch.closed = !segments.bytes.is_multiple_of(batch.segment_size);
            pool.push(&mut batch.payload, buf);
            return None;
        }
        let mut payload = Chain::EMPTY;
        pool.push(&mut payload, buf);
        let (segment_size, datagrams) = (segments.longest(), segments.datagrams() as usize);
        let cut = self.gso && segment_size > 0 && segment_size < usize::from(self.refused[number]);
        let closed = !cut || !segments.bytes.is_multiple_of(segment_size);
        let new = Batch { tuple, payload, segment_size, datagrams, closed };
        if let Some(held) = self.open.get_mut(usize::from(*slot)) {
            return held.replace(new).map(Batch::transmit);
        }
        *slot = self.open.len() as u16;
        self.open.push(Some(new));
        None
    }

    /// The next batch to send, as a transmit; `None` once all are out.
    pub fn pop(&mut self) -> Option<(Tag, Transmit)> {
        let Some(held) = self.open.get_mut(self.popped) else {
            self.open.clear();
            self.popped = 0;
            return None;
        };
        self.popped += 1;
        let batch = held.take()?;
        self.slots[batch.tuple.slot()] = EMPTY;
        Some(batch.transmit())
    }
}

impl Batch {
    fn takes(&self, tuple: &FourTuple, segments: Segments) -> bool {
        let same_length = segments.longest() == self.segment_size;
        let last = segments.bytes < self.segment_size && segments.datagrams() == 1;
        !self.closed
            && self.tuple == *tuple
            && segments.bytes > 0
            && (same_length || last)
            && self.datagrams + segments.datagrams() as usize <= SEGMENTS_MAX
            && self.payload.bytes() + segments.bytes <= BATCH_BYTES_MAX
            && self.payload.blocks() < GATHER_MAX
    }

    fn transmit(self) -> (Tag, Transmit) {
        let FourTuple { tag, to, from } = self.tuple;
        // Fits: a datagram is at most 65,527 bytes long.
        let segment_size = (self.datagrams > 1).then_some(self.segment_size as u16);
        (tag, Transmit { to, from, segment_size, payload: self.payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::pool::Class;

    const NOW: Now = Now::from_nanos(1_000_000_000);

    struct Rig {
        batches: Batches,
        pool: Pool,
        sent: Vec<(u16, Option<u16>, usize)>,
    }

    fn rig(gso: bool) -> Rig {
        Rig { batches: Batches::new(gso), pool: Pool::with_datagrams(4, 4, 400), sent: vec![] }
    }

    fn tuple(port: u16) -> FourTuple {
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        FourTuple { tag: Tag { kind: 1, generation: 0, slot: 0 }, to, from: None }
    }

    impl Rig {
        fn add(&mut self, port: u16, segments: Segments) {
            let sent = self.put(tuple(port), segments, 1);
            self.note(sent);
        }

        /// Pushes datagrams filled with `byte`.
        fn put(
            &mut self,
            tuple: FourTuple,
            segments: Segments,
            byte: u8,
        ) -> Option<(Tag, Transmit)> {
            let mut buf = self.pool.take(Class::Datagram).unwrap();
            assert_eq!(self.pool.append(&mut buf, &vec![byte; segments.bytes]), segments.bytes);
            self.batches.push(tuple, segments, buf, &mut self.pool)
        }

        fn note(&mut self, sent: Option<(Tag, Transmit)>) {
            let Some((_, transmit)) = sent else { return };
            self.sent.push((transmit.to.port(), transmit.segment_size, transmit.payload.bytes()));
            self.pool.give_back_chain(transmit.payload);
        }

        /// What was sent, by receiver: its port, the segment size, and the bytes in all.
        fn all(mut self) -> Vec<(u16, Option<u16>, usize)> {
            while let Some(sent) = self.batches.pop() {
                self.note(Some(sent));
            }
            assert_eq!(self.pool.free(Class::Datagram), 400);
            self.sent.sort_by_key(|(port, ..)| *port);
            self.sent
        }
    }

    /// The transmits in which datagrams of these lengths leave for one receiver.
    fn transmits(lengths: &[usize]) -> Vec<(Option<u16>, usize)> {
        let mut rig = rig(true);
        lengths.iter().for_each(|len| rig.add(1, Segments::one(*len)));
        rig.all().into_iter().map(|(_, segment_size, bytes)| (segment_size, bytes)).collect()
    }

    #[test]
    fn only_the_last_datagram_of_a_batch_is_shorter() {
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
    fn a_batch_has_no_more_datagrams_and_bytes_than_the_kernel_takes() {
        assert_eq!(transmits(&[10; 130]), [(Some(10), 640), (Some(10), 640), (Some(10), 20)]);
        let long = transmits(&[30_000; 5]);
        assert_eq!(long, [(Some(30_000), 60_000), (Some(30_000), 60_000), (None, 30_000)]);
    }

    #[test]
    fn coalesced_datagrams_join_a_batch_of_their_length() {
        let several = |bytes, segment_size| Segments { bytes, segment_size };
        for (bursts, sent) in [
            (vec![several(300, 100), several(200, 100)], vec![(1, Some(100), 500)]),
            (vec![several(250, 100), several(100, 100)], vec![(1, Some(100), 250), (1, None, 100)]),
            // Two shorter datagrams are not one.
            (
                vec![several(300, 100), several(60, 30)],
                vec![(1, Some(100), 300), (1, Some(30), 60)],
            ),
            (vec![Segments::one(100), several(150, 100)], vec![(1, Some(100), 250)]),
        ] {
            let mut rig = rig(true);
            bursts.iter().for_each(|segments| rig.add(1, *segments));
            assert_eq!(rig.all(), sent, "{bursts:?}");
        }
    }

    #[test]
    fn receivers_have_batches_of_their_own_in_whatever_order_datagrams_come() {
        let mut rig = rig(true);
        for _ in 0..5 {
            (1..=40).for_each(|port| rig.add(port, Segments::one(100)));
        }
        let sent = rig.all();
        let bytes = |wanted| -> usize {
            sent.iter().filter(|(port, ..)| *port == wanted).map(|(.., bytes)| bytes).sum()
        };
        assert!((1..=40).all(|port| bytes(port) == 500), "{sent:?}");
        assert!(sent.len() <= 120, "{} transmits for 40 receivers", sent.len());
    }

    #[test]
    fn a_batch_holds_datagrams_of_one_four_tuple_only() {
        let from = |last: u8| Some(PktInfo::from(std::net::IpAddr::from([127, 0, 0, last])));
        let there = PktInfo { ip: std::net::Ipv6Addr::LOCALHOST.into(), interface: 0 };
        let tag = |kind, slot| Tag { kind, generation: 0, slot };
        let base = FourTuple { from: from(1), ..tuple(1) };
        for other in [
            FourTuple { from: from(2), ..base },
            FourTuple { from: None, ..base },
            FourTuple { to: "127.0.0.2:1".parse().unwrap(), ..base },
            FourTuple { to: "127.0.0.1:2".parse().unwrap(), ..base },
            FourTuple { tag: tag(1, 5), ..base },
            FourTuple { tag: tag(2, 0), ..base },
            FourTuple { from: Some(there), ..base },
            FourTuple { from: Some(PktInfo { interface: 3, ..there }), ..base },
        ] {
            let mut rig = rig(true);
            let mut sent = Vec::new();
            for byte in 0..12 {
                let tuple = if byte % 3 == 0 { other } else { base };
                sent.extend(rig.put(tuple, Segments::one(100), byte));
            }
            sent.extend(std::iter::from_fn(|| rig.batches.pop()));
            let mut bytes = [vec![], vec![]];
            for (tag, transmit) in sent {
                let tuple = FourTuple::of(tag, &transmit);
                assert!(tuple == base || tuple == other, "{tuple:?}");
                let pieces = rig.pool.pieces(transmit.payload.outgoing());
                bytes[usize::from(tuple == other)].extend(pieces.map(|piece| piece[0]));
                rig.pool.give_back_chain(transmit.payload);
            }
            let wanted = (0..12).partition(|byte| byte % 3 != 0);
            assert_eq!((bytes[0].clone(), bytes[1].clone()), wanted, "{other:?}");
        }
    }

    #[test]
    fn a_refused_length_goes_one_by_one_until_the_refusal_is_forgotten() {
        let mut rig = rig(true);
        rig.batches.note_refused(tuple(1), 1_400, NOW);
        let later = NOW.plus(REFUSED_FOR);
        for (now, lengths, gso) in [
            (NOW, [1_399; 3], true),
            (NOW, [1_400; 3], false),
            (NOW, [9_000; 3], false),
            (later, [9_000; 3], true),
        ] {
            rig.batches.forget_refusals(now);
            lengths.iter().for_each(|len| rig.add(1, Segments::one(*len)));
            while let Some(sent) = rig.batches.pop() {
                rig.note(Some(sent));
            }
            let transmits = rig.sent.len();
            assert_eq!(transmits, if gso { 1 } else { 3 }, "{lengths:?}");
            rig.sent.clear();
        }
        rig.batches.note_refused(tuple(1), 1_400, NOW);
        (0..3).for_each(|_| rig.add(2, Segments::one(9_000)));
        assert_eq!(rig.all(), [(2, Some(9_000), 27_000)], "another tuple");
    }

    #[test]
    fn a_batch_that_a_route_may_refuse_to_segment_is_told_apart() {
        let mut rig = rig(true);
        let may_be_refused = |rig: &mut Rig, segments: Segments| {
            rig.put(tuple(1), segments, 1);
            let (_, transmit) = rig.batches.pop().unwrap();
            let doubtful = rig.batches.may_be_refused(tuple(1), &transmit);
            let refused = rig.batches.is_refused(tuple(1), &transmit);
            rig.pool.give_back_chain(transmit.payload);
            while rig.batches.pop().is_some() {}
            (doubtful, refused)
        };
        let several = |segment_size| Segments { bytes: 3 * segment_size, segment_size };
        assert_eq!(may_be_refused(&mut rig, several(548)), (false, false));
        assert_eq!(may_be_refused(&mut rig, several(549)), (true, false));
        assert_eq!(may_be_refused(&mut rig, Segments::one(60_000)), (false, false));
        rig.batches.note_accepted(tuple(1), 1_400);
        assert_eq!(may_be_refused(&mut rig, several(1_232)), (false, false));
        assert_eq!(
            may_be_refused(&mut rig, several(1_233)),
            (true, false),
            "the route may have become narrower"
        );
        rig.batches.note_refused(tuple(1), 600, NOW);
        assert_eq!(may_be_refused(&mut rig, several(600)), (true, true));
        assert_eq!(may_be_refused(&mut rig, several(599)), (true, false));
        assert_eq!(may_be_refused(&mut rig, several(548)), (false, false));
    }

    #[test]
    fn without_gso_nothing_is_batched() {
        let mut rig = rig(false);
        (0..4).for_each(|_| rig.add(1, Segments::one(100)));
        rig.add(1, Segments { bytes: 300, segment_size: 100 });
        assert_eq!(rig.all(), [[(1, None, 100); 4].as_slice(), &[(1, Some(100), 300)]].concat());
    }
}
