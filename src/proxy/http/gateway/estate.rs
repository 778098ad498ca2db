//! A user's connection that goes on in another process: what is said of one that stands still, and how it is taken
//! up. Only two kinds can be described: those between two requests, and tunnels. One that is in the middle of a
//! request when its worker is left can depart later:
//!
//! ```text
//!   Exchange --answered--> packing: reads no further --nothing in flight--> packed --> described, forgotten
//!      ^                      |
//!      +--user has finished---+---nobody may leave any more: the next answer is the last
//! ```

use zerocopy::little_endian::U64;

use super::{Gateway, Phase};
use crate::base::time::Now;
use crate::cluster::{BackendId, ServiceId};
use crate::estate::Parcel;
use crate::estate::api::{RequestRecord, UserRecord};
use crate::estate::entry::{moment, nanos};
use crate::estate::tcp::{FlowRecord, LineBits, RelayRecord};
use crate::proxy::http::exchange::{Answer, Exchange};
use crate::proxy::http::{Context, Ending, GatewayCmd};
use crate::proxy::line::Line;
use crate::proxy::tcp::Relay;
use crate::proxy::{Event, Received, Side};
use crate::ring::pool::Pool;
use crate::session::EndReason;

/// Bytes of requests that a user can have sent ahead.
const AHEAD_MAX: usize = 1 << 20;

/// What a gateway says of itself.
pub struct Described {
    pub relay: RelayRecord,
    /// Without the names of services.
    pub request: RequestRecord,
    pub number: u32,
    pub active: Now,
    pub heard: Now,
}

/// Who serves a request that became a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    pub service: ServiceId,
    /// The service that left it to that one.
    pub asked: Option<ServiceId>,
    pub backend: BackendId,
}

impl Gateway {
    /// Whether it is between two requests, without a byte of the next, which it may have.
    pub fn is_between_requests(&self) -> bool {
        matches!(self.phase, Phase::Head)
            && self.stash.is_empty()
            && self.downward.is_empty()
            && self.client.sending().is_empty()
            && self.client.is_open()
            && self.client.takes()
            && !self.draining
            && self.refuses.is_none()
            && self.shown.is_none()
            && !self.is_stream
    }

    /// What another could go on with. Nothing is being sent; bytes that wait in a tunnel are copied.
    pub fn describe<S>(&self, pool: &Pool, parcel: &mut Parcel<S>) -> Described {
        let (relay, request) = match &self.phase {
            Phase::Tunnel(relay) => (relay.describe(pool, parcel), self.exchange.describe(parcel)),
            _ => {
                let (mut flows, lines) = ([FlowRecord::NEW; 2], [self.client.describe(), 0]);
                flows[0].waiting = parcel.add_bytes([self.stash.bytes()].into_iter());
                (RelayRecord { flows, lines, lost: 0, unused: 0 }, RequestRecord::NONE)
            }
        };
        let number = self.exchange.number;
        Described { relay, request, number, active: self.active, heard: self.heard }
    }

    /// Whose the request is that became a tunnel, and who has left it to that one.
    pub fn served_by(&self) -> (Option<ServiceId>, Option<ServiceId>) {
        (self.exchange.service, self.exchange.asked)
    }

    /// Makes a new gateway one that another has described. Begin with [`Gateway::thaw`].
    ///
    /// # Errors
    /// What is wrong with the description, or what is lacking here.
    pub fn take_up<S>(
        &mut self,
        record: &UserRecord,
        served: Option<Served>,
        parcel: &Parcel<S>,
        cx: &mut Context<'_>,
    ) -> Result<(), String> {
        (self.active, self.heard) = (moment(record.active), moment(record.heard));
        self.moved = [record.entry.bytes_up.get(), record.entry.bytes_down.get()];
        self.exchange.number = record.number.get();
        let Some(served) = served else {
            if record.relay.lines[0] & !LineBits::SHORT != 0 {
                return Err("a user between two requests is about to leave".into());
            }
            self.client = Line::taken_up(record.relay.lines[0], false)?;
            let ahead = parcel.bytes(record.relay.flows[0].waiting);
            let ahead = ahead.filter(|ahead| ahead.len() <= AHEAD_MAX);
            self.stash.push(ahead.ok_or("what a user has sent ahead is missing, or too much")?);
            self.exchange.limits = cx.snapshot.request_limits(self.door.service);
            return Ok(());
        };
        for (moved, flow) in self.moved.iter_mut().zip(&record.relay.flows) {
            if flow.piped.get() > 0 {
                return Err("a tunnel has a pipe".into());
            }
            let before = moved.checked_sub(flow.delivered.get());
            *moved = before.ok_or("a tunnel has carried more bytes than its user")?;
        }
        self.exchange.take_up(&record.request, served, parcel)?;
        self.exchange.limits = cx.snapshot.request_limits(served.service);
        self.phase = Phase::Tunnel(Relay::taken_up(&record.relay, parcel, cx.pool)?);
        Ok(())
    }

    /// As [`Gateway::handle`] for a tunnel in a worker that stands still: begins nothing.
    pub fn note(&mut self, event: Event, cx: &mut Context<'_>) {
        let Phase::Tunnel(relay) = &mut self.phase else { return self.handle(event, cx) };
        match event {
            Event::Received { what: Received::Data(_), .. } => {
                (self.active, self.heard) = (cx.now, cx.now);
            }
            Event::Sent { result: Ok(1..), .. } => self.active = cx.now,
            _ => {}
        }
        let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
        relay.note(event, cx.pool, cx.features, out);
    }

    /// Takes back what a tunnel is sending.
    pub fn take_back(&mut self, cx: &mut Context<'_>) {
        if let Phase::Tunnel(relay) = &self.phase {
            relay.cancel_sends(&mut |what| cx.out.push(GatewayCmd::Wire(what)));
        }
    }

    /// Whether it is a tunnel with a send under way.
    pub fn sends_through(&self) -> bool {
        let Phase::Tunnel(relay) = &self.phase else { return false };
        Side::BOTH.into_iter().any(|side| relay.is_sent_to(side))
    }

    /// Goes on.
    pub fn thaw(&mut self, cx: &mut Context<'_>) {
        let Phase::Tunnel(relay) = &mut self.phase else { return self.advance(cx) };
        relay.advance(cx.pool, cx.features, &mut |what| cx.out.push(GatewayCmd::Wire(what)));
        self.follow_tunnel(cx);
    }

    /// The user has to go elsewhere, and is told so with the next answer that begins. Nothing is closed before:
    /// a request may be on its way.
    pub fn retire(&mut self, cx: &mut Context<'_>) {
        self.retiring = true;
        if self.is_http2() {
            self.drain_streams(cx.now);
            self.advance(cx);
        }
    }

    /// The user goes on elsewhere as soon as it can, without a word to it.
    pub fn depart(&mut self, cx: &mut Context<'_>) {
        self.departing = true;
        self.advance(cx);
    }

    /// It cannot: it is told to come again.
    pub fn stay(&mut self, cx: &mut Context<'_>) {
        (self.departing, self.retiring) = (false, true);
        self.advance(cx);
    }

    pub fn is_departing(&self) -> bool {
        self.departing
    }

    /// Whether it is between two requests and reads no more, because it is to go on elsewhere.
    pub(super) fn is_packing(&self) -> bool {
        self.departing
            && matches!(self.phase, Phase::Head)
            && self.client.is_open()
            && self.client.takes()
            && !self.draining
            && self.refuses.is_none()
            && self.shown.is_none()
            && !self.is_stream
    }

    /// Whether it can be described, and nothing is in flight that could change that.
    pub fn is_packed(&self) -> bool {
        self.is_packing() && self.backend.is_none() && !self.client.in_flight()
    }

    /// Whether requests are left here that would have gone along.
    pub(super) fn keeps_requests(&self) -> bool {
        self.departing && !self.stash.is_empty()
    }

    /// Lets go of its connections, which go on elsewhere.
    pub fn leave(&mut self, cx: &mut Context<'_>) {
        let ending = Ending { reason: EndReason::Stopping, reset: false };
        self.moved = self.moved();
        if let Phase::Tunnel(relay) = std::mem::replace(&mut self.phase, Phase::Over(ending)) {
            let (client, backend) = relay.split(cx.pool);
            (self.client, self.backend) = (client, Some(backend));
        }
        (self.exchange.answer, self.exchange.keep) = (Answer::Done, None);
        self.release(cx);
        self.clear(cx.pool);
        self.client.stop(Side::Client, &mut |what| cx.out.push(GatewayCmd::Wire(what)));
    }
}

impl Exchange {
    fn describe<S>(&self, parcel: &mut Parcel<S>) -> RequestRecord {
        let at = |time: Option<Now>| nanos(time.unwrap_or_default());
        let times = &self.times;
        let (line, host, id) = self.kept_line();
        RequestRecord {
            line: parcel.add_bytes([line].into_iter()),
            trace: self.trace.to_le_bytes(),
            times: [nanos(times.began), nanos(times.read), at(times.connected), at(times.answered)],
            status: self.status.into(),
            host,
            id,
            retries: self.attempt,
            reused: self.reused.into(),
            ..RequestRecord::NONE
        }
    }

    fn take_up<S>(
        &mut self,
        record: &RequestRecord,
        served: Served,
        parcel: &Parcel<S>,
    ) -> Result<(), String> {
        let line = parcel.bytes(record.line).ok_or("the line of a request is missing")?;
        if !self.keep_line(line, record.host, record.id) {
            return Err("the line of a request is not what it should be".into());
        }
        let at = |time: U64| (time.get() > 0).then(|| moment(time));
        let [began, read, connected, answered] = record.times;
        self.times.began = moment(began);
        self.times.read = moment(read);
        self.times.connected = at(connected);
        self.times.answered = at(answered);
        self.trace = u128::from_le_bytes(record.trace);
        self.status = record.status.get();
        (self.attempt, self.reused) = (record.retries, record.reused != 0);
        self.service = Some(served.service);
        self.asked = served.asked;
        self.backend = Some(served.backend);
        Ok(())
    }
}
