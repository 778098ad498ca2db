//! The load generator: asks a balancer, or a service directly, as fast as it answers or on a schedule,
//! and checks every reply.
//!
//! | question | place |
//! |---|---|
//! | when is a request due? | [`plan`] |
//! | what is sent, and is this its reply? | [`message`], [`client`] |
//! | what came out, and is it good enough? | [`tally`], [`expect`] |

pub mod client;
pub mod expect;
pub mod message;
pub mod plan;
pub mod tally;
