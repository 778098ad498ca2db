//! Connections at doors with `proxy_from`, from their arrival until it is known for whom they come. Owns
//! how the header of a listed proxy is waited for and taken out of the connection; what follows it is left
//! in the kernel for whoever serves the user, who is admitted only now and under the address told.
//!
//! The kernel says when there is something to read, and it is looked at before it is taken: of a header
//! that is not whole yet, all there is; of one that is, no byte more. So nothing of the user's is ever
//! held here.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::books::Held;
use super::driver::Turn;
use super::link::Refusal;
use super::slots::{Key, Slots};
use crate::base::time::Now;
use crate::base::wheel::Wheel;
use crate::cluster::{DoorId, Doorway, ServiceId};
use crate::proxy::greeting::{self, BYTES_MAX, Caller, Hello, Screen, Screened};
use crate::ring::{Done, Ring, Tag, Until, sys};
use crate::tls::engine::Engine;

/// A user who has just connected.
pub struct Newcomer {
    pub socket: OwnedFd,
    pub caller: Caller,
    pub doorway: Doorway,
    /// After its handshake, if it speaks TLS.
    pub engine: Option<Box<Engine>>,
}

impl Newcomer {
    /// `None` for a user who is gone already: the socket has no peer's address any more.
    pub fn new(socket: OwnedFd, doorway: Doorway) -> Option<Newcomer> {
        let caller = sys::peer(socket.as_fd()).ok()?.into();
        Some(Newcomer { socket, caller, doorway, engine: None })
    }
}

/// The connections of one driver that are waited for.
pub struct Greetings {
    kind: u8,
    /// Its users speak first, so that a stranger can be looked at before it is served.
    users_speak_first: bool,
    waiting: Slots<Waiting>,
    deadlines: Wheel,
}

struct Waiting {
    user: Newcomer,
    is_listed: bool,
    /// What has been taken of a header that came in pieces.
    head: Vec<u8>,
    /// Its time is up, or the balancer stops.
    hurry: Option<Hurry>,
    _held: Held,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hurry {
    Late,
    Stopping,
}

/// What the first bytes of a connection mean for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// All of them are of a header that goes on.
    More,
    Greeted(Hello),
    /// A stranger without a header: served as at any door.
    Ordinary,
    Refused(Refusal),
}

fn judge(is_listed: bool, bytes: &[u8]) -> Verdict {
    if is_listed {
        return match greeting::read(bytes) {
            Ok(Some(hello)) => Verdict::Greeted(hello),
            Ok(None) => Verdict::More,
            Err(_) => Verdict::Refused(Refusal::NoProxyHeader),
        };
    }
    match Screen::default().see(bytes) {
        Screened::Header => Verdict::Refused(Refusal::ProxyHeader),
        // The beginning of one alone is waited for no longer; nobody takes the rest of it for a request.
        Screened::Clean | Screened::Undecided => Verdict::Ordinary,
    }
}

impl Greetings {
    /// `kind`: of the tags of its operations.
    pub fn new(kind: u8, users_speak_first: bool, now: Now) -> Greetings {
        Greetings { kind, users_speak_first, waiting: Slots::default(), deadlines: Wheel::new(now) }
    }

    /// Connections that are waited for.
    pub fn live(&self) -> usize {
        self.waiting.live()
    }

    pub fn next_deadline(&self) -> Option<Now> {
        self.deadlines.next_deadline()
    }

    /// Hands a user back at once who need not be waited for.
    pub fn meet(&mut self, mut user: Newcomer, turn: &mut Turn<'_>) -> Option<Newcomer> {
        let Some(proxies) = turn.books.proxies(user.doorway.service) else { return Some(user) };
        let is_listed = proxies.lists(user.caller.address.ip());
        let until = turn.now.plus(proxies.patience);
        if !is_listed && !self.users_speak_first {
            user.caller.is_stranger = true;
            return Some(user);
        }
        let held = match turn.books.hold(user.doorway.service) {
            Ok(held) => held,
            Err(why) => {
                turn.books.refused(user.doorway.service, user.caller.address, why);
                return None;
            }
        };
        let waiting = Waiting { user, is_listed, head: Vec::new(), hurry: None, _held: held };
        let key = self.waiting.put(waiting);
        self.deadlines.schedule(key.place, until);
        self.wait(key, turn.ring);
        None
    }

    /// Those who came by this door are another service's from now on, which has the same seats.
    pub fn assign(&mut self, id: DoorId, service: ServiceId) {
        for waiting in self.waiting.iter_mut().filter(|it| it.user.doorway.door == id) {
            waiting.user.doorway.service = service;
        }
    }

    fn tag(&self, key: Key) -> Tag {
        Tag { kind: self.kind, generation: key.generation, slot: key.place }
    }

    fn wait(&mut self, key: Key, ring: &mut Ring) {
        let tag = self.tag(key);
        if let Some(waiting) = self.waiting.get(key) {
            ring.wait(tag, waiting.user.socket.as_fd(), Until::Readable);
        }
    }

    /// There is something to read, or no more time to wait for it. Returns a user who can be served.
    pub fn complete(&mut self, done: &Done, turn: &mut Turn<'_>) -> Option<Newcomer> {
        let key = Key { place: done.tag.slot, generation: done.tag.generation };
        let waiting = self.waiting.get(key)?;
        let verdict = match waiting.look() {
            _ if waiting.hurry == Some(Hurry::Stopping) => None,
            Ok(Verdict::More) | Err(Errno::EAGAIN) => match (waiting.hurry, waiting.is_listed) {
                (None, _) => {
                    self.wait(key, turn.ring);
                    return None;
                }
                (Some(_), true) => Some(Verdict::Refused(Refusal::NoProxyHeader)),
                (Some(_), false) => Some(Verdict::Ordinary),
            },
            outcome => outcome.ok(),
        };
        let Waiting { user, .. } = self.waiting.remove(key)?;
        self.deadlines.cancel(key.place);
        let counters = &turn.books.metrics().counters;
        match verdict {
            Some(Verdict::Greeted(hello)) => {
                counters.proxy_headers.one();
                Some(Newcomer { caller: user.caller.told(hello), ..user })
            }
            Some(Verdict::Ordinary) => Some(user),
            Some(Verdict::Refused(why)) => {
                turn.books.refused(user.doorway.service, user.caller.address, why);
                None
            }
            // It has gone, or has to.
            Some(Verdict::More) | None => None,
        }
    }

    /// Waits no longer for those whose time is up.
    pub fn expire(&mut self, turn: &mut Turn<'_>) {
        while let Some(place) = self.deadlines.pop(turn.now) {
            if let Some(key) = self.waiting.at(place) {
                self.hurry(key, Hurry::Late, turn.ring);
            }
        }
    }

    /// Lets everybody go.
    pub fn stop(&mut self, ring: &mut Ring) {
        for key in self.waiting.keys(|_| true) {
            self.hurry(key, Hurry::Stopping, ring);
        }
    }

    fn hurry(&mut self, key: Key, why: Hurry, ring: &mut Ring) {
        let tag = self.tag(key);
        if let Some(waiting) = self.waiting.get(key) {
            waiting.hurry = Some(why);
            ring.cancel(tag);
        }
    }
}

impl Waiting {
    /// Looks at what has arrived, and takes what is known to be of a header.
    ///
    /// # Errors
    /// That nothing has arrived, or that the connection is gone.
    fn look(&mut self) -> Result<Verdict, Errno> {
        let socket = self.user.socket.as_fd();
        let mut bytes = [0; BYTES_MAX];
        let held = self.head.len();
        bytes[..held].copy_from_slice(&self.head);
        let new = sys::peek(socket, &mut bytes[held..])?;
        if new == 0 && self.is_listed {
            return Err(Errno::ECONNRESET);
        }
        let seen = &bytes[..held + new];
        let verdict = judge(self.is_listed, seen);
        match verdict {
            Verdict::More => {
                self.head.extend_from_slice(&seen[held..]);
                sys::take(socket, &mut bytes[..new])?;
            }
            Verdict::Greeted(hello) => sys::take(socket, &mut bytes[..hello.bytes - held])?,
            Verdict::Ordinary | Verdict::Refused(_) => {}
        }
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests;
