//! The control core: which backends are registered, which are healthy, and what the operator sees. Owns
//! the thread it runs on, the doors for backends and for operators, and the orders to the workers. It
//! never touches a user's byte, and no worker ever waits for it.
//!
//! # Why tokio-uring here, and a ring of their own for the workers
//!
//! Little happens here, and most of it is waiting, which async code expresses best. The workers need
//! what tokio-uring 0.5 lacks: provided buffer rings, multishot operations and cancellation. We also
//! measured it: for the same messages, a relay that reads and writes through tokio-uring took 1.12 to
//! 1.28 times HAProxy's CPU, and a bare ring with buffer rings 0.71 to 0.80 times.
//!
//! # What tokio-uring does here
//!
//! It runs every task and timer of this thread, and its ring waits for the control connections: each
//! accept, read and write that cannot go on is one poll operation there ([`stream`]), and its completion
//! wakes the task. The accept, read or write itself is then an ordinary call that does not block. The
//! ring holds no operation that carries data, because one in flight takes bytes as they come, whether or
//! not anybody is still there to be given them; so a connection can be left alone, or handed to somebody
//! else, at any moment, and everything its peer has sent is still in its socket. The sockets that time
//! limits are put on (operators, checks and probes) are the runtime's own, which wait by epoll and may be
//! dropped at any time.
//!
//! # Files
//!
//! | noun | file |
//! |---|---|
//! | the state, and the only way to change it | [`hub`], its `changes` |
//! | one connection: dialogue, its way through the door, socket, queues | [`conversation`], [`door`], [`stream`], [`intake`], [`mailbox`] |
//! | what a successor in another process goes on with | [`legacy`], `hub::legacy` |
//! | pure: from bytes to objects to requests | [`frame`], [`api`] |
//! | the store of a cluster: etcd | [`etcd`], [`membership`], `hub::sharing` |
//! | pure: hellos and revivals, drains and shutdown | [`health`], [`drain`] |
//! | checks of backends: when, what they come to, and how one goes | [`checks`], [`checker`], [`health_call`], `hub::checking` |
//! | backends that the configuration lists | `hub::listed` |
//! | pure: how fast a connection may make changes | [`pace`] |
//! | who may register for what, which address, and who makes room | [`auth`], [`rights`], [`home`], [`crowd`] |
//! | pure: the users' doors, and the way to others | [`doors`] |
//! | whether a data port accepts connections, and a connection of our own to it | [`probe`], [`contact`] |
//! | services by their names | [`services`] |
//! | what the workers are told and report, and when | [`workers`], [`publication`] |
//! | what the service manager is told | [`manager`] |
//! | changing settings at runtime | [`reload`] |
//! | the log lines | [`console`] |
//! | what the admin door serves, and how | [`status`], [`cluster_status`], [`view`], [`listing`], [`exposition`], [`readiness`], [`page`], [`admin`], [`socket`] |
//! | pure: the last 15 minutes | [`history`] |
//! | pure: since when a backend is in its state | [`steadiness`] |
//! | who holds a connection to it | [`places`], [`peer`] |
//! | what operators may change, and who | [`verbs`] |

pub mod admin;
pub mod api;
pub mod auth;
pub mod certificates;
pub mod checker;
pub mod checks;
pub mod cluster_status;
pub mod console;
pub mod contact;
pub mod conversation;
pub mod crowd;
pub mod door;
pub mod doors;
pub mod drain;
pub mod etcd;
pub mod exposition;
pub mod frame;
pub mod health;
pub mod health_call;
pub mod history;
pub mod home;
pub mod hub;
pub mod inheritance;
pub mod intake;
pub mod kin;
pub mod legacy;
pub mod listing;
pub mod mailbox;
pub mod manager;
pub mod membership;
pub mod pace;
pub mod page;
pub mod peer;
pub mod places;
pub mod probe;
pub mod publication;
pub mod readiness;
pub mod reload;
pub mod rights;
pub mod services;
pub mod socket;
pub mod status;
pub mod steadiness;
pub mod stream;
pub mod succession;
pub mod verbs;
pub mod view;
pub mod workers;

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;
use tracing::info;

use crate::base::publish::Publisher;
use crate::base::thread;
use crate::base::time::Now;
use crate::cluster::{BackendId, Snapshot};
use crate::config::Config;
use crate::worker::link::{ControlEnd, Order};
use admin::{AdminDoor, Listener};
use conversation::{Conversation, Shared};
use door::ControlDoor;
use doors::UserDoors;
use hub::Hub;
use inheritance::Heard;
use kin::Kin;
use manager::Manager;
use reload::{Entrance, Reload};
use succession::Means;
use workers::Workers;

/// How often reports are read and deadlines checked.
const TICK: Duration = Duration::from_millis(100);
/// Changes that arrive this soon after a publication are published together in the next one,
const GATHER: Duration = Duration::from_millis(1);
/// or this many times as long as the publication took, if that is longer: with very many backends the core
/// still has most of its time for other work.
const GATHER_FACTOR: u32 = 4;
/// Ring entries: one accept, and a read and a write to wait for on each of a few hundred connections.
/// Beyond that, operations are submitted in several batches.
const RING_ENTRIES: u32 = 1024;

/// The bound listeners of the control core; `None` means `off`.
pub struct Listeners {
    pub control: Option<std::net::TcpListener>,
    pub admin: Option<std::net::TcpListener>,
    /// The unix socket for operators.
    pub socket: Option<std::os::unix::net::UnixListener>,
}

/// How a control core has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    Stopped,
    /// Another process serves in the place of this one.
    Succeeded,
    /// Another process had everything, and has ended before it served.
    Orphaned,
}

/// Everything the control core needs to run.
pub struct Control {
    pub config: Arc<Config>,
    /// What the settings leave to the host and has been worked out, as `key = value`.
    pub derived: Vec<String>,
    /// This balancer's name in `Via`, if it was made up at the start.
    pub via: Option<String>,
    pub listeners: Listeners,
    /// One per worker.
    pub ends: Vec<ControlEnd>,
    pub snapshots: Publisher<Snapshot>,
    pub doors: UserDoors,
    /// Notified by workers after an urgent report.
    pub urgent: Arc<Notify>,
}

impl Control {
    /// Runs until SIGTERM or SIGINT has arrived and the sessions have ended, and tells the workers to
    /// stop before it returns. SIGHUP reloads the settings. Blocks the calling thread.
    ///
    /// # Errors
    /// When no ring can be set up, a secret cannot be read, or a door would be open to strangers. The
    /// text is one sentence for the operator. The workers are told to stop in this case, too.
    pub fn run(self, reload: Reload, mut means: Means) -> io::Result<Ending> {
        if let Some(old) = means.old.take() {
            // Nothing may be lacking any more once the predecessor has left.
            let runtime = runtime()?;
            let (heir, heard) = inheritance::take_up(self, old).map_err(io::Error::other)?;
            return heir.run(runtime, reload, (means, Some(heard)));
        }
        signals(reload, |asks, begin| self.run_with((asks, begin), (means, None)))
    }

    /// Like [`Control::run`], but `asked` takes the place of the signals: the first message starts an
    /// orderly stop, a second one stops at once.
    ///
    /// # Errors
    /// As [`Control::run`].
    pub fn run_until(self, asked: mpsc::Receiver<()>) -> io::Result<()> {
        let asks = (Asks { stops: asked, reloads: None }, nobody);
        self.run_with(asks, (Means::none(), None)).map(drop)
    }

    fn run_with(
        self,
        asks: (Asks, impl FnOnce(Rc<Notify>) -> Begin),
        kin: KinMeans,
    ) -> io::Result<Ending> {
        let (hub, rest) = self.parts(Now::read());
        run(&hub, rest, runtime(), asks, kin, |rest| {
            hub.borrow_mut().start(Now::read());
            Ok((Core::new(&hub, rest)?, Vec::new()))
        })
    }

    /// The state, and what is left of this without it.
    fn parts(self, now: Now) -> (Rc<RefCell<Hub>>, Rest) {
        let Control { config, derived, via, listeners, ends, snapshots, doors, urgent } = self;
        let mut hub = Hub::new(Arc::clone(&config), Workers::new(ends), snapshots, now);
        (hub.doors, hub.derived) = (doors, derived);
        (Rc::new(RefCell::new(hub)), Rest { config, via, listeners, urgent })
    }
}

/// What the control core is started with, beside its state.
struct Rest {
    config: Arc<Config>,
    via: Option<String>,
    listeners: Listeners,
    urgent: Arc<Notify>,
}

/// A running control core, or one that is about to run.
pub struct Core {
    pub hub: Rc<RefCell<Hub>>,
    entrance: Rc<RefCell<Entrance>>,
    via: Option<String>,
    door: Rc<ControlDoor>,
    admin: AdminDoor,
    /// The tasks that let others in.
    doors: RefCell<Vec<AbortHandle>>,
    /// The way to the cluster's store, until it is taken.
    store: RefCell<Option<membership::Joined>>,
}

impl Core {
    /// # Errors
    /// When a secret cannot be read, or a door would be open to strangers; one sentence for the operator.
    fn new(hub: &Rc<RefCell<Hub>>, rest: &Rest) -> io::Result<Core> {
        let Rest { config, via, listeners, .. } = rest;
        let at = |listener: &Option<std::net::TcpListener>| {
            listener.as_ref().map(std::net::TcpListener::local_addr).transpose()
        };
        let bound = status::Doors {
            tcp: config.listen.tcp,
            udp: config.listen.udp,
            api: config.listen.api,
            api_tls: config.listen.api_tls,
            control: at(&listeners.control)?,
            admin: at(&listeners.admin)?,
        };
        let entrance = Entrance::new(config).map_err(io::Error::other)?;
        let entrance = Rc::new(RefCell::new(entrance));
        if let Some(listener) = &listeners.control {
            door::prepare(listener, config.health)?;
        }
        let shared = Shared::new(Rc::clone(hub), bound);
        Ok(Core {
            door: Rc::new(ControlDoor::new(shared, Rc::clone(&entrance))),
            admin: AdminDoor { hub: Rc::clone(hub), doors: bound, entrance: Rc::clone(&entrance) },
            hub: Rc::clone(hub),
            entrance,
            via: via.clone(),
            doors: RefCell::default(),
            store: RefCell::new(membership::join(hub, config, bound).map_err(io::Error::other)?),
        })
    }

    /// Goes on with these connections, opens the doors and starts what goes on by itself.
    fn begin(&self, lines: Vec<Line>, listeners: Listeners) -> io::Result<()> {
        for (stream, conversation) in lines {
            self.door.begin(stream, conversation);
        }
        self.open(listeners)?;
        if let Some((store, heard)) = self.store.take() {
            tokio_uring::spawn(membership::share(Rc::clone(&self.hub), store, heard));
        }
        tokio_uring::spawn(publish(Rc::clone(&self.hub)));
        tokio_uring::spawn(check(Rc::clone(&self.hub)));
        Ok(())
    }

    /// Opens the doors for backends and operators.
    fn open(&self, listeners: Listeners) -> io::Result<()> {
        let mut doors = self.doors.borrow_mut();
        let mut open = |task: tokio::task::JoinHandle<()>| doors.push(task.abort_handle());
        if let Some(listener) = listeners.control {
            let door = Rc::clone(&self.door);
            open(tokio_uring::spawn(door.accept(stream::Listener::new(listener)?)));
        }
        if let Some(socket) = listeners.socket {
            open(tokio_uring::spawn(admin::serve(self.admin.clone(), Listener::socket(socket)?)));
        }
        if let Some(listener) = listeners.admin {
            open(tokio_uring::spawn(admin::serve(self.admin.clone(), Listener::door(listener)?)));
        }
        Ok(())
    }
}

/// What is asked of a running control core from outside its doors.
struct Asks {
    stops: mpsc::Receiver<()>,
    reloads: Option<(Reload, mpsc::Receiver<()>)>,
}

/// What a core needs of the processes before and after it.
type KinMeans = (Means, Option<Heard>);

/// What begins to listen to whoever asks, before the doors are open.
type Begin = Pin<Box<dyn Future<Output = io::Result<()>>>>;

/// Runs with what signals ask for: `run` is given that, and what begins to listen for them and notifies of the wish
/// for a successor.
fn signals<T>(
    reload: Reload,
    run: impl FnOnce(Asks, Box<dyn FnOnce(Rc<Notify>) -> Begin>) -> T,
) -> T {
    let (ask, stops) = mpsc::channel(2);
    let (ask_to_reload, reloads) = mpsc::channel(1);
    let begin = |upgrade_wanted: Rc<Notify>| -> Begin {
        Box::pin(async move {
            let mut hangup = signal(SignalKind::hangup())?;
            tokio_uring::spawn(async move {
                while hangup.recv().await.is_some() {
                    // A reload already queued will read the files this one was asked for.
                    let _ = ask_to_reload.try_send(());
                }
            });
            let mut upgrade = signal(SignalKind::user_defined2())?;
            tokio_uring::spawn(async move {
                while upgrade.recv().await.is_some() {
                    upgrade_wanted.notify_one();
                }
            });
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            tokio_uring::spawn(async move {
                loop {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                    // A third signal finds the queue full, and adds nothing.
                    let _ = ask.try_send(());
                }
            });
            thread::accept_signals();
            Ok(())
        })
    };
    run(Asks { stops, reloads: Some((reload, reloads)) }, Box::new(begin))
}

/// Nobody but the caller asks for anything.
fn nobody(_: Rc<Notify>) -> Begin {
    Box::pin(async { Ok(()) })
}

/// A connection that is gone on with.
type Line = (stream::Stream, Conversation);

/// Makes a core and runs it, with the connections that it goes on with.
fn run(
    hub: &Rc<RefCell<Hub>>,
    rest: Rest,
    runtime: io::Result<tokio_uring::Runtime>,
    (asks, begin): (Asks, impl FnOnce(Rc<Notify>) -> Begin),
    (means, heard): KinMeans,
    make: impl FnOnce(&Rest) -> io::Result<(Core, Vec<Line>)>,
) -> io::Result<Ending> {
    let outcome = runtime.and_then(|runtime| {
        runtime.block_on(async {
            let upgrade_wanted = Rc::clone(&hub.borrow().upgrade_wanted);
            begin(upgrade_wanted).await?;
            let (core, lines) = make(&rest)?;
            let Rest { listeners, urgent, .. } = rest;
            core.begin(lines, listeners)?;
            let kin = Kin::new(&core, means, heard);
            turn(&core, &urgent, asks, kin).await;
            let hub = hub.borrow();
            Ok(match (hub.is_orphaned(), hub.is_handed_over()) {
                (true, _) => Ending::Orphaned,
                (false, true) => Ending::Succeeded,
                (false, false) => Ending::Stopped,
            })
        })
    });
    if outcome.is_err() {
        // Only the control core can tell the workers that there will be no balancer.
        hub.borrow_mut().workers.order(Order::Stop);
    }
    outcome
}

/// Whether the control core could set up its own ring here.
///
/// # Errors
/// A sentence for the operator that includes the cure.
pub fn try_ring() -> io::Result<()> {
    runtime().map(drop)
}

fn runtime() -> io::Result<tokio_uring::Runtime> {
    let mut ring = tokio_uring::uring_builder();
    ring.setup_cqsize(4 * RING_ENTRIES);
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&ring);
    crate::ring::probe::patiently(|| tokio_uring::Runtime::new(&builder))
        .map_err(|error| io::Error::other(crate::ring::probe::explain(&error)))
}

/// The main loop. Returns once the balancer has been asked to stop and has stopped, or a successor serves and
/// what was left here has ended.
async fn turn(core: &Core, urgent: &Notify, asks: Asks, mut kin: Kin) {
    let Core { hub, entrance, .. } = core;
    let Asks { mut stops, mut reloads } = asks;
    let mut manager = Manager::new(&hub.borrow(), Now::read());
    manager.ready();
    let probes = Rc::new(Semaphore::new(probe::AT_ONCE));
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = urgent.notified() => {}
            Some(()) = stops.recv() => hub.borrow_mut().ask_to_stop(Now::read()),
            Some(reload) = reload_asked(&mut reloads) => {
                if hub.borrow().is_handed_over() {
                    info!("settings are not read again: that is up to the process that serves now");
                } else {
                    manager.reloading();
                    reload.run(hub, entrance, Now::read());
                    manager.ready();
                }
            }
            news = kin.next() => kin.take(news, core, &mut manager),
        }
        if let Some((reload, _)) = reloads.as_mut().filter(|_| !hub.borrow().is_handed_over()) {
            reload.look_at_certificates(hub, Now::read());
        }
        let outcome = hub.borrow_mut().tick(Now::read());
        if outcome.more {
            urgent.notify_one();
            tokio::task::yield_now().await;
        }
        kin.pass_on(core);
        kin.tell(Now::read(), outcome.done);
        manager.tick(&hub.borrow(), Now::read());
        if outcome.done && !kin.is_between(core, Now::read()) {
            return;
        }
        for backend in outcome.revive {
            tokio_uring::spawn(revive(Rc::clone(hub), backend, Rc::clone(&probes)));
        }
    }
}

/// Publishes changes to the workers: the first at once, those that follow closely in one batch.
async fn publish(hub: Rc<RefCell<Hub>>) {
    let wanted = hub.borrow().publication_wanted();
    loop {
        wanted.notified().await;
        let begun = Now::read();
        hub.borrow_mut().publish();
        let took = Now::read().since(begun);
        tokio::time::sleep(GATHER.max(took * GATHER_FACTOR)).await;
    }
}

/// Checks backends when it is time to.
async fn check(hub: Rc<RefCell<Hub>>) {
    let wanted = hub.borrow().checks_wanted();
    loop {
        let now = Now::read();
        let next = hub.borrow_mut().next_check(now);
        let Some((due, target)) = next else {
            let rest = hub.borrow().checks_rest(now);
            let _ = tokio::time::timeout(rest, wanted.notified()).await;
            continue;
        };
        let hub = Rc::clone(&hub);
        tokio_uring::spawn(async move {
            let outcome = checker::check(&target).await;
            let ended = Now::read();
            hub.borrow_mut().checked(due, outcome, ended.since(now), ended);
        });
    }
}

/// Waits for a request to reload; `None` if there can never be one.
async fn reload_asked(reload: &mut Option<(Reload, mpsc::Receiver<()>)>) -> Option<&mut Reload> {
    let (reload, asked) = reload.as_mut()?;
    asked.recv().await.map(|()| reload)
}

/// Tries a backend that was set aside until it is found to be back, or is no longer aside. From here nothing shows whether a UDP backend is back, or one that must not be tried, so it gets
/// users again after the wait; if it refuses them, the next wait is longer.
async fn revive(hub: Rc<RefCell<Hub>>, id: BackendId, probes: Rc<Semaphore>) {
    loop {
        let Some(next) = hub.borrow_mut().next_try(id) else { return };
        tokio::time::sleep(next.wait).await;
        if next.trial.succeeds(&probes).await {
            hub.borrow_mut().restore(id, &next.trial, Now::read());
            return;
        }
    }
}
