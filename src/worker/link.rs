//! The link between a worker and the control core, and everything that crosses it: snapshots and
//! orders one way, reports and request lines the other, counters and the session shard to read. Owns
//! the bounds of the queues. Neither side ever waits for the other.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::brake::{Brake, Request};
use super::late::Late;
use crate::base::publish::Subscriber;
use crate::base::time::Now;
use crate::cluster::{BackendId, Barrier, DoorId, Protocol, ServiceId, Snapshot};
use crate::estate::Estate;
use crate::estate::ahead::Ahead;
use crate::http::trace::ID_BYTES_MAX;
use crate::metrics::WorkerMetrics;
use crate::proxy::http::{HOST_KEPT_MAX, Times};
use crate::session::shards::{Shard, ShardWriter};
use crate::session::{EndReason, SessionId};
use crate::tls::engine::Fault;

/// The most orders that may wait for a worker, which takes them every turn.
pub const ORDERS_MAX: usize = 1024;
/// The most reports that may wait for the control core: about a tenth of a second's worth of short
/// sessions. Any beyond that are dropped and counted.
pub const REPORTS_MAX: usize = 16 * 1024;
/// The most log lines about API requests that may wait for the control core. Any beyond that are
/// dropped and counted.
pub const REQUESTS_MAX: usize = 4096;
/// The most changes of doors that may wait for a worker, which takes them every turn: more than there can be
/// doors. Memory for them is taken from the system as they come.
pub const DOOR_CHANGES_MAX: usize = 33 * 1024;
/// The most bytes of method and target that such a line keeps, beside the host.
pub const LINE_BYTES_MAX: usize = 256;

/// An order from the control core to one worker.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
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

/// A worker's socket at a door, and the service whose users come to it.
#[derive(Debug)]
pub struct Listener {
    pub id: DoorId,
    pub socket: OwnedFd,
    pub service: ServiceId,
    /// Users speak TLS here, whatever their service says.
    pub is_tls: bool,
}

/// A change of a worker's doors. A worker looks at the newest snapshot before it carries one out.
#[derive(Debug)]
pub enum DoorChange {
    Open(Listener),
    /// Users who come from now on are this service's.
    Assign {
        id: DoorId,
        service: ServiceId,
        /// As in [`Listener`].
        is_tls: bool,
    },
    /// Nobody comes in here any more. Those whom the kernel has told that they are connected are let in
    /// first; a UDP door takes its sessions' way back with it.
    Close {
        id: DoorId,
    },
}

/// News from a worker that a counter cannot carry.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Report {
    /// A user was given a backend, and the connection to it is established.
    Started {
        id: SessionId,
        service: ServiceId,
        client: SocketAddr,
        is_tls: bool,
        backend: BackendId,
    },
    Ended(Ended),
    /// A user was turned away.
    Refused {
        service: ServiceId,
        client: SocketAddr,
        why: Refusal,
    },
    /// The TLS of a user could not be agreed on.
    HandshakeFailed {
        service: ServiceId,
        client: SocketAddr,
        host: HostAsked,
        why: &'static str,
        /// Whether the fault or the lack is ours.
        is_ours: bool,
    },
    /// Datagrams of new UDP users were dropped for lack of room. Reported once in a while.
    OutOfRoom {
        /// The service that the last of them were for.
        service: ServiceId,
        shortage: Shortage,
        /// The backend for which no pair was left, if that was the shortage.
        backend: Option<BackendId>,
        /// How many since the worker's last such report.
        datagrams: u64,
    },
    /// A backend's data port refused, reset or did not answer in time. Urgent, as are the next; a worker's
    /// own shortage is never reported this way.
    ConnectFailed {
        backend: BackendId,
        errno: i32,
    },
    /// A TLS handshake with a backend has failed. Urgent as well.
    UpstreamTlsFailed {
        backend: BackendId,
        why: Fault,
    },
    /// A backend has had an API request since then, and by now let the time for its answer pass.
    Unanswered {
        backend: BackendId,
        since: Now,
        now: Now,
    },
}

/// The host that a TLS user has asked for, as far as a line has room for it. It is plain: see
/// [`crate::tls::hello`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostAsked {
    /// Its end, where it tells most.
    text: [u8; HOST_ASKED_MAX],
    kept: u8,
    is_cut: bool,
}

/// The most bytes of it that a report keeps.
const HOST_ASKED_MAX: usize = 60;

impl HostAsked {
    pub fn new(host: Option<&str>) -> HostAsked {
        let host = host.unwrap_or_default().as_bytes();
        let kept = host.len().min(HOST_ASKED_MAX);
        let mut text = [0; HOST_ASKED_MAX];
        text[..kept].copy_from_slice(&host[host.len() - kept..]);
        HostAsked { text, kept: kept as u8, is_cut: kept < host.len() }
    }

    /// `None`: it has asked for none, or not yet.
    pub fn shown(&self) -> Option<String> {
        let text = str::from_utf8(&self.text[..usize::from(self.kept)]).unwrap_or_default();
        let cut = if self.is_cut { "..." } else { "" };
        (!text.is_empty()).then(|| format!("{cut}{text}"))
    }
}

/// What was lacking for a new UDP session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shortage {
    /// A place in the table: it is full of sessions in use.
    Place,
    /// Room within the limits of the service.
    Service,
    /// A socket and local port towards the backend: all are in use.
    Pair,
    /// Room for either within the source's share.
    Share,
}

/// The log line about a session that has ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ended {
    pub id: SessionId,
    pub service: ServiceId,
    pub client: SocketAddr,
    pub is_tls: bool,
    pub backend: Option<BackendId>,
    pub started: Now,
    pub ended: Now,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub reason: EndReason,
}

/// The log line about an API request.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RequestLine {
    pub session: SessionId,
    /// The request's number on its connection, from one.
    pub number: u32,
    pub client: SocketAddr,
    /// It came by HTTPS.
    pub is_tls: bool,
    pub is_http2: bool,
    /// Who was to serve it, or did.
    pub service: Option<ServiceId>,
    /// The service that left it to that one.
    pub asked: Option<ServiceId>,
    pub backend: Option<BackendId>,
    /// The host, then the request ID, then method and target; empty if they were never read.
    pub text: [u8; HOST_KEPT_MAX + ID_BYTES_MAX + LINE_BYTES_MAX],
    /// Where each of the three ends in `text`.
    pub ends: [u16; 3],
    /// The trace that the request says it belongs to; zero for none.
    pub trace: u128,
    /// Zero if the user got no answer.
    pub status: u16,
    pub retries: u8,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub times: Times,
    pub fault: Option<&'static str>,
}

impl RequestLine {
    pub fn host(&self) -> &str {
        self.shown(0, self.ends[0])
    }

    /// Its `X-Request-Id`; empty if it has none of ours.
    pub fn id(&self) -> &str {
        self.shown(self.ends[0], self.ends[1])
    }

    /// Method and target.
    pub fn request(&self) -> (&str, &str) {
        let text = self.shown(self.ends[1], self.ends[2]);
        text.split_once(' ').unwrap_or((text, ""))
    }

    fn shown(&self, from: u16, to: u16) -> &str {
        // All of it is ASCII; text that was cut off inside any other character shows as empty.
        std::str::from_utf8(&self.text[usize::from(from)..usize::from(to)]).unwrap_or_default()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    NoBackend,
    Full,
    /// The service lets the user in no further.
    Barred(Barrier),
    Unreachable,
    /// We have no descriptor, no local port or no memory left.
    Exhausted,
    /// A listed proxy sent no PROXY header, or one that cannot be believed.
    NoProxyHeader,
    /// A PROXY header came from a host that is not listed.
    ProxyHeader,
}

/// The control core's end.
pub struct ControlEnd {
    pub worker: u8,
    pub orders: rtrb::Producer<Order>,
    pub doors: rtrb::Producer<(Protocol, DoorChange)>,
    pub reports: rtrb::Consumer<Report>,
    pub requests: rtrb::Consumer<RequestLine>,
    pub metrics: Arc<WorkerMetrics>,
    pub shard: Arc<Shard>,
    /// By which the worker is made to stand still, and to go on.
    pub brake: Arc<Brake>,
    /// By which users leave for another process, or come from one, while it goes on.
    pub late: Arc<Late>,
    /// Written after an order, a snapshot or a change of doors, to make a sleeping worker look.
    pub wake: Arc<EventFd>,
}

impl ControlEnd {
    /// Makes a request of the worker, and wakes it; [`Brake::is_done`] says when it has been carried out.
    pub fn ask(&self, what: Request) {
        self.brake.ask(what);
        let _ = self.wake.write(1);
    }

    /// Asks the worker for the sockets of its next sessions, or of the first.
    pub fn ask_for_sockets(&self, of_first: bool) {
        self.brake.ask_for_sockets(of_first);
        let _ = self.wake.write(1);
    }

    /// Has the worker stand still and take in sockets of sessions that another one will describe.
    pub fn expect(&self, ahead: Ahead<OwnedFd>) {
        self.brake.expect(ahead);
        let _ = self.wake.write(1);
    }

    /// Has the worker stand still and take over what another one has described.
    pub fn give(&self, estate: Estate<OwnedFd>) {
        self.brake.give(estate);
        let _ = self.wake.write(1);
    }
}

/// The worker's end.
pub struct WorkerEnd {
    pub worker: u8,
    pub snapshots: Subscriber<Snapshot>,
    pub orders: rtrb::Consumer<Order>,
    pub doors: rtrb::Consumer<(Protocol, DoorChange)>,
    pub reports: rtrb::Producer<Report>,
    pub requests: rtrb::Producer<RequestLine>,
    pub metrics: Arc<WorkerMetrics>,
    pub shard: ShardWriter,
    pub brake: Arc<Brake>,
    pub late: Arc<Late>,
    pub wake: Arc<EventFd>,
    /// Notified after [`Report::ConnectFailed`], [`Report::UpstreamTlsFailed`] and [`Report::Unanswered`] only; other
    /// reports wait for the control core's tick.
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
    let (doors_in, doors_out) = rtrb::RingBuffer::new(DOOR_CHANGES_MAX);
    let (reports_in, reports_out) = rtrb::RingBuffer::new(REPORTS_MAX);
    let (requests_in, requests_out) = rtrb::RingBuffer::new(REQUESTS_MAX);
    let metrics = Arc::new(WorkerMetrics::default());
    let (writer, shard) = Shard::new(worker, sessions_max);
    let wake = Arc::new(EventFd::from_value_and_flags(
        0,
        // Two wake-ups may be signalled separately and read as one: the second read must not wait for
        // a third.
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?);
    let (brake, late) = (Arc::<Brake>::default(), Arc::new(Late::new(Arc::clone(&urgent))));
    let control = ControlEnd {
        worker,
        orders: orders_in,
        doors: doors_in,
        reports: reports_out,
        requests: requests_out,
        metrics: Arc::clone(&metrics),
        shard,
        brake: Arc::clone(&brake),
        late: Arc::clone(&late),
        wake: Arc::clone(&wake),
    };
    let worker = WorkerEnd {
        worker,
        snapshots,
        orders: orders_out,
        doors: doors_out,
        reports: reports_in,
        requests: requests_in,
        metrics,
        shard: writer,
        brake,
        late,
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
    fn a_host_that_is_too_long_for_a_report_keeps_its_end() {
        let shown = |host: Option<&str>| HostAsked::new(host).shown();
        assert_eq!(shown(None), None);
        assert_eq!(shown(Some("a.example")).as_deref(), Some("a.example"));
        let (fits, long) = ("b".repeat(60), format!("{}.example", "a".repeat(245)));
        assert_eq!(shown(Some(&fits)), Some(fits.clone()));
        assert_eq!(shown(Some(&long)), Some(format!("...{}.example", "a".repeat(52))));
    }

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
