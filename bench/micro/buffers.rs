//! Blocks that change hands.

use divan::Bencher;
use lb::ring::pool::{Chain, Class, Pool};

/// A block is taken, filled with a small message, queued, sent in thought and given back.
/// Budget: 15 ns.
#[divan::bench]
fn hand_over(bencher: Bencher) {
    let mut pool = Pool::new(256, 8);
    let message = [7; 64];
    bencher.bench_local(|| {
        let mut buf = pool.take(Class::Small).expect("a free block");
        pool.append(&mut buf, &message);
        let mut chain = Chain::EMPTY;
        pool.push(&mut chain, buf);
        let outgoing = divan::black_box(chain.outgoing());
        pool.give_back_chain(chain);
        outgoing
    });
}

/// Sixteen queued blocks of which a short send took half a message each. Budget: 240 ns.
#[divan::bench]
fn advance_sixteen(bencher: Bencher) {
    let mut pool = Pool::new(256, 8);
    bencher.bench_local(|| {
        let mut chain = Chain::EMPTY;
        for _ in 0..16 {
            let mut buf = pool.take(Class::Small).expect("a free block");
            pool.append(&mut buf, &[7; 64]);
            pool.push(&mut chain, buf);
        }
        while !chain.is_empty() {
            pool.advance(&mut chain, 32);
        }
    });
}
