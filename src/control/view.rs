//! The state of the balancer as the admin door shows it. Owns the translation of the hub's state into
//! the schema of `status`; changes nothing.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use super::certificates;
use super::checks::Verdict;
use super::cluster_status::{ClusterStatus, LeftOut, NodeStatus};
use super::drain::{Drain, Stop};
use super::history::{Minute, bucket_at};
use super::hub::checking::Checked;
use super::hub::{Hub, Member};
use super::services::{doors, takes_registrations, tallies};
use super::status::{
    BackendState, BackendStatus, CheckStatus, CheckVerdict, Doors, DrainStatus, GroupStatus,
    HelloStatus, LastMinute, Percentiles, RunState, SCHEMA, ServiceLimits, ServiceStatus,
    SessionTotals, Status, Timings, WorkerStatus,
};
use super::workers::{Timing, WorkerValues, value};
use crate::base::time::Now;
use crate::cluster::groups::place_of;
use crate::cluster::registry::{DrainedBy, Registered};
use crate::cluster::share::value::NodeReport;
use crate::cluster::{
    AskedCheck, Backend, BackendId, Barrier, HashBy, Limits, OnBackendLoss, Policy, Protocol,
    Service, Standing, Terms,
};
use crate::config::Config;
use crate::config::services::{CheckKind, SERVICE_KEYS, ServiceConfig};
use crate::config::units::{SIZES, TIMES};
use crate::metrics::{BOUNDS_US, ControlCounters, Row, WorkerCounters};

/// The whole balancer at one moment.
pub fn status(hub: &Hub, doors: Doors, now: Now) -> Status {
    Status {
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        state: run_state(hub),
        started_unix_ms: hub.started.unix_ms(),
        uptime_ms: ms(now.since(hub.started)),
        stops_in_ms: hub.stop_until.map(|until| ms(until.since(now))),
        doors,
        policy: policy(hub.config.balance.policy).to_owned(),
        drain_ms: Some(ms(hub.config.balance.drain)),
        snapshot: hub.snapshot.version,
        sessions: sessions(hub),
        services: services(hub),
        backends: backends(hub, now),
        workers: workers(hub),
        timings: timings(hub),
        certificates: certificates::all(&hub.snapshot, now),
        cluster: cluster(hub),
        derived: hub.derived.clone(),
        last_minute: Protocol::ALL.into_iter().map(|it| (it, last_minute(hub, it))).collect(),
        reload: hub.reload.clone(),
        handover: hub.handover.clone(),
        control: named(ControlCounters::ROWS, &hub.counters.values()),
    }
}

/// The cluster of this balancer; `None`: it is in none.
pub fn cluster(hub: &Hub) -> Option<ClusterStatus> {
    let sharing = hub.sharing.as_ref()?;
    let (share, summary) = (&sharing.share, sharing.share.summary());
    let own = share.reported().cloned().unwrap_or_default();
    let here = NodeStatus {
        backends: share.said(),
        ..cluster_node(share.me().as_str(), &own, &own, true)
    };
    let others = share.peers().map(|(id, peer)| NodeStatus {
        backends: share.claims_of(id),
        ..cluster_node(id.as_str(), &peer.report, &own, peer.is_stored)
    });
    let left_out = sharing.left_out();
    Some(ClusterStatus {
        name: sharing.cluster.clone(),
        node: share.me().to_string(),
        store: summary.phase.name().to_owned(),
        trouble: summary.trouble,
        revision: summary.revision,
        present: summary.is_present,
        unwritten: summary.unwritten,
        orphans: summary.orphans,
        rejected: summary.rejected,
        lost: summary.lost,
        relisted: summary.relisted,
        left_out: left_out
            .map(|(place, why)| LeftOut { backend: place.to_string(), why: why.to_owned() })
            .collect(),
        nodes: [here].into_iter().chain(others).collect(),
    })
}

fn cluster_node(id: &str, report: &NodeReport, own: &NodeReport, is_there: bool) -> NodeStatus {
    NodeStatus {
        id: id.to_owned(),
        state: if is_there { report.state.clone() } else { "gone".to_owned() },
        backends: 0,
        sessions: report.sessions,
        version: report.version.clone(),
        // Who is gone chooses nobody.
        chooses_alike: !is_there || report.algo == own.algo && report.tables == own.tables,
        control: report.control.clone(),
    }
}

/// Whether new users are served.
pub fn run_state(hub: &Hub) -> RunState {
    match hub.stop {
        Stop::Serving => RunState::Serving,
        Stop::Draining { .. } => RunState::Draining,
        Stop::Stopping { .. } => RunState::Stopping,
    }
}

/// The name of a policy, as in the configuration.
pub fn policy(policy: Policy) -> &'static str {
    match policy {
        Policy::RoundRobin => "round_robin",
        Policy::LeastSessions => "least_sessions",
        Policy::TwoChoices => "p2c",
        Policy::SourceHash => "source_hash",
    }
}

fn sessions(hub: &Hub) -> SessionTotals {
    SessionTotals {
        active: hub.workers.sessions(),
        limit: hub.config.limits.sessions as u64,
        udp_active: udp_sessions(hub),
        udp_limit: hub.config.limits.udp_sessions as u64,
        started: hub.workers.sum(|it| it.sessions_started.get()),
        ended: hub.workers.sum(|it| it.sessions_ended.get()),
        refused: hub.workers.sum(refused),
        bytes_up: hub.workers.sum(|it| it.bytes_up.get()),
        bytes_down: hub.workers.sum(|it| it.bytes_down.get()),
    }
}

/// Users turned away, for whatever reason.
pub fn refused(counters: &WorkerCounters) -> u64 {
    counters.users_refused_no_backend.get()
        + counters.users_refused_full.get()
        + counters.users_refused_barred.get()
        + counters.users_refused_unreachable.get()
        + counters.users_refused_exhausted.get()
        + counters.users_refused_no_proxy_header.get()
        + counters.users_refused_proxy_header.get()
}

/// The sessions of UDP users, in all services together.
pub fn udp_sessions(hub: &Hub) -> u64 {
    let udp = hub.registry.services().filter(|service| service.kind == Protocol::Udp);
    udp.map(|service| service.gate.sessions() as u64).sum()
}

fn services(hub: &Hub) -> Vec<ServiceStatus> {
    let (tallies, global) = (tallies(hub), hub.config.terms());
    let shown = |service: &Service| {
        let tally = tallies.get(&service.id).copied().unwrap_or_default();
        let fallback = service.terms.fallback.and_then(|id| hub.snapshot.service(id));
        let fallback = fallback.map(|it| format!("fallback = \"{}\"", it.name));
        ServiceStatus {
            name: service.name.to_string(),
            protocol: service.kind,
            doors: doors(&hub.config, service),
            register: takes_registrations(&hub.config, service),
            leaving: hub.is_leaving(service.id),
            backends: tally.by_state().collect(),
            sessions_active: tally.sessions,
            sessions_total: tally.given.sessions,
            limits: limits(service),
            turned_away: Barrier::ALL.map(|it| (it, service.gate.turned_away(it))).into(),
            terms: (terms(service, &global).into_iter())
                .chain(fallback)
                .chain(set_in_file(&hub.config, service))
                .collect(),
            groups: groups(hub, service),
        }
    };
    hub.registry.services().map(shown).collect()
}

fn limits(service: &Service) -> ServiceLimits {
    let Limits { sessions, backend_sessions, backends } = service.terms.limits;
    ServiceLimits {
        sessions,
        sessions_used: service.gate.sessions() as u64,
        backend_sessions,
        backends_max: backends,
        users: service.users.iter().map(ToString::to_string).collect(),
    }
}

fn terms(service: &Service, global: &Terms) -> Vec<String> {
    let mut terms = differing(&service.terms, global);
    if !service.users.is_empty() {
        let users: Vec<String> = service.users.iter().map(|it| format!("\"{it}\"")).collect();
        terms.push(format!("users = [{}]", users.join(", ")));
    }
    terms
}

/// How the backends of a service are tried and checked, as far as its table says anything about that.
fn set_in_file(config: &Config, service: &Service) -> Vec<String> {
    let default = ServiceConfig::new(&service.name, service.kind);
    let is_said = |it: &&ServiceConfig| (it.probe, &it.check) != (default.probe, &default.check);
    let Some(table) = config.service(service.id).filter(is_said) else { return Vec::new() };
    let keys = SERVICE_KEYS.iter().filter(|key| key.section == "check" || key.name == "probe");
    let said = keys.map(|key| (key, key.show(table))).filter(|(key, it)| *it != key.show(&default));
    said.map(|(key, value)| format!("{} = {value}", key.path())).collect()
}

/// The groups of a service with their backends.
pub fn groups(hub: &Hub, service: &Service) -> Vec<GroupStatus> {
    let mut shown: Vec<GroupStatus> = (service.groups.iter())
        .map(|group| GroupStatus {
            name: group.name.to_string(),
            share: group.share,
            file_share: hub.share_in_file(service, &group.name).unwrap_or(group.share),
            backends: 0,
            serving: 0,
        })
        .collect();
    if shown.is_empty() {
        return shown;
    }
    for backend in hub.registry.of_service(service.id).map(|entry| &entry.backend) {
        if let Some(place) = place_of(&service.groups, backend) {
            shown[place].backends += 1;
            shown[place].serving += u64::from(backend.standing == Standing::Serving);
        }
    }
    shown
}

/// The terms that are not the global ones, as `key = value`.
fn differing(own: &Terms, global: &Terms) -> Vec<String> {
    let shown = |terms: &Terms| {
        let Terms { policy: by, hash, on_backend_loss, timeouts, responses, requests, .. } = terms;
        let Terms { maintenance, limits, proxies, .. } = terms;
        let hashed = match hash {
            HashBy::Address => "address",
            HashBy::AddressPort => "address_port",
        };
        let loss = match on_backend_loss {
            OnBackendLoss::Keep => "keep",
            OnBackendLoss::Close => "close",
        };
        [
            format!("policy = \"{}\"", policy(*by)),
            format!("hash = \"{hashed}\""),
            format!("on_backend_loss = \"{loss}\""),
            format!("connect_ms = {}", TIMES.show(ms(timeouts.connect))),
            format!("tcp_idle_ms = {}", TIMES.show(ms(timeouts.tcp_idle))),
            format!("half_close_ms = {}", TIMES.show(ms(timeouts.half_close))),
            format!("udp_idle_ms = {}", TIMES.show(ms(timeouts.udp_idle))),
            format!("responses = {}", responses.map_or(0, NonZeroU32::get)),
            format!("answer_ms = {}", TIMES.show(ms(requests.answer))),
            format!("body_ms = {}", TIMES.show(ms(requests.body))),
            format!("body_bytes = {}", SIZES.show(unlimited_as_zero(requests.body_bytes))),
            format!("retries = {}", requests.retries),
            format!("tunnel_idle_ms = {}", TIMES.show(ms(requests.tunnel_idle))),
            format!("maintenance = {maintenance}"),
            format!("backends_max = {}", limits.backends.unwrap_or(0)),
            format!("sessions = {}", limits.sessions.unwrap_or(0)),
            format!("backend_sessions = {}", limits.backend_sessions.unwrap_or(0)),
            format!("proxy_from = [{}]", proxies.as_ref().map_or(String::new(), |it| it.shown())),
        ]
    };
    let both = shown(own).into_iter().zip(shown(global));
    both.filter(|(own, global)| own != global).map(|(own, _)| own).collect()
}

fn backends(hub: &Hub, now: Now) -> Vec<BackendStatus> {
    // A backend that has just joined is in the registry at once, and in the rotation a moment later.
    let mut turns: BTreeMap<BackendId, (u64, u64)> = BTreeMap::new();
    for pool in hub.snapshot.services.iter().map(|service| &service.pool) {
        turns.extend(pool.turns().map(|(backend, turns, round)| (backend.id, (turns, round))));
    }
    let turns_of = |entry: &Registered| {
        let round = || hub.snapshot.pool(entry.backend.service).map_or(0, |it| it.rotation.round());
        turns.get(&entry.backend.id).copied().unwrap_or_else(|| (0, round()))
    };
    let mut all: Vec<BackendStatus> = (hub.registry.entries())
        .map(|entry| registered(hub, entry, turns_of(entry), now))
        .collect();
    let departed = hub.departed.values().map(|departed| {
        let shown = backend(hub, &departed.backend, BackendState::Left);
        BackendStatus { registered_unix_ms: departed.registered.unix_ms(), ..shown }
    });
    all.extend(departed.filter(|backend| backend.sessions_active > 0));
    all
}

/// One registered backend.
pub fn backend_now(hub: &Hub, id: BackendId, now: Now) -> Option<BackendStatus> {
    let entry = hub.registry.get(id)?;
    let pool = hub.snapshot.pool(entry.backend.service);
    let all = pool.into_iter().flat_map(|pool| pool.turns());
    let own = all.filter(|(backend, ..)| backend.id == id).map(|(_, turns, round)| (turns, round));
    Some(registered(hub, entry, own.last().unwrap_or_default(), now))
}

fn registered(hub: &Hub, entry: &Registered, turns: (u64, u64), now: Now) -> BackendStatus {
    let id = entry.backend.id;
    let [turns, round] = [turns.0, turns.1].map(|it| u32::try_from(it).unwrap_or(u32::MAX));
    let Backend { service, address, .. } = entry.backend;
    let steady = hub.steadiness.of(service, address, now);
    let draining = hub.draining.get(&id);
    BackendStatus {
        state_since_unix_ms: steady.map(|(since, _)| since.unix_ms()),
        state_changes: steady.map_or(0, |(_, changes)| changes),
        turns,
        round,
        registered_unix_ms: entry.since.unix_ms(),
        hello: hub.members.get(&entry.source).map(hello).unwrap_or_default(),
        check: check(hub, &entry.backend),
        drain: draining.map(|it| drain(hub, entry, &it.drain)).unwrap_or_default(),
        drains_in_ms: draining
            .map(|it| &it.drain)
            .filter(|it| !it.is_empty)
            .and_then(|it| it.remaining(now))
            .map(ms),
        unanswered_in_row: hub.unanswered_in_row(id),
        aside_because: hub.aside_because(id).map(str::to_owned),
        ..backend(hub, &entry.backend, BackendState::of(entry.backend.standing))
    }
}

fn backend(hub: &Hub, backend: &Backend, state: BackendState) -> BackendStatus {
    let values = hub.workers.backend(backend.slot);
    let service = hub.registry.service(backend.service);
    BackendStatus {
        id: backend.id.to_string(),
        service: service.name.to_string(),
        protocol: service.kind,
        address: backend.address,
        name: backend.name.as_deref().map(str::to_owned),
        group: backend.group.as_deref().map(str::to_owned),
        weight: backend.weight,
        proxy: backend.proxy.then_some(2),
        http: (service.kind == Protocol::Api).then_some(if backend.http2 { 2 } else { 1 }),
        tls: backend.tls.as_ref().map(|tls| tls.name_for(backend.address.ip())),
        state,
        state_since_unix_ms: None,
        state_changes: 0,
        turns: 0,
        round: 0,
        registered_unix_ms: 0,
        hello: HelloStatus::default(),
        check: CheckStatus::default(),
        drain: DrainStatus::default(),
        drains_in_ms: None,
        sessions_active: value(&values, "active"),
        sessions_total: value(&values, "total"),
        connects_failed: value(&values, "connect_failed"),
        unanswered: value(&values, "unanswered"),
        unanswered_in_row: 0,
        aside_because: None,
        turned_away: value(&values, "turned_away"),
        bytes_up: value(&values, "up"),
        bytes_down: value(&values, "down"),
    }
}

fn drain(hub: &Hub, entry: &Registered, drain: &Drain) -> DrainStatus {
    let by = match entry.drained_by() {
        Some(_) if hub.is_leaving(entry.backend.service) => Some("reload"),
        by => by.map(DrainedBy::name),
    };
    DrainStatus {
        by: by.map(str::to_owned),
        since_unix_ms: Some(drain.since.unix_ms()),
        until_unix_ms: drain.deadline.map(Now::unix_ms),
        empty: drain.is_empty,
        cut: drain.cut,
    }
}

fn hello(member: &Member) -> HelloStatus {
    let took = member.answered.and_then(|(_, took)| took);
    HelloStatus {
        answered_unix_ms: member.answered.map(|(at, _)| at.unix_ms()),
        took_us: took.map(|took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
        misses: member.misses,
    }
}

fn check(hub: &Hub, backend: &Backend) -> CheckStatus {
    let kind = hub.check_of(backend).map(|check| match check.kind {
        CheckKind::Http => format!("http:{}", check.path),
        CheckKind::Grpc => AskedCheck::Grpc(check.grpc_service.into()).to_string(),
        _ => "tcp".to_owned(),
    });
    let outcomes = hub.check_result(backend.id).map(outcomes).unwrap_or_default();
    CheckStatus { kind, ..outcomes }
}

fn outcomes(checked: &Checked) -> CheckStatus {
    CheckStatus {
        kind: None,
        verdict: match checked.verdict {
            Verdict::Unproven => None,
            Verdict::Passing => Some(CheckVerdict::Passing),
            Verdict::Failing => Some(CheckVerdict::Failing),
        },
        since_unix_ms: Some(checked.since.unix_ms()),
        last_unix_ms: Some(checked.last.unix_ms()),
        took_us: Some(u64::try_from(checked.took.as_micros()).unwrap_or(u64::MAX)),
        failure: checked.failure.as_deref().map(str::to_owned),
    }
}

fn workers(hub: &Hub) -> Vec<WorkerStatus> {
    let shown = |(worker, values): (u8, WorkerValues)| WorkerStatus {
        worker,
        counters: named(WorkerCounters::ROWS, &values),
    };
    hub.workers.counters().map(shown).collect()
}

fn named(rows: &[Row], values: &[u64]) -> BTreeMap<String, u64> {
    rows.iter().map(|row| row.name.to_owned()).zip(values.iter().copied()).collect()
}

fn timings(hub: &Hub) -> Timings {
    let brief = |(counts, sum_us): (Vec<u64>, u64)| percentiles(&counts, sum_us);
    Timings {
        connect: brief(hub.workers.histogram(Timing::Connect)),
        first_byte: brief(hub.workers.histogram(Timing::FirstByte)),
        session_length: brief(hub.workers.histogram(Timing::SessionLength)),
    }
}

fn last_minute(hub: &Hub, protocol: Protocol) -> LastMinute {
    let Minute { took, sum } = hub.history.minute(protocol);
    let is_api = protocol == Protocol::Api;
    LastMinute {
        took_ms: ms(took),
        new: (!is_api).then_some(sum.new),
        requests: is_api.then_some(sum.requests),
        errors: is_api.then_some(sum.errors),
        refused: sum.refused,
        first_byte: percentiles(&sum.times, 0).into(),
    }
}

fn percentiles(counts: &[u64], sum_us: u64) -> Percentiles {
    let count: u64 = counts.iter().sum();
    let at = |percent: u64| BOUNDS_US.get(bucket_at(counts, percent)?).copied();
    Percentiles { count, sum_us, p50_us: at(50), p90_us: at(90), p99_us: at(99) }
}

/// A limit as it is set, where zero stands for none.
fn unlimited_as_zero(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

/// A duration in whole milliseconds.
pub fn ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_bound_of_the_bucket_that_it_falls_into() {
        let mut counts = vec![0; BOUNDS_US.len() + 1];
        assert_eq!(percentiles(&counts, 0), Percentiles::default());
        counts[0] = 50;
        counts[3] = 49;
        counts[BOUNDS_US.len()] = 1;
        let brief = percentiles(&counts, 9);
        assert_eq!((brief.count, brief.sum_us), (100, 9));
        assert_eq!((brief.p50_us, brief.p90_us, brief.p99_us), (Some(50), Some(500), Some(500)));
        counts[3] = 0;
        counts[BOUNDS_US.len()] = 51;
        assert_eq!(percentiles(&counts, 9).p99_us, None, "longer than every bound");
    }
}
