//! API users of one worker: their connections, and the connections to backends that they share. Owns
//! who is on which connection and their deadlines; what a connection is used for is `proxy::http`'s.
//! Decides from events and the time it is given, and does nothing itself.
//!
//! ```text
//!   user:  accepted --> gateway --over, nothing in flight--> leaving --> closed
//!
//!   link:  Connecting --> Serving <--taken, released--> Spare, or one user's alone
//!              |             |                            |  ended, too old, backend left
//!              +-------------+---------> Closing <--------+
//!                                           \--with a reset--> Leaving
//! ```
//!
//! Users and links keep their places until the kernel has no operation left on their sockets, so that a
//! completion never meets another user or link.

mod deadlines;
mod doors;
mod estate;
mod heads;
mod late;
mod links;
mod looks;
mod orders;
mod relief;
mod still;
mod streams;
mod trunks;
mod turned_away;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;

use crate::base::time::Now;
use crate::base::wheel::Wheel;
use crate::cluster::gate::lists;
use crate::cluster::{BackendId, Doorway, ServiceId};
use crate::http::date::Date;
use crate::proxy::greeting::Caller;
use crate::proxy::http::spares::Spares;
use crate::proxy::http::{self, Assigned, Context, Gateway, GatewaySettings, Journal, Kit};
use crate::proxy::line::{Features, Line};
use crate::proxy::{self, Event, Received, Side};
use crate::ring::pool::Pool;
use crate::session::EndReason;
use crate::worker::books::{Choice, Entry};
use crate::worker::cx;
use crate::worker::grace;
use crate::worker::opening::Unconnected;
use crate::worker::slots::{Key, Slots};
use crate::worker::starved::Starved;
use looks::{Leaving, Looks};
use streams::{Crossings, StreamOf};
use trunks::Shared;

/// How often spare connections are looked through.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// One connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Conn {
    User(Key),
    Link(Key),
}

/// What the driver is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cmd {
    /// Open a socket for the link and connect it.
    Connect {
        link: Key,
        to: SocketAddr,
    },
    CancelConnect {
        link: Key,
    },
    /// On that connection; the command names its side.
    Wire {
        conn: Conn,
        what: proxy::StreamCmd,
    },
    /// Ask how the connection's send queue stands, and tell [`Sessions::told`] at once.
    Look {
        conn: Conn,
    },
    /// Close the socket, on which nothing is in flight; `reset` sends RST instead of FIN.
    Close {
        conn: Conn,
        reset: bool,
    },
}

/// The context of every decision about an API user.
pub type Cx<'a> = cx::Cx<'a, Cmd>;

/// The gateways of one worker.
pub struct Sessions {
    settings: GatewaySettings,
    features: Features,
    journal: Box<dyn Journal>,
    kit: Kit,
    date: Date,
    users: Slots<User>,
    links: Slots<Link>,
    spares: Spares<Member, Key>,
    /// Connections on which a user has logged in, each waiting for that user.
    private: Spares<Member, Key>,
    /// Users for whom there was no room, oldest first; some may have left.
    turned_away: VecDeque<Key>,
    /// Bytes on the heap, all users together.
    held: usize,
    /// By a user's place, and by a link's while it is being connected.
    deadlines: Wheel,
    connects: Wheel,
    sweep_at: Now,
    /// Version of the snapshot the spares were last checked against.
    version: u64,
    draining: bool,
    /// Others go on elsewhere; those who are still here were in the middle of something.
    has_left: bool,
    /// They may follow once they no longer are.
    departs: bool,
    /// Those who can follow now.
    packed: Vec<Key>,
    /// The worker stops: no more waiting for slow readers.
    stopping: bool,
    starved: Starved<Conn>,
    /// What the gateway being called asks for.
    wanted: Vec<http::GatewayCmd>,
    /// Users who were taken up, and are listened to when the worker goes on.
    seated: Vec<Key>,
    /// What passes between connections that carry HTTP/2 and their streams.
    crossings: Crossings,
    /// Connections to backends that requests share.
    trunks: HashMap<Member, Vec<Key>>,
    /// What one of them asks for.
    wires: Vec<proxy::StreamCmd>,
}

struct User {
    gateway: Gateway,
    /// `None` for a user who is turned away.
    entry: Option<Entry>,
    /// Where it has connected to, if a proxy has told.
    destination: Option<SocketAddr>,
    link: Option<Key>,
    /// The link on which it has logged in, or whose backend knows it by a PROXY header, while no request is
    /// on it.
    private: Option<Key>,
    /// Whose backends may serve the current request.
    service: ServiceId,
    /// The backends offered to the current request.
    tried: Vec<BackendId>,
    /// How many of them could not be asked for want of a local port.
    portless: usize,
    /// The session has had a backend before.
    started: bool,
    /// Bytes already in the books.
    moved: [u64; 2],
    /// Bytes it holds on the heap.
    held: usize,
    scheduled: Now,
    looks: Looks,
    /// Set once it is over and waits for its connection to deliver the rest.
    leaving: Option<Leaving>,
    /// It goes on in another process.
    is_elsewhere: bool,
    /// It is listed among those who can follow the others now.
    is_packed: bool,
    /// Those of a connection that carries HTTP/2, by their numbers there.
    streams: Vec<Option<Key>>,
    /// It is one of these: it has no socket.
    stream_of: Option<StreamOf>,
}

impl User {
    /// Someone who has just connected.
    fn new(gateway: Gateway, service: ServiceId, entry: Option<Entry>) -> User {
        User {
            gateway,
            entry,
            destination: None,
            link: None,
            private: None,
            service,
            tried: Vec::new(),
            portless: 0,
            started: false,
            moved: [0; 2],
            held: 0,
            scheduled: Now::NEVER,
            looks: Looks::NEW,
            leaving: None,
            is_elsewhere: false,
            is_packed: false,
            streams: Vec::new(),
            stream_of: None,
        }
    }
}

struct Link {
    to: Member,
    /// As it was picked. With a PROXY header, it is for that user alone.
    choice: Choice,
    /// Its user has logged in on it, or may have.
    login: bool,
    state: State,
    /// It leads to a stream of a shared connection, and has no socket.
    stream_of: Option<StreamOf>,
}

/// A backend, and the service in which it is one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Member {
    service: ServiceId,
    backend: BackendId,
}

enum State {
    Connecting {
        user: Key,
        begun: Now,
        timed_out: bool,
    },
    /// The user's gateway has the line.
    Serving {
        user: Key,
    },
    /// `owner`: for the next request of this user and nobody else.
    Spare {
        line: Line,
        owner: Option<Key>,
    },
    /// Waits for operations in flight (`connect`: a connection attempt is one), then closes; `reset` sends
    /// RST instead of FIN.
    Closing {
        line: Line,
        connect: bool,
        reset: bool,
    },
    /// Waits until its kernel has delivered the rest.
    Leaving(Leaving),
    /// It is shared by requests whose own links lead to its streams.
    Trunk(Box<Shared>),
    /// Will lead to a stream of a shared connection, which is being made.
    Promised {
        user: Key,
    },
}

impl Sessions {
    pub fn new(
        settings: GatewaySettings,
        features: Features,
        journal: Box<dyn Journal>,
        now: Now,
    ) -> Sessions {
        Sessions {
            spares: Spares::new(settings.spares_max),
            private: Spares::new(settings.private_max),
            turned_away: VecDeque::new(),
            held: 0,
            kit: Kit::new(settings.ids_seed),
            settings,
            // A pipe joins two connections for good; these change partners.
            features: Features { splice: false, ..features },
            journal,
            date: Date::at(now.unix_ms()),
            users: Slots::default(),
            links: Slots::default(),
            deadlines: Wheel::new(now),
            connects: Wheel::new(now),
            sweep_at: Now::NEVER,
            version: 0,
            draining: false,
            has_left: false,
            departs: false,
            packed: Vec::new(),
            stopping: false,
            starved: Starved::new(now),
            wanted: Vec::with_capacity(16),
            seated: Vec::new(),
            crossings: Crossings::default(),
            trunks: HashMap::new(),
            wires: Vec::with_capacity(8),
        }
    }

    /// Connections of any kind, as long as the kernel has operations on them.
    pub fn live(&self) -> usize {
        self.users.live() + self.links.live()
    }

    /// Connections to backends that wait for a request.
    pub fn spares(&self) -> usize {
        self.spares.len()
    }

    /// Connections to backends that wait for a request of the one user who logged in on them.
    pub fn private(&self) -> usize {
        self.private.len()
    }

    /// Bytes on the heap for requests that are not complete, or not wanted yet.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Sets blocks aside for heads that must be written even when the pool is used up.
    pub fn start(&mut self, pool: &mut Pool) {
        self.kit.refill(0, pool);
    }

    /// A user has connected, and speaks for itself.
    pub fn accepted(&mut self, door: Doorway, client: SocketAddr, cx: &mut Cx<'_>) -> Key {
        self.welcome(door, client.into(), cx)
    }

    /// A user has connected.
    pub fn welcome(&mut self, door: Doorway, caller: Caller, cx: &mut Cx<'_>) -> Key {
        let Caller { address: client, destination, .. } = caller;
        let books = &mut *cx.books;
        let mut entry = match books.admit(door.service, client, cx.now) {
            Ok(entry) => entry,
            Err(why) => {
                books.refused(door.service, client, why);
                return self.turn_away(door, client, why, cx);
            }
        };
        if door.is_tls {
            books.secured(&mut entry);
        }
        let trusted = lists(&self.settings.trusted, client.ip());
        let gateway = Gateway::new(books.id(&entry), door, client, trusted, cx.now);
        let user = User { destination, ..User::new(gateway, door.service, Some(entry)) };
        let key = self.users.put(user);
        self.make_room();
        self.act(key, cx, |gateway, context| gateway.start(context));
        if self.draining {
            self.see_off(key, cx);
        }
        key
    }

    /// The user of whom the backend at the other end of a link is told by a PROXY header, if it wants one.
    /// Asked once the link is established, before [`Sessions::connected`].
    pub fn introduces(&mut self, link: Key) -> Option<(Key, Caller)> {
        let first = self.first_of_trunk(link);
        let link = self.links.get(link).filter(|link| link.choice.proxy)?;
        let user = match link.state {
            State::Connecting { user, .. } => user,
            _ => first?,
        };
        let User { entry: Some(entry), destination, .. } = self.users.get(user)? else {
            return None;
        };
        Some((user, Caller { destination: *destination, ..entry.client.into() }))
    }

    /// A connection to a backend is good to use, or has failed.
    pub fn connected(&mut self, link: Key, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        self.tried(link, result.map_err(Unconnected::Errno), cx);
    }

    /// The same, and TLS may have been what has failed.
    pub fn tried(&mut self, link: Key, result: Result<(), Unconnected>, cx: &mut Cx<'_>) {
        self.connects.cancel(link.place);
        let Some(Link { to, state, .. }) = self.links.get(link) else { return };
        let backend = to.backend;
        match state {
            State::Connecting { user, begun, timed_out } => {
                let (user, begun, timed_out) = (*user, *begun, *timed_out);
                match result {
                    Ok(()) => {
                        *state = State::Serving { user };
                        let waited = cx.now.since(begun);
                        cx.books.metrics().connect_time.record(waited);
                        let what = Assigned { line: Line::new(), reused: false, private: false };
                        self.serve(user, backend, what, cx);
                    }
                    Err(why) => {
                        self.links.remove(link);
                        cx.out.push(Cmd::Close { conn: Conn::Link(link), reset: false });
                        self.connect_failed(user, why, timed_out, cx);
                    }
                }
            }
            State::Closing { connect, .. } => {
                *connect = false;
                self.close_link_if_settled(link, cx);
            }
            State::Trunk(_) => self.trunk_tried(link, result, cx),
            _ => debug_assert!(false, "a link is connected once"),
        }
    }

    /// Something happened on a connection.
    pub fn happened(&mut self, conn: Conn, event: Event, cx: &mut Cx<'_>) {
        let starved = matches!(event, Event::Received { what: Received::NoBuffers, .. });
        match conn {
            Conn::User(key) => self.act(key, cx, |gateway, context| {
                gateway.handle(event, context);
            }),
            Conn::Link(key) => self.happened_on_link(key, event, cx),
        }
        self.lighten(cx);
        if starved {
            cx.books.metrics().counters.buffers_exhausted.one();
            self.starve(cx.now, conn);
        }
    }

    /// Lends a gateway everything it needs, and does what it wants.
    fn act(&mut self, key: Key, cx: &mut Cx<'_>, act: impl FnOnce(&mut Gateway, &mut Context<'_>)) {
        if self.lend(key, cx, act) {
            self.follow(key, cx);
        }
    }

    fn lend(
        &mut self,
        key: Key,
        cx: &mut Cx<'_>,
        act: impl FnOnce(&mut Gateway, &mut Context<'_>),
    ) -> bool {
        let Some(user) = self.users.get(key) else {
            debug_assert!(false, "an event came for a user who is gone");
            return false;
        };
        self.date.set(cx.now.unix_ms());
        let mut context = Context {
            now: cx.now,
            pool: cx.pool,
            kit: &mut self.kit,
            settings: &self.settings,
            snapshot: cx.books.snapshot(),
            features: self.features,
            date: &self.date,
            out: &mut self.wanted,
            journal: &mut *self.journal,
        };
        act(&mut user.gateway, &mut context);
        true
    }

    /// Carries out what a gateway asked for, which may make it ask for more.
    fn follow(&mut self, key: Key, cx: &mut Cx<'_>) {
        let mut next = 0;
        while let Some(wanted) = self.wanted.get(next).copied() {
            next += 1;
            match wanted {
                http::GatewayCmd::Wire(what) => self.wire(key, what, cx),
                http::GatewayCmd::Obtain(wish) => self.obtain(key, wish, cx),
                http::GatewayCmd::Release => self.release(key, cx),
                http::GatewayCmd::Answered => {
                    if let Some(entry) = self.entry(key) {
                        cx.books.backend_answered(entry, cx.now);
                    }
                }
                http::GatewayCmd::Unanswered { since } => {
                    let link = self.users.get(key).and_then(|user| user.link);
                    self.doubt_trunk(link);
                    if let Some(entry) = self.entry(key) {
                        cx.books.backend_silent(entry, since, cx.now);
                    }
                }
                http::GatewayCmd::Streams => self.hear(key),
                http::GatewayCmd::Calmed(excess) => Sessions::calmed(excess, cx),
            }
        }
        self.wanted.clear();
        self.review(key, cx);
        if self.has_crossings() {
            self.cross(cx);
        }
    }

    /// What has become of a user who has just been called.
    fn review(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        let moved = user.gateway.moved();
        let sent = moved != user.moved;
        if sent {
            user.moved = moved;
            if let Some(entry) = &mut user.entry {
                cx.books.moved(entry, moved[0], moved[1], cx.now);
            }
        }
        if !user.gateway.wants_backend() {
            self.forgo(key, cx);
        }
        self.plan_look(cx.now, key, sent);
        self.weigh(key);
        self.schedule(key);
        self.close_user_if_settled(key, cx);
        if self.departs {
            self.list_if_packed(key);
        }
    }

    fn entry(&mut self, key: Key) -> Option<&Entry> {
        self.users.get(key)?.entry.as_ref()
    }

    fn wire(&mut self, key: Key, what: proxy::StreamCmd, cx: &mut Cx<'_>) {
        let Some(User { link, stream_of, .. }) = self.users.get(key) else { return };
        let (link, stream_of) = (*link, *stream_of);
        match (what.side(), stream_of, link) {
            (Side::Client, Some(stream), _) => self.pass_down(stream, what),
            (Side::Client, None, _) => cx.out.push(Cmd::Wire { conn: Conn::User(key), what }),
            (Side::Backend, _, Some(link)) => self.wire_link(link, what, cx),
            (Side::Backend, _, None) => {
                debug_assert!(false, "a gateway uses the link that it has");
            }
        }
    }

    /// Lets the user leave once nothing is in flight on its connection.
    fn close_user_if_settled(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(key) else { return };
        let Some(ending) = user.gateway.ending() else { return };
        let over = !user.gateway.in_flight() && user.leaving.is_none();
        if let Some(link) = user.private {
            self.drop_spare(link, cx);
        }
        let Some(user) = self.users.get(key).filter(|_| over) else { return };
        if user.stream_of.is_some() {
            return self.close_stream(key, ending.reset, cx);
        }
        if user.is_elsewhere {
            return self.forget(key, cx);
        }
        // A user who was idle too long has had its time; only the last words get a moment.
        let still = match ending.reason {
            EndReason::Idle => grace::ORDERED,
            _ => user.gateway.limits().body,
        };
        user.leaving = Some(Leaving::new(cx.now, ending.reset, still));
        self.deadlines.cancel(key.place);
        let no_session = user.entry.is_none();
        match ending.reason {
            // What was sent is with the kernel; the place goes to the next user.
            _ if no_session => drop(self.hurry_user(cx.now, key, Duration::ZERO)),
            reason if grace::is_order(reason) => {
                self.hurry_user(cx.now, key, grace::of(reason));
            }
            _ => {}
        }
        cx.out.push(Cmd::Look { conn: Conn::User(key) });
    }
}

#[cfg(test)]
mod tests;
