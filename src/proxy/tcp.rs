//! One TCP relay: two connections, and the bytes that go from each to the other. Owns when to read, when
//! to write, and when it is over; picks no backend, knows no timer. What is known of each connection is
//! its [`Line`]'s.
//!
//! Bytes are `waiting` (received), with the kernel for sending, or in a pipe. Not asking for more while
//! too many are held is the backpressure: the sender's window closes and nothing is lost.
//!
//! A long stream changes from blocks to splicing, where the kernel moves it from socket to socket; the
//! step in hand then stands where the armed receive stood, and bytes in the pipe count as not drained.
//!
//! While blocks are scarce, one is taken for a stream only when its reader was seen to have room (see
//! `room`).
//!
//! A reset is passed on as a reset, after what was received before it. A side that can no longer be sent
//! to does not end what it has sent: what its peer said before it went is still delivered.

use super::line::{Features, Line};
use super::pace::MANY_BYTES_MAX;
use super::{Cmd, Event, Received, Side, Splice, Spliced};
use crate::ring::pool::{Buf, Chain, Pool};
use crate::session::EndReason;

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
    lines: [Line; 2],
    /// Received and not sent on, by the side that it came from; so are the two after it.
    waiting: [Chain; 2],
    /// Bytes in the pipe to the other side.
    piped: [usize; 2],
    delivered: [u64; 2],
    /// Bytes were received and thrown away.
    lost: bool,
}

impl Relay {
    /// A relay between two connections that stand. Begin with [`Relay::advance`].
    pub fn new() -> Relay {
        Relay::resume((Line::new(), Chain::EMPTY), (Line::new(), Chain::EMPTY))
    }

    /// A relay between connections that have been used already, with what is still to be sent to each.
    /// Begin with [`Relay::advance`].
    pub fn resume(client: (Line, Chain), backend: (Line, Chain)) -> Relay {
        let ((client, to_client), (backend, to_backend)) = (client, backend);
        Relay {
            lines: [client, backend],
            waiting: [to_backend, to_client],
            piped: [0; 2],
            delivered: [0; 2],
            lost: false,
        }
    }

    /// Takes the relay apart again, giving back what was never sent. What is in flight goes on.
    pub fn split(mut self, pool: &mut Pool) -> (Line, Line) {
        self.waiting.iter_mut().for_each(|chain| pool.give_back_chain(chain.take()));
        let [client, backend] = self.lines;
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
                self.lines[side as usize].received(&what, more, nonempty);
                match what {
                    Received::Data(buf) => self.take_in(side, buf, pool),
                    Received::Failed(_) => self.lose_unsent(side, pool),
                    Received::End | Received::NoBuffers | Received::Stopped => {}
                }
            }
            Event::Sent { side, result: Ok(bytes) } => self.sent(side, bytes, pool),
            Event::Sent { side, result: Err(_) } => self.send_failed(side, pool, out),
            Event::Room { side } => self.lines[side as usize].room_answered(),
            Event::Spliced { side, moved, held, how } => {
                self.spliced(side, moved, held, how);
                match how {
                    Spliced::Step(Splice::SourceFailed(_)) => self.lose_unsent(side, pool),
                    Spliced::Step(Splice::SinkFailed(_)) => {
                        self.send_failed(side.other(), pool, out);
                    }
                    _ => {}
                }
                if !self.is_spliced(side) {
                    out(Cmd::EndSplice { side });
                }
            }
        }
        self.advance(pool, features, out);
    }

    /// The one place that decides what to do next, from what is so now.
    pub fn advance(&mut self, pool: &mut Pool, features: Features, out: &mut impl FnMut(Cmd)) {
        self.advance_from(Side::Client, pool, features, out);
        self.advance_from(Side::Backend, pool, features, out);
    }

    // Inlined where the side is known: done for every event, it is a quarter of the relay's instructions.
    #[inline(always)]
    fn advance_from(
        &mut self,
        side: Side,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(Cmd),
    ) {
        let (from, to) = ends(&mut self.lines, side);
        if to.is_gone() {
            return from.cancel_receive(side, out);
        }
        to.send(side.other(), &mut self.waiting[side as usize], pool, out);
        if from.ended_properly() && to.takes() && self.is_drained(side) {
            self.lines[side.other() as usize].finish(side.other(), out);
        }
        if self.lines[side as usize].is_open() {
            self.ask(side, pool, features, out);
        }
    }

    /// Asks a side for more, or for less, according to what is held and what is free.
    #[inline(always)]
    fn ask(&mut self, side: Side, pool: &Pool, features: Features, out: &mut impl FnMut(Cmd)) {
        let (from, to) = ends(&mut self.lines, side);
        let held = self.waiting[side as usize].blocks() + to.sending().blocks();
        if held == 0 && !from.is_idle() {
            // What is armed may go on: there is always room for a first block.
            return;
        }
        if from.is_spliced() && features.splice {
            // The blocks that came before go out before.
            if held == 0 {
                from.splice(side, out);
            }
            return;
        }
        let sparing = from.is_sparing(pool);
        let room = from.has_room(held, pool) && (!sparing || to.sees_room(side.other(), out));
        from.ask(side, room, MANY_BYTES_MAX, pool, features, out);
    }

    /// Blocks have come back to the pool: a starved side may try again.
    pub fn feed(
        &mut self,
        side: Side,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(Cmd),
    ) {
        if self.is_starved(side) {
            self.lines[side as usize].feed();
            self.advance(pool, features, out);
        }
    }

    /// Whether a side may have ended without its receive noticing; see [`Line::is_unsure`].
    pub fn is_unsure(&self) -> bool {
        self.lines.iter().any(Line::is_unsure)
    }

    /// Begins such receives anew, which then find the end.
    pub fn look_again(&mut self, out: &mut impl FnMut(Cmd)) {
        for side in Side::BOTH {
            self.lines[side as usize].look_again(side, out);
        }
    }

    /// Asks for the end of everything in flight; the completions still come, to [`Relay::settle`].
    pub fn stop(&mut self, out: &mut impl FnMut(Cmd)) {
        for side in Side::BOTH {
            self.lost |= self.is_held_back(side);
        }
        for side in Side::BOTH {
            self.lines[side as usize].stop(side, out);
        }
    }

    /// Takes note of a completion after [`Relay::stop`], and wants nothing more.
    pub fn settle(&mut self, event: Event, pool: &mut Pool) {
        let side = match event {
            Event::Sent { side, result } => {
                if let Ok(bytes) = result {
                    self.sent(side, bytes, pool);
                }
                let unsent = self.lines[side as usize].take_sent();
                return self.lose_all(side, unsent, pool);
            }
            Event::Received { side, what: Received::Data(ref buf), .. } => {
                self.lost |= !buf.is_empty();
                side
            }
            Event::Spliced { side, moved, held, .. } => {
                self.delivered[side as usize] += moved;
                // A step that was cancelled does not know what is in the pipe, which is as it was.
                self.lost |= held > 0;
                side
            }
            Event::Received { side, .. } | Event::Room { side } => side,
        };
        self.lines[side as usize].settle(event, pool);
    }

    /// Whether the kernel still works for this relay.
    pub fn in_flight(&self) -> bool {
        self.lines.iter().any(Line::in_flight)
    }

    /// Gives back what was never sent. Nothing may be in flight.
    pub fn release(&mut self, pool: &mut Pool) {
        assert!(!self.in_flight(), "blocks are released only when the kernel has done with them");
        self.waiting.iter_mut().for_each(|chain| pool.give_back_chain(chain.take()));
    }

    /// Whether a stream cannot be ended as if it were whole: bytes of it were received and not
    /// delivered, may wait where nothing was received for want of blocks, or were lost with a reset.
    pub fn is_truncated(&self) -> bool {
        let unsound = |line: &Line| line.is_starved() || line.has_failed() || line.is_gone();
        let unfinished = |side| !self.is_drained(side) || self.is_held_back(side);
        self.lost || self.lines.iter().any(unsound) || Side::BOTH.into_iter().any(unfinished)
    }

    /// Whether a side waits for blocks.
    pub fn is_starved(&self, side: Side) -> bool {
        self.lines[side as usize].is_starved()
    }

    /// Bytes from one side that were handed to our kernel for the other side.
    pub fn delivered(&self, from: Side) -> u64 {
        self.delivered[from as usize]
    }

    /// Whether bytes are on their way from us to a kernel.
    pub fn is_sending(&self) -> bool {
        self.lines.iter().any(|line| !line.sending().is_empty()) || self.piped != [0; 2]
    }

    /// Whether there is a pipe from a side, or may be.
    pub fn is_spliced(&self, side: Side) -> bool {
        self.lines[side as usize].is_spliced()
    }

    /// Whether a side was told that no more will come.
    pub fn has_finished(&self, side: Side) -> bool {
        self.lines[side as usize].has_finished()
    }

    pub fn progress(&self) -> Progress {
        let [client, backend] = &self.lines;
        if client.has_failed() && self.is_drained(Side::Client) {
            return Progress::Over(EndReason::ClientReset);
        }
        if backend.has_failed() && self.is_drained(Side::Backend) {
            return Progress::Over(EndReason::BackendReset);
        }
        if client.is_gone() && backend.is_gone() {
            // Neither can be written to, so neither is read from: no event would ever come.
            return Progress::Over(EndReason::ClientReset);
        }
        match (client.has_finished(), backend.has_finished()) {
            (true, true) => Progress::Over(EndReason::Finished),
            (false, false) => Progress::Running,
            _ => Progress::HalfClosed,
        }
    }

    fn take_in(&mut self, side: Side, buf: Buf, pool: &mut Pool) {
        if self.lines[side.other() as usize].takes() && !buf.is_empty() {
            return pool.push(&mut self.waiting[side as usize], buf);
        }
        self.lost |= !buf.is_empty();
        pool.give_back(buf);
    }

    /// So many bytes were sent to a side.
    fn sent(&mut self, side: Side, bytes: u32, pool: &mut Pool) {
        let from = side.other() as usize;
        self.delivered[from] += u64::from(bytes);
        let line = &mut self.lines[side as usize];
        line.sent(bytes as usize, &mut self.waiting[from], pool);
        if line.is_gone() {
            self.lose_unsent(side, pool);
        }
    }

    /// Sending to a side failed, and receiving from it may not have noticed (see [`Line::is_unsure`]). So
    /// it begins anew: what the side sent before may still be unread, and goes on.
    fn send_failed(&mut self, side: Side, pool: &mut Pool, out: &mut impl FnMut(Cmd)) {
        let unsent = self.lines[side as usize].send_failed();
        self.lose_all(side, unsent, pool);
        self.lines[side as usize].receive_anew(side, out);
    }

    fn spliced(&mut self, side: Side, moved: u64, held: usize, how: Spliced) {
        self.delivered[side as usize] += moved;
        self.piped[side as usize] = held;
        let (from, to) = ends(&mut self.lines, side);
        to.spliced_to(held, how);
        from.spliced(moved, how);
        if to.is_gone() {
            self.lose_piped(side);
        }
    }

    /// Lets go of what can no longer be delivered to a side, `unsent` of it taken back from the kernel.
    fn lose_all(&mut self, side: Side, unsent: Chain, pool: &mut Pool) {
        self.lost |= !unsent.is_empty();
        pool.give_back_chain(unsent);
        self.lose_unsent(side, pool);
    }

    /// The same, apart from what is with the kernel for sending.
    fn lose_unsent(&mut self, side: Side, pool: &mut Pool) {
        let waiting = self.waiting[side.other() as usize].take();
        self.lost |= !waiting.is_empty();
        pool.give_back_chain(waiting);
        self.lose_piped(side.other());
    }

    fn lose_piped(&mut self, from: Side) {
        self.lost |= std::mem::take(&mut self.piped[from as usize]) > 0;
    }

    /// Whether nothing is received from a side because the other was not seen to take more.
    fn is_held_back(&self, side: Side) -> bool {
        self.lines[side as usize].is_idle() && self.lines[side.other() as usize].awaits_room()
    }

    /// Whether all that a side has sent is with the kernel of the other.
    fn is_drained(&self, side: Side) -> bool {
        self.waiting[side as usize].is_empty()
            && self.lines[side.other() as usize].sending().is_empty()
            && self.piped[side as usize] == 0
    }
}

impl Default for Relay {
    fn default() -> Relay {
        Relay::new()
    }
}

/// The connection on a side, and the other.
fn ends(lines: &mut [Line; 2], side: Side) -> (&mut Line, &mut Line) {
    let [client, backend] = lines;
    match side {
        Side::Client => (client, backend),
        Side::Backend => (backend, client),
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
            stage.relay.lines[side as usize].be_stream();
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
        assert!(!stage.relay.lines[Backend as usize].sees_room(Backend, &mut |_| {}));
    }

    #[test]
    fn a_session_that_was_held_back_is_not_ended_as_if_it_were_whole() {
        let (mut stage, _held) = scarce();
        assert!(stage.relay.is_truncated());
        let said = &mut stage.said;
        stage.relay.stop(&mut |cmd| said.push(cmd));
        let taken_back = Side::BOTH.map(|side| Cmd::CancelRoom { side });
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
    fn an_end_beside_a_step_that_did_not_come_to_its_end_is_believed_when_the_pipe_is_empty() {
        for (step, reason) in [
            (Splice::Empty, None),
            (Splice::SinkFailed(Errno::EPIPE), Some(EndReason::BackendReset)),
        ] {
            let mut stage = Stage::splicing(Client);
            stage.spliced(Client, 5, 100, Splice::Moved);
            assert_eq!(stage.over(Backend, Received::End), [], "it may be a reset");
            let said = stage.spliced(Client, 100, 0, step);
            let believed = said.contains(&Cmd::FinishWriting { side: Client });
            assert_eq!(believed, reason.is_none(), "{said:?}");
            let over = reason.map(Progress::Over);
            assert_eq!(stage.relay.progress(), over.unwrap_or(Progress::HalfClosed));
        }
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
    fn what_is_in_a_pipe_when_a_session_ends_is_not_forgotten() {
        let mut stage = Stage::splicing(Client);
        stage.spliced(Client, 5, 100, Splice::Full);
        let said = &mut stage.said;
        stage.relay.stop(&mut |cmd| said.push(cmd));
        assert!(stage.said().contains(&Cmd::CancelSplice { side: Client }));
        let how = Spliced::Stopped;
        let event = Event::Spliced { side: Client, moved: 0, held: 0, how };
        stage.relay.settle(event, &mut stage.pool);
        assert!(stage.relay.is_truncated());
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
