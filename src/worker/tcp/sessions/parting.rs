//! Sessions that have fallen still, and the last moments of those that are over: what the kernel says of
//! their send queues, and what follows. Owns how long a session stays for bytes not yet delivered.
//!
//! Bytes reach the kernel long before they reach the peer, and a reset, with which a truncated stream must
//! end, discards what is still queued. So a session that is over keeps its sockets until the queues are
//! empty or nobody reads from them any more; only then is it known what was delivered.

use super::{Cmd, Cx, Phase, Session, Sessions};
use crate::base::time::Now;
use crate::cluster::Timeouts;
use crate::proxy::outlook::{LOOK_EVERY, Outlook, Standing};
use crate::proxy::{self, Side};
use crate::session::EndReason;
use crate::worker::grace::{self, Pause};
use crate::worker::slots::Key;

/// The wait for the send queues of a session that is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Parting {
    reason: EndReason,
    /// Who has ordered the end; orders do not wait for slow readers.
    ordered: Option<EndReason>,
    until: Now,
    pause: Pause,
}

impl Parting {
    fn new(reason: EndReason, ordered: Option<EndReason>, now: Now, spent: bool) -> Parting {
        let until = if spent { now } else { Now::NEVER };
        let mut parting = Parting { reason, ordered: None, until, pause: Pause::FIRST };
        ordered.into_iter().for_each(|order| parting.hurry(now, order));
        parting
    }

    fn hurry(&mut self, now: Now, order: EndReason) {
        self.ordered = Some(order);
        self.until = self.until.min(now.plus(grace::of(order)));
    }
}

impl Sessions {
    /// The kernel has said how a session's send queues stand, by side: the answer to [`Cmd::Look`].
    pub fn told(&mut self, key: Key, outlooks: [Outlook; 2], cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        let sent = session.active;
        let standings =
            Side::BOTH.map(|side| session.look(side, cx.now, sent, &outlooks[side as usize]));
        if standings.contains(&Standing::Moving) {
            session.active = cx.now;
        }
        match session.phase {
            Phase::Relaying => self.go_on(key, outlooks, standings, cx),
            Phase::Parting(parting) => self.part(key, parting, outlooks, standings, cx),
            Phase::Connecting | Phase::Ending { .. } => {}
        }
    }

    /// A relaying session has been looked at: it is over if its time is up or a host has vanished.
    fn go_on(
        &mut self,
        key: Key,
        outlooks: [Outlook; 2],
        standings: [Standing; 2],
        cx: &mut Cx<'_>,
    ) {
        let Some(session) = self.slots.get(key) else { return };
        if standings.contains(&Standing::Vanished) {
            return self.end(key, EndReason::Idle, cx);
        }
        if session.ends_at(session.timeouts(cx)) <= cx.now {
            let half = session.half_closed;
            let reason = if half { EndReason::HalfCloseIdle } else { EndReason::Idle };
            return self.end(key, reason, cx);
        }
        // With both queues empty there is nothing to see until more is sent.
        let queued = session.relay.is_sending() || outlooks.iter().any(|one| one.queued > 0);
        let timeouts = session.timeouts(cx);
        session.look_at = if queued { session.next_look(cx.now, timeouts) } else { Now::NEVER };
        self.deadlines.schedule(key.place, session.due(timeouts));
    }

    /// The end of a session that is ending already is ordered.
    pub(super) fn hurry(&mut self, now: Now, key: Key, order: EndReason) {
        if !grace::is_order(order) {
            return;
        }
        let Some(session) = self.slots.get(key) else { return };
        match &mut session.phase {
            Phase::Ending { ordered, .. } => *ordered = Some(order),
            Phase::Parting(parting) => {
                parting.hurry(now, order);
                session.look_at = session.look_at.min(parting.until);
                self.deadlines.schedule(key.place, session.look_at);
            }
            Phase::Connecting | Phase::Relaying => {}
        }
    }

    /// Nothing is in flight any more for a session that is over: all it will ever send is in the kernel's
    /// queues.
    pub(super) fn begin_to_part(
        &mut self,
        key: Key,
        reason: EndReason,
        ordered: Option<EndReason>,
        cx: &mut Cx<'_>,
    ) {
        let Some(session) = self.slots.get(key) else { return };
        let timed_out = matches!(reason, EndReason::Idle | EndReason::HalfCloseIdle);
        let spent = timed_out && session.ends_at(session.timeouts(cx)) <= cx.now;
        if !spent {
            session.active = cx.now;
        }
        session.phase = Phase::Parting(Parting::new(reason, ordered, cx.now, spent));
        session.look_at = Now::NEVER;
        for side in Side::BOTH.into_iter().filter(|side| session.relay.is_spliced(*side)) {
            cx.out.push(Cmd::Relay { key, what: proxy::StreamCmd::EndSplice { side } });
        }
        self.deadlines.cancel(key.place);
        cx.out.push(Cmd::Look { key });
    }

    /// Closes a session whose queues are empty, or that has waited long enough for them.
    fn part(
        &mut self,
        key: Key,
        mut parting: Parting,
        outlooks: [Outlook; 2],
        standings: [Standing; 2],
        cx: &mut Cx<'_>,
    ) {
        let Some(session) = self.slots.get(key) else { return };
        let lost = Side::BOTH.map(|side| session.undelivered(side, &outlooks[side as usize]));
        let takes = |side: Side| {
            let (outlook, standing) = (&outlooks[side as usize], standings[side as usize]);
            lost[side as usize] > 0 && !outlook.dead && standing != Standing::Vanished
        };
        let until = parting.until.min(session.active.plus(session.timeouts(cx).tcp_idle));
        if Side::BOTH.into_iter().any(takes) && cx.now < until {
            session.look_at = cx.now.plus(parting.pause.take()).min(until);
            session.phase = Phase::Parting(parting);
            return self.deadlines.schedule(key.place, session.look_at);
        }
        let reset_by = Side::BOTH
            .into_iter()
            .find(|side| lost[*side as usize] > 0 && outlooks[*side as usize].dead);
        let reason = match (parting.reason, reset_by) {
            (EndReason::Finished, _) if lost == [0; 2] => EndReason::Finished,
            (EndReason::Finished, Some(Side::Client)) => EndReason::ClientReset,
            (EndReason::Finished, Some(Side::Backend)) => EndReason::BackendReset,
            (EndReason::Finished, None) => parting.ordered.unwrap_or(EndReason::Idle),
            (reason, _) => reason,
        };
        self.close(key, reason, lost, cx);
    }

    /// Closes a session with nothing in flight. `lost`: bytes in each side's send queue that will not reach
    /// the peer.
    pub(super) fn close(&mut self, key: Key, reason: EndReason, lost: [u32; 2], cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        // Known only now: operations in flight may have brought bytes that could not be passed on.
        let truncated = session.relay.is_truncated() || lost != [0; 2];
        let reset = reason.is_reset(truncated);
        session.relay.release(cx.pool);
        let [down, up] = lost.map(u64::from);
        cx.books.undelivered(&mut session.entry, up, down);
        if let Some(Session { entry, .. }) = self.slots.remove(key) {
            cx.books.close(entry, reason, cx.now);
        }
        self.deadlines.cancel(key.place);
        cx.out.push(Cmd::Close { key, reset });
    }
}

impl Session {
    fn look(&mut self, side: Side, now: Now, sent: Now, outlook: &Outlook) -> Standing {
        self.watches[side as usize].look(now, sent, outlook)
    }

    /// When a session that was sent to, or has bytes queued, is looked at next.
    pub(super) fn next_look(&self, now: Now, timeouts: &Timeouts) -> Now {
        let every = LOOK_EVERY.min(self.patience(timeouts) / 4);
        let gives_up = self.watches.iter().filter_map(|watch| watch.gives_up_at());
        gives_up.fold(now.plus(every), Now::min)
    }

    /// Bytes the kernel still holds for a side, without the FIN, which it counts as one.
    fn undelivered(&self, side: Side, outlook: &Outlook) -> u32 {
        outlook.queued.saturating_sub(self.relay.has_finished(side).into())
    }
}
