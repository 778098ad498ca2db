//! The HTTP gateway as decisions: one user's connection, its requests one after the other, each to a
//! backend of its own choice. Owns the words that its parts and the worker share. Events in, commands
//! out; no socket, no clock, and bodies pass through in the blocks that they came in.
//!
//! ```text
//!   gateway    the life of a user's connection, and the only place that decides what happens next
//!   request    heads and bodies from the user on their way to a backend
//!   response   heads and bodies from a backend on their way to the user
//!   handover   one request on one backend's connection, and on to another if it may be
//!   exchange   what is known about the request that is being served
//!   tunnel     what follows an upgrade
//!   patience   how long it waits for what, and what then
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
mod shed;
pub mod spares;
mod stash;
mod tunnel;

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use ipnet::IpNet;

use super::line::{Features, Line};
use super::pace::MANY_BYTES_MAX;
use crate::base::time::Now;
use crate::cluster::BackendId;
use crate::config::Config;
use crate::http::Limits;
use crate::http::date::Date;
use crate::ring::pool::{Buf, Chain, Class, Pool, SMALL_BYTES};
use crate::session::{EndReason, SessionId};

pub use gateway::Gateway;

/// Everything about the gateway that can be set.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    pub limits: Limits,
    /// Content bytes of one request.
    pub body_bytes_max: u64,
    /// A whole request head, from its first byte (or the connection's beginning) to its last.
    pub head_timeout: Duration,
    /// A body, in either direction, of which nothing moves.
    pub body_timeout: Duration,
    /// The head of a response, once the request has been sent.
    pub answer_timeout: Duration,
    /// A user's connection between two requests.
    pub idle_timeout: Duration,
    /// A tunnel through which nothing moves.
    pub tunnel_timeout: Duration,
    /// A connection to a backend between two requests; shorter than what backends do themselves, so
    /// that we are the ones who end it.
    pub spare_timeout: Duration,
    /// Connections to one backend that one worker keeps for later.
    pub spares_max: usize,
    /// Connections to one backend that one worker keeps for the users who logged in on them.
    pub private_max: usize,
    /// Bytes that requests which are not complete, or not wanted yet, may take up on one worker.
    pub held_bytes_max: usize,
    /// Further backends that a request is offered.
    pub retries_max: u8,
    /// This balancer's name in `Via`; unlike any other's, or a loop cannot be told from a chain.
    pub via: String,
    /// Peers whose word on who the user is counts.
    pub trusted: Vec<IpNet>,
}

impl Settings {
    /// The settings of a configuration, under the name that the balancer goes by in `Via`.
    pub fn of(config: &Config, via: &str) -> Settings {
        let api = &config.api;
        Settings {
            limits: Limits {
                line_bytes: api.line_bytes,
                field_bytes: api.field_bytes,
                head_bytes: api.head_bytes,
                fields: api.fields,
            },
            body_bytes_max: api.body_bytes.map_or(u64::MAX, NonZeroU64::get),
            head_timeout: api.head_timeout,
            body_timeout: api.body_timeout,
            answer_timeout: api.answer_timeout,
            idle_timeout: api.idle_timeout,
            tunnel_timeout: api.tunnel_idle,
            spare_timeout: api.upstream_idle,
            spares_max: api.upstream_idle_max,
            private_max: api.upstream_private_max,
            held_bytes_max: config.limits.buffer_bytes / HELD_SHARE,
            retries_max: api.retries,
            via: via.to_string(),
            trusted: api.trusted.clone(),
        }
    }
}

impl Default for Settings {
    fn default() -> Settings {
        Settings::of(&Config::default(), "lb")
    }
}

/// This part of the memory for buffers is for heads under way, and is no block's.
pub const HELD_SHARE: usize = 8;
/// How long a user for whom there is no room may take to ask.
const REFUSED_PATIENCE: Duration = Duration::from_secs(2);
/// How long a backend may leave `Expect: 100-continue` unanswered before we answer it ourselves.
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);
/// After the last response: how long a user may be silent before it is closed to, when its request was
/// read to the end; otherwise it has the time of a body. What it still sends is read, so that the response
/// is not lost to a reset (RFC 9112 9.6) …
const LINGER: Duration = Duration::from_secs(5);
/// … for so long in all: an upload of some gigabytes at a usual rate.
const LINGER_MAX: Duration = Duration::from_secs(900);
/// Seconds after which it is worth asking again when there was no backend.
const RETRY_AFTER: u32 = 5;

/// What the worker is to do for a gateway.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cmd {
    /// On one of the two connections; the backend's is the one that was assigned last.
    Wire(super::Cmd),
    /// Find a connection to a backend: [`Gateway::assigned`] or [`Gateway::refused`] is the answer.
    Obtain(Wish),
    /// The backend's connection is not needed any more; [`Gateway::take_released`] hands it out.
    Release,
}

/// Which connection is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wish {
    /// How often this request was on a backend before. Zero forgets the backends of the last one.
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
    /// A new one: another had gone stale.
    No,
}

/// A backend's connection for a gateway to use.
#[derive(Debug)]
pub struct Assigned {
    pub line: Line,
    /// It has served other requests.
    pub reused: bool,
    /// This user has logged in on it, or may have.
    pub private: bool,
}

/// A backend's connection that a gateway has done with.
#[derive(Debug)]
pub struct Released {
    pub line: Line,
    /// For how long another request may still use it; `None`: it must be closed.
    pub keep: Option<Duration>,
    /// Its user may have logged in on it: it may be kept for this user alone, for as long as there is one.
    pub private: bool,
    /// It must be closed with a reset.
    pub reset: bool,
}

/// Why there is no connection to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    NoBackend,
    /// Every backend that was tried refused.
    Unreachable,
    /// The last one that was tried did not answer.
    TimedOut,
    /// We have no descriptor or no port left.
    Exhausted,
}

/// How a user's connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ending {
    pub reason: EndReason,
    /// The user must learn that it did not end by itself.
    pub reset: bool,
}

/// One request, as it is logged.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub session: SessionId,
    pub client: SocketAddr,
    /// Which request of its connection it was, from one.
    pub number: u32,
    /// Method and target as they came, cut short if they are long; empty if they were never read.
    pub line: &'a [u8],
    /// Zero when the user was not answered.
    pub status: u16,
    /// The balancer answered, not a backend.
    pub own: bool,
    /// Its connection to the backend had served other requests.
    pub reused: bool,
    /// The last backend that was tried.
    pub backend: Option<BackendId>,
    pub retries: u8,
    /// Content from the user, and to the user, with chunked framing where there was any.
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub times: Times,
    /// What went wrong; `None` when nothing did.
    pub fault: Option<&'static str>,
}

/// When a request came how far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Times {
    /// The first byte of its head was there.
    pub began: Now,
    /// Its head was complete.
    pub read: Now,
    /// It had a connection to a backend.
    pub connected: Option<Now>,
    /// The head of the response was there.
    pub answered: Option<Now>,
    /// The user's kernel had the last byte, or it was over otherwise.
    pub ended: Now,
}

/// Takes the records of requests.
pub trait Journal {
    fn record(&mut self, record: &Record<'_>);
}

/// What a worker keeps for all its gateways.
pub struct Kit {
    /// Where heads are written before they go into blocks.
    scratch: Vec<u8>,
    name: String,
    /// Blocks kept back, so that a head can be written when the pool is used up.
    stock: Vec<Buf>,
    /// As many as there should be.
    stock_wanted: usize,
    /// What one receive may bring in, in bytes.
    share: u32,
}

/// Blocks kept back at least, and one for each connection: all of them may have a head to write before
/// the first of them has let go of a block.
const STOCK_MIN: usize = 32;
/// This part of the pool is kept back at most.
const STOCK_SHARE: usize = 8;
/// What the armed receives of all connections may bring in together is this part of the pool, if none was
/// armed when there were fewer. Of a pool of 6,144 blocks the first 96 get the most, and of 1,024 who
/// come one after another all together get 1 + ln(1024 / 96) times that: 84 % of the pool.
const ARMED_SHARE: usize = 4;

impl Kit {
    #[expect(clippy::new_without_default, reason = "there is one for each worker, made on purpose")]
    pub fn new() -> Kit {
        Kit {
            scratch: Vec::with_capacity(64 << 10),
            name: String::with_capacity(64),
            stock: Vec::with_capacity(STOCK_MIN),
            stock_wanted: 0,
            share: MANY_BYTES_MAX,
        }
    }

    /// Shares the pool out to so many connections: fills the stock up, or gives back what is left over.
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

    /// Whether more is kept back than for nobody at all.
    pub fn has_left_over(&self) -> bool {
        self.stock.len() > STOCK_MIN
    }

    /// Gives the stock back.
    pub fn release(&mut self, pool: &mut Pool) {
        self.stock.drain(..).for_each(|buf| pool.give_back(buf));
    }

    /// Appends bytes to a chain; an error when there is no block for all of them, and then some may
    /// have been appended.
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

/// What a gateway is lent while it handles an event.
pub struct Context<'a> {
    pub now: Now,
    pub pool: &'a mut Pool,
    pub kit: &'a mut Kit,
    pub settings: &'a Settings,
    pub features: Features,
    pub date: &'a Date,
    pub out: &'a mut Vec<Cmd>,
    pub journal: &'a mut dyn Journal,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_can_write_a_head_when_the_pool_is_used_up() {
        let mut pool = Pool::new(800, 0);
        let mut kit = Kit::new();
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
        let mut kit = Kit::new();
        for (connections, blocks) in [(0, 16), (96, 16), (97, 15), (512, 3), (10_000, 1)] {
            kit.refill(connections, &mut pool);
            assert_eq!(kit.share() as usize, blocks * SMALL_BYTES, "{connections} connections");
        }
    }
}
