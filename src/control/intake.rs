//! What the peer of a control connection has sent and its conversation has yet to hear, between the task that
//! reads and the conversation. Owns the hand-over and its bound; lives on the control core's thread only.
//!
//! Bytes that have left the socket are here and nowhere else, so whoever looks between two turns of the
//! runtime sees all of them (see `legacy`).

use std::cell::{Cell, RefCell};

use tokio::sync::Notify;

/// One connection's incoming bytes.
#[derive(Default)]
pub struct Intake {
    bytes: RefCell<Vec<u8>>,
    /// The peer has closed its side, or the connection has broken.
    ended: Cell<bool>,
    /// Nobody will listen any more.
    deaf: Cell<bool>,
    filled: Notify,
    taken: Notify,
}

impl Intake {
    /// With these bytes already in it.
    pub fn with(bytes: Vec<u8>) -> Intake {
        Intake { bytes: RefCell::new(bytes), ..Intake::default() }
    }

    /// For the reader: waits until what it has put here was taken. False: nobody listens any more.
    pub async fn is_wanted(&self) -> bool {
        while !self.deaf.get() && !self.bytes.borrow().is_empty() {
            self.taken.notified().await;
        }
        !self.deaf.get()
    }

    /// The peer has sent this. Returns whether anybody listens.
    pub fn put(&self, bytes: &[u8]) -> bool {
        if self.deaf.get() {
            return false;
        }
        self.bytes.borrow_mut().extend_from_slice(bytes);
        self.filled.notify_one();
        true
    }

    /// Nothing more will come.
    pub fn end(&self) {
        self.ended.set(true);
        self.filled.notify_one();
    }

    /// For the conversation: waits for bytes; `None` at the end. Whoever gives up waiting has lost nothing.
    pub async fn next(&self) -> Option<Vec<u8>> {
        loop {
            let bytes = std::mem::take(&mut *self.bytes.borrow_mut());
            if !bytes.is_empty() {
                self.taken.notify_one();
                return Some(bytes);
            }
            if self.ended.get() {
                return None;
            }
            self.filled.notified().await;
        }
    }

    /// The conversation is over.
    pub fn close(&self) {
        self.deaf.set(true);
        self.bytes.borrow_mut().clear();
        self.taken.notify_one();
    }

    /// What nobody has taken yet.
    pub fn untaken(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn is_waiting<T>(waits: impl Future<Output = T>) -> bool {
        tokio::time::timeout(Duration::ZERO, waits).await.is_err()
    }

    #[tokio::test]
    async fn what_was_put_in_comes_out_once_and_the_end_behind_it() {
        let intake = Intake::default();
        assert!(is_waiting(intake.next()).await);
        assert!(intake.is_wanted().await && intake.put(b"regis") && intake.put(b"ter"));
        intake.end();
        assert!(is_waiting(intake.is_wanted()).await, "its reader is to wait");
        assert_eq!(intake.untaken(), b"register");
        assert_eq!(intake.next().await.as_deref(), Some(&b"register"[..]));
        assert!(intake.is_wanted().await);
        assert_eq!(intake.next().await, None);
    }

    #[tokio::test]
    async fn nobody_waits_for_a_conversation_that_is_over() {
        let intake = Intake::with(b"list".to_vec());
        assert!(is_waiting(intake.is_wanted()).await);
        intake.close();
        assert!(!intake.is_wanted().await && !intake.put(b"more"));
        assert!(intake.untaken().is_empty());
    }
}
