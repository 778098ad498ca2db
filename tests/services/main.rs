//! Many services on one balancer, against the real kernel: each has doors and backends of its own, and the
//! users of one never reach those of another.

mod api;
mod clients;
mod datagrams;
mod doors;
mod groups;
mod harness;
mod introductions;
mod limits;
mod proxies;
mod streams;
mod tickets;
mod tls;
mod tls_backends;
mod tls_failures;
mod tls_user;

#[path = "../common/authority.rs"]
mod authority;
#[path = "../common/wait.rs"]
mod wait;
