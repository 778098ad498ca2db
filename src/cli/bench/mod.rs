//! `lb bench`: the load generator from the command line. Owns its flags, the live line and the exit
//! code: 0 if everything expected was met, 1 if not or if the figures mean nothing, 2 if it could not
//! run or nobody answered.

mod own;
mod tls;

use std::io::{IsTerminal, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use nix::errno::Errno;

use own::Own;

use super::{Failure, duration, print, protocol};
use crate::base::thread;
use crate::boot::capacity;
use crate::cluster::Protocol;
use crate::load::expect::Expectation;
use crate::load::message::Kind;
use crate::load::plot::{self, Curve};
use crate::load::report::{self, Report};
use crate::load::web::{Payload, Request};
use crate::load::{self, Load, Outcome, Progress, Shape, echo, process, units};
use crate::tls::client::{Alpn, Terms};
use crate::tls::demo::Made;

/// How often the live line is rewritten.
const LIVE: Duration = Duration::from_millis(500);

/// Measure a balancer or a backend, and check every reply.
///
/// The exit code is 0 if the run was measured and everything expected with --expect was met, 1 if
/// something expected was not met or the run is INVALID, so that its figures mean nothing, and 2 if
/// nothing was measured: faulty flags, too few descriptors, nobody there, or nobody who answered.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: Run,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Serve echo backends, to be measured from elsewhere.
    Serve(Serve),
    /// Draw the latencies of runs written with --json into one picture.
    Plot(Plot),
}

#[derive(Args, Debug)]
struct Serve {
    /// What to serve.
    #[arg(long, default_value = "tcp", value_parser = protocol())]
    protocol: Protocol,
    /// Where, once for each backend.
    #[arg(long, value_name = "ADDR", required = true)]
    listen: Vec<SocketAddr>,
    /// Take and answer datagrams together where the kernel hands them over as one.
    #[arg(long)]
    gso: bool,
}

#[derive(Args, Debug)]
struct Plot {
    /// Runs, each a curve.
    #[arg(value_name = "FILE.json", required = true)]
    runs: Vec<PathBuf>,
    /// The picture.
    #[arg(long, short, value_name = "FILE.svg")]
    output: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Direction {
    /// From the backend to the user.
    Down,
    /// From the user to the backend.
    Up,
    /// Both at once.
    Both,
}

#[derive(Args, Debug)]
struct Run {
    /// The kind of user to be.
    #[arg(long, default_value = "tcp", value_parser = protocol())]
    protocol: Protocol,
    /// What to measure. Without it a balancer and echo backends are started for the test, and the
    /// path through the balancer is compared with the direct one.
    #[arg(long, value_name = "ADDR")]
    to: Option<String>,
    /// Echo backends behind the balancer that is started.
    #[arg(long, value_name = "N", default_value_t = 2, conflicts_with = "to",
          value_parser = clap::value_parser!(u8).range(1..=64))]
    backends: u8,
    /// Connections, or flows of datagrams.
    #[arg(long, value_name = "N", default_value_t = 64)]
    connections: usize,
    /// Requests per second on a schedule; latency then counts from when a request was due. Without
    /// it every connection sends its next request as soon as it has the reply.
    #[arg(long, value_name = "R")]
    rate: Option<u64>,
    /// How long to measure: 10s, 500ms, 2m.
    #[arg(long, value_name = "T", default_value = "10s", value_parser = duration)]
    duration: Duration,
    /// How long to run before that.
    #[arg(long, value_name = "T", default_value = "1s", value_parser = duration)]
    warmup: Duration,
    /// Bytes of a message.
    #[arg(long, value_name = "B", default_value_t = 64)]
    size: usize,
    /// Threads of the generator.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Datagrams in flight per flow.
    #[arg(long, value_name = "N", default_value_t = 1)]
    window: usize,
    /// Send a flow's datagrams together, for the kernel to cut (UDP_SEGMENT), and take replies
    /// together (UDP_GRO). Use with a window.
    #[arg(long)]
    gso: bool,
    /// How long a reply may take before it counts as lost.
    #[arg(long, value_name = "T", default_value = "2s", value_parser = duration)]
    timeout: Duration,
    /// A connection for every request (TCP and API).
    #[arg(long, conflicts_with = "bulk")]
    churn: bool,
    /// Content without end, checked by its position; needs backends of `lb bench serve`, except
    /// `both`, for which any echo will do (TCP).
    #[arg(long, value_enum, value_name = "DIRECTION", num_args = 0..=1, default_missing_value = "down")]
    bulk: Option<Direction>,
    #[command(flatten)]
    tls: tls::Flags,
    /// Speak HTTP/2 as an API user: in the clear by prior knowledge, under --tls by ALPN.
    #[arg(long, requires = "to")]
    http2: bool,
    /// Requests in flight on each connection of HTTP/2, or as many as the server permits if those are
    /// fewer. With 1, connections are as busy as those of HTTP/1.1.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "http2")]
    streams: usize,
    /// The path that API users ask for.
    #[arg(long, value_name = "PATH", default_value = "/")]
    path: String,
    /// The method of their requests.
    #[arg(long, value_name = "METHOD", default_value = "GET")]
    method: String,
    /// A header line of their requests, such as 'accept: text/plain'.
    #[arg(long, value_name = "LINE")]
    header: Vec<String>,
    /// A file to send with every request.
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,
    /// Bytes to send with every request, which echo backends of `lb bench serve` check.
    #[arg(long, value_name = "B", conflicts_with = "body")]
    body_bytes: Option<usize>,
    /// Process whose CPU time is measured: the balancer's, if it cannot be found by its port.
    #[arg(long, value_name = "PID")]
    watch: Option<u32>,
    /// Write the run, with its whole histogram, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the latency distribution for HdrHistogram's plotters.
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,
    /// Draw the latency percentiles as SVG.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// What the run must show, such as 'p99<2ms', 'errors=0', 'sticky=100%' or 'spread<=1'.
    #[arg(long, value_name = "EXPR")]
    expect: Vec<Expectation>,
    /// Print nothing but what went wrong.
    #[arg(long, short)]
    quiet: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    match arguments.action {
        Some(Action::Serve(serve)) => serve_echo(&serve),
        Some(Action::Plot(plot)) => draw(&plot),
        None => measure(&arguments.run),
    }
}

fn serve_echo(serve: &Serve) -> Result<ExitCode, Failure> {
    let backends = echo::start(serve.protocol, &serve.listen, serve.gso)
        .map_err(|error| format!("cannot serve on {:?}: {error}", serve.listen))?;
    for address in backends.addresses() {
        print(&format!("{} echo on {address}\n", serve.protocol))?;
    }
    backends.wait();
    Ok(ExitCode::SUCCESS)
}

/// Draws what earlier runs wrote.
fn draw(plot: &Plot) -> Result<ExitCode, Failure> {
    let mut curves = Vec::new();
    for path in &plot.runs {
        let said = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| said(&error))?;
        let report: Report = serde_json::from_str(&text)
            .map_err(|error| said(&format!("not written by `lb bench --json`: {error}")))?;
        let latency = report.histogram.histogram().map_err(|error| said(&error))?;
        let name = path.file_stem().map_or_else(String::new, |stem| stem.display().to_string());
        curves.push(Curve { label: format!("{name} ({})", report.label), latency });
    }
    write(&plot.output, &plot::svg(&curves)?)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(run: &Run) -> Result<ExitCode, Failure> {
    match &run.to {
        Some(to) => measure_one(run, to),
        None => measure_own(run),
    }
}

/// Measures what is already running.
fn measure_one(run: &Run, to: &str) -> Result<ExitCode, Failure> {
    let terms = run.tls.terms(to, run.alpn())?;
    let mut load = run.load(resolve(to)?, terms)?;
    load.watch = run.watch.or_else(|| process::listener(load.protocol, load.to));
    afford(load.descriptors())?;
    let outcome = watched(&load, run.quiet, to)?;
    let report = Report::new(to, &load, &outcome);
    run.answered(&load, &report, &outcome)?;
    run.write_files(&[(&report, &outcome)])?;
    if !run.quiet {
        print(&report::table(std::slice::from_ref(&report)))?;
        print(&format!("\n{}", report::drawing(&outcome.tally.latency)))?;
        for note in [report.http2_note(), report.tls_note(), report.loop_note()] {
            print(&note.map_or_else(String::new, |note| format!("\n{note}\n")))?;
        }
    }
    run.verdict(&[(&report, &outcome)])
}

/// Measures a balancer started for the purpose, and the direct path without it.
fn measure_own(run: &Run) -> Result<ExitCode, Failure> {
    let backends = usize::from(run.backends);
    let certificate = run.tls.is_on().then(Made::new).transpose();
    let certificate = certificate.map_err(|error| format!("no certificate: {error}"))?;
    let files = certificate.as_ref().map(|made| &made.files);
    let terms = files.map(|files| run.tls.own_terms(files, run.alpn()));
    // Faulty flags are told before anything is started; the address is not known yet.
    let load = run.load(SocketAddr::from(([127, 0, 0, 1], 0)), terms.transpose()?.flatten())?;
    afford(load.descriptors() + Own::descriptors(run.protocol, backends, run.connections))?;
    Own::fits(run.protocol, backends, run.connections)?;
    let own = Own::start(run.protocol, backends, run.gso, files)?;
    let balanced = Load { to: own.door(), watch: Some(own.pid()), ..load };
    // Backends speak in the clear.
    let direct = Load { to: own.backend(), watch: run.watch, tls: None, ..balanced.clone() };
    let direct_outcome = watched(&direct, run.quiet, "direct")?;
    let direct_report = Report::new("direct", &direct, &direct_outcome);
    run.answered(&direct, &direct_report, &direct_outcome)?;
    let outcome = watched(&balanced, run.quiet, "balanced")?;
    let report = Report::new("balanced", &balanced, &outcome);
    drop(own);
    run.answered(&balanced, &report, &outcome)?;
    run.write_files(&[(&report, &outcome), (&direct_report, &direct_outcome)])?;
    if !run.quiet {
        print(&report::table(&[direct_report.clone(), report.clone()]))?;
        print(&format!("\n{}", report::drawing(&outcome.tally.latency)))?;
        print(&format!("\n{}\n", report::difference(&direct_report, &report)))?;
        print(&report.tls_note().map_or_else(String::new, |note| format!("{note}\n")))?;
        print(&report.loop_note().map_or_else(String::new, |note| format!("{note}\n")))?;
    }
    run.verdict(&[(&report, &outcome), (&direct_report, &direct_outcome)])
}

impl Run {
    fn load(&self, to: SocketAddr, tls: Option<Terms>) -> Result<Load, String> {
        let load = Load {
            protocol: self.protocol,
            to,
            shape: match (self.churn, self.bulk) {
                (true, _) => Shape::Churn,
                (_, None) => Shape::PingPong,
                (_, Some(Direction::Down)) => Shape::Bulk(Kind::Source),
                (_, Some(Direction::Up)) => Shape::Bulk(Kind::Sink),
                (_, Some(Direction::Both)) => Shape::Bulk(Kind::Echo),
            },
            connections: self.connections,
            size: self.size,
            window: self.window,
            gso: self.gso,
            rate: self.rate,
            warmup: self.warmup,
            duration: self.duration,
            threads: self.threads,
            patience: self.timeout,
            request: self.request()?,
            streams: self.http2.then_some(self.streams),
            tls,
            watch: self.watch,
        };
        load.check()?;
        self.expect.iter().try_for_each(|expectation| expectation.check(&load))?;
        Ok(load)
    }

    /// What is said of it under TLS.
    fn alpn(&self) -> Option<Alpn> {
        let spoken = if self.http2 { Alpn::Http2 } else { Alpn::Http1 };
        (self.protocol == Protocol::Api).then_some(spoken)
    }

    /// Refuses a run that nobody answered. Only its JSON is written, for what reads that: it has no
    /// latency to draw.
    fn answered(&self, load: &Load, report: &Report, outcome: &Outcome) -> Result<(), Failure> {
        let Some(silence) = load::silence(load, &outcome.tally) else { return Ok(()) };
        if let Some(path) = &self.json {
            write(path, &serde_json::to_string_pretty(report)?)?;
        }
        Err(silence.into())
    }

    /// The HTTP request to make.
    fn request(&self) -> Result<Option<Arc<Request>>, String> {
        if self.protocol != Protocol::Api {
            return Ok(None);
        }
        let payload = match (&self.body, self.body_bytes) {
            (Some(path), _) => Payload::Bytes(
                std::fs::read(path)
                    .map_err(|error| format!("cannot read {}: {error}", path.display()))?,
            ),
            (None, Some(count)) if count > 0 => Payload::Content(count),
            _ => Payload::None,
        };
        let host = self.tls.name().or(self.to.as_deref()).unwrap_or("localhost");
        let mut header = self.header.clone();
        if self.churn && !self.http2 {
            header.push("connection: close".to_owned());
        }
        let request = Request::new(&self.method, &self.path, host, &header, payload)?;
        Ok(Some(Arc::new(request)))
    }

    /// Writes the files asked for. The first run is the one that counts; a picture shows all runs.
    fn write_files(&self, runs: &[(&Report, &Outcome)]) -> Result<(), Failure> {
        let Some((report, outcome)) = runs.first() else { return Ok(()) };
        if let Some(path) = &self.json {
            write(path, &serde_json::to_string_pretty(report)?)?;
        }
        if let Some(path) = &self.hgrm {
            write(path, &report::hgrm(&outcome.tally.latency))?;
        }
        if let Some(path) = &self.plot {
            let curve = |(report, outcome): &(&Report, &Outcome)| Curve {
                label: report.label.clone(),
                latency: outcome.tally.latency.clone(),
            };
            write(path, &plot::svg(&runs.iter().map(curve).collect::<Vec<_>>())?)?;
        }
        Ok(())
    }

    /// Judges the runs. The first is the one expected to show something, but an invalid one beside it
    /// spoils the comparison.
    fn verdict(&self, runs: &[(&Report, &Outcome)]) -> Result<ExitCode, Failure> {
        let Some((_, outcome)) = runs.first() else { return Ok(ExitCode::SUCCESS) };
        let mut met = true;
        for (report, outcome) in runs {
            if let Some(reason) = &outcome.invalid {
                eprintln!("INVALID: {}: {reason}", report.label);
                met = false;
            }
        }
        for expectation in &self.expect {
            let verdict = expectation.judge(&outcome.tally, self.duration.as_secs_f64());
            met &= verdict.met;
            if !verdict.met || !self.quiet {
                print(&format!("{verdict}\n"))?;
            }
        }
        Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Runs a load and shows its progress.
fn watched(load: &Load, quiet: bool, label: &str) -> Result<Outcome, String> {
    let progress = Arc::new(Progress::default());
    let (done, finished) = sync_channel(1);
    let (work, shown) = (load.clone(), Arc::clone(&progress));
    let thread = thread::spawn("load", move || {
        let _ = done.send(load::run(&work, &shown));
    })
    .map_err(|error| format!("cannot start a thread: {error}"))?;
    let live = !quiet && std::io::stderr().is_terminal();
    let mut seen = 0;
    let outcome = loop {
        match finished.recv_timeout(LIVE) {
            Ok(outcome) => break outcome,
            Err(RecvTimeoutError::Timeout) if live => seen = show(&progress, seen, label),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err("the load ended early".to_owned()),
        }
    };
    if live {
        eprint!("\r\x1b[K");
    }
    let _ = thread.join();
    outcome.map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE) => format!(
            "no descriptor is left for {} connections: {error}; raise the limit (`ulimit -Hn`) or \
             ask for fewer with --connections",
            load.connections
        ),
        Some(Errno::ENOMEM) => format!(
            "no memory may be locked for the generator: {error}; raise the limit (`ulimit -Hl`) or \
             ask for fewer --connections or --threads"
        ),
        Some(Errno::EPERM | Errno::ENOSYS | Errno::EACCES) => {
            format!("io_uring cannot be used: {error}; `lb check` says why")
        }
        Some(_) => format!("cannot load {}: {error}; does something listen there?", load.to),
        None => format!("cannot load {}: {error}", load.to),
    })
}

/// Whether this process may open that many descriptors. Raises its limit as far as the system lets
/// it.
fn afford(descriptors: u64) -> Result<(), String> {
    let allowed = capacity::raise_descriptors();
    if descriptors <= allowed {
        return Ok(());
    }
    Err(format!(
        "the run needs {descriptors} descriptors and may open {allowed}; raise the limit \
         (`ulimit -Hn`) or ask for fewer with --connections"
    ))
}

fn show(progress: &Progress, seen: u64, label: &str) -> u64 {
    let requests = progress.requests.load(Ordering::Relaxed);
    let rate = (requests - seen) as f64 / LIVE.as_secs_f64();
    let bytes = units::bytes(progress.bytes.load(Ordering::Relaxed) as f64);
    let errors = progress.errors.load(Ordering::Relaxed);
    let rate = units::rate(rate);
    eprint!("\r\x1b[K{label}: {rate}, {bytes}, {errors} errors");
    let _ = std::io::stderr().flush();
    requests
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

fn resolve(address: &str) -> Result<SocketAddr, String> {
    address
        .to_socket_addrs()
        .map_err(|error| format!("`{address}` is not an address with a port: {error}"))?
        .next()
        .ok_or_else(|| format!("`{address}` has no address"))
}
