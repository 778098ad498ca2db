//! What other balancers say of backends, in the registry. Owns how that is united with what is said here: a
//! backend stays for as long as anybody says that it is registered, under one id.

use std::net::SocketAddr;

use super::{Applied, Change, DrainedBy, Fault, Registered, Registration, Registry};
use crate::base::time::Now;
use crate::cluster::backend::{BackendId, ServiceId};
use crate::cluster::source::Source;

impl Registry {
    pub(super) fn claim(
        &mut self,
        wanted: Registration,
        drains: Option<DrainedBy>,
        now: Now,
    ) -> Result<Applied, Fault> {
        debug_assert_eq!(wanted.source, Source::Cluster, "claims are what other balancers say");
        let known = self.find(wanted.service, wanted.address);
        let Some(entry) = known else {
            let applied = self.apply(Change::Register(wanted), now)?;
            return Ok(self.drain_elsewhere(applied, drains));
        };
        let (id, is_ours) = (entry.backend.id, entry.source != Source::Cluster);
        let is_same = entry.backend.tls == wanted.tls && entry.backend.http2 == wanted.http2;
        if !is_ours && !is_same {
            // What was said to it in the clear is not gone on with: it is another backend from here on.
            self.check_other(&wanted)?;
            // The place that it leaves is not free before its sessions have ended.
            self.check_room()?;
            let left = self.remove(&[id]).left;
            let applied = self.apply(Change::Register(wanted), now)?;
            return Ok(Applied { left, ..self.drain_elsewhere(applied, drains) });
        }
        self.check_other(&wanted)?;
        let entry = self.entry(id);
        entry.is_claimed = true;
        let before = entry.backend.clone();
        entry.backend.weight = wanted.weight;
        entry.backend.name = wanted.name;
        entry.backend.group = wanted.group;
        entry.backend.proxy = wanted.proxy;
        if !is_ours {
            entry.probe = wanted.probe;
            entry.check = wanted.check;
        }
        let changed = entry.backend != before;
        let applied = self.changed(id, changed);
        Ok(self.drain_elsewhere(applied, drains))
    }

    /// Whether what is said elsewhere can hold here.
    fn check_other(&self, wanted: &Registration) -> Result<(), Fault> {
        match self.check(wanted) {
            Ok(()) | Err(Fault::TlsChanges { .. } | Fault::HttpChanges { .. }) => Ok(()),
            Err(fault) => Err(fault),
        }
    }

    fn drain_elsewhere(&mut self, applied: Applied, drains: Option<DrainedBy>) -> Applied {
        let id = applied.backend.expect("a claim that was accepted has a backend");
        let amended = self.amend(id, |against| against.drained_elsewhere = drains);
        Applied { changed: applied.changed | amended.changed, ..applied }
    }

    pub(super) fn unclaim(&mut self, service: ServiceId, address: SocketAddr) -> Applied {
        let Some(entry) = self.find(service, address).filter(|entry| entry.is_claimed) else {
            return Applied::default();
        };
        let (id, source) = (entry.backend.id, entry.source);
        self.entry(id).is_claimed = false;
        match source {
            Source::Cluster => self.remove(&[id]),
            _ => self.amend(id, |against| against.drained_elsewhere = None),
        }
    }

    /// Their source is done with these backends: they leave, or go on as those of other balancers.
    pub(super) fn release(&mut self, ids: &[BackendId]) -> Applied {
        let is_kept = |id: &BackendId| {
            let entry = self.entries.get(id);
            entry.is_some_and(|it| it.is_claimed && it.source != Source::Cluster)
        };
        let (kept, going): (Vec<BackendId>, Vec<_>) = ids.iter().partition(|id| is_kept(id));
        let mut changed = false;
        for id in &kept {
            self.hand_over(*id, Source::Cluster);
            changed |= self.entrust(*id);
        }
        let applied = self.remove(&going);
        let backend = applied.backend.or(kept.first().copied());
        Applied { backend, changed: changed | applied.changed, kept, ..applied }
    }

    /// What was asked for here went with who had asked.
    fn entrust(&mut self, id: BackendId) -> bool {
        let applied = self.amend(id, |against| {
            against.drained_by_owner = false;
            against.drained_by_operator = false;
        });
        applied.changed
    }

    /// Gives a backend another source. One that is said elsewhere to be registered stays claimed.
    pub(super) fn hand_over(&mut self, id: BackendId, to: Source) {
        let from = std::mem::replace(&mut self.entry(id).source, to);
        if from == to {
            return;
        }
        if let Some(others) = self.by_source.get_mut(&from) {
            others.remove(&id);
            if others.is_empty() {
                self.by_source.remove(&from);
            }
        }
        self.by_source.entry(to).or_default().insert(id);
    }

    fn entry(&mut self, id: BackendId) -> &mut Registered {
        self.entries.get_mut(&id).expect("it has just been found")
    }
}
