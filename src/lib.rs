//! `lb`: a load balancer on io_uring with self-registering backends.
//!
//! # The picture
//!
//! ```text
//!            control core (tokio-uring)                      worker (x N, one thread and ring each)
//!  JSON over TCP, operators,                           +-------------- shell (system calls) ---------+
//!  probes -> Change -> Hub::apply -> Registry          | completion -> Event -> sessions -> Cmd -> op|
//!                                       |              |                          ^                  |
//!                                       v              |                          | Arc<Snapshot>    |
//!                                  publish(Snapshot) --- one atomic load a turn --+                 |
//!                                       ^              |  Reports (bounded queue), counters (atomics)|
//!                                       +--------------+---------------------------------------------+
//! ```
//!
//! Inside a worker, bytes and decisions flow one way: accept, pick, session, relay. Nothing calls
//! back. A worker never waits for the control core: without a snapshot it refuses users, with a stale
//! one it carries on. A snapshot holds every service with its backends and its terms, so every change
//! while the balancer runs, a registration or a reload, is one more snapshot.
//!
//! # Where to look
//!
//! | question | place |
//! |---|---|
//! | what happens to a byte? (the hot path) | [`worker::shell`], [`worker::tcp`], then [`proxy::tcp`] |
//! | what happens to a datagram? | [`worker::udp`], then [`worker::udp::sessions`] |
//! | what happens to a request? | [`worker::http::driver`], then [`worker::http::sessions`] and [`proxy::http`] |
//! | what is a protocol to its worker's loop? | [`worker::driver`], held by [`worker::shell`] |
//! | how does a worker stand still, lose nothing and go on? | [`worker::brake`], then `worker::standstill` |
//! | how does a user follow whose request was under way then? | [`worker::late`], then `worker::followers` |
//! | what lies between a user who speaks TLS and its session? | [`worker::lobby`], then [`proxy::tls`] and [`tls`] |
//! | and between a session and a backend that is reached by TLS? | [`worker::approach`], then the same |
//! | and between one who speaks HTTP/2 and its requests, or these and a backend that does? | `worker::http::sessions::streams` and `trunks`, then [`proxy::http2`] |
//! | who gets the next user? | [`balance`] |
//! | what is a service, and what do workers see of it? | [`cluster::service`], [`cluster::snapshot`] |
//! | which service is an API request for? | [`cluster::route`], [`cluster::doors`] |
//! | how does a backend join and leave? | [`control`], then [`cluster::registry`] |
//! | where are the system calls, and all the `unsafe`? | [`ring`] |
//! | how are live sessions read from outside? | [`session::shards`] |
//! | what does a balancer leave to its successor? | [`estate`] |
//! | what can be configured, and what is limited? | [`config`] |
//!
//! # Layers, low to high
//!
//! `base` < `tls` < `cluster`, `http`, `ring::pool` < `metrics`, `config`, `logs`, `balance`, `session`, `estate` <
//! `handover`, `proxy`, `worker::brake`, `worker::late`, `worker::link`, `worker::opening`, `worker::books`,
//! `worker::slots`, `worker::starved`, `worker::grace`, `worker::ends`, `worker::cx` < `worker::tcp::sessions`, `worker::udp::sessions`, `worker::http::sessions` <
//! `ring` < `worker`, `control`, `client`, `load` < `boot` < `cli`.
//! A module uses only what is below it; `tests/tidy.rs` enforces this.

pub mod balance;
pub mod base;
pub mod boot;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod config;
pub mod control;
pub mod estate;
pub mod handover;
pub mod http;
pub mod load;
pub mod logs;
pub mod metrics;
pub mod proxy;
pub mod ring;
pub mod session;
pub mod tls;
pub mod worker;
