//! From the backend to the user: reading a response's head, deciding what becomes of it, writing it
//! anew, and passing its body on; and the answers that the balancer gives itself.

use std::fmt::Write as _;
use std::time::Duration;

use super::exchange::{Answer, Cut, Download, Exchange, Upload, Wrap};
use super::gateway::Gateway;
use super::stash::Stash;
use super::{Context, Full, GatewayCmd, GatewaySettings, RETRY_AFTER};
use crate::http::answer;
use crate::http::body::{self, Body, Framing};
use crate::http::chunked::{self, Passed, SIZE_LINE_MAX};
use crate::http::field::Name;
use crate::http::head::{self, ResponseHead, Space};
use crate::http::write::{self, ResponseForm};
use crate::http::{Malformed, Version, field, login};
use crate::ring::pool::Buf;

/// What the bytes at the beginning of a response are. The part of the head to pass on is appended to
/// the scratch.
enum Read {
    More,
    Bad(Malformed),
    /// An interim response of `length` bytes.
    Interim {
        length: usize,
    },
    /// The backend switches to another protocol.
    Switch {
        length: usize,
    },
    Final {
        length: usize,
        answer: Answer,
    },
}

/// What does not depend on the response.
struct Circumstances<'a> {
    settings: &'a GatewaySettings,
    date: &'a crate::http::date::Date,
    /// The user's connection ends in any case.
    close: bool,
    /// The user goes on elsewhere, unless it logs in on a connection to a backend.
    departs: bool,
}

impl Gateway {
    /// A block came from the backend.
    pub(super) fn take_from_backend(&mut self, buf: Buf, cx: &mut Context<'_>) {
        match self.exchange.answer {
            // Whatever arrives before the backend can have read the request is no answer to it.
            Answer::Head if self.exchange.reused && !self.exchange.sent => {
                cx.pool.give_back(buf);
                self.give_up_backend(cx);
            }
            Answer::Head => self.read_answer(buf, cx),
            Answer::Flowing(_) => self.take_answer_body(buf, cx),
            Answer::Obtaining | Answer::Done => {
                // There is more than the response: whatever it is, it must not be taken for the
                // next one.
                self.exchange.keep = None;
                cx.pool.give_back(buf);
            }
        }
    }

    /// Reads heads up to the final one. Interim responses, however many, are gathered in the
    /// scratch, so that they take hardly more blocks than they arrived in.
    fn read_answer(&mut self, mut buf: Buf, cx: &mut Context<'_>) {
        let mut stash = std::mem::replace(&mut self.exchange.stash, Stash::EMPTY);
        cx.kit.scratch.clear();
        loop {
            let before = stash.len();
            if before > 0 {
                stash.push(cx.pool.bytes(&buf));
            }
            let bytes = if before > 0 { stash.bytes_mut() } else { cx.pool.bytes_mut(&mut buf) };
            let (close, departs) = (self.must_close(), self.departing);
            let about = Circumstances { settings: cx.settings, date: cx.date, close, departs };
            let scratch = &mut cx.kit.scratch;
            let length = match read_or_clean(&mut self.exchange, bytes, before, &about, scratch) {
                Read::More => {
                    if before == 0 {
                        stash.push(cx.pool.bytes(&buf));
                    }
                    self.exchange.stash = stash;
                    cx.pool.give_back(buf);
                    return self.write_scratch(cx);
                }
                Read::Bad(fault) => {
                    cx.pool.give_back(buf);
                    self.write_scratch(cx);
                    return self.answer_ourselves(502, fault.reason, cx);
                }
                Read::Interim { length } => {
                    cx.pool.give_back_chain(self.exchange.kept.take());
                    length
                }
                // Not passed on: the backend lost patience before it got the request, and another
                // connection will do (RFC 9110 15.5.9).
                Read::Final { .. }
                    if self.exchange.status == 408 && !self.exchange.kept.is_empty() =>
                {
                    cx.pool.give_back(buf);
                    self.exchange.status = 0;
                    self.exchange.keep = None;
                    return self.try_another(cx);
                }
                Read::Switch { length } => {
                    cx.pool.skip(&mut buf, length - before);
                    return self.change_protocol(buf, cx);
                }
                Read::Final { length, answer } => {
                    cx.pool.skip(&mut buf, length - before);
                    return self.start_answer(buf, answer, cx);
                }
            };
            // What follows a head is all in this block, since the head was incomplete without it.
            stash = Stash::EMPTY;
            cx.pool.skip(&mut buf, length - before);
            if buf.is_empty() {
                cx.pool.give_back(buf);
                return self.write_scratch(cx);
            }
        }
    }

    /// The final head is in the scratch; `buf` holds what followed it.
    fn start_answer(&mut self, buf: Buf, answer: Answer, cx: &mut Context<'_>) {
        cx.pool.give_back_chain(self.exchange.kept.take());
        self.exchange.times.answered = Some(cx.now);
        cx.out.push(GatewayCmd::Answered);
        self.exchange.answer = answer;
        // A user that was not asked for the body does not send it, and one that is told of an error
        // should stop sending (RFC 9110 10.1.1, RFC 9112 9.5).
        self.exchange.wants_rest = !self.exchange.expects_continue && self.exchange.status < 400;
        self.exchange.expects_continue = false;
        if buf.is_empty() {
            cx.pool.give_back(buf);
            return self.write_scratch(cx);
        }
        self.write_scratch(cx);
        self.take_from_backend(buf, cx);
    }

    fn take_answer_body(&mut self, mut buf: Buf, cx: &mut Context<'_>) {
        let Answer::Flowing(download) = &mut self.exchange.answer else {
            return cx.pool.give_back(buf);
        };
        let bytes = cx.pool.bytes_mut(&mut buf);
        let length = bytes.len();
        let passed = match download.body.pass(bytes) {
            Ok(passed) => passed,
            Err(fault) => {
                cx.pool.give_back(buf);
                return self.cut_short(fault.reason);
            }
        };
        cx.pool.truncate(&mut buf, passed.output.end);
        cx.pool.skip(&mut buf, passed.output.start);
        if self.queue_for_user(buf, cx).is_err() {
            return self.exhausted(cx);
        }
        self.exchange.bytes_down += passed.output.len() as u64;
        if passed.consumed < length {
            self.exchange.keep = None;
        }
        if passed.finished {
            self.answer_complete(&passed, cx);
        }
    }

    /// Puts content into the queue to the user, with framing where needed.
    fn queue_for_user(&mut self, buf: Buf, cx: &mut Context<'_>) -> Result<(), Full> {
        if buf.is_empty() {
            cx.pool.give_back(buf);
            return Ok(());
        }
        let framed = match &mut self.exchange.answer {
            Answer::Flowing(download) if download.wrap != Wrap::No => {
                let mut line = [0; SIZE_LINE_MAX + 2];
                let start = size_line(&mut line, download.wrap, buf.len());
                download.wrap = Wrap::Next;
                cx.kit.append(&mut self.downward, &line[start..], cx.pool)
            }
            _ => Ok(()),
        };
        match framed {
            Ok(()) => cx.pool.push(&mut self.downward, buf),
            Err(Full) => cx.pool.give_back(buf),
        }
        framed
    }

    fn answer_complete(&mut self, _passed: &Passed, cx: &mut Context<'_>) {
        let Answer::Flowing(download) = std::mem::replace(&mut self.exchange.answer, Answer::Done)
        else {
            return;
        };
        let ending: &[u8] = match (&download.body, download.wrap) {
            (Body::Chunked(chunked), _) => chunked.trailer_section(),
            (_, Wrap::No) => b"",
            (_, Wrap::First) => b"0\r\n\r\n",
            (_, Wrap::Next) => b"\r\n0\r\n\r\n",
        };
        if cx.kit.append(&mut self.downward, ending, cx.pool).is_err() {
            self.exhausted(cx);
        }
    }

    /// The backend has finished sending, or failed, in the middle of its response.
    pub(super) fn answer_ended(&mut self, properly: bool, cx: &mut Context<'_>) {
        let Answer::Flowing(download) = &self.exchange.answer else { return };
        if properly && download.body.may_end_with_connection() {
            let end = Passed { consumed: 0, output: 0..0, finished: true };
            self.answer_complete(&end, cx);
        } else {
            self.cut_short("the backend did not finish its response");
        }
    }

    /// The response cannot be completed, and the user already has part of it: what is queued still
    /// goes out, but never what would make it look complete.
    pub(super) fn cut_short(&mut self, why: &'static str) {
        let exchange = &mut self.exchange;
        let framing = match &exchange.answer {
            Answer::Flowing(download) => download.framing,
            _ => Framing::None,
        };
        exchange.fault.get_or_insert(why);
        exchange.cut = Some(Cut { reset: framing == Framing::UntilClose });
        exchange.close = true;
        exchange.keep = None;
        exchange.answer = Answer::Done;
    }

    /// Moves the head from the scratch to the queue to the user.
    pub(super) fn write_scratch(&mut self, cx: &mut Context<'_>) {
        let scratch = std::mem::take(&mut cx.kit.scratch);
        let written = cx.kit.append(&mut self.downward, &scratch, cx.pool);
        cx.kit.scratch = scratch;
        if written.is_err() {
            self.exhausted(cx);
        }
    }

    /// Sends 100 (Continue) to a user that waits for it, in place of a silent backend.
    pub(super) fn say_continue(&mut self, cx: &mut Context<'_>) {
        // Should the backend send one as well, it is dropped.
        (self.exchange.expects_continue, self.exchange.continued) = (false, true);
        cx.kit.scratch.clear();
        write::put_status(&mut cx.kit.scratch, 100, answer::phrase(100));
        cx.kit.scratch.extend_from_slice(b"\r\n");
        self.write_scratch(cx);
    }

    /// Answers in place of a backend. Nothing of a final response has been sent yet.
    pub(super) fn answer_ourselves(
        &mut self,
        status: u16,
        detail: &'static str,
        cx: &mut Context<'_>,
    ) {
        debug_assert_eq!(self.exchange.status, 0, "a request is answered once");
        self.abandon_upload(cx);
        cx.pool.give_back_chain(self.exchange.kept.take());
        let close = self.must_close();
        let exchange = &mut self.exchange;
        exchange.close = close;
        exchange.stash = Stash::EMPTY;
        (exchange.status, exchange.own) = (status, true);
        exchange.fault = (status != 200).then_some(detail);
        exchange.answer = Answer::Done;
        exchange.keep = None;
        exchange.times.answered = Some(cx.now);
        if let Some(ids) = &mut cx.kit.ids {
            exchange.make_id(ids);
        }
        let name = &mut cx.kit.name;
        name.clear();
        let named = write!(name, "{}-{}", self.session, exchange.number);
        debug_assert!(named.is_ok(), "a string takes everything");
        cx.kit.scratch.clear();
        answer::put(
            &mut cx.kit.scratch,
            &answer::Answer {
                status,
                detail,
                id: name,
                taste: exchange.taste,
                is_full: exchange.is_full,
                close,
                to_head_request: exchange.to_head_request,
                request_id: exchange.id(),
                retry_after: (status == 503).then_some(RETRY_AFTER),
                location: (status == 308).then_some(cx.kit.location.as_slice()),
                date: cx.date,
            },
        );
        self.write_scratch(cx);
    }
}

/// Reads a response's head; if that fails, once more without the control bytes that some backends
/// write into field values.
fn read_or_clean(
    exchange: &mut Exchange,
    bytes: &mut [u8],
    seen: usize,
    about: &Circumstances<'_>,
    scratch: &mut Vec<u8>,
) -> Read {
    match read(exchange, bytes, seen, about, scratch) {
        Read::Bad(_) if head::clean(bytes) => read(exchange, bytes, seen, about, scratch),
        other => other,
    }
}

/// Reads a response's head and writes it anew, or says what is wrong with it.
fn read(
    exchange: &mut Exchange,
    bytes: &[u8],
    seen: usize,
    about: &Circumstances<'_>,
    scratch: &mut Vec<u8>,
) -> Read {
    let mut space = Space::new();
    let head = match head::response(bytes, seen, &about.settings.limits, &mut space) {
        Ok(Some(head)) => head,
        Ok(None) => return Read::More,
        Err(fault) => return Read::Bad(fault),
    };
    let framing = match body::of_response(&head, exchange.to_head_request) {
        Ok(framing) => framing,
        Err(fault) => return Read::Bad(fault),
    };
    exchange.private |= login::in_response(&head.fields);
    let length = head.length;
    let plain =
        ResponseForm { framing: Framing::None, close: false, upgrade: false, date: None, id: None };
    match head.status {
        101 if !exchange.was_offered(head.fields.values(Name::Upgrade).flat_map(field::list)) => {
            Read::Bad(Malformed::new(502, "the backend changed the protocol unasked"))
        }
        // What is still to come is a body to the user, but would belong to the tunnel for the
        // backend, and a tunnel must not miss any bytes.
        101 if !matches!(exchange.upload, Upload::Done) => {
            Read::Bad(Malformed::new(502, "the backend changed the protocol within the request"))
        }
        101 => {
            write::response(
                scratch,
                &head,
                &ResponseForm { upgrade: true, id: exchange.id(), ..plain },
            );
            Read::Switch { length }
        }
        100..=199 => {
            let again = head.status == 100 && exchange.continued;
            let pass = exchange.version == Version::Http11 && !again;
            exchange.interim = true;
            if head.status == 100 {
                (exchange.continued, exchange.expects_continue) = (true, false);
            }
            if pass {
                write::response(scratch, &head, &plain);
            }
            Read::Interim { length }
        }
        _ => {
            let answer = finally(exchange, &head, framing, about, scratch);
            Read::Final { length, answer }
        }
    }
}

/// Decides how a final response is passed on to the user, and writes its head.
fn finally(
    exchange: &mut Exchange,
    head: &ResponseHead<'_, '_>,
    framing: Framing,
    about: &Circumstances<'_>,
    scratch: &mut Vec<u8>,
) -> Answer {
    let newer = exchange.version == Version::Http11;
    let (sent_as, keep_chunks, wrap) = match framing {
        // This status promises no content, so none is passed on (RFC 9110 15.3.6).
        _ if head.status == 205 => (Framing::Length(0), false, Wrap::No),
        Framing::None if exchange.to_head_request || head.status == 304 => {
            let told = body::content_length(&head.fields).ok().flatten();
            (told.map_or(Framing::None, Framing::Length), false, Wrap::No)
        }
        Framing::None | Framing::Length(_) => (framing, false, Wrap::No),
        Framing::Chunked if newer => (Framing::Chunked, true, Wrap::No),
        Framing::UntilClose if newer => (Framing::Chunked, false, Wrap::First),
        Framing::Chunked | Framing::UntilClose => (Framing::UntilClose, false, Wrap::No),
    };
    let empty = matches!(framing, Framing::None | Framing::Length(0)) || head.status == 205;
    let unread = head.status == 205 && !matches!(framing, Framing::Length(0));
    // A backend that answers before it was asked may still answer the request, and whoever uses the
    // connection next would get that.
    let asked = exchange.sent;
    // Nor do we know what a backend with a 408 was waiting for: it may have sent it before it was
    // asked.
    let stays = !head.connection.close && head.status != 408;
    let reusable = asked && head.version == Version::Http11 && stays && !unread;
    exchange.status = head.status;
    // Who logs in on a connection to a backend would have to do so anew elsewhere.
    let leaves = about.close || about.departs && exchange.private;
    exchange.close |= leaves || sent_as == Framing::UntilClose;
    exchange.keep = (reusable && framing != Framing::UntilClose)
        .then(|| keep_for(head, about.settings.spare_timeout))
        .flatten();
    let reply = ResponseForm {
        framing: sent_as,
        close: exchange.close,
        upgrade: head.status == 426,
        date: Some(about.date),
        id: exchange.id(),
    };
    write::response(scratch, head, &reply);
    if empty {
        return Answer::Done;
    }
    let body = Body::new(framing, keep_chunks, u64::MAX).of_backend();
    Answer::Flowing(Download { body, wrap, framing: sent_as })
}

/// How long a backend's connection may wait for the next request: a second less than the backend
/// announces, so that we are the ones who end it.
fn keep_for(head: &ResponseHead<'_, '_>, most: Duration) -> Option<Duration> {
    let seconds = |option: &[u8]| {
        let text = std::str::from_utf8(option).ok()?.strip_prefix("timeout=")?;
        text.parse::<u64>().ok()
    };
    let said = head.fields.values(Name::KeepAlive).flat_map(field::list).find_map(seconds);
    match said {
        Some(0 | 1) => None,
        Some(seconds) => Some(most.min(Duration::from_secs(seconds - 1))),
        None => Some(most),
    }
}

/// Writes a chunk's size line at the end of `line`, behind the end of the last chunk if there is one; returns where it
/// starts.
fn size_line(line: &mut [u8; SIZE_LINE_MAX + 2], wrap: Wrap, size: usize) -> usize {
    let mut start = chunked::size_line(line, size);
    if wrap == Wrap::Next {
        start -= 2;
        line[start..start + 2].copy_from_slice(b"\r\n");
    }
    start
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::time::Now;
    use crate::cluster::RequestLimits;
    use crate::http::date::Date;

    /// Reads a whole response to a request; returns how long its connection may be kept.
    fn kept(text: &str, sent: bool) -> Option<Duration> {
        let (settings, date) = (GatewaySettings::default(), Date::at(0));
        let about =
            Circumstances { settings: &settings, date: &date, close: false, departs: false };
        let mut exchange = Exchange::new();
        exchange.begin(RequestLimits::DEFAULT, Now::from_nanos(0));
        exchange.sent = sent;
        let read = read(&mut exchange, text.as_bytes(), 0, &about, &mut Vec::new());
        assert!(matches!(read, Read::Final { .. }), "{text}");
        exchange.keep
    }

    #[test]
    fn a_connection_is_kept_when_its_answer_came_after_the_request_and_nothing_speaks_against_it() {
        let most = GatewaySettings::default().spare_timeout;
        let second = Duration::from_secs(1);
        for (text, sent, time) in [
            ("1.1 200 OK\r\nContent-Length: 0", true, Some(most)),
            ("1.1 200 OK\r\nContent-Length: 0", false, None),
            ("1.1 200 OK\r\nContent-Length: 0\r\nConnection: close", true, None),
            ("1.1 200 OK\r\nContent-Length: 0\r\nKeep-Alive: timeout=2", true, Some(second)),
            ("1.1 200 OK\r\nContent-Length: 0\r\nKeep-Alive: timeout=1", true, None),
            ("1.1 408 Request Timeout\r\nContent-Length: 0", true, None),
            ("1.0 200 OK\r\nContent-Length: 0", true, None),
            ("1.1 200 OK", true, None),
        ] {
            assert_eq!(kept(&format!("HTTP/{text}\r\n\r\n"), sent), time, "{text} {sent}");
        }
    }
}
