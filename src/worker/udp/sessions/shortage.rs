//! Reports of users who found no room. Owns how often they are made: every datagram is counted, but
//! while a shortage lasts, a line every few seconds is enough.

use std::time::Duration;

use super::DropReason;
use crate::base::time::Now;
use crate::cluster::{BackendId, ServiceId};
use crate::worker::books::{Books, Choice};
use crate::worker::link::Report;

/// How often to report while a shortage lasts.
const REPORT_EVERY: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Shortages {
    reported: Option<Now>,
    /// Datagrams dropped since the last report.
    unreported: u64,
    backend: Option<BackendId>,
}

impl Shortages {
    /// There was no pair with this backend for a new session.
    pub(super) fn at(&mut self, choice: Choice, datagrams: u64, books: &Books) {
        self.backend = Some(choice.backend);
        books.turned_away(choice, datagrams);
    }

    /// Counts users turned away, whose datagrams would have begun a session, and reports a lack of
    /// room.
    pub(super) fn note(
        &mut self,
        now: Now,
        service: ServiceId,
        why: DropReason,
        datagrams: u64,
        books: &mut Books,
    ) {
        let counters = &books.metrics().counters;
        let counter = match why {
            DropReason::NoBackend => Some(&counters.users_refused_no_backend),
            DropReason::TableFull => Some(&counters.users_refused_full),
            DropReason::UpstreamExhausted | DropReason::SourceShare => {
                Some(&counters.users_refused_exhausted)
            }
            // The service has counted these.
            DropReason::Barred(_) => {
                counters.users_refused_barred.add(datagrams);
                None
            }
            _ => None,
        };
        if let Some(counter) = counter {
            counter.add(datagrams);
            books.refuse(service, datagrams);
        }
        let Some(shortage) = why.shortage() else { return };
        self.unreported += datagrams;
        if self.reported.is_none_or(|at| now.since(at) >= REPORT_EVERY) {
            self.reported = Some(now);
            let (backend, datagrams) = (self.backend.take(), std::mem::take(&mut self.unreported));
            books.report(Report::OutOfRoom { service, shortage, backend, datagrams });
        }
    }
}
