//! What becomes of a user's connection when its backend agrees to another protocol (RFC 9110 7.8):
//! a relay whose bytes are no longer read.

use super::gateway::{Gateway, Phase};
use super::stash::Stash;
use super::{Context, GatewayCmd};
use crate::proxy::tcp::{Progress, Relay};
use crate::ring::pool::Buf;

impl Gateway {
    /// The backend has agreed to another protocol: from here on bytes pass unread, starting with
    /// those that are already here.
    pub(super) fn change_protocol(&mut self, rest: Buf, cx: &mut Context<'_>) {
        self.exchange.status = 101;
        self.exchange.times.answered = Some(cx.now);
        cx.out.push(GatewayCmd::Answered);
        self.write_scratch(cx);
        // The request has been answered, and will not be sent again.
        cx.pool.give_back_chain(self.exchange.kept.take());
        let Some(backend) = self.backend.take() else { return cx.pool.give_back(rest) };
        if rest.is_empty() {
            cx.pool.give_back(rest);
        } else {
            cx.pool.push(&mut self.downward, rest);
        }
        let ahead = std::mem::replace(&mut self.stash, Stash::EMPTY);
        if cx.kit.append(&mut self.upward, ahead.bytes(), cx.pool).is_err() {
            self.backend = Some(backend);
            return self.exhausted(cx);
        }
        let client = std::mem::take(&mut self.client);
        let mut relay =
            Relay::resume((client, self.downward.take()), (backend, self.upward.take()));
        let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
        relay.advance(cx.pool, cx.features, out);
        self.phase = Phase::Tunnel(relay);
        self.follow_tunnel(cx);
    }

    pub(super) fn follow_tunnel(&mut self, cx: &mut Context<'_>) {
        if let Phase::Tunnel(relay) = &self.phase
            && let Progress::Over(reason) = relay.progress()
        {
            self.end(reason, false, cx);
        }
    }
}
