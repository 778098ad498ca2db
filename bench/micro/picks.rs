//! Who gets the next user.

use std::sync::Arc;

use divan::Bencher;
use lb::balance::{Balancer, Question, Turns};
use lb::base::time::Now;
use lb::cluster::Policy;
use lb::cluster::Protocol;
use lb::cluster::registry::{Change, Registration, Registry};
use lb::cluster::rotation::Rotation;
use lb::cluster::source::Source;

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

/// A round too long for a table: a thousand backends of every weight there is. Budget: 200 ns.
#[divan::bench]
fn round_robin_weighted(bencher: Bencher) {
    let mut snapshot = snapshot(Protocol::Tcp, 1_000);
    let weights: Vec<_> = (0..1_000).map(|place| (place, 1 + place % 256)).collect();
    snapshot.rotations[Protocol::Tcp.index()] = Rotation::weighted(&weights);
    let balancer = Balancer::new(Policy::RoundRobin, Arc::<Turns>::default());
    let question = Question {
        protocol: Protocol::Tcp,
        user: [192, 0, 2, 1].into(),
        load: &|_| 0,
        excluded: &|_| false,
    };
    bencher.bench_local(|| balancer.pick(&snapshot, divan::black_box(&question)).map(|b| b.id));
}

/// What the control core does once for every batch of changes, with 1,000 backends of the weights 1 to
/// `weights`; with 256 of them the round is too long for a table. Budget: 1 ms, a tenth of what it may do in one go.
#[divan::bench(args = [1, 3, 256])]
fn freeze(bencher: Bencher, weights: u16) {
    let mut registry = Registry::new(lb::metrics::BACKENDS_MAX);
    for number in 0..1_000 {
        let wanted = Registration {
            source: Source::Connection(1),
            protocol: Protocol::Udp,
            address: ([192, 0, 2, 1], 1_000 + number).into(),
            weight: 1 + number % weights,
            name: None,
        };
        registry.apply(Change::Register(wanted), Now::default()).expect("a free place");
    }
    bencher.bench_local(|| registry.freeze().version);
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
