//! How this balancer leaves everything to a successor. Owns the order of the steps, the time that each may take,
//! and the way back; what the two processes say is `handover`'s, what the control core knows is `legacy`'s, and
//! what the workers have their own.
//!
//! The successor starts while this balancer serves, on a thread that only waits for it. From the standstill on
//! this thread blocks, so that nothing changes meanwhile. Whatever fails before the successor has taken the
//! token leads back: the workers thaw, and go on as if nothing had been.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::{debug, error, info};

use super::Core;
use super::doors::OpenDoor;
use super::drain::Stop;
use super::hub::Hub;
use super::legacy::{Frozen, Remains};
use crate::base::thread;
use crate::base::time::Now;
use crate::estate::ahead::Ahead;
use crate::estate::format::{NEWEST, OLDEST, State};
use crate::handover::predecessor::Predecessor;
use crate::handover::successor::{Program, Refusal, Successor};
use crate::handover::words::{Hello, Offer, OwnDoor, UserDoor};
use crate::handover::{out_of_descriptors, rehearsal};
use crate::ring::sys;
use crate::worker::brake::Request;

/// How long the workers may take to stand still, and as long again to describe what they have.
const STILL_PATIENCE: Duration = Duration::from_millis(500);
/// For how long sockets are sent ahead, at most.
const AHEAD_TIME: Duration = Duration::from_millis(500);
/// How long the successor may take from then until it serves.
const TAKING_PATIENCE: Duration = Duration::from_secs(1);
/// How long it may take to say so once it has taken the token.
const RUNNING_PATIENCE: Duration = Duration::from_secs(1);

/// What a handover needs from the code that started the balancer.
pub struct Means {
    /// How it was started; or why it can have no successor.
    pub program: Result<Program, String>,
    /// The listeners of its own doors.
    pub own: Vec<(OwnDoor, OwnedFd)>,
    /// The claims to its workers' cores.
    pub claims: Vec<(usize, OwnedFd)>,
    /// The cores that it was started with.
    pub cores: Vec<usize>,
    /// The balancer in whose place it is, and the doors whose sockets are still to come from there.
    pub old: Option<(Predecessor, Vec<OpenDoor>)>,
}

impl Means {
    /// Of a balancer that can have no successor, and has no predecessor.
    pub fn none() -> Means {
        let program = Err("this balancer was not started by `lb serve`".into());
        let (own, claims, cores) = (Vec::new(), Vec::new(), Vec::new());
        Means { program, own, claims, cores, old: None }
    }
}

/// A successor that could go on, or why there is none.
pub type Started = Result<(Successor, Offer), Failure>;

/// Why everything stays here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The step at which it failed, as counters name it.
    pub step: &'static str,
    pub refusal: Refusal,
}

/// The failure of a step.
fn at(step: &'static str) -> impl Fn(Refusal) -> Failure {
    move |refusal| Failure { step, refusal }
}

enum Phase {
    Serving,
    /// A successor has been started, after this many reloads.
    Starting {
        reloads: u64,
    },
    /// It serves; what could not be handed over goes on here.
    Lingering(Successor, Remains),
}

/// The one handover that this process may come to.
pub struct Succession {
    program: Result<Program, String>,
    own: Vec<(OwnDoor, OwnedFd)>,
    claims: Vec<(usize, OwnedFd)>,
    cores: Vec<usize>,
    phase: Phase,
    starts: mpsc::Sender<Started>,
}

impl Succession {
    /// No handover yet. The receiver gets what comes of each successor that is started.
    pub fn new(means: Means) -> (Succession, mpsc::Receiver<Started>) {
        let (starts, started) = mpsc::channel(1);
        let Means { program, own, claims, cores, old: _ } = means;
        (Succession { program, own, claims, cores, phase: Phase::Serving, starts }, started)
    }

    /// Starts a successor, if this balancer can have one now; what comes of it is said later.
    ///
    /// # Errors
    /// Why it cannot: a sentence.
    pub fn ask(&mut self, core: &Core) -> Result<(), String> {
        let hub = &mut *core.hub.borrow_mut();
        let program = self.program.clone()?;
        match self.phase {
            Phase::Serving if hub.stop == Stop::Serving => {}
            Phase::Serving => return Err("the balancer is stopping".into()),
            Phase::Starting { .. } => {
                return Err("an upgrade is under way: wait for its outcome".into());
            }
            Phase::Lingering(..) => return Err("this process has been succeeded already".into()),
        }
        let hello = self.hello(core, hub);
        let own = self.own.iter().map(|(_, listener)| listener);
        let passed = own.chain(self.claims.iter().map(|(_, claim)| claim));
        let passed: Result<Vec<OwnedFd>, _> = passed.map(OwnedFd::try_clone).collect();
        let passed = passed.map_err(|error| out_of_descriptors(&error))?;
        let (cores, starts) = (self.cores.clone(), self.starts.clone());
        let started = thread::spawn("lb-upgrade", move || {
            // The successor inherits this thread's cores, and is to choose among all of them.
            sys::pin(&cores);
            // If the control core has ended meanwhile, so does the successor, which is left nothing.
            let _ = starts.blocking_send(start(&program, &hello, &passed));
        });
        started.map_err(|error| format!("cannot start a thread: {error}; raise `ulimit -u`"))?;
        info!("starting a successor");
        self.phase = Phase::Starting { reloads: hub.counters.reloads.get() };
        hub.handover.begun();
        Ok(())
    }

    fn hello(&self, core: &Core, hub: &Hub) -> Hello {
        let user_door = |door: &OpenDoor| UserDoor {
            id: door.id.0,
            name: door.name.to_string(),
            protocol: door.protocol,
            asked: door.asked,
            address: door.address,
            is_tls: door.is_tls,
        };
        Hello {
            formats: (OLDEST, NEWEST),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: hub.handover.generation,
            clock_origin: Now::origin(),
            prelude: serde_json::to_value(core.prelude(hub)).unwrap_or_default(),
            via: core.via.clone(),
            doors: hub.doors.open().iter().map(user_door).collect(),
            next_door: hub.doors.next_number(),
            own_doors: self.own.iter().map(|(door, _)| door.clone()).collect(),
            cores: self.claims.iter().map(|(core, _)| *core).collect(),
        }
    }

    /// A successor could go on, or there is none. Leaves everything to it, and it serves from then on.
    ///
    /// # Errors
    /// Why this process goes on.
    pub fn started(&mut self, started: Started, core: &Core) -> Result<(), Failure> {
        let told = std::mem::replace(&mut self.phase, Phase::Serving);
        let now = core.hub.borrow().counters.reloads.get();
        let handed = started.and_then(|(mut successor, offer)| match told {
            Phase::Starting { reloads } if reloads != now => {
                successor.end();
                let why = "the settings were reloaded while it started";
                Err(at("offer")(Refusal::passing(why)))
            }
            _ => hand_over(successor, &offer, core),
        });
        let (successor, remains) = handed.inspect_err(|Failure { step, refusal }| {
            error!(step, reason = refusal.why, "no successor: this process goes on");
        })?;
        if !core.hub.borrow().is_orphaned() {
            info!(pid = successor.pid(), "a successor serves in this process's place");
        }
        self.phase = Phase::Lingering(successor, remains);
        // Nobody else is to have them when the successor closes them.
        (self.own, self.claims) = (Vec::new(), Vec::new());
        core.hub.borrow_mut().handover.lingers();
        Ok(())
    }

    /// The process that serves now, once it does.
    pub fn successor(&self) -> Option<&Successor> {
        match &self.phase {
            Phase::Lingering(successor, _) => Some(successor),
            Phase::Serving | Phase::Starting { .. } => None,
        }
    }

    /// Whether no successor is under way, and none serves.
    pub fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Serving)
    }

    /// Tells the successor what has been counted here since it was last told, and which sessions are left.
    pub fn tell(&mut self) {
        if let Phase::Lingering(successor, remains) = &mut self.phase {
            remains.tell(|news| serde_json::to_vec(news).is_ok_and(|news| successor.add(&news)));
        }
    }
}

/// Starts a successor and hears whether it could go on.
fn start(program: &Program, hello: &Hello, passed: &[OwnedFd]) -> Started {
    let mut successor = Successor::start(program).map_err(at("start"))?;
    let passed: Vec<RawFd> = passed.iter().map(AsRawFd::as_raw_fd).collect();
    match successor.greet(hello, &passed) {
        Ok(offer) => Ok((successor, offer)),
        Err(refusal) => {
            successor.end();
            // Somebody who waits is told at once; a start that is too slow will be so again.
            Err(at("start")(Refusal::lasting(refusal.why)))
        }
    }
}

/// Stands still, leaves everything, and waits until the successor serves.
fn hand_over(
    mut successor: Successor,
    offer: &Offer,
    core: &Core,
) -> Result<(Successor, Remains), Failure> {
    if let Err(why) = may_go(offer, &core.hub.borrow()) {
        successor.end();
        return Err(at("offer")(Refusal::lasting(why)));
    }
    if offer.expects
        && let Err(refusal) = send_ahead(&mut successor, &core.hub.borrow())
    {
        successor.end();
        return Err(at("ahead")(refusal));
    }
    // Workers know of every change that has been acknowledged.
    core.hub.borrow_mut().publish();
    let frozen = core.freeze(Now::read());
    let mut is_lost = false;
    if let Err(failure) = leave_everything(&mut successor, core, &frozen) {
        if successor.call_off() {
            core.hub.borrow().workers.ask(Request::Thaw);
            frozen.thaw(Now::read());
            // Nobody waits for that any more.
            successor.end();
            return Err(failure);
        }
        // It has everything, and is late to say so.
        if let Err(Refusal { why, .. }) = successor.await_running(RUNNING_PATIENCE) {
            error!(reason = why, "the successor has taken over and does not say that it serves");
            is_lost = successor.has_ended();
        }
    }
    core.hub.borrow().workers.let_depart(offer.takes_late);
    core.hub.borrow().workers.ask(Request::Leave);
    let remains = frozen.leave(Now::read());
    if is_lost {
        core.hub.borrow_mut().orphan(Now::read());
    }
    Ok((successor, remains))
}

/// Sends what sessions live on while they still move: that takes most of the time. What cannot be sent now goes with
/// everything else.
fn send_ahead(successor: &mut Successor, hub: &Hub) -> Result<(), Refusal> {
    let begun = Now::read();
    let mut sent = 0;
    for worker in (0u8..).take(hub.workers.count()) {
        let mut first = 0;
        while Now::read().since(begun) < AHEAD_TIME {
            let Some(sockets) = hub.workers.sockets(worker, first == 0, STILL_PATIENCE) else {
                let why = "a worker does not turn: see its line in lb status";
                return Err(Refusal::passing(why));
            };
            let count = sockets.len() as u32;
            if count == 0 {
                break;
            }
            successor.send_ahead(&Ahead { worker, first, sockets })?;
            first += count;
        }
        sent += first;
    }
    successor.await_expecting(TAKING_PATIENCE)?;
    let took_us = Now::read().since(begun).as_micros() as u64;
    debug!(sessions = sent, took_us, "sent ahead what sessions live on");
    Ok(())
}

/// Whether nobody would lose a door.
fn may_go(offer: &Offer, hub: &Hub) -> Result<(), String> {
    if hub.stop != Stop::Serving {
        return Err("the balancer is stopping".into());
    }
    if hub.doors.closing() > 0 {
        let why = "a UDP door that was removed still has sessions: try again when it has closed";
        return Err(why.into());
    }
    let gone = |door: &&OpenDoor| offer.doors_gone.contains(&door.id.0);
    let lost = hub.doors.open().iter().filter(gone).find(|door| hub.sessions_of(door.service) > 0);
    let Some(OpenDoor { name, address, .. }) = lost else { return Ok(()) };
    Err(format!(
        "the settings have no door {name} at {address} any more, and its service has sessions: drain it, \
         keep the door, or restart in place of upgrading"
    ))
}

fn leave_everything(
    successor: &mut Successor,
    core: &Core,
    frozen: &Frozen<'_>,
) -> Result<(), Failure> {
    let begun = Now::read();
    let have = |request| core.hub.borrow().workers.have(request, STILL_PATIENCE);
    if !have(Request::Freeze) {
        let why = "a worker does not stand still: see its line in lb status";
        return Err(at("freeze")(Refusal::passing(why)));
    }
    let frozen_at = Now::read();
    rehearsal::pause_at("frozen");
    if !have(Request::Describe) {
        let why = "a worker does not say what it has: see its line in lb status";
        return Err(at("describe")(Refusal::passing(why)));
    }
    let (legacy, sockets) = frozen.describe();
    let legacy = legacy.to_json().map_err(Refusal::passing).map_err(at("describe"))?;
    let estates = core.hub.borrow().workers.estates();
    let (state, sockets) = State { legacy: (legacy, sockets), estates }.write();
    let described = Now::read();
    successor.leave_to(&state, &sockets, TAKING_PATIENCE).map_err(at("state"))?;
    let sent = Now::read();
    rehearsal::pause_at("sent");
    successor.await_running(TAKING_PATIENCE).map_err(at("commit"))?;
    debug!(
        freeze_us = frozen_at.since(begun).as_micros() as u64,
        describe_us = described.since(frozen_at).as_micros() as u64,
        send_us = sent.since(described).as_micros() as u64,
        take_us = Now::read().since(sent).as_micros() as u64,
        bytes = state.len(),
        descriptors = sockets.len(),
        "left everything"
    );
    Ok(())
}
