//! Orderly endings: a backend's drain, and the balancer's own stop. Owns both state machines; pure.
//! Callers pass in the time and the number of sessions left, and carry out the step that is returned.

use std::time::Duration;

use crate::base::time::Now;

/// How often the number of sessions left is reported.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How long sessions get to end once they are told to.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// The next step of a drain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DrainStep {
    Nothing,
    /// Tell the backend's source how many sessions are left.
    Tell,
    /// The deadline has come: end what is left.
    Close,
    /// Over; the backend leaves.
    Done,
}

/// News of a drain for the backend's source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The number of sessions left.
    Left(u64),
    /// The backend has left.
    Over,
}

/// One backend's drain: reported every second, closed at the deadline, over when no session is left.
#[derive(Clone, Debug)]
pub struct Drain {
    deadline: Now,
    tell: Now,
    closing: Option<Now>,
}

impl Drain {
    pub fn new(now: Now, lasts: Duration) -> Drain {
        Drain { deadline: now.plus(lasts), tell: now.plus(TELL_EVERY), closing: None }
    }

    /// How long the remaining sessions still have.
    pub fn remaining(&self, now: Now) -> Duration {
        self.deadline.since(now)
    }

    /// The step that is due. `left` is final only when `settled`, that is, once every worker knows of
    /// the drain; until then a session may still begin.
    pub fn step(&mut self, now: Now, left: u64, settled: bool) -> DrainStep {
        if left == 0 && settled || self.closing.is_some_and(|until| now >= until) {
            return DrainStep::Done;
        }
        if self.closing.is_some() {
            return DrainStep::Nothing;
        }
        if now >= self.deadline {
            self.closing = Some(now.plus(CLOSE_TIME));
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
        let mut drain = Drain::new(at(0), Duration::from_secs(10));
        assert_eq!(drain.step(at(999), 3, true), DrainStep::Nothing);
        assert_eq!(drain.step(at(1000), 3, true), DrainStep::Tell);
        assert_eq!(drain.step(at(1001), 3, true), DrainStep::Nothing);
        assert_eq!(drain.step(at(2000), 1, true), DrainStep::Tell);
        assert_eq!(drain.remaining(at(2000)), Duration::from_secs(8));
        assert_eq!(drain.step(at(2100), 0, true), DrainStep::Done);
    }

    #[test]
    fn a_drain_is_not_over_while_a_worker_may_still_start_a_session() {
        let mut drain = Drain::new(at(0), Duration::from_secs(10));
        assert_eq!(drain.step(at(100), 0, false), DrainStep::Nothing);
        assert_eq!(drain.step(at(200), 0, true), DrainStep::Done);
    }

    #[test]
    fn a_drain_ends_what_is_left_at_its_deadline_and_does_not_wait_for_ever() {
        let mut drain = Drain::new(at(0), Duration::from_millis(500));
        assert_eq!(drain.step(at(500), 2, true), DrainStep::Close);
        assert_eq!(drain.step(at(600), 2, true), DrainStep::Nothing);
        assert_eq!(drain.clone().step(at(700), 0, true), DrainStep::Done);
        assert_eq!(drain.step(at(1500), 2, true), DrainStep::Done);
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
