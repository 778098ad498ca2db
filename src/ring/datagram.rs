//! Sending and receiving datagrams, with their metadata: who sent one, which local address it
//! arrived at, how many the kernel coalesced. Owns the layout of names and control data in both
//! directions, and every transmit until the kernel has taken it.
//!
//! A receive writes `head | sender | control | payload` into one block (`io_uring_recvmsg_out`,
//! `io_uring_prep_recvmsg_multishot(3)`); a block of [`Class::Datagram`] has room for the longest.
//!
//! A send never waits (`MSG_DONTWAIT`): it is over once the kernel has taken the submission, and
//! completes only if it failed. A relayed datagram therefore costs one completion instead of two,
//! and its blocks are free again one turn later.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{opcode, squeue, types};
use nix::errno::Errno;

use super::pool::{Buf, Chain, DATAGRAM_BYTES, GATHER_MAX, Pool};
use super::{Class, Ring, Tag};

/// `io_uring_recvmsg_out`: the lengths of name, control data and payload, and the flags.
const LENGTHS: usize = 16;
/// A `sockaddr_in6` takes 28 bytes; the control data after it stays aligned.
const NAME: usize = 32;
/// `UDP_GRO` (16 + 4, padded to 24), `IPV6_PKTINFO` (16 + 20, padded to 40) and, for IPv4 on an
/// IPv6 socket, also `IP_PKTINFO` (16 + 12, padded to 32).
const CONTROL: usize = 96;
/// Bytes before the payload.
const HEAD: usize = LENGTHS + NAME + CONTROL;
const _: () = assert!(HEAD + 65_535 <= DATAGRAM_BYTES);

/// A `cmsghdr`: length, level and type.
const CONTROL_HEAD: usize = 16;
/// Sends queued for the next submission, at most.
const SENDS_MAX: usize = 512;
/// Pieces (`iovec`) of all their gathered payloads, at most.
const PIECES_MAX: usize = 4096;
const _: () = assert!(PIECES_MAX >= GATHER_MAX);

/// Datagrams in one segmented send, at most (`UDP_MAX_SEGMENTS` before Linux 6.9).
pub const SEGMENTS_MAX: usize = 64;

/// Marks the completion of a datagram send; no caller's tag has this kind.
const SEND_MARK: u64 = 0xff << 56;

/// A local address as `IP_PKTINFO` and `IPV6_PKTINFO` carry it (ip(7), ipv6(7)): where a datagram
/// arrived, or the source address of one to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PktInfo {
    /// Unspecified: the kernel picks the address that belongs to the route.
    pub ip: IpAddr,
    /// The interface index, without which a link-local address means nothing. Zero: any interface.
    pub interface: u32,
}

impl PktInfo {
    /// The same request with one demand fewer, for when the kernel has refused this one: first the
    /// address is left to the route, then the interface. `None` if no demand is left.
    pub fn relaxed(self) -> Option<PktInfo> {
        let any: IpAddr = match self.ip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
                Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into()
            }
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let interface = if self.ip == any { 0 } else { self.interface };
        Some(PktInfo { ip: any, interface }).filter(|less| *less != self)
    }
}

impl From<IpAddr> for PktInfo {
    fn from(ip: IpAddr) -> PktInfo {
        PktInfo { ip, interface: 0 }
    }
}

/// The metadata of a received datagram, or of several that the kernel coalesced (GRO).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecvMeta {
    pub from: SocketAddr,
    /// The local address it was sent to, if the socket reports it. After a broadcast or multicast:
    /// the address to reply from.
    pub to: Option<PktInfo>,
    /// If several datagrams were coalesced: the length of each but the last, in bytes.
    pub segment_size: Option<usize>,
    /// False if the kernel truncated the payload or the control data.
    pub whole: bool,
}

/// One datagram to send, or several of one length to the same receiver that the kernel cuts apart
/// (GSO).
#[derive(PartialEq, Eq, Debug)]
#[must_use = "dropping a Transmit leaks its blocks"]
pub struct Transmit {
    /// In the socket's own address family: IPv4-mapped on an IPv6 socket.
    pub to: SocketAddr,
    /// The source address; `None` leaves it to the socket.
    pub from: Option<PktInfo>,
    /// If there are several datagrams: the length of each but the last, in bytes.
    pub segment_size: Option<u16>,
    pub payload: Chain,
}

/// A transmit that failed, with its payload.
#[derive(PartialEq, Eq, Debug)]
#[must_use = "dropping a Transmit leaks its blocks"]
pub struct Returned {
    pub tag: Tag,
    pub transmit: Transmit,
    pub errno: Errno,
}

/// What the kernel reads while it takes a submission, and the transmits that may still fail.
pub(super) struct DatagramIo {
    /// Shared by all receives: how much room the sender's name and the control data get.
    recv_header: Box<libc::msghdr>,
    messages: Vec<Message>,
    /// Receivers of the sends that need neither control data nor gathering.
    names: Vec<[u8; NAME]>,
    pieces: Vec<libc::iovec>,
    /// Submitted or about to be, oldest first; numbered from `first`.
    sent: VecDeque<Option<(Tag, Transmit)>>,
    first: u64,
    /// The kernel has taken the transmits below this number.
    taken: u64,
    returned: VecDeque<Returned>,
}

/// The `msghdr` of one send, with the name and the control data that it points at.
#[repr(C)]
struct Message {
    header: libc::msghdr,
    control: [u64; CONTROL / 8],
    name: [u8; NAME],
}

impl Ring {
    /// Receives datagrams, each into a block of its own, until an empty one arrives, an error
    /// occurs or the receive is cancelled (multishot). Each block begins with metadata; see
    /// [`Ring::take_recv_meta`].
    pub fn receive_datagrams(&mut self, tag: Tag, socket: BorrowedFd<'_>) {
        let recv_header: *const libc::msghdr = &raw const *self.datagrams.recv_header;
        let group = Class::Datagram as u16;
        let entry =
            opcode::RecvMsgMulti::new(types::Fd(socket.as_raw_fd()), recv_header, group).build();
        self.push(tag.pack(), entry);
    }

    /// Receives only the datagrams already queued at the socket: like [`Ring::receive_datagrams`],
    /// but ends with `EAGAIN` once the queue is empty.
    pub fn receive_pending_datagrams(&mut self, tag: Tag, socket: BorrowedFd<'_>) {
        let recv_header: *const libc::msghdr = &raw const *self.datagrams.recv_header;
        let (fd, group) = (types::Fd(socket.as_raw_fd()), Class::Datagram as u16);
        let flags = libc::MSG_DONTWAIT as u32;
        let entry = opcode::RecvMsgMulti::new(fd, recv_header, group).flags(flags).build();
        self.push(tag.pack(), entry);
    }

    /// Strips the metadata off the front of a received block, so that only the payload is left.
    /// `None` if the block does not begin with any.
    pub fn take_recv_meta(&self, buf: &mut Buf) -> Option<RecvMeta> {
        let meta = read_head(self.pool.bytes(buf))?;
        self.pool.skip(buf, HEAD);
        Some(meta)
    }

    /// Queues a transmit for the next submission. It is not retried if the socket's send buffer is
    /// full. A failed one comes back through [`Ring::next_returned`]; success is silent.
    pub fn send_datagrams(&mut self, tag: Tag, socket: BorrowedFd<'_>, transmit: Transmit) {
        self.make_room();
        while self.datagrams.is_full(transmit.payload.blocks()) {
            self.flush();
        }
        let fd = types::Fd(socket.as_raw_fd());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let plain = transmit.payload.blocks() == 1 && transmit.from.is_none();
        let entry = if plain && transmit.segment_size.is_none() {
            let piece = self.pool.pieces(transmit.payload.outgoing()).next().unwrap_or(&[]);
            let (name, name_len) = self.datagrams.name(transmit.to);
            opcode::Send::new(fd, piece.as_ptr(), piece.len() as u32)
                .flags(flags)
                .dest_addr(name.as_ptr().cast())
                .dest_addr_len(name_len)
                .build()
        } else {
            let message = self.datagrams.message(&transmit, &self.pool);
            opcode::SendMsg::new(fd, &raw const message.header).flags(flags as u32).build()
        };
        let number = self.datagrams.first + self.datagrams.sent.len() as u64;
        self.datagrams.sent.push_back(Some((tag, transmit)));
        self.push(SEND_MARK | number, entry.flags(squeue::Flags::SKIP_SUCCESS));
    }

    /// Whether a failed transmit is waiting to be collected.
    pub fn has_returned(&self) -> bool {
        !self.datagrams.returned.is_empty()
    }

    /// The oldest failed transmit.
    pub fn next_returned(&mut self) -> Option<Returned> {
        self.datagrams.returned.pop_front()
    }

    /// Sends a transmit with a system call of its own, after everything queued before it, and
    /// returns it if the kernel refused it. For transmits that may have to be sent in another form
    /// before the datagrams that follow them.
    pub fn send_datagrams_at_once(
        &mut self,
        tag: Tag,
        socket: BorrowedFd<'_>,
        transmit: Transmit,
    ) -> Option<Returned> {
        self.flush();
        while self.datagrams.is_full(transmit.payload.blocks()) {
            self.flush();
        }
        let message = self.datagrams.message(&transmit, &self.pool);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message and everything it points at stay in `self.datagrams` and in the pool
        // until the call returns, and the kernel only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message.header, flags) };
        if sent < 0 {
            return Some(Returned { tag, transmit, errno: Errno::last() });
        }
        self.pool.give_back_chain(transmit.payload);
        None
    }
}

impl DatagramIo {
    pub(super) fn new() -> DatagramIo {
        // SAFETY: all zeroes is a valid msghdr: no address, no pieces, no control data.
        let mut recv_header: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        recv_header.msg_namelen = NAME as libc::socklen_t;
        recv_header.msg_controllen = CONTROL;
        DatagramIo {
            recv_header,
            messages: Vec::with_capacity(SENDS_MAX),
            names: Vec::with_capacity(SENDS_MAX),
            pieces: Vec::with_capacity(PIECES_MAX),
            sent: VecDeque::with_capacity(2 * SENDS_MAX),
            first: 0,
            taken: 0,
            returned: VecDeque::new(),
        }
    }

    /// The kernel has taken all submissions.
    pub(super) fn wipe(&mut self) {
        self.messages.clear();
        self.names.clear();
        self.pieces.clear();
        self.taken = self.first + self.sent.len() as u64;
    }

    /// Handles the completion of a send, which means that it failed. False if the completion is
    /// another operation's.
    pub(super) fn complete(&mut self, data: u64, result: i32) -> bool {
        if data & SEND_MARK != SEND_MARK {
            return false;
        }
        let place = (data & !SEND_MARK).checked_sub(self.first).map(|place| place as usize);
        let transmit = place.and_then(|place| self.sent.get_mut(place)).and_then(Option::take);
        let errno = Errno::from_raw(-result.min(0));
        if let Some((tag, transmit)) = transmit {
            self.returned.push_back(Returned { tag, transmit, errno });
        }
        true
    }

    /// Frees the blocks of all transmits that the kernel has taken and that have not failed. Every
    /// completion must have been handled before.
    pub(super) fn release(&mut self, pool: &mut Pool) {
        while self.first < self.taken {
            if let Some((_, transmit)) = self.sent.pop_front().flatten() {
                pool.give_back_chain(transmit.payload);
            }
            self.first += 1;
        }
    }

    fn is_full(&self, blocks: usize) -> bool {
        let transmits = self.messages.len() + self.names.len();
        transmits == SENDS_MAX || self.pieces.len() + blocks > PIECES_MAX
    }

    /// Stores a receiver's name and returns it with its length; a send of one piece needs no more.
    /// The vector never grows, so stored names never move.
    fn name(&mut self, to: SocketAddr) -> (&[u8; NAME], libc::socklen_t) {
        assert!(self.names.len() < SENDS_MAX);
        let (name, len) = write_name(to);
        let place = self.names.len();
        self.names.push(name);
        (&self.names[place], len as libc::socklen_t)
    }

    /// Stores the message of a transmit. The vectors never grow, so what is stored never moves.
    fn message(&mut self, transmit: &Transmit, pool: &Pool) -> &Message {
        let first = self.pieces.len();
        for piece in pool.pieces(transmit.payload.outgoing()) {
            assert!(self.pieces.len() < self.pieces.capacity());
            let (base, len) = (piece.as_ptr().cast_mut().cast(), piece.len());
            self.pieces.push(libc::iovec { iov_base: base, iov_len: len });
        }
        assert!(self.messages.len() < SENDS_MAX);
        let (name, name_len) = write_name(transmit.to);
        let (control, control_len) = write_control(transmit);
        // SAFETY: all zeroes is a valid msghdr: no address, no pieces, no control data.
        let header: libc::msghdr = unsafe { std::mem::zeroed() };
        let place = self.messages.len();
        self.messages.push(Message { header, control, name });
        let message = &mut self.messages[place];
        message.header.msg_name = message.name.as_mut_ptr().cast();
        message.header.msg_namelen = name_len as libc::socklen_t;
        message.header.msg_iov = self.pieces[first..].as_mut_ptr();
        message.header.msg_iovlen = self.pieces.len() - first;
        if control_len > 0 {
            message.header.msg_control = message.control.as_mut_ptr().cast();
            message.header.msg_controllen = control_len;
        }
        message
    }
}

/// A socket address as a `sockaddr_in` or `sockaddr_in6`, and its length in bytes.
fn write_name(address: SocketAddr) -> ([u8; NAME], usize) {
    let mut name = [0; NAME];
    name[2..4].copy_from_slice(&address.port().to_be_bytes());
    match address {
        SocketAddr::V4(v4) => {
            name[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            name[4..8].copy_from_slice(&v4.ip().octets());
            (name, size_of::<libc::sockaddr_in>())
        }
        SocketAddr::V6(v6) => {
            name[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            name[4..8].copy_from_slice(&v6.flowinfo().to_be_bytes());
            name[8..24].copy_from_slice(&v6.ip().octets());
            name[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
            (name, size_of::<libc::sockaddr_in6>())
        }
    }
}

fn read_name(name: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(field(name, 0)?));
    let port = u16::from_be_bytes(field(name, 2)?);
    if family == libc::AF_INET {
        return Some(SocketAddr::from((Ipv4Addr::from(field::<4>(name, 4)?), port)));
    }
    let ip = Ipv6Addr::from(field::<16>(name, 8)?);
    let flow = u32::from_be_bytes(field(name, 4)?);
    let scope = u32::from_ne_bytes(field(name, 24)?);
    (family == libc::AF_INET6).then(|| SocketAddrV6::new(ip, port, flow, scope).into())
}

/// The control data of a transmit, and its length in bytes: the source address (ip(7), ipv6(7)) and
/// the segment size (`UDP_SEGMENT`, udp(7)).
fn write_control(transmit: &Transmit) -> ([u64; CONTROL / 8], usize) {
    let mut control = Control { words: [0; CONTROL / 8], len: 0 };
    match transmit.from {
        None => {}
        Some(PktInfo { ip: IpAddr::V4(v4), interface }) => {
            // `in_pktinfo`: the interface, the source address, and an address that sendmsg(2)
            // ignores.
            let from = u32::from_ne_bytes(v4.octets());
            let first = u64::from(interface) | u64::from(from) << 32;
            control.put(libc::IPPROTO_IP, libc::IP_PKTINFO, 12, &[first, 0]);
        }
        Some(PktInfo { ip: IpAddr::V6(v6), interface }) => {
            // `in6_pktinfo`: the source address and the interface.
            let [low, high] = halves(v6.octets());
            let info = [low, high, u64::from(interface)];
            control.put(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, 20, &info);
        }
    }
    if let Some(segment_size) = transmit.segment_size {
        control.put(libc::SOL_UDP, libc::UDP_SEGMENT, 2, &[u64::from(segment_size)]);
    }
    (control.words, control.len)
}

/// Control data under construction, in words of eight bytes as `CMSG_ALIGN` requires.
struct Control {
    words: [u64; CONTROL / 8],
    len: usize,
}

impl Control {
    /// Appends one control message of `len` bytes; `data` is padded to whole words. Little-endian,
    /// like every machine this runs on.
    fn put(&mut self, level: i32, kind: i32, len: usize, data: &[u64]) {
        const { assert!(cfg!(target_endian = "little")) };
        let first = self.len / 8;
        self.words[first] = (CONTROL_HEAD + len) as u64;
        self.words[first + 1] = u64::from(level as u32) | u64::from(kind as u32) << 32;
        self.words[first + 2..first + 2 + data.len()].copy_from_slice(data);
        self.len += CONTROL_HEAD + 8 * data.len();
    }
}

fn halves(octets: [u8; 16]) -> [u64; 2] {
    let whole = u128::from_ne_bytes(octets);
    [whole as u64, (whole >> 64) as u64]
}

fn read_head(bytes: &[u8]) -> Option<RecvMeta> {
    let head = bytes.get(..HEAD)?;
    let length = |at| Some(u32::from_ne_bytes(field(head, at)?) as usize);
    let (name_len, control_len, flags) = (length(0)?, length(4)?, length(12)? as i32);
    let from = read_name(head.get(LENGTHS..LENGTHS + name_len.min(NAME))?)?;
    let control = head.get(LENGTHS + NAME..LENGTHS + NAME + control_len.min(CONTROL))?;
    let (to, segment_size) = read_control(control);
    Some(RecvMeta {
        from,
        to,
        segment_size,
        whole: flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0,
    })
}

fn read_control(mut control: &[u8]) -> (Option<PktInfo>, Option<usize>) {
    let (mut to, mut segment_size) = (None, None);
    while let Some(head) = field::<CONTROL_HEAD>(control, 0) {
        let [len, kind] = halves(head);
        let (level, kind) = (kind as i32, (kind >> 32) as i32);
        let len = (len as usize).clamp(CONTROL_HEAD, control.len());
        let data = &control[CONTROL_HEAD..len];
        match (level, kind) {
            // `ipi_spec_dst`, the second field: the local address to reply from. After a broadcast
            // it differs from the destination, which is all that the IPv6 message knows; the kernel
            // puts this message after that one, so this one counts.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                to = field::<4>(data, 4).map(|octets| IpAddr::from(octets).into());
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => to = read_v6_info(data),
            (libc::SOL_UDP, libc::UDP_GRO) => {
                let length = field::<4>(data, 0).map(i32::from_ne_bytes);
                segment_size = length.and_then(|length| usize::try_from(length).ok());
            }
            _ => {}
        }
        control = control.get(len.next_multiple_of(8)..).unwrap_or(&[]);
    }
    (to, segment_size)
}

/// The address to reply from, given an `in6_pktinfo`: the destination and the interface.
fn read_v6_info(data: &[u8]) -> Option<PktInfo> {
    let ip = Ipv6Addr::from(field::<16>(data, 0)?);
    let interface = u32::from_ne_bytes(field(data, 16)?);
    Some(match ip {
        // A multicast group cannot be a source; the kernel picks an address of the interface.
        _ if ip.is_multicast() => PktInfo { ip: Ipv6Addr::UNSPECIFIED.into(), interface },
        _ if ip.is_unicast_link_local() => PktInfo { ip: ip.into(), interface },
        _ => IpAddr::from(ip).into(),
    })
}

fn field<const LEN: usize>(bytes: &[u8], at: usize) -> Option<[u8; LEN]> {
    bytes.get(at..at + LEN)?.try_into().ok()
}

#[cfg(test)]
mod tests;
