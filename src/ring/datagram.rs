//! Datagrams and what travels beside them: who sent one, which of our addresses it came to, how many
//! came as one. Owns the layout of those words on both ways through the kernel, and what has been sent
//! until the kernel has taken it.
//!
//! A receive writes `head | sender | control | payload` into one block (`io_uring_recvmsg_out`,
//! `io_uring_prep_recvmsg_multishot(3)`); a block of [`Class::Datagram`] holds the longest there is.
//!
//! A send never waits (`MSG_DONTWAIT`): it is over when the kernel has taken the submission, and only
//! one that failed completes. So datagrams cost one completion on their way and not two, and their
//! blocks are free again a turn later.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{opcode, squeue, types};
use nix::errno::Errno;

use super::pool::{Buf, Chain, DATAGRAM_BYTES, GATHER_MAX, Pool};
use super::{Class, Ring, Tag};

/// `io_uring_recvmsg_out`: the lengths of name, control and payload, and the flags.
const LENGTHS: usize = 16;
/// A `sockaddr_in6` takes 28; the control data behind it stays aligned.
const NAME: usize = 32;
/// `UDP_GRO` (16 + 4, padded to 24), `IPV6_PKTINFO` (16 + 20, padded to 40) and, for IPv4 on a socket of
/// IPv6, `IP_PKTINFO` as well (16 + 12, padded to 32).
const CONTROL: usize = 96;
/// Before the payload.
const HEAD: usize = LENGTHS + NAME + CONTROL;
const _: () = assert!(HEAD + 65_535 <= DATAGRAM_BYTES);

/// A `cmsghdr`: its length, level and type.
const CONTROL_HEAD: usize = 16;
/// Sends that may wait for the next submission.
const LETTERS_MAX: usize = 512;
/// Pieces of gathered sends among them.
const PIECES_MAX: usize = 4096;
const _: () = assert!(PIECES_MAX >= GATHER_MAX);

/// Datagrams of one send at most (`UDP_MAX_SEGMENTS` before Linux 6.9).
pub const SEGMENTS_MAX: usize = 64;

/// Marks the completion of a datagram's send; no caller's kind is this one.
const LETTER: u64 = 0xff << 56;

/// An address of ours that datagrams come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// Unspecified where the kernel is to choose it by the route.
    pub ip: IpAddr,
    /// The interface, without which a link-local address means nothing; zero leaves it to the routes.
    pub interface: u32,
}

impl Source {
    /// Less than this to ask of the kernel, which refused it; `None` when nothing is left to give up.
    pub fn relaxed(self) -> Option<Source> {
        let any: IpAddr = match self.ip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
                Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into()
            }
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let interface = if self.ip == any { 0 } else { self.interface };
        Some(Source { ip: any, interface }).filter(|less| *less != self)
    }
}

impl From<IpAddr> for Source {
    fn from(ip: IpAddr) -> Source {
        Source { ip, interface: 0 }
    }
}

/// What was said about a datagram that came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Envelope {
    pub from: SocketAddr,
    /// The address of ours that it was sent to, where the socket tells; for one that was sent to many
    /// hosts, the one that an answer is to come from.
    pub to: Option<Source>,
    /// The length of each datagram but the last, when several came as one.
    pub segment: Option<usize>,
    /// False when the end of it was cut off.
    pub whole: bool,
}

/// Datagrams to one receiver.
#[derive(PartialEq, Eq, Debug)]
#[must_use = "a Letter that is dropped loses its blocks"]
pub struct Letter {
    /// In the form of the socket's family.
    pub to: SocketAddr,
    /// Our address that they are to come from; `None` leaves it to the socket.
    pub from: Option<Source>,
    /// The length of each datagram but the last, when they are several.
    pub segment: Option<u16>,
    pub payload: Chain,
}

/// A letter that the kernel did not take.
#[derive(PartialEq, Eq, Debug)]
#[must_use = "a Letter that is dropped loses its blocks"]
pub struct Returned {
    pub tag: Tag,
    pub letter: Letter,
    pub errno: Errno,
}

/// What the kernel reads while it takes a submission, and the letters that it may still return.
pub(super) struct Post {
    /// The same for every receive: how much room sender and control data get.
    intake: Box<libc::msghdr>,
    covers: Vec<Cover>,
    /// Of the sends that need no more than the receiver's name.
    names: Vec<[u8; NAME]>,
    pieces: Vec<libc::iovec>,
    /// Sent, oldest first; numbered from `first`.
    sent: VecDeque<Option<(Tag, Letter)>>,
    first: u64,
    /// Letters below this number are with the kernel.
    taken: u64,
    returned: VecDeque<Returned>,
}

/// One send's message with all that it points at.
#[repr(C)]
struct Cover {
    message: libc::msghdr,
    control: [u64; CONTROL / 8],
    name: [u8; NAME],
}

impl Ring {
    /// Receives datagrams into blocks of their own again and again, until one is empty, there is an
    /// error, or it is cancelled. What comes is to be [opened](Ring::open_datagram).
    pub fn receive_datagrams(&mut self, tag: Tag, socket: BorrowedFd<'_>) {
        let intake: *const libc::msghdr = &raw const *self.post.intake;
        let group = Class::Datagram as u16;
        let entry = opcode::RecvMsgMulti::new(types::Fd(socket.as_raw_fd()), intake, group).build();
        self.push(tag.pack(), entry);
    }

    /// The same for what waits at the socket now: it ends as well when nothing does, with `EAGAIN`.
    pub fn take_datagrams(&mut self, tag: Tag, socket: BorrowedFd<'_>) {
        let intake: *const libc::msghdr = &raw const *self.post.intake;
        let (fd, group) = (types::Fd(socket.as_raw_fd()), Class::Datagram as u16);
        let flags = libc::MSG_DONTWAIT as u32;
        let entry = opcode::RecvMsgMulti::new(fd, intake, group).flags(flags).build();
        self.push(tag.pack(), entry);
    }

    /// Takes what was said about a datagram off its front, so that the buffer is the payload. `None`
    /// when the buffer does not begin with such words.
    pub fn open_datagram(&self, buf: &mut Buf) -> Option<Envelope> {
        let envelope = read_head(self.pool.bytes(buf))?;
        self.pool.skip(buf, HEAD);
        Some(envelope)
    }

    /// Sends datagrams, unless the socket's send buffer is full. Completes only when it fails, by
    /// [`Ring::next_returned`].
    pub fn send_datagrams(&mut self, tag: Tag, socket: BorrowedFd<'_>, letter: Letter) {
        self.make_room();
        while self.post.is_full(letter.payload.blocks()) {
            self.flush();
        }
        let fd = types::Fd(socket.as_raw_fd());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let plain = letter.payload.blocks() == 1 && letter.from.is_none();
        let entry = if plain && letter.segment.is_none() {
            let piece = self.pool.pieces(letter.payload.outgoing()).next().unwrap_or(&[]);
            let (name, name_len) = self.post.name(letter.to);
            opcode::Send::new(fd, piece.as_ptr(), piece.len() as u32)
                .flags(flags)
                .dest_addr(name.as_ptr().cast())
                .dest_addr_len(name_len)
                .build()
        } else {
            let cover = self.post.cover(&letter, &self.pool);
            opcode::SendMsg::new(fd, &raw const cover.message).flags(flags as u32).build()
        };
        let number = self.post.first + self.post.sent.len() as u64;
        self.post.sent.push_back(Some((tag, letter)));
        self.push(LETTER | number, entry.flags(squeue::Flags::SKIP_SUCCESS));
    }

    /// Whether the kernel has given letters back.
    pub fn has_returned(&self) -> bool {
        !self.post.returned.is_empty()
    }

    /// The first letter that the kernel has given back.
    pub fn next_returned(&mut self) -> Option<Returned> {
        self.post.returned.pop_front()
    }

    /// Sends datagrams before this returns, and after all that were sent before: for those that may
    /// have to be sent in another way, before others follow them.
    pub fn send_datagrams_at_once(
        &mut self,
        tag: Tag,
        socket: BorrowedFd<'_>,
        letter: Letter,
    ) -> Option<Returned> {
        self.flush();
        while self.post.is_full(letter.payload.blocks()) {
            self.flush();
        }
        let cover = self.post.cover(&letter, &self.pool);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message and all that it points at are on the desk and in the pool until the call
        // returns, and the kernel only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const cover.message, flags) };
        if sent < 0 {
            return Some(Returned { tag, letter, errno: Errno::last() });
        }
        self.pool.give_back_chain(letter.payload);
        None
    }
}

impl Post {
    pub(super) fn new() -> Post {
        // SAFETY: all zeroes is a valid msghdr: no address, no pieces, no control data.
        let mut intake: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        intake.msg_namelen = NAME as libc::socklen_t;
        intake.msg_controllen = CONTROL;
        Post {
            intake,
            covers: Vec::with_capacity(LETTERS_MAX),
            names: Vec::with_capacity(LETTERS_MAX),
            pieces: Vec::with_capacity(PIECES_MAX),
            sent: VecDeque::with_capacity(2 * LETTERS_MAX),
            first: 0,
            taken: 0,
            returned: VecDeque::new(),
        }
    }

    /// The kernel has taken all submissions.
    pub(super) fn wipe(&mut self) {
        self.covers.clear();
        self.names.clear();
        self.pieces.clear();
        self.taken = self.first + self.sent.len() as u64;
    }

    /// Takes the completion of a send if it is one: it has failed.
    pub(super) fn complete(&mut self, data: u64, result: i32) -> bool {
        if data & LETTER != LETTER {
            return false;
        }
        let place = (data & !LETTER).checked_sub(self.first).map(|place| place as usize);
        let letter = place.and_then(|place| self.sent.get_mut(place)).and_then(Option::take);
        let errno = Errno::from_raw(-result.min(0));
        if let Some((tag, letter)) = letter {
            self.returned.push_back(Returned { tag, letter, errno });
        }
        true
    }

    /// Every completion has been looked at: what the kernel has taken and not returned is on its way.
    pub(super) fn release(&mut self, pool: &mut Pool) {
        while self.first < self.taken {
            if let Some((_, letter)) = self.sent.pop_front().flatten() {
                pool.give_back_chain(letter.payload);
            }
            self.first += 1;
        }
    }

    fn is_full(&self, blocks: usize) -> bool {
        let letters = self.covers.len() + self.names.len();
        letters == LETTERS_MAX || self.pieces.len() + blocks > PIECES_MAX
    }

    /// Keeps an address still, which is all that a send of one piece needs, and says how long it is. The
    /// vector never grows, so what it holds never moves.
    fn name(&mut self, to: SocketAddr) -> (&[u8; NAME], libc::socklen_t) {
        assert!(self.names.len() < LETTERS_MAX);
        let (name, len) = write_name(to);
        let place = self.names.len();
        self.names.push(name);
        (&self.names[place], len as libc::socklen_t)
    }

    /// Keeps a message still. The vectors never grow, so what they hold never moves.
    fn cover(&mut self, letter: &Letter, pool: &Pool) -> &Cover {
        let first = self.pieces.len();
        for piece in pool.pieces(letter.payload.outgoing()) {
            assert!(self.pieces.len() < self.pieces.capacity());
            let (base, len) = (piece.as_ptr().cast_mut().cast(), piece.len());
            self.pieces.push(libc::iovec { iov_base: base, iov_len: len });
        }
        assert!(self.covers.len() < LETTERS_MAX);
        let (name, name_len) = write_name(letter.to);
        let (control, control_len) = write_control(letter);
        // SAFETY: all zeroes is a valid msghdr: no address, no pieces, no control data.
        let message: libc::msghdr = unsafe { std::mem::zeroed() };
        let place = self.covers.len();
        self.covers.push(Cover { message, control, name });
        let cover = &mut self.covers[place];
        cover.message.msg_name = cover.name.as_mut_ptr().cast();
        cover.message.msg_namelen = name_len as libc::socklen_t;
        cover.message.msg_iov = self.pieces[first..].as_mut_ptr();
        cover.message.msg_iovlen = self.pieces.len() - first;
        if control_len > 0 {
            cover.message.msg_control = cover.control.as_mut_ptr().cast();
            cover.message.msg_controllen = control_len;
        }
        cover
    }
}

/// A socket address as in `sockaddr_in` or `sockaddr_in6`, and its length.
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

/// Control data: where the letter is to come from (ip(7), ipv6(7)) and the length of its datagrams
/// (`UDP_SEGMENT`, udp(7)); and how long it is.
fn write_control(letter: &Letter) -> ([u64; CONTROL / 8], usize) {
    let mut control = Control { words: [0; CONTROL / 8], len: 0 };
    match letter.from {
        None => {}
        Some(Source { ip: IpAddr::V4(v4), interface }) => {
            // `in_pktinfo`: the interface, the address to send from, and one that is not read.
            let from = u32::from_ne_bytes(v4.octets());
            let first = u64::from(interface) | u64::from(from) << 32;
            control.put(libc::IPPROTO_IP, libc::IP_PKTINFO, 12, &[first, 0]);
        }
        Some(Source { ip: IpAddr::V6(v6), interface }) => {
            // `in6_pktinfo`: the address to send from, and the interface.
            let [low, high] = halves(v6.octets());
            let info = [low, high, u64::from(interface)];
            control.put(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, 20, &info);
        }
    }
    if let Some(segment) = letter.segment {
        control.put(libc::SOL_UDP, libc::UDP_SEGMENT, 2, &[u64::from(segment)]);
    }
    (control.words, control.len)
}

/// Control data while it is written, in words of eight bytes as `CMSG_ALIGN` wants it.
struct Control {
    words: [u64; CONTROL / 8],
    len: usize,
}

impl Control {
    /// Little-endian, like every machine that this runs on; `data` is padded to whole words.
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

fn read_head(bytes: &[u8]) -> Option<Envelope> {
    let head = bytes.get(..HEAD)?;
    let length = |at| Some(u32::from_ne_bytes(field(head, at)?) as usize);
    let (name_len, control_len, flags) = (length(0)?, length(4)?, length(12)? as i32);
    let from = read_name(head.get(LENGTHS..LENGTHS + name_len.min(NAME))?)?;
    let control = head.get(LENGTHS + NAME..LENGTHS + NAME + control_len.min(CONTROL))?;
    let (to, segment) = read_control(control);
    Some(Envelope { from, to, segment, whole: flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0 })
}

fn read_control(mut control: &[u8]) -> (Option<Source>, Option<usize>) {
    let (mut to, mut segment) = (None, None);
    while let Some(head) = field::<CONTROL_HEAD>(control, 0) {
        let [len, kind] = halves(head);
        let (level, kind) = (kind as i32, (kind >> 32) as i32);
        let len = (len as usize).clamp(CONTROL_HEAD, control.len());
        let data = &control[CONTROL_HEAD..len];
        match (level, kind) {
            // The second of three: the address of ours that a reply is to come from, which is another
            // than the datagram was sent to when that was a broadcast. It follows what a socket of IPv6
            // says about the same datagram, which knows only the latter.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                to = field::<4>(data, 4).map(|octets| IpAddr::from(octets).into());
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => to = read_v6_info(data),
            (libc::SOL_UDP, libc::UDP_GRO) => {
                let length = field::<4>(data, 0).map(i32::from_ne_bytes);
                segment = length.and_then(|length| usize::try_from(length).ok());
            }
            _ => {}
        }
        control = control.get(len.next_multiple_of(8)..).unwrap_or(&[]);
    }
    (to, segment)
}

/// Where a reply is to come from to what was sent to this address of IPv6 at this interface.
fn read_v6_info(data: &[u8]) -> Option<Source> {
    let ip = Ipv6Addr::from(field::<16>(data, 0)?);
    let interface = u32::from_ne_bytes(field(data, 16)?);
    Some(match ip {
        // Sent to many: no reply can come from there, but from an address of the interface.
        _ if ip.is_multicast() => Source { ip: Ipv6Addr::UNSPECIFIED.into(), interface },
        _ if ip.is_unicast_link_local() => Source { ip: ip.into(), interface },
        _ => IpAddr::from(ip).into(),
    })
}

fn field<const LEN: usize>(bytes: &[u8], at: usize) -> Option<[u8; LEN]> {
    bytes.get(at..at + LEN)?.try_into().ok()
}

#[cfg(test)]
mod tests;
