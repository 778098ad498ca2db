//! What is queued for one peer until it reads. Owns the bound on that.

use super::{OUTBOX_BYTES_MAX, Reply};

/// One connection's writing side: what is queued until the peer reads.
#[derive(Default)]
pub struct Outbox {
    waiting: Vec<u8>,
}

/// More than [`OUTBOX_BYTES_MAX`] would be queued: the peer does not read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overflow;

impl Outbox {
    /// With these messages in it.
    pub fn with(waiting: Vec<u8>) -> Outbox {
        Outbox { waiting }
    }

    /// What is queued.
    pub fn waiting(&self) -> &[u8] {
        &self.waiting
    }

    /// Appends a message as one line.
    ///
    /// # Errors
    /// [`Overflow`] if the message does not fit; it is not queued then.
    pub fn push(&mut self, reply: &Reply) -> Result<(), Overflow> {
        let before = self.waiting.len();
        serde_json::to_writer(&mut self.waiting, &reply.message())
            .expect("plain fields always have a JSON form, and memory takes every write");
        self.waiting.push(b'\n');
        if self.waiting.len() > OUTBOX_BYTES_MAX {
            self.waiting.truncate(before);
            return Err(Overflow);
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Bytes queued.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Takes everything queued, to be written now.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.waiting)
    }
}
