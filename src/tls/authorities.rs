//! The authorities that certificates of others are verified by: those in a file, or those that this host
//! trusts. Owns where they are looked for.

use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::files;

/// Where Linux distributions keep the authorities that a host trusts: Debian, Red Hat, SUSE, Alpine.
const SYSTEM: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Those in a file, all of which must be readable.
///
/// # Errors
/// One sentence that names the file and what is wrong with it.
pub fn in_file(path: &Path) -> Result<RootCertStore, String> {
    let at = path.display();
    let pem = files::read(path)?;
    let mut roots = RootCertStore::empty();
    for one in CertificateDer::pem_slice_iter(&pem) {
        let one = one.map_err(|error| format!("{at} holds no certificate in PEM: {error}"))?;
        roots
            .add(one)
            .map_err(|error| format!("{at} holds a certificate that cannot be read: {error}"))?;
    }
    match roots.is_empty() {
        true => Err(format!("{at} holds no certificate in PEM")),
        false => Ok(roots),
    }
}

/// Those that this host trusts; none if there is no such file.
pub fn of_this_host() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let pem = SYSTEM.iter().find_map(|path| files::read(Path::new(path)).ok());
    // A few that nobody can read are not our fault.
    let all = pem.iter().flat_map(|pem| CertificateDer::pem_slice_iter(pem).flatten());
    roots.add_parsable_certificates(all);
    roots
}
