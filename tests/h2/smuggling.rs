//! Requests of HTTP/2 that would be something else in HTTP/1.1: each rule of RFC 9113 sections 8.2 and 8.3 broken in
//! each place. They are refused, or the backend hears one request that has one meaning.

use crate::frames::{
    DATA, END_HEADERS, END_STREAM, Ended, Field, HEADERS, User, WHOLE, block, frame, pseudo,
};
use crate::harness::Balancer;
use crate::reading::Said;
use crate::recorder::Recorder;

/// What must become of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Refused,
    Served,
    /// Either, as the RFC leaves it open.
    Either,
    /// Refused for what follows a head that has gone on already: the backend may have heard one whole request.
    Late,
    /// Served without its fragment, which `h2` takes off before anybody sees it (RFC 9113 section 8.3.1 has none).
    Shorn,
}

/// A request, and what it sends after its head.
struct Case {
    what: String,
    fate: Fate,
    fields: Vec<(Vec<u8>, Vec<u8>)>,
    content: Option<Vec<u8>>,
    trailers: Option<Vec<(Vec<u8>, Vec<u8>)>>,
}

fn owned(fields: &[Field<'_>]) -> Vec<(Vec<u8>, Vec<u8>)> {
    fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

/// A GET with these fields behind the pseudo-header fields.
fn with(fate: Fate, fields: &[Field<'_>]) -> Case {
    of(fate, &[&pseudo("GET", "/"), fields].concat())
}

/// These fields and no others.
fn of(fate: Fate, fields: &[Field<'_>]) -> Case {
    let name =
        |(name, value): &Field<'_>| format!("{}={}", name.escape_ascii(), value.escape_ascii());
    let what = fields.iter().map(name).collect::<Vec<_>>().join(" ");
    Case { what, fate, fields: owned(fields), content: None, trailers: None }
}

/// A POST with content.
fn sent(fate: Fate, fields: &[Field<'_>], content: &[u8]) -> Case {
    let case = of(fate, &[&pseudo("POST", "/"), fields].concat());
    Case { content: Some(content.to_vec()), ..case }
}

fn trailed(fate: Fate, trailers: &[Field<'_>]) -> Case {
    let what = of(fate, trailers).what;
    let what = format!("trailers {what}");
    Case { what, trailers: Some(owned(trailers)), ..sent(fate, &[], b"abc") }
}

/// A word with a byte at its start, in its middle and at its end.
fn around(word: &[u8], byte: u8) -> [Vec<u8>; 3] {
    let (start, end) = word.split_at(word.len() / 2);
    let byte = &[byte][..];
    [[byte, word].concat(), [start, byte, end].concat(), [word, byte].concat()]
}

/// RFC 9113 section 8.2.1.
fn names() -> Vec<Case> {
    let mut all = Vec::new();
    for byte in (0..=b' ').chain([b'A', b'Z', 0x7f, 0x80, 0xff]) {
        for name in around(b"x-name", byte) {
            all.push(with(Fate::Refused, &[(&name, b"1")]));
            all.push(trailed(Fate::Refused, &[(&name, b"1")]));
        }
    }
    for name in [&b"x:y"[..], b"x:", b"", b"x: 1\r\nx-smuggled", b"content-length: 3\r\nx", b"Host"]
    {
        all.push(with(Fate::Refused, &[(name, b"1")]));
        all.push(trailed(Fate::Refused, &[(name, b"1")]));
    }
    // No tokens of RFC 9110 section 5.6.2, which section 8.2.1 leaves to whoever reads them.
    for byte in *b"\"(),/;<=>?@[\\]{}" {
        all.extend(around(b"x-name", byte).map(|name| with(Fate::Either, &[(&name, b"1")])));
    }
    all.push(with(Fate::Either, &[(b"content_length", b"3")]));
    all.push(with(Fate::Either, &[(b"transfer_encoding", b"chunked")]));
    all
}

fn values() -> Vec<Case> {
    let mut all = Vec::new();
    for byte in *b"\0\r\n" {
        for value in around(b"value", byte) {
            all.push(with(Fate::Refused, &[(b"x-name", &value)]));
            all.push(with(Fate::Refused, &[(b"cookie", &value)]));
            all.push(with(Fate::Refused, &[(b"host", &value)]));
            all.push(trailed(Fate::Refused, &[(b"x-name", &value)]));
        }
    }
    for value in [&b"1\r\nx-smuggled: 1"[..], b"1\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"]
    {
        all.push(with(Fate::Refused, &[(b"x-name", value)]));
        all.push(trailed(Fate::Refused, &[(b"x-name", value)]));
    }
    for value in [&b" a"[..], b"a ", b"\ta", b"a\t", b" "] {
        all.push(with(Fate::Refused, &[(b"x-name", value)]));
    }
    for byte in [1, 0x08, 0x0b, 0x1b, 0x7f, 0x80, 0xa0, 0xff] {
        all.extend(around(b"value", byte).map(|value| with(Fate::Either, &[(b"x-name", &value)])));
    }
    all.push(with(Fate::Served, &[(b"x-name", b"a b\tc"), (b"x-empty", b"")]));
    all.push(with(Fate::Served, &[(b"cookie", b"a=1"), (b"cookie", b"b=2; c=3")]));
    all
}

/// A GET of which one pseudo-header field is another.
fn instead(fate: Fate, name: &[u8], value: &[u8]) -> Case {
    let mut fields = pseudo("GET", "/");
    fields.iter_mut().filter(|field| field.0 == name).for_each(|field| field.1 = value);
    of(fate, &fields)
}

/// RFC 9113 section 8.3.1, byte by byte.
fn pseudo_values() -> Vec<Case> {
    let mut all = Vec::new();
    let parts = [
        (&b":method"[..], &b"GET"[..]),
        (b":scheme", b"http"),
        (b":path", b"/path"),
        (b":authority", b"x.ex"),
    ];
    for (name, word) in parts {
        for byte in (0..=b' ').chain([0x7f]) {
            all.extend(around(word, byte).map(|value| instead(Fate::Refused, name, &value)));
        }
        for byte in [0x80, 0xc3, 0xff] {
            all.extend(around(word, byte).map(|value| instead(Fate::Either, name, &value)));
        }
        let line: &[u8] = b" HTTP/1.1\r\nhost: x\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: y\r\nx: ";
        all.push(instead(Fate::Refused, name, &[word, line].concat()));
        all.push(instead(Fate::Refused, name, b""));
    }
    for path in [&b"/a#b"[..], b"/#", b"//y/#", b"/a?b#c"] {
        all.push(instead(Fate::Shorn, b":path", path));
    }
    for path in
        [&b"a"[..], b"*", b"?a", b"http://y/", b"https://x.example/", b"x.example:80", b"\\a"]
    {
        all.push(instead(Fate::Refused, b":path", path));
    }
    for path in [&b"//y/"[..], b"/\xc3\xa4", b"/a\"b", b"/{a}", b"/<a>", b"/a\\b", b"/a|b", b"/^"] {
        all.push(instead(Fate::Either, b":path", path));
    }
    for authority in [
        &b"u@x"[..],
        b"u:p@x",
        b"x/y",
        b"x?y",
        b"x#y",
        b"x,y",
        b"x:80:80",
        b"[::1",
        b"x\\y",
        b"x:80a",
    ] {
        all.push(instead(Fate::Refused, b":authority", authority));
    }
    for scheme in [&b"ftp"[..], b"http:", b"http://y/", b"1", b"h ttp"] {
        all.push(instead(Fate::Refused, b":scheme", scheme));
    }
    for method in [&b"G:T"[..], b"G(T", b"CONNECT", b"TRACE"] {
        all.push(instead(Fate::Refused, b":method", method));
    }
    all.push(instead(Fate::Served, b":path", b"/a?b=%23&c"));
    all.push(instead(Fate::Served, b":authority", b"x.example:8080"));
    all
}

/// Which of them there are, where, and how they agree with others.
fn pseudo_fields() -> Vec<Case> {
    let all = pseudo("GET", "/");
    let mut cases: Vec<_> = (0..4)
        .map(|left| {
            let rest: Vec<_> = (0..4).filter(|at| *at != left).map(|at| all[at]).collect();
            of(Fate::Refused, &rest)
        })
        .collect();
    for field in all {
        cases.push(with(Fate::Refused, &[field]));
        cases.push(of(Fate::Refused, &[&all[..], &[(b"x-name", b"1"), field]].concat()));
        cases.push(trailed(Fate::Either, &[field]));
        let others: Vec<_> = all.into_iter().filter(|it| it.0 != field.0).collect();
        cases.push(of(Fate::Refused, &[&others[..], &[(b"x-name", b"1"), field]].concat()));
    }
    for name in [&b":status"[..], b":protocol", b":x", b":", b":Path", b":path "] {
        cases.push(of(Fate::Refused, &[&[(name, &b"200"[..])], &all[..]].concat()));
        cases.push(with(Fate::Refused, &[(name, b"200")]));
    }
    let host = |fate, host: &[&'static str]| {
        let lines: Vec<Field<'_>> = host.iter().map(|it| (&b"host"[..], it.as_bytes())).collect();
        with(fate, &lines)
    };
    cases.push(host(Fate::Served, &["x.example"]));
    cases.push(host(Fate::Refused, &["y.example"]));
    cases.push(host(Fate::Refused, &["x.example:80"]));
    cases.push(host(Fate::Refused, &["x.example", "x.example"]));
    cases.push(host(Fate::Refused, &["x.example", "y.example"]));
    cases.push(host(Fate::Refused, &["x.example, y.example"]));
    cases.push(host(Fate::Refused, &[""]));
    cases.push(of(Fate::Served, &[all[0], all[1], all[2], (b"host", b"y.example")]));
    cases.push(of(Fate::Refused, &[all[0], all[1], all[2], (b"host", b"u@y.example")]));
    cases
}

/// RFC 9113 section 8.1.1.
fn framings() -> Vec<Case> {
    let length = |fate, value: &'static str, content: &[u8]| {
        sent(fate, &[(b"content-length", value.as_bytes())], content)
    };
    let mut all = vec![
        length(Fate::Served, "4", b"abcd"),
        length(Fate::Served, "0", b""),
        sent(Fate::Served, &[], b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"),
        with(Fate::Refused, &[(b"content-length", b"4")]),
        with(Fate::Either, &[(b"content-length", b"0")]),
    ];
    all.push(length(Fate::Late, "0", b"abcd"));
    for value in [
        "3",
        "5",
        "4, 4",
        "4,5",
        "+4",
        "-4",
        "4 ",
        " 4",
        "0x4",
        "4.0",
        "4 4",
        "",
        "a",
        "4;",
        "18446744073709551620",
        "99999999999999999999999",
    ] {
        all.push(length(Fate::Refused, value, b"abcd"));
    }
    for (one, two, fate) in [
        ("4", "4", Fate::Either),
        ("4", "5", Fate::Refused),
        ("5", "4", Fate::Refused),
        ("4", "0", Fate::Refused),
        ("4", "", Fate::Refused),
    ] {
        let fields: [Field<'_>; 2] =
            [(b"content-length", one.as_bytes()), (b"content-length", two.as_bytes())];
        all.push(sent(fate, &fields, b"abcd"));
    }
    all
}

/// RFC 9113 section 8.2.2, and fields that are about a body.
fn connection_fields() -> Vec<Case> {
    let mut all = Vec::new();
    for (name, value) in [
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "identity"),
        ("transfer-encoding", ""),
        ("connection", "close"),
        ("connection", "x-name"),
        ("connection", ""),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "close"),
        ("upgrade", "h2c"),
        ("upgrade", "websocket"),
        ("te", "chunked"),
        ("te", "trailers, gzip"),
        ("te", ""),
        ("te", "gzip"),
    ] {
        let field = [(name.as_bytes(), value.as_bytes())];
        all.push(with(Fate::Refused, &field));
        all.push(sent(Fate::Refused, &field, b"0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n"));
        all.push(trailed(Fate::Refused, &field));
    }
    all.push(with(Fate::Served, &[(b"te", b"trailers")]));
    all.push(with(Fate::Either, &[(b"http2-settings", b"AAMAAABkAAQAAP__")]));
    all.push(with(Fate::Either, &[(b"expect", b"100-continue")]));
    for name in ["content-length", "host", "content-type", "trailer", "authorization", "cookie"] {
        all.push(trailed(Fate::Either, &[(name.as_bytes(), b"3")]));
    }
    all.push(trailed(Fate::Served, &[(b"x-checksum", b"abc")]));
    all
}

struct Stage {
    balancer: Balancer,
    recorder: Recorder,
}

impl Stage {
    fn start() -> Stage {
        let recorder = Recorder::start();
        Stage { balancer: Balancer::over(&[recorder.port]), recorder }
    }

    /// How a request on a connection of its own ends.
    fn play(&self, case: &Case) -> Ended {
        let fields = |from: &[(Vec<u8>, Vec<u8>)]| {
            block(&from.iter().map(|(name, value)| (&name[..], &value[..])).collect::<Vec<_>>())
        };
        let flags = if case.content.is_some() { END_HEADERS } else { WHOLE };
        let mut bytes = frame(HEADERS, flags, 1, &fields(&case.fields));
        if let Some(content) = &case.content {
            let last = if case.trailers.is_some() { 0 } else { END_STREAM };
            bytes.extend(frame(DATA, last, 1, content));
        }
        if let Some(trailers) = &case.trailers {
            bytes.extend(frame(HEADERS, WHOLE, 1, &fields(trailers)));
        }
        let mut user = User::connect(self.balancer.port);
        user.send(&bytes);
        user.end_of(1)
    }

    /// What is wrong with what became of it.
    fn judge(&self, case: &Case) -> Option<String> {
        let ended = self.play(case);
        // Whatever a request left behind in a connection to the backend would be the start of this one.
        let mut next = User::connect(self.balancer.port);
        assert_eq!(next.get(1, "/next"), Ended::Answered(200, b"ok".to_vec()), "{}", case.what);
        let (served, faults) = self.recorder.take();
        let (mut own, next): (Vec<_>, Vec<_>) =
            served.into_iter().partition(|(said, _)| said.target != "/next");
        let is_served = matches!(ended, Ended::Answered(200, _));
        let said = own.pop();
        let is_late = case.fate == Fate::Late && !is_served;
        let is_fate = match case.fate {
            Fate::Served | Fate::Shorn => is_served,
            Fate::Refused | Fate::Late => !is_served,
            Fate::Either => true,
        };
        let wrong = if !faults.is_empty() {
            "the backend heard what has no one meaning"
        } else if next.len() != 1 || !own.is_empty() || !is_late && is_served != said.is_some() {
            "the backend heard another number of requests"
        } else if !is_fate {
            "this should not have become of it"
        } else if is_late {
            return None;
        } else {
            return said.and_then(|(said, bytes)| differs(case, &said, &bytes));
        };
        Some(format!("{wrong}: {}: {ended:?}, {faults:?}, {said:?}", case.what))
    }
}

/// What the backend heard in another way than it was said.
fn differs(case: &Case, said: &Said, bytes: &[u8]) -> Option<String> {
    let first = |name: &[u8]| case.fields.iter().find(|it| it.0 == name).map(|it| &it.1[..]);
    let text = String::from_utf8_lossy(bytes).to_ascii_lowercase();
    let (head, rest) = text.split_once("\r\n\r\n").unwrap();
    let path = first(b":path").map(|path| match case.fate {
        Fate::Shorn => path.split(|byte| *byte == b'#').next().unwrap(),
        _ => path,
    });
    let is_same = first(b":method") == Some(said.method.as_bytes())
        && path == Some(said.target.as_bytes())
        && case.content.as_deref().unwrap_or_default() == said.body
        && head.matches("\r\nhost: ").count() == 1
        && !text.contains("\nx-smuggled")
        && !text.contains("\n:")
        && head.matches("\r\ncookie: ").count() <= 1;
    let trailers = case.trailers.iter().flatten();
    let mut forbidden =
        trailers.filter(|it| [&b"host"[..], b"content-length"].contains(&&it.0[..]));
    let is_clean = forbidden.all(|it| {
        let name = String::from_utf8_lossy(&it.0);
        !rest.contains(&*name)
    });
    (!is_same || !is_clean).then(|| format!("heard otherwise: {}: {text:?}", case.what))
}

/// Plays all of these, and says which went wrong.
fn all_hold(cases: impl IntoIterator<Item = Case>) {
    let stage = Stage::start();
    let wrong: Vec<_> = cases.into_iter().filter_map(|case| stage.judge(&case)).collect();
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn names_and_values_stay_in_their_fields() {
    all_hold(names().into_iter().chain(values()));
}

#[test]
fn pseudo_header_fields_stay_in_the_request_line() {
    all_hold(pseudo_values().into_iter().chain(pseudo_fields()));
}

#[test]
fn a_body_ends_where_its_stream_says() {
    all_hold(framings().into_iter().chain(connection_fields()));
}
