//! API users whose requests are for several services, played by hand against one worker's books.

mod calls;
mod late;
mod still;
mod streams;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::*;
use crate::cluster::doors::{Claimant, Claimed, Doors, Routing};
use crate::cluster::route::{Claim, Host};
use crate::cluster::seats::Seats;
use crate::cluster::{Backend, Barrier, DoorId, Doorway, Protocol, Service, Snapshot, Standing};
use crate::proxy::StreamCmd;
use crate::proxy::http::Record;
use crate::ring::pool::Class;
use crate::worker::books::Books;
use crate::worker::books::tests::{Joined, joined};
use crate::worker::link::{ControlEnd, Refusal, Report};

const START: Now = Now::from_nanos(1_000_000_000);
const API: ServiceId = ServiceId::built_in(Protocol::Api);
const DOORWAY: Doorway = Doorway { door: DoorId(0), service: API, is_tls: false };
const SHOP: ServiceId = ServiceId(3);
const BLOG: ServiceId = ServiceId(4);
const EMPTY: ServiceId = ServiceId(5);

/// The built-in API service and three that share its door, each with one backend but the last. They
/// have ten times as many seconds for a connection as their number says.
fn snapshot() -> Snapshot {
    let built_in = Snapshot::default();
    let mut services = built_in.services.to_vec();
    for (id, name) in [(SHOP, "shop"), (BLOG, "blog"), (EMPTY, "empty")] {
        let mut service = Service { id, name: name.into(), ..services[2].clone() };
        service.seats = Arc::new(Seats::new(0));
        service.gate = Arc::default();
        service.terms.timeouts.connect = Duration::from_secs(10 * u64::from(id.0));
        services.push(service);
    }
    let claimants = [
        claimant(API, Host::Rest, ""),
        claimant(SHOP, Host::Exact("shop.example".into()), "/api"),
        claimant(BLOG, Host::Exact("blog.example".into()), ""),
        claimant(EMPTY, Host::Exact("empty.example".into()), ""),
    ];
    let claimed = Claimed::of(&[], &claimants).unwrap();
    let mut doors = Doors::default();
    doors.set(DOORWAY.door, claimed.at(claimants[0].listen[0], API).unwrap().clone());
    let doors = Arc::new(doors);
    let snapshot = Snapshot { services: services.into(), doors, ..built_in };
    snapshot.with(&[API, SHOP, BLOG].map(backend))
}

fn claimant(service: ServiceId, host: Host, path: &str) -> Claimant {
    let claims = vec![Claim { host, path: path.into(), service }];
    Claimant { service, listen: vec![([192, 0, 2, 1], 80).into()], claims }
}

fn backend(service: ServiceId) -> Backend {
    Backend {
        proxy: false,
        http2: false,
        tls: None,
        id: BackendId(u32::from(service.0)),
        slot: service.0,
        service,
        address: address(service),
        weight: 1,
        name: None,
        group: None,
        standing: Standing::Serving,
    }
}

fn address(service: ServiceId) -> SocketAddr {
    ([10, 0, 0, service.0 as u8], 80).into()
}

/// Status and fault of a request.
type Outcome = (u16, Option<&'static str>);

#[derive(Clone, Default)]
struct Log(Rc<RefCell<Vec<Outcome>>>);

impl Journal for Log {
    fn record(&mut self, record: &Record<'_>) {
        self.0.borrow_mut().push((record.status, record.fault));
    }
}

/// A worker whose sockets are played by hand.
struct Stage {
    sessions: Sessions,
    books: Books,
    control: ControlEnd,
    pool: Pool,
    now: Now,
    out: Vec<Cmd>,
    log: Log,
}

impl Stage {
    fn new() -> Stage {
        let Joined { books, control, .. } = joined(snapshot(), 100);
        let log = Log::default();
        let features = Features { receive_cap: true, splice: false };
        let settings = GatewaySettings::default();
        let sessions = Sessions::new(settings, features, Box::new(log.clone()), START);
        let (pool, out) = (Pool::new(256, 16), Vec::new());
        Stage { sessions, books, control, pool, now: START, out, log }
    }

    fn act<T>(&mut self, what: impl FnOnce(&mut Sessions, &mut Cx<'_>) -> T) -> T {
        let Stage { sessions, books, pool, now, out, .. } = self;
        what(sessions, &mut Cx { now: *now, pool, books, out })
    }

    fn user(&mut self) -> Key {
        let client = ([192, 0, 2, 7], 1_000).into();
        self.act(|sessions, cx| sessions.accepted(DOORWAY, client, cx))
    }

    fn happened(&mut self, conn: Conn, event: Event) {
        self.act(|sessions, cx| sessions.happened(conn, event, cx));
    }

    fn receives(&mut self, conn: Conn, side: Side, text: &str) {
        let mut buf = self.pool.take(Class::Small).unwrap();
        assert_eq!(self.pool.append(&mut buf, text.as_bytes()), text.len());
        let what = Received::Data(buf);
        self.happened(conn, Event::Received { side, what, more: true, nonempty: false });
    }

    /// Lets every send succeed, and returns what was sent together with the connection attempt that
    /// was asked for.
    fn settle(&mut self) -> (String, Option<(Key, SocketAddr)>) {
        let (mut sent, mut attempt, mut next) = (Vec::new(), None, 0);
        while let Some(command) = self.out.get(next).copied() {
            next += 1;
            match command {
                Cmd::Connect { link, to } => attempt = Some((link, to)),
                Cmd::Wire { conn, what: StreamCmd::Send { side, what } } => {
                    let bytes: Vec<u8> = self.pool.pieces(what).flatten().copied().collect();
                    let result = Ok(bytes.len() as u32);
                    sent.extend(bytes);
                    self.happened(conn, Event::Sent { side, result });
                }
                _ => {}
            }
        }
        self.out.clear();
        (String::from_utf8(sent).unwrap(), attempt)
    }

    /// A user asks; the answer if the balancer gives it itself, or where it connects to.
    fn ask(&mut self, user: Key, request: &str) -> (String, Option<(Key, SocketAddr)>) {
        self.receives(Conn::User(user), Side::Client, &format!("{request}\r\n\r\n"));
        self.settle()
    }

    fn answer(&mut self, link: Key, fields: &str) {
        let text = format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 0\r\n\r\n");
        self.receives(Conn::Link(link), Side::Backend, &text);
        self.settle();
    }

    /// A request to this service, answered over a new connection to its backend, which is returned.
    fn served(&mut self, user: Key, request: &str, service: ServiceId, fields: &str) -> Key {
        let (said, attempt) = self.ask(user, request);
        let (link, to) = attempt.unwrap_or_else(|| panic!("{request} is not connected: {said}"));
        assert_eq!(to, address(service), "{request}");
        self.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
        assert!(self.settle().0.contains(" HTTP/1.1\r\n"), "the backend gets the request");
        self.answer(link, fields);
        link
    }

    fn change(&mut self, change: impl FnOnce(&mut Snapshot)) {
        let mut snapshot = self.books.snapshot().clone();
        snapshot.version += 1;
        change(&mut snapshot);
        self.books.adopt(Arc::new(snapshot));
    }

    /// The services at which users were turned away.
    fn refusals(&mut self) -> Vec<(ServiceId, Refusal)> {
        let reports = std::iter::from_fn(|| self.control.reports.pop().ok());
        let refused = reports.filter_map(|report| match report {
            Report::Refused { service, why, .. } => Some((service, why)),
            _ => None,
        });
        refused.collect()
    }
}

const SHOPPING: &str = "GET /api/x HTTP/1.1\r\nHost: shop.example";
const BLOGGING: &str = "GET / HTTP/1.1\r\nHost: blog.example";
const OTHER: &str = "GET / HTTP/1.1\r\nHost: other.example";

#[test]
fn the_requests_of_one_connection_reach_the_backends_of_their_services() {
    let mut stage = Stage::new();
    let user = stage.user();
    let shop = stage.served(user, SHOPPING, SHOP, "");
    let blog = stage.served(user, BLOGGING, BLOG, "");
    stage.served(user, OTHER, API, "");
    assert_eq!(stage.sessions.spares(), 3);
    // Each connection is used again, and by nobody but its service.
    for (request, service, link) in [(BLOGGING, BLOG, blog), (SHOPPING, SHOP, shop)] {
        let (said, attempt) = stage.ask(user, request);
        assert_eq!(attempt, None, "a spare connection is there");
        assert!(said.contains(if service == BLOG { "blog.example" } else { "shop.example" }));
        stage.answer(link, "");
    }
    let served =
        |service: ServiceId| stage.books.metrics().backends[usize::from(service.0)].total.get();
    // A session counts for its first backend when it starts, and each further request for its own.
    assert_eq!([API, SHOP, BLOG].map(served), [1, 2, 2]);
    let taken = |service| stage.books.snapshot().service(service).unwrap().seats.taken();
    assert_eq!([API, SHOP, BLOG].map(taken), [1, 0, 0], "it sits where it came in");
}

#[test]
fn a_service_counts_its_requests_those_that_failed_and_the_time_to_their_first_byte() {
    let mut stage = Stage::new();
    let user = stage.user();
    let link = stage.served(user, SHOPPING, SHOP, "");
    for (status, text) in [("503 Down", ""), ("404 Not Found", ""), ("200 OK", "torn")] {
        assert_eq!(stage.ask(user, SHOPPING).1, None, "a spare connection is there");
        stage.now = stage.now.plus(Duration::from_millis(4));
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", 9 * text.len());
        stage.receives(Conn::Link(link), Side::Backend, &(head + text));
        stage.settle();
    }
    let what = Received::End;
    stage.happened(
        Conn::Link(link),
        Event::Received { side: Side::Backend, what, more: false, nonempty: false },
    );
    stage.settle();
    let other = stage.user();
    let (asked, _) = stage.ask(other, "GET / HTTP/1.1\r\nHost: empty.example");
    assert!(asked.starts_with("HTTP/1.1 503 "), "{asked}");
    let of = |service| stage.books.snapshot().service(service).unwrap().gate.answers.sum();
    let shop = of(SHOP);
    assert_eq!((shop.requests, shop.errors), (4, 2), "one with 503, and one broke off");
    assert_eq!(shop.first_byte[crate::base::buckets::bucket_of(4_000)], 3);
    assert_eq!(shop.first_byte.iter().sum::<u64>(), 4);
    let empty = of(EMPTY);
    assert_eq!((empty.requests, empty.errors, empty.refused), (1, 1, 1));
    assert_eq!(empty.first_byte.iter().sum::<u64>(), 0, "no backend has answered");
}

#[test]
fn users_of_a_door_that_changes_hands_are_the_next_services_and_go_on() {
    let mut stage = Stage::new();
    let user = stage.user();
    let shop = stage.served(user, SHOPPING, SHOP, "");
    stage.change(|snapshot| {
        let mut doors = Doors::default();
        doors.set(DOORWAY.door, Routing::All(BLOG));
        snapshot.doors = Arc::new(doors);
    });
    stage.act(|sessions, cx| sessions.assign(DoorId(7), EMPTY, cx));
    stage.act(|sessions, cx| sessions.assign(DOORWAY.door, BLOG, cx));
    let of = |stage: &Stage| stage.control.shard.iter().map(|it| it.service).collect::<Vec<_>>();
    assert_eq!(of(&stage), [BLOG]);
    stage.served(user, SHOPPING, BLOG, "");
    // A door that nobody knows is its service's, which is the new one by now.
    stage.change(|snapshot| snapshot.doors = Arc::default());
    assert_eq!(stage.ask(user, SHOPPING).1, None, "the connection to it is kept");
    assert_ne!(shop, stage.user());
}

#[test]
fn users_of_a_door_that_closes_are_served_to_the_end_of_their_request() {
    let mut stage = Stage::new();
    let (idle, busy, new) = (stage.user(), stage.user(), stage.user());
    stage.served(idle, SHOPPING, SHOP, "");
    let (_, attempt) = stage.ask(busy, BLOGGING);
    let (link, _) = attempt.unwrap();
    stage.act(|sessions, cx| sessions.close_door(DoorId(7), cx));
    assert!(stage.out.is_empty(), "it was another door");
    stage.act(|sessions, cx| sessions.close_door(DOORWAY.door, cx));
    let finished = |stage: &mut Stage| {
        let ends = |cmd: &Cmd| match cmd {
            Cmd::Wire { conn, what: StreamCmd::FinishWriting { .. } } => Some(*conn),
            _ => None,
        };
        stage.out.iter().filter_map(ends).collect::<Vec<_>>()
    };
    assert_eq!(finished(&mut stage), [Conn::User(idle)]);
    stage.out.clear();
    stage.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
    stage.settle();
    let text = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    stage.receives(Conn::Link(link), Side::Backend, text);
    let (said, _) = stage.settle();
    assert!(said.contains("Connection: close\r\n"), "{said}");
    let (_, attempt) = stage.ask(new, OTHER);
    assert!(attempt.is_some(), "it had found the door open");
}

#[test]
fn a_connection_attempt_has_the_patience_of_the_requests_service() {
    let mut stage = Stage::new();
    let user = stage.user();
    assert!(stage.ask(user, BLOGGING).1.is_some());
    for (seconds, given_up) in [(38, false), (42, true)] {
        stage.now = START.plus(Duration::from_secs(seconds));
        stage.act(|sessions, cx| sessions.expire(cx));
        let cancels = stage.out.iter().any(|cmd| matches!(cmd, Cmd::CancelConnect { .. }));
        assert_eq!(cancels, given_up, "after {seconds} seconds");
    }
}

#[test]
fn unclaimed_requests_are_answered_404_and_the_connection_goes_on() {
    let mut stage = Stage::new();
    let user = stage.user();
    let (said, attempt) = stage.ask(user, "GET /home HTTP/1.1\r\nHost: shop.example");
    assert!(said.starts_with("HTTP/1.1 404 Not Found\r\n"), "{said}");
    assert!(!said.contains("Connection: close") && attempt.is_none(), "{said}");
    stage.served(user, SHOPPING, SHOP, "");
    let log = stage.log.0.borrow();
    assert_eq!(log[0], (404, Some("no service has this host and path")));
    assert_eq!(log[1], (200, None));
}

#[test]
fn a_claimed_host_without_anybody_to_serve_is_answered_503() {
    let mut stage = Stage::new();
    let user = stage.user();
    let (said, attempt) = stage.ask(user, "GET / HTTP/1.1\r\nHost: empty.example");
    assert!(said.starts_with("HTTP/1.1 503 ") && said.contains("Retry-After: "), "{said}");
    assert_eq!(attempt, None);
    assert_eq!(stage.refusals(), [(EMPTY, Refusal::NoBackend)]);
}

#[test]
fn maintenance_is_answered_503_until_it_is_over() {
    let mut stage = Stage::new();
    let user = stage.user();
    stage.served(user, SHOPPING, SHOP, "");
    stage.change(|snapshot| snapshot.services[3].terms.maintenance = true);
    let (said, attempt) = stage.ask(user, SHOPPING);
    assert!(said.starts_with("HTTP/1.1 503 ") && said.contains("Retry-After: "), "{said}");
    assert!(said.contains("maintenance") && attempt.is_none(), "{said}");
    assert_eq!(stage.books.metrics().counters.api_maintenance.get(), 1);
    assert_eq!(stage.refusals(), [], "the service does not lack backends");
    stage.served(user, BLOGGING, BLOG, "");
    stage.change(|snapshot| snapshot.services[3].terms.maintenance = false);
    assert!(stage.ask(user, SHOPPING).0.contains("/api/x"), "the backend is asked again");
}

#[test]
fn an_ambiguous_path_reaches_nobody() {
    let mut stage = Stage::new();
    let user = stage.user();
    let (said, attempt) = stage.ask(user, "GET /api/%2e%2e/x HTTP/1.1\r\nHost: shop.example");
    assert!(said.starts_with("HTTP/1.1 400 ") && said.contains("Connection: close"), "{said}");
    assert_eq!(attempt, None);
}

#[test]
fn a_login_at_one_service_is_not_used_for_another() {
    const NTLM: &str = "WWW-Authenticate: NTLM\r\n";
    let mut stage = Stage::new();
    let user = stage.user();
    let shop = stage.served(user, SHOPPING, SHOP, NTLM);
    assert_eq!((stage.sessions.private(), stage.sessions.spares()), (1, 0));
    stage.served(user, OTHER, API, "");
    assert_eq!((stage.sessions.private(), stage.sessions.spares()), (1, 1));
    let (said, attempt) = stage.ask(user, SHOPPING);
    assert!(said.contains("/api/x") && attempt.is_none(), "the login still holds: {said}");
    stage.answer(shop, "");
    // A second login takes the place of the first.
    stage.served(user, BLOGGING, BLOG, NTLM);
    assert_eq!((stage.sessions.private(), stage.sessions.spares()), (1, 1));
    assert!(stage.ask(user, SHOPPING).1.is_some(), "it has to log in again");
}

#[test]
fn a_spare_connection_goes_with_the_backend_of_its_service() {
    let mut stage = Stage::new();
    let user = stage.user();
    stage.served(user, SHOPPING, SHOP, "");
    stage.served(user, BLOGGING, BLOG, "");
    stage.change(|snapshot| *snapshot = snapshot.with(&[API, SHOP].map(backend)));
    stage.act(|sessions, cx| sessions.expire(cx));
    assert_eq!(stage.sessions.spares(), 1);
    assert!(stage.ask(user, SHOPPING).0.contains("/api/x"));
}

/// A user at `stage` is told that the shop is full, and by which limit, and is served elsewhere.
fn is_full(stage: &mut Stage, user: Key, barrier: Barrier) {
    let (said, attempt) = stage.ask(user, SHOPPING);
    assert!(said.starts_with("HTTP/1.1 503 ") && said.contains("Retry-After: "), "{said}");
    assert!(said.contains(barrier.why()) && attempt.is_none(), "{said}");
    assert_eq!(stage.refusals(), [(SHOP, Refusal::Barred(barrier))]);
    stage.served(user, BLOGGING, BLOG, "");
}

#[test]
fn rule_13_a_connection_whose_request_finds_a_service_full_is_served_by_others() {
    let mut stage = Stage::new();
    stage.change(|snapshot| snapshot.services[3].terms.limits.sessions = Some(1));
    let [first, second] = [stage.user(), stage.user()];
    let (_, attempt) = stage.ask(first, SHOPPING);
    assert!(attempt.is_some());
    is_full(&mut stage, second, Barrier::Sessions);
    // The first user leaves while its connection is being made.
    stage.act(|sessions, cx| sessions.end(first, EndReason::ClientReset, cx));
    assert!(stage.ask(second, SHOPPING).1.is_some(), "its place is free again");
}

#[test]
fn rule_13_a_login_outlasts_a_refusal_of_its_full_backend() {
    let mut stage = Stage::new();
    stage.change(|snapshot| snapshot.services[3].terms.limits.backend_sessions = Some(1));
    let [first, second] = [stage.user(), stage.user()];
    let link = stage.served(first, SHOPPING, SHOP, "WWW-Authenticate: NTLM\r\n");
    assert!(stage.ask(second, SHOPPING).1.is_some());
    is_full(&mut stage, first, Barrier::BackendSessions);
    assert_eq!(stage.sessions.private(), 1);
    stage.act(|sessions, cx| sessions.end(second, EndReason::ClientReset, cx));
    let (said, attempt) = stage.ask(first, SHOPPING);
    assert!(said.contains("/api/x") && attempt.is_none(), "the login still holds: {said}");
    stage.answer(link, "");
}

#[test]
fn a_service_whose_backends_all_fail_their_check_says_so() {
    let mut stage = Stage::new();
    let user = stage.user();
    stage.change(|snapshot| {
        let failing = Backend { standing: Standing::Failing, ..backend(SHOP) };
        *snapshot = snapshot.with(&[failing]);
    });
    let (said, _) = stage.ask(user, SHOPPING);
    assert!(
        said.starts_with("HTTP/1.1 503 ") && said.contains("every backend fails its check"),
        "{said}"
    );
    let (said, _) = stage.ask(user, BLOGGING);
    assert!(said.contains("no backend is registered"), "{said}");
}

/// Everyone's connections begin with a PROXY header from now on.
fn want_headers(snapshot: &mut Snapshot) {
    let backends = [API, SHOP, BLOG].map(|service| Backend { proxy: true, ..backend(service) });
    *snapshot = snapshot.with(&backends);
}

#[test]
fn a_connection_with_a_proxy_header_serves_only_the_user_that_it_tells_of() {
    let mut stage = Stage::new();
    stage.change(want_headers);
    let (one, other) = (stage.user(), stage.user());
    let (_, attempt) = stage.ask(one, SHOPPING);
    let link = attempt.unwrap().0;
    let told = stage.sessions.introduces(link).expect("the backend wants to be told");
    assert_eq!(told, (one, Caller::from(SocketAddr::from(([192, 0, 2, 7], 1_000)))));
    stage.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
    assert_eq!(stage.sessions.introduces(link), None, "once");
    stage.settle();
    stage.answer(link, "");
    assert_eq!((stage.sessions.private(), stage.sessions.spares()), (1, 0));
    assert!(stage.ask(other, SHOPPING).1.is_some(), "the other gets one of its own");
    assert_eq!(stage.ask(one, SHOPPING).1, None, "and this one uses its own again");
    stage.answer(link, "");
    stage.now = START.plus(Duration::from_secs(1));
    let posting = SHOPPING.replace("GET", "POST");
    assert!(stage.ask(one, &posting).1.is_some(), "a request that cannot be repeated");
}

#[test]
fn a_connection_with_a_proxy_header_is_kept_no_longer_than_others() {
    for (still, again) in [(0, true), (3600, false)] {
        let mut stage = Stage::new();
        stage.change(want_headers);
        stage.sessions.settings.idle_timeout = Duration::from_secs(86_400);
        let user = stage.user();
        stage.served(user, SHOPPING, SHOP, "");
        stage.now = START.plus(Duration::from_secs(still));
        assert_eq!(stage.ask(user, SHOPPING).1.is_none(), again, "after {still} seconds");
    }
    // But one with a login as well is, until its user leaves.
    let mut stage = Stage::new();
    stage.change(want_headers);
    stage.sessions.settings.idle_timeout = Duration::from_secs(86_400);
    let user = stage.user();
    stage.served(user, SHOPPING, SHOP, "WWW-Authenticate: NTLM\r\n");
    stage.now = START.plus(Duration::from_secs(3600));
    assert_eq!(stage.ask(user, SHOPPING).1, None);
}

#[test]
fn a_connection_made_before_the_backend_wanted_a_header_is_not_used() {
    let mut stage = Stage::new();
    let user = stage.user();
    stage.served(user, SHOPPING, SHOP, "");
    assert_eq!(stage.sessions.spares(), 1);
    stage.change(want_headers);
    let (_, attempt) = stage.ask(user, SHOPPING);
    assert!(stage.sessions.introduces(attempt.unwrap().0).is_some());
}

#[test]
fn rule_13_a_connection_that_only_introduces_gives_way_when_its_backend_is_full() {
    let mut stage = Stage::new();
    stage.change(|snapshot| {
        snapshot.services[3].terms.limits.backend_sessions = Some(1);
        let other = Backend { id: BackendId(9), slot: 9, ..backend(SHOP) };
        let other = Backend { address: address(ServiceId(9)), ..other };
        let both = [backend(SHOP), other].map(|it| Backend { proxy: true, ..it });
        *snapshot = snapshot.with(&both);
    });
    let users = [stage.user(), stage.user(), stage.user()];
    stage.served(users[0], SHOPPING, SHOP, "");
    stage.served(users[1], SHOPPING, ServiceId(9), "");
    let (_, attempt) = stage.ask(users[2], SHOPPING);
    assert_eq!(attempt.unwrap().1, address(SHOP));
    let (said, attempt) = stage.ask(users[0], SHOPPING);
    let to = attempt.unwrap_or_else(|| panic!("there is room at the other: {said}")).1;
    assert_eq!(to, address(ServiceId(9)));
    assert_eq!(stage.sessions.private(), 1, "its own connection has gone");
}
