//! The settings of one named service: the table `[service.NAME]`, its values and its keys. Owns what such a
//! table may say; how services and doors fit together is up to `rules`.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::keys::{DAY_MS, Effect, HOUR_MS, Key, LOSSES, POLICIES, takes_of};
use super::kinds::{Kind, Millis, Networks, Number, NumberOrAuto, Switch, Word};
use super::service_kinds::{Backends, Doors, Hosts, Name, OrGlobal, Paths, Statuses, Target};
pub use super::service_kinds::{Expected, StaticBackend};
use super::{Config, OnBackendLoss, Policy};
use crate::cluster::route::{Claim, Host};
use crate::cluster::{Protocol, ServiceId, Terms, Timeouts, WhenAllFail};

/// Named services, at most.
pub const SERVICES_MAX: usize = 1024;
/// Bytes of a service's name, at most.
pub const NAME_BYTES_MAX: usize = 63;

/// One `[service.NAME]` table.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceConfig {
    pub name: String,
    pub protocol: Protocol,
    /// Where its users come in. An API service without any shares the door of `listen.api`.
    pub listen: Vec<SocketAddr>,
    /// Hosts whose requests it takes; none: what nobody else claims at its door.
    pub hosts: Vec<Host>,
    /// Paths that it takes of these hosts, each with all below it; none: all.
    pub paths: Vec<String>,
    /// Who tells at its doors for whom it connects.
    pub proxy_from: Vec<IpNet>,
    pub policy: Option<Policy>,
    pub on_backend_loss: Option<OnBackendLoss>,
    pub connect: Option<Duration>,
    pub tcp_idle: Option<Duration>,
    pub half_close: Option<Duration>,
    pub udp_idle: Option<Duration>,
    /// Whether backends may register themselves.
    pub register: bool,
    /// Backends that do not register.
    pub backends: Vec<StaticBackend>,
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
    /// The `Host` of the request; `None`: the backend's address.
    pub host: Option<String>,
    pub expect: Expected,
    pub interval: Duration,
    pub timeout: Duration,
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
            host: None,
            expect: Expected { first: 200, last: 399 },
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
            on_fail: OnFail::Keep,
            when_all_fail: WhenAllFail::Refuse,
        }
    }
}

impl ServiceConfig {
    /// A service of that name with the defaults.
    pub fn new(name: &str, protocol: Protocol) -> ServiceConfig {
        ServiceConfig {
            name: name.to_owned(),
            protocol,
            listen: Vec::new(),
            hosts: Vec::new(),
            paths: Vec::new(),
            proxy_from: Vec::new(),
            policy: None,
            on_backend_loss: None,
            connect: None,
            tcp_idle: None,
            half_close: None,
            udp_idle: None,
            register: true,
            backends: Vec::new(),
            maintenance: false,
            check: CheckConfig::default(),
        }
    }

    /// What an API service takes at each of its doors, known as `service`.
    pub fn claims(&self, service: ServiceId) -> Vec<Claim> {
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

    /// Whether a service may go by this name: letters, digits, `-` and `_`, and none of the built-in ones.
    pub fn is_name(name: &str) -> bool {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(letter)
            && Protocol::ALL.iter().all(|protocol| protocol.name() != name)
    }
}

impl Config {
    /// The terms of a service by its name; those of the built-in ones are the global ones.
    pub fn terms_by_name(&self, name: &str) -> Terms {
        let named = self.services.iter().find(|service| service.name == name);
        named.map_or_else(|| self.terms(), |service| self.terms_of(service))
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
            on_backend_loss: service.on_backend_loss.unwrap_or(global.on_backend_loss),
            timeouts,
            checks: (service.check.kind != CheckKind::Off).then_some(service.check.when_all_fail),
            maintenance: service.maintenance,
            proxies: match service.listen.is_empty() {
                true => global.proxies,
                false => self.proxies(&service.proxy_from),
            },
        }
    }
}

/// Every setting of a service, in display order; those in the section `check` stand in
/// `[service.NAME.check]`.
pub const SERVICE_KEYS: &[Key<ServiceConfig>] = super::keys::keys! { ServiceConfig;
    "" "protocol", protocol: Word(PROTOCOLS), Restart,
        "What its users speak: `\"tcp\"`, `\"udp\"` or `\"api\"` (HTTP/1.1). Required.";
    "" "listen", listen: Doors, Restart,
        "Where its users come in, written like `listen.tcp`, one or a list. Required but for an API service, which otherwise shares the door of `listen.api`.";
    "" "hosts", hosts: Hosts, Restart,
        "Hosts whose requests an API service takes, exact or `*.` with one label or more in front; empty takes what nobody else claims at its door.";
    "" "paths", paths: Paths, Restart,
        "Paths that an API service takes of these hosts, each with everything below it, whole segments; empty takes all.";
    "" "proxy_from", proxy_from: Networks, Now,
        "As `listen.proxy_from`, for the doors in `listen`: networks of proxies that must begin each TCP or API connection with a PROXY header. API services that share a door must agree.";
    "" "policy", policy: OrGlobal(Word(POLICIES)), Now,
        "As `balance.policy`.";
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
    "" "register", register: Switch, Now,
        "Whether backends may register themselves.";
    "" "backends", backends: Backends, Now,
        "Backends that cannot register themselves: an address with its port, or a table with `address`, `weight` and `proxy` (2: each connection begins with a PROXY header of version 2 that tells the user's address).";
    "" "maintenance", maintenance: Switch, Now,
        "Whether an API service answers every request with 503 and `Retry-After`.";
    "check" "kind", check.kind: Word(CHECKS), Now,
        "How each backend is checked: `\"tcp\"` connects, `\"http\"` asks and looks at the status, `\"off\"` does not.";
    "check" "port", check.port: NumberOrAuto(1..=65_535), Now,
        "The port that is checked; `\"auto\"` is the one that users are sent to.";
    "check" "path", check.path: Target, Now,
        "What an HTTP check asks for.";
    "check" "host", check.host: Name, Now,
        "The `Host` of that request; `\"\"` sends the backend's address.";
    "check" "expect", check.expect: Statuses, Now,
        "The statuses of a passed HTTP check, one or a range.";
    "check" "interval_ms", check.interval: Millis(10..=HOUR_MS), Now,
        "How often a backend is checked.";
    "check" "timeout_ms", check.timeout: Millis(1..=60_000), Now,
        "How long a check may take.";
    "check" "rise", check.rise: Number(1..=100), Now,
        "A failing backend serves again after this many passed checks in a row.";
    "check" "fall", check.fall: Number(1..=100), Now,
        "A backend gets no more new users after this many failed checks in a row.";
    "check" "on_fail", check.on_fail: Word(ON_FAIL), Now,
        "What happens to running sessions of a backend whose check fails: `\"keep\"` or `\"close\"`.";
    "check" "when_all_fail", check.when_all_fail: Word(WHEN_ALL_FAIL), Now,
        "What happens to users while every backend fails: `\"refuse\"` or `\"serve\"`, which tries them all the same.";
};

const PROTOCOLS: &[(&str, Protocol)] =
    &[("tcp", Protocol::Tcp), ("udp", Protocol::Udp), ("api", Protocol::Api)];

const CHECKS: &[(&str, CheckKind)] =
    &[("off", CheckKind::Off), ("tcp", CheckKind::Tcp), ("http", CheckKind::Http)];

const ON_FAIL: &[(&str, OnFail)] = &[("keep", OnFail::Keep), ("close", OnFail::Close)];

const WHEN_ALL_FAIL: &[(&str, WhenAllFail)] =
    &[("refuse", WhenAllFail::Refuse), ("serve", WhenAllFail::Serve)];

#[cfg(test)]
mod tests;
