//! Users who are let go: those for whom there is no room, whose head is no longer waited for, or
//! who hold too much. Owns what they are told, and what of their connection can still be served.

use std::net::SocketAddr;

use super::exchange::Upload;
use super::gateway::{Gateway, Phase};
use super::stash::Stash;
use super::{Context, Refused};
use crate::base::time::Now;
use crate::cluster::{Barrier, Doorway};
use crate::session::{EndReason, SessionId};

impl Refused {
    /// Whether there would be a backend if there were room.
    pub(super) const fn is_for_want_of_room(self) -> bool {
        match self {
            Refused::Barred(Barrier::Users) => false,
            Refused::Barred(_) | Refused::Exhausted => true,
            _ => false,
        }
    }

    /// The status and the reason in the answer to a request without a backend.
    pub(super) const fn answer(self) -> (u16, &'static str) {
        match self {
            Refused::NoBackend => (503, "no backend is registered"),
            Refused::AllFail => (503, "every backend fails its check"),
            Refused::AllDrain => (503, "every backend is draining"),
            Refused::NoneServes => (503, "every backend fails its check or is draining"),
            Refused::Barred(barrier @ Barrier::Users) => (403, barrier.why()),
            Refused::Barred(barrier) => (503, barrier.why()),
            Refused::Maintenance => (503, "the service is under maintenance"),
            Refused::Unreachable => (502, "no backend could be reached"),
            Refused::TimedOut => (504, "no backend could be reached in time"),
            Refused::Exhausted => (503, "no further connection can be opened"),
        }
    }
}

impl Gateway {
    /// Welcomes a user for whom there is no room; it is told so when it sends a request.
    pub fn refusing(
        session: SessionId,
        door: Doorway,
        client: SocketAddr,
        why: &'static str,
        now: Now,
    ) -> Gateway {
        let mut gateway = Gateway::new(session, door, client, false, now);
        gateway.refuses = Some(why);
        gateway
    }

    /// Bytes that the connection holds on the heap.
    pub fn held(&self) -> usize {
        self.stash.held() + self.exchange.stash.held() + self.streams_held()
    }

    /// When the request being read or served began.
    pub fn began(&self) -> Now {
        self.exchange.times.began
    }

    /// Frees what is held on the heap. The user's connection ends, since nobody knows any more
    /// where in it a request begins. What was asked before is still answered.
    pub fn lighten(&mut self, cx: &mut Context<'_>) {
        const FULL: &str = "too many requests are not complete";
        match self.phase {
            Phase::Head => self.refuse_half(503, FULL, cx),
            Phase::Exchange => {
                self.stash = Stash::EMPTY;
                self.stash_seen = 0;
                let whole = self.exchange.upload_is_done();
                self.exchange.upload = if whole { Upload::Last } else { Upload::Abandoned };
                self.exchange.close = true;
                if self.exchange.stash.held() > 0 && self.exchange.status == 0 {
                    self.answer_ourselves(503, FULL, cx);
                }
            }
            Phase::Http2 => self.end(EndReason::NoBuffers, true, cx),
            Phase::Lingering { .. } | Phase::Tunnel(_) | Phase::Over(_) => {}
        }
        self.advance(cx);
    }

    /// Answers a request whose head is no longer waited for.
    pub(super) fn refuse_half(&mut self, status: u16, why: &'static str, cx: &mut Context<'_>) {
        self.begin_exchange(cx.now);
        self.exchange.note_line(self.stash.bytes());
        self.exchange.close = true;
        // This much may be known already: the user expects no body.
        self.exchange.to_head_request = self.stash.bytes().starts_with(b"HEAD ");
        self.stash = Stash::EMPTY;
        self.stash_seen = 0;
        self.answer_ourselves(status, why, cx);
    }
}
