//! TLS with backends, where we are the client: whom a backend's certificate must come from and be for, and what
//! is kept of earlier connections. Owns the calls into rustls that come before such a connection, and the
//! words for what went wrong with one.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientSessionMemoryCache, Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use super::engine::{Distrust, Engine, Fault};
use super::{authorities, keys};

/// The most backends of which a worker keeps sessions to resume.
const REMEMBERED_MAX: usize = 512;
/// What rustls takes for the tickets of one name, of which it then keeps 8.
const TICKETS: usize = 8;

/// Why there is no TLS connection to a backend, for the log and for its owner.
pub fn reason(fault: Fault) -> &'static str {
    match fault {
        Fault::Distrusted(Distrust::UnknownAuthority) => {
            "its certificate comes from no authority that we trust (backend_tls.ca)"
        }
        Fault::Distrusted(what) => what.told(),
        Fault::CutOff => "it closed the connection during the handshake: does it speak TLS there?",
        Fault::Protocol => "its answer was no TLS: does it speak TLS there?",
        Fault::NothingInCommon => "it shares no version, cipher or protocol with us",
        Fault::Alert | Fault::UnknownHost => "it refused the handshake",
        Fault::NoClientCertificate | Fault::CertificateRefused => {
            "it asks for a certificate of ours, which it did not get"
        }
        Fault::BadRecord => "a record of its handshake was damaged",
        Fault::Internal => "something was lacking on this side",
    }
}

/// That a backend is reached by TLS, and how it is verified.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BackendTls {
    /// The host that its certificate must be for; `None`: its address.
    pub name: Option<Arc<str>>,
    /// A file of authorities for it alone.
    pub ca: Option<Arc<Path>>,
}

impl BackendTls {
    /// The name, or address, that the certificate of the backend at this address must be for.
    pub fn name_for(&self, address: IpAddr) -> String {
        self.name.as_deref().map_or_else(|| address.to_string(), str::to_owned)
    }
}

/// What is spoken with a backend under TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendSpeech {
    Http1,
    Http2,
    Anything,
}

/// How a connection to one backend is to be made: by what terms, and to whom.
#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for Client {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.name, to)
    }
}

impl PartialEq for Client {
    fn eq(&self, other: &Client) -> bool {
        Arc::ptr_eq(&self.config, &other.config) && self.name == other.name
    }
}

impl Eq for Client {}

impl Client {
    /// Begins a connection: its ClientHello is ready.
    ///
    /// # Errors
    /// Something is lacking on this side.
    pub fn begin(&self) -> Result<Engine, Fault> {
        Engine::connect(&self.config, &self.name)
    }

    /// The name, or address, that the backend's certificate must be for.
    pub fn name(&self) -> String {
        self.name.to_str().into_owned()
    }
}

/// Whether a certificate can be for this name.
pub fn is_name(text: &str) -> bool {
    ServerName::try_from(text).is_ok()
}

/// What is agreed with backends that are verified by the same authorities.
#[derive(Clone, Debug)]
struct Terms {
    /// With those that speak HTTP/1.1, HTTP/2, or anything.
    http: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    stream: Arc<ClientConfig>,
}

impl Terms {
    fn new(verifier: &Arc<dyn ServerCertVerifier>) -> Terms {
        Terms {
            http: config(verifier, &[b"http/1.1"]),
            http2: config(verifier, &[b"h2"]),
            stream: config(verifier, &[]),
        }
    }
}

/// How backends are verified. Workers hold it until the next reload.
#[derive(Clone, Debug)]
pub struct Backends {
    usual: Terms,
    /// By files of authorities that backends have for themselves.
    own: BTreeMap<PathBuf, Terms>,
    /// With those whose file has not been read yet: nobody is trusted.
    unread: Terms,
    /// How many authorities all have in common, and how many there are besides.
    common: usize,
    besides: usize,
    verifies: bool,
}

/// Nobody is trusted.
impl Default for Backends {
    fn default() -> Backends {
        let unread = Terms::new(&unlooked(false));
        let usual = unread.clone();
        Backends { usual, own: BTreeMap::new(), unread, common: 0, besides: 0, verifies: true }
    }
}

impl Backends {
    /// Reads the authorities: those in `ca`, else those that this host trusts; and those of single backends.
    /// Without `verifies`, whoever answers is taken for the backend.
    ///
    /// # Errors
    /// One sentence that names the file and what is wrong with it.
    pub fn read<'a>(
        ca: Option<&Path>,
        verifies: bool,
        own: impl Iterator<Item = &'a Path>,
    ) -> Result<Backends, String> {
        let usual = match ca {
            Some(path) => authorities::in_file(path)?,
            None => authorities::of_this_host(),
        };
        let (common, mut besides) = (usual.len(), 0);
        let verifier = |roots| match verifies {
            true => trusting(roots),
            false => unlooked(true),
        };
        let mut all = BTreeMap::new();
        for path in own {
            if !all.contains_key(path) {
                let roots = authorities::in_file(path)?;
                besides += roots.len();
                all.insert(path.to_owned(), Terms::new(&verifier(roots)));
            }
        }
        let usual = Terms::new(&verifier(usual));
        Ok(Backends { usual, own: all, common, besides, verifies, ..Backends::default() })
    }

    /// Why no backend without authorities of its own can be verified, if that is so.
    pub fn lack(&self) -> Option<&'static str> {
        (self.verifies && self.common == 0).then_some(
            "this host has no file of authorities to verify backends by: install ca-certificates, \
             or name one in backend_tls.ca",
        )
    }

    /// How many authorities there are in all.
    pub fn authorities(&self) -> usize {
        self.common + self.besides
    }

    /// How a connection to this backend is made.
    pub fn client(&self, tls: &BackendTls, address: IpAddr, speech: BackendSpeech) -> Client {
        let terms = match tls.ca.as_deref() {
            Some(path) => self.own.get(path).unwrap_or(&self.unread),
            None => &self.usual,
        };
        let config = Arc::clone(match speech {
            BackendSpeech::Http1 => &terms.http,
            BackendSpeech::Http2 => &terms.http2,
            BackendSpeech::Anything => &terms.stream,
        });
        let named = tls.name.as_deref().and_then(|name| ServerName::try_from(name).ok());
        let name = named.map(|name| name.to_owned());
        Client { config, name: name.unwrap_or(ServerName::IpAddress(address.into())) }
    }
}

/// What one worker has kept of its connections: by the number of the backend, and for each by name, so that no
/// session of one is ever offered to another.
#[derive(Debug, Default)]
pub struct Memory {
    all: HashMap<u32, Kept>,
}

#[derive(Debug)]
struct Kept {
    /// What was agreed when it was made, and the same with a memory.
    plain: Arc<ClientConfig>,
    keeping: Arc<ClientConfig>,
}

impl Memory {
    /// The same connection to this backend, in which an earlier one may be taken up. Sessions of before a
    /// reload are forgotten: they were verified by other terms.
    pub fn recall(&mut self, backend: u32, client: &Client) -> Client {
        if self.all.len() >= REMEMBERED_MAX && !self.all.contains_key(&backend) {
            self.all.clear();
        }
        let new = || {
            let mut keeping = ClientConfig::clone(&client.config);
            let store = Arc::new(ClientSessionMemoryCache::new(TICKETS));
            keeping.resumption = Resumption::store(store);
            Kept { plain: Arc::clone(&client.config), keeping: Arc::new(keeping) }
        };
        let kept = self.all.entry(backend).or_insert_with(new);
        if !Arc::ptr_eq(&kept.plain, &client.config) {
            *kept = new();
        }
        Client { config: Arc::clone(&kept.keeping), name: client.name.clone() }
    }
}

fn config(verifier: &Arc<dyn ServerCertVerifier>, protocols: &[&[u8]]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(keys::provider())
        .with_protocol_versions(&keys::VERSIONS)
        .expect("the ciphers are for these versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(verifier))
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    // A memory shared by several backends would offer one the sessions of another.
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Arc::new(config)
}

/// Takes what these authorities have signed for the name asked for.
fn trusting(roots: RootCertStore) -> Arc<dyn ServerCertVerifier> {
    match WebPkiServerVerifier::builder_with_provider(Arc::new(roots), keys::provider()).build() {
        Ok(verifier) => verifier,
        // There are none, or no lists of what is revoked, and no such list is given.
        Err(_) => unlooked(false),
    }
}

fn unlooked(accepts: bool) -> Arc<dyn ServerCertVerifier> {
    Arc::new(Verdict { accepts, provider: keys::provider() })
}

/// Looks at no certificate: takes whoever answers (`verify = "off"`), or nobody, for want of authorities.
#[derive(Debug)]
struct Verdict {
    accepts: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verdict {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.accepts {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
pub(crate) mod tests;
