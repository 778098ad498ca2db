//! What is said of users for whom there was no room. Owns how often: a shortage lasts, and each datagram of
//! it is counted, but a line every few seconds is enough to read.

use std::time::Duration;

use super::Why;
use crate::base::time::Now;
use crate::cluster::BackendId;
use crate::worker::books::{Books, Choice};
use crate::worker::link::Report;

/// How often the same shortage is told.
const TOLD_EVERY: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Shortages {
    told: Option<Now>,
    untold: u64,
    backend: Option<BackendId>,
}

impl Shortages {
    /// Nobody could be given a way to this backend.
    pub(super) fn at(&mut self, choice: Choice, datagrams: u64, books: &Books) {
        self.backend = Some(choice.backend);
        books.turned_away(choice, datagrams);
    }

    /// Datagrams that would have begun a session were dropped. Those that lacked room are users turned
    /// away, and told of.
    pub(super) fn note(&mut self, now: Now, why: Why, datagrams: u64, books: &mut Books) {
        let counters = &books.metrics().counters;
        match why {
            Why::NoBackend => counters.users_refused_no_backend.add(datagrams),
            Why::TableFull => counters.users_refused_full.add(datagrams),
            Why::UpstreamExhausted | Why::SourceShare => {
                counters.users_refused_exhausted.add(datagrams);
            }
            _ => {}
        }
        let Some(shortage) = why.shortage() else { return };
        self.untold += datagrams;
        if self.told.is_none_or(|told| now.since(told) >= TOLD_EVERY) {
            self.told = Some(now);
            let (backend, datagrams) = (self.backend.take(), std::mem::take(&mut self.untold));
            books.report(Report::OutOfRoom { shortage, backend, datagrams });
        }
    }
}
