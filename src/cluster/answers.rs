//! How the users of one service are answered: how long they wait for the first byte, how many requests there are
//! and how many fail, and who is turned away. Owns these counts, which the workers write together.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::base::buckets::{BUCKETS, bucket_of};

/// Workers that share a stripe do so for want of more: with up to this many, nobody writes where another does.
const STRIPES: usize = 4;

/// What one worker in [`STRIPES`] counts, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe {
    first_byte: [AtomicU64; BUCKETS],
    requests: AtomicU64,
    errors: AtomicU64,
    refused: AtomicU64,
}

/// The counts of one service, 1 KiB.
#[derive(Debug, Default)]
pub struct Answers([Stripe; STRIPES]);

const _: () = assert!(size_of::<Answers>() == 1024);

/// The sums over all workers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Answered {
    /// By bucket.
    pub first_byte: [u64; BUCKETS],
    pub requests: u64,
    pub errors: u64,
    pub refused: u64,
}

impl Answers {
    fn stripe(&self, worker: u8) -> &Stripe {
        &self.0[usize::from(worker) % STRIPES]
    }

    /// A user has had the first byte of an answer after this time.
    #[inline]
    pub fn first_byte(&self, worker: u8, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.stripe(worker).first_byte[bucket_of(us)].fetch_add(1, Ordering::Relaxed);
    }

    /// A request has ended.
    #[inline]
    pub fn request(&self, worker: u8, failed: bool) {
        let stripe = self.stripe(worker);
        stripe.requests.fetch_add(1, Ordering::Relaxed);
        if failed {
            stripe.errors.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Users, or datagrams that would have begun a session, were turned away for another reason than a barrier of
    /// the service.
    pub fn refuse(&self, worker: u8, count: u64) {
        self.stripe(worker).refused.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds what another process has counted.
    pub fn add(&self, more: &Answered) {
        let stripe = self.stripe(0);
        let both = stripe.first_byte.iter().zip(more.first_byte);
        for (own, more) in both {
            own.fetch_add(more, Ordering::Relaxed);
        }
        stripe.requests.fetch_add(more.requests, Ordering::Relaxed);
        stripe.errors.fetch_add(more.errors, Ordering::Relaxed);
        stripe.refused.fetch_add(more.refused, Ordering::Relaxed);
    }

    pub fn sum(&self) -> Answered {
        let mut sum = Answered::default();
        for stripe in &self.0 {
            let own = stripe.first_byte.iter().map(|it| it.load(Ordering::Relaxed));
            sum.first_byte.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
            sum.requests += stripe.requests.load(Ordering::Relaxed);
            sum.errors += stripe.errors.load(Ordering::Relaxed);
            sum.refused += stripe.refused.load(Ordering::Relaxed);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_any_worker_counts_is_in_the_sum() {
        let answers = Answers::default();
        for worker in [0, 1, 7, 255] {
            answers.first_byte(worker, Duration::from_micros(60));
            answers.request(worker, worker == 7);
            answers.refuse(worker, 2);
        }
        answers.first_byte(0, Duration::from_secs(9999));
        let sum = answers.sum();
        assert_eq!((sum.first_byte[1], sum.first_byte[BUCKETS - 1]), (4, 1));
        assert_eq!((sum.requests, sum.errors, sum.refused), (4, 1, 8));
    }
}
