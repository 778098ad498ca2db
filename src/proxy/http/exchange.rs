//! One request and its response: what was asked, how far both have come, and what the log will say
//! in the end. Owns no bytes except those of a response head that is still incomplete.

use std::net::SocketAddr;
use std::time::Duration;

use super::stash::Stash;
use super::{Record, Reuse, Times, Wish};
use crate::base::time::Now;
use crate::cluster::{BackendId, RequestLimits, ServiceId};
use crate::http::Version;
use crate::http::answer::Taste;
use crate::http::body::{Body, Framing};
use crate::http::field::Name;
use crate::http::head::RequestHead;
use crate::http::trace::{self, ID_BYTES_MAX, Ids, MADE_BYTES};
use crate::http::{field, login, write};
use crate::ring::pool::Chain;
use crate::session::SessionId;

/// Limit on the bytes of method and target that are kept for the log.
const LINE_KEPT_MAX: usize = 1024;
/// Limit on the bytes of the host that are kept for the log.
pub const HOST_KEPT_MAX: usize = 64;

/// The request's body on its way to the backend.
#[derive(Debug)]
pub enum Upload {
    Flowing(Body),
    /// All of it has come from the user.
    Done,
    /// All of it has come, and whatever follows it is thrown away.
    Last,
    /// Nobody takes the rest, so the user's connection cannot be used again.
    Abandoned,
}

/// The response on its way to the user.
#[derive(Debug)]
pub enum Answer {
    /// There is no backend yet.
    Obtaining,
    /// Nothing final has come from the backend yet.
    Head,
    Flowing(Download),
    /// All of it is in the queue to the user.
    Done,
}

#[derive(Debug)]
pub struct Download {
    pub body: Body,
    pub wrap: Wrap,
    /// How the user is told where the body ends.
    pub framing: Framing,
}

/// The chunked framing that we add to a body which the backend ends by closing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wrap {
    No,
    /// Before the first chunk.
    First,
    /// After another chunk, whose line end is still to be written.
    Next,
}

#[derive(Debug)]
pub struct Exchange {
    pub number: u32,
    /// The host, and directly behind it the request ID and then method and target, for the log.
    line: Vec<u8>,
    /// Bytes of the host and of the ID in `line`.
    host_kept: u8,
    id_kept: u8,
    /// The trace that the request says it belongs to; zero for none.
    pub trace: u128,
    pub version: Version,
    pub to_head_request: bool,
    pub idempotent: bool,
    pub taste: Taste,
    /// As much is served as may be.
    pub is_full: bool,
    /// The protocols that the backend was offered to switch to; empty for none.
    pub offers: Vec<u8>,
    /// The user may be waiting for 100 (Continue), and none has been sent yet.
    pub expects_continue: bool,
    /// 100 (Continue) has been sent.
    pub continued: bool,
    /// An interim response has come from this backend.
    pub interim: bool,

    pub upload: Upload,
    pub answer: Answer,
    /// A response head that is still incomplete.
    pub stash: Stash,
    /// The user's connection ends with this exchange.
    pub close: bool,
    /// The response could not be completed. With `reset`, only a reset can show the user that it is
    /// cut.
    pub cut: Option<Cut>,

    /// Whose request it is; `None` when nobody claims it.
    pub service: Option<ServiceId>,
    /// The service that it was for, if that left it to another; and how many have.
    pub asked: Option<ServiceId>,
    pub fallbacks: u8,
    /// What it may take; until its head has been read, as for the service that its user was admitted
    /// for.
    pub limits: RequestLimits,
    pub backend: Option<BackendId>,
    pub attempt: u8,
    pub reused: bool,
    /// The request is part of a login that holds for its connection, which therefore may belong to
    /// this user, or already did.
    pub login: bool,
    pub private: bool,
    /// How long the backend's connection may be kept after a complete response; `None`: not at all.
    pub keep: Option<Duration>,
    /// The response came while the request was still being sent, and is no reason to stop sending.
    pub wants_rest: bool,
    /// Something has been sent to the backend.
    pub sent: bool,
    /// The backend's connection is gone, but the kernel still holds what we were sending to it.
    pub lost: bool,
    /// What was sent to the backend, or was about to be, for as long as it may be sent again to
    /// another.
    pub kept: Chain,

    pub status: u16,
    /// The balancer answered, not a backend.
    pub own: bool,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub times: Times,
    pub fault: Option<&'static str>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    pub reset: bool,
}

impl Exchange {
    pub const fn new() -> Exchange {
        Exchange {
            number: 0,
            line: Vec::new(),
            host_kept: 0,
            id_kept: 0,
            trace: 0,
            version: Version::Http11,
            to_head_request: false,
            idempotent: false,
            taste: Taste::Text,
            is_full: false,
            offers: Vec::new(),
            expects_continue: false,
            continued: false,
            interim: false,
            upload: Upload::Done,
            answer: Answer::Done,
            stash: Stash::EMPTY,
            close: false,
            cut: None,
            service: None,
            asked: None,
            fallbacks: 0,
            limits: RequestLimits::DEFAULT,
            backend: None,
            attempt: 0,
            reused: false,
            login: false,
            private: false,
            keep: None,
            wants_rest: false,
            sent: false,
            lost: false,
            kept: Chain::EMPTY,
            status: 0,
            own: false,
            bytes_up: 0,
            bytes_down: 0,
            times: Times {
                began: Now::from_nanos(0),
                read: Now::from_nanos(0),
                connected: None,
                answered: None,
                ended: Now::from_nanos(0),
            },
            fault: None,
        }
    }

    /// Prepares for the next request of the connection, keeping the memory of the last one.
    pub fn begin(&mut self, limits: RequestLimits, began: Now) {
        let (mut line, mut offers) =
            (std::mem::take(&mut self.line), std::mem::take(&mut self.offers));
        debug_assert!(self.kept.is_empty(), "the last request has let go of its blocks");
        line.clear();
        offers.clear();
        let number = self.number.wrapping_add(1);
        *self = Exchange { number, line, offers, limits, ..Exchange::new() };
        self.times.began = began;
    }

    /// Takes over what a request head says about the request.
    pub fn note(
        &mut self,
        head: &RequestHead<'_, '_>,
        target: &str,
        trusted: bool,
        ids: Option<&mut Ids>,
    ) {
        self.version = head.version;
        self.to_head_request = head.method == "HEAD";
        self.idempotent = matches!(head.method, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE");
        self.taste = Taste::of(&head.fields);
        self.login = login::in_request(&head.fields);
        self.close = head.version == Version::Http10 || head.connection.close;
        let host = head.host.unwrap_or_default().as_bytes();
        let host = &host[..host.len().min(HOST_KEPT_MAX)];
        self.host_kept = host.len() as u8;
        self.line.extend_from_slice(host);
        if let Some(ids) = ids {
            self.take_id(head, trusted, ids);
        }
        if head.fields.has(Name::Traceparent) {
            self.trace = trace_of(head);
        }
        let before = self.line.len();
        for part in [head.method, " ", target] {
            let room = LINE_KEPT_MAX + before - self.line.len();
            self.line.extend_from_slice(&part.as_bytes()[..part.len().min(room)]);
        }
    }

    /// Takes over the ID that a trusted proxy gave the request, or gives it a new one.
    fn take_id(&mut self, head: &RequestHead<'_, '_>, trusted: bool, ids: &mut Ids) {
        let mut said = head.fields.values(Name::RequestId);
        match (trusted, said.next(), said.next()) {
            (true, Some(id), None) if trace::is_id(id) => {
                self.line.extend_from_slice(id);
                self.id_kept = id.len() as u8;
            }
            _ => self.make_id(ids),
        }
    }

    /// Gives the request a new ID, unless it has one. Only the host may stand in `line` before it.
    pub fn make_id(&mut self, ids: &mut Ids) {
        if self.id_kept == 0 {
            let at = usize::from(self.host_kept);
            self.line.splice(at..at, ids.make());
            self.id_kept = MADE_BYTES as u8;
        }
    }

    /// The request's ID in `X-Request-Id`; `None`: it has none of ours.
    pub fn id(&self) -> Option<&[u8]> {
        let from = usize::from(self.host_kept);
        (self.id_kept > 0).then(|| &self.line[from..from + usize::from(self.id_kept)])
    }

    /// Remembers the request line of a refused head for the log, unless it is not a request line at
    /// all: another protocol's bytes, or a line without a target.
    pub fn note_line(&mut self, head: &[u8]) {
        let head = head.strip_prefix(b"\r\n").unwrap_or(head);
        let kept = &head[..head.len().min(LINE_KEPT_MAX)];
        let line = kept.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
        let mut parts = line.split(|byte| *byte == b' ').filter(|part| !part.is_empty());
        let (Some(method), Some(target)) = (parts.next(), parts.next()) else { return };
        if !method.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte)) {
            return;
        }
        self.line.clear();
        (self.host_kept, self.id_kept) = (0, 0);
        self.line.extend_from_slice(method);
        self.line.push(b' ');
        let shown = |byte: &u8| if byte.is_ascii_graphic() { *byte } else { b'?' };
        self.line.extend(target.iter().map(shown));
    }

    /// Remembers which protocols are offered to the backend.
    pub fn offer(&mut self, head: &RequestHead<'_, '_>) {
        for protocol in write::offers(head) {
            self.offers.extend_from_slice(protocol);
            self.offers.push(b',');
        }
    }

    /// Whether the backend may change to what its `Upgrade` names.
    pub fn was_offered<'v>(&self, mut protocols: impl Iterator<Item = &'v [u8]>) -> bool {
        let mut any = false;
        let all = protocols.all(|protocol| {
            any = true;
            field::list(&self.offers).any(|offer| offer.eq_ignore_ascii_case(protocol))
        });
        any && all
    }

    /// The kind of backend connection that this request wants, if there is a service for it.
    pub fn wish(&self) -> Option<Wish> {
        let reuse = match (self.attempt, self.idempotent) {
            (0, true) => Reuse::Any,
            (0, false) => Reuse::Recent,
            _ => Reuse::No,
        };
        self.service.map(|service| Wish { service, attempt: self.attempt, reuse })
    }

    pub fn upload_is_done(&self) -> bool {
        matches!(self.upload, Upload::Done | Upload::Last)
    }

    /// Whether what was sent may be sent again to another backend if this one closed now: the
    /// request changes nothing when it is carried out twice, or none of it was sent (RFC 9110
    /// 9.2.2).
    pub fn may_keep(&self) -> bool {
        self.reused
            && self.idempotent
            && !self.sent
            && self.upload_is_done()
            && self.status == 0
            && matches!(self.answer, Answer::Head)
    }

    /// The host, the ID, and then method and target, and the lengths of the first two.
    pub fn kept_line(&self) -> (&[u8], u8, u8) {
        (&self.line, self.host_kept, self.id_kept)
    }

    /// Keeps what another has kept; false if these cannot be the lengths.
    pub fn keep_line(&mut self, line: &[u8], host: u8, id: u8) -> bool {
        let before = usize::from(host) + usize::from(id);
        let is_fit = before <= line.len()
            && line.len() <= before + LINE_KEPT_MAX
            && usize::from(host) <= HOST_KEPT_MAX
            && usize::from(id) <= ID_BYTES_MAX;
        if is_fit {
            self.line = line.to_vec();
            (self.host_kept, self.id_kept) = (host, id);
        }
        is_fit
    }

    pub fn record(
        &self,
        session: SessionId,
        client: SocketAddr,
        is_tls: bool,
        is_http2: bool,
    ) -> Record<'_> {
        let (host, rest) = self.line.split_at(usize::from(self.host_kept));
        let (id, line) = rest.split_at(usize::from(self.id_kept));
        Record {
            session,
            client,
            is_tls,
            is_http2,
            number: self.number,
            service: self.service,
            asked: self.asked,
            host,
            id,
            trace: self.trace,
            line,
            status: self.status,
            own: self.own,
            reused: self.reused,
            backend: self.backend,
            retries: self.attempt,
            bytes_up: self.bytes_up,
            bytes_down: self.bytes_down,
            times: self.times,
            fault: self.fault,
        }
    }
}

/// The trace that a request says it belongs to, if it says so once and well-formed; else zero.
fn trace_of(head: &RequestHead<'_, '_>) -> u128 {
    let mut said = head.fields.values(Name::Traceparent);
    match (said.next(), said.next()) {
        (Some(value), None) => trace::trace_of(value).unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_refused_head_is_kept_as_far_as_it_is_one() {
        let long = [b"GET /".as_slice(), &[b'a'; 5000]].concat();
        for (head, kept) in [
            (&b"PUT /one HTTP/1.1\r\nHost: a/b\r\n\r\n"[..], &b"PUT /one"[..]),
            (b"\r\nGET /two HTTP/1.1\nHost: x\n\n", b"GET /two"),
            (b"GET /th\xe9\x1b[2J HTTP/1.1\r\n", b"GET /th??[2J"),
            (b"GET  /four HTTP/1.1\r\n", b"GET /four"),
            (b"GET\r\n", b""),
            (b"\x16\x03\x01\x02 \x01", b""),
            (b"", b""),
            (&long, &long[..LINE_KEPT_MAX]),
        ] {
            let mut exchange = Exchange::new();
            exchange.note_line(head);
            assert_eq!(exchange.line, kept, "{}", String::from_utf8_lossy(head));
        }
    }
}
