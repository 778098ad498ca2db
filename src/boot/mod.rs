//! From a configuration to a running balancer. Owns the order in which things start and stop: limits,
//! doors, workers, control core; the only place where both planes meet.

pub mod capacity;
pub mod circles;
pub mod cores;
pub mod datagrams;
pub mod doors;
mod heritage;
pub mod needs;
mod next;
mod plane;
pub mod tls;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tracing::{error, info, warn};

use crate::base::time::Now;
use crate::client::demo;
use crate::cluster::seats::Seats;
use crate::cluster::{Protocol, ServiceId};
use crate::config::reload::Prepared;
use crate::config::services::ServiceIds;
use crate::config::{Admin, Config, Listen, LogFormat, doubts};
use crate::control::auth::Secrets;
use crate::control::certificates::Watch;
use crate::control::doors::{NewDoor, OpenDoor, put_addresses};
use crate::control::reload::{Asked, Reload, Reread};
use crate::control::succession::Means;
use crate::control::{Control, Ending};
use crate::handover::predecessor::Predecessor;
use crate::handover::successor::Program;
use crate::logs;
use crate::proxy::line::Features;
use crate::ring::{probe, sys};
use doors::open_users;
use heritage::Heirs;
pub use plane::{DataPlane, WORKER_THREAD, WORKERS_MAX, buffers, workers};

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
///
/// In the place of the `old` balancer, if there is one: nothing is opened that it has, and it leaves everything
/// to this one once that could go on. `program`: how this one is started again, for a successor of its own.
pub fn serve(
    mut config: Config,
    demo: usize,
    reread: Reread,
    name: &str,
    program: Option<Program>,
    mut old: Option<Predecessor>,
) -> Result<Ending, Trouble> {
    heritage::number(&mut config, old.as_ref())?;
    needs::refuse(&config)?;
    let kernel = probe::probe().map_err(|error| Trouble(error.to_string()))?;
    let asked = Asked::of(&config);
    let derived = capacity::settle(&mut config)?;
    let (sessions, workers) = (config.limits.sessions, plane::workers(&config));
    let (listeners, own) = heritage::open_own(&mut config, old.as_mut())?;
    let cores = sys::cores();
    let features = Features { receive_cap: kernel.receive_cap, splice: kernel.receive_cap };
    let plane = DataPlane::start_after(&config, sessions, features, old.as_mut())?;
    put_doors(&plane, &mut config);
    tell_doors(&config.listen, plane.doors.open());
    info!(kernel = %kernel.release, workers, sessions, "ready");
    plane.cores.tell();
    tell_settings(&config, &derived);
    let demo = start_demo(&config, demo, name)?;
    let reload = reload(&config, workers, (plane.seats, asked), reread);
    let control = Control {
        config: Arc::new(config),
        derived,
        via: plane.made_up_via,
        listeners,
        ends: plane.ends,
        snapshots: plane.snapshots,
        doors: plane.doors,
        urgent: plane.urgent,
    };
    // A long answer to an operator would hold up the users of a worker on the same core.
    sys::pin(&plane.cores.control);
    let claims = plane.cores.into_claims();
    let (is_successor, old) = (old.is_some(), old.map(|old| (old, plane.awaited)));
    let heirs =
        Heirs { program, is_demo: demo.is_some(), is_successor, withdrawal: kernel.withdrawal };
    let means = Means { program: heritage::heirs(heirs), own, claims, cores, old };
    let outcome = control.run(reload, means).map_err(|error| Trouble(error.to_string()));
    if is_successor && outcome.is_err() {
        // Its workers stand still, or have nobody any more who leads them; they end with the process.
        return outcome;
    }
    plane.threads.join();
    if let Some(demo) = demo {
        demo.stop();
    }
    match outcome.as_ref() {
        Ok(Ending::Stopped) => info!("stopped"),
        Ok(Ending::Orphaned) => error!("nobody serves any more: start the balancer again"),
        // Of a process that another has succeeded there is nothing more to say.
        Ok(Ending::Succeeded) | Err(_) => {}
    }
    outcome
}

/// From now on the configuration has the real addresses of the users' doors.
fn put_doors(plane: &DataPlane, config: &mut Config) {
    config.listen.tcp = plane.door(Protocol::Tcp);
    config.listen.udp = plane.door(Protocol::Udp);
    config.listen.api = plane.door(Protocol::Api);
    config.listen.api_tls = plane.doors.api_tls();
    put_addresses(plane.doors.open(), &mut config.services);
}

/// What changes the settings while everything runs.
fn reload(
    config: &Config,
    workers: usize,
    (seats, asked): (Arc<Seats>, Asked),
    reread: Reread,
) -> Reload {
    let gro = config.udp.gro;
    Reload {
        fit: Box::new(move |config| fit(config, workers)),
        open: Box::new(move |doors: &[NewDoor]| {
            open_users(doors, workers, gro).map_err(|Trouble(sentence)| sentence)
        }),
        certify: Box::new(move |wanted, before| tls::load(wanted, workers, Some(before))),
        reread,
        seats,
        asked,
        ids: ServiceIds::behind(config),
        prepared: Prepared::for_doors_of(config),
        watch: Watch::new(&config.tls_files(), Now::read()),
    }
}

/// Tells what the settings have come to, beyond the doors.
fn tell_settings(config: &Config, derived: &[String]) {
    if !derived.is_empty() {
        info!(settings = derived.join(", "), "auto stands for");
    }
    for warning in doubts::warnings(config) {
        warn!(%warning, "settings");
    }
    if let Some(door) = config.listen.admin {
        info!(address = %page_at(door), changes = changes(&config.admin), "page for browsers");
    }
}

fn tell_doors(listen: &Listen, users: &[OpenDoor]) {
    let built_in = |door: &&OpenDoor| door.service == ServiceId::built_in(door.protocol);
    for OpenDoor { name, protocol, address, .. } in users.iter().filter(|door| !built_in(door)) {
        info!(service = %name, %protocol, %address, "door of a service open");
    }
    let at =
        |door: Option<SocketAddr>| door.map_or("off".to_owned(), |address| address.to_string());
    info!(
        tcp = at(listen.tcp),
        udp = at(listen.udp),
        api = at(listen.api),
        api_tls = at(listen.api_tls),
        control = at(listen.control),
        admin = at(listen.admin),
        "doors open"
    );
}

/// Where a browser on this host finds the page of an admin door.
fn page_at(door: SocketAddr) -> String {
    format!("http://{}/", from_here(door))
}

/// A door as this host reaches it.
pub fn from_here(door: SocketAddr) -> String {
    let port = door.port();
    match door.ip().to_canonical() {
        // It takes connections over IPv4 too, except where the kernel has been told otherwise.
        IpAddr::V6(ip) if ip.is_unspecified() => format!("localhost:{port}"),
        IpAddr::V4(ip) if ip.is_unspecified() => format!("127.0.0.1:{port}"),
        ip => SocketAddr::new(ip, port).to_string(),
    }
}

/// With what an operator may make changes.
fn changes(admin: &Admin) -> String {
    let token = admin.token_file.as_ref().map(|file| format!("with a token of {}", file.display()));
    let socket = admin.socket.as_ref().map(|path| format!("over the socket {}", path.display()));
    let ways: Vec<String> = token.into_iter().chain(socket).collect();
    match ways.is_empty() {
        true => "none: set admin.token_file or admin.socket to allow them".to_owned(),
        false => ways.join(" or "),
    }
}

/// Settings that are read again must fit the host, as the first ones had to. The workers stay as many as
/// they are.
fn fit(config: &mut Config, workers: usize) -> Result<Vec<String>, String> {
    let sentence = |Trouble(sentence)| sentence;
    circles::refuse(config).map_err(sentence)?;
    let asked = config.workers;
    config.workers = asked.or(Some(workers));
    let mut derived = capacity::settle(config).map_err(sentence)?;
    if asked.is_none() {
        derived.insert(0, format!("workers = {workers}"));
    }
    Ok(derived)
}

/// Whether there is a person to talk to: a program that reads the log expects nothing but its lines.
fn greets(config: &Config) -> bool {
    config.log.format == LogFormat::Text && logs::is_on_terminal()
}

/// Starts the echo backends, if any, and tells what to type next once they are there.
fn start_demo(config: &Config, each: usize, name: &str) -> Result<Option<demo::Demo>, Trouble> {
    let next = if greets(config) { next::text(config, name, each) } else { String::new() };
    let protocols: Vec<_> = Protocol::ALL.into_iter().filter(|it| config.listen.has(*it)).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_where_a_browser_on_this_host_can_go() {
        for (door, address) in [
            ("127.0.0.1:8084", "http://127.0.0.1:8084/"),
            ("0.0.0.0:8084", "http://127.0.0.1:8084/"),
            ("[::]:8084", "http://localhost:8084/"),
            ("[::1]:8084", "http://[::1]:8084/"),
            ("192.168.1.5:80", "http://192.168.1.5:80/"),
            ("[::ffff:127.0.0.1]:1", "http://127.0.0.1:1/"),
            ("[2001:db8::1]:8084", "http://[2001:db8::1]:8084/"),
        ] {
            assert_eq!(page_at(door.parse().unwrap()), address);
        }
    }

    #[test]
    fn an_operator_is_told_with_what_changes_can_be_made() {
        let mut admin = Admin::default();
        assert!(changes(&admin).starts_with("none: set admin.token_file"));
        admin.socket = Some("/run/lb/admin.sock".into());
        assert_eq!(changes(&admin), "over the socket /run/lb/admin.sock");
        admin.token_file = Some("/etc/lb/token".into());
        assert_eq!(
            changes(&admin),
            "with a token of /etc/lb/token or over the socket /run/lb/admin.sock"
        );
    }
}
