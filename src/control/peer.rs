//! Who is at the other end of a connection to the admin door. Owns how one is told from another, in the
//! log and where each has a share.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Who is at the other end of a connection to the admin door.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    Tcp(SocketAddr),
    /// Over the unix socket, as the kernel says.
    Unix {
        uid: u32,
    },
}

impl Peer {
    /// By what one is told from another where each has a share: the address, or one that stands for
    /// the user, in a network that nobody has (RFC 6666).
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
