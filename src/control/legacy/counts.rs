//! What a control core and its workers have counted, by name: all of it in the description, and afterwards what
//! has been added, which the predecessor goes on to count with the sessions that could not move. Owns the form
//! and its bounds. Whoever takes it up adds it to what it has, so that no counter ever goes back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base::buckets::{BOUNDS_US, BUCKETS, bucket_of};
use crate::control::workers::{Given, Timing};
use crate::metrics::named::{COUNT_MAX, Named};
use crate::metrics::{BACKENDS_MAX, BackendCounters, ControlCounters, WorkerCounters};

/// The most workers of any release.
const WORKERS_MAX: usize = 256;
/// The most services of any release, and the most buckets of a histogram.
const SERVICES_MAX: usize = 1 << 16;
const BUCKETS_MAX: usize = 256;

/// All counters.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Of the buckets below, in microseconds.
    pub bounds_us: Vec<u64>,
    /// By their numbers.
    pub workers: Vec<Worker>,
    pub control: Named<ControlCounters>,
    pub backends: Vec<Backend>,
    pub services: Vec<Service>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Worker {
    pub counters: Named<WorkerCounters>,
    /// In the order of [`Timing::ALL`].
    pub connect: Durations,
    pub first_byte: Durations,
    pub session: Durations,
}

/// A histogram.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Durations {
    /// By bucket; the last is for what exceeds every bound. Zeros at the end are left out.
    pub counts: Vec<u64>,
    pub sum_us: u64,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Backend {
    pub id: u32,
    pub service: u16,
    pub values: Named<BackendCounters>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    pub id: u16,
    /// By the name of the barrier.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub turned_away: BTreeMap<String, u64>,
    pub requests: u64,
    pub errors: u64,
    pub refused: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub first_byte: Vec<u64>,
    /// What its backends were given that have gone.
    pub given: Given,
}

impl Default for Counts {
    fn default() -> Counts {
        Counts {
            bounds_us: BOUNDS_US.into(),
            workers: Vec::new(),
            control: Named::default(),
            backends: Vec::new(),
            services: Vec::new(),
        }
    }
}

impl Durations {
    pub fn of(counts: &[u64], sum_us: u64) -> Durations {
        Durations { counts: trimmed(counts), sum_us }
    }

    fn since(&self, before: &Durations) -> Durations {
        let counts = less(&self.counts, &before.counts);
        Durations { counts, sum_us: self.sum_us.saturating_sub(before.sum_us) }
    }
}

/// Without the zeros at the end.
pub fn trimmed(counts: &[u64]) -> Vec<u64> {
    let last = counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
    counts[..last].to_vec()
}

fn less(now: &[u64], before: &[u64]) -> Vec<u64> {
    let before = before.iter().copied().chain(std::iter::repeat(0));
    trimmed(&now.iter().zip(before).map(|(now, it)| now.saturating_sub(it)).collect::<Vec<_>>())
}

impl Worker {
    pub fn timings(&self) -> [&Durations; Timing::ALL.len()] {
        [&self.connect, &self.first_byte, &self.session]
    }

    fn since(&self, before: &Worker) -> Worker {
        Worker {
            counters: self.counters.since(&before.counters),
            connect: self.connect.since(&before.connect),
            first_byte: self.first_byte.since(&before.first_byte),
            session: self.session.since(&before.session),
        }
    }
}

impl Service {
    fn since(&self, before: &Service) -> Service {
        let barred = self.turned_away.iter().map(|(barrier, count)| {
            let earlier = before.turned_away.get(barrier).copied().unwrap_or(0);
            (barrier.clone(), count.saturating_sub(earlier))
        });
        let (now, then) = (&self.given, &before.given);
        Service {
            id: self.id,
            turned_away: barred.filter(|(_, count)| *count > 0).collect(),
            requests: self.requests.saturating_sub(before.requests),
            errors: self.errors.saturating_sub(before.errors),
            refused: self.refused.saturating_sub(before.refused),
            first_byte: less(&self.first_byte, &before.first_byte),
            given: Given {
                sessions: now.sessions.saturating_sub(then.sessions),
                bytes_up: now.bytes_up.saturating_sub(then.bytes_up),
                bytes_down: now.bytes_down.saturating_sub(then.bytes_down),
            },
        }
    }

    fn numbers(&self) -> impl Iterator<Item = u64> {
        let Given { sessions, bytes_up, bytes_down } = self.given;
        let plain = [self.requests, self.errors, self.refused, sessions, bytes_up, bytes_down];
        let barred = self.turned_away.values().copied();
        plain.into_iter().chain(barred).chain(self.first_byte.iter().copied())
    }
}

impl Counts {
    /// What has been added to `before`, which was counted earlier here.
    pub fn since(&self, before: &Counts) -> Counts {
        let none = Worker::default();
        let then = before.workers.iter().chain(std::iter::repeat(&none));
        let workers = self.workers.iter().zip(then).map(|(now, then)| now.since(then));
        let backends: BTreeMap<u32, &Backend> =
            before.backends.iter().map(|it| (it.id, it)).collect();
        let services: BTreeMap<u16, &Service> =
            before.services.iter().map(|it| (it.id, it)).collect();
        let of_backend = |now: &Backend| match backends.get(&now.id) {
            Some(then) => Backend { values: now.values.since(&then.values), ..now.clone() },
            None => now.clone(),
        };
        let of_service = |now: &Service| match services.get(&now.id) {
            Some(then) => now.since(then),
            None => now.clone(),
        };
        let backends = self.backends.iter().map(of_backend).filter(|it| !it.values.is_zero());
        let has_any = |it: &Service| it.numbers().any(|number| number > 0);
        let services = self.services.iter().map(of_service).filter(has_any);
        Counts {
            bounds_us: self.bounds_us.clone(),
            workers: workers.collect(),
            control: self.control.since(&before.control),
            backends: backends.collect(),
            services: services.collect(),
        }
    }

    /// A histogram in the buckets of this release.
    pub fn in_our_buckets(&self, counts: &[u64]) -> [u64; BUCKETS] {
        let mut own = [0u64; BUCKETS];
        let bounds = self.bounds_us.iter().copied().chain(std::iter::repeat(u64::MAX));
        for (count, bound) in counts.iter().zip(bounds) {
            let bucket = &mut own[bucket_of(bound)];
            *bucket = bucket.saturating_add(*count).min(COUNT_MAX);
        }
        own
    }

    /// Whether there is nothing out of all reason.
    ///
    /// # Errors
    /// What there is, in a sentence.
    pub fn check(&self) -> Result<(), String> {
        let many = [
            (self.workers.len(), WORKERS_MAX, "workers"),
            (self.backends.len(), BACKENDS_MAX, "backends"),
            (self.services.len(), SERVICES_MAX, "services"),
            (self.bounds_us.len(), BUCKETS_MAX, "buckets"),
        ];
        if let Some((count, max, what)) = many.into_iter().find(|(count, max, _)| count > max) {
            return Err(format!("counters of {count} {what}, of which there are {max} at most"));
        }
        let is_sane = self.control.is_sane()
            && self.backends.iter().all(|it| it.values.is_sane())
            && self.services.iter().flat_map(Service::numbers).all(|it| it <= COUNT_MAX)
            && self.sum_is_sane();
        is_sane.then_some(()).ok_or_else(|| "a counter is out of all reason".to_owned())
    }

    /// Of several workers that become one, the sum is counted.
    fn sum_is_sane(&self) -> bool {
        let mut sum = Named::<WorkerCounters>::default();
        let mut durations = 0u64;
        for worker in &self.workers {
            if !worker.counters.is_sane() {
                return false;
            }
            sum.add(&worker.counters);
            for timing in worker.timings() {
                for count in timing.counts.iter().chain([&timing.sum_us]) {
                    durations = durations.saturating_add(*count);
                }
            }
        }
        sum.values().iter().all(|it| *it < COUNT_MAX) && durations < COUNT_MAX
    }
}
