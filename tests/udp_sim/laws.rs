//! What must hold of the workers after every step, independent of the model: bounds, sums of
//! counters, and nothing left behind.

use std::collections::HashMap;
use std::time::Duration;

use lb::worker::udp::sessions::DropReason;

use crate::plan::{LATE, SEATS};
use crate::world::{Outcome, World, violated};

impl World {
    pub fn check(&self) -> Outcome {
        for worker in &self.workers {
            if worker.core.sockets() != worker.open.len()
                || worker.open.len() > self.pressure.sockets()
            {
                return violated(format!("{} sockets are open", worker.open.len()));
            }
            let counters = &worker.metrics.counters;
            let dropped: u64 = [
                DropReason::NoBackend,
                DropReason::TableFull,
                DropReason::SourceLimit,
                DropReason::SourceRate,
                DropReason::SourceShare,
                DropReason::UpstreamExhausted,
                DropReason::Draining,
                DropReason::TooBig,
            ]
            .map(|why| why.counter(counters).get())
            .iter()
            .sum();
            if counters.udp_datagrams_up.get() + dropped != worker.offered {
                return violated(
                    "a datagram was neither relayed nor counted as dropped".to_owned(),
                );
            }
        }
        if self.arrivals.is_multiple_of(16) { self.check_sessions() } else { Ok(()) }
    }

    fn check_sessions(&self) -> Outcome {
        for worker in &self.workers {
            let mut of_source: HashMap<_, u32> = HashMap::new();
            let mut count = 0;
            for session in worker.shard.iter() {
                count += 1;
                let held = of_source.entry(session.client.ip()).or_default();
                *held += 1;
                if self.pressure.per_source().is_some_and(|most| *held > most) {
                    return violated(format!("{} holds too many sessions", session.client.ip()));
                }
                if self.now > session.active.plus(self.pressure.idle() + LATE) {
                    return violated(format!("{} is idle and does not end", session.client));
                }
            }
            if count != worker.core.live() || count > self.pressure.sessions() {
                return violated(format!("{count} sessions in the books, {}", worker.core.live()));
            }
        }
        if self.workers.iter().map(|worker| worker.core.live()).sum::<usize>() > SEATS {
            return violated("more sessions than seats".to_owned());
        }
        Ok(())
    }

    /// After everyone has been silent for long enough, nothing may be left.
    pub fn wind_down(&mut self) -> Outcome {
        self.network.clear();
        for _ in 0..800 {
            self.now = self.now.plus(Duration::from_millis(100));
            self.expire();
        }
        for worker in &self.workers {
            let active: u64 = worker.metrics.backends.iter().map(|b| b.active.get()).sum();
            let counters = &worker.metrics.counters;
            let left = [
                worker.core.live() as u64,
                worker.shard.iter().count() as u64,
                active,
                counters.sessions_active.get(),
                counters.udp_pairs_resting.get(),
            ];
            if left != [0; 5] || worker.open.len() > 32 {
                return violated(format!("{left:?} and {} sockets are left", worker.open.len()));
            }
        }
        if !self.map.is_empty() {
            return violated("the affinity map is not empty".to_owned());
        }
        Ok(())
    }
}
