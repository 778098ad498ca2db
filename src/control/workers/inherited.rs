//! What a predecessor has counted, which no worker here has: by worker, so that a series that is read from
//! outside goes on, and by the place of a backend. Owns these counts; they are added wherever those of the
//! workers are read, who know nothing of them.

use std::collections::BTreeMap;

use super::{BACKEND_ROWS, BackendValues};
use crate::base::time::Now;
use crate::metrics::named::Named;
use crate::metrics::{BackendCounters, Histogram, Kind, WorkerCounters, WorkerMetrics};

/// Which of the histograms is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Timing {
    Connect,
    FirstByte,
    SessionLength,
}

impl Timing {
    pub const ALL: [Timing; 3] = [Timing::Connect, Timing::FirstByte, Timing::SessionLength];

    /// That of a worker.
    pub fn of(self, metrics: &WorkerMetrics) -> &Histogram {
        match self {
            Timing::Connect => &metrics.connect_time,
            Timing::FirstByte => &metrics.first_byte_time,
            Timing::SessionLength => &metrics.session_length,
        }
    }
}

/// What goes on at one worker.
#[derive(Debug, Default)]
pub struct Base {
    pub counters: WorkerCounters,
    histograms: [Histogram; Timing::ALL.len()],
}

impl Base {
    pub fn histogram(&self, timing: Timing) -> &Histogram {
        &self.histograms[timing as usize]
    }
}

/// What goes on of backends, by their places.
#[derive(Debug, Default)]
pub struct Backends {
    counted: BTreeMap<u16, Counted>,
    /// Sessions that the predecessor still has.
    elsewhere: BTreeMap<u16, u64>,
}

#[derive(Debug, Default)]
struct Counted {
    values: Named<BackendCounters>,
    /// When it last began to answer a request.
    answered: Now,
}

impl Backends {
    /// Another backend has the place now.
    pub fn begin(&mut self, slot: u16) {
        self.counted.remove(&slot);
        self.elsewhere.remove(&slot);
    }

    pub fn add(&mut self, slot: u16, more: &Named<BackendCounters>) {
        self.counted.entry(slot).or_default().values.add(more);
    }

    pub fn set_answered(&mut self, slot: u16, answered: Now) {
        self.counted.entry(slot).or_default().answered = answered;
    }

    pub fn answered(&self, slot: u16) -> Now {
        self.counted.get(&slot).map_or(Now::default(), |counted| counted.answered)
    }

    /// The sessions that the predecessor has, by place; those that are not named have none there.
    pub fn set_elsewhere(&mut self, sessions: BTreeMap<u16, u64>) {
        self.elsewhere = sessions;
    }

    pub fn elsewhere(&self, slot: u16) -> u64 {
        self.elsewhere.get(&slot).copied().unwrap_or(0)
    }

    /// Adds all that to what the workers have counted.
    pub fn add_to(&self, slot: u16, sum: &mut BackendValues) {
        let counted = self.counted.get(&slot).map(|it| it.values.values());
        for row in 0..BACKEND_ROWS {
            let more = match BackendCounters::ROWS[row].kind {
                Kind::Counter => counted.map_or(0, |values| values[row]),
                Kind::Gauge => self.elsewhere(slot),
            };
            sum[row] = sum[row].wrapping_add(more);
        }
    }
}

const _: () = {
    // The one gauge of a backend is the number of its sessions.
    let mut gauges = 0;
    let mut row = 0;
    while row < BACKEND_ROWS {
        gauges += matches!(BackendCounters::ROWS[row].kind, Kind::Gauge) as usize;
        row += 1;
    }
    assert!(gauges == 1);
};
