//! The certificates that a configuration names, read and ready for the workers. Owns when files are read:
//! all of them, whenever settings are.

use std::sync::Arc;

use crate::config;
use crate::tls::backends::Backends;
use crate::tls::keys::{Identities, Identity, tickets};
use crate::tls::{Agreed, Limits, Tls};

/// What workers need to know of TLS. `before` is what it replaces, whose tickets stay good.
///
/// # Errors
/// One sentence that names the file at fault.
pub fn load(
    wanted: &config::Tls,
    workers: usize,
    before: Option<&Tls>,
) -> Result<Arc<Tls>, String> {
    let all = wanted.certificates.iter().map(|files| Identity::read(files).map(Arc::new));
    let all = all.collect::<Result<Vec<_>, _>>()?;
    let before = before.and_then(|before| before.agreed.as_ref());
    let agreed = match all.is_empty() {
        true => None,
        false => {
            let kept = before.map(|before| Arc::clone(&before.tickets));
            let tickets = kept.map_or_else(tickets, Ok)?;
            let identities = Identities::new(all, wanted.strict_sni, &tickets)?;
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
        backends: Backends::default(),
    }))
}
