//! API users of one worker: their connections, and the connections to backends that they share. Owns
//! who is on which connection and their deadlines; what a connection is used for is `proxy::http`'s.
//! Decides from events and a time that it is handed, and does nothing itself.
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
//! Users and links stay in their places until the kernel has done with their sockets, so a completion
//! can never meet a stranger.

mod heads;
mod links;
mod looks;
mod relief;
mod turned_away;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;

use crate::base::time::Now;
use crate::base::wheel::Wheel;
use crate::cluster::{BackendId, Protocol, ServiceId};
use crate::http::date::Date;
use crate::proxy::http::spares::Spares;
use crate::proxy::http::{self, Assigned, Context, Gateway, Journal, Kit, Settings};
use crate::proxy::line::{Features, Line};
use crate::proxy::{self, Event, Received, Side};
use crate::ring::pool::Pool;
use crate::session::EndReason;
use crate::worker::books::{Entry, SharedBooks};
use crate::worker::link::Order;
use crate::worker::slots::{Key, Slots};
use crate::worker::starved::Starved;
use looks::{Leaving, Looks, ORDERED_GRACE, STOP_GRACE};

/// The service of the users who come to the API door.
const SERVICE: ServiceId = ServiceId::built_in(Protocol::Api);
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
    /// On that connection, whatever side the command names.
    Wire {
        conn: Conn,
        what: proxy::Cmd,
    },
    /// Ask how the connection's send queue stands, and tell [`Sessions::told`] at once.
    Look {
        conn: Conn,
    },
    /// Close the socket, with a reset if so. Nothing is in flight on it.
    Close {
        conn: Conn,
        reset: bool,
    },
}

/// The gateways of one worker.
pub struct Sessions {
    settings: Settings,
    features: Features,
    books: SharedBooks,
    journal: Box<dyn Journal>,
    kit: Kit,
    date: Date,
    users: Slots<User>,
    links: Slots<Link>,
    spares: Spares<Key>,
    /// Those on which a user has logged in: each waits for that user.
    private: Spares<Key>,
    /// Users for whom there was no room, in the order in which they came; some of them have left.
    turned_away: VecDeque<Key>,
    /// Bytes on the heap for all users.
    held: usize,
    /// By a user's place, and by a link's while it is being connected.
    deadlines: Wheel,
    connects: Wheel,
    sweep_at: Now,
    /// Of the snapshot that the spares were last held against.
    version: u64,
    draining: bool,
    /// Nobody waits for a slow reader any more.
    stopping: bool,
    starved: Starved<Conn>,
    /// What the gateway at hand wants.
    wanted: Vec<http::Cmd>,
}

struct User {
    gateway: Gateway,
    /// None for a user who is turned away.
    entry: Option<Entry>,
    link: Option<Key>,
    /// The link on which it has logged in, while no request is on it.
    private: Option<Key>,
    /// The backends that the request at hand was offered.
    tried: Vec<BackendId>,
    /// How many of them could not be asked for want of a local port.
    portless: usize,
    /// A backend was found for the session before.
    started: bool,
    /// Bytes that stand in the books.
    moved: [u64; 2],
    /// Bytes that it holds on the heap.
    held: usize,
    scheduled: Now,
    looks: Looks,
    /// It is over, and waits for what its connection has not delivered yet.
    leaving: Option<Leaving>,
}

impl User {
    /// Someone who has just connected.
    fn new(gateway: Gateway, entry: Option<Entry>) -> User {
        User {
            gateway,
            entry,
            link: None,
            private: None,
            tried: Vec::new(),
            portless: 0,
            started: false,
            moved: [0; 2],
            held: 0,
            scheduled: Now::NEVER,
            looks: Looks::NEW,
            leaving: None,
        }
    }
}

struct Link {
    backend: BackendId,
    state: State,
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
    /// Waits for what is still in flight; `connect`: a connection attempt is. Then it is closed, with
    /// a `reset` if so.
    Closing {
        line: Line,
        connect: bool,
        reset: bool,
    },
    /// Waits for what it has not delivered yet.
    Leaving(Leaving),
}

impl Sessions {
    pub fn new(
        settings: Settings,
        features: Features,
        books: SharedBooks,
        journal: Box<dyn Journal>,
        now: Now,
    ) -> Sessions {
        Sessions {
            spares: Spares::new(settings.spares_max),
            private: Spares::new(settings.private_max),
            turned_away: VecDeque::new(),
            held: 0,
            settings,
            // A pipe would stand between two connections that change partners.
            features: Features { splice: false, ..features },
            books,
            journal,
            kit: Kit::new(),
            date: Date::at(now.unix_ms()),
            users: Slots::new(),
            links: Slots::new(),
            deadlines: Wheel::new(now),
            connects: Wheel::new(now),
            sweep_at: Now::NEVER,
            version: 0,
            draining: false,
            stopping: false,
            starved: Starved::new(now),
            wanted: Vec::with_capacity(16),
        }
    }

    /// Connections of any kind, until the kernel has done with them.
    pub fn live(&self) -> usize {
        self.users.len() + self.links.len()
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

    /// Takes blocks for heads that have to be written when the pool is used up.
    pub fn start(&mut self, pool: &mut Pool) {
        self.kit.refill(0, pool);
    }

    /// A user has connected.
    pub fn accepted(
        &mut self,
        now: Now,
        client: SocketAddr,
        pool: &mut Pool,
        out: &mut Vec<Cmd>,
    ) -> Key {
        let mut books = self.books.borrow_mut();
        let entry = match books.admit(SERVICE, client, now) {
            Ok(entry) => entry,
            Err(why) => {
                books.refused(SERVICE, client, why);
                drop(books);
                return self.turn_away(now, client, why, pool, out);
            }
        };
        let address = client.ip().to_canonical();
        let trusted = self.settings.trusted.iter().any(|net| net.contains(&address));
        let gateway = Gateway::new(books.id(&entry), client, trusted, now);
        drop(books);
        let key = self.users.put(User::new(gateway, Some(entry)));
        self.make_room();
        self.act(now, key, pool, out, |gateway, cx| gateway.start(cx));
        key
    }

    /// A connection to a backend stands, or has failed.
    pub fn connected(
        &mut self,
        now: Now,
        link: Key,
        result: Result<(), Errno>,
        pool: &mut Pool,
        out: &mut Vec<Cmd>,
    ) {
        self.connects.cancel(link.place);
        let Some(Link { backend, state }) = self.links.get(link) else { return };
        let backend = *backend;
        match state {
            State::Connecting { user, begun, timed_out } => {
                let (user, begun, timed_out) = (*user, *begun, *timed_out);
                match result {
                    Ok(()) => {
                        *state = State::Serving { user };
                        let books = self.books.borrow();
                        books.metrics().connect_time.record(now.since(begun));
                        drop(books);
                        let what = Assigned { line: Line::new(), reused: false, private: false };
                        self.serve(now, user, backend, what, pool, out);
                    }
                    Err(errno) => {
                        self.links.remove(link);
                        out.push(Cmd::Close { conn: Conn::Link(link), reset: false });
                        self.connect_failed(now, user, errno, timed_out, pool, out);
                    }
                }
            }
            State::Closing { connect, .. } => {
                *connect = false;
                self.close_link_if_settled(now, link, out);
            }
            State::Serving { .. } | State::Spare { .. } | State::Leaving(_) => {
                debug_assert!(false, "a link is connected once");
            }
        }
    }

    /// Something happened on a connection.
    pub fn happened(
        &mut self,
        now: Now,
        conn: Conn,
        event: Event,
        pool: &mut Pool,
        out: &mut Vec<Cmd>,
    ) {
        let starved = matches!(event, Event::Received { what: Received::NoBuffers, .. });
        match conn {
            Conn::User(key) => self.act(now, key, pool, out, |gateway, cx| {
                gateway.handle(event, cx);
            }),
            Conn::Link(key) => self.happened_on_link(now, key, event, pool, out),
        }
        self.lighten(now, pool, out);
        if starved {
            self.books.borrow().metrics().counters.buffers_exhausted.one();
            self.starve(now, conn);
        }
    }

    /// Ends what has been still for too long, and drops spare connections that are of no more use.
    pub fn expire(&mut self, now: Now, pool: &mut Pool, out: &mut Vec<Cmd>) {
        if self.live() > 0 || self.kit.has_left_over() {
            self.kit.refill(self.live(), pool);
        }
        while let Some(place) = self.deadlines.pop(now) {
            let Some(key) = self.users.at(place) else { continue };
            let Some(user) = self.users.get(key) else { continue };
            user.scheduled = Now::NEVER;
            if user.leaving.is_some() {
                out.push(Cmd::Look { conn: Conn::User(key) });
                continue;
            }
            let due = user.gateway.deadline(&self.settings).is_some_and(|due| due <= now);
            let at_work = user.gateway.is_sending() || user.gateway.is_tunnel();
            match (due || user.looks.at <= now, at_work) {
                (true, true) => self.look(key, out),
                (true, false) if due => {
                    self.act(now, key, pool, out, |gateway, cx| gateway.expire(cx));
                }
                (true, false) => {
                    user.looks.at = Now::NEVER;
                    self.schedule(key);
                }
                (false, _) => self.schedule(key),
            }
        }
        while let Some(place) = self.connects.pop(now) {
            let Some(link) = self.links.at(place) else { continue };
            match self.links.get(link).map(|link| &mut link.state) {
                Some(State::Connecting { timed_out, .. }) => {
                    // Its completion says ECANCELED, and `connected` goes on from there.
                    *timed_out = true;
                    out.push(Cmd::CancelConnect { link });
                }
                Some(State::Leaving(_)) => out.push(Cmd::Look { conn: Conn::Link(link) }),
                _ => {}
            }
        }
        self.sweep(now, out);
    }

    /// When [`Sessions::expire`] or [`Sessions::relieve`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        let sweep = (self.sweep_at != Now::NEVER).then_some(self.sweep_at);
        let again = self.starved.next_try();
        let wheels = [self.deadlines.next_deadline(), self.connects.next_deadline()];
        wheels.into_iter().chain([sweep, again]).flatten().min()
    }

    /// Carries out an order that concerns API users.
    pub fn order(&mut self, now: Now, order: Order, pool: &mut Pool, out: &mut Vec<Cmd>) {
        match order {
            Order::EndBackend { backend, reason } => {
                let on_it = |user: &User| {
                    user.link.is_some()
                        && user
                            .entry
                            .as_ref()
                            .and_then(Entry::choice)
                            .is_some_and(|choice| choice.backend == backend)
                };
                self.end_all(now, on_it, reason, pool, out);
            }
            Order::EndSession { id, reason } => {
                let books = self.books.clone();
                let id_of = move |entry: &Entry| books.borrow().id(entry);
                let named =
                    move |user: &User| user.entry.as_ref().is_some_and(|entry| id_of(entry) == id);
                self.end_all(now, named, reason, pool, out);
            }
            Order::Stop => {
                (self.draining, self.stopping) = (true, true);
                self.end_all(now, |_| true, EndReason::Stopping, pool, out);
                self.hurry_links(now, STOP_GRACE);
                self.drop_all_spares(now, out);
            }
            Order::Drain => {
                self.draining = true;
                for key in self.users.keys(|_| true) {
                    self.act(now, key, pool, out, |gateway, cx| gateway.drain(cx));
                }
                self.drop_all_spares(now, out);
            }
        }
    }

    fn end_all(
        &mut self,
        now: Now,
        which: impl Fn(&User) -> bool,
        reason: EndReason,
        pool: &mut Pool,
        out: &mut Vec<Cmd>,
    ) {
        let grace = if reason == EndReason::Stopping { STOP_GRACE } else { ORDERED_GRACE };
        for key in self.users.keys(which) {
            if !self.hurry_user(now, key, grace) {
                self.act(now, key, pool, out, |gateway, cx| gateway.end(reason, true, cx));
                self.hurry_user(now, key, grace);
            }
        }
    }

    /// Lends a gateway everything it needs, and does what it wants.
    fn act(
        &mut self,
        now: Now,
        key: Key,
        pool: &mut Pool,
        out: &mut Vec<Cmd>,
        act: impl FnOnce(&mut Gateway, &mut Context<'_>),
    ) {
        if self.lend(now, key, pool, act) {
            self.follow(now, key, pool, out);
        }
    }

    fn lend(
        &mut self,
        now: Now,
        key: Key,
        pool: &mut Pool,
        act: impl FnOnce(&mut Gateway, &mut Context<'_>),
    ) -> bool {
        let Some(user) = self.users.get(key) else {
            debug_assert!(false, "an event came for a user who is gone");
            return false;
        };
        self.date.set(now.unix_ms());
        let mut cx = Context {
            now,
            pool,
            kit: &mut self.kit,
            settings: &self.settings,
            features: self.features,
            date: &self.date,
            out: &mut self.wanted,
            journal: &mut *self.journal,
        };
        act(&mut user.gateway, &mut cx);
        true
    }

    /// Carries out what a gateway asked for, which may lead to more of it.
    fn follow(&mut self, now: Now, key: Key, pool: &mut Pool, out: &mut Vec<Cmd>) {
        let mut next = 0;
        while let Some(wanted) = self.wanted.get(next).copied() {
            next += 1;
            match wanted {
                http::Cmd::Wire(what) => self.wire(key, what, out),
                http::Cmd::Obtain(wish) => self.obtain(now, key, wish, pool, out),
                http::Cmd::Release => self.release(now, key, pool, out),
            }
        }
        self.wanted.clear();
        let Some(user) = self.users.get(key) else { return };
        let moved = user.gateway.moved();
        let sent = moved != user.moved;
        if sent {
            user.moved = moved;
            if let Some(entry) = &mut user.entry {
                self.books.borrow_mut().moved(entry, moved[0], moved[1], now);
            }
        }
        if !user.gateway.wants_backend() {
            self.forgo(key, out);
        }
        self.plan_look(now, key, sent);
        self.weigh(key);
        self.schedule(key);
        self.close_user_if_settled(now, key, out);
    }

    fn wire(&mut self, key: Key, what: proxy::Cmd, out: &mut Vec<Cmd>) {
        let side = match what {
            proxy::Cmd::Receive { side, .. }
            | proxy::Cmd::CancelReceive { side }
            | proxy::Cmd::Send { side, .. }
            | proxy::Cmd::CancelSend { side }
            | proxy::Cmd::AwaitRoom { side, .. }
            | proxy::Cmd::CancelRoom { side }
            | proxy::Cmd::FinishWriting { side }
            | proxy::Cmd::Splice { side, .. }
            | proxy::Cmd::CancelSplice { side }
            | proxy::Cmd::EndSplice { side } => side,
        };
        let link = self.users.get(key).and_then(|user| user.link);
        match (side, link) {
            (Side::Client, _) => out.push(Cmd::Wire { conn: Conn::User(key), what }),
            (Side::Backend, Some(link)) => out.push(Cmd::Wire { conn: Conn::Link(link), what }),
            (Side::Backend, None) => debug_assert!(false, "a gateway uses the link that it has"),
        }
    }

    /// Schedules the user's deadline, unless it will be looked at before anyway.
    fn schedule(&mut self, key: Key) {
        let Some(user) = self.users.get(key) else { return };
        let due = user.gateway.deadline(&self.settings).unwrap_or(Now::NEVER).min(user.looks.at);
        if due < user.scheduled && user.leaving.is_none() {
            user.scheduled = due;
            self.deadlines.schedule(key.place, due);
        }
    }

    /// Lets the user leave when the kernel works for its connection no more.
    fn close_user_if_settled(&mut self, now: Now, key: Key, out: &mut Vec<Cmd>) {
        let Some(user) = self.users.get(key) else { return };
        let Some(ending) = user.gateway.ending() else { return };
        let over = !user.gateway.in_flight() && user.leaving.is_none();
        if let Some(link) = user.private {
            self.drop_spare(now, link, out);
        }
        let Some(user) = self.users.get(key).filter(|_| over) else { return };
        // Who was too still has had its time, and what was sent last has a moment.
        let still = match ending.reason {
            EndReason::Idle => ORDERED_GRACE,
            _ => self.settings.body_timeout,
        };
        user.leaving = Some(Leaving::new(now, ending.reset, still));
        self.deadlines.cancel(key.place);
        let no_session = user.entry.is_none();
        match ending.reason {
            // What was sent is with the kernel; a place is for whoever comes next.
            _ if no_session => drop(self.hurry_user(now, key, Duration::ZERO)),
            EndReason::Stopping => drop(self.hurry_user(now, key, STOP_GRACE)),
            EndReason::Operator | EndReason::BackendLeft => {
                self.hurry_user(now, key, ORDERED_GRACE);
            }
            _ => {}
        }
        out.push(Cmd::Look { conn: Conn::User(key) });
    }
}
