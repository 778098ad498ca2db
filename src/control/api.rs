//! What is said on a control connection, both ways: bytes in, requests or what was wrong with them out; replies in,
//! bytes out. Owns the words of the protocol and the bounds of what waits to be written. Pure: what a
//! request does is the hub's, when a hello is due is `health`'s.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::frame::{Framer, MESSAGE_BYTES_MAX, NO_OBJECT, Piece};
use crate::cluster::{Backend, Protocol, Standing, WEIGHT_MAX};

/// Bytes that may wait for a peer that does not read; beyond it the connection is closed.
pub const OUTBOX_BYTES_MAX: usize = 16 * MESSAGE_BYTES_MAX;
/// A name or an identity is at most this long.
pub const NAME_BYTES_MAX: usize = 64;
/// The longest drain that can be asked for: a day.
pub const DRAIN_MS_MAX: u64 = 86_400_000;
/// Backends in one answer to `list`. An entry is at most 260 bytes, and a message at most 4 KiB.
pub const LISTED_MAX: usize = 15;
/// Peers' words are repeated to them only so far.
const QUOTED_CHARS_MAX: usize = 40;

/// What a backend says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// The answer to our hello, `{"ack":"hello"}` or `{"cmd":"hello"}`.
    Hello,
    /// The answer to our challenge.
    Auth {
        id: Arc<str>,
        mac: String,
    },
    Register {
        protocol: Protocol,
        port: u16,
        weight: u16,
        name: Option<Arc<str>>,
    },
    Unregister {
        protocol: Protocol,
        port: u16,
    },
    Drain {
        protocol: Protocol,
        port: u16,
        deadline: Option<Duration>,
    },
    List,
}

/// Why something that a backend said was not understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadMessage {
    /// The sentence for the peer.
    pub msg: String,
    /// The command that it was about, if that much was clear.
    pub cmd: Option<&'static str>,
    /// Whether the connection can only be closed.
    pub fatal: bool,
}

/// What came in: a request, or why it was none.
pub type Incoming = Result<Request, BadMessage>;

/// One connection's reading side.
#[derive(Default)]
pub struct Inbox {
    framer: Framer,
}

impl Inbox {
    /// Takes bytes as they arrived and appends what they complete.
    pub fn push(&mut self, input: &[u8], into: &mut VecDeque<Incoming>) {
        self.framer.push(input, &mut |piece| match piece {
            Piece::Object(object) => into.extend(parse(object).transpose()),
            Piece::Broken(msg) => into.push_back(Err(BadMessage { msg, cmd: None, fatal: false })),
            Piece::Foreign => into.push_back(Err(BadMessage {
                msg: format!("{NO_OBJECT}; this is the control port"),
                cmd: None,
                fatal: true,
            })),
            Piece::TooLong => into.push_back(Err(BadMessage {
                msg: format!("a message is at most {MESSAGE_BYTES_MAX} bytes long"),
                cmd: None,
                fatal: true,
            })),
        });
    }
}

/// One object. `None` is an acknowledgement of something that needs none.
fn parse(object: &[u8]) -> Result<Option<Request>, BadMessage> {
    let fields: Fields = serde_json::from_slice(object).map_err(|error| BadMessage {
        msg: format!("not JSON as expected: {error}"),
        cmd: None,
        fatal: false,
    })?;
    let Some(cmd) = fields.get("cmd") else { return acknowledgement(&fields) };
    let Value::String(cmd) = cmd else { return Err(bad(None, "cmd must be a string")) };
    let known = ["hello", "auth", "register", "unregister", "drain", "list"];
    let Some(cmd) = known.into_iter().find(|known| known == cmd) else {
        return Err(bad(None, &format!("unknown cmd {}", quoted(cmd))));
    };
    request(cmd, &fields).map(Some).map_err(|msg| bad(Some(cmd), &msg))
}

fn bad(cmd: Option<&'static str>, msg: &str) -> BadMessage {
    BadMessage { msg: msg.to_owned(), cmd, fatal: false }
}

fn acknowledgement(fields: &Fields) -> Result<Option<Request>, BadMessage> {
    match fields.get("ack") {
        Some(Value::String(ack)) if ack == "hello" => Ok(Some(Request::Hello)),
        Some(_) => Ok(None),
        None => Err(bad(None, "cmd is missing")),
    }
}

fn request(cmd: &'static str, fields: &Fields) -> Result<Request, String> {
    Ok(match cmd {
        "hello" => Request::Hello,
        "auth" => Request::Auth {
            id: fields.name("id")?.ok_or("id is missing")?,
            mac: fields.text("mac")?.ok_or("mac is missing")?.to_owned(),
        },
        "register" => Request::Register {
            protocol: fields.protocol()?,
            port: fields.port()?,
            weight: fields.number("weight", 1, WEIGHT_MAX.into())?.map_or(1, |it| it as u16),
            name: fields.name("name")?,
        },
        "unregister" => Request::Unregister { protocol: fields.protocol()?, port: fields.port()? },
        "drain" => Request::Drain {
            protocol: fields.protocol()?,
            port: fields.port()?,
            deadline: fields.number("deadline_ms", 0, DRAIN_MS_MAX)?.map(Duration::from_millis),
        },
        _ => Request::List,
    })
}

/// The members of an object, of which no two may have the same name.
struct Fields(Vec<(String, Value)>);

impl Fields {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|field| field.0 == name).map(|field| &field.1)
    }

    fn text(&self, name: &str) -> Result<Option<&str>, String> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("{name} must be a string")),
        }
    }

    fn name(&self, field: &str) -> Result<Option<Arc<str>>, String> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        let fits = (1..=NAME_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|it| it.is_ascii_alphanumeric() || b"._:-".contains(&it));
        if !fits {
            return Err(format!(
                "{field} must be 1 to {NAME_BYTES_MAX} of letters, digits and . _ : -"
            ));
        }
        Ok(Some(text.into()))
    }

    fn number(&self, name: &str, least: u64, most: u64) -> Result<Option<u64>, String> {
        let value = match self.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        match value.as_u64().or_else(|| value.as_f64().and_then(whole)) {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(format!(
                "{name} must be a whole number from {least} to {most}, not {}",
                quoted(&value.to_string())
            )),
        }
    }

    fn port(&self) -> Result<u16, String> {
        let port = self.number("port", 1, u16::MAX.into())?.ok_or("port is missing")?;
        Ok(u16::try_from(port).expect("the range was checked"))
    }

    fn protocol(&self) -> Result<Protocol, String> {
        let name = self.text("protocol")?.ok_or("protocol is missing")?;
        Protocol::ALL
            .into_iter()
            .find(|known| known.name() == name)
            .ok_or_else(|| format!("unknown protocol {}: it is tcp, udp or api", quoted(name)))
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Fields, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Fields;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields(Vec::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if fields.get(&name).is_some() {
                        return Err(A::Error::custom(format!("{} twice", quoted(&name))));
                    }
                    fields.0.push((name, value));
                }
                Ok(fields)
            }
        }
        from.deserialize_map(Members)
    }
}

/// A whole number that was written with a point or an exponent, which in JSON makes no difference.
fn whole(number: f64) -> Option<u64> {
    // Every whole number up to 2^53 is itself as a float, and what lies beyond is out of every range.
    let exact = number.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&number);
    exact.then_some(number as u64)
}

/// A peer's own words for a message to it: short, and without anything that a terminal would obey.
fn quoted(words: &str) -> String {
    let mut shown: String = words
        .chars()
        .take(QUOTED_CHARS_MAX)
        .map(|it| if it.is_control() { '?' } else { it })
        .collect();
    if words.chars().nth(QUOTED_CHARS_MAX).is_some() {
        shown.push_str("...");
    }
    shown
}

/// What a message is about: which of a connection's backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct About {
    pub protocol: Protocol,
    pub port: u16,
}

impl About {
    pub fn of(protocol: Protocol, backend: &Backend) -> About {
        About { protocol, port: backend.address.port() }
    }
}

/// What the balancer says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    AskHello,
    AskAuth {
        nonce: String,
    },
    Authenticated,
    Registered {
        about: About,
        id: String,
        address: SocketAddr,
        weight: u16,
        /// How often hellos will come, so that the backend notices when they stop.
        interval: Duration,
    },
    /// Gets no new sessions; `left` still run.
    Unregistered {
        about: About,
        left: u64,
    },
    DrainStarted {
        about: About,
        left: u64,
    },
    Draining {
        about: About,
        left: u64,
    },
    Drained {
        about: About,
    },
    /// At most [`LISTED_MAX`] backends; `more` says that another such answer follows.
    Listed {
        backends: Vec<Listed>,
        more: bool,
    },
    Failed {
        msg: String,
        cmd: Option<&'static str>,
        about: Option<About>,
    },
}

/// A backend in the answer to `list`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Listed {
    pub id: String,
    pub protocol: Protocol,
    pub address: SocketAddr,
    pub weight: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub state: Standing,
    /// Registered over the connection that asks.
    pub own: bool,
    pub sessions: u64,
}

impl Listed {
    /// A backend as it is shown to a connection, its `own` or another's.
    pub fn of(protocol: Protocol, backend: &Backend, own: bool, sessions: u64) -> Listed {
        Listed {
            id: backend.id.to_string(),
            protocol,
            address: backend.address,
            weight: backend.weight,
            name: backend.name.as_deref().map(str::to_owned),
            state: backend.standing,
            own,
            sessions,
        }
    }
}

/// Every member that a message may have, in the order in which they are written.
#[derive(Serialize, Default)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    ack: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    msg: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmd: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nonce: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    v: Option<u32>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    about: Option<About>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backends: Option<&'a [Listed]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    more: Option<bool>,
}

impl Reply {
    fn line(&self) -> Line<'_> {
        let none = Line::default;
        let done = |cmd| Line { ack: Some("successful"), cmd: Some(cmd), ..none() };
        match self {
            Reply::AskHello => Line { cmd: Some("hello"), ..none() },
            Reply::AskAuth { nonce } => Line {
                cmd: Some("auth"),
                nonce: Some(nonce),
                v: Some(super::auth::VERSION),
                ..none()
            },
            Reply::Authenticated => done("auth"),
            Reply::Registered { about, id, address, weight, interval } => Line {
                about: Some(*about),
                id: Some(id),
                address: Some(*address),
                weight: Some(*weight),
                interval_ms: Some(u64::try_from(interval.as_millis()).unwrap_or(u64::MAX)),
                ..done("register")
            },
            Reply::Unregistered { about, left } => {
                Line { about: Some(*about), left: Some(*left), ..done("unregister") }
            }
            Reply::DrainStarted { about, left } => {
                Line { about: Some(*about), left: Some(*left), ..done("drain") }
            }
            Reply::Draining { about, left } => {
                Line { event: Some("draining"), left: Some(*left), about: Some(*about), ..none() }
            }
            Reply::Drained { about } => {
                Line { event: Some("drained"), about: Some(*about), ..none() }
            }
            Reply::Listed { backends, more } => {
                Line { backends: Some(backends), more: Some(*more), ..done("list") }
            }
            Reply::Failed { msg, cmd, about } => {
                Line { ack: Some("failed"), msg: Some(msg), cmd: *cmd, about: *about, ..none() }
            }
        }
    }
}

/// One connection's writing side: what waits until the peer reads.
#[derive(Default)]
pub struct Outbox {
    waiting: Vec<u8>,
}

/// More than [`OUTBOX_BYTES_MAX`] would wait: the peer does not read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overflow;

impl Outbox {
    /// Appends a message, one line.
    pub fn push(&mut self, reply: &Reply) -> Result<(), Overflow> {
        let before = self.waiting.len();
        serde_json::to_writer(&mut self.waiting, &reply.line())
            .expect("plain fields always have a JSON form, and memory takes every write");
        self.waiting.push(b'\n');
        if self.waiting.len() > OUTBOX_BYTES_MAX {
            self.waiting.truncate(before);
            return Err(Overflow);
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Everything that waits, to be written now.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(input: &str) -> Vec<Incoming> {
        let mut into = VecDeque::new();
        Inbox::default().push(input.as_bytes(), &mut into);
        into.into()
    }

    fn fault_of(input: &str) -> BadMessage {
        let mut all = heard(input);
        assert_eq!(all.len(), 1, "{input}: {all:?}");
        all.remove(0).expect_err(input)
    }

    fn said(reply: Reply) -> String {
        let mut outbox = Outbox::default();
        outbox.push(&reply).unwrap();
        let line = String::from_utf8(outbox.take()).unwrap();
        line.strip_suffix('\n').unwrap().to_owned()
    }

    #[test]
    fn every_command_is_understood_with_and_without_what_may_be_left_out() {
        let register = |weight, name: Option<&str>| Request::Register {
            protocol: Protocol::Tcp,
            port: 9991,
            weight,
            name: name.map(Into::into),
        };
        let drain = |deadline| Request::Drain { protocol: Protocol::Api, port: 80, deadline };
        let cases = [
            (r#"{"cmd": "register", "protocol": "tcp", "port": 9991}"#, register(1, None)),
            (
                r#"{"cmd":"register","protocol":"tcp","port":9991,"weight":256,"name":"a-b.c:1_"}"#,
                register(256, Some("a-b.c:1_")),
            ),
            (
                r#"{"port":9991,"later":{"x":[1]},"protocol":"tcp","cmd":"register","name":null}"#,
                register(1, None),
            ),
            (
                r#"{"cmd":"unregister","protocol":"udp","port":1}"#,
                Request::Unregister { protocol: Protocol::Udp, port: 1 },
            ),
            (
                r#"{"cmd":"drain","protocol":"api","port":80,"deadline_ms":1500}"#,
                drain(Some(Duration::from_millis(1500))),
            ),
            (r#"{"cmd":"drain","protocol":"api","port":80}"#, drain(None)),
            (r#"{"cmd":"list"}"#, Request::List),
            (r#"{"ack":"hello"}"#, Request::Hello),
            (r#"{"cmd":"hello"}"#, Request::Hello),
            (
                r#"{"cmd":"auth","id":"web-1","mac":"00ff"}"#,
                Request::Auth { id: "web-1".into(), mac: "00ff".into() },
            ),
        ];
        for (input, expected) in cases {
            assert_eq!(heard(input), [Ok(expected)], "{input}");
        }
        assert_eq!(heard(r#"{"ack":"successful"}{"ack":7}"#), [], "needs no answer");
    }

    #[test]
    fn a_whole_number_is_the_same_however_it_is_written() {
        for port in ["9002", "9002.0", "9002.000", "9.002e3", "9002E0", "900200e-2", "0.9002e+4"] {
            let input = format!(r#"{{"cmd":"unregister","protocol":"udp","port":{port}}}"#);
            let expected = Request::Unregister { protocol: Protocol::Udp, port: 9002 };
            assert_eq!(heard(&input), [Ok(expected)], "{port}");
        }
        for (deadline, ms) in [("0.0", 0), ("-0.0", 0), ("-0", 0), ("8.64e7", DRAIN_MS_MAX)] {
            let input =
                format!(r#"{{"cmd":"drain","protocol":"api","port":80,"deadline_ms":{deadline}}}"#);
            let deadline = Some(Duration::from_millis(ms));
            let expected = Request::Drain { protocol: Protocol::Api, port: 80, deadline };
            assert_eq!(heard(&input), [Ok(expected)], "{input}");
        }
    }

    #[test]
    fn every_fault_is_named() {
        let cases = [
            (r#"{"cmd":"register","protocol":"tcp","port":0}"#, "from 1 to 65535, not 0"),
            (r#"{"cmd":"register","protocol":"tcp","port":70000}"#, "not 70000"),
            (r#"{"cmd":"register","protocol":"tcp","port":-1}"#, "not -1"),
            (r#"{"cmd":"register","protocol":"tcp","port":80.5}"#, "not 80.5"),
            (r#"{"cmd":"register","protocol":"tcp","port":"80"}"#, "whole number"),
            (r#"{"cmd":"register","protocol":"tcp"}"#, "port is missing"),
            (r#"{"cmd":"register","port":80}"#, "protocol is missing"),
            (r#"{"cmd":"register","protocol":"sctp","port":80}"#, "unknown protocol sctp"),
            (r#"{"cmd":"register","protocol":7,"port":80}"#, "protocol must be a string"),
            (r#"{"cmd":"register","protocol":"tcp","port":80,"weight":0}"#, "weight"),
            (r#"{"cmd":"register","protocol":"tcp","port":80,"weight":257}"#, "1 to 256"),
            (r#"{"cmd":"register","protocol":"tcp","port":80,"name":""}"#, "name must be"),
            (r#"{"cmd":"register","protocol":"tcp","port":80,"name":"a b"}"#, "name must be"),
            (r#"{"cmd":"drain","protocol":"tcp","port":80,"deadline_ms":1e99}"#, "deadline_ms"),
            (r#"{"cmd":"auth","id":"a"}"#, "mac is missing"),
            (r#"{"cmd":"fly"}"#, "unknown cmd fly"),
            (r#"{"cmd":7}"#, "cmd must be a string"),
            (r#"{"cmd":"list","cmd":"list"}"#, "cmd twice"),
            (r#"{"cmd":"list","x":1,"x":2}"#, "x twice"),
            ("{}", "cmd is missing"),
            ("{cmd}", "not JSON"),
            ("[]\n", "JSON object"),
            (r#"{"cmd":"register","protocol":"tcp","port":9002.5}"#, "not 9002.5"),
            (r#"{"cmd":"register","protocol":"tcp","port":-0.0}"#, "from 1 to 65535, not -0.0"),
            (r#"{"cmd":"register","protocol":"tcp","port":65536.0}"#, "not 65536.0"),
            (r#"{"cmd":"register","protocol":"tcp","port":1e300}"#, "not 1e+300"),
            (r#"{"cmd":"register","protocol":"tcp","port":1e400}"#, "out of range"),
            (r#"{"cmd":"register","protocol":"tcp","port":9002e-4}"#, "not 0.9002"),
            (
                r#"{"cmd":"drain","protocol":"tcp","port":8,"deadline_ms":18446744073709551617}"#,
                "not",
            ),
        ];
        for (input, words) in cases {
            let fault = fault_of(input);
            assert!(fault.msg.contains(words), "{input}: {}", fault.msg);
            assert!(!fault.fatal, "{input}");
        }
        assert_eq!(fault_of(cases[0].0).cmd, Some("register"));
        assert!(heard(&"[".repeat(10_000)).pop().unwrap().unwrap_err().fatal);
        let foreign = fault_of("POST / HTTP/1.1\r\n\r\n{\"cmd\":\"list\"}");
        assert!(foreign.fatal && foreign.msg.contains("JSON object"), "{foreign:?}");
    }

    #[test]
    fn a_peers_words_come_back_short_and_tame() {
        let fault = fault_of(&format!(r#"{{"cmd":"\u001b[2J{}"}}"#, "x".repeat(500)));
        assert!(fault.msg.len() < 80, "{}", fault.msg);
        assert!(!fault.msg.chars().any(char::is_control), "{:?}", fault.msg);
    }

    #[test]
    fn messages_stand_on_the_wire_as_documented() {
        let about = About { protocol: Protocol::Tcp, port: 9991 };
        let cases = [
            (Reply::AskHello, r#"{"cmd":"hello"}"#),
            (Reply::AskAuth { nonce: "ab".into() }, r#"{"cmd":"auth","nonce":"ab","v":1}"#),
            (Reply::Authenticated, r#"{"ack":"successful","cmd":"auth"}"#),
            (
                Reply::Registered {
                    about,
                    id: "b3".into(),
                    address: "10.0.0.5:9991".parse().unwrap(),
                    weight: 2,
                    interval: Duration::from_secs(5),
                },
                concat!(
                    r#"{"ack":"successful","cmd":"register","protocol":"tcp","port":9991,"#,
                    r#""id":"b3","address":"10.0.0.5:9991","weight":2,"interval_ms":5000}"#
                ),
            ),
            (
                Reply::Draining { about, left: 4 },
                r#"{"event":"draining","left":4,"protocol":"tcp","port":9991}"#,
            ),
            (Reply::Drained { about }, r#"{"event":"drained","protocol":"tcp","port":9991}"#),
            (
                Reply::Failed { msg: "no".into(), cmd: None, about: None },
                r#"{"ack":"failed","msg":"no"}"#,
            ),
            (
                Reply::Listed { backends: Vec::new(), more: false },
                r#"{"ack":"successful","cmd":"list","backends":[],"more":false}"#,
            ),
        ];
        for (reply, expected) in cases {
            assert_eq!(said(reply), expected);
        }
    }

    #[test]
    fn the_longest_list_is_a_message_like_any_other() {
        let longest = Listed {
            id: format!("b{}", u32::MAX),
            protocol: Protocol::Tcp,
            address: "[2001:db80:1111:2222:3333:4444:5555:6666%4294967295]:65535".parse().unwrap(),
            weight: WEIGHT_MAX,
            name: Some("n".repeat(NAME_BYTES_MAX)),
            state: Standing::Draining,
            own: false,
            sessions: u64::MAX,
        };
        let line = said(Reply::Listed { backends: vec![longest; LISTED_MAX], more: false });
        assert!(line.len() < MESSAGE_BYTES_MAX, "{}", line.len());
    }

    #[test]
    fn what_waits_for_a_peer_that_never_reads_is_bounded() {
        let mut outbox = Outbox::default();
        let pushed = (0..100_000).take_while(|_| outbox.push(&Reply::AskHello).is_ok()).count();
        assert_eq!(pushed, OUTBOX_BYTES_MAX / "{\"cmd\":\"hello\"}\n".len());
        assert!(outbox.len() <= OUTBOX_BYTES_MAX);
        assert!(!outbox.take().is_empty() && outbox.is_empty());
        assert_eq!(outbox.push(&Reply::AskHello), Ok(()));
    }

    #[test]
    fn noise_of_any_kind_is_a_fault_and_never_a_panic() {
        let mut state = 9u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        let sound = br#"{"cmd":"register","protocol":"tcp","port":9991,"weight":3,"name":"x"}"#;
        for _ in 0..3_000 {
            let mut bytes = sound.to_vec();
            for _ in 0..1 + next() % 4 {
                let at = usize::from(next()) % bytes.len();
                bytes[at] = next();
            }
            let mut whole = VecDeque::new();
            Inbox::default().push(&bytes, &mut whole);
            let (mut inbox, mut in_portions) = (Inbox::default(), VecDeque::new());
            for portion in bytes.chunks(1 + usize::from(next() % 9)) {
                inbox.push(portion, &mut in_portions);
            }
            assert_eq!(whole, in_portions, "{:?}", String::from_utf8_lossy(&bytes));
        }
    }
}
