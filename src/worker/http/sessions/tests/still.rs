//! API users of a worker that stands still, and those who go on in another process.

use zerocopy::IntoBytes;

use super::*;
use crate::base::random::xorshift;
use crate::estate::Parcel;
use crate::estate::api::UserRecord;
use crate::worker::books::estate::{Named, Names};
use crate::worker::link::Order;

const SWITCH: &str =
    "GET /api/x HTTP/1.1\r\nHost: shop.example\r\nConnection: upgrade\r\nUpgrade: echo";
const SWITCHED: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";

pub type Left = (Vec<UserRecord>, Parcel<i32>);

impl Stage {
    /// A user with a tunnel to the shop, and its link.
    fn tunnel(&mut self) -> (Key, Key) {
        let user = self.user();
        let (_, attempt) = self.ask(user, SWITCH);
        let (link, _) = attempt.unwrap();
        self.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
        self.settle();
        self.receives(Conn::Link(link), Side::Backend, SWITCHED);
        self.settle();
        (user, link)
    }

    fn noted(&mut self, conn: Conn, event: Event) {
        self.act(|sessions, cx| sessions.note(conn, event, cx));
    }

    fn noted_data(&mut self, conn: Conn, side: Side, text: &str) {
        let mut buf = self.pool.take(Class::Small).unwrap();
        self.pool.append(&mut buf, text.as_bytes());
        let what = Received::Data(buf);
        self.noted(conn, Event::Received { side, what, more: true, nonempty: false });
    }

    fn movable(&self) -> Vec<Key> {
        self.sessions.movable(|_| true).into_iter().map(|(key, _)| key).collect()
    }

    pub fn described(&mut self, keys: &[Key]) -> Left {
        let (mut names, mut parcel) = (Names::default(), Parcel::default());
        let records = keys.iter().map(|key| {
            let (parcel, names) = (&mut parcel, &mut names);
            self.act(|sessions, cx| sessions.describe(*key, names, parcel, cx)).unwrap()
        });
        (records.collect(), parcel)
    }

    /// A worker of the successor, with the users who were left to it.
    pub fn successor(&self, (records, parcel): &Left) -> (Stage, Vec<(Key, Option<Key>)>) {
        let mut new = Stage::new();
        new.now = self.now;
        new.books.succeed(self.books.describe_places());
        let keys = records.iter().map(|record| new.take_up(record, parcel).unwrap());
        let keys = keys.collect();
        new.books.settle();
        assert!(new.out.is_empty(), "it stands still");
        (new, keys)
    }

    pub fn take_up(
        &mut self,
        record: &UserRecord,
        parcel: &Parcel<i32>,
    ) -> Result<(Key, Option<Key>), String> {
        let mut services = Named::new(Protocol::Api);
        self.act(|sessions, cx| sessions.take_up(record, &mut services, parcel, cx))
    }

    fn thaw(&mut self) {
        self.act(Sessions::thaw);
    }

    fn receives_asked(&self) -> Vec<Conn> {
        let asked = |cmd: &Cmd| match cmd {
            Cmd::Wire { conn, what: StreamCmd::Receive { .. } } => Some(*conn),
            _ => None,
        };
        self.out.iter().filter_map(asked).collect()
    }

    fn views(&self) -> Vec<crate::session::shards::SessionView> {
        self.control.shard.iter().collect()
    }
}

pub fn stopped(side: Side) -> Event {
    Event::Received { side, what: Received::Stopped, more: false, nonempty: false }
}

#[test]
fn a_user_between_two_requests_is_served_by_the_successor_as_the_same_session() {
    let mut old = Stage::new();
    let (user, new_here) = (old.user(), old.user());
    old.served(user, SHOPPING, SHOP, "");
    assert_eq!(old.movable(), [user, new_here]);
    let left = old.described(&[user, new_here]);
    let (mut new, keys) = old.successor(&left);
    assert_eq!(new.views(), old.views());
    new.thaw();
    let users = [keys[0].0, keys[1].0];
    assert_eq!(new.receives_asked(), users.map(Conn::User));
    new.out.clear();
    new.served(users[0], BLOGGING, BLOG, "");
    let counters = &new.books.metrics().counters;
    assert_eq!(counters.sessions_started.get(), 0, "it has had a backend before");
    new.served(users[1], SHOPPING, SHOP, "");
    assert_eq!(new.books.metrics().counters.sessions_started.get(), 1);
    let taken = new.books.snapshot().service(API).unwrap().seats.taken();
    assert_eq!(taken, 2);
    // Who has been served is let go of at once, and the other after its first request.
    let (mut new, keys) = old.successor(&left);
    new.thaw();
    new.out.clear();
    new.act(|sessions, cx| sessions.close_door(DOORWAY.door, cx));
    let ends = |cmd: &&Cmd| matches!(cmd, Cmd::Wire { what: StreamCmd::FinishWriting { .. }, .. });
    let ended: Vec<_> = new.out.iter().filter(ends).collect();
    assert!(
        matches!(ended[..], [Cmd::Wire { conn, .. }] if *conn == Conn::User(keys[0].0)),
        "{ended:?}"
    );
}

#[test]
fn who_is_in_the_middle_of_something_stays() {
    let mut stage = Stage::new();
    let (user, link) = stage.tunnel();
    let (half, waits, ends) = (stage.user(), stage.user(), stage.user());
    stage.receives(Conn::User(half), Side::Client, "GET / HT");
    stage.ask(waits, SHOPPING);
    stage.served(ends, SHOPPING, SHOP, "");
    stage.act(|sessions, cx| sessions.drain_user(ends, cx));
    let login = stage.user();
    stage.served(
        login,
        "GET / HTTP/1.1\r\nHost: blog.example\r\nAuthorization: NTLM abc=",
        BLOG,
        "",
    );
    assert_eq!(stage.sessions.private(), 1);
    assert_eq!(stage.movable(), [user]);
    for apart in [Conn::User(user), Conn::Link(link)] {
        assert_eq!(stage.sessions.movable(|conn| conn != apart), []);
    }
}

#[test]
fn a_tunnel_goes_on_with_what_has_come_while_it_stood_still() {
    let mut old = Stage::new();
    let (user, link) = old.tunnel();
    old.receives(Conn::User(user), Side::Client, "one ");
    assert!(!old.sessions.is_still(|_| true), "it is being sent");
    assert!(old.sessions.is_still(|conn| conn != Conn::Link(link)), "it takes no part");
    old.act(|sessions, cx| sessions.take_back(|_| true, cx));
    let cancel = StreamCmd::CancelSend { side: Side::Backend };
    assert_eq!(old.out.last(), Some(&Cmd::Wire { conn: Conn::Link(link), what: cancel }));
    let cancelled = Event::Sent { side: Side::Backend, result: Err(Errno::ECANCELED) };
    old.noted(Conn::Link(link), cancelled);
    assert!(old.sessions.is_still(|_| true));
    old.out.clear();
    old.noted_data(Conn::User(user), Side::Client, "two");
    old.noted_data(Conn::Link(link), Side::Backend, "three");
    assert!(old.out.is_empty(), "nothing is begun");
    let left = old.described(&[user]);
    let (mut new, keys) = old.successor(&left);
    assert_eq!(new.views(), old.views());
    let gate = |stage: &Stage| stage.books.snapshot().service(SHOP).unwrap().gate.sessions();
    assert_eq!((gate(&new), new.books.metrics().backends[3].active.get()), (1, 1));
    for stage in [&mut new, &mut old] {
        stage.thaw();
        let said = stage.settle().0;
        assert!(said == "one twothree" || said == "threeone two", "{said}");
    }
    let (user, link) = (keys[0].0, keys[0].1.unwrap());
    new.receives(Conn::User(user), Side::Client, "four");
    assert_eq!(new.settle().0, "four");
    let what = || Received::Failed(Errno::ECONNRESET);
    for (conn, side) in [(Conn::User(user), Side::Client), (Conn::Link(link), Side::Backend)] {
        if new.sessions.tunnel(conn).is_some() {
            new.happened(
                conn,
                Event::Received { side, what: what(), more: false, nonempty: false },
            );
        }
    }
    assert_eq!(new.log.0.borrow()[..], [(101, None)], "it is logged as it was begun");
    assert_eq!(gate(&new), 0);
}

#[test]
fn who_goes_on_elsewhere_is_forgotten_without_an_end() {
    let mut stage = Stage::new();
    let (idle, (user, link)) = (stage.user(), stage.tunnel());
    stage.noted_data(Conn::Link(link), Side::Backend, "waits");
    stage.out.clear();
    stage.act(|sessions, cx| sessions.leave(&[idle, user], cx));
    let all = [(Conn::User(idle), Side::Client), (Conn::User(user), Side::Client)];
    let all = all.into_iter().chain([(Conn::Link(link), Side::Backend)]);
    let cancels = stage
        .out
        .iter()
        .all(|cmd| matches!(cmd, Cmd::Wire { what: StreamCmd::CancelReceive { .. }, .. }));
    assert!(cancels && stage.out.len() == 3, "{:?}", stage.out);
    for (conn, side) in all {
        stage.out.clear();
        assert!(stage.sessions.has(conn), "the kernel has its socket");
        stage.noted(conn, stopped(side));
        assert_eq!(stage.out, [Cmd::Close { conn, reset: false }]);
        assert!(!stage.sessions.has(conn));
    }
    let counters = &stage.books.metrics().counters;
    assert_eq!((counters.sessions_active.get(), counters.sessions_ended.get()), (0, 0));
    assert_eq!((stage.sessions.live(), stage.log.0.borrow().len()), (0, 0));
    let snapshot = stage.books.snapshot();
    let of = |service| snapshot.service(service).unwrap();
    assert_eq!((of(API).seats.taken(), of(SHOP).gate.sessions()), (0, 0));
    assert!(
        std::iter::from_fn(|| stage.control.reports.pop().ok())
            .all(|report| !matches!(report, Report::Ended(_)))
    );
}

#[test]
fn who_stays_behind_is_told_so_with_an_answer_and_not_by_an_end() {
    let mut stage = Stage::new();
    let (idle, busy) = (stage.user(), stage.user());
    stage.served(idle, BLOGGING, BLOG, "");
    let (_, attempt) = stage.ask(busy, SHOPPING);
    let (link, _) = attempt.unwrap();
    stage.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
    stage.settle();
    // The head of its answer is on its way.
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n";
    stage.receives(Conn::Link(link), Side::Backend, head);
    stage.settle();
    stage.act(|sessions, cx| sessions.leave(&[], cx));
    stage.act(|sessions, cx| sessions.order(Order::Drain, cx));
    let is_end = |cmd: &Cmd| matches!(cmd, Cmd::Wire { what: StreamCmd::FinishWriting { .. }, .. });
    assert!(!stage.out.iter().any(is_end), "a request may be on its way");
    stage.out.clear();
    stage.receives(Conn::Link(link), Side::Backend, "abc");
    assert!(!stage.out.iter().any(is_end), "it was not told to go");
    stage.settle();
    for (user, service, request) in [(idle, BLOG, BLOGGING), (busy, SHOP, SHOPPING)] {
        let (_, attempt) = stage.ask(user, request);
        let (link, to) = attempt.expect("no spare connection is kept");
        assert_eq!(to, address(service));
        stage.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
        stage.settle();
        stage.receives(Conn::Link(link), Side::Backend, head);
        stage.receives(Conn::Link(link), Side::Backend, "abc");
        let said = stage.settle().0;
        assert!(said.contains("Connection: close"), "{said}");
    }
}

#[test]
fn no_record_whatever_is_in_it_does_any_harm() {
    let mut old = Stage::new();
    let (idle, (user, _)) = (old.user(), old.tunnel());
    let (records, parcel) = old.described(&[idle, user]);
    let mut random = xorshift(0x1234_5678_9abc_def1);
    let mut new = Stage::new();
    let mut taken = 0;
    for round in 0..10_000 {
        let mut record = records[round % 2];
        for _ in 0..=random(3) {
            let bytes = record.as_mut_bytes();
            let at = random(bytes.len() as u64) as usize;
            bytes[at] = random(256) as u8;
        }
        let Ok((key, link)) = new.take_up(&record, &parcel) else { continue };
        taken += 1;
        new.act(|sessions, cx| sessions.leave(&[key], cx));
        let is_left = link.map(Conn::Link).is_some_and(|link| new.sessions.has(link));
        assert!(!is_left && !new.sessions.has(Conn::User(key)), "nothing is in flight");
        new.out.clear();
    }
    assert!(taken > 3_000, "{taken} were taken up");
    assert_eq!(new.books.metrics().counters.sessions_active.get(), 0);
    assert_eq!(new.sessions.live(), 0);
}
