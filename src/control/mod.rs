//! The control core: who is registered, who is well, and what the operator sees.

pub mod auth;
pub mod status;
