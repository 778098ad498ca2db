//! What is said of the certificates of users in `[tls]` and in the table of a service. Owns these settings, and
//! what the two come to together; of whom a certificate is asked is up to `asking`.

use std::path::PathBuf;
use std::sync::Arc;

use crate::tls::clients::ClientPolicy;

/// Whether users are asked for a certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Demand {
    #[default]
    None,
    /// They may have none; one that they show must be good.
    Optional,
    Required,
}

/// Settings of `[tls]` about the certificates of users.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Clients {
    pub demand: Demand,
    /// The file of authorities.
    pub ca: Option<PathBuf>,
    /// Files of what they have revoked.
    pub crl: Vec<PathBuf>,
    /// Backends are told the certificates between a user's and the authority.
    pub tells_chain: bool,
}

/// Those of a service; what it leaves out is as in `[tls]`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceClients {
    pub demand: Option<Demand>,
    /// With an authority of its own, it has lists of its own, or none.
    pub ca: Option<PathBuf>,
    pub crl: Vec<PathBuf>,
    pub tells_chain: Option<bool>,
}

impl Clients {
    /// What users are asked for, if they are and the settings are complete.
    pub fn policy(&self) -> Option<Arc<ClientPolicy>> {
        let is_required = match self.demand {
            Demand::None => return None,
            Demand::Optional => false,
            Demand::Required => true,
        };
        let (ca, crl) = (self.ca.clone()?, self.crl.clone());
        Some(Arc::new(ClientPolicy { is_required, ca, crl, tells_chain: self.tells_chain }))
    }

    /// The same for a service that says this.
    pub fn with(&self, own: &ServiceClients) -> Clients {
        let (ca, crl) = match &own.ca {
            Some(ca) => (Some(ca.clone()), own.crl.clone()),
            None => (self.ca.clone(), self.crl.clone()),
        };
        let demand = own.demand.unwrap_or(self.demand);
        Clients { demand, ca, crl, tells_chain: own.tells_chain.unwrap_or(self.tells_chain) }
    }
}
