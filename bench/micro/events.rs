//! The worker's core: what the decisions about events cost.

use divan::Bencher;
use lb::proxy::Side;
use lb::ring::pool::Class;

use crate::stage::{Datagrams, Stage};

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

/// A datagram and its answer, in `sessions` sessions that take turns. Budget: 230 ns.
#[divan::bench(args = [1, 100])]
fn datagram(bencher: Bencher, sessions: u16) {
    let mut datagrams = Datagrams::new();
    let user = |number: u16| ([192, 0, 2, 1], 1_000 + number).into();
    (0..sessions).for_each(|number| datagrams.round_trip(user(number), 64));
    let mut turn = 0;
    bencher.bench_local(|| {
        turn = (turn + 1) % sessions;
        datagrams.round_trip(user(turn), 64);
    });
}
