//! Splice steps that wait for their time. Owns the worker's pipes and their loans; what a step did is told
//! to the sessions like the completion of an operation.
//!
//! A stream whose sender is not quite as fast as the step is not polled for at once: it waits a moment
//! together with the others, so that the next step finds more to move than a segment or two.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::base::time::Now;
use crate::proxy::{Side, Spliced};
use crate::ring::pipe::{PIPES_MAX, Pipe, Pipes};
use crate::worker::slots::Key;

/// The moment of `When::Soon`: at 2 GB/s through eight flows each finds 100 KiB after it, and half of
/// that is too little for what a step costs. One stream both ways took 1.1 to 1.2 times as much CPU with
/// 200 us (7 and 15 rounds in turns); of four that was seen in 7 rounds, and not in 15.
const MOMENT: Duration = Duration::from_micros(400);
/// The while of `When::Later`: rare enough to cost nothing, and short for who reads so slowly.
const WHILE: Duration = Duration::from_millis(20);
/// Bytes that one step moves at most.
const STEP_BYTES: usize = 512 * 1024;
/// The same while messages pass through the worker, each of which waits for the step being taken. Smaller
/// steps cost streams 6 to 20 % more CPU.
const STEP_BYTES_IN_COMPANY: usize = 256 * 1024;
/// How long after the last message a worker expects another.
const COMPANY: Duration = Duration::from_millis(10);

/// A step: the session and the side that is read from.
pub type Step = (Key, Side);

/// Steps that wait for the same moment, set by the first of them.
struct Batch {
    steps: Vec<Step>,
    at: Option<Now>,
}

pub struct Splices {
    pipes: Pipes,
    /// Pipes on loan; a few, so a list.
    lent: Vec<(Step, Pipe)>,
    next_turn: Vec<Step>,
    soon: Batch,
    later: Batch,
    /// The longest waiting first.
    due: VecDeque<Step>,
    /// Until when messages are expected.
    company_until: Now,
}

impl Splices {
    /// No pipe is made before it is needed; the lists never grow, since no step is without a pipe, but
    /// where the sessions of more workers were taken up.
    pub fn new() -> Splices {
        Splices {
            pipes: Pipes::new(),
            lent: Vec::with_capacity(PIPES_MAX),
            next_turn: Vec::with_capacity(PIPES_MAX),
            soon: Batch::new(),
            later: Batch::new(),
            due: VecDeque::with_capacity(PIPES_MAX),
            company_until: Now::default(),
        }
    }

    /// A message of any protocol passed through the worker. The latest counts, whatever the order in which
    /// they are told.
    pub fn note_message(&mut self, at: Now) {
        self.company_until = self.company_until.max(at.plus(COMPANY));
    }

    /// Makes sure that the flow has a pipe; false when none is left. `fresh` is called once per loan, to
    /// prepare the sockets.
    pub fn lend(&mut self, step: Step, fresh: impl FnOnce() -> bool) -> bool {
        if self.lent.iter().any(|(to, _)| *to == step) {
            return true;
        }
        let pipe = if fresh() { self.pipes.lend() } else { None };
        self.lent.extend(pipe.map(|pipe| (step, pipe)));
        self.lent.iter().any(|(to, _)| *to == step)
    }

    /// Takes the flow's pipe back, if it has one.
    pub fn end(&mut self, step: Step) {
        if let Some(at) = self.lent.iter().position(|(to, _)| *to == step) {
            self.pipes.give_back(self.lent.swap_remove(at).1);
        }
    }

    /// The pipe of a flow that has one.
    pub fn pipe(&self, step: Step) -> Option<&Pipe> {
        self.lent.iter().find(|(to, _)| *to == step).map(|(_, pipe)| pipe)
    }

    /// A flow comes with a pipe that was made elsewhere.
    pub fn take_up(&mut self, step: Step, pipe: Pipe) {
        self.pipes.take_up();
        self.lent.push((step, pipe));
    }

    pub fn in_next_turn(&mut self, step: Step) {
        self.next_turn.push(step);
    }

    pub fn soon(&mut self, step: Step, now: Now) {
        self.soon.push(step, now.plus(MOMENT));
    }

    pub fn later(&mut self, step: Step, now: Now) {
        self.later.push(step, now.plus(WHILE));
    }

    /// Forgets a step that has not begun; false when it does not wait here.
    pub fn forget(&mut self, step: Step) -> bool {
        for list in [&mut self.next_turn, &mut self.soon.steps, &mut self.later.steps] {
            if let Some(at) = list.iter().position(|waiting| *waiting == step) {
                list.swap_remove(at);
                return true;
            }
        }
        let at = self.due.iter().position(|waiting| *waiting == step);
        at.and_then(|at| self.due.remove(at)).is_some()
    }

    /// Whether a step waits only for the next turn.
    pub fn is_eager(&self) -> bool {
        !self.next_turn.is_empty() || !self.due.is_empty()
    }

    pub fn next_deadline(&self) -> Option<Now> {
        [self.soon.at, self.later.at].into_iter().flatten().min()
    }

    /// Makes the steps due whose time has come; [`Splices::pop_due`] hands them out.
    pub fn turn(&mut self, now: Now) {
        self.due.extend(self.next_turn.drain(..));
        for batch in [&mut self.soon, &mut self.later] {
            if batch.at.is_some_and(|at| now >= at) {
                self.due.extend(batch.steps.drain(..));
                batch.at = None;
            }
        }
    }

    pub fn pop_due(&mut self) -> Option<Step> {
        self.due.pop_front()
    }

    /// Takes a step: how many bytes reached the sink, how many are still in the pipe, and why.
    pub fn step(
        &mut self,
        now: Now,
        step: Step,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
    ) -> (u64, usize, Spliced) {
        let bytes_max = self.bytes_max(now);
        let Some((_, pipe)) = self.lent.iter_mut().find(|(to, _)| *to == step) else {
            return (0, 0, Spliced::Unavailable);
        };
        let (moved, how) = pipe.step(source, sink, bytes_max);
        (moved as u64, pipe.held(), Spliced::Step(how))
    }

    /// Bytes that a step taken now moves at most.
    pub fn bytes_max(&self, now: Now) -> usize {
        if now < self.company_until { STEP_BYTES_IN_COMPANY } else { STEP_BYTES }
    }
}

impl Batch {
    fn new() -> Batch {
        Batch { steps: Vec::with_capacity(PIPES_MAX), at: None }
    }

    fn push(&mut self, step: Step, at: Now) {
        self.at.get_or_insert(at);
        self.steps.push(step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_nanos(1_000_000_000);

    fn step(place: u32) -> Step {
        (Key { place, generation: 0 }, Side::Client)
    }

    #[test]
    fn steps_come_in_turn_and_keep_the_worker_turning_until_the_last() {
        let mut splices = Splices::new();
        (0..3).for_each(|place| splices.in_next_turn(step(place)));
        splices.turn(START);
        assert_eq!(splices.pop_due(), Some(step(0)));
        splices.in_next_turn(step(0));
        splices.turn(START);
        for place in [1, 2, 0] {
            assert!(splices.is_eager());
            assert_eq!(splices.pop_due(), Some(step(place)));
        }
        assert!(!splices.is_eager());
    }

    #[test]
    fn a_step_waits_a_moment_together_with_the_others() {
        let mut splices = Splices::new();
        splices.soon(step(0), START);
        splices.soon(step(1), START.plus(MOMENT / 2));
        splices.turn(START.plus(MOMENT / 2));
        assert_eq!(splices.pop_due(), None);
        splices.turn(START.plus(MOMENT));
        assert_eq!([splices.pop_due(), splices.pop_due()], [Some(step(0)), Some(step(1))]);
    }

    #[test]
    fn steps_are_smaller_while_messages_pass() {
        let mut splices = Splices::new();
        assert_eq!(splices.bytes_max(START), STEP_BYTES);
        splices.note_message(START);
        assert_eq!(splices.bytes_max(START.plus(COMPANY / 2)), STEP_BYTES_IN_COMPANY);
        assert_eq!(splices.bytes_max(START.plus(COMPANY)), STEP_BYTES);
        splices.note_message(START.plus(COMPANY));
        splices.note_message(START);
        assert_eq!(
            splices.bytes_max(START.plus(COMPANY)),
            STEP_BYTES_IN_COMPANY,
            "the latest counts"
        );
    }

    #[test]
    fn a_step_that_is_forgotten_does_not_come() {
        let mut splices = Splices::new();
        (0..3).for_each(|place| splices.in_next_turn(step(place)));
        assert!(splices.forget(step(2)));
        splices.turn(START);
        assert!(splices.forget(step(0)));
        assert!(!splices.forget(step(0)), "once");
        assert_eq!(splices.pop_due(), Some(step(1)));
        assert_eq!(splices.pop_due(), None);
    }
}
