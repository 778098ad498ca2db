//! TCP users between the ring and their sessions: completions become events, commands become operations.
//! Owns their streams and the splice steps of the long ones; decides nothing about sessions (that is
//! `sessions`'s).

mod ahead;
mod estate;

use std::os::fd::{AsFd, OwnedFd, RawFd};

use nix::errno::Errno;

use ahead::{Announced, Expected};

use super::sessions::{Cmd, Cx, Sessions};
use super::splices::{Splices, Step};
use crate::base::time::Now;
use crate::cluster::ServiceId;
use crate::estate::ahead::Ahead;
use crate::estate::{Estate, Parcel};
use crate::proxy::greeting::Caller;
use crate::proxy::line::Features;
use crate::proxy::{self, Event, Side, Spliced, When};
use crate::ring::{Done, Ring, Until, sys};
use crate::worker::driver::{Driver, Turn};
use crate::worker::ends::Ends;
use crate::worker::family;
use crate::worker::greetings::Newcomer;
use crate::worker::link::{DoorChange, Order};
use crate::worker::opening::{Opening, Unconnected};
use crate::worker::slots::Key;
use crate::worker::stream_driver::{COMMANDS, StreamDriver};
use crate::worker::streams::{self, Completion, end_of};

type Streams = streams::Streams<{ family::TCP }>;

/// A socket of a stream that is spliced takes or has more.
const SPLICE: u8 = streams::OWN;

pub struct TcpDriver {
    sessions: Sessions,
    streams: Streams,
    splices: Splices,
    commands: Vec<Cmd>,
    /// Those that have been described while the worker stands still.
    described: Vec<Key>,
    announced: Announced,
    expected: Expected,
}

impl TcpDriver {
    pub fn new(features: Features, now: Now) -> TcpDriver {
        TcpDriver {
            sessions: Sessions::new(features, now),
            streams: Streams::new(None, now),
            splices: Splices::new(),
            commands: Vec::with_capacity(COMMANDS),
            described: Vec::new(),
            announced: Announced::default(),
            expected: Expected::default(),
        }
    }
}

impl Driver for TcpDriver {
    fn change_door(&mut self, change: DoorChange, turn: &mut Turn<'_>) {
        self.change_stream_door(change, turn);
    }

    fn live(&self) -> usize {
        self.sessions.live() + self.streams.live()
    }

    fn next_deadline(&self) -> Option<Now> {
        let all = [
            self.sessions.next_deadline(),
            self.streams.next_deadline(),
            self.splices.next_deadline(),
        ];
        all.into_iter().flatten().min()
    }

    fn is_waiting(&self, _ring: &Ring) -> bool {
        self.sessions.is_starved() || self.streams.is_eager()
    }

    fn complete(&mut self, done: Done, turn: &mut Turn<'_>) {
        match self.streams.complete(done, turn) {
            Completion::Happened(key, event) => self.happened(key, event, turn),
            Completion::Connected(key, result) => self.established(key, result, turn),
            Completion::Arrived(user) => self.welcome(user, turn),
            Completion::Own(done) => self.ready(done, turn),
            Completion::Nothing => {}
        }
        self.execute(turn);
    }

    fn housekeep(&mut self, turn: &mut Turn<'_>) {
        self.streams.housekeep(turn);
        self.sessions.expire(&mut turn.cx(&mut self.commands));
        if self.sessions.is_starved() {
            self.sessions.relieve(&mut turn.cx(&mut self.commands));
        }
        self.settle(turn);
    }

    /// A message that comes meanwhile waits for one stream's step, not for all; and one that came before
    /// has left.
    fn step(&mut self, heard_at: Now, turn: &mut Turn<'_>) {
        self.splices.note_message(heard_at);
        self.splices.turn(turn.now);
        let Some(step) = self.splices.pop_due() else { return };
        turn.ring.flush();
        self.splice(step, turn);
        self.execute(turn);
    }

    fn order(&mut self, order: Order, turn: &mut Turn<'_>) {
        self.order_doors(order, turn);
        self.sessions.order(order, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn end_backends(&mut self, ends: &Ends, turn: &mut Turn<'_>) {
        self.sessions.end_backends(ends, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn is_eager(&self) -> bool {
        self.splices.is_eager() || self.streams.is_eager()
    }

    fn freeze(&mut self, turn: &mut Turn<'_>) {
        self.streams.doors.freeze(turn.ring);
        let streams = &self.streams;
        self.sessions.freeze(|key| streams.is_apart(key), &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn note(&mut self, done: Done, turn: &mut Turn<'_>) {
        match self.streams.note(done, turn) {
            Completion::Happened(key, event) if self.expected.note(key, &event) => {
                self.close_expected(turn.ring);
            }
            Completion::Happened(key, event) => {
                self.sessions.note(key, event, &mut turn.cx(&mut self.commands));
            }
            Completion::Connected(key, result) => {
                self.sessions.recalled(key, result, &mut turn.cx(&mut self.commands));
            }
            Completion::Arrived(user) => {
                self.take_in(user, turn, |sessions, service, caller, _, cx| {
                    sessions.seat(service, caller, cx)
                });
            }
            Completion::Own(done) => self.note_ready(done, turn),
            Completion::Nothing => {}
        }
        self.execute(turn);
    }

    fn take_back(&mut self, turn: &mut Turn<'_>) {
        self.streams.doors.freeze(turn.ring);
        let streams = &self.streams;
        self.sessions.take_back(|key| streams.is_apart(key), &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn is_still(&mut self) -> bool {
        let streams = &self.streams;
        streams.doors.is_still()
            && self.sessions.is_still(|key| streams.is_apart(key))
            && self.expected.is_still()
    }

    fn announce(&mut self, is_first: bool) -> Vec<[OwnedFd; 2]> {
        self.announce_next(is_first)
    }

    fn expect(&mut self, ahead: &mut Ahead<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), String> {
        self.expect_all(ahead, turn)
    }

    fn describe(&mut self, estate: &mut Estate<RawFd>, turn: &mut Turn<'_>) {
        self.describe_all(&mut estate.tcp, turn);
    }

    fn inherit(&mut self, estate: &mut Estate<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), String> {
        self.inherit_all(estate.worker, std::mem::take(&mut estate.tcp), turn)
    }

    fn describe_doors(&self, doors: &mut Parcel<RawFd>) {
        self.streams.doors.describe(doors);
    }

    fn leave(&mut self, turn: &mut Turn<'_>) {
        self.streams.doors.leave();
        // The sockets are the successor's now.
        self.announced.clear();
        let described = std::mem::take(&mut self.described);
        self.sessions.leave(&described, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    fn thaw(&mut self, turn: &mut Turn<'_>) {
        self.described.clear();
        self.announced.clear();
        self.thaw_streams(turn);
        self.sessions.thaw(&mut turn.cx(&mut self.commands));
        self.execute(turn);
    }
}

impl StreamDriver<{ family::TCP }> for TcpDriver {
    type Cmd = Cmd;

    fn streams(&mut self) -> &mut Streams {
        &mut self.streams
    }

    fn commands(&mut self) -> &mut Vec<Cmd> {
        &mut self.commands
    }

    fn happened(&mut self, key: Key, event: Event, turn: &mut Turn<'_>) {
        if !matches!(event, Event::Room { .. }) {
            self.splices.note_message(turn.now);
        }
        self.sessions.relayed(key, event, &mut turn.cx(&mut self.commands));
    }

    fn introduces(&mut self, key: Key) -> Option<(Key, Caller)> {
        self.sessions.introduces(key).map(|caller| (key, caller))
    }

    fn opening(&mut self, key: Key, turn: &mut Turn<'_>) -> Result<Option<Opening>, Errno> {
        self.sessions.opening(key, &turn.cx(&mut self.commands))
    }

    fn connected(&mut self, key: Key, result: Result<(), Unconnected>, turn: &mut Turn<'_>) {
        self.sessions.tried(key, result, &mut turn.cx(&mut self.commands));
    }

    fn welcome(&mut self, user: Newcomer, turn: &mut Turn<'_>) {
        self.take_in(user, turn, Sessions::welcome);
    }

    fn carry_out(&mut self, command: Cmd, turn: &mut Turn<'_>) {
        match command {
            Cmd::Relay { key, what } => self.relay(key, what, turn),
            Cmd::Connect { key, to } => {
                if let Err(errno) = self.streams.connect(key, to, turn.ring) {
                    self.sessions.connected(key, Err(errno), &mut turn.cx(&mut self.commands));
                }
            }
            Cmd::Look { key } => self.look(key, turn),
            Cmd::CancelConnect { key } => self.streams.cancel_connect(key, turn.ring),
            Cmd::Close { key, reset } => self.close(key, reset, turn.ring),
        }
    }
}

impl TcpDriver {
    /// Begins a session for a user by this.
    #[inline]
    fn take_in(
        &mut self,
        user: Newcomer,
        turn: &mut Turn<'_>,
        welcome: impl FnOnce(&mut Sessions, ServiceId, Caller, bool, &mut Cx<'_>) -> Option<Key>,
    ) {
        let cx = &mut turn.cx(&mut self.commands);
        let (service, is_sealed) = (user.doorway.service, user.engine.is_some());
        let accepted = welcome(&mut self.sessions, service, user.caller, is_sealed, cx);
        match accepted {
            Some(key) => self.streams.seat(key, user, turn),
            None if cx.books.is_stranger(user.doorway.service, user.caller.address) => {
                sys::reset_on_close(user.socket.as_fd());
            }
            None => {}
        }
    }

    /// As [`TcpDriver::ready`], while the worker is to stand still.
    fn note_ready(&mut self, done: Done, turn: &mut Turn<'_>) {
        let (key, side) = end_of(done.tag);
        if done.result != Err(Errno::ECANCELED) {
            return self.splices.in_next_turn((key, side));
        }
        let event = Event::Spliced { side, moved: 0, held: 0, how: Spliced::Stopped };
        self.sessions.note(key, event, &mut turn.cx(&mut self.commands));
    }

    /// A spliced stream can go on, or has been told not to wait for that.
    fn ready(&mut self, done: Done, turn: &mut Turn<'_>) {
        let step = end_of(done.tag);
        match done.result {
            Err(Errno::ECANCELED) => self.spliced(step, (0, 0, Spliced::Stopped), turn),
            _ => self.splices.in_next_turn(step),
        }
    }

    fn relay(&mut self, key: Key, what: proxy::StreamCmd, turn: &mut Turn<'_>) {
        match what {
            proxy::StreamCmd::Splice { side, when } => self.plan_splice((key, side), when, turn),
            proxy::StreamCmd::CancelSplice { side } => match self.splices.forget((key, side)) {
                true => self.spliced((key, side), (0, 0, Spliced::Stopped), turn),
                false => turn.ring.cancel(Streams::tag(SPLICE, (key, side))),
            },
            proxy::StreamCmd::EndSplice { side } => self.splices.end((key, side)),
            what => self.streams.operate(key, what, turn),
        }
    }

    fn plan_splice(&mut self, step: Step, when: When, turn: &mut Turn<'_>) {
        let (key, side) = step;
        let ends = [side, side.other()].map(|side| self.streams.socket((key, side)));
        let [Some(source), Some(sink)] = ends else { return };
        let fresh = || sys::never_block(source).is_ok() && sys::never_block(sink).is_ok();
        if !self.splices.lend(step, fresh) {
            return self.spliced(step, (0, 0, Spliced::Unavailable), turn);
        }
        let tag = Streams::tag(SPLICE, step);
        match when {
            When::NextTurn => self.splices.in_next_turn(step),
            When::Soon => self.splices.soon(step, turn.now),
            When::Later => self.splices.later(step, turn.now),
            When::Readable => turn.ring.wait(tag, source, Until::Readable),
            When::Writable => turn.ring.wait(tag, sink, Until::Writable),
        }
    }

    fn splice(&mut self, step: Step, turn: &mut Turn<'_>) {
        let (key, side) = step;
        let ends = [side, side.other()].map(|side| self.streams.socket((key, side)));
        let [Some(source), Some(sink)] = ends else { return };
        let outcome = self.splices.step(turn.now, step, source, sink);
        self.spliced(step, outcome, turn);
    }

    fn spliced(
        &mut self,
        (key, side): Step,
        (moved, held, how): (u64, usize, Spliced),
        turn: &mut Turn<'_>,
    ) {
        let event = Event::Spliced { side, moved, held, how };
        self.sessions.relayed(key, event, &mut turn.cx(&mut self.commands));
    }

    fn look(&mut self, key: Key, turn: &mut Turn<'_>) {
        let outlooks = Side::BOTH.map(|side| self.streams.look((key, side)));
        self.sessions.told(key, outlooks, &mut turn.cx(&mut self.commands));
    }

    fn close(&mut self, key: Key, reset: bool, ring: &mut Ring) {
        if !self.announced.is_empty() {
            self.announced.close(key, reset, &self.streams);
        }
        for side in Side::BOTH {
            self.splices.end((key, side));
            self.streams.close((key, side), reset, ring);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Snapshot;
    use crate::ring;
    use crate::worker::books::tests::joined;

    #[test]
    fn a_message_of_another_driver_makes_the_next_steps_smaller() {
        let mut ring = Ring::new(ring::RingSettings::with_bytes(1 << 20, false)).unwrap();
        let mut joined = joined(Snapshot::default(), 1);
        let features = Features { receive_cap: true, splice: true };
        let now = Now::from_nanos(1_000_000_000);
        let mut driver = TcpDriver::new(features, now);
        let alone = driver.splices.bytes_max(now);
        let mut turn = Turn { now, ring: &mut ring, books: &mut joined.books };
        driver.step(Now::default(), &mut turn);
        assert_eq!(driver.splices.bytes_max(now), alone, "nothing was heard yet");
        driver.step(now, &mut turn);
        assert!(driver.splices.bytes_max(now) < alone);
    }
}
