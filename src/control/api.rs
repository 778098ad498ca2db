//! The messages on a control connection. Inbound, it turns bytes into requests, or into the reason why
//! they are none; outbound, replies into bytes. Owns the vocabulary of the protocol and the bound on
//! what is queued for a peer. Pure: what a request does is up to the hub, when a hello is due up to
//! `health`.

mod fields;
mod lists;
mod outbox;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use fields::{Fields, quoted, unknown};

use super::frame::{Framer, MESSAGE_BYTES_MAX, NO_OBJECT, Piece};
/// Longest name or identity, in bytes.
pub use crate::cluster::backend::NAME_BYTES_MAX;
use crate::cluster::registry::{DrainedBy, Lasts};
use crate::cluster::{AskedCheck, Protocol, Service};
pub use lists::{Listed, ServiceLine};
pub use outbox::Outbox;

/// Bytes queued for a peer that does not read; beyond this the connection is closed.
pub const OUTBOX_BYTES_MAX: usize = 16 * MESSAGE_BYTES_MAX;
/// The longest drain a backend can request: a day.
pub const DRAIN_MS_MAX: u64 = 86_400_000;
/// Most backends in one answer to `list`, fewer beside a warning: an entry takes up to this many bytes, and a
/// message up to 4 KiB.
pub const LISTED_MAX: usize = 9;
pub const LISTED_BYTES: usize = 410;
/// What the services in one answer to `services` may take, by their [`ServiceLine::bytes_max`], with a warning.
pub const SERVICES_BYTES_MAX: usize = MESSAGE_BYTES_MAX - 128;
/// Most doors of one service that are listed: each takes up to 61 bytes.
pub const DOORS_LISTED_MAX: usize = 32;
/// How much of a peer's own text is quoted back to it.
const QUOTED_CHARS_MAX: usize = 40;

/// A message from a backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// The answer to our hello, `{"ack":"hello"}` or `{"cmd":"hello"}`.
    Hello,
    /// The answer to our challenge.
    Auth {
        id: Arc<str>,
        mac: String,
    },
    Register(Joining),
    Unregister {
        target: Target,
        port: u16,
    },
    Drain {
        target: Target,
        port: u16,
        lasts: Lasts,
    },
    /// Takes back such a request.
    Undrain {
        target: Target,
        port: u16,
    },
    /// The backends of one service, or of all.
    List {
        target: Option<Target>,
    },
    Services,
}

/// What a backend registers with. What is `None` was not said: it stays as it was, or is as by default.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Joining {
    pub target: Target,
    pub port: u16,
    pub weight: Option<u16>,
    pub name: Option<Arc<str>>,
    pub group: Option<Arc<str>>,
    /// Whether each connection is to begin with a PROXY header, of version 2.
    pub proxy: Option<bool>,
    /// Whether it speaks HTTP/2, rather than HTTP/1.1.
    pub http2: Option<bool>,
    /// Whether it is reached by TLS, and the host that its certificate must be for.
    pub tls: Option<bool>,
    pub tls_name: Option<Arc<str>>,
    /// Whether the port may be tried by a connection without a user.
    pub probe: Option<bool>,
    /// How it wants to be checked; `Some(None)`: not at all.
    pub check: Option<Option<AskedCheck>>,
}

impl Request {
    /// Whether it answers a challenge, rightly or not.
    pub const fn is_proof(&self) -> bool {
        matches!(self, Request::Auth { .. })
    }
}

/// Which service a message is about, in its own words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// It names only a protocol, and so means that protocol's built-in service.
    BuiltIn(Protocol),
    /// It names the service, and may name the protocol it believes the service to have.
    Named { service: Arc<str>, protocol: Option<Protocol> },
}

impl Target {
    /// A backend of it in an answer, as far as the message itself tells.
    pub fn about(&self, port: Option<u16>) -> About {
        match self {
            Target::BuiltIn(protocol) => {
                About { service: protocol.name().into(), protocol: Some(*protocol), port }
            }
            Target::Named { service, protocol } => {
                About { service: Arc::clone(service), protocol: *protocol, port }
            }
        }
    }
}

/// Why a backend's message was not understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadMessage {
    /// The sentence for the peer.
    pub msg: String,
    /// The command it was about, if that much was clear.
    pub cmd: Option<&'static str>,
    /// The service it named, likewise.
    pub service: Option<Arc<str>>,
    /// Whether the connection has to be closed.
    pub fatal: bool,
}

/// A message received: a request, or why it is not one.
pub type Incoming = Result<Request, BadMessage>;

/// The same, and what its answer is to warn of: members that mean nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heard {
    pub what: Incoming,
    pub warning: Option<String>,
    /// The object itself, from which the rest can be read again; empty if there was none.
    pub said: Box<[u8]>,
}

impl From<BadMessage> for Heard {
    fn from(bad: BadMessage) -> Heard {
        Heard { what: Err(bad), warning: None, said: Box::default() }
    }
}

/// One connection's reading side.
#[derive(Default)]
pub struct Inbox {
    framer: Framer,
}

impl Inbox {
    /// Where the next object stands, in the form for a successor.
    pub fn describe(&self) -> Framer {
        self.framer.clone()
    }

    /// `None`: no object can stand there.
    pub fn inherit(framer: Framer) -> Option<Inbox> {
        framer.is_possible().then_some(Inbox { framer })
    }

    /// Takes bytes as they arrive and appends the messages they complete.
    pub fn push(&mut self, input: &[u8], into: &mut VecDeque<Heard>) {
        self.framer.push(input, &mut |piece| match piece {
            Piece::Object(object) => into.extend(read(object)),
            Piece::Broken(msg) => into.push_back(bad(None, &msg).into()),
            Piece::Foreign => {
                into.push_back(fatal(&format!("{NO_OBJECT}; this is the control port")).into());
            }
            Piece::TooLong => {
                let msg = format!("a message is at most {MESSAGE_BYTES_MAX} bytes long");
                into.push_back(fatal(&msg).into());
            }
        });
    }
}

const COMMANDS: [&str; 8] =
    ["hello", "auth", "register", "unregister", "drain", "undrain", "list", "services"];

/// Reads one object. `None` is an acknowledgement that nothing waits for.
pub fn read(object: &[u8]) -> Option<Heard> {
    parse(object).map(|heard| Heard { said: object.into(), ..heard })
}

fn parse(object: &[u8]) -> Option<Heard> {
    let fields: Fields = match serde_json::from_slice(object) {
        Ok(fields) => fields,
        Err(error) => return Some(bad(None, &format!("not JSON as expected: {error}")).into()),
    };
    let cmd = match fields.get("cmd") {
        None => None,
        Some(Value::String(cmd)) => match COMMANDS.into_iter().find(|known| known == cmd) {
            Some(cmd) => Some(cmd),
            None => {
                let near = fields::nearest(cmd, &COMMANDS);
                let near = near.map_or(String::new(), |near| format!(": perhaps {near}"));
                return Some(bad(None, &format!("unknown cmd {}{near}", quoted(cmd))).into());
            }
        },
        Some(_) => return Some(bad(None, "cmd must be a string").into()),
    };
    let what = match cmd {
        None => fields::acknowledgement(&fields).transpose()?,
        Some(cmd) => fields::request(cmd, &fields).map_err(|msg| BadMessage {
            service: fields.name("service").ok().flatten(),
            ..bad(Some(cmd), &msg)
        }),
    };
    Some(Heard { what, warning: unknown(cmd, &fields), said: Box::default() })
}

/// What came was no message, for this reason; `is_fatal`: nothing more is read.
pub fn no_message(msg: &str, is_fatal: bool) -> Heard {
    BadMessage { fatal: is_fatal, ..bad(None, msg) }.into()
}

fn fatal(msg: &str) -> BadMessage {
    BadMessage { fatal: true, ..bad(None, msg) }
}

fn bad(cmd: Option<&'static str>, msg: &str) -> BadMessage {
    BadMessage { msg: msg.to_owned(), cmd, service: None, fatal: false }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Which of a connection's backends a message is about. What is not known, because the message that is
/// answered did not say so, is left out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// The service's name.
    pub service: Arc<str>,
    pub protocol: Option<Protocol>,
    pub port: Option<u16>,
}

impl About {
    /// The backend of a service at this port.
    pub fn of(service: &Service, port: u16) -> About {
        About { service: Arc::clone(&service.name), protocol: Some(service.kind), port: Some(port) }
    }
}

/// A message from the balancer.
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
        /// How often hellos are sent, so that the backend notices when they stop.
        interval: Duration,
        /// The check that it has asked for and is given.
        check: Option<AskedCheck>,
        /// Where the other balancers of the cluster take registrations.
        nodes: Vec<String>,
    },
    /// It gets no new sessions; `left` are still running.
    Unregistered {
        about: About,
        left: u64,
    },
    DrainStarted {
        about: About,
        left: u64,
    },
    UndrainDone {
        about: About,
        left: u64,
    },
    /// Something has happened to the backend.
    Happened(About, Event),
    /// At most [`LISTED_MAX`] backends; with `more`, another answer follows.
    Listed {
        /// The service that was asked for.
        service: Option<Arc<str>>,
        backends: Vec<Listed>,
        more: bool,
    },
    /// As many as [`SERVICES_BYTES_MAX`] lets in; with `more`, another answer follows.
    Services {
        services: Vec<ServiceLine>,
        more: bool,
    },
    Failed {
        msg: String,
        cmd: Option<&'static str>,
        about: Option<About>,
        /// Whether proving a secret, or another one, would have helped.
        needs_secret: bool,
    },
    /// An answer with something that the peer should know about its message.
    Warned {
        answer: Box<Reply>,
        warning: String,
    },
}

/// What a backend is told without having asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// It drains, and `left` sessions are still running.
    Draining { left: u64 },
    /// An operator drains it, or gives its drain another deadline: so long may the sessions that are `left`
    /// go on; `None`: as long as they like.
    DrainedByOperator { left: u64, deadline: Option<Duration> },
    /// An operator has taken that back.
    Undrained,
    /// An operator has given it another weight.
    Weighed { weight: u16 },
    /// An operator has ended so many of its sessions.
    Ended { sessions: u64 },
    /// Its service has been removed; it drains.
    Removed,
    /// No session is left. `cut` of them were ended at the deadline.
    Drained { cut: u64 },
}

impl Event {
    fn message(self) -> Message<'static> {
        let event = |event| Message { event: Some(event), ..Message::default() };
        let by = Some(DrainedBy::Operator.name());
        match self {
            Event::Draining { left } => Message { left: Some(left), ..event("draining") },
            Event::DrainedByOperator { left, deadline } => {
                let deadline_ms = Some(deadline.map(ms));
                Message { by, deadline_ms, left: Some(left), ..event("draining") }
            }
            Event::Undrained => Message { by, ..event("undrained") },
            Event::Weighed { weight } => Message { by, weight: Some(weight), ..event("weight") },
            Event::Ended { sessions } => Message { by, sessions: Some(sessions), ..event("ended") },
            Event::Removed => event("removed"),
            Event::Drained { cut } => {
                Message { cut: Some(cut).filter(|cut| *cut > 0), ..event("drained") }
            }
        }
    }
}

/// Every member a message can have, in the order they are written.
#[derive(Serialize, Default)]
struct Message<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    ack: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    msg: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
    /// `null` for no deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline_ms: Option<Option<u64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cut: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sessions: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmd: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nonce: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    v: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<Protocol>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backends: Option<&'a [Listed]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    services: Option<&'a [ServiceLine]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    more: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    needs: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<&'a str>,
}

impl<'a> Message<'a> {
    /// The message about this backend.
    fn about(self, about: &'a About) -> Message<'a> {
        let About { service, protocol, port } = about;
        Message { service: Some(service), protocol: *protocol, port: *port, ..self }
    }
}

impl Reply {
    fn message(&self) -> Message<'_> {
        let none = Message::default;
        let done = |cmd| Message { ack: Some("successful"), cmd: Some(cmd), ..none() };
        match self {
            Reply::AskHello => Message { cmd: Some("hello"), ..none() },
            Reply::AskAuth { nonce } => Message {
                cmd: Some("auth"),
                nonce: Some(nonce),
                v: Some(super::auth::VERSION),
                ..none()
            },
            Reply::Authenticated => done("auth"),
            Reply::Registered { about, id, address, weight, interval, check, nodes } => Message {
                nodes: (!nodes.is_empty()).then_some(nodes),
                check: check.as_ref().map(AskedCheck::to_string),
                id: Some(id),
                address: Some(*address),
                weight: Some(*weight),
                interval_ms: Some(ms(*interval)),
                ..done("register").about(about)
            },
            Reply::Unregistered { about, left } => {
                Message { left: Some(*left), ..done("unregister").about(about) }
            }
            Reply::DrainStarted { about, left } => {
                Message { left: Some(*left), ..done("drain").about(about) }
            }
            Reply::UndrainDone { about, left } => {
                Message { left: Some(*left), ..done("undrain").about(about) }
            }
            Reply::Happened(about, event) => event.message().about(about),
            Reply::Listed { service, backends, more } => Message {
                service: service.as_deref(),
                backends: Some(backends),
                more: Some(*more),
                ..done("list")
            },
            Reply::Services { services, more } => {
                Message { services: Some(services), more: Some(*more), ..done("services") }
            }
            Reply::Warned { answer, warning } => {
                Message { warning: Some(warning), ..answer.message() }
            }
            Reply::Failed { msg, cmd, about, needs_secret } => {
                let needs = needs_secret.then_some("secret");
                let failed = Message { ack: Some("failed"), msg: Some(msg), cmd: *cmd, ..none() };
                let failed = Message { needs, ..failed };
                match about {
                    Some(about) => failed.about(about),
                    None => failed,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
