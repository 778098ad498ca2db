//! Who is at the other end of a connection to the admin door. Owns how one peer is told from another, in
//! the log and for limits per source.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Who is at the other end of a connection to the admin door.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    Tcp(SocketAddr),
    /// Over the unix socket; the kernel vouches for the user ID.
    Unix {
        uid: u32,
    },
}

impl Peer {
    /// The source this peer counts towards in limits per source: its address, or for a user of the unix
    /// socket a made-up one in the reserved block of the discard prefix, which no host has (RFC 6666).
    pub fn source(self) -> IpAddr {
        match self {
            Peer::Tcp(address) => address.ip(),
            Peer::Unix { uid } => {
                Ipv6Addr::from_bits((0x0100 << 112) | (u128::from(uid) << 64)).into()
            }
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => write!(out, "{address}"),
            Peer::Unix { uid } => write!(out, "uid {uid}"),
        }
    }
}
