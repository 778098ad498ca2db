//! The gate of one service: whom it lets in, and how many at once. Owns the count of its sessions and of the
//! users turned away here, across all workers; a full service takes nothing from another. The limit on all
//! sessions together is up to `seats`.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::answers::Answers;

/// Whether an address is in one of these networks. That of an IPv4 host counts as such however it is written.
pub fn lists(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// How many a service takes. What is `None` has no limit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Limits {
    /// Its sessions; for an API service, its requests under way and its tunnels.
    pub sessions: Option<u32>,
    /// The same on each of its backends.
    pub backend_sessions: Option<u32>,
    /// Its backends, those in the file included.
    pub backends: Option<u32>,
}

/// What keeps a user out, by the name of its key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Barrier {
    /// The user's address is in none of the networks that are let in.
    Users,
    /// The service has as many sessions as it may.
    Sessions,
    /// Each of its backends has.
    BackendSessions,
}

impl Barrier {
    pub const ALL: [Barrier; 3] = [Barrier::Users, Barrier::Sessions, Barrier::BackendSessions];

    pub const fn name(self) -> &'static str {
        match self {
            Barrier::Users => "users",
            Barrier::Sessions => "sessions",
            Barrier::BackendSessions => "backend_sessions",
        }
    }

    /// Why a user was turned away, in the words of the log and of the answer to a request.
    pub const fn why(self) -> &'static str {
        match self {
            Barrier::Users => "the service is not open to this address",
            Barrier::Sessions => "the service has as many sessions as it may",
            Barrier::BackendSessions => "every backend has as many sessions as it may",
        }
    }
}

impl fmt::Display for Barrier {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// The counts, which the workers write together. Sessions are counted even while there is no limit, so that
/// one set later finds those that are running. Alone on its pair of cache lines, so that the users of one
/// service do not slow down those of another.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Gate {
    sessions: AtomicUsize,
    /// Users at its doors of whom it is not known yet for whom they come.
    waiting: AtomicUsize,
    turned_away: [AtomicU64; Barrier::ALL.len()],
    /// What became of those inside, and of others who were turned away.
    pub answers: Answers,
}

impl Gate {
    /// Counts one more session, unless there are `max` already.
    #[inline]
    pub fn enter(&self, max: Option<u32>) -> bool {
        // Taken first, and returned if there was none left: two workers can never both get the last.
        let before = self.sessions.fetch_add(1, Ordering::Relaxed);
        let entered = max.is_none_or(|max| before < max as usize);
        if !entered {
            self.leave();
        }
        entered
    }

    #[inline]
    pub fn leave(&self) {
        self.sessions.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Counts a user who has to wait outside, until [`Gate::wait_over`].
    pub fn wait(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    pub fn wait_over(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether nobody is inside and nobody waits outside.
    pub fn is_deserted(&self) -> bool {
        self.sessions() == 0 && self.waiting.load(Ordering::Relaxed) == 0
    }

    /// Counts users, or datagrams that would have begun a session.
    pub fn turn_away(&self, barrier: Barrier, count: u64) {
        self.turned_away[barrier as usize].fetch_add(count, Ordering::Relaxed);
    }

    pub fn turned_away(&self, barrier: Barrier) -> u64 {
        self.turned_away[barrier as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_13_the_last_session_is_taken_once_and_a_limit_finds_those_that_run() {
        let gate = Gate::default();
        assert!((0..3).all(|_| gate.enter(None)));
        assert!(!gate.enter(Some(2)), "a limit set while three run ends none and adds none");
        assert!(!gate.enter(Some(3)));
        gate.leave();
        assert!(gate.enter(Some(3)) && !gate.enter(Some(3)));
        assert_eq!(gate.sessions(), 3);
    }

    #[test]
    fn rule_13_racing_workers_never_pass_the_limit() {
        let gate = Gate::default();
        let most = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        if gate.enter(Some(5)) {
                            most.fetch_add(1, Ordering::SeqCst);
                            assert!(most.load(Ordering::SeqCst) <= 5);
                            most.fetch_sub(1, Ordering::SeqCst);
                            gate.leave();
                        }
                    }
                });
            }
        });
        assert_eq!(gate.sessions(), 0);
    }
}
