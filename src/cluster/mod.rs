//! The backends as everyone sees them: identities, addresses and the frozen [`Snapshot`] that workers
//! balance over. Owns no decision; who is in is `registry`'s, in which order `rotation`'s, and who is
//! next is `balance`'s.

pub mod registry;
pub mod rotation;
pub mod seats;
pub mod service;
pub mod source;

pub use service::{OnBackendLoss, Policy, Timeouts};

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use rotation::Rotation;

/// The three kinds of user, and of the backend that serves them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Api,
}

impl Protocol {
    pub const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Api];

    /// The name on the control port, in the status and in metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Api => "api",
        }
    }

    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// One registration. Never used again in the life of a process, so a late report about a backend
/// that left cannot be taken for one about its successor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct BackendId(pub u32);

impl fmt::Display for BackendId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "b{}", self.0)
    }
}

/// Whether new sessions may go to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// In the rotation.
    Serving,
    /// Registered and answering hello, but its data port refused: out of the rotation until the
    /// balancer has connected to it again.
    Aside,
    /// Keeps the sessions that it has and gets no new ones.
    Draining,
}

/// A backend as it stood when the snapshot was taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backend {
    pub id: BackendId,
    /// Where the workers count for it (`metrics::BACKENDS_MAX` places); given out again only after
    /// the backend has left and its sessions have ended.
    pub slot: u16,
    pub protocol: Protocol,
    /// The address of the control connection's peer with the port that was registered.
    pub address: SocketAddr,
    /// Share of new sessions relative to the others, 1 to [`WEIGHT_MAX`].
    pub weight: u16,
    pub name: Option<Arc<str>>,
    pub standing: Standing,
}

/// The largest weight that a backend may ask for.
pub const WEIGHT_MAX: u16 = 256;

/// Every backend at one moment, frozen. Membership, standing and rotation come as one value and so
/// can never disagree.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Grows by one with every change.
    pub version: u64,
    /// In the order of registration.
    pub backends: Vec<Backend>,
    /// By [`Protocol::index`]: the order in which places in `backends` are served.
    pub rotations: [Rotation; 3],
}

impl Snapshot {
    /// These backends, in the order of their registration, each protocol's in rotation.
    pub fn frozen(version: u64, backends: Vec<Backend>) -> Snapshot {
        let rotations = Protocol::ALL.map(|protocol| rotation(&backends, protocol));
        Snapshot { version, backends, rotations }
    }

    pub fn get(&self, id: BackendId) -> Option<&Backend> {
        // Registration numbers only grow, and backends stand in the order of registration.
        let place = self.backends.binary_search_by_key(&id, |backend| backend.id).ok()?;
        Some(&self.backends[place])
    }

    pub fn of(&self, protocol: Protocol) -> impl Iterator<Item = &Backend> {
        self.backends.iter().filter(move |backend| backend.protocol == protocol)
    }
}

/// The order in which the backends of a protocol are served. When all of them were set aside they are
/// tried all the same: a user who is refused in the end has lost nothing, and one may be back.
fn rotation(backends: &[Backend], protocol: Protocol) -> Rotation {
    let weights_of = |standing| -> Vec<(u16, u16)> {
        (0u16..)
            .zip(backends)
            .filter(|(_, it)| it.protocol == protocol && it.standing == standing)
            .map(|(place, it)| (place, it.weight))
            .collect()
    };
    let serving = weights_of(Standing::Serving);
    Rotation::weighted(&if serving.is_empty() { weights_of(Standing::Aside) } else { serving })
}
