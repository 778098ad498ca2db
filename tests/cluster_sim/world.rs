//! The control core between played workers, backends, operators and files. Owns the clock and the order in
//! which things happen; what must hold is in `laws`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use lb::base::publish::Publisher;
use lb::base::time::Now;
use lb::cluster::registry::{Change, Lasts, Registration, Registry};
use lb::cluster::seats::Seats;
use lb::cluster::source::Source;
use lb::cluster::{AskedCheck, BackendId, Protocol, ServiceId, Snapshot};
use lb::config::reload::Prepared;
use lb::config::services::ServiceIds;
use lb::config::{Config, plans};
use lb::control::certificates::Watch;
use lb::control::checker::Failure;
use lb::control::checks::Due;
use lb::control::contact::Port;
use lb::control::doors::{NewDoor, Opened, UserDoors};
use lb::control::hub::Hub;
use lb::control::hub::aside::Trial;
use lb::control::mailbox::Mailbox;
use lb::control::reload::{Asked, Entrance, Reload};
use lb::control::workers::Workers;
use lb::session::{EndReason, SessionId};
use lb::worker::link::{ControlEnd, DoorChange, Listener, Order, Refusal, Report, link};

use crate::laws::Laws;
use crate::plan::{self, PLACES, SEATS, STALL_MAX, WORKERS};
use crate::random::Random;
use crate::sky::Sky;
use crate::worker::Played;

/// A backend's process on its control connection.
pub struct Member {
    pub source: Source,
    mailbox: Rc<Mailbox>,
    /// It does not answer hellos any more.
    hangs: u32,
}

/// What the boxes of a reload share with the world.
#[derive(Default)]
struct Outside {
    /// The file, or that it cannot be read.
    file: RefCell<Config>,
    unreadable: Cell<bool>,
    /// The next door cannot be opened.
    taken: Cell<bool>,
    /// The doors that were opened by the reload under way.
    opened: RefCell<Vec<NewDoor>>,
    ports: Cell<u16>,
}

pub struct World {
    pub random: Random,
    pub now: Now,
    pub sky: Rc<Sky>,
    pub hub: Rc<RefCell<Hub>>,
    entrance: RefCell<Entrance>,
    reload: Reload,
    outside: Rc<Outside>,
    pub seats: [Arc<Seats>; 2],
    members: Vec<Member>,
    checks: Vec<(Now, Due)>,
    /// Addresses whose check fails.
    sick: BTreeMap<SocketAddr, bool>,
    revivals: Vec<(Now, BackendId)>,
    tick_at: Now,
    stall_at: Now,
    pub laws: Laws,
}

fn joined(snapshots: &Publisher<Snapshot>) -> (Vec<ControlEnd>, Vec<Played>) {
    let urgent = Arc::new(tokio::sync::Notify::new());
    let ends = (0..WORKERS as u8)
        .map(|number| link(number, SEATS, snapshots.subscribe(), Arc::clone(&urgent)).unwrap());
    let (control, workers): (Vec<_>, Vec<_>) = ends.unzip();
    let all: Arc<[_]> = control.iter().map(|end| Arc::clone(&end.metrics)).collect();
    let workers = workers.into_iter().map(|end| Played::new(end, Arc::clone(&all))).collect();
    (control, workers)
}

fn opened(outside: &Outside, doors: &[NewDoor]) -> Result<Vec<Opened>, String> {
    if outside.taken.replace(false) {
        return Err("the port is taken".into());
    }
    outside.opened.borrow_mut().extend(doors.iter().cloned());
    let open = |door: &NewDoor| {
        let mut address = door.plan.address;
        if address.port() == 0 {
            outside.ports.set(outside.ports.get() + 1);
            address.set_port(outside.ports.get());
        }
        let socket = || std::fs::File::open("/dev/null").unwrap().into();
        Opened { address, sockets: std::iter::repeat_with(socket).take(WORKERS).collect() }
    };
    Ok(doors.iter().map(open).collect())
}

fn reload(config: &Config, seats: &Arc<Seats>, outside: &Rc<Outside>) -> Reload {
    let (file, door) = (Rc::clone(outside), Rc::clone(outside));
    Reload {
        fit: Box::new(|_| Ok(Vec::new())),
        open: Box::new(move |doors| opened(&door, doors)),
        certify: Box::new(|_, _| Ok(Arc::default())),
        reread: Box::new(move || match file.unreadable.replace(false) {
            true => Err("the file cannot be read".into()),
            false => Ok(file.file.borrow().clone()),
        }),
        seats: Arc::clone(seats),
        asked: Asked::of(config),
        ids: ServiceIds::behind(config),
        prepared: Prepared::for_doors_of(config),
        watch: Watch::new(&[], Now::default()),
    }
}

impl World {
    pub fn new(seed: u64) -> World {
        let now = Now::from_nanos(1_000_000_000_000);
        let config = plan::first();
        let seats = [Arc::new(Seats::new(SEATS)), Arc::new(Seats::new(SEATS))];
        let first = Snapshot::built_in(config.terms(), |protocol| match protocol {
            Protocol::Udp => Arc::clone(&seats[1]),
            _ => Arc::clone(&seats[0]),
        });
        let services = first.services.clone();
        let snapshots = Publisher::new(first);
        let (mut control, workers) = joined(&snapshots);
        let doors = first_doors(&config, &mut control, now);
        let workers_of = Workers::new(control);
        let mut hub = Hub::new(Arc::new(config.clone()), workers_of, snapshots, now);
        hub.registry = Registry::new(PLACES, &services);
        hub.doors = doors;
        hub.start(now);
        let outside = Rc::new(Outside { ports: Cell::new(20_000), ..Outside::default() });
        outside.file.replace(config.clone());
        World {
            random: Random::new(seed),
            now,
            sky: Sky::new(workers, now, seed),
            hub: Rc::new(RefCell::new(hub)),
            entrance: RefCell::new(Entrance::new(&config).unwrap()),
            reload: reload(&config, &seats[0], &outside),
            outside,
            seats,
            members: Vec::new(),
            checks: Vec::new(),
            sick: BTreeMap::new(),
            revivals: Vec::new(),
            tick_at: now,
            stall_at: now,
            laws: Laws::default(),
        }
    }

    /// Lets a little time pass, in which something happens.
    pub fn step(&mut self) {
        self.pass(Duration::from_millis(50));
        match self.random.below(40) {
            0 => self.reload(true),
            1..=3 => self.welcome(),
            4..=12 => self.hear_of_a_member(),
            13..=16 => self.operate(),
            17..=18 => self.turn_weather(),
            19 => self.say_late(),
            20 => self.crowd_orders(),
            _ => self.come(),
        }
        self.beat();
    }

    fn pass(&mut self, most: Duration) {
        self.now = self.now.plus(self.random.any_time(most));
        self.sky.now.set(self.now);
    }

    /// What happens by itself.
    fn beat(&mut self) {
        self.turn_workers();
        if self.now >= self.tick_at {
            self.tick();
        }
        if self.random.one_in(3) {
            self.hub.borrow_mut().publish();
        }
        self.check();
        self.revive();
        self.read_mail();
        let picks = self.sky.picks.take();
        self.laws.picked(&picks);
        self.laws.hold(
            &self.hub.borrow(),
            &mut self.sky.workers.borrow_mut(),
            &self.seats,
            self.now,
        );
    }

    fn turn_workers(&mut self) {
        let late = self.now.minus(Duration::from_millis(200));
        for number in 0..WORKERS {
            let is_late = self.sky.workers.borrow()[number].turned < late;
            if is_late || self.random.half() {
                self.sky.turn(number);
            }
        }
        // One at a time, and never twice within the time that a mark may take.
        if self.now >= self.stall_at && self.random.one_in(30) {
            let most = STALL_MAX.as_millis() as u64;
            let until = self.now.plus(Duration::from_millis(self.random.between(100, most)));
            let number = self.random.place(WORKERS);
            self.sky.workers.borrow_mut()[number].stalled_until = until;
            self.stall_at = until.plus(Duration::from_millis(1200));
        }
    }

    fn tick(&mut self) {
        let outcome = self.hub.borrow_mut().tick(self.now);
        let wait = if self.random.one_in(20) { 600 } else { 100 };
        self.tick_at = self.now.plus(Duration::from_millis(self.random.between(10, wait)));
        for backend in outcome.revive {
            self.revivals.push((self.now.plus(Duration::from_millis(300)), backend));
        }
    }

    fn revive(&mut self) {
        for place in (0..self.revivals.len()).rev() {
            let (at, backend) = self.revivals[place];
            if self.now < at {
                continue;
            }
            let mut hub = self.hub.borrow_mut();
            let Some(attempt) = hub.next_try(backend) else {
                self.revivals.swap_remove(place);
                continue;
            };
            let is_back = match &attempt.trial {
                Trial::None => true,
                Trial::Connect(Port { address, .. }, _) => {
                    !self.sky.refusing.borrow().contains(address)
                }
                Trial::Ask(target) => {
                    !self.sky.refusing.borrow().contains(&target.port.address) && self.random.half()
                }
            };
            if !is_back {
                self.revivals[place].0 = self.now.plus(Duration::from_millis(300));
            } else {
                hub.restore(backend, &attempt.trial, self.now);
                self.revivals.swap_remove(place);
            }
        }
    }

    /// Checks begin, and end after a while.
    fn check(&mut self) {
        let mut hub = self.hub.borrow_mut();
        while let Some((due, _)) = hub.next_check(self.now) {
            let took = self.random.any_time(Duration::from_millis(300));
            self.checks.push((self.now.plus(took), due));
        }
        for place in (0..self.checks.len()).rev() {
            let (at, due) = self.checks[place];
            if self.now < at {
                continue;
            }
            self.checks.swap_remove(place);
            let address = hub.registry.get(due.id).map(|entry| entry.backend.address);
            let fails = address.is_some_and(|it| self.sick.get(&it) == Some(&true));
            let sick = || Err(Failure::by_backend("it is sick".to_owned()));
            let outcome = if fails { sick() } else { Ok(()) };
            hub.checked(due, outcome, Duration::from_millis(3), self.now);
            self.laws.checked(&hub, due, !fails, self.now);
        }
    }

    /// What backends read on their control connections.
    fn read_mail(&mut self) {
        for member in &self.members {
            let next = pin!(member.mailbox.next());
            let read = next.poll(&mut Context::from_waker(Waker::noop()));
            if let Poll::Ready(Some(bytes)) = read {
                self.laws.told(member.source, &String::from_utf8(bytes).unwrap());
            }
        }
    }

    /// Users come to a door, wherever it is.
    fn come(&mut self) {
        let mut workers = self.sky.workers.borrow_mut();
        let worker = &mut workers[self.random.place(WORKERS)];
        let ids: Vec<_> = worker.doors.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        for _ in 0..self.random.between(1, 12) {
            let user =
                ([10, 0, 0, self.random.below(30) as u8], self.random.between(1024, 9000) as u16);
            let door = worker.doors.get_mut(&self.random.pick(&ids)).unwrap();
            door.waiting.push(user.into());
        }
    }

    fn welcome(&mut self) {
        if self.members.len() >= 6 {
            return;
        }
        let mailbox = Rc::<Mailbox>::default();
        let peer = ([192, 0, 2, 1], 40_000).into();
        let source = self.hub.borrow_mut().welcome(peer, Rc::clone(&mailbox), self.now);
        self.members.push(Member { source, mailbox, hangs: 0 });
    }

    fn hear_of_a_member(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let place = self.random.place(self.members.len());
        let source = self.members[place].source;
        match self.random.below(12) {
            0 => self.farewell(place),
            1 => self.miss(place),
            2..=3 => self.leave_or_drain(source),
            _ => self.register(source),
        }
    }

    fn farewell(&mut self, place: usize) {
        let member = self.members.swap_remove(place);
        let own = self.hub.borrow();
        own.registry.of_source(member.source).for_each(|it| self.laws.taken_out(it.backend.id));
        drop(own);
        self.hub.borrow_mut().farewell(member.source, "it has closed the connection", self.now);
    }

    fn miss(&mut self, place: usize) {
        self.members[place].hangs += 1;
        let misses = self.members[place].hangs;
        self.hub.borrow_mut().missed(self.members[place].source, misses);
        if misses >= 3 {
            self.farewell(place);
        }
    }

    fn register(&mut self, source: Source) {
        let mut hub = self.hub.borrow_mut();
        // Asked for by a name, as in the control protocol.
        let services: Vec<ServiceId> = hub.registry.known().map(|service| service.id).collect();
        let service = self.random.pick(&services);
        let groups = Arc::clone(&hub.registry.service(service).groups);
        let group =
            (!groups.is_empty()).then(|| Arc::clone(&groups[self.random.place(groups.len())].name));
        let is_udp = hub.registry.service(service).kind == Protocol::Udp;
        let asks = !is_udp && self.random.one_in(4);
        let check = asks.then(|| match self.random.half() {
            true => AskedCheck::Tcp,
            false => AskedCheck::Http("/up".into()),
        });
        let wanted = Registration {
            source,
            service,
            address: plan::backend(&mut self.random),
            weight: self.random.between(1, 3) as u16,
            name: None,
            group,
            proxy: false,
            http2: false,
            tls: None,
            probe: self.random.half() || check == Some(AskedCheck::Tcp),
            check,
        };
        let address = wanted.address;
        if let Ok(applied) = hub.apply(Change::Register(wanted), self.now) {
            let which = (applied.backend.unwrap(), applied.joined);
            self.laws.registered(&hub, source, service, address, which);
        }
    }

    fn leave_or_drain(&mut self, source: Source) {
        let mut hub = self.hub.borrow_mut();
        let own: Vec<(ServiceId, SocketAddr)> = (hub.registry.of_source(source))
            .map(|entry| (entry.backend.service, entry.backend.address))
            .collect();
        if own.is_empty() {
            return;
        }
        let (service, address) = self.random.pick(&own);
        let backend = hub.registry.find(service, address).unwrap().backend.id;
        let change = match self.random.below(5) {
            0..=1 => {
                self.laws.taken_out(backend);
                Change::Unregister { source, service, address }
            }
            2 => Change::Undrain { source, service, address },
            _ => Change::Drain { source, service, address, lasts: lasts(&mut self.random, 2000) },
        };
        match hub.apply(change.clone(), self.now) {
            Ok(_) => self.laws.drain_changes(&hub, backend, &change),
            // What is drained with its service, or by an operator, stays so.
            Err(fault) => assert!(matches!(change, Change::Undrain { .. }), "its own: {fault}"),
        }
    }

    /// An operator does something to a backend, or shifts users.
    fn operate(&mut self) {
        let mut hub = self.hub.borrow_mut();
        let ids: Vec<BackendId> = hub.registry.entries().map(|entry| entry.backend.id).collect();
        let backend = if ids.is_empty() { BackendId(0) } else { self.random.pick(&ids) };
        match self.random.below(5) {
            which @ 0..=1 => {
                let change = match which {
                    0 => Change::DrainBackend { backend, lasts: lasts(&mut self.random, 1500) },
                    _ => Change::UndrainBackend { backend },
                };
                if hub.apply(change.clone(), self.now).is_ok() {
                    self.laws.drain_changes(&hub, backend, &change);
                }
            }
            2 => {
                let weight = self.random.between(1, 4) as u16;
                let _ = hub.apply(Change::Weigh { backend, weight }, self.now);
            }
            _ => {
                let (name, _) = self.random.pick(&plan::NAMES);
                let group = self.random.pick(&["blue", "green", "grey"]).to_owned();
                let wanted = [(group, self.random.pick(&[0, 1, 5, 100, 101]))];
                if hub.shift(name, &wanted).is_ok() {
                    self.laws.shifted(name, &wanted);
                }
            }
        }
    }

    /// Backends fall ill and recover, their data ports apart from what is checked.
    fn turn_weather(&mut self) {
        let address = plan::backend(&mut self.random);
        let mut refusing = self.sky.refusing.borrow_mut();
        match self.random.half() {
            true if !refusing.remove(&address) => drop(refusing.insert(address)),
            true => {}
            false => drop(self.sick.insert(address, self.random.half())),
        }
        drop(refusing);
        self.leave_unanswered();
    }

    /// A backend leaves a few requests unanswered, with which workers come one by one.
    fn leave_unanswered(&mut self) {
        let hub = self.hub.borrow();
        let is_api = |id: ServiceId| hub.registry.service(id).kind == Protocol::Api;
        let all = hub.registry.entries().filter(|it| is_api(it.backend.service));
        let all: Vec<BackendId> = all.map(|it| it.backend.id).collect();
        if all.is_empty() {
            return;
        }
        let backend = self.random.pick(&all);
        for _ in 0..self.random.between(1, 4) {
            let since = self.now.minus(self.random.any_time(Duration::from_secs(2)));
            let report = Report::Unanswered { backend, since, now: self.now };
            self.sky.workers.borrow_mut()[self.random.place(WORKERS)].say_late(report);
        }
    }

    /// A worker speaks of what is long gone.
    fn say_late(&mut self) {
        let Some((service, backend)) = self.laws.somebody_gone(&mut self.random) else { return };
        let client = ([10, 0, 0, 1], 5000).into();
        let id = SessionId { worker: 0, place: 3, generation: 9 };
        let report = match self.random.below(5) {
            4 => Report::Unanswered { backend, since: self.now, now: self.now },
            0 => Report::Refused { service, client, why: Refusal::NoBackend },
            1 => Report::Started { id, service, client, is_tls: false, backend },
            2 => Report::ConnectFailed { backend, errno: 111 },
            _ => Report::OutOfRoom {
                service,
                shortage: lb::worker::link::Shortage::Place,
                backend: Some(backend),
                datagrams: 3,
            },
        };
        self.sky.workers.borrow_mut()[0].say_late(report);
    }

    /// Fills the queue of orders to a stalled worker.
    fn crowd_orders(&mut self) {
        let stalled = |it: &Played| it.stalled_until > self.now;
        let Some(number) = self.sky.workers.borrow().iter().position(stalled) else { return };
        for place in 0..1100 {
            let id = SessionId { worker: 9, place, generation: 1 };
            let order = Order::EndSession { id, reason: EndReason::Operator };
            self.hub.borrow_mut().workers.order_one(number as u8, order);
        }
    }

    /// Another file is read. With `faults`, it may be one that cannot be applied.
    fn reload(&mut self, faults: bool) {
        let before = self.outside.file.borrow().clone();
        plan::edit(&mut self.outside.file.borrow_mut(), &mut self.random);
        self.outside.unreadable.set(faults && self.random.one_in(15));
        self.outside.taken.set(faults && self.random.one_in(15));
        self.read_file();
        if self.hub.borrow().reload.refused.is_some() {
            self.outside.file.replace(before);
        }
    }

    fn read_file(&mut self) {
        self.outside.opened.borrow_mut().clear();
        let told = self.laws.before_reload(&self.hub.borrow());
        self.reload.run(&self.hub, &self.entrance, self.now);
        let hub = self.hub.borrow();
        let (file, opened) = (self.outside.file.borrow(), self.outside.opened.borrow());
        self.laws.after_reload(told, &hub, &file, &opened, self.now);
    }

    /// Everybody leaves, and what is over ends; nobody stays for long any more.
    pub fn wind_down(&mut self) {
        self.sky.refusing.borrow_mut().clear();
        while !self.members.is_empty() {
            self.farewell(0);
        }
        self.outside.file.replace(plan::first());
        self.outside.taken.set(false);
        self.read_file();
        let refused = self.hub.borrow().reload.refused.clone();
        assert_eq!(refused, None, "there is nothing wrong with the last file");
        let over = self.now.plus(Duration::from_secs(30));
        while self.now < over {
            for worker in self.sky.workers.borrow_mut().iter_mut() {
                worker.sessions.iter_mut().for_each(|session| session.lasts = 25);
            }
            self.pass(Duration::from_millis(50));
            self.beat();
        }
        let hub = self.hub.borrow();
        self.laws.over(&hub, &self.sky.workers.borrow());
    }
}

/// How long a drain may last, in whichever way it is said.
fn lasts(random: &mut Random, ms_max: u64) -> Lasts {
    match random.below(6) {
        0 => Lasts::Never,
        1 => Lasts::AsSet,
        _ => Lasts::For(Duration::from_millis(random.below(ms_max))),
    }
}

/// The doors that are open from the start.
fn first_doors(config: &Config, control: &mut [ControlEnd], now: Now) -> UserDoors {
    let mut doors = UserDoors::default();
    let step = doors.step(&plans::doors(config), now).unwrap();
    let at: Vec<SocketAddr> = step.open.iter().map(|door| door.plan.address).collect();
    doors.take(&step, &at, now, now, Duration::ZERO);
    for door in doors.open() {
        for end in &mut *control {
            let socket = std::fs::File::open("/dev/null").unwrap().into();
            let listener = Listener { id: door.id, socket, service: door.service, is_tls: false };
            end.doors.push((door.protocol, DoorChange::Open(listener))).unwrap();
        }
    }
    doors
}
