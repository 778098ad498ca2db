//! A door that accepts connections. Owns its listener and what to do when accepting fails, above all
//! for want of descriptors: then one held in reserve is freed, so that the next user can be accepted and
//! turned away instead of hanging in the queue.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;

use crate::base::time::Now;
use crate::ring::{Done, Ring, Tag, sys};

/// How long to wait when accepting again at once would not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The most connections taken out of a closing listener's queue.
const BACKLOG_MAX: usize = 4096;

/// The outcome of an accept.
pub enum Arrival {
    User(OwnedFd),
    /// Accepted only to be turned away: the process is out of descriptors.
    Shed(OwnedFd),
    /// Accepting failed.
    Failed,
    /// Nobody: the door was closed.
    Nobody,
}

pub struct Door {
    tag: Tag,
    listener: Option<OwnedFd>,
    spare: Option<File>,
    /// When to accept again after accepting has failed.
    accept_at: Option<Now>,
}

impl Door {
    /// A door over a listener, or none when it is off; its completions carry `tag`.
    pub fn new(listener: Option<OwnedFd>, tag: Tag) -> Door {
        Door { tag, listener, spare: spare(), accept_at: None }
    }

    /// Whether there is a listener behind it.
    pub fn is_open(&self) -> bool {
        self.listener.is_some()
    }

    /// Begins to accept.
    pub fn open(&mut self, ring: &mut Ring) {
        self.accept_at = None;
        if let Some(listener) = &self.listener {
            ring.accept_many(self.tag, listener.as_fd());
        }
    }

    /// Takes a completion of the accept.
    pub fn complete(&mut self, now: Now, mut done: Done, ring: &mut Ring) -> Arrival {
        let arrival = match done.accepted.take() {
            Some(socket) if self.spare.is_none() => Arrival::Shed(socket),
            Some(socket) => Arrival::User(socket),
            None if done.result == Err(Errno::ECANCELED) => Arrival::Nobody,
            None => Arrival::Failed,
        };
        let helpless = match done.result {
            _ if !matches!(arrival, Arrival::Failed) => false,
            Err(Errno::EMFILE | Errno::ENFILE) => self.spare.take().is_none(),
            // One user left before being accepted; the next may be fine.
            Err(Errno::ECONNABORTED | Errno::EPROTO | Errno::EINTR) => false,
            _ => true,
        };
        match (done.more, helpless) {
            (true, _) => {}
            (false, true) => self.accept_at = Some(now.plus(ACCEPT_PAUSE)),
            (false, false) => self.open(ring),
        }
        arrival
    }

    /// Accepts again when it is time.
    pub fn housekeep(&mut self, now: Now, ring: &mut Ring) {
        if self.accept_at.is_some_and(|at| now >= at) {
            self.open(ring);
        }
    }

    /// Descriptors have come back.
    pub fn refill(&mut self) {
        if self.spare.is_none() {
            self.spare = spare();
        }
    }

    pub fn next_deadline(&self) -> Option<Now> {
        self.accept_at
    }

    /// Stops accepting. Users already in the listener's queue are handed out: the kernel has told them
    /// that they are connected.
    pub fn close(&mut self, ring: &mut Ring) -> impl Iterator<Item = OwnedFd> + use<> {
        let listener = self.listener.take();
        self.accept_at = None;
        if listener.is_some() {
            ring.cancel_accept(self.tag);
        }
        let next = move || -> io::Result<Option<OwnedFd>> {
            listener.as_ref().map_or(Ok(None), |listener| sys::accept_waiting(listener.as_fd()))
        };
        std::iter::from_fn(move || next().ok().flatten()).take(BACKLOG_MAX)
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::RingSettings;

    #[test]
    fn the_spare_descriptor_is_let_go_only_for_want_of_descriptors() {
        let mut ring = Ring::new(RingSettings::with_bytes(1 << 20, false)).unwrap();
        let tag = Tag { kind: 1, generation: 0, slot: 0 };
        for (errno, shed, waits) in [
            (Errno::ECONNABORTED, false, false),
            (Errno::EMFILE, true, false),
            (Errno::ENFILE, true, false),
            (Errno::ENOMEM, false, true),
        ] {
            let mut door = Door::new(None, tag);
            let done = |result, accepted| Done {
                tag,
                result,
                accepted,
                buf: None,
                more: false,
                nonempty: false,
            };
            let failed = door.complete(Now::default(), done(Err(errno), None), &mut ring);
            assert!(matches!(failed, Arrival::Failed), "{errno}");
            assert_eq!(door.next_deadline().is_some(), waits, "{errno}");
            let user = OwnedFd::from(File::open("/dev/null").unwrap());
            let next = door.complete(Now::default(), done(Ok(3), Some(user)), &mut ring);
            assert_eq!(matches!(next, Arrival::Shed(_)), shed, "{errno}");
        }
    }
}
