//! Who is registered: the one mutable truth about backends, pure. Owns ownership (which source a
//! backend belongs to), the places that workers count in, standing and the rotations.
//! It opens no socket, reads no clock and knows no message; callers bring changes, hear whether
//! workers would see a difference, and ask for a frozen [`Snapshot`] once for as many as they like.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use super::source::Source;
use super::{Backend, BackendId, Protocol, Snapshot, Standing, WEIGHT_MAX};
use crate::base::time::Now;

/// What a backend asks for when it joins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    pub source: Source,
    pub protocol: Protocol,
    /// Canonical: an IPv4 address is never written as a mapped IPv6 one.
    pub address: SocketAddr,
    /// 1 to [`WEIGHT_MAX`].
    pub weight: u16,
    pub name: Option<Arc<str>>,
}

/// Something that happened to the set of backends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Joins; from the same source again it changes weight and name, ends a drain, and brings back a
    /// backend that was set aside, because the caller has just connected to it.
    Register(Registration),
    /// Leaves at its source's wish.
    Unregister { source: Source, protocol: Protocol, address: SocketAddr },
    /// Stays, without new sessions, at its source's wish, and leaves when its sessions have ended or
    /// been ended; `None` gives them as long as the settings say.
    Drain { source: Source, protocol: Protocol, address: SocketAddr, lasts: Option<Duration> },
    /// Leaves because its drain is over.
    Leave { backend: BackendId },
    /// The source is lost, and all of its backends with it.
    SourceLost { source: Source, why: &'static str },
    /// Its data port refused.
    SetAside { backend: BackendId },
    /// Its data port can be connected to again.
    Restore { backend: BackendId },
    /// As [`Change::Drain`], at the operator's wish, whichever source the backend belongs to.
    DrainBackend { backend: BackendId, lasts: Option<Duration> },
    /// Gets another share of the new sessions, at the operator's wish.
    Weigh { backend: BackendId, weight: u16 },
}

/// What a change came to.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// The backend that was registered, found or changed.
    pub backend: Option<BackendId>,
    /// Whether that backend has joined just now.
    pub joined: bool,
    /// Backends that are registered no longer. Their places stay taken until
    /// [`Registry::sessions_ended`].
    pub left: Vec<Entry>,
    /// Whether workers would see a difference, and so whether a [`Registry::freeze`] is due.
    pub changed: bool,
}

/// Why a change was refused. The sentence is for whoever asked for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    OwnedByAnother {
        protocol: Protocol,
        address: SocketAddr,
        by: Source,
    },
    NotRegistered {
        protocol: Protocol,
        address: SocketAddr,
        by: Source,
    },
    /// Asked for by its id.
    Unknown {
        backend: BackendId,
    },
    WeightOutOfRange,
    Full {
        places: usize,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::OwnedByAnother { protocol, address, by } => {
                write!(out, "{protocol} {address} is registered {}", by.other_way())
            }
            Fault::NotRegistered { protocol, address, by } => {
                write!(out, "{protocol} {address} is not registered {}", by.own_way())
            }
            Fault::Unknown { backend } => write!(out, "no backend {backend} is registered"),
            Fault::WeightOutOfRange => write!(out, "weight must be from 1 to {WEIGHT_MAX}"),
            Fault::Full { places } => {
                write!(out, "all {places} places for backends are taken, try again later")
            }
        }
    }
}

/// A registered backend with what workers need not know.
#[derive(Clone, Debug)]
pub struct Entry {
    pub backend: Backend,
    pub source: Source,
    pub since: Now,
}

/// The set of backends.
pub struct Registry {
    /// In the order of registration, which is the order of their ids.
    entries: BTreeMap<BackendId, Entry>,
    /// The same by what is registered once only.
    by_address: BTreeMap<(Protocol, SocketAddr), BackendId>,
    /// The same by source.
    by_source: BTreeMap<Source, BTreeSet<BackendId>>,
    /// Left, but with a place that may still be counted in.
    departed: BTreeMap<BackendId, u16>,
    /// Places to give out, the one that has been free for longest first.
    free: VecDeque<u16>,
    places: usize,
    next: u32,
    version: u64,
}

impl Registry {
    /// An empty registry of at most `places` backends, those included that left with sessions
    /// running. At most 65,535.
    pub fn new(places: usize) -> Registry {
        let last = u16::try_from(places).expect("places are numbered with 16 bits");
        Registry {
            entries: BTreeMap::new(),
            by_address: BTreeMap::new(),
            by_source: BTreeMap::new(),
            departed: BTreeMap::new(),
            free: (0..last).collect(),
            places,
            next: 1,
            version: 0,
        }
    }

    /// Applies one change. Nothing has changed when it is refused.
    pub fn apply(&mut self, change: Change, now: Now) -> Result<Applied, Fault> {
        match change {
            Change::Register(registration) => self.register(registration, now),
            Change::Unregister { source, protocol, address } => {
                let id = self.owned(source, protocol, address)?;
                Ok(self.remove(&[id]))
            }
            Change::Drain { source, protocol, address, lasts: _ } => {
                let id = self.owned(source, protocol, address)?;
                Ok(self.set_standing(id, Standing::Draining))
            }
            Change::Leave { backend } => Ok(self.remove(&[backend])),
            Change::SourceLost { source, why: _ } => {
                let ids: Vec<_> = self.of_source(source).map(|entry| entry.backend.id).collect();
                Ok(self.remove(&ids))
            }
            Change::SetAside { backend } => {
                Ok(self.change_standing(backend, Standing::Serving, Standing::Aside))
            }
            Change::Restore { backend } => {
                Ok(self.change_standing(backend, Standing::Aside, Standing::Serving))
            }
            Change::DrainBackend { backend, lasts: _ } => match self.get(backend) {
                Some(_) => Ok(self.set_standing(backend, Standing::Draining)),
                None => Err(Fault::Unknown { backend }),
            },
            Change::Weigh { backend, weight } => self.weigh(backend, weight),
        }
    }

    /// Whether a registration would be accepted as things stand.
    pub fn check(&self, wanted: &Registration) -> Result<(), Fault> {
        if wanted.weight == 0 || wanted.weight > WEIGHT_MAX {
            return Err(Fault::WeightOutOfRange);
        }
        let (protocol, address) = (wanted.protocol, wanted.address);
        match self.find(protocol, address) {
            Some(entry) if entry.source != wanted.source => {
                Err(Fault::OwnedByAnother { protocol, address, by: entry.source })
            }
            None if self.free.is_empty() || self.next == u32::MAX => {
                Err(Fault::Full { places: self.places })
            }
            _ => Ok(()),
        }
    }

    /// The last session of a backend that had left is over: its place may be given out again.
    pub fn sessions_ended(&mut self, backend: BackendId) {
        if let Some(slot) = self.departed.remove(&backend) {
            self.free.push_back(slot);
        }
    }

    /// Backends that are registered.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every registered backend, in the order of registration.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// Those that were registered after `backend`, in that order.
    pub fn entries_after(&self, backend: BackendId) -> impl Iterator<Item = &Entry> {
        let rest = (Bound::Excluded(backend), Bound::Unbounded);
        self.entries.range(rest).map(|(_, entry)| entry)
    }

    pub fn get(&self, backend: BackendId) -> Option<&Entry> {
        self.entries.get(&backend)
    }

    /// The backends of one source.
    pub fn of_source(&self, source: Source) -> impl Iterator<Item = &Entry> {
        let ids = self.by_source.get(&source).into_iter().flatten();
        ids.filter_map(|id| self.entries.get(id))
    }

    fn find(&self, protocol: Protocol, address: SocketAddr) -> Option<&Entry> {
        self.entries.get(self.by_address.get(&(protocol, address))?)
    }

    fn owned(
        &self,
        source: Source,
        protocol: Protocol,
        address: SocketAddr,
    ) -> Result<BackendId, Fault> {
        self.find(protocol, address)
            .filter(|entry| entry.source == source)
            .map(|entry| entry.backend.id)
            .ok_or(Fault::NotRegistered { protocol, address, by: source })
    }

    fn register(&mut self, wanted: Registration, now: Now) -> Result<Applied, Fault> {
        self.check(&wanted)?;
        let known = self.find(wanted.protocol, wanted.address).map(|entry| entry.backend.id);
        match known {
            Some(id) => Ok(self.register_again(id, wanted)),
            None => Ok(self.register_new(wanted, now)),
        }
    }

    fn register_again(&mut self, id: BackendId, wanted: Registration) -> Applied {
        let backend = &mut self.entries.get_mut(&id).expect("it has just been found").backend;
        let same = backend.weight == wanted.weight
            && backend.name == wanted.name
            && backend.standing == Standing::Serving;
        backend.weight = wanted.weight;
        backend.name = wanted.name;
        backend.standing = Standing::Serving;
        Applied { backend: Some(id), changed: !same, ..Applied::default() }
    }

    fn register_new(&mut self, wanted: Registration, now: Now) -> Applied {
        let id = BackendId(self.next);
        self.next += 1;
        let backend = Backend {
            id,
            slot: self.free.pop_front().expect("a full registry was refused before"),
            protocol: wanted.protocol,
            address: wanted.address,
            weight: wanted.weight,
            name: wanted.name,
            standing: Standing::Serving,
        };
        self.by_address.insert((backend.protocol, backend.address), id);
        self.by_source.entry(wanted.source).or_default().insert(id);
        self.entries.insert(id, Entry { backend, source: wanted.source, since: now });
        Applied { backend: Some(id), joined: true, changed: true, ..Applied::default() }
    }

    fn remove(&mut self, ids: &[BackendId]) -> Applied {
        let left: Vec<Entry> = ids.iter().filter_map(|id| self.entries.remove(id)).collect();
        for Entry { backend, source, .. } in &left {
            self.departed.insert(backend.id, backend.slot);
            self.by_address.remove(&(backend.protocol, backend.address));
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
        Ok(Applied { backend: Some(id), changed: !same, ..Applied::default() })
    }

    fn change_standing(&mut self, id: BackendId, from: Standing, to: Standing) -> Applied {
        match self.entries.get(&id) {
            Some(entry) if entry.backend.standing == from => self.set_standing(id, to),
            _ => Applied::default(),
        }
    }

    fn set_standing(&mut self, id: BackendId, to: Standing) -> Applied {
        let Some(entry) = self.entries.get_mut(&id) else { return Applied::default() };
        let same = std::mem::replace(&mut entry.backend.standing, to) == to;
        Applied { backend: Some(id), changed: !same, ..Applied::default() }
    }

    /// A snapshot of how things stand now, for workers. Costs time in proportion to all backends, so it
    /// is made once for all the changes that there are to tell of.
    pub fn freeze(&mut self) -> Snapshot {
        self.version += 1;
        let backends = self.entries.values().map(|entry| entry.backend.clone());
        Snapshot::frozen(self.version, backends.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Now = Now::from_nanos(7);

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    fn join(source: u64, protocol: Protocol, port: u16, weight: u16) -> Change {
        Change::Register(Registration {
            source: Source::Connection(source),
            protocol,
            address: address(port),
            weight,
            name: None,
        })
    }

    fn unregister(source: u64, protocol: Protocol, port: u16) -> Change {
        Change::Unregister { source: Source::Connection(source), protocol, address: address(port) }
    }

    fn drain(source: u64, protocol: Protocol, port: u16) -> Change {
        let (source, address) = (Source::Connection(source), address(port));
        Change::Drain { source, protocol, address, lasts: None }
    }

    fn source_lost(source: u64) -> Change {
        Change::SourceLost { source: Source::Connection(source), why: "it is gone" }
    }

    fn ports(snapshot: &Snapshot, protocol: Protocol) -> Vec<u16> {
        let rotation = &snapshot.rotations[protocol.index()];
        rotation.turns().map(|place| snapshot.backends[usize::from(place)].address.port()).collect()
    }

    /// Applies a change that makes a difference, and what workers get to see of it.
    fn shown(registry: &mut Registry, change: Change) -> Snapshot {
        assert!(registry.apply(change, NOW).unwrap().changed);
        registry.freeze()
    }

    #[test]
    fn a_second_registration_on_the_same_connection_changes_nothing() {
        let mut registry = Registry::new(4);
        let first = registry.apply(join(1, Protocol::Tcp, 80, 2), NOW).unwrap();
        assert!(first.changed);
        assert_eq!(registry.freeze().version, 1);
        let again = registry.apply(join(1, Protocol::Tcp, 80, 2), NOW).unwrap();
        assert_eq!(again.backend, first.backend);
        assert!(!again.changed);
        let heavier = registry.apply(join(1, Protocol::Tcp, 80, 3), NOW).unwrap();
        assert_eq!(heavier.backend, first.backend);
        assert!(heavier.changed);
        let snapshot = registry.freeze();
        assert_eq!((snapshot.version, snapshot.backends[0].weight), (2, 3));
    }

    #[test]
    fn a_second_owner_is_refused_as_long_as_the_first_is_there() {
        let mut registry = Registry::new(4);
        registry.apply(join(1, Protocol::Tcp, 80, 1), NOW).unwrap();
        let refused = registry.apply(join(2, Protocol::Tcp, 80, 1), NOW).unwrap_err();
        let by = Source::Connection(1);
        let fault = Fault::OwnedByAnother { protocol: Protocol::Tcp, address: address(80), by };
        assert_eq!(refused, fault);
        let told = "tcp 192.0.2.1:80 is registered over another connection";
        assert_eq!(refused.to_string(), told);
        assert!(registry.apply(join(2, Protocol::Udp, 80, 1), NOW).is_ok(), "another protocol");
        let refused = registry.apply(unregister(2, Protocol::Tcp, 80), NOW).unwrap_err();
        let told = "tcp 192.0.2.1:80 is not registered over this connection";
        assert_eq!(refused.to_string(), told);
        registry.apply(source_lost(1), NOW).unwrap();
        assert!(registry.apply(join(2, Protocol::Tcp, 80, 1), NOW).is_ok());
    }

    #[test]
    fn the_loss_of_a_connection_takes_all_of_its_backends_and_no_others() {
        let mut registry = Registry::new(4);
        for (source, port) in [(1, 80), (2, 81), (1, 82)] {
            registry.apply(join(source, Protocol::Tcp, port, 1), NOW).unwrap();
        }
        let lost = registry.apply(source_lost(1), NOW).unwrap();
        assert_eq!(
            lost.left.iter().map(|it| it.backend.address.port()).collect::<Vec<_>>(),
            [80, 82]
        );
        assert_eq!(ports(&registry.freeze(), Protocol::Tcp), [81]);
        let nothing = registry.apply(source_lost(1), NOW).unwrap();
        assert!(lost.changed && !nothing.changed);
    }

    #[test]
    fn a_place_is_given_out_again_only_after_its_sessions_ended() {
        let mut registry = Registry::new(2);
        let first = registry.apply(join(1, Protocol::Tcp, 80, 1), NOW).unwrap().backend.unwrap();
        registry.apply(join(1, Protocol::Tcp, 81, 1), NOW).unwrap();
        registry.apply(unregister(1, Protocol::Tcp, 80), NOW).unwrap();
        let full = registry.apply(join(1, Protocol::Tcp, 82, 1), NOW).unwrap_err();
        assert_eq!(full, Fault::Full { places: 2 });
        registry.sessions_ended(first);
        registry.sessions_ended(first);
        let joined = registry.apply(join(1, Protocol::Tcp, 82, 1), NOW).unwrap();
        let id = joined.backend.unwrap();
        assert_ne!(id, first, "the place is the same, the backend is not");
        assert_eq!(registry.freeze().get(id).unwrap().slot, 0);
        assert!(registry.apply(join(1, Protocol::Tcp, 83, 1), NOW).is_err());
    }

    #[test]
    fn a_backend_set_aside_is_served_only_when_nobody_else_is_left() {
        let mut registry = Registry::new(4);
        let first = registry.apply(join(1, Protocol::Tcp, 80, 1), NOW).unwrap().backend.unwrap();
        let second = registry.apply(join(1, Protocol::Tcp, 81, 1), NOW).unwrap().backend.unwrap();
        let one = shown(&mut registry, Change::SetAside { backend: first });
        assert_eq!(ports(&one, Protocol::Tcp), [81]);
        let again = registry.apply(Change::SetAside { backend: first }, NOW).unwrap();
        assert!(!again.changed, "it is aside already");
        let both = shown(&mut registry, Change::SetAside { backend: second });
        assert_eq!(ports(&both, Protocol::Tcp), [80, 81]);
        let back = shown(&mut registry, Change::Restore { backend: first });
        assert_eq!(ports(&back, Protocol::Tcp), [80]);
    }

    #[test]
    fn a_draining_backend_is_never_served_and_comes_back_by_registering() {
        let mut registry = Registry::new(4);
        let id = registry.apply(join(1, Protocol::Tcp, 80, 1), NOW).unwrap().backend.unwrap();
        let drain = drain(1, Protocol::Tcp, 80);
        let draining = shown(&mut registry, drain);
        assert!(ports(&draining, Protocol::Tcp).is_empty());
        assert_eq!(draining.get(id).unwrap().standing, Standing::Draining);
        let aside = registry.apply(Change::SetAside { backend: id }, NOW).unwrap();
        assert!(!aside.changed, "a drain is not undone by a failed connection");
        assert!(!registry.apply(Change::Restore { backend: id }, NOW).unwrap().changed);
        let back = shown(&mut registry, join(1, Protocol::Tcp, 80, 1));
        assert_eq!(ports(&back, Protocol::Tcp), [80]);
    }

    #[test]
    fn an_operator_changes_a_weight_within_its_bounds_and_nothing_else() {
        let mut registry = Registry::new(4);
        let first = registry.apply(join(1, Protocol::Tcp, 80, 1), NOW).unwrap().backend.unwrap();
        registry.apply(join(1, Protocol::Tcp, 81, 1), NOW).unwrap();
        let heavier = shown(&mut registry, Change::Weigh { backend: first, weight: 2 });
        assert_eq!(ports(&heavier, Protocol::Tcp), [80, 81, 80]);
        let mut weigh = |backend, weight| registry.apply(Change::Weigh { backend, weight }, NOW);
        assert!(!weigh(first, 2).unwrap().changed, "it has that weight already");
        let backend = BackendId(99);
        assert_eq!(weigh(backend, 2).unwrap_err(), Fault::Unknown { backend });
        for weight in [0, WEIGHT_MAX + 1] {
            assert_eq!(weigh(first, weight).unwrap_err(), Fault::WeightOutOfRange);
        }
    }

    #[test]
    fn an_operator_drains_a_backend_of_any_source_by_its_id() {
        let mut registry = Registry::new(4);
        let id = registry.apply(join(1, Protocol::Tcp, 80, 1), NOW).unwrap().backend.unwrap();
        registry.apply(join(2, Protocol::Tcp, 81, 1), NOW).unwrap();
        let drain = |backend| Change::DrainBackend { backend, lasts: None };
        assert_eq!(ports(&shown(&mut registry, drain(id)), Protocol::Tcp), [81]);
        let again = registry.apply(drain(id), NOW).unwrap();
        assert_eq!((again.backend, again.changed), (Some(id), false));
        let backend = BackendId(99);
        assert_eq!(registry.apply(drain(backend), NOW).unwrap_err(), Fault::Unknown { backend });
        assert!(
            registry.apply(unregister(1, Protocol::Tcp, 80), NOW).is_ok(),
            "it is still its own"
        );
    }

    #[test]
    fn whatever_happens_the_snapshot_is_consistent() {
        for seed in 0..60 {
            let mut random = Random(seed);
            let mut registry = Registry::new(6);
            let mut last = 0;
            for _ in 0..300 {
                let change = random_change(&mut random);
                let applied = registry.apply(change.clone(), NOW);
                let Ok(applied) = applied else { continue };
                if applied.changed && random.below(3) > 0 {
                    let snapshot = registry.freeze();
                    assert_eq!(snapshot.version, last + 1, "seed {seed}: {change:?}");
                    last = snapshot.version;
                    assert_consistent(&registry, &snapshot);
                }
                for left in &applied.left {
                    if random.below(2) == 0 {
                        registry.sessions_ended(left.backend.id);
                    }
                }
                if random.below(40) == 0 {
                    let ids: Vec<_> = registry.departed.keys().copied().collect();
                    ids.into_iter().for_each(|id| registry.sessions_ended(id));
                }
            }
        }
    }

    fn random_change(random: &mut Random) -> Change {
        let number = random.below(3);
        let protocol = Protocol::ALL[random.below(3) as usize];
        let port = 80 + random.below(4) as u16;
        let backend = BackendId(random.below(60) as u32);
        match random.below(10) {
            0..=3 => join(number, protocol, port, random.below(5) as u16),
            4 => unregister(number, protocol, port),
            5 => drain(number, protocol, port),
            6 if random.below(4) == 0 => source_lost(number),
            6 => Change::Leave { backend },
            7 => Change::SetAside { backend },
            8 => Change::DrainBackend { backend, lasts: None },
            _ => Change::Restore { backend },
        }
    }

    fn assert_consistent(registry: &Registry, snapshot: &Snapshot) {
        let mut slots: Vec<u16> = snapshot.backends.iter().map(|it| it.slot).collect();
        slots.extend(registry.departed.values());
        slots.extend(&registry.free);
        slots.sort_unstable();
        assert_eq!(slots, (0..registry.places as u16).collect::<Vec<_>>(), "each place once");
        assert!(snapshot.backends.is_sorted_by(|a, b| a.id < b.id));
        let mut keys: Vec<_> =
            snapshot.backends.iter().map(|it| (it.protocol, it.address)).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), snapshot.backends.len(), "one source for each address");
        for protocol in Protocol::ALL {
            let serving = |it: &&Backend| it.standing == Standing::Serving;
            let wanted = match snapshot.of(protocol).filter(serving).count() {
                0 => Standing::Aside,
                _ => Standing::Serving,
            };
            let rotation = &snapshot.rotations[protocol.index()];
            let weights = snapshot.of(protocol).filter(|it| it.standing == wanted);
            let all: u64 = weights.map(|it| u64::from(it.weight)).sum();
            for (place, backend) in (0u16..).zip(&snapshot.backends) {
                let turns = rotation.turns().filter(|it| *it == place).count() as u64;
                let due = backend.protocol == protocol && backend.standing == wanted;
                let expected = if due { u64::from(backend.weight) * rotation.round() } else { 0 };
                assert_eq!(turns * all, expected, "{backend:?} in {rotation:?}");
            }
        }
        for entry in registry.entries() {
            let Backend { id, protocol, address, .. } = entry.backend;
            assert_eq!(registry.find(protocol, address).map(|it| it.backend.id), Some(id));
            assert!(registry.of_source(entry.source).any(|it| it.backend.id == id));
        }
        let owned: usize = registry.by_source.values().map(BTreeSet::len).sum();
        assert_eq!((registry.by_address.len(), owned), (registry.len(), registry.len()));
    }

    /// A seeded sequence (S. Vigna's splitmix64).
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) % limit
        }
    }
}
