//! The settings of one named service: the table `[service.NAME]`, its values and its keys. Owns what such a
//! table may say; how services and doors fit together is up to `rules`.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::clients::ServiceClients;
use super::keys::{
    DAY_MS, DEMANDS, Effect, HASHES, HOUR_MS, Key, LOSSES, POLICIES, SESSIONS_MAX, U32_MAX,
    takes_of,
};
use super::kinds::{
    Bytes, File, Files, Kind, Millis, MillisOrAuto, Networks, Number, NumberOrAuto, Switch, Word,
};
use super::service_kinds::{
    Backends, Doors, Groups, GrpcService, Hosts, Name, OrGlobal, Paths, ServiceName, Statuses,
    Target, is_word,
};
pub use super::service_kinds::{Expected, GroupShare, NAME_BYTES_MAX, StaticBackend};
use super::{Config, HashBy, OnBackendLoss, Policy};
use crate::cluster::route::{Claim, Host};
use crate::cluster::{
    Limits, Protocol, RequestLimits, Service, ServiceId, Terms, Timeouts, WhenAllFail, groups,
};
use crate::metrics::BACKENDS_MAX;

/// Named services, at most.
pub const SERVICES_MAX: usize = 1024;

/// One `[service.NAME]` table.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceConfig {
    /// Its number, which no other has had while the process runs; the file's services are numbered in its
    /// order, behind the built-in ones.
    pub id: ServiceId,
    pub name: String,
    pub protocol: Protocol,
    /// Where its users come in, those of an API service in the clear.
    pub listen: Vec<SocketAddr>,
    /// Where users of an API service come in by HTTPS. One with any of these doors shares none of the common
    /// ones.
    pub listen_tls: Vec<SocketAddr>,
    /// Hosts whose requests it takes; none: what nobody else claims at its door.
    pub hosts: Vec<Host>,
    /// Paths that it takes of these hosts, each with all below it; none: all.
    pub paths: Vec<String>,
    /// Who tells at its doors for whom it connects.
    pub proxy_from: Vec<IpNet>,
    /// Users of a TCP service speak TLS, and its backends do not.
    pub tls: bool,
    /// What its users are asked for when they set up TLS.
    pub clients: ServiceClients,
    /// An API service sends requests in the clear to the HTTPS door.
    pub https_only: bool,
    pub policy: Option<Policy>,
    pub hash: Option<HashBy>,
    pub on_backend_loss: Option<OnBackendLoss>,
    pub connect: Option<Duration>,
    pub tcp_idle: Option<Duration>,
    pub half_close: Option<Duration>,
    pub udp_idle: Option<Duration>,
    /// Here and in `body_bytes`, `Some(None)` sets no limit whatever the global key says.
    pub responses: Option<Option<NonZeroU32>>,
    pub answer: Option<Duration>,
    pub body: Option<Duration>,
    pub body_bytes: Option<Option<NonZeroU64>>,
    pub retries: Option<u8>,
    pub tunnel_idle: Option<Duration>,
    /// Whether backends may register themselves.
    pub register: bool,
    /// Whether a data port is tried by a connection without a user.
    pub probe: bool,
    /// Networks whose hosts may; `None`: the global ones.
    pub allow: Option<Vec<IpNet>>,
    /// File of secrets, one of which its backends must prove; `None`: the global one.
    pub secret_file: Option<PathBuf>,
    /// Backends that do not register.
    pub backends: Vec<StaticBackend>,
    /// The API service that serves the requests for which nobody of this one is there.
    pub fallback: Option<String>,
    /// Most backends, those in the file included.
    pub backends_max: Option<NonZeroU32>,
    /// Most sessions of all its users.
    pub sessions: Option<NonZeroU32>,
    /// Most sessions on each of its backends.
    pub backend_sessions: Option<NonZeroU32>,
    /// Networks whose users are let in; none: everyone is.
    pub users: Vec<IpNet>,
    /// The groups of its backends, each with its share of the users; none: they share them all.
    pub groups: Vec<GroupShare>,
    /// Whether its users are told to come back later.
    pub maintenance: bool,
    pub check: CheckConfig,
}

/// How each backend of a service is checked.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckConfig {
    pub kind: CheckKind,
    /// The port that is checked; `None`: the one that users are sent to.
    pub port: Option<u16>,
    pub path: String,
    /// The service that a gRPC check asks about; empty: the whole server.
    pub grpc_service: String,
    /// The `Host` of the request; `None`: the backend's address.
    pub host: Option<String>,
    pub expect: Expected,
    pub interval: Duration,
    /// How long a check may take; `None` derives it: see [`CheckConfig::timeout`].
    pub timeout: Option<Duration>,
    pub rise: u32,
    pub fall: u32,
    pub on_fail: OnFail,
    pub when_all_fail: WhenAllFail,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CheckKind {
    Off,
    /// A connection is accepted.
    Tcp,
    /// A request is answered with the expected status.
    Http,
    /// The health call of gRPC is answered with `SERVING`.
    Grpc,
}

impl CheckKind {
    /// Whether a backend has to answer something.
    pub fn asks(self) -> bool {
        matches!(self, CheckKind::Http | CheckKind::Grpc)
    }
}

/// What happens to running sessions of a backend whose check fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnFail {
    Keep,
    Close,
}

impl Default for CheckConfig {
    fn default() -> CheckConfig {
        CheckConfig {
            kind: CheckKind::Off,
            port: None,
            path: "/".to_owned(),
            grpc_service: String::new(),
            host: None,
            expect: Expected { first: 200, last: 399 },
            interval: Duration::from_secs(2),
            timeout: None,
            rise: 2,
            fall: 3,
            on_fail: OnFail::Keep,
            when_all_fail: WhenAllFail::Refuse,
        }
    }
}

impl CheckConfig {
    /// How long a check may take. Unless configured, that is half the interval, and 1 s at most.
    pub fn timeout(&self) -> Duration {
        const MOST: Duration = Duration::from_secs(1);
        self.timeout.unwrap_or_else(|| MOST.min(self.interval / 2))
    }
}

impl ServiceConfig {
    /// A service of that name with the defaults.
    pub fn new(name: &str, protocol: Protocol) -> ServiceConfig {
        ServiceConfig {
            id: ServiceId(Protocol::ALL.len() as u16),
            name: name.to_owned(),
            protocol,
            listen: Vec::new(),
            listen_tls: Vec::new(),
            hosts: Vec::new(),
            paths: Vec::new(),
            proxy_from: Vec::new(),
            tls: false,
            clients: ServiceClients::default(),
            https_only: false,
            policy: None,
            hash: None,
            on_backend_loss: None,
            connect: None,
            tcp_idle: None,
            half_close: None,
            udp_idle: None,
            responses: None,
            answer: None,
            body: None,
            body_bytes: None,
            retries: None,
            tunnel_idle: None,
            register: true,
            probe: true,
            allow: None,
            secret_file: None,
            backends: Vec::new(),
            fallback: None,
            backends_max: None,
            sessions: None,
            backend_sessions: None,
            users: Vec::new(),
            groups: Vec::new(),
            maintenance: false,
            check: CheckConfig::default(),
        }
    }

    /// Its own doors, those in the clear first. An API service without any shares those of `listen.api` and
    /// `listen.api_tls`.
    pub fn doors(&self) -> impl Iterator<Item = SocketAddr> {
        self.listen.iter().chain(&self.listen_tls).copied()
    }

    /// Whether it has any.
    pub fn has_doors(&self) -> bool {
        self.doors().next().is_some()
    }

    /// Its groups with their shares, as the registry takes them.
    pub fn shares(&self) -> Vec<(&str, u8)> {
        self.groups.iter().map(|group| (group.name.as_str(), group.share)).collect()
    }

    /// What an API service takes at each of its doors.
    pub fn claims(&self) -> Vec<Claim> {
        let service = self.id;
        let every = [Host::Rest];
        let hosts = if self.hosts.is_empty() { &every[..] } else { &self.hosts };
        let all = [String::new()];
        let paths = if self.paths.is_empty() { &all[..] } else { &self.paths };
        let claim = |host: &Host, path: &String| Claim {
            host: host.clone(),
            path: path.as_str().into(),
            service,
        };
        hosts.iter().flat_map(|host| paths.iter().map(move |path| claim(host, path))).collect()
    }

    /// What a request may take: its own where it has any, else as `global` says.
    fn requests(&self, global: &RequestLimits) -> RequestLimits {
        let unlimited = |limit: Option<NonZeroU64>| limit.map_or(u64::MAX, NonZeroU64::get);
        RequestLimits {
            body_bytes: self.body_bytes.map_or(global.body_bytes, unlimited),
            body: self.body.unwrap_or(global.body),
            answer: self.answer.unwrap_or(global.answer),
            tunnel_idle: self.tunnel_idle.unwrap_or(global.tunnel_idle),
            retries: self.retries.unwrap_or(global.retries),
        }
    }

    /// Whether a service may go by this name: letters, digits, `-` and `_`, and none of the built-in ones.
    pub fn is_name(name: &str) -> bool {
        is_word(name) && Protocol::ALL.iter().all(|protocol| protocol.name() != name)
    }
}

/// Gives numbers to services, each one that no other has had for as long as possible: what is still said of a
/// service that has gone must not be taken for its successor's.
#[derive(Debug)]
pub struct ServiceIds {
    last: u16,
}

impl ServiceIds {
    /// Numbers behind those of these settings.
    pub fn behind(config: &Config) -> ServiceIds {
        ServiceIds { last: config.last_service().0 }
    }

    /// The next number that is not taken, round and round. There must be one.
    pub fn next(&mut self, is_taken: impl Fn(ServiceId) -> bool) -> ServiceId {
        loop {
            self.last = match self.last + 1 {
                next if next < ServiceId::NOBODY.0 => next,
                _ => Protocol::ALL.len() as u16,
            };
            if !is_taken(ServiceId(self.last)) {
                return ServiceId(self.last);
            }
        }
    }
}

impl Config {
    fn last_service(&self) -> ServiceId {
        let built_in = ServiceId(Protocol::ALL.len() as u16 - 1);
        self.services.iter().map(|it| it.id).max().unwrap_or(built_in)
    }

    /// Adds a service behind those that are there, with the next number.
    pub fn add_service(&mut self, service: ServiceConfig) {
        let id = ServiceId(self.last_service().0 + 1);
        self.services.push(ServiceConfig { id, ..service });
    }

    /// Has exactly these services, numbered in this order.
    pub fn set_services(&mut self, services: Vec<ServiceConfig>) {
        self.services.clear();
        services.into_iter().for_each(|service| self.add_service(service));
    }

    /// A service as its table describes it, before anybody has joined. It has the seats of `kin`.
    pub fn new_service(&self, table: &ServiceConfig, kin: &Service) -> Service {
        Service {
            id: table.id,
            name: table.name.as_str().into(),
            kind: table.protocol,
            terms: self.terms_of(table),
            groups: groups::regrouped(&[], &table.shares()),
            turn: Arc::default(),
            seats: Arc::clone(&kin.seats),
            gate: Arc::default(),
            users: table.users.as_slice().into(),
            pool: Arc::default(),
        }
    }

    /// The table of the service of this name.
    pub fn find_service(&self, name: &str) -> Option<&ServiceConfig> {
        self.services.iter().find(|service| service.name == name)
    }

    /// The number of an API service that serves as a fallback.
    pub fn api_service(&self, name: &str) -> Option<ServiceId> {
        if name == Protocol::Api.name() {
            return Some(ServiceId::built_in(Protocol::Api));
        }
        self.find_service(name).map(|service| service.id)
    }

    /// The table of a service; a built-in one has none.
    pub fn service(&self, id: ServiceId) -> Option<&ServiceConfig> {
        // Unless an earlier service has gone, they are numbered without a gap.
        let place = usize::from(id.0).checked_sub(Protocol::ALL.len())?;
        let at_home = self.services.get(place).filter(|service| service.id == id);
        at_home.or_else(|| self.services.iter().find(|service| service.id == id))
    }

    /// The terms of a service; those of the built-in ones are the global ones.
    pub fn terms_for(&self, id: ServiceId) -> Terms {
        self.service(id).map_or_else(|| self.terms(), |service| self.terms_of(service))
    }

    /// The networks whose users a service lets in.
    pub fn users_for(&self, id: ServiceId) -> &[IpNet] {
        self.service(id).map_or(&[], |service| &service.users)
    }

    /// The terms of a named service: its own where it has any, else the global ones.
    pub fn terms_of(&self, service: &ServiceConfig) -> Terms {
        let global = self.terms();
        let timeouts = Timeouts {
            connect: service.connect.unwrap_or(global.timeouts.connect),
            tcp_idle: service.tcp_idle.unwrap_or(global.timeouts.tcp_idle),
            half_close: service.half_close.unwrap_or(global.timeouts.half_close),
            udp_idle: service.udp_idle.unwrap_or(global.timeouts.udp_idle),
        };
        Terms {
            policy: service.policy.unwrap_or(global.policy),
            hash: service.hash.unwrap_or(global.hash),
            on_backend_loss: service.on_backend_loss.unwrap_or(global.on_backend_loss),
            timeouts,
            responses: service.responses.unwrap_or(global.responses),
            requests: service.requests(&global.requests),
            checks: (service.check.kind != CheckKind::Off).then_some(service.check.when_all_fail),
            maintenance: service.maintenance,
            fallback: service.fallback.as_deref().and_then(|name| self.api_service(name)),
            limits: Limits {
                sessions: service.sessions.map(NonZeroU32::get),
                backend_sessions: service.backend_sessions.map(NonZeroU32::get),
                backends: service.backends_max.map(NonZeroU32::get),
            },
            proxies: match service.has_doors() {
                true => self.proxies(&service.proxy_from),
                false => global.proxies,
            },
            tls: service.tls,
            https_only: service.https_only,
            https_port: service.listen_tls.first().map(SocketAddr::port),
            clients: self.clients_of(service),
        }
    }
}

/// Every setting of a service, in display order; those in the section `check` stand in
/// `[service.NAME.check]`.
pub const SERVICE_KEYS: &[Key<ServiceConfig>] = super::keys::keys! { ServiceConfig;
    "" "protocol", protocol: Word(PROTOCOLS), Restart,
        "What its users speak: `\"tcp\"`, `\"udp\"` or `\"api\"` (HTTP/1.1). Required, and the same for as long as the name is in use.";
    "" "listen", listen: Doors, Now,
        "Where its users come in, written like `listen.tcp`, one or a list. Required but for an API service, which otherwise shares the doors of `listen.api` and `listen.api_tls`.";
    "" "listen_tls", listen_tls: Doors, Now,
        "Where users of an API service with doors of its own come in by HTTPS, written like `listen`, beside it or instead. It needs a `[[tls.certificate]]`.";
    "" "hosts", hosts: Hosts, Now,
        "Hosts whose requests an API service takes, exact or `*.` with one label or more in front; empty takes what nobody else claims at its door. A TCP service takes connections that ask for these hosts in their ClientHello (TLS), which go on as they are unless `tls` is true.";
    "" "paths", paths: Paths, Now,
        "Paths that an API service takes of these hosts, each with everything below it, whole segments; empty takes all.";
    "" "proxy_from", proxy_from: Networks, Now,
        "As `listen.proxy_from`, for the doors in `listen` and `listen_tls`: networks of proxies that must begin each TCP or API connection with a PROXY header. API services that share a door must agree.";
    "" "tls", tls: Switch, Now,
        "Whether users of a TCP service speak TLS, which ends here. It needs a `[[tls.certificate]]`.";
    "" "tls_clients", clients.demand: OrGlobal(Word(DEMANDS)), Now,
        "As `tls.clients`. API services that have requests for the same host must agree in this and the three keys that follow.";
    "" "tls_client_ca", clients.ca: File, Now,
        "As `tls.client_ca`; `\"\"` leaves it to that.";
    "" "tls_client_crl", clients.crl: Files, Now,
        "As `tls.client_crl`, for the authorities of `tls_client_ca`.";
    "" "tls_client_chain", clients.tells_chain: OrGlobal(Switch), Now,
        "As `tls.client_chain`.";
    "" "https_only", https_only: Switch, Now,
        "Whether an API service answers requests in the clear only with the way to the first door of `listen_tls`, or without doors of its own to `listen.api_tls` (308). A proxy in `api.trusted` that says `X-Forwarded-Proto: https` has spoken TLS itself.";
    "" "policy", policy: OrGlobal(Word(POLICIES)), Now,
        "As `balance.policy`.";
    "" "hash", hash: OrGlobal(Word(HASHES)), Now,
        "As `balance.hash`.";
    "" "on_backend_loss", on_backend_loss: OrGlobal(Word(LOSSES)), Now,
        "As `balance.on_backend_loss`.";
    "" "connect_ms", connect: OrGlobal(Millis(1..=HOUR_MS)), Now,
        "As `timeouts.connect_ms`.";
    "" "tcp_idle_ms", tcp_idle: OrGlobal(Millis(10..=30 * DAY_MS)), Now,
        "As `timeouts.tcp_idle_ms`.";
    "" "half_close_ms", half_close: OrGlobal(Millis(10..=30 * DAY_MS)), Now,
        "As `timeouts.half_close_ms`.";
    "" "udp_idle_ms", udp_idle: OrGlobal(Millis(10..=DAY_MS)), Now,
        "As `timeouts.udp_idle_ms`.";
    "" "responses", responses: OrGlobal(Number(0..=U32_MAX)), Now,
        "As `udp.responses`, for sessions that begin from then on.";
    "" "answer_ms", answer: OrGlobal(Millis(10..=DAY_MS)), Now,
        "As `api.answer_ms`.";
    "" "body_ms", body: OrGlobal(Millis(10..=HOUR_MS)), Now,
        "As `api.body_ms`.";
    "" "body_bytes", body_bytes: OrGlobal(Bytes(0..=i64::MAX as u64)), Now,
        "As `api.body_bytes`.";
    "" "retries", retries: OrGlobal(Number(0..=10)), Now,
        "As `api.retries`.";
    "" "tunnel_idle_ms", tunnel_idle: OrGlobal(Millis(10..=30 * DAY_MS)), Now,
        "As `api.tunnel_idle_ms`.";
    "" "register", register: Switch, Now,
        "Whether backends may register themselves.";
    "" "probe", probe: Switch, Now,
        "Whether a backend's port is tried with an empty connection, when the backend registers and while it is set aside. `false` for servers that take such connections for an attack, as MySQL does.";
    "" "allow", allow: OrGlobal(Networks), Now,
        "Networks whose hosts may register for it, instead of those in `control.allow`.";
    "" "secret_file", secret_file: File, Now,
        "File of secrets, one per line, one of which its backends must prove; it then accepts no others. `\"\"` leaves it to `control.secret_file`.";
    "" "backends", backends: Backends, Now,
        "Backends that cannot register themselves: an address with its port, or a table with `address`, `weight`, `group`, `proxy` (2: each connection begins with a PROXY header of version 2 that tells the user's address), `http` (2: an API backend that speaks HTTP/2) and `tls` (`true`: the backend is reached by TLS, and its certificate must be for its address; `{ name = \"...\", ca = \"...\" }`: for that name, or from an authority in that file).";
    "" "fallback", fallback: ServiceName, Now,
        "Another API service, which serves the requests of this one while nobody of it serves or can be reached, and during maintenance; `\"\"` leaves them to a 503 or 502.";
    "" "backends_max", backends_max: Number(0..=BACKENDS_MAX as u64), Now,
        "Most backends at once, those in the file included; further registrations are refused. 0 sets no limit.";
    "" "sessions", sessions: Number(0..=SESSIONS_MAX as u64), Now,
        "Most sessions at once, of all its users; for an API service, requests under way and tunnels. Further users are turned away. 0 sets no limit.";
    "" "backend_sessions", backend_sessions: Number(0..=SESSIONS_MAX as u64), Now,
        "Most of them on each backend; one that is full gets no more until it has room. 0 sets no limit.";
    "" "users", users: Networks, Now,
        "Networks whose users are let in, by the address they connect from; empty lets everyone in.";
    "" "groups", groups: Groups, Now,
        "Groups of backends, each with its share of the users, 0 to 100: `{ blue = 95, green = 5 }`. Shares are relative to each other; a group without anybody to serve leaves its users to the rest.";
    "" "maintenance", maintenance: Switch, Now,
        "Whether an API service answers every request with 503 and `Retry-After`, or leaves it to its `fallback`.";
    "check" "kind", check.kind: Word(CHECKS), Now,
        "How each backend is checked: `\"tcp\"` connects, `\"http\"` asks and looks at the status, `\"grpc\"` makes the health call of gRPC, `\"off\"` does not.";
    "check" "port", check.port: NumberOrAuto(1..=65_535), Now,
        "The port that is checked; `\"auto\"` is the one that users are sent to.";
    "check" "path", check.path: Target, Now,
        "What an HTTP check asks for.";
    "check" "grpc_service", check.grpc_service: GrpcService, Now,
        "The service that a gRPC check asks about; `\"\"` asks about the whole server.";
    "check" "host", check.host: Name, Now,
        "The `Host` of an HTTP check and the `:authority` of a gRPC check; `\"\"` sends the backend's address.";
    "check" "expect", check.expect: Statuses, Now,
        "The statuses of a passed HTTP check, one or a range.";
    "check" "interval_ms", check.interval: Millis(10..=HOUR_MS), Now,
        "How often a backend is checked.";
    "check" "timeout_ms", check.timeout: MillisOrAuto(1..=60_000), Now,
        "How long a check may take, `interval_ms` at most. `\"auto\"` is half of it, 1 s at most.";
    "check" "rise", check.rise: Number(1..=100), Now,
        "A failing backend serves again after this many passed checks in a row.";
    "check" "fall", check.fall: Number(1..=100), Now,
        "A backend gets no more new users after this many failed checks in a row; one of an API service also after as many requests in a row that it left unanswered for `answer_ms`.";
    "check" "on_fail", check.on_fail: Word(ON_FAIL), Now,
        "What happens to running sessions of a backend whose check fails: `\"keep\"` or `\"close\"`.";
    "check" "when_all_fail", check.when_all_fail: Word(WHEN_ALL_FAIL), Now,
        "What happens to users while every backend fails: `\"refuse\"` or `\"serve\"`, which tries them all the same.";
};

const PROTOCOLS: &[(&str, Protocol)] =
    &[("tcp", Protocol::Tcp), ("udp", Protocol::Udp), ("api", Protocol::Api)];

const CHECKS: &[(&str, CheckKind)] = &[
    ("off", CheckKind::Off),
    ("tcp", CheckKind::Tcp),
    ("http", CheckKind::Http),
    ("grpc", CheckKind::Grpc),
];

const ON_FAIL: &[(&str, OnFail)] = &[("keep", OnFail::Keep), ("close", OnFail::Close)];

const WHEN_ALL_FAIL: &[(&str, WhenAllFail)] =
    &[("refuse", WhenAllFail::Refuse), ("serve", WhenAllFail::Serve)];

#[cfg(test)]
mod tests;
