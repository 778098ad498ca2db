//! How to receive a flow: into which blocks, into how many of them, or through a pipe. Learns that
//! from the lengths of the last receives and splice steps; does nothing itself.

use super::{Intake, Splice, Spliced, When};
use crate::ring::pool::{Class, LARGE_BYTES, Pool, SMALL_BYTES};

/// Total of one multishot receive in bytes: bounds what arrives unasked after a flow should pause,
/// and is large enough that re-arming is noise (once in 1,024 messages of 64 bytes).
pub(super) const MANY_BYTES_MAX: u32 = 64 * 1024;
/// Limit on the blocks that one flow may hold while the pool is plentiful.
const SMALL_HELD_MAX: usize = 16;
const LARGE_HELD_MAX: usize = 4;
/// A flow may hold at most one eighth of the free blocks: the more readers stall, the less each of
/// them can hold on to (A. Choudhury, E. Hahne, "Dynamic queue length thresholds for shared-memory
/// packet switches", IEEE/ACM ToN 1998). Of 4,096 small blocks 100 flows hold 16 each, 500 four,
/// and 2,000 one; then blocks are scarce.
const FREE_SHARE: usize = 8;
/// This many small blocks filled in a row make a flow a stream.
const FULL_ROW: u8 = 2;
/// This many receives in a row that would have fitted a small block make it a flow of messages
/// again.
const THIN_ROW: u8 = 4;

/// This many receives in a row of at least half a large block make a stream worth a pipe.
const STREAM_ROW: u8 = 4;
/// After this many splice steps in a row that moved less than a small block, the pipe is returned.
const TRICKLE_ROW: u8 = 4;
/// How many receives a stream that found no pipe takes before it asks for one again.
const UNAVAILABLE_PAUSE: u8 = u8::MAX;

/// What the last receives say about the next one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    class: Class,
    /// Receives in a row that speak for the other class of block.
    row: u8,
    /// Receives in a row that speak for a pipe, or splice steps in a row that speak against it.
    stream: u8,
    /// Splice next, and when; `None`: receive into blocks.
    pub(super) splice: Option<When>,
    pub(super) nonempty: bool,
}

impl Pace {
    pub(super) const fn new() -> Pace {
        Pace { class: Class::Small, row: 0, stream: 0, splice: None, nonempty: false }
    }

    /// That of a stream whose pipe holds bytes.
    pub(super) const SPLICED: Pace = Pace { splice: Some(When::NextTurn), ..Pace::new() };

    /// Learns from a splice step when to take the next one, or that this is no longer a stream.
    pub(super) fn note_splice(&mut self, moved: u64, how: Spliced) {
        let waited = matches!(self.splice, Some(When::Writable | When::Later));
        let trickle = how == Spliced::Step(Splice::Empty) && moved < SMALL_BYTES as u64;
        self.stream = if trickle { self.stream + 1 } else { 0 };
        self.splice = match how {
            Spliced::Step(Splice::Moved) => Some(When::NextTurn),
            // A socket may call itself writable and still refuse what is in a pipe (Linux 6.18,
            // with some megabytes unread); asked again at once it would do so for ever.
            Spliced::Step(Splice::Full) if moved == 0 && waited => Some(When::Later),
            Spliced::Step(Splice::Full) => Some(When::Writable),
            Spliced::Step(Splice::Empty) if self.stream == TRICKLE_ROW => None,
            Spliced::Step(Splice::Empty) if moved > 0 => Some(When::Soon),
            Spliced::Step(Splice::Empty) => Some(When::Readable),
            Spliced::Step(_) | Spliced::Stopped | Spliced::Unavailable => None,
        };
        if self.splice.is_none() {
            *self = Pace::new();
        }
        if how == Spliced::Unavailable {
            (self.class, self.stream) = (Class::Large, UNAVAILABLE_PAUSE);
        }
    }

    /// Learns from the length of a receive whether this is a flow of messages or a stream.
    pub(super) fn note(&mut self, len: usize) {
        self.note_stream(len);
        let (towards_other, row_max, other) = match self.class {
            Class::Small => (len == SMALL_BYTES, FULL_ROW, Class::Large),
            Class::Large | Class::Datagram => (len <= SMALL_BYTES, THIN_ROW, Class::Small),
        };
        self.row = if towards_other { self.row + 1 } else { 0 };
        if self.row == row_max {
            (self.class, self.row) = (other, 0);
        }
    }

    fn note_stream(&mut self, len: usize) {
        let fast = self.class == Class::Large && len >= LARGE_BYTES / 2;
        self.stream = match self.stream {
            // Counts down after no pipe could be had.
            pause if pause > STREAM_ROW => pause - 1,
            _ if !fast => 0,
            row => row + 1,
        };
        if fast && self.stream == STREAM_ROW {
            self.splice = Some(When::NextTurn);
        }
    }

    pub(super) fn held_max(&self, pool: &Pool) -> usize {
        let (left, most) = match self.class_now(pool) {
            Class::Small => (pool.surplus(), SMALL_HELD_MAX),
            Class::Large | Class::Datagram => (pool.unused(Class::Large), LARGE_HELD_MAX),
        };
        (left / FREE_SHARE).clamp(1, most)
    }

    /// Whether the next receive takes a block so scarce that the sink must first be seen to take
    /// more.
    pub(super) fn is_sparing(&self, pool: &Pool) -> bool {
        pool.is_scarce() && self.class_now(pool) == Class::Small
    }

    /// How to receive next. A receive in many small blocks brings in `bytes_max` at most; `capped`:
    /// the kernel can be told so.
    pub(super) fn intake(&self, pool: &Pool, capped: bool, bytes_max: u32) -> Intake {
        let (class, wait_first) = (self.class_now(pool), !self.nonempty);
        if class == Class::Small && pool.is_scarce() {
            // What is posted for others cannot be taken back, and is better than nothing.
            return match pool.has_reserve() {
                true => Intake::Last { wait_first },
                false => Intake::Once { class, wait_first },
            };
        }
        if self.class == Class::Small && capped {
            let blocks_max = self.held_max(pool) as u32;
            return Intake::Many { bytes_max: bytes_max.min(blocks_max * SMALL_BYTES as u32) };
        }
        Intake::Once { class, wait_first }
    }

    /// A stream that finds no large block goes on in small ones.
    fn class_now(&self, pool: &Pool) -> Class {
        match self.class {
            Class::Large if pool.unused(Class::Large) > 0 => Class::Large,
            _ => Class::Small,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::pool::Buf;

    fn take(pool: &mut Pool, class: Class, count: usize) -> Vec<Buf> {
        (0..count).map(|_| pool.take(class).expect("there are as many")).collect()
    }

    #[test]
    fn the_more_is_held_the_less_a_flow_may_hold() {
        let mut pool = Pool::new(4_096, 256);
        let flow = Pace::new();
        let mut all = Vec::new();
        for (held, most) in [(0, 16), (1_900, 16), (1_984, 8), (2_032, 2), (2_048, 1), (4_096, 1)] {
            let more = held - all.len();
            all.extend(take(&mut pool, Class::Small, more));
            assert_eq!(flow.held_max(&pool), most, "{held} are held");
        }
        let stream = Pace { class: Class::Large, ..Pace::new() };
        for (held, most) in [(0, 4), (232, 3), (248, 1)] {
            let more = held + 4_096 - all.len();
            all.extend(take(&mut pool, Class::Large, more));
            assert_eq!(stream.held_max(&pool), most, "{held} large ones are held");
        }
        all.into_iter().for_each(|buf| pool.give_back(buf));
    }

    #[test]
    fn what_comes_in_unasked_shrinks_with_what_may_be_held() {
        let mut pool = Pool::new(4_096, 0);
        let flow = Pace::new();
        let many = |blocks: u32| Intake::Many { bytes_max: blocks * SMALL_BYTES as u32 };
        assert_eq!(flow.intake(&pool, true, MANY_BYTES_MAX), many(16));
        assert_eq!(flow.intake(&pool, true, 5), Intake::Many { bytes_max: 5 });
        let held = take(&mut pool, Class::Small, 2_016);
        assert_eq!(flow.intake(&pool, true, MANY_BYTES_MAX), many(4));
        held.into_iter().for_each(|buf| pool.give_back(buf));
    }

    #[test]
    fn scarce_blocks_come_from_the_reserve_one_at_a_time() {
        let mut pool = Pool::new(64, 4);
        let flow = Pace::new();
        let stream = Pace { class: Class::Large, ..Pace::new() };
        assert!(!flow.is_sparing(&pool));
        let mut held = take(&mut pool, Class::Small, 32);
        let last = Intake::Last { wait_first: true };
        assert!(flow.is_sparing(&pool) && !stream.is_sparing(&pool));
        assert_eq!(flow.intake(&pool, true, MANY_BYTES_MAX), last);
        let large = Intake::Once { class: Class::Large, wait_first: true };
        assert_eq!(stream.intake(&pool, true, MANY_BYTES_MAX), large);
        held.extend(take(&mut pool, Class::Large, 4));
        assert!(stream.is_sparing(&pool));
        assert_eq!(stream.intake(&pool, true, MANY_BYTES_MAX), last);
        // Only blocks that may be posted for others are left.
        held.extend(take(&mut pool, Class::Small, 32));
        let any = Intake::Once { class: Class::Small, wait_first: true };
        assert_eq!(flow.intake(&pool, true, MANY_BYTES_MAX), any);
        held.into_iter().for_each(|buf| pool.give_back(buf));
    }
}
