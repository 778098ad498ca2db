//! The processes before and after this one, as the control core's main loop hears of them. Owns what is done
//! about the news; the steps of a handover are `succession`'s and `inheritance`'s.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tracing::{info, warn};

use super::Core;
use super::inheritance::Heard;
use super::manager::Manager;
use super::succession::{Failure, Means, Started, Succession};
use crate::base::time::Now;
use crate::estate::Estate;
use crate::estate::api::UserRecord;
use crate::estate::format::State;
use crate::handover::channel::Packet;
use crate::handover::words::Word;

/// How long after a handover to which somebody came late it is tried once more.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How often the successor is told what is still counted here.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What there is to hear.
pub enum News {
    /// An operator wants a successor to take over.
    Wanted,
    /// One could go on, or there is none.
    Started(Started),
    /// The predecessor has said something.
    Heard(Packet<Word>),
    /// The predecessor has ended.
    Alone,
}

/// Both of them.
pub struct Kin {
    wanted: Rc<Notify>,
    succession: Succession,
    started: mpsc::Receiver<Started>,
    heard: Option<Heard>,
    /// The last handover came to nothing, and another follows.
    has_failed: bool,
    /// When the successor is told again what is counted here.
    next_tell: Now,
    /// Users from the predecessor for whom the workers have no room yet.
    guests: VecDeque<Estate<OwnedFd>>,
}

impl Kin {
    /// Those of a core that could have a successor by these means, and is in the place of another if that is still
    /// `heard`.
    pub fn new(core: &Core, means: Means, heard: Option<Heard>) -> Kin {
        let mut hub = core.hub.borrow_mut();
        hub.handover.barred = means.program.as_ref().err().cloned();
        let wanted = Rc::clone(&hub.upgrade_wanted);
        let (succession, started) = Succession::new(means);
        let next_tell = Now::default();
        Kin {
            wanted,
            succession,
            started,
            heard,
            has_failed: false,
            next_tell,
            guests: VecDeque::new(),
        }
    }

    /// The next news.
    pub async fn next(&mut self) -> News {
        tokio::select! {
            () = self.wanted.notified() => News::Wanted,
            Some(started) = self.started.recv() => News::Started(started),
            // Whoever waits is let in first.
            heard = heard(&mut self.heard), if self.guests.is_empty() => {
                heard.map_or(News::Alone, News::Heard)
            }
        }
    }

    /// Does what is to be done about it.
    pub fn take(&mut self, news: News, core: &Core, manager: &mut Manager) {
        match news {
            News::Wanted => {
                if let Err(why) = self.succession.ask(core) {
                    warn!(reason = why, "no successor is started");
                    // One that is under way, or has succeeded, is not to be taken for this one.
                    if self.succession.is_serving() {
                        self.has_failed = false;
                        core.hub.borrow_mut().handover.failed(Now::read(), "ask", why);
                    }
                }
            }
            News::Started(started) => match self.succession.started(started, core) {
                // Whoever manages services is not to be told of a process that is not there any more.
                Ok(()) if core.hub.borrow().is_orphaned() => {}
                Ok(()) => self.succession.successor().into_iter().for_each(|successor| {
                    manager.is_succeeded_by(successor.pid());
                    successor.is_main();
                }),
                Err(failure) => self.failed(failure, core),
            },
            News::Heard(Packet { word: Word::Main, .. }) => manager.is_main(&core.hub.borrow()),
            News::Heard(Packet { word: Word::Difference, body, .. }) => {
                let news = serde_json::from_slice(&body).map_err(|error| error.to_string());
                if let Err(reason) = news.and_then(|news| core.hear(&news)) {
                    warn!(reason, "what the predecessor still counts is not understood");
                }
            }
            News::Heard(Packet { word: Word::Late, body, descriptors }) => {
                if let Err(reason) = self.receive(&body, descriptors) {
                    warn!(reason, "users from the predecessor cannot be taken up");
                }
                self.pass_on(core);
            }
            News::Heard(_) => {}
            News::Alone => {
                info!("the process that was succeeded has ended");
                self.heard = None;
                core.predecessor_gone();
                manager.is_main(&core.hub.borrow());
            }
        }
    }

    /// Tries once more if somebody was late.
    fn failed(&mut self, failure: Failure, core: &Core) {
        let Failure { step, refusal } = failure;
        let is_first = !std::mem::replace(&mut self.has_failed, true);
        if refusal.may_pass && is_first {
            let wanted = Rc::clone(&self.wanted);
            tokio_uring::spawn(async move {
                tokio::time::sleep(AGAIN_AFTER).await;
                wanted.notify_one();
            });
            return;
        }
        self.has_failed = false;
        core.hub.borrow_mut().handover.failed(Now::read(), step, refusal.why);
    }

    /// Users come from the predecessor.
    fn receive(&mut self, text: &[u8], sockets: Vec<OwnedFd>) -> Result<(), String> {
        let Some(Heard { beside, .. }) = &self.heard else { return Ok(()) };
        for mut estate in State::read(text, sockets)?.estates {
            let door =
                |user: &mut UserRecord| user.door = beside.asked_for_as(user.door.get()).into();
            estate.api.amend(door);
            self.guests.push_back(estate);
        }
        Ok(())
    }

    /// Has users go on where they are served: here, or in the successor if there is one. Called on every tick.
    pub fn pass_on(&mut self, core: &Core) {
        let workers = &core.hub.borrow().workers;
        let Some(successor) = self.succession.successor() else {
            while let Some(guest) = self.guests.pop_front() {
                if let Err(guest) = workers.take_in(guest) {
                    return self.guests.push_front(*guest);
                }
            }
            return;
        };
        for estate in self.guests.drain(..).chain(workers.departed()) {
            let passed =
                if workers.lets_depart() { successor.pass(estate) } else { Err(Box::new(estate)) };
            if let Err(estate) = passed {
                // They stay, and all others too. A worker that has no room for them has ended.
                workers.let_depart(false);
                let _ = workers.take_in(*estate);
            }
        }
    }

    /// Whether somebody may still have to be passed on from the predecessor to the successor.
    pub fn is_between(&self, core: &Core, now: Now) -> bool {
        self.heard.is_some() && core.hub.borrow().may_linger(now)
    }

    /// Tells the successor what is still counted here, if there is one and it is time, or this process is done.
    /// Called on every tick.
    pub fn tell(&mut self, now: Now, is_done: bool) {
        if is_done || now >= self.next_tell {
            self.next_tell = now.plus(TELL_EVERY);
            self.succession.tell();
        }
    }
}

/// The next message; `None` once there can be no more. Never, if there is nobody to hear.
async fn heard(from: &mut Option<Heard>) -> Option<Packet<Word>> {
    match from {
        Some(from) => from.packets.recv().await,
        None => std::future::pending().await,
    }
}
