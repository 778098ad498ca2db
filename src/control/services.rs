//! Services by their names, as backends and operators know them. Owns which service a message means, the
//! sentence when it means none, where a service's users come in, and how many backends and sessions it has.
//! Changes nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::api::{DOORS_LISTED_MAX, ServiceLine, Target};
use super::hub::Hub;
use super::rights::{self, Identity};
use super::status::BackendState;
use super::workers::{Given, value};
use crate::base::likeness;
use crate::cluster::registry::Registry;
use crate::cluster::{Backend, Protocol, Service, ServiceId};
use crate::config::Config;

/// Names that an unknown one is compared with, at most.
const COMPARED_MAX: usize = 64;

/// The service that a message is about.
///
/// # Errors
/// Why there is none, in a sentence for whoever sent the message.
pub fn meant<'r>(registry: &'r Registry, target: &Target) -> Result<&'r Service, String> {
    let (name, protocol) = match target {
        Target::BuiltIn(protocol) => return Ok(registry.service(ServiceId::built_in(*protocol))),
        Target::Named { service, protocol } => (service, protocol),
    };
    let service = named(registry, name)?;
    match protocol {
        Some(protocol) if *protocol != service.kind => {
            Err(format!("the protocol of service {name} is {}, not {protocol}", service.kind))
        }
        _ => Ok(service),
    }
}

/// The service of this name.
///
/// # Errors
/// That there is none, with the name that comes nearest and how many there are.
pub fn named<'r>(registry: &'r Registry, name: &str) -> Result<&'r Service, String> {
    registry.named(name).ok_or_else(|| unknown(registry, name))
}

/// Comparing names takes microseconds each, so of very many only neighbours in the alphabet are compared.
fn unknown(registry: &Registry, name: &str) -> String {
    let count = registry.known().count();
    match likeness::nearest(name, registry.names_near(name, COMPARED_MAX / 2)) {
        Some(nearest) if count <= COMPARED_MAX / 2 => {
            format!("there is no service {name}; the nearest name among the {count} is {nearest}")
        }
        Some(similar) => {
            format!("there is no service {name} among the {count}; a similar name is {similar}")
        }
        None => format!(
            "there is no service {name} among the {count} of this balancer, and none with a name like it"
        ),
    }
}

/// Where users of a service connect.
pub fn doors(config: &Config, service: &Service) -> Vec<SocketAddr> {
    match config.service(service.id) {
        // An API service without a door of its own shares those of the built-in one.
        Some(table) if table.has_doors() || table.protocol != Protocol::Api => {
            table.doors().collect()
        }
        None if !service.id.is_built_in() => Vec::new(),
        _ => config.listen.of(service.kind).collect(),
    }
}

/// Whether backends may register for a service.
pub fn takes_registrations(config: &Config, service: &Service) -> bool {
    let table = config.service(service.id);
    table.map_or(service.id.is_built_in(), |table| table.register)
}

/// Checks that a backend may register for a service.
///
/// # Errors
/// Why it may not, in a sentence for the backend.
pub fn may_register(
    config: &Config,
    service: &Service,
    from: IpAddr,
    identity: Option<&Identity>,
) -> Result<(), String> {
    let (name, table) = (&service.name, config.service(service.id));
    if table.is_some_and(|table| !table.register) {
        return Err(format!(
            "service {name} takes no registrations: its backends are those in the balancer's file"
        ));
    }
    rights::may_join(name, config.joining(table), from, identity)
}

/// Whether a backend that may not register would have to prove a secret, or another one, to do so.
pub fn needs_secret(
    config: &Config,
    service: &Service,
    from: IpAddr,
    identity: Option<&Identity>,
) -> bool {
    let table = config.service(service.id);
    let takes = table.is_none_or(|table| table.register);
    takes && rights::needs_secret(&config.joining(table), from, identity)
}

/// The backends and sessions of one service, counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Registered backends, by their place in [`BackendState::REGISTERED`].
    backends: [u64; BackendState::REGISTERED.len()],
    /// Sessions on its backends, including those that have left.
    pub sessions: u64,
    /// What its backends were given, whichever of them.
    pub given: Given,
}

impl Tally {
    /// Its registered backends in each state.
    pub fn by_state(&self) -> impl Iterator<Item = (BackendState, u64)> {
        BackendState::REGISTERED.into_iter().zip(self.backends)
    }

    fn count(&mut self, hub: &Hub, backend: &Backend) {
        let values = hub.workers.backend(backend.slot);
        self.sessions += value(&values, "active");
        self.given.add(&values);
    }

    fn in_state(&self, wanted: BackendState) -> u64 {
        self.by_state().filter(|(state, _)| *state == wanted).map(|(_, count)| count).sum()
    }
}

/// Every service that has or had backends, counted in one pass.
pub fn tallies(hub: &Hub) -> BTreeMap<ServiceId, Tally> {
    let before = |(service, given): (&ServiceId, &Given)| {
        (*service, Tally { given: *given, ..Tally::default() })
    };
    let mut tallies: BTreeMap<ServiceId, Tally> = hub.given_before.iter().map(before).collect();
    for backend in hub.registry.entries().map(|entry| &entry.backend) {
        let tally = tallies.entry(backend.service).or_default();
        let state = BackendState::of(backend.standing);
        let place = BackendState::REGISTERED.into_iter().position(|it| it == state);
        tally.backends[place.expect("what is registered is in one of these states")] += 1;
        tally.count(hub, backend);
    }
    for departed in hub.departed.values().map(|it| &it.backend) {
        tallies.entry(departed.service).or_default().count(hub, departed);
    }
    tallies
}

/// A service in the answer to `services`.
pub fn line(hub: &Hub, service: &Service, tally: Tally) -> ServiceLine {
    let mut doors = doors(&hub.config, service);
    doors.truncate(DOORS_LISTED_MAX);
    ServiceLine {
        name: service.name.to_string(),
        protocol: service.kind,
        doors,
        serving: tally.in_state(BackendState::Serving),
        register: takes_registrations(&hub.config, service),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Snapshot;

    fn registry(names: &[String]) -> Registry {
        let first = &Snapshot::default().services[0];
        let service = |(id, name): (u16, &String)| Service {
            id: ServiceId(id),
            name: name.as_str().into(),
            ..first.clone()
        };
        let services: Vec<Service> = (3u16..).zip(names).map(service).collect();
        Registry::new(1, &services)
    }

    #[test]
    fn a_name_that_is_unknown_is_answered_with_one_like_it_however_many_there_are() {
        for (count, asked, said) in [
            (
                1,
                "mail",
                "there is no service mail among the 1 of this balancer, and none with a name like it",
            ),
            (9, "web-6x", "there is no service web-6x; the nearest name among the 9 is web-6"),
            (
                1000,
                "web-612x",
                "there is no service web-612x among the 1000; a similar name is web-612",
            ),
        ] {
            let names: Vec<String> = (0..count).map(|number| format!("web-{number}")).collect();
            let registry = registry(&names);
            assert_eq!(named(&registry, asked).map(|it| it.id), Err(said.to_owned()));
            for (id, name) in (3..).zip(&names) {
                assert_eq!(named(&registry, name).map(|it| it.id), Ok(ServiceId(id)));
            }
        }
    }
}
