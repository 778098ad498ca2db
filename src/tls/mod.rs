//! TLS with users and with backends: what is read before anybody answers, the certificates, and what is agreed
//! with either. `engine`, `keys`, `clients`, `backends`, `authorities`, `tickets` and, for the load generator,
//! `client` hold all calls into rustls, which does handshake and records.

use std::sync::Arc;
use std::time::Duration;

mod authorities;
pub mod backends;
mod boundary;
pub mod client;
pub mod clients;
pub mod demo;
pub mod engine;
mod files;
pub mod hello;
pub mod keys;
pub mod store;
pub mod tickets;

/// What workers need to know of TLS at one moment.
#[derive(Debug, Default)]
pub struct Tls {
    /// `None` without certificates: then TLS is at most passed through.
    pub agreed: Option<Agreed>,
    pub limits: Limits,
    /// At doors of streams, an end without a close_notify counts as one with it. Requests and responses
    /// say their length, so at an API door it always does.
    pub takes_ragged_ends: bool,
    /// How backends are verified that are reached by TLS.
    pub backends: backends::Backends,
}

/// What is agreed with users whose TLS ends here.
#[derive(Debug)]
pub struct Agreed {
    pub identities: keys::Identities,
    /// The keys of what users resume with, at all workers alike.
    pub tickets: Arc<tickets::Keyring>,
}

impl Tls {
    /// What follows this at `now`, in seconds of Unix time, because keys of tickets have had their time. `None`
    /// if nothing does.
    ///
    /// # Errors
    /// There are no random numbers.
    pub fn turned(&self, now: i64) -> Result<Option<Tls>, String> {
        let Some(agreed) = &self.agreed else { return Ok(None) };
        let Some(tickets) = agreed.tickets.turned(now)?.map(Arc::new) else { return Ok(None) };
        let identities = agreed.identities.with_tickets(&tickets)?;
        let Tls { limits, takes_ragged_ends, .. } = *self;
        let agreed = Some(Agreed { identities, tickets });
        Ok(Some(Tls { agreed, limits, takes_ragged_ends, backends: self.backends.clone() }))
    }
}

/// Bounds of handshakes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// How many may be under way in one worker.
    pub handshakes: usize,
    /// How long one may take in all.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { handshakes: 1024, patience: Duration::from_secs(5) }
    }
}
