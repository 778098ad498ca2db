//! A connection to a backend that speaks HTTP/2, over which the requests of many users go. Owns its streams, the
//! connection of `h2` under them, and how many it may carry; what is sent and received is the owner's of its socket.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::client::{self, Connection, SendRequest};

use super::pipe::{self, Mouth, Pipe};
use super::stream::Stream;
use super::streams::{self, News, Outlet, Streams};
use super::{
    CONNECTION_WINDOW, FRAME_BYTES_MAX, LIST_BYTES_MAX, OWED_MAX, RESET_STREAMS_MAX, SHARED_FIRST,
    SHARED_MAX, STREAM_WINDOW,
};
use crate::base::bells::Flag;
use crate::proxy::StreamCmd;
use crate::ring::pool::Pool;

type Handshake =
    dyn Future<Output = Result<(SendRequest<Bytes>, Connection<Pipe, Bytes>), h2::Error>>;

enum Link {
    Handshake(Pin<Box<Handshake>>),
    Open(Box<Connection<Pipe, Bytes>>),
    Over,
}

pub struct Back {
    link: Link,
    sender: Option<SendRequest<Bytes>>,
    scheme: &'static str,
    mouth: Mouth,
    flag: Arc<Flag>,
    waker: Waker,
    streams: Streams,
    /// It gets no further streams.
    is_retired: bool,
}

impl Back {
    /// A connection that has just been established. It takes streams once it has been [run](Back::run).
    pub fn new(is_tls: bool) -> Back {
        let (pipe, mouth) = pipe::pipe();
        let flag = Arc::<Flag>::default();
        let waker = Waker::from(Arc::clone(&flag));
        let handshake = client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(LIST_BYTES_MAX)
            .initial_max_send_streams(SHARED_FIRST)
            .max_concurrent_reset_streams(RESET_STREAMS_MAX)
            .max_send_buffer_size(OWED_MAX)
            .enable_push(false)
            .handshake(pipe);
        Back {
            link: Link::Handshake(Box::pin(handshake)),
            sender: None,
            scheme: if is_tls { "https" } else { "http" },
            mouth,
            flag,
            waker,
            streams: Streams::default(),
            is_retired: false,
        }
    }

    /// Bytes have come from the backend.
    pub fn received(&mut self, bytes: &[u8]) {
        self.mouth.push(bytes);
        self.flag.set();
    }

    /// No more will come.
    pub fn ended(&mut self) {
        self.mouth.end();
        self.flag.set();
    }

    /// Ends the connection without a word.
    pub fn cut(&mut self) {
        (self.link, self.sender) = (Link::Over, None);
        self.streams.ring_all();
    }

    /// Takes no further streams.
    pub fn retire(&mut self) {
        self.is_retired = true;
    }

    /// Whether more bytes are wanted: all that came have been read.
    pub fn wants_bytes(&self) -> bool {
        self.mouth.unread() == 0
    }

    /// Whether it is of no more use.
    pub fn is_over(&self) -> bool {
        self.sender.is_none()
    }

    /// Streams that have a gateway.
    pub fn live(&self) -> usize {
        self.streams.live()
    }

    /// Whether it takes one more.
    pub fn has_room(&self) -> bool {
        let theirs = self.sender.as_ref().map_or(0, SendRequest::current_max_send_streams);
        !self.is_retired && self.live() < theirs.min(SHARED_MAX)
    }

    /// A stream for a request.
    pub fn open(&mut self) -> Option<u32> {
        let sender = self.sender.clone()?;
        let scheme = self.scheme;
        Some(self.streams.add(|bell| Stream::to_ask(bell, sender, scheme)))
    }

    /// Takes a command of a stream's gateway; what follows from it comes with [`Back::run`].
    pub fn command(&mut self, number: u32, what: StreamCmd, pool: &mut Pool) {
        self.streams.command(number, what, pool);
    }

    /// The gateway of a stream has let go of it, with nothing under way.
    pub fn forget(&mut self, number: u32) {
        self.streams.forget(number, true);
    }

    /// As [`Front::is_waiting`](super::Front::is_waiting).
    pub fn is_waiting(&self) -> bool {
        let is_last = self.live() == 0 && (self.is_retired || self.is_over());
        self.streams.is_waiting() || self.flag.is_set() || is_last
    }

    /// The next thing that has happened to a stream.
    pub fn next_news(&mut self) -> Option<(u32, News)> {
        self.streams.next_news()
    }

    /// As [`Front::run`](super::Front::run).
    pub fn run(&mut self, memory: Vec<u8>, most: usize, pool: &mut Pool) -> Vec<u8> {
        let Back { link, sender, mouth, flag, waker, streams, .. } = self;
        let outlet = Outlet { memory, most };
        let written = streams::turn(streams, (mouth, flag), outlet, pool, |streams| {
            let context = &mut Context::from_waker(waker);
            if poll(link, sender, context).is_ready() {
                (*link, *sender) = (Link::Over, None);
                streams.ring_all();
            }
            matches!(link, Link::Over)
        });
        self.streams.take_given();
        // A backend that is about to leave says so (GOAWAY, RFC 9113 section 6.8).
        let context = &mut Context::from_waker(&self.waker);
        let leaves =
            |sender: &mut SendRequest<Bytes>| sender.poll_ready(context).map(|it| it.is_err());
        self.is_retired |= self.sender.as_mut().map(leaves) == Some(Poll::Ready(true));
        written
    }
}

/// Goes on with a connection; ready when it is over.
fn poll(
    link: &mut Link,
    sender: &mut Option<SendRequest<Bytes>>,
    context: &mut Context<'_>,
) -> Poll<()> {
    loop {
        match link {
            Link::Over => return Poll::Pending,
            Link::Handshake(handshake) => match handshake.as_mut().poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok((requests, connection))) => {
                    *sender = Some(requests);
                    *link = Link::Open(Box::new(connection));
                }
                Poll::Ready(Err(_)) => return Poll::Ready(()),
            },
            Link::Open(connection) => return Pin::new(&mut **connection).poll(context).map(drop),
        }
    }
}
