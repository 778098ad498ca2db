//! API users who follow the others into another process one by one: those who were in the middle of a request when
//! their worker was left. Owns who may, and who can at this moment; how a connection comes to that is `gateway`'s.

use super::{Cx, Link, Sessions, User};
use crate::worker::slots::Key;

impl Sessions {
    /// Whether users may follow. Those who were about to are told to come again if not.
    pub fn may_depart(&mut self, may: bool, cx: &mut Cx<'_>) {
        if std::mem::replace(&mut self.departs, may) && !may {
            for key in self.users.keys(|user| user.gateway.is_departing()) {
                self.stay(key, cx);
            }
        }
    }

    /// Whether others go on in the place of those who were here.
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    /// Has a user leave who may have no further request here.
    pub(super) fn see_off(&mut self, key: Key, cx: &mut Cx<'_>) {
        let follows = self.departs && self.users.get(key).is_some_and(|user| user.may_follow());
        let has_left = self.has_left;
        self.act(key, cx, |gateway, context| match (has_left, follows) {
            (true, true) => gateway.depart(context),
            (true, false) => gateway.retire(context),
            (false, _) => gateway.drain(context),
        });
    }

    /// A user cannot follow: it is told to come again with its next answer.
    pub fn stay(&mut self, key: Key, cx: &mut Cx<'_>) {
        self.act(key, cx, |gateway, context| gateway.stay(context));
    }

    /// To be called when something has changed about a user.
    pub(super) fn list_if_packed(&mut self, key: Key) {
        let Some(user) = self.users.get(key) else { return };
        if user.gateway.is_packed() && !std::mem::replace(&mut user.is_packed, true) {
            self.packed.push(key);
        }
    }

    /// Those who can follow at this moment, each said once.
    pub fn packed(&mut self, cx: &mut Cx<'_>) -> Vec<Key> {
        let mut packed = std::mem::take(&mut self.packed);
        packed.retain(|key| self.can_follow(*key, cx));
        packed
    }

    /// A user who has logged in on a connection to a backend stays with that.
    fn can_follow(&mut self, key: Key, cx: &mut Cx<'_>) -> bool {
        let Some(user) = self.users.get(key) else { return false };
        user.is_packed = false;
        if !user.gateway.is_packed() {
            return false;
        }
        if let Some(link) = user.private {
            if matches!(self.links.get(link), Some(Link { login: true, .. })) {
                self.stay(key, cx);
                return false;
            }
            // A backend that wants to know its users is told anew.
            self.drop_spare(link, cx);
        }
        true
    }

    /// Goes on with those who have come.
    pub fn settle_in(&mut self, cx: &mut Cx<'_>) {
        for key in std::mem::take(&mut self.seated) {
            if self.users.has(key) {
                self.act(key, cx, |gateway, context| gateway.thaw(context));
            }
            if self.draining && self.users.has(key) {
                self.see_off(key, cx);
            }
        }
    }
}

impl User {
    /// The state of TLS and of HTTP/2 is in no record.
    fn may_follow(&self) -> bool {
        let is_multiplexed = self.gateway.is_http2() || self.gateway.is_stream();
        !is_multiplexed && self.entry.as_ref().is_some_and(|entry| !entry.is_tls())
    }
}
