//! The two ends of an HTTP/2 connection in memory: bytes that came and bytes that are to go. Owns these queues and
//! their limits; knows no socket and no frame.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that may wait for the socket. Beyond it nothing more is written.
pub const OUTGOING_BYTES_MAX: usize = 64 << 10;
/// Bytes that may wait to be read. Beyond it nothing more is received: the server sends and does not
/// take what it is answered.
const INCOMING_BYTES_MAX: usize = 1 << 20;

/// Both ends of the queues: one is h2's, the other the driver's.
#[derive(Clone, Debug, Default)]
pub struct Pipe {
    queues: Rc<RefCell<Queues>>,
}

#[derive(Debug, Default)]
struct Queues {
    incoming: BytesMut,
    outgoing: BytesMut,
    /// Something found no room in `outgoing`.
    is_blocked: bool,
}

impl Pipe {
    /// Adds bytes that came.
    pub fn feed(&self, bytes: &[u8]) {
        self.queues.borrow_mut().incoming.extend_from_slice(bytes);
    }

    /// Whether so much waits to be read that no more should be received.
    pub fn is_full(&self) -> bool {
        self.queues.borrow().incoming.len() >= INCOMING_BYTES_MAX
    }

    pub fn has_outgoing(&self) -> bool {
        !self.queues.borrow().outgoing.is_empty()
    }

    /// Hands all that is to go to `take`, which may refuse it as a whole. True if somebody waited for the
    /// room.
    ///
    /// # Errors
    /// Those of `take`; then it is still to go.
    pub fn hand_over<E>(&self, take: impl FnOnce(&[u8]) -> Result<(), E>) -> Result<bool, E> {
        let mut queues = self.queues.borrow_mut();
        take(&queues.outgoing)?;
        queues.outgoing.clear();
        Ok(std::mem::take(&mut queues.is_blocked))
    }
}

/// Who is waiting is not kept: it is polled whenever its flag is set, which the driver's end sees to.
impl AsyncRead for Pipe {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let incoming = &mut self.queues.borrow_mut().incoming;
        if incoming.is_empty() {
            return Poll::Pending;
        }
        let count = incoming.len().min(into.remaining());
        into.put_slice(&incoming[..count]);
        incoming.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut queues = self.queues.borrow_mut();
        let room = OUTGOING_BYTES_MAX.saturating_sub(queues.outgoing.len());
        let count = room.min(bytes.len());
        if count == 0 && !bytes.is_empty() {
            queues.is_blocked = true;
            return Poll::Pending;
        }
        queues.outgoing.extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn write(pipe: &mut Pipe, bytes: &[u8]) -> Poll<usize> {
        let mut context = Context::from_waker(Waker::noop());
        Pin::new(pipe).poll_write(&mut context, bytes).map(Result::unwrap)
    }

    #[test]
    fn what_came_is_read_in_order_and_once() {
        let mut pipe = Pipe::default();
        pipe.feed(b"one");
        pipe.feed(b"two");
        let mut context = Context::from_waker(Waker::noop());
        let mut read = |room: usize| {
            let mut bytes = vec![0; room];
            let mut into = ReadBuf::new(&mut bytes);
            let ready = Pin::new(&mut pipe).poll_read(&mut context, &mut into).is_ready();
            ready.then(|| into.filled().to_vec())
        };
        assert_eq!(read(4), Some(b"onet".to_vec()));
        assert_eq!(read(4), Some(b"wo".to_vec()));
        assert_eq!(read(4), None, "an end that has not come is not told");
    }

    #[test]
    fn what_is_to_go_is_bounded_and_the_writer_goes_on_once_it_went() {
        let mut pipe = Pipe::default();
        assert_eq!(write(&mut pipe, &vec![1; OUTGOING_BYTES_MAX - 1]), Poll::Ready(65_535));
        assert_eq!(write(&mut pipe, &[2, 2]), Poll::Ready(1));
        assert_eq!(pipe.hand_over(|_| Err::<(), _>("no block")), Err("no block"));
        assert_eq!(write(&mut pipe, &[3]), Poll::Pending, "what was refused is still there");
        let mut gone = Vec::new();
        let mut take = |bytes: &[u8]| {
            gone.extend_from_slice(bytes);
            Ok::<_, ()>(())
        };
        assert_eq!(pipe.hand_over(&mut take), Ok(true), "somebody waited");
        assert_eq!(pipe.hand_over(&mut take), Ok(false));
        assert_eq!((gone.len(), gone.last()), (OUTGOING_BYTES_MAX, Some(&2)));
        assert!(!pipe.has_outgoing());
    }

    #[test]
    fn too_much_to_read_is_known() {
        let pipe = Pipe::default();
        pipe.feed(&vec![0; INCOMING_BYTES_MAX - 1]);
        assert!(!pipe.is_full());
        pipe.feed(&[0]);
        assert!(pipe.is_full());
    }
}
