//! What a run is made of: its sizes, and the settings that are drawn for it. Owns every number that says how
//! hostile the world is.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use lb::cluster::{OnBackendLoss, Policy, Protocol, WhenAllFail};
use lb::config::Config;
use lb::config::services::{
    CheckConfig, CheckKind, GroupShare, OnFail, ServiceConfig, StaticBackend,
};

use crate::random::Random;

pub const WORKERS: usize = 3;
/// Places for backends: few, so that each is given again and again.
pub const PLACES: usize = 40;
pub const STEPS: usize = 2500;
/// The most sessions at once, over all workers.
pub const SEATS: usize = 400;
/// The longest that a worker does not turn at all.
pub const STALL_MAX: Duration = Duration::from_secs(1);
/// Within this time each worker has made two whole turns, whatever happens.
pub const LAG: Duration = Duration::from_secs(3);

/// The services that come and go; one goes by the same protocol whenever it is there.
pub const NAMES: [(&str, Protocol); 8] = [
    ("redis", Protocol::Tcp),
    ("mysql", Protocol::Tcp),
    ("mail", Protocol::Tcp),
    ("dns", Protocol::Udp),
    ("game", Protocol::Udp),
    ("shop", Protocol::Api),
    ("blog", Protocol::Api),
    ("wiki", Protocol::Api),
];
const GROUPS: [&str; 3] = ["blue", "green", "grey"];
const BACKEND_PORTS: u64 = 6;

fn door(protocol: Protocol, random: &mut Random) -> SocketAddr {
    let first = match protocol {
        Protocol::Tcp => 7000,
        Protocol::Udp => 7100,
        Protocol::Api => 7200,
    };
    // Few, so that one service often wants the door that another has just had.
    let port = match random.one_in(8) {
        true => 0,
        false => first + random.below(5) as u16,
    };
    ([127, 0, 0, 1], port).into()
}

/// Where a backend may be: the same few addresses for all services.
pub fn backend(random: &mut Random) -> SocketAddr {
    ([192, 0, 2, 1], 9000 + random.below(BACKEND_PORTS) as u16).into()
}

fn listen(protocol: Protocol, random: &mut Random) -> Vec<SocketAddr> {
    let doors = if protocol == Protocol::Api { random.between(1, 2) } else { random.below(3) };
    let mut listen: Vec<SocketAddr> = Vec::new();
    for _ in 0..doors {
        let door = door(protocol, random);
        if !listen.contains(&door) {
            listen.push(door);
        }
    }
    listen
}

fn groups(random: &mut Random) -> Vec<GroupShare> {
    let shares: &[&[u8]] = &[&[1, 3], &[0, 2], &[95, 5], &[5, 5, 1], &[1, 0, 0], &[1]];
    let shares = random.pick(shares);
    let group = |(name, share): (&&str, &u8)| GroupShare { name: (*name).into(), share: *share };
    GROUPS.iter().zip(shares).map(group).collect()
}

fn check(protocol: Protocol, random: &mut Random) -> CheckConfig {
    let default = CheckConfig::default();
    if random.half() {
        return default;
    }
    CheckConfig {
        kind: CheckKind::Tcp,
        port: (protocol == Protocol::Udp).then_some(8008),
        interval: Duration::from_millis(random.between(200, 800)),
        timeout: Some(Duration::from_millis(100)),
        rise: random.between(1, 2) as u32,
        fall: random.between(1, 3) as u32,
        on_fail: random.pick(&[OnFail::Keep, OnFail::Close]),
        when_all_fail: random.pick(&[WhenAllFail::Refuse, WhenAllFail::Serve]),
        ..default
    }
}

fn listed(groups: &[GroupShare], random: &mut Random) -> Vec<StaticBackend> {
    let count = random.below(4) as usize;
    let mut all: Vec<StaticBackend> = Vec::new();
    for _ in 0..count {
        let (address, weight) = (backend(random), random.between(1, 3) as u16);
        let group = (!groups.is_empty()).then(|| groups[random.place(groups.len())].name.clone());
        if all.iter().all(|other| other.address != address) {
            all.push(StaticBackend {
                address,
                weight,
                proxy: false,
                http2: false,
                tls: None,
                group,
            });
        }
    }
    all
}

/// A table for a service, as an operator may write it.
pub fn service(name: &str, protocol: Protocol, random: &mut Random) -> ServiceConfig {
    let mut table = ServiceConfig::new(name, protocol);
    table.listen = listen(protocol, random);
    if protocol == Protocol::Api {
        table.hosts = vec![lb::cluster::route::Host::Exact(format!("{name}.test").into())];
    }
    if random.one_in(3) {
        table.groups = groups(random);
    }
    table.policy = Some(random.pick(&Policy::ALL));
    table.on_backend_loss = Some(random.pick(&[OnBackendLoss::Keep, OnBackendLoss::Close]));
    table.check = check(protocol, random);
    table.backends = listed(&table.groups, random);
    table.sessions = random.one_in(6).then_some(NonZeroU32::new(5).unwrap());
    table.backend_sessions = random.one_in(6).then_some(NonZeroU32::new(3).unwrap());
    if protocol == Protocol::Tcp && !table.listen.is_empty() && random.one_in(3) {
        table.proxy_from = vec!["10.0.0.0/8".parse().unwrap()];
    }
    table.connect = Some(Duration::from_millis(random.between(100, 400)));
    table
}

/// Draws another file: services come, change and go. It may have faults.
pub fn edit(file: &mut Config, random: &mut Random) {
    for (name, protocol) in NAMES {
        let place = file.services.iter().position(|table| table.name == name);
        match place {
            Some(place) if random.one_in(5) => drop(file.services.remove(place)),
            Some(place) if random.one_in(4) => {
                let before = file.services[place].clone();
                let mut after = service(name, protocol, random);
                if random.half() {
                    after.listen = before.listen;
                }
                file.services[place] = ServiceConfig { id: before.id, ..after };
            }
            None if random.one_in(3) => file.add_service(service(name, protocol, random)),
            _ => {}
        }
    }
    file.balance.drain = Duration::from_millis(random.between(200, 3000));
    // In the order of the file.
    let services = std::mem::take(&mut file.services);
    file.set_services(services);
}

/// The first settings, with nothing but a door of one built-in service.
pub fn first() -> Config {
    let mut config = Config::default();
    let listen = &mut config.listen;
    listen.tcp = Some(([127, 0, 0, 1], 6999).into());
    listen.udp = Some(([127, 0, 0, 1], 6999).into());
    listen.api = Some(([127, 0, 0, 1], 6998).into());
    (listen.control, listen.admin) = (None, None);
    config.api.head_timeout = Duration::from_secs(1);
    config.balance.drain = Duration::from_secs(1);
    config.limits.sessions = SEATS;
    config.limits.udp_sessions = SEATS;
    config
}
