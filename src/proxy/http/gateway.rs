//! The life of one user's connection. Owns its phases and both queues, and decides in one place,
//! `advance`, what happens next; `request` and `response` move the bytes.
//!
//! ```text
//!             +------------------------- kept alive ------------------------+
//!             v                                                             |
//!   new --> Head --head read--> Exchange --response with the user's kernel--+
//!             |                   |      \--101--> Tunnel ---+              |
//!             |                   |                          |         last response
//!             +--idle, closed     +--reset, ordered          |              v
//!             v                   v                          v          Lingering
//!            Over <-----------------------------------------------------------+
//! ```
//!
//! Requests are served one at a time: what the user sends ahead stays in the stash, and nothing
//! more is read until it is wanted, so the user's own kernel holds the rest.

pub mod estate;
mod http2;
mod intake;

use std::net::SocketAddr;

use super::exchange::{Answer, Exchange, Upload};
use super::stash::Stash;
use super::{Context, Ending, GatewayCmd, LINGER_MAX, Released};
use crate::base::time::Now;
use crate::cluster::{Doorway, RequestLimits};
use crate::http::Malformed;
use crate::http::user::User;
use crate::proxy::http2::Front;
use crate::proxy::line::Line;
use crate::proxy::tcp::Relay;
use crate::proxy::{self, Event, Received, Side};
use crate::ring::pool::{Buf, Chain, Pool};
use crate::session::{EndReason, SessionId};
use crate::tls::clients::Shown;

pub struct Gateway {
    pub(super) session: SessionId,
    address: SocketAddr,
    /// The service that the user was admitted for.
    pub door: Doorway,
    pub(super) user: User,
    /// What it was asked for when it set up TLS, and has shown.
    pub(super) shown: Option<Box<Shown>>,
    pub(super) client: Line,
    pub(super) backend: Option<Line>,
    released: Option<Released>,
    pub(super) phase: Phase,
    pub(super) exchange: Exchange,
    /// Bytes from the user that nobody wants yet, and how many of them have already been parsed in
    /// vain.
    pub(super) stash: Stash,
    pub(super) stash_seen: usize,
    /// Bytes to send to the backend, and to the user.
    pub(super) upward: Chain,
    pub(super) downward: Chain,
    /// When something last moved, or the phase began.
    pub(super) active: Now,
    /// When data last came, from either side.
    pub(super) heard: Now,
    /// No further request is accepted.
    draining: bool,
    /// The next answer that begins is the last.
    retiring: bool,
    /// It goes on elsewhere as soon as it is between two requests.
    pub(super) departing: bool,
    /// Why the first request is refused.
    pub(super) refuses: Option<&'static str>,
    pub(super) moved: [u64; 2],
    /// What carries its streams, for a connection that speaks HTTP/2.
    front: Option<Box<Front>>,
    /// It serves one such stream.
    pub(super) is_stream: bool,
}

#[derive(Debug)]
pub(super) enum Phase {
    Head,
    Exchange,
    Tunnel(Relay),
    /// It carries streams.
    Http2,
    /// The last response is out; whatever still arrives is read and thrown away.
    Lingering {
        /// The request was not read to its end, and its user may send all of it before reading
        /// anything.
        rest: bool,
        until: Now,
    },
    Over(Ending),
}

impl Gateway {
    /// A user has connected and was admitted. `trusted`: it is a proxy, and
    /// we believe what it says about its users. Begin with [`Gateway::start`].
    pub fn new(
        session: SessionId,
        door: Doorway,
        client: SocketAddr,
        trusted: bool,
        now: Now,
    ) -> Gateway {
        Gateway {
            session,
            address: client,
            door,
            user: User::new(client.ip(), trusted, door.is_tls),
            shown: None,
            client: Line::new(),
            backend: None,
            released: None,
            phase: Phase::Head,
            exchange: Exchange::new(),
            stash: Stash::EMPTY,
            stash_seen: 0,
            upward: Chain::EMPTY,
            downward: Chain::EMPTY,
            active: now,
            heard: now,
            draining: false,
            retiring: false,
            departing: false,
            refuses: None,
            moved: [0; 2],
            front: None,
            is_stream: false,
        }
    }

    /// The user was asked for a certificate. Comes before anything that it says.
    pub fn identify(&mut self, shown: Shown) {
        self.shown = Some(Box::new(shown));
    }

    pub fn start(&mut self, cx: &mut Context<'_>) {
        self.exchange.limits = cx.snapshot.request_limits(self.door.service);
        self.advance(cx);
    }

    /// Something happened on one of the two connections.
    pub fn handle(&mut self, event: Event, cx: &mut Context<'_>) {
        if let Event::Received { what: Received::Data(_), .. } = event {
            self.heard = cx.now;
        }
        if let Phase::Tunnel(relay) = &mut self.phase {
            let still = matches!(
                event,
                Event::Received { what: Received::NoBuffers | Received::Stopped, .. }
                    | Event::Room { .. }
            );
            if !still {
                self.active = cx.now;
            }
            let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
            relay.handle(event, cx.pool, cx.features, out);
            return self.follow_tunnel(cx);
        }
        if matches!(self.phase, Phase::Over(_)) {
            return self.settle(event, cx.pool);
        }
        match event {
            Event::Received { side, what, more, nonempty } => {
                self.received(side, what, more, nonempty, cx);
            }
            Event::Sent { side: Side::Client, result } => match result {
                Ok(bytes) => self.sent_to_user(bytes as usize, cx),
                Err(_) => {
                    cx.pool.give_back_chain(self.client.send_failed());
                    self.end(EndReason::ClientReset, true, cx);
                }
            },
            Event::Sent { side: Side::Backend, result } => match result {
                Ok(bytes) => self.sent_to_backend(bytes as usize, cx),
                Err(_) => self.send_to_backend_failed(cx),
            },
            Event::Room { side: Side::Client } => self.client.room_answered(),
            Event::Room { side: Side::Backend } => {
                self.backend.iter_mut().for_each(Line::room_answered);
            }
            Event::Spliced { .. } => debug_assert!(false, "nothing is spliced here"),
        }
        self.advance(cx);
    }

    /// What the request being served, or the last one, may take.
    pub fn limits(&self) -> &RequestLimits {
        &self.exchange.limits
    }

    /// Blocks have returned to the pool: whatever waited for one may try again.
    pub fn feed(&mut self, side: Side, cx: &mut Context<'_>) {
        if let Phase::Tunnel(relay) = &mut self.phase {
            let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
            return relay.feed(side, cx.pool, cx.features, out);
        }
        match side {
            Side::Client => self.client.feed(),
            Side::Backend => self.backend.iter_mut().for_each(Line::feed),
        }
        self.advance(cx);
    }

    /// Accepts no further request; the one being served is finished.
    pub fn drain(&mut self, cx: &mut Context<'_>) {
        self.draining = true;
        // A user that has just connected found the door open, and is served once.
        let served = self.exchange.number > 0;
        if matches!(self.phase, Phase::Head) && self.stash.is_empty() && served {
            self.linger(cx);
        }
        if self.is_http2() {
            self.drain_streams(cx.now);
            self.drive(cx);
        }
    }

    /// Ends the connection, whatever it is doing. For a tunnel, `reason` alone decides whether both
    /// sides are reset: nothing in its bytes tells where it ends.
    pub fn end(&mut self, reason: EndReason, reset: bool, cx: &mut Context<'_>) {
        let moved = self.moved();
        let mut torn = false;
        match std::mem::replace(&mut self.phase, Phase::Over(Ending { reason, reset })) {
            Phase::Over(before) => return self.phase = Phase::Over(before),
            Phase::Tunnel(relay) => {
                torn = reason.is_reset(relay.is_truncated());
                self.phase = Phase::Over(Ending { reason, reset: torn });
                let (client, backend) = relay.split(cx.pool);
                self.client = client;
                self.backend = Some(backend);
                let before = std::mem::replace(&mut self.moved, moved);
                self.exchange.bytes_up = moved[0] - before[0];
                self.exchange.bytes_down = moved[1] - before[1];
                self.log(cx);
            }
            Phase::Exchange => {
                self.exchange.fault.get_or_insert(reason.name());
                self.log(cx);
            }
            Phase::Head | Phase::Http2 | Phase::Lingering { .. } => {}
        }
        self.exchange.answer = Answer::Done;
        self.exchange.keep = None;
        self.release(cx);
        if let Some(released) = &mut self.released {
            released.reset = torn;
        }
        self.clear(cx.pool);
        self.client.stop(Side::Client, &mut |what| cx.out.push(GatewayCmd::Wire(what)));
        self.end_streams(cx);
    }

    /// Lets go of everything that is held for later.
    fn clear(&mut self, pool: &mut Pool) {
        (self.stash, self.exchange.stash) = (Stash::EMPTY, Stash::EMPTY);
        for chain in [&mut self.upward, &mut self.downward, &mut self.exchange.kept] {
            pool.give_back_chain(chain.take());
        }
    }

    /// How the connection ended, once it has. The user's socket is closed when nothing is
    /// [`Gateway::in_flight`] any more.
    pub fn ending(&self) -> Option<Ending> {
        match self.phase {
            Phase::Over(ending) => Some(ending),
            _ => None,
        }
    }

    /// Whether the kernel still works on the user's connection.
    pub fn in_flight(&self) -> bool {
        self.client.in_flight() || self.streams_in_flight()
    }

    /// The backend connection that [`GatewayCmd::Release`] announced.
    pub fn take_released(&mut self) -> Option<Released> {
        self.released.take()
    }

    /// Bytes sent to backends and to the user, in this order.
    pub fn moved(&self) -> [u64; 2] {
        let [up, down] = self.moved;
        match &self.phase {
            Phase::Tunnel(relay) => {
                [up + relay.delivered(Side::Client), down + relay.delivered(Side::Backend)]
            }
            _ => [up, down],
        }
    }

    /// Whether bytes are on their way from us into a kernel queue.
    pub fn is_sending(&self) -> bool {
        let backend = || self.backend.as_ref().is_some_and(|line| !line.sending().is_empty());
        match &self.phase {
            Phase::Tunnel(relay) => relay.is_sending(),
            Phase::Over(_) => false,
            _ => !self.client.sending().is_empty() || backend(),
        }
    }

    pub fn is_tunnel(&self) -> bool {
        matches!(self.phase, Phase::Tunnel(_))
    }

    /// Whether a receive waits for blocks.
    pub fn is_starved(&self, side: Side) -> bool {
        match (&self.phase, side) {
            (Phase::Tunnel(relay), side) => relay.is_starved(side),
            (_, Side::Client) => self.client.is_starved(),
            (_, Side::Backend) => self.backend.as_ref().is_some_and(Line::is_starved),
        }
    }

    fn settle(&mut self, event: Event, pool: &mut Pool) {
        match event {
            Event::Received { side: Side::Client, .. }
            | Event::Sent { side: Side::Client, .. }
            | Event::Room { side: Side::Client } => self.client.settle(event, pool),
            Event::Received { what: Received::Data(buf), .. } => {
                debug_assert!(false, "a released connection is the worker's");
                pool.give_back(buf);
            }
            _ => debug_assert!(false, "a released connection is the worker's"),
        }
    }

    fn received(
        &mut self,
        side: Side,
        what: Received,
        more: bool,
        nonempty: bool,
        cx: &mut Context<'_>,
    ) {
        match (side, &mut self.backend) {
            (Side::Client, _) => self.client.received(&what, more, nonempty),
            (Side::Backend, Some(line)) => line.received(&what, more, nonempty),
            (Side::Backend, None) => debug_assert!(false, "a released connection is the worker's"),
        }
        match (side, what) {
            (Side::Client, Received::Data(buf)) => self.take_from_user(buf, cx),
            (Side::Client, Received::End) => self.user_finished(cx),
            (Side::Client, Received::Failed(_)) => self.end(EndReason::ClientReset, true, cx),
            (Side::Backend, Received::Data(buf)) => {
                self.active = cx.now;
                self.take_from_backend(buf, cx);
            }
            (Side::Backend, Received::End | Received::Failed(_)) => self.backend_finished(cx),
            (_, Received::NoBuffers | Received::Stopped) => {}
        }
    }

    fn take_from_user(&mut self, buf: Buf, cx: &mut Context<'_>) {
        if buf.is_empty() {
            return cx.pool.give_back(buf);
        }
        if let Some(front) = &mut self.front {
            front.received(cx.pool.bytes(&buf), cx.now);
        }
        match self.phase {
            Phase::Head if self.is_packing() => self.keep_for_later(buf, cx.pool),
            Phase::Head => {
                // The whole head has one time limit, however its bytes arrive.
                if self.stash.is_empty() {
                    self.active = cx.now;
                }
                self.read_block(buf, cx);
            }
            Phase::Exchange => {
                self.active = cx.now;
                match self.exchange.upload {
                    Upload::Flowing(_) => self.take_body(buf, cx),
                    Upload::Done => self.keep_for_later(buf, cx.pool),
                    Upload::Last | Upload::Abandoned => cx.pool.give_back(buf),
                }
            }
            Phase::Lingering { .. } => {
                self.active = cx.now;
                cx.pool.give_back(buf);
            }
            Phase::Http2 | Phase::Tunnel(_) | Phase::Over(_) => cx.pool.give_back(buf),
        }
    }

    /// The user will send no more. Requests that are already complete are still answered.
    fn user_finished(&mut self, cx: &mut Context<'_>) {
        match self.phase {
            Phase::Head if self.keeps_requests() => self.departing = false,
            Phase::Head | Phase::Lingering { .. } => self.end(EndReason::Finished, false, cx),
            Phase::Exchange if matches!(self.exchange.upload, Upload::Flowing(_)) => {
                self.malformed(Malformed::new(400, "the request's body ended early"), cx);
            }
            Phase::Http2 => self.front.iter_mut().for_each(|front| front.ended()),
            _ => {}
        }
    }

    /// What the user sends can no longer be understood.
    pub(super) fn malformed(&mut self, fault: Malformed, cx: &mut Context<'_>) {
        self.begin_exchange(cx.now);
        self.exchange.close = true;
        self.stash = Stash::EMPTY;
        self.stash_seen = 0;
        if self.exchange.status == 0 {
            self.answer_ourselves(fault.status, fault.reason, cx);
        } else {
            self.abandon_upload(cx);
            self.cut_short(fault.reason);
        }
    }

    /// Answers a request that no backend needs to see: an `OPTIONS` that may go no further.
    pub(super) fn answer_for_us(&mut self, cx: &mut Context<'_>) {
        self.begin_exchange(cx.now);
        self.stash_seen = 0;
        self.answer_ourselves(200, "this is a balancer", cx);
    }

    /// The pool is empty down to the last block kept back: whoever needs one now has to go.
    pub(super) fn exhausted(&mut self, cx: &mut Context<'_>) {
        self.end(EndReason::NoBuffers, true, cx);
    }

    pub(super) fn begin_exchange(&mut self, now: Now) {
        if matches!(self.phase, Phase::Head) {
            self.phase = Phase::Exchange;
            self.active = now;
            self.exchange.times.read = now;
        }
    }

    pub(super) fn must_close(&self) -> bool {
        self.draining || self.retiring || self.exchange.close || !self.exchange.upload_is_done()
    }

    pub(super) fn abandon_upload(&mut self, cx: &mut Context<'_>) {
        if matches!(self.exchange.upload, Upload::Flowing(_)) {
            self.exchange.upload = Upload::Abandoned;
            self.exchange.close = true;
        }
        self.exchange.expects_continue = false;
        cx.pool.give_back_chain(self.upward.take());
    }

    fn sent_to_user(&mut self, bytes: usize, cx: &mut Context<'_>) {
        self.client.sent(bytes, &mut self.downward, cx.pool);
        self.moved[1] += bytes as u64;
        if !matches!(self.phase, Phase::Lingering { .. }) {
            self.active = cx.now;
        }
    }

    pub(super) fn request_is_out(&self) -> bool {
        let sending = self.backend.as_ref().is_some_and(|line| !line.sending().is_empty());
        self.exchange.upload_is_done() && self.upward.is_empty() && !sending
    }

    /// The one place that decides what happens next, from the present state.
    pub(super) fn advance(&mut self, cx: &mut Context<'_>) {
        if self.is_http2() {
            return self.drive(cx);
        }
        loop {
            let has_more = matches!(self.phase, Phase::Head) && self.stash.len() > self.stash_seen;
            if has_more && !self.is_packing() {
                self.read_stash(cx);
            }
            self.flush(cx);
            self.let_go(cx);
            if !self.conclude(cx) {
                break;
            }
        }
        match self.phase {
            // What was asked before has been answered, and what is left will never be a request.
            Phase::Head if !self.client.is_open() => self.end(EndReason::Finished, false, cx),
            Phase::Over(_) => self.clear(cx.pool),
            _ => {}
        }
        self.ask(cx);
    }

    fn flush(&mut self, cx: &mut Context<'_>) {
        let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
        if let Some(line) = &mut self.backend {
            line.send(Side::Backend, &mut self.upward, cx.pool, out);
        }
        if !matches!(self.phase, Phase::Over(_) | Phase::Tunnel(_)) {
            self.client.send(Side::Client, &mut self.downward, cx.pool, out);
        }
    }

    /// Lets go of the backend's connection once the response is complete: for anyone's next request
    /// if both messages ended where they should, otherwise to be closed.
    fn let_go(&mut self, cx: &mut Context<'_>) {
        if !matches!(self.phase, Phase::Exchange) || !matches!(self.exchange.answer, Answer::Done) {
            return;
        }
        let Some(line) = &self.backend else { return };
        let usable = self.exchange.keep.is_some() && line.is_open() && line.takes();
        if usable && (self.exchange.upload_is_done() || self.exchange.wants_rest) {
            // The backend has answered in full and still reads, so the request is sent to its end.
            if !self.request_is_out() {
                return;
            }
        } else {
            self.exchange.keep = None;
            self.abandon_upload(cx);
        }
        self.release(cx);
    }

    pub(super) fn release(&mut self, cx: &mut Context<'_>) {
        let Some(line) = self.backend.take() else { return };
        debug_assert!(self.released.is_none(), "the worker takes what is released at once");
        let private = self.exchange.private;
        // It goes when its user goes, and this user will ask nothing more.
        let over = private && (self.exchange.close || self.draining);
        let keep = self.exchange.keep.take().filter(|_| !over);
        self.released = Some(Released { line, keep, private, reset: false });
        cx.out.push(GatewayCmd::Release);
    }

    /// Ends the exchange when all of it is done; true when the next may begin.
    fn conclude(&mut self, cx: &mut Context<'_>) -> bool {
        let done = matches!(self.phase, Phase::Exchange)
            && matches!(self.exchange.answer, Answer::Done)
            && self.backend.is_none()
            && self.downward.is_empty()
            && self.client.sending().is_empty();
        if !done {
            return false;
        }
        self.active = cx.now;
        if self.exchange.cut.is_some_and(|cut| cut.reset) {
            self.end(EndReason::BackendReset, true, cx);
            return false;
        }
        self.log(cx);
        if !self.exchange.close && !self.draining {
            self.phase = Phase::Head;
            return !self.stash.is_empty();
        }
        self.linger(cx);
        false
    }

    /// Says that no more will come, and goes on reading until the user is done or silent: closing
    /// with bytes unread would send a reset, which takes the last response from a user that has not
    /// read it yet (RFC 9112 9.6).
    pub(super) fn linger(&mut self, cx: &mut Context<'_>) {
        self.stash = Stash::EMPTY;
        let rest = matches!(self.exchange.upload, Upload::Abandoned);
        self.phase = Phase::Lingering { rest, until: cx.now.plus(LINGER_MAX) };
        self.active = cx.now;
        if self.client.is_open() {
            cx.out.push(GatewayCmd::Wire(proxy::StreamCmd::FinishWriting { side: Side::Client }));
        } else {
            self.end(EndReason::Finished, false, cx);
        }
    }

    fn log(&mut self, cx: &mut Context<'_>) {
        self.exchange.times.ended = cx.now;
        let record =
            self.exchange.record(self.session, self.address, self.door.is_tls, self.is_stream);
        if let Some(service) = record.service.and_then(|id| cx.snapshot.service(id)) {
            let (answers, worker) = (&service.gate.answers, record.session.worker);
            answers.request(worker, record.has_failed());
            if let Some(took) = record.waited() {
                answers.first_byte(worker, took);
            }
        }
        cx.journal.record(&record);
    }
}
