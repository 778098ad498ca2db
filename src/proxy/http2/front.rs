//! A user's connection that speaks HTTP/2. Owns its streams, the connection of `h2` under them, and when it is to end;
//! what goes to and comes from the user is its gateway's to send and receive, and the streams' own gateways are told
//! of by [`News`].

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{self, Connection, Handshake, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request};

use super::guard::{Breach, Excess, Guard, PREFACE};
use super::pipe::{self, Mouth, Pipe};
use super::stream::Stream;
use super::streams::{self, News, Outlet, Streams};
use super::{
    CONNECTION_WINDOW, FRAME_BYTES_MAX, LIST_BYTES_MAX, OWED_MAX, RESET_STREAMS_MAX, STREAM_WINDOW,
    writing,
};
use crate::base::bells::Flag;
use crate::base::time::Now;
use crate::proxy::StreamCmd;
use crate::ring::pool::Pool;

/// How long a user may take to acknowledge our SETTINGS (RFC 9113 section 6.5.3).
const AGREED_WITHIN: Duration = Duration::from_secs(10);
/// How long a user without a stream that is told to go elsewhere may take to hear it.
const TOLD_WITHIN: Duration = Duration::from_secs(1);

/// What a front works with while it is called.
pub struct Circumstances<'a> {
    pub now: Now,
    pub pool: &'a mut Pool,
    /// How many streams there may be at once.
    pub streams_max: u32,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a header block, from its first frame to its last.
    pub head: Duration,
    /// Without a stream.
    pub idle: Duration,
}

enum Link {
    Handshake(Box<Handshake<Pipe, Bytes>>),
    Open(Box<Connection<Pipe, Bytes>>),
    Over,
}

pub struct Front {
    link: Link,
    mouth: Mouth,
    guard: Guard,
    flag: Arc<Flag>,
    waker: Waker,
    streams: Streams,
    began: Now,
    /// When the last stream ended.
    idle_since: Now,
    opened: u32,
    /// Since when the user is told to go elsewhere; [`Now::NEVER`]: it is not.
    drains_since: Now,
    excess: Option<Excess>,
}

impl Front {
    /// `streams_max` is what the user is told.
    pub fn new(streams_max: u32, now: Now) -> Front {
        let (pipe, mouth) = pipe::pipe();
        let flag = Arc::<Flag>::default();
        let waker = Waker::from(Arc::clone(&flag));
        let handshake = server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(LIST_BYTES_MAX)
            .max_concurrent_streams(streams_max)
            .max_concurrent_reset_streams(RESET_STREAMS_MAX)
            .max_send_buffer_size(OWED_MAX)
            .handshake(pipe);
        Front {
            link: Link::Handshake(Box::new(handshake)),
            mouth,
            guard: Guard::new(PREFACE.len()),
            flag,
            waker,
            streams: Streams::default(),
            began: now,
            idle_since: now,
            opened: 0,
            drains_since: Now::NEVER,
            excess: None,
        }
    }

    /// Bytes have come from the user.
    pub fn received(&mut self, bytes: &[u8], now: Now) {
        let counted = self.guard.received(bytes, now);
        self.mouth.push(bytes);
        self.flag.set();
        match counted {
            Ok(()) => {}
            Err(Breach::Excess(excess)) => self.calm(excess),
            Err(Breach::Frame(why)) => self.break_off(why),
        }
    }

    /// No more will come.
    pub fn ended(&mut self) {
        self.mouth.end();
        self.flag.set();
    }

    /// Whether more bytes are wanted: all that came have been read.
    pub fn wants_bytes(&self) -> bool {
        self.mouth.unread() == 0
    }

    /// Whether nothing more will be sent.
    pub fn is_over(&self) -> bool {
        matches!(self.link, Link::Over)
    }

    /// Streams that have a gateway.
    pub fn live(&self) -> usize {
        self.streams.live()
    }

    /// Bytes on the heap that the user has made us hold.
    pub fn held(&self) -> usize {
        self.mouth.unread()
    }

    /// What the user has done too much of, said once.
    pub fn take_excess(&mut self) -> Option<Excess> {
        self.excess.take()
    }

    /// The next thing that has happened to a stream.
    pub fn next_news(&mut self) -> Option<(u32, News)> {
        self.streams.next_news()
    }

    /// Whether [`Front::run`] has something to do: a stream has, `h2` has, or the last stream of a connection that ends
    /// is gone.
    pub fn is_waiting(&self) -> bool {
        let is_last = self.live() == 0 && (self.drains() || self.is_over());
        self.streams.is_waiting() || self.flag.is_set() || is_last
    }

    pub fn has_news(&self) -> bool {
        self.streams.has_news()
    }

    /// Takes a command of a stream's gateway; what follows from it comes with [`Front::run`].
    pub fn command(&mut self, number: u32, what: StreamCmd, pool: &mut Pool) {
        self.streams.command(number, what, pool);
    }

    /// The gateway of a stream has let go of it, with nothing under way.
    pub fn forget(&mut self, number: u32, is_reset: bool, now: Now) {
        if self.streams.forget(number, is_reset) {
            self.guard.answered();
        }
        if self.live() == 0 {
            self.idle_since = now;
        }
    }

    /// Takes no further streams; the user is told in two steps, so that none on its way is lost (RFC 9113 section 6.8).
    pub fn drain(&mut self, now: Now) {
        if let Link::Open(connection) = &mut self.link
            && self.drains_since == Now::NEVER
        {
            connection.graceful_shutdown();
            self.flag.set();
        }
        self.drains_since = self.drains_since.min(now);
    }

    fn drains(&self) -> bool {
        self.drains_since != Now::NEVER
    }

    /// Ends the connection, and says why.
    pub fn break_off(&mut self, why: Reason) {
        match &mut self.link {
            Link::Open(connection) => connection.abrupt_shutdown(why),
            Link::Handshake(_) | Link::Over => self.link = Link::Over,
        }
        self.flag.set();
    }

    /// Ends the connection without a word.
    pub fn cut(&mut self) {
        self.link = Link::Over;
        self.streams.ring_all();
    }

    fn calm(&mut self, excess: Excess) {
        if !self.is_over() {
            self.excess.get_or_insert(excess);
            self.break_off(Reason::ENHANCE_YOUR_CALM);
        }
    }

    /// When [`Front::expire`] has something to do.
    pub fn deadline(&self, patience: &Patience) -> Option<Now> {
        let agreed = (!self.guard.is_agreed()).then(|| self.began.plus(AGREED_WITHIN));
        let block = self.guard.block_since().map(|since| since.plus(patience.head));
        let idle = (self.live() == 0).then(|| self.idle_ends_at(patience));
        [agreed, block, idle].into_iter().flatten().min()
    }

    /// When a connection without a stream has no reason to go on. Of one that drains, the user is told the last number
    /// in answer to what it is told first; one that does not answer is not waited for.
    fn idle_ends_at(&self, patience: &Patience) -> Now {
        let idle = self.idle_since.plus(patience.idle);
        idle.min(self.drains_since.max(self.idle_since).plus(TOLD_WITHIN))
    }

    /// The deadline has passed.
    pub fn expire(&mut self, patience: &Patience, now: Now) {
        let block = self.guard.block_since().map(|since| since.plus(patience.head));
        if !self.guard.is_agreed() && self.began.plus(AGREED_WITHIN) <= now {
            self.break_off(Reason::SETTINGS_TIMEOUT);
        } else if block.is_some_and(|end| end <= now) {
            self.break_off(Reason::ENHANCE_YOUR_CALM);
        } else if self.live() == 0 && self.idle_ends_at(patience) <= now {
            self.break_off(Reason::NO_ERROR);
        }
    }

    /// Goes on as far as it can without waiting. What is to be sent to the user, at most `most` bytes, is written to
    /// `memory`.
    pub fn run(&mut self, memory: Vec<u8>, most: usize, cx: &mut Circumstances<'_>) -> Vec<u8> {
        let drains = self.drains();
        let Front { link, mouth, flag, waker, streams, guard, opened, .. } = self;
        let mut excess = None;
        let (now, streams_max) = (cx.now, cx.streams_max);
        let outlet = Outlet { memory, most };
        let written = streams::turn(streams, (mouth, flag), outlet, cx.pool, |streams| {
            let context = &mut Context::from_waker(waker);
            while let Poll::Ready(come) = accept(link, drains, context) {
                let Some((request, respond)) = come else {
                    *link = Link::Over;
                    streams.ring_all();
                    break;
                };
                // A place is free only when the stream's gateway, and with it its backend, is done.
                let is_full = streams.live() >= streams_max as usize;
                if let Err(too_much) =
                    open(streams, is_full, opened, guard, (request, respond), now)
                {
                    excess = Some(too_much);
                }
            }
            matches!(link, Link::Over)
        });
        self.guard.sent(self.streams.take_given());
        let Some(excess) = excess else { return written };
        // The last word goes out at once.
        self.calm(excess);
        let rest = self.run(Vec::new(), most - written.len(), cx);
        [written, rest].concat()
    }
}

type Come = (Request<RecvStream>, SendResponse<Bytes>);

/// The next request; `None`: there will be no further one, as the connection is over.
fn accept(link: &mut Link, drains: bool, context: &mut Context<'_>) -> Poll<Option<Come>> {
    loop {
        match link {
            Link::Over => return Poll::Pending,
            Link::Handshake(handshake) => match Pin::new(&mut **handshake).poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(mut connection)) => {
                    if drains {
                        connection.graceful_shutdown();
                    }
                    *link = Link::Open(Box::new(connection));
                }
                Poll::Ready(Err(_)) => return Poll::Ready(None),
            },
            Link::Open(connection) => {
                return connection.poll_accept(context).map(|come| come.and_then(Result::ok));
            }
        }
    }
}

/// Takes in a stream.
fn open(
    streams: &mut Streams,
    is_full: bool,
    opened: &mut u32,
    guard: &mut Guard,
    (request, mut respond): Come,
    now: Now,
) -> Result<(), Excess> {
    if is_full {
        respond.send_reset(Reason::REFUSED_STREAM);
        return Ok(());
    }
    let (parts, request) = request.into_parts();
    let mut text = Vec::with_capacity(512);
    let Ok(framing) = writing::request(&mut text, &parts, request.is_end_stream()) else {
        respond.send_reset(Reason::PROTOCOL_ERROR);
        return guard.reset(now);
    };
    let is_head = parts.method == Method::HEAD;
    let number =
        streams.add(|bell| Stream::asked(bell, request, respond, (text, framing), is_head));
    *opened = opened.wrapping_add(1);
    streams.tell(number, News::Opened(*opened));
    Ok(())
}
