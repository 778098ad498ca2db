//! One thread of the load: opens its connections, keeps them busy, and counts, on a ring of its
//! own. Reads the clock once a turn. What is said and checked is `client`'s; when it is due is
//! `plan`'s.

mod checked;
mod connections;
mod requests;
mod secure;
mod streams;

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use nix::errno::Errno;

use super::client::{Exchange, Flow, Stream};
use super::connection::{Connection, Phase, Talk};
use super::http2::{Http2, Template};
use super::message::{Content, PERIOD};
use super::plan::Plan;
use super::tally::{RequestFailure, Tally};
use super::web::Web;
use super::{Load, Progress, Shape, Shared, blocks, process};
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::ring::pool::{BLOCKS_MAX, Chain, Class, SMALL_BYTES};
use crate::ring::{Done, REAP_MAX, Ring, RingSettings, Tag, probe};

const CONNECT: u8 = 1;
const SEND: u8 = 2;
const RECEIVE: u8 = 3;
const DATAGRAM: u8 = 4;

/// How many connections one thread opens at once, outside churn: less than any listener's backlog.
const CONNECTING_MAX: usize = 64;
/// How long a failed connection rests, so that a dead balancer is not hammered.
const REST: Duration = Duration::from_millis(10);
/// How often timeouts are checked.
const TICK: Duration = Duration::from_millis(100);
/// How long to await replies after the end of the measured window.
const ENDING_MAX: Duration = Duration::from_secs(5);
/// Bytes after which a multishot receive ends.
const BURST_BYTES: u32 = 1 << 20;
/// The largest datagram: it is sent from one large block and received into one.
pub const DATAGRAM_BYTES_MAX: usize = 65_507;
/// The largest datagram of a segmented send: it is written into one small block.
pub const SEGMENT_BYTES_MAX: usize = SMALL_BYTES;
/// Limit on the datagrams of one segmented send; the kernel's own was 64 for a long time.
const SEGMENTS_MAX: usize = 32;

/// The results of one thread.
pub struct Part {
    pub tally: Tally,
    pub watched_cpu: Option<Duration>,
    pub own_cpu: Option<Duration>,
}

/// Runs one thread's share of a load.
pub(super) fn drive(shared: &Shared, place: usize) -> io::Result<Part> {
    let ready = Driver::new(shared, place).and_then(|mut driver| {
        if driver.load.shape != Shape::Churn {
            driver.connect_all()?;
        }
        Ok(driver)
    });
    // Every thread gets here, successful or not, so nobody is left waiting.
    shared.connected.wait();
    let mut driver = ready?;
    driver.begin(*shared.start.get_or_init(Now::read));
    driver.run()?;
    Ok(driver.finish())
}

/// CPU time at either edge of the measured window.
#[derive(Clone, Copy, Default)]
struct Spent {
    watched: Option<Duration>,
    own: Option<Duration>,
}

struct Driver<'a> {
    load: &'a Load,
    progress: &'a Progress,
    place: usize,
    ring: Ring,
    done: Vec<Done>,
    connections: Vec<Connection>,
    /// Connections yet to be opened, and how many are being opened.
    to_connect: VecDeque<u32>,
    connecting: usize,
    /// Connections without a request, if requests come from a plan.
    free: VecDeque<u32>,
    /// Connections whose request or receive found no block.
    starved: Vec<u32>,
    /// Datagrams being sent: by which flow, and their block.
    flights: Vec<(u32, Chain)>,
    flights_free: Vec<u32>,
    content: Content,
    /// What is asked in HTTP/2.
    template: Option<Template>,
    flood: Chain,
    /// The head of the request being written.
    head: Vec<u8>,
    /// Replies do not fit into small blocks.
    large_replies: bool,
    plan: Option<Plan>,
    tally: Tally,
    now: Now,
    start: Now,
    end: Now,
    next_tick: Now,
    /// Requests are being made; they count between the edges of the measured window.
    asking: bool,
    measuring: bool,
    spent: [Spent; 2],
    /// The first failure to connect while no connection had succeeded yet.
    unreachable: Option<Errno>,
    reported: (u64, u64, u64),
}

impl<'a> Driver<'a> {
    fn new(shared: &'a Shared, place: usize) -> io::Result<Driver<'a>> {
        let load = &shared.load;
        let mut ring = probe::patiently(|| Ring::new(settings(load)))?;
        let content = Content::new();
        let mut flood = Chain::EMPTY;
        if matches!(load.shape, Shape::Bulk(_)) {
            flood = blocks::content_chain(ring.pool_mut(), &content, PERIOD)
                .expect("a new pool holds a period of content");
        }
        let connections: Vec<Connection> = (place..load.connections)
            .step_by(load.threads)
            .map(|number| Connection::new(talk(load, number as u32)))
            .collect();
        let template = load.request.as_ref().filter(|_| load.streams.is_some());
        let template = template.map(|request| Template::new(request, load.tls.is_some()));
        let to_connect = (0..connections.len() as u32).collect();
        Ok(Driver {
            load,
            progress: &shared.progress,
            place,
            ring,
            done: Vec::with_capacity(REAP_MAX),
            connections,
            to_connect,
            connecting: 0,
            free: VecDeque::new(),
            starved: Vec::new(),
            flights: Vec::new(),
            flights_free: Vec::new(),
            content,
            template: template.transpose().map_err(io::Error::other)?,
            flood,
            head: Vec::new(),
            large_replies: load.gso || first_class(load) == Class::Large,
            plan: None,
            tally: Tally::new(),
            now: Now::read(),
            start: Now::default(),
            end: Now::default(),
            next_tick: Now::default(),
            asking: false,
            measuring: false,
            spent: [Spent::default(); 2],
            unreachable: None,
            reported: (0, 0, 0),
        })
    }

    /// Opens every connection. Fails if the first of them fails.
    fn connect_all(&mut self) -> io::Result<()> {
        let until = Now::read().plus(self.load.patience);
        let mut up = 0;
        while up < self.connections.len() && self.now < until {
            self.turn(Some(Duration::from_millis(10)))?;
            up = self.connections.iter().filter(|connection| connection.phase == Phase::Up).count();
            if up == 0
                && let Some(errno) = self.unreachable
            {
                return Err(errno.into());
            }
            if up == 0
                && let Some(words) = self.tally.handshakes.first_failure.take()
            {
                return Err(io::Error::other(words));
            }
        }
        if up == 0 { Err(Errno::ETIMEDOUT.into()) } else { Ok(()) }
    }

    /// All are connected: the schedule starts, and every connection that can makes a request.
    fn begin(&mut self, now: Now) {
        self.now = now;
        self.start = now.plus(self.load.warmup);
        self.end = self.start.plus(self.load.duration);
        self.next_tick = now.plus(TICK);
        self.asking = true;
        self.plan = self.load.rate.map(|rate| Plan::new(now, rate, self.place, self.load.threads));
        if self.load.shape == Shape::Churn && self.plan.is_some() {
            for slot in std::mem::take(&mut self.to_connect) {
                self.await_plan(slot);
            }
        }
        for slot in 0..self.connections.len() as u32 {
            if self.connections[slot as usize].phase == Phase::Up {
                self.next(slot);
            }
        }
    }

    fn run(&mut self) -> io::Result<()> {
        while self.asking || self.outstanding() {
            let patience = self.patience();
            self.turn(Some(patience))?;
        }
        Ok(())
    }

    /// Submits, waits, and handles completions.
    fn turn(&mut self, patience: Option<Duration>) -> io::Result<()> {
        self.connect_some()?;
        self.ring.enter(patience)?;
        self.now = Now::read();
        self.cross_edges();
        let mut done = std::mem::take(&mut self.done);
        loop {
            let more = self.ring.reap(&mut done);
            for done in done.drain(..) {
                self.completed(done);
            }
            if !more {
                break;
            }
        }
        self.done = done;
        for slot in std::mem::take(&mut self.starved) {
            self.resume(slot);
        }
        self.keep_to_plan()?;
        if self.now >= self.next_tick {
            self.next_tick = self.now.plus(TICK);
            self.tick();
        }
        Ok(())
    }

    /// How long the next turn may wait.
    fn patience(&self) -> Duration {
        let mut until = self.next_tick;
        if self.asking {
            until = until.min(if self.measuring { self.end } else { self.start });
            if let Some(plan) = self.plan
                && !self.free.is_empty()
            {
                until = until.min(plan.due());
            }
            if !self.to_connect.is_empty() {
                until = until.min(self.now.plus(REST));
            }
        }
        if self.starved.is_empty() { until.since(self.now) } else { Duration::ZERO }
    }

    fn cross_edges(&mut self) {
        if !self.asking {
            return;
        }
        if !self.measuring && self.now >= self.start && self.now < self.end {
            self.measuring = true;
            self.spent[0] = self.spent_now();
        } else if self.now >= self.end {
            self.spent[1] = self.spent_now();
            self.measuring = false;
            self.asking = false;
            self.tally.unsent += self.plan.map_or(0, |plan| plan.overdue(self.end));
            self.next_tick = self.now;
            for slot in 0..self.connections.len() as u32 {
                self.wind_down(slot);
            }
        }
    }

    fn spent_now(&self) -> Spent {
        let watch = self.load.watch.filter(|_| self.place == 0);
        Spent { watched: watch.and_then(process::cpu_of), own: process::cpu_of_this_thread() }
    }

    /// Whether a reply worth waiting for may still come.
    fn outstanding(&self) -> bool {
        self.now < self.end.plus(ENDING_MAX) && self.connections.iter().any(Connection::waiting)
    }

    fn finish(mut self) -> Part {
        for connection in &mut self.connections {
            self.tally.faults[RequestFailure::TimedOut as usize] += connection.unanswered();
            connection.home.end(&mut self.tally);
        }
        self.report();
        let [before, after] = self.spent;
        let between = |a: Option<Duration>, b: Option<Duration>| Some(b?.saturating_sub(a?));
        Part {
            tally: self.tally,
            watched_cpu: between(before.watched, after.watched),
            own_cpu: between(before.own, after.own),
        }
    }

    fn completed(&mut self, done: Done) {
        if done.tag.kind == DATAGRAM {
            return self.datagram_sent(done);
        }
        let slot = done.tag.slot;
        let current = self.connections[slot as usize].generation;
        assert_eq!(done.tag.generation, current, "a slot is reused when nothing is in flight");
        match done.tag.kind {
            CONNECT => self.connect_done(slot, done.result),
            SEND => self.sent(slot, done.result),
            _ => self.received(slot, done),
        }
        self.close_if_quiet(slot);
    }

    fn tick(&mut self) {
        let patience = self.load.patience;
        for slot in 0..self.connections.len() as u32 {
            let connection = &mut self.connections[slot as usize];
            let overdue = self.now.since(connection.sent) > patience;
            let waiting = connection.waiting();
            match (&mut connection.talk, connection.phase) {
                (Talk::Flow(flow), Phase::Up) => {
                    let lost = flow.expire(self.now, patience);
                    self.tally.faults[RequestFailure::Lost as usize] += lost;
                    if lost > 0 {
                        self.next(slot);
                    }
                }
                (Talk::Http2(_), Phase::Up) => self.expire_streams(slot),
                (_, Phase::Connecting) if overdue => self.fault(slot, RequestFailure::Unreachable),
                (_, Phase::Shaking) if overdue => self.fault(slot, RequestFailure::TimedOut),
                (Talk::Stream(_), _) => {}
                (_, Phase::Up) if overdue && waiting => self.fault(slot, RequestFailure::TimedOut),
                _ => {}
            }
        }
        self.report();
    }

    /// Updates the live line.
    fn report(&mut self) {
        let bytes = self.tally.bytes_sent + self.tally.bytes_received;
        let new = (self.tally.requests, bytes, self.tally.errors());
        Progress::add(&self.progress.requests, new.0 - self.reported.0);
        Progress::add(&self.progress.bytes, new.1 - self.reported.1);
        Progress::add(&self.progress.errors, new.2 - self.reported.2);
        self.reported = new;
    }
}

fn tag(kind: u8, slot: u32, connection: &Connection) -> Tag {
    Tag { kind, generation: connection.generation, slot }
}

fn talk(load: &Load, connection: u32) -> Talk {
    match (load.protocol, load.shape) {
        (Protocol::Udp, _) => Talk::Flow(Flow::new(connection, load.size, load.window)),
        (_, Shape::Bulk(kind)) => Talk::Stream(Stream::new(connection, kind)),
        (Protocol::Api, _) => match load.streams {
            Some(streams) => Talk::Http2(Box::new(Http2::new(connection, streams))),
            None => Talk::Web(Web::new(connection)),
        },
        _ => Talk::Exchange(Exchange::new(connection, load.size)),
    }
}

/// The class of block to receive the first reply into.
fn first_class(load: &Load) -> Class {
    let stream = matches!(load.shape, Shape::Bulk(kind) if kind != super::message::Kind::Sink);
    if stream || load.size > SMALL_BYTES { Class::Large } else { Class::Small }
}

/// Enough blocks for all requests of one thread in flight, which must fit into the quarter that the
/// ring never posts, and as many as needed to receive into.
fn settings(load: &Load) -> RingSettings {
    let requests = load.connections.div_ceil(load.threads) * load.window;
    let bytes = secure::sent_at_once(load);
    // A long request has a short end.
    let large = match blocks::class_for(bytes) {
        Class::Small => 0,
        Class::Large | Class::Datagram => requests * (blocks::blocks_for(bytes) + 1),
    };
    RingSettings {
        small_blocks: (requests * 4 + 1024).min(BLOCKS_MAX),
        large_blocks: (large * 4 + 192).min(BLOCKS_MAX / 2),
        datagram_blocks: 0,
    }
}
