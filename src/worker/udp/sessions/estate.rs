//! UDP sessions that go on in another process, with the pairs that rest and what counts for whom: what is said of
//! them, and how they are taken up. Which descriptors they use is their driver's.

use std::num::NonZeroU32;
use std::time::Duration;

use super::{Session, Sessions, plain};
use crate::base::time::Now;
use crate::estate::entry::{Address, EntryRecord, moment, nanos};
use crate::estate::udp::{FlowRecord, RestRecord, SenderRecord, SourceRecord};
use crate::estate::{Parcel, bits};
use crate::proxy::udp::SocketId;
use crate::proxy::udp::estate::Rest;
use crate::session::flows::{Flow, FlowKey};
use crate::session::sources::prefix_of;
use crate::worker::books::Books;
use crate::worker::books::estate::{Named, Names};

/// Longer than any rest that can be set: what is said to rest longer was not written by a balancer.
const REST_MAX: Duration = Duration::from_secs(100 * 24 * 3600);

/// What a session says that its driver has to look up.
pub struct Means {
    pub socket: SocketId,
    pub door: u16,
}

impl Sessions {
    /// Carries out what has been ordered already, however long it takes.
    pub fn finish_sweeps(&mut self, now: Now, books: &mut Books) {
        while !self.sweeps.is_empty() {
            self.continue_sweeps(now, books);
        }
    }

    /// What another could go on with of each session; the door and the socket are added by `means`, which knows
    /// none for those that cannot go on.
    pub fn describe<S>(
        &self,
        books: &Books,
        parcel: &mut Parcel<S>,
        means: impl Fn(&Means) -> Option<(Address, SenderRecord)>,
    ) {
        let mut names = Names::default();
        for flow in (0..self.flows.places()).filter_map(|place| self.flows.get(place)) {
            let Session { ref entry, door, socket, .. } = flow.state;
            let Some((door, sender)) = means(&Means { socket, door }) else { continue };
            if let Some(entry) = books.describe(entry, &mut names, parcel) {
                parcel.push(&record(flow, entry, (door, sender)));
            }
        }
    }

    /// The pairs that rest.
    pub fn resting(&self) -> impl Iterator<Item = Rest> {
        self.pairs.resting()
    }

    /// What counts for the sources besides their sessions.
    pub fn describe_sources<S>(&self, now: Now, parcel: &mut Parcel<S>) {
        for (prefix, clear_at) in self.sources.rated(now) {
            let (clear_at, until) = (nanos(clear_at), nanos(Now::default()));
            parcel.push(&SourceRecord { prefix: prefix.into(), clear_at, until });
        }
        for (until, source) in self.eviction.cooling() {
            let (prefix, clear_at) = (self.sources.prefix(source).into(), nanos(Now::default()));
            parcel.push(&SourceRecord { prefix, clear_at, until: nanos(until) });
        }
    }

    /// A socket is there that was opened elsewhere.
    pub fn take_up_socket(&mut self, socket: SocketId) {
        self.pairs.take_up(socket);
    }

    /// Takes up a session that another has described.
    ///
    /// # Errors
    /// What is wrong with the record, or what is lacking here; there is nothing of the session then.
    pub fn take_up<S>(
        &mut self,
        now: Now,
        record: &FlowRecord,
        Means { socket, door }: Means,
        (services, parcel): (&mut Named, &Parcel<S>),
        books: &mut Books,
    ) -> Result<(), String> {
        if record.flags & !FlowRecord::FLAGS != 0 {
            return Err("a session has unknown flags".into());
        }
        let (client, local) = (record.entry.client.given()?, record.local.given()?);
        let key = FlowKey::new(client, local);
        let hash = self.settings.hasher.flow(&key);
        if self.flows.find(hash, &key).is_some() {
            return Err("two sessions are one user's at one address".into());
        }
        let place = self.flows.vacant().ok_or(FULL)?;
        let backend = plain(record.entry.backend.given()?);
        let peer = self.pairs.recall(backend).ok_or("there are too many backends")?;
        let entry = books.take_up(&record.entry, services, parcel)?;
        if !self.pairs.seize(peer, socket, place) {
            books.withdraw(entry);
            return Err("a session has somebody else's way to its backend".into());
        }
        let Some(source) = self.sources.hold(prefix_of(client.ip())) else {
            self.pairs.free_clean(peer, socket);
            books.withdraw(entry);
            return Err(FULL.into());
        };
        let has = |bit: u8| record.flags & bit != 0;
        let (service, backend) = (entry.service, entry.choice().map(|choice| choice.backend));
        let session = Session {
            entry,
            door,
            peer,
            socket,
            source,
            responses: NonZeroU32::new(record.responses.get()),
            owed: record.owed.get(),
            unanswered: has(FlowRecord::UNANSWERED),
            refused: has(FlowRecord::REFUSED),
        };
        let opened = self.flows.open(hash, key, service, session, now);
        assert!(opened.is_ok_and(|at| at == place), "the place was vacant");
        let state = (has(FlowRecord::AWAITING), has(FlowRecord::QUIET));
        self.flows.restore(place, now, moment(record.last_seen), state);
        if let Some(backend) = backend {
            self.note(hash, backend);
        }
        Ok(())
    }

    /// Takes up a pair that rests.
    ///
    /// # Errors
    /// It is no pair, or in use.
    pub fn take_up_rest(
        &mut self,
        now: Now,
        record: &RestRecord,
        socket: SocketId,
    ) -> Result<(), String> {
        let backend = plain(record.backend.given()?);
        let peer = self.pairs.recall(backend).ok_or("there are too many backends")?;
        let (until, at, clean) = (record.until, record.at, record.clean);
        let [until, at, clean] = [until, at, clean].map(moment);
        let until = until.min(now.plus(REST_MAX));
        let rests = self.pairs.rest(peer, socket, &Rest { backend, socket, until, at, clean });
        rests.then_some(()).ok_or_else(|| "a pair rests that is in use, or none".into())
    }

    /// Takes up what counts for a source.
    pub fn take_up_source(&mut self, now: Now, record: &SourceRecord) {
        let (prefix, clear_at) = (record.prefix.get(), moment(record.clear_at));
        if clear_at != Now::default() {
            return self.sources.remember(prefix, clear_at, now);
        }
        if let Some(source) = self.sources.hold(prefix) {
            self.sources.ended(source);
            let until = moment(record.until).min(now.plus(REST_MAX));
            self.eviction.cool(until, source, &mut self.sources);
        }
    }

    /// Everything has been taken up.
    pub fn taken_up(&mut self) {
        self.pairs.taken_up();
        let of = |place: u32| {
            let flow = self.flows.get(place).filter(|flow| flow.is_quiet())?;
            Some((flow.last_seen, place))
        };
        let mut quiet: Vec<(Now, u32)> = (0..self.flows.places()).filter_map(of).collect();
        // They were the first to become quiet.
        quiet.sort_unstable();
        for (_, place) in quiet {
            self.eviction.remove(place);
            if let Some(flow) = self.flows.get(place) {
                self.eviction.add(place, flow);
            }
        }
    }
}

/// More come than there may be.
const FULL: &str = "more UDP sessions come than limits.udp_sessions lets in here";

fn record(
    flow: &Flow<Session>,
    entry: EntryRecord,
    (door, sender): (Address, SenderRecord),
) -> FlowRecord {
    let Session { responses, owed, unanswered, refused, .. } = flow.state;
    let flags = [
        (flow.awaiting, FlowRecord::AWAITING),
        (flow.is_quiet(), FlowRecord::QUIET),
        (unanswered, FlowRecord::UNANSWERED),
        (refused, FlowRecord::REFUSED),
    ];
    FlowRecord {
        entry,
        local: flow.key.local().into(),
        door,
        sender,
        last_seen: nanos(flow.last_seen),
        responses: responses.map_or(0, NonZeroU32::get).into(),
        owed: owed.into(),
        flags: bits(flags),
        unused: [0; 3],
    }
}
