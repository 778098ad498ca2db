//! Users at doors with TLS, from their arrival until the handshake is over. Owns how their ClientHello is
//! waited for and answered, or only read for the service that it asks for and passed on; how many there may
//! be and how long each may take. A session hears of a user only afterwards.
//!
//! ```text
//!   arrived --> Greeting: its ClientHello is looked at in the kernel until it is whole, and costs us nothing
//!                  |      but a seat; when seats run out, the longest of these goes first
//!                  +-----> passed on as it is, to a service that does not end TLS here
//!                  v
//!               in the queue (order)  -- one turn has time for a few -->  Shaking: rustls and the socket
//!                  ^                                                         |
//!                  +---- Again: its second ClientHello, if it is asked for ---+
//!                                                                            |
//!                                                              served  <-----+-----> an alert, counted
//! ```

mod failure;
mod order;

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::books::Held;
use super::driver::Turn;
use super::greetings::Newcomer;
use super::slots::{Key, Slots};
use crate::base::time::Now;
use crate::base::wheel::Wheel;
use crate::cluster::{DoorId, Doorway, ServiceId};
use crate::http::answer::PLAIN_HTTP;
use crate::ring::{Done, Ring, Tag, Until, lowat, sys};
use crate::tls::engine::{Engine, Fault, Refused};
use crate::tls::hello::{self, Hello, Malformed};
use crate::tls::keys::{Speech, Terms};
use failure::Failure;
use order::Order;

/// The most ciphertext that is read at once, in bytes.
const READ_BYTES: usize = hello::BYTES_MAX;
/// A fatal alert in the clear: unrecognized_name (RFC 6066 section 3).
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 1, 0, 2, 2, 112];
/// Another: decode_error (RFC 8446 section 6).
const DECODE_ERROR: [u8; 7] = [21, 3, 1, 0, 2, 2, 50];

/// A reload has taken the certificates away.
const NO_CERTIFICATE: Failure =
    Failure::Answer { fault: Fault::Internal, why: "there is no certificate any more" };

/// The users of one driver.
pub struct Lobby {
    kind: u8,
    /// Its users speak HTTP once they are let in.
    speaks_http: bool,
    guests: Slots<Guest>,
    /// In the order of their arrival; some are gone, or further.
    arrivals: VecDeque<Key>,
    order: Order,
    deadlines: Wheel,
    /// Completions up to the last look after the order, and those since that were about guests.
    reaped: u64,
    own: u64,
}

struct Guest {
    user: Newcomer,
    state: State,
    /// Its operation is to end, and it with it.
    hurry: Option<Hurry>,
    _held: Held,
}

/// Why a guest is to leave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hurry {
    Late,
    /// Its seat is needed, or the balancer stops.
    SentAway,
}

enum State {
    /// Its ClientHello is not whole; so many of its bytes have been seen.
    Greeting {
        seen: usize,
    },
    /// It is answered when there is time.
    Ready(Hello),
    Shaking(Box<Engine>),
    /// The second ClientHello has come that it was asked for; it is answered when there is time.
    Again(Box<Engine>),
}

/// What a look at a guest's socket has led to.
enum Step {
    /// It is waited for until this.
    Wait(Until),
    Queue(Hello),
    QueueAgain,
    Served,
    /// Its bytes go on as they are.
    Passed,
    Over,
}

impl Lobby {
    /// `kind`: of the tags of its operations.
    pub fn new(kind: u8, speaks_http: bool, now: Now) -> Lobby {
        Lobby {
            kind,
            speaks_http,
            guests: Slots::default(),
            arrivals: VecDeque::new(),
            order: Order::default(),
            deadlines: Wheel::new(now),
            reaped: 0,
            own: 0,
        }
    }

    /// Users whose handshake is not over.
    pub fn live(&self) -> usize {
        self.guests.live()
    }

    pub fn next_deadline(&self) -> Option<Now> {
        self.deadlines.next_deadline()
    }

    /// Whether somebody waits for the next turn's time for handshakes.
    pub fn is_busy(&self) -> bool {
        !self.order.is_empty()
    }

    /// Takes in a user who has just arrived at a door with TLS.
    pub fn meet(&mut self, user: Newcomer, turn: &mut Turn<'_>) {
        self.own += 1;
        let limits = turn.books.tls().limits;
        if self.guests.live() >= limits.handshakes && !self.make_room(turn) {
            return Failure::Full.tell(&user, None, turn);
        }
        let held = match turn.books.hold(user.doorway.service) {
            Ok(held) => held,
            Err(why) => {
                turn.books.refused(user.doorway.service, user.caller.address, why);
                return;
            }
        };
        let guest = Guest { user, state: State::Greeting { seen: 0 }, hurry: None, _held: held };
        let key = self.guests.put(guest);
        self.forget_arrivals();
        self.arrivals.push_back(key);
        self.deadlines.schedule(key.place, turn.now.plus(limits.patience));
        self.wait(key, Until::Readable, turn.ring);
    }

    /// Lets the longest go of those who have not said anything whole.
    fn make_room(&mut self, turn: &mut Turn<'_>) -> bool {
        while let Some(key) = self.arrivals.pop_front() {
            let Some(guest) = self.guests.get(key) else { continue };
            if guest.is_greeting() {
                guest.hurry = Some(Hurry::SentAway);
                Failure::Full.tell(&guest.user, None, turn);
                turn.ring.cancel(self.tag(key));
                return true;
            }
        }
        false
    }

    /// Drops the first who are gone or further: nobody stays in the list for longer than its time, or that of
    /// those before it.
    fn forget_arrivals(&mut self) {
        while let Some(key) = self.arrivals.front() {
            if self.guests.get(*key).is_some_and(|guest| guest.is_greeting()) {
                return;
            }
            self.arrivals.pop_front();
        }
    }

    /// Those who came by this door are another service's from now on, which has the same seats; but whoever has
    /// said for whom it comes stays with that one.
    pub fn assign(&mut self, id: DoorId, service: ServiceId) {
        let at_door = |guest: &&mut Guest| guest.user.doorway.door == id;
        for guest in self.guests.iter_mut().filter(at_door) {
            if matches!(guest.state, State::Greeting { .. }) {
                guest.user.doorway.service = service;
            }
        }
    }

    fn tag(&self, key: Key) -> Tag {
        Tag { kind: self.kind, generation: key.generation, slot: key.place }
    }

    fn wait(&mut self, key: Key, until: Until, ring: &mut Ring) {
        let tag = self.tag(key);
        if let Some(guest) = self.guests.get(key) {
            ring.wait(tag, guest.user.socket.as_fd(), until);
        }
    }

    /// A socket can be read or written, or its time is up. Returns a user whose handshake is over.
    pub fn complete(&mut self, done: &Done, turn: &mut Turn<'_>) -> Option<Newcomer> {
        self.own += 1;
        let key = Key { place: done.tag.slot, generation: done.tag.generation };
        let guest = self.guests.get(key)?;
        if guest.hurry.is_some() {
            let silent = guest.passes_silently(turn).then_some(Step::Passed);
            return self.follow(key, silent.unwrap_or(Step::Over), turn);
        }
        let step = guest.step(self.speaks_http, turn);
        self.follow(key, step, turn)
    }

    fn follow(&mut self, key: Key, step: Step, turn: &mut Turn<'_>) -> Option<Newcomer> {
        match step {
            Step::Wait(until) => self.wait(key, until, turn.ring),
            Step::Queue(hello) => self.queue(key, hello, turn),
            Step::QueueAgain => self.queue_again(key, turn),
            Step::Over => drop(self.let_go(key)),
            Step::Served => return self.served(key, turn),
            Step::Passed => {
                turn.books.metrics().counters.tls_passed.one();
                return self.let_go(key).map(|guest| guest.user);
            }
        }
        None
    }

    fn queue(&mut self, key: Key, hello: Hello, turn: &Turn<'_>) {
        let Some(guest) = self.guests.get(key) else { return };
        let host = hello.host.as_deref();
        let terms = terms(guest.user.doorway, host, self.speaks_http, turn);
        let cost = terms.map_or(1, |terms| terms.cost(host));
        guest.state = State::Ready(hello);
        self.order.put(key, turn.now, cost);
    }

    fn queue_again(&mut self, key: Key, turn: &Turn<'_>) {
        let Some(guest) = self.guests.get(key) else { return };
        match std::mem::replace(&mut guest.state, State::Greeting { seen: 0 }) {
            State::Shaking(engine) => {
                self.order.put(key, turn.now, engine.cost());
                guest.state = State::Again(engine);
            }
            other => guest.state = other,
        }
    }

    fn let_go(&mut self, key: Key) -> Option<Guest> {
        self.deadlines.cancel(key.place);
        let gone = self.guests.remove(key);
        if self.guests.live() == 0 {
            self.arrivals.clear();
        }
        gone
    }

    fn served(&mut self, key: Key, turn: &mut Turn<'_>) -> Option<Newcomer> {
        let Guest { mut user, state, .. } = self.let_go(key)?;
        let State::Shaking(engine) = state else { return None };
        turn.books.metrics().counters.tls_handshakes.one();
        if !self.speaks_http {
            // Settings may have changed meanwhile; what is opened here is not for a service that is to get it
            // sealed.
            let host = engine.host().unwrap_or_default();
            let host = host.strip_suffix('.').unwrap_or(host);
            let service = turn.books.service_for(user.doorway, host);
            let doorway = service.map(|service| Doorway { service, ..user.doorway });
            let is_as_agreed = |at: &Doorway| {
                let books = &turn.books;
                books.speaks_tls(*at) && books.clients(at.service) == engine.clients()
            };
            let Some(doorway) = doorway.filter(is_as_agreed) else {
                Failure::NoService.tell(&user, Some(host), turn);
                return None;
            };
            user.doorway = doorway;
        }
        if engine.is_resumed() {
            turn.books.metrics().counters.tls_resumed.one();
        }
        // A header before the first record would have been no TLS.
        user.caller.is_stranger = false;
        Some(Newcomer { engine: Some(engine), ..user })
    }

    /// Answers as many of those in the queue as a turn has time for, and waits no longer for those whose time
    /// is up.
    pub fn housekeep(&mut self, turn: &mut Turn<'_>) {
        while let Some(place) = self.deadlines.pop(turn.now) {
            if let Some(key) = self.guests.at(place) {
                self.expire(key, turn);
            }
        }
        let others = self.others(turn.ring);
        self.order.turn(others);
        loop {
            let Lobby { order, guests, .. } = self;
            order.forget(|key| !guests.has(key));
            let Some(key) = order.next(turn.now) else { break };
            let Some(guest) = guests.get(key) else { continue };
            let (step, cost) = guest.answer(self.speaks_http, turn);
            order.has_cost(cost);
            let served = self.follow(key, step, turn);
            debug_assert!(served.is_none(), "a user has the last word of a handshake");
        }
    }

    /// What there was to do for others since the last time, in completions.
    fn others(&mut self, ring: &Ring) -> u32 {
        let reaped = ring.reaped() - std::mem::replace(&mut self.reaped, ring.reaped());
        let others = reaped.saturating_sub(std::mem::take(&mut self.own));
        u32::try_from(others).unwrap_or(u32::MAX)
    }

    fn expire(&mut self, key: Key, turn: &mut Turn<'_>) {
        // One that was sent away already has been counted.
        if let Some(guest) = self.guests.get(key).filter(|guest| guest.hurry.is_none()) {
            guest.hurry = Some(Hurry::Late);
            if !guest.passes_silently(turn) {
                Failure::Late.tell(&guest.user, guest.host(), turn);
            }
        }
        self.hurry(key, Hurry::Late, turn.ring);
    }

    /// Lets everybody go.
    pub fn stop(&mut self, ring: &mut Ring) {
        for key in self.guests.keys(|_| true) {
            self.hurry(key, Hurry::SentAway, ring);
        }
    }

    fn hurry(&mut self, key: Key, why: Hurry, ring: &mut Ring) {
        let tag = self.tag(key);
        match self.guests.get(key) {
            // Nothing is under way that could end.
            Some(Guest { state: State::Ready(_) | State::Again(_), .. }) => drop(self.let_go(key)),
            Some(guest) => {
                guest.hurry.get_or_insert(why);
                ring.cancel(tag);
            }
            None => {}
        }
    }
}

impl Guest {
    /// Whether its ClientHello is waited for.
    fn is_greeting(&self) -> bool {
        matches!(self.state, State::Greeting { .. }) && self.hurry.is_none()
    }

    /// Whether it has said nothing in its time, at a door with a service whose users need not.
    fn passes_silently(&mut self, turn: &Turn<'_>) -> bool {
        let is_silent = matches!(self.state, State::Greeting { seen: 0 });
        is_silent && self.hurry == Some(Hurry::Late) && self.passes_in_the_clear(turn)
    }

    /// Goes to the service for those of whom nobody knows which host they are for, if there is one that does
    /// not end TLS here.
    fn passes_in_the_clear(&mut self, turn: &Turn<'_>) -> bool {
        let doorway = self.user.doorway;
        let rest = turn.books.is_split(doorway).then(|| turn.books.service_for(doorway, ""));
        let rest = rest.flatten().map(|service| Doorway { service, ..doorway });
        let Some(rest) = rest.filter(|rest| !turn.books.speaks_tls(*rest)) else { return false };
        self.user.doorway = rest;
        true
    }

    /// The host that it has asked for by now.
    fn host(&self) -> Option<&str> {
        match &self.state {
            State::Greeting { .. } => None,
            State::Ready(hello) => hello.host.as_deref(),
            State::Shaking(engine) | State::Again(engine) => engine.host(),
        }
    }

    /// Its ClientHello is whole.
    fn greeted(&mut self, hello: Hello, speaks_http: bool, turn: &mut Turn<'_>) -> Step {
        let (doorway, host) = (self.user.doorway, hello.host.as_deref().unwrap_or_default());
        if !speaks_http {
            match turn.books.service_for(doorway, host) {
                Some(service) => self.user.doorway = Doorway { service, ..doorway },
                None => {
                    Failure::NoService.tell(&self.user, Some(host), turn);
                    self.turn_away(&UNRECOGNIZED_NAME);
                    return Step::Over;
                }
            }
        }
        match turn.books.speaks_tls(self.user.doorway) {
            true => Step::Queue(hello),
            false => Step::Passed,
        }
    }

    /// Its bytes are no ClientHello.
    fn misspoke(&mut self, how: Malformed, speaks_http: bool, turn: &mut Turn<'_>) -> Step {
        if !speaks_http && self.passes_in_the_clear(turn) {
            return Step::Passed;
        }
        Failure::Hello(how).tell(&self.user, None, turn);
        self.turn_away(if how == Malformed::PlainHttp { PLAIN_HTTP } else { &DECODE_ERROR });
        Step::Over
    }

    /// What it has said is read first: closing with bytes unread would send a reset, which most hosts heed
    /// before they read the words.
    fn turn_away(&self, words: &[u8]) {
        let socket = self.user.socket.as_fd();
        let _ = sys::read(socket, &mut [0; READ_BYTES]);
        say(socket, words);
    }

    fn step(&mut self, speaks_http: bool, turn: &mut Turn<'_>) -> Step {
        match &mut self.state {
            State::Greeting { seen } => match listen(self.user.socket.as_fd(), seen) {
                Heard::Waits => Step::Wait(Until::Readable),
                Heard::Ended if !speaks_http && self.passes_in_the_clear(turn) => Step::Passed,
                Heard::Gone | Heard::Ended => self.left(turn),
                Heard::Whole(hello) => self.greeted(hello, speaks_http, turn),
                Heard::Misspoke(how) => self.misspoke(how, speaks_http, turn),
            },
            State::Shaking(engine) if engine.awaits_second_hello() && !engine.has_sealed() => {
                Step::QueueAgain
            }
            State::Shaking(engine) => {
                let step = shake(engine, self.user.socket.as_fd(), turn.now);
                step.unwrap_or_else(|failure| self.fails(failure, turn))
            }
            State::Ready(_) | State::Again(_) => {
                debug_assert!(false, "nothing is under way");
                Step::Over
            }
        }
    }

    /// Answers the ClientHello. Returns what follows, and what it has cost.
    fn answer(&mut self, speaks_http: bool, turn: &mut Turn<'_>) -> (Step, u32) {
        match std::mem::replace(&mut self.state, State::Greeting { seen: 0 }) {
            State::Ready(hello) => match self
                .begin(&hello, terms(self.user.doorway, hello.host.as_deref(), speaks_http, turn))
            {
                Ok((engine, until)) => {
                    // The signature comes with the answer to the second.
                    let cost = if engine.awaits_second_hello() { 0 } else { engine.cost() };
                    self.state = State::Shaking(engine);
                    (Step::Wait(until), cost)
                }
                Err((failure, alert)) => {
                    failure.tell(&self.user, hello.host.as_deref(), turn);
                    say(self.user.socket.as_fd(), &alert);
                    (Step::Over, 0)
                }
            },
            State::Again(mut engine) => {
                let step = shake(&mut engine, self.user.socket.as_fd(), turn.now);
                let cost = engine.cost();
                self.state = State::Shaking(engine);
                (step.unwrap_or_else(|failure| self.fails(failure, turn)), cost)
            }
            State::Greeting { .. } | State::Shaking(_) => (Step::Over, 0),
        }
    }

    /// # Errors
    /// Why there is no answer but this alert.
    fn begin(
        &self,
        hello: &Hello,
        terms: Option<&Terms>,
    ) -> Result<(Box<Engine>, Until), (Failure, Vec<u8>)> {
        let silent = |failure| (failure, Vec::new());
        let mut bytes = [0; READ_BYTES];
        let bytes = &mut bytes[..hello.bytes.min(READ_BYTES)];
        let socket = self.user.socket.as_fd();
        sys::take(socket, bytes).map_err(|_| silent(Failure::Gone))?;
        let terms = terms.ok_or_else(|| silent(NO_CERTIFICATE))?;
        let engine = Engine::accept(bytes, terms).map_err(|refused| {
            let Refused { fault, why, alert } = refused;
            (Failure::Answer { fault, why }, alert)
        })?;
        let mut engine = Box::new(engine);
        let until = flush(&mut engine, socket).map_err(silent)?;
        Ok((engine, until))
    }

    /// Its connection has ended before its ClientHello was whole. Whoever has said nothing at all has only
    /// looked whether somebody is here.
    fn left(&mut self, turn: &mut Turn<'_>) -> Step {
        match self.state {
            State::Greeting { seen: 0 } => Step::Over,
            _ => self.fails(Failure::Gone, turn),
        }
    }

    /// Tells why it is not served, and only then itself, by an alert if there is one.
    fn fails(&mut self, failure: Failure, turn: &mut Turn<'_>) -> Step {
        failure.tell(&self.user, self.host(), turn);
        if let State::Shaking(engine) = &mut self.state {
            let _ = flush(engine, self.user.socket.as_fd());
        }
        Step::Over
    }
}

/// What is agreed with a user who asks for this host. A stream is for its service by now; the requests of an API
/// user are still to come, and must then be for hosts that ask the same of users.
fn terms<'a>(
    at: Doorway,
    host: Option<&str>,
    speaks_http: bool,
    turn: &'a Turn<'_>,
) -> Option<&'a Terms> {
    let identities = &turn.books.tls().agreed.as_ref()?.identities;
    match speaks_http {
        true => {
            let clients = turn.books.clients_for(at, host.unwrap_or_default());
            identities.terms(Speech::Http, clients)
        }
        false => identities.terms(Speech::Stream, turn.books.clients(at.service)),
    }
}

/// What has been seen of a ClientHello.
enum Heard {
    Waits,
    Gone,
    /// The user says no more.
    Ended,
    Whole(Hello),
    Misspoke(Malformed),
}

/// Looks whether the ClientHello is whole. It stays in the kernel; `before` is how much of it had been seen.
fn listen(socket: BorrowedFd<'_>, before: &mut usize) -> Heard {
    let mut bytes = [0; READ_BYTES];
    let seen = match sys::peek(socket, &mut bytes) {
        Err(Errno::EAGAIN) => return Heard::Waits,
        // Woken by the connection's end: the rest will not come.
        Ok(seen) if seen <= *before => {
            lowat::wake_at(socket, 1);
            return Heard::Ended;
        }
        Ok(seen) => seen,
        Err(_) => return Heard::Gone,
    };
    *before = seen;
    let hello = hello::read(&bytes[..seen]);
    lowat::wake_at(socket, if hello == Ok(None) { seen + 1 } else { 1 });
    match hello {
        Ok(Some(hello)) => Heard::Whole(hello),
        Ok(None) => Heard::Waits,
        Err(how) => Heard::Misspoke(how),
    }
}

/// Takes what has come of a handshake, and answers.
fn shake(engine: &mut Engine, socket: BorrowedFd<'_>, now: Now) -> Result<Step, Failure> {
    let mut bytes = [0; READ_BYTES];
    if !engine.has_sealed() {
        let seen = match sys::read(socket, &mut bytes) {
            Ok(0) => return Err(Failure::Gone),
            Ok(seen) => seen,
            Err(Errno::EAGAIN) => return Ok(Step::Wait(Until::Readable)),
            Err(_) => return Err(Failure::Gone),
        };
        let mut rest = &bytes[..seen];
        engine
            .take(&mut rest, now)
            .map_err(|fault| Failure::Answer { fault, why: engine.why() })?;
        debug_assert!(rest.is_empty(), "it takes as much as is read at once");
    }
    let until = flush(engine, socket)?;
    let is_over = !engine.is_handshaking() && until == Until::Readable;
    Ok(if is_over { Step::Served } else { Step::Wait(until) })
}

/// Sends what is ready, and says what is waited for next.
fn flush(engine: &mut Engine, socket: BorrowedFd<'_>) -> Result<Until, Failure> {
    match engine.flush(&mut sys::Outlet(socket)) {
        Ok(_) => Ok(Until::Readable),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Until::Writable),
        Err(_) => Err(Failure::Gone),
    }
}

/// The last words to somebody who is turned away.
fn say(socket: BorrowedFd<'_>, words: &[u8]) {
    let _ = sys::send_first(socket, words);
    sys::finish_writing(socket);
}
