//! Backends that drain. Owns how each drain begins, is told of, and ends; when its steps are due is up to
//! `drain`, and who may ask for it or take it back is up to the registry.

use std::time::Duration;

use tracing::field::display;
use tracing::info;

use super::{Hub, Mark};
use crate::base::time::Now;
use crate::cluster::BackendId;
use crate::cluster::registry::{Applied, Change, DrainedBy, Lasts};
use crate::control::api::Event;
use crate::control::console::named;
use crate::control::drain::{Drain, DrainStep};
use crate::session::EndReason;

/// A backend that is draining.
pub struct Draining {
    pub drain: Drain,
    /// That of the operator, which goes on if the source takes its own back.
    pub(super) beneath: Option<Drain>,
    /// When the workers were told; `None` until they have been.
    pub(super) mark: Option<Mark>,
}

impl Draining {
    /// A drain that has begun elsewhere, of which the workers here have yet to be told.
    pub(super) fn inherit(drain: Drain, beneath: Option<Drain>, now: Now) -> Draining {
        let beneath = beneath.map(|it| it.inherit(now));
        Draining { drain: drain.inherit(now), beneath, mark: None }
    }

    fn drains(&mut self) -> impl Iterator<Item = &mut Drain> {
        [&mut self.drain].into_iter().chain(&mut self.beneath)
    }
}

impl Hub {
    pub(super) fn drain_begun(&mut self, applied: &Applied, lasts: Lasts, by: DrainedBy, now: Now) {
        let id = applied.backend.expect("a drain that succeeded has a backend");
        let entry = self.registry.get(id).expect("a draining backend is registered");
        let address = entry.backend.address;
        let service = named(self.registry.service(entry.backend.service));
        let left = self.workers.active(entry.backend.slot);
        let time = match lasts {
            Lasts::AsSet => Some(self.config.balance.drain),
            Lasts::For(time) => Some(time),
            Lasts::Never => None,
        };
        let by_operator = by == DrainedBy::Operator;
        match self.draining.get_mut(&id) {
            Some(_) if by_operator && lasts == Lasts::AsSet => return,
            Some(draining) if by_operator => {
                draining.drains().for_each(|it| it.set_deadline(now, time));
            }
            before => {
                let beneath = before.and_then(|it| match it.drain.stays() {
                    true => Some(it.drain.clone()),
                    false => it.beneath.take(),
                });
                let mut drain = Drain::new(now, time, by_operator);
                drain.not_after(beneath.as_ref().and_then(|it| it.deadline));
                // If it was draining already, the workers know, or will learn with the other changes.
                let mark = (!self.publication.is_due()).then(|| self.workers.mark());
                self.draining.insert(id, Draining { drain, beneath, mark });
            }
        }
        let (by, seconds) = (by.name(), time.map(|it| it.as_secs_f64()));
        info!(backend = %id, service, %address, by, left, seconds, "backend draining");
    }

    /// Another balancer has begun a drain, or has moved its deadline. One that runs here for all is over no later.
    pub(super) fn drains_elsewhere(
        &mut self,
        id: BackendId,
        lasts: Option<Duration>,
        is_ours: bool,
        now: Now,
    ) {
        match self.draining.get_mut(&id) {
            Some(draining) if is_ours => {
                draining.drain.not_after(lasts.map(|lasts| now.plus(lasts)));
            }
            Some(draining) => draining.drain.set_deadline(now, lasts),
            None => {
                let mark = (!self.publication.is_due()).then(|| self.workers.mark());
                let drain = Drain::new(now, lasts, true);
                self.draining.insert(id, Draining { drain, beneath: None, mark });
            }
        }
    }

    /// Tells a backend that an operator drains it, and until when.
    pub(super) fn tell_of_drain(&self, id: BackendId, now: Now) {
        let Some(draining) = self.draining.get(&id) else { return };
        let (deadline, left) = (draining.drain.remaining(now), self.sessions_on(id));
        self.tell_backend(id, Event::DrainedByOperator { left, deadline });
    }

    /// The source of a backend wants it to drain no more, which `goes_on` as an operator has asked for it, or
    /// does not.
    pub(super) fn owner_drains_no_more(&mut self, id: BackendId, goes_on: bool, now: Now) {
        match self.draining.get_mut(&id) {
            Some(draining) if goes_on => {
                draining.drain = draining.beneath.take().unwrap_or_else(|| draining.drain.clone());
                // It has not got what it asked for.
                self.tell_of_drain(id, now);
            }
            _ => drop(self.draining.remove(&id)),
        }
    }

    /// Returns whether the backend drained, and does so no more.
    pub(super) fn drain_taken_back(&mut self, applied: &Applied, now: Now) -> bool {
        let id = applied.backend.expect("a drain that was taken back has a backend");
        if !self.draining.contains_key(&id) {
            return false;
        }
        let goes_on = self.registry.get(id).is_some_and(|entry| entry.drained_by().is_some());
        self.owner_drains_no_more(id, goes_on, now);
        if goes_on {
            return false;
        }
        let service = self.named_service_of(id);
        let (address, sessions) = (self.address_of(id).map(display), self.sessions_on(id));
        info!(backend = %id, service, address, sessions, "backend undrained: it gets users again");
        true
    }

    /// The sessions of a backend that stays have ended.
    fn log_drained(&self, id: BackendId, cut: u64) {
        let service = self.named_service_of(id);
        let address = self.address_of(id).map(display);
        info!(backend = %id, service, address, cut, "backend drained: no session is left");
    }

    pub(super) fn advance_drains(&mut self, now: Now) {
        let ids: Vec<_> = self.draining.keys().copied().collect();
        let mut wake = false;
        for id in ids {
            wake |= self.advance_drain(id, now);
        }
        if wake {
            self.workers.wake();
        }
    }

    /// Returns whether the workers must be woken.
    fn advance_drain(&mut self, id: BackendId, now: Now) -> bool {
        let (more, more_cut, silent) = self.elsewhere(id);
        let left = self.sessions_on(id).saturating_add(more);
        let draining = self.draining.get_mut(&id).expect("nothing but its own step ends a drain");
        let knows = draining.mark.as_ref().is_some_and(|it| self.workers.have_passed(it));
        let settled = knows && silent == 0;
        match draining.drain.step(now, left, settled) {
            DrainStep::Nothing => return !knows,
            DrainStep::Tell => {
                self.tell_backend(id, Event::Draining { left });
            }
            DrainStep::Close => {
                self.end_sessions_of(id, EndReason::BackendLeft);
                return true;
            }
            DrainStep::Empty => {
                let cut = draining.drain.cut.saturating_add(more_cut);
                self.tell_backend(id, Event::Drained { cut });
                self.log_drained(id, cut);
            }
            DrainStep::Done => self.end_drain(id, now),
        }
        false
    }

    /// How a drain goes at the other balancers of the cluster.
    fn elsewhere(&self, id: BackendId) -> (u64, u64, usize) {
        self.sharing.as_ref().map_or((0, 0, 0), |sharing| sharing.elsewhere(id))
    }

    fn end_drain(&mut self, id: BackendId, now: Now) {
        // Not taken out here: what is left of it is ended at the deadline that its departure reads.
        let (_, more_cut, _) = self.elsewhere(id);
        let cut = self.draining.get(&id).map_or(0, |it| it.drain.cut).saturating_add(more_cut);
        // It may go on as another balancer's, and is its owner's no more.
        let owned = self.registry.get(id).cloned();
        self.make(Change::Leave { backend: id }, now);
        if let Some(entry) = owned {
            self.tell(&entry, Event::Drained { cut });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use super::super::changes::tests::{TCP, UNCONNECTED, address, at, hub, join, standings, turn};
    use super::*;
    use crate::cluster::Standing;
    use crate::config::Config;
    use crate::control::hub::Source;
    use crate::control::mailbox::Mailbox;
    use crate::worker::link::{Order, WorkerEnd};

    /// A backend with two sessions, and the row of its counters.
    fn busy(hub: &mut Hub, worker: &WorkerEnd, source: Source) -> (BackendId, usize) {
        let backend = hub.apply(join(source, TCP, 80), at(0)).unwrap().backend.unwrap();
        let slot = usize::from(hub.registry.get(backend).unwrap().backend.slot);
        worker.metrics.backends[slot].active.set(2);
        (backend, slot)
    }

    #[tokio::test]
    async fn an_operators_drain_is_no_wish_of_the_source_which_hears_of_it() {
        let (mut hub, worker) = hub(Config::default());
        let mailbox = Rc::new(Mailbox::default());
        let source = hub.welcome(address(9), Rc::clone(&mailbox), at(0));
        let (backend, slot) = busy(&mut hub, &worker, source);
        hub.publish();
        hub.apply(Change::DrainBackend { backend, lasts: Lasts::AsSet }, at(0)).unwrap();
        assert_eq!(standings(&mut hub), [(80, Standing::Draining)]);
        let heard = async || String::from_utf8(mailbox.next().await.unwrap()).unwrap();
        let of = r#""protocol":"tcp","port":80,"service":"tcp"}"#;
        let told = r#"{"event":"draining","left":2,"deadline_ms":30000,"by":"operator","#;
        assert_eq!(heard().await.trim_end(), format!("{told}{of}"));
        hub.tick(at(1000));
        assert_eq!(heard().await.trim_end(), format!(r#"{{"event":"draining","left":2,{of}"#));
        turn(&worker);
        worker.metrics.backends[slot].active.set(0);
        hub.tick(at(1001));
        hub.tick(at(1002));
        assert_eq!(heard().await.trim_end(), format!(r#"{{"event":"drained",{of}"#));
        assert_eq!(standings(&mut hub), [(80, Standing::Draining)], "it stays, to be undrained");
        hub.apply(Change::UndrainBackend { backend }, at(1003)).unwrap();
        hub.apply(Change::UndrainBackend { backend }, at(1003)).unwrap();
        hub.apply(Change::Weigh { backend, weight: 7 }, at(1003)).unwrap();
        hub.ended_by_operator(backend);
        hub.ended_by_operator(backend);
        hub.tick(at(1004));
        assert_eq!(standings(&mut hub), [(80, Standing::Serving)]);
        let by = r#""by":"operator","protocol":"tcp","port":80,"#;
        let expected = [
            format!(r#"{{"event":"undrained",{by}"service":"tcp"}}"#),
            format!(r#"{{"event":"weight",{by}"service":"tcp","weight":7}}"#),
            format!(r#"{{"event":"ended","sessions":2,{by}"service":"tcp"}}"#),
        ];
        assert_eq!(heard().await.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn an_operator_moves_a_deadline_and_asking_again_without_one_does_not() {
        let (mut hub, mut worker) = hub(Config::default());
        let (backend, _) = busy(&mut hub, &worker, UNCONNECTED);
        let mut drained = |lasts, ms| {
            hub.apply(Change::DrainBackend { backend, lasts }, at(ms)).unwrap();
            hub.draining[&backend].drain.deadline
        };
        assert_eq!(drained(Lasts::Never, 0), None);
        assert_eq!(drained(Lasts::AsSet, 1), None);
        assert_eq!(drained(Lasts::For(Duration::from_millis(500)), 10), Some(at(510)));
        assert_eq!(drained(Lasts::AsSet, 20), Some(at(510)));
        hub.publish();
        turn(&worker);
        hub.tick(at(509));
        assert!(worker.orders.pop().is_err(), "not yet");
        hub.tick(at(510));
        let order = Order::EndBackend { backend, reason: EndReason::BackendLeft };
        assert_eq!(worker.orders.pop(), Ok(order));
        assert_eq!(hub.draining[&backend].drain.cut, 2);
    }

    #[tokio::test]
    async fn a_source_takes_back_its_own_drain_and_not_that_of_an_operator() {
        let (mut hub, worker) = hub(Config::default());
        let mailbox = Rc::new(Mailbox::default());
        let source = hub.welcome(address(9), Rc::clone(&mailbox), at(0));
        let (backend, slot) = busy(&mut hub, &worker, source);
        let by_operator = |ms| {
            let lasts = Lasts::For(Duration::from_millis(ms));
            Change::DrainBackend { backend, lasts }
        };
        let deadline = |hub: &Hub| hub.draining[&backend].drain.deadline;
        let (service, address, lasts) = (TCP, address(80), Lasts::AsSet);
        let own = Change::Drain { source, service, address, lasts };
        let back = Change::Undrain { source, service, address };
        hub.apply(by_operator(5_000), at(0)).unwrap();
        for (again, moved) in [(back, 7_000), (join(source, TCP, 80), 3_000)] {
            let before = deadline(&hub);
            hub.apply(own.clone(), at(10)).unwrap();
            hub.apply(own.clone(), at(20)).unwrap();
            assert_eq!(deadline(&hub), before, "the operator's comes first, and holds");
            hub.apply(by_operator(moved), at(30)).unwrap();
            let told = async || String::from_utf8(mailbox.next().await.unwrap()).unwrap();
            hub.publish();
            told().await;
            hub.apply(again, at(40)).unwrap();
            assert_eq!(standings(&mut hub), [(80, Standing::Draining)]);
            assert_eq!(deadline(&hub), Some(at(30 + moved)));
            let last = told().await.lines().last().unwrap().to_owned();
            assert!(last.contains(r#""by":"operator""#), "{last}");
        }
        worker.metrics.backends[slot].active.set(0);
        turn(&worker);
        hub.tick(at(50));
        hub.tick(at(51));
        assert_eq!(standings(&mut hub), [(80, Standing::Draining)], "it stays, as it has not left");
        hub.apply(Change::UndrainBackend { backend }, at(60)).unwrap();
        assert_eq!(standings(&mut hub), [(80, Standing::Serving)]);
        assert!(hub.draining.is_empty());
    }

    #[test]
    fn what_a_late_worker_gave_a_drained_backend_ends_too() {
        let (mut hub, mut worker) = hub(Config::default());
        let (backend, slot) = busy(&mut hub, &worker, UNCONNECTED);
        let (service, address) = (TCP, address(80));
        let lasts = Lasts::For(Duration::ZERO);
        hub.apply(Change::Drain { source: UNCONNECTED, service, address, lasts }, at(0)).unwrap();
        hub.publish();
        hub.tick(at(0));
        let order = Order::EndBackend { backend, reason: EndReason::BackendLeft };
        assert_eq!(worker.orders.pop(), Ok(order));
        // The worker has obeyed, and then begun another with the snapshot that it had.
        worker.metrics.backends[slot].active.set(1);
        hub.tick(at(1000));
        assert!(hub.registry.is_empty() && hub.departed.contains_key(&backend));
        hub.publish();
        turn(&worker);
        hub.tick(at(1001));
        assert_eq!(worker.orders.pop(), Ok(order), "the backend has left with a session");
        worker.metrics.backends[slot].active.set(0);
        hub.tick(at(1002));
        assert!(hub.departed.is_empty() && worker.orders.pop().is_err());
    }

    #[test]
    fn of_a_drain_that_the_backend_asked_for_an_operator_only_moves_the_deadline() {
        let (mut hub, worker) = hub(Config::default());
        let backend = hub.apply(join(UNCONNECTED, TCP, 80), at(0)).unwrap().backend.unwrap();
        let (service, address) = (TCP, address(80));
        let lasts = Lasts::AsSet;
        hub.apply(Change::Drain { source: UNCONNECTED, service, address, lasts }, at(0)).unwrap();
        hub.apply(Change::DrainBackend { backend, lasts: Lasts::Never }, at(0)).unwrap();
        assert_eq!(hub.draining[&backend].drain.deadline, None);
        assert!(hub.apply(Change::UndrainBackend { backend }, at(1)).is_err());
        hub.publish();
        turn(&worker);
        hub.tick(at(2));
        assert!(hub.registry.is_empty());
    }
}
