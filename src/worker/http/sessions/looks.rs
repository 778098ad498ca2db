//! Connections whose send queues are looked at: those being sent to, and those about to be closed. Owns
//! when, and what follows: a user who takes something now and then is not idle, a host that has vanished
//! ends a tunnel, and a socket is closed when its queue is empty or its time is up.

use std::time::Duration;

use super::{Cmd, Conn, Cx, Sessions, State};
use crate::base::time::Now;
use crate::cluster::RequestLimits;
use crate::proxy::Side;
use crate::proxy::outlook::{LOOK_EVERY, Outlook, Standing, Watch};
use crate::session::EndReason;
use crate::worker::grace::Pause;
use crate::worker::slots::Key;

/// A connection about to be closed, waiting for its send queue to empty.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaving {
    pub reset: bool,
    watch: Watch,
    /// When its peer last took something.
    active: Now,
    /// How long it may take nothing.
    still: Duration,
    until: Now,
    pause: Pause,
}

impl Leaving {
    pub fn new(now: Now, reset: bool, still: Duration) -> Leaving {
        let (watch, pause) = (Watch::NEW, Pause::FIRST);
        Leaving { reset, watch, active: now, still, until: Now::NEVER, pause }
    }

    pub fn hurry(&mut self, now: Now, grace: Duration) {
        self.until = self.until.min(now.plus(grace));
    }

    /// When to look next; `None`: nothing is left to wait for.
    fn told(&mut self, now: Now, outlook: &Outlook) -> Option<Now> {
        let standing = self.watch.look(now, self.active, outlook);
        if standing == Standing::Moving {
            self.active = now;
        }
        let until = self.until.min(self.active.plus(self.still));
        let waits = outlook.queued > 0 && !outlook.dead && standing != Standing::Vanished;
        let next = now.plus(self.pause.take()).min(until);
        (waits && now < until).then_some(next)
    }
}

/// What is remembered of a user's connection, and of the one to a backend that serves it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Looks {
    watches: [Watch; 2],
    /// When to look next.
    pub at: Now,
}

impl Looks {
    pub const NEW: Looks = Looks { watches: [Watch::NEW; 2], at: Now::NEVER };
}

impl Sessions {
    /// The kernel has said how a connection's send queue stands: the answer to [`Cmd::Look`].
    pub fn told(&mut self, conn: Conn, outlook: Outlook, cx: &mut Cx<'_>) {
        match conn {
            Conn::User(key) => match self.users.get(key).map(|user| user.leaving.is_some()) {
                Some(true) => self.user_leaves(key, &outlook, cx),
                Some(false) => {
                    self.seen(key, Side::Client, &outlook, cx);
                    self.expire_user(key, cx);
                }
                None => {}
            },
            Conn::Link(link) => match self.links.get(link).map(|link| &link.state) {
                Some(State::Leaving(_)) => self.link_leaves(link, &outlook, cx),
                Some(State::Serving { user }) => {
                    let user = *user;
                    self.seen(user, Side::Backend, &outlook, cx);
                    if self.users.get(user).is_some_and(|user| user.stream_of.is_some()) {
                        self.expire_user(user, cx);
                    }
                }
                _ => {}
            },
        }
    }

    /// Plans a look at a connection that is being sent to or just was, unless one is planned.
    pub(super) fn plan_look(&mut self, now: Now, key: Key, sent: bool) {
        if let Some(user) = self.users.get(key)
            && user.looks.at == Now::NEVER
            && (user.gateway.is_sending() || sent && user.gateway.is_tunnel())
        {
            user.looks.at = now.plus(look_every(user.gateway.limits()));
        }
    }

    /// The user's deadline, or the time of a look, has come: finds out first what the peers have taken.
    pub(super) fn look(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        user.looks.at = Now::NEVER;
        let is_stream = user.stream_of.is_some();
        if let Some(link) = user.link
            && let Some(State::Serving { .. }) = self.links.get(link).map(|link| &link.state)
        {
            cx.out.push(Cmd::Look { conn: Conn::Link(link) });
            if is_stream {
                return;
            }
        }
        if is_stream {
            // What its user takes is known already.
            return self.expire_user(key, cx);
        }
        // Last, because its answer decides.
        cx.out.push(Cmd::Look { conn: Conn::User(key) });
    }

    fn seen(&mut self, key: Key, side: Side, outlook: &Outlook, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        let every = look_every(user.gateway.limits());
        let watch = &mut user.looks.watches[side as usize];
        let standing = watch.look(cx.now, user.gateway.active_at(), outlook);
        if outlook.queued > 0 || user.gateway.is_sending() {
            let gives_up = watch.gives_up_at().filter(|at| *at > cx.now).unwrap_or(Now::NEVER);
            user.looks.at = user.looks.at.min(cx.now.plus(every)).min(gives_up);
        }
        match standing {
            Standing::Moving => user.gateway.took(cx.now),
            Standing::Vanished if user.gateway.is_tunnel() || side == Side::Client => {
                self.act(key, cx, |gateway, context| gateway.end(EndReason::Idle, true, context));
            }
            Standing::Still | Standing::Vanished => {}
        }
    }

    fn expire_user(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        match user.gateway.deadline(&self.settings) {
            Some(due) if due <= cx.now => {
                self.act(key, cx, |gateway, context| gateway.expire(context));
            }
            _ => self.schedule(key),
        }
    }

    fn user_leaves(&mut self, key: Key, outlook: &Outlook, cx: &mut Cx<'_>) {
        let Some(leaving) = self.users.get(key).and_then(|user| user.leaving.as_mut()) else {
            return;
        };
        match leaving.told(cx.now, outlook) {
            Some(next) => self.deadlines.schedule(key.place, next),
            None => self.close_user(key, outlook, cx),
        }
    }

    /// Takes a user out of the books once its connection has nothing left to deliver.
    fn close_user(&mut self, key: Key, outlook: &Outlook, cx: &mut Cx<'_>) {
        let Some(mut user) = self.users.remove(key) else { return };
        self.deadlines.cancel(key.place);
        let (Some(ending), Some(leaving)) = (user.gateway.ending(), user.leaving) else { return };
        self.held -= user.held;
        let reset = leaving.reset;
        cx.out.push(Cmd::Close { conn: Conn::User(key), reset });
        let Some(mut entry) = user.entry.take() else { return };
        let books = &mut *cx.books;
        // A socket closed without a reset still delivers its queue, as long as its host lives; the FIN it
        // has sent counts as one byte.
        if reset || outlook.dead {
            let lost = outlook.queued.saturating_sub((!reset).into());
            books.undelivered(&mut entry, 0, lost.into());
        }
        books.close(entry, ending.reason, cx.now);
    }

    fn link_leaves(&mut self, link: Key, outlook: &Outlook, cx: &mut Cx<'_>) {
        let Some(State::Leaving(leaving)) = self.links.get(link).map(|link| &mut link.state) else {
            return;
        };
        match leaving.told(cx.now, outlook) {
            Some(next) => self.connects.schedule(link.place, next),
            None => {
                let reset = leaving.reset;
                cx.books.metrics().counters.bytes_undelivered.add(outlook.queued.into());
                self.connects.cancel(link.place);
                self.links.remove(link);
                cx.out.push(Cmd::Close { conn: Conn::Link(link), reset });
            }
        }
    }

    /// An order does not wait for slow readers.
    pub(super) fn hurry_links(&mut self, now: Now, grace: Duration) {
        for link in self.links.keys(|link| matches!(link.state, State::Leaving(_))) {
            if let Some(State::Leaving(leaving)) = self.links.get(link).map(|link| &mut link.state)
            {
                leaving.hurry(now, grace);
                self.connects.schedule(link.place, leaving.until);
            }
        }
    }

    /// The same for a user; false when the user is not leaving yet.
    pub(super) fn hurry_user(&mut self, now: Now, key: Key, grace: Duration) -> bool {
        let Some(leaving) = self.users.get(key).and_then(|user| user.leaving.as_mut()) else {
            return false;
        };
        leaving.hurry(now, grace);
        self.deadlines.schedule(key.place, leaving.until);
        true
    }
}

/// How often a connection that is being sent to is looked at.
pub(super) fn look_every(limits: &RequestLimits) -> Duration {
    LOOK_EVERY.min(limits.body / 4).min(limits.tunnel_idle / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::grace;

    const START: Now = Now::from_nanos(1_000_000_000);
    const STILL: Duration = Duration::from_secs(60);

    fn queued(queued: u32, acknowledged: u64) -> Outlook {
        Outlook { queued, acknowledged, ..Outlook::default() }
    }

    #[test]
    fn a_connection_is_closed_when_its_queue_is_empty_or_nobody_takes_from_it() {
        let mut leaving = Leaving::new(START, true, STILL);
        let (mut now, mut taken) = (START, 0);
        for _ in 0..1000 {
            taken += 1;
            now = leaving.told(now, &queued(9, taken)).expect("its peer reads on");
        }
        assert!(now > START.plus(3 * STILL));
        let mut copy = leaving;
        assert_eq!(copy.told(now, &Outlook::default()), None);
        assert_eq!(copy.told(now, &Outlook { dead: true, ..queued(9, taken) }), None);
        let end = now.plus(STILL);
        while let Some(next) = leaving.told(now, &queued(9, taken)) {
            assert!(next > now && next <= end);
            now = next;
        }
        assert!(now.since(START) >= STILL, "it had its time");
    }

    #[test]
    fn an_order_leaves_it_a_moment() {
        let mut leaving = Leaving::new(START, true, STILL);
        assert!(leaving.told(START, &queued(9, 0)).is_some());
        leaving.hurry(START, grace::STOP);
        assert!(leaving.told(START.plus(grace::STOP / 2), &queued(9, 1)).is_some());
        assert_eq!(leaving.told(START.plus(grace::STOP), &queued(9, 2)), None);
    }
}
