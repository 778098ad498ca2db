//! The API sessions of a worker under a simulated kernel, hostile users and hostile backends, from
//! seeds. What every run must satisfy: no byte reaches the wrong request; each request is answered
//! once and in its turn; a response that was cut never looks complete; a request that must not be
//! repeated is not; no request goes over a connection on which another user logged in, or to another
//! service than the one that claims it; what is held stays bounded; and nothing is left over in the
//! end.
//!
//! `LB_SIM_SEED` runs one seed, `LB_SIM_SHARED` one of those in which two services share the door,
//! `LB_SIM_STALLED` one of those in which most users read nothing, and `LB_SIM_RUNS` sets how many
//! seeds run.

mod backend;
mod client;
mod dice;
mod message;
mod services;
mod weather;
mod wire;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use weather::{SMALL, Weather, shared, stalled, weather};
use world::World;

fn run(seed: u64) {
    World::new(seed, weather(seed)).run();
}

#[test]
fn who_reads_is_served_however_many_do_not() {
    let seeds = match number("LB_SIM_STALLED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("LB_SIM_RUNS").unwrap_or(15),
    };
    let mut asked = 0;
    for seed in seeds {
        let mut world = World::new(seed, stalled(seed));
        if catch_unwind(AssertUnwindSafe(|| world.run())).is_err() {
            panic!("seed {seed} failed: LB_SIM_STALLED={seed} runs it alone");
        }
        asked += world.asked;
    }
    assert!(asked > 0, "blocks are to run short here");
}

#[test]
fn who_is_turned_away_keeps_no_more_than_a_few_places() {
    for stalled in [false, true] {
        let weather = Weather { stalled, calm: false, noisy: false, upheaval: false, ..weather(1) };
        let weather = Weather { seats: 0, clients: 0, small_blocks: SMALL, ..weather };
        let mut world = World::new(1, weather);
        let mut next_id = 1;
        for _ in 0..300 {
            world.arrive(&mut next_id);
            for _ in 0..300 {
                world.step();
            }
            assert!(world.order.len() <= 33, "{} are there", world.order.len());
        }
        let told = world.clients.values().filter(|client| client.answered > 0).count();
        assert!(stalled || told > 100, "{told} of 300 were told");
        while world.clients.values().any(|client| client.ended.is_none()) {
            if !(0..1000).any(|_| world.step()) {
                world.wait();
            }
        }
        world.finish();
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn gateways_keep_their_promises_in_any_weather() {
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
fn requests_reach_only_backends_of_their_service_in_any_weather() {
    if let Some(seed) = number("LB_SIM_SHARED") {
        eprintln!("{:?}", shared(weather(seed)));
        return World::new(seed, shared(weather(seed))).run();
    }
    for seed in 0..number("LB_SIM_RUNS").unwrap_or(100) {
        let run = || World::new(seed, shared(weather(seed))).run();
        if catch_unwind(AssertUnwindSafe(run)).is_err() {
            panic!("seed {seed} failed: LB_SIM_SHARED={seed} runs it alone");
        }
    }
}

#[test]
fn a_login_that_the_gateway_does_not_know_is_found_to_be_shared() {
    let found = (0..60).any(|seed| {
        let weather = Weather { scheme: "Homemade", noisy: false, ..weather(seed) };
        let result = catch_unwind(AssertUnwindSafe(|| World::new(seed, weather).run()));
        result.is_err_and(|why| {
            why.downcast_ref::<String>().is_some_and(|text| text.contains("that is another user's"))
        })
    });
    assert!(found, "the planted fault was not found");
}
