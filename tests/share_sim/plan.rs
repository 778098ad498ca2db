//! What a run is made of. Owns every number that says how hostile the world is.

pub const NODES: usize = 3;
/// Places for backends: few, so that several balancers have the same.
pub const PLACES: u64 = 12;
/// Steps of ten milliseconds in which things happen,
pub const STEPS: u64 = 12_000;
/// and in which nothing more does: a lease, an orphan's time, a word that stands for a while, the longest wait for
/// a connection, and some.
pub const QUIET: u64 = 7_000;
/// Rounds of both.
pub const ROUNDS: u64 = 2;
/// One in so many steps has a backend do something,
pub const EVERY_BACKEND: u64 = 60;
/// something bad happen,
pub const EVERY_DISASTER: u64 = 700;
/// or what was cut be mended.
pub const EVERY_RETURN: u64 = 1500;

/// What may happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disaster {
    /// The store says nothing for a time, beyond leases and not.
    Pause,
    Compaction,
    /// Every connection ends, as when members restart and tokens are of no more use.
    Restart,
    Backup,
    Restore,
    Wipe,
    /// Somebody deletes keys.
    DeleteAll,
    /// Somebody writes over one.
    Scribble,
    Full,
    /// A watch says nothing any more.
    Silence,
    /// Nothing passes between a balancer and the store.
    Cut,
    /// A balancer stands still.
    Stop,
    /// One dies, and starts again.
    Death,
}

impl Disaster {
    pub const ALL: &[Disaster] = &[
        Disaster::Pause,
        Disaster::Pause,
        Disaster::Compaction,
        Disaster::Restart,
        Disaster::Backup,
        Disaster::Restore,
        Disaster::Wipe,
        Disaster::DeleteAll,
        Disaster::Scribble,
        Disaster::Full,
        Disaster::Silence,
        Disaster::Cut,
        Disaster::Stop,
        Disaster::Death,
    ];
}
