//! Sessions that another worker goes on with, and records that nobody has written.

use zerocopy::{FromBytes, IntoBytes};

use super::super::estate::Means;
use super::*;
use crate::base::random::xorshift;
use crate::estate::Parcel;
use crate::estate::entry::Address;
use crate::estate::udp::{FlowRecord, RestRecord, SenderRecord, SourceRecord};
use crate::worker::books::estate::Named;

/// What one worker leaves; a socket is described at the place that is its number.
struct Left {
    flows: Parcel<i32>,
    rests: Vec<RestRecord>,
    sources: Parcel<i32>,
    sockets: Vec<SocketId>,
}

fn sender(socket: SocketId) -> SenderRecord {
    SenderRecord { upstream: u32::from(socket.number).into(), local: Address::NONE }
}

fn socket(sender: &SenderRecord) -> SocketId {
    SocketId { family: Family::V4, number: sender.upstream.get() as u16 }
}

impl World {
    fn left(&mut self) -> Left {
        self.core.finish_sweeps(self.now, &mut self.books);
        let (mut flows, mut sources) = (Parcel::default(), Parcel::default());
        let means = |means: &Means| Some((Address::NONE, sender(means.socket)));
        self.core.describe(&self.books, &mut flows, means);
        self.core.describe_sources(self.now, &mut sources);
        let rests = self.core.resting().map(|rest| RestRecord {
            backend: rest.backend.into(),
            sender: sender(rest.socket),
            until: rest.until.nanos().into(),
            at: rest.at.nanos().into(),
            clean: rest.clean.nanos().into(),
        });
        let sockets = self.core.pairs.open() as u16;
        let id = |number| SocketId { family: Family::V4, number };
        Left { flows, rests: rests.collect(), sources, sockets: (0..sockets).map(id).collect() }
    }

    fn take_up(&mut self, left: &Left) -> Result<(), String> {
        left.sockets.iter().for_each(|socket| self.core.take_up_socket(*socket));
        let mut services = Named::new(Protocol::Udp);
        for record in left.flows.records::<FlowRecord>() {
            let means = Means { socket: socket(&record.sender), door: 3 };
            let context = (&mut services, &left.flows);
            self.core.take_up(self.now, &record, means, context, &mut self.books)?;
        }
        for rest in &left.rests {
            self.core.take_up_rest(self.now, rest, socket(&rest.sender))?;
        }
        for record in left.sources.records::<SourceRecord>() {
            self.core.take_up_source(self.now, &record);
        }
        self.core.taken_up();
        Ok(())
    }

    /// Another worker that goes on with everything, under another key.
    fn elsewhere(&mut self, change: impl FnOnce(&mut UdpSettings)) -> World {
        let left = self.left();
        let mut new = world(|settings| {
            settings.hasher = FlowHasher::new((8, 9));
            change(settings);
        });
        new.adopt(self.books.snapshot().clone());
        new.books.succeed(self.books.describe_places());
        (new.now, new.seats) = (self.now, Arc::clone(&self.seats));
        new.take_up(&left).unwrap();
        new.books.settle();
        new
    }
}

#[test]
fn users_keep_their_backend_and_their_way_to_it_and_back() {
    let mut world = with_backends(2, |_| {});
    let ways: Vec<_> = (1..=20).map(|number| world.up(number).unwrap()).collect();
    world.down(ways[3].0, ways[3].1).unwrap();
    let views = world.sessions();
    let mut new = world.elsewhere(|_| {});
    assert_eq!(new.sessions(), views);
    assert_eq!(new.metrics.counters.sessions_started.get(), 0);
    assert_eq!(new.reports(), []);
    for (number, (socket, host)) in (1..).zip(ways) {
        assert_eq!(new.down(socket, host), Ok((LOCAL.parse().unwrap(), client(number))));
        assert_eq!(new.up(number), Ok((socket, host)));
    }
    let [one, two] = [1, 2].map(|slot| new.metrics.backends[slot].active.get());
    assert_eq!([one, two], [10, 10]);
    let fresh = new.up(99).unwrap().0;
    assert!(new.sessions().len() == 21 && new.core.sockets() >= 10, "{fresh:?}");
}

#[test]
fn a_pair_that_rests_goes_on_resting_until_its_time() {
    let mut world = with_backends(1, |_| {});
    let (socket, host) = world.up(1).unwrap();
    world.pass(IDLE + Duration::from_secs(1));
    assert_eq!(world.ends(), [EndReason::Idle]);
    let mut new = world.elsewhere(|_| {});
    assert_eq!(new.down(socket, host), Err(DropReason::LateReply));
    assert_ne!(new.up(2).unwrap().0, socket);
    new.pass(QUARANTINE);
    assert_eq!(new.core.pairs.quarantined(), 1, "that of the second");
    assert_eq!(new.down(socket, host), Err(DropReason::UnknownReply));
}

#[test]
fn idle_times_and_what_is_owed_go_on() {
    let thrice = |settings: &mut UdpSettings| settings.udp.responses = NonZeroU32::new(3);
    let mut world = with_backends(1, thrice);
    let (socket, host) = world.up(1).unwrap();
    world.down(socket, host).unwrap();
    world.up(2).unwrap();
    let mut new = world.elsewhere(thrice);
    new.down(socket, host).unwrap();
    assert_eq!(new.ends(), [], "one more is owed");
    new.down(socket, host).unwrap();
    assert_eq!(new.ends(), [EndReason::Finished], "that was its third answer");
    new.pass(IDLE / 2);
    let mut third = new.elsewhere(thrice);
    third.pass(IDLE / 2 - Duration::from_secs(1));
    assert_eq!(third.ends(), []);
    third.pass(Duration::from_secs(2));
    assert_eq!(third.ends(), [EndReason::Idle]);
}

#[test]
fn a_backend_that_has_left_keeps_its_pairs_and_loses_its_users_at_their_next_word() {
    let mut world = with_backends(2, |settings| settings.udp.on_backend_loss = OnUdpLoss::Move);
    let (socket, host) = world.up(1).unwrap();
    let stays = 3 - host;
    world.register(&[(u32::from(stays), stays, Standing::Serving)]);
    let mut new = world.elsewhere(|settings| settings.udp.on_backend_loss = OnUdpLoss::Move);
    assert_eq!(new.down(socket, host), Ok((LOCAL.parse().unwrap(), client(1))));
    assert_eq!(new.up(1).unwrap().1, stays);
    assert_eq!(new.down(socket, host), Err(DropReason::LateReply));
}

#[test]
fn who_was_quiet_longest_is_still_the_first_to_make_room() {
    let few = |settings: &mut UdpSettings| settings.sessions = 8;
    let mut world = with_backends(1, few);
    for number in 1..=8 {
        let (socket, host) = world.up(number).unwrap();
        world.down(socket, host).unwrap();
        world.pass(Duration::from_secs(3));
    }
    let mut new = world.elsewhere(few);
    new.up(9).unwrap();
    let mut left: Vec<u16> = new.sessions().iter().map(|view| view.client.port()).collect();
    left.sort_unstable();
    assert_eq!(left, [2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn the_limits_of_a_source_count_what_it_has_already() {
    let limits = |settings: &mut UdpSettings| {
        settings.sources =
            SourceLimits { sessions: NonZeroU32::new(2), new_per_second: NonZeroU32::new(50) };
    };
    let mut world = with_backends(1, limits);
    let at = |port| SocketAddr::from(([198, 51, 100, 7], port));
    let try_out = |world: &mut World, port| {
        let origin = Origin { client: at(port), ..origin(1) };
        loop {
            match world.core.up(world.now, origin, Segments::one(1), &mut world.books) {
                Up::Open(socket) => world.core.opened(world.now, socket, true),
                other => return went(other),
            }
        }
    };
    try_out(&mut world, 1).unwrap();
    let mut new = world.elsewhere(limits);
    try_out(&mut new, 2).unwrap();
    assert_eq!(try_out(&mut new, 3), Err(DropReason::SourceLimit));
}

#[test]
fn all_workers_find_a_flow_that_was_taken_up() {
    let mut world = with_backends(1, |_| {});
    world.up(1).unwrap();
    let map = Arc::new(Affinity::new(100));
    let new = world.elsewhere(|settings| {
        settings.affinity = Some(AffinityHandle { map: Arc::clone(&map), worker: 5 });
    });
    let flow = new.core.settings.hasher.flow(&FlowKey::new(client(1), LOCAL.parse().unwrap()));
    assert_eq!((map.holder(flow), map.find(flow)), (Some(5), Some(BackendId(1))));
}

#[test]
fn what_no_sessions_can_be_is_refused_in_words() {
    let mut world = with_backends(1, |_| {});
    let taken = [world.up(1).unwrap().0, world.up(2).unwrap().0];
    let refused = |left: &Left, settings: fn(&mut UdpSettings)| {
        let mut new = with_backends(1, settings);
        new.take_up(left).unwrap_err()
    };
    let change = |world: &mut World, change: &dyn Fn(&mut FlowRecord)| {
        let mut left = world.left();
        let mut flows = Parcel::default();
        flows.add_bytes([&b"udp"[..]].into_iter());
        for mut record in left.flows.records::<FlowRecord>() {
            change(&mut record);
            flows.push(&record);
        }
        left.flows = flows;
        left
    };
    let left = change(&mut world, &|record| record.sender = sender(taken[0]));
    assert!(refused(&left, |_| {}).contains("somebody else's way"));
    let left = change(&mut world, &|record| record.sender.upstream = 77.into());
    assert!(refused(&left, |_| {}).contains("somebody else's way"));
    let left = change(&mut world, &|record| record.entry.client = client(1).into());
    assert!(refused(&left, |_| {}).contains("one user's"));
    let left = change(&mut world, &|record| record.flags = 16);
    assert!(refused(&left, |_| {}).contains("unknown flags"));
    assert!(refused(&world.left(), |settings| settings.sessions = 1).contains("udp_sessions"));
    let mut left = world.left();
    let backend = backend_at(1).into();
    let (until, at, clean) = (9.into(), 1.into(), 1.into());
    left.rests.push(RestRecord { backend, sender: sender(taken[1]), until, at, clean });
    assert!(refused(&left, |_| {}).contains("in use"));
}

/// Changes some bytes.
fn spoil<R: IntoBytes + FromBytes + zerocopy::Immutable>(
    record: &mut R,
    random: &mut impl FnMut(u64) -> u64,
) {
    for _ in 0..random(4) {
        let bytes = record.as_mut_bytes();
        let at = random(bytes.len() as u64) as usize;
        bytes[at] = match random(3) {
            0 => random(256) as u8,
            1 => u8::MAX,
            _ => bytes[at] ^ 1 << random(8),
        };
    }
}

#[test]
fn no_record_whatever_is_in_it_does_any_harm() {
    let mut world = with_backends(2, |_| {});
    (1..=4).for_each(|number| assert!(world.up(number).is_ok()));
    world.pass(IDLE + Duration::from_secs(1));
    (3..=6).for_each(|number| assert!(world.up(number).is_ok()));
    let left = world.left();
    let mut new = with_backends(2, |_| {});
    new.now = world.now;
    let mut random = xorshift(0x5eed_0f5e_ed0f_5eed);
    let mut taken = 0;
    // Some ten records each.
    for _ in 0..2_000 {
        let mut spoilt =
            Left { flows: Parcel::default(), sources: Parcel::default(), ..world.left() };
        spoilt.flows.add_bytes([&b"udp"[..]].into_iter());
        for mut record in left.flows.records::<FlowRecord>() {
            spoil(&mut record, &mut random);
            spoilt.flows.push(&record);
        }
        for mut record in left.sources.records::<SourceRecord>() {
            spoil(&mut record, &mut random);
            spoilt.sources.push(&record);
        }
        spoilt.rests.iter_mut().for_each(|rest| spoil(rest, &mut random));
        new.core = Sessions::new(settings(), new.now);
        let snapshot = new.books.snapshot().clone();
        new.core.adopt(&snapshot);
        taken += usize::from(new.take_up(&spoilt).is_ok());
        for number in 3..=8 {
            let _ = new.up(number);
        }
        new.pass(Duration::from_millis(100));
        new.core.forget_all(new.now, &mut new.books);
        assert_eq!(new.metrics.counters.sessions_active.get(), 0);
    }
    assert!(taken > 20, "{taken} were taken up");
}
