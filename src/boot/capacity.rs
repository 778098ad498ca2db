//! What the host can hold: its descriptors and local ports against sessions. Owns that arithmetic
//! and the sentence about it; `lb check` shows it, and `lb serve` enforces it.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{Trouble, workers};
use crate::cluster::Protocol;
use crate::config::CONTROL_CONNECTIONS_DEFAULT;
use crate::config::keys::{KEYS, SESSIONS_MAX};
use crate::config::kinds::AUTO;
use crate::config::services::CheckKind;
use crate::config::{Config, plans};
use crate::control::checks;

/// Limit on sessions when the configuration leaves it to the host.
pub const SESSIONS_DEFAULT: usize = 100_000;
/// A TCP session: the user's connection and the backend's.
pub const DESCRIPTORS_PER_SESSION: u64 = 2;
/// Sockets to UDP backends may take one quarter of the descriptors unless their number is
/// configured,
const UDP_SHARE: u64 = 4;
/// or less if the configured TCP sessions need more than the rest; but never fewer than these, or than half
/// of what there is.
const UDP_SOCKETS_LEAST: u64 = 64;
/// The default of `net.ipv4.ip_local_port_range`.
const PORTS_USUAL: (usize, usize) = (32_768, 60_999);
/// For each worker: its ring, its wake-up, its claim to a core, its spare descriptors and a listener for
/// each door of the built-in services.
const DESCRIPTORS_PER_WORKER: u64 = 9;
/// For standard streams, logs, operators' connections, probes, and a margin,
const DESCRIPTORS_BESIDE: u64 = 256;
/// or this share of the descriptors where there are few,
const BESIDE_SHARE: u64 = 4;
/// but never fewer than this.
const BESIDE_LEAST: u64 = 32;
/// Control connections may take this share of the descriptors unless their number is configured,
const CONTROL_SHARE: u64 = 8;
/// but never fewer than this.
const CONTROL_LEAST: u64 = 16;
/// Checks under way may take this share.
const CHECKS_SHARE: u64 = 8;
/// More descriptors than any settings can need.
const DESCRIPTORS_PLENTY: u64 = 1 << 40;

/// How many TCP sessions `descriptors` suffice for.
pub fn sessions_for(descriptors: u64, config: &Config) -> usize {
    let left = descriptors.saturating_sub(beside_sessions(descriptors, config));
    let for_udp = match (config.limits.udp_sockets, config.limits.sessions) {
        (0, 1..) => udp_sockets_least(left, config),
        _ => udp_sockets_for(descriptors, config) as u64,
    };
    usize::try_from(left.saturating_sub(for_udp) / DESCRIPTORS_PER_SESSION).unwrap_or(usize::MAX)
}

/// How many sockets to UDP backends there may be in all workers together: as configured, or else
/// what the UDP sessions can need, limited by the local ports and by the descriptors that TCP
/// sessions leave.
pub fn udp_sockets_for(descriptors: u64, config: &Config) -> usize {
    let most = udp_sockets_most(config);
    if config.limits.udp_sockets > 0 {
        return most;
    }
    let left = descriptors.saturating_sub(beside_sessions(descriptors, config));
    let for_tcp = config.limits.sessions as u64 * DESCRIPTORS_PER_SESSION;
    let share = (left / UDP_SHARE).min(left.saturating_sub(for_tcp));
    most.min(usize::try_from(share.max(udp_sockets_least(left, config))).unwrap_or(usize::MAX))
}

/// How many of the descriptors that are left are kept back for UDP backends, whatever TCP sessions need.
fn udp_sockets_least(left: u64, config: &Config) -> u64 {
    UDP_SOCKETS_LEAST.min(udp_sockets_most(config) as u64).min(left / 2)
}

/// How many there could be if descriptors were unlimited.
fn udp_sockets_most(config: &Config) -> usize {
    match (plans::has_door(config, Protocol::Udp), config.limits.udp_sockets) {
        (false, _) => 0,
        (true, 0) => local_ports().min(config.limits.udp_sessions),
        (true, configured) => configured,
    }
}

/// How many sockets to UDP backends this process may open.
pub fn udp_sockets(config: &Config) -> usize {
    udp_sockets_for(raise_descriptors(), config)
}

/// How many UDP sessions on one backend `sockets` suffice for: one for each source address, of the
/// family that has more of them.
pub fn udp_sessions_on(sockets: usize, config: &Config) -> usize {
    let v4 = config.udp_local_addresses.iter().filter(|address| address.is_ipv4()).count();
    sockets * v4.max(config.udp_local_addresses.len() - v4).max(1)
}

/// Local ports that the balancer may use: all that the kernel chooses from except one in sixteen,
/// which are left to the rest of the host.
fn local_ports() -> usize {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let (first, last) = text.ok().and_then(|text| port_range(&text)).unwrap_or(PORTS_USUAL);
    let ports = (last + 1).saturating_sub(first);
    ports - ports / 16
}

/// The first and last local port, in the format of `net.ipv4.ip_local_port_range`.
pub fn port_range(text: &str) -> Option<(usize, usize)> {
    let mut numbers = text.split_whitespace().map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Descriptors that are needed before the first session.
fn beside_sessions(descriptors: u64, config: &Config) -> u64 {
    let each = DESCRIPTORS_PER_WORKER + plans::named(config) as u64;
    let margin = (descriptors / BESIDE_SHARE).clamp(BESIDE_LEAST, DESCRIPTORS_BESIDE);
    let checked = config.services.iter().any(|service| service.check.kind != CheckKind::Off);
    let checks = if checked { checks::AT_ONCE as u64 } else { 0 };
    let control = control_connections_for(descriptors, config) as u64;
    margin + workers(config) as u64 * each + control + checks.min(descriptors / CHECKS_SHARE)
}

/// How many workers descriptors suffice for: two thirds of them are left to everything else.
pub fn workers_for(descriptors: u64) -> usize {
    usize::try_from(descriptors / 3 / DESCRIPTORS_PER_WORKER).unwrap_or(usize::MAX).max(1)
}

/// How many control connections there may be: as configured, or else a share of the descriptors.
pub fn control_connections_for(descriptors: u64, config: &Config) -> usize {
    let share = (descriptors / CONTROL_SHARE).max(CONTROL_LEAST);
    match config.limits.control_connections {
        0 => usize::try_from(share).unwrap_or(usize::MAX).min(CONTROL_CONNECTIONS_DEFAULT),
        configured => configured,
    }
}

/// How many descriptors suffice for `sessions` TCP sessions: one fewer would not.
fn descriptors_for(sessions: usize, config: &Config) -> u64 {
    let (mut too_few, mut enough) = (0, DESCRIPTORS_PLENTY);
    while enough - too_few > 1 {
        let between = too_few + (enough - too_few) / 2;
        match sessions_for(between, config) >= sessions {
            true => enough = between,
            false => too_few = between,
        }
    }
    enough
}

/// How many sessions this process' limit of descriptors allows at most.
pub fn most_sessions(config: &Config) -> usize {
    sessions_for(raise_descriptors(), config).min(SESSIONS_MAX)
}

/// The session limit to enforce. Raises this process' own limit of descriptors as far as the system
/// lets it; refuses a configured limit that still does not fit.
pub fn sessions(config: &Config) -> Result<usize, Trouble> {
    sessions_within(raise_descriptors(), config)
}

fn sessions_within(descriptors: u64, config: &Config) -> Result<usize, Trouble> {
    let most = sessions_for(descriptors, config);
    let sessions = match config.limits.sessions {
        0 => SESSIONS_DEFAULT.min(most),
        configured => configured,
    };
    if sessions > most || most == 0 {
        let wanted = sessions.max(1);
        let need = descriptors_for(wanted, config);
        return Err(Trouble(format!(
            "{descriptors} descriptors are enough for {most} sessions, not for {wanted}; raise \
             LimitNOFILE (or `ulimit -Hn`) to {need}{}",
            what_takes_them(config)
        )));
    }
    Ok(sessions)
}

/// The other cure: the settings whose lowering would leave descriptors to sessions.
fn what_takes_them(config: &Config) -> String {
    let limits = &config.limits;
    let set = [
        ("limits.sessions", limits.sessions > 0),
        ("limits.control_connections", limits.control_connections > 0),
        ("limits.udp_sockets", limits.udp_sockets > 0),
        ("workers", workers(config) > 1),
    ];
    let set: Vec<&str> = set.iter().filter(|it| it.1).map(|it| it.0).collect();
    if set.is_empty() { String::new() } else { format!(", or lower {}", set.join(" or ")) }
}

/// Works out what the settings leave to this host, in these settings: workers, sessions, control
/// connections. Says what each has become, as `key = value`.
///
/// # Errors
/// The session limit that is configured does not fit, or not a single session does.
pub fn settle(config: &mut Config) -> Result<Vec<String>, Trouble> {
    let asked = config.clone();
    config.workers = Some(workers(config));
    config.health.timeout = Some(config.health.timeout());
    config.limits.control_connections = control_connections_for(raise_descriptors(), config);
    config.limits.sessions = sessions(config)?;
    let mut derived = Vec::new();
    for key in KEYS.iter().filter(|key| key.show(&asked) == AUTO) {
        let value = key.show(config);
        if value != AUTO {
            derived.push(format!("{} = {value}", key.path()));
        }
    }
    if asked.limits.udp_sockets == 0 && plans::has_door(config, Protocol::Udp) {
        derived.push(format!("limits.udp_sockets = {}", udp_sockets(&asked)));
    }
    Ok(derived)
}

/// Raises the soft limit of descriptors to the hard one; returns the result.
pub fn raise_descriptors() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::services::{CheckConfig, ServiceConfig};

    #[test]
    fn descriptors_beside_the_sessions_are_left_over() {
        let mut config = Config { workers: Some(2), ..Config::default() };
        config.limits.control_connections = 100;
        config.listen.udp = None;
        let beside = DESCRIPTORS_BESIDE + 2 * DESCRIPTORS_PER_WORKER + 100;
        assert_eq!(sessions_for(beside + 20_001, &config), 10_000);
        assert_eq!(sessions_for(10, &config), 0);
    }

    #[test]
    fn each_door_of_a_named_service_costs_a_descriptor_of_each_worker() {
        let mut config = Config { workers: Some(3), ..Config::default() };
        config.listen.udp = None;
        config.limits.control_connections = 100;
        let before = descriptors_for(1000, &config);
        let listen: Vec<_> = (1..=4).map(|port| ([127, 0, 0, 1], port).into()).collect();
        let named = ServiceConfig { listen, ..ServiceConfig::new("named", Protocol::Tcp) };
        config.set_services(vec![named, ServiceConfig::new("at-the-api-door", Protocol::Api)]);
        assert_eq!(descriptors_for(1000, &config), before + 3 * 4);
        assert_eq!(sessions_for(before + 3 * 4, &config), 1000);
        assert_eq!(udp_sockets_for(u64::MAX, &config), 0);
        config.services[0].protocol = Protocol::Udp;
        assert_eq!(udp_sockets_for(u64::MAX, &config), local_ports(), "though listen.udp is off");
    }

    #[test]
    fn sockets_towards_udp_backends_come_out_of_the_descriptors() {
        let mut config = Config { workers: Some(2), ..Config::default() };
        config.limits.control_connections = 100;
        let beside = DESCRIPTORS_BESIDE + 2 * DESCRIPTORS_PER_WORKER + 100;
        assert_eq!(udp_sockets_for(beside + 4_000, &config), 1_000);
        assert_eq!(sessions_for(beside + 4_000, &config), 1_500);
        assert_eq!(udp_sockets_for(u64::MAX, &config), local_ports());
        config.limits.sessions = 1_800;
        assert_eq!(udp_sockets_for(beside + 4_000, &config), 400);
        assert_eq!(sessions_for(beside + 4_000, &config), 1_968);
        config.limits.sessions = 1_999;
        assert_eq!(udp_sockets_for(beside + 4_000, &config), 64);
        config.limits.sessions = 0;
        config.limits.udp_sessions = 50;
        assert_eq!(udp_sockets_for(u64::MAX, &config), 50);
        config.limits.udp_sockets = 2_000;
        assert_eq!(sessions_for(beside + 4_000, &config), 1_000);
        config.listen.udp = None;
        assert_eq!(udp_sockets_for(u64::MAX, &config), 0);
        assert_eq!(sessions_for(beside + 4_000, &config), 2_000);
    }

    #[test]
    fn a_socket_serves_a_session_for_each_address_of_its_family() {
        let mut config = Config::default();
        assert_eq!(udp_sessions_on(100, &config), 100);
        for (addresses, sessions) in
            [(&["::1"][..], 100), (&["10.0.0.1", "10.0.0.2", "::1"], 200), (&["::1", "::2"], 200)]
        {
            config.udp_local_addresses = addresses.iter().map(|it| it.parse().unwrap()).collect();
            assert_eq!(udp_sessions_on(100, &config), sessions, "{addresses:?}");
        }
    }

    #[test]
    fn what_is_said_to_be_enough_is_enough_and_no_more() {
        for (udp_sessions, udp_sockets) in [(0, 0), (100, 0), (100_000, 0), (100_000, 700)] {
            let mut config = Config::default();
            (config.limits.udp_sessions, config.limits.udp_sockets) = (udp_sessions, udp_sockets);
            for (sessions, configured) in
                [1, 2, 3, 20, 100, 1001, 500_000].into_iter().flat_map(|it| [(it, 0), (it, it)])
            {
                config.limits.sessions = configured;
                let need = descriptors_for(sessions, &config);
                assert!(sessions_for(need, &config) >= sessions, "{sessions} {udp_sessions}");
                assert!(sessions_for(need - 1, &config) < sessions, "{sessions} {udp_sessions}");
            }
        }
    }

    #[test]
    fn few_descriptors_are_shared_out_among_everything_that_is_left_to_the_host() {
        let mut config = Config::default();
        let listed = ServiceConfig {
            check: CheckConfig { kind: CheckKind::Tcp, ..CheckConfig::default() },
            ..ServiceConfig::new("checked", Protocol::Tcp)
        };
        config.set_services(vec![listed]);
        for descriptors in [256, 1024] {
            let most = workers_for(descriptors);
            for workers in [1, 2, 7, most] {
                config.workers = Some(workers.min(most));
                let sessions = sessions_within(descriptors, &config).map_err(|it| it.0);
                let sessions = sessions.unwrap_or_else(|said| panic!("{workers} workers: {said}"));
                let udp = udp_sockets_for(descriptors, &config) as u64;
                let all = beside_sessions(descriptors, &config)
                    + udp
                    + sessions as u64 * DESCRIPTORS_PER_SESSION;
                assert!(udp > 0 && all <= descriptors, "{workers} workers: {all} of {descriptors}");
            }
        }
        config.workers = Some(1);
        for (descriptors, most) in [(64, 16), (256, 32), (1024, 128), (8192, 1024), (1 << 20, 1024)]
        {
            assert_eq!(control_connections_for(descriptors, &config), most, "{descriptors}");
        }
        config.limits.control_connections = 5000;
        assert_eq!(control_connections_for(256, &config), 5000, "as configured");
    }

    #[test]
    fn what_the_settings_leave_to_the_host_is_worked_out_and_told() {
        let mut config = Config::default();
        config.health.interval = Duration::from_secs(1);
        let told = settle(&mut config).unwrap();
        assert_eq!(config.health.timeout, Some(Duration::from_millis(500)));
        assert!(config.limits.sessions > 0 && config.limits.control_connections > 0);
        let keys: Vec<&str> = told.iter().filter_map(|it| it.split(" = ").next()).collect();
        assert_eq!(
            keys,
            [
                "workers",
                "health.timeout_ms",
                "limits.sessions",
                "limits.control_connections",
                "limits.udp_sockets"
            ]
        );
        assert!(told.contains(&"health.timeout_ms = \"500ms\"".to_owned()), "{told:?}");
        config.listen.udp = None;
        assert_eq!(settle(&mut config).unwrap(), [""; 0], "nothing is left to work out");
    }

    #[test]
    fn the_port_range_is_two_numbers() {
        assert_eq!(port_range("32768\t60999\n"), Some((32_768, 60_999)));
        assert_eq!([port_range("32768"), port_range("a b"), port_range("")], [None; 3]);
    }

    #[test]
    fn a_limit_that_does_not_fit_is_refused_with_the_cure() {
        let mut config = Config { workers: Some(1), ..Config::default() };
        for (descriptors, limit, said, or_lower) in [
            (30, 0, "for 0 sessions, not for 1;", ""),
            (20_000, 50_000, "not for 50000;", "limits.sessions"),
        ] {
            config.limits.sessions = limit;
            let sentence = sessions_within(descriptors, &config).unwrap_err().to_string();
            assert!(sentence.contains(said) && sentence.ends_with(or_lower), "{sentence}");
            let cure = sentence.split(" to ").nth(1).and_then(|rest| rest.split(',').next());
            let enough = cure.and_then(|number| number.parse().ok()).expect(&sentence);
            assert!(sessions_within(enough, &config).is_ok(), "what is asked for is enough");
            assert!(sessions_within(enough - 1, &config).is_err(), "and no more than needed");
        }
        (config.workers, config.limits.control_connections) = (Some(128), 2000);
        let sentence = sessions_within(2000, &config).unwrap_err().to_string();
        assert!(sentence.ends_with("limits.sessions or limits.control_connections or workers"));
        config.limits.sessions = 1;
        assert_eq!(sessions(&config).unwrap(), 1);
    }
}
