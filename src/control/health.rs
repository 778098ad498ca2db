//! When a backend is asked whether it is alive, and when it counts as gone. Owns two small state
//! machines: the hellos of one control connection, and the way back of a backend that was set aside; and
//! how many requests in a row one has left unanswered. Pure: callers pass in the time and act on the result.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::time::Now;
use crate::config::Health;

/// Bytes a peer may send before it answers a hello, and still be excused.
const EXCUSED_BYTES_MAX: usize = 4 << 20;
/// The longest time for which nobody is blamed that nobody was listening: longer than any standstill lasts.
const PARDON_MAX: Duration = Duration::from_secs(10);

/// What a connection's hellos require now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Due {
    Nothing,
    /// Send a hello.
    Ask,
    /// A hello was not answered in time; the number is how many in a row were not.
    Missed(u32),
    /// The allowed number of misses is used up: the peer is gone.
    Lost,
}

/// The hellos of one connection. At most one is outstanding at a time; the next one waits until that one
/// was answered or missed. An answer arrives behind everything its peer sent before, so the time for it
/// runs only while none of that is left to handle.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Hellos {
    #[serde(skip)]
    rule: Health,
    next: Now,
    asked: Option<Now>,
    /// Since when we have had something from the peer to handle.
    busy: Option<Now>,
    /// How long we have had that since the last hello.
    pardoned: Duration,
    /// Bytes the peer has sent since the last hello.
    heard: usize,
    misses: u32,
    answered: Option<(Now, Duration)>,
}

impl Hellos {
    /// The first hello is due one interval from `now`.
    pub fn new(rule: Health, now: Now) -> Hellos {
        let next = now.plus(rule.interval);
        let pardoned = Duration::ZERO;
        Hellos {
            rule,
            next,
            asked: None,
            busy: None,
            pardoned,
            heard: 0,
            misses: 0,
            answered: None,
        }
    }

    /// Adopts another rule from the next hello on.
    pub fn follow(&mut self, rule: Health) {
        self.rule = rule;
    }

    /// When [`Hellos::step`] has something to do.
    pub fn deadline(&self) -> Now {
        self.asked.map_or(self.next, |asked| asked.plus(self.rule.timeout() + self.pardoned))
    }

    /// What is due at `now`. Call it again until it returns [`Due::Nothing`].
    pub fn step(&mut self, now: Now) -> Due {
        if now < self.deadline() {
            return Due::Nothing;
        }
        if self.asked.take().is_some() {
            self.misses += 1;
            self.next = self.next.max(now);
            return if self.misses >= self.rule.misses {
                Due::Lost
            } else {
                Due::Missed(self.misses)
            };
        }
        self.asked = Some(now);
        (self.pardoned, self.heard) = (Duration::ZERO, 0);
        self.busy = self.busy.map(|_| now);
        self.next = now.plus(self.rule.interval);
        Due::Ask
    }

    /// The peer answered, which clears all misses. Returns how long it took, if a hello was outstanding;
    /// a late or unsolicited answer is a sign of life all the same.
    pub fn answered(&mut self, now: Now) -> Option<Duration> {
        self.misses = 0;
        let took = now.since(self.asked.take()?);
        self.answered = Some((now, took));
        Some(took)
    }

    /// The peer sent this many bytes.
    pub fn heard(&mut self, bytes: usize) {
        self.heard = self.heard.saturating_add(bytes);
    }

    /// Whether from now on the balancer has something from the peer to handle, so that a missing
    /// answer means nothing. A peer that never stops sending is excused for `EXCUSED_BYTES_MAX` only.
    pub fn busy(&mut self, now: Now, busy: bool) {
        if let Some(since) = self.busy
            && self.heard <= EXCUSED_BYTES_MAX
        {
            self.pardoned += now.since(since);
        }
        self.busy = busy.then_some(now);
    }

    /// Nobody has listened to the peer from then until now, which is not held against it.
    pub fn stood_still(&mut self, from: Now, now: Now) {
        let time = now.since(from).min(PARDON_MAX);
        if self.asked.is_some() {
            self.pardoned = self.pardoned.saturating_add(time);
        }
        // That time is not to be pardoned once more.
        self.busy = self.busy.map(|_| now);
    }

    /// Hellos as somebody else has left them, by this rule from now on.
    pub fn go_on(self, rule: Health, now: Now) -> Hellos {
        Hellos {
            rule,
            next: self.next.min(now.plus(rule.interval)),
            asked: self.asked.map(|asked| asked.min(now)),
            pardoned: self.pardoned.min(PARDON_MAX),
            busy: self.busy.map(|busy| busy.min(now)),
            misses: self.misses.min(rule.misses.saturating_sub(1)),
            ..self
        }
    }

    /// Unanswered hellos in a row.
    pub fn misses(&self) -> u32 {
        self.misses
    }

    /// When the last answer arrived, and how long it took.
    pub fn last(&self) -> Option<(Now, Duration)> {
        self.answered
    }
}

/// The shortest wait before a backend set aside is tried again.
pub const RETRY_MIN: Duration = Duration::from_millis(200);
/// The longest.
pub const RETRY_MAX: Duration = Duration::from_secs(10);

/// The way back of a backend that was set aside: it is retried at intervals that double. If it returns
/// and soon fails again, the intervals continue where they were, so a flapping backend is tried ever
/// more rarely instead of costing every user a retry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Revival {
    wait: Duration,
    restored: Option<Now>,
}

impl Default for Revival {
    fn default() -> Revival {
        Revival { wait: RETRY_MIN, restored: None }
    }
}

impl Revival {
    /// The backend is set aside. It has been well if it was back for longer than [`RETRY_MAX`] and `patience`,
    /// the time that its failure took to show.
    pub fn set_aside(&mut self, patience: Duration, now: Now) {
        let well = RETRY_MAX.saturating_add(patience);
        if self.restored.is_some_and(|restored| now.since(restored) > well) {
            self.wait = RETRY_MIN;
        }
        self.restored = None;
    }

    /// The same before the wait that goes on, which is to be begun anew.
    pub fn before_wait(&self) -> Revival {
        Revival { wait: (self.wait / 2).max(RETRY_MIN), ..self.clone() }
    }

    /// The same within its bounds, whoever has written it.
    pub fn bounded(self, now: Now) -> Revival {
        let restored = self.restored.map(|restored| restored.min(now));
        Revival { wait: self.wait.clamp(RETRY_MIN, RETRY_MAX), restored }
    }

    /// How long to wait before the next try.
    pub fn wait(&mut self) -> Duration {
        let wait = self.wait;
        self.wait = (wait * 2).min(RETRY_MAX);
        wait
    }

    /// A try succeeded, and the backend gets users again.
    pub fn restored(&mut self, now: Now) {
        self.restored = Some(now);
    }
}

/// How many API requests in a row a backend has let wait for too long. One that took longer than others
/// which were answered meanwhile is slow itself, and says nothing about the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Silence {
    row: u32,
    last: Now,
}

impl Silence {
    /// A request that the backend has had from `since` to `now` was not answered in time; it last began to
    /// answer any at `answered`. Returns how many in a row that makes.
    pub fn unanswered(&mut self, since: Now, now: Now, answered: Now) -> u32 {
        if answered >= since {
            return 0;
        }
        self.row = self.in_row(answered).saturating_add(1);
        self.last = now;
        self.row
    }

    /// How many in a row there are, if the backend last began to answer at `answered`.
    pub fn in_row(&self, answered: Now) -> u32 {
        if answered >= self.last { 0 } else { self.row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Health = Health {
        interval: Duration::from_secs(5),
        timeout: Some(Duration::from_secs(2)),
        misses: 3,
    };

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    /// Steps from deadline to deadline up to `until_ms`, and returns what was due when.
    fn run(hellos: &mut Hellos, until_ms: u64) -> Vec<(u64, Due)> {
        let mut all = Vec::new();
        loop {
            let now = hellos.deadline();
            let ms = now.nanos() / 1_000_000;
            if ms > until_ms {
                return all;
            }
            let due = hellos.step(now);
            assert_ne!(due, Due::Nothing, "a deadline is when something is due");
            all.push((ms, due));
            if due == Due::Lost {
                return all;
            }
        }
    }

    #[test]
    fn a_silent_peer_is_lost_after_the_allowed_misses() {
        let mut hellos = Hellos::new(RULE, at(0));
        assert_eq!(hellos.step(at(4999)), Due::Nothing);
        let expected = [
            (5000, Due::Ask),
            (7000, Due::Missed(1)),
            (10_000, Due::Ask),
            (12_000, Due::Missed(2)),
            (15_000, Due::Ask),
            (17_000, Due::Lost),
        ];
        assert_eq!(run(&mut hellos, 60_000), expected);
    }

    #[test]
    fn an_answer_late_or_in_time_clears_the_misses() {
        let mut hellos = Hellos::new(RULE, at(0));
        run(&mut hellos, 12_000);
        assert_eq!(hellos.misses(), 2);
        assert_eq!(hellos.answered(at(12_500)), None, "the question was given up on");
        assert_eq!((hellos.misses(), hellos.last()), (0, None));
        run(&mut hellos, 15_000);
        let took = Duration::from_millis(3);
        assert_eq!(hellos.answered(at(15_003)), Some(took));
        assert_eq!(hellos.last(), Some((at(15_003), took)));
        assert_eq!(run(&mut hellos, 20_000), [(20_000, Due::Ask)]);
    }

    #[test]
    fn a_timeout_longer_than_the_interval_delays_the_next_hello() {
        let rule = Health { timeout: Some(Duration::from_secs(8)), misses: 2, ..RULE };
        let mut hellos = Hellos::new(rule, at(0));
        let expected =
            [(5000, Due::Ask), (13_000, Due::Missed(1)), (13_000, Due::Ask), (21_000, Due::Lost)];
        assert_eq!(run(&mut hellos, 60_000), expected);
    }

    #[test]
    fn a_changed_rule_holds_from_the_next_hello_on() {
        let mut hellos = Hellos::new(RULE, at(0));
        let faster = Duration::from_secs(1);
        hellos.follow(Health { interval: faster, timeout: Some(faster / 2), misses: 2 });
        let expected =
            [(5000, Due::Ask), (5500, Due::Missed(1)), (6000, Due::Ask), (6500, Due::Lost)];
        assert_eq!(run(&mut hellos, 60_000), expected);
    }

    #[test]
    fn the_time_for_an_answer_runs_only_while_nothing_else_is_left_to_handle() {
        let mut hellos = Hellos::new(RULE, at(0));
        hellos.busy(at(1000), true);
        assert_eq!(hellos.step(at(5000)), Due::Ask);
        hellos.busy(at(5500), false);
        assert_eq!(hellos.deadline(), at(7500));
        hellos.busy(at(7000), true);
        hellos.busy(at(60_000), true);
        assert_eq!(hellos.step(at(60_000)), Due::Nothing);
        hellos.busy(at(90_000), false);
        assert_eq!(hellos.step(at(90_499)), Due::Nothing);
        assert_eq!(hellos.step(at(90_500)), Due::Missed(1));
    }

    #[test]
    fn a_peer_that_trickles_or_floods_still_has_to_answer() {
        let mut hellos = Hellos::new(RULE, at(0));
        assert_eq!(hellos.step(at(5000)), Due::Ask);
        for ms in 5000..7000 {
            hellos.busy(at(ms), ms % 100 == 0);
        }
        assert_eq!(hellos.step(at(7000)), Due::Nothing);
        assert_eq!(hellos.step(at(7020)), Due::Missed(1), "it was busy for 20 ms of the time");

        assert_eq!(hellos.step(at(10_000)), Due::Ask);
        hellos.heard(EXCUSED_BYTES_MAX + 1);
        hellos.busy(at(10_001), true);
        hellos.busy(at(12_000), true);
        assert_eq!(hellos.step(at(12_000)), Due::Missed(2));
    }

    #[test]
    fn retries_of_a_backend_grow_apart_up_to_a_bound() {
        let mut revival = Revival::default();
        revival.set_aside(Duration::ZERO, at(0));
        let waits: Vec<u128> = (0..8).map(|_| revival.wait().as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    }

    #[test]
    fn a_backend_that_soon_fails_again_keeps_its_interval() {
        let mut revival = Revival::default();
        revival.set_aside(Duration::ZERO, at(0));
        revival.wait();
        revival.restored(at(1000));
        revival.set_aside(Duration::ZERO, at(2000));
        assert_eq!(revival.wait().as_millis(), 400);
        revival.restored(at(3000));
        revival.set_aside(Duration::ZERO, at(3000 + 10_001));
        assert_eq!(revival.wait(), RETRY_MIN);
    }

    #[test]
    fn a_request_counts_only_if_nothing_was_answered_while_it_waited() {
        let mut silence = Silence::default();
        let steps = [
            // (sent, given up, last answer, in a row)
            (100, 400, 50, 1),
            (100, 400, 50, 2),
            (300, 600, 50, 3),
            (500, 800, 700, 0),
            (701, 1_001, 700, 1),
            (702, 1_002, 700, 2),
            (1_100, 1_400, 1_050, 1),
            (1_101, 1_401, 1_050, 2),
        ];
        for (since, now, answered, row) in steps {
            assert_eq!(
                silence.unanswered(at(since), at(now), at(answered)),
                row,
                "sent at {since}"
            );
        }
        assert_eq!(silence.in_row(at(1_050)), 2);
        assert_eq!(silence.in_row(at(1_401)), 0, "an answer ends the row");
    }

    #[test]
    fn what_took_long_to_show_is_remembered_for_longer() {
        let patience = Duration::from_secs(30);
        for (later, wait) in [(39_000, 2 * RETRY_MIN), (41_000, RETRY_MIN)] {
            let mut revival = Revival::default();
            revival.set_aside(patience, at(0));
            revival.wait();
            revival.restored(at(0));
            revival.set_aside(patience, at(later));
            assert_eq!(revival.wait(), wait, "set aside again after {later} ms");
        }
    }
}
