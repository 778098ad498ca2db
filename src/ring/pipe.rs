//! Pipes through which bytes move between two sockets without entering this process (splice(2)).
//! Owns one worker's pipes and their number; does not decide when to use one.
//!
//! The ring hands its own splice operation to a kernel thread each time, so we make the call
//! directly; both sockets are non-blocking for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::sys::stat::fstat;

use super::outlook;
use super::sys::{self, Kind};
use crate::proxy::Splice;

/// A pipe's capacity in bytes. Large enough that a fast sender needs some hundred microseconds to
/// fill it.
const PIPE_BYTES: usize = 1 << 20;
/// Limit on one worker's pipes. The kernel lets an unprivileged user have 64 MiB in large pipes
/// (`pipe-user-pages-soft`, pipe(7)); flows beyond that stay with blocks.
pub const PIPES_MAX: usize = 16;

/// One pipe, on loan to one flow.
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    /// Bytes that have left the source and not reached the sink.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Its ends, for reading and for writing.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.read.as_fd(), self.write.as_fd()]
    }

    /// A pipe that another process has filled with `held` bytes; `None` if these are not its ends, or it holds
    /// another number of bytes.
    pub fn taken_up([read, write]: [OwnedFd; 2], held: usize) -> Option<Pipe> {
        let is_end = |end: &OwnedFd, mode: OFlag| {
            let flags = fcntl(end.as_fd(), FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
            let is_mode = flags.is_ok_and(|flags| flags & OFlag::O_ACCMODE == mode);
            sys::kind(end.as_fd()) == Kind::Pipe && is_mode
        };
        let inode = |end: &OwnedFd| fstat(end.as_fd()).ok().map(|stat| (stat.st_dev, stat.st_ino));
        let is_pipe = is_end(&read, OFlag::O_RDONLY) && is_end(&write, OFlag::O_WRONLY);
        let is_whole = is_pipe && inode(&read) == inode(&write);
        let is_full = is_whole && outlook::unread(read.as_fd()) == Some(held);
        is_full.then_some(Pipe { read, write, held })
    }

    /// Moves what it can, up to `bytes_max`; returns how much reached the sink, and why it was not
    /// more.
    pub fn step(
        &mut self,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
        bytes_max: usize,
    ) -> (usize, Splice) {
        let mut moved = 0;
        while moved < bytes_max {
            // The source is not read ahead of the sink: what is in the pipe goes first.
            let arrived = if self.held > 0 { Ok(self.held) } else { self.fill(source, bytes_max) };
            let outcome = match arrived {
                Ok(0) => Splice::Ended,
                Ok(_) => match self.empty(sink) {
                    Ok(sent) => {
                        moved += sent;
                        continue;
                    }
                    Err(Errno::EAGAIN) => Splice::Full,
                    Err(errno) => Splice::SinkFailed(errno),
                },
                Err(Errno::EAGAIN) => Splice::Empty,
                Err(errno) => Splice::SourceFailed(errno),
            };
            return (moved, outcome);
        }
        (moved, Splice::Moved)
    }

    fn fill(&mut self, source: BorrowedFd<'_>, bytes_max: usize) -> Result<usize, Errno> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        self.held = splice(source, None, &self.write, None, bytes_max, flags)?;
        Ok(self.held)
    }

    fn empty(&mut self, sink: BorrowedFd<'_>) -> Result<usize, Errno> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        let sent = splice(&self.read, None, sink, None, self.held, flags)?;
        self.held -= sent;
        Ok(sent)
    }
}

/// The pipes of one worker that are not on loan.
pub struct Pipes {
    idle: Vec<Pipe>,
    made: usize,
}

impl Pipes {
    /// Makes no pipe yet; they are made on demand.
    #[expect(clippy::new_without_default, reason = "nothing is made of defaults here")]
    pub fn new() -> Pipes {
        Pipes { idle: Vec::with_capacity(PIPES_MAX), made: 0 }
    }

    /// Lends a pipe; `None` if all are lent or the kernel gives no more.
    pub fn lend(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.pop() {
            return Some(pipe);
        }
        if self.made >= PIPES_MAX {
            return None;
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
        fcntl(write.as_fd(), FcntlArg::F_SETPIPE_SZ(PIPE_BYTES as i32)).ok()?;
        self.made += 1;
        Some(Pipe { read, write, held: 0 })
    }

    /// Counts a pipe that was made elsewhere and is on loan. There may be more than the limit then, until the
    /// first come back.
    pub fn take_up(&mut self) {
        self.made += 1;
    }

    /// Takes a pipe back. One with bytes in it must never serve another flow, and is closed.
    pub fn give_back(&mut self, pipe: Pipe) {
        if pipe.held > 0 || self.made > PIPES_MAX {
            self.made -= 1;
        } else {
            self.idle.push(pipe);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::*;

    const STEP: usize = 512 * 1024;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        near.set_nonblocking(true).unwrap();
        (near, far)
    }

    /// Steps until the answer is a different one, as a poll would.
    fn settle(
        pipe: &mut Pipe,
        source: &TcpStream,
        sink: &TcpStream,
        not: Splice,
    ) -> (usize, Splice) {
        let mut all = 0;
        for _ in 0..100_000 {
            let (moved, how) = pipe.step(source.as_fd(), sink.as_fd(), STEP);
            all += moved;
            if how != not {
                return (all, how);
            }
        }
        panic!("nothing but {not:?}");
    }

    #[test]
    fn bytes_pass_and_the_end_follows_them() {
        let mut pipe = Pipes::new().lend().unwrap();
        let (source, mut user) = pair();
        let (sink, mut backend) = pair();
        assert_eq!(pipe.step(source.as_fd(), sink.as_fd(), STEP), (0, Splice::Empty));
        user.write_all(b"stream").unwrap();
        user.shutdown(Shutdown::Write).unwrap();
        assert_eq!(settle(&mut pipe, &source, &sink, Splice::Empty), (6, Splice::Ended));
        let mut got = [0; 6];
        backend.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"stream");
    }

    #[test]
    fn a_full_sink_keeps_its_bytes_in_the_pipe() {
        let mut pipes = Pipes::new();
        let mut pipe = pipes.lend().unwrap();
        let (source, mut user) = pair();
        let (sink, mut backend) = pair();
        user.set_nonblocking(true).unwrap();
        let mut sent = 0;
        let moved = loop {
            sent += user.write(&[7; 65536]).unwrap_or(0);
            let (_, how) = pipe.step(source.as_fd(), sink.as_fd(), STEP);
            if how == Splice::Full
                && user.write(&[7; 1]).map_or(true, |count| {
                    sent += count;
                    false
                })
            {
                break sent;
            }
        };
        assert!(pipe.held() > 0);
        drop(user);
        let reader = std::thread::spawn(move || {
            let mut all = 0;
            let mut bytes = vec![0; 65536];
            while let Ok(count @ 1..) = backend.read(&mut bytes) {
                all += count;
            }
            all
        });
        loop {
            match pipe.step(source.as_fd(), sink.as_fd(), STEP).1 {
                Splice::Ended => break,
                Splice::SourceFailed(errno) | Splice::SinkFailed(errno) => panic!("{errno}"),
                _ => std::thread::yield_now(),
            }
        }
        assert_eq!(pipe.held(), 0);
        drop(sink);
        assert_eq!(reader.join().unwrap(), moved);
    }

    #[test]
    fn a_pipe_goes_on_elsewhere_with_what_it_holds() {
        let mut pipes = Pipes::new();
        let mut pipe = pipes.lend().unwrap();
        let (near, mut backend) = pair();
        nix::unistd::write(&pipe.write, b"held").unwrap();
        pipe.held = 4;
        let copies = || pipe.ends().map(|end| end.try_clone_to_owned().unwrap());
        let other = pipes.lend().unwrap();
        let [read, write] = copies();
        assert!(Pipe::taken_up([write, read], 4).is_none(), "the ends are mixed up");
        let [read, _] = copies();
        let [_, write] = other.ends().map(|end| end.try_clone_to_owned().unwrap());
        assert!(Pipe::taken_up([read, write], 4).is_none(), "these are two pipes");
        assert!([3, 5].into_iter().all(|held| Pipe::taken_up(copies(), held).is_none()));
        let sockets = [near.as_fd(), near.as_fd()].map(|it| it.try_clone_to_owned().unwrap());
        assert!(Pipe::taken_up(sockets, 0).is_none(), "these are sockets");
        let mut again = Pipe::taken_up(copies(), 4).unwrap();
        let mut fewer = Pipes::new();
        fewer.made = PIPES_MAX;
        fewer.take_up();
        assert!(fewer.lend().is_none());
        let (source, _user) = pair();
        assert_eq!(again.step(source.as_fd(), near.as_fd(), STEP), (4, Splice::Empty));
        let mut got = [0; 4];
        backend.read_exact(&mut got).unwrap();
        assert_eq!((&got, again.held()), (b"held", 0));
        fewer.give_back(again);
        assert_eq!((fewer.made, fewer.idle.len()), (PIPES_MAX, 0), "it was one too many");
    }

    #[test]
    fn a_pipe_that_holds_bytes_is_not_lent_again() {
        let mut pipes = Pipes::new();
        let mut lent: Vec<_> = std::iter::from_fn(|| pipes.lend()).collect();
        assert!(!lent.is_empty() && lent.len() <= PIPES_MAX);
        let mut dirty = lent.pop().unwrap();
        dirty.held = 1;
        pipes.give_back(dirty);
        assert!(pipes.idle.is_empty());
        pipes.give_back(lent.pop().unwrap());
        assert_eq!(pipes.idle.len(), 1);
    }
}
