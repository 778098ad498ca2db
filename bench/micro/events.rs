//! The worker's core: what events cost in decisions.

use divan::Bencher;
use lb::proxy::Side;
use lb::ring::pool::Class;

use crate::stage::Stage;

/// A message received and sent: two events, one command. Budget: 105 ns.
#[divan::bench]
fn message(bencher: Bencher) {
    let mut stage = Stage::new();
    let key = stage.session();
    bencher.bench_local(|| stage.bytes(key, Side::Client, Class::Small, &[7; 64]));
}

/// A whole session of one request: accepted, connected, a message each way, both ends, closed.
/// Budget: 600 ns.
#[divan::bench]
fn session(bencher: Bencher) {
    let mut stage = Stage::new();
    bencher.bench_local(|| {
        let key = stage.session();
        stage.bytes(key, Side::Client, Class::Small, &[7; 64]);
        stage.bytes(key, Side::Backend, Class::Small, &[7; 64]);
        stage.finish(key);
    });
}
