//! A worker whose users follow the others into another process one by one, or to which such users come, while it goes
//! on. Owns when the loop looks for either; what that means to a protocol is its driver's. A worker that was never left
//! looks only when it is woken anyway.

use super::driver::Turn;
use super::shell::Shell;
use crate::base::time::Now;
use crate::estate::Estate;

impl Shell {
    /// Lets those go who are in the middle of nothing any more. Called in each turn of a worker that was left, before
    /// the drivers are looked after.
    pub(super) fn let_depart(&mut self, now: Now) {
        if !self.parts.late.is_open() || !self.parts.late.has_room() {
            return;
        }
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        let mut estate = Estate::new(books.worker());
        for post in &mut self.posts {
            post.driver.depart(&mut estate, &mut Turn { now, ring, books });
        }
        if !estate.api.is_empty() {
            self.parts.late.leave(estate);
        }
    }

    /// Takes up those who have come, and tells the drivers whether others may leave.
    pub(super) fn take_late(&mut self, now: Now) {
        let has_left = self.has_left;
        let may_leave = self.parts.late.is_open();
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        for mut estate in self.parts.late.take_coming() {
            for post in &mut self.posts {
                post.driver.join(&mut estate, &mut Turn { now, ring, books });
            }
        }
        if has_left && !may_leave {
            let posts = self.posts.iter_mut();
            posts.for_each(|post| post.driver.may_depart(false, &mut Turn { now, ring, books }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::worker::shell::tests::Stage;

    #[test]
    fn a_worker_asks_its_drivers_who_leaves_and_gives_them_those_who_come() {
        let mut stage = Stage::new();
        let late = Arc::clone(&stage.control.late);
        stage.shell.let_depart(Now::default());
        assert_eq!(stage.said(), ["", ""], "nobody may leave");
        late.set_open(true);
        stage.shell.let_depart(Now::default());
        assert_eq!(stage.said(), ["depart", "depart"]);
        assert!(late.take_leaving().is_empty(), "nobody does");
        stage.shell.take_late(Now::default());
        assert_eq!(stage.said(), ["", ""]);
        late.give(Estate::new(5)).unwrap();
        stage.shell.take_late(Now::default());
        assert_eq!(stage.said(), ["join those of 5", "join those of 5"]);
        stage.shell.has_left = true;
        late.set_open(false);
        stage.shell.take_late(Now::default());
        assert_eq!(stage.said(), ["nobody may depart", "nobody may depart"]);
    }
}
