//! One stream of a user's connection: the line between its gateway, which reads and writes HTTP/1.1, and `h2`. Owns how
//! far its request has been handed up and its response handed down, and answers each of its gateway's commands once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::HeaderMap;
use nix::errno::Errno;

use super::downward::{Broken, Head, Reader};
use super::upward::{self, Framing};
use super::{OWED_MAX, PROGRESS_BYTES};
use crate::proxy::{Event, Intake, Received, Side, StreamCmd};
use crate::ring::pool::{Buf, Class, Outgoing, Pool};

/// The streams of a connection about which `h2` has something new.
#[derive(Debug, Default)]
pub struct Ready(Mutex<Vec<u32>>);

impl Ready {
    /// Those since the last call.
    pub fn take(&self) -> Vec<u32> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Puts a stream on that list.
#[derive(Debug)]
pub struct Bell {
    number: u32,
    is_rung: AtomicBool,
    ready: Arc<Ready>,
}

impl Bell {
    pub fn new(number: u32, ready: &Arc<Ready>) -> Arc<Bell> {
        Arc::new(Bell { number, is_rung: AtomicBool::new(false), ready: Arc::clone(ready) })
    }

    pub fn ring(&self) {
        if !self.is_rung.swap(true, Ordering::Relaxed) {
            let list = &self.ready.0;
            list.lock().unwrap_or_else(PoisonError::into_inner).push(self.number);
        }
    }

    /// The stream has been taken off the list.
    pub fn answer(&self) {
        self.is_rung.store(false, Ordering::Relaxed);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

/// A send of the gateway's.
#[derive(Clone, Copy, Debug)]
struct Sending {
    what: Outgoing,
    bytes: usize,
    taken: usize,
}

/// What the request still brings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Content,
    /// All of it is in `text` or has been handed up.
    Ended,
    Failed,
}

pub struct Stream {
    bell: Arc<Bell>,
    waker: Waker,
    request: RecvStream,
    framing: Framing,
    source: Source,
    /// What is handed up next: text, and content behind it.
    text: Vec<u8>,
    text_read: usize,
    content: Bytes,
    asked: Option<Intake>,
    respond: SendResponse<Bytes>,
    response: Option<SendStream<Bytes>>,
    reader: Reader,
    sending: Option<Sending>,
    awaits_room: bool,
    is_gone: bool,
    is_told: bool,
    pub happened: Vec<Event>,
}

impl Stream {
    /// A request whose head is `text`.
    pub fn new(
        bell: Arc<Bell>,
        request: RecvStream,
        respond: SendResponse<Bytes>,
        (text, framing): (Vec<u8>, Framing),
        to_head_request: bool,
    ) -> Stream {
        let source = if framing == Framing::None { Source::Ended } else { Source::Content };
        Stream {
            waker: Waker::from(Arc::clone(&bell)),
            bell,
            request,
            framing,
            source,
            text,
            text_read: 0,
            content: Bytes::new(),
            asked: None,
            respond,
            response: None,
            reader: Reader::new(to_head_request),
            sending: None,
            awaits_room: false,
            is_gone: false,
            is_told: false,
            happened: Vec::new(),
        }
    }

    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Whether the user, or the connection, has ended it; said once.
    pub fn has_just_gone(&mut self) -> bool {
        self.is_gone && !std::mem::replace(&mut self.is_told, true)
    }

    /// Whether it could send more if `h2` had less in hand.
    pub fn waits_for_us(&self, owed: usize) -> bool {
        self.sending.is_some() && owed >= OWED_MAX
    }

    /// Bytes of the request that wait here.
    pub fn held(&self) -> usize {
        self.text.capacity() + self.content.len()
    }

    /// Takes a command of its gateway.
    pub fn command(&mut self, what: StreamCmd, pool: &Pool) {
        self.bell.ring();
        match what {
            StreamCmd::Receive { how, .. } => self.asked = Some(how),
            StreamCmd::CancelReceive { .. } => self.answer(Received::Stopped),
            StreamCmd::Send { what, .. } => {
                let bytes = pool.pieces(what).map(<[u8]>::len).sum();
                self.sending = Some(Sending { what, bytes, taken: 0 });
            }
            StreamCmd::CancelSend { .. } => self.sent(Err(Errno::ECANCELED)),
            StreamCmd::AwaitRoom { .. } => self.awaits_room = true,
            StreamCmd::CancelRoom { .. } => self.room(),
            StreamCmd::FinishWriting { .. } => {
                if !self.reader.is_over() {
                    self.reset(Reason::INTERNAL_ERROR);
                }
                self.stop_reading();
            }
            StreamCmd::Splice { .. }
            | StreamCmd::CancelSplice { .. }
            | StreamCmd::EndSplice { .. } => {
                debug_assert!(false, "a stream is not offered a pipe");
            }
        }
    }

    /// Nothing more of the request is wanted.
    fn stop_reading(&mut self) {
        if self.source == Source::Content {
            // The response is whole, and the user need not send the rest (RFC 9113 section 8.1).
            self.reset(Reason::NO_ERROR);
        }
        (self.source, self.text, self.text_read) = (Source::Ended, Vec::new(), 0);
        self.content = Bytes::new();
    }

    /// Its gateway has let go of it.
    pub fn close(&mut self, is_reset: bool) {
        if !self.reader.is_over() {
            let why = if is_reset { Reason::CANCEL } else { Reason::INTERNAL_ERROR };
            self.reset(why);
        }
        self.stop_reading();
    }

    fn reset(&mut self, why: Reason) {
        if self.is_gone {
            return;
        }
        match &mut self.response {
            Some(response) => response.send_reset(why),
            None => self.respond.send_reset(why),
        }
    }

    /// Moves what can be moved; returns the content that was handed to `h2`, which has so much `owed` content in hand.
    /// `is_over`: the connection is.
    pub fn advance(&mut self, owed: usize, is_over: bool, pool: &mut Pool) -> usize {
        self.bell.answer();
        let waker = self.waker.clone();
        let cx = &mut Context::from_waker(&waker);
        self.look_for_reset(cx);
        self.is_gone |= is_over;
        self.hand_up(cx, pool);
        let given = self.hand_down(owed, cx, pool);
        if self.awaits_room && (self.is_gone || self.has_room(cx)) {
            self.room();
        }
        given
    }

    fn look_for_reset(&mut self, cx: &mut Context<'_>) {
        let reset = match &mut self.response {
            Some(response) => response.poll_reset(cx),
            None => self.respond.poll_reset(cx),
        };
        self.is_gone |= reset.is_ready();
    }

    /// Answers the gateway's receive, if there is something for it.
    fn hand_up(&mut self, cx: &mut Context<'_>, pool: &mut Pool) {
        let Some(how) = self.asked else { return };
        if !self.has_text() {
            self.take_content(cx);
        }
        if !self.has_text() {
            match self.source {
                Source::Content if !self.is_gone => {}
                Source::Ended => self.answer(Received::End),
                _ => self.answer(Received::Failed(Errno::ECONNRESET)),
            }
            return;
        }
        let class = match how {
            Intake::Once { class, .. } => class,
            Intake::Many { .. } | Intake::Last { .. } => Class::Small,
        };
        let Some(mut buf) = pool.take(class) else { return self.answer(Received::NoBuffers) };
        self.fill(&mut buf, cx, pool);
        self.answer(Received::Data(buf));
    }

    fn has_text(&self) -> bool {
        self.text_read < self.text.len() || !self.content.is_empty()
    }

    /// Puts as much into a block as there is.
    fn fill(&mut self, buf: &mut Buf, cx: &mut Context<'_>, pool: &mut Pool) {
        loop {
            self.text_read += pool.append(buf, &self.text[self.text_read..]);
            if self.text_read < self.text.len() {
                return;
            }
            (self.text_read, self.text) = (0, Vec::new());
            if !self.content.is_empty() {
                let taken = pool.append(buf, &self.content);
                self.content.advance(taken);
                // The window is opened by what has gone on; `h2` refuses only what it never gave.
                let _ = self.request.flow_control().release_capacity(taken);
                if !self.content.is_empty() {
                    return;
                }
                if self.framing == Framing::Chunked {
                    self.text.extend_from_slice(b"\r\n");
                }
                continue;
            }
            self.take_content(cx);
            if !self.has_text() {
                return;
            }
        }
    }

    /// Gets the next of the request from `h2`.
    fn take_content(&mut self, cx: &mut Context<'_>) {
        while self.source == Source::Content && self.content.is_empty() {
            match self.request.poll_data(cx) {
                Poll::Ready(Some(Ok(content))) if content.is_empty() => {}
                Poll::Ready(Some(Ok(content))) => {
                    if self.framing == Framing::Chunked {
                        upward::chunk(&mut self.text, &content);
                    }
                    self.content = content;
                }
                Poll::Ready(Some(Err(_))) => self.source = Source::Failed,
                Poll::Ready(None) => match self.request.poll_trailers(cx) {
                    Poll::Ready(Ok(trailers)) => self.end_content(trailers.as_ref()),
                    Poll::Ready(Err(_)) => self.source = Source::Failed,
                    Poll::Pending => return,
                },
                Poll::Pending => return,
            }
        }
    }

    fn end_content(&mut self, trailers: Option<&HeaderMap>) {
        self.source = Source::Ended;
        if self.framing == Framing::Chunked {
            upward::last_chunk(&mut self.text, trailers);
        }
    }

    fn answer(&mut self, what: Received) {
        if self.asked.take().is_some() {
            let nonempty = self.has_text();
            self.happened.push(Event::Received { side: Side::Client, what, more: false, nonempty });
        }
    }

    /// Takes what the gateway sends, as far as there is room.
    fn hand_down(&mut self, owed: usize, cx: &mut Context<'_>, pool: &Pool) -> usize {
        let Some(mut sending) = self.sending else { return 0 };
        if self.is_gone {
            self.sent(Err(Errno::ECONNRESET));
            return 0;
        }
        let before = sending.taken;
        let given = match self.take(&mut sending, owed, cx, pool) {
            Ok(given) => given,
            Err(Broken) => {
                debug_assert!(false, "the gateway writes what can be read");
                self.reset(Reason::INTERNAL_ERROR);
                sending.taken = sending.bytes;
                0
            }
        };
        self.sending = Some(sending);
        let is_progress = sending.taken > before && sending.taken >= PROGRESS_BYTES;
        if sending.taken == sending.bytes || is_progress {
            self.sent(Ok(sending.taken as u32));
        }
        given
    }

    fn take(
        &mut self,
        sending: &mut Sending,
        owed: usize,
        cx: &mut Context<'_>,
        pool: &Pool,
    ) -> Result<usize, Broken> {
        let mut given = 0;
        while sending.taken < sending.bytes {
            if self.reader.is_over() {
                // There is nothing behind a response.
                sending.taken = sending.bytes;
            } else if self.reader.awaits_head() {
                sending.taken += self.take_head(rest(*sending, pool))?;
            } else {
                let left = sending.bytes - sending.taken;
                let room = match owed + given < OWED_MAX {
                    true => self.capacity(left.min(OWED_MAX), cx),
                    false => 0,
                };
                if room == 0 {
                    let framing = self.take_framing(*sending, pool)?;
                    sending.taken += framing;
                    if framing == 0 {
                        break;
                    }
                    continue;
                }
                let text = copy(*sending, room, pool);
                sending.taken += text.len();
                let some = self.reader.take_body(text)?;
                given += some.bytes.len();
                self.give(some.bytes, some.end);
            }
        }
        Ok(given)
    }

    fn take_head(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let (taken, head) = self.reader.take_head(bytes)?;
        match head {
            // A stream that has just been reset takes nothing more, and says so when it is looked at.
            Some(Head::Interim(head)) => drop(self.respond.send_informational(head)),
            Some(Head::Final(head)) => {
                self.response = self.respond.send_response(head, self.reader.is_over()).ok();
                self.is_gone |= self.response.is_none();
            }
            None => {}
        }
        Ok(taken)
    }

    fn take_framing(&mut self, sending: Sending, pool: &Pool) -> Result<usize, Broken> {
        let (taken, end) = self.reader.take_framing(rest(sending, pool))?;
        if end.is_some() {
            self.give(Bytes::new(), end);
        }
        Ok(taken)
    }

    fn give(&mut self, content: Bytes, end: Option<HeaderMap>) {
        let Some(response) = &mut self.response else { return };
        let given = match end {
            Some(trailers) if trailers.is_empty() => response.send_data(content, true),
            Some(trailers) => {
                let given =
                    if content.is_empty() { Ok(()) } else { response.send_data(content, false) };
                given.and_then(|()| response.send_trailers(trailers))
            }
            None if content.is_empty() => Ok(()),
            None => response.send_data(content, false),
        };
        self.is_gone |= given.is_err();
    }

    /// How much content the user's windows let through.
    fn capacity(&mut self, wanted: usize, cx: &mut Context<'_>) -> usize {
        let Some(response) = &mut self.response else { return wanted };
        response.reserve_capacity(wanted);
        loop {
            let capacity = response.capacity();
            if capacity > 0 {
                return capacity.min(wanted);
            }
            match response.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(_) => {
                    self.is_gone = true;
                    return 0;
                }
                Poll::Pending => return 0,
            }
        }
    }

    fn has_room(&mut self, cx: &mut Context<'_>) -> bool {
        self.reader.awaits_head() || self.reader.is_over() || self.capacity(1, cx) > 0
    }

    fn sent(&mut self, result: Result<u32, Errno>) {
        if self.sending.take().is_some() {
            self.happened.push(Event::Sent { side: Side::Client, result });
        }
    }

    fn room(&mut self) {
        if std::mem::take(&mut self.awaits_room) {
            self.happened.push(Event::Room { side: Side::Client });
        }
    }
}

/// What comes next of a send, as far as it lies in one piece.
fn rest(sending: Sending, pool: &Pool) -> &[u8] {
    let mut skip = sending.taken;
    for piece in pool.pieces(sending.what) {
        if skip < piece.len() {
            return &piece[skip..];
        }
        skip -= piece.len();
    }
    &[]
}

/// The next bytes of a send.
fn copy(sending: Sending, most: usize, pool: &Pool) -> BytesMut {
    let most = most.min(sending.bytes - sending.taken);
    let (mut text, mut skip) = (BytesMut::with_capacity(most), sending.taken);
    for piece in pool.pieces(sending.what) {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        let piece = &piece[skip..];
        text.extend_from_slice(&piece[..piece.len().min(most - text.len())]);
        skip = 0;
        if text.len() == most {
            break;
        }
    }
    text
}
