//! A relay between sockets that the tests play by hand.

mod estate;

use nix::errno::Errno;

use super::super::{Intake, When};
use super::*;
use crate::proxy::Side::{Backend, Client};
use crate::ring::pool::Class;

/// A relay between sockets that the test plays by hand, with its commands recorded.
struct Stage {
    relay: Relay,
    pool: Pool,
    features: Features,
    said: Vec<StreamCmd>,
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
        assert_eq!(said, [StreamCmd::Splice { side, when: When::NextTurn }]);
        stage
    }

    fn spliced(&mut self, side: Side, moved: u64, held: usize, how: Splice) -> Vec<StreamCmd> {
        self.handle(Event::Spliced { side, moved, held, how: Spliced::Step(how) })
    }

    /// The commands since the last call.
    fn said(&mut self) -> Vec<StreamCmd> {
        std::mem::take(&mut self.said)
    }

    fn handle(&mut self, event: Event) -> Vec<StreamCmd> {
        let said = &mut self.said;
        self.relay.handle(event, &mut self.pool, self.features, &mut |cmd| said.push(cmd));
        self.said()
    }

    fn data(&mut self, side: Side, bytes: usize) -> Vec<StreamCmd> {
        let event = self.data_event(side, bytes);
        self.handle(event)
    }

    fn data_event(&mut self, side: Side, bytes: usize) -> Event {
        let mut buf = self.pool.take(Class::Small).unwrap();
        self.pool.append(&mut buf, &vec![7; bytes]);
        Event::Received { side, what: Received::Data(buf), more: true, nonempty: false }
    }

    fn over(&mut self, side: Side, what: Received) -> Vec<StreamCmd> {
        self.handle(Event::Received { side, what, more: false, nonempty: false })
    }

    fn sent(&mut self, side: Side, result: Result<u32, Errno>) -> Vec<StreamCmd> {
        self.handle(Event::Sent { side, result })
    }
}

fn receives(side: Side) -> StreamCmd {
    StreamCmd::Receive { side, how: Intake::Many { bytes_max: MANY_BYTES_MAX } }
}

fn sends(said: &[StreamCmd]) -> Vec<(Side, usize)> {
    let sends = said.iter().filter_map(|cmd| match cmd {
        StreamCmd::Send { side, what } => Some((*side, what.blocks())),
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
        // What arrives meanwhile is collected and goes out together.
        assert_eq!([stage.data(from, 3), stage.data(from, 4)], [[], []]);
        assert_eq!(sends(&stage.sent(to, Ok(10))), [(to, 2)]);
        assert_eq!(stage.over(from, Received::End), []);
        assert_eq!(stage.sent(to, Ok(7)), [StreamCmd::FinishWriting { side: to }]);
        assert_eq!(stage.relay.delivered(from), 17);
    }
    assert_eq!(stage.relay.progress(), Progress::Over(EndReason::Finished));
    assert_eq!(stage.pool.free(Class::Small), 256);
}

/// A session that begins while blocks are scarce, and the blocks that others hold.
fn scarce() -> (Stage, Vec<Buf>) {
    let mut stage = Stage::new();
    stage.relay = Relay::new();
    let held = (0..128).map(|_| stage.pool.take(Class::Small).unwrap()).collect();
    let said = &mut stage.said;
    stage.relay.advance(&mut stage.pool, stage.features, &mut |cmd| said.push(cmd));
    let asked = [Backend, Client].map(|side| StreamCmd::AwaitRoom { side, first: true });
    assert_eq!(stage.said(), asked, "nothing is received before there is room for it");
    (stage, held)
}

#[test]
fn a_scarce_block_is_taken_when_its_bytes_have_room_and_not_before() {
    let (mut stage, _held) = scarce();
    let last = [StreamCmd::Receive { side: Client, how: Intake::Last { wait_first: true } }];
    assert_eq!(stage.handle(Event::Room { side: Backend }), last);
    let buf = stage.pool.take(Class::Small).unwrap();
    let mut buf = buf;
    stage.pool.append(&mut buf, b"words");
    let said = stage.over(Client, Received::Data(buf));
    assert_eq!(sends(&said), [(Backend, 1)]);
    assert_eq!(said.len(), 1, "a block that is on its way is enough");
    let again = [StreamCmd::AwaitRoom { side: Backend, first: false }];
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
    let last = [StreamCmd::Receive { side: Client, how: Intake::Last { wait_first: true } }];
    assert_eq!(stage.said(), last, "it had seen room, and has sent nothing since");
}

#[test]
fn blocks_that_come_back_are_received_into_without_asking() {
    let (mut stage, held) = scarce();
    held.into_iter().for_each(|buf| stage.pool.give_back(buf));
    let said = &mut stage.said;
    stage.relay.advance(&mut stage.pool, stage.features, &mut |cmd| said.push(cmd));
    assert_eq!(stage.said(), [receives(Client), receives(Backend)]);
    // An answer to a question asked before a send says nothing about the room after it.
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
    let taken_back = Side::BOTH.map(|side| StreamCmd::CancelRoom { side });
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
    let [StreamCmd::Send { side: Backend, what }] = said[..] else { panic!("{said:?}") };
    let lengths: Vec<_> = stage.pool.pieces(what).map(<[u8]>::len).collect();
    assert_eq!(lengths, [6, 20]);
}

#[test]
fn an_end_after_a_short_send_is_believed_when_the_rest_has_gone_out() {
    for (rest, then) in [
        (Ok(6), vec![StreamCmd::FinishWriting { side: Client }]),
        (Err(Errno::EPIPE), vec![StreamCmd::CancelReceive { side: Client }]),
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
        (Ok(10), vec![StreamCmd::FinishWriting { side: Backend }]),
        (Err(Errno::EPIPE), vec![StreamCmd::CancelReceive { side: Backend }]),
    ] {
        let mut stage = Stage::splicing(Client);
        assert_eq!(sends(&stage.data(Backend, 10)), [(Client, 1)]);
        let said = stage.spliced(Client, 0, 0, Splice::Ended);
        assert_eq!(said, [StreamCmd::EndSplice { side: Client }], "it may be a reset");
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
    for (step, reason) in
        [(Splice::Empty, None), (Splice::SinkFailed(Errno::EPIPE), Some(EndReason::BackendReset))]
    {
        let mut stage = Stage::splicing(Client);
        stage.spliced(Client, 5, 100, Splice::Moved);
        assert_eq!(stage.over(Backend, Received::End), [], "it may be a reset");
        let said = stage.spliced(Client, 100, 0, step);
        let believed = said.contains(&StreamCmd::FinishWriting { side: Client });
        assert_eq!(believed, reason.is_none(), "{said:?}");
        let over = reason.map(Progress::Over);
        assert_eq!(stage.relay.progress(), over.unwrap_or(Progress::HalfClosed));
    }
}

#[test]
fn an_end_is_passed_on_though_a_pipe_the_other_way_is_full() {
    let mut stage = Stage::splicing(Client);
    let full = stage.spliced(Client, 5, 100, Splice::Full);
    assert_eq!(full, [StreamCmd::Splice { side: Client, when: When::Writable }]);
    let said = stage.over(Backend, Received::End);
    assert_eq!(said, [StreamCmd::FinishWriting { side: Client }]);
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
    assert!(stage.said().contains(&StreamCmd::CancelSplice { side: Client }));
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
    let both = [Backend, Client].map(|side| StreamCmd::CancelReceive { side });
    assert_eq!(stage.sent(Backend, Err(Errno::EPIPE)), both);
    assert_eq!(stage.relay.progress(), Progress::Running, "the backend may have said more");
    let again = stage.over(Backend, Received::Stopped);
    assert!(
        matches!(again[..], [StreamCmd::Receive { side: Backend, .. }]),
        "looks again: {again:?}"
    );
    stage.sent(Client, Err(Errno::EPIPE));
    assert_eq!(stage.relay.progress(), Progress::Over(EndReason::ClientReset));
}

#[test]
fn a_send_that_was_not_waited_for_goes_out_again_when_there_is_room_and_loses_nothing() {
    let mut stage = Stage::new();
    stage.data(Client, 10);
    let asked = [StreamCmd::AwaitRoom { side: Backend, first: true }];
    assert_eq!(stage.sent(Backend, Err(Errno::EAGAIN)), asked);
    assert_eq!(stage.data(Client, 3), [], "not before there is room");
    assert_eq!(stage.over(Client, Received::End), []);
    assert_eq!(sends(&stage.handle(Event::Room { side: Backend })), [(Backend, 2)]);
    let asked = [StreamCmd::AwaitRoom { side: Backend, first: false }];
    assert_eq!(stage.sent(Backend, Err(Errno::EAGAIN)), asked, "and again");
    stage.handle(Event::Room { side: Backend });
    assert_eq!(stage.sent(Backend, Ok(13)), [StreamCmd::FinishWriting { side: Backend }]);
    assert_eq!(stage.relay.delivered(Client), 13);
    assert!(!stage.relay.is_truncated());
}
