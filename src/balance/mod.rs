//! Picks the backend for the next user. Owns the policies and the one shared counter behind exact
//! round robin; knows no socket and no clock. Health and membership come with the snapshot it is
//! handed.

mod least_sessions;
mod source_hash;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cluster::Policy;
use crate::cluster::{Backend, BackendId, Protocol, Snapshot};

/// The turn counters, one per protocol, shared by all workers.
///
/// The only value that workers write together. Exact round robin across workers needs a single order,
/// and it costs one atomic addition per session. Turns continue across snapshots, so a backend at the
/// front of the rotation gains nothing when others come and go.
#[derive(Debug, Default)]
pub struct Turns([Turn; 3]);

/// Alone on its pair of cache lines, so that TCP users do not slow down UDP users.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Turn(AtomicU64);

impl Turns {
    fn take(&self, protocol: Protocol) -> u64 {
        self.0[protocol.index()].0.fetch_add(1, Ordering::Relaxed)
    }
}

/// What a pick may depend on besides the snapshot.
pub struct Question<'a> {
    pub protocol: Protocol,
    pub user: IpAddr,
    /// Running sessions of a backend, across all workers.
    pub load: &'a dyn Fn(&Backend) -> u64,
    /// Backends that have refused this user or have just failed.
    pub excluded: &'a dyn Fn(BackendId) -> bool,
}

/// One worker's view of the policy.
#[derive(Clone)]
pub struct Balancer {
    pub policy: Policy,
    turns: Arc<Turns>,
}

impl Balancer {
    pub fn new(policy: Policy, turns: Arc<Turns>) -> Balancer {
        Balancer { policy, turns }
    }

    /// The backend for a new session; `None` if every backend in the rotation is excluded.
    pub fn pick<'s>(&self, snapshot: &'s Snapshot, question: &Question) -> Option<&'s Backend> {
        let rotation = &snapshot.rotations[question.protocol.index()];
        if rotation.is_empty() {
            return None;
        }
        let fit = |place: u16| {
            let backend = snapshot.backends.get(usize::from(place))?;
            (!(question.excluded)(backend.id)).then_some(backend)
        };
        let turn = || self.turns.take(question.protocol);
        let in_turn = |turn| rotation.from_turn(turn).filter_map(fit);
        match self.policy {
            Policy::RoundRobin => {
                let turn = turn();
                rotation.whose(turn).and_then(fit).or_else(|| in_turn(turn).next())
            }
            Policy::LeastSessions => least_sessions::pick(in_turn(turn()), question.load),
            Policy::SourceHash => {
                source_hash::pick(rotation.places().filter_map(fit), question.user)
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cluster::Standing;
    use crate::cluster::rotation::Rotation;

    /// A snapshot of TCP backends, each with a weight, in the rotation that is given.
    pub(crate) fn snapshot(weights: &[u16], rotation: &[u16]) -> Snapshot {
        let backends = weights.iter().enumerate().map(|(place, weight)| Backend {
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            protocol: Protocol::Tcp,
            address: format!("10.0.{}.{}:80", (place + 1) >> 8, (place + 1) & 255).parse().unwrap(),
            weight: *weight,
            name: None,
            standing: Standing::Serving,
        });
        Snapshot {
            version: 1,
            backends: backends.collect(),
            rotations: [
                rotation.iter().copied().collect(),
                Rotation::default(),
                Rotation::default(),
            ],
        }
    }

    /// Backend 1 runs 10 sessions, backend 2 20, and so on.
    fn picks(policy: Policy, snapshot: &Snapshot, not: &[u32], count: usize) -> Vec<u32> {
        let balancer = Balancer::new(policy, Arc::default());
        let question = Question {
            protocol: Protocol::Tcp,
            user: "192.0.2.1".parse().unwrap(),
            load: &|backend| u64::from(backend.id.0) * 10,
            excluded: &|id| not.contains(&id.0),
        };
        (0..count).filter_map(|_| balancer.pick(snapshot, &question)).map(|b| b.id.0).collect()
    }

    #[test]
    fn round_robin_takes_turns() {
        let three = snapshot(&[1, 1, 1], &[0, 1, 2]);
        assert_eq!(picks(Policy::RoundRobin, &three, &[], 7), [1, 2, 3, 1, 2, 3, 1]);
    }

    #[test]
    fn an_excluded_backend_is_passed_over() {
        let three = snapshot(&[1, 1, 1], &[0, 1, 2]);
        assert_eq!(picks(Policy::RoundRobin, &three, &[2], 4), [1, 3, 3, 1]);
        assert_eq!(picks(Policy::RoundRobin, &three, &[1, 2, 3], 4), [0; 0]);
    }

    #[test]
    fn nobody_registered_is_nobody_picked() {
        for policy in [Policy::RoundRobin, Policy::LeastSessions, Policy::SourceHash] {
            assert_eq!(picks(policy, &snapshot(&[], &[]), &[], 2), [0; 0]);
        }
    }

    #[test]
    fn two_workers_take_turns_together() {
        let turns = Arc::<Turns>::default();
        let three = snapshot(&[1, 1, 1], &[0, 1, 2]);
        let mut counts = [0; 3];
        let workers = [0, 1].map(|_| Balancer::new(Policy::RoundRobin, Arc::clone(&turns)));
        for turn in 0..300 {
            let question = Question {
                protocol: Protocol::Tcp,
                user: "192.0.2.1".parse().unwrap(),
                load: &|_| 0,
                excluded: &|_| false,
            };
            // Unevenly: every third user comes to the second worker.
            let backend = workers[usize::from(turn % 3 == 0)].pick(&three, &question).unwrap();
            counts[usize::from(backend.slot)] += 1;
        }
        assert_eq!(counts, [100; 3]);
    }

    #[test]
    fn two_workers_serve_a_large_weighted_pool_exactly_by_its_weights() {
        let weights: Vec<u16> = (0..1000).map(|it| 1 + it * 7 % 256).collect();
        let mut pool = snapshot(&weights, &[]);
        let places: Vec<(u16, u16)> = (0u16..).zip(weights.iter().copied()).collect();
        pool.rotations[0] = Rotation::weighted(&places);
        let turns = Arc::<Turns>::default();
        let workers = [0, 1].map(|_| Balancer::new(Policy::RoundRobin, Arc::clone(&turns)));
        let question = Question {
            protocol: Protocol::Tcp,
            user: "192.0.2.1".parse().unwrap(),
            load: &|_| 0,
            excluded: &|_| false,
        };
        let mut served = vec![0; weights.len()];
        let round: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        for turn in 0..round {
            let backend = workers[usize::from(turn % 3 == 0)].pick(&pool, &question).unwrap();
            served[usize::from(backend.slot)] += 1;
        }
        assert_eq!(served, weights);
    }

    #[test]
    fn least_sessions_prefers_the_idle_one_for_its_weight() {
        let three = snapshot(&[1, 1, 1], &[0, 1, 2]);
        assert_eq!(picks(Policy::LeastSessions, &three, &[], 3), [1, 1, 1]);
        assert_eq!(picks(Policy::LeastSessions, &three, &[1], 2), [2, 2]);
        let heavy = snapshot(&[1, 4, 1], &[1, 0, 1, 2, 1, 1]);
        assert_eq!(picks(Policy::LeastSessions, &heavy, &[], 1), [2], "20 over 4 is less than 10");
    }

    #[test]
    fn among_equals_least_sessions_takes_the_one_whose_turn_it_is() {
        let balancer = Balancer::new(Policy::LeastSessions, Arc::default());
        let three = snapshot(&[1, 2, 1], &[0, 1, 2]);
        let pick = |loads: [u64; 3]| {
            let question = Question {
                protocol: Protocol::Tcp,
                user: "192.0.2.1".parse().unwrap(),
                load: &|backend| loads[usize::from(backend.slot)],
                excluded: &|_| false,
            };
            balancer.pick(&three, &question).map(|backend| backend.id.0)
        };
        // The second has twice the weight.
        let all_equal = [5, 10, 5];
        let picked: Vec<u32> = (0..6).filter_map(|_| pick(all_equal)).collect();
        assert_eq!(picked, [1, 2, 3, 1, 2, 3]);
        let picked: Vec<u32> = (0..3).filter_map(|_| pick([5, 9, 4])).collect();
        assert_eq!(picked, [3, 3, 3], "a turn is nothing against a smaller share");
        let picked: Vec<u32> = (0..3).filter_map(|_| pick([5, 12, 5])).collect();
        assert_eq!(picked, [1, 3, 3], "of the two equals the first in turn");
    }

    #[test]
    fn a_user_keeps_the_backend_while_others_come_and_go() {
        let four = snapshot(&[1; 4], &[0, 1, 2, 3]);
        let home = picks(Policy::SourceHash, &four, &[], 1)[0];
        for gone in (1..=4).filter(|id| *id != home) {
            assert_eq!(picks(Policy::SourceHash, &four, &[gone], 1), [home]);
        }
        assert_ne!(picks(Policy::SourceHash, &four, &[home], 1), [home]);
    }
}
