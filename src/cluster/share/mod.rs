//! One registry for several balancers, over a store that none of them trusts. Owns what is said in the store, and
//! what to make of what others say there; opens no connection and reads no clock.
//!
//! # The rules
//!
//! 1. Each key has one writer in all its life, and says what that balancer has registered. A backend may be
//!    registered at several; it is there for as long as one of them says so, and the newest word gives its weight,
//!    name and state.
//! 2. A word is taken back by another word (`left`, `lost`), which stands for a while before the key goes. A key that
//!    vanishes otherwise (a lease that ended, a prefix that somebody deleted, a backup that was restored) takes
//!    nobody away: it starts a clock.
//! 3. That clock runs only while our own presence is in the store, the store agrees with what is known here, and it
//!    takes what is written. So nothing is taken away while the store is away or full, nor when it has just come back
//!    and has forgotten everybody.
//! 4. What is said here is written until it stands in the store, whatever happens to it there.
//! 5. What is registered here is served here, whether it can be written or not.

pub mod event;
pub mod key;
mod link;
mod mirror;
mod own;
pub mod seal;
pub mod value;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::registry::DrainedBy;
use crate::base::time::Now;
use event::{Change, Command, Event, Refusal, Row};
use key::{NodeId, Place, Prefix};
use link::Link;
pub use link::Phase;
pub use mirror::Peer;
use mirror::{Heard, Mirror};
use own::Own;
use seal::Seal;
use value::{NodeReport, Offer, State, Verb};

/// The longest step of the clock of rule 3: we may have been stopped ourselves.
const STEP_MAX: Duration = Duration::from_secs(1);
/// How often a report that nobody acts on is written.
const REPORT_EVERY: Duration = Duration::from_secs(30);
/// How soon after another one a report is.
const REPORT_REST: Duration = Duration::from_millis(250);

/// What is agreed in a cluster, and who this is.
#[derive(Clone, Debug)]
pub struct Membership {
    pub cluster: String,
    pub me: NodeId,
    pub seal: Seal,
    /// The host and network namespace, in which loopback means the same.
    pub host: Arc<str>,
    /// How many members of the store can be asked.
    pub endpoints: usize,
    pub lease: Duration,
    /// How long a backend goes on whose balancer is not heard of.
    pub orphan: Duration,
}

#[cfg(test)]
impl Membership {
    /// One without secrets, with the clocks of the usual settings.
    pub(crate) fn of_test(node: &str, process: u32) -> Membership {
        Membership {
            cluster: "c".to_owned(),
            me: NodeId::new(node, process),
            seal: Seal::default(),
            host: "here".into(),
            endpoints: 3,
            lease: Duration::from_secs(10),
            orphan: Duration::from_secs(15),
        }
    }
}

/// The state of a process in whose place another serves.
const SUCCEEDED: &str = "succeeded";

/// What the registry was told of a place last.
type Shown = (NodeId, Offer);

/// The state of a cluster as one of its balancers knows it.
pub struct Share {
    me: NodeId,
    prefix: Prefix,
    orphan: Duration,
    link: Link,
    mirror: Mirror,
    own: Own,
    store: Option<u64>,
    shown: BTreeMap<Place, Shown>,
    commands: Vec<Command>,
    changes: Vec<Change>,
    aged: Now,
    report: Option<NodeReport>,
    reported: Now,
}

impl Share {
    pub fn new(membership: Membership, now: Now) -> Share {
        let Membership { cluster, me, seal, host, endpoints, lease, orphan } = membership;
        let prefix = Prefix::new(&cluster);
        Share {
            link: Link::new(endpoints, lease, now),
            mirror: Mirror::new(prefix.clone(), seal.clone(), me.clone(), host),
            own: Own::new(prefix.clone(), seal, me.clone()),
            me,
            prefix,
            orphan,
            store: None,
            shown: BTreeMap::new(),
            commands: Vec::new(),
            changes: Vec::new(),
            aged: now,
            report: None,
            reported: Now::default(),
        }
    }

    /// Where all keys begin.
    pub fn prefix(&self) -> &Prefix {
        &self.prefix
    }

    pub fn me(&self) -> &NodeId {
        &self.me
    }

    /// What this balancer says of a place from now on. A word that a backend has left ([`Offer::is_claim`]) is said
    /// only of one that was said to be there.
    pub fn say(&mut self, place: &Place, offer: Offer, now: Now) {
        let shown = self.shown.get(place).filter(|_| offer.is_claim());
        let again = shown.is_some_and(|(_, shown)| *shown != offer.with(shown.state));
        if self.own.say(place, offer, again, now) {
            self.show(place);
            self.write(now);
        }
    }

    /// What this balancer says of itself. Called as often as one likes.
    pub fn report(&mut self, report: NodeReport, now: Now) {
        self.report = Some(report);
        self.report_if_due(now);
    }

    /// Says the last that is to be said of this balancer: another process serves in its place, and counts what this one
    /// still has.
    pub fn part(&mut self, now: Now) {
        let Some(report) = self.own.reported().cloned() else { return };
        self.own.report(NodeReport { state: SUCCEEDED.to_owned(), ..report });
        self.report = None;
        self.write(now);
    }

    /// Whether the store is known to have all that is said here.
    pub fn has_said_all(&self) -> bool {
        !self.own.has_work()
    }

    fn report_if_due(&mut self, now: Now) {
        let Some(wanted) = &self.report else { return };
        let rest = now.since(self.reported);
        let is_due = match self.own.reported() {
            None => true,
            Some(before) if wanted.is_news_after(before) => rest >= REPORT_REST,
            Some(before) => wanted != before && rest >= REPORT_EVERY,
        };
        if is_due {
            self.reported = now;
            self.own.report(wanted.clone());
            self.write(now);
        }
    }

    /// Asks something of every balancer where that backend is registered. Returns how many were asked; none are if
    /// the store is away.
    pub fn ask(&mut self, place: &Place, verb: &Verb, now: Now) -> usize {
        if !self.link.is_live() {
            return 0;
        }
        let owners = self.mirror.owners(place);
        let asked = owners.iter().filter(|owner| self.own.ask(owner, place, verb, now)).count();
        self.write(now);
        asked
    }

    /// The store, or the way to it, has said something, over the connection that was made at this attempt.
    pub fn hear(&mut self, attempt: usize, event: Event, now: Now) {
        if attempt != self.link.attempt() || matches!(self.link.phase(), Phase::Down { .. }) {
            return;
        }
        match event {
            Event::Opened { store, revision } => {
                self.recognise(store, revision, self.mirror.revision);
                self.link.opened(now, &mut self.commands);
            }
            Event::Granted { lease } => self.link.granted(lease, now),
            Event::Renewed => self.link.renewed(now),
            Event::LeaseGone | Event::Refused { why: Refusal::LeaseGone, .. } => {
                self.link.lease_gone()
            }
            Event::Listed { revision, rows } => self.listed(revision, &rows, now),
            Event::Changed { revision, puts, deletes } => {
                self.changed(revision, &puts, &deletes);
            }
            Event::Compacted => self.link.list(now, &mut self.commands),
            Event::Written { revision } => self.link.written(revision, now),
            Event::Refused { said, .. } => self.link.refused(said, now, &mut self.commands),
            Event::Audited { store, revision, count, newest } => {
                if self.recognise(store, revision, self.link.audit_floor()) {
                    self.link.list(now, &mut self.commands);
                } else {
                    self.link.audited(count, newest, now);
                }
            }
            Event::Lost { said } => self.link.drop_it(said, now, &mut self.commands),
        }
        self.advance(now);
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Now) {
        self.link.tick(self.mirror.revision, now, &mut self.commands);
        let step = now.since(self.aged).min(STEP_MAX);
        self.aged = now;
        if self.mirror.orphans() > 0
            && self.link.should_try(now)
            && let Some(report) = self.own.reported().cloned()
        {
            self.own.report(report);
        }
        // Rule 3.
        if self.link.is_present(now) && self.own.is_present() {
            self.mirror.age(step, self.orphan);
        }
        self.own.expire(now);
        self.report_if_due(now);
        self.advance(now);
    }

    fn advance(&mut self, now: Now) {
        self.link.compare(|| self.mirror.sum(), now, &mut self.commands);
        if let Some(keys) = self.link.heard_up_to(self.mirror.revision, now) {
            self.own.written(&keys);
        }
        for place in self.mirror.touched() {
            self.show(&place);
        }
        self.write(now);
    }

    /// Whether this is another store, or a state of the same that is older than `least`. Nothing that is known is
    /// given up for that.
    fn recognise(&mut self, store: u64, revision: i64, least: i64) -> bool {
        let is_other = self.store.is_some_and(|known| known != store) || revision < least;
        self.store = Some(store);
        if is_other {
            self.mirror.other_store();
            self.own.forget_stored();
        }
        is_other
    }

    fn listed(&mut self, revision: i64, rows: &[Row], now: Now) {
        self.mirror.begin_list(revision);
        self.own.forget_stored();
        rows.iter().for_each(|row| self.put(row));
        self.mirror.end_list();
        self.link.listed(revision, now, &mut self.commands);
    }

    fn changed(&mut self, revision: i64, puts: &[Row], deletes: &[(String, i64)]) {
        // A deletion and a write of one key come in one event only if they are of different revisions.
        let mut all: Vec<(i64, Result<&Row, &str>)> =
            puts.iter().map(|row| (row.revision, Ok(row))).collect();
        all.extend(deletes.iter().map(|(key, at)| (*at, Err(key.as_str()))));
        all.sort_by_key(|(at, _)| *at);
        for (at, change) in all {
            match change {
                Ok(row) => self.put(row),
                Err(key) => {
                    if self.mirror.delete(key, at) {
                        self.own.lost(key);
                        self.touched_by_own(key);
                    }
                }
            }
        }
        self.mirror.revision = self.mirror.revision.max(revision);
    }

    fn put(&mut self, row: &Row) {
        match self.mirror.put(row) {
            Heard::Nothing => {}
            Heard::Own => {
                self.own.heard(&row.key, &row.value, row.revision);
                self.touched_by_own(&row.key);
            }
            Heard::Asked { place, verb, from } => {
                if self.own.acted_on(&row.key) {
                    self.changes.push(Change::Asked { place, verb, from: from.to_string() });
                }
            }
        }
    }

    /// Whether our own word is newer than the others' may be another matter once all has been heard.
    fn touched_by_own(&mut self, key: &str) {
        if let Some(key::Key::Back(_, place)) = self.prefix.parse(key) {
            self.mirror.touch(place);
        }
    }

    /// Tells the registry what holds of a place that others have, if that is not what it was told last.
    fn show(&mut self, place: &Place) {
        let own = self.own.about(place);
        let Some((owner, theirs, revision)) = self.mirror.prevailing(place) else {
            let why = self.mirror.why_gone(place);
            if self.shown.remove(place).is_some() {
                if let Some((own, _)) = own {
                    // What others have said of it goes with them.
                    let (owner, offer) = (self.me.clone(), own.with(State::Serving));
                    self.changes.push(Change::Claim { place: place.clone(), offer, owner });
                }
                self.changes.push(Change::Unclaim { place: place.clone(), why });
            }
            return;
        };
        let offer = match own {
            Some((own, written)) if written.is_none_or(|own| own >= revision) => {
                // It may have come here since it asked to leave there.
                own.with(theirs.state.unless_asked_by(DrainedBy::Owner))
            }
            _ => theirs,
        };
        let shown = (owner.clone(), offer);
        if self.shown.get(place) != Some(&shown) {
            self.shown.insert(place.clone(), shown.clone());
            let (place, (owner, offer)) = (place.clone(), shown);
            self.changes.push(Change::Claim { place, offer, owner });
        }
    }

    fn write(&mut self, now: Now) {
        let Some(lease) = self.link.may_write(now).filter(|_| self.own.has_work()) else { return };
        let ops = self.own.batch();
        self.link.write(ops.iter().map(|op| op.key().to_owned()).collect(), now);
        self.commands.push(Command::Write { lease, ops });
    }

    /// What is to be done at the store.
    pub fn commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// What the registry is to take over.
    pub fn changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// What the registry was told last of every place that others have.
    pub fn claims(&self) -> impl Iterator<Item = (&Place, &NodeId, &Offer)> {
        self.shown.iter().map(|(place, (owner, offer))| (place, owner, offer))
    }

    /// Every drain that another balancer runs, as it is reported on (`<node>~<hex8>#<number>`), and of what.
    pub fn partings(&self) -> impl Iterator<Item = (String, &Place)> {
        self.mirror.partings().map(|(node, place, number)| (parting(node, number), place))
    }

    /// How a drain of ours goes elsewhere: the sessions left, those that were ended, and how many balancers have said
    /// nothing of it.
    pub fn drained(&self, number: u64) -> (u64, u64, usize) {
        let name = parting(&self.me, number);
        let reports = self.peers().filter(|(_, peer)| peer.is_stored);
        reports.fold((0, 0, 0), |(left, cut, silent), (_, peer)| {
            match peer.report.drains.get(&name) {
                Some((more, ended)) => {
                    (left.saturating_add(*more), cut.saturating_add(*ended), silent)
                }
                None => (left, cut, silent + 1),
            }
        })
    }

    /// The other balancers, without processes that others have succeeded.
    pub fn peers(&self) -> impl Iterator<Item = (&NodeId, &Peer)> {
        self.mirror.nodes().filter(|(_, peer)| peer.report.state != SUCCEEDED)
    }

    pub fn phase(&self) -> Phase {
        self.link.phase()
    }

    pub fn summary(&self) -> Summary {
        Summary {
            phase: self.link.phase(),
            revision: self.mirror.revision,
            trouble: self.link.trouble.clone(),
            unwritten: self.own.unwritten(),
            orphans: self.mirror.orphans(),
            rejected: self.mirror.rejected,
            lost: self.link.lost,
            relisted: self.link.relisted,
            is_present: self.own.is_present(),
        }
    }

    /// What this balancer has said of itself.
    pub fn reported(&self) -> Option<&NodeReport> {
        self.own.reported()
    }

    /// How many backends it says are registered at it.
    pub fn said(&self) -> usize {
        self.own.said()
    }

    /// Whether all that was in the store has been heard once.
    pub fn has_listed(&self) -> bool {
        self.link.has_listed
    }

    /// How many words a balancer has about backends.
    pub fn claims_of(&self, node: &NodeId) -> usize {
        self.mirror.claims_of(node)
    }
}

/// How a drain is named in reports.
pub fn parting(node: &NodeId, number: u64) -> String {
    format!("{node}#{number}")
}

/// The state of the cluster in numbers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Summary {
    pub phase: Phase,
    /// The newest revision of the store that was heard of.
    pub revision: i64,
    /// Why the last connection ended, or what was refused last.
    pub trouble: Option<String>,
    /// Backends of ours that the others have yet to hear of.
    pub unwritten: usize,
    /// Words of others that the store has lost and that still hold.
    pub orphans: usize,
    /// Values that nobody of the cluster can have written, or too many.
    pub rejected: u64,
    /// Connections lost.
    pub lost: u64,
    /// Times that what was known here was not what was there.
    pub relisted: u64,
    /// Whether others can see that this balancer is there.
    pub is_present: bool,
}

#[cfg(test)]
mod tests;
