//! What the kernel says about a connection's send queue: its length (`SIOCOUTQ`) and `tcp_info`
//! (tcp(7)), and how much a pipe holds. Owns where the fields are; what they mean is `proxy::outlook`'s. Called
//! when a session ends or has been still for a while, never per message.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use crate::proxy::outlook::{Outlook, PROBES_OWED};

/// How many bytes of `struct tcp_info` we ask for: up to and including `tcpi_bytes_acked`, which
/// every kernel since 4.1 has.
const INFO_BYTES: usize = 128;
/// Offsets of the fields (linux/tcp.h), which are the same in all kernels.
const STATE: usize = 0;
const RETRANSMITS: usize = 2;
const PROBES: usize = 3;
const BACKOFF: usize = 4;
const RTO_US: usize = 8;
const UNACKNOWLEDGED: usize = 24;
const LAST_ACK_RECEIVED_MS: usize = 56;
const BYTES_ACKNOWLEDGED: usize = 120;
/// `TCP_CLOSE`: the connection was reset, or given up by the kernel.
const CLOSED: u8 = 7;

/// What the kernel says about a connected socket's send queue. One call if it is empty, else two or three.
pub fn outlook(socket: BorrowedFd<'_>) -> Outlook {
    look(|| queued(socket), || info(socket))
}

fn look(
    mut queued: impl FnMut() -> u32,
    info: impl FnOnce() -> Option<[u8; INFO_BYTES]>,
) -> Outlook {
    let before = queued();
    if before == 0 {
        return Outlook::default();
    }
    let Some(info) = info() else { return Outlook { dead: true, ..Outlook::default() } };
    let seen = read(&info);
    // The connection may have ended well in between: its peer had finished, and acknowledged the last byte.
    let queued = if seen.dead { queued() } else { before };
    Outlook { queued, ..seen }
}

fn queued(socket: BorrowedFd<'_>) -> u32 {
    let mut queued: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (the same as SIOCOUTQ) writes one int, to one that lives until the call
    // returns.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    if result == 0 { u32::try_from(queued).unwrap_or(0) } else { 0 }
}

/// Bytes that wait in a pipe (`FIONREAD`, pipe(7)); `None`: the kernel does not say.
pub(super) fn unread(pipe: BorrowedFd<'_>) -> Option<usize> {
    let mut unread: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, to one that lives until the call returns.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut unread) };
    if result == 0 { usize::try_from(unread).ok() } else { None }
}

fn info(socket: BorrowedFd<'_>) -> Option<[u8; INFO_BYTES]> {
    let mut info = MaybeUninit::<[u8; INFO_BYTES]>::zeroed();
    let mut len = INFO_BYTES as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, and both live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    // SAFETY: bytes may have any value, and all of them were zeroed.
    (result == 0).then(|| unsafe { info.assume_init() })
}

fn read(info: &[u8; INFO_BYTES]) -> Outlook {
    let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let acknowledged: [u8; 8] = std::array::from_fn(|byte| info[BYTES_ACKNOWLEDGED + byte]);
    // The timeout doubles with each retransmission, so the earlier ones add up to the present one
    // less the first.
    let rto = word(RTO_US);
    let in_vain = rto - rto.checked_shr(info[BACKOFF].into()).unwrap_or(0);
    let flying = word(UNACKNOWLEDGED) > 0;
    Outlook {
        queued: 0,
        acknowledged: u64::from_ne_bytes(acknowledged),
        dead: info[STATE] == CLOSED,
        owed: flying || info[PROBES] >= PROBES_OWED,
        owed_for: match flying && info[RETRANSMITS] > 0 {
            true => Duration::from_micros(in_vain.into()),
            false => Duration::ZERO,
        },
        heard_ago: Duration::from_millis(word(LAST_ACK_RECEIVED_MS).into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Instant;

    use super::*;
    use crate::ring::sys;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    /// A connection sent more than the reader's kernel takes, so some of it is queued.
    fn stalled() -> (TcpStream, TcpStream, u64) {
        let (mut near, far) = pair();
        near.set_nonblocking(true).unwrap();
        let mut written = 0;
        let end = Instant::now() + PATIENCE;
        loop {
            match near.write(&[7; 65536]) {
                Ok(count) => written += count as u64,
                // The queue is full, and nothing is on its way any more.
                Err(_) if !outlook(near.as_fd()).owed => return (near, far, written),
                Err(_) => assert!(Instant::now() < end, "the window never closed"),
            }
        }
    }

    #[test]
    fn a_reader_who_pauses_owes_nothing_and_what_waits_for_it_is_known() {
        let (near, mut far, written) = stalled();
        let paused = outlook(near.as_fd());
        assert!(paused.queued > 0 && !paused.dead && !paused.owed, "{paused:?}");
        assert_eq!(paused.acknowledged + u64::from(paused.queued), written + 1, "the SYN counts");
        let mut left = written;
        while left > 0 {
            left -= far.read(&mut [0; 65536]).unwrap() as u64;
        }
        let end = Instant::now() + PATIENCE;
        while outlook(near.as_fd()).queued > 0 {
            assert!(Instant::now() < end, "it was never acknowledged");
        }
    }

    #[test]
    fn what_a_reset_threw_away_is_known() {
        let (near, far, _) = stalled();
        sys::reset_on_close(far.as_fd());
        drop(far);
        let end = Instant::now() + PATIENCE;
        while !outlook(near.as_fd()).dead {
            assert!(Instant::now() < end, "the reset never came");
        }
        assert!(outlook(near.as_fd()).queued > 0);
    }

    #[test]
    fn what_was_acknowledged_while_it_was_looked_at_is_not_lost() {
        let mut info = [0; INFO_BYTES];
        for (state, left, lost) in [(CLOSED, 0, 0), (CLOSED, 7, 7), (1, 0, 9)] {
            info[STATE] = state;
            let mut queues = [9, left].into_iter();
            let seen = look(|| queues.next().unwrap(), || Some(info));
            assert_eq!((seen.queued, seen.dead), (lost, state == CLOSED));
        }
    }

    #[test]
    fn retransmissions_in_vain_tell_how_long_an_answer_has_been_owed() {
        let mut info = [0; INFO_BYTES];
        info[RTO_US..RTO_US + 4].copy_from_slice(&6_400_000u32.to_ne_bytes());
        info[UNACKNOWLEDGED] = 1;
        (info[RETRANSMITS], info[BACKOFF]) = (5, 5);
        assert_eq!(read(&info).owed_for, Duration::from_millis(6200));
        info[BACKOFF] = 255;
        assert_eq!(read(&info).owed_for, Duration::from_millis(6400));
        info[RETRANSMITS] = 0;
        assert_eq!(read(&info).owed_for, Duration::ZERO);
    }
}
