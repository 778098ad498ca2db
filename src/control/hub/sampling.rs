//! What the history is told when a step ends: the totals of the balancer and of each of its services. Changes
//! nothing else.

use super::Hub;
use crate::base::time::Now;
use crate::cluster::{Barrier, Protocol, Service};
use crate::control::history::{Seen, Times, Totals};
use crate::control::services::{Tally, tallies};
use crate::control::view;

impl Hub {
    /// Ends the step of the history, if it is time.
    pub(super) fn sample(&mut self, now: Now) {
        if !self.history.is_due(now) {
            return;
        }
        self.steadiness.forget_gone(now);
        let (whole, tallies) = (self.totals(), tallies(self));
        let seen = self.registry.services().map(|service| Seen {
            id: service.id,
            name: &service.name,
            protocol: service.kind,
            totals: totals_of(service, tallies.get(&service.id).copied().unwrap_or_default()),
        });
        self.history.end_step(now, &whole, seen);
    }

    fn totals(&self) -> Totals {
        let workers = &self.workers;
        let (counts, _) = workers.histogram(|it| &it.first_byte_time);
        let mut times = Times::default();
        times.iter_mut().zip(counts).for_each(|(time, count)| *time = count);
        Totals {
            sessions: workers.sessions(),
            new: workers.sum(|it| it.sessions_started.get()),
            requests: workers.sum(|it| it.api_requests.get()),
            errors: workers.sum(|it| it.api_errors.get()),
            refused: workers.sum(view::refused),
            bytes_up: workers.sum(|it| it.bytes_up.get()),
            bytes_down: workers.sum(|it| it.bytes_down.get()),
            times,
        }
    }
}

fn totals_of(service: &Service, tally: Tally) -> Totals {
    let is_api = service.kind == Protocol::Api;
    let answered = service.gate.answers.sum();
    let barred: u64 = Barrier::ALL.map(|it| service.gate.turned_away(it)).iter().sum();
    Totals {
        sessions: tally.sessions,
        new: if is_api { 0 } else { tally.given.sessions },
        requests: answered.requests,
        errors: answered.errors,
        refused: barred + answered.refused,
        bytes_up: tally.given.bytes_up,
        bytes_down: tally.given.bytes_down,
        times: answered.first_byte,
    }
}
