//! The services of a run and their backends. One service is the built-in one; more of them are told apart
//! by the host of a request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lb::cluster::doors::{Claimant, Claimed, Doors};
use lb::cluster::route::{Claim, Host};
use lb::cluster::seats::Seats;
use lb::cluster::{
    Backend, BackendId, DoorId, Doorway, Protocol, Service, ServiceId, Snapshot, Standing, Terms,
};

use crate::weather::Weather;

const API: ServiceId = ServiceId::built_in(Protocol::Api);

/// Hosts of the services after the built-in ones.
const HOSTS: [&str; 2] = ["shop.sim", "blog.sim"];

/// The host of the requests for a service, by its place among those of the run.
pub fn host(weather: &Weather, place: usize) -> &'static str {
    if weather.services == 1 { "sim" } else { HOSTS[place % weather.services] }
}

/// The host of the requests that a backend may get.
pub fn host_at(weather: &Weather, address: SocketAddr) -> &'static str {
    let place = usize::from(address.port() - 9000);
    assert!(place < weather.backends, "{address} is nobody's");
    host(weather, place)
}

fn address(backend: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 9000 + backend as u16))
}

/// The services of a run. Mistaking another for one of them would show: those have no patience. Everybody
/// sits at the built-in API service.
pub fn services(weather: &Weather, seats: &Arc<Seats>) -> Snapshot {
    let mut snapshot = Snapshot::built_in(Terms::default(), |protocol| match protocol {
        Protocol::Api => Arc::clone(seats),
        _ => Arc::new(Seats::new(0)),
    });
    if weather.services > 1 {
        add_named(weather, &mut snapshot);
    }
    let named = weather.services > 1;
    let serves = |it: &Service| it.kind == Protocol::Api && (it.id != API || !named);
    for service in snapshot.services.iter_mut().filter(|it| !serves(it)) {
        service.terms.timeouts.connect = Duration::from_nanos(1);
    }
    Snapshot { report_sessions: false, ..snapshot }
}

/// Where every user comes in.
pub const DOORWAY: Doorway = Doorway { door: DoorId(0), service: API, is_tls: false };

/// Adds services that share the door of the built-in one, which claims nothing itself.
fn add_named(weather: &Weather, snapshot: &mut Snapshot) {
    let built_in = snapshot.service(API).expect("it is built in").clone();
    let claimant = |service: ServiceId, host: Option<&str>| {
        let claim = |host: &str| Claim {
            host: Host::parse(host).expect("a name"),
            path: "".into(),
            service,
        };
        let claims = host.map(claim).into_iter().collect();
        Claimant { service, listen: vec![([192, 0, 2, 2], 80).into()], claims }
    };
    let (mut services, mut claimants) = (snapshot.services.to_vec(), vec![claimant(API, None)]);
    for place in 0..weather.services {
        let id = ServiceId(3 + place as u16);
        claimants.push(claimant(id, Some(host(weather, place))));
        let (seats, turn, gate) = (Arc::new(Seats::new(0)), Arc::default(), Arc::default());
        services.push(Service { id, seats, turn, gate, ..built_in.clone() });
    }
    snapshot.services = services.into();
    let claimed = Claimed::of(&[], &claimants).expect("each host is claimed once");
    let routing = claimed.at(claimants[0].listen[0], API).expect("all listen there");
    let mut doors = Doors::default();
    doors.set(DOORWAY.door, routing.clone());
    snapshot.doors = Arc::new(doors);
}

/// The backends of a run, of its services in turn.
pub fn backends(weather: &Weather) -> Vec<Backend> {
    let backend = |place: usize| Backend {
        proxy: false,
        http2: weather.http2 >> place & 1 == 1,
        tls: None,
        id: BackendId(place as u32),
        slot: place as u16,
        service: match weather.services {
            1 => API,
            services => ServiceId(3 + (place % services) as u16),
        },
        address: address(place),
        weight: 1,
        name: None,
        group: None,
        standing: Standing::Serving,
    };
    (0..weather.backends).map(backend).collect()
}
