//! Hand-off queues: datagrams that one worker passes to the worker that runs their session. The
//! kernel distributes flows over the sockets of the `SO_REUSEPORT` group at the door; when the
//! group changes, some flows arrive at another worker. Owns the queues, one for each receiving
//! worker, and their bounds.
//!
//! A hand-off copies the datagram twice and takes a lock; while the group stays as it was opened,
//! there are none. The queues allocate at the start and never later.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;

use super::sessions::Origin;
use crate::ring::pool::{Buf, Pool};

/// Bytes queued for one worker, at most: sixteen of the longest datagrams, or a thousand of 1 KiB.
const BYTES_MAX: usize = 1 << 20;
/// Payloads queued for one worker, at most. Each is a datagram, or several that the kernel
/// coalesced.
const PAYLOADS_MAX: usize = 4096;

/// What travels with a payload to the worker that takes it over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Handoff {
    /// A door has the same place at every worker.
    pub origin: Origin,
    /// The length of each datagram but the last if several were coalesced, otherwise of the
    /// payload; in bytes.
    pub segment_size: usize,
}

struct Pending {
    handoffs: VecDeque<(Handoff, usize)>,
    bytes: VecDeque<u8>,
}

struct Queue {
    /// Whether anything is queued; readable without the lock.
    filled: AtomicBool,
    pending: Mutex<Pending>,
    wake: Arc<EventFd>,
}

/// The queues of all workers, by worker.
pub struct HandoffQueues(Box<[Queue]>);

impl HandoffQueues {
    /// One queue for each of `wakes`, which wakes the worker that reads it.
    pub fn new(wakes: impl Iterator<Item = Arc<EventFd>>) -> HandoffQueues {
        let queue = |wake| {
            let handoffs = VecDeque::with_capacity(PAYLOADS_MAX);
            // The kernel provides each page only when it is first written to.
            let bytes = VecDeque::with_capacity(BYTES_MAX);
            let pending = Mutex::new(Pending { handoffs, bytes });
            Queue { filled: AtomicBool::new(false), pending, wake }
        };
        HandoffQueues(wakes.map(queue).collect())
    }

    /// Queues a payload for a worker. False if its queue is full, or there is no such worker.
    pub fn push(&self, worker: u8, handoff: Handoff, payload: &[u8]) -> bool {
        let Some(queue) = self.0.get(usize::from(worker)) else { return false };
        let mut pending = queue.lock();
        let room = BYTES_MAX - pending.bytes.len();
        if payload.len() > room || pending.handoffs.len() == PAYLOADS_MAX {
            return false;
        }
        let first = pending.handoffs.is_empty();
        pending.handoffs.push_back((handoff, payload.len()));
        pending.bytes.extend(payload);
        queue.filled.store(true, Ordering::Release);
        drop(pending);
        if first {
            // Fails only if so many wake-ups are pending that the worker is sure to look.
            let _ = queue.wake.write(1);
        }
        true
    }

    /// How many payloads are queued for this worker.
    pub fn pending(&self, worker: u8) -> usize {
        match self.0.get(usize::from(worker)) {
            Some(queue) if queue.filled.load(Ordering::Acquire) => queue.lock().handoffs.len(),
            _ => 0,
        }
    }

    /// Moves the oldest payload queued for this worker into `buf`, an empty block of the datagram
    /// class. `None` if there is none.
    pub fn pop(&self, worker: u8, buf: &mut Buf, pool: &mut Pool) -> Option<Handoff> {
        let queue = self.0.get(usize::from(worker))?;
        let mut pending = queue.lock();
        let (handoff, len) = pending.handoffs.pop_front()?;
        let (front, back) = pending.bytes.as_slices();
        let in_front = len.min(front.len());
        pool.append(buf, &front[..in_front]);
        pool.append(buf, &back[..len - in_front]);
        pending.bytes.drain(..len);
        if pending.handoffs.is_empty() {
            queue.filled.store(false, Ordering::Release);
        }
        Some(handoff)
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::cluster::ServiceId;
    use crate::ring::pool::Class;
    use crate::worker::udp::sessions::DoorRef;
    use nix::sys::eventfd::EfdFlags;

    fn queues(workers: usize) -> (HandoffQueues, Vec<Arc<EventFd>>) {
        let wake = || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        let wakes: Vec<_> = (0..workers).map(|_| Arc::new(wake())).collect();
        (HandoffQueues::new(wakes.clone().into_iter()), wakes)
    }

    fn handoff(port: u16) -> Handoff {
        let client = SocketAddr::from(([198, 51, 100, 1], port));
        let local = SocketAddr::from(([192, 0, 2, 1], 8082));
        let door = DoorRef { place: 2, service: ServiceId(7) };
        Handoff { origin: Origin { client, local, door }, segment_size: 1200 }
    }

    /// The oldest payload, with its hand-off.
    fn take(queues: &HandoffQueues, worker: u8) -> Option<(Handoff, Vec<u8>)> {
        let mut pool = Pool::with_datagrams(1, 1, 1);
        let mut buf = pool.take(Class::Datagram).unwrap();
        let handoff = queues.pop(worker, &mut buf, &mut pool);
        let bytes = pool.bytes(&buf).to_vec();
        pool.give_back(buf);
        handoff.map(|handoff| (handoff, bytes))
    }

    #[test]
    fn payloads_arrive_in_order_at_the_worker_they_are_for() {
        let (queues, _) = queues(3);
        for number in 0..100u16 {
            assert!(queues.push((number % 2) as u8, handoff(number), &vec![number as u8; 999]));
        }
        assert_eq!([0, 1, 2].map(|worker| queues.pending(worker)), [50, 50, 0]);
        for number in 0..100 {
            let taken = take(&queues, (number % 2) as u8);
            assert_eq!(taken, Some((handoff(number), vec![number as u8; 999])));
        }
        assert_eq!((take(&queues, 0), queues.pending(0)), (None, 0));
    }

    #[test]
    fn a_queue_is_bounded_and_takes_more_after_it_was_full() {
        let (queues, _) = queues(1);
        let fill = |len: usize| -> usize {
            (0..).take_while(|number| queues.push(0, handoff(*number), &vec![1; len])).count()
        };
        assert_eq!(fill(65_507), BYTES_MAX / 65_507);
        assert_eq!(take(&queues, 0).unwrap().1.len(), 65_507);
        assert_eq!(fill(65_507), 1);
        while take(&queues, 0).is_some() {}
        assert_eq!(fill(0), PAYLOADS_MAX);
        assert!(!queues.push(1, handoff(1), b"nobody"));
    }

    #[test]
    fn payloads_stay_whole_where_the_ring_buffer_wraps() {
        let (queues, _) = queues(1);
        for number in 0..5_000usize {
            let payload = |number: usize| vec![number as u8; number * 31 % 3_000];
            assert!(queues.push(0, handoff(number as u16), &payload(number)));
            if number >= 300 {
                let (taken, bytes) = take(&queues, 0).unwrap();
                assert_eq!((taken, bytes), (handoff((number - 300) as u16), payload(number - 300)));
            }
        }
    }

    #[test]
    fn a_worker_is_woken_for_the_first_payload_in_its_queue() {
        let (queues, wakes) = queues(2);
        for _ in 0..3 {
            queues.push(1, handoff(1), b"x");
        }
        assert_eq!(wakes[1].read(), Ok(1));
        assert!(wakes[0].read().is_err());
        while take(&queues, 1).is_some() {}
        queues.push(1, handoff(1), b"y");
        assert_eq!(wakes[1].read(), Ok(1));
    }
}
