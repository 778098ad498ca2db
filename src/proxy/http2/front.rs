//! A user's connection that speaks HTTP/2. Owns its streams, the connection of `h2` under them, and when it is to end;
//! what goes to and comes from the user is its gateway's to send and receive, and the streams' own gateways are told
//! of by [`News`].

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{self, Connection, Handshake, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request};

use super::guard::{Excess, Guard, PREFACE};
use super::pipe::{self, Flag, Mouth, Pipe};
use super::stream::{Bell, Ready, Stream};
use super::{
    CONNECTION_WINDOW, FRAME_BYTES_MAX, LIST_BYTES_MAX, OWED_MAX, RESET_STREAMS_MAX, STREAM_WINDOW,
    upward,
};
use crate::base::time::Now;
use crate::proxy::{Event, StreamCmd};
use crate::ring::pool::Pool;

/// How long a user may take to acknowledge our SETTINGS (RFC 9113 section 6.5.3).
const AGREED_WITHIN: Duration = Duration::from_secs(10);
/// How often the connection and its streams are called in turn; each round moves something.
const ROUNDS_MAX: usize = 1000;

/// What has happened to a stream.
#[derive(Debug)]
pub enum News {
    /// There is a new one, which came as the so manieth.
    Opened(u32),
    Happened(Event),
    /// The user has ended it, or the connection has.
    Gone,
}

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
    streams: Vec<Option<Stream>>,
    free: Vec<u32>,
    ready: Arc<Ready>,
    /// Streams that wait until `h2` has got rid of what it holds.
    held_back: Vec<u32>,
    /// Content in the hands of `h2`.
    owed: usize,
    news: VecDeque<(u32, News)>,
    began: Now,
    /// When the last stream ended.
    idle_since: Now,
    opened: u32,
    drains: bool,
    excess: Option<Excess>,
}

impl Front {
    /// `streams_max` is what the user is told.
    pub fn new(streams_max: u32, now: Now) -> Front {
        let (pipe, mouth) = pipe::pipe();
        let (flag, waker) = Flag::new();
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
            streams: Vec::new(),
            free: Vec::new(),
            ready: Arc::default(),
            held_back: Vec::new(),
            owed: 0,
            news: VecDeque::new(),
            began: now,
            idle_since: now,
            opened: 0,
            drains: false,
            excess: None,
        }
    }

    /// Bytes have come from the user.
    pub fn received(&mut self, bytes: &[u8], now: Now) {
        let counted = self.guard.received(bytes, now);
        self.mouth.push(bytes);
        self.flag.set();
        if let Err(excess) = counted {
            self.calm(excess);
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
        self.streams.len() - self.free.len()
    }

    /// Bytes on the heap that the user has made us hold.
    pub fn held(&self) -> usize {
        let streams: usize = self.streams.iter().flatten().map(Stream::held).sum();
        self.mouth.unread() + streams
    }

    /// What the user has done too much of, said once.
    pub fn take_excess(&mut self) -> Option<Excess> {
        self.excess.take()
    }

    /// The next thing that has happened to a stream.
    pub fn next_news(&mut self) -> Option<(u32, News)> {
        self.news.pop_front()
    }

    pub fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// Takes a command of a stream's gateway; what follows from it comes with [`Front::run`].
    pub fn command(&mut self, number: u32, what: StreamCmd, pool: &Pool) {
        if let Some(stream) = self.stream(number) {
            stream.command(what, pool);
        } else {
            debug_assert!(false, "a stream without a gateway takes no commands");
        }
    }

    /// The gateway of a stream has let go of it, with nothing under way.
    pub fn forget(&mut self, number: u32, is_reset: bool, now: Now) {
        let Some(mut stream) = self.streams.get_mut(number as usize).and_then(Option::take) else {
            return;
        };
        stream.close(is_reset);
        self.free.push(number);
        self.flag.set();
        if self.live() == 0 {
            self.idle_since = now;
        }
    }

    /// Takes no further streams; the user is told in two steps, so that none on its way is lost (RFC 9113 section 6.8).
    pub fn drain(&mut self) {
        if let Link::Open(connection) = &mut self.link
            && !self.drains
        {
            connection.graceful_shutdown();
            self.flag.set();
        }
        self.drains = true;
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
        self.streams.iter().flatten().for_each(|stream| stream.bell().ring());
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
        let idle = (self.live() == 0).then(|| self.idle_since.plus(patience.idle));
        [agreed, block, idle].into_iter().flatten().min()
    }

    /// The deadline has passed.
    pub fn expire(&mut self, patience: &Patience, now: Now) {
        let block = self.guard.block_since().map(|since| since.plus(patience.head));
        if !self.guard.is_agreed() && self.began.plus(AGREED_WITHIN) <= now {
            self.break_off(Reason::SETTINGS_TIMEOUT);
        } else if block.is_some_and(|end| end <= now) {
            self.break_off(Reason::ENHANCE_YOUR_CALM);
        } else if self.live() == 0 && self.idle_since.plus(patience.idle) <= now {
            self.break_off(Reason::NO_ERROR);
        }
    }

    /// Goes on as far as it can without waiting. What is to be sent to the user, at most `most` bytes, is written to
    /// `memory`.
    pub fn run(&mut self, memory: Vec<u8>, most: usize, cx: &mut Circumstances<'_>) -> Vec<u8> {
        self.mouth.lend(memory, most);
        let mut ready = std::mem::take(&mut self.held_back);
        self.flag.set();
        for _ in 0..ROUNDS_MAX {
            let is_woken = self.flag.take();
            if is_woken {
                self.poll(cx);
                self.owed = self.owed.min(OWED_MAX * self.live());
            }
            ready.append(&mut self.ready.take());
            if ready.is_empty() && !is_woken {
                break;
            }
            for number in ready.drain(..) {
                self.advance(number, cx);
            }
        }
        let written = self.mouth.take();
        self.owed = self.owed.saturating_sub(written.len());
        written
    }

    fn advance(&mut self, number: u32, cx: &mut Circumstances<'_>) {
        let (owed, is_over) = (self.owed, self.is_over());
        let Some(stream) = self.stream(number) else { return };
        let given = stream.advance(owed, is_over, cx.pool);
        let happened = std::mem::take(&mut stream.happened);
        let (waits, is_gone) = (stream.waits_for_us(owed + given), stream.has_just_gone());
        self.news.extend(happened.into_iter().map(|event| (number, News::Happened(event))));
        if is_gone {
            self.news.push_back((number, News::Gone));
        }
        if waits {
            self.held_back.push(number);
        }
        self.owed += given;
        self.guard.sent(given);
    }

    fn stream(&mut self, number: u32) -> Option<&mut Stream> {
        self.streams.get_mut(number as usize)?.as_mut()
    }

    fn poll(&mut self, cx: &mut Circumstances<'_>) {
        let waker = self.waker.clone();
        let context = &mut Context::from_waker(&waker);
        loop {
            let come = match &mut self.link {
                Link::Over => return,
                Link::Handshake(handshake) => match Pin::new(&mut **handshake).poll(context) {
                    Poll::Pending => return,
                    Poll::Ready(Ok(connection)) => {
                        self.link = Link::Open(Box::new(connection));
                        if std::mem::take(&mut self.drains) {
                            self.drain();
                        }
                        continue;
                    }
                    Poll::Ready(Err(_)) => None,
                },
                Link::Open(connection) => match connection.poll_accept(context) {
                    Poll::Pending => return,
                    Poll::Ready(come) => come.and_then(Result::ok),
                },
            };
            let Some((request, respond)) = come else {
                return self.cut();
            };
            self.open(request, respond, cx);
        }
    }

    fn open(
        &mut self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        cx: &Circumstances<'_>,
    ) {
        // A place is free only when the stream's gateway, and with it its backend, is done.
        if self.live() >= cx.streams_max as usize {
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
        let (parts, request) = request.into_parts();
        let mut text = Vec::with_capacity(512);
        let Ok(framing) = upward::head(&mut text, &parts, request.is_end_stream()) else {
            respond.send_reset(Reason::PROTOCOL_ERROR);
            if let Err(excess) = self.guard.reset(cx.now) {
                self.calm(excess);
            }
            return;
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.streams.push(None);
            (self.streams.len() - 1) as u32
        });
        let bell = Bell::new(number, &self.ready);
        let is_head = parts.method == Method::HEAD;
        let stream = Stream::new(bell, request, respond, (text, framing), is_head);
        self.streams[number as usize] = Some(stream);
        self.opened = self.opened.wrapping_add(1);
        self.news.push_back((number, News::Opened(self.opened)));
    }
}
