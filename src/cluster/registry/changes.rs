//! Changes to the set of backends, as values: what is asked for, what came of it, and why not. Owns their
//! sentences; what they mean is up to the registry.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Registered;
use crate::cluster::backend::{AskedCheck, BackendId, ServiceId, WEIGHT_MAX};
use crate::cluster::groups::Group;
use crate::cluster::source::Source;
use crate::tls::backends::BackendTls;

/// What a backend asks for when it joins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    pub source: Source,
    pub service: ServiceId,
    /// Canonical: an IPv4 address is never written as a mapped IPv6 one.
    pub address: SocketAddr,
    /// 1 to [`WEIGHT_MAX`].
    pub weight: u16,
    pub name: Option<Arc<str>>,
    /// One of the service's groups if it has any, else none.
    pub group: Option<Arc<str>>,
    /// Whether each connection to it begins with a PROXY header.
    pub proxy: bool,
    /// Whether it speaks HTTP/2, rather than HTTP/1.1.
    pub http2: bool,
    /// How it is verified, if it is reached by TLS.
    pub tls: Option<BackendTls>,
    /// Whether it may be tried by a connection that is closed again at once.
    pub probe: bool,
    /// How it wants to be checked. Where the service has a check of its own, that goes first.
    pub check: Option<AskedCheck>,
}

/// How long the sessions of a backend that drains may go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lasts {
    /// As long as the settings say; for the operator of a backend that drains already, as long as it was
    /// given before.
    AsSet,
    For(Duration),
    /// Until they end by themselves.
    Never,
}

/// Whose request a drain is, which is also who may take it back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DrainedBy {
    /// The source of the backend, which then leaves.
    Owner,
    Operator,
}

impl DrainedBy {
    /// The word in JSON and in the log.
    pub const fn name(self) -> &'static str {
        match self {
            DrainedBy::Owner => "owner",
            DrainedBy::Operator => "operator",
        }
    }
}

/// Something that happened to the backends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Joins. Repeated by the same source, changes weight, name, group, PROXY header and whether it may be
    /// tried, ends a drain that the source had asked for, and brings back a backend that was set aside: the
    /// caller has just connected to it, or may not.
    Register(Registration),
    /// Other balancers say that it is registered at them, for how many of them this is said once. They are one
    /// source ([`Source::Cluster`]); a backend that has one of its own here keeps that, and is what the newest word
    /// of all makes it.
    Claim {
        wanted: Registration,
        /// Who has asked for its drain at one of them.
        drains: Option<DrainedBy>,
    },
    /// None of them says so any more; `why` is for the log.
    Unclaim { service: ServiceId, address: SocketAddr, is_lost: bool, why: &'static str },
    /// Leaves, at its source's request.
    Unregister { source: Source, service: ServiceId, address: SocketAddr },
    /// Gets no new sessions, at its source's request, and leaves once its present ones have ended or
    /// been ended.
    Drain { source: Source, service: ServiceId, address: SocketAddr, lasts: Lasts },
    /// The source takes back such a request.
    Undrain { source: Source, service: ServiceId, address: SocketAddr },
    /// Leaves because its drain is over.
    Leave { backend: BackendId },
    /// The source is lost, and all of its backends with it.
    SourceLost { source: Source, why: &'static str },
    /// Its data port refused.
    SetAside { backend: BackendId },
    /// Its data port can be connected to again.
    Restore { backend: BackendId },
    /// Its check passes, or fails.
    Judge { backend: BackendId, passes: bool },
    /// Gets no new sessions, at the operator's request, whichever source the backend belongs to. It stays
    /// registered when its sessions have ended, so that the operator can take the request back. Of one that
    /// drains already, changes when its sessions are ended.
    DrainBackend { backend: BackendId, lasts: Lasts },
    /// The operator takes back such a request.
    UndrainBackend { backend: BackendId },
    /// Gets a different share of the new sessions, at the operator's request.
    Weigh { backend: BackendId, weight: u16 },
}

/// The outcome of a change.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// The backend that was registered, found or changed.
    pub backend: Option<BackendId>,
    /// Whether that backend has only just joined.
    pub joined: bool,
    /// Backends that are no longer registered. Their places stay taken until
    /// [`Registry::sessions_ended`].
    pub left: Vec<Registered>,
    /// Backends that their source is done with, and that go on as those of other balancers.
    pub kept: Vec<BackendId>,
    /// Whether workers would see a difference, and so whether a [`Registry::freeze`] is due.
    pub changed: bool,
}

/// Why a change was refused. The sentence is for whoever requested it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    OwnedByAnother {
        service: Arc<str>,
        address: SocketAddr,
        by: Source,
    },
    NotRegistered {
        service: Arc<str>,
        address: SocketAddr,
        by: Source,
    },
    /// Asked for by its id.
    Unknown {
        backend: BackendId,
    },
    /// A drain is taken back by whoever did not ask for it.
    Drains {
        backend: BackendId,
        by: DrainedBy,
    },
    WeightOutOfRange,
    /// It is registered already, and reached otherwise.
    TlsChanges {
        address: SocketAddr,
    },
    /// It is registered already, and speaks another HTTP.
    HttpChanges {
        address: SocketAddr,
    },
    /// The service has been removed.
    Removed,
    /// It named no group, or none of the service.
    Group {
        service: Arc<str>,
        asked: Option<Arc<str>>,
        /// The groups of the service.
        groups: Arc<[Group]>,
    },
    Full {
        places: usize,
    },
    /// The service has as many backends as it may.
    Enough {
        service: Arc<str>,
        backends: u32,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::OwnedByAnother { service, address, by } => {
                write!(out, "{service} {address} is registered {}", by.other_way())
            }
            Fault::NotRegistered { service, address, by } => {
                write!(out, "{service} {address} is not registered {}", by.own_way())
            }
            Fault::Unknown { backend } => write!(out, "no backend {backend} is registered"),
            Fault::Drains { backend, by: DrainedBy::Owner } => write!(
                out,
                "{backend} drains because it asked to, and only it can take that back: it has to undrain \
                 or register again"
            ),
            Fault::Drains { backend, by: DrainedBy::Operator } => {
                write!(out, "an operator drains {backend}, and only an operator can undrain it")
            }
            Fault::Removed => write!(out, "the service has been removed"),
            Fault::TlsChanges { address } => write!(
                out,
                "{address} is registered with another tls or tls_name, which cannot change: unregister it \
                 first"
            ),
            Fault::HttpChanges { address } => {
                write!(
                    out,
                    "{address} is registered with another http, which cannot change: unregister it first"
                )
            }
            Fault::WeightOutOfRange => write!(out, "weight must be from 1 to {WEIGHT_MAX}"),
            Fault::Enough { service, backends } => {
                write!(out, "service {service} takes {backends} backends at most, and has them")
            }
            Fault::Group { service, asked, groups } => {
                let names: Vec<&str> = groups.iter().map(|group| &*group.name).collect();
                let names = names.join(", ");
                match asked {
                    Some(asked) if groups.is_empty() => {
                        write!(out, "service {service} has no groups, so leave out group {asked}")
                    }
                    Some(asked) => {
                        write!(
                            out,
                            "service {service} has no group {asked}; its groups are {names}"
                        )
                    }
                    None => {
                        write!(out, "service {service} has groups, so name one of them: {names}")
                    }
                }
            }
            Fault::Full { places } => {
                write!(out, "all {places} places for backends are taken, try again later")
            }
        }
    }
}
