//! The fuzz targets' checks of what a predecessor leaves, under a seeded generator: runs in every `cargo test`,
//! bounded, and the same each time. `LB_FUZZ_ROUNDS` asks for more rounds, `LB_FUZZ_SEED` for others.

#[path = "fuzz/state_checks.rs"]
mod checks;
#[path = "common/random.rs"]
mod random;

use random::Random;

fn asked(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Changes some bytes, and cuts some off.
fn changed(random: &mut Random, text: &[u8]) -> Vec<u8> {
    let mut text = text.to_vec();
    for _ in 0..random.below(4) {
        let place = random.below(text.len() as u64) as usize;
        text[place] = random.below(256) as u8;
    }
    if random.below(4) == 0 {
        text.truncate(random.below(text.len() as u64) as usize);
    }
    text
}

#[test]
fn a_state_is_read_or_refused_whatever_has_been_changed_in_it() {
    let (mut random, whole) = (Random::new(asked("LB_FUZZ_SEED", 1)), checks::a_state());
    checks::state(&whole);
    for _ in 0..asked("LB_FUZZ_ROUNDS", 20_000) {
        checks::state(&changed(&mut random, &whole));
    }
}

#[test]
fn a_legacy_is_read_or_refused_whatever_has_been_changed_in_it() {
    let mut random = Random::new(asked("LB_FUZZ_SEED", 2));
    let whole =
        br#"{"at":5,"connections":[{"number":3,"socket":0}],"backends":[{"id":1,"slot":2}]}"#;
    checks::legacy(whole);
    for _ in 0..asked("LB_FUZZ_ROUNDS", 20_000) {
        checks::legacy(&changed(&mut random, whole));
    }
}
