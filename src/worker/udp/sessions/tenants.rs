//! Who is registered at which backend address, and which of them sessions avoid. Owns that knowledge
//! for one worker's UDP sessions; knows neither sessions nor sockets.

use std::time::Duration;

use crate::base::time::Now;
use crate::cluster::{Backend, BackendId, Standing};
use crate::proxy::udp::PeerId;

/// How long sessions and new users avoid a backend that ICMP says is not there, unless the control
/// core has set it aside meanwhile.
const AVOIDED: Duration = Duration::from_secs(1);
/// For a backend that is set aside until the control core says otherwise.
const FOR_EVER: Now = Now::from_nanos(u64::MAX);

/// Who is registered at one address.
#[derive(Clone, Copy, Default)]
pub struct Tenant {
    pub backend: Option<BackendId>,
    /// Sessions avoid it until then.
    unfit_until: Now,
    /// ICMP says that it is not there, and it has said nothing since.
    accused: bool,
    /// Of the last snapshot that it was in.
    version: u64,
}

impl Tenant {
    /// Whether a backend is here that may be sent to.
    pub fn is_fit(&self, now: Now) -> bool {
        self.backend.is_some() && now >= self.unfit_until
    }
}

#[derive(Default)]
pub struct Tenants {
    /// By [`PeerId::index`].
    all: Vec<Tenant>,
    /// The avoided ones again, by name: seldom any, so that picking looks at a short list.
    unfit: Vec<(BackendId, Now)>,
    /// How many are accused: seldom any, so that a reply need not look.
    accused: usize,
}

impl Tenants {
    /// Who is at this address; nobody if it was never registered.
    pub fn at(&self, peer: PeerId) -> Tenant {
        self.all.get(peer.index()).copied().unwrap_or_default()
    }

    pub fn is_unfit(&self, id: BackendId, now: Now) -> bool {
        self.unfit.iter().any(|(other, until)| *other == id && now < *until)
    }

    /// A newer snapshot follows, backend by backend.
    pub fn renew(&mut self) {
        self.unfit.clear();
    }

    /// A backend of the snapshot. What ICMP said about it stays; what the control core said does not.
    pub fn settle_in(&mut self, peer: PeerId, backend: &Backend, version: u64) {
        if self.all.len() <= peer.index() {
            self.all.resize(peer.index() + 1, Tenant::default());
        }
        let tenant = &mut self.all[peer.index()];
        let unfit_until = match backend.standing {
            Standing::Aside => FOR_EVER,
            _ if tenant.backend == Some(backend.id) && tenant.unfit_until != FOR_EVER => {
                tenant.unfit_until
            }
            _ => Now::default(),
        };
        let accused =
            tenant.accused && tenant.backend == Some(backend.id) && unfit_until != FOR_EVER;
        self.accused -= usize::from(tenant.accused && !accused);
        *tenant = Tenant { backend: Some(backend.id), unfit_until, accused, version };
        if unfit_until > Now::default() {
            self.unfit.push((backend.id, unfit_until));
        }
    }

    /// Takes out who was not in the snapshot of this version; `None` when it was.
    pub fn leave(&mut self, peer: PeerId, version: u64) -> Option<Tenant> {
        let tenant = self.all.get_mut(peer.index()).filter(|tenant| tenant.version != version)?;
        self.accused -= usize::from(tenant.accused);
        Some(std::mem::take(tenant))
    }

    /// A datagram came from there.
    pub fn heard(&mut self, peer: PeerId) {
        if self.accused > 0
            && let Some(tenant) = self.all.get_mut(peer.index())
        {
            self.accused -= usize::from(std::mem::take(&mut tenant.accused));
        }
    }

    /// ICMP says that nobody is there. True when that makes sessions avoid it from now on: one message
    /// may be forged, and what is there is heard before the next.
    pub fn accuse(&mut self, peer: PeerId, now: Now) -> bool {
        let Some(tenant) = self.all.get_mut(peer.index()) else { return false };
        let Some(backend) = tenant.backend.filter(|_| tenant.is_fit(now)) else { return false };
        if !std::mem::replace(&mut tenant.accused, true) {
            self.accused += 1;
            return false;
        }
        tenant.unfit_until = now.plus(AVOIDED);
        self.unfit.retain(|(_, until)| *until > now);
        self.unfit.push((backend, tenant.unfit_until));
        true
    }
}
