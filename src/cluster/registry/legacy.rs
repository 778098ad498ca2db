//! What a registry leaves to the one of another process, and how that takes it up. Owns what must hold of
//! backends that were registered elsewhere.

use std::collections::BTreeSet;

use super::{Against, Registered, Registry, Roster, stand};
use crate::base::time::Now;
use crate::cluster::backend::{AskedCheck, Backend, BackendId, WEIGHT_MAX};
use crate::cluster::service::Service;
use crate::cluster::source::Source;

/// What a registry leaves.
pub struct Inheritance {
    pub entries: Vec<Registered>,
    /// Those that have left, and their places.
    pub departed: Vec<(BackendId, u16)>,
    /// The next id.
    pub next: BackendId,
    /// That of the last snapshot.
    pub version: u64,
    /// The place that the next backend gets.
    pub slot: u16,
}

impl Registered {
    /// A backend as another process has registered it. Its standing follows from what speaks against it.
    pub fn elsewhere(
        backend: Backend,
        source: Source,
        since: Now,
        probe: bool,
        check: Option<AskedCheck>,
        is_claimed: bool,
        against: Against,
    ) -> Registered {
        let backend = Backend { standing: against.standing(), ..backend };
        Registered { backend, source, since, probe, check, is_claimed, against }
    }
}

impl Registry {
    /// The next id, the version of the last snapshot, and the place that the next backend gets.
    pub fn numbers(&self) -> (BackendId, u64, u16) {
        (BackendId(self.next), self.version, self.free.front().copied().unwrap_or_default())
    }

    /// Takes up a service that is to leave: it is not found by its name.
    ///
    /// # Errors
    /// If it cannot be, in a sentence.
    pub fn inherit_leaving(&mut self, service: Service) -> Result<(), String> {
        let id = service.id;
        if self.rosters.contains_key(&id) {
            return Err(format!("two services have number {}", id.0));
        }
        self.rosters.insert(id, Roster { is_leaving: true, ..Roster::new(service) });
        Ok(())
    }

    /// Takes up what another registry has left; this one has no backends yet. After an error it is of no use.
    ///
    /// # Errors
    /// What is wrong, in a sentence.
    pub fn inherit(&mut self, from: Inheritance) -> Result<(), String> {
        let Inheritance { entries, departed, next, version, slot } = from;
        let mut taken = BTreeSet::new();
        for (id, place) in &departed {
            self.place(*id, *place, next, &mut taken)?;
            self.departed.insert(*id, *place);
        }
        for entry in entries {
            self.place(entry.backend.id, entry.backend.slot, next, &mut taken)?;
            self.put(entry)?;
        }
        // Those free for longest first, as far as that can be told: places are given out round and round.
        let places = (0..self.places).filter_map(|place| u16::try_from(place).ok());
        let (before, behind): (Vec<u16>, Vec<u16>) =
            places.filter(|place| !taken.contains(place)).partition(|place| *place < slot);
        self.free = behind.into_iter().chain(before).collect();
        (self.next, self.version) = (next.0, version);
        Ok(())
    }

    /// Gives a backend its place.
    fn place(
        &self,
        id: BackendId,
        place: u16,
        next: BackendId,
        taken: &mut BTreeSet<u16>,
    ) -> Result<(), String> {
        if id >= next || self.entries.contains_key(&id) || self.departed.contains_key(&id) {
            return Err(format!("backend {id} is there twice, or before its time"));
        }
        if usize::from(place) >= self.places || !taken.insert(place) {
            return Err(format!("backend {id} has a place that is another's, or none"));
        }
        Ok(())
    }

    fn put(&mut self, mut entry: Registered) -> Result<(), String> {
        let Backend { id, service, address, weight, .. } = entry.backend;
        let fault = |what: &str| Err(format!("backend {id} {what}"));
        if !self.rosters.contains_key(&service) {
            return fault("is of a service that is not there");
        }
        if !(1..=WEIGHT_MAX).contains(&weight) {
            return fault("has a weight out of its range");
        }
        if self.by_address.insert((service, address), id).is_some() {
            return fault("has the address of another");
        }
        stand(&mut entry, &mut self.aside);
        let roster = self.roster(service);
        roster.members.insert(id);
        roster.is_stale = true;
        self.by_source.entry(entry.source).or_default().insert(id);
        self.entries.insert(id, entry);
        Ok(())
    }
}
