//! The shadow model: the sessions as an outside observer knows them, and what may not happen to
//! one.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::Standing;
use lb::worker::udp::sessions::DropReason;

use crate::plan::{LATE, Pressure, TICK, in_use_for};
use crate::world::{Outcome, World, is_of_flood, local, violated};

/// A user's address, and the local address the user sends to.
pub type Flow = (SocketAddr, SocketAddr);

/// A descriptor: its worker, and a number that is new for every socket opened.
pub type Descriptor = (usize, u64);

/// A session, as the model last saw it.
#[derive(Clone, Copy)]
pub struct Held {
    pub backend: u32,
    pub address: SocketAddr,
    pub descriptor: Descriptor,
    pub last: Now,
    /// Outstanding replies.
    pub owed: u64,
    /// An order may have ended it.
    pub doubtful: bool,
    /// When the last datagram was sent, if it has no answer yet.
    pub asked: Option<Now>,
    /// ICMP has credibly reported its backend unreachable: it may move.
    pub refused: bool,
    /// An order may have ended it before, so `owed` may be wrong.
    pub unsure: bool,
}

#[derive(Default)]
pub struct Model {
    pub held: HashMap<(usize, Flow), Held>,
    /// By descriptor and backend address: the flow that last used the pair, and when it is clean.
    pub pairs: HashMap<(Descriptor, SocketAddr), (Flow, Now)>,
    /// The worker and the backend that the affinity map should have for a flow.
    pub noted: HashMap<Flow, (usize, u32)>,
    pub delivered: u64,
    pub moved: u64,
    pub found: u64,
}

impl World {
    /// Checks a datagram that is sent to a backend, and follows it.
    pub fn sent(
        &mut self,
        which: usize,
        flow: Flow,
        by: Descriptor,
        to: SocketAddr,
        datagrams: u64,
    ) -> Outcome {
        let Some((id, backend)) = self.backends.iter().find(|(_, b)| b.address == to) else {
            return violated(format!("{flow:?} was sent to {to}, where nobody is registered"));
        };
        let (id, alive) = (*id, backend.alive);
        let before = self.running(which, flow);
        let maybe_running = self.may_run(which, flow);
        match before {
            Some(held)
                if self.is_fit(which, held) && (held.address, held.descriptor) != (to, by) =>
            {
                return violated(format!("{flow:?} left {} for {to} without need", held.address));
            }
            Some(held) if held.address != to => self.model.moved += 1,
            Some(_) => {}
            None if maybe_running => {}
            None => self.expect_alone(which, flow, to)?,
        }
        if let Some((other, clean)) = self.model.pairs.get(&(by, to))
            && *other != flow
            && self.now < *clean
        {
            return violated(format!("{flow:?} was given the pair of {other:?} too early"));
        }
        let last = self.now;
        let same = before.filter(|held| (held.address, held.descriptor) == (to, by));
        let owed = same.map_or(0, |held| held.owed) + datagrams;
        self.model.pairs.insert((by, to), (flow, last.plus(in_use_for(owed))));
        // A session that may have ended may also still be running.
        let known = self.model.held.get(&(which, flow));
        let held = Held {
            backend: id,
            address: to,
            descriptor: by,
            last,
            owed,
            doubtful: false,
            asked: Some(last),
            refused: known.is_some_and(|held| held.refused && held.address == to),
            unsure: known.is_some_and(|held| held.doubtful || held.unsure),
        };
        self.model.held.insert((which, flow), held);
        if maybe_running && before.is_none() {
            // Whether the map was changed depends on whether the session had ended.
            self.model.noted.remove(&flow);
        } else if before.is_none_or(|held| held.backend != id) {
            self.model.noted.insert(flow, (which, id));
        }
        self.answer(flow, by, to, alive);
        Ok(())
    }

    /// Checks that a flow that is new here is not running at the worker the map names.
    fn expect_alone(&mut self, which: usize, flow: Flow, to: SocketAddr) -> Outcome {
        let Some((holder, id)) = self.model.noted.get(&flow).copied() else { return Ok(()) };
        let Some(held) = self.running(holder, flow) else { return Ok(()) };
        if holder == which || held.backend != id {
            return Ok(());
        }
        violated(format!("{flow:?} has {} elsewhere and got {to}", held.address))
    }

    /// The session of a flow, if it is certain to be running.
    pub fn running(&self, which: usize, flow: Flow) -> Option<Held> {
        let held = self.model.held.get(&(which, flow)).copied()?;
        let until = held.last.plus(in_use_for(held.owed).min(self.pressure.idle()));
        (self.now < until && !held.doubtful).then_some(held)
    }

    /// Whether a flow may have a session here.
    pub fn may_run(&self, which: usize, flow: Flow) -> bool {
        let held = self.model.held.get(&(which, flow));
        held.is_some_and(|held| self.now < held.last.plus(self.pressure.idle() + LATE))
    }

    /// Whether a session has no reason to leave its backend.
    fn is_fit(&self, which: usize, held: Held) -> bool {
        let refused =
            self.workers[which].avoided_until.get(&held.address).copied().unwrap_or_default();
        let backend = self.backends.get(&held.backend);
        let fit = backend
            .is_some_and(|backend| backend.standing != Standing::Aside && self.now >= refused);
        fit && !held.refused
    }

    pub fn shed(&mut self, which: usize, flow: Flow, why: DropReason) -> Outcome {
        let running = self.running(which, flow).filter(|held| self.is_fit(which, *held));
        if running.is_some() {
            return violated(format!("{flow:?} has a session and was dropped: {why:?}"));
        }
        self.check_room(which, flow, why)?;
        let serving = self.backends.values().any(|b| b.standing == Standing::Serving);
        if why == DropReason::NoBackend && serving {
            return violated(format!("{flow:?} was told that there is no backend"));
        }
        Ok(())
    }

    /// Checks that nobody is turned away for lack of room while every serving backend has a session
    /// that is no longer in use, and that only sources with sessions are told they exceed their
    /// share.
    fn check_room(&mut self, which: usize, flow: Flow, why: DropReason) -> Outcome {
        let has_some =
            |ip| self.model.held.keys().any(|(by, held)| *by == which && held.0.ip() == ip);
        if why == DropReason::SourceShare && is_of_flood(flow) && !has_some(flow.0.ip()) {
            return violated(format!("{flow:?} was told that it has too much, and has nothing"));
        }
        if self.idle[which].0 != self.now {
            self.idle[which] = (self.now, self.idle_at(which));
        }
        // Within one step nothing becomes idle, but idle sessions may have been evicted.
        let room = self.is_room_among(&self.idle[which].1, why)
            && self.is_room_among(&self.idle_at(which), why);
        // A running session that has to move tries one backend only.
        if room && !self.may_run(which, flow) {
            return violated(format!("{flow:?} found no room ({why:?}) beside idle sessions"));
        }
        Ok(())
    }

    fn is_room_among(&self, idle: &[SocketAddr], why: DropReason) -> bool {
        let mut serving = self.backends.values().filter(|b| b.standing == Standing::Serving);
        match why {
            DropReason::TableFull => !idle.is_empty(),
            DropReason::UpstreamExhausted if (1..=4).contains(&serving.clone().count()) => {
                serving.all(|backend| idle.contains(&backend.address))
            }
            _ => false,
        }
    }

    /// The backend addresses of a worker's sessions that are no longer in use, one for each. The
    /// books do not say which local address a user sends to, so a user who sent to both at once is
    /// left out.
    fn idle_at(&self, which: usize) -> Vec<SocketAddr> {
        let sessions = self.workers[which].shard.iter();
        let held = sessions.filter_map(|listed| {
            let of = |number| self.model.held.get(&(which, (listed.client, local(number))));
            let mut held = [of(0), of(1)].into_iter().flatten();
            let is_it = |held: &&Held| held.last == listed.active;
            held.find(is_it).filter(|_| !held.any(|other| is_it(&other)))
        });
        let is_over = |held: &&Held| {
            let until = held.last.plus(in_use_for(held.owed).min(self.pressure.idle()) + TICK);
            !held.doubtful && !held.unsure && self.now >= until
        };
        held.filter(is_over).map(|held| held.address).collect()
    }

    /// Follows a reply that reached its user.
    pub fn hear(&mut self, descriptor: Descriptor, from: SocketAddr, flow: Flow) {
        let mut wait = in_use_for(0);
        if let Some(held) = self.model.held.get_mut(&(descriptor.0, flow)) {
            let waits = self.now < held.last.plus(in_use_for(held.owed));
            held.owed = if waits { held.owed.saturating_sub(1) } else { 0 };
            (held.last, held.asked, held.refused) = (self.now, None, false);
            wait = in_use_for(held.owed);
            if held.owed == 0 && self.pressure == Pressure::Answers {
                wait = Duration::from_millis(500);
                self.model.held.remove(&(descriptor.0, flow));
                self.model.noted.remove(&flow);
            }
        }
        self.model.pairs.insert((descriptor, from), (flow, self.now.plus(wait)));
    }
}
