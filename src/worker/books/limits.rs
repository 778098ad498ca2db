//! The limits of each service, as a worker keeps them: who is let in, and which backends have room. The
//! counts are those of all workers.

use std::net::SocketAddr;
use std::sync::atomic::{Ordering, fence};

use super::{Books, Choice, Entry};
use crate::balance::{self, Question};
use crate::cluster::{Backend, BackendId, Barrier, Service, ServiceId};
use crate::worker::link::Refusal;

/// How often a session is booked on a backend that others have filled meanwhile.
const BOOKINGS_MAX: usize = 4;

impl Books {
    /// Lets a request of an API user in at its service, whose session it is until [`Books::let_out`]. One
    /// that is tried `again` has been let in before.
    ///
    /// # Errors
    /// What keeps it out.
    pub fn let_in(
        &self,
        entry: &mut Entry,
        service: ServiceId,
        again: bool,
    ) -> Result<(), Barrier> {
        self.let_out(entry);
        let Some(found) = self.snapshot.service(service) else { return Ok(()) };
        match again {
            true => drop(found.gate.enter(None)),
            false => found.enter(entry.client.ip())?,
        }
        entry.inside = Some(service);
        Ok(())
    }

    /// The session, or the request of an API user, is no longer its service's. A service that is no longer
    /// in the snapshots has taken its gate with it.
    pub fn let_out(&self, entry: &mut Entry) {
        let service = entry.inside.take().and_then(|service| self.snapshot.service(service));
        service.inspect(|service| service.gate.leave());
    }

    /// Moves a session in the books to this backend, or to another where there is room if others have filled
    /// it meanwhile.
    #[cold]
    pub(super) fn book_where_there_is_room(
        &mut self,
        service: ServiceId,
        entry: &mut Entry,
        first: Choice,
        tried: &[BackendId],
    ) -> Option<Choice> {
        let mut choice = first;
        for _ in 0..BOOKINGS_MAX {
            if self.book_if_room(service, entry, choice) {
                return Some(choice);
            }
            let (user, after) = (entry.client, tried.first().copied());
            choice = self.choose(service, user, after, &|id| tried.contains(&id))?;
        }
        None
    }

    /// Moves a session to a backend in the books, unless that has been filled by another worker since it was
    /// chosen.
    pub fn book_if_room(&mut self, service: ServiceId, entry: &mut Entry, choice: Choice) -> bool {
        let row = entry.row;
        self.book(entry, choice);
        let limit = self.snapshot.service(service).and_then(|it| it.terms.limits.backend_sessions);
        let Some(limit) = limit else { return true };
        // Of two workers that take the last place, at least one sees the other: each counts its own session
        // before it looks at the other's.
        fence(Ordering::SeqCst);
        let has_room = self.load(choice.slot) <= u64::from(limit);
        if !has_room {
            self.unassign(entry);
            entry.row = row;
        }
        has_room
    }

    /// Whether a user's address is none that the service lets in.
    pub fn is_stranger(&self, service: ServiceId, client: SocketAddr) -> bool {
        self.snapshot.service(service).is_some_and(|service| !service.lets_in(client.ip()))
    }

    /// Whether a backend of a service has as many sessions as it may.
    pub fn is_full(&self, service: ServiceId, choice: Choice) -> bool {
        let limit = self.snapshot.service(service).and_then(|it| it.terms.limits.backend_sessions);
        limit.is_some_and(|limit| self.load(choice.slot) >= u64::from(limit))
    }

    /// Why there is no backend for a user who has tried none.
    pub fn nobody(&self, service: ServiceId) -> Refusal {
        let found = self.snapshot.service(service);
        let limited = found.filter(|service| service.terms.limits.backend_sessions.is_some());
        match limited.is_some_and(|service| !service.pool.serves_nobody()) {
            true => Refusal::Barred(Barrier::BackendSessions),
            false => Refusal::NoBackend,
        }
    }

    /// Counts users, or datagrams, that a service did not let in.
    pub fn barred(&self, service: ServiceId, barrier: Barrier, count: u64) {
        if let Some(service) = self.snapshot.service(service) {
            service.gate.turn_away(barrier, count);
        }
    }

    /// Sessions running on the backend in this row, across all workers.
    pub(super) fn load(&self, slot: u16) -> u64 {
        let slot = usize::from(slot);
        self.parts.all_metrics.iter().map(|metrics| metrics.backends[slot].active.get()).sum()
    }

    /// Picks among the backends that have room.
    #[cold]
    pub(super) fn pick_with_room<'s>(
        &self,
        service: &'s Service,
        question: &Question<'_>,
        limit: u32,
    ) -> Option<&'s Backend> {
        let is_full = |id| {
            let backend = service.pool.get(id);
            backend.is_some_and(|backend| (question.load)(backend) >= u64::from(limit))
        };
        let excluded = |id| (question.excluded)(id) || is_full(id);
        balance::pick(service, &Question { excluded: &excluded, ..*question })
    }
}
