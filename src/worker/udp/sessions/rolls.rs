//! The backends of each UDP service as they were last taken into use. Owns the step from one snapshot to
//! the next, which costs nothing for services whose backends are the same in both.

use std::sync::Arc;
use std::time::Duration;

use super::{Sessions, UdpSettings, plain};
use crate::cluster::service::Pool;
use crate::cluster::{Protocol, Service, ServiceId, Snapshot};
use crate::config::OnUdpLoss;
use crate::proxy::udp::PeerId;
use crate::session::EndReason;

/// The backends of one service as they were last taken into use.
#[derive(Default)]
pub(super) struct Roll {
    /// `None` if some of it has to be tried again.
    pool: Option<Arc<Pool>>,
    peers: Vec<PeerId>,
}

impl Sessions {
    /// Takes a new snapshot of the registered backends into use; the books already have it. Costs time in
    /// proportion to the backends of those services that have changed.
    pub fn adopt(&mut self, snapshot: &Snapshot) {
        self.adopt_terms(snapshot);
        let is_there = |id: ServiceId| snapshot.service(id).is_some();
        let mut rolls = std::mem::take(&mut self.rolls);
        let gone: Vec<ServiceId> = rolls.keys().copied().filter(|id| !is_there(*id)).collect();
        for (service, roll) in gone.iter().filter_map(|id| rolls.remove_entry(id)) {
            self.leave(service, &roll.peers, snapshot.version);
        }
        for service in snapshot.services.iter().filter(|it| it.kind == Protocol::Udp) {
            let roll = rolls.entry(service.id).or_default();
            if !roll.pool.as_ref().is_some_and(|pool| Arc::ptr_eq(pool, &service.pool)) {
                self.call(roll, service, snapshot.version);
            }
        }
        self.rolls = rolls;
    }

    /// Takes the backends of one service into use.
    fn call(&mut self, roll: &mut Roll, service: &Service, version: u64) {
        let before = std::mem::take(&mut roll.peers);
        roll.pool = Some(Arc::clone(&service.pool));
        self.backends.begin_update(service.id);
        for backend in &service.pool.backends {
            let Some(peer) = self.pairs.register(plain(backend.address)) else {
                // The pair table is full of addresses that have left and are still in quarantine: this
                // backend has to wait for the next snapshot.
                roll.pool = None;
                continue;
            };
            roll.peers.push(peer);
            self.backends.update(peer, backend, version);
        }
        self.leave(service.id, &before, version);
    }

    /// Those of a service's backends have left that were at these addresses and are not in the snapshot of
    /// this version.
    fn leave(&mut self, service: ServiceId, before: &[PeerId], version: u64) {
        for peer in before {
            let Some(state) = self.backends.remove_absent(*peer, service, version) else {
                continue;
            };
            if !self.backends.is_any_at(*peer) {
                self.pairs.unregister(*peer);
            }
            if self.settings.udp.on_backend_loss == OnUdpLoss::Drop {
                self.sweep(state.backend, EndReason::BackendLeft);
            }
        }
    }

    pub fn settings(&self) -> &UdpSettings {
        &self.settings
    }

    /// How long sockets are kept from reuse after a session, from now on.
    pub fn set_quarantine(&mut self, lasts: Duration) {
        self.pairs.set_quarantine(lasts);
    }

    fn adopt_terms(&mut self, snapshot: &Snapshot) {
        for service in snapshot.services.iter().filter(|it| it.kind == Protocol::Udp) {
            self.flows.set_idle(service.id, service.terms.timeouts.udp_idle);
        }
    }
}
