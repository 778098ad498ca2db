//! The one table of settings: a row here is a key of the file, its default in the README and in
//! `deploy/lb.toml`, and where its value goes. Owns the ranges; how a value is read is `values`'. Knows
//! no file, no flag, and nothing about how keys relate (`rules` does).

mod values;

use std::num::NonZeroU64;

use super::{Config, LogFormat, OnBackendLoss, OnUdpLoss, Policy};
use crate::http::head;
pub use values::{Given, door};
use values::{
    addresses, count, millis, networks, number, one_of, path, quarantine, sessions, show_addresses,
    show_count, show_door, show_millis, show_networks, show_one, show_path, switch, via, workers,
};

/// Workers at most; a session names its worker in eight bits.
pub const WORKERS_MAX: usize = 128;
/// Sessions at most, all workers together.
pub const SESSIONS_MAX: usize = 16 << 20;
/// Field lines that a head can be read with.
const FIELDS_MAX: u64 = head::FIELDS_MAX as u64;
/// Bytes of a name in `Via`.
const VIA_BYTES_MAX: usize = 64;
/// Local ports of one address, in each family.
const UDP_SOCKETS_MAX: u64 = 2 * 65_535;
/// Addresses that datagrams are sent from.
const ADDRESSES_MAX: usize = 16;
const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

/// One setting.
pub struct Key {
    /// The table in the file, empty for the keys above all tables.
    pub section: &'static str,
    pub name: &'static str,
    /// What it does, for the README and the shipped file.
    pub help: &'static str,
    set: fn(&mut Config, &Given) -> Result<(), String>,
    show: fn(&Config) -> String,
}

impl Key {
    /// `section.name`, or the bare name above all tables.
    pub fn path(&self) -> String {
        if self.section.is_empty() {
            self.name.to_owned()
        } else {
            format!("{}.{}", self.section, self.name)
        }
    }

    /// Puts a value where it belongs.
    ///
    /// # Errors
    /// Half a sentence that follows the name of the key and says what it takes.
    pub fn set(&self, config: &mut Config, given: &Given) -> Result<(), String> {
        (self.set)(config, given)
    }

    /// The value that `config` has, as one would write it in the file.
    pub fn show(&self, config: &Config) -> String {
        (self.show)(config)
    }
}

/// The key at `section.name`, if there is one.
pub fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// Every setting, in the order in which it is shown.
pub const KEYS: &[Key] = &[
    Key {
        section: "",
        name: "workers",
        help: "Worker threads; `\"auto\"` takes one less than the machine has cores, at least one.",
        set: |config, given| workers(given).map(|value| config.workers = value),
        show: |config| config.workers.map_or("\"auto\"".to_owned(), |count| count.to_string()),
    },
    Key {
        section: "listen",
        name: "tcp",
        help: "TCP users. An address with its port, a bare port for all addresses (IPv4 and IPv6), or `\"off\"`.",
        set: |config, given| door(given).map(|value| config.listen.tcp = value),
        show: |config| show_door(config.listen.tcp),
    },
    Key {
        section: "listen",
        name: "udp",
        help: "UDP users; written like `tcp`.",
        set: |config, given| door(given).map(|value| config.listen.udp = value),
        show: |config| show_door(config.listen.udp),
    },
    Key {
        section: "listen",
        name: "api",
        help: "API users (HTTP/1.1); written like `tcp`.",
        set: |config, given| door(given).map(|value| config.listen.api = value),
        show: |config| show_door(config.listen.api),
    },
    Key {
        section: "listen",
        name: "control",
        help: "Where backends register. Beyond loopback it needs `control.allow` or `control.secret_file`.",
        set: |config, given| door(given).map(|value| config.listen.control = value),
        show: |config| show_door(config.listen.control),
    },
    Key {
        section: "listen",
        name: "admin",
        help: "Status, sessions and metrics for operators; written like `tcp`.",
        set: |config, given| door(given).map(|value| config.listen.admin = value),
        show: |config| show_door(config.listen.admin),
    },
    Key {
        section: "balance",
        name: "policy",
        help: "Who gets the next user: `\"round_robin\"`, `\"least_sessions\"` or `\"source_hash\"`.",
        set: |config, given| one_of(given, POLICIES).map(|value| config.balance.policy = value),
        show: |config| show_one(POLICIES, config.balance.policy),
    },
    Key {
        section: "balance",
        name: "on_backend_loss",
        help: "Running sessions of a backend whose control connection is lost: `\"keep\"` or `\"close\"`.",
        set: |config, given| {
            one_of(given, LOSSES).map(|value| config.balance.on_backend_loss = value)
        },
        show: |config| show_one(LOSSES, config.balance.on_backend_loss),
    },
    Key {
        section: "health",
        name: "interval_ms",
        help: "How often a backend is asked `hello`.",
        set: |config, given| {
            millis(given, 10..=HOUR_MS).map(|value| config.health.interval = value)
        },
        show: |config| show_millis(config.health.interval),
    },
    Key {
        section: "health",
        name: "timeout_ms",
        help: "How long the answer to a `hello` may take; less than `interval_ms`.",
        set: |config, given| millis(given, 1..=HOUR_MS).map(|value| config.health.timeout = value),
        show: |config| show_millis(config.health.timeout),
    },
    Key {
        section: "health",
        name: "misses",
        help: "Unanswered hellos in a row after which a backend has left.",
        set: |config, given| {
            number(given, 1..=100, "").map(|value| config.health.misses = value as u32)
        },
        show: |config| config.health.misses.to_string(),
    },
    Key {
        section: "timeouts",
        name: "connect_ms",
        help: "A connection to a backend, before another backend is tried.",
        set: |config, given| {
            millis(given, 1..=HOUR_MS).map(|value| config.timeouts.connect = value)
        },
        show: |config| show_millis(config.timeouts.connect),
    },
    Key {
        section: "timeouts",
        name: "tcp_idle_ms",
        help: "A TCP session on which nothing moves either way.",
        set: |config, given| {
            millis(given, 10..=30 * DAY_MS).map(|value| config.timeouts.tcp_idle = value)
        },
        show: |config| show_millis(config.timeouts.tcp_idle),
    },
    Key {
        section: "timeouts",
        name: "half_close_ms",
        help: "A TCP session of which one side has finished and the other sends nothing.",
        set: |config, given| {
            millis(given, 10..=30 * DAY_MS).map(|value| config.timeouts.half_close = value)
        },
        show: |config| show_millis(config.timeouts.half_close),
    },
    Key {
        section: "timeouts",
        name: "udp_idle_ms",
        help: "A UDP session in which no datagram passes either way.",
        set: |config, given| {
            millis(given, 10..=DAY_MS).map(|value| config.timeouts.udp_idle = value)
        },
        show: |config| show_millis(config.timeouts.udp_idle),
    },
    Key {
        section: "timeouts",
        name: "drain_ms",
        help: "What running sessions get to end by themselves after SIGTERM.",
        set: |config, given| millis(given, 0..=DAY_MS).map(|value| config.timeouts.drain = value),
        show: |config| show_millis(config.timeouts.drain),
    },
    Key {
        section: "limits",
        name: "sessions",
        help: "Sessions at once, all workers together; a user beyond it is refused and counted. `\"auto\"` takes what the descriptors are enough for, 100000 at most.",
        set: |config, given| sessions(given).map(|value| config.limits.sessions = value),
        show: |config| match config.limits.sessions {
            0 => "\"auto\"".to_owned(),
            sessions => sessions.to_string(),
        },
    },
    Key {
        section: "limits",
        name: "control_connections",
        help: "Control connections at once.",
        set: |config, given| {
            number(given, 1..=65_536, "")
                .map(|value| config.limits.control_connections = value as usize)
        },
        show: |config| config.limits.control_connections.to_string(),
    },
    Key {
        section: "limits",
        name: "buffer_bytes",
        help: "Bytes of relay buffers, all workers together.",
        set: |config, given| {
            number(given, 1 << 20..=64 << 30, " of bytes")
                .map(|value| config.limits.buffer_bytes = value as usize)
        },
        show: |config| config.limits.buffer_bytes.to_string(),
    },
    Key {
        section: "limits",
        name: "udp_sessions",
        help: "UDP sessions at once, all workers together, apart from `sessions`.",
        set: |config, given| {
            number(given, 1..=SESSIONS_MAX as u64, "")
                .map(|value| config.limits.udp_sessions = value as usize)
        },
        show: |config| config.limits.udp_sessions.to_string(),
    },
    Key {
        section: "limits",
        name: "udp_sockets",
        help: "Sockets towards UDP backends, all workers together: what one backend can have of sessions and of ports that rest, for each of `udp.local_addresses`. 0: as descriptors and local ports allow.",
        set: |config, given| {
            number(given, 0..=UDP_SOCKETS_MAX, "")
                .map(|value| config.limits.udp_sockets = value as usize)
        },
        show: |config| config.limits.udp_sockets.to_string(),
    },
    Key {
        section: "udp",
        name: "on_backend_loss",
        help: "Running UDP sessions of a backend that is lost: `\"move\"`, `\"drop\"` or `\"keep\"`.",
        set: |config, given| {
            one_of(given, UDP_LOSSES).map(|value| config.udp.on_backend_loss = value)
        },
        show: |config| show_one(UDP_LOSSES, config.udp.on_backend_loss),
    },
    Key {
        section: "udp",
        name: "responses",
        help: "Ends a session once each datagram of the user was answered this often; 0 leaves that to `udp_idle_ms`.",
        set: |config, given| count(given).map(|value| config.udp.responses = value),
        show: |config| show_count(config.udp.responses),
    },
    Key {
        section: "udp",
        name: "quarantine_ms",
        help: "How long a backend and a local port rest after a session, so that a late reply reaches nobody else, or less where ports run short; `\"auto\"` is twice `udp_idle_ms`, or 10 s with `responses`.",
        set: |config, given| quarantine(given).map(|value| config.udp.quarantine = value),
        show: |config| config.udp.quarantine.map_or("\"auto\"".to_owned(), show_millis),
    },
    Key {
        section: "udp",
        name: "source_sessions",
        help: "Sessions that one source (an IPv4 address or an IPv6 /64) may hold; each worker allows an even share of them, rounded up. 0 sets no limit.",
        set: |config, given| count(given).map(|value| config.udp.source_sessions = value),
        show: |config| show_count(config.udp.source_sessions),
    },
    Key {
        section: "udp",
        name: "source_new_per_second",
        help: "Sessions that one source may begin in a second, shared out among the workers likewise; 0 sets no limit.",
        set: |config, given| count(given).map(|value| config.udp.source_new_per_second = value),
        show: |config| show_count(config.udp.source_new_per_second),
    },
    Key {
        section: "udp",
        name: "local_addresses",
        help: "Addresses of this host from which datagrams go to backends. Each of them lets the same sockets and ports hold as many sessions again; empty leaves the address to the kernel.",
        set: |config, given| addresses(given).map(|value| config.udp_local_addresses = value),
        show: |config| show_addresses(&config.udp_local_addresses),
    },
    Key {
        section: "udp",
        name: "gro",
        help: "Take and send several datagrams of one size at once where the kernel can (GRO and GSO).",
        set: |config, given| switch(given).map(|value| config.udp.gro = value),
        show: |config| config.udp.gro.to_string(),
    },
    Key {
        section: "api",
        name: "line_bytes",
        help: "A request line at most, without its end; 414 beyond it, and 501 for its method.",
        set: |config, given| {
            number(given, 256..=1 << 16, " of bytes")
                .map(|value| config.api.line_bytes = value as usize)
        },
        show: |config| config.api.line_bytes.to_string(),
    },
    Key {
        section: "api",
        name: "field_bytes",
        help: "A field line of a head at most; 431 beyond it.",
        set: |config, given| {
            number(given, 256..=1 << 16, " of bytes")
                .map(|value| config.api.field_bytes = value as usize)
        },
        show: |config| config.api.field_bytes.to_string(),
    },
    Key {
        section: "api",
        name: "head_bytes",
        help: "A whole head at most; 431 beyond it.",
        set: |config, given| {
            number(given, 1024..=1 << 18, " of bytes")
                .map(|value| config.api.head_bytes = value as usize)
        },
        show: |config| config.api.head_bytes.to_string(),
    },
    Key {
        section: "api",
        name: "fields",
        help: "Field lines in a head at most; 431 beyond it.",
        set: |config, given| {
            number(given, 1..=FIELDS_MAX, "").map(|value| config.api.fields = value as usize)
        },
        show: |config| config.api.fields.to_string(),
    },
    Key {
        section: "api",
        name: "body_bytes",
        help: "Content of one request at most, 413 beyond it; 0 sets no limit.",
        set: |config, given| {
            number(given, 0..=i64::MAX as u64, " of bytes")
                .map(|value| config.api.body_bytes = NonZeroU64::new(value))
        },
        show: |config| config.api.body_bytes.map_or(0, NonZeroU64::get).to_string(),
    },
    Key {
        section: "api",
        name: "head_ms",
        help: "A whole request head, from its first byte or the connection's beginning; 408 after it.",
        set: |config, given| {
            millis(given, 10..=HOUR_MS).map(|value| config.api.head_timeout = value)
        },
        show: |config| show_millis(config.api.head_timeout),
    },
    Key {
        section: "api",
        name: "body_ms",
        help: "A body of which nothing moves, either way.",
        set: |config, given| {
            millis(given, 10..=HOUR_MS).map(|value| config.api.body_timeout = value)
        },
        show: |config| show_millis(config.api.body_timeout),
    },
    Key {
        section: "api",
        name: "answer_ms",
        help: "A response's head, once the request has been sent; 504 after it.",
        set: |config, given| {
            millis(given, 10..=DAY_MS).map(|value| config.api.answer_timeout = value)
        },
        show: |config| show_millis(config.api.answer_timeout),
    },
    Key {
        section: "api",
        name: "idle_ms",
        help: "A user's connection between two requests.",
        set: |config, given| {
            millis(given, 10..=DAY_MS).map(|value| config.api.idle_timeout = value)
        },
        show: |config| show_millis(config.api.idle_timeout),
    },
    Key {
        section: "api",
        name: "tunnel_idle_ms",
        help: "A tunnel (WebSocket) through which nothing moves.",
        set: |config, given| {
            millis(given, 10..=30 * DAY_MS).map(|value| config.api.tunnel_idle = value)
        },
        show: |config| show_millis(config.api.tunnel_idle),
    },
    Key {
        section: "api",
        name: "upstream_idle_ms",
        help: "A connection to a backend between two requests; shorter than what the backends wait themselves.",
        set: |config, given| {
            millis(given, 1..=HOUR_MS).map(|value| config.api.upstream_idle = value)
        },
        show: |config| show_millis(config.api.upstream_idle),
    },
    Key {
        section: "api",
        name: "upstream_idle_max",
        help: "Connections to one backend that each worker keeps for later requests.",
        set: |config, given| {
            number(given, 0..=65536, "").map(|value| config.api.upstream_idle_max = value as usize)
        },
        show: |config| config.api.upstream_idle_max.to_string(),
    },
    Key {
        section: "api",
        name: "retries",
        help: "Further backends that a request is offered when it may be repeated.",
        set: |config, given| {
            number(given, 0..=10, "").map(|value| config.api.retries = value as u8)
        },
        show: |config| config.api.retries.to_string(),
    },
    Key {
        section: "api",
        name: "via",
        help: "This balancer's name in `Via`, unlike any other's, so that a loop is told from a chain; `\"auto\"` makes one up at each start.",
        set: |config, given| via(given).map(|value| config.api.via = value),
        show: |config| format!("\"{}\"", config.api.via.as_deref().unwrap_or("auto")),
    },
    Key {
        section: "api",
        name: "trusted",
        help: "Proxies in front of this one, in CIDR notation: what they say in `X-Forwarded-*` and `Forwarded` is added to instead of dropped.",
        set: |config, given| networks(given).map(|value| config.api.trusted = value),
        show: |config| show_networks(&config.api.trusted),
    },
    Key {
        section: "control",
        name: "allow",
        help: "Networks whose hosts may register, in CIDR notation; empty allows this host only.",
        set: |config, given| networks(given).map(|value| config.control.allow = value),
        show: |config| show_networks(&config.control.allow),
    },
    Key {
        section: "control",
        name: "secret_file",
        help: "File of shared secrets, one a line, any of which proves a backend; `\"\"` asks for none.",
        set: |config, given| path(given).map(|value| config.control.secret_file = value),
        show: |config| show_path(config.control.secret_file.as_deref()),
    },
    Key {
        section: "admin",
        name: "token_file",
        help: "File of tokens, one a line, any of which allows changes over the admin door from this host; `\"\"` allows none.",
        set: |config, given| path(given).map(|value| config.admin.token_file = value),
        show: |config| show_path(config.admin.token_file.as_deref()),
    },
    Key {
        section: "admin",
        name: "socket",
        help: "Unix socket over which the balancer's own user and root may make changes without a token; `\"\"` opens none.",
        set: |config, given| path(given).map(|value| config.admin.socket = value),
        show: |config| show_path(config.admin.socket.as_deref()),
    },
    Key {
        section: "log",
        name: "level",
        help: "The least important line that is written: `\"error\"`, `\"warn\"`, `\"info\"`, `\"debug\"` or `\"trace\"`.",
        set: |config, given| one_of(given, LEVELS).map(|value| config.log.level = value),
        show: |config| show_one(LEVELS, config.log.level),
    },
    Key {
        section: "log",
        name: "format",
        help: "`\"text\"` for people, `\"json\"` for machines, one object a line.",
        set: |config, given| one_of(given, FORMATS).map(|value| config.log.format = value),
        show: |config| show_one(FORMATS, config.log.format),
    },
    Key {
        section: "log",
        name: "requests_per_second",
        help: "Lines about API requests in a second, each worker; the rest is counted only. 0 writes none.",
        set: |config, given| {
            number(given, 0..=10_000_000, "")
                .map(|value| config.log.requests_per_second = value as u32)
        },
        show: |config| config.log.requests_per_second.to_string(),
    },
];

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
    use std::net::{IpAddr, Ipv6Addr, SocketAddr};

    use super::*;

    fn text(text: &str) -> Given {
        Given::Text(text.to_owned())
    }

    #[test]
    fn a_door_is_an_address_a_port_or_off() {
        let all = |port| Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
        for (given, expected) in [
            (text("8081"), all(8081)),
            (text(":8081"), all(8081)),
            (Given::Number(8081), all(8081)),
            (text(":0"), all(0)),
            (text("[::]:8081"), all(8081)),
            (text("127.0.0.1:8081"), Some("127.0.0.1:8081".parse().unwrap())),
            (text("[::1]:8081"), Some("[::1]:8081".parse().unwrap())),
            (text("off"), None),
        ] {
            assert_eq!(door(&given), Ok(expected), "{given:?}");
        }
        for given in [
            text("65536"),
            Given::Number(-1),
            text(""),
            text("localhost:80"),
            text("10.0.0.1"),
            Given::Other("boolean"),
        ] {
            let said = door(&given).unwrap_err();
            assert!(said.contains(&given.described()), "{said}");
            assert!(said.contains("\"off\""), "{said}");
        }
    }

    #[test]
    fn a_number_beyond_its_range_is_told_the_range() {
        let mut config = Config::default();
        let sessions = find("limits", "sessions").unwrap();
        for (given, fits) in [(0, false), (1, true), (16 << 20, true), ((16 << 20) + 1, false)] {
            let outcome = sessions.set(&mut config, &Given::Number(given));
            assert_eq!(outcome.is_ok(), fits, "{given}");
        }
        let said = sessions.set(&mut config, &Given::Number(-5)).unwrap_err();
        assert_eq!(said, "takes a number from 1 to 16777216 or \"auto\", not -5");
    }

    #[test]
    fn workers_are_counted_or_left_to_the_machine() {
        assert_eq!(workers(&text("auto")), Ok(None));
        assert_eq!(workers(&Given::Number(128)), Ok(Some(128)));
        assert!(workers(&Given::Number(0)).is_err() && workers(&Given::Number(129)).is_err());
        assert!(workers(&text("3")).is_err());
    }

    #[test]
    fn udp_settings_say_what_they_take() {
        let mut config = Config::default();
        for (name, given, shown) in [
            ("responses", Given::Number(1), "1"),
            ("responses", Given::Number(0), "0"),
            ("quarantine_ms", Given::Number(500), "500"),
            ("quarantine_ms", text("auto"), "\"auto\""),
            ("gro", Given::Switch(false), "false"),
            ("on_backend_loss", text("keep"), "\"keep\""),
        ] {
            let key = find("udp", name).unwrap();
            key.set(&mut config, &given).unwrap();
            assert_eq!(key.show(&config), shown, "{name}");
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
            assert_eq!(find("udp", name).unwrap().set(&mut config, &given).unwrap_err(), said);
        }
        let wrong = find("udp", "quarantine_ms").unwrap().set(&mut config, &Given::Switch(true));
        assert!(wrong.unwrap_err().ends_with("or \"auto\", not true"));
    }

    #[test]
    fn a_lone_address_is_a_network_of_one() {
        let given = Given::List(vec!["10.1.2.3/8".into(), "192.0.2.7".into(), "::1".into()]);
        let networks = networks(&given).unwrap();
        let shown: Vec<String> = networks.iter().map(|network| network.to_string()).collect();
        assert_eq!(shown, ["10.0.0.0/8", "192.0.2.7/32", "::1/128"]);
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
