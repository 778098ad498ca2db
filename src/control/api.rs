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
mod tests;
