//! Listed backends that are doors of the balancer itself, whose users would be sent in a circle, and checks
//! of them that would only find the balancer. Owns the sentences that refuse both; which addresses lead back is up to `control::home`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::Trouble;
use crate::cluster::Protocol;
use crate::config::{Config, plans};
use crate::control::home;

/// Refuses a configuration that lists a door of its own as a backend.
///
/// # Errors
/// One sentence for the operator.
pub fn refuse(config: &Config) -> Result<(), Trouble> {
    refuse_of(config, home::is_of_this_host)
}

fn refuse_of(config: &Config, ours: impl Fn(SocketAddr) -> bool) -> Result<(), Trouble> {
    let users = plans::doors(config);
    let users = users.iter().map(|door| (door.protocol == Protocol::Udp, door.address));
    let others = [config.listen.control, config.listen.admin];
    let others = others.into_iter().flatten().map(|address| (false, address));
    // By port, so that a thousand doors are not compared with a thousand backends.
    let mut doors: BTreeMap<(bool, u16), Vec<SocketAddr>> = BTreeMap::new();
    for (datagrams, address) in users.chain(others) {
        doors.entry((datagrams, address.port())).or_default().push(address);
    }
    for service in &config.services {
        let name = &service.name;
        let is_door = |datagrams: bool, address: SocketAddr| {
            let close = doors.get(&(datagrams, address.port())).into_iter().flatten();
            close.into_iter().any(|door| home::leads_to(*door, address, &ours))
        };
        for address in service.backends.iter().map(|backend| backend.address) {
            if is_door(service.protocol == Protocol::Udp, address) {
                return Err(Trouble(format!(
                    "service.{name}.backends lists {address}, which is a door of the balancer itself: name \
                     the port that the server listens on",
                )));
            }
            let checked = service.check.port.map(|port| SocketAddr::new(address.ip(), port));
            if let Some(checked) = checked.filter(|at| is_door(false, *at)) {
                return Err(Trouble(format!(
                    "service.{name}.check.port leads to {checked}, which is a door of the balancer itself: \
                     name the port where the server tells its health"
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::services::{ServiceConfig, StaticBackend};

    #[test]
    fn a_listed_backend_is_none_of_the_doors() {
        for (protocol, address, fits) in [
            (Protocol::Tcp, "10.9.9.1:5432", false),
            (Protocol::Tcp, "127.0.0.1:5432", false),
            (Protocol::Tcp, "10.9.9.2:5432", true),
            (Protocol::Udp, "10.9.9.1:5432", true),
            (Protocol::Tcp, "10.9.9.1:5433", true),
            (Protocol::Tcp, "127.0.0.1:8084", false),
            (Protocol::Udp, "127.0.0.1:8082", false),
        ] {
            let (weight, address) = (1, address.parse().unwrap());
            let backends = vec![StaticBackend {
                address,
                weight,
                group: None,
                proxy: false,
                http2: false,
                tls: None,
            }];
            let listen = vec!["[::]:5432".parse().unwrap()];
            let door = ServiceConfig { listen, ..ServiceConfig::new("door", Protocol::Tcp) };
            let list = ServiceConfig { backends, ..ServiceConfig::new("list", protocol) };
            let config = Config { services: vec![door, list], ..Config::default() };
            let ours = |it: SocketAddr| ["10.9.9.1", "127.0.0.1"].contains(&&*it.ip().to_string());
            let outcome = refuse_of(&config, ours);
            assert_eq!(outcome.is_ok(), fits, "{protocol} {address}");
            if let Err(Trouble(said)) = outcome {
                assert!(
                    said.starts_with(&format!("service.list.backends lists {address}")),
                    "{said}"
                );
            }
        }
    }

    #[test]
    fn a_check_does_not_ask_the_balancer_itself() {
        for (protocol, backend, port, fits) in [
            (Protocol::Tcp, "127.0.0.1:9", Some(5432), false),
            (Protocol::Tcp, "127.0.0.1:9", Some(8084), false),
            (Protocol::Udp, "10.9.9.1:9", Some(5432), false),
            (Protocol::Udp, "10.9.9.1:9", Some(8082), true),
            (Protocol::Api, "10.9.9.2:9", Some(5432), true),
            (Protocol::Tcp, "127.0.0.1:9", Some(8008), true),
            (Protocol::Tcp, "127.0.0.1:9", None, true),
        ] {
            let (weight, address) = (1, backend.parse().unwrap());
            let backends = vec![StaticBackend {
                address,
                weight,
                group: None,
                proxy: false,
                http2: false,
                tls: None,
            }];
            let listen = vec!["[::]:5432".parse().unwrap()];
            let door = ServiceConfig { listen, ..ServiceConfig::new("door", Protocol::Tcp) };
            let mut list = ServiceConfig { backends, ..ServiceConfig::new("list", protocol) };
            list.check.port = port;
            let config = Config { services: vec![door, list], ..Config::default() };
            let ours = |it: SocketAddr| ["10.9.9.1", "127.0.0.1"].contains(&&*it.ip().to_string());
            let outcome = refuse_of(&config, ours);
            assert_eq!(outcome.is_ok(), fits, "{protocol} {backend} {port:?}");
            if let Err(Trouble(said)) = outcome {
                assert!(said.starts_with("service.list.check.port leads to "), "{said}");
            }
        }
    }
}
