//! When something must be done about a session that stays still: its timeouts, and its looks at send queues.

use std::time::Duration;

use super::{Phase, Session};
use crate::base::time::Now;
use crate::cluster::Timeouts;
use crate::proxy::SECOND_LOOK;

impl Session {
    /// When something must be done about it if it stays still.
    pub(super) fn due(&self, timeouts: &Timeouts) -> Now {
        let look = self.phase == Phase::Relaying && self.relay.is_unsure();
        let again = if look { self.active.plus(SECOND_LOOK) } else { Now::NEVER };
        self.rests_until(timeouts).min(again)
    }

    /// When its queues are looked at or it is over, if it stays still.
    pub(super) fn rests_until(&self, timeouts: &Timeouts) -> Now {
        match self.phase {
            Phase::Parting(_) => self.look_at,
            _ => self.ends_at(timeouts).min(self.look_at),
        }
    }

    /// When it is over if it stays still.
    pub(super) fn ends_at(&self, timeouts: &Timeouts) -> Now {
        self.active.plus(self.patience(timeouts))
    }

    /// How long it may be still.
    pub(super) fn patience(&self, timeouts: &Timeouts) -> Duration {
        match self.phase {
            Phase::Connecting => timeouts.connect,
            _ if self.half_closed => timeouts.half_close,
            _ => timeouts.tcp_idle,
        }
    }
}
