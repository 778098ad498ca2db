//! A worker: one thread, one ring, its share of the users. `core` decides, `shell` does, `link` is
//! what crosses to the control core.

pub mod core;
pub mod dispatcher;
pub mod link;
pub mod shell;
