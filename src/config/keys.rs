//! The one table of settings. A row is a key of the file: its name, what kind of value it takes, where
//! the value goes, and when a change takes effect. The reference, `deploy/lb.toml`, what a reload takes
//! over and the errors derive from it. How a value is read is its kind's ([`super::kinds`]); how keys
//! relate is `rules`'.

use super::kinds::{
    Addresses, Bytes, Door, File, Given, Kind, Millis, MillisOrAuto, Networks, Number,
    NumberOrAuto, Switch, Via, Word,
};
use super::{Config, LogFormat, OnBackendLoss, OnUdpLoss, Policy};
use crate::http::head;

/// Workers at most; a session names its worker in eight bits.
pub const WORKERS_MAX: usize = 128;
/// Sessions at most, all workers together.
pub const SESSIONS_MAX: usize = 16 << 20;
/// Field lines that a head can be read with.
const FIELDS_MAX: u64 = head::FIELDS_MAX as u64;
/// Local ports of one address, in each family.
const UDP_SOCKETS_MAX: u64 = 2 * 65_535;
const U32_MAX: u64 = u32::MAX as u64;
const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

/// When a changed setting takes effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// With a reload.
    Now,
    /// When the balancer starts anew: it is bound to sockets, threads or memory made at the start.
    Restart,
}

/// One setting of a `T`, which is a whole configuration or one table of it.
pub struct Key<T> {
    /// The table in the file, empty for the keys above all tables.
    pub section: &'static str,
    pub name: &'static str,
    pub effect: Effect,
    /// What it does, for the reference and the shipped file.
    pub help: &'static str,
    takes: fn() -> String,
    set: fn(&mut T, &Given) -> Result<(), String>,
    show: fn(&T) -> String,
    adopt: fn(&mut T, &T),
}

impl<T> Key<T> {
    /// `section.name`, or the bare name above all tables.
    pub fn path(&self) -> String {
        if self.section.is_empty() {
            self.name.to_owned()
        } else {
            format!("{}.{}", self.section, self.name)
        }
    }

    /// What it takes, as it continues "takes ...".
    pub fn takes(&self) -> String {
        (self.takes)()
    }

    /// Puts a value where it belongs.
    ///
    /// # Errors
    /// Half a sentence that follows the name of the key and says what it takes.
    pub fn set(&self, config: &mut T, given: &Given) -> Result<(), String> {
        (self.set)(config, given).map_err(|found| format!("takes {}, not {found}", self.takes()))
    }

    /// The value that `config` has, as one would write it in the file.
    pub fn show(&self, config: &T) -> String {
        (self.show)(config)
    }

    /// Copies this setting alone from `wanted`.
    pub fn adopt(&self, config: &mut T, wanted: &T) {
        (self.adopt)(config, wanted);
    }
}

/// The key at `section.name` of a table of keys, if there is one.
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

/// What a kind says of itself; the field tells which of its types is meant.
fn takes_of<T, V>(kind: &impl Kind<V>, _field: fn(&T) -> &V) -> String {
    kind.takes()
}

/// Every setting of the balancer, in the order in which it is shown.
pub const KEYS: &[Key<Config>] = keys! { Config;
    "" "workers", workers: NumberOrAuto(1..=WORKERS_MAX as u64), Restart,
        "Worker threads; `\"auto\"` takes one less than the machine has cores, at least one.";
    "listen" "tcp", listen.tcp: Door, Restart,
        "TCP users. An address with its port, a bare port for all addresses (IPv4 and IPv6), or `\"off\"`.";
    "listen" "udp", listen.udp: Door, Restart,
        "UDP users; written like `tcp`.";
    "listen" "api", listen.api: Door, Restart,
        "API users (HTTP/1.1); written like `tcp`.";
    "listen" "control", listen.control: Door, Restart,
        "Where backends register. Beyond loopback it needs `control.allow` or `control.secret_file`.";
    "listen" "admin", listen.admin: Door, Restart,
        "Status, sessions and metrics for operators; written like `tcp`.";
    "balance" "policy", balance.policy: Word(POLICIES), Now,
        "Who gets the next user: `\"round_robin\"`, `\"least_sessions\"` or `\"source_hash\"`.";
    "balance" "on_backend_loss", balance.on_backend_loss: Word(LOSSES), Now,
        "Running sessions of a backend whose control connection is lost: `\"keep\"` or `\"close\"`.";
    "health" "interval_ms", health.interval: Millis(10..=HOUR_MS), Now,
        "How often a backend is asked `hello`.";
    "health" "timeout_ms", health.timeout: Millis(1..=HOUR_MS), Now,
        "How long the answer to a `hello` may take; less than `interval_ms`.";
    "health" "misses", health.misses: Number(1..=100), Now,
        "Unanswered hellos in a row after which a backend has left.";
    "timeouts" "connect_ms", timeouts.connect: Millis(1..=HOUR_MS), Now,
        "A connection to a backend, before another backend is tried.";
    "timeouts" "tcp_idle_ms", timeouts.tcp_idle: Millis(10..=30 * DAY_MS), Now,
        "A TCP session on which nothing moves either way.";
    "timeouts" "half_close_ms", timeouts.half_close: Millis(10..=30 * DAY_MS), Now,
        "A TCP session of which one side has finished and the other sends nothing.";
    "timeouts" "udp_idle_ms", timeouts.udp_idle: Millis(10..=DAY_MS), Now,
        "A UDP session in which no datagram passes either way.";
    "timeouts" "drain_ms", timeouts.drain: Millis(0..=DAY_MS), Now,
        "What running sessions get to end by themselves after SIGTERM.";
    "limits" "sessions", limits.sessions: NumberOrAuto(1..=SESSIONS_MAX as u64), Now,
        "Sessions at once, all workers together; a user beyond it is refused and counted. `\"auto\"` takes what the descriptors are enough for, 100000 at most.";
    "limits" "control_connections", limits.control_connections: Number(1..=65_536), Now,
        "Control connections at once.";
    "limits" "buffer_bytes", limits.buffer_bytes: Bytes(1 << 20..=64 << 30), Restart,
        "Bytes of relay buffers, all workers together; with an API door, an eighth of them is for heads under way.";
    "limits" "udp_sessions", limits.udp_sessions: Number(1..=SESSIONS_MAX as u64), Restart,
        "UDP sessions at once, all workers together, apart from `sessions`.";
    "limits" "udp_sockets", limits.udp_sockets: Number(0..=UDP_SOCKETS_MAX), Restart,
        "Sockets towards UDP backends, all workers together: what one backend can have of sessions and of ports that rest, for each of `udp.local_addresses`. 0: as descriptors and local ports allow.";
    "udp" "on_backend_loss", udp.on_backend_loss: Word(UDP_LOSSES), Restart,
        "Running UDP sessions of a backend that is lost: `\"move\"`, `\"drop\"` or `\"keep\"`.";
    "udp" "responses", udp.responses: Number(0..=U32_MAX), Restart,
        "Ends a session once each datagram of the user was answered this often; 0 leaves that to `udp_idle_ms`.";
    "udp" "quarantine_ms", udp.quarantine: MillisOrAuto(0..=DAY_MS), Restart,
        "How long a backend and a local port rest after a session, so that a late reply reaches nobody else, or less where ports run short; `\"auto\"` is twice `udp_idle_ms`, or 10 s with `responses`.";
    "udp" "source_sessions", udp.source_sessions: Number(0..=U32_MAX), Restart,
        "Sessions that one source (an IPv4 address or an IPv6 /64) may hold; each worker allows an even share of them, rounded up. 0 sets no limit.";
    "udp" "source_new_per_second", udp.source_new_per_second: Number(0..=U32_MAX), Restart,
        "Sessions that one source may begin in a second, shared out among the workers likewise; 0 sets no limit.";
    "udp" "local_addresses", udp_local_addresses: Addresses, Restart,
        "Addresses of this host from which datagrams go to backends. Each of them lets the same sockets and ports hold as many sessions again; empty leaves the address to the kernel.";
    "udp" "gro", udp.gro: Switch, Restart,
        "Take and send several datagrams of one size at once where the kernel can (GRO and GSO).";
    "api" "line_bytes", api.line_bytes: Bytes(256..=1 << 16), Restart,
        "A request line at most, without its end; 414 beyond it, and 501 for its method.";
    "api" "field_bytes", api.field_bytes: Bytes(256..=1 << 16), Restart,
        "A field line of a head at most; 431 beyond it.";
    "api" "head_bytes", api.head_bytes: Bytes(1024..=1 << 18), Restart,
        "A whole head at most; 431 beyond it.";
    "api" "fields", api.fields: Number(1..=FIELDS_MAX), Restart,
        "Field lines in a head at most; 431 beyond it.";
    "api" "body_bytes", api.body_bytes: Bytes(0..=i64::MAX as u64), Restart,
        "Content of one request at most, 413 beyond it; 0 sets no limit.";
    "api" "head_ms", api.head_timeout: Millis(10..=HOUR_MS), Restart,
        "A whole request head, from its first byte or the connection's beginning; 408 after it.";
    "api" "body_ms", api.body_timeout: Millis(10..=HOUR_MS), Restart,
        "A body of which nothing moves, either way.";
    "api" "answer_ms", api.answer_timeout: Millis(10..=DAY_MS), Restart,
        "A response's head, once the request has been sent; 504 after it.";
    "api" "idle_ms", api.idle_timeout: Millis(10..=DAY_MS), Restart,
        "A user's connection between two requests.";
    "api" "tunnel_idle_ms", api.tunnel_idle: Millis(10..=30 * DAY_MS), Restart,
        "A tunnel (WebSocket) through which nothing moves.";
    "api" "upstream_idle_ms", api.upstream_idle: Millis(1..=HOUR_MS), Restart,
        "A connection to a backend between two requests; shorter than what the backends wait themselves.";
    "api" "upstream_idle_max", api.upstream_idle_max: Number(0..=65536), Restart,
        "Connections to one backend that each worker keeps for later requests.";
    "api" "upstream_private_max", api.upstream_private_max: Number(0..=65536), Restart,
        "Connections to one backend that each worker keeps for users who logged in on them (NTLM, Negotiate).";
    "api" "retries", api.retries: Number(0..=10), Restart,
        "Further backends that a request is offered when it may be repeated.";
    "api" "via", api.via: Via, Restart,
        "This balancer's name in `Via`, unlike any other's, so that a loop is told from a chain; `\"auto\"` makes one up at each start.";
    "api" "trusted", api.trusted: Networks, Restart,
        "Proxies in front of this one, in CIDR notation: what they say in `X-Forwarded-*` and `Forwarded` is added to instead of dropped.";
    "control" "allow", control.allow: Networks, Now,
        "Networks whose hosts may register, in CIDR notation; empty allows this host only.";
    "control" "secret_file", control.secret_file: File, Now,
        "File of shared secrets, one a line, any of which proves a backend; `\"\"` asks for none.";
    "admin" "token_file", admin.token_file: File, Now,
        "File of tokens, one a line, any of which allows changes over the admin door from this host; `\"\"` allows none.";
    "admin" "socket", admin.socket: File, Restart,
        "Unix socket over which the balancer's own user and root may make changes without a token; `\"\"` opens none.";
    "log" "level", log.level: Word(LEVELS), Now,
        "The least important line that is written: `\"error\"`, `\"warn\"`, `\"info\"`, `\"debug\"` or `\"trace\"`.";
    "log" "format", log.format: Word(FORMATS), Restart,
        "`\"text\"` for people, `\"json\"` for machines, one object a line.";
    "log" "requests_per_second", log.requests_per_second: Number(0..=10_000_000), Restart,
        "Lines about API requests in a second, each worker; the rest is counted only. 0 writes none.";
};

const POLICIES: &[(&str, Policy)] = &[
    ("round_robin", Policy::RoundRobin),
    ("least_sessions", Policy::LeastSessions),
    ("source_hash", Policy::SourceHash),
];

const LOSSES: &[(&str, OnBackendLoss)] =
    &[("keep", OnBackendLoss::Keep), ("close", OnBackendLoss::Close)];

const UDP_LOSSES: &[(&str, OnUdpLoss)] =
    &[("move", OnUdpLoss::Move), ("drop", OnUdpLoss::Drop), ("keep", OnUdpLoss::Keep)];

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
    fn a_number_beyond_its_range_is_told_the_range() {
        let mut config = Config::default();
        let sessions = key("limits", "sessions");
        for (given, fits) in [(0, false), (1, true), (16 << 20, true), ((16 << 20) + 1, false)] {
            let outcome = sessions.set(&mut config, &Given::Number(given));
            assert_eq!(outcome.is_ok(), fits, "{given}");
        }
        let said = sessions.set(&mut config, &Given::Number(-5)).unwrap_err();
        assert_eq!(said, "takes a number from 1 to 16777216 or \"auto\", not -5");
    }

    #[test]
    fn udp_settings_say_what_they_take() {
        let text = |text: &str| Given::Text(text.to_owned());
        let mut config = Config::default();
        for (name, given, shown) in [
            ("responses", Given::Number(1), "1"),
            ("responses", Given::Number(0), "0"),
            ("quarantine_ms", Given::Number(500), "500"),
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
    fn no_two_rows_have_the_same_path_and_sections_stand_together() {
        let paths: Vec<String> = KEYS.iter().map(Key::path).collect();
        let mut sorted = paths.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), paths.len());
        let mut sections: Vec<&str> = KEYS.iter().map(|key| key.section).collect();
        sections.dedup();
        let all = [
            "", "listen", "balance", "health", "timeouts", "limits", "udp", "api", "control",
            "admin", "log",
        ];
        assert_eq!(sections, all);
    }
}
