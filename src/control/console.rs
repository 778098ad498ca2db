//! The log lines that backends, users and strangers cause. Owns their wording and their rate limits, in
//! total and per source: logging must not slow down a busy balancer, and nobody may crowd out the lines
//! that matter to others. Lines over a limit are written at the debug level, counted, and summed up in a
//! line of their own.

use std::borrow::Cow;
use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tracing::field::{DisplayValue, display};
use tracing::{debug, info, warn};

use super::peer::Peer;
use crate::base::quota::{Quota, Rate};
use crate::base::time::Now;
use crate::cluster::{Backend, BackendId, Protocol, Service};
use crate::logs::{self, TRAFFIC};
use crate::worker::link::{Ended, HostAsked, Refusal, RequestLine, Shortage};

/// Shortest time between two summaries of what was held back.
const SUMMARY_EVERY: Duration = Duration::from_secs(10);
/// Shortest time between two lines about a lack of room.
const ROOM_EVERY: Duration = Duration::from_secs(10);
/// From how many backends on their answers to hello share a line.
const GATHERED_FROM: usize = 8;
/// Most bytes of somebody else's text in one line.
const WORDS_MAX: usize = 200;

/// What a line is about, if others can cause it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Topic {
    /// Users connecting and leaving.
    Users,
    /// Users turned away.
    TurnedAway,
    /// TLS that could not be agreed on with a user.
    Handshakes,
    /// Control connections opened and closed, and hosts that may not open one.
    Connections,
    /// Requests from backends that were refused.
    Refused,
    /// The outcome of asking for a proof of the secret.
    Proofs,
    Hellos,
    /// Unanswered hellos.
    Silences,
    /// Changes refused at the admin door, and users who may not use its socket.
    Admin,
    /// Backends joining and leaving. Only hosts that may register can cause these.
    Backends,
}

impl Topic {
    const ALL: [Topic; 10] = [
        Topic::Users,
        Topic::TurnedAway,
        Topic::Handshakes,
        Topic::Connections,
        Topic::Refused,
        Topic::Proofs,
        Topic::Hellos,
        Topic::Silences,
        Topic::Admin,
        Topic::Backends,
    ];

    /// Burst, then lines per second: in total, and per source.
    const fn rates(self) -> (Rate, Rate) {
        match self {
            Topic::Users => (Rate::new(100, 100), Rate::new(20, 10)),
            Topic::TurnedAway | Topic::Connections => (Rate::new(50, 20), Rate::new(10, 2)),
            Topic::Refused | Topic::Hellos => (Rate::new(20, 20), Rate::new(10, 2)),
            Topic::Silences => (Rate::new(100, 50), Rate::new(20, 10)),
            Topic::Handshakes | Topic::Proofs | Topic::Admin => (Rate::new(20, 5), Rate::new(5, 1)),
            // When a host restarts, all of its backends register at once.
            Topic::Backends => (Rate::new(1024, 100), Rate::new(256, 20)),
        }
    }

    fn quota(self, seed: u64) -> Quota {
        let (all, each) = self.rates();
        match self {
            // Many users may well come through one proxy.
            Topic::Users => Quota::lending(all, each, seed),
            _ => Quota::new(all, each, seed),
        }
    }
}

/// The console.
pub struct Console {
    /// By [`Topic`].
    quotas: [Quota; Topic::ALL.len()],
    held_back: [u64; Topic::ALL.len()],
    summary: Summary,
    /// When a lack of room was last reported, and the datagrams dropped for it since.
    room: (Option<Now>, u64),
    hellos: Hellos,
    on_terminal: bool,
}

/// Answers to hello that share a line.
#[derive(Default)]
struct Hellos {
    answers: u64,
    slowest: Option<Duration>,
    /// When the next line is due.
    next: Now,
    every: Duration,
}

impl Hellos {
    fn add(&mut self, now: Now, took: Option<Duration>) {
        // After a silence the line waits for the others.
        if self.answers == 0 && now >= self.next.plus(self.every) {
            self.next = now.plus(self.every);
        }
        self.answers += 1;
        self.slowest = self.slowest.max(took);
    }

    /// How many there were and how long the slowest took, if a line is due.
    fn due(&mut self, now: Now, interval: Duration) -> Option<(u64, Option<Duration>)> {
        self.every = interval;
        if self.answers == 0 || now < self.next {
            return None;
        }
        self.next = now.plus(interval);
        Some((std::mem::take(&mut self.answers), self.slowest.take()))
    }
}

/// What has been reported about the lines held back.
#[derive(Default)]
struct Summary {
    told: [u64; Topic::ALL.len()],
    others: Lost,
    next: Now,
}

/// A service as the lines have it: a built-in one goes by its protocol alone.
#[derive(Clone, Debug)]
pub struct Of<'a> {
    protocol: Protocol,
    /// Only if the user speaks TLS.
    tls: Option<bool>,
    service: Name<'a>,
}

/// The name of a service that is not a built-in one, as a field of a line.
pub type Name<'a> = Option<DisplayValue<&'a str>>;

impl Of<'_> {
    pub fn new(service: &Service) -> Of<'_> {
        Of { protocol: service.kind, tls: None, service: named(service) }
    }

    /// Of a user who speaks TLS, if so.
    pub fn secured(self, is_tls: bool) -> Self {
        Of { tls: is_tls.then_some(true), ..self }
    }
}

/// The name of a service as a line has it: not at all if it is a built-in one.
pub fn named(service: &Service) -> Name<'_> {
    (!service.id.is_built_in()).then(|| display(&*service.name))
}

/// Lines lost before they reached the console, or after it, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lost {
    /// About API requests, held back by the workers.
    pub requests: u64,
    /// About users, dropped because the control core fell behind.
    pub reports: u64,
    /// On any topic, dropped because standard output was too slow.
    pub dropped: u64,
}

impl Default for Console {
    fn default() -> Console {
        Console {
            on_terminal: logs::is_on_terminal(),
            ..Console::new(RandomState::new().hash_one(0))
        }
    }
}

/// Writes a line at its own level, or at the debug level if it is held back.
macro_rules! line {
    ($level:ident, $shown:expr, $($words:tt)*) => {
        if $shown { $level!(target: TRAFFIC, $($words)*) } else { debug!(target: TRAFFIC, $($words)*) }
    };
}

impl Console {
    /// A console away from any terminal, whose quotas cannot be predicted without the seed.
    fn new(seed: u64) -> Console {
        Console {
            quotas: Topic::ALL.map(|topic| topic.quota(seed)),
            held_back: [0; Topic::ALL.len()],
            summary: Summary::default(),
            room: (None, 0),
            hellos: Hellos::default(),
            on_terminal: false,
        }
    }

    /// Lines held back since the start.
    pub fn held_back(&self) -> u64 {
        self.held_back.iter().sum()
    }

    fn shows(&mut self, topic: Topic, source: IpAddr, now: Now) -> bool {
        let shown = self.quotas[topic as usize].allows(source, now);
        self.held_back[topic as usize] += u64::from(!shown);
        shown
    }

    /// Reports from time to time how many lines on each topic were held back.
    pub fn sum_up(&mut self, now: Now, lost: Lost) {
        let Some((held, lost)) = self.summary.due(now, self.held_back, lost) else { return };
        let of = |topic: Topic| Some(held[topic as usize]).filter(|held| *held > 0);
        let some = |lost: u64| Some(lost).filter(|lost| *lost > 0);
        warn!(
            users = of(Topic::Users),
            turned_away = of(Topic::TurnedAway),
            handshakes = of(Topic::Handshakes),
            connections = of(Topic::Connections),
            refused = of(Topic::Refused),
            proofs = of(Topic::Proofs),
            hellos = of(Topic::Hellos),
            silences = of(Topic::Silences),
            admin = of(Topic::Admin),
            backends = of(Topic::Backends),
            requests = some(lost.requests),
            reports = some(lost.reports),
            dropped = some(lost.dropped),
            "lines were held back, because there were too many"
        );
    }

    pub fn user_connected(
        &mut self,
        now: Now,
        of: Of<'_>,
        client: SocketAddr,
        backend: (BackendId, Option<SocketAddr>),
        sessions: u64,
    ) {
        let (address, Of { protocol, tls, service }) = (Shown(backend.1), of);
        line!(
            info, self.shows(Topic::Users, client.ip(), now),
            %protocol, tls, service, %client, backend = %backend.0, %address, sessions, "user connected"
        );
    }

    pub fn user_left(&mut self, now: Now, of: Of<'_>, ended: &Ended, sessions: u64) {
        let Of { protocol, tls, service } = of;
        let client = ended.client;
        let backend = Shown(ended.backend);
        let seconds = thousandths(ended.ended.since(ended.started).as_secs_f64());
        line!(
            info, self.shows(Topic::Users, client.ip(), now),
            %protocol, tls, service, %client, %backend, bytes_up = ended.bytes_up, bytes_down = ended.bytes_down,
            seconds, reason = ended.reason.name(), sessions, "user left"
        );
    }

    /// A user was turned away. `all_fail`: there are backends, but no check of theirs passes.
    pub fn user_refused(
        &mut self,
        now: Now,
        of: Of<'_>,
        client: SocketAddr,
        why: Refusal,
        all_fail: bool,
    ) {
        let Of { protocol, service, .. } = of;
        let why = match why {
            Refusal::NoBackend if all_fail => "every backend fails its check",
            Refusal::NoBackend => "no backend is registered",
            Refusal::Full => "the session limit is reached",
            Refusal::Barred(barrier) => barrier.why(),
            Refusal::Unreachable => "no backend could be connected to",
            Refusal::Exhausted => "descriptors, local ports or memory have run out",
            Refusal::NoProxyHeader => "it is in proxy_from and sent no valid PROXY header",
            Refusal::ProxyHeader => "it sent a PROXY header and is not in proxy_from",
        };
        let shown = self.shows(Topic::TurnedAway, client.ip(), now);
        line!(warn, shown, %protocol, service, %client, why, "user turned away");
    }

    /// The TLS of a user could not be agreed on, mostly because it is a scanner's, or does not know who signed
    /// the certificate; what is ours is worth a warning.
    pub fn handshake_failed(
        &mut self,
        now: Now,
        of: Of<'_>,
        client: SocketAddr,
        host: HostAsked,
        (why, is_ours): (&str, bool),
    ) {
        let Of { protocol, service, .. } = of;
        let shown = self.shows(Topic::Handshakes, client.ip(), now);
        let host = Shown(host.shown());
        if is_ours {
            line!(warn, shown, %protocol, service, %client, %host, why, "TLS handshake failed");
        } else {
            line!(info, shown, %protocol, service, %client, %host, why, "TLS handshake failed");
        }
    }

    /// New UDP users were turned away for want of room. The line gives the cure and the number of
    /// datagrams dropped since the last such line, and is written rarely.
    pub fn out_of_room(
        &mut self,
        now: Now,
        shortage: Shortage,
        service: Name<'_>,
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
        warn!(%backend, service, %address, datagrams, why, cure, "udp users turned away for want of room");
    }

    /// A hello was answered by a connection with this many `backends`, of `all` that are registered. On a
    /// terminal somebody sees that the backends are alive; elsewhere these would be half of all lines.
    pub fn hello(
        &mut self,
        now: Now,
        peer: SocketAddr,
        (backends, all): (usize, usize),
        took: Option<Duration>,
    ) {
        let gathers = self.on_terminal && all >= GATHERED_FROM;
        if gathers {
            self.hellos.add(now, took);
        }
        let shown = self.on_terminal && !gathers && self.shows(Topic::Hellos, peer.ip(), now);
        let took_ms = took.map(in_ms);
        line!(info, shown, %peer, backends, took_ms, "hello");
    }

    /// Writes the line for the hellos gathered, once an interval.
    pub fn sum_up_hellos(&mut self, now: Now, interval: Duration, backends: usize) {
        if let Some((answers, slowest)) = self.hellos.due(now, interval) {
            info!(answers, backends, slowest_ms = slowest.map(in_ms), "hello");
        }
    }

    pub fn hello_missed(&mut self, now: Now, peer: SocketAddr, misses: u32, of: u32) {
        let shown = self.shows(Topic::Silences, peer.ip(), now);
        line!(warn, shown, %peer, misses, of, "hello not answered");
    }

    pub fn backend_connected(&mut self, now: Now, peer: SocketAddr, connections: usize) {
        let shown = self.shows(Topic::Connections, peer.ip(), now);
        line!(info, shown, %peer, connections, "backend connected");
    }

    pub fn backend_disconnected(
        &mut self,
        now: Now,
        peer: SocketAddr,
        why: &str,
        connections: usize,
    ) {
        let shown = self.shows(Topic::Connections, peer.ip(), now);
        line!(info, shown, %peer, why, connections, "backend disconnected");
    }

    pub fn stranger(&mut self, now: Now, peer: SocketAddr) {
        let shown = self.shows(Topic::Connections, peer.ip(), now);
        line!(info, shown, %peer, "a host that may not register was turned away");
    }

    pub fn backend_proved(&mut self, now: Now, peer: SocketAddr, id: &str) {
        let shown = self.shows(Topic::Proofs, peer.ip(), now);
        line!(info, shown, %peer, %id, "backend proved the secret");
    }

    pub fn secret_unknown(&mut self, now: Now, peer: SocketAddr, id: &str) {
        let (shown, id) = (self.shows(Topic::Proofs, peer.ip(), now), kept(id));
        line!(warn, shown, %peer, %id, "a host does not know the secret");
    }

    /// A backend's request was refused; `why` is the answer it got.
    pub fn backend_refused(
        &mut self,
        now: Now,
        peer: SocketAddr,
        cmd: Option<&str>,
        service: Option<&str>,
        why: &str,
    ) {
        let shown = self.shows(Topic::Refused, peer.ip(), now);
        let (cmd, why, service) = (Shown(cmd), kept(why), service.map(kept));
        let service = service.as_deref().map(display);
        line!(warn, shown, %peer, %cmd, service, why = &*why, "backend refused");
    }

    pub fn backend_registered(&mut self, now: Now, of: Of<'_>, backend: &Backend, backends: usize) {
        let Backend { id, address, weight, .. } = backend;
        let Of { protocol, service, .. } = of;
        let name = Shown(backend.name.as_deref());
        if self.shows(Topic::Backends, address.ip(), now) {
            info!(backend = %id, %protocol, service, %address, weight, %name, backends, "backend registered");
        } else {
            debug!(backend = %id, %protocol, service, %address, weight, %name, backends, "backend registered");
        }
    }

    /// The verdict on a backend has turned: its check passes from now on, or fails for this reason.
    pub fn backend_checked(
        &mut self,
        now: Now,
        service: &str,
        backend: &Backend,
        failure: Option<&str>,
    ) {
        let Backend { id, address, .. } = backend;
        let shown = self.shows(Topic::Backends, address.ip(), now);
        match failure.map(kept) {
            Some(reason) if shown => {
                warn!(backend = %id, %service, %address, %reason, "check failed");
            }
            Some(reason) => debug!(backend = %id, %service, %address, %reason, "check failed"),
            None if shown => info!(backend = %id, %service, %address, "check passed"),
            None => debug!(backend = %id, %service, %address, "check passed"),
        }
    }

    /// A backend could not be checked, for want of something on this host.
    pub fn check_not_run(&mut self, now: Now, service: &str, backend: &Backend, reason: &str) {
        let Backend { id, address, .. } = backend;
        let shown = self.shows(Topic::Backends, address.ip(), now);
        line!(warn, shown, backend = %id, %service, %address, reason, "check not run");
    }

    pub fn backend_left(
        &mut self,
        now: Now,
        of: Of<'_>,
        backend: &Backend,
        why: &str,
        sessions: u64,
        backends: usize,
    ) {
        let Backend { id, address, .. } = backend;
        let Of { protocol, service, .. } = of;
        if self.shows(Topic::Backends, address.ip(), now) {
            info!(backend = %id, %protocol, service, %address, why, sessions, backends, "backend left");
        } else {
            debug!(backend = %id, %protocol, service, %address, why, sessions, backends, "backend left");
        }
    }

    /// A change requested over the admin door was refused. `asked` is its method and path.
    pub fn change_refused(&mut self, now: Now, by: Peer, asked: (&str, &str), why: &str) {
        let shown = self.shows(Topic::Admin, by.source(), now);
        let (method, path) = (kept(asked.0), kept(asked.1));
        line!(warn, shown, %by, method = &*method, path = &*path, why, "a change was refused");
    }

    /// Somebody connected to the admin socket without being allowed to.
    pub fn admin_stranger(&mut self, now: Now, uid: u32) {
        let shown = self.shows(Topic::Admin, Peer::Unix { uid }.source(), now);
        line!(warn, shown, uid, "a user without permission was turned away from the admin socket");
    }
}

impl Summary {
    /// What has been held back since the last summary, if a new one is due.
    fn due(
        &mut self,
        now: Now,
        held: [u64; Topic::ALL.len()],
        lost: Lost,
    ) -> Option<([u64; Topic::ALL.len()], Lost)> {
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

/// Somebody else's text, cut to what a line shows, with its full length if it was cut.
fn kept(words: &str) -> Cow<'_, str> {
    if words.len() <= WORDS_MAX {
        return Cow::Borrowed(words);
    }
    let end = (0..=WORDS_MAX).rev().find(|end| words.is_char_boundary(*end)).unwrap_or(0);
    Cow::Owned(format!("{}... ({} bytes)", &words[..end], words.len()))
}

/// A shortage in words, and what helps against it.
fn told_shortage(shortage: Shortage) -> (&'static str, &'static str) {
    match shortage {
        Shortage::Place => (
            "the udp session limit is reached",
            "raise limits.udp_sessions; set udp.responses if each datagram is answered",
        ),
        Shortage::Service => (
            "a service has as many sessions as it may",
            "raise its sessions or backend_sessions; the status shows which service turns users away",
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

/// One API request. The workers bound how many of these lines there are per second.
pub fn request(
    line: &RequestLine,
    service: Name<'_>,
    asked: Name<'_>,
    address: Option<SocketAddr>,
) {
    let (method, path) = line.request();
    let request_id = Some(line.id()).filter(|id| !id.is_empty());
    let trace_id = (line.trace != 0).then(|| display(format!("{:032x}", line.trace)));
    let scheme = line.is_tls.then(|| display("https"));
    let http = line.is_http2.then_some(2);
    let host = Some(line.host()).filter(|host| !host.is_empty());
    let times = &line.times;
    let ms = |from: Option<Now>, to: Option<Now>| {
        from.zip(to).map(|(from, to)| thousandths(to.since(from).as_secs_f64() * 1000.0))
    };
    let (backend, address, fault) = (Shown(line.backend), Shown(address), Shown(line.fault));
    // A time that does not exist is left out, so that programs reading the lines find only numbers.
    info!(
        target: TRAFFIC,
        request = %format_args!("{}-{}", line.session, line.number), request_id, trace_id,
        client = %line.client, service, asked, scheme, http, host, %backend, %address, method, path, status = line.status,
        bytes_up = line.bytes_up, bytes_down = line.bytes_down,
        wait_ms = ms(Some(times.began), Some(times.read)),
        connect_ms = ms(Some(times.read), times.connected),
        first_byte_ms = ms(times.connected.or(Some(times.read)), times.answered),
        total_ms = ms(Some(times.began), Some(times.ended)),
        retries = line.retries, %fault, "request"
    );
}

fn in_ms(took: Duration) -> f64 {
    thousandths(took.as_secs_f64() * 1000.0)
}

/// Rounded to three decimals, which is as much as people read.
fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A value that may be missing and is then shown as a dash.
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
pub(in crate::control) mod tests;
