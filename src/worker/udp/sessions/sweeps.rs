//! Sweeps: orders that concern many sessions, carried out a few places at a time so that a turn
//! stays short. Owns how far each has come.

use std::collections::BTreeSet;

use super::{LOOKS_MAX, Session, Sessions};
use crate::base::time::Now;
use crate::cluster::BackendId;
use crate::session::EndReason;
use crate::worker::books::Books;
use crate::worker::ends::Ends;
use crate::worker::link::Order;

/// Sweeps in progress, at most; with more, those for single backends are completed at once and together.
pub(super) const SWEEPS_MAX: usize = 64;

/// One sweep and the next place it looks at.
pub(super) struct Sweep {
    pub(super) task: Task,
    pub(super) next: u32,
}

/// What a sweep does with each session.
#[derive(Clone, Copy)]
pub(super) enum Task {
    /// Ends it if it is on this backend; `None` ends all.
    End { backend: Option<BackendId>, reason: EndReason },
    /// Ends it if its user came by this door, which has closed.
    EndAtDoor { door: u16 },
    /// Applies an idle time that has become shorter.
    LookAnew,
}

impl Sessions {
    /// Begins to end the sessions on this backend, or all.
    pub(super) fn sweep(&mut self, backend: Option<BackendId>, reason: EndReason) {
        self.sweeps.push_back(Sweep { task: Task::End { backend, reason }, next: 0 });
    }

    /// Begins to end the sessions whose replies have left by this door. One that began again there would
    /// otherwise find the session of a user who goes on sending, and lead its replies nowhere.
    pub fn close_door(&mut self, door: u16) {
        self.sweeps.push_back(Sweep { task: Task::EndAtDoor { door }, next: 0 });
    }

    /// Continues the sweeps, within the bound of a turn unless there are too many.
    pub(super) fn continue_sweeps(&mut self, now: Now, books: &mut Books) {
        if self.sweeps.len() > SWEEPS_MAX {
            self.sweep_together(now, books);
        }
        let mut looks = if self.sweeps.len() > SWEEPS_MAX { u32::MAX } else { LOOKS_MAX };
        while let Some(sweep) = self.sweeps.front_mut() {
            let Sweep { task, next } = *sweep;
            if next >= self.flows.places() {
                self.sweeps.pop_front();
                continue;
            }
            if looks == 0 {
                return;
            }
            looks -= 1;
            sweep.next += 1;
            match task {
                Task::LookAnew => self.flows.look_anew(next),
                Task::End { backend, reason } if self.is_on(next, backend) => {
                    self.end(now, next, reason, books);
                }
                Task::EndAtDoor { door } if self.is_by(next, door) => {
                    self.end(now, next, EndReason::BackendLeft, books);
                }
                Task::End { .. } | Task::EndAtDoor { .. } => {}
            }
        }
    }

    /// Completes the sweeps for single backends and doors in one walk, however many there are.
    fn sweep_together(&mut self, now: Now, books: &mut Books) {
        let (mut ends, mut doors) = (Ends::default(), BTreeSet::new());
        self.sweeps.retain(|sweep| match sweep.task {
            Task::End { backend: Some(backend), reason } => {
                !ends.gather(Order::EndBackend { backend, reason })
            }
            Task::EndAtDoor { door } => {
                doors.insert(door);
                false
            }
            Task::End { backend: None, .. } | Task::LookAnew => true,
        });
        ends.sort();
        for place in 0..self.flows.places() {
            let flow = self.flows.get(place);
            let Some(Session { entry, door, .. }) = flow.map(|flow| &flow.state) else { continue };
            let by_door = || doors.contains(door).then_some(EndReason::BackendLeft);
            if let Some(reason) = ends.reason_for(entry).or_else(by_door) {
                self.end(now, place, reason, books);
            }
        }
    }

    fn is_by(&self, place: u32, door: u16) -> bool {
        self.flows.get(place).is_some_and(|flow| flow.state.door == door)
    }

    /// Whether a session runs at `place` and, if a backend is named, on that.
    fn is_on(&self, place: u32, backend: Option<BackendId>) -> bool {
        self.flows.get(place).is_some_and(|flow| {
            let on = flow.state.entry.choice().map(|choice| choice.backend);
            backend.is_none() || backend == on
        })
    }
}
