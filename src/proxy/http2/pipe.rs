//! The two directions of a connection as `h2` wants them: something to read from and to write to, which never blocks
//! and has no socket. Owns the bytes that `h2` has not taken yet, and those it has written in this call; what is read
//! and sent, and when, is the connection's.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What `h2` reads from and writes to; the other end is a [`Mouth`].
#[derive(Debug)]
pub struct Pipe(Rc<RefCell<Queues>>);

/// The end of a pipe that the owner of the connection holds.
#[derive(Debug)]
pub struct Mouth(Rc<RefCell<Queues>>);

#[derive(Debug, Default)]
struct Queues {
    incoming: Vec<u8>,
    /// How much of it has been read.
    read: usize,
    has_ended: bool,
    outgoing: Vec<u8>,
    /// How long `outgoing` may become.
    outgoing_max: usize,
}

/// A new pipe.
pub fn pipe() -> (Pipe, Mouth) {
    let queues = Rc::<RefCell<Queues>>::default();
    (Pipe(Rc::clone(&queues)), Mouth(queues))
}

impl Mouth {
    /// These have come.
    pub fn push(&self, bytes: &[u8]) {
        self.0.borrow_mut().incoming.extend_from_slice(bytes);
    }

    /// No more will come.
    pub fn end(&self) {
        self.0.borrow_mut().has_ended = true;
    }

    /// Bytes that have come and have not been read.
    pub fn unread(&self) -> usize {
        let queues = self.0.borrow();
        queues.incoming.len() - queues.read
    }

    /// Takes up to `most` bytes of what is written until [`Mouth::take`], into memory that is lent.
    pub fn lend(&self, memory: Vec<u8>, most: usize) {
        debug_assert!(memory.is_empty(), "what was written is taken");
        let mut queues = self.0.borrow_mut();
        (queues.outgoing, queues.outgoing_max) = (memory, most);
    }

    /// What has been written since.
    pub fn take(&self) -> Vec<u8> {
        let mut queues = self.0.borrow_mut();
        queues.outgoing_max = 0;
        std::mem::take(&mut queues.outgoing)
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let queues = &mut *self.0.borrow_mut();
        let unread = &queues.incoming[queues.read..];
        if unread.is_empty() {
            // An idle connection holds no memory for what may come.
            (queues.incoming, queues.read) = (Vec::new(), 0);
            return if queues.has_ended { Poll::Ready(Ok(())) } else { Poll::Pending };
        }
        let count = unread.len().min(into.remaining());
        into.put_slice(&unread[..count]);
        queues.read += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let queues = &mut *self.0.borrow_mut();
        let count = bytes.len().min(queues.outgoing_max.saturating_sub(queues.outgoing.len()));
        if count == 0 && !bytes.is_empty() {
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
    use std::task::Waker;

    use super::*;

    #[test]
    fn what_is_pushed_is_read_and_what_is_written_is_taken_up_to_the_limit() {
        let (mut pipe, mouth) = pipe();
        let cx = &mut Context::from_waker(Waker::noop());
        let mut memory = [0; 4];
        let mut into = ReadBuf::new(&mut memory);
        assert!(Pin::new(&mut pipe).poll_read(cx, &mut into).is_pending());
        mouth.push(b"hello");
        assert!(Pin::new(&mut pipe).poll_read(cx, &mut into).is_ready());
        assert_eq!((into.filled(), mouth.unread()), (&b"hell"[..], 1));
        into.clear();
        mouth.end();
        assert!(Pin::new(&mut pipe).poll_read(cx, &mut into).is_ready());
        assert_eq!(into.filled(), b"o");
        into.clear();
        assert!(Pin::new(&mut pipe).poll_read(cx, &mut into).is_ready());
        assert!(into.filled().is_empty(), "the end");

        assert!(Pin::new(&mut pipe).poll_write(cx, b"a").is_pending(), "nothing was lent");
        mouth.lend(Vec::new(), 3);
        let written = Pin::new(&mut pipe).poll_write(cx, b"abcd");
        assert!(matches!(written, Poll::Ready(Ok(3))), "{written:?}");
        assert!(Pin::new(&mut pipe).poll_write(cx, b"d").is_pending());
        assert_eq!(mouth.take(), b"abc");
    }
}
