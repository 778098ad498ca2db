//! The control door: lets connections in, reads and writes. Owns the limits that apply before a peer has
//! said anything, and how a connection ends; the sockets are [`stream`](super::stream)'s.
//!
//! A wait on the ring that is dropped continues in the kernel and keeps its socket open. So nothing here
//! is raced against a timer: an accept is awaited forever by a task of its own, and a read or write that
//! must end is ended by shutting down its socket, and then awaited.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinHandle};
use tracing::{error, warn};

use super::api::{Outbox, Reply};
use super::auth::{Challenge, UNPROVEN_EACH_MAX, UNPROVEN_MAX};
use super::conversation::{self, Caller, Conversation, Shared, ToProve};
use super::crowd::{Admit, Crowd, Rule, Ticket};
use super::hub::Member;
use super::intake::Intake;
use super::legacy::format;
use super::mailbox::Mailbox;
use super::reload::Entrance;
use super::rights::Identity;
use super::stream::{Listener, Stream};
use crate::base::time::Now;
use crate::cluster::source::Source;
use crate::config::Health;

/// Most bytes per read.
const READ_BYTES: usize = 4096;
/// Bytes a peer may still send after we have given up its connection, so that it can read the reason.
const DISCARDED_BYTES_MAX: usize = 1 << 20;
/// How long our last message may take to be written, and then to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Pause after a failed accept, mostly for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections allowed beyond the limit while those that made room for them are being closed.
const LEAVING_MAX: usize = 16;

/// The door, and what it needs to let a connection in.
pub struct ControlDoor {
    shared: Rc<Shared>,
    /// Replaced by a reload, with effect on later connections.
    entrance: Rc<RefCell<Entrance>>,
    /// Connections whose sockets are open, including those being closed.
    open: Rc<Cell<usize>>,
    /// Connections that have proved nothing yet or, without a secret, registered nothing.
    crowd: Rc<RefCell<Crowd<Rc<Mailbox>>>>,
    lines: Rc<Lines>,
}

/// The control connections whose conversations go on. All that is known of each is here, and in the hub.
#[derive(Default)]
pub struct Lines(RefCell<BTreeMap<Source, Line>>);

/// One of them.
pub struct Line {
    pub stream: Stream,
    pub intake: Rc<Intake>,
    pub mailbox: Rc<Mailbox>,
    pub talk: Rc<RefCell<Conversation>>,
    tasks: [AbortHandle; 3],
}

impl Lines {
    /// Calls `each` for every connection, in the order in which they came.
    pub fn each(&self, mut each: impl FnMut(Source, &Line)) {
        self.0.borrow().iter().for_each(|(source, line)| each(*source, line));
    }

    /// Lets go of all connections without a word: nothing is written, shut down or unregistered.
    pub fn let_go(&self) {
        for line in std::mem::take(&mut *self.0.borrow_mut()).into_values() {
            line.tasks.iter().for_each(AbortHandle::abort);
        }
    }
}

/// Counts as one until it is dropped.
struct Counted(Rc<Cell<usize>>);

impl Counted {
    fn new(count: &Rc<Cell<usize>>) -> Counted {
        count.set(count.get() + 1);
        Counted(Rc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Sets the socket options every accepted connection inherits. Unanswered hellos reveal a host that has
/// fallen silent, at intervals that a reload may change; on a connection without hellos, the kernel's
/// keepalive notices within about the same time.
///
/// # Errors
/// When the kernel refuses an option.
pub fn prepare(listener: &std::net::TcpListener, health: Health) -> io::Result<()> {
    let socket = socket2::SockRef::from(listener);
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(health.interval.max(Duration::from_secs(1)))
        .with_interval(health.interval.max(Duration::from_secs(1)))
        .with_retries(health.misses.max(1));
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_nodelay(true)
}

impl ControlDoor {
    pub fn new(shared: Shared, entrance: Rc<RefCell<Entrance>>) -> ControlDoor {
        ControlDoor {
            shared: Rc::new(shared),
            entrance,
            open: Rc::default(),
            crowd: Rc::default(),
            lines: Rc::default(),
        }
    }

    /// The connections that have come by this door.
    pub fn lines(&self) -> Rc<Lines> {
        Rc::clone(&self.lines)
    }

    /// A conversation that another process has begun; nothing happens before it is gone on with.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn inherit(
        &self,
        from: &format::Connection,
        (at, now): (Now, Now),
    ) -> Result<Conversation, String> {
        let fault = |what: &str| format!("connection {}: {what}", from.number);
        let address = from.peer.ok_or_else(|| fault("it comes from nowhere"))?;
        let source = Source::Connection(from.number);
        let mailbox = Rc::new(Mailbox::with(from.writing.0.clone(), from.unsent.0.clone()));
        let since = from.unproven.map(|since| since.min(now));
        let ticket =
            since.map(|since| Ticket::take(&self.crowd, address.ip(), Rc::clone(&mailbox), since));
        if from.is_broken {
            mailbox.give_up("it was given up before");
        }
        let member = Member {
            peer: address,
            identity: from.identity.as_ref().map(Identity::inherit),
            mailbox: Rc::clone(&mailbox),
            answered: from.answered.map(|(when, took)| (when.min(now), took)),
            misses: from.misses,
        };
        self.shared.hub.borrow_mut().go_on_with(source, member);
        let caller = Caller { source, address, mailbox, intake: Rc::default(), ticket };
        let (shared, keys) = (Rc::clone(&self.shared), self.entrance.borrow().keys.clone());
        Conversation::inherit(shared, caller, from, keys.as_ref(), (at, now))
            .map_err(|what| fault(&what))
    }

    /// Accepts forever.
    pub async fn accept(self: Rc<ControlDoor>, listener: Listener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => self.enter(stream, canonical(peer)).await,
                Err(reason) => {
                    warn!(%reason, "cannot accept a control connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Turns a connection away or starts its conversation.
    async fn enter(&self, stream: Stream, peer: SocketAddr) {
        if !self.entrance.borrow().admission.admits(peer.ip()) {
            self.shared.hub.borrow_mut().stranger(peer, Now::read());
            return;
        }
        if !self.has_room_for(peer.ip()) {
            self.shared.hub.borrow().counters.connections_refused_full.one();
            turn_away(stream).await;
            return;
        }
        let to_prove = match self.to_prove() {
            Ok(to_prove) => to_prove,
            Err(reason) => {
                error!(%reason, "no random numbers from the kernel; a backend was turned away");
                return;
            }
        };
        let (mailbox, now) = (Rc::new(Mailbox::default()), Now::read());
        let ticket = Some(Ticket::take(&self.crowd, peer.ip(), Rc::clone(&mailbox), now));
        let source = self.shared.hub.borrow_mut().welcome(peer, Rc::clone(&mailbox), now);
        let intake = Rc::default();
        let peer = Caller { source, address: peer, mailbox, intake, ticket };
        self.begin(stream, Conversation::new(Rc::clone(&self.shared), peer, to_prove));
    }

    /// Goes on with a conversation over this connection.
    pub fn begin(&self, stream: Stream, conversation: Conversation) {
        let Caller { source, mailbox, intake, .. } = conversation.peer();
        let (source, mailbox, intake) = (*source, Rc::clone(mailbox), Rc::clone(intake));
        let talk = Rc::new(RefCell::new(conversation));
        let reader = tokio_uring::spawn(read(stream.clone(), Rc::clone(&intake)));
        let writer = tokio_uring::spawn(write(stream.clone(), Rc::clone(&mailbox)));
        let ways = [reader.abort_handle(), writer.abort_handle()];
        let served = Served {
            shared: Rc::clone(&self.shared),
            lines: Rc::clone(&self.lines),
            stream: stream.clone(),
            source,
            _counted: Counted::new(&self.open),
        };
        let task = tokio_uring::spawn(attend(served, Rc::clone(&talk), reader, writer));
        let [reader, writer] = ways;
        let tasks = [task.abort_handle(), reader, writer];
        let line = Line { stream, intake, mailbox, talk, tasks };
        self.lines.0.borrow_mut().insert(source, line);
    }

    /// Whether one more connection may come from `address`, if necessary in exchange for one that has
    /// proved or registered nothing so far.
    fn has_room_for(&self, address: IpAddr) -> bool {
        let hub = self.shared.hub.borrow();
        let (open, limit) = (self.open.get(), hub.config.limits.control_connections());
        if open >= limit + LEAVING_MAX {
            return false;
        }
        let proof = self.entrance.borrow().keys.is_some();
        let each = if proof { UNPROVEN_EACH_MAX } else { usize::MAX };
        let mut crowd = self.crowd.borrow_mut();
        let full = open >= limit || proof && crowd.len() >= UNPROVEN_MAX;
        match crowd.admit(address, Rule { each, full, renews: proof }, Now::read()) {
            Admit::Yes => true,
            Admit::No => false,
            Admit::InsteadOf(number) => {
                hub.counters.connections_displaced.one();
                if let Some(mailbox) = crowd.leave(number) {
                    mailbox
                        .give_up("it had proved or registered nothing, and others needed the room");
                }
                true
            }
        }
    }

    fn to_prove(&self) -> Result<Option<ToProve>, getrandom::Error> {
        let Some(keys) = self.entrance.borrow().keys.clone() else { return Ok(None) };
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce)?;
        Ok(Some(ToProve::new(keys, Challenge::new(nonce))))
    }
}

/// A connection that is looked after.
struct Served {
    shared: Rc<Shared>,
    lines: Rc<Lines>,
    stream: Stream,
    source: Source,
    _counted: Counted,
}

/// Looks after one connection from its first byte to its last.
async fn attend(
    served: Served,
    talk: Rc<RefCell<Conversation>>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
) {
    let Served { shared, lines, stream, source, _counted } = served;
    let why = conversation::run(talk).await;
    let Some(Line { intake, mailbox, talk, .. }) = lines.0.borrow_mut().remove(&source) else {
        return;
    };
    drop(talk);
    intake.close();
    shared.hub.borrow_mut().farewell(source, why, Now::read());
    mailbox.finish();
    if mailbox.broken().is_some() {
        // There is nothing left to say, and others may need the room.
        let _ = stream.shutdown(Shutdown::Both);
    }
    close(&stream, reader, writer).await;
}

/// Reads until the peer is done or the connection breaks. Once nobody is listening, it discards what
/// arrives for a while: closing a socket with unread bytes would reset the connection, and the peer
/// would lose our last message.
async fn read(stream: Stream, intake: Rc<Intake>) {
    let mut buffer = [0; READ_BYTES];
    let mut discarded = 0;
    while discarded < DISCARDED_BYTES_MAX {
        intake.is_wanted().await;
        let count = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        if !intake.put(&buffer[..count]) {
            discarded += count;
        }
    }
    intake.end();
}

/// Writes what is queued, until the conversation is over or the connection breaks.
async fn write(stream: Stream, mailbox: Rc<Mailbox>) {
    while mailbox.is_filled().await {
        let outcome = match mailbox.write(|bytes| stream.write(bytes)) {
            Ok(true) => Ok(()),
            Ok(false) => stream.writable().await,
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            mailbox.give_up("its connection broke");
        }
    }
}

/// Gives the last message [`LAST_WORDS`] to reach the peer, then ends both operations on the socket.
async fn close(stream: &Stream, reader: JoinHandle<()>, writer: JoinHandle<()>) {
    let mut tasks = [writer, reader];
    for task in &mut tasks {
        if tokio::time::timeout(LAST_WORDS, &mut *task).await.is_err() {
            // Fails only if the connection is already gone, in which case the operations end as well.
            let _ = stream.shutdown(Shutdown::Both);
            let _ = task.await;
        }
        let _ = stream.shutdown(Shutdown::Write);
    }
}

/// Sends the reason and hangs up. A new connection has room for one line, so this does not wait.
async fn turn_away(stream: Stream) {
    let msg = "too many control connections, try again later".to_owned();
    let mut outbox = Outbox::default();
    if outbox.push(&Reply::Failed { msg, cmd: None, about: None, needs_secret: false }).is_ok() {
        let _ = stream.write_all(&outbox.take()).await;
    }
}

/// The address in its usual form: never IPv4-mapped, and without a flow label.
fn canonical(peer: SocketAddr) -> SocketAddr {
    match (peer.ip().to_canonical(), peer) {
        (IpAddr::V6(_), SocketAddr::V6(mut v6)) => {
            v6.set_flowinfo(0);
            SocketAddr::V6(v6)
        }
        (ip, _) => SocketAddr::new(ip, peer.port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accepted_connection_notices_a_host_that_fell_silent() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        prepare(&listener, Health::default()).unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        let socket = socket2::SockRef::from(&accepted);
        assert!(socket.keepalive().unwrap() && socket.tcp_nodelay().unwrap());
        assert_eq!(socket.tcp_user_timeout().unwrap(), None, "the hellos decide");
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(5));
    }

    #[test]
    fn a_peers_address_is_written_in_one_form() {
        for (peer, written) in [
            ("127.0.0.1:5", "127.0.0.1:5"),
            ("[::ffff:10.0.0.1]:5", "10.0.0.1:5"),
            ("[2001:db8::1]:5", "[2001:db8::1]:5"),
            ("[fe80::1%3]:5", "[fe80::1%3]:5"),
        ] {
            assert_eq!(canonical(peer.parse().unwrap()).to_string(), written);
        }
    }
}
