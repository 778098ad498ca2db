//! What the host can hold: descriptors against sessions. Owns that arithmetic and its sentence; `lb
//! check` shows it, and `lb serve` holds to it.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{Trouble, WORKERS_MAX};
use crate::config::Config;
use crate::config::keys::SESSIONS_MAX;

/// Sessions when the configuration leaves it to the host, at most.
pub const SESSIONS_DEFAULT: usize = 100_000;
/// A TCP session: the user's connection and the backend's.
pub const DESCRIPTORS_PER_SESSION: u64 = 2;
/// A worker: its ring, its wake-up, its spare descriptor and a listener for each user door.
const DESCRIPTORS_PER_WORKER: u64 = 8;
/// Standard streams, logs, operators' connections, probes, and room to move.
const DESCRIPTORS_BESIDE: u64 = 256;

/// How many sessions `descriptors` are enough for.
pub fn sessions_for(descriptors: u64, config: &Config) -> usize {
    usize::try_from(descriptors.saturating_sub(beside_sessions(config)) / DESCRIPTORS_PER_SESSION)
        .unwrap_or(usize::MAX)
}

/// Descriptors that are needed before the first session.
fn beside_sessions(config: &Config) -> u64 {
    let workers = config.workers.unwrap_or(WORKERS_MAX.min(64)) as u64;
    DESCRIPTORS_BESIDE + workers * DESCRIPTORS_PER_WORKER + config.limits.control_connections as u64
}

/// How many sessions this process' limit of descriptors is enough for, at most.
pub fn most_sessions(config: &Config) -> usize {
    sessions_for(raise_descriptors(), config).min(SESSIONS_MAX)
}

/// The session limit to hold to. Raises this process' own limit of descriptors as far as the system
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
        let need = beside_sessions(config) + wanted as u64 * DESCRIPTORS_PER_SESSION;
        return Err(Trouble(format!(
            "{descriptors} descriptors are enough for {most} sessions, not for {wanted}; raise \
             LimitNOFILE (or `ulimit -Hn`) to {need}, or lower [limits] sessions or \
             control_connections"
        )));
    }
    Ok(sessions)
}

/// Raises the soft limit of descriptors to the hard one; says what it is then.
fn raise_descriptors() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_beside_the_sessions_are_left_over() {
        let mut config = Config { workers: Some(2), ..Config::default() };
        config.limits.control_connections = 100;
        let beside = DESCRIPTORS_BESIDE + 2 * DESCRIPTORS_PER_WORKER + 100;
        assert_eq!(sessions_for(beside + 20_001, &config), 10_000);
        assert_eq!(sessions_for(10, &config), 0);
    }

    #[test]
    fn a_limit_that_does_not_fit_is_refused_with_the_cure() {
        let mut config = Config::default();
        for (descriptors, limit, said) in
            [(300, 0, "for 0 sessions, not for 1;"), (20_000, 50_000, "not for 50000;")]
        {
            config.limits.sessions = limit;
            let sentence = sessions_within(descriptors, &config).unwrap_err().to_string();
            assert!(
                sentence.contains(said) && sentence.contains("[limits] sessions"),
                "{sentence}"
            );
            let cure = sentence.split(" to ").nth(1).and_then(|rest| rest.split(',').next());
            let enough = cure.and_then(|number| number.parse().ok()).expect(&sentence);
            assert!(sessions_within(enough, &config).is_ok(), "what is asked for is enough");
            assert!(sessions_within(enough - 1, &config).is_err(), "and no more than needed");
        }
        config.limits.sessions = 1;
        assert_eq!(sessions(&config).unwrap(), 1);
    }
}
