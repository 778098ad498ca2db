//! One connection of the load against an HTTP/2 server over memory: h2's, and one that says any frame it
//! likes. What is asked, obeyed and counted.

use std::collections::VecDeque;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use h2::server::{self, Handshake, SendResponse};
use h2::{Reason, RecvStream};

use super::super::web::{BACKEND, IDENTITY, Payload, Request};
use super::*;

type Asked = (http::Request<RecvStream>, SendResponse<Bytes>);

/// A server of h2, and the requests that it has not answered.
struct Server {
    pipe: Pipe,
    handshake: Option<Handshake<Pipe, Bytes>>,
    connection: Option<server::Connection<Pipe, Bytes>>,
    asked: VecDeque<Asked>,
}

impl Server {
    fn new(permits: u32) -> Server {
        let pipe = Pipe::default();
        let mut builder = server::Builder::new();
        let handshake = Some(builder.max_concurrent_streams(permits).handshake(pipe.clone()));
        Server { pipe, handshake, connection: None, asked: VecDeque::new() }
    }

    fn poll(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        if let Some(handshake) = &mut self.handshake
            && let Poll::Ready(begun) = pin!(handshake).poll(&mut context)
        {
            (self.handshake, self.connection) = (None, Some(begun.unwrap()));
        }
        let Some(connection) = &mut self.connection else { return };
        while let Poll::Ready(Some(Ok(asked))) = connection.poll_accept(&mut context) {
            self.asked.push_back(asked);
        }
    }
}

struct Scene {
    http2: Http2,
    server: Server,
    template: Template,
    content: Content,
}

fn scene(streams: usize, permits: u32) -> Scene {
    scene_of(streams, permits, ("GET", "/", Payload::None))
}

fn scene_of(streams: usize, permits: u32, asks: (&str, &str, Payload)) -> Scene {
    let mut http2 = Http2::new(5, streams);
    http2.open();
    let request = Request::new(asks.0, asks.1, "host", &[], asks.2).unwrap();
    let template = Template::new(&Arc::new(request), false).unwrap();
    Scene { http2, server: Server::new(permits), template, content: Content::new() }
}

impl Scene {
    fn ask(&mut self, at: u64) -> bool {
        self.http2.ask(&self.template, Now::from_nanos(at), Now::from_nanos(at))
    }

    fn ask_all(&mut self) -> usize {
        (0..STREAMS_MAX as u64).take_while(|at| self.ask(*at)).count()
    }

    /// Carries bytes both ways until none are left.
    fn settle(&mut self) {
        loop {
            self.http2.advance(&self.template, &self.content);
            let mut moved = 0;
            let mut carry = |bytes: &[u8], to: &dyn Fn(&[u8])| {
                assert!(bytes.len() <= OUTGOING_BYTES_MAX, "{} bytes wait", bytes.len());
                moved += bytes.len();
                to(bytes);
                Ok::<_, ()>(())
            };
            let there = &self.server.pipe;
            self.http2.hand_over(|bytes| carry(bytes, &|bytes| there.feed(bytes))).unwrap();
            self.server.poll();
            let (mut back, there) = (Vec::new(), self.server.pipe.clone());
            there.hand_over(|bytes| carry(bytes, &|_| {}).map(|()| back.extend(bytes))).unwrap();
            if moved == 0 && !self.http2.is_woken() {
                return;
            }
            if !back.is_empty() {
                self.http2.feed(&back);
            }
        }
    }

    fn outcomes(&mut self) -> Vec<Outcome> {
        self.settle();
        self.http2.take_outcomes()
    }

    /// A connection whose server has said what it permits, with as many requests as have room.
    fn filled(mut self) -> Scene {
        self.settle();
        self.ask_all();
        self.settle();
        self
    }
}

/// Answers as a backend of ours does.
fn answer((request, mut respond): Asked, status: u16, body: &[u8]) {
    let mut head = http::Response::builder().status(status).header(BACKEND, "9301");
    if let Some(identity) = request.headers().get(IDENTITY) {
        head = head.header(IDENTITY, identity);
    }
    let mut send = respond.send_response(head.body(()).unwrap(), body.is_empty()).unwrap();
    if !body.is_empty() {
        send.reserve_capacity(body.len());
        send.send_data(Bytes::copy_from_slice(body), true).unwrap();
    }
}

fn since(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Answered { since, .. } => since.nanos(),
        Outcome::Failed(failure) => panic!("{failure:?}"),
    }
}

#[test]
fn requests_are_in_flight_at_once_and_each_is_counted_from_its_own_moment() {
    let mut scene = scene(3, 100).filled();
    assert_eq!((scene.http2.in_flight(), scene.server.asked.len()), (3, 3));
    assert!(!scene.ask(9), "there is no room for a fourth");
    for (place, at) in [(2, 2), (0, 0), (0, 1)] {
        let asked = scene.server.asked.remove(place).unwrap();
        answer(asked, 200, b"");
        assert_eq!(scene.outcomes().iter().map(since).collect::<Vec<_>>(), [at]);
    }
    assert_eq!((scene.http2.in_flight(), scene.http2.end()), (0, None));
    assert_eq!(scene.ask_all(), 3, "places are used again");
}

#[test]
fn no_more_is_asked_than_the_server_permits_and_one_before_it_has_said() {
    let mut scene = scene(8, 2);
    assert_eq!(scene.ask_all(), 1, "its settings have not come");
    scene.settle();
    assert_eq!((scene.http2.permitted(), scene.ask_all()), (2, 1));
    scene.settle();
    assert_eq!((scene.server.asked.len(), scene.http2.has_room()), (2, false));
    answer(scene.server.asked.pop_front().unwrap(), 200, b"");
    assert_eq!(scene.outcomes().len(), 1);
    assert_eq!(scene.ask_all(), 1);
}

#[test]
fn a_stream_that_is_refused_or_reset_is_counted_and_the_connection_goes_on() {
    for (reason, failure) in [
        (Reason::REFUSED_STREAM, RequestFailure::StreamRefused),
        (Reason::INTERNAL_ERROR, RequestFailure::StreamReset),
        (Reason::CANCEL, RequestFailure::StreamReset),
    ] {
        let mut scene = scene(2, 100).filled();
        let (_, mut respond) = scene.server.asked.pop_front().unwrap();
        respond.send_reset(reason);
        assert_eq!(scene.outcomes(), [Outcome::Failed(failure)], "{reason}");
        answer(scene.server.asked.pop_front().unwrap(), 200, b"");
        assert_eq!(scene.outcomes().iter().map(since).collect::<Vec<_>>(), [1]);
        assert_eq!((scene.http2.end(), scene.ask_all()), (None, 2));
    }
}

#[test]
fn what_is_in_flight_is_answered_before_a_server_leaves_that_says_so() {
    let mut scene = scene(2, 100).filled();
    scene.server.connection.as_mut().unwrap().graceful_shutdown();
    assert_eq!(scene.outcomes(), []);
    assert_eq!((scene.http2.has_room(), scene.http2.end()), (false, None));
    for asked in std::mem::take(&mut scene.server.asked) {
        answer(asked, 200, b"");
    }
    assert_eq!(scene.outcomes().iter().map(since).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(scene.http2.end(), Some(End::Orderly));
}

#[test]
fn a_server_that_leaves_in_anger_is_counted_even_if_no_request_is_lost() {
    let mut scene = told(1);
    scene.say(&frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 11]));
    assert_eq!((scene.http2.in_flight(), scene.http2.is_leaving()), (1, true));
    scene.say(&frame(HEADERS, WHOLE, 1, OK));
    let found = scene.http2.take_outcomes();
    assert_eq!((found.len(), since(&found[0])), (2, 0));
    assert_eq!(found[1], Outcome::Failed(RequestFailure::GoAway));
    assert_eq!(scene.http2.end(), Some(End::Broken));
}

/// A frame of HTTP/2 (RFC 9113 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
/// END_STREAM and END_HEADERS.
const WHOLE: u8 = 5;
/// `:status: 200` (RFC 7541 appendix A).
const OK: &[u8] = &[0x88];

/// A connection with `count` requests in flight, numbered 1, 3, 5, to a server that says what it likes.
fn told(count: usize) -> Scene {
    let mut scene = scene(count, 0);
    scene.say(&frame(SETTINGS, 0, 0, &[]));
    assert_eq!(scene.ask_all(), count);
    scene.say(&[]);
    scene
}

impl Scene {
    fn say(&mut self, bytes: &[u8]) {
        self.http2.feed(bytes);
        self.http2.advance(&self.template, &self.content);
        self.http2.hand_over(|_| Ok::<_, ()>(())).unwrap();
        self.http2.advance(&self.template, &self.content);
    }
}

#[test]
fn requests_that_a_goaway_leaves_out_are_counted_and_the_others_answered() {
    let mut scene = told(3);
    let last_stream_and_no_error = [0, 0, 0, 1, 0, 0, 0, 0];
    scene.say(&frame(GOAWAY, 0, 0, &last_stream_and_no_error));
    assert_eq!(scene.http2.take_outcomes(), [Outcome::Failed(RequestFailure::GoAway); 2]);
    assert_eq!((scene.http2.in_flight(), scene.ask(0)), (1, false));
    scene.say(&frame(HEADERS, WHOLE, 1, OK));
    assert_eq!(scene.http2.take_outcomes().iter().map(since).collect::<Vec<_>>(), [0]);
    assert_eq!(scene.http2.end(), Some(End::Orderly));
}

#[test]
fn what_is_no_http_2_breaks_the_connection_and_is_counted() {
    for bytes in [
        b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n".to_vec(),
        frame(HEADERS, WHOLE, 1, &[0xff; 40]),
        frame(HEADERS, WHOLE, 2, OK),
        frame(RST_STREAM, 0, 9, &[0; 4]),
        frame(SETTINGS, 0, 1, &[]),
    ] {
        let mut scene = told(2);
        scene.say(&bytes);
        let found = scene.http2.take_outcomes();
        assert_eq!(found, [Outcome::Failed(RequestFailure::Malformed); 2], "{bytes:?}");
        assert!(scene.http2.end().is_some());
        assert!(!scene.ask(0));
    }
    let mut idle = scene(1, 0);
    idle.say(b"220 welcome to the mail server\r\n");
    assert_eq!(idle.http2.take_outcomes(), [Outcome::Failed(RequestFailure::Malformed)]);
}

#[test]
fn a_response_that_is_not_the_streams_or_not_right_is_named() {
    let content = Content::new();
    let head = |identity: &str| {
        let head = http::Response::builder().header(BACKEND, "9301").header(IDENTITY, identity);
        head.body(()).unwrap()
    };
    const MINE: &str = "00000005-0000000000000001";
    for (identity, body, failure) in [
        ("00000006-0000000000000001", content.from(0, 100), RequestFailure::WrongClient),
        ("00000005-0000000000000000", content.from(0, 100), RequestFailure::Duplicated),
        ("00000005-0000000000000002", content.from(0, 100), RequestFailure::Corrupt),
        (MINE, content.from(1, 100), RequestFailure::Corrupt),
        (MINE, content.from(0, 99), RequestFailure::Corrupt),
        (MINE, content.from(0, 101), RequestFailure::Corrupt),
    ] {
        let mut scene = scene_of(1, 100, ("GET", "/bytes/100", Payload::None)).filled();
        let (_, mut respond) = scene.server.asked.pop_front().unwrap();
        let mut send = respond.send_response(head(identity), false).unwrap();
        send.send_data(Bytes::copy_from_slice(body), true).unwrap();
        assert_eq!(scene.outcomes(), [Outcome::Failed(failure)], "{identity} {}", body.len());
        assert_eq!((scene.http2.end(), scene.http2.has_room()), (None, true));
    }
}

#[test]
fn statuses_backends_and_bodies_are_told() {
    let mut scene = scene_of(2, 100, ("GET", "/bytes/40000", Payload::None)).filled();
    answer(scene.server.asked.pop_front().unwrap(), 503, b"sorry");
    answer(scene.server.asked.pop_front().unwrap(), 200, scene.content.from(0, 40_000));
    let mut found = Vec::new();
    for outcome in scene.outcomes() {
        let Outcome::Answered { response, .. } = outcome else { panic!("{outcome:?}") };
        found.push((response.status, response.backend, response.bytes));
    }
    found.sort_unstable();
    assert_eq!(found, [(200, 9_301, 40_000), (503, 9_301, 5)]);
}

/// Takes a request's body as far as it has come, and gives its room back.
fn take(body: &mut RecvStream, into: &mut Vec<u8>) {
    let mut context = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(bytes)) = body.poll_data(&mut context) {
        let bytes = bytes.unwrap();
        into.extend_from_slice(&bytes);
        body.flow_control().release_capacity(bytes.len()).unwrap();
    }
}

#[test]
fn a_body_goes_out_as_far_as_the_windows_allow() {
    const COUNT: usize = 300_000;
    for payload in [Payload::Content(COUNT), Payload::Bytes(vec![7; COUNT])] {
        let mut scene = scene_of(2, 100, ("POST", "/echo", payload.clone())).filled();
        let mut asked: Vec<_> = std::mem::take(&mut scene.server.asked).into();
        let mut bodies = [Vec::new(), Vec::new()];
        // A window of 65,535 bytes is all that the server has given for both.
        for _ in 0..2 * COUNT / 16_384 {
            for (asked, body) in asked.iter_mut().zip(&mut bodies) {
                take(asked.0.body_mut(), body);
            }
            scene.settle();
        }
        for (asked, body) in asked.into_iter().zip(bodies) {
            assert!(asked.0.body().is_end_stream());
            match &payload {
                Payload::Bytes(bytes) => assert!(body == *bytes),
                _ => assert!(body.len() == COUNT && scene.content.matches(0, &body)),
            }
            answer(asked, 200, &body[..60_000]);
        }
        assert_eq!(scene.outcomes(), [Outcome::Failed(RequestFailure::Corrupt); 2], "too short");
    }
}

#[test]
fn requests_that_wait_too_long_are_cancelled_one_by_one() {
    let mut scene = scene(2, 100).filled();
    let patience = Duration::from_nanos(10);
    assert_eq!(scene.http2.expire(Now::from_nanos(10), patience), 0);
    assert_eq!(scene.http2.expire(Now::from_nanos(11), patience), 1);
    assert_eq!((scene.outcomes(), scene.http2.in_flight()), (vec![], 1));
    let (_, mut respond) = scene.server.asked.pop_front().unwrap();
    let mut context = Context::from_waker(Waker::noop());
    let Poll::Ready(Ok(reason)) = respond.poll_reset(&mut context) else { panic!("no reset") };
    assert_eq!((reason, scene.ask(12)), (Reason::CANCEL, true));
}

#[test]
fn a_new_connection_goes_on_with_the_count() {
    let mut scene = scene(2, 100).filled();
    scene.http2 = scene.http2.anew();
    assert_eq!((scene.http2.in_flight(), scene.ask(0)), (0, false), "it is not open");
    scene.http2.open();
    scene.server = Server::new(100);
    scene.settle();
    assert!(scene.ask(0));
    scene.settle();
    assert_eq!(scene.server.asked[0].0.headers()[IDENTITY], "00000005-0000000000000003");
}

/// Whatever a server says, nothing is lost count of and nothing panics.
#[test]
fn any_bytes_from_a_server_are_borne() {
    let good = [
        frame(HEADERS, WHOLE, 1, OK),
        frame(HEADERS, 4, 3, OK),
        frame(0, 0, 3, b"body"),
        frame(0, 1, 3, &[]),
        frame(6, 0, 0, &[7; 8]),
        frame(8, 0, 0, &[0, 0, 1, 0]),
        frame(RST_STREAM, 0, 5, &[0, 0, 0, 7]),
        frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 1, 0, 4, 0, 0, 255, 255]),
        frame(GOAWAY, 0, 0, &[0, 0, 0, 7, 0, 0, 0, 0]),
    ];
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 33) as usize % below
    };
    let mut ends = 0;
    for _ in 0..2_000 {
        let mut scene = told(4);
        let mut answered = 0;
        for _ in 0..12 {
            let mut bytes = good[random(good.len())].clone();
            if random(3) == 0 {
                let place = random(bytes.len());
                bytes[place] = random(256) as u8;
            }
            scene.say(&bytes);
            answered += scene.http2.take_outcomes().len();
        }
        let in_flight = scene.http2.in_flight();
        let of_the_connection = usize::from(scene.http2.end() == Some(End::Broken));
        let all = in_flight + answered;
        assert!((4..=4 + of_the_connection).contains(&all), "{in_flight} and {answered}");
        ends += of_the_connection;
    }
    assert!(ends > 100, "it was too tame: {ends}");
}
