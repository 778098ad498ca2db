//! `lb`: a load balancer that backends join by themselves, on io_uring.
//!
//! # The picture
//!
//! ```text
//!            control core (tokio-uring)                      worker (x N, one thread and ring each)
//!  JSON over TCP, operators,                           +-------------- shell (system calls) ---------+
//!  probes -> Change -> Hub::apply -> Registry          | completion -> Event -> Core -> Cmd -> op    |
//!                                       |              |                          ^                  |
//!                                       v              |                          | Arc<Snapshot>    |
//!                                  publish(Snapshot) --- one atomic load a turn --+                 |
//!                                       ^              |  Reports (bounded queue), counters (atomics)|
//!                                       +--------------+---------------------------------------------+
//! ```
//!
//! Inside a worker bytes and decisions go one way: accept, pick, session, relay. Nothing calls back,
//! and a worker never waits for the control core: no snapshot means refuse, a stale one means go on.
//!
//! # Where to look
//!
//! | question | place |
//! |---|---|
//! | what happens to a byte? (the hot path) | [`worker::shell`], then [`proxy::tcp`] |
//! | what happens to a datagram? | [`worker::udp`], then [`worker::core::udp`] |
//! | what happens to a request? | [`worker::api`], then [`worker::gateways`] and [`proxy::http`] |
//! | who gets the next user? | [`balance`] |
//! | how does a backend join and leave? | [`control`], then [`cluster::registry`] |
//! | what does the kernel see, and all `unsafe` | [`ring`] |
//! | how do others look at live sessions? | [`session::shards`] |
//! | what can be configured, every limit | [`config`] |
//!
//! # Layers, low to high
//!
//! `base` < `cluster`, `http`, `ring::pool` < `metrics`, `config`, `logs`, `balance`, `session` <
//! `proxy`, `worker::link`, `worker::dispatcher` < `worker::core` < `ring` < `worker`, `control`,
//! `client`, `load` < `boot` < `cli`.
//! A module names only what is below it; `tests/tidy.rs` keeps it so.

pub mod balance;
pub mod base;
pub mod boot;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod config;
pub mod control;
pub mod http;
pub mod load;
pub mod logs;
pub mod metrics;
pub mod proxy;
pub mod ring;
pub mod session;
pub mod worker;
