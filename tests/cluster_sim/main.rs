//! Services in the middle of traffic, without a kernel: the control core with its registry, checks, shares,
//! drains and reloads, the snapshots that it publishes, and workers that pick from them, under a seeded
//! schedule of everything that may go wrong. Files come and are faulty, backends register, drain, fall silent
//! and fall ill, operators shift users, and workers lag behind or turn in the midst of any of it. What must
//! hold is in `laws` and `shares`.
//!
//! A failing run names its seed. `LB_CLUSTER_SIM=17 cargo test --test cluster_sim again` runs that one, and
//! `LB_CLUSTER_SIM_SEEDS=2000` sets how many are run.

mod laws;
mod plan;
#[path = "../common/random.rs"]
mod random;
mod shares;
mod sky;
mod worker;
mod world;

use world::World;

/// Seeds of a normal run: seconds.
const SEEDS: u64 = 8;

/// Says which run it was, if it fails.
struct Banner(u64, usize);

impl Drop for Banner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Banner(seed, step) = self;
            eprintln!(
                "step {step}; to see it again: LB_CLUSTER_SIM={seed} cargo test --test cluster_sim again"
            );
        }
    }
}

/// What came about in a run: reloads, those refused, choices, whole rounds that were dealt out.
fn run(seed: u64) -> [u64; 4] {
    let _lines = tracing::subscriber::set_default(sky::Lines);
    let mut banner = Banner(seed, 0);
    let mut world = World::new(seed);
    for step in 0..plan::STEPS {
        banner.1 = step;
        world.step();
    }
    world.wind_down();
    let laws = &world.laws;
    [laws.reloads, laws.refused, laws.shares.picks, laws.shares.rounds]
}

#[test]
fn services_keep_the_laws_while_they_come_change_and_go() {
    let wanted = std::env::var("LB_CLUSTER_SIM_SEEDS");
    let seeds = wanted.map_or(SEEDS, |text| text.parse().expect("a number of seeds"));
    let mut sums = [0; 4];
    for seed in 0..seeds {
        let counts = run(seed);
        (0..4).for_each(|place| sums[place] += counts[place]);
    }
    eprintln!("reloads, refused, choices, rounds: {sums:?}");
    // A simulation in which nothing happens finds nothing.
    let [reloads, refused, picks, rounds] = sums.map(|sum| sum / seeds);
    assert!(reloads > 10 && refused > 2 && picks > 1000 && rounds > 100, "{sums:?}");
}

/// The last session of a removed service had ended between the hearing of reports and the look for sessions:
/// the service was forgotten, and the next tick heard of a session of nobody's.
#[test]
fn what_the_last_session_said_is_heard_before_its_service_is_forgotten() {
    run(142);
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    assert_eq!(run(7), run(7));
}

#[test]
fn again() {
    if let Ok(seed) = std::env::var("LB_CLUSTER_SIM") {
        eprintln!("{:?}", run(seed.parse().expect("a seed is a number")));
    }
}
