//! What passes between the machine and a store. Owns the words; a store that can answer these commands with these
//! events can hold a cluster.

use super::key::{NodeId, Place};
use super::value::{Offer, Verb};

/// A key in the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    pub key: String,
    pub value: String,
    /// The revision of the store in which it was written last.
    pub revision: i64,
}

/// Something that the store, or the way to it, has said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// There is a connection to a member that has a leader.
    Opened { store: u64, revision: i64 },
    /// A lease was granted.
    Granted { lease: i64 },
    /// It lives on,
    Renewed,
    /// or is not there any more, and nor is what was written under it.
    LeaseGone,
    /// Every key of the cluster, as of one revision.
    Listed { revision: i64, rows: Vec<Row> },
    /// What one revision, or several, have changed.
    Changed { revision: i64, puts: Vec<Row>, deletes: Vec<(String, i64)> },
    /// The store no longer knows what has happened since the revision that was to be watched from.
    Compacted,
    /// A batch was written, as one revision.
    Written { revision: i64 },
    /// What was asked for last was refused.
    Refused { why: Refusal, said: String },
    /// How many keys the cluster has, and the newest revision among them.
    Audited { store: u64, revision: i64, count: usize, newest: i64 },
    /// The connection is of no more use.
    Lost { said: String },
}

/// Why the store refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It has no room (etcd: NOSPACE).
    Full,
    /// The lease is not there any more.
    LeaseGone,
    Other,
}

/// One change to the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Under the lease of the batch.
    Put {
        key: String,
        value: String,
    },
    Delete {
        key: String,
    },
}

impl Op {
    pub fn key(&self) -> &str {
        match self {
            Op::Put { key, .. } | Op::Delete { key } => key,
        }
    }
}

/// What is to be done at the store. Nothing is answered out of turn: each command but `Watch` and `Close` has one
/// answer, or none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Let go of what there is, and connect to the `attempt`-th endpoint, counted in circles.
    Open {
        attempt: usize,
    },
    Grant,
    Renew {
        lease: i64,
    },
    List,
    /// Tell of every change from this revision on. Takes the place of an earlier watch.
    Watch {
        from: i64,
    },
    /// All of it at once, or none.
    Write {
        lease: i64,
        ops: Vec<Op>,
    },
    Audit,
    Close,
}

/// What the registry is to take over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Others have a backend registered there. What holds of it is the newest word of all, ours among them, but for
    /// its state, which is what the others say.
    Claim { place: Place, offer: Offer, owner: NodeId },
    /// None of them has any more.
    Unclaim { place: Place, why: Gone },
    /// An operator asks this from another balancer.
    Asked { place: Place, verb: Verb, from: String },
}

/// Why nobody else has a backend registered any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gone {
    Left,
    Lost,
    /// Its balancer has not been heard of for too long.
    Orphaned,
}
