//! The doors: listening sockets, opened before anything else starts, so that a taken port is the first
//! thing an operator hears. Owns the sentences about ports.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};

use super::Trouble;
use crate::ring::sys;

/// A door of the control core; `None` when it is off.
pub fn open(address: Option<SocketAddr>, name: &str) -> Result<Option<TcpListener>, Trouble> {
    let Some(address) = address else { return Ok(None) };
    let door = sys::listen(address, false).map_err(|error| taken(name, address, &error))?;
    Ok(Some(door.into()))
}

/// One listener for each worker on the same port; none when the door is off.
pub fn open_shared(
    address: Option<SocketAddr>,
    workers: usize,
    name: &str,
) -> Result<Vec<OwnedFd>, Trouble> {
    shared(address, workers, name, sys::listen)
}

/// The same for datagrams. With `gro`, several of them may come as one.
pub fn open_datagrams(
    address: Option<SocketAddr>,
    workers: usize,
    gro: bool,
) -> Result<Vec<OwnedFd>, Trouble> {
    shared(address, workers, "udp", |address, shared| sys::datagram_door(address, shared, gro))
}

fn shared(
    address: Option<SocketAddr>,
    workers: usize,
    name: &str,
    open: impl Fn(SocketAddr, bool) -> io::Result<OwnedFd>,
) -> Result<Vec<OwnedFd>, Trouble> {
    let Some(wanted) = address else { return Ok(Vec::new()) };
    let trouble = |error: io::Error| taken(name, wanted, &error);
    // The kernel would let a second balancer of the same user share the port and half of the users:
    // a socket that shares with nobody finds out.
    let alone = open(wanted, false).map_err(trouble)?;
    let port = sys::local(alone.as_fd()).map_err(trouble)?.port();
    let address = SocketAddr::new(wanted.ip(), port);
    drop(alone);
    (0..workers).map(|_| open(address, true).map_err(trouble)).collect()
}

/// Why a door could not be opened.
pub fn taken(name: &str, address: SocketAddr, error: &io::Error) -> Trouble {
    Trouble(match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "the {name} port {address} is taken by another program; stop it or choose another with --{name}"
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "the {name} door cannot open at {address}, which is no address of this host; choose one \
             that `ip address` shows with --{name}"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "may not open the {name} port {address}; choose one from 1024 up or grant CAP_NET_BIND_SERVICE"
        ),
        _ => format!(
            "cannot open the {name} port {address}: {error}; choose another address with --{name}"
        ),
    })
}
