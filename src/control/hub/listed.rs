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
use crate::cluster::{BackendId, ServiceId, Standing};

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
        let places: BTreeMap<(ServiceId, SocketAddr), &Registration> =
            wanted.iter().map(|it| ((it.service, it.address), it)).collect();
        let present: Vec<_> =
            self.registry.of_source(Source::File).map(|entry| entry.backend.clone()).collect();
        for backend in present {
            if !self.registry.is_known(backend.service) {
                // It drains with its service.
                continue;
            }
            let (service, address, source) = (backend.service, backend.address, Source::File);
            match places.get(&(service, address)) {
                None => self.make(Change::Unregister { source, service, address }, now),
                Some(it) if it.group != backend.group => {
                    self.make(Change::Register((*it).clone()), now)
                }
                Some(it) => self.weigh(backend.id, it.weight, now),
            };
        }
        self.left_out = LeftOut { all: Vec::new(), next: now.plus(AGAIN_EVERY) };
        for registration in wanted {
            self.join_listed(registration, true, now);
        }
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
