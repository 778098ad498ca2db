//! Backends that are set aside, because their data port failed or because they leave requests unanswered:
//! who is, why, and how each is found to be back. Owns the waits and the rows of unanswered requests; how
//! long a wait is, and what a row comes to, is `health`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tracing::{info, warn};

use super::Hub;
use crate::base::time::Now;
use crate::cluster::registry::Change;
use crate::cluster::{BackendId, Protocol, ServiceId, Standing};
use crate::config::services::CheckConfig;
use crate::control::checker::{self, Failure, Target};
use crate::control::contact::Port;
use crate::control::health::{Revival, Silence};
use crate::control::probe;

/// The longest that a backend which left requests unanswered may take to answer a trial.
const TRIAL_MAX: Duration = Duration::from_secs(5);

/// An attempt to find out whether a backend that was set aside is back.
pub struct Attempt {
    /// How long to leave the backend alone first.
    pub wait: Duration,
    pub trial: Trial,
}

/// What shows that a backend is back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trial {
    /// Nothing but its users, who get there after the wait.
    None,
    /// A connection to it within that time.
    Connect(Port, Duration),
    /// Its answer: one that accepts connections and leaves requests unanswered has shown nothing by accepting
    /// another.
    Ask(Target),
}

impl Trial {
    /// Whether it succeeds. `turns` bounds how many do so at once.
    pub async fn succeeds(&self, turns: &tokio::sync::Semaphore) -> bool {
        match self {
            Trial::None => true,
            Trial::Connect(port, timeout) => {
                probe::connects(port.clone(), *timeout, turns).await.is_ok()
            }
            Trial::Ask(target) => {
                let _turn = turns.acquire().await;
                let outcome: Result<(), Failure> = checker::check(target).await;
                outcome.is_ok()
            }
        }
    }
}

/// What is known of one backend.
pub(super) type Known = (Option<Revival>, Option<Silence>, Option<String>);

/// What is known of backends that are, were, or may soon be set aside.
#[derive(Default)]
pub struct Asides {
    revivals: BTreeMap<BackendId, Revival>,
    /// Those that somebody is trying to reach.
    reviving: BTreeSet<BackendId>,
    silences: BTreeMap<BackendId, Silence>,
    /// Why each was set aside last.
    reasons: BTreeMap<BackendId, Box<str>>,
}

impl Asides {
    /// A backend has left.
    pub fn forget(&mut self, id: BackendId) {
        self.revivals.remove(&id);
        self.silences.remove(&id);
        self.reasons.remove(&id);
    }

    /// What is known of a backend: its way back, the requests it left unanswered, and why it was set aside.
    pub(super) fn of(&self, id: BackendId) -> Known {
        // Whoever goes on tries it again after the same wait.
        let again = |revival: &Revival| match self.reviving.contains(&id) {
            true => revival.before_wait(),
            false => revival.clone(),
        };
        let revival = self.revivals.get(&id).map(again);
        let reason = self.reasons.get(&id).map(|reason| reason.to_string());
        (revival, self.silences.get(&id).copied(), reason)
    }

    /// The same, from somebody who knew it before.
    pub(super) fn learn(&mut self, id: BackendId, (revival, silence, reason): Known, now: Now) {
        self.revivals.extend(revival.map(|it| (id, it.bounded(now))));
        self.silences.extend(silence.map(|it| (id, it)));
        self.reasons.extend(reason.map(|it| (id, it.into())));
    }

    /// A backend has registered anew, and nothing is held against it any more.
    pub fn forgive(&mut self, id: BackendId) {
        self.silences.remove(&id);
        self.reasons.remove(&id);
    }
}

impl Hub {
    /// The next attempt to reach a backend that was set aside; `None` once it no longer is.
    pub fn next_try(&mut self, id: BackendId) -> Option<Attempt> {
        let is_ours = !self.is_handed_over;
        let entry = self.registry.get(id).filter(|it| it.backend.standing == Standing::Aside);
        let Some(entry) = entry.filter(|_| is_ours) else {
            self.asides.reviving.remove(&id);
            return None;
        };
        let port = self.port_of(&entry.backend);
        let terms = &self.registry.service(entry.backend.service).terms;
        let connect = terms.timeouts.connect;
        let trial = match self.check_of(&entry.backend).filter(|it| it.kind.asks()) {
            _ if !self.is_silent(id) && self.probes(entry.backend.service, entry.probe) => {
                Trial::Connect(port, connect)
            }
            _ if !self.is_silent(id) => Trial::None,
            Some(check) => Trial::Ask(Target::of(&check, port)),
            None if self.probes(entry.backend.service, entry.probe) => {
                let patience = connect.max(terms.requests.answer.min(TRIAL_MAX));
                Trial::Ask(Target::any_answer(port, entry.backend.http2, patience))
            }
            None => Trial::None,
        };
        let wait = self.asides.revivals.entry(id).or_default().wait();
        Some(Attempt { wait, trial })
    }

    /// Whether a backend of this service is tried by connecting to it, if it lets itself be (`asked`).
    pub fn probes(&self, service: ServiceId, asked: bool) -> bool {
        let table = self.config.service(service);
        asked && table.is_none_or(|it| it.probe) && self.protocol_of(service) != Protocol::Udp
    }

    /// A backend that was set aside was tried as `trial` says, and is back.
    pub fn restore(&mut self, id: BackendId, trial: &Trial, now: Now) {
        self.asides.reviving.remove(&id);
        if self.is_handed_over {
            return;
        }
        if self.make(Change::Restore { backend: id }, now).changed {
            let service = self.named_service_of(id);
            match trial {
                Trial::None => {
                    info!(backend = %id, service, "backend is back: it gets users again");
                }
                Trial::Connect(..) => {
                    info!(backend = %id, service, "backend is back: a connection succeeded");
                }
                Trial::Ask(_) => info!(backend = %id, service, "backend is back: it answers"),
            }
        }
    }

    /// Why a backend is set aside, if it is.
    pub fn aside_because(&self, id: BackendId) -> Option<&str> {
        let entry = self.registry.get(id)?;
        let reason = self.asides.reasons.get(&id)?;
        (entry.backend.standing == Standing::Aside).then_some(reason)
    }

    /// How many API requests in a row a backend has left unanswered.
    pub fn unanswered_in_row(&self, id: BackendId) -> u32 {
        let Some(entry) = self.registry.get(id) else { return 0 };
        let answered = self.workers.answered(entry.backend.slot);
        self.asides.silences.get(&id).map_or(0, |silence| silence.in_row(answered))
    }

    /// A backend's data port has failed.
    pub(super) fn port_failed(&mut self, id: BackendId, reason: &str, now: Now) {
        if self.make(Change::SetAside { backend: id }, now).changed {
            let service = self.named_service_of(id);
            warn!(backend = %id, service, %reason, "backend set aside: its data port failed");
            self.asides.reasons.insert(id, reason.into());
        }
    }

    /// A backend has had an API request since then, and has not answered it until now, which is too late.
    pub(super) fn unanswered(&mut self, id: BackendId, since: Now, until: Now, now: Now) {
        let Some(entry) = self.registry.get(id) else { return };
        let (slot, service) = (entry.backend.slot, entry.backend.service);
        let answered = self.workers.answered(slot);
        let row = self.asides.silences.entry(id).or_default().unanswered(since, until, answered);
        if row < self.fall(service) || !self.make(Change::SetAside { backend: id }, now).changed {
            return;
        }
        let service = self.named_service_of(id);
        warn!(backend = %id, service, requests = row, "backend set aside: it does not answer requests");
        let reason = match row {
            1 => "a request was not answered in time".to_owned(),
            row => format!("{row} requests in a row were not answered in time"),
        };
        self.asides.reasons.insert(id, reason.into());
    }

    /// What follows once a backend has been set aside.
    pub(super) fn is_set_aside(&mut self, id: BackendId, now: Now) {
        let service = self.registry.get(id).map(|entry| entry.backend.service);
        let patience = match service {
            Some(service) if self.is_silent(id) => {
                self.registry.service(service).terms.requests.answer
            }
            _ => Duration::ZERO,
        };
        self.asides.revivals.entry(id).or_default().set_aside(patience, now);
        self.counters.backends_set_aside.one();
    }

    /// What follows once such a backend has been put back.
    pub(super) fn is_restored(&mut self, id: BackendId, now: Now) {
        self.asides.revivals.entry(id).or_default().restored(now);
        self.asides.reasons.remove(&id);
        self.counters.backends_restored.one();
    }

    /// Backends that are set aside and that nobody is trying to reach yet; from now on the caller is.
    pub(super) fn unattended(&mut self) -> Vec<BackendId> {
        self.registry.aside().filter(|id| self.asides.reviving.insert(*id)).collect()
    }

    /// Whether requests are what a backend has failed.
    fn is_silent(&self, id: BackendId) -> bool {
        let service = self.registry.get(id).map(|entry| entry.backend.service);
        service.is_some_and(|service| self.unanswered_in_row(id) >= self.fall(service))
    }

    /// How many failures in a row a service's backends are allowed.
    fn fall(&self, service: ServiceId) -> u32 {
        self.config.service(service).map_or(CheckConfig::default().fall, |table| table.check.fall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::registry::Registration;
    use crate::cluster::source::Source;
    use crate::config::Config;
    use crate::config::services::{CheckKind, Expected, ServiceConfig};
    use crate::control::checker::Question;
    use crate::control::console::tests::logged;
    use crate::control::hub::tests::{PG, address, at, config, hub, id_of, shown};
    use crate::worker::link::{Report, WorkerEnd};

    #[test]
    fn a_backend_that_must_not_be_tried_gets_users_again_after_a_wait() {
        for (by_service, by_itself) in [(true, true), (false, true), (true, false)] {
            let mut config = config(&[], CheckConfig::default());
            config.services[0].probe = by_service;
            let (mut hub, _worker) = hub(config);
            let own = Registration {
                source: Source::Connection(1),
                service: PG,
                address: address(1),
                weight: 1,
                name: None,
                group: None,
                proxy: false,
                http2: false,
                tls: None,
                probe: by_itself,
                check: None,
            };
            let backend = hub.apply(Change::Register(own.clone()), at(0)).unwrap().backend.unwrap();
            hub.apply(Change::SetAside { backend }, at(1)).unwrap();
            let attempt = hub.next_try(backend).unwrap();
            assert_eq!(attempt.trial != Trial::None, by_service && by_itself);
            assert!(!attempt.wait.is_zero());
            hub.restore(backend, &attempt.trial, at(2));
            assert_eq!(shown(&mut hub), [(1, 1, Standing::Serving)]);
            // Registered again, it says anew whether it may be tried.
            let otherwise = Registration { probe: !by_itself, ..own };
            hub.apply(Change::Register(otherwise), at(3)).unwrap();
            assert_eq!(hub.registry.get(backend).unwrap().probe, !by_itself);
        }
    }

    /// An API service of two listed backends, whose `fall` is two.
    fn shop(check: CheckConfig) -> Config {
        let mut config = config(&[(1, 1), (2, 1)], CheckConfig { fall: 2, ..check });
        let pg = config.services.remove(0);
        config.services.push(ServiceConfig { protocol: Protocol::Api, ..pg });
        config
    }

    /// The worker says that a request which the backend had from `since` was given up at `now`.
    fn silent(hub: &mut Hub, worker: &mut WorkerEnd, port: u16, since: u64, now: u64) {
        let backend = id_of(hub, port);
        let report = Report::Unanswered { backend, since: at(since), now: at(now) };
        worker.reports.push(report).unwrap();
        hub.tick(at(now));
    }

    /// The worker says that the backend answered at that time.
    fn answers(hub: &Hub, worker: &WorkerEnd, port: u16, at_ms: u64) {
        let slot = hub.registry.get(id_of(hub, port)).unwrap().backend.slot;
        worker.metrics.answered[usize::from(slot)].set(at(at_ms).nanos());
    }

    #[test]
    fn a_silent_backend_that_speaks_http2_is_tried_by_a_call() {
        let mut config = shop(CheckConfig::default());
        config.services[0].backends[0].http2 = true;
        let (mut hub, mut worker) = hub(config);
        answers(&hub, &worker, 1, 50);
        silent(&mut hub, &mut worker, 1, 100, 400);
        silent(&mut hub, &mut worker, 1, 100, 401);
        let id = id_of(&hub, 1);
        let Trial::Ask(target) = hub.next_try(id).unwrap().trial else { panic!("it is asked") };
        let Some(Question::Grpc(call)) = &target.question else { panic!("{target:?}") };
        assert!(call.takes_any && call.service.is_empty());
    }

    #[test]
    fn a_backend_that_leaves_requests_unanswered_is_set_aside_and_tried_by_asking() {
        let (mut hub, mut worker) = hub(shop(CheckConfig::default()));
        answers(&hub, &worker, 1, 50);
        silent(&mut hub, &mut worker, 1, 100, 400);
        assert_eq!(hub.unanswered_in_row(id_of(&hub, 1)), 1);
        assert_eq!(shown(&mut hub)[0].2, Standing::Serving, "once is no row");
        let line = logged(|| silent(&mut hub, &mut worker, 1, 100, 401));
        assert!(line[0].starts_with("backend set aside: it does not answer requests"), "{line:?}");
        let id = id_of(&hub, 1);
        assert_eq!(shown(&mut hub), [(1, 1, Standing::Aside), (2, 1, Standing::Serving)]);
        let why = "2 requests in a row were not answered in time";
        assert_eq!(hub.aside_because(id), Some(why));
        let attempt = hub.next_try(id).unwrap();
        let Trial::Ask(target) = &attempt.trial else { panic!("{:?}", attempt.trial) };
        let Some(Question::Http(question)) = &target.question else { panic!("{target:?}") };
        assert_eq!((question.method, question.path.as_str()), ("OPTIONS", "*"));
        assert_eq!(question.expect, Expected { first: 100, last: 599 });
        let line = logged(|| hub.restore(id, &attempt.trial, at(700)));
        assert!(line[0].starts_with("backend is back: it answers"), "{line:?}");
        assert_eq!((shown(&mut hub)[0].2, hub.aside_because(id)), (Standing::Serving, None));
        // It has yet to answer a user, so the row goes on, and each wait is longer than the one before.
        silent(&mut hub, &mut worker, 1, 701, 31_000);
        assert_eq!(shown(&mut hub)[0].2, Standing::Aside);
        assert_eq!(hub.next_try(id).unwrap().wait, 2 * attempt.wait);
        assert_eq!(hub.counters.backends_set_aside.get(), 2);
    }

    #[test]
    fn requests_that_take_long_beside_others_that_are_answered_are_held_against_nobody() {
        let (mut hub, mut worker) = hub(shop(CheckConfig::default()));
        for second in 1..20 {
            answers(&hub, &worker, 1, second * 1_000 + 500);
            silent(&mut hub, &mut worker, 1, second * 1_000, second * 1_000 + 900);
        }
        // Nor are those between which it answers.
        for second in 21..40 {
            answers(&hub, &worker, 1, second * 1_000);
            silent(&mut hub, &mut worker, 1, second * 1_000 + 1, second * 1_000 + 900);
        }
        assert_eq!(shown(&mut hub)[0].2, Standing::Serving);
        assert_eq!(hub.counters.backends_set_aside.get(), 0);
    }

    #[test]
    fn where_there_is_a_check_of_requests_that_is_the_trial() {
        let path = "/up".to_owned();
        let check = CheckConfig { kind: CheckKind::Http, path, ..CheckConfig::default() };
        let (mut hub, mut worker) = hub(shop(check));
        while let Some((due, _)) = hub.next_check(at(20)) {
            hub.checked(due, Ok(()), Duration::ZERO, at(20));
        }
        silent(&mut hub, &mut worker, 2, 100, 400);
        silent(&mut hub, &mut worker, 2, 100, 400);
        let Trial::Ask(target) = hub.next_try(id_of(&hub, 2)).unwrap().trial else { panic!() };
        assert!(matches!(target.question, Some(Question::Http(it)) if it.path == "/up"));
    }

    #[test]
    fn and_so_is_a_health_call() {
        let check = CheckConfig { kind: CheckKind::Grpc, ..CheckConfig::default() };
        let (mut hub, mut worker) = hub(shop(check));
        while let Some((due, _)) = hub.next_check(at(20)) {
            hub.checked(due, Ok(()), Duration::ZERO, at(20));
        }
        silent(&mut hub, &mut worker, 2, 100, 400);
        silent(&mut hub, &mut worker, 2, 100, 400);
        let Trial::Ask(target) = hub.next_try(id_of(&hub, 2)).unwrap().trial else { panic!() };
        assert!(matches!(target.question, Some(Question::Grpc(_))), "{target:?}");
    }
}
