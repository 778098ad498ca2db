//! This worker's socket at a UDP door. Owns how local addresses are written on it: in its own
//! address family, and with the source address that a reply needs on a wildcard socket.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};

use super::burst::Burst;
use super::{RECEIVE_AT_DOOR, UdpDriver};
use crate::cluster::ServiceId;
use crate::ring::datagram::{PktInfo, RecvMeta};
use crate::ring::{Ring, Tag, sys};
use crate::worker::link::{DoorChange, Listener};

/// This worker's socket in the group at a UDP door.
pub struct UdpDoor {
    /// The service whose users come to it.
    pub(super) service: ServiceId,
    /// Of its receive.
    pub(super) tag: Tag,
    pub(super) socket: OwnedFd,
    /// The address it is bound to.
    at: SocketAddr,
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
    pub(super) fn change_door(&mut self, change: DoorChange, ring: &mut Ring) {
        match change {
            DoorChange::Open(listener) => self.open_door(listener, ring),
            DoorChange::Assign { id, service } => {
                if let Some(Some(door)) = self.doors.get_mut(usize::from(id.0)) {
                    door.service = service;
                }
            }
            DoorChange::Close { id } => {
                let door = self.doors.get_mut(usize::from(id.0)).and_then(Option::take);
                if let Some(door) = door {
                    self.sessions.close_door(id.0);
                    self.close_socket(door.tag, door.socket, ring);
                }
            }
        }
    }

    fn open_door(&mut self, Listener { id, socket, service }: Listener, ring: &mut Ring) {
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
