//! HTTP/2 on the connections of one thread: which requests go out on their streams, what becomes of them,
//! and the bytes between h2 and the socket. Owns the order of these; what a response is, is `http2`'s.

use std::convert::Infallible;
use std::io::IoSlice;

use super::super::Shape;
use super::super::blocks;
use super::super::connection::{Phase, Secured, Talk, socket_of};
use super::super::http2::{End, Http2, Outcome};
use super::super::tally::RequestFailure;
use super::super::web::Response;
use super::{Driver, REST, SEND, tag};
use crate::base::time::Now;
use crate::ring::pool::SMALL_BYTES;

/// How often a connection asks and takes answers before others have their turn.
const PASSES_MAX: usize = 16;

impl Driver<'_> {
    /// Makes the request that is due. A connection with room for more stays free since when it was.
    pub(super) fn ask_as_planned(&mut self, slot: u32, since: Now) {
        self.ask_stream(slot, since);
        let Some(http2) = self.http2(slot) else { return };
        if http2.has_room() {
            self.connections[slot as usize].queued = true;
            self.free.push_back(slot);
        }
        self.drive_streams(slot);
    }

    /// Makes one request; false if there is no room for it.
    fn ask_stream(&mut self, slot: u32, since: Now) -> bool {
        let connection = &mut self.connections[slot as usize];
        let (Talk::Http2(http2), Some(template)) = (&mut connection.talk, &self.template) else {
            return false;
        };
        http2.ask(template, since, self.now)
    }

    /// The state of an open connection of HTTP/2.
    fn http2(&mut self, slot: u32) -> Option<&mut Http2> {
        let connection = &mut self.connections[slot as usize];
        match &mut connection.talk {
            Talk::Http2(http2) if connection.phase == Phase::Up => Some(http2),
            _ => None,
        }
    }

    /// Goes on with a connection after anything that may let it: reads what came, draws the consequences,
    /// makes the next requests, and sends.
    pub(super) fn drive_streams(&mut self, slot: u32) {
        for _ in 0..PASSES_MAX {
            let connection = &mut self.connections[slot as usize];
            let (Talk::Http2(http2), Some(template)) = (&mut connection.talk, &self.template)
            else {
                return;
            };
            if connection.phase != Phase::Up {
                return;
            }
            http2.advance(template, &self.content);
            let (outcomes, end) = (http2.take_outcomes(), http2.end());
            for outcome in outcomes {
                self.stream_ended(slot, outcome);
            }
            if let Some(end) = end {
                return self.leave(slot, end);
            }
            self.fill(slot);
            if !self.http2(slot).is_some_and(|http2| http2.is_woken()) {
                break;
            }
        }
        if self.http2(slot).is_some_and(|http2| http2.is_woken()) {
            self.starved.push(slot);
        }
        self.flush_streams(slot);
        self.receive(slot);
    }

    /// Makes as many requests as have room, or waits for the plan.
    fn fill(&mut self, slot: u32) {
        let Some(http2) = self.http2(slot) else { return };
        let (has_room, in_flight) = (http2.has_room(), http2.in_flight());
        if !self.asking || !has_room {
            return;
        }
        if self.load.shape == Shape::Churn {
            if in_flight == 0 {
                // It was opened for this request.
                let since = self.connections[slot as usize].since;
                self.ask_stream(slot, since);
            }
        } else if self.plan.is_some() {
            self.await_plan(slot);
        } else {
            while self.ask_stream(slot, self.now) {}
        }
    }

    fn stream_ended(&mut self, slot: u32, outcome: Outcome) {
        match outcome {
            Outcome::Answered { since, response } => self.stream_answered(slot, since, response),
            Outcome::Failed(failure) => self.tally.fault(failure),
        }
        if self.load.shape == Shape::Churn {
            self.connections[slot as usize].rest_until = match outcome {
                Outcome::Answered { .. } => self.now,
                Outcome::Failed(_) => self.now.plus(REST),
            };
            self.end(slot);
        }
    }

    fn stream_answered(&mut self, slot: u32, since: Now, response: Response) {
        if response.status >= 400 {
            self.tally.fault(RequestFailure::Status);
        }
        self.large_replies |= response.bytes > 2 * SMALL_BYTES as u64;
        if self.measuring {
            self.tally.answered(self.now.since(since));
        }
        self.tally.answered_by(response.backend);
        // The server's settings come before its first response.
        if let Some(permitted) = self.http2(slot).map(|http2| http2.permitted()) {
            self.tally.permitted(permitted);
        }
    }

    /// A connection serves no more requests; another is opened in its place.
    fn leave(&mut self, slot: u32, end: End) {
        let connection = &mut self.connections[slot as usize];
        if connection.phase != Phase::Up {
            return;
        }
        if end == End::Broken {
            connection.rest_until = self.now.plus(REST);
        } else if self.load.shape == Shape::Churn && self.asking {
            // Its request was never made.
            return self.fault(slot, RequestFailure::GoAway);
        }
        self.end(slot);
    }

    /// Gives up requests that wait for too long. A server that answers none of a connection's requests
    /// loses the connection too.
    pub(super) fn expire_streams(&mut self, slot: u32) {
        let (now, patience) = (self.now, self.load.patience);
        let Some(http2) = self.http2(slot) else { return };
        let lost = http2.expire(now, patience);
        if lost == 0 {
            return;
        }
        let is_mute = http2.in_flight() == 0;
        self.tally.faults[RequestFailure::TimedOut as usize] += lost as u64;
        if is_mute {
            return self.leave(slot, End::Broken);
        }
        self.drive_streams(slot);
    }

    /// Sends what is to go, unless a send is under way, which is followed by this.
    fn flush_streams(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let Talk::Http2(http2) = &mut connection.talk else { return };
        if connection.sends > 0 || connection.phase != Phase::Up || !http2.has_outgoing() {
            return;
        }
        if let Some(secured) = &mut connection.secured {
            // Sealed before, and still waiting for a block.
            if !secured.client.has_sealed() {
                let count = seal(secured, http2);
                if self.measuring {
                    self.tally.bytes_sent += count as u64;
                }
            }
            return self.send_sealed(slot);
        }
        let Some(socket) = socket_of(&connection.socket) else { return };
        let (pool, chain) = (self.ring.pool_mut(), &mut connection.sending);
        if http2.hand_over(|bytes| blocks::write(pool, chain, bytes)).is_err() {
            return self.starved.push(slot);
        }
        if self.measuring {
            self.tally.bytes_sent += connection.sending.bytes() as u64;
        }
        connection.sends += 1;
        let outgoing = connection.sending.outgoing();
        let tag = tag(SEND, slot, connection);
        self.ring.send(tag, socket, outgoing);
    }
}

/// Seals what is to go; returns how much it was.
fn seal(secured: &mut Secured, http2: &mut Http2) -> usize {
    let mut count = 0;
    let sealed = http2.hand_over(|bytes| {
        secured.client.seal(&[IoSlice::new(bytes)]);
        count = bytes.len();
        Ok::<_, Infallible>(())
    });
    debug_assert!(sealed.is_ok(), "there is no limit to what is sealed");
    count
}
