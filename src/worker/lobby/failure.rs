//! Why a user at a door with TLS is not served. Owns how each reason is counted, and what the log says of it;
//! how often the log says anything is up to the control core.

use super::Turn;
use crate::metrics::WorkerCounters;
use crate::tls::engine::{Distrust, Fault};
use crate::tls::hello::Malformed;
use crate::worker::greetings::Newcomer;

/// The reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Too many handshakes are under way, and its seat was needed.
    Full,
    Late,
    /// It asks for a host that no service at its door claims.
    NoService,
    /// Its connection has ended in the middle of the handshake.
    Gone,
    /// Its first bytes were no ClientHello.
    Hello(Malformed),
    /// It could not be answered, or its answer not be understood.
    Answer {
        fault: Fault,
        why: &'static str,
    },
}

impl Failure {
    /// Counts it, and has the log tell of it. `host` is what the user has asked for by now.
    pub fn tell(self, user: &Newcomer, host: Option<&str>, turn: &mut Turn<'_>) {
        self.count(&turn.books.metrics().counters);
        let of = (user.doorway.service, user.caller.address);
        turn.books.handshake_failed(of, host, self.why(), self.is_ours());
    }

    fn count(self, counters: &WorkerCounters) {
        match self {
            Failure::Full => counters.tls_refused_full.one(),
            Failure::Late => counters.tls_refused_late.one(),
            Failure::NoService => counters.tls_refused_host.one(),
            Failure::Gone => counters.tls_gone.one(),
            Failure::Hello(Malformed::PlainHttp) => counters.tls_refused_plain_http.one(),
            Failure::Hello(_) => counters.tls_refused_hello.one(),
            Failure::Answer { fault, .. } => match fault {
                Fault::UnknownHost => counters.tls_refused_host.one(),
                Fault::NothingInCommon => counters.tls_refused_nothing_in_common.one(),
                Fault::CertificateRefused => counters.tls_refused_by_user.one(),
                Fault::Alert | Fault::BadRecord | Fault::Protocol => {
                    counters.tls_refused_protocol.one();
                }
                // Of backends only.
                Fault::CutOff => counters.tls_refused_protocol.one(),
                Fault::NoClientCertificate => counters.tls_refused_no_client_certificate.one(),
                Fault::Distrusted(Distrust::HasEnded | Distrust::HasNotBegun) => {
                    counters.tls_refused_client_certificate_expired.one();
                }
                Fault::Distrusted(Distrust::Revoked) => {
                    counters.tls_refused_client_certificate_revoked.one();
                }
                Fault::Distrusted(_) => counters.tls_refused_client_certificate_untrusted.one(),
                Fault::Internal => counters.tls_failed.one(),
            },
        }
    }

    /// Whether the fault or the lack is ours.
    fn is_ours(self) -> bool {
        matches!(self, Failure::Full | Failure::Answer { fault: Fault::Internal, .. })
    }

    fn why(self) -> &'static str {
        match self {
            Failure::Full => "tls.handshakes are under way, and its seat was needed",
            Failure::Late => "it took longer than tls.handshake_ms",
            Failure::NoService => "no service at this door is for this host",
            Failure::Gone => "its connection ended in the middle of the handshake",
            Failure::Hello(Malformed::PlainHttp) => "it sent an HTTP request in the clear",
            Failure::Hello(Malformed::NotTls) => "its first bytes are no TLS",
            Failure::Hello(Malformed::TooLong) => "its ClientHello is too long",
            Failure::Hello(Malformed::Broken) => "its ClientHello contradicts itself",
            Failure::Answer { why, .. } => why,
        }
    }
}
