//! Certificates with their keys, and what is agreed with users at a door: read from files, checked, chosen
//! by the host that a user asks for. Owns every call into rustls that comes before a connection, and all
//! that is read out of a certificate.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use x509_parser::public_key::PublicKey;

use super::clients::{Authorities, ClientPolicy};
use super::files::read;
use super::tickets::{self, Keyring};

/// The most bits of an RSA key: a signature with 4,096 takes some four milliseconds already, in which the
/// worker does nothing else.
pub const RSA_BITS_MAX: usize = 4096;
/// The ciphers, all with ephemeral keys and authenticated encryption, those first that cost least where the
/// processor has instructions for AES; the order counts, not the user's.
const CIPHER_SUITES: [SupportedCipherSuite; 9] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];
/// The versions that are spoken.
pub(super) const VERSIONS: [&SupportedProtocolVersion; 2] =
    [&rustls::version::TLS13, &rustls::version::TLS12];
/// Tickets that a user is given with a full handshake (RFC 8446 section 4.6.1).
const TICKETS: usize = 2;

/// Names and files of one `[[tls.certificate]]`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// What the authority says about the certificate (OCSP, RFC 6960), passed on to users.
    pub ocsp: Option<PathBuf>,
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Identity {
    pub files: Files,
    /// The hosts that it is for, in lower case; a wildcard begins with `*.`.
    pub names: Vec<String>,
    /// When it ends, in seconds of Unix time.
    pub not_after: i64,
    pub kind: KeyKind,
    key: Arc<CertifiedKey>,
}

/// What a signature costs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KeyKind {
    /// ECDSA or EdDSA.
    Curve,
    /// RSA with a modulus of this many bits.
    Rsa(usize),
}

impl KeyKind {
    /// The work of one full handshake, in those with an elliptic curve.
    pub fn cost(self) -> u32 {
        match self {
            KeyKind::Curve => 1,
            KeyKind::Rsa(bits) if bits <= 2048 => 4,
            KeyKind::Rsa(_) => 8,
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyKind::Curve => to.write_str("elliptic curve"),
            KeyKind::Rsa(bits) => write!(to, "RSA-{bits}"),
        }
    }
}

impl Identity {
    /// Reads and checks a certificate and its key.
    ///
    /// # Errors
    /// One sentence that names the file and what is wrong with it.
    pub fn read(files: &Files) -> Result<Identity, String> {
        let ocsp = files.ocsp.as_deref().map(read).transpose()?;
        let chain = read(&files.certificate)?;
        let key = read(&files.key)?;
        Identity::from_pem(files, &chain, &key, ocsp)
    }

    /// The same from the files' contents.
    ///
    /// # Errors
    /// As [`Identity::read`].
    pub fn from_pem(
        files: &Files,
        chain: &[u8],
        key: &[u8],
        ocsp: Option<Vec<u8>>,
    ) -> Result<Identity, String> {
        let at = files.certificate.display();
        let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .map_err(|error| format!("{at} holds no certificate in PEM: {error}"))?;
        let first = chain.first().ok_or(format!("{at} holds no certificate in PEM"))?;
        let Facts { names, not_after, kind } =
            facts(first).map_err(|what| format!("{at} {what}"))?;
        let mut certified = certify(&chain, key, files)?;
        certified.ocsp = ocsp;
        let key = Arc::new(certified);
        Ok(Identity { files: files.clone(), names, not_after, kind, key })
    }

    /// Whole days until it ends; negative once it has. `now` in seconds of Unix time.
    pub fn days_left(&self, now: i64) -> i64 {
        days(self.not_after, now)
    }
}

/// Whole days from `now` to then, both in seconds of Unix time; negative if it is over.
pub fn days(then: i64, now: i64) -> i64 {
    (then - now).div_euclid(24 * 60 * 60)
}

fn certify(
    chain: &[CertificateDer<'static>],
    key: &[u8],
    files: &Files,
) -> Result<CertifiedKey, String> {
    let at = files.key.display();
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|error| format!("{at} holds no private key in PEM without a password: {error}"))?;
    let provider = aws_lc_rs::default_provider();
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| format!("{at} holds a key that cannot be used: {error}"))?;
    let certified = CertifiedKey::new(chain.to_vec(), key);
    let other = |_| format!("the key in {at} is not that of {}", files.certificate.display());
    certified.keys_match().map_err(other)?;
    Ok(certified)
}

struct Facts {
    names: Vec<String>,
    not_after: i64,
    kind: KeyKind,
}

/// What a certificate says of itself.
fn facts(der: &CertificateDer<'_>) -> Result<Facts, String> {
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|error| format!("holds a certificate that cannot be read: {error}"))?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| names.value.general_names.iter().filter_map(dns).collect());
    let kind = match certificate.public_key().parsed() {
        Ok(PublicKey::RSA(key)) => KeyKind::Rsa(key.key_size().next_multiple_of(8)),
        _ => KeyKind::Curve,
    };
    if let KeyKind::Rsa(bits) = kind
        && bits > RSA_BITS_MAX
    {
        return Err(format!(
            "has a key of {bits} bits, with which a worker would serve nobody else for long; use one of at most {RSA_BITS_MAX}, or better an elliptic curve"
        ));
    }
    let not_after = certificate.validity().not_after.timestamp();
    Ok(Facts { names: names.unwrap_or_default(), not_after, kind })
}

fn dns(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(name.trim_end_matches('.').to_ascii_lowercase()),
        _ => None,
    }
}

/// Which certificate is for whom.
#[derive(Debug)]
struct Choice {
    /// In the order of the file.
    identities: Vec<Arc<Identity>>,
    /// By whole name, and by what follows the `*` of a wildcard.
    exact: HashMap<String, Vec<usize>>,
    wildcard: HashMap<String, Vec<usize>>,
    /// Those for a user who names no host, or one that none is for.
    others: Vec<usize>,
    /// There are none for a host that none is for.
    is_strict: bool,
}

impl Choice {
    fn new(identities: Vec<Arc<Identity>>, is_strict: bool) -> Choice {
        let (mut exact, mut wildcard) = (HashMap::new(), HashMap::new());
        for (place, identity) in identities.iter().enumerate() {
            for name in &identity.names {
                let (map, name) = match name.strip_prefix('*') {
                    Some(parent) => (&mut wildcard, parent),
                    None => (&mut exact, name.as_str()),
                };
                map.entry(name.to_owned()).or_insert_with(Vec::new).push(place);
            }
        }
        // A pair with keys of two kinds for the same names counts as one.
        let first = identities.first().map(|it| &it.names);
        let others = identities.iter().enumerate().filter(|(_, it)| Some(&it.names) == first);
        let others = others.map(|(place, _)| place).collect();
        Choice { identities, exact, wildcard, others, is_strict }
    }

    /// Those for this host; without a host, the first.
    fn of(&self, host: Option<&str>) -> &[usize] {
        let Some(host) = host else { return &self.others };
        let host = host.strip_suffix('.').unwrap_or(host);
        let wildcard = || host.find('.').and_then(|dot| self.wildcard.get(&host[dot..]));
        let found = self.exact.get(host).or_else(wildcard);
        match found {
            Some(found) => found,
            None if self.is_strict => &[],
            None => &self.others,
        }
    }
}

impl Choice {
    /// Of those for the host, the cheapest whose signature the user understands.
    fn pick(&self, hello: &ClientHello<'_>) -> Option<&Arc<Identity>> {
        let fits = |identity: &&Arc<Identity>| {
            identity.key.key.choose_scheme(hello.signature_schemes()).is_some()
        };
        let candidates = self.of(hello.server_name()).iter().map(|place| &self.identities[*place]);
        candidates.filter(fits).min_by_key(|identity| identity.kind.cost())
    }
}

impl ResolvesServerCert for Choice {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.pick(&hello).map(|found| Arc::clone(&found.key))
    }
}

/// What is agreed with users at a door.
#[derive(Clone, Debug)]
pub struct Terms {
    config: Arc<ServerConfig>,
    choice: Arc<Choice>,
    /// Whether they are asked for a certificate, and for which.
    clients: Option<Arc<ClientPolicy>>,
}

impl Terms {
    fn new(
        choice: &Arc<Choice>,
        speech: Speech,
        clients: Option<&Authorities>,
        tickets: &Arc<Keyring>,
    ) -> Result<Terms, String> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&VERSIONS)
            .map_err(|error| format!("TLS cannot be set up: {error}"))?;
        let builder = match clients {
            Some(clients) => builder.with_client_cert_verifier(clients.verifier()),
            None => builder.with_no_client_auth(),
        };
        let mut config =
            builder.with_cert_resolver(Arc::clone(choice) as Arc<dyn ResolvesServerCert>);
        config.ignore_client_order = true;
        config.alpn_protocols =
            speech.protocols().iter().map(|protocol| protocol.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        // Whoever takes up an earlier connection shows no certificate, and that of then may have ended or been
        // revoked.
        if clients.is_none() {
            config.ticketer = tickets.sealer(speech.tickets());
            config.send_tls13_tickets = TICKETS;
        }
        // What could be replayed is not taken, and nothing is said before the user has finished.
        config.max_early_data_size = 0;
        config.send_half_rtt_data = false;
        let clients = clients.map(|clients| Arc::clone(&clients.policy));
        Ok(Terms { config: Arc::new(config), choice: Arc::clone(choice), clients })
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    pub(super) fn clients(&self) -> Option<&Arc<ClientPolicy>> {
        self.clients.as_ref()
    }

    /// Whether somebody has a certificate for this host.
    pub(super) fn knows(&self, host: Option<&str>) -> bool {
        !self.choice.of(host).is_empty()
    }

    /// What a full handshake with this user costs, in those with an elliptic curve.
    pub(super) fn cost_for(&self, hello: &ClientHello<'_>) -> u32 {
        self.choice.pick(hello).map_or(1, |identity| identity.kind.cost()) + self.judging()
    }

    /// The least that one with a user who asks for this host may cost; which signatures the user understands
    /// is not known yet.
    pub fn cost(&self, host: Option<&str>) -> u32 {
        let identities = self.choice.of(host).iter().map(|place| &self.choice.identities[*place]);
        identities.map(|identity| identity.kind.cost()).min().unwrap_or(1) + self.judging()
    }

    /// What a user's certificate costs: two signatures are checked, its own and that of its authority, and one
    /// more for each between them.
    fn judging(&self) -> u32 {
        u32::from(self.clients.is_some())
    }
}

/// What users speak at a door under TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Speech {
    /// HTTP/1.1.
    Http,
    /// Whatever they like.
    Stream,
}

impl Speech {
    fn protocols(self) -> &'static [&'static [u8]] {
        match self {
            Speech::Http => &[b"h2", b"http/1.1"],
            Speech::Stream => &[],
        }
    }

    /// What a ticket is good for: users of whom no certificate is asked, and who speak this.
    fn tickets(self) -> tickets::Binding {
        let speech: &[u8] = match self {
            Speech::Http => b"http",
            Speech::Stream => b"stream",
        };
        tickets::Binding::of([speech, b"no client certificates"])
    }
}

/// The cryptography, with our choice of ciphers.
pub fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = CIPHER_SUITES.to_vec();
    Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() })
}

/// The certificates of a balancer and what is agreed at its doors. Workers hold it until the next reload.
#[derive(Clone, Debug)]
pub struct Identities {
    choice: Arc<Choice>,
    /// Those who judge the certificates of users.
    authorities: Vec<Authorities>,
    /// Where users are asked for none, and where they are asked.
    open: Pair,
    asking: HashMap<Arc<ClientPolicy>, Pair>,
}

/// The terms for both kinds of speech.
#[derive(Clone, Debug)]
struct Pair {
    http: Terms,
    stream: Terms,
}

impl Pair {
    fn new(
        choice: &Arc<Choice>,
        clients: Option<&Authorities>,
        tickets: &Arc<Keyring>,
    ) -> Result<Pair, String> {
        let terms = |speech| Terms::new(choice, speech, clients, tickets);
        Ok(Pair { http: terms(Speech::Http)?, stream: terms(Speech::Stream)? })
    }
}

impl Identities {
    /// `is_strict`: a user who asks for a host that no certificate is for is refused. `authorities`: of every
    /// policy that asks users for certificates. `tickets` seals what the others resume with, for all workers
    /// alike.
    ///
    /// # Errors
    /// One sentence on what is missing.
    pub fn new(
        all: Vec<Arc<Identity>>,
        is_strict: bool,
        authorities: Vec<Authorities>,
        tickets: &Arc<Keyring>,
    ) -> Result<Identities, String> {
        if all.is_empty() {
            return Err("TLS needs a [[tls.certificate]] with its key".to_owned());
        }
        let choice = Arc::new(Choice::new(all, is_strict));
        let asking = authorities.iter().map(|clients| {
            Ok((Arc::clone(&clients.policy), Pair::new(&choice, Some(clients), tickets)?))
        });
        let asking = asking.collect::<Result<HashMap<_, _>, String>>()?;
        let open = Pair::new(&choice, None, tickets)?;
        Ok(Identities { choice, authorities, open, asking })
    }

    /// The same with other keys for tickets.
    ///
    /// # Errors
    /// As [`Identities::new`].
    pub fn with_tickets(&self, tickets: &Arc<Keyring>) -> Result<Identities, String> {
        Ok(Identities { open: Pair::new(&self.choice, None, tickets)?, ..self.clone() })
    }

    /// The terms for users who speak this and of whom this is asked. `None` if the policy is not one of those
    /// that were read.
    pub fn terms(&self, speech: Speech, clients: Option<&ClientPolicy>) -> Option<&Terms> {
        let pair = match clients {
            None => &self.open,
            Some(policy) => self.asking.get(policy)?,
        };
        Some(match speech {
            Speech::Http => &pair.http,
            Speech::Stream => &pair.stream,
        })
    }

    /// In the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = &Identity> {
        self.choice.identities.iter().map(Arc::as_ref)
    }

    /// Those who judge the certificates of users.
    pub fn authorities(&self) -> &[Authorities] {
        &self.authorities
    }
}

#[cfg(test)]
pub(crate) mod tests;
