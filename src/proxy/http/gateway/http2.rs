//! A user's connection that carries HTTP/2: bytes go through a [`Front`], whose streams have gateways of their own.
//! Owns when such a connection begins, is read, sent to and over; the streams' gateways are the worker's to keep.
//!
//! ```text
//!   Head --preface--> Http2 --nothing left to say, no stream--> Lingering --> Over
//! ```

use super::{Gateway, Phase};
use crate::base::time::Now;
use crate::proxy;
use crate::proxy::Side;
use crate::proxy::http::{Context, GatewayCmd, GatewaySettings};
use crate::proxy::http2::{Circumstances, Front, News, PREFACE, Patience};
use crate::ring::pool::Pool;
use crate::session::EndReason;

/// Bytes to a user that wait to be sent; beyond it, nothing more is taken from its streams.
const WAITING_MAX: usize = 64 * 1024;

impl Gateway {
    /// The gateway of a stream of this connection, the one that came as the `number`th. Begin with
    /// [`Gateway::start`].
    pub fn of_stream(&self, number: u32, now: Now) -> Gateway {
        let trusted = self.user.trusted();
        let mut stream = Gateway::new(self.session, self.door, self.address, trusted, now);
        stream.exchange.number = number.wrapping_sub(1);
        stream.shown.clone_from(&self.shown);
        stream.refuses = self.refuses;
        (stream.is_stream, stream.draining, stream.retiring) = (true, self.draining, self.retiring);
        stream
    }

    /// The user has agreed to speak HTTP/2. Comes before anything that it says.
    pub fn speak_http2(&mut self, cx: &Context<'_>) {
        self.begin_http2(&[], cx);
    }

    pub fn is_http2(&self) -> bool {
        self.front.is_some()
    }

    /// Whether it is a stream's, whose connection is another's.
    pub fn is_stream(&self) -> bool {
        self.is_stream
    }

    /// Whether the first bytes of a connection are those with which HTTP/2 begins, as far as they have come, and may be
    /// here: whoever speaks TLS would have agreed on it there.
    pub(in crate::proxy::http) fn begins_http2(
        &self,
        bytes: &[u8],
        settings: &GatewaySettings,
    ) -> bool {
        let count = bytes.len().min(PREFACE.len());
        self.exchange.number == 1
            && !self.is_stream
            && !self.door.is_tls
            && settings.h2c
            && bytes[..count] == PREFACE[..count]
    }

    pub(in crate::proxy::http) fn begin_http2(&mut self, bytes: &[u8], cx: &Context<'_>) {
        let mut front = Box::new(Front::new(cx.settings.h2_streams, cx.now));
        front.received(bytes, cx.now);
        if self.draining || self.retiring {
            front.drain(cx.now);
        }
        self.front = Some(front);
        (self.phase, self.active) = (Phase::Http2, cx.now);
        // There has been no request yet.
        self.exchange.number = 0;
    }

    /// Goes on with a connection that carries HTTP/2, from its present state.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) {
        let Some(front) = &mut self.front else { return };
        let waiting = self.downward.bytes() + self.client.sending().bytes();
        let is_over = matches!(self.phase, Phase::Over(_));
        let most = if is_over { 0 } else { WAITING_MAX.saturating_sub(waiting) };
        let mut memory = std::mem::take(&mut cx.kit.scratch);
        memory.clear();
        let streams_max = cx.settings.h2_streams;
        let circumstances = &mut Circumstances { now: cx.now, pool: cx.pool, streams_max };
        let written = front.run(memory, most, circumstances);
        if front.has_news() {
            cx.out.push(GatewayCmd::Streams);
        }
        cx.out.extend(front.take_excess().map(GatewayCmd::Calmed));
        let is_done = front.is_over() && front.live() == 0;
        let added = cx.kit.append(&mut self.downward, &written, cx.pool);
        cx.kit.scratch = written;
        match added {
            Err(_) => return self.exhausted(cx),
            Ok(()) if is_over => return,
            Ok(()) => {}
        }
        // A send has its time from its start, however long nothing was said before.
        if self.client.sending().is_empty() && !self.downward.is_empty() {
            self.active = cx.now;
        }
        self.flush(cx);
        if is_done && self.downward.is_empty() && self.client.sending().is_empty() {
            self.front = None;
            self.linger(cx);
        }
        self.ask_for_frames(cx);
    }

    fn ask_for_frames(&mut self, cx: &mut Context<'_>) {
        let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
        let wants = self.front.as_ref().is_none_or(|front| front.wants_bytes());
        let sees_room =
            !self.client.is_sparing(cx.pool) || self.client.sees_room(Side::Client, out);
        let is_wanted = wants && sees_room && !matches!(self.phase, Phase::Over(_));
        self.client.ask(Side::Client, is_wanted, cx.kit.share(), cx.pool, cx.features, out);
    }

    /// The next thing that has happened to a stream: the answer to [`GatewayCmd::Streams`].
    pub fn next_news(&mut self) -> Option<(u32, News)> {
        self.front.as_mut()?.next_news()
    }

    /// A command of a stream's gateway; if there is [something to do](Gateway::has_stream_work) then, [`Gateway::thaw`]
    /// must follow, once for several.
    pub fn command_stream(&mut self, number: u32, what: proxy::StreamCmd, pool: &mut Pool) {
        if let Some(front) = &mut self.front {
            front.command(number, what, pool);
        }
    }

    pub fn has_stream_work(&self) -> bool {
        let is_over = matches!(self.phase, Phase::Over(_));
        self.front.as_ref().is_some_and(|front| is_over || front.is_waiting())
    }

    /// The gateway of a stream is over, and has sent `up` bytes to backends; the same goes for this.
    pub fn forget_stream(&mut self, number: u32, is_reset: bool, up: u64, now: Now) {
        self.moved[0] += up;
        if let Some(front) = &mut self.front {
            front.forget(number, is_reset, now);
        }
    }

    pub(in crate::proxy::http) fn drain_streams(&mut self, now: Now) {
        if let Some(front) = &mut self.front {
            front.drain(now);
        }
    }

    /// When the connection is to end, unless something moves first.
    pub(in crate::proxy::http) fn http2_ends_at(&self, settings: &GatewaySettings) -> Option<Now> {
        if !self.client.sending().is_empty() {
            return Some(self.active.plus(self.exchange.limits.body));
        }
        self.front.as_ref()?.deadline(&patience(settings))
    }

    pub(in crate::proxy::http) fn expire_http2(&mut self, cx: &mut Context<'_>) {
        if !self.client.sending().is_empty() {
            return self.end(EndReason::Idle, true, cx);
        }
        if let Some(front) = &mut self.front {
            front.expire(&patience(cx.settings), cx.now);
        }
    }

    /// The connection ends at once; its streams are told so.
    pub(super) fn end_streams(&mut self, cx: &mut Context<'_>) {
        if let Some(front) = &mut self.front {
            front.cut();
            self.drive(cx);
        }
    }

    /// Bytes on the heap that the user of a connection with streams has made us hold.
    pub(in crate::proxy::http) fn streams_held(&self) -> usize {
        self.front.as_ref().map_or(0, |front| front.held())
    }

    /// The user's line of a stream is given up with its connection.
    pub(super) fn streams_in_flight(&self) -> bool {
        self.front.as_ref().is_some_and(|front| front.live() > 0)
    }
}

fn patience(settings: &GatewaySettings) -> Patience {
    Patience { head: settings.head_timeout, idle: settings.idle_timeout }
}
