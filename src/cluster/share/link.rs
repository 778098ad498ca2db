//! The way to the store: when to connect, what to ask, and when to give up. Owns the states of the connection, the
//! lease, and the clocks of whatever is under way.
//!
//! ```text
//! Down -> Opening -> Listing -> Live      any -- lost, refused, late --> Down (100 ms .. 1 s, next endpoint)
//!                       ^         |
//!                       +---------+  compacted, or what is known here differs from what is there
//! ```

use std::time::Duration;

use super::event::Command;
use crate::base::time::Now;

/// How long each may take.
const LIST_TAKES: Duration = Duration::from_secs(5);
const LEASE_TAKES: Duration = Duration::from_millis(1500);
/// A question that was asked while there was no leader may hang for longer than one that is asked again once there
/// is. Where it takes longer every time, it is given more time each.
const OPEN_TAKES: Duration = Duration::from_millis(500);
const OPEN_WAITS: u32 = 2;
/// When the leader has died, a batch under way hangs for longer than the next one takes.
const WRITE_TAKES: Duration = Duration::from_secs(1);
const AUDIT_TAKES: Duration = Duration::from_millis(1500);
/// How often what is known here is held against the store. A watch that has gone silent shows in nothing else.
const AUDIT_EVERY: Duration = Duration::from_secs(2);
/// How long the two may differ, as what has happened may be on its way.
const DOUBT_LASTS: Duration = Duration::from_secs(1);
/// How long after an audit, and after a batch, the store still counts as being there.
const PRESENCE_LASTS: Duration = Duration::from_secs(4);
/// Waits before the next connection. They grow once every endpoint has been tried.
const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(1);
/// How long nothing is asked again that was refused.
const REFUSED_WAIT: Duration = Duration::from_secs(1);

/// Where the connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Down { until: Now },
    Opening { since: Now },
    Listing { since: Now },
    Live,
}

impl Phase {
    /// The word in the status.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Down { .. } => "down",
            Phase::Opening { .. } => "opening",
            Phase::Listing { .. } => "listing",
            Phase::Live => "live",
        }
    }
}

/// The lease of all our keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lease {
    None,
    Asked(Now),
    /// Whether this connection has shown that it lives.
    Held {
        id: i64,
        is_sure: bool,
    },
}

/// A batch under way.
#[derive(Clone, Debug)]
struct Writing {
    since: Now,
    keys: Vec<String>,
    /// Its revision, once it is written; what is known here has yet to get there.
    revision: Option<i64>,
}

/// An audit under way.
#[derive(Clone, Copy, Debug)]
struct Auditing {
    since: Now,
    /// What had been heard when it was asked for. Its answer is no older, though what a watch tells may overtake it.
    revision: i64,
}

/// An audit that what is known here does not agree with, yet.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    since: Now,
    count: usize,
    newest: i64,
}

/// The connection to the store.
#[derive(Debug)]
pub struct Link {
    phase: Phase,
    lease: Lease,
    lease_lasts: Duration,
    endpoints: usize,
    attempt: usize,
    wait: Duration,
    writing: Option<Writing>,
    /// No batch before.
    write_after: Now,
    grant_after: Now,
    renew_at: Now,
    renewing: Option<Now>,
    audit_at: Now,
    auditing: Option<Auditing>,
    /// The last audit that agreed,
    agreed: Option<Now>,
    /// and the last batch that was written, over this connection.
    wrote: Option<Now>,
    doubt: Option<Doubt>,
    /// Why the last connection ended, or what was refused last.
    pub trouble: Option<String>,
    pub has_listed: bool,
    pub lost: u64,
    pub relisted: u64,
}

impl Link {
    /// To a store of so many members.
    pub fn new(endpoints: usize, lease_lasts: Duration, now: Now) -> Link {
        Link {
            phase: Phase::Down { until: now },
            lease: Lease::None,
            lease_lasts,
            endpoints: endpoints.max(1),
            attempt: 0,
            wait: WAIT_MIN,
            writing: None,
            write_after: now,
            grant_after: now,
            renew_at: now,
            renewing: None,
            audit_at: now,
            auditing: None,
            agreed: None,
            wrote: None,
            doubt: None,
            trouble: None,
            has_listed: false,
            lost: 0,
            relisted: 0,
        }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// The connection that is the present one.
    pub fn attempt(&self) -> usize {
        self.attempt
    }

    /// Whether what is known here has lately been found to be what is there, and the store has lately taken what
    /// was written.
    pub fn is_present(&self, now: Now) -> bool {
        let lately = |at: Option<Now>| at.is_some_and(|at| now.since(at) <= PRESENCE_LASTS);
        self.is_live() && lately(self.agreed) && lately(self.wrote)
    }

    /// Whether a batch should be written to see whether the store takes it: others, too, may be unable to say that
    /// they are there.
    pub fn should_try(&self, now: Now) -> bool {
        let is_old = |at: Now| now.since(at) >= PRESENCE_LASTS / 2;
        self.may_write(now).is_some() && self.wrote.is_none_or(is_old)
    }

    /// Lets go of the connection.
    pub fn drop_it(&mut self, said: String, now: Now, out: &mut Vec<Command>) {
        if !matches!(self.phase, Phase::Down { .. }) {
            out.push(Command::Close);
            self.lost += 1;
        }
        self.trouble = Some(said);
        self.phase = Phase::Down { until: now.plus(self.wait) };
        self.attempt += 1;
        if self.attempt.is_multiple_of(self.endpoints) {
            self.wait = (self.wait * 2).min(WAIT_MAX);
        }
        (self.writing, self.renewing, self.auditing, self.doubt) = (None, None, None, None);
        (self.agreed, self.wrote) = (None, None);
        self.lease = match self.lease {
            Lease::Held { id, .. } => Lease::Held { id, is_sure: false },
            _ => Lease::None,
        };
    }

    /// There is a connection: all there is must be heard first.
    pub fn opened(&mut self, now: Now, out: &mut Vec<Command>) {
        self.list(now, out);
        match self.lease {
            Lease::Held { id, .. } => self.renew(id, now, out),
            _ => self.grant(now, out),
        }
    }

    /// All that is there is to be heard anew.
    pub fn list(&mut self, now: Now, out: &mut Vec<Command>) {
        self.phase = Phase::Listing { since: now };
        self.doubt = None;
        out.push(Command::List);
    }

    /// It has been.
    pub fn listed(&mut self, revision: i64, now: Now, out: &mut Vec<Command>) {
        self.phase = Phase::Live;
        self.has_listed = true;
        self.agreed = Some(now);
        self.audit_at = now.plus(AUDIT_EVERY);
        self.renewing = self.renewing.map(|_| now);
        if let Lease::Asked(since) = &mut self.lease {
            *since = now;
        }
        out.push(Command::Watch { from: revision + 1 });
    }

    fn grant(&mut self, now: Now, out: &mut Vec<Command>) {
        self.lease = Lease::Asked(now);
        out.push(Command::Grant);
    }

    fn renew(&mut self, lease: i64, now: Now, out: &mut Vec<Command>) {
        self.renewing = Some(now);
        out.push(Command::Renew { lease });
    }

    pub fn granted(&mut self, lease: i64, now: Now) {
        self.lease = Lease::Held { id: lease, is_sure: true };
        self.renew_at = now.plus(self.lease_lasts / 3);
    }

    pub fn renewed(&mut self, now: Now) {
        self.renewing = None;
        self.renew_at = now.plus(self.lease_lasts / 3);
        if let Lease::Held { is_sure, .. } = &mut self.lease {
            *is_sure = true;
        }
    }

    /// The lease is not there any more.
    pub fn lease_gone(&mut self) {
        (self.lease, self.renewing, self.writing) = (Lease::None, None, None);
    }

    /// What was asked for last was refused, and is not asked again at once. Without a first read there is no
    /// connection.
    pub fn refused(&mut self, said: String, now: Now, out: &mut Vec<Command>) {
        if let Phase::Opening { .. } = self.phase {
            return self.drop_it(said, now, out);
        }
        self.trouble = Some(said);
        self.writing = None;
        self.write_after = now.plus(REFUSED_WAIT);
        if matches!(self.lease, Lease::Asked(_)) {
            self.lease = Lease::None;
            self.grant_after = now.plus(REFUSED_WAIT);
        }
    }

    /// The lease to write under, if a batch may be written.
    pub fn may_write(&self, now: Now) -> Option<i64> {
        let is_free = self.is_live() && self.writing.is_none() && now >= self.write_after;
        match self.lease {
            Lease::Held { id, is_sure: true } if is_free => Some(id),
            _ => None,
        }
    }

    pub fn write(&mut self, keys: Vec<String>, now: Now) {
        self.writing = Some(Writing { since: now, keys, revision: None });
    }

    /// The batch under way is in the store.
    pub fn written(&mut self, revision: i64, now: Now) {
        if let Some(writing) = &mut self.writing {
            (writing.revision, writing.since) = (Some(revision), now);
        }
        self.trouble = None;
    }

    /// The keys of the batch that has been written, once all up to it has been heard.
    pub fn heard_up_to(&mut self, revision: i64, now: Now) -> Option<Vec<String>> {
        let writing = self.writing.take_if(|it| it.revision.is_some_and(|it| it <= revision))?;
        self.wrote = Some(now);
        Some(writing.keys)
    }

    /// The revision that the answer to the audit under way is no older than, if the store is the same.
    pub fn audit_floor(&self) -> i64 {
        self.auditing.map_or(0, |it| it.revision)
    }

    /// What the store says there is.
    pub fn audited(&mut self, count: usize, newest: i64, now: Now) {
        self.auditing = None;
        self.audit_at = now.plus(AUDIT_EVERY);
        let since = self.doubt.map_or(now, |doubt| doubt.since);
        self.doubt = Some(Doubt { since, count, newest });
    }

    /// Holds it against what is known here: the number of keys, and the newest revision among them.
    pub fn compare(
        &mut self,
        sum: impl FnOnce() -> Option<(usize, i64)>,
        now: Now,
        out: &mut Vec<Command>,
    ) {
        let Some(doubt) = self.doubt else { return };
        let agrees = match sum() {
            // What is known here is newer than the audit, which the next one will be held against.
            Some((_, newest)) if newest > doubt.newest => true,
            Some((count, newest)) => (count, newest) == (doubt.count, doubt.newest),
            None => true,
        };
        if agrees {
            self.agreed = Some(now);
            self.doubt = None;
            self.wait = WAIT_MIN;
        } else if now.since(doubt.since) >= DOUBT_LASTS && self.is_live() {
            self.relisted += 1;
            self.list(now, out);
        }
    }

    /// What has fallen due; `revision` is the newest that was heard of.
    pub fn tick(&mut self, revision: i64, now: Now, out: &mut Vec<Command>) {
        let late = |since: Now, most: Duration| now.since(since) >= most;
        match self.phase {
            Phase::Down { until } if now >= until => {
                self.phase = Phase::Opening { since: now };
                out.push(Command::Open { attempt: self.attempt });
            }
            Phase::Opening { since } if late(since, OPEN_TAKES + self.wait * OPEN_WAITS) => {
                return self.drop_it("no member answers".to_owned(), now, out);
            }
            Phase::Listing { since } if late(since, LIST_TAKES) => {
                return self.drop_it("the list of keys does not come".to_owned(), now, out);
            }
            Phase::Down { .. } | Phase::Opening { .. } => return,
            Phase::Listing { .. } | Phase::Live => {}
        }
        // What is asked for on a new connection is not answered before the list.
        let in_turn = |since: Option<Now>| since.filter(|_| self.is_live());
        let auditing = self.auditing.map(|it| it.since);
        let overdue = [
            (in_turn(self.renewing), LEASE_TAKES, "the lease is not renewed"),
            (auditing, AUDIT_TAKES, "reads are not answered"),
            (in_turn(self.asked_lease()), LEASE_TAKES, "no lease is granted"),
            (self.writing_since(false), WRITE_TAKES, "writes are not answered"),
        ];
        let overdue =
            overdue.into_iter().find(|(since, most, _)| since.is_some_and(|at| late(at, *most)));
        if let Some((_, _, said)) = overdue {
            return self.drop_it(said.to_owned(), now, out);
        }
        if !matches!(self.phase, Phase::Live) {
            return;
        }
        if self.writing_since(true).is_some_and(|at| late(at, DOUBT_LASTS)) {
            // It is written, and the watch has not told of it.
            self.writing = None;
            self.relisted += 1;
            return self.list(now, out);
        }
        if self.auditing.is_none() && now >= self.audit_at {
            self.auditing = Some(Auditing { since: now, revision });
            out.push(Command::Audit);
        }
        match self.lease {
            Lease::Held { id, .. } if self.renewing.is_none() && now >= self.renew_at => {
                self.renew(id, now, out);
            }
            Lease::None if now >= self.grant_after => self.grant(now, out),
            _ => {}
        }
    }

    fn asked_lease(&self) -> Option<Now> {
        match self.lease {
            Lease::Asked(since) => Some(since),
            _ => None,
        }
    }

    fn writing_since(&self, is_written: bool) -> Option<Now> {
        let writing = self.writing.as_ref().filter(|it| it.revision.is_some() == is_written);
        writing.map(|it| it.since)
    }
}
