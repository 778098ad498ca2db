//! The checks of backends: which backend is checked and how, by the settings of its service, and what
//! follows from an outcome. Owns what is known of each backend's check, and the sessions that end with a
//! failure. When a check begins and what a run of outcomes means is decided in `checks`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

use super::{Hub, Mark};
use crate::base::time::Now;
use crate::cluster::registry::{Change, Registration};
use crate::cluster::service::Pool;
use crate::cluster::{AskedCheck, Backend, BackendId, Protocol, ServiceId, Standing};
use crate::config::services::{CheckConfig, CheckKind, OnFail, ServiceConfig};
use crate::control::checker::{Failure, Target};
use crate::control::checks::{Checks, Due, Rule, Verdict};
use crate::control::contact::Port;
use crate::control::home;
use crate::control::legacy::format;
use crate::session::EndReason;
use crate::tls::backends::{BackendSpeech, BackendTls};

/// The longest wait for something to check. Whoever joins ends it.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// What is known of a backend's check.
#[derive(Clone, Debug)]
pub struct Checked {
    pub verdict: Verdict,
    /// When the verdict was given.
    pub since: Now,
    /// When the last check ended, how long it took, and why it failed if it did.
    pub last: Now,
    pub took: Duration,
    pub failure: Option<Box<str>>,
}

/// The checks of all backends that have one.
pub struct Checking {
    checks: Checks,
    outcomes: BTreeMap<BackendId, Checked>,
    /// Backends whose sessions end because their check has failed, until every worker has seen that they
    /// get no new ones.
    ending: BTreeMap<BackendId, Mark>,
    /// Those whose sessions end once it is published that they get no new ones.
    condemned: BTreeSet<BackendId>,
    wanted: Rc<Notify>,
}

impl Checking {
    pub fn new(now: Now) -> Checking {
        Checking {
            checks: Checks::new(now),
            outcomes: BTreeMap::new(),
            ending: BTreeMap::new(),
            condemned: BTreeSet::new(),
            wanted: Rc::default(),
        }
    }
}

fn due(backend: &Backend) -> Due {
    Due { slot: backend.slot, id: backend.id, service: backend.service }
}

fn rule(check: &CheckConfig) -> Rule {
    Rule { interval: check.interval, rise: check.rise, fall: check.fall }
}

/// A part of the interval that is far from those of the backends before and after: multiples of the golden
/// ratio, without their whole part, are spread evenly however many there are.
fn offset(id: BackendId, interval: Duration) -> Duration {
    const GOLDEN: u32 = 0x9e37_79b9;
    interval.mul_f64(f64::from(id.0.wrapping_mul(GOLDEN)) / f64::from(u32::MAX))
}

/// Whether nobody in this pool gets users because checks fail.
pub fn is_failing(pool: Option<&Pool>) -> bool {
    pool.is_some_and(|pool| pool.is_failing)
}

impl Hub {
    /// Rung when a check may have become due earlier than was said.
    pub fn checks_wanted(&self) -> Rc<Notify> {
        Rc::clone(&self.checking.wanted)
    }

    /// The next check to carry out now, if there is one.
    pub fn next_check(&mut self, now: Now) -> Option<(Due, Target)> {
        while !self.is_handed_over {
            let due = self.checking.checks.begin(now)?;
            let backend = self.registry.get(due.id).map(|entry| &entry.backend);
            let wanted = backend.and_then(|it| Some((self.check_of(it)?, self.port_of(it))));
            if let Some((check, port)) = wanted {
                let mut target = Target::of(&check, port);
                target.is_own_door = check.port.is_some() && self.is_own_door(target.port.address);
                return Some((due, target));
            }
            // Nobody is left whose check it would be.
            self.checking.checks.remove(due);
            self.checking.checks.came_to_nothing(due, now);
        }
        None
    }

    /// Whether a check there would ask the balancer itself.
    fn is_own_door(&self, address: SocketAddr) -> bool {
        let (listen, named) = (&self.config.listen, &self.config.services);
        let global = [listen.tcp, listen.api, listen.api_tls, listen.control, listen.admin];
        let named = named.iter().filter(|it| it.protocol != Protocol::Udp);
        let named = named.flat_map(ServiceConfig::doors);
        let mut close = global.into_iter().flatten().chain(named);
        close.any(|door| {
            door.port() == address.port() && home::leads_to(door, address, &home::is_of_this_host)
        })
    }

    /// How long there is nothing to check.
    pub fn checks_rest(&self, now: Now) -> Duration {
        let next = self.checking.checks.next_deadline().filter(|_| !self.is_handed_over);
        next.map_or(WAIT_MAX, |at| at.since(now).min(WAIT_MAX))
    }

    /// A check has ended.
    pub fn checked(&mut self, due: Due, outcome: Result<(), Failure>, took: Duration, now: Now) {
        if self.is_handed_over {
            return;
        }
        let outcome = match outcome {
            Err(Failure { sentence, is_ours: true }) => {
                return self.check_came_to_nothing(due, &sentence, now);
            }
            outcome => outcome.map_err(|failure| failure.sentence),
        };
        self.counters.checks.one();
        self.counters.checks_failed.add(u64::from(outcome.is_err()));
        let passed = outcome.is_ok();
        let turned = self.checking.checks.ended(due, passed, now);
        self.checking.wanted.notify_one();
        let Some(verdict) = self.checking.checks.verdict(due) else { return };
        let failure = outcome.err().map(String::into_boxed_str);
        let before = self.checking.outcomes.get(&due.id).map(|it| it.since);
        let since = before.filter(|_| turned.is_none()).unwrap_or(now);
        if turned.is_some() {
            self.judged(due.id, failure.as_deref(), now);
        }
        let checked = Checked { verdict, since, last: now, took, failure };
        self.checking.outcomes.insert(due.id, checked);
    }

    /// A check could not be carried out for want of something on this host, which is not held against the
    /// backend.
    fn check_came_to_nothing(&mut self, due: Due, why: &str, now: Now) {
        self.counters.checks_not_run.one();
        self.checking.checks.came_to_nothing(due, now);
        self.checking.wanted.notify_one();
        let Some(entry) = self.registry.get(due.id) else { return };
        let service = Rc::from(&*self.registry.service(entry.backend.service).name);
        let backend = entry.backend.clone();
        self.console.check_not_run(now, &service, &backend, why);
    }

    /// What is known of a backend's check; `None` before the first has ended, and if there is none.
    pub fn check_result(&self, id: BackendId) -> Option<&Checked> {
        self.checking.outcomes.get(&id)
    }

    /// A backend has joined.
    pub(super) fn begin_checks(&mut self, id: BackendId, now: Now) {
        self.check_from(id, Verdict::Unproven, now);
    }

    fn check_from(&mut self, id: BackendId, verdict: Verdict, now: Now) {
        let Some(entry) = self.registry.get(id) else { return };
        let Some(check) = self.check_of(&entry.backend) else { return };
        let (due, rule) = (due(&entry.backend), rule(&check));
        self.checking.checks.add(due, rule, verdict, offset(id, rule.interval), now);
        self.checking.wanted.notify_one();
    }

    /// How the check of a backend stands, in the form for a successor.
    pub(super) fn describe_check(&self, backend: &Backend) -> Option<format::Checked> {
        let (verdict, contrary, next) = self.checking.checks.standing(due(backend))?;
        let outcome = self.checking.outcomes.get(&backend.id).map(|it| format::Outcome {
            verdict: it.verdict,
            since: it.since,
            last: it.last,
            took: it.took,
            failure: it.failure.as_deref().map(str::to_owned),
        });
        let id = &backend.id;
        let ends = self.checking.ending.contains_key(id) || self.checking.condemned.contains(id);
        Some(format::Checked { verdict, contrary, next, outcome, ends })
    }

    /// Goes on with it, if the backend is still to be checked.
    pub(super) fn inherit_check(&mut self, id: BackendId, from: &format::Checked, now: Now) {
        let Some(entry) = self.registry.get(id) else { return };
        let Some(check) = self.check_of(&entry.backend) else { return };
        let standing = (from.verdict, from.contrary, from.next);
        self.checking.checks.go_on(due(&entry.backend), rule(&check), standing, now);
        if let Some(outcome) = &from.outcome {
            let failure = outcome.failure.as_deref().map(Box::from);
            let format::Outcome { verdict, since, last, took, .. } = *outcome;
            let checked = Checked { verdict, since, last, took, failure };
            self.checking.outcomes.insert(id, checked);
        }
        if from.ends && check.on_fail == OnFail::Close {
            self.checking.condemned.insert(id);
        }
    }

    /// A backend has left, or is checked no more.
    pub(super) fn end_checks(&mut self, backend: &Backend) {
        self.checking.checks.remove(due(backend));
        self.checking.outcomes.remove(&backend.id);
        self.checking.ending.remove(&backend.id);
        self.checking.condemned.remove(&backend.id);
    }

    /// Every backend is checked as the settings say now.
    pub(super) fn follow_checks(&mut self, now: Now) {
        let all: Vec<Backend> = self.registry.entries().map(|it| it.backend.clone()).collect();
        for backend in all {
            self.follow_check(&backend, now);
        }
    }

    /// A backend is checked as it is to be checked now.
    pub(super) fn follow_check(&mut self, backend: &Backend, now: Now) {
        let is_checked = self.checking.checks.verdict(due(backend)).is_some();
        match self.check_of(backend).map(|check| rule(&check)) {
            Some(rule) if is_checked => self.checking.checks.follow(due(backend), rule, now),
            // One that serves already has to fail as often as any other.
            Some(_) => self.check_from(backend.id, Verdict::Passing, now),
            None => self.end_checks(backend),
        }
        self.checking.wanted.notify_one();
    }

    /// Ends once more what a worker may have begun on a failing backend before it knew of the failure.
    pub(super) fn advance_endings(&mut self) {
        let is_seen = |mark: &Mark| self.workers.have_passed(mark);
        let seen = self.checking.ending.iter().filter(|(_, mark)| is_seen(mark));
        let seen: Vec<BackendId> = seen.map(|(id, _)| *id).collect();
        for id in seen {
            self.checking.ending.remove(&id);
            if self.is_out_of_rotation(id) && self.sessions_on(id) > 0 {
                self.end_with_check(id);
            }
        }
        if !self.checking.ending.is_empty() {
            self.workers.wake();
        }
    }

    /// How a backend is checked, if it is: as its service says or, where that says nothing, as it has asked.
    pub fn check_of(&self, backend: &Backend) -> Option<CheckConfig> {
        let table = self.config.service(backend.service).map(|table| &table.check);
        if let Some(check) = table.filter(|check| check.kind != CheckKind::Off) {
            return Some(check.clone());
        }
        let asked = self.registry.get(backend.id)?.check.as_ref()?;
        let otherwise = table.cloned().unwrap_or_default();
        Some(match asked {
            AskedCheck::Tcp => CheckConfig { kind: CheckKind::Tcp, ..otherwise },
            AskedCheck::Http(path) => {
                CheckConfig { kind: CheckKind::Http, path: path.to_string(), ..otherwise }
            }
            AskedCheck::Grpc(service) => {
                let grpc_service = service.to_string();
                CheckConfig { kind: CheckKind::Grpc, grpc_service, ..otherwise }
            }
        })
    }

    /// Where a backend serves, and how a connection to it begins.
    pub fn port_of(&self, backend: &Backend) -> Port {
        let Backend { service, address, proxy, http2, ref tls, .. } = *backend;
        let speech = match self.check_of(backend).map(|check| check.kind) {
            // Its version is the check's, whatever users are served by.
            Some(CheckKind::Http) => self.speech(service, false),
            Some(CheckKind::Grpc) => BackendSpeech::Http2,
            _ => self.speech(service, http2),
        };
        self.port(address, proxy, speech, tls.as_ref())
    }

    /// The same for one that wants to join.
    pub fn port_wanted(&self, wanted: &Registration) -> Port {
        let Registration { service, address, proxy, http2, ref tls, .. } = *wanted;
        self.port(address, proxy, self.speech(service, http2), tls.as_ref())
    }

    /// What users of a service are served by.
    fn speech(&self, service: ServiceId, http2: bool) -> BackendSpeech {
        match self.protocol_of(service) {
            Protocol::Api if http2 => BackendSpeech::Http2,
            Protocol::Api => BackendSpeech::Http1,
            _ => BackendSpeech::Anything,
        }
    }

    fn port(
        &self,
        address: SocketAddr,
        proxy: bool,
        speech: BackendSpeech,
        tls: Option<&BackendTls>,
    ) -> Port {
        let client = |tls| self.snapshot.tls.backends.client(tls, address.ip(), speech);
        Port { address, proxy, tls: tls.map(client) }
    }

    /// Whether a service's backends are checked as its table says.
    pub fn is_checked(&self, service: ServiceId) -> bool {
        let table = self.config.service(service);
        table.is_some_and(|table| table.check.kind != CheckKind::Off)
    }

    /// The verdict on a backend has turned: it fails for this reason, or passes.
    fn judged(&mut self, id: BackendId, failure: Option<&str>, now: Now) {
        let change = Change::Judge { backend: id, passes: failure.is_none() };
        self.make(change, now);
        let Some(entry) = self.registry.get(id) else { return };
        let service = Rc::from(&*self.registry.service(entry.backend.service).name);
        let backend = entry.backend.clone();
        self.console.backend_checked(now, &service, &backend, failure);
        let on_fail = self.check_of(&backend).map(|check| check.on_fail);
        if failure.is_some() && on_fail == Some(OnFail::Close) {
            // First that no session begins, then that those running end. Of a thousand that fail together,
            // workers are told once.
            self.checking.condemned.insert(id);
            if !self.publication.is_due() {
                self.end_condemned();
            }
        } else {
            self.checking.ending.remove(&id);
            self.checking.condemned.remove(&id);
        }
    }

    /// Ends the sessions of those whose failure has been published.
    pub(super) fn end_condemned(&mut self) {
        let condemned = std::mem::take(&mut self.checking.condemned);
        for id in &condemned {
            self.end_with_check(*id);
        }
        if !condemned.is_empty() {
            self.workers.wake();
        }
    }

    /// Wakes no worker; the caller does that once for all.
    fn end_with_check(&mut self, id: BackendId) {
        self.end_sessions_of(id, EndReason::CheckFailed);
        self.checking.ending.insert(id, self.workers.mark());
    }

    /// Whether a backend fails and gets no sessions for all that.
    fn is_out_of_rotation(&self, id: BackendId) -> bool {
        let Some(entry) = self.registry.get(id) else { return false };
        let pool = self.snapshot.pool(entry.backend.service);
        let tried = pool.is_some_and(|pool| pool.serves(id));
        entry.backend.standing == Standing::Failing && !tried
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::hub::tests::{at, check, config, hub, shown};

    #[test]
    fn a_check_that_could_not_be_run_is_held_against_nobody() {
        let (mut hub, _worker) = hub(config(&[(1, 1)], check()));
        let lack = || Failure { sentence: "no descriptor is left".to_owned(), is_ours: true };
        let mut outcomes = [Err(lack()), Ok(()), Err(lack()), Err(lack()), Err(lack())].into_iter();
        let mut now = at(20);
        for state in [Standing::Failing, Standing::Serving, Standing::Serving, Standing::Serving] {
            let (due, _) = hub.next_check(now).unwrap();
            hub.checked(due, outcomes.next().unwrap(), Duration::ZERO, now);
            assert_eq!(shown(&mut hub), [(1, 1, state)], "at {now:?}");
            now = now.plus(Duration::from_secs(10));
        }
        let counted = &hub.counters;
        let counted = [&counted.checks, &counted.checks_failed, &counted.checks_not_run];
        assert_eq!(counted.map(|counter| counter.get()), [1, 0, 3]);
        assert!(hub.check_result(hub.registry.entries().next().unwrap().backend.id).is_some());
    }
}
