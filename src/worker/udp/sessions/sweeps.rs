//! Orders about many UDP sessions, carried out a few places each turn so that a turn stays short. Owns
//! how far each has come.

use super::{LOOKS_MAX, Sessions};
use crate::base::time::Now;
use crate::cluster::BackendId;
use crate::session::EndReason;
use crate::worker::books::Books;

/// Orders about many sessions that are carried out bit by bit; with more, the first is hurried.
pub(super) const SWEEPS_MAX: usize = 64;

/// An order about many sessions, carried out a few places each turn.
pub(super) struct Sweep {
    pub(super) task: Task,
    pub(super) next: u32,
}

/// What is done to each of them.
#[derive(Clone, Copy)]
pub(super) enum Task {
    /// Ends those on this backend, or all.
    End { backend: Option<BackendId>, reason: EndReason },
    /// Looks at them by an idle time that has become shorter.
    LookAnew,
}

impl Sessions {
    pub(super) fn sweep(&mut self, backend: Option<BackendId>, reason: EndReason) {
        self.sweeps.push_back(Sweep { task: Task::End { backend, reason }, next: 0 });
    }

    /// Carries the orders about many sessions on; the first at once to its end if too many wait.
    pub(super) fn go_on_sweeping(&mut self, now: Now, books: &mut Books) {
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
                Task::End { .. } => {}
            }
        }
    }

    /// Whether a session runs at `place`, on this backend if one is named.
    fn is_on(&self, place: u32, backend: Option<BackendId>) -> bool {
        self.flows.get(place).is_some_and(|flow| {
            let on = flow.state.entry.choice().map(|choice| choice.backend);
            backend.is_none() || backend == on
        })
    }
}
