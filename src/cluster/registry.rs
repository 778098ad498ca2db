//! Registrations: the one mutable truth about services and their backends, pure. Owns each backend's
//! source and standing, the places that workers count in, and which pools must be frozen anew. It
//! opens no socket, reads no clock and knows no message; callers bring changes, learn whether workers
//! would see a difference, and ask for one frozen [`Snapshot`] of as many changes as they like.

mod against;
mod changes;
mod claims;
mod legacy;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::Arc;

use ipnet::IpNet;

use super::backend::{AskedCheck, Backend, BackendId, ServiceId, Standing, WEIGHT_MAX};
use super::doors::Doors;
use super::groups;
use super::hash_key::HashKey;
use super::service::{Pool, Service, Terms};
use super::snapshot::Snapshot;
use super::source::Source;
use crate::base::time::Now;
use crate::tls::Tls;
pub use against::Against;
pub use changes::{Applied, Change, DrainedBy, Fault, Lasts, Registration};
pub use legacy::Inheritance;

/// A registered backend, with what workers need not know about it.
#[derive(Clone, Debug)]
pub struct Registered {
    pub backend: Backend,
    pub source: Source,
    pub since: Now,
    /// As in [`Registration::probe`].
    pub probe: bool,
    /// As in [`Registration::check`].
    pub check: Option<AskedCheck>,
    /// Whether other balancers have registered it, be it besides its source or as that.
    pub is_claimed: bool,
    against: Against,
}

impl Registered {
    /// What speaks against it.
    pub fn against(&self) -> Against {
        self.against
    }

    /// Who has asked for its drain, if it drains.
    pub fn drained_by(&self) -> Option<DrainedBy> {
        self.against.drained_by()
    }

    /// The same, if it was asked for here.
    pub fn drained_here(&self) -> Option<DrainedBy> {
        Against { drained_elsewhere: None, ..self.against }.drained_by()
    }
}

/// A service and its registered backends.
struct Roster {
    /// With the pool of the last snapshot.
    service: Service,
    members: BTreeSet<BackendId>,
    /// Whether something about its backends has changed since.
    is_stale: bool,
    /// Nobody finds it by its name any more.
    is_leaving: bool,
}

impl Roster {
    fn new(service: Service) -> Roster {
        Roster { service, members: BTreeSet::new(), is_stale: true, is_leaving: false }
    }
}

/// The services and their backends.
pub struct Registry {
    rosters: BTreeMap<ServiceId, Roster>,
    /// In the order of registration, which is the order of their ids.
    entries: BTreeMap<BackendId, Registered>,
    /// The same by service and address, a pair that can be registered only once.
    by_address: BTreeMap<(ServiceId, SocketAddr), BackendId>,
    /// The same by source.
    by_source: BTreeMap<Source, BTreeSet<BackendId>>,
    /// Those whose standing is [`Standing::Aside`].
    aside: BTreeSet<BackendId>,
    /// Without those that are about to leave.
    by_name: BTreeMap<Arc<str>, ServiceId>,
    /// Backends that have left, and their places, which may still be counted in.
    departed: BTreeMap<BackendId, u16>,
    /// Places to give out, the one that has been free longest first.
    free: VecDeque<u16>,
    places: usize,
    next: u32,
    version: u64,
    doors: Arc<Doors>,
    tls: Arc<Tls>,
    key: HashKey,
}

impl Registry {
    /// A registry of these services, without backends yet. It has room for `places` backends, 65,535
    /// at most; one that has left keeps its place until its sessions have ended.
    pub fn new(places: usize, services: &[Service]) -> Registry {
        let last = u16::try_from(places).expect("places are numbered with 16 bits");
        let roster = |service: &Service| Roster::new(service.clone());
        Registry {
            rosters: services.iter().map(|service| (service.id, roster(service))).collect(),
            entries: BTreeMap::new(),
            by_address: BTreeMap::new(),
            by_source: BTreeMap::new(),
            aside: BTreeSet::new(),
            by_name: services.iter().map(|it| (Arc::clone(&it.name), it.id)).collect(),
            departed: BTreeMap::new(),
            free: (0..last).collect(),
            places,
            next: 1,
            version: 0,
            doors: Arc::default(),
            tls: Arc::default(),
            key: HashKey::default(),
        }
    }

    /// Says by which key users are hashed, before the first [`Registry::freeze`].
    pub fn set_key(&mut self, key: HashKey) {
        self.key = key;
    }

    /// Says which service an API request is for, as of the next [`Registry::freeze`].
    pub fn set_doors(&mut self, doors: Arc<Doors>) {
        self.doors = doors;
    }

    /// Says what is agreed with users who speak TLS, as of the next [`Registry::freeze`].
    pub fn set_tls(&mut self, tls: Arc<Tls>) {
        self.tls = tls;
    }

    /// Applies one change. Nothing has changed when it is refused.
    pub fn apply(&mut self, change: Change, now: Now) -> Result<Applied, Fault> {
        match change {
            Change::Register(registration) => self.register(registration, now),
            Change::Claim { wanted, drains } => self.claim(wanted, drains, now),
            Change::Unclaim { service, address, .. } => Ok(self.unclaim(service, address)),
            Change::Unregister { source, service, address } => {
                let id = self.owned(source, service, address)?;
                Ok(self.release(&[id]))
            }
            Change::Drain { source, service, address, lasts: _ } => {
                let id = self.owned(source, service, address)?;
                Ok(self.amend(id, |against| against.drained_by_owner = true))
            }
            Change::Undrain { source, service, address } => {
                let id = self.owned(source, service, address)?;
                self.undrain(id, DrainedBy::Owner)
            }
            Change::Leave { backend } => Ok(self.release(&[backend])),
            Change::SourceLost { source, why: _ } => {
                let ids: Vec<_> = self.of_source(source).map(|entry| entry.backend.id).collect();
                Ok(self.release(&ids))
            }
            // Of one that gets no new sessions, a late report says nothing new.
            Change::SetAside { backend } => Ok(self.amend(backend, |against| {
                against.refused |= against.standing() == Standing::Serving;
            })),
            Change::Restore { backend } => Ok(self.amend(backend, |it| it.refused = false)),
            Change::Judge { backend, passes } => Ok(self.amend(backend, |it| it.failing = !passes)),
            Change::DrainBackend { backend, lasts: _ } => match self.get(backend) {
                // One that drains at its source's request goes on doing so.
                Some(_) => Ok(self.amend(backend, |against| {
                    against.drained_by_operator |= !against.drained_by_owner;
                })),
                None => Err(Fault::Unknown { backend }),
            },
            Change::UndrainBackend { backend } => self.undrain(backend, DrainedBy::Operator),
            Change::Weigh { backend, weight } => self.weigh(backend, weight),
        }
    }

    /// Whether a registration would be accepted as things stand.
    pub fn check(&self, wanted: &Registration) -> Result<(), Fault> {
        if !self.is_known(wanted.service) {
            return Err(Fault::Removed);
        }
        if wanted.weight == 0 || wanted.weight > WEIGHT_MAX {
            return Err(Fault::WeightOutOfRange);
        }
        self.check_group(wanted)?;
        let (service, address) = (wanted.service, wanted.address);
        match self.find(service, address) {
            Some(entry) if !entry.source.agrees_with(wanted.source) => {
                let service = self.name_of(service);
                Err(Fault::OwnedByAnother { service, address, by: entry.source })
            }
            // What was said to it in the clear, or to one that was verified otherwise, is not gone on with.
            Some(entry) if entry.backend.tls != wanted.tls => Err(Fault::TlsChanges { address }),
            Some(it) if it.backend.http2 != wanted.http2 => Err(Fault::HttpChanges { address }),
            None if self.has_enough(wanted) => Err(Fault::Enough {
                service: self.name_of(service),
                backends: self.service(service).terms.limits.backends.unwrap_or(u32::MAX),
            }),
            None => self.check_room(),
            _ => Ok(()),
        }
    }

    /// Whether one more backend can be given a place and a number.
    fn check_room(&self) -> Result<(), Fault> {
        match self.free.is_empty() || self.next == u32::MAX {
            true => Err(Fault::Full { places: self.places }),
            false => Ok(()),
        }
    }

    /// Whether a service takes no further registration. What is in the file is not held against it, nor what
    /// another balancer has taken.
    fn has_enough(&self, wanted: &Registration) -> bool {
        let Some(roster) = self.rosters.get(&wanted.service) else { return false };
        let max = roster.service.terms.limits.backends;
        let is_asked = matches!(wanted.source, Source::Connection(_));
        is_asked && max.is_some_and(|max| roster.members.len() >= max as usize)
    }

    /// Where a service has groups, a backend is in one of them; elsewhere it is in none.
    fn check_group(&self, wanted: &Registration) -> Result<(), Fault> {
        let service = self.service(wanted.service);
        let fits = match &wanted.group {
            Some(asked) => service.groups.iter().any(|group| group.name == *asked),
            None => service.groups.is_empty(),
        };
        if fits {
            return Ok(());
        }
        let (groups, asked) = (Arc::clone(&service.groups), wanted.group.clone());
        Err(Fault::Group { service: Arc::clone(&service.name), asked, groups })
    }

    /// The last session of a backend that had left has ended: its place may be reused.
    pub fn sessions_ended(&mut self, backend: BackendId) {
        if let Some(slot) = self.departed.remove(&backend) {
            self.free.push_back(slot);
        }
    }

    /// The number of registered backends.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every registered backend, in the order of registration.
    pub fn entries(&self) -> impl Iterator<Item = &Registered> {
        self.entries.values()
    }

    /// Those registered after `backend`, in the same order.
    pub fn entries_after(&self, backend: BackendId) -> impl Iterator<Item = &Registered> {
        let rest = (Bound::Excluded(backend), Bound::Unbounded);
        self.entries.range(rest).map(|(_, entry)| entry)
    }

    pub fn get(&self, backend: BackendId) -> Option<&Registered> {
        self.entries.get(&backend)
    }

    /// The backends of one source.
    pub fn of_source(&self, source: Source) -> impl Iterator<Item = &Registered> {
        let ids = self.by_source.get(&source).into_iter().flatten();
        ids.filter_map(|id| self.entries.get(id))
    }

    /// The backends of one service, in the order of registration.
    pub fn of_service(&self, service: ServiceId) -> impl Iterator<Item = &Registered> {
        let ids = self.rosters.get(&service).into_iter().flat_map(|roster| &roster.members);
        ids.filter_map(|id| self.entries.get(id))
    }

    /// Those that are set aside.
    pub fn aside(&self) -> impl Iterator<Item = BackendId> {
        self.aside.iter().copied()
    }

    /// The service of this name.
    pub fn named(&self, name: &str) -> Option<&Service> {
        self.by_name.get(name).map(|id| self.service(*id))
    }

    /// The names before and after this one in the alphabet, up to `each` on either side.
    pub fn names_near(&self, name: &str, each: usize) -> impl Iterator<Item = &str> {
        let before = self.by_name.range::<str, _>((Bound::Unbounded, Bound::Excluded(name)));
        let after = self.by_name.range::<str, _>((Bound::Excluded(name), Bound::Unbounded));
        before.rev().take(each).chain(after.take(each)).map(|(name, _)| &**name)
    }

    /// A service that has, or had, backends or sessions.
    pub fn service(&self, id: ServiceId) -> &Service {
        &self.rosters.get(&id).expect("a service outlives its backends and sessions").service
    }

    pub fn find_service(&self, id: ServiceId) -> Option<&Service> {
        self.rosters.get(&id).map(|roster| &roster.service)
    }

    /// Whether this service is here to stay.
    pub fn is_known(&self, id: ServiceId) -> bool {
        self.rosters.get(&id).is_some_and(|roster| !roster.is_leaving)
    }

    pub fn has_service(&self, id: ServiceId) -> bool {
        self.rosters.contains_key(&id)
    }

    /// Adds a service without backends, under a number that no other has.
    pub fn add(&mut self, service: Service) {
        self.by_name.insert(Arc::clone(&service.name), service.id);
        let before = self.rosters.insert(service.id, Roster::new(service));
        debug_assert!(before.is_none(), "numbers of services are not given twice");
    }

    /// A service is to leave: it is not found by its name any more, nobody joins it, and its terms stay as
    /// they are.
    pub fn retire(&mut self, id: ServiceId) {
        let roster = self.roster(id);
        roster.is_leaving = true;
        let name = Arc::clone(&roster.service.name);
        self.by_name.remove(&name);
    }

    /// Removes a service without backends and sessions. Returns its name.
    pub fn forget(&mut self, id: ServiceId) -> Arc<str> {
        let roster = self.rosters.remove(&id).expect("a service leaves once");
        debug_assert!(roster.members.is_empty(), "its backends leave first");
        roster.service.name
    }

    /// Gives each service that stays its terms. Returns whether workers would see a difference, like
    /// [`Applied::changed`].
    pub fn agree(&mut self, terms_of: impl Fn(&Service) -> Terms) -> bool {
        let mut changed = false;
        for roster in self.rosters.values_mut().filter(|roster| !roster.is_leaving) {
            let terms = terms_of(&roster.service);
            let before = std::mem::replace(&mut roster.service.terms, terms);
            let terms = &roster.service.terms;
            changed |= before != *terms;
            // Who is served when nobody passes is part of the pool, and so is the table of a policy.
            roster.is_stale |=
                before.checks != terms.checks || before.has_table() != terms.has_table();
            if terms.checks.is_none() {
                for id in &roster.members {
                    // A backend that is checked no more cannot fail its check.
                    let entry = self.entries.get_mut(id).expect("members are registered");
                    entry.against.failing &= entry.check.is_some();
                    stand(entry, &mut self.aside);
                }
            }
        }
        changed
    }

    /// Tells each service which networks its users may come from. Returns whether workers would see a
    /// difference.
    pub fn let_in<'u>(&mut self, users_of: impl Fn(&Service) -> &'u [IpNet]) -> bool {
        let mut changed = false;
        for roster in self.rosters.values_mut().filter(|roster| !roster.is_leaving) {
            let users = users_of(&roster.service);
            if *roster.service.users != *users {
                roster.service.users = users.into();
                changed = true;
            }
        }
        changed
    }

    /// Gives a service these groups and shares. A group that it had before goes on with its turns. Returns
    /// whether workers would see a difference, like [`Applied::changed`].
    pub fn group(&mut self, service: ServiceId, wanted: &[(&str, u8)]) -> bool {
        let roster = self.roster(service);
        let changed = !groups::are(&roster.service.groups, wanted);
        if changed {
            roster.service.groups = groups::regrouped(&roster.service.groups, wanted);
            roster.is_stale = true;
        }
        changed
    }

    /// The services that are not about to leave, in the order of their ids.
    pub fn known(&self) -> impl Iterator<Item = &Service> {
        self.rosters.values().filter(|roster| !roster.is_leaving).map(|roster| &roster.service)
    }

    /// Every service, in the order of their ids.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.rosters.values().map(|roster| &roster.service)
    }

    fn name_of(&self, service: ServiceId) -> Arc<str> {
        Arc::clone(&self.service(service).name)
    }

    fn roster(&mut self, service: ServiceId) -> &mut Roster {
        self.rosters.get_mut(&service).expect("a service outlives its backends")
    }

    /// Who is registered for a service at an address.
    pub fn find(&self, service: ServiceId, address: SocketAddr) -> Option<&Registered> {
        self.entries.get(self.by_address.get(&(service, address))?)
    }

    fn owned(
        &self,
        source: Source,
        service: ServiceId,
        address: SocketAddr,
    ) -> Result<BackendId, Fault> {
        let entry = self.find(service, address).filter(|entry| entry.source == source);
        entry.map(|entry| entry.backend.id).ok_or_else(|| {
            let service = self.name_of(service);
            Fault::NotRegistered { service, address, by: source }
        })
    }

    fn register(&mut self, wanted: Registration, now: Now) -> Result<Applied, Fault> {
        self.check(&wanted)?;
        let known = self.find(wanted.service, wanted.address).map(|entry| entry.backend.id);
        match known {
            Some(id) => {
                self.hand_over(id, wanted.source);
                Ok(self.register_again(id, wanted))
            }
            None => Ok(self.register_new(wanted, now)),
        }
    }

    fn register_again(&mut self, id: BackendId, wanted: Registration) -> Applied {
        let entry = self.entries.get_mut(&id).expect("it has just been found");
        let before = entry.backend.clone();
        let checks = self.rosters.get(&before.service).and_then(|it| it.service.terms.checks);
        entry.backend.weight = wanted.weight;
        entry.backend.name = wanted.name;
        entry.backend.group = wanted.group;
        entry.backend.proxy = wanted.proxy;
        entry.probe = wanted.probe;
        // The file is the operator's own word, so reading it again ends what an operator asked for before.
        let drained_by_operator =
            entry.against.drained_by_operator && wanted.source != Source::File;
        // Nor does it end, by coming here, what an operator asked another balancer for.
        let drained_elsewhere =
            entry.against.drained_elsewhere.filter(|by| *by == DrainedBy::Operator);
        let is_checked = checks.is_some() || wanted.check.is_some();
        entry.check = wanted.check;
        let failing = entry.against.failing && is_checked;
        let against = Against { drained_by_operator, drained_elsewhere, ..Against::default() };
        entry.against = Against { failing, ..against };
        stand(entry, &mut self.aside);
        let changed = entry.backend != before;
        self.changed(id, changed)
    }

    fn register_new(&mut self, wanted: Registration, now: Now) -> Applied {
        let id = BackendId(self.next);
        self.next += 1;
        // Where backends are checked, one serves only after it has passed.
        let by_service = self.service(wanted.service).terms.checks.is_some();
        let failing = by_service || wanted.check.is_some();
        let against = Against { failing, ..Against::default() };
        let backend = Backend {
            id,
            slot: self.free.pop_front().expect("a full registry was refused before"),
            service: wanted.service,
            address: wanted.address,
            weight: wanted.weight,
            name: wanted.name,
            group: wanted.group,
            proxy: wanted.proxy,
            http2: wanted.http2,
            tls: wanted.tls,
            standing: against.standing(),
        };
        let roster = self.roster(backend.service);
        roster.members.insert(id);
        roster.is_stale = true;
        self.by_address.insert((backend.service, backend.address), id);
        self.by_source.entry(wanted.source).or_default().insert(id);
        let Registration { source, probe, check, .. } = wanted;
        let is_claimed = source == Source::Cluster;
        let registered =
            Registered { backend, source, since: now, probe, check, is_claimed, against };
        self.entries.insert(id, registered);
        Applied { backend: Some(id), joined: true, changed: true, ..Applied::default() }
    }

    fn remove(&mut self, ids: &[BackendId]) -> Applied {
        let left: Vec<Registered> = ids.iter().filter_map(|id| self.entries.remove(id)).collect();
        for Registered { backend, source, .. } in &left {
            self.departed.insert(backend.id, backend.slot);
            self.aside.remove(&backend.id);
            let roster = self.roster(backend.service);
            roster.members.remove(&backend.id);
            roster.is_stale = true;
            self.by_address.remove(&(backend.service, backend.address));
            if let Some(others) = self.by_source.get_mut(source) {
                others.remove(&backend.id);
                if others.is_empty() {
                    self.by_source.remove(source);
                }
            }
        }
        let backend = left.first().map(|entry| entry.backend.id);
        Applied { backend, changed: !left.is_empty(), left, ..Applied::default() }
    }

    fn weigh(&mut self, id: BackendId, weight: u16) -> Result<Applied, Fault> {
        if !(1..=WEIGHT_MAX).contains(&weight) {
            return Err(Fault::WeightOutOfRange);
        }
        let entry = self.entries.get_mut(&id).ok_or(Fault::Unknown { backend: id })?;
        let same = std::mem::replace(&mut entry.backend.weight, weight) == weight;
        Ok(self.changed(id, !same))
    }

    /// Takes back a drain, if it was asked for by this party; one that the other party has asked for goes on. A
    /// backend that does not drain stays as it is.
    fn undrain(&mut self, id: BackendId, by: DrainedBy) -> Result<Applied, Fault> {
        let entry = self.entries.get(&id).ok_or(Fault::Unknown { backend: id })?;
        match entry.against.drained_by() {
            Some(_) if !self.is_known(entry.backend.service) => Err(Fault::Removed),
            Some(other) if other != by => Err(Fault::Drains { backend: id, by: other }),
            _ => Ok(self.amend(id, |against| match by {
                DrainedBy::Owner => against.drained_by_owner = false,
                DrainedBy::Operator => against.drained_by_operator = false,
            })),
        }
    }

    /// Changes what speaks against a backend, and its standing with that.
    fn amend(&mut self, id: BackendId, change: impl FnOnce(&mut Against)) -> Applied {
        let Some(entry) = self.entries.get_mut(&id) else { return Applied::default() };
        change(&mut entry.against);
        let changed = stand(entry, &mut self.aside);
        self.changed(id, changed)
    }

    /// The outcome of a change to a backend that stays registered.
    fn changed(&mut self, id: BackendId, changed: bool) -> Applied {
        if changed {
            let service = self.entries[&id].backend.service;
            self.roster(service).is_stale = true;
        }
        Applied { backend: Some(id), changed, ..Applied::default() }
    }

    /// A snapshot of the present state, for workers. Only the pools that have changed are built anew.
    /// That takes time in proportion to their backends, so callers gather changes and ask once.
    pub fn freeze(&mut self, report_sessions: bool) -> Snapshot {
        self.version += 1;
        for roster in self.rosters.values_mut().filter(|roster| roster.is_stale) {
            let members = roster.members.iter().map(|id| self.entries[id].backend.clone());
            let pool = Pool::frozen(members.collect(), &roster.service, self.key);
            roster.service.pool = Arc::new(pool);
            roster.is_stale = false;
        }
        let services = self.rosters.values().map(|roster| roster.service.clone()).collect();
        let doors = Arc::clone(&self.doors);
        let tls = Arc::clone(&self.tls);
        let (version, key) = (self.version, self.key);
        Snapshot { version, report_sessions, services, doors, tls, key }
    }
}

/// Gives a backend the standing that follows from what speaks against it. Returns whether it is another one.
fn stand(entry: &mut Registered, aside: &mut BTreeSet<BackendId>) -> bool {
    let (id, standing) = (entry.backend.id, entry.against.standing());
    match standing {
        Standing::Aside => aside.insert(id),
        _ => aside.remove(&id),
    };
    std::mem::replace(&mut entry.backend.standing, standing) != standing
}

#[cfg(test)]
mod tests;
