//! One connection as the kernel works for it: the receive that is armed on it and the send that is in
//! flight. Owns when to arm, pause and cancel; for protocols whose two connections are not the two
//! ends of one relay for life. Reads no byte.

use super::pace::Pace;
use super::room::{Question, Room};
use super::tcp::{Features, Receive, Sink, Source};
use super::{Cmd, Event, Received, Side};
use crate::ring::pool::{Chain, GATHER_MAX, Pool};

#[derive(Debug)]
pub struct Line {
    pub(super) source: Source,
    pub(super) receive: Receive,
    pub(super) pace: Pace,
    pub(super) sending: Chain,
    /// The last send stopped short, and its rest has not gone out yet; see `tcp` on why that makes an
    /// end doubtful.
    pub(super) short: bool,
    /// The armed receive has taken data, and may sleep through an end that came with it; see
    /// `Relay::is_unsure`.
    pub(super) unsure: bool,
    pub(super) sink: Sink,
    pub(super) room: Room,
}

impl Line {
    /// A connection on which nothing is in flight.
    pub const fn new() -> Line {
        Line {
            source: Source::Open,
            receive: Receive::Idle,
            pace: Pace::new(),
            sending: Chain::EMPTY,
            short: false,
            unsure: false,
            sink: Sink::Open,
            room: Room::UNKNOWN,
        }
    }

    /// Takes note of what a receive gave. Its bytes are the caller's.
    pub fn received(&mut self, what: &Received, more: bool, nonempty: bool) {
        if !more {
            self.receive = Receive::Idle;
        }
        self.unsure = more && matches!(what, Received::Data(_));
        self.pace.nonempty = nonempty;
        match what {
            Received::Data(buf) => self.pace.note(buf.len()),
            // After a reset was seen while sending, the stream reads as merely ended.
            Received::End if self.short || self.sink == Sink::Gone => self.source = Source::Failed,
            Received::End => self.source = Source::Ended,
            Received::Failed(_) => (self.source, self.sink) = (Source::Failed, Sink::Gone),
            Received::NoBuffers => self.receive = Receive::Starved,
            Received::Stopped => {}
        }
    }

    /// Asks for more when there is room, `bytes_max` in many small blocks at most, or for less when
    /// there is none.
    pub fn ask(
        &mut self,
        side: Side,
        room: bool,
        bytes_max: u32,
        pool: &Pool,
        features: Features,
        out: &mut impl FnMut(Cmd),
    ) {
        match self.receive {
            Receive::Idle if room && self.source == Source::Open => {
                self.receive = Receive::Armed;
                out(Cmd::Receive { side, how: self.pace.intake(pool, features, bytes_max) });
            }
            Receive::Armed if !room => self.cancel_receive(side, out),
            _ => {}
        }
    }

    /// Whether a flow from here that holds so many blocks may hold another.
    pub fn has_room(&self, held: usize, pool: &Pool) -> bool {
        held < self.pace.held_max(pool)
    }

    /// Whether the next receive takes a block so scarce that whoever gets the bytes must be seen to take
    /// more before: [`Line::sees_room`] of the connection that they go to.
    pub fn is_sparing(&self, pool: &Pool) -> bool {
        self.receive == Receive::Idle && self.pace.is_sparing(pool)
    }

    /// Whether the connection is known to take more; if not, asks for word of it.
    pub fn sees_room(&mut self, side: Side, out: &mut impl FnMut(Cmd)) -> bool {
        let question = if self.sink == Sink::Open { self.room.ask() } else { None };
        if let Some(Question { first }) = question {
            out(Cmd::AwaitRoom { side, first });
        }
        self.room.is_seen()
    }

    /// Whether word is awaited that it takes more.
    pub fn awaits_room(&self) -> bool {
        self.room.is_asked()
    }

    /// That word has come.
    pub fn room_answered(&mut self) {
        self.room.answered();
    }

    /// Starts to send what waits, unless a send is in flight.
    pub fn send(
        &mut self,
        side: Side,
        waiting: &mut Chain,
        pool: &mut Pool,
        out: &mut impl FnMut(Cmd),
    ) {
        if self.sink == Sink::Open && self.sending.is_empty() && !waiting.is_empty() {
            self.sending = pool.split(waiting, GATHER_MAX);
            self.room.used();
            out(Cmd::Send { side, what: self.sending.outgoing() });
        }
    }

    /// A send is over: so many bytes went out. What is left of it goes before what waits.
    pub fn sent(&mut self, bytes: usize, waiting: &mut Chain, pool: &mut Pool) {
        pool.advance(&mut self.sending, bytes);
        self.short = !self.sending.is_empty();
        if self.short {
            let mut rest = self.sending.take();
            while let Some(buf) = pool.pop(waiting) {
                pool.push(&mut rest, buf);
            }
            *waiting = rest;
        }
    }

    /// A send failed: nothing more can be. Gives what was not sent.
    pub fn send_failed(&mut self) -> Chain {
        self.sink = Sink::Gone;
        self.sending.take()
    }

    /// Takes a chain back whose send is over.
    pub fn take_sent(&mut self) -> Chain {
        self.sending.take()
    }

    /// Whether the peer finished sending by itself.
    pub fn ended_properly(&self) -> bool {
        self.source == Source::Ended
    }

    /// Whether the peer may still send.
    pub fn is_open(&self) -> bool {
        self.source == Source::Open
    }

    /// Whether the peer may still be sent to.
    pub fn takes(&self) -> bool {
        self.sink == Sink::Open
    }

    /// Blocks that are with the kernel for sending.
    pub fn sending(&self) -> &Chain {
        &self.sending
    }

    /// Whether a receive is armed, so that the end of the connection will be noticed.
    pub fn is_watched(&self) -> bool {
        self.receive == Receive::Armed
    }

    /// Whether the peer may have ended without the armed receive noticing.
    pub fn is_unsure(&self) -> bool {
        self.unsure && self.is_watched()
    }

    /// Begins such a receive anew, which then finds the end; [`Line::ask`] must follow its completion.
    pub fn look_again(&mut self, side: Side, out: &mut impl FnMut(Cmd)) {
        if self.is_unsure() {
            self.unsure = false;
            self.cancel_receive(side, out);
        }
    }

    pub fn is_starved(&self) -> bool {
        self.receive == Receive::Starved
    }

    /// Blocks have come back: may try again.
    pub fn feed(&mut self) {
        if self.is_starved() {
            self.receive = Receive::Idle;
        }
    }

    /// Asks for the end of everything in flight; the completions still come, to [`Line::settle`].
    pub fn stop(&mut self, side: Side, out: &mut impl FnMut(Cmd)) {
        self.cancel_receive(side, out);
        if self.room.cancel() {
            out(Cmd::CancelRoom { side });
        }
        if !self.sending.is_empty() {
            out(Cmd::CancelSend { side });
        }
    }

    /// Takes note of a completion after [`Line::stop`], and wants nothing more.
    pub fn settle(&mut self, event: Event, pool: &mut Pool) {
        match event {
            Event::Received { what, more, nonempty, .. } => {
                self.received(&what, more, nonempty);
                if let Received::Data(buf) = what {
                    pool.give_back(buf);
                }
            }
            Event::Sent { .. } => pool.give_back_chain(self.sending.take()),
            Event::Room { .. } => self.room.answered(),
            Event::Spliced { .. } => debug_assert!(false, "a line is never spliced"),
        }
    }

    /// Whether the kernel still works for this connection.
    pub fn in_flight(&self) -> bool {
        !self.sending.is_empty()
            || self.room.is_pending()
            || matches!(self.receive, Receive::Armed | Receive::Cancelling)
    }

    fn cancel_receive(&mut self, side: Side, out: &mut impl FnMut(Cmd)) {
        if self.receive == Receive::Armed {
            self.receive = Receive::Cancelling;
            out(Cmd::CancelReceive { side });
        }
    }
}

impl Default for Line {
    fn default() -> Line {
        Line::new()
    }
}

#[cfg(test)]
mod tests {
    use super::super::pace::MANY_BYTES_MAX;
    use super::*;
    use crate::ring::pool::{Buf, Class};

    fn block(pool: &mut Pool, text: &[u8]) -> Buf {
        let mut buf = pool.take(Class::Small).unwrap();
        assert_eq!(pool.append(&mut buf, text), text.len());
        buf
    }

    /// A line with six bytes on their way.
    fn sending(pool: &mut Pool) -> (Line, Chain) {
        let (mut line, mut waiting) = (Line::new(), Chain::EMPTY);
        let buf = block(pool, b"abcdef");
        pool.push(&mut waiting, buf);
        line.send(Side::Backend, &mut waiting, pool, &mut |_| {});
        assert!(waiting.is_empty() && line.in_flight());
        (line, waiting)
    }

    #[test]
    fn what_a_send_left_goes_out_before_what_came_later() {
        let mut pool = Pool::new(4, 0);
        let (mut line, mut waiting) = sending(&mut pool);
        let later = block(&mut pool, b"ghi");
        pool.push(&mut waiting, later);
        line.sent(4, &mut waiting, &mut pool);
        let text: Vec<u8> = pool.pieces(waiting.outgoing()).flatten().copied().collect();
        assert_eq!(text, b"efghi");
        pool.give_back_chain(waiting);
    }

    #[test]
    fn an_end_behind_a_send_that_stopped_short_is_a_reset() {
        for (taken, proper) in [(6, true), (4, false)] {
            let mut pool = Pool::new(4, 0);
            let (mut line, mut waiting) = sending(&mut pool);
            line.sent(taken, &mut waiting, &mut pool);
            line.received(&Received::End, false, false);
            assert_eq!(line.ended_properly(), proper, "{taken} of six bytes");
            pool.give_back_chain(waiting);
        }
    }

    #[test]
    fn a_connection_is_asked_once_and_no_more_when_there_is_no_room() {
        let features = Features { receive_cap: true, splice: false };
        let pool = Pool::new(64, 0);
        let mut line = Line::new();
        let mut wanted = Vec::new();
        for room in [true, true, false, false, true] {
            line.ask(Side::Client, room, MANY_BYTES_MAX, &pool, features, &mut |what| {
                wanted.push(what)
            });
        }
        assert_eq!(wanted.len(), 2, "{wanted:?}");
        assert!(matches!(wanted[1], Cmd::CancelReceive { side: Side::Client }));
        line.received(&Received::Stopped, false, false);
        assert!(!line.in_flight() && !line.is_watched());
    }

    #[test]
    fn a_connection_is_asked_for_room_once_and_lets_go_of_the_question_when_it_stops() {
        let mut pool = Pool::new(4, 0);
        let mut line = Line::new();
        let held: Vec<Buf> = (0..2).map(|_| block(&mut pool, b"x")).collect();
        assert!(line.is_sparing(&pool));
        let mut wanted = Vec::new();
        for _ in 0..2 {
            assert!(!line.sees_room(Side::Client, &mut |what| wanted.push(what)));
        }
        line.room_answered();
        assert!(line.sees_room(Side::Client, &mut |what| wanted.push(what)));
        assert_eq!(wanted, [Cmd::AwaitRoom { side: Side::Client, first: true }]);
        let mut waiting = Chain::EMPTY;
        let buf = block(&mut pool, b"y");
        pool.push(&mut waiting, buf);
        line.send(Side::Client, &mut waiting, &mut pool, &mut |_| {});
        line.sent(1, &mut waiting, &mut pool);
        assert!(!line.sees_room(Side::Client, &mut |_| {}), "something was sent since");
        wanted.clear();
        (0..2).for_each(|_| line.stop(Side::Client, &mut |what| wanted.push(what)));
        assert_eq!(wanted, [Cmd::CancelRoom { side: Side::Client }]);
        assert!(line.in_flight());
        line.settle(Event::Room { side: Side::Client }, &mut pool);
        assert!(!line.in_flight());
        held.into_iter().for_each(|buf| pool.give_back(buf));
        assert!(!line.is_sparing(&pool));
    }

    #[test]
    fn a_receive_that_took_data_is_begun_anew_once() {
        let features = Features { receive_cap: true, splice: false };
        let mut pool = Pool::new(64, 0);
        let mut line = Line::new();
        line.ask(Side::Backend, true, MANY_BYTES_MAX, &pool, features, &mut |_| {});
        assert!(!line.is_unsure(), "it has taken nothing");
        let buf = block(&mut pool, b"abc");
        let what = Received::Data(buf);
        line.received(&what, true, false);
        let mut wanted = Vec::new();
        for _ in 0..2 {
            line.look_again(Side::Backend, &mut |what| wanted.push(what));
        }
        assert_eq!(wanted, [Cmd::CancelReceive { side: Side::Backend }]);
        line.received(&Received::Stopped, false, false);
        line.ask(Side::Backend, true, MANY_BYTES_MAX, &pool, features, &mut |_| {});
        assert!(line.is_watched() && !line.is_unsure());
        if let Received::Data(buf) = what {
            pool.give_back(buf);
        }
    }
}
