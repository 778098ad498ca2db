//! The loop of one worker: completions become events, commands become operations. Owns the ring, the
//! listener and the sockets; decides nothing about sessions (that is `core`'s).
//!
//! One turn: submit and wait, reap, handle, then look at time, orders and the snapshot. System calls
//! outside the ring are made only when a session starts or ends, never for a message.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::core::{Cmd, Core, Key};
use super::link::Order;
use crate::base::publish::Subscriber;
use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::proxy::{self, Event, Intake, Received, Side};
use crate::ring::pool::Class;
use crate::ring::{Done, REAP_MAX, Ring, Tag, sys};

/// A worker turns at least this often, so that its turn counter stands still only when it hangs.
const PATIENCE_MAX: Duration = Duration::from_millis(500);
/// How long a worker that was told to stop waits for the kernel to let go of the sessions.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long to let users wait when not even the spare descriptor helped.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections taken out of a closing listener's queue at most.
const BACKLOG_MAX: usize = 4096;

/// Which operation a completion belongs to (`Tag::kind`).
mod kind {
    pub const ACCEPT: u8 = 1;
    pub const WAKE: u8 = 2;
    pub const CONNECT: u8 = 3;
    pub const RECEIVE: u8 = 4;
    pub const SEND: u8 = 5;
}

/// The sockets of one session.
#[derive(Default)]
struct Sockets {
    sides: [Option<OwnedFd>; 2],
}

pub struct Shell {
    ring: Ring,
    core: Core,
    listener: Option<OwnedFd>,
    sockets: Vec<Sockets>,
    snapshots: Subscriber<Snapshot>,
    orders: rtrb::Consumer<Order>,
    wake: Arc<EventFd>,
    /// Held so that one more connection can be accepted, and closed, when descriptors have run out.
    spare: Option<File>,
    /// When to accept again after accepting has failed.
    accept_at: Option<Now>,
    commands: Vec<Cmd>,
    stop_at: Option<Now>,
}

impl Shell {
    /// A worker over a ring of this thread. `listener`: the TCP door, if there is one.
    pub fn new(ring: Ring, core: Core, listener: Option<OwnedFd>, end: WorkerLoop) -> Shell {
        Shell {
            ring,
            core,
            listener,
            sockets: Vec::new(),
            snapshots: end.snapshots,
            orders: end.orders,
            wake: end.wake,
            spare: spare(),
            accept_at: None,
            commands: Vec::with_capacity(64),
            stop_at: None,
        }
    }

    /// Runs until told to stop. An error is the kernel refusing to go on with the ring.
    pub fn run(mut self) -> io::Result<()> {
        self.accept();
        self.ring.watch(tag(kind::WAKE, 0, 0), self.wake.as_fd());
        let mut done = Vec::with_capacity(REAP_MAX);
        let mut full = false;
        loop {
            self.ring.enter(if full { Some(Duration::ZERO) } else { self.patience() })?;
            full = self.ring.reap(&mut done);
            let now = Now::read();
            for done in done.drain(..) {
                self.complete(now, done);
            }
            self.housekeep(now);
            if self.stop_at.is_some_and(|at| self.core.live() == 0 || now >= at) {
                return Ok(());
            }
        }
    }

    fn patience(&self) -> Option<Duration> {
        let now = Now::read();
        let next = [self.core.next_deadline(), self.accept_at].into_iter().flatten().min();
        let next = next.map_or(PATIENCE_MAX, |at| at.since(now));
        // Zero would not wait at all and is spent only on completions that are there already.
        Some(next.clamp(Duration::from_millis(1), PATIENCE_MAX))
    }

    fn complete(&mut self, now: Now, done: Done) {
        match done.tag.kind {
            kind::RECEIVE | kind::SEND => {
                let (key, event) = relay_event(done);
                let pool = self.ring.pool_mut();
                self.core.relayed(now, key, event, pool, &mut self.commands);
            }
            kind::CONNECT => {
                let key = key_of(done.tag);
                let result = done.result.map(|_| ());
                let pool = self.ring.pool_mut();
                self.core.connected(now, key, result, pool, &mut self.commands);
            }
            kind::ACCEPT => self.accepted(now, done),
            kind::WAKE => self.woken(done.more),
            other => debug_assert!(false, "no operation has kind {other}"),
        }
        self.execute(now);
    }

    /// What is due whatever completed: deadlines, orders, the snapshot, starved flows.
    fn housekeep(&mut self, now: Now) {
        if let Some(snapshot) = self.snapshots.changed() {
            self.core.adopt(snapshot);
        }
        while let Ok(order) = self.orders.pop() {
            self.obey(now, order);
        }
        if self.accept_at.is_some_and(|at| now >= at) {
            self.accept();
        }
        self.core.expire(now, self.ring.pool_mut(), &mut self.commands);
        if self.core.is_starved() {
            self.core.relieve(self.ring.pool_mut(), &mut self.commands);
        }
        self.execute(now);
        let free = self.ring.pool().free(Class::Small) as u64;
        let metrics = self.core.dispatcher.metrics();
        metrics.counters.buffers_free.set(free);
        metrics.counters.turns.one();
    }

    fn obey(&mut self, now: Now, order: Order) {
        if matches!(order, Order::Drain | Order::Stop) {
            self.close_door(now);
        }
        if order == Order::Stop {
            self.stop_at = Some(now.plus(STOP_PATIENCE));
        }
        self.core.order(now, order, self.ring.pool_mut(), &mut self.commands);
        self.execute(now);
    }

    fn accept(&mut self) {
        self.accept_at = None;
        if let Some(listener) = &self.listener {
            self.ring.accept_many(tag(kind::ACCEPT, 0, 0), listener.as_fd());
        }
    }

    fn accepted(&mut self, now: Now, done: Done) {
        if let Some(socket) = done.accepted {
            self.welcome(now, socket);
        } else if done.result != Err(Errno::ECANCELED) {
            self.core.dispatcher.metrics().counters.accept_failed.one();
            // Out of descriptors, most likely: let go of the spare one, so that the next user can be
            // accepted and turned away instead of hanging in the queue.
            if self.spare.take().is_none() && !done.more {
                self.accept_at = Some(now.plus(ACCEPT_PAUSE));
                return;
            }
        }
        if !done.more {
            self.accept();
        }
    }

    fn welcome(&mut self, now: Now, socket: OwnedFd) {
        if self.spare.is_none() {
            drop(socket);
            self.spare = spare();
            self.core.dispatcher.metrics().counters.users_refused_full.one();
            return;
        }
        // A user who is gone already has no address any more.
        let Ok(client) = sys::peer(socket.as_fd()) else { return };
        let Some(key) = self.core.accepted(now, client, &mut self.commands) else { return };
        let place = key.place as usize;
        if self.sockets.len() <= place {
            self.sockets.resize_with(place + 1, Sockets::default);
        }
        self.sockets[place].sides[Side::Client as usize] = Some(socket);
    }

    /// Takes no more users: those that the kernel has already accepted are still served.
    fn close_door(&mut self, now: Now) {
        let Some(listener) = self.listener.take() else { return };
        self.ring.cancel_accept(tag(kind::ACCEPT, 0, 0));
        for _ in 0..BACKLOG_MAX {
            match sys::accept_waiting(listener.as_fd()) {
                Ok(Some(socket)) => self.welcome(now, socket),
                Ok(None) | Err(_) => break,
            }
            self.execute(now);
        }
    }

    fn woken(&mut self, more: bool) {
        sys::drain(&self.wake);
        if !more {
            self.ring.watch(tag(kind::WAKE, 0, 0), self.wake.as_fd());
        }
    }

    /// Turns commands into operations. A command may cause further ones at once.
    fn execute(&mut self, now: Now) {
        let mut next = 0;
        while let Some(command) = self.commands.get(next).copied() {
            next += 1;
            match command {
                Cmd::Relay { key, what } => self.relay(key, what),
                Cmd::Connect { key, to } => {
                    if let Err(errno) = self.connect(key, to) {
                        let pool = self.ring.pool_mut();
                        self.core.connected(now, key, Err(errno), pool, &mut self.commands);
                    }
                }
                Cmd::CancelConnect { key } => {
                    self.ring.cancel(tag_of(kind::CONNECT, key, Side::Backend));
                }
                Cmd::Close { key, reset } => self.close(key, reset),
            }
        }
        self.commands.clear();
    }

    fn relay(&mut self, key: Key, what: proxy::Cmd) {
        let Shell { ring, sockets, .. } = self;
        let socket = |side: Side| {
            let socket = sockets[key.place as usize].sides[side as usize].as_ref();
            socket.expect("a relay runs between two open sockets").as_fd()
        };
        match what {
            proxy::Cmd::Receive { side, how } => {
                let tag = tag_of(kind::RECEIVE, key, side);
                match how {
                    Intake::Many { bytes_max } => ring.receive_many(tag, socket(side), bytes_max),
                    Intake::Once { class, wait_first } => {
                        ring.receive(tag, socket(side), class, wait_first);
                    }
                }
            }
            proxy::Cmd::Send { side, what } => {
                ring.send(tag_of(kind::SEND, key, side), socket(side), what);
            }
            proxy::Cmd::FinishWriting { side } => sys::finish_writing(socket(side)),
            proxy::Cmd::CancelReceive { side } => ring.cancel(tag_of(kind::RECEIVE, key, side)),
            proxy::Cmd::CancelSend { side } => ring.cancel(tag_of(kind::SEND, key, side)),
        }
    }

    fn connect(&mut self, key: Key, to: std::net::SocketAddr) -> Result<(), Errno> {
        let socket = sys::stream(to)
            .map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?;
        self.ring.connect(tag_of(kind::CONNECT, key, Side::Backend), socket.as_fd(), to);
        let place = key.place as usize;
        let before = self.sockets[place].sides[Side::Backend as usize].replace(socket);
        drop(before);
        Ok(())
    }

    fn close(&mut self, key: Key, reset: bool) {
        for side in Side::BOTH {
            let Some(socket) = self.sockets[key.place as usize].sides[side as usize].take() else {
                continue;
            };
            if reset {
                sys::reset_on_close(socket.as_fd());
            }
            self.ring.close(socket);
        }
        if self.spare.is_none() {
            self.spare = spare();
        }
    }
}

/// What the loop keeps of its end of the link; the rest went into the core's dispatcher.
pub struct WorkerLoop {
    pub snapshots: Subscriber<Snapshot>,
    pub orders: rtrb::Consumer<Order>,
    pub wake: Arc<EventFd>,
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

fn tag(kind: u8, slot: u32, generation: u32) -> Tag {
    Tag { kind, generation, slot }
}

fn tag_of(kind: u8, key: Key, side: Side) -> Tag {
    tag(kind, key.place << 1 | side as u32, key.generation)
}

fn key_of(tag: Tag) -> Key {
    Key { place: tag.slot >> 1, generation: tag.generation }
}

fn side_of(tag: Tag) -> Side {
    if tag.slot & 1 == 0 { Side::Client } else { Side::Backend }
}

/// The completion of a receive or a send, in the relay's words.
fn relay_event(done: Done) -> (Key, Event) {
    let (key, side) = (key_of(done.tag), side_of(done.tag));
    if done.tag.kind == kind::SEND {
        return (key, Event::Sent { side, result: done.result });
    }
    let what = match (done.result, done.buf) {
        (Ok(_), Some(buf)) => Received::Data(buf),
        (Ok(_), None) => Received::End,
        (Err(Errno::ENOBUFS), _) => Received::NoBuffers,
        (Err(Errno::ECANCELED | Errno::EINTR | Errno::EAGAIN), _) => Received::Stopped,
        (Err(errno), _) => Received::Failed(errno),
    };
    (key, Event::Received { side, what, more: done.more, nonempty: done.nonempty })
}
