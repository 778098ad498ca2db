//! Blocks of bytes between two sockets: the kernel fills them, the kernel empties them, and in
//! between they change hands without being copied. Owns the memory of one worker's relay buffers,
//! and the record of who holds each block; knows no socket and no ring.
//!
//! A block is in exactly one place:
//!
//! ```text
//!   free --post--> posted (the kernel may write) --filled--> a Buf or a link of a Chain
//!     ^                                                               |
//!     +--------------------------- give_back -------------------------+
//! ```
//!
//! A [`Buf`] is move-only and only this module makes one, so while someone holds it the kernel may
//! not write to its block. The free list is last in, first out: however large the pool, light
//! traffic stays in a few blocks that are still in the cache.
//!
//! A block whose bytes nobody reads does not come back, and there may be any number of such
//! readers. So part of the small blocks is a [`Stock::Reserve`]: only receives that name it get its
//! blocks, and they should be asked for only when the bytes have been seen to have somewhere to go.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// The sizes of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// For messages: [`SMALL_BYTES`].
    Small,
    /// For streams: [`LARGE_BYTES`].
    Large,
    /// For datagrams: [`DATAGRAM_BYTES`] fits any of them with its metadata.
    Datagram,
}

impl Class {
    pub const ALL: [Class; 3] = [Class::Small, Class::Large, Class::Datagram];

    pub const fn bytes(self) -> usize {
        match self {
            Class::Small => SMALL_BYTES,
            Class::Large => LARGE_BYTES,
            Class::Datagram => DATAGRAM_BYTES,
        }
    }
}

/// Which blocks a receive may be given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stock {
    /// Those beyond the reserve.
    Common,
    /// The last small ones as well.
    Reserve,
}

pub const SMALL_BYTES: usize = 4 * 1024;
pub const LARGE_BYTES: usize = 64 * 1024;
/// 65,535 bytes and a page for the addresses that come with them. A short datagram touches one
/// page.
pub const DATAGRAM_BYTES: usize = 68 * 1024;
/// Limit on the blocks of one class: the kernel's for a buffer ring
/// (`io_uring_register_buf_ring(3)`).
pub const BLOCKS_MAX: usize = 32 * 1024;
/// Limit on the blocks of one gathered send.
pub const GATHER_MAX: usize = 64;

/// One small block in four is in the reserve, and at least one.
const RESERVE_SHARE: usize = 4;
/// Small blocks are scarce when at most one in two is unused: twice the reserve, so that what armed
/// receives still bring in unasked finds a place outside it.
const SCARCE_SHARE: usize = 2;

/// Bytes that would fill more small blocks than this go into a large one.
const LARGE_SHARE: usize = 4;

const PAGE: usize = 4096;
const NONE: u16 = u16::MAX;

/// Bytes that one holder owns: part of one block.
#[derive(PartialEq, Eq, Debug)]
#[must_use = "a Buf that is dropped is a block lost; give it back to its pool"]
pub struct Buf {
    block: u16,
    start: u32,
    len: u32,
}

impl Buf {
    /// The number of bytes in it.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A queue of [`Buf`]s, linked through the pool: pushing and popping never allocate.
#[derive(PartialEq, Eq, Debug)]
#[must_use = "a Chain that is dropped loses its blocks; give it back to its pool"]
pub struct Chain {
    head: u16,
    tail: u16,
    blocks: u16,
    bytes: u32,
}

impl Chain {
    pub const EMPTY: Chain = Chain { head: NONE, tail: NONE, blocks: 0, bytes: 0 };

    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The number of bytes in it.
    pub fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// The number of blocks that it holds.
    pub fn blocks(&self) -> usize {
        usize::from(self.blocks)
    }

    /// What the ring needs to know in order to send it. The chain itself stays with its owner, who
    /// keeps it until the send is over.
    pub fn outgoing(&self) -> Outgoing {
        Outgoing { head: self.head, blocks: self.blocks }
    }

    /// Takes the whole chain and leaves an empty one.
    pub fn take(&mut self) -> Chain {
        std::mem::replace(self, Chain::EMPTY)
    }
}

/// A view of a chain that is being sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outgoing {
    head: u16,
    blocks: u16,
}

impl Outgoing {
    pub fn blocks(self) -> usize {
        usize::from(self.blocks)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    Free,
    Kernel(Stock),
    User,
}

#[derive(Clone, Copy)]
struct Block {
    holder: Holder,
    next: u16,
    start: u32,
    len: u32,
}

/// The blocks of one worker.
pub struct Pool {
    memory: NonNull<u8>,
    layout: Layout,
    blocks: Box<[Block]>,
    /// By [`Class`]: how many blocks are of this class or an earlier one.
    ends: [u16; 3],
    /// By [`Class`]: the head of the free list, and its length.
    free: [u16; 3],
    free_count: [usize; 3],
    /// By [`Class`]: how many blocks hold nobody's bytes, posted or not.
    unused: [usize; 3],
    /// How many small blocks are posted for receives that name the reserve.
    posted_reserve: usize,
    /// How many small blocks are kept for those receives, and at how few unused ones blocks are
    /// scarce.
    reserve: usize,
    scarce: usize,
}

impl Pool {
    /// A pool for streams: its numbers of small and large blocks. The memory comes from the kernel
    /// untouched, so a block costs nothing until it is first used. At most [`BLOCKS_MAX`] of a
    /// class, 65,535 in all.
    pub fn new(small: usize, large: usize) -> Pool {
        Pool::with_datagrams(small, large, 0)
    }

    /// A pool with these numbers of blocks of each class.
    pub fn with_datagrams(small: usize, large: usize, datagrams: usize) -> Pool {
        let counts = [small, large, datagrams];
        let count: usize = counts.iter().sum();
        assert!(counts.iter().all(|blocks| *blocks <= BLOCKS_MAX) && count < usize::from(NONE));
        let bytes: usize =
            Class::ALL.iter().zip(counts).map(|(class, blocks)| class.bytes() * blocks).sum();
        let layout = Layout::from_size_align(bytes.max(PAGE), PAGE);
        let layout = layout.expect("a pool fits the address space");
        // SAFETY: the layout has a size that is not zero.
        let Some(memory) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        let reserve = (small / RESERVE_SHARE).max(1).min(small);
        let unused = Block { holder: Holder::User, next: NONE, start: 0, len: 0 };
        let mut pool = Pool {
            memory,
            layout,
            blocks: vec![unused; count].into_boxed_slice(),
            ends: [small as u16, (small + large) as u16, count as u16],
            free: [NONE; 3],
            free_count: [0; 3],
            unused: [0; 3],
            posted_reserve: 0,
            reserve,
            scarce: (small / SCARCE_SHARE).max(reserve),
        };
        for block in (0..count as u16).rev() {
            pool.release(block);
        }
        pool
    }

    /// How many blocks of a class nobody holds.
    pub fn free(&self, class: Class) -> usize {
        self.free_count[class as usize]
    }

    /// How many blocks of a class there are.
    pub fn blocks(&self, class: Class) -> usize {
        usize::from(self.ends[class as usize] - self.first(class))
    }

    /// How many blocks of a class hold nobody's bytes, including those posted for future receives.
    pub fn unused(&self, class: Class) -> usize {
        self.unused[class as usize]
    }

    /// How many small blocks are kept for receives that name the reserve.
    pub fn reserve(&self) -> usize {
        self.reserve
    }

    /// How many more small blocks are unused than the number at which they are scarce.
    pub fn surplus(&self) -> usize {
        self.unused(Class::Small).saturating_sub(self.scarce)
    }

    /// Whether a small block is too valuable for bytes that may have nowhere to go.
    pub fn is_scarce(&self) -> bool {
        self.surplus() == 0
    }

    /// Whether no more is unused than the reserve.
    pub fn is_used_up(&self) -> bool {
        self.unused(Class::Small) <= self.reserve()
    }

    /// Whether a receive that names the reserve could get a block.
    pub fn has_reserve(&self) -> bool {
        self.free(Class::Small) + self.posted_reserve > 0
    }

    /// A block of length zero, to be written by hand; `None` if the class is used up.
    pub fn take(&mut self, class: Class) -> Option<Buf> {
        let block = self.pop_free(class)?;
        self.unused[class as usize] -= 1;
        Some(Buf { block, start: 0, len: 0 })
    }

    /// Appends to a buffer as much as fits; returns how many bytes that was.
    pub fn append(&mut self, buf: &mut Buf, bytes: &[u8]) -> usize {
        let capacity = self.class_of(buf.block).bytes();
        let end = buf.start as usize + buf.len();
        let count = bytes.len().min(capacity - end);
        // SAFETY: the block is the holder's alone (module text), `end + count` is inside it, and
        // `bytes` cannot overlap it because a `&mut Pool` excludes every borrow from `Pool::bytes`.
        unsafe {
            let to = self.address(buf.block).add(end);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), count);
        }
        buf.len += count as u32;
        count
    }

    /// Copies bytes into as few blocks as there may be; `None` if there are not enough.
    pub fn chain(&mut self, mut bytes: &[u8]) -> Option<Chain> {
        let mut chain = Chain::EMPTY;
        while !bytes.is_empty() {
            let is_long = bytes.len() > SMALL_BYTES * LARGE_SHARE || self.free(Class::Small) == 0;
            let is_large = is_long && self.free(Class::Large) > 0;
            let Some(mut buf) = self.take(if is_large { Class::Large } else { Class::Small })
            else {
                self.give_back_chain(chain);
                return None;
            };
            let count = self.append(&mut buf, bytes);
            bytes = &bytes[count..];
            self.push(&mut chain, buf);
        }
        Some(chain)
    }

    /// The bytes of a buffer.
    pub fn bytes(&self, buf: &Buf) -> &[u8] {
        self.slice(buf.block, buf.start, buf.len)
    }

    /// The bytes of a buffer, for changing in place.
    pub fn bytes_mut(&mut self, buf: &mut Buf) -> &mut [u8] {
        let holder = self.blocks[usize::from(buf.block)].holder;
        assert_eq!(holder, Holder::User, "the block of a Buf is its holder's");
        let address = self.address(buf.block);
        let (start, len) = (buf.start as usize, buf.len());
        assert!(start + len <= self.class_of(buf.block).bytes());
        // SAFETY: in bounds and initialised, as in `slice`; the kernel may not write to the block,
        // and no other borrow of the pool's memory can coexist with a `&mut Pool`.
        unsafe { std::slice::from_raw_parts_mut(address.as_ptr().add(start), len) }
    }

    /// Cuts `count` bytes off the front.
    pub fn skip(&self, buf: &mut Buf, count: usize) {
        assert!(count <= buf.len(), "cannot skip past the end of a buffer");
        buf.start += count as u32;
        buf.len -= count as u32;
    }

    /// Keeps the first `count` bytes of a buffer and drops the rest.
    pub fn truncate(&self, buf: &mut Buf, count: usize) {
        buf.len = buf.len.min(count as u32);
    }

    /// The size of the block that a buffer is in.
    pub fn class(&self, buf: &Buf) -> Class {
        self.class_of(buf.block)
    }

    /// Gives a buffer back.
    pub fn give_back(&mut self, buf: Buf) {
        self.release(buf.block);
    }

    /// Puts a buffer at the end of a chain.
    pub fn push(&mut self, chain: &mut Chain, buf: Buf) {
        let link = &mut self.blocks[usize::from(buf.block)];
        (link.next, link.start, link.len) = (NONE, buf.start, buf.len);
        match chain.blocks {
            0 => chain.head = buf.block,
            _ => self.blocks[usize::from(chain.tail)].next = buf.block,
        }
        chain.tail = buf.block;
        chain.blocks += 1;
        chain.bytes += buf.len;
    }

    /// Takes the first buffer off a chain.
    pub fn pop(&mut self, chain: &mut Chain) -> Option<Buf> {
        if chain.blocks == 0 {
            return None;
        }
        let block = chain.head;
        let Block { next, start, len, .. } = self.blocks[usize::from(block)];
        chain.head = next;
        chain.blocks -= 1;
        chain.bytes -= len;
        if chain.blocks == 0 {
            *chain = Chain::EMPTY;
        }
        Some(Buf { block, start, len })
    }

    /// Moves up to `blocks_max` buffers from the front of a chain to a new one.
    pub fn split(&mut self, chain: &mut Chain, blocks_max: usize) -> Chain {
        if chain.blocks() <= blocks_max {
            return chain.take();
        }
        let mut front = Chain::EMPTY;
        for _ in 0..blocks_max {
            if let Some(buf) = self.pop(chain) {
                self.push(&mut front, buf);
            }
        }
        front
    }

    /// Drops the first `count` bytes of a chain and gives back the blocks that this empties.
    pub fn advance(&mut self, chain: &mut Chain, mut count: usize) {
        assert!(count <= chain.bytes(), "cannot advance past the end of a chain");
        while chain.blocks > 0 {
            let link = &mut self.blocks[usize::from(chain.head)];
            if (link.len as usize) > count {
                link.start += count as u32;
                link.len -= count as u32;
                chain.bytes -= count as u32;
                return;
            }
            count -= link.len as usize;
            if let Some(buf) = self.pop(chain) {
                self.give_back(buf);
            }
        }
    }

    /// Gives a whole chain back.
    pub fn give_back_chain(&mut self, mut chain: Chain) {
        while let Some(buf) = self.pop(&mut chain) {
            self.give_back(buf);
        }
    }

    /// The pieces of a chain that is being sent, in order.
    pub fn pieces(&self, outgoing: Outgoing) -> impl Iterator<Item = &[u8]> {
        let mut next = outgoing.head;
        (0..outgoing.blocks).map(move |_| {
            let block = next;
            let link = self.blocks[usize::from(block)];
            next = link.next;
            self.slice(block, link.start, link.len)
        })
    }

    /// Sets a free block aside for receives that name this stock; `None` if it has none left.
    pub fn set_aside(&mut self, class: Class, stock: Stock) -> Option<Buf> {
        debug_assert!(class == Class::Small || stock == Stock::Common, "others have no reserve");
        let kept = self.reserve().saturating_sub(self.posted_reserve);
        if (class, stock) == (Class::Small, Stock::Common) && self.free(class) <= kept {
            return None;
        }
        let block = self.pop_free(class)?;
        self.posted_reserve += usize::from(stock == Stock::Reserve);
        Some(Buf { block, start: 0, len: 0 })
    }

    /// A receive was given a block that had been set aside.
    pub fn took(&mut self, class: Class, stock: Stock) {
        self.unused[class as usize] -= 1;
        self.posted_reserve -= usize::from(stock == Stock::Reserve);
    }

    /// Hands a free block to the kernel, for receives that name this stock. Returns its number in
    /// the pool, its address and its size.
    pub(super) fn post(&mut self, class: Class, stock: Stock) -> Option<(u16, NonNull<u8>, usize)> {
        let Buf { block, .. } = self.set_aside(class, stock)?;
        self.blocks[usize::from(block)].holder = Holder::Kernel(stock);
        Some((block, self.address(block), class.bytes()))
    }

    /// Takes a block back from the kernel, which has written `len` bytes into it. Returns the stock
    /// it was posted for, too.
    pub(super) fn filled(&mut self, block: u16, len: usize) -> (Buf, Stock) {
        let class = self.class_of(block);
        let entry = &mut self.blocks[usize::from(block)];
        let Holder::Kernel(stock) = entry.holder else {
            panic!("the kernel returned a block it did not hold");
        };
        assert!(len <= class.bytes(), "the kernel reported more than a block holds");
        entry.holder = Holder::User;
        self.took(class, stock);
        (Buf { block, start: 0, len: len as u32 }, stock)
    }

    /// Takes back all blocks of a stock that were handed to the kernel, which has been made to forget them.
    /// Returns how many these were.
    pub(super) fn reclaim(&mut self, class: Class, stock: Stock) -> usize {
        let mut count = 0;
        for block in self.first(class)..self.ends[class as usize] {
            let entry = &mut self.blocks[usize::from(block)];
            if entry.holder == Holder::Kernel(stock) {
                entry.holder = Holder::User;
                self.took(class, stock);
                self.release(block);
                count += 1;
            }
        }
        count
    }

    fn class_of(&self, block: u16) -> Class {
        match block {
            block if block < self.ends[0] => Class::Small,
            block if block < self.ends[1] => Class::Large,
            _ => Class::Datagram,
        }
    }

    /// The number of a class's first block.
    fn first(&self, class: Class) -> u16 {
        match class {
            Class::Small => 0,
            Class::Large => self.ends[0],
            Class::Datagram => self.ends[1],
        }
    }

    fn address(&self, block: u16) -> NonNull<u8> {
        assert!(usize::from(block) < self.blocks.len(), "block {block} is not of this pool");
        let [small, large, _] = self.ends;
        let small_bytes = usize::from(small.min(block)) * SMALL_BYTES;
        let large_bytes = usize::from(large.min(block).saturating_sub(small)) * LARGE_BYTES;
        let datagram_bytes = usize::from(block.saturating_sub(large)) * DATAGRAM_BYTES;
        // SAFETY: the block exists (asserted), so the offset is inside the pool's one allocation.
        unsafe { self.memory.add(small_bytes + large_bytes + datagram_bytes) }
    }

    fn slice(&self, block: u16, start: u32, len: u32) -> &[u8] {
        let address = self.address(block);
        assert!(start as usize + len as usize <= self.class_of(block).bytes());
        // SAFETY: in bounds (asserted) of memory that is initialised (zeroed at start, then written
        // by the kernel or by `append`). The caller holds the block's Buf or Chain, so the kernel
        // may not write to it, and writing by hand takes a `&mut Pool`.
        unsafe { std::slice::from_raw_parts(address.as_ptr().add(start as usize), len as usize) }
    }

    fn pop_free(&mut self, class: Class) -> Option<u16> {
        let block = self.free[class as usize];
        if block == NONE {
            return None;
        }
        let entry = &mut self.blocks[usize::from(block)];
        self.free[class as usize] = entry.next;
        self.free_count[class as usize] -= 1;
        *entry = Block { holder: Holder::User, next: NONE, start: 0, len: 0 };
        Some(block)
    }

    fn release(&mut self, block: u16) {
        let class = self.class_of(block) as usize;
        let entry = &mut self.blocks[usize::from(block)];
        assert_eq!(entry.holder, Holder::User, "a block was given back twice");
        *entry = Block { holder: Holder::Free, next: self.free[class], start: 0, len: 0 };
        self.free[class] = block;
        self.free_count[class] += 1;
        self.unused[class] += 1;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.blocks.iter().any(|block| matches!(block.holder, Holder::Kernel(_))) {
            // The kernel may still write to a posted block, so leaking the memory is the safe
            // choice.
            return;
        }
        // SAFETY: allocated in `new` with this layout, and nobody holds a block of it.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests;
