//! What one thread has lately done, for others to follow: a ring of numbers that its writer never waits for. A reader
//! that has fallen too far behind is told so, and looks at everything instead. Owns the ring.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

/// How far a reader may fall behind: a few thousand sessions, in 8 KiB.
const LENGTH: u64 = 4096;

/// One writer's ring.
#[derive(Debug)]
pub struct Recent {
    /// Numbers written so far.
    written: AtomicU64,
    ring: Box<[AtomicU16]>,
}

impl Default for Recent {
    fn default() -> Recent {
        let ring = (0..LENGTH).map(|_| AtomicU16::new(0)).collect();
        Recent { written: AtomicU64::new(0), ring }
    }
}

impl Recent {
    /// Adds a number. There is one writer, whose earlier stores are seen by whoever reads the number.
    pub fn push(&self, number: u16) {
        let written = self.written.load(Ordering::Relaxed);
        // Whoever reads this number too early, in place of an older one, also sees how many were written by then.
        self.ring[(written % LENGTH) as usize].store(number, Ordering::Release);
        self.written.store(written + 1, Ordering::Release);
    }

    /// Calls `each` for the numbers after the first `seen`, and counts those. False: some of them had been
    /// overwritten, and what was read may have been others.
    pub fn read(&self, seen: &mut u64, mut each: impl FnMut(u16)) -> bool {
        let written = self.written.load(Ordering::Acquire);
        let from = std::mem::replace(seen, written);
        if written - from >= LENGTH {
            return false;
        }
        for place in from..written {
            each(self.ring[(place % LENGTH) as usize].load(Ordering::Acquire));
        }
        // The writer may be about to overwrite the one at this place.
        from == written || self.written.load(Ordering::Acquire) - from < LENGTH
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32};

    use super::*;

    fn read(recent: &Recent, seen: &mut u64) -> Option<Vec<u16>> {
        let mut numbers = Vec::new();
        recent.read(seen, |number| numbers.push(number)).then_some(numbers)
    }

    #[test]
    fn each_reader_reads_each_number_once() {
        let recent = Recent::default();
        let (mut one, mut other) = (0, 0);
        assert_eq!(read(&recent, &mut one), Some(vec![]));
        recent.push(7);
        recent.push(8);
        assert_eq!(read(&recent, &mut one), Some(vec![7, 8]));
        recent.push(9);
        assert_eq!(read(&recent, &mut one), Some(vec![9]));
        assert_eq!(read(&recent, &mut other), Some(vec![7, 8, 9]));
    }

    #[test]
    fn who_has_fallen_too_far_behind_is_told_and_goes_on_from_there() {
        let recent = Recent::default();
        let mut seen = 0;
        (0..LENGTH as u16 - 1).for_each(|number| recent.push(number));
        assert_eq!(read(&recent, &mut seen).map(|all| all.len() as u64), Some(LENGTH - 1));
        (0..LENGTH as u16).for_each(|number| recent.push(number));
        assert_eq!(read(&recent, &mut seen), None);
        recent.push(5);
        assert_eq!(read(&recent, &mut seen), Some(vec![5]));
    }

    /// The writer counts, and says which count has changed; the reader follows.
    #[test]
    fn a_reader_beside_the_writer_ends_with_what_was_written() {
        const ROWS: usize = 50;
        let recent = Recent::default();
        let counts: Vec<AtomicU32> = (0..ROWS).map(|_| AtomicU32::new(0)).collect();
        let done = AtomicBool::new(false);
        let mut followed = vec![0; ROWS];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = crate::base::random::xorshift(5);
                for _ in 0..200_000 {
                    let row = random(ROWS as u64) as usize;
                    counts[row].fetch_add(1, Ordering::Relaxed);
                    recent.push(row as u16);
                }
                done.store(true, Ordering::Release);
            });
            let mut seen = 0;
            loop {
                let last = done.load(Ordering::Acquire);
                let look = |row: u16| {
                    let row = usize::from(row);
                    followed[row] = counts[row].load(Ordering::Relaxed);
                };
                if !recent.read(&mut seen, look) {
                    let all = counts.iter().map(|count| count.load(Ordering::Relaxed));
                    followed = all.collect();
                }
                if last {
                    break;
                }
            }
        });
        let counts: Vec<u32> = counts.into_iter().map(AtomicU32::into_inner).collect();
        assert_eq!(followed, counts);
    }
}
