//! One control connection as a conversation: requests and their answers, in order. Owns the connection's
//! proof, hellos and queue of requests. Bytes come and go through queues, so the only socket anything
//! here waits on is that of a data port being tried.
//!
//! All that a conversation knows is in [`Conversation`], which nobody borrows while [`run`] waits: a request whose
//! answer has to wait for something is still there as well.

mod joining;
mod legacy;
mod lists;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::api::{About, Heard, Inbox, Reply, Request, Target};
use super::auth::{AUTH_TIMEOUT, Challenge};
use super::crowd::Ticket;
use super::health::{Due, Hellos};
use super::hub::Hub;
use super::intake::Intake;
use super::mailbox::Mailbox;
use super::pace::Pace;
use super::probe::{self, Unreached};
use super::rights::Keys;
use super::services;
use super::status::Doors;
use crate::base::time::Now;
use crate::cluster::registry::{Change, Registration};
use crate::cluster::source::Source;
use crate::cluster::{BackendId, ServiceId};
use lists::Listing;

/// Most requests queued behind the one in progress.
const PENDING_MAX: usize = 64;
/// Requests handled before other tasks get a turn: about a tenth of a millisecond of work, and even if
/// each request concerns every backend, far less than the core may be busy at a time.
const SLICE: usize = 16;

/// How long requests are still handled after the peer has closed its side. It may be waiting for the
/// answers; or it is gone, and its other backends are still in the rotation.
const AFTER_END: Duration = Duration::from_secs(1);

/// What a conversation waits for before it handles the next request.
type Waiting = Pin<Box<dyn Future<Output = Over>>>;

/// How a wait ended.
enum Over {
    /// A data port was tried.
    Tried(Registration, Result<(), Unreached>),
    /// Changes came too fast; now the next one may be made.
    Rested,
}

/// What all conversations share.
pub struct Shared {
    pub hub: Rc<RefCell<Hub>>,
    pub doors: Doors,
    /// Held by the conversation whose requests are being handled. However many peers send however much,
    /// the core handles one slice and then gets to its other work.
    floor: Semaphore,
    probes: Semaphore,
}

impl Shared {
    pub fn new(hub: Rc<RefCell<Hub>>, doors: Doors) -> Shared {
        let (floor, probes) = (Semaphore::new(1), Semaphore::new(probe::AT_ONCE));
        Shared { hub, doors, floor, probes }
    }
}

/// The backend at the other end of a control connection.
pub struct Caller {
    pub source: Source,
    /// In canonical form.
    pub address: SocketAddr,
    pub mailbox: Rc<Mailbox>,
    pub intake: Rc<Intake>,
    /// Its place among the connections that have proved or registered nothing yet; `None` once it has.
    pub ticket: Option<Ticket<Rc<Mailbox>>>,
}

/// The state of one conversation.
pub struct Conversation {
    shared: Rc<Shared>,
    hub: Rc<RefCell<Hub>>,
    peer: Caller,
    inbox: Inbox,
    /// Bytes received and not yet parsed.
    unheard: Option<Vec<u8>>,
    pending: VecDeque<Heard>,
    /// The registration whose data port is being tried.
    trying: Option<Heard>,
    /// When the rest of its requests is given up, once the peer has closed its side.
    ended: Option<Now>,
    /// What the answer to the present request is to warn of.
    warning: RefCell<Option<String>>,
    hellos: Hellos,
    pace: Pace,
    proof: Option<ToProve>,
    /// What is still to be listed.
    listing: Option<Listing>,
}

/// A proof still outstanding.
pub struct ToProve {
    keys: Rc<Keys>,
    challenge: Challenge,
    deadline: Now,
}

impl ToProve {
    /// Asks for a proof within [`AUTH_TIMEOUT`].
    pub fn new(keys: Rc<Keys>, challenge: Challenge) -> ToProve {
        ToProve { keys, challenge, deadline: Now::read().plus(AUTH_TIMEOUT) }
    }
}

/// Why a conversation ended, in the words of the log.
type Why = &'static str;

/// What a conversation has to do.
enum Next {
    Over(Why),
    /// Something that can be done at once.
    Work,
    /// Nothing before then, unless something happens; bytes are taken if it is `listening`.
    Wait {
        listening: bool,
        until: Now,
    },
}

/// Runs a conversation until one side is done, and returns the reason.
pub async fn run(talk: Rc<RefCell<Conversation>>) -> Why {
    let (shared, mailbox, intake) = {
        let talk = talk.borrow();
        let Caller { mailbox, intake, .. } = &talk.peer;
        (Rc::clone(&talk.shared), Rc::clone(mailbox), Rc::clone(intake))
    };
    let mut waiting: Option<Waiting> = None;
    loop {
        let next = talk.borrow_mut().next(waiting.is_some());
        let (listening, until) = match next {
            Next::Over(why) => return why,
            Next::Work => {
                let floor = shared.floor.acquire().await;
                let over = talk.borrow_mut().advance(&mut waiting);
                drop(floor);
                if let Some(why) = over {
                    return why;
                }
                tokio::task::yield_now().await;
                continue;
            }
            Next::Wait { listening, until } => (listening, until),
        };
        tokio::select! {
            bytes = intake.next(), if listening => talk.borrow_mut().received(bytes),
            over = end_of(&mut waiting), if waiting.is_some() => {
                waiting = None;
                talk.borrow_mut().waited(over);
            }
            () = tokio::time::sleep(until.since(Now::read())) => {
                let over = talk.borrow_mut().on_time(waiting.is_some());
                if let Some(why) = over {
                    return why;
                }
            }
            () = mailbox.drained() => {}
        }
    }
}

impl Conversation {
    /// Begins a conversation, with a challenge if the peer has to prove a secret.
    pub fn new(shared: Rc<Shared>, peer: Caller, proof: Option<ToProve>) -> Conversation {
        if let Some(proof) = &proof {
            peer.mailbox.send(&Reply::AskAuth { nonce: proof.challenge.nonce().to_owned() });
        }
        let now = Now::read();
        let hub = Rc::clone(&shared.hub);
        let hellos = Hellos::new(hub.borrow().config.health, now);
        Conversation {
            shared,
            hub,
            peer,
            inbox: Inbox::default(),
            unheard: None,
            pending: VecDeque::new(),
            trying: None,
            ended: None,
            warning: RefCell::default(),
            hellos,
            pace: Pace::new(now),
            proof,
            listing: None,
        }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Caller {
        &self.peer
    }

    /// What comes next, while a request is `waiting` for something or none is.
    fn next(&mut self, waiting: bool) -> Next {
        if let Some(why) = self.peer.mailbox.broken() {
            return Next::Over(why);
        }
        let now = Now::read();
        self.hellos.busy(now, self.is_behind(waiting));
        if self.is_ready(waiting) {
            return Next::Work;
        }
        let is_done = !waiting && !self.has_work();
        if self.ended.is_some_and(|until| is_done || now >= until) {
            return Next::Over("it closed the connection");
        }
        let listening = self.ended.is_none() && self.has_room();
        Next::Wait { listening, until: self.ended.into_iter().fold(self.deadline(), Now::min) }
    }

    /// Bytes have come, or the end of them.
    fn received(&mut self, bytes: Option<Vec<u8>>) {
        match bytes {
            Some(_) => self.unheard = bytes,
            None => self.ended = Some(Now::read().plus(AFTER_END)),
        }
    }

    /// What a request has waited for is there.
    fn waited(&mut self, over: Over) {
        self.trying = None;
        if let Over::Tried(wanted, result) = over {
            self.tried(wanted, result);
        }
    }

    fn has_room(&self) -> bool {
        self.pending.len() < PENDING_MAX && !self.peer.mailbox.is_crowded()
    }

    fn has_work(&self) -> bool {
        self.listing.is_some() || !self.pending.is_empty() || self.unheard.is_some()
    }

    /// Whether the peer's answer to a hello may be queued behind work we have not reached yet. A peer
    /// that does not read our answers has no such excuse.
    fn is_behind(&self, waiting: bool) -> bool {
        waiting || self.has_work() && !self.peer.mailbox.is_crowded()
    }

    /// Whether there is work that can be done now.
    fn is_ready(&self, waiting: bool) -> bool {
        let answerable = !waiting && !self.peer.mailbox.is_crowded();
        self.unheard.is_some() || answerable && self.has_work()
    }

    fn deadline(&self) -> Now {
        self.proof.as_ref().map_or_else(|| self.hellos.deadline(), |proof| proof.deadline)
    }

    /// Handles a slice of the queue, as far as the peer reads the answers.
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
            if let Some(listing) = self.listing.take() {
                self.list(listing);
                continue;
            }
            let heard = self.pending.pop_front()?;
            self.warning.replace(heard.warning.clone());
            match heard.what.clone() {
                Ok(request) => match self.proof.take() {
                    Some(proof) if proof.keys.is_required || request.is_proof() => {
                        if let Err(why) = self.check_proof(proof, request) {
                            return Some(why);
                        }
                    }
                    waived => {
                        if waived.is_some() {
                            self.begin_hellos();
                        }
                        *waiting = self.rest_before(&request, &heard);
                        if waiting.is_none() {
                            *waiting = self.answer(request);
                            self.trying = waiting.is_some().then_some(heard);
                        }
                    }
                },
                Err(bad) => {
                    let about = |service| About { service, protocol: None, port: None };
                    let owes = |proof: &ToProve| proof.keys.is_required || bad.cmd == Some("auth");
                    let owed = self.proof.as_ref().is_some_and(owes);
                    self.fail(&bad.msg, bad.cmd, bad.service.map(about));
                    if bad.fatal || owed {
                        return Some("it sent something that is not a message");
                    }
                }
            }
        }
        None
    }

    /// Parses bytes received. Answers to hellos count at once, even while a data port is being tried.
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
        let is_hello = |heard: &Heard| heard.what == Ok(Request::Hello);
        if self.pending.iter().skip(before).any(is_hello) {
            self.pending.retain(|heard| !is_hello(heard));
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
            if !proof.keys.is_required {
                self.proof = None;
                self.begin_hellos();
                return None;
            }
            self.hub.borrow().counters.proofs_failed.one();
            self.fail_for_secret("no proof of the secret within 5 seconds", Some("auth"), None);
            return Some("it did not prove the secret in time");
        }
        self.hellos.busy(now, self.is_behind(waiting));
        // A reload may have changed the rule.
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
            self.fail_for_secret("prove the secret first, see cmd auth", None, None);
            return Err("it did not prove the secret");
        };
        let Some(identity) = proof.keys.identify(proof.challenge, Arc::clone(&id), &mac) else {
            self.hub.borrow().counters.proofs_failed.one();
            self.hub.borrow_mut().console.secret_unknown(Now::read(), self.peer.address, &id);
            self.fail_for_secret("the mac is wrong: check the secret", Some("auth"), None);
            return Err("it does not know the secret");
        };
        self.peer.ticket = None;
        self.reply(Reply::Authenticated);
        self.hub.borrow_mut().proved(self.peer.source, identity);
        self.begin_hellos();
        Ok(())
    }

    /// Hellos begin once the question of a proof is settled.
    fn begin_hellos(&mut self) {
        self.hellos = Hellos::new(self.hub.borrow().config.health, Now::read());
    }

    /// Puts a change back into the queue if too many came before it. A registration that will be refused
    /// changes nothing, so it is not held back.
    fn rest_before(&mut self, request: &Request, heard: &Heard) -> Option<Waiting> {
        let changes = match request {
            Request::Register(joining) => {
                self.wanted(joining).is_ok_and(|wanted| !self.is_futile(&wanted))
            }
            Request::Unregister { .. } | Request::Drain { .. } | Request::Undrain { .. } => true,
            Request::Hello | Request::Auth { .. } | Request::List { .. } | Request::Services => {
                false
            }
        };
        let wait = if changes { self.pace.ask(Now::read()).err()? } else { return None };
        let warning = self.warning.take();
        self.pending.push_front(Heard { warning, ..heard.clone() });
        Some(Box::pin(async move {
            tokio::time::sleep(wait).await;
            Over::Rested
        }))
    }

    /// Answers a request. Before a registration is answered, its data port is tried.
    fn answer(&mut self, request: Request) -> Option<Waiting> {
        match request {
            Request::Hello => {}
            Request::Auth { .. } => {
                self.fail("no proof is asked for here", Some("auth"), None);
            }
            Request::List { target } => self.begin_list(target.as_ref()),
            Request::Services => self.list(Listing::Services { after: None }),
            Request::Register(joining) => match self.wanted(&joining) {
                Ok(wanted) => return self.register(wanted),
                Err(msg) => {
                    let about = joining.target.about(Some(joining.port));
                    self.fail(&msg, Some("register"), Some(about));
                }
            },
            Request::Unregister { target, port } => {
                let (source, address) = (self.peer.source, self.address(port));
                let change = |service| Change::Unregister { source, service, address };
                self.amend("unregister", &target, port, change, |about, left| {
                    Reply::Unregistered { about, left }
                });
            }
            Request::Drain { target, port, lasts } => {
                let (source, address) = (self.peer.source, self.address(port));
                let change = |service| Change::Drain { source, service, address, lasts };
                self.amend("drain", &target, port, change, |about, left| Reply::DrainStarted {
                    about,
                    left,
                });
            }
            Request::Undrain { target, port } => {
                let (source, address) = (self.peer.source, self.address(port));
                let change = |service| Change::Undrain { source, service, address };
                self.amend("undrain", &target, port, change, |about, left| Reply::UndrainDone {
                    about,
                    left,
                });
            }
        }
        None
    }

    /// Makes a change to a backend of the peer, and answers with the sessions it has left.
    fn amend(
        &self,
        cmd: &'static str,
        target: &Target,
        port: u16,
        change: impl FnOnce(ServiceId) -> Change,
        answer: impl FnOnce(About, u64) -> Reply,
    ) {
        let found = services::meant(&self.hub.borrow().registry, target)
            .map(|service| (service.id, About::of(service, port)));
        match found {
            Ok((service, about)) => {
                let said = about.clone();
                let answer = |hub: &Hub, id| answer(said, hub.sessions_on(id));
                self.change(change(service), cmd, about, answer);
            }
            Err(msg) => self.fail(&msg, Some(cmd), Some(target.about(Some(port)))),
        }
    }

    /// The peer's own address with another port. A link-local address keeps its zone.
    fn address(&self, port: u16) -> SocketAddr {
        let mut address = self.peer.address;
        address.set_port(port);
        address
    }

    /// Makes a change to one backend and sends the answer. Returns whether it was made.
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
                self.reply(answer(&hub, id));
                true
            }
            Err(fault) => {
                drop(hub);
                self.fail(&fault.to_string(), Some(cmd), Some(about));
                false
            }
        }
    }

    fn fail(&self, msg: &str, cmd: Option<&'static str>, about: Option<About>) {
        self.refuse(msg, cmd, about, false);
    }

    /// Likewise, for want of the right secret.
    fn fail_for_secret(&self, msg: &str, cmd: Option<&'static str>, about: Option<About>) {
        self.refuse(msg, cmd, about, true);
    }

    fn refuse(
        &self,
        msg: &str,
        cmd: Option<&'static str>,
        about: Option<About>,
        needs_secret: bool,
    ) {
        let service = about.as_ref().map(|about| &*about.service);
        self.hub.borrow_mut().refused(self.peer.address, cmd, service, msg);
        self.reply(Reply::Failed { msg: msg.to_owned(), cmd, about, needs_secret });
    }

    /// Sends the answer to the present request, with what there is to warn of.
    fn reply(&self, answer: Reply) {
        match self.warning.take() {
            Some(warning) => {
                self.peer.mailbox.send(&Reply::Warned { answer: Box::new(answer), warning });
            }
            None => self.peer.mailbox.send(&answer),
        }
    }

    /// Bytes that the warning takes in that answer.
    fn warning_bytes(&self) -> usize {
        const MEMBER: usize = r#","warning":"#.len();
        let warning = self.warning.borrow();
        let written = warning.as_ref().and_then(|words| serde_json::to_string(words).ok());
        written.map_or(0, |words| MEMBER + words.len())
    }

    /// Has the answer to the present request warn of this as well.
    fn warn(&self, of: &str) {
        let mut warning = self.warning.borrow_mut();
        *warning = Some(warning.take().map_or(of.to_owned(), |before| format!("{before}; {of}")));
    }
}

/// Resolves when the wait is over, and never if there is none.
async fn end_of(waiting: &mut Option<Waiting>) -> Over {
    match waiting {
        Some(waiting) => waiting.await,
        None => std::future::pending().await,
    }
}
