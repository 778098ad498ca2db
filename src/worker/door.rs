//! The doors that accept connections, each for the users of one service. Owns their listeners and what to
//! do when accepting fails, above all for want of descriptors: then one held in reserve is freed, so that
//! the next user can be accepted and turned away instead of hanging in the queue.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;

use crate::base::time::Now;
use crate::cluster::ServiceId;
use crate::ring::{Done, Ring, Tag, sys};

/// How long to wait when accepting again at once would not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The most connections taken out of a closing listener's queue.
const BACKLOG_MAX: usize = 4096;

/// A listener and the service whose users come to it.
pub struct Listener {
    pub socket: OwnedFd,
    pub service: ServiceId,
}

/// The outcome of an accept.
pub enum Arrival {
    User(OwnedFd, ServiceId),
    /// Accepted only to be turned away: the process is out of descriptors.
    Shed(OwnedFd),
    /// Accepting failed.
    Failed,
    /// Nobody: the door was closed.
    Nobody,
}

/// The doors of one driver. The slot of an accept's tag is the place of its door, which stays its place
/// after the door has closed: users who were accepted before are still to come.
pub struct Doors {
    kind: u8,
    all: Vec<Door>,
    /// One for all of them: whichever has an accept pending takes the descriptor that this frees.
    spare: Option<File>,
    /// The first `accept_at` of all.
    next_try: Option<Now>,
}

struct Door {
    service: ServiceId,
    /// `None` once it is closed.
    listener: Option<OwnedFd>,
    /// When to accept again after accepting has failed.
    accept_at: Option<Now>,
}

impl Doors {
    /// Doors over these listeners, whose accepts have this kind of tag.
    pub fn new(listeners: Vec<Listener>, kind: u8) -> Doors {
        let door = |Listener { socket, service }| Door {
            service,
            listener: Some(socket),
            accept_at: None,
        };
        let all = listeners.into_iter().map(door).collect();
        Doors { kind, all, spare: spare(), next_try: None }
    }

    /// Whether any has a listener.
    pub fn is_open(&self) -> bool {
        self.all.iter().any(|door| door.listener.is_some())
    }

    /// Begins to accept at all of them.
    pub fn open(&mut self, ring: &mut Ring) {
        (0..self.all.len()).for_each(|place| self.accept(place, ring));
    }

    fn accept(&mut self, place: usize, ring: &mut Ring) {
        let tag = self.tag(place);
        let Some(door) = self.all.get_mut(place) else { return };
        door.accept_at = None;
        if let Some(listener) = &door.listener {
            ring.accept_many(tag, listener.as_fd());
        }
    }

    fn tag(&self, place: usize) -> Tag {
        Tag { kind: self.kind, generation: 0, slot: place as u32 }
    }

    /// Takes a completion of an accept.
    pub fn complete(&mut self, now: Now, mut done: Done, ring: &mut Ring) -> Arrival {
        let place = done.tag.slot as usize;
        let Some(door) = self.all.get_mut(place) else {
            debug_assert!(false, "only a door accepts");
            return Arrival::Nobody;
        };
        let arrival = match done.accepted.take() {
            Some(socket) if self.spare.is_none() => Arrival::Shed(socket),
            Some(socket) => Arrival::User(socket, door.service),
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
            (false, true) => {
                door.accept_at = Some(now.plus(ACCEPT_PAUSE));
                self.plan_next_try();
            }
            (false, false) => self.accept(place, ring),
        }
        arrival
    }

    /// Accepts again where it is time.
    pub fn housekeep(&mut self, now: Now, ring: &mut Ring) {
        if self.next_try.is_none_or(|at| now < at) {
            return;
        }
        for place in 0..self.all.len() {
            if self.all[place].accept_at.is_some_and(|at| now >= at) {
                self.accept(place, ring);
            }
        }
        self.plan_next_try();
    }

    fn plan_next_try(&mut self) {
        self.next_try = self.all.iter().filter_map(|door| door.accept_at).min();
    }

    /// Descriptors have come back.
    pub fn refill(&mut self) {
        if self.spare.is_none() {
            self.spare = spare();
        }
    }

    pub fn next_deadline(&self) -> Option<Now> {
        self.next_try
    }

    /// Stops accepting. Users already in the listeners' queues are handed out: the kernel has told them
    /// that they are connected.
    pub fn close(&mut self, ring: &mut Ring) -> impl Iterator<Item = (OwnedFd, ServiceId)> + use<> {
        self.next_try = None;
        let mut closed = Vec::new();
        for place in 0..self.all.len() {
            let tag = self.tag(place);
            let Door { service, listener, accept_at } = &mut self.all[place];
            *accept_at = None;
            if let Some(socket) = listener.take() {
                ring.cancel_accept(tag);
                closed.push(Listener { socket, service: *service });
            }
        }
        closed.into_iter().flat_map(waiting)
    }
}

/// Those in the queue of a listener that accepts no more.
fn waiting(Listener { socket, service }: Listener) -> impl Iterator<Item = (OwnedFd, ServiceId)> {
    let next = move || sys::accept_waiting(socket.as_fd()).ok().flatten();
    std::iter::from_fn(next).take(BACKLOG_MAX).map(move |user| (user, service))
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::ring::RingSettings;

    fn ring() -> Ring {
        Ring::new(RingSettings::with_bytes(1 << 20, false)).unwrap()
    }

    /// Doors of services 3, 4 and so on, with the addresses of their listeners.
    fn doors(count: u16) -> (Doors, Vec<std::net::SocketAddr>) {
        let listen = |number| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let at = listener.local_addr().unwrap();
            (Listener { socket: listener.into(), service: ServiceId(3 + number) }, at)
        };
        let (listeners, at) = (0..count).map(listen).unzip();
        (Doors::new(listeners, 1), at)
    }

    fn done(door: u32, result: Result<u32, Errno>, accepted: Option<OwnedFd>) -> Done {
        let tag = Tag { kind: 1, generation: 0, slot: door };
        Done { tag, result, accepted, buf: None, more: false, nonempty: false }
    }

    fn user() -> Option<OwnedFd> {
        Some(File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn the_spare_descriptor_is_let_go_only_for_want_of_descriptors() {
        let mut ring = ring();
        for (errno, shed, waits) in [
            (Errno::ECONNABORTED, false, false),
            (Errno::EMFILE, true, false),
            (Errno::ENFILE, true, false),
            (Errno::ENOMEM, false, true),
        ] {
            // Whichever of the doors is the next to accept.
            for next in 0..2 {
                let (mut doors, _) = doors(2);
                let failed = done(0, Err(errno), None);
                let failed = doors.complete(Now::default(), failed, &mut ring);
                assert!(matches!(failed, Arrival::Failed), "{errno}");
                assert_eq!(doors.next_deadline().is_some(), waits, "{errno}");
                let arrival = doors.complete(Now::default(), done(next, Ok(3), user()), &mut ring);
                assert_eq!(matches!(arrival, Arrival::Shed(_)), shed, "{errno}");
            }
        }
    }

    #[test]
    fn a_user_is_of_the_service_whose_door_it_came_by() {
        let (mut ring, (mut doors, _)) = (ring(), doors(3));
        for door in [2, 0, 1, 1] {
            let came = doors.complete(Now::default(), done(door, Ok(3), user()), &mut ring);
            assert!(
                matches!(came, Arrival::User(_, service) if service.0 == 3 + door as u16),
                "door {door}"
            );
        }
        drop(doors.close(&mut ring));
        let late = doors.complete(Now::default(), done(2, Ok(3), user()), &mut ring);
        assert!(matches!(late, Arrival::User(_, ServiceId(5))), "accepted before it closed");
    }

    #[test]
    fn a_door_that_failed_is_tried_again_whatever_the_others_do() {
        let (mut ring, (mut doors, _)) = (ring(), doors(3));
        let at = |ms| Now::default().plus(Duration::from_millis(ms));
        for (door, ms) in [(2, 50), (0, 10)] {
            doors.complete(at(ms), done(door, Err(Errno::ENOMEM), None), &mut ring);
        }
        assert_eq!(doors.next_deadline(), Some(at(110)));
        doors.housekeep(at(110), &mut ring);
        assert_eq!(doors.next_deadline(), Some(at(150)));
        doors.housekeep(at(150), &mut ring);
        assert_eq!(doors.next_deadline(), None);
    }

    #[test]
    fn a_closing_door_hands_out_its_own_queue_under_its_service() {
        let (mut ring, (mut doors, at)) = (ring(), doors(2));
        let users: Vec<_> =
            [1, 0, 1].map(|door: usize| TcpStream::connect(at[door]).unwrap()).into();
        let queued = doors.close(&mut ring).map(|(_, service)| service.0);
        assert_eq!(queued.collect::<Vec<_>>(), [3, 4, 4]);
        assert!(!doors.is_open());
        assert!(at.iter().all(|at| TcpStream::connect(at).is_err()));
        drop(users);
    }
}
