//! From a configuration to a running balancer. Owns the order in which things start and stop: limits,
//! doors, workers, control core; the only place where both planes meet.

pub mod capacity;
pub mod circles;
pub mod datagrams;
pub mod doors;
mod plane;
pub mod plans;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use tracing::info;

use crate::client::demo;
use crate::cluster::{Protocol, ServiceId};
use crate::config::services::ServiceConfig;
use crate::config::{Config, Listen};
use crate::control::auth::Secrets;
use crate::control::reload::{Reload, Reread};
use crate::control::rights::{Keys, who_may_register};
use crate::control::{Control, Listeners};
use crate::proxy::line::Features;
use crate::ring::probe;
pub use doors::OpenDoor;
pub use plane::{DataPlane, WORKERS_MAX, buffers, workers};

/// Why the balancer did not start: one sentence for the operator, with the cure.
#[derive(Debug)]
pub struct Trouble(pub String);

impl fmt::Display for Trouble {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Trouble {}

/// Runs a balancer until it is told to stop, with `demo` echo backends for each open door. `reread`
/// is called for the settings again on SIGHUP.
pub fn serve(mut config: Config, demo: usize, reread: Reread) -> Result<(), Trouble> {
    who_may_register(&config).map_err(Trouble)?;
    circles::refuse(&config)?;
    // An unusable file is reported before the doors are said to be open.
    Keys::load(&config).map_err(Trouble)?;
    config.admin.token_file.as_deref().map(Secrets::load).transpose().map_err(Trouble)?;
    let kernel = probe::probe().map_err(|error| Trouble(error.to_string()))?;
    let sessions = capacity::sessions(&config)?;
    config.limits.sessions = sessions;
    let asked = Asked { listen: config.listen.clone(), services: config.services.clone() };
    let listeners = Listeners {
        control: doors::open(config.listen.control, "control")?,
        admin: doors::open(config.listen.admin, "admin")?,
    };
    // From here on the configuration has the real addresses, including ports that the kernel chose.
    config.listen.control = listeners.control.as_ref().and_then(|door| door.local_addr().ok());
    config.listen.admin = listeners.admin.as_ref().and_then(|door| door.local_addr().ok());
    let features = Features { receive_cap: kernel.receive_cap, splice: kernel.receive_cap };
    let plane = DataPlane::start(&config, sessions, features)?;
    config.listen.tcp = plane.tcp;
    config.listen.udp = plane.udp;
    config.listen.api = plane.api;
    put_real_doors(&mut config.services, &plane.doors);
    tell_doors(&config.listen, &plane.doors);
    info!(kernel = %kernel.release, workers = plane.ends.len(), sessions, "ready");
    let demo = start_demo(&config, demo)?;
    let open = Asked { listen: config.listen.clone(), services: config.services.clone() };
    let reread = fitting(reread, asked, open);
    let fits =
        Box::new(|config: &Config| circles::refuse(config).map_err(|Trouble(sentence)| sentence));
    let reload = Reload { fits, reread, seats: plane.seats };
    let control = Control {
        config: Arc::new(config),
        listeners,
        ends: plane.ends,
        snapshots: plane.snapshots,
        urgent: plane.urgent,
    };
    plane::keep_off_workers(control.ends.len());
    let outcome = control.run(reload).map_err(|error| Trouble(error.to_string()));
    plane.threads.join();
    if let Some(demo) = demo {
        demo.stop();
    }
    outcome
}

fn tell_doors(listen: &Listen, users: &[OpenDoor]) {
    let built_in = |door: &&OpenDoor| door.service == ServiceId::built_in(door.protocol);
    for OpenDoor { name, protocol, address, .. } in users.iter().filter(|door| !built_in(door)) {
        info!(service = &**name, %protocol, %address, "door of a service open");
    }
    let at =
        |door: Option<SocketAddr>| door.map_or("off".to_owned(), |address| address.to_string());
    info!(
        tcp = at(listen.tcp),
        udp = at(listen.udp),
        api = at(listen.api),
        control = at(listen.control),
        admin = at(listen.admin),
        "doors open"
    );
}

/// The settings that say where the doors are.
struct Asked {
    listen: Listen,
    services: Vec<ServiceConfig>,
}

/// Gives services the addresses of their doors, including ports that the kernel chose. A door that API
/// services share is known by the first of them, and the others keep what they asked for.
fn put_real_doors(services: &mut [ServiceConfig], open: &[OpenDoor]) {
    for service in services {
        let own = open.iter().filter(|door| *door.name == *service.name);
        let own: Vec<SocketAddr> = own.map(|door| door.address).collect();
        if own.len() == service.listen.len() {
            service.listen = own;
        }
    }
}

/// Settings that are read again must fit the host, as the first ones had to. A door `asked` for as
/// before is the one that is `open`, even if the kernel chose its port.
fn fitting(mut reread: Reread, asked: Asked, open: Asked) -> Reread {
    Box::new(move || {
        let mut config = reread()?;
        if config.listen == asked.listen {
            config.listen = open.listen.clone();
        }
        for service in &mut config.services {
            let as_before =
                |it: &&ServiceConfig| it.name == service.name && it.listen == service.listen;
            let place = asked.services.iter().position(|it| as_before(&it));
            if let Some(place) = place {
                service.listen.clone_from(&open.services[place].listen);
            }
        }
        circles::refuse(&config).map_err(|Trouble(sentence)| sentence)?;
        config.limits.sessions =
            capacity::sessions(&config).map_err(|Trouble(sentence)| sentence)?;
        Ok(config)
    })
}

fn start_demo(config: &Config, each: usize) -> Result<Option<demo::Demo>, Trouble> {
    let Some(control) = config.listen.control.filter(|_| each > 0) else { return Ok(None) };
    let open = |protocol: &Protocol| match protocol {
        Protocol::Tcp => config.listen.tcp.is_some(),
        Protocol::Udp => config.listen.udp.is_some(),
        Protocol::Api => config.listen.api.is_some(),
    };
    let protocols: Vec<_> = Protocol::ALL.into_iter().filter(open).collect();
    let secret = match &config.control.secret_file {
        Some(file) => Some(Secrets::load(file).map_err(Trouble)?),
        None => None,
    };
    demo::start(each, control, secret.as_ref().map(Secrets::first), &protocols)
        .map(Some)
        .map_err(|error| Trouble(format!("cannot start the demo backends: {error}")))
}
