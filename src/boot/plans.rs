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
