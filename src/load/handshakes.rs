//! What a run counted of TLS handshakes: those made in full and those that took up an earlier session, how
//! long they took, and why others failed. One per thread, merged at the end. Pure.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::latencies::{histogram, nanos};
use crate::tls::client::FaultKind;

/// Why a handshake has failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// The server's certificate was not accepted.
    Certificate,
    /// The server refused by an alert.
    Alert,
    /// The server said what is no TLS, or not in its order.
    Protocol,
    /// The connection ended before the handshake did.
    Closed,
    /// The connection was reset.
    Reset,
    /// It was not over in time.
    TimedOut,
}

impl Reason {
    pub const ALL: [Reason; 6] = [
        Reason::Certificate,
        Reason::Alert,
        Reason::Protocol,
        Reason::Closed,
        Reason::Reset,
        Reason::TimedOut,
    ];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Certificate => "certificate",
            Reason::Alert => "alert",
            Reason::Protocol => "protocol",
            Reason::Closed => "closed",
            Reason::Reset => "reset",
            Reason::TimedOut => "timed_out",
        }
    }

    /// What went wrong, as a clause about the server.
    pub const fn words(self) -> &'static str {
        match self {
            Reason::Certificate => "its certificate was not accepted",
            Reason::Alert => "it refused the handshake",
            Reason::Protocol => "its answer was no TLS",
            Reason::Closed | Reason::Reset => {
                "it closed the connection during the handshake; does it speak TLS there?"
            }
            Reason::TimedOut => "it did not finish the handshake in time; does it speak TLS there?",
        }
    }
}

impl From<FaultKind> for Reason {
    fn from(kind: FaultKind) -> Reason {
        match kind {
            FaultKind::Certificate => Reason::Certificate,
            FaultKind::Alert => Reason::Alert,
            FaultKind::Protocol => Reason::Protocol,
        }
    }
}

/// The counts of one thread, or of all. Of short connections, those within the measured window; standing ones
/// make theirs before it, so there they count from the start.
pub struct Handshakes {
    pub full: u64,
    pub resumed: u64,
    /// Of both, those within the measured window.
    pub measured: u64,
    /// Nanoseconds from the ClientHello to the end.
    pub latency: Histogram<u64>,
    /// By `Reason as usize`, over the whole run.
    pub failures: [u64; Reason::ALL.len()],
    /// What went wrong with the first that failed.
    pub first_failure: Option<String>,
    /// What the first agreed on.
    pub agreed: Option<String>,
}

impl Default for Handshakes {
    fn default() -> Handshakes {
        Handshakes {
            full: 0,
            resumed: 0,
            measured: 0,
            latency: histogram(),
            failures: [0; Reason::ALL.len()],
            first_failure: None,
            agreed: None,
        }
    }
}

impl Handshakes {
    /// Counts one that is over.
    pub fn made(&mut self, after: Duration, is_resumed: bool) {
        match is_resumed {
            true => self.resumed += 1,
            false => self.full += 1,
        }
        self.latency.saturating_record(nanos(after));
    }

    pub fn failed(&mut self, reason: Reason, words: impl FnOnce() -> String) {
        self.failures[reason as usize] += 1;
        self.first_failure.get_or_insert_with(words);
    }

    pub fn total(&self) -> u64 {
        self.full + self.resumed
    }

    /// The share of them that took up an earlier session; `None` if there are none.
    pub fn resumed_percent(&self) -> Option<f64> {
        (self.total() > 0).then(|| self.resumed as f64 * 100.0 / self.total() as f64)
    }

    /// Adds what another thread counted.
    pub fn merge(&mut self, other: &Handshakes) {
        self.full += other.full;
        self.resumed += other.resumed;
        self.measured += other.measured;
        self.latency.add(&other.latency).expect("histograms of one make add up");
        for (mine, theirs) in self.failures.iter_mut().zip(other.failures) {
            *mine += theirs;
        }
        self.first_failure = self.first_failure.take().or_else(|| other.first_failure.clone());
        self.agreed = self.agreed.take().or_else(|| other.agreed.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_place_and_a_name_of_its_own() {
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
        }
        let names: std::collections::BTreeSet<_> = Reason::ALL.map(Reason::name).into();
        assert_eq!(names.len(), Reason::ALL.len());
    }

    #[test]
    fn threads_add_up_and_the_first_words_stay() {
        let mut all = Handshakes::default();
        assert_eq!(all.resumed_percent(), None);
        for thread in 1..=2u64 {
            let mut one = Handshakes::default();
            one.made(Duration::from_micros(100 * thread), false);
            one.made(Duration::from_micros(50), true);
            one.measured = thread;
            one.failed(Reason::Alert, || format!("no {thread}"));
            one.failed(Reason::Alert, || "never".to_owned());
            all.merge(&one);
        }
        assert_eq!((all.full, all.resumed, all.measured, all.latency.len()), (2, 2, 3, 4));
        assert_eq!((all.failures[Reason::Alert as usize], all.resumed_percent()), (4, Some(50.0)));
        assert_eq!(all.first_failure.as_deref(), Some("no 1"));
    }
}
