//! Freezes at any moment, as a worker is to carry them out, and the thaw after each: sometimes before the
//! worker stood still. Owns the law about what may not move meanwhile.

use std::time::Duration;

use lb::base::time::Now;
use lb::worker::tcp::sessions::Sessions;

use super::World;
use crate::sim::law::{self, check};

/// How long sends may go on in a freeze, and how long one lasts at most.
const PATIENCE: Duration = Duration::from_millis(20);
const LASTS: Duration = Duration::from_millis(60);
/// The least time between two while somebody connects: a backend answers within 50 ms, and a user may not be
/// kept from it for ever.
const PAUSE: Duration = Duration::from_millis(100);

/// A freeze.
pub struct Frost {
    cancel_at: Now,
    cancelled: bool,
    until: Now,
    /// It does not end before the worker stands still.
    patient: bool,
    /// The bytes that had been read and written when the worker came to stand still.
    still: Option<u64>,
}

impl Frost {
    pub fn next_at(&self) -> Now {
        let until = if self.patient { self.until.max(self.cancel_at) } else { self.until };
        if self.cancelled { until } else { self.cancel_at.min(until) }
    }
}

impl World {
    /// Begins a freeze, or sees to the one there is; false if nothing of it was due.
    pub(super) fn freeze(&mut self) -> bool {
        let Some(mut frost) = self.frost.take() else {
            let freezes = self.plan.freezes;
            let connecting = self.laws.sessions.values().any(|session| !session.relaying);
            let may = self.now >= self.freezes_at || !connecting;
            return freezes > 0 && may && self.random.in_thousand(freezes) && self.begin();
        };
        let mut moved = false;
        if !frost.cancelled && self.now >= frost.cancel_at {
            (frost.cancelled, moved) = (true, true);
            self.laws.hurries = true;
            self.act(Sessions::cancel_sends);
            self.execute();
            self.laws.hurries = false;
        }
        if frost.still.is_none() && self.kernel.is_idle() && self.core.is_still() {
            check(!self.kernel.could_move(), law::STILL, || format!("at {:?}", self.now));
            frost.still = Some(self.passed());
            self.stills += 1;
        }
        if self.now < frost.until || frost.patient && frost.still.is_none() {
            self.frost = Some(frost);
            return moved;
        }
        let passed = self.passed();
        check(frost.still.is_none_or(|before| before == passed), law::STILL, || {
            format!("{:?} and now {passed}", frost.still)
        });
        self.freezes_at = self.now.plus(PAUSE);
        self.kernel.restock();
        self.laws.freezes(false);
        self.trace(|_| "thaws".into());
        self.act(Sessions::thaw);
        self.take_reports();
        self.execute();
        true
    }

    fn begin(&mut self) -> bool {
        self.kernel.withdraw(&mut self.pool);
        self.laws.freezes(true);
        self.trace(|_| "freezes".into());
        let until = self.now.plus(self.random.any_time(LASTS));
        let cancel_at = self.now.plus(PATIENCE);
        let patient = self.random.half();
        self.frost = Some(Frost { cancel_at, cancelled: false, until, patient, still: None });
        self.laws.hurries = true;
        self.act(Sessions::freeze);
        self.execute();
        self.laws.hurries = false;
        true
    }

    /// Bytes that the worker has taken from its sockets, and given to them.
    fn passed(&self) -> u64 {
        self.conns.iter().map(|conn| conn.inward.read + conn.outward.written).sum()
    }
}
