//! How long a gateway waits for each thing, and what becomes of a peer that is too slow. Owns its
//! deadlines, and the second look at connections that have fallen still.

use super::exchange::{Answer, Upload};
use super::gateway::{Gateway, Phase};
use super::{CONTINUE_PATIENCE, Context, GatewayCmd, GatewaySettings, LINGER, REFUSED_PATIENCE};
use crate::base::time::Now;
use crate::http::answer::Taste;
use crate::proxy::line::Line;
use crate::proxy::{SECOND_LOOK, Side};
use crate::ring::pool::LARGE_BYTES;
use crate::session::EndReason;

impl Gateway {
    /// When [`Gateway::expire`] has something to do, unless something moves first.
    pub fn deadline(&self, settings: &GatewaySettings) -> Option<Now> {
        [self.ends_at(settings), self.looks_at()].into_iter().flatten().min()
    }

    /// When something last moved, or the phase began.
    pub fn active_at(&self) -> Now {
        self.active
    }

    /// A peer has acknowledged some of what the kernel holds for it.
    pub fn took(&mut self, now: Now) {
        if self.is_sending() || self.is_tunnel() {
            self.active = now;
        }
    }

    /// When to look again at a side that has fallen still, because it may have ended unnoticed.
    fn looks_at(&self) -> Option<Now> {
        let unsure = match &self.phase {
            Phase::Tunnel(relay) => relay.is_unsure(),
            Phase::Over(_) => false,
            _ => self.client.is_unsure() || self.backend.as_ref().is_some_and(Line::is_unsure),
        };
        unsure.then(|| self.heard.plus(SECOND_LOOK))
    }

    fn look_again(&mut self, cx: &mut Context<'_>) {
        let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
        if let Phase::Tunnel(relay) = &mut self.phase {
            return relay.look_again(out);
        }
        self.client.look_again(Side::Client, out);
        if let Some(line) = &mut self.backend {
            line.look_again(Side::Backend, out);
        }
    }

    /// When the present phase will have taken too long.
    fn ends_at(&self, settings: &GatewaySettings) -> Option<Now> {
        let limits = &self.exchange.limits;
        let patience = match &self.phase {
            Phase::Head if self.refuses.is_some() => settings.head_timeout.min(REFUSED_PATIENCE),
            Phase::Head if self.exchange.number == 0 || !self.stash.is_empty() => {
                settings.head_timeout
            }
            Phase::Head => settings.idle_timeout,
            Phase::Exchange => match &self.exchange.answer {
                // The worker ends connection attempts in time.
                Answer::Obtaining => return None,
                Answer::Head if self.exchange.expects_continue => CONTINUE_PATIENCE,
                Answer::Head if self.request_is_out() => limits.answer,
                Answer::Flowing(_) if self.is_conversation() => limits.tunnel_idle,
                // A send completes only when all of it has gone out, so each large block has this
                // much time.
                _ => {
                    let blocks = self.client.sending().bytes().div_ceil(LARGE_BYTES).max(1);
                    limits.body * blocks as u32
                }
            },
            Phase::Tunnel(_) => limits.tunnel_idle,
            Phase::Http2 => return self.http2_ends_at(settings),
            Phase::Lingering { rest, until } => {
                let silence = if *rest { limits.body } else { LINGER };
                return Some(self.active.plus(silence).min(*until));
            }
            Phase::Over(_) => return None,
        };
        Some(self.active.plus(patience))
    }

    /// Whether it is a call in which either side may be silent for long: both have spoken, and have been heard.
    fn is_conversation(&self) -> bool {
        let sending = self.backend.as_ref().is_some_and(|line| !line.sending().is_empty());
        self.exchange.taste == Taste::Grpc
            && self.client.sending().is_empty()
            && self.downward.is_empty()
            && self.upward.is_empty()
            && !sending
    }

    /// The deadline has passed.
    pub fn expire(&mut self, cx: &mut Context<'_>) {
        if self.looks_at().is_some_and(|at| at <= cx.now) {
            self.look_again(cx);
        }
        if self.ends_at(cx.settings).is_none_or(|end| end > cx.now) {
            return;
        }
        match self.phase {
            Phase::Head if self.stash.is_empty() => self.end(EndReason::Idle, false, cx),
            Phase::Head => {
                self.refuse_half(408, "the request was not complete in time", cx);
            }
            Phase::Exchange => self.expire_exchange(cx),
            Phase::Tunnel(_) => self.end(EndReason::Idle, false, cx),
            Phase::Http2 => self.expire_http2(cx),
            Phase::Lingering { .. } => self.end(EndReason::Finished, false, cx),
            Phase::Over(_) => {}
        }
        self.advance(cx);
    }

    fn expire_exchange(&mut self, cx: &mut Context<'_>) {
        let starving_backend = self.upward.is_empty()
            && !self.backend.as_ref().is_some_and(Line::awaits_room)
            && self.backend.as_ref().is_none_or(|line| line.sending().is_empty());
        // While blocks are scarce, nothing is read from a backend for a user that takes nothing: we
        // wait for room in its socket, or an interim response has found none.
        let unread = self.client.awaits_room() || !self.client.sending().is_empty();
        match self.exchange.answer {
            Answer::Head if self.exchange.expects_continue => {
                self.active = cx.now;
                self.say_continue(cx);
            }
            Answer::Head | Answer::Flowing(_) if unread && self.request_is_out() => {
                self.end(EndReason::Idle, true, cx);
            }
            Answer::Head if self.request_is_out() => {
                self.unanswered(504, "the backend did not answer in time", cx);
            }
            Answer::Head if matches!(self.exchange.upload, Upload::Abandoned) => {
                self.unanswered(502, "the backend did not take the request", cx);
            }
            Answer::Head if starving_backend => {
                self.answer_ourselves(408, "the request's body did not come in time", cx);
            }
            Answer::Head => self.unanswered(504, "the backend did not read in time", cx),
            Answer::Flowing(_) if unread => self.end(EndReason::Idle, true, cx),
            Answer::Flowing(_) if self.downward.is_empty() && self.client.sending().is_empty() => {
                self.active = cx.now;
                self.cut_short("the backend stopped sending");
            }
            // The rest of the request does not come, or is not taken; its answer has gone out.
            Answer::Done if self.downward.is_empty() && self.client.sending().is_empty() => {
                self.active = cx.now;
                self.exchange.keep = None;
            }
            Answer::Flowing(_) | Answer::Done => self.end(EndReason::Idle, true, cx),
            Answer::Obtaining => {}
        }
    }

    /// The backend has let its time pass, and the user is answered in its place.
    fn unanswered(&mut self, status: u16, detail: &'static str, cx: &mut Context<'_>) {
        cx.out.push(GatewayCmd::Unanswered { since: self.active });
        self.answer_ourselves(status, detail, cx);
    }
}
