//! The one table of settings: a row here is a key of the file, its default in the README and in
//! `deploy/lb.toml`, and where its value goes. Owns how a single value is read and what range it may
//! have; knows no file, no flag, and nothing about how keys relate (`rules` does).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use super::{Config, LogFormat, OnBackendLoss, OnUdpLoss, Policy};

/// Workers at most; a session names its worker in eight bits.
pub const WORKERS_MAX: usize = 128;
/// Sessions at most, all workers together.
pub const SESSIONS_MAX: usize = 16 << 20;
/// Local ports of one address, in each family.
const UDP_SOCKETS_MAX: u64 = 2 * 65_535;
const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

/// A value as the operator gave it, before it is known what it is for.
#[derive(Clone, PartialEq, Debug)]
pub enum Given {
    Text(String),
    Number(i64),
    List(Vec<String>),
    Switch(bool),
    /// Anything that no setting takes, by the name of its type.
    Other(&'static str),
}

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
        help: "Sockets towards UDP backends, all workers together: what one backend can have of sessions and of ports that rest. 0: as descriptors and local ports allow.",
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
        help: "How long a backend and a local port rest after a session, so that a late reply reaches nobody else; `\"auto\"` is twice `udp_idle_ms`, or 10 s with `responses`.",
        set: |config, given| quarantine(given).map(|value| config.udp.quarantine = value),
        show: |config| config.udp.quarantine.map_or("\"auto\"".to_owned(), show_millis),
    },
    Key {
        section: "udp",
        name: "source_sessions",
        help: "Sessions that one source (an IPv4 address or an IPv6 /64) may hold; 0 sets no limit.",
        set: |config, given| count(given).map(|value| config.udp.source_sessions = value),
        show: |config| show_count(config.udp.source_sessions),
    },
    Key {
        section: "udp",
        name: "source_new_per_second",
        help: "Sessions that one source may begin in a second; 0 sets no limit.",
        set: |config, given| count(given).map(|value| config.udp.source_new_per_second = value),
        show: |config| show_count(config.udp.source_new_per_second),
    },
    Key {
        section: "udp",
        name: "gro",
        help: "Take and send several datagrams of one size at once where the kernel can (GRO and GSO).",
        set: |config, given| switch(given).map(|value| config.udp.gro = value),
        show: |config| config.udp.gro.to_string(),
    },
    Key {
        section: "control",
        name: "allow",
        help: "Networks whose hosts may register, in CIDR notation; empty allows this host only.",
        set: |config, given| networks(given).map(|value| config.control.allow = value),
        show: |config| {
            let quoted: Vec<String> =
                config.control.allow.iter().map(|network| format!("\"{network}\"")).collect();
            format!("[{}]", quoted.join(", "))
        },
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

impl Given {
    fn described(&self) -> String {
        match self {
            Given::Text(text) => format!("\"{}\"", text.escape_debug()),
            Given::Number(number) => number.to_string(),
            Given::List(_) => "a list".to_owned(),
            Given::Switch(on) => on.to_string(),
            Given::Other(kind) => format!("a value of the type {kind}"),
        }
    }
}

/// Reads where a door stands: an address with its port, a bare port (`8081` or `:8081`) for every
/// address of both families, or `off`. Port 0 lets the kernel choose.
///
/// # Errors
/// Half a sentence that says what it takes.
pub fn door(given: &Given) -> Result<Option<SocketAddr>, String> {
    let text = match given {
        Given::Text(text) => text.clone(),
        Given::Number(number) => number.to_string(),
        _ => String::new(),
    };
    if text == "off" {
        return Ok(None);
    }
    let port = text.strip_prefix(':').unwrap_or(&text);
    if let Ok(port) = port.parse::<u16>() {
        return Ok(Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)));
    }
    text.parse().map(Some).map_err(|_| {
        format!(
            "takes an address with its port such as \"127.0.0.1:8081\" or \"[::1]:8081\", a port \
             from 0 to 65535 for all addresses, or \"off\", not {}",
            given.described()
        )
    })
}

fn workers(given: &Given) -> Result<Option<usize>, String> {
    match given {
        Given::Text(text) if text == "auto" => Ok(None),
        Given::Number(count @ 1..) if *count <= WORKERS_MAX as i64 => Ok(Some(*count as usize)),
        _ => Err(format!(
            "takes a number from 1 to {WORKERS_MAX} or \"auto\", not {}",
            given.described()
        )),
    }
}

/// Zero stands for what the host can hold.
fn sessions(given: &Given) -> Result<usize, String> {
    match given {
        Given::Text(text) if text == "auto" => Ok(0),
        Given::Number(count @ 1..) if *count <= SESSIONS_MAX as i64 => Ok(*count as usize),
        _ => Err(format!(
            "takes a number from 1 to {SESSIONS_MAX} or \"auto\", not {}",
            given.described()
        )),
    }
}

fn number(given: &Given, range: RangeInclusive<u64>, unit: &str) -> Result<u64, String> {
    let found = match given {
        Given::Number(number) => u64::try_from(*number).ok(),
        _ => None,
    };
    found.filter(|number| range.contains(number)).ok_or_else(|| {
        let (least, most) = (range.start(), range.end());
        format!("takes a whole number{unit} from {least} to {most}, not {}", given.described())
    })
}

fn millis(given: &Given, range: RangeInclusive<u64>) -> Result<Duration, String> {
    number(given, range, " of milliseconds").map(Duration::from_millis)
}

/// A number of which zero stands for none.
fn count(given: &Given) -> Result<Option<NonZeroU32>, String> {
    number(given, 0..=u64::from(u32::MAX), "").map(|count| NonZeroU32::new(count as u32))
}

fn quarantine(given: &Given) -> Result<Option<Duration>, String> {
    match given {
        Given::Text(text) if text == "auto" => Ok(None),
        Given::Number(_) => millis(given, 0..=DAY_MS).map(Some),
        _ => Err(format!(
            "takes a whole number of milliseconds or \"auto\", not {}",
            given.described()
        )),
    }
}

fn switch(given: &Given) -> Result<bool, String> {
    match given {
        Given::Switch(on) => Ok(*on),
        _ => Err(format!("takes true or false, not {}", given.described())),
    }
}

fn one_of<T: Copy>(given: &Given, words: &[(&str, T)]) -> Result<T, String> {
    let found = match given {
        Given::Text(text) => words.iter().find(|(word, _)| word == text),
        _ => None,
    };
    found.map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        format!("takes one of {}, not {}", known.join(", "), given.described())
    })
}

fn networks(given: &Given) -> Result<Vec<IpNet>, String> {
    let wrong = |what: String| {
        format!("takes a list of networks such as [\"10.0.0.0/8\", \"192.0.2.7\"], not {what}")
    };
    let Given::List(items) = given else { return Err(wrong(given.described())) };
    items
        .iter()
        .map(|item| network(item).ok_or_else(|| wrong(format!("\"{}\"", item.escape_debug()))))
        .collect()
}

/// A network in CIDR notation, or one address. Bits beyond the prefix are cleared.
fn network(text: &str) -> Option<IpNet> {
    let network = text.parse::<IpNet>().map(|network| network.trunc());
    network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()
}

fn path(given: &Given) -> Result<Option<PathBuf>, String> {
    match given {
        Given::Text(text) => Ok((!text.is_empty()).then(|| PathBuf::from(text))),
        _ => Err(format!("takes the path of a file in quotes, not {}", given.described())),
    }
}

fn show_path(path: Option<&std::path::Path>) -> String {
    format!("\"{}\"", path.map_or("".into(), |path| path.to_string_lossy()))
}

fn show_door(door: Option<SocketAddr>) -> String {
    match door {
        None => "\"off\"".to_owned(),
        Some(address) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            format!("\":{}\"", address.port())
        }
        Some(address) => format!("\"{address}\""),
    }
}

fn show_one<T: Copy + PartialEq>(words: &[(&str, T)], value: T) -> String {
    let word = words.iter().find(|(_, known)| *known == value);
    format!("\"{}\"", word.expect("the table holds every value of its type").0)
}

fn show_count(count: Option<NonZeroU32>) -> String {
    count.map_or(0, NonZeroU32::get).to_string()
}

fn show_millis(time: Duration) -> String {
    time.as_millis().to_string()
}

#[cfg(test)]
mod tests {
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
            "", "listen", "balance", "health", "timeouts", "limits", "udp", "control", "admin",
            "log",
        ];
        assert_eq!(sections, all);
    }
}
