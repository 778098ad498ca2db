//! What is known about sessions apart from their bytes. Owns their identities and the reasons why they
//! end; `shards` is the table that anyone may read while workers relay, `flows`, `affinity` and
//! `sources` find and limit UDP sessions. What a session does belongs to `proxy`.

pub mod affinity;
pub mod flows;
pub mod queues;
pub mod shards;
pub mod sources;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A session of this process: its worker, its place in that worker's shard, and the generation of
/// that place. Written `worker-place-generation`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SessionId {
    pub worker: u8,
    pub place: u32,
    pub generation: u32,
}

impl fmt::Display for SessionId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}-{}-{}", self.worker, self.place, self.generation)
    }
}

impl FromStr for SessionId {
    type Err = ();

    fn from_str(text: &str) -> Result<SessionId, ()> {
        let mut parts = text.split('-');
        let mut next = || parts.next().ok_or(());
        let id = SessionId {
            worker: next()?.parse().map_err(|_| ())?,
            place: next()?.parse().map_err(|_| ())?,
            generation: next()?.parse().map_err(|_| ())?,
        };
        if parts.next().is_some() { Err(()) } else { Ok(id) }
    }
}

impl Serialize for SessionId {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(self)
    }
}

/// Why a session ended; the names appear in the log and in `deploy/doc/log.md`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Both sides finished sending.
    Finished,
    ClientReset,
    BackendReset,
    /// Nothing moved for `tcp_idle_ms` or `udp_idle_ms`, or the peer stopped responding; or, while
    /// the balancer drained, a UDP session saw no datagram for two seconds.
    Idle,
    /// One side had finished, and the other sent nothing for `half_close_ms`.
    HalfCloseIdle,
    /// There was no backend, or every backend that was tried refused the connection.
    Unreachable,
    /// The worker had no relay buffers left.
    NoBuffers,
    /// `on_backend_loss = "close"`, or the end of a backend's drain, or the UDP door was removed.
    BackendLeft,
    /// The backend's check failed, and `on_fail = "close"`.
    CheckFailed,
    /// The balancer is stopping.
    Stopping,
    /// Ended by the operator.
    Operator,
    /// The user sent a PROXY header and is not in `proxy_from`.
    ProxyHeader,
    /// A UDP session that was no longer in use and had been idle the longest; a new user needed its
    /// room.
    Displaced,
}

impl EndReason {
    /// Whether both sides must be told, by a reset, that the session was cut off. `truncated`:
    /// received bytes were not delivered.
    pub const fn is_reset(self, truncated: bool) -> bool {
        match self {
            EndReason::Finished | EndReason::Unreachable => false,
            EndReason::Idle | EndReason::HalfCloseIdle => truncated,
            EndReason::ClientReset
            | EndReason::BackendReset
            | EndReason::NoBuffers
            | EndReason::BackendLeft
            | EndReason::CheckFailed
            | EndReason::Stopping
            | EndReason::Operator
            | EndReason::ProxyHeader
            | EndReason::Displaced => true,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            EndReason::Finished => "finished",
            EndReason::ClientReset => "client_reset",
            EndReason::BackendReset => "backend_reset",
            EndReason::Idle => "idle",
            EndReason::HalfCloseIdle => "half_close_idle",
            EndReason::Unreachable => "unreachable",
            EndReason::NoBuffers => "no_buffers",
            EndReason::BackendLeft => "backend_left",
            EndReason::CheckFailed => "check_failed",
            EndReason::Stopping => "stopping",
            EndReason::Operator => "operator",
            EndReason::ProxyHeader => "proxy_header",
            EndReason::Displaced => "displaced",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_it_is_written() {
        let id = SessionId { worker: 3, place: 70_000, generation: 12 };
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "1-2", "1-2-3-4", "a-2-3", "300-1-1"] {
            assert_eq!(wrong.parse::<SessionId>(), Err(()), "{wrong}");
        }
    }
}
