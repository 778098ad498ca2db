//! The form in which a control core describes itself to its successor: JSON, in which unknown members are
//! passed over and missing ones have their default. Owns what is written; what it means is up to those who
//! describe and take up.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::bytes::Bytes;
use super::counts::Counts;
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::cluster::registry::Against;
use crate::control::checks::Verdict;
use crate::control::drain::Drain;
use crate::control::frame::Framer;
use crate::control::health::{Hellos, Revival, Silence};
use crate::control::history::Recorded;
use crate::control::history::marks::What;
use crate::control::pace::Pace;
use crate::control::steadiness::Track;

/// Everything that a control core knows.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Legacy {
    /// When it stood still.
    pub at: Now,
    pub started: Now,
    /// Those that are about to leave as well.
    pub services: Vec<Service>,
    /// Those that have left as well, while they may have sessions.
    pub backends: Vec<Backend>,
    pub numbers: Numbers,
    pub connections: Vec<Connection>,
    pub counts: Counts,
    pub steadiness: Steadiness,
    pub history: Recorded,
    pub marks: Vec<Mark>,
}

/// The next numbers to be given out, none of which is ever given twice.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Numbers {
    pub backend: u32,
    pub connection: u64,
    /// The version of the last snapshot.
    pub snapshot: u64,
    /// The place that the next backend gets.
    pub slot: u16,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    pub id: u16,
    pub name: String,
    pub protocol: Option<Protocol>,
    pub turn: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Leaving>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Group {
    pub name: String,
    pub share: u8,
    /// What the settings say, unless an operator has shifted the shares.
    pub file_share: Option<u8>,
    pub turn: u64,
}

/// A service that has been removed.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Leaving {
    pub since: Now,
    pub until: Now,
    /// Whether its backends have been told.
    pub drains: bool,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Backend {
    pub id: u32,
    pub slot: u16,
    pub service: u16,
    /// The number of its connection; none: the settings list it, or another balancer has registered it.
    pub connection: Option<u64>,
    pub is_of_cluster: bool,
    /// Whether other balancers have registered it.
    pub is_claimed: bool,
    pub address: Option<SocketAddr>,
    pub weight: u16,
    /// What the settings say of that, if they list it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_weight: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    pub proxy: bool,
    pub http2: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    pub since: Now,
    pub probe: bool,
    /// The check that it has asked for, in its words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    pub against: Against,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// The operator's drain beneath that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beneath: Option<Drain>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checked: Option<Checked>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revival: Option<Revival>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silence: Option<Silence>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aside_because: Option<String>,
    /// When it last began to answer a request.
    pub answered: Now,
    /// Its sessions that operators have ended and of which it has not been told.
    pub ended_by_operators: u64,
    /// Whether the log has yet to say that it has registered.
    pub is_new: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left: Option<Left>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Tls {
    pub name: Option<String>,
    pub ca: Option<String>,
}

/// What is left of a backend that has left.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Left {
    /// When its sessions are to be ended.
    pub repeat: Option<Now>,
}

/// What is known of a backend's check.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Checked {
    pub verdict: Verdict,
    pub contrary: u32,
    /// When the next check begins; one that runs is begun anew.
    pub next: Now,
    pub outcome: Option<Outcome>,
    /// Whether its sessions are being ended because it has failed.
    pub ends: bool,
}

/// The last check.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    pub verdict: Verdict,
    pub since: Now,
    pub last: Now,
    pub took: Duration,
    pub failure: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Steadiness {
    pub began: Now,
    pub seen: Vec<Seen>,
}

/// One backend by its address, whichever of its registrations.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Seen {
    pub service: u16,
    pub address: Option<SocketAddr>,
    pub track: Track,
}

/// A mark of the history.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Mark {
    pub at: Now,
    pub what: What,
    #[serde(default)]
    pub service: Option<String>,
    #[serde(default)]
    pub backend: Option<u32>,
    #[serde(default)]
    pub count: u32,
}

/// A control connection.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Connection {
    /// Its number among all that there have been.
    pub number: u64,
    /// The place of its descriptor among those handed over.
    pub socket: usize,
    pub peer: Option<SocketAddr>,
    /// Where its bytes stand in the framing.
    pub framer: Framer,
    /// Received and not yet parsed.
    pub unheard: Bytes,
    pub pending: Vec<Pending>,
    /// Queued for the peer: what is being written, and then the rest.
    pub writing: Bytes,
    pub unsent: Bytes,
    /// It was given up and is to be closed.
    pub is_broken: bool,
    /// When the rest of its requests is given up, once the peer has closed its side.
    pub ended: Option<Now>,
    pub hellos: Hellos,
    pub pace: Pace,
    pub proof: Option<Proof>,
    pub identity: Option<Identity>,
    /// Since when it has proved or registered nothing.
    pub unproven: Option<Now>,
    pub listing: Option<Listing>,
    pub answered: Option<(Now, Option<Duration>)>,
    pub misses: u32,
}

/// A message that has yet to be handled.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pending {
    /// The object, to be read again.
    pub said: Bytes,
    /// If there was none: what the peer is told.
    pub bad: Option<String>,
    /// Whether it is then disconnected.
    pub fatal: bool,
}

/// A challenge that has not been answered.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Proof {
    pub nonce: String,
    pub deadline: Now,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    pub name: String,
    /// The services whose secret was proved; none: the common one.
    pub keyrings: Vec<Option<String>>,
}

/// A list of which a part has been sent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Listing {
    /// The backends that follow this one, of a service of this number and name or of all.
    Backends { of: Option<(u16, String)>, after: u32 },
    /// The services that follow this one.
    Services { after: Option<u16> },
}
