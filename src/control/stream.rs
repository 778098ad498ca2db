//! The sockets of the control door. Owns how they are waited for: tokio-uring's ring says when one can be
//! read or written, and only then is it, without blocking. Nothing that carries data is ever in flight on
//! the ring, so whatever a peer has sent is in its socket until somebody takes it (see the module text of
//! [`control`](super)).
//!
//! A wait that is dropped stays in the kernel until its socket is shut down, and keeps that open.

use std::io::{self, ErrorKind, Read, Write};
use std::marker::PhantomData;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use io_uring_06::{cqueue, opcode, types};
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

/// `POLLIN` and `POLLOUT` (poll(2)); the kernel adds errors and the end of the connection to either.
const READABLE: u32 = libc::POLLIN as u32;
const WRITABLE: u32 = libc::POLLOUT as u32;

/// A listener whose connections are accepted one by one.
pub struct Listener(Rc<TcpListener>);

/// A connection; a clone is the same connection, which is closed with the last of them.
#[derive(Clone)]
pub struct Stream(Rc<TcpStream>);

impl Listener {
    /// # Errors
    /// When the kernel does not let it be non-blocking.
    pub fn new(listener: TcpListener) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        Ok(Listener(Rc::new(listener)))
    }

    /// The next connection.
    ///
    /// # Errors
    /// Those of accept(2), above all for want of descriptors.
    pub async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        loop {
            ready(&self.0, READABLE).await?;
            if let Some((stream, peer)) = at_once(|| self.0.accept())? {
                return Ok((Stream::new(stream)?, peer));
            }
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Stream {
    /// # Errors
    /// When the kernel does not let it be non-blocking.
    pub fn new(stream: TcpStream) -> io::Result<Stream> {
        stream.set_nonblocking(true)?;
        Ok(Stream(Rc::new(stream)))
    }

    /// Waits for bytes and takes what there is, as far as it fits. Zero at the connection's end.
    ///
    /// # Errors
    /// What broke the connection.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            ready(&self.0, READABLE).await?;
            if let Some(count) = at_once(|| (&*self.0).read(into))? {
                return Ok(count);
            }
        }
    }

    /// Writes as much as the connection takes at once; `None`: it takes nothing before it is
    /// [`Stream::writable`].
    ///
    /// # Errors
    /// What broke the connection.
    pub fn write(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        at_once(|| (&*self.0).write(bytes))
    }

    /// Waits until the connection takes more.
    ///
    /// # Errors
    /// What broke the connection.
    pub async fn writable(&self) -> io::Result<()> {
        ready(&self.0, WRITABLE).await
    }

    /// Writes all of it; waits only if the connection takes no more.
    ///
    /// # Errors
    /// What broke the connection.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.write(bytes)? {
                Some(count) => bytes = &bytes[count..],
                None => self.writable().await?,
            }
        }
        Ok(())
    }

    /// Ends one direction or both, and what is waited for there.
    ///
    /// # Errors
    /// When the connection is already gone.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.0.shutdown(how)
    }
}

/// Waits until a socket can be read or written, or has ended.
async fn ready<S: AsRawFd + 'static>(socket: &Rc<S>, events: u32) -> io::Result<()> {
    let poll = opcode::PollAdd::new(types::Fd((**socket).as_raw_fd()), events).build();
    // The operation holds the socket, so its descriptor is nobody else's before it is over.
    UnsubmittedOneshot::new(Rc::clone(socket), Over(PhantomData), poll).submit().await
}

/// A call that does not block; `None`: it would have.
fn at_once<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<Option<T>> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            outcome => return outcome.map(Some),
        }
    }
}

/// What becomes of the completion of a wait.
struct Over<S>(PhantomData<Rc<S>>);

impl<S> OneshotOutputTransform for Over<S> {
    type Output = io::Result<()>;
    type StoredData = Rc<S>;

    fn transform_oneshot_output(self, _: Rc<S>, over: cqueue::Entry) -> io::Result<()> {
        match over.result() {
            0.. => Ok(()),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        }
    }
}

#[cfg(test)]
impl Stream {
    /// The same connection under another descriptor, as another process would have it.
    pub fn duplicate(&self) -> io::Result<std::os::fd::OwnedFd> {
        self.0.try_clone().map(Into::into)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::task::Poll;
    use std::time::Duration;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (far, listener.accept().unwrap().0)
    }

    async fn in_time<T>(waits: impl Future<Output = io::Result<T>>) -> T {
        let waits = tokio::time::timeout(Duration::from_secs(20), waits);
        waits.await.expect("nothing else has taken it").unwrap()
    }

    /// Begins something that has to wait.
    async fn begun(waits: impl Future) {
        let mut waits = pin!(waits);
        poll_fn(|cx| {
            assert!(waits.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
    }

    #[test]
    fn what_comes_while_it_is_waited_for_stays_in_the_socket() {
        tokio_uring::start(async {
            let (mut far, near) = pair();
            let twin = Stream::new(near.try_clone().unwrap()).unwrap();
            let near = Stream::new(near).unwrap();
            begun(near.read(&mut [0; 64])).await;
            far.write_all(b"register").unwrap();
            let mut bytes = [0; 64];
            assert_eq!(in_time(twin.read(&mut bytes)).await, 8);
            assert_eq!(&bytes[..8], b"register");
        });
    }

    #[test]
    fn who_connects_while_it_is_waited_for_stays_in_the_queue() {
        tokio_uring::start(async {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let at = listener.local_addr().unwrap();
            let twin = Listener::new(listener.try_clone().unwrap()).unwrap();
            begun(Listener::new(listener).unwrap().accept()).await;
            let far = TcpStream::connect(at).unwrap();
            let (_near, peer) = in_time(twin.accept()).await;
            assert_eq!(peer, far.local_addr().unwrap());
        });
    }

    #[test]
    fn more_than_the_kernel_takes_at_once_is_written_whole_and_a_shutdown_ends_the_wait() {
        const BYTES: usize = 16 << 20;
        tokio_uring::start(async {
            let (mut far, near) = pair();
            let near = Stream::new(near).unwrap();
            let reader = std::thread::spawn(move || {
                let mut read = Vec::new();
                far.read_to_end(&mut read).unwrap();
                read.len()
            });
            near.write_all(&vec![7; BYTES]).await.unwrap();
            let waiting = tokio_uring::spawn({
                let near = near.clone();
                async move { near.read(&mut [0; 1]).await }
            });
            tokio::task::yield_now().await;
            near.shutdown(Shutdown::Both).unwrap();
            assert_eq!(waiting.await.unwrap().unwrap(), 0);
            assert_eq!(reader.join().unwrap(), BYTES);
        });
    }
}
