//! How much is taken from a socket in one turn where empty datagrams come. Owns one number for each socket.
//!
//! The kernel ends a receive at an empty datagram, and one receive is posted in a turn: who sends nothing
//! but empty ones would have a whole turn for each of them, and everybody else behind them would wait.
//! So where one ended a receive, a few more receives go in front of the next that only take what waits,
//! and twice as many each time until they find the queue empty.

/// Receives that one turn posts at most besides the one that stays: a part of what it looks at.
const RECEIVES_MAX: u8 = 64;
const _: () = assert!((RECEIVES_MAX as usize) < crate::ring::REAP_MAX);

#[derive(Clone, Copy, Default)]
pub struct Haste(u8);

impl Haste {
    pub fn ended_by_an_empty_one(&mut self) {
        self.0 = (self.0 * 2).clamp(1, RECEIVES_MAX);
    }

    /// A receive found nothing that waits.
    pub fn took_all(&mut self) {
        self.0 = 0;
    }

    /// How many receives to post in front of the one that stays.
    pub fn receives(self) -> usize {
        usize::from(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many turns it takes until so many empty datagrams are taken that all wait already.
    fn turns(empty: usize) -> usize {
        let (mut haste, mut left, mut turns) = (Haste::default(), empty, 0);
        while left > 0 {
            turns += 1;
            let receives = haste.receives() + 1;
            if left < receives {
                haste.took_all();
                return turns;
            }
            left -= receives;
            haste.ended_by_an_empty_one();
        }
        turns
    }

    #[test]
    fn a_flood_of_empty_datagrams_takes_few_turns_and_a_single_one_no_more_than_it_needs() {
        assert_eq!([1, 2, 3, 100].map(turns), [1, 2, 2, 8]);
        assert!(turns(100_000) < 100_000 / 60, "{}", turns(100_000));
        let mut haste = Haste::default();
        haste.ended_by_an_empty_one();
        assert_eq!(haste.receives(), 1);
        haste.took_all();
        assert_eq!(haste.receives(), 0);
    }
}
