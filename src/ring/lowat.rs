//! How many bytes must have arrived before a socket is readable. Owns the one option that neither nix nor
//! socket2 wraps.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

/// From now on a socket is readable only with this many bytes, or at the connection's end (`SO_RCVLOWAT`,
/// socket(7)). Best effort: without it, its user is woken more often.
pub fn wake_at(socket: BorrowedFd<'_>, bytes: usize) {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    // SAFETY: the descriptor is open as long as it is borrowed, and the kernel reads one int, which lives
    // until the call returns.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<i32>() as libc::socklen_t,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn is_readable(socket: &TcpStream) -> bool {
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::from(20u8)).unwrap() > 0
    }

    #[test]
    fn a_socket_is_readable_with_enough_bytes_or_at_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        wake_at(near.as_fd(), 3);
        far.write_all(b"ab").unwrap();
        assert!(!is_readable(&near));
        far.write_all(b"c").unwrap();
        assert!(is_readable(&near));
        wake_at(near.as_fd(), 4);
        assert!(!is_readable(&near));
        drop(far);
        assert!(is_readable(&near));
    }
}
