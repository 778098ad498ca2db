//! Sessions that go on in another process: what is said of one that stands still, and how one is taken up so that
//! it stands still here as it did there, until [`Sessions::thaw`].
//!
//! What cannot go on elsewhere ends where it is: a session that is over already, and one that is *apart*, since
//! the state of its TLS is in no record.

use zerocopy::little_endian::U32;

use super::still::Waiting;
use super::{Cmd, Cx, OFFERS_MAX, Phase, Session, Sessions, Tried};
use crate::cluster::BackendId;
use crate::estate::entry::{moment, nanos};
use crate::estate::tcp::{self, NO_SOCKET, SessionRecord};
use crate::estate::{Parcel, bits};
use crate::proxy::Side;
use crate::proxy::greeting::{Screen, Screened};
use crate::proxy::line::Features;
use crate::proxy::outlook::Watch;
use crate::proxy::tcp::Relay;
use crate::worker::books::estate::{Named, Names};
use crate::worker::slots::Key;

const _: () = assert!(OFFERS_MAX == tcp::OFFERS_MAX, "all offers fit a record");

/// A place kept for a session, and from which sides a receive is armed already.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    pub key: Key,
    pub armed: [bool; 2],
}

impl Session {
    /// Whether one of its sides speaks TLS, or will.
    fn is_sealed(&self) -> bool {
        self.entry.is_tls() || self.entry.choice().is_some_and(|choice| choice.tls)
    }
}

impl Sessions {
    /// Those that could go on elsewhere.
    pub fn movable(&self, is_apart: impl Fn(Key) -> bool) -> Vec<Key> {
        let is_running = |session: &Session| {
            matches!(session.phase, Phase::Connecting | Phase::Relaying) && !session.is_sealed()
        };
        let mut keys = self.slots.keys(is_running);
        keys.retain(|key| !is_apart(*key));
        keys
    }

    /// From this place on, those whose bytes both sides send into blocks.
    pub fn plain_from(&self, place: u32) -> impl Iterator<Item = Key> {
        let is_plain = |session: &Session| {
            session.phase == Phase::Relaying && !session.is_sealed() && session.relay.is_plain()
        };
        self.slots.iter_from(place).filter(move |(_, it)| is_plain(it)).map(|(key, _)| key)
    }

    /// What its own sessions may use.
    pub fn features(&self) -> Features {
        self.features
    }

    /// A place for a session that is taken up later.
    pub fn reserve(&mut self) -> Key {
        let key = self.slots.reserve();
        self.starved.make_room(Side::BOTH.len() * self.slots.places());
        key
    }

    /// There will be none.
    pub fn release(&mut self, key: Key) {
        self.slots.release(key);
    }

    /// What another could go on with; the descriptors are the driver's to add. Nothing is under way.
    pub fn describe<S>(
        &mut self,
        key: Key,
        names: &mut Names,
        parcel: &mut Parcel<S>,
        cx: &Cx<'_>,
    ) -> Option<SessionRecord> {
        let session = self.slots.get(key)?;
        let (seen, mut screen) = (session.screen.seen(), [0; tcp::SCREEN_BYTES]);
        screen[..seen.len()].copy_from_slice(seen);
        let entry = cx.books.describe(&session.entry, names, parcel)?;
        let [client_unseen, backend_unseen] = session.unseen;
        let flags = [
            (session.phase == Phase::Relaying, SessionRecord::RELAYS),
            (session.half_closed, SessionRecord::HALF_CLOSED),
            (client_unseen, SessionRecord::CLIENT_UNSEEN),
            (backend_unseen, SessionRecord::BACKEND_UNSEEN),
        ];
        let Tried { backends, count, portless } = session.tried;
        Some(SessionRecord {
            entry,
            sockets: [NO_SOCKET; 2],
            relay: session.relay.describe(cx.pool, parcel),
            active: nanos(session.active),
            look_at: nanos(session.look_at),
            destination: session.destination.into(),
            watches: session.watches.each_ref().map(Watch::describe),
            offered: backends.map(|backend| backend.map_or(0, |backend| backend.0).into()),
            tried: count as u8,
            portless: portless as u8,
            flags: bits(flags),
            screened: seen.len() as u8,
            screen,
            ahead: U32::ZERO,
        })
    }

    /// Takes up what another has described, at the place that was kept for it if there is one. It stands still until
    /// [`Sessions::thaw`].
    ///
    /// # Errors
    /// What is wrong with the record, or what is lacking here; there is nothing of the session then.
    pub fn take_up<S>(
        &mut self,
        record: &SessionRecord,
        seat: Option<Seat>,
        (services, parcel): (&mut Named, &Parcel<S>),
        cx: &mut Cx<'_>,
    ) -> Result<Key, String> {
        let has = |bit: u8| record.flags & bit != 0;
        if record.flags & !SessionRecord::FLAGS != 0 {
            return Err("a session has unknown flags".into());
        }
        let (tried, destination) = (tried(record)?, record.destination.get()?);
        let (screen, is_stranger) = (screen(record)?, has(SessionRecord::CLIENT_UNSEEN));
        let carried = [record.entry.bytes_up, record.entry.bytes_down];
        let delivered = record.relay.flows.map(|flow| flow.delivered);
        if carried.iter().zip(delivered).any(|(booked, there)| booked.get() > there.get()) {
            return Err("more bytes are booked than a session has carried".into());
        }
        let mut relay = Relay::taken_up(&record.relay, parcel, cx.pool)?;
        let entry = cx.books.take_up(&record.entry, services, parcel);
        let entry = entry.inspect_err(|_| relay.release(cx.pool))?;
        let relays = has(SessionRecord::RELAYS);
        let is_piped = Side::BOTH.into_iter().any(|side| relay.is_spliced(side));
        let features = Features { splice: self.features.splice || is_piped, ..self.features };
        let Seat { key, armed } =
            seat.unwrap_or_else(|| Seat { key: self.reserve(), armed: [false; 2] });
        for side in Side::BOTH.into_iter().filter(|side| armed[*side as usize]) {
            relay.armed_before(side, &mut |what| cx.out.push(Cmd::Relay { key, what }));
        }
        self.slots.fill(
            key,
            Session {
                phase: if relays { Phase::Relaying } else { Phase::Connecting },
                relay,
                entry,
                tried,
                active: moment(record.active),
                half_closed: has(SessionRecord::HALF_CLOSED),
                unseen: [is_stranger, has(SessionRecord::BACKEND_UNSEEN)],
                screen,
                destination,
                relayed: relays,
                is_elsewhere: false,
                features,
                look_at: moment(record.look_at),
                watches: record.watches.map(Watch::from),
            },
        );
        if !relays {
            self.waiting.push(Waiting::seated(key));
        }
        Ok(key)
    }
}

/// The backends that the user was offered.
fn tried(record: &SessionRecord) -> Result<Tried, String> {
    let (count, portless) = (usize::from(record.tried), usize::from(record.portless));
    if count > OFFERS_MAX || portless > count {
        return Err("a session has been offered too many backends".into());
    }
    let mut tried = Tried { portless, ..Tried::default() };
    record.offered[..count].iter().for_each(|backend| tried.add(BackendId(backend.get())));
    Ok(tried)
}

/// What is known of a stranger's first bytes.
fn screen(record: &SessionRecord) -> Result<Screen, String> {
    let mut screen = Screen::default();
    let seen = record.screen.get(..usize::from(record.screened));
    let seen = seen.ok_or("more bytes of a stranger are known than can be")?;
    if screen.see(seen) == Screened::Header {
        return Err("a stranger's first bytes are a PROXY header".into());
    }
    Ok(screen)
}
