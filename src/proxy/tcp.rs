//! One TCP relay: two flows of bytes in opposite directions, each from one side's socket to the
//! other's. Owns when to read, when to write, and when it is over; picks no backend, knows no timer.
//!
//! A flow's blocks are `waiting` (received) or `sending` (with the kernel). Not asking for more while
//! too many are held is the backpressure: the sender's window closes and nothing is lost.
//!
//! ```text
//!   source: Open --End--> Ended          receive: Idle <-> Armed -> Cancelling -> Idle
//!             \--error--> Failed                     \---> Starved (until blocks return)
//!   sink:   Open --all sent after Ended--> Finished (FIN passed on)
//!             \--error--> Gone
//! ```
//!
//! A long stream changes from blocks to splicing, where the kernel moves it from socket to socket; the
//! step in hand then stands where the armed receive stood, and bytes in the pipe count as not drained.
//!
//! While blocks are scarce, one is taken for a flow only when its sink was seen to have room (see `room`).
//!
//! A reset is passed on as a reset, after what was received before it. A sink that is gone does not
//! end the opposite flow: what its peer said before it went is still delivered.
//!
//! A send that is under way when its peer resets the connection stops short without an error, and the
//! receive beside it then finds a plain end: the kernel tells the error once, and a send with progress
//! keeps it to itself. So after a short send an end is believed only when the rest has gone out. A splice
//! step looks at the socket at once and may overtake the word of such a send; an end that it finds is
//! believed only when the send is over.

use super::line::Line;
use super::pace::{MANY_BYTES_MAX, Pace};
use super::room::{Question, Room};
use super::{Cmd, Event, Received, Side, Splice, Spliced};
use crate::ring::pool::{Buf, Chain, GATHER_MAX, Pool};
use crate::session::EndReason;

/// Which of the kernel's newer features may be used.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// A multishot receive can be given a total.
    pub receive_cap: bool,
    /// Receives through the ring wait even on a non-blocking socket, which splicing makes of both.
    pub splice: bool,
}

/// How far a relay has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    Running,
    /// One side has finished and was told so; the other may still send.
    HalfClosed,
    Over(EndReason),
}

/// Both directions of one session.
#[derive(Debug)]
pub struct Relay {
    /// By the side that the bytes come from.
    flows: [Flow; 2],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    Open,
    Ended,
    Failed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sink {
    Open,
    Finished,
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Receive {
    Idle,
    Armed,
    Splicing,
    Cancelling,
    Starved,
}

#[derive(Debug)]
struct Flow {
    waiting: Chain,
    sending: Chain,
    /// Bytes in the pipe between the two sockets.
    piped: usize,
    delivered: u64,
    /// Bytes were received and thrown away.
    lost: bool,
    /// The last send stopped short, or may have, and its rest has not gone out yet.
    short: bool,
    /// The armed receive has taken data, and may sleep through an end that came with it.
    unsure: bool,
    source: Source,
    sink: Sink,
    receive: Receive,
    /// At the sink.
    room: Room,
    pace: Pace,
}

impl Relay {
    /// A relay between two connections that stand. Begin with [`Relay::advance`].
    pub fn new() -> Relay {
        Relay { flows: [Flow::new(), Flow::new()] }
    }

    /// A relay between connections that have been used already, with what is still to be sent to each.
    /// Begin with [`Relay::advance`].
    pub fn resume(client: (Line, Chain), backend: (Line, Chain)) -> Relay {
        let flow = |from: &Line, to: &mut Line, waiting: Chain| Flow {
            waiting,
            sending: to.sending.take(),
            piped: 0,
            delivered: 0,
            lost: false,
            short: to.short,
            unsure: from.unsure,
            source: from.source,
            sink: to.sink,
            receive: from.receive,
            room: to.room,
            pace: from.pace,
        };
        let ((mut client, to_client), (mut backend, to_backend)) = (client, backend);
        let up = flow(&client, &mut backend, to_backend);
        let down = flow(&backend, &mut client, to_client);
        Relay { flows: [up, down] }
    }

    /// Takes the relay apart again, giving back what was never sent. What is in flight goes on.
    pub fn split(mut self, pool: &mut Pool) -> (Line, Line) {
        self.flows.iter_mut().for_each(|flow| pool.give_back_chain(flow.waiting.take()));
        let [mut up, mut down] = self.flows;
        let line = |from: &Flow, to: &mut Flow| Line {
            source: from.source,
            receive: from.receive,
            pace: from.pace,
            sending: to.sending.take(),
            short: to.short,
            unsure: from.unsure,
            sink: to.sink,
            room: to.room,
        };
        let client = line(&up, &mut down);
        let backend = line(&down, &mut up);
        (client, backend)
    }

    /// Takes an event and says what to do about it.
    pub fn handle(
        &mut self,
        event: Event,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(Cmd),
    ) {
        match event {
            Event::Received { side, what, more, nonempty } => {
                let flow = &mut self.flows[side as usize];
                if !more {
                    flow.receive = Receive::Idle;
                }
                flow.unsure = more && matches!(what, Received::Data(_));
                flow.pace.nonempty = nonempty;
                match what {
                    Received::Data(buf) => flow.take_in(buf, pool),
                    Received::End => self.source_ended(side),
                    Received::Failed(_) => self.side_failed(side, pool),
                    Received::NoBuffers => flow.receive = Receive::Starved,
                    Received::Stopped => {}
                }
            }
            Event::Sent { side, result } => match result {
                Ok(bytes) => self.flows[side.other() as usize].sent(bytes as usize, pool),
                Err(_) => self.send_failed(side, pool, out),
            },
            Event::Room { side } => self.flows[side.other() as usize].room.answered(),
            Event::Spliced { side, moved, held, how } => {
                self.flows[side as usize].spliced(moved, held, how);
                match how {
                    Spliced::Step(Splice::Ended) => {
                        let towards = &mut self.flows[side.other() as usize];
                        towards.short |= !towards.sending.is_empty();
                        self.source_ended(side);
                    }
                    Spliced::Step(Splice::SourceFailed(_)) => self.side_failed(side, pool),
                    Spliced::Step(Splice::SinkFailed(_)) => {
                        self.send_failed(side.other(), pool, out);
                    }
                    _ => {}
                }
                if self.flows[side as usize].pace.splice.is_none() {
                    out(Cmd::EndSplice { side });
                }
            }
        }
        self.advance(pool, features, out);
    }

    /// The one place that decides what to do next, from what is so now.
    pub fn advance(&mut self, pool: &mut Pool, features: Features, out: &mut impl FnMut(Cmd)) {
        for side in Side::BOTH {
            let doubtful = self.flows[side.other() as usize].short;
            let flow = &mut self.flows[side as usize];
            if flow.sink == Sink::Gone {
                flow.cancel_receive(side, out);
                continue;
            }
            if flow.sending.is_empty() && !flow.waiting.is_empty() {
                flow.sending = pool.split(&mut flow.waiting, GATHER_MAX);
                flow.room.used();
                out(Cmd::Send { side: side.other(), what: flow.sending.outgoing() });
            }
            let whole = flow.source == Source::Ended && flow.is_drained();
            if whole && flow.sink == Sink::Open && !doubtful {
                flow.sink = Sink::Finished;
                out(Cmd::FinishWriting { side: side.other() });
            }
            if flow.source == Source::Open {
                flow.pace_receive(side, pool, features, out);
            }
        }
    }

    /// Blocks have come back to the pool: a starved flow may try again.
    pub fn feed(
        &mut self,
        side: Side,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(Cmd),
    ) {
        let flow = &mut self.flows[side as usize];
        if flow.receive == Receive::Starved {
            flow.receive = Receive::Idle;
            self.advance(pool, features, out);
        }
    }

    /// Whether a side may have ended without its receive noticing: a multishot receive that finds data
    /// takes it, and when the end comes at that moment the kernel loses the second of the two wake-ups
    /// and the receive waits for ever (Linux 6.18).
    pub fn is_unsure(&self) -> bool {
        self.flows.iter().any(|flow| flow.unsure)
    }

    /// Begins such receives anew, which then find the end.
    pub fn look_again(&mut self, out: &mut impl FnMut(Cmd)) {
        for side in Side::BOTH {
            let flow = &mut self.flows[side as usize];
            if std::mem::take(&mut flow.unsure) && flow.receive == Receive::Armed {
                flow.cancel_receive(side, out);
            }
        }
    }

    /// Asks for the end of everything in flight; the completions still come, to [`Relay::settle`].
    pub fn stop(&mut self, out: &mut impl FnMut(Cmd)) {
        for side in Side::BOTH {
            let flow = &mut self.flows[side as usize];
            flow.lost |= flow.is_held_back();
            flow.cancel_receive(side, out);
            if flow.room.cancel() {
                out(Cmd::CancelRoom { side: side.other() });
            }
            if !flow.sending.is_empty() {
                out(Cmd::CancelSend { side: side.other() });
            }
        }
    }

    /// Takes note of a completion after [`Relay::stop`], and wants nothing more.
    pub fn settle(&mut self, event: Event, pool: &mut Pool) {
        match event {
            Event::Received { side, what, more, .. } => {
                let flow = &mut self.flows[side as usize];
                if !more {
                    flow.receive = Receive::Idle;
                }
                match what {
                    Received::Data(buf) => flow.lose(buf, pool),
                    Received::NoBuffers => flow.receive = Receive::Starved,
                    Received::Failed(_) => flow.source = Source::Failed,
                    Received::End | Received::Stopped => {}
                }
            }
            Event::Sent { side, result } => {
                let flow = &mut self.flows[side.other() as usize];
                if let Ok(bytes) = result {
                    flow.delivered += u64::from(bytes);
                    pool.advance(&mut flow.sending, bytes as usize);
                }
                flow.lose_all(pool);
            }
            Event::Room { side } => self.flows[side.other() as usize].room.answered(),
            Event::Spliced { side, moved, held, how } => {
                let flow = &mut self.flows[side as usize];
                flow.receive = Receive::Idle;
                flow.delivered += moved;
                flow.lost |= held > 0;
                if let Spliced::Step(Splice::SourceFailed(_)) = how {
                    flow.source = Source::Failed;
                }
            }
        }
    }

    /// Whether the kernel still works for this relay.
    pub fn in_flight(&self) -> bool {
        self.flows.iter().any(|flow| {
            !flow.sending.is_empty()
                || flow.room.is_pending()
                || matches!(flow.receive, Receive::Armed | Receive::Splicing | Receive::Cancelling)
        })
    }

    /// Gives back what was never sent. Nothing may be in flight.
    pub fn release(&mut self, pool: &mut Pool) {
        assert!(!self.in_flight(), "blocks are released only when the kernel has done with them");
        self.flows.iter_mut().for_each(|flow| pool.give_back_chain(flow.waiting.take()));
    }

    /// Whether a stream cannot be ended as if it were whole: bytes of it were received and not
    /// delivered, may wait where nothing was received for want of blocks, or were lost with a reset.
    pub fn is_truncated(&self) -> bool {
        self.flows.iter().any(|flow| {
            flow.lost
                || !flow.is_drained()
                || flow.receive == Receive::Starved
                || flow.is_held_back()
                || flow.source == Source::Failed
                || flow.sink == Sink::Gone
        })
    }

    /// Whether a flow waits for blocks.
    pub fn is_starved(&self, side: Side) -> bool {
        self.flows[side as usize].receive == Receive::Starved
    }

    /// Bytes from one side that were handed to our kernel for the other side.
    pub fn delivered(&self, from: Side) -> u64 {
        self.flows[from as usize].delivered
    }

    /// Whether bytes are on their way from us to a kernel.
    pub fn is_sending(&self) -> bool {
        self.flows.iter().any(|flow| !flow.sending.is_empty() || flow.piped > 0)
    }

    /// Whether the flow from a side has a pipe, or may have.
    pub fn is_spliced(&self, side: Side) -> bool {
        self.flows[side as usize].pace.splice.is_some()
    }

    /// Whether a side was told that no more will come.
    pub fn has_finished(&self, side: Side) -> bool {
        self.flows[side.other() as usize].sink == Sink::Finished
    }

    pub fn progress(&self) -> Progress {
        let [up, down] = &self.flows;
        if up.source == Source::Failed && up.is_drained() {
            return Progress::Over(EndReason::ClientReset);
        }
        if down.source == Source::Failed && down.is_drained() {
            return Progress::Over(EndReason::BackendReset);
        }
        if up.sink == Sink::Gone && down.sink == Sink::Gone {
            // Neither can be written to, so neither is read from: no event would ever come.
            return Progress::Over(EndReason::ClientReset);
        }
        match (up.sink == Sink::Finished, down.sink == Sink::Finished) {
            (true, true) => Progress::Over(EndReason::Finished),
            (false, false) => Progress::Running,
            _ => Progress::HalfClosed,
        }
    }

    fn source_ended(&mut self, side: Side) {
        // After a reset was seen while sending to this side, its stream reads as merely ended.
        let reset = self.flows[side.other() as usize].sink == Sink::Gone;
        self.flows[side as usize].source = if reset { Source::Failed } else { Source::Ended };
    }

    /// A side was reset: nothing more can be delivered to it, and what it sent before is all there is.
    fn side_failed(&mut self, side: Side, pool: &mut Pool) {
        self.flows[side as usize].source = Source::Failed;
        let towards = &mut self.flows[side.other() as usize];
        if towards.sink == Sink::Open {
            towards.sink = Sink::Gone;
            towards.lose_piped();
            pool.give_back_chain(towards.waiting.take());
        }
    }

    /// Sending to a side failed, and receiving from it may not have noticed (see [`Relay::is_unsure`]).
    /// So it begins anew.
    fn send_failed(&mut self, side: Side, pool: &mut Pool, out: &mut impl FnMut(Cmd)) {
        self.sink_gone(side, pool);
        let from = &mut self.flows[side as usize];
        if from.receive == Receive::Armed {
            from.cancel_receive(side, out);
        }
    }

    /// Sending to a side failed. What it sent before may still be unread, so its flow goes on.
    fn sink_gone(&mut self, side: Side, pool: &mut Pool) {
        let towards = &mut self.flows[side.other() as usize];
        towards.sink = Sink::Gone;
        towards.lose_all(pool);
        let from = &mut self.flows[side as usize];
        if from.source == Source::Ended {
            from.source = Source::Failed;
        }
    }
}

impl Default for Relay {
    fn default() -> Relay {
        Relay::new()
    }
}

impl Flow {
    fn new() -> Flow {
        Flow {
            waiting: Chain::EMPTY,
            sending: Chain::EMPTY,
            piped: 0,
            delivered: 0,
            lost: false,
            short: false,
            unsure: false,
            source: Source::Open,
            sink: Sink::Open,
            receive: Receive::Idle,
            room: Room::UNKNOWN,
            pace: Pace::new(),
        }
    }

    /// Whether nothing is received because the sink was not seen to take more.
    fn is_held_back(&self) -> bool {
        self.source == Source::Open && self.receive == Receive::Idle && self.room.is_asked()
    }

    fn is_drained(&self) -> bool {
        self.waiting.is_empty() && self.sending.is_empty() && self.piped == 0
    }

    fn take_in(&mut self, buf: Buf, pool: &mut Pool) {
        self.pace.note(buf.len());
        match self.sink {
            Sink::Open if !buf.is_empty() => pool.push(&mut self.waiting, buf),
            _ => self.lose(buf, pool),
        }
    }

    fn lose(&mut self, buf: Buf, pool: &mut Pool) {
        self.lost |= !buf.is_empty();
        pool.give_back(buf);
    }

    /// Lets go of what can no longer be delivered.
    fn lose_all(&mut self, pool: &mut Pool) {
        self.lost |= !self.is_drained();
        pool.give_back_chain(self.sending.take());
        pool.give_back_chain(self.waiting.take());
        self.lose_piped();
    }

    fn lose_piped(&mut self) {
        self.lost |= self.piped > 0;
        self.piped = 0;
    }

    fn sent(&mut self, bytes: usize, pool: &mut Pool) {
        self.delivered += bytes as u64;
        pool.advance(&mut self.sending, bytes);
        self.short = !self.sending.is_empty();
        if !self.short {
            return;
        }
        if self.sink == Sink::Gone {
            return self.lose_all(pool);
        }
        // The rest goes out first, before what came in meanwhile.
        let mut rest = self.sending.take();
        while let Some(buf) = pool.pop(&mut self.waiting) {
            pool.push(&mut rest, buf);
        }
        self.waiting = rest;
    }

    fn spliced(&mut self, moved: u64, held: usize, how: Spliced) {
        self.receive = Receive::Idle;
        self.delivered += moved;
        self.piped = held;
        // A step that was over before the pipe was empty may have kept an error to itself. One that
        // found the sink full has asked it last, and was told of none.
        self.short = held > 0 && how == Spliced::Step(Splice::Moved);
        if self.sink == Sink::Gone {
            self.lose_piped();
        }
        self.pace.note_splice(moved, how);
    }

    /// Asks for more, or for less, according to what is held and what is free.
    fn pace_receive(
        &mut self,
        side: Side,
        pool: &Pool,
        features: Features,
        out: &mut impl FnMut(Cmd),
    ) {
        let held = self.waiting.blocks() + self.sending.blocks();
        let room = held < self.pace.held_max(pool);
        if let Some(when) = self.pace.splice.filter(|_| features.splice) {
            // The blocks that came before go out before.
            if self.receive == Receive::Idle && held == 0 {
                self.receive = Receive::Splicing;
                out(Cmd::Splice { side, when });
            }
            return;
        }
        match self.receive {
            Receive::Idle if room && self.pace.is_sparing(pool) && !self.room.is_seen() => {
                if let Some(Question { first }) = self.room.ask() {
                    out(Cmd::AwaitRoom { side: side.other(), first });
                }
            }
            Receive::Idle if room => {
                self.receive = Receive::Armed;
                out(Cmd::Receive { side, how: self.pace.intake(pool, features, MANY_BYTES_MAX) });
            }
            Receive::Armed if !room => self.cancel_receive(side, out),
            _ => {}
        }
    }

    fn cancel_receive(&mut self, side: Side, out: &mut impl FnMut(Cmd)) {
        match self.receive {
            Receive::Armed => out(Cmd::CancelReceive { side }),
            Receive::Splicing => out(Cmd::CancelSplice { side }),
            Receive::Idle | Receive::Cancelling | Receive::Starved => return,
        }
        self.receive = Receive::Cancelling;
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::super::{Intake, When};
    use super::*;
    use crate::proxy::Side::{Backend, Client};
    use crate::ring::pool::Class;

    /// A relay whose commands are noted, between sockets that are played by hand.
    struct Stage {
        relay: Relay,
        pool: Pool,
        features: Features,
        said: Vec<Cmd>,
    }

    impl Stage {
        /// Both sides are being read.
        fn new() -> Stage {
            let mut stage = Stage {
                relay: Relay::new(),
                pool: Pool::new(256, 16),
                features: Features { receive_cap: true, splice: false },
                said: Vec::new(),
            };
            stage.relay.advance(&mut stage.pool, stage.features, &mut |cmd| stage.said.push(cmd));
            assert_eq!(stage.said(), [receives(Client), receives(Backend)]);
            stage
        }

        /// One side is read through a pipe, the other into blocks.
        fn splicing(side: Side) -> Stage {
            let mut stage = Stage::new();
            stage.features.splice = true;
            stage.relay.flows[side as usize].pace.splice = Some(When::NextTurn);
            let said = stage.over(side, Received::Stopped);
            assert_eq!(said, [Cmd::Splice { side, when: When::NextTurn }]);
            stage
        }

        fn spliced(&mut self, side: Side, moved: u64, held: usize, how: Splice) -> Vec<Cmd> {
            self.handle(Event::Spliced { side, moved, held, how: Spliced::Step(how) })
        }

        /// What was commanded since the last look.
        fn said(&mut self) -> Vec<Cmd> {
            std::mem::take(&mut self.said)
        }

        fn handle(&mut self, event: Event) -> Vec<Cmd> {
            let said = &mut self.said;
            self.relay.handle(event, &mut self.pool, self.features, &mut |cmd| said.push(cmd));
            self.said()
        }

        fn data(&mut self, side: Side, bytes: usize) -> Vec<Cmd> {
            let event = self.data_event(side, bytes);
            self.handle(event)
        }

        fn data_event(&mut self, side: Side, bytes: usize) -> Event {
            let mut buf = self.pool.take(Class::Small).unwrap();
            self.pool.append(&mut buf, &vec![7; bytes]);
            Event::Received { side, what: Received::Data(buf), more: true, nonempty: false }
        }

        fn over(&mut self, side: Side, what: Received) -> Vec<Cmd> {
            self.handle(Event::Received { side, what, more: false, nonempty: false })
        }

        fn sent(&mut self, side: Side, result: Result<u32, Errno>) -> Vec<Cmd> {
            self.handle(Event::Sent { side, result })
        }
    }

    fn receives(side: Side) -> Cmd {
        Cmd::Receive { side, how: Intake::Many { bytes_max: MANY_BYTES_MAX } }
    }

    fn sends(said: &[Cmd]) -> Vec<(Side, usize)> {
        let sends = said.iter().filter_map(|cmd| match cmd {
            Cmd::Send { side, what } => Some((*side, what.blocks())),
            _ => None,
        });
        sends.collect()
    }

    #[test]
    fn bytes_go_from_one_side_to_the_other_and_then_the_end() {
        let mut stage = Stage::new();
        for (from, to) in [(Client, Backend), (Backend, Client)] {
            let said = stage.data(from, 10);
            assert_eq!(sends(&said), [(to, 1)]);
            // What comes meanwhile is gathered and goes out together.
            assert_eq!([stage.data(from, 3), stage.data(from, 4)], [[], []]);
            assert_eq!(sends(&stage.sent(to, Ok(10))), [(to, 2)]);
            assert_eq!(stage.over(from, Received::End), []);
            assert_eq!(stage.sent(to, Ok(7)), [Cmd::FinishWriting { side: to }]);
            assert_eq!(stage.relay.delivered(from), 17);
        }
        assert_eq!(stage.relay.progress(), Progress::Over(EndReason::Finished));
        assert_eq!(stage.pool.free(Class::Small), 256);
    }

    /// A session that begins when blocks are scarce, and those who have the others.
    fn scarce() -> (Stage, Vec<Buf>) {
        let mut stage = Stage::new();
        stage.relay = Relay::new();
        let held = (0..128).map(|_| stage.pool.take(Class::Small).unwrap()).collect();
        let said = &mut stage.said;
        stage.relay.advance(&mut stage.pool, stage.features, &mut |cmd| said.push(cmd));
        let asked = [Backend, Client].map(|side| Cmd::AwaitRoom { side, first: true });
        assert_eq!(stage.said(), asked, "nothing is received before there is room for it");
        (stage, held)
    }

    #[test]
    fn a_scarce_block_is_taken_when_its_bytes_have_room_and_not_before() {
        let (mut stage, _held) = scarce();
        let last = [Cmd::Receive { side: Client, how: Intake::Last { wait_first: true } }];
        assert_eq!(stage.handle(Event::Room { side: Backend }), last);
        let buf = stage.pool.take(Class::Small).unwrap();
        let mut buf = buf;
        stage.pool.append(&mut buf, b"words");
        let said = stage.over(Client, Received::Data(buf));
        assert_eq!(sends(&said), [(Backend, 1)]);
        assert_eq!(said.len(), 1, "a block that is on its way is enough");
        let again = [Cmd::AwaitRoom { side: Backend, first: false }];
        assert_eq!(stage.sent(Backend, Ok(5)), again);
        assert_eq!(stage.pool.free(Class::Small), 128, "who takes no more holds none");
    }

    #[test]
    fn a_flow_that_found_no_block_waits_for_its_reader_like_all_others() {
        let (mut stage, _held) = scarce();
        stage.handle(Event::Room { side: Backend });
        stage.over(Client, Received::NoBuffers);
        assert!(stage.relay.is_starved(Client));
        let (said, features) = (&mut stage.said, stage.features);
        stage.relay.feed(Client, &mut stage.pool, features, &mut |cmd| said.push(cmd));
        let last = [Cmd::Receive { side: Client, how: Intake::Last { wait_first: true } }];
        assert_eq!(stage.said(), last, "it had seen room, and has sent nothing since");
    }

    #[test]
    fn blocks_that_come_back_are_received_into_without_asking() {
        let (mut stage, held) = scarce();
        held.into_iter().for_each(|buf| stage.pool.give_back(buf));
        let said = &mut stage.said;
        stage.relay.advance(&mut stage.pool, stage.features, &mut |cmd| said.push(cmd));
        assert_eq!(stage.said(), [receives(Client), receives(Backend)]);
        // An answer to the question that was asked before a send says nothing about what is after it.
        stage.data(Client, 5);
        stage.sent(Backend, Ok(5));
        stage.handle(Event::Room { side: Backend });
        assert!(!stage.relay.flows[Client as usize].room.is_seen());
    }

    #[test]
    fn a_session_that_was_held_back_is_not_ended_as_if_it_were_whole() {
        let (mut stage, _held) = scarce();
        assert!(stage.relay.is_truncated());
        let said = &mut stage.said;
        stage.relay.stop(&mut |cmd| said.push(cmd));
        let taken_back = [Backend, Client].map(|side| Cmd::CancelRoom { side });
        assert_eq!(stage.said(), taken_back);
        for side in Side::BOTH {
            assert!(stage.relay.in_flight());
            stage.relay.settle(Event::Room { side }, &mut stage.pool);
        }
        assert!(!stage.relay.in_flight() && stage.relay.is_truncated());
    }

    #[test]
    fn the_rest_of_a_short_send_goes_out_first() {
        let mut stage = Stage::new();
        stage.data(Client, 10);
        stage.data(Client, 20);
        let said = stage.sent(Backend, Ok(4));
        let [Cmd::Send { side: Backend, what }] = said[..] else { panic!("{said:?}") };
        let lengths: Vec<_> = stage.pool.pieces(what).map(<[u8]>::len).collect();
        assert_eq!(lengths, [6, 20]);
    }

    #[test]
    fn an_end_after_a_short_send_is_believed_when_the_rest_has_gone_out() {
        for (rest, then) in [
            (Ok(6), vec![Cmd::FinishWriting { side: Client }]),
            (Err(Errno::EPIPE), vec![Cmd::CancelReceive { side: Client }]),
        ] {
            let mut stage = Stage::new();
            stage.data(Client, 10);
            assert_eq!(sends(&stage.sent(Backend, Ok(4))), [(Backend, 1)]);
            assert_eq!(stage.over(Backend, Received::End), [], "it may be a reset");
            assert_eq!(stage.sent(Backend, rest), then);
            let reset = Progress::Over(EndReason::BackendReset);
            assert_eq!(stage.relay.progress() == reset, rest.is_err());
        }
    }

    #[test]
    fn an_end_that_a_step_finds_is_believed_when_the_send_beside_it_is_over() {
        for (result, then) in [
            (Ok(10), vec![Cmd::FinishWriting { side: Backend }]),
            (Err(Errno::EPIPE), vec![Cmd::CancelReceive { side: Backend }]),
        ] {
            let mut stage = Stage::splicing(Client);
            assert_eq!(sends(&stage.data(Backend, 10)), [(Client, 1)]);
            let said = stage.spliced(Client, 0, 0, Splice::Ended);
            assert_eq!(said, [Cmd::EndSplice { side: Client }], "it may be a reset");
            assert_eq!(stage.sent(Client, result), then);
        }
        let mut stage = Stage::splicing(Client);
        stage.data(Backend, 10);
        stage.spliced(Client, 0, 0, Splice::Ended);
        assert_eq!(sends(&stage.sent(Client, Ok(4))), [(Client, 1)]);
        stage.sent(Client, Err(Errno::EPIPE));
        assert_eq!(stage.relay.progress(), Progress::Over(EndReason::ClientReset));
    }

    #[test]
    fn an_end_is_passed_on_though_a_pipe_the_other_way_is_full() {
        let mut stage = Stage::splicing(Client);
        let full = stage.spliced(Client, 5, 100, Splice::Full);
        assert_eq!(full, [Cmd::Splice { side: Client, when: When::Writable }]);
        let said = stage.over(Backend, Received::End);
        assert_eq!(said, [Cmd::FinishWriting { side: Client }]);
    }

    #[test]
    fn the_rest_of_a_short_send_to_a_dead_side_is_let_go() {
        let mut stage = Stage::new();
        stage.data(Backend, 10);
        stage.data(Client, 10);
        stage.over(Backend, Received::Failed(Errno::ECONNRESET));
        stage.sent(Backend, Ok(4));
        assert_eq!(stage.pool.free(Class::Small), 255, "one is on its way to the client");
        stage.sent(Client, Ok(10));
        assert_eq!(stage.relay.progress(), Progress::Over(EndReason::BackendReset));
    }

    #[test]
    fn what_is_lost_while_a_session_ends_is_not_forgotten() {
        let mut stage = Stage::new();
        stage.data(Client, 10);
        stage.sent(Backend, Ok(10));
        stage.relay.stop(&mut |_| {});
        assert!(!stage.relay.is_truncated());
        let late = stage.data_event(Backend, 3);
        stage.relay.settle(late, &mut stage.pool);
        assert!(stage.relay.is_truncated());
        assert_eq!(stage.pool.free(Class::Small), 256);
    }

    #[test]
    fn what_is_found_out_while_a_session_ends_is_not_forgotten() {
        for what in [Received::NoBuffers, Received::Failed(Errno::ECONNRESET)] {
            let mut stage = Stage::new();
            stage.relay.stop(&mut |_| {});
            assert!(!stage.relay.is_truncated());
            let event = Event::Received { side: Client, what, more: false, nonempty: false };
            stage.relay.settle(event, &mut stage.pool);
            assert!(stage.relay.is_truncated());
        }
        for (held, how) in [(1, Splice::Full), (0, Splice::SourceFailed(Errno::ECONNRESET))] {
            let mut stage = Stage::splicing(Client);
            stage.relay.stop(&mut |_| {});
            assert!(!stage.relay.is_truncated());
            let how = Spliced::Step(how);
            let event = Event::Spliced { side: Client, moved: 0, held, how };
            stage.relay.settle(event, &mut stage.pool);
            assert!(stage.relay.is_truncated());
        }
    }

    #[test]
    fn what_is_delivered_while_a_session_ends_is_counted() {
        let mut stage = Stage::new();
        stage.data(Client, 10);
        stage.relay.stop(&mut |_| {});
        stage.relay.settle(Event::Sent { side: Backend, result: Ok(4) }, &mut stage.pool);
        assert_eq!(stage.relay.delivered(Client), 4);
        assert!(stage.relay.is_truncated());
        assert_eq!(stage.pool.free(Class::Small), 256);
    }

    #[test]
    fn a_flow_that_found_no_block_may_have_more_to_say() {
        let mut stage = Stage::new();
        stage.over(Client, Received::NoBuffers);
        assert!(stage.relay.is_truncated());
    }

    #[test]
    fn a_session_is_over_when_neither_side_can_be_written_to() {
        let mut stage = Stage::new();
        stage.data(Client, 10);
        stage.data(Backend, 10);
        let both = [Backend, Client].map(|side| Cmd::CancelReceive { side });
        assert_eq!(stage.sent(Backend, Err(Errno::EPIPE)), both);
        assert_eq!(stage.relay.progress(), Progress::Running, "the backend may have said more");
        let again = stage.over(Backend, Received::Stopped);
        assert!(
            matches!(again[..], [Cmd::Receive { side: Backend, .. }]),
            "looks again: {again:?}"
        );
        stage.sent(Client, Err(Errno::EPIPE));
        assert_eq!(stage.relay.progress(), Progress::Over(EndReason::ClientReset));
    }
}
