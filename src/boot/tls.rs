//! The certificates and keys that a configuration names, read and ready for the workers. Owns when files are
//! read: all of them, whenever settings are.

use std::env;
use std::path::PathBuf;
use std::sync::Arc;

use tracing::warn;

use crate::base::time::Now;
use crate::config::{self, Config};
use crate::tls::backends::Backends;
use crate::tls::clients;
use crate::tls::keys::{Identities, Identity, provider};
use crate::tls::tickets::Keyring;
use crate::tls::{Agreed, Limits, Tls};

/// The folder that outlasts a restart of the service but not of the host, as systemd names it. There may be
/// several, the first of which is meant.
const FOLDER: &str = "RUNTIME_DIRECTORY";
/// The file in it that keeps the keys of tickets.
const KEPT: &str = "ticket-keys";

/// What workers need to know of TLS. `before` is what it replaces, whose tickets stay good.
///
/// # Errors
/// One sentence that names the file at fault.
pub fn load(config: &Config, workers: usize, before: Option<&Tls>) -> Result<Arc<Tls>, String> {
    let wanted = &config.tls;
    let all = wanted.certificates.iter().map(|files| Identity::read(files).map(Arc::new));
    let all = all.collect::<Result<Vec<_>, _>>()?;
    let before = before.and_then(|before| before.agreed.as_ref());
    let agreed = match all.is_empty() {
        true => None,
        false => {
            let authorities = clients::all(config.client_policies(), &provider())?;
            let tickets = tickets(config, before)?;
            let identities = Identities::new(all, wanted.strict_sni, authorities, &tickets)?;
            Some(Agreed { identities, tickets })
        }
    };
    Ok(Arc::new(Tls {
        agreed,
        limits: Limits {
            handshakes: (wanted.handshakes as usize).div_ceil(workers),
            patience: wanted.handshake,
        },
        takes_ragged_ends: wanted.takes_ragged_ends,
        backends: backends(config)?,
    }))
}

/// The keys of an operator's file, or our own: those in use, or those that a process before this one has kept.
fn tickets(config: &Config, before: Option<&Agreed>) -> Result<Arc<Keyring>, String> {
    if let Some(file) = &config.tls.ticket_file {
        return Keyring::shared(file).map(Arc::new);
    }
    if let Some(own) = before.map(|before| &before.tickets).filter(|tickets| tickets.is_own()) {
        return Ok(Arc::clone(own));
    }
    let folder = env::var(FOLDER).ok();
    let folder =
        folder.as_deref().and_then(|all| all.split(':').next()).filter(|it| !it.is_empty());
    let kept = folder.map(|folder| PathBuf::from(folder).join(KEPT));
    let own = Keyring::own(kept.as_deref(), Now::read().unix_seconds())?;
    // Users who come back after a restart then set up TLS anew, and nothing else.
    if let Err(reason) = own.keep() {
        warn!(%reason, "ticket keys not kept");
    }
    Ok(Arc::new(own))
}

/// Whom we trust where backends are reached by TLS.
///
/// # Errors
/// One sentence that names the file at fault, or says that there is none.
pub fn backends(config: &Config) -> Result<Backends, String> {
    let config::BackendTls { ca, verifies } = &config.backend_tls;
    let backends = Backends::read(ca.as_deref(), *verifies, config.backend_authorities())?;
    match backends.lack().filter(|_| needs_authorities(config)) {
        Some(lack) => Err(lack.to_owned()),
        None => Ok(backends),
    }
}

/// Whether the settings say anything of TLS with backends.
pub fn concerns_backends(config: &Config) -> bool {
    let mut listed = config.services.iter().flat_map(|service| &service.backends);
    config.backend_tls.ca.is_some() || listed.any(|backend| backend.tls.is_some())
}

/// Whether a backend of the file is to be verified by the authorities that all have in common.
fn needs_authorities(config: &Config) -> bool {
    let mut backends = config.services.iter().flat_map(|service| &service.backends);
    backends.any(|backend| backend.tls.as_ref().is_some_and(|tls| tls.ca.is_none()))
}
