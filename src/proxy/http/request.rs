//! From the user to the backend: reading a request's head, deciding what becomes of it, writing it
//! anew, and passing its body on. Decides nothing about connections.

use super::exchange::{Answer, Exchange, Upload};
use super::gateway::Gateway;
use super::routing::Entrance;
use super::stash::Stash;
use super::{Context, GatewayCmd, GatewaySettings, Kit};
use crate::cluster::Terms;
use crate::http::body::{self, Body, Framing};
use crate::http::chunked::Passed;
use crate::http::field::{self, Name};
use crate::http::head::{self, RequestHead, Space, Target};
use crate::http::user::User;
use crate::http::write::{self, Route};
use crate::http::{Malformed, Version};
use crate::ring::pool::{Buf, Pool};
use crate::tls::clients::Shown;

/// The `Host` sent to a backend for a request that came without one.
const NO_HOST: &str = "localhost";
/// The port that need not be named.
const HTTPS_PORT: u16 = 443;

const MISDIRECTED: Malformed =
    Malformed::new(421, "this host asks for other client certificates than this connection did");

/// What the bytes at the beginning of a request are.
enum Read {
    /// Not a whole head yet.
    More,
    /// A head of this length in bytes, written anew in the scratch.
    Whole(usize),
    Refused(Malformed),
    /// A request that we answer ourselves; the length of its head in bytes.
    ForUs(usize),
}

/// What the reading of a head goes by.
struct About<'a> {
    user: &'a User,
    shown: Option<&'a Shown>,
    entrance: Entrance<'a>,
    settings: &'a GatewaySettings,
}

impl About<'_> {
    /// Whether its service serves requests only by HTTPS, and this one has come in the clear. A proxy that we
    /// believe may have spoken TLS with the user itself.
    fn must_come_by_https(&self, terms: &Terms, head: &RequestHead<'_, '_>) -> bool {
        if self.entrance.door.is_tls || !(terms.https_only || demands_certificate(terms)) {
            return false;
        }
        let is_secure = |scheme: &[u8]| scheme.eq_ignore_ascii_case(b"https");
        let said = || head.fields.values(Name::XForwardedProto).flat_map(field::list).next();
        !(self.user.trusted() && said().is_some_and(is_secure))
    }

    /// Whether its service asks for other certificates than the user was asked for when it connected (RFC 9110
    /// section 15.5.20). In the clear nobody is asked, which serves where none is required.
    fn is_misdirected(&self, terms: &Terms) -> bool {
        let (wanted, asked) = (&terms.clients, self.shown.map(|shown| &shown.policy));
        match (wanted, asked) {
            (None, None) => false,
            (Some(_), None) if !self.entrance.door.is_tls => demands_certificate(terms),
            (wanted, asked) => wanted.as_ref() != asked,
        }
    }
}

fn demands_certificate(terms: &Terms) -> bool {
    terms.clients.as_ref().is_some_and(|clients| clients.is_required)
}

/// Sends a request to the same host and path by HTTPS (RFC 9110 section 15.4.9).
fn elsewhere(head: &RequestHead<'_, '_>, port: Option<u16>, location: &mut Vec<u8>) -> Malformed {
    let (Some(host), Some(port)) = (head.host.filter(|host| !host.is_empty()), port) else {
        return Malformed::new(400, "this service is reached by HTTPS, and no host was named");
    };
    let target = match head.target {
        Target::Origin(target) | Target::Absolute { path: target, .. } => target,
        Target::Asterisk => "/",
    };
    location.clear();
    location.extend_from_slice(b"https://");
    location.extend_from_slice(without_port(host).as_bytes());
    if port != HTTPS_PORT {
        location.push(b':');
        write::put_number(location, u64::from(port));
    }
    location.extend_from_slice(target.as_bytes());
    Malformed::new(308, "this service is reached by HTTPS")
}

/// The colons of an IPv6 address are in brackets.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

impl Gateway {
    /// Takes a block from the user while a request head is expected or incomplete.
    pub(super) fn read_block(&mut self, mut buf: Buf, cx: &mut Context<'_>) {
        let before = self.stash.len();
        if before == 0 {
            self.exchange.begin(cx.snapshot.request_limits(self.door.service), cx.now);
        } else {
            self.stash.push(cx.pool.bytes(&buf));
        }
        let bytes = if before == 0 { cx.pool.bytes(&buf) } else { self.stash.bytes() };
        let entrance = Entrance { door: self.door, snapshot: cx.snapshot };
        let shown = self.shown.as_deref();
        let about = About { user: &self.user, shown, entrance, settings: cx.settings };
        match read(&mut self.exchange, bytes, before, &about, cx.kit) {
            Read::More => {
                if before == 0 {
                    self.stash.push(cx.pool.bytes(&buf));
                }
                self.stash_seen = self.stash.len();
                cx.pool.give_back(buf);
            }
            Read::Refused(_) if self.begins_http2(bytes, cx.settings) => {
                let first = bytes.to_vec();
                cx.pool.give_back(buf);
                self.stash = Stash::EMPTY;
                self.begin_http2(&first, cx);
            }
            Read::Refused(fault) => {
                cx.pool.give_back(buf);
                self.malformed(fault, cx);
            }
            Read::ForUs(length) => {
                self.head_ends_at(length - before, &mut buf, cx.pool);
                self.keep_for_later(buf, cx.pool);
                self.answer_for_us(cx);
            }
            Read::Whole(length) => {
                self.head_ends_at(length - before, &mut buf, cx.pool);
                let rest = if buf.is_empty() {
                    cx.pool.give_back(buf);
                    None
                } else {
                    Some(buf)
                };
                self.forward_head(cx);
                if let Some(rest) = rest {
                    self.take_body(rest, cx);
                }
                self.obtain_first(cx);
            }
        }
    }

    /// What follows a head is all in the last block, since the head was incomplete without it.
    fn head_ends_at(&mut self, place: usize, buf: &mut Buf, pool: &Pool) {
        pool.skip(buf, place);
        self.stash = Stash::EMPTY;
        self.stash_seen = 0;
    }

    /// Reads the next request from bytes that arrived before it was wanted.
    pub(super) fn read_stash(&mut self, cx: &mut Context<'_>) {
        if self.stash_seen == 0 {
            self.exchange.begin(cx.snapshot.request_limits(self.door.service), cx.now);
        }
        let (bytes, seen) = (self.stash.bytes(), self.stash_seen);
        let entrance = Entrance { door: self.door, snapshot: cx.snapshot };
        let shown = self.shown.as_deref();
        let about = About { user: &self.user, shown, entrance, settings: cx.settings };
        match read(&mut self.exchange, bytes, seen, &about, cx.kit) {
            Read::More => self.stash_seen = self.stash.len(),
            Read::Refused(fault) => self.malformed(fault, cx),
            Read::ForUs(length) => {
                self.stash.skip(length);
                self.stash_seen = 0;
                self.answer_for_us(cx);
            }
            Read::Whole(length) => {
                self.stash.skip(length);
                self.stash_seen = 0;
                self.forward_head(cx);
                self.take_stashed_body(cx);
                self.obtain_first(cx);
            }
        }
    }

    /// Moves the head from the scratch to the queue to the backend.
    fn forward_head(&mut self, cx: &mut Context<'_>) {
        self.begin_exchange(cx.now);
        self.exchange.answer = Answer::Obtaining;
        let scratch = std::mem::take(&mut cx.kit.scratch);
        let written = cx.kit.append(&mut self.upward, &scratch, cx.pool);
        cx.kit.scratch = scratch;
        if written.is_err() {
            self.exhausted(cx);
        }
    }

    /// Asks for a backend, unless the request has been refused meanwhile.
    fn obtain_first(&mut self, cx: &mut Context<'_>) {
        if let Some(why) = self.refuses
            && self.exchange.status == 0
        {
            (self.exchange.close, self.exchange.is_full) = (true, true);
            return self.answer_ourselves(503, why, cx);
        }
        if !matches!(self.exchange.answer, Answer::Obtaining) {
            return;
        }
        match self.exchange.wish() {
            Some(wish) => cx.out.push(GatewayCmd::Obtain(wish)),
            None => self.answer_ourselves(404, "no service has this host and path", cx),
        }
    }

    /// Takes a block of the body; bytes after its end are kept for later.
    pub(super) fn take_body(&mut self, mut buf: Buf, cx: &mut Context<'_>) {
        let Upload::Flowing(body) = &mut self.exchange.upload else {
            return self.keep_for_later(buf, cx.pool);
        };
        let bytes = cx.pool.bytes_mut(&mut buf);
        match body.pass(bytes) {
            Ok(passed) => {
                self.stash.push(&bytes[passed.consumed..]);
                cx.pool.truncate(&mut buf, passed.output.end);
                cx.pool.skip(&mut buf, passed.output.start);
                if buf.is_empty() {
                    cx.pool.give_back(buf);
                } else {
                    cx.pool.push(&mut self.upward, buf);
                }
                self.body_passed(&passed, cx);
            }
            Err(fault) => {
                cx.pool.give_back(buf);
                self.malformed(fault, cx);
            }
        }
    }

    fn take_stashed_body(&mut self, cx: &mut Context<'_>) {
        let Upload::Flowing(body) = &mut self.exchange.upload else { return };
        match body.pass(self.stash.bytes_mut()) {
            Ok(passed) => {
                let output = &self.stash.bytes()[passed.output.clone()];
                let written = cx.kit.append(&mut self.upward, output, cx.pool);
                self.stash.skip(passed.consumed);
                if written.is_err() {
                    return self.exhausted(cx);
                }
                self.body_passed(&passed, cx);
            }
            Err(fault) => self.malformed(fault, cx),
        }
    }

    fn body_passed(&mut self, passed: &Passed, cx: &mut Context<'_>) {
        // A user that sends the body is not waiting for permission to.
        self.exchange.expects_continue &= passed.consumed == 0;
        self.exchange.bytes_up += passed.output.len() as u64;
        if !passed.finished {
            return;
        }
        let Upload::Flowing(body) = std::mem::replace(&mut self.exchange.upload, Upload::Done)
        else {
            return;
        };
        if let Body::Chunked(chunked) = &body {
            let trailers = chunked.trailer_section();
            if cx.kit.append(&mut self.upward, trailers, cx.pool).is_err() {
                self.exhausted(cx);
            }
        }
    }

    /// Keeps bytes of a request that is not being served yet.
    pub(super) fn keep_for_later(&mut self, buf: Buf, pool: &mut Pool) {
        self.stash.push(pool.bytes(&buf));
        pool.give_back(buf);
    }
}

/// Reads a request's head and writes it anew, or says what is wrong with it.
fn read(
    exchange: &mut Exchange,
    bytes: &[u8],
    seen: usize,
    about: &About<'_>,
    kit: &mut Kit,
) -> Read {
    let settings = about.settings;
    let mut space = Space::new();
    let head = match head::request(bytes, seen, &settings.limits, &mut space) {
        Ok(Some(head)) => head,
        Ok(None) => return Read::More,
        Err(fault) => {
            exchange.note_line(bytes);
            return Read::Refused(fault);
        }
    };
    let target = match head.target {
        Target::Origin(path) | Target::Absolute { path, .. } => path,
        Target::Asterisk => "*",
    };
    exchange.note(&head, target, about.user.trusted(), kit.ids.as_mut());
    let framing = match decide(exchange, &head, about) {
        Ok(framing) => framing,
        Err(fault) => return Read::Refused(fault),
    };
    let service = exchange.service.and_then(|id| about.entrance.snapshot.service(id));
    if let Some(terms) = service.map(|service| &service.terms) {
        if about.must_come_by_https(terms, &head) {
            let port = terms.https_port.or(settings.https_port);
            return Read::Refused(elsewhere(&head, port, &mut kit.location));
        }
        if about.is_misdirected(terms) {
            return Read::Refused(MISDIRECTED);
        }
    }
    if write::ends_here(&head) && exchange.upload_is_done() {
        return Read::ForUs(head.length);
    }
    let certificate = about.shown.map_or(&[][..], |shown| &shown.fields);
    let (user, via, id) = (about.user, settings.via.as_str(), exchange.id());
    let route = Route { user, via, host: NO_HOST, id, certificate };
    kit.scratch.clear();
    write::request(&mut kit.scratch, &head, framing, !exchange.offers.is_empty(), &route);
    Read::Whole(head.length)
}

/// Decides what a request may do, and how its body is framed.
fn decide(
    exchange: &mut Exchange,
    head: &RequestHead<'_, '_>,
    about: &About<'_>,
) -> Result<Framing, Malformed> {
    let settings = about.settings;
    if write::has_passed(head, &settings.via) {
        return Err(Malformed::new(508, "the request has been here before"));
    }
    exchange.service = about.entrance.service_for(head)?;
    if let Some(service) = exchange.service.filter(|it| *it != about.entrance.door.service) {
        exchange.limits = about.entrance.snapshot.request_limits(service);
    }
    let body_bytes = exchange.limits.body_bytes;
    let framing = body::of_request(head)?;
    let has_body = match framing {
        Framing::None | Framing::Length(0) => false,
        Framing::Length(length) if length > body_bytes => {
            return Err(Malformed::new(413, "body too large"));
        }
        _ => true,
    };
    if has_body {
        let body = Body::new(framing, true, body_bytes);
        exchange.upload = Upload::Flowing(body);
        exchange.expects_continue = head.expects_continue;
    }
    // Not tied to a method or to the absence of a body (RFC 9110 7.8); a backend that agrees before
    // it has the whole request is not believed.
    if head.connection.upgrade && head.version == Version::Http11 {
        exchange.offer(head);
    }
    Ok(framing)
}
