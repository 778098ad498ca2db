//! API users: `driver` stands between the ring and `sessions`, which decides; `requests` are the lines
//! about them in the log.

pub mod driver;
pub mod requests;
pub mod sessions;
