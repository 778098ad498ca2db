//! Backends that the configuration lists. Owns the way from the list to the registry: at the start, by a
//! reload, and again while the place of one is taken. They have no control connection and answer no hello;
//! otherwise they are backends like all others.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use super::Hub;
use crate::base::time::Now;
use crate::cluster::registry::{Applied, Change, Registered, Registration};
use crate::cluster::source::Source;
use crate::cluster::{Backend, BackendId, ServiceId, Standing};

/// How often a listed backend that could not be registered is tried again.
const AGAIN_EVERY: Duration = Duration::from_secs(1);

/// Listed backends that could not be registered: somebody else has their place.
#[derive(Default)]
pub struct LeftOut {
    all: Vec<Registration>,
    next: Now,
}

impl Hub {
    /// The listed backends join, and the workers know of them before anybody is told that the balancer is ready.
    pub fn start(&mut self, now: Now) {
        self.follow_file(now);
        self.publish();
    }

    /// Brings the registry in line with the configuration. A listed backend that an operator has drained
    /// or given another weight is again what the file says.
    pub fn follow_file(&mut self, now: Now) {
        let wanted = self.listed();
        for (backend, it) in self.take_out_unlisted(&wanted, now) {
            match it.group == backend.group {
                true => self.weigh(backend.id, it.weight, now),
                false => self.make(Change::Register(it.clone()), now),
            };
        }
        self.left_out = LeftOut { all: Vec::new(), next: now.plus(AGAIN_EVERY) };
        for registration in wanted {
            self.join_listed(registration, true, now);
        }
    }

    /// Brings the registry in line with the configuration, where another said this of the weights before. What
    /// operators have changed stays where the configuration has not changed.
    pub(super) fn follow_other_file(&mut self, before: &BTreeMap<BackendId, u16>, now: Now) {
        let wanted = self.listed();
        for (backend, it) in self.take_out_unlisted(&wanted, now) {
            let was = before.get(&backend.id).copied().unwrap_or(backend.weight);
            if (it.weight, &it.group, it.proxy) != (was, &backend.group, backend.proxy) {
                self.make(Change::Register(it.clone()), now);
            }
        }
        self.left_out = LeftOut { all: Vec::new(), next: now.plus(AGAIN_EVERY) };
        for registration in wanted {
            let known = self.registry.find(registration.service, registration.address);
            if known.is_none_or(|entry| entry.source != Source::File) {
                self.join_listed(registration, true, now);
            }
        }
    }

    /// Has those leave that are not listed any more; returns the others, each with what is wanted of it.
    fn take_out_unlisted<'w>(
        &mut self,
        wanted: &'w [Registration],
        now: Now,
    ) -> Vec<(Backend, &'w Registration)> {
        let places: BTreeMap<(ServiceId, SocketAddr), &Registration> =
            wanted.iter().map(|it| ((it.service, it.address), it)).collect();
        let listed = self.registry.of_source(Source::File).map(|entry| entry.backend.clone());
        // The others drain with their services.
        let present: Vec<_> = listed.filter(|it| self.registry.is_known(it.service)).collect();
        let mut kept = Vec::new();
        for backend in present {
            let (service, address, source) = (backend.service, backend.address, Source::File);
            match places.get(&(service, address)) {
                // One that is reached in another way joins again as another.
                Some(it) if (it.http2, &it.tls) == (backend.http2, &backend.tls) => {
                    kept.push((backend, *it));
                }
                _ => drop(self.make(Change::Unregister { source, service, address }, now)),
            }
        }
        kept
    }

    /// What the configuration says of the weight of a backend that it lists.
    pub(super) fn weight_in_file(&self, entry: &Registered) -> Option<u16> {
        let Backend { service, address, .. } = entry.backend;
        let table = self.config.service(service).filter(|_| entry.source == Source::File)?;
        let listed = table.backends.iter().find(|it| canonical(it.address) == address)?;
        Some(listed.weight)
    }

    /// Tries again to register those that could not be.
    pub(super) fn retry_left_out(&mut self, now: Now) {
        if self.left_out.all.is_empty() || now < self.left_out.next {
            return;
        }
        self.left_out.next = now.plus(AGAIN_EVERY);
        for registration in std::mem::take(&mut self.left_out.all) {
            self.join_listed(registration, false, now);
        }
    }

    /// What the configuration lists, service by service.
    fn listed(&self) -> Vec<Registration> {
        let services = self.config.services.iter();
        services
            .flat_map(|service| {
                service.backends.iter().map(move |backend| Registration {
                    source: Source::File,
                    service: service.id,
                    address: canonical(backend.address),
                    weight: backend.weight,
                    name: None,
                    group: backend.group.as_deref().map(Arc::from),
                    proxy: backend.proxy,
                    http2: backend.http2,
                    tls: backend.tls.clone(),
                    probe: true,
                    check: None,
                })
            })
            .collect()
    }

    fn join_listed(&mut self, registration: Registration, is_first_try: bool, now: Now) {
        let known = self.registry.find(registration.service, registration.address);
        let serves = |entry: &&Registered| {
            entry.source == Source::File
                && entry.backend.standing != Standing::Draining
                && entry.backend.proxy == registration.proxy
        };
        if known.filter(serves).is_some() {
            return;
        }
        if let Err(reason) = self.apply(Change::Register(registration.clone()), now) {
            if is_first_try {
                let service = &self.registry.service(registration.service).name;
                let address = registration.address;
                warn!(%service, %address, %reason, "a backend of the configuration is left out");
            }
            self.left_out.all.push(registration);
        }
    }

    fn weigh(&mut self, backend: BackendId, weight: u16, now: Now) -> Applied {
        self.make(Change::Weigh { backend, weight }, now)
    }
}

/// An IPv4 address is never written as a mapped IPv6 one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use crate::config::services::CheckConfig;
    use crate::control::hub::Hub;
    use crate::control::hub::tests::{PG, at, config, hub, reload};
    use crate::tls::backends::BackendTls;

    #[test]
    fn a_listed_backend_that_is_reached_by_tls_from_now_on_is_another_one() {
        let of = |tls: Option<BackendTls>| {
            let mut config = config(&[(1, 1), (2, 1)], CheckConfig::default());
            config.services[0].backends[0].tls = tls;
            config
        };
        let (mut hub, _worker) = hub(of(None));
        let listed = |hub: &mut Hub| {
            hub.publish();
            let mut all: Vec<_> = hub.snapshot.pool(PG).unwrap().backends.to_vec();
            all.sort_by_key(|it| it.address);
            all.into_iter().map(|it| (it.id, it.tls)).collect::<Vec<_>>()
        };
        let named = |name: &str| Some(BackendTls { name: Some(name.into()), ca: None });
        let mut before = listed(&mut hub);
        for (number, tls) in (1..).zip([named("a.example"), named("b.example"), None]) {
            reload(&mut hub, of(tls.clone()), at(number * 10));
            let now = listed(&mut hub);
            assert_ne!(now[0].0, before[0].0, "no connection of the one before is used for it");
            assert_eq!((&now[0].1, &now[1]), (&tls, &before[1]));
            before = now;
        }
        reload(&mut hub, of(None), at(100));
        assert_eq!(listed(&mut hub), before);
    }

    #[test]
    fn a_listed_backend_that_speaks_another_http_from_now_on_is_another_one() {
        let of = |http2: bool| {
            let mut config = config(&[(1, 1), (2, 1)], CheckConfig::default());
            config.services[0].backends[0].http2 = http2;
            config
        };
        let (mut hub, _worker) = hub(of(false));
        let listed = |hub: &mut Hub| {
            hub.publish();
            let mut all: Vec<_> = hub.snapshot.pool(PG).unwrap().backends.to_vec();
            all.sort_by_key(|it| it.address);
            all.into_iter().map(|it| (it.id, it.http2)).collect::<Vec<_>>()
        };
        let mut before = listed(&mut hub);
        for (number, http2) in (1..).zip([true, false]) {
            reload(&mut hub, of(http2), at(number * 10));
            let now = listed(&mut hub);
            assert_ne!(now[0].0, before[0].0, "no connection of the one before is used for it");
            assert_eq!((now[0].1, now[1]), (http2, before[1]));
            before = now;
        }
        reload(&mut hub, of(false), at(100));
        assert_eq!(listed(&mut hub), before, "the file says the same again");
    }
}
