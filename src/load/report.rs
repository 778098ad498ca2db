//! A run as others read it: JSON for machines, a table and a drawing for people, `.hgrm` for the
//! usual plotters. Owns the names in the JSON; only formats, measures nothing.

mod notes;
mod tls;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

use super::tally::RequestFailure;
use super::{Load, Outcome, Shape, units};
pub use tls::Tls;

/// One run, complete: everything that the table, the checks and the plot need.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What made it, with its version.
    pub tool: String,
    /// Its name in a plot.
    pub label: String,
    pub protocol: String,
    pub shape: String,
    pub to: String,
    pub connections: usize,
    pub size_bytes: usize,
    pub window: usize,
    /// Datagrams were sent and received several as one.
    pub gso: bool,
    /// The most requests in flight on a connection of HTTP/2, and at most how many the server permitted;
    /// `null` if none was spoken.
    pub streams: Option<usize>,
    pub streams_permitted: Option<usize>,
    pub threads: usize,
    /// The planned requests per second; `null` in a closed loop.
    pub rate_planned: Option<u64>,
    /// Length of the measured window in seconds.
    pub seconds: f64,
    pub requests: u64,
    pub requests_per_second: f64,
    /// Payload bytes within the measured window.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub latency_us: Option<Latency>,
    /// How late the generator was by its own schedule.
    pub lag_us: Option<Latency>,
    /// Planned requests for which no connection was free by the end.
    pub unsent: u64,
    pub errors_total: u64,
    /// By kind; kinds that did not occur are omitted.
    pub errors: BTreeMap<String, u64>,
    /// By the names that the backends give themselves.
    pub backends: BTreeMap<String, Backend>,
    pub sticky_percent: Option<f64>,
    pub spread: Option<u64>,
    /// `null` without TLS.
    pub tls: Option<Tls>,
    /// CPU time within the measured window.
    pub balancer_cpu_ns: Option<u64>,
    pub generator_cpu_ns: Option<u64>,
    pub valid: bool,
    pub invalid_reason: Option<String>,
    pub histogram: Encoded,
}

/// In microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub min: f64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p99_9: f64,
    pub max: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    pub sessions: u64,
    pub requests: u64,
}

/// A whole HdrHistogram of latencies in nanoseconds, in its interchange format: V2, compressed,
/// base64.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Encoded {
    pub unit: String,
    pub format: String,
    pub data: String,
}

impl Encoded {
    fn of(histogram: &Histogram<u64>) -> Encoded {
        let mut bytes = Vec::new();
        V2DeflateSerializer::new()
            .serialize(histogram, &mut bytes)
            .expect("a histogram is written to memory");
        Encoded {
            unit: "ns".to_owned(),
            format: "HdrHistogram V2 compressed".to_owned(),
            data: BASE64.encode(bytes),
        }
    }

    /// Decodes the histogram. The error says what is wrong with the text.
    pub fn histogram(&self) -> Result<Histogram<u64>, String> {
        let bytes = BASE64.decode(&self.data).map_err(|error| error.to_string())?;
        Deserializer::new()
            .deserialize(&mut io::Cursor::new(bytes))
            .map_err(|error| error.to_string())
    }
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Option<Latency> {
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let at = |share| micros(histogram.value_at_quantile(share));
        (!histogram.is_empty()).then(|| Latency {
            min: micros(histogram.min()),
            mean: histogram.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: micros(histogram.max()),
        })
    }
}

impl Report {
    pub fn new(label: &str, load: &Load, outcome: &Outcome) -> Report {
        let tally = &outcome.tally;
        let seconds = load.duration.as_secs_f64();
        let nanos = |time: Option<Duration>| time.map(|time| time.as_nanos() as u64);
        Report {
            tool: concat!("lb bench ", env!("CARGO_PKG_VERSION")).to_owned(),
            label: label.to_owned(),
            protocol: load.protocol.to_string(),
            shape: shape(load.shape).to_owned(),
            to: load.to.to_string(),
            connections: load.connections,
            size_bytes: load.request_bytes(),
            window: load.window,
            gso: load.gso,
            streams: load.streams,
            streams_permitted: tally.streams_permitted,
            threads: load.threads,
            rate_planned: load.rate,
            seconds,
            requests: tally.requests,
            requests_per_second: per_second(tally.requests as f64, seconds),
            bytes_sent: tally.bytes_sent,
            bytes_received: tally.bytes_received,
            latency_us: Latency::of(&tally.latency),
            lag_us: Latency::of(&tally.lag),
            unsent: tally.unsent,
            errors_total: tally.errors(),
            errors: RequestFailure::ALL
                .into_iter()
                .map(|fault| (fault.name().to_owned(), tally.faults[fault as usize]))
                .filter(|(_, count)| *count > 0)
                .collect(),
            backends: tally
                .backends
                .iter()
                .map(|(number, share)| {
                    let backend = Backend { sessions: share.sessions, requests: share.requests };
                    (format!(":{number}"), backend)
                })
                .collect(),
            sticky_percent: tally.sticky_percent(),
            spread: tally.spread(),
            tls: load.tls.as_ref().map(|_| Tls::new(&tally.handshakes, seconds)),
            balancer_cpu_ns: nanos(outcome.watched_cpu),
            generator_cpu_ns: nanos(outcome.own_cpu),
            valid: outcome.invalid.is_none(),
            invalid_reason: outcome.invalid.clone(),
            histogram: Encoded::of(&tally.latency),
        }
    }

    /// Payload bytes both ways.
    fn bytes(&self) -> f64 {
        self.bytes_sent as f64 + self.bytes_received as f64
    }

    fn throughput(&self) -> String {
        units::throughput(per_second(self.bytes(), self.seconds))
    }

    /// Whether the run moved endless content, so that bytes count and not requests.
    pub fn is_bulk(&self) -> bool {
        self.shape.starts_with("bulk")
    }
}

/// Nothing comes of a window without a length.
fn per_second(amount: f64, seconds: f64) -> f64 {
    if seconds > 0.0 { amount / seconds } else { 0.0 }
}

fn shape(shape: Shape) -> &'static str {
    use super::message::Kind;
    match shape {
        Shape::PingPong => "ping-pong",
        Shape::Churn => "churn",
        Shape::Bulk(Kind::Source) => "bulk down",
        Shape::Bulk(Kind::Sink) => "bulk up",
        Shape::Bulk(Kind::Echo) => "bulk both",
    }
}

/// Several runs side by side, one per column.
pub fn table(reports: &[Report]) -> String {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let mut row = |name: &str, cell: &dyn Fn(&Report) -> String| {
        rows.push((name.to_owned(), reports.iter().map(cell).collect()));
    };
    row("", &|report| report.label.clone());
    if reports.iter().any(|report| !report.is_bulk()) {
        row("requests", &|report| format!("{}", report.requests));
        row("rate", &|report| units::rate(report.requests_per_second));
    }
    row("throughput", &Report::throughput);
    let latency = |of: fn(&Latency) -> f64| {
        move |report: &Report| report.latency_us.map_or_else(dash, |l| micros(of(&l)))
    };
    if reports.iter().any(|report| report.latency_us.is_some()) {
        row("p50", &latency(|l| l.p50));
        row("p90", &latency(|l| l.p90));
        row("p99", &latency(|l| l.p99));
        row("p99.9", &latency(|l| l.p99_9));
        row("max", &latency(|l| l.max));
    }
    if reports.iter().any(|report| report.lag_us.is_some()) {
        row("own lag p99", &|report| report.lag_us.map_or_else(dash, |l| micros(l.p99)));
    }
    if reports.iter().any(|report| report.tls.is_some()) {
        handshakes(&mut row);
    }
    row("errors", &errors);
    if reports.iter().any(|report| !report.backends.is_empty()) {
        row("backends", &|report| format!("{}", report.backends.len()));
        row("spread", &|report| report.spread.map_or_else(dash, |spread| spread.to_string()));
        row("sticky", &|report| report.sticky_percent.map_or_else(dash, units::percent));
    }
    row("balancer CPU", &|report| cpu(report, report.balancer_cpu_ns));
    row("generator CPU", &|report| cpu(report, report.generator_cpu_ns));
    align(&rows)
}

/// Adds a row: its name, and the cell of each report.
type Row<'a> = dyn FnMut(&str, &dyn Fn(&Report) -> String) + 'a;

fn handshakes(row: &mut Row<'_>) {
    let of = |report: &Report, cell: &dyn Fn(&Tls) -> String| {
        report.tls.as_ref().map_or_else(dash, cell)
    };
    let latency = |of: fn(&Latency) -> f64| {
        move |tls: &Tls| tls.latency_us.map_or_else(dash, |l| micros(of(&l)))
    };
    row("handshakes", &|report| of(report, &Tls::counts));
    row("their rate", &|report| of(report, &|tls| units::rate(tls.handshakes_per_second)));
    row("their p50", &|report| of(report, &latency(|l| l.p50)));
    row("their p99", &|report| of(report, &latency(|l| l.p99)));
}

/// The difference between two runs of the same load in one sentence.
pub fn difference(direct: &Report, balanced: &Report) -> String {
    let who = match balanced.tls {
        Some(_) => "The balancer and TLS add",
        None => "The balancer adds",
    };
    let mut text = match (direct.latency_us, balanced.latency_us) {
        (Some(direct), Some(balanced)) => format!(
            "{who} {} at p50, {} at p99 and {} at p99.9",
            added(balanced.p50 - direct.p50),
            added(balanced.p99 - direct.p99),
            added(balanced.p99_9 - direct.p99_9)
        ),
        _ => format!(
            "Through the balancer go {}, directly {}",
            balanced.throughput(),
            direct.throughput()
        ),
    };
    if balanced.balancer_cpu_ns.is_some() {
        let _ = write!(text, "; it takes {} of a core", cpu(balanced, balanced.balancer_cpu_ns));
    }
    text.push('.');
    text
}

/// What the balancer adds, in microseconds. Less than nothing is noise, not a gain.
fn added(by: f64) -> String {
    if by > 0.0 { micros(by) } else { "nothing measurable".to_owned() }
}

fn errors(report: &Report) -> String {
    if report.errors_total == 0 {
        return "0".to_owned();
    }
    let kinds: Vec<String> =
        report.errors.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    format!("{} ({})", report.errors_total, kinds.join(", "))
}

/// CPU per unit of work and as a share of one core.
fn cpu(report: &Report, nanos: Option<u64>) -> String {
    let Some(nanos) = nanos else { return dash() };
    let share = per_second(nanos as f64 / 1e7, report.seconds);
    let (amount, unit) = match report.is_bulk() {
        true => (report.bytes() / 1e9, "GB"),
        false => (report.requests as f64, "request"),
    };
    if amount == 0.0 {
        return format!("{share:.0} %");
    }
    format!("{}/{unit}, {share:.0} %", units::time(nanos as f64 / amount))
}

fn dash() -> String {
    "-".to_owned()
}

fn micros(micros: f64) -> String {
    units::time(micros * 1e3)
}

fn align(rows: &[(String, Vec<String>)]) -> String {
    let name_width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let columns = rows.first().map_or(0, |(_, cells)| cells.len());
    let widths: Vec<usize> = (0..columns)
        .map(|at| rows.iter().map(|(_, cells)| cells[at].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for (name, cells) in rows {
        let _ = write!(text, "  {name:name_width$}");
        for (cell, width) in cells.iter().zip(&widths) {
            let _ = write!(text, "  {cell:>width$}");
        }
        text.push('\n');
    }
    text
}

/// Limit on the rows of a drawing.
const DRAWING_ROWS: usize = 18;
const DRAWING_WIDTH: usize = 50;

/// The latencies as bars, with limits in a geometric series, so that body and tail both show.
pub fn drawing(histogram: &Histogram<u64>) -> String {
    if histogram.is_empty() {
        return String::new();
    }
    let (least, most) = (histogram.min().max(1) as f64, histogram.max().max(2) as f64);
    let step = (most / least).powf(1.0 / DRAWING_ROWS as f64).max(1.05);
    let mut rows: Vec<(f64, u64)> = vec![(least * step, 0)];
    for recorded in histogram.iter_recorded() {
        while rows.last().is_some_and(|(upto, _)| recorded.value_iterated_to() as f64 > *upto) {
            let upto = rows.last().map_or(most, |(upto, _)| upto * step);
            rows.push((upto, 0));
        }
        if let Some((_, count)) = rows.last_mut() {
            *count += recorded.count_since_last_iteration();
        }
    }
    let longest = rows.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    let mut text = String::new();
    for (upto, count) in rows {
        let width = (count as f64 / longest as f64 * DRAWING_WIDTH as f64).ceil() as usize;
        let share = count as f64 * 100.0 / histogram.len() as f64;
        let bar = "#".repeat(width);
        let _ = writeln!(text, "  <={:>8}  {bar:DRAWING_WIDTH$} {share:6.2} %", units::time(upto));
    }
    text
}

/// The percentile distribution in the text form of HdrHistogram's tools, in microseconds.
pub fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut text = format!(
        "{:>12} {:>14} {:>10} {:>14}\n\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    );
    let mut total = 0;
    for step in histogram.iter_quantiles(5) {
        total += step.count_since_last_iteration();
        let share = step.quantile_iterated_to();
        let value = step.value_iterated_to() as f64 / 1e3;
        let _ = write!(text, "{value:>12.3} {share:>14.12} {total:>10}");
        let _ = if share < 1.0 {
            writeln!(text, " {:>14.2}", 1.0 / (1.0 - share))
        } else {
            writeln!(text)
        };
    }
    let _ = writeln!(
        text,
        "#[Mean    = {:>12.3}, StdDeviation   = {:>12.3}]",
        histogram.mean() / 1e3,
        histogram.stdev() / 1e3
    );
    let _ = writeln!(
        text,
        "#[Max     = {:>12.3}, Total count    = {:>12}]",
        histogram.max() as f64 / 1e3,
        histogram.len()
    );
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cluster::Protocol;
    use crate::load::tally::{Home, Tally};

    pub fn load() -> Load {
        Load {
            protocol: Protocol::Tcp,
            to: ([127, 0, 0, 1], 8081).into(),
            shape: Shape::PingPong,
            connections: 64,
            size: 64,
            window: 1,
            gso: false,
            rate: None,
            warmup: Duration::ZERO,
            duration: Duration::from_secs(2),
            threads: 1,
            patience: Duration::from_secs(1),
            request: None,
            streams: None,
            tls: None,
            watch: None,
        }
    }

    pub fn report(label: &str, scale: u64) -> Report {
        let mut tally = Tally::new();
        for micros in 1..=1000 {
            tally.answered(Duration::from_micros(micros * scale));
        }
        tally.fault(RequestFailure::Moved);
        tally.bytes_sent = 64_000;
        tally.bytes_received = 64_000;
        Home::default().answered_by(9_101, &mut tally);
        let outcome = Outcome {
            tally,
            watched_cpu: Some(Duration::from_millis(10)),
            own_cpu: None,
            invalid: None,
        };
        Report::new(label, &load(), &outcome)
    }

    #[test]
    fn a_report_survives_json_with_its_whole_histogram() {
        let text = serde_json::to_string(&report("direct", 1)).unwrap();
        let again: Report = serde_json::from_str(&text).unwrap();
        let histogram = again.histogram.histogram().unwrap();
        assert_eq!(histogram.len(), 1000);
        assert_eq!(Latency::of(&histogram), again.latency_us);
        assert!(
            again.histogram.data.starts_with("HISTFAAA"),
            "as HdrHistogram's own tools write it"
        );
    }

    #[test]
    fn the_json_has_the_names_that_scripts_rely_on() {
        let json = serde_json::to_value(report("direct", 1)).unwrap();
        assert_eq!(json["requests"], 1000);
        assert_eq!(json["requests_per_second"], 500.0);
        assert_eq!(json["errors"]["moved"], 1);
        assert_eq!(json["errors_total"], 1);
        assert_eq!(json["backends"][":9101"]["sessions"], 1);
        assert_eq!(json["balancer_cpu_ns"], 10_000_000);
        assert_eq!(json["generator_cpu_ns"], serde_json::Value::Null);
        assert_eq!(json["valid"], true);
        assert!((json["latency_us"]["p99_9"].as_f64().unwrap() - 999.0).abs() < 2.0);
    }

    #[test]
    fn the_table_puts_runs_side_by_side() {
        let text = table(&[report("direct", 1), report("balanced", 20)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("direct") && lines[0].ends_with("balanced"), "{text}");
        let row = |name: &str| *lines.iter().find(|line| line.trim().starts_with(name)).unwrap();
        assert!(row("p99 ").contains("991 us") || row("p99 ").contains("990 us"), "{text}");
        assert!(row("p99 ").contains("19.8 ms"), "{text}");
        assert!(row("errors").contains("1 (moved 1)"), "{text}");
        assert!(row("balancer CPU").contains("10 us/request, 0 %"), "{text}");
        let width = lines[0].chars().count();
        assert!(lines.iter().all(|line| line.chars().count() == width), "{text}");
    }

    #[test]
    fn the_difference_is_one_sentence() {
        let text = difference(&report("direct", 1), &report("balanced", 3));
        assert!(text.starts_with("The balancer adds 1 ms at p50, "), "{text}");
        assert!(text.ends_with("; it takes 10 us/request, 0 % of a core."), "{text}");
    }

    #[test]
    fn what_the_balancer_adds_is_never_negative() {
        let text = difference(&report("direct", 3), &report("balanced", 1));
        let nothing = "nothing measurable";
        let told = format!("adds {nothing} at p50, {nothing} at p99 and {nothing} at p99.9; it");
        assert!(text.contains(&told), "{text}");
    }

    #[test]
    fn a_run_without_a_reply_has_no_figure_that_is_none() {
        let (mut ping_pong, mut bulk) = (load(), load());
        (ping_pong.duration, bulk.duration) = (Duration::ZERO, Duration::ZERO);
        bulk.shape = Shape::Bulk(crate::load::message::Kind::Echo);
        for load in [ping_pong, bulk] {
            let cpu = Some(Duration::from_millis(10));
            let outcome =
                Outcome { tally: Tally::new(), watched_cpu: cpu, own_cpu: cpu, invalid: None };
            let report = Report::new("", &load, &outcome);
            let json = serde_json::to_value(&report).unwrap();
            assert_eq!(json["requests_per_second"], 0.0);
            let text = table(std::slice::from_ref(&report)) + &difference(&report, &report);
            for word in ["inf", "NaN", "-0"] {
                assert!(!text.contains(word), "{text}");
            }
        }
    }

    #[test]
    fn the_drawing_shows_every_request_once() {
        let histogram = report("", 1).histogram.histogram().unwrap();
        let text = drawing(&histogram);
        let shares: f64 = text
            .lines()
            .map(|line| {
                line.trim_end_matches(" %").rsplit(' ').next().unwrap().parse::<f64>().unwrap()
            })
            .sum();
        assert!((shares - 100.0).abs() < 0.2, "{shares}\n{text}");
        assert!(text.lines().count() <= DRAWING_ROWS + 1);
        assert_eq!(drawing(&Histogram::new(3).unwrap()), "");
    }

    #[test]
    fn the_distribution_ends_with_every_request() {
        let text = hgrm(&report("", 1).histogram.histogram().unwrap());
        assert!(text.contains("       Value     Percentile TotalCount 1/(1-Percentile)"), "{text}");
        let last = text.lines().rfind(|line| !line.starts_with('#')).unwrap();
        let cells: Vec<&str> = last.split_whitespace().collect();
        assert_eq!(&cells[1..], ["1.000000000000", "1000"]);
        assert!(text.contains("Total count    =         1000]"), "{text}");
    }

    #[test]
    fn damaged_histograms_are_refused_in_words() {
        for data in ["!", "", "SElTVEZBQUE="] {
            let encoded = Encoded { unit: String::new(), format: String::new(), data: data.into() };
            assert!(encoded.histogram().is_err(), "{data:?}");
        }
    }
}
