//! What a configuration needs of the host, as numbers. Owns the arithmetic of descriptors; reads no
//! limit itself.

use super::keys::WORKERS_MAX;
use super::{Config, Limits};

/// A session has the user's connection and the backend's.
pub const DESCRIPTORS_PER_SESSION: u64 = 2;
/// Standard streams, the libraries' own, the admin door's connections, files that are open for a
/// moment.
const DESCRIPTORS_FIXED: u64 = 128;
/// A ring, an eventfd and a listener for each of three doors, with as much again to spare.
const DESCRIPTORS_PER_WORKER: u64 = 10;
/// While a backend registers, its data port is tried.
const DESCRIPTORS_PER_CONTROL: u64 = 2;
/// With fewer sessions than this a balancer is of no use, and something is wrong with the limit.
const SESSIONS_MIN: u64 = 16;

/// Worker threads on a machine with so many cores: one core is left to the control core.
pub fn workers(config: &Config, cores: usize) -> usize {
    config.workers.unwrap_or(cores.saturating_sub(1)).clamp(1, WORKERS_MAX)
}

/// Descriptors that are not for sessions.
pub fn descriptors_beside_sessions(config: &Config, workers: usize) -> u64 {
    DESCRIPTORS_FIXED
        + DESCRIPTORS_PER_WORKER * workers as u64
        + DESCRIPTORS_PER_CONTROL * config.limits.control_connections as u64
}

/// Descriptors in all with every session in use.
pub fn descriptors_needed(config: &Config, workers: usize) -> u64 {
    descriptors_beside_sessions(config, workers)
        + DESCRIPTORS_PER_SESSION * config.limits.sessions as u64
}

/// Sessions that fit into so many descriptors.
pub fn sessions_within(descriptors: u64, config: &Config, workers: usize) -> u64 {
    let beside = descriptors_beside_sessions(config, workers);
    descriptors.saturating_sub(beside) / DESCRIPTORS_PER_SESSION
}

/// How many sessions to allow when `descriptors` may be open: the configured number if they suffice.
/// If they do not, the default number gives way to what fits, so that a newcomer's machine needs no
/// preparation, and a number that an operator chose does not.
///
/// # Errors
/// One sentence with the cure.
pub fn sessions(config: &Config, workers: usize, descriptors: u64) -> Result<usize, String> {
    let wanted = config.limits.sessions as u64;
    let fit = sessions_within(descriptors, config, workers);
    let by_default = wanted == Limits::default().sessions as u64;
    if fit >= wanted {
        Ok(config.limits.sessions)
    } else if by_default && fit >= SESSIONS_MIN {
        Ok(fit as usize)
    } else {
        let needed = descriptors_needed(config, workers);
        let or = match fit {
            0 => String::new(),
            fit => format!(", or lower limits.sessions to {fit}"),
        };
        Err(format!(
            "limits.sessions = {wanted} needs {needed} file descriptors and this process may open \
             {descriptors}: raise `ulimit -Hn` (systemd: LimitNOFILE) to {needed}{or}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_sessions(sessions: usize) -> Config {
        let mut config = Config::default();
        config.limits.sessions = sessions;
        config
    }

    #[test]
    fn one_core_is_left_to_the_control_core_unless_workers_are_counted() {
        for (wanted, cores, workers) in
            [(None, 0, 1), (None, 1, 1), (None, 8, 7), (Some(8), 2, 8), (None, 500, 128)]
        {
            let config = Config { workers: wanted, ..Config::default() };
            assert_eq!(super::workers(&config, cores), workers);
        }
    }

    #[test]
    fn what_is_needed_for_a_number_of_sessions_holds_just_that_number() {
        for (sessions, workers) in [(1, 1), (50_000, 3), (16 << 20, 128)] {
            let config = with_sessions(sessions);
            let needed = descriptors_needed(&config, workers);
            assert_eq!(sessions_within(needed, &config, workers), sessions as u64);
            assert_eq!(sessions_within(needed - 1, &config, workers), sessions as u64 - 1);
        }
        assert_eq!(sessions_within(0, &Config::default(), 1), 0);
    }

    #[test]
    fn the_default_gives_way_and_a_chosen_number_does_not() {
        let default = Config::default();
        let few = descriptors_beside_sessions(&default, 1) + 2 * 500;
        assert_eq!(sessions(&default, 1, 1 << 20), Ok(100_000));
        assert_eq!(sessions(&default, 1, few), Ok(500));
        let said = sessions(&default, 1, 1024).unwrap_err();
        assert!(said.ends_with("LimitNOFILE) to 202186"), "none would fit: {said}");
        assert_eq!(sessions(&with_sessions(500), 1, few), Ok(500));
        let said = sessions(&with_sessions(501), 1, few).unwrap_err();
        assert_eq!(
            said,
            "limits.sessions = 501 needs 3188 file descriptors and this process may open 3186: raise \
             `ulimit -Hn` (systemd: LimitNOFILE) to 3188, or lower limits.sessions to 500"
        );
    }
}
