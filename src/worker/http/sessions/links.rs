//! The connections to backends of a worker's gateways: obtaining one for a request, taking it back,
//! keeping it for the next, closing it. Owns which connection serves whom; deadlines and the users' own
//! connections are the parent's.
//!
//! A connection on which a user has logged in, or may have, belongs to that user as long as both last: no
//! other user's request goes over it. Where too many are kept, the user idle for longest loses its own, and
//! has to log in again.
//!
//! A connection that began with a PROXY header is its user's alone in the same way, but is kept only as long
//! as others are, and used only where another would be.

use std::time::Duration;

use nix::errno::Errno;

use super::looks::Leaving;
use super::{Cmd, Conn, Cx, Link, Member, SWEEP_EVERY, Sessions, State, User};
use crate::base::lack::Lack;
use crate::base::time::Now;
use crate::cluster::{BackendId, Barrier, ServiceId, Standing};
use crate::proxy::http::{Assigned, Refused, Released, Reuse, Wish};
use crate::proxy::line::Line;
use crate::proxy::{Event, Received, SECOND_LOOK, Side};
use crate::worker::books::{Books, Choice, Entry};
use crate::worker::grace;
use crate::worker::link::Refusal;
use crate::worker::opening::{Opening, Unconnected};
use crate::worker::slots::Key;

/// Backends without a free local port towards them, after which a request is offered no more.
const PORTLESS_MAX: usize = 8;
/// A connection used this recently is taken not to have been closed by its backend yet.
const RECENT: Duration = Duration::from_millis(500);

impl Sessions {
    /// How TLS is to be spoken on a link, if it is and somebody still waits for it. Asked once the link is
    /// established, before [`Sessions::connected`].
    ///
    /// # Errors
    /// The backend has left.
    pub fn opening(&mut self, link: Key, cx: &Cx<'_>) -> Result<Option<Opening>, Errno> {
        let Some(link) = self.links.get(link).filter(|link| link.choice.tls) else {
            return Ok(None);
        };
        let timed_out = match &link.state {
            State::Connecting { timed_out, .. } => *timed_out,
            State::Trunk(shared) => shared.timed_out,
            _ => return Ok(None),
        };
        cx.books.opening(link.to.service, link.choice, timed_out)
    }

    /// Gives up a connection that is still being made.
    pub(super) fn forgo(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        let Some(link) = user.link else { return };
        let Some(Link { state, .. }) = self.links.get(link) else { return };
        if let State::Promised { .. } = state {
            self.links.remove(link);
            user.link = None;
            user.entry.iter_mut().for_each(|entry| over(cx.books, entry));
        } else if let State::Connecting { .. } = state {
            *state = State::Closing { line: Line::new(), connect: true, reset: false };
            user.link = None;
            user.entry.iter_mut().for_each(|entry| over(cx.books, entry));
            cx.out.push(Cmd::CancelConnect { link });
        }
    }

    /// Finds a connection to a backend for a request.
    pub(super) fn obtain(&mut self, key: Key, wish: Wish, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        if wish.attempt == 0 {
            user.tried.clear();
            user.portless = 0;
        }
        let service = wish.service;
        user.service = service;
        let Some(entry) = &mut user.entry else { return };
        if let Err(barrier) = cx.books.let_in(entry, service, wish.attempt > 0) {
            return self.refuse(key, Refused::Barred(barrier), cx);
        }
        if is_under_maintenance(cx.books, service) {
            if self.fall_back(key, cx) {
                return;
            }
            cx.books.metrics().counters.api_maintenance.one();
            return self.refuse(key, Refused::Maintenance, cx);
        }
        let since = since(wish.reuse, cx.now);
        if let Some(link) = user.private
            && self.is_fit(link, service, since, cx)
        {
            return self.obtain_private(key, link, wish, cx);
        }
        let Some(user) = self.users.get(key) else { return };
        let Some(entry) = &mut user.entry else { return };
        let books = &mut *cx.books;
        let mut choice = books.assign_from(service, entry, &user.tried);
        if choice.is_none() && wish.attempt > 0 {
            // Only the old connection was bad; a new one to the same backend will do.
            choice = books.assign_from(service, entry, &[]);
        }
        if wish.attempt > 0 {
            books.metrics().counters.retries.one();
        }
        let Some(choice) = choice else {
            let why = nobody(books, service);
            let is_full = matches!(why, Refused::Barred(_));
            if !is_full && self.fall_back(key, cx) {
                return;
            }
            return self.refuse(key, why, cx);
        };
        user.tried.push(choice.backend);
        if choice.http2 {
            return self.obtain_stream(key, choice, cx);
        }
        // One that others have used began without a header, or with theirs.
        let since = since.filter(|_| !choice.proxy);
        let to = Member { service, backend: choice.backend };
        let spare = since.and_then(|since| self.spares.take(to, cx.now, since));
        match spare {
            Some(link) => self.reuse(key, link, cx),
            None => self.connect(key, choice, cx),
        }
    }

    /// Whether the user's own link will do for a request to this service. One with a login always does:
    /// without it, the user would have to log in again.
    fn is_fit(&mut self, link: Key, service: ServiceId, since: Option<Now>, cx: &Cx<'_>) -> bool {
        let Some(Link { to, login, .. }) = self.links.get(link) else { return true };
        let (to, login) = (*to, *login);
        let fresh = || since.is_some_and(|since| self.private.holds(to, link, cx.now, since));
        to.service == service && (login || fresh() && is_serving(cx.books, to))
    }

    /// Reuses the user's own link, if its backend still takes requests. If not, a user who has logged in there
    /// has to log in again wherever the request goes.
    fn obtain_private(&mut self, key: Key, link: Key, wish: Wish, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        user.private = None;
        let Some(Link { to, login, .. }) = self.links.get(link) else {
            debug_assert!(false, "a user's own connection is there");
            return self.obtain(key, wish, cx);
        };
        let (to, login) = (*to, *login);
        let books = &mut *cx.books;
        let choice = books.find(to.service, to.backend).filter(|_| may_go_on(books, to));
        let Some(choice) = choice else {
            self.drop_spare(link, cx);
            return self.obtain(key, wish, cx);
        };
        let Some(entry) = &mut user.entry else { return };
        let has_room = books.book_if_room(to.service, entry, choice);
        if !has_room && !login {
            self.drop_spare(link, cx);
            return self.obtain(key, wish, cx);
        }
        if !has_room {
            // The login outlasts the refusal.
            user.private = Some(link);
            return self.refuse(key, Refused::Barred(Barrier::BackendSessions), cx);
        }
        user.tried.push(to.backend);
        self.private.forget(to, link);
        self.reuse(key, link, cx);
    }

    fn reuse(&mut self, key: Key, link: Key, cx: &mut Cx<'_>) {
        let Some(Link { to, state, login, .. }) = self.links.get(link) else { return };
        let (backend, private) = (to.backend, *login);
        let before = std::mem::replace(state, State::Serving { user: key });
        let State::Spare { line, owner } = before else {
            debug_assert!(false, "a spare connection is free");
            return;
        };
        debug_assert!(owner.is_none_or(|owner| owner == key), "it is somebody else's");
        if let Some(user) = self.users.get(key) {
            user.link = Some(link);
        }
        let what = Assigned { line, reused: true, private };
        self.serve(key, backend, what, cx);
    }

    fn connect(&mut self, key: Key, choice: Choice, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        let state = State::Connecting { user: key, begun: cx.now, timed_out: false };
        let to = Member { service: user.service, backend: choice.backend };
        let link = self.links.put(Link { to, choice, login: false, state, stream_of: None });
        user.link = Some(link);
        self.make_room();
        let patience = cx.books.timeouts(to.service).connect;
        self.connects.schedule(link.place, cx.now.plus(patience));
        cx.out.push(Cmd::Connect { link, to: choice.address });
    }

    /// Hands the user's gateway its new link.
    pub(super) fn serve(&mut self, key: Key, backend: BackendId, what: Assigned, cx: &mut Cx<'_>) {
        let reused = what.reused;
        self.lend(key, cx, |gateway, context| gateway.assigned(backend, what, context));
        if let Some(User { started, entry: Some(entry), .. }) = self.users.get(key) {
            let before = std::mem::replace(started, true);
            let books = &mut *cx.books;
            match before {
                false => books.started(entry),
                true => books.served_again(entry),
            }
        }
        if !reused {
            self.follow(key, cx);
        }
    }

    /// A connection attempt for this user has failed: tries the next backend, if there is one.
    pub(super) fn connect_failed(
        &mut self,
        key: Key,
        why: Unconnected,
        timed_out: bool,
        cx: &mut Cx<'_>,
    ) {
        let Some(user) = self.users.get(key) else { return };
        user.link = None;
        let Some(entry) = &mut user.entry else { return };
        let lack = why.lack();
        if lack == Lack::Everywhere {
            // Closing spare connections frees descriptors and ports for the next request.
            let client = entry.client;
            cx.books.refused(user.service, client, Refusal::Exhausted);
            self.drop_all_spares(cx);
            self.refuse(key, Refused::Exhausted, cx);
            return self.follow(key, cx);
        }
        let why = if timed_out { Unconnected::Errno(Errno::ETIMEDOUT) } else { why };
        let (service, client) = (user.service, entry.client);
        let books = &mut *cx.books;
        match lack {
            Lack::None => books.backend_failed(entry, why),
            _ => books.backend_out_of_ports(entry),
        }
        user.portless += usize::from(lack == Lack::Ports);
        let (refused, refusal) = match (user.portless, timed_out) {
            (1.., _) => (Refused::Exhausted, Refusal::Exhausted),
            (0, true) => (Refused::TimedOut, Refusal::Unreachable),
            (0, false) => (Refused::Unreachable, Refusal::Unreachable),
        };
        // A backend without a free port towards it was never asked, and has not failed the request.
        let failed = user.tried.len() - user.portless;
        let more =
            user.portless <= PORTLESS_MAX && failed <= usize::from(user.gateway.limits().retries);
        let next = more.then(|| books.assign_from(service, entry, &user.tried)).flatten();
        match next {
            Some(choice) => {
                books.metrics().counters.retries.one();
                user.tried.push(choice.backend);
                if choice.http2 {
                    self.obtain_stream(key, choice, cx);
                    // One of a connection that is there is served at once.
                    self.follow(key, cx);
                } else {
                    self.connect(key, choice, cx);
                }
            }
            None if self.fall_back(key, cx) => self.follow(key, cx),
            None => {
                cx.books.refused(service, client, refusal);
                self.refuse(key, refused, cx);
                self.follow(key, cx);
            }
        }
    }

    /// Leaves a request to the fallback of its service, if there is one: the gateway then asks anew.
    fn fall_back(&mut self, key: Key, cx: &mut Cx<'_>) -> bool {
        let Some(user) = self.users.get(key) else { return false };
        let snapshot = cx.books.snapshot();
        let fallback = snapshot.service(user.service).and_then(|it| it.terms.fallback);
        let there = fallback.filter(|id| snapshot.service(*id).is_some());
        let Some(to) = there.filter(|_| user.gateway.may_fall_back()) else { return false };
        user.tried.clear();
        user.portless = 0;
        user.entry.iter_mut().for_each(|entry| over(cx.books, entry));
        cx.books.metrics().counters.api_fallbacks.one();
        self.lend(key, cx, |gateway, context| gateway.fall_back(to, context))
    }

    /// Tells a gateway that there is no backend for its request; the caller then calls `follow`.
    fn refuse(&mut self, key: Key, why: Refused, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        let last = user.tried.last().copied();
        let Some(entry) = &mut user.entry else { return };
        let books = &mut *cx.books;
        over(books, entry);
        let refusal = match why {
            Refused::NoBackend | Refused::AllFail | Refused::AllDrain | Refused::NoneServes => {
                Some(Refusal::NoBackend)
            }
            Refused::Barred(barrier) => Some(Refusal::Barred(barrier)),
            _ => None,
        };
        if let Some(refusal) = refusal {
            books.refused(user.service, entry.client, refusal);
        }
        self.lend(key, cx, |gateway, context| gateway.refused(why, last, context));
    }

    /// A gateway needs its link no more.
    pub(super) fn release(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        let (Some(Released { line, keep, private, reset }), Some(link)) =
            (user.gateway.take_released(), user.link.take())
        else {
            debug_assert!(false, "what is released was assigned");
            return;
        };
        user.entry.iter_mut().for_each(|entry| over(cx.books, entry));
        let Some(Link { to, choice, login, stream_of, .. }) = self.links.get(link) else { return };
        let (to, proxy, is_stream) = (*to, choice.proxy, stream_of.is_some());
        *login = private;
        let serves = match private {
            true => may_go_on(cx.books, to),
            false => is_serving(cx.books, to),
        };
        let Some(keep) = keep.filter(|_| !self.draining && serves && !is_stream) else {
            return self.close_link(link, line, reset, cx);
        };
        let owner = (private || proxy).then_some(key);
        if let Some(Link { state, .. }) = self.links.get(link) {
            *state = State::Spare { line, owner };
        }
        self.watch(link, cx);
        self.sweep_at = self.sweep_at.min(cx.now.plus(SWEEP_EVERY));
        match owner {
            Some(owner) => {
                let until = if private { Now::NEVER } else { cx.now.plus(keep) };
                self.keep_private(owner, (link, to), until, cx);
            }
            None => {
                let oldest = self.spares.keep(to, link, cx.now, cx.now.plus(keep));
                if let Some(oldest) = oldest {
                    self.close_spare(oldest, cx);
                }
            }
        }
    }

    /// A user has one such link: where it has logged in, or been introduced, last.
    fn keep_private(&mut self, owner: Key, (link, to): (Key, Member), until: Now, cx: &mut Cx<'_>) {
        if let Some(before) = self.users.get(owner).and_then(|user| user.private) {
            self.drop_spare(before, cx);
        }
        if let Some(user) = self.users.get(owner) {
            user.private = Some(link);
        }
        if let Some(oldest) = self.private.keep(to, link, cx.now, until) {
            cx.books.metrics().counters.api_upstream_private_shed.one();
            self.close_spare(oldest, cx);
        }
    }

    /// A spare connection is always listened to, so that its end is noticed before it is used.
    fn watch(&mut self, link: Key, cx: &mut Cx<'_>) {
        let (features, share) = (self.features, self.kit.share());
        if let Some(Link { state: State::Spare { line, .. }, .. }) = self.links.get(link) {
            let out = &mut |what| cx.out.push(Cmd::Wire { conn: Conn::Link(link), what });
            line.ask(Side::Backend, true, share, cx.pool, features, out);
        }
    }

    pub(super) fn happened_on_link(&mut self, key: Key, event: Event, cx: &mut Cx<'_>) {
        let Some(Link { state, .. }) = self.links.get(key) else {
            debug_assert!(false, "an event came for a link that is gone");
            return;
        };
        match state {
            State::Serving { user } => {
                let user = *user;
                self.act(user, cx, |gateway, context| gateway.handle(event, context));
            }
            State::Spare { line, .. } => {
                let still_good = matches!(
                    event,
                    Event::Received { what: Received::Stopped, .. } | Event::Room { .. }
                );
                line.settle(event, cx.pool);
                if still_good {
                    self.watch(key, cx);
                } else {
                    self.drop_spare(key, cx);
                }
            }
            State::Closing { line, .. } => {
                line.settle(event, cx.pool);
                self.close_link_if_settled(key, cx);
            }
            State::Trunk(_) => self.happened_on_trunk(key, event, cx),
            State::Connecting { .. } | State::Leaving(_) | State::Promised { .. } => {
                debug_assert!(false, "nothing is in flight on such a link");
            }
        }
    }

    pub(super) fn drop_spare(&mut self, link: Key, cx: &mut Cx<'_>) {
        if let Some(Link { to, .. }) = self.links.get(link) {
            let to = *to;
            let _ = self.spares.forget(to, link) || self.private.forget(to, link);
            self.close_spare(link, cx);
        }
    }

    /// Closes a link that the spares no longer list.
    fn close_spare(&mut self, link: Key, cx: &mut Cx<'_>) {
        let Some(Link { state, .. }) = self.links.get(link) else { return };
        if let State::Spare { line, owner } = state {
            let (line, owner) = (std::mem::take(line), *owner);
            if let Some(owner) = owner.and_then(|owner| self.users.get(owner)) {
                owner.private = None;
            }
            self.close_link(link, line, false, cx);
        }
    }

    fn close_link(&mut self, link: Key, mut line: Line, reset: bool, cx: &mut Cx<'_>) {
        let mut wires = std::mem::take(&mut self.wires);
        line.stop(Side::Backend, &mut |what| wires.push(what));
        if let Some(Link { state, .. }) = self.links.get(link) {
            *state = State::Closing { line, connect: false, reset };
        }
        wires.drain(..).for_each(|what| self.wire_link(link, what, cx));
        self.wires = wires;
        self.close_link_if_settled(link, cx);
    }

    pub(super) fn close_link_if_settled(&mut self, link: Key, cx: &mut Cx<'_>) {
        let Some(Link { to, state, stream_of, .. }) = self.links.get(link) else { return };
        if let State::Closing { line, connect: false, reset } = state
            && !line.in_flight()
        {
            if let Some(stream) = *stream_of {
                return self.forget_link(link, stream);
            }
            if *reset {
                let patience = cx.books.snapshot().request_limits(to.service).body;
                let mut leaving = Leaving::new(cx.now, true, patience);
                if self.stopping {
                    leaving.hurry(cx.now, grace::STOP);
                }
                *state = State::Leaving(leaving);
                return cx.out.push(Cmd::Look { conn: Conn::Link(link) });
            }
            self.links.remove(link);
            cx.out.push(Cmd::Close { conn: Conn::Link(link), reset: false });
        }
    }

    /// Drops the spare connections that are too old, or whose backend takes no more requests.
    pub(super) fn sweep(&mut self, cx: &mut Cx<'_>) {
        let version = cx.books.snapshot().version;
        if cx.now < self.sweep_at && version == self.version {
            return;
        }
        self.version = version;
        self.drop_spares(false, cx);
        self.look_at_spares(cx);
        self.sweep_trunks(self.draining, |cx, to| is_serving(cx.books, to), cx);
        self.cross(cx);
        let none = self.spares.is_empty() && self.private.is_empty() && self.trunks.is_empty();
        self.sweep_at = if none { Now::NEVER } else { cx.now.plus(SWEEP_EVERY) };
    }

    /// Restarts receives that may have missed the end of their connection.
    fn look_at_spares(&mut self, cx: &mut Cx<'_>) {
        let still = cx.now.nanos().saturating_sub(SECOND_LOOK.as_nanos() as u64);
        let still = Now::from_nanos(still);
        let private = self.private.waiting_since(still);
        for link in self.spares.waiting_since(still).chain(private) {
            if let Some(Link { state: State::Spare { line, .. }, .. }) = self.links.get(link) {
                line.look_again(Side::Backend, &mut |what| {
                    cx.out.push(Cmd::Wire { conn: Conn::Link(link), what });
                });
            }
        }
    }

    pub(super) fn drop_all_spares(&mut self, cx: &mut Cx<'_>) {
        self.drop_spares(true, cx);
        self.sweep_trunks(self.draining, |_, _| true, cx);
    }

    fn drop_spares(&mut self, all: bool, cx: &mut Cx<'_>) {
        let mut dropped = Vec::new();
        let books = &*cx.books;
        self.spares.sweep(cx.now, |to| !all && is_serving(books, to), |link| dropped.push(link));
        // A user's own link stays until the user leaves, unless its backend is draining.
        self.private.sweep(cx.now, |to| may_go_on(books, to), |link| dropped.push(link));
        for link in dropped {
            self.close_spare(link, cx);
        }
    }
}

/// A request is no longer on a backend, nor one of its service's sessions.
fn over(books: &mut Books, entry: &mut Entry) {
    books.unassign(entry);
    books.let_out(entry);
}

/// Why no backend of a service can serve a request.
fn nobody(books: &Books, service: ServiceId) -> Refused {
    match books.nobody(service) {
        Refusal::Barred(barrier) => Refused::Barred(barrier),
        _ => nobody_serves(books, service),
    }
}

/// Since when a connection must have been in use to do for a request; `None`: none will.
fn since(reuse: Reuse, now: Now) -> Option<Now> {
    match reuse {
        Reuse::Any => Some(Now::from_nanos(0)),
        Reuse::Recent => {
            Some(Now::from_nanos(now.nanos().saturating_sub(RECENT.as_nanos() as u64)))
        }
        Reuse::No => None,
    }
}

fn is_serving(books: &Books, to: Member) -> bool {
    standing(books, to) == Some(Standing::Serving)
}

/// Whether what a user began at a backend may go on there.
fn may_go_on(books: &Books, to: Member) -> bool {
    standing(books, to).is_some_and(|standing| standing != Standing::Draining)
}

fn standing(books: &Books, to: Member) -> Option<Standing> {
    books.snapshot().get(to.service, to.backend).map(|one| one.standing)
}

/// Why a service has nobody to send a request to.
fn nobody_serves(books: &Books, service: ServiceId) -> Refused {
    let backends = books.snapshot().pool(service).map_or(&[][..], |pool| &pool.backends);
    let are = |standing| backends.iter().filter(|it| it.standing == standing).count();
    match (are(Standing::Failing), are(Standing::Draining)) {
        _ if backends.is_empty() => Refused::NoBackend,
        (0, _) => Refused::AllDrain,
        (_, 0) => Refused::AllFail,
        _ => Refused::NoneServes,
    }
}

fn is_under_maintenance(books: &Books, service: ServiceId) -> bool {
    books.snapshot().service(service).is_some_and(|service| service.terms.maintenance)
}
