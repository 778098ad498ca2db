//! A backend as everyone sees it: its id, service, address and standing. Owns these types and the
//! names of the protocols, and no decision.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::tls::backends::BackendTls;

/// The three kinds of user, and so of service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Api,
}

impl Protocol {
    pub const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Api];

    /// The name on the control port, in the status and in metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Api => "api",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// Longest name of a backend or a group that a backend gives, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Whether a backend may go by this name, or name a group so: letters, digits and any of `.`, `_`, `:` and `-`.
pub fn is_name(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(letter)
}

/// One service for as long as it has sessions: the same in every snapshot, and given to another service
/// only long after this one has gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceId(pub u16);

impl ServiceId {
    /// No service has this number: whoever comes to a door of it is turned away.
    pub const NOBODY: ServiceId = ServiceId(u16::MAX - 1);

    /// The built-in service of a protocol: it serves the users of that protocol's door, and a message
    /// that names only the protocol means it.
    pub const fn built_in(protocol: Protocol) -> ServiceId {
        match protocol {
            Protocol::Tcp => ServiceId(0),
            Protocol::Udp => ServiceId(1),
            Protocol::Api => ServiceId(2),
        }
    }

    /// Whether this is the built-in service of some protocol.
    pub fn is_built_in(self) -> bool {
        Protocol::ALL.into_iter().any(|protocol| ServiceId::built_in(protocol) == self)
    }
}

/// A users' door: its place at every worker. Another door gets the place only after this one has closed at
/// all of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DoorId(pub u16);

/// A door that a user has come in by, and the service that the user was admitted for there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Doorway {
    pub door: DoorId,
    pub service: ServiceId,
    /// Users speak TLS here, whatever their service says.
    pub is_tls: bool,
}

/// One registration. Never used again in the life of a process, so a late report about a backend
/// that left cannot be taken for one about its successor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct BackendId(pub u32);

impl fmt::Display for BackendId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "b{}", self.0)
    }
}

/// Whether new sessions may go to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// In the rotation.
    Serving,
    /// Registered and answering hello, but its data port refused, or it leaves requests unanswered: out of
    /// the rotation until the balancer has found it back.
    Aside,
    /// Its check fails, or has yet to pass for the first time: out of the rotation until it passes.
    Failing,
    /// Keeps its sessions and gets no new ones.
    Draining,
}

/// A backend as it stood when its pool was frozen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backend {
    pub id: BackendId,
    /// Its place in the workers' counters (`metrics::BACKENDS_MAX` places); reused only after the
    /// backend has left and its sessions have ended.
    pub slot: u16,
    pub service: ServiceId,
    /// The address of the control connection's peer with the port that was registered.
    pub address: SocketAddr,
    /// Share of new sessions relative to the others, 1 to [`WEIGHT_MAX`].
    pub weight: u16,
    pub name: Option<Arc<str>>,
    /// The group of its service that it has joined.
    pub group: Option<Arc<str>>,
    /// Whether each connection to it begins with a PROXY header.
    pub proxy: bool,
    /// Whether it speaks HTTP/2, rather than HTTP/1.1.
    pub http2: bool,
    /// How it is verified, if it is reached by TLS.
    pub tls: Option<BackendTls>,
    pub standing: Standing,
}

/// The longest path that a backend may ask to be checked at, in bytes.
const PATH_BYTES_MAX: usize = 256;

/// The longest name of a service that is asked about in a health check of gRPC, in bytes.
const GRPC_SERVICE_BYTES_MAX: usize = 255;

/// Whether a service of gRPC may be asked about by this name. It is any text there; here it is also shown and quoted.
pub fn is_grpc_service(name: &str) -> bool {
    name.len() <= GRPC_SERVICE_BYTES_MAX
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\'))
}

/// A check that a backend asks for itself, on the port that it registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AskedCheck {
    /// A connection is accepted.
    Tcp,
    /// A request for this path is answered well.
    Http(Arc<str>),
    /// The health call of gRPC is answered well for this service or, if it is empty, for the server.
    Grpc(Arc<str>),
}

impl fmt::Display for AskedCheck {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AskedCheck::Tcp => out.write_str("tcp"),
            AskedCheck::Http(path) => write!(out, "http:{path}"),
            AskedCheck::Grpc(service) if service.is_empty() => out.write_str("grpc"),
            AskedCheck::Grpc(service) => write!(out, "grpc:{service}"),
        }
    }
}

impl FromStr for AskedCheck {
    type Err = String;

    fn from_str(text: &str) -> Result<AskedCheck, String> {
        if text == "tcp" {
            return Ok(AskedCheck::Tcp);
        }
        if text == "grpc" {
            return Ok(AskedCheck::Grpc("".into()));
        }
        if let Some(service) = text.strip_prefix("grpc:").filter(|it| !it.is_empty()) {
            return match is_grpc_service(service) {
                true => Ok(AskedCheck::Grpc(service.into())),
                false => Err(format!(
                    "the service is up to {GRPC_SERVICE_BYTES_MAX} visible ASCII characters without \" \
                     and \\"
                )),
            };
        }
        let path = text.strip_prefix("http:").filter(|path| path.starts_with('/'));
        // It goes into a request line as it is.
        let fits = |path: &&str| {
            path.len() <= PATH_BYTES_MAX
                && path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#')
        };
        match path {
            None => Err("write tcp, http: and a path, such as http:/healthz, or grpc, which a \
                         service may follow, such as grpc:shop.Orders"
                .to_owned()),
            Some(path) => match Some(path).filter(fits) {
                Some(path) => Ok(AskedCheck::Http(path.into())),
                None => Err(format!(
                    "the path is up to {PATH_BYTES_MAX} visible ASCII characters without #"
                )),
            },
        }
    }
}

/// The largest weight that a backend may ask for.
pub const WEIGHT_MAX: u16 = 256;
