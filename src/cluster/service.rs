//! A service: a named pool of backends, and the terms on which its users are served. Owns what a
//! service consists of and how its pool is frozen; who is in the pool is up to `registry`, and the
//! choice for one user is up to `balance`.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::backend::{Backend, BackendId, Protocol, ServiceId, Standing};
use super::gate::{Barrier, Gate, Limits, lists};
use super::groups::{Group, Split, place_of};
use super::hash_key::{HashKey, Purpose};
use super::rotation::Rotation;
use super::seats::Seats;
use super::table::{Mould, Table};
use super::turn::Turn;
use crate::tls::clients::ClientPolicy;

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
    /// How many sessions it has, for limits of its own.
    pub gate: Arc<Gate>,
    /// The networks whose users are let in; none: everyone is.
    pub users: Arc<[IpNet]>,
    /// The same from snapshot to snapshot, until one of its backends changes.
    pub pool: Arc<Pool>,
}

impl Service {
    /// Whether the service has such a barrier.
    pub fn has(&self, barrier: Barrier) -> bool {
        match barrier {
            Barrier::Users => !self.users.is_empty(),
            Barrier::Sessions => self.terms.limits.sessions.is_some(),
            Barrier::BackendSessions => self.terms.limits.backend_sessions.is_some(),
        }
    }

    /// Whether users from this address are let in.
    #[inline]
    pub fn lets_in(&self, user: IpAddr) -> bool {
        self.users.is_empty() || lists(&self.users, user)
    }

    /// Counts one more session of a user, if it is let in.
    ///
    /// # Errors
    /// What keeps it out.
    #[inline]
    pub fn enter(&self, user: IpAddr) -> Result<(), Barrier> {
        if !self.lets_in(user) {
            return Err(Barrier::Users);
        }
        self.gate.enter(self.terms.limits.sessions).then_some(()).ok_or(Barrier::Sessions)
    }
}

/// What the operator may change about a service while its sessions run. A session keeps its backend,
/// and a deadline that is already set stands until the session next moves.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Terms {
    pub policy: Policy,
    /// What [`Policy::SourceHash`] goes by.
    pub hash: HashBy,
    pub on_backend_loss: OnBackendLoss,
    pub timeouts: Timeouts,
    /// A UDP session ends once each of the user's datagrams has been answered this many times.
    pub responses: Option<NonZeroU32>,
    /// What one API request may take.
    pub requests: RequestLimits,
    /// What becomes of users while every backend fails its check. `None`: backends are not checked.
    pub checks: Option<WhenAllFail>,
    /// API requests are answered with 503 instead of being served, unless there is a fallback.
    pub maintenance: bool,
    /// The API service that serves requests for which nobody of this one is there. A chain of them has no
    /// circle in any one snapshot.
    pub fallback: Option<ServiceId>,
    pub limits: Limits,
    /// Who must say for whom it connects; nobody at most doors.
    pub proxies: Option<Arc<Proxies>>,
    /// Users of a TCP service speak TLS, and its backends do not.
    pub tls: bool,
    /// API requests in the clear are sent to the HTTPS door.
    pub https_only: bool,
    /// The port of its own HTTPS door; `None`: of the common one.
    pub https_port: Option<u16>,
    /// Whether its users are asked for a certificate where they speak TLS, and for which.
    pub clients: Option<Arc<ClientPolicy>>,
}

impl Terms {
    /// Whether a pool that is served on these terms has a table of whom its users return to.
    pub fn has_table(&self) -> bool {
        self.policy == Policy::SourceHash
    }
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
        lists(&self.networks, address)
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
    /// The one of two chosen by chance that has fewer running sessions for its weight.
    TwoChoices,
    /// By the user's address, so that a user returns to the same backend while it is registered.
    SourceHash,
}

impl Policy {
    pub const ALL: [Policy; 4] =
        [Policy::RoundRobin, Policy::LeastSessions, Policy::TwoChoices, Policy::SourceHash];
}

/// What a user is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HashBy {
    /// All connections from one address go to one backend.
    #[default]
    Address,
    /// Each connection goes by itself, so that many users behind one address are spread; a UDP session stays
    /// where it is.
    AddressPort,
}

impl HashBy {
    /// The purpose of a user's hash.
    pub const fn purpose(self) -> Purpose {
        match self {
            HashBy::Address => Purpose::User,
            HashBy::AddressPort => Purpose::Connection,
        }
    }
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

/// What one API request may take, in bytes, in time and in backends. What is read before it is known whose
/// request it is (the head, and the silence before it) is bounded for all of them alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Bytes of content.
    pub body_bytes: u64,
    /// How long a body may go without progress, in either direction.
    pub body: Duration,
    /// How long a backend may take to send the head of a response, once the request has been sent.
    pub answer: Duration,
    /// How long a tunnel may go without traffic.
    pub tunnel_idle: Duration,
    /// Further backends that the request may be offered to.
    pub retries: u8,
}

impl RequestLimits {
    pub const DEFAULT: RequestLimits = RequestLimits {
        body_bytes: u64::MAX,
        body: Duration::from_secs(30),
        answer: Duration::from_secs(30),
        tunnel_idle: Duration::from_secs(3600),
        retries: 2,
    };
}

impl Default for RequestLimits {
    fn default() -> RequestLimits {
        RequestLimits::DEFAULT
    }
}

/// The backends of one service at one moment, frozen with the order in which they are served.
#[derive(Debug, Default)]
pub struct Pool {
    /// In the order of registration.
    pub backends: Box<[Backend]>,
    /// Of places in `backends`. Empty if there is a split.
    pub rotation: Rotation,
    /// Whom users of that rotation return to, if the policy wants it.
    pub table: Option<Table>,
    /// The same where groups share the users.
    pub split: Option<Box<Split>>,
    /// Of every hash by which a user is given a backend.
    pub key: HashKey,
    /// Whether nobody is in the rotation because of failed checks.
    pub is_failing: bool,
}

impl Pool {
    /// The next pool of a service: these backends, which must be in the order of registration, served on its
    /// terms. A table that the present pool has is not filled again.
    pub fn frozen(backends: Vec<Backend>, service: &Service, key: HashKey) -> Pool {
        let Order { rotation, table, split } = order(&backends, service, key);
        let fails = |backend: &Backend| backend.standing == Standing::Failing;
        let serves_nobody = rotation.is_empty() && split.is_none();
        let is_failing = serves_nobody && backends.iter().any(fails);
        let split = split.map(Box::new);
        Pool { rotation, table, split, key, is_failing, backends: backends.into() }
    }

    fn tables(&self) -> impl Iterator<Item = &Table> {
        let parts = self.split.iter().flat_map(|split| split.parts());
        self.table.iter().chain(parts.filter_map(|part| part.table.as_ref()))
    }

    pub fn get(&self, id: BackendId) -> Option<&Backend> {
        Some(&self.backends[self.place_of(id)?])
    }

    fn place_of(&self, id: BackendId) -> Option<usize> {
        // Registration numbers only grow, and backends stand in the order of registration.
        self.backends.binary_search_by_key(&id, |backend| backend.id).ok()
    }

    /// Whether this backend is in the rotation.
    pub fn serves(&self, id: BackendId) -> bool {
        let Some(place) = self.place_of(id).and_then(|place| u16::try_from(place).ok()) else {
            return false;
        };
        self.rotation.has(place) || self.split.iter().any(|split| split.has(place))
    }

    /// Whether nobody is in the rotation.
    pub fn serves_nobody(&self) -> bool {
        self.rotation.is_empty() && self.split.is_none()
    }

    /// Whether a new user can expect to be served: somebody is in the rotation, and not only as the last
    /// resort that those set aside are.
    pub fn serves_somebody(&self) -> bool {
        self.in_rotation().any(|backend| backend.standing != Standing::Aside)
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

#[derive(Default)]
struct Order {
    rotation: Rotation,
    table: Option<Table>,
    split: Option<Split>,
}

/// The order in which the backends are served. When nobody serves, those set aside are tried anyway: a user
/// who is refused in the end has lost nothing, and one of them may be back. Where only those are left that
/// fail their check, the terms decide.
///
/// Where there are groups, backends in none of them have users only while no group takes part: they joined
/// before their service had groups, and their users would otherwise be refused until the first of them has
/// joined one.
fn order(backends: &[Backend], service: &Service, key: HashKey) -> Order {
    let Service { groups, terms, pool: before, .. } = service;
    let last = terms.checks == Some(WhenAllFail::Serve);
    let tried = [Standing::Serving, Standing::Aside].into_iter();
    for standing in tried.chain(last.then_some(Standing::Failing)) {
        let tables = if before.key == key { before.tables().collect() } else { Vec::new() };
        let mould = Mould { key, backends, standing, before: (tables, &before.backends) };
        let mould = terms.has_table().then_some(mould);
        if let Some(split) = Split::of(groups, backends, standing, mould.as_ref()) {
            return Order { split: Some(split), ..Order::default() };
        }
        let belongs = |it: &Backend| groups.is_empty() || place_of(groups, it).is_none();
        let weights: Vec<(u16, u16)> = (0u16..)
            .zip(backends)
            .filter(|(_, it)| it.standing == standing && belongs(it))
            .map(|(place, it)| (place, it.weight))
            .collect();
        if !weights.is_empty() {
            let table = mould.and_then(|mould| mould.cast(belongs));
            return Order { rotation: Rotation::weighted(&weights), table, split: None };
        }
    }
    Order::default()
}
