//! What is due among the API users of a worker, and when. Owns the two wheels' turning; what becomes of whoever is late
//! is decided where it is told.

use super::{Cmd, Conn, Cx, Sessions, State};
use crate::base::time::Now;
use crate::worker::slots::Key;

impl Sessions {
    /// Ends what has been still for too long, and drops spare connections nobody can use.
    pub fn expire(&mut self, cx: &mut Cx<'_>) {
        if self.live() > 0 || self.kit.has_left_over() {
            self.kit.refill(self.live(), cx.pool);
        }
        while let Some(place) = self.deadlines.pop(cx.now) {
            let Some(key) = self.users.at(place) else { continue };
            let Some(user) = self.users.get(key) else { continue };
            user.scheduled = Now::NEVER;
            if user.leaving.is_some() {
                cx.out.push(Cmd::Look { conn: Conn::User(key) });
                continue;
            }
            let due = user.gateway.deadline(&self.settings).is_some_and(|due| due <= cx.now);
            let at_work = user.gateway.is_sending() || user.gateway.is_tunnel();
            match (due || user.looks.at <= cx.now, at_work) {
                (true, true) => self.look(key, cx),
                (true, false) if due => {
                    self.act(key, cx, |gateway, context| gateway.expire(context));
                }
                (true, false) => {
                    user.looks.at = Now::NEVER;
                    self.schedule(key);
                }
                (false, _) => self.schedule(key),
            }
        }
        while let Some(place) = self.connects.pop(cx.now) {
            let Some(link) = self.links.at(place) else { continue };
            match self.links.get(link).map(|link| &mut link.state) {
                Some(State::Connecting { timed_out, .. }) => {
                    // Its completion says ECANCELED, and `connected` goes on from there.
                    *timed_out = true;
                    cx.out.push(Cmd::CancelConnect { link });
                }
                Some(State::Trunk(shared)) if shared.is_connecting() => {
                    shared.timed_out = true;
                    cx.out.push(Cmd::CancelConnect { link });
                }
                Some(State::Leaving(_)) => cx.out.push(Cmd::Look { conn: Conn::Link(link) }),
                _ => {}
            }
        }
        self.sweep(cx);
    }

    /// When [`Sessions::expire`] or [`Sessions::relieve`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        let sweep = (self.sweep_at != Now::NEVER).then_some(self.sweep_at);
        let again = self.starved.next_try();
        let wheels = [self.deadlines.next_deadline(), self.connects.next_deadline()];
        wheels.into_iter().chain([sweep, again]).flatten().min()
    }

    /// Schedules the user's deadline, unless it will be looked at before anyway.
    pub(super) fn schedule(&mut self, key: Key) {
        let Some(user) = self.users.get(key) else { return };
        let due = user.gateway.deadline(&self.settings).unwrap_or(Now::NEVER).min(user.looks.at);
        if due < user.scheduled && user.leaving.is_none() {
            user.scheduled = due;
            self.deadlines.schedule(key.place, due);
        }
    }
}
