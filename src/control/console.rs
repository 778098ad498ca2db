//! What the console shows of servers and users, a line each. Owns the words and how many lines a
//! second there may be: a balancer that is busy must not become slow by telling of it. Lines beyond
//! that go to the debug level and are counted.

use std::net::SocketAddr;
use std::time::Duration;

use tracing::{debug, info, warn};

use crate::base::time::Now;
use crate::cluster::{Backend, BackendId, Protocol};
use crate::worker::link::{Ended, Lack, Refusal, RequestLine};

/// Lines about users in a second.
const USER_LINES_MAX: u32 = 100;
/// Lines about servers coming and going in a second.
const SERVER_LINES_MAX: u32 = 100;
/// Lines about refused messages in a second; a peer that sends nonsense hides nobody's coming and going.
const REFUSED_LINES_MAX: u32 = 20;
/// Lines about hellos in a second.
const HELLO_LINES_MAX: u32 = 20;

/// How often there is a line about a lack of room.
const ROOM_EVERY: Duration = Duration::from_secs(10);

/// So many in every second, and no more.
#[derive(Debug)]
struct Budget {
    each_second: u32,
    second: Now,
    used: u32,
}

impl Budget {
    fn new(each_second: u32) -> Budget {
        Budget { each_second, second: Now::default(), used: 0 }
    }

    fn allows(&mut self, now: Now) -> bool {
        if now.since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.used = 0;
        }
        self.used = self.used.saturating_add(1);
        self.used <= self.each_second
    }
}

/// The console.
pub struct Console {
    users: Budget,
    servers: Budget,
    refused: Budget,
    hellos: Budget,
    held_back: u64,
    /// When a lack of room was told last, and datagrams that were dropped for it since.
    room: (Option<Now>, u64),
}

impl Default for Console {
    fn default() -> Console {
        Console {
            users: Budget::new(USER_LINES_MAX),
            servers: Budget::new(SERVER_LINES_MAX),
            refused: Budget::new(REFUSED_LINES_MAX),
            hellos: Budget::new(HELLO_LINES_MAX),
            held_back: 0,
            room: (None, 0),
        }
    }
}

/// The same line, readable by default or only for those who look for everything.
macro_rules! line {
    ($shown:expr, $($words:tt)*) => {
        if $shown { info!($($words)*) } else { debug!($($words)*) }
    };
}

impl Console {
    /// Lines that were not shown, since the beginning.
    pub fn held_back(&self) -> u64 {
        self.held_back
    }

    fn shows_user(&mut self, now: Now) -> bool {
        let shown = self.users.allows(now);
        self.held_back += u64::from(!shown);
        shown
    }

    fn shows_server(&mut self, now: Now) -> bool {
        let shown = self.servers.allows(now);
        self.held_back += u64::from(!shown);
        shown
    }

    pub fn user_connected(
        &mut self,
        now: Now,
        protocol: Protocol,
        client: SocketAddr,
        server: (BackendId, Option<SocketAddr>),
        sessions: u64,
    ) {
        let address = Shown(server.1);
        line!(
            self.shows_user(now),
            %protocol, %client, server = %server.0, %address, sessions, "user connected"
        );
    }

    pub fn user_left(&mut self, now: Now, ended: &Ended, sessions: u64) {
        let (protocol, client) = (ended.protocol, ended.client);
        let server = Shown(ended.backend);
        let seconds = thousandths(ended.ended.since(ended.started).as_secs_f64());
        line!(
            self.shows_user(now),
            %protocol, %client, %server, bytes_up = ended.bytes_up, bytes_down = ended.bytes_down,
            seconds, reason = ended.reason.name(), sessions, "user left"
        );
    }

    pub fn user_refused(&mut self, now: Now, protocol: Protocol, client: SocketAddr, why: Refusal) {
        let why = match why {
            Refusal::NoBackend => "no server is registered",
            Refusal::Full => "the session limit is reached",
            Refusal::Unreachable => "no server could be connected to",
            Refusal::Exhausted => "descriptors, local ports or memory have run out",
        };
        if self.shows_user(now) {
            warn!(%protocol, %client, why, "user turned away");
        } else {
            debug!(%protocol, %client, why, "user turned away");
        }
    }

    /// New UDP users were turned away for want of room; told with the cure, seldom, and with all that
    /// were dropped since the last line.
    pub fn out_of_room(
        &mut self,
        now: Now,
        lack: Lack,
        server: Option<(BackendId, Option<SocketAddr>)>,
        datagrams: u64,
    ) {
        let (told, dropped) = &mut self.room;
        *dropped += datagrams;
        if told.is_some_and(|told| now.since(told) < ROOM_EVERY) {
            return;
        }
        *told = Some(now);
        let datagrams = std::mem::take(dropped);
        let address = Shown(server.and_then(|(_, address)| address));
        let (why, cure) = told_lack(lack);
        let server = Shown(server.map(|(id, _)| id));
        warn!(%server, %address, datagrams, why, cure, "udp users turned away for want of room");
    }

    pub fn hello(&mut self, now: Now, peer: SocketAddr, servers: usize, took: Option<Duration>) {
        let shown = self.hellos.allows(now);
        self.held_back += u64::from(!shown);
        let took_ms = took.map(|took| thousandths(took.as_secs_f64() * 1000.0));
        line!(shown, %peer, servers, took_ms, "hello");
    }

    pub fn server_connected(&mut self, now: Now, peer: SocketAddr, connections: usize) {
        line!(self.shows_server(now), %peer, connections, "server connected");
    }

    pub fn server_disconnected(
        &mut self,
        now: Now,
        peer: SocketAddr,
        why: &str,
        connections: usize,
    ) {
        line!(self.shows_server(now), %peer, why, connections, "server disconnected");
    }

    pub fn stranger(&mut self, now: Now, peer: SocketAddr) {
        line!(self.shows_server(now), %peer, "a host that may not register was turned away");
    }

    /// A server asked for something that it did not get; `why` is what it was told.
    pub fn server_refused(&mut self, now: Now, peer: SocketAddr, cmd: Option<&str>, why: &str) {
        let shown = self.refused.allows(now);
        self.held_back += u64::from(!shown);
        let cmd = Shown(cmd);
        if shown {
            warn!(%peer, %cmd, why, "server refused");
        } else {
            debug!(%peer, %cmd, why, "server refused");
        }
    }

    pub fn server_registered(&mut self, now: Now, backend: &Backend, servers: usize) {
        let Backend { id, protocol, address, weight, .. } = backend;
        let name = Shown(backend.name.as_deref());
        line!(
            self.shows_server(now),
            server = %id, %protocol, %address, weight, %name, servers, "server registered"
        );
    }

    pub fn server_left(
        &mut self,
        now: Now,
        backend: &Backend,
        why: &str,
        sessions: u64,
        servers: usize,
    ) {
        let Backend { id, protocol, address, .. } = backend;
        line!(
            self.shows_server(now),
            server = %id, %protocol, %address, why, sessions, servers, "server left"
        );
    }
}

/// A lack of room and what helps.
fn told_lack(lack: Lack) -> (&'static str, &'static str) {
    match lack {
        Lack::Place => (
            "as many udp sessions are in use as may be",
            "raise limits.udp_sessions; set udp.responses if each datagram is answered",
        ),
        Lack::Pair => (
            "every socket and local port towards the server is in use",
            "raise LimitNOFILE, limits.udp_sockets or net.ipv4.ip_local_port_range; add \
             udp.local_addresses or servers; set udp.responses if each datagram is answered",
        ),
        Lack::Share => (
            "room is short and one source holds more than its share of it",
            "if it is a flood, set udp.source_sessions or udp.source_new_per_second; if not, raise \
             LimitNOFILE or limits.udp_sockets, or add udp.local_addresses",
        ),
    }
}

/// With three digits behind the point, which is what people read.
/// One API request. How many of them there are in a second is the workers' to bound.
pub fn request(line: &RequestLine, address: Option<SocketAddr>) {
    let (method, path) = line.request();
    let times = &line.times;
    let ms = |from: Option<Now>, to: Option<Now>| {
        Shown(from.zip(to).map(|(from, to)| thousandths(to.since(from).as_secs_f64() * 1000.0)))
    };
    let (server, address, fault) = (Shown(line.backend), Shown(address), Shown(line.fault));
    info!(
        request = %format_args!("{}-{}", line.session, line.number),
        client = %line.client, %server, %address, method, path, status = line.status,
        bytes_up = line.bytes_up, bytes_down = line.bytes_down,
        wait_ms = %ms(Some(times.began), Some(times.read)),
        connect_ms = %ms(Some(times.read), times.connected),
        first_byte_ms = %ms(times.connected.or(Some(times.read)), times.answered),
        total_ms = %ms(Some(times.began), Some(times.ended)),
        retries = line.retries, %fault, "request"
    );
}

fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A value that may be missing, shown as a dash then.
struct Shown<T>(Option<T>);

impl<T: std::fmt::Display> std::fmt::Display for Shown<T> {
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

    #[test]
    fn a_budget_allows_so_many_in_each_second() {
        let mut budget = Budget::new(3);
        let mut allowed = |ms: u64| budget.allows(Now::from_nanos(ms * 1_000_000));
        assert_eq!(
            [5000, 5000, 5500, 5999, 5999].map(&mut allowed),
            [true, true, true, false, false]
        );
        assert_eq!([6000, 6000, 6000, 6100].map(&mut allowed), [true, true, true, false]);
    }

    #[test]
    fn lines_beyond_the_budget_are_counted() {
        let mut console = Console::default();
        let client = "192.0.2.1:5".parse().unwrap();
        for _ in 0..USER_LINES_MAX + 7 {
            console.user_refused(Now::default(), Protocol::Tcp, client, Refusal::NoBackend);
        }
        assert_eq!(console.held_back(), 7);
        for _ in 0..REFUSED_LINES_MAX + 1 {
            console.server_refused(Now::default(), client, Some("register"), "no such port");
        }
        assert_eq!(console.held_back(), 8);
    }
}
