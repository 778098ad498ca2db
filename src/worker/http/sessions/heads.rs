//! What a worker's API users hold on the heap: incomplete heads and pipelined requests. Owns the sum, and
//! the choice of who goes when it is too much: the user whose request was begun first, so that those who
//! send half a head and wait make room for those who send whole ones.

use super::{Cx, Sessions, User};
use crate::worker::slots::Key;

/// Once the limit is passed, this part of it is cleared in one go: finding the oldest takes a walk over all
/// users, which one user more should not cost.
const CLEARED_SHARE: usize = 8;

impl Sessions {
    /// Brings the sum up to date with what a user holds.
    pub(super) fn weigh(&mut self, key: Key) {
        let Some(user) = self.users.get(key) else { return };
        let held = user.gateway.held();
        if held != user.held {
            self.held = self.held - user.held + held;
            user.held = held;
        }
    }

    /// Sheds users until the sum is well below the limit, if it is above.
    pub(super) fn lighten(&mut self, cx: &mut Cx<'_>) {
        let most = self.settings.held_bytes_max;
        if self.held <= most {
            return;
        }
        let mut holders = self.users.keys(|user| user.held > 0);
        let began = |user: Option<&mut User>| user.map(|user| user.gateway.began());
        holders.sort_by_cached_key(|key| began(self.users.get(*key)));
        for key in holders {
            if self.held <= most - most / CLEARED_SHARE {
                break;
            }
            if !self.users.has(key) {
                continue;
            }
            cx.books.metrics().counters.api_heads_shed.one();
            self.act(key, cx, |gateway, context| gateway.lighten(context));
        }
    }
}
