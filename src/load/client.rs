//! One connection of the load, without its socket: which message comes next, and whether what came
//! back is its reply. Three state machines: [`Exchange`] (one message at a time on a stream),
//! [`Flow`] (datagrams, several in flight) and [`Stream`] (endless content). Pure: bytes and
//! moments come in, verdicts go out.

use std::time::Duration;

use super::message::{Content, HEAD_BYTES, Head, Kind, content_position};
use super::tally::RequestFailure;
use crate::base::time::Now;

/// One message at a time on a stream, and its reply with the same bytes.
#[derive(Debug)]
pub struct Exchange {
    connection: u32,
    /// Length of a message in bytes, at least [`HEAD_BYTES`].
    size: usize,
    /// How many requests have been made; also the number of the one awaiting its reply.
    sequence: u64,
    waiting: bool,
    /// Bytes of the reply so far, and the part of its head that has come.
    got: usize,
    head: [u8; HEAD_BYTES],
}

/// A complete reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completed {
    /// Who answered; zero if nobody said.
    pub backend: u32,
    /// When its request was sent, or due.
    pub since: Now,
}

impl Exchange {
    pub fn new(connection: u32, size: usize) -> Exchange {
        assert!(size >= HEAD_BYTES, "a message has room for its head");
        Exchange { connection, size, sequence: 0, waiting: false, got: 0, head: [0; HEAD_BYTES] }
    }

    /// The same for a new connection. The count goes on, so that a reply meant for the old one is
    /// recognised.
    pub fn anew(self) -> Exchange {
        Exchange { waiting: false, got: 0, ..self }
    }

    /// The next request's head; the request has `size` bytes in all, and the rest is content from
    /// [`content_position`].
    pub fn request(&mut self) -> Head {
        assert!(!self.waiting, "one message at a time");
        self.sequence += 1;
        self.waiting = true;
        self.got = 0;
        Head { kind: Kind::Echo, connection: self.connection, backend: 0, sequence: self.sequence }
    }

    /// Whether a reply is awaited.
    pub fn waiting(&self) -> bool {
        self.waiting
    }

    /// Takes received bytes. `Some(backend)` once the reply is complete. After a fault, nothing on
    /// this connection can be told apart any more: it must be closed.
    pub fn received(
        &mut self,
        content: &Content,
        bytes: &[u8],
    ) -> Result<Option<u32>, RequestFailure> {
        let mut rest = bytes;
        if !self.waiting && !rest.is_empty() {
            return Err(self.unasked(rest));
        }
        if self.got < HEAD_BYTES {
            let part = rest.len().min(HEAD_BYTES - self.got);
            self.head[self.got..self.got + part].copy_from_slice(&rest[..part]);
            self.got += part;
            rest = &rest[part..];
            if self.got < HEAD_BYTES {
                return Ok(None);
            }
            self.check_head()?;
        }
        let part = rest.len().min(self.size - self.got);
        let position = content_position(self.connection, self.sequence) + self.got as u64;
        if !content.matches(position, &rest[..part]) {
            return Err(RequestFailure::Corrupt);
        }
        self.got += part;
        if self.got < self.size {
            return Ok(None);
        }
        self.waiting = false;
        if rest.len() > part {
            return Err(self.unasked(&rest[part..]));
        }
        Ok(Some(Head::decode(&self.head).map_or(0, |head| head.backend)))
    }

    fn check_head(&self) -> Result<(), RequestFailure> {
        let Some(head) = Head::decode(&self.head) else { return Err(RequestFailure::Corrupt) };
        if head.connection != self.connection {
            return Err(RequestFailure::WrongClient);
        }
        match head.sequence.cmp(&self.sequence) {
            std::cmp::Ordering::Less => Err(RequestFailure::Duplicated),
            std::cmp::Ordering::Greater => Err(RequestFailure::Corrupt),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }

    /// Classifies bytes that nobody asked for.
    fn unasked(&self, bytes: &[u8]) -> RequestFailure {
        match Head::decode(bytes) {
            Some(head) if head.connection != self.connection => RequestFailure::WrongClient,
            Some(head) if head.sequence <= self.sequence => RequestFailure::Duplicated,
            _ => RequestFailure::Corrupt,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Waiting,
    Answered,
    GivenUp,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    sequence: u64,
    /// When it was due, from which latency counts, and when it was sent, from which the timeout
    /// counts.
    since: Now,
    sent: Now,
    fate: Fate,
}

/// Datagrams to one peer, with at most a window of them unanswered.
#[derive(Debug)]
pub struct Flow {
    connection: u32,
    size: usize,
    window: usize,
    sequence: u64,
    /// The highest number answered so far.
    highest: u64,
    unanswered: usize,
    /// Indexed by `sequence % slots.len()`; longer than the window, so that a late or second reply
    /// is recognised.
    slots: Box<[Slot]>,
}

/// How many past datagrams are remembered for each one that may be in flight.
const MEMORY: usize = 4;

impl Flow {
    pub fn new(connection: u32, size: usize, window: usize) -> Flow {
        assert!(size >= HEAD_BYTES && window > 0, "a datagram has a head and a place");
        let never = Now::default();
        let empty = Slot { sequence: 0, since: never, sent: never, fate: Fate::Answered };
        let slots = vec![empty; window * MEMORY].into_boxed_slice();
        Flow { connection, size, window, sequence: 0, highest: 0, unanswered: 0, slots }
    }

    /// The next datagram's head, or `None` while the window is full.
    pub fn request(&mut self, since: Now, sent: Now) -> Option<Head> {
        if !self.has_room() {
            return None;
        }
        let next = self.sequence + 1;
        let slot = self.place(next);
        self.sequence = next;
        self.unanswered += 1;
        self.slots[slot] = Slot { sequence: next, since, sent, fate: Fate::Waiting };
        Some(Head { kind: Kind::Echo, connection: self.connection, backend: 0, sequence: next })
    }

    /// Whether [`Flow::request`] would give one.
    pub fn has_room(&self) -> bool {
        let next = self.place(self.sequence + 1);
        self.unanswered < self.window && self.slots[next].fate != Fate::Waiting
    }

    /// How many datagrams are in flight.
    pub fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Takes one datagram. A fault concerns this datagram alone; a reply that overtook an earlier
    /// one is both a fault and a reply, hence the pair.
    pub fn received(
        &mut self,
        content: &Content,
        datagram: &[u8],
    ) -> (Option<Completed>, Option<RequestFailure>) {
        let head = match self.check(content, datagram) {
            Ok(head) => head,
            Err(fault) => return (None, Some(fault)),
        };
        let place = self.place(head.sequence);
        let slot = &mut self.slots[place];
        if slot.sequence != head.sequence {
            return (None, Some(RequestFailure::Late));
        }
        match slot.fate {
            Fate::Answered => return (None, Some(RequestFailure::Duplicated)),
            Fate::GivenUp => return (None, Some(RequestFailure::Late)),
            Fate::Waiting => slot.fate = Fate::Answered,
        }
        self.unanswered -= 1;
        let reply = Completed { backend: head.backend, since: slot.since };
        let overtaken = head.sequence < self.highest;
        self.highest = self.highest.max(head.sequence);
        (Some(reply), overtaken.then_some(RequestFailure::Reordered))
    }

    /// Gives up datagrams that have waited longer than `patience`; returns how many.
    pub fn expire(&mut self, now: Now, patience: Duration) -> u64 {
        if self.unanswered == 0 {
            return 0;
        }
        let mut lost = 0;
        for slot in &mut self.slots {
            if slot.fate == Fate::Waiting && now.since(slot.sent) > patience {
                slot.fate = Fate::GivenUp;
                lost += 1;
            }
        }
        self.unanswered -= lost;
        lost as u64
    }

    fn check(&self, content: &Content, datagram: &[u8]) -> Result<Head, RequestFailure> {
        let head = Head::decode(datagram).ok_or(RequestFailure::Corrupt)?;
        if head.connection != self.connection {
            return Err(RequestFailure::WrongClient);
        }
        if head.sequence == 0 || head.sequence > self.sequence || datagram.len() != self.size {
            return Err(RequestFailure::Corrupt);
        }
        let position = content_position(self.connection, head.sequence) + HEAD_BYTES as u64;
        if !content.matches(position, &datagram[HEAD_BYTES..]) {
            return Err(RequestFailure::Corrupt);
        }
        Ok(head)
    }

    fn place(&self, sequence: u64) -> usize {
        (sequence % self.slots.len() as u64) as usize
    }
}

/// Endless content, one way or both.
#[derive(Debug)]
pub struct Stream {
    kind: Kind,
    connection: u32,
    /// Content bytes, without heads.
    sent: u64,
    received: u64,
    got_head: usize,
    head: [u8; HEAD_BYTES],
    /// The client has finished sending.
    finished: bool,
}

impl Stream {
    pub fn new(connection: u32, kind: Kind) -> Stream {
        Stream {
            kind,
            connection,
            sent: 0,
            received: 0,
            got_head: 0,
            head: [0; HEAD_BYTES],
            finished: false,
        }
    }

    /// The same for a new connection, from the start.
    pub fn anew(self) -> Stream {
        Stream::new(self.connection, self.kind)
    }

    /// The head that opens the stream.
    pub fn opening(&self) -> Head {
        Head { kind: self.kind, connection: self.connection, backend: 0, sequence: 0 }
    }

    /// Whether content goes to the backend, and whether it comes from there.
    pub fn sends(&self) -> bool {
        self.kind != Kind::Source
    }

    pub fn receives(&self) -> bool {
        self.kind != Kind::Sink
    }

    /// The kernel has taken `bytes` of content.
    pub fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// No more content will be sent.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// Which backend is at the other end, once it has said so.
    pub fn backend(&self) -> u32 {
        if self.got_head < HEAD_BYTES {
            return 0;
        }
        Head::decode(&self.head).map_or(0, |head| head.backend)
    }

    /// Takes received bytes; returns how many of them were content.
    pub fn received(&mut self, content: &Content, bytes: &[u8]) -> Result<usize, RequestFailure> {
        let mut rest = bytes;
        if self.got_head < HEAD_BYTES {
            let part = rest.len().min(HEAD_BYTES - self.got_head);
            self.head[self.got_head..self.got_head + part].copy_from_slice(&rest[..part]);
            self.got_head += part;
            rest = &rest[part..];
            if self.got_head == HEAD_BYTES {
                self.check_head()?;
            }
        }
        if rest.is_empty() {
            return Ok(0);
        }
        if !self.receives() || !content.matches(self.received, rest) {
            return Err(RequestFailure::Corrupt);
        }
        self.received += rest.len() as u64;
        Ok(rest.len())
    }

    /// The other side has ended its stream. Checks that everything had arrived.
    pub fn ended(&self) -> Result<(), RequestFailure> {
        if !self.finished {
            return Err(RequestFailure::Closed);
        }
        let arrived = match self.kind {
            Kind::Source => return Ok(()),
            Kind::Echo => self.received,
            Kind::Sink => Head::decode(&self.head).map_or(0, |head| head.sequence),
        };
        if self.got_head < HEAD_BYTES || arrived != self.sent {
            return Err(RequestFailure::Lost);
        }
        Ok(())
    }

    fn check_head(&self) -> Result<(), RequestFailure> {
        let Some(head) = Head::decode(&self.head) else { return Err(RequestFailure::Corrupt) };
        if head.connection != self.connection {
            return Err(RequestFailure::WrongClient);
        }
        if head.kind != self.kind {
            return Err(RequestFailure::Corrupt);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(nanos: u64) -> Now {
        Now::from_nanos(nanos)
    }

    fn whole(content: &Content, head: Head, size: usize) -> Vec<u8> {
        let mut bytes = head.encode().to_vec();
        let position = content_position(head.connection, head.sequence) + HEAD_BYTES as u64;
        bytes.extend_from_slice(content.from(position, size - HEAD_BYTES));
        bytes
    }

    #[test]
    fn a_reply_is_taken_in_any_pieces() {
        let content = Content::new();
        for piece in [1, 7, 23, 24, 25, 99, 100] {
            let mut exchange = Exchange::new(5, 100);
            let mut head = exchange.request();
            head.backend = 9;
            let reply = whole(&content, head, 100);
            let verdicts: Vec<_> =
                reply.chunks(piece).map(|part| exchange.received(&content, part)).collect();
            let (last, before) = verdicts.split_last().unwrap();
            assert_eq!(*last, Ok(Some(9)), "pieces of {piece}");
            assert!(before.iter().all(|verdict| *verdict == Ok(None)));
            assert!(!exchange.waiting());
        }
    }

    #[test]
    fn a_stream_reply_that_is_not_ours_is_named() {
        let content = Content::new();
        let head =
            |connection, sequence| Head { kind: Kind::Echo, connection, backend: 0, sequence };
        let mut flipped = whole(&content, head(5, 2), 64);
        flipped[63] ^= 1;
        let cases = [
            (whole(&content, head(6, 2), 64), RequestFailure::WrongClient),
            (whole(&content, head(5, 1), 64), RequestFailure::Duplicated),
            (whole(&content, head(5, 3), 64), RequestFailure::Corrupt),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), RequestFailure::Corrupt),
            (flipped, RequestFailure::Corrupt),
            (
                [whole(&content, head(5, 2), 64), whole(&content, head(5, 2), 64)].concat(),
                RequestFailure::Duplicated,
            ),
        ];
        for (bytes, fault) in cases {
            let mut exchange = Exchange::new(5, 64);
            let first = exchange.request();
            assert_eq!(exchange.received(&content, &whole(&content, first, 64)), Ok(Some(0)));
            exchange.request();
            assert_eq!(exchange.received(&content, &bytes), Err(fault));
        }
    }

    #[test]
    fn bytes_that_nobody_asked_for_are_a_fault() {
        let content = Content::new();
        let mut exchange = Exchange::new(5, 64);
        assert_eq!(exchange.received(&content, b"220 welcome"), Err(RequestFailure::Corrupt));
    }

    #[test]
    fn a_flow_keeps_to_its_window() {
        let content = Content::new();
        let mut flow = Flow::new(1, 64, 2);
        let first = flow.request(at(10), at(10)).unwrap();
        assert!(flow.request(at(11), at(11)).is_some());
        assert_eq!(flow.request(at(12), at(12)), None);
        let (reply, fault) = flow.received(&content, &whole(&content, first, 64));
        assert_eq!(reply, Some(Completed { backend: 0, since: Now::from_nanos(10) }));
        assert_eq!(fault, None);
        assert!(flow.request(at(13), at(13)).is_some());
    }

    #[test]
    fn a_datagram_that_overtakes_is_counted_and_both_are_replies() {
        let content = Content::new();
        let mut flow = Flow::new(1, 64, 2);
        let first = flow.request(at(0), at(0)).unwrap();
        let second = flow.request(at(0), at(0)).unwrap();
        let (reply, fault) = flow.received(&content, &whole(&content, second, 64));
        assert!(reply.is_some() && fault.is_none());
        let (reply, fault) = flow.received(&content, &whole(&content, first, 64));
        assert!(reply.is_some());
        assert_eq!(fault, Some(RequestFailure::Reordered));
        assert_eq!(flow.unanswered(), 0);
    }

    #[test]
    fn datagrams_that_should_not_have_come_are_named() {
        let content = Content::new();
        let mut flow = Flow::new(1, 64, 1);
        let first = flow.request(at(0), at(0)).unwrap();
        let reply = whole(&content, first, 64);
        assert!(flow.received(&content, &reply).0.is_some());
        assert_eq!(flow.received(&content, &reply), (None, Some(RequestFailure::Duplicated)));
        let other = Head { connection: 2, ..first };
        let never = Head { sequence: 9, ..first };
        for (datagram, fault) in [
            (whole(&content, other, 64), RequestFailure::WrongClient),
            (whole(&content, never, 64), RequestFailure::Corrupt),
            (whole(&content, first, 63), RequestFailure::Corrupt),
            (Vec::new(), RequestFailure::Corrupt),
        ] {
            assert_eq!(flow.received(&content, &datagram), (None, Some(fault)));
        }
    }

    #[test]
    fn what_does_not_come_back_is_lost_and_then_late() {
        let content = Content::new();
        let mut flow = Flow::new(1, 64, 1);
        let first = flow.request(at(0), at(0)).unwrap();
        let patience = Duration::from_secs(1);
        assert_eq!(flow.expire(Now::from_nanos(1_000_000_000), patience), 0);
        assert_eq!(flow.expire(Now::from_nanos(1_000_000_001), patience), 1);
        assert!(flow.request(at(0), at(0)).is_some());
        let reply = whole(&content, first, 64);
        assert_eq!(flow.received(&content, &reply), (None, Some(RequestFailure::Late)));
    }

    fn echoed(content: &Content, stream: &Stream, count: usize) -> Vec<u8> {
        let mut bytes = stream.opening().encode().to_vec();
        bytes.extend_from_slice(content.from(0, count));
        bytes
    }

    #[test]
    fn a_stream_is_whole_when_all_of_it_came_back() {
        let content = Content::new();
        for (missing, verdict) in [(0, Ok(())), (1, Err(RequestFailure::Lost))] {
            let mut stream = Stream::new(3, Kind::Echo);
            let bytes = echoed(&content, &stream, 5_000 - missing);
            for part in bytes.chunks(777) {
                assert!(stream.received(&content, part).is_ok());
            }
            stream.sent(5_000);
            assert_eq!(stream.ended(), Err(RequestFailure::Closed), "before we finished");
            stream.finish();
            assert_eq!(stream.ended(), verdict);
        }
    }

    #[test]
    fn a_sink_says_how_much_arrived() {
        let content = Content::new();
        for (arrived, verdict) in [(5_000, Ok(())), (4_999, Err(RequestFailure::Lost))] {
            let mut stream = Stream::new(3, Kind::Sink);
            stream.sent(5_000);
            stream.finish();
            let count = Head { sequence: arrived, ..stream.opening() };
            assert_eq!(stream.received(&content, &count.encode()), Ok(0));
            assert_eq!(stream.ended(), verdict);
        }
    }

    #[test]
    fn a_stream_notices_a_gap_and_another_ones_head() {
        let content = Content::new();
        let mut stream = Stream::new(3, Kind::Source);
        let mut bytes = echoed(&content, &stream, 4_000);
        bytes.drain(1_000..1_001);
        assert_eq!(stream.received(&content, &bytes), Err(RequestFailure::Corrupt));
        let mut stream = Stream::new(3, Kind::Source);
        let other = Head { connection: 4, ..stream.opening() };
        assert_eq!(stream.received(&content, &other.encode()), Err(RequestFailure::WrongClient));
    }
}
