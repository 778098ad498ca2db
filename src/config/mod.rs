//! Every setting and every limit, as plain validated values. Owns the defaults; knows neither the
//! command line nor files' syntax (`config::file` reads TOML into this). `keys` is the table of
//! settings, `kinds` how their values are written, `rules` what they must be to each other, `reload`
//! what a reload takes over.

pub mod file;
pub mod keys;
pub mod kinds;
pub mod reload;
pub mod rules;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

/// The whole configuration of `lb serve`.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Config {
    /// Worker threads; `None` takes one less than the cores of the machine, at least one.
    pub workers: Option<usize>,
    pub listen: Listen,
    pub balance: Balance,
    pub health: Health,
    pub timeouts: Timeouts,
    pub limits: Limits,
    pub udp: Udp,
    /// Addresses of this host that datagrams go to backends from; none leaves the choice to the kernel.
    pub udp_local_addresses: Vec<IpAddr>,
    pub api: Api,
    pub control: Control,
    pub admin: Admin,
    pub log: Log,
}

/// The doors; `None` is `off`.
#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    pub tcp: Option<SocketAddr>,
    pub udp: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub control: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
}

impl Default for Listen {
    fn default() -> Listen {
        let anyone = |port| Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
        let loopback = |port| Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        Listen {
            tcp: anyone(8081),
            udp: anyone(8082),
            api: anyone(8083),
            control: loopback(8080),
            admin: loopback(8084),
        }
    }
}

/// How a backend is chosen for a new session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// In turn over all workers together, by weight.
    #[default]
    RoundRobin,
    /// The one with the fewest running sessions for its weight.
    LeastSessions,
    /// By the user's address, so that a user finds the same backend again while it is registered.
    SourceHash,
}

/// What becomes of running TCP sessions when their backend's control connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnBackendLoss {
    /// They go on: their own connections know best whether the service lives.
    #[default]
    Keep,
    /// They are ended.
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Balance {
    pub policy: Policy,
    pub on_backend_loss: OnBackendLoss,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// How often a backend is asked `hello`.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Unanswered hellos in a row after which a backend has left.
    pub misses: u32,
}

impl Default for Health {
    fn default() -> Health {
        Health { interval: Duration::from_secs(5), timeout: Duration::from_secs(2), misses: 3 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A connection to a backend, before another one is tried.
    pub connect: Duration,
    /// A TCP session on which neither side sends anything.
    pub tcp_idle: Duration,
    /// A TCP session of which one side has finished sending and the other sends nothing.
    pub half_close: Duration,
    /// A UDP session in which no datagram passes either way.
    pub udp_idle: Duration,
    /// What running sessions get after SIGTERM.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(3),
            tcp_idle: Duration::from_secs(3600),
            half_close: Duration::from_secs(60),
            udp_idle: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once, all workers together; a user beyond it is refused and counted. Zero: as many
    /// as the descriptors are enough for, at most 100,000.
    pub sessions: usize,
    /// Control connections at once.
    pub control_connections: usize,
    /// Bytes of relay buffers, all workers together.
    pub buffer_bytes: usize,
    /// UDP sessions at once, all workers together and apart from the other sessions, so that a flood
    /// of datagrams takes nobody's place.
    pub udp_sessions: usize,
    /// Sockets towards UDP backends, all workers together: the sessions that one backend can have,
    /// those that rest included. Zero: as the descriptors and local ports allow.
    pub udp_sockets: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            sessions: 0,
            control_connections: 1024,
            buffer_bytes: 48 << 20,
            udp_sessions: 100_000,
            udp_sockets: 0,
        }
    }
}

/// What becomes of a UDP session when its backend has left, or is said not to be there by ICMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnUdpLoss {
    /// The next datagram goes to another backend, and the session with it.
    #[default]
    Move,
    /// It ends; the next datagram begins a new one.
    Drop,
    /// It goes on sending to where its backend was.
    Keep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Udp {
    pub on_backend_loss: OnUdpLoss,
    /// A session ends once each of the user's datagrams has been answered this often.
    pub responses: Option<NonZeroU32>,
    /// How long a backend and a socket towards it rest after a session; see [`Udp::quarantine`].
    pub quarantine: Option<Duration>,
    /// Sessions that one source may hold: an IPv4 address or an IPv6 /64. Every worker keeps an even
    /// share of the limit.
    pub source_sessions: Option<NonZeroU32>,
    /// Sessions that one source may begin in a second.
    pub source_new_per_second: Option<NonZeroU32>,
    /// Take and send several datagrams of one size at once where the kernel can (GRO and GSO).
    pub gro: bool,
}

impl Default for Udp {
    fn default() -> Udp {
        Udp {
            on_backend_loss: OnUdpLoss::Move,
            responses: None,
            quarantine: None,
            source_sessions: None,
            source_new_per_second: None,
            gro: true,
        }
    }
}

impl Udp {
    /// How long a reply may still come after its session is over: unless configured, twice the idle
    /// time; with `responses`, sessions end when they are answered, and a late duplicate is all that
    /// can come, within the time in which resolvers ask again.
    pub fn quarantine(&self, idle: Duration) -> Duration {
        const AFTER_RESPONSES: Duration = Duration::from_secs(10);
        self.quarantine.unwrap_or(match self.responses {
            Some(_) => AFTER_RESPONSES.min(idle * 2),
            None => idle * 2,
        })
    }
}

/// API users: what a request may take up, in bytes and in time.
#[derive(Clone, Debug, PartialEq)]
pub struct Api {
    /// A request line, or a status line.
    pub line_bytes: usize,
    /// One field line.
    pub field_bytes: usize,
    /// A whole head.
    pub head_bytes: usize,
    /// Field lines in a head.
    pub fields: usize,
    /// Content of one request; `None` sets no limit.
    pub body_bytes: Option<NonZeroU64>,
    /// A whole request head, from its first byte or the connection's beginning to its last.
    pub head_timeout: Duration,
    /// A body of which nothing moves, in either direction.
    pub body_timeout: Duration,
    /// The head of a response, once the request has been sent.
    pub answer_timeout: Duration,
    /// A user's connection between two requests.
    pub idle_timeout: Duration,
    /// A tunnel (WebSocket) through which nothing moves.
    pub tunnel_idle: Duration,
    /// A connection to a backend between two requests.
    pub upstream_idle: Duration,
    /// Connections to one backend that each worker keeps for later requests.
    pub upstream_idle_max: usize,
    pub upstream_private_max: usize,
    /// Further backends that a request is offered.
    pub retries: u8,
    /// This balancer's name in `Via`; `None` makes one up at the start.
    pub via: Option<String>,
    /// Proxies whose word on who the user is counts.
    pub trusted: Vec<ipnet::IpNet>,
}

impl Default for Api {
    fn default() -> Api {
        Api {
            line_bytes: 8 << 10,
            field_bytes: 8 << 10,
            head_bytes: 32 << 10,
            fields: 100,
            body_bytes: None,
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(60),
            tunnel_idle: Duration::from_secs(3600),
            upstream_idle: Duration::from_secs(4),
            upstream_idle_max: 1024,
            upstream_private_max: 1024,
            retries: 2,
            via: None,
            trusted: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct Control {
    /// Networks whose hosts may register; empty allows loopback only.
    pub allow: Vec<ipnet::IpNet>,
    /// Shared secrets, one a line; any of them proves a backend.
    pub secret_file: Option<PathBuf>,
}

/// Who may change things over the admin door. Reading it needs no leave.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Admin {
    /// Tokens, one a line; any of them allows changes over TCP from loopback.
    pub token_file: Option<PathBuf>,
    /// A unix socket over which the user that runs the balancer and root may make changes.
    pub socket: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    pub level: tracing::Level,
    pub format: LogFormat,
    /// Lines about API requests in a second, each worker; the rest is counted only.
    pub requests_per_second: u32,
}

impl Default for Log {
    fn default() -> Log {
        Log { level: tracing::Level::INFO, format: LogFormat::Text, requests_per_second: 100 }
    }
}
