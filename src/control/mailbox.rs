//! The send queue of one control connection, between those that produce messages (the conversation and
//! the hub) and the task that writes them. Owns the hand-over; lives on the control core's thread only.

use std::cell::{Cell, RefCell};

use tokio::sync::Notify;

use super::api::{Outbox, Reply};
use super::frame::MESSAGE_BYTES_MAX;

/// Above this, a peer's further requests wait until it has read the answers queued for it.
const CROWDED_BYTES: usize = 2 * MESSAGE_BYTES_MAX;

/// One connection's outgoing messages.
#[derive(Default)]
pub struct Mailbox {
    outbox: RefCell<Outbox>,
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

    /// For the writer: waits for the next bytes to write; `None` at the end.
    pub async fn next(&self) -> Option<Vec<u8>> {
        loop {
            if self.broken().is_some() {
                return None;
            }
            if self.held.get() {
                self.filled.notified().await;
                continue;
            }
            let waiting = self.outbox.borrow_mut().take();
            if !waiting.is_empty() {
                self.drained.notify_one();
                return Some(waiting);
            }
            if self.finished.get() {
                return None;
            }
            self.filled.notified().await;
        }
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
}
