//! API users while their worker stands still, and those who go on in another process: their sockets, by place in the
//! estate. Owns which completions are noted at once and which wait; what a record says of a user is `sessions`'s.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::{HttpDriver, conn_of, end_of};
use crate::cluster::Protocol;
use crate::estate::api::UserRecord;
use crate::estate::{Parcel, Unclaimed};
use crate::ring::Done;
use crate::worker::books::estate::{Named, Names};
use crate::worker::driver::Turn;
use crate::worker::http::sessions::Conn;
use crate::worker::slots::Key;
use crate::worker::stream_driver::StreamDriver;
use crate::worker::streams::{Completion, Streams, claim};

type ApiStreams = Streams<{ crate::worker::family::API }>;

/// Those who go on elsewhere.
#[derive(Default)]
pub(super) struct Movers {
    /// Users, and the links of tunnels.
    described: Vec<(Key, Option<Key>)>,
    /// Connections that have been left to others and still have something in flight here.
    left: HashSet<Conn>,
}

impl HttpDriver {
    /// Tunnels, and those who have left, are told at once; what concerns others waits.
    pub(super) fn note_or_hold(&mut self, done: Done, turn: &mut Turn<'_>) {
        if !ApiStreams::is_of_stream(done.tag) {
            return self.streams.hold(done, turn);
        }
        let conn = conn_of(done.tag);
        let is_told = self.movers.left.contains(&conn) || self.is_plain_tunnel(conn);
        if !is_told {
            return self.streams.hold(done, turn);
        }
        if let Completion::Happened(_, event) = self.streams.complete(done, turn) {
            self.sessions.note(conn, event, &mut turn.cx(&mut self.commands));
        }
        self.execute(turn);
    }

    fn is_plain_tunnel(&mut self, conn: Conn) -> bool {
        let Some((user, link)) = self.sessions.tunnel(conn) else { return false };
        let ends = [Conn::User(user), Conn::Link(link)].map(end_of);
        !ends.into_iter().any(|end| self.streams.is_secured(end))
    }

    pub(super) fn take_back_sends(&mut self, turn: &mut Turn<'_>) {
        let streams = &self.streams;
        let is_free = |conn| !streams.is_secured(end_of(conn));
        self.sessions.take_back(is_free, &mut turn.cx(&mut self.commands));
        self.execute(turn);
    }

    pub(super) fn users_are_still(&mut self) -> bool {
        let (streams, sessions) = (&self.streams, &self.sessions);
        self.movers.left.retain(|conn| sessions.has(*conn));
        self.movers.left.is_empty() && sessions.is_still(|conn| !streams.is_secured(end_of(conn)))
    }

    /// Describes the users who could go on elsewhere, and remembers who these are.
    pub(super) fn describe_all(&mut self, parcel: &mut Parcel<RawFd>, turn: &mut Turn<'_>) {
        let HttpDriver { sessions, streams, commands, movers } = self;
        // Of these more is known than the kernel would say again.
        let busy: HashSet<Conn> =
            streams.held().filter(|done| !is_void(done)).map(|done| conn_of(done.tag)).collect();
        let is_free = |conn| !streams.is_secured(end_of(conn)) && !busy.contains(&conn);
        movers.described = sessions.movable(is_free);
        let mut names = Names::default();
        movers.described.retain(|(key, link)| {
            let record = sessions.describe(*key, &mut names, parcel, &turn.cx(commands));
            let Some(mut record) = record else { return false };
            let ends = [Some(Conn::User(*key)), link.map(Conn::Link)];
            for (end, place) in ends.into_iter().zip(&mut record.sockets) {
                let socket = end.and_then(|conn| streams.socket(end_of(conn)));
                if let Some(socket) = socket {
                    *place = parcel.add_socket(socket.as_raw_fd());
                }
            }
            parcel.push(&record);
            true
        });
    }

    /// Nobody goes on elsewhere.
    pub(super) fn stay(&mut self) {
        self.movers.described.clear();
    }

    /// Forgets those who have been described.
    pub(super) fn leave_all(&mut self, turn: &mut Turn<'_>) {
        let described = std::mem::take(&mut self.movers.described);
        let links = described.iter().filter_map(|(_, link)| link.map(Conn::Link));
        let users = described.iter().map(|(key, _)| Conn::User(*key));
        self.movers.left = users.chain(links).collect();
        let keys: Vec<Key> = described.into_iter().map(|(key, _)| key).collect();
        self.sessions.leave(&keys, &mut turn.cx(&mut self.commands));
        self.execute(turn);
        let left = &self.movers.left;
        let held = self.streams.take_held(|done| left.contains(&conn_of(done.tag)));
        held.into_iter().for_each(|done| self.note_or_hold(done, turn));
    }

    /// Takes up all users of a parcel, or none.
    pub(super) fn inherit_all(
        &mut self,
        mut parcel: Parcel<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        if !parcel.is_empty() {
            self.sessions.start(turn.ring.pool_mut());
        }
        let mut descriptors = Unclaimed::new(std::mem::take(&mut parcel.sockets));
        let mut services = Named::new(Protocol::Api);
        let mut keys = Vec::with_capacity(parcel.len());
        for record in parcel.records::<UserRecord>() {
            match self.take_up(&record, &mut descriptors, &mut services, &parcel, turn) {
                Ok(key) => keys.push(key),
                Err(why) => {
                    self.sessions.leave(&keys, &mut turn.cx(&mut self.commands));
                    self.execute(turn);
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    pub(super) fn take_up(
        &mut self,
        record: &UserRecord,
        descriptors: &mut Unclaimed<OwnedFd>,
        services: &mut Named,
        parcel: &Parcel<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<Key, String> {
        let [client, backend] = record.sockets;
        let client = claim(descriptors, client)?;
        let is_tunnel = record.flags & UserRecord::TUNNEL != 0;
        let backend = is_tunnel.then(|| claim(descriptors, backend)).transpose()?;
        let cx = &mut turn.cx(&mut self.commands);
        let (key, link) = self.sessions.take_up(record, services, parcel, cx)?;
        self.streams.keep(end_of(Conn::User(key)), client);
        if let (Some(link), Some(backend)) = (link, backend) {
            self.streams.keep(end_of(Conn::Link(link)), backend);
        }
        Ok(key)
    }
}

/// Whether a completion says nothing that would not be said again.
fn is_void(done: &Done) -> bool {
    let is_again = matches!(
        done.result,
        Err(Errno::ENOBUFS | Errno::ECANCELED | Errno::EINTR | Errno::EAGAIN)
    );
    ApiStreams::is_room(done.tag) || ApiStreams::is_receive(done.tag) && is_again
}
