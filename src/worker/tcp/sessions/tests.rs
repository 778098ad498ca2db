//! The life of a TCP session, played by hand: events in, commands out, against one worker's books.

mod estate;
mod still;

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::balance::tests::backends;
use crate::cluster::{self, Protocol, Snapshot};
use crate::proxy::Side::{Backend, Client};
use crate::proxy::outlook::{GIVEN_UP_AFTER, LOOK_EVERY, Outlook};
use crate::ring::pool::Class;
use crate::worker::books::Books;
use crate::worker::books::tests::{Joined, joined};
use crate::worker::link::{ControlEnd, Ended, Report};
use crate::worker::starved::{FED_MAX, WAIT_MAX};

const SERVICE: ServiceId = ServiceId::built_in(Protocol::Tcp);
const START: Now = Now::from_nanos(1_000_000_000);

/// A worker with one backend, whose sockets are played by hand.
struct Stage {
    sessions: Sessions,
    books: Books,
    control: ControlEnd,
    pool: Pool,
    now: Now,
    said: Vec<Cmd>,
    /// What the kernel says of the send queues towards the client and the backend.
    outlooks: [Outlook; 2],
    looks: usize,
}

impl Stage {
    fn new() -> Stage {
        Stage::with(1)
    }

    /// With `count` backends.
    fn with(count: usize) -> Stage {
        let snapshot = Snapshot::default().with(&backends(&vec![1; count]));
        let Joined { books, control, .. } = joined(snapshot, 1000);
        let features = Features { receive_cap: true, splice: false };
        Stage {
            sessions: Sessions::new(features, START),
            books,
            control,
            pool: Pool::new(256, 16),
            now: START,
            said: Vec::new(),
            outlooks: [Outlook::default(); 2],
            looks: 0,
        }
    }

    fn act<T>(&mut self, what: impl FnOnce(&mut Sessions, &mut Cx<'_>) -> T) -> T {
        let Stage { sessions, books, pool, now, said, .. } = self;
        what(sessions, &mut Cx { now: *now, pool, books, out: said })
    }

    /// What was commanded since the last time, apart from looks, which are answered.
    fn said(&mut self) -> Vec<Cmd> {
        while let Some(at) = self.said.iter().position(|cmd| matches!(cmd, Cmd::Look { .. })) {
            let Cmd::Look { key } = self.said.remove(at) else { unreachable!() };
            self.looks += 1;
            let outlooks = self.outlooks;
            self.act(|sessions, cx| sessions.told(key, outlooks, cx));
        }
        std::mem::take(&mut self.said)
    }

    /// A session that relays.
    fn session(&mut self) -> Key {
        let client = "192.0.2.1:1000".parse().unwrap();
        let key = self.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
        self.act(|sessions, cx| sessions.connected(key, Ok(()), cx));
        self.said();
        key
    }

    fn relayed(&mut self, key: Key, event: Event) -> Vec<Cmd> {
        self.act(|sessions, cx| sessions.relayed(key, event, cx));
        self.said()
    }

    fn data(&mut self, key: Key, side: Side, bytes: usize) -> Vec<Cmd> {
        let mut buf = self.pool.take(Class::Small).unwrap();
        self.pool.append(&mut buf, &vec![7; bytes]);
        let what = Received::Data(buf);
        self.relayed(key, Event::Received { side, what, more: true, nonempty: false })
    }

    fn over(&mut self, key: Key, side: Side, what: Received) -> Vec<Cmd> {
        self.relayed(key, Event::Received { side, what, more: false, nonempty: false })
    }

    fn wait(&mut self, time: Duration) -> Vec<Cmd> {
        self.now = self.now.plus(time);
        self.act(|sessions, cx| sessions.expire(cx));
        let said = self.said();
        self.said = said;
        self.relieve()
    }

    fn relieve(&mut self) -> Vec<Cmd> {
        self.act(|sessions, cx| sessions.relieve(cx));
        self.said()
    }

    fn ended(&mut self) -> Option<Ended> {
        std::iter::from_fn(|| self.control.reports.pop().ok()).find_map(|report| match report {
            Report::Ended(ended) => Some(ended),
            _ => None,
        })
    }
}

const IDLE: Duration = Duration::from_secs(3601);

#[test]
fn a_connection_that_did_not_come_about_in_time_is_reported_as_such() {
    let mut stage = Stage::new();
    let client = "192.0.2.1:1000".parse().unwrap();
    let key = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
    stage.now = stage.now.plus(2 * Timeouts::default().connect);
    stage.act(|sessions, cx| sessions.expire(cx));
    assert_eq!(stage.said().last(), Some(&Cmd::CancelConnect { key }));
    let cancelled = Err(Errno::ECANCELED);
    stage.act(|sessions, cx| sessions.connected(key, cancelled, cx));
    let report = stage.control.reports.pop().unwrap();
    assert!(
        matches!(report, Report::ConnectFailed { errno, .. } if errno == Errno::ETIMEDOUT as i32),
        "{report:?}"
    );
}

#[test]
fn want_of_our_own_is_not_blamed_on_a_backend() {
    let mut stage = Stage::new();
    let client = "192.0.2.1:1000".parse().unwrap();
    let key = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
    let full = Err(Errno::EMFILE);
    stage.act(|sessions, cx| sessions.connected(key, full, cx));
    let refused = Report::Refused { service: SERVICE, client, why: Refusal::Exhausted };
    assert_eq!(stage.control.reports.pop(), Ok(refused));
    let counters = &stage.control.metrics.counters;
    let counted = [&counters.users_refused_exhausted, &counters.users_refused_unreachable];
    assert_eq!(counted.map(|counter| counter.get()), [1, 0]);
    assert_eq!(counters.connects_failed.get(), 0);
}

#[test]
fn a_session_goes_by_the_service_of_its_door() {
    let other = ServiceId(7);
    let mut stage = Stage::new();
    let client = "192.0.2.1:1000".parse().unwrap();
    let before = stage.books.snapshot().clone();
    let mut service = before.service(SERVICE).unwrap().clone();
    (service.id, service.pool) = (other, Arc::default());
    service.terms.timeouts.connect = Duration::from_millis(10);
    let services: Vec<_> = before.services.iter().cloned().chain([service]).collect();
    let backends = [SERVICE, other].into_iter().zip(backends(&[1, 1]));
    let backends: Vec<_> =
        backends.map(|(service, it)| cluster::Backend { service, ..it }).collect();
    let snapshot = Snapshot { services: services.into(), ..before }.with(&backends);
    stage.books.adopt(Arc::new(snapshot));
    for round in 0..3 {
        for (service, backend) in [SERVICE, other].into_iter().zip(&backends) {
            let key = stage.act(|sessions, cx| sessions.accepted(service, client, cx)).unwrap();
            let connect = Cmd::Connect { key, to: backend.address };
            assert_eq!(stage.said(), [connect], "round {round}");
        }
    }
    stage.now = stage.now.plus(Duration::from_millis(30));
    stage.act(|sessions, cx| sessions.expire(cx));
    let late = stage.said();
    assert_eq!(late.len(), 3, "only the other service's connections are late: {late:?}");
    let Cmd::CancelConnect { key } = late[0] else { panic!("{late:?}") };
    stage.act(|sessions, cx| sessions.connected(key, Err(Errno::ECONNREFUSED), cx));
    let refused = std::iter::from_fn(|| stage.control.reports.pop().ok()).find_map(|it| match it {
        Report::Refused { service, .. } => Some(service),
        _ => None,
    });
    assert_eq!(refused, Some(other), "there is no other backend in its service");
    let gone = ServiceId(8);
    let key = stage.act(|sessions, cx| sessions.accepted(gone, client, cx));
    assert_eq!(key, None, "no service, no session");
}

#[test]
fn other_timeouts_hold_for_what_moves_next_and_a_deadline_that_is_set_stands() {
    let mut stage = Stage::new();
    let client = "192.0.2.1:1000".parse().unwrap();
    let cancelled = |stage: &mut Stage, at_ms: u64| {
        stage.now = START.plus(Duration::from_millis(at_ms));
        stage.act(|sessions, cx| sessions.expire(cx));
        let cancelled = |cmd| match cmd {
            Cmd::CancelConnect { key } => Some(key),
            _ => None,
        };
        stage.said().into_iter().filter_map(cancelled).collect::<Vec<_>>()
    };
    let before = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
    let mut snapshot = stage.books.snapshot().clone();
    for service in &mut snapshot.services {
        // The other services' are shorter still.
        let ms = if service.id == SERVICE { 500 } else { 10 };
        service.terms.timeouts.connect = Duration::from_millis(ms);
    }
    stage.books.adopt(Arc::new(snapshot));
    let after = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
    assert_eq!(cancelled(&mut stage, 490), []);
    assert_eq!(cancelled(&mut stage, 520), [after]);
    assert_eq!(cancelled(&mut stage, 2_980), []);
    assert_eq!(cancelled(&mut stage, 3_020), [before]);
}

#[test]
fn want_of_a_port_towards_one_backend_leads_to_the_next_and_sets_none_aside() {
    let mut stage = Stage::with(2);
    let (client, portless) = ("192.0.2.1:1000".parse().unwrap(), Errno::EADDRNOTAVAIL);
    let key = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
    let [Cmd::Connect { to: first, .. }] = stage.said()[..] else { panic!() };
    stage.act(|sessions, cx| sessions.connected(key, Err(portless), cx));
    let [Cmd::Connect { to: second, .. }] = stage.said()[..] else { panic!() };
    assert_ne!(first, second);
    stage.act(|sessions, cx| sessions.connected(key, Ok(()), cx));
    assert_eq!(stage.said().len(), 2, "both sides are read");
    let told = std::iter::from_fn(|| stage.control.reports.pop().ok()).collect::<Vec<_>>();
    assert!(matches!(told[..], [Report::Started { .. }]), "{told:?}");
    let counters = &stage.control.metrics.counters;
    let counted = [&counters.connects_without_port, &counters.connects_failed];
    assert_eq!(counted.map(|counter| counter.get()), [1, 0]);
    // The next user is offered the first again: it is not aside.
    let offered: Vec<_> = (0..2)
        .map(|_| {
            stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx));
            let [Cmd::Connect { to, .. }] = stage.said()[..] else { panic!() };
            to
        })
        .collect();
    assert!(offered.contains(&first), "{offered:?}");
}

#[test]
fn backends_that_could_not_be_asked_do_not_use_up_the_attempts() {
    let mut stage = Stage::with(10);
    let client = "192.0.2.1:1000".parse().unwrap();
    for (errno, offers, why) in [
        (Errno::ECONNREFUSED, ATTEMPTS_MAX, Refusal::Unreachable),
        (Errno::EADDRNOTAVAIL, OFFERS_MAX, Refusal::Exhausted),
    ] {
        let key = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
        let mut offered = Vec::new();
        while let [Cmd::Connect { to, .. }] = stage.said()[..] {
            assert!(!offered.contains(&to), "each once");
            offered.push(to);
            stage.act(|sessions, cx| sessions.connected(key, Err(errno), cx));
        }
        assert_eq!(offered.len(), offers);
        let refused = Report::Refused { service: SERVICE, client, why };
        let told = std::iter::from_fn(|| stage.control.reports.pop().ok());
        assert!(told.into_iter().any(|report| report == refused));
    }
}

#[test]
fn a_session_that_was_still_ends_without_a_reset() {
    let mut stage = Stage::new();
    let key = stage.session();
    assert_eq!(stage.wait(IDLE).len(), 2, "both receives are cancelled");
    assert_eq!(stage.over(key, Client, Received::Stopped), []);
    assert_eq!(stage.over(key, Backend, Received::Stopped), [Cmd::Close { key, reset: false }]);
    assert_eq!(stage.ended().unwrap().reason, EndReason::Idle);
}

#[test]
fn a_half_closed_session_has_its_time_from_the_end_on() {
    let mut stage = Stage::new();
    let key = stage.session();
    assert_eq!(stage.wait(Duration::from_secs(3000)), [], "still, but not for too long");
    stage.over(key, Client, Received::End);
    assert_eq!(stage.wait(Duration::from_secs(59)), []);
    assert_eq!(stage.wait(Duration::from_secs(2)).len(), 1);
    stage.over(key, Backend, Received::Stopped);
    assert_eq!(stage.ended().unwrap().reason, EndReason::HalfCloseIdle);
}

#[test]
fn sessions_that_ended_while_they_waited_keep_no_block_from_the_living() {
    let mut stage = Stage::new();
    let dead: Vec<_> = (0..=FED_MAX).map(|_| stage.session()).collect();
    let living = stage.session();
    for key in dead {
        stage.over(key, Client, Received::NoBuffers);
        stage.over(key, Backend, Received::Failed(Errno::ECONNRESET));
    }
    assert_eq!(stage.sessions.live(), 1);
    stage.over(living, Client, Received::NoBuffers);
    let said = stage.relieve();
    assert!(matches!(said[..], [Cmd::Relay { key, .. }] if key == living), "{said:?}");
    assert!(!stage.sessions.is_starved());
}

#[test]
fn who_waits_for_blocks_tries_again_though_none_seems_free() {
    let mut stage = Stage::new();
    let key = stage.session();
    let posted: Vec<_> = std::iter::from_fn(|| stage.pool.take(Class::Small)).collect();
    stage.over(key, Client, Received::NoBuffers);
    assert_eq!(stage.relieve(), [], "no block has come back");
    assert_eq!(stage.sessions.next_deadline(), Some(stage.now.plus(WAIT_MAX)));
    assert_eq!(stage.wait(WAIT_MAX).len(), 1);
    assert_eq!(stage.wait(WAIT_MAX), [], "once");
    posted.into_iter().for_each(|buf| stage.pool.give_back(buf));
}

#[test]
fn bytes_that_come_while_a_session_ends_make_a_reset_of_it() {
    let mut stage = Stage::new();
    let key = stage.session();
    stage.wait(IDLE);
    assert_eq!(stage.data(key, Client, 10), []);
    stage.over(key, Client, Received::Stopped);
    assert_eq!(stage.over(key, Backend, Received::Stopped), [Cmd::Close { key, reset: true }]);
    assert_eq!(stage.pool.free(Class::Small), 256);
}

/// A reader who has closed its window, and answers every probe.
fn paused(queued: u32) -> Outlook {
    Outlook { queued, acknowledged: 100, ..Outlook::default() }
}

/// A host of which nothing is heard any more.
fn silent(queued: u32, seconds: u64) -> Outlook {
    Outlook { owed: true, heard_ago: Duration::from_secs(seconds), ..paused(queued) }
}

/// A session whose backend has answered with `bytes` bytes and then reset the connection.
fn reset_behind(stage: &mut Stage, bytes: u32) -> Key {
    let key = stage.session();
    stage.data(key, Backend, bytes as usize);
    stage.relayed(key, Event::Sent { side: Client, result: Ok(bytes) });
    stage.over(key, Backend, Received::Failed(Errno::ECONNRESET));
    key
}

#[test]
fn a_reset_waits_for_what_was_sent_before_it() {
    let mut stage = Stage::new();
    stage.outlooks[Client as usize] = paused(40);
    let key = reset_behind(&mut stage, 100);
    assert_eq!(stage.over(key, Client, Received::Stopped), []);
    assert_eq!(stage.sessions.live(), 1);
    assert_eq!(stage.wait(Duration::from_secs(600)), [], "it is slow, and alive");
    stage.outlooks[Client as usize] = Outlook::default();
    assert_eq!(stage.wait(Duration::from_secs(1)), [Cmd::Close { key, reset: true }]);
    let ended = stage.ended().unwrap();
    assert_eq!((ended.reason, ended.bytes_down), (EndReason::BackendReset, 100));
    assert_eq!(stage.control.metrics.counters.bytes_undelivered.get(), 0);
}

#[test]
fn what_was_never_delivered_is_not_counted_as_delivered() {
    for (outlook, wait) in [
        (Outlook { dead: true, ..paused(40) }, Duration::ZERO),
        (silent(40, 0), GIVEN_UP_AFTER + Duration::from_secs(1)),
        (paused(40), IDLE),
    ] {
        let mut stage = Stage::new();
        stage.outlooks[Client as usize] = outlook;
        let key = reset_behind(&mut stage, 100);
        let mut said = stage.over(key, Client, Received::Stopped);
        for _ in 0..8 {
            stage.outlooks[Client as usize].heard_ago += wait / 8;
            said.extend(stage.wait(wait / 8));
        }
        assert_eq!(said, [Cmd::Close { key, reset: true }], "{outlook:?}");
        assert_eq!(stage.ended().unwrap().bytes_down, 60);
        assert_eq!(stage.control.metrics.counters.bytes_undelivered.get(), 40);
    }
}

#[test]
fn an_orderly_end_is_over_when_all_of_it_has_arrived() {
    for (then, reason, reset) in [
        (Outlook::default(), EndReason::Finished, false),
        // Only the FIN is still on its way.
        (paused(1), EndReason::Finished, false),
        (Outlook { dead: true, ..paused(41) }, EndReason::ClientReset, true),
    ] {
        let mut stage = Stage::new();
        let key = stage.session();
        stage.data(key, Backend, 100);
        stage.relayed(key, Event::Sent { side: Client, result: Ok(100) });
        stage.outlooks[Client as usize] = paused(41);
        stage.over(key, Backend, Received::End);
        assert_eq!(stage.over(key, Client, Received::End).len(), 1, "a FIN, and no end yet");
        stage.outlooks[Client as usize] = then;
        assert_eq!(stage.wait(Duration::from_secs(1)), [Cmd::Close { key, reset }]);
        let ended = stage.ended().unwrap();
        let down = if reset { 60 } else { 100 };
        assert_eq!((ended.reason, ended.bytes_down), (reason, down));
    }
}

#[test]
fn who_has_ordered_an_end_does_not_wait_for_a_slow_reader() {
    for (reason, grace) in [(EndReason::Operator, 5), (EndReason::Stopping, 1)] {
        for before in [false, true] {
            let mut stage = Stage::new();
            stage.outlooks[Client as usize] = paused(40);
            let key = if before { stage.session() } else { reset_behind(&mut stage, 100) };
            if before {
                stage.data(key, Backend, 100);
                stage.relayed(key, Event::Sent { side: Client, result: Ok(100) });
            } else {
                stage.over(key, Client, Received::Stopped);
            }
            let order = Order::EndBackend { backend: BackendId(1), reason };
            stage.act(|sessions, cx| sessions.order(order, cx));
            for side in Side::BOTH.into_iter().filter(|_| before) {
                stage.over(key, side, Received::Stopped);
            }
            assert_eq!(stage.wait(Duration::from_millis(1000 * grace - 100)), []);
            let said = stage.wait(Duration::from_millis(200));
            assert_eq!(said, [Cmd::Close { key, reset: true }]);
            assert_eq!(stage.ended().unwrap().bytes_down, 60);
        }
    }
}

#[test]
fn a_session_whose_reader_takes_something_now_and_then_is_not_still() {
    let mut stage = Stage::new();
    let key = stage.session();
    stage.data(key, Backend, 100);
    stage.relayed(key, Event::Sent { side: Client, result: Ok(100) });
    stage.outlooks[Client as usize] = paused(40);
    for _ in 0..IDLE.as_secs() / 5 {
        stage.outlooks[Client as usize].acknowledged += 1;
        assert_eq!(stage.wait(2 * LOOK_EVERY), []);
    }
    assert_eq!(stage.wait(Duration::from_secs(3500)), []);
    assert_eq!(stage.wait(Duration::from_secs(120)).len(), 2, "then it is");
    stage.over(key, Client, Received::Stopped);
    // Who has been still for so long has had its time.
    let reset = Cmd::Close { key, reset: true };
    assert_eq!(stage.over(key, Backend, Received::Stopped), [reset]);
    let ended = stage.ended().unwrap();
    assert_eq!((ended.reason, ended.bytes_down), (EndReason::Idle, 60));
}

#[test]
fn a_host_that_vanished_is_noticed_though_bytes_are_still_sent_to_it() {
    let mut stage = Stage::new();
    let key = stage.session();
    let mut said = Vec::new();
    let mut waited = 0;
    while said.is_empty() {
        stage.data(key, Backend, 1);
        stage.relayed(key, Event::Sent { side: Client, result: Ok(1) });
        stage.outlooks[Client as usize] = silent(waited as u32 + 1, waited);
        said = stage.wait(Duration::from_secs(1));
        waited += 1;
    }
    assert!((60..=76).contains(&waited), "after {waited} s");
    assert_eq!(said.len(), 2, "both receives are cancelled");
    stage.over(key, Client, Received::Stopped);
    let reset = Cmd::Close { key, reset: true };
    assert_eq!(stage.over(key, Backend, Received::Stopped), [reset]);
    assert_eq!(stage.ended().unwrap().reason, EndReason::Idle);
}

#[test]
fn who_is_sent_nothing_more_and_has_taken_all_is_looked_at_once() {
    let mut stage = Stage::new();
    let key = stage.session();
    for _ in 0..1000 {
        stage.data(key, Backend, 100);
        stage.relayed(key, Event::Sent { side: Client, result: Ok(100) });
    }
    (0..600).for_each(|_| drop(stage.wait(Duration::from_secs(1))));
    assert_eq!(stage.looks, 1);
}

#[test]
fn bytes_that_are_delivered_while_a_session_ends_are_counted() {
    let mut stage = Stage::new();
    let key = stage.session();
    stage.data(key, Client, 10);
    let stop = Order::Stop;
    stage.act(|sessions, cx| sessions.order(stop, cx));
    stage.over(key, Client, Received::Stopped);
    stage.over(key, Backend, Received::Stopped);
    stage.relayed(key, Event::Sent { side: Backend, result: Ok(4) });
    assert_eq!(stage.ended().unwrap().bytes_up, 4);
}

/// Bytes that the session's user sends; whether any are sent on.
fn says(stage: &mut Stage, key: Key, bytes: &[u8]) -> bool {
    let mut buf = stage.pool.take(Class::Small).unwrap();
    stage.pool.append(&mut buf, bytes);
    let what = Received::Data(buf);
    let event = Event::Received { side: Client, what, more: true, nonempty: false };
    let said = stage.relayed(key, event);
    let sent = said.iter().find_map(|cmd| match cmd {
        Cmd::Relay { what: proxy::StreamCmd::Send { side: Backend, what }, .. } => Some(*what),
        _ => None,
    });
    let Some(sent) = sent else { return false };
    let count = stage.pool.pieces(sent).map(<[u8]>::len).sum::<usize>() as u32;
    stage.relayed(key, Event::Sent { side: Backend, result: Ok(count) });
    true
}

#[test]
fn a_strangers_header_is_not_passed_on_once_it_can_be_told() {
    for (pieces, refused) in [
        (&[&b"PROXY UNKNOWN\r\n"[..]][..], true),
        (&[b"P", b"ROXY", b" "], true),
        (&[b"\r\n\r\n\0\r", b"\nQUIT\n!"], true),
        (&[b"PROXY", b"!", b"PROXY UNKNOWN\r\n"], false),
        (&[b"hello", b"PROXY UNKNOWN\r\n"], false),
    ] {
        for is_stranger in [true, false] {
            let mut stage = Stage::new();
            let free = stage.pool.free(Class::Small);
            let address: SocketAddr = "192.0.2.1:1000".parse().unwrap();
            let caller = Caller { is_stranger, ..Caller::from(address) };
            let key =
                stage.act(|sessions, cx| sessions.welcome(SERVICE, caller, false, cx)).unwrap();
            stage.act(|sessions, cx| sessions.connected(key, Ok(()), cx));
            stage.said();
            let (last, first) = pieces.split_last().unwrap();
            assert!(first.iter().all(|piece| says(&mut stage, key, piece)), "{pieces:?}");
            assert_eq!(says(&mut stage, key, last), !(refused && is_stranger), "{pieces:?}");
            let counted = stage.control.metrics.counters.users_refused_proxy_header.get();
            assert_eq!(counted, u64::from(refused && is_stranger));
            if counted == 0 {
                continue;
            }
            stage.over(key, Client, Received::Stopped);
            let said = stage.over(key, Backend, Received::Stopped);
            assert_eq!(said, [Cmd::Close { key, reset: true }]);
            assert_eq!(stage.ended().unwrap().reason, EndReason::ProxyHeader);
            assert_eq!(stage.pool.free(Class::Small), free, "no block is lost");
        }
    }
}

#[test]
fn a_backend_that_wants_a_header_is_told_of_the_user_at_each_attempt() {
    let told = |proxy: bool| {
        let mut all = backends(&[1, 1]);
        all.iter_mut().for_each(|backend| backend.proxy = proxy);
        let mut stage = Stage::new();
        stage.books.adopt(Arc::new(Snapshot::default().with(&all)));
        let destination = "192.0.2.9:80".parse().ok();
        let user: SocketAddr = "192.0.2.1:1000".parse().unwrap();
        let caller = Caller { destination, ..Caller::from(user) };
        let key = stage.act(|sessions, cx| sessions.welcome(SERVICE, caller, false, cx)).unwrap();
        let first = stage.sessions.introduces(key);
        let refused = Err(Errno::ECONNREFUSED);
        stage.act(|sessions, cx| sessions.connected(key, refused, cx));
        (caller, [first, stage.sessions.introduces(key)])
    };
    let (caller, told_of) = told(true);
    assert_eq!(told_of, [Some(caller); 2]);
    assert_eq!(told(false).1, [None; 2]);
}

#[test]
fn the_sessions_of_many_backends_end_in_one_go_each_for_its_reason() {
    let mut stage = Stage::with(3);
    let keys = [(); 6].map(|()| stage.session());
    let mut ends = Ends::default();
    for (backend, reason) in [(3, EndReason::BackendLeft), (1, EndReason::CheckFailed)] {
        assert!(ends.gather(Order::EndBackend { backend: BackendId(backend), reason }));
    }
    assert!(!ends.gather(Order::Drain));
    ends.sort();
    stage.act(|sessions, cx| sessions.end_backends(&ends, cx));
    let mut ended = Vec::new();
    for key in [keys[0], keys[2], keys[3], keys[5]] {
        Side::BOTH.into_iter().for_each(|side| drop(stage.over(key, side, Received::Stopped)));
        let report = stage.ended().unwrap();
        ended.push((report.backend.unwrap().0, report.reason));
    }
    let [left, failed] = [(3, EndReason::BackendLeft), (1, EndReason::CheckFailed)];
    assert_eq!(ended, [failed, left, failed, left]);
    assert_eq!(stage.sessions.live(), 2, "those on the second backend");
}
