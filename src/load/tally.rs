//! What a run counted: requests, bytes, faults by kind, latencies, and which backend answered. One
//! per thread, merged at the end. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::handshakes::{Handshakes, Reason};
use super::latencies::{histogram, nanos};

/// What can go wrong with a request or its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestFailure {
    /// The connection was refused.
    Refused,
    /// The connection could not be made for another reason.
    Unreachable,
    /// The connection was reset.
    Reset,
    /// The connection ended before the reply did.
    Closed,
    /// No reply in time.
    TimedOut,
    /// Bytes that were never sent, or a reply of the wrong length.
    Corrupt,
    /// A reply that belongs to another connection.
    WrongClient,
    /// A reply that overtook the reply to an earlier request.
    Reordered,
    /// A datagram, or the rest of a stream, that never came back.
    Lost,
    /// A reply that had already been given.
    Duplicated,
    /// A reply that came after it had been given up.
    Late,
    /// A session answered by a different backend than before.
    Moved,
    /// An HTTP status of 400 and above.
    Status,
    /// A response that is not HTTP.
    Malformed,
    /// The TLS handshake failed; why is counted beside it.
    Tls,
    /// A request that the server refused to begin (HTTP/2's REFUSED_STREAM).
    StreamRefused,
    /// A request that the server broke off, and not the connection (RST_STREAM).
    StreamReset,
    /// A request left out, or cut off, as the server gave up the connection (GOAWAY).
    GoAway,
}

impl RequestFailure {
    pub const ALL: [RequestFailure; 18] = [
        RequestFailure::Refused,
        RequestFailure::Unreachable,
        RequestFailure::Reset,
        RequestFailure::Closed,
        RequestFailure::TimedOut,
        RequestFailure::Corrupt,
        RequestFailure::WrongClient,
        RequestFailure::Reordered,
        RequestFailure::Lost,
        RequestFailure::Duplicated,
        RequestFailure::Late,
        RequestFailure::Moved,
        RequestFailure::Status,
        RequestFailure::Malformed,
        RequestFailure::Tls,
        RequestFailure::StreamRefused,
        RequestFailure::StreamReset,
        RequestFailure::GoAway,
    ];

    /// The name in reports and in `--expect`.
    pub const fn name(self) -> &'static str {
        match self {
            RequestFailure::Refused => "refused",
            RequestFailure::Unreachable => "unreachable",
            RequestFailure::Reset => "reset",
            RequestFailure::Closed => "closed",
            RequestFailure::TimedOut => "timed_out",
            RequestFailure::Corrupt => "corrupt",
            RequestFailure::WrongClient => "wrong_client",
            RequestFailure::Reordered => "reordered",
            RequestFailure::Lost => "lost",
            RequestFailure::Duplicated => "duplicated",
            RequestFailure::Late => "late",
            RequestFailure::Moved => "moved",
            RequestFailure::Status => "status",
            RequestFailure::Malformed => "malformed",
            RequestFailure::Tls => "tls",
            RequestFailure::StreamRefused => "stream_refused",
            RequestFailure::StreamReset => "stream_reset",
            RequestFailure::GoAway => "goaway",
        }
    }
}

/// Why a handshake has failed whose connection has.
impl From<RequestFailure> for Reason {
    fn from(failure: RequestFailure) -> Reason {
        match failure {
            RequestFailure::Reset => Reason::Reset,
            RequestFailure::TimedOut => Reason::TimedOut,
            _ => Reason::Closed,
        }
    }
}

/// What one backend did, as far as the replies told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Share {
    /// Connections or flows whose first reply came from it.
    pub sessions: u64,
    pub requests: u64,
}

/// The counts of one thread, or of all.
pub struct Tally {
    /// Complete and correct replies within the measured window.
    pub requests: u64,
    /// Payload bytes within the measured window.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// By `RequestFailure as usize`, over the whole run: a fault during warm-up is a fault.
    pub faults: [u64; RequestFailure::ALL.len()],
    /// Nanoseconds from when a request was sent (closed loop) or due (open loop) to its complete
    /// reply.
    pub latency: Histogram<u64>,
    /// Nanoseconds by which the generator was late by its own schedule.
    pub lag: Histogram<u64>,
    /// Planned requests for which no connection was free by the end.
    pub unsent: u64,
    /// By the backend's own number.
    pub backends: BTreeMap<u32, Share>,
    /// Sessions whose backend is known, and how many of them had more than one.
    pub sessions_known: u64,
    pub sessions_moved: u64,
    /// Of connections under TLS.
    pub handshakes: Handshakes,
    /// The fewest requests at a time that an HTTP/2 server has permitted on a connection.
    pub streams_permitted: Option<usize>,
}

impl Default for Tally {
    fn default() -> Tally {
        Tally::new()
    }
}

impl Tally {
    pub fn new() -> Tally {
        Tally {
            requests: 0,
            bytes_sent: 0,
            bytes_received: 0,
            faults: [0; RequestFailure::ALL.len()],
            latency: histogram(),
            lag: histogram(),
            unsent: 0,
            backends: BTreeMap::new(),
            sessions_known: 0,
            sessions_moved: 0,
            handshakes: Handshakes::default(),
            streams_permitted: None,
        }
    }

    /// Counts one complete reply.
    pub fn answered(&mut self, after: Duration) {
        self.requests += 1;
        self.latency.saturating_record(nanos(after));
    }

    pub fn fault(&mut self, fault: RequestFailure) {
        self.faults[fault as usize] += 1;
    }

    /// Counts a reply that is a session of its own, since every request is balanced by itself.
    pub fn answered_by(&mut self, backend: u32) {
        if backend != 0 {
            let share = self.backends.entry(backend).or_default();
            share.sessions += 1;
            share.requests += 1;
        }
    }

    /// Notes how many requests at a time a server permits.
    pub fn permitted(&mut self, streams: usize) {
        self.streams_permitted = Some(self.streams_permitted.map_or(streams, |it| it.min(streams)));
    }

    pub fn lagged(&mut self, by: Duration) {
        self.lag.saturating_record(nanos(by));
    }

    /// Faults of all kinds.
    pub fn errors(&self) -> u64 {
        self.faults.iter().sum()
    }

    /// The faults that occurred, by kind: `refused 3, lost 1`.
    pub fn kinds(&self) -> String {
        let kinds =
            RequestFailure::ALL.into_iter().map(|fault| (fault, self.faults[fault as usize]));
        let kinds = kinds.filter(|(_, count)| *count > 0);
        kinds
            .map(|(fault, count)| format!("{} {count}", fault.name()))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Adds what another thread counted.
    pub fn merge(&mut self, other: &Tally) {
        self.requests += other.requests;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        for (mine, theirs) in self.faults.iter_mut().zip(other.faults) {
            *mine += theirs;
        }
        self.latency.add(&other.latency).expect("histograms of one make add up");
        self.lag.add(&other.lag).expect("histograms of one make add up");
        self.unsent += other.unsent;
        for (backend, share) in &other.backends {
            let mine = self.backends.entry(*backend).or_default();
            mine.sessions += share.sessions;
            mine.requests += share.requests;
        }
        self.sessions_known += other.sessions_known;
        self.sessions_moved += other.sessions_moved;
        self.handshakes.merge(&other.handshakes);
        other.streams_permitted.into_iter().for_each(|streams| self.permitted(streams));
    }

    /// The percentage of the known sessions that stayed on one backend; `None` if no reply named
    /// its backend.
    pub fn sticky_percent(&self) -> Option<f64> {
        if self.sessions_known == 0 {
            return None;
        }
        let stayed = self.sessions_known - self.sessions_moved;
        Some(stayed as f64 * 100.0 / self.sessions_known as f64)
    }

    /// The difference in sessions between the backend with the most and the one with the fewest;
    /// `None` if no reply named its backend. A backend that got none at all cannot be seen from
    /// here.
    pub fn spread(&self) -> Option<u64> {
        let sessions = || self.backends.values().map(|share| share.sessions);
        Some(sessions().max()? - sessions().min()?)
    }
}

/// What a client remembers about a session's backend from reply to reply, so that counting needs no
/// look-up for each.
#[derive(Clone, Copy, Default, Debug)]
pub struct Home {
    backend: u32,
    requests: u64,
    moved: bool,
}

impl Home {
    /// Records who answered; true if a session that should stay has moved. Zero says nothing.
    pub fn answered_by(&mut self, backend: u32, tally: &mut Tally) -> bool {
        if backend == self.backend {
            self.requests += 1;
            return false;
        }
        if backend == 0 {
            return false;
        }
        let known = self.backend != 0;
        self.settle(tally);
        let share = tally.backends.entry(backend).or_default();
        if !known {
            share.sessions += 1;
            tally.sessions_known += 1;
        } else if !self.moved {
            self.moved = true;
            tally.sessions_moved += 1;
        }
        self.backend = backend;
        self.requests = 1;
        known
    }

    /// Writes what is remembered into the tally.
    pub fn settle(&mut self, tally: &mut Tally) {
        if self.backend != 0 && self.requests > 0 {
            tally.backends.entry(self.backend).or_default().requests += self.requests;
        }
        self.requests = 0;
    }

    /// The session is over; the next one starts afresh.
    pub fn end(&mut self, tally: &mut Tally) {
        self.settle(tally);
        *self = Home::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_a_place_and_a_name_of_its_own() {
        for (place, fault) in RequestFailure::ALL.into_iter().enumerate() {
            assert_eq!(fault as usize, place);
        }
        let names: std::collections::BTreeSet<_> =
            RequestFailure::ALL.map(RequestFailure::name).into();
        assert_eq!(names.len(), RequestFailure::ALL.len());
    }

    #[test]
    fn threads_add_up() {
        let mut all = Tally::new();
        for thread in 1..=2u64 {
            let mut tally = Tally::new();
            tally.answered(Duration::from_micros(100 * thread));
            tally.fault(RequestFailure::Lost);
            tally.bytes_sent = 64 * thread;
            tally.permitted(100 * thread as usize);
            Home::default().answered_by(thread as u32, &mut tally);
            all.merge(&tally);
        }
        assert_eq!((all.requests, all.bytes_sent, all.errors()), (2, 192, 2));
        assert_eq!((all.latency.len(), all.streams_permitted), (2, Some(100)));
        assert_eq!((all.sessions_known, all.spread()), (2, Some(0)));
    }

    #[test]
    fn a_session_that_moves_is_seen_once() {
        let mut tally = Tally::new();
        let mut stays = Home::default();
        let mut moves = Home::default();
        for backend in [7, 7, 7] {
            assert!(!stays.answered_by(backend, &mut tally));
        }
        let moved: Vec<bool> =
            [7, 8, 7].map(|backend| moves.answered_by(backend, &mut tally)).into();
        assert_eq!(moved, [false, true, true]);
        stays.end(&mut tally);
        moves.end(&mut tally);
        assert_eq!(tally.sticky_percent(), Some(50.0));
        assert_eq!(tally.backends[&7], Share { sessions: 2, requests: 5 });
        assert_eq!(tally.backends[&8], Share { sessions: 0, requests: 1 });
    }

    #[test]
    fn backends_that_do_not_say_who_they_are_leave_it_unknown() {
        let mut tally = Tally::new();
        let mut home = Home::default();
        assert!(!home.answered_by(0, &mut tally));
        home.end(&mut tally);
        assert_eq!((tally.sticky_percent(), tally.spread()), (None, None));
    }

    #[test]
    fn a_latency_beyond_the_histogram_counts_as_its_longest() {
        let mut tally = Tally::new();
        tally.answered(Duration::from_secs(10 * 3600));
        assert!(tally.latency.max() >= crate::load::latencies::MAX_NS);
    }
}
