//! How a UDP session begins: the limits, then a backend, then room at that backend. Owns the order in
//! which these are asked.

use std::net::SocketAddr;

use super::{SERVICE, Session, Sessions, Up, Why, payload_max, plain};
use crate::base::time::Now;
use crate::cluster::BackendId;
use crate::proxy::udp::{Family, PeerId};
use crate::session::flows::FlowKey;
use crate::session::sources::Exceeded;
use crate::worker::books::{Books, Choice, Entry};
use crate::worker::udp::sessions::Load;

/// Backends that a new session is tried on when there is no room at one.
const CHOICES_MAX: usize = 4;

impl Sessions {
    /// Begins a session, within the limits.
    pub(super) fn begin(
        &mut self,
        now: Now,
        hash: u64,
        key: FlowKey,
        load: Load,
        books: &mut Books,
    ) -> Result<u32, Up> {
        let client = key.client();
        self.room.settle(now, &mut self.sources);
        self.check(now, client, books).map_err(Up::Drop)?;
        if let Some(socket) = self.upstream.wanted(now) {
            return Err(Up::Open(socket));
        }
        let (choice, peer) = self.choose_with_room(now, hash, client, load, books)?;
        let (place, mut entry) = self.admit(now, client, books).map_err(Up::Drop)?;
        let Some(socket) = self.upstream.take(peer, place) else {
            books.withdraw(entry);
            return Err(Up::Drop(Why::UpstreamExhausted));
        };
        books.book(&mut entry, choice);
        books.started(&entry);
        let source = self.sources.charge(client.ip(), now);
        let source = source.expect("as many sources fit as sessions");
        let session = Session { entry, peer, socket, source, owed: 0, open: false, refused: false };
        let opened = self.flows.open(hash, key, session, now);
        assert!(opened.is_ok_and(|at| at == place), "the place was vacant");
        self.note(hash, choice.backend);
        Ok(place)
    }

    /// Whether `client` may begin a session now.
    fn check(&self, now: Now, client: SocketAddr, books: &Books) -> Result<(), Why> {
        if self.draining {
            return Err(Why::Draining);
        }
        if books.snapshot().pool(SERVICE).is_none_or(|pool| pool.rotation.is_empty()) {
            return Err(Why::NoBackend);
        }
        self.sources.check(client.ip(), now).map_err(|exceeded| match exceeded {
            Exceeded::Sessions => Why::SourceLimit,
            Exceeded::Rate => Why::SourceRate,
        })
    }

    /// A place for a session, and a seat; another session's if there is no other.
    fn admit(
        &mut self,
        now: Now,
        client: SocketAddr,
        books: &mut Books,
    ) -> Result<(u32, Entry), Why> {
        if let Some(place) = self.flows.vacant()
            && let Ok(entry) = books.admit(SERVICE, client, now)
        {
            return Ok((place, entry));
        }
        self.place_for(now, client.ip(), books)?;
        let place = self.flows.vacant().ok_or(Why::TableFull)?;
        let entry = books.admit(SERVICE, client, now).map_err(|_| Why::TableFull)?;
        Ok((place, entry))
    }

    /// A backend for a new session, and its address, with which a pair is free. Where one has none
    /// others are tried.
    fn choose_with_room(
        &mut self,
        now: Now,
        hash: u64,
        client: SocketAddr,
        load: Load,
        books: &mut Books,
    ) -> Result<(Choice, PeerId), Up> {
        let mut tried: [Option<BackendId>; CHOICES_MAX] = [None; CHOICES_MAX];
        let mut refused: Option<(Choice, Why)> = None;
        for turn in 0..CHOICES_MAX {
            let Some(choice) = self.choose(now, hash, client, &tried, books) else { break };
            if load.longest() > payload_max(Family::of(plain(choice.address))) {
                return Err(Up::Drop(Why::TooBig));
            }
            // Unknown when too many addresses are.
            let peer = self.upstream.find(plain(choice.address));
            let room = peer
                .ok_or(Why::UpstreamExhausted)
                .and_then(|peer| self.room_at(now, peer, client.ip(), books).map(|()| peer));
            match room {
                Ok(peer) => return Ok((choice, peer)),
                Err(why) => refused = refused.or(Some((choice, why))),
            }
            tried[turn] = Some(choice.backend);
        }
        let Some((choice, why)) = refused else { return Err(Up::Drop(Why::NoBackend)) };
        self.shortages.at(choice, load.datagrams(), books);
        Err(Up::Drop(why))
    }

    /// The backend that another worker has for this flow, or else the one whose turn it is.
    fn choose(
        &self,
        now: Now,
        hash: u64,
        client: SocketAddr,
        tried: &[Option<BackendId>],
        books: &Books,
    ) -> Option<Choice> {
        let is_tried = |id| tried.contains(&Some(id));
        let unfit = |id| self.tenants.is_unfit(id, now) || is_tried(id);
        let elsewhere = self.settings.affinity.as_ref().and_then(|holder| holder.map.find(hash));
        let found = elsewhere.filter(|id| !unfit(*id)).and_then(|id| books.find(SERVICE, id));
        if found.is_some() {
            books.metrics().counters.udp_sessions_found.one();
            return found;
        }
        books
            .choose(SERVICE, client.ip(), &unfit)
            .or_else(|| books.choose(SERVICE, client.ip(), &is_tried))
    }
}
