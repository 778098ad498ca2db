//! Who gets the next user.

use std::sync::Arc;

use divan::Bencher;
use lb::balance::{Balancer, Question, Turns};
use lb::cluster::Protocol;
use lb::config::Policy;

use crate::stage::snapshot;

fn pick(bencher: Bencher, policy: Policy, backends: u16) {
    let snapshot = snapshot(Protocol::Tcp, backends);
    let balancer = Balancer::new(policy, Arc::<Turns>::default());
    let question = Question {
        protocol: Protocol::Tcp,
        user: [192, 0, 2, 1].into(),
        load: &|backend| u64::from(backend.slot) % 7,
        excluded: &|_| false,
    };
    bencher.bench_local(|| balancer.pick(&snapshot, divan::black_box(&question)).map(|b| b.id));
}

/// Whatever the number of backends. Budget: 12 ns.
#[divan::bench(args = [3, 256])]
fn round_robin(bencher: Bencher, backends: u16) {
    pick(bencher, Policy::RoundRobin, backends);
}

/// Budget: 30 ns for 3 backends, 3,000 ns for 256.
#[divan::bench(args = [3, 256])]
fn least_sessions(bencher: Bencher, backends: u16) {
    pick(bencher, Policy::LeastSessions, backends);
}

/// Budget: 180 ns for 3 backends, 16,000 ns for 256.
#[divan::bench(args = [3, 256])]
fn source_hash(bencher: Bencher, backends: u16) {
    pick(bencher, Policy::SourceHash, backends);
}
