//! One TCP relay: two connections, and the bytes that go from each to the other. Owns when to read,
//! when to write, and when it is over; picks no backend, knows no timer. What is known about each
//! connection is in its [`Line`].
//!
//! Bytes are `waiting` (received), in a send, or in a pipe. Backpressure is to ask for no more
//! while too many are held: the sender's window closes and nothing is lost.
//!
//! A long stream changes from blocks to splicing, in which the kernel moves the bytes from socket
//! to socket. The step under way then takes the place of the armed receive, and bytes in the pipe
//! count as not drained.
//!
//! While blocks are scarce, one is taken for a stream only when its reader has been seen to have
//! room (see `room`).
//!
//! In a worker that stands still events are only noted ([`Relay::note`]): what they bring is kept, and nothing is
//! begun until [`Relay::thaw`].
//!
//! A reset is passed on as a reset, after what was received before it. That a side can no longer be
//! sent to does not end what it has sent: its last words before it went are still delivered.

use nix::errno::Errno;

use super::line::{Features, Line};
use super::pace::MANY_BYTES_MAX;
use super::{Event, Intake, Received, Side, Splice, Spliced, StreamCmd};
use crate::estate::Parcel;
use crate::estate::entry::CARRIED_MAX;
use crate::estate::tcp::{FlowRecord, RelayRecord};
use crate::ring::pool::{Buf, Chain, Class, Pool};
use crate::session::EndReason;

/// Bytes wait that there are no blocks for.
const NO_BLOCKS: &str = "the bytes on their way do not fit into limits.buffer_bytes";

/// How far a relay has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    Running,
    /// One side has finished and the other was told so; that one may still send.
    HalfClosed,
    Over(EndReason),
}

/// Both directions of one session.
#[derive(Debug)]
pub struct Relay {
    lines: [Line; 2],
    /// Received and not yet sent on, by the side it came from; so are the next two.
    waiting: [Chain; 2],
    /// Bytes in the pipe to the other side.
    piped: [usize; 2],
    delivered: [u64; 2],
    /// Bytes were received and thrown away.
    lost: bool,
}

impl Relay {
    /// A relay between two established connections. Begin with [`Relay::advance`].
    pub fn new() -> Relay {
        Relay::resume((Line::new(), Chain::EMPTY), (Line::new(), Chain::EMPTY))
    }

    /// A relay between connections already in use, with what is still to be sent to each. Begin
    /// with [`Relay::advance`].
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

    /// What another could go on with while no send is under way; bytes that wait are copied. What is said of
    /// pipes is only what they hold.
    pub fn describe<S>(&self, pool: &Pool, parcel: &mut Parcel<S>) -> RelayRecord {
        let flow = |side: Side| FlowRecord {
            waiting: parcel.add_bytes(pool.pieces(self.waiting[side as usize].outgoing())),
            delivered: self.delivered[side as usize].into(),
            // A pipe holds less than that.
            piped: (self.piped[side as usize] as u32).into(),
            ..FlowRecord::NEW
        };
        RelayRecord {
            flows: Side::BOTH.map(flow),
            lines: self.lines.each_ref().map(Line::describe),
            lost: self.lost.into(),
            unused: 0,
        }
    }

    /// A relay that another has described, in which nothing is in flight. Begin with [`Relay::advance`].
    ///
    /// # Errors
    /// What is wrong with the description, or what is lacking here.
    pub fn taken_up<S>(
        record: &RelayRecord,
        parcel: &Parcel<S>,
        pool: &mut Pool,
    ) -> Result<Relay, String> {
        let line = |side: Side| {
            let piped = record.flows[side as usize].piped.get();
            Line::taken_up(record.lines[side as usize], piped > 0)
        };
        let lines = [line(Side::Client)?, line(Side::Backend)?];
        let mut waiting = [&[][..]; 2];
        for side in Side::BOTH {
            let FlowRecord { waiting: span, piped, delivered, .. } = record.flows[side as usize];
            let bytes = parcel.bytes(span).ok_or("bytes of a session are missing")?;
            let (from, to) = (&lines[side as usize], &lines[side.other() as usize]);
            let (waits, is_piped) = (!bytes.is_empty(), piped.get() > 0);
            if (waits || is_piped) && !to.takes() {
                return Err("bytes wait for a connection that takes none".into());
            }
            if is_piped && (waits || !from.is_open()) {
                return Err("a pipe holds bytes out of turn".into());
            }
            if delivered.get() > CARRIED_MAX {
                return Err("a session has carried more bytes than there are".into());
            }
            waiting[side as usize] = bytes;
        }
        let (up, down) = match Side::BOTH.map(|side| pool.chain(waiting[side as usize])) {
            [Some(up), Some(down)] => (up, down),
            chains => {
                chains.into_iter().flatten().for_each(|chain| pool.give_back_chain(chain));
                return Err(NO_BLOCKS.into());
            }
        };
        let [client, backend] = lines;
        Ok(Relay {
            piped: record.flows.map(|flow| flow.piped.get() as usize),
            delivered: record.flows.map(|flow| flow.delivered.get()),
            lost: record.lost != 0,
            ..Relay::resume((client, down), (backend, up))
        })
    }

    /// How a connection is received from before anything is known of it.
    pub fn expecting(features: Features) -> Intake {
        match features.receive_cap {
            true => Intake::Many { bytes_max: MANY_BYTES_MAX },
            false => Intake::Once { class: Class::Small, wait_first: true },
        }
    }

    /// Such a receive is still armed from this side.
    pub fn armed_before(&mut self, side: Side, out: &mut impl FnMut(StreamCmd)) {
        self.lines[side as usize].armed_before(side, out);
    }

    /// Takes the relay apart again, giving back what was never sent. What is in flight goes on.
    pub fn split(mut self, pool: &mut Pool) -> (Line, Line) {
        self.waiting.iter_mut().for_each(|chain| pool.give_back_chain(chain.take()));
        let [client, backend] = self.lines;
        (client, backend)
    }

    /// Takes an event and decides what to do about it.
    #[inline(always)]
    pub fn handle(
        &mut self,
        event: Event,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
    ) {
        self.take::<true>(event, pool, features, out);
    }

    /// Takes an event and begins nothing that would move a byte.
    pub fn note(
        &mut self,
        event: Event,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
    ) {
        let event = match event {
            // It was taken back before its first byte, maybe in a thread of the kernel's.
            Event::Sent { side, result: Err(Errno::ECANCELED | Errno::EINTR | Errno::EAGAIN) } => {
                Event::Sent { side, result: Ok(0) }
            }
            event => event,
        };
        self.take::<false>(event, pool, features, out);
    }

    /// One body for both: taken apart, it cost every message nine instructions.
    fn take<const GOES_ON: bool>(
        &mut self,
        event: Event,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
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
            Event::Sent { side, result: Err(Errno::EAGAIN) } => {
                self.sent(side, 0, pool);
                self.lines[side as usize].not_waited_for(side, out);
            }
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
                    out(StreamCmd::EndSplice { side });
                }
            }
        }
        if GOES_ON {
            self.advance(pool, features, out);
        }
    }

    /// Goes on after events that were only noted, and asks anew where there was no block.
    pub fn thaw(&mut self, pool: &mut Pool, features: Features, out: &mut impl FnMut(StreamCmd)) {
        self.lines.iter_mut().for_each(Line::feed);
        self.advance(pool, features, out);
    }

    /// Takes back what is in a send and has not gone out, although the session may go on.
    pub fn cancel_sends(&self, out: &mut impl FnMut(StreamCmd)) {
        for side in Side::BOTH.into_iter().filter(|side| self.is_sent_to(*side)) {
            out(StreamCmd::CancelSend { side });
        }
    }

    /// Whether the kernel has a send to this side.
    pub fn is_sent_to(&self, side: Side) -> bool {
        !self.lines[side as usize].sending().is_empty()
    }

    /// The one place that decides what to do next, from the present state.
    pub fn advance(
        &mut self,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
    ) {
        self.advance_from(Side::Client, pool, features, out);
        self.advance_from(Side::Backend, pool, features, out);
    }

    // Inlined where the side is known: it runs on every event, and is a quarter of the relay's
    // instructions.
    #[inline(always)]
    fn advance_from(
        &mut self,
        side: Side,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
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

    /// Asks a side for more or for less, depending on what is held and what is free.
    #[inline(always)]
    fn ask(
        &mut self,
        side: Side,
        pool: &Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
    ) {
        let (from, to) = ends(&mut self.lines, side);
        let held = self.waiting[side as usize].blocks() + to.sending().blocks();
        if held == 0 && !from.is_idle() {
            // An armed receive may go on: there is always room for a first block.
            return;
        }
        if from.is_spliced() && features.splice {
            // What was received into blocks goes out first.
            if held == 0 {
                from.splice(side, out);
            }
            return;
        }
        let sparing = from.is_sparing(pool);
        let room = from.has_room(held, pool) && (!sparing || to.sees_room(side.other(), out));
        from.ask(side, room, MANY_BYTES_MAX, pool, features, out);
    }

    /// Blocks have returned to the pool: a starved side may try again.
    pub fn feed(
        &mut self,
        side: Side,
        pool: &mut Pool,
        features: Features,
        out: &mut impl FnMut(StreamCmd),
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

    /// Restarts such receives, which then find the end.
    pub fn look_again(&mut self, out: &mut impl FnMut(StreamCmd)) {
        for side in Side::BOTH {
            self.lines[side as usize].look_again(side, out);
        }
    }

    /// Cancels everything in flight; the completions still come, and go to [`Relay::settle`].
    pub fn stop(&mut self, out: &mut impl FnMut(StreamCmd)) {
        for side in Side::BOTH {
            self.lost |= self.is_held_back(side);
        }
        for side in Side::BOTH {
            self.lines[side as usize].stop(side, out);
        }
    }

    /// Records a completion after [`Relay::stop`]; nothing more is wanted.
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
                // A cancelled step does not know what is in the pipe, which is unchanged.
                self.lost |= held > 0;
                side
            }
            Event::Received { side, .. } | Event::Room { side } => side,
        };
        self.lines[side as usize].settle(event, pool);
    }

    /// Whether the kernel still works on this relay.
    pub fn in_flight(&self) -> bool {
        self.lines.iter().any(Line::in_flight)
    }

    /// Gives back what was never sent. Nothing may be in flight.
    pub fn release(&mut self, pool: &mut Pool) {
        assert!(!self.in_flight(), "blocks are released only when the kernel has done with them");
        self.waiting.iter_mut().for_each(|chain| pool.give_back_chain(chain.take()));
    }

    /// Whether ending a stream normally would make it look whole when it is not: bytes of it were
    /// received and not delivered, may be waiting where nothing was received for want of blocks, or
    /// were lost with a reset.
    pub fn is_truncated(&self) -> bool {
        let unsound = |line: &Line| line.is_starved() || line.has_failed() || line.is_gone();
        let unfinished = |side| !self.is_drained(side) || self.is_held_back(side);
        self.lost || self.lines.iter().any(unsound) || Side::BOTH.into_iter().any(unfinished)
    }

    /// Whether a side is waiting for blocks.
    pub fn is_starved(&self, side: Side) -> bool {
        self.lines[side as usize].is_starved()
    }

    /// Bytes from one side that were handed to our kernel for the other side.
    pub fn delivered(&self, from: Side) -> u64 {
        self.delivered[from as usize]
    }

    /// Whether bytes are on their way from us into a kernel queue.
    pub fn is_sending(&self) -> bool {
        self.lines.iter().any(|line| !line.sending().is_empty()) || self.piped != [0; 2]
    }

    /// Whether a side has, or may have, a pipe.
    pub fn is_spliced(&self, side: Side) -> bool {
        self.lines[side as usize].is_spliced()
    }

    /// Whether both sides may still send, and what they send next goes into blocks.
    pub fn is_plain(&self) -> bool {
        self.lines.iter().all(|line| line.is_open() && !line.is_spliced())
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
            // Neither side can be written to, so neither is read: no event would ever come.
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

    /// A send to a side took `bytes` bytes.
    fn sent(&mut self, side: Side, bytes: u32, pool: &mut Pool) {
        let from = side.other() as usize;
        self.delivered[from] += u64::from(bytes);
        let line = &mut self.lines[side as usize];
        line.sent(bytes as usize, &mut self.waiting[from], pool);
        if line.is_gone() {
            self.lose_unsent(side, pool);
        }
    }

    /// A send to a side failed, and the receive from it may not have noticed (see
    /// [`Line::is_unsure`]). So that is restarted: what the side sent before may still be unread,
    /// and is passed on.
    fn send_failed(&mut self, side: Side, pool: &mut Pool, out: &mut impl FnMut(StreamCmd)) {
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

    /// Drops what can no longer be delivered to a side; `unsent` is what came back from the kernel.
    fn lose_all(&mut self, side: Side, unsent: Chain, pool: &mut Pool) {
        self.lost |= !unsent.is_empty();
        pool.give_back_chain(unsent);
        self.lose_unsent(side, pool);
    }

    /// Drops the same, except what is in a send.
    fn lose_unsent(&mut self, side: Side, pool: &mut Pool) {
        let waiting = self.waiting[side.other() as usize].take();
        self.lost |= !waiting.is_empty();
        pool.give_back_chain(waiting);
        self.lose_piped(side.other());
    }

    fn lose_piped(&mut self, from: Side) {
        self.lost |= std::mem::take(&mut self.piped[from as usize]) > 0;
    }

    /// Whether nothing is received from a side because the other has not been seen to take more.
    fn is_held_back(&self, side: Side) -> bool {
        self.lines[side as usize].is_idle() && self.lines[side.other() as usize].awaits_room()
    }

    /// Whether the kernel of the other side has all that a side has sent.
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

/// The connection on a side, and the one on the other side.
fn ends(lines: &mut [Line; 2], side: Side) -> (&mut Line, &mut Line) {
    let [client, backend] = lines;
    match side {
        Side::Client => (client, backend),
        Side::Backend => (backend, client),
    }
}

#[cfg(test)]
mod tests;
