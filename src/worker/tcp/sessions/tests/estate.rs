//! Sessions that another worker goes on with, and records that nobody has written.

use zerocopy::IntoBytes;

use super::*;
use crate::base::random::xorshift;
use crate::estate::Parcel;
use crate::estate::tcp::SessionRecord;
use crate::proxy::{Spliced, StreamCmd};
use crate::tls::backends::BackendTls;
use crate::worker::books::estate::{Named, Names};

type Left = (Vec<SessionRecord>, Parcel<i32>);

impl Stage {
    /// What it leaves of its running sessions.
    fn left(&mut self) -> Left {
        let (mut names, mut parcel) = (Names::default(), Parcel::default());
        let keys = self.sessions.movable(|_| false);
        let describe = |key| {
            self.act(|sessions, cx| sessions.describe(key, &mut names, &mut parcel, cx)).unwrap()
        };
        let records = keys.into_iter().map(describe).collect();
        (records, parcel)
    }

    fn take_up(&mut self, record: &SessionRecord, parcel: &Parcel<i32>) -> Result<Key, String> {
        let mut services = Named::new(Protocol::Tcp);
        self.act(|sessions, cx| sessions.take_up(record, None, (&mut services, parcel), cx))
    }

    /// Another worker that goes on with everything.
    fn elsewhere(&mut self) -> (Stage, Vec<Key>) {
        let (records, parcel) = self.left();
        let mut new = Stage::with(3);
        new.books.succeed(self.books.describe_places());
        new.now = self.now;
        let keys = records.iter().map(|record| new.take_up(record, &parcel).unwrap()).collect();
        new.books.settle();
        (new, keys)
    }

    /// Everything that was begun by these commands is over, after all sessions were told to end.
    fn end(&mut self, mut begun: Vec<Cmd>) {
        self.act(|sessions, cx| sessions.order(Order::Stop, cx));
        begun.extend(self.said());
        for cmd in begun {
            match cmd {
                Cmd::Connect { key, .. } => {
                    self.act(|sessions, cx| sessions.connected(key, Err(Errno::ECANCELED), cx));
                }
                Cmd::Relay { key, what } => {
                    let event = match what {
                        StreamCmd::Receive { side, .. } => {
                            let what = Received::Stopped;
                            Event::Received { side, what, more: false, nonempty: false }
                        }
                        StreamCmd::Send { side, .. } => {
                            Event::Sent { side, result: Err(Errno::ECANCELED) }
                        }
                        StreamCmd::AwaitRoom { side, .. } => Event::Room { side },
                        StreamCmd::Splice { side, .. } => {
                            let how = Spliced::Stopped;
                            Event::Spliced { side, moved: 0, held: 0, how }
                        }
                        _ => continue,
                    };
                    self.act(|sessions, cx| sessions.relayed(key, event, cx));
                }
                _ => {}
            }
        }
        self.said();
        // Some may wait for a reader.
        self.wait(Duration::from_secs(100));
    }
}

#[test]
fn a_session_stands_still_elsewhere_as_it_did_and_goes_on_there() {
    let mut stage = Stage::new();
    let running = stage.session();
    stage.data(running, Client, 100);
    stage.relayed(running, Event::Sent { side: Backend, result: Ok(40) });
    let what = Event::Sent { side: Backend, result: Ok(10) };
    stage.act(|sessions, cx| sessions.note(running, what, cx));
    stage.now = stage.now.plus(Duration::from_secs(5));
    let user: SocketAddr = "192.0.2.1:7".parse().unwrap();
    stage.act(|sessions, cx| sessions.seat(SERVICE, Caller::from(user), cx)).unwrap();
    while stage.control.reports.pop().is_ok() {}
    let views: Vec<_> = stage.control.shard.iter().collect();
    let (mut new, keys) = stage.elsewhere();
    assert_eq!(new.control.shard.iter().collect::<Vec<_>>(), views);
    assert_eq!(new.said(), [], "it stands still");
    let said = new.thaw();
    let connects: Vec<_> = said.iter().filter(|cmd| matches!(cmd, Cmd::Connect { .. })).collect();
    let Cmd::Connect { key, .. } = connects[0] else { unreachable!() };
    assert_eq!((connects.len(), *key), (1, keys[1]));
    let of_running = said.iter().filter(|cmd| matches!(cmd, Cmd::Relay { .. })).count();
    assert_eq!(of_running, 3, "one send and two receives: {said:?}");
    new.relayed(keys[0], Event::Sent { side: Backend, result: Ok(50) });
    assert_eq!(new.control.shard.read(0).unwrap().bytes_up, 100);
    assert!(new.control.reports.pop().is_err(), "nobody is new");
    new.act(|sessions, cx| sessions.connected(keys[1], Ok(()), cx));
    assert!(matches!(new.control.reports.pop(), Ok(Report::Started { .. })));
}

#[test]
fn what_a_backend_is_told_under_tls_goes_on_nowhere_else() {
    let user = Caller::from("192.0.2.1:7".parse::<SocketAddr>().unwrap());
    for is_sealed in [false, true] {
        let mut stage = Stage::new();
        let mut sealed = backends(&[1]);
        sealed[0].tls = is_sealed.then(BackendTls::default);
        let snapshot = stage.books.snapshot().clone().with(&sealed);
        stage.books.adopt(Arc::new(snapshot));
        stage.act(|sessions, cx| sessions.seat(SERVICE, user, cx)).unwrap();
        assert_eq!(stage.sessions.movable(|_| false).is_empty(), is_sealed);
    }
}

#[test]
fn how_long_a_session_has_been_still_counts_elsewhere() {
    let mut stage = Stage::new();
    stage.session();
    stage.wait(IDLE / 2);
    let (mut new, _) = stage.elsewhere();
    let begun = new.thaw();
    new.wait(IDLE / 2);
    assert!(new.sessions.live() == 1 && new.looks > 0);
    new.end(begun);
    let ended = new.ended().unwrap();
    assert_eq!((ended.started, ended.reason), (START, EndReason::Idle));
}

#[test]
fn who_was_offered_backends_in_vain_is_not_offered_them_again() {
    let mut stage = Stage::with(3);
    let user: SocketAddr = "192.0.2.1:7".parse().unwrap();
    let key = stage.act(|sessions, cx| sessions.accepted(SERVICE, user, cx)).unwrap();
    for _ in 0..2 {
        let refused = Err(Errno::ECONNREFUSED);
        stage.act(|sessions, cx| sessions.connected(key, refused, cx));
    }
    let (mut new, keys) = stage.elsewhere();
    new.thaw();
    let refused = Err(Errno::ECONNREFUSED);
    new.act(|sessions, cx| sessions.connected(keys[0], refused, cx));
    let reports: Vec<_> = std::iter::from_fn(|| new.control.reports.pop().ok()).collect();
    let turned_away = Report::Refused { service: SERVICE, client: user, why: Refusal::Unreachable };
    assert!(reports.contains(&turned_away), "{reports:?}");
}

#[test]
fn a_stranger_is_looked_at_where_it_was_left() {
    let mut stage = Stage::new();
    let user: SocketAddr = "192.0.2.1:7".parse().unwrap();
    let caller = Caller { is_stranger: true, ..Caller::from(user) };
    let key = stage.act(|sessions, cx| sessions.welcome(SERVICE, caller, false, cx)).unwrap();
    stage.act(|sessions, cx| sessions.connected(key, Ok(()), cx));
    let say = |stage: &mut Stage, key, text: &[u8]| {
        let mut buf = stage.pool.take(Class::Small).unwrap();
        stage.pool.append(&mut buf, text);
        let what = Received::Data(buf);
        stage.relayed(key, Event::Received { side: Client, what, more: true, nonempty: false });
    };
    say(&mut stage, key, b"PRO");
    let sent = Event::Sent { side: Backend, result: Ok(3) };
    stage.relayed(key, sent);
    let (mut new, keys) = stage.elsewhere();
    new.thaw();
    say(&mut new, keys[0], b"XY TCP4 ");
    let refused = |report| matches!(report, Report::Refused { why: Refusal::ProxyHeader, .. });
    assert!(std::iter::from_fn(|| new.control.reports.pop().ok()).any(refused));
}

#[test]
fn what_no_session_can_be_is_refused_in_words() {
    let mut stage = Stage::new();
    let key = stage.session();
    stage.data(key, Client, 10);
    stage.relayed(key, Event::Sent { side: Backend, result: Ok(10) });
    let (records, parcel) = stage.left();
    let mut new = Stage::new();
    let mut refused = |change: &dyn Fn(&mut SessionRecord)| {
        let mut record = records[0];
        change(&mut record);
        new.take_up(&record, &parcel).unwrap_err()
    };
    assert!(refused(&|it| it.flags |= 64).contains("unknown flags"));
    assert!(refused(&|it| it.tried = 9).contains("too many backends"));
    assert!(refused(&|it| it.portless = 2).contains("too many backends"));
    assert!(refused(&|it| it.screened = 13).contains("stranger"));
    assert!(refused(&|it| it.entry.bytes_up = 11.into()).contains("booked"));
    assert!(refused(&|it| it.entry.service.len = 99.into()).contains("service"));
    let header = |it: &mut SessionRecord| {
        it.screened = 6;
        it.screen[..6].copy_from_slice(b"PROXY ");
    };
    assert!(refused(&header).contains("PROXY header"));
    assert_eq!(new.sessions.live(), 0);
    assert_eq!(new.pool.free(Class::Small), 256);
}

#[test]
fn no_record_whatever_is_in_it_does_any_harm() {
    let mut stage = Stage::new();
    for number in 0..6 {
        let key = stage.session();
        for side in [Client, Backend] {
            stage.data(key, side, 50 * number);
        }
        for side in [Client, Backend] {
            let sent = Event::Sent { side, result: Ok(20 * number as u32) };
            stage.act(|sessions, cx| sessions.note(key, sent, cx));
        }
    }
    let user: SocketAddr = "192.0.2.1:7".parse().unwrap();
    stage.act(|sessions, cx| sessions.seat(SERVICE, Caller::from(user), cx)).unwrap();
    let (records, parcel) = stage.left();
    let mut random = xorshift(0x5eed_1e55_5eed_1e55);
    let mut new = Stage::new();
    new.books.succeed(stage.books.describe_places());
    let mut taken = 0;
    for round in 0..20_000 {
        let mut record = records[round % records.len()];
        for _ in 0..=random(3) {
            let bytes = record.as_mut_bytes();
            let at = random(bytes.len() as u64) as usize;
            bytes[at] = match random(3) {
                0 => random(256) as u8,
                1 => u8::MAX,
                _ => bytes[at] ^ 1 << random(8),
            };
        }
        let now = new.now;
        new.sessions = Sessions::new(Features { receive_cap: true, splice: true }, now);
        if new.take_up(&record, &parcel).is_ok() {
            taken += 1;
            let begun = new.thaw();
            new.end(begun);
        }
        assert_eq!(new.sessions.live(), 0, "round {round}: {record:?}");
        assert_eq!(new.pool.free(Class::Small), 256, "round {round}: {record:?}");
        while new.control.reports.pop().is_ok() {}
    }
    assert!(taken > 3_000, "{taken} were taken up");
    assert_eq!(new.control.metrics.counters.sessions_active.get(), 0);
}
