//! What crosses between a worker and the control core, and nothing else: a published snapshot, orders
//! one way, reports the other way, counters and the session shard to read. Owns the bounds of both
//! queues. Neither side ever waits for the other.

use std::net::SocketAddr;
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::base::publish::Subscriber;
use crate::base::time::Now;
use crate::cluster::{BackendId, ServiceId, Snapshot};
use crate::metrics::WorkerMetrics;
use crate::proxy::http::Times;
use crate::session::shards::{Shard, ShardWriter};
use crate::session::{EndReason, SessionId};

/// Orders that may wait for a worker. A worker takes them every turn.
pub const ORDERS_MAX: usize = 1024;
/// Reports that may wait for the control core: what a worker can say in about a tenth of a second of
/// short sessions. Beyond it they are dropped and counted.
pub const REPORTS_MAX: usize = 16 * 1024;
/// Lines about API requests that may wait for the control core. Beyond it they are dropped and counted.
pub const REQUESTS_MAX: usize = 4096;
/// Bytes of method and target that such a line keeps.
pub const LINE_BYTES_MAX: usize = 256;

/// What the control core tells one worker to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// End every session on this backend.
    EndBackend { backend: BackendId, reason: EndReason },
    /// End one session.
    EndSession { id: SessionId, reason: EndReason },
    /// Accept no more users; let sessions end by themselves.
    Drain,
    /// End every session and stop.
    Stop,
}

/// What a worker has to say that a counter cannot.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Report {
    /// A user was given a backend and the backend's connection stands.
    Started {
        id: SessionId,
        service: ServiceId,
        client: SocketAddr,
        backend: BackendId,
    },
    Ended(Ended),
    /// A user was turned away.
    Refused {
        service: ServiceId,
        client: SocketAddr,
        why: Refusal,
    },
    /// Datagrams of new UDP users were dropped because room for them had run out. Said once in a while.
    OutOfRoom {
        shortage: Shortage,
        /// The backend that there was no way to, if that was it.
        backend: Option<BackendId>,
        /// Since the worker last said so.
        datagrams: u64,
    },
    /// A backend's data port refused, reset or did not answer in time; the one urgent report. What a
    /// worker lacked itself is never reported as this.
    ConnectFailed {
        backend: BackendId,
        errno: i32,
    },
}

/// What was short when a new UDP session wanted to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shortage {
    /// A place in the table: all sessions that it may hold are in use.
    Place,
    /// A socket and local port towards the backend that no session needs.
    Pair,
    /// One of these beyond the share of a single source.
    Share,
}

/// The line about a session that is over.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ended {
    pub id: SessionId,
    pub service: ServiceId,
    pub client: SocketAddr,
    pub backend: Option<BackendId>,
    pub started: Now,
    pub ended: Now,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub reason: EndReason,
}

/// The line about an API request.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RequestLine {
    pub session: SessionId,
    /// Which request of its connection it was, from one.
    pub number: u32,
    pub client: SocketAddr,
    pub backend: Option<BackendId>,
    /// Method and target, of which so many bytes are kept; empty if they were never read.
    pub text: [u8; LINE_BYTES_MAX],
    pub kept: u16,
    /// Zero when the user was not answered.
    pub status: u16,
    pub retries: u8,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub times: Times,
    pub fault: Option<&'static str>,
}

impl RequestLine {
    /// Method and target.
    pub fn request(&self) -> (&str, &str) {
        let bytes = &self.text[..usize::from(self.kept)];
        // Both are ASCII; what was cut off in the middle of something else shows as nothing.
        let text = std::str::from_utf8(bytes).unwrap_or_default();
        text.split_once(' ').unwrap_or((text, ""))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    NoBackend,
    Full,
    Unreachable,
    /// We have no descriptor, no local port or no memory left.
    Exhausted,
}

/// The control core's end.
pub struct ControlEnd {
    pub worker: u8,
    pub orders: rtrb::Producer<Order>,
    pub reports: rtrb::Consumer<Report>,
    pub requests: rtrb::Consumer<RequestLine>,
    pub metrics: Arc<WorkerMetrics>,
    pub shard: Arc<Shard>,
    /// Written after an order or a snapshot, so that a sleeping worker looks.
    pub wake: Arc<EventFd>,
}

/// The worker's end.
pub struct WorkerEnd {
    pub worker: u8,
    pub snapshots: Subscriber<Snapshot>,
    pub orders: rtrb::Consumer<Order>,
    pub reports: rtrb::Producer<Report>,
    pub requests: rtrb::Producer<RequestLine>,
    pub metrics: Arc<WorkerMetrics>,
    pub shard: ShardWriter,
    pub wake: Arc<EventFd>,
    /// Rung after [`Report::ConnectFailed`] only; other reports wait for the control core's tick.
    pub urgent: Arc<tokio::sync::Notify>,
}

/// Joins a worker to the control core. Fails only when the process is out of descriptors.
pub fn link(
    worker: u8,
    sessions_max: usize,
    snapshots: Subscriber<Snapshot>,
    urgent: Arc<tokio::sync::Notify>,
) -> nix::Result<(ControlEnd, WorkerEnd)> {
    let (orders_in, orders_out) = rtrb::RingBuffer::new(ORDERS_MAX);
    let (reports_in, reports_out) = rtrb::RingBuffer::new(REPORTS_MAX);
    let (requests_in, requests_out) = rtrb::RingBuffer::new(REQUESTS_MAX);
    let metrics = Arc::new(WorkerMetrics::default());
    let (writer, shard) = Shard::new(worker, sessions_max);
    let wake = Arc::new(EventFd::from_value_and_flags(
        0,
        // Two wake-ups may be told apart and read as one: the second look must not wait for a third.
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?);
    let control = ControlEnd {
        worker,
        orders: orders_in,
        reports: reports_out,
        requests: requests_out,
        metrics: Arc::clone(&metrics),
        shard,
        wake: Arc::clone(&wake),
    };
    let worker = WorkerEnd {
        worker,
        snapshots,
        orders: orders_out,
        reports: reports_in,
        requests: requests_in,
        metrics,
        shard: writer,
        wake,
        urgent,
    };
    Ok((control, worker))
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::base::publish::Publisher;

    #[test]
    fn a_wake_up_that_was_read_already_is_not_waited_for() {
        let snapshots = Publisher::new(Snapshot::default());
        let (control, worker) = link(0, 1, snapshots.subscribe(), Arc::default()).unwrap();
        control.wake.write(1).unwrap();
        control.wake.write(1).unwrap();
        assert_eq!(worker.wake.read(), Ok(2));
        assert_eq!(worker.wake.read(), Err(Errno::EAGAIN));
    }
}
