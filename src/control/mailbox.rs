//! The send queue of one control connection, between those that produce messages (the conversation and
//! the hub) and the task that writes them. Owns the hand-over; lives on the control core's thread only.
//!
//! Bytes that the socket has yet to take are here and nowhere else, as those that it has given are in
//! [`intake`](super::intake).

use std::cell::{Cell, RefCell};
use std::io;

use tokio::sync::Notify;

use super::api::{Outbox, Reply};
use super::frame::MESSAGE_BYTES_MAX;

/// Above this, a peer's further requests wait until it has read the answers queued for it.
const CROWDED_BYTES: usize = 2 * MESSAGE_BYTES_MAX;

/// Bytes on their way into the socket, of which it has taken the first `taken`.
#[derive(Default)]
struct Writing {
    bytes: Vec<u8>,
    taken: usize,
}

impl Writing {
    fn left(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }
}

/// One connection's outgoing messages.
#[derive(Default)]
pub struct Mailbox {
    outbox: RefCell<Outbox>,
    /// What is being written; it was queued before everything in `outbox`.
    writing: RefCell<Writing>,
    /// Why the peer was given up, in the words of the log.
    broken: Cell<Option<&'static str>>,
    held: Cell<bool>,
    finished: Cell<bool>,
    filled: Notify,
    drained: Notify,
}

impl Mailbox {
    /// Queues a message. A peer that lets too many pile up is given up.
    pub fn send(&self, reply: &Reply) {
        if self.outbox.borrow_mut().push(reply).is_err() {
            self.give_up("it does not read");
        }
        self.filled.notify_one();
    }

    /// With these bytes already on their way, and those queued behind them.
    pub fn with(writing: Vec<u8>, queued: Vec<u8>) -> Mailbox {
        Mailbox {
            outbox: RefCell::new(Outbox::with(queued)),
            writing: RefCell::new(Writing { bytes: writing, taken: 0 }),
            ..Mailbox::default()
        }
    }

    /// What is on its way, and what is queued behind it.
    pub fn unsent(&self) -> (Vec<u8>, Vec<u8>) {
        (self.writing.borrow().left().to_vec(), self.outbox.borrow().waiting().to_vec())
    }

    /// The connection is no longer of use.
    pub fn give_up(&self, why: &'static str) {
        self.broken.set(self.broken.get().or(Some(why)));
        self.drained.notify_one();
        self.filled.notify_one();
    }

    /// Why the peer was given up, if it was.
    pub fn broken(&self) -> Option<&'static str> {
        self.broken.get()
    }

    /// Holds back everything until [`Mailbox::release`]. Returns whether it was not held already.
    pub fn hold(&self) -> bool {
        !self.held.replace(true)
    }

    /// Lets the writer write what is queued.
    pub fn release(&self) {
        self.held.set(false);
        self.filled.notify_one();
    }

    /// Whether the queue is too long for a further request to be answered yet.
    pub fn is_crowded(&self) -> bool {
        self.outbox.borrow().len() > CROWDED_BYTES
    }

    /// No more messages will come: the writer ends once it has written what is queued.
    pub fn finish(&self) {
        self.finished.set(true);
        self.filled.notify_one();
    }

    /// For the writer: waits until there is something to [`Mailbox::write`]; false at the end.
    pub async fn is_filled(&self) -> bool {
        loop {
            if self.broken().is_some() {
                return false;
            }
            if !self.writing.borrow().left().is_empty() {
                return true;
            }
            if !self.held.get() {
                let bytes = self.outbox.borrow_mut().take();
                if !bytes.is_empty() {
                    self.drained.notify_one();
                    self.writing.replace(Writing { bytes, taken: 0 });
                    return true;
                }
                if self.finished.get() {
                    return false;
                }
            }
            self.filled.notified().await;
        }
    }

    /// Has `write` take as much as it can of what there is, and tells whether it has taken anything.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn write(
        &self,
        write: impl FnOnce(&[u8]) -> io::Result<Option<usize>>,
    ) -> io::Result<bool> {
        let mut writing = self.writing.borrow_mut();
        let taken = write(writing.left())?;
        writing.taken += taken.unwrap_or(0);
        Ok(taken.is_some())
    }

    /// For a writer that takes all that there is at once: waits for it; `None` at the end.
    pub async fn next(&self) -> Option<Vec<u8>> {
        if !self.is_filled().await {
            return None;
        }
        let mut writing = self.writing.borrow_mut();
        let taken = writing.taken;
        Some(std::mem::take(&mut *writing).bytes.split_off(taken))
    }

    /// For the conversation: waits until there is room again, or the peer has been given up.
    pub async fn drained(&self) {
        self.drained.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_never_reads_is_given_up() {
        let mailbox = Mailbox::default();
        let sent = (0..100_000).take_while(|_| {
            mailbox.send(&Reply::AskHello);
            mailbox.broken().is_none()
        });
        assert!(sent.count() > 1000);
        assert!(mailbox.is_crowded());
    }

    #[tokio::test]
    async fn what_a_socket_takes_in_parts_is_neither_lost_nor_written_twice() {
        let (mailbox, mut socket) = (Mailbox::default(), Vec::new());
        mailbox.send(&Reply::AskHello);
        while socket.len() < 10 {
            assert!(mailbox.is_filled().await);
            let took = mailbox.write(|bytes| {
                socket.extend_from_slice(&bytes[..1]);
                Ok(Some(1))
            });
            assert!(took.unwrap() && !mailbox.write(|_| Ok(None)).unwrap());
        }
        mailbox.send(&Reply::Authenticated);
        while socket.last() != Some(&b'}') || !socket.ends_with(b"auth\"}") {
            socket.extend(mailbox.next().await.unwrap());
            socket.pop();
        }
        let expected = "{\"cmd\":\"hello\"}{\"ack\":\"successful\",\"cmd\":\"auth\"}";
        assert_eq!(String::from_utf8(socket).unwrap(), expected);
    }
}
