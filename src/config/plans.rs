//! The users' doors that a configuration asks for, each with the service that it belongs to. Owns that list;
//! `doors` opens them.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::cluster::{Protocol, ServiceId};
use crate::config::Config;

/// A door as its operator knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// In sentences and in the status.
    pub name: Arc<str>,
    flag: bool,
}

impl Name {
    /// A door that `--NAME` places.
    pub fn flag(name: &str) -> Name {
        Name { name: name.into(), flag: true }
    }

    /// A door of the service that `[service.NAME]` describes.
    pub fn service(name: &str) -> Name {
        Name { name: name.into(), flag: false }
    }

    pub fn is_flag(&self) -> bool {
        self.flag
    }

    /// Where its address is chosen.
    pub fn place(&self) -> String {
        if self.flag {
            format!("with --{}", self.name)
        } else {
            format!("in [service.{}]", self.name)
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.name)
    }
}

/// A door to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoorPlan {
    pub name: Name,
    /// The service of the users who come to it.
    pub service: ServiceId,
    pub protocol: Protocol,
    pub address: SocketAddr,
    /// Users speak TLS here, whatever their service says.
    pub is_tls: bool,
}

/// Every door: those of the built-in services, that of TLS after its plain one, then those of the named ones in
/// the order of the file. Services that want the same address share one door, which belongs to the first of
/// them.
pub fn doors(config: &Config) -> Vec<DoorPlan> {
    let mut doors: Vec<DoorPlan> =
        Protocol::ALL.into_iter().filter_map(|it| built_in(config, it)).collect();
    doors.extend(api_tls(config));
    for named in &config.services {
        let plain = named.listen.iter().map(|address| (*address, false));
        for (address, is_tls) in plain.chain(named.listen_tls.iter().map(|it| (*it, true))) {
            let (name, protocol) = (Name::service(&named.name), named.protocol);
            let door = DoorPlan { name, service: named.id, protocol, address, is_tls };
            if !doors.iter().any(|other| other.is_shared_with(&door)) {
                doors.push(door);
            }
        }
    }
    doors
}

fn built_in(config: &Config, protocol: Protocol) -> Option<DoorPlan> {
    let (name, service) = (Name::flag(protocol.name()), ServiceId::built_in(protocol));
    let plan = |address| DoorPlan { name, service, protocol, address, is_tls: false };
    config.listen.plain(protocol).map(plan)
}

fn api_tls(config: &Config) -> Option<DoorPlan> {
    let (name, protocol) = (Name::flag("api-tls"), Protocol::Api);
    let service = ServiceId::built_in(protocol);
    let plan = |address| DoorPlan { name, service, protocol, address, is_tls: true };
    config.listen.api_tls.map(plan)
}

impl DoorPlan {
    /// A port that the kernel is to choose is never another's.
    fn is_shared_with(&self, other: &DoorPlan) -> bool {
        // Of TCP, only those that hosts tell apart get here with one address.
        let alike = self.protocol == other.protocol && self.protocol != Protocol::Udp;
        alike
            && self.is_tls == other.is_tls
            && self.address == other.address
            && self.address.port() != 0
    }
}

/// Whether users of this protocol are let in anywhere.
pub fn has_door(config: &Config, protocol: Protocol) -> bool {
    doors(config).iter().any(|door| door.protocol == protocol)
}

/// How many doors there are besides the plain ones of the built-in services.
pub fn named(config: &Config) -> usize {
    doors(config).iter().filter(|door| door.is_tls || !door.name.is_flag()).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::services::ServiceConfig;

    fn config(named: &[(&str, Protocol, &[&str])]) -> Config {
        let service = |(name, protocol, listen): &(&str, Protocol, &[&str])| ServiceConfig {
            listen: listen.iter().map(|at| at.parse().unwrap()).collect(),
            ..ServiceConfig::new(name, *protocol)
        };
        let mut config = Config::default();
        config.set_services(named.iter().map(service).collect());
        config.listen.udp = None;
        config.listen.api = Some("192.0.2.1:80".parse().unwrap());
        config
    }

    fn told(config: &Config) -> Vec<String> {
        let told = |door: DoorPlan| {
            let DoorPlan { name, service, protocol, address, is_tls } = door;
            let tls = if is_tls { " tls" } else { "" };
            format!("{name} {} {protocol} {address}{tls}", service.0)
        };
        doors(config).into_iter().map(told).collect()
    }

    #[test]
    fn a_door_belongs_to_the_service_that_names_it() {
        use Protocol::{Tcp, Udp};
        let config = config(&[
            ("redis", Tcp, &["192.0.2.1:6379", "192.0.2.2:6379"]),
            ("dns", Udp, &["192.0.2.1:53"]),
        ]);
        let wanted = [
            "tcp 0 tcp [::]:8081",
            "api 2 api 192.0.2.1:80",
            "redis 3 tcp 192.0.2.1:6379",
            "redis 3 tcp 192.0.2.2:6379",
            "dns 4 udp 192.0.2.1:53",
        ];
        assert_eq!(told(&config), wanted);
        assert_eq!(named(&config), 3);
        assert!(has_door(&config, Udp), "though listen.udp is off");
    }

    #[test]
    fn a_door_for_https_comes_beside_the_plain_one_or_alone() {
        let mut config = config(&[]);
        (config.listen.tcp, config.listen.api_tls) = (None, "192.0.2.1:443".parse().ok());
        assert_eq!(told(&config), ["api 2 api 192.0.2.1:80", "api-tls 2 api 192.0.2.1:443 tls"]);
        assert_eq!(named(&config), 1, "it takes a listener more");
        config.listen.api = None;
        assert_eq!(told(&config), ["api-tls 2 api 192.0.2.1:443 tls"]);
        assert!(has_door(&config, Protocol::Api) && config.listen.has(Protocol::Api));
        assert!(!config.listen.has(Protocol::Tcp) && !config.listen.has(Protocol::Udp));
    }

    #[test]
    fn a_service_may_have_doors_for_https_which_are_shared_like_others() {
        let mut config =
            config(&[("shop", Protocol::Api, &["192.0.2.1:81"]), ("blog", Protocol::Api, &[])]);
        let sealed = ["192.0.2.1:443", "192.0.2.1:444"].map(|at| at.parse().unwrap());
        config.listen.tcp = None;
        config.services.iter_mut().for_each(|it| it.listen_tls = vec![sealed[0]]);
        config.services[1].listen_tls.push(sealed[1]);
        let wanted = [
            "api 2 api 192.0.2.1:80",
            "shop 3 api 192.0.2.1:81",
            "shop 3 api 192.0.2.1:443 tls",
            "blog 4 api 192.0.2.1:444 tls",
        ];
        assert_eq!(told(&config), wanted);
        config.listen.api_tls = Some(sealed[0]);
        assert_eq!(told(&config)[1], "api-tls 2 api 192.0.2.1:443 tls");
        assert_eq!(told(&config).len(), 4, "it is the common one");
    }

    #[test]
    fn api_services_share_a_door_which_belongs_to_the_first_of_them() {
        use Protocol::Api;
        let config = config(&[
            ("shop", Api, &[]),
            ("blog", Api, &["192.0.2.1:80", "192.0.2.1:81", "192.0.2.1:0"]),
            ("wiki", Api, &["192.0.2.1:81", "192.0.2.1:0"]),
        ]);
        let wanted = [
            "tcp 0 tcp [::]:8081",
            "api 2 api 192.0.2.1:80",
            "blog 4 api 192.0.2.1:81",
            "blog 4 api 192.0.2.1:0",
            "wiki 5 api 192.0.2.1:0",
        ];
        assert_eq!(told(&config), wanted);
        assert_eq!(named(&config), 3);
    }
}
