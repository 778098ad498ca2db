//! The users' doors while the balancer runs. Owns which are open, their numbers, and what becomes of each
//! when other doors are asked for: kept, given to another service, opened or closed. Pure: sockets are opened
//! by `boot` and used by the workers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::base::time::Now;
use crate::cluster::doors::Claimed;
use crate::cluster::{DoorId, Doors, Protocol, ServiceId};
use crate::config::plans::DoorPlan;
use crate::config::services::ServiceConfig;

/// How long the place of a door stays empty once it has closed, beside the time that a user may take to say
/// what it wants: one who came by the old door must not be taken for one of the next.
const REST: Duration = Duration::from_secs(30);

/// A users' door that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenDoor {
    pub id: DoorId,
    /// Of the service whose table asks for it.
    pub name: Arc<str>,
    pub service: ServiceId,
    pub protocol: Protocol,
    /// As configured, if the port was said there or is new.
    pub asked: SocketAddr,
    /// Its port was chosen by the kernel if the configuration said 0.
    pub address: SocketAddr,
    /// Users speak TLS here, whatever their service says.
    pub is_tls: bool,
}

/// A door to be opened, and the number that it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDoor {
    pub id: DoorId,
    pub plan: DoorPlan,
    /// Whether the balancer itself has another door at this port, so that it is no other program's.
    pub beside_own: bool,
}

/// A door as it was opened.
#[derive(Debug)]
pub struct Opened {
    pub address: SocketAddr,
    /// One for each worker.
    pub sockets: Vec<OwnedFd>,
}

/// A way from the open doors to others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub open: Vec<NewDoor>,
    /// Those that stay, under another service.
    pub assign: Vec<(OpenDoor, DoorPlan)>,
    pub close: Vec<OpenDoor>,
}

impl Step {
    /// How many changes each worker is to be told of, at most.
    pub fn changes(&self) -> usize {
        self.open.len() + self.assign.len() + self.close.len()
    }
}

pub const NO_NUMBER: &str =
    "doors open and close faster than their numbers become free: try again in a minute";

/// Doors by what they are found by.
struct Known<'a> {
    by_address: BTreeMap<(Protocol, SocketAddr), &'a OpenDoor>,
    ports: BTreeSet<(bool, u16)>,
}

/// TCP and UDP have their own ports.
fn port(protocol: Protocol, address: SocketAddr) -> (bool, u16) {
    (protocol == Protocol::Udp, address.port())
}

impl<'a> Known<'a> {
    fn of(doors: impl Iterator<Item = &'a OpenDoor>) -> Known<'a> {
        let mut known = Known { by_address: BTreeMap::new(), ports: BTreeSet::new() };
        for door in doors {
            known.ports.insert(port(door.protocol, door.address));
            // A port that the kernel is to choose is a new one each time.
            for at in [door.address, door.asked].into_iter().filter(|at| at.port() != 0) {
                known.by_address.insert((door.protocol, at), door);
            }
        }
        known
    }
}

/// Every users' door.
#[derive(Debug, Default)]
pub struct UserDoors {
    open: Vec<OpenDoor>,
    /// UDP doors that are closed to new users; the sessions of the others have until then.
    closing: Vec<(OpenDoor, Now)>,
    /// The places of doors that have closed, and until when they stay empty.
    resting: VecDeque<(DoorId, Now)>,
    /// The first place that no door has had.
    next: u16,
}

impl UserDoors {
    /// Those that are open, those of the built-in services first.
    pub fn open(&self) -> &[OpenDoor] {
        &self.open
    }

    /// The first number that no door has had.
    pub fn next_number(&self) -> u16 {
        self.next
    }

    /// Doors that are opened from now on have no number below this one: another process has given those.
    pub fn number_from(&mut self, first: u16) {
        self.next = self.next.max(first);
    }

    /// One more door that is where another is, with a number of its own.
    ///
    /// # Errors
    /// That there are no more numbers for doors.
    pub fn open_beside(&mut self, door: &OpenDoor) -> Result<OpenDoor, String> {
        let id = DoorId(self.next);
        self.next = self.next.checked_add(1).ok_or(NO_NUMBER)?;
        let beside = OpenDoor { id, ..door.clone() };
        self.open.push(beside.clone());
        Ok(beside)
    }

    /// Where the first door of a service is at which users need not speak TLS.
    pub fn at(&self, service: ServiceId) -> Option<SocketAddr> {
        let mut open = self.open.iter();
        open.find(|door| door.service == service && !door.is_tls).map(|door| door.address)
    }

    /// Where users of the built-in API service speak TLS.
    pub fn api_tls(&self) -> Option<SocketAddr> {
        let common = ServiceId::built_in(Protocol::Api);
        let mut open = self.open.iter();
        open.find(|door| door.service == common && door.is_tls).map(|door| door.address)
    }

    /// The way to the doors of these plans.
    ///
    /// # Errors
    /// That there are no more numbers for doors.
    pub fn step(&self, plans: &[DoorPlan], now: Now) -> Result<Step, String> {
        let known = Known::of(self.open.iter().chain(self.closing.iter().map(|(door, _)| door)));
        let is_closing: BTreeSet<DoorId> = self.closing.iter().map(|(door, _)| door.id).collect();
        let mut rested = self.resting.iter().take_while(|(_, until)| now >= *until);
        let (mut step, mut next, mut kept) = (Step::default(), self.next, BTreeSet::new());
        for plan in plans {
            let found = known.by_address.get(&(plan.protocol, plan.address));
            if let Some(door) = found.filter(|door| kept.insert(door.id)) {
                let same = door.service == plan.service
                    && door.name == plan.name.name
                    && door.is_tls == plan.is_tls;
                if !same || is_closing.contains(&door.id) {
                    step.assign.push(((*door).clone(), plan.clone()));
                }
                continue;
            }
            let id = match rested.next() {
                Some((id, _)) => *id,
                None => {
                    let id = DoorId(next);
                    next = next.checked_add(1).ok_or(NO_NUMBER)?;
                    id
                }
            };
            let beside_own = known.ports.contains(&port(plan.protocol, plan.address));
            step.open.push(NewDoor { id, plan: plan.clone(), beside_own });
        }
        let gone = self.open.iter().filter(|door| !kept.contains(&door.id));
        step.close = gone.cloned().collect();
        Ok(step)
    }

    /// Takes a step; `at` says where each door that it opens is. A UDP door that closes lets its sessions
    /// go on until `until`; a user may take `patience` to say what it wants.
    pub fn take(
        &mut self,
        step: &Step,
        at: &[SocketAddr],
        now: Now,
        until: Now,
        patience: Duration,
    ) {
        // A port that the kernel has chosen is one like any other from now on.
        for door in self.open.iter_mut().filter(|door| door.asked.port() == 0) {
            door.asked = door.address;
        }
        for (door, plan) in &step.assign {
            let next = OpenDoor {
                name: Arc::clone(&plan.name.name),
                service: plan.service,
                is_tls: plan.is_tls,
                ..door.clone()
            };
            self.closing.retain(|(other, _)| other.id != door.id);
            match self.open.iter_mut().find(|other| other.id == door.id) {
                Some(open) => *open = next,
                None => self.open.push(next),
            }
        }
        for NewDoor { id, .. } in &step.open {
            self.resting.retain(|(resting, _)| resting != id);
            self.next = self.next.max(id.0.saturating_add(1));
        }
        let opened = step.open.iter().zip(at).map(|(NewDoor { id, plan, .. }, address)| OpenDoor {
            id: *id,
            name: Arc::clone(&plan.name.name),
            service: plan.service,
            protocol: plan.protocol,
            asked: plan.address,
            address: *address,
            is_tls: plan.is_tls,
        });
        self.open.extend(opened);
        self.open.retain(|door| !step.close.iter().any(|gone| gone.id == door.id));
        for door in &step.close {
            match door.protocol {
                Protocol::Udp => self.closing.push((door.clone(), until)),
                Protocol::Tcp | Protocol::Api => self.rest(door.id, now.plus(patience)),
            }
        }
    }

    fn rest(&mut self, id: DoorId, from: Now) {
        self.resting.push_back((id, from.plus(REST)));
    }

    /// Takes out the UDP doors to be closed now: their time is over, or nobody is left in their service.
    pub fn close_due(&mut self, now: Now, is_gone: impl Fn(ServiceId) -> bool) -> Vec<OpenDoor> {
        let is_due = |(door, until): &mut (OpenDoor, Now)| now >= *until || is_gone(door.service);
        let due: Vec<OpenDoor> =
            self.closing.extract_if(.., is_due).map(|(door, _)| door).collect();
        due.iter().for_each(|door| self.rest(door.id, now));
        due
    }

    /// Which service gets the new users of a closing UDP door: that of the open door for all addresses on its
    /// port, from which the kernel keeps them while the closing one is there. Nobody if there is none.
    pub fn heir(&self, closing: &OpenDoor) -> ServiceId {
        let at = closing.address;
        let takes_all = |door: &&OpenDoor| {
            let OpenDoor { protocol, address, .. } = door;
            let is_wider = address.is_ipv6() && address.ip() != at.ip() || at.is_ipv4();
            *protocol == closing.protocol
                && address.port() == at.port()
                && address.ip().is_unspecified()
                && is_wider
        };
        self.open.iter().find(takes_all).map_or(ServiceId::NOBODY, |door| door.service)
    }

    /// How many UDP doors are still to be closed.
    pub fn closing(&self) -> usize {
        self.closing.len()
    }

    /// Whether a UDP door of this service is still to be closed.
    pub fn is_closing(&self, service: ServiceId) -> bool {
        self.closing.iter().any(|(door, _)| door.service == service)
    }

    /// What the requests at every API door are for, and the streams at a TCP door that several share. Those who came by one that has closed since `before`
    /// are served as they were there.
    pub fn routing(&self, claims: &Claimed, before: &Doors) -> Doors {
        let mut doors = Doors::default();
        for (id, _) in &self.resting {
            before.get(*id).inspect(|routing| doors.set(*id, (*routing).clone()));
        }
        for door in self.open.iter().filter(|door| door.protocol != Protocol::Udp) {
            let routing = claims.at(door.address, door.service);
            let routing = routing.or_else(|| claims.at(door.asked, door.service));
            debug_assert!(
                routing.is_some() || door.protocol == Protocol::Tcp,
                "a service listens at each door"
            );
            routing.into_iter().for_each(|routing| doors.set(door.id, routing.clone()));
        }
        doors
    }
}

/// Gives services the addresses of their doors, including ports that the kernel has just chosen.
pub fn put_addresses(open: &[OpenDoor], services: &mut [ServiceConfig]) {
    // A port that the kernel chose is one service's, and one entry's of its list.
    let is_chosen = |listen: &SocketAddr| listen.port() == 0;
    let key = |protocol: Protocol, listen: SocketAddr, service: ServiceId, is_tls: bool| {
        (protocol, listen, is_chosen(&listen).then_some(service), is_tls)
    };
    let mut left = BTreeMap::<_, VecDeque<SocketAddr>>::new();
    for OpenDoor { protocol, asked, service, address, is_tls, .. } in open {
        left.entry(key(*protocol, *asked, *service, *is_tls)).or_default().push_back(*address);
    }
    for service in services {
        let (protocol, id) = (service.protocol, service.id);
        let plain = service.listen.iter_mut().map(|listen| (listen, false));
        for (listen, is_tls) in plain.chain(service.listen_tls.iter_mut().map(|it| (it, true))) {
            let Some(own) = left.get_mut(&key(protocol, *listen, id, is_tls)) else {
                continue;
            };
            let next = if is_chosen(listen) { own.pop_front() } else { own.front().copied() };
            *listen = next.unwrap_or(*listen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Doorway;
    use crate::cluster::doors::{Claimant, Requests};
    use crate::cluster::route::{Claim, Host};
    use crate::config::plans::Name;

    fn at(secs: u64) -> Now {
        Now::from_nanos(secs * 1_000_000_000)
    }

    fn address(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }

    fn plan(name: &str, service: u16, protocol: Protocol, port: u16) -> DoorPlan {
        let (name, service) = (Name::service(name), ServiceId(service));
        DoorPlan { name, service, protocol, address: address(port), is_tls: false }
    }

    /// Takes the step to these plans. The kernel chooses 9000 where it is left to it. Returns the numbers of
    /// the doors that are opened, given to others, and closed.
    fn go(doors: &mut UserDoors, plans: &[DoorPlan], now: Now) -> [Vec<u16>; 3] {
        let step = doors.step(plans, now).unwrap();
        let chosen = |door: &NewDoor| match door.plan.address.port() {
            0 => address(9000),
            _ => door.plan.address,
        };
        let at: Vec<_> = step.open.iter().map(chosen).collect();
        doors.take(&step, &at, now, now.plus(Duration::from_secs(5)), Duration::from_secs(10));
        [
            step.open.iter().map(|door| door.id.0).collect(),
            step.assign.iter().map(|(door, _)| door.id.0).collect(),
            step.close.iter().map(|door| door.id.0).collect(),
        ]
    }

    fn shown(doors: &UserDoors) -> Vec<(u16, u16, u16)> {
        doors.open().iter().map(|it| (it.id.0, it.service.0, it.address.port())).collect()
    }

    #[test]
    fn what_is_asked_for_as_before_stays_as_it_is() {
        use Protocol::{Tcp, Udp};
        let mut doors = UserDoors::default();
        let plans = [plan("a", 3, Tcp, 1), plan("a", 3, Tcp, 0), plan("b", 4, Udp, 1)];
        assert_eq!(go(&mut doors, &plans, at(0)), [vec![0, 1, 2], vec![], vec![]]);
        assert_eq!(shown(&doors), [(0, 3, 1), (1, 3, 9000), (2, 4, 1)]);
        let again = [plan("a", 3, Tcp, 1), plan("a", 3, Tcp, 9000), plan("b", 4, Udp, 1)];
        assert_eq!(go(&mut doors, &again, at(0)), [const { Vec::<u16>::new() }; 3]);
        // A port that the kernel is to choose is a new one.
        assert_eq!(go(&mut doors, &plans, at(0)), [vec![3], vec![], vec![1]]);
    }

    #[test]
    fn a_service_that_wants_one_more_port_of_the_kernels_choice_keeps_the_first() {
        let mut doors = UserDoors::default();
        let tcp = |port| plan("a", 3, Protocol::Tcp, port);
        go(&mut doors, &[tcp(0)], at(0));
        let step = doors.step(&[tcp(9000), tcp(0)], at(0)).unwrap();
        doors.take(&step, &[address(9001)], at(0), at(5), Duration::ZERO);
        let listen = vec![address(9000), address(0)];
        let mut services =
            [ServiceConfig { id: ServiceId(3), listen, ..ServiceConfig::new("a", Protocol::Tcp) }];
        put_addresses(doors.open(), &mut services);
        assert_eq!(services[0].listen, [address(9000), address(9001)]);
    }

    #[test]
    fn a_door_is_given_to_the_next_service_of_its_kind_and_opened_for_one_of_another() {
        use Protocol::{Api, Tcp, Udp};
        let mut doors = UserDoors::default();
        go(&mut doors, &[plan("a", 3, Tcp, 1)], at(0));
        assert_eq!(go(&mut doors, &[plan("b", 4, Tcp, 1)], at(0)), [vec![], vec![0], vec![]]);
        assert_eq!(shown(&doors), [(0, 4, 1)]);
        let step = doors.step(&[plan("c", 5, Api, 1), plan("d", 6, Udp, 1)], at(0)).unwrap();
        let beside: Vec<bool> = step.open.iter().map(|door| door.beside_own).collect();
        assert_eq!(beside, [true, false], "the port is ours for streams only");
        assert_eq!(step.close.len(), 1);
    }

    #[test]
    fn a_door_at_which_tls_is_spoken_from_now_on_is_the_same_door() {
        let mut doors = UserDoors::default();
        let plain = plan("a", 3, Protocol::Api, 1);
        let sealed = DoorPlan { is_tls: true, ..plain.clone() };
        go(&mut doors, &[plain], at(0));
        assert_eq!(go(&mut doors, std::slice::from_ref(&sealed), at(0)), [vec![], vec![0], vec![]]);
        assert!(doors.open()[0].is_tls);
        assert_eq!(go(&mut doors, &[sealed], at(0)), [const { Vec::<u16>::new() }; 3]);
        assert_eq!((doors.at(ServiceId(3)), doors.api_tls()), (None, None), "it is its service's");
    }

    #[test]
    fn a_service_keeps_apart_which_ports_of_the_kernels_choice_speak_tls() {
        let mut doors = UserDoors::default();
        let plain = plan("a", 3, Protocol::Api, 0);
        let plans = [DoorPlan { is_tls: true, ..plain.clone() }, plain];
        let step = doors.step(&plans, at(0)).unwrap();
        doors.take(&step, &[address(9000), address(9001)], at(0), at(5), Duration::ZERO);
        let (listen, listen_tls) = (vec![address(0)], vec![address(0)]);
        let new = ServiceConfig::new("a", Protocol::Api);
        let mut services = [ServiceConfig { id: ServiceId(3), listen, listen_tls, ..new }];
        put_addresses(doors.open(), &mut services);
        assert_eq!(services[0].doors().collect::<Vec<_>>(), [address(9001), address(9000)]);
    }

    #[test]
    fn a_udp_door_closes_when_its_sessions_have_had_their_time_or_have_ended() {
        use Protocol::Udp;
        let mut doors = UserDoors::default();
        let (a, b) = (plan("a", 3, Udp, 1), plan("b", 4, Udp, 2));
        go(&mut doors, &[a.clone(), b.clone()], at(0));
        assert_eq!(go(&mut doors, &[], at(0)), [vec![], vec![], vec![0, 1]]);
        assert!(doors.open().is_empty() && doors.is_closing(ServiceId(3)));
        let due = |doors: &mut UserDoors, now, gone: u16| -> Vec<u16> {
            doors.close_due(now, |id| id.0 == gone).iter().map(|door| door.id.0).collect()
        };
        assert_eq!(due(&mut doors, at(1), 4), [1]);
        // Before that it can be had again.
        assert_eq!(go(&mut doors, &[plan("c", 5, Udp, 1)], at(2)), [vec![], vec![0], vec![]]);
        assert_eq!((shown(&doors), doors.closing()), (vec![(0, 5, 1)], 0));
        go(&mut doors, &[], at(2));
        assert_eq!(due(&mut doors, at(6), 0), [0; 0]);
        assert_eq!(due(&mut doors, at(7), 0), [0]);
    }

    #[test]
    fn users_of_a_udp_door_that_closes_are_those_of_the_one_for_all_addresses() {
        use Protocol::{Tcp, Udp};
        let plan = |service, protocol, at: &str| DoorPlan {
            address: at.parse().unwrap(),
            ..plan("a", service, protocol, 1)
        };
        for (closing, all, heir) in [
            ("192.0.2.1:53", plan(4, Udp, "0.0.0.0:53"), Some(4)),
            ("192.0.2.1:53", plan(4, Udp, "[::]:53"), Some(4)),
            ("[2001:db8::1]:53", plan(4, Udp, "[::]:53"), Some(4)),
            ("0.0.0.0:53", plan(4, Udp, "[::]:53"), Some(4)),
            ("[2001:db8::1]:53", plan(4, Udp, "0.0.0.0:53"), None),
            ("[::]:53", plan(4, Udp, "0.0.0.0:53"), None),
            ("192.0.2.1:53", plan(4, Udp, "[::]:54"), None),
            ("192.0.2.1:53", plan(4, Udp, "192.0.2.2:53"), None),
            ("192.0.2.1:53", plan(4, Tcp, "[::]:53"), None),
        ] {
            let mut doors = UserDoors::default();
            go(&mut doors, &[plan(3, Udp, closing)], at(0));
            let before = doors.open()[0].clone();
            go(&mut doors, &[all], at(1));
            let heir = heir.map_or(ServiceId::NOBODY, ServiceId);
            assert_eq!(doors.heir(&before), heir, "{closing} {:?}", doors.open());
        }
    }

    #[test]
    fn a_number_rests_before_another_door_gets_it() {
        use Protocol::Tcp;
        let mut doors = UserDoors::default();
        go(&mut doors, &[plan("a", 3, Tcp, 1), plan("a", 3, Tcp, 2)], at(0));
        go(&mut doors, &[plan("a", 3, Tcp, 2)], at(0));
        let [opened, ..] = go(&mut doors, &[plan("a", 3, Tcp, 2), plan("b", 4, Tcp, 1)], at(39));
        assert_eq!(opened, [2]);
        let more = [plan("a", 3, Tcp, 2), plan("b", 4, Tcp, 1), plan("c", 5, Tcp, 5)];
        assert_eq!(go(&mut doors, &more, at(40))[0], [0], "rested, the patience of users included");
        assert_eq!(go(&mut doors, &[], at(100))[2], [1, 2, 0]);
        let all: Vec<_> = (0..4).map(|port| plan("d", 6, Tcp, 10 + port)).collect();
        assert_eq!(go(&mut doors, &all, at(200))[0], [1, 2, 0, 3]);
    }

    #[test]
    fn numbers_run_out_only_when_doors_open_faster_than_they_rest() {
        let mut doors = UserDoors { next: u16::MAX, ..UserDoors::default() };
        let two = [plan("a", 3, Protocol::Tcp, 1), plan("a", 3, Protocol::Tcp, 2)];
        assert_eq!(doors.step(&two, at(0)).unwrap_err(), NO_NUMBER);
        doors.resting.extend([(DoorId(7), at(0)), (DoorId(8), at(0))]);
        assert_eq!(go(&mut doors, &two, at(1))[0], [7, 8]);
    }

    #[test]
    fn users_of_a_closed_door_are_served_as_they_were_there() {
        use Protocol::Api;
        let claimed = |services: &[(u16, u16)]| {
            let claim = |&(service, port): &(u16, u16)| {
                let service = ServiceId(service);
                let claims = vec![Claim { host: Host::Rest, path: "".into(), service }];
                Claimant { service, listen: vec![address(port)], claims }
            };
            Claimed::of(&[], &services.iter().map(claim).collect::<Vec<_>>()).unwrap()
        };
        let mut doors = UserDoors::default();
        go(&mut doors, &[plan("a", 3, Api, 1), plan("b", 4, Api, 2)], at(0));
        let before = doors.routing(&claimed(&[(3, 1), (4, 2)]), &Doors::default());
        go(&mut doors, &[plan("b", 4, Api, 1)], at(0));
        let after = doors.routing(&claimed(&[(4, 1)]), &before);
        for (door, wanted) in [(0, 4), (1, 4)] {
            let user = Doorway { door: DoorId(door), service: ServiceId(9), is_tls: false };
            let found = after.at(user);
            assert!(matches!(found, Requests::All(id) if id.0 == wanted), "{door}: {found:?}");
        }
    }
}
