//! Services and their backends: who is registered, by which terms users are brought to them, and the
//! frozen [`Snapshot`] that workers balance over. `registry` is the one mutable truth, `service` and
//! `snapshot` are what it is frozen into, `rotation` is in which order a pool is served; who is next is
//! `balance`'s.

pub mod backend;
pub mod registry;
pub mod rotation;
pub mod seats;
pub mod service;
pub mod snapshot;
pub mod source;

pub use backend::{Backend, BackendId, Protocol, ServiceId, Standing, WEIGHT_MAX};
pub use service::{OnBackendLoss, Policy, Service, Terms, Timeouts};
pub use snapshot::Snapshot;
