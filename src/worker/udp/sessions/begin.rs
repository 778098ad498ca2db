//! How a UDP session begins: within the limits, with a backend that has a free pair, at a place in
//! the table. Owns the order of these checks.

use std::net::SocketAddr;

use super::{DoorRef, DropReason, Segments, Session, Sessions, Up, payload_max, plain};
use crate::base::time::Now;
use crate::cluster::{BackendId, Barrier, ServiceId};
use crate::proxy::udp::{Family, PeerId};
use crate::session::flows::FlowKey;
use crate::session::sources::Exceeded;
use crate::worker::books::{Books, Choice, Entry};
use crate::worker::link::Refusal;

/// Backends to try for a new session when one has no free pair.
const CHOICES_MAX: usize = 4;

/// A user without a session, and the flow that would be one.
#[derive(Clone, Copy)]
struct Asker {
    client: SocketAddr,
    service: ServiceId,
    hash: u64,
}

impl Sessions {
    /// Begins a session, and returns its place.
    ///
    /// # Errors
    /// The verdict on its first datagram, if there is no session.
    pub(super) fn begin(
        &mut self,
        now: Now,
        hash: u64,
        key: FlowKey,
        DoorRef { place: door, service }: DoorRef,
        segments: Segments,
        books: &mut Books,
    ) -> Result<u32, Up> {
        let asker = Asker { client: key.client(), service, hash };
        let client = asker.client;
        self.eviction.settle(now, &mut self.sources);
        self.check(now, asker, books).map_err(Up::Drop)?;
        if let Some(socket) = self.pairs.wanted(now) {
            return Err(Up::Open(socket));
        }
        let (choice, peer) = self.choose_with_room(now, asker, segments, books)?;
        let (place, mut entry) = self.admit(now, asker, books).map_err(Up::Drop)?;
        if !books.book_if_room(asker.service, &mut entry, choice) {
            books.withdraw(entry);
            return Err(Up::Drop(DropReason::Barred(Barrier::BackendSessions)));
        }
        let Some(socket) = self.pairs.take(peer, place) else {
            books.withdraw(entry);
            return Err(Up::Drop(DropReason::UpstreamExhausted));
        };
        books.started(&entry);
        let source = self.sources.charge(client.ip(), now);
        let source = source.expect("there is room for a source for every session");
        let session = Session {
            entry,
            door,
            peer,
            socket,
            source,
            responses: books.snapshot().service(service).and_then(|it| it.terms.responses),
            owed: 0,
            unanswered: false,
            refused: false,
        };
        let opened = self.flows.open(hash, key, service, session, now);
        assert!(opened.is_ok_and(|at| at == place), "the place was vacant");
        self.note(hash, choice.backend);
        Ok(place)
    }

    /// Checks whether a user may begin a session now.
    fn check(
        &self,
        now: Now,
        Asker { client, service, .. }: Asker,
        books: &Books,
    ) -> Result<(), DropReason> {
        if self.draining {
            return Err(DropReason::Draining);
        }
        let found = books.snapshot().service(service).ok_or(DropReason::NoBackend)?;
        if !found.lets_in(client.ip()) {
            return Err(DropReason::Barred(Barrier::Users));
        }
        if found.pool.serves_nobody() {
            return Err(DropReason::NoBackend);
        }
        // Seen first, so that a service at its limit takes no place or pair from another.
        if found.terms.limits.sessions.is_some_and(|max| found.gate.sessions() >= max as usize) {
            return Err(DropReason::Barred(Barrier::Sessions));
        }
        self.sources.check(client.ip(), now).map_err(|exceeded| match exceeded {
            Exceeded::Sessions => DropReason::SourceLimit,
            Exceeded::Rate => DropReason::SourceRate,
        })
    }

    /// A place and a seat for a session, by eviction if need be.
    fn admit(
        &mut self,
        now: Now,
        Asker { client, service, .. }: Asker,
        books: &mut Books,
    ) -> Result<(u32, Entry), DropReason> {
        if let Some(place) = self.flows.vacant() {
            match books.admit(service, client, now) {
                Ok(entry) => return Ok((place, entry)),
                Err(Refusal::Barred(barrier)) => return Err(DropReason::Barred(barrier)),
                Err(_) => {}
            }
        }
        self.make_place_free(now, client.ip(), books)?;
        let place = self.flows.vacant().ok_or(DropReason::TableFull)?;
        let entry = books.admit(service, client, now).map_err(|why| match why {
            Refusal::Barred(barrier) => DropReason::Barred(barrier),
            _ => DropReason::TableFull,
        })?;
        Ok((place, entry))
    }

    /// A backend for a new session, and its peer, with which a pair is free. Tries several
    /// backends.
    fn choose_with_room(
        &mut self,
        now: Now,
        asker: Asker,
        segments: Segments,
        books: &mut Books,
    ) -> Result<(Choice, PeerId), Up> {
        let user = asker.client.ip();
        let mut tried: [Option<BackendId>; CHOICES_MAX] = [None; CHOICES_MAX];
        let mut refused: Option<(Choice, DropReason)> = None;
        for turn in 0..CHOICES_MAX {
            let Some(choice) = self.choose(now, asker, &tried, books) else { break };
            if segments.longest() > payload_max(Family::of(plain(choice.address))) {
                return Err(Up::Drop(DropReason::TooBig));
            }
            // Unknown if the pair table is full of other addresses.
            let peer = self.pairs.find(plain(choice.address));
            let room = peer
                .ok_or(DropReason::UpstreamExhausted)
                .and_then(|peer| self.make_pair_free(now, peer, user, books).map(|()| peer));
            match room {
                Ok(peer) => return Ok((choice, peer)),
                Err(why) => refused = refused.or(Some((choice, why))),
            }
            tried[turn] = Some(choice.backend);
        }
        let Some((choice, why)) = refused else {
            return Err(Up::Drop(match books.nobody(asker.service) {
                Refusal::Barred(barrier) => DropReason::Barred(barrier),
                _ => DropReason::NoBackend,
            }));
        };
        self.shortages.at(choice, segments.datagrams(), books);
        Err(Up::Drop(why))
    }

    /// The backend that this flow has at another worker, or else the policy's choice.
    fn choose(
        &self,
        now: Now,
        Asker { client, service, hash }: Asker,
        tried: &[Option<BackendId>],
        books: &Books,
    ) -> Option<Choice> {
        let before = tried.first().copied().flatten();
        let is_tried = |id| tried.contains(&Some(id));
        let avoided = |id| self.backends.is_avoided(id, now) || is_tried(id);
        let elsewhere = self.settings.affinity.as_ref().and_then(|holder| holder.map.find(hash));
        let found = elsewhere.filter(|id| !avoided(*id)).and_then(|id| books.find(service, id));
        let found = found.filter(|choice| !books.is_full(service, *choice));
        if found.is_some() {
            books.metrics().counters.udp_sessions_found.one();
            return found;
        }
        books
            .choose(service, client, before, &avoided)
            .or_else(|| books.choose(service, client, before, &is_tried))
    }
}
