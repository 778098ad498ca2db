//! HTTP/2 as the load speaks it: several requests at a time on a connection, each on a stream of its own.
//! Owns one connection as h2 drives it over memory ([`pipe`]), and the streams in flight on it. Knows no
//! socket; time comes in as an argument.
//!
//! ```text
//!   ask --> stream in flight --(response, reset, GOAWAY, connection lost)--> outcome
//!             ^     |
//!             +-----+  bytes fed, room made: polled again if its bell has rung
//! ```

mod pipe;
mod stream;
mod template;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};

use super::message::Content;
use super::tally::RequestFailure;
use super::web::Response;
use crate::base::bells::{Bell, Flag, Rung};
use crate::base::time::Now;
pub use pipe::OUTGOING_BYTES_MAX;
use pipe::Pipe;
use stream::{Stream, failure};
pub use template::Template;

/// Limit on the requests in flight on a connection.
pub const STREAMS_MAX: usize = 1_000;
/// How many bytes a server may send ahead on a stream, and on all of a connection. What came is checked at
/// once, so that no more than a part of it is ever in memory.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// How much of a stream's body may wait in memory for the server's windows.
pub const STREAM_SEND_BYTES_MAX: usize = 64 << 10;
/// Limit on the fields of a response (RFC 9113 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE).
const FIELDS_BYTES_MAX: u32 = 64 << 10;
/// Requests in flight before the server has said how many it permits: what it is sent first is never
/// refused for being too much.
const STREAMS_AT_FIRST: usize = 1;
/// How often a connection is polled before others have their turn.
const PASSES_MAX: usize = 64;

/// What became of one request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// `since`: when it was sent or due.
    Answered {
        since: Now,
        response: Response,
    },
    Failed(RequestFailure),
}

/// How a connection has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// As the server announced (GOAWAY), after what was in flight.
    Orderly,
    Broken,
}

/// One connection.
#[derive(Debug)]
pub struct Http2 {
    connection: u32,
    sequence: u64,
    link: Option<Link>,
    places: Box<[Place]>,
    /// Places without a stream.
    free: Vec<usize>,
    rung: Arc<Rung>,
    /// Those being polled; kept for its memory.
    polling: Vec<u32>,
    outcomes: Vec<Outcome>,
    end: Option<End>,
}

/// A stream in flight, and by what it is woken.
#[derive(Debug)]
struct Place {
    bell: Arc<Bell>,
    waker: Waker,
    stream: Option<Stream>,
}

/// What h2 holds of a connection.
#[derive(Debug)]
struct Link {
    pipe: Pipe,
    connection: Connection<Pipe, Bytes>,
    requests: SendRequest<Bytes>,
    flag: Arc<Flag>,
    waker: Waker,
    /// The server takes no more requests here, or h2 has none left to number.
    is_leaving: bool,
}

impl Http2 {
    /// At most `streams` requests are in flight at a time.
    pub fn new(connection: u32, streams: usize) -> Http2 {
        let rung = Arc::new(Rung::default());
        let place = |place: usize| {
            let bell = Bell::new(place as u32, &rung);
            Place { waker: Waker::from(Arc::clone(&bell)), bell, stream: None }
        };
        Http2 {
            connection,
            sequence: 0,
            link: None,
            places: (0..streams).map(place).collect(),
            free: (0..streams).rev().collect(),
            rung,
            polling: Vec::new(),
            outcomes: Vec::new(),
            end: None,
        }
    }

    /// The same for a new connection; the count goes on.
    pub fn anew(self) -> Http2 {
        Http2 { sequence: self.sequence, ..Http2::new(self.connection, self.places.len()) }
    }

    /// The connection is open: what begins HTTP/2 is ready to go.
    pub fn open(&mut self) {
        self.link = Link::new();
        self.end = self.link.is_none().then_some(End::Broken);
    }

    pub fn in_flight(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// How many requests the server permits at a time.
    pub fn permitted(&self) -> usize {
        self.link.as_ref().map_or(0, |link| link.requests.current_max_send_streams())
    }

    /// Whether [`Http2::ask`] would make a request.
    pub fn has_room(&self) -> bool {
        let is_open = self.link.is_some() && self.end.is_none() && !self.is_leaving();
        is_open && !self.free.is_empty() && self.in_flight() < self.permitted()
    }

    /// Makes a request; false if there is no room for it.
    pub fn ask(&mut self, template: &Template, since: Now, sent: Now) -> bool {
        if !self.has_room() {
            return false;
        }
        let Some(link) = &mut self.link else { return false };
        let Some(place) = self.free.pop() else { return false };
        let sequence = self.sequence + 1;
        let (head, is_whole) =
            (template.head(self.connection, sequence), template.request.payload.is_empty());
        // A clone waits for no stream of the one before it; how many there may be is known.
        let asked = link.requests.clone().send_request(head, is_whole);
        let Ok((response, outgoing)) = asked else {
            link.is_leaving = true;
            self.free.push(place);
            return false;
        };
        self.sequence = sequence;
        let outgoing = (!is_whole).then_some(outgoing);
        let (names, times) = ((self.connection, sequence), (since, sent));
        let place = &mut self.places[place];
        place.stream = Some(Stream::new(names, times, response, outgoing));
        place.bell.ring();
        true
    }

    /// Adds bytes that came from the server.
    pub fn feed(&mut self, bytes: &[u8]) {
        if let Some(link) = &self.link {
            link.pipe.feed(bytes);
            link.flag.set();
        }
    }

    /// Whether so many bytes wait that no more should be received.
    pub fn is_full(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.pipe.is_full())
    }

    /// Polls what is to be polled.
    pub fn advance(&mut self, template: &Template, content: &Content) {
        for _ in 0..PASSES_MAX {
            if self.end.is_some() || !self.is_woken() {
                return;
            }
            let (first, ended) = (self.outcomes.len(), self.poll_connection());
            self.poll_streams(template, content);
            if let Some(ended) = ended {
                self.conclude(ended, first);
            }
        }
    }

    /// Whether [`Http2::advance`] has something to do.
    pub fn is_woken(&self) -> bool {
        let is_up = self.link.as_ref().is_some_and(|link| link.flag.is_set());
        self.end.is_none() && (is_up || !self.rung.is_empty())
    }

    /// Polls the connection; says how it has ended, if so.
    fn poll_connection(&mut self) -> Option<(End, RequestFailure)> {
        let link = self.link.as_mut()?;
        if !link.flag.take() {
            return None;
        }
        match Pin::new(&mut link.connection).poll(&mut Context::from_waker(&link.waker)) {
            Poll::Pending => {
                link.look_whether_it_is_leaving();
                None
            }
            Poll::Ready(Ok(())) => Some((End::Orderly, RequestFailure::Closed)),
            Poll::Ready(Err(error)) => Some((End::Broken, failure(&error))),
        }
    }

    /// The connection has ended, and the responses that came before that were taken. Whatever else is in
    /// flight has failed. A broken connection is one failure at least; `first` is the first outcome that
    /// may tell of it.
    fn conclude(&mut self, (end, failure): (End, RequestFailure), first: usize) {
        for number in 0..self.places.len() {
            if self.places[number].stream.is_some() {
                self.let_go(number);
                self.outcomes.push(Outcome::Failed(failure));
            }
        }
        let is_told = self.outcomes[first..].iter().any(|it| matches!(it, Outcome::Failed(_)));
        if end == End::Broken && !is_told {
            self.outcomes.push(Outcome::Failed(failure));
        }
        self.end = Some(end);
    }

    fn poll_streams(&mut self, template: &Template, content: &Content) {
        let mut places = std::mem::take(&mut self.polling);
        self.rung.take(&mut places);
        for number in places.drain(..).map(|number| number as usize) {
            let place = &mut self.places[number];
            place.bell.answer();
            let Some(stream) = &mut place.stream else { continue };
            let mut context = Context::from_waker(&place.waker);
            let Poll::Ready(ended) = stream.advance(template, content, &mut context) else {
                continue;
            };
            let since = stream.since;
            self.let_go(number);
            self.outcomes.push(match ended {
                Ok(response) => Outcome::Answered { since, response },
                Err(failure) => Outcome::Failed(failure),
            });
        }
        self.polling = places;
    }

    /// Whatever has come out since the last call.
    pub fn take_outcomes(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }

    /// The connection serves no more requests, and none is in flight.
    pub fn end(&self) -> Option<End> {
        let has_left = self.in_flight() == 0 && self.is_leaving();
        self.end.or(has_left.then_some(End::Orderly))
    }

    /// Cancels requests that have waited longer than `patience`; returns how many.
    pub fn expire(&mut self, now: Now, patience: Duration) -> usize {
        let mut lost = 0;
        for number in 0..self.places.len() {
            let stream = self.places[number].stream.as_ref();
            if stream.is_some_and(|stream| now.since(stream.sent) > patience) {
                self.let_go(number);
                lost += 1;
            }
        }
        lost
    }

    /// A stream that has not ended is cancelled by this.
    fn let_go(&mut self, number: usize) {
        if self.places[number].stream.take().is_some() {
            self.free.push(number);
        }
    }

    /// Whether the server has said that it takes no more requests here (GOAWAY).
    pub fn is_leaving(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.is_leaving)
    }

    pub fn has_outgoing(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.pipe.has_outgoing())
    }

    /// Hands all bytes that are to go to `take`, which may refuse them as a whole.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn hand_over<E>(&mut self, take: impl FnOnce(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let Some(link) = &self.link else { return Ok(()) };
        if link.pipe.hand_over(take)? {
            link.flag.set();
        }
        Ok(())
    }
}

impl Link {
    /// `None` if h2 could not begin, which needs no more than memory.
    fn new() -> Option<Link> {
        let (pipe, flag) = (Pipe::default(), Arc::new(Flag::default()));
        let waker = Waker::from(Arc::clone(&flag));
        let mut builder = Builder::new();
        builder
            .enable_push(false)
            .initial_max_send_streams(STREAMS_AT_FIRST)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_send_buffer_size(STREAM_SEND_BYTES_MAX)
            .max_header_list_size(FIELDS_BYTES_MAX);
        let handshake = pin!(builder.handshake::<_, Bytes>(pipe.clone()));
        let begun = handshake.poll(&mut Context::from_waker(&waker));
        let Poll::Ready(Ok((requests, connection))) = begun else { return None };
        flag.set();
        Some(Link { pipe, connection, requests, flag, waker, is_leaving: false })
    }

    fn look_whether_it_is_leaving(&mut self) {
        let ready = self.requests.poll_ready(&mut Context::from_waker(&self.waker));
        self.is_leaving |= matches!(ready, Poll::Ready(Err(_)));
    }
}
