//! What must hold, whatever happens. Owns what the laws remember: the services that were removed, the doors
//! that rest, the checks as they should stand, and what operators and files have said of shares.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::registry::{Change, DrainedBy, Registered};
use lb::cluster::seats::Seats;
use lb::cluster::source::Source;
use lb::cluster::{BackendId, DoorId, Protocol, ServiceId, Snapshot, Standing, Terms};
use lb::config::Config;
use lb::config::services::OnFail;
use lb::control::checks::Due;
use lb::control::doors::{NewDoor, OpenDoor};
use lb::control::hub::Hub;

use crate::plan::{LAG, WORKERS};
use crate::random::Random;
use crate::shares::{Shares, in_rotation};
use crate::worker::{DoorNews, Pick, Played};

/// How long the place of a door stays empty.
const REST: Duration = Duration::from_secs(30);

/// How soon a backend reads what it was told.
const SOON: Duration = Duration::from_secs(1);

/// A service that was removed.
struct Gone {
    name: String,
    removed: Now,
    until: Now,
    terms: Terms,
}

/// How a check stands.
struct Verdict {
    fails: bool,
    unproven: bool,
    contrary: u32,
}

impl Verdict {
    /// Of a backend that has just joined.
    fn fresh() -> Verdict {
        Verdict { fails: true, unproven: true, contrary: 0 }
    }
}

/// The state before a reload.
pub struct Before {
    snapshot: Arc<Snapshot>,
    config: Arc<Config>,
    doors: Vec<OpenDoor>,
    services: Vec<ServiceId>,
    members: BTreeMap<(ServiceId, SocketAddr), (BackendId, Source)>,
    reloads: u64,
}

#[derive(Default)]
pub struct Laws {
    pub shares: Shares,
    gone: BTreeMap<ServiceId, Gone>,
    forgotten: Vec<(ServiceId, BackendId)>,
    last_of: BTreeMap<ServiceId, BackendId>,
    snapshot: Option<Arc<Snapshot>>,
    /// Until when each door that has closed rests.
    rests: BTreeMap<DoorId, Now>,
    /// How often each door was opened and closed, over all workers.
    opened: BTreeMap<DoorId, usize>,
    closed: BTreeMap<DoorId, usize>,
    wanted_shares: BTreeMap<String, Vec<(String, u8)>>,
    verdicts: BTreeMap<BackendId, Verdict>,
    /// Backends whose sessions are to have ended.
    closing: BTreeMap<BackendId, Now>,
    /// When the sessions of each backend that drains are to have ended.
    drains: BTreeMap<BackendId, Now>,
    /// The backends that somebody has asked to drain,
    asked: BTreeSet<BackendId>,
    /// and those of them of which no reload has been heard since.
    on_their_own: BTreeSet<BackendId>,
    /// Backends that drain with their service, since when, and those of them that have been told.
    go_along: BTreeMap<BackendId, Now>,
    informed: BTreeSet<BackendId>,
    told: BTreeSet<(Source, String, u16)>,
    pub reloads: u64,
    pub refused: u64,
}

impl Laws {
    pub fn picked(&mut self, picks: &[Pick]) {
        picks.iter().for_each(|pick| self.shares.picked(pick));
    }

    /// What holds at any time.
    pub fn hold(&mut self, hub: &Hub, workers: &mut [Played], seats: &[Arc<Seats>; 2], now: Now) {
        for worker in &mut *workers {
            self.doors_of(worker, now);
        }
        self.published(hub, workers);
        books_agree(hub, workers, seats);
        places_are_one_backends(hub, workers);
        self.removed(hub, workers, now);
        self.drained(hub, workers, now);
        self.all_told(hub, now);
        self.shares_are_as_said(hub);
        self.checks_stand(hub, workers, now);
        assert_eq!(hub.counters.orders_lost.get(), 0, "an order was lost");
    }

    /// A door is opened and closed once, and belongs to a service that the worker knows.
    fn doors_of(&mut self, worker: &mut Played, now: Now) {
        if let Some((door, service)) = worker.lost.first() {
            panic!("worker {} does not know {service:?} of door {door:?}", worker.number);
        }
        for news in worker.news.drain(..) {
            match news {
                DoorNews::Opened(id) => *self.opened.entry(id).or_default() += 1,
                DoorNews::Closed(id) => {
                    *self.closed.entry(id).or_default() += 1;
                    self.rests.insert(id, now.plus(REST).minus(LAG));
                }
            }
        }
    }

    /// A service is forgotten only once nothing is left of it.
    fn published(&mut self, hub: &Hub, workers: &[Played]) {
        let before = self.snapshot.replace(Arc::clone(&hub.snapshot));
        let Some(before) = before.filter(|it| !Arc::ptr_eq(it, &hub.snapshot)) else { return };
        for service in &before.services {
            let Some(after) = hub.snapshot.service(service.id) else {
                self.is_over(service.id, hub, workers);
                continue;
            };
            assert!(Arc::ptr_eq(&service.turn, &after.turn), "{} has other turns", service.name);
            assert!(Arc::ptr_eq(&service.gate, &after.gate), "{} has another gate", service.name);
            assert!(Arc::ptr_eq(&service.seats, &after.seats), "{} has other seats", service.name);
            assert_eq!((&service.name, service.kind), (&after.name, after.kind));
            for group in service.groups.iter() {
                let kept = after.groups.iter().find(|it| it.name == group.name);
                assert!(kept.is_none_or(|it| Arc::ptr_eq(&it.turn, &group.turn)), "{}", group.name);
            }
            if let Some(last) = service.pool.backends.last() {
                self.last_of.insert(service.id, last.id);
            }
        }
    }

    fn is_over(&mut self, id: ServiceId, hub: &Hub, workers: &[Played]) {
        let gone = self.gone.remove(&id);
        let gone = gone.unwrap_or_else(|| panic!("{id:?} was forgotten and never removed"));
        nothing_is_left(id, &gone.name, hub, workers);
        let backend = self.last_of.remove(&id).unwrap_or(BackendId(0));
        self.forgotten.push((id, backend));
    }

    /// A removed service keeps its terms, and its sessions and itself go within bounded time.
    fn removed(&self, hub: &Hub, workers: &[Played], now: Now) {
        for (id, gone) in &self.gone {
            let name = &gone.name;
            let Some(service) = hub.registry.find_service(*id) else {
                nothing_is_left(*id, name, hub, workers);
                continue;
            };
            assert_eq!(service.terms, gone.terms, "{name} is to leave on the terms it had");
            assert!(!hub.registry.is_known(*id), "{name} was removed");
            let settled = gone.removed.plus(LAG + Duration::from_secs(1));
            for entry in hub.registry.of_service(*id).filter(|_| now >= settled) {
                assert_eq!(entry.backend.standing, Standing::Draining, "{name} was removed");
            }
            let late = gone.until.max(settled).plus(LAG + LAG + Duration::from_secs(1));
            if now < late {
                continue;
            }
            for worker in workers {
                let left = worker.sessions_of(*id).next().map(|it| (&it.entry, it.door));
                assert!(
                    left.is_none(),
                    "{name} was removed long ago: {left:?} of {}",
                    worker.number
                );
            }
            let over = late.plus(LAG + Duration::from_secs(2));
            assert!(now < over, "{name} was removed long ago and is still there");
        }
    }

    /// Backends that drain because their service was removed have been told so.
    fn all_told(&mut self, hub: &Hub, now: Now) {
        for (id, gone) in &self.gone {
            let draining = hub.registry.of_service(*id);
            for entry in draining.filter(|it| it.backend.standing == Standing::Draining) {
                let (id, port) = (entry.backend.id, entry.backend.address.port());
                // One that drained before is told when the others are, which may be later.
                if self.asked.contains(&id) || entry.source == Source::File {
                    continue;
                }
                let since = *self.go_along.entry(id).or_insert(now);
                let about = (entry.source, gone.name.clone(), port);
                if self.told.contains(&about) {
                    // Another service may have its name by the next look.
                    self.informed.insert(id);
                }
                let is_told = self.informed.contains(&id) || now < since.plus(SOON);
                assert!(is_told, "{about:?} was not told that its service was removed");
            }
        }
        self.go_along.retain(|id, _| hub.registry.get(*id).is_some());
        self.informed.retain(|id| hub.registry.get(*id).is_some());
        self.asked.retain(|id| hub.registry.get(*id).is_some());
    }

    /// A backend drains, until another time, or no more.
    pub fn drain_changes(&mut self, hub: &Hub, id: BackendId, change: &Change) {
        let Some(entry) = hub.registry.get(id) else { return };
        let by = entry.drained_by();
        let expected = match change {
            Change::Drain { .. } => Some(DrainedBy::Owner),
            Change::DrainBackend { .. } if by == Some(DrainedBy::Owner) => by,
            Change::DrainBackend { .. } => Some(DrainedBy::Operator),
            // What the operator has asked for is not the source's to take back.
            Change::Undrain { .. } => by.filter(|by| *by == DrainedBy::Operator),
            Change::UndrainBackend { .. } => None,
            _ => return,
        };
        assert_eq!(by, expected, "{change:?}");
        assert_eq!(by.is_some(), hub.draining.contains_key(&id), "{change:?}");
        let draining = entry.backend.standing == Standing::Draining;
        assert_eq!(by.is_some(), draining, "{change:?}");
        match hub.draining.get(&id).and_then(|it| it.drain.deadline) {
            Some(until) => drop(self.drains.insert(id, until)),
            None => drop(self.drains.remove(&id)),
        }
        for drained in [&mut self.asked, &mut self.on_their_own] {
            match by {
                Some(_) => drop(drained.insert(id)),
                None => drop(drained.remove(&id)),
            }
        }
    }

    /// A drain is over only when no worker gives the backend users any more.
    fn over_when_known(&mut self, hub: &Hub, workers: &[Played]) {
        let has_left = |id: &BackendId| hub.registry.get(*id).is_none();
        let over: Vec<BackendId> = self.on_their_own.iter().copied().filter(has_left).collect();
        self.on_their_own.retain(|id| !over.contains(id));
        for (id, worker) in over.iter().flat_map(|id| workers.iter().map(move |it| (id, it))) {
            let services = &worker.books.snapshot().services;
            let serves = services.iter().any(|service| in_rotation(service).contains(id));
            assert!(
                !serves,
                "the drain of {id} is over, and worker {} gives it users",
                worker.number
            );
        }
    }

    /// A backend goes, whether it drains or not.
    pub fn taken_out(&mut self, id: BackendId) {
        self.on_their_own.remove(&id);
    }

    /// No session outlives the drain of its backend by much.
    fn drained(&mut self, hub: &Hub, workers: &[Played], now: Now) {
        let drains = |id: BackendId| match hub.registry.get(id) {
            Some(entry) => entry.backend.standing == Standing::Draining,
            None => hub.departed.contains_key(&id),
        };
        self.over_when_known(hub, workers);
        self.drains.retain(|id, _| drains(*id));
        for (id, until) in self.drains.iter().filter(|it| now >= it.1.plus(LAG + LAG)) {
            let left = workers.iter().flat_map(|it| &it.sessions).find(|it| it.entry.is_on(*id));
            let left = left.map(|it| &it.entry);
            assert!(left.is_none(), "{id} was to drain until {until:?}: {left:?}");
        }
    }

    /// Something was said on a control connection.
    pub fn told(&mut self, source: Source, lines: &str) {
        for line in lines.lines().filter(|line| line.contains(r#""event":"removed""#)) {
            let said: serde_json::Value = serde_json::from_str(line).unwrap();
            let port = said["port"].as_u64().unwrap() as u16;
            let service = said["service"].as_str().unwrap().to_owned();
            let known = self.gone.values().any(|gone| gone.name == service);
            assert!(known, "{service} is there, and {source:?} was told otherwise");
            self.told.insert((source, service, port));
        }
    }

    /// A backend has registered, or has done so again.
    pub fn registered(
        &mut self,
        hub: &Hub,
        source: Source,
        service: ServiceId,
        at: SocketAddr,
        (id, is_new): (BackendId, bool),
    ) {
        let service = hub.registry.service(service);
        self.told.remove(&(source, service.name.to_string(), at.port()));
        let entry = hub.registry.get(id).expect("it has just registered");
        if entry.drained_by().is_none() {
            self.on_their_own.remove(&id);
            self.asked.remove(&id);
            self.drains.remove(&id);
        } else if let Some(draining) = hub.draining.get(&id) {
            let until = draining.drain.deadline;
            self.drains.remove(&id);
            until.map(|until| self.drains.insert(id, until));
        }
        if !is_checked(hub, entry) {
            self.verdicts.remove(&id);
            self.closing.remove(&id);
        } else {
            let fresh = match is_new {
                true => Verdict::fresh(),
                false => Verdict { fails: false, unproven: false, contrary: 0 },
            };
            self.verdicts.entry(id).or_insert(fresh);
        }
    }

    pub fn shifted(&mut self, name: &str, wanted: &[(String, u64)]) {
        let shares = self.wanted_shares.get_mut(name).expect("it has groups");
        for (group, share) in wanted {
            let row = shares.iter_mut().find(|row| row.0 == *group);
            row.expect("it is one of its groups").1 = *share as u8;
        }
    }

    fn shares_are_as_said(&self, hub: &Hub) {
        for service in hub.registry.known().filter(|it| !it.id.is_built_in()) {
            let found: Vec<_> =
                service.groups.iter().map(|it| (it.name.to_string(), it.share)).collect();
            let wanted = &self.wanted_shares[&*service.name];
            assert_eq!(found, *wanted, "the groups of {}", service.name);
        }
    }

    /// A check has ended.
    pub fn checked(&mut self, hub: &Hub, due: Due, passed: bool, now: Now) {
        let check = hub.registry.get(due.id).and_then(|entry| hub.check_of(&entry.backend));
        let Some(check) = check else { return };
        let Some(verdict) = self.verdicts.get_mut(&due.id) else { return };
        let needed = if passed { check.rise } else { check.fall };
        verdict.contrary = if passed == verdict.fails { verdict.contrary + 1 } else { 0 };
        let turned = verdict.contrary >= needed || verdict.unproven;
        let (was_unproven, failed) = (verdict.unproven, verdict.fails);
        if turned {
            *verdict = Verdict { fails: !passed, unproven: false, contrary: 0 };
        }
        let fell = turned && !passed && (was_unproven || !failed);
        if fell && check.on_fail == OnFail::Close {
            self.closing.insert(due.id, now);
        } else if turned && passed {
            self.closing.remove(&due.id);
        }
    }

    /// Standings follow the checks, and the sessions of those that failed end where they should.
    fn checks_stand(&mut self, hub: &Hub, workers: &[Played], now: Now) {
        self.verdicts.retain(|id, _| hub.registry.get(*id).is_some());
        for entry in hub.registry.entries() {
            let backend = &entry.backend;
            if is_checked(hub, entry) && !self.gone.contains_key(&backend.service) {
                // Listed, and its place was taken until now.
                self.verdicts.entry(backend.id).or_insert_with(Verdict::fresh);
            }
            let fails = self.verdicts.get(&backend.id).is_some_and(|it| it.fails);
            if backend.standing != Standing::Draining {
                let is_failing = backend.standing == Standing::Failing;
                assert_eq!(is_failing, fails, "the check of {backend:?}");
            }
        }
        self.closing.retain(|id, _| {
            let service = hub.registry.get(*id).map(|entry| entry.backend.service);
            let service = service.and_then(|service| hub.snapshot.service(service));
            service.is_some_and(|service| !in_rotation(service).contains(id))
                || service.is_some_and(|service| service.pool.get(*id).is_none())
        });
        for (id, since) in &self.closing {
            let late = now >= since.plus(LAG + LAG);
            let left = workers.iter().flat_map(|it| &it.sessions).find(|it| it.entry.is_on(*id));
            assert!(
                !late || left.is_none(),
                "{id} has failed, and keeps a session: {:?}",
                left.map(|it| &it.entry)
            );
        }
    }

    pub fn before_reload(&self, hub: &Hub) -> Before {
        let backend = |it: &lb::cluster::registry::Registered| {
            ((it.backend.service, it.backend.address), (it.backend.id, it.source))
        };
        Before {
            snapshot: Arc::clone(&hub.snapshot),
            config: Arc::clone(&hub.config),
            doors: hub.doors.open().to_vec(),
            services: hub.registry.known().map(|it| it.id).collect(),
            members: hub.registry.entries().map(backend).collect(),
            reloads: hub.counters.reloads.get(),
        }
    }

    pub fn after_reload(
        &mut self,
        before: Before,
        hub: &Hub,
        file: &Config,
        opened: &[NewDoor],
        now: Now,
    ) {
        let known: Vec<ServiceId> = hub.registry.known().map(|it| it.id).collect();
        if hub.reload.refused.is_some() {
            self.refused += 1;
            assert!(Arc::ptr_eq(&before.snapshot, &hub.snapshot), "refused, and published");
            assert!(Arc::ptr_eq(&before.config, &hub.config), "refused, and in use");
            assert_eq!((before.doors, before.services), (hub.doors.open().to_vec(), known));
            assert_eq!(before.reloads, hub.counters.reloads.get());
            return;
        }
        self.reloads += 1;
        self.on_their_own.clear();
        let named = |name: &str| file.services.iter().any(|it| it.name == name);
        for table in &before.config.services {
            match hub.registry.named(&table.name) {
                Some(after) => assert_eq!(after.id, table.id, "{} has another number", table.name),
                None => self.leaves(table.id, &table.name, &before, hub, now),
            }
            assert_eq!(hub.registry.named(&table.name).is_some(), named(&table.name));
        }
        let fresh = known.iter().filter(|id| !before.services.contains(id));
        for id in fresh {
            assert!(!self.gone.contains_key(id), "{id:?} is another's, who is leaving");
        }
        let tables = hub.config.services.iter();
        let shares = |it: &[(&str, u8)]| it.iter().map(|it| (it.0.to_owned(), it.1)).collect();
        self.wanted_shares = tables.map(|it| (it.name.clone(), shares(&it.shares()))).collect();
        self.numbers_have_rested(&before, hub, opened, now);
        self.members_stay(&before, hub);
        self.follow_checks(hub);
    }

    fn leaves(&mut self, id: ServiceId, name: &str, before: &Before, hub: &Hub, now: Now) {
        assert!(hub.is_leaving(id), "{name} is forgotten at once");
        let until = now.plus(hub.config.balance.drain);
        let terms = before.snapshot.service(id).expect("it was there").terms.clone();
        self.gone.insert(id, Gone { name: name.to_owned(), removed: now, until, terms });
    }

    fn numbers_have_rested(&mut self, before: &Before, hub: &Hub, opened: &[NewDoor], now: Now) {
        let open: BTreeSet<DoorId> = hub.doors.open().iter().map(|it| it.id).collect();
        for door in opened {
            let rested = self.rests.remove(&door.id).is_none_or(|until| now >= until);
            assert!(rested, "the place of {:?} has not rested", door.id);
            assert!(before.doors.iter().all(|it| it.id != door.id), "{:?} is open", door.id);
        }
        for door in before.doors.iter().filter(|it| !open.contains(&it.id)) {
            if door.protocol != Protocol::Udp {
                self.rests.insert(door.id, now.plus(hub.config.api.head_timeout + REST));
            }
        }
    }

    /// Whoever is still wanted is the same backend as before.
    fn members_stay(&self, before: &Before, hub: &Hub) {
        for ((service, address), (id, source)) in &before.members {
            let table = hub.config.service(*service);
            let is_listed =
                || table.is_some_and(|it| it.backends.iter().any(|it| it.address == *address));
            // What is drained is listed anew, under another name, only once it has left.
            let stays = match source {
                Source::File => is_listed() || self.gone.contains_key(service),
                Source::Connection(_) | Source::Cluster => true,
            };
            let after = hub.registry.find(*service, *address).map(|it| it.backend.id);
            assert!(!stays || after == Some(*id), "{id} at {address} is {after:?} now");
        }
    }

    /// Who is checked is another matter now; one that served has to fail as often as any other.
    fn follow_checks(&mut self, hub: &Hub) {
        let mut verdicts = std::mem::take(&mut self.verdicts);
        for entry in hub.registry.entries() {
            let service = hub.registry.service(entry.backend.service);
            let is_checked = match self.gone.contains_key(&service.id) {
                true => verdicts.contains_key(&entry.backend.id),
                false => is_checked(hub, entry),
            };
            if !is_checked {
                continue;
            }
            let known = verdicts.remove(&entry.backend.id);
            let fails = entry.backend.standing == Standing::Failing;
            let fresh = Verdict { fails, unproven: fails, contrary: 0 };
            self.verdicts.insert(entry.backend.id, known.unwrap_or(fresh));
        }
    }

    /// A service that was forgotten, and a backend that it had.
    pub fn somebody_gone(&self, random: &mut Random) -> Option<(ServiceId, BackendId)> {
        (!self.forgotten.is_empty()).then(|| random.pick(&self.forgotten))
    }

    /// At the end of everything, nothing is left but what there was at the beginning.
    pub fn over(&self, hub: &Hub, workers: &[Played]) {
        assert!(self.gone.is_empty(), "still there: {:?}", self.gone.keys());
        assert_eq!(hub.snapshot.services.len(), 3);
        assert!(hub.draining.is_empty() && hub.departed.is_empty() && hub.registry.is_empty());
        let left = hub.doors.open().len();
        assert!(left == 3 && hub.doors.closing() == 0);
        for worker in workers {
            assert_eq!((worker.doors.len(), worker.has_changes()), (3, false));
        }
        for (id, times) in &self.opened {
            let is_open = hub.doors.open().iter().any(|it| it.id == *id);
            let closed = self.closed.get(id).copied().unwrap_or_default();
            assert_eq!(closed + if is_open { WORKERS } else { 0 }, *times, "door {id:?}");
        }
    }
}

/// Whether a backend is checked, by its service or as it has asked.
fn is_checked(hub: &Hub, entry: &Registered) -> bool {
    let service = hub.registry.service(entry.backend.service);
    service.terms.checks.is_some() || entry.check.is_some()
}

/// Gates and seats count what is there.
fn books_agree(hub: &Hub, workers: &[Played], seats: &[Arc<Seats>; 2]) {
    let all = || workers.iter().flat_map(|it| &it.sessions);
    for service in &hub.snapshot.services {
        let inside = all().filter(|it| Played::inside(it) == Some(service.id)).count();
        assert_eq!(service.gate.sessions(), inside, "the gate of {}", service.name);
    }
    let udp = all().filter(|it| it.protocol == Protocol::Udp).count();
    let held: usize = workers.iter().map(|it| it.greetings.len()).sum();
    let taken = [seats[0].taken(), seats[1].taken()];
    assert_eq!(taken, [all().count() - udp + held, udp], "seats");
}

/// A place is one backend's for as long as somebody is counted there.
fn places_are_one_backends(hub: &Hub, workers: &[Played]) {
    let mut places = BTreeMap::<u16, BackendId>::new();
    let mut take = |slot: u16, id: BackendId| {
        let owner = *places.entry(slot).or_insert(id);
        assert_eq!(owner, id, "place {slot} has two backends");
    };
    let registered = hub.registry.entries().map(|it| &it.backend);
    let all = registered.chain(hub.departed.values().map(|it| &it.backend));
    all.for_each(|it| take(it.slot, it.id));
    let mut counts = BTreeMap::<u16, u64>::new();
    for choice in workers.iter().flat_map(|it| &it.sessions).filter_map(|it| it.entry.choice()) {
        take(choice.slot, choice.backend);
        *counts.entry(choice.slot).or_default() += 1;
    }
    for slot in 0..crate::plan::PLACES as u16 {
        assert_eq!(hub.workers.active(slot), counts.get(&slot).copied().unwrap_or_default());
    }
}

/// Nothing refers to a service that was forgotten.
fn nothing_is_left(id: ServiceId, name: &str, hub: &Hub, workers: &[Played]) {
    for worker in workers {
        let sessions = worker.sessions_of(id).count();
        assert_eq!(sessions, 0, "{name} was forgotten with sessions at worker {}", worker.number);
        let door = worker.doors.iter().find(|(_, door)| door.service == id);
        assert!(
            door.is_none(),
            "{name} was forgotten with a door open at worker {}",
            worker.number
        );
    }
    assert!(hub.registry.of_service(id).next().is_none(), "{name} was forgotten with backends");
    let departed = hub.departed.values().filter(|it| it.backend.service == id).count();
    assert_eq!(departed, 0, "{name} was forgotten before its last backend");
}
