//! What a control core leaves to its successor in another process, which goes on with it so that no backend
//! notices: no connection is lost, no hello missed, no half of a message forgotten, no counter goes back. Owns
//! the standstill, the description and its bounds, and the order in which it is taken up.
//!
//! # How it stands still
//!
//! The control core is one thread, and everything that its tasks know lies in the hub, in conversations, intakes
//! and mailboxes, never inside a task that waits. So it stands still for as long as its thread does something
//! else: [`Core::freeze`] begins that, and whoever holds a [`Frozen`] must not wait for the runtime before it is
//! thawed or left. Nothing is read, written, accepted, decided or published meanwhile; what comes stays in the
//! sockets. There is nothing to be waited for, and a thaw is no more than going on.
//!
//! # The seam
//!
//! ```text
//! predecessor                                      successor
//!   core.prelude(hub) -- names, Via -->               prelude.number(&mut config), before anything is built
//!   core.freeze()
//!   frozen.describe() -- JSON, descriptors -->       control.inherit(&legacy, sockets, now)
//!                                                      builds everything, publishes to its workers, touches no socket
//!   frozen.leave(), or frozen.thaw()     commit      heir.run(reload): connections and doors go on
//!   remains.tell(), now and then -- JSON -->         core.hear(&news)
//! ```
//!
//! After [`Frozen::leave`] the control core of the predecessor goes on for the sessions that its workers still
//! have: it hears their reports and counts them. It lets nobody in, tells no backend anything and refuses
//! changes. [`Remains::tell`] says what was counted since and which sessions are left, so that drains in the
//! successor wait for them too.
//!
//! # What is taken up, and what is not
//!
//! Times are on the clock of the predecessor, whose origin the successor has inherited ([`Now`]). Services keep
//! their numbers, backends their ids and places, connections theirs. A check that runs, a trial of a backend set
//! aside and the trial of a data port are begun anew. Requests to the admin door are answered by whoever has
//! accepted them. Log quotas begin anew. Counters are handed on by name; gauges are seen for oneself.

pub mod bytes;
pub mod counts;
pub mod format;
mod heir;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::Core;
use super::hub::Hub;
use crate::base::time::Now;
use crate::cluster::{BackendId, Protocol, Service, ServiceId};
use crate::config::Config;
use counts::Counts;
pub use format::Legacy;
pub use heir::Heir;

/// The most that a description may take.
pub const BYTES_MAX: usize = 16 << 20;

impl Legacy {
    /// The description as it travels.
    ///
    /// # Errors
    /// That it is too long, in a sentence.
    pub fn to_json(&self) -> Result<Vec<u8>, String> {
        let json = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        match json.len() {
            0..=BYTES_MAX => Ok(json),
            bytes => Err(format!(
                "the description of backends and connections takes {bytes} bytes, and may take \
                 {BYTES_MAX}: try again when less is queued for them"
            )),
        }
    }

    /// A description that has arrived. Whether it makes sense is seen when it is taken up.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn from_json(json: &[u8]) -> Result<Legacy, String> {
        if json.len() > BYTES_MAX {
            return Err(format!("a description of {} bytes is too long", json.len()));
        }
        serde_json::from_slice(json).map_err(|error| format!("not a description: {error}"))
    }
}

const NO_NUMBER: &str = "there are no numbers left for services: restart in place of upgrading";

/// What a successor must know before it builds anything.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Prelude {
    /// The balancer's name in `Via`, if it was made up.
    pub via: Option<String>,
    services: Vec<Numbered>,
}

/// The number of a service.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Numbered {
    id: u16,
    name: String,
    protocol: Option<Protocol>,
    /// It has been removed, and still has sessions.
    is_leaving: bool,
}

impl Prelude {
    /// Gives services the numbers that they have had, so that what is said of them here and there is said of the
    /// same. A service that is new gets a number that none has.
    ///
    /// # Errors
    /// In a sentence with the cure: a service of that name was of another protocol.
    pub fn number(&self, config: &mut Config) -> Result<(), String> {
        let first = Protocol::ALL.len() as u16;
        let mut next = first;
        let taken: BTreeSet<u16> = self.services.iter().map(|it| it.id).collect();
        let known = |name: &str| self.services.iter().find(|it| !it.is_leaving && it.name == name);
        for service in &mut config.services {
            let name = &service.name;
            service.id = match known(name) {
                Some(it) if it.protocol.is_some_and(|it| it != service.protocol) => {
                    return Err(format!(
                        "service.{name}.protocol has changed: give the new service another name, or restart"
                    ));
                }
                Some(it) => ServiceId(it.id),
                None => {
                    let mut free = (next..ServiceId::NOBODY.0).filter(|id| !taken.contains(id));
                    let id = free.next().ok_or(NO_NUMBER)?;
                    next = id + 1;
                    ServiceId(id)
                }
            };
        }
        config.services.sort_by_key(|service| service.id);
        let ids = || config.services.iter().map(|service| service.id);
        let is_possible = ids().all(|id| (first..ServiceId::NOBODY.0).contains(&id.0))
            && ids().zip(ids().skip(1)).all(|(one, next)| one < next);
        is_possible.then_some(()).ok_or_else(|| "the numbers of services make no sense".to_owned())
    }
}

impl Core {
    /// What a successor must know before everything else; `hub` is that of this core.
    pub fn prelude(&self, hub: &Hub) -> Prelude {
        let numbered = |service: &Service| Numbered {
            id: service.id.0,
            name: service.name.to_string(),
            protocol: Some(service.kind),
            is_leaving: !hub.registry.is_known(service.id),
        };
        Prelude { via: self.via.clone(), services: hub.registry.services().map(numbered).collect() }
    }

    /// Has the control core stand still. Until that is over, the caller must not wait for anything that the
    /// runtime of this thread does.
    pub fn freeze(&self, now: Now) -> Frozen<'_> {
        Frozen { core: self, since: now, said: Cell::default() }
    }

    /// A predecessor tells what it has counted since, and which sessions it has left.
    ///
    /// # Errors
    /// What makes no sense in that, in a sentence; nothing has changed.
    pub fn hear(&self, news: &News) -> Result<(), String> {
        news.counts.check()?;
        let mut hub = self.hub.borrow_mut();
        hub.add_counts(&news.counts);
        let left = news.sessions.iter().map(|(id, sessions)| (BackendId(*id), *sessions));
        let sane = left.map(|(id, sessions)| (id, sessions.min(u64::from(u32::MAX))));
        hub.set_elsewhere(&sane.collect::<Vec<_>>());
        Ok(())
    }

    /// The predecessor is gone, and with it the sessions it had left.
    pub fn predecessor_gone(&self) {
        self.hub.borrow_mut().set_elsewhere(&[]);
    }
}

/// A control core that stands still.
#[must_use = "it is thawed, or left"]
pub struct Frozen<'c> {
    core: &'c Core,
    since: Now,
    /// What the description says of counters.
    said: Cell<Option<Counts>>,
}

impl Frozen<'_> {
    /// Everything that it knows, and the sockets of its connections in the order in which the description numbers
    /// them. They stay open here.
    pub fn describe(&self) -> (Legacy, Vec<RawFd>) {
        let hub = self.core.hub.borrow();
        let mut legacy = hub.describe(self.since);
        let mut sockets = Vec::new();
        self.core.door.lines().each(|source, line| {
            let Some(member) = hub.members.get(&source) else { return };
            legacy.connections.push(format::Connection {
                number: source.connection().unwrap_or_default(),
                socket: sockets.len(),
                identity: member.identity.as_ref().map(|it| it.describe()),
                answered: member.answered,
                misses: member.misses,
                ..line.talk.borrow().describe()
            });
            sockets.push(line.stream.as_raw_fd());
        });
        self.said.set(Some(legacy.counts.clone()));
        (legacy, sockets)
    }

    /// Goes on as if nothing had been. The time is held against nobody.
    pub fn thaw(self, now: Now) {
        let Frozen { core, since, .. } = self;
        core.door.lines().each(|_, line| line.talk.borrow_mut().stood_still(since, now));
    }

    /// Another has taken everything up. Connections are let go of without a word, and from now on this control
    /// core only looks after what its workers have left, for as long as a drain lasts.
    pub fn leave(self, now: Now) -> Remains {
        let core = self.core;
        core.doors.borrow().iter().for_each(|door| door.abort());
        core.door.lines().let_go();
        let mut hub = core.hub.borrow_mut();
        let said = self.said.take().unwrap_or_else(|| hub.counts());
        hub.hand_over(now);
        Remains { hub: Rc::clone(&core.hub), said }
    }
}

/// What a control core still has that has been left.
pub struct Remains {
    hub: Rc<RefCell<Hub>>,
    /// What the successor knows of.
    said: Counts,
}

/// What a predecessor has to say afterwards.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct News {
    /// Counted since the description, or since the last news.
    pub counts: Counts,
    /// Sessions left, by backend.
    pub sessions: Vec<(u32, u64)>,
}

impl Remains {
    /// Says what has been counted since the last time, and which sessions are left. If `say` returns false, nobody
    /// has heard it, and it is said again the next time.
    pub fn tell(&mut self, say: impl FnOnce(&News) -> bool) {
        let hub = self.hub.borrow();
        let counts = hub.counts();
        let sessions = hub.sessions_here().into_iter().map(|(id, count)| (id.0, count)).collect();
        if say(&News { counts: counts.since(&self.said), sessions }) {
            self.said = counts;
        }
    }
}

#[cfg(test)]
mod tests;
