//! What the console shows of backends, users and strangers, a line each. Owns the words, and how many
//! lines of each kind there may be, for all together and for each source: a balancer that is busy must
//! not become slow by telling of it, and nobody may push out the lines that others need. Lines beyond
//! that go to the debug level, are counted, and summed up in a line of their own.

use std::borrow::Cow;
use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tracing::{debug, info, warn};

use super::peer::Peer;
use crate::base::quota::{Quota, Rate};
use crate::base::time::Now;
use crate::cluster::{Backend, BackendId, Protocol};
use crate::logs::TRAFFIC;
use crate::worker::link::{Ended, Refusal, RequestLine, Shortage};

/// A summary of what was held back comes this often at most.
const SUMMARY_EVERY: Duration = Duration::from_secs(10);
/// How often there is a line about a lack of room.
const ROOM_EVERY: Duration = Duration::from_secs(10);
/// Bytes of somebody else's words that a line shows.
const WORDS_MAX: usize = 200;

/// What lines tell of, where others cause them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Users who come and go.
    Users,
    /// Users who are turned away.
    TurnedAway,
    /// Control connections that come and go, and hosts that may not.
    Connections,
    /// Requests of backends that are refused.
    Refused,
    /// What came of asking for the proof.
    Proofs,
    Hellos,
    /// Hellos that are not answered.
    Silences,
    /// Changes over the admin door that are refused, and users who may not use its socket.
    Admin,
    /// Backends in and out of the rotation. Only who may register causes these.
    Backends,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::Users,
        Kind::TurnedAway,
        Kind::Connections,
        Kind::Refused,
        Kind::Proofs,
        Kind::Hellos,
        Kind::Silences,
        Kind::Admin,
        Kind::Backends,
    ];

    /// At once and a second: of all, and of each source.
    const fn rates(self) -> (Rate, Rate) {
        match self {
            Kind::Users => (Rate::new(100, 100), Rate::new(20, 10)),
            Kind::TurnedAway | Kind::Connections => (Rate::new(50, 20), Rate::new(10, 2)),
            Kind::Refused | Kind::Hellos => (Rate::new(20, 20), Rate::new(10, 2)),
            Kind::Silences => (Rate::new(100, 50), Rate::new(20, 10)),
            Kind::Proofs | Kind::Admin => (Rate::new(20, 5), Rate::new(5, 1)),
            // A host that restarts has all of its backends register at once.
            Kind::Backends => (Rate::new(1024, 100), Rate::new(256, 20)),
        }
    }

    fn quota(self, seed: u64) -> Quota {
        let (all, each) = self.rates();
        match self {
            // Many users may well come through one proxy.
            Kind::Users => Quota::lending(all, each, seed),
            _ => Quota::new(all, each, seed),
        }
    }
}

/// The console.
pub struct Console {
    /// By [`Kind`].
    quotas: [Quota; Kind::ALL.len()],
    held_back: [u64; Kind::ALL.len()],
    summary: Summary,
    /// When a lack of room was told last, and datagrams that were dropped for it since.
    room: (Option<Now>, u64),
}

/// What was told of the lines that were held back.
#[derive(Default)]
struct Summary {
    told: [u64; Kind::ALL.len()],
    others: Lost,
    next: Now,
}

/// Lines that did not come as far as the console, or not beyond it, since the beginning.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lost {
    /// Of API requests, held back by the workers.
    pub requests: u64,
    /// Of users, dropped because the control core was behind.
    pub reports: u64,
    /// Of any kind, dropped because standard output was slower.
    pub dropped: u64,
}

impl Default for Console {
    fn default() -> Console {
        Console::new(RandomState::new().hash_one(0))
    }
}

/// The same line, readable by default or only for those who look for everything.
macro_rules! line {
    ($level:ident, $shown:expr, $($words:tt)*) => {
        if $shown { $level!(target: TRAFFIC, $($words)*) } else { debug!(target: TRAFFIC, $($words)*) }
    };
}

impl Console {
    /// A console whose quotas nobody can foresee who does not know the seed.
    fn new(seed: u64) -> Console {
        Console {
            quotas: Kind::ALL.map(|kind| kind.quota(seed)),
            held_back: [0; Kind::ALL.len()],
            summary: Summary::default(),
            room: (None, 0),
        }
    }

    /// Lines that were not shown, since the beginning.
    pub fn held_back(&self) -> u64 {
        self.held_back.iter().sum()
    }

    fn shows(&mut self, kind: Kind, source: IpAddr, now: Now) -> bool {
        let shown = self.quotas[kind as usize].allows(source, now);
        self.held_back[kind as usize] += u64::from(!shown);
        shown
    }

    /// Says now and then how many lines of which kind were held back.
    pub fn sum_up(&mut self, now: Now, lost: Lost) {
        let Some((held, lost)) = self.summary.due(now, self.held_back, lost) else { return };
        let of = |kind: Kind| Some(held[kind as usize]).filter(|held| *held > 0);
        let some = |lost: u64| Some(lost).filter(|lost| *lost > 0);
        warn!(
            users = of(Kind::Users),
            turned_away = of(Kind::TurnedAway),
            connections = of(Kind::Connections),
            refused = of(Kind::Refused),
            proofs = of(Kind::Proofs),
            hellos = of(Kind::Hellos),
            silences = of(Kind::Silences),
            admin = of(Kind::Admin),
            backends = of(Kind::Backends),
            requests = some(lost.requests),
            reports = some(lost.reports),
            dropped = some(lost.dropped),
            "lines were held back, because there were too many"
        );
    }

    pub fn user_connected(
        &mut self,
        now: Now,
        protocol: Protocol,
        client: SocketAddr,
        backend: (BackendId, Option<SocketAddr>),
        sessions: u64,
    ) {
        let address = Shown(backend.1);
        line!(
            info, self.shows(Kind::Users, client.ip(), now),
            %protocol, %client, backend = %backend.0, %address, sessions, "user connected"
        );
    }

    pub fn user_left(&mut self, now: Now, protocol: Protocol, ended: &Ended, sessions: u64) {
        let client = ended.client;
        let backend = Shown(ended.backend);
        let seconds = thousandths(ended.ended.since(ended.started).as_secs_f64());
        line!(
            info, self.shows(Kind::Users, client.ip(), now),
            %protocol, %client, %backend, bytes_up = ended.bytes_up, bytes_down = ended.bytes_down,
            seconds, reason = ended.reason.name(), sessions, "user left"
        );
    }

    pub fn user_refused(&mut self, now: Now, protocol: Protocol, client: SocketAddr, why: Refusal) {
        let why = match why {
            Refusal::NoBackend => "no backend is registered",
            Refusal::Full => "the session limit is reached",
            Refusal::Unreachable => "no backend could be connected to",
            Refusal::Exhausted => "descriptors, local ports or memory have run out",
        };
        let shown = self.shows(Kind::TurnedAway, client.ip(), now);
        line!(warn, shown, %protocol, %client, why, "user turned away");
    }

    /// New UDP users were turned away for want of room; told with the cure, seldom, and with all that
    /// were dropped since the last line.
    pub fn out_of_room(
        &mut self,
        now: Now,
        shortage: Shortage,
        backend: Option<(BackendId, Option<SocketAddr>)>,
        datagrams: u64,
    ) {
        let (told, dropped) = &mut self.room;
        *dropped += datagrams;
        if told.is_some_and(|told| now.since(told) < ROOM_EVERY) {
            return;
        }
        *told = Some(now);
        let datagrams = std::mem::take(dropped);
        let address = Shown(backend.and_then(|(_, address)| address));
        let (why, cure) = told_shortage(shortage);
        let backend = Shown(backend.map(|(id, _)| id));
        warn!(%backend, %address, datagrams, why, cure, "udp users turned away for want of room");
    }

    pub fn hello(&mut self, now: Now, peer: SocketAddr, backends: usize, took: Option<Duration>) {
        let took_ms = took.map(|took| thousandths(took.as_secs_f64() * 1000.0));
        line!(info, self.shows(Kind::Hellos, peer.ip(), now), %peer, backends, took_ms, "hello");
    }

    pub fn hello_missed(&mut self, now: Now, peer: SocketAddr, misses: u32, of: u32) {
        let shown = self.shows(Kind::Silences, peer.ip(), now);
        line!(warn, shown, %peer, misses, of, "hello not answered");
    }

    pub fn backend_connected(&mut self, now: Now, peer: SocketAddr, connections: usize) {
        let shown = self.shows(Kind::Connections, peer.ip(), now);
        line!(info, shown, %peer, connections, "backend connected");
    }

    pub fn backend_disconnected(
        &mut self,
        now: Now,
        peer: SocketAddr,
        why: &str,
        connections: usize,
    ) {
        let shown = self.shows(Kind::Connections, peer.ip(), now);
        line!(info, shown, %peer, why, connections, "backend disconnected");
    }

    pub fn stranger(&mut self, now: Now, peer: SocketAddr) {
        let shown = self.shows(Kind::Connections, peer.ip(), now);
        line!(info, shown, %peer, "a host that may not register was turned away");
    }

    pub fn backend_proved(&mut self, now: Now, peer: SocketAddr, id: &str) {
        let shown = self.shows(Kind::Proofs, peer.ip(), now);
        line!(info, shown, %peer, %id, "backend proved the secret");
    }

    pub fn secret_unknown(&mut self, now: Now, peer: SocketAddr, id: &str) {
        let (shown, id) = (self.shows(Kind::Proofs, peer.ip(), now), kept(id));
        line!(warn, shown, %peer, %id, "a host does not know the secret");
    }

    /// A backend asked for something that it did not get; `why` is what it was told.
    pub fn backend_refused(&mut self, now: Now, peer: SocketAddr, cmd: Option<&str>, why: &str) {
        let shown = self.shows(Kind::Refused, peer.ip(), now);
        let (cmd, why) = (Shown(cmd), kept(why));
        line!(warn, shown, %peer, %cmd, why = &*why, "backend refused");
    }

    pub fn backend_registered(
        &mut self,
        now: Now,
        protocol: Protocol,
        backend: &Backend,
        backends: usize,
    ) {
        let Backend { id, address, weight, .. } = backend;
        let name = Shown(backend.name.as_deref());
        if self.shows(Kind::Backends, address.ip(), now) {
            info!(backend = %id, %protocol, %address, weight, %name, backends, "backend registered");
        } else {
            debug!(backend = %id, %protocol, %address, weight, %name, backends, "backend registered");
        }
    }

    pub fn backend_left(
        &mut self,
        now: Now,
        protocol: Protocol,
        backend: &Backend,
        why: &str,
        sessions: u64,
        backends: usize,
    ) {
        let Backend { id, address, .. } = backend;
        if self.shows(Kind::Backends, address.ip(), now) {
            info!(backend = %id, %protocol, %address, why, sessions, backends, "backend left");
        } else {
            debug!(backend = %id, %protocol, %address, why, sessions, backends, "backend left");
        }
    }

    /// A change that was asked for over the admin door and not made.
    pub fn change_refused(&mut self, now: Now, by: Peer, path: &str, why: &str) {
        let (shown, path) = (self.shows(Kind::Admin, by.source(), now), kept(path));
        line!(warn, shown, %by, path = &*path, why, "a change was refused");
    }

    /// Somebody who may not use the admin socket did.
    pub fn admin_stranger(&mut self, now: Now, uid: u32) {
        let shown = self.shows(Kind::Admin, Peer::Unix { uid }.source(), now);
        line!(warn, shown, uid, "a user who may not was turned away from the admin socket");
    }
}

impl Summary {
    /// What has been held back since the last summary, if it is time to tell.
    fn due(
        &mut self,
        now: Now,
        held: [u64; Kind::ALL.len()],
        lost: Lost,
    ) -> Option<([u64; Kind::ALL.len()], Lost)> {
        if now < self.next || (held, lost) == (self.told, self.others) {
            return None;
        }
        let mut fresh = held;
        fresh.iter_mut().zip(self.told).for_each(|(held, told)| *held -= told);
        let others = Lost {
            requests: lost.requests.wrapping_sub(self.others.requests),
            reports: lost.reports.wrapping_sub(self.others.reports),
            dropped: lost.dropped.wrapping_sub(self.others.dropped),
        };
        *self = Summary { told: held, others: lost, next: now.plus(SUMMARY_EVERY) };
        Some((fresh, others))
    }
}

/// Somebody else's words as far as a line shows them, and how long they were.
fn kept(words: &str) -> Cow<'_, str> {
    if words.len() <= WORDS_MAX {
        return Cow::Borrowed(words);
    }
    let end = (0..=WORDS_MAX).rev().find(|end| words.is_char_boundary(*end)).unwrap_or(0);
    Cow::Owned(format!("{}... ({} bytes)", &words[..end], words.len()))
}

/// A lack of room and what helps.
fn told_shortage(shortage: Shortage) -> (&'static str, &'static str) {
    match shortage {
        Shortage::Place => (
            "as many udp sessions are in use as may be",
            "raise limits.udp_sessions; set udp.responses if each datagram is answered",
        ),
        Shortage::Pair => (
            "every socket and local port towards the backend is in use",
            "raise LimitNOFILE, limits.udp_sockets or net.ipv4.ip_local_port_range; add \
             udp.local_addresses or backends; set udp.responses if each datagram is answered",
        ),
        Shortage::Share => (
            "room is short and one source holds more than its share of it",
            "if it is a flood, set udp.source_sessions or udp.source_new_per_second; if not, raise \
             LimitNOFILE or limits.udp_sockets, or add udp.local_addresses",
        ),
    }
}

/// One API request. How many of them there are in a second is the workers' to bound.
pub fn request(line: &RequestLine, address: Option<SocketAddr>) {
    let (method, path) = line.request();
    let times = &line.times;
    let ms = |from: Option<Now>, to: Option<Now>| {
        from.zip(to).map(|(from, to)| thousandths(to.since(from).as_secs_f64() * 1000.0))
    };
    let (backend, address, fault) = (Shown(line.backend), Shown(address), Shown(line.fault));
    // A time that there is not is left out: whoever computes with the lines finds numbers only.
    info!(
        target: TRAFFIC,
        request = %format_args!("{}-{}", line.session, line.number),
        client = %line.client, %backend, %address, method, path, status = line.status,
        bytes_up = line.bytes_up, bytes_down = line.bytes_down,
        wait_ms = ms(Some(times.began), Some(times.read)),
        connect_ms = ms(Some(times.read), times.connected),
        first_byte_ms = ms(times.connected.or(Some(times.read)), times.answered),
        total_ms = ms(Some(times.began), Some(times.ended)),
        retries = line.retries, %fault, "request"
    );
}

/// With three digits behind the point, which is what people read.
fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A value that may be missing, shown as a dash then.
struct Shown<T>(Option<T>);

impl<T: Display> Display for Shown<T> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(out),
            None => out.write_str("-"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    fn host(number: usize) -> SocketAddr {
        SocketAddr::from(([10, 0, (number / 256) as u8, (number % 256) as u8], 5))
    }

    /// Lines shown of `kind` in ten seconds, in which each of `hosts` causes 1,000 a second.
    fn shown_in_ten_seconds(kind: Kind, hosts: usize) -> usize {
        let mut console = Console::new(7);
        let mut shown = 0;
        for ms in 0..10_000 {
            let of = |host_number: usize| host(host_number).ip();
            shown += (0..hosts).filter(|it| console.shows(kind, of(*it), at(ms))).count();
        }
        assert_eq!(console.held_back() as usize, hosts * 10_000 - shown);
        shown
    }

    #[test]
    fn every_kind_has_a_bound_for_one_source_and_one_for_all() {
        for (kind, one, all) in [
            (Kind::Users, 1050, 1100),
            (Kind::TurnedAway, 30, 250),
            (Kind::Connections, 30, 250),
            (Kind::Refused, 30, 220),
            (Kind::Proofs, 15, 70),
            (Kind::Hellos, 30, 220),
            (Kind::Silences, 120, 600),
            (Kind::Admin, 15, 70),
            (Kind::Backends, 456, 2024),
        ] {
            let got = shown_in_ten_seconds(kind, 1);
            assert!((one - 2..=one).contains(&got), "{kind:?}: {got} lines of one source");
            let got = shown_in_ten_seconds(kind, 300);
            assert!((all - 2..=all).contains(&got), "{kind:?}: {got} lines of many");
        }
    }

    #[test]
    fn no_kind_uses_up_the_lines_of_another_and_no_source_those_of_the_next() {
        let mut console = Console::new(7);
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Backends) {
            for number in 0..20_000 {
                console.shows(kind, host(number).ip(), at(0));
            }
        }
        let held_back = console.held_back();
        for _ in 0..200 {
            assert!(console.shows(Kind::Backends, host(1).ip(), at(0)));
        }
        assert_eq!(console.held_back(), held_back);
        while console.shows(Kind::Backends, host(1).ip(), at(0)) {}
        assert!(console.shows(Kind::Backends, host(2).ip(), at(0)));
    }

    #[test]
    fn what_was_held_back_is_summed_up_now_and_then() {
        let mut summary = Summary::default();
        let mut held = [0; Kind::ALL.len()];
        let lost = |requests| Lost { requests, ..Lost::default() };
        assert_eq!(summary.due(at(5), held, lost(0)), None, "nothing was");
        held[Kind::Proofs as usize] = 7;
        assert_eq!(summary.due(at(6), held, lost(3)), Some((held, lost(3))));
        let first = held;
        held[Kind::Proofs as usize] = 9;
        assert_eq!(summary.due(at(10_005), held, lost(3)), None, "too soon");
        let mut fresh = first;
        fresh[Kind::Proofs as usize] = 2;
        assert_eq!(summary.due(at(10_006), held, lost(8)), Some((fresh, lost(5))));
        assert_eq!(summary.due(at(30_000), held, lost(8)), None, "nothing more was");
    }

    #[test]
    fn words_of_others_are_shown_as_far_as_a_line_has_room() {
        assert_eq!(kept("short"), "short");
        assert_eq!(kept(&"a".repeat(200)), "a".repeat(200));
        let long = kept(&"a".repeat(30_000)).into_owned();
        assert_eq!(long, format!("{}... (30000 bytes)", "a".repeat(200)));
        assert_eq!(kept(&"ä".repeat(150)), format!("{}... (300 bytes)", "ä".repeat(100)));
        assert_eq!(
            kept(&format!("a{}", "ä".repeat(150))),
            format!("a{}... (301 bytes)", "ä".repeat(99))
        );
    }
}
