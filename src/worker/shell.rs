//! The loop of one worker. Owns the ring, and what is the same for every protocol: waiting, time,
//! orders, the snapshot. A completion goes to the driver of its family; the loop decides nothing itself.
//!
//! One turn: submit and wait, reap, look at the snapshot, take changes of doors, handle completions, take
//! orders, look after the drivers whose time has come, and take one step of one long stream. System calls outside the ring are
//! made for such steps, and when a session starts or ends; never for a message.
//!
//! A worker that is to stand still leaves this loop for another (`standstill`), and comes back when it goes on.
//!
//! A worker with nothing to do sleeps at once. Staying awake for 10 us where messages come that close
//! together cost as much CPU as the wake-ups it saved (64 connections, 21 alternating rounds: 1.00), and
//! would show an operator a core that looks full.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use super::books::Books;
use super::brake::{Brake, Request};
use super::driver::{Driver, Turn};
use super::ends::Ends;
use super::family;
use super::late::Late;
use super::link::{DoorChange, Order};
use crate::base::publish::Subscriber;
use crate::base::time::Now;
use crate::cluster::{Protocol, Snapshot};
use crate::ring::pool::Class;
use crate::ring::{Done, REAP_MAX, Ring, Tag, sys};

/// A worker turns at least this often, so that its counter of turns stands still only when it hangs.
const PATIENCE_MAX: Duration = Duration::from_millis(500);
/// The shortest wait.
const PATIENCE_MIN: Duration = Duration::from_micros(50);
/// How long a worker that was told to stop waits for the kernel to let go of the sessions.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

const WAKE: Tag = Tag { kind: family::SHELL | 1, generation: 0, slot: 0 };

/// Families that four bits can tell apart.
const FAMILIES: usize = 16;
/// The post of families without a driver.
const NO_POST: u8 = u8::MAX;

/// What the loop needs besides its drivers.
pub struct WorkerLoop {
    pub books: Books,
    pub snapshots: Subscriber<Snapshot>,
    pub orders: rtrb::Consumer<Order>,
    pub doors: rtrb::Consumer<(Protocol, DoorChange)>,
    pub brake: Arc<Brake>,
    pub late: Arc<Late>,
    /// Written when there is a new snapshot, an order, a change of doors or a request to stand still.
    pub wake: Arc<EventFd>,
}

pub struct Shell {
    pub(super) ring: Ring,
    /// In the order in which a turn looks after them.
    pub(super) posts: Vec<Post>,
    /// Which of them a completion is for, by its family.
    pub(super) by_family: [u8; FAMILIES],
    pub(super) parts: WorkerLoop,
    /// Orders to end the sessions of backends, until all that have come are in.
    ends: Ends,
    course: Course,
    /// Others go on in the place of those who were here.
    pub(super) has_left: bool,
}

/// What the loop is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Course {
    Serving,
    /// It stands still from the end of this turn on.
    Braking,
    /// It ends when there are no more sessions, and at this time at the latest.
    Stopping(Now),
}

/// A driver in the loop.
pub(super) struct Post {
    pub(super) driver: Box<dyn Driver>,
    /// When to look after it even if nothing completes for it. The turn of a single message is short,
    /// and the timers of two idle drivers would be a good part of it.
    due: Now,
    /// Whether this turn looks after it.
    in_turn: bool,
    /// Whether it has asked that the next turn not wait.
    eager: bool,
    /// When one of its operations last completed.
    heard_at: Now,
}

impl Shell {
    /// A worker over a ring of this thread. Each driver comes with the family of its completions, a
    /// different one for each; a turn looks after them in this order.
    pub fn new(ring: Ring, drivers: Vec<(u8, Box<dyn Driver>)>, parts: WorkerLoop) -> Shell {
        let mut shell = Shell {
            ring,
            posts: Vec::with_capacity(drivers.len()),
            by_family: [NO_POST; FAMILIES],
            parts,
            ends: Ends::default(),
            course: Course::Serving,
            has_left: false,
        };
        for (family, driver) in drivers {
            let post = &mut shell.by_family[family::number(family)];
            assert!(family != family::SHELL && *post == NO_POST, "a family is one driver's");
            *post = shell.posts.len() as u8;
            shell.posts.push(Post::new(driver));
        }
        shell
    }

    /// Runs until told to stop. An error is the kernel refusing to go on with the ring.
    pub fn run(mut self) -> io::Result<()> {
        self.ring.watch(WAKE, self.parts.wake.as_fd());
        let mut completions = Vec::with_capacity(REAP_MAX);
        let mut more_wait = false;
        self.look_at_brake();
        loop {
            while self.course == Course::Braking {
                self.course = Course::Serving;
                self.stand_still(&mut completions)?;
                self.look_at_brake();
                self.take_late(Now::read());
            }
            self.ring.enter(Some(self.patience(more_wait)))?;
            more_wait = self.ring.reap(&mut completions);
            let now = Now::read();
            // Before the completions, so that a user who comes after a backend was acknowledged finds
            // it.
            self.adopt();
            self.change_doors(now);
            for done in completions.drain(..) {
                self.complete(now, done);
            }
            self.take_orders(now);
            if self.has_left {
                self.let_depart(now);
            }
            self.housekeep(now);
            if let Course::Stopping(at) = self.course
                && (self.live() == 0 || now >= at)
            {
                return Ok(());
            }
        }
    }

    /// Sessions in any phase, of every protocol.
    fn live(&self) -> usize {
        self.posts.iter().map(|post| post.driver.live()).sum()
    }

    /// How long to wait for a completion. `more_wait`: some are in the queue already.
    fn patience(&self, more_wait: bool) -> Duration {
        if more_wait || self.posts.iter().any(|post| post.eager) {
            return Duration::ZERO;
        }
        let first = self.posts.iter().map(|post| post.due).min().unwrap_or(Now::NEVER);
        // Never zero, so that a deadline that stays due cannot make the loop spin.
        first.since(Now::read()).clamp(PATIENCE_MIN, PATIENCE_MAX)
    }

    fn complete(&mut self, now: Now, done: Done) {
        let post = usize::from(self.by_family[family::number(done.tag.kind)]);
        let Some(post) = self.posts.get_mut(post) else {
            self.woken(done);
            self.take_late(now);
            return self.look_at_brake();
        };
        (post.due, post.heard_at) = (now, now);
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        post.driver.complete(done, &mut Turn { now, ring, books });
    }

    pub(super) fn adopt(&mut self) {
        if let Some(snapshot) = self.parts.snapshots.changed() {
            self.posts.iter_mut().for_each(|post| post.driver.adopt(&snapshot));
            self.parts.books.adopt(snapshot);
            self.all_due();
        }
    }

    /// After the snapshot, in which the service of a new door is.
    pub(super) fn change_doors(&mut self, now: Now) {
        while let Ok((protocol, change)) = self.parts.doors.pop() {
            let post = self.by_family[family::number(family::of(protocol))];
            let Some(post) = self.posts.get_mut(usize::from(post)) else {
                debug_assert!(false, "every protocol has a driver");
                continue;
            };
            post.due = now;
            let (ring, books) = (&mut self.ring, &mut self.parts.books);
            post.driver.change_door(change, &mut Turn { now, ring, books });
        }
    }

    fn take_orders(&mut self, now: Now) {
        while let Ok(order) = self.parts.orders.pop() {
            self.all_due();
            if self.ends.gather(order) {
                continue;
            }
            self.end_backends(now);
            if order == Order::Stop {
                self.course = Course::Stopping(now.plus(STOP_PATIENCE));
            }
            let (ring, books) = (&mut self.ring, &mut self.parts.books);
            for post in &mut self.posts {
                post.driver.order(order, &mut Turn { now, ring, books });
            }
        }
        self.end_backends(now);
    }

    /// Carries out what has been gathered.
    fn end_backends(&mut self, now: Now) {
        if self.ends.is_empty() {
            return;
        }
        self.ends.sort();
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        for post in &mut self.posts {
            post.driver.end_backends(&self.ends, &mut Turn { now, ring, books });
        }
        self.ends.clear();
    }

    /// Looks after the drivers for which something completed, whose time has come, or which wait for
    /// what another may have let go of. Their long streams come last.
    fn housekeep(&mut self, now: Now) {
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        for post in &mut self.posts {
            post.in_turn = post.due <= now || post.eager || post.driver.is_waiting(ring);
            if post.in_turn {
                post.driver.housekeep(&mut Turn { now, ring, books });
            }
        }
        for number in 0..self.posts.len() {
            if self.posts[number].in_turn {
                self.finish(number, now);
            }
        }
        let counters = &self.parts.books.metrics().counters;
        counters.buffers_free.set(self.ring.pool().unused(Class::Small) as u64);
        counters.turns.one();
    }

    /// The end of a turn for a driver.
    fn finish(&mut self, number: usize, now: Now) {
        let heard_at = self.heard_beside(number);
        let (ring, books) = (&mut self.ring, &mut self.parts.books);
        let post = &mut self.posts[number];
        post.driver.step(heard_at, &mut Turn { now, ring, books });
        post.due = post.driver.next_deadline().unwrap_or(Now::NEVER);
        post.eager = post.driver.is_eager();
    }

    /// When something last completed for any other driver.
    fn heard_beside(&self, number: usize) -> Now {
        let others = self.posts.iter().enumerate().filter(|(other, _)| *other != number);
        others.map(|(_, post)| post.heard_at).max().unwrap_or_default()
    }

    pub(super) fn woken(&mut self, done: Done) {
        debug_assert_eq!(done.tag, WAKE, "the shell itself waits for nothing else");
        sys::drain(&self.parts.wake);
        // There is an order, or a datagram from another worker.
        self.all_due();
        if !done.more {
            self.ring.watch(WAKE, self.parts.wake.as_fd());
        }
    }

    /// Looks whether there is a request. One that a worker which stops has no time for is never carried out.
    fn look_at_brake(&mut self) {
        match self.parts.brake.wish() {
            Some(asked) if asked.what() == Request::Announce => self.announce(asked),
            Some(_) if self.course == Course::Serving => self.course = Course::Braking,
            _ => {}
        }
    }

    /// Has this turn look after every driver.
    pub(super) fn all_due(&mut self) {
        self.posts.iter_mut().for_each(|post| post.due = Now::default());
    }
}

impl Post {
    fn new(driver: Box<dyn Driver>) -> Post {
        let never = Now::default();
        Post { driver, due: never, in_turn: false, eager: false, heard_at: never }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;
    use std::os::fd::{OwnedFd, RawFd};
    use std::rc::Rc;

    use super::*;
    use crate::base::publish::Publisher;
    use crate::cluster::{BackendId, DoorId};
    use crate::estate::Estate;
    use crate::ring::RingSettings;
    use crate::session::EndReason;
    use crate::worker::books::tests::{Joined, joined};
    use crate::worker::link::ControlEnd;

    /// A record of what the loop asks of a driver, and the answers to give.
    #[derive(Default)]
    struct Script {
        said: Vec<String>,
        deadline: Option<Now>,
        waiting: bool,
        eager: bool,
    }

    struct Played(Rc<RefCell<Script>>);

    impl Played {
        fn says(&self, what: String) {
            self.0.borrow_mut().said.push(what);
        }
    }

    impl Driver for Played {
        fn change_door(&mut self, change: DoorChange, turn: &mut Turn<'_>) {
            let version = turn.books.snapshot().version;
            self.says(format!("{change:?} at version {version}"));
        }

        fn live(&self) -> usize {
            0
        }

        fn complete(&mut self, done: Done, _: &mut Turn<'_>) {
            self.says(format!("complete {:x}", done.tag.kind));
        }

        fn housekeep(&mut self, _: &mut Turn<'_>) {
            self.says("housekeep".into());
        }

        fn next_deadline(&self) -> Option<Now> {
            self.0.borrow().deadline
        }

        fn is_waiting(&self, _: &Ring) -> bool {
            self.0.borrow().waiting
        }

        fn order(&mut self, order: Order, _: &mut Turn<'_>) {
            self.says(format!("{order:?}"));
        }

        fn adopt(&mut self, snapshot: &Snapshot) {
            self.says(format!("adopt {}", snapshot.version));
        }

        fn step(&mut self, heard_at: Now, _: &mut Turn<'_>) {
            self.says(format!("step {}", heard_at.nanos()));
        }

        fn is_eager(&self) -> bool {
            self.0.borrow().eager
        }

        fn freeze(&mut self, _: &mut Turn<'_>) {
            self.says("freeze".into());
        }

        fn note(&mut self, done: Done, _: &mut Turn<'_>) {
            self.says(format!("note {:x}", done.tag.kind));
        }

        fn is_still(&mut self) -> bool {
            true
        }

        fn describe(&mut self, _: &mut Estate<RawFd>, _: &mut Turn<'_>) {
            self.says("describe".into());
        }

        fn inherit(&mut self, _: &mut Estate<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), String> {
            self.says(format!("inherit at version {}", turn.books.snapshot().version));
            Ok(())
        }

        fn leave(&mut self, _: &mut Turn<'_>) {
            self.says("leave".into());
        }

        fn thaw(&mut self, _: &mut Turn<'_>) {
            self.says("thaw".into());
        }

        fn may_depart(&mut self, may: bool, _: &mut Turn<'_>) {
            self.says(if may { "all may depart" } else { "nobody may depart" }.into());
        }

        fn depart(&mut self, _: &mut Estate<OwnedFd>, _: &mut Turn<'_>) {
            self.says("depart".into());
        }

        fn join(&mut self, estate: &mut Estate<OwnedFd>, _: &mut Turn<'_>) {
            self.says(format!("join those of {}", estate.worker));
        }
    }

    /// A loop with two scripted drivers of neighbouring families.
    pub struct Stage {
        pub shell: Shell,
        scripts: [Rc<RefCell<Script>>; 2],
        pub control: ControlEnd,
        pub publisher: Publisher<Snapshot>,
    }

    const AT: Now = Now::from_nanos(9);

    impl Stage {
        /// Both drivers have had their first turn.
        pub fn new() -> Stage {
            let Joined { books, control, publisher, snapshots, orders, doors, brake, late, wake } =
                joined(Snapshot::default(), 1);
            let scripts = [(); 2].map(|()| Rc::<RefCell<Script>>::default());
            let played = |number: usize| Box::new(Played(Rc::clone(&scripts[number])));
            let drivers: Vec<(u8, Box<dyn Driver>)> =
                vec![(family::TCP, played(0)), (family::UDP, played(1))];
            let ring = Ring::new(RingSettings::with_bytes(1 << 20, false)).unwrap();
            let parts = WorkerLoop { books, snapshots, orders, doors, brake, late, wake };
            let shell = Shell::new(ring, drivers, parts);
            let mut stage = Stage { shell, scripts, control, publisher };
            stage.turn(AT, &[]);
            let told = "adopt 0, housekeep, step 0";
            assert_eq!(stage.said(), [told, told]);
            stage
        }

        /// A turn of the loop in which operations of these kinds complete.
        fn turn(&mut self, now: Now, kinds: &[u8]) {
            self.shell.adopt();
            self.shell.change_doors(now);
            for kind in kinds {
                let tag = Tag { kind: *kind, ..WAKE };
                let done = Done {
                    tag,
                    result: Ok(0),
                    buf: None,
                    accepted: None,
                    more: true,
                    nonempty: false,
                };
                self.shell.complete(now, done);
            }
            self.shell.take_orders(now);
            self.shell.housekeep(now);
        }

        /// What each driver has been asked since the last call.
        pub fn said(&self) -> [String; 2] {
            let take = |script: &Rc<RefCell<Script>>| {
                std::mem::take(&mut script.borrow_mut().said).join(", ")
            };
            self.scripts.each_ref().map(take)
        }
    }

    #[test]
    fn a_completion_goes_to_the_driver_of_its_family_and_both_hear_of_it() {
        let mut stage = Stage::new();
        stage.turn(Now::from_nanos(20), &[0x21, 0x22]);
        assert_eq!(stage.said(), ["", "complete 21, complete 22, housekeep, step 0"]);
        stage.turn(Now::from_nanos(30), &[0x1f]);
        assert_eq!(stage.said(), ["complete 1f, housekeep, step 20", ""]);
        stage.turn(Now::from_nanos(40), &[0x11, 0x21]);
        let [first, second] = stage.said();
        assert_eq!(first, "complete 11, housekeep, step 40");
        assert_eq!(second, "complete 21, housekeep, step 40");
    }

    #[test]
    fn a_driver_is_looked_after_when_its_time_has_come_or_it_waits_for_another() {
        let mut stage = Stage::new();
        stage.scripts[0].borrow_mut().deadline = Some(Now::from_nanos(30));
        stage.turn(Now::from_nanos(20), &[0x11]);
        stage.said();
        stage.turn(Now::from_nanos(29), &[]);
        assert_eq!(stage.said(), ["", ""]);
        stage.scripts[1].borrow_mut().waiting = true;
        stage.scripts[0].borrow_mut().deadline = None;
        stage.turn(Now::from_nanos(30), &[]);
        assert_eq!(stage.said(), ["housekeep, step 0", "housekeep, step 20"]);
        stage.scripts[1].borrow_mut().waiting = false;
        stage.turn(Now::from_nanos(1 << 40), &[]);
        assert_eq!(stage.said(), ["", ""], "nothing is due any more");
    }

    #[test]
    fn an_eager_driver_is_looked_after_until_it_is_not() {
        let mut stage = Stage::new();
        stage.scripts[1].borrow_mut().eager = true;
        stage.turn(AT, &[0x21]);
        stage.said();
        stage.turn(AT, &[]);
        assert_eq!(stage.said(), ["", "housekeep, step 0"]);
        stage.scripts[1].borrow_mut().eager = false;
        stage.turn(AT, &[]);
        stage.said();
        stage.turn(AT, &[]);
        assert_eq!(stage.said(), ["", ""]);
    }

    #[test]
    fn a_change_of_doors_reaches_its_driver_after_the_snapshot_that_it_relies_on() {
        let mut stage = Stage::new();
        stage.publisher.publish(Snapshot { version: 7, ..Snapshot::default() });
        let change = DoorChange::Close { id: DoorId(4) };
        stage.control.doors.push((Protocol::Udp, change)).unwrap();
        stage.turn(AT, &[]);
        let told = "Close { id: DoorId(4) } at version 7, housekeep, step 0";
        let [other, driver] = stage.said();
        assert_eq!(
            (other, driver),
            ("adopt 7, housekeep, step 0".into(), format!("adopt 7, {told}"))
        );
    }

    #[test]
    fn orders_snapshots_and_a_wake_up_reach_every_driver_in_the_same_turn() {
        let mut stage = Stage::new();
        let order = Order::EndSession {
            id: stage.shell.parts.books.no_session(),
            reason: EndReason::Operator,
        };
        stage.control.orders.push(Order::Drain).unwrap();
        stage.turn(AT, &[]);
        let told = "Drain, housekeep, step 0";
        assert_eq!(stage.said(), [told, told]);
        stage.control.orders.push(order).unwrap();
        stage.control.orders.push(Order::Stop).unwrap();
        stage.turn(AT, &[]);
        let told = format!("{order:?}, Stop, housekeep, step 0");
        assert_eq!(stage.said(), [told.clone(), told]);
        assert_eq!(stage.shell.course, Course::Stopping(AT.plus(STOP_PATIENCE)));
        stage.publisher.publish(Snapshot { version: 7, ..Snapshot::default() });
        stage.turn(AT, &[]);
        let told = "adopt 7, housekeep, step 0";
        assert_eq!(stage.said(), [told, told]);
        assert_eq!(stage.shell.parts.books.snapshot().version, 7);
        stage.turn(AT, &[WAKE.kind]);
        assert_eq!(stage.said(), ["housekeep, step 0", "housekeep, step 0"]);
    }

    #[test]
    fn orders_to_end_many_backends_are_carried_out_together_and_before_what_comes_later() {
        let mut stage = Stage::new();
        let end = |number| {
            let (backend, reason) = (BackendId(number), EndReason::BackendLeft);
            Order::EndBackend { backend, reason }
        };
        for order in [end(7), end(3), Order::Drain, end(5)] {
            stage.control.orders.push(order).unwrap();
        }
        stage.turn(AT, &[]);
        let [first, second, third] = [end(3), end(7), end(5)].map(|order| format!("{order:?}"));
        let told = format!("{first}, {second}, Drain, {third}, housekeep, step 0");
        assert_eq!(stage.said(), [told.clone(), told]);
    }

    #[test]
    fn the_loop_sleeps_until_the_first_deadline_of_all_unless_one_is_eager() {
        let mut stage = Stage::new();
        assert_eq!(stage.shell.patience(false), PATIENCE_MAX);
        stage.scripts[1].borrow_mut().deadline = Some(Now::from_nanos(10));
        stage.turn(AT, &[0x21]);
        assert_eq!(stage.shell.patience(false), PATIENCE_MIN);
        assert_eq!(stage.shell.patience(true), Duration::ZERO, "completions wait already");
        stage.scripts[0].borrow_mut().eager = true;
        stage.turn(AT, &[0x11]);
        assert_eq!(stage.shell.patience(false), Duration::ZERO);
    }
}
