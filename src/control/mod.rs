//! The control core: who is registered, who is well, and what the operator sees. Owns the thread that
//! it runs on, the doors for backends and for operators, and the orders to the workers; it never
//! touches a user's byte, and no worker ever waits for it.
//!
//! # Why tokio-uring here, and a ring of their own for the workers
//!
//! Here little happens, most of it is waiting, and async code is the clearer code for that. The
//! workers need what tokio-uring 0.5 does not have: provided buffer rings, multishot operations and
//! the cancellation of an operation. It was also measured. A relay that reads and writes through
//! tokio-uring spent 1.12 to 1.28 times HAProxy's CPU for the same messages; a bare ring with buffer
//! rings spent 0.71 to 0.80 times.
//!
//! # Files
//!
//! | noun | file |
//! |---|---|
//! | the state; the one way in for changes | [`hub`], its `changes` |
//! | one connection's words, sockets, queue | [`conversation`], [`door`], [`mailbox`] |
//! | pure: bytes to objects, objects to requests | [`frame`], [`api`] |
//! | pure: hellos and revivals, drains and the stop | [`health`], [`drain`] |
//! | pure: how fast a connection may change things | [`pace`] |
//! | who may register, what, and who makes room | [`auth`], [`home`], [`crowd`] |
//! | what workers are told and say, and when | [`workers`], [`publication`] |
//! | what the service manager is told | [`manager`] |
//! | changing settings while it runs | [`reload`] |
//! | what people read in the log | [`console`] |
//! | what the admin door says, and how | [`status`], [`view`], [`listing`], [`exposition`], [`page`], [`admin`] |
//! | who has a connection to it | [`places`] |
//! | what operators may change, and who | [`verbs`] |

pub mod admin;
pub mod api;
pub mod auth;
pub mod console;
pub mod conversation;
pub mod crowd;
pub mod door;
pub mod drain;
pub mod exposition;
pub mod frame;
pub mod health;
pub mod home;
pub mod hub;
pub mod listing;
pub mod mailbox;
pub mod manager;
pub mod pace;
pub mod page;
pub mod peer;
pub mod places;
pub mod probe;
pub mod publication;
pub mod reload;
pub mod status;
pub mod verbs;
pub mod view;
pub mod workers;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::MissedTickBehavior;

use crate::base::publish::Publisher;
use crate::base::time::Now;
use crate::cluster::{BackendId, Protocol, Snapshot};
use crate::config::Config;
use crate::worker::link::{ControlEnd, Order};
use admin::{Admin, Listener};
use conversation::House;
use door::Door;
use hub::Hub;
use manager::Manager;
use reload::{Entrance, Reload};
use workers::Workers;

/// How often reports are read and deadlines looked at.
const TICK: Duration = Duration::from_millis(100);
/// Changes that come within so long of the last publication go into the next one together.
const GATHER: Duration = Duration::from_millis(1);
/// Entries of the ring: an accept, and a read and a write for each of a few hundred connections.
/// More are submitted in several goes.
const RING_ENTRIES: u32 = 1024;

/// The bound listeners of the control core; `None` is `off`.
pub struct Listeners {
    pub control: Option<std::net::TcpListener>,
    pub admin: Option<std::net::TcpListener>,
}

/// Everything that the control core needs to run.
pub struct Control {
    pub config: Arc<Config>,
    pub listeners: Listeners,
    /// One for each worker.
    pub ends: Vec<ControlEnd>,
    pub snapshots: Publisher<Snapshot>,
    /// Rung by workers after an urgent report.
    pub urgent: Arc<Notify>,
}

impl Control {
    /// Runs until SIGTERM or SIGINT came and the sessions have ended, and has told the workers to
    /// stop by then; SIGHUP reloads the settings. Blocks the calling thread.
    ///
    /// # Errors
    /// When there is no ring to be had, a secret cannot be read, or a door is open to strangers. The
    /// text is one sentence for the operator. The workers have been told to stop then, too.
    pub fn run(self, reload: Reload) -> io::Result<()> {
        let (ask, asked) = mpsc::channel(2);
        let (ask_to_reload, reloads) = mpsc::channel(1);
        self.run_with(asked, Some((reload, reloads)), async move {
            let mut hangup = signal(SignalKind::hangup())?;
            tokio_uring::spawn(async move {
                while hangup.recv().await.is_some() {
                    // One that waits already will read what this one was sent for.
                    let _ = ask_to_reload.try_send(());
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
                    // A third signal finds the queue full, and says nothing new.
                    let _ = ask.try_send(());
                }
            });
            Ok(())
        })
    }

    /// As [`Control::run`], with something else than signals that asks for the end: once to stop in
    /// order, twice to stop at once.
    ///
    /// # Errors
    /// As [`Control::run`].
    pub fn run_until(self, asked: mpsc::Receiver<()>) -> io::Result<()> {
        self.run_with(asked, None, async { Ok(()) })
    }

    fn run_with(
        self,
        asked: mpsc::Receiver<()>,
        reload: Option<(Reload, mpsc::Receiver<()>)>,
        begin: impl Future<Output = io::Result<()>>,
    ) -> io::Result<()> {
        let Control { config, listeners, ends, snapshots, urgent } = self;
        let hub = Hub::new(Arc::clone(&config), Workers::new(ends), snapshots, Now::read());
        let hub = Rc::new(RefCell::new(hub));
        let outcome = runtime().and_then(|runtime| {
            runtime.block_on(async {
                begin.await?;
                let entrance = Entrance::new(&config).map_err(io::Error::other)?;
                let entrance = Rc::new(RefCell::new(entrance));
                open(&hub, &entrance, &config, listeners)?;
                tokio_uring::spawn(publish(Rc::clone(&hub)));
                turn(&hub, &entrance, &urgent, asked, reload).await;
                Ok(())
            })
        });
        if outcome.is_err() {
            // Nobody else can tell the workers that there will be no balancer.
            hub.borrow_mut().workers.order(Order::Stop);
        }
        outcome
    }
}

fn runtime() -> io::Result<tokio_uring::Runtime> {
    let mut ring = tokio_uring::uring_builder();
    ring.setup_cqsize(4 * RING_ENTRIES);
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&ring);
    tokio_uring::Runtime::new(&builder)
}

/// Lets backends and operators in.
fn open(
    hub: &Rc<RefCell<Hub>>,
    entrance: &Rc<RefCell<Entrance>>,
    config: &Config,
    listeners: Listeners,
) -> io::Result<()> {
    let at = |listener: &Option<std::net::TcpListener>| {
        listener.as_ref().map(std::net::TcpListener::local_addr).transpose()
    };
    let bound = status::Doors {
        tcp: config.listen.tcp,
        udp: config.listen.udp,
        api: config.listen.api,
        control: at(&listeners.control)?,
        admin: at(&listeners.admin)?,
    };
    if let Some(listener) = listeners.control {
        door::prepare(&listener, config.health)?;
        let house = House::new(Rc::clone(hub), bound);
        let door = Door::new(house, Rc::clone(entrance));
        tokio_uring::spawn(door.accept(listener));
    }
    let admin = Admin { hub: Rc::clone(hub), doors: bound, entrance: Rc::clone(entrance) };
    if let Some(path) = &config.admin.socket {
        let socket = Listener::socket(path).map_err(io::Error::other)?;
        tokio_uring::spawn(admin::serve(admin.clone(), socket));
    }
    if let Some(listener) = listeners.admin {
        tokio_uring::spawn(admin::serve(admin, Listener::door(listener)?));
    }
    Ok(())
}

/// Goes on until the balancer was asked to stop and has.
async fn turn(
    hub: &Rc<RefCell<Hub>>,
    entrance: &RefCell<Entrance>,
    urgent: &Notify,
    mut asked: mpsc::Receiver<()>,
    mut reload: Option<(Reload, mpsc::Receiver<()>)>,
) {
    let mut manager = Manager::new(&hub.borrow().workers, Now::read());
    manager.ready();
    let probes = Rc::new(Semaphore::new(probe::AT_ONCE));
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = urgent.notified() => {}
            Some(()) = asked.recv() => hub.borrow_mut().ask_to_stop(Now::read()),
            Some(reload) = reload_asked(&mut reload) => {
                manager.reloading();
                reload.run(hub, entrance);
                manager.ready();
            }
        }
        let outcome = hub.borrow_mut().tick(Now::read());
        if outcome.more {
            urgent.notify_one();
            tokio::task::yield_now().await;
        }
        manager.tick(&hub.borrow(), Now::read());
        if outcome.done {
            return;
        }
        for backend in outcome.revive {
            tokio_uring::spawn(revive(Rc::clone(hub), backend, Rc::clone(&probes)));
        }
    }
}

/// Tells the workers of changes: of the first at once, of those that follow closely together.
async fn publish(hub: Rc<RefCell<Hub>>) {
    let wanted = hub.borrow().publication_wanted();
    loop {
        wanted.notified().await;
        hub.borrow_mut().publish();
        tokio::time::sleep(GATHER).await;
    }
}

/// Waits until a reload is asked for; nothing where none ever can be.
async fn reload_asked(reload: &mut Option<(Reload, mpsc::Receiver<()>)>) -> Option<&mut Reload> {
    let (reload, asked) = reload.as_mut()?;
    asked.recv().await.map(|()| reload)
}

/// Tries a backend that was set aside until it can be connected to or is aside no more. Whether a UDP
/// backend is back cannot be seen from here, so it gets users again after the wait, and if it refuses
/// them the next wait is longer.
async fn revive(hub: Rc<RefCell<Hub>>, id: BackendId, probes: Rc<Semaphore>) {
    loop {
        let Some(next) = hub.borrow_mut().next_try(id) else { return };
        tokio::time::sleep(next.wait).await;
        if next.protocol == Protocol::Udp
            || probe::connects(next.address, next.timeout, &probes).await.is_ok()
        {
            hub.borrow_mut().restore(id, Now::read());
            return;
        }
    }
}
