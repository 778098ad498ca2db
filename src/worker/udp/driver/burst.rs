//! How many receives a socket gets in one turn while empty datagrams arrive at it. Owns one number
//! for each socket.
//!
//! The kernel ends a multishot receive at an empty datagram, and a turn posts one receive: a flood
//! of empty datagrams would take a whole turn for each, and everybody behind it would wait. So a
//! socket where one has ended a receive gets extra receives of what is pending, ahead of the next
//! multishot one; their number doubles each time, until they find the queue empty.

/// Extra receives in one turn, at most: fewer than the completions that a turn reaps.
const RECEIVES_MAX: u8 = 64;
const _: () = assert!((RECEIVES_MAX as usize) < crate::ring::REAP_MAX);

#[derive(Clone, Copy, Default)]
pub struct Burst(u8);

impl Burst {
    /// An empty datagram has ended a receive.
    pub fn grow(&mut self) {
        self.0 = (self.0 * 2).clamp(1, RECEIVES_MAX);
    }

    /// A receive has found the queue empty.
    pub fn reset(&mut self) {
        self.0 = 0;
    }

    /// How many receives to post ahead of the multishot one.
    pub fn extra(self) -> usize {
        usize::from(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many turns it takes to receive this number of empty datagrams, all of them queued
    /// already.
    fn turns(empty: usize) -> usize {
        let (mut burst, mut left, mut turns) = (Burst::default(), empty, 0);
        while left > 0 {
            turns += 1;
            let receives = burst.extra() + 1;
            if left < receives {
                burst.reset();
                return turns;
            }
            left -= receives;
            burst.grow();
        }
        turns
    }

    #[test]
    fn a_flood_of_empty_datagrams_takes_few_turns_and_a_single_one_no_extra_ones() {
        assert_eq!([1, 2, 3, 100].map(turns), [1, 2, 2, 8]);
        assert!(turns(100_000) < 100_000 / 60, "{}", turns(100_000));
        let mut burst = Burst::default();
        burst.grow();
        assert_eq!(burst.extra(), 1);
        burst.reset();
        assert_eq!(burst.extra(), 0);
    }
}
