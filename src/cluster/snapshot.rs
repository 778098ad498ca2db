//! Everything that workers need for balancing, at one moment and as one value. Owns the look-up of a
//! service or a backend in it, and the step from one snapshot to the next.

use std::sync::Arc;

use super::backend::{Backend, BackendId, Protocol, ServiceId};
use super::doors::Doors;
use super::hash_key::HashKey;
use super::seats::Seats;
use super::service::{Pool, RequestLimits, Service, Terms};
use crate::tls::Tls;

/// Every service with its backends, frozen. Membership, standing, rotation and terms come as one value
/// and so can never disagree.
///
/// A service stays in the snapshots as long as it has sessions.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Grows by one with every change.
    pub version: u64,
    /// Whether workers report each session's start and end, or only what the control core must know.
    pub report_sessions: bool,
    /// In the order of their ids.
    pub services: Box<[Service]>,
    /// Which of them an API request is for.
    pub doors: Arc<Doors>,
    pub tls: Arc<Tls>,
    /// Of every hash by which a user is given a backend; the same for as long as the process runs.
    pub key: HashKey,
}

/// The built-in services on the default terms, with seats for everybody.
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
            terms: terms.clone(),
            groups: Arc::default(),
            turn: Arc::default(),
            seats: seats(protocol),
            gate: Arc::default(),
            users: Arc::default(),
            pool: Arc::default(),
        };
        let services = Protocol::ALL.map(service);
        Snapshot {
            version: 0,
            report_sessions: true,
            services: services.into(),
            doors: Arc::default(),
            tls: Arc::default(),
            key: HashKey::default(),
        }
    }

    /// The snapshot after this one, with exactly these backends registered; they must be in the order
    /// of registration.
    pub fn with(&self, backends: &[Backend]) -> Snapshot {
        let of = |service: &Service| {
            let own = backends.iter().filter(|backend| backend.service == service.id).cloned();
            Service {
                pool: Arc::new(Pool::frozen(own.collect(), service, self.key)),
                ..service.clone()
            }
        };
        let services = self.services.iter().map(of).collect();
        Snapshot { version: self.version + 1, services, ..self.clone() }
    }

    #[inline]
    pub fn service(&self, id: ServiceId) -> Option<&Service> {
        // Unless an earlier service has gone, a service stands at the index that is its number.
        let at_home = self.services.get(usize::from(id.0)).filter(|service| service.id == id);
        at_home.or_else(|| self.search(id))
    }

    #[cold]
    fn search(&self, id: ServiceId) -> Option<&Service> {
        let place = self.services.binary_search_by_key(&id, |service| service.id).ok()?;
        Some(&self.services[place])
    }

    pub fn pool(&self, id: ServiceId) -> Option<&Pool> {
        self.service(id).map(|service| &*service.pool)
    }

    /// What a request for this service may take.
    #[inline]
    pub fn request_limits(&self, id: ServiceId) -> RequestLimits {
        self.service(id).map_or(RequestLimits::DEFAULT, |service| service.terms.requests)
    }

    /// A backend of a service.
    pub fn get(&self, service: ServiceId, id: BackendId) -> Option<&Backend> {
        self.pool(service)?.get(id)
    }

    /// A backend of any service of a kind.
    pub fn find(&self, kind: Protocol, id: BackendId) -> Option<&Backend> {
        let services = self.services.iter().filter(|service| service.kind == kind);
        services.filter_map(|service| service.pool.get(id)).next()
    }

    /// Every backend, service by service, and within a service in the order of registration.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.services.iter().flat_map(|service| service.pool.backends.iter())
    }

    /// The backends of every service of one kind, in the same order.
    pub fn of(&self, kind: Protocol) -> impl Iterator<Item = &Backend> {
        let services = self.services.iter().filter(move |service| service.kind == kind);
        services.flat_map(|service| service.pool.backends.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::super::backend::Standing;
    use super::*;

    fn backend(id: u32, service: ServiceId) -> Backend {
        Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(id),
            slot: id as u16,
            service,
            address: ([192, 0, 2, 1], 80).into(),
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        }
    }

    /// Services with these numbers.
    fn numbered(ids: &[u16]) -> Snapshot {
        let first = Snapshot::default().services[0].clone();
        let services = ids.iter().map(|id| Service { id: ServiceId(*id), ..first.clone() });
        Snapshot { services: services.collect(), ..Snapshot::default() }
    }

    #[test]
    fn a_service_is_found_by_its_id_whichever_others_have_gone() {
        for ids in [&[][..], &[0, 1, 2], &[1, 2], &[0, 2, 7], &[3, 300, 65_534]] {
            let snapshot = numbered(ids);
            for id in (0..400).chain([65_534]) {
                let found = snapshot.service(ServiceId(id)).map(|service| service.id.0);
                assert_eq!(found, ids.contains(&id).then_some(id), "among {ids:?}");
            }
        }
    }

    #[test]
    fn the_next_snapshot_has_each_backend_in_the_pool_of_its_service() {
        let [tcp, udp, api] = Protocol::ALL.map(ServiceId::built_in);
        let first = Snapshot::default();
        let all = [backend(1, udp), backend(2, tcp), backend(5, udp)];
        let next = first.with(&all);
        assert_eq!(next.version, first.version + 1);
        let ids = |service| -> Vec<u32> {
            next.pool(service).unwrap().backends.iter().map(|backend| backend.id.0).collect()
        };
        assert_eq!([ids(tcp), ids(udp), ids(api)], [vec![2], vec![1, 5], vec![]]);
        assert_eq!(next.get(udp, BackendId(5)), Some(&all[2]));
        assert_eq!(next.get(tcp, BackendId(5)), None, "it belongs to another service");
        assert_eq!(next.find(Protocol::Udp, BackendId(5)), Some(&all[2]));
        assert_eq!(next.find(Protocol::Tcp, BackendId(5)), None, "it is of another kind");
        assert_eq!(next.of(Protocol::Udp).count(), 2);
        assert_eq!(next.backends().count(), 3);
    }
}
