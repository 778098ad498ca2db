//! The one table of settings. A row is a key of the file: its name, the kind of value it takes, the
//! field it sets, and when a change takes effect. The settings document, `deploy/lb.toml`, what a
//! reload applies and the error texts all derive from it. How a value is read is up to its kind
//! ([`super::kinds`]); how keys relate is up to `rules`.

use super::clients::Demand;
use super::cluster::{Endpoints, Name};
use super::kinds::{
    Addresses, Bytes, Certificates, DoorAddress, File, Files, Given, Kind, Millis, MillisOrAuto,
    Networks, Number, NumberOrAuto, Switch, Via, Word,
};
use super::{Config, LogFormat, OnUdpLoss};
use crate::cluster::{HashBy, OnBackendLoss, Policy};
use crate::http::head;

/// Most workers; a session ID holds its worker in eight bits.
pub const WORKERS_MAX: usize = 128;
/// Most sessions, across all workers.
pub const SESSIONS_MAX: usize = 16 << 20;
/// Most field lines a head can be parsed with.
const FIELDS_MAX: u64 = head::FIELDS_MAX as u64;
/// Local ports of one address, for each address family.
const UDP_SOCKETS_MAX: u64 = 2 * 65_535;
pub(super) const U32_MAX: u64 = u32::MAX as u64;
pub(super) const HOUR_MS: u64 = 3_600_000;
pub(super) const DAY_MS: u64 = 24 * HOUR_MS;

/// When a changed setting takes effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// On a reload.
    Now,
    /// On a restart: it is bound to sockets, threads or memory created at startup.
    Restart,
}

/// One setting of a `T`, which is a whole configuration or one table of it.
pub struct Key<T> {
    /// The table in the file; empty for top-level keys.
    pub section: &'static str,
    pub name: &'static str,
    pub effect: Effect,
    /// What it does, for the settings document and the shipped file.
    pub help: &'static str,
    pub(super) takes: fn() -> String,
    pub(super) set: fn(&mut T, &Given) -> Result<(), String>,
    pub(super) show: fn(&T) -> String,
    pub(super) adopt: fn(&mut T, &T),
}

impl<T> Key<T> {
    /// `section.name`, or the bare name at the top level.
    pub fn path(&self) -> String {
        if self.section.is_empty() {
            self.name.to_owned()
        } else {
            format!("{}.{}", self.section, self.name)
        }
    }

    /// What it takes, phrased to follow "takes".
    pub fn takes(&self) -> String {
        (self.takes)()
    }

    /// Sets the value.
    ///
    /// # Errors
    /// Half a sentence that follows the name of the key and says what it takes.
    pub fn set(&self, config: &mut T, given: &Given) -> Result<(), String> {
        (self.set)(config, given).map_err(|found| format!("takes {}, not {found}", self.takes()))
    }

    /// The value in `config`, as written in the file.
    pub fn show(&self, config: &T) -> String {
        (self.show)(config)
    }

    /// Copies only this setting from `wanted`.
    pub fn adopt(&self, config: &mut T, wanted: &T) {
        (self.adopt)(config, wanted);
    }
}

/// The key at `section.name` in a table of keys, if there is one.
pub fn find<'a, T>(keys: &'a [Key<T>], section: &str, name: &str) -> Option<&'a Key<T>> {
    keys.iter().find(|key| key.section == section && key.name == name)
}

/// Rows of a table of keys: `"section" "name", field: kind, effect, "help";`.
macro_rules! keys {
    ($target:ty; $($section:literal $name:literal, $($field:ident).+: $kind:expr, $effect:ident, $help:literal;)+) => {
        &[$(Key {
            section: $section,
            name: $name,
            effect: Effect::$effect,
            help: $help,
            takes: || takes_of(&$kind, |target: &$target| &target.$($field).+),
            set: |target, given| $kind.read(given).map(|value| target.$($field).+ = value),
            show: |target| $kind.show(&target.$($field).+),
            adopt: |target, wanted| target.$($field).+.clone_from(&wanted.$($field).+),
        }),+]
    };
}

pub(super) use keys;

/// What a kind takes. The field only selects the type of its value.
pub(super) fn takes_of<T, V>(kind: &impl Kind<V>, _field: fn(&T) -> &V) -> String {
    kind.takes()
}

/// Every setting of the balancer, in display order.
pub const KEYS: &[Key<Config>] = keys! { Config;
    "" "workers", workers: NumberOrAuto(1..=WORKERS_MAX as u64), Restart,
        "Worker threads; `\"auto\"` starts one fewer than the machine has cores, but at least one, and no more than a third of the descriptors suffice for.";
    "listen" "tcp", listen.tcp: DoorAddress, Restart,
        "Where TCP users connect: an address with its port, a bare port for all addresses (IPv4 and IPv6), or `\"off\"`.";
    "listen" "udp", listen.udp: DoorAddress, Restart,
        "Where UDP users send; written like `tcp`.";
    "listen" "api", listen.api: DoorAddress, Restart,
        "Where API users (HTTP/1.1) connect; written like `tcp`.";
    "listen" "api_tls", listen.api_tls: DoorAddress, Restart,
        "Where API users connect by HTTPS; written like `tcp`. It needs a `[[tls.certificate]]`.";
    "listen" "control", listen.control: DoorAddress, Restart,
        "Where backends register. Beyond loopback it needs `control.allow` or `control.secret_file`.";
    "listen" "admin", listen.admin: DoorAddress, Restart,
        "Where operators read status, sessions and metrics; written like `tcp`.";
    "listen" "proxy_from", listen.proxy_from: Networks, Now,
        "Proxies in front of `tcp` and `api`, in CIDR notation: they must begin each connection with a PROXY header (version 1 or 2), within `api.head_ms`, and the user's address is taken from it. From anybody else such a header is refused.";
    "balance" "policy", balance.policy: Word(POLICIES), Now,
        "Which backend gets the next user: `\"round_robin\"`, `\"least_sessions\"`, `\"p2c\"` (of two chosen by chance, the one with fewer sessions) or `\"source_hash\"`.";
    "balance" "hash", balance.hash: Word(HASHES), Now,
        "What `\"source_hash\"` knows a user by: `\"address\"`, or `\"address_port\"`, which spreads the connections of many users behind one address.";
    "balance" "on_backend_loss", balance.on_backend_loss: Word(LOSSES), Now,
        "What happens to running sessions of a backend whose control connection is lost: `\"keep\"` or `\"close\"`.";
    "health" "interval_ms", health.interval: Millis(10..=HOUR_MS), Now,
        "How often a backend is sent `hello`.";
    "health" "timeout_ms", health.timeout: MillisOrAuto(1..=HOUR_MS), Now,
        "How long a backend may take to answer `hello`; less than `interval_ms`. `\"auto\"` is half of it, 2 s at most.";
    "health" "misses", health.misses: Number(1..=100), Now,
        "A backend is considered gone after this many unanswered hellos in a row.";
    "timeouts" "connect_ms", timeouts.connect: Millis(1..=HOUR_MS), Now,
        "How long connecting to a backend may take before another backend is tried.";
    "timeouts" "tcp_idle_ms", timeouts.tcp_idle: Millis(10..=30 * DAY_MS), Now,
        "How long a TCP session may go without traffic in either direction.";
    "timeouts" "half_close_ms", timeouts.half_close: Millis(10..=30 * DAY_MS), Now,
        "How long a TCP session may go without traffic after one side has finished sending.";
    "timeouts" "udp_idle_ms", timeouts.udp_idle: Millis(10..=DAY_MS), Now,
        "How long a UDP session may go without a datagram in either direction.";
    "timeouts" "drain_ms", balance.drain: Millis(0..=DAY_MS), Now,
        "How long running sessions have to end by themselves after SIGTERM, and those of a backend that an operator drains without saying how long.";
    "limits" "sessions", limits.sessions: NumberOrAuto(1..=SESSIONS_MAX as u64), Now,
        "Most sessions at once, across all workers; users beyond that are refused and counted. `\"auto\"` takes as many as the descriptors allow, 100000 at most.";
    "limits" "control_connections", limits.control_connections: NumberOrAuto(1..=65_536), Now,
        "Most control connections at once. `\"auto\"` takes an eighth of the descriptors, 1024 at most.";
    "limits" "buffer_bytes", limits.buffer_bytes: Bytes(1 << 20..=64 << 30), Restart,
        "Bytes of relay buffers, across all workers. With an API door, an eighth of them is for incomplete requests.";
    "limits" "udp_sessions", limits.udp_sessions: Number(1..=SESSIONS_MAX as u64), Restart,
        "Most UDP sessions at once, across all workers; not counted towards `sessions`.";
    "limits" "udp_sockets", limits.udp_sockets: NumberOrAuto(0..=UDP_SOCKETS_MAX), Restart,
        "Most sockets towards UDP backends, across all workers. Each serves one session per backend and local address (`udp.local_addresses`), and is taken until the quarantine of that session is over. `\"auto\"` takes as many as descriptors and local ports allow.";
    "udp" "on_backend_loss", udp.on_backend_loss: Word(UDP_LOSSES), Restart,
        "What happens to running UDP sessions of a backend that is lost: `\"move\"`, `\"drop\"` or `\"keep\"`.";
    "udp" "responses", udp.responses: Number(0..=U32_MAX), Now,
        "Ends a session once each of the user's datagrams has been answered this many times; 0 leaves that to `udp_idle_ms`.";
    "udp" "quarantine_ms", udp.quarantine: MillisOrAuto(0..=DAY_MS), Restart,
        "How long after a session its local port is not reused for the same backend, so that a late reply reaches nobody else; less if ports run short. `\"auto\"` is twice `udp_idle_ms`, or 10 s with `responses`.";
    "udp" "source_sessions", udp.source_sessions: Number(0..=U32_MAX), Restart,
        "Most sessions that one source (an IPv4 address or an IPv6 /64) may hold; each worker allows an even share, rounded up. 0 sets no limit.";
    "udp" "source_new_per_second", udp.source_new_per_second: Number(0..=U32_MAX), Restart,
        "Most sessions that one source may open per second; each worker allows an even share, rounded up. 0 sets no limit.";
    "udp" "local_addresses", udp_local_addresses: Addresses, Restart,
        "Addresses of this host to send to backends from. Each one adds as many sessions again on the same sockets and ports; empty leaves the address to the kernel.";
    "udp" "gro", udp.gro: Switch, Restart,
        "Receive and send several datagrams of one size at once where the kernel can (GRO and GSO).";
    "api" "line_bytes", api.line_bytes: Bytes(256..=1 << 16), Restart,
        "Longest request line, without its line end; 414 beyond it, or 501 if the method is what is too long.";
    "api" "field_bytes", api.field_bytes: Bytes(256..=1 << 16), Restart,
        "Longest field line in a head; 431 beyond it.";
    "api" "head_bytes", api.head_bytes: Bytes(1024..=1 << 18), Restart,
        "Largest head; 431 beyond it.";
    "api" "fields", api.fields: Number(1..=FIELDS_MAX), Restart,
        "Most field lines in a head; 431 beyond it.";
    "api" "body_bytes", api.body_bytes: Bytes(0..=i64::MAX as u64), Now,
        "Largest content of a request; 413 beyond it. 0 sets no limit.";
    "api" "head_ms", api.head_timeout: Millis(10..=HOUR_MS), Restart,
        "How long a whole request head may take, from its first byte or from the start of the connection; 408 after it.";
    "api" "body_ms", api.body_timeout: Millis(10..=HOUR_MS), Now,
        "How long a body may go without progress, in either direction.";
    "api" "answer_ms", api.answer_timeout: Millis(10..=DAY_MS), Now,
        "How long a backend may take to send a response's head, once the request has been sent; 504 after it.";
    "api" "idle_ms", api.idle_timeout: Millis(10..=DAY_MS), Restart,
        "How long a user's connection is kept between two requests.";
    "api" "tunnel_idle_ms", api.tunnel_idle: Millis(10..=30 * DAY_MS), Now,
        "How long a tunnel (WebSocket) may go without traffic.";
    "api" "upstream_idle_ms", api.upstream_idle: Millis(1..=HOUR_MS), Restart,
        "How long a connection to a backend is kept between two requests; set it below the backends' own timeout.";
    "api" "upstream_idle_max", api.upstream_idle_max: Number(0..=65536), Restart,
        "Most idle connections to one backend that each worker keeps for later requests.";
    "api" "upstream_private_max", api.upstream_private_max: Number(0..=65536), Restart,
        "Most connections to one backend that each worker keeps for users who logged in on them (NTLM, Negotiate).";
    "api" "retries", api.retries: Number(0..=10), Now,
        "How many other backends are tried for a request that may be repeated.";
    "api" "via", api.via: Via, Restart,
        "This balancer's name in `Via`. It must be unique, so that a loop can be told from a chain; `\"auto\"` makes one up at each start.";
    "api" "request_id", api.request_id: Switch, Restart,
        "Give each request an ID in `X-Request-Id`, for its backend, its user and the log. One from a proxy in `trusted` is kept if it is up to 64 visible ASCII letters; any other is replaced.";
    "api" "trusted", api.trusted: Networks, Restart,
        "Proxies in front of this one, in CIDR notation: what they send in `X-Forwarded-*` and `Forwarded` is extended instead of dropped.";
    "api" "h2c", api.h2c: Switch, Restart,
        "Whether users may speak HTTP/2 at doors in the clear, by prior knowledge.";
    "api" "h2_streams", api.h2_streams: Number(1..=1000), Restart,
        "Most HTTP/2 streams of one user's connection at once.";
    "tls" "certificate", tls.certificates: Certificates, Now,
        "Certificates of the TLS doors, each a `[[tls.certificate]]` with the files `certificate` (a chain in PEM, the server's own first), `key` (in PEM, without a password) and, if there is one, `ocsp` (a response in DER). A user is given one that names the host it asks for, else the first. Read again on every reload.";
    "tls" "strict_sni", tls.strict_sni: Switch, Now,
        "Refuse users who ask for a host that no certificate names.";
    "tls" "ragged_end", tls.takes_ragged_ends: Word(RAGGED_ENDS), Now,
        "What the end of a TCP user's or backend's connection means when TLS has not announced it: `\"reset\"`, since it may have been cut off, or `\"end\"`. Users of HTTP say their lengths themselves.";
    "tls" "clients", tls.clients.demand: Word(DEMANDS), Now,
        "Whether users whose TLS ends here are asked for a certificate: `\"none\"`, `\"optional\"` or `\"required\"`. One that is shown must be good either way, and is told to the backends of API services in `Client-Cert` (RFC 9440). A service may say otherwise (`tls_clients`).";
    "tls" "client_ca", tls.clients.ca: File, Now,
        "File with the certificates, in PEM, of the authorities that vouch for users. Read again on every reload, as the lists are.";
    "tls" "client_crl", tls.clients.crl: Files, Now,
        "Files of the certificates that these authorities have revoked (CRL, in PEM or DER). With any, each authority on the way to a user's certificate needs one.";
    "tls" "client_chain", tls.clients.tells_chain: Switch, Now,
        "Whether backends are also told, in `Client-Cert-Chain`, the certificates between a user's and the authority.";
    "tls" "ticket_file", tls.ticket_file: File, Now,
        "File of keys with which users take up earlier connections, for several balancers that share their users: 2 to 16 of them, each 48 or 80 bytes in Base64 on a line of its own, the oldest first. The last but one seals, all of them open. `\"\"` makes keys here, new ones every 6 hours, and keeps them over a restart in the folder that systemd names in RUNTIME_DIRECTORY.";
    "tls" "handshake_ms", tls.handshake: Millis(10..=HOUR_MS), Now,
        "How long a TLS handshake may take in all.";
    "tls" "handshakes", tls.handshakes: Number(1..=1 << 20), Now,
        "Most TLS handshakes under way at once; each worker allows an even share, rounded up. Beyond that, whoever has not sent a whole ClientHello goes, longest first.";
    "backend_tls" "ca", backend_tls.ca: File, Now,
        "File of authorities in PEM, one of which must have signed the certificate of a backend that is reached by TLS; `\"\"` takes those that this host trusts. Read again on every reload.";
    "backend_tls" "verify", backend_tls.verifies: Word(VERIFIES), Now,
        "Whether such a certificate must be sound and for the backend's name or address: `\"full\"`, or `\"off\"`, which takes whoever answers for the backend.";
    "control" "allow", control.allow: Networks, Now,
        "Networks whose hosts may register, in CIDR notation; empty allows only this host.";
    "control" "secret_file", control.secret_file: File, Now,
        "File of shared secrets, one per line, any of which authenticates a backend; `\"\"` asks for none.";
    "cluster" "name", cluster.name: Name(""), Restart,
        "Name of the cluster whose balancers have one registry, the same at each of them; `\"\"` leaves this balancer alone.";
    "cluster" "node", cluster.node: Name("auto"), Restart,
        "What this balancer is called in the cluster; `\"auto\"`: as its host is.";
    "cluster" "endpoints", cluster.endpoints: Endpoints, Restart,
        "Members of the cluster's etcd (3.4 or newer, better 3.5.16), tried one after the other. Beyond loopback they need `secret_file`, or https with `user`.";
    "cluster" "user", cluster.user: Name(""), Restart,
        "Who this balancer is to etcd; `\"\"` if that asks nobody.";
    "cluster" "password_file", cluster.password_file: File, Restart,
        "File with the password of `user`.";
    "cluster" "ca_file", cluster.ca_file: File, Restart,
        "File with the certificates, in PEM, of the authorities that vouch for etcd's members; `\"\"` takes those that this host trusts.";
    "cluster" "cert_file", cluster.cert_file: File, Restart,
        "File with the certificate, in PEM, that is shown to etcd. With etcd's own users it must have no common name (CN).";
    "cluster" "key_file", cluster.key_file: File, Restart,
        "File with its key, in PEM, without a password.";
    "cluster" "secret_file", cluster.secret_file: File, Restart,
        "File of secrets that the balancers of the cluster share, one per line: the first seals what is written, and any of them opens it. The first also decides to which backend `\"source_hash\"` gives a user.";
    "cluster" "lease_ms", cluster.lease: Millis(2000..=HOUR_MS), Restart,
        "How long what this balancer has written outlives it in etcd.";
    "cluster" "orphan_ms", cluster.orphan: Millis(1000..=HOUR_MS), Restart,
        "How long after that its backends are still served by the others. The time counts only while etcd works.";
    "admin" "token_file", admin.token_file: File, Now,
        "File of tokens, one per line, any of which allows changes over the admin door from this host; `\"\"` allows none.";
    "admin" "socket", admin.socket: File, Restart,
        "Unix socket over which root and the balancer's own user may make changes without a token; `\"\"` opens none.";
    "log" "level", log.level: Word(LEVELS), Now,
        "Least severe level that is written: `\"error\"`, `\"warn\"`, `\"info\"`, `\"debug\"` or `\"trace\"`.";
    "log" "format", log.format: Word(FORMATS), Restart,
        "`\"text\"` for people, `\"json\"` for machines, one object per line.";
    "log" "requests_per_second", log.requests_per_second: Number(0..=10_000_000), Restart,
        "Most lines about API requests per second and worker; the rest are only counted. 0 writes none.";
};

pub(super) const POLICIES: &[(&str, Policy)] = &[
    ("round_robin", Policy::RoundRobin),
    ("least_sessions", Policy::LeastSessions),
    ("p2c", Policy::TwoChoices),
    ("source_hash", Policy::SourceHash),
];

pub(super) const HASHES: &[(&str, HashBy)] =
    &[("address", HashBy::Address), ("address_port", HashBy::AddressPort)];

pub(super) const LOSSES: &[(&str, OnBackendLoss)] =
    &[("keep", OnBackendLoss::Keep), ("close", OnBackendLoss::Close)];

const UDP_LOSSES: &[(&str, OnUdpLoss)] =
    &[("move", OnUdpLoss::Move), ("drop", OnUdpLoss::Drop), ("keep", OnUdpLoss::Keep)];

const RAGGED_ENDS: &[(&str, bool)] = &[("reset", false), ("end", true)];

const VERIFIES: &[(&str, bool)] = &[("full", true), ("off", false)];
pub(super) const DEMANDS: &[(&str, Demand)] =
    &[("none", Demand::None), ("optional", Demand::Optional), ("required", Demand::Required)];

const LEVELS: &[(&str, tracing::Level)] = &[
    ("error", tracing::Level::ERROR),
    ("warn", tracing::Level::WARN),
    ("info", tracing::Level::INFO),
    ("debug", tracing::Level::DEBUG),
    ("trace", tracing::Level::TRACE),
];

const FORMATS: &[(&str, LogFormat)] = &[("text", LogFormat::Text), ("json", LogFormat::Json)];

#[cfg(test)]
mod tests {
    use super::*;

    fn key(section: &str, name: &str) -> &'static Key<Config> {
        find(KEYS, section, name).unwrap()
    }

    #[test]
    fn a_number_out_of_range_is_refused_with_the_range() {
        let mut config = Config::default();
        let sessions = key("limits", "sessions");
        for (given, fits) in [(0, false), (1, true), (16 << 20, true), ((16 << 20) + 1, false)] {
            let outcome = sessions.set(&mut config, &Given::Number(given));
            assert_eq!(outcome.is_ok(), fits, "{given}");
        }
        let said = sessions.set(&mut config, &Given::Number(-5)).unwrap_err();
        assert_eq!(said, "takes a number from 1 to 16777216 or \"auto\", not -5");
    }

    /// The least and the greatest number of every setting that takes one. Written out, so that a limit
    /// cannot shift unnoticed.
    const RANGES: &[(&str, i64, i64)] = &[
        ("workers", 1, 128),
        ("health.interval_ms", 10, 3_600_000),
        ("health.timeout_ms", 1, 3_600_000),
        ("health.misses", 1, 100),
        ("timeouts.connect_ms", 1, 3_600_000),
        ("timeouts.tcp_idle_ms", 10, 2_592_000_000),
        ("timeouts.half_close_ms", 10, 2_592_000_000),
        ("timeouts.udp_idle_ms", 10, 86_400_000),
        ("timeouts.drain_ms", 0, 86_400_000),
        ("limits.sessions", 1, 16_777_216),
        ("limits.control_connections", 1, 65_536),
        ("limits.buffer_bytes", 1_048_576, 68_719_476_736),
        ("limits.udp_sessions", 1, 16_777_216),
        ("limits.udp_sockets", 0, 131_070),
        ("udp.responses", 0, 4_294_967_295),
        ("udp.quarantine_ms", 0, 86_400_000),
        ("udp.source_sessions", 0, 4_294_967_295),
        ("udp.source_new_per_second", 0, 4_294_967_295),
        ("api.line_bytes", 256, 65_536),
        ("api.field_bytes", 256, 65_536),
        ("api.head_bytes", 1024, 262_144),
        ("api.fields", 1, 100),
        ("api.body_bytes", 0, i64::MAX),
        ("api.head_ms", 10, 3_600_000),
        ("api.body_ms", 10, 3_600_000),
        ("api.answer_ms", 10, 86_400_000),
        ("api.idle_ms", 10, 86_400_000),
        ("api.tunnel_idle_ms", 10, 2_592_000_000),
        ("api.upstream_idle_ms", 1, 3_600_000),
        ("api.upstream_idle_max", 0, 65_536),
        ("api.upstream_private_max", 0, 65_536),
        ("api.retries", 0, 10),
        ("api.h2_streams", 1, 1000),
        ("tls.handshake_ms", 10, 3_600_000),
        ("tls.handshakes", 1, 1_048_576),
        ("cluster.lease_ms", 2000, 3_600_000),
        ("cluster.orphan_ms", 1000, 3_600_000),
        ("log.requests_per_second", 0, 10_000_000),
    ];

    #[test]
    fn every_number_is_accepted_within_its_range_and_nowhere_else() {
        let mut config = Config::default();
        for (path, least, greatest) in RANGES {
            let key = KEYS.iter().find(|key| key.path() == *path).expect(path);
            let mut accepts = |number| key.set(&mut config, &Given::Number(number)).is_ok();
            assert!(accepts(*least) && accepts(*greatest), "{path} at its limits");
            assert!(!accepts(least - 1), "{path} below {least}");
            assert!(greatest.checked_add(1).is_none_or(|above| !accepts(above)), "{path}");
        }
        let amounts = [" number", "a time", "a size"];
        let takes_numbers = |key: &&Key<Config>| amounts.iter().any(|it| key.takes().contains(it));
        let paths: Vec<String> = KEYS.iter().filter(takes_numbers).map(Key::path).collect();
        assert_eq!(paths, RANGES.iter().map(|range| range.0).collect::<Vec<_>>());
    }

    #[test]
    fn udp_settings_say_what_they_take() {
        let text = |text: &str| Given::Text(text.to_owned());
        let mut config = Config::default();
        for (name, given, shown) in [
            ("responses", Given::Number(1), "1"),
            ("responses", Given::Number(0), "0"),
            ("quarantine_ms", Given::Number(500), "\"500ms\""),
            ("quarantine_ms", text("2m"), "\"2m\""),
            ("quarantine_ms", text("auto"), "\"auto\""),
            ("gro", Given::Switch(false), "false"),
            ("on_backend_loss", text("keep"), "\"keep\""),
        ] {
            key("udp", name).set(&mut config, &given).unwrap();
            assert_eq!(key("udp", name).show(&config), shown, "{name}");
        }
        for (name, given, said) in [
            ("gro", Given::Number(1), "takes true or false, not 1"),
            ("responses", Given::Number(-1), "takes a whole number from 0 to 4294967295, not -1"),
            (
                "on_backend_loss",
                text("close"),
                "takes one of \"move\", \"drop\", \"keep\", not \"close\"",
            ),
        ] {
            assert_eq!(key("udp", name).set(&mut config, &given).unwrap_err(), said);
        }
        let wrong = key("udp", "quarantine_ms").set(&mut config, &Given::Switch(true));
        assert!(wrong.unwrap_err().ends_with("or \"auto\", not true"));
    }

    #[test]
    fn paths_are_unique_and_sections_contiguous() {
        let paths: Vec<String> = KEYS.iter().map(Key::path).collect();
        let mut sorted = paths.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), paths.len());
        let mut sections: Vec<&str> = KEYS.iter().map(|key| key.section).collect();
        sections.dedup();
        let all = [
            "",
            "listen",
            "balance",
            "health",
            "timeouts",
            "limits",
            "udp",
            "api",
            "tls",
            "backend_tls",
            "control",
            "cluster",
            "admin",
            "log",
        ];
        assert_eq!(sections, all);
    }
}
