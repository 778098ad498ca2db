//! The API sessions of a worker between users who speak HTTP/2 and backends of either protocol, all of them simulated
//! from seeds, in the world of `http_sim`. What every run must satisfy beyond the laws of that one: an answer belongs
//! to its stream; one that was cut never looks complete, whatever the reset says; in calm weather no stream starves;
//! and nothing of any stream is left over in the end.
//!
//! `LB_SIM_SEED` runs one seed, and `LB_SIM_RUNS` sets how many run.

#![allow(dead_code, reason = "what is shared with http_sim is not all of use here")]

mod backend;
mod call;
mod client;
#[path = "../http_sim/dice.rs"]
mod dice;
mod flow;
#[path = "../http_sim/backend.rs"]
mod http1;
#[path = "../http_sim/message.rs"]
mod message;
mod pipe;
mod served;
#[path = "../http_sim/services.rs"]
mod services;
#[path = "../http_sim/weather.rs"]
mod weather;
#[path = "../http_sim/wire.rs"]
mod wire;
#[path = "../http_sim/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use dice::Dice;
use weather::Weather;
use world::World;

/// As for users of HTTP/1.1, but with many requests at once, which need more blocks.
fn weather(seed: u64) -> Weather {
    let weather = weather::weather(seed);
    let mut dice = Dice::new(seed ^ 0x6832);
    Weather {
        noisy: false,
        clients: 1 + dice.below(5),
        http2: dice.pick(&[0, 0b111, 0b111, 0b101, 0b010]),
        longest: match dice.pick(&[50, 3_000, 100_000]) {
            // Some bodies are longer than every window, which has to be opened again and again.
            _ if seed % 25 == 24 => 600_000,
            longest => longest,
        },
        small_blocks: if weather.small_blocks < weather::SMALL { 96 } else { 4096 },
        ..weather
    }
}

fn run(seed: u64) {
    World::new(seed, weather(seed)).run();
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn streams_keep_their_promises_in_any_weather() {
    if let Some(seed) = number("LB_SIM_SEED") {
        eprintln!("{:?}", weather(seed));
        return run(seed);
    }
    for seed in 0..number("LB_SIM_RUNS").unwrap_or(150) {
        if catch_unwind(AssertUnwindSafe(|| run(seed))).is_err() {
            panic!("seed {seed} failed: LB_SIM_SEED={seed} runs it alone");
        }
    }
}

#[test]
fn a_stream_that_is_there_serves_whose_first_connect_failed() {
    run(3);
}

#[test]
fn the_last_command_of_a_stream_comes_before_its_end() {
    run(7);
}

#[test]
fn a_request_of_which_a_part_was_sent_is_not_offered_to_another_backend() {
    run(769);
}
