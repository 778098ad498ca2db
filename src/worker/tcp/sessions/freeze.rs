//! Sessions of a worker that is frozen: nothing moves a byte or connects, and what completes meanwhile is
//! kept by its session, so that the worker can go on as if nothing had been, or another in its place.
//!
//! Receives stay armed: they find no block (`Ring::withdraw`), so they end without having taken anything.

use super::{Cmd, Cx, Phase, Session, Sessions};
use crate::base::time::Now;
use crate::proxy::Side;
use crate::worker::slots::Key;

impl Sessions {
    /// From now on begins nothing. Sends under way go on; connection attempts are taken back.
    pub fn freeze(&mut self, cx: &mut Cx<'_>) {
        self.is_frozen = true;
        for key in self.slots.keys(|session| session.phase == Phase::Connecting) {
            let Some(session) = self.slots.get(key) else { continue };
            session.phase = Phase::Recalled;
            cx.out.push(Cmd::CancelConnect { key });
        }
    }

    /// Takes the sends back that are still under way. Called once in a freeze.
    pub fn cancel_sends(&mut self, cx: &mut Cx<'_>) {
        for key in self.slots.keys(|session| session.phase == Phase::Relaying) {
            let Some(session) = self.slots.get(key) else { continue };
            let to = session.sent_to();
            session.relay.cancel_sends(to, &mut |what| cx.out.push(Cmd::Relay { key, what }));
        }
    }

    /// Whether nothing is under way any more that could move a byte or end a session.
    pub fn is_still(&mut self) -> bool {
        self.slots.iter_mut().all(|session| session.is_still())
    }

    /// Goes on.
    pub fn thaw(&mut self, cx: &mut Cx<'_>) {
        self.is_frozen = false;
        for key in self.slots.keys(|session| session.phase == Phase::Waiting) {
            self.connect_again(key, cx);
        }
        // All of them ask anew, and none may wait twice.
        self.starved.clear();
        for key in self.slots.keys(|session| session.phase == Phase::Relaying) {
            self.relay_again(key, cx);
        }
    }

    /// Connects to the backend that the user has been given already, unless the worker is frozen.
    pub(super) fn connect_again(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key).filter(|_| !self.is_frozen) else { return };
        session.phase = Phase::Connecting;
        let choice = session.entry.choice().expect("one that waits has been given a backend");
        cx.out.push(Cmd::Connect { key, to: choice.address });
        self.deadlines.schedule(key.place, session.due(session.timeouts(cx)));
    }

    fn relay_again(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        let relay_out = &mut |what| cx.out.push(Cmd::Relay { key, what });
        session.relay.thaw(cx.pool, session.features, relay_out);
        if session.look_at == Now::NEVER && session.relay.is_sending() {
            session.begin_to_look(cx);
        }
        self.deadlines.schedule(key.place, session.due(session.timeouts(cx)));
        self.follow(key, cx);
    }
}

impl Session {
    fn is_still(&self) -> bool {
        match self.phase {
            Phase::Waiting | Phase::Parting(_) => true,
            Phase::Connecting | Phase::Recalled => false,
            Phase::Ending { connect, .. } => !connect && !self.relay.in_flight(),
            Phase::Relaying => !self.sent_to().iter().any(|side| self.relay.is_sent_to(*side)),
        }
    }

    /// The sides to which sends are operations of the kernel's.
    fn sent_to(&self) -> &'static [Side] {
        if self.is_sealed { &[Side::Backend] } else { &Side::BOTH }
    }
}
