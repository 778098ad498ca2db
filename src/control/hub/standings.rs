//! What the hub remembers of how its backends stood before.

use super::Hub;
use crate::base::time::Now;
use crate::cluster::registry::Applied;

impl Hub {
    /// Remembers what a change has made of the backends that it was about.
    pub(super) fn remember_standing(&mut self, applied: &Applied, now: Now) {
        for entry in &applied.left {
            let (service, address) = (entry.backend.service, entry.backend.address);
            self.steadiness.saw(service, address, None, now);
        }
        let Some(entry) = applied.backend.and_then(|id| self.registry.get(id)) else { return };
        let standing = Some(entry.backend.standing);
        self.steadiness.saw(entry.backend.service, entry.backend.address, standing, now);
    }
}
