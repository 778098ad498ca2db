//! Writing heads anew from their parts: what a gateway removes, keeps and adds on the way to a
//! backend (RFC 9110 7.6) and back. Nothing is copied from the wire except names and values that
//! `head` has read. Decides neither framing nor persistence; the caller says.

use super::body::Framing;
use super::date::Date;
use super::field::{self, Name};
use super::head::{Connection, Field, Fields, RequestHead, ResponseHead, Target};
use super::user::User;

/// What a forwarded request says in addition to what it arrived with.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    pub user: &'a User,
    /// This balancer's name in `Via`: the same for every message, and nobody else's.
    pub via: &'a str,
    /// `Host` for a request that came without one.
    pub host: &'a str,
    /// Its `X-Request-Id`; `None` passes on what it came with.
    pub id: Option<&'a [u8]>,
    /// Field lines about the certificate that the user has shown, if any.
    pub certificate: &'a [u8],
}

/// Writes the head of a request to a backend. `upgrade` offers its protocols to the backend (RFC 9110
/// 7.8); see [`offers`].
pub fn request(
    out: &mut Vec<u8>,
    head: &RequestHead<'_, '_>,
    framing: Framing,
    upgrade: bool,
    route: &Route<'_>,
) {
    put(out, &[head.method.as_bytes(), b" "]);
    put(out, &origin_form(head));
    let host = head.host.unwrap_or(route.host);
    put(out, &[b" HTTP/1.1\r\nHost: ", host.as_bytes(), b"\r\n"]);
    for (name, line) in head.fields.iter() {
        match name {
            _ if name.may_be_removed() && is_named(head.connection, &head.fields, line) => {}
            Name::Other
            | Name::Accept
            | Name::Authorization
            | Name::ContentType
            | Name::Cookie
            | Name::Date
            | Name::ProxyAuthenticate
            | Name::ProxyAuthorization
            | Name::Traceparent
            | Name::Via
            | Name::WwwAuthenticate => {
                put_line(out, line);
            }
            Name::RequestId if route.id.is_none() => put_line(out, line),
            Name::Expect if head.expects_continue => put_line(out, line),
            Name::MaxForwards => put_max_forwards(out, head.method, line),
            Name::ProxyClaim if route.user.trusted() => put_line(out, line),
            _ => {}
        }
    }
    put_framing(out, framing);
    put_connection(out, head, upgrade);
    put(out, &[b"Via: 1.1 ", route.via.as_bytes(), b"\r\n"]);
    put_id(out, route.id);
    put_forwarded(out, &head.fields, host, route.user);
    put(out, &[route.certificate, b"\r\n"]);
}

/// Writes the ID of a request, if it has one of ours.
pub fn put_id(out: &mut Vec<u8>, id: Option<&[u8]>) {
    if let Some(id) = id {
        put(out, &[b"X-Request-Id: ", id, b"\r\n"]);
    }
}

/// The path and query, in two pieces; a backend is always asked in origin form (RFC 9112 3.2.1).
fn origin_form<'a>(head: &RequestHead<'_, 'a>) -> [&'a [u8]; 2] {
    match head.target {
        Target::Origin(path) => [path.as_bytes(), b""],
        Target::Asterisk => [b"*", b""],
        Target::Absolute { path: "", .. } if head.method == "OPTIONS" => [b"*", b""],
        Target::Absolute { path, .. } if path.starts_with('/') => [path.as_bytes(), b""],
        Target::Absolute { path, .. } => [b"/", path.as_bytes()],
    }
}

/// Whether `Connection` names this field, which makes it for us alone.
fn is_named(said: Connection, fields: &Fields<'_, '_>, line: &Field<'_>) -> bool {
    said.names_fields && fields.list_has(Name::Connection, line.name.as_bytes())
}

/// Writes `Max-Forwards`, decremented for `OPTIONS` (RFC 9110 7.6.2). At zero the caller answers
/// instead, and nothing is written.
fn put_max_forwards(out: &mut Vec<u8>, method: &str, line: &Field<'_>) {
    let left = if method == "OPTIONS" { max_forwards(line.value) } else { None };
    match left {
        Some(left) => {
            put(out, &[line.name.as_bytes(), b": "]);
            put_number(out, left.saturating_sub(1));
            out.extend_from_slice(b"\r\n");
        }
        None => put_line(out, line),
    }
}

fn max_forwards(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Whether a request may go no further: `OPTIONS` with `Max-Forwards: 0` is answered here.
pub fn ends_here(head: &RequestHead<'_, '_>) -> bool {
    head.method == "OPTIONS"
        && head.fields.values(Name::MaxForwards).any(|value| max_forwards(value) == Some(0))
}

/// Whether a request has been here before: our own name in `Via` (RFC 9110 7.6.3).
pub fn has_passed(head: &RequestHead<'_, '_>, via: &str) -> bool {
    let received_by = |element: &[u8]| {
        let mut words = element.split(|byte| matches!(byte, b' ' | b'\t'));
        words.nth(1).is_some_and(|name| name == via.as_bytes())
    };
    head.fields.has(Name::Via)
        && head.fields.values(Name::Via).flat_map(field::list).any(received_by)
}

/// The protocols that a request offers to switch to and that may be offered to a backend. HTTP/2 is
/// not among them: what follows such an upgrade would pass unread.
pub fn offers<'a>(head: &RequestHead<'_, 'a>) -> impl Iterator<Item = &'a [u8]> {
    let never = |protocol: &[u8]| {
        let starts = |prefix: &[u8]| {
            protocol.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
        };
        protocol.is_empty() || starts(b"h2") || starts(b"http/") || starts(b"tls/")
    };
    head.fields.values(Name::Upgrade).flat_map(field::list).filter(move |protocol| !never(protocol))
}

fn put_connection(out: &mut Vec<u8>, head: &RequestHead<'_, '_>, upgrade: bool) {
    let trailers = head.fields.list_has(Name::Te, b"trailers");
    match (upgrade, trailers) {
        (false, false) => return,
        (true, false) => out.extend_from_slice(b"Connection: upgrade\r\n"),
        (false, true) => out.extend_from_slice(b"Connection: te\r\nTE: trailers\r\n"),
        (true, true) => out.extend_from_slice(b"Connection: upgrade, te\r\nTE: trailers\r\n"),
    }
    if upgrade {
        out.extend_from_slice(b"Upgrade: ");
        put_list(out, offers(head));
        out.extend_from_slice(b"\r\n");
    }
}

/// Writes who the user is and what it asked for, which the backend cannot see for itself. What an
/// untrusted peer claims about it is dropped; what a trusted proxy said is kept, and the proxy's
/// own address is added.
fn put_forwarded(out: &mut Vec<u8>, fields: &Fields<'_, '_>, host: &str, user: &User) {
    let said = |name: Name| fields.values(name).filter(|_| user.trusted());
    out.extend_from_slice(b"X-Forwarded-For: ");
    put_list(out, said(Name::XForwardedFor).chain([user.plain()]));
    out.extend_from_slice(b"\r\nX-Forwarded-Proto: ");
    put_list_or(out, said(Name::XForwardedProto), user.scheme());
    out.extend_from_slice(b"\r\nX-Forwarded-Host: ");
    put_list_or(out, said(Name::XForwardedHost), host.as_bytes());
    out.extend_from_slice(b"\r\nForwarded: ");
    for value in said(Name::Forwarded) {
        put(out, &[value, b", "]);
    }
    // A port's colon, or an address in brackets, has to be quoted (RFC 7239 4).
    let quote: &[u8] = if host.contains([':', '[']) { b"\"" } else { b"" };
    put(out, &[b"for=", user.node(), b";host=", quote, host.as_bytes(), quote]);
    put(out, &[b";proto=", user.scheme(), b"\r\n"]);
}

/// How the head of a response is written.
#[derive(Clone, Copy, Debug)]
pub struct ResponseForm<'a> {
    pub framing: Framing,
    /// The connection ends after this response.
    pub close: bool,
    /// Passes the backend's `Upgrade` on: its 101, or the 426 that asks for one.
    pub upgrade: bool,
    /// Added to a final response without one (RFC 9110 6.6.1).
    pub date: Option<&'a Date>,
    /// The `X-Request-Id` of its request; `None` passes on what the backend sent.
    pub id: Option<&'a [u8]>,
}

/// Writes the head of a response to a user.
pub fn response(out: &mut Vec<u8>, head: &ResponseHead<'_, '_>, reply: &ResponseForm<'_>) {
    put_status(out, head.status, head.reason);
    for (name, line) in head.fields.iter() {
        let dropped = name.is_for_this_hop()
            || name == Name::RequestId && reply.id.is_some()
            || name.may_be_removed() && is_named(head.connection, &head.fields, line);
        if !dropped {
            put_line(out, line);
        }
    }
    put_framing(out, reply.framing);
    put_id(out, reply.id);
    put_persistence(out, &head.fields, reply, head.connection);
    if let Some(date) = reply.date
        && !head.fields.has(Name::Date)
    {
        put(out, &[b"Date: ", date.text(), b"\r\n"]);
    }
    out.extend_from_slice(b"\r\n");
}

fn put_persistence(
    out: &mut Vec<u8>,
    fields: &Fields<'_, '_>,
    reply: &ResponseForm<'_>,
    said: Connection,
) {
    if reply.upgrade && said.upgrade && fields.has(Name::Upgrade) {
        let option: &[u8] = if reply.close { b"close, upgrade" } else { b"upgrade" };
        put(out, &[b"Connection: ", option, b"\r\nUpgrade: "]);
        put_list(out, fields.values(Name::Upgrade));
        out.extend_from_slice(b"\r\n");
    } else if reply.close {
        out.extend_from_slice(b"Connection: close\r\n");
    }
}

/// Writes a status line.
pub fn put_status(out: &mut Vec<u8>, status: u16, reason: &str) {
    let digit = |unit: u16| b'0' + (status / unit % 10) as u8;
    put(out, &[b"HTTP/1.1 ", &[digit(100), digit(10), digit(1), b' '], reason.as_bytes(), b"\r\n"]);
}

/// Writes the field that says where the body ends.
pub fn put_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::None | Framing::UntilClose => {}
        Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        Framing::Length(length) => {
            out.extend_from_slice(b"Content-Length: ");
            put_number(out, length);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// Writes a number in decimal digits.
pub fn put_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

/// Writes all parts, one behind the other.
pub fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

fn put_line(out: &mut Vec<u8>, line: &Field<'_>) {
    out.reserve(line.name.len() + line.value.len() + 4);
    put(out, &[line.name.as_bytes(), b": ", line.value, b"\r\n"]);
}

fn put_list<'a>(out: &mut Vec<u8>, elements: impl Iterator<Item = &'a [u8]>) {
    for (place, element) in elements.enumerate() {
        let before: &[u8] = if place == 0 { b"" } else { b", " };
        put(out, &[before, element]);
    }
}

fn put_list_or<'a>(out: &mut Vec<u8>, elements: impl Iterator<Item = &'a [u8]>, none: &[u8]) {
    let start = out.len();
    put_list(out, elements);
    if out.len() == start {
        out.extend_from_slice(none);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::{self, Space};
    use crate::http::{Limits, body};

    const MAPPED: &str = "::ffff:192.0.2.7";

    fn forwarded(text: &str, address: &str, trusted: bool) -> String {
        forwarded_with(text, address, trusted, b"")
    }

    fn forwarded_with(text: &str, address: &str, trusted: bool, certificate: &[u8]) -> String {
        let mut space = Space::new();
        let head = head::request(text.as_bytes(), 0, &Limits::default(), &mut space);
        let head = head.unwrap().unwrap();
        let user = User::new(address.parse().unwrap(), trusted, false);
        let route = Route { user: &user, via: "lb-1", host: "10.0.0.1:80", id: None, certificate };
        let upgrade = head.connection.upgrade && offers(&head).next().is_some();
        let mut out = Vec::new();
        request(&mut out, &head, body::of_request(&head).unwrap(), upgrade, &route);
        String::from_utf8(out).unwrap()
    }

    /// The part of a written request that is not the same for every request.
    fn middle(lines: &str) -> String {
        let text = format!("GET / HTTP/1.1\r\nHost: x\r\n{lines}\r\n");
        let all = forwarded(&text, MAPPED, false);
        let rest = all.strip_prefix("GET / HTTP/1.1\r\nHost: x\r\n").unwrap();
        let end = rest.find("Via: 1.1 lb-1\r\nX-Forwarded-For: 192.0.2.7\r\n").unwrap();
        rest[..end].to_string()
    }

    #[test]
    fn a_request_is_written_again_with_what_the_backend_must_know() {
        let text = "GET /a?b HTTP/1.0\r\nUser-Agent: c\r\nhost: x:8083\r\nAccept: */*\r\n\r\n";
        assert_eq!(
            forwarded(text, MAPPED, false),
            "GET /a?b HTTP/1.1\r\nHost: x:8083\r\nUser-Agent: c\r\nAccept: */*\r\n\
             Via: 1.1 lb-1\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\n\
             X-Forwarded-Host: x:8083\r\n\
             Forwarded: for=192.0.2.7;host=\"x:8083\";proto=http\r\n\r\n"
        );
    }

    #[test]
    fn the_target_is_sent_in_origin_form() {
        for (line, host, wanted) in [
            ("GET http://h/a?b", "x", "GET /a?b HTTP/1.1\r\nHost: h\r\n"),
            ("GET http://h", "x", "GET / HTTP/1.1\r\nHost: h\r\n"),
            ("GET http://h:1?q", "x", "GET /?q HTTP/1.1\r\nHost: h:1\r\n"),
            ("OPTIONS http://h", "x", "OPTIONS * HTTP/1.1\r\nHost: h\r\n"),
            ("OPTIONS *", "x", "OPTIONS * HTTP/1.1\r\nHost: x\r\n"),
        ] {
            let text = format!("{line} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            assert!(forwarded(&text, MAPPED, false).starts_with(wanted), "{line}");
        }
        assert!(
            forwarded("GET / HTTP/1.0\r\n\r\n", MAPPED, false)
                .starts_with("GET / HTTP/1.1\r\nHost: 10.0.0.1:80\r\n")
        );
    }

    #[test]
    fn what_is_for_this_hop_alone_is_not_passed_on() {
        for (lines, wanted) in [
            ("Connection: close\r\nKeep-Alive: timeout=5\r\nProxy-Connection: close\r\n", ""),
            ("Connection: X-A, x-b\r\nX-A: 1\r\nX-B: 2\r\nX-C: 3\r\n", "X-C: 3\r\n"),
            ("X-A: 1\r\nConnection: keep-alive\r\nConnection: x-a\r\n", ""),
            ("TE: gzip\r\nConnection: TE\r\n", ""),
            ("TE: trailers, gzip\r\n", "Connection: te\r\nTE: trailers\r\n"),
            ("Upgrade: websocket\r\n", ""),
            ("Content_Length: 5\r\nTransfer_Encoding: chunked\r\nX_Forwarded_For: y\r\n", ""),
            ("user_id: 5\r\n", "user_id: 5\r\n"),
            ("Expect: 100-continue\r\n", "Expect: 100-continue\r\n"),
        ] {
            assert_eq!(middle(lines), wanted, "{lines}");
        }
    }

    #[test]
    fn nobody_can_have_a_field_removed_that_others_rely_on() {
        let protected = "Authorization: a\r\nCookie: b\r\nContent-Type: d\r\n\
                         Proxy-Authorization: e\r\nWWW-Authenticate: f\r\n";
        let list = "Connection: host, authorization, proxy-authorization, www-authenticate, cookie, content-type, content-length, via, \
                    x-forwarded-for, forwarded\r\n";
        let kept = format!("{protected}Content-Length: 0\r\n");
        assert_eq!(middle(&format!("{list}Content-Length: 0\r\n{protected}")), kept);
    }

    #[test]
    fn framing_is_written_by_us_alone() {
        for (lines, wanted) in [
            ("Content-Length: 0042\r\nA: b\r\n", "A: b\r\nContent-Length: 42\r\n"),
            ("Transfer-Encoding:\tCHUNKED\r\n", "Transfer-Encoding: chunked\r\n"),
            ("", ""),
        ] {
            assert_eq!(middle(lines), wanted, "{lines}");
        }
    }

    #[test]
    fn repeated_fields_keep_their_order_and_their_bytes() {
        let lines = "A: 1\r\nB: \u{e4}\r\nA: 2,  3\r\nC:\r\n";
        assert_eq!(middle(lines), "A: 1\r\nB: \u{e4}\r\nA: 2,  3\r\nC: \r\n");
    }

    #[test]
    fn only_a_trusted_proxy_is_believed_about_the_user() {
        let said = "X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 2.2.2.2\r\nX-Real-IP: 1.1.1.1\r\n\
                    X-Forwarded-Proto: https\r\nX-Forwarded-Host: pub\r\nX-Forwarded-Port: 443\r\n\
                    Forwarded: for=1.1.1.1\r\n";
        let text = format!("GET / HTTP/1.1\r\nHost: x\r\n{said}\r\n");
        let untrusted = forwarded(&text, "2001:db8::7", false);
        assert_eq!(
            untrusted,
            "GET / HTTP/1.1\r\nHost: x\r\nVia: 1.1 lb-1\r\nX-Forwarded-For: 2001:db8::7\r\n\
             X-Forwarded-Proto: http\r\nX-Forwarded-Host: x\r\n\
             Forwarded: for=\"[2001:db8::7]\";host=x;proto=http\r\n\r\n"
        );
        let trusted = forwarded(&text, "2001:db8::7", true);
        assert_eq!(
            trusted,
            "GET / HTTP/1.1\r\nHost: x\r\nX-Real-IP: 1.1.1.1\r\nX-Forwarded-Port: 443\r\n\
             Via: 1.1 lb-1\r\nX-Forwarded-For: 1.1.1.1, 2.2.2.2, 2001:db8::7\r\n\
             X-Forwarded-Proto: https\r\nX-Forwarded-Host: pub\r\n\
             Forwarded: for=1.1.1.1, for=\"[2001:db8::7]\";host=x;proto=http\r\n\r\n"
        );
    }

    #[test]
    fn nobody_says_but_the_balancer_who_has_shown_a_certificate() {
        let said = "Client-Cert: :AAAA:\r\nclient_cert: :AAAA:\r\nCLIENT-CERT-CHAIN: :AAAA:\r\n\
                    Connection: client-cert\r\n";
        let text = format!("GET / HTTP/1.1\r\nHost: x\r\n{said}\r\n");
        for trusted in [false, true] {
            let written = forwarded(&text, "192.0.2.1", trusted).to_ascii_lowercase();
            assert!(!written.contains("client"), "{written}");
            let told = b"Client-Cert: :MIIB:\r\n";
            let written = forwarded_with(&text, "192.0.2.1", trusted, told).to_ascii_lowercase();
            assert!(written.ends_with(";proto=http\r\nclient-cert: :miib:\r\n\r\n"), "{written}");
            assert_eq!(written.matches("client").count(), 1, "{written}");
        }
    }

    #[test]
    fn the_longest_address_fits() {
        let address = "1111:2222:3333:4444:5555:6666:7777:8888";
        let user = User::new(address.parse().unwrap(), false, false);
        assert_eq!(user.plain(), address.as_bytes());
        assert_eq!(user.node(), format!("\"[{address}]\"").as_bytes());
    }

    fn with_head<T>(text: &str, look: impl FnOnce(&RequestHead<'_, '_>) -> T) -> T {
        let mut space = Space::new();
        let head = head::request(text.as_bytes(), 0, &Limits::default(), &mut space);
        look(&head.unwrap().unwrap())
    }

    #[test]
    fn a_request_that_was_here_before_is_known_by_its_via() {
        for (lines, wanted) in [
            ("", false),
            ("Via: 1.1 other\r\n", false),
            ("Via: 1.1 lb-11, 1.0 alb-1\r\n", false),
            ("Via: 1.1 other, 1.1 lb-1\r\n", true),
            ("Via: 1.1 other\r\nVia: HTTP/1.1 lb-1 (comment)\r\n", true),
        ] {
            let text = format!("GET / HTTP/1.1\r\nHost: x\r\n{lines}\r\n");
            assert_eq!(with_head(&text, |head| has_passed(head, "lb-1")), wanted, "{lines}");
        }
        assert_eq!(middle("Via: 1.0 a\r\n"), "Via: 1.0 a\r\n");
    }

    #[test]
    fn an_upgrade_to_http_2_is_not_offered_to_a_backend() {
        for (offer, wanted) in [
            ("websocket", "Connection: upgrade\r\nUpgrade: websocket\r\n"),
            ("h2c", ""),
            ("H2C", ""),
            ("HTTP/2.0", ""),
            ("TLS/1.0", ""),
            ("h2c, websocket", "Connection: upgrade\r\nUpgrade: websocket\r\n"),
            ("", ""),
        ] {
            let lines = format!(
                "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: x\r\nUpgrade: {offer}\r\n"
            );
            assert_eq!(middle(&lines), wanted, "{offer}");
        }
        let both = middle("Connection: upgrade\r\nUpgrade: a\r\nTE: trailers\r\n");
        assert_eq!(both, "Connection: upgrade, te\r\nTE: trailers\r\nUpgrade: a\r\n");
    }

    #[test]
    fn hops_are_counted_down_for_options_only() {
        let options =
            |value: &str| format!("OPTIONS * HTTP/1.1\r\nHost: x\r\nMax-Forwards: {value}\r\n\r\n");
        assert!(forwarded(&options("7"), MAPPED, false).contains("Max-Forwards: 6\r\n"));
        assert!(with_head(&options("0"), ends_here));
        assert!(!with_head(&options("1"), ends_here));
        assert!(!with_head(&options("x"), ends_here));
        assert_eq!(middle("Max-Forwards: 5\r\n"), "Max-Forwards: 5\r\n");
    }

    fn passed_back(text: &str, reply: &ResponseForm<'_>) -> String {
        let mut space = Space::new();
        let head = head::response(text.as_bytes(), 0, &Limits::default(), &mut space);
        let mut out = Vec::new();
        response(&mut out, &head.unwrap().unwrap(), reply);
        String::from_utf8(out).unwrap()
    }

    const PLAIN: ResponseForm<'_> = ResponseForm {
        framing: Framing::Length(5),
        close: false,
        upgrade: false,
        date: None,
        id: None,
    };

    #[test]
    fn a_response_is_written_again_with_our_framing() {
        let text = "HTTP/1.0 404 Not Found\r\nServer: s\r\nContent-Length: 05\r\nSet-Cookie: a\r\n\
                    Connection: close, X-A\r\nX-A: 1\r\nKeep-Alive: timeout=5\r\nSet-Cookie: b\r\n\
                    Upgrade: h2c\r\nVia: 1.0 c\r\nContent_Length: 6\r\nConnection: via\r\n\r\n";
        let fields = "Server: s\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nVia: 1.0 c\r\n";
        let date = Date::at(0);
        for (reply, ending) in [
            (PLAIN, "Content-Length: 5\r\n"),
            (ResponseForm { framing: Framing::Chunked, ..PLAIN }, "Transfer-Encoding: chunked\r\n"),
            (
                ResponseForm { framing: Framing::UntilClose, close: true, ..PLAIN },
                "Connection: close\r\n",
            ),
            (
                ResponseForm { framing: Framing::None, date: Some(&date), ..PLAIN },
                "Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n",
            ),
        ] {
            let wanted = format!("HTTP/1.1 404 Not Found\r\n{fields}{ending}\r\n");
            assert_eq!(passed_back(text, &reply), wanted);
        }
    }

    #[test]
    fn an_expectation_of_http_1_0_is_not_passed_on() {
        let text = "POST / HTTP/1.0\r\nHost: x\r\nExpect: 100-continue\r\n\r\n";
        assert!(!forwarded(text, MAPPED, false).contains("Expect"));
    }

    #[test]
    fn a_date_that_is_there_is_kept() {
        let date = Date::at(0);
        let text = "HTTP/1.1 200\r\ndate: then\r\n\r\n";
        let reply = ResponseForm { framing: Framing::None, date: Some(&date), ..PLAIN };
        assert_eq!(passed_back(text, &reply), "HTTP/1.1 200 \r\ndate: then\r\n\r\n");
    }

    #[test]
    fn an_upgrade_is_passed_back_only_when_it_is_wanted() {
        let text = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n";
        let line = "HTTP/1.1 101 Switching Protocols\r\n";
        let none = ResponseForm { framing: Framing::None, ..PLAIN };
        assert_eq!(passed_back(text, &none), format!("{line}\r\n"));
        let wanted = ResponseForm { upgrade: true, ..none };
        let upgraded = format!("{line}Connection: upgrade\r\nUpgrade: a\r\n\r\n");
        assert_eq!(passed_back(text, &wanted), upgraded);
    }

    #[test]
    fn what_is_written_reads_back_as_what_was_meant() {
        let text = "POST http://h/p HTTP/1.1\r\nHost: x\r\nA: b\r\nTransfer-Encoding: chunked\r\n\
                    Connection: upgrade\r\nUpgrade: w\r\n\r\n";
        let once = forwarded(text, MAPPED, false);
        with_head(&once, |head| {
            assert_eq!((head.method, head.target), ("POST", Target::Origin("/p")));
            assert_eq!(head.host, Some("h"));
            assert_eq!(body::of_request(head), Ok(Framing::Chunked));
            assert_eq!(head.length, once.len());
        });
    }
}
