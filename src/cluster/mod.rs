//! Services and their backends: who is registered, on which terms users are served, and the frozen
//! [`Snapshot`] that workers balance over. `registry` is the one mutable truth, `service` and `snapshot`
//! are what it is frozen into, `rotation` is the order in which a pool is served, `table` says which backend of it
//! a user returns to, `groups` splits it by shares, and `route` and `doors` find the service for an API request.
//! The choice for one user is up to `balance`.

/// Fallbacks, one after the other, at most.
pub const FALLBACKS_MAX: u8 = 8;

pub mod answers;
pub mod backend;
pub mod doors;
pub mod gate;
pub mod groups;
pub mod hash_key;
pub mod registry;
pub mod rotation;
pub mod route;
pub mod seats;
pub mod service;
pub mod share;
pub mod snapshot;
pub mod source;
pub mod table;
pub mod turn;

pub use backend::{
    AskedCheck, Backend, BackendId, DoorId, Doorway, Protocol, ServiceId, Standing, WEIGHT_MAX,
    is_grpc_service,
};
pub use doors::Doors;
pub use gate::{Barrier, Limits};
pub use service::{
    HashBy, OnBackendLoss, Policy, Proxies, RequestLimits, Service, Terms, Timeouts, WhenAllFail,
};
pub use snapshot::Snapshot;
