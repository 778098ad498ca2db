//! API users who follow the others into another process when their requests have been answered.

use super::still::{Left, stopped};
use super::*;
use crate::worker::link::Order;

const ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";

impl Stage {
    /// A worker that was left, whose users may follow or not.
    fn left(&mut self, may_depart: bool) {
        self.act(|sessions, cx| sessions.leave(&[], cx));
        self.act(|sessions, cx| sessions.may_depart(may_depart, cx));
        self.act(|sessions, cx| sessions.order(Order::Drain, cx));
    }

    /// A user whose request is with its backend, and that link.
    fn busy(&mut self, request: &str) -> (Key, Key) {
        let user = self.user();
        (user, self.request(user, request))
    }

    fn request(&mut self, user: Key, request: &str) -> Key {
        let (_, attempt) = self.ask(user, request);
        let (link, _) = attempt.unwrap();
        self.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
        self.settle();
        link
    }

    /// What the user hears of an answer.
    fn answered(&mut self, link: Key) -> String {
        self.receives(Conn::Link(link), Side::Backend, ANSWER);
        self.settle().0
    }

    fn packed(&mut self) -> Vec<Key> {
        self.act(Sessions::packed)
    }

    /// The user is described and forgotten here.
    fn parts_with(&mut self, user: Key) -> Left {
        let left = self.described(&[user]);
        self.act(|sessions, cx| sessions.departed(user, cx));
        left
    }

    fn cancels(&self) -> usize {
        let is_cancel =
            |cmd: &&Cmd| matches!(cmd, Cmd::Wire { what: StreamCmd::CancelReceive { .. }, .. });
        self.out.iter().filter(is_cancel).count()
    }
}

#[test]
fn who_has_been_answered_reads_no_further_and_goes_on_elsewhere_with_what_was_sent_ahead() {
    let mut old = Stage::new();
    let (user, link) = old.busy(SHOPPING);
    old.left(true);
    assert_eq!(old.packed(), [], "its request is under way");
    old.receives(Conn::User(user), Side::Client, "GET / HTTP/1.1\r\nHost: blog.example\r\n");
    let said = old.answered(link);
    assert!(!said.contains("Connection: close"), "{said}");
    assert_eq!(old.packed(), [], "its receive is being taken back");
    old.receives(Conn::User(user), Side::Client, "X-A: b\r\n\r\nGET");
    assert_eq!(old.settle(), (String::new(), None), "nothing of that is read here");
    old.happened(Conn::User(user), stopped(Side::Client));
    assert_eq!((old.packed(), old.packed()), (vec![user], vec![]), "it is said once");
    let (mut new, keys) = {
        let left = old.parts_with(user);
        old.successor(&left)
    };
    assert!(!old.sessions.has(Conn::User(user)));
    assert_eq!(old.books.metrics().counters.sessions_active.get(), 0);
    assert_eq!(
        (
            old.sessions.held(),
            old.out.contains(&Cmd::Close { conn: Conn::User(user), reset: false })
        ),
        (0, false)
    );
    new.act(Sessions::settle_in);
    let (said, attempt) = new.settle();
    assert_eq!((said.as_str(), attempt.unwrap().1), ("", address(BLOG)));
    new.act(|sessions, cx| sessions.connected(attempt.unwrap().0, Ok(()), cx));
    assert!(new.settle().0.contains("X-A: b"));
    let said = new.answered(attempt.unwrap().0);
    assert!(said.starts_with("HTTP/1.1 200") && !said.contains("Connection: close"), "{said}");
    new.receives(
        Conn::User(keys[0].0),
        Side::Client,
        " /api/y HTTP/1.1\r\nHost: shop.example\r\n\r\n",
    );
    assert_eq!(new.settle().1.unwrap().1, address(SHOP), "half of the next had come too");
}

#[test]
fn who_has_half_a_head_or_nothing_under_way_goes_at_once() {
    let mut stage = Stage::new();
    let (half, idle) = (stage.user(), stage.user());
    stage.receives(Conn::User(half), Side::Client, "GET / HT");
    stage.out.clear();
    stage.left(true);
    assert_eq!(stage.cancels(), 2);
    for user in [half, idle] {
        stage.happened(Conn::User(user), stopped(Side::Client));
    }
    assert_eq!(stage.packed(), [half, idle]);
}

#[test]
fn who_leaves_with_requests_sent_ahead_is_answered_here() {
    let mut stage = Stage::new();
    let (user, link) = stage.busy(SHOPPING);
    stage.left(true);
    stage.receives(Conn::User(user), Side::Client, &format!("{BLOGGING}\r\n\r\n"));
    stage.answered(link);
    let end =
        Event::Received { side: Side::Client, what: Received::End, more: false, nonempty: false };
    stage.happened(Conn::User(user), end);
    assert_eq!(stage.packed(), []);
    assert_eq!(stage.settle().1.unwrap().1, address(BLOG));
}

#[test]
fn who_cannot_follow_is_told_to_come_again_with_the_next_answer() {
    // A user who has logged in on a connection to its backend.
    let mut stage = Stage::new();
    let login = "GET / HTTP/1.1\r\nHost: blog.example\r\nAuthorization: NTLM abc=";
    let [(user, link), (_, busy)] = [(); 2].map(|()| stage.busy(login));
    let (_, beginner) = stage.busy(SHOPPING);
    stage.answered(link);
    stage.left(true);
    stage.happened(Conn::User(user), stopped(Side::Client));
    assert_eq!((stage.packed(), stage.sessions.private()), (vec![], 1));
    stage.receives(Conn::User(user), Side::Client, &format!("{login}\r\n\r\n"));
    stage.settle();
    for link in [link, busy] {
        let said = stage.answered(link);
        assert!(said.contains("Connection: close"), "{said}");
    }
    // One who begins to.
    let challenge = "HTTP/1.1 401 No\r\nWWW-Authenticate: NTLM\r\nContent-Length: 0\r\n\r\n";
    stage.receives(Conn::Link(beginner), Side::Backend, challenge);
    let said = stage.settle().0;
    assert!(said.contains("Connection: close"), "{said}");
    // One under TLS.
    let mut stage = Stage::new();
    let client: SocketAddr = ([192, 0, 2, 7], 1_000).into();
    let door = Doorway { is_tls: true, ..DOORWAY };
    let user = stage.act(|sessions, cx| sessions.accepted(door, client, cx));
    let link = stage.request(user, SHOPPING);
    stage.left(true);
    let said = stage.answered(link);
    assert!(said.contains("Connection: close"), "{said}");
    // All, once the other process takes nobody any more: also who had left already and was sent back.
    let mut stage = Stage::new();
    let [(gone, first), (packed, second), (busy, third)] = [(); 3].map(|()| stage.busy(SHOPPING));
    stage.left(true);
    stage.answered(first);
    stage.happened(Conn::User(gone), stopped(Side::Client));
    let (records, parcel) = stage.parts_with(gone);
    stage.answered(second);
    stage.happened(Conn::User(packed), stopped(Side::Client));
    stage.act(|sessions, cx| sessions.may_depart(false, cx));
    let (back, _) = stage.take_up(&records[0], &parcel).unwrap();
    stage.act(Sessions::settle_in);
    stage.settle();
    assert_eq!(stage.packed(), []);
    let links = [back, packed].map(|user| (user, stage.request(user, SHOPPING)));
    for (user, link) in links.into_iter().chain([(busy, third)]) {
        let said = stage.answered(link);
        assert!(said.contains("Connection: close"), "{user:?}: {said}");
    }
}

#[test]
fn who_comes_to_a_worker_that_was_left_itself_goes_further() {
    let mut first = Stage::new();
    let (user, link) = first.busy(SHOPPING);
    first.left(true);
    first.answered(link);
    first.happened(Conn::User(user), stopped(Side::Client));
    let (records, parcel) = first.parts_with(user);
    let mut second = Stage::new();
    second.left(true);
    let (user, _) = second.take_up(&records[0], &parcel).unwrap();
    second.act(Sessions::settle_in);
    second.happened(Conn::User(user), stopped(Side::Client));
    assert_eq!(second.packed(), [user]);
}
