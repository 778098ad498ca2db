//! Which backend is registered at each address, and which backends the sessions of this worker
//! avoid. Knows neither sessions nor sockets.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::base::time::Now;
use crate::cluster::{Backend, BackendId, ServiceId, Standing};
use crate::proxy::udp::PeerId;

/// How long to avoid a backend that ICMP reports unreachable, unless the control core sets it aside
/// meanwhile.
const AVOIDED: Duration = Duration::from_secs(1);
/// When a backend that the control core has set aside is no longer avoided: not until it says so.
const FOR_EVER: Now = Now::NEVER;

/// The service of an address where no backend is: none goes by this number.
const NOBODY: ServiceId = ServiceId(u16::MAX);

/// What one service knows about one address.
#[derive(Clone, Copy)]
pub struct PeerState {
    service: ServiceId,
    pub backend: Option<BackendId>,
    /// The backend is avoided until then.
    avoided_until: Now,
    /// ICMP has reported it unreachable once, and nothing has arrived from it since.
    suspected: bool,
    /// The version of the last snapshot it was in.
    version: u64,
}

impl PeerState {
    /// What a service knows about an address where none of its backends is.
    const UNKNOWN: PeerState = PeerState {
        service: NOBODY,
        backend: None,
        avoided_until: FOR_EVER,
        suspected: false,
        version: 0,
    };

    /// Whether a backend is registered here and not avoided.
    pub fn is_usable(&self, now: Now) -> bool {
        now >= self.avoided_until
    }

    fn is_of(&self, service: ServiceId) -> bool {
        self.service == service
    }
}

/// A backend that is avoided for a while.
struct Avoided {
    service: ServiceId,
    backend: BackendId,
    until: Now,
}

/// The backends of one worker's sessions, by address and service.
#[derive(Default)]
pub struct Backends {
    /// By [`PeerId::index`]: the only one at that address, or one of several.
    all: Vec<PeerState>,
    /// The others, where several services share an address. Seldom any.
    shared: BTreeMap<(PeerId, ServiceId), PeerState>,
    /// The avoided backends, by identity. Seldom any, so that the list a pick goes through is
    /// short.
    avoided: Vec<Avoided>,
    /// How many are suspected. Seldom any, so that a reply need not look up its sender.
    suspected: usize,
}

impl Backends {
    /// What is known about this address; nothing if no backend of the service is registered there.
    #[inline]
    pub fn at(&self, peer: PeerId, service: ServiceId) -> &PeerState {
        match self.all.get(peer.index()) {
            Some(state) if state.is_of(service) => state,
            _ => self.shared_at(peer, service),
        }
    }

    #[cold]
    fn shared_at(&self, peer: PeerId, service: ServiceId) -> &PeerState {
        self.shared.get(&(peer, service)).unwrap_or(&PeerState::UNKNOWN)
    }

    fn at_mut(&mut self, peer: PeerId, service: ServiceId) -> Option<&mut PeerState> {
        let first = self.all.get_mut(peer.index()).filter(|state| state.is_of(service));
        first.or_else(|| self.shared.get_mut(&(peer, service)))
    }

    /// Whether any service has a backend at this address.
    pub fn is_any_at(&self, peer: PeerId) -> bool {
        let first = self.all.get(peer.index()).is_some_and(|state| state.backend.is_some());
        let shared = (peer, ServiceId(0))..=(peer, ServiceId(u16::MAX));
        first || self.shared.range(shared).next().is_some()
    }

    pub fn is_avoided(&self, id: BackendId, now: Now) -> bool {
        self.avoided.iter().any(|it| it.backend == id && now < it.until)
    }

    /// The backends of a service follow as they are in a new snapshot.
    pub fn begin_update(&mut self, service: ServiceId) {
        self.avoided.retain(|it| it.service != service);
    }

    /// Takes a backend of the new snapshot. What ICMP said about it stays valid; what the control
    /// core said is replaced.
    pub fn update(&mut self, peer: PeerId, backend: &Backend, version: u64) {
        let state = self.claim(peer, backend.service);
        let avoided_until = match backend.standing {
            Standing::Aside => FOR_EVER,
            _ if state.backend == Some(backend.id) && state.avoided_until != FOR_EVER => {
                state.avoided_until
            }
            _ => Now::default(),
        };
        let suspected =
            state.suspected && state.backend == Some(backend.id) && avoided_until != FOR_EVER;
        let cleared = state.suspected && !suspected;
        let (service, backend) = (backend.service, backend.id);
        *state = PeerState { service, backend: Some(backend), avoided_until, suspected, version };
        self.suspected -= usize::from(cleared);
        if avoided_until > Now::default() {
            self.avoided.push(Avoided { service, backend, until: avoided_until });
        }
    }

    /// The state of this service at this address, which is unknown if it had no backend there.
    fn claim(&mut self, peer: PeerId, service: ServiceId) -> &mut PeerState {
        if self.all.len() <= peer.index() {
            self.all.resize(peer.index() + 1, PeerState::UNKNOWN);
        }
        let first = self.all[peer.index()];
        let is_free = first.backend.is_none() || first.service == service;
        if is_free && !self.shared.contains_key(&(peer, service)) {
            return &mut self.all[peer.index()];
        }
        self.shared.entry((peer, service)).or_insert(PeerState::UNKNOWN)
    }

    /// Removes the backend of a service at this address, if it is not in the snapshot of this version.
    pub fn remove_absent(
        &mut self,
        peer: PeerId,
        service: ServiceId,
        version: u64,
    ) -> Option<PeerState> {
        let is_absent = |state: &PeerState| state.backend.is_some() && state.version != version;
        self.at_mut(peer, service).filter(|state| is_absent(state))?;
        let removed = match self.shared.remove(&(peer, service)) {
            Some(state) => state,
            None => std::mem::replace(&mut self.all[peer.index()], PeerState::UNKNOWN),
        };
        self.suspected -= usize::from(removed.suspected);
        Some(removed)
    }

    /// A datagram has arrived from this address for a session of this service.
    pub fn answered(&mut self, peer: PeerId, service: ServiceId) {
        if self.suspected > 0
            && let Some(state) = self.at_mut(peer, service)
        {
            let was_suspected = std::mem::take(&mut state.suspected);
            self.suspected -= usize::from(was_suspected);
        }
    }

    /// ICMP reports this address unreachable for a session of this service. True if its backend is
    /// avoided from now on, which takes two reports: one may be forged, and a live backend answers
    /// before the next.
    pub fn suspect(&mut self, peer: PeerId, service: ServiceId, now: Now) -> bool {
        let Some(state) = self.at_mut(peer, service) else { return false };
        let Some(backend) = state.backend.filter(|_| state.is_usable(now)) else {
            return false;
        };
        if !std::mem::replace(&mut state.suspected, true) {
            self.suspected += 1;
            return false;
        }
        let until = now.plus(AVOIDED);
        state.avoided_until = until;
        self.avoided.retain(|it| it.until > now);
        self.avoided.push(Avoided { service, backend, until });
        true
    }
}
