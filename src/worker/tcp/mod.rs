//! TCP users: `driver` stands between the ring and `sessions`, which decides; `splices` are the steps of
//! long streams that wait for their time.

pub mod driver;
pub mod sessions;
mod splices;
