//! What must hold for whatever a predecessor sends as its state: it is read or refused, nothing else happens, and
//! what was read is written again as it was.

use lb::control::legacy::Legacy;
use lb::estate::api::UserRecord;
use lb::estate::entry::PlacesRecord;
use lb::estate::format::State;
use lb::estate::tcp::SessionRecord;
use lb::estate::udp::{FlowRecord, RestRecord, SourceRecord, UpstreamRecord};
use lb::estate::{DoorRecord, Estate, Parcel, Record};

/// The first byte says how many descriptors come with it.
pub fn state(bytes: &[u8]) {
    records(bytes);
    let Some((count, text)) = bytes.split_first() else { return };
    let Ok(state) = State::read(text, (0..i32::from(*count)).collect()) else { return };
    for estate in &state.estates {
        sessions(&estate.tcp);
        walk::<PlacesRecord>(&estate.places);
        walk::<FlowRecord>(&estate.udp);
        walk::<UpstreamRecord>(&estate.upstream);
        walk::<RestRecord>(&estate.rests);
        walk::<SourceRecord>(&estate.sources);
        walk::<DoorRecord>(&estate.doors);
        walk::<UserRecord>(&estate.api);
    }
    let _ = Legacy::from_json(&state.legacy.0);
    let again = state.write().0;
    let back = State::<i32>::read(&again, Vec::new());
    assert!(*count > 0 || back.is_ok(), "what was written is read");
}

/// Records of these bytes, which no sum vouches for.
fn records(bytes: &[u8]) {
    let mut parcel: Parcel<i32> = Parcel::default();
    for chunk in bytes.chunks_exact(size_of::<SessionRecord>()) {
        parcel.push(&record::<SessionRecord>(chunk));
    }
    parcel.add_bytes([bytes].into_iter());
    sessions(&parcel);
}

/// What they point to is there, or is found not to be.
fn sessions(parcel: &Parcel<i32>) {
    for record in parcel.records::<SessionRecord>() {
        let span = record.entry.service;
        if let Some(name) = parcel.bytes(span) {
            assert_eq!(name.len(), span.len.get() as usize);
        }
        let _ = record.entry.client.get();
    }
}

fn walk<R: Record>(parcel: &Parcel<i32>) {
    assert_eq!(parcel.records::<R>().count(), parcel.len());
}

/// A description of the control core.
pub fn legacy(bytes: &[u8]) {
    if let Ok(legacy) = Legacy::from_json(bytes) {
        let json = legacy.to_json().expect("it came in less");
        assert!(Legacy::from_json(&json).is_ok());
    }
}

/// A state to begin with.
#[allow(dead_code, reason = "a target begins with what it is given")]
pub fn a_state() -> Vec<u8> {
    let mut estate = Estate::new(0);
    estate.places.push(&zeroed::<PlacesRecord>());
    estate.tcp.push(&zeroed::<SessionRecord>());
    estate.tcp.add_bytes([&b"not sent"[..]].into_iter());
    estate.tcp.sockets.extend(0..2);
    estate.udp.push(&zeroed::<FlowRecord>());
    estate.doors.push(&zeroed::<DoorRecord>());
    estate.doors.sockets.push(2);
    let (text, sockets) =
        State { legacy: (b"{}".to_vec(), Vec::new()), estates: vec![estate] }.write();
    [&[sockets.len() as u8], &text[..]].concat()
}

#[allow(dead_code, reason = "as above")]
fn zeroed<R: Record>() -> R {
    record(&vec![0; size_of::<R>()])
}

fn record<R: Record>(bytes: &[u8]) -> R {
    R::read_from_bytes(bytes).expect("it is as long as that")
}
