//! The object `cluster` of the status. Owns the names and units of its fields; `view` fills them in.

use serde::{Deserialize, Serialize};

/// The cluster as this balancer knows it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub name: String,
    /// This process: `<node>~<hex8>`.
    pub node: String,
    /// `down`, `opening`, `listing` or `live`.
    pub store: String,
    /// Why the last connection to the store ended, or what it refused last.
    pub trouble: Option<String>,
    /// The newest revision of the store that was heard of.
    pub revision: i64,
    /// Whether others can see that this balancer is there.
    pub present: bool,
    /// Backends of this balancer that the others have yet to hear of.
    pub unwritten: usize,
    /// What others have said that the store has lost, and that still holds.
    pub orphans: usize,
    /// Values that no balancer of the cluster can have written.
    pub rejected: u64,
    /// Connections to the store that were lost.
    pub lost: u64,
    /// Times that what was known here was not what was there.
    pub relisted: u64,
    /// Backends of others that are not served here.
    pub left_out: Vec<LeftOut>,
    /// This balancer first.
    pub nodes: Vec<NodeStatus>,
}

/// A backend of another balancer that is not served here.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LeftOut {
    /// `<service>/<protocol>/<address>`.
    pub backend: String,
    pub why: String,
}

/// One process of a balancer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct NodeStatus {
    pub id: String,
    /// `serving`, `stopping`, or `gone`: it is not in the store, and its backends go on for a while.
    pub state: String,
    /// Registered there.
    pub backends: usize,
    pub sessions: u64,
    pub version: String,
    /// Whether it gives users of `source_hash` to the same backends as this one does.
    pub chooses_alike: bool,
    /// Where backends register at it.
    pub control: Vec<String>,
}
