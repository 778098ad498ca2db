//! Every setting and every limit, as plain validated values. Owns the defaults; knows neither the
//! command line nor file syntax (`config::file` reads TOML into this). `keys` is the table of
//! settings, `cluster` of those of a cluster, `clients` and `asking` of whom certificates are asked, `kinds` how their values are written, `units`
//! how times and sizes are, `rules` how settings constrain each other, `doubts` what deserves a warning, `reload`
//! what a reload applies.

mod asking;
pub mod clients;
pub mod cluster;
pub mod doubts;
pub mod file;
pub mod joining;
pub mod keys;
pub mod kinds;
pub mod plans;
pub mod reload;
pub mod rules;
mod service_kinds;
pub mod services;
pub mod units;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::cluster::{
    HashBy, Limits as ServiceLimits, OnBackendLoss, Policy, Protocol, Proxies, RequestLimits,
    Terms, Timeouts,
};
use crate::tls::keys::Files;

/// The whole configuration of `lb serve`.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Config {
    /// Worker threads; `None` starts one fewer than the machine has cores, but at least one.
    pub workers: Option<usize>,
    pub listen: Listen,
    pub balance: Balance,
    pub health: Health,
    pub timeouts: Timeouts,
    pub limits: Limits,
    pub udp: Udp,
    /// Addresses of this host to send to backends from; none leaves the choice to the kernel.
    pub udp_local_addresses: Vec<IpAddr>,
    pub api: Api,
    pub tls: Tls,
    pub backend_tls: BackendTls,
    pub control: Control,
    pub cluster: cluster::Cluster,
    pub admin: Admin,
    pub log: Log,
    /// The named services, in the order of the file.
    pub services: Vec<services::ServiceConfig>,
}

impl Config {
    /// The terms of every service.
    pub fn terms(&self) -> Terms {
        let api = &self.api;
        Terms {
            policy: self.balance.policy,
            hash: self.balance.hash,
            on_backend_loss: self.balance.on_backend_loss,
            timeouts: self.timeouts,
            responses: self.udp.responses,
            requests: RequestLimits {
                body_bytes: api.body_bytes.map_or(u64::MAX, NonZeroU64::get),
                body: api.body_timeout,
                answer: api.answer_timeout,
                tunnel_idle: api.tunnel_idle,
                retries: api.retries,
            },
            checks: None,
            maintenance: false,
            fallback: None,
            limits: ServiceLimits::default(),
            proxies: self.proxies(&self.listen.proxy_from),
            tls: false,
            https_only: false,
            https_port: None,
            clients: self.clients_of_built_in(),
        }
    }

    /// The proxies in these networks; `None` where there are none.
    pub fn proxies(&self, networks: &[IpNet]) -> Option<Arc<Proxies>> {
        let proxies = || Proxies { networks: networks.to_vec(), patience: self.api.head_timeout };
        (!networks.is_empty()).then(|| Arc::new(proxies()))
    }

    /// Whether each session's start and end is told of in the log.
    pub fn reports_sessions(&self) -> bool {
        self.log.level >= tracing::Level::INFO
    }
}

/// The doors; `None` is `off`.
#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    pub tcp: Option<SocketAddr>,
    pub udp: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub api_tls: Option<SocketAddr>,
    pub control: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
    /// Who tells at the doors of the built-in services for whom it connects.
    pub proxy_from: Vec<IpNet>,
}

impl Listen {
    /// Where users of a built-in service come in who need not speak TLS.
    pub fn plain(&self, protocol: Protocol) -> Option<SocketAddr> {
        match protocol {
            Protocol::Tcp => self.tcp,
            Protocol::Udp => self.udp,
            Protocol::Api => self.api,
        }
    }

    /// Every door of a built-in service, the plain one first.
    pub fn of(&self, protocol: Protocol) -> impl Iterator<Item = SocketAddr> + use<> {
        let sealed = self.api_tls.filter(|_| protocol == Protocol::Api);
        self.plain(protocol).into_iter().chain(sealed)
    }

    /// Whether users of a built-in service come in anywhere.
    pub fn has(&self, protocol: Protocol) -> bool {
        self.of(protocol).next().is_some()
    }
}

impl Default for Listen {
    fn default() -> Listen {
        let anyone = |port| Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
        let loopback = |port| Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        Listen {
            tcp: anyone(8081),
            udp: anyone(8082),
            api: anyone(8083),
            api_tls: None,
            control: loopback(8080),
            admin: loopback(8084),
            proxy_from: Vec::new(),
        }
    }
}

/// TLS with users.
#[derive(Clone, Debug, PartialEq)]
pub struct Tls {
    /// Certificates with their keys, the first of them for whoever asks for no host of theirs.
    pub certificates: Vec<Files>,
    /// A user who asks for a host that no certificate is for is refused.
    pub strict_sni: bool,
    /// An end of a TCP user's connection without a close_notify counts as one with it.
    pub takes_ragged_ends: bool,
    /// What users are asked for where their service does not say.
    pub clients: clients::Clients,
    /// Keys of tickets that several balancers share; without it, each makes its own.
    pub ticket_file: Option<PathBuf>,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// How many handshakes may be under way.
    pub handshakes: u32,
}

impl Default for Tls {
    fn default() -> Tls {
        Tls {
            certificates: Vec::new(),
            strict_sni: false,
            takes_ragged_ends: false,
            clients: clients::Clients::default(),
            ticket_file: None,
            handshake: Duration::from_secs(5),
            handshakes: 1024,
        }
    }
}

impl Tls {
    /// The files of certificates and keys.
    fn files(&self) -> impl Iterator<Item = &Path> {
        let certificates = self.certificates.iter();
        let own =
            certificates.flat_map(|it| [&it.certificate, &it.key].into_iter().chain(&it.ocsp));
        own.chain(&self.ticket_file).map(PathBuf::as_path)
    }
}

impl Config {
    /// Every file that says whom to trust in TLS, and who we are; each once.
    pub fn tls_files(&self) -> Vec<PathBuf> {
        let backends = self.backend_tls.ca.as_deref().into_iter().chain(self.backend_authorities());
        let mut all: Vec<PathBuf> = self.tls.files().chain(backends).map(Path::to_owned).collect();
        for policy in self.client_policies() {
            all.extend(policy.files().map(Path::to_owned));
        }
        all.sort();
        all.dedup();
        all
    }

    /// The files of authorities that single backends have.
    pub fn backend_authorities(&self) -> impl Iterator<Item = &Path> {
        let backends = self.services.iter().flat_map(|service| &service.backends);
        backends.filter_map(|backend| backend.tls.as_ref()?.ca.as_deref())
    }
}

/// TLS with backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendTls {
    /// A file of authorities; `None`: those that this host trusts.
    pub ca: Option<PathBuf>,
    /// Whether a backend's certificate is looked at.
    pub verifies: bool,
}

impl Default for BackendTls {
    fn default() -> BackendTls {
        BackendTls { ca: None, verifies: true }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    pub policy: Policy,
    pub hash: HashBy,
    pub on_backend_loss: OnBackendLoss,
    /// How long running sessions have to end when the balancer stops or their backend drains.
    pub drain: Duration,
}

impl Default for Balance {
    fn default() -> Balance {
        Balance {
            policy: Policy::default(),
            hash: HashBy::default(),
            on_backend_loss: OnBackendLoss::default(),
            drain: Duration::from_secs(30),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// How often a backend is sent `hello`.
    pub interval: Duration,
    /// How long a backend may take to answer; `None` derives it: see [`Health::timeout`].
    pub timeout: Option<Duration>,
    /// Unanswered hellos in a row after which a backend is considered gone.
    pub misses: u32,
}

impl Default for Health {
    fn default() -> Health {
        Health { interval: Duration::from_secs(5), timeout: None, misses: 3 }
    }
}

impl Health {
    /// How long a backend may take to answer. Unless configured, that is half the interval, and 2 s at
    /// most.
    pub fn timeout(&self) -> Duration {
        const MOST: Duration = Duration::from_secs(2);
        self.timeout.unwrap_or_else(|| MOST.min(self.interval / 2))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most sessions at once, across all workers; users beyond that are refused and counted. Zero: as
    /// many as the descriptors allow, at most 100,000.
    pub sessions: usize,
    /// Most control connections at once. Zero: as many as the descriptors allow, at most
    /// [`CONTROL_CONNECTIONS_DEFAULT`].
    pub control_connections: usize,
    /// Bytes of relay buffers, across all workers.
    pub buffer_bytes: usize,
    /// Most UDP sessions at once, across all workers. Separate from the other sessions, so that a
    /// flood of datagrams takes nobody's place.
    pub udp_sessions: usize,
    /// Most sockets towards UDP backends, across all workers: the sessions one backend can have,
    /// including those in quarantine. Zero: as many as descriptors and local ports allow.
    pub udp_sockets: usize,
}

/// Limit on control connections when the configuration leaves it to the host.
pub const CONTROL_CONNECTIONS_DEFAULT: usize = 1024;

impl Limits {
    /// Most control connections at once, where nobody has worked out what the host allows.
    pub fn control_connections(&self) -> usize {
        match self.control_connections {
            0 => CONTROL_CONNECTIONS_DEFAULT,
            limit => limit,
        }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            sessions: 0,
            control_connections: 0,
            buffer_bytes: 48 << 20,
            udp_sessions: 100_000,
            udp_sockets: 0,
        }
    }
}

/// What happens to a UDP session when its backend has left, or ICMP says that it is unreachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnUdpLoss {
    /// The next datagram goes to another backend, and the session with it.
    #[default]
    Move,
    /// It ends; the next datagram starts a new one.
    Drop,
    /// Datagrams are still sent to where its backend was.
    Keep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Udp {
    pub on_backend_loss: OnUdpLoss,
    /// A session ends once each of the user's datagrams has been answered this many times.
    pub responses: Option<NonZeroU32>,
    /// How long a socket is not reused for the same backend after a session; see [`Udp::quarantine`].
    pub quarantine: Option<Duration>,
    /// Most sessions that one source may hold: an IPv4 address or an IPv6 /64. Each worker allows an
    /// even share.
    pub source_sessions: Option<NonZeroU32>,
    /// Most sessions that one source may open per second.
    pub source_new_per_second: Option<NonZeroU32>,
    /// Receive and send several datagrams of one size at once where the kernel can (GRO and GSO).
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
    /// How long a reply may still arrive after its session is over. Unless configured, that is twice
    /// the idle time. With `responses`, a session ends once it has been answered, so only late
    /// duplicates can arrive, within the time in which resolvers retry.
    pub fn quarantine(&self, idle: Duration) -> Duration {
        const AFTER_RESPONSES: Duration = Duration::from_secs(10);
        self.quarantine.unwrap_or(match self.responses {
            Some(_) => AFTER_RESPONSES.min(idle * 2),
            None => idle * 2,
        })
    }
}

/// Limits for API users: what a request may take, in bytes and in time.
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
    /// Largest content of a request; `None` sets no limit.
    pub body_bytes: Option<NonZeroU64>,
    /// How long a whole request head may take, from its first byte or from the start of the
    /// connection.
    pub head_timeout: Duration,
    /// How long a body may go without progress, in either direction.
    pub body_timeout: Duration,
    /// How long a backend may take to send a response's head, once the request has been sent.
    pub answer_timeout: Duration,
    /// How long a user's connection is kept between two requests.
    pub idle_timeout: Duration,
    /// How long a tunnel (WebSocket) may go without traffic.
    pub tunnel_idle: Duration,
    /// How long a connection to a backend is kept between two requests.
    pub upstream_idle: Duration,
    /// Most idle connections to one backend that each worker keeps for later requests.
    pub upstream_idle_max: usize,
    /// Most connections to one backend that each worker keeps for users who logged in on them.
    pub upstream_private_max: usize,
    /// How many other backends are tried for a request.
    pub retries: u8,
    /// This balancer's name in `Via`; `None` makes one up at startup.
    pub via: Option<String>,
    /// Each request is given an ID, which backend and user are told.
    pub request_id: bool,
    /// Proxies trusted to say who the user is.
    pub trusted: Vec<IpNet>,
    /// Users may speak HTTP/2 at the door in the clear, by prior knowledge.
    pub h2c: bool,
    /// Streams of a user's HTTP/2 connection at once.
    pub h2_streams: u32,
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
            body_timeout: RequestLimits::DEFAULT.body,
            answer_timeout: RequestLimits::DEFAULT.answer,
            idle_timeout: Duration::from_secs(60),
            tunnel_idle: RequestLimits::DEFAULT.tunnel_idle,
            upstream_idle: Duration::from_secs(4),
            upstream_idle_max: 1024,
            upstream_private_max: 1024,
            retries: RequestLimits::DEFAULT.retries,
            via: None,
            request_id: false,
            trusted: Vec::new(),
            h2c: true,
            h2_streams: 100,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct Control {
    /// Networks whose hosts may register; empty allows loopback only.
    pub allow: Vec<IpNet>,
    /// File of shared secrets, one per line, any of which authenticates a backend.
    pub secret_file: Option<PathBuf>,
}

/// Who may make changes over the admin door. Reading needs no permission.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Admin {
    /// File of tokens, one per line, any of which allows changes over TCP from loopback.
    pub token_file: Option<PathBuf>,
    /// Unix socket over which root and the balancer's own user may make changes.
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
    /// Most lines about API requests per second and worker; the rest are only counted.
    pub requests_per_second: u32,
}

impl Default for Log {
    fn default() -> Log {
        Log { level: tracing::Level::INFO, format: LogFormat::Text, requests_per_second: 100 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_automatic_timeout_is_half_the_interval_and_two_seconds_at_most() {
        let ms = Duration::from_millis;
        for (interval, timeout) in
            [(10, 5), (1000, 500), (4000, 2000), (5000, 2000), (3_600_000, 2000)]
        {
            let health = Health { interval: ms(interval), ..Health::default() };
            assert_eq!(health.timeout(), ms(timeout), "{interval}");
            assert!(health.timeout() < health.interval);
        }
        let configured = Health { timeout: Some(ms(700)), ..Health::default() };
        assert_eq!(configured.timeout(), ms(700));
    }

    #[test]
    fn an_automatic_quarantine_is_twice_the_idle_time_or_ten_seconds_with_responses() {
        let seconds = Duration::from_secs;
        let udp = Udp::default();
        assert_eq!(udp.quarantine(seconds(60)), seconds(120));
        let answered = Udp { responses: NonZeroU32::new(1), ..udp };
        assert_eq!(answered.quarantine(seconds(60)), seconds(10));
        assert_eq!(answered.quarantine(seconds(3)), seconds(6), "but not longer than without");
        let configured = Udp { quarantine: Some(Duration::ZERO), ..answered };
        assert_eq!(configured.quarantine(seconds(60)), Duration::ZERO);
    }
}
