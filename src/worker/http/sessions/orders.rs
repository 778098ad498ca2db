//! Orders of the control core to API users. Owns whom each concerns.

use super::{Cx, Sessions, User};
use crate::session::EndReason;
use crate::worker::books::Entry;
use crate::worker::ends::Ends;
use crate::worker::grace;
use crate::worker::link::Order;
use crate::worker::slots::Key;

impl Sessions {
    /// Carries out an order that concerns API users.
    pub fn order(&mut self, order: Order, cx: &mut Cx<'_>) {
        match order {
            Order::EndBackend { .. } => self.end_backends(&Ends::of(order), cx),
            Order::EndSession { id, reason } => {
                let is_named = |entry: &Entry| !entry.is_lent() && cx.books.id(entry) == id;
                let found = self.users.find(|user| user.entry.as_ref().is_some_and(is_named));
                if let Some(key) = found {
                    self.end(key, reason, cx);
                }
            }
            Order::Stop => {
                (self.draining, self.stopping) = (true, true);
                self.end_all(|_| true, EndReason::Stopping, cx);
                self.hurry_links(cx.now, grace::STOP);
                self.drop_all_spares(cx);
            }
            Order::Drain => {
                self.draining = true;
                for key in self.users.keys(|user| user.stream_of.is_none()) {
                    self.see_off(key, cx);
                }
                self.drop_all_spares(cx);
            }
        }
    }

    /// As one [`Order::EndBackend`] for each of these.
    pub fn end_backends(&mut self, ends: &Ends, cx: &mut Cx<'_>) {
        let reason = |user: &User| {
            user.entry.as_ref().filter(|_| user.link.is_some()).and_then(|it| ends.reason_for(it))
        };
        for key in self.users.keys(|user| reason(user).is_some()) {
            let why = self.users.get(key).and_then(|user| reason(user));
            if let Some(why) = why {
                self.end(key, why, cx);
            }
        }
    }

    fn end_all(&mut self, which: impl Fn(&User) -> bool, reason: EndReason, cx: &mut Cx<'_>) {
        for key in self.users.keys(which) {
            self.end(key, reason, cx);
        }
    }

    pub(super) fn end(&mut self, key: Key, reason: EndReason, cx: &mut Cx<'_>) {
        if !self.users.has(key) {
            // It has ended with its connection.
            return;
        }
        let grace = grace::of(reason);
        if !self.hurry_user(cx.now, key, grace) {
            self.act(key, cx, |gateway, context| gateway.end(reason, true, context));
            self.hurry_user(cx.now, key, grace);
        }
    }
}
