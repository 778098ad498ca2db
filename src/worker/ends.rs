//! Orders to end the sessions of many backends at once. Owns the look-up by backend, so that however many
//! are lost together, a protocol goes through its sessions once.

use super::books::Entry;
use super::link::Order;
use crate::cluster::BackendId;
use crate::session::EndReason;

/// The backends whose sessions end, each with the reason.
#[derive(Debug, Default)]
pub struct Ends(Vec<(BackendId, EndReason)>);

impl Ends {
    /// A single one of these orders; nobody's end if it is another.
    pub fn of(order: Order) -> Ends {
        let mut ends = Ends::default();
        ends.gather(order);
        ends
    }

    /// Takes in the order if it is one of these.
    pub fn gather(&mut self, order: Order) -> bool {
        let Order::EndBackend { backend, reason } = order else { return false };
        self.0.push((backend, reason));
        true
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Has to be called before [`Ends::reason_for`].
    pub fn sort(&mut self) {
        self.0.sort_by_key(|end| end.0);
    }

    /// The same as single orders.
    pub fn orders(&self) -> impl Iterator<Item = Order> + '_ {
        self.0
            .iter()
            .map(|(backend, reason)| Order::EndBackend { backend: *backend, reason: *reason })
    }

    /// Why this session ends, if it does.
    pub fn reason_for(&self, entry: &Entry) -> Option<EndReason> {
        let backend = entry.choice()?.backend;
        let place = self.0.binary_search_by_key(&backend, |end| end.0).ok()?;
        Some(self.0[place].1)
    }
}
