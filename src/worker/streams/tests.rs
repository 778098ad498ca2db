//! Tests of `worker::streams`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::cluster::{DoorId, ServiceId, Snapshot};
use crate::ring::RingSettings;
use crate::worker::books::tests::{Joined, joined};
use crate::worker::link::Listener;

const FAMILY: u8 = 0x40;
const KEY: Key = Key { place: 70_000, generation: GENERATION_MASK };

struct Stage {
    streams: Streams<FAMILY>,
    ring: Ring,
    joined: Joined,
}

impl Stage {
    fn new(farewell: Option<&'static [u8]>) -> Stage {
        let mut ring = Ring::new(RingSettings::with_bytes(1 << 20, false)).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (id, service) = (DoorId(0), ServiceId(3));
        let door = Listener { id, socket: listener.into(), service, is_tls: false };
        let mut streams = Streams::new(farewell, Now::default());
        streams.doors.open(door, &mut ring);
        Stage { streams, ring, joined: joined(Snapshot::default(), 1) }
    }

    fn complete(
        &mut self,
        tag: Tag,
        result: Result<u32, Errno>,
        came: Option<OwnedFd>,
    ) -> Completion {
        let (buf, more, nonempty) = (None, true, false);
        let done = Done { tag, result, buf, accepted: came, more, nonempty };
        let Stage { streams, ring, joined } = self;
        let books = &mut joined.books;
        streams.complete(done, &mut Turn { now: Now::default(), ring, books })
    }

    fn accept(&mut self, result: Result<u32, Errno>, came: Option<OwnedFd>) -> Completion {
        let tag = Tag { kind: FAMILY | ACCEPT, generation: 1, slot: 0 };
        self.complete(tag, result, came)
    }

    fn counted(&self, what: impl Fn(&crate::metrics::WorkerMetrics) -> u64) -> u64 {
        what(self.joined.books.metrics())
    }
}

#[test]
fn a_completion_finds_back_to_its_socket() {
    let mut stage = Stage::new(None);
    for side in Side::BOTH {
        let tag = |what| Streams::<FAMILY>::tag(what, (KEY, side));
        assert_eq!(end_of(tag(SEND)), (KEY, side));
        let sent = stage.complete(tag(SEND), Ok(7), None);
        assert!(
            matches!(sent, Completion::Happened(KEY, Event::Sent { side: to, result: Ok(7) }) if to == side)
        );
        let ended = stage.complete(tag(RECEIVE), Ok(0), None);
        let Completion::Happened(KEY, event) = ended else {
            panic!("a receive is about a session")
        };
        assert_eq!(event.side(), side);
        assert!(matches!(event, Event::Received { what: Received::End, more: true, .. }));
        let own = stage.complete(tag(OWN), Ok(0), None);
        assert!(matches!(own, Completion::Own(done) if done.tag == tag(OWN)));
    }
    let refused = Streams::<FAMILY>::tag(CONNECT, (KEY, Side::Backend));
    let refused = stage.complete(refused, Err(Errno::ECONNREFUSED), None);
    assert!(matches!(refused, Completion::Connected(KEY, Err(Errno::ECONNREFUSED))));
}

#[test]
fn why_a_receive_ended_is_told_apart() {
    let mut stage = Stage::new(None);
    let mut ended = |errno| {
        let tag = Streams::<FAMILY>::tag(RECEIVE, (KEY, Side::Client));
        match stage.complete(tag, Err(errno), None) {
            Completion::Happened(_, Event::Received { what, .. }) => what,
            _ => panic!("a receive is about a session"),
        }
    };
    assert!(matches!(ended(Errno::ENOBUFS), Received::NoBuffers));
    for errno in [Errno::ECANCELED, Errno::EINTR, Errno::EAGAIN] {
        assert!(matches!(ended(errno), Received::Stopped), "{errno}");
    }
    assert!(matches!(ended(Errno::ECONNRESET), Received::Failed(Errno::ECONNRESET)));
}

#[test]
fn who_is_shed_hears_why_until_a_closed_socket_gives_a_descriptor_back() {
    let mut stage = Stage::new(Some(b"no room"));
    let pair = || UnixStream::pair().unwrap();
    assert!(matches!(stage.accept(Err(Errno::EMFILE), None), Completion::Nothing));
    let refused = |stage: &Stage| stage.counted(|it| it.counters.users_refused_exhausted.get());
    let (mut user, ours) = pair();
    assert!(matches!(stage.accept(Ok(0), Some(ours.into())), Completion::Nothing));
    let mut said = String::new();
    user.read_to_string(&mut said).unwrap();
    assert_eq!((said.as_str(), refused(&stage)), ("no room", 1));
    assert_eq!(stage.counted(|it| it.counters.accept_failed.get()), 1);

    assert!(matches!(stage.accept(Err(Errno::EMFILE), None), Completion::Nothing));
    stage.streams.keep((KEY, Side::Backend), File::open("/dev/null").unwrap().into());
    stage.streams.close((KEY, Side::Backend), false, &mut stage.ring);
    assert!(stage.streams.socket((KEY, Side::Backend)).is_none());
    // Nobody is shed any more: this one is a user, though without an address.
    let (mut user, ours) = pair();
    assert!(matches!(stage.accept(Ok(0), Some(ours.into())), Completion::Nothing));
    assert_eq!((user.read_to_string(&mut said).unwrap(), refused(&stage)), (0, 1));
}

#[test]
fn held_back_flows_are_counted_until_they_are_answered() {
    let mut stage = Stage::new(None);
    let (ours, _peer) = UnixStream::pair().unwrap();
    stage.streams.keep((KEY, Side::Client), ours.into());
    let Stage { streams, ring, joined } = &mut stage;
    let books = &mut joined.books;
    let what = proxy::StreamCmd::AwaitRoom { side: Side::Client, first: false };
    streams.operate(KEY, what, &mut Turn { now: Now::default(), ring, books });
    assert_eq!(stage.counted(|it| it.counters.flows_held_back.get()), 1);
    let room = Streams::<FAMILY>::tag(ROOM, (KEY, Side::Client));
    let room = stage.complete(room, Ok(0), None);
    assert!(matches!(room, Completion::Happened(KEY, Event::Room { side: Side::Client })));
    assert_eq!(stage.counted(|it| it.counters.flows_held_back.get()), 0);
}

#[test]
fn what_a_peer_has_not_taken_is_seen() {
    let mut stage = Stage::new(None);
    let door = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = std::net::TcpStream::connect(door.local_addr().unwrap()).unwrap();
    let (_peer, _) = door.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 65_536]).is_ok() {}
    let end = (KEY, Side::Client);
    assert_eq!(stage.streams.look(end), Outlook::default(), "there is no socket yet");
    stage.streams.keep(end, ours.into());
    assert!(stage.streams.look(end).queued > 0);
}
