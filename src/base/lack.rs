//! What this host lacked when a connection to a backend failed, told from the error, so that a backend is
//! never blamed for our own shortage.

use nix::errno::Errno;

/// Our own shortage behind a failed connection, which then says nothing about the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lack {
    /// None: the backend failed.
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
