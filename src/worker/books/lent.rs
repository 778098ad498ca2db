//! Sessions with several requests at once: each is counted where it is served, on the place and the seat of the session
//! that it belongs to.

use super::{Books, Entry};

impl Books {
    /// An entry for a request of this session beside others.
    pub fn lend(&self, entry: &Entry) -> Entry {
        Entry {
            service: entry.service,
            client: entry.client,
            started: entry.started,
            is_tls: entry.is_tls,
            place: entry.place.shared(),
            is_lent: true,
            inside: None,
            choice: None,
            row: None,
            bytes_up: 0,
            bytes_down: 0,
        }
    }

    /// Such a request is over.
    pub fn take_back(&mut self, mut entry: Entry) {
        debug_assert!(entry.is_lent, "a session is closed, with its reason");
        self.unassign(&mut entry);
        self.let_out(&mut entry);
    }
}
