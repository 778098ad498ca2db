//! What is counted. Owns the one table of counters: a row here is a field that a worker increments, a
//! line in `/metrics` and its help text. Every value has a single writer (its worker) and any number
//! of readers, so counting costs a load and a store on a cache line that no other core writes.

pub mod named;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::base::buckets::bucket_of;
pub use crate::base::buckets::{BOUNDS_US, BUCKETS};
use crate::base::recent::Recent;

/// Most backends counted at once; also the limit on registrations, and on what the file lists. Numbered with
/// 16 bits. Each takes 136 bytes of counters for each worker, almost half of them in the control core; memory comes
/// from the system only as places are first used.
pub const BACKENDS_MAX: usize = 16_384;

/// A number with one writer. Readers may see a slightly old value, never a torn one.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, by: u64) {
        self.0.store(self.get().wrapping_add(by), Ordering::Relaxed);
    }

    pub fn one(&self) {
        self.add(1);
    }

    /// For gauges: subtracts one. The writer never lets it pass below zero.
    pub fn less_one(&self) {
        self.0.store(self.get().wrapping_sub(1), Ordering::Relaxed);
    }

    pub fn set(&self, to: u64) {
        self.0.store(to, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Whether a row only grows, or can also go down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Counter,
    Gauge,
}

/// One row of a table: the name (without the `lb_` prefix), its kind and its help text.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
}

/// A table of counters and gauges.
pub trait Table {
    /// Its rows, in display order.
    fn rows() -> &'static [Row];

    /// Adds to what a row has; for its one writer.
    fn add(&self, row: usize, by: u64);
}

macro_rules! table {
    ($(#[$about:meta])* $table:ident { $($kind:ident $field:ident: $help:literal,)* }) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        pub struct $table { $(#[doc = $help] pub $field: Counter,)* }

        impl $table {
            /// The rows of the table, in display order.
            pub const ROWS: &'static [Row] = &[
                $(Row { name: stringify!($field), kind: Kind::$kind, help: $help },)*
            ];

            /// The values, in the order of [`Self::ROWS`].
            pub fn values(&self) -> [u64; Self::ROWS.len()] {
                [$(self.$field.get(),)*]
            }
        }

        impl Table for $table {
            fn rows() -> &'static [Row] {
                Self::ROWS
            }

            fn add(&self, row: usize, by: u64) {
                [$(&self.$field,)*][row].add(by);
            }
        }
    };
}

table! {
    /// What a worker counts about itself.
    WorkerCounters {
        Gauge sessions_active: "Sessions running now.",
        Counter sessions_started: "Sessions that were given a backend.",
        Counter sessions_ended: "Sessions that have ended, for any reason, including those that never got a backend.",
        Counter users_refused_no_backend: "Users turned away because no backend was registered.",
        Counter users_refused_full: "Users turned away because the session limit was reached.",
        Counter users_refused_barred: "Users and requests turned away because their service does not let them in, or has as many as it may.",
        Counter users_refused_unreachable: "Users turned away because every backend that was tried refused the connection.",
        Counter users_refused_exhausted: "Users turned away because descriptors, local ports or memory had run out.",
        Counter users_refused_no_proxy_header: "Connections from hosts in `proxy_from` that were closed because no valid PROXY header came.",
        Counter users_refused_proxy_header: "Users turned away because they sent a PROXY header and are not in `proxy_from`.",
        Counter tls_handshakes: "TLS handshakes that were completed.",
        Counter tls_resumed: "Those of them that took up an earlier session and cost no signature.",
        Counter tls_passed: "Connections passed on to a service by the host in their ClientHello, or for want of one, without ending TLS.",
        Counter tls_refused_full: "TLS users turned away because too many handshakes were under way.",
        Counter tls_refused_late: "TLS users turned away because their handshake took too long.",
        Counter tls_refused_hello: "Users of a TLS door turned away because their first bytes were no ClientHello.",
        Counter tls_refused_plain_http: "Users of a TLS door who sent an HTTP request in the clear; they are told (400).",
        Counter tls_refused_host: "TLS users turned away because no certificate is for the host that they asked for.",
        Counter tls_refused_nothing_in_common: "TLS users turned away because they share no version, cipher or protocol with us.",
        Counter tls_refused_by_user: "TLS users who did not accept our certificate.",
        Counter tls_refused_no_client_certificate: "TLS users turned away because they showed no certificate where one is required.",
        Counter tls_refused_client_certificate_expired: "TLS users turned away because their certificate has ended, or has yet to begin.",
        Counter tls_refused_client_certificate_revoked: "TLS users turned away because their certificate was revoked.",
        Counter tls_refused_client_certificate_untrusted: "TLS users turned away because no authority of `client_ca` vouches for their certificate.",
        Counter tls_refused_protocol: "TLS handshakes that broke the protocol or were given up by the user.",
        Counter tls_gone: "TLS users whose connection ended in the middle of the handshake.",
        Counter tls_broken: "TLS connections that ended after their handshake because the user broke the protocol, or with its alert.",
        Counter tls_failed: "TLS handshakes that failed for a lack of ours.",
        Counter tls_upstream_handshakes: "TLS handshakes with backends that were completed.",
        Counter tls_upstream_resumed: "Those of them that took up an earlier session.",
        Counter tls_upstream_failed: "TLS handshakes with backends that failed, mostly because of the certificate; `connects_failed` has them too.",
        Counter proxy_headers: "PROXY headers read from hosts in `proxy_from`.",
        Counter proxy_headers_sent: "PROXY headers sent to backends that want one.",
        Counter connects_failed: "Connections to a backend that were refused or timed out, or whose TLS handshake failed.",
        Counter connects_without_port: "Connections to a backend that could not be started because every local port towards it was in use.",
        Counter retries: "Users passed on to another backend after a failed connection.",
        Counter bytes_up: "Bytes from users sent on to backends.",
        Counter bytes_down: "Bytes from backends sent on to users.",
        Counter bytes_undelivered: "Bytes sent on but not acknowledged by the time their session ended.",
        Counter resets: "Sessions that ended with a reset.",
        Counter idle_ended: "Sessions ended because nothing had moved for too long.",
        Counter accept_failed: "Failed accepts, mostly for lack of descriptors.",
        Counter buffers_exhausted: "Receives that found the buffer pool empty and had to wait.",
        Gauge buffers_free: "Relay buffers not in use.",
        Gauge flows_held_back: "Flows that receive nothing until their reader takes more, because relay buffers are short.",
        Counter turns: "Turns of the worker's loop; stands still only if the worker hangs.",
        Counter reports_dropped: "Log lines lost because the control core fell behind.",
        Counter api_requests: "Requests from API users, whatever their outcome.",
        Counter api_refused: "API requests refused because of an error on the user's side (4xx).",
        Counter api_failed: "API requests that the balancer answered with an error because no backend answered (5xx).",
        Counter api_errors: "API requests answered with 5xx, by the balancer or by a backend, and those whose response broke off.",
        Counter api_unanswered: "API requests that their backend did not answer, or not take, in time (502 or 504).",
        Counter api_unclaimed: "API requests refused because no service has their host and path (404).",
        Counter api_misdirected: "API requests refused because their host asks for other client certificates than the connection was set up with (421).",
        Counter api_h2_streams: "Streams that API users have opened over HTTP/2, each a request.",
        Counter api_h2_calmed_frames: "API connections over HTTP/2 ended because of too many frames that ask for nothing.",
        Counter api_h2_calmed_resets: "API connections over HTTP/2 ended because of too many streams that were reset.",
        Counter api_fallbacks: "API requests that a service left to its `fallback`, in maintenance or for want of a backend.",
        Counter api_maintenance: "API requests refused because their service is under maintenance (503).",
        Counter api_heads_shed: "API users turned away because incomplete requests took up too much memory.",
        Counter api_users_followed: "API users who were in the middle of a request at an upgrade, and went on here when it had been answered.",
        Counter api_users_lost: "API users who could not go on here after an upgrade, and were disconnected between two requests.",
        Counter api_cut_short: "API requests whose response did not reach the user whole.",
        Counter api_upstream_reused: "API requests sent over a reused connection to a backend.",
        Counter api_requests_unlogged: "API requests without a log line, because there were too many.",
        Gauge api_upstream_idle: "Idle connections to backends, kept for later API requests.",
        Gauge api_upstream_private: "Idle connections to backends, each reserved for the one user who logged in on it.",
        Counter api_upstream_private_shed: "Connections reserved for a user who had logged in, closed because too many were kept.",
        Counter udp_datagrams_up: "Datagrams from users passed on to backends.",
        Counter udp_datagrams_down: "Datagrams from backends passed on to users.",
        Counter udp_datagrams_passed: "Datagrams from users handed to the worker that owns their session.",
        Counter udp_sessions_moved: "UDP sessions moved to another backend because theirs was lost.",
        Counter udp_sessions_found: "UDP sessions that turned up at this worker and kept the backend they had at another.",
        Counter udp_sessions_displaced: "Unused UDP sessions ended because a new one needed their room.",
        Counter udp_rests_cut_short: "Quarantines that ended before `quarantine_ms` because a session needed the pair of backend and socket.",
        Counter udp_refused: "ICMP messages saying that a backend's UDP port or host is unreachable.",
        Counter udp_refused_unasked: "Such ICMP messages about datagrams not sent recently, or already answered: not believed.",
        Counter udp_dropped_no_backend: "Datagrams dropped because no backend was registered.",
        Counter udp_dropped_barred: "Datagrams dropped because their service does not let their user in, or has as many sessions as it may.",
        Counter udp_dropped_table_full: "Datagrams dropped because the session limit was reached.",
        Counter udp_dropped_source_limit: "Datagrams dropped because their source already holds the most sessions allowed.",
        Counter udp_dropped_source_rate: "Datagrams dropped because their source opened sessions too fast.",
        Counter udp_dropped_source_share: "Datagrams dropped because room was short and their source holds more than its share.",
        Counter udp_dropped_upstream_exhausted: "Datagrams dropped because no socket to their backend was free.",
        Counter udp_dropped_draining: "Datagrams dropped because they would have opened a session while the balancer is stopping.",
        Counter udp_dropped_too_big: "Datagrams dropped because they are too big for the route.",
        Counter udp_dropped_truncated: "Datagrams dropped because they did not fit into a buffer.",
        Counter udp_dropped_queue_full: "Datagrams dropped because too many were waiting to be sent.",
        Counter udp_dropped_send_failed: "Datagrams that the kernel refused to send.",
        Counter udp_dropped_spoofed_reply: "Datagrams dropped because they reached an upstream socket from an address that is no backend's.",
        Counter udp_dropped_unknown_reply: "Replies dropped because they belong to no session.",
        Counter udp_dropped_late_reply: "Replies dropped because their session is over.",
        Gauge udp_sockets: "Sockets open towards backends.",
        Gauge udp_pairs_resting: "Pairs of backend and socket in quarantine after a session.",
    }
}

table! {
    /// What a worker counts about one backend.
    BackendCounters {
        Gauge active: "Sessions running on this backend now.",
        Counter total: "Sessions given to this backend.",
        Counter connect_failed: "Connections to this backend that were refused or timed out, or whose TLS handshake failed.",
        Counter connect_without_port: "Connections to this backend that could not be started because every local port towards it was in use.",
        Counter unanswered: "API requests that this backend did not answer in time.",
        Counter turned_away: "Datagrams from users dropped because no socket or local port towards this backend was available.",
        Counter up: "Bytes from users to this backend.",
        Counter down: "Bytes from this backend to users.",
    }
}

table! {
    /// What the control core counts about itself.
    ControlCounters {
        Gauge connections_active: "Control connections open now.",
        Counter connections_accepted: "Control connections accepted.",
        Counter connections_refused_stranger: "Control connections refused because their host may not register.",
        Counter connections_refused_full: "Control connections refused because the limit was reached.",
        Counter connections_displaced: "Control connections closed to make room because they had not yet proved or registered anything.",
        Counter proofs_failed: "Control connections that failed to prove the secret.",
        Counter messages: "Messages from backends, including answers to hello.",
        Counter messages_failed: "Messages from backends that were refused.",
        Counter backends_registered: "Backends that joined.",
        Counter backends_left: "Backends that left of their own accord.",
        Counter backends_lost: "Backends that left because their control connection was lost.",
        Counter registrations_refused_rights: "Registrations refused because the service takes none, or none from that host or with that secret.",
        Counter backends_unreachable: "Registrations refused because the data port did not answer.",
        Counter backends_set_aside: "Backends taken out of the rotation because a connection failed.",
        Counter backends_restored: "Backends brought back because a connection succeeded again, or after a wait where none is tried.",
        Counter checks: "Checks of backends, whether they passed or failed.",
        Counter checks_failed: "Checks of backends that failed.",
        Counter checks_not_run: "Checks of backends that could not be carried out because the balancer lacked descriptors, memory or local ports.",
        Counter backends_check_failed: "Backends taken out of the rotation because their check failed.",
        Counter backends_check_passed: "Backends put into the rotation because their check passed.",
        Counter hellos_sent: "Hellos sent to backends.",
        Counter hellos_missed: "Hellos not answered in time.",
        Counter snapshots_published: "Changes to the set of backends published to the workers.",
        Counter orders_lost: "Orders dropped because a worker did not take them.",
        Counter lines_held_back: "Log lines held back because there were too many of their kind or from their source.",
        Counter lines_dropped: "Log lines lost because standard output could not keep up.",
        Counter reloads: "Reloads that were applied.",
        Counter certificates_refused: "Files of certificates that had changed and could not be used.",
        Counter reloads_refused: "Reloads refused because the settings had an error.",
        Counter admin_requests: "Requests to the admin door.",
        Counter admin_connections_shed: "Connections to the admin door closed to make room for others.",
        Counter admin_changes: "Changes made over the admin door.",
        Counter admin_refused: "Changes requested over the admin door and refused.",
    }
}

/// Durations counted into [`BOUNDS_US`], plus one bucket for anything longer.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_us: Counter,
}

impl Histogram {
    pub fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(us)].one();
        self.sum_us.add(us);
    }

    /// Counts per bucket, not cumulative; the last counts what exceeded every bound.
    pub fn counts(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|place| self.buckets[place].get())
    }

    pub fn sum_us(&self) -> u64 {
        self.sum_us.get()
    }

    /// Adds what another has counted; for its one writer.
    pub fn add(&self, counts: &[u64; BUCKETS], sum_us: u64) {
        self.buckets.iter().zip(counts).for_each(|(bucket, more)| bucket.add(*more));
        self.sum_us.add(sum_us);
    }
}

/// Everything one worker counts. The worker writes, anyone reads.
#[derive(Debug)]
pub struct WorkerMetrics {
    pub counters: WorkerCounters,
    /// By `Backend::slot`.
    pub backends: Box<[BackendCounters]>,
    /// Slots whose `active` has changed, each time it has.
    pub changed: Recent,
    /// When each of them last began to answer an API request, in nanoseconds; likewise by slot.
    pub answered: Box<[Counter]>,
    pub connect_time: Histogram,
    pub first_byte_time: Histogram,
    pub session_length: Histogram,
}

impl WorkerMetrics {
    /// A session is on the backend in this slot.
    pub fn session_begun(&self, slot: u16) {
        self.backends[usize::from(slot)].active.one();
        self.changed.push(slot);
    }

    /// It no longer is.
    pub fn session_over(&self, slot: u16) {
        self.backends[usize::from(slot)].active.less_one();
        self.changed.push(slot);
    }
}

impl Default for WorkerMetrics {
    fn default() -> WorkerMetrics {
        WorkerMetrics {
            counters: WorkerCounters::default(),
            backends: (0..BACKENDS_MAX).map(|_| BackendCounters::default()).collect(),
            changed: Recent::default(),
            answered: (0..BACKENDS_MAX).map(|_| Counter::default()).collect(),
            connect_time: Histogram::default(),
            first_byte_time: Histogram::default(),
            session_length: Histogram::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        for us in [0, 50, 51, 3_600_000_000, 3_600_000_001] {
            histogram.record(Duration::from_micros(us));
        }
        let counts = histogram.counts();
        assert_eq!((counts[0], counts[1], counts[23], counts[24]), (2, 1, 1, 1));
        assert_eq!(histogram.sum_us(), 50 + 51 + 3_600_000_000 + 3_600_000_001);
    }

    #[test]
    fn rows_and_values_stand_in_the_same_order() {
        let counters = WorkerCounters::default();
        counters.turns.add(7);
        let place = WorkerCounters::ROWS.iter().position(|row| row.name == "turns").unwrap();
        assert_eq!(counters.values()[place], 7);
    }
}
