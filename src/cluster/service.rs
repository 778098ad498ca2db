//! A service: a named pool of backends, and the terms on which its users are served. Owns what a
//! service consists of and how its pool is frozen; who is in the pool is up to `registry`, and the
//! choice for one user is up to `balance`.

use std::sync::Arc;
use std::time::Duration;

use super::backend::{Backend, BackendId, Protocol, ServiceId, Standing};
use super::groups::{Group, Split, place_of};
use super::rotation::Rotation;
use super::seats::Seats;
use super::turn::Turn;

/// A named pool of backends.
#[derive(Clone, Debug)]
pub struct Service {
    pub id: ServiceId,
    pub name: Arc<str>,
    pub kind: Protocol,
    pub terms: Terms,
    /// Blue and green, say. Without any, the backends share all users.
    pub groups: Arc<[Group]>,
    /// Counts the users of the service; within a group, its own counter does.
    pub turn: Arc<Turn>,
    /// The session limit that its sessions count towards. Services may share one.
    pub seats: Arc<Seats>,
    /// The same from snapshot to snapshot, until one of its backends changes.
    pub pool: Arc<Pool>,
}

/// What the operator may change about a service while its sessions run. A session keeps its backend,
/// and a deadline that is already set stands until the session next moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Terms {
    pub policy: Policy,
    pub on_backend_loss: OnBackendLoss,
    pub timeouts: Timeouts,
    /// What becomes of users while every backend fails its check. `None`: backends are not checked.
    pub checks: Option<WhenAllFail>,
    /// API requests are answered with 503 instead of being served.
    pub maintenance: bool,
}

/// What becomes of users while every backend fails its check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WhenAllFail {
    /// They are refused.
    #[default]
    Refuse,
    /// They are sent to the backends all the same: the check may be what is wrong.
    Serve,
}

/// How a backend is chosen for a new session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// In turn across all workers, by weight.
    #[default]
    RoundRobin,
    /// The one with the fewest running sessions for its weight.
    LeastSessions,
    /// By the user's address, so that a user returns to the same backend while it is registered.
    SourceHash,
}

/// What happens to running TCP sessions when their backend's control connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnBackendLoss {
    /// They go on: their own connections are the better evidence that the backend is alive.
    #[default]
    Keep,
    /// They are ended.
    Close,
}

/// How long things may take in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// How long connecting to a backend may take before another one is tried.
    pub connect: Duration,
    /// How long a TCP session may go without traffic in either direction.
    pub tcp_idle: Duration,
    /// How long a TCP session may go without traffic after one side has finished sending.
    pub half_close: Duration,
    /// How long a UDP session may go without a datagram in either direction.
    pub udp_idle: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(3),
            tcp_idle: Duration::from_secs(3600),
            half_close: Duration::from_secs(60),
            udp_idle: Duration::from_secs(60),
        }
    }
}

/// The backends of one service at one moment, frozen with the order in which they are served.
#[derive(Debug, Default)]
pub struct Pool {
    /// In the order of registration.
    pub backends: Box<[Backend]>,
    /// Of places in `backends`. Empty if there is a split.
    pub rotation: Rotation,
    /// The same where groups share the users.
    pub split: Option<Box<Split>>,
}

impl Pool {
    /// A pool of these backends, which must be in the order of registration, served on these terms.
    pub fn frozen(backends: Vec<Backend>, groups: &[Group], terms: &Terms) -> Pool {
        let (rotation, split) = order(&backends, groups, terms);
        Pool { rotation, split: split.map(Box::new), backends: backends.into() }
    }

    pub fn get(&self, id: BackendId) -> Option<&Backend> {
        // Registration numbers only grow, and backends stand in the order of registration.
        let place = self.backends.binary_search_by_key(&id, |backend| backend.id).ok()?;
        Some(&self.backends[place])
    }

    /// Whether nobody is in the rotation.
    pub fn serves_nobody(&self) -> bool {
        self.rotation.is_empty() && self.split.is_none()
    }

    /// The backends in the rotation, each once.
    pub fn in_rotation(&self) -> impl Iterator<Item = &Backend> {
        let in_groups = self.split.iter().flat_map(|split| split.places());
        let places = self.rotation.places().chain(in_groups);
        places.filter_map(|place| self.backends.get(usize::from(place)))
    }

    /// Each of them with its turns in a round, and how many turns that round has.
    pub fn turns(&self) -> impl Iterator<Item = (&Backend, u64, u64)> {
        let all = self.rotation.round();
        let alone = self.rotation.shares().iter();
        let alone = alone.map(move |share| (share.place, u64::from(share.turns), all));
        let turns = alone.chain(self.split.iter().flat_map(|split| split.turns()));
        turns.map(|(place, turns, all)| (&self.backends[usize::from(place)], turns, all))
    }
}

/// The order in which the backends are served. When nobody serves, those set aside are tried anyway: a user
/// who is refused in the end has lost nothing, and one of them may be back. Where only those are left that
/// fail their check, the terms decide.
///
/// Where there are groups, backends in none of them have users only while no group takes part: they joined
/// before their service had groups, and their users would otherwise be refused until the first of them has
/// joined one.
fn order(backends: &[Backend], groups: &[Group], terms: &Terms) -> (Rotation, Option<Split>) {
    let last = terms.checks == Some(WhenAllFail::Serve);
    let tried = [Standing::Serving, Standing::Aside].into_iter();
    for standing in tried.chain(last.then_some(Standing::Failing)) {
        if let Some(split) = Split::of(groups, backends, standing) {
            return (Rotation::default(), Some(split));
        }
        let weights: Vec<(u16, u16)> = (0u16..)
            .zip(backends)
            .filter(|(_, it)| it.standing == standing)
            .filter(|(_, it)| groups.is_empty() || place_of(groups, it).is_none())
            .map(|(place, it)| (place, it.weight))
            .collect();
        if !weights.is_empty() {
            return (Rotation::weighted(&weights), None);
        }
    }
    (Rotation::default(), None)
}
