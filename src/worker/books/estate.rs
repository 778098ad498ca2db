//! Sessions that another process leaves: how they stand in the books, as records, and how they come into the
//! books of whoever takes them up. Nothing is counted or reported as new; limits that were lowered meanwhile
//! turn nobody out.

use std::collections::BTreeMap;

use super::{Books, Choice, Entry};
use crate::cluster::{BackendId, Protocol, Service, ServiceId};
use crate::estate::entry::{Address, CARRIED_MAX, EntryRecord, PlacesRecord, moment, nanos};
use crate::estate::{Parcel, Span};
use crate::metrics::BACKENDS_MAX;
use crate::session::shards::{Extent, Place};

/// The names of services in a parcel that is being written: each stands there once.
#[derive(Default)]
pub struct Names(BTreeMap<ServiceId, Span>);

impl Names {
    fn of<S>(&mut self, service: &Service, parcel: &mut Parcel<S>) -> Span {
        let write = || parcel.add_bytes([service.name.as_bytes()].into_iter());
        *self.0.entry(service.id).or_insert_with(write)
    }
}

/// The services of one kind that a parcel names.
pub struct Named {
    kind: Protocol,
    known: BTreeMap<(u32, u32), ServiceId>,
}

impl Named {
    pub fn new(kind: Protocol) -> Named {
        Named { kind, known: BTreeMap::new() }
    }

    /// The service whose name stands there.
    ///
    /// # Errors
    /// There is no such service any more.
    pub fn find<S>(
        &mut self,
        name: Span,
        parcel: &Parcel<S>,
        books: &Books,
    ) -> Result<ServiceId, String> {
        let at = (name.offset.get(), name.len.get());
        if let Some(id) = self.known.get(&at) {
            return Ok(*id);
        }
        let name = parcel.bytes(name).ok_or("the name of a service is missing")?;
        let is_it = |it: &&Service| it.name.as_bytes() == name && it.kind == self.kind;
        let Some(service) = books.snapshot.services.iter().find(is_it) else {
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(format!("there is no {} service {name:?} any more", self.kind));
        };
        self.known.insert(at, service.id);
        Ok(service.id)
    }
}

impl Books {
    /// How far the places for sessions were used.
    pub fn describe_places(&self) -> PlacesRecord {
        let Extent { places, generation } = self.parts.shard.extent();
        PlacesRecord { places: places.into(), generation: generation.into() }
    }

    /// These books begin where those of the same number have stopped in another process. Comes before every
    /// session; [`Books::settle`] comes after those that are taken up.
    pub fn succeed(&mut self, before: PlacesRecord) {
        let PlacesRecord { places, generation } = before;
        self.parts.shard.succeed(Extent { places: places.get(), generation: generation.get() });
    }

    /// Everybody has been taken up.
    pub fn settle(&mut self) {
        self.parts.shard.settle();
    }

    /// The name of a service in a parcel; `None`: it is gone.
    pub fn name<S>(
        &self,
        service: ServiceId,
        names: &mut Names,
        parcel: &mut Parcel<S>,
    ) -> Option<Span> {
        Some(names.of(self.snapshot.service(service)?, parcel))
    }

    /// How a session stands in the books; `None`: its service is gone, or it has no backend.
    pub fn describe<S>(
        &self,
        entry: &Entry,
        names: &mut Names,
        parcel: &mut Parcel<S>,
    ) -> Option<EntryRecord> {
        let Choice { backend, slot, address, proxy, http2: _, tls: _ } = entry.choice?;
        Some(EntryRecord {
            backend: address.into(),
            backend_id: backend.0.into(),
            slot: slot.into(),
            flags: if proxy { EntryRecord::PROXY } else { 0 },
            ..self.describe_user(entry, names, parcel)?
        })
    }

    /// The same of one without a backend, as API users are between two requests.
    pub fn describe_user<S>(
        &self,
        entry: &Entry,
        names: &mut Names,
        parcel: &mut Parcel<S>,
    ) -> Option<EntryRecord> {
        let (id, last) = (self.id(entry), self.parts.shard.backend(&entry.place));
        Some(EntryRecord {
            service: self.name(entry.service, names, parcel)?,
            client: entry.client.into(),
            backend: Address::NONE,
            backend_id: last.map_or(EntryRecord::NO_BACKEND, |last| last.0.into()),
            slot: 0.into(),
            flags: 0,
            worker: id.worker,
            place: id.place.into(),
            generation: id.generation.into(),
            started: nanos(entry.started),
            active: nanos(self.parts.shard.active(&entry.place)),
            bytes_up: entry.bytes_up.into(),
            bytes_down: entry.bytes_down.into(),
        })
    }

    /// Takes a session into the books as it stood in another's, under its old name if that is this worker's.
    ///
    /// # Errors
    /// What is wrong with the record, or what is lacking here.
    pub fn take_up<S>(
        &mut self,
        record: &EntryRecord,
        services: &mut Named,
        parcel: &Parcel<S>,
    ) -> Result<Entry, String> {
        let choice = choice(record)?;
        let mut entry = self.take_up_user(record, services, parcel)?;
        let service = entry.service;
        self.enter(&mut entry, service, choice);
        Ok(entry)
    }

    /// A session that was taken up is one of this service's, and on a backend of that.
    pub fn enter(&mut self, entry: &mut Entry, service: ServiceId, choice: Choice) {
        if let Some(found) = self.snapshot.service(service) {
            found.gate.enter(None);
            entry.inside = Some(service);
        }
        self.book(entry, choice);
    }

    /// Takes one up that [`Books::describe_user`] has described; it is on no backend.
    ///
    /// # Errors
    /// As for [`Books::take_up`].
    pub fn take_up_user<S>(
        &mut self,
        record: &EntryRecord,
        services: &mut Named,
        parcel: &Parcel<S>,
    ) -> Result<Entry, String> {
        let client = record.client.given()?;
        let service = services.find(record.service, parcel, self)?;
        let (up, down) = (record.bytes_up.get(), record.bytes_down.get());
        if up.max(down) > CARRIED_MAX {
            return Err("a session has carried more bytes than there are".into());
        }
        let place = self.place(record, service)?;
        if record.backend_id != EntryRecord::NO_BACKEND {
            self.parts.shard.set_backend(&place, BackendId(record.backend_id.get()));
        }
        if let Some(service) = self.snapshot.service(service) {
            service.seats.take_beyond();
        }
        self.parts.metrics.counters.sessions_active.one();
        self.parts.shard.moved(&place, up, down, moment(record.active));
        Ok(Entry {
            is_lent: false,
            service,
            client,
            started: moment(record.started),
            is_tls: false,
            place,
            inside: None,
            choice: None,
            row: None,
            bytes_up: up,
            bytes_down: down,
        })
    }

    /// A place for a session that is taken up.
    fn place(&mut self, record: &EntryRecord, service: ServiceId) -> Result<Place, String> {
        let (client, started) = (record.client.given()?, moment(record.started));
        let shard = &mut self.parts.shard;
        let there = (record.place.get(), record.generation.get());
        let mut place = None;
        if record.worker == shard.worker() {
            if shard.is_taken(there.0) {
                return Err("two sessions have one place".into());
            }
            place = shard.open_at(there, service, client, started);
        }
        let place = place.or_else(|| shard.open(service, client, started));
        place.ok_or_else(|| "there are fewer places for sessions here than sessions come".into())
    }
}

/// The backend that a session was given.
///
/// # Errors
/// What is wrong with the record.
pub fn choice(record: &EntryRecord) -> Result<Choice, String> {
    if record.flags & !EntryRecord::PROXY != 0 {
        return Err("a session has unknown flags".into());
    }
    let slot = record.slot.get();
    if usize::from(slot) >= BACKENDS_MAX {
        return Err(format!("there is no row {slot} for a backend"));
    }
    Ok(Choice {
        backend: BackendId(record.backend_id.get()),
        slot,
        address: record.backend.given()?,
        proxy: record.flags & EntryRecord::PROXY != 0,
        http2: false,
        tls: false,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::base::random::xorshift;
    use crate::base::time::Now;
    use crate::cluster::{Backend, Snapshot, Standing};
    use crate::session::EndReason;
    use crate::worker::books::tests::{Joined, joined};
    use zerocopy::{FromBytes, IntoBytes};

    const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);
    const NOW: Now = Now::from_nanos(1_000_000_000);

    fn backend(number: u16) -> Backend {
        Backend {
            proxy: number == 2,
            http2: false,
            tls: None,
            id: BackendId(number.into()),
            slot: number,
            service: TCP,
            address: ([10, 0, 0, 1], number).into(),
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        }
    }

    /// Books of a worker whose TCP service has this number, and two backends.
    fn books(service: u16, places: usize) -> Joined {
        let mut snapshot = Snapshot::default();
        let mut services = snapshot.services.to_vec();
        let named = Service { id: ServiceId(service), name: "db".into(), ..services[0].clone() };
        services.push(Service { seats: Arc::new(crate::cluster::seats::Seats::new(2)), ..named });
        snapshot.services = services.into();
        let of = |number| Backend { service: ServiceId(service), ..backend(number) };
        joined(snapshot.with(&[of(1), of(2)]), places)
    }

    fn client(number: u16) -> std::net::SocketAddr {
        ([192, 0, 2, 1], number).into()
    }

    type Records = (PlacesRecord, Vec<EntryRecord>, Parcel<i32>);

    /// Two sessions, the second in a place that was used before.
    fn described(books: &mut Books) -> (Records, [Entry; 2]) {
        let mut admit = |number| {
            let mut entry = books.admit(ServiceId(5), client(number), NOW).unwrap();
            books.assign(&mut entry, &[]).unwrap();
            books.carried(
                &mut entry,
                10 * u64::from(number),
                7,
                NOW.plus(books.timeouts(TCP).connect),
            );
            entry
        };
        let (first, second) = (admit(1), admit(2));
        books.withdraw(second);
        let mut second = books.admit(ServiceId(5), client(3), NOW).unwrap();
        books.assign(&mut second, &[]).unwrap();
        let (mut names, mut parcel) = (Names::default(), Parcel::default());
        let all = [first, second];
        let records =
            all.iter().map(|entry| books.describe(entry, &mut names, &mut parcel).unwrap());
        ((books.describe_places(), records.collect(), parcel), all)
    }

    #[test]
    fn a_session_stands_in_the_books_of_its_successor_as_it_stood_before() {
        let mut old = books(5, 10);
        let ((places, records, parcel), all) = described(&mut old.books);
        let mut new = books(9, 10);
        new.books.succeed(places);
        let mut services = Named::new(Protocol::Tcp);
        let taken: Vec<Entry> = (records.iter())
            .map(|record| new.books.take_up(record, &mut services, &parcel).unwrap())
            .collect();
        new.books.settle();
        let view = |books: &Joined| books.control.shard.iter().collect::<Vec<_>>();
        let renamed = |mut view: crate::session::shards::SessionView| {
            view.service = ServiceId(9);
            view
        };
        let before: Vec<_> = view(&old).into_iter().map(renamed).collect();
        assert_eq!(view(&new), before);
        for (was, is) in all.iter().zip(&taken) {
            assert_eq!((was.choice, was.started, was.row), (is.choice, is.started, is.row));
            assert_eq!((is.service, is.inside), (ServiceId(9), Some(ServiceId(9))));
        }
        let (old, new) = (&old.books, &mut new.books);
        let counters = &new.metrics().counters;
        assert_eq!([counters.sessions_active.get(), counters.sessions_started.get()], [2, 0]);
        for slot in [1, 2] {
            assert_eq!(new.load(slot), old.load(slot), "row {slot}");
        }
        let service = new.snapshot().service(ServiceId(9)).unwrap();
        assert_eq!((service.seats.taken(), service.gate.sessions()), (2, 2));
        let gate = Arc::clone(&service.gate);
        taken.into_iter().for_each(|entry| new.close(entry, EndReason::Finished, NOW));
        assert_eq!((gate.sessions(), new.load(1) + new.load(2)), (0, 0));
    }

    #[test]
    fn a_limit_that_was_lowered_meanwhile_turns_nobody_out() {
        let mut old = books(5, 10);
        let ((places, records, parcel), _all) = described(&mut old.books);
        let mut new = books(5, 10);
        new.books.succeed(places);
        let seats = Arc::clone(&new.books.snapshot().service(ServiceId(5)).unwrap().seats);
        assert!(seats.take() && seats.take());
        let mut services = Named::new(Protocol::Tcp);
        for record in &records {
            assert!(new.books.take_up(record, &mut services, &parcel).is_ok());
        }
        assert_eq!(seats.taken(), 4);
        assert!(new.books.admit(ServiceId(5), client(9), NOW).is_err());
    }

    #[test]
    fn what_cannot_be_taken_up_is_refused_in_words() {
        let mut old = books(5, 10);
        let ((places, records, parcel), _all) = described(&mut old.books);
        let record = records[0];
        let refused = |new: &mut Joined, kind, record: EntryRecord| {
            new.books.take_up(&record, &mut Named::new(kind), &parcel).unwrap_err()
        };
        let mut new = books(5, 10);
        new.books.succeed(places);
        let said = refused(&mut new, Protocol::Udp, record);
        assert_eq!(said, "there is no udp service \"db\" any more");
        let nobody = EntryRecord { client: Address::NONE, ..record };
        assert_eq!(refused(&mut new, Protocol::Tcp, nobody), "an address is missing");
        let huge = EntryRecord { bytes_up: u64::MAX.into(), ..record };
        assert!(refused(&mut new, Protocol::Tcp, huge).contains("bytes"));
        let row = EntryRecord { slot: u16::MAX.into(), ..record };
        assert!(refused(&mut new, Protocol::Tcp, row).contains("row"));
        assert!(new.books.take_up(&record, &mut Named::new(Protocol::Tcp), &parcel).is_ok());
        assert_eq!(refused(&mut new, Protocol::Tcp, record), "two sessions have one place");
        let mut small = books(5, 0);
        assert!(refused(&mut small, Protocol::Tcp, record).contains("places"));
    }

    #[test]
    fn a_session_of_another_worker_gets_a_new_name() {
        let mut old = books(5, 10);
        let ((_, records, parcel), _all) = described(&mut old.books);
        let mut new = books(5, 10);
        let other = EntryRecord { worker: 3, place: 1.into(), generation: 8.into(), ..records[0] };
        let entry = new.books.take_up(&other, &mut Named::new(Protocol::Tcp), &parcel).unwrap();
        let id = new.books.id(&entry);
        assert_eq!((id.worker, id.place, id.generation), (0, 0, 1));
    }

    #[test]
    fn no_record_whatever_is_in_it_does_any_harm() {
        let mut old = books(5, 10);
        let ((places, records, parcel), _all) = described(&mut old.books);
        let mut random = xorshift(0x1234_5678_9abc_def1);
        let mut new = books(5, 10);
        new.books.succeed(places);
        let mut taken = 0;
        for round in 0..20_000 {
            let mut record = records[round % 2];
            for _ in 0..=random(4) {
                let bytes = record.as_mut_bytes();
                let at = random(bytes.len() as u64) as usize;
                bytes[at] = random(256) as u8;
            }
            assert!(EntryRecord::read_from_bytes(record.as_bytes()).is_ok());
            let said = new.books.take_up(&record, &mut Named::new(Protocol::Tcp), &parcel);
            if let Ok(mut entry) = said {
                taken += 1;
                new.books.carried(&mut entry, 1, 1, NOW);
                new.books.close(entry, EndReason::Finished, NOW);
            }
        }
        assert!(taken > 5_000, "{taken} were taken up");
        assert_eq!(new.books.metrics().counters.sessions_active.get(), 0);
    }
}
