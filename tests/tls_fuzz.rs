//! The fuzz targets' checks of TLS under a seeded generator: runs in every `cargo test`, bounded, and the same
//! each time. `LB_FUZZ_ROUNDS` asks for more rounds, `LB_FUZZ_SEED` for others.

#[path = "fuzz/tls_checks.rs"]
mod checks;
#[path = "common/random.rs"]
mod random;

use random::Random;

fn asked(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn random() -> Random {
    Random::new(asked("LB_FUZZ_SEED", 1))
}

#[test]
fn a_hello_is_read_alike_however_it_is_cut_and_whatever_has_been_changed_in_it() {
    let (mut random, hello) = (random(), checks::a_hello());
    checks::client_hello(&hello);
    for _ in 0..asked("LB_FUZZ_ROUNDS", 60) {
        let mut changed = hello.clone();
        for _ in 0..random.below(4) {
            let place = random.below(changed.len() as u64) as usize;
            changed[place] = random.below(256) as u8;
        }
        if random.below(4) == 0 {
            changed.truncate(random.below(changed.len() as u64) as usize);
        }
        checks::client_hello(&changed);
    }
}

#[test]
fn nothing_is_lost_or_made_up_whatever_happens_in_whichever_order() {
    let mut random = random();
    for _ in 0..asked("LB_FUZZ_ROUNDS", 60) {
        let steps = random.below(1500) as usize;
        let bytes: Vec<u8> = (0..2 * steps).map(|_| random.below(256) as u8).collect();
        checks::tls_session(&bytes);
    }
}
