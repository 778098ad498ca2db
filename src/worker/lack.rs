//! What a worker lacked when a connection to a backend failed: told from the error, so that want of our
//! own is never blamed on a backend.

use nix::errno::Errno;

/// What we lacked when a connection failed that says nothing about the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lack {
    /// Nothing: it was the backend.
    None,
    /// A local port towards this backend (`EADDRNOTAVAIL`, connect(2)): the same ports may be free towards
    /// another.
    Ports,
    /// Descriptors or memory: another backend would not help.
    Everywhere,
}

impl Lack {
    pub fn of(errno: Errno) -> Lack {
        match errno {
            Errno::EADDRNOTAVAIL => Lack::Ports,
            Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS | Errno::EAGAIN => {
                Lack::Everywhere
            }
            _ => Lack::None,
        }
    }
}
