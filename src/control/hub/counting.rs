//! What has been counted, as one value: for a successor, which adds it to its own. Owns where each number is
//! found and put.

use std::collections::BTreeSet;

use super::Hub;
use crate::cluster::answers::Answered;
use crate::cluster::{Backend, BackendId, Barrier, Service, ServiceId};
use crate::control::history::Times;
use crate::control::legacy::counts::{self, Counts, Durations, trimmed};
use crate::control::workers::{BackendValues, Given, Timing, WorkerValues};
use crate::metrics::named::Named;

impl Hub {
    /// Everything that has been counted.
    pub fn counts(&self) -> Counts {
        let [connect, first_byte, session] = Timing::ALL.map(|timing| {
            let all = self.workers.histograms(timing);
            all.map(|(_, counts, sum_us)| Durations::of(&counts, sum_us)).collect::<Vec<_>>()
        });
        let timings = connect.into_iter().zip(first_byte).zip(session);
        let worker = |((_, values), timings): ((u8, WorkerValues), _)| {
            let ((connect, first_byte), session) = timings;
            counts::Worker { counters: Named::of(&values), connect, first_byte, session }
        };
        let registered = self.registry.entries().map(|entry| &entry.backend);
        let backends = registered.chain(self.departed.values().map(|it| &it.backend));
        let backend = |it: &Backend| counts::Backend {
            id: it.id.0,
            service: it.service.0,
            values: Named::of(&self.workers.backend(it.slot)),
        };
        Counts {
            workers: self.workers.counters().zip(timings).map(worker).collect(),
            control: Named::of(&self.counters.values()),
            backends: backends.map(backend).filter(|it| !it.values.is_zero()).collect(),
            services: self.registry.services().map(|it| self.count_service(it)).collect(),
            ..Counts::default()
        }
    }

    fn count_service(&self, service: &Service) -> counts::Service {
        let barred = Barrier::ALL.map(|it| (it.name().to_owned(), service.gate.turned_away(it)));
        let answered = service.gate.answers.sum();
        counts::Service {
            id: service.id.0,
            turned_away: barred.into_iter().filter(|(_, count)| *count > 0).collect(),
            requests: answered.requests,
            errors: answered.errors,
            refused: answered.refused,
            first_byte: trimmed(&answered.first_byte),
            given: self.given_before.get(&service.id).copied().unwrap_or_default(),
        }
    }

    /// Adds what a predecessor has counted. The caller has checked it.
    pub fn add_counts(&mut self, counts: &Counts) {
        for (number, worker) in counts.workers.iter().enumerate() {
            let timings = worker.timings();
            let all = timings.map(|it| counts.in_our_buckets(&it.counts));
            let [one, two, three] = [0, 1, 2].map(|it| (&all[it], timings[it].sum_us));
            self.workers.inherit_worker(number, &worker.counters, [one, two, three]);
        }
        counts.control.add_to(&self.counters);
        let known: BTreeSet<ServiceId> = self.registry.services().map(|it| it.id).collect();
        for backend in &counts.backends {
            let (id, service) = (BackendId(backend.id), ServiceId(backend.service));
            match self.backend(id).map(|it| it.slot) {
                Some(slot) => self.workers.inherit(slot, &backend.values),
                // It has gone meanwhile.
                None if known.contains(&service) => {
                    let given = self.given_before.entry(service).or_default();
                    BackendValues::try_from(backend.values.values())
                        .iter()
                        .for_each(|values| given.add(values));
                }
                None => {}
            }
        }
        for service in &counts.services {
            self.add_service(service, counts.in_our_buckets(&service.first_byte));
        }
    }

    fn add_service(&mut self, more: &counts::Service, first_byte: Times) {
        let id = ServiceId(more.id);
        let Some(service) = self.registry.find_service(id) else { return };
        for barrier in Barrier::ALL {
            let count = more.turned_away.get(barrier.name()).copied().unwrap_or(0);
            service.gate.turn_away(barrier, count);
        }
        let counts::Service { requests, errors, refused, .. } = *more;
        service.gate.answers.add(&Answered { first_byte, requests, errors, refused });
        if more.given != Given::default() {
            let given = self.given_before.entry(id).or_default();
            given.sessions = given.sessions.saturating_add(more.given.sessions);
            given.bytes_up = given.bytes_up.saturating_add(more.given.bytes_up);
            given.bytes_down = given.bytes_down.saturating_add(more.given.bytes_down);
        }
    }
}
