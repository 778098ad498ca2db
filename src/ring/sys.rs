//! Sockets and their options, descriptors, pinning: the few system calls a worker makes outside its
//! ring. Owns which options a user's and a backend's connection get. No `unsafe`: socket2 and nix
//! have done that.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// A silent peer is probed after this long without traffic …
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// … this often …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// … and given up after this many probes,
const KEEPALIVE_PROBES: u32 = 3;
/// or when what was sent to it has not been acknowledged for this long (`TCP_USER_TIMEOUT`, tcp(7)).
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// A taken port is asked for again for so long: the kernel takes a ring apart after its process has
/// gone, and a listener that the ring accepted on stays bound until then.
const PORT_PATIENCE: Duration = Duration::from_secs(1);
/// The pause between two such attempts.
const PORT_PAUSE: Duration = Duration::from_millis(20);

/// A listening socket. Accepted connections inherit its options, so they cost no call each. With
/// `shared`, other sockets of this process may listen on the same port (`SO_REUSEPORT`).
///
/// A port that is taken is waited for, for a second: a balancer that was killed a moment ago lets go
/// of its doors a little after its end.
pub fn listen(address: SocketAddr, shared: bool) -> io::Result<OwnedFd> {
    let began = Instant::now();
    loop {
        match listen_once(address, shared) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && began.elapsed() < PORT_PATIENCE =>
            {
                thread::sleep(PORT_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn listen_once(address: SocketAddr, shared: bool) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    set_relay_options(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A connection that waits in a listener's queue, if there is one; never waits itself.
pub fn accept_waiting(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let listener = SockRef::from(&listener);
    listener.set_nonblocking(true)?;
    match listener.accept() {
        Ok((socket, _)) => {
            // The accepted socket does not inherit O_NONBLOCK (accept(2)).
            Ok(Some(socket.into()))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// A socket for a connection to a backend. Blocking: only the ring reads and writes it.
pub fn stream(to: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    set_relay_options(&socket)?;
    Ok(socket.into())
}

fn set_relay_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))
}

/// Who is at the other end; a mapped IPv4 address is given as IPv4.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    address_of(SockRef::from(&socket).peer_addr()?)
}

/// Where a socket is bound.
pub fn local(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    address_of(SockRef::from(&socket).local_addr()?)
}

fn address_of(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    let address = address.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// Tells the peer that no more bytes will come (shutdown(2), half of a close).
pub fn finish_writing(socket: BorrowedFd<'_>) {
    // Fails only when the peer is gone already, which the receive side reports.
    let _ = SockRef::from(&socket).shutdown(Shutdown::Write);
}

/// Makes calls on a socket outside the ring return instead of waiting.
pub fn never_block(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).set_nonblocking(true)
}

/// Makes the coming close a reset (`SO_LINGER` with zero, socket(7)).
pub fn reset_on_close(socket: BorrowedFd<'_>) {
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}

/// Empties an eventfd after it woke its reader.
pub fn drain(wake: &nix::sys::eventfd::EventFd) {
    let mut count = [0; 8];
    let _ = nix::unistd::read(wake.as_fd(), &mut count);
}

/// The cores that this process may use, in order.
pub fn cores() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|core| set.is_set(*core).unwrap_or(false)).collect()
}

/// Keeps the calling thread on one core. Best effort: a core that went away is not an error.
pub fn pin(core: usize) {
    let mut set = CpuSet::new();
    if set.set(core).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}
