//! The doors that accept connections, each for the users of one service. Owns their listeners and what to
//! do when accepting fails, above all for want of descriptors: then one held in reserve is freed, so that
//! the next user can be accepted and turned away instead of hanging in the queue.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;

use super::link::Listener;
use crate::base::time::Now;
use crate::cluster::{DoorId, Doorway, ServiceId};
use crate::estate::{DoorRecord, Parcel};
use crate::ring::{self, Done, Ring, Tag, sys};

/// How long to wait when accepting again at once would not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The most connections taken out of a closing listener's queue.
const BACKLOG_MAX: usize = 4096;

/// The outcome of an accept.
pub enum Arrival {
    User(OwnedFd, Doorway),
    /// Accepted only to be turned away: the process is out of descriptors.
    Shed(OwnedFd),
    /// Accepting failed.
    Failed,
    /// Nobody: the door was closed.
    Nobody,
}

/// The doors of one driver. The slot of an accept's tag is the place of its door, and the generation tells
/// it from a door that had the place before.
pub struct Doors {
    kind: u8,
    /// By the number of their ids, which count the doors of all drivers.
    all: Vec<Option<Door>>,
    /// The accepts of closed doors that have not ended: users whom they have accepted are still to come.
    closing: Vec<(Tag, Doorway)>,
    generation: u32,
    /// One for all of them: whichever has an accept pending takes the descriptor that this frees.
    spare: Option<File>,
    /// The first `accept_at` of all.
    next_try: Option<Now>,
}

struct Door {
    doorway: Doorway,
    listener: OwnedFd,
    /// Of its accept.
    tag: Tag,
    /// When to accept again after accepting has failed.
    accept_at: Option<Now>,
}

impl Doors {
    /// No door yet. Accepts have this kind of tag.
    pub fn new(kind: u8) -> Doors {
        let (all, closing) = (Vec::new(), Vec::new());
        Doors { kind, all, closing, generation: 0, spare: spare(), next_try: None }
    }

    /// Whether there is any.
    pub fn is_open(&self) -> bool {
        self.all.iter().any(Option::is_some)
    }

    /// Whether this one is open.
    pub fn has(&self, id: DoorId) -> bool {
        self.all.get(usize::from(id.0)).is_some_and(Option::is_some)
    }

    /// Opens a door and begins to accept at it.
    pub fn open(&mut self, Listener { id, socket, service, is_tls }: Listener, ring: &mut Ring) {
        let place = usize::from(id.0);
        if self.all.len() <= place {
            self.all.resize_with(place + 1, || None);
        }
        self.generation = self.generation.wrapping_add(1) & ring::GENERATION;
        let tag = Tag { kind: self.kind, generation: self.generation, slot: place as u32 };
        let doorway = Doorway { door: id, service, is_tls };
        self.all[place] = Some(Door { doorway, listener: socket, tag, accept_at: None });
        self.accept(place, ring);
    }

    /// Users who come to this door from now on are another service's, or speak TLS as they did not before.
    pub fn assign(&mut self, id: DoorId, service: ServiceId, is_tls: bool) {
        if let Some(Some(door)) = self.all.get_mut(usize::from(id.0)) {
            door.doorway = Doorway { service, is_tls, ..door.doorway };
        }
    }

    fn accept(&mut self, place: usize, ring: &mut Ring) {
        let Some(Some(door)) = self.all.get_mut(place) else { return };
        door.accept_at = None;
        ring.accept_many(door.tag, door.listener.as_fd());
    }

    /// Takes a completion of an accept.
    pub fn complete(&mut self, now: Now, mut done: Done, ring: &mut Ring) -> Arrival {
        let place = done.tag.slot as usize;
        let door = self.all.get_mut(place).and_then(Option::as_mut);
        let Some(door) = door.filter(|door| door.tag == done.tag) else {
            return self.came_before_closing(done);
        };
        let arrival = match done.accepted.take() {
            Some(socket) if self.spare.is_none() => Arrival::Shed(socket),
            Some(socket) => Arrival::User(socket, door.doorway),
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

    /// Takes a completion of the accept of a door that has closed.
    fn came_before_closing(&mut self, mut done: Done) -> Arrival {
        let Some(place) = self.closing.iter().position(|(tag, _)| *tag == done.tag) else {
            debug_assert!(false, "only a door accepts");
            return Arrival::Nobody;
        };
        let (_, doorway) = self.closing[place];
        if !done.more {
            self.closing.swap_remove(place);
        }
        done.accepted.take().map_or(Arrival::Nobody, |socket| Arrival::User(socket, doorway))
    }

    /// Leaves newcomers in the queues of the listeners. Some may have been accepted already, and still come. Does no
    /// harm when done again.
    pub fn freeze(&mut self, ring: &mut Ring) {
        for door in self.all.iter().flatten().filter(|door| door.accept_at.is_none()) {
            ring.cancel_accept(door.tag);
        }
    }

    /// Takes a completion of an accept after [`Doors::freeze`].
    pub fn note(&mut self, mut done: Done) -> Arrival {
        let door = self.all.get_mut(done.tag.slot as usize).and_then(Option::as_mut);
        let Some(door) = door.filter(|door| door.tag == done.tag) else {
            return self.came_before_closing(done);
        };
        if !done.more {
            door.accept_at = Some(Now::default());
        }
        match done.accepted.take() {
            Some(socket) if self.spare.is_none() => Arrival::Shed(socket),
            Some(socket) => Arrival::User(socket, door.doorway),
            None => Arrival::Nobody,
        }
    }

    /// Whether nobody can come any more before [`Doors::thaw`].
    pub fn is_still(&self) -> bool {
        self.closing.is_empty() && self.all.iter().flatten().all(|door| door.accept_at.is_some())
    }

    /// Accepts again from the next [`Doors::housekeep`] on.
    pub fn thaw(&mut self) {
        self.plan_next_try();
    }

    /// Adds the listeners of all doors.
    pub fn describe(&self, doors: &mut Parcel<RawFd>) {
        for Door { doorway, listener, .. } in self.all.iter().flatten() {
            describe(doorway.door.0, listener.as_raw_fd(), doors);
        }
    }

    /// Lets go of all doors, which are others' now, and so are those in their queues. Everything is still.
    pub fn leave(&mut self) {
        self.all.clear();
        self.next_try = None;
    }

    /// Accepts again where it is time.
    pub fn housekeep(&mut self, now: Now, ring: &mut Ring) {
        if self.next_try.is_none_or(|at| now < at) {
            return;
        }
        for place in 0..self.all.len() {
            let accept_at = self.all[place].as_ref().and_then(|door| door.accept_at);
            if accept_at.is_some_and(|at| now >= at) {
                self.accept(place, ring);
            }
        }
        self.plan_next_try();
    }

    fn plan_next_try(&mut self) {
        self.next_try = self.all.iter().flatten().filter_map(|door| door.accept_at).min();
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

    /// Stops accepting at a door. Users already in its listener's queue are handed out: the kernel has told
    /// them that they are connected.
    pub fn close(
        &mut self,
        id: DoorId,
        ring: &mut Ring,
    ) -> impl Iterator<Item = (OwnedFd, Doorway)> + use<> {
        let closed = self.all.get_mut(usize::from(id.0)).and_then(Option::take);
        let closed = closed.map(|door| self.stop_accepting(door, ring));
        self.plan_next_try();
        closed.into_iter().flatten()
    }

    /// The same at all of them.
    pub fn close_all(
        &mut self,
        ring: &mut Ring,
    ) -> impl Iterator<Item = (OwnedFd, Doorway)> + use<> {
        self.next_try = None;
        let all: Vec<_> = self.all.iter_mut().filter_map(Option::take).collect();
        let queues: Vec<_> = all.into_iter().map(|door| self.stop_accepting(door, ring)).collect();
        queues.into_iter().flatten()
    }

    /// Those in the queue of a door that accepts no more.
    fn stop_accepting(
        &mut self,
        door: Door,
        ring: &mut Ring,
    ) -> impl Iterator<Item = (OwnedFd, Doorway)> + use<> {
        let Door { doorway, listener, tag, accept_at } = door;
        if accept_at.is_none() {
            ring.cancel_accept(tag);
            self.closing.push((tag, doorway));
        }
        let next = move || sys::accept_waiting(listener.as_fd()).ok().flatten();
        std::iter::from_fn(next).take(BACKLOG_MAX).map(move |user| (user, doorway))
    }
}

/// Adds a socket at a door.
pub fn describe(door: u16, socket: RawFd, doors: &mut Parcel<RawFd>) {
    doors.push(&DoorRecord { door: door.into(), unused: 0.into() });
    doors.add_socket(socket);
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use super::*;
    use crate::ring::RingSettings;

    fn ring() -> Ring {
        Ring::new(RingSettings::with_bytes(1 << 20, false)).unwrap()
    }

    fn listener(id: u16, service: u16) -> (Listener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let at = listener.local_addr().unwrap();
        let (id, service) = (DoorId(id), ServiceId(service));
        (Listener { id, socket: listener.into(), service, is_tls: false }, at)
    }

    /// Doors of services 3, 4 and so on, with the addresses of their listeners.
    fn doors(count: u16, ring: &mut Ring) -> (Doors, Vec<SocketAddr>) {
        let mut doors = Doors::new(1);
        let open = |number| {
            let (listener, at) = listener(number, 3 + number);
            doors.open(listener, ring);
            at
        };
        let at = (0..count).map(open).collect();
        (doors, at)
    }

    /// A completion at the door that was the first to have this place.
    fn done(door: u32, result: Result<u32, Errno>, accepted: Option<OwnedFd>) -> Done {
        let tag = Tag { kind: 1, generation: door + 1, slot: door };
        Done { tag, result, accepted, buf: None, more: false, nonempty: false }
    }

    fn of(door: u16, service: u16) -> Doorway {
        Doorway { door: DoorId(door), service: ServiceId(service), is_tls: false }
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
                let (mut doors, _) = doors(2, &mut ring);
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
        let mut ring = ring();
        let (mut doors, _) = doors(3, &mut ring);
        for door in [2, 0, 1, 1] {
            let came = doors.complete(Now::default(), done(door, Ok(3), user()), &mut ring);
            assert!(
                matches!(came, Arrival::User(_, at) if at == of(door as u16, 3 + door as u16)),
                "door {door}"
            );
        }
        drop(doors.close_all(&mut ring));
        let late = doors.complete(Now::default(), done(2, Ok(3), user()), &mut ring);
        assert!(
            matches!(late, Arrival::User(_, at) if at == of(2, 5)),
            "accepted before it closed"
        );
    }

    #[test]
    fn a_door_that_failed_is_tried_again_whatever_the_others_do() {
        let mut ring = ring();
        let (mut doors, _) = doors(3, &mut ring);
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
        let mut ring = ring();
        let (mut doors, at) = doors(2, &mut ring);
        let users: Vec<_> =
            [1, 0, 1].map(|door: usize| TcpStream::connect(at[door]).unwrap()).into();
        let queued = doors.close_all(&mut ring).map(|(_, at)| at.service.0);
        assert_eq!(queued.collect::<Vec<_>>(), [3, 4, 4]);
        assert!(!doors.is_open());
        assert!(at.iter().all(|at| TcpStream::connect(at).is_err()));
        drop(users);
    }

    #[test]
    fn a_place_given_to_another_door_keeps_the_users_of_both_apart() {
        let mut ring = ring();
        let (mut doors, at) = doors(2, &mut ring);
        let queued = TcpStream::connect(at[0]).unwrap();
        let closed: Vec<_> = doors.close(DoorId(0), &mut ring).map(|it| it.1).collect();
        assert_eq!(closed, [of(0, 3)]);
        assert!(TcpStream::connect(at[0]).is_err() && TcpStream::connect(at[1]).is_ok());
        let (next, _) = listener(0, 9);
        doors.open(next, &mut ring);
        let more = Done { more: true, ..done(0, Ok(3), user()) };
        for late in [more, done(0, Ok(3), user())] {
            let late = doors.complete(Now::default(), late, &mut ring);
            assert!(matches!(late, Arrival::User(_, at) if at == of(0, 3)), "it came before");
        }
        assert!(doors.closing.is_empty(), "that was the last of its accept");
        let tag = Tag { kind: 1, generation: 3, slot: 0 };
        let come = |doors: &mut Doors, ring: &mut Ring| {
            let done = Done { tag, more: true, ..done(0, Ok(3), user()) };
            match doors.complete(Now::default(), done, ring) {
                Arrival::User(_, at) => (at.service.0, at.is_tls),
                _ => panic!("a user has come"),
            }
        };
        assert_eq!(come(&mut doors, &mut ring), (9, false));
        doors.assign(DoorId(0), ServiceId(5), true);
        assert_eq!(come(&mut doors, &mut ring), (5, true));
        drop(queued);
    }
}
