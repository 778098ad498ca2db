//! The control core: who is registered, who is well, and what the operator sees.

pub mod api;
pub mod auth;
pub mod drain;
pub mod frame;
pub mod health;
pub mod status;
