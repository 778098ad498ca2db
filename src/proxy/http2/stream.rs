//! One stream of a connection: the line between a gateway, which reads and writes HTTP/1.1, and `h2`. Owns how far the
//! message that comes has been handed to the gateway, and the one that goes to `h2`; answers each command once.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::Method;
use http::header::HeaderMap;
use nix::errno::Errno;

use super::reading::{Broken, Head, Kind, Reader};
use super::writing::{self, Framing};
use super::{OWED_MAX, PROGRESS_BYTES};
use crate::base::bells::Bell;
use crate::proxy::{Event, Intake, Received, Side, StreamCmd};
use crate::ring::pool::{Buf, Class, Outgoing, Pool};

/// A send of the gateway's.
#[derive(Clone, Copy, Debug)]
struct Sending {
    what: Outgoing,
    bytes: usize,
    taken: usize,
}

/// Which end of the stream we are at.
enum Role {
    /// A user's, who has asked.
    Server(SendResponse<Bytes>),
    /// A backend's, which is to answer.
    Client { sender: SendRequest<Bytes>, answer: Option<ResponseFuture>, to_head_request: bool },
}

/// What the message that comes still brings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// Its head has not come.
    Awaited,
    Content,
    /// All of it is in `text` or has been handed up.
    Ended,
    Failed,
}

pub struct Stream {
    bell: Arc<Bell>,
    waker: Waker,
    side: Side,
    role: Role,
    coming: Option<RecvStream>,
    framing: Framing,
    source: Source,
    /// What is handed up next: text, and content behind it.
    text: Vec<u8>,
    text_read: usize,
    content: Bytes,
    asked: Option<Intake>,
    going: Option<SendStream<Bytes>>,
    reader: Reader,
    sending: Option<Sending>,
    awaits_room: bool,
    is_gone: bool,
    is_told: bool,
    pub happened: Vec<Event>,
}

impl Stream {
    /// A user's request whose head is `text`.
    pub fn asked(
        bell: Arc<Bell>,
        request: RecvStream,
        respond: SendResponse<Bytes>,
        (text, framing): (Vec<u8>, Framing),
        to_head_request: bool,
    ) -> Stream {
        let source = if framing == Framing::None { Source::Ended } else { Source::Content };
        let reader = Reader::new(Kind::Response { to_head_request });
        let coming = Some(request);
        let stream = Stream::new(bell, Side::Client, Role::Server(respond), reader);
        Stream { source, text, framing, coming, ..stream }
    }

    /// A request that is to be sent to a backend, reached by this scheme.
    pub fn to_ask(bell: Arc<Bell>, sender: SendRequest<Bytes>, scheme: &'static str) -> Stream {
        let role = Role::Client { sender, answer: None, to_head_request: false };
        Stream::new(bell, Side::Backend, role, Reader::new(Kind::Request { scheme }))
    }

    fn new(bell: Arc<Bell>, side: Side, role: Role, reader: Reader) -> Stream {
        Stream {
            waker: Waker::from(Arc::clone(&bell)),
            bell,
            side,
            role,
            coming: None,
            framing: Framing::None,
            source: Source::Awaited,
            text: Vec::new(),
            text_read: 0,
            content: Bytes::new(),
            asked: None,
            going: None,
            reader,
            sending: None,
            awaits_room: false,
            is_gone: false,
            is_told: false,
            happened: Vec::new(),
        }
    }

    /// Whether the peer, or the connection, has ended it; said once.
    pub fn has_just_gone(&mut self) -> bool {
        self.is_gone && !std::mem::replace(&mut self.is_told, true)
    }

    /// Whether it could send more if `h2` had less in hand.
    pub fn waits_for_us(&self, owed: usize) -> bool {
        self.sending.is_some() && owed >= OWED_MAX
    }

    /// Whether all that its gateway writes has been taken.
    pub fn is_whole(&self) -> bool {
        self.reader.is_over()
    }

    /// Takes a command of its gateway. What concerns bytes that come is answered at once, if it can be.
    pub fn command(&mut self, what: StreamCmd, pool: &mut Pool) {
        match what {
            StreamCmd::Receive { how, .. } => {
                self.asked = Some(how);
                let waker = self.waker.clone();
                self.hand_up(&mut Context::from_waker(&waker), pool);
            }
            StreamCmd::CancelReceive { .. } => self.answer(Received::Stopped),
            StreamCmd::Send { what, .. } => {
                self.bell.ring();
                let bytes = pool.pieces(what).map(<[u8]>::len).sum();
                self.sending = Some(Sending { what, bytes, taken: 0 });
            }
            StreamCmd::CancelSend { .. } => self.stop_sending(Errno::ECANCELED),
            StreamCmd::AwaitRoom { .. } => {
                self.bell.ring();
                self.awaits_room = true;
            }
            StreamCmd::CancelRoom { .. } => self.room(),
            StreamCmd::FinishWriting { .. } => {
                self.bell.ring();
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

    /// Nothing more of what comes is wanted.
    fn stop_reading(&mut self) {
        if matches!(self.source, Source::Awaited | Source::Content) {
            // A response that is whole leaves the user free not to send the rest (RFC 9113 section 8.1).
            self.reset(match self.side {
                Side::Client => Reason::NO_ERROR,
                Side::Backend => Reason::CANCEL,
            });
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
        match (&mut self.going, &mut self.role) {
            (Some(going), _) => going.send_reset(why),
            (None, Role::Server(respond)) => respond.send_reset(why),
            // Nothing has been asked.
            (None, Role::Client { .. }) => {}
        }
    }

    /// Moves what can be moved; returns the content that was handed to `h2`, which has so much `owed` content in hand.
    /// `is_over`: the connection is.
    pub fn advance(&mut self, owed: usize, is_over: bool, pool: &mut Pool) -> usize {
        self.bell.answer();
        let waker = self.waker.clone();
        let cx = &mut Context::from_waker(&waker);
        if self.bell.take_woken() {
            self.look_for_reset(cx);
        }
        self.is_gone |= is_over;
        // In this order: an answer can be waited for only once it has been asked for.
        let given = self.hand_down(owed, cx, pool);
        self.hand_up(cx, pool);
        if self.awaits_room && (self.is_gone || self.has_room(cx)) {
            self.room();
        }
        given
    }

    fn look_for_reset(&mut self, cx: &mut Context<'_>) {
        let reset = match (&mut self.going, &mut self.role) {
            (Some(going), _) => going.poll_reset(cx),
            (None, Role::Server(respond)) => respond.poll_reset(cx),
            // Later, when it has begun.
            (None, Role::Client { .. }) => return self.bell.stay_woken(),
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
                Source::Awaited | Source::Content if !self.is_gone => {}
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
                if let Some(coming) = &mut self.coming {
                    let _ = coming.flow_control().release_capacity(taken);
                }
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

    /// Gets the head of a backend's response from `h2`, interim ones included.
    fn take_answer(&mut self, cx: &mut Context<'_>) {
        let Role::Client { answer: Some(answer), to_head_request, .. } = &mut self.role else {
            return;
        };
        while let Poll::Ready(Some(Ok(interim))) = answer.poll_informational(cx) {
            writing::response(&mut self.text, interim.status(), interim.headers(), false, true);
        }
        let (parts, coming) = match Pin::new(answer).poll(cx) {
            Poll::Pending => return,
            Poll::Ready(Ok(response)) => response.into_parts(),
            Poll::Ready(Err(_)) => return self.source = Source::Failed,
        };
        let (is_whole, is_empty) = (coming.is_end_stream(), *to_head_request);
        let (text, fields) = (&mut self.text, &parts.headers);
        self.framing = writing::response(text, parts.status, fields, is_whole, is_empty);
        self.source = if self.framing == Framing::None { Source::Ended } else { Source::Content };
        self.coming = Some(coming);
    }

    /// Gets what comes next from `h2`.
    fn take_content(&mut self, cx: &mut Context<'_>) {
        if self.source == Source::Awaited {
            self.take_answer(cx);
            if !self.text.is_empty() {
                return;
            }
        }
        while self.source == Source::Content && self.content.is_empty() {
            let Some(coming) = &mut self.coming else { return };
            match coming.poll_data(cx) {
                Poll::Ready(Some(Ok(content))) if content.is_empty() => {}
                Poll::Ready(Some(Ok(content))) => {
                    if self.framing == Framing::Chunked {
                        writing::chunk(&mut self.text, &content);
                    }
                    self.content = content;
                }
                Poll::Ready(Some(Err(_))) => self.source = Source::Failed,
                Poll::Ready(None) => match coming.poll_trailers(cx) {
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
            writing::last_chunk(&mut self.text, trailers);
        }
    }

    fn answer(&mut self, what: Received) {
        if self.asked.take().is_some() {
            let nonempty = self.has_text();
            self.happened.push(Event::Received { side: self.side, what, more: false, nonempty });
        }
    }

    /// Takes what the gateway sends, as far as there is room.
    fn hand_down(&mut self, owed: usize, cx: &mut Context<'_>, pool: &Pool) -> usize {
        let Some(mut sending) = self.sending else { return 0 };
        if self.is_gone {
            self.stop_sending(Errno::ECONNRESET);
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
        let Some(head) = head else { return Ok(taken) };
        let is_whole = self.reader.is_over();
        match (head, &mut self.role) {
            // A stream that has just been reset takes nothing more, and says so when it is looked at.
            (Head::Interim(head), Role::Server(respond)) => drop(respond.send_informational(head)),
            (Head::Final(head), Role::Server(respond)) => {
                self.going = respond.send_response(head, is_whole).ok();
                self.is_gone |= self.going.is_none();
            }
            (Head::Request(head), Role::Client { sender, answer, to_head_request }) => {
                *to_head_request = *head.method() == Method::HEAD;
                match sender.send_request(head, is_whole) {
                    Ok((coming, going)) => (*answer, self.going) = (Some(coming), Some(going)),
                    Err(_) => self.is_gone = true,
                }
            }
            _ => return Err(Broken),
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
        let Some(going) = &mut self.going else { return };
        let given = match end {
            Some(trailers) if trailers.is_empty() => going.send_data(content, true),
            Some(trailers) => {
                let given =
                    if content.is_empty() { Ok(()) } else { going.send_data(content, false) };
                given.and_then(|()| going.send_trailers(trailers))
            }
            None if content.is_empty() => Ok(()),
            None => going.send_data(content, false),
        };
        self.is_gone |= given.is_err();
    }

    /// How much content the peer's windows let through.
    fn capacity(&mut self, wanted: usize, cx: &mut Context<'_>) -> usize {
        let Some(going) = &mut self.going else { return wanted };
        going.reserve_capacity(wanted);
        loop {
            let capacity = going.capacity();
            if capacity > 0 {
                return capacity.min(wanted);
            }
            match going.poll_capacity(cx) {
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

    /// Ends a send before all of it was taken: what was taken may have arrived.
    fn stop_sending(&mut self, why: Errno) {
        let taken = self.sending.map_or(0, |sending| sending.taken);
        self.sent(if taken > 0 { Ok(taken as u32) } else { Err(why) });
    }

    fn sent(&mut self, result: Result<u32, Errno>) {
        if self.sending.take().is_some() {
            self.happened.push(Event::Sent { side: self.side, result });
        }
    }

    fn room(&mut self) {
        if std::mem::take(&mut self.awaits_room) {
            self.happened.push(Event::Room { side: self.side });
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
