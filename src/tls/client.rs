//! One TLS connection with a server, as the load generator makes it: whom it trusts, whether it takes up an
//! earlier session, and rustls between ciphertext and plaintext. Owns these calls into rustls and the words
//! for what went wrong; moves no byte through a socket.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufRead, IoSlice, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientConnection, ClientSessionStore, Resumption, Tls12ClientSessionValue,
    Tls13ClientSessionValue,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, HandshakeKind, NamedGroup,
    ProtocolVersion, RootCertStore, SignatureScheme,
};

use super::authorities;

/// The most tickets that are kept; the oldest go first.
const TICKETS_MAX: usize = 16_384;

/// Whom a certificate must come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// One of the authorities that this host trusts.
    Host,
    /// One of those in a file.
    File(PathBuf),
    /// Whoever answers: neither the certificate nor the signature made with it is looked at.
    Anybody,
}

/// How keys are agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    X25519MlKem768,
    X25519,
    P256,
    P384,
}

impl Group {
    pub const ALL: [Group; 4] = [Group::X25519MlKem768, Group::X25519, Group::P256, Group::P384];

    /// The name in IANA's registry of TLS groups.
    pub const fn name(self) -> &'static str {
        match self {
            Group::X25519MlKem768 => "X25519MLKEM768",
            Group::X25519 => "X25519",
            Group::P256 => "secp256r1",
            Group::P384 => "secp384r1",
        }
    }

    fn number(self) -> NamedGroup {
        match self {
            Group::X25519MlKem768 => NamedGroup::X25519MLKEM768,
            Group::X25519 => NamedGroup::X25519,
            Group::P256 => NamedGroup::secp256r1,
            Group::P384 => NamedGroup::secp384r1,
        }
    }
}

/// What a client asks for and insists on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wishes {
    /// The host that the server's certificate must be for; sent along (SNI) unless it is an address.
    pub name: String,
    pub trust: Trust,
    /// Sessions of earlier connections are taken up.
    pub resumes: bool,
    /// The only group that is offered; `None`: all, with X25519MLKEM768 first.
    pub group: Option<Group>,
    /// What is spoken under TLS, if it is said (ALPN).
    pub alpn: Option<Alpn>,
}

/// A protocol under TLS (RFC 7301).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alpn {
    Http1,
    Http2,
}

impl Alpn {
    /// The name in IANA's registry of protocol IDs.
    pub const fn name(self) -> &'static str {
        match self {
            Alpn::Http1 => "http/1.1",
            Alpn::Http2 => "h2",
        }
    }
}

/// The same, ready to connect with. Tickets are shared by all connections of one value and its clones.
#[derive(Clone, Debug)]
pub struct Terms {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Terms {
    /// # Errors
    /// One sentence on what cannot be used, with the cure.
    pub fn new(wishes: &Wishes) -> Result<Terms, String> {
        let name = ServerName::try_from(wishes.name.clone())
            .map_err(|_| format!("`{}` is no name that a certificate can be for", wishes.name))?;
        let provider = Arc::new(provider(wishes.group));
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS cannot be set up: {error}"))?;
        let builder = match &wishes.trust {
            Trust::Host => builder.with_root_certificates(of_this_host()?),
            Trust::File(path) => builder.with_root_certificates(authorities::in_file(path)?),
            Trust::Anybody => {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(provider)))
            }
        };
        let mut config = builder.with_no_client_auth();
        config.alpn_protocols =
            wishes.alpn.iter().map(|alpn| alpn.name().as_bytes().to_vec()).collect();
        config.resumption = match wishes.resumes {
            true => Resumption::store(Arc::new(Sessions::default())),
            false => Resumption::disabled(),
        };
        Ok(Terms { config: Arc::new(config), name })
    }
}

fn provider(group: Option<Group>) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    if let Some(group) = group {
        provider.kx_groups.retain(|offered| offered.name() == group.number());
    }
    provider
}

fn of_this_host() -> Result<RootCertStore, String> {
    let roots = authorities::of_this_host();
    match roots.is_empty() {
        false => Ok(roots),
        true => Err("this host has no file of authorities to verify the server by: install \
            ca-certificates, name a file with --tls-ca, or trust anybody with --insecure"
            .to_owned()),
    }
}

/// Why a connection cannot go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    pub kind: FaultKind,
    /// A clause about the server.
    pub words: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// Its certificate is not accepted.
    Certificate,
    /// It has refused, by an alert.
    Alert,
    /// What it says is no TLS, or not in its order.
    Protocol,
}

impl Fault {
    fn of(error: &Error, name: &ServerName<'_>) -> Fault {
        let kind = match error {
            Error::InvalidCertificate(_) => FaultKind::Certificate,
            Error::AlertReceived(_) => FaultKind::Alert,
            _ => FaultKind::Protocol,
        };
        let words = match error {
            Error::InvalidCertificate(why) => distrust(why, name),
            Error::AlertReceived(alert) => format!("it refused the handshake ({alert:?})"),
            Error::InvalidMessage(_) => "its answer was no TLS; does it speak TLS there?".into(),
            other => other.to_string(),
        };
        Fault { kind, words }
    }
}

fn distrust(why: &CertificateError, name: &ServerName<'_>) -> String {
    match why {
        // The second is that of one who calls itself like an authority that is trusted.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate comes from no trusted authority; name \
            one with --tls-ca, or trust anybody with --insecure"
                .to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let name = name.to_str();
            format!("its certificate is not for {name}; ask for another host with --tls-name")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has ended".to_owned()
        }
        other => format!("its certificate is not accepted ({other})"),
    }
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    connection: ClientConnection,
    name: ServerName<'static>,
    /// The server has said that nothing more comes (close_notify).
    ended: bool,
}

impl Client {
    /// A connection whose ClientHello is ready.
    ///
    /// # Errors
    /// Something is lacking on this side.
    pub fn new(terms: &Terms) -> Result<Client, Fault> {
        let name = terms.name.clone();
        let connection = ClientConnection::new(Arc::clone(&terms.config), name.clone());
        let mut connection = connection.map_err(|error| Fault::of(&error, &name))?;
        // What is sealed is bounded by the size of a request.
        connection.set_buffer_limit(None);
        Ok(Client { connection, name, ended: false })
    }

    /// Takes ciphertext off the front of `bytes`: all of it, or as much as there is room for before
    /// [`Client::plaintext`] has been read.
    ///
    /// # Errors
    /// Why the connection is over. An alert is left for [`Client::flush`].
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            match self.connection.read_tls(bytes) {
                // Nothing counts after a close_notify.
                Ok(0) => *bytes = &[],
                Ok(_) => {}
                Err(_) if !self.plaintext().is_empty() => break,
                Err(error) => {
                    return Err(Fault { kind: FaultKind::Protocol, words: error.to_string() });
                }
            }
            let processed = self.connection.process_new_packets();
            let state = processed.map_err(|error| Fault::of(&error, &self.name))?;
            self.ended = state.peer_has_closed();
        }
        Ok(())
    }

    /// What the server has said and nobody has [consumed](Client::consume): a part of it, empty only if there
    /// is none.
    pub fn plaintext(&mut self) -> &[u8] {
        self.connection.reader().into_first_chunk().unwrap_or_default()
    }

    /// Drops the first bytes of [`Client::plaintext`].
    pub fn consume(&mut self, bytes: usize) {
        self.connection.reader().consume(bytes);
    }

    /// Seals these pieces as one message.
    pub fn seal(&mut self, pieces: &[IoSlice<'_>]) {
        // There is no limit, and memory takes all bytes.
        let _ = self.connection.writer().write_vectored(pieces);
    }

    /// Tells the server that nothing more will come (close_notify).
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
    pub fn flush(&mut self, outlet: &mut impl Write) -> io::Result<()> {
        while self.connection.wants_write() {
            if self.connection.write_tls(outlet)? == 0 {
                break;
            }
        }
        Ok(())
    }

    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whether the server has ended the connection in the way of TLS.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the server has said that it speaks this.
    pub fn has_agreed_on(&self, alpn: Alpn) -> bool {
        self.connection.alpn_protocol() == Some(alpn.name().as_bytes())
    }

    /// Whether keys of an earlier connection were used again.
    pub fn is_resumed(&self) -> bool {
        self.connection.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// Version, cipher and group that were agreed on: `TLS 1.3, AES_128_GCM, X25519`.
    pub fn agreed(&self) -> String {
        let version = match self.connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "TLS 1.2",
            _ => "TLS 1.3",
        };
        let cipher = self.connection.negotiated_cipher_suite().map(|suite| suite.suite());
        let cipher = cipher.and_then(|suite| suite.as_str()).unwrap_or("?");
        let cipher = cipher.split_once("_WITH_").map_or(cipher, |(_, cipher)| cipher);
        let cipher = cipher.trim_start_matches("TLS13_").trim_end_matches("_SHA256");
        let cipher = cipher.trim_end_matches("_SHA384");
        let group = self.connection.negotiated_key_exchange_group().map(|group| group.name());
        let group = group.and_then(|group| group.as_str()).unwrap_or("?");
        format!("{version}, {cipher}, {group}")
    }
}

/// Tickets of one server. The newest is used first, and each once.
#[derive(Default)]
struct Sessions {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    group: Option<NamedGroup>,
    tls12: Option<Tls12ClientSessionValue>,
    tls13: VecDeque<Tls13ClientSessionValue>,
}

impl Sessions {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing can fail halfway while it is held.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} tickets", self.kept().tls13.len())
    }
}

impl ClientSessionStore for Sessions {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.kept().group = Some(group);
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.kept().group
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.kept().tls12 = Some(value);
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.kept().tls12.clone()
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        self.kept().tls12 = None;
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        let mut kept = self.kept();
        if kept.tls13.len() == TICKETS_MAX {
            kept.tls13.pop_front();
        }
        kept.tls13.push_back(value);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.kept().tls13.pop_back()
    }
}

/// Takes whoever answers, and saves the work of looking.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
