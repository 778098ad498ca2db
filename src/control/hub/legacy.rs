//! What the hub leaves to the hub of another process, and how that takes it up: services, backends and all that
//! is known of them, drains, checks, counters. Owns the way from the hub's state to its description and
//! back, and what must hold of one that comes from elsewhere. Describing changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::drains::Draining;
use super::reloading::Leaving;
use super::{Departed, Hub};
use crate::base::time::Now;
use crate::cluster::groups::{Group, SHARE_MAX};
use crate::cluster::registry::{Inheritance, Registered};
use crate::cluster::source::Source;
use crate::cluster::{AskedCheck, Backend, BackendId, Protocol, Service, ServiceId};
use crate::control::api::NAME_BYTES_MAX;
use crate::control::drain::{Drain, Stop};
use crate::control::history::marks::{Mark, Marks};
use crate::control::legacy::format::{self, Legacy};
use crate::control::steadiness::Steadiness;
use crate::metrics::BACKENDS_MAX;
use crate::tls::backends::BackendTls;

/// Services of a description, at most: those of the settings and as many that leave.
const SERVICES_MAX: usize = 1 << 14;
/// Longest reason why a backend was set aside or has failed its check.
const REASON_BYTES_MAX: usize = 4096;

impl Hub {
    /// Everything but the control connections.
    pub fn describe(&self, now: Now) -> Legacy {
        let registered = self.registry.entries().map(|entry| self.describe_backend(entry));
        let departed = self.departed.values().map(describe_departed);
        let (next, snapshot, slot) = self.registry.numbers();
        let (began, tracks) = self.steadiness.all();
        let seen = |(service, address, track): (ServiceId, SocketAddr, &_)| format::Seen {
            service: service.0,
            address: Some(address),
            track: *track,
        };
        Legacy {
            at: now,
            started: self.started,
            services: self.registry.services().map(|it| self.describe_service(it)).collect(),
            backends: registered.chain(departed).collect(),
            numbers: format::Numbers {
                backend: next.0,
                connection: self.next_connection,
                snapshot,
                slot,
            },
            connections: Vec::new(),
            counts: self.counts(),
            steadiness: format::Steadiness { began, seen: tracks.map(seen).collect() },
            history: self.history.describe(),
            marks: self.history.marks.all().map(describe_mark).collect(),
        }
    }

    fn describe_service(&self, service: &Service) -> format::Service {
        let group = |group: &Group| format::Group {
            name: group.name.to_string(),
            share: group.share,
            file_share: self.share_in_file(service, &group.name),
            turn: group.turn.next(),
        };
        format::Service {
            id: service.id.0,
            name: service.name.to_string(),
            protocol: Some(service.kind),
            turn: service.turn.next(),
            groups: service.groups.iter().map(group).collect(),
            leaving: self.leaving.get(&service.id).map(Leaving::describe),
        }
    }

    fn describe_backend(&self, entry: &Registered) -> format::Backend {
        let id = entry.backend.id;
        let draining = self.draining.get(&id);
        let (revival, silence, aside_because) = self.asides.of(id);
        format::Backend {
            connection: entry.source.connection(),
            is_of_cluster: entry.source == Source::Cluster,
            is_claimed: entry.is_claimed,
            file_weight: self.weight_in_file(entry),
            since: entry.since,
            probe: entry.probe,
            check: entry.check.as_ref().map(ToString::to_string),
            against: entry.against(),
            drain: draining.map(|it| it.drain.clone()),
            beneath: draining.and_then(|it| it.beneath.clone()),
            checked: self.describe_check(&entry.backend),
            revival,
            silence,
            aside_because,
            answered: self.workers.answered(entry.backend.slot),
            ended_by_operators: self.ended_by_operators.get(&id).copied().unwrap_or(0),
            is_new: self.unannounced.contains(&id),
            ..describe_plain(&entry.backend)
        }
    }

    /// Takes up what another hub has left; this one is new, and its settings are in use. The workers are told
    /// before it returns. After an error it is of no use.
    ///
    /// # Errors
    /// What is wrong, in a sentence.
    pub fn inherit(&mut self, from: &Legacy, now: Now) -> Result<(), String> {
        let at = from.at.min(now);
        from.counts.check()?;
        self.inherit_services(from, now)?;
        self.inherit_registry(from)?;
        // As in a reload: what the settings here say of services holds for those who have come with them.
        let config = Arc::clone(&self.config);
        self.registry.agree(|service| config.terms_for(service.id));
        for backend in from.backends.iter().filter(|it| it.left.is_none()) {
            self.inherit_backend(backend, at, now);
        }
        self.started = from.started.min(now);
        self.next_connection = from.numbers.connection.max(self.next_connection);
        self.inherit_memory(from, now);
        self.add_counts(&from.counts);
        self.follow_checks(now);
        let weight = |it: &format::Backend| Some((BackendId(it.id), it.file_weight?));
        let before = from.backends.iter().filter_map(weight).collect();
        self.follow_other_file(&before, now);
        self.publication.ask();
        self.publish();
        Ok(())
    }

    fn inherit_services(&mut self, from: &Legacy, now: Now) -> Result<(), String> {
        if from.services.len() > SERVICES_MAX {
            return Err(format!("{} services are too many", from.services.len()));
        }
        let mut met = BTreeSet::new();
        for service in &from.services {
            let (id, name) = (ServiceId(service.id), &service.name);
            let protocol = service.protocol.ok_or("a service is of no protocol")?;
            if !met.insert(id) || name.len() > NAME_BYTES_MAX || id >= ServiceId::NOBODY {
                return Err(format!("service number {} is there twice, or has no name", id.0));
            }
            let known = self.registry.find_service(id).map(|it| (&*it.name == name, it.kind));
            match known {
                Some((true, kind)) if kind == protocol && service.leaving.is_none() => {
                    self.inherit_turns(service);
                }
                None => self.inherit_leaving(service, protocol, now)?,
                Some(_) => {
                    return Err(format!(
                        "service {name} ({protocol}) has the number of another service here"
                    ));
                }
            }
        }
        Ok(())
    }

    /// A service that the settings here do not have leaves, as after a reload.
    fn inherit_leaving(
        &mut self,
        from: &format::Service,
        protocol: Protocol,
        now: Now,
    ) -> Result<(), String> {
        let id = ServiceId(from.id);
        let kin = self.registry.service(ServiceId::built_in(protocol));
        let service = Service {
            id,
            name: from.name.as_str().into(),
            groups: Arc::default(),
            turn: Arc::default(),
            gate: Arc::default(),
            users: Arc::default(),
            pool: Arc::default(),
            ..kin.clone()
        };
        self.registry.inherit_leaving(service)?;
        let removed = || format::Leaving {
            since: now,
            until: now.plus(self.config.balance.drain),
            drains: false,
        };
        let leaving = from.leaving.unwrap_or_else(removed);
        self.leaving.insert(id, Leaving::inherit(leaving, self.workers.mark(), now));
        Ok(())
    }

    /// Turns go on, and so does a shift unless the settings give the groups other shares meanwhile.
    fn inherit_turns(&mut self, from: &format::Service) {
        let id = ServiceId(from.id);
        let service = self.registry.service(id);
        service.turn.go_on(from.turn);
        for group in service.groups.iter() {
            let before = from.groups.iter().find(|it| it.name == *group.name);
            before.inspect(|before| group.turn.go_on(before.turn));
        }
        let mine: Vec<(&str, Option<u8>)> = (service.groups.iter())
            .map(|it| (&*it.name, self.share_in_file(service, &it.name)))
            .collect();
        let theirs: Vec<(&str, Option<u8>)> =
            from.groups.iter().map(|it| (it.name.as_str(), it.file_share)).collect();
        let shares: Vec<(&str, u8)> =
            from.groups.iter().map(|it| (it.name.as_str(), it.share)).collect();
        let is_shifted = from.groups.iter().any(|it| it.file_share != Some(it.share));
        let in_range = |(_, share): &(&str, u8)| *share <= SHARE_MAX;
        let is_possible = shares.iter().all(in_range) && shares.iter().any(|it| it.1 > 0);
        if is_shifted && mine == theirs && is_possible {
            self.registry.group(id, &shares);
        } else if is_shifted {
            info!(service = %from.name, "other settings: the shift is over");
        }
    }

    fn inherit_registry(&mut self, from: &Legacy) -> Result<(), String> {
        if from.backends.len() > BACKENDS_MAX {
            return Err(format!("{} backends are too many", from.backends.len()));
        }
        let mut inheritance = Inheritance {
            entries: Vec::new(),
            departed: Vec::new(),
            next: BackendId(from.numbers.backend.max(1)),
            version: from.numbers.snapshot.min(u64::MAX >> 1),
            slot: from.numbers.slot,
        };
        for backend in &from.backends {
            let plain = plain(backend)?;
            match &backend.left {
                Some(left) => {
                    inheritance.departed.push((plain.id, plain.slot));
                    if !self.registry.has_service(plain.service) {
                        return Err(format!("{} has left a service that is not there", plain.id));
                    }
                    let (registered, repeat) = (backend.since, left.repeat);
                    let departed = Departed { backend: plain, registered, mark: None, repeat };
                    self.departed.insert(departed.backend.id, departed);
                }
                None => inheritance.entries.push(entry(backend, plain)?),
            }
        }
        self.registry.inherit(inheritance)
    }

    /// What is known of a backend that is registered.
    fn inherit_backend(&mut self, from: &format::Backend, at: Now, now: Now) {
        let id = BackendId(from.id);
        let Some(entry) = self.registry.get(id) else { return };
        let slot = entry.backend.slot;
        let against = entry.against();
        let is_asked = against.drained_by_owner || against.drained_by_operator;
        if is_asked || from.drain.is_some() && entry.drained_by().is_some() {
            let lasts = Some(self.config.balance.drain);
            let anew = || Drain::new(now, lasts, !against.drained_by_owner);
            let drain = from.drain.clone().unwrap_or_else(anew);
            self.draining.insert(id, Draining::inherit(drain, from.beneath.clone(), now));
        }
        let reason = from.aside_because.clone().filter(|it| it.len() <= REASON_BYTES_MAX);
        self.asides.learn(id, (from.revival.clone(), from.silence, reason), now);
        if let Some(checked) = &from.checked {
            self.inherit_check(id, checked, now);
        }
        self.workers.inherit_answered(slot, from.answered.min(at));
        if from.ended_by_operators > 0 {
            self.ended_by_operators.insert(id, from.ended_by_operators);
        }
        if from.is_new {
            self.unannounced.insert(id);
        }
    }

    fn inherit_memory(&mut self, from: &Legacy, now: Now) {
        let seen = from.steadiness.seen.iter();
        let tracks = seen.filter_map(|it| Some((ServiceId(it.service), it.address?, it.track)));
        self.steadiness = Steadiness::go_on(from.steadiness.began, tracks, now);
        self.history.inherit(&from.history, now);
        let marks = from.marks.iter().map(|mark| Mark {
            at: mark.at.min(now),
            what: mark.what,
            service: mark.service.as_deref().map(Arc::from),
            backend: mark.backend.map(BackendId),
            count: mark.count,
        });
        self.history.marks = Marks::go_on(marks);
    }

    /// Another process has taken everything up; what is left here ends by itself, or after the time that a drain
    /// lasts.
    pub fn hand_over(&mut self, now: Now) {
        self.is_handed_over = true;
        if let Some(sharing) = &mut self.sharing {
            sharing.part(now);
        }
        self.members.clear();
        self.draining.clear();
        let until = now.plus(self.config.balance.drain);
        self.stop = Stop::Draining { until, tell: until };
        self.stop_until = Some(until);
    }

    /// Whether this process, which has been succeeded, may still be there without sessions of its own.
    pub fn may_linger(&self, now: Now) -> bool {
        let in_time = self.stop_until.is_some_and(|until| now < until);
        self.is_handed_over && !self.is_orphaned && !self.is_hurried && in_time
    }

    /// The process that everything was handed over to has ended before it served. Nothing can be taken back, so
    /// that this one ends at once, and whoever started it may start another.
    pub fn orphan(&mut self, now: Now) {
        self.is_orphaned = true;
        let step = self.stop.ask(now, Duration::ZERO);
        self.do_stop(step);
    }

    /// The sessions that a predecessor still has, by backend; none of those not named.
    pub fn set_elsewhere(&mut self, sessions: &[(BackendId, u64)]) {
        let slot = |(id, count): &(BackendId, u64)| Some((self.backend(*id)?.slot, *count));
        let by_slot: BTreeMap<u16, u64> = sessions.iter().filter_map(slot).collect();
        self.workers.set_elsewhere(by_slot);
    }

    /// The sessions of each backend at the workers here.
    pub fn sessions_here(&self) -> Vec<(BackendId, u64)> {
        let registered = self.registry.entries().map(|entry| &entry.backend);
        let all = registered.chain(self.departed.values().map(|it| &it.backend));
        let counted = all.map(|it| (it.id, self.workers.active_here(it.slot)));
        counted.filter(|(_, sessions)| *sessions > 0).collect()
    }
}

fn describe_plain(backend: &Backend) -> format::Backend {
    let text = |text: &Option<Arc<str>>| text.as_deref().map(str::to_owned);
    format::Backend {
        id: backend.id.0,
        slot: backend.slot,
        service: backend.service.0,
        address: Some(backend.address),
        weight: backend.weight,
        name: text(&backend.name),
        group: text(&backend.group),
        proxy: backend.proxy,
        http2: backend.http2,
        tls: backend.tls.as_ref().map(|tls| format::Tls {
            name: text(&tls.name),
            ca: tls.ca.as_deref().and_then(Path::to_str).map(str::to_owned),
        }),
        ..format::Backend::default()
    }
}

fn describe_departed(departed: &Departed) -> format::Backend {
    format::Backend {
        since: departed.registered,
        left: Some(format::Left { repeat: departed.repeat }),
        ..describe_plain(&departed.backend)
    }
}

fn describe_mark(mark: &Mark) -> format::Mark {
    format::Mark {
        at: mark.at,
        what: mark.what,
        service: mark.service.as_deref().map(str::to_owned),
        backend: mark.backend.map(|id| id.0),
        count: mark.count,
    }
}

fn plain(from: &format::Backend) -> Result<Backend, String> {
    let id = BackendId(from.id);
    let names = [&from.name, &from.group].into_iter().flatten();
    if names.chain(from.tls.iter().flat_map(|tls| &tls.name)).any(|it| it.len() > 256) {
        return Err(format!("backend {id} has too long a name"));
    }
    let text = |text: &Option<String>| text.as_deref().map(Arc::from);
    Ok(Backend {
        id,
        slot: from.slot,
        service: ServiceId(from.service),
        address: from.address.ok_or_else(|| format!("backend {id} has no address"))?,
        weight: from.weight,
        name: text(&from.name),
        group: text(&from.group),
        proxy: from.proxy,
        http2: from.http2,
        tls: from.tls.as_ref().map(|tls| BackendTls {
            name: text(&tls.name),
            ca: tls.ca.as_deref().map(|path| Arc::from(Path::new(path))),
        }),
        standing: from.against.standing(),
    })
}

fn entry(from: &format::Backend, backend: Backend) -> Result<Registered, String> {
    let unconnected = if from.is_of_cluster { Source::Cluster } else { Source::File };
    let source = from.connection.map_or(unconnected, Source::Connection);
    let check = from.check.as_deref().map(str::parse::<AskedCheck>).transpose();
    let check = check.map_err(|why| format!("the check of backend {}: {why}", backend.id))?;
    let format::Backend { since, probe, is_claimed, against, .. } = *from;
    Ok(Registered::elsewhere(backend, source, since, probe, check, is_claimed, against))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::services::CheckConfig;
    use crate::control::hub::REPORTS_AT_ONCE;
    use crate::control::hub::tests::{at, config, hub};
    use crate::worker::link::{Order, Report, WorkerEnd};

    /// A hub that has been left, and its worker.
    fn left() -> (Hub, WorkerEnd) {
        let (mut hub, worker) = hub(config(&[(1, 1)], CheckConfig::default()));
        hub.hand_over(at(0));
        (hub, worker)
    }

    fn orders(worker: &mut WorkerEnd) -> Vec<Order> {
        std::iter::from_fn(|| worker.orders.pop().ok()).collect()
    }

    #[test]
    fn what_workers_have_reported_last_is_heard_before_the_end() {
        let (mut hub, mut worker) = left();
        worker.metrics.counters.turns.add(2);
        assert!(!hub.tick(at(1)).done, "they are told to stop");
        for _ in 0..2 * REPORTS_AT_ONCE {
            let report = Report::ConnectFailed { backend: BackendId(9), errno: 111 };
            worker.reports.push(report).unwrap();
        }
        let outcome = hub.tick(at(2));
        assert!(outcome.done && !outcome.more && outcome.revive.is_empty());
        assert_eq!(worker.reports.slots(), worker.reports.buffer().capacity());
    }

    #[test]
    fn who_drains_already_is_asked_to_stop_in_vain_once() {
        let (mut hub, mut worker) = left();
        worker.metrics.counters.sessions_active.set(1);
        hub.ask_to_stop(at(1));
        assert_eq!((hub.tick(at(2)).done, orders(&mut worker)), (false, vec![]));
        hub.ask_to_stop(at(3));
        assert_eq!(orders(&mut worker), [Order::Stop]);
    }

    #[test]
    fn who_has_lost_its_successor_ends_at_once() {
        let (mut hub, mut worker) = left();
        worker.metrics.counters.sessions_active.set(1);
        assert!(!hub.is_orphaned());
        hub.orphan(at(1));
        assert!(hub.is_orphaned() && orders(&mut worker) == [Order::Stop]);
        worker.metrics.counters.sessions_active.set(0);
        assert!(hub.tick(at(2)).done);
    }
}
