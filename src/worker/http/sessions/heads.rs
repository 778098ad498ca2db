//! What a worker's API users hold on the heap: heads that are not complete, and requests sent ahead. Owns the
//! sum of it and who has to go when it is too much: whoever's request is the longest under way, so that
//! those who send half a head and wait make room for those who send whole ones.

use super::{Cx, Sessions, User};
use crate::worker::slots::Key;

/// Once there is too much, this part of what may be is cleared at once: looking for the oldest takes a walk
/// over all users, which is made once for so many bytes and not for each.
const CLEARED_SHARE: usize = 8;

impl Sessions {
    /// Takes note of what a user holds now.
    pub(super) fn weigh(&mut self, key: Key) {
        let Some(user) = self.users.get(key) else { return };
        let held = user.gateway.held();
        if held != user.held {
            self.held = self.held - user.held + held;
            user.held = held;
        }
    }

    /// Lets go of users until what is left is well within bounds, if it is not.
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
            cx.books.metrics().counters.api_heads_shed.one();
            self.act(key, cx, |gateway, context| gateway.lighten(context));
        }
    }
}
