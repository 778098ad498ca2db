//! Choosing the backend for the next user.

use std::cell::RefCell;
use std::sync::Arc;

use divan::Bencher;
use lb::balance::{self, Question, Tally};
use lb::base::time::Now;
use lb::cluster::hash_key::Purpose;
use lb::cluster::registry::{Change, Lasts, Registration, Registry};
use lb::cluster::rotation::Rotation;
use lb::cluster::service::Pool;
use lb::cluster::source::Source;
use lb::cluster::{BackendId, Policy, Protocol, Service, ServiceId, Snapshot, Terms};

use crate::stage::snapshot;

/// The TCP service with `backends` backends.
fn service(policy: Policy, backends: u16) -> Service {
    let mut before = snapshot(Protocol::Tcp, backends);
    before.services.iter_mut().for_each(|service| service.terms.policy = policy);
    let all: Vec<_> = before.backends().cloned().collect();
    let snapshot = before.with(&all);
    snapshot.service(ServiceId::built_in(Protocol::Tcp)).expect("it is built in").clone()
}

fn pick(bencher: Bencher, policy: Policy, backends: u16) {
    let service = service(policy, backends);
    let tally = RefCell::new(Tally::new(usize::from(backends)));
    let question = Question {
        user: ([192, 0, 2, 1], 1000).into(),
        random: 0x1234_5678_9abc_def0,
        load: &|backend| u64::from(backend.slot) % 7,
        least: &|contest| {
            let mut tally = tally.borrow_mut();
            let place = tally.least(contest)?;
            let slot = contest.backends[usize::from(place)].slot;
            let sessions = tally.get(slot) + 1;
            tally.set(slot, sessions);
            Some(place)
        },
        excluded: &|_| false,
        after: None,
    };
    bencher.bench_local(|| balance::pick(&service, divan::black_box(&question)).map(|b| b.id));
}

/// The cost does not depend on the number of backends. Budget: 12 ns.
#[divan::bench(args = [1, 10, 1_024])]
fn round_robin(bencher: Bencher, backends: u16) {
    pick(bencher, Policy::RoundRobin, backends);
}

/// A round too long for a table: a thousand backends, with every weight in use. Budget: 200 ns.
#[divan::bench]
fn round_robin_weighted(bencher: Bencher) {
    let equals = service(Policy::RoundRobin, 1_000);
    let weights: Vec<_> = (0..1_000).map(|place| (place, 1 + place % 256)).collect();
    let (backends, rotation) = (equals.pool.backends.clone(), Rotation::weighted(&weights));
    let service =
        Service { pool: Arc::new(Pool { backends, rotation, ..Pool::default() }), ..equals };
    let question = Question {
        user: ([192, 0, 2, 1], 1000).into(),
        random: 0x1234_5678_9abc_def0,
        load: &|_| 0,
        least: &|_| None,
        excluded: &|_| false,
        after: None,
    };
    bencher.bench_local(|| balance::pick(&service, divan::black_box(&question)).map(|b| b.id));
}

/// What the control core does once per batch of changes, with 1,000 backends of the weights 1 to
/// `weights`; with 256 of them the round is too long for a table. Budget: 1 ms, a tenth of what it
/// may do without a pause.
#[divan::bench(args = [1, 3, 256])]
fn freeze(bencher: Bencher, weights: u16) {
    let mut registry = registry(1_000, weights);
    let backend = BackendId(1);
    let mut standings =
        [Change::SetAside { backend }, Change::Restore { backend }].into_iter().cycle();
    bencher.bench_local(|| {
        let change = standings.next().expect("a cycle has no end");
        registry.apply(change, Now::default()).expect("it is registered");
        registry.freeze(false).version
    });
}

/// UDP backends of the weights 1 to `weights`.
fn registry(backends: u16, weights: u16) -> Registry {
    let services = Snapshot::default().services;
    let mut registry = Registry::new(lb::metrics::BACKENDS_MAX, &services);
    for number in 0..backends {
        let wanted = Registration {
            proxy: false,
            http2: false,
            tls: None,
            probe: true,
            check: None,
            source: Source::Connection(1),
            service: ServiceId::built_in(Protocol::Udp),
            address: ([192, 0, 2, 1], 1_000 + number).into(),
            weight: 1 + number % weights,
            name: None,
            group: None,
        };
        registry.apply(Change::Register(wanted), Now::default()).expect("a free place");
    }
    registry
}

/// With a session that begins on the backend chosen: a few steps more each time their number doubles. Budget: 150 ns.
#[divan::bench(args = [1, 10, 1_024])]
fn least_sessions(bencher: Bencher, backends: u16) {
    pick(bencher, Policy::LeastSessions, backends);
}

/// The cost does not depend on the number of backends. Budget: 60 ns.
#[divan::bench(args = [1, 10, 1_024])]
fn two_choices(bencher: Bencher, backends: u16) {
    pick(bencher, Policy::TwoChoices, backends);
}

/// A user's address hashed and looked up in the table alone. Budget: 20 ns.
#[divan::bench(args = [10, 1_024])]
fn lookup(bencher: Bencher, backends: u16) {
    let pool = service(Policy::SourceHash, backends).pool;
    let table = pool.table.as_ref().expect("the policy goes by it");
    let user = ([192, 0, 2, 1], 1000).into();
    bencher.bench_local(|| table.home(pool.key.address(Purpose::User, 0, divan::black_box(user))));
}

/// The cost does not depend on the number of backends. Budget: 40 ns.
#[divan::bench(args = [1, 10, 1_024])]
fn source_hash(bencher: Bencher, backends: u16) {
    pick(bencher, Policy::SourceHash, backends);
}

/// A table, each time one backend more or fewer drains, with everything else that a snapshot takes. Budget: 5 ms.
#[divan::bench(args = [10, 100, 1_024])]
fn fill(bencher: Bencher, backends: u16) {
    let mut registry = registry(backends, 3);
    registry.agree(|service| Terms { policy: Policy::SourceHash, ..service.terms.clone() });
    let backend = BackendId(1);
    let mut drains =
        [Change::DrainBackend { backend, lasts: Lasts::Never }, Change::UndrainBackend { backend }]
            .into_iter()
            .cycle();
    bencher.bench_local(|| {
        registry
            .apply(drains.next().expect("a cycle has no end"), Now::default())
            .expect("it is there");
        registry.freeze(false).version
    });
}
