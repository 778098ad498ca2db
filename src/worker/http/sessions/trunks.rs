//! Connections to backends that speak HTTP/2, each shared by the requests of many users. Owns which request goes over
//! which, and when one is made, takes no more, and is closed; a request's own link leads to a stream of it, and is used
//! as any other until it is released.
//!
//! ```text
//!   trunk:  Connecting --> Open --idle too long, backend left, GOAWAY--> ended, nothing in flight --> closed
//!               |            |
//!   link:    Promised --> Serving --released--> Closing --nothing in flight--> forgotten
//! ```

use super::streams::StreamOf;
use super::{Cmd, Conn, Cx, Link, Member, SWEEP_EVERY, Sessions, State};
use crate::base::time::Now;
use crate::proxy::http::Assigned;
use crate::proxy::http::trunk::{Means, Trunk};
use crate::proxy::http2::News;
use crate::proxy::line::Line;
use crate::proxy::{Event, Received, StreamCmd};
use crate::worker::books::Choice;
use crate::worker::opening::Unconnected;
use crate::worker::slots::Key;

/// Requests that wait for one connection to be made; for more, another is made.
const PROMISED_MAX: usize = 32;

/// A connection that is shared, or will be.
pub(super) struct Shared {
    /// `None` while it is being made.
    trunk: Option<Trunk>,
    pub begun: Now,
    pub timed_out: bool,
    /// Links of requests that wait for it.
    promised: Vec<Key>,
    /// Links of requests that go over it, by their streams.
    streams: Vec<Option<Key>>,
    idle_since: Now,
}

impl Shared {
    fn has_room(&self) -> bool {
        match &self.trunk {
            Some(trunk) => trunk.has_room(),
            None => self.promised.len() < PROMISED_MAX,
        }
    }

    /// Whether it is still being made.
    pub fn is_connecting(&self) -> bool {
        self.trunk.is_none()
    }
}

impl Sessions {
    /// Gives a request a stream of a connection to its backend, or has one made.
    pub(super) fn obtain_stream(&mut self, user: Key, choice: Choice, cx: &mut Cx<'_>) {
        let Some(service) = self.users.get(user).map(|user| user.service) else { return };
        let to = Member { service, backend: choice.backend };
        let of = match self.trunk_with_room(to, choice) {
            Some(of) => of,
            None => self.connect_trunk(to, choice, cx),
        };
        let state = State::Promised { user };
        let link = self.links.put(Link { to, choice, login: false, state, stream_of: None });
        if let Some(user) = self.users.get(user) {
            user.link = Some(link);
        }
        match self.links.get(of).map(|link| &mut link.state) {
            Some(State::Trunk(shared)) if shared.is_connecting() => shared.promised.push(link),
            _ => self.board(of, link, true, cx),
        }
    }

    /// One that began with a PROXY header is its user's alone.
    fn trunk_with_room(&mut self, to: Member, choice: Choice) -> Option<Key> {
        if choice.proxy {
            return None;
        }
        let links = &mut self.links;
        let mut has_room = |of: Key| match links.get(of).map(|link| &link.state) {
            Some(State::Trunk(shared)) => shared.has_room(),
            _ => false,
        };
        self.trunks.get(&to)?.iter().copied().find(|of| has_room(*of))
    }

    fn connect_trunk(&mut self, to: Member, choice: Choice, cx: &mut Cx<'_>) -> Key {
        let shared = Shared {
            trunk: None,
            begun: cx.now,
            timed_out: false,
            promised: Vec::new(),
            streams: Vec::new(),
            idle_since: cx.now,
        };
        let state = State::Trunk(Box::new(shared));
        let of = self.links.put(Link { to, choice, login: false, state, stream_of: None });
        self.trunks.entry(to).or_default().push(of);
        self.make_room();
        let patience = cx.books.timeouts(to.service).connect;
        self.connects.schedule(of.place, cx.now.plus(patience));
        self.sweep_at = self.sweep_at.min(cx.now.plus(SWEEP_EVERY));
        cx.out.push(Cmd::Connect { link: of, to: choice.address });
        of
    }

    /// Has the request of a promised link go over a connection that is there.
    fn board(&mut self, of: Key, link: Key, reused: bool, cx: &mut Cx<'_>) {
        let Some(Link { to, state: State::Promised { user }, .. }) = self.links.get(link) else {
            return;
        };
        let (backend, user) = (to.backend, *user);
        let number = match self.links.get(of).map(|link| &mut link.state) {
            Some(State::Trunk(shared)) => shared.trunk.as_mut().and_then(Trunk::open),
            _ => None,
        };
        let Some(number) = number else {
            self.links.remove(link);
            return self.connect_failed(user, nix::errno::Errno::ECONNRESET.into(), false, cx);
        };
        if let Some(State::Trunk(shared)) = self.links.get(of).map(|link| &mut link.state) {
            let places = shared.streams.len().max(number as usize + 1);
            shared.streams.resize(places, None);
            shared.streams[number as usize] = Some(link);
        }
        if let Some(Link { state, stream_of, .. }) = self.links.get(link) {
            *state = State::Serving { user };
            *stream_of = Some(StreamOf { connection: of, number });
        }
        self.serve(user, backend, Assigned { line: Line::new(), reused, private: false }, cx);
    }

    /// A connection that was being made is there, or could not be made.
    pub(super) fn trunk_tried(
        &mut self,
        of: Key,
        result: Result<(), Unconnected>,
        cx: &mut Cx<'_>,
    ) {
        let Some(Link { state: State::Trunk(shared), choice, .. }) = self.links.get(of) else {
            return;
        };
        let (is_tls, timed_out) = (choice.tls, shared.timed_out);
        let promised = std::mem::take(&mut shared.promised);
        match result {
            Ok(()) => {
                cx.books.metrics().connect_time.record(cx.now.since(shared.begun));
                self.with_trunk(of, cx, |trunk, means| {
                    trunk.get_or_insert_with(|| Trunk::new(is_tls, means));
                });
                for link in promised {
                    self.board(of, link, false, cx);
                }
            }
            Err(why) => {
                self.drop_trunk(of, cx);
                for link in promised {
                    let Some(State::Promised { user }) = self.links.get(link).map(|it| &it.state)
                    else {
                        continue;
                    };
                    let user = *user;
                    self.links.remove(link);
                    self.connect_failed(user, why, timed_out, cx);
                }
            }
        }
        self.cross(cx);
    }

    /// Something happened on a shared connection.
    pub(super) fn happened_on_trunk(&mut self, of: Key, event: Event, cx: &mut Cx<'_>) {
        self.with_trunk(of, cx, |trunk, means| {
            if let Some(trunk) = trunk {
                trunk.handle(event, means);
            }
        });
        self.cross(cx);
    }

    /// Lends a shared connection everything it needs, and does what it wants.
    fn with_trunk(
        &mut self,
        of: Key,
        cx: &mut Cx<'_>,
        act: impl FnOnce(&mut Option<Trunk>, &mut Means<'_>),
    ) {
        let Sessions { links, kit, features, wires, crossings, .. } = self;
        let Some(Link { state: State::Trunk(shared), .. }) = links.get(of) else { return };
        let means = &mut Means { pool: cx.pool, kit, features: *features, out: wires };
        act(&mut shared.trunk, means);
        let conn = Conn::Link(of);
        cx.out.extend(wires.drain(..).map(|what| Cmd::Wire { conn, what }));
        let Some(trunk) = &mut shared.trunk else { return };
        while let Some((number, news)) = trunk.next_news() {
            crossings.pass_from_trunk(of, number, news);
        }
        if !trunk.is_idle() {
            shared.idle_since = Now::NEVER;
        } else if shared.idle_since == Now::NEVER {
            shared.idle_since = cx.now;
        }
        if trunk.is_settled() {
            self.drop_trunk(of, cx);
        }
    }

    fn drop_trunk(&mut self, of: Key, cx: &mut Cx<'_>) {
        let Some(link) = self.links.remove(of) else { return };
        if let Some(list) = self.trunks.get_mut(&link.to) {
            list.retain(|trunk| *trunk != of);
            if list.is_empty() {
                self.trunks.remove(&link.to);
            }
        }
        cx.out.push(Cmd::Close { conn: Conn::Link(of), reset: false });
    }

    /// A gateway wants something done on its backend's line.
    pub(super) fn wire_link(&mut self, link: Key, what: StreamCmd, cx: &mut Cx<'_>) {
        match self.links.get(link).and_then(|link| link.stream_of) {
            None => cx.out.push(Cmd::Wire { conn: Conn::Link(link), what }),
            Some(StreamOf { connection, number }) => {
                self.crossings.pass_to_trunk(connection, number, what);
            }
        }
    }

    /// Takes a command of a request's gateway to the connection that it goes over.
    pub(super) fn tell_trunk(&mut self, of: Key, number: u32, what: StreamCmd, cx: &mut Cx<'_>) {
        if let Some(State::Trunk(shared)) = self.links.get(of).map(|link| &mut link.state)
            && let Some(trunk) = &mut shared.trunk
        {
            trunk.command(number, what, cx.pool);
            while let Some((number, news)) = trunk.next_news() {
                self.crossings.pass_from_trunk(of, number, news);
            }
            if trunk.is_waiting() {
                self.crossings.call_trunk(of);
            }
        }
    }

    /// Takes what has happened to a stream to the link that leads there.
    pub(super) fn tell_link(&mut self, of: Key, number: u32, news: News, cx: &mut Cx<'_>) {
        let known = match self.links.get(of).map(|link| &link.state) {
            Some(State::Trunk(shared)) => shared.streams.get(number as usize).copied().flatten(),
            _ => None,
        };
        match (news, known) {
            (News::Happened(event), Some(link)) => {
                let starved = matches!(event, Event::Received { what: Received::NoBuffers, .. });
                self.happened_on_link(link, event, cx);
                if starved {
                    cx.books.metrics().counters.buffers_exhausted.one();
                    self.starve(cx.now, Conn::Link(link));
                }
            }
            (News::Happened(Event::Received { what: Received::Data(buf), .. }), None) => {
                debug_assert!(false, "a stream is forgotten when nothing is under way");
                cx.pool.give_back(buf);
            }
            // A gateway learns of the end from what it asks for next.
            (News::Happened(_) | News::Gone | News::Opened(_), _) => {}
        }
    }

    /// Goes on with a connection whose streams were given commands.
    pub(super) fn call_trunk(&mut self, of: Key, cx: &mut Cx<'_>) {
        let is_leaving = self.draining;
        self.with_trunk(of, cx, |trunk, means| {
            if let Some(trunk) = trunk {
                trunk.drive(means);
                if is_leaving && trunk.is_idle() {
                    trunk.end(means);
                }
            }
        });
    }

    /// A released link has nothing in flight any more.
    pub(super) fn forget_link(&mut self, link: Key, stream: StreamOf) {
        self.links.remove(link);
        let StreamOf { connection: of, number } = stream;
        if let Some(State::Trunk(shared)) = self.links.get(of).map(|link| &mut link.state)
            && let Some(place) = shared.streams.get_mut(number as usize)
        {
            *place = None;
            // After all that its gateway has said.
            self.crossings.leave_trunk(of, number);
        }
    }

    pub(super) fn let_go_of_trunk(&mut self, of: Key, number: u32, cx: &Cx<'_>) {
        let is_leaving = self.draining;
        if let Some(State::Trunk(shared)) = self.links.get(of).map(|link| &mut link.state)
            && let Some(trunk) = &mut shared.trunk
        {
            trunk.forget(number);
            if trunk.is_idle() {
                shared.idle_since = cx.now;
            }
            if trunk.is_waiting() || trunk.is_idle() && is_leaving {
                self.crossings.call_trunk(of);
            }
        }
    }

    /// A request on this link was not answered in time: its connection may lead nowhere, and gets no others.
    pub(super) fn doubt_trunk(&mut self, link: Option<Key>) {
        let stream = link.and_then(|link| self.links.get(link)?.stream_of);
        let Some(StreamOf { connection, .. }) = stream else { return };
        if let Some(State::Trunk(shared)) = self.links.get(connection).map(|link| &mut link.state)
            && let Some(trunk) = &mut shared.trunk
        {
            trunk.retire();
        }
    }

    /// Ends connections that have been idle too long, or whose backend takes no more requests; `all`: every idle one.
    pub(super) fn sweep_trunks(
        &mut self,
        all: bool,
        stays: impl Fn(&Cx<'_>, Member) -> bool,
        cx: &mut Cx<'_>,
    ) {
        let keep = self.settings.spare_timeout;
        let every: Vec<(Member, Key)> =
            self.trunks.iter().flat_map(|(to, list)| list.iter().map(|of| (*to, *of))).collect();
        for (to, of) in every {
            let leaves = all || !stays(cx, to);
            let Some(State::Trunk(shared)) = self.links.get(of).map(|link| &mut link.state) else {
                continue;
            };
            let is_old = shared.idle_since != Now::NEVER && shared.idle_since.plus(keep) <= cx.now;
            self.with_trunk(of, cx, |trunk, means| {
                let Some(trunk) = trunk else { return };
                if leaves {
                    trunk.retire();
                }
                match trunk.is_idle() && (leaves || is_old || !trunk.has_room()) {
                    true => trunk.end(means),
                    false => trunk.look_again(means.out),
                }
            });
        }
    }

    /// Blocks have returned to the pool.
    pub(super) fn feed_trunk(&mut self, of: Key, cx: &mut Cx<'_>) {
        self.with_trunk(of, cx, |trunk, means| {
            if let Some(trunk) = trunk {
                trunk.feed(means);
            }
        });
        self.cross(cx);
    }

    /// The user for whom a shared connection is made, if it is for one alone.
    pub(super) fn first_of_trunk(&mut self, of: Key) -> Option<Key> {
        let State::Trunk(shared) = &self.links.get(of)?.state else { return None };
        let link = *shared.promised.first()?;
        match self.links.get(link)?.state {
            State::Promised { user } => Some(user),
            _ => None,
        }
    }
}
