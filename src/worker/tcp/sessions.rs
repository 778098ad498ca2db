//! The life of a TCP session: accept, pick, connect, relay, end. Owns the sessions of one worker and
//! their deadlines; decides from events and the time it is given, and does nothing itself.
//!
//! ```text
//!   accepted --> Connecting --connected--> Relaying --over, idle, ordered--> Ending --> Parting --> closed
//!                 |     ^ \                                                    ^ \                    ^
//!                 +retry+  +--every backend refused, ordered ------------------+  +--never relayed-----+
//! ```
//!
//! While the worker stands still (`still`), a session that is not connected waits, and one that relays only keeps
//! what comes.
//!
//! A session leaves its place only when the kernel has no operation left on either socket, so that a
//! completion never meets another session.

mod deadlines;
mod estate;
mod parting;
mod still;

use std::net::SocketAddr;

use nix::errno::Errno;

use crate::base::lack::Lack;
use crate::base::time::Now;
use crate::base::wheel::Wheel;
use crate::cluster::{BackendId, ServiceId, Timeouts};
use crate::proxy::greeting::{Caller, Screen, Screened};
use crate::proxy::line::Features;
use crate::proxy::outlook::Watch;
use crate::proxy::tcp::{Progress, Relay};
use crate::proxy::{self, Event, Received, Side};
use crate::ring::pool::{Buf, Pool};
use crate::session::EndReason;
use crate::worker::books::Entry;
use crate::worker::cx;
use crate::worker::ends::Ends;
use crate::worker::grace;
use crate::worker::link::{Order, Refusal};
use crate::worker::opening::{Opening, Unconnected};
use crate::worker::slots::{Key, Slots};
use crate::worker::starved::Starved;
pub use estate::Seat;
use parting::Parting;
use still::Waiting;

/// Backends that may fail one user before it is turned away.
const ATTEMPTS_MAX: usize = 3;
/// Backends one user is offered in all. One that could not be asked, because no local port towards it was
/// free, has not failed the user.
const OFFERS_MAX: usize = 8;

/// What the driver is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cmd {
    /// Open a new socket for the session's backend side and connect it; an older one is closed.
    Connect {
        key: Key,
        to: SocketAddr,
    },
    CancelConnect {
        key: Key,
    },
    Relay {
        key: Key,
        what: proxy::StreamCmd,
    },
    /// Ask how the send queues of both sockets stand, and tell [`Sessions::told`] at once.
    Look {
        key: Key,
    },
    /// Close both sockets, on which nothing is in flight; `reset` sends RST instead of FIN.
    Close {
        key: Key,
        reset: bool,
    },
}

/// The context of every decision about a session.
pub type Cx<'a> = cx::Cx<'a, Cmd>;

pub struct Sessions {
    features: Features,
    slots: Slots<Session>,
    deadlines: Wheel,
    starved: Starved<(Key, Side)>,
    /// While the worker stands still.
    waiting: Vec<Waiting>,
}

struct Session {
    phase: Phase,
    relay: Relay,
    entry: Entry,
    tried: Tried,
    /// When the last connection was begun, or when the last byte moved.
    active: Now,
    half_closed: bool,
    /// By side, whether its first bytes are still to be looked at: the backend's for how long they took, a
    /// stranger's for a PROXY header.
    unseen: [bool; 2],
    screen: Screen,
    /// Where the user has connected to, if a proxy has told.
    destination: Option<SocketAddr>,
    /// Both connections were established at some time.
    relayed: bool,
    /// It goes on in another process, and is forgotten here once nothing is in flight.
    is_elsewhere: bool,
    features: Features,
    /// When its send queues are looked at next, and what the last looks said about each side's host.
    look_at: Now,
    watches: [Watch; 2],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Connecting,
    Relaying,
    /// Waits for operations in flight; `connect`: a connection attempt is one of them. `ordered`: who has
    /// ordered the end meanwhile.
    Ending {
        reason: EndReason,
        connect: bool,
        ordered: Option<EndReason>,
    },
    /// Waits for what the kernels have not delivered yet.
    Parting(Parting),
}

/// The backends that this user was offered.
#[derive(Default)]
struct Tried {
    backends: [Option<BackendId>; OFFERS_MAX],
    count: usize,
    /// How many of them could not be asked for want of a local port.
    portless: usize,
}

impl Sessions {
    pub fn new(features: Features, now: Now) -> Sessions {
        Sessions {
            features,
            slots: Slots::default(),
            deadlines: Wheel::new(now),
            starved: Starved::new(now),
            waiting: Vec::new(),
        }
    }

    /// Sessions in any phase.
    pub fn live(&self) -> usize {
        self.slots.live()
    }

    /// A user of this service has connected, and speaks for itself.
    pub fn accepted(
        &mut self,
        service: ServiceId,
        client: SocketAddr,
        cx: &mut Cx<'_>,
    ) -> Option<Key> {
        self.welcome(service, client.into(), false, cx)
    }

    /// A user of this service has connected. `None`: turned away; close the connection. `is_sealed`: it
    /// speaks TLS, so its bytes cannot stay in the kernel.
    pub fn welcome(
        &mut self,
        service: ServiceId,
        caller: Caller,
        is_sealed: bool,
        cx: &mut Cx<'_>,
    ) -> Option<Key> {
        let (key, to) = self.begin(service, caller, is_sealed, cx)?;
        cx.out.push(Cmd::Connect { key, to });
        Some(key)
    }

    /// The same, and where to connect to for it.
    #[inline(always)]
    fn begin(
        &mut self,
        service: ServiceId,
        caller: Caller,
        is_sealed: bool,
        cx: &mut Cx<'_>,
    ) -> Option<(Key, SocketAddr)> {
        let Caller { address: client, destination, is_stranger } = caller;
        let admitted = cx.books.admit(service, client, cx.now);
        let mut entry = match admitted {
            Ok(entry) => entry,
            Err(why) => {
                cx.books.refused(service, client, why);
                return None;
            }
        };
        if is_sealed {
            cx.books.secured(&mut entry);
        }
        let Some(choice) = cx.books.assign(&mut entry, &[]) else {
            let why = cx.books.nobody(service);
            cx.books.refused(service, client, why);
            cx.books.close(entry, EndReason::Unreachable, cx.now);
            return None;
        };
        let mut tried = Tried::default();
        tried.add(choice.backend);
        let key = self.place(Session {
            phase: Phase::Connecting,
            relay: Relay::new(),
            entry,
            tried,
            active: cx.now,
            half_closed: false,
            unseen: [is_stranger, true],
            screen: Screen::default(),
            destination,
            relayed: false,
            is_elsewhere: false,
            features: Features { splice: self.features.splice && !is_sealed, ..self.features },
            look_at: Now::NEVER,
            watches: [Watch::NEW; 2],
        });
        self.deadlines.schedule(key.place, cx.now.plus(cx.books.timeouts(service).connect));
        Some((key, choice.address))
    }

    /// The user of whom the backend is told by a PROXY header, if it wants one. Asked once the connection to
    /// it is established, before [`Sessions::connected`].
    pub fn introduces(&mut self, key: Key) -> Option<Caller> {
        let session = self.slots.get(key)?;
        session.entry.choice().filter(|choice| choice.proxy)?;
        Some(Caller { destination: session.destination, ..session.entry.client.into() })
    }

    /// How TLS is to be spoken on the connection, if it is and somebody still waits for it. Asked once the
    /// connection is established, before [`Sessions::connected`].
    ///
    /// # Errors
    /// The backend has left.
    pub fn opening(&mut self, key: Key, cx: &Cx<'_>) -> Result<Option<Opening>, Errno> {
        let waits = self.slots.get(key).filter(|session| session.phase == Phase::Connecting);
        let Some(session) = waits else { return Ok(None) };
        let Some(choice) = session.entry.choice().filter(|choice| choice.tls) else {
            return Ok(None);
        };
        let is_late = session.due(session.timeouts(cx)) <= cx.now;
        cx.books.opening(session.entry.service, choice, is_late)
    }

    /// A connection to a backend is good to use, or has failed.
    pub fn connected(&mut self, key: Key, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        self.tried(key, result.map_err(Unconnected::Errno), cx);
    }

    /// The same, and TLS may have been what has failed.
    pub fn tried(&mut self, key: Key, result: Result<(), Unconnected>, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        match (session.phase, result) {
            (Phase::Ending { reason, ordered, .. }, _) => {
                session.phase = Phase::Ending { reason, connect: false, ordered };
                self.close_if_settled(key, cx);
            }
            (_, Ok(())) => self.start(key, cx),
            (_, Err(why)) => self.retry(key, why, cx),
        }
    }

    /// Something happened on one of a session's connections.
    pub fn relayed(&mut self, key: Key, event: Event, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else {
            debug_assert!(false, "a completion came for a session that is gone");
            give_back(event, cx.pool);
            return;
        };
        if let Phase::Ending { .. } | Phase::Parting(_) = session.phase {
            session.relay.settle(event, cx.pool);
            session.book(cx);
            return self.close_if_settled(key, cx);
        }
        let sent = matches!(event, Event::Sent { .. } | Event::Spliced { moved: 1.., .. });
        let starved = match event {
            Event::Received { side, what: Received::NoBuffers, .. } => Some(side),
            _ => None,
        };
        if let Event::Received { side, what: Received::Data(ref buf), .. } = event
            && session.unseen[side as usize]
            && session.look_at_first(side, buf, cx)
        {
            session.relay.settle(event, cx.pool);
            return self.refuse_header(key, cx);
        }
        let relay_out = &mut |what| cx.out.push(Cmd::Relay { key, what });
        let was_unsure = session.relay.is_unsure();
        session.relay.handle(event, cx.pool, session.features, relay_out);
        if !was_unsure && session.relay.is_unsure() {
            self.deadlines.schedule(key.place, session.due(session.timeouts(cx)));
        }
        if session.look_at == Now::NEVER && (sent || session.relay.is_sending()) {
            let timeouts = session.timeouts(cx);
            session.look_at = session.next_look(cx.now, timeouts);
            self.deadlines.schedule(key.place, session.due(timeouts));
        }
        if sent {
            session.active = cx.now;
            let up = session.relay.delivered(Side::Client);
            let down = session.relay.delivered(Side::Backend);
            cx.books.moved(&mut session.entry, up, down, cx.now);
        }
        if let Some(side) = starved {
            cx.books.metrics().counters.buffers_exhausted.one();
            self.starve(cx.now, key, side);
        }
        self.follow(key, cx);
    }

    /// A stranger has sent a PROXY header, of which the backend has not seen enough to take it for one.
    #[cold]
    fn refuse_header(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        let (service, client) = (session.entry.service, session.entry.client);
        cx.books.refused(service, client, Refusal::ProxyHeader);
        self.end(key, EndReason::ProxyHeader, cx);
    }

    /// Looks at what has been still for a while, or for too long.
    pub fn expire(&mut self, cx: &mut Cx<'_>) {
        while let Some(place) = self.deadlines.pop(cx.now) {
            let Some(key) = self.slots.at(place) else { continue };
            let Some(session) = self.slots.get(key) else { continue };
            let due = session.due(session.timeouts(cx));
            if due > cx.now {
                self.deadlines.schedule(place, due);
                continue;
            }
            match session.phase {
                // Its completion says ECANCELED, and `retry` goes on from there.
                Phase::Connecting => cx.out.push(Cmd::CancelConnect { key }),
                Phase::Relaying if session.rests_until(session.timeouts(cx)) > cx.now => {
                    session.relay.look_again(&mut |what| cx.out.push(Cmd::Relay { key, what }));
                    self.deadlines.schedule(place, session.due(session.timeouts(cx)));
                }
                // What the kernels have delivered meanwhile decides, in `told`.
                Phase::Relaying | Phase::Parting(_) => cx.out.push(Cmd::Look { key }),
                Phase::Ending { .. } => {}
            }
        }
    }

    /// When [`Sessions::expire`] or [`Sessions::relieve`] has something to do next.
    pub fn next_deadline(&self) -> Option<Now> {
        [self.deadlines.next_deadline(), self.starved.next_try()].into_iter().flatten().min()
    }

    /// Lets flows that waited for blocks try again, the longest waiting first.
    pub fn relieve(&mut self, cx: &mut Cx<'_>) {
        let mut relief = self.starved.relief(cx.now);
        while let Some((key, side)) = self.starved.next(&relief, cx.now, cx.pool) {
            relief.fed += usize::from(self.feed(key, side, cx));
        }
    }

    /// False when the flow has ended while it waited.
    fn feed(&mut self, key: Key, side: Side, cx: &mut Cx<'_>) -> bool {
        let Some(session) = self.slots.get(key) else { return false };
        if session.phase != Phase::Relaying {
            return false;
        }
        let relay_out = &mut |what| cx.out.push(Cmd::Relay { key, what });
        session.relay.feed(side, cx.pool, session.features, relay_out);
        true
    }

    /// Whether flows wait for blocks.
    pub fn is_starved(&self) -> bool {
        !self.starved.is_empty()
    }

    /// Carries out an order that concerns sessions.
    pub fn order(&mut self, order: Order, cx: &mut Cx<'_>) {
        match order {
            Order::EndBackend { .. } => self.end_backends(&Ends::of(order), cx),
            Order::EndSession { id, reason } => {
                let found = self.slots.find(|session| cx.books.id(&session.entry) == id);
                if let Some(key) = found {
                    self.end(key, reason, cx);
                }
            }
            Order::Stop => self.end_all(|_| true, EndReason::Stopping, cx),
            Order::Drain => {}
        }
    }

    fn start(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(session) = self.begin_to_relay(key, cx) else { return };
        let relay_out = &mut |what| cx.out.push(Cmd::Relay { key, what });
        session.relay.advance(cx.pool, session.features, relay_out);
    }

    /// Its connection is there; nothing is received yet.
    #[inline]
    fn begin_to_relay(&mut self, key: Key, cx: &mut Cx<'_>) -> Option<&mut Session> {
        let session = self.slots.get(key)?;
        cx.books.metrics().connect_time.record(cx.now.since(session.active));
        cx.books.started(&session.entry);
        session.phase = Phase::Relaying;
        session.relayed = true;
        // Bytes under TLS cannot stay in the kernel.
        session.features.splice &= session.entry.choice().is_none_or(|choice| !choice.tls);
        session.active = cx.now;
        self.deadlines.schedule(key.place, session.due(session.timeouts(cx)));
        Some(session)
    }

    fn retry(&mut self, key: Key, why: Unconnected, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        // Only its deadline cancels an attempt that is still wanted.
        let is_late = why == Unconnected::Errno(Errno::ECANCELED);
        let why = if is_late { Unconnected::Errno(Errno::ETIMEDOUT) } else { why };
        let lack = why.lack();
        if lack != Lack::Everywhere {
            match lack {
                Lack::None => cx.books.backend_failed(&session.entry, why),
                _ => cx.books.backend_out_of_ports(&session.entry),
            }
            session.tried.portless += usize::from(lack == Lack::Ports);
            let again = session.tried.may_go_on();
            let tried = session.tried.list();
            let next = again.then(|| cx.books.assign(&mut session.entry, &tried)).flatten();
            if let Some(choice) = next {
                cx.books.metrics().counters.retries.one();
                session.tried.add(choice.backend);
                session.active = cx.now;
                self.deadlines.schedule(key.place, session.due(session.timeouts(cx)));
                return cx.out.push(Cmd::Connect { key, to: choice.address });
            }
        }
        let (service, client) = (session.entry.service, session.entry.client);
        let ours = lack != Lack::None || session.tried.portless > 0;
        let why = if ours { Refusal::Exhausted } else { Refusal::Unreachable };
        cx.books.refused(service, client, why);
        let reason = EndReason::Unreachable;
        session.phase = Phase::Ending { reason, connect: false, ordered: None };
        self.close_if_settled(key, cx);
    }

    fn starve(&mut self, now: Now, key: Key, side: Side) {
        let slots = &mut self.slots;
        self.starved.push(now, (key, side), |(key, _)| slots.get(*key).is_some());
    }

    fn place(&mut self, session: Session) -> Key {
        let key = self.reserve();
        self.slots.fill(key, session);
        key
    }

    /// Acts on how far the relay has come.
    fn follow(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        match session.relay.progress() {
            Progress::Running => {}
            Progress::HalfClosed if session.half_closed => {}
            Progress::HalfClosed => {
                session.half_closed = true;
                // The other side has its time from the end on, however still it was before.
                session.active = cx.now;
                self.deadlines.schedule(key.place, session.due(session.timeouts(cx)));
            }
            Progress::Over(reason) => self.end(key, reason, cx),
        }
    }

    /// As one [`Order::EndBackend`] for each of these.
    pub fn end_backends(&mut self, ends: &Ends, cx: &mut Cx<'_>) {
        let reason = |session: &Session| ends.reason_for(&session.entry);
        for key in self.slots.keys(|session| reason(session).is_some()) {
            let why = self.slots.get(key).and_then(|session| reason(session));
            if let Some(why) = why {
                self.end(key, why, cx);
            }
        }
    }

    fn end_all(&mut self, which: impl Fn(&Session) -> bool, reason: EndReason, cx: &mut Cx<'_>) {
        for key in self.slots.keys(which) {
            self.end(key, reason, cx);
        }
    }

    fn end(&mut self, key: Key, reason: EndReason, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        let connect = match session.phase {
            Phase::Ending { .. } | Phase::Parting(_) => return self.hurry(cx.now, key, reason),
            Phase::Connecting => {
                cx.out.push(Cmd::CancelConnect { key });
                true
            }
            Phase::Relaying => false,
        };
        let ordered = Some(reason).filter(|reason| grace::is_order(*reason));
        session.phase = Phase::Ending { reason, connect, ordered };
        session.relay.stop(&mut |what| cx.out.push(Cmd::Relay { key, what }));
        self.close_if_settled(key, cx);
    }

    fn close_if_settled(&mut self, key: Key, cx: &mut Cx<'_>) {
        let Some(session) = self.slots.get(key) else { return };
        let Phase::Ending { reason, connect: false, ordered } = session.phase else { return };
        if session.relay.in_flight() {
            return;
        }
        if session.is_elsewhere {
            return self.forget(key, cx);
        }
        match session.relayed {
            true => self.begin_to_part(key, reason, ordered, cx),
            false => self.close(key, reason, [0; 2], cx),
        }
    }
}

impl Session {
    /// Looks at the first bytes of a side; whether they may not be passed on.
    #[cold]
    fn look_at_first(&mut self, side: Side, buf: &Buf, cx: &Cx<'_>) -> bool {
        let screened = match side {
            Side::Client => self.screen.see(cx.pool.bytes(buf)),
            Side::Backend => {
                cx.books.first_byte(&self.entry, cx.now);
                Screened::Clean
            }
        };
        self.unseen[side as usize] = screened == Screened::Undecided;
        screened == Screened::Header
    }

    /// Counts what was delivered on both of its ways.
    fn book(&mut self, cx: &mut Cx<'_>) {
        let [up, down] = Side::BOTH.map(|side| self.relay.delivered(side));
        cx.books.moved(&mut self.entry, up, down, cx.now);
    }

    /// How long things may take in it, by the terms that its service has now.
    fn timeouts<'c>(&self, cx: &'c Cx<'_>) -> &'c Timeouts {
        cx.books.timeouts(self.entry.service)
    }
}

impl Tried {
    fn add(&mut self, backend: BackendId) {
        self.backends[self.count] = Some(backend);
        self.count += 1;
    }

    fn may_go_on(&self) -> bool {
        self.count < OFFERS_MAX && self.count - self.portless < ATTEMPTS_MAX
    }

    fn list(&self) -> [BackendId; OFFERS_MAX] {
        // What was not tried is filled up with what was.
        let first = self.backends[0].unwrap_or(BackendId(u32::MAX));
        self.backends.map(|backend| backend.unwrap_or(first))
    }
}

fn give_back(event: Event, pool: &mut Pool) {
    if let Event::Received { what: Received::Data(buf), .. } = event {
        pool.give_back(buf);
    }
}

#[cfg(test)]
mod tests;
