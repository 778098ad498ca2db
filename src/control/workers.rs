//! The workers as the control core sees them: orders to them, reports and counters from them. Owns the
//! orders held for a worker whose queue is full, and the knowledge of what the workers must have seen.
//! Nothing here waits for a worker.

mod inherited;
mod late;
mod standstill;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::error;

pub use inherited::Timing;
use inherited::{Backends, Base};
pub use standstill::are_done;

use super::doors::OpenDoor;
use crate::base::time::Now;
use crate::cluster::{DoorId, Protocol, ServiceId};
use crate::config::plans::DoorPlan;
use crate::metrics::named::Named;
use crate::metrics::{BACKENDS_MAX, BUCKETS, BackendCounters, Kind, WorkerCounters};
use crate::session::shards::Shard;
use crate::worker::link::{ControlEnd, DoorChange, Listener, Order, Report, RequestLine};

/// The most orders held here while a worker's own queue is full: one for each backend, and as many for
/// single sessions as operators may ask for meanwhile. Memory for them is taken from the system as they come.
const WAITING_MAX: usize = BACKENDS_MAX + 4096;

const BACKEND_ROWS: usize = BackendCounters::ROWS.len();

/// One backend's counters, in the order of [`BackendCounters::ROWS`].
pub type BackendValues = [u64; BACKEND_ROWS];

/// One worker's counters, in the order of [`WorkerCounters::ROWS`].
pub type WorkerValues = [u64; WorkerCounters::ROWS.len()];

/// One of a backend's counters, by the name of its row.
pub fn value(values: &BackendValues, name: &str) -> u64 {
    let row = BackendCounters::ROWS.iter().position(|row| row.name == name);
    values[row.expect("the caller names a row of the table")]
}

/// What backends were given since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Given {
    pub sessions: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
}

impl Given {
    /// Adds one backend's counters.
    pub fn add(&mut self, values: &BackendValues) {
        self.sessions += value(values, "total");
        self.bytes_up += value(values, "up");
        self.bytes_down += value(values, "down");
    }
}

struct End {
    link: ControlEnd,
    waiting: VecDeque<Order>,
    /// The same, to tell at once which of them are in there.
    waits: HashSet<Order>,
    /// By slot: the counts at the time the slot was given to its present backend.
    before: Box<[BackendValues]>,
    base: Base,
}

/// How many turns each worker had made at some moment.
#[derive(Clone, Debug)]
pub struct Mark(Vec<u64>);

/// How often sleeping workers are woken for one turn.
const PULSE_EVERY: Duration = Duration::from_secs(1);
/// A worker that has not turned for this long is hung.
const LOST_AFTER: Duration = Duration::from_secs(5);

/// A check that every worker's loop still turns, which wakes those that sleep.
pub struct Pulse {
    mark: Mark,
    since: Now,
    lost: bool,
}

impl Pulse {
    pub fn new(workers: &Workers, now: Now) -> Pulse {
        Pulse { mark: workers.mark(), since: now, lost: false }
    }

    /// Checks whether the workers have turned since the last check, and wakes them to turn again.
    pub fn feel(&mut self, workers: &Workers, now: Now) {
        let quiet = now.since(self.since);
        if quiet < PULSE_EVERY {
            return;
        }
        if workers.have_turned(&self.mark) {
            *self = Pulse::new(workers, now);
        } else if quiet >= LOST_AFTER && !self.lost {
            self.lost = true;
            error!(seconds = quiet.as_secs(), "a worker does not turn any more");
        }
        workers.wake();
    }

    /// Whether a worker has gone too long without turning.
    pub fn is_lost(&self) -> bool {
        self.lost
    }
}

/// All workers.
pub struct Workers {
    ends: Vec<End>,
    inherited: Backends,
}

impl Workers {
    pub fn new(links: Vec<ControlEnd>) -> Workers {
        let ends = links.into_iter().map(|link| End {
            link,
            waiting: VecDeque::new(),
            waits: HashSet::new(),
            before: vec![[0; BACKEND_ROWS]; BACKENDS_MAX].into(),
            base: Base::default(),
        });
        Workers { ends: ends.collect(), inherited: Backends::default() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// Makes sleeping workers look at their orders and at the snapshot.
    pub fn wake(&self) {
        for end in &self.ends {
            // Fails only when the counter would overflow, which takes 2^64 wake-ups unread.
            let _ = end.link.wake.write(1);
        }
    }

    /// Gives every worker an order. Returns how many of these had to be dropped.
    pub fn order(&mut self, order: Order) -> u64 {
        let lost = self.order_quietly(order);
        self.wake();
        lost
    }

    /// Like [`Workers::order`], for many orders in a row: the caller wakes the workers after the last.
    pub fn order_quietly(&mut self, order: Order) -> u64 {
        self.ends.iter_mut().map(|end| u64::from(!end.take(order))).sum()
    }

    /// Gives one worker an order. Returns whether it was accepted.
    pub fn order_one(&mut self, worker: u8, order: Order) -> bool {
        let end = self.ends.iter_mut().find(|end| end.link.worker == worker);
        let taken = end.is_some_and(|end| end.take(order));
        self.wake();
        taken
    }

    /// Passes on orders that had to wait. Returns whether none is left waiting.
    pub fn flush(&mut self) -> bool {
        for end in &mut self.ends {
            if end.waiting.is_empty() {
                continue;
            }
            while let Some(order) = end.waiting.front() {
                if end.link.orders.push(*order).is_err() {
                    break;
                }
                end.waits.remove(order);
                end.waiting.pop_front();
            }
            let _ = end.link.wake.write(1);
        }
        self.ends.iter().all(|end| end.waiting.is_empty())
    }

    /// Whether every worker has room for this many changes of doors.
    pub fn can_change_doors(&self, changes: usize) -> bool {
        self.ends.iter().all(|end| end.link.doors.slots() >= changes)
    }

    /// Gives each worker its socket at a new door. This and the other changes of doors are for callers who
    /// have asked whether there is room, and who wake the workers after the last.
    pub fn open_door(&mut self, id: DoorId, plan: &DoorPlan, sockets: Vec<OwnedFd>) {
        let mut sockets = sockets.into_iter();
        self.change_door(plan.protocol, || {
            let socket = sockets.next().expect("a door has a socket for each worker");
            DoorChange::Open(Listener { id, socket, service: plan.service, is_tls: plan.is_tls })
        });
    }

    /// Users who come by a door from now on are this service's, and speak TLS there or need not.
    pub fn assign_door(&mut self, door: &OpenDoor, service: ServiceId, is_tls: bool) {
        self.change_door(door.protocol, || DoorChange::Assign { id: door.id, service, is_tls });
    }

    /// Nobody comes in by a door any more.
    pub fn close_door(&mut self, door: &OpenDoor) {
        self.change_door(door.protocol, || DoorChange::Close { id: door.id });
    }

    fn change_door(&mut self, protocol: Protocol, mut change: impl FnMut() -> DoorChange) {
        for end in &mut self.ends {
            let told = end.link.doors.push((protocol, change()));
            told.expect("callers ask whether there is room");
        }
    }

    /// Hands over the workers' reports, about `at_once` at most and an equal share from each. Returns
    /// whether there are more.
    pub fn reports(&mut self, at_once: usize, mut hear: impl FnMut(Report)) -> bool {
        let share = at_once.div_ceil(self.ends.len().max(1));
        for end in &mut self.ends {
            for _ in 0..share {
                let Ok(report) = end.link.reports.pop() else { break };
                hear(report);
            }
        }
        self.ends.iter().any(|end| !end.link.reports.is_empty())
    }

    /// Hands over the log lines about API requests in the same way.
    pub fn requests(&mut self, at_once: usize, mut hear: impl FnMut(&RequestLine)) -> bool {
        let share = at_once.div_ceil(self.ends.len().max(1));
        for end in &mut self.ends {
            for _ in 0..share {
                let Ok(line) = end.link.requests.pop() else { break };
                hear(&line);
            }
        }
        self.ends.iter().any(|end| !end.link.requests.is_empty())
    }

    /// How far the workers are now.
    pub fn mark(&self) -> Mark {
        Mark(self.ends.iter().map(|end| end.link.metrics.counters.turns.get()).collect())
    }

    /// Whether every worker has begun and ended a turn since the mark was made, and so has seen
    /// everything published before it. A turn under way at the mark may have looked too early.
    pub fn have_passed(&self, mark: &Mark) -> bool {
        self.turned_by(mark, 2)
    }

    /// Whether every worker's loop has turned at all since the mark was made.
    pub fn have_turned(&self, mark: &Mark) -> bool {
        self.turned_by(mark, 1)
    }

    fn turned_by(&self, mark: &Mark, turns: u64) -> bool {
        let now = self.ends.iter().map(|end| end.link.metrics.counters.turns.get());
        now.zip(&mark.0).all(|(now, then)| now.wrapping_sub(*then) >= turns)
    }

    /// Starts counting a new backend in `slot`, without what its predecessor left there.
    pub fn begin(&mut self, slot: u16) {
        self.inherited.begin(slot);
        for end in &mut self.ends {
            end.before[usize::from(slot)] = end.values(slot);
        }
    }

    /// The counts of the backend in `slot`, over all workers.
    pub fn backend(&self, slot: u16) -> BackendValues {
        let mut sum = [0u64; BACKEND_ROWS];
        for end in &self.ends {
            let before = &end.before[usize::from(slot)];
            for (row, value) in end.values(slot).into_iter().enumerate() {
                let own = match BackendCounters::ROWS[row].kind {
                    Kind::Counter => value.wrapping_sub(before[row]),
                    Kind::Gauge => value,
                };
                sum[row] = sum[row].wrapping_add(own);
            }
        }
        self.inherited.add_to(slot, &mut sum);
        sum
    }

    /// When the backend in `slot`, or one before it there, last began to answer an API request.
    pub fn answered(&self, slot: u16) -> Now {
        let of = |end: &End| end.link.metrics.answered[usize::from(slot)].get();
        let here = Now::from_nanos(self.ends.iter().map(of).max().unwrap_or(0));
        here.max(self.inherited.answered(slot))
    }

    /// Sessions running on the backend in `slot`, those that a predecessor still has among them.
    pub fn active(&self, slot: u16) -> u64 {
        self.active_here(slot) + self.inherited.elsewhere(slot)
    }

    /// Those at the workers.
    pub fn active_here(&self, slot: u16) -> u64 {
        let of = |end: &End| end.link.metrics.backends[usize::from(slot)].active.get();
        self.ends.iter().map(of).sum()
    }

    /// The backend in `slot` goes on with what a predecessor has counted of it.
    pub fn inherit(&mut self, slot: u16, more: &Named<BackendCounters>) {
        self.inherited.add(slot, more);
    }

    /// When a predecessor has last seen it begin to answer a request.
    pub fn inherit_answered(&mut self, slot: u16, answered: Now) {
        self.inherited.set_answered(slot, answered);
    }

    /// The sessions that a predecessor still has, by the place of the backend.
    pub fn set_elsewhere(&mut self, sessions: BTreeMap<u16, u64>) {
        self.inherited.set_elsewhere(sessions);
    }

    /// The worker of this number, or else the first, goes on with what one of a predecessor has counted.
    pub fn inherit_worker(
        &mut self,
        number: usize,
        counters: &Named<WorkerCounters>,
        timings: [(&[u64; BUCKETS], u64); Timing::ALL.len()],
    ) {
        let place = if number < self.ends.len() { number } else { 0 };
        let Some(end) = self.ends.get(place) else { return };
        counters.add_to(&end.base.counters);
        for (timing, (counts, sum_us)) in Timing::ALL.into_iter().zip(timings) {
            end.base.histogram(timing).add(counts, sum_us);
        }
    }

    /// All running sessions.
    pub fn sessions(&self) -> u64 {
        self.sum(|counters| counters.sessions_active.get())
    }

    /// One of the workers' own counters, over all workers.
    pub fn sum(&self, counter: impl Fn(&WorkerCounters) -> u64) -> u64 {
        let of = |end: &End| {
            counter(&end.link.metrics.counters).wrapping_add(counter(&end.base.counters))
        };
        self.ends.iter().map(of).fold(0, u64::wrapping_add)
    }

    /// One of the workers' histograms, over all workers: the counts by bucket, and the sum in
    /// microseconds.
    pub fn histogram(&self, timing: Timing) -> (Vec<u64>, u64) {
        let mut counts = vec![0; BUCKETS];
        let mut sum_us = 0u64;
        for (_, next, more_us) in self.histograms(timing) {
            counts.iter_mut().zip(next).for_each(|(count, more)| *count += more);
            sum_us = sum_us.wrapping_add(more_us);
        }
        (counts, sum_us)
    }

    /// The same of each worker, behind its number.
    pub fn histograms(
        &self,
        timing: Timing,
    ) -> impl Iterator<Item = (u8, [u64; BUCKETS], u64)> + '_ {
        self.ends.iter().map(move |end| {
            let (own, base) = (timing.of(&end.link.metrics), end.base.histogram(timing));
            let (mut counts, before) = (own.counts(), base.counts());
            counts.iter_mut().zip(before).for_each(|(count, more)| *count += more);
            (end.link.worker, counts, own.sum_us().wrapping_add(base.sum_us()))
        })
    }

    /// Each worker's number and counters, in the order of [`WorkerCounters::ROWS`].
    pub fn counters(&self) -> impl Iterator<Item = (u8, WorkerValues)> + '_ {
        self.ends.iter().map(|end| {
            let (mut values, base) =
                (end.link.metrics.counters.values(), end.base.counters.values());
            values.iter_mut().zip(base).for_each(|(value, more)| *value = value.wrapping_add(more));
            (end.link.worker, values)
        })
    }

    /// Every worker's part of the session table.
    pub fn shards(&self) -> Vec<Arc<Shard>> {
        self.ends.iter().map(|end| Arc::clone(&end.link.shard)).collect()
    }
}

impl End {
    /// Takes the order into the worker's queue, or among those waiting for room in it. Returns whether
    /// there was room for it.
    fn take(&mut self, order: Order) -> bool {
        if self.waiting.is_empty() && self.link.orders.push(order).is_ok() {
            return true;
        }
        if self.waits.contains(&order) {
            return true;
        }
        let room = self.waiting.len() < WAITING_MAX;
        if room {
            self.waiting.push_back(order);
            self.waits.insert(order);
        }
        room
    }

    fn values(&self, slot: u16) -> BackendValues {
        self.link.metrics.backends[usize::from(slot)].values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::publish::Publisher;
    use crate::cluster::{BackendId, Snapshot};
    use crate::session::EndReason;
    use crate::worker::link::{ORDERS_MAX, WorkerEnd, link};

    fn one_worker() -> (Workers, WorkerEnd) {
        let publisher = Publisher::new(Snapshot::default());
        let urgent = Arc::new(tokio::sync::Notify::new());
        let (control, worker) = link(0, 16, publisher.subscribe(), urgent).unwrap();
        (Workers::new(vec![control]), worker)
    }

    fn end(backend: usize) -> Order {
        let backend = BackendId(backend as u32);
        Order::EndBackend { backend, reason: EndReason::BackendLeft }
    }

    #[test]
    fn orders_to_a_busy_worker_wait_in_order_and_are_bounded() {
        let (mut workers, mut worker) = one_worker();
        let all = ORDERS_MAX + WAITING_MAX;
        for backend in 0..all {
            assert_eq!(workers.order(end(backend)), 0);
        }
        assert_eq!(workers.order(end(all)), 1, "there is no more room");
        assert_eq!(workers.order(end(all - 1)), 0, "it is waiting already");
        assert!(!workers.flush());
        let mut taken = Vec::new();
        while taken.len() < all {
            while let Ok(order) = worker.orders.pop() {
                taken.push(order);
            }
            workers.flush();
        }
        assert!(taken.into_iter().eq((0..all).map(end)));
        assert!(workers.flush());
    }

    #[test]
    fn a_worker_has_seen_what_was_published_before_its_last_whole_turn() {
        let (workers, worker) = one_worker();
        let mark = workers.mark();
        worker.metrics.counters.turns.one();
        assert!(!workers.have_passed(&mark), "this turn may have looked before");
        worker.metrics.counters.turns.one();
        assert!(workers.have_passed(&mark));
    }

    #[test]
    fn a_worker_that_turns_when_woken_is_well_and_one_that_does_not_is_lost() {
        let at = |ms: u64| Now::from_nanos(ms * 1_000_000);
        let (workers, worker) = one_worker();
        let mut pulse = Pulse::new(&workers, at(0));
        for second in 1..20 {
            pulse.feel(&workers, at(second * 1000));
            worker.metrics.counters.turns.one();
            pulse.feel(&workers, at(second * 1000 + 100));
        }
        assert!(!pulse.is_lost());
        pulse.feel(&workers, at(24_000));
        assert!(!pulse.is_lost());
        pulse.feel(&workers, at(24_200));
        assert!(pulse.is_lost());
        worker.metrics.counters.turns.one();
        pulse.feel(&workers, at(24_300));
        assert!(!pulse.is_lost());
    }

    #[test]
    fn a_backend_is_not_counted_what_its_predecessor_did() {
        let (mut workers, worker) = one_worker();
        let counters = &worker.metrics.backends[3];
        counters.total.add(7);
        counters.up.add(100);
        workers.begin(3);
        counters.total.one();
        counters.active.one();
        let row = |name| BackendCounters::ROWS.iter().position(|row| row.name == name).unwrap();
        let values = workers.backend(3);
        assert_eq!((values[row("total")], values[row("up")], values[row("active")]), (1, 0, 1));
        assert_eq!(workers.active(3), 1);
    }
}
