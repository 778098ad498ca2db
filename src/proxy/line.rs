//! One connection as the kernel works on it: the receive or splice step under way, and the send.
//! Owns all that is known about a connection, whichever protocol uses it, and when to arm, pause
//! and cancel; the bytes belong to the connection's user, and it reads none of them.
//!
//! ```text
//!   source: Open --End--> Ended          receive: Idle <-> Armed, Splicing -> Cancelling -> Idle
//!             \--error--> Failed                     \---> Starved (until blocks return)
//!   sink:   Open --finished--> Finished (FIN sent)
//!            ^ \--error--> Gone
//!            +----> Full (until there is room)
//! ```
//!
//! A send under way when its peer resets the connection stops short without an error, and the
//! receive beside it then finds a plain end: the kernel reports the error once, and a send that
//! made progress swallows it. So after a short send, an end is believed only when the rest has gone
//! out. A splice step looks at the socket at once and may come before such a send completes, so an
//! end it finds is believed only when the send is over.

use super::pace::Pace;
use super::room::{Question, Room};
use super::{Event, Received, Side, Splice, Spliced, StreamCmd};
use crate::estate::tcp::LineBits;
use crate::ring::pool::{Chain, GATHER_MAX, Pool};

/// Which of the kernel's newer features may be used.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// A multishot receive can be given a total.
    pub receive_cap: bool,
    /// A receive through the ring waits even on a non-blocking socket; splicing makes both sockets
    /// non-blocking.
    pub splice: bool,
}

#[derive(Debug)]
pub struct Line {
    source: Source,
    receive: Receive,
    pace: Pace,
    sending: Chain,
    /// The last send stopped short, or may have, and the rest has not gone out yet.
    short: bool,
    /// The armed receive has taken data, and may sleep through an end that came with it.
    unsure: bool,
    sink: Sink,
    room: Room,
}

/// What we know about the peer's sending.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Open,
    Ended,
    Failed,
}

/// What we know about sending to the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sink {
    Open,
    /// As open, but nothing is sent before the kernel says that there is room.
    Full,
    Finished,
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Receive {
    Idle,
    Armed,
    Splicing,
    Cancelling,
    Starved,
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

    /// What is known about a connection with no send under way, for whoever takes it up.
    pub fn describe(&self) -> u8 {
        debug_assert!(self.sending.is_empty(), "what is in a send cannot be described");
        let source = match self.source {
            Source::Open => 0,
            Source::Ended => LineBits::ENDED,
            Source::Failed => LineBits::FAILED,
        };
        let sink = match self.sink {
            Sink::Open | Sink::Full => 0,
            Sink::Finished => LineBits::FINISHED,
            Sink::Gone => LineBits::GONE,
        };
        source | sink | if self.short { LineBits::SHORT } else { 0 }
    }

    /// A connection that another has described, on which nothing is in flight here. `spliced`: what comes from
    /// it next goes through a pipe.
    ///
    /// # Errors
    /// What is wrong with the description.
    pub fn taken_up(bits: u8, spliced: bool) -> Result<Line, String> {
        let source = match bits & (LineBits::ENDED | LineBits::FAILED) {
            0 => Source::Open,
            LineBits::ENDED => Source::Ended,
            LineBits::FAILED => Source::Failed,
            _ => return Err("a connection has ended and failed".into()),
        };
        let sink = match bits & (LineBits::FINISHED | LineBits::GONE) {
            0 => Sink::Open,
            LineBits::FINISHED => Sink::Finished,
            LineBits::GONE => Sink::Gone,
            _ => return Err("a connection was finished and is gone".into()),
        };
        if bits & !LineBits::ALL != 0 {
            return Err("a connection has unknown flags".into());
        }
        let pace = if spliced { Pace::SPLICED } else { Pace::new() };
        Ok(Line { source, sink, pace, short: bits & LineBits::SHORT != 0, ..Line::new() })
    }

    /// A receive was armed before the connection was taken up, and is cancelled if it is not wanted.
    pub fn armed_before(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        let is_wanted = self.is_open() && !self.is_spliced();
        self.receive = Receive::Armed;
        if !is_wanted {
            self.cancel_receive(side, out);
        }
    }

    /// Records the result of a receive. Its bytes are the caller's.
    pub fn received(&mut self, what: &Received, more: bool, nonempty: bool) {
        self.receive_over(matches!(what, Received::Data(_)), more, nonempty);
        match what {
            Received::Data(buf) => self.pace.note(buf.len()),
            Received::End => self.ended(),
            Received::Failed(_) => self.failed(),
            Received::NoBuffers => self.receive = Receive::Starved,
            Received::Stopped => {}
        }
    }

    /// Records a splice step from this connection.
    pub fn spliced(&mut self, moved: u64, how: Spliced) {
        self.receive = Receive::Idle;
        self.pace.note_splice(moved, how);
        match how {
            Spliced::Step(Splice::Ended) => {
                self.short |= !self.sending.is_empty();
                self.ended();
            }
            Spliced::Step(Splice::SourceFailed(_)) => self.failed(),
            _ => {}
        }
    }

    /// Records a splice step to this connection that left `held` bytes in the pipe.
    pub fn spliced_to(&mut self, held: usize, how: Spliced) {
        // A step that ended before the pipe was empty may have swallowed an error. One that found
        // the sink full asked it last, and was told of none.
        self.short = held > 0 && how == Spliced::Step(Splice::Moved);
    }

    /// Arms a receive if there is room (in many small blocks, `bytes_max` at most), and cancels it
    /// if there is none.
    pub fn ask(
        &mut self,
        side: Side,
        room: bool,
        bytes_max: u32,
        pool: &Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
    ) {
        match self.receive {
            Receive::Idle if room && self.source == Source::Open => {
                self.receive = Receive::Armed;
                let capped = features.receive_cap;
                out(StreamCmd::Receive { side, how: self.pace.intake(pool, capped, bytes_max) });
            }
            Receive::Armed if !room => self.cancel_receive(side, out),
            _ => {}
        }
    }

    /// Whether the next bytes from this connection go through a pipe.
    pub fn is_spliced(&self) -> bool {
        self.pace.splice.is_some()
    }

    /// Takes the next splice step, unless a receive or a step is under way. What was received into
    /// blocks must have gone out first.
    pub fn splice(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        if let Some(when) = self.pace.splice
            && self.is_idle()
        {
            self.receive = Receive::Splicing;
            out(StreamCmd::Splice { side, when });
        }
    }

    /// Whether a flow from this connection that holds `held` blocks may hold another.
    pub fn has_room(&self, held: usize, pool: &Pool) -> bool {
        held < self.pace.held_max(pool)
    }

    /// Whether the next receive takes a block so scarce that its recipient must first be seen to
    /// take more: [`Line::sees_room`] of the connection that the bytes go to.
    pub fn is_sparing(&self, pool: &Pool) -> bool {
        self.receive == Receive::Idle && self.pace.is_sparing(pool)
    }

    /// Whether the connection is known to take more; if not, asks the kernel to say when it does.
    pub fn sees_room(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) -> bool {
        let question = if self.sink == Sink::Open { self.room.ask() } else { None };
        if let Some(Question { first }) = question {
            out(StreamCmd::AwaitRoom { side, first });
        }
        self.room.is_seen()
    }

    /// Whether that answer is awaited.
    pub fn awaits_room(&self) -> bool {
        self.room.is_asked()
    }

    /// That answer has come.
    pub fn room_answered(&mut self) {
        self.room.answered();
        if self.sink == Sink::Full {
            self.sink = Sink::Open;
        }
    }

    /// Starts sending what waits, unless a send is in flight.
    pub fn send(
        &mut self,
        side: Side,
        waiting: &mut Chain,
        pool: &mut Pool,
        out: &mut impl FnMut(StreamCmd),
    ) {
        if self.sink == Sink::Open && self.sending.is_empty() && !waiting.is_empty() {
            self.sending = pool.split(waiting, GATHER_MAX);
            self.room.used();
            out(StreamCmd::Send { side, what: self.sending.outgoing() });
        }
    }

    /// A send is over, and `bytes` went out. The rest of it goes back to the front of `waiting`.
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

    /// A send took nothing, and was not waited for. On a socket that is not to block, which splicing makes it, the
    /// kernel waits for a gathered send only so often, and then hands it to a thread that does not wait (Linux 6.18);
    /// it need not even be full, as for a peer who has sent urgent data. So the next one begins when there is room.
    #[cold]
    pub fn not_waited_for(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        if self.sink != Sink::Open || self.room.is_seen() {
            return;
        }
        self.sink = Sink::Full;
        if let Some(Question { first }) = self.room.ask() {
            out(StreamCmd::AwaitRoom { side, first });
        }
    }

    /// A send failed, and no other can succeed. Returns what was not sent.
    pub fn send_failed(&mut self) -> Chain {
        self.sink = Sink::Gone;
        if self.source == Source::Ended {
            self.source = Source::Failed;
        }
        self.sending.take()
    }

    /// Takes back the chain of a send that is over and left nothing.
    pub fn take_sent(&mut self) -> Chain {
        self.short = false;
        self.sending.take()
    }

    /// Tells the peer that no more will come. Nothing may be left to send.
    pub fn finish(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        self.sink = Sink::Finished;
        out(StreamCmd::FinishWriting { side });
    }

    /// Whether the peer finished sending of its own accord.
    pub fn ended_properly(&self) -> bool {
        self.source == Source::Ended && !self.short
    }

    /// Whether the connection was reset.
    pub fn has_failed(&self) -> bool {
        self.source == Source::Failed
    }

    /// Whether the peer may still send.
    pub fn is_open(&self) -> bool {
        self.source == Source::Open
    }

    /// Whether the peer may still be sent to.
    pub fn takes(&self) -> bool {
        matches!(self.sink, Sink::Open | Sink::Full)
    }

    /// Whether the peer was told that no more will come.
    pub fn has_finished(&self) -> bool {
        self.sink == Sink::Finished
    }

    /// Whether nothing can be sent to the peer any more, although we have not finished.
    pub fn is_gone(&self) -> bool {
        self.sink == Sink::Gone
    }

    /// The blocks that the kernel holds for sending.
    pub fn sending(&self) -> &Chain {
        &self.sending
    }

    /// Whether a receive is armed, so that the end of the connection will be noticed.
    pub fn is_watched(&self) -> bool {
        self.receive == Receive::Armed
    }

    /// Whether the peer may still send and nothing under way would notice.
    pub fn is_idle(&self) -> bool {
        self.source == Source::Open && self.receive == Receive::Idle
    }

    /// Whether the peer may have ended without the armed receive noticing. A multishot receive that
    /// finds data takes it; if the end arrives at that moment, the kernel loses the second of the
    /// two wake-ups and the receive waits for ever (Linux 6.18).
    pub fn is_unsure(&self) -> bool {
        self.unsure && self.is_watched()
    }

    /// Restarts such a receive, which then finds the end; [`Line::ask`] must follow its completion.
    pub fn look_again(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        if self.is_unsure() {
            self.cancel_receive(side, out);
        }
    }

    /// Restarts an armed receive, which may not have noticed that a send failed.
    pub fn receive_anew(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        if self.is_watched() {
            self.cancel_receive(side, out);
        }
    }

    pub fn is_starved(&self) -> bool {
        self.receive == Receive::Starved
    }

    /// Blocks have returned: a starved receive may try again.
    pub fn feed(&mut self) {
        if self.is_starved() {
            self.receive = Receive::Idle;
        }
    }

    /// Cancels everything in flight; the completions still come, and go to [`Line::settle`].
    pub fn stop(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        self.cancel_receive(side, out);
        if self.room.cancel() {
            out(StreamCmd::CancelRoom { side });
        }
        if !self.sending.is_empty() {
            out(StreamCmd::CancelSend { side });
        }
    }

    /// Records a completion after [`Line::stop`]; nothing more is wanted.
    pub fn settle(&mut self, event: Event, pool: &mut Pool) {
        match event {
            Event::Received { what, more, nonempty, .. } => {
                self.receive_over(matches!(what, Received::Data(_)), more, nonempty);
                match what {
                    Received::Data(buf) => pool.give_back(buf),
                    Received::End => self.ended(),
                    Received::Failed(_) => self.failed(),
                    Received::NoBuffers => self.receive = Receive::Starved,
                    Received::Stopped => {}
                }
            }
            Event::Sent { .. } => pool.give_back_chain(self.sending.take()),
            Event::Room { .. } => self.room.answered(),
            Event::Spliced { how, .. } => {
                self.receive = Receive::Idle;
                if let Spliced::Step(Splice::SourceFailed(_)) = how {
                    self.failed();
                }
            }
        }
    }

    /// Whether the kernel still works on this connection.
    pub fn in_flight(&self) -> bool {
        !self.sending.is_empty()
            || self.room.is_pending()
            || matches!(self.receive, Receive::Armed | Receive::Splicing | Receive::Cancelling)
    }

    /// Cancels the receive or splice step under way; its completion still comes.
    pub fn cancel_receive(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        match self.receive {
            Receive::Armed => out(StreamCmd::CancelReceive { side }),
            Receive::Splicing => out(StreamCmd::CancelSplice { side }),
            Receive::Idle | Receive::Cancelling | Receive::Starved => return,
        }
        self.receive = Receive::Cancelling;
    }

    fn receive_over(&mut self, data: bool, more: bool, nonempty: bool) {
        if !more {
            self.receive = Receive::Idle;
        }
        self.unsure = more && data;
        self.pace.nonempty = nonempty;
    }

    fn ended(&mut self) {
        // After a reset that a send reported, the stream reads as merely ended.
        self.source = if self.is_gone() { Source::Failed } else { Source::Ended };
    }

    fn failed(&mut self) {
        self.source = Source::Failed;
        if self.takes() {
            self.sink = Sink::Gone;
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
    use crate::proxy::When;
    use crate::ring::pool::{Buf, Class};

    impl Line {
        /// Behaves as if long receives had shown that a pipe is worthwhile.
        pub(in crate::proxy) fn be_stream(&mut self) {
            self.pace.splice = Some(When::NextTurn);
        }
    }

    fn block(pool: &mut Pool, text: &[u8]) -> Buf {
        let mut buf = pool.take(Class::Small).unwrap();
        assert_eq!(pool.append(&mut buf, text), text.len());
        buf
    }

    /// A line with six bytes in a send.
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
    fn a_rest_that_has_gone_out_leaves_no_doubt_though_its_blocks_are_kept() {
        let mut pool = Pool::new(4, 0);
        let (mut line, mut waiting) = sending(&mut pool);
        line.sent(4, &mut waiting, &mut pool);
        line.send(Side::Backend, &mut waiting, &mut pool, &mut |_| {});
        pool.give_back_chain(line.take_sent());
        line.received(&Received::End, false, false);
        assert!(line.ended_properly());
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
        assert!(matches!(wanted[1], StreamCmd::CancelReceive { side: Side::Client }));
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
        assert_eq!(wanted, [StreamCmd::AwaitRoom { side: Side::Client, first: true }]);
        let mut waiting = Chain::EMPTY;
        let buf = block(&mut pool, b"y");
        pool.push(&mut waiting, buf);
        line.send(Side::Client, &mut waiting, &mut pool, &mut |_| {});
        line.sent(1, &mut waiting, &mut pool);
        assert!(!line.sees_room(Side::Client, &mut |_| {}), "something was sent since");
        wanted.clear();
        (0..2).for_each(|_| line.stop(Side::Client, &mut |what| wanted.push(what)));
        assert_eq!(wanted, [StreamCmd::CancelRoom { side: Side::Client }]);
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
        assert_eq!(wanted, [StreamCmd::CancelReceive { side: Side::Backend }]);
        line.received(&Received::Stopped, false, false);
        line.ask(Side::Backend, true, MANY_BYTES_MAX, &pool, features, &mut |_| {});
        assert!(line.is_watched() && !line.is_unsure());
        if let Received::Data(buf) = what {
            pool.give_back(buf);
        }
    }
}
