//! What the admin door serves, as plain values: the stable schema of `/status` and `/sessions`. Owns the
//! names and units of every field; `control::view` fills them in, and `lb status` reads them back with the
//! same types. Fields may be added at any time, so readers ignore those they do not know; removing a
//! field or changing its meaning raises [`SCHEMA`].

mod handover;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::certificates::CertificateStatus;
use super::cluster_status::ClusterStatus;
use crate::cluster::{Barrier, Protocol, Standing};

pub use handover::{HandoverFailure, HandoverState, HandoverStatus, HandoverTaken};

/// The version of this schema, sent with every answer.
pub const SCHEMA: u32 = 1;

/// `GET /status`: the whole balancer at one moment, without individual sessions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    pub schema: u32,
    /// The version of the program.
    pub version: String,
    pub pid: u32,
    pub state: RunState,
    /// When the control core started, in milliseconds since 1970.
    pub started_unix_ms: u64,
    pub uptime_ms: u64,
    /// While stopping: how long the remaining sessions still have.
    pub stops_in_ms: Option<u64>,
    pub doors: Doors,
    /// `round_robin`, `least_sessions` or `source_hash`.
    pub policy: String,
    /// `timeouts.drain_ms`: how long the sessions of a backend have that is drained without a deadline.
    #[serde(default)]
    pub drain_ms: Option<u64>,
    /// The version of the snapshot last published to the workers.
    pub snapshot: u64,
    pub sessions: SessionTotals,
    /// The built-in ones first, then those of the file in its order.
    #[serde(default)]
    pub services: Vec<ServiceStatus>,
    /// In order of registration; backends that have left but still have sessions come last.
    pub backends: Vec<BackendStatus>,
    pub workers: Vec<WorkerStatus>,
    /// Of all workers, since they started.
    pub timings: Timings,
    /// In the order of the file.
    #[serde(default)]
    pub certificates: Vec<CertificateStatus>,
    /// `null` if this balancer is in none.
    #[serde(default)]
    pub cluster: Option<ClusterStatus>,
    /// What the settings leave to the host and has been worked out, as `key = value`.
    #[serde(default)]
    pub derived: Vec<String>,
    /// By protocol.
    #[serde(default)]
    pub last_minute: BTreeMap<Protocol, LastMinute>,
    /// The outcome of the last reload; empty before the first.
    #[serde(default)]
    pub reload: ReloadStatus,
    /// Live handovers from and to this process.
    #[serde(default)]
    pub handover: HandoverStatus,
    /// What the control core counts about itself, by the names in `/metrics` without their prefix.
    pub control: BTreeMap<String, u64>,
}

/// A reload: settings as `key = value`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ReloadStatus {
    /// Why nothing was changed; `null` if the settings were applied.
    pub refused: Option<String>,
    /// Changed, and in use.
    pub now: Vec<String>,
    /// Changed, but not in use before a restart.
    pub after_restart: Vec<String>,
    /// What deserves a warning in the settings, although they were applied.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Services whose shift it has ended, with the shares that the file gives to their groups.
    #[serde(default)]
    pub shifts_ended: Vec<ShiftEnded>,
}

/// A shift that a reload has ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShiftEnded {
    pub service: String,
    /// As `lb shift` takes them.
    pub shares: String,
}

/// What the process is doing with new users.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    Serving,
    /// Accepts no more users and waits for running sessions.
    Draining,
    Stopping,
}

/// The addresses the doors are bound to; `null` means `off`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Doors {
    pub tcp: Option<SocketAddr>,
    pub udp: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    #[serde(default)]
    pub api_tls: Option<SocketAddr>,
    pub control: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
}

/// Users and sessions, all workers together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SessionTotals {
    /// Sessions running now, of every protocol.
    pub active: u64,
    /// `[limits] sessions`: most sessions of TCP and API users.
    pub limit: u64,
    /// Those of the active ones that are of UDP users.
    #[serde(default)]
    pub udp_active: u64,
    /// `[limits] udp_sessions`: most of these.
    #[serde(default)]
    pub udp_limit: u64,
    pub started: u64,
    pub ended: u64,
    /// Users turned away, for whatever reason.
    pub refused: u64,
    /// Bytes from users to backends, ended sessions included.
    pub bytes_up: u64,
    /// Bytes from backends to users, ended sessions included.
    pub bytes_down: u64,
}

impl SessionTotals {
    /// The sessions of TCP and API users, which `limit` is for.
    pub fn streams(&self) -> u64 {
        self.active.saturating_sub(self.udp_active)
    }
}

/// One service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: String,
    pub protocol: Protocol,
    /// Where its users connect. API services may share a door.
    pub doors: Vec<SocketAddr>,
    /// Whether backends may register themselves.
    pub register: bool,
    /// Whether a reload has removed it: its last sessions have yet to end.
    #[serde(default)]
    pub leaving: bool,
    /// How many of its backends are in each state of [`BackendState::REGISTERED`].
    pub backends: BTreeMap<BackendState, u64>,
    /// Sessions now running on its backends, including those that have left.
    pub sessions_active: u64,
    /// Sessions given to its backends since the start, including those that are long gone. Each request of
    /// an API user counts, and a UDP session once more when it moves to another backend.
    #[serde(default)]
    pub sessions_total: u64,
    /// The terms that differ from the global settings, as `key = value`.
    pub terms: Vec<String>,
    #[serde(default)]
    pub limits: ServiceLimits,
    /// Users turned away at each barrier; for UDP, their datagrams.
    #[serde(default)]
    pub turned_away: BTreeMap<Barrier, u64>,
    /// Its groups, if it has any.
    #[serde(default)]
    pub groups: Vec<GroupStatus>,
}

/// The limits of one service, which are `null` where it has none, and how much of them is used.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ServiceLimits {
    pub sessions: Option<u32>,
    /// Sessions that count towards it.
    pub sessions_used: u64,
    pub backend_sessions: Option<u32>,
    pub backends_max: Option<u32>,
    /// The networks whose users are let in; none: everyone is.
    pub users: Vec<String>,
}

/// One group of a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    pub name: String,
    /// Its part of the users relative to the other groups, as of now.
    pub share: u8,
    /// The same as the file has it. Differs after a shift, until the next reload.
    pub file_share: u8,
    /// Registered backends in it.
    pub backends: u64,
    /// Those that get new sessions while the group has a share.
    pub serving: u64,
}

impl Status {
    /// Whether there are services besides the built-in ones, which are named after their protocol.
    pub fn has_named_services(&self) -> bool {
        self.services.iter().any(|service| service.name != service.protocol.name())
    }
}

/// One backend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackendStatus {
    /// As in the log and in `/sessions`: `b` and a number that is never reused.
    pub id: String,
    /// The name of its service.
    #[serde(default)]
    pub service: String,
    pub protocol: Protocol,
    pub address: SocketAddr,
    pub name: Option<String>,
    /// The group of its service that it has joined.
    #[serde(default)]
    pub group: Option<String>,
    pub weight: u16,
    /// The version of the PROXY header that each connection to it begins with.
    #[serde(default)]
    pub proxy: Option<u8>,
    /// The version of HTTP that it speaks, if it is an API backend.
    #[serde(default)]
    pub http: Option<u8>,
    /// The name or address that its certificate must be for, if it is reached by TLS.
    #[serde(default)]
    pub tls: Option<String>,
    pub state: BackendState,
    /// How often it has a turn in one round of the rotation, and how many turns a round has;
    /// `turns / round` is its share of new sessions.
    pub turns: u32,
    pub round: u32,
    /// Since when, in milliseconds since 1970; `null` once it has left.
    #[serde(default)]
    pub state_since_unix_ms: Option<u64>,
    /// How often that has changed within the last 15 minutes; leaving and joining again count as well.
    #[serde(default)]
    pub state_changes: u32,
    pub registered_unix_ms: u64,
    pub hello: HelloStatus,
    #[serde(default)]
    pub check: CheckStatus,
    #[serde(default)]
    pub drain: DrainStatus,
    /// While draining: how long the remaining sessions still have; `null` also if they end by themselves or none is left.
    pub drains_in_ms: Option<u64>,
    /// Sessions now running on it.
    pub sessions_active: u64,
    pub sessions_total: u64,
    /// Connections to it that were refused or timed out.
    pub connects_failed: u64,
    /// API requests that it did not answer in time.
    #[serde(default)]
    pub unanswered: u64,
    /// How many in a row, as of now; each with no request answered while it waited.
    #[serde(default)]
    pub unanswered_in_row: u32,
    /// Why it is set aside, if it is.
    #[serde(default)]
    pub aside_because: Option<String>,
    /// Datagrams from users dropped because no socket or local port towards it was free.
    #[serde(default)]
    pub turned_away: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
}

impl BackendStatus {
    /// Connections that failed, and requests that were not answered.
    pub fn failures(&self) -> u64 {
        self.connects_failed + self.unanswered
    }

    /// Its service, with its group if it is in one: `shop/green`.
    pub fn membership(&self) -> String {
        let group = self.group.as_ref().map(|group| format!("/{group}"));
        format!("{}{}", self.service, group.unwrap_or_default())
    }
}

/// Whether a backend gets new sessions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    Serving,
    /// Its data port refused a connection, or it left requests unanswered; it returns once that is over.
    Aside,
    /// Its check fails, or has yet to pass for the first time.
    Failing,
    /// It keeps its sessions and gets no new ones.
    Draining,
    /// No longer registered, but some of its sessions are still running.
    Left,
}

impl BackendState {
    /// The states of a registered backend.
    pub const REGISTERED: [BackendState; 4] =
        [BackendState::Serving, BackendState::Aside, BackendState::Failing, BackendState::Draining];

    /// That of a registered backend.
    pub const fn of(standing: Standing) -> BackendState {
        match standing {
            Standing::Serving => BackendState::Serving,
            Standing::Aside => BackendState::Aside,
            Standing::Failing => BackendState::Failing,
            Standing::Draining => BackendState::Draining,
        }
    }

    /// The word in JSON and in metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            BackendState::Serving => "serving",
            BackendState::Aside => "aside",
            BackendState::Failing => "failing",
            BackendState::Draining => "draining",
            BackendState::Left => "left",
        }
    }
}

/// How a backend's control connection answers hellos.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HelloStatus {
    /// When it last answered, in milliseconds since 1970; `null` before the first answer.
    pub answered_unix_ms: Option<u64>,
    /// How long the last answer took.
    pub took_us: Option<u64>,
    /// Unanswered hellos in a row, as of now.
    pub misses: u32,
}

/// How a backend drains. Says nothing of one that does not.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DrainStatus {
    /// Whose request it is, and so who may take it back: `owner` or `operator`; `reload` if its service
    /// has been removed.
    pub by: Option<String>,
    /// Since when, in milliseconds since 1970.
    pub since_unix_ms: Option<u64>,
    /// When the sessions that are left are ended; `null` if they end by themselves.
    pub until_unix_ms: Option<u64>,
    /// Whether no session is left: it waits to be undrained.
    pub empty: bool,
    /// Sessions that were ended at the deadline.
    pub cut: u64,
}

/// How a backend's check goes. All is `null` where backends are not checked, and before the first check
/// has ended.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CheckStatus {
    /// What is checked: `tcp`, or `http:` and a path; `null` if nothing is.
    #[serde(default)]
    pub kind: Option<String>,
    /// What the outcomes so far have come to.
    pub verdict: Option<CheckVerdict>,
    /// Since when, in milliseconds since 1970.
    pub since_unix_ms: Option<u64>,
    /// When the last check ended, and how long it took.
    pub last_unix_ms: Option<u64>,
    pub took_us: Option<u64>,
    /// Why the last check failed; `null` if it passed.
    pub failure: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckVerdict {
    Passing,
    Failing,
}

/// One worker.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub worker: u8,
    /// By the names in `/metrics`, without the `lb_` prefix and `_total`.
    pub counters: BTreeMap<String, u64>,
}

/// How long things took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Timings {
    /// From a user's arrival until a backend was connected.
    pub connect: Percentiles,
    /// Until the first byte came back.
    pub first_byte: Percentiles,
    /// From a session's start to its end.
    pub session_length: Percentiles,
}

/// What the services of one protocol did in the last minute, in whole steps of the history: the newest of them ended
/// up to five seconds ago.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LastMinute {
    /// How long it was; less than a minute after the start, and more if a step was late.
    pub took_ms: u64,
    /// Users that were given a backend; `null` for API services.
    pub new: Option<u64>,
    /// `null` for others than API services, as are `errors`.
    pub requests: Option<u64>,
    /// Requests answered with 5xx, or cut short.
    pub errors: Option<u64>,
    pub refused: u64,
    /// Until the first byte came back.
    pub first_byte: Quantiles,
}

/// The percentiles of [`Percentiles`] alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Quantiles {
    pub count: u64,
    pub p50_us: Option<u64>,
    pub p90_us: Option<u64>,
    pub p99_us: Option<u64>,
}

impl From<Percentiles> for Quantiles {
    fn from(brief: Percentiles) -> Quantiles {
        let Percentiles { count, p50_us, p90_us, p99_us, .. } = brief;
        Quantiles { count, p50_us, p90_us, p99_us }
    }
}

/// A histogram in brief. Each percentile is the upper bound of the bucket it falls into, in
/// microseconds, and `null` if nothing was counted or if it exceeds every bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Percentiles {
    pub count: u64,
    pub sum_us: u64,
    pub p50_us: Option<u64>,
    pub p90_us: Option<u64>,
    pub p99_us: Option<u64>,
}

/// `GET /sessions`: a page of the session table.
///
/// The query narrows it: `service` (a name), `protocol` (`tcp`, `udp`, `api`), `backend` (an id, or an address with
/// port), `client` (an address, or a network such as `10.1.0.0/16`), `worker`, `age_ms` (minimum
/// age), `limit` (1 to [`PAGE_MAX`], default [`PAGE_DEFAULT`]) and `after` (the `next` of the
/// previous page).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SessionsPage {
    pub schema: u32,
    pub sessions: Vec<SessionStatus>,
    /// Where the next page begins; `null` if this one reached the end of the table.
    pub next: Option<String>,
}

/// Sessions on a page unless the query says otherwise.
pub const PAGE_DEFAULT: usize = 1000;
/// Most sessions on a page.
pub const PAGE_MAX: usize = 100_000;

/// One session.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SessionStatus {
    /// As in the log: `worker-place-generation`.
    pub id: String,
    /// The name of its service.
    #[serde(default)]
    pub service: String,
    pub protocol: Protocol,
    pub client: SocketAddr,
    /// Whether its user speaks TLS with us.
    #[serde(default)]
    pub tls: bool,
    /// The backend's id; `null` until one has been chosen.
    pub backend: Option<String>,
    pub backend_address: Option<SocketAddr>,
    pub worker: u8,
    pub started_unix_ms: u64,
    pub age_ms: u64,
    /// How long ago bytes last moved.
    pub idle_ms: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
}

impl SessionStatus {
    /// What its user speaks, such as `tcp`, or `api+tls`.
    pub fn spoken(&self) -> String {
        let tls = if self.tls { "+tls" } else { "" };
        format!("{}{tls}", self.protocol.name())
    }
}

#[cfg(test)]
impl SessionStatus {
    /// A session that has just begun.
    pub fn example(id: &str, service: &str) -> SessionStatus {
        SessionStatus {
            id: id.to_owned(),
            service: service.to_owned(),
            protocol: Protocol::Tcp,
            client: ([192, 0, 2, 1], 7).into(),
            tls: false,
            backend: None,
            backend_address: None,
            worker: 0,
            started_unix_ms: 0,
            age_ms: 0,
            idle_ms: 0,
            bytes_up: 0,
            bytes_down: 0,
        }
    }
}

/// The admin door's answer to a change it made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Changed {
    pub schema: u32,
    /// Sessions running on the changed backend or service; 1 for a session being ended.
    pub sessions: u64,
    /// The changed backend, as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendStatus>,
    /// After a shift: the groups of the service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupStatus>,
}

/// The admin door's answer to a request it cannot serve.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// One sentence: what was wrong with the request.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_ignores_unknown_fields() {
        let text = r#"{"answered_unix_ms":7,"took_us":null,"misses":1,"mood":"fine"}"#;
        let read: HelloStatus = serde_json::from_str(text).unwrap();
        assert_eq!(read, HelloStatus { answered_unix_ms: Some(7), took_us: None, misses: 1 });
    }

    #[test]
    fn states_and_protocols_are_lower_case_words() {
        for state in [
            BackendState::Serving,
            BackendState::Aside,
            BackendState::Failing,
            BackendState::Draining,
        ] {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{}\"", state.name()));
        }
        assert_eq!(serde_json::to_string(&RunState::Draining).unwrap(), r#""draining""#);
    }
}
