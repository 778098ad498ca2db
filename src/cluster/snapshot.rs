//! Everything that workers balance by, at one moment and as one value. Owns how a service and a backend
//! are found in it, and how the next one follows from the last.

use std::sync::Arc;

use super::backend::{Backend, BackendId, Protocol, ServiceId};
use super::seats::Seats;
use super::service::{Pool, Service, Terms};

/// Every service with its backends, frozen. Membership, standing, rotation and terms come as one value
/// and so can never disagree.
///
/// A service stays in the snapshots for as long as sessions of it run.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Grows by one with every change.
    pub version: u64,
    /// Whether workers report each session's start and end, or only what the control core must know.
    pub report_sessions: bool,
    /// In the order of their ids.
    pub services: Box<[Service]>,
}

/// The built-in services by the default terms, with seats for everybody.
impl Default for Snapshot {
    fn default() -> Snapshot {
        Snapshot::built_in(Terms::default(), |_| Arc::new(Seats::new(usize::MAX)))
    }
}

impl Snapshot {
    /// The built-in services, one for each protocol and named after it, before anyone has registered.
    pub fn built_in(terms: Terms, seats: impl Fn(Protocol) -> Arc<Seats>) -> Snapshot {
        let service = |protocol: Protocol| Service {
            id: ServiceId::built_in(protocol),
            name: protocol.name().into(),
            kind: protocol,
            terms,
            turn: Arc::default(),
            seats: seats(protocol),
            pool: Arc::default(),
        };
        let services = Protocol::ALL.map(service);
        Snapshot { version: 0, report_sessions: true, services: services.into() }
    }

    /// The snapshot that follows this one when these backends, in the order of their registration, are
    /// all that are registered.
    pub fn with(&self, backends: &[Backend]) -> Snapshot {
        let of = |service: &Service| {
            let own = backends.iter().filter(|backend| backend.service == service.id).cloned();
            Service { pool: Arc::new(Pool::frozen(own.collect())), ..service.clone() }
        };
        let services = self.services.iter().map(of).collect();
        Snapshot { version: self.version + 1, services, ..*self }
    }

    pub fn service(&self, id: ServiceId) -> Option<&Service> {
        let place = self.services.binary_search_by_key(&id, |service| service.id).ok()?;
        Some(&self.services[place])
    }

    pub fn pool(&self, id: ServiceId) -> Option<&Pool> {
        self.service(id).map(|service| &*service.pool)
    }

    /// A backend of a service.
    pub fn get(&self, service: ServiceId, id: BackendId) -> Option<&Backend> {
        self.pool(service)?.get(id)
    }

    /// Every backend, service by service, each service's in the order of registration.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.services.iter().flat_map(|service| service.pool.backends.iter())
    }

    /// Likewise the backends of every service of a kind.
    pub fn of(&self, kind: Protocol) -> impl Iterator<Item = &Backend> {
        let services = self.services.iter().filter(move |service| service.kind == kind);
        services.flat_map(|service| service.pool.backends.iter())
    }
}
