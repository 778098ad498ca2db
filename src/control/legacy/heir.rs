//! A control core that goes on with what another has left. Owns the order in which that is taken up: everything
//! that can go wrong comes first and touches no socket, and only then do connections and doors go on.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use socket2::Socket;
use tokio::sync::Notify;
use tokio_uring::Runtime;

use super::Legacy;
use super::format;
use crate::base::time::Now;
use crate::cluster::source::Source;
use crate::control::conversation::Conversation;
use crate::control::reload::Reload;
use crate::control::stream::Stream;
use crate::control::{Asks, Begin, Control, Core, Ending, KinMeans, Rest, run, signals};

/// A control core that knows everything another has left, and has yet to go on with it.
pub struct Heir {
    core: Core,
    rest: Rest,
    lines: Vec<(Stream, Conversation)>,
}

impl Control {
    /// Takes up what another control core has left: its workers know of the services and backends when this
    /// returns. Nothing is read, written or accepted before [`Heir::run`], and if that never comes, nobody has
    /// noticed anything. `sockets` are those of the connections, in the order of the description.
    ///
    /// # Errors
    /// What is wrong with that, or with a door or a secret here, in a sentence for the operator.
    pub fn inherit(self, legacy: &Legacy, sockets: Vec<OwnedFd>, now: Now) -> Result<Heir, String> {
        let (hub, rest) = self.parts(now);
        hub.borrow_mut().inherit(legacy, now)?;
        let core = Core::new(&hub, &rest).map_err(|error| error.to_string())?;
        let lines = lines(&core, legacy, sockets, now)?;
        Ok(Heir { core, rest, lines })
    }
}

impl Heir {
    /// What it will run as.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Goes on with the connections, opens the doors and runs like [`Control::run`].
    ///
    /// # Errors
    /// As there.
    pub(in crate::control) fn run(
        self,
        runtime: Runtime,
        reload: Reload,
        kin: KinMeans,
    ) -> io::Result<Ending> {
        signals(reload, |asks, begin| self.go_on(runtime, (asks, begin), kin))
    }

    fn go_on(
        self,
        runtime: Runtime,
        asks: (Asks, impl FnOnce(Rc<Notify>) -> Begin),
        kin: KinMeans,
    ) -> io::Result<Ending> {
        let Heir { core, rest, lines } = self;
        let hub = Rc::clone(&core.hub);
        run(&hub, rest, Ok(runtime), asks, kin, |_| Ok((core, lines)))
    }
}

#[cfg(test)]
impl Heir {
    /// Goes on with the connections only.
    pub fn begin_talks(self) -> Core {
        let Heir { core, lines, .. } = self;
        lines.into_iter().for_each(|(stream, conversation)| core.door.begin(stream, conversation));
        core
    }

    /// Goes on in the runtime of a test.
    pub fn begin(self) -> io::Result<Core> {
        let Heir { core, rest, lines } = self;
        core.begin(lines, rest.listeners)?;
        Ok(core)
    }
}

/// The connections, each with its conversation.
fn lines(
    core: &Core,
    legacy: &Legacy,
    sockets: Vec<OwnedFd>,
    now: Now,
) -> Result<Vec<(Stream, Conversation)>, String> {
    let owners = core.hub.borrow().registry.entries().map(|it| it.source).collect::<Vec<_>>();
    let mut sockets: Vec<Option<OwnedFd>> = sockets.into_iter().map(Some).collect();
    if legacy.connections.len() != sockets.len() {
        let (connections, sockets) = (legacy.connections.len(), sockets.len());
        return Err(format!("{connections} connections came with {sockets} sockets"));
    }
    let mut lines = Vec::new();
    for from in &legacy.connections {
        let source = Source::Connection(from.number);
        let is_known = core.hub.borrow().members.contains_key(&source);
        if is_known || from.number >= legacy.numbers.connection {
            return Err(format!("connection {} is there twice, or before its time", from.number));
        }
        let socket = sockets.get_mut(from.socket).and_then(Option::take);
        let socket = socket.ok_or_else(|| format!("connection {} has no socket", from.number))?;
        let stream = stream(socket, from)?;
        let conversation = core.door.inherit(from, (legacy.at.min(now), now))?;
        lines.push((stream, conversation));
    }
    let is_orphan = |source: &Source| {
        source.connection().is_some() && !core.hub.borrow().members.contains_key(source)
    };
    match owners.iter().any(is_orphan) {
        true => Err("a backend belongs to a connection that has not come".to_owned()),
        false => Ok(lines),
    }
}

/// The connection, if this is one.
fn stream(socket: OwnedFd, from: &format::Connection) -> Result<Stream, String> {
    let fault = |what: &str| format!("the socket of connection {} {what}", from.number);
    let socket = Socket::from(socket);
    let kind = socket.r#type().map_err(|error| fault(&format!("cannot be used: {error}")))?;
    let domain = socket.domain().map_err(|error| fault(&format!("cannot be used: {error}")))?;
    let is_ip = [socket2::Domain::IPV4, socket2::Domain::IPV6].contains(&domain);
    let listens = socket.is_listener().unwrap_or(true);
    if kind != socket2::Type::STREAM || !is_ip || listens {
        return Err(fault("is none of a TCP connection"));
    }
    Stream::new(TcpStream::from(socket)).map_err(|error| fault(&format!("cannot be used: {error}")))
}
