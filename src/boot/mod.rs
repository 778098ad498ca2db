//! From a configuration to a running balancer. Owns the order in which things start and stop: limits,
//! doors, workers, control core; the only place where both planes meet.

pub mod capacity;
pub mod circles;
pub mod datagrams;
pub mod doors;
mod next;
mod plane;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use tracing::info;

use crate::client::demo;
use crate::cluster::{Protocol, ServiceId};
use crate::config::reload::Prepared;
use crate::config::services::ServiceIds;
use crate::config::{Config, Listen, LogFormat};
use crate::control::auth::Secrets;
use crate::control::doors::{NewDoor, OpenDoor, put_addresses};
use crate::control::reload::{Asked, Reload, Reread};
use crate::control::rights::{Keys, who_may_register};
use crate::control::{Control, Listeners};
use crate::logs;
use crate::proxy::line::Features;
use crate::ring::probe;
use doors::open_users;
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
/// is called for the settings again on SIGHUP. Whoever sits at a terminal is told what to type next,
/// with the `name` that this program was called by.
pub fn serve(mut config: Config, demo: usize, reread: Reread, name: &str) -> Result<(), Trouble> {
    who_may_register(&config).map_err(Trouble)?;
    circles::refuse(&config)?;
    // An unusable file is reported before the doors are said to be open.
    Keys::load(&config).map_err(Trouble)?;
    config.admin.token_file.as_deref().map(Secrets::load).transpose().map_err(Trouble)?;
    let kernel = probe::probe().map_err(|error| Trouble(error.to_string()))?;
    let sessions = capacity::sessions(&config)?;
    config.limits.sessions = sessions;
    let asked = Asked::of(&config);
    let listeners = Listeners {
        control: doors::open(config.listen.control, "control")?,
        admin: doors::open(config.listen.admin, "admin")?,
    };
    // From here on the configuration has the real addresses, including ports that the kernel chose.
    config.listen.control = listeners.control.as_ref().and_then(|door| door.local_addr().ok());
    config.listen.admin = listeners.admin.as_ref().and_then(|door| door.local_addr().ok());
    let features = Features { receive_cap: kernel.receive_cap, splice: kernel.receive_cap };
    let plane = DataPlane::start(&config, sessions, features)?;
    config.listen.tcp = plane.door(Protocol::Tcp);
    config.listen.udp = plane.door(Protocol::Udp);
    config.listen.api = plane.door(Protocol::Api);
    put_addresses(plane.doors.open(), &mut config.services);
    tell_doors(&config.listen, plane.doors.open());
    info!(kernel = %kernel.release, workers = plane.ends.len(), sessions, "ready");
    let demo = start_demo(&config, demo, name)?;
    let (workers, gro) = (plane.ends.len(), config.udp.gro);
    let reload = Reload {
        fit: Box::new(fit),
        open: Box::new(move |doors: &[NewDoor]| {
            open_users(doors, workers, gro).map_err(|Trouble(sentence)| sentence)
        }),
        reread,
        seats: plane.seats,
        asked,
        ids: ServiceIds::behind(&config),
        prepared: Prepared::for_doors_of(&config),
    };
    let control = Control {
        config: Arc::new(config),
        listeners,
        ends: plane.ends,
        snapshots: plane.snapshots,
        doors: plane.doors,
        urgent: plane.urgent,
    };
    plane::keep_off_workers(control.ends.len());
    let outcome = control.run(reload).map_err(|error| Trouble(error.to_string()));
    plane.threads.join();
    if let Some(demo) = demo {
        demo.stop();
    }
    if outcome.is_ok() {
        info!("stopped");
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

/// Settings that are read again must fit the host, as the first ones had to.
fn fit(config: &mut Config) -> Result<(), String> {
    let sentence = |Trouble(sentence)| sentence;
    circles::refuse(config).map_err(sentence)?;
    config.limits.sessions = capacity::sessions(config).map_err(sentence)?;
    Ok(())
}

/// Whether there is a person to talk to: a program that reads the log expects nothing but its lines.
fn greets(config: &Config) -> bool {
    config.log.format == LogFormat::Text && logs::is_on_terminal()
}

/// Starts the echo backends, if any, and tells what to type next once they are there.
fn start_demo(config: &Config, each: usize, name: &str) -> Result<Option<demo::Demo>, Trouble> {
    let next = if greets(config) { next::text(config, name, each) } else { String::new() };
    let open = |protocol: &Protocol| match protocol {
        Protocol::Tcp => config.listen.tcp.is_some(),
        Protocol::Udp => config.listen.udp.is_some(),
        Protocol::Api => config.listen.api.is_some(),
    };
    let protocols: Vec<_> = Protocol::ALL.into_iter().filter(open).collect();
    let any = each > 0 && !protocols.is_empty();
    let Some(control) = config.listen.control.filter(|_| any) else {
        logs::tell(&next);
        return Ok(None);
    };
    let secret = match &config.control.secret_file {
        Some(file) => Some(Secrets::load(file).map_err(Trouble)?),
        None => None,
    };
    let secret = secret.as_ref().map(Secrets::first);
    demo::start(each, control, secret, &protocols, move || logs::tell(&next))
        .map(Some)
        .map_err(|error| Trouble(format!("cannot start the demo backends: {error}")))
}
