//! What a worker leaves to its successor in another process: its sessions as records, the bytes that they
//! had not sent, and the descriptors that they lived on. Owns the form of records; what the fields of one
//! mean is up to whoever describes and takes up sessions. [`format`] is how an estate travels.
//!
//! A record is a struct of fixed little-endian fields. Releases may add fields at its end, where zero must mean
//! what an older release did: a reader that knows more than the writer finds zeros, and one that knows less
//! does not look at the tail.

pub mod ahead;
pub mod api;
pub mod entry;
pub mod format;
pub mod tcp;
pub mod udp;

use std::net::SocketAddr;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::cluster::DoorId;

/// The most bytes that one record may have, whoever wrote it.
pub const RECORD_BYTES_MAX: usize = 1024;

/// A struct of fixed little-endian fields.
pub trait Record: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned {}

impl<T: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned> Record for T {}

/// What one worker leaves. `S` is a `RawFd` while the sessions are still in use where they are described, and
/// an `OwnedFd` where they have arrived.
#[derive(Debug)]
pub struct Estate<S> {
    /// Its number.
    pub worker: u8,
    /// How far the places for sessions were used: one record.
    pub places: Parcel<S>,
    pub tcp: Parcel<S>,
    pub udp: Parcel<S>,
    /// The sockets towards backends, which UDP sessions share.
    pub upstream: Parcel<S>,
    /// The pairs of UDP sessions that have ended.
    pub rests: Parcel<S>,
    /// What is remembered of those who open UDP sessions.
    pub sources: Parcel<S>,
    /// Its sockets at the users' doors, a record for each.
    pub doors: Parcel<S>,
    /// API users.
    pub api: Parcel<S>,
    /// The UDP doors where this is taken up, which may have other numbers there. Does not travel.
    pub doors_here: Vec<(DoorId, SocketAddr)>,
}

/// A socket at a users' door.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DoorRecord {
    /// The number of the door where it was in use.
    pub door: U16,
    pub unused: U16,
}

/// Records of one kind, and what they point to by place.
#[derive(Debug)]
pub struct Parcel<S> {
    /// Bytes of each record as it was written; zero if there is none.
    record_bytes: usize,
    records: Vec<u8>,
    bytes: Vec<u8>,
    pub sockets: Vec<S>,
}

/// The descriptors of a parcel while they are given out, each of them once.
pub struct Unclaimed<S>(Vec<Option<S>>);

impl<S> Unclaimed<S> {
    pub fn new(sockets: Vec<S>) -> Unclaimed<S> {
        Unclaimed(sockets.into_iter().map(Some).collect())
    }

    /// The descriptor at a place.
    ///
    /// # Errors
    /// There is none, or it was given out before.
    pub fn claim(&mut self, place: U32) -> Result<S, String> {
        let place = self.0.get_mut(place.get() as usize).ok_or("a descriptor is missing")?;
        place.take().ok_or_else(|| "a descriptor is claimed twice".into())
    }
}

/// Some of a parcel's bytes.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Span {
    pub offset: U32,
    pub len: U32,
}

impl<S> Estate<S> {
    /// Nothing yet.
    pub fn new(worker: u8) -> Estate<S> {
        let [places, tcp, udp, upstream, rests, sources, doors, api] =
            [(); 8].map(|()| Parcel::default());
        let doors_here = Vec::new();
        Estate { worker, places, tcp, udp, upstream, rests, sources, doors, api, doors_here }
    }

    /// All parcels, in the order in which they are written.
    pub fn parcels(self) -> [Parcel<S>; 8] {
        let Estate { places, tcp, udp, upstream, rests, sources, doors, api, .. } = self;
        [places, tcp, udp, upstream, rests, sources, doors, api]
    }

    fn parcels_mut(&mut self) -> [&mut Parcel<S>; 8] {
        let Estate { places, tcp, udp, upstream, rests, sources, doors, api, .. } = self;
        [places, tcp, udp, upstream, rests, sources, doors, api]
    }

    /// The same with other handles for the descriptors, in the same order.
    pub fn map<T>(mut self, mut socket: impl FnMut(S) -> T) -> Estate<T> {
        let (worker, doors_here) = (self.worker, std::mem::take(&mut self.doors_here));
        let parcels = self.parcels().map(|parcel| parcel.map(&mut socket));
        let [places, tcp, udp, upstream, rests, sources, doors, api] = parcels;
        Estate { worker, places, tcp, udp, upstream, rests, sources, doors, api, doors_here }
    }
}

impl<S> Default for Parcel<S> {
    fn default() -> Parcel<S> {
        let (records, bytes, sockets) = (Vec::new(), Vec::new(), Vec::new());
        Parcel { record_bytes: 0, records, bytes, sockets }
    }
}

impl<S> Parcel<S> {
    /// Adds a record; all of a parcel are of one type.
    pub fn push<R: Record>(&mut self, record: &R) {
        assert!(size_of::<R>() <= RECORD_BYTES_MAX, "a record stays small");
        assert!(
            self.records.is_empty() || self.record_bytes == size_of::<R>(),
            "one type of record"
        );
        self.record_bytes = size_of::<R>();
        self.records.extend_from_slice(record.as_bytes());
    }

    /// Adds a descriptor; returns its place.
    pub fn add_socket(&mut self, socket: S) -> U32 {
        self.sockets.push(socket);
        U32::new(self.sockets.len() as u32 - 1)
    }

    /// Adds bytes; returns where they are.
    pub fn add_bytes<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]>) -> Span {
        let offset = self.bytes.len();
        pieces.for_each(|piece| self.bytes.extend_from_slice(piece));
        let len = self.bytes.len() - offset;
        Span { offset: U32::new(offset as u32), len: U32::new(len as u32) }
    }

    /// How many records there are.
    pub fn len(&self) -> usize {
        self.records.len().checked_div(self.record_bytes).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Whether there is nothing in it at all.
    fn is_void(&self) -> bool {
        self.is_empty() && self.bytes.is_empty() && self.sockets.is_empty()
    }

    /// All records, as far as this release knows their fields.
    pub fn records<R: Record>(&self) -> impl Iterator<Item = R> {
        // An empty parcel has no size of record.
        self.records.chunks_exact(self.record_bytes.max(1)).map(read)
    }

    /// Changes all records, as far as this release knows their fields.
    pub fn amend<R: Record>(&mut self, change: impl Fn(&mut R)) {
        for bytes in self.records.chunks_exact_mut(self.record_bytes.max(1)) {
            let mut record: R = read(bytes);
            change(&mut record);
            let known = bytes.len().min(size_of::<R>());
            bytes[..known].copy_from_slice(&record.as_bytes()[..known]);
        }
    }

    /// The bytes of a span; `None`: there are no such.
    pub fn bytes(&self, span: Span) -> Option<&[u8]> {
        let start = span.offset.get() as usize;
        self.bytes.get(start..start.checked_add(span.len.get() as usize)?)
    }

    fn map<T>(self, socket: &mut impl FnMut(S) -> T) -> Parcel<T> {
        let Parcel { record_bytes, records, bytes, sockets } = self;
        let sockets = sockets.into_iter().map(socket).collect();
        Parcel { record_bytes, records, bytes, sockets }
    }
}

/// The bits whose condition holds.
pub fn bits<const N: usize>(all: [(bool, u8); N]) -> u8 {
    all.into_iter().filter(|(is_so, _)| *is_so).fold(0, |sum, (_, bit)| sum | bit)
}

/// A record as far as both sides know it.
fn read<R: Record>(bytes: &[u8]) -> R {
    let mut record = R::new_zeroed();
    let known = bytes.len().min(size_of::<R>());
    record.as_mut_bytes()[..known].copy_from_slice(&bytes[..known]);
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(
        Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
    )]
    #[repr(C)]
    struct Older {
        first: U32,
        text: Span,
    }

    #[derive(
        Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
    )]
    #[repr(C)]
    struct Newer {
        older: Older,
        added: U32,
    }

    fn older(parcel: &mut Parcel<i32>, first: u32, text: &[u8]) -> Older {
        let text = parcel.add_bytes(text.chunks(2));
        Older { first: U32::new(first), text }
    }

    #[test]
    fn records_read_back_with_what_they_point_to() {
        let mut parcel: Parcel<i32> = Parcel::default();
        let records = [older(&mut parcel, 1, b"one"), older(&mut parcel, 2, b"second")];
        records.iter().for_each(|record| parcel.push(record));
        assert_eq!(parcel.add_socket(7), 0);
        assert_eq!(parcel.add_socket(9), 1);
        assert_eq!(parcel.len(), 2);
        assert_eq!(parcel.records::<Older>().collect::<Vec<_>>(), records);
        assert_eq!(parcel.bytes(records[0].text), Some(&b"one"[..]));
        assert_eq!(parcel.bytes(records[1].text), Some(&b"second"[..]));
    }

    #[test]
    fn a_newer_release_finds_zeros_and_an_older_one_ignores_the_tail() {
        let mut parcel: Parcel<i32> = Parcel::default();
        let record = older(&mut parcel, 5, b"x");
        parcel.push(&record);
        let newer = Newer { older: record, added: U32::new(0) };
        assert_eq!(parcel.records::<Newer>().collect::<Vec<_>>(), [newer]);
        let mut parcel: Parcel<i32> = Parcel::default();
        parcel.push(&Newer { added: U32::new(8), ..newer });
        assert_eq!(parcel.records::<Older>().collect::<Vec<_>>(), [record]);
    }

    #[test]
    fn what_is_changed_in_a_record_leaves_its_unknown_tail_alone() {
        let mut parcel: Parcel<i32> = Parcel::default();
        let record = older(&mut parcel, 5, b"x");
        let newer = Newer { older: record, added: U32::new(8) };
        parcel.push(&newer);
        parcel.push(&newer);
        parcel.amend(|record: &mut Older| record.text.len = U32::new(0));
        let text = Span { len: U32::new(0), ..record.text };
        let changed = Newer { older: Older { text, ..record }, ..newer };
        assert_eq!(parcel.records::<Newer>().collect::<Vec<_>>(), [changed, changed]);
    }

    #[test]
    fn bytes_that_are_not_there_are_not_found() {
        let mut parcel: Parcel<i32> = Parcel::default();
        parcel.add_bytes([&b"abc"[..]].into_iter());
        for (offset, len) in [(0, 4), (3, 1), (4, 0), (u32::MAX, 1), (1, u32::MAX)] {
            let span = Span { offset: U32::new(offset), len: U32::new(len) };
            assert_eq!(parcel.bytes(span), None, "{offset} {len}");
        }
    }

    #[test]
    fn a_descriptor_is_claimed_once() {
        let mut all = Unclaimed::new(vec![7, 9]);
        assert_eq!(all.claim(U32::new(1)), Ok(9));
        assert!(all.claim(U32::new(1)).unwrap_err().contains("twice"));
        assert!(all.claim(U32::new(2)).unwrap_err().contains("missing"));
    }

    #[test]
    fn an_empty_parcel_has_no_records() {
        let parcel: Parcel<i32> = Parcel::default();
        assert_eq!(parcel.records::<Older>().count(), 0);
        assert_eq!((parcel.len(), parcel.is_empty()), (0, true));
    }
}
