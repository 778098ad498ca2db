//! The sharded session table. Each worker writes its own shard and anyone reads it; readers take no
//! lock and so never stall a worker. A record is a sequence lock over atomics (H. Boehm, "Can
//! seqlocks get along with programming language memory models?", MSPC 2012): the writer makes the
//! sequence odd while it changes which session a record describes, and a reader that saw it change
//! tries again. Byte counts are updated without it: each is a single number that can at worst be
//! slightly out of date.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use super::SessionId;
use crate::base::time::Now;
use crate::cluster::{BackendId, ServiceId};

/// Records are allocated this many at a time, so that an idle balancer holds no table.
const CHUNK: usize = 1024;
/// How often a reader retries a record that keeps changing before it skips it.
const LOOKS_MAX: usize = 16;
/// Means "no backend yet".
const NO_BACKEND: u32 = u32::MAX;

const _: () = assert!(size_of::<Record>() == 128);

/// One session's record, read at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionView {
    pub id: SessionId,
    pub service: ServiceId,
    pub client: SocketAddr,
    /// Whether its user speaks TLS with us.
    pub is_tls: bool,
    /// `None` until the first connection to a backend has been chosen.
    pub backend: Option<BackendId>,
    pub started: Now,
    /// When the last bytes moved.
    pub active: Now,
    pub bytes_up: u64,
    pub bytes_down: u64,
}

/// Alone on its pair of cache lines. The byte counts and `active`, which share one, change with every message,
/// the rest only when a session starts, ends or changes backends.
#[derive(Default)]
#[repr(align(128))]
struct Record {
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
    active: AtomicU64,
    sequence: AtomicU32,
    generation: AtomicU32,
    backend: AtomicU32,
    /// One more than the number of the session's service; zero while the record is not in use.
    service: AtomicU16,
    port: AtomicU16,
    address_high: AtomicU64,
    address_low: AtomicU64,
    started: AtomicU64,
    is_tls: AtomicBool,
}

/// One worker's part of the table, as readers see it.
pub struct Shard {
    worker: u8,
    /// The generation of places that were never used.
    generation: AtomicU32,
    chunks: Box<[OnceLock<Box<[Record]>>]>,
}

/// The writing end of a shard; each shard has one.
pub struct ShardWriter {
    shard: Arc<Shard>,
    free: Vec<u32>,
    used: u32,
    capacity: u32,
    live: u32,
    /// It succeeds another shard, and newcomers get none of its places yet.
    succeeds: bool,
}

/// How far the places of a shard were used.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Extent {
    /// Places that were ever used.
    pub places: u32,
    /// The highest generation of any of them.
    pub generation: u32,
}

/// A record in use by a worker. Returned to [`ShardWriter::close`].
#[derive(PartialEq, Eq, Debug)]
pub struct Place(u32);

impl Place {
    /// The same place, for a part of its session; only the session itself closes it.
    pub fn shared(&self) -> Place {
        Place(self.0)
    }
}

impl Shard {
    /// A shard of up to `capacity` sessions and its only writer.
    pub fn new(worker: u8, capacity: usize) -> (ShardWriter, Arc<Shard>) {
        let chunks = (0..capacity.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        let shard = Arc::new(Shard { worker, generation: AtomicU32::new(0), chunks });
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
        let writer = ShardWriter {
            shard: Arc::clone(&shard),
            free: Vec::new(),
            used: 0,
            capacity,
            live: 0,
            succeeds: false,
        };
        (writer, shard)
    }

    pub fn worker(&self) -> u8 {
        self.worker
    }

    /// The number of places ever used; [`Shard::read`] finds nothing beyond them.
    pub fn places(&self) -> u32 {
        let chunks = self.chunks.iter().take_while(|chunk| chunk.get().is_some()).count();
        u32::try_from(chunks * CHUNK).unwrap_or(u32::MAX)
    }

    /// The live session at `place`, if there is one.
    pub fn read(&self, place: u32) -> Option<SessionView> {
        let record = self.chunks.get(place as usize / CHUNK)?.get()?.get(place as usize % CHUNK)?;
        (0..LOOKS_MAX).find_map(|_| record.look(self.worker, place)).flatten()
    }

    /// Every live session, each as it was when the iterator reached it.
    pub fn iter(&self) -> impl Iterator<Item = SessionView> + '_ {
        (0..self.places()).filter_map(|place| self.read(place))
    }

    fn record(&self, place: u32) -> &Record {
        let chunk = self.chunks[place as usize / CHUNK].get_or_init(|| {
            let unused = || Record::unused(self.generation.load(Ordering::Relaxed));
            (0..CHUNK).map(|_| unused()).collect()
        });
        &chunk[place as usize % CHUNK]
    }
}

impl Record {
    fn unused(generation: u32) -> Record {
        Record { generation: AtomicU32::new(generation), ..Record::default() }
    }

    fn is_in_use(&self) -> bool {
        self.service.load(Ordering::Relaxed) != 0
    }

    /// `None`: the record changed during the read, try again. `Some(None)`: no session.
    fn look(&self, worker: u8, place: u32) -> Option<Option<SessionView>> {
        let before = self.sequence.load(Ordering::Acquire);
        if before % 2 == 1 {
            return None;
        }
        let service = self.service.load(Ordering::Relaxed);
        let backend = self.backend.load(Ordering::Relaxed);
        let view = SessionView {
            id: SessionId { worker, place, generation: self.generation.load(Ordering::Relaxed) },
            service: ServiceId(service.wrapping_sub(1)),
            client: address_from(
                self.address_high.load(Ordering::Relaxed),
                self.address_low.load(Ordering::Relaxed),
                self.port.load(Ordering::Relaxed),
            ),
            is_tls: self.is_tls.load(Ordering::Relaxed),
            backend: (backend != NO_BACKEND).then_some(BackendId(backend)),
            started: Now::from_nanos(self.started.load(Ordering::Relaxed)),
            active: Now::from_nanos(self.active.load(Ordering::Relaxed)),
            bytes_up: self.bytes_up.load(Ordering::Relaxed),
            bytes_down: self.bytes_down.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        if self.sequence.load(Ordering::Relaxed) != before {
            return None;
        }
        Some((service != 0).then_some(view))
    }

    fn change(&self, change: impl FnOnce(&Record)) {
        let before = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change(self);
        self.sequence.store(before.wrapping_add(2), Ordering::Release);
    }
}

impl ShardWriter {
    /// The number of the worker that writes here.
    pub fn worker(&self) -> u8 {
        self.shard.worker
    }

    /// Adds a session; `None` when the shard is full.
    pub fn open(&mut self, service: ServiceId, client: SocketAddr, now: Now) -> Option<Place> {
        let place = self.free.pop().or_else(|| {
            (self.used < self.capacity).then(|| {
                self.used += 1;
                self.used - 1
            })
        })?;
        Some(self.enter(place, service, client, now))
    }

    fn enter(&mut self, place: u32, service: ServiceId, client: SocketAddr, now: Now) -> Place {
        self.live += 1;
        let (high, low) = address_to(client.ip());
        self.shard.record(place).change(|record| {
            record.generation.store(
                record.generation.load(Ordering::Relaxed).wrapping_add(1),
                Ordering::Relaxed,
            );
            record.service.store(service.0 + 1, Ordering::Relaxed);
            record.port.store(client.port(), Ordering::Relaxed);
            record.is_tls.store(false, Ordering::Relaxed);
            record.backend.store(NO_BACKEND, Ordering::Relaxed);
            record.address_high.store(high, Ordering::Relaxed);
            record.address_low.store(low, Ordering::Relaxed);
            record.started.store(now.nanos(), Ordering::Relaxed);
            record.active.store(now.nanos(), Ordering::Relaxed);
            record.bytes_up.store(0, Ordering::Relaxed);
            record.bytes_down.store(0, Ordering::Relaxed);
        });
        Place(place)
    }

    /// How far the places were used, for [`ShardWriter::succeed`] of another shard.
    pub fn extent(&self) -> Extent {
        let generation = |place| self.shard.record(place).generation.load(Ordering::Relaxed);
        Extent { places: self.used, generation: (0..self.used).map(generation).max().unwrap_or(0) }
    }

    /// This shard begins where another one has stopped, so that no name is given twice. Comes before its first
    /// session; until [`ShardWriter::settle`] no newcomer gets a place that was used there.
    pub fn succeed(&mut self, extent: Extent) {
        assert_eq!(self.used, 0, "a shard succeeds another before it has sessions");
        self.used = extent.places.min(self.capacity);
        self.succeeds = true;
        self.shard.generation.store(extent.generation, Ordering::Relaxed);
    }

    /// Adds a session of the shard that this one succeeds, in its old place; `None` if that cannot be its
    /// place.
    pub fn open_at(
        &mut self,
        (place, generation): (u32, u32),
        service: ServiceId,
        client: SocketAddr,
        started: Now,
    ) -> Option<Place> {
        if place >= self.used || self.is_taken(place) {
            return None;
        }
        let before = generation.wrapping_sub(1);
        self.shard.record(place).generation.store(before, Ordering::Relaxed);
        Some(self.enter(place, service, client, started))
    }

    /// Whether a session is at this place.
    pub fn is_taken(&self, place: u32) -> bool {
        place < self.used && self.shard.record(place).is_in_use()
    }

    /// When bytes of a session last moved.
    pub fn active(&self, place: &Place) -> Now {
        Now::from_nanos(self.shard.record(place.0).active.load(Ordering::Relaxed))
    }

    /// The backend that a session is on, or was on last.
    pub fn backend(&self, place: &Place) -> Option<BackendId> {
        let backend = self.shard.record(place.0).backend.load(Ordering::Relaxed);
        (backend != NO_BACKEND).then_some(BackendId(backend))
    }

    /// All sessions of the other shard are in their places: newcomers get the others.
    pub fn settle(&mut self) {
        if std::mem::take(&mut self.succeeds) {
            let is_free = |place: &u32| !self.shard.record(*place).is_in_use();
            self.free = (0..self.used).rev().filter(is_free).collect();
        }
    }

    /// Records that the session is another service's from now on.
    pub fn set_service(&mut self, place: &Place, service: ServiceId) {
        self.shard
            .record(place.0)
            .change(|record| record.service.store(service.0 + 1, Ordering::Relaxed));
    }

    /// Records that the session's user speaks TLS with us.
    pub fn set_tls(&mut self, place: &Place) {
        self.shard.record(place.0).change(|record| record.is_tls.store(true, Ordering::Relaxed));
    }

    /// Records which backend the session is on.
    pub fn set_backend(&mut self, place: &Place, backend: BackendId) {
        self.shard
            .record(place.0)
            .change(|record| record.backend.store(backend.0, Ordering::Relaxed));
    }

    /// Records how many bytes have moved in total. Three plain stores on one cache line.
    pub fn moved(&mut self, place: &Place, bytes_up: u64, bytes_down: u64, now: Now) {
        let record = self.shard.record(place.0);
        record.bytes_up.store(bytes_up, Ordering::Relaxed);
        record.bytes_down.store(bytes_down, Ordering::Relaxed);
        record.active.store(now.nanos(), Ordering::Relaxed);
    }

    /// The session's ID.
    pub fn id(&self, place: &Place) -> SessionId {
        let generation = self.shard.record(place.0).generation.load(Ordering::Relaxed);
        SessionId { worker: self.shard.worker, place: place.0, generation }
    }

    /// An ID of this worker that no session has.
    pub fn no_session(&self) -> SessionId {
        SessionId { worker: self.shard.worker, place: u32::MAX, generation: 0 }
    }

    /// Removes a session.
    pub fn close(&mut self, place: Place) {
        self.shard.record(place.0).change(|record| record.service.store(0, Ordering::Relaxed));
        self.live -= 1;
        self.free.push(place.0);
    }

    /// Sessions in the shard.
    pub fn live(&self) -> u32 {
        self.live
    }
}

fn address_to(address: IpAddr) -> (u64, u64) {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    ((bits >> 64) as u64, bits as u64)
}

fn address_from(high: u64, low: u64, port: u16) -> SocketAddr {
    let v6 = Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low));
    SocketAddr::new(v6.to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "192.0.2.7:4711";
    const SERVICE: ServiceId = ServiceId(40_000);

    #[test]
    fn a_session_is_seen_from_its_start_to_its_end() {
        let (mut writer, shard) = Shard::new(2, 10);
        let place = writer.open(SERVICE, CLIENT.parse().unwrap(), Now::from_nanos(5)).unwrap();
        writer.set_backend(&place, BackendId(9));
        writer.set_tls(&place);
        writer.moved(&place, 100, 7, Now::from_nanos(8));
        let seen: Vec<_> = shard.iter().collect();
        assert_eq!(
            seen,
            [SessionView {
                id: writer.id(&place),
                service: SERVICE,
                client: CLIENT.parse().unwrap(),
                is_tls: true,
                backend: Some(BackendId(9)),
                started: Now::from_nanos(5),
                active: Now::from_nanos(8),
                bytes_up: 100,
                bytes_down: 7,
            }]
        );
        writer.close(place);
        assert_eq!(shard.iter().count(), 0);
        assert_eq!(writer.live(), 0);
    }

    #[test]
    fn a_place_used_again_is_another_session() {
        let (mut writer, shard) = Shard::new(0, 1);
        let client = "[2001:db8::1]:1".parse().unwrap();
        let first = writer.open(SERVICE, client, Now::default()).unwrap();
        let first_id = writer.id(&first);
        writer.set_tls(&first);
        assert!(writer.open(SERVICE, client, Now::default()).is_none(), "the shard is full");
        writer.close(first);
        let second = writer.open(SERVICE, client, Now::default()).unwrap();
        assert_ne!(writer.id(&second), first_id);
        assert!(shard.iter().all(|session| !session.is_tls), "the one before it was");
    }

    #[test]
    fn a_shard_that_succeeds_another_keeps_its_names_and_gives_none_twice() {
        let (mut old, _) = Shard::new(0, 4000);
        let client = "192.0.2.1:1000".parse().unwrap();
        let open = |writer: &mut ShardWriter| writer.open(SERVICE, client, Now::default()).unwrap();
        let mut all: Vec<Place> = (0..5).map(|_| open(&mut old)).collect();
        for _ in 0..3 {
            let last = all.pop().unwrap();
            old.close(last);
            all.push(open(&mut old));
        }
        let (left, kept) = (all.remove(1), all);
        let left_id = old.id(&left);
        old.close(left);
        let extent = old.extent();
        assert_eq!(extent, Extent { places: 5, generation: 4 });
        let (mut new, shard) = Shard::new(0, 4000);
        new.succeed(extent);
        let started = Now::from_nanos(77);
        for place in &kept {
            let id = old.id(place);
            let there = (id.place, id.generation);
            let place = new.open_at(there, SERVICE, client, started).unwrap();
            assert_eq!(new.id(&place), id);
            assert_eq!(new.open_at(there, SERVICE, client, started), None, "it is taken");
        }
        assert_eq!(new.open_at((5, 1), SERVICE, client, started), None, "it was never used");
        let early = open(&mut new);
        assert_eq!((new.id(&early).place, new.id(&early).generation), (5, 5));
        new.settle();
        let name = |_| {
            let place = open(&mut new);
            new.id(&place)
        };
        let names: Vec<SessionId> = (0..3000).map(name).collect();
        assert!(names.iter().all(|id| id.generation == 5 && *id != left_id), "{:?}", &names[..9]);
        assert_eq!(shard.iter().filter(|view| view.started == started).count(), 4);
        assert_eq!(names[0].place, 1, "what is free comes first");
    }

    #[test]
    fn a_smaller_shard_takes_what_fits() {
        let (mut new, _) = Shard::new(0, 2);
        new.succeed(Extent { places: 9, generation: 1 });
        let client = "192.0.2.1:1000".parse().unwrap();
        assert_eq!(new.open_at((2, 1), SERVICE, client, Now::default()), None);
        assert!(new.open_at((1, 1), SERVICE, client, Now::default()).is_some());
        assert!(new.open(SERVICE, client, Now::default()).is_none());
        new.settle();
        assert!(new.open(SERVICE, client, Now::default()).is_some());
    }

    #[test]
    fn a_reader_never_sees_halves_of_two_sessions() {
        let (mut writer, shard) = Shard::new(0, 1);
        let reader = std::thread::spawn(move || {
            let mut seen = 0;
            while seen < 20_000 {
                let Some(view) = shard.read(0) else { continue };
                let low = view.started.nanos();
                assert_eq!(u64::from(view.client.port()), low & 0xffff);
                if let IpAddr::V4(ip) = view.client.ip() {
                    assert_eq!(u64::from(ip.to_bits()), low);
                }
                seen += 1;
            }
        });
        let mut turn = 0u32;
        while !reader.is_finished() {
            turn = turn.wrapping_add(0x0101_0101);
            let client = SocketAddr::new(IpAddr::V4(turn.into()), (turn & 0xffff) as u16);
            let place = writer.open(SERVICE, client, Now::from_nanos(u64::from(turn))).unwrap();
            std::thread::yield_now();
            writer.close(place);
        }
        reader.join().unwrap();
    }
}
