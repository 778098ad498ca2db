//! The fence around io_uring: one ring, its operations, and the memory that the kernel may touch.
//! All `unsafe` of the project is in this folder, and no safe function here can break memory
//! however it is called:
//!
//! * what the kernel reads or writes after a submission is pool memory, which the ring owns and never
//!   frees; a block that the kernel may write to has no `Buf` (see [`pool`]);
//! * addresses and gather lists are copied by the kernel when it takes a submission
//!   (`IORING_FEAT_SUBMIT_STABLE`, `io_uring_setup(2)`), so they live in a desk that is wiped only
//!   after that.
//!
//! Each ring is restricted to what is done here (see [`restrict`]).
//!
//! The order of calls is the caller's duty: close a socket only when nothing is in flight on it.

pub mod datagram;
pub mod lowat;
pub mod outlook;
pub mod pipe;
pub mod pool;
pub mod probe;
mod provided;
mod restrict;
pub mod sys;

use std::io;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;
use socket2::SockAddr;

use datagram::DatagramIo;
use pool::{Buf, Class, GATHER_MAX, Outgoing, Pool, Stock};
use provided::{Provided, group};

/// How many submissions may wait for the next [`Ring::enter`].
const SUBMISSIONS: u32 = 1024;
/// How many completions may wait to be reaped; the kernel sets further ones aside and ends
/// multishots.
const COMPLETIONS: u32 = 16 * 1024;
/// Limit on the completions returned by one [`Ring::reap`].
pub const REAP_MAX: usize = 256;
/// Limit on the gathered sends and connects in one submission round.
const DESK_MAX: usize = 128;
/// `IORING_RECVSEND_POLL_FIRST`: wait for data before trying to read it.
const POLL_FIRST: u16 = 1;
/// `IORING_RECV_MULTISHOT`.
const MULTISHOT: u16 = 2;
/// Where `optlen` is in a submission entry: the total after which a multishot receive ends.
const OPTLEN_OFFSET: usize = 44;

/// The bits of a generation that pass through the kernel.
pub const GENERATION: u32 = 0x7f_ffff;
/// Marks an accept in its user data, so that its result is known to be a descriptor.
const ACCEPT: u64 = 1 << 55;

/// What a completion belongs to, in the caller's own terms, carried through the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tag {
    /// The kind of operation, in the caller's numbering; not zero.
    pub kind: u8,
    /// Which use of the slot; only the lowest 23 bits are kept.
    pub generation: u32,
    pub slot: u32,
}

impl Tag {
    fn pack(self) -> u64 {
        debug_assert!(self.kind != 0, "zero marks operations that nobody waits for");
        debug_assert!(self.kind != 0xff, "that marks letters");
        u64::from(self.kind) << 56
            | u64::from(self.generation & GENERATION) << 32
            | u64::from(self.slot)
    }

    fn unpack(data: u64) -> Tag {
        Tag {
            kind: (data >> 56) as u8,
            generation: (data >> 32) as u32 & GENERATION,
            slot: data as u32,
        }
    }
}

/// What [`Ring::wait`] waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    Readable,
    Writable,
}

/// One completion.
#[derive(Debug)]
pub struct Done {
    pub tag: Tag,
    /// The number of bytes, or the kernel's error.
    pub result: Result<u32, Errno>,
    /// The new connection, if the operation accepted one; closed if nobody takes it.
    pub accepted: Option<OwnedFd>,
    /// What was received, if the operation took a block and put something into it.
    pub buf: Option<Buf>,
    /// The operation goes on; when false it is over.
    pub more: bool,
    /// The socket had more than was read.
    pub nonempty: bool,
}

/// How much memory a ring's relay buffers take.
#[derive(Clone, Copy, Debug)]
pub struct RingSettings {
    pub small_blocks: usize,
    pub large_blocks: usize,
    pub datagram_blocks: usize,
}

impl RingSettings {
    /// Splits `bytes` evenly between the classes, with at least a few blocks of each. Without
    /// `datagrams` that class has none.
    pub fn with_bytes(bytes: usize, datagrams: bool) -> RingSettings {
        let share = if datagrams { bytes / 3 } else { bytes / 2 };
        let for_datagrams = (share / Class::Datagram.bytes()).clamp(16, 8 * 1024);
        RingSettings {
            small_blocks: (share / Class::Small.bytes()).clamp(64, pool::BLOCKS_MAX),
            large_blocks: (share / Class::Large.bytes()).clamp(4, 16 * 1024),
            datagram_blocks: if datagrams { for_datagrams } else { 0 },
        }
    }
}

/// One io_uring instance with its buffers. Stays on the thread that made it.
pub struct Ring {
    io: IoUring,
    /// The flags of every wait.
    wait_flags: EnterFlags,
    /// By group; the reserve comes last and is topped up first.
    provided: [Provided; 4],
    /// Never dropped: an operation may be in flight on its memory.
    pool: ManuallyDrop<Pool>,
    desk: Desk,
    datagrams: DatagramIo,
    /// Completions that have been handed out.
    reaped: u64,
}

/// `struct io_uring_getevents_arg` (io_uring_enter2(2)): which signals end the wait (none), how
/// long to gather more completions than requested (not at all), and when the wait ends. The crate's
/// own type fits only the calls that predate `IORING_ENTER_NO_IOWAIT`.
#[repr(C)]
struct WaitArgument {
    signals: u64,
    signals_bytes: u32,
    batch_us: u32,
    limit: *const libc::timespec,
}
// `struct __kernel_timespec` has 64-bit fields on every architecture.
const _: () = assert!(size_of::<libc::timespec>() == 16);

/// What the kernel reads while it takes a submission; it stays in place until then.
struct Desk {
    addresses: Vec<SockAddr>,
    pieces: Vec<libc::iovec>,
    messages: Vec<libc::msghdr>,
}

impl Ring {
    /// Sets up a ring for this thread and registers its buffer rings.
    pub fn new(settings: RingSettings) -> io::Result<Ring> {
        let io = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(COMPLETIONS)
            .dontfork()
            .setup_r_disabled()
            .build(SUBMISSIONS)?;
        assert!(io.params().is_feature_submit_stable(), "every kernel since 5.5 has it");
        restrict::enable(&io)?;
        let RingSettings { small_blocks, large_blocks, datagram_blocks } = settings;
        let pool = Pool::with_datagrams(small_blocks, large_blocks, datagram_blocks);
        let provided = [
            Provided::register(&io, Class::Small, Stock::Common, small_blocks)?,
            Provided::register(&io, Class::Large, Stock::Common, large_blocks)?,
            Provided::register(&io, Class::Datagram, Stock::Common, datagram_blocks)?,
            Provided::register(&io, Class::Small, Stock::Reserve, pool.reserve())?,
        ];
        let pool = ManuallyDrop::new(pool);
        // The kernel counts a thread that waits in a ring as waiting for a disk, so an idle balancer
        // looks like a host that only waits for I/O; since 6.15 it can be asked not to.
        let calm = io.params().is_feature_no_iowait();
        let wait_flags = if calm { EnterFlags::NO_IOWAIT } else { EnterFlags::empty() };
        let (desk, datagrams) = (Desk::new(), DatagramIo::new());
        let mut ring = Ring { io, wait_flags, provided, pool, desk, datagrams, reaped: 0 };
        ring.replenish();
        Ok(ring)
    }

    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    pub fn pool_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Accepts connections until it fails or is cancelled.
    pub fn accept_many(&mut self, tag: Tag, listener: BorrowedFd<'_>) {
        let entry = opcode::AcceptMulti::new(types::Fd(listener.as_raw_fd()))
            .flags(libc::SOCK_CLOEXEC)
            .build();
        self.push(tag.pack() | ACCEPT, entry);
    }

    /// Connects a socket.
    pub fn connect(&mut self, tag: Tag, socket: BorrowedFd<'_>, to: SocketAddr) {
        self.make_room();
        let address = self.desk.address(to);
        let entry = opcode::Connect::new(
            types::Fd(socket.as_raw_fd()),
            address.as_ptr().cast(),
            address.len(),
        )
        .build();
        self.push(tag.pack(), entry);
    }

    /// Receives once into a block of `class`. With `wait_first`, waits for data before trying.
    pub fn receive(&mut self, tag: Tag, socket: BorrowedFd<'_>, class: Class, wait_first: bool) {
        self.receive_once(tag, socket, (class, Stock::Common), wait_first);
    }

    /// Receives once into a small block of the reserve.
    pub fn receive_last(&mut self, tag: Tag, socket: BorrowedFd<'_>, wait_first: bool) {
        self.receive_once(tag, socket, (Class::Small, Stock::Reserve), wait_first);
    }

    fn receive_once(
        &mut self,
        tag: Tag,
        socket: BorrowedFd<'_>,
        (class, stock): (Class, Stock),
        wait_first: bool,
    ) {
        let ioprio = if wait_first { POLL_FIRST } else { 0 };
        let entry = opcode::Recv::new(
            types::Fd(socket.as_raw_fd()),
            std::ptr::null_mut(),
            class.bytes() as u32,
        )
        .buf_group(group(class, stock))
        .ioprio(ioprio)
        .build()
        .flags(squeue::Flags::BUFFER_SELECT);
        self.push(tag.pack(), entry);
    }

    /// Receives into small blocks repeatedly, until `bytes_max` have arrived in all (kernels since
    /// 6.17; see `probe`), an error, the end of the stream or a cancel.
    pub fn receive_many(&mut self, tag: Tag, socket: BorrowedFd<'_>, bytes_max: u32) {
        let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), std::ptr::null_mut(), 0)
            .buf_group(group(Class::Small, Stock::Common))
            .ioprio(MULTISHOT | POLL_FIRST)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(tag.pack(), with_total(entry, bytes_max));
    }

    /// Sends a chain, gathered if it has several blocks. Completes when the kernel has all of it,
    /// or what it took before an error. The owner keeps the chain until then.
    ///
    /// Sockets are named by their descriptors. Registered ones (`io_uring_register_files(3)`) save
    /// the look-up of the file, 1.5 % of a worker's time in a profile of 512 connections; but
    /// measured in turn over 21 rounds, they cost 1.01 times as much there and 1.00 times with 64.
    pub fn send(&mut self, tag: Tag, socket: BorrowedFd<'_>, what: Outgoing) {
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let fd = types::Fd(socket.as_raw_fd());
        let entry = if what.blocks() == 1 {
            let piece = self.pool.pieces(what).next().unwrap_or(&[]);
            opcode::Send::new(fd, piece.as_ptr(), piece.len() as u32).flags(flags).build()
        } else {
            assert!(what.blocks() <= GATHER_MAX, "a gathered send has a bounded list");
            self.make_room();
            let message = self.desk.message(self.pool.pieces(what));
            opcode::SendMsg::new(fd, message).flags(flags as u32).build()
        };
        self.push(tag.pack(), entry);
    }

    /// Completes every time the descriptor becomes readable.
    pub fn watch(&mut self, tag: Tag, descriptor: BorrowedFd<'_>) {
        let fd = types::Fd(descriptor.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build();
        self.push(tag.pack(), entry);
    }

    /// Completes once when a socket becomes readable or writable.
    pub fn wait(&mut self, tag: Tag, socket: BorrowedFd<'_>, until: Until) {
        let events = match until {
            Until::Readable => libc::POLLIN | libc::POLLRDHUP,
            Until::Writable => libc::POLLOUT,
        };
        let fd = types::Fd(socket.as_raw_fd());
        self.push(tag.pack(), opcode::PollAdd::new(fd, events as u32).build());
    }

    /// Cancels the operation with this tag, whose own completion says how it ended.
    pub fn cancel(&mut self, target: Tag) {
        self.push(0, opcode::AsyncCancel::new(target.pack()).build());
    }

    /// The same for an accept.
    pub fn cancel_accept(&mut self, target: Tag) {
        self.push(0, opcode::AsyncCancel::new(target.pack() | ACCEPT).build());
    }

    /// Closes a descriptor on which nothing is in flight.
    pub fn close(&mut self, descriptor: OwnedFd) {
        let entry = opcode::Close::new(types::Fd(descriptor.into_raw_fd())).build();
        self.push(0, entry.flags(squeue::Flags::SKIP_SUCCESS));
    }

    /// From now on no receive finds a block, and what arrives stays in its socket: those that are armed end
    /// with `ENOBUFS` once there is something to read. Completions from before may still bring bytes.
    ///
    /// # Errors
    /// The kernel does not let go of the blocks.
    pub fn withdraw(&mut self) -> io::Result<()> {
        self.provided.iter_mut().try_for_each(|provided| provided.withdraw(&self.io))
    }

    /// Lets receives find blocks again; those that are still armed go on. False if completions from before
    /// [`Ring::withdraw`] may still have to be reaped, with blocks in them.
    ///
    /// # Errors
    /// The kernel does not take the blocks back.
    pub fn restock(&mut self) -> io::Result<bool> {
        if self.io.submission().cq_overflow() || !self.io.completion().is_empty() {
            return Ok(false);
        }
        for provided in &mut self.provided {
            let pool = &mut self.pool;
            probe::patiently(|| provided.restock(&self.io, pool))?;
        }
        Ok(true)
    }

    /// Submits what is queued, and waits for a completion for at most `patience` (`None`: for
    /// ever).
    pub fn enter(&mut self, patience: Option<Duration>) -> io::Result<()> {
        self.replenish();
        let entered = match patience {
            Some(Duration::ZERO) => self.io.submit(),
            _ => self.submit_and_wait(patience),
        };
        self.wipe();
        match entered.map_err(|error| error.raw_os_error()) {
            // Time is up; a signal came; completions must be reaped first.
            Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(code) => {
                Err(code.map_or(io::ErrorKind::Other.into(), io::Error::from_raw_os_error))
            }
        }
    }

    /// Hands what is queued to the kernel, without waiting for anything.
    pub fn flush(&mut self) {
        if !self.io.submission().is_empty() {
            // A receive among the submissions may look for a block at once.
            self.replenish();
            // An error here (EBUSY, EINTR) leaves entries queued; the caller's loop or the next
            // enter tries them again.
            let _ = self.io.submit();
        }
        self.wipe();
    }

    /// Moves up to [`REAP_MAX`] completions into `into`. True when more may be waiting.
    pub fn reap(&mut self, into: &mut Vec<Done>) -> bool {
        let mut completions = self.io.completion();
        for _ in 0..REAP_MAX {
            let Some(entry) = completions.next() else {
                self.datagrams.release(&mut self.pool);
                return false;
            };
            if self.datagrams.complete(entry.user_data(), entry.result()) {
                continue;
            }
            if let Some(done) = done(&entry, &mut self.pool, &mut self.provided) {
                self.reaped += 1;
                into.push(done);
            }
        }
        true
    }

    /// How many completions [`Ring::reap`] has handed out in all: what there was to do.
    pub fn reaped(&self) -> u64 {
        self.reaped
    }

    fn submit_and_wait(&mut self, patience: Option<Duration>) -> io::Result<usize> {
        let limit = patience.map(|patience| libc::timespec {
            tv_sec: patience.as_secs() as libc::time_t,
            tv_nsec: patience.subsec_nanos().into(),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let argument = WaitArgument { signals: 0, signals_bytes: 0, batch_us: 0, limit };
        let flags = EnterFlags::EXT_ARG | EnterFlags::GETEVENTS | self.wait_flags;
        let waiting = self.io.submission().len() as u32;
        // SAFETY: the argument and the time it points at live until the call returns, and what the
        // submissions point at lives until they are taken (module text).
        unsafe { self.io.submitter().enter(waiting, 1, flags.bits(), Some(&argument)) }
    }

    /// Clears what the kernel had to read, once it has taken every submission.
    fn wipe(&mut self) {
        if self.io.submission().is_empty() {
            self.desk.wipe();
            self.datagrams.wipe();
        }
    }

    fn replenish(&mut self) {
        for provided in self.provided.iter_mut().rev() {
            provided.replenish(&mut self.pool);
        }
    }

    fn push(&mut self, data: u64, entry: squeue::Entry) {
        let entry = entry.user_data(data);
        // SAFETY: what the entry points at is pool memory or on the desk (module text); descriptors
        // are numbers, and a wrong one is answered with an error.
        while unsafe { self.io.submission().push(&entry) }.is_err() {
            self.flush();
        }
    }

    /// Makes sure that the next push need not flush, which would wipe what it points at.
    fn make_room(&mut self) {
        while self.io.submission().is_full() || self.desk.is_full() {
            self.flush();
        }
    }
}

impl Desk {
    fn new() -> Desk {
        Desk {
            addresses: Vec::with_capacity(DESK_MAX),
            pieces: Vec::with_capacity(DESK_MAX * GATHER_MAX),
            messages: Vec::with_capacity(DESK_MAX),
        }
    }

    fn is_full(&self) -> bool {
        self.addresses.len() == DESK_MAX || self.messages.len() == DESK_MAX
    }

    fn wipe(&mut self) {
        self.addresses.clear();
        self.pieces.clear();
        self.messages.clear();
    }

    /// Keeps an address in place. The vectors never grow, so what they hold never moves.
    fn address(&mut self, address: SocketAddr) -> &SockAddr {
        let place = self.addresses.len();
        assert!(place < DESK_MAX);
        self.addresses.push(address.into());
        &self.addresses[place]
    }

    fn message<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]>) -> *const libc::msghdr {
        let first = self.pieces.len();
        for piece in pieces.take(GATHER_MAX) {
            assert!(self.pieces.len() < self.pieces.capacity());
            self.pieces.push(libc::iovec {
                iov_base: piece.as_ptr().cast_mut().cast(),
                iov_len: piece.len(),
            });
        }
        assert!(self.messages.len() < DESK_MAX);
        // SAFETY: all zeroes is a valid msghdr: no address, no pieces, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces[first..].as_mut_ptr();
        message.msg_iovlen = self.pieces.len() - first;
        self.messages.push(message);
        &raw const self.messages[self.messages.len() - 1]
    }
}

/// The order matters: the block is taken over first, whatever the result is.
fn done(entry: &cqueue::Entry, pool: &mut Pool, provided: &mut [Provided; 4]) -> Option<Done> {
    let result = entry.result();
    let flags = entry.flags();
    let buf = cqueue::buffer_select(flags).and_then(|block| {
        let (buf, stock) = pool.filled(block, usize::try_from(result).unwrap_or(0));
        provided[usize::from(group(pool.class(&buf), stock))].took_one();
        if buf.is_empty() {
            pool.give_back(buf);
            return None;
        }
        Some(buf)
    });
    if entry.user_data() == 0 {
        debug_assert!(buf.is_none(), "only receives take blocks");
        return None;
    }
    if result == -libc::ENOBUFS {
        // The completion does not say which buffer ring was empty.
        provided.iter_mut().filter(|provided| provided.is_dry()).for_each(Provided::ran_dry);
    }
    let accepted = (entry.user_data() & ACCEPT != 0 && result >= 0).then(|| {
        // SAFETY: the result of an accept is a descriptor that the kernel has just made for us.
        unsafe { OwnedFd::from_raw_fd(result) }
    });
    Some(Done {
        tag: Tag::unpack(entry.user_data()),
        result: u32::try_from(result).map_err(|_| Errno::from_raw(-result)),
        accepted,
        buf,
        more: cqueue::more(flags),
        nonempty: cqueue::sock_nonempty(flags),
    })
}

/// Sets the total of a multishot receive, for which the `io-uring` crate has no field.
fn with_total(entry: squeue::Entry, bytes_max: u32) -> squeue::Entry {
    const { assert!(size_of::<squeue::Entry>() == 64) };
    let mut entry = entry;
    // SAFETY: the entry is the kernel's `io_uring_sqe`, 64 bytes of plain numbers laid out as in C;
    // four bytes at 44 are inside it and aligned.
    unsafe { (&raw mut entry).cast::<u8>().add(OPTLEN_OFFSET).cast::<u32>().write(bytes_max) };
    entry
}

#[cfg(test)]
mod tests;
