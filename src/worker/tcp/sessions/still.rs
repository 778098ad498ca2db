//! Sessions of a worker that stands still: nothing moves a byte or connects, and what completes meanwhile is kept by
//! its session, so that the worker can go on as if nothing had been, or another in its place.
//!
//! Receives stay armed: they find no block (`Ring::withdraw`), so they end without having taken anything. Sessions
//! that are *apart* take no part in it; their driver keeps from them what completes.

use nix::errno::Errno;

use super::{Cmd, Cx, Phase, Session, Sessions};
use crate::base::time::Now;
use crate::cluster::ServiceId;
use crate::proxy::greeting::Caller;
use crate::proxy::{Event, Received, Side};
use crate::session::EndReason;
use crate::worker::slots::Key;

/// A session whose backend is connected to when the worker goes on.
pub(super) struct Waiting {
    key: Key,
    /// An attempt has been taken back, which may yet succeed.
    is_recalled: bool,
}

impl Waiting {
    /// One that no attempt has been made for.
    pub(super) fn seated(key: Key) -> Waiting {
        Waiting { key, is_recalled: false }
    }
}

impl Sessions {
    /// From now on nothing is begun. Sends under way go on; connection attempts are taken back.
    pub fn freeze(&mut self, is_apart: impl Fn(Key) -> bool, cx: &mut Cx<'_>) {
        for key in self.slots.keys(|session| session.phase == Phase::Connecting) {
            if !is_apart(key) {
                self.waiting.push(Waiting { key, is_recalled: true });
                cx.out.push(Cmd::CancelConnect { key });
            }
        }
    }

    /// As [`Sessions::welcome`], while the worker is to stand still: its backend is given to it, and not connected
    /// to.
    pub fn seat(&mut self, service: ServiceId, caller: Caller, cx: &mut Cx<'_>) -> Option<Key> {
        let (key, _) = self.begin(service, caller, false, cx)?;
        self.waiting.push(Waiting::seated(key));
        Some(key)
    }

    /// As [`Sessions::tried`]. A connection on which something is to be said first is made again later.
    pub fn recalled(&mut self, key: Key, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        let Some(place) = self.waiting.iter().position(|waiting| waiting.key == key) else {
            // Its end was ordered before.
            return self.connected(key, result, cx);
        };
        self.waiting[place].is_recalled = false;
        let Some(session) = self.slots.get(key) else { return };
        let is_plain = session.entry.choice().is_some_and(|choice| !choice.proxy && !choice.tls);
        if result.is_ok() && is_plain {
            self.waiting.swap_remove(place);
            self.begin_to_relay(key, cx);
        }
    }

    /// As [`Sessions::relayed`]: takes in what has happened, and begins nothing.
    pub fn note(&mut self, key: Key, event: Event, cx: &mut Cx<'_>) {
        let session = self.slots.get(key).filter(|session| session.phase == Phase::Relaying);
        let Some(session) = session else { return self.relayed(key, event, cx) };
        if let Event::Received { side, what: Received::Data(ref buf), .. } = event
            && session.unseen[side as usize]
            && session.look_at_first(side, buf, cx)
        {
            session.relay.settle(event, cx.pool);
            return self.refuse_header(key, cx);
        }
        let has_moved = matches!(
            event,
            Event::Sent { result: Ok(1..), .. } | Event::Spliced { moved: 1.., .. }
        );
        let relay_out = &mut |what| cx.out.push(Cmd::Relay { key, what });
        session.relay.note(event, cx.pool, session.features, relay_out);
        if has_moved {
            session.active = cx.now;
            session.book(cx);
        }
    }

    /// Takes back what is still under way. May be called again, for what the kernel was just about to go on with.
    pub fn take_back(&mut self, is_apart: impl Fn(Key) -> bool, cx: &mut Cx<'_>) {
        for waiting in self.waiting.iter().filter(|waiting| waiting.is_recalled) {
            cx.out.push(Cmd::CancelConnect { key: waiting.key });
        }
        for key in self.slots.keys(|session| !session.is_still()) {
            let Some(session) = self.slots.get(key).filter(|_| !is_apart(key)) else { continue };
            session.relay.cancel_sends(&mut |what| cx.out.push(Cmd::Relay { key, what }));
            if let Phase::Ending { connect: true, .. } = session.phase {
                cx.out.push(Cmd::CancelConnect { key });
            }
        }
    }

    /// Whether nothing is under way any more that could move a byte or end a session.
    pub fn is_still(&self, is_apart: impl Fn(Key) -> bool) -> bool {
        let moving = self.slots.keys(|session| !session.is_still());
        !self.waiting.iter().any(|waiting| waiting.is_recalled) && moving.into_iter().all(is_apart)
    }

    /// Forgets these sessions, which go on elsewhere: once nothing is in flight any more, their sockets are closed,
    /// and nobody is told of an end.
    pub fn leave(&mut self, keys: &[Key], cx: &mut Cx<'_>) {
        for key in keys.iter().copied() {
            let Some(session) = self.slots.get(key) else { continue };
            let (reason, connect, ordered) = (EndReason::Stopping, false, None);
            session.phase = Phase::Ending { reason, connect, ordered };
            session.is_elsewhere = true;
            session.relay.stop(&mut |what| cx.out.push(Cmd::Relay { key, what }));
            self.close_if_settled(key, cx);
        }
        let slots = &self.slots;
        self.waiting.retain(|waiting| slots.has(waiting.key));
    }

    /// The last of a session that goes on elsewhere.
    #[cold]
    pub(super) fn forget(&mut self, key: Key, cx: &mut Cx<'_>) {
        if let Some(Session { entry, mut relay, .. }) = self.slots.remove(key) {
            relay.release(cx.pool);
            cx.books.withdraw(entry);
        }
        self.deadlines.cancel(key.place);
        cx.out.push(Cmd::Close { key, reset: false });
    }

    /// Goes on. Nothing that was taken back is under way any more.
    pub fn thaw(&mut self, cx: &mut Cx<'_>) {
        for Waiting { key, .. } in std::mem::take(&mut self.waiting) {
            self.connect_again(key, cx);
        }
        // All of them ask anew, and none may wait twice.
        self.starved.clear();
        for key in self.slots.keys(|session| session.phase == Phase::Relaying) {
            self.relay_again(key, cx);
        }
    }

    /// Connects to the backend that the user has been given already.
    fn connect_again(&mut self, key: Key, cx: &mut Cx<'_>) {
        let waits = self.slots.get(key).filter(|session| session.phase == Phase::Connecting);
        let Some(session) = waits else { return };
        session.active = cx.now;
        let choice = session.entry.choice().expect("one that waits has been given a backend");
        cx.out.push(Cmd::Connect { key, to: choice.address });
        self.deadlines.schedule(key.place, session.due(session.timeouts(cx)));
    }

    fn relay_again(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        let relay_out = &mut |what| cx.out.push(Cmd::Relay { key, what });
        session.relay.thaw(cx.pool, session.features, relay_out);
        let timeouts = session.timeouts(cx);
        if session.look_at == Now::NEVER && session.relay.is_sending() {
            session.look_at = session.next_look(cx.now, timeouts);
        }
        self.deadlines.schedule(key.place, session.due(timeouts));
        self.follow(key, cx);
    }
}

impl Session {
    fn is_still(&self) -> bool {
        match self.phase {
            Phase::Connecting | Phase::Parting(_) => true,
            Phase::Ending { connect, .. } => !connect && !self.relay.in_flight(),
            Phase::Relaying => !Side::BOTH.into_iter().any(|side| self.relay.is_sent_to(side)),
        }
    }
}
