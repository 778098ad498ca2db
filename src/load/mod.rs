//! The load generator: sends requests to a balancer, or directly to a backend, as fast as it
//! answers or on a schedule, and checks every reply. Owns what a run is, and its threads; each
//! thread drives a ring of its own.
//!
//! | question | place |
//! |---|---|
//! | when is a request due? | [`plan`] |
//! | what is sent, and is this its reply? | [`message`], [`client`], [`web`], [`http2`] |
//! | who connects, sends, receives? | [`driver`], over `connection` |
//! | what came out, and is it good enough? | [`tally`], [`report`], [`expect`], [`plot`], [`units`] |
//! | who answers when nobody else is there? | [`echo`] |

pub mod blocks;
pub mod client;
mod connection;
pub mod driver;
pub mod echo;
pub mod expect;
pub mod handshakes;
pub mod http2;
mod latencies;
pub mod message;
pub mod plan;
pub mod plot;
pub mod process;
pub mod report;
pub mod tally;
pub mod units;
pub mod web;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::Duration;

use crate::base::thread;
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::tls;
use message::{HEAD_BYTES, Kind};
use tally::Tally;

/// Limit on the bytes of requests in flight.
pub const LOAD_BYTES_MAX: usize = 512 << 20;

/// Descriptors beside the threads and their connections: standard streams, files of /proc, a runtime.
const DESCRIPTORS_BESIDE: u64 = 24;
/// A thread's ring, and a file of /proc.
const DESCRIPTORS_PER_THREAD: u64 = 2;

/// What is done on each connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// A request, its reply, the next request.
    PingPong,
    /// A connection for every request.
    Churn,
    /// Endless content.
    Bulk(Kind),
}

/// A run.
#[derive(Clone, Debug)]
pub struct Load {
    pub protocol: Protocol,
    pub to: SocketAddr,
    pub shape: Shape,
    /// Connections or flows, over all threads.
    pub connections: usize,
    /// Bytes of a message.
    pub size: usize,
    /// Limit on the datagrams in flight on a flow.
    pub window: usize,
    /// A flow's datagrams are sent together as one segmented send (UDP_SEGMENT), and received
    /// together.
    pub gso: bool,
    /// Requests per second on a schedule; `None`: each connection asks again as soon as it has its
    /// reply.
    pub rate: Option<u64>,
    pub warmup: Duration,
    pub duration: Duration,
    pub threads: usize,
    /// How long a reply may take.
    pub patience: Duration,
    /// What API users ask for.
    pub request: Option<Arc<web::Request>>,
    /// They ask in HTTP/2, with this many requests in flight on a connection; `None`: in HTTP/1.1.
    pub streams: Option<usize>,
    /// Connections are made under TLS, as agreed here.
    pub tls: Option<tls::client::Terms>,
    /// A process whose CPU time is read at both ends of the measured window.
    pub watch: Option<u32>,
}

/// The results of a run.
pub struct Outcome {
    pub tally: Tally,
    /// CPU time of the watched process within the measured window.
    pub watched_cpu: Option<Duration>,
    /// CPU time of the generator's threads within the measured window.
    pub own_cpu: Option<Duration>,
    /// Why the figures must not be believed; `None` if they may.
    pub invalid: Option<String>,
}

/// What a run shows of itself while it goes on.
#[derive(Default)]
pub struct Progress {
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
    pub errors: AtomicU64,
}

impl Progress {
    fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

/// What the threads of a run share.
struct Shared {
    load: Load,
    progress: Arc<Progress>,
    /// All are connected.
    connected: Barrier,
    start: OnceLock<Now>,
}

impl Load {
    /// Bytes of one request.
    fn request_bytes(&self) -> usize {
        self.request.as_ref().map_or(self.size, |request| request.len())
    }

    /// How many descriptors the run opens at most. In churn, a new connection is opened before the
    /// kernel has closed the last.
    pub fn descriptors(&self) -> u64 {
        let each = if self.shape == Shape::Churn { 2 } else { 1 };
        let threads = DESCRIPTORS_PER_THREAD * self.threads as u64;
        DESCRIPTORS_BESIDE + threads + each * self.connections as u64
    }

    /// What is wrong with the load, in words for the person who asked for it.
    pub fn check(&self) -> Result<(), String> {
        if self.connections == 0 || self.threads == 0 || self.window == 0 {
            return Err("connections, threads and window must be at least 1".to_owned());
        }
        if self.threads > self.connections {
            return Err("more threads than connections; give fewer threads".to_owned());
        }
        if self.duration.is_zero() {
            return Err("a run of 0 s measures nothing; give a longer --duration".to_owned());
        }
        if self.patience.is_zero() {
            return Err("a --timeout of 0 s waits for no reply; give a longer one".to_owned());
        }
        if (self.protocol == Protocol::Api) != self.request.is_some() {
            return Err("an API user needs a request, and nobody else".to_owned());
        }
        if self.size < HEAD_BYTES {
            return Err(format!("a message needs at least {HEAD_BYTES} bytes to say whose it is"));
        }
        if self.protocol == Protocol::Udp && self.size > driver::DATAGRAM_BYTES_MAX {
            let most = driver::DATAGRAM_BYTES_MAX;
            return Err(format!("a datagram has at most {most} bytes here"));
        }
        if self.gso && (self.protocol != Protocol::Udp || self.size > driver::SEGMENT_BYTES_MAX) {
            let most = driver::SEGMENT_BYTES_MAX;
            return Err(format!("segmented sends are for datagrams of at most {most} bytes"));
        }
        if self.connections.saturating_mul(self.bytes_under_way()) > LOAD_BYTES_MAX {
            let many = if self.streams.is_some() { "streams" } else { "window" };
            return Err(format!(
                "connections x {many} x size is more than {} MiB under way; lower one of them",
                LOAD_BYTES_MAX >> 20
            ));
        }
        if self.rate == Some(0) {
            return Err("a rate of 0 asks nothing".to_owned());
        }
        if self.rate.is_some() && matches!(self.shape, Shape::Bulk(_)) {
            return Err("bulk has no schedule; leave out the rate".to_owned());
        }
        if matches!(self.shape, Shape::Bulk(_)) && self.protocol != Protocol::Tcp {
            return Err("bulk is for TCP".to_owned());
        }
        if self.shape == Shape::Churn && self.protocol == Protocol::Udp {
            return Err("churn is for TCP and API".to_owned());
        }
        if self.tls.is_some() && self.protocol == Protocol::Udp {
            return Err("TLS is for TCP and API".to_owned());
        }
        self.check_http2()
    }

    fn check_http2(&self) -> Result<(), String> {
        let Some(streams) = self.streams else { return Ok(()) };
        let Some(request) = &self.request else { return Err("HTTP/2 is for API".to_owned()) };
        if !(1..=http2::STREAMS_MAX).contains(&streams) {
            let most = http2::STREAMS_MAX;
            return Err(format!("a connection has 1 to {most} requests in flight here"));
        }
        if self.shape == Shape::Churn && streams > 1 {
            return Err("churn makes one request on a connection; leave out the streams".to_owned());
        }
        http2::Template::new(request, self.tls.is_some()).map(|_| ())
    }

    /// Bytes that a connection holds at most of the requests in flight on it.
    fn bytes_under_way(&self) -> usize {
        match self.streams {
            None => self.window.saturating_mul(self.request_bytes()),
            Some(streams) => {
                streams.saturating_mul(self.request_bytes().min(http2::STREAM_SEND_BYTES_MAX))
            }
        }
    }
}

/// Runs a load that [`Load::check`] has passed. Fails if there is no ring, nobody to talk to, or no
/// descriptor left.
pub fn run(load: &Load, progress: &Arc<Progress>) -> io::Result<Outcome> {
    let shared = Arc::new(Shared {
        load: load.clone(),
        progress: Arc::clone(progress),
        connected: Barrier::new(load.threads),
        start: OnceLock::new(),
    });
    let threads = (0..load.threads)
        .map(|place| {
            let shared = Arc::clone(&shared);
            thread::spawn(&format!("load-{place}"), move || driver::drive(&shared, place))
        })
        .collect::<io::Result<Vec<_>>>()?;
    let mut parts = Vec::new();
    for thread in threads {
        parts.push(thread.join().map_err(|_| io::Error::other("a load thread ended early"))??);
    }
    Ok(gather(load, parts))
}

fn gather(load: &Load, parts: Vec<driver::Part>) -> Outcome {
    let mut tally = Tally::new();
    let mut own_cpu = Some(Duration::ZERO);
    let mut watched_cpu = None;
    for part in parts {
        tally.merge(&part.tally);
        own_cpu = own_cpu.zip(part.own_cpu).map(|(sum, one)| sum + one);
        watched_cpu = watched_cpu.or(part.watched_cpu);
    }
    let invalid = distrust(load, &tally);
    Outcome { tally, watched_cpu, own_cpu, invalid }
}

/// Why a run has no figures at all, with the cure: nobody answered it.
pub fn silence(load: &Load, tally: &Tally) -> Option<String> {
    let answered = match load.shape {
        Shape::Bulk(Kind::Sink) => !tally.backends.is_empty(),
        Shape::Bulk(_) => tally.bytes_received > 0,
        Shape::PingPong | Shape::Churn => tally.requests > 0,
    };
    (!answered).then(|| {
        let (to, measured) = (load.to, units::time(load.duration.as_nanos() as f64));
        let errors = match tally.errors() {
            0 => "no errors".to_owned(),
            _ => tally.kinds(),
        };
        let why = tally.handshakes.first_failure.as_ref();
        let why = why.map_or_else(String::new, |words| format!(": {words}"));
        format!(
            "not one right reply came from {to} in the {measured} measured ({errors}{why}); check that \
             the service runs there and, if it is a balancer, has backends (`lb status`), or give \
             a longer --duration"
        )
    })
}

/// Why a run's figures must not be believed.
fn distrust(load: &Load, tally: &Tally) -> Option<String> {
    if let Some(silence) = silence(load, tally) {
        return Some(silence);
    }
    let rate = load.rate?;
    let planned = (u128::from(rate) * load.duration.as_millis()).div_ceil(1000);
    if u128::from(tally.unsent) * 100 > planned {
        return Some(format!(
            "{} of {planned} planned requests found no free connection; more connections or a lower rate",
            tally.unsent
        ));
    }
    let lag = Duration::from_nanos(tally.lag.value_at_quantile(0.99));
    (lag > plan::LAG_MAX).then(|| {
        let lag = units::time(lag.as_nanos() as f64);
        format!("the generator itself was late by {lag} (p99); more threads or a lower rate")
    })
}
