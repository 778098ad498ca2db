//! API users of a worker that stands still: what becomes of those who go on as they are or elsewhere. A tunnel takes
//! in what has completed, as a TCP session does; all other users are told when the worker goes on, so their driver
//! keeps from them what completes.

use super::{Cmd, Conn, Cx, Link, Sessions, State, User};
use crate::proxy::{Event, Received};
use crate::worker::slots::Key;

impl Sessions {
    /// The two connections of the tunnel that one belongs to, if it does.
    pub fn tunnel(&mut self, conn: Conn) -> Option<(Key, Key)> {
        let key = match conn {
            Conn::User(key) => key,
            Conn::Link(link) => match self.links.get(link) {
                Some(Link { state: State::Serving { user }, .. }) => *user,
                _ => return None,
            },
        };
        let user = self.users.get(key).filter(|user| user.gateway.is_tunnel())?;
        Some((key, user.link?))
    }

    /// As [`Sessions::happened`], for a tunnel: begins nothing.
    pub fn note(&mut self, conn: Conn, event: Event, cx: &mut Cx<'_>) {
        let Some((key, _)) = self.tunnel(conn) else { return self.happened(conn, event, cx) };
        let starved = matches!(event, Event::Received { what: Received::NoBuffers, .. });
        self.act(key, cx, |gateway, context| gateway.note(event, context));
        if starved {
            self.starve(cx.now, conn);
        }
    }

    /// The tunnels with a send under way that could be taken back.
    fn sending(&self, is_free: impl Fn(Conn) -> bool) -> Vec<Key> {
        let is_free = |key, user: &User| {
            is_free(Conn::User(key)) && user.link.is_none_or(|link| is_free(Conn::Link(link)))
        };
        let sending = self.users.iter().filter(|(_, user)| user.gateway.sends_through());
        sending.filter(|(key, user)| is_free(*key, user)).map(|(key, _)| key).collect()
    }

    /// Whether no tunnel is sending. Those with a connection that is not free take no part.
    pub fn is_still(&self, is_free: impl Fn(Conn) -> bool) -> bool {
        self.sending(is_free).is_empty()
    }

    /// Takes back what tunnels are sending.
    pub fn take_back(&mut self, is_free: impl Fn(Conn) -> bool, cx: &mut Cx<'_>) {
        for key in self.sending(is_free) {
            self.act(key, cx, |gateway, context| gateway.take_back(context));
        }
    }

    /// Whether there is still such a user or link.
    pub fn has(&self, conn: Conn) -> bool {
        match conn {
            Conn::User(key) => self.users.has(key),
            Conn::Link(key) => self.links.has(key),
        }
    }

    /// Forgets these users, who go on elsewhere, and with them their tunnels: once nothing is in flight any more,
    /// their sockets are closed, and nobody is told of an end.
    pub fn leave(&mut self, keys: &[Key], cx: &mut Cx<'_>) {
        self.has_left = true;
        for key in keys.iter().copied() {
            let Some(user) = self.users.get(key) else { continue };
            user.is_elsewhere = true;
            self.act(key, cx, |gateway, context| gateway.leave(context));
        }
    }

    /// The last of a user who goes on elsewhere; its socket is another's matter.
    pub fn departed(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(user) = self.users.remove(key) else { return };
        self.deadlines.cancel(key.place);
        self.held -= user.held;
        user.entry.into_iter().for_each(|entry| cx.books.withdraw(entry));
    }

    /// The same of one whose socket is closed here.
    pub(super) fn forget(&mut self, key: Key, cx: &mut Cx<'_>) {
        self.departed(key, cx);
        cx.out.push(Cmd::Close { conn: Conn::User(key), reset: false });
    }

    /// Goes on: tunnels, and those who were taken up. All others have been told what has happened.
    pub fn thaw(&mut self, cx: &mut Cx<'_>) {
        let tunnels = self.users.keys(|user| user.gateway.is_tunnel());
        for key in std::mem::take(&mut self.seated).into_iter().chain(tunnels) {
            if self.users.has(key) {
                self.act(key, cx, |gateway, context| gateway.thaw(context));
            }
        }
    }
}
