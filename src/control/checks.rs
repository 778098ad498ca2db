//! When backends are checked, and what the outcomes mean. Owns the times of all checks, how many run at
//! once and of which service, and whether each backend passes. Pure: what a check does on the network is
//! `checker`'s, and what follows from a verdict is the hub's and the registry's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::time::Now;
use crate::base::wheel::Wheel;
use crate::cluster::{BackendId, ServiceId};

/// Checks that run at once, of all services together. Beyond that they wait for their turn.
///
/// A service runs no more of them than it leaves free, so one whose backends all time out takes half of
/// the places, two such services take two thirds, and there is a free place for another service at once as
/// long as fewer than 255 are that slow.
pub const AT_ONCE: usize = 256;

/// How often a backend is checked, and how many outcomes in a row count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    pub interval: Duration,
    /// Checks in a row that a failing backend has to pass.
    pub rise: u32,
    /// Checks in a row after which a passing backend that failed them all is failing.
    pub fall: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Verdict {
    /// New: the first outcome decides alone.
    #[default]
    Unproven,
    Passing,
    Failing,
}

/// A backend that is checked: `id`, which is counted in `slot` and serves `service`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Due {
    pub slot: u16,
    pub id: BackendId,
    pub service: ServiceId,
}

/// The checks of all backends that have one, by the slot in which a backend is counted.
pub struct Checks {
    places: Vec<Option<Check>>,
    due: Wheel,
    turns: Turns,
}

struct Check {
    id: BackendId,
    service: ServiceId,
    rule: Rule,
    verdict: Verdict,
    /// Outcomes in a row that speak against the verdict.
    contrary: u32,
    /// How long after its first check the second begins; `None` once the first has begun.
    offset: Option<Duration>,
    /// When the next check begins, once one has begun.
    next: Now,
    stage: Stage,
}

/// What a check waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its time, which the wheel knows.
    Planned,
    /// A free place, under this number.
    Waiting(u64),
    /// Its end.
    Running,
}

impl Checks {
    pub fn new(now: Now) -> Checks {
        Checks { places: Vec::new(), due: Wheel::new(now), turns: Turns::default() }
    }

    /// Checks a backend from now on: at once, again after `offset`, and from there every interval. Offsets
    /// that differ keep the checks of backends apart that were added together. `verdict` is what holds until
    /// outcomes say otherwise.
    pub fn add(&mut self, due: Due, rule: Rule, verdict: Verdict, offset: Duration, now: Now) {
        let place = usize::from(due.slot);
        if self.places.len() <= place {
            self.places.resize_with(place + 1, || None);
        }
        self.places[place] = Some(Check {
            id: due.id,
            service: due.service,
            rule,
            verdict,
            contrary: 0,
            offset: Some(offset),
            next: now,
            stage: Stage::Planned,
        });
        self.due.schedule(place as u32, now);
    }

    /// How a backend's checks stand: the verdict, the outcomes in a row that speak against it, and when the
    /// next check begins. One that runs or waits for a free place begins at once.
    pub fn standing(&self, due: Due) -> Option<(Verdict, u32, Now)> {
        let check = self.places.get(usize::from(due.slot))?.as_ref()?;
        let next = if check.stage == Stage::Planned { check.next } else { Now::default() };
        (check.id == due.id).then_some((check.verdict, check.contrary, next))
    }

    /// Goes on with the checks of a backend as somebody else has left them; the next one begins within an
    /// interval.
    pub fn go_on(&mut self, due: Due, rule: Rule, standing: (Verdict, u32, Now), now: Now) {
        let (verdict, contrary, next) = standing;
        self.add(due, rule, verdict, rule.interval, now);
        let Some(check) = self.get(due) else { return };
        (check.contrary, check.offset) = (contrary.min(rule.rise.max(rule.fall)), None);
        check.next = next.max(now).min(now.plus(rule.interval));
        let next = check.next;
        self.due.schedule(u32::from(due.slot), next);
    }

    /// Checks the backend no more. The outcome of a check that runs is ignored when it comes.
    pub fn remove(&mut self, due: Due) {
        let Some(check) = self.get(due) else { return };
        if let Stage::Waiting(number) = check.stage {
            self.turns.give_up(due.service, number);
        }
        self.places[usize::from(due.slot)] = None;
        self.due.cancel(u32::from(due.slot));
    }

    /// A backend goes by another rule from now on.
    pub fn follow(&mut self, due: Due, rule: Rule, now: Now) {
        let Some(check) = self.get(due) else { return };
        check.rule = rule;
        // One that waits for an hour need not see it out.
        check.next = check.next.min(now.plus(rule.interval));
        let (next, stage) = (check.next, check.stage);
        if stage == Stage::Planned {
            self.due.schedule(u32::from(due.slot), next);
        }
    }

    pub fn verdict(&self, due: Due) -> Option<Verdict> {
        let check = self.places.get(usize::from(due.slot))?.as_ref()?;
        (check.id == due.id).then_some(check.verdict)
    }

    /// When [`Checks::begin`] has something to do.
    pub fn next_deadline(&self) -> Option<Now> {
        self.due.next_deadline()
    }

    /// The next check that is to begin, if one is due and there is room. To be called until there is none,
    /// and again after every [`Checks::ended`].
    pub fn begin(&mut self, now: Now) -> Option<Due> {
        while let Some(place) = self.due.pop(now) {
            if let Some(check) = self.places.get_mut(place as usize).and_then(Option::as_mut) {
                let (id, service) = (check.id, check.service);
                let number = self.turns.wait(Due { slot: place as u16, id, service });
                check.stage = Stage::Waiting(number);
            }
        }
        let due = self.turns.begin()?;
        let check = self.get(due).expect("whoever is checked no more has given up its turn");
        check.stage = Stage::Running;
        check.next = match check.offset.take() {
            Some(offset) => now.plus(offset),
            None => check.next.plus(check.rule.interval).max(now),
        };
        Some(due)
    }

    /// A check has ended. The new verdict, if it has changed.
    pub fn ended(&mut self, due: Due, passed: bool, now: Now) -> Option<Verdict> {
        self.again(due, now)?.judge(passed)
    }

    /// A check has come to nothing: it says neither this nor that, and the next one follows in its time.
    pub fn came_to_nothing(&mut self, due: Due, now: Now) {
        self.again(due, now);
    }

    /// Plans the next check of a backend, one of whose checks is over.
    fn again(&mut self, due: Due, now: Now) -> Option<&mut Check> {
        self.turns.ended(due.service);
        let check = self.get(due)?;
        check.stage = Stage::Planned;
        let next = check.next.max(now);
        self.due.schedule(u32::from(due.slot), next);
        self.get(due)
    }

    fn get(&mut self, due: Due) -> Option<&mut Check> {
        let check = self.places.get_mut(usize::from(due.slot))?.as_mut()?;
        (check.id == due.id).then_some(check)
    }
}

/// Who runs and who waits, service by service.
#[derive(Default)]
struct Turns {
    services: BTreeMap<ServiceId, Queue>,
    /// Every service in which a check waits: first those that run the fewest, then those whose check has
    /// waited the longest.
    order: BTreeSet<(usize, u64, ServiceId)>,
    running: usize,
    /// Numbers given out; an earlier one has waited longer.
    numbers: u64,
}

/// The checks of one service.
#[derive(Default)]
struct Queue {
    waiting: BTreeMap<u64, Due>,
    running: usize,
}

impl Queue {
    fn rank(&self, service: ServiceId) -> Option<(usize, u64, ServiceId)> {
        let (number, _) = self.waiting.first_key_value()?;
        Some((self.running, *number, service))
    }
}

impl Turns {
    /// Queues a check behind those of its service, and gives it its number there.
    fn wait(&mut self, due: Due) -> u64 {
        let number = self.numbers;
        self.numbers += 1;
        self.change(due.service, |queue| queue.waiting.insert(number, due));
        number
    }

    fn give_up(&mut self, service: ServiceId, number: u64) {
        self.change(service, |queue| queue.waiting.remove(&number));
    }

    /// The check whose turn it is, if there is room for it.
    fn begin(&mut self) -> Option<Due> {
        let (running, number, service) = *self.order.first()?;
        // Whoever comes behind it runs as many or more.
        if running >= AT_ONCE - self.running {
            return None;
        }
        self.running += 1;
        self.change(service, |queue| {
            queue.running += 1;
            queue.waiting.remove(&number)
        })
    }

    fn ended(&mut self, service: ServiceId) {
        self.running -= 1;
        self.change(service, |queue| queue.running -= 1);
    }

    /// Changes a queue and keeps the order.
    fn change<T>(&mut self, service: ServiceId, change: impl FnOnce(&mut Queue) -> T) -> T {
        let queue = self.services.entry(service).or_default();
        if let Some(rank) = queue.rank(service) {
            self.order.remove(&rank);
        }
        let changed = change(queue);
        match queue.rank(service) {
            Some(rank) => drop(self.order.insert(rank)),
            None if queue.running == 0 => drop(self.services.remove(&service)),
            None => {}
        }
        changed
    }
}

impl Check {
    fn judge(&mut self, passed: bool) -> Option<Verdict> {
        let (verdict, needed) = match passed {
            true => (Verdict::Passing, self.rule.rise),
            false => (Verdict::Failing, self.rule.fall),
        };
        if verdict == self.verdict {
            self.contrary = 0;
            return None;
        }
        self.contrary += 1;
        if self.verdict != Verdict::Unproven && self.contrary < needed {
            return None;
        }
        (self.verdict, self.contrary) = (verdict, 0);
        Some(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_nanos(1_000_000_000_000);
    const RULE: Rule = Rule { interval: Duration::from_secs(2), rise: 2, fall: 3 };

    fn due(number: u16) -> Due {
        of(0, number)
    }

    /// A backend of the service with this number.
    fn of(service: u16, number: u16) -> Due {
        let (id, service) = (BackendId(u32::from(number) + 100), ServiceId(service));
        Due { slot: number, id, service }
    }

    fn after(ms: u64) -> Now {
        START.plus(Duration::from_millis(ms))
    }

    #[test]
    fn the_first_outcome_decides_alone_and_then_as_many_in_a_row_as_the_rule_says() {
        use Verdict::{Failing, Passing};
        let mut checks = Checks::new(START);
        checks.add(due(0), RULE, Verdict::Unproven, Duration::ZERO, START);
        for (at, (passed, turned)) in [
            (true, Some(Passing)),
            (false, None),
            (false, None),
            (true, None),
            (false, None),
            (false, None),
            (false, Some(Failing)),
            (false, None),
            (true, None),
            (false, None),
            (true, None),
            (true, Some(Passing)),
        ]
        .into_iter()
        .enumerate()
        {
            let now = after(at as u64 * 2_100 + 20);
            assert_eq!(checks.begin(now), Some(due(0)));
            assert_eq!(checks.ended(due(0), passed, now), turned, "outcome {at}");
        }
        let mut checks = Checks::new(START);
        checks.add(due(0), RULE, Verdict::Unproven, Duration::ZERO, START);
        checks.begin(after(20));
        assert_eq!(checks.verdict(due(0)), Some(Verdict::Unproven));
        assert_eq!(checks.ended(due(0), false, after(20)), Some(Failing));
    }

    #[test]
    fn checks_begin_at_once_and_are_apart_from_then_on() {
        // The clock begins with the process, so an interval may reach back to before it began.
        let start = Now::from_nanos(1);
        let mut checks = Checks::new(start);
        for number in 0..4 {
            let offset = RULE.interval * u32::from(number) / 4;
            checks.add(due(number), RULE, Verdict::Unproven, offset, start);
        }
        let mut begun = Vec::new();
        for ms in (0..6_000).step_by(20) {
            let now = start.plus(Duration::from_millis(ms));
            while let Some(due) = checks.begin(now) {
                begun.push((due.slot, ms / 100));
                checks.ended(due, true, now);
            }
        }
        let (first, rest) = begun.split_at(4);
        assert!(first.iter().all(|(_, at)| *at == 0), "{first:?}");
        let at = |slot| rest.iter().filter(|it| it.0 == slot).map(|it| it.1).collect::<Vec<_>>();
        assert_eq!(at(1), [5, 25, 45]);
        assert_eq!(at(3), [15, 35, 55]);
    }

    #[test]
    fn no_more_run_at_once_than_may_and_the_rest_have_their_turn() {
        let mut checks = Checks::new(START);
        let all = AT_ONCE as u16 + 10;
        (0..all).for_each(|number| {
            let due = of(number % 16, number);
            checks.add(due, RULE, Verdict::Unproven, Duration::ZERO, START)
        });
        let mut running: Vec<Due> = std::iter::from_fn(|| checks.begin(after(20))).collect();
        assert_eq!(running.len(), 16 * 15 + 1, "each runs 15, one 16, and 15 places are free");
        let mut seen: Vec<u16> = running.iter().map(|due| due.slot).collect();
        while let Some(ended) = running.pop() {
            checks.ended(ended, true, after(100));
            while let Some(next) = checks.begin(after(100)) {
                seen.push(next.slot);
                running.push(next);
                assert!(running.len() <= AT_ONCE);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..all).collect::<Vec<_>>());
        assert!(checks.turns.services.is_empty() && checks.turns.order.is_empty());
        for service in 0..=AT_ONCE as u16 {
            let due = of(service, 1000 + service);
            checks.add(due, RULE, Verdict::Unproven, Duration::ZERO, after(200));
        }
        let begun = std::iter::from_fn(|| checks.begin(after(220))).count();
        assert_eq!(begun, AT_ONCE, "one of each service, as far as there is room");
    }

    /// Runs the checks of backends that take so long each, for a minute. How long each check waited beyond
    /// its time, by backend.
    fn simulate(backends: &[(Due, Duration)]) -> BTreeMap<u16, Vec<Duration>> {
        let step = Duration::from_millis(1);
        let mut checks = Checks::new(START);
        for (due, _) in backends {
            let offset = RULE.interval * u32::from(due.slot % 100) / 100;
            checks.add(*due, RULE, Verdict::Unproven, offset, START);
        }
        let took: BTreeMap<u16, Duration> = backends.iter().map(|it| (it.0.slot, it.1)).collect();
        let mut running: BTreeSet<(Now, u16)> = BTreeSet::new();
        let mut waits: BTreeMap<u16, Vec<Duration>> = BTreeMap::new();
        let mut now = START;
        while now < after(60_000) {
            now = now.plus(step);
            while let Some((_, slot)) = running.first().copied().filter(|it| it.0 <= now) {
                running.pop_first();
                let due = backends.iter().find(|it| it.0.slot == slot).unwrap().0;
                checks.ended(due, took[&slot] < RULE.interval / 2, now);
            }
            let planned = |checks: &Checks, due: Due| {
                checks.places[usize::from(due.slot)].as_ref().unwrap().next
            };
            let times: Vec<Now> = backends.iter().map(|it| planned(&checks, it.0)).collect();
            while let Some(due) = checks.begin(now) {
                let place = backends.iter().position(|it| it.0 == due).unwrap();
                waits.entry(due.slot).or_default().push(now.since(times[place]));
                running.insert((now.plus(took[&due.slot]), due.slot));
            }
        }
        waits
    }

    #[test]
    fn a_service_whose_backends_time_out_does_not_delay_the_checks_of_another() {
        let (slow, quick) = (Duration::from_secs(1), Duration::from_millis(2));
        let jitter = |number: u16| Duration::from_millis(u64::from(number) * 37 % 60);
        let dead = (0..600).map(|number| (of(1 + number % 2, number), slow + jitter(number)));
        let sound = (600..620).map(|number| (of(3, number), quick));
        let waits = simulate(&dead.chain(sound).collect::<Vec<_>>());
        let late = waits.range(600..).flat_map(|(_, waits)| waits).max().unwrap();
        assert!(*late <= crate::base::wheel::TICK + Duration::from_millis(2), "{late:?}");
        let counts: Vec<usize> = waits.values().map(Vec::len).collect();
        assert!(counts[600..].iter().all(|count| *count >= 29), "every interval: {counts:?}");
        // Each of the two services runs 85 of its 300 at once, and a check takes about a second.
        let is_fair = counts[..600].iter().all(|count| (15..=18).contains(count));
        assert!(is_fair, "they take turns: {counts:?}");
    }

    #[test]
    fn one_that_leaves_while_it_waits_leaves_nothing_behind() {
        let mut checks = Checks::new(START);
        for number in 0..AT_ONCE as u16 {
            checks.add(due(number), RULE, Verdict::Unproven, Duration::ZERO, START);
        }
        let running: Vec<Due> = std::iter::from_fn(|| checks.begin(after(20))).collect();
        assert_eq!(running.len(), AT_ONCE / 2);
        (0..AT_ONCE as u16).for_each(|number| checks.remove(due(number)));
        assert!(checks.turns.order.is_empty() && checks.turns.services.len() == 1);
        assert_eq!(checks.begin(after(9_000)), None);
        for due in running {
            checks.ended(due, true, after(9_000));
        }
        assert!(checks.turns.services.is_empty());
    }

    #[test]
    fn a_check_that_takes_longer_than_the_interval_is_not_begun_twice() {
        let mut checks = Checks::new(START);
        checks.add(due(0), RULE, Verdict::Unproven, Duration::ZERO, START);
        assert_eq!(checks.begin(after(20)), Some(due(0)));
        assert_eq!(checks.begin(after(9_000)), None);
        checks.ended(due(0), true, after(9_000));
        assert_eq!(checks.begin(after(9_020)), Some(due(0)));
        assert_eq!(checks.begin(after(9_040)), None, "what was missed is not made up for");
    }

    #[test]
    fn another_rule_holds_from_now_on() {
        let mut checks = Checks::new(START);
        let hourly = Rule { interval: Duration::from_secs(3600), ..RULE };
        checks.add(due(0), hourly, Verdict::Passing, hourly.interval, START);
        assert_eq!(checks.begin(after(20)), Some(due(0)));
        checks.follow(due(0), hourly, after(30));
        assert_eq!(checks.ended(due(0), true, after(40)), None, "it was passing");
        assert_eq!(checks.begin(after(5_000)), None);
        checks.follow(due(0), RULE, after(5_000));
        assert_eq!(checks.begin(after(6_900)), None);
        assert_eq!(checks.begin(after(7_020)), Some(due(0)), "one interval of the new rule");
        checks.follow(due(0), Rule { fall: 1, ..RULE }, after(7_030));
        assert_eq!(checks.begin(after(9_900)), None, "it runs");
        assert_eq!(checks.ended(due(0), false, after(9_900)), Some(Verdict::Failing));
    }

    #[test]
    fn the_outcome_of_one_who_has_left_says_nothing_of_its_successor() {
        let mut checks = Checks::new(START);
        checks.add(due(0), RULE, Verdict::Unproven, Duration::ZERO, START);
        assert_eq!(checks.begin(after(20)), Some(due(0)));
        checks.remove(due(0));
        let successor = Due { id: BackendId(7), ..due(0) };
        checks.add(successor, RULE, Verdict::Unproven, Duration::ZERO, after(20));
        assert_eq!(checks.ended(due(0), false, after(30)), None);
        assert_eq!(checks.verdict(successor), Some(Verdict::Unproven));
        assert_eq!(checks.begin(after(60)), Some(successor));
        checks.remove(due(0));
        assert_eq!(checks.ended(successor, true, after(70)), Some(Verdict::Passing));
    }
}
