//! The other ends of the balancer's doors, as a person starts them: a backend that keeps itself
//! registered (`backend` decides, `stay` acts), small echo backends, the user program and the
//! reader of the admin door. Owns no part of the balancer; everything goes over its real ports.

pub mod admin;
pub mod backend;
pub mod board;
pub mod demo;
pub mod echo;
mod echo_api;
mod news;
mod roads;
pub mod stay;
pub mod user;
pub mod wire;
