//! Standstills at any moment, as `worker::standstill` carries them out, and the thaw after each. Owns the law about
//! what may not move meanwhile.

use std::time::Duration;

use lb::base::time::Now;
use lb::worker::tcp::sessions::{Cx, Sessions};

use super::World;
use crate::sim::law::{self, check};

/// How long what is under way may go on, and how often it is then taken back.
const PATIENCE: Duration = Duration::from_millis(20);
const AGAIN_EVERY: Duration = Duration::from_millis(5);
/// How long a freeze lasts at most once the worker stands still.
const LASTS: Duration = Duration::from_millis(60);
/// The least time between two while somebody connects: a backend answers within 50 ms, and a user may not be
/// kept from it for ever.
const PAUSE: Duration = Duration::from_millis(100);

/// A freeze.
pub struct Frost {
    take_back_at: Now,
    until: Now,
    /// The bytes that had been read and written when the worker came to stand still.
    still: Option<u64>,
}

impl Frost {
    pub fn next_at(&self) -> Now {
        if self.still.is_some() { self.until } else { self.take_back_at }
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
        let is_idle = self.kernel.is_idle();
        let mut moved = false;
        if frost.still.is_none() && is_idle && self.core.is_still(|_| false) {
            check(!self.kernel.could_move(), law::STILL, || format!("at {:?}", self.now));
            frost.still = Some(self.passed());
            frost.until = self.now.plus(self.random.any_time(LASTS));
            self.stills += 1;
        } else if frost.still.is_none() && self.now >= frost.take_back_at {
            frost.take_back_at = self.now.plus(AGAIN_EVERY);
            self.takes_back(|core, cx| core.take_back(|_| false, cx));
            moved = true;
        }
        if frost.still.is_none() || self.now < frost.until {
            self.frost = Some(frost);
            return moved;
        }
        self.thaw(frost.still);
        true
    }

    fn begin(&mut self) -> bool {
        self.adopt();
        self.kernel.withdraw(&mut self.pool);
        self.laws.freezes(true);
        self.trace(|_| "freezes".into());
        let take_back_at = self.now.plus(PATIENCE);
        self.frost = Some(Frost { take_back_at, until: Now::NEVER, still: None });
        self.takes_back(|core, cx| core.freeze(|_| false, cx));
        true
    }

    fn takes_back(&mut self, how: impl FnOnce(&mut Sessions, &mut Cx<'_>)) {
        self.laws.hurries = true;
        self.act(how);
        self.execute();
        self.laws.hurries = false;
    }

    fn thaw(&mut self, still: Option<u64>) {
        let passed = self.passed();
        check(still == Some(passed), law::STILL, || format!("{still:?} and now {passed}"));
        self.freezes_at = self.now.plus(PAUSE);
        self.kernel.restock();
        self.laws.freezes(false);
        self.trace(|_| "thaws".into());
        self.adopt();
        self.act(Sessions::thaw);
        self.take_reports();
        self.execute();
    }

    /// Bytes that the worker has taken from its sockets, and given to them.
    fn passed(&self) -> u64 {
        self.conns.iter().map(|conn| conn.inward.read + conn.outward.written).sum()
    }
}
