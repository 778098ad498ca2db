//! UDP users under a seeded simulation: two workers' cores with their books, users and backends
//! that come and go, a network that delays, loses, invents and floods, and a shadow model that says
//! what may not happen. Half of the runs are under pressure: many more users than there are
//! sockets, so that sessions and quarantined pairs are evicted all the time. A run is a function of
//! its seed; a violation names the seed and the step. Planted faults show that every kind of
//! violation is found.

mod laws;
mod model;
mod plan;
mod traffic;
mod world;

use plan::{Fault, Pressure, STEPS};
use world::{Violation, Worker, World};

/// Runs one seed. Returns the number of replies delivered, sessions moved, flows handed off to the
/// worker that runs their session, and evictions and early ends of quarantine.
fn run(seed: u64, fault: Fault, pressure: Pressure) -> Result<[u64; 4], Violation> {
    let mut world = World::new(seed, fault, pressure);
    for step in 0..STEPS {
        let stepped = world.step();
        stepped.map_err(|Violation(what)| {
            Violation(format!("seed {seed}, {pressure:?}, step {step}: {what}"))
        })?;
    }
    let ended = world.wind_down();
    ended.map_err(|Violation(what)| Violation(format!("seed {seed}, at the end: {what}")))?;
    let evicted = |worker: &Worker| {
        let counters = &worker.metrics.counters;
        counters.udp_sessions_displaced.get() + counters.udp_rests_cut_short.get()
    };
    let evicted = world.workers.iter().map(evicted).sum();
    Ok([world.model.delivered, world.model.moved, world.model.found, evicted])
}

#[test]
fn no_seed_finds_a_violation() {
    // Few enough to take seconds; UDP_SIM_SEEDS=400 searches longer.
    let seeds = std::env::var("UDP_SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    for pressure in Pressure::ALL {
        let seeds: u64 = if pressure == Pressure::None { seeds } else { seeds.div_ceil(4) };
        let mut sums = [0; 4];
        for seed in 0..seeds {
            match run(seed, Fault::None, pressure) {
                Ok(counts) => (0..4).for_each(|place| sums[place] += counts[place]),
                Err(Violation(what)) => panic!("{what}"),
            }
        }
        eprintln!("{pressure:?}: {sums:?}");
        // A simulation in which nothing happens finds nothing.
        let [delivered, moved, found, evicted] = sums;
        assert!(delivered > 500 * seeds && moved > 2 * seeds, "{pressure:?} {sums:?}");
        match pressure {
            Pressure::None => assert!(found > seeds, "{sums:?}"),
            _ => assert!(evicted > 100 * seeds, "{pressure:?} {sums:?}"),
        }
    }
}

#[test]
fn every_planted_fault_is_found() {
    for (fault, said) in [
        (Fault::NoQuarantine, "too early"),
        (Fault::DeafToSnapshots, "where nobody is registered"),
        (Fault::TrustsAnySender, "without being asked"),
        (Fault::NoAffinity, "has"),
        (Fault::NeverExpires, "does not end"),
        (Fault::NoSourceLimit, "too many sessions"),
        (Fault::ForgetsTheLocalAddress, ""),
        (Fault::MixesUpSockets, ""),
        (Fault::EvictsWhoWaits, ""),
        (Fault::EvictsWhoSpeaks, ""),
        (Fault::FreesTooEarly, "too early"),
        (Fault::MakesNoRoom, "found no room"),
    ] {
        let seeds = || (0..10).flat_map(|seed| Pressure::ALL.map(|pressure| (seed, pressure)));
        let found = seeds().filter_map(|(seed, pressure)| run(seed, fault, pressure).err());
        let mut of_its_kind = found.filter(|Violation(what)| what.contains(said));
        let Some(Violation(what)) = of_its_kind.next() else { panic!("{fault:?} was not found") };
        eprintln!("{fault:?}: {what}");
    }
}
