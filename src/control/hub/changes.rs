//! Changes to the set of backends. Owns the one entrance for them and the consequences of each:
//! counters, log lines, drains begun and ended, and a publication. Who may change what is decided by
//! the registry, and messages are up to the source.

use super::{Departed, Hub, REPEAT_EVERY};
use crate::base::time::Now;
use crate::cluster::registry::{Applied, Change, DrainedBy, Fault, Registered};
use crate::cluster::source::Source;
use crate::cluster::{BackendId, OnBackendLoss, Protocol};
use crate::control::api::Event;
use crate::control::console::Of;
use crate::session::EndReason;

impl Hub {
    /// Applies a change from any source. The workers learn of it with the next publication.
    ///
    /// # Errors
    /// Why the change was refused; nothing has changed.
    pub fn apply(&mut self, change: Change, now: Now) -> Result<Applied, Fault> {
        let applied = self.registry.apply(change.clone(), now)?;
        if applied.changed {
            self.publication.ask();
        }
        self.follow(change.clone(), &applied, now);
        self.tell_cluster(&change, &applied, now);
        Ok(applied)
    }

    /// Applies a change that is never refused; at worst, its backend has already gone.
    pub(super) fn make(&mut self, change: Change, now: Now) -> Applied {
        self.apply(change, now).unwrap_or_default()
    }

    fn follow(&mut self, change: Change, applied: &Applied, now: Now) {
        self.mark(&change, applied, now);
        match change {
            Change::Register(wanted) => {
                self.registered(applied, now);
                self.hold(wanted.source);
            }
            Change::Claim { .. } => self.claimed(applied, now),
            Change::Unclaim { is_lost: true, why, .. } => self.lost(applied, why, now),
            Change::Unclaim { why, .. } => self.left(applied, why, now),
            Change::Unregister { source, .. } => {
                self.left(applied, source.why_left(), now);
                self.hold(source);
            }
            Change::Drain { source, lasts, .. } => {
                self.drain_begun(applied, lasts, DrainedBy::Owner, now);
                self.hold(source);
            }
            Change::DrainBackend { backend, lasts } => {
                self.drain_begun(applied, lasts, DrainedBy::Operator, now);
                self.tell_of_drain(backend, now);
            }
            Change::Undrain { source, .. } => {
                self.drain_taken_back(applied, now);
                self.hold(source);
            }
            Change::UndrainBackend { backend } => {
                if self.drain_taken_back(applied, now) {
                    self.tell_backend(backend, Event::Undrained);
                }
            }
            Change::Weigh { backend, weight } if applied.changed => {
                self.tell_backend(backend, Event::Weighed { weight });
            }
            Change::Leave { .. } => self.left(applied, "drained", now),
            Change::SourceLost { why, .. } => self.lost(applied, why, now),
            Change::SetAside { backend } if applied.changed => {
                self.is_set_aside(backend, now);
            }
            Change::Restore { backend } if applied.changed => {
                self.is_restored(backend, now);
            }
            Change::Judge { passes: true, .. } if applied.changed => {
                self.counters.backends_check_passed.one();
            }
            Change::Judge { passes: false, .. } if applied.changed => {
                self.counters.backends_check_failed.one();
            }
            Change::SetAside { .. } | Change::Restore { .. } => {}
            Change::Judge { .. } | Change::Weigh { .. } => {}
        }
    }

    fn registered(&mut self, applied: &Applied, now: Now) {
        let id = applied.backend.expect("a registration that succeeded has a backend");
        let entry = self.registry.get(id).expect("it was just registered");
        let backend = &entry.backend;
        self.asides.forgive(id);
        let goes_on = entry.drained_by().is_some();
        if applied.joined {
            self.workers.begin(backend.slot);
            self.counters.backends_registered.one();
        }
        if applied.changed {
            self.unannounced.insert(id);
        }
        match self.registry.get(id).map(|entry| entry.backend.clone()) {
            Some(_) if applied.joined => self.begin_checks(id, now),
            Some(backend) => self.follow_check(&backend, now),
            None => {}
        }
        self.owner_drains_no_more(id, goes_on, now);
    }

    /// Other balancers say that it is registered at them.
    fn claimed(&mut self, applied: &Applied, now: Now) {
        self.left(applied, Source::Cluster.why_left(), now);
        if applied.joined {
            self.registered(applied, now);
        } else if let Some(entry) = applied.backend.and_then(|id| self.registry.get(id)) {
            let backend = entry.backend.clone();
            self.follow_check(&backend, now);
        }
    }

    /// Logs who has registered since the last publication: a line that says so may be relied on, as the
    /// reply may.
    pub(super) fn announce(&mut self, now: Now) {
        for id in std::mem::take(&mut self.unannounced) {
            let entry = self.registry.get(id).expect("whoever leaves is announced before");
            let of = Of::new(self.registry.service(entry.backend.service));
            self.console.backend_registered(now, of, &entry.backend, self.registry.len());
        }
    }

    /// An operator has ended a session of this backend.
    pub fn ended_by_operator(&mut self, id: BackendId) {
        *self.ended_by_operators.entry(id).or_default() += 1;
    }

    /// Tells backends how many of their sessions operators have ended, however many in one message.
    pub(super) fn tell_of_ended(&mut self) {
        for (id, sessions) in std::mem::take(&mut self.ended_by_operators) {
            self.tell_backend(id, Event::Ended { sessions });
        }
    }

    /// Backends left in good order: their sessions go on.
    fn left(&mut self, applied: &Applied, why: &str, now: Now) {
        self.kept(applied);
        self.counters.backends_left.add(applied.left.len() as u64);
        for entry in &applied.left {
            self.depart(entry, why, false, now);
        }
    }

    /// What their source had asked for is over; other balancers go on with them.
    fn kept(&mut self, applied: &Applied) {
        for id in &applied.kept {
            self.draining.remove(id);
        }
    }

    /// Backends were lost with their source.
    fn lost(&mut self, applied: &Applied, why: &str, now: Now) {
        self.kept(applied);
        self.counters.backends_lost.add(applied.left.len() as u64);
        let mut any_closed = false;
        for entry in &applied.left {
            let terms = &self.registry.service(entry.backend.service).terms;
            let close = terms.on_backend_loss == OnBackendLoss::Close;
            self.depart(entry, why, close, now);
            any_closed |= close;
        }
        if any_closed {
            self.workers.wake();
        }
    }

    /// Remembers a backend that has left until its sessions have ended. `close` orders their end; the
    /// caller then wakes the workers.
    fn depart(&mut self, entry: &Registered, why: &str, close: bool, now: Now) {
        let (backend, registered) = (entry.backend.clone(), entry.since);
        let id = backend.id;
        let sessions = self.workers.active(backend.slot);
        let service = self.registry.service(backend.service);
        let (of, protocol) = (Of::new(service), service.kind);
        if self.unannounced.remove(&id) {
            self.console.backend_registered(now, Of::new(service), &backend, self.registry.len());
        }
        self.console.backend_left(now, of, &backend, why, sessions, self.registry.len());
        self.asides.forget(id);
        self.end_checks(&backend);
        // What happens to the UDP sessions of a lost backend is decided by the workers.
        let close = close && protocol != Protocol::Udp;
        let repeat = self.draining.remove(&id).and_then(|it| it.drain.deadline);
        if close {
            self.end_sessions_of(id, EndReason::BackendLeft);
        }
        let repeat = if close { Some(now.plus(REPEAT_EVERY)) } else { repeat };
        self.departed.insert(id, Departed { backend, registered, mark: None, repeat });
    }

    /// Holds back replies to a source until the workers know of its change.
    fn hold(&mut self, source: Source) {
        if let Some(member) = self.members.get(&source) {
            self.publication.hold(&member.mailbox);
        }
    }

    /// Sessions running on a backend, including one that has just left.
    pub fn sessions_on(&self, id: BackendId) -> u64 {
        self.backend(id).map_or(0, |backend| self.workers.active(backend.slot))
    }
}

#[cfg(test)]
pub(in crate::control::hub) mod tests {
    use std::net::SocketAddr;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::sync::Notify;

    use super::*;
    use crate::base::publish::Publisher;
    use crate::cluster::registry::{Lasts, Registration};
    use crate::cluster::{Policy, ServiceId, Snapshot, Standing};
    use crate::config::Config;
    use crate::control::api::Reply;
    use crate::control::console::tests::logged;
    use crate::control::hub::tests::reload;
    use crate::control::mailbox::Mailbox;
    use crate::control::services::tallies;
    use crate::control::workers::Workers;
    use crate::worker::link::{Order, WorkerEnd, link};

    /// A source without a connection, as a file would be.
    pub const UNCONNECTED: Source = Source::Connection(1 << 40);

    pub const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);
    const UDP: ServiceId = ServiceId::built_in(Protocol::Udp);

    pub fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    pub fn address(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }

    /// A hub with one worker, played by the test.
    pub fn hub(config: Config) -> (Hub, WorkerEnd) {
        let snapshots = Publisher::new(Snapshot::default());
        let (control, worker) = link(0, 4, snapshots.subscribe(), Arc::new(Notify::new())).unwrap();
        let workers = Workers::new(vec![control]);
        (Hub::new(Arc::new(config), workers, snapshots, at(0)), worker)
    }

    /// The worker has seen everything that was published.
    pub fn turn(worker: &WorkerEnd) {
        worker.metrics.counters.turns.add(2);
    }

    pub fn join(source: Source, service: ServiceId, port: u16) -> Change {
        let (address, weight, name) = (address(port), 1, None);
        let (group, proxy, probe, check) = (None, false, true, None);
        let (http2, tls) = (false, None);
        let wanted = Registration {
            source,
            service,
            address,
            weight,
            name,
            group,
            proxy,
            http2,
            tls,
            probe,
            check,
        };
        Change::Register(wanted)
    }

    pub fn standings(hub: &mut Hub) -> Vec<(u16, Standing)> {
        hub.publish();
        let all = hub.snapshot.backends();
        all.map(|backend| (backend.address.port(), backend.standing)).collect()
    }

    #[test]
    fn a_source_without_a_connection_is_one_like_any_other() {
        let (mut hub, worker) = hub(Config::default());
        assert!(hub.members.is_empty(), "nobody is connected");
        let joined = hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap();
        let id = joined.backend.unwrap();
        assert!(joined.joined && joined.changed);
        hub.apply(join(UNCONNECTED, UDP, 80), at(0)).unwrap();
        let both = [(80, Standing::Serving), (80, Standing::Serving)];
        assert_eq!(standings(&mut hub), both);
        let other = hub.welcome(address(9), Rc::new(Mailbox::default()), at(0));
        let fault = hub.apply(join(other, TCP, 80), at(0)).unwrap_err();
        assert!(matches!(fault, Fault::OwnedByAnother { by: UNCONNECTED, .. }), "{fault:?}");

        hub.apply(Change::Weigh { backend: id, weight: 3 }, at(1)).unwrap();
        let (service, lasts) = (TCP, Lasts::For(Duration::from_secs(9)));
        let drain = Change::Drain { source: UNCONNECTED, service, address: address(80), lasts };
        hub.apply(drain, at(1)).unwrap();
        turn(&worker);
        hub.tick(at(1));
        assert!(hub.registry.get(id).is_some(), "the worker has yet to be told");
        assert_eq!(standings(&mut hub), [(80, Standing::Draining), (80, Standing::Serving)]);
        assert_eq!(hub.snapshot.get(TCP, id).unwrap().weight, 3);
        hub.tick(at(2));
        assert!(hub.registry.get(id).is_some(), "a worker may still begin a session");
        turn(&worker);
        hub.tick(at(3));
        assert_eq!(standings(&mut hub), [(80, Standing::Serving)]);

        let lost = hub.apply(Change::SourceLost { source: UNCONNECTED, why: "it is gone" }, at(4));
        assert_eq!(lost.unwrap().left.len(), 1);
        assert_eq!(standings(&mut hub), []);
        let counted = &hub.counters;
        let counted =
            [&counted.backends_registered, &counted.backends_left, &counted.backends_lost];
        assert_eq!(counted.map(|counter| counter.get()), [2, 1, 1]);
    }

    #[test]
    fn what_changes_nothing_is_not_published_and_what_is_refused_leaves_no_trace() {
        let (mut hub, _worker) = hub(Config::default());
        let id = hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap().backend.unwrap();
        hub.publish();
        let again = hub.apply(join(UNCONNECTED, TCP, 80), at(1)).unwrap();
        assert_eq!((again.backend, again.joined, again.changed), (Some(id), false, false));
        hub.apply(Change::Restore { backend: id }, at(1)).unwrap();
        hub.apply(Change::Leave { backend: BackendId(99) }, at(1)).unwrap();
        assert!(hub.apply(Change::Weigh { backend: id, weight: 0 }, at(1)).is_err());
        let stranger = Source::Connection(7);
        let (service, address) = (TCP, address(80));
        let unregister = Change::Unregister { source: stranger, service, address };
        assert!(hub.apply(unregister, at(1)).is_err());
        hub.publish();
        assert_eq!(hub.snapshot.version, 1);
        let counted = &hub.counters;
        let counted = [
            &counted.backends_registered,
            &counted.backends_left,
            &counted.backends_set_aside,
            &counted.backends_restored,
        ];
        assert_eq!(counted.map(|counter| counter.get()), [1, 0, 0, 0]);
    }

    #[test]
    fn the_log_says_that_a_backend_has_registered_when_the_workers_know() {
        let (mut hub, _worker) = hub(Config::default());
        let early = logged(|| {
            for port in [80, 81] {
                hub.apply(join(UNCONNECTED, TCP, port), at(0)).unwrap();
            }
        });
        assert_eq!(early, [""; 0]);
        let first = |lines: Vec<String>| -> Vec<String> {
            lines.iter().map(|line| line.split(" protocol").next().unwrap().to_owned()).collect()
        };
        let (service, address) = (TCP, address(81));
        let leave = Change::Unregister { source: UNCONNECTED, service, address };
        let gone = first(logged(|| drop(hub.apply(leave, at(0)).unwrap())));
        assert_eq!(gone, ["backend registered backend=b2", "backend left backend=b2"]);
        let told = first(logged(|| hub.publish()));
        assert_eq!(told, ["backend registered backend=b1"]);
        assert_eq!(logged(|| hub.publish()), [""; 0], "once");
    }

    #[tokio::test]
    async fn a_source_reads_what_came_of_its_change_when_the_workers_know() {
        let (mut hub, _worker) = hub(Config::default());
        let mailbox = Rc::new(Mailbox::default());
        let source = hub.welcome(address(9), Rc::clone(&mailbox), at(0));
        let (service, address) = (TCP, address(80));
        for change in [
            join(source, TCP, 80),
            Change::Drain { source, service, address, lasts: Lasts::AsSet },
            Change::Unregister { source, service, address },
        ] {
            hub.apply(change.clone(), at(1)).unwrap();
            mailbox.send(&Reply::AskHello);
            let early = tokio::time::timeout(Duration::ZERO, mailbox.next()).await;
            assert!(early.is_err(), "{change:?}");
            hub.publish();
            assert!(mailbox.next().await.is_some());
        }
    }

    #[test]
    fn a_registration_ends_a_drain_and_begins_to_count_anew_only_if_it_is_one() {
        let (mut hub, worker) = hub(Config::default());
        let id = hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap().backend.unwrap();
        let slot = hub.registry.get(id).unwrap().backend.slot;
        worker.metrics.backends[usize::from(slot)].total.add(5);
        let (service, address) = (TCP, address(80));
        let drain = Change::Drain { source: UNCONNECTED, service, address, lasts: Lasts::AsSet };
        hub.apply(drain, at(0)).unwrap();
        hub.apply(join(UNCONNECTED, TCP, 80), at(1)).unwrap();
        assert_eq!(standings(&mut hub), [(80, Standing::Serving)]);
        turn(&worker);
        hub.tick(at(1_000_000));
        assert_eq!(standings(&mut hub), [(80, Standing::Serving)], "the drain is over");
        let total = crate::metrics::BackendCounters::ROWS.iter().position(|it| it.name == "total");
        assert_eq!(hub.workers.backend(slot)[total.unwrap()], 5);
    }

    #[test]
    fn a_lost_source_takes_the_sessions_along_if_the_settings_say_so() {
        for (on_backend_loss, ended) in [(OnBackendLoss::Close, 1), (OnBackendLoss::Keep, 0)] {
            let mut config = Config::default();
            config.balance.on_backend_loss = on_backend_loss;
            let (mut hub, mut worker) = hub(config);
            let id = hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap().backend.unwrap();
            hub.apply(join(UNCONNECTED, UDP, 80), at(0)).unwrap();
            hub.apply(Change::SourceLost { source: UNCONNECTED, why: "it is gone" }, at(1))
                .unwrap();
            let order = Order::EndBackend { backend: id, reason: EndReason::BackendLeft };
            let orders: Vec<_> = std::iter::from_fn(|| worker.orders.pop().ok()).collect();
            assert_eq!(orders, vec![order; ended], "{on_backend_loss:?}");
        }
    }

    #[test]
    fn a_reload_is_a_publication_and_reaches_every_service() {
        let (mut hub, mut worker) = hub(Config::default());
        hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap();
        hub.publish();
        let before = Arc::clone(&hub.snapshot);
        let mut config = Config::default();
        config.balance.policy = Policy::LeastSessions;
        config.timeouts.connect = Duration::from_millis(11);
        for _ in 0..2 {
            reload(&mut hub, config.clone(), at(1));
            assert_eq!(hub.snapshot.version, 2, "the second time nothing is new");
        }
        let shown = worker.snapshots.changed().unwrap();
        assert!(worker.orders.pop().is_err(), "there is nothing to order");
        for (now, then) in shown.services.iter().zip(&before.services) {
            assert_eq!((now.id, &now.terms), (then.id, &config.terms()));
            assert!(Arc::ptr_eq(&now.pool, &then.pool) && Arc::ptr_eq(&now.turn, &then.turn));
            assert!(Arc::ptr_eq(&now.seats, &then.seats));
        }
        config.log.level = tracing::Level::WARN;
        reload(&mut hub, config, at(1));
        assert!(shown.report_sessions && !hub.snapshot.report_sessions);
        assert_eq!(hub.counters.reloads.get(), 3);
    }

    #[test]
    fn what_a_reload_says_of_lost_backends_holds_from_then_on() {
        let (mut hub, mut worker) = hub(Config::default());
        let mut config = Config::default();
        config.balance.on_backend_loss = OnBackendLoss::Close;
        hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap();
        reload(&mut hub, config, at(1));
        hub.apply(Change::SourceLost { source: UNCONNECTED, why: "it is gone" }, at(1)).unwrap();
        assert!(matches!(worker.orders.pop(), Ok(Order::EndBackend { .. })));
    }

    #[test]
    fn a_refused_message_is_logged_with_the_service_that_it_was_about() {
        let (mut hub, _worker) = hub(Config::default());
        for (service, named) in [(Some("redis"), true), (Some("tcp"), false), (None, false)] {
            let lines = logged(|| hub.refused(address(9), Some("register"), service, "no"));
            assert_eq!(lines[0].contains("service=redis"), named, "{lines:?}");
            assert_eq!(lines[0].contains("service="), named, "{lines:?}");
        }
    }

    #[test]
    fn what_a_service_was_given_never_shrinks_and_is_counted_once() {
        let (mut hub, worker) = hub(Config::default());
        let given = |hub: &Hub| tallies(hub).get(&TCP).map_or(0, |tally| tally.given.sessions);
        let (service, address) = (TCP, address(80));
        for sessions in [5, 12] {
            let id = hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap().backend.unwrap();
            let slot = usize::from(hub.registry.get(id).unwrap().backend.slot);
            worker.metrics.backends[slot].total.add(sessions - given(&hub));
            assert_eq!(given(&hub), sessions);
            hub.apply(Change::Unregister { source: UNCONNECTED, service, address }, at(1)).unwrap();
            assert_eq!(given(&hub), sessions, "it has left");
            hub.publish();
            turn(&worker);
            hub.tick(at(2));
            assert!(hub.departed.is_empty());
            assert_eq!(given(&hub), sessions, "its place is free");
        }
        assert_eq!(tallies(&hub).get(&UDP).map(|tally| tally.given.sessions), None);
    }

    #[test]
    fn a_place_is_given_back_when_the_workers_know_and_its_sessions_have_ended() {
        let (mut hub, worker) = hub(Config::default());
        let id = hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap().backend.unwrap();
        let slot = usize::from(hub.registry.get(id).unwrap().backend.slot);
        worker.metrics.backends[slot].active.set(2);
        let (service, address) = (TCP, address(80));
        hub.apply(Change::Unregister { source: UNCONNECTED, service, address }, at(1)).unwrap();
        assert_eq!((hub.sessions_on(id), hub.address_of(id)), (2, Some(address)));
        turn(&worker);
        hub.tick(at(2));
        assert!(hub.departed.contains_key(&id), "nothing was published");
        hub.publish();
        turn(&worker);
        hub.tick(at(3));
        assert!(hub.departed.contains_key(&id), "sessions run");
        worker.metrics.backends[slot].active.set(0);
        hub.tick(at(4));
        assert_eq!((hub.sessions_on(id), hub.address_of(id)), (0, None));
    }
}
