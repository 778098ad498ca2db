//! A user who speaks TLS, and the certificates of the balancer that it trusts.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use lb::config::Config;
use lb::tls::keys::Files;
use rcgen::{CertificateParams, KeyPair};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, RootCertStore, StreamOwned,
    SupportedProtocolVersion,
};

use crate::harness::connect;

/// A folder with certificates, which is gone with it.
pub struct Certificates {
    folder: PathBuf,
    pub files: Vec<Files>,
    trusted: RootCertStore,
}

impl Certificates {
    /// One for each list of names.
    pub fn new(test: &str, all: &[&[&str]]) -> Certificates {
        let folder = std::env::temp_dir().join(format!("lb-tls-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (files, trusted) = (Vec::new(), RootCertStore::empty());
        let mut made = Certificates { folder, files, trusted };
        all.iter().for_each(|names| made.add(names));
        made
    }

    pub fn add(&mut self, names: &[&str]) {
        let number = self.files.len();
        let at = |end: &str| self.folder.join(format!("{number}.{end}"));
        let files = Files { certificate: at("pem"), key: at("key"), ocsp: None };
        self.files.push(files);
        self.renew(number, names);
    }

    /// Writes a file that only this user may read.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let at = self.folder.join(name);
        std::fs::write(&at, text).unwrap();
        std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o600)).unwrap();
        at
    }

    /// Writes another certificate with another key into the files of one.
    pub fn renew(&mut self, number: usize, names: &[&str]) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        let Files { certificate: at, key: key_at, .. } = &self.files[number];
        std::fs::write(at, certificate.pem()).unwrap();
        std::fs::write(key_at, key.serialize_pem()).unwrap();
        let der = CertificateDer::from_pem_slice(certificate.pem().as_bytes()).unwrap();
        self.trusted.add(der).unwrap();
    }

    /// A file with all of them, for whoever is to trust them.
    pub fn authorities(&self) -> PathBuf {
        let all = self.files.iter().map(|it| std::fs::read_to_string(&it.certificate).unwrap());
        let at = self.folder.join("authorities.pem");
        std::fs::write(&at, all.collect::<String>()).unwrap();
        at
    }

    /// What a user trusts and has kept of earlier connections.
    pub fn client(&self) -> Arc<ClientConfig> {
        self.client_with(rustls::crypto::aws_lc_rs::default_provider())
    }

    /// The same with other cryptography.
    pub fn client_with(&self, provider: CryptoProvider) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.trusted.clone())
            .with_no_client_auth();
        config.resumption = Resumption::in_memory_sessions(64);
        Arc::new(config)
    }

    /// What a user trusts who shows a chain of certificates in DER, its own first, with the key in PEM of that.
    pub fn client_showing(
        &self,
        chain: &[&[u8]],
        key: Option<String>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ClientConfig> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(self.trusted.clone());
        let chain = chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let config = match key {
            None => builder.with_no_client_auth(),
            Some(key) => {
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        Arc::new(config)
    }

    /// Settings with these certificates.
    pub fn put(&self, config: &mut Config) {
        config.tls.certificates = self.files.clone();
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub type User = StreamOwned<ClientConnection, TcpStream>;

/// Connects, asks for this host, and says nothing yet.
pub fn user(config: &Arc<ClientConfig>, host: &str, to: SocketAddr) -> User {
    let host = ServerName::try_from(host.to_owned()).unwrap();
    StreamOwned::new(ClientConnection::new(Arc::clone(config), host).unwrap(), connect(to))
}

/// The handshake, to its end.
pub fn shake(user: &mut User) -> io::Result<HandshakeKind> {
    while user.conn.is_handshaking() {
        user.conn.complete_io(&mut user.sock)?;
    }
    Ok(user.conn.handshake_kind().expect("it is over"))
}

/// One request without a body; the answer's head and body.
pub fn get(user: &mut User, host: &str, path: &str) -> io::Result<String> {
    write!(user, "GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(b"\r\n\r\n") {
        user.read_exact(&mut byte)?;
        text.push(byte[0]);
    }
    let head = String::from_utf8(text).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    user.read_exact(&mut body)?;
    Ok(head + &String::from_utf8(body).unwrap())
}

/// Both versions of TLS, or one of them.
pub fn versions(which: usize) -> &'static [&'static SupportedProtocolVersion] {
    use rustls::version::{TLS12, TLS13};
    const ALL: [&[&SupportedProtocolVersion]; 3] = [&[&TLS13, &TLS12], &[&TLS12], &[&TLS13]];
    ALL[which]
}
