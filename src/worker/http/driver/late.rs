//! API users who go on in another process one by one, while their worker goes on: their sockets. Owns that each is
//! taken up or refused by itself; who can go, and when, is up to `sessions`.

use std::os::fd::OwnedFd;

use super::{HttpDriver, end_of};
use crate::cluster::Protocol;
use crate::estate::api::UserRecord;
use crate::estate::{Parcel, Unclaimed};
use crate::worker::books::estate::{Named, Names};
use crate::worker::driver::Turn;
use crate::worker::http::sessions::Conn;
use crate::worker::stream_driver::StreamDriver;

impl HttpDriver {
    /// Describes those who are packed, with their sockets, and forgets them.
    pub(super) fn let_packed_go(&mut self, parcel: &mut Parcel<OwnedFd>, turn: &mut Turn<'_>) {
        let mut names = Names::default();
        for key in self.sessions.packed(&mut turn.cx(&mut self.commands)) {
            let cx = &mut turn.cx(&mut self.commands);
            let Some(mut record) = self.sessions.describe(key, &mut names, parcel, cx) else {
                // Its service is gone.
                self.sessions.stay(key, cx);
                continue;
            };
            self.sessions.departed(key, cx);
            if let Some(socket) = self.streams.take(end_of(Conn::User(key))) {
                record.sockets[0] = parcel.add_socket(socket);
                parcel.push(&record);
            }
        }
        self.execute(turn);
    }

    /// Takes up each user of a parcel who can be. The others are closed.
    pub(super) fn join_each(&mut self, mut parcel: Parcel<OwnedFd>, turn: &mut Turn<'_>) {
        if parcel.is_empty() {
            return;
        }
        self.sessions.start(turn.ring.pool_mut());
        // The name that it had here may be another's by now.
        let elsewhere = !turn.books.worker();
        parcel.amend(|user: &mut UserRecord| user.entry.worker = elsewhere);
        let mut descriptors = Unclaimed::new(std::mem::take(&mut parcel.sockets));
        let mut services = Named::new(Protocol::Api);
        for record in parcel.records::<UserRecord>() {
            let is_one = record.flags & UserRecord::TUNNEL == 0;
            let joined = is_one
                && self.take_up(&record, &mut descriptors, &mut services, &parcel, turn).is_ok();
            let counters = &turn.books.metrics().counters;
            match joined {
                // One whom nobody else would have has not gone on yet.
                true if self.sessions.has_left() => {}
                true => counters.api_users_followed.one(),
                false => counters.api_users_lost.one(),
            }
        }
        turn.books.settle();
        self.sessions.settle_in(&mut turn.cx(&mut self.commands));
        self.execute(turn);
    }
}
