//! What the status says of live handovers. Owns the names and units of its fields.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::time::Now;

/// Where this process stands between its predecessor and its successor.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HandoverStatus {
    pub state: HandoverState,
    /// How many processes served before this one without a restart between them.
    pub generation: u64,
    /// How this process took over; `null` if it was started in another way.
    pub taken: Option<HandoverTaken>,
    /// The last handover from this process that came to nothing.
    pub failed: Option<HandoverFailure>,
    /// How many came to nothing, by the step at which they failed.
    pub failures: BTreeMap<String, u64>,
    /// Why this process can have no successor; `null` if it can.
    pub barred: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandoverState {
    /// None is under way.
    #[default]
    None,
    /// A successor is starting.
    Starting,
    /// A successor serves; what could not be handed over ends here.
    Lingering,
}

/// A handover to this process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HandoverTaken {
    pub at_unix_ms: u64,
    /// For how long nobody was served, in microseconds.
    pub stall_us: u64,
    pub sessions: u64,
}

/// A handover that came to nothing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HandoverFailure {
    pub at_unix_ms: u64,
    pub step: String,
    /// A sentence with the cure.
    pub why: String,
}

impl HandoverStatus {
    /// Why no successor can be started now: a sentence. `None`: one can, unless the balancer stops.
    pub fn refuses(&self) -> Option<&str> {
        match (&self.barred, self.state) {
            (Some(why), _) => Some(why),
            (None, HandoverState::None) => None,
            (None, HandoverState::Starting) => {
                Some("an upgrade is under way: wait for its outcome")
            }
            (None, HandoverState::Lingering) => Some("this process has been succeeded already"),
        }
    }

    /// A successor was started.
    pub fn begun(&mut self) {
        (self.state, self.failed) = (HandoverState::Starting, None);
    }

    /// There is no successor.
    pub fn failed(&mut self, now: Now, step: &str, why: String) {
        self.state = HandoverState::None;
        let (at_unix_ms, step) = (now.unix_ms(), step.to_owned());
        *self.failures.entry(step.clone()).or_default() += 1;
        self.failed = Some(HandoverFailure { at_unix_ms, step, why });
    }

    /// A successor serves.
    pub fn lingers(&mut self) {
        self.state = HandoverState::Lingering;
    }

    /// This process serves in the place of another.
    pub fn taken_over(&mut self, generation: u64, now: Now, stall: Duration, sessions: u64) {
        self.generation = generation;
        let (at_unix_ms, stall_us) = (now.unix_ms(), stall.as_micros() as u64);
        self.taken = Some(HandoverTaken { at_unix_ms, stall_us, sessions });
    }
}
