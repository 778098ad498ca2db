//! One control connection as a conversation: what is asked, in order, and what is answered. Owns the
//! proof, the hellos and the queue of requests of that connection; bytes come and go through queues,
//! so nothing here waits on a socket except when it tries a data port.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::warn;

use super::api::{About, Inbox, Incoming, Reply, Request};
use super::auth::{AUTH_TIMEOUT, Challenge, Secrets};
use super::health::{Due, Hellos};
use super::hub::Hub;
use super::mailbox::Mailbox;
use super::pace::Pace;
use super::probe;
use crate::base::time::Now;
use crate::cluster::registry::{Owner, Registration};
use crate::cluster::{BackendId, Protocol};

/// Requests that may wait while an earlier one is being dealt with.
const PENDING_MAX: usize = 64;

/// What a conversation waits for before it deals with the next request.
type Waiting = Pin<Box<dyn Future<Output = Over>>>;

/// How the waiting ended.
enum Over {
    /// A data port was tried.
    Tried(Registration, Result<(), String>),
    /// Changes came too fast, and now the next may be made.
    Rested,
}

/// Who is at the other end.
pub struct Peer {
    /// Canonical.
    pub address: SocketAddr,
    /// Our own address on this connection.
    pub local: Option<IpAddr>,
}

/// The state of one conversation.
pub struct Conversation {
    hub: Rc<RefCell<Hub>>,
    owner: Owner,
    peer: Peer,
    mailbox: Rc<Mailbox>,
    inbox: Inbox,
    pending: VecDeque<Incoming>,
    hellos: Hellos,
    pace: Pace,
    proof: Option<ToProve>,
    /// The last backend of the list that was sent, while there is more of it.
    listing: Option<BackendId>,
}

/// A proof that is still outstanding.
pub struct ToProve {
    secrets: Rc<Secrets>,
    challenge: Challenge,
    deadline: Now,
    _counted: Counted,
}

impl ToProve {
    /// Asks for a proof within [`AUTH_TIMEOUT`], and counts it in `outstanding` until then.
    pub fn new(
        secrets: Rc<Secrets>,
        challenge: Challenge,
        outstanding: &Rc<Cell<usize>>,
    ) -> ToProve {
        ToProve {
            secrets,
            challenge,
            deadline: Now::read().plus(AUTH_TIMEOUT),
            _counted: Counted::new(outstanding),
        }
    }
}

/// One of a count, until it goes.
pub struct Counted(Rc<Cell<usize>>);

impl Counted {
    pub fn new(count: &Rc<Cell<usize>>) -> Counted {
        count.set(count.get() + 1);
        Counted(Rc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Why a conversation is over, as the log says it.
type Why = &'static str;

impl Conversation {
    /// Begins a conversation, with a challenge if there are secrets.
    pub fn new(
        hub: Rc<RefCell<Hub>>,
        owner: Owner,
        peer: Peer,
        mailbox: Rc<Mailbox>,
        proof: Option<ToProve>,
    ) -> Conversation {
        if let Some(proof) = &proof {
            mailbox.send(&Reply::AskAuth { nonce: proof.challenge.nonce().to_owned() });
        }
        let now = Now::read();
        let hellos = Hellos::new(hub.borrow().config.health, now);
        Conversation {
            hub,
            owner,
            peer,
            mailbox,
            inbox: Inbox::default(),
            pending: VecDeque::new(),
            hellos,
            pace: Pace::new(now),
            proof,
            listing: None,
        }
    }

    /// Talks until one side is done, and says why that was.
    pub async fn run(mut self, mut segments: mpsc::Receiver<Vec<u8>>) -> Why {
        let mut waiting: Option<Waiting> = None;
        let mut ended = false;
        loop {
            if let Some(why) = self.advance(&mut waiting) {
                return why;
            }
            if ended && waiting.is_none() && !self.has_work() {
                return "it closed the connection";
            }
            let listening = !ended && self.has_room();
            let deadline = self.deadline().since(Now::read());
            tokio::select! {
                segment = segments.recv(), if listening => match segment {
                    Some(bytes) => self.hear(&bytes),
                    None => ended = true,
                },
                over = end_of(&mut waiting), if waiting.is_some() => {
                    waiting = None;
                    if let Over::Tried(wanted, result) = over {
                        self.tried(wanted, result);
                    }
                }
                () = tokio::time::sleep(deadline) => {
                    if let Some(why) = self.on_time(waiting.is_some()) {
                        return why;
                    }
                }
                () = self.mailbox.drained() => {}
            }
        }
    }

    fn has_room(&self) -> bool {
        self.pending.len() < PENDING_MAX && !self.mailbox.is_crowded()
    }

    fn has_work(&self) -> bool {
        self.listing.is_some() || !self.pending.is_empty()
    }

    fn deadline(&self) -> Now {
        self.proof.as_ref().map_or_else(|| self.hellos.deadline(), |proof| proof.deadline)
    }

    /// Deals with what waits, as far as the peer reads the answers.
    fn advance(&mut self, waiting: &mut Option<Waiting>) -> Option<Why> {
        loop {
            if let Some(why) = self.mailbox.broken() {
                return Some(why);
            }
            if waiting.is_some() || self.mailbox.is_crowded() {
                return None;
            }
            if let Some(after) = self.listing.take() {
                self.list(after);
                continue;
            }
            match self.pending.pop_front()? {
                Ok(request) if self.proof.is_some() => match self.check_proof(request) {
                    Ok(()) => {}
                    Err(why) => return Some(why),
                },
                Ok(request) => {
                    *waiting = self.rest_before(&request).or_else(|| self.answer(request))
                }
                Err(fault) => {
                    self.fail(&fault.msg, fault.cmd, None);
                    if fault.fatal || self.proof.is_some() {
                        return Some("it sent what is no message");
                    }
                }
            }
        }
    }

    /// Takes bytes in. Answers to hellos are heard at once, also while a data port is being tried.
    fn hear(&mut self, bytes: &[u8]) {
        let before = self.pending.len();
        self.inbox.push(bytes, &mut self.pending);
        let heard = self.pending.len() - before;
        self.hub.borrow().counters.messages.add(heard as u64);
        if self.proof.is_some() {
            return;
        }
        let now = Now::read();
        let is_hello = |incoming: &Incoming| *incoming == Ok(Request::Hello);
        if self.pending.iter().skip(before).any(is_hello) {
            self.pending.retain(|incoming| !is_hello(incoming));
            let took = self.hellos.answered(now);
            self.hub.borrow_mut().answered(self.owner, took, now);
        }
    }

    fn on_time(&mut self, waiting: bool) -> Option<Why> {
        let now = Now::read();
        if let Some(proof) = &self.proof {
            if now < proof.deadline {
                return None;
            }
            self.hub.borrow().counters.proofs_failed.one();
            self.fail("no proof of the secret within 5 seconds", Some("auth"), None);
            return Some("it did not prove the secret in time");
        }
        // While we wait and the queue is full nobody reads, so an answer may be on its way.
        if waiting && self.pending.len() >= PENDING_MAX {
            self.hellos.excuse();
        }
        // A reload may have changed it.
        self.hellos.follow(self.hub.borrow().config.health);
        match self.hellos.step(now) {
            Due::Nothing => None,
            Due::Ask => {
                self.hub.borrow().counters.hellos_sent.one();
                self.mailbox.send(&Reply::AskHello);
                None
            }
            Due::Missed(misses) => {
                self.hub.borrow_mut().missed(self.owner, misses);
                None
            }
            Due::Lost => {
                self.hub.borrow_mut().missed(self.owner, self.hellos.misses());
                self.fail("hello was not answered", Some("hello"), None);
                Some("it did not answer hello")
            }
        }
    }

    fn check_proof(&mut self, request: Request) -> Result<(), Why> {
        let Some(proof) = self.proof.take() else { return Ok(()) };
        let Request::Auth { id, mac } = request else {
            self.hub.borrow().counters.proofs_failed.one();
            self.fail("prove the secret first, see cmd auth", None, None);
            return Err("it did not prove the secret");
        };
        if !proof.challenge.is_met(&proof.secrets, &id, &mac) {
            self.hub.borrow().counters.proofs_failed.one();
            warn!(peer = %self.peer.address, %id, "a host does not know the secret");
            self.fail("the mac is wrong: check the secret", Some("auth"), None);
            return Err("it does not know the secret");
        }
        self.mailbox.send(&Reply::Authenticated);
        self.hub.borrow_mut().proved(self.owner, id);
        self.hellos = Hellos::new(self.hub.borrow().config.health, Now::read());
        Ok(())
    }

    /// Puts a change back that comes too soon after so many others.
    fn rest_before(&mut self, request: &Request) -> Option<Waiting> {
        let changes = matches!(
            request,
            Request::Register { .. } | Request::Unregister { .. } | Request::Drain { .. }
        );
        let wait = if changes { self.pace.ask(Now::read()).err()? } else { return None };
        self.pending.push_front(Ok(request.clone()));
        Some(Box::pin(async move {
            tokio::time::sleep(wait).await;
            Over::Rested
        }))
    }

    /// Answers a request; a registration first has its data port tried.
    fn answer(&mut self, request: Request) -> Option<Waiting> {
        let now = Now::read();
        match request {
            Request::Hello => {}
            Request::Auth { .. } => {
                self.fail("no proof is asked for here", Some("auth"), None);
            }
            Request::List => self.list(BackendId(0)),
            Request::Register { protocol, port, weight, name } => {
                let address = self.address(port);
                let name = name.or_else(|| self.hub.borrow().identity(self.owner));
                let wanted = Registration { owner: self.owner, protocol, address, weight, name };
                return self.register(wanted);
            }
            Request::Unregister { protocol, port } => {
                let address = self.address(port);
                let done = self.hub.borrow_mut().unregister(self.owner, protocol, address, now);
                self.reply(done, "unregister", About { protocol, port });
            }
            Request::Drain { protocol, port, deadline } => {
                let address = self.address(port);
                let done =
                    self.hub.borrow_mut().drain(self.owner, protocol, address, deadline, now);
                self.reply(done, "drain", About { protocol, port });
            }
        }
        None
    }

    /// The peer's own address with another port; the zone of a link-local one stays.
    fn address(&self, port: u16) -> SocketAddr {
        let mut address = self.peer.address;
        address.set_port(port);
        address
    }

    fn register(&mut self, wanted: Registration) -> Option<Waiting> {
        let about = About { protocol: wanted.protocol, port: wanted.address.port() };
        let fault = match self.hub.borrow().registry.check(&wanted) {
            Err(fault) => Some(fault.to_string()),
            Ok(()) => self.own_door(&wanted),
        };
        if let Some(msg) = fault {
            self.fail(&msg, Some("register"), Some(about));
            return None;
        }
        if wanted.protocol == Protocol::Udp {
            self.tried(wanted, Ok(()));
            return None;
        }
        let timeout = self.hub.borrow().config.timeouts.connect;
        Some(Box::pin(async move {
            let result = probe::connects(wanted.address, timeout).await;
            Over::Tried(wanted, result)
        }))
    }

    /// Whether the address is one of our own doors, which would send users round in a circle.
    fn own_door(&self, wanted: &Registration) -> Option<String> {
        let host = wanted.address.ip();
        let config = Arc::clone(&self.hub.borrow().config);
        let listen = &config.listen;
        let doors = match wanted.protocol {
            Protocol::Udp => [listen.udp, None, None, None],
            _ => [listen.tcp, listen.api, listen.control, listen.admin],
        };
        let here = host.is_loopback() || self.peer.local == Some(host);
        let own = doors.into_iter().flatten().any(|door| door.port() == wanted.address.port());
        (here && own).then(|| format!("{} is a door of the balancer itself", wanted.address))
    }

    fn tried(&mut self, wanted: Registration, result: Result<(), String>) {
        let about = About { protocol: wanted.protocol, port: wanted.address.port() };
        if let Err(msg) = result {
            self.hub.borrow().counters.backends_unreachable.one();
            self.fail(&msg, Some("register"), Some(about));
            return;
        }
        let done = self.hub.borrow_mut().register(wanted, Now::read());
        self.reply(done, "register", about);
    }

    fn list(&mut self, after: BackendId) {
        let (reply, next) = self.hub.borrow().list(self.owner, after);
        self.listing = next;
        self.mailbox.send(&reply);
    }

    fn reply<E: std::fmt::Display>(&self, done: Result<Reply, E>, cmd: &'static str, about: About) {
        match done {
            Ok(reply) => self.mailbox.send(&reply),
            Err(fault) => self.fail(&fault.to_string(), Some(cmd), Some(about)),
        }
    }

    fn fail(&self, msg: &str, cmd: Option<&'static str>, about: Option<About>) {
        self.hub.borrow_mut().refused(self.peer.address, cmd, msg);
        self.mailbox.send(&Reply::Failed { msg: msg.to_owned(), cmd, about });
    }
}

/// The end of the waiting; never, while nothing is waited for.
async fn end_of(waiting: &mut Option<Waiting>) -> Over {
    match waiting {
        Some(waiting) => waiting.await,
        None => std::future::pending().await,
    }
}
