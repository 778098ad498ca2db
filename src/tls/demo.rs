//! A certificate for trying HTTPS on one's own machine: self-signed, made anew at each start. Owns its files,
//! which are in memory only (memfd_create(2)): they end with the process, however that ends.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::sys::memfd::{MFdFlags, memfd_create};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

use super::keys::Files;

/// Whom it is for.
const NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// A certificate in files that this process alone can read, as long as this value lives.
pub struct Made {
    pub files: Files,
    _open: [File; 2],
}

impl Made {
    /// Makes one.
    ///
    /// # Errors
    /// There are no descriptors, no memory or no random numbers.
    pub fn new() -> io::Result<Made> {
        let pair = KeyPair::generate().map_err(io::Error::other)?;
        let mut params =
            CertificateParams::new(NAMES.map(str::to_owned)).map_err(io::Error::other)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "lb demo");
        let signed = params.self_signed(&pair).map_err(io::Error::other)?;
        let (certificate, certificate_at) = in_memory("certificate", &signed.pem())?;
        let (key, key_at) = in_memory("key", &pair.serialize_pem())?;
        let files = Files { certificate: certificate_at, key: key_at, ocsp: None };
        Ok(Made { files, _open: [certificate, key] })
    }
}

/// A file with this text, and where this process finds it.
fn in_memory(name: &str, text: &str) -> io::Result<(File, PathBuf)> {
    let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok((file, path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::keys::Identity;

    #[test]
    fn it_is_for_this_host_and_gone_with_its_owner() {
        let made = Made::new().unwrap();
        let identity = Identity::read(&made.files).unwrap();
        assert_eq!(identity.names, ["localhost"]);
        let files = made.files.clone();
        drop(made);
        assert!(Identity::read(&files).is_err());
    }
}
