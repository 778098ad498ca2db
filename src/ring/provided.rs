//! The buffer ring shared with the kernel: free blocks wait in it, and a receive takes the one at
//! its head (`io_uring_register_buf_ring(3)`). Owns the shared entries and their tail; blocks come
//! from the pool and go back to it.
//!
//! The shared ring is first in, first out, so every posted block passes through the cache in turn.
//! Therefore only a few are posted at a time, and topped up once a turn from the pool's
//! last-in-first-out list; a receive that finds the ring empty doubles their number.
//!
//! A ring can be taken from the kernel and given back later. In between, a receive that names its group
//! ends without having touched its socket, and what arrives stays there.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::io;
use std::ptr::{NonNull, addr_of_mut};
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::pool::{Class, Pool, Stock};

/// How many blocks are posted at first; light traffic never touches more.
const POSTED_FIRST: u16 = 64;
/// One block in four is never posted.
const WRITTEN_SHARE: usize = 4;
/// Half of the reserve is not, since nothing else is left to write into by hand once the rest is
/// used up.
const WRITTEN_SHARE_OF_RESERVE: usize = 2;
const PAGE: usize = 4096;
/// The group of the reserve, which consists of small blocks.
const RESERVE: u16 = Class::ALL.len() as u16;

/// The buffer group of a class and a stock; its number is also its place in the ring's list.
pub(super) const fn group(class: Class, stock: Stock) -> u16 {
    match stock {
        Stock::Common => class as u16,
        Stock::Reserve => RESERVE,
    }
}

/// The posted blocks of one class and stock.
pub(super) struct Provided {
    class: Class,
    stock: Stock,
    entries: NonNull<BufRingEntry>,
    size: u16,
    /// The number of entries written so far, which is where the kernel must stop.
    tail: u16,
    posted: u16,
    target: u16,
    /// The highest value of `target`.
    posted_max: u16,
    /// `target` while the kernel does not have the ring; nothing is posted meanwhile.
    resting: Option<u16>,
}

impl Provided {
    /// Registers an empty ring for one stock of a class that has `blocks` blocks in it.
    pub(super) fn register(
        ring: &IoUring,
        class: Class,
        stock: Stock,
        blocks: usize,
    ) -> io::Result<Provided> {
        let size = blocks.next_power_of_two().clamp(1, super::pool::BLOCKS_MAX) as u16;
        let bytes = usize::from(size) * size_of::<BufRingEntry>();
        let layout =
            Layout::from_size_align(bytes, PAGE).expect("a buffer ring is at most 512 KiB");
        // SAFETY: the layout has a size that is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(entries) = NonNull::new(memory.cast::<BufRingEntry>()) else {
            handle_alloc_error(layout)
        };
        // The rest is for bytes written by hand: if every block were posted, a worker that must send before
        // it receives anything would wait for ever.
        let written_share = match stock {
            Stock::Common => WRITTEN_SHARE,
            Stock::Reserve => WRITTEN_SHARE_OF_RESERVE,
        };
        let posted_max = (blocks - blocks / written_share).clamp(1, usize::from(size)) as u16;
        let target = POSTED_FIRST.min(posted_max);
        let resting = None;
        let provided = Provided {
            class,
            stock,
            entries,
            size,
            tail: 0,
            posted: 0,
            target,
            posted_max,
            resting,
        };
        provided.enlist(ring)?;
        Ok(provided)
    }

    fn enlist(&self, ring: &IoUring) -> io::Result<()> {
        let (memory, group) = (self.entries.as_ptr() as u64, group(self.class, self.stock));
        // SAFETY: `entries` is initialised memory of `size` entries, aligned to a page, and never freed:
        // the kernel keeps it for as long as the ring lives. Its tail is zero, so that none is read.
        unsafe { ring.submitter().register_buf_ring_with_flags(memory, self.size, group, 0) }
    }

    /// Has the kernel forget the ring.
    pub(super) fn withdraw(&mut self, ring: &IoUring) -> io::Result<()> {
        ring.submitter().unregister_buf_ring(group(self.class, self.stock))?;
        self.resting = Some(std::mem::take(&mut self.target));
        Ok(())
    }

    /// Gives the kernel the ring back, empty. Every completion from before it was withdrawn must have been
    /// handled: what is still posted then is the kernel's no more.
    pub(super) fn restock(&mut self, ring: &IoUring, pool: &mut Pool) -> io::Result<()> {
        if self.resting.is_none() {
            return Ok(());
        }
        if self.posted > 0 {
            let back = pool.reclaim(self.class, self.stock);
            assert_eq!(back, usize::from(self.posted), "what was not taken is still there");
        }
        (self.tail, self.posted) = (0, 0);
        self.publish();
        self.enlist(ring)?;
        self.target = self.resting.take().unwrap_or_default();
        Ok(())
    }

    /// Posts blocks from the pool until `target` is reached.
    pub(super) fn replenish(&mut self, pool: &mut Pool) {
        if self.posted >= self.target {
            return;
        }
        while self.posted < self.target {
            let Some((block, address, bytes)) = pool.post(self.class, self.stock) else { break };
            self.write(block, address, bytes);
        }
        self.publish();
    }

    /// A posted block came back.
    pub(super) fn took_one(&mut self) {
        assert!(self.posted > 0, "the kernel took a block that was not posted");
        self.posted -= 1;
    }

    /// Whether the kernel has taken everything posted.
    pub(super) fn is_dry(&self) -> bool {
        self.posted == 0
    }

    /// A receive found the ring empty: post more from now on.
    pub(super) fn ran_dry(&mut self) {
        self.target = self.target.saturating_mul(2).min(self.posted_max);
    }

    fn write(&mut self, block: u16, address: NonNull<u8>, bytes: usize) {
        let place = usize::from(self.tail & (self.size - 1));
        // SAFETY: `place` is below `size`, so the entry is inside the shared memory; the kernel reads
        // it only once the tail has passed it. The fields are written one by one because the tail
        // lives in the reserved field of the first entry.
        unsafe {
            let entry = &mut *self.entries.as_ptr().add(place);
            entry.set_addr(address.as_ptr() as u64);
            entry.set_len(bytes as u32);
            entry.set_bid(block);
        }
        self.tail = self.tail.wrapping_add(1);
        self.posted += 1;
    }

    fn publish(&mut self) {
        // SAFETY: the first entry is valid and initialised; its reserved field is the tail, two bytes
        // aligned to two, which only this thread writes.
        let tail = unsafe {
            AtomicU16::from_ptr(BufRingEntry::tail(addr_of_mut!(*self.entries.as_ptr())).cast_mut())
        };
        tail.store(self.tail, Ordering::Release);
    }
}
