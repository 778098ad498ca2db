//! The requests and replies of one thread: what an idle connection sends, and what becomes of what
//! comes back.

use std::io;

use nix::errno::Errno;

use super::super::connection::{self, Phase, Talk, socket_of};
use super::super::message::{HEAD_BYTES, Head, PERIOD, content_position};
use super::super::plan;
use super::super::tally::RequestFailure;
use super::super::web::{Payload, Response};
use super::super::{Shape, blocks};
use super::checked::{Checked, check};
use super::secure::sent_at_once;
use super::{DATAGRAM, DATAGRAM_BYTES_MAX, Driver, SEGMENTS_MAX, SEND, tag};
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::ring::pool::{Buf, Chain, SMALL_BYTES};
use crate::ring::{Done, Tag};

impl Driver<'_> {
    /// A connection is idle: it makes a request at once, or waits for the plan.
    pub(super) fn next(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        if let Talk::Http2(_) = connection.talk {
            return self.drive_streams(slot);
        }
        // The chain of the last request is in use until its send completes, which calls this again.
        let unsent = connection.asks_singly() && connection.sends > 0;
        if !self.asking || unsent {
            return;
        }
        // Short connections are opened when their requests are due.
        if self.plan.is_none() || self.load.shape == Shape::Churn {
            return self.ask(slot, self.now);
        }
        self.await_plan(slot);
    }

    /// Has a connection wait until a request is due.
    pub(super) fn await_plan(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        if !connection.queued {
            connection.queued = true;
            connection.free_since = self.now;
            self.free.push_back(slot);
        }
    }

    /// Sends the requests that are due, as far as there are idle connections.
    pub(super) fn keep_to_plan(&mut self) -> io::Result<()> {
        let Some(mut plan) = self.plan else { return Ok(()) };
        while self.asking && plan.due() <= self.now {
            let Some(slot) = self.free.pop_front() else { break };
            let connection = &mut self.connections[slot as usize];
            connection.queued = false;
            let phase = connection.phase;
            let has_room = match &connection.talk {
                Talk::Http2(http2) => http2.has_room(),
                _ => phase == Phase::Up,
            };
            if !has_room && self.load.shape != Shape::Churn {
                // It broke while it waited; the next one takes the request.
                continue;
            }
            let Some(due) = plan.take(self.now) else { break };
            let lag = plan::lag(due, connection.free_since, self.now);
            if self.measuring {
                self.tally.lagged(lag);
            }
            match phase {
                Phase::Down => self.open_for(slot, due)?,
                _ => self.ask(slot, due),
            }
        }
        self.plan = Some(plan);
        Ok(())
    }

    /// Makes requests on an open connection: one on a stream, as many as have room on a flow.
    pub(super) fn ask(&mut self, slot: u32, since: Now) {
        let planned = self.plan.is_some();
        if let Talk::Http2(_) = self.connections[slot as usize].talk {
            return self.ask_as_planned(slot, since);
        }
        if !self.has_blocks() {
            return self.put_off(slot);
        }
        let connection = &mut self.connections[slot as usize];
        match &mut connection.talk {
            Talk::Exchange(exchange) => {
                if self.load.shape != Shape::Churn {
                    connection.since = since;
                }
                connection.sent = self.now;
                let head = exchange.request();
                self.send_head(slot, head);
            }
            Talk::Web(web) => {
                if self.load.shape != Shape::Churn {
                    connection.since = since;
                }
                connection.sent = self.now;
                let Some(request) = &self.load.request else { return };
                self.head.clear();
                web.request(request, &mut self.head);
                self.send_web(slot);
            }
            Talk::Flow(_) if self.load.gso && !planned => while self.ask_train(slot, since) {},
            Talk::Flow(_) => {
                while self.ask_datagram(slot, since) && !planned {}
                let connection = &self.connections[slot as usize];
                if planned && matches!(&connection.talk, Talk::Flow(flow) if flow.has_room()) {
                    self.next(slot);
                }
            }
            Talk::Stream(_) | Talk::Http2(_) => {}
        }
    }

    /// Whether the pool has room for one more request.
    fn has_blocks(&self) -> bool {
        let size = sent_at_once(self.load);
        self.ring.pool().free(blocks::class_for(size)) > blocks::blocks_for(size)
    }

    /// Puts off a request for which there is no block: it is tried again next turn, or missing from
    /// the plan.
    fn put_off(&mut self, slot: u32) {
        if self.plan.is_some() {
            self.tally.unsent += 1;
            self.next(slot);
        } else {
            self.starved.push(slot);
        }
    }

    /// Sends a head with the content that belongs to it.
    pub(super) fn send_head(&mut self, slot: u32, head: Head) {
        let connection = &self.connections[slot as usize];
        let count = if matches!(connection.talk, Talk::Stream(_)) {
            0
        } else {
            self.load.size - HEAD_BYTES
        };
        let position = content_position(head.connection, head.sequence) + HEAD_BYTES as u64;
        self.say(slot, &head.encode(), position, count);
    }

    /// Sends the head that has been written and the request's body.
    fn send_web(&mut self, slot: u32) {
        let Some(request) = &self.load.request else { return };
        let mut count = 0;
        match &request.payload {
            Payload::None => {}
            Payload::Content(bytes) => count = *bytes,
            Payload::Bytes(bytes) => self.head.extend_from_slice(bytes),
        }
        let head = std::mem::take(&mut self.head);
        self.say(slot, &head, 0, count);
        self.head = head;
    }

    /// Sends `head` and then `count` bytes of content from `position`.
    fn say(&mut self, slot: u32, head: &[u8], position: u64, count: usize) {
        let connection = &mut self.connections[slot as usize];
        if connection.secured.is_some() {
            return self.seal(slot, head, position, count);
        }
        let Some(socket) = socket_of(&connection.socket) else { return };
        let (pool, chain) = (self.ring.pool_mut(), &mut connection.sending);
        let written = if count == 0 {
            blocks::write(pool, chain, head)
        } else {
            blocks::write_with_content(pool, chain, head, &self.content, position, count)
        };
        if written.is_err() {
            // Only a stream's opening gets here without having checked for blocks.
            return self.fault(slot, RequestFailure::Closed);
        }
        connection.sends += 1;
        let outgoing = connection.sending.outgoing();
        let tag = tag(SEND, slot, connection);
        self.ring.send(tag, socket, outgoing);
    }

    /// Sends one datagram; false if there is no room for it.
    fn ask_datagram(&mut self, slot: u32, since: Now) -> bool {
        let mut chain = Chain::EMPTY;
        self.write_datagram(slot, since, &mut chain) && self.send_flight(slot, chain)
    }

    /// Sends as many datagrams as have room in one segmented send; false if none has.
    fn ask_train(&mut self, slot: u32, since: Now) -> bool {
        let most = SEGMENTS_MAX.min(DATAGRAM_BYTES_MAX / self.load.size);
        let mut chain = Chain::EMPTY;
        let count = (0..most).take_while(|_| self.write_datagram(slot, since, &mut chain)).count();
        count > 0 && self.send_flight(slot, chain)
    }

    /// Appends a flow's next datagram to a chain; false if there is no room for it.
    fn write_datagram(&mut self, slot: u32, since: Now, chain: &mut Chain) -> bool {
        if !self.has_blocks() {
            self.starved.push(slot);
            return false;
        }
        let Talk::Flow(flow) = &mut self.connections[slot as usize].talk else { return false };
        let Some(head) = flow.request(since, self.now) else { return false };
        let position = content_position(head.connection, head.sequence) + HEAD_BYTES as u64;
        let (pool, count) = (self.ring.pool_mut(), self.load.size - HEAD_BYTES);
        let bytes = head.encode();
        blocks::write_with_content(pool, chain, &bytes, &self.content, position, count).is_ok()
    }

    /// Sends what was written; false when the flow has no socket.
    fn send_flight(&mut self, slot: u32, mut chain: Chain) -> bool {
        let connection = &mut self.connections[slot as usize];
        let Some(socket) = socket_of(&connection.socket) else {
            self.ring.pool_mut().give_back_chain(chain.take());
            return false;
        };
        let outgoing = chain.outgoing();
        let flight = self.flights_free.pop().unwrap_or_else(|| {
            self.flights.push((slot, Chain::EMPTY));
            (self.flights.len() - 1) as u32
        });
        self.flights[flight as usize] = (slot, chain);
        connection.sends += 1;
        self.ring.send(Tag { kind: DATAGRAM, generation: 0, slot: flight }, socket, outgoing);
        true
    }

    pub(super) fn datagram_sent(&mut self, done: Done) {
        let (slot, chain) = &mut self.flights[done.tag.slot as usize];
        let slot = *slot;
        self.ring.pool_mut().give_back_chain(chain.take());
        self.flights_free.push(done.tag.slot);
        self.connections[slot as usize].sends -= 1;
        // An ICMP refusal is reported to the next send; the datagram itself shows up as lost.
        if done.result == Err(Errno::ECONNREFUSED) {
            self.tally.fault(RequestFailure::Refused);
        }
        self.close_if_quiet(slot);
    }

    pub(super) fn sent(&mut self, slot: u32, result: Result<u32, Errno>) {
        let connection = &mut self.connections[slot as usize];
        connection.sends -= 1;
        self.ring.pool_mut().give_back_chain(connection.sending.take());
        match result {
            // The receive side says why, unless no receive is under way.
            Err(errno) => self.fault(slot, connection::fault_of(errno)),
            Ok(_) if connection.secured.is_some() => {
                if let Some(count) = self.sealed_sent(slot) {
                    self.went_out(slot, count);
                }
            }
            Ok(count) => self.went_out(slot, count),
        }
    }

    /// All that was to be sent is out.
    fn went_out(&mut self, slot: u32, count: u32) {
        let connection = &self.connections[slot as usize];
        if connection.phase != Phase::Up {
            return;
        }
        if let Talk::Http2(_) = connection.talk {
            return self.drive_streams(slot);
        }
        if !connection.asks_singly() {
            return self.stream_on(slot, count);
        }
        if !connection.waiting() {
            self.next(slot);
        }
    }

    /// Sends the next part of a stream, or ends it.
    pub(super) fn stream_on(&mut self, slot: u32, sent: u32) {
        let connection = &mut self.connections[slot as usize];
        let Talk::Stream(stream) = &mut connection.talk else { return };
        if connection.phase != Phase::Up || !stream.sends() {
            return;
        }
        if sent as usize > HEAD_BYTES {
            stream.sent(u64::from(sent));
            if self.measuring {
                self.tally.bytes_sent += u64::from(sent);
            }
        }
        if !self.asking && self.start != Now::default() {
            return self.wind_down(slot);
        }
        if connection.secured.is_some() {
            self.seal(slot, &[], 0, PERIOD);
        } else if let Some(socket) = socket_of(&connection.socket) {
            connection.sends += 1;
            let tag = tag(SEND, slot, connection);
            self.ring.send(tag, socket, self.flood.outgoing());
        }
    }

    pub(super) fn received(&mut self, slot: u32, done: Done) {
        let connection = &mut self.connections[slot as usize];
        connection.receiving = done.more;
        if let Some(buf) = done.buf {
            if connection.phase.is_open() && done.result.is_ok() && !buf.is_empty() {
                match connection.secured {
                    Some(_) => self.open(slot, &buf),
                    None => self.take(slot, &buf),
                }
            }
            self.ring.pool_mut().give_back(buf);
        }
        match done.result {
            Ok(0) if self.load.protocol != Protocol::Udp => self.ended(slot),
            Ok(_) => self.receive(slot),
            Err(Errno::ENOBUFS) => self.starved.push(slot),
            Err(Errno::ECONNREFUSED) if self.load.protocol == Protocol::Udp => {
                self.tally.fault(RequestFailure::Refused);
                self.receive(slot);
            }
            Err(errno) => self.fault(slot, connection::fault_of(errno)),
        }
    }

    /// Continues what starvation interrupted.
    pub(super) fn resume(&mut self, slot: u32) {
        self.receive(slot);
        self.send_sealed(slot);
        let connection = &self.connections[slot as usize];
        let free = match &connection.talk {
            Talk::Http2(_) => return self.drive_streams(slot),
            Talk::Flow(flow) => flow.has_room(),
            Talk::Stream(_) => false,
            Talk::Exchange(_) | Talk::Web(_) => !connection.waiting(),
        };
        if free && self.plan.is_none() && connection.phase == Phase::Up {
            self.next(slot);
        }
    }

    /// Checks what arrived on a connection.
    pub(super) fn take(&mut self, slot: u32, buf: &Buf) {
        let connection = &mut self.connections[slot as usize];
        if let Talk::Flow(_) = connection.talk {
            return self.take_datagrams(slot, buf);
        }
        let bytes = self.ring.pool().bytes(buf);
        let checked = check(&mut connection.talk, self.load, &self.content, bytes);
        self.conclude(slot, checked);
    }

    /// Draws the consequences of what was received.
    pub(super) fn conclude(&mut self, slot: u32, checked: Result<Checked, RequestFailure>) {
        match checked {
            Ok(Checked::Incomplete) => {}
            Ok(Checked::Answered(backend)) => self.answered(slot, backend, self.load.size as u64),
            Ok(Checked::Responded(response)) => self.responded(slot, response),
            Ok(Checked::Fed(count)) => {
                if self.measuring {
                    self.tally.bytes_received += count as u64;
                }
                self.drive_streams(slot);
            }
            Ok(Checked::Streamed { backend, count }) => {
                let home = &mut self.connections[slot as usize].home;
                home.answered_by(backend, &mut self.tally);
                if self.measuring {
                    self.tally.bytes_received += count as u64;
                }
            }
            Err(fault) => self.fault(slot, fault),
        }
    }

    /// Checks what arrived on a flow: one datagram, or several that the kernel put together.
    fn take_datagrams(&mut self, slot: u32, buf: &Buf) {
        let each = if self.load.gso { self.load.size } else { buf.len() };
        let mut answered = false;
        for start in (0..buf.len()).step_by(each) {
            let bytes = &self.ring.pool().bytes(buf)[start..buf.len().min(start + each)];
            let Talk::Flow(flow) = &mut self.connections[slot as usize].talk else { return };
            let (reply, fault) = flow.received(&self.content, bytes);
            if let Some(fault) = fault {
                self.tally.fault(fault);
            }
            if let Some(reply) = reply {
                self.connections[slot as usize].since = reply.since;
                self.count_answer(slot, reply.backend, self.load.size as u64);
                answered = true;
            }
        }
        if answered {
            self.next(slot);
        }
    }

    /// A complete, correct reply of `received` bytes: makes the next request, or ends a short
    /// connection.
    fn answered(&mut self, slot: u32, backend: u32, received: u64) {
        self.count_answer(slot, backend, received);
        if self.load.shape != Shape::Churn {
            self.next(slot);
        } else if self.connections[slot as usize].phase == Phase::Up {
            self.end(slot);
        }
    }

    fn count_answer(&mut self, slot: u32, backend: u32, received: u64) {
        let connection = &mut self.connections[slot as usize];
        if self.measuring {
            self.tally.answered(self.now.since(connection.since));
            self.tally.bytes_sent += self.load.request_bytes() as u64;
            self.tally.bytes_received += received;
        }
        if self.load.protocol == Protocol::Api {
            self.tally.answered_by(backend);
        } else if connection.home.answered_by(backend, &mut self.tally) {
            self.tally.fault(RequestFailure::Moved);
        }
    }

    /// A whole response, which may be the connection's last.
    fn responded(&mut self, slot: u32, response: Response) {
        if response.status >= 400 {
            self.tally.fault(RequestFailure::Status);
        }
        self.large_replies |= response.bytes > 2 * SMALL_BYTES as u64;
        if response.last {
            // Ended first, so that the next request goes on a new connection.
            let connection = &mut self.connections[slot as usize];
            let since = connection.since;
            self.end(slot);
            self.connections[slot as usize].since = since;
        }
        self.answered(slot, response.backend, response.bytes);
    }

    /// The other side has finished.
    pub(super) fn ended(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        if connection.phase == Phase::Closing {
            return;
        }
        if self.is_cut_off(slot) {
            return self.fault(slot, RequestFailure::Closed);
        }
        let connection = &mut self.connections[slot as usize];
        let verdict = match (&mut connection.talk, &self.load.request) {
            (Talk::Stream(stream), _) => stream.ended(),
            (Talk::Web(web), Some(request)) if web.waiting() => match web.ended(request) {
                Ok(response) => return self.responded(slot, response),
                Err(fault) => Err(fault),
            },
            // A server may end an idle connection.
            (Talk::Web(_), _) => Ok(()),
            (Talk::Http2(http2), _) if http2.in_flight() == 0 => Ok(()),
            (Talk::Http2(http2), _) if http2.is_leaving() => Err(RequestFailure::GoAway),
            _ => Err(RequestFailure::Closed),
        };
        match verdict {
            Ok(()) => self.end(slot),
            Err(fault) => self.fault(slot, fault),
        }
    }
}
