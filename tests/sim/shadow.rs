//! The shadow of one session: what the core was told about it and what it asked for. Owns the
//! judgement of a single session; what concerns all of them is in `laws`.

use std::collections::VecDeque;
use std::time::Duration;

use lb::base::time::Now;
use lb::base::wheel::TICK;
use lb::cluster::BackendId;
use lb::cluster::Timeouts;
use lb::proxy::{Intake, Side, StreamCmd};
use lb::ring::pool::{Class, GATHER_MAX, Pool};
use lb::session::EndReason;
use lb::worker::link::Ended;
use lb::worker::slots::Key;

use super::law::{self, check};
use super::net::Conn;
use super::pipes::Pipes;

/// The bounds of `proxy::tcp` on the blocks that a flow may hold.
const SMALL_HELD_MAX: usize = 16;
const LARGE_HELD_MAX: usize = 4;
const FREE_SHARE: usize = 8;
/// How many backends may fail one user, and how many it is offered in all, by
/// `worker::tcp::sessions`.
const ATTEMPTS_MAX: usize = 3;
const OFFERS_MAX: usize = 8;
/// How long a flow waits for blocks without trying again, by `worker::tcp::sessions`.
pub const STARVED_MAX: Duration = Duration::from_millis(100);
/// A worker turns a moment after a deadline.
pub const LATE: Duration = Duration::from_millis(50);
/// A silent host has a minute, and two looks may be needed to see that.
const VANISHED_MAX: Duration = Duration::from_secs(91);

/// A session as seen from outside the core.
pub struct Session {
    pub key: Key,
    pub user: usize,
    /// Both peers would get to the end by themselves.
    pub diligent: bool,
    pub attempt: Option<Attempt>,
    /// Its worker was frozen before it was connected: the backend that it has is due.
    pub held: bool,
    pub tried: Vec<BackendId>,
    /// How many of them could not be tried for lack of a local port.
    pub portless: usize,
    /// The last attempt was one of those, and another backend is due.
    pub wants_next: bool,
    pub relaying: bool,
    pub sides: [Ways; 2],
    /// By the side that the bytes come from.
    pub flows: [Flow; 2],
    /// When bytes were last delivered for certain, and when the core may last have thought so.
    pub delivered_at: Now,
    pub touched_at: Now,
    /// A send was taken back, which may happen only once the session is over.
    pub given_up: bool,
    pub half_closed_at: Option<Now>,
    pub ordered: Vec<(EndReason, Now)>,
    /// What the peers' kernels had acknowledged at the last look.
    pub seen: [Option<u64>; 2],
    /// Since when the session is over and waits for what the peers' kernels have not got.
    pub parting_since: Option<Now>,
    pub ended: Option<Ended>,
    /// A send failed for lack of memory, which is nobody's fault.
    pub out_of_memory: bool,
    /// Has found no block since the last delivery.
    pub hungry: bool,
}

pub struct Attempt {
    pub since: Now,
    pub cancelled: bool,
    /// Taken back by a freeze, after which it is made again.
    pub recalled: bool,
}

/// The operations on one side's socket.
#[derive(Default)]
pub struct Ways {
    pub conn: Option<usize>,
    pub receive: Option<InFlight>,
    pub send: Option<InFlight>,
    /// The question whether the socket takes more.
    pub room: Option<InFlight>,
    /// The end of its stream was reported.
    pub ended: bool,
    /// Its reset was reported.
    pub failed: bool,
    /// Nothing can be sent there any more.
    pub gone: bool,
    /// Its peer was told that no more will come.
    pub finished: bool,
    pub starved: bool,
    /// Since when it has been starved although there are blocks.
    pub passed_over: Option<Now>,
    /// The last send to it stopped short, and the rest has not gone out.
    pub short: bool,
}

#[derive(Default)]
pub struct InFlight {
    pub cancelled: bool,
    /// Taken back by a freeze, after which the rest is sent again.
    pub hurried: bool,
}

#[derive(Default)]
pub struct Flow {
    pub received: u64,
    pub delivered: u64,
    /// Lengths of the blocks held.
    pub waiting: VecDeque<u64>,
    pub sending: VecDeque<u64>,
}

/// How long an order gives a session to deliver what is queued, by `worker::tcp::sessions`.
pub fn grace(order: EndReason) -> Duration {
    Duration::from_secs(if order == EndReason::Stopping { 1 } else { 5 })
}

impl Flow {
    pub fn blocks(&self) -> usize {
        self.waiting.len() + self.sending.len()
    }
}

impl Session {
    pub fn may_be_offered_more(&self) -> bool {
        self.tried.len() < OFFERS_MAX && self.tried.len() - self.portless < ATTEMPTS_MAX
    }

    pub fn blocks(&self) -> usize {
        self.flows.iter().map(Flow::blocks).sum()
    }

    pub fn asks_for_room(&mut self, side: Side) {
        let ways = &mut self.sides[side as usize];
        let told = || format!("user {}: room at {side:?}", self.user);
        check(ways.room.is_none(), law::ONE_EACH, told);
        check(!ways.gone && !ways.finished, law::AFTER_END, told);
        ways.room = Some(InFlight::default());
    }

    pub fn asks_to_receive(&mut self, side: Side, how: Intake, pool: &Pool, conns: &[Conn]) {
        let (from, to) = (&self.sides[side as usize], &self.sides[side.other() as usize]);
        let sink = &conns[to.conn.expect("a session that relays has two connections")];
        let large = matches!(how, Intake::Once { class: Class::Large, .. });
        let wasted = pool.is_scarce() && !large && !(to.send.is_none() && sink.is_roomy());
        check(!wasted, law::SPARING, || format!("user {}: {side:?}", self.user));
        check(from.receive.is_none(), law::ONE_EACH, || format!("user {}: {side:?}", self.user));
        let ways = &mut self.sides[side as usize];
        let over = ways.ended || ways.failed;
        check(!over, law::AFTER_END, || format!("user {}: {side:?} is read", self.user));
        let held = self.flows[side as usize].blocks();
        let small = (pool.surplus() / FREE_SHARE).min(SMALL_HELD_MAX);
        let large = (pool.unused(Class::Large) / FREE_SHARE).min(LARGE_HELD_MAX);
        let most = small.max(large).max(1);
        check(held < most, law::BOUNDED, || format!("{held} of {most} blocks are held already"));
        (ways.starved, ways.passed_over) = (false, None);
        ways.receive = Some(InFlight::default());
    }

    /// A side was reset: it says no more, and nothing can be sent there.
    pub fn fails(&mut self, side: Side) {
        let ways = &mut self.sides[side as usize];
        (ways.failed, ways.gone) = (true, true);
        self.flows[side.other() as usize].waiting.clear();
    }

    pub fn asks_to_splice(&mut self, side: Side) {
        let told = || format!("user {}: {side:?} is spliced", self.user);
        let (from, to) = (&self.sides[side as usize], &self.sides[side.other() as usize]);
        check(from.receive.is_none(), law::ONE_EACH, told);
        check(!from.ended && !from.failed && !to.gone, law::AFTER_END, told);
        let clear = self.flows[side as usize].blocks() == 0 && to.send.is_none();
        check(clear, law::BYTES, told);
        let ways = &mut self.sides[side as usize];
        (ways.starved, ways.passed_over) = (false, None);
        ways.receive = Some(InFlight::default());
    }

    pub fn asks_to_end_splice(&self, side: Side) {
        let ways = &self.sides[side as usize];
        check(ways.receive.is_none(), law::PIPES, || {
            format!("user {}: {side:?} has a step under way", self.user)
        });
    }

    pub fn asks_to_send(&mut self, side: Side, blocks: usize) {
        let ways = &mut self.sides[side as usize];
        check(ways.send.is_none(), law::ONE_EACH, || format!("user {}: {side:?}", self.user));
        let over = ways.gone || ways.finished;
        check(!over, law::AFTER_END, || format!("user {}: {side:?} is written to", self.user));
        let flow = &mut self.flows[side.other() as usize];
        let right = (1..=flow.waiting.len().min(GATHER_MAX)).contains(&blocks);
        check(right, law::BYTES, || format!("{blocks} blocks of {}", flow.waiting.len()));
        flow.sending = flow.waiting.drain(..blocks).collect();
        ways.send = Some(InFlight::default());
    }

    pub fn asks_to_cancel(
        &mut self,
        which: impl Fn(&mut Ways) -> &mut Option<InFlight>,
        side: Side,
        what: &StreamCmd,
    ) {
        let user = self.user;
        let in_flight = which(&mut self.sides[side as usize]);
        let Some(in_flight) = in_flight.as_mut().filter(|in_flight| !in_flight.cancelled) else {
            panic!("broken law: {}: user {user}: {what:?}", law::CANCEL);
        };
        in_flight.cancelled = true;
        self.given_up |= matches!(what, StreamCmd::CancelSend { .. });
    }

    pub fn asks_to_hurry(&mut self, side: Side) {
        let user = self.user;
        let Some(send) = self.sides[side as usize].send.as_mut() else {
            panic!("broken law: {}: user {user}: no send to {side:?}", law::CANCEL);
        };
        send.hurried = true;
    }

    pub fn asks_to_finish(&mut self, now: Now, side: Side, conns: &[Conn]) {
        let from = &self.sides[side.other() as usize];
        let flow = &self.flows[side.other() as usize];
        let source = &conns[from.conn.expect("a session that relays has two connections")].inward;
        let whole = source.end_arrived && flow.delivered == source.written;
        let told = format!(
            "user {}: {side:?} after {} of {} bytes received of {}",
            self.user, flow.delivered, flow.received, source.written
        );
        check(from.ended && !from.failed && whole, law::FIN, || told.clone());
        let ways = &mut self.sides[side as usize];
        check(!ways.finished && ways.send.is_none(), law::FIN, || told);
        ways.finished = true;
        self.half_closed_at.get_or_insert(now);
    }

    pub fn judge_end(&self, reset: bool, conns: &[Conn]) {
        let told = || {
            let flows = &self.flows;
            format!(
                "user {}: up {} of {}, down {} of {}, {:?}",
                self.user,
                flows[0].delivered,
                flows[0].received,
                flows[1].delivered,
                flows[1].received,
                self.ended.map(|ended| ended.reason)
            )
        };
        if reset {
            let clean = self.relaying
                && self.sides.iter().all(|ways| ways.finished)
                && self.undelivered(conns) == [0; 2];
            check(!clean, law::CLEAN, told);
            return;
        }
        for side in Side::BOTH {
            let (ways, flow) = (&self.sides[side as usize], &self.flows[side as usize]);
            let whole = flow.delivered == flow.received && !ways.failed && !ways.gone;
            check(whole, law::TRUNCATED, told);
            let lacking = ways.conn.is_some_and(|conn| conns[conn].undelivered() > 0);
            check(!(self.relaying && lacking), law::TRUNCATED, told);
            let unread = ways.conn.is_some_and(|conn| conns[conn].inward.unread() > 0);
            check(!(unread && ways.starved), law::TRUNCATED, told);
        }
    }

    /// Bytes that our kernel holds for each side's peer, which has not got them.
    fn undelivered(&self, conns: &[Conn]) -> [u64; 2] {
        self.sides.each_ref().map(|ways| {
            let conn = ways.conn.filter(|_| self.relaying);
            conn.map_or(0, |conn| conns[conn].undelivered())
        })
    }

    /// Is anything given up that a peer may still take?
    pub fn judge_parting(&self, now: Now, timeouts: &Timeouts, conns: &[Conn]) {
        let Some(ended) = self.ended.filter(|_| self.relaying) else { return };
        let waited = |(reason, at): &(EndReason, Now)| now >= at.plus(grace(*reason));
        let had_its_time = matches!(ended.reason, EndReason::Idle | EndReason::HalfCloseIdle)
            || now.since(self.delivered_at) >= timeouts.tcp_idle
            || self.ordered.iter().any(waited);
        for ways in &self.sides {
            let Some(conn) = ways.conn.map(|conn| &conns[conn]) else { continue };
            let taken = conn.broken || conn.silent_since.is_some() || conn.undelivered() == 0;
            check(taken || had_its_time, law::PARTS, || {
                format!("user {}: {ended:?}, {} bytes", self.user, conn.undelivered())
            });
        }
    }

    /// Is a host noticed that has vanished with bytes on their way to it?
    pub fn judge_silence(&self, now: Now, conns: &[Conn]) {
        for ways in self.sides.iter().filter(|_| self.relaying) {
            let Some(conn) = ways.conn.map(|conn| &conns[conn]) else { continue };
            let silent = conn.silent_since.filter(|_| conn.undelivered() > 0);
            let due = silent.map(|since| since.max(self.touched_at).plus(VANISHED_MAX));
            let alone =
                self.sides.iter().filter_map(|ways| ways.conn).all(|conn| {
                    conns[conn].silent_since.is_some() || conns[conn].undelivered() == 0
                });
            check(!alone || due.is_none_or(|due| now < due), law::VANISHED, || {
                format!("user {}: silent since {silent:?}, it is {now:?}", self.user)
            });
        }
    }

    pub fn judge_reason(&self, now: Now, ended: Ended, timeouts: &Timeouts, conns: &[Conn]) {
        let side = |side: Side| &self.sides[side as usize];
        let undelivered = self.undelivered(conns);
        let dead = |side: Side| {
            let conn = self.sides[side as usize].conn;
            undelivered[side as usize] > 0 && conn.is_some_and(|conn| conns[conn].broken)
        };
        let reset = |side: &Ways| side.failed || side.gone;
        let vanished = self
            .sides
            .iter()
            .any(|ways| ways.conn.is_some_and(|conn| conns[conn].silent_since.is_some()));
        let finished = self.sides.iter().filter(|ways| ways.finished).count();
        let still = now.since(self.delivered_at);
        let half = self.half_closed_at.map_or(still, |at| still.min(now.since(at)));
        let evident = match ended.reason {
            EndReason::Finished => finished == 2,
            EndReason::ClientReset => reset(side(Side::Client)) || dead(Side::Client),
            EndReason::BackendReset => reset(side(Side::Backend)) || dead(Side::Backend),
            EndReason::Idle if vanished || finished == 2 => self.relaying,
            EndReason::Idle => self.relaying && finished == 0,
            EndReason::HalfCloseIdle => self.relaying && finished == 1,
            EndReason::Unreachable => !self.relaying,
            reason => self.ordered.iter().any(|(order, _)| *order == reason),
        };
        let told = || format!("user {}: {ended:?}, still for {still:?}/{half:?}", self.user);
        check(evident, law::REASON, told);
        let early = match ended.reason {
            EndReason::Idle => !vanished && still < timeouts.tcp_idle,
            EndReason::HalfCloseIdle => half < timeouts.half_close,
            _ => false,
        };
        check(!early, law::DEADLINE, told);
        let [to_client, to_backend] = undelivered;
        let up = self.flows[0].delivered - to_backend;
        let down = self.flows[1].delivered - to_client;
        check((ended.bytes_up, ended.bytes_down) == (up, down), law::COUNTED, || {
            format!("user {}: {ended:?} for {up} up and {down} down", self.user)
        });
        let right = ended.backend.is_none() || ended.backend == self.tried.last().copied();
        check(right, law::STAYS, told);
    }

    pub fn judge_progress(&self, reason: EndReason, starved: bool) {
        let excused = !self.diligent
            || !self.relaying
            || self.out_of_memory
            || !self.ordered.is_empty()
            || starved && matches!(reason, EndReason::Idle | EndReason::HalfCloseIdle);
        let finished = reason == EndReason::Finished;
        check(excused || finished, law::PROGRESS, || format!("user {}: {reason:?}", self.user));
    }

    pub fn judge_deadline(&self, now: Now, timeouts: &Timeouts) {
        if let Some(attempt) = &self.attempt {
            let late = now >= attempt.since.plus(timeouts.connect).plus(TICK);
            let told = || format!("user {} is still connecting", self.user);
            check(!late || attempt.cancelled, law::DEADLINE, told);
        }
        if !self.relaying {
            return;
        }
        let finished = self.sides.iter().filter(|ways| ways.finished).count();
        let due = match self.half_closed_at {
            Some(at) if finished == 1 => self.touched_at.max(at).plus(timeouts.half_close),
            _ => self.touched_at.plus(timeouts.tcp_idle),
        };
        let due = self
            .parting_since
            .map_or(due, |since| self.touched_at.max(since).plus(timeouts.tcp_idle));
        check(now < due.plus(TICK) || self.is_ending(), law::DEADLINE, || {
            format!("user {} was due at {due:?}, it is {now:?}", self.user)
        });
    }

    /// Whether nothing is or will be in flight for it.
    pub fn is_out_of_work(&self) -> bool {
        let idle = |side: &Side| {
            let (ways, to) = (&self.sides[*side as usize], &self.sides[side.other() as usize]);
            // A block is of no use for what could no longer be sent, or for what is to end.
            let waits = ways.starved && !to.gone && self.ordered.is_empty();
            ways.receive.is_none() && ways.send.is_none() && !waits
        };
        self.relaying && Side::BOTH.iter().all(idle)
    }

    /// Whether the core waits only for what it has cancelled.
    pub fn is_ending(&self) -> bool {
        let operations = self.sides.iter().flat_map(|ways| [&ways.receive, &ways.send, &ways.room]);
        let mut in_flight = operations.flatten().peekable();
        in_flight.peek().is_some() && in_flight.all(|operation| operation.cancelled)
    }

    pub fn judge_held(&self) {
        for side in Side::BOTH {
            let held = self.flows[side as usize].blocks();
            let receive = &self.sides[side as usize].receive;
            let reading = receive.as_ref().is_some_and(|receive| !receive.cancelled);
            check(!reading || held < SMALL_HELD_MAX, law::BOUNDED, || {
                format!("user {}: {side:?} is read though {held} blocks are held", self.user)
            });
        }
    }

    pub fn judge_starved(&mut self, now: Now, side: Side, blocks: usize) {
        // While its own send is in flight, that holds the flow back and not the lack of blocks.
        let to = &self.sides[side.other() as usize];
        let held_back = to.gone || to.send.is_some() || to.room.is_some();
        let ways = &mut self.sides[side as usize];
        if !ways.starved || held_back || blocks == 0 {
            return ways.passed_over = None;
        }
        let since = *ways.passed_over.get_or_insert(now);
        check(now < since.plus(STARVED_MAX + LATE), law::WAKE, || {
            format!("user {}: {side:?} waits for blocks, and {blocks} are free", self.user)
        });
    }

    /// What is in a pipe goes out as soon as it can.
    pub fn judge_pipe(&self, side: Side, pipes: &Pipes, conns: &[Conn]) {
        let held = pipes.held((self.key, side));
        let to = &self.sides[side.other() as usize];
        let conn = &conns[to.conn.expect("a session that relays has two connections")];
        let stuck = held > 0 && !to.gone && conn.is_writable();
        check(!stuck, law::WAKE, || format!("user {}: {side:?}: {held} in a pipe", self.user));
    }

    /// When all is still, what keeps the flow from `side` from going on?
    pub fn judge_rest(&self, side: Side, conns: &[Conn]) {
        let (from, to) = (&self.sides[side as usize], &self.sides[side.other() as usize]);
        let flow = &self.flows[side as usize];
        let told = || {
            format!(
                "user {}: from {side:?}: {} blocks held, starved {}, ended {}, failed {}, gone {}",
                self.user,
                flow.blocks(),
                from.starved,
                from.ended,
                from.failed,
                to.gone
            )
        };
        let full = to.room.is_some() && !conns[to.conn.unwrap_or_default()].is_roomy();
        // A send that was not waited for goes out again when there is room.
        let unsent = !flow.waiting.is_empty() && to.send.is_none() && !to.gone && !full;
        check(!unsent, law::WAKE, told);
        let drained = flow.blocks() == 0;
        let unfinished =
            from.ended && !from.failed && !from.short && drained && !to.finished && !to.gone;
        check(!unfinished, law::WAKE, told);
        check(!(from.failed && drained), law::WAKE, told);
        check(!(from.gone && to.gone), law::WAKE, told);
        let conn = &conns[from.conn.expect("a session that relays has two connections")];
        let readable = conn.is_readable() && !from.ended && !from.failed;
        let excused = to.send.is_some() || to.gone || from.starved || full;
        check(!readable || from.receive.is_some() || excused, law::WAKE, told);
    }
}
