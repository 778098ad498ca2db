//! UDP users: `driver` stands between the ring and `sessions`, which decides.

pub mod driver;
pub mod origins;
mod outbox;
pub mod passage;
pub mod sessions;
