//! When something must be done about a session that stays still: its looks at send queues, its timeouts.

use std::time::Duration;

use super::{Cx, Phase, Session};
use crate::base::time::Now;
use crate::cluster::Timeouts;
use crate::proxy::SECOND_LOOK;

impl Session {
    /// Plans the first look at its send queues; when something is due from now on.
    pub(super) fn begin_to_look(&mut self, cx: &Cx<'_>) -> Now {
        let timeouts = self.timeouts(cx);
        self.look_at = self.next_look(cx.now, timeouts);
        self.due(timeouts)
    }

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
            Phase::Waiting | Phase::Connecting | Phase::Recalled => timeouts.connect,
            _ if self.half_closed => timeouts.half_close,
            _ => timeouts.tcp_idle,
        }
    }
}
