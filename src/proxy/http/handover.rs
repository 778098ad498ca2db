//! What a request goes through on its backend's connection: it is given one or is refused, it is sent, or the connection closes
//! under it, and it is offered to another backend. Owns the rule for repeating a request: only if
//! none of it was sent, or if carrying it out twice changes nothing, all of it is here, and a
//! connection that had been used before closed without a byte of an answer (RFC 9110 9.2.2, RFC
//! 9112 9.3.1).

use super::exchange::Answer;
use super::gateway::{Gateway, Phase};
use super::{Assigned, Context, GatewayCmd, Refused};
use crate::cluster::{BackendId, FALLBACKS_MAX, ServiceId};
use crate::proxy::Side;
use crate::proxy::line::Line;

impl Gateway {
    /// Gives the request that asked for one a connection to a backend.
    pub fn assigned(&mut self, backend: BackendId, what: Assigned, cx: &mut Context<'_>) {
        debug_assert!(self.wants_backend(), "a backend is assigned to whoever asked");
        (self.active, self.heard) = (cx.now, cx.now);
        self.backend = Some(what.line);
        let exchange = &mut self.exchange;
        exchange.backend = Some(backend);
        exchange.reused = what.reused;
        exchange.private = what.private || exchange.login;
        exchange.answer = Answer::Head;
        exchange.times.connected = Some(cx.now);
        self.advance(cx);
    }

    /// There is no connection for the request that asked. `backend` is the last one that was tried.
    pub fn refused(&mut self, why: Refused, backend: Option<BackendId>, cx: &mut Context<'_>) {
        debug_assert!(self.wants_backend(), "only who asked can be refused");
        self.exchange.backend = backend.or(self.exchange.backend);
        self.exchange.is_full = why.is_for_want_of_room();
        let (status, detail) = why.answer();
        self.answer_ourselves(status, detail, cx);
        self.advance(cx);
    }

    /// Whether the request may be left to one more service.
    pub fn may_fall_back(&self) -> bool {
        self.wants_backend() && self.exchange.fallbacks < FALLBACKS_MAX
    }

    /// Leaves the request that asked for a backend to another service, which answers for it from here on.
    pub fn fall_back(&mut self, to: ServiceId, cx: &mut Context<'_>) {
        debug_assert!(self.may_fall_back(), "the chain of fallbacks ends");
        let exchange = &mut self.exchange;
        exchange.asked = exchange.asked.or(exchange.service);
        exchange.fallbacks += 1;
        exchange.service = Some(to);
        exchange.limits = cx.snapshot.request_limits(to);
        cx.out.extend(exchange.wish().map(GatewayCmd::Obtain));
    }

    /// Whether [`GatewayCmd::Obtain`] has not been answered yet.
    pub fn wants_backend(&self) -> bool {
        matches!(self.phase, Phase::Exchange) && matches!(self.exchange.answer, Answer::Obtaining)
    }

    pub(super) fn sent_to_backend(&mut self, bytes: usize, cx: &mut Context<'_>) {
        self.active = cx.now;
        self.moved[0] += bytes as u64;
        let Some(line) = &mut self.backend else { return };
        let whole = bytes == line.sending().bytes() && self.upward.is_empty();
        // A request that waits for its answer keeps nothing of the reserve.
        if whole && self.exchange.may_keep() && !cx.pool.is_used_up() {
            self.exchange.kept = line.take_sent();
        } else {
            line.sent(bytes, &mut self.upward, cx.pool);
        }
        self.exchange.sent = true;
        if self.exchange.lost {
            self.backend_lost(cx);
        }
    }

    /// The backend takes no more. Its answer may still be on its way.
    pub(super) fn send_to_backend_failed(&mut self, cx: &mut Context<'_>) {
        let Some(line) = &mut self.backend else { return };
        let unsent = line.send_failed();
        let ended = !line.is_open();
        let untouched = !self.exchange.sent
            && matches!(self.exchange.answer, Answer::Head)
            && self.exchange.stash.is_empty()
            && self.exchange.status == 0;
        self.exchange.keep = None;
        if untouched {
            // The connection was closed before we used it, so the backend has seen nothing of this
            // request.
            self.exchange.kept = unsent;
            return self.try_another(cx);
        }
        cx.pool.give_back_chain(unsent);
        self.abandon_upload(cx);
        if ended || self.exchange.lost {
            self.backend_lost(cx);
        }
    }

    pub(super) fn backend_finished(&mut self, cx: &mut Context<'_>) {
        let properly = self.backend.as_ref().is_some_and(Line::ended_properly);
        self.exchange.keep = None;
        match self.exchange.answer {
            Answer::Head => self.give_up_backend(cx),
            Answer::Flowing(_) => self.answer_ended(properly, cx),
            Answer::Obtaining | Answer::Done => {}
        }
    }

    /// Nothing more is expected of this connection. What became of the request on it decides
    /// whether another backend may get it.
    pub(super) fn give_up_backend(&mut self, cx: &mut Context<'_>) {
        let Some(line) = &mut self.backend else { return };
        self.exchange.keep = None;
        if line.sending().is_empty() {
            return self.backend_lost(cx);
        }
        self.exchange.lost = true;
        line.stop(Side::Backend, &mut |what| cx.out.push(GatewayCmd::Wire(what)));
    }

    /// The backend's connection ended before a final response.
    fn backend_lost(&mut self, cx: &mut Context<'_>) {
        let silent = self.exchange.stash.is_empty() && !self.exchange.interim;
        self.exchange.lost = true;
        if silent && !self.exchange.kept.is_empty() {
            self.try_another(cx);
        } else {
            self.answer_ourselves(502, "the backend closed the connection before it answered", cx);
        }
    }

    /// Offers the request to another backend, if that is allowed.
    pub(super) fn try_another(&mut self, cx: &mut Context<'_>) {
        if self.exchange.attempt >= self.exchange.limits.retries {
            return self.answer_ourselves(502, "the backends closed the connection", cx);
        }
        self.release(cx);
        let mut again = self.exchange.kept.take();
        while let Some(buf) = cx.pool.pop(&mut self.upward) {
            cx.pool.push(&mut again, buf);
        }
        self.upward = again;
        let exchange = &mut self.exchange;
        exchange.attempt += 1;
        exchange.answer = Answer::Obtaining;
        (exchange.sent, exchange.lost) = (false, false);
        cx.out.extend(exchange.wish().map(GatewayCmd::Obtain));
    }
}
