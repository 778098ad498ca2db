//! One control connection as a conversation: what is asked, in order, and what is answered. Owns the
//! proof, the hellos and the queue of requests of that connection; bytes come and go through queues,
//! so nothing here waits on a socket except when it tries a data port.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};

use super::api::{About, Inbox, Incoming, LISTED_MAX, Listed, Reply, Request};
use super::auth::{AUTH_TIMEOUT, Challenge, Secrets};
use super::crowd::Place;
use super::health::{Due, Hellos};
use super::home;
use super::hub::Hub;
use super::mailbox::Mailbox;
use super::pace::Pace;
use super::probe;
use super::status::Doors;
use crate::base::time::Now;
use crate::cluster::registry::{Change, Entry, Registration};
use crate::cluster::source::Source;
use crate::cluster::{BackendId, Protocol, Service, ServiceId};

/// Requests that may wait while an earlier one is being dealt with.
const PENDING_MAX: usize = 64;
/// Requests that are dealt with before others may have their turn: about a tenth of a millisecond, and
/// far less than the core may be busy at a time even if each is about every backend.
const SLICE: usize = 16;

/// How long requests are still dealt with whose peer has closed its side: it may be waiting for the
/// answers, or be gone while its other backends are still in the rotation.
const AFTER_END: Duration = Duration::from_secs(1);

/// What a conversation waits for before it deals with the next request.
type Waiting = Pin<Box<dyn Future<Output = Over>>>;

/// How the waiting ended.
enum Over {
    /// A data port was tried.
    Tried(Registration, Result<(), String>),
    /// Changes came too fast, and now the next may be made.
    Rested,
}

/// What all conversations share.
pub struct House {
    pub hub: Rc<RefCell<Hub>>,
    pub doors: Doors,
    /// Held by the one that is dealing with what its peer said. However many peers say how much, the
    /// core does one slice of it and then whatever else there is to do.
    floor: Semaphore,
    probes: Semaphore,
}

impl House {
    pub fn new(hub: Rc<RefCell<Hub>>, doors: Doors) -> House {
        let (floor, probes) = (Semaphore::new(1), Semaphore::new(probe::AT_ONCE));
        House { hub, doors, floor, probes }
    }
}

/// Who is at the other end.
pub struct Peer {
    pub source: Source,
    /// Canonical.
    pub address: SocketAddr,
    pub mailbox: Rc<Mailbox>,
    /// Among those who have shown nothing yet, until it does.
    pub place: Option<Place<Rc<Mailbox>>>,
}

/// The state of one conversation.
pub struct Conversation {
    house: Rc<House>,
    hub: Rc<RefCell<Hub>>,
    peer: Peer,
    inbox: Inbox,
    /// Bytes that have yet to be looked at.
    unheard: Option<Vec<u8>>,
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
}

impl ToProve {
    /// Asks for a proof within [`AUTH_TIMEOUT`].
    pub fn new(secrets: Rc<Secrets>, challenge: Challenge) -> ToProve {
        ToProve { secrets, challenge, deadline: Now::read().plus(AUTH_TIMEOUT) }
    }
}

/// Why a conversation is over, as the log says it.
type Why = &'static str;

impl Conversation {
    /// Begins a conversation, with a challenge if there are secrets.
    pub fn new(house: Rc<House>, peer: Peer, proof: Option<ToProve>) -> Conversation {
        if let Some(proof) = &proof {
            peer.mailbox.send(&Reply::AskAuth { nonce: proof.challenge.nonce().to_owned() });
        }
        let now = Now::read();
        let hub = Rc::clone(&house.hub);
        let hellos = Hellos::new(hub.borrow().config.health, now);
        Conversation {
            house,
            hub,
            peer,
            inbox: Inbox::default(),
            unheard: None,
            pending: VecDeque::new(),
            hellos,
            pace: Pace::new(now),
            proof,
            listing: None,
        }
    }

    /// Talks until one side is done, and says why that was.
    pub async fn run(mut self, mut segments: mpsc::Receiver<Vec<u8>>) -> Why {
        let house = Rc::clone(&self.house);
        let mut waiting: Option<Waiting> = None;
        let mut ended: Option<Now> = None;
        loop {
            if let Some(why) = self.peer.mailbox.broken() {
                return why;
            }
            self.hellos.busy(Now::read(), self.is_behind(waiting.is_some()));
            if self.is_ready(waiting.is_some()) {
                let floor = house.floor.acquire().await;
                let over = self.advance(&mut waiting);
                drop(floor);
                if let Some(why) = over {
                    return why;
                }
                tokio::task::yield_now().await;
                continue;
            }
            let is_done = waiting.is_none() && !self.has_work();
            if ended.is_some_and(|until| is_done || Now::read() >= until) {
                return "it closed the connection";
            }
            let listening = ended.is_none() && self.has_room();
            let deadline = ended.into_iter().fold(self.deadline(), Now::min).since(Now::read());
            tokio::select! {
                segment = segments.recv(), if listening => match segment {
                    bytes @ Some(_) => self.unheard = bytes,
                    None => ended = Some(Now::read().plus(AFTER_END)),
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
                () = self.peer.mailbox.drained() => {}
            }
        }
    }

    fn has_room(&self) -> bool {
        self.pending.len() < PENDING_MAX && !self.peer.mailbox.is_crowded()
    }

    fn has_work(&self) -> bool {
        self.listing.is_some() || !self.pending.is_empty() || self.unheard.is_some()
    }

    /// Whether an answer may stand behind what we have not come to yet. Who does not read has no excuse.
    fn is_behind(&self, waiting: bool) -> bool {
        waiting || self.has_work() && !self.peer.mailbox.is_crowded()
    }

    /// Whether there is something that can be done now.
    fn is_ready(&self, waiting: bool) -> bool {
        let answerable = !waiting && !self.peer.mailbox.is_crowded();
        self.unheard.is_some() || answerable && self.has_work()
    }

    fn deadline(&self) -> Now {
        self.proof.as_ref().map_or_else(|| self.hellos.deadline(), |proof| proof.deadline)
    }

    /// Deals with a slice of what waits, as far as the peer reads the answers.
    fn advance(&mut self, waiting: &mut Option<Waiting>) -> Option<Why> {
        if let Some(bytes) = self.unheard.take() {
            self.hear(&bytes);
            return None;
        }
        for _ in 0..SLICE {
            if let Some(why) = self.peer.mailbox.broken() {
                return Some(why);
            }
            if waiting.is_some() || self.peer.mailbox.is_crowded() {
                return None;
            }
            if let Some(after) = self.listing.take() {
                self.list(after);
                continue;
            }
            match self.pending.pop_front()? {
                Ok(request) => match self.proof.take() {
                    Some(proof) => {
                        if let Err(why) = self.check_proof(proof, request) {
                            return Some(why);
                        }
                    }
                    None => *waiting = self.rest_before(&request).or_else(|| self.answer(request)),
                },
                Err(bad) => {
                    self.fail(&bad.msg, bad.cmd, None);
                    if bad.fatal || self.proof.is_some() {
                        return Some("it sent what is no message");
                    }
                }
            }
        }
        None
    }

    /// Takes bytes in. Answers to hellos are heard at once, also while a data port is being tried.
    fn hear(&mut self, bytes: &[u8]) {
        self.hellos.heard(bytes.len());
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
            self.hub.borrow_mut().answered(self.peer.source, took, now);
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
        self.hellos.busy(now, self.is_behind(waiting));
        // A reload may have changed it.
        self.hellos.follow(self.hub.borrow().config.health);
        match self.hellos.step(now) {
            Due::Nothing => None,
            Due::Ask => {
                self.hub.borrow().counters.hellos_sent.one();
                self.peer.mailbox.send(&Reply::AskHello);
                None
            }
            Due::Missed(misses) => {
                self.hub.borrow_mut().missed(self.peer.source, misses);
                None
            }
            Due::Lost => {
                self.hub.borrow_mut().missed(self.peer.source, self.hellos.misses());
                self.fail("hello was not answered", Some("hello"), None);
                Some("it did not answer hello")
            }
        }
    }

    fn check_proof(&mut self, proof: ToProve, request: Request) -> Result<(), Why> {
        let Request::Auth { id, mac } = request else {
            self.hub.borrow().counters.proofs_failed.one();
            self.fail("prove the secret first, see cmd auth", None, None);
            return Err("it did not prove the secret");
        };
        if !proof.challenge.is_met(&proof.secrets, &id, &mac) {
            self.hub.borrow().counters.proofs_failed.one();
            self.hub.borrow_mut().console.secret_unknown(Now::read(), self.peer.address, &id);
            self.fail("the mac is wrong: check the secret", Some("auth"), None);
            return Err("it does not know the secret");
        }
        self.peer.place = None;
        self.peer.mailbox.send(&Reply::Authenticated);
        self.hub.borrow_mut().proved(self.peer.source, id);
        self.hellos = Hellos::new(self.hub.borrow().config.health, Now::read());
        Ok(())
    }

    /// Puts a change back that comes too soon after so many others. What is going to be refused changes
    /// nothing.
    fn rest_before(&mut self, request: &Request) -> Option<Waiting> {
        let changes = match request {
            Request::Register { protocol, port, weight, name } => {
                let wanted = self.wanted(*protocol, *port, *weight, name.clone());
                self.fault_of(&wanted).is_none()
            }
            Request::Unregister { .. } | Request::Drain { .. } => true,
            Request::Hello | Request::Auth { .. } | Request::List => false,
        };
        let wait = if changes { self.pace.ask(Now::read()).err()? } else { return None };
        self.pending.push_front(Ok(request.clone()));
        Some(Box::pin(async move {
            tokio::time::sleep(wait).await;
            Over::Rested
        }))
    }

    /// Answers a request; a registration first has its data port tried.
    fn answer(&mut self, request: Request) -> Option<Waiting> {
        match request {
            Request::Hello => {}
            Request::Auth { .. } => {
                self.fail("no proof is asked for here", Some("auth"), None);
            }
            Request::List => self.list(BackendId(0)),
            Request::Register { protocol, port, weight, name } => {
                let wanted = self.wanted(protocol, port, weight, name);
                return self.register(wanted);
            }
            Request::Unregister { protocol, port } => {
                let (source, address) = (self.peer.source, self.address(port));
                let service = ServiceId::built_in(protocol);
                let change = Change::Unregister { source, service, address };
                let about = About { protocol, port };
                self.change(change, "unregister", about, |hub, id| Reply::Unregistered {
                    about,
                    left: hub.sessions_on(id),
                });
            }
            Request::Drain { protocol, port, deadline: lasts } => {
                let (source, address) = (self.peer.source, self.address(port));
                let service = ServiceId::built_in(protocol);
                let change = Change::Drain { source, service, address, lasts };
                let about = About { protocol, port };
                self.change(change, "drain", about, |hub, id| Reply::DrainStarted {
                    about,
                    left: hub.sessions_on(id),
                });
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

    /// What a request to register comes to: a peer that says no name goes by its identity.
    fn wanted(
        &self,
        protocol: Protocol,
        port: u16,
        weight: u16,
        name: Option<Arc<str>>,
    ) -> Registration {
        let (source, address) = (self.peer.source, self.address(port));
        let name = name.or_else(|| self.hub.borrow().identity(source));
        let service = ServiceId::built_in(protocol);
        Registration { source, service, address, weight, name }
    }

    /// Why a registration is refused without a try, if it is.
    fn fault_of(&self, wanted: &Registration) -> Option<String> {
        let Registration { service, address, .. } = *wanted;
        let hub = self.hub.borrow();
        if let Err(fault) = hub.registry.check(wanted) {
            return Some(fault.to_string());
        }
        let protocol = hub.protocol_of(service);
        let own = home::is_own_door(&self.house.doors, protocol, address, home::is_of_this_host);
        own.then(|| format!("{address} is a door of the balancer itself"))
    }

    fn about(&self, wanted: &Registration) -> About {
        let protocol = self.hub.borrow().protocol_of(wanted.service);
        About { protocol, port: wanted.address.port() }
    }

    fn register(&mut self, wanted: Registration) -> Option<Waiting> {
        if let Some(msg) = self.fault_of(&wanted) {
            let about = self.about(&wanted);
            self.fail(&msg, Some("register"), Some(about));
            return None;
        }
        let hub = self.hub.borrow();
        let Service { kind, terms, .. } = hub.registry.service(wanted.service);
        let (is_datagrams, timeout) = (*kind == Protocol::Udp, terms.timeouts.connect);
        drop(hub);
        if is_datagrams {
            self.tried(wanted, Ok(()));
            return None;
        }
        let house = Rc::clone(&self.house);
        Some(Box::pin(async move {
            let result = probe::connects(wanted.address, timeout, &house.probes).await;
            Over::Tried(wanted, result)
        }))
    }

    fn tried(&mut self, wanted: Registration, result: Result<(), String>) {
        let about = self.about(&wanted);
        if let Err(msg) = result {
            self.hub.borrow().counters.backends_unreachable.one();
            self.fail(&msg, Some("register"), Some(about));
            return;
        }
        let done = self.change(Change::Register(wanted), "register", about, |hub, id| {
            let backend = &hub.registry.get(id).expect("it has just been registered").backend;
            let (address, weight) = (backend.address, backend.weight);
            let interval = hub.config.health.interval;
            Reply::Registered { about, id: id.to_string(), address, weight, interval }
        });
        if done && self.proof.is_none() {
            self.peer.place = None;
        }
    }

    /// Makes a change about one backend and answers it. Says whether it was made.
    fn change(
        &self,
        change: Change,
        cmd: &'static str,
        about: About,
        answer: impl FnOnce(&Hub, BackendId) -> Reply,
    ) -> bool {
        let mut hub = self.hub.borrow_mut();
        let outcome = hub.apply(change, Now::read());
        match outcome {
            Ok(applied) => {
                let id = applied.backend.expect("a change that was made has its backend");
                self.peer.mailbox.send(&answer(&hub, id));
                true
            }
            Err(fault) => {
                drop(hub);
                self.fail(&fault.to_string(), Some(cmd), Some(about));
                false
            }
        }
    }

    /// Sends a page of the list, the backends after `after`.
    fn list(&mut self, after: BackendId) {
        let (hub, source) = (self.hub.borrow(), self.peer.source);
        let mut visible = hub.visible(source, after);
        let page: Vec<&Entry> = visible.by_ref().take(LISTED_MAX).collect();
        let more = visible.next().is_some();
        let listed = |entry: &&Entry| {
            let sessions = hub.sessions_on(entry.backend.id);
            let protocol = hub.protocol_of(entry.backend.service);
            Listed::of(protocol, &entry.backend, entry.source == source, sessions)
        };
        let backends = page.iter().map(listed).collect();
        self.listing = page.last().filter(|_| more).map(|entry| entry.backend.id);
        self.peer.mailbox.send(&Reply::Listed { backends, more });
    }

    fn fail(&self, msg: &str, cmd: Option<&'static str>, about: Option<About>) {
        self.hub.borrow_mut().refused(self.peer.address, cmd, msg);
        self.peer.mailbox.send(&Reply::Failed { msg: msg.to_owned(), cmd, about });
    }
}

/// The end of the waiting; never, while nothing is waited for.
async fn end_of(waiting: &mut Option<Waiting>) -> Over {
    match waiting {
        Some(waiting) => waiting.await,
        None => std::future::pending().await,
    }
}
