//! Datagrams that one worker hands to another, because the other one runs their session. The kernel deals
//! flows out among the sockets at the door by their place in the group; when the group changes, a flow
//! turns up elsewhere. Owns what waits between workers, one queue for each receiver, and its bounds.
//!
//! A datagram that takes this way is copied twice and costs a lock; in a group that stays as it was
//! opened, none does. The queues take their memory at the start and none later.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;

use crate::ring::pool::{Buf, Pool};

/// Bytes that may wait for one worker: sixteen of the longest datagrams, or a thousand of 1 KiB.
const BYTES_MAX: usize = 1 << 20;
/// Datagrams that may wait for one worker, or such as came as one.
const DATAGRAMS_MAX: usize = 4096;

/// What the payload's new holder is told about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label {
    pub client: SocketAddr,
    /// Which of our addresses it came to.
    pub local: SocketAddr,
    /// The length of each datagram but the last, when several came as one; else that of the payload.
    pub segment_size: usize,
}

struct Waiting {
    labels: VecDeque<(Label, usize)>,
    bytes: VecDeque<u8>,
}

struct Inbox {
    /// Whether something waits, to be seen without the lock.
    filled: AtomicBool,
    waiting: Mutex<Waiting>,
    wake: Arc<EventFd>,
}

/// The ways between workers.
pub struct Passages(Box<[Inbox]>);

impl Passages {
    /// By worker: what is written to make it look.
    pub fn new(wakes: impl Iterator<Item = Arc<EventFd>>) -> Passages {
        let inbox = |wake| {
            let labels = VecDeque::with_capacity(DATAGRAMS_MAX);
            // The kernel lends a page of it when it is first written to.
            let bytes = VecDeque::with_capacity(BYTES_MAX);
            let waiting = Mutex::new(Waiting { labels, bytes });
            Inbox { filled: AtomicBool::new(false), waiting, wake }
        };
        Passages(wakes.map(inbox).collect())
    }

    /// Hands a payload to a worker. False when too much waits for it, or there is no such worker.
    pub fn send(&self, worker: u8, label: Label, payload: &[u8]) -> bool {
        let Some(inbox) = self.0.get(usize::from(worker)) else { return false };
        let mut waiting = inbox.lock();
        let room = BYTES_MAX - waiting.bytes.len();
        if payload.len() > room || waiting.labels.len() == DATAGRAMS_MAX {
            return false;
        }
        let first = waiting.labels.is_empty();
        waiting.labels.push_back((label, payload.len()));
        waiting.bytes.extend(payload);
        inbox.filled.store(true, Ordering::Release);
        drop(waiting);
        if first {
            // It fails only when so many wake-ups wait already that the worker is sure to look.
            let _ = inbox.wake.write(1);
        }
        true
    }

    /// How many payloads wait for this worker.
    pub fn waiting(&self, worker: u8) -> usize {
        match self.0.get(usize::from(worker)) {
            Some(inbox) if inbox.filled.load(Ordering::Acquire) => inbox.lock().labels.len(),
            _ => 0,
        }
    }

    /// Takes the first payload that waits for this worker into `buf`, an empty block that is large
    /// enough for every datagram.
    pub fn take(&self, worker: u8, buf: &mut Buf, pool: &mut Pool) -> Option<Label> {
        let inbox = self.0.get(usize::from(worker))?;
        let mut waiting = inbox.lock();
        let (label, len) = waiting.labels.pop_front()?;
        let (front, back) = waiting.bytes.as_slices();
        let in_front = len.min(front.len());
        pool.append(buf, &front[..in_front]);
        pool.append(buf, &back[..len - in_front]);
        waiting.bytes.drain(..len);
        if waiting.labels.is_empty() {
            inbox.filled.store(false, Ordering::Release);
        }
        Some(label)
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::pool::Class;
    use nix::sys::eventfd::EfdFlags;

    fn passages(workers: usize) -> (Passages, Vec<Arc<EventFd>>) {
        let wake = || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        let wakes: Vec<_> = (0..workers).map(|_| Arc::new(wake())).collect();
        (Passages::new(wakes.clone().into_iter()), wakes)
    }

    fn label(port: u16) -> Label {
        let client = SocketAddr::from(([198, 51, 100, 1], port));
        Label { client, local: SocketAddr::from(([192, 0, 2, 1], 8082)), segment_size: 1200 }
    }

    /// The first payload that waits, with its label.
    fn take(passages: &Passages, worker: u8) -> Option<(Label, Vec<u8>)> {
        let mut pool = Pool::with_datagrams(1, 1, 1);
        let mut buf = pool.take(Class::Datagram).unwrap();
        let label = passages.take(worker, &mut buf, &mut pool);
        let bytes = pool.bytes(&buf).to_vec();
        pool.give_back(buf);
        label.map(|label| (label, bytes))
    }

    #[test]
    fn payloads_come_in_order_to_the_worker_that_they_are_for() {
        let (passages, _) = passages(3);
        for number in 0..100u16 {
            assert!(passages.send((number % 2) as u8, label(number), &vec![number as u8; 999]));
        }
        assert_eq!([0, 1, 2].map(|worker| passages.waiting(worker)), [50, 50, 0]);
        for number in 0..100 {
            let taken = take(&passages, (number % 2) as u8);
            assert_eq!(taken, Some((label(number), vec![number as u8; 999])));
        }
        assert_eq!((take(&passages, 0), passages.waiting(0)), (None, 0));
    }

    #[test]
    fn what_waits_is_bounded_and_a_queue_that_was_full_takes_more_later() {
        let (passages, _) = passages(1);
        let fill = |len: usize| -> usize {
            (0..).take_while(|number| passages.send(0, label(*number), &vec![1; len])).count()
        };
        assert_eq!(fill(65_507), BYTES_MAX / 65_507);
        assert_eq!(take(&passages, 0).unwrap().1.len(), 65_507);
        assert_eq!(fill(65_507), 1);
        while take(&passages, 0).is_some() {}
        assert_eq!(fill(0), DATAGRAMS_MAX);
        assert!(!passages.send(1, label(1), b"nobody"));
    }

    #[test]
    fn payloads_stay_whole_where_the_queue_begins_anew() {
        let (passages, _) = passages(1);
        for number in 0..5_000usize {
            let payload = |number: usize| vec![number as u8; number * 31 % 3_000];
            assert!(passages.send(0, label(number as u16), &payload(number)));
            if number >= 300 {
                let (taken, bytes) = take(&passages, 0).unwrap();
                assert_eq!((taken, bytes), (label((number - 300) as u16), payload(number - 300)));
            }
        }
    }

    #[test]
    fn a_worker_is_woken_for_the_first_that_waits() {
        let (passages, wakes) = passages(2);
        for _ in 0..3 {
            passages.send(1, label(1), b"x");
        }
        assert_eq!(wakes[1].read(), Ok(1));
        assert!(wakes[0].read().is_err());
        while take(&passages, 1).is_some() {}
        passages.send(1, label(1), b"y");
        assert_eq!(wakes[1].read(), Ok(1));
    }
}
