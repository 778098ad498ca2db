//! TLS with the store of a cluster, where we are the client and may have to show who we are. Owns what is agreed
//! there.

use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{authorities, files, keys};

/// What is agreed with members whose certificates come from the authorities in this file, or from those that this
/// host trusts. They are shown the certificate in the first file of `identity`, whose key is in the second.
///
/// # Errors
/// One sentence that names the file and what is wrong with it.
pub fn client(
    ca: Option<&Path>,
    identity: Option<(&Path, &Path)>,
) -> Result<Arc<ClientConfig>, String> {
    let roots = match ca {
        Some(path) => authorities::in_file(path)?,
        None => authorities::of_this_host(),
    };
    let builder = ClientConfig::builder_with_provider(keys::provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let Some((certificate, key)) = identity else {
        return Ok(Arc::new(builder.with_no_client_auth()));
    };
    let (at, pem) = (certificate.display(), files::read(certificate)?);
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.map_err(|error| format!("{at} holds no certificate in PEM: {error}"))?;
    if chain.is_empty() {
        return Err(format!("{at} holds no certificate in PEM"));
    }
    let told = |what: String| format!("{}: {what}", key.display());
    let secret = PrivateKeyDer::from_pem_slice(&files::read(key)?);
    let secret = secret.map_err(|error| told(format!("no key in PEM: {error}")))?;
    let config = builder.with_client_auth_cert(chain, secret);
    config.map(Arc::new).map_err(|error| told(error.to_string()))
}
