//! Three balancers, a store, and what lies between them. Owns time, chance and every message under way.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::registry::{Change as Claimed, Registration, Registry};
use lb::cluster::share::event::{Change, Command, Event, Gone};
use lb::cluster::share::key::{NodeId, Place};
use lb::cluster::share::seal::Seal;
use lb::cluster::share::value::{NodeReport, Offer, State};
use lb::cluster::share::{Membership, Phase, Share};
use lb::cluster::source::Source;
use lb::cluster::{Policy, Protocol, ServiceId, Snapshot, Standing, Terms};

use crate::plan::{self, Disaster};
use crate::random::Random;
use crate::store::{Content, Store, Told};
use crate::{Fault, Violation};

const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);
/// How often balancers look at the time, in milliseconds.
const TICK_MS: u64 = 100;
pub const ORPHAN: Duration = Duration::from_secs(15);
/// Whoever was out of reach for no longer than this, and that long ago, keeps its backends everywhere.
const WELL_MS: u64 = 26_000;

/// What is true of one registration.
struct Truth {
    since: u64,
}

/// A process of a balancer.
pub struct Process {
    pub id: NodeId,
    pub share: Share,
    pub registry: Registry,
    /// Who is registered here, as the backends know it.
    own: BTreeMap<Place, Truth>,
    /// When it was told last that a key says that a backend serves.
    heard: BTreeMap<String, u64>,
    is_cut: bool,
    paused_until: u64,
    /// When it was last cut off or paused.
    unwell: u64,
    /// The connection at the far end, and the last message on its way to it.
    attempt: usize,
    arrives: u64,
}

enum Message {
    Ask { node: usize, attempt: usize, command: Command },
    Tell(Told),
}

pub struct World {
    pub now: u64,
    random: Random,
    fault: Fault,
    store: Store,
    pub processes: Vec<Process>,
    wires: BTreeMap<(u64, u64), Message>,
    sent: u64,
    born: u32,
    backup: Content,
    /// What is told in the end: registrations, disasters, lists anew.
    pub counts: [u64; 4],
}

fn at(ms: u64) -> Now {
    Now::from_nanos(ms * 1_000_000)
}

pub fn place(number: u64) -> Place {
    let address = SocketAddr::from(([192, 0, 2, 1], 9000 + number as u16));
    Place { service: "tcp".into(), protocol: Protocol::Tcp, address }
}

impl World {
    pub fn new(seed: u64, fault: Fault) -> World {
        let mut world = World {
            now: 1,
            random: Random::new(seed),
            fault,
            store: Store::new(),
            processes: Vec::new(),
            wires: BTreeMap::new(),
            sent: 0,
            born: 0,
            backup: Content::default(),
            counts: [0; 4],
        };
        world.backup = world.store.backup();
        for node in 0..plan::NODES {
            let process = world.bear(node);
            world.processes.push(process);
        }
        world
    }

    fn bear(&mut self, node: usize) -> Process {
        self.born += 1;
        let id = NodeId::new(["a", "b", "c"][node], self.born);
        let orphan = if self.fault == Fault::NeverGivesUp { ORPHAN * 1000 } else { ORPHAN };
        let membership = Membership {
            cluster: "sim".to_owned(),
            me: id.clone(),
            seal: Seal::new([&b"a secret of the cluster"[..]].into_iter()),
            host: "here".into(),
            endpoints: 3,
            lease: Duration::from_secs(10),
            orphan,
        };
        let terms = Terms { policy: Policy::SourceHash, ..Terms::default() };
        let mut registry = Registry::new(64, &Snapshot::default().services);
        registry.agree(|_| terms.clone());
        let mut share = Share::new(membership, at(self.now));
        share.report(NodeReport { version: "1".to_owned(), ..NodeReport::default() }, at(self.now));
        let (own, heard, is_cut) = (BTreeMap::new(), BTreeMap::new(), false);
        let (paused_until, unwell) = (0, 0);
        Process {
            id,
            share,
            registry,
            own,
            heard,
            is_cut,
            paused_until,
            unwell,
            attempt: 0,
            arrives: 0,
        }
    }

    /// Ten milliseconds.
    pub fn step(&mut self, is_quiet: bool) -> Result<(), Violation> {
        self.now += 10;
        if self.now >= self.store.paused_until {
            self.store.expire(self.now);
        }
        if !is_quiet {
            self.act();
        }
        self.deliver()?;
        if self.now >= self.store.paused_until {
            for (node, attempt, event) in self.store.tell() {
                self.tell(node, attempt, event);
            }
        }
        for node in 0..self.processes.len() {
            let process = &mut self.processes[node];
            if process.is_cut || process.paused_until > self.now {
                process.unwell = self.now;
            }
            let is_due = (self.now / 10 + node as u64).is_multiple_of(TICK_MS / 10);
            if is_due && process.paused_until <= self.now {
                process.share.tick(at(self.now));
                self.follow(node)?;
            }
        }
        Ok(())
    }

    fn act(&mut self) {
        if self.random.one_in(plan::EVERY_BACKEND) {
            self.backend();
        }
        if self.random.one_in(plan::EVERY_DISASTER) {
            self.counts[1] += 1;
            let disaster = self.random.pick(Disaster::ALL);
            self.befall(disaster);
        }
        let back = self.random.one_in(plan::EVERY_RETURN);
        if back {
            self.store.is_full = false;
            self.processes.iter_mut().for_each(|process| process.is_cut = false);
        }
    }

    /// A backend does something at one of the balancers.
    fn backend(&mut self) {
        let node = self.random.place(self.processes.len());
        if self.processes[node].paused_until > self.now {
            return;
        }
        let place = place(self.random.below(plan::PLACES));
        if self.processes[node].own.contains_key(&place) && self.random.half() {
            self.leave(node, &place);
        } else {
            self.join(node, &place);
        }
    }

    fn join(&mut self, node: usize, place: &Place) {
        self.counts[0] += 1;
        let weight = self.random.between(1, 3) as u16;
        let (now, process) = (self.now, &mut self.processes[node]);
        let registration = Registration {
            source: Source::Connection(1),
            ..Offer { weight, ..Offer::plain() }.registration(TCP, place.address)
        };
        process.registry.apply(Claimed::Register(registration), at(now)).expect("there is room");
        let truth = Truth { since: now };
        let known = process.own.remove(place);
        process.own.insert(place.clone(), known.unwrap_or(truth));
        let entry = process.registry.find(TCP, place.address).expect("it has just registered");
        let offer = Offer::of(entry, State::Serving);
        process.share.say(place, offer, at(now));
        self.send(node);
    }

    fn leave(&mut self, node: usize, place: &Place) {
        let state = if self.random.half() { State::Left } else { State::Lost };
        let (now, process) = (self.now, &mut self.processes[node]);
        process.own.remove(place);
        let (source, service, address) = (Source::Connection(1), TCP, place.address);
        let change = Claimed::Unregister { source, service, address };
        process.registry.apply(change, at(now)).expect("it was registered");
        process.share.say(place, Offer { state, ..Offer::plain() }, at(now));
        self.send(node);
    }

    fn befall(&mut self, disaster: Disaster) {
        let (now, node) = (self.now, self.random.place(self.processes.len()));
        match disaster {
            Disaster::Pause => self.store.paused_until = now + self.random.between(100, 40_000),
            Disaster::Compaction => {
                // What is still to be told is told first, or never.
                if self.random.half() {
                    self.store.silence(node);
                }
                self.store.compact();
            }
            Disaster::Restart => {
                for node in 0..self.processes.len() {
                    self.store.close(node);
                    self.lose(node);
                }
            }
            Disaster::Backup => self.backup = self.store.backup(),
            Disaster::Restore => {
                let is_new = self.random.half();
                self.store.restore(self.backup.clone(), is_new, now);
                (0..self.processes.len()).for_each(|node| self.lose(node));
            }
            Disaster::Wipe => {
                self.store.wipe();
                (0..self.processes.len()).for_each(|node| self.lose(node));
            }
            Disaster::DeleteAll => {
                let what = self.random.pick(&["/lb/", "/back/", "/node/", "tcp/192"]);
                self.store.delete_all(what);
            }
            Disaster::Scribble => {
                let place = self.random.place(1000);
                self.store.scribble(place);
            }
            Disaster::Full => self.store.is_full = true,
            Disaster::Silence => self.store.silence(node),
            Disaster::Cut => self.processes[node].is_cut = true,
            Disaster::Stop => {
                self.processes[node].paused_until = now + self.random.between(100, 60_000)
            }
            Disaster::Death => self.die(node),
        }
    }

    /// A process dies, and another one of the balancer takes its place. Some of its backends come back somewhere.
    fn die(&mut self, node: usize) {
        self.store.close(node);
        let process = self.bear(node);
        let before = std::mem::replace(&mut self.processes[node], process);
        self.processes[node].attempt = before.attempt + 1;
        for place in before.own.into_keys() {
            if self.random.half() {
                let node = self.random.place(self.processes.len());
                self.join(node, &place);
            }
        }
    }

    /// The connection of a balancer ends, as it learns.
    fn lose(&mut self, node: usize) {
        let attempt = self.processes[node].attempt;
        self.tell(node, attempt, Event::Lost { said: "reset".to_owned() });
    }

    fn delay(&mut self) -> u64 {
        self.random.between(1, 30)
    }

    fn post(&mut self, at: u64, message: Message) {
        self.sent += 1;
        self.wires.insert((at, self.sent), message);
    }

    /// On its way to a balancer, in order.
    fn tell(&mut self, node: usize, attempt: usize, event: Event) {
        let arrives = self.processes[node].arrives.max(self.now + self.delay());
        self.processes[node].arrives = arrives;
        self.post(arrives, Message::Tell((node, attempt, event)));
    }

    fn send(&mut self, node: usize) {
        for command in self.processes[node].share.commands() {
            if let Command::Open { attempt } = &command {
                self.processes[node].attempt = *attempt;
            }
            let is_rewritten = matches!(&command, Command::Write { .. })
                && self.fault == Fault::WritesOnce
                && self.now > 20_000;
            if is_rewritten {
                continue;
            }
            let (attempt, at) = (self.processes[node].attempt, self.now + self.delay());
            self.post(at, Message::Ask { node, attempt, command });
        }
    }

    fn deliver(&mut self) -> Result<(), Violation> {
        while let Some(entry) = self.wires.first_entry().filter(|it| it.key().0 <= self.now) {
            match entry.remove() {
                Message::Ask { node, attempt, command } => self.ask(node, attempt, command),
                Message::Tell((node, attempt, event)) => self.hear(node, attempt, event)?,
            }
        }
        Ok(())
    }

    fn ask(&mut self, node: usize, attempt: usize, command: Command) {
        if self.processes[node].is_cut {
            return self.store.silence(node);
        }
        if self.now < self.store.paused_until {
            // It lies in the socket.
            let again = self.store.paused_until + 40;
            return self.post(again, Message::Ask { node, attempt, command });
        }
        let event = self.store.carry_out(node, attempt, command, self.now);
        if let Some(event) = event {
            self.tell(node, attempt, event);
        }
    }

    fn hear(&mut self, node: usize, attempt: usize, event: Event) -> Result<(), Violation> {
        let process = &mut self.processes[node];
        if process.is_cut {
            self.store.silence(node);
            return Ok(());
        }
        if process.paused_until > self.now {
            let again = process.paused_until;
            process.arrives = process.arrives.max(again);
            self.post(again, Message::Tell((node, attempt, event)));
            return Ok(());
        }
        if let Event::Listed { rows, .. } | Event::Changed { puts: rows, .. } = &event
            && attempt == process.attempt
            && !matches!(process.share.phase(), Phase::Down { .. })
        {
            let serving = rows.iter().filter(|row| row.value.contains("serving"));
            process.heard.extend(serving.map(|row| (row.key.clone(), self.now)));
        }
        if self.fault == Fault::NeverAudits
            && let Event::Audited { .. } = event
        {
            // It believes whatever it knows already.
            process.share.hear(attempt, Event::Renewed, at(self.now));
            let event = Event::Audited { store: 7, revision: i64::MAX, count: 0, newest: 0 };
            process.share.hear(attempt, event, at(self.now));
            return self.follow(node);
        }
        if self.fault == Fault::ObeysExpiry
            && let Event::Changed { deletes, .. } = &event
        {
            let keys: Vec<String> = deletes.iter().map(|(key, _)| key.clone()).collect();
            process.share.hear(attempt, event, at(self.now));
            for key in keys {
                let place =
                    key.rsplit_once("tcp/tcp/").and_then(|(_, address)| address.parse().ok());
                if let Some(address) = place {
                    let gone = Place { service: "tcp".into(), protocol: Protocol::Tcp, address };
                    self.check_gone(node, &gone, Gone::Orphaned)?;
                }
            }
            return self.follow(node);
        }
        process.share.hear(attempt, event, at(self.now));
        self.follow(node)
    }

    /// Takes what a share has decided to its registry and to the wires.
    fn follow(&mut self, node: usize) -> Result<(), Violation> {
        for change in self.processes[node].share.changes() {
            let change = match change {
                Change::Claim { place, offer, .. } => {
                    let (wanted, drains) = (offer.registration(TCP, place.address), offer.drains());
                    Claimed::Claim { wanted, drains }
                }
                Change::Unclaim { place, why } => {
                    self.check_gone(node, &place, why)?;
                    let (service, address, is_lost) = (TCP, place.address, why != Gone::Left);
                    Claimed::Unclaim { service, address, is_lost, why: "gone" }
                }
                Change::Asked { .. } => continue,
            };
            let now = at(self.now);
            self.processes[node].registry.apply(change, now).expect("there is room");
        }
        self.counts[2] = self.counts[2].max(self.processes[node].share.summary().relisted);
        self.send(node);
        self.has_its_own(node)
    }

    /// What others say goes out of a registry only if nobody who is well has it.
    fn check_gone(&self, node: usize, place: &Place, why: Gone) -> Result<(), Violation> {
        let is_well = |process: &Process| process.unwell + WELL_MS < self.now;
        if !is_well(&self.processes[node]) {
            return Ok(());
        }
        let others = self.processes.iter().enumerate().filter(|(other, _)| *other != node);
        for (_, process) in others.filter(|(_, process)| is_well(process)) {
            let Some(truth) = process.own.get(place) else { continue };
            // What nobody could tell it, it cannot know.
            let key = process.share.prefix().back(&process.id, place);
            let heard = self.processes[node].heard.get(&key);
            if heard.is_some_and(|at| *at > truth.since) && truth.since + WELL_MS < self.now {
                let (me, other) = (&self.processes[node].id, &process.id);
                let what =
                    format!("{me} lets go of {place} ({why:?}), which is registered at {other}");
                return Err(Violation(what));
            }
        }
        Ok(())
    }

    fn has_its_own(&self, node: usize) -> Result<(), Violation> {
        let process = &self.processes[node];
        for place in process.own.keys() {
            let entry = process.registry.find(TCP, place.address);
            if entry.is_none_or(|entry| entry.source != Source::Connection(1)) {
                return Err(Violation(format!("{} does not serve its own {place}", process.id)));
            }
        }
        Ok(())
    }

    /// A watch says nothing any more just when a backend joins elsewhere: the last change must not be missed.
    pub fn last_change(&mut self) {
        self.store.silence(0);
        self.join(1, &place(plan::PLACES));
    }

    /// Everything that has befallen is over.
    pub fn mend(&mut self) {
        self.store.paused_until = self.store.paused_until.min(self.now);
        self.store.is_full = false;
        for process in &mut self.processes {
            process.is_cut = false;
            process.paused_until = process.paused_until.min(self.now);
            process.arrives = process.arrives.min(self.now);
        }
    }

    /// After a while in which nothing has happened, all know the same, and that is the truth.
    pub fn is_settled(&mut self) -> Result<(), Violation> {
        let truth: BTreeSet<&Place> = self.processes.iter().flat_map(|it| it.own.keys()).collect();
        let truth: BTreeSet<SocketAddr> = truth.into_iter().map(|place| place.address).collect();
        let mut first: Option<Known> = None;
        for process in &mut self.processes {
            let known = Known::of(&mut process.registry);
            let here: BTreeSet<SocketAddr> = known.backends.keys().copied().collect();
            if here != truth {
                let (more, less) = (here.difference(&truth), truth.difference(&here));
                let (more, less): (Vec<_>, Vec<_>) = (more.collect(), less.collect());
                let what = format!("{} knows {more:?} too many, and lacks {less:?}", process.id);
                return Err(Violation(what));
            }
            let summary = process.share.summary();
            if summary.unwritten + summary.orphans > 0 || !summary.is_present {
                return Err(Violation(format!("{} is not at rest: {summary:?}", process.id)));
            }
            match &first {
                Some(first) if *first != known => {
                    let what = format!(
                        "{} chooses otherwise: {:?}, not {:?}",
                        process.id, known.backends, first.backends
                    );
                    return Err(Violation(what));
                }
                _ => first = Some(known),
            }
        }
        let count = |kind: &str| self.store.sealed_keys().filter(|key| key.contains(kind)).count();
        let own: usize = self.processes.iter().map(|it| it.own.len()).sum();
        if (count("/node/"), count("/back/")) != (plan::NODES, own) {
            let keys: Vec<&str> = self.store.sealed_keys().collect();
            return Err(Violation(format!("the store has {keys:#?}")));
        }
        self.counts[3] += 1;
        Ok(())
    }
}

/// What decides who is given which user.
#[derive(PartialEq)]
struct Known {
    backends: BTreeMap<SocketAddr, (u16, Standing)>,
    table: Option<Arc<[u16]>>,
}

impl Known {
    fn of(registry: &mut Registry) -> Known {
        let snapshot = registry.freeze(false);
        let all = registry.entries().map(|entry| &entry.backend);
        let backends = all.map(|it| (it.address, (it.weight, it.standing))).collect();
        let table = snapshot.pool(TCP).and_then(|pool| pool.table.as_ref());
        Known { backends, table: table.map(|table| table.slots().into()) }
    }
}
