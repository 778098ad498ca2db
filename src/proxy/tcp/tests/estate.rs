//! A relay that another one goes on with: it must do what the first would have done.

use super::*;
use crate::estate::Parcel;
use crate::estate::tcp::LineBits;
use crate::ring::pool::Outgoing;

impl Stage {
    /// Takes back what is in a send, of which these bytes have gone out.
    fn still(&mut self, sent: u32) {
        for side in Side::BOTH {
            if self.relay.is_sent_to(side) {
                let event = Event::Sent { side, result: Ok(sent) };
                self.relay.note(event, &mut self.pool, self.features, &mut |_| {});
            }
        }
    }

    fn described(&self) -> (RelayRecord, Parcel<i32>) {
        let mut parcel = Parcel::default();
        parcel.add_bytes([&b"something else"[..]].into_iter());
        (self.relay.describe(&self.pool, &mut parcel), parcel)
    }

    /// The same in another worker, and what it does first.
    fn elsewhere(&self) -> (Stage, Vec<StreamCmd>) {
        let (record, parcel) = self.described();
        let mut pool = Pool::new(512, 8);
        let relay = Relay::taken_up(&record, &parcel, &mut pool).unwrap();
        let mut stage = Stage { relay, pool, features: self.features, said: Vec::new() };
        let said = &mut stage.said;
        stage.relay.thaw(&mut stage.pool, stage.features, &mut |cmd| said.push(cmd));
        let said = stage.said();
        (stage, said)
    }

    fn text(&self, what: Outgoing) -> Vec<u8> {
        self.pool.pieces(what).flatten().copied().collect()
    }
}

#[test]
fn what_was_not_sent_goes_out_first_and_both_sides_are_read_again() {
    let mut stage = Stage::new();
    stage.data(Client, 10);
    for (number, len) in [20, 3000, 4096].into_iter().enumerate() {
        let mut buf = stage.pool.take(Class::Small).unwrap();
        stage.pool.append(&mut buf, &vec![number as u8; len]);
        let what = Received::Data(buf);
        stage.handle(Event::Received { side: Client, what, more: true, nonempty: false });
    }
    stage.still(4);
    let (new, said) = stage.elsewhere();
    let [StreamCmd::Send { side: Backend, what }, rest @ ..] = &said[..] else {
        panic!("{said:?}")
    };
    let text = [vec![7; 6], vec![0; 20], vec![1; 3000], vec![2; 4096]].concat();
    assert_eq!(new.text(*what), text);
    assert_eq!(rest, [Client, Backend].map(receives));
    assert_eq!(new.relay.delivered(Client), 4);
    assert_eq!(new.pool.free(Class::Small), 512 - 2, "in as few blocks as there may be");
}

#[test]
fn a_side_that_has_finished_is_neither_read_nor_told_again() {
    for drained in [false, true] {
        let mut stage = Stage::new();
        stage.data(Client, 10);
        stage.over(Client, Received::End);
        stage.still(if drained { 10 } else { 9 });
        let (mut new, mut said) = stage.elsewhere();
        if !drained {
            assert_eq!(sends(&said), [(Backend, 1)]);
            assert_eq!(said.len(), 2);
            said = new.sent(Backend, Ok(1));
        }
        assert!(said.contains(&StreamCmd::FinishWriting { side: Backend }), "{said:?}");
        let (new, said) = new.elsewhere();
        assert_eq!(said, [receives(Backend)]);
        assert_eq!(new.relay.progress(), Progress::HalfClosed);
    }
}

#[test]
fn an_end_behind_a_send_that_stopped_short_is_still_doubted() {
    let mut stage = Stage::new();
    stage.data(Client, 10);
    stage.still(4);
    stage.relay.note(
        Event::Received { side: Backend, what: Received::End, more: false, nonempty: false },
        &mut stage.pool,
        stage.features,
        &mut |_| {},
    );
    let (mut new, said) = stage.elsewhere();
    assert_eq!(sends(&said), [(Backend, 1)]);
    assert_eq!(said[1..], [receives(Client)], "the client is not told of an end yet");
    new.sent(Backend, Err(Errno::EPIPE));
    assert_eq!(new.relay.progress(), Progress::Over(EndReason::BackendReset));
}

#[test]
fn a_reset_is_still_a_reset() {
    let mut stage = Stage::new();
    stage.over(Backend, Received::Failed(Errno::ECONNRESET));
    let (new, _) = stage.elsewhere();
    assert_eq!(new.relay.progress(), Progress::Over(EndReason::BackendReset));
    let mut stage = Stage::new();
    stage.data(Client, 1);
    stage.sent(Backend, Err(Errno::EPIPE));
    let (new, said) = stage.elsewhere();
    assert!(new.relay.is_truncated());
    assert_eq!(said, [receives(Backend)], "its last words are still delivered");
}

#[test]
fn a_pipe_that_holds_bytes_is_emptied_first_and_one_that_does_not_is_left_behind() {
    let mut stage = Stage::splicing(Client);
    stage.spliced(Client, 5, 100, Splice::Full);
    let (mut new, said) = stage.elsewhere();
    let step = StreamCmd::Splice { side: Client, when: When::NextTurn };
    assert_eq!(said, [step, receives(Backend)]);
    assert!(new.relay.is_truncated());
    new.spliced(Client, 100, 0, Splice::Ended);
    assert_eq!(new.relay.delivered(Client), 105);
    let mut stage = Stage::splicing(Client);
    stage.spliced(Client, 5, 0, Splice::Empty);
    assert_eq!(stage.elsewhere().1, [Client, Backend].map(receives));
}

#[test]
fn what_no_relay_can_be_in_is_refused() {
    let mut stage = Stage::new();
    stage.data(Client, 10);
    stage.still(0);
    let (record, parcel) = stage.described();
    let refused = |change: &dyn Fn(&mut RelayRecord), blocks| {
        let mut record = record;
        change(&mut record);
        let mut pool = Pool::new(blocks, 0);
        let said = Relay::taken_up(&record, &parcel, &mut pool).unwrap_err();
        assert_eq!(pool.free(Class::Small), blocks);
        said
    };
    for (bits, what) in [
        (LineBits::ENDED | LineBits::FAILED, "ended and failed"),
        (LineBits::FINISHED | LineBits::GONE, "finished and is gone"),
        (LineBits::FINISHED, "takes none"),
        (LineBits::GONE, "takes none"),
        (64, "unknown"),
    ] {
        let said = refused(&|record| record.lines[1] = bits, 8);
        assert!(said.contains(what), "{said}");
    }
    let said = refused(&|record| record.flows[0].waiting.len = 99.into(), 8);
    assert!(said.contains("missing"), "{said}");
    let said = refused(&|record| record.flows[0].piped = 1.into(), 8);
    assert!(said.contains("out of turn"), "{said}");
    let piped_after_its_end = |record: &mut RelayRecord| {
        (record.flows[1].piped, record.lines[1]) = (1.into(), LineBits::ENDED);
    };
    assert!(refused(&piped_after_its_end, 8).contains("out of turn"));
    assert!(
        refused(&|record| record.flows[1].delivered = u64::MAX.into(), 8).contains("more bytes")
    );
    assert!(refused(&|_| {}, 0).contains("buffer_bytes"));
    let both = |record: &mut RelayRecord| record.flows[1].waiting = record.flows[0].waiting;
    assert!(refused(&both, 1).contains("buffer_bytes"), "there is room for one side alone");
}
