//! The users' doors that a configuration asks for, each with the service that it belongs to. Owns that list;
//! `doors` opens them.

use std::net::SocketAddr;

use super::doors::Name;
use crate::cluster::{Protocol, ServiceId};
use crate::config::Config;

/// A door to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoorPlan {
    pub name: Name,
    /// The service of the users who come to it.
    pub service: ServiceId,
    pub protocol: Protocol,
    pub address: SocketAddr,
}

/// Every door, those of the built-in services first.
pub fn doors(config: &Config) -> Vec<DoorPlan> {
    let listen = &config.listen;
    let of = |protocol| match protocol {
        Protocol::Tcp => listen.tcp,
        Protocol::Udp => listen.udp,
        Protocol::Api => listen.api,
    };
    let built_in = |protocol: Protocol| {
        let (name, service) = (Name::flag(protocol.name()), ServiceId::built_in(protocol));
        of(protocol).map(|address| DoorPlan { name, service, protocol, address })
    };
    Protocol::ALL.into_iter().filter_map(built_in).collect()
}

/// Whether users of this protocol are let in anywhere.
pub fn has_door(config: &Config, protocol: Protocol) -> bool {
    doors(config).iter().any(|door| door.protocol == protocol)
}

/// How many doors there are besides those of the built-in services.
pub fn named(config: &Config) -> usize {
    doors(config).iter().filter(|door| !door.name.is_flag()).count()
}
