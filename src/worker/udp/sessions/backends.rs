//! Which backend is registered at each address, and which backends the sessions of this worker
//! avoid. Knows neither sessions nor sockets.

use std::time::Duration;

use crate::base::time::Now;
use crate::cluster::{Backend, BackendId, Standing};
use crate::proxy::udp::PeerId;

/// How long to avoid a backend that ICMP reports unreachable, unless the control core sets it aside
/// meanwhile.
const AVOIDED: Duration = Duration::from_secs(1);
/// When a backend that the control core has set aside is no longer avoided: not until it says so.
const FOR_EVER: Now = Now::from_nanos(u64::MAX);

/// What is known about one address.
#[derive(Clone, Copy, Default)]
pub struct PeerState {
    pub backend: Option<BackendId>,
    /// The backend is avoided until then.
    avoided_until: Now,
    /// ICMP has reported it unreachable once, and nothing has arrived from it since.
    suspected: bool,
    /// The version of the last snapshot it was in.
    version: u64,
}

impl PeerState {
    /// Whether a backend is registered here and not avoided.
    pub fn is_usable(&self, now: Now) -> bool {
        self.backend.is_some() && now >= self.avoided_until
    }
}

/// The backends of one worker's sessions, by address.
#[derive(Default)]
pub struct Backends {
    /// By [`PeerId::index`].
    all: Vec<PeerState>,
    /// The avoided backends, by identity. Seldom any, so that the list a pick goes through is
    /// short.
    avoided: Vec<(BackendId, Now)>,
    /// How many are suspected. Seldom any, so that a reply need not look up its sender.
    suspected: usize,
}

impl Backends {
    /// What is known about this address; nothing if no backend was ever registered there.
    pub fn at(&self, peer: PeerId) -> PeerState {
        self.all.get(peer.index()).copied().unwrap_or_default()
    }

    pub fn is_avoided(&self, id: BackendId, now: Now) -> bool {
        self.avoided.iter().any(|(other, until)| *other == id && now < *until)
    }

    /// A new snapshot follows, backend by backend.
    pub fn begin_update(&mut self) {
        self.avoided.clear();
    }

    /// Takes a backend of the new snapshot. What ICMP said about it stays valid; what the control
    /// core said is replaced.
    pub fn update(&mut self, peer: PeerId, backend: &Backend, version: u64) {
        if self.all.len() <= peer.index() {
            self.all.resize(peer.index() + 1, PeerState::default());
        }
        let state = &mut self.all[peer.index()];
        let avoided_until = match backend.standing {
            Standing::Aside => FOR_EVER,
            _ if state.backend == Some(backend.id) && state.avoided_until != FOR_EVER => {
                state.avoided_until
            }
            _ => Now::default(),
        };
        let suspected =
            state.suspected && state.backend == Some(backend.id) && avoided_until != FOR_EVER;
        self.suspected -= usize::from(state.suspected && !suspected);
        *state = PeerState { backend: Some(backend.id), avoided_until, suspected, version };
        if avoided_until > Now::default() {
            self.avoided.push((backend.id, avoided_until));
        }
    }

    /// Removes a backend that is not in the snapshot of this version. `None` if it is.
    pub fn remove_absent(&mut self, peer: PeerId, version: u64) -> Option<PeerState> {
        let state = self.all.get_mut(peer.index()).filter(|state| state.version != version)?;
        self.suspected -= usize::from(state.suspected);
        Some(std::mem::take(state))
    }

    /// A datagram has arrived from this address.
    pub fn answered(&mut self, peer: PeerId) {
        if self.suspected > 0
            && let Some(state) = self.all.get_mut(peer.index())
        {
            self.suspected -= usize::from(std::mem::take(&mut state.suspected));
        }
    }

    /// ICMP reports this address unreachable. True if its backend is avoided from now on, which
    /// takes two reports: one may be forged, and a live backend answers before the next.
    pub fn suspect(&mut self, peer: PeerId, now: Now) -> bool {
        let Some(state) = self.all.get_mut(peer.index()) else { return false };
        let Some(backend) = state.backend.filter(|_| state.is_usable(now)) else {
            return false;
        };
        if !std::mem::replace(&mut state.suspected, true) {
            self.suspected += 1;
            return false;
        }
        state.avoided_until = now.plus(AVOIDED);
        self.avoided.retain(|(_, until)| *until > now);
        self.avoided.push((backend, state.avoided_until));
        true
    }
}
