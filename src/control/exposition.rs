//! `/metrics`: the counters in the format Prometheus reads (text format 0.0.4). Owns the names, which
//! follow its conventions: an `lb_` prefix, base units, `_total` for what only grows. The values come
//! from the workers and the control core; nothing is kept here.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use super::certificates::authorities;
use super::cluster_status::ClusterStatus;
use super::hub::Hub;
use super::services::tallies;
use super::status::{BackendState, RunState};
use super::view;
use super::workers::Timing;
use crate::cluster::{Backend, Barrier, Protocol, Service};
use crate::metrics::{BOUNDS_US, BUCKETS, BackendCounters, ControlCounters, Kind, WorkerCounters};

/// The media type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

type Labels<'a> = &'a [(&'a str, &'a dyn Display)];

/// The workers' histograms: the name of each, its help text, and which it is.
const TIMINGS: [(&str, &str, Timing); 3] = [
    ("connect_seconds", "From a user's arrival until a backend was connected.", Timing::Connect),
    (
        "first_byte_seconds",
        "From a user's arrival until the first byte came back.",
        Timing::FirstByte,
    ),
    ("session_seconds", "From a session's start to its end.", Timing::SessionLength),
];

/// A value of a cluster: its name, its kind, its help text, and where to find it.
type OfCluster = (&'static str, Kind, &'static str, fn(&ClusterStatus) -> u64);

const CLUSTER: [OfCluster; 9] = [
    ("store_live", Kind::Gauge, "1 while the cluster's store is heard, else 0.", |it| {
        u64::from(it.store == "live")
    }),
    ("present", Kind::Gauge, "1 while the others can see that this balancer is there.", |it| {
        u64::from(it.present)
    }),
    ("nodes", Kind::Gauge, "Balancers of the cluster that are there, with this one.", |it| {
        it.nodes.iter().filter(|node| node.state != "gone").count() as u64
    }),
    (
        "unwritten",
        Kind::Gauge,
        "Backends of this balancer that the others have yet to hear of.",
        |it| it.unwritten as u64,
    ),
    (
        "orphans",
        Kind::Gauge,
        "What others have said that the store has lost, and that still holds.",
        |it| it.orphans as u64,
    ),
    ("left_out", Kind::Gauge, "Backends of other balancers that are not served here.", |it| {
        it.left_out.len() as u64
    }),
    ("rejected", Kind::Counter, "Values that no balancer of the cluster can have written.", |it| {
        it.rejected
    }),
    ("lost", Kind::Counter, "Connections to the cluster's store that were lost.", |it| it.lost),
    ("relisted", Kind::Counter, "Times that what was known here was not what was there.", |it| {
        it.relisted
    }),
];

/// How often the balancer was handed over while it ran.
fn handovers(hub: &Hub, text: &mut Text) {
    let handover = &hub.handover;
    let help = "Handovers from one process to the next since the last restart.";
    let name = text.family("", "handovers", Kind::Counter, help);
    text.sample(&name, &[], handover.generation);
    let name = "lb_handovers_failed_total";
    text.head(name, "counter", "Handovers that came to nothing, by the step at which they failed.");
    for (step, count) in &handover.failures {
        text.sample(name, &[("step", step)], *count);
    }
    let name = "lb_handover_stall_seconds";
    text.head(name, "gauge", "For how long nobody was served in the handover to this process.");
    if let Some(taken) = &handover.taken {
        text.sample(name, &[], taken.stall_us as f64 / 1e6);
    }
}

/// What a member of a cluster knows of it. A balancer that is in none has no samples.
fn cluster(hub: &Hub, text: &mut Text) {
    let known = view::cluster(hub);
    for (name, kind, help, of) in CLUSTER {
        let name = text.family("cluster_", name, kind, help);
        known.iter().for_each(|known| text.sample(&name, &[], of(known)));
    }
}

/// When each certificate ends.
fn certificates(hub: &Hub, text: &mut Text) {
    let name = "lb_tls_certificate_not_after_timestamp_seconds";
    text.head(name, "gauge", "When a certificate ends, in seconds since 1970.");
    for identity in hub.snapshot.tls.agreed.iter().flat_map(|agreed| agreed.identities.iter()) {
        let (file, host) = (identity.files.certificate.display(), identity.names.first());
        let host = host.map_or("", String::as_str);
        text.sample(name, &[("file", &file), ("host", &host)], identity.not_after);
    }
}

/// When each list of what was revoked of users' certificates is out of date. Several policies may have it.
fn lists(hub: &Hub, text: &mut Text) {
    let name = "lb_tls_crl_next_update_timestamp_seconds";
    let help = "When a newer list of revoked certificates is due, in seconds since 1970.";
    text.head(name, "gauge", help);
    let lists = authorities(&hub.snapshot).iter().flat_map(|it| &it.lists);
    let due: BTreeMap<_, _> = lists.filter_map(|it| Some((&it.file, it.next_update?))).collect();
    for (file, due) in due {
        text.sample(name, &[("file", &file.display())], due);
    }
}

/// All metrics, as text.
pub fn text(hub: &Hub) -> String {
    let mut text = Text::default();
    about(hub, &mut text);
    for (row, about) in WorkerCounters::ROWS.iter().enumerate() {
        let name = text.family("", about.name, about.kind, about.help);
        for (worker, values) in hub.workers.counters() {
            text.sample(&name, &[("worker", &worker)], values[row]);
        }
    }
    for (name, help, timing) in TIMINGS {
        text.head(&format!("lb_{name}"), "histogram", help);
        for (worker, counts, sum_us) in hub.workers.histograms(timing) {
            text.histogram(&format!("lb_{name}"), worker, counts, sum_us);
        }
    }
    handovers(hub, &mut text);
    cluster(hub, &mut text);
    certificates(hub, &mut text);
    lists(hub, &mut text);
    services(hub, &mut text);
    limits(hub, &mut text);
    backends(hub, &mut text);
    for (about, value) in ControlCounters::ROWS.iter().zip(hub.counters.values()) {
        let name = text.family("control_", about.name, about.kind, about.help);
        text.sample(&name, &[], value);
    }
    text.0
}

fn about(hub: &Hub, text: &mut Text) {
    let version = env!("CARGO_PKG_VERSION");
    let name = text.family("", "build_info", Kind::Gauge, "Always 1; the version is a label.");
    text.sample(&name, &[("version", &version)], 1);
    let help = "When the control core started, in seconds since 1970.";
    let name = text.family("", "start_time_seconds", Kind::Gauge, help);
    text.sample(&name, &[], hub.started.unix_ms() as f64 / 1e3);
    let help = "1 while new users are served, 0 while the balancer stops.";
    let name = text.family("", "serving", Kind::Gauge, help);
    let serving = view::run_state(hub) == RunState::Serving;
    text.sample(&name, &[], u8::from(serving));
    let help = "Most sessions of TCP and API users at once.";
    let name = text.family("", "sessions_limit", Kind::Gauge, help);
    text.sample(&name, &[], hub.config.limits.sessions);
    let help = "Sessions of UDP users running now, which `lb_sessions_active` counts too.";
    let name = text.family("", "udp_sessions_active", Kind::Gauge, help);
    text.sample(&name, &[], view::udp_sessions(hub));
    let name =
        text.family("", "udp_sessions_limit", Kind::Gauge, "Most sessions of UDP users at once.");
    text.sample(&name, &[], hub.config.limits.udp_sessions);
    let name = text.family("", "backends", Kind::Gauge, "Registered backends.");
    for protocol in Protocol::ALL {
        let count = hub.snapshot.of(protocol).count();
        text.sample(&name, &[("protocol", &protocol)], count);
    }
}

fn services(hub: &Hub, text: &mut Text) {
    let tallies = tallies(hub);
    let tally = |service: &Service| tallies.get(&service.id).copied().unwrap_or_default();
    let help =
        "Registered backends of this service in this state: serving, aside, failing or draining.";
    let name = text.family("service_", "backends", Kind::Gauge, help);
    for service in hub.registry.known() {
        for (state, count) in tally(service).by_state() {
            let (of, protocol, state) = (&service.name, &service.kind, &state.name());
            let labels: Labels<'_> = &[("service", of), ("protocol", protocol), ("state", state)];
            text.sample(&name, labels, count);
        }
    }
    let help = "Share of new users of a service's group relative to its other groups.";
    let name = text.family("service_", "group_share", Kind::Gauge, help);
    for service in hub.registry.known() {
        for group in service.groups.iter() {
            let labels: Labels<'_> = &[("service", &service.name), ("group", &group.name)];
            text.sample(&name, labels, group.share);
        }
    }
    let help = "Sessions running on the backends of this service now.";
    let name = text.family("service_", "sessions_active", Kind::Gauge, help);
    for service in hub.registry.known() {
        let labels: Labels<'_> = &[("service", &service.name), ("protocol", &service.kind)];
        text.sample(&name, labels, tally(service).sessions);
    }
    let help = "Sessions given to the backends of this service, including those that have left; for API, requests.";
    let name = text.family("service_", "sessions", Kind::Counter, help);
    // One that leaves is told until it is gone, unless one that came later has its name and so its labels.
    let labels = |service: &Service| (service.name.to_string(), service.kind.name());
    let newest: BTreeMap<_, _> = hub.registry.services().map(|it| (labels(it), it.id)).collect();
    for service in hub.registry.services().filter(|it| newest[&labels(it)] == it.id) {
        let labels: Labels<'_> = &[("service", &service.name), ("protocol", &service.kind)];
        text.sample(&name, labels, tally(service).given.sessions);
    }
}

/// The limits of services. Where a service has none of its own there is nothing to tell.
fn limits(hub: &Hub, text: &mut Text) {
    let help = "Most sessions that this service may have at once.";
    let name = text.family("service_", "sessions_limit", Kind::Gauge, help);
    for service in hub.registry.known() {
        if let Some(limit) = service.terms.limits.sessions {
            let labels: Labels<'_> = &[("service", &service.name), ("protocol", &service.kind)];
            text.sample(&name, labels, limit);
        }
    }
    let help = "Users of this service turned away, or requests, or datagrams that began no session, by the key \
        that kept them out: users, sessions or backend_sessions.";
    let name = text.family("service_", "turned_away", Kind::Counter, help);
    for service in hub.registry.known() {
        for barrier in Barrier::ALL {
            let (count, reason) = (service.gate.turned_away(barrier), &barrier);
            if count > 0 || service.has(barrier) {
                let (of, protocol) = (&service.name, &service.kind);
                let labels: Labels<'_> =
                    &[("service", of), ("protocol", protocol), ("reason", reason)];
                text.sample(&name, labels, count);
            }
        }
    }
}

/// The name of a row of the backends' table in the exposition.
fn backend_row(name: &'static str) -> &'static str {
    match name {
        "active" => "sessions_active",
        "total" => "sessions",
        "connect_failed" => "connects_failed",
        "connect_without_port" => "connects_without_port",
        "up" => "bytes_up",
        "down" => "bytes_down",
        other => other,
    }
}

fn backends(hub: &Hub, text: &mut Text) {
    let counted: Vec<_> = (hub.registry.entries().map(|entry| &entry.backend))
        .map(|backend| (Labelled::new(hub, backend), hub.workers.backend(backend.slot)))
        .collect();
    for (row, about) in BackendCounters::ROWS.iter().enumerate() {
        let name = text.family("backend_", backend_row(about.name), about.kind, about.help);
        for (backend, values) in &counted {
            text.of_backend(&name, backend, None, values[row]);
        }
    }
    let help = "Share of new sessions relative to the others of its service.";
    let name = text.family("backend_", "weight", Kind::Gauge, help);
    for (backend, _) in &counted {
        text.of_backend(&name, backend, None, backend.backend.weight.into());
    }
    let help = "1 for the state the backend is in: serving, aside, failing or draining.";
    let name = text.family("backend_", "state", Kind::Gauge, help);
    for (backend, _) in &counted {
        let state = BackendState::of(backend.backend.standing).name();
        text.of_backend(&name, backend, Some(state), 1);
    }
}

/// A backend with what its samples are labelled with, which is written once for all of them.
struct Labelled<'h> {
    backend: &'h Backend,
    labels: String,
}

impl Labelled<'_> {
    fn new<'h>(hub: &'h Hub, backend: &'h Backend) -> Labelled<'h> {
        let service = hub.registry.service(backend.service);
        let given = backend.name.as_deref().unwrap_or("");
        let mut labels = Text::default();
        labels.labels(&[
            ("backend", &backend.id),
            ("service", &service.name),
            ("protocol", &service.kind),
            ("address", &backend.address),
            ("name", &given),
        ]);
        // Prometheus takes an empty label for none.
        if let Some(group) = &backend.group {
            labels.0.push(',');
            labels.labels(&[("group", group)]);
        }
        Labelled { backend, labels: labels.0 }
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    /// Begins a family and returns its full name.
    fn family(&mut self, prefix: &str, name: &str, kind: Kind, help: &str) -> String {
        let (kind, end) = match kind {
            Kind::Counter => ("counter", "_total"),
            Kind::Gauge => ("gauge", ""),
        };
        let name = format!("lb_{prefix}{name}{end}");
        self.head(&name, kind, help);
        name
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        self.0.write_fmt(line).expect("memory takes every write");
        self.0.push('\n');
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.0.push_str(name);
        if !labels.is_empty() {
            self.0.push('{');
            self.labels(labels);
            self.0.push('}');
        }
        self.line(format_args!(" {value}"));
    }

    fn labels(&mut self, labels: Labels<'_>) {
        for (place, (label, content)) in labels.iter().enumerate() {
            let separator = if place == 0 { "" } else { "," };
            let content = escaped(&content.to_string());
            write!(self.0, "{separator}{label}=\"{content}\"").expect("memory takes every write");
        }
    }

    fn of_backend(&mut self, name: &str, backend: &Labelled, state: Option<&str>, value: u64) {
        for part in [name, "{", &backend.labels] {
            self.0.push_str(part);
        }
        match state {
            None => self.line(format_args!("}} {value}")),
            Some(state) => self.line(format_args!(",state=\"{state}\"}} {value}")),
        }
    }

    /// In the exposition, buckets are cumulative and the last one holds everything; our own are not.
    fn histogram(&mut self, name: &str, worker: u8, counts: [u64; BUCKETS], sum_us: u64) {
        let bucket = format!("{name}_bucket");
        let mut so_far = 0u64;
        for (place, count) in counts.into_iter().enumerate() {
            so_far += count;
            let bound = BOUNDS_US.get(place).map(|us| (*us as f64 / 1e6).to_string());
            let bound = bound.unwrap_or("+Inf".to_owned());
            self.sample(&bucket, &[("worker", &worker), ("le", &bound)], so_far);
        }
        let sum = sum_us as f64 / 1e6;
        self.sample(&format!("{name}_sum"), &[("worker", &worker)], sum);
        self.sample(&format!("{name}_count"), &[("worker", &worker)], so_far);
    }
}

fn escaped(content: &str) -> String {
    content.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::Histogram;

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_everything() {
        let histogram = Histogram::default();
        for us in [10, 60, 70, 4_000_000_000] {
            histogram.record(Duration::from_micros(us));
        }
        let mut text = Text::default();
        text.histogram("lb_x_seconds", 3, histogram.counts(), histogram.sum_us());
        let lines: Vec<_> = text.0.lines().collect();
        assert_eq!(lines[0], r#"lb_x_seconds_bucket{worker="3",le="0.00005"} 1"#);
        assert_eq!(lines[1], r#"lb_x_seconds_bucket{worker="3",le="0.0001"} 3"#);
        assert_eq!(lines[23], r#"lb_x_seconds_bucket{worker="3",le="3600"} 3"#);
        assert_eq!(lines[24], r#"lb_x_seconds_bucket{worker="3",le="+Inf"} 4"#);
        assert_eq!(lines[25], r#"lb_x_seconds_sum{worker="3"} 4000.00014"#);
        assert_eq!(lines[26], r#"lb_x_seconds_count{worker="3"} 4"#);
    }

    #[test]
    fn the_value_of_a_label_cannot_end_it() {
        let mut text = Text::default();
        text.sample("lb_x", &[("name", &"a\"b\\c\nd")], 1);
        assert_eq!(text.0, "lb_x{name=\"a\\\"b\\\\c\\nd\"} 1\n");
    }
}
