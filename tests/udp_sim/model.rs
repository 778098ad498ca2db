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

/// Who speaks to which of our addresses.
pub type Flow = (SocketAddr, SocketAddr);

/// A socket as the kernel knows it: its worker, and which opening it is.
pub type Descriptor = (usize, u64);

/// A session as the model saw it last.
#[derive(Clone, Copy)]
pub struct Held {
    pub backend: u32,
    pub address: SocketAddr,
    pub descriptor: Descriptor,
    pub last: Now,
    /// Replies that are still to come.
    pub owed: u64,
    /// An order may have ended it.
    pub doubtful: bool,
    /// When something was sent that has no answer yet.
    pub asked: Option<Now>,
    /// ICMP said what can be believed: it may leave its backend.
    pub refused: bool,
    /// One may have before, so that more replies may be owed.
    pub unsure: bool,
}

#[derive(Default)]
pub struct Model {
    pub held: HashMap<(usize, Flow), Held>,
    /// Who last used a backend's address with a descriptor, and until when a reply may come.
    pub pairs: HashMap<(Descriptor, SocketAddr), (Flow, Now)>,
    /// Where the affinity map should find a flow: the holder and the backend.
    pub noted: HashMap<Flow, (usize, u32)>,
    pub delivered: u64,
    pub moved: u64,
    pub found: u64,
}

impl World {
    /// What the model has to say about a datagram that goes out.
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
        // Also of a session that may have ended: it may as well run on.
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
            // Whether the worker told the others depends on whether the session was over.
            self.model.noted.remove(&flow);
        } else if before.is_none_or(|held| held.backend != id) {
            self.model.noted.insert(flow, (which, id));
        }
        self.answer(flow, by, to, alive);
        Ok(())
    }

    /// A flow that is new here does not run at another worker that told of it.
    fn expect_alone(&mut self, which: usize, flow: Flow, to: SocketAddr) -> Outcome {
        let Some((holder, id)) = self.model.noted.get(&flow).copied() else { return Ok(()) };
        let Some(held) = self.running(holder, flow) else { return Ok(()) };
        if holder == which || held.backend != id {
            return Ok(());
        }
        violated(format!("{flow:?} has {} elsewhere and got {to}", held.address))
    }

    /// The session of a flow, if it cannot have ended.
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

    /// Whether a worker has no reason to leave a backend.
    fn is_fit(&self, which: usize, held: Held) -> bool {
        let refused = self.workers[which].refused.get(&held.address).copied().unwrap_or_default();
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

    /// Nobody is turned away for want of room while a session is there that is not in use any more,
    /// on every backend that could serve; and the share of a source is for those that have
    /// sessions.
    fn check_room(&mut self, which: usize, flow: Flow, why: DropReason) -> Outcome {
        let has_some =
            |ip| self.model.held.keys().any(|(by, held)| *by == which && held.0.ip() == ip);
        if why == DropReason::SourceShare && is_of_flood(flow) && !has_some(flow.0.ip()) {
            return violated(format!("{flow:?} was told that it has too much, and has nothing"));
        }
        if self.idle[which].0 != self.now {
            self.idle[which] = (self.now, self.idle_at(which));
        }
        // Without a step of time nothing becomes idle, but some that were may have given way.
        let room = self.is_room_among(&self.idle[which].1, why)
            && self.is_room_among(&self.idle_at(which), why);
        // A session that runs and is to be moved asks no more than one backend.
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

    /// Where a worker has sessions that are not in use any more, one address for each of them. The
    /// books do not say to which of our addresses a user speaks, so one who spoke to both at once
    /// is left out.
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

    /// What the model makes of a reply that went to its user.
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
