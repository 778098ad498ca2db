//! Waiting until a backend is empty. Owns what each status means for that; pure, time passed in.

use std::time::Duration;

use crate::cli::door::{called, sessions};
use crate::cli::table::lasting;
use crate::control::status::{BackendState, BackendStatus, Status};

/// How far the last look at a backend may lie before the end of its sessions.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// One backend that is waited for.
pub struct Wait {
    id: String,
    called: String,
    /// Sessions that were left at the last look.
    left: Option<u64>,
    /// When those that are left are ended, on the caller's clock.
    deadline: Option<Duration>,
    cut: u64,
    is_over: bool,
}

impl Wait {
    pub fn new(backend: &BackendStatus) -> Wait {
        let (id, called) = (backend.id.clone(), called(backend));
        Wait { id, called, left: None, deadline: None, cut: 0, is_over: false }
    }

    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Sessions that did not end by themselves.
    pub fn cut(&self) -> u64 {
        self.cut
    }

    /// Looks at the status as of `now`. Returns a line if there is anything new to tell.
    ///
    /// # Errors
    /// If the backend drains no more.
    pub fn look(&mut self, status: &Status, now: Duration) -> Result<Option<String>, String> {
        match status.backends.iter().find(|it| it.id == self.id) {
            None => Ok(Some(self.gone(now))),
            Some(it) if it.state == BackendState::Left => Ok(self.progress(it.sessions_active)),
            Some(it) if it.state != BackendState::Draining => {
                Err(format!("{} was undrained meanwhile: it is {}", self.called, it.state.name()))
            }
            Some(it) => {
                self.cut = it.drain.cut;
                self.deadline = it.drains_in_ms.map(|ms| now + Duration::from_millis(ms));
                match it.drain.empty {
                    true => Ok(Some(self.over())),
                    false => {
                        Ok(self.progress(it.sessions_active).map(|line| match it.drains_in_ms {
                            Some(ms) if it.sessions_active > 0 => {
                                format!("{}, {} for them to end\n", line.trim_end(), lasting(ms))
                            }
                            _ => line,
                        }))
                    }
                }
            }
        }
    }

    /// A line whenever the number of sessions has changed.
    fn progress(&mut self, left: u64) -> Option<String> {
        let is_new = self.left.replace(left) != Some(left);
        is_new.then(|| format!("{}: {} left\n", self.called, sessions(left)))
    }

    /// The backend has left, and its last session has ended: by itself, unless that was at the deadline.
    fn gone(&mut self, now: Duration) -> String {
        let is_late = self.deadline.is_some_and(|deadline| now + BETWEEN_LOOKS >= deadline);
        if is_late && self.cut == 0 {
            self.cut = self.left.unwrap_or(0);
        }
        self.over()
    }

    fn over(&mut self) -> String {
        self.is_over = true;
        match self.cut {
            0 => format!("{} is drained: no session is left\n", self.called),
            cut => format!("{} is drained: {} had to be ended\n", self.called, sessions(cut)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::{backend, status};
    use crate::control::status::DrainStatus;

    fn with(
        state: BackendState,
        sessions_active: u64,
        drain: DrainStatus,
        ms: Option<u64>,
    ) -> Status {
        let backends =
            vec![BackendStatus { state, sessions_active, drain, drains_in_ms: ms, ..backend() }];
        Status { backends, ..status() }
    }

    fn draining(left: u64, ms: Option<u64>) -> Status {
        with(BackendState::Draining, left, DrainStatus::default(), ms)
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_is_left_is_told_when_it_changes_and_the_end_once() {
        let mut wait = Wait::new(&backend());
        let line = wait.look(&draining(2, Some(9_000)), at(0)).unwrap().unwrap();
        assert!(line.ends_with(": 2 sessions left, 9.0 s for them to end\n"), "{line}");
        assert_eq!(wait.look(&draining(2, Some(8_000)), at(1000)), Ok(None));
        let line = wait.look(&draining(1, None), at(2000)).unwrap().unwrap();
        assert!(line.ends_with(": 1 session left\n"), "{line}");
        let empty = DrainStatus { empty: true, ..DrainStatus::default() };
        let over = with(BackendState::Draining, 0, empty, None);
        let line = wait.look(&over, at(3000)).unwrap().unwrap();
        assert!(line.ends_with("is drained: no session is left\n"), "{line}");
        assert_eq!((wait.is_over(), wait.cut()), (true, 0));
    }

    #[test]
    fn sessions_that_were_cut_are_told_also_of_a_backend_that_has_gone() {
        let empty = DrainStatus { empty: true, cut: 3, ..DrainStatus::default() };
        let mut wait = Wait::new(&backend());
        let line = wait.look(&with(BackendState::Draining, 0, empty, Some(0)), at(0));
        assert!(line.unwrap().unwrap().ends_with("3 sessions had to be ended\n"));
        assert_eq!((wait.is_over(), wait.cut()), (true, 3));

        let nobody = Status { backends: Vec::new(), ..status() };
        for (last, cut) in [(900, 0), (300, 2)] {
            let mut wait = Wait::new(&backend());
            wait.look(&draining(2, Some(1000)), at(0)).unwrap();
            let left = with(BackendState::Left, 2, DrainStatus::default(), None);
            assert_eq!(wait.look(&left, at(100)), Ok(None));
            assert!(wait.look(&nobody, at(1000 - last)).unwrap().is_some());
            assert_eq!((wait.is_over(), wait.cut()), (true, cut), "{last} ms before the deadline");
        }
    }

    #[test]
    fn an_undrained_backend_is_waited_for_in_vain() {
        let mut wait = Wait::new(&backend());
        let serving = with(BackendState::Serving, 2, DrainStatus::default(), None);
        let said = wait.look(&serving, at(0)).unwrap_err();
        assert!(said.ends_with("was undrained meanwhile: it is serving"), "{said}");
    }
}
