//! Why a backend gets no new sessions, as far as anything speaks against that. Owns what outweighs what.

use serde::{Deserialize, Serialize};

use super::DrainedBy;
use crate::cluster::backend::Standing;

/// What speaks against new sessions of a backend. Each comes and goes by itself: a check that passes says
/// nothing of a data port that refused, and the port that accepts again nothing of the check.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Against {
    /// Its source has asked for a drain,
    pub drained_by_owner: bool,
    /// or an operator has. Neither takes back what the other has asked for.
    pub drained_by_operator: bool,
    /// Or either has asked another balancer.
    pub drained_elsewhere: Option<DrainedBy>,
    pub failing: bool,
    pub refused: bool,
}

impl Against {
    /// A backend serves if nothing speaks against it. Where several things do, the one that keeps it out
    /// of more rotations has the say.
    pub const fn standing(self) -> Standing {
        match self {
            Against { drained_by_owner: true, .. } => Standing::Draining,
            Against { drained_by_operator: true, .. } => Standing::Draining,
            Against { drained_elsewhere: Some(_), .. } => Standing::Draining,
            Against { failing: true, .. } => Standing::Failing,
            Against { refused: true, .. } => Standing::Aside,
            _ => Standing::Serving,
        }
    }

    /// Whose drain decides how it ends: who asked to leave leaves.
    pub const fn drained_by(self) -> Option<DrainedBy> {
        match self {
            Against { drained_by_owner: true, .. } => Some(DrainedBy::Owner),
            Against { drained_by_operator: true, .. } => Some(DrainedBy::Operator),
            Against { drained_elsewhere, .. } => drained_elsewhere,
        }
    }
}
