//! A worker that stands still: the loop that takes the place of the shell's until it goes on. Owns how it comes to
//! a standstill and the time that this takes; what the requests are is `brake`'s, and what they mean to a protocol
//! its driver's.
//!
//! ```text
//!   moving --blocks withdrawn, nobody let in--> Slowing --nothing under way--> Still --> described, inherited
//!      ^                                        ^  |  ^                          |
//!      |            20 ms: what is under way is +--+  +--------- leave ----------+
//!      |            taken back, every 5 ms                                       |
//!      +------------- all that has completed is in, blocks are posted again -----+
//! ```
//!
//! The shell's own loop knows nothing of it, so that it costs no event anything.

use std::io;
use std::time::Duration;

use super::brake::{Asked, Request};
use super::driver::Turn;
use super::family;
use super::link::Order;
use super::shell::Shell;
use crate::base::time::Now;
use crate::estate::Estate;
use crate::estate::entry::PlacesRecord;
use crate::ring::Done;

/// How long what is under way may go on: sends whose reader reads are over long before.
const ENDS_WITHIN: Duration = Duration::from_millis(20);
/// How often what is still under way is then taken back.
const AGAIN_EVERY: Duration = Duration::from_millis(5);
/// How often a worker that slows down is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// The longest wait of one that is still, so that its counter of turns goes on.
const PATIENCE: Duration = Duration::from_millis(500);

/// How far a worker is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standstill {
    /// Something may still be under way.
    Slowing {
        /// When that is taken back, the next time.
        take_back_at: Now,
        /// It is to go on when nothing is: what it had is described and elsewhere.
        leaving: Option<Asked>,
    },
    Still,
}

/// What the loop does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Nothing,
    TakeBack,
    CarryOut(Asked),
    GoOn(Asked),
}

impl Standstill {
    fn begin(now: Now) -> Standstill {
        Standstill::Slowing { take_back_at: now.plus(ENDS_WITHIN), leaving: None }
    }

    /// The worker has let go of what was described, and the kernel is to as well.
    fn leave(&mut self, now: Now, asked: Asked) {
        *self = Standstill::Slowing { take_back_at: now.plus(AGAIN_EVERY), leaving: Some(asked) };
    }

    /// What was taken over may have been armed for nothing, which is taken back first.
    fn carried_out(&mut self, now: Now, asked: Asked) {
        if asked.what() == Request::Inherit {
            *self = Standstill::Slowing { take_back_at: now.plus(AGAIN_EVERY), leaving: None };
        }
    }

    /// The next step. `is_drained`: every completion has been noted; `is_still`: nothing is under way; `wish`: what
    /// is asked for.
    fn step(
        &mut self,
        now: Now,
        is_drained: bool,
        is_still: impl FnOnce() -> bool,
        wish: Option<Asked>,
    ) -> Step {
        if let Standstill::Slowing { take_back_at, leaving } = self {
            match *leaving {
                _ if !is_drained || !is_still() => {
                    let is_late = now >= *take_back_at;
                    if is_late {
                        *take_back_at = now.plus(AGAIN_EVERY);
                    }
                    return if is_late { Step::TakeBack } else { Step::Nothing };
                }
                Some(asked) => return Step::GoOn(asked),
                None => *self = Standstill::Still,
            }
        }
        match wish {
            Some(asked) if asked.what() == Request::Thaw => Step::GoOn(asked),
            Some(asked) => Step::CarryOut(asked),
            None => Step::Nothing,
        }
    }

    /// How long the loop may wait for a completion.
    fn patience(self) -> Duration {
        if self == Standstill::Still { PATIENCE } else { LOOK_EVERY }
    }
}

impl Shell {
    /// Stands still, and returns when the worker is to go on. Every completion that was reaped has been handled.
    pub(super) fn stand_still(&mut self, completions: &mut Vec<Done>) -> io::Result<()> {
        self.ring.withdraw()?;
        let now = Now::read();
        let mut standstill = Standstill::begin(now);
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        self.posts.iter_mut().for_each(|it| it.driver.freeze(&mut Turn { now, ring, books }));
        loop {
            self.ring.enter(Some(standstill.patience()))?;
            let more_wait = self.ring.reap(completions);
            let now = Now::read();
            for done in completions.drain(..) {
                self.note(now, done);
            }
            let is_still = || self.posts.iter_mut().all(|post| post.driver.is_still());
            let wish = self.parts.brake.wish();
            match standstill.step(now, !more_wait, is_still, wish) {
                Step::Nothing => {}
                Step::TakeBack => {
                    let (ring, books) = (&mut self.ring, &mut self.parts.books);
                    let drivers = self.posts.iter_mut().map(|post| &mut post.driver);
                    drivers.for_each(|it| it.take_back(&mut Turn { now, ring, books }));
                }
                Step::CarryOut(asked) if asked.what() == Request::Leave => {
                    self.leave(now);
                    standstill.leave(now, asked);
                }
                Step::CarryOut(asked) => {
                    self.carry_out(now, asked);
                    standstill.carried_out(now, asked);
                }
                // If there is more to reap, the next turn tries again.
                Step::GoOn(_) if !self.ring.restock()? => {}
                Step::GoOn(asked) => {
                    self.go_on(now, asked);
                    return Ok(());
                }
            }
            self.parts.books.metrics().counters.turns.one();
        }
    }

    fn note(&mut self, now: Now, done: Done) {
        let post = usize::from(self.by_family[family::number(done.tag.kind)]);
        let Some(post) = self.posts.get_mut(post) else { return self.woken(done) };
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        post.driver.note(done, &mut Turn { now, ring, books });
    }

    /// Carries out what can be done while standing still.
    fn carry_out(&mut self, now: Now, asked: Asked) {
        match asked.what() {
            Request::Describe => self.describe(now),
            Request::Inherit => self.inherit(now),
            Request::Announce => return self.announce(asked),
            Request::Expect => self.expect(now),
            Request::Freeze | Request::Thaw | Request::Leave => {}
        }
        self.parts.brake.carried_out(asked);
    }

    /// Says what the next sessions live on.
    pub(super) fn announce(&mut self, asked: Asked) {
        let is_first = self.parts.brake.is_from_first();
        let announced = self.posts.iter_mut().map(|post| post.driver.announce(is_first));
        let announced = announced.flatten().collect();
        self.parts.brake.announce(announced);
        self.parts.brake.carried_out(asked);
    }

    fn expect(&mut self, now: Now) {
        let Some(mut ahead) = self.parts.brake.take_expected() else { return };
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        for post in &mut self.posts {
            let expected = post.driver.expect(&mut ahead, &mut Turn { now, ring, books });
            if let Err(why) = expected {
                return self.parts.brake.refuse(why);
            }
        }
    }

    fn describe(&mut self, now: Now) {
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        let mut estate = Estate::new(books.worker());
        estate.places.push(&books.describe_places());
        for post in &mut self.posts {
            post.driver.describe(&mut estate, &mut Turn { now, ring, books });
            post.driver.describe_doors(&mut estate.doors);
        }
        self.parts.brake.leave(estate);
    }

    fn inherit(&mut self, now: Now) {
        let Some(mut estate) = self.parts.brake.take_given() else { return };
        // Its services and backends are in the newest.
        self.adopt();
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        let places = estate.places.records::<PlacesRecord>().next();
        if let Some(places) = places.filter(|_| estate.worker == books.worker()) {
            books.succeed(places);
        }
        for post in &mut self.posts {
            let inherited = post.driver.inherit(&mut estate, &mut Turn { now, ring, books });
            if let Err(why) = inherited {
                return self.parts.brake.refuse(why);
            }
        }
    }

    fn leave(&mut self, now: Now) {
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        self.posts.iter_mut().for_each(|it| it.driver.leave(&mut Turn { now, ring, books }));
    }

    /// Has everybody move again who is still here.
    fn go_on(&mut self, now: Now, asked: Asked) {
        self.adopt();
        self.parts.books.settle();
        // Before the sessions, whose replies leave by a door.
        self.change_doors(now);
        let has_left = asked.what() == Request::Leave;
        self.has_left |= has_left;
        let may_depart = self.parts.late.is_open();
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        for post in &mut self.posts {
            post.driver.thaw(&mut Turn { now, ring, books });
            if has_left {
                post.driver.may_depart(may_depart, &mut Turn { now, ring, books });
                post.driver.order(Order::Drain, &mut Turn { now, ring, books });
            }
        }
        self.all_due();
        self.parts.brake.carried_out(asked);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;
    use crate::cluster::Snapshot;
    use crate::worker::brake::Brake;
    use crate::worker::shell::tests::Stage;

    const AT: Now = Now::from_nanos(1_000_000_000);

    /// What the drivers hear while the control core makes these requests, one after another.
    fn heard(stage: &mut Stage, requests: &'static [Request]) -> String {
        let brake = Arc::clone(&stage.control.brake);
        let control = thread::spawn(move || {
            for what in requests {
                match what {
                    Request::Inherit => brake.give(Estate::new(9)),
                    what => brake.ask(*what),
                }
                while !brake.is_done() {
                    thread::sleep(Duration::from_millis(1));
                }
                if *what == Request::Describe {
                    assert!(brake.take_estate().is_some());
                }
            }
        });
        stage.shell.stand_still(&mut Vec::new()).unwrap();
        control.join().unwrap();
        let [first, second] = stage.said();
        assert_eq!(first, second);
        first
    }

    #[test]
    fn requests_are_carried_out_in_turn_and_a_worker_that_has_left_lets_nobody_in() {
        let mut stage = Stage::new();
        stage.publisher.publish(Snapshot { version: 7, ..Snapshot::default() });
        stage.control.orders.push(Order::Drain).unwrap();
        let said = heard(&mut stage, &[Request::Freeze, Request::Describe, Request::Thaw]);
        assert_eq!(said, "freeze, describe, adopt 7, thaw", "orders wait");
        stage.publisher.publish(Snapshot { version: 8, ..Snapshot::default() });
        stage.control.late.set_open(true);
        let said = heard(&mut stage, &[Request::Inherit, Request::Freeze, Request::Leave]);
        let left = "leave, thaw, all may depart, Drain";
        assert_eq!(said, format!("freeze, adopt 8, inherit at version 8, {left}"));
    }

    fn asked(what: Request) -> Asked {
        let brake = Brake::default();
        brake.ask(what);
        brake.wish().unwrap()
    }

    #[test]
    fn what_is_under_way_has_its_time_and_is_then_taken_back_until_it_is_over() {
        let mut standstill = Standstill::begin(AT);
        let wish = asked(Request::Freeze);
        let freeze = Some(wish);
        assert_eq!(standstill.step(AT, true, || false, freeze), Step::Nothing);
        let late = AT.plus(ENDS_WITHIN);
        assert_eq!(standstill.step(late, true, || false, freeze), Step::TakeBack);
        assert_eq!(standstill.step(late, true, || false, freeze), Step::Nothing);
        let later = late.plus(AGAIN_EVERY);
        assert_eq!(standstill.step(later, true, || false, freeze), Step::TakeBack, "again");
        assert_eq!(standstill.patience(), LOOK_EVERY);
        assert_eq!(standstill.step(later, true, || true, freeze), Step::CarryOut(wish));
        assert_eq!(standstill.step(later, true, || true, None), Step::Nothing);
        assert_eq!(standstill.patience(), PATIENCE);
    }

    #[test]
    fn nothing_is_still_before_what_has_completed_is_in_and_nothing_goes_on_before_that() {
        for what in Request::ALL {
            let mut standstill = Standstill::begin(AT);
            let wish = asked(what);
            assert_eq!(standstill.step(AT, false, || true, Some(wish)), Step::Nothing);
            assert_eq!(standstill.step(AT, true, || false, Some(wish)), Step::Nothing);
            let step = standstill.step(AT, true, || true, Some(wish));
            let goes_on = what == Request::Thaw;
            assert_eq!(step, if goes_on { Step::GoOn(wish) } else { Step::CarryOut(wish) });
        }
    }

    #[test]
    fn who_leaves_goes_on_when_the_kernel_has_let_go_and_not_before() {
        let mut standstill = Standstill::begin(AT);
        let leave = asked(Request::Leave);
        assert_eq!(standstill.step(AT, true, || true, Some(leave)), Step::CarryOut(leave));
        standstill.leave(AT, leave);
        assert_eq!(standstill.step(AT, true, || false, Some(leave)), Step::Nothing);
        let later = AT.plus(AGAIN_EVERY);
        assert_eq!(standstill.step(later, true, || false, None), Step::TakeBack);
        assert_eq!(standstill.step(later, true, || true, None), Step::GoOn(leave));
    }
}
