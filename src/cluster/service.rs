//! A service: a named pool of backends, and the terms on which its users are served. Owns what a
//! service consists of and how its pool is frozen; who is in the pool is up to `registry`, and the
//! choice for one user is up to `balance`.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipnet::IpNet;

use super::backend::{Backend, BackendId, Protocol, ServiceId, Standing};
use super::rotation::Rotation;
use super::seats::Seats;

/// A named pool of backends.
#[derive(Clone, Debug)]
pub struct Service {
    pub id: ServiceId,
    pub name: Arc<str>,
    pub kind: Protocol,
    pub terms: Terms,
    pub turn: Arc<Turn>,
    /// The session limit that its sessions count towards. Services may share one.
    pub seats: Arc<Seats>,
    /// The same from snapshot to snapshot, until one of its backends changes.
    pub pool: Arc<Pool>,
}

/// What the operator may change about a service while its sessions run. A session keeps its backend,
/// and a deadline that is already set stands until the session next moves.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Terms {
    pub policy: Policy,
    pub on_backend_loss: OnBackendLoss,
    pub timeouts: Timeouts,
    /// What becomes of users while every backend fails its check. `None`: backends are not checked.
    pub checks: Option<WhenAllFail>,
    /// API requests are answered with 503 instead of being served.
    pub maintenance: bool,
    /// Who must say for whom it connects; nobody at most doors.
    pub proxies: Option<Arc<Proxies>>,
}

/// The proxies in front of a door.
#[derive(Debug, PartialEq, Eq)]
pub struct Proxies {
    pub networks: Vec<IpNet>,
    /// How long the header of one may take to come.
    pub patience: Duration,
}

impl Proxies {
    /// The networks as a list.
    pub fn shown(&self) -> String {
        let shown: Vec<String> = self.networks.iter().map(|one| format!("\"{one}\"")).collect();
        shown.join(", ")
    }

    /// Whether this address is a proxy's.
    pub fn lists(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(&address))
    }
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

/// The turn counter of a service, shared by all workers and by all snapshots that the service is in.
///
/// The only value that workers write together, besides the seats. Exact round robin across workers
/// needs a single order, and it costs one atomic addition per session. Turns go on from snapshot to
/// snapshot, so a backend at the front of the rotation gains nothing when others come and go.
///
/// Alone on its pair of cache lines, so that the users of one service do not slow down those of another.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Turn(AtomicU64);

impl Turn {
    /// The number of the next turn.
    pub fn take(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// The backends of one service at one moment, frozen with the order in which they are served.
#[derive(Debug, Default)]
pub struct Pool {
    /// In the order of registration.
    pub backends: Box<[Backend]>,
    /// Of places in `backends`.
    pub rotation: Rotation,
}

impl Pool {
    /// A pool of these backends, which must be in the order of registration, served on these terms.
    pub fn frozen(backends: Vec<Backend>, terms: &Terms) -> Pool {
        Pool { rotation: rotation(&backends, terms), backends: backends.into() }
    }

    pub fn get(&self, id: BackendId) -> Option<&Backend> {
        // Registration numbers only grow, and backends stand in the order of registration.
        let place = self.backends.binary_search_by_key(&id, |backend| backend.id).ok()?;
        Some(&self.backends[place])
    }

    /// The backends in the rotation, each once.
    pub fn in_rotation(&self) -> impl Iterator<Item = &Backend> {
        self.rotation.places().filter_map(|place| self.backends.get(usize::from(place)))
    }
}

/// The order in which the backends are served. When nobody serves, those set aside are tried anyway: a user
/// who is refused in the end has lost nothing, and one of them may be back. Where only those are left that
/// fail their check, the terms decide.
fn rotation(backends: &[Backend], terms: &Terms) -> Rotation {
    let weights_of = |standing| -> Vec<(u16, u16)> {
        (0u16..)
            .zip(backends)
            .filter(|(_, it)| it.standing == standing)
            .map(|(place, it)| (place, it.weight))
            .collect()
    };
    let last = match terms.checks {
        Some(WhenAllFail::Serve) => weights_of(Standing::Failing),
        Some(WhenAllFail::Refuse) | None => Vec::new(),
    };
    let tried = [weights_of(Standing::Serving), weights_of(Standing::Aside), last];
    Rotation::weighted(tried.iter().find(|weights| !weights.is_empty()).unwrap_or(&Vec::new()))
}
