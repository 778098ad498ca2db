//! A connection to a backend as its session sees it before it can be used: how TLS is to be begun on it, and why
//! there is none. Owns these words; what is done by them is up to the drivers and to `approach`.

use nix::errno::Errno;

use crate::base::lack::Lack;
use crate::tls::backends::Client;
use crate::tls::engine::Fault;

/// Why there is no connection to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unconnected {
    Errno(Errno),
    /// It is there, and the handshake has failed.
    Tls(Fault),
}

impl Unconnected {
    /// What was lacking on this side, if that was the cause.
    pub fn lack(self) -> Lack {
        match self {
            Unconnected::Errno(errno) => Lack::of(errno),
            Unconnected::Tls(_) => Lack::None,
        }
    }
}

impl From<Errno> for Unconnected {
    fn from(errno: Errno) -> Unconnected {
        Unconnected::Errno(errno)
    }
}

/// A connection that has just been established.
pub struct Opening {
    /// The number of the backend, for what is kept of earlier connections to it.
    pub backend: u32,
    pub client: Client,
    /// Its time was up before it was established.
    pub is_late: bool,
}
