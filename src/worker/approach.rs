//! Connections to backends under TLS, from the moment that they are established until the handshake is over.
//! Owns who is in the middle of one and how many steps are taken in a turn; how long it may take in all is its
//! session's matter, which hears only of the outcome.
//!
//! ```text
//!   established --> in the queue -- one turn has time for a few --> ClientHello, then whatever follows
//!                       ^                                              |
//!                       +------ its socket can be read or written -----+-----> connected, or failed
//! ```

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::opening::{Opening, Unconnected};
use super::slots::Key;
use crate::base::time::Now;
use crate::metrics::WorkerCounters;
use crate::ring::{Until, sys};
use crate::tls::backends::{Client, Memory};
use crate::tls::engine::{Engine, Fault};

/// How many steps of handshakes are taken in one turn of the worker; one costs about as much as the signature
/// of a user's handshake, and those who are served already have their turn behind them.
const STEPS_A_TURN: usize = 8;
/// The most ciphertext that is read at once, in bytes.
const READ_BYTES: usize = 16 * 1024;

/// All of them, of one driver.
#[derive(Default)]
pub struct Approaches {
    /// By place.
    all: HashMap<u32, Approach>,
    /// Those with whom something can be done.
    ready: VecDeque<Key>,
    memory: Memory,
}

struct Approach {
    generation: u32,
    state: State,
    is_ready: bool,
    /// Nobody waits for it any more.
    is_cancelled: bool,
}

enum State {
    New(u32, Client),
    Shaking(Box<Engine>),
}

/// What follows from a step.
pub enum Step {
    /// Its socket is waited for until this.
    Wait(Until),
    Over(Box<Engine>),
    Failed(Unconnected),
}

impl Approaches {
    /// Takes in a connection.
    pub fn begin(&mut self, key: Key, opening: Opening) {
        let Opening { backend, client, is_late } = opening;
        let state = State::New(backend, client);
        let generation = key.generation;
        let approach = Approach { generation, state, is_ready: true, is_cancelled: is_late };
        let before = self.all.insert(key.place, approach);
        debug_assert!(before.is_none(), "a place makes one connection at a time");
        self.ready.push_back(key);
    }

    /// Its socket can be read or written, or is not waited for any more.
    pub fn wake(&mut self, key: Key) {
        let Some(approach) = self.get(key) else { return };
        if !std::mem::replace(&mut approach.is_ready, true) {
            self.ready.push_back(key);
        }
    }

    /// Gives one up: it fails with `ECANCELED`. Returns whether its socket is waited for, and is not to be.
    pub fn cancel(&mut self, key: Key) -> bool {
        let Some(approach) = self.get(key) else { return false };
        approach.is_cancelled = true;
        !approach.is_ready
    }

    /// Whether a handshake on this connection is not over.
    pub fn has(&self, key: Key) -> bool {
        self.all.get(&key.place).is_some_and(|it| it.generation == key.generation)
    }

    fn get(&mut self, key: Key) -> Option<&mut Approach> {
        self.all.get_mut(&key.place).filter(|it| it.generation == key.generation)
    }

    /// Whether somebody waits for the next turn's time.
    pub fn is_busy(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Those for whom there is time in this turn.
    pub fn due(&self) -> usize {
        self.ready.len().min(STEPS_A_TURN)
    }

    /// Takes the next step of the first in the queue. `socket` finds its socket.
    pub fn step<'s>(
        &mut self,
        counters: &WorkerCounters,
        now: Now,
        socket: impl Fn(Key) -> Option<BorrowedFd<'s>>,
    ) -> Option<(Key, Step)> {
        let key = self.ready.pop_front()?;
        let approach = self.all.remove(&key.place)?;
        let Approach { state, is_cancelled, generation, .. } = approach;
        debug_assert_eq!(generation, key.generation, "a place makes one connection at a time");
        let canceled = Unconnected::Errno(Errno::ECANCELED);
        let Some(socket) = socket(key).filter(|_| !is_cancelled) else {
            return Some((key, Step::Failed(canceled)));
        };
        let (engine, until) = match self.advance(state, socket, now) {
            Ok(advanced) => advanced,
            Err(why) => {
                if matches!(why, Unconnected::Tls(_)) {
                    counters.tls_upstream_failed.one();
                }
                return Some((key, Step::Failed(why)));
            }
        };
        let Some(until) = until else {
            counters.tls_upstream_handshakes.one();
            counters.tls_upstream_resumed.add(u64::from(engine.is_resumed()));
            return Some((key, Step::Over(engine)));
        };
        let state = State::Shaking(engine);
        self.all.insert(
            key.place,
            Approach { generation, state, is_ready: false, is_cancelled: false },
        );
        Some((key, Step::Wait(until)))
    }

    /// Goes on as far as the socket lets it; what is waited for then, unless the handshake is over.
    fn advance(
        &mut self,
        state: State,
        socket: BorrowedFd<'_>,
        now: Now,
    ) -> Result<(Box<Engine>, Option<Until>), Unconnected> {
        let mut engine = match state {
            State::New(backend, client) => {
                let engine = self.memory.recall(backend, &client).begin();
                Box::new(engine.map_err(Unconnected::Tls)?)
            }
            State::Shaking(engine) => engine,
        };
        if !engine.has_sealed() {
            hear(&mut engine, socket, now)?;
        }
        let until = flush(&mut engine, socket)?;
        let is_over = !engine.is_handshaking() && until == Until::Readable;
        if is_over && engine.lacks_protocol() {
            return Err(Unconnected::Tls(Fault::NothingInCommon));
        }
        Ok((engine, (!is_over).then_some(until)))
    }
}

/// Takes what has come of a handshake.
fn hear(engine: &mut Engine, socket: BorrowedFd<'_>, now: Now) -> Result<(), Unconnected> {
    let mut bytes = [0; READ_BYTES];
    let count = match sys::read(socket, &mut bytes) {
        Ok(0) => return Err(Unconnected::Tls(Fault::CutOff)),
        Ok(count) => count,
        Err(Errno::EAGAIN) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let mut rest = &bytes[..count];
    engine.take(&mut rest, now).map_err(|fault| {
        // It is told why, if its socket takes that at once.
        let _ = engine.flush(&mut sys::Outlet(socket));
        Unconnected::Tls(fault)
    })?;
    // What a backend says ahead of us waits in the engine, which has room for as much as is read at once.
    if rest.is_empty() { Ok(()) } else { Err(Unconnected::Tls(Fault::Protocol)) }
}

/// Sends what is ready, and says what is waited for next.
fn flush(engine: &mut Engine, socket: BorrowedFd<'_>) -> Result<Until, Unconnected> {
    let failed = |error: io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    match engine.flush(&mut sys::Outlet(socket)) {
        Ok(_) => Ok(Until::Readable),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Until::Writable),
        Err(error) => Err(failed(error).into()),
    }
}
