//! What the history is told: when a step ends, the totals of the balancer and of each of its services, and what
//! changes when it does. Changes nothing else.

use super::Hub;
use crate::base::time::Now;
use crate::cluster::registry::{Applied, Change};
use crate::cluster::{Backend, Barrier, Protocol, Service, Standing};
use crate::control::history::marks::What;
use crate::control::history::{Seen, Times, Totals};
use crate::control::services::{Tally, tallies};
use crate::control::view;
use crate::control::workers::Timing;

impl Hub {
    /// Ends the step of the history, if it is time.
    pub(super) fn sample(&mut self, now: Now) {
        if !self.history.is_due(now) {
            return;
        }
        self.steadiness.forget_gone(now);
        let (whole, tallies) = (self.totals(), tallies(self));
        let seen = self.registry.services().map(|service| Seen {
            id: service.id,
            name: &service.name,
            protocol: service.kind,
            totals: totals_of(service, tallies.get(&service.id).copied().unwrap_or_default()),
        });
        self.history.end_step(now, &whole, seen);
    }

    /// Marks a change in the set of backends.
    pub(super) fn mark(&mut self, change: &Change, applied: &Applied, now: Now) {
        let what = match change {
            Change::SourceLost { .. } | Change::Unclaim { is_lost: true, .. } => What::Lost,
            _ => What::Left,
        };
        for entry in &applied.left {
            let name = &self.registry.service(entry.backend.service).name;
            self.history.marks.add(now, what, Some(name), Some(entry.backend.id));
            let (service, address) = (entry.backend.service, entry.backend.address);
            self.steadiness.saw(service, address, None, now);
        }
        let changed = applied.backend.or(match change {
            Change::SetAside { backend }
            | Change::Restore { backend }
            | Change::Judge { backend, .. } => Some(*backend),
            _ => None,
        });
        let Some(entry) = changed.and_then(|id| self.registry.get(id)) else { return };
        let Backend { id, standing, service, address, .. } = entry.backend;
        let is_new = self.steadiness.saw(service, address, Some(standing), now);
        if is_new || applied.joined {
            let what = if applied.joined { What::Joined } else { what_became(standing) };
            let name = &self.registry.service(service).name;
            self.history.marks.add(now, what, Some(name), Some(id));
        }
    }

    fn totals(&self) -> Totals {
        let workers = &self.workers;
        let (counts, _) = workers.histogram(Timing::FirstByte);
        let mut times = Times::default();
        times.iter_mut().zip(counts).for_each(|(time, count)| *time = count);
        Totals {
            sessions: workers.sessions(),
            new: workers.sum(|it| it.sessions_started.get()),
            requests: workers.sum(|it| it.api_requests.get()),
            errors: workers.sum(|it| it.api_errors.get()),
            refused: workers.sum(view::refused),
            bytes_up: workers.sum(|it| it.bytes_up.get()),
            bytes_down: workers.sum(|it| it.bytes_down.get()),
            times,
        }
    }
}

const fn what_became(standing: Standing) -> What {
    match standing {
        Standing::Serving => What::Serving,
        Standing::Aside => What::Aside,
        Standing::Failing => What::Failing,
        Standing::Draining => What::Draining,
    }
}

fn totals_of(service: &Service, tally: Tally) -> Totals {
    let is_api = service.kind == Protocol::Api;
    let answered = service.gate.answers.sum();
    let barred: u64 = Barrier::ALL.map(|it| service.gate.turned_away(it)).iter().sum();
    Totals {
        sessions: tally.sessions,
        new: if is_api { 0 } else { tally.given.sessions },
        requests: answered.requests,
        errors: answered.errors,
        refused: barred + answered.refused,
        bytes_up: tally.given.bytes_up,
        bytes_down: tally.given.bytes_down,
        times: answered.first_byte,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Notify;

    use super::*;
    use crate::base::publish::Publisher;
    use crate::cluster::registry::{Lasts, Registration};
    use crate::cluster::source::Source;
    use crate::cluster::{BackendId, ServiceId, Snapshot};
    use crate::config::Config;
    use crate::control::hub::tests::reload;
    use crate::control::workers::Workers;
    use crate::worker::link::{WorkerEnd, link};

    const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);
    const FILE: Source = Source::Connection(1 << 40);

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    fn hub() -> (Hub, WorkerEnd) {
        let snapshots = Publisher::new(Snapshot::default());
        let (control, worker) = link(0, 4, snapshots.subscribe(), Arc::new(Notify::new())).unwrap();
        (
            Hub::new(Arc::new(Config::default()), Workers::new(vec![control]), snapshots, at(0)),
            worker,
        )
    }

    fn join(hub: &mut Hub, port: u16, now: Now) -> (BackendId, usize) {
        let address = ([192, 0, 2, 1], port).into();
        let (weight, name, group, proxy, probe) = (1, None, None, false, true);
        let (source, service) = (FILE, TCP);
        let wanted = Registration {
            source,
            service,
            address,
            weight,
            name,
            group,
            proxy,
            http2: false,
            tls: None,
            probe,
            check: None,
        };
        let id = hub.apply(Change::Register(wanted), now).unwrap().backend.unwrap();
        (id, usize::from(hub.registry.get(id).unwrap().backend.slot))
    }

    fn bytes(hub: &Hub, name: &str) -> Vec<Option<u64>> {
        let samples = hub.history.service(&name.into(), Protocol::Tcp, 99).unwrap();
        samples.iter().map(|it| it.map(|it| it.bytes_up)).collect()
    }

    #[test]
    fn a_service_keeps_what_backends_carried_that_have_gone_and_no_step_is_counted_twice() {
        let (mut hub, worker) = hub();
        let (_, stays) = join(&mut hub, 81, at(0));
        worker.metrics.backends[stays].up.add(5);
        for (round, carried) in [(0, 700), (1, 20)] {
            let (backend, slot) = join(&mut hub, 80, at(round * 10_000));
            worker.metrics.backends[slot].up.add(carried);
            hub.tick(at(round * 10_000 + 5_000));
            hub.apply(Change::Leave { backend }, at(round * 10_000 + 6_000)).unwrap();
            hub.publish();
            worker.metrics.counters.turns.add(2);
            hub.tick(at(round * 10_000 + 7_000));
            assert!(hub.departed.is_empty());
            hub.tick(at(round * 10_000 + 10_000));
        }
        assert_eq!(bytes(&hub, "tcp"), [Some(705), Some(0), Some(20), Some(0)]);
    }

    #[test]
    fn what_changes_is_marked_once_and_a_state_has_a_beginning() {
        let (mut hub, _worker) = hub();
        let (backend, _) = join(&mut hub, 80, at(0));
        join(&mut hub, 80, at(1));
        for (ms, change) in [
            (10_000, Change::SetAside { backend }),
            (10_001, Change::SetAside { backend }),
            (20_000, Change::Restore { backend }),
            (21_000, Change::DrainBackend { backend, lasts: Lasts::Never }),
            (22_000, Change::UndrainBackend { backend }),
        ] {
            hub.apply(change, at(ms)).unwrap();
        }
        let address = ([192, 0, 2, 1], 80).into();
        assert_eq!(hub.steadiness.of(TCP, address, at(22_000)), Some((at(22_000), 4)));
        reload(&mut hub, Config::default(), at(30_000));
        hub.apply(Change::SourceLost { source: FILE, why: "gone" }, at(40_000)).unwrap();
        let marks = hub.history.marks.recent(at(40_000), None);
        let shown: Vec<_> = marks.map(|it| (it.what, it.at, it.backend, it.count)).collect();
        let (one, none) = (Some(backend), None);
        let expected = [
            (What::Joined, at(0), one, 1),
            (What::Aside, at(10_000), one, 1),
            (What::Serving, at(20_000), one, 2),
            (What::Draining, at(21_000), one, 1),
            (What::Reload, at(30_000), none, 1),
            (What::Lost, at(40_000), one, 1),
        ];
        assert_eq!(shown, expected);
        join(&mut hub, 80, at(45_000));
        let both = Some((at(45_000), 6));
        assert_eq!(hub.steadiness.of(TCP, address, at(45_000)), both, "it was here before");
    }
}
