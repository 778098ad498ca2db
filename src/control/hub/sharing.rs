//! One registry with other balancers. Owns the way between the hub and the state machine of the cluster: what is
//! said there of a backend that has registered here, and what is made here of what others say. When to ask the store
//! what is up to that machine, and how to `etcd`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tracing::{info, warn};

use super::Hub;
use crate::base::time::Now;
use crate::cluster::registry::{Applied, Change, Registered};
use crate::cluster::share::event::{self, Command, Event, Gone};
use crate::cluster::share::key::{NodeId, Place};
use crate::cluster::share::value::{NodeReport, Offer, Parting, State, Verb};
use crate::cluster::share::{Membership, Phase, Share};
use crate::cluster::source::Source;
use crate::cluster::{BackendId, Standing};
use crate::control::drain::Stop;
use crate::control::{home, status};

/// How often what others say is held against the registry: a service may have been added since.
const COMPARE_EVERY: Duration = Duration::from_secs(1);
/// How long after a deadline others get to say that their sessions have ended.
const OTHERS_CLOSE_WITHIN: Duration = Duration::from_secs(3);
/// How users are given to backends under `source_hash`, as a number.
const ALGORITHM: u32 = 1;
/// Most addresses that a backend is told of.
const NODES_TOLD_MAX: usize = 16;

/// How long a balancer that has just started waits for the cluster's registry before it calls itself ready.
const FIRST_LIST: Duration = Duration::from_secs(2);

/// This balancer's part in a cluster.
pub struct Sharing {
    pub share: Share,
    pub cluster: String,
    host: Arc<str>,
    control: Vec<String>,
    doors: status::Doors,
    /// Drains that run here for all, with their numbers,
    ours: BTreeMap<BackendId, u64>,
    numbers: u64,
    /// and those that others run.
    theirs: BTreeMap<BackendId, (NodeId, u64)>,
    /// Backends of others that cannot be taken over, and why.
    left_out: BTreeMap<Place, String>,
    compare_at: Now,
    /// From when on a claim that nobody makes is none: a process before this one may have left some.
    settled_at: Now,
    wanted: Rc<Notify>,
    was_live: bool,
    /// Of which snapshot the sums are.
    summed: u64,
    tables: BTreeMap<String, String>,
}

impl Sharing {
    /// Its part as this member, whose backends register at `control`.
    pub fn new(membership: Membership, control: Vec<String>, now: Now) -> Sharing {
        let settled_at = now.plus(membership.lease + membership.orphan);
        Sharing {
            cluster: membership.cluster.clone(),
            host: Arc::clone(&membership.host),
            share: Share::new(membership, now),
            control,
            doors: status::Doors::default(),
            ours: BTreeMap::new(),
            numbers: 0,
            theirs: BTreeMap::new(),
            left_out: BTreeMap::new(),
            compare_at: now,
            settled_at,
            wanted: Rc::default(),
            was_live: false,
            summed: u64::MAX,
            tables: BTreeMap::new(),
        }
    }

    /// The same, of a balancer whose doors are bound there.
    pub fn behind(self, doors: status::Doors) -> Sharing {
        Sharing { doors, ..self }
    }

    /// Notified when there may be something to do at the store.
    pub fn wanted(&self) -> Rc<Notify> {
        Rc::clone(&self.wanted)
    }

    /// What the store is to be asked.
    pub fn commands(&mut self) -> Vec<Command> {
        self.share.commands()
    }

    /// Says the last that is to be said: another process is the cluster's node in place of this one.
    pub(super) fn part(&mut self, now: Now) {
        self.share.part(now);
        self.wanted.notify_one();
    }

    /// Whether the store is known to have everything that is said here.
    pub fn has_said_all(&self) -> bool {
        self.share.has_said_all()
    }

    /// The store has said something to this process, which does nothing else about it any more.
    pub fn hear_last(&mut self, attempt: usize, event: Event, now: Now) {
        self.share.hear(attempt, event, now);
    }

    /// How a drain that runs here for all goes elsewhere: the sessions left, those that were ended, and how many
    /// balancers have yet to say anything. Whom the store has forgotten may be there all the same, until its time is
    /// over.
    pub(super) fn elsewhere(&self, id: BackendId) -> (u64, u64, usize) {
        let Some(number) = self.ours.get(&id) else { return (0, 0, 0) };
        let (left, cut, silent) = self.share.drained(*number);
        let forgotten = self.share.peers().filter(|(_, peer)| !peer.is_stored).count();
        (left, cut, silent + forgotten)
    }

    /// Backends of others that are not served here, and why.
    pub fn left_out(&self) -> impl Iterator<Item = (&Place, &str)> {
        self.left_out.iter().map(|(place, why)| (place, why.as_str()))
    }

    fn say(&mut self, place: &Place, offer: Offer, now: Now) {
        if home::is_link_local(place.address.ip()) {
            return;
        }
        // Loopback means this host to those who are on it.
        let host = place.address.ip().is_loopback().then(|| Arc::clone(&self.host));
        self.share.say(place, Offer { host, ..offer }, now);
        self.wanted.notify_one();
    }
}

impl Hub {
    /// Says in the cluster what has become of backends that registered here.
    pub(super) fn tell_cluster(&mut self, change: &Change, applied: &Applied, now: Now) {
        if self.sharing.is_none() {
            return;
        }
        let is_lost = matches!(change, Change::SourceLost { .. });
        // Who stops serves its users to the end, and its backends go elsewhere by themselves.
        let is_said = !is_lost || self.stop == Stop::Serving;
        let state = if is_lost { State::Lost } else { State::Left };
        let kept = applied.kept.iter().filter_map(|id| self.registry.get(*id));
        let gone: Vec<(BackendId, Place)> =
            applied.left.iter().chain(kept).map(|it| (it.backend.id, self.place(it))).collect();
        let Some(sharing) = &mut self.sharing else { return };
        for (id, place) in gone {
            sharing.ours.remove(&id);
            // One that goes on elsewhere may drain there.
            sharing.theirs.remove(&id);
            if is_said {
                sharing.say(&place, Offer::plain().with(state), now);
            }
        }
        let drains = match change {
            Change::Drain { .. } | Change::DrainBackend { .. } => true,
            Change::Register(_)
            | Change::Weigh { .. }
            | Change::Undrain { .. }
            | Change::UndrainBackend { .. } => false,
            _ => return,
        };
        if let Some(id) = applied.backend {
            self.say_in_cluster(id, drains, now);
        }
    }

    /// Whether the cluster's registry has not been read yet, which is waited for for a moment after the start: who is
    /// sent users before that has none of the others' backends for them.
    pub fn awaits_cluster(&self, now: Now) -> bool {
        let is_unread = self.sharing.as_ref().is_some_and(|it| !it.share.has_listed());
        is_unread && now.since(self.started) < FIRST_LIST
    }

    /// Says in the cluster who has registered here before there was one: at a process before this one.
    pub fn join_cluster(&mut self, sharing: Sharing, now: Now) {
        self.sharing = Some(Box::new(sharing));
        self.tell_cluster_of_all(now);
    }

    /// Says in the cluster who is registered here already: a predecessor may have left them.
    pub fn tell_cluster_of_all(&mut self, now: Now) {
        let all: Vec<BackendId> = self.registry.entries().map(|entry| entry.backend.id).collect();
        all.into_iter().for_each(|id| self.say_in_cluster(id, false, now));
    }

    /// Where the other balancers of the cluster take registrations.
    pub fn cluster_nodes(&self) -> Vec<String> {
        let Some(sharing) = &self.sharing else { return Vec::new() };
        let peers = sharing.share.peers().map(|(_, peer)| peer);
        let peers = peers.filter(|peer| peer.is_stored && peer.report.state == "serving");
        // What loopback is for another host is nothing to a backend of this one.
        let reached = peers.flat_map(|peer| {
            let is_far = peer.report.host != *sharing.host;
            let control = peer.report.control.iter().filter_map(|it| it.parse::<SocketAddr>().ok());
            control.filter(move |it| !(is_far && it.ip().is_loopback()))
        });
        reached.take(NODES_TOLD_MAX).map(|it| it.to_string()).collect()
    }

    fn say_in_cluster(&mut self, id: BackendId, begins_drain: bool, now: Now) {
        let Some(entry) = self.registry.get(id) else { return };
        if entry.source.connection().is_none() {
            return;
        }
        let (place, by) = (self.place(entry), entry.drained_here());
        let lasts = self.draining.get(&id).and_then(|it| it.drain.remaining(now));
        let Some(sharing) = &mut self.sharing else { return };
        let state = match by {
            None => {
                sharing.ours.remove(&id);
                State::Serving
            }
            Some(by) => {
                if begins_drain || !sharing.ours.contains_key(&id) {
                    sharing.numbers += 1;
                    sharing.ours.insert(id, sharing.numbers);
                }
                State::Draining(Parting { by, number: sharing.ours[&id], lasts })
            }
        };
        sharing.say(&place, Offer::of(entry, state), now);
        if let Some(draining) = self.draining.get_mut(&id).filter(|_| by.is_some()) {
            draining.drain.closes_within(OTHERS_CLOSE_WITHIN);
        }
    }

    fn place(&self, entry: &Registered) -> Place {
        let service = self.registry.service(entry.backend.service);
        let (service, protocol) = (Arc::clone(&service.name), service.kind);
        Place { service, protocol, address: entry.backend.address }
    }

    /// Who is registered at a place.
    fn at(&self, place: &Place) -> Option<&Registered> {
        let service = self.registry.named(&place.service);
        let service = service.filter(|it| it.kind == place.protocol)?;
        self.registry.find(service.id, place.address)
    }

    /// The store has said something.
    pub fn heard_from_store(&mut self, attempt: usize, event: Event, now: Now) {
        if let Some(sharing) = &mut self.sharing {
            sharing.share.hear(attempt, event, now);
            self.follow_cluster(now);
        }
    }

    /// Time has passed for the cluster, too.
    pub fn tick_cluster(&mut self, now: Now) {
        let Some(report) = self.report() else { return };
        let Some(sharing) = &mut self.sharing else { return };
        sharing.share.report(report, now);
        sharing.share.tick(now);
        if now >= sharing.compare_at {
            sharing.compare_at = now.plus(COMPARE_EVERY);
            self.compare_cluster(now);
        }
        self.follow_cluster(now);
        self.tell_of_store();
    }

    fn follow_cluster(&mut self, now: Now) {
        let changes = self.sharing.as_mut().map(|it| it.share.changes()).unwrap_or_default();
        for change in changes {
            match change {
                event::Change::Claim { place, offer, owner } => {
                    self.take_over(place, &offer, owner, now);
                }
                event::Change::Unclaim { place, why } => self.give_up(&place, why, now),
                event::Change::Asked { place, verb, from } => self.asked(&place, &verb, &from, now),
            }
        }
    }

    /// Takes over what could not be before.
    fn compare_cluster(&mut self, now: Now) {
        let Some(sharing) = &self.sharing else { return };
        let is_known = |place: &Place, offer: &Offer| {
            let entry = self.at(place).filter(|it| it.is_claimed);
            let drains = matches!(offer.state, State::Draining(_));
            entry.is_some_and(|it| !drains || sharing.theirs.contains_key(&it.backend.id))
                && !sharing.left_out.contains_key(place)
        };
        let missing = sharing.share.claims().filter(|(place, _, offer)| !is_known(place, offer));
        let missing: Vec<(Place, NodeId, Offer)> = missing
            .map(|(place, owner, offer)| (place.clone(), owner.clone(), offer.clone()))
            .collect();
        let (share, settled_at) = (&sharing.share, sharing.settled_at);
        let mut nobodys = Vec::new();
        if share.has_listed() && now >= settled_at {
            let claimed: BTreeSet<&Place> = share.claims().map(|(place, ..)| place).collect();
            let all = self.registry.entries().filter(|entry| entry.is_claimed);
            let places = all.map(|entry| self.place(entry));
            nobodys.extend(places.filter(|place| !claimed.contains(place)));
        }
        for (place, owner, offer) in missing {
            self.take_over(place, &offer, owner, now);
        }
        for place in nobodys {
            self.give_up(&place, Gone::Orphaned, now);
        }
    }

    fn take_over(&mut self, place: Place, offer: &Offer, owner: NodeId, now: Now) {
        let outcome = self.adopt(&place, offer, now);
        let Some(sharing) = &mut self.sharing else { return };
        match outcome {
            Ok(id) => {
                sharing.left_out.remove(&place);
                self.follow_their_drain(id, offer, owner, now);
            }
            Err(reason) => {
                if sharing.left_out.get(&place) != Some(&reason) {
                    warn!(%owner, %place, reason, "a backend of another balancer is left out");
                    sharing.left_out.insert(place, reason);
                }
            }
        }
    }

    fn adopt(&mut self, place: &Place, offer: &Offer, now: Now) -> Result<BackendId, String> {
        let known = self.registry.named(&place.service).filter(|it| it.kind == place.protocol);
        let service = known.ok_or("there is no such service here")?.id;
        if self.leads_here(place) {
            return Err("it is a door of this balancer itself".to_owned());
        }
        let (wanted, drains) = (offer.registration(service, place.address), offer.drains());
        let applied = self.apply(Change::Claim { wanted, drains }, now);
        let applied = applied.map_err(|fault| fault.to_string())?;
        Ok(applied.backend.expect("a claim that was accepted has a backend"))
    }

    fn leads_here(&self, place: &Place) -> bool {
        let Some(sharing) = &self.sharing else { return false };
        let named = home::named_doors(&self.config, place.protocol);
        home::is_own_door(
            &sharing.doors,
            named,
            place.protocol,
            place.address,
            home::is_of_this_host,
        )
    }

    fn follow_their_drain(&mut self, id: BackendId, offer: &Offer, owner: NodeId, now: Now) {
        let Some(sharing) = &mut self.sharing else { return };
        let is_ours = sharing.ours.contains_key(&id);
        match offer.state {
            State::Draining(Parting { number, lasts, .. }) => {
                let drain = (owner, number);
                if sharing.theirs.get(&id) != Some(&drain) {
                    sharing.theirs.insert(id, drain);
                    self.drains_elsewhere(id, lasts, is_ours, now);
                }
            }
            _ => {
                if sharing.theirs.remove(&id).is_some() && !is_ours {
                    self.draining.remove(&id);
                }
            }
        }
    }

    fn give_up(&mut self, place: &Place, why: Gone, now: Now) {
        let Some(sharing) = &mut self.sharing else { return };
        sharing.left_out.remove(place);
        let Some(backend) = self.at(place).map(|entry| &entry.backend) else { return };
        let (id, service) = (backend.id, backend.service);
        let (is_lost, why) = match why {
            Gone::Left => (false, Source::Cluster.why_left()),
            Gone::Lost => (true, "lost at another balancer"),
            Gone::Orphaned => (true, "its balancer is gone"),
        };
        let Some(sharing) = &mut self.sharing else { return };
        if sharing.theirs.remove(&id).is_some() && !sharing.ours.contains_key(&id) {
            self.draining.remove(&id);
        }
        self.make(Change::Unclaim { service, address: place.address, is_lost, why }, now);
    }

    /// An operator has asked another balancer, and that asks us, where the backend is registered.
    fn asked(&mut self, place: &Place, verb: &Verb, from: &str, now: Now) {
        let here = self.at(place).filter(|entry| entry.source.connection().is_some());
        let Some(backend) = here.map(|entry| entry.backend.id) else { return };
        let change = match *verb {
            Verb::Drain(lasts) => Change::DrainBackend { backend, lasts },
            Verb::Undrain => Change::UndrainBackend { backend },
            Verb::Weigh(weight) => Change::Weigh { backend, weight },
        };
        let refused = self.apply(change, now).err().map(|fault| fault.to_string());
        info!(%backend, %place, ?verb, from, refused, "asked by an operator at another balancer");
    }

    /// Passes an operator's change to the balancers where the backend is registered; `None` if it is to be made here.
    ///
    /// # Errors
    /// Nobody could be asked.
    pub fn ask_elsewhere(
        &mut self,
        change: &Change,
        now: Now,
    ) -> Option<Result<BackendId, String>> {
        let (id, verb) = match *change {
            Change::DrainBackend { backend, lasts } => (backend, Verb::Drain(lasts)),
            Change::UndrainBackend { backend } => (backend, Verb::Undrain),
            Change::Weigh { backend, weight } => (backend, Verb::Weigh(weight)),
            _ => return None,
        };
        let entry = self.registry.get(id).filter(|entry| entry.is_claimed)?;
        let (is_theirs, place) = (entry.source == Source::Cluster, self.place(entry));
        if !is_theirs && verb != Verb::Undrain {
            return None;
        }
        let sharing = self.sharing.as_mut()?;
        let asked = sharing.share.ask(&place, &verb, now);
        sharing.wanted.notify_one();
        match (is_theirs, asked) {
            (false, _) => None,
            (true, 0) => Some(Err(format!(
                "{id} is registered at another balancer, which cannot be asked while the store of the cluster \
                 is away: ask it directly"
            ))),
            (true, _) => Some(Ok(id)),
        }
    }

    /// What this balancer says of itself.
    fn report(&mut self) -> Option<NodeReport> {
        let version = self.snapshot.version;
        if self.sharing.as_ref()?.summed != version {
            let tables = self.sums();
            let sharing = self.sharing.as_mut()?;
            (sharing.summed, sharing.tables) = (version, tables);
        }
        let sharing = self.sharing.as_ref()?;
        let state = if self.stop == Stop::Serving { "serving" } else { "stopping" };
        Some(NodeReport {
            control: sharing.control.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            algo: ALGORITHM,
            state: state.to_owned(),
            sessions: self.workers.sessions(),
            host: sharing.host.to_string(),
            tables: sharing.tables.clone(),
            drains: self.drain_reports(sharing),
        })
    }

    /// How the drains go here that others run. Of one that a worker may yet give a session, nothing is said; one that
    /// does not hold here, as the backend has come back elsewhere since, has no sessions here to wait for.
    fn drain_reports(&self, sharing: &Sharing) -> BTreeMap<String, (u64, u64)> {
        let report = |(name, place): (String, &Place)| {
            let drains = self.at(place).filter(|entry| entry.drained_by().is_some());
            let Some(entry) = drains else { return Some((name, (0, 0))) };
            let id = entry.backend.id;
            let draining = self.draining.get(&id)?;
            let is_settled = draining.mark.as_ref().is_some_and(|it| self.workers.have_passed(it));
            is_settled.then(|| (name, (self.sessions_on(id), draining.drain.cut)))
        };
        sharing.share.partings().filter_map(report).collect()
    }

    /// Of each service with backends, a sum over those that are given users, with the key by which users are hashed:
    /// what its table follows from.
    fn sums(&self) -> BTreeMap<String, String> {
        let services = self.snapshot.services.iter();
        let with_backends = services.filter(|service| !service.pool.backends.is_empty());
        let sum = |service: &crate::cluster::Service| {
            let members = service.pool.backends.iter();
            let members = members.filter(|it| it.standing != Standing::Draining);
            let mut all: Vec<(SocketAddr, u16)> =
                members.map(|it| (it.address, it.weight)).collect();
            all.sort_unstable();
            let mut text = String::new();
            for (address, weight) in all {
                let _ = write!(text, "{address}*{weight} ");
            }
            (service.name.to_string(), format!("{:016x}", self.snapshot.key.name(&text)))
        };
        with_backends.map(sum).collect()
    }

    /// Puts into the log that the store is there, or is not any more.
    fn tell_of_store(&mut self) {
        let Some(sharing) = &mut self.sharing else { return };
        let phase = sharing.share.phase();
        let is_live = phase == Phase::Live;
        let is_away = matches!(phase, Phase::Down { .. });
        let cluster = &sharing.cluster;
        if is_live && !sharing.was_live {
            sharing.was_live = true;
            let (node, nodes) = (sharing.share.me(), sharing.share.peers().count() + 1);
            info!(cluster, %node, nodes, "the store of the cluster is there");
        } else if is_away && sharing.was_live {
            sharing.was_live = false;
            let reason = sharing.share.summary().trouble;
            warn!(cluster, reason, "the store of the cluster is away: all that is known goes on");
        }
    }
}

#[cfg(test)]
mod tests;
