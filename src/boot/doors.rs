//! The doors: listening sockets, opened before anything else starts, so that a taken port is the first
//! thing an operator hears. Owns the sentences about ports.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use tracing::warn;

use super::Trouble;
use crate::cluster::Protocol;
use crate::config::plans::Name;
use crate::control::doors::{NewDoor, Opened};
use crate::ring::sys;

/// A door of the control core; `None` when it is off.
pub fn open(address: Option<SocketAddr>, name: &str) -> Result<Option<TcpListener>, Trouble> {
    let Some(address) = address else { return Ok(None) };
    let (door, _) = on_all(address, &Name::flag(name), |address| sys::listen(address, false))?;
    Ok(Some(door.into()))
}

/// Opens users' doors, each with one listener for each worker on the same port. With `gro`, the kernel may
/// deliver several datagrams as one.
///
/// # Errors
/// The first that cannot be opened; those before it are closed again.
pub fn open_users(doors: &[NewDoor], workers: usize, gro: bool) -> Result<Vec<Opened>, Trouble> {
    let open = |door: &NewDoor| match door.plan.protocol {
        Protocol::Udp => {
            shared(door, workers, |address, shared| sys::datagram_door(address, shared, gro))
        }
        Protocol::Tcp | Protocol::Api => shared(door, workers, sys::listen),
    };
    doors.iter().map(open).collect()
}

/// Where a door could be opened: what [`open`] and [`open_users`] find out first.
///
/// # Errors
/// What they would say.
pub fn try_out(
    name: &Name,
    protocol: Protocol,
    address: SocketAddr,
) -> Result<SocketAddr, Trouble> {
    match protocol {
        Protocol::Udp => alone(name, address, |at, shared| sys::datagram_door(at, shared, false)),
        Protocol::Tcp | Protocol::Api => alone(name, address, sys::listen),
    }
}

/// Where a door is that shares its port with nobody, which is closed again. The kernel would let a second
/// balancer of the same user share the port, and take half of the users.
fn alone(
    name: &Name,
    address: SocketAddr,
    open: impl Fn(SocketAddr, bool) -> io::Result<OwnedFd>,
) -> Result<SocketAddr, Trouble> {
    let (door, there) = on_all(address, name, |address| open(address, false))?;
    let own = sys::local(door.as_fd()).map_err(|error| taken(name, there, &error))?;
    Ok(SocketAddr::new(there.ip(), own.port()))
}

/// The listeners of a door, and where it is.
fn shared(
    door: &NewDoor,
    workers: usize,
    open: impl Fn(SocketAddr, bool) -> io::Result<OwnedFd>,
) -> Result<Opened, Trouble> {
    let name = &door.plan.name;
    let mut at = door.plan.address;
    if !door.beside_own {
        at = alone(name, at, &open)?;
    }
    // Of those that share, none may be closed again: users would be waiting in its queue.
    let (first, at) = on_all(at, name, |address| open(address, true))?;
    let trouble = |error: io::Error| taken(name, at, &error);
    let address = sys::local(first.as_fd()).unwrap_or(at);
    let others = (1..workers).map(|_| open(at, true).map_err(trouble));
    let sockets = [Ok(first)].into_iter().chain(others).collect::<Result<_, _>>()?;
    Ok(Opened { address, sockets })
}

/// Opens a door and returns where. A door for all addresses is opened for IPv4 alone if the kernel
/// has no IPv6 (`ipv6.disable=1`).
pub fn on_all<T>(
    address: SocketAddr,
    name: &Name,
    open: impl Fn(SocketAddr) -> io::Result<T>,
) -> Result<(T, SocketAddr), Trouble> {
    let opened = match open(address) {
        Err(error) if lacks_family(&error) && address.ip() == Ipv6Addr::UNSPECIFIED => {
            let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
            warn!(door = &*name.name, address = %v4, "this kernel has no IPv6: users of IPv4 are served");
            open(v4).map(|door| (door, v4)).map_err(|error| (v4, error))
        }
        outcome => outcome.map(|door| (door, address)).map_err(|error| (address, error)),
    };
    opened.map_err(|(at, error)| taken(name, at, &error))
}

/// Whether the kernel has no sockets of an address family at all.
fn lacks_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32)
}

/// Why a door could not be opened.
pub fn taken(name: &Name, address: SocketAddr, error: &io::Error) -> Trouble {
    let place = name.place();
    Trouble(match error.kind() {
        _ if lacks_family(error) => format!(
            "the {name} door cannot open at {address}, because this kernel has no IPv6; choose an \
             address of IPv4 {place}"
        ),
        io::ErrorKind::AddrInUse => format!(
            "the {name} port {address} is taken by another program; stop it or choose another {place}"
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "the {name} door cannot open at {address}, which is not an address of this host; choose one \
             that `ip address` shows {place}"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "may not open the {name} port {address}; choose one from 1024 up or grant CAP_NET_BIND_SERVICE"
        ),
        _ => format!(
            "cannot open the {name} port {address}: {error}; choose another address {place}"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that has IPv4 sockets only.
    fn without_ipv6(address: SocketAddr) -> io::Result<SocketAddr> {
        match address {
            SocketAddr::V4(_) => Ok(address),
            SocketAddr::V6(_) => Err(io::Error::from_raw_os_error(Errno::EAFNOSUPPORT as i32)),
        }
    }

    #[test]
    fn a_door_for_all_addresses_is_one_of_ipv4_where_there_are_no_others() {
        let at = |text: &str| on_all(text.parse().unwrap(), &Name::flag("tcp"), without_ipv6);
        let all: SocketAddr = "0.0.0.0:8081".parse().unwrap();
        assert_eq!(at("[::]:8081").unwrap(), (all, all));
        let one: SocketAddr = "127.0.0.1:8081".parse().unwrap();
        assert_eq!(at("127.0.0.1:8081").unwrap(), (one, one));
        let said = at("[::1]:8081").unwrap_err().to_string();
        assert!(said.contains("this kernel has no IPv6; choose an address of IPv4 with"), "{said}");
    }

    #[test]
    fn another_fault_of_a_door_is_not_taken_for_a_lack_of_ipv6() {
        let taken = |_| -> io::Result<()> { Err(Errno::EADDRINUSE.into()) };
        for (name, cure) in [
            (Name::flag("tcp"), "choose another with --tcp"),
            (Name::service("redis"), "choose another in [service.redis]"),
        ] {
            let said = on_all("[::]:8081".parse().unwrap(), &name, taken).unwrap_err().to_string();
            let wanted = format!("the {name} port [::]:8081 is taken by another program;");
            assert!(said.starts_with(&wanted) && said.ends_with(cure), "{said}");
        }
    }
}
