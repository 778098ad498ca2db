//! Sessions without a kernel: the core of a worker between simulated users, backends, network and
//! ring, under a seeded schedule of everything that may go wrong. The laws that every run must obey
//! are listed in `sim/law.rs`.
//!
//! A failing run names its weather and seed. `LB_SIM=hostile:17 cargo test --test sim replay --
//! --nocapture` tells its story line by line; `LB_SIM_SEEDS=20000` sets how many seeds of each
//! weather run.

mod sim {
    pub mod content;
    pub mod control;
    pub mod kernel;
    pub mod law;
    pub mod laws;
    pub mod net;
    pub mod peer;
    pub mod pipes;
    pub mod plan;
    #[path = "../common/random.rs"]
    pub mod random;
    pub mod shadow;
    pub mod world;
}

use std::thread;

use lb::session::EndReason;
use sim::plan::{Plan, Weather};
use sim::random::Random;
use sim::world::{Story, run, run_plan};

/// Seeds of each weather in a normal run.
const SEEDS: u64 = 150;

fn seeds() -> u64 {
    let wanted = std::env::var("LB_SIM_SEEDS");
    wanted.map_or(SEEDS, |text| text.parse().expect("LB_SIM_SEEDS is a number"))
}

/// Says which run it was, if it fails.
struct Banner(Weather, u64);

impl Drop for Banner {
    fn drop(&mut self) {
        if thread::panicking() {
            let (weather, seed) = (self.0.name(), self.1);
            eprintln!(
                "to see it again: LB_SIM={weather}:{seed} cargo test --test sim replay -- --nocapture"
            );
        }
    }
}

fn told(weather: Weather, seed: u64) -> Story {
    let _banner = Banner(weather, seed);
    run(weather, seed, false)
}

#[test]
fn in_fair_weather_everyone_is_served_to_the_end() {
    for seed in 0..seeds() {
        let story = told(Weather::Fair, seed);
        for fate in &story.fates {
            assert_eq!(fate.reason, Some(EndReason::Finished), "seed {seed}: {fate:?}");
        }
    }
}

#[test]
fn sessions_keep_the_laws_in_a_hostile_network() {
    (0..seeds()).for_each(|seed| drop(told(Weather::Hostile, seed)));
}

#[test]
fn sessions_keep_the_laws_without_enough_blocks() {
    let starved: u64 = (0..seeds()).map(|seed| told(Weather::Starved, seed).starved).sum();
    assert!(starved > 0, "this weather is there to starve flows");
}

#[test]
fn who_is_read_is_served_to_the_end_however_many_readers_stop() {
    let (mut stalled, mut served) = (0, 0);
    for seed in 0..seeds() {
        for fate in &told(Weather::Stalled, seed).fates {
            let finished = fate.reason == Some(EndReason::Finished);
            assert!(finished || !fate.diligent, "seed {seed}: {fate:?}");
            (stalled, served) =
                (stalled + u64::from(!fate.diligent), served + u64::from(fate.diligent));
        }
    }
    assert!(served > 0 && stalled > served, "this weather is there to stall: {stalled}, {served}");
}

#[test]
fn sessions_keep_the_laws_while_backends_come_and_go() {
    (0..seeds()).for_each(|seed| drop(told(Weather::Churn, seed)));
}

#[test]
fn streams_keep_the_laws_in_pipes_and_out_of_them() {
    let spliced: u64 = (0..seeds()).map(|seed| told(Weather::Streams, seed).spliced).sum();
    assert!(spliced > 0, "this weather is there to splice");
}

/// A step found the end that a reset had left, and the send beside it had swallowed that reset.
#[test]
fn an_end_behind_the_word_of_a_send_is_no_true_end() {
    told(Weather::Streams, 5655);
}

#[test]
fn a_freeze_at_any_event_equals_none() {
    let mut stills = 0;
    for seed in 0..seeds() {
        let story = told(Weather::Winter, seed);
        for fate in &story.fates {
            assert_eq!(fate.reason, Some(EndReason::Finished), "seed {seed}: {fate:?}");
        }
        let mut random = Random::new(seed ^ (Weather::Winter as u64) << 56);
        let plan = Plan::draw(Weather::Winter, &mut random);
        let unfrozen = run_plan(Plan { freezes: 0, ..plan }, random, false);
        assert_eq!(format!("{:?}", story.fates), format!("{:?}", unfrozen.fates), "seed {seed}");
        stills += story.stills;
    }
    assert!(stills > seeds(), "this weather is there to freeze: {stills}");
}

#[test]
fn sessions_keep_the_laws_while_their_worker_freezes_in_any_weather() {
    let stills: u64 = (0..2 * seeds()).map(|seed| told(Weather::Frost, seed).stills).sum();
    assert!(stills > seeds(), "this weather is there to freeze: {stills}");
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    for weather in Weather::ALL {
        let [once, again] = [0; 2].map(|_| told(weather, 7));
        assert_eq!((once.mark, once.turns), (again.mark, again.turns), "{}", weather.name());
    }
}

#[test]
fn replay() {
    let Ok(which) = std::env::var("LB_SIM") else { return };
    let (weather, seed) = which.split_once(':').expect("LB_SIM is a weather and a seed: fair:1");
    let weather = Weather::ALL.into_iter().find(|known| known.name() == weather);
    let weather = weather.expect("a weather is one of Weather::ALL");
    let seed = seed.parse().expect("a seed is a number");
    let _banner = Banner(weather, seed);
    let story = run(weather, seed, true);
    eprintln!("{story:#?}");
}
