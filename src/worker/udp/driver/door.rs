//! This worker's socket at a UDP door. Owns how local addresses are written on it: in its own
//! address family, and with the source address that a reply needs on a wildcard socket.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::burst::Burst;
use super::{RECEIVE_AT_DOOR, UdpDriver};
use crate::cluster::{Protocol, Service, ServiceId, Snapshot};
use crate::config::Udp;
use crate::ring::datagram::{PktInfo, RecvMeta};
use crate::ring::{Ring, Tag, sys};
use crate::worker::driver::Turn;
use crate::worker::link::{DoorChange, Listener};

/// This worker's socket in the group at a UDP door.
pub struct UdpDoor {
    /// The service whose users come to it.
    pub(super) service: ServiceId,
    /// Of its receive.
    pub(super) tag: Tag,
    pub(super) socket: OwnedFd,
    /// The address it is bound to.
    pub(super) at: SocketAddr,
    /// Bound to all addresses, so that every reply has to name its source address.
    wildcard: bool,
    /// An IPv6 socket, which IPv4 users may reach as well.
    v6: bool,
    pub(super) burst: Burst,
}

impl UdpDoor {
    /// A door over a bound socket, whose receive gets this tag.
    ///
    /// # Errors
    /// The kernel does not say where the socket is bound.
    fn new(socket: OwnedFd, service: ServiceId, tag: Tag) -> std::io::Result<UdpDoor> {
        let at = sys::local(socket.as_fd())?;
        let v6 = sys::is_v6(socket.as_fd())?;
        let wildcard = at.ip().is_unspecified();
        Ok(UdpDoor { service, tag, socket, at, wildcard, v6, burst: Burst::default() })
    }

    /// The local address a datagram was sent to, from which its reply must leave.
    pub(super) fn local_of(&self, meta: &RecvMeta) -> SocketAddr {
        let port = self.at.port();
        match meta.to.unwrap_or(self.at.ip().into()) {
            PktInfo { ip: IpAddr::V6(v6), interface } => {
                SocketAddr::V6(SocketAddrV6::new(v6, port, 0, interface))
            }
            PktInfo { ip, .. } => SocketAddr::new(ip, port),
        }
    }

    /// The source address of a reply, given the local address; `None` if the socket supplies it.
    pub(super) fn reply_source(&self, local: SocketAddr) -> Option<PktInfo> {
        let source = match self.in_family(local) {
            SocketAddr::V6(v6) => PktInfo { ip: IpAddr::V6(*v6.ip()), interface: v6.scope_id() },
            other => other.ip().into(),
        };
        self.wildcard.then_some(source)
    }

    /// An address in the socket's own family.
    pub(super) fn in_family(&self, address: SocketAddr) -> SocketAddr {
        match address {
            SocketAddr::V4(v4) if self.v6 => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            other => other,
        }
    }
}

impl UdpDriver {
    pub(super) fn change_door(&mut self, change: DoorChange, turn: &mut Turn<'_>) {
        match change {
            DoorChange::Open(listener) => {
                self.open_door(listener, turn.ring);
                self.follow_quarantine(turn.books.snapshot());
            }
            DoorChange::Assign { id, service, .. } => {
                if let Some(Some(door)) = self.doors.get_mut(usize::from(id.0)) {
                    door.service = service;
                }
            }
            DoorChange::Close { id } => {
                let door = self.doors.get_mut(usize::from(id.0)).and_then(Option::take);
                if let Some(door) = door {
                    self.sessions.close_door(id.0);
                    self.close_socket(door.tag, door.socket, turn.ring);
                }
            }
        }
    }

    /// Sockets towards a backend are not any one service's.
    pub(super) fn follow_quarantine(&mut self, snapshot: &Snapshot) {
        let has_door = |id| self.doors.iter().flatten().any(|door| door.service == id);
        if let Some(lasts) = quarantine(&self.sessions.settings().udp, snapshot, has_door) {
            self.sessions.set_quarantine(lasts);
        }
    }

    fn open_door(&mut self, Listener { id, socket, service, .. }: Listener, ring: &mut Ring) {
        let place = usize::from(id.0);
        let generation = self.next_generation();
        let tag = Tag { kind: RECEIVE_AT_DOOR, generation, slot: place as u32 };
        let door = UdpDoor::new(socket, service, tag).expect("the door's socket is bound");
        ring.receive_datagrams(tag, door.socket.as_fd());
        if self.doors.len() <= place {
            self.doors.resize_with(place + 1, || None);
        }
        self.doors[place] = Some(door);
        self.make_room_for_rearms();
    }

    /// The door a completion belongs to, unless that has closed.
    pub(super) fn door_at(&self, tag: Tag) -> Option<&UdpDoor> {
        let door = self.doors.get(tag.slot as usize)?.as_ref();
        door.filter(|door| door.tag.generation == tag.generation)
    }
}

/// The longest quarantine that a service with users needs: a socket is kept from reuse for as long as a reply
/// to any session may come. `None` where there is no such service. The built-in one has users if it has a door.
fn quarantine(
    udp: &Udp,
    snapshot: &Snapshot,
    has_door: impl Fn(ServiceId) -> bool,
) -> Option<Duration> {
    let services = snapshot.services.iter().filter(|it| it.kind == Protocol::Udp);
    let used = services.filter(|it| !it.id.is_built_in() || has_door(it.id));
    let needed = used.map(|Service { terms, .. }| {
        Udp { responses: terms.responses, ..*udp }.quarantine(terms.timeouts.udp_idle)
    });
    needed.max()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn a_socket_is_kept_from_reuse_for_the_service_that_needs_it_longest() {
        let secs = Duration::from_secs;
        let mut snapshot = Snapshot::default();
        let built_in = snapshot.service(ServiceId::built_in(Protocol::Udp)).unwrap().clone();
        let mut asked = |idle: Option<u64>, responses: Option<u32>, built_in_door: bool| {
            let mut services: Vec<Service> = Snapshot::default().services.into();
            let named = idle.map(|idle| {
                let mut service = Service { id: ServiceId(9), ..built_in.clone() };
                service.terms.timeouts.udp_idle = secs(idle);
                service.terms.responses = responses.and_then(NonZeroU32::new);
                service
            });
            services.extend(named);
            snapshot.services = services.into();
            quarantine(&Udp::default(), &snapshot, |id| id.is_built_in() && built_in_door)
        };
        assert_eq!(asked(None, None, true), Some(secs(120)));
        assert_eq!(asked(None, None, false), None, "nobody comes to the built-in service");
        assert_eq!(asked(Some(300), None, true), Some(secs(600)));
        assert_eq!(asked(Some(5), None, true), Some(secs(120)));
        assert_eq!(asked(Some(5), None, false), Some(secs(10)));
        assert_eq!(
            asked(Some(60), Some(1), false),
            Some(secs(10)),
            "only late duplicates can come"
        );
    }

    #[test]
    fn a_configured_quarantine_is_the_same_for_all() {
        let udp = Udp { quarantine: Some(Duration::from_secs(7)), ..Udp::default() };
        let lasts = quarantine(&udp, &Snapshot::default(), |_| true);
        assert_eq!(lasts, Some(Duration::from_secs(7)));
    }
}
