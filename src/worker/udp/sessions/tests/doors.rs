//! Sessions of several services, each with a door of its own.

use super::*;
use crate::cluster::Service;

const OTHER: ServiceId = ServiceId(5);
/// A door of each service.
const DOORS: [DoorRef; 2] =
    [DoorRef { place: 0, service: SERVICE }, DoorRef { place: 1, service: OTHER }];

/// Two UDP services without backends, both with the usual idle time.
fn two_services() -> World {
    let mut world = world(|_| {});
    let before = world.books.snapshot().clone();
    let own = before.service(SERVICE).unwrap();
    let other = Service { id: OTHER, name: "other".into(), ..own.clone() };
    let services = before.services.iter().cloned().chain([other]).collect();
    world.adopt(Snapshot { services, ..before });
    world
}

impl World {
    /// Replaces the backends of both services: identity, service, last byte of the address.
    fn register_in(&mut self, all: &[(u32, ServiceId, u8)]) {
        let backend = |(id, service, host): &(u32, ServiceId, u8)| Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(*id),
            slot: *id as u16,
            service: *service,
            address: backend_at(*host),
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        };
        let backends: Vec<_> = all.iter().map(backend).collect();
        self.adopt(self.books.snapshot().with(&backends));
    }

    /// Sends a byte to a door, at its own port.
    fn up_at(&mut self, door: DoorRef, number: u16) -> Result<(SocketId, u8), DropReason> {
        let origin = Origin { local: local_of(door), door, ..origin(number) };
        loop {
            match self.core.up(self.now, origin, Segments::one(1), &mut self.books) {
                Up::Open(socket) => self.core.opened(self.now, socket, true),
                other => return went(other),
            }
        }
    }

    fn down_by(&mut self, (socket, host): (SocketId, u8)) -> Down {
        self.core.down(self.now, socket, backend_at(host), Segments::one(2), &mut self.books)
    }
}

fn local_of(door: DoorRef) -> SocketAddr {
    ([192, 0, 2, 1], 53 + door.place).into()
}

#[test]
fn a_session_is_of_the_service_of_its_door_and_answers_through_it() {
    let mut world = two_services();
    world.register_in(&[(1, SERVICE, 1), (2, OTHER, 2)]);
    for number in 1..=4 {
        for (door, host) in DOORS.into_iter().zip(1..) {
            let went = world.up_at(door, number).unwrap();
            assert_eq!(went.1, host, "{door:?}");
            let (from, to) = (local_of(door), client(number));
            assert_eq!(world.down_by(went), Down::Send { door: door.place, from, to });
        }
    }
    let of = |world: &World, service| {
        world.sessions().iter().filter(|session| session.service == service).count()
    };
    assert_eq!([SERVICE, OTHER].map(|service| of(&world, service)), [4, 4]);
    world.register_in(&[(2, OTHER, 2)]);
    assert_eq!(world.up_at(DOORS[0], 1), Err(DropReason::NoBackend), "the other's is not asked");
    assert_eq!(world.up_at(DOORS[0], 9), Err(DropReason::NoBackend));
    assert_eq!(world.up_at(DOORS[1], 9).map(|(_, host)| host), Ok(2));
}

#[test]
fn a_datagram_that_was_handed_off_begins_a_session_of_its_door() {
    let mut world = two_services();
    world.register_in(&[(1, SERVICE, 1), (2, OTHER, 2)]);
    let door = DOORS[1];
    let origin = Origin { local: local_of(door), door, ..origin(1) };
    let went = loop {
        match world.core.handed_off(world.now, origin, Segments::one(1), &mut world.books) {
            Up::Open(socket) => world.core.opened(world.now, socket, true),
            other => break went(other).unwrap(),
        }
    };
    assert_eq!(went.1, 2);
    let Down::Send { door: by, .. } = world.down_by(went) else { panic!("it is the answer") };
    assert_eq!((by, world.sessions()[0].service), (1, OTHER));
}

#[test]
fn an_address_that_two_services_share_is_left_by_one_and_kept_by_the_other() {
    for order in [[0, 1], [1, 0]] {
        let all = [(1, SERVICE, 1), (2, OTHER, 1)];
        for kept in [0, 1] {
            // While no session keeps the address in mind.
            let mut world = two_services();
            world.register_in(&order.map(|place: usize| all[place]));
            world.register_in(&[all[kept]]);
            assert_eq!(world.up_at(DOORS[kept], 9).map(|(_, host)| host), Ok(1), "{kept}");
        }
        let mut world = two_services();
        world.register_in(&order.map(|place: usize| all[place]));
        let [one, other] = DOORS.map(|door| world.up_at(door, 1).unwrap());
        assert_ne!(one, other, "each has a pair of its own");
        for (kept, lost) in [(0, 1), (1, 0)] {
            world.register_in(&all);
            assert!(DOORS.iter().all(|door| world.up_at(*door, 1).is_ok()));
            world.register_in(&[all[kept]]);
            assert!(world.up_at(DOORS[kept], 1).is_ok());
            assert_eq!(world.up_at(DOORS[lost], 1), Err(DropReason::NoBackend));
        }
        world.register_in(&[]);
        assert_eq!(DOORS.map(|door| world.up_at(door, 1).is_ok()), [false; 2]);
        world.register_in(&all);
        assert_eq!(DOORS.map(|door| world.up_at(door, 1)), [Ok(one), Ok(other)]);
        let on = |world: &World| -> Vec<_> {
            world.sessions().iter().map(|it| (it.service, it.backend.unwrap().0)).collect()
        };
        let mut on = on(&world);
        on.sort();
        assert_eq!(on, [(SERVICE, 1), (OTHER, 2)]);
    }
}

#[test]
fn an_icmp_error_makes_a_shared_address_avoided_for_the_service_that_asked() {
    let mut world = two_services();
    world.register_in(&[(1, SERVICE, 1), (2, OTHER, 1), (3, SERVICE, 3), (4, OTHER, 4)]);
    for number in [100, 102] {
        let went = [number, number + 1].map(|it| world.up_at(DOORS[1], it).unwrap());
        let (socket, host) = went.into_iter().find(|(_, host)| *host == 1).unwrap();
        world.report_unreachable(socket, host);
    }
    let hosts = |world: &mut World, door, from: u16| -> Vec<u8> {
        (from..from + 4).map(|it| world.up_at(door, it).unwrap().1).collect()
    };
    assert_eq!(hosts(&mut world, DOORS[1], 200), [4; 4]);
    let own = hosts(&mut world, DOORS[0], 300);
    assert_eq!(own.iter().filter(|host| **host == 1).count(), 2, "{own:?}");
}

#[test]
fn a_session_is_over_after_the_idle_time_of_its_own_service() {
    let mut world = two_services();
    let mut snapshot = world.books.snapshot().clone();
    for service in snapshot.services.iter_mut().filter(|it| it.id == OTHER) {
        service.terms.timeouts.udp_idle = Duration::from_secs(20);
    }
    world.adopt(snapshot);
    world.register_in(&[(1, SERVICE, 1), (2, OTHER, 2)]);
    assert!(DOORS.iter().all(|door| world.up_at(*door, 1).is_ok()));
    world.pass(Duration::from_secs(19));
    assert_eq!(world.core.live(), 2);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.sessions().iter().map(|it| it.service).collect::<Vec<_>>(), [SERVICE]);
    world.pass(Duration::from_secs(40));
    assert_eq!(world.core.live(), 0);
}

#[test]
fn a_session_is_over_after_the_answers_of_its_own_service() {
    let mut world = two_services();
    let mut snapshot = world.books.snapshot().clone();
    for service in snapshot.services.iter_mut().filter(|it| it.id == OTHER) {
        service.terms.responses = NonZeroU32::new(1);
    }
    world.adopt(snapshot);
    world.register_in(&[(1, SERVICE, 1), (2, OTHER, 2)]);
    let pairs = DOORS.map(|door| world.up_at(door, 1).unwrap());
    for (socket, host) in pairs {
        world.down(socket, host).unwrap();
    }
    assert_eq!(world.sessions().iter().map(|it| it.service).collect::<Vec<_>>(), [SERVICE]);
}

#[test]
fn services_whose_backends_are_the_same_go_on_and_one_that_is_gone_leaves_no_address() {
    let mut world = two_services();
    world.register_in(&[(1, SERVICE, 1), (2, OTHER, 2)]);
    let before = world.books.snapshot().clone();
    let pool_before = Arc::clone(&before.service(SERVICE).unwrap().pool);
    world.register_in(&[(1, SERVICE, 1), (3, OTHER, 3)]);
    let mut after = world.books.snapshot().clone();
    let own = after.services.iter_mut().find(|service| service.id == SERVICE).unwrap();
    own.pool = pool_before;
    after.version += 1;
    world.adopt(after.clone());
    for version in 1..=3 {
        world.adopt(Snapshot { version: after.version + version, ..after.clone() });
        let number = 10 + version as u16;
        assert_eq!(world.up_at(DOORS[0], number).map(|(_, host)| host), Ok(1));
        assert_eq!(world.up_at(DOORS[1], number).map(|(_, host)| host), Ok(3));
    }
    let is_known = |world: &World, host| world.core.pairs.find(backend_at(host)).is_some();
    assert_eq!([1, 2, 3].map(|host| is_known(&world, host)), [true, false, true]);

    world.core.sweep(None, EndReason::Stopping);
    world.now = world.now.plus(Duration::from_secs(1));
    world.core.expire(world.now, &mut world.books);
    let rest = after.services.iter().filter(|service| service.id != OTHER).cloned().collect();
    world.adopt(Snapshot { version: after.version + 9, services: rest, ..after });
    world.now = world.now.plus(2 * QUARANTINE);
    world.core.expire(world.now, &mut world.books);
    assert_eq!([1, 3].map(|host| is_known(&world, host)), [true, false]);
}

#[test]
fn the_sessions_of_a_closed_door_end_and_those_of_others_go_on() {
    for doors in [1, 2 * SWEEPS_MAX as u16] {
        let mut world = two_services();
        world.register_in(&[(1, SERVICE, 1), (2, OTHER, 2)]);
        assert!(DOORS.iter().all(|door| world.up_at(*door, 1).is_ok()));
        world.reports();
        (1..=doors).for_each(|door| world.core.close_door(door));
        world.pass(Duration::from_millis(500));
        assert_eq!(world.ends(), [EndReason::BackendLeft], "{doors} have closed");
        assert_eq!(world.sessions().iter().map(|it| it.service).collect::<Vec<_>>(), [SERVICE]);
        assert!(world.core.sweeps.is_empty());
    }
}
