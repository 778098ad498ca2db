//! Sockets and their options, descriptors, pinning: the few system calls that a worker makes
//! outside its ring. Owns which options a user's and a backend's connection get. No `unsafe`:
//! socket2 and nix contain that.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recv, recvmsg, send, sendmsg,
    setsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::datagram::PktInfo;
use crate::proxy::outlook::GIVEN_UP_AFTER;

/// A silent peer that owes us nothing is probed after this long without traffic …
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// … this often …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// … and given up after this many probes. The kernel probes only while nothing is queued for the
/// peer; what the peer owes beyond that is `proxy::outlook`'s concern.
const KEEPALIVE_PROBES: u32 = 3;
const _: () = assert!(
    KEEPALIVE_IDLE.as_secs() + KEEPALIVE_INTERVAL.as_secs() * KEEPALIVE_PROBES as u64
        == GIVEN_UP_AFTER.as_secs(),
    "a host that has vanished is given up after the same time, whether it was sent anything or not"
);
/// How many unsent bytes a socket may keep once relay buffers have run short. Half must have gone
/// out before poll(2) calls the socket writable, which is room for several small blocks.
const UNSENT_BYTES_MAX: u32 = 64 * 1024;
/// How many connections may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// How long to go on asking for a port that is taken: the kernel takes a ring apart after its
/// process has ended, and a listener that the ring accepted on stays bound until then.
const PORT_PATIENCE: Duration = Duration::from_secs(1);
/// The pause between two such attempts.
const PORT_PAUSE: Duration = Duration::from_millis(20);
/// How many bytes of datagrams may wait at the users' door, and as many to leave by it: some ten
/// thousand short ones. For those without privilege the kernel caps it at `net.core.rmem_max` and
/// `wmem_max`.
const DOOR_QUEUE_BYTES: usize = 8 << 20;
/// The same for a socket to backends, which a few sessions share.
const UPSTREAM_QUEUE_BYTES: usize = 1 << 20;

/// A listening socket. Accepted connections inherit its options, so these cost no call each. With
/// `shared`, other sockets of this process may listen on the same port (`SO_REUSEPORT`).
///
/// If the port is taken, waits for up to a second: a balancer that was just killed releases its
/// doors a little after its end.
pub fn listen(address: SocketAddr, shared: bool) -> io::Result<OwnedFd> {
    patiently(|| listen_once(address, shared))
}

/// Keeps trying to open a door while its port may belong to a balancer that was killed.
fn patiently(open: impl Fn() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    let began = Instant::now();
    loop {
        match open() {
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

/// A connection from a listener's queue, if there is one; never waits.
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

/// A socket for datagrams from users. With `shared`, other sockets of this process may share the
/// port (`SO_REUSEPORT`); with `gro`, the kernel may deliver several datagrams of one sender as one
/// (udp(7)). If it is bound to all addresses, it reports which one each datagram was sent to, and
/// may send from each of them, including those that are only routed to this host. Waits for a port
/// that is taken as [`listen`] does.
pub fn datagram_door(address: SocketAddr, shared: bool, gro: bool) -> io::Result<OwnedFd> {
    patiently(|| datagram_door_once(address, shared, gro))
}

fn datagram_door_once(address: SocketAddr, shared: bool, gro: bool) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(shared)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    if address.ip().is_unspecified() {
        match address {
            SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
            SocketAddr::V6(_) => {
                setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
                // For IPv4 the option says more: where a reply to a broadcast should come from.
                setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
            }
        }
    }
    set_datagram_options(&socket, DOOR_QUEUE_BYTES, gro);
    socket.bind(&address.into())?;
    if address.is_ipv6() {
        // After the bind, which should fail for an address that is not local.
        let _ = socket.set_freebind_v6(true);
    }
    Ok(socket.into())
}

/// A socket for datagrams to backends of one family, at a port that the kernel chooses. It keeps
/// what ICMP says about them, for [`next_unreachable`]; with `tell`, it reports which of our
/// addresses each datagram was sent to.
pub fn datagram_upstream(v4: bool, gro: bool, tell: bool) -> io::Result<OwnedFd> {
    let any: IpAddr = match v4 {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    };
    let address = SocketAddr::new(any, 0);
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if v4 {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &tell)?;
    } else {
        socket.set_only_v6(true)?;
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &tell)?;
    }
    set_datagram_options(&socket, UPSTREAM_QUEUE_BYTES, gro);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Has a socket to backends report from now on which of our addresses each datagram was sent to. Best effort.
pub fn tell_destination(socket: BorrowedFd<'_>, v4: bool) {
    let _ = match v4 {
        true => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true),
        false => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true),
    };
}

/// Best effort: smaller queues and single datagrams work as well.
fn set_datagram_options(socket: &Socket, queue_bytes: usize, gro: bool) {
    if setsockopt(socket, sockopt::RcvBufForce, &queue_bytes).is_err() {
        let _ = socket.set_recv_buffer_size(queue_bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &queue_bytes).is_err() {
        let _ = socket.set_send_buffer_size(queue_bytes);
    }
    if gro {
        let _ = setsockopt(socket, sockopt::UdpGroSegment, &true);
    }
}

/// An ICMP error about a datagram that was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unreachable {
    /// Where the datagram was sent.
    pub to: SocketAddr,
    pub errno: Errno,
}

/// The next ICMP error about what a socket sent (`IP_RECVERR`, ip(7)); `None` if there are no more.
/// Errors that the kernel made itself are skipped.
pub fn next_unreachable(socket: BorrowedFd<'_>) -> Option<Unreachable> {
    loop {
        // The datagram itself comes along, and nobody wants it.
        let mut nothing = [0; 1];
        let mut pieces = [IoSliceMut::new(&mut nothing)];
        // What a socket reports about a datagram's addresses comes before the ICMP error.
        let mut control =
            nix::cmsg_space!(libc::in6_pktinfo, libc::sock_extended_err, libc::sockaddr_in6);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut pieces, Some(&mut control), flags)
                .ok()?;
        let to = message.address.as_ref().and_then(socket_address);
        let said = message.cmsgs().ok()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, _) => Some(error),
            ControlMessageOwned::Ipv6RecvErr(error, _) => Some(error),
            _ => None,
        });
        if let (Some(to), Some(error)) = (to, said)
            && matches!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6)
        {
            return Some(Unreachable { to, errno: Errno::from_raw(error.ee_errno as i32) });
        }
    }
}

fn socket_address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::from((v4.ip(), v4.port()))),
        (_, Some(v6)) => Some(SocketAddr::V6((*v6).into())),
        (None, None) => None,
    }
}

/// Sends one datagram at once, from `from` if that is given; never waits.
pub fn send_datagram(
    socket: BorrowedFd<'_>,
    payload: &[u8],
    to: SocketAddr,
    from: Option<PktInfo>,
) -> Result<(), Errno> {
    let pieces = [IoSlice::new(payload)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let to = SockaddrStorage::from(to);
    let send = |control: &[ControlMessage]| {
        sendmsg(socket.as_raw_fd(), &pieces, control, flags, Some(&to)).map(|_| ())
    };
    match from {
        None => send(&[]),
        Some(PktInfo { ip: IpAddr::V4(v4), interface }) => {
            let from = libc::in_addr { s_addr: u32::from_ne_bytes(v4.octets()) };
            let any = libc::in_addr { s_addr: 0 };
            let ipi_ifindex = interface as libc::c_int;
            let info = libc::in_pktinfo { ipi_ifindex, ipi_spec_dst: from, ipi_addr: any };
            send(&[ControlMessage::Ipv4PacketInfo(&info)])
        }
        Some(PktInfo { ip: IpAddr::V6(v6), interface }) => {
            let from = libc::in6_addr { s6_addr: v6.octets() };
            let info = libc::in6_pktinfo { ipi6_addr: from, ipi6_ifindex: interface };
            send(&[ControlMessage::Ipv6PacketInfo(&info)])
        }
    }
}

fn set_relay_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// The address at the other end; a mapped IPv4 address is returned as IPv4.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    address_of(SockRef::from(&socket).peer_addr()?)
}

/// Where a socket is bound.
pub fn local(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    address_of(SockRef::from(&socket).local_addr()?)
}

/// Whether a socket is an IPv6 socket, which may take IPv4 as well.
pub fn is_v6(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(SockRef::from(&socket).local_addr()?.is_ipv6())
}

fn address_of(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    let address = address.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// What a descriptor is, as far as another process may hand one over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A TCP connection, or a socket that may become one.
    Stream,
    Listener,
    /// A UDP socket.
    Datagrams {
        v6: bool,
    },
    Pipe,
    Other,
}

/// What a descriptor is (`SO_DOMAIN`, `SO_TYPE`, `SO_ACCEPTCONN`, socket(7); fstat(2)).
pub fn kind(of: BorrowedFd<'_>) -> Kind {
    let socket = SockRef::from(&of);
    let Ok(domain) = socket.domain() else {
        let mode = fstat(of).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
        return if mode == Ok(SFlag::S_IFIFO) { Kind::Pipe } else { Kind::Other };
    };
    let v6 = domain == Domain::IPV6;
    if !v6 && domain != Domain::IPV4 {
        return Kind::Other;
    }
    match socket.r#type() {
        Ok(Type::STREAM) if socket.is_listener().unwrap_or(false) => Kind::Listener,
        Ok(Type::STREAM) => Kind::Stream,
        Ok(Type::DGRAM) => Kind::Datagrams { v6 },
        _ => Kind::Other,
    }
}

/// Tells the peer that no more bytes will come (shutdown(2), half of a close).
pub fn finish_writing(socket: BorrowedFd<'_>) {
    // Fails only if the peer is already gone, which the receive side reports.
    let _ = SockRef::from(&socket).shutdown(Shutdown::Write);
}

/// Ends a connection of which others have duplicates, as closing the last of them would: with a FIN (shutdown(2)), or
/// with a reset, which dissolving an association is for TCP (connect(2), `AF_UNSPEC`).
pub fn end(socket: BorrowedFd<'_>, reset: bool) {
    // Either fails only if the peer is already gone.
    let _ = match reset {
        true => rustix::net::connect_unspec(socket).map_err(io::Error::from),
        false => SockRef::from(&socket).shutdown(Shutdown::Both),
    };
}

/// Says something to a user who has just connected, and closes. Waits for nothing: whatever has
/// arrived by now is read first, since closing with bytes unread would send a reset, which most
/// hosts heed before they read the words.
pub fn say_and_close(socket: OwnedFd, what: &[u8]) {
    const READS_MAX: usize = 4;
    let mut stream = TcpStream::from(socket);
    if stream.set_nonblocking(true).is_err() {
        return;
    }
    let mut bytes = [0; 4096];
    let mut reads = (0..READS_MAX).map(|_| stream.read(&mut bytes));
    let _ = reads.find(|read| !matches!(read, Ok(1..)));
    // It fits into the send buffer of a new connection; if not, the peer is gone.
    let _ = stream.write_all(what);
}

/// Copies what has arrived on a connection, and leaves it there; never waits. Zero at the connection's end.
///
/// # Errors
/// `EAGAIN` if nothing has arrived, or what ended the connection.
pub fn peek(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize, Errno> {
    recv(socket.as_raw_fd(), into, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
}

/// Takes as many bytes as fit into `into`, all of which a [`peek`] has shown.
///
/// # Errors
/// What ended the connection.
pub fn take(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<(), Errno> {
    let taken = recv(socket.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)?;
    if taken == into.len() { Ok(()) } else { Err(Errno::ECONNRESET) }
}

/// Sends the first bytes of a connection that has just been made; never waits. They fit into its empty
/// send buffer.
///
/// # Errors
/// What ended the connection, or the kernel's lack of memory.
pub fn send_first(socket: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = send(socket.as_raw_fd(), bytes, flags)?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::ENOBUFS) }
}

/// Reads what has arrived on a connection; never waits. Zero at the connection's end.
///
/// # Errors
/// `EAGAIN` if nothing has arrived, or what ended the connection.
pub fn read(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize, Errno> {
    recv(socket.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)
}

/// A connection as something to write to that never waits.
pub struct Outlet<'a>(pub BorrowedFd<'a>);

impl Write for Outlet<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(send(self.0.as_raw_fd(), bytes, flags)?)
    }

    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        // A list costs the kernel more than one piece.
        if let [bytes] = bytes {
            return self.write(bytes);
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(sendmsg::<()>(self.0.as_raw_fd(), bytes, &[], flags, None)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes calls on a socket outside the ring return instead of waiting.
pub fn never_block(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).set_nonblocking(true)
}

/// Makes the next close a reset (`SO_LINGER` with zero, socket(7)).
pub fn reset_on_close(socket: BorrowedFd<'_>) {
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}

/// From now on a socket takes more only while little of what it has taken is unsent
/// (`TCP_NOTSENT_LOWAT`, tcp(7)): a reader that has stopped does not fill the kernel's memory for
/// TCP, and poll(2) can tell it from one that reads. Best effort.
pub fn bound_unsent(socket: BorrowedFd<'_>) {
    let _ = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
}

/// Empties an eventfd after it woke its reader. The eventfd must be non-blocking, for it may
/// already be empty.
pub fn drain(wake: &nix::sys::eventfd::EventFd) {
    let mut count = [0; 8];
    let _ = nix::unistd::read(wake.as_fd(), &mut count);
}

/// The cores that this process may use, in order.
pub fn cores() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|core| set.is_set(*core).unwrap_or(false)).collect()
}

/// Keeps the calling thread, and those that it starts from now on, on these cores. Best effort: a
/// core that has gone away is not an error, and no cores at all change nothing.
pub fn pin(cores: &[usize]) {
    let mut set = CpuSet::new();
    if !cores.is_empty() && cores.iter().all(|core| set.set(*core).is_ok()) {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_descriptor_is_what_it_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let upstream = |v4: bool| Kind::Datagrams { v6: !v4 };
        for v4 in [true, false] {
            let socket = datagram_upstream(v4, false, false).unwrap();
            assert_eq!(kind(socket.as_fd()), upstream(v4));
        }
        assert_eq!(kind(stream.as_fd()), Kind::Stream);
        assert_eq!(kind(listener.as_fd()), Kind::Listener);
        let (read, write) = nix::unistd::pipe().unwrap();
        assert_eq!([&read, &write].map(|end| kind(end.as_fd())), [Kind::Pipe; 2]);
        let (unix, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!([kind(unix.as_fd()), kind(file.as_fd())], [Kind::Other; 2]);
    }

    #[test]
    fn who_is_closed_to_at_once_still_reads_what_was_said() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut user = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        user.write_all(&[b'x'; 5000]).unwrap();
        let (socket, _) = listener.accept().unwrap();
        // All of it has arrived once the last byte has.
        while socket.peek(&mut [0; 5000]).unwrap() < 5000 {}
        say_and_close(socket.into(), b"sorry");
        let mut said = String::new();
        user.read_to_string(&mut said).expect("no reset follows");
        assert_eq!(said, "sorry");
    }
}
