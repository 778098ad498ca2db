//! The workers as one thing: their doors, threads, links and what they share. Owns their start and
//! their end; knows nothing of the control core beyond its end of the links.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Barrier, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use super::cores::Cores;
use super::datagrams::{DatagramPlan, Datagrams};
use super::doors::open_users;
use super::{Trouble, capacity, tls};
use crate::base::publish::Publisher;
use crate::base::thread;
use crate::base::time::Now;
use crate::cluster::hash_key::HashKey;
use crate::cluster::seats::Seats;
use crate::cluster::share::seal::hash_key;
use crate::cluster::{DoorId, Doors, Protocol, ServiceId, Snapshot};
use crate::config::{Config, plans, rules};
use crate::control::etcd;
use crate::control::{
    self,
    doors::{NO_NUMBER, NewDoor, OpenDoor, Opened, UserDoors, put_addresses},
};
use crate::handover::predecessor::Predecessor;
use crate::handover::words::UserDoor;
use crate::metrics::WorkerMetrics;
use crate::proxy::http;
use crate::proxy::line::Features;
use crate::ring::{Ring, RingSettings, probe, sys};
use crate::worker::books::{Books, Parts};
use crate::worker::brake::Request;
use crate::worker::driver::Driver;
use crate::worker::http::driver::HttpDriver;
use crate::worker::http::requests::Requests;
use crate::worker::link::{ControlEnd, DoorChange, Listener, WorkerEnd, link};
use crate::worker::shell::{Shell, WorkerLoop};
use crate::worker::tcp::driver::TcpDriver;
use crate::worker::{family, http as api};

pub use crate::config::keys::WORKERS_MAX;

/// How the names of the workers' threads begin, by which other processes know a balancer.
pub const WORKER_THREAD: &str = "lb-worker-";

const ENDED: &str = "a worker ended while starting";

/// The running workers, and what the control core needs of them.
pub struct DataPlane {
    pub ends: Vec<ControlEnd>,
    pub snapshots: Publisher<Snapshot>,
    pub urgent: Arc<tokio::sync::Notify>,
    pub seats: Arc<Seats>,
    pub doors: UserDoors,
    pub threads: Threads,
    pub cores: Cores,
    /// The name in `Via`, if the settings have none.
    pub made_up_via: Option<String>,
    /// Doors whose sockets are still to come from a predecessor.
    pub awaited: Vec<OpenDoor>,
}

/// The workers' threads.
pub struct Threads(Vec<JoinHandle<()>>);

/// Starts the thread of a worker.
fn spawn<T: Send + 'static>(
    number: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Trouble> {
    thread::spawn(&format!("{WORKER_THREAD}{number}"), work).map_err(|error| {
        Trouble(format!(
            "cannot start a worker thread: {error}; raise `ulimit -u` (systemd: TasksMax), or lower workers"
        ))
    })
}

/// The ring of the worker on whose thread this is called.
fn ring(settings: RingSettings) -> Result<Ring, Trouble> {
    probe::patiently(|| Ring::new(settings))
        .map_err(|error| Trouble(probe::explain(&error).to_string()))
}

/// Whether the workers and the control core would get their threads and their rings here, all at the same
/// time.
///
/// # Errors
/// What [`DataPlane::start`] or the control core would say.
pub fn try_rings(config: &Config) -> Result<(), Trouble> {
    let workers = workers(config);
    Threads::try_out(workers, buffers(config, workers), || {
        control::try_ring().map_err(|error| Trouble(error.to_string()))
    })
}

impl Threads {
    /// Returns when every worker accepts users.
    fn start(plans: Vec<Plan>) -> Result<Threads, Trouble> {
        let (workers, (ready, started)) = (plans.len(), mpsc::channel());
        let mut threads = Vec::new();
        for (number, plan) in plans.into_iter().enumerate() {
            let ready = ready.clone();
            threads.push(spawn(number, move || plan.run(ready))?);
        }
        for _ in 0..workers {
            started.recv().map_err(|_| Trouble(ENDED.into()))??;
        }
        Ok(Threads(threads))
    }

    /// Tries whether each worker would get a thread and a ring with its buffers, all at the same time, and
    /// whether there would still be enough for `rest`.
    ///
    /// # Errors
    /// What [`Threads::start`] or `rest` would say.
    fn try_out(
        workers: usize,
        each: RingSettings,
        rest: impl FnOnce() -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        // Nobody gives back what another may still need.
        let (all, end) = (Arc::new(Barrier::new(workers + 1)), Arc::new(Barrier::new(workers + 1)));
        let mut tried = Vec::new();
        for number in 0..workers {
            let (all, end) = (Arc::clone(&all), Arc::clone(&end));
            // If one of them does not start, the process ends, and with it the others who wait for it.
            tried.push(spawn(number, move || {
                let ring = ring(each);
                all.wait();
                end.wait();
                ring.map(drop)
            })?);
        }
        all.wait();
        let outcome = rest();
        end.wait();
        let mut joined = tried.into_iter().map(JoinHandle::join);
        joined.try_for_each(|it| it.unwrap_or_else(|_| Err(Trouble(ENDED.into()))))?;
        outcome
    }

    /// Waits for the workers, which have been told to stop.
    pub fn join(self) {
        for thread in self.0 {
            // A worker's panic has ended the process already (`panic = "abort"`).
            let _ = thread.join();
        }
    }
}

impl DataPlane {
    /// Where users of a built-in service come in.
    pub fn door(&self, protocol: Protocol) -> Option<SocketAddr> {
        self.doors.at(ServiceId::built_in(protocol))
    }

    /// Opens the users' doors and starts the workers; returns when every worker accepts users.
    pub fn start(
        config: &Config,
        sessions_max: usize,
        features: Features,
    ) -> Result<DataPlane, Trouble> {
        DataPlane::start_after(config, sessions_max, features, None)
    }

    /// The same in the place of a balancer that runs, if there is one: its doors are not opened a second time,
    /// and the workers stand still until they have what it leaves.
    pub fn start_after(
        config: &Config,
        sessions_max: usize,
        features: Features,
        mut old: Option<&mut Predecessor>,
    ) -> Result<DataPlane, Trouble> {
        let workers = workers(config);
        let claims = old.as_deref_mut().map(Predecessor::claims).unwrap_or_default();
        let cores = Cores::take(workers, claims);
        let (doors, opened, awaited) = open_doors(config, workers, old.as_deref_mut())?;
        let via = old.as_deref().and_then(Predecessor::via).unwrap_or_else(made_up_name);
        let made_up_via = config.api.via.is_none().then_some(via);
        let via = config.api.via.clone().or(made_up_via.clone()).unwrap_or_default();
        let urgent = Arc::new(tokio::sync::Notify::new());
        let seats = Arc::new(Seats::new(sessions_max));
        let config = &with_addresses(config, &doors);
        let snapshots = Publisher::new(first_snapshot(config, &seats, &doors)?);
        // A reload may raise the limit as far as the descriptors reach.
        let room = capacity::most_sessions(config).max(sessions_max);
        let places = room + config.limits.udp_sessions;
        let (mut ends, worker_ends) = links(workers, places, &snapshots, &urgent)?;
        let wakes = ends.iter().map(|end| Arc::clone(&end.wake)).collect();
        let datagrams = Datagrams::new(config, wakes)?;
        let all_metrics: Arc<[_]> = ends.iter().map(|end| Arc::clone(&end.metrics)).collect();
        for (door, sockets) in doors.open().iter().zip(opened) {
            hand_out(door, sockets, &mut ends);
        }
        if old.is_some() {
            ends.iter().for_each(|end| end.ask(Request::Freeze));
        }
        let plan = |(number, end): (usize, WorkerEnd)| Plan {
            end,
            datagrams: datagrams.driver(number as u8),
            api: http::GatewaySettings {
                held_bytes_max: heads(config, workers),
                https_port: doors.api_tls().map(|door| door.port()),
                ids_seed: config.api.request_id.then(seed),
                ..http::GatewaySettings::of(config, &via)
            },
            request_lines: request_lines(config),
            core: cores.workers.get(number).copied(),
            ring: buffers(config, workers),
            features,
            all_metrics: Arc::clone(&all_metrics),
        };
        let threads = Threads::start(worker_ends.into_iter().enumerate().map(plan).collect())?;
        Ok(DataPlane {
            ends,
            snapshots,
            urgent,
            seats,
            doors,
            threads,
            cores,
            made_up_via,
            awaited,
        })
    }
}

/// Lines about API requests that the log takes each second.
fn request_lines(config: &Config) -> u32 {
    if config.reports_sessions() { config.log.requests_per_second } else { 0 }
}

/// The settings with the ports that the kernel chose for services.
fn with_addresses(config: &Config, doors: &UserDoors) -> Config {
    let mut config = config.clone();
    put_addresses(doors.open(), &mut config.services);
    config
}

/// Every door, the sockets of each at its place, and those doors whose sockets are still to come.
type AllDoors = (UserDoors, Vec<Vec<OwnedFd>>, Vec<OpenDoor>);

/// Opens every door that a predecessor does not have. Those that it has keep their numbers, by which sessions
/// name them.
fn open_doors(
    config: &Config,
    workers: usize,
    old: Option<&mut Predecessor>,
) -> Result<AllDoors, Trouble> {
    let (mut doors, now) = (UserDoors::default(), Now::read());
    let mut step = doors.step(&plans::doors(config), now).map_err(Trouble)?;
    let (mut opened, mut known) = (Vec::new(), Vec::new());
    if let Some(old) = old {
        known = number(&mut step.open, old)?;
        doors.number_from(old.hello.next_door);
    }
    for door in &step.open {
        opened.push(match known.iter().find(|(id, _)| *id == door.id) {
            Some((_, there)) => Opened { address: there.address, sockets: Vec::new() },
            None => open_users(std::slice::from_ref(door), workers, config.udp.gro)?.remove(0),
        });
    }
    let at: Vec<SocketAddr> = opened.iter().map(|door| door.address).collect();
    doors.take(&step, &at, now, now, Duration::ZERO);
    let is_known = |door: &&OpenDoor| known.iter().any(|(id, _)| *id == door.id);
    let awaited = doors.open().iter().filter(is_known).cloned().collect();
    Ok((doors, opened.into_iter().map(|door| door.sockets).collect(), awaited))
}

/// Gives doors that a predecessor has the numbers that they have there, and others numbers that no door has had;
/// returns the former.
fn number(
    doors: &mut [NewDoor],
    old: &mut Predecessor,
) -> Result<Vec<(DoorId, UserDoor)>, Trouble> {
    let (mut known, mut next) = (Vec::new(), old.hello.next_door);
    for door in doors {
        match old.user_door(&wanted(door)) {
            Some(there) => {
                door.id = DoorId(there.id);
                known.push((door.id, there));
            }
            None => {
                door.id = DoorId(next);
                next = next.checked_add(1).ok_or_else(|| Trouble(NO_NUMBER.into()))?;
            }
        }
    }
    Ok(known)
}

/// A door as a predecessor knows it.
fn wanted(door: &NewDoor) -> UserDoor {
    let plan = &door.plan;
    UserDoor {
        id: door.id.0,
        name: plan.name.name.to_string(),
        protocol: plan.protocol,
        asked: plan.address,
        address: plan.address,
        is_tls: plan.is_tls,
    }
}

/// Gives each worker its socket at a door.
fn hand_out(door: &OpenDoor, sockets: Vec<OwnedFd>, ends: &mut [ControlEnd]) {
    let OpenDoor { id, service, protocol, is_tls, .. } = *door;
    for (end, socket) in ends.iter_mut().zip(sockets) {
        let listener = Listener { id, socket, service, is_tls };
        let opened = end.doors.push((protocol, DoorChange::Open(listener)));
        opened.expect("the queue has room for every door that can be configured");
    }
}

/// The built-in services and the named ones, before anyone has registered.
fn first_snapshot(
    config: &Config,
    seats: &Arc<Seats>,
    doors: &UserDoors,
) -> Result<Snapshot, Trouble> {
    // UDP sessions cost no descriptors, and must not take the others' places.
    let udp_seats = Arc::new(Seats::new(config.limits.udp_sessions));
    let services = Snapshot::built_in(config.terms(), |protocol| match protocol {
        Protocol::Udp => Arc::clone(&udp_seats),
        Protocol::Tcp | Protocol::Api => Arc::clone(seats),
    });
    let mut all = services.services.to_vec();
    for named in &config.services {
        let kin = services.service(ServiceId::built_in(named.protocol));
        all.push(config.new_service(named, kin.expect("the built-in ones are there")));
    }
    let report_sessions = config.reports_sessions();
    let claims = rules::claims(config).map_err(Trouble)?;
    let doors = Arc::new(doors.routing(&claims, &Doors::default()));
    let tls = tls::load(config, workers(config), None).map_err(Trouble)?;
    let secrets = etcd::secrets(&config.cluster).map_err(Trouble)?;
    // All balancers of a cluster give a user to the same backend, and who does not know the secret cannot work out to
    // which.
    let key = secrets.map_or_else(HashKey::default, |secrets| hash_key(secrets.first()));
    Ok(Snapshot { report_sessions, services: all.into(), doors, tls, key, ..services })
}

/// A start for a sequence of random numbers, different each time.
fn seed() -> [u64; 2] {
    let mut seed = [[0; 8]; 2];
    getrandom::fill(seed.as_flattened_mut())
        .expect("the kernel has random bytes once it has booted");
    seed.map(u64::from_ne_bytes)
}

/// A name for `Via` that no other balancer has.
fn made_up_name() -> String {
    let mut bytes = [0; 6];
    // Without it, two balancers in a row could take each other for themselves.
    getrandom::fill(&mut bytes).expect("the kernel has random bytes once it has booted");
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("lb-{hex}")
}

/// Worker threads on this machine: one core is left to the control core. Fewer if the descriptors are not
/// enough for them.
pub fn workers(config: &Config) -> usize {
    let fit = || {
        let behind_control = sys::cores().len().saturating_sub(1);
        behind_control.min(capacity::workers_for(capacity::raise_descriptors()))
    };
    config.workers.unwrap_or_else(fit).clamp(1, WORKERS_MAX)
}

/// The buffers of one worker out of `workers`.
pub fn buffers(config: &Config, workers: usize) -> RingSettings {
    let bytes = config.limits.buffer_bytes / workers - heads(config, workers);
    RingSettings::with_bytes(bytes, plans::has_door(config, Protocol::Udp))
}

/// Bytes of its memory that each worker leaves to the heads of unfinished requests.
fn heads(config: &Config, workers: usize) -> usize {
    match plans::has_door(config, Protocol::Api) {
        true => config.limits.buffer_bytes / workers / http::HELD_SHARE,
        false => 0,
    }
}

/// What one worker thread is made from.
struct Plan {
    end: WorkerEnd,
    datagrams: DatagramPlan,
    api: http::GatewaySettings,
    request_lines: u32,
    core: Option<usize>,
    ring: RingSettings,
    features: Features,
    all_metrics: Arc<[Arc<WorkerMetrics>]>,
}

impl Plan {
    fn run(self, ready: mpsc::Sender<Result<(), Trouble>>) {
        sys::pin(self.core.as_slice());
        // The ring belongs to the thread that made it, and its memory to that thread's node.
        let ring = match ring(self.ring) {
            Ok(ring) => ring,
            Err(trouble) => {
                let _ = ready.send(Err(trouble));
                return;
            }
        };
        let worker = self.end.worker;
        let shell = self.build(ring);
        let _ = ready.send(Ok(()));
        if let Err(error) = shell.run() {
            panic!("worker {worker}: the kernel refused to go on with its ring: {error}");
        }
    }

    /// The worker's loop over its ring.
    fn build(self, ring: Ring) -> Shell {
        let journal =
            Requests::new(Arc::clone(&self.end.metrics), self.end.requests, self.request_lines);
        let books = Books::new(Parts {
            shard: self.end.shard,
            metrics: self.end.metrics,
            all_metrics: self.all_metrics,
            reports: self.end.reports,
            urgent: self.end.urgent,
        });
        let now = Now::read();
        let features = self.features;
        let journal = Box::new(journal);
        let users = api::sessions::Sessions::new(self.api, features, journal, now);
        let api = HttpDriver::new(users, now);
        let udp = self.datagrams.build(now);
        let tcp = TcpDriver::new(features, now);
        let drivers: Vec<(u8, Box<dyn Driver>)> = vec![
            (family::TCP, Box::new(tcp)),
            (family::UDP, Box::new(udp)),
            (family::API, Box::new(api)),
        ];
        let rest = WorkerLoop {
            books,
            snapshots: self.end.snapshots,
            orders: self.end.orders,
            doors: self.end.doors,
            brake: self.end.brake,
            late: self.end.late,
            wake: self.end.wake,
        };
        Shell::new(ring, drivers, rest)
    }
}

fn links(
    workers: usize,
    sessions_max: usize,
    snapshots: &Publisher<Snapshot>,
    urgent: &Arc<tokio::sync::Notify>,
) -> Result<(Vec<ControlEnd>, Vec<WorkerEnd>), Trouble> {
    let joined: nix::Result<Vec<_>> = (0..workers)
        .map(|worker| link(worker as u8, sessions_max, snapshots.subscribe(), Arc::clone(urgent)))
        .collect();
    let joined = joined.map_err(|errno| {
        Trouble(format!("cannot make an eventfd ({errno}); raise `ulimit -n` or LimitNOFILE"))
    })?;
    Ok(joined.into_iter().unzip())
}
