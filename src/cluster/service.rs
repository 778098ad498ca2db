//! By which terms users are brought to backends, and how long things may take meanwhile. Owns the terms
//! and their defaults; where they are written down is `config`'s.

use std::time::Duration;

/// How a backend is chosen for a new session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// In turn across all workers, by weight.
    #[default]
    RoundRobin,
    /// The one with the fewest running sessions for its weight.
    LeastSessions,
    /// By the user's address, so that a user returns to the same backend while it is registered.
    SourceHash,
}

/// What happens to running TCP sessions when their backend's control connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnBackendLoss {
    /// They go on: their own connections are the better evidence that the backend is alive.
    #[default]
    Keep,
    /// They are ended.
    Close,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// How long connecting to a backend may take before another one is tried.
    pub connect: Duration,
    /// How long a TCP session may go without traffic in either direction.
    pub tcp_idle: Duration,
    /// How long a TCP session may go without traffic after one side has finished sending.
    pub half_close: Duration,
    /// How long a UDP session may go without a datagram in either direction.
    pub udp_idle: Duration,
    /// How long running sessions have to end after SIGTERM.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(3),
            tcp_idle: Duration::from_secs(3600),
            half_close: Duration::from_secs(60),
            udp_idle: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}
