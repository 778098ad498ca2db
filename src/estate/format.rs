//! How estates travel from one process to another: as sections with a sum each. Owns the form and its
//! checks; the descriptors travel apart, in the order of the sections that name them.
//!
//! ```text
//! "LBHO"  format u16  sections u16
//! section: kind u16  flags u16  owner u16  -  record_bytes u32  sockets u32  records u64  bytes u64  sum u64
//! body:    records, then bytes
//! ```
//!
//! All numbers are little-endian. A section of an unknown kind is passed over, unless its writer has marked
//! it as one that must not be. What is read is checked as if a stranger had written it; the sums find faults,
//! not forgers.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Estate, Parcel, RECORD_BYTES_MAX};

/// The newest format that this release writes, and reads.
pub const NEWEST: u16 = 1;
/// The oldest format that this release writes, and reads.
pub const OLDEST: u16 = 1;
/// The most bytes of all sections: blocks of a whole pool, and some.
pub const BYTES_MAX: u64 = 4 << 30;
/// The most bytes of the control core's section.
const LEGACY_BYTES_MAX: u64 = 16 << 20;

const MARK: [u8; 4] = *b"LBHO";
/// A reader that does not know the kind must refuse the whole.
const CRITICAL: u16 = 1;

/// Everything that one process leaves to another.
#[derive(Debug)]
pub struct State<S> {
    /// What the control core knows, as it has written it, and the descriptors that it names by place.
    pub legacy: (Vec<u8>, Vec<S>),
    /// By worker.
    pub estates: Vec<Estate<S>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Kind {
    Legacy = 1,
    Tcp = 2,
    Udp = 3,
    Places = 4,
    Upstream = 5,
    Rests = 6,
    Sources = 7,
    Doors = 8,
    Api = 9,
}

impl Kind {
    /// Those of an estate, in the order in which they are written.
    const OF_ESTATE: [Kind; 8] = [
        Kind::Places,
        Kind::Tcp,
        Kind::Udp,
        Kind::Upstream,
        Kind::Rests,
        Kind::Sources,
        Kind::Doors,
        Kind::Api,
    ];

    /// The parcel of an estate that is of this kind.
    fn parcel<S>(number: u16, estate: &mut Estate<S>) -> Option<&mut Parcel<S>> {
        let mut all = Kind::OF_ESTATE.into_iter().zip(estate.parcels_mut());
        all.find(|(kind, _)| *kind as u16 == number).map(|(_, parcel)| parcel)
    }

    fn is_of_estate(number: u16) -> bool {
        Kind::OF_ESTATE.into_iter().any(|kind| kind as u16 == number)
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    mark: [u8; 4],
    format: U16,
    sections: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SectionHead {
    kind: U16,
    flags: U16,
    owner: U16,
    unused: U16,
    record_bytes: U32,
    sockets: U32,
    records: U64,
    bytes: U64,
    sum: U64,
}

impl<S> State<S> {
    /// The sections, and the descriptors in their order.
    pub fn write(self) -> (Vec<u8>, Vec<S>) {
        let mut sections = Vec::new();
        let (bytes, sockets) = self.legacy;
        sections.push((Kind::Legacy, 0, Parcel { bytes, sockets, ..Parcel::default() }));
        for estate in self.estates {
            let worker = estate.worker;
            let all = Kind::OF_ESTATE.into_iter().zip(estate.parcels());
            // One of them is always there, and tells of the worker.
            let worth = all.filter(|(kind, parcel)| *kind == Kind::Places || !parcel.is_void());
            sections.extend(worth.map(|(kind, parcel)| (kind, worker, parcel)));
        }
        let (format, count) = (U16::new(NEWEST), U16::new(sections.len() as u16));
        let head = Head { mark: MARK, format, sections: count };
        let bodies = sections.iter().map(|(_, _, it)| it.records.len() + it.bytes.len());
        let heads = size_of::<Head>() + sections.len() * size_of::<SectionHead>();
        let mut out = Vec::with_capacity(heads + bodies.sum::<usize>());
        out.extend_from_slice(head.as_bytes());
        let mut writer = Writer { out, sockets: Vec::new() };
        for (kind, worker, parcel) in sections {
            writer.section(kind, worker, parcel);
        }
        (writer.out, writer.sockets)
    }

    /// Reads sections back, with the descriptors that came with them.
    ///
    /// # Errors
    /// What is wrong with them, as the end of a sentence.
    pub fn read(text: &[u8], sockets: Vec<S>) -> Result<State<S>, String> {
        let (head, mut rest) = Head::read_from_prefix(text).map_err(|_| "it is cut off")?;
        if head.mark != MARK {
            return Err("it is not a handover's".into());
        }
        if !(OLDEST..=NEWEST).contains(&head.format.get()) {
            return Err(format!(
                "its format is {}, and known are {OLDEST} to {NEWEST}",
                head.format
            ));
        }
        let (mut state, mut sockets) = (State::empty(), sockets.into_iter());
        let mut legacies = 0;
        for _ in 0..head.sections.get() {
            let (section, body) = section(&mut rest)?;
            let count = section.sockets.get() as usize;
            let sockets: Vec<S> = sockets.by_ref().take(count).collect();
            if sockets.len() != count {
                return Err("descriptors are missing".into());
            }
            let parcel = section.parcel(body, sockets)?;
            match section.kind.get() {
                kind if kind == Kind::Legacy as u16 => {
                    legacies += 1;
                    state.legacy = (parcel.bytes, parcel.sockets);
                }
                kind if Kind::is_of_estate(kind) => {
                    let place = Kind::parcel(kind, state.estate(&section)?);
                    let place = place.filter(|place| place.is_void());
                    *place.ok_or("a section comes twice")? = parcel;
                }
                kind if section.flags.get() & CRITICAL != 0 => {
                    return Err(format!(
                        "it has a section of kind {kind}, which is not known here"
                    ));
                }
                _ => {}
            }
        }
        match (legacies, rest.is_empty(), sockets.next()) {
            (1, true, None) => Ok(state),
            (1, false, _) => Err("something follows its last section".into()),
            (1, true, Some(_)) => Err("more descriptors came than it names".into()),
            _ => Err("it does not have one section of the control core's".into()),
        }
    }

    fn empty() -> State<S> {
        State { legacy: (Vec::new(), Vec::new()), estates: Vec::new() }
    }

    /// The estate of a section's owner, which comes in the order of the workers' numbers.
    fn estate(&mut self, section: &SectionHead) -> Result<&mut Estate<S>, String> {
        let owner = u8::try_from(section.owner.get()).map_err(|_| "a worker has no such number")?;
        if self.estates.last().is_none_or(|last| last.worker < owner) {
            self.estates.push(Estate::new(owner));
        }
        match self.estates.last_mut() {
            Some(last) if last.worker == owner => Ok(last),
            _ => Err("its workers are out of order".into()),
        }
    }
}

struct Writer<S> {
    out: Vec<u8>,
    sockets: Vec<S>,
}

impl<S> Writer<S> {
    fn section(&mut self, kind: Kind, owner: u8, parcel: Parcel<S>) {
        let head = SectionHead {
            kind: U16::new(kind as u16),
            flags: U16::new(CRITICAL),
            owner: U16::new(owner.into()),
            unused: U16::new(0),
            record_bytes: U32::new(parcel.record_bytes as u32),
            sockets: U32::new(parcel.sockets.len() as u32),
            records: U64::new(parcel.records.len() as u64),
            bytes: U64::new(parcel.bytes.len() as u64),
            sum: U64::new(sum(&[&parcel.records, &parcel.bytes])),
        };
        self.out.extend_from_slice(head.as_bytes());
        self.out.extend_from_slice(&parcel.records);
        self.out.extend_from_slice(&parcel.bytes);
        self.sockets.extend(parcel.sockets);
    }
}

impl SectionHead {
    fn parcel<S>(&self, body: &[u8], sockets: Vec<S>) -> Result<Parcel<S>, String> {
        let (records, bytes) = body.split_at(self.records.get() as usize);
        if sum(&[records, bytes]) != self.sum.get() {
            return Err("a section's sum is wrong".into());
        }
        let record_bytes = self.record_bytes.get() as usize;
        let is_whole = match record_bytes {
            0 => records.is_empty(),
            1..=RECORD_BYTES_MAX => records.len().is_multiple_of(record_bytes),
            _ => false,
        };
        if !is_whole {
            return Err("a section's records have no possible size".into());
        }
        if self.kind.get() == Kind::Legacy as u16 && self.bytes.get() > LEGACY_BYTES_MAX {
            return Err(format!(
                "the control core's section is longer than {LEGACY_BYTES_MAX} bytes"
            ));
        }
        Ok(Parcel { record_bytes, records: records.to_vec(), bytes: bytes.to_vec(), sockets })
    }
}

/// Takes the next section off: its head and its body, which is as long as the head says.
fn section<'a>(rest: &mut &'a [u8]) -> Result<(SectionHead, &'a [u8]), String> {
    let (head, after) = SectionHead::read_from_prefix(rest).map_err(|_| "it is cut off")?;
    let len = head.records.get().checked_add(head.bytes.get());
    let len = len.and_then(|len| usize::try_from(len).ok()).unwrap_or(usize::MAX);
    let (body, after) = after.split_at_checked(len).ok_or("it is cut off")?;
    *rest = after;
    Ok((head, body))
}

fn sum(parts: &[&[u8]]) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State<i32> {
        let mut estates = Vec::new();
        for worker in [0, 3] {
            let mut estate = Estate::new(worker);
            estate.tcp.push(&U32::new(worker.into()));
            estate.tcp.push(&U32::new(77));
            estate.tcp.add_bytes([&b"not sent"[..]].into_iter());
            estate.tcp.add_socket(10 + i32::from(worker));
            estate.udp.push(&U64::new(5));
            estate.udp.add_socket(20 + i32::from(worker));
            estates.push(estate);
        }
        State { legacy: (b"{}".to_vec(), vec![1, 2]), estates }
    }

    fn read(text: &[u8], sockets: Vec<i32>) -> Result<State<i32>, String> {
        State::read(text, sockets)
    }

    #[test]
    fn a_state_reads_back_as_it_was_written() {
        let (text, sockets) = state().write();
        assert_eq!(sockets, [1, 2, 10, 20, 13, 23]);
        let back = read(&text, sockets).unwrap();
        assert_eq!(back.legacy, (b"{}".to_vec(), vec![1, 2]));
        let workers: Vec<u8> = back.estates.iter().map(|estate| estate.worker).collect();
        assert_eq!(workers, [0, 3]);
        let tcp = &back.estates[1].tcp;
        assert_eq!(tcp.records::<U32>().map(U32::get).collect::<Vec<_>>(), [3, 77]);
        assert_eq!((&tcp.bytes[..], &tcp.sockets[..]), (&b"not sent"[..], &[13][..]));
        assert_eq!(back.estates[1].udp.sockets, [23]);
        assert_eq!(back.write().0, text);
    }

    #[test]
    fn a_state_that_is_cut_off_or_goes_on_is_refused() {
        let (text, sockets) = state().write();
        for len in 0..text.len() {
            assert!(read(&text[..len], sockets.clone()).is_err(), "{len} bytes");
        }
        let longer = [&text[..], &[0]].concat();
        assert!(read(&longer, sockets).unwrap_err().contains("follows"));
    }

    #[test]
    fn descriptors_must_be_as_many_as_are_named() {
        let (text, sockets) = state().write();
        assert!(read(&text, sockets[1..].to_vec()).unwrap_err().contains("missing"));
        let more = [&sockets[..], &[9]].concat();
        assert!(read(&text, more).unwrap_err().contains("more descriptors"));
    }

    #[test]
    fn no_changed_byte_goes_unnoticed_but_where_it_means_nothing() {
        let (text, sockets) = state().write();
        let mut passed = 0;
        for at in 0..text.len() {
            for change in [1, 0x80] {
                let mut text = text.clone();
                text[at] ^= change;
                passed += usize::from(read(&text, sockets.clone()).is_ok());
            }
        }
        // The unused field of seven sections, three bits of flags that nobody reads, owners and sizes of
        // records that are possible as well.
        assert!(passed < 7 * (2 * 2 + 4 + 2 + 4), "{passed} changes passed");
    }

    #[test]
    fn an_unknown_section_is_passed_over_unless_it_matters() {
        for (flags, is_fine) in [(0, true), (CRITICAL, false)] {
            let (mut text, sockets) = state().write();
            let len = text.len() - size_of::<SectionHead>() - size_of::<U64>();
            text[len..len + 2].copy_from_slice(&99u16.to_le_bytes());
            text[len + 2..len + 4].copy_from_slice(&flags.to_le_bytes());
            assert_eq!(read(&text, sockets).is_ok(), is_fine);
        }
    }

    #[test]
    fn a_format_of_another_age_is_named() {
        let (mut text, sockets) = state().write();
        text[4] = 9;
        assert_eq!(read(&text, sockets).unwrap_err(), "its format is 9, and known are 1 to 1");
    }
}
