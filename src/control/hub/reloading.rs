//! What new settings come to: services that join, change and leave while users are served. Owns the order in
//! which a service leaves: its doors close, its users who are still in their queues are let in, its backends
//! are told and drain, and when its last session has ended it is forgotten. Until then the workers know it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::{Hub, Mark};
use crate::base::time::Now;
use crate::cluster::registry::{Change, Lasts};
use crate::cluster::{BackendId, Protocol, ServiceId};
use crate::config::{Config, rules};
use crate::control::api::Event;
use crate::control::doors::{OpenDoor, Opened, Step, put_addresses};
use crate::control::history::marks::What;
use crate::control::legacy::format;
use crate::control::status::ShiftEnded;
use crate::tls::Tls;

/// How long a service whose doors have closed goes on serving, for users who came by them last.
const LAST_USERS: Duration = Duration::from_millis(200);
/// How often the session table is searched for sessions of a service that leaves.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A service that is no longer in the settings.
pub(super) struct Leaving {
    /// When the workers were told that its doors are closed.
    mark: Mark,
    since: Now,
    /// When its sessions are to have ended.
    until: Now,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its last users come in.
    Closing,
    /// Its backends drain.
    Draining,
    /// It has no backends any more. The session table is to be searched then.
    Empty { look_at: Now },
    /// Nobody is left. What the workers said of the last one is to be heard.
    Over,
}

impl Leaving {
    pub(super) fn describe(&self) -> format::Leaving {
        let Leaving { since, until, stage, .. } = *self;
        format::Leaving { since, until, drains: stage != Stage::Closing }
    }

    pub(super) fn inherit(from: format::Leaving, mark: Mark, now: Now) -> Leaving {
        let stage = if from.drains { Stage::Draining } else { Stage::Closing };
        Leaving { mark, since: from.since.min(now), until: from.until, stage }
    }
}

impl Hub {
    /// Applies new settings, for which these doors were opened; the workers follow on their next turn. Returns
    /// the shifts that are over.
    pub fn reloaded(
        &mut self,
        mut config: Config,
        tls: Arc<Tls>,
        (step, opened): (Step, Vec<Opened>),
        now: Now,
    ) -> Vec<ShiftEnded> {
        let until = now.plus(config.balance.drain);
        let at: Vec<SocketAddr> = opened.iter().map(|door| door.address).collect();
        self.doors.take(&step, &at, now, until, config.api.head_timeout);
        put_addresses(self.doors.open(), &mut config.services);
        let mut changed = config.reports_sessions() != self.snapshot.report_sessions;
        let gone = self.gone_from(&config);
        gone.iter().for_each(|id| self.registry.retire(*id));
        changed |= self.add_services(&config) | !gone.is_empty();
        changed |= self.registry.agree(|service| config.terms_for(service.id));
        changed |= self.registry.let_in(|service| config.users_for(service.id));
        let (other_shares, shifts_ended) = self.follow_shares(&config);
        changed |= other_shares;
        changed |= self.follow_claims(&config, &step);
        // The files may have changed where their names have not.
        changed |= tls.agreed.is_some() || self.snapshot.tls.agreed.is_some();
        changed |= config.backend_tls != self.config.backend_tls
            || self.registry.entries().any(|entry| entry.backend.tls.is_some());
        self.registry.set_tls(tls);
        if changed {
            self.publication.ask();
        }
        self.config = Arc::new(config);
        self.follow_checks(now);
        self.follow_file(now);
        // A worker looks at the newest snapshot before it changes a door.
        self.publish();
        self.change_doors(step, opened);
        self.begin_to_leave(gone, now, until);
        self.counters.reloads.one();
        self.history.marks.add(now, What::Reload, None, None);
        shifts_ended
    }

    /// The files of certificates have changed, and say this now.
    pub fn certified(&mut self, tls: Arc<Tls>) {
        self.registry.set_tls(tls);
        self.publication.ask();
    }

    /// The services that these settings do not have any more.
    fn gone_from(&self, config: &Config) -> Vec<ServiceId> {
        let named = self.registry.known().filter(|service| !service.id.is_built_in());
        named.map(|service| service.id).filter(|id| config.service(*id).is_none()).collect()
    }

    /// Returns whether there are new ones.
    fn add_services(&mut self, config: &Config) -> bool {
        let mut added = false;
        for table in &config.services {
            if self.registry.has_service(table.id) {
                continue;
            }
            let kin = self.registry.service(ServiceId::built_in(table.protocol));
            let service = config.new_service(table, kin);
            info!(service = %table.name, protocol = %table.protocol, "service added");
            self.registry.add(service);
            added = true;
        }
        added
    }

    /// Which requests are for whom may have changed. Returns whether the workers would see a difference.
    fn follow_claims(&mut self, config: &Config, step: &Step) -> bool {
        let claimants = |config: &Config| {
            let all = config.services.iter().filter(|it| it.protocol != Protocol::Udp);
            all.map(|it| (it.id, it.doors().collect::<Vec<_>>(), it.claims())).collect::<Vec<_>>()
        };
        let same = claimants(config) == claimants(&self.config);
        if same && step.changes() == 0 {
            return false;
        }
        let claims = rules::claims(config).expect("the settings have been checked");
        let doors = self.doors.routing(&claims, &self.snapshot.doors);
        self.registry.set_doors(Arc::new(doors));
        true
    }

    fn change_doors(&mut self, step: Step, opened: Vec<Opened>) {
        for (door, opened) in step.open.into_iter().zip(opened) {
            let (id, plan) = (door.id, door.plan);
            info!(service = %plan.name, protocol = %plan.protocol, address = %opened.address, "door opened");
            self.workers.open_door(id, &plan, opened.sockets);
        }
        for (door, plan) in step.assign {
            self.workers.assign_door(&door, plan.service, plan.is_tls);
            let (service, address) = (&plan.name, door.address);
            info!(%service, protocol = %plan.protocol, %address, from = %door.name, "door taken over");
        }
        for door in step.close {
            match door.protocol {
                // Its sessions have no other way back to their users.
                Protocol::Udp => {
                    self.workers.assign_door(&door, self.doors.heir(&door), false);
                }
                Protocol::Tcp | Protocol::Api => self.workers.close_door(&door),
            }
            tell_closed(&door);
        }
        self.workers.wake();
    }

    fn begin_to_leave(&mut self, gone: Vec<ServiceId>, now: Now, until: Now) {
        for id in gone {
            let service = self.registry.service(id);
            let sessions = service.gate.sessions();
            let seconds = until.since(now).as_secs_f64();
            info!(
                service = %service.name,
                sessions, seconds, "service removed: its sessions may end"
            );
            let (mark, stage) = (self.workers.mark(), Stage::Closing);
            self.leaving.insert(id, Leaving { mark, since: now, until, stage });
        }
    }

    /// Moves the services on that leave. `all_heard`: the workers have said nothing that was not heard.
    pub(super) fn advance_leaving(&mut self, all_heard: bool, now: Now) {
        let ids: Vec<ServiceId> = self.leaving.keys().copied().collect();
        let mut in_table = None;
        for id in ids {
            let leaving = &self.leaving[&id];
            let settled = self.workers.have_passed(&leaving.mark);
            if !settled {
                self.workers.wake();
                continue;
            }
            match leaving.stage {
                Stage::Closing if now >= leaving.since.plus(LAST_USERS) => {
                    self.drain_service(id, now)
                }
                Stage::Closing => {}
                Stage::Draining => self.drained(id, now),
                Stage::Empty { look_at } if now >= look_at => {
                    let is_over = self.is_deserted(id)
                        && !in_table.get_or_insert_with(|| self.with_sessions()).contains(&id);
                    // A worker reports a session that has ended before it takes it out of the table.
                    let again = Stage::Empty { look_at: now.plus(LOOK_EVERY) };
                    self.stage(id, if is_over { Stage::Over } else { again });
                }
                Stage::Over if all_heard => self.forget(id),
                Stage::Empty { .. } | Stage::Over => {}
            }
        }
        self.close_udp_doors(now);
    }

    fn stage(&mut self, id: ServiceId, stage: Stage) {
        self.leaving.entry(id).and_modify(|leaving| leaving.stage = stage);
    }

    /// Its backends are told, and get no more users.
    fn drain_service(&mut self, id: ServiceId, now: Now) {
        let until = self.leaving[&id].until;
        let own = self.registry.of_service(id);
        let members: Vec<BackendId> = own.map(|entry| entry.backend.id).collect();
        for backend in members {
            self.tell_backend(backend, Event::Removed);
            let Some(entry) = self.registry.get(backend) else { continue };
            let (source, address) = (entry.source, entry.backend.address);
            let lasts = Lasts::For(until.since(now));
            self.make(Change::Drain { source, service: id, address, lasts }, now);
        }
        self.stage(id, Stage::Draining);
    }

    fn drained(&mut self, id: ServiceId, now: Now) {
        let until = self.leaving[&id].until;
        let mut is_empty = self.registry.of_service(id).next().is_none();
        for departed in self.departed.values_mut().filter(|it| it.backend.service == id) {
            // One that left before leaves its sessions no more time than the others.
            if departed.repeat.is_none_or(|at| now < until && until < at) {
                departed.repeat = Some(until);
            }
            is_empty = false;
        }
        if is_empty {
            self.stage(id, Stage::Empty { look_at: now });
        }
    }

    /// The services of all sessions.
    fn with_sessions(&self) -> BTreeSet<ServiceId> {
        let mut found = BTreeSet::new();
        for shard in self.workers.shards() {
            found.extend(shard.iter().map(|session| session.service));
        }
        found
    }

    /// Whether a service has no doors left, and nobody inside or before them.
    fn is_deserted(&self, id: ServiceId) -> bool {
        self.registry.service(id).gate.is_deserted() && !self.doors.is_closing(id)
    }

    /// A service without backends and doors goes with its last session.
    fn forget(&mut self, id: ServiceId) {
        self.leaving.remove(&id);
        self.given_before.remove(&id);
        let name = self.registry.forget(id);
        info!(service = %name, "service gone: its last session has ended");
        self.publication.ask();
    }

    /// Whether a service has been removed and still has sessions, or did a moment ago.
    pub fn is_leaving(&self, id: ServiceId) -> bool {
        self.leaving.contains_key(&id)
    }

    fn close_udp_doors(&mut self, now: Now) {
        if !self.workers.can_change_doors(self.doors.closing()) {
            return;
        }
        let empty = |id: ServiceId| {
            let stage = self.leaving.get(&id).map(|it| it.stage);
            matches!(stage, Some(Stage::Empty { .. }))
                && self.registry.service(id).gate.sessions() == 0
        };
        for door in self.doors.close_due(now, empty) {
            self.workers.close_door(&door);
            self.workers.wake();
        }
    }
}

fn tell_closed(door: &OpenDoor) {
    let OpenDoor { name, protocol, address, .. } = door;
    info!(service = %name, %protocol, %address, "door closed to new users");
}
