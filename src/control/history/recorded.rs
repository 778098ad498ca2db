//! The history as one process hands it to the next. Owns its form and the bound on it: with very many services,
//! fewer of the last steps of each are handed on.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    BOUNDS_US, History, MINUTE, NO_BUCKET, SERIES_MAX, STEP, STEPS, Sample, Samples, Totals, Track,
    samples,
};
use crate::base::buckets::bucket_of;
use crate::base::time::Now;
use crate::cluster::{Protocol, ServiceId};
use crate::metrics::named::COUNT_MAX;

/// Samples of services that are handed on, about 30 bytes each.
const SAMPLES_MAX: usize = 128 * STEPS;
/// Steps beyond all reason.
const STEPS_EVER: u64 = 1 << 40;
/// What one step adds up to at most, so that the sum of some steps is still a count.
const ADDED_MAX: u64 = COUNT_MAX >> 8;

/// A history.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Recorded {
    due: Now,
    ended: Now,
    steps: u64,
    /// Of the last steps, the oldest first, as are all the following.
    took_ms: Vec<u32>,
    whole: Vec<Cell>,
    /// In the order of [`Protocol::ALL`], as are the next.
    protocols: Vec<Vec<Cell>>,
    minute: Vec<Vec<Sums>>,
    services: Vec<Kept>,
    whole_before: Sums,
    before: Vec<(u16, Sums)>,
}

/// One sample: none if nobody looked, empty if nothing had happened.
type Cell = Option<Vec<u64>>;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Kept {
    name: String,
    protocol: Option<Protocol>,
    born: u64,
    seen: u64,
    quiet: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    samples: Option<Vec<Cell>>,
}

/// [`Totals`].
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Sums {
    sessions: u64,
    new: u64,
    requests: u64,
    errors: u64,
    refused: u64,
    bytes_up: u64,
    bytes_down: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    times: Vec<u64>,
}

impl Sums {
    fn of(it: &Totals) -> Sums {
        let last = it.times.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        Sums {
            sessions: it.sessions,
            new: it.new,
            requests: it.requests,
            errors: it.errors,
            refused: it.refused,
            bytes_up: it.bytes_up,
            bytes_down: it.bytes_down,
            times: it.times[..last].to_vec(),
        }
    }

    fn totals(&self, max: u64) -> Totals {
        let mut totals = Totals {
            sessions: self.sessions.min(max),
            new: self.new.min(max),
            requests: self.requests.min(max),
            errors: self.errors.min(max),
            refused: self.refused.min(max),
            bytes_up: self.bytes_up.min(max),
            bytes_down: self.bytes_down.min(max),
            ..Totals::default()
        };
        let both = totals.times.iter_mut().zip(&self.times);
        both.for_each(|(time, count)| *time = (*count).min(max));
        totals
    }
}

fn cell(sample: &Sample) -> Cell {
    if *sample == Sample::NOTHING || !sample.is_known {
        return sample.is_known.then(Vec::new);
    }
    // The bound of a bucket says which it is in any release; zero stands for none.
    let bound = |bucket: u8| match bucket {
        NO_BUCKET => 0,
        bucket => BOUNDS_US.get(usize::from(bucket)).copied().unwrap_or(u64::MAX),
    };
    let Sample { bytes_up, bytes_down, sessions, new, requests, errors, refused, .. } = *sample;
    let small = [sessions, new, requests, errors, refused].map(u64::from);
    let percentiles = [bound(sample.p50), bound(sample.p99)];
    Some([&[bytes_up, bytes_down], &small[..], &percentiles].concat())
}

fn sample(cell: &Cell) -> Sample {
    let Some(cell) = cell else { return Sample::UNKNOWN };
    let Ok([bytes_up, bytes_down, small @ .., p50, p99]) = <[u64; 9]>::try_from(cell.as_slice())
    else {
        return Sample::NOTHING;
    };
    let bucket = |us: u64| if us == 0 { NO_BUCKET } else { bucket_of(us) as u8 };
    let [sessions, new, requests, errors, refused] =
        small.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    let (p50, p99) = (bucket(p50), bucket(p99));
    let known = Sample { is_known: true, ..Sample::NOTHING };
    Sample { bytes_up, bytes_down, sessions, new, requests, errors, refused, p50, p99, ..known }
}

impl History {
    /// The history in the form for a successor.
    pub fn describe(&self) -> Recorded {
        let cells = |samples: &Samples, most: usize| -> Vec<Cell> {
            self.places(most).map(|place| cell(&samples[place])).collect()
        };
        let most = SAMPLES_MAX / self.kept.max(1);
        let kept = |((name, protocol), track): (&super::Key, &Track)| Kept {
            name: name.to_string(),
            protocol: Some(*protocol),
            born: track.born,
            seen: track.seen,
            quiet: track.quiet,
            samples: track.samples.as_ref().map(|samples| cells(samples, most)),
        };
        let minutes = self.steps.saturating_sub(MINUTE as u64)..self.steps;
        let minute = |step| self.minute[step as usize % MINUTE].iter().map(Sums::of).collect();
        Recorded {
            due: self.due,
            ended: self.ended,
            steps: self.steps,
            took_ms: self.places(STEPS).map(|place| self.took_ms[place]).collect(),
            whole: cells(&self.whole, STEPS),
            protocols: self.protocols.iter().map(|it| cells(it, STEPS)).collect(),
            minute: minutes.map(minute).collect(),
            services: self.services.iter().map(kept).collect(),
            whole_before: Sums::of(&self.whole_before),
            before: self.before.iter().map(|(id, it)| (id.0, Sums::of(it))).collect(),
        }
    }

    /// Goes on with another's, as far as it makes sense. The marks stay as they are.
    pub fn inherit(&mut self, from: &Recorded, now: Now) {
        let steps = from.steps.min(STEPS_EVER);
        self.steps = steps;
        (self.ended, self.due) = (from.ended.min(now), from.due.min(now.plus(STEP)));
        let put = |cells: &[Cell], samples: &mut Samples| {
            for (place, cell) in last_places(steps, cells) {
                samples[place] = sample(cell);
            }
        };
        for (place, took) in last_places(steps, &from.took_ms) {
            self.took_ms[place] = *took;
        }
        put(&from.whole, &mut self.whole);
        self.protocols.iter_mut().zip(&from.protocols).for_each(|(own, cells)| put(cells, own));
        let minute = &from.minute[from.minute.len().saturating_sub(MINUTE)..];
        let first = steps.saturating_sub(minute.len() as u64);
        for (step, sums) in (first..steps).zip(minute) {
            let own = self.minute[step as usize % MINUTE].iter_mut();
            own.zip(sums).for_each(|(own, sums)| *own = sums.totals(ADDED_MAX));
        }
        for kept in &from.services {
            let Some(protocol) = kept.protocol else { continue };
            let cells = kept.samples.as_ref().filter(|_| self.kept < SERIES_MAX);
            let series = cells.map(|cells| {
                let mut series = samples();
                put(cells, &mut series);
                series
            });
            self.kept += usize::from(series.is_some());
            let (born, seen) = (kept.born.min(steps), kept.seen.min(steps));
            let track = Track { born, seen, quiet: kept.quiet.min(STEPS), samples: series };
            self.services.insert((Arc::from(kept.name.as_str()), protocol), track);
        }
        self.whole_before = from.whole_before.totals(COUNT_MAX);
        let before = from.before.iter().map(|(id, it)| (ServiceId(*id), it.totals(COUNT_MAX)));
        self.before = before.collect();
    }
}

/// The last things of as many, each with the place of its step, of which there have been so many.
fn last_places<T>(steps: u64, all: &[T]) -> impl Iterator<Item = (usize, &T)> {
    let count = (all.len() as u64).min(steps).min(STEPS as u64);
    let last = &all[all.len() - count as usize..];
    (steps - count..steps).map(|step| (step % STEPS as u64) as usize).zip(last)
}
