//! UDP users who go on in another process: the sockets that they share, by place in the estate, and the doors that
//! their replies leave by. What a session's record says besides is `sessions`'s.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use super::burst::Burst;
use super::upstream::{UpstreamSocket, receive_tag};
use super::{Rearm, UdpDriver};
use crate::cluster::{DoorId, Protocol};
use crate::estate::entry::{Address, nanos};
use crate::estate::udp::{FlowRecord, RestRecord, SenderRecord, SourceRecord, UpstreamRecord};
use crate::estate::{Estate, Parcel, Unclaimed};
use crate::proxy::udp::{Family, SocketId};
use crate::ring::sys::{self, Kind};
use crate::worker::books::estate::Named;
use crate::worker::driver::Turn;
use crate::worker::udp::sessions::estate::Means;

/// Where sockets towards backends are described, by family and place.
type Places = BTreeMap<(u8, u16), u32>;
/// Where described sockets are here, by the place of their record.
type Upstream = Vec<(Family, u16)>;

impl UdpDriver {
    /// Describes everything. What was ordered before is carried out first.
    pub(super) fn describe_all(&mut self, estate: &mut Estate<RawFd>, turn: &mut Turn<'_>) {
        self.settle(turn);
        self.sessions.finish_sweeps(turn.now, turn.books);
        let places = self.describe_upstream(&mut estate.upstream);
        let door = |place| self.doors.get(usize::from(place))?.as_ref().map(|door| door.at.into());
        let means =
            |means: &Means| Some((door(means.door)?, self.sender_of(means.socket, &places)?));
        self.sessions.describe(turn.books, &mut estate.udp, means);
        for rest in self.sessions.resting() {
            let Some(sender) = self.sender_of(rest.socket, &places) else { continue };
            estate.rests.push(&RestRecord {
                backend: rest.backend.into(),
                sender,
                until: nanos(rest.until),
                at: nanos(rest.at),
                clean: nanos(rest.clean),
            });
        }
        self.sessions.describe_sources(turn.now, &mut estate.sources);
        self.described = true;
    }

    fn describe_upstream(&self, parcel: &mut Parcel<RawFd>) -> Places {
        let mut places = Places::new();
        for family in Family::BOTH {
            for (place, upstream) in (0u16..).zip(&self.upstream[family as usize]) {
                let Some(upstream) = upstream else { continue };
                places.insert((family as u8, place), parcel.len() as u32);
                let socket = parcel.add_socket(upstream.socket.as_raw_fd());
                let (place, is_v6) = (place.into(), u8::from(family == Family::V6));
                parcel.push(&UpstreamRecord { socket, place, is_v6, unused: 0 });
            }
        }
        places
    }

    fn sender_of(&self, socket: SocketId, places: &Places) -> Option<SenderRecord> {
        let (place, local) = self.config.local_addresses.split(socket);
        let upstream = *places.get(&(socket.family as u8, place))?;
        let local = local.map(|ip| SocketAddr::new(ip, 0)).into();
        Some(SenderRecord { upstream: upstream.into(), local })
    }

    /// Takes up everything, or nothing.
    pub(super) fn inherit_all(
        &mut self,
        estate: &mut Estate<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        let taken = self.take_up(estate, turn);
        if taken.is_err() {
            self.forget_all(turn);
        }
        taken
    }

    fn take_up(&mut self, estate: &mut Estate<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), String> {
        let upstream = self.take_up_upstream(&mut estate.upstream, turn)?;
        let parcel = std::mem::take(&mut estate.udp);
        let mut services = Named::new(Protocol::Udp);
        for record in parcel.records::<FlowRecord>() {
            let door = door(&record, &estate.doors_here)?;
            let means = Means { socket: self.socket_of(&record.sender, &upstream)?, door };
            let context = (&mut services, &parcel);
            self.sessions.take_up(turn.now, &record, means, context, turn.books)?;
        }
        for record in estate.rests.records::<RestRecord>() {
            let socket = self.socket_of(&record.sender, &upstream)?;
            self.sessions.take_up_rest(turn.now, &record, socket)?;
        }
        for record in estate.sources.records::<SourceRecord>() {
            self.sessions.take_up_source(turn.now, &record);
        }
        self.sessions.taken_up();
        Ok(())
    }

    /// The sockets towards backends, each at its old place unless another worker's is there.
    fn take_up_upstream(
        &mut self,
        parcel: &mut Parcel<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<Upstream, String> {
        let mut descriptors = Unclaimed::new(std::mem::take(&mut parcel.sockets));
        let mut upstream = Upstream::new();
        for record in parcel.records::<UpstreamRecord>() {
            let socket = descriptors.claim(record.socket)?;
            let family = if record.is_v6 == 0 { Family::V4 } else { Family::V6 };
            if sys::kind(socket.as_fd()) != (Kind::Datagrams { v6: family == Family::V6 }) {
                return Err("a descriptor is no UDP socket of its family".into());
            }
            let place = self.place_for(family, record.place.get())?;
            self.keep_inherited((family, place), socket, turn);
            upstream.push((family, place));
        }
        self.make_room_for_rearms();
        Ok(upstream)
    }

    /// The place of a socket, given its old one.
    fn place_for(&self, family: Family, old: u16) -> Result<u16, String> {
        let all = &self.upstream[family as usize];
        let most = usize::from(u16::MAX) / self.config.local_addresses.per_socket(family);
        let is_taken = all.get(usize::from(old)).is_some_and(Option::is_some);
        let place = if is_taken { all.len() } else { usize::from(old) };
        match place < most {
            true => Ok(place as u16),
            false => Err("there are too many sockets towards backends".into()),
        }
    }

    /// Takes a socket into use; its receive begins when the worker goes on.
    fn keep_inherited(
        &mut self,
        (family, place): (Family, u16),
        socket: OwnedFd,
        turn: &mut Turn<'_>,
    ) {
        if self.config.local_addresses.is_set(family) {
            sys::tell_destination(socket.as_fd(), family == Family::V4);
        }
        self.config.seats.take_beyond();
        let (mut numbers, generation) = (0, self.next_generation());
        for number in self.config.local_addresses.numbers_on(family, place) {
            self.sessions.take_up_socket(number);
            numbers += 1;
        }
        let upstream = UpstreamSocket { socket, generation, numbers, burst: Burst::default() };
        let tag = receive_tag(family, place, &upstream);
        self.rearms.push(Rearm { tag, at: turn.now });
        let all = &mut self.upstream[family as usize];
        if all.len() <= usize::from(place) {
            all.resize_with(usize::from(place) + 1, || None);
        }
        all[usize::from(place)] = Some(upstream);
        self.open += 1;
    }

    /// The number here of a socket and a local address.
    fn socket_of(&self, sender: &SenderRecord, upstream: &Upstream) -> Result<SocketId, String> {
        let found = upstream.get(sender.upstream.get() as usize);
        let (family, place) = *found.ok_or("a session's socket is missing")?;
        let local = sender.local.get()?.map(|local| local.ip());
        let addresses = &self.config.local_addresses;
        let is_alike = local.is_some() == addresses.is_set(family);
        let socket = addresses.join(family, place, local).filter(|_| is_alike);
        socket.ok_or_else(|| match local {
            Some(ip) => format!(
                "sessions send from {ip}, which udp.local_addresses does not list any more; \
                 list it, or restart"
            ),
            None => "sessions send from an address that the kernel has chosen, and \
                     udp.local_addresses lists others; restart"
                .into(),
        })
    }
}

/// The number here of the door that a session's replies leave by.
fn door(record: &FlowRecord, doors: &[(DoorId, SocketAddr)]) -> Result<u16, String> {
    let at = record.door.given()?;
    let is_it = |door: &&(DoorId, SocketAddr)| Address::from(door.1) == record.door;
    doors.iter().find(is_it).map(|(id, _)| id.0).ok_or_else(|| {
        format!("the UDP door at {at} has sessions and is to be closed; drain it first, or restart")
    })
}
