//! The entries of the lists that a backend may ask for, and how much room each takes in a message.

use std::net::SocketAddr;

use serde::Serialize;

use crate::cluster::{Backend, Protocol, Service, Standing};

/// A backend in the answer to `list`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Listed {
    pub id: String,
    pub service: String,
    pub protocol: Protocol,
    pub address: SocketAddr,
    pub weight: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    pub state: Standing,
    /// Whether the asking connection registered it.
    pub own: bool,
    pub sessions: u64,
}

impl Listed {
    /// A backend as listed for a connection, its `own` or somebody else's.
    pub fn of(service: &Service, backend: &Backend, own: bool, sessions: u64) -> Listed {
        Listed {
            id: backend.id.to_string(),
            service: service.name.to_string(),
            protocol: service.kind,
            address: backend.address,
            weight: backend.weight,
            name: backend.name.as_deref().map(str::to_owned),
            group: backend.group.as_deref().map(str::to_owned),
            state: backend.standing,
            own,
            sessions,
        }
    }
}

/// A service in the answer to `services`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ServiceLine {
    pub name: String,
    pub protocol: Protocol,
    /// Where its users connect, [`DOORS_LISTED_MAX`] at most.
    pub doors: Vec<SocketAddr>,
    /// Backends that get new sessions.
    pub serving: u64,
    /// Whether backends may register themselves.
    pub register: bool,
}

impl ServiceLine {
    /// Bytes that it takes in a message, at most.
    pub fn bytes_max(&self) -> usize {
        // {"name":"","protocol":"tcp","doors":[],"serving":65535,"register":false}, with a comma each.
        80 + self.name.len() + 61 * self.doors.len()
    }
}
