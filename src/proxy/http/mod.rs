//! The HTTP gateway as decisions: one user's connection and its requests, one after the other, each
//! to a backend chosen for it. Owns the words that its parts and the worker share. Events in,
//! commands out; no socket, no clock, and bodies pass through in the blocks that they arrived in.
//!
//! ```text
//!   gateway    the life of a user's connection, and the only place that decides what happens next
//!   routing    which service a request is for
//!   request    heads and bodies from the user on their way to a backend
//!   response   heads and bodies from a backend on their way to the user
//!   handover   one request on one backend's connection, and on another if it may be repeated
//!   exchange   what is known about the request that is being served
//!   tunnel     what follows an upgrade
//!   trunk      a connection to a backend that requests share
//!   patience   how long it waits for each thing, and what happens then
//!   shed       who is let go, and what they are told
//!   spares     connections to backends that wait for the next request
//!   stash      bytes that arrived before they were wanted
//! ```

mod exchange;
mod gateway;
mod handover;
mod patience;
mod request;
mod response;
mod routing;
mod shed;
pub mod spares;
mod stash;
pub mod trunk;
mod tunnel;

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::http2::Excess;
use super::line::{Features, Line};
use super::pace::MANY_BYTES_MAX;
use crate::base::time::Now;
use crate::cluster::{BackendId, Barrier, ServiceId, Snapshot};
use crate::config::Config;
use crate::http::Limits;
use crate::http::date::Date;
use crate::http::trace::Ids;
use crate::ring::pool::{Buf, Chain, Class, Pool, SMALL_BYTES};
use crate::session::{EndReason, SessionId};

pub use exchange::HOST_KEPT_MAX;
pub use gateway::Gateway;
pub use gateway::estate::{Described, Served};

/// Everything about the gateway that can be set for all services alike.
#[derive(Clone, PartialEq, Debug)]
pub struct GatewaySettings {
    pub limits: Limits,
    /// For a whole request head, from its first byte (or the connection's beginning) to its last.
    pub head_timeout: Duration,
    /// For a user's connection between two requests.
    pub idle_timeout: Duration,
    /// For a connection to a backend between two requests; shorter than what backends allow, so
    /// that we are the ones who end it.
    pub spare_timeout: Duration,
    /// Limit on the connections to one backend that one worker keeps for later.
    pub spares_max: usize,
    /// Limit on the connections to one backend that one worker keeps for the users who logged in on
    /// them.
    pub private_max: usize,
    /// Limit on the bytes that incomplete and not yet wanted requests may occupy on one worker.
    pub held_bytes_max: usize,
    /// This balancer's name in `Via`; it must be unique, or a loop looks like a chain of proxies.
    pub via: String,
    /// The seed of the request IDs, different on each worker; `None`: there are none.
    pub ids_seed: Option<[u64; 2]>,
    /// Peers that we believe about who the user is.
    pub trusted: Vec<IpNet>,
    /// The port of the HTTPS door, if there is one.
    pub https_port: Option<u16>,
    /// Users may speak HTTP/2 by prior knowledge where they speak no TLS.
    pub h2c: bool,
    /// Limit on the streams of one connection at once.
    pub h2_streams: u32,
}

impl GatewaySettings {
    /// The settings in a configuration; `via` is the balancer's name in `Via`.
    pub fn of(config: &Config, via: &str) -> GatewaySettings {
        let api = &config.api;
        GatewaySettings {
            limits: Limits {
                line_bytes: api.line_bytes,
                field_bytes: api.field_bytes,
                head_bytes: api.head_bytes,
                fields: api.fields,
            },
            head_timeout: api.head_timeout,
            idle_timeout: api.idle_timeout,
            spare_timeout: api.upstream_idle,
            spares_max: api.upstream_idle_max,
            private_max: api.upstream_private_max,
            held_bytes_max: config.limits.buffer_bytes / HELD_SHARE,
            via: via.to_string(),
            ids_seed: None,
            trusted: api.trusted.clone(),
            https_port: config.listen.api_tls.map(|door| door.port()),
            h2c: api.h2c,
            h2_streams: api.h2_streams,
        }
    }
}

impl Default for GatewaySettings {
    fn default() -> GatewaySettings {
        GatewaySettings::of(&Config::default(), "lb")
    }
}

/// One eighth of the buffer memory is for heads under way, and is not divided into blocks.
pub const HELD_SHARE: usize = 8;
/// How long a user for whom there is no room may take to send its request.
const REFUSED_PATIENCE: Duration = Duration::from_secs(2);
/// How long a backend may leave `Expect: 100-continue` unanswered before we answer it ourselves.
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a user may be silent after the last response before we close, if its request was read
/// to the end; otherwise it has the time allowed for a body. Whatever it still sends is read, so
/// that the response is not lost to a reset (RFC 9112 9.6).
const LINGER: Duration = Duration::from_secs(5);
/// Limit on the whole of that time: an upload of some gigabytes at a usual rate.
const LINGER_MAX: Duration = Duration::from_secs(900);
/// `Retry-After` in seconds when there was no backend.
const RETRY_AFTER: u32 = 5;

/// What the worker must do for a gateway.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GatewayCmd {
    /// An operation on one of the two connections; the backend's is the one assigned last.
    Wire(super::StreamCmd),
    /// Find a connection to a backend; answered by [`Gateway::assigned`] or [`Gateway::refused`].
    Obtain(Wish),
    /// The backend's connection is no longer needed; [`Gateway::take_released`] hands it out.
    Release,
    /// The backend has begun to answer the request.
    Answered,
    /// The backend has had all that there is of the request since then, and let the time for its answer pass.
    Unanswered { since: Now },
    /// Something has happened to streams of the connection; see [`Gateway::next_news`].
    Streams,
    /// The user has done too much of something for which nobody has asked.
    Calmed(Excess),
}

/// Which connection a request wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wish {
    /// Whose backends may serve the request.
    pub service: ServiceId,
    /// How many backends this request has been on before. Zero forgets those of the previous
    /// request.
    pub attempt: u8,
    pub reuse: Reuse,
}

/// Whether a connection that has served other requests will do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reuse {
    Any,
    /// One that was in use a moment ago: this request cannot be repeated if the backend happens to
    /// close the connection just now.
    Recent,
    /// A new one: another has turned out to be stale.
    No,
}

/// A backend connection for a gateway to use.
#[derive(Debug)]
pub struct Assigned {
    pub line: Line,
    /// It has served other requests.
    pub reused: bool,
    /// This user has logged in on it, or may have.
    pub private: bool,
}

/// A backend connection that a gateway no longer needs.
#[derive(Debug)]
pub struct Released {
    pub line: Line,
    /// How long another request may still use it; `None`: it must be closed.
    pub keep: Option<Duration>,
    /// Its user may have logged in on it: keep it for this user alone, and no longer than the user
    /// stays.
    pub private: bool,
    /// It must be closed with a reset.
    pub reset: bool,
}

/// Why there is no connection to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// None is registered.
    NoBackend,
    /// All of them fail their check.
    AllFail,
    /// All of them are draining.
    AllDrain,
    /// Some fail their check, and the others are draining.
    NoneServes,
    /// The service lets the request in no further.
    Barred(Barrier),
    /// The operator has taken the service out of use for a while.
    Maintenance,
    /// Every backend that was tried refused.
    Unreachable,
    /// The last one that was tried did not answer.
    TimedOut,
    /// We have run out of descriptors or ports.
    Exhausted,
}

/// How a user's connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ending {
    pub reason: EndReason,
    /// The user must see from a reset that the connection did not end normally.
    pub reset: bool,
}

/// One request, as it is logged.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub session: SessionId,
    pub client: SocketAddr,
    /// It came by HTTPS.
    pub is_tls: bool,
    /// It came on a stream of HTTP/2.
    pub is_http2: bool,
    /// The request's number on its connection, from one.
    pub number: u32,
    /// Who was to serve it, or did; `None` if nobody claims it or its head was never read.
    pub service: Option<ServiceId>,
    /// The service that left it to that one.
    pub asked: Option<ServiceId>,
    /// As it came, truncated if it is long; empty if it was never read or there was none.
    pub host: &'a [u8],
    /// Its `X-Request-Id`; empty if it has none of ours.
    pub id: &'a [u8],
    /// The trace that it says it belongs to; zero for none.
    pub trace: u128,
    /// Method and target as they came, truncated if they are long; empty if they were never read.
    pub line: &'a [u8],
    /// Zero if the user was not answered.
    pub status: u16,
    /// The balancer answered, not a backend.
    pub own: bool,
    /// Its connection to the backend had served other requests.
    pub reused: bool,
    /// The last backend that was tried.
    pub backend: Option<BackendId>,
    pub retries: u8,
    /// Content from the user and to the user in bytes, with chunked framing where there was any.
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub times: Times,
    /// What went wrong; `None` if nothing did.
    pub fault: Option<&'static str>,
}

impl Record<'_> {
    /// How long the user waited until a backend's response began.
    pub fn waited(&self) -> Option<Duration> {
        let answered = self.times.answered.filter(|_| !self.own)?;
        Some(answered.since(self.times.began))
    }

    /// Whether it failed other than by the user's doing: it was answered with 5xx by whomever, or its response broke
    /// off while the user waited for it.
    pub fn has_failed(&self) -> bool {
        let by_user = |fault| {
            [EndReason::ClientReset, EndReason::Finished].iter().any(|it| it.name() == fault)
        };
        self.status >= 500 || (!self.own && self.fault.is_some_and(|fault| !by_user(fault)))
    }
}

/// When a request reached each stage.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Times {
    /// The first byte of its head had arrived.
    pub began: Now,
    /// Its head was complete.
    pub read: Now,
    /// It had a connection to a backend.
    pub connected: Option<Now>,
    /// The head of the response had arrived.
    pub answered: Option<Now>,
    /// The user's kernel had the last byte, or the request had ended in another way.
    pub ended: Now,
}

/// Receives the records of requests.
pub trait Journal {
    fn record(&mut self, record: &Record<'_>);
}

/// What one worker keeps for all its gateways.
pub struct Kit {
    /// Where heads are written before they go into blocks.
    scratch: Vec<u8>,
    /// Where a request is sent that must come by HTTPS.
    location: Vec<u8>,
    name: String,
    /// The IDs of requests; `None`: they have none.
    ids: Option<Ids>,
    /// Blocks kept back, so that a head can be written even when the pool is empty.
    stock: Vec<Buf>,
    /// How many there should be.
    stock_wanted: usize,
    /// What one receive may bring in, in bytes.
    share: u32,
}

/// Least number of blocks kept back. There is one for each connection, since all of them may have a
/// head to write before the first lets go of a block.
const STOCK_MIN: usize = 32;
/// At most one eighth of the pool is kept back.
const STOCK_SHARE: usize = 8;
/// The armed receives of all connections may together bring in one quarter of the pool, if none of
/// them was armed while there were fewer. Of a pool of 6,144 blocks the first 96 connections get
/// the most, and 1,024 that come one after another get 1 + ln(1024 / 96) times the quarter: 84 % of
/// the pool.
const ARMED_SHARE: usize = 4;

impl Kit {
    /// `ids` as in [`GatewaySettings::ids_seed`].
    pub fn new(ids: Option<[u64; 2]>) -> Kit {
        Kit {
            scratch: Vec::with_capacity(64 << 10),
            location: Vec::new(),
            name: String::with_capacity(64),
            ids: ids.map(Ids::new),
            stock: Vec::with_capacity(STOCK_MIN),
            stock_wanted: 0,
            share: MANY_BYTES_MAX,
        }
    }

    /// Divides the pool among `connections`: fills the stock up, or gives back what it has too
    /// much.
    pub fn refill(&mut self, connections: usize, pool: &mut Pool) {
        let blocks_each = pool.blocks(Class::Small) / ARMED_SHARE / connections.max(1);
        let bytes_each = blocks_each.saturating_mul(SMALL_BYTES).min(MANY_BYTES_MAX as usize);
        self.share = bytes_each.max(SMALL_BYTES) as u32;
        let most = pool.blocks(Class::Small) / STOCK_SHARE;
        self.stock_wanted = connections.max(STOCK_MIN).min(most);
        while self.stock.len() < self.stock_wanted {
            let Some(buf) = pool.take(Class::Small) else { return };
            self.stock.push(buf);
        }
        self.stock.drain(self.stock_wanted..).for_each(|buf| pool.give_back(buf));
    }

    /// What one receive in small blocks may bring in, in bytes.
    pub fn share(&self) -> u32 {
        self.share
    }

    /// Whether nothing of the stock has been used.
    pub fn is_full(&self) -> bool {
        self.stock.len() >= self.stock_wanted
    }

    /// Whether more is kept back than an idle worker needs.
    pub fn has_left_over(&self) -> bool {
        self.stock.len() > STOCK_MIN
    }

    /// Gives the stock back.
    pub fn release(&mut self, pool: &mut Pool) {
        self.stock.drain(..).for_each(|buf| pool.give_back(buf));
    }

    /// Appends bytes to a chain. Fails when there is no block for all of them; some may have been
    /// appended by then.
    fn append(&mut self, chain: &mut Chain, mut bytes: &[u8], pool: &mut Pool) -> Result<(), Full> {
        while !bytes.is_empty() {
            let mut buf = pool.take(Class::Small).or_else(|| self.stock.pop()).ok_or(Full)?;
            let count = pool.append(&mut buf, bytes);
            pool.push(chain, buf);
            bytes = &bytes[count..];
        }
        Ok(())
    }
}

/// There is no block left, not even in the stock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Full;

/// What a gateway borrows while it handles an event.
pub struct Context<'a> {
    pub now: Now,
    pub pool: &'a mut Pool,
    pub kit: &'a mut Kit,
    pub settings: &'a GatewaySettings,
    /// The services as they are now.
    pub snapshot: &'a Snapshot,
    pub features: Features,
    pub date: &'a Date,
    pub out: &'a mut Vec<GatewayCmd>,
    pub journal: &'a mut dyn Journal,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_whether_http_2_is_spoken_in_the_clear_and_in_how_many_streams() {
        let of = |text: &str| {
            let config = crate::config::file::read("f", text).unwrap();
            let settings = GatewaySettings::of(&config, "lb");
            (settings.h2c, settings.h2_streams)
        };
        assert_eq!(of(""), (true, 100));
        assert_eq!(of("api.h2c = false\napi.h2_streams = 7"), (false, 7));
    }

    #[test]
    fn every_connection_can_write_a_head_when_the_pool_is_used_up() {
        let mut pool = Pool::new(800, 0);
        let mut kit = Kit::new(None);
        kit.refill(90, &mut pool);
        let used: Vec<Buf> = std::iter::from_fn(|| pool.take(Class::Small)).collect();
        let mut heads = Chain::EMPTY;
        for number in 0..90 {
            assert!(kit.append(&mut heads, b"head", &mut pool).is_ok(), "head {number}");
        }
        assert!(kit.append(&mut heads, b"head", &mut pool).is_err());
        used.into_iter().for_each(|buf| pool.give_back(buf));
        pool.give_back_chain(heads);
        for (connections, kept) in [(90, 90), (1, 32), (5_000, 100)] {
            kit.refill(connections, &mut pool);
            assert_eq!(800 - pool.free(Class::Small), kept, "{connections} connections");
            assert!(kit.is_full());
        }
    }

    #[test]
    fn the_more_connections_the_less_one_receive_brings_in() {
        let mut pool = Pool::new(6_144, 0);
        let mut kit = Kit::new(None);
        for (connections, blocks) in [(0, 16), (96, 16), (97, 15), (512, 3), (10_000, 1)] {
            kit.refill(connections, &mut pool);
            assert_eq!(kit.share() as usize, blocks * SMALL_BYTES, "{connections} connections");
        }
    }
}
