//! The shadow of every session: what the core was told and what it asked for, kept without asking
//! it. Owns the judgement; a broken law ends the run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use lb::base::time::Now;
use lb::cluster::{BackendId, Protocol, ServiceId, Snapshot, Timeouts};
use lb::proxy::outlook::Outlook;
use lb::proxy::{Received, Side, Splice, Spliced, StreamCmd};
use lb::ring::pool::{Class, Pool};
use lb::session::EndReason;
use lb::worker::link::{Order, Refusal, Report};
use lb::worker::slots::Key;

use super::kernel::Kernel;
use super::law::{self, check};
use super::net::Conn;
use super::pipes::Pipes;
use super::shadow::{Attempt, LATE, STARVED_MAX, Session, grace};

/// A session that ended for want of blocks did so at most this long after there were none.
const DROUGHT: Duration = Duration::from_secs(1);

/// What became of a user.
#[derive(Clone, Copy, Default, Debug)]
pub struct Fate {
    pub arrived: bool,
    pub started: u32,
    pub refused: u32,
    pub ended: u32,
    pub reason: Option<EndReason>,
    pub diligent: bool,
}

pub struct Laws {
    timeouts: Timeouts,
    pub sessions: BTreeMap<u32, Session>,
    pub fates: Vec<Fate>,
    pub adopted: Arc<Snapshot>,
    aside: Vec<BackendId>,
    /// Receives in a row that found no block, and since when.
    dry: u64,
    dry_since: Now,
    dry_flows: u64,
    /// When a turn last ended with no small block available.
    dry_at: Now,
    /// The worker is frozen.
    pub frozen: bool,
    /// A freeze takes back what is under way.
    pub hurries: bool,
}

impl Laws {
    pub fn new(timeouts: Timeouts, users: usize) -> Laws {
        Laws {
            timeouts,
            sessions: BTreeMap::new(),
            fates: vec![Fate::default(); users],
            adopted: Arc::default(),
            aside: Vec::new(),
            dry: 0,
            dry_since: Now::default(),
            dry_flows: 0,
            dry_at: Now::default(),
            frozen: false,
            hurries: false,
        }
    }

    /// A freeze begins or ends.
    pub fn freezes(&mut self, frozen: bool) {
        (self.frozen, self.dry) = (frozen, 0);
    }

    pub fn adopt(&mut self, snapshot: Arc<Snapshot>) {
        self.adopted = snapshot;
        self.aside.clear();
    }

    fn rotation(&self) -> impl Iterator<Item = BackendId> + '_ {
        let pool = self.adopted.pool(ServiceId::built_in(Protocol::Tcp));
        pool.into_iter().flat_map(|pool| pool.in_rotation()).map(|backend| backend.id)
    }

    #[track_caller]
    fn session(&mut self, key: Key) -> &mut Session {
        let session = self.sessions.get_mut(&key.place).filter(|session| session.key == key);
        session.unwrap_or_else(|| panic!("broken law: {}: {key:?} is no session", law::BOOKS))
    }

    pub fn accepted(&mut self, now: Now, key: Key, user: usize, conn: usize) {
        let mut session = Session {
            key,
            user,
            diligent: false,
            attempt: None,
            held: false,
            tried: Vec::new(),
            portless: 0,
            wants_next: false,
            relaying: false,
            sides: Default::default(),
            flows: Default::default(),
            delivered_at: now,
            touched_at: now,
            given_up: false,
            half_closed_at: None,
            ordered: Vec::new(),
            seen: [None; 2],
            parting_since: None,
            ended: None,
            out_of_memory: false,
            hungry: false,
        };
        session.sides[Side::Client as usize].conn = Some(conn);
        let before = self.sessions.insert(key.place, session);
        check(before.is_none(), law::BOOKS, || format!("{key:?} is two sessions"));
    }

    /// The worker is frozen, so a newcomer waits with its backend.
    pub fn holds(&mut self, key: Key, backend: Option<BackendId>) {
        let session = self.session(key);
        session.held = true;
        session.tried.extend(backend);
    }

    pub fn turned_away(&self, user: usize, full: bool) {
        let why = full || self.rotation().next().is_none();
        check(why, law::TURNED_AWAY, || format!("user {user}"));
    }

    pub fn connects(&mut self, now: Now, key: Key, backend: Option<BackendId>, conn: usize) {
        check(!self.frozen, law::STILL, || format!("{key:?} connects"));
        let adopted = Arc::clone(&self.adopted);
        let session = self.session(key);
        if std::mem::take(&mut session.held) {
            let given = session.tried.last().copied();
            // It may have left meanwhile, and its address may be another's.
            let is_there = adopted.backends().any(|backend| Some(backend.id) == given);
            let same = backend == given || !is_there;
            let alone = session.attempt.is_none() && !session.relaying;
            check(same && alone, law::STAYS, || format!("{key:?} goes on to {backend:?}"));
            session.attempt = Some(Attempt { since: now, cancelled: false, recalled: false });
            session.sides[Side::Backend as usize].conn = Some(conn);
            return;
        }
        let Some(backend) = backend.filter(|id| self.rotation().any(|other| other == *id)) else {
            panic!("broken law: {}: {backend:?} is offered", law::STAYS);
        };
        let rotation: Vec<BackendId> = self.rotation().collect();
        let aside = self.aside.clone();
        let session = self.session(key);
        check(session.attempt.is_none() && !session.relaying, law::STAYS, || format!("{key:?}"));
        let tried = session.tried.contains(&backend) || !session.may_be_offered_more();
        check(!tried, law::RETRY, || format!("{backend} after {:?}", session.tried));
        let better = |id: &BackendId| !session.tried.contains(id) && !aside.contains(id);
        let wrong = aside.contains(&backend) && rotation.iter().any(better);
        check(!wrong, law::RETRY, || format!("{backend} has just failed, {rotation:?}"));
        session.wants_next = false;
        session.tried.push(backend);
        session.attempt = Some(Attempt { since: now, cancelled: false, recalled: false });
        session.sides[Side::Backend as usize].conn = Some(conn);
    }

    pub fn cancels_connect(&mut self, key: Key) {
        let hurries = self.hurries;
        let session = self.session(key);
        let Some(attempt) = &mut session.attempt else {
            panic!("broken law: {}: no attempt of {key:?}", law::CANCEL);
        };
        attempt.cancelled = true;
        attempt.recalled |= hurries;
    }

    pub fn connected(&mut self, now: Now, key: Key, result: Result<(), Errno>, ours: bool) {
        let session = self.session(key);
        let attempt = session.attempt.take();
        let recalled = attempt.is_some_and(|attempt| attempt.recalled);
        let ordered = !session.ordered.is_empty();
        if recalled && result.is_err() && !ordered {
            session.held = true;
            return;
        }
        let backend = session.tried.last().copied();
        if result.is_ok() && !ordered {
            session.relaying = true;
            (session.delivered_at, session.touched_at) = (now, now);
        } else if result == Err(Errno::EADDRNOTAVAIL) && !ordered {
            session.portless += 1;
            session.wants_next = session.may_be_offered_more();
        } else if result.is_err() && !ordered && !ours {
            self.aside.extend(backend);
        }
    }

    pub fn received(&mut self, now: Now, key: Key, side: Side, what: &Received, more: bool) {
        if self.dry == 0 {
            (self.dry_since, self.dry_flows) = (now, 0);
        }
        self.dry = if matches!(what, Received::NoBuffers) { self.dry + 1 } else { 0 };
        // Some that were there when it began may have ended.
        self.dry_flows = self.dry_flows.max(2 * self.sessions.len() as u64);
        let flows = self.dry_flows;
        let rounds = now.since(self.dry_since).as_millis() as u64 / STARVED_MAX.as_millis() as u64;
        let most = flows * (rounds + 2);
        check(self.dry <= most, law::SPIN, || format!("{} receives found no block", self.dry));
        let session = self.session(key);
        let gone = session.sides[side.other() as usize].gone;
        let ways = &mut session.sides[side as usize];
        if !more {
            ways.receive = None;
        }
        match what {
            Received::Data(buf) => {
                let flow = &mut session.flows[side as usize];
                flow.received += buf.len() as u64;
                if !gone {
                    flow.waiting.push_back(buf.len() as u64);
                }
            }
            Received::End => ways.ended = true,
            Received::NoBuffers => {
                ways.starved = true;
                session.hungry = true;
            }
            Received::Stopped => {}
            Received::Failed(_) => session.fails(side),
        }
    }

    pub fn sent(&mut self, now: Now, key: Key, side: Side, result: Result<u32, Errno>) {
        self.dry = 0;
        let session = self.session(key);
        let ways = &mut session.sides[side as usize];
        // A send that completes after the session was ended does not count as movement.
        let send = ways.send.take();
        let hurried = send.as_ref().is_some_and(|send| send.hurried && !send.cancelled);
        let asked = send.is_some_and(|send| !send.cancelled);
        // Nothing of it was lost either if it was not waited for.
        let recalled = hurried && result == Err(Errno::ECANCELED) || result == Err(Errno::EAGAIN);
        if asked && !recalled {
            session.touched_at = now;
        }
        let flow = &mut session.flows[side.other() as usize];
        let result = if recalled { Ok(0) } else { result };
        match result {
            Ok(bytes) => {
                if asked && bytes > 0 {
                    session.delivered_at = now;
                    session.hungry = false;
                }
                flow.delivered += u64::from(bytes);
                let mut left = u64::from(bytes);
                while let Some(len) = flow.sending.pop_front() {
                    if len > left {
                        flow.sending.push_front(len - left);
                        break;
                    }
                    left -= len;
                }
                ways.short = !flow.sending.is_empty();
                if ways.gone {
                    flow.sending.clear();
                }
                while let Some(len) = flow.sending.pop_back() {
                    flow.waiting.push_front(len);
                }
            }
            Err(errno) => {
                session.out_of_memory |= errno == Errno::ENOMEM;
                ways.gone = true;
                flow.sending.clear();
                flow.waiting.clear();
            }
        }
    }

    /// A side's socket was asked whether it takes more.
    pub fn answered(&mut self, key: Key, side: Side, takes: bool) {
        let asked = self.session(key).sides[side as usize].room.take();
        let cancelled = asked.is_some_and(|asked| asked.cancelled);
        check(takes || cancelled, law::CANCEL, || format!("{key:?} {side:?}"));
    }

    /// Bytes have left a side's socket for a pipe.
    pub fn drawn(&mut self, key: Key, side: Side, bytes: u64) {
        self.session(key).flows[side as usize].received += bytes;
    }

    pub fn spliced(&mut self, now: Now, key: Key, side: Side, moved: u64, how: Spliced) {
        if moved > 0 {
            self.dry = 0;
        }
        let session = self.session(key);
        let step = session.sides[side as usize].receive.take();
        if step.is_some_and(|step| !step.cancelled) {
            session.touched_at = now;
            if moved > 0 {
                (session.delivered_at, session.hungry) = (now, false);
            }
        }
        session.flows[side as usize].delivered += moved;
        match how {
            Spliced::Step(Splice::Ended) => {
                let ways = &mut session.sides[side as usize];
                ways.ended = true;
                // A step may come before the completion of a send that swallowed a reset.
                ways.short |= ways.send.is_some();
            }
            Spliced::Step(Splice::SourceFailed(_)) => session.fails(side),
            Spliced::Step(Splice::SinkFailed(_)) => {
                session.sides[side.other() as usize].gone = true
            }
            _ => {}
        }
    }

    /// A command of the relay, before it is carried out.
    pub fn asks(&mut self, now: Now, key: Key, what: &StreamCmd, pool: &Pool, conns: &[Conn]) {
        let (frozen, hurries) = (self.frozen, self.hurries);
        let session = self.session(key);
        let told = || format!("user {}: {what:?}", session.user);
        check(session.relaying, law::AFTER_END, told);
        let begins = matches!(
            what,
            StreamCmd::Receive { .. } | StreamCmd::Send { .. } | StreamCmd::Splice { .. }
        );
        check(!(frozen && begins), law::STILL, told);
        match *what {
            StreamCmd::CancelSend { side } if hurries => session.asks_to_hurry(side),
            StreamCmd::Receive { side, how } => session.asks_to_receive(side, how, pool, conns),
            StreamCmd::AwaitRoom { side, .. } => session.asks_for_room(side),
            StreamCmd::CancelRoom { side } => {
                session.asks_to_cancel(|ways| &mut ways.room, side, what);
            }
            StreamCmd::Send { side, what } => session.asks_to_send(side, what.blocks()),
            StreamCmd::CancelReceive { side } => {
                session.asks_to_cancel(|ways| &mut ways.receive, side, what)
            }
            StreamCmd::CancelSend { side } => {
                session.asks_to_cancel(|ways| &mut ways.send, side, what)
            }
            StreamCmd::FinishWriting { side } => session.asks_to_finish(now, side, conns),
            StreamCmd::Splice { side, .. } => session.asks_to_splice(side),
            StreamCmd::CancelSplice { side } => {
                session.asks_to_cancel(|ways| &mut ways.receive, side, what)
            }
            StreamCmd::EndSplice { side } => session.asks_to_end_splice(side),
        }
    }

    /// The core looks at the send queues of a session.
    pub fn looks(&mut self, now: Now, key: Key, outlooks: &[Outlook; 2]) {
        let session = self.session(key);
        if session.is_out_of_work() {
            session.parting_since.get_or_insert(now);
        }
        for (seen, outlook) in session.seen.iter_mut().zip(outlooks) {
            let before = seen.replace(outlook.acknowledged);
            if outlook.queued == 0 {
                *seen = None;
            } else if before.is_some_and(|before| before < outlook.acknowledged) {
                session.touched_at = now;
                // What is taken after it was given up does not count as movement.
                if !session.given_up {
                    session.delivered_at = now;
                }
            }
        }
    }

    pub fn orders(&mut self, now: Now, order: Order, whose: Option<usize>) {
        for session in self.sessions.values_mut() {
            let reason = match order {
                Order::EndBackend { backend, reason } => {
                    Some(reason).filter(|_| session.tried.last() == Some(&backend))
                }
                Order::EndSession { reason, .. } => {
                    Some(reason).filter(|_| whose == Some(session.user))
                }
                Order::Stop => Some(EndReason::Stopping),
                Order::Drain => None,
            };
            session.ordered.extend(reason.map(|reason| (reason, now)));
        }
    }

    pub fn reports(&mut self, report: Report, user_of: impl Fn(std::net::SocketAddr) -> usize) {
        match report {
            Report::Started { client, backend, .. } => {
                let user = user_of(client);
                self.fates[user].started += 1;
                let live = self.sessions.values().find(|session| session.user == user);
                let right = live.is_some_and(|live| live.tried.last() == Some(&backend));
                check(right, law::BOOKS, || format!("user {user} is started on {backend}"));
            }
            Report::Ended(ended) => {
                let user = user_of(ended.client);
                self.fates[user].ended += 1;
                self.fates[user].reason = Some(ended.reason);
                let live = self.sessions.values_mut().find(|session| session.user == user);
                if let Some(live) = live {
                    live.ended = Some(ended);
                }
            }
            Report::Refused { client, why, .. } => {
                let fate = &mut self.fates[user_of(client)];
                fate.refused += 1;
                let alone = fate.ended == 0 || why != Refusal::Full;
                check(alone, law::BOOKS, || format!("{client} is refused and served"));
            }
            Report::ConnectFailed { .. }
            | Report::UpstreamTlsFailed { .. }
            | Report::Unanswered { .. }
            | Report::OutOfRoom { .. }
            | Report::HandshakeFailed { .. } => {}
        }
    }

    pub fn closed(&mut self, now: Now, key: Key, reset: bool, conns: &[Conn], busy: bool) {
        self.session(key);
        let session = self.sessions.remove(&key.place).expect("it was just looked at");
        check(!busy, law::SETTLED, || format!("user {}", session.user));
        let Some(ended) = session.ended else {
            panic!("broken law: {}: user {} ends unreported", law::BOOKS, session.user);
        };
        let untried = self.rotation().find(|id| !session.tried.contains(id));
        check(!session.wants_next || untried.is_none(), law::NEXT, || {
            format!("user {} was not offered {untried:?}", session.user)
        });
        session.judge_end(reset, conns);
        session.judge_parting(now, &self.timeouts, conns);
        session.judge_reason(now, ended, &self.timeouts, conns);
        let starved = session.hungry && now < self.dry_at.plus(DROUGHT);
        session.judge_progress(ended.reason, starved);
        self.fates[session.user].diligent = session.diligent;
    }

    pub fn turn_ends(&mut self, now: Now, pool: &Pool, kernel: &Kernel, pipes: &Pipes) {
        let held: usize = self.sessions.values().map(Session::blocks).sum();
        let out: usize = Class::ALL
            .map(|class| pool.blocks(class) - pool.free(class) - kernel.posted(class))
            .iter()
            .sum();
        let with_core = out - kernel.undelivered();
        check(with_core <= held, law::BLOCKS, || format!("{with_core} are held for {held}"));
        if pool.free(Class::Small) + kernel.posted(Class::Small) == 0 {
            self.dry_at = now;
        }
        if self.frozen {
            return;
        }
        for session in self.sessions.values() {
            session.judge_deadline(now, &self.timeouts);
            session.judge_held();
        }
        for (key, side) in pipes.lent() {
            let session = self.session(key);
            let used = session.sides[side as usize].receive.is_some();
            check(used || session.is_ending(), law::PIPES, || {
                format!("{key:?} {side:?} keeps one and does not use it")
            });
        }
    }

    /// Nothing moves any more until some time passes.
    pub fn at_rest(
        &mut self,
        now: Now,
        pool: &Pool,
        kernel: &Kernel,
        pipes: &Pipes,
        conns: &[Conn],
    ) {
        if self.frozen {
            return;
        }
        let blocks = pool.free(Class::Small) + kernel.posted(Class::Small);
        for session in self.sessions.values_mut() {
            let carried_out = session.ordered.iter().all(|(reason, at)| {
                session.parting_since.is_some() && now < at.plus(grace(*reason)).plus(LATE)
            });
            check(carried_out, law::ORDERS, || format!("user {}", session.user));
            session.judge_silence(now, conns);
            if session.relaying && session.parting_since.is_none() {
                for side in Side::BOTH {
                    session.judge_starved(now, side, blocks);
                    session.judge_rest(side, conns);
                    session.judge_pipe(side, pipes, conns);
                }
            }
        }
    }
}
