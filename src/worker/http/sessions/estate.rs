//! API users who go on in another process: what is said of one who stands still, and how one is taken up, who stands
//! still until [`Sessions::thaw`].
//!
//! Those who are in the middle of a request stay where they are, and so do those under TLS, whose state is in no
//! record.

use super::looks::look_every;
use super::{Conn, Cx, Link, Member, Sessions, State, User};
use crate::cluster::gate::lists;
use crate::cluster::{DoorId, Doorway, ServiceId};
use crate::estate::api::{RequestRecord, UserRecord};
use crate::estate::entry::nanos;
use crate::estate::{Parcel, bits};
use crate::proxy::http::{Described, Gateway, Served};

use crate::worker::books::estate::{Named, Names, choice};
use crate::worker::books::{Choice, Entry};
use crate::worker::slots::Key;

impl Sessions {
    /// The users who could go on elsewhere, with their tunnels' links, if their connections are free for that.
    pub fn movable(&self, is_free: impl Fn(Conn) -> bool) -> Vec<(Key, Option<Key>)> {
        let all = self.users.iter().filter(|(_, user)| user.is_movable());
        let all = all.map(|(key, user)| (key, user.link)).filter(|(key, link)| {
            is_free(Conn::User(*key)) && link.is_none_or(|link| is_free(Conn::Link(link)))
        });
        all.collect()
    }

    /// What another could go on with; the descriptors are the driver's to add. Nothing is being sent.
    pub fn describe<S>(
        &mut self,
        key: Key,
        names: &mut Names,
        parcel: &mut Parcel<S>,
        cx: &Cx<'_>,
    ) -> Option<UserRecord> {
        let user = self.users.get(key)?;
        let (entry, books) = (user.entry.as_ref()?, &*cx.books);
        let is_tunnel = user.gateway.is_tunnel();
        let entry = match is_tunnel {
            true => books.describe(entry, names, parcel)?,
            false => books.describe_user(entry, names, parcel)?,
        };
        let Described { relay, mut request, number, active, heard } =
            user.gateway.describe(cx.pool, parcel);
        if is_tunnel {
            request.service = books.name(user.service, names, parcel)?;
            let (_, asked) = user.gateway.served_by();
            let asked = asked.and_then(|asked| books.name(asked, names, parcel));
            request.asked = asked.unwrap_or(RequestRecord::NONE.asked);
        }
        let flags = [(is_tunnel, UserRecord::TUNNEL), (user.started, UserRecord::STARTED)];
        Some(UserRecord {
            entry,
            sockets: UserRecord::APART,
            relay,
            active: nanos(active),
            heard: nanos(heard),
            destination: user.destination.into(),
            request,
            number: number.into(),
            door: user.gateway.door.door.0.into(),
            flags: bits(flags),
            unused: 0,
        })
    }

    /// Takes up what another has described; with a tunnel, its link. It stands still until [`Sessions::thaw`].
    ///
    /// # Errors
    /// What is wrong with the record, or what is lacking here; there is nothing of the user then.
    pub fn take_up<S>(
        &mut self,
        record: &UserRecord,
        services: &mut Named,
        parcel: &Parcel<S>,
        cx: &mut Cx<'_>,
    ) -> Result<(Key, Option<Key>), String> {
        if record.flags & !UserRecord::FLAGS != 0 {
            return Err("an API user has unknown flags".into());
        }
        let destination = record.destination.get()?;
        let tunnel = (record.flags & UserRecord::TUNNEL != 0)
            .then(|| serves(record, services, parcel, cx))
            .transpose()?;
        let entry = cx.books.take_up_user(&record.entry, services, parcel)?;
        let key = self.place(record, entry, tunnel.map(|(served, _)| served), parcel, cx)?;
        let link = tunnel.map(|(Served { service, backend, .. }, choice)| {
            let (to, state) = (Member { service, backend }, State::Serving { user: key });
            self.links.put(Link { to, choice, login: false, state, stream_of: None })
        });
        self.make_room();
        let Some(user) = self.users.get(key) else { return Ok((key, link)) };
        (user.destination, user.link) = (destination, link);
        user.started = record.flags & UserRecord::STARTED != 0;
        if let (Some((Served { service, .. }, choice)), Some(entry)) = (tunnel, &mut user.entry) {
            user.service = service;
            user.looks.at = cx.now.plus(look_every(user.gateway.limits()));
            cx.books.enter(entry, service, choice);
        } else {
            self.seated.push(key);
        }
        Ok((key, link))
    }

    /// Gives a user who is taken up a place.
    fn place<S>(
        &mut self,
        record: &UserRecord,
        entry: Entry,
        served: Option<Served>,
        parcel: &Parcel<S>,
        cx: &mut Cx<'_>,
    ) -> Result<Key, String> {
        let (service, client) = (entry.service, entry.client);
        let doorway = Doorway { door: DoorId(record.door.get()), service, is_tls: false };
        let trusted = lists(&self.settings.trusted, client.ip());
        let gateway = Gateway::new(cx.books.id(&entry), doorway, client, trusted, cx.now);
        let moved = [record.entry.bytes_up.get(), record.entry.bytes_down.get()];
        let user = User { moved, ..User::new(gateway, service, Some(entry)) };
        let key = self.users.put(user);
        let mut taken = Ok(());
        self.lend(key, cx, |gateway, context| {
            taken = gateway.take_up(record, served, parcel, context);
        });
        if taken.is_err() {
            let user = self.users.remove(key);
            let entry = user.and_then(|user| user.entry);
            entry.into_iter().for_each(|entry| cx.books.withdraw(entry));
        }
        taken.map(|()| key)
    }
}

/// Who serves a tunnel.
fn serves<S>(
    record: &UserRecord,
    services: &mut Named,
    parcel: &Parcel<S>,
    cx: &Cx<'_>,
) -> Result<(Served, Choice), String> {
    let choice = choice(&record.entry)?;
    let service = services.find(record.request.service, parcel, cx.books)?;
    let asked: Option<ServiceId> = match record.request.asked.len.get() {
        0 => None,
        // It may have been removed meanwhile: only the log names it.
        _ => services.find(record.request.asked, parcel, cx.books).ok(),
    };
    Ok((Served { service, asked, backend: choice.backend }, choice))
}

impl User {
    fn is_movable(&self) -> bool {
        let is_known = self.entry.as_ref().is_some_and(|entry| !entry.is_tls());
        let is_alone = self.private.is_none() && self.leaving.is_none();
        let (is_tunnel, has_link) = (self.gateway.is_tunnel(), self.link.is_some());
        let is_between = !has_link && self.gateway.is_between_requests();
        is_known && is_alone && (is_between || is_tunnel && has_link)
    }
}
