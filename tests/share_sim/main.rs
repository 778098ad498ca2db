//! Three balancers that share one registry, with a model of a store between them that delays, pauses, forgets,
//! compacts, is restored, wiped and written over, and fills up, under a seeded schedule. The laws: what is registered
//! here is served here at once; nobody lets go of what a balancer that is well has registered, whatever the store
//! does; and once nothing has happened for a while, all know the truth, choose alike, and the store holds no more.
//!
//! A failing run names its seed. `LB_SHARE_SIM=17 cargo test --test share_sim again` runs that one, and
//! `LB_SHARE_SIM_SEEDS=2000` sets how many are run.

mod plan;
#[path = "../common/random.rs"]
mod random;
mod store;
mod world;

use world::World;

/// Seeds of a normal run: seconds.
const SEEDS: u64 = 8;

/// What is wrong with the balancers, so that a law must be broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    None,
    /// A key that vanishes takes its backend away at once.
    ObeysExpiry,
    /// Who has not been heard of for long is served for ever.
    NeverGivesUp,
    /// What the store has forgotten is not written again.
    WritesOnce,
    /// Nothing but the watch tells of changes.
    NeverAudits,
}

/// A law that was broken.
#[derive(Debug)]
pub struct Violation(String);

/// What came about in a run.
fn run(seed: u64, fault: Fault) -> Result<[u64; 4], Violation> {
    let mut world = World::new(seed, fault);
    let told = |world: &World, Violation(what): Violation| {
        let again = format!("LB_SHARE_SIM={seed} cargo test --test share_sim again");
        Violation(format!("at {} ms: {what}; to see it again: {again}", world.now))
    };
    for _ in 0..plan::ROUNDS {
        for step in 0..plan::STEPS + plan::QUIET {
            if step == plan::STEPS {
                world.mend();
            }
            if step == plan::STEPS + plan::QUIET / 2 {
                world.last_change();
            }
            let stepped = world.step(step >= plan::STEPS);
            stepped.map_err(|violation| told(&world, violation))?;
        }
        let settled = world.is_settled();
        settled.map_err(|violation| told(&world, violation))?;
    }
    Ok(world.counts)
}

#[test]
fn balancers_know_the_truth_whatever_befalls_the_store() {
    let wanted = std::env::var("LB_SHARE_SIM_SEEDS");
    let seeds = wanted.map_or(SEEDS, |text| text.parse().expect("a number of seeds"));
    let mut sums = [0; 4];
    for seed in 0..seeds {
        match run(seed, Fault::None) {
            Ok(counts) => (0..4).for_each(|place| sums[place] += counts[place]),
            Err(Violation(what)) => panic!("{what}"),
        }
    }
    eprintln!("registrations, disasters, lists anew, times at rest: {sums:?}");
    // A simulation in which nothing happens finds nothing.
    let [joined, disasters, relisted, settled] = sums;
    assert!(joined > 100 * seeds && disasters > 15 * seeds && relisted > 0, "{sums:?}");
    assert_eq!(settled, plan::ROUNDS * seeds);
}

#[test]
fn every_planted_fault_is_found() {
    for (fault, said) in [
        (Fault::ObeysExpiry, "lets go of"),
        (Fault::NeverGivesUp, "too many"),
        (Fault::WritesOnce, ""),
        (Fault::NeverAudits, ""),
    ] {
        let found = (0..20).filter_map(|seed| run(seed, fault).err());
        let mut of_its_kind = found.filter(|Violation(what)| what.contains(said));
        let Some(Violation(what)) = of_its_kind.next() else { panic!("{fault:?} was not found") };
        eprintln!("{fault:?}: {what}");
    }
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    assert_eq!(run(3, Fault::None).ok(), run(3, Fault::None).ok());
}

#[test]
fn again() {
    if let Ok(seed) = std::env::var("LB_SHARE_SIM") {
        let outcome = run(seed.parse().expect("a seed is a number"), Fault::None);
        eprintln!("{outcome:?}");
        assert!(outcome.is_ok());
    }
}
