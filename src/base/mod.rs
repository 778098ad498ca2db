//! What every layer may use: time as a value, timers, rate limits, publication, news between threads, threads, wakers,
//! shortages, likeness of names, mixing. No sockets.

pub mod bells;
pub mod buckets;
pub mod lack;
pub mod likeness;
pub mod mix;
pub mod publish;
pub mod quota;
#[cfg(test)]
pub mod random;
pub mod recent;
pub mod thread;
pub mod time;
pub mod wheel;
