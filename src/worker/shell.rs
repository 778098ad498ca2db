//! The loop of one worker. Owns the ring, and what is the same for every protocol: waiting, time,
//! orders, the snapshot. A completion goes to the driver of its protocol; decides nothing itself.
//!
//! One turn: submit and wait, reap, look at the snapshot, handle, look at time and orders, and take one
//! step of one long stream. System calls outside the ring are made for such steps, and when a session
//! starts or ends; never for a message.
//!
//! A worker that has nothing to do sleeps at once. To stay awake for 10 us where messages come that close
//! together cost as much CPU as the wake-ups that it saved (64 connections, 21 rounds in turns: 1.00), and
//! would show an operator a core that looks full.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use super::books::SharedBooks;
use super::family;
use super::http::driver::HttpDriver;
use super::link::Order;
use super::tcp::driver::TcpDriver;
use super::udp::driver::UdpDriver;
use crate::base::publish::Subscriber;
use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::ring::pool::Class;
use crate::ring::{Done, REAP_MAX, Ring, Tag, sys};

/// A worker turns at least this often, so that its turn counter stands still only when it hangs.
const PATIENCE_MAX: Duration = Duration::from_millis(500);
/// A worker that waits waits at least this long.
const PATIENCE_MIN: Duration = Duration::from_micros(50);
/// How long a worker that was told to stop waits for the kernel to let go of the sessions.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

const WAKE: Tag = Tag { kind: family::SHELL | 1, generation: 0, slot: 0 };

/// What the loop needs besides its drivers.
pub struct WorkerLoop {
    pub books: SharedBooks,
    pub snapshots: Subscriber<Snapshot>,
    pub orders: rtrb::Consumer<Order>,
    /// Written when there is a new snapshot or an order.
    pub wake: Arc<EventFd>,
}

pub struct Shell {
    ring: Ring,
    tcp: TcpDriver,
    udp: UdpDriver,
    api: HttpDriver,
    due: Due,
    parts: WorkerLoop,
    stop_at: Option<Now>,
}

/// When each driver is to be looked after though nothing completes for it: a message makes a short turn,
/// of which the timers of two idle drivers would be a good part.
#[derive(Default)]
struct Due {
    tcp: Now,
    udp: Now,
    api: Now,
}

impl Due {
    /// All of them, in this turn.
    fn all_at_once(&mut self) {
        *self = Due::default();
    }

    fn first(&self) -> Now {
        self.tcp.min(self.udp).min(self.api)
    }
}

impl Shell {
    /// A worker over a ring of this thread.
    pub fn new(
        ring: Ring,
        tcp: TcpDriver,
        udp: UdpDriver,
        api: HttpDriver,
        parts: WorkerLoop,
    ) -> Shell {
        Shell { ring, tcp, udp, api, due: Due::default(), parts, stop_at: None }
    }

    /// Runs until told to stop. An error is the kernel refusing to go on with the ring.
    pub fn run(mut self) -> io::Result<()> {
        self.tcp.start(&mut self.ring);
        self.udp.start(&mut self.ring);
        self.api.start(&mut self.ring);
        self.ring.watch(WAKE, self.parts.wake.as_fd());
        let mut completions = Vec::with_capacity(REAP_MAX);
        let mut more_wait = false;
        loop {
            let at_once = more_wait || self.tcp.is_eager();
            self.ring.enter(if at_once { Some(Duration::ZERO) } else { self.patience() })?;
            more_wait = self.ring.reap(&mut completions);
            let now = Now::read();
            // Before the completions: a user who came after a backend had been acknowledged finds it.
            self.adopt();
            for done in completions.drain(..) {
                self.complete(now, done);
            }
            self.take_orders(now);
            self.housekeep(now);
            if self.stop_at.is_some_and(|at| self.live() == 0 || now >= at) {
                return Ok(());
            }
        }
    }

    /// Sessions in any phase, of every protocol.
    fn live(&self) -> usize {
        self.tcp.live() + self.udp.live() + self.api.live()
    }

    fn patience(&self) -> Option<Duration> {
        // Never zero, so that a deadline that stays due cannot make the loop spin.
        Some(self.due.first().since(Now::read()).clamp(PATIENCE_MIN, PATIENCE_MAX))
    }

    fn complete(&mut self, now: Now, done: Done) {
        match done.tag.kind & 0xf0 {
            family::TCP => {
                self.due.tcp = now;
                let books = &mut self.parts.books.borrow_mut();
                return self.tcp.complete(now, done, &mut self.ring, books);
            }
            family::UDP => {
                self.due.udp = now;
                self.udp.complete(now, done, &mut self.ring);
            }
            family::API => {
                self.due.api = now;
                self.api.complete(now, done, &mut self.ring);
            }
            _ => return self.woken(done),
        }
        self.tcp.note_message(now);
    }

    fn adopt(&mut self) {
        if let Some(snapshot) = self.parts.snapshots.changed() {
            self.udp.adopt(&snapshot);
            self.parts.books.borrow_mut().adopt(snapshot);
            self.due.all_at_once();
        }
    }

    fn take_orders(&mut self, now: Now) {
        while let Ok(order) = self.parts.orders.pop() {
            if order == Order::Stop {
                self.stop_at = Some(now.plus(STOP_PATIENCE));
            }
            self.tcp.order(now, order, &mut self.ring, &mut self.parts.books.borrow_mut());
            self.udp.order(now, order);
            self.api.order(now, order, &mut self.ring);
            self.due.all_at_once();
        }
    }

    /// Looks after the drivers that something completed for, whose time has come, or who wait for what
    /// another may have let go of.
    fn housekeep(&mut self, now: Now) {
        let tcp = self.due.tcp <= now || self.tcp.wants_blocks() || self.tcp.is_eager();
        if tcp {
            self.tcp.housekeep(now, &mut self.ring, &mut self.parts.books.borrow_mut());
        }
        if self.due.udp <= now || self.ring.has_returned() {
            self.udp.housekeep(now, &mut self.ring);
            self.due.udp = self.udp.next_deadline().unwrap_or(Now::NEVER);
        }
        if self.due.api <= now || self.api.wants_blocks() {
            self.api.housekeep(now, &mut self.ring);
            self.due.api = self.api.next_deadline().unwrap_or(Now::NEVER);
        }
        if tcp {
            self.tcp.step(now, &mut self.ring, &mut self.parts.books.borrow_mut());
            self.due.tcp = self.tcp.next_deadline().unwrap_or(Now::NEVER);
        }
        let books = self.parts.books.borrow();
        books.metrics().counters.buffers_free.set(self.ring.pool().unused(Class::Small) as u64);
        books.metrics().counters.turns.one();
    }

    fn woken(&mut self, done: Done) {
        debug_assert_eq!(done.tag, WAKE, "the shell itself waits for nothing else");
        sys::drain(&self.parts.wake);
        // There is an order, or a datagram from another worker.
        self.due.all_at_once();
        if !done.more {
            self.ring.watch(WAKE, self.parts.wake.as_fd());
        }
    }
}
