//! Orderly endings: a backend's drain, and the balancer's own stop. Owns both state machines; pure.
//! Callers pass in the time and the number of sessions left, and carry out the step that is returned.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::time::Now;

/// How often the number of sessions left is reported.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How long sessions get to end once they are told to.
const CLOSE_TIME: Duration = Duration::from_secs(1);
/// No drain lasts longer, nor does anybody wait longer for the end of what it has closed.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// The next step of a drain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DrainStep {
    Nothing,
    /// Tell the backend's source how many sessions are left.
    Tell,
    /// The deadline has come: end what is left.
    Close,
    /// No session is left, and the backend stays.
    Empty,
    /// Over; the backend leaves.
    Done,
}

/// One backend's drain: reported every second, closed at the deadline, over when no session is left.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Drain {
    pub since: Now,
    /// When the sessions that are left are ended; `None` if they end by themselves.
    pub deadline: Option<Now>,
    /// Sessions that were ended at the deadline.
    pub cut: u64,
    /// Whether no session is left of a backend that stays.
    pub is_empty: bool,
    stays: bool,
    tell: Now,
    closing: Option<Now>,
    close_time: Duration,
}

impl Drain {
    /// A drain whose deadline comes after `lasts`, if ever. A backend that `stays` waits empty to be given
    /// users again.
    pub fn new(now: Now, lasts: Option<Duration>, stays: bool) -> Drain {
        let tell = now.plus(TELL_EVERY);
        let deadline = lasts.map(|lasts| now.plus(lasts));
        Drain {
            since: now,
            deadline,
            cut: 0,
            is_empty: false,
            stays,
            tell,
            closing: None,
            close_time: CLOSE_TIME,
        }
    }

    /// A drain as another process has described it, whose times are held to what can be.
    pub fn inherit(self, now: Now) -> Drain {
        let longest = now.plus(LONGEST);
        Drain {
            since: self.since.min(now),
            deadline: self.deadline.map(|it| it.min(longest)),
            tell: self.tell.min(now.plus(TELL_EVERY)),
            closing: self.closing.map(|it| it.min(longest)),
            close_time: self.close_time.min(LONGEST),
            ..self
        }
    }

    /// Gives the sessions that are left another deadline.
    pub fn set_deadline(&mut self, now: Now, lasts: Option<Duration>) {
        self.deadline = lasts.map(|lasts| now.plus(lasts));
        self.closing = None;
    }

    /// Ends the sessions that are left by then, if not before.
    pub fn not_after(&mut self, deadline: Option<Now>) {
        let earlier = [self.deadline, deadline].into_iter().flatten().min();
        self.deadline = earlier;
    }

    /// How long sessions get to end once they are told to: elsewhere, that is known later.
    pub fn closes_within(&mut self, time: Duration) {
        self.close_time = time;
    }

    /// Whether the backend waits to be given users again when no session is left.
    pub fn stays(&self) -> bool {
        self.stays
    }

    /// How long the remaining sessions still have; `None` if they end by themselves.
    pub fn remaining(&self, now: Now) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.since(now))
    }

    /// The step that is due. `left` is final only when `settled`, that is, once every worker knows of
    /// the drain; until then a session may still begin.
    pub fn step(&mut self, now: Now, left: u64, settled: bool) -> DrainStep {
        if left == 0 && settled {
            let was_empty = std::mem::replace(&mut self.is_empty, self.stays);
            return match (self.stays, was_empty) {
                (false, _) => DrainStep::Done,
                (true, false) => DrainStep::Empty,
                (true, true) => DrainStep::Nothing,
            };
        }
        if self.closing.is_some_and(|until| now < until) {
            return DrainStep::Nothing;
        }
        if self.closing.is_some() && !self.stays {
            return DrainStep::Done;
        }
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            // An order to end them that a worker did not take is given again, and counts once.
            self.cut = self.cut.saturating_add(if self.closing.is_none() { left } else { 0 });
            self.closing = Some(now.plus(self.close_time));
            return DrainStep::Close;
        }
        if now >= self.tell {
            self.tell = now.plus(TELL_EVERY);
            return DrainStep::Tell;
        }
        DrainStep::Nothing
    }
}

/// The next step of the balancer's stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopStep {
    Nothing,
    /// Accept no more users.
    Drain,
    /// Log how many sessions are left and how long they have.
    Tell {
        remaining: Duration,
    },
    /// End what is left.
    Stop,
    /// The control core may return.
    Done,
}

/// The balancer's own stop.
///
/// ```text
/// Serving -- ask --> Draining -- nothing left, deadline or ask --> Stopping -- gone --> Done
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    Serving,
    Draining { until: Now, tell: Now },
    Stopping { until: Now },
}

impl Stop {
    /// A request to stop. A second one means at once.
    pub fn ask(&mut self, now: Now, lasts: Duration) -> StopStep {
        match self {
            Stop::Serving => {
                *self = Stop::Draining { until: now.plus(lasts), tell: now };
                StopStep::Drain
            }
            Stop::Draining { .. } => self.stop(now),
            Stop::Stopping { .. } => StopStep::Nothing,
        }
    }

    /// The step that is due. `left` is final only when `settled`, as in [`Drain::step`].
    pub fn step(&mut self, now: Now, left: u64, settled: bool) -> StopStep {
        let gone = left == 0 && settled;
        match self {
            Stop::Serving => StopStep::Nothing,
            Stop::Draining { until, .. } if gone || now >= *until => self.stop(now),
            Stop::Draining { until, tell } if now >= *tell => {
                *tell = now.plus(TELL_EVERY);
                StopStep::Tell { remaining: until.since(now) }
            }
            Stop::Stopping { until } if gone || now >= *until => StopStep::Done,
            _ => StopStep::Nothing,
        }
    }

    fn stop(&mut self, now: Now) -> StopStep {
        *self = Stop::Stopping { until: now.plus(CLOSE_TIME) };
        StopStep::Stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn a_drain_is_told_of_every_second_and_over_when_nothing_is_left() {
        let mut drain = Drain::new(at(0), Some(Duration::from_secs(10)), false);
        assert_eq!(drain.step(at(999), 3, true), DrainStep::Nothing);
        assert_eq!(drain.step(at(1000), 3, true), DrainStep::Tell);
        assert_eq!(drain.step(at(1001), 3, true), DrainStep::Nothing);
        assert_eq!(drain.step(at(2000), 1, true), DrainStep::Tell);
        assert_eq!(drain.remaining(at(2000)), Some(Duration::from_secs(8)));
        assert_eq!(drain.step(at(2100), 0, true), DrainStep::Done);
    }

    #[test]
    fn a_drain_is_not_over_while_a_worker_may_still_start_a_session() {
        let mut drain = Drain::new(at(0), Some(Duration::from_secs(10)), false);
        assert_eq!(drain.step(at(100), 0, false), DrainStep::Nothing);
        assert_eq!(drain.step(at(200), 0, true), DrainStep::Done);
    }

    #[test]
    fn a_drain_ends_what_is_left_at_its_deadline_and_does_not_wait_for_ever() {
        let mut drain = Drain::new(at(0), Some(Duration::from_millis(500)), false);
        assert_eq!(drain.step(at(500), 2, true), DrainStep::Close);
        assert_eq!(drain.step(at(600), 2, true), DrainStep::Nothing);
        assert_eq!(drain.clone().step(at(700), 0, true), DrainStep::Done);
        assert_eq!(drain.step(at(1500), 2, true), DrainStep::Done);
    }

    #[test]
    fn the_times_of_an_inherited_drain_are_held_to_what_can_be() {
        let drain = Drain::new(at(1000), Some(Duration::from_secs(10)), true);
        assert_eq!(drain.clone().inherit(at(1500)), drain);
        let strange = Drain {
            since: Now::NEVER,
            deadline: Some(Now::NEVER),
            tell: Now::NEVER,
            closing: Some(Now::NEVER),
            close_time: Duration::MAX,
            ..drain
        };
        let now = at(2000);
        let mut held = strange.inherit(now);
        assert_eq!((held.since, held.remaining(now)), (now, Some(LONGEST)));
        assert_eq!(held.step(now.plus(LONGEST), 1, true), DrainStep::Close, "it ends all the same");
        assert_eq!(held.closing, Some(now.plus(LONGEST).plus(LONGEST)));
    }

    #[test]
    fn what_stays_is_empty_once_and_its_sessions_are_ended_until_they_have() {
        let mut drain = Drain::new(at(0), Some(Duration::ZERO), true);
        assert_eq!(drain.step(at(0), 3, false), DrainStep::Close);
        assert_eq!(drain.step(at(500), 1, true), DrainStep::Nothing);
        assert_eq!(drain.step(at(1000), 1, true), DrainStep::Close, "a worker may have missed it");
        assert_eq!(drain.step(at(1001), 0, true), DrainStep::Empty);
        assert_eq!(drain.step(at(1002), 0, true), DrainStep::Nothing);
        assert_eq!((drain.cut, drain.is_empty), (3, true));
    }

    #[test]
    fn a_deadline_can_be_moved_and_taken_away() {
        let second = Some(Duration::from_secs(1));
        let mut drain = Drain::new(at(0), second, true);
        drain.set_deadline(at(900), second);
        assert_eq!(drain.step(at(1899), 2, true), DrainStep::Tell);
        drain.set_deadline(at(1899), None);
        assert_eq!(drain.remaining(at(1899)), None);
        assert_eq!(drain.step(at(86_400_000), 2, true), DrainStep::Tell, "it goes on for a day");
        drain.set_deadline(at(86_400_000), Some(Duration::ZERO));
        assert_eq!(drain.step(at(86_400_000), 2, true), DrainStep::Close);
        assert_eq!(drain.cut, 2);
    }

    #[test]
    fn the_balancer_waits_for_its_sessions_up_to_the_deadline() {
        let lasts = Duration::from_secs(30);
        let mut stop = Stop::Serving;
        assert_eq!(stop.step(at(0), 0, true), StopStep::Nothing);
        assert_eq!(stop.ask(at(0), lasts), StopStep::Drain);
        assert_eq!(stop.step(at(0), 2, false), StopStep::Tell { remaining: lasts });
        assert_eq!(stop.step(at(900), 2, true), StopStep::Nothing);
        assert!(matches!(stop.step(at(1000), 2, true), StopStep::Tell { .. }));
        assert_eq!(stop.step(at(1100), 0, false), StopStep::Nothing);
        assert_eq!(stop.step(at(1200), 0, true), StopStep::Stop);
        assert_eq!(stop.step(at(1300), 0, true), StopStep::Done);

        let mut stop = Stop::Serving;
        stop.ask(at(0), lasts);
        assert_eq!(stop.step(at(30_000), 5, true), StopStep::Stop);
        assert_eq!(stop.step(at(30_500), 5, true), StopStep::Nothing);
        assert_eq!(stop.step(at(31_000), 5, true), StopStep::Done);
    }

    #[test]
    fn asking_twice_means_at_once() {
        let mut stop = Stop::Serving;
        stop.ask(at(0), Duration::from_secs(30));
        assert_eq!(stop.ask(at(100), Duration::from_secs(30)), StopStep::Stop);
        assert_eq!(stop.ask(at(200), Duration::from_secs(30)), StopStep::Nothing);
    }
}
