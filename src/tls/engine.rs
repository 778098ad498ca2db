//! One TLS connection with a user or a backend: rustls between ciphertext and plaintext. Owns every call that a
//! connection makes into rustls, and what its errors mean here; moves no byte through a socket.

use std::io::{self, BufRead, IoSlice, Write};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::server::{Acceptor, ServerConnection};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, Error,
    HandshakeKind, PeerIncompatible,
};

use super::boundary::Boundary;
use super::clients::{ClientPolicy, Shown};
use super::keys::Terms;
use crate::base::quota::{Meter, Rate};
use crate::base::time::Now;

/// The most ciphertext that is held for a socket that takes no more, in bytes.
pub const SEALED_BYTES_MAX: usize = 64 * 1024;

/// Records without data after the handshake: in TLS 1.3, most likely changes of keys, each of which costs more
/// than the reading of many bytes. rustls itself bounds those without any data between (32), empty ones (32 in
/// a row) and warnings (4).
const DATALESS: Rate = Rate::new(100, 100);

const NOT_TLS: &str = "it sent something that is no TLS";
const RESTLESS: &str = "it sent too many records without data";
const ENDLESS: &str = "it sent a message that never ends";

/// Why a connection cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fault {
    /// No certificate is for the host asked for.
    UnknownHost,
    /// No version, cipher, group or protocol in common.
    NothingInCommon,
    /// The other end did not accept our certificate, or wants one, and said so.
    CertificateRefused,
    /// A user has shown no certificate, and nobody is served without.
    NoClientCertificate,
    /// The other end has shown a certificate that we do not accept.
    Distrusted(Distrust),
    /// The other end ended it with another fatal alert.
    Alert,
    /// The other end closed the connection during the handshake.
    CutOff,
    /// A record that was changed on its way, or sealed with another key.
    BadRecord,
    /// Messages that are not TLS, or not in their order.
    Protocol,
    /// Our own lack or error.
    Internal,
}

/// What is wrong with the certificate of the other end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Distrust {
    UnknownAuthority,
    OtherName,
    HasEnded,
    HasNotBegun,
    Revoked,
    /// It is an authority's own, or for another use.
    OtherUse,
    Unreadable,
}

/// A user who cannot be answered, and the last bytes to send: an alert.
#[derive(Debug)]
pub struct Refused {
    pub fault: Fault,
    /// The fault in words.
    pub why: &'static str,
    pub alert: Vec<u8>,
}

/// A refusal of our own: its alert is a fatal one in the clear, of this number (RFC 8446 section 6.2).
struct Own(Fault, &'static str, u8);

const UNKNOWN_HOST: Own = Own(Fault::UnknownHost, "no certificate is for this host", 112);
const UNSUITED: Own = Own(
    Fault::NothingInCommon,
    "it offers no cipher or signature that goes with the certificates of this host",
    40,
);

impl From<Own> for Refused {
    fn from(Own(fault, why, alert): Own) -> Refused {
        Refused { fault, why, alert: vec![21, 3, 3, 0, 2, 2, alert] }
    }
}

/// A connection whose ClientHello has come, or is to go out.
#[derive(Debug)]
pub struct Engine {
    connection: Connection,
    /// The other end has said that nothing more comes (close_notify).
    ended: bool,
    fault: Option<Fault>,
    /// The fault in words.
    why: &'static str,
    /// Of the signature in its handshake, in those with an elliptic curve.
    cost: u32,
    second: Second,
    boundary: Boundary,
    /// Plaintext that nobody has consumed, in bytes.
    unread: usize,
    dataless: Meter,
    /// What was asked of its user.
    clients: Option<Arc<ClientPolicy>>,
    /// With anybody who does not agree on HTTP/2 there is nothing to say.
    must_speak_http2: bool,
}

/// A second ClientHello, which a user is asked for whose key shares do not serve (RFC 8446 section 4.1.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Second {
    None,
    Awaited,
    Answered,
}

impl Engine {
    /// Answers a ClientHello; `hello` are its records, whole.
    ///
    /// # Errors
    /// Why there is no answer but an alert.
    pub fn accept(mut hello: &[u8], terms: &Terms) -> Result<Engine, Refused> {
        let mut acceptor = Acceptor::default();
        while !hello.is_empty() && acceptor.read_tls(&mut hello).is_ok_and(|taken| taken > 0) {
            let accepted = match acceptor.accept() {
                Ok(None) => continue,
                Ok(Some(accepted)) => accepted,
                Err((error, mut alert)) => return Err(refused(&error, |to| alert.write_all(to))),
            };
            let is_known = terms.knows(accepted.client_hello().server_name());
            let cost = terms.cost_for(&accepted.client_hello());
            return match accepted.into_connection(terms.config()) {
                Ok(connection) => Engine::begun(connection, cost, terms.clients(), hello),
                // No certificate was found. rustls would say access_denied, which tells a user nothing.
                Err((Error::General(_), _)) if is_known => Err(UNSUITED.into()),
                Err((Error::General(_), _)) => Err(UNKNOWN_HOST.into()),
                Err((error, mut alert)) => Err(refused(&error, |to| alert.write_all(to))),
            };
        }
        Err(Refused { fault: Fault::Protocol, why: NOT_TLS, alert: Vec::new() })
    }

    /// Whether a handshake that is over has not agreed on what has to be spoken: a server may choose nothing at all.
    pub fn lacks_protocol(&self) -> bool {
        self.must_speak_http2 && !self.speaks_http2()
    }

    /// Whether it was agreed to speak HTTP/2 (RFC 7301).
    pub fn speaks_http2(&self) -> bool {
        self.connection.alpn_protocol() == Some(b"h2")
    }

    fn begun(
        mut connection: ServerConnection,
        cost: u32,
        clients: Option<&Arc<ClientPolicy>>,
        mut rest: &[u8],
    ) -> Result<Engine, Refused> {
        connection.set_buffer_limit(Some(SEALED_BYTES_MAX));
        let is_asked_again =
            connection.handshake_kind() == Some(HandshakeKind::FullWithHelloRetryRequest);
        let second = if is_asked_again { Second::Awaited } else { Second::None };
        let mut engine = Engine::new(Connection::Server(connection), cost, second);
        engine.clients = clients.cloned();
        match engine.take(&mut rest, Now::default()) {
            Ok(()) => Ok(engine),
            Err(fault) => {
                let mut alert = Vec::new();
                // Writing to memory cannot fail.
                let _ = engine.flush(&mut alert);
                Err(Refused { fault, why: engine.why, alert })
            }
        }
    }

    /// Begins a connection with a backend that must show a certificate for this name. Its ClientHello is ready.
    ///
    /// # Errors
    /// Something is lacking on this side.
    pub(super) fn connect(
        config: &Arc<ClientConfig>,
        name: &ServerName<'static>,
    ) -> Result<Engine, Fault> {
        let connection = ClientConnection::new(Arc::clone(config), name.clone());
        let mut connection = connection.map_err(|_| Fault::Internal)?;
        connection.set_buffer_limit(Some(SEALED_BYTES_MAX));
        let engine = Engine::new(Connection::Client(connection), 0, Second::None);
        let must_speak_http2 = config.alpn_protocols.iter().map(Vec::as_slice).eq([b"h2"]);
        Ok(Engine { must_speak_http2, ..engine })
    }

    fn new(connection: Connection, cost: u32, second: Second) -> Engine {
        Engine {
            connection,
            ended: false,
            fault: None,
            why: "",
            cost,
            second,
            boundary: Boundary::default(),
            unread: 0,
            dataless: Meter::default(),
            clients: None,
            must_speak_http2: false,
        }
    }

    /// Takes ciphertext off the front of `bytes`: all of it, or as much as there is room for before
    /// [`Engine::plaintext`] has been read.
    ///
    /// # Errors
    /// Why the connection is over. An alert is left for [`Engine::flush`].
    pub fn take(&mut self, bytes: &mut &[u8], now: Now) -> Result<(), Fault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        while !bytes.is_empty() {
            let mut record = self.boundary.cut(bytes);
            let is_whole = match self.connection.read_tls(&mut record) {
                Ok(taken @ 1..) => {
                    let (taken, rest) = bytes.split_at(taken);
                    *bytes = rest;
                    self.boundary.pass(taken)
                }
                // Nothing counts after a close_notify.
                Ok(0) => {
                    *bytes = &[];
                    false
                }
                Err(_) if !self.plaintext().is_empty() => break,
                // It is full of a message in pieces that never ends.
                Err(_) => {
                    (self.fault, self.why) = (Some(Fault::Protocol), ENDLESS);
                    return Err(Fault::Protocol);
                }
            };
            self.process(is_whole, now)?;
        }
        Ok(())
    }

    /// `is_whole`: a record ends with what has been taken.
    fn process(&mut self, is_whole: bool, now: Now) -> Result<(), Fault> {
        let was_handshaking = self.connection.is_handshaking();
        match self.connection.process_new_packets() {
            Ok(state) => {
                self.ended = state.peer_has_closed();
                let before = std::mem::replace(&mut self.unread, state.plaintext_bytes_to_read());
                if is_whole && !was_handshaking && self.unread == before {
                    self.bear_dataless(now)?;
                }
                if self.second == Second::Awaited && self.connection.wants_write() {
                    self.second = Second::Answered;
                }
            }
            Err(error) => {
                let fault = fault(&error);
                (self.fault, self.why) = (Some(fault), why(&error));
                return Err(fault);
            }
        }
        Ok(())
    }

    /// A record has come without data.
    fn bear_dataless(&mut self, now: Now) -> Result<(), Fault> {
        if !self.dataless.has_room(DATALESS, now) {
            (self.fault, self.why) = (Some(Fault::Protocol), RESTLESS);
            return Err(Fault::Protocol);
        }
        self.dataless.take(DATALESS, now);
        Ok(())
    }

    /// What the other end has said and nobody has [consumed](Engine::consume): a part of it, empty only if there
    /// is none.
    pub fn plaintext(&mut self) -> &[u8] {
        self.connection.reader().into_first_chunk().unwrap_or_default()
    }

    /// Drops the first bytes of [`Engine::plaintext`].
    pub fn consume(&mut self, bytes: usize) {
        self.connection.reader().consume(bytes);
        self.unread -= bytes;
    }

    /// Seals as much of these pieces as there is room for, in as few records as hold them, and says how many
    /// bytes that was.
    pub fn seal(&mut self, pieces: &[IoSlice<'_>]) -> usize {
        self.connection.writer().write_vectored(pieces).unwrap_or(0)
    }

    /// Tells the other end that nothing more will come (close_notify).
    pub fn finish(&mut self) {
        self.connection.send_close_notify();
    }

    /// Whether something is ready for the socket.
    pub fn has_sealed(&self) -> bool {
        self.connection.wants_write()
    }

    /// Writes what is ready until all of it is out.
    ///
    /// # Errors
    /// Those of `outlet`; what it took is gone.
    pub fn flush(&mut self, outlet: &mut impl Write) -> io::Result<usize> {
        let mut out = 0;
        while self.connection.wants_write() {
            match self.connection.write_tls(outlet)? {
                0 => break,
                bytes => out += bytes,
            }
        }
        Ok(out)
    }

    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whether the other end has ended the connection in the way of TLS.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// What the signature of its handshake costs, in those with an elliptic curve.
    pub fn cost(&self) -> u32 {
        self.cost
    }

    /// Whether the user has been asked for another ClientHello, and nothing is signed before it comes.
    pub fn awaits_second_hello(&self) -> bool {
        self.second == Second::Awaited
    }

    /// Whether keys of an earlier connection were used again.
    pub fn is_resumed(&self) -> bool {
        self.connection.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// What [`Engine::take`] has failed of, for the log.
    pub fn why(&self) -> &'static str {
        self.why
    }

    /// What was asked of the user, if it was asked for a certificate.
    pub fn clients(&self) -> Option<&ClientPolicy> {
        self.clients.as_deref()
    }

    /// The certificate that it has shown, for others to be told; `None` if it was not asked for one.
    pub fn shown(&self) -> Option<Shown> {
        let policy = self.clients.as_ref()?;
        Some(Shown::new(policy, self.connection.peer_certificates().unwrap_or_default()))
    }

    /// The host that the user has asked for.
    pub fn host(&self) -> Option<&str> {
        match &self.connection {
            Connection::Server(connection) => connection.server_name(),
            Connection::Client(_) => None,
        }
    }
}

fn refused(error: &Error, write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> Refused {
    let mut alert = Vec::new();
    // Writing to memory cannot fail.
    let _ = write(&mut alert);
    Refused { fault: fault(error), why: why(error), alert }
}

fn fault(error: &Error) -> Fault {
    match error {
        Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateRequired,
        ) => Fault::CertificateRefused,
        Error::AlertReceived(_) => Fault::Alert,
        Error::PeerIncompatible(_) | Error::NoApplicationProtocol => Fault::NothingInCommon,
        Error::NoCertificatesPresented => Fault::NoClientCertificate,
        Error::InvalidCertificate(why) => Fault::Distrusted(distrust(why)),
        Error::DecryptError => Fault::BadRecord,
        Error::EncryptError | Error::FailedToGetRandomBytes | Error::FailedToGetCurrentTime => {
            Fault::Internal
        }
        _ => Fault::Protocol,
    }
}

impl Distrust {
    /// The same in words.
    pub fn told(self) -> &'static str {
        match self {
            Distrust::UnknownAuthority => "its certificate comes from no authority that we trust",
            Distrust::OtherName => "its certificate is for another name",
            Distrust::HasEnded => "its certificate has ended",
            Distrust::HasNotBegun => "its certificate is not valid yet",
            Distrust::Revoked => "its certificate has been revoked",
            Distrust::OtherUse => {
                "its certificate is for another use, or that of an authority (CA:TRUE)"
            }
            Distrust::Unreadable => "its certificate cannot be read or verified",
        }
    }
}

fn distrust(why: &CertificateError) -> Distrust {
    match why {
        CertificateError::UnknownIssuer => Distrust::UnknownAuthority,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            Distrust::OtherName
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => Distrust::HasEnded,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Distrust::HasNotBegun
        }
        CertificateError::Revoked => Distrust::Revoked,
        // The last is what rustls passes on from its verifier without a word of its own.
        CertificateError::InvalidPurpose
        | CertificateError::InvalidPurposeContext { .. }
        | CertificateError::Other(_) => Distrust::OtherUse,
        _ => Distrust::Unreadable,
    }
}

/// An error in words. What the user has sent is not quoted.
fn why(error: &Error) -> &'static str {
    match error {
        Error::AlertReceived(alert) => told(*alert),
        Error::PeerIncompatible(lack) => lacking(lack),
        Error::NoApplicationProtocol => "it offers no protocol (ALPN) that is spoken here",
        Error::DecryptError => "it sent a record that was changed on its way or has another key",
        Error::InvalidMessage(_) => NOT_TLS,
        Error::NoCertificatesPresented => "it has shown no certificate",
        Error::InvalidCertificate(what) => distrust(what).told(),
        Error::EncryptError | Error::FailedToGetRandomBytes | Error::FailedToGetCurrentTime => {
            "for a lack of ours"
        }
        _ => "it broke the protocol",
    }
}

/// What a user lacks that we need.
fn lacking(what: &PeerIncompatible) -> &'static str {
    match what {
        PeerIncompatible::ServerDoesNotSupportTls12Or13
        | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
        | PeerIncompatible::SupportedVersionsExtensionRequired
        | PeerIncompatible::Tls12NotOffered
        | PeerIncompatible::Tls12NotOfferedOrEnabled => "it offers neither TLS 1.2 nor 1.3",
        PeerIncompatible::NoCipherSuitesInCommon => {
            "it offers no cipher that is spoken here with these certificates"
        }
        PeerIncompatible::NoKxGroupsInCommon
        | PeerIncompatible::NamedGroupsExtensionRequired
        | PeerIncompatible::KeyShareExtensionRequired => {
            "it offers no group for the key exchange that is spoken here"
        }
        PeerIncompatible::NoSignatureSchemesInCommon
        | PeerIncompatible::SignatureAlgorithmsExtensionRequired => {
            "it understands the signature of no certificate"
        }
        _ => "it offers nothing that is spoken here",
    }
}

/// What a user says before it goes (RFC 8446 section 6.2).
fn told(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::UnknownCA => "it does not know who signed our certificate (unknown_ca)",
        AlertDescription::CertificateExpired => {
            "it holds our certificate for expired (certificate_expired)"
        }
        AlertDescription::BadCertificate => "it rejects our certificate (bad_certificate)",
        AlertDescription::CertificateUnknown => "it rejects our certificate (certificate_unknown)",
        AlertDescription::CertificateRevoked => "it rejects our certificate (certificate_revoked)",
        AlertDescription::UnsupportedCertificate => {
            "it rejects our certificate (unsupported_certificate)"
        }
        AlertDescription::HandshakeFailure => "it gave up (handshake_failure)",
        AlertDescription::ProtocolVersion => "it gave up (protocol_version)",
        AlertDescription::IllegalParameter => "it gave up (illegal_parameter)",
        AlertDescription::DecryptError => "it gave up (decrypt_error)",
        AlertDescription::InternalError => "it gave up (internal_error)",
        AlertDescription::UserCanceled => "it gave up (user_canceled)",
        _ => "it gave up with an alert",
    }
}
