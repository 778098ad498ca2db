//! Connections that wait for blocks. Owns which users and links wait, and how each tries again; their order
//! is [`Starved`]'s.
//!
//! [`Starved`]: crate::worker::starved::Starved

use super::{Conn, Cx, Link, Sessions, State};
use crate::base::time::Now;
use crate::proxy::Side;

impl Sessions {
    /// Whether connections wait for blocks.
    pub fn is_starved(&self) -> bool {
        !self.starved.is_empty()
    }

    /// Whether the next free block is wanted here, whichever driver frees it.
    pub fn wants_blocks(&self) -> bool {
        self.is_starved() || self.live() > 0 && !self.kit.is_full()
    }

    /// Lets connections that waited for blocks try again, the longest waiting first.
    pub fn relieve(&mut self, cx: &mut Cx<'_>) {
        let mut relief = self.starved.relief(cx.now);
        while let Some(conn) = self.starved.next(&relief, cx.now, cx.pool) {
            relief.fed += usize::from(self.feed(conn, cx));
        }
    }

    /// False when the connection has ended, or needs no more bytes, since it began to wait.
    fn feed(&mut self, conn: Conn, cx: &mut Cx<'_>) -> bool {
        let (user, side) = match conn {
            Conn::User(user) => (user, Side::Client),
            Conn::Link(link) => match self.links.get(link) {
                Some(Link { state: State::Serving { user }, .. }) => (*user, Side::Backend),
                Some(Link { state: State::Spare { .. }, .. }) => {
                    self.drop_spare(link, cx);
                    return false;
                }
                Some(Link { state: State::Trunk(_), .. }) => {
                    self.feed_trunk(link, cx);
                    return true;
                }
                _ => return false,
            },
        };
        if self.users.get(user).is_none() {
            return false;
        }
        self.act(user, cx, |gateway, context| gateway.feed(side, context));
        true
    }

    pub(super) fn starve(&mut self, now: Now, conn: Conn) {
        let (users, links) = (&mut self.users, &mut self.links);
        self.starved.push(now, conn, |conn| match conn {
            Conn::User(key) => users.get(*key).is_some(),
            Conn::Link(key) => links.get(*key).is_some(),
        });
    }

    /// To be called for each new connection: all may have to wait for blocks at once.
    pub(super) fn make_room(&mut self) {
        self.starved.make_room(self.users.places() + self.links.places());
    }
}
