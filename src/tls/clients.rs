//! Certificates of users: who is asked for one, whose authorities count, which of theirs are revoked, and what
//! backends are told of a certificate (RFC 9440). Owns the calls into rustls that judge one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use super::files::{read, read_up_to};

/// The most certificates between a user's own and an authority: each may cost signatures to be checked.
const INTERMEDIATES_MAX: usize = 6;
/// The most bytes of a user's certificates together. What of them goes to a backend takes four thirds of that.
const SHOWN_BYTES_MAX: usize = 16 * 1024;
/// The most authorities in a file; each is named to every user who is asked (RFC 8446 section 4.2.4).
const AUTHORITIES_MAX: usize = 256;

/// The most bytes of a list of revoked certificates.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// What is asked of users before they are served. Those of two services with equal ones may use one connection
/// for both.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClientPolicy {
    /// Nobody is served without a certificate.
    pub is_required: bool,
    /// The file of authorities.
    pub ca: PathBuf,
    /// Files of what they have revoked (RFC 5280 section 5).
    pub crl: Vec<PathBuf>,
    /// Backends are told the certificates between the user's and the authority as well.
    pub tells_chain: bool,
}

impl ClientPolicy {
    /// Every file that it names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        [&self.ca].into_iter().chain(&self.crl).map(PathBuf::as_path)
    }
}

/// The certificate that a connection's user has shown, if any, and by which policy it was judged.
#[derive(Clone, Debug)]
pub struct Shown {
    pub policy: Arc<ClientPolicy>,
    /// Field lines for backends; empty without a certificate.
    pub fields: Box<[u8]>,
}

impl Shown {
    /// `chain` begins with the user's own.
    pub(super) fn new(policy: &Arc<ClientPolicy>, chain: &[CertificateDer<'_>]) -> Shown {
        Shown { policy: Arc::clone(policy), fields: fields(chain, policy.tells_chain) }
    }
}

/// `Client-Cert` and `Client-Cert-Chain` (RFC 9440 sections 2.2 and 2.3): byte sequences of structured fields.
fn fields(chain: &[CertificateDer<'_>], tells_chain: bool) -> Box<[u8]> {
    let Some((own, above)) = chain.split_first() else { return Box::default() };
    let sequence = |der: &CertificateDer<'_>| format!(":{}:", STANDARD.encode(der));
    let mut lines = format!("Client-Cert: {}\r\n", sequence(own));
    if tells_chain && !above.is_empty() {
        let all: Vec<String> = above.iter().map(sequence).collect();
        lines += &format!("Client-Cert-Chain: {}\r\n", all.join(", "));
    }
    lines.into_bytes().into()
}

/// The files of a policy, read.
#[derive(Clone, Debug)]
pub struct Authorities {
    pub policy: Arc<ClientPolicy>,
    /// How many there are.
    pub count: usize,
    /// When the first of them ends, in seconds of Unix time.
    pub not_after: i64,
    pub lists: Vec<List>,
    verifier: Arc<dyn ClientCertVerifier>,
}

/// A list of revoked certificates.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct List {
    pub file: PathBuf,
    /// How many certificates it names.
    pub revoked: usize,
    /// When a newer one is due, in seconds of Unix time.
    pub next_update: Option<i64>,
}

impl List {
    /// Whether a newer one should have come. It still counts: what it revokes stays revoked.
    pub fn is_overdue(&self, now: i64) -> bool {
        self.next_update.is_some_and(|due| due < now)
    }
}

impl Authorities {
    /// Reads and checks the files of a policy.
    ///
    /// # Errors
    /// One sentence that names the file and what is wrong with it.
    pub fn read(
        policy: &Arc<ClientPolicy>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Authorities, String> {
        let at = policy.ca.display();
        let certificates = certificates(&policy.ca, &read(&policy.ca)?)?;
        let mut roots = RootCertStore::empty();
        let mut not_after = i64::MAX;
        for der in certificates {
            not_after = not_after.min(authority(&der).map_err(|what| format!("{at} {what}"))?);
            let cannot = |error| format!("{at} holds a certificate that cannot be used: {error}");
            roots.add(der).map_err(cannot)?;
        }
        let count = roots.len();
        let (mut ders, mut lists) = (Vec::new(), Vec::new());
        for file in &policy.crl {
            let own = revocations(file, read_up_to(file, LIST_BYTES_MAX)?)?;
            lists.push(list(file, &own)?);
            ders.extend(own);
        }
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let builder = builder.with_crls(ders);
        let builder = match policy.is_required {
            true => builder,
            false => builder.allow_unauthenticated(),
        };
        let cannot = |error| format!("{at} and its lists of revoked certificates: {error}");
        let verifier = Arc::new(Bounded(builder.build().map_err(cannot)?));
        Ok(Authorities { policy: Arc::clone(policy), count, not_after, lists, verifier })
    }

    pub(super) fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.verifier)
    }
}

fn certificates(file: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let at = file.display();
    let all = CertificateDer::pem_slice_iter(bytes).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|error| format!("{at} holds no certificate in PEM: {error}"))?;
    match all.len() {
        0 => Err(format!("{at} holds no certificate in PEM")),
        1..=AUTHORITIES_MAX => Ok(all),
        many => Err(format!(
            "{at} holds {many} certificates, of which every user would be told: name those alone that \
             vouch for users, {AUTHORITIES_MAX} at most"
        )),
    }
}

/// When an authority ends. A certificate that may sign no others would let nobody in.
fn authority(der: &CertificateDer<'_>) -> Result<i64, String> {
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|error| format!("holds a certificate that cannot be read: {error}"))?;
    let is_old = certificate.version() != x509_parser::x509::X509Version::V3;
    if !is_old && !certificate.is_ca() {
        return Err(format!(
            "holds a certificate that may not vouch for others ({}): name that of the authority that \
             signed those of users",
            certificate.subject()
        ));
    }
    Ok(certificate.validity().not_after.timestamp())
}

/// In PEM, or one in DER.
fn revocations(
    file: &Path,
    bytes: Vec<u8>,
) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let at = file.display();
    let is_pem = bytes.windows(10).any(|part| part == b"-----BEGIN");
    if !is_pem {
        return Ok(vec![CertificateRevocationListDer::from(bytes)]);
    }
    let all = CertificateRevocationListDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|error| format!("{at} holds no certificate list in PEM: {error}"))?;
    match all.is_empty() {
        true => Err(format!("{at} holds no certificate list (X509 CRL)")),
        false => Ok(all),
    }
}

/// What lists of a file say of themselves, together.
fn list(file: &Path, all: &[CertificateRevocationListDer<'_>]) -> Result<List, String> {
    let (mut revoked, mut next_update) = (0, None::<i64>);
    for der in all {
        let (rest, list) = CertificateRevocationList::from_der(der).map_err(|error| {
            format!("{} holds no certificate list that can be read: {error}", file.display())
        })?;
        if !rest.is_empty() {
            return Err(format!("{} holds more than a certificate list", file.display()));
        }
        revoked += list.iter_revoked_certificates().count();
        let due = list.next_update().map(|due| due.timestamp());
        next_update = [next_update, due].into_iter().flatten().min();
    }
    Ok(List { file: file.to_owned(), revoked, next_update })
}

/// Reads the files of every policy, each once.
///
/// # Errors
/// As [`Authorities::read`].
pub fn all(
    policies: impl IntoIterator<Item = Arc<ClientPolicy>>,
    provider: &Arc<CryptoProvider>,
) -> Result<Vec<Authorities>, String> {
    let distinct: BTreeMap<Arc<ClientPolicy>, ()> =
        policies.into_iter().map(|it| (it, ())).collect();
    distinct.keys().map(|policy| Authorities::read(policy, Arc::clone(provider))).collect()
}

/// A verifier that looks at so much and no more: building a path to an authority may take a signature for each
/// certificate that could be on it.
#[derive(Debug)]
struct Bounded(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Bounded {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let bytes = own.len() + above.iter().map(|der| der.len()).sum::<usize>();
        if above.len() > INTERMEDIATES_MAX || bytes > SHOWN_BYTES_MAX {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        self.0.verify_client_cert(own, above, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
pub(super) mod tests;
