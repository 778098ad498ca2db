//! The UDP sessions of one worker: which session a datagram belongs to, and which sessions have been
//! idle too long. Owns the table and its timers. What a session holds is up to its user, and what
//! happens to a datagram is up to `proxy::udp`. Knows no clock.

use std::hash::Hasher;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use hashbrown::HashTable;
use siphasher::sip::SipHasher13;

use crate::base::time::Now;
use crate::base::wheel::{self, Wheel};
use crate::cluster::ServiceId;

/// Flows for which places are reserved at the start, so that they seldom have to be moved. Places are
/// used in order, and the kernel provides the memory page by page.
const PLACES_AT_START: usize = 128 * 1024;
/// Flows for which the index has room at the start. Access to it is random, so a large, nearly empty
/// index costs every look-up two cache misses. Growing it moves index entries without reading a flow:
/// about a millisecond, once, on the way to 100,000 flows.
const INDEX_AT_START: usize = 4 * 1024;

/// How long after a datagram a session still counts as in use, because more may be on its way to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waits {
    /// If every datagram has been answered.
    pub quiet: Duration,
    /// If an answer is outstanding.
    pub answer: Duration,
    /// If the last answer it can get has arrived: only duplicates made by the network can follow.
    pub copies: Duration,
}

impl Default for Waits {
    fn default() -> Waits {
        Waits {
            quiet: Duration::from_secs(2),
            // A resolver retries after 5 s (man 5 resolv.conf, `timeout`); a later answer is of no
            // use to anyone.
            answer: Duration::from_secs(5),
            copies: Duration::from_millis(500),
        }
    }
}

/// What makes a datagram part of a session: who sent it, and which of our addresses it was sent to.
/// IPv4 addresses and their mapped IPv6 forms are the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowKey {
    client: u128,
    local: u128,
    client_port: u16,
    local_port: u16,
    /// The interface, if either address is link-local and so means nothing without it. If the local
    /// address is unspecified: the interface the datagram arrived on.
    scope: u32,
}

impl FlowKey {
    pub fn new(client: SocketAddr, local: SocketAddr) -> FlowKey {
        let scope = match (client, local) {
            (SocketAddr::V6(v6), _) if has_scope(v6.ip()) => v6.scope_id(),
            (_, SocketAddr::V6(v6)) if has_scope(v6.ip()) => v6.scope_id(),
            _ => 0,
        };
        FlowKey {
            client: bits(client.ip()),
            local: bits(local.ip()),
            client_port: client.port(),
            local_port: local.port(),
            scope,
        }
    }

    pub fn client(&self) -> SocketAddr {
        address(self.client, self.client_port, self.scope)
    }

    pub fn local(&self) -> SocketAddr {
        address(self.local, self.local_port, self.scope)
    }
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => MAPPED << 32 | u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn address(bits: u128, port: u16, scope: u32) -> SocketAddr {
    if bits >> 32 == MAPPED {
        return SocketAddr::from((Ipv4Addr::from_bits(bits as u32), port));
    }
    let v6 = Ipv6Addr::from_bits(bits);
    let scope = if has_scope(&v6) { scope } else { 0 };
    SocketAddr::V6(SocketAddrV6::new(v6, port, 0, scope))
}

/// Whether an address is only meaningful together with an interface.
fn has_scope(ip: &Ipv6Addr) -> bool {
    ip.is_unicast_link_local() || ip.is_unspecified()
}

/// The prefix of an IPv4 address in its mapped form.
const MAPPED: u128 = 0xffff;

/// Hashes addresses under a secret key. All workers share the key, so that they can refer to a flow
/// by its hash.
#[derive(Clone, Copy, Debug)]
pub struct FlowHasher {
    key: (u64, u64),
}

impl FlowHasher {
    /// `key` comes from the system's randomness, once per process.
    pub fn new(key: (u64, u64)) -> FlowHasher {
        FlowHasher { key }
    }

    pub fn flow(&self, key: &FlowKey) -> u64 {
        let ports = u64::from(key.client_port) << 16 | u64::from(key.local_port);
        let rest = ports | u64::from(key.scope) << 32;
        let (client, local) = (key.client, key.local);
        // IPv4 addresses and their ports fit into two words; the number of words is hashed as well.
        if (client >> 32, local >> 32) == (MAPPED, MAPPED) {
            return self.words([u64::from(client as u32) << 32 | u64::from(local as u32), rest]);
        }
        self.words([(client >> 64) as u64, client as u64, (local >> 64) as u64, local as u64, rest])
    }

    pub fn address(&self, address: SocketAddr) -> u64 {
        let (ip, port) = (bits(address.ip()), u64::from(address.port()));
        if ip >> 32 == MAPPED {
            return self.words([u64::from(ip as u32) << 32 | port]);
        }
        self.words([(ip >> 64) as u64, ip as u64, port])
    }

    /// SipHash-1-3 (J.-P. Aumasson, D. Bernstein, "SipHash: a fast short-input PRF", INDOCRYPT 2012)
    /// over whole words, whose number is known at compile time.
    pub fn words<const COUNT: usize>(&self, words: [u64; COUNT]) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(self.key.0, self.key.1);
        words.into_iter().for_each(|word| hasher.write_u64(word));
        hasher.finish()
    }
}

/// One session in the table.
#[derive(Clone, Debug)]
pub struct Flow<S> {
    pub key: FlowKey,
    /// When a datagram last passed, in either direction. Updating this is all it takes to keep a flow;
    /// [`Flows::pass`] does.
    pub last_seen: Now,
    service: ServiceId,
    /// An answer is outstanding.
    pub awaiting: bool,
    /// Nothing has passed for long enough that the flow no longer counts as in use; see
    /// [`Flows::stir`].
    quiet: bool,
    /// When its timer fires; datagrams that pass do not change it.
    look: Now,
    pub state: S,
}

impl<S> Flow<S> {
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }
}

/// The state of a flow through which nothing passes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Due {
    /// It no longer counts as in use.
    Quiet,
    /// The idle time has passed: the caller closes it.
    Idle,
}

/// A flow in the index.
#[derive(Clone, Copy, Debug)]
struct Indexed {
    place: u32,
    /// Half of the flow's hash, which serves as the index key: it rules out most other flows without
    /// reading them.
    word: u32,
}

impl Indexed {
    /// The hash for the index, which needs its bits spread (D. Knuth, "The Art of Computer
    /// Programming", volume 3, section 6.4).
    fn spread(word: u32) -> u64 {
        u64::from(word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// Up to `capacity` flows, found by key or by place, and ended after the idle time of their service.
pub struct Flows<S> {
    hasher: FlowHasher,
    times: Times,
    capacity: usize,
    index: HashTable<Indexed>,
    places: Vec<Option<Flow<S>>>,
    free: Vec<u32>,
    timers: Wheel,
}

/// How long a flow lasts without datagrams.
struct Times {
    /// By the number of the service; it has none until it is set.
    idle: Vec<Duration>,
    idle_max: Duration,
    waits: Waits,
}

impl Times {
    /// Until when a flow counts as in use.
    fn in_use_until<S>(&self, flow: &Flow<S>) -> Now {
        let wait = if flow.awaiting { self.waits.answer } else { self.waits.quiet };
        flow.last_seen.plus(wait)
    }

    /// When a flow is over if nothing passes.
    fn ends<S>(&self, flow: &Flow<S>) -> Now {
        let idle = self.idle.get(usize::from(flow.service.0)).copied();
        flow.last_seen.plus(idle.unwrap_or(Duration::MAX).min(self.idle_max))
    }

    fn next_look<S>(&self, flow: &Flow<S>) -> Now {
        let ends = self.ends(flow);
        if flow.quiet { ends } else { ends.min(self.in_use_until(flow)) }
    }
}

/// What a flow was until a datagram passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    InUse,
    /// No longer in use: no answer to earlier datagrams was expected any more.
    Lapsed,
    /// The same, and [`Flows::next_due`] had said so.
    Quiet,
}

impl<S> Flows<S> {
    /// Flows never end by themselves until an idle time is set.
    pub fn new(capacity: usize, hasher: FlowHasher, now: Now) -> Flows<S> {
        let capacity = capacity.min(wheel::PLACES_MAX as usize);
        Flows {
            hasher,
            times: Times { idle: Vec::new(), idle_max: Duration::MAX, waits: Waits::default() },
            capacity,
            index: HashTable::with_capacity(capacity.min(INDEX_AT_START)),
            places: Vec::with_capacity(capacity.min(PLACES_AT_START)),
            free: Vec::new(),
            timers: Wheel::new(now),
        }
    }

    /// The same table with other times than the default.
    pub fn waiting(self, waits: Waits) -> Flows<S> {
        Flows { times: Times { waits, ..self.times }, ..self }
    }

    /// Until when a flow counts as in use, because more may be on its way to it.
    pub fn in_use_until(&self, flow: &Flow<S>) -> Now {
        self.times.in_use_until(flow)
    }

    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The place the next flow will get; `None` when the table is full.
    pub fn vacant(&self) -> Option<u32> {
        if self.index.len() >= self.capacity {
            return None;
        }
        Some(self.free.last().copied().unwrap_or(self.places.len() as u32))
    }

    /// The number of places ever used; every flow's place is below it.
    pub fn places(&self) -> u32 {
        self.places.len() as u32
    }

    /// Changes the idle time of a service from now on. A flow whose timer is already set is checked
    /// no earlier than it would have been.
    pub fn set_idle(&mut self, service: ServiceId, idle: Duration) {
        let place = usize::from(service.0);
        let all = &mut self.times.idle;
        if all.len() <= place {
            all.resize(place + 1, Duration::MAX);
        }
        all[place] = idle;
    }

    /// Likewise bounds the idle time of every service.
    pub fn set_idle_max(&mut self, idle_max: Duration) {
        self.times.idle_max = idle_max;
    }

    /// Reschedules the check of the flow at `place` for the current idle time, even if that is
    /// earlier.
    pub fn look_anew(&mut self, place: u32) {
        let Some(Some(flow)) = self.places.get_mut(place as usize) else { return };
        flow.look = self.times.next_look(flow);
        self.timers.schedule(place, flow.look);
    }

    /// Notes that a datagram passes through the flow at `place`, which is in use from now on.
    pub fn pass(&mut self, place: u32, now: Now) -> Option<(&mut Flow<S>, Before)> {
        let flow = self.places.get_mut(place as usize)?.as_mut()?;
        let lapsed = self.times.in_use_until(flow) <= now;
        debug_assert!(lapsed || !flow.quiet, "what is quiet is not in use");
        flow.last_seen = now;
        match (lapsed, flow.quiet) {
            (false, _) => Some((flow, Before::InUse)),
            (true, false) => Some((flow, Before::Lapsed)),
            (true, true) => {
                flow.quiet = false;
                flow.look = self.times.next_look(flow);
                self.timers.schedule(place, flow.look);
                Some((flow, Before::Quiet))
            }
        }
    }

    /// No further answer is expected, so the flow may stop being in use before its timer fires.
    pub fn answered(&mut self, place: u32) {
        let Some(Some(flow)) = self.places.get_mut(place as usize) else { return };
        flow.awaiting = false;
        if self.times.in_use_until(flow) < flow.look {
            self.look_anew(place);
        }
    }

    /// Marks a quiet flow as in use again.
    pub fn stir(&mut self, place: u32) {
        if let Some(flow) = self.get_mut(place) {
            flow.quiet = false;
            self.look_anew(place);
        }
    }

    /// The place of the flow with this key. Takes the hash because callers need it too.
    pub fn find(&self, hash: u64, key: &FlowKey) -> Option<u32> {
        let word = hash as u32;
        let is_it = |indexed: &Indexed| {
            indexed.word == word && self.get(indexed.place).is_some_and(|flow| flow.key == *key)
        };
        self.index.find(Indexed::spread(word), is_it).map(|indexed| indexed.place)
    }

    pub fn get(&self, place: u32) -> Option<&Flow<S>> {
        self.places.get(place as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, place: u32) -> Option<&mut Flow<S>> {
        self.places.get_mut(place as usize)?.as_mut()
    }

    /// Adds a flow that is not in the table yet, and returns its place.
    ///
    /// # Errors
    /// Returns the state if the table is full.
    pub fn open(
        &mut self,
        hash: u64,
        key: FlowKey,
        service: ServiceId,
        state: S,
        now: Now,
    ) -> Result<u32, S> {
        let Some(place) = self.vacant() else { return Err(state) };
        debug_assert!(self.find(hash, &key).is_none(), "a flow is entered once");
        let (awaiting, quiet) = (false, false);
        let flow = Some(Flow { key, last_seen: now, service, awaiting, quiet, look: now, state });
        match self.free.pop() {
            Some(_) => self.places[place as usize] = flow,
            None => self.places.push(flow),
        }
        let indexed = Indexed { place, word: hash as u32 };
        let again = |indexed: &Indexed| Indexed::spread(indexed.word);
        self.index.insert_unique(again(&indexed), indexed, again);
        self.look_anew(place);
        Ok(place)
    }

    /// Sets what a flow was elsewhere, from where it has just come.
    pub fn restore(
        &mut self,
        place: u32,
        now: Now,
        last_seen: Now,
        (awaiting, quiet): (bool, bool),
    ) {
        let Some(Some(flow)) = self.places.get_mut(place as usize) else { return };
        (flow.last_seen, flow.awaiting) = (last_seen, awaiting);
        flow.quiet = quiet && self.times.in_use_until(flow) <= now;
        self.look_anew(place);
    }

    /// Removes the flow at a place, if there is one.
    pub fn close(&mut self, place: u32) -> Option<Flow<S>> {
        let flow = self.places.get_mut(place as usize)?.take()?;
        let hash = Indexed::spread(self.hasher.flow(&flow.key) as u32);
        let entry = self.index.find_entry(hash, |indexed| indexed.place == place);
        entry.expect("a flow in use is in the index").remove();
        self.timers.cancel(place);
        self.free.push(place);
        Some(flow)
    }

    /// The place of a flow that has become quiet or idle. Checks at most `looks` flows whose timers
    /// have fired, and counts `looks` down; when it reaches zero, there may be more.
    pub fn next_due(&mut self, now: Now, looks: &mut u32) -> Option<(u32, Due)> {
        while *looks > 0 {
            let place = self.timers.pop(now)?;
            *looks -= 1;
            let flow = self.places[place as usize].as_mut().expect("a timer ends with its flow");
            let idle = self.times.ends(flow) <= now;
            let quiet = !flow.quiet && self.times.in_use_until(flow) <= now;
            flow.quiet |= quiet;
            // Set again either way: a flow that the caller does not close stays in the table.
            self.look_anew(place);
            match (idle, quiet) {
                (true, _) => return Some((place, Due::Idle)),
                (false, true) => return Some((place, Due::Quiet)),
                (false, false) => {}
            }
        }
        None
    }

    /// When to check for idle flows next.
    pub fn next_deadline(&self) -> Option<Now> {
        self.timers.next_deadline()
    }
}

#[cfg(test)]
mod tests;
